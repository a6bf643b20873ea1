//! Sectors, blocks and the cylinder/head/sector geometry: the arithmetic of the VHD format and nothing that reads.
//!
//! ```text
//! disk   |<-- block 0 -->|<-- block 1 -->| ... |<-- last block, may reach past the end -->|
//! file   [bitmap, whole sectors][block_size bytes of data]     one "full block"
//! ```

use crate::error::FormatError;

/// The length of a sector in bytes; every address in a VHD file counts these.
pub const SECTOR: u64 = 512;

/// The number of a block of the disk, counted from its start.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BlockIndex(pub u32);

/// An address in a VHD file, in sectors from its start.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct FileSector(pub u32);

impl FileSector {
    /// Returns the address in bytes.
    #[must_use]
    pub fn bytes(self) -> u64 {
        u64::from(self.0) * SECTOR
    }
}

/// The part of a byte range that lies in one block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BlockSpan {
    /// The block.
    pub block: BlockIndex,
    /// Bytes of the block before the part.
    pub skip: usize,
    /// Length of the part in bytes, never 0.
    pub len: usize,
}

/// The number of data bytes of a block: a power of two from one sector to 256 MiB.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct BlockSize(u32);

impl BlockSize {
    /// 2 MiB, the only size Xen Orchestra writes.
    pub const DEFAULT: Self = Self(2 << 20);
    /// 512 bytes.
    pub const MIN: Self = Self(512);
    /// 256 MiB. A block is held in memory as a whole, so what a file asks for is bounded here.
    pub const MAX: Self = Self(256 << 20);

    /// Checks a block size in bytes.
    ///
    /// # Errors
    /// `Damaged` unless `bytes` is a power of two of at least one sector, `Unsupported` above [`BlockSize::MAX`].
    pub fn new(bytes: u32) -> Result<Self, FormatError> {
        if !bytes.is_power_of_two() || bytes < Self::MIN.0 {
            return Err(FormatError::damaged(format!(
                "the block size must be a power of two of at least 512 bytes, but the header says {bytes}"
            )));
        }
        if bytes > Self::MAX.0 {
            return Err(FormatError::unsupported(format!(
                "blocks of up to 268435456 bytes can be read, but the header says {bytes}"
            )));
        }
        Ok(Self(bytes))
    }

    /// Returns the size in bytes.
    #[must_use]
    pub fn bytes(self) -> u64 {
        u64::from(self.0)
    }

    /// Returns the size in bytes, as a length in memory.
    #[must_use]
    pub fn len(self) -> usize {
        usize::try_from(self.0).expect("256 MiB fits in usize")
    }

    /// Returns the length in bytes of the sector bitmap in front of a block, rounded up to whole sectors.
    #[must_use]
    pub fn bitmap_bytes(self) -> usize {
        let bits = self.bytes() / SECTOR;
        usize::try_from(bits.div_ceil(8).next_multiple_of(SECTOR)).expect("the bitmap of 256 MiB takes 64 KiB")
    }

    /// Returns the number of bytes a block takes in a file: bitmap and data.
    #[must_use]
    pub fn full_bytes(self) -> usize {
        self.bitmap_bytes() + self.len()
    }

    /// Returns the number of blocks of a disk of `size` bytes; the last one may reach past the end.
    #[must_use]
    pub fn block_count(self, size: u64) -> u64 {
        size.div_ceil(self.bytes())
    }

    /// Splits `len` bytes at `offset` of the disk into the parts of the blocks they lie in, ascending.
    ///
    /// # Panics
    /// If the range reaches past block 2^32 - 1: a disk whose table has an entry for each block does not.
    pub fn spans(self, offset: u64, len: usize) -> impl Iterator<Item = BlockSpan> {
        let size = self.bytes();
        let (mut at, mut left) = (offset, len);
        std::iter::from_fn(move || {
            if left == 0 {
                return None;
            }
            let block = u32::try_from(at / size).expect("the table of a disk has at most 2^32 - 1 entries");
            let skip = usize::try_from(at % size).expect("a block fits in memory");
            let part = left.min(self.len() - skip);
            left -= part;
            at = at.saturating_add(u64::try_from(part).expect("usize fits in u64"));
            Some(BlockSpan { block: BlockIndex(block), skip, len: part })
        })
    }
}

/// The geometry an old BIOS would show for a disk; it never says the size of one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Chs {
    /// Cylinders.
    pub cylinders: u16,
    /// Heads.
    pub heads: u8,
    /// Sectors per track.
    pub sectors: u8,
}

impl Chs {
    /// Returns the smallest usual geometry that covers `size` bytes, or the largest there is (about 127.5 GiB).
    ///
    /// Source: VHD specification 1.0, appendix "CHS Calculation", rounded up instead of down as Xen Orchestra does
    /// (vhd-lib, `_computeGeometryForSize.js`).
    #[must_use]
    pub fn of_size(size: u64) -> Self {
        const CYLINDERS: u64 = 65_535;
        let total = size.div_ceil(SECTOR).min(CYLINDERS * 16 * 255);
        let (sectors, heads) = if total >= CYLINDERS * 16 * 63 {
            (255, 16)
        } else {
            // The appendix divides first and compares cylinders times heads; comparing sectors needs no fractions.
            let heads = ((total + 1023 * 17) / (1024 * 17)).max(4);
            if heads <= 16 && total < heads * 1024 * 17 {
                (17, heads)
            } else if total < 16 * 1024 * 31 {
                (31, 16)
            } else {
                (63, 16)
            }
        };
        Self {
            cylinders: u16::try_from(total.div_ceil(sectors * heads)).expect("sectors are limited to 65535 cylinders"),
            heads: u8::try_from(heads).expect("at most 16 heads"),
            sectors: u8::try_from(sectors).expect("at most 255 sectors per track"),
        }
    }

    /// Returns the number of bytes the geometry covers.
    #[must_use]
    pub fn bytes(self) -> u64 {
        u64::from(self.cylinders) * u64::from(self.heads) * u64::from(self.sectors) * SECTOR
    }
}
