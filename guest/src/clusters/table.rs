//! The file allocation table: of each cluster, which one follows.
//!
//! Source: Microsoft, "FAT: General Overview of On-Disk Format" 1.03, "FAT Data Structure"; "exFAT file system
//! specification", section 4.

use std::cell::RefCell;
use std::sync::Arc;

use disk::Disk;

use super::{FIRST, Heap};
use crate::read::read_within;
use crate::{Error, Fields, Result};

/// Bytes read at once. A table with entries of 12 bits is shorter, so that none of them stands in two.
const PAGE: u64 = 16 << 10;

/// Pages that are kept, 1 MiB.
const PAGES: u64 = 64;

/// How many bits an entry has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Width {
    /// FAT12.
    Twelve,
    /// FAT16.
    Sixteen,
    /// FAT32; four more are not part of the number.
    TwentyEight,
    /// exFAT.
    ThirtyTwo,
}

impl Width {
    /// Returns the highest number that an entry can hold.
    pub(crate) fn mask(self) -> u32 {
        match self {
            Self::Twelve => 0xfff,
            Self::Sixteen => 0xffff,
            Self::TwentyEight => 0x0fff_ffff,
            Self::ThirtyTwo => u32::MAX,
        }
    }

    /// Returns how many clusters a table of `len` bytes has entries for.
    pub(crate) fn clusters_in(self, len: u64) -> u32 {
        let entries = match self {
            Self::Twelve => len.saturating_mul(2) / 3,
            Self::Sixteen => len / 2,
            Self::TwentyEight | Self::ThirtyTwo => len / 4,
        };
        // The highest numbers of each width are marks.
        let most = u64::from(self.mask() - 0xf);
        u32::try_from(entries.min(most)).expect("less than a mask").saturating_sub(FIRST)
    }
}

/// What follows a cluster.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Link {
    To(u32),
    End,
    /// The cluster is in no chain, for this reason.
    NotHeld(String),
    /// What follows is no cluster, for this reason.
    Nowhere(String),
}

/// A page with its number.
type Page = (u64, Vec<u8>);

/// A table on a volume.
pub(crate) struct Table {
    disk: Arc<dyn Disk>,
    start: u64,
    width: Width,
    heap: Heap,
    /// Pages by number, each in the slot of its number modulo [`PAGES`].
    pages: RefCell<Vec<Option<Page>>>,
}

impl Table {
    /// Makes the table that starts at `start` (bytes) and has an entry for each cluster of the heap.
    pub(crate) fn new(disk: Arc<dyn Disk>, start: u64, width: Width, heap: Heap) -> Self {
        Self { disk, start, width, heap, pages: RefCell::default() }
    }

    /// Returns what follows a cluster of the heap.
    ///
    /// # Errors
    /// Those of the disk.
    pub(super) fn next(&self, cluster: u32) -> Result<Link> {
        let entry = self.entry(cluster)?;
        let mask = self.width.mask();
        // exFAT has one mark for the end, the others eight.
        let end = if self.width == Width::ThirtyTwo { mask } else { mask - 7 };
        Ok(match entry {
            entry if entry >= end => Link::End,
            next if self.heap.contains(next) => Link::To(next),
            0 => Link::NotHeld(format!("cluster {cluster} of its chain is free")),
            entry if entry == mask - 8 => Link::NotHeld(format!("cluster {cluster} of its chain is marked as bad")),
            next => Link::Nowhere(format!("its chain leads to cluster {next}, and the last is {}", self.last())),
        })
    }

    /// The heap that its entries are for.
    pub(super) fn heap(&self) -> &Heap {
        &self.heap
    }

    fn last(&self) -> u32 {
        FIRST + self.heap.count() - 1
    }

