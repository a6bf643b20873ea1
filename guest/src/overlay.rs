//! A disk of which some ranges are other than they stand: what a journal holds, without a write.
//!
//! ```text
//! overlay  ──┬─ base ──┬─ elsewhere ─┬─ bytes ─┬─ base ──┬─ zeroes ─┬─ base ──
//! base     ──┴─────────┴──▲──────────┴─────────┴─────────┴──────────┴────────
//!                         └ where the journal holds the block
//! ```
//!
//! Ranges never overlap: what is laid later covers what was laid before. Where a range leads elsewhere, it leads to the
//! base, never through the overlay again.

use std::collections::BTreeMap;
use std::sync::Arc;

use disk::Disk;

use crate::{Error, ErrorKind, Result};

/// Bytes that are kept in memory at most; more is an error.
const MAX_BYTES: u64 = 128 << 20;

/// Ranges at most, some 100 bytes each; more is an error. A journal of 1 GiB with blocks of 1 KiB has a million.
const MAX_RANGES: usize = 2_000_000;

/// Where bytes of an [`Overlay`] come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place<'a> {
    /// From this offset of the base on.
    Base(u64),
    /// These.
    Bytes(&'a [u8]),
    /// They are zeroes.
    Zeroes,
}

#[derive(Debug)]
enum Content {
    Elsewhere(u64),
    Bytes(Vec<u8>),
    Zeroes,
}

#[derive(Debug)]
struct Range {
    len: u64,
    content: Content,
}

impl Range {
    /// Cuts off what lies `at` bytes (less than its length) after the start, and returns it.
    fn split_off(&mut self, at: u64) -> Self {
        let content = match &mut self.content {
            Content::Elsewhere(place) => Content::Elsewhere(*place + at),
            Content::Bytes(bytes) => Content::Bytes(bytes.split_off(in_memory(at))),
            Content::Zeroes => Content::Zeroes,
        };
        let rest = Self { len: self.len - at, content };
        self.len = at;
        rest
    }

    fn held(&self) -> u64 {
        if matches!(self.content, Content::Bytes(_)) { self.len } else { 0 }
    }
}

/// A disk with other bytes in some places.
pub struct Overlay {
    base: Arc<dyn Disk>,
    ranges: BTreeMap<u64, Range>,
    held: u64,
}

impl Overlay {
    /// Makes one that is its base everywhere.
    #[must_use]
    pub fn new(base: Arc<dyn Disk>) -> Self {
        Self { base, ranges: BTreeMap::new(), held: 0 }
    }

    /// Returns the disk below, to which [`Place::Base`] leads.
    #[must_use]
    pub fn base(&self) -> &Arc<dyn Disk> {
        &self.base
    }

    /// Lets `len` bytes from `start` on be those that the base has from `place` on.
    ///
    /// # Errors
    /// [`ErrorKind::Damaged`] if either does not lie within the disk, [`ErrorKind::TooMuch`] past a bound.
    pub fn lay_elsewhere(&mut self, start: u64, len: u64, place: u64) -> Result<()> {
        self.check_within(place, len)?;
        self.lay(start, len, Content::Elsewhere(place))
    }

    /// Lets the bytes from `start` on be these.
    ///
    /// # Errors
    /// As for [`Overlay::lay_elsewhere`].
    pub fn lay_bytes(&mut self, start: u64, bytes: Vec<u8>) -> Result<()> {
        self.lay(start, bytes.len() as u64, Content::Bytes(bytes))
    }

    /// Lets `len` bytes from `start` on be zeroes.
    ///
    /// # Errors
    /// As for [`Overlay::lay_elsewhere`].
    pub fn lay_zeroes(&mut self, start: u64, len: u64) -> Result<()> {
        self.lay(start, len, Content::Zeroes)
    }

    fn lay(&mut self, start: u64, len: u64, content: Content) -> Result<()> {
        self.check_within(start, len)?;
        if len == 0 {
            return Ok(());
        }
        self.clear(start, start + len);
        let range = Range { len, content };
        if self.held + range.held() > MAX_BYTES || self.ranges.len() >= MAX_RANGES {
            return Err(Error::new(
                ErrorKind::TooMuch,
                "its journal changes more of the volume than is kept in memory",
            ));
        }
        self.held += range.held();
        self.ranges.insert(start, range);
        Ok(())
    }

