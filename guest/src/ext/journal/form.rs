//! The blocks of a journal that are not the filesystem's: what they hold, and whether they are as they were written.
//!
//! | checksums | in a tag | at the end of descriptors and revoke blocks | in a commit |
//! |---|---|---|---|
//! | none | | | |
//! | version 1 | | | CRC-32 of all blocks of the transaction |
//! | version 2 | 16 bits of the CRC-32C of the block | CRC-32C | CRC-32C of itself |
//! | version 3 | 32 bits of it | CRC-32C | CRC-32C of itself |
//!
//! All numbers are big-endian.

use fs_ext4::checksum::linux_crc32c;
use fs_ext4::jbd2::{
    JBD2_FEATURE_COMPAT_CHECKSUM, JbdIncompat, JournalSuperblock, block_tail_checksum, commit_block_checksum,
    tag_checksum,
};

use crate::{Error, Fields, Result};

/// Bytes of the header of each block that is not one of the filesystem's.
pub(super) const HEADER: usize = 12;

/// Bytes at the end of a descriptor that hold its checksum.
pub(super) const TAIL: usize = 4;

/// Blocks of a ring at least, beside those of fast commits.
const MIN_RING: u32 = 1024;

/// Blocks for fast commits where the superblock does not say.
const DEFAULT_FAST_COMMIT_BLOCKS: u32 = 256;

pub(super) const FLAG_ESCAPED: u16 = 1;
pub(super) const FLAG_SAME_UUID: u16 = 2;
pub(super) const FLAG_LAST: u16 = 8;

/// What a descriptor says of a block that follows it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Tag {
    /// Of the filesystem.
    pub(super) block: u64,
    pub(super) flags: u16,
    /// All 32 bits, or 16.
    checksum: u32,
}

/// How the blocks of a journal are to be read.
#[derive(Debug)]
pub(super) struct Form {
    superblock: JournalSuperblock,
    /// The block after the last of the ring.
    end: u32,
}

impl Form {
    /// Parses the superblock of a journal that has `blocks`.
    ///
    /// # Errors
    /// [`ErrorKind::Damaged`](crate::ErrorKind::Damaged), [`ErrorKind::Unsupported`](crate::ErrorKind::Unsupported).
    pub(super) fn parse(bytes: &[u8], block_size: u64, blocks: u64) -> Result<Self> {
        let superblock = JournalSuperblock::parse(bytes).map_err(|error| Error::damaged(error.to_string()))?;
        if let Some(problem) = superblock.checksum_declaration_error() {
            return Err(Error::damaged(problem));
        }
        let known = JbdIncompat::all().bits();
        if superblock.feature_incompat & !known != 0 {
            return Err(Error::unsupported(format!(
                "its journal has features that are not read ({:#x})",
                superblock.feature_incompat & !known
            )));
        }
        if u64::from(superblock.block_size) != block_size
            || superblock.first == 0
            || superblock.first >= superblock.max_len
            || u64::from(superblock.max_len) > blocks
        {
            return Err(Error::damaged("the superblock of its journal contradicts itself"));
        }
        if superblock.uses_csum_v2_or_v3() {
            let mut alone = bytes[..1024].to_vec();
            alone[0xfc..0x100].fill(0);
            if linux_crc32c(!0, &alone) != superblock.checksum {
                return Err(Error::damaged("the superblock of its journal has a wrong checksum"));
            }
        }
        let mut end = superblock.max_len;
        if superblock.feature_incompat & JbdIncompat::FAST_COMMIT.bits() != 0 {
            let beside =
                if superblock.num_fc_blocks == 0 { DEFAULT_FAST_COMMIT_BLOCKS } else { superblock.num_fc_blocks };
            end = end.checked_sub(beside).filter(|end| *end >= MIN_RING).unwrap_or(end);
        }
        let start = superblock.start;
        if start != 0 && !(superblock.first..end).contains(&start) {
            return Err(Error::damaged(format!("its journal starts at block {start} of {end}")));
        }
        Ok(Self { superblock, end })
    }

    /// Returns the block in which the first transaction starts, and its sequence number; `None` if there is none.
    pub(super) fn start(&self) -> Option<(u32, u32)> {
        (self.superblock.start != 0).then_some((self.superblock.start, self.superblock.sequence))
    }

    /// Returns how many blocks the ring has.
    pub(super) fn len(&self) -> u32 {
        self.end - self.superblock.first
    }

    /// Returns the block of the ring that comes `count` (less than there are) after another.
    pub(super) fn after(&self, block: u32, count: u32) -> u32 {
        let to_end = self.end - block;
        if count < to_end { block + count } else { self.superblock.first + (count - to_end) }
    }

    /// Returns the blocks in which fast commits may be.
    pub(super) fn fast_commits(&self) -> std::ops::Range<u32> {
        // The first block after the ring stays free.
        let start = if self.has(JbdIncompat::FAST_COMMIT) { self.end + 1 } else { self.superblock.max_len };
        start..self.superblock.max_len
    }

