//! Where everything lies in a dynamic VHD file of which it is known which blocks it has, and what is around them.
//!
//! ```text
//! 0      footer            512
//! 512    header            1024
//! 1536   table             4 bytes per block, padded to a sector with 0xFF
//! ...    present blocks    512 bytes of bitmap and 2 MiB of data each, ascending, without gaps
//! end    footer            512, the same again
//! ```
//!
//! That is the layout Xen Orchestra writes (vhd-lib, `DiskConsumerVhdStream.mjs`). It and the length of the file never change.

use std::ops::Range;

use uuid::Uuid;

use crate::error::{ErrorKind, FormatError};
use crate::footer::{DiskType, FOOTER_BYTES, Footer};
use crate::geometry::{BlockSize, Chs, SECTOR};
use crate::header::{HEADER_BYTES, Header, ParentLocator};

const BLOCK: BlockSize = BlockSize::DEFAULT;
const HEADER_AT: u64 = 512;
const TABLE_AT: u64 = 1536;
const ABSENT: [u8; 4] = [0xff; 4];
/// Bytes of the bitmap in front of a block.
pub(crate) const BITMAP_BYTES: u64 = 512;
/// Bytes of a block with its bitmap.
pub(crate) const FULL_BLOCK_BYTES: u64 = BITMAP_BYTES + (2 << 20);

/// What qemu writes where the size is the footer's and not the geometry's. So all its versions since 2.6 read such a file, and
/// vhd-lib, libvhdi and tapdisk do for any creator; of one that they do not know versions before 10 take the geometry.
///
/// Source: qemu, `block/vpc.c`.
const CREATOR: [u8; 4] = *b"qem2";

/// A dynamic or differencing VHD file but for what is in its blocks.
#[derive(Debug)]
pub struct FileLayout {
    /// Footer, header and padded table.
    head: Vec<u8>,
    /// The numbers of the present blocks, ascending: the n-th of them is the n-th of the file.
    present: Vec<u32>,
    footer: [u8; FOOTER_BYTES],
}

impl FileLayout {
    /// The largest disk a VHD can hold for all tools: 2040 GiB.
    ///
    /// Beyond, the 32-bit sector numbers of the table end. Source: VHD specification 1.0, "Maximum size".
    pub const MAX_SIZE: u64 = 2040 << 30;

    /// Lays out the file of a disk of `size` bytes that has the blocks `present`; a differencing one if it has a `parent`.
    ///
    /// `uuid` and `timestamp` go into the footer; Xen Orchestra expects a UUID of RFC 4122, versions 1 to 5. The size
    /// of the disk is stored exactly, but for a last partial sector, which is completed: readers count in
    /// sectors and would leave it out. There is no path of the parent: who takes such a file from a stream
    /// applies it to a disk that holds what the parent does.
    ///
    /// # Errors
    /// `Unsupported` if the disk is larger than [`FileLayout::MAX_SIZE`]; `Damaged` if the blocks are not ascending, or not all of
    /// them are of the disk.
    pub fn new(
        size: u64,
        present: Vec<u32>,
        parent: Option<Uuid>,
        uuid: Uuid,
        timestamp: u32,
    ) -> Result<Self, FormatError> {
        if size > Self::MAX_SIZE {
            let most = Self::MAX_SIZE;
            let reason = format!("a VHD file holds a disk of at most {most} bytes, but this one has {size}");
            return Err(FormatError { kind: ErrorKind::Unsupported, reason });
        }
        let size = size.next_multiple_of(SECTOR);
        let entries = u32::try_from(BLOCK.block_count(size)).expect("2040 GiB have about a million blocks");
        if !present.is_sorted_by(|a, b| a < b) || present.last().is_some_and(|last| *last >= entries) {
            let reason = format!("blocks of a disk of {entries} blocks were expected, ascending");
            return Err(FormatError { kind: ErrorKind::Damaged, reason });
        }
        let footer = Footer {
            features: 2,
            data_offset: HEADER_AT,
            timestamp,
            creator: CREATOR,
            creator_version: 0x0001_0000,
            creator_host_os: *b"Wi2k",
            original_size: size,
            current_size: size,
            chs: Chs::within(size),
            disk_type: if parent.is_some() { DiskType::Differencing } else { DiskType::Dynamic },
            uuid,
        }
        .to_bytes();
        let header = Header {
            table_offset: TABLE_AT,
            max_table_entries: entries,
            block_size: BLOCK,
            parent_uuid: parent,
            parent_timestamp: 0,
            parent_name: String::new(),
            locators: [ParentLocator::default(); 8],
        };
        let mut head = Vec::with_capacity(head_bytes(entries));
        head.extend_from_slice(&footer);
        head.extend_from_slice(&header.to_bytes());
        head.extend(table(entries, &present));
        head.resize(head_bytes(entries), 0xff);
        Ok(Self { head, present, footer })
    }

