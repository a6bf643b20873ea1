//! Inodes: their fields as the machine had them in memory, and what follows the fields.
//!
//! ```text
//! item   ─ format: which, where ─┬─ fields, little-endian ─┬─ data: names, extents or root ─┬─ attributes: the same
//! inode  ─                         fields, big-endian      ─┴─ data                        ─┴─ attributes
//! ```
//!
//! Source: `struct xfs_inode_log_format` and `struct xfs_log_dinode` in Linux `fs/xfs/libxfs/xfs_log_format.h`;
//! `fs/xfs/xfs_inode_item_recover.c`, `fs/xfs/xfs_icreate_item.c`.

use std::borrow::Cow;

use fs_xfs::Superblock;

use super::buffer::Cancelled;
use super::changes::{Changes, MAX_SECTORS};
use super::owner;
use super::ring::SECTOR;
use super::transaction::Item;
use crate::xfs::checksum;
use crate::{Error, Fields, Result};

// Bytes of the fields: of version 5, and of those before, of which the last is never in a log.
const FIELDS_5: usize = 176;
const FIELDS_4: usize = 100;
const LOGGED_4: usize = 96;

// Where fields stand.
const MODE: usize = 2;
const VERSION: usize = 4;
const DATA_FORMAT: usize = 5;
const FLUSHED: usize = 30;
const FORK: usize = 82;
const ATTRIBUTES_FORMAT: usize = 83;
const GENERATION: usize = 92;
const NEXT_DELETED: usize = 96;
const CHECKSUM: usize = 100;
const LSN: usize = 112;
const FLAGS_2: usize = 120;
const NUMBER: usize = 152;
const UUID: usize = 160;

/// In [`DATA_FORMAT`] and [`ATTRIBUTES_FORMAT`]: the root of a tree of extents is there.
const TREE: u8 = 3;

/// In [`FLAGS_2`]: times are of 64 bits.
const LARGE_TIMES: u8 = 8;

/// Numbers of more than one byte in the fields: where they stand and their bytes. Of version 5 those from 100 on, too.
const NUMBERS: [(usize, usize); 18] = [
    (0, 2),
    (2, 2),
    (6, 2),
    (8, 4),
    (12, 4),
    (16, 4),
    (20, 2),
    (22, 2),
    (56, 8),
    (64, 8),
    (72, 4),
    (76, 4),
    (80, 2),
    (84, 4),
    (88, 2),
    (90, 2),
    (GENERATION, 4),
    (NEXT_DELETED, 4),
];
const NUMBERS_5: [(usize, usize); 6] = [(24, 8), (104, 8), (LSN, 8), (FLAGS_2, 8), (128, 4), (NUMBER, 8)];
const TIMES: [usize; 3] = [32, 40, 48];
const CREATED: usize = 144;

// What an item has of an inode.
const DATA: u32 = 2 | 4;
const DATA_ROOT: u32 = 8;
const DEVICE: u32 = 0x10;
const IDENTIFIER: u32 = 0x20;
const ATTRIBUTES: u32 = 0x40 | 0x80;
const ATTRIBUTES_ROOT: u32 = 0x100;
const DATA_OWNER: u32 = 0x200;
const ATTRIBUTES_OWNER: u32 = 0x400;

/// Where an item's inode is, and what it has of it.
struct Format {
    has: u32,
    /// The number of a device, or an identifier.
    device: [u8; 16],
    /// The first sector of the buffer it is in, how many that has, and where in it (bytes) the inode starts.
    first: u64,
    count: u64,
    start: usize,
}

impl Format {
    fn parse(fields: Fields<'_>) -> Option<Self> {
        // 32-bit machines lay it out without a gap.
        let shift = if fields.0.len() < 56 { 4 } else { 0 };
        Some(Self {
            has: fields.le32(4)?,
            device: fields.array(24 - shift)?,
            first: fields.le64(40 - shift)?,
            count: u64::from(fields.le32(48 - shift)?),
            start: usize::try_from(fields.le32(52 - shift)?).ok()?,
        })
    }
}