    /// Returns the tags of a descriptor.
    pub(super) fn tags(&self, bytes: &[u8]) -> Vec<Tag> {
        let len = self.superblock.tag_bytes();
        let (is_v3, is_64) = (self.has(JbdIncompat::CSUM_V3), self.has(JbdIncompat::BIT64));
        let mut tags = Vec::new();
        let mut at = HEADER;
        while let Some(tag) = bytes[..bytes.len() - self.tail()].get(at..at + len) {
            let fields = Fields(tag);
            let number = |value: Option<u32>| u64::from(value.unwrap_or_default());
            let high = if is_64 { number(fields.be32(8)) } else { 0 };
            let checksum = if is_v3 { fields.be32(12) } else { fields.be16(4).map(u32::from) };
            // The last two bytes of four where there are as many.
            let flags = fields.be16(6).unwrap_or_default();
            tags.push(Tag {
                block: high << 32 | number(fields.be32(0)),
                flags,
                checksum: checksum.unwrap_or_default(),
            });
            at += len + if flags & FLAG_SAME_UUID == 0 { 16 } else { 0 };
            if flags & FLAG_LAST != 0 {
                break;
            }
        }
        tags
    }

    /// Returns whether the block that a tag names is the one that was written in a transaction.
    pub(super) fn is_genuine(&self, tag: Tag, sequence: u32, block: &[u8]) -> bool {
        let sum = tag_checksum(self.superblock.csum_seed(), sequence, block);
        let is_v3 = self.has(JbdIncompat::CSUM_V3);
        !self.has_checksums() || tag.checksum == if is_v3 { sum } else { sum & 0xffff }
    }

    /// Checks a descriptor or revoke block.
    pub(super) fn has_genuine_tail(&self, bytes: &[u8]) -> bool {
        !self.has_checksums()
            || Fields(bytes).be32(bytes.len() - TAIL) == Some(block_tail_checksum(self.superblock.csum_seed(), bytes))
    }

    /// Checks a commit; `sum` is that of all blocks of its transaction.
    pub(super) fn is_genuine_commit(&self, bytes: &[u8], sum: u32) -> bool {
        let fields = Fields(bytes);
        let stored = fields.be32(16);
        if self.sums_transactions() {
            // Of CRC-32 in four bytes, or none.
            let kind = fields.be16(12);
            return kind == Some(0x0104) && stored == Some(sum) || kind == Some(0) && stored == Some(0);
        }
        if !self.has_checksums() {
            return true;
        }
        let seed = self.superblock.csum_seed();
        // Older bytes may follow what it has.
        let mut alone = bytes[..60].to_vec();
        alone.resize(bytes.len(), 0);
        stored == Some(commit_block_checksum(seed, bytes)) || stored == Some(commit_block_checksum(seed, &alone))
    }

    /// Returns whether commits hold a sum over the blocks of their transaction (version 1).
    pub(super) fn sums_transactions(&self) -> bool {
        self.superblock.feature_compat & JBD2_FEATURE_COMPAT_CHECKSUM != 0
    }

    /// Returns the blocks that a revoke block names.
    ///
    /// # Errors
    /// [`ErrorKind::Damaged`](crate::ErrorKind::Damaged) if they do not fit in it.
    pub(super) fn revoked<'a>(&self, bytes: &'a [u8]) -> Result<impl Iterator<Item = u64> + use<'a>> {
        let used = Fields(bytes).be32(HEADER).and_then(|used| usize::try_from(used).ok()).unwrap_or(usize::MAX);
        let room = bytes.len() - self.tail();
        let records = bytes.get(HEADER + 4..used.max(HEADER + 4)).filter(|_| used <= room);
        let records = records.ok_or_else(|| Error::damaged("a revoke block of its journal is longer than a block"))?;
        let width = if self.has(JbdIncompat::BIT64) { 8 } else { 4 };
        Ok(records.chunks_exact(width).filter_map(move |record| {
            let fields = Fields(record);
            if width == 8 { fields.be64(0) } else { fields.be32(0).map(u64::from) }
        }))
    }

    fn has(&self, feature: JbdIncompat) -> bool {
        self.superblock.feature_incompat & feature.bits() != 0
    }

    /// Returns whether single blocks have checksums (versions 2 and 3).
    pub(super) fn has_checksums(&self) -> bool {
        self.superblock.uses_csum_v2_or_v3()
    }

    /// Bytes at the end of a descriptor that are no tags.
    fn tail(&self) -> usize {
        if self.has_checksums() { TAIL } else { 0 }
    }
}

/// Continues the CRC-32 of which the first bit is the highest (that of Ethernet is mirrored), not inverted at the end.
pub(super) fn crc32_be(sum: u32, bytes: &[u8]) -> u32 {
    bytes.iter().fold(sum, |sum, byte| {
        let [high, ..] = sum.to_be_bytes();
        sum << 8 ^ CRC32_BE[usize::from(high ^ byte)]
    })
}

/// What each highest byte adds to a sum.
const CRC32_BE: [u32; 256] = {
    let mut table = [0; 256];
    let (mut at, mut byte) = (0, 0_u32);
    while at < table.len() {
        let mut sum = byte << 24;
        let mut bit = 0;
        while bit < 8 {
            sum = sum << 1 ^ if sum >> 31 == 0 { 0 } else { 0x04c1_1db7 };
            bit += 1;
        }
        table[at] = sum;
        (at, byte) = (at + 1, byte + 1);
    }
    table
};
