//! How a journal is laid out, and where its reading starts: the two restart pages.
//!
//! ```text
//! ┌ restart ┬ restart ┬ copies of last pages ┬ pages with records, in a ring ...
//! └─────────┴─────────┴──────────────────────┴─────
//! version 1.1          2                      of a volume that was unmounted, and before Windows 8
//! version 2.0          32
//! ```
//!
//! The number of a record (LSN) is its place in the ring, in units of 8 bytes, below how often the ring was gone through.
//! Source: "$LogFile" of the Linux-NTFS documentation; journals that Windows wrote.

use super::super::record;
use crate::{Error, Fields, Result};

/// Bytes of the start of the journal where the two pages lie.
pub(super) const MAX_START: usize = 128 << 10;

/// Bytes that a page may have.
const PAGE_SIZES: std::ops::RangeInclusive<usize> = 512..=64 << 10;

/// The size of all pages that were ever seen.
const PAGE_SIZE: usize = 4096;

const CLEAN: u16 = 2;
const NO_CLIENT: u16 = 0xffff;

/// What a restart page says.
#[derive(Debug, Clone, Copy)]
pub(super) struct Restart {
    /// The last record that had been written for sure.
    pub(super) current: u64,
    pub(super) is_clean: bool,
    page_size: usize,
    system_page_size: usize,
    version: (u16, u16),
    sequence_bits: u32,
    size: u64,
    header_size: u16,
    data_offset: u16,
    /// The record from which a checkpoint is known; 0 if there was none yet.
    pub(super) checkpoint: u64,
}

impl Restart {
    /// Returns what the later of the two pages says; nothing if the journal was never used.
    ///
    /// # Errors
    /// [`Damaged`](crate::ErrorKind::Damaged) if neither can be read.
    pub(super) fn parse(start: &[u8]) -> Result<Option<Self>> {
        // So it is made, and so ntfs-3g leaves it.
        if start.iter().all(|byte| *byte == 0xff) {
            return Ok(None);
        }
        let first = page(start);
        // The second follows, wherever the first ends; of one that is torn that is not known.
        let size = first.map_or(PAGE_SIZE, |first| first.system_page_size);
        let second = start.get(size..).and_then(page);
        let later = [first, second].into_iter().flatten().max_by_key(|restart| restart.current);
        later.map(Some).ok_or_else(|| Error::damaged("neither start of the journal can be read"))
    }

    /// Returns how the journal is laid out, if that is known.
    pub(super) fn layout(&self) -> Result<Layout> {
        let first_copy = 2;
        let copies = match self.version {
            (1, 1) => 2,
            (2, 0) => 32,
            (major, minor) => return Err(Error::unsupported(format!("the journal is of version {major}.{minor}"))),
        };
        if (self.page_size, self.system_page_size) != (PAGE_SIZE, PAGE_SIZE) {
            return Err(Error::unsupported(format!("the journal has pages of {} bytes", self.page_size)));
        }
        if (self.header_size, self.data_offset) != (0x30, 0x40) {
            return Err(Error::unsupported("the journal has records of another form"));
        }
        // What is left for the place, of which three bits are always zero.
        let place_bits = 64_u32.checked_sub(self.sequence_bits).filter(|bits| (13..=40).contains(bits));
        let place_bits = place_bits.ok_or_else(|| Error::damaged("the numbers of records have no place"))?;
        let pages = self.size / PAGE_SIZE as u64;
        if self.size > 8 << place_bits || pages <= first_copy + copies {
            return Err(Error::damaged(format!("a journal of {} bytes has no such records", self.size)));
        }
        Ok(Layout { pages, first: first_copy + copies, place_bits, is_old: self.version == (1, 1) })
    }
}

/// Where the records of a journal lie.
#[derive(Debug, Clone, Copy)]
pub(super) struct Layout {
    /// Pages of the journal.
    pub(super) pages: u64,
    /// The first page of the ring; those from 2 on are copies.
    pub(super) first: u64,
    place_bits: u32,
    /// Of version 1.1: a copy says where it belongs to in another field.
    pub(super) is_old: bool,
}

impl Layout {
    pub(super) const PAGE_SIZE: usize = PAGE_SIZE;
    /// Bytes of a page before the first that may be of a record.
    pub(super) const DATA_OFFSET: usize = 0x40;
    /// Bytes of a record before what it holds.
    pub(super) const HEADER_SIZE: usize = 0x30;

