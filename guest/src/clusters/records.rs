//! A directory as its records, of 32 bytes each.

use disk::Disk;

use super::{Chain, Heap};
use crate::{Error, Result};

/// Bytes of a record.
pub(crate) const RECORD: usize = 32;

/// Bytes that are read at once.
const PIECE: u64 = 64 << 10;

/// A record, and where it stands on the volume.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Record {
    /// In bytes.
    pub(crate) place: u64,
    pub(crate) bytes: [u8; RECORD],
}

/// The records of a directory in order, read as they are asked for.
pub(crate) struct Records<'a> {
    disk: &'a dyn Disk,
    /// Starts and ends of what is not read yet (bytes), the first at the end.
    ranges: Vec<(u64, u64)>,
    /// Why there is no more after them.
    damage: Option<Error>,
    piece: Vec<u8>,
    piece_at: u64,
    /// Bytes of the piece that were given.
    given: usize,
}

impl<'a> Records<'a> {
    /// Starts at the first record of a chain.
    pub(crate) fn of_chain(disk: &'a dyn Disk, heap: &Heap, chain: &Chain) -> Self {
        let ranges = chain.runs().map(|run| {
            let start = heap.place(run.cluster);
            (start, start + run.len * heap.cluster_size())
        });
        Self::new(disk, ranges.collect(), chain.damage())
    }

    /// Starts at the first record of ranges of the volume (bytes); after them comes an error, if there is one.
    pub(crate) fn new(disk: &'a dyn Disk, mut ranges: Vec<(u64, u64)>, damage: Option<Error>) -> Self {
        ranges.reverse();
        Self { disk, ranges, damage, piece: Vec::new(), piece_at: 0, given: 0 }
    }

    /// Reads what comes next; `false` at the end.
    fn read(&mut self) -> Result<bool> {
        let Some((start, end)) = self.ranges.pop() else { return Ok(false) };
        let len = (end - start).min(PIECE);
        self.piece = vec![0; usize::try_from(len).expect("64 KiB at most")];
        self.disk.read_at(start, &mut self.piece)?;
        (self.piece_at, self.given) = (start, 0);
        if start + len < end {
            self.ranges.push((start + len, end));
        }
        Ok(true)
    }
}

impl Iterator for Records<'_> {
    type Item = Result<Record>;

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            if let Some((bytes, _)) = self.piece[self.given..].split_first_chunk() {
                let place = self.piece_at + self.given as u64;
                self.given += RECORD;
                return Some(Ok(Record { place, bytes: *bytes }));
            }
            match self.read() {
                Ok(true) => {}
                Ok(false) => return self.damage.take().map(Err),
                Err(error) => {
                    self.ranges.clear();
                    self.damage = None;
                    return Some(Err(error));
                }
            }
        }
    }
}
