//! Steps 0 to 4 of exploded images: their blocks move by renaming their files.

use std::collections::BTreeSet;

use storage::{ObjectPath, WritableStorage, publish};

use super::tops::Tops;
use super::{Control, Image, Merge, Outcome, digests};
use crate::error::{Error, ErrorKind, Result};
use crate::exploded::Exploded;
use crate::footer::Footer;
use crate::geometry::BlockIndex;
use crate::header::Header;
use crate::layer::{BlockMap, Body};

/// See [`super`].
pub(super) fn run(merge: &Merge, base: &Image, children: &[Image], control: &Control) -> Result<Outcome> {
    let storage = &*merge.storage;
    let target = children.last().expect("a merge has children");
    let tops = Tops::of(base, children);
    let header = widened(base, target);
    (control.barrier)()?;
    if let Some(header) = &header {
        write_table(storage, base, &Tops::of(base, &[]), header.max_table_entries)?;
        write(storage, base, "header", &header.to_bytes())?;
    }
    storage.sync_tree(&merge.folder)?;
    (control.barrier)()?;
    merge.begin(base, target)?;
    make_folders(storage, base, &tops)?;
    let moved = tops.each(control, |child, block| move_block(storage, &children[child], base, block))?;
    if moved == Outcome::Stopped {
        return Ok(Outcome::Stopped);
    }
    storage.sync_tree(&merge.folder)?;
    let there = Exploded::listed(&base.layer, &merge.reader)?;
    if let Some(block) = tops.all().find(|block| !there.contains(block)) {
        return Err(base.layer.block_error(ErrorKind::Missing, block, "it was moved here, but its file is missing"));
    }
    (control.barrier)()?;
    digests::publish(merge, base, children, &tops)?;
    let entries = header.or_else(|| base.layer.header.clone()).map_or(0, |header| header.max_table_entries);
    write_table(storage, base, &tops, entries)?;
    let (old, new) = (base.layer.footer, target.layer.footer);
    let footer = Footer {
        uuid: new.uuid,
        original_size: new.original_size,
        current_size: new.current_size,
        chs: new.chs,
        timestamp: new.timestamp,
        ..old
    };
    write(storage, base, "footer", &footer.to_bytes())?;
    Ok(Outcome::Merged)
}

/// Returns the header of a base whose table has no room for the target; XO would not make it, and lose the disk.
fn widened(base: &Image, target: &Image) -> Option<Header> {
    let header = base.layer.header.as_ref()?;
    let needed = u32::try_from(target.block_count()).expect("at most MAX_BLOCKS");
    (header.max_table_entries < needed).then(|| Header { max_table_entries: needed, ..header.clone() })
}

/// Writes the table: what the base holds and what was moved into it. As XO's it has a byte for each entry.
fn write_table(storage: &dyn WritableStorage, base: &Image, tops: &Tops, entries: u32) -> Result<()> {
    let BlockMap::Bits(held) = &base.map else { unreachable!("the base is exploded") };
    let mut bits = vec![0; usize::try_from(entries).expect("a table fits in memory").max(held.len())];
    bits[..held.len()].copy_from_slice(held);
    for block in tops.all() {
        bits[block.0 as usize / 8] |= 0x80 >> (block.0 % 8);
    }
    write(storage, base, "bat", &bits)
}

/// Replaces one of the base's structures.
fn write(storage: &dyn WritableStorage, base: &Image, name: &str, bytes: &[u8]) -> Result<()> {
    let Body::Exploded(exploded) = &base.layer.body else { unreachable!("the base is exploded") };
    Ok(publish(storage, &base.layer.data.join(name)?, &exploded.filter.encode(bytes))?)
}

/// Makes the folders that blocks are moved into. A block in a folder that a power cut takes would be lost.
fn make_folders(storage: &dyn WritableStorage, base: &Image, tops: &Tops) -> Result<()> {
    let parents: BTreeSet<u32> = tops.all().map(|block| block.0 / 1000).collect();
    if parents.is_empty() {
        return Ok(());
    }
    let blocks = base.layer.data.join("blocks")?;
    let make = |path: &ObjectPath| match storage.create_directory(path) {
        Err(error) if error.kind() != storage::ErrorKind::Exists => Err(Error::from(error)),
        _ => Ok(()),
    };
    make(&blocks)?;
    for parent in parents {
        make(&blocks.join(&parent.to_string())?)?;
    }
    // Also those that an attempt before this one made, and did not come to sync.
    storage.sync(&blocks)?;
    Ok(storage.sync(&base.layer.data)?)
}

fn move_block(storage: &dyn WritableStorage, child: &Image, base: &Image, block: BlockIndex) -> Result<()> {
    let from = Exploded::block_path(&child.layer.data, block)?;
    match storage.rename(&from, &Exploded::block_path(&base.layer.data, block)?) {
        // It was moved before; that all are there is seen in the end.
        Err(error) if error.kind() == storage::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(Error::from(error).in_block(block)),
        Ok(()) => Ok(()),
    }
}
