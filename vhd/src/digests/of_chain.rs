//! The digests of what a read of a chain gives: those of the topmost layer that holds a block.
//!
//! They are of the chain as it was when they were asked for, by whom nobody merges meanwhile, or who sees to it what a wrong
//! one would do. Nothing of this is done when a disk is opened.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use storage::{ObjectPath, Stat, WritableStorage};

use super::{Digests, Known, Record, Sidecar, path_of, record_in_file, record_of_block, try_publish};
use crate::cache::BlockCache;
use crate::chain;
use crate::chain_disk::{Place, Snapshot};
use crate::digest::Digest;
use crate::error::Result;
use crate::exploded::Exploded;
use crate::flat;
use crate::geometry::{BlockIndex, BlockSize};
use crate::layer::{Body, Layer};

/// What is known of the blocks of a disk without reading them.
pub struct ChainDigests {
    snapshot: Arc<Snapshot>,
    /// Of each layer, leaf first, those of the blocks that are read from it.
    layers: Vec<Digests>,
    /// Whether a merge is taking blocks away from a layer.
    is_moving: bool,
    problems: Vec<(ObjectPath, String)>,
    made: Mutex<BTreeMap<usize, Vec<Record>>>,
}

/// A block as it stood before it was read.
pub struct Unread {
    block: BlockIndex,
    place: Place,
    file: Stat,
}

impl ChainDigests {
    /// Reads the sidecars of a chain.
    pub(crate) fn load(snapshot: Arc<Snapshot>) -> Self {
        let is_moving = snapshot.chain.members.iter().any(|member| member.moving.is_some());
        let (mut layers, mut problems) = (Vec::new(), Vec::new());
        for (number, member) in snapshot.chain.members.iter().enumerate() {
            let mut digests = Digests::load(&*snapshot.storage, &member.layer).unwrap_or_else(|error| {
                tracing::debug!(%error, "the digests of a layer are not known");
                let path = path_of(&member.layer).unwrap_or_else(|| member.layer.data.clone());
                problems.push((path, error.to_string()));
                Digests::default()
            });
            digests.retain(|block| snapshot.place(block).is_some_and(|place| place.layer == number));
            layers.push(digests);
        }
        Self { snapshot, layers, is_moving, problems, made: Mutex::default() }
    }

    /// Returns the digest of what a read of the whole block gives, followed by zeroes past the end of the disk. A block that no
    /// layer holds is zeroes.
    ///
    /// `None` if it is not known for certain: its topmost layer has none, or none that is valid, or does not hold the block
    /// wholly, or a merge is under way.
    #[must_use]
    pub fn of_read(&self, block: BlockIndex) -> Option<Digest> {
        if self.is_moving {
            return None;
        }
        let Some(place) = self.snapshot.place(block) else {
            return Some(Digest::of_zeroes(self.snapshot.block_size));
        };
        self.known(block, place).filter(|known| known.is_same_file).map(|known| known.digest)
    }

    /// Returns the same, also where a file is not the very one that the digest was made of but has its size and time, as in a
    /// copy of the repository: for whom a wrong one is a false alarm, and no more. `None` of a block that no layer holds.
    #[must_use]
    pub fn of_copy(&self, block: BlockIndex) -> Option<Digest> {
        let place = self.snapshot.place(block).filter(|_| !self.is_moving)?;
        self.known(block, place).map(|known| known.digest)
    }

    /// Looks at a block that has no valid digest ([`ChainDigests::of_read`]), before it is read to make one; `None` if it has
    /// one, or none can be made: it is not stored whole, or was written just now.
    #[must_use]
    pub fn look(&self, block: BlockIndex) -> Option<Unread> {
        let place = self.snapshot.place(block).filter(|place| !self.is_moving && self.is_whole(block, *place))?;
        path_of(self.layer(place))?;
        let file = self.stat(block, place)?;
        let is_known = self.layers[place.layer].get(block, place.sector, &file).is_some_and(|known| known.is_same_file);
        let can_be = !is_known && flat::is_settled(&file) && self.is_full(block, place);
        can_be.then_some(Unread { block, place, file })
    }

