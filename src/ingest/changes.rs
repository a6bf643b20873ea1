//! Which blocks may have changed since an older backup, where somebody keeps a record of it: a dirty bitmap, or a pool.
//!
//! A bitmap is believed only for the backup that it was begun with, which the person who names it says: nothing in an image
//! tells. It is not believed blindly. The backup must be the one that the new one is built upon, and of the same size; and
//! some blocks that the bitmap calls clean are compared. Else all is compared, or the ingest is refused.
//!
//! Of a pool the changes are relative to a snapshot, whose uuid the backup has.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

use disk::{Disk, Extent};
use vhd::BlockSize;

use super::error::{Error, ErrorKind, Result};
use super::feed::of_source;
use super::intake::Taken;
use crate::repository::BackupTime;

/// Bytes of a block, of a piece, and how many of these it has.
const BLOCK: u64 = 2 << 20;
const PIECE: u64 = 64 << 10;
const PIECE_LEN: usize = 64 << 10;
const PIECES: u64 = BLOCK / PIECE;
/// Most words of a set: 64 MiB, for 32 TiB, more than any disk that is stored. A disk of 2 TiB takes 4 MiB.
const WORDS: usize = (1 << 29) / 64;
/// Clean blocks of an image that are compared nevertheless.
const SAMPLES: usize = 32;
/// Clean blocks of a pool's disk of which a piece is compared: half a MiB is read for it, which costs nothing beside the rest. What
/// is to be found are changes since another snapshot or of another disk, which nearly every block would show; a single bit that
/// the pool lost would not be found by any number that one can afford.
const SPOTS: usize = 8;

/// A set of pieces of a disk, of 64 KiB each: those that may have changed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PieceSet {
    size: u64,
    /// A bit for each piece.
    words: Vec<u64>,
}

/// What changed since a backup.
#[derive(Debug, Clone)]
pub struct Changes {
    /// The backup.
    pub since: BackupTime,
    /// Of each disk, by its name.
    pub disks: BTreeMap<String, Arc<PieceSet>>,
}

impl PieceSet {
    /// Makes an empty set of pieces of a disk of `size` bytes; `None` if no backup can have a disk as large as that.
    #[must_use]
    pub fn new(size: u64) -> Option<Self> {
        let words = size.div_ceil(PIECE).div_ceil(64);
        let words = usize::try_from(words).ok().filter(|words| *words <= WORDS)?;
        Some(Self { size, words: vec![0; words] })
    }

    /// Returns the size of the disk in bytes.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Adds every piece that a range of bytes touches.
    pub fn insert(&mut self, offset: u64, len: u64) {
        let end = offset.saturating_add(len).min(self.size);
        if offset >= end {
            return;
        }
        for piece in offset / PIECE..end.div_ceil(PIECE) {
            let word = usize::try_from(piece / 64).ok().and_then(|word| self.words.get_mut(word));
            *word.expect("a piece of the disk") |= 1 << (piece % 64);
        }
    }

    /// Whether a block of 2 MiB, by its number, has a piece that is in it.
    #[must_use]
    pub fn touches(&self, block: u64) -> bool {
        self.pieces(block) != 0
    }

    /// Returns the ranges of bytes of a block that are in it, from the beginning of the block, none past the end of the disk.
    pub(super) fn ranges(&self, block: u64) -> impl Iterator<Item = Range<usize>> + use<> {
        let len = self.size.saturating_sub(block.saturating_mul(BLOCK)).min(BLOCK);
        let (mut pieces, mut at) = (self.pieces(block), 0);
        std::iter::from_fn(move || {
            if pieces == 0 {
                return None;
            }
            at += u64::from(pieces.trailing_zeros());
            pieces >>= pieces.trailing_zeros();
            let start = at;
            at += u64::from(pieces.trailing_ones());
            pieces >>= pieces.trailing_ones();
            let in_block = |piece: u64| usize::try_from((piece * PIECE).min(len)).expect("a block is in memory");
            Some(in_block(start)..in_block(at))
        })
    }

    /// Returns the bits of the pieces of a block, the first one lowest.
    fn pieces(&self, block: u64) -> u64 {
        let first = block.saturating_mul(PIECES);
        let word = usize::try_from(first / 64).ok().and_then(|word| self.words.get(word));
        word.map_or(0, |word| (word >> (first % 64)) & ((1 << PIECES) - 1))
    }

    /// Compares blocks that are not in the set, spread over what holds data: they must be the same in `new` and `old`, which
    /// are of one size.
    ///
    /// # Errors
    /// [`ErrorKind::Usage`] if one is not; [`ErrorKind::Source`] or [`ErrorKind::Repository`] if one cannot be read.
    pub(super) fn verify(&self, name: &str, new: &dyn Disk, old: &dyn Disk) -> Result<()> {
        let is_hole = |extent: Extent, len| extent.is_hole && extent.len >= len;
        let clean = self.clean(|offset, len| {
            Ok(!is_hole(new.extent_at(offset).map_err(|error| of_source(&error))?, len)
                || !is_hole(old.extent_at(offset)?, len))
        })?;
        let (mut ours, mut theirs) = (Vec::new(), Vec::new());
        for (offset, len) in spread(&clean, SAMPLES) {
            ours.resize(len, 0);
            theirs.resize(len, 0);
            new.read_at(offset, &mut ours).map_err(|error| of_source(&error))?;
            old.read_at(offset, &mut theirs)?;
            if ours != theirs {
                let message = format!(
                    "disk {name} changed at {offset}, where the bitmap says that it did not: the bitmap is not of what \
                     changed since that backup; leave --bitmap out, so that all is compared"
                );
                return Err(Error::new(ErrorKind::Usage, message));
            }
        }
        Ok(())
    }

