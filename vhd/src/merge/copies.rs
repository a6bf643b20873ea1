//! Steps 0 to 4 of VHD files: blocks are copied into the base, in place.
//!
//! ```text
//! the topmost child's sector bitmap   the base has the block          the base does not
//! is full                             over it: nobody reads it there  at the end, the footer there is written over
//! is not                              at the end, composed: what it is composed of stays as it is
//! ```
//!
//! No entry of the base's table changes before the blocks it will lead to are durable; then every entry, old or new, leads to
//! what the target reads. Of the two footers the leading one is written last: from then on the base is the target.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use disk::Disk;
use storage::{WritableObject, WritableStorage};

use super::digests::Copied;
use super::tops::Tops;
use super::{Control, Image, Merge, Outcome, room};
use crate::chain_disk::{ChainDisk, has_sector};
use crate::error::{Error, ErrorKind, Result};
use crate::footer::{FOOTER_BYTES, Footer};
use crate::geometry::{BlockIndex, FileSector, SECTOR, SECTOR_LEN};
use crate::layer::{BlockMap, Body};

/// See [`super`].
pub(super) fn run(merge: &Merge, base: &Image, children: &[Image], control: &Control) -> Result<Outcome> {
    let storage = &*merge.storage;
    let target = children.last().expect("a merge has children");
    (control.barrier)()?;
    let held = children.iter().flat_map(|child| [child.layer.data.clone(), child.layer.data.parent()]);
    storage.sync_each(&held.collect::<BTreeSet<_>>().into_iter().collect::<Vec<_>>())?;
    let digests = Copied::of(merge, base, children);
    let widened = match room::make(merge, base, target, control)? {
        room::Made::Stopped => return Ok(Outcome::Stopped),
        room::Made::Not => None,
        room::Made::Room(base) => Some(*base),
    };
    let base = widened.as_ref().unwrap_or(base);
    (control.barrier)()?;
    merge.begin(base, target)?;
    let copies = Copies::new(merge, base, children)?;
    let tops = Tops::of(base, children);
    if tops.each(control, |(), child, block| copies.take(child, block))? == Outcome::Stopped {
        return Ok(Outcome::Stopped);
    }
    copies.object.sync()?;
    (control.barrier)()?;
    copies.complete()?;
    let place = |block: BlockIndex| FileSector(copies.places[block.0 as usize].load(Ordering::Relaxed));
    digests.publish(merge, base, children, &*copies.object, place)?;
    Ok(Outcome::Merged)
}

/// Returns how many bytes the base will grow by at least; 0 if nothing is copied.
pub(super) fn room(base: &Image, children: &[Image]) -> u64 {
    if !matches!(base.layer.body, Body::Flat(_)) {
        return 0;
    }
    let appended = Tops::of(base, children).all().filter(|block| base.map.place(block.0 as usize).is_none()).count();
    (appended as u64).saturating_mul(base.layer.block_size.full_bytes() as u64)
}

/// Makes durable a base that got everything from whoever merged before, and gives it the footer at its end if it has none:
/// XO refuses a file without.
pub(super) fn seal(storage: &dyn WritableStorage, base: &Image) -> Result<()> {
    let object = storage.open_to_write(&base.layer.data)?;
    let footer = base.layer.footer.to_bytes();
    let size = object.stat()?.size;
    let mut last = [0; FOOTER_BYTES];
    let is_there = match size.checked_sub(FOOTER_BYTES as u64) {
        Some(at) => object.read_at(at, &mut last)? == FOOTER_BYTES && last == footer,
        None => false,
    };
    if !is_there {
        object.write_at(size.max(room::end_of_data(base)).next_multiple_of(SECTOR), &footer)?;
    }
    object.sync()?;
    object.write_at(0, &footer)?;
    Ok(object.sync()?)
}

/// The base while blocks are copied into it.
struct Copies<'a> {
    merge: &'a Merge,
    base: &'a Image,
    children: &'a [Image],
    object: Arc<dyn WritableObject>,
    /// The table to be: the sector of each block of the target.
    places: Vec<AtomicU32>,
    /// Where the next block is appended, in bytes.
    end: AtomicU64,
    /// The target as a disk, opened if a block has to be composed.
    disk: Mutex<Option<Arc<ChainDisk>>>,
}

impl<'a> Copies<'a> {
    fn new(merge: &'a Merge, base: &'a Image, children: &'a [Image]) -> Result<Self> {
        let target = children.last().expect("a merge has children");
        let place = |block| AtomicU32::new(base.map.place(block).unwrap_or(BlockMap::ABSENT));
        Ok(Self {
            merge,
            base,
            children,
            object: merge.storage.open_to_write(&base.layer.data)?,
            places: (0..target.block_count()).map(place).collect(),
            end: AtomicU64::new(room::end_of_data(base).max(room::end_of_table(base, target))),
            disk: Mutex::default(),
        })
    }