    fn check_within(&self, start: u64, len: u64) -> Result<()> {
        let size = self.base.size();
        if start.checked_add(len).is_none_or(|end| end > size) {
            return Err(Error::damaged(format!("{len} bytes at {start} do not lie within the volume of {size} bytes")));
        }
        Ok(())
    }

    /// Removes what was laid from `start` to `end`.
    fn clear(&mut self, start: u64, end: u64) {
        self.cut(start);
        self.cut(end);
        while let Some((&first, _)) = self.ranges.range(start..end).next() {
            if let Some(removed) = self.ranges.remove(&first) {
                self.held -= removed.held();
            }
        }
    }

    /// Makes two of the range that lies over `at`.
    fn cut(&mut self, at: u64) {
        if let Some((&first, range)) = self.ranges.range_mut(..at).next_back()
            && first + range.len > at
        {
            let rest = range.split_off(at - first);
            self.ranges.insert(at, rest);
        }
    }

    /// Returns where the bytes from `offset` on come from, and how many of the next `len` (more than 0) lie there.
    #[must_use]
    pub fn place_at(&self, offset: u64, len: u64) -> (Place<'_>, u64) {
        if let Some((first, range)) = self.ranges.range(..=offset).next_back()
            && offset - first < range.len
        {
            let within = offset - first;
            let len = len.min(range.len - within);
            let place = match &range.content {
                Content::Elsewhere(place) => Place::Base(place + within),
                Content::Bytes(bytes) => Place::Bytes(&bytes[in_memory(within)..in_memory(within + len)]),
                Content::Zeroes => Place::Zeroes,
            };
            return (place, len);
        }
        let next = self.ranges.range(offset..).next().map_or(u64::MAX, |(first, _)| *first);
        (Place::Base(offset), len.min(next - offset))
    }
}

/// A length of bytes that are in memory.
fn in_memory(len: u64) -> usize {
    usize::try_from(len).expect("bytes in memory are fewer than MAX_BYTES")
}

impl Disk for Overlay {
    fn size(&self) -> u64 {
        self.base.size()
    }

    fn read_at(&self, mut offset: u64, mut buffer: &mut [u8]) -> disk::Result<()> {
        if offset.checked_add(buffer.len() as u64).is_none_or(|end| end > self.size()) {
            let message = format!("{} bytes at {offset} do not lie within {} bytes", buffer.len(), self.size());
            return Err(disk::Error::new(disk::ErrorKind::OutOfRange, message));
        }
        while !buffer.is_empty() {
            let (place, len) = self.place_at(offset, buffer.len() as u64);
            let (here, rest) = buffer.split_at_mut(usize::try_from(len).expect("no more than the buffer"));
            match place {
                Place::Base(at) => self.base.read_at(at, here)?,
                Place::Bytes(bytes) => here.copy_from_slice(bytes),
                Place::Zeroes => here.fill(0),
            }
            offset += len;
            buffer = rest;
        }
        Ok(())
    }

