//! The log as a ring of sectors, and its head: where what was written last ends.
//!
//! ```text
//! │ 7 ... 7   7   7 │ 6   6 ... 6 │     each sector says in which cycle, which pass over the ring, it was written
//!                   └ head              so the head is where that number falls
//! │ 7 ... 7   6   7 │ 6   6 ... 6 │
//!             └ head                    several writes are on their way at once: what comes after a missing one is none
//! ```
//!
//! Source: "Journaling Log" in "XFS Algorithms & Data Structures"; `xlog_find_head` in Linux `fs/xfs/xfs_log_recover.c`.

use std::ops::Range;

use disk::Disk;
use fs_xfs::Superblock;

use super::record::Header;
use crate::{Error, Fields, Result};

/// Bytes of a sector of the log, whatever those of the disk are.
pub(super) const SECTOR: usize = 512;

/// Sectors of a record at most: 256 KiB, and the headers of as many.
pub(super) const MAX_RECORD: u64 = 512 + 8;

/// Sectors that were on their way at once at most: eight buffers of 256 KiB.
const IN_FLIGHT: u64 = 8 * 512;

/// The sectors of the log, after the last of which the first comes again.
pub(super) struct Ring<'a> {
    disk: &'a dyn Disk,
    /// Where it lies (bytes).
    start: u64,
    sectors: u64,
}

impl<'a> Ring<'a> {
    /// Finds the log of a filesystem.
    pub(super) fn new(disk: &'a dyn Disk, superblock: &Superblock) -> Result<Self> {
        let start = superblock.fsblock_offset(superblock.logstart);
        let len = u64::from(superblock.logblocks) * u64::from(superblock.blocksize);
        let sectors = len / SECTOR as u64;
        if start.checked_add(len).is_none_or(|end| end > disk.size()) || sectors < MAX_RECORD {
            return Err(Error::damaged("it lies where there is none"));
        }
        Ok(Self { disk, start, sectors })
    }

    /// Returns where it lies (bytes).
    pub(super) fn place(&self) -> Range<u64> {
        self.start..self.start + self.sectors * SECTOR as u64
    }

    pub(super) fn sectors(&self) -> u64 {
        self.sectors
    }

    /// Returns how far it is from one sector to another, onwards; 0 if they are the same.
    pub(super) fn distance(&self, from: u64, to: u64) -> u64 {
        (to + self.sectors - from) % self.sectors
    }

    /// Returns the sector so many, fewer than there are, before another.
    fn back(&self, from: u64, by: u64) -> u64 {
        (from + self.sectors - by) % self.sectors
    }

    /// Reads so many sectors, no more than there are, from one on.
    pub(super) fn read(&self, first: u64, count: u64) -> Result<Vec<u8>> {
        let size = |sectors: u64| usize::try_from(sectors * SECTOR as u64).expect("what is read is in memory");
        let mut bytes = vec![0; size(count)];
        let (here, wrapped) = bytes.split_at_mut(size(count.min(self.sectors - first)));
        self.disk.read_at(self.start + first * SECTOR as u64, here)?;
        if !wrapped.is_empty() {
            self.disk.read_at(self.start, wrapped)?;
        }
        Ok(bytes)
    }

    /// Returns the head, or nothing if the log was never written.
    pub(super) fn head(&self) -> Result<Option<u64>> {
        let (first, last) = (self.cycle(0)?, self.cycle(self.sectors - 1)?);
        if first == 0 {
            return Ok(None);
        }
        if last == 0 && first != 1 {
            return Err(Error::damaged("its sectors are of cycles that do not follow each other"));
        }
        // One cycle alone ended just where the next begins.
        let head = if first == last { 0 } else { self.first_of(last)? };
        // In the first cycle nothing was written behind the start.
        let written = if last == 0 { head } else { self.sectors };
        let head = self.first_missing(head, last, IN_FLIGHT.min(written))?;
        let before = self.header_before(head, MAX_RECORD.min(if last == 0 { head } else { self.sectors }))?;
        let before = before.ok_or_else(|| Error::damaged("no record ends where it does"))?;
        // Of a record that is not there as a whole nothing is.
        let is_whole = self.distance(before.start, head) == before.sectors();
        Ok(Some(if is_whole { head } else { before.start }))
    }

    /// Returns the cycle in which a sector was written.
    fn cycle(&self, sector: u64) -> Result<u32> {
        Ok(cycle(&self.read(sector, 1)?))
    }

    /// Returns the first sector of a cycle in which the last one was written, and the first was not.
    fn first_of(&self, wanted: u32) -> Result<u64> {
        let (mut other, mut found) = (0, self.sectors - 1);
        while found - other > 1 {
            let middle = other + (found - other) / 2;
            if self.cycle(middle)? == wanted {
                found = middle;
            } else {
                other = middle;
            }
        }
        Ok(found)
    }

    /// Returns the first of `count` sectors before `head` that was not written when those around it were, or `head`.
    ///
    /// `old` is the cycle of what lies behind the head.
    fn first_missing(&self, head: u64, old: u32, count: u64) -> Result<u64> {
        let start = self.back(head, count % self.sectors);
        let sectors = self.read(start, count)?;
        for (index, sector) in (0..).zip(sectors.chunks_exact(SECTOR)) {
            let place = (start + index) % self.sectors;
            let missing = if place < head { old } else { old.wrapping_sub(1) };
            if cycle(sector) == missing {
                return Ok(place);
            }
        }
        Ok(head)
    }

    /// Returns the last header that starts before a sector, and no more than so many before it.
    pub(super) fn header_before(&self, before: u64, most: u64) -> Result<Option<Header>> {
        let start = self.back(before, most % self.sectors);
        let sectors = self.read(start, most)?;
        let mut found = sectors.chunks_exact(SECTOR).enumerate().rev();
        Ok(found.find_map(|(index, sector)| Header::parse((start + index as u64) % self.sectors, sector)))
    }
}

fn cycle(sector: &[u8]) -> u32 {
    let number = |at| Fields(sector).be32(at).unwrap_or(0);
    if Header::is_at(sector) { number(4) } else { number(0) }
}