    fn target(&self) -> &Image {
        self.children.last().expect("a merge has children")
    }

    /// Copies a block from a child, the topmost that holds it.
    fn take(&self, child: usize, block: BlockIndex) -> Result<()> {
        let child = &self.children[child];
        let index = block.0 as usize;
        let from = FileSector(child.map.place(index).expect("it holds the block"));
        let own = self.base.map.place(index).map(FileSector);
        let (layer, block_size) = (&child.layer, child.layer.block_size);
        let bitmap = child.flat().bitmap(layer, block, from)?;
        let is_full = (0..block_size.len() / SECTOR_LEN).all(|sector| has_sector(&bitmap, sector));
        if is_full {
            let to = own.map_or_else(|| self.append(), Ok)?;
            let len = block_size.full_bytes() as u64;
            let copied = self.object.copy_from(child.flat().object(), from.bytes(), to.bytes(), len);
            if copied.map_err(|error| Error::from(error).in_block(block))? != len {
                return Err(layer.block_error(
                    ErrorKind::Damaged,
                    block,
                    "it lies past the end of the file, which is cut off",
                ));
            }
            self.places[index].store(to.0, Ordering::Relaxed);
            return Ok(());
        }
        if self.base.layer.footer.uuid == self.target().layer.footer.uuid {
            // Read by the target's name, the base was the answer already when this attempt began.
            return match own {
                Some(_) => Ok(()),
                None => {
                    let reason = "it was to be merged into this file, whose table does not have it";
                    Err(self.base.layer.block_error(ErrorKind::Damaged, block, reason))
                }
            };
        }
        let bytes = self.compose(block)?;
        let to = self.append()?;
        self.object.write_at(to.bytes(), &bytes).map_err(|error| Error::from(error).in_block(block))?;
        self.places[index].store(to.0, Ordering::Relaxed);
        Ok(())
    }

    /// Returns a new place at the end of the base.
    fn append(&self) -> Result<FileSector> {
        let at = self.end.fetch_add(self.base.layer.block_size.full_bytes() as u64, Ordering::Relaxed);
        match u32::try_from(at / SECTOR) {
            Ok(sector) if sector != BlockMap::ABSENT => Ok(FileSector(sector)),
            _ => Err(Error::new(ErrorKind::Unsupported, &self.base.layer.data, room::TOO_LARGE)),
        }
    }

    /// Returns a block with a full sector bitmap, as the target reads it through the layers below.
    fn compose(&self, block: BlockIndex) -> Result<Vec<u8>> {
        let block_size = self.base.layer.block_size;
        let disk = self.disk()?;
        let mut bytes = vec![0; block_size.full_bytes()];
        let (bitmap, data) = bytes.split_at_mut(block_size.bitmap_bytes());
        bitmap.fill(0xff);
        let start = u64::from(block.0) * block_size.bytes();
        let len = usize::try_from(disk.size() - start).unwrap_or(usize::MAX).min(data.len());
        disk.read_at(start, &mut data[..len])
            .map_err(|error| self.target().layer.block_error(ErrorKind::Unavailable, block, &error.to_string()))?;
        Ok(bytes)
    }

    fn disk(&self) -> Result<Arc<ChainDisk>> {
        let mut disk = self.disk.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(disk) = &*disk {
            return Ok(disk.clone());
        }
        let opened = Arc::new(self.merge.open_target()?);
        *disk = Some(opened.clone());
        Ok(opened)
    }

    /// Step 4. An entry is old or new, however much of the table is written.
    fn complete(&self) -> Result<()> {
        let (base, target) = (&self.base.layer, &self.target().layer);
        let table_at = base.header.as_ref().expect("a fixed disk is not merged").table_offset;
        let len = room::table_len(self.base, self.target());
        let mut table = Vec::with_capacity(len);
        for place in &self.places {
            table.extend(place.load(Ordering::Relaxed).to_be_bytes());
        }
        // What a larger base had there, or what is left of blocks that lay there, is no block of the target.
        table.resize(len, 0xff);
        self.object.write_at(table_at, &table)?;
        let footer = Footer {
            uuid: target.footer.uuid,
            original_size: target.footer.original_size,
            current_size: target.footer.current_size,
            chs: target.footer.chs,
            timestamp: target.footer.timestamp,
            ..base.footer
        };
        let (bytes, end) = (footer.to_bytes(), self.end.load(Ordering::Relaxed));
        self.object.write_at(end, &bytes)?;
        // What an attempt before this one appended.
        if self.base.flat().size() > end + FOOTER_BYTES as u64 {
            self.object.set_len(end + FOOTER_BYTES as u64)?;
        }
        self.object.sync()?;
        self.object.write_at(0, &bytes)?;
        Ok(self.object.sync()?)
    }
}