    fn extent_at(&self, offset: u64) -> disk::Result<disk::Extent> {
        if offset >= self.size() {
            let message = format!("{offset} does not lie within {} bytes", self.size());
            return Err(disk::Error::new(disk::ErrorKind::OutOfRange, message));
        }
        let (place, len) = self.place_at(offset, self.size() - offset);
        Ok(match place {
            Place::Base(at) => {
                let below = self.base.extent_at(at)?;
                disk::Extent { len: below.len.min(len), ..below }
            }
            Place::Bytes(_) => disk::Extent { len, is_hole: false },
            Place::Zeroes => disk::Extent { len, is_hole: true },
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::Memory;

    /// A disk of the bytes 0, 1, 2, ... 63.
    fn overlay() -> Overlay {
        let mut disk = Memory::new(64);
        disk.write(0, &(0..64).collect::<Vec<u8>>());
        Overlay::new(Arc::new(disk))
    }

    fn read(overlay: &Overlay, offset: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0xaa; len];
        overlay.read_at(offset, &mut bytes).expect("within the disk");
        bytes
    }

    #[test]
    fn a_read_over_all_kinds_of_ranges_is_split_at_their_borders() {
        let mut overlay = overlay();
        overlay.lay_elsewhere(4, 2, 60).expect("within");
        overlay.lay_bytes(6, vec![100, 101]).expect("within");
        overlay.lay_zeroes(10, 1).expect("within");
        assert_eq!(read(&overlay, 2, 10), [2, 3, 60, 61, 100, 101, 8, 9, 0, 11]);
        assert_eq!(read(&overlay, 5, 2), [61, 100]);
        assert_eq!(overlay.place_at(5, 9), (Place::Base(61), 1));
        assert_eq!(overlay.place_at(7, 9), (Place::Bytes(&[101]), 1));
        assert_eq!(overlay.place_at(8, 9), (Place::Base(8), 2));
        assert_eq!(overlay.place_at(11, 9), (Place::Base(11), 9));
    }

    #[test]
    fn what_is_laid_later_covers_what_was_laid_before() {
        let cases = [
            (&[(2, 4), (2, 4)][..], [0, 1, 201, 201, 201, 201, 6, 7]),
            (&[(2, 4), (3, 2)], [0, 1, 200, 201, 201, 200, 6, 7]),
            (&[(2, 2), (1, 6)], [0, 201, 201, 201, 201, 201, 201, 7]),
            (&[(0, 3), (2, 3)], [200, 200, 201, 201, 201, 5, 6, 7]),
            (&[(1, 1), (5, 1), (0, 8)], [202; 8]),
        ];
        for (laid, expected) in cases {
            let mut overlay = overlay();
            for (byte, &(start, len)) in (200..).zip(laid) {
                overlay.lay_bytes(start, vec![byte; usize::try_from(len).unwrap()]).expect("within");
            }
            assert_eq!(read(&overlay, 0, 8), expected, "{laid:?}");
            let held = expected.iter().filter(|byte| **byte >= 200).count();
            assert_eq!(overlay.held, held as u64, "{laid:?}");
        }
    }

    #[test]
    fn a_range_that_leads_elsewhere_leads_to_the_base() {
        let mut overlay = overlay();
        overlay.lay_zeroes(8, 8).expect("within");
        overlay.lay_elsewhere(0, 4, 8).expect("within");
        assert_eq!(read(&overlay, 0, 4), [8, 9, 10, 11]);
        overlay.lay_bytes(1, vec![1, 1]).expect("within");
        assert_eq!(read(&overlay, 0, 4), [8, 1, 1, 11]);
    }

    #[test]
    fn nothing_is_laid_outside_of_the_disk_or_past_the_bound() {
        let mut overlay = overlay();
        for (start, len, place) in [(60, 5, 0), (0, 5, 60), (u64::MAX, 2, 0), (0, 2, u64::MAX)] {
            let error = overlay.lay_elsewhere(start, len, place).expect_err("outside");
            assert_eq!(error.kind(), ErrorKind::Damaged, "{start} {len} {place}");
        }
        assert_eq!(overlay.read_at(60, &mut [0; 5]).expect_err("outside").kind(), disk::ErrorKind::OutOfRange);
        overlay.held = MAX_BYTES - 1;
        assert_eq!(overlay.lay_bytes(0, vec![0; 2]).expect_err("too much").kind(), ErrorKind::TooMuch);
        overlay.lay_bytes(0, vec![0]).expect("just enough");
    }

    #[test]
    fn zeroes_are_holes_and_the_base_knows_its_own() {
        let mut overlay = overlay();
        overlay.lay_zeroes(8, 8).expect("within");
        overlay.lay_bytes(16, vec![1]).expect("within");
        let extents = [(0, 8, false), (8, 8, true), (12, 4, true), (16, 1, false), (17, 47, false)];
        for (offset, len, is_hole) in extents {
            assert_eq!(overlay.extent_at(offset).expect("within"), disk::Extent { len, is_hole }, "{offset}");
        }
    }
}
