//! The superblock of a member of an array: what array, and what of it the member holds.
//!
//! | version | where |
//! |---|---|
//! | 0.90 | the last 64 KiB that start at a multiple of them |
//! | 1.0 | at least 8 KiB before the end, at a multiple of 4 KiB |
//! | 1.1 | at the start |
//! | 1.2 | 4 KiB from the start |
//!
//! All numbers are little-endian: 0.90 is in the order of the processor, and those of guests are so. Source: Linux
//! `include/uapi/linux/raid/md_p.h`, `drivers/md/md.c`.

use disk::Disk;

use super::{last_superblock_at, old_superblock_at};
use crate::Fields;
use crate::read::read_within;

/// What every superblock starts with.
pub(crate) const MAGIC: u32 = 0xa92b_4efc;
/// Both kinds are as long at most.
const LEN: usize = 4096;
/// Version 1 counts in sectors of this many bytes, whatever those of the disk are.
const SECTOR: u64 = 512;

/// What a member says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Superblock {
    pub(super) array: Array,
    /// Its place among the members; `None` of a spare, of one that failed, and of a journal.
    pub(super) role: Option<u32>,
    /// Whether it has all that was written, as far as it was told.
    pub(super) is_complete: bool,
    /// Counts changes of the array: a member that was left behind has fewer.
    pub(super) events: u64,
    /// Where its data starts, in bytes.
    pub(super) data_offset: u64,
    /// How much there is room for, in bytes.
    pub(super) data_size: u64,
}

/// What a member says of its array. It may change with time, so members that were left behind may say something else.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Array {
    pub(super) uuid: [u8; 16],
    pub(super) name: String,
    /// As in `mdadm --level`: −1 is linear.
    pub(super) level: i32,
    pub(super) layout: u32,
    /// In bytes.
    pub(super) chunk_size: u64,
    /// Bytes of each member that are in use; 0 where each gives all that it has.
    pub(super) size: u64,
    pub(super) members: u32,
    /// Whether it is on its way to another shape.
    pub(super) is_reshaping: bool,
    /// Whether `layout` says how members of different sizes are striped.
    pub(super) has_stripes_layout: bool,
}

impl Superblock {
    /// Reads the superblock of a member, `None` if there is no sound one.
    pub(super) fn read(member: &dyn Disk) -> disk::Result<Option<Self>> {
        let size = member.size();
        for at in [Some(4096), Some(0), last_superblock_at(size)].into_iter().flatten() {
            let bytes = read_within(member, at, LEN)?;
            if let Some(found) = Self::parse(Fields(&bytes), at) {
                return Ok(Some(found));
            }
        }
        let Some(at) = old_superblock_at(size) else { return Ok(None) };
        let bytes = read_within(member, at, LEN)?;
        Ok(Self::parse_old(Fields(&bytes), at))
    }

    /// Parses version 1.
    fn parse(fields: Fields, at: u64) -> Option<Self> {
        const RECOVERING: u32 = 0x2;
        const RESHAPING: u32 = 0x4;
        const REPLACEMENT: u32 = 0x10;
        const STRIPES_LAYOUT: u32 = 0x1000;
        let is_here = fields.le32(0)? == MAGIC && fields.le32(4)? == 1 && fields.le64(144)?.checked_mul(SECTOR)? == at;
        let roles = usize::try_from(fields.le32(220)?).ok()?;
        let len = roles.checked_mul(2)?.checked_add(256)?;
        if !is_here || checksum(fields.bytes(0, len)?, 216) != fields.le32(216)? {
            return None;
        }
        let features = fields.le32(8)?;
        let number = usize::try_from(fields.le32(160)?).ok().filter(|number| *number < roles)?;
        let role = u32::from(fields.le16(256 + 2 * number)?);
        let members = fields.le32(92)?;
        let array = Array {
            uuid: fields.array(16)?,
            name: name(fields.bytes(32, 32)?),
            level: i32::from_le_bytes(fields.array(72)?),
            layout: fields.le32(76)?,
            chunk_size: u64::from(fields.le32(88)?) * SECTOR,
            size: fields.le64(80)?.checked_mul(SECTOR)?,
            members,
            is_reshaping: features & RESHAPING > 0,
            has_stripes_layout: features & STRIPES_LAYOUT > 0,
        };
        Some(Self {
            array,
            // 0xfffd and above are no places.
            role: Some(role).filter(|role| *role < members && *role < 0xfffd),
            is_complete: features & (RECOVERING | REPLACEMENT) == 0,
            events: fields.le64(200)?,
            data_offset: fields.le64(128)?.checked_mul(SECTOR)?,
            data_size: fields.le64(136)?.checked_mul(SECTOR)?,
        })
    }

    /// Parses version 0.90, which is 1,024 words.
    fn parse_old(fields: Fields, at: u64) -> Option<Self> {
        const THIS: usize = 992;
        const FAILED: u32 = 1;
        const IN_SYNC: u32 = 1 << 2;
        let word = |index: usize| fields.le32(index * 4);
        let is_here = word(0)? == MAGIC && word(1)? == 0 && matches!(word(2)?, 90 | 91);
        if !is_here || checksum(fields.bytes(0, LEN)?, 38 * 4) != word(38)? {
            return None;
        }
        let mut uuid = [0; 16];
        for (part, index) in uuid.chunks_exact_mut(4).zip([5, 13, 14, 15]) {
            part.copy_from_slice(&word(index)?.to_le_bytes());
        }
        let members = word(10)?;
        let array = Array {
            uuid,
            name: word(11)?.to_string(),
            level: i32::from_le_bytes(fields.array(7 * 4)?),
            layout: word(64)?,
            chunk_size: word(65)?.into(),
            size: u64::from(word(8)?) * 1024,
            members,
            is_reshaping: word(2)? == 91,
            has_stripes_layout: false,
        };
        let state = word(THIS + 4)?;
        Some(Self {
            array,
            role: Some(word(THIS + 3)?).filter(|role| *role < members && state & FAILED == 0),
            is_complete: state & IN_SYNC > 0,
            events: u64::from(word(40)?) << 32 | u64::from(word(39)?),
            data_offset: 0,
            data_size: at,
        })
    }
}

/// Returns the sum of all words but the one at `at`, its carry added; of an odd number of halves the last one, too.
fn checksum(bytes: &[u8], at: usize) -> u32 {
    let words = bytes.chunks(4).enumerate().filter(|(index, _)| index * 4 != at);
    let value = |word: &[u8]| word.iter().rev().fold(0_u64, |sum, byte| sum << 8 | u64::from(*byte));
    let sum: u64 = words.map(|(_, word)| value(word)).sum();
    u32::try_from((sum & u64::from(u32::MAX)).wrapping_add(sum >> 32) & u64::from(u32::MAX)).expect("it is masked")
}

/// Returns the part of a name behind that of the host (`host:name`), with what is not printed replaced.
fn name(bytes: &[u8]) -> String {
    let end = bytes.iter().position(|byte| *byte == 0).unwrap_or(bytes.len());
    let name = bytes[..end].rsplit(|byte| *byte == b':').next().unwrap_or_default();
    name.iter().map(|byte| if byte.is_ascii_graphic() { char::from(*byte) } else { '_' }).collect()
}