    /// Notes the digest of a block that was read since it was looked at; false if it changed meanwhile.
    pub fn note(&self, unread: &Unread, digest: Digest) -> bool {
        let Unread { block, place, file } = unread;
        let layer = self.layer(*place);
        let record = match &layer.body {
            Body::Flat(_) => record_in_file(*block, place.sector, file, digest),
            Body::Exploded(_) => record_of_block(*block, file, digest),
        };
        let Some(record) = record.filter(|_| self.stat(*block, *place).as_ref() == Some(file)) else { return false };
        let mut made = self.made.lock().unwrap_or_else(PoisonError::into_inner);
        made.entry(place.layer).or_default().push(record);
        true
    }

    /// Stores what was noted, with what was known before; returns how many digests that were made. Who calls it holds the
    /// lock of the VM. What a merge has changed since is left out.
    ///
    /// # Errors
    /// What the storage says.
    pub fn publish(&self, storage: &Arc<dyn WritableStorage>) -> Result<u64> {
        let mut published = 0;
        let made = std::mem::take(&mut *self.made.lock().unwrap_or_else(PoisonError::into_inner));
        for (number, made) in made {
            let layer = &self.snapshot.chain.members[number].layer;
            let Some(path) = path_of(layer) else { continue };
            let reader = storage.clone().reader();
            let now = chain::open(&reader, &BlockCache::new(0), &layer.name)?;
            if (now.footer.uuid, &now.data) != (layer.footer.uuid, &layer.data) {
                continue;
            }
            let file_size = match &now.body {
                Body::Flat(flat) => Some(flat.object().stat()?.size),
                Body::Exploded(_) => None,
            };
            // One that cannot be read is replaced.
            let known = Digests::load(&*reader, layer).unwrap_or_default();
            let is_of_file = file_size == known.file_size;
            let known = known.records().iter().filter(|_| is_of_file);
            let mut records: BTreeMap<BlockIndex, Record> = known.map(|record| (record.block, *record)).collect();
            let count = made.len() as u64;
            records.extend(made.into_iter().map(|record| (record.block, record)));
            let (uuid, block_size) = (layer.footer.uuid, layer.block_size);
            let sidecar = Sidecar { uuid, block_size, file_size, records: records.into_values().collect() };
            try_publish(&**storage, &path, &sidecar)?;
            published += count;
        }
        Ok(published)
    }

    /// Returns the sidecars that could not be read, and why.
    #[must_use]
    pub fn problems(&self) -> &[(ObjectPath, String)] {
        &self.problems
    }

    /// Whether something was noted that is not stored.
    #[must_use]
    pub fn has_made(&self) -> bool {
        !self.made.lock().unwrap_or_else(PoisonError::into_inner).is_empty()
    }

    /// Returns the size of a block.
    #[must_use]
    pub fn block_size(&self) -> BlockSize {
        self.snapshot.block_size
    }

    /// Returns the file or folder that a block is read from, for messages.
    #[must_use]
    pub fn holder(&self, block: BlockIndex) -> Option<&ObjectPath> {
        self.snapshot.place(block).map(|place| &self.layer(place).data)
    }

    fn layer(&self, place: Place) -> &Layer {
        &self.snapshot.chain.members[place.layer].layer
    }

    /// Returns the valid digest of a block that a read gives whole.
    fn known(&self, block: BlockIndex, place: Place) -> Option<Known> {
        let digests = &self.layers[place.layer];
        if !digests.has(block) || !self.is_whole(block, place) {
            return None;
        }
        digests.get(block, place.sector, &self.stat(block, place)?)
    }

    /// Whether a read gives all of what the layer has of a block.
    fn is_whole(&self, block: BlockIndex, place: Place) -> bool {
        (u64::from(block.0) + 1) * self.snapshot.block_size.bytes() <= self.snapshot.limits[place.layer]
    }

    fn stat(&self, block: BlockIndex, place: Place) -> Option<Stat> {
        let layer = self.layer(place);
        match &layer.body {
            Body::Flat(flat) => flat.object().stat().ok(),
            Body::Exploded(_) => self.snapshot.storage.stat(&Exploded::block_path(&layer.data, block).ok()?).ok(),
        }
    }

    /// Whether the layer has every sector of a block.
    fn is_full(&self, block: BlockIndex, place: Place) -> bool {
        let member = &self.snapshot.chain.members[place.layer];
        matches!(self.snapshot.partial_bitmap(member, place, block), Ok(None))
    }
}