    /// Compares one piece of some blocks that are not in the set, spread over those in which `old` has data: it must be the same
    /// in `new`. What cannot be read of `old` is passed over.
    ///
    /// # Errors
    /// [`ErrorKind::Difference`] if one is not; [`ErrorKind::Source`] if it cannot be read.
    pub(super) fn spot_check(&self, new: &dyn Disk, old: &dyn Disk, taken: &Taken) -> Result<()> {
        let has_data = |offset, len: u64| {
            let is_there = offset + len <= old.size();
            Ok(is_there && old.extent_at(offset).is_ok_and(|extent| !extent.is_hole))
        };
        let (mut ours, mut theirs) = (Vec::new(), Vec::new());
        for (offset, len) in spread(&self.clean(has_data)?, SPOTS) {
            theirs.resize(len, 0);
            if old.read_at(offset, &mut theirs).is_err() {
                continue;
            }
            // Zeroes are the same on every disk.
            let pieces = (offset..).step_by(PIECE_LEN).zip(theirs.chunks(PIECE_LEN));
            let Some((at, piece)) = pieces.into_iter().find(|(_, piece)| piece.iter().any(|byte| *byte != 0)) else {
                continue;
            };
            ours.resize(piece.len(), 0);
            new.read_at(at, &mut ours).map_err(|error| of_source(&error))?;
            taken.add_source(ours.len());
            if ours != piece {
                let message = format!("it changed at {at}, where the pool says that it did not");
                return Err(Error::new(ErrorKind::Difference, message));
            }
        }
        Ok(())
    }

    /// Returns the offsets and lengths of the blocks that are not in the set, of those that `has_data` is true of.
    fn clean(&self, mut has_data: impl FnMut(u64, u64) -> Result<bool>) -> Result<Vec<(u64, usize)>> {
        let mut clean = Vec::new();
        for block in (0..BlockSize::DEFAULT.block_count(self.size)).filter(|block| !self.touches(*block)) {
            let offset = block * BLOCK;
            let len = BLOCK.min(self.size - offset);
            if has_data(offset, len)? {
                clean.push((offset, usize::try_from(len).expect("at most a block")));
            }
        }
        Ok(clean)
    }
}

/// Returns at most `count` of what there is, evenly spread.
fn spread<T: Copy>(all: &[T], count: usize) -> impl Iterator<Item = T> {
    all.iter().step_by(all.len().div_ceil(count).max(1)).copied()
}

impl Changes {
    /// Returns what may differ of a disk of `size` bytes from its base, a disk of `base_size` bytes in the backup of
    /// `base`; else why it cannot be told.
    pub(super) fn of(
        &self,
        name: &str,
        size: u64,
        base: BackupTime,
        base_size: u64,
    ) -> std::result::Result<Arc<PieceSet>, String> {
        if base != self.since {
            return Err(format!("the newest backup is of {base}, and the bitmap of what changed since {}", self.since));
        }
        if size != base_size {
            return Err(format!("the disk had {base_size} bytes and has {size} now"));
        }
        self.disks.get(name).filter(|set| set.size == size).cloned().ok_or_else(|| "it has no bitmap".to_owned())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_block_that_a_range_touches_is_in_the_set() {
        const BLOCKS: u64 = 130;
        for (offset, len, expected) in [
            (0, 0, 0..0),
            (0, 1, 0..1),
            (BLOCK - 1, 2, 0..2),
            (63 * BLOCK, 2 * BLOCK, 63..65),
            (129 * BLOCK, u64::MAX, 129..130),
            (BLOCK * 500, 1, 0..0),
        ] {
            let mut set = PieceSet::new(BLOCKS * BLOCK - 512).unwrap();
            set.insert(offset, len);
            let found: Vec<u64> = (0..BLOCKS + 100).filter(|block| set.touches(*block)).collect();
            assert_eq!(found, expected.collect::<Vec<_>>(), "{offset} {len}");
        }
        assert!(PieceSet::new(32 << 40).is_some() && PieceSet::new((32 << 40) + 128 * BLOCK).is_none());
        assert_eq!(PieceSet::new(u64::MAX), None);
    }
    #[test]
    fn pieces_of_a_block_are_told_in_runs_that_end_with_the_disk() {
        const PIECE: usize = PIECE_LEN;
        let mut set = PieceSet::new(2 * BLOCK + 3 * super::PIECE + 512).unwrap();
        let ranges = |set: &PieceSet, block| set.ranges(block).map(|run| (run.start, run.end)).collect::<Vec<_>>();
        assert!(ranges(&set, 0).is_empty());
        set.insert(0, 1);
        set.insert(5 * super::PIECE - 1, 2);
        set.insert(BLOCK - 1, 2);
        assert_eq!(ranges(&set, 0), [(0, PIECE), (4 * PIECE, 6 * PIECE), (31 * PIECE, 32 * PIECE)]);
        assert_eq!(ranges(&set, 1), [(0, PIECE)]);
        // What ends before the disk does, or begins after it, adds nothing.
        set.insert(2 * BLOCK + super::PIECE + 7, 0);
        set.insert(2 * BLOCK + 3 * super::PIECE + 512, u64::MAX);
        assert!(ranges(&set, 2).is_empty());
        set.insert(2 * BLOCK + super::PIECE, u64::MAX);
        assert_eq!(ranges(&set, 2), [(PIECE, 3 * PIECE + 512)]);
        assert!(ranges(&set, 3).is_empty() && ranges(&set, u64::MAX).is_empty());
        let mut whole = PieceSet::new(BLOCK).unwrap();
        whole.insert(0, BLOCK);
        assert_eq!(ranges(&whole, 0), [(0, 32 * PIECE)]);
    }
}
