//! Sectors, blocks and the cylinder/head/sector geometry: the arithmetic of the VHD format and nothing that reads.
//!
//! ```text
//! disk   |<-- block 0 -->|<-- block 1 -->| ... |<-- last block, may reach past the end -->|
//! file   [bitmap, whole sectors][block_size bytes of data]     one "full block"
//! ```

use crate::error::FormatError;

/// The length of a sector in bytes; every address in a VHD file counts these.
pub const SECTOR: u64 = 512;

/// The same for what is in memory.
pub(crate) const SECTOR_LEN: usize = 512;

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
    #[expect(clippy::len_without_is_empty, reason = "no block is empty")]
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

    /// Returns the largest usual geometry that `size` bytes cover, as the specification has it; the largest there is from about
    /// 127.5 GiB on.
    ///
    /// Storage managers take a file for damaged that says more than that (blktap, `vhd-util-check.c`).
    /// Source: VHD specification 1.0, appendix "CHS Calculation".
    #[must_use]
    pub fn within(size: u64) -> Self {
        const CYLINDERS: u64 = 65_535;
        let total = size.div_ceil(SECTOR).min(CYLINDERS * 16 * 255);
        let (mut sectors, mut heads, mut tracks) = (255, 16, total / 255);
        if total < CYLINDERS * 16 * 63 {
            (sectors, tracks) = (17, total / 17);
            heads = tracks.div_ceil(1024).max(4);
            if tracks >= heads * 1024 || heads > 16 {
                (sectors, heads, tracks) = (31, 16, total / 31);
            }
            if tracks >= heads * 1024 {
                (sectors, heads, tracks) = (63, 16, total / 63);
            }
        }
        Self {
            cylinders: u16::try_from(tracks / heads).expect("sectors are limited to 65535 cylinders"),
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

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::error::ErrorKind;

    /// Numbers that look random and are the same in each run.
    pub(crate) struct Random(pub(crate) u64);

    impl Random {
        /// Returns a number below `limit`.
        pub(crate) fn below(&mut self, limit: u64) -> u64 {
            self.0 ^= self.0 << 13;
            self.0 ^= self.0 >> 7;
            self.0 ^= self.0 << 17;
            self.0 % limit
        }

        /// Returns an index into something of `len` elements.
        pub(crate) fn index(&mut self, len: usize) -> usize {
            usize::try_from(self.below(u64::try_from(len).unwrap())).unwrap()
        }

        /// Returns `len` bytes.
        pub(crate) fn bytes(&mut self, len: usize) -> Vec<u8> {
            (0..len).map(|_| u8::try_from(self.below(256)).unwrap()).collect()
        }
    }

    #[test]
    fn the_geometry_is_that_of_xen_orchestra() {
        const MIB: u64 = 1 << 20;
        const GIB: u64 = 1 << 30;
        // Produced by vhd-lib's own function.
        let table = [
            (512, (1, 4, 17), 34_816),
            (10 * MIB, (302, 4, 17), 10_514_432),
            (10 * MIB + 512, (302, 4, 17), 10_514_432),
            (504 * MIB, (1024, 16, 63), 528_482_304),
            (GIB, (2081, 16, 63), 1_073_995_776),
            (10 * GIB, (20_806, 16, 63), 10_737_893_376),
            (50 * GIB, (25_701, 16, 255), 53_688_360_960),
            (100 * GIB, (51_401, 16, 255), 107_374_632_960),
            (128 * GIB, (65_535, 16, 255), 136_899_993_600),
            (u64::MAX, (65_535, 16, 255), 136_899_993_600),
        ];
        for (size, (cylinders, heads, sectors), covered) in table {
            let chs = Chs::of_size(size);
            assert_eq!(chs, Chs { cylinders, heads, sectors }, "{size}");
            assert_eq!(chs.bytes(), covered, "{size}");
        }
        assert_eq!(Chs::of_size(0).bytes(), 0);
    }

    #[test]
    fn the_geometry_within_a_size_is_that_of_storage_managers() {
        const MIB: u64 = 1 << 20;
        const GIB: u64 = 1 << 30;
        // Written by `vhd-util create` of blktap.
        let table = [
            (2 * MIB, (60, 4, 17)),
            (10 * MIB, (301, 4, 17)),
            (32 * MIB, (963, 4, 17)),
            (136 * MIB, (561, 16, 31)),
            (504 * MIB, (1024, 16, 63)),
            (GIB, (2080, 16, 63)),
            (10 * GIB, (20_805, 16, 63)),
            (50 * GIB, (25_700, 16, 255)),
            (128 * GIB, (65_535, 16, 255)),
            (2040 * GIB, (65_535, 16, 255)),
        ];
        for (size, (cylinders, heads, sectors)) in table {
            assert_eq!(Chs::within(size), Chs { cylinders, heads, sectors }, "{size}");
        }
        let mut random = Random(0x51ed_270b_4a2f_9c11);
        for round in 0..100_000 {
            let size = random.below(1 << (10 + round % 32));
            assert!(Chs::within(size).bytes() <= size.next_multiple_of(SECTOR), "{size}");
        }
        assert_eq!((Chs::within(0).bytes(), Chs::within(u64::MAX).bytes()), (0, 136_899_993_600));
    }

    #[test]
    fn only_powers_of_two_up_to_256_mib_are_block_sizes() {
        for bytes in [512, 4096, 2 << 20, 256 << 20] {
            assert_eq!(BlockSize::new(bytes).unwrap().bytes(), u64::from(bytes));
        }
        for bytes in [0, 1, 256, 513, 3 << 20, u32::MAX] {
            assert_eq!(BlockSize::new(bytes).unwrap_err().kind, ErrorKind::Damaged, "{bytes}");
        }
        for bytes in [512 << 20, 1 << 31] {
            assert_eq!(BlockSize::new(bytes).unwrap_err().kind, ErrorKind::Unsupported, "{bytes}");
        }
    }

    #[test]
    fn a_bitmap_takes_whole_sectors() {
        for (bytes, bitmap) in [(512, 512), (2 << 20, 512), (4 << 20, 1024), (256 << 20, 65_536)] {
            let size = BlockSize::new(bytes).unwrap();
            assert_eq!(size.bitmap_bytes(), bitmap, "{bytes}");
        }
        assert_eq!(BlockSize::DEFAULT.full_bytes(), 2_097_664);
    }

    #[test]
    fn a_last_partial_block_counts() {
        let size = BlockSize::DEFAULT;
        assert_eq!([0, 1, 2 << 20, (2 << 20) + 1].map(|bytes| size.block_count(bytes)), [0, 1, 1, 2]);
        assert_eq!(size.block_count(u64::MAX), 1 << 43);
    }

    #[test]
    fn a_range_is_split_at_the_blocks() {
        let spans: Vec<_> = BlockSize::DEFAULT.spans((2 << 20) - 10, (2 << 20) + 30).collect();
        let expected = [(0, (2 << 20) - 10, 10), (1, 0, 2 << 20), (2, 0, 20)].map(|(block, skip, len)| BlockSpan {
            block: BlockIndex(block),
            skip,
            len,
        });
        assert_eq!(spans, expected);
        assert_eq!(BlockSize::MIN.spans(700, 0).count(), 0);
    }

    #[test]
    fn spans_cover_the_range_without_gaps() {
        let mut random = Random(0x2545_f491_4f6c_dd1d);
        for _ in 0..500 {
            let size = BlockSize::new(1 << (9 + random.below(20))).unwrap();
            let (offset, len) = (random.below(1 << 40), random.index(100_000));
            let mut at = offset;
            for span in size.spans(offset, len) {
                assert!(span.len > 0 && span.skip + span.len <= size.len());
                assert_eq!(u64::from(span.block.0) * size.bytes() + u64::try_from(span.skip).unwrap(), at);
                at += u64::try_from(span.len).unwrap();
            }
            assert_eq!(at, offset + u64::try_from(len).unwrap());
        }
    }

    #[test]
    fn the_geometry_covers_the_size_up_to_its_limit() {
        let mut random = Random(0x9e37_79b9_7f4a_7c15);
        for round in 0..100_000 {
            let size = random.below(1 << (10 + round % 28));
            assert!(Chs::of_size(size).bytes() >= size.min(136_899_993_600), "{size}");
        }
    }
}
