//! A disk in memory, for tests: what was never written is a hole.

use std::collections::BTreeMap;

use disk::{Disk, Error, ErrorKind, Extent, Result};

const PAGE: u64 = 4096;

/// A disk of any size, of which only the pages that were written take room.
#[derive(Debug, Clone, Default)]
pub(crate) struct Memory {
    size: u64,
    pages: BTreeMap<u64, Vec<u8>>,
    /// Reads of anything from here on fail.
    broken_from: Option<u64>,
}

impl Memory {
    pub(crate) fn new(size: u64) -> Self {
        Self { size, pages: BTreeMap::new(), broken_from: None }
    }

    /// Writes what of `bytes` lies on the disk.
    pub(crate) fn write(&mut self, offset: u64, bytes: &[u8]) {
        for (at, byte) in (offset..self.size).zip(bytes) {
            self.pages.entry(at / PAGE).or_insert_with(|| vec![0; 4096])[usize::try_from(at % PAGE).unwrap()] = *byte;
        }
    }

    /// Changes the size; what is cut off is gone.
    pub(crate) fn resize(&mut self, size: u64) {
        self.pages.retain(|page, _| page * PAGE < size);
        self.size = size;
    }

    pub(crate) fn break_from(&mut self, offset: u64) {
        self.broken_from = Some(offset);
    }
}

impl Disk for Memory {
    fn size(&self) -> u64 {
        self.size
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<()> {
        let end = offset + u64::try_from(buffer.len()).unwrap();
        if end > self.size {
            return Err(Error::new(
                ErrorKind::OutOfRange,
                format!("{offset}..{end} is not within {} bytes", self.size),
            ));
        }
        if self.broken_from.is_some_and(|from| end > from) {
            return Err(Error::new(ErrorKind::Unavailable, "the storage did not answer"));
        }
        let mut at = offset;
        while at < end {
            let next = (at / PAGE + 1) * PAGE;
            let (from, to) = (usize::try_from(at - offset).unwrap(), usize::try_from(next.min(end) - offset).unwrap());
            let part = &mut buffer[from..to];
            match self.pages.get(&(at / PAGE)) {
                Some(page) => part.copy_from_slice(&page[usize::try_from(at % PAGE).unwrap()..][..part.len()]),
                None => part.fill(0),
            }
            at = next;
        }
        Ok(())
    }

    fn extent_at(&self, offset: u64) -> Result<Extent> {
        assert!(offset < self.size);
        let is_hole = !self.pages.contains_key(&(offset / PAGE));
        let end = match is_hole {
            true => self.pages.range(offset / PAGE..).next().map_or(self.size, |(page, _)| page * PAGE),
            false => (offset / PAGE + 1) * PAGE,
        };
        Ok(Extent { len: end.min(self.size) - offset, is_hole })
    }
}