    /// Returns an entry as it stands, of the width of the table.
    pub(crate) fn entry(&self, number: u32) -> Result<u32> {
        let number = u64::from(number);
        let offset = match self.width {
            Width::Twelve => number * 3 / 2,
            Width::Sixteen => number * 2,
            Width::TwentyEight | Width::ThirtyTwo => number * 4,
        };
        let (page, within) = (offset / PAGE, usize::try_from(offset % PAGE).expect("less than a page"));
        let mut pages = self.pages.borrow_mut();
        if pages.is_empty() {
            pages.resize(usize::try_from(PAGES).expect("few"), None);
        }
        let slot = &mut pages[usize::try_from(page % PAGES).expect("few")];
        if slot.as_ref().is_none_or(|(kept, _)| *kept != page) {
            let bytes = read_within(self.disk.as_ref(), self.start + page * PAGE, usize::try_from(PAGE).expect("few"))?;
            *slot = Some((page, bytes));
        }
        let fields = Fields(slot.as_ref().map_or(&[], |(_, bytes)| bytes));
        let entry = match self.width {
            Width::Twelve if number % 2 == 1 => fields.le16(within).map(|two| u32::from(two >> 4)),
            Width::Twelve | Width::Sixteen => fields.le16(within).map(u32::from),
            Width::TwentyEight | Width::ThirtyTwo => fields.le32(within),
        };
        let missing = || Error::damaged("the allocation table reaches past the end of the volume");
        Ok(entry.ok_or_else(missing)? & self.width.mask())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::Memory;

    fn table(width: Width, bytes: &[u8]) -> Table {
        let mut disk = Memory::new(1 << 20);
        disk.write(512, bytes);
        Table::new(Arc::new(disk), 512, width, Heap::new(4096, 512, 1000, 1 << 20))
    }

    #[test]
    fn entries_of_each_width_are_read() {
        let twelve = table(Width::Twelve, &[0xf8, 0xff, 0xff, 0x03, 0x40, 0x00, 0xff, 0x0f, 0x00, 0xf7, 0xff, 0xff]);
        let links = |table: &Table, numbers: std::ops::Range<u32>| {
            numbers.map(|number| table.next(number).unwrap()).collect::<Vec<_>>()
        };
        assert_eq!(twelve.entry(0).unwrap(), 0xff8);
        let wrong = |why: &str| Link::NotHeld(format!("cluster {why}"));
        let (free, bad) = (wrong("5 of its chain is free"), wrong("6 of its chain is marked as bad"));
        assert_eq!(links(&twelve, 2..8), [Link::To(3), Link::To(4), Link::End, free, bad, Link::End]);
        let sixteen = table(Width::Sixteen, &[0xf8, 0xff, 0xff, 0xff, 0x03, 0x00, 0xf8, 0xff, 0xf6, 0xff]);
        assert_eq!(links(&sixteen, 2..4), [Link::To(3), Link::End]);
        assert_eq!(
            sixteen.next(4).unwrap(),
            Link::Nowhere("its chain leads to cluster 65526, and the last is 1001".to_owned())
        );
        let entries: Vec<u8> =
            [0, 0, 0xa000_0003, 0xffff_fff8_u32].iter().flat_map(|entry| entry.to_le_bytes()).collect();
        assert_eq!(links(&table(Width::TwentyEight, &entries), 2..4), [Link::To(3), Link::End]);
        let found = links(&table(Width::ThirtyTwo, &entries), 2..4);
        assert!(found.iter().all(|link| matches!(link, Link::Nowhere(_))), "{found:?}");
    }

    #[test]
    fn a_table_has_no_entries_for_marks() {
        assert_eq!(Width::Twelve.clusters_in(9 * 512), 3070);
        assert_eq!(Width::Twelve.clusters_in(1 << 20), 0xff0 - 2);
        assert_eq!(Width::Sixteen.clusters_in(1 << 20), 0xfff0 - 2);
        assert_eq!(Width::ThirtyTwo.clusters_in(u64::MAX), 0xffff_fff0 - 2);
        assert_eq!(Width::TwentyEight.clusters_in(3), 0);
    }
}
