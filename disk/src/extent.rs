//! Runs of data and holes, and the two questions of `lseek(2)` about them.

use std::ops::Range;
use std::time::{Duration, Instant};

use crate::{Disk, Result};

/// A run of bytes of one kind.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extent {
    /// Length in bytes, never 0.
    pub len: u64,
    /// Whether all of it reads as zeroes and takes no room.
    pub is_hole: bool,
}

/// Returns the first offset at or after `offset` that is data, `None` if only holes follow (or `offset` is at or past
/// the end).
///
/// # Errors
/// As for [`Disk::extent_at`].
pub fn seek_data(disk: &(impl Disk + ?Sized), offset: u64) -> Result<Option<u64>> {
    seek(disk, offset, false, Duration::MAX)
}

/// Returns the first offset at or after `offset` that is a hole; the end of the disk counts as one. `None` if `offset`
/// is at or past the end.
///
/// # Errors
/// As for [`Disk::extent_at`].
pub fn seek_hole(disk: &(impl Disk + ?Sized), offset: u64) -> Result<Option<u64>> {
    if offset >= disk.size() {
        return Ok(None);
    }
    Ok(Some(seek(disk, offset, true, Duration::MAX)?.unwrap_or(disk.size())))
}

/// Does as [`seek_hole`] if `hole`, else as [`seek_data`], for about `patience`: a disk whose map others made may be of any number
/// of extents. What was not looked at by then is said to be data, which is never wrong: who reads it reads its zeroes.
///
/// # Errors
/// As for [`Disk::extent_at`].
pub fn seek_for(disk: &(impl Disk + ?Sized), offset: u64, hole: bool, patience: Duration) -> Result<Option<u64>> {
    if offset >= disk.size() {
        return Ok(None);
    }
    let found = seek(disk, offset, hole, patience)?;
    Ok(found.or_else(|| hole.then(|| disk.size())))
}

fn seek(disk: &(impl Disk + ?Sized), mut offset: u64, hole: bool, patience: Duration) -> Result<Option<u64>> {
    let began = Instant::now();
    while offset < disk.size() {
        let extent = disk.extent_at(offset)?;
        if extent.is_hole == hole {
            return Ok(Some(offset));
        }
        offset += extent.len;
        if began.elapsed() > patience {
            return Ok((!hole && offset < disk.size()).then_some(offset));
        }
    }
    Ok(None)
}

/// Yields the ranges of data in ascending order, each as long as possible; ends after the first error.
pub fn data_ranges(disk: &(impl Disk + ?Sized)) -> impl Iterator<Item = Result<Range<u64>>> + '_ {
    let mut at = Some(0);
    std::iter::from_fn(move || {
        let from = at.take()?;
        let next = (|| {
            let Some(start) = seek_data(disk, from)? else { return Ok(None) };
            let end = seek_hole(disk, start)?.unwrap_or(disk.size());
            Ok(Some(start..end))
        })();
        if let Ok(Some(range)) = &next {
            at = Some(range.end);
        }
        next.transpose()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Of bytes that are extents each, and the first half of them holes.
    struct Shredded;

    impl Disk for Shredded {
        fn size(&self) -> u64 {
            i64::MAX.unsigned_abs()
        }

        fn read_at(&self, _: u64, buffer: &mut [u8]) -> Result<()> {
            buffer.fill(0);
            Ok(())
        }

        fn extent_at(&self, offset: u64) -> Result<Extent> {
            Ok(Extent { len: 1, is_hole: offset < self.size() / 2 })
        }
    }

    #[test]
    fn what_is_not_found_soon_is_data() {
        let soon = Duration::from_millis(20);
        let data = seek_for(&Shredded, 1000, false, soon).unwrap().unwrap();
        assert!((1000..Shredded.size() / 2).contains(&data), "{data}");
        let half = Shredded.size() / 2;
        assert_eq!(seek_for(&Shredded, half, true, soon).unwrap(), Some(Shredded.size()));
        // What is near is found as ever.
        assert_eq!(seek_for(&Shredded, half - 5, false, Duration::MAX).unwrap(), Some(half));
        assert_eq!(seek_for(&Shredded, 7, true, soon).unwrap(), Some(7));
        assert_eq!(seek_for(&Shredded, Shredded.size(), true, soon).unwrap(), None);
    }
}