    /// Returns the exact length of the file in bytes.
    #[must_use]
    pub fn file_size(&self) -> u64 {
        self.blocks().end + bytes(self.footer.len())
    }

    /// Returns the numbers of the present blocks, ascending.
    #[must_use]
    pub fn present(&self) -> &[u32] {
        &self.present
    }

    /// Returns how many bytes of the disk the file holds: whole blocks.
    #[must_use]
    pub fn payload(&self) -> u64 {
        bytes(self.present.len()) * BLOCK.bytes()
    }

    /// Returns where in the file the blocks are.
    pub(crate) fn blocks(&self) -> Range<u64> {
        let start = bytes(self.head.len());
        start..start + self.payload() / BLOCK.bytes() * FULL_BLOCK_BYTES
    }

    /// Returns what is in front of the blocks: footer, header and table.
    pub(crate) fn head(&self) -> &[u8] {
        &self.head
    }

    /// Returns what is behind the blocks.
    pub(crate) fn footer(&self) -> &[u8] {
        &self.footer
    }
}

/// Yields the bytes of the table, without padding.
fn table(entries: u32, present: &[u32]) -> impl Iterator<Item = u8> {
    let sector = |bytes: u64| u32::try_from(bytes / SECTOR).expect("2040 GiB and their bitmaps have fewer sectors");
    let (first, step) = (sector(bytes(head_bytes(entries))), sector(FULL_BLOCK_BYTES));
    let mut next = first;
    let mut present = present.iter().peekable();
    (0..entries).flat_map(move |block| {
        if present.next_if(|found| **found == block).is_none() {
            return ABSENT;
        }
        let entry = next.to_be_bytes();
        // After the last block this may not fit any more, and is not used.
        next = next.saturating_add(step);
        entry
    })
}

/// Returns the length of footer, header and a table of `entries`, which takes at least one sector.
fn head_bytes(entries: u32) -> usize {
    let table = (u64::from(entries) * 4).max(1).next_multiple_of(SECTOR);
    FOOTER_BYTES + HEADER_BYTES + usize::try_from(table).expect("the table of 2040 GiB takes 4 MiB")
}

/// Returns a length in memory as one in a file.
pub(crate) fn bytes(len: usize) -> u64 {
    u64::try_from(len).expect("usize fits in u64")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_disk_of_2040_gib_fits_the_table() {
        let present: Vec<u32> = (0..1_044_480).collect();
        let last: Vec<u8> = table(1_044_480, &present).skip(1_044_479 * 4).collect();
        assert_eq!(u32::from_be_bytes(last.try_into().unwrap()), 8163 + 1_044_479 * 4097);
    }

    #[test]
    fn only_blocks_of_the_disk_in_ascending_order_are_laid_out() {
        let kind = |size, present: &[u32]| {
            FileLayout::new(size, present.to_vec(), None, Uuid::nil(), 0).map(|it| it.file_size()).map_err(|it| it.kind)
        };
        let size = 2 * BLOCK.bytes() + 1;
        assert_eq!(kind(size, &[0, 2]), Ok(512 + 1024 + 512 + 2 * FULL_BLOCK_BYTES + 512));
        assert_eq!(kind(size, &[3]), Err(ErrorKind::Damaged));
        assert_eq!(kind(size, &[1, 1]), Err(ErrorKind::Damaged));
        assert_eq!(kind(size, &[1, 0]), Err(ErrorKind::Damaged));
        assert_eq!(kind(FileLayout::MAX_SIZE + 1, &[]), Err(ErrorKind::Unsupported));
    }
}
