//! Runs of data and holes, and the two questions of `lseek(2)` about them.

use std::ops::Range;

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
    seek(disk, offset, false)
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
    Ok(Some(seek(disk, offset, true)?.unwrap_or(disk.size())))
}

fn seek(disk: &(impl Disk + ?Sized), mut offset: u64, hole: bool) -> Result<Option<u64>> {
    while offset < disk.size() {
        let extent = disk.extent_at(offset)?;
        if extent.is_hole == hole {
            return Ok(Some(offset));
        }
        offset += extent.len;
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
