//! The digests of blocks go where the blocks go ([`crate::digests`]).
//!
//! Each block has that of the image it is read from: the topmost child that holds it, else the base. The sidecar says the
//! target's uuid, and is published before the base does: until then it is that of no layer, and a merge that is resumed finds
//! what it needs either in it or in those it was made of. A VHD file's says how the file stands in the end; resumed, the base
//! was written to, and its own are not valid any more.

use storage::{Stat, WritableObject};
use uuid::Uuid;

use super::tops::Tops;
use super::{Image, Merge};
use crate::alias;
use crate::digest::Digest;
use crate::digests::{self, DIGESTS, Digests, Record, Sidecar};
use crate::error::Result;
use crate::geometry::{BlockIndex, FileSector};

/// Publishes the digests of an exploded base that has all blocks.
pub(super) fn publish(merge: &Merge, base: &Image, children: &[Image], tops: &Tops) -> Result<()> {
    let mut records = Vec::new();
    // The files were moved as they are, and so what is known of them holds.
    each(merge, base, children, tops, |_, _, record| records.push(*record));
    records.sort_unstable_by_key(|record| record.block);
    let sidecar = Sidecar { uuid: last_uuid(children), block_size: base.layer.block_size, file_size: None, records };
    digests::publish(&*merge.storage, &base.layer.data.join(DIGESTS)?, &sidecar);
    Ok(())
}

/// The digests of the blocks of VHD files that are about to be merged.
pub(super) struct Copied(Vec<(BlockIndex, Digest)>);

impl Copied {
    /// Looks them up before the base is written to.
    pub(super) fn of(merge: &Merge, base: &Image, children: &[Image]) -> Self {
        let mut known = Vec::new();
        let mut file: Option<(Uuid, Option<Stat>)> = None;
        each(merge, base, children, &Tops::of(base, children), |image, digests, record| {
            let uuid = image.layer.footer.uuid;
            if file.is_none_or(|(of, _)| of != uuid) {
                file = Some((uuid, image.flat().object().stat().ok()));
            }
            let place = image.map.place(record.block.0 as usize).map(FileSector);
            let (Some((_, Some(file))), Some(place)) = (file, place) else { return };
            if let Some(valid) = digests.get(record.block, place, &file).filter(|valid| valid.is_same_file) {
                known.push((record.block, valid.digest));
            }
        });
        known.sort_unstable_by_key(|(block, _)| *block);
        Self(known)
    }

    /// Publishes them for the base, which is complete and durable, under the name that it will have.
    pub(super) fn publish(
        self,
        merge: &Merge,
        base: &Image,
        children: &[Image],
        object: &dyn WritableObject,
        place: impl Fn(BlockIndex) -> FileSector,
    ) -> Result<()> {
        let target = merge.target();
        if self.0.is_empty() || alias::is_alias(target.file_name()) {
            return Ok(());
        }
        let file = object.stat()?;
        let record = |(block, digest)| digests::record_in_file(block, place(block), &file, digest);
        let sidecar = Sidecar {
            uuid: last_uuid(children),
            block_size: base.layer.block_size,
            file_size: Some(file.size),
            records: self.0.into_iter().filter_map(record).collect(),
        };
        digests::publish(&*merge.storage, &digests::path_of_file(&target)?, &sidecar);
        Ok(())
    }
}

/// Calls `act` with each record of a block that the target reads from the image that it is of.
fn each(merge: &Merge, base: &Image, children: &[Image], tops: &Tops, mut act: impl FnMut(&Image, &Digests, &Record)) {
    let target = last_uuid(children);
    for (number, image) in std::iter::once(base).chain(children).enumerate() {
        // That of the base may have been published already.
        let uuids = [image.layer.footer.uuid, target];
        let uuids = if number == 0 { &uuids[..] } else { &uuids[..1] };
        let digests = Digests::load_of(&*merge.reader, &image.layer, uuids).unwrap_or_else(|error| {
            tracing::debug!(%error, "the digests of an image are lost");
            Digests::default()
        });
        for record in digests.records().iter().filter(|record| tops.source(record.block) == Some(number)) {
            act(image, &digests, record);
        }
    }
}

fn last_uuid(children: &[Image]) -> Uuid {
    children.last().expect("a merge has children").layer.footer.uuid
}
