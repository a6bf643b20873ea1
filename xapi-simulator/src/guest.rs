//! What guests do to their disks: seeded, so that each run of a test does the same.

use std::ops::Range;

use crate::content::{Content, OutOfRange};
use crate::layer::{BLOCK_BYTES, RUN_BYTES};
use crate::random::Random;

/// The longest write, in bytes.
const MAX_WRITE: u64 = 256 << 10;

/// A guest that writes to a disk.
#[derive(Debug, Clone)]
pub struct Guest(Random);

impl Guest {
    /// Starts with a seed.
    pub fn new(seed: u64) -> Self {
        Self(Random::new(seed))
    }

    /// Fills about `percent` of the blocks of a disk with random bytes, each from a random sector on.
    ///
    /// # Errors
    /// Those of [`Content::write`], which do not happen, as all ranges are on the disk.
    pub fn fill(&mut self, disk: &mut Content, percent: u64) -> Result<(), OutOfRange> {
        for start in (0..disk.size()).step_by(usize::try_from(BLOCK_BYTES).unwrap_or(usize::MAX)) {
            if self.0.below(100) < percent {
                let end = disk.size().min(start + BLOCK_BYTES);
                let from = start + self.0.below((end - start) / 512) * 512;
                self.write_random(disk, from..end)?;
            }
        }
        Ok(())
    }

    /// Makes a number of writes and returns their ranges.
    ///
    /// Of ten, five are random bytes at random sectors, two are a whole run of 64 KiB, one zeroes, one writes again what
    /// is there, and one is at no sector's edge.
    ///
    /// # Errors
    /// Those of [`Content::write`], which do not happen, as all ranges are on the disk.
    pub fn work(&mut self, disk: &mut Content, writes: u64) -> Result<Vec<Range<u64>>, OutOfRange> {
        (0..writes).map(|_| self.write(disk)).collect()
    }

    fn write(&mut self, disk: &mut Content) -> Result<Range<u64>, OutOfRange> {
        let kind = self.0.below(10);
        let unit = match kind {
            0 => 1,
            1 | 2 => RUN_BYTES as u64,
            _ => 512,
        };
        let start = self.0.below(disk.size() / unit) * unit;
        let length = match kind {
            1 | 2 => RUN_BYTES as u64,
            _ => (1 + self.0.below(MAX_WRITE / unit)) * unit,
        };
        let range = start..disk.size().min(start + length);
        match kind {
            3 => disk.zero(range.start, range.end - range.start)?,
            4 => {
                let mut bytes = buffer(&range);
                disk.read(range.start, &mut bytes)?;
                disk.write(range.start, &bytes)?;
            }
            _ => self.write_random(disk, range.clone())?,
        }
        Ok(range)
    }

    fn write_random(&mut self, disk: &mut Content, range: Range<u64>) -> Result<(), OutOfRange> {
        let mut bytes = buffer(&range);
        self.0.fill(&mut bytes);
        disk.write(range.start, &bytes)
    }
}

/// Makes a buffer of the length of a range, which is at most a block.
fn buffer(range: &Range<u64>) -> Vec<u8> {
    vec![0; usize::try_from(range.end - range.start).expect("a write fits into memory")]
}