/// Lets an inode be as an item has it, unless it is newer already.
///
/// `lsn` is the number of the transaction in the log.
pub(super) fn apply(
    item: &Item<'_>,
    changes: &mut Changes<'_>,
    cancelled: &Cancelled,
    superblock: &Superblock,
    lsn: u64,
) -> Result<()> {
    let damaged = |what: &str| Error::damaged(format!("an inode {what}"));
    let format = Format::parse(item.format()).ok_or_else(|| damaged("is cut off"))?;
    if cancelled.has_sectors(format.first, format.count) {
        return Ok(());
    }
    let size = usize::from(superblock.inodesize);
    let end = format.start.checked_add(size).filter(|end| end.div_ceil(SECTOR) as u64 <= format.count.min(MAX_SECTORS));
    let end = end.ok_or_else(|| damaged("is outside of its buffer"))?;
    let skipped = format.start / SECTOR;
    let first = format.first.checked_add(skipped as u64).ok_or_else(|| damaged("is outside of the disk"))?;
    let mut sectors = changes.load(first, (end.div_ceil(SECTOR) - skipped) as u64)?;
    let inode = &mut sectors[format.start % SECTOR..][..size];
    if !inode.starts_with(b"IN") {
        return Err(damaged("is changed where none is"));
    }
    let (logged, forks) = item.data().split_first().ok_or_else(|| damaged("has no fields"))?;
    let fields = fields(logged, superblock.is_v5()).ok_or_else(|| damaged("has other fields than there are"))?;
    let changed = newer(inode, fields, superblock.is_v5().then_some(lsn));
    if let Some(fields) = &changed {
        replace(inode, fields, &format, forks, superblock.is_v5())
            .ok_or_else(|| damaged("has no room for its content"))?;
    }
    let owned = if superblock.is_v5() { owned_trees(inode, &format) } else { Vec::new() };
    let number = Fields(inode).be64(NUMBER).ok_or_else(|| damaged("has no number"))?;
    if changed.is_some() {
        changes.store(first, &sectors)?;
    }
    owned.iter().try_for_each(|root| owner::change(root, number, changes, superblock))
}

/// Returns what the fields of an inode are to be, unless those it has are newer.
///
/// `lsn` is the number of the transaction in the log, in version 5.
fn newer(inode: &[u8], mut fields: Vec<u8>, lsn: Option<u64>) -> Option<Vec<u8>> {
    if let Some(lsn) = lsn {
        let stored = Fields(inode).be64(LSN).filter(|stored| *stored != 0 && *stored != u64::MAX);
        // Several transactions can have the same number.
        (stored <= Some(lsn)).then_some(())?;
        fields[LSN..LSN + 8].copy_from_slice(&lsn.to_be_bytes());
    } else {
        // Before version 5 each write of an inode was counted instead, in 16 bits.
        let (stored, new) = (Fields(inode).be16(FLUSHED)?, Fields(&fields).be16(FLUSHED)?);
        let has_wrapped = stored == u16::MAX && new < u16::MAX >> 1;
        (new >= stored || has_wrapped).then_some(())?;
        fields[FLUSHED..FLUSHED + 2].fill(0);
    }
    fields[NEXT_DELETED..NEXT_DELETED + 4].copy_from_slice(&inode[NEXT_DELETED..NEXT_DELETED + 4]);
    Some(fields)
}