    /// Returns the page in which a record starts, and where.
    pub(super) fn place(self, lsn: u64) -> (u64, usize) {
        let place = (lsn & ((1 << self.place_bits) - 1)) << 3;
        let within = usize::try_from(place % PAGE_SIZE as u64).expect("less than a page");
        (place / PAGE_SIZE as u64, within)
    }

    /// Returns the number that a record has that starts there, if it follows this one.
    pub(super) fn lsn_after(self, before: u64, page: u64, within: usize) -> u64 {
        let place = (page * PAGE_SIZE as u64 + within as u64) >> 3;
        let round = before >> self.place_bits;
        let round = if place <= before & ((1 << self.place_bits) - 1) { round.wrapping_add(1) } else { round };
        round.wrapping_shl(self.place_bits) | place
    }

    /// Returns the page that follows one in the ring.
    pub(super) fn page_after(self, page: u64) -> u64 {
        if page + 1 >= self.pages { self.first } else { page + 1 }
    }
}

fn page(bytes: &[u8]) -> Option<Restart> {
    let fields = Fields(bytes);
    let size = |at| {
        let size = usize::try_from(fields.le32(at)?).ok()?;
        (size.is_power_of_two() && PAGE_SIZES.contains(&size)).then_some(size)
    };
    let system_page_size = size(0x10)?;
    let mut page = fields.bytes(0, system_page_size)?.to_vec();
    // CHKD: chkdsk wrote it.
    let magic = if page.starts_with(b"CHKD") { b"CHKD" } else { b"RSTR" };
    record::restore(&mut page, magic).ok()?;
    let area = Fields(page.get(usize::from(fields.le16(0x18)?)..)?);
    let client = area.le16(0x0c)?;
    let is_clean = client == NO_CLIENT || area.le16(0x0e)? & CLEAN != 0;
    // There is never more than one, which is NTFS.
    let checkpoint = area.le64(usize::from(area.le16(0x16)?) + 8).filter(|_| client == 0);
    Some(Restart {
        current: area.le64(0)?,
        is_clean,
        page_size: size(0x14)?,
        system_page_size,
        version: (fields.le16(0x1c)?, fields.le16(0x1a)?),
        sequence_bits: area.le32(0x10)?,
        size: area.le64(0x18)?,
        header_size: area.le16(0x24)?,
        data_offset: area.le16(0x26)?,
        checkpoint: if is_clean { 0 } else { checkpoint? },
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn page(sequence: u64, client: u16, flags: u16) -> Vec<u8> {
        let mut page = vec![0; 4096];
        page[..8].copy_from_slice(b"RSTR\x1e\0\x09\0");
        page[0x10..0x14].copy_from_slice(&4096_u32.to_le_bytes());
        page[0x14..0x18].copy_from_slice(&4096_u32.to_le_bytes());
        page[0x18] = 0x30;
        page[0x30..0x38].copy_from_slice(&sequence.to_le_bytes());
        page[0x3c..0x3e].copy_from_slice(&client.to_le_bytes());
        page[0x3e..0x40].copy_from_slice(&flags.to_le_bytes());
        page[0x1e] = 1;
        for sector in page.chunks_exact_mut(512) {
            sector[510] = 1;
        }
        page
    }

    fn is_clean(start: &[u8]) -> bool {
        Restart::parse(start).is_ok_and(|restart| restart.is_none_or(|restart| restart.is_clean))
    }

    #[test]
    fn the_later_page_says_whether_the_volume_was_unmounted() {
        let (clean, closed, open) = (page(5, 0, 2), page(6, NO_CLIENT, 0), page(7, 0, 0));
        let torn = [&open[..600], &[9; 3496]].concat();
        for (pages, expected) in [
            ([&clean, &closed], true),
            ([&closed, &open], false),
            ([&open, &closed], false),
            ([&clean, &clean], true),
            ([&torn, &clean], true),
            ([&clean, &torn], true),
            ([&torn, &torn], false),
        ] {
            assert_eq!(is_clean(&pages.map(Vec::as_slice).concat()), expected);
        }
        assert!(is_clean(&[0xff; 8192]));
    }
}
