//! A disk: every byte of it can be read at an offset, and it knows which ranges are holes.
//!
//! This crate holds the one trait that everything which serves or inspects a disk takes ([`Disk`]), and nothing about
//! where the bytes come from: it never hears of VHD, files or backups.

mod error;
mod extent;
mod readahead;

pub use error::{Error, ErrorKind, Result};
pub use extent::{Extent, data_ranges, seek_data, seek_for, seek_hole};
pub use readahead::Readahead;

/// Reads under way that keep busy what is near: a disk of this machine, a file server.
const READS_AT_ONCE: usize = 4;

/// Something of which every byte can be read at an offset.
///
/// Implementations are shared between threads and take no lock that is held across I/O.
pub trait Disk: Send + Sync {
    /// Returns the exact size in bytes.
    fn size(&self) -> u64;

    /// Fills `buffer` with the bytes that start at `offset`.
    ///
    /// Holes are filled with zeroes. After an error the content of `buffer` is unspecified and must not be shown.
    ///
    /// # Errors
    /// [`ErrorKind::OutOfRange`] if the range does not lie within [`Disk::size`]; any other kind if the bytes cannot
    /// be had: a read never invents.
    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<()>;

    /// Does the same as [`Disk::read_at`] with what follows the first `head` bytes of `buffer`, which may be gone after an error; what
    /// comes in pieces of a network fills it in place.
    ///
    /// # Errors
    /// As for [`Disk::read_at`].
    fn read_into(&self, offset: u64, buffer: &mut Vec<u8>, head: usize) -> Result<()> {
        self.read_at(offset, &mut buffer[head..])
    }

    /// Returns how many large reads it pays to have under way at once, for who reads all of it.
    fn reads_at_once(&self) -> usize {
        READS_AT_ONCE
    }

    /// Returns the extent that starts at `offset`: what kind of bytes stand there, and for how long at least.
    ///
    /// Two extents that follow each other may be of the same kind. `len` is never 0 and never reaches past the end.
    ///
    /// # Errors
    /// [`ErrorKind::OutOfRange`] if `offset` is not below [`Disk::size`]; others as for [`Disk::read_at`].
    fn extent_at(&self, offset: u64) -> Result<Extent>;

    /// Returns the number of bytes that are not holes, at the granularity in which they are stored.
    ///
    /// # Errors
    /// As for [`Disk::extent_at`].
    fn allocated(&self) -> Result<u64> {
        let mut sum = 0;
        for range in data_ranges(self) {
            let range = range?;
            sum += range.end - range.start;
        }
        Ok(sum)
    }

    /// Fills `buffer` with the bytes that start at `offset` if they are in memory; returns whether they were.
    ///
    /// Waits for nothing. If it returns false the content of `buffer` is unspecified and must not be shown.
    fn read_in_memory(&self, offset: u64, buffer: &mut [u8]) -> bool {
        let _ = (offset, buffer);
        false
    }

    /// Returns how far ahead of a sequential reader it pays to [prefetch](Disk::prefetch), in bytes; 0 where it does not.
    fn prefetch_window(&self) -> u64 {
        0
    }

    /// Brings a range into memory that will be read soon, as far as there is room; returns at once.
    fn prefetch(&self, offset: u64, len: u64) {
        let _ = (offset, len);
    }
}