/// Replaces the fields of an inode and what else an item has of it; nothing is returned if that has no room.
fn replace(inode: &mut [u8], fields: &[u8], format: &Format, forks: &[Cow<'_, [u8]>], is_v5: bool) -> Option<()> {
    inode.get_mut(..fields.len())?.copy_from_slice(fields);
    let split = fork_offset(fields);
    let (before, attributes) = inode.split_at_mut_checked(split.unwrap_or(inode.len()))?;
    let data = before.get_mut(fields.len()..)?;
    if format.has & DEVICE != 0 {
        data.get_mut(..4)?.copy_from_slice(&Fields(&format.device).le32(0)?.to_be_bytes());
    }
    if format.has & IDENTIFIER != 0 {
        data.get_mut(..16)?.copy_from_slice(&format.device);
    }
    let mut regions = forks.iter();
    for (fork, list, root) in [(data, DATA, DATA_ROOT), (attributes, ATTRIBUTES, ATTRIBUTES_ROOT)] {
        if format.has & root != 0 {
            put_root(fork, regions.next()?, is_v5)?;
        } else if format.has & list != 0 {
            // Names, bytes or extents, which are the same on the disk.
            let region = regions.next()?;
            fork.get_mut(..region.len())?.copy_from_slice(region);
        }
    }
    if is_v5 {
        checksum::set(inode, CHECKSUM);
    }
    Some(())
}

/// Returns where in an inode with these fields its attributes start, if it has room for any.
fn fork_offset(fields: &[u8]) -> Option<usize> {
    let start = if fields[VERSION] >= 3 { FIELDS_5 } else { FIELDS_4 };
    let len = usize::from(fields[FORK]) * 8;
    (len > 0).then_some(start + len)
}

/// Returns the roots of trees that became an inode's, if it is in use.
fn owned_trees(inode: &[u8], format: &Format) -> Vec<Vec<u8>> {
    let split = fork_offset(inode).unwrap_or(inode.len()).min(inode.len());
    let trees = [
        (DATA_OWNER, DATA_FORMAT, inode.get(FIELDS_5..split)),
        (ATTRIBUTES_OWNER, ATTRIBUTES_FORMAT, inode.get(split..)),
    ];
    let is_used = inode[MODE..MODE + 2] != [0, 0];
    let is_owned = |has: u32, kind: usize| is_used && format.has & has != 0 && inode[kind] == TREE;
    trees
        .into_iter()
        .filter(|(has, kind, _)| is_owned(*has, *kind))
        .filter_map(|(_, _, root)| Some(root?.to_vec()))
        .collect()
}

/// Returns the fields of an inode as they stand on the disk.
fn fields(logged: &[u8], is_v5: bool) -> Option<Vec<u8>> {
    let mut fields = logged.get(..if is_v5 { FIELDS_5 } else { LOGGED_4 })?.to_vec();
    fields.resize(if is_v5 { FIELDS_5 } else { FIELDS_4 }, 0);
    (fields.starts_with(b"NI") && (fields[VERSION] >= 3) == is_v5).then_some(())?;
    let has_large_times = is_v5 && fields[FLAGS_2] & LARGE_TIMES != 0;
    let numbers = NUMBERS.iter().chain(if is_v5 { &NUMBERS_5[..] } else { &[(FLUSHED, 2)] });
    for (at, len) in numbers {
        fields[*at..at + len].reverse();
    }
    for at in TIMES.into_iter().chain(is_v5.then_some(CREATED)) {
        if has_large_times {
            fields[at..at + 8].reverse();
        } else {
            // Seconds and nanoseconds.
            fields[at..at + 4].reverse();
            fields[at + 4..at + 8].reverse();
        }
    }
    Some(fields)
}

/// Puts the root of a tree of extents, which was in memory as any of its blocks.
///
/// Source: `xfs_bmbt_to_bmdr` in Linux `fs/xfs/libxfs/xfs_bmap_btree.c`.
fn put_root(fork: &mut [u8], region: &[u8], is_v5: bool) -> Option<()> {
    let header = if is_v5 { 72 } else { 24 };
    let count = usize::from(Fields(region).be16(6)?);
    // Keys and then pointers, 8 bytes each, with room for as many of both as there can be.
    let (room_before, room) = (region.len().checked_sub(header)? / 16, fork.len().checked_sub(4)? / 16);
    if count > room_before || count > room {
        return None;
    }
    fork[..4].copy_from_slice(&region[4..8]);
    let (keys, pointers) = (header, header + room_before * 8);
    fork[4..][..count * 8].copy_from_slice(&region[keys..][..count * 8]);
    fork[4 + room * 8..][..count * 8].copy_from_slice(&region[pointers..][..count * 8]);
    Some(())
}

/// Makes inodes that are free, where the log says that they were made.
pub(super) fn create(
    item: &Item<'_>,
    changes: &mut Changes<'_>,
    cancelled: &Cancelled,
    superblock: &Superblock,
) -> Result<()> {
    let format = item.format();
    let number = |at| format.be32(at).ok_or_else(|| Error::damaged("new inodes are cut off"));
    let (group, block, count, size, blocks) = (number(4)?, number(8)?, number(12)?, number(16)?, number(20)?);
    let generation = number(24)?;
    let sectors = u64::from(blocks) * u64::from(superblock.blocksize) / SECTOR as u64;
    let is_possible = superblock.is_v5()
        && group < superblock.agcount
        && block < superblock.agblocks
        && size == u32::from(superblock.inodesize)
        && sectors <= MAX_SECTORS
        && u64::from(count) * u64::from(size) == sectors * SECTOR as u64;
    if !is_possible {
        return Err(Error::damaged(format!("{count} new inodes of {size} bytes are where none can be")));
    }
    let group_start = u64::from(group) * u64::from(superblock.agblocks);
    let first = (group_start + u64::from(block)) * u64::from(superblock.blocksize) / SECTOR as u64;
    // Their blocks may hold the content of a file by now.
    if cancelled.has_any(first, sectors) {
        return Ok(());
    }
    let mut bytes = changes.load(first, sectors)?;
    bytes.fill(0);
    let packed = (u64::from(group) << superblock.agblklog) | u64::from(block);
    let numbers = packed << superblock.inopblog..;
    for (inode, number) in bytes.chunks_exact_mut(usize::from(superblock.inodesize)).zip(numbers) {
        inode[..2].copy_from_slice(b"IN");
        inode[VERSION] = 3;
        inode[GENERATION..GENERATION + 4].copy_from_slice(&generation.to_be_bytes());
        inode[NEXT_DELETED..NEXT_DELETED + 4].fill(0xff);
        inode[NUMBER..NUMBER + 8].copy_from_slice(&number.to_be_bytes());
        inode[UUID..UUID + 16].copy_from_slice(&superblock.meta_uuid);
        checksum::set(inode, CHECKSUM);
    }
    changes.store(first, &bytes)
}
