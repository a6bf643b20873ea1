//! Buffers: pieces of 128 bytes of what lies together on the disk, of which a bitmap says where they belong.
//!
//! A buffer that was freed is *cancelled*: the file that got its blocks may have written to them since, which is in no log.
//! So nothing that the log has for it before that is replayed.
//!
//! Source: `struct xfs_buf_log_format` in Linux `fs/xfs/libxfs/xfs_log_format.h`; `fs/xfs/xfs_buf_item_recover.c`.

use std::borrow::Cow;
use std::collections::BTreeMap;

use super::changes::{Changes, MAX_SECTORS, Place};
use super::ring::SECTOR;
use super::transaction::Item;
use crate::{Error, ErrorKind, Fields, Result};

/// Bytes that a bit stands for.
const PIECE: usize = 128;

/// Where in its format the bitmap of a buffer is (bytes).
const BITMAP: usize = 20;

/// Flags of a buffer: it is freed; it is of inodes, or of quotas of users, projects or groups.
const CANCELLED: u16 = 2;
const NOT_SHOWN: u16 = 1 | 4 | 8 | 16;

/// Buffers that are cancelled at most, some 100 bytes each; more is an error.
const MAX_CANCELLED: usize = 1_000_000;

/// A buffer, and what is done to it.
pub(super) struct Buffer<'a> {
    first: u64,
    count: u64,
    pub(super) action: Action,
    item: &'a Item<'a>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Action {
    Change,
    Cancel,
    /// Only which inode was deleted while open is in it; or how much users have, which is not shown either.
    Nothing,
}

impl<'a> Buffer<'a> {
    pub(super) fn parse(item: &'a Item<'a>) -> Result<Self> {
        let format = item.format();
        let numbers = format.le16(4).zip(format.le16(6)).zip(format.le64(8));
        let ((flags, count), first) = numbers.ok_or_else(|| Error::damaged("a buffer is cut off"))?;
        let count = u64::from(count);
        if count == 0 || count > MAX_SECTORS {
            return Err(Error::damaged(format!("a buffer is of {count} sectors")));
        }
        let action = match flags {
            _ if flags & CANCELLED != 0 => Action::Cancel,
            _ if flags & NOT_SHOWN != 0 => Action::Nothing,
            _ => Action::Change,
        };
        Ok(Self { first, count, action, item })
    }

    /// Changes what the item changes, unless it was done already.
    ///
    /// `lsn` is the number of the transaction in the log, and `uuid` what structures of version 5 are of.
    pub(super) fn apply(&self, changes: &mut Changes<'_>, lsn: u64, uuid: Option<&[u8; 16]>) -> Result<()> {
        if let Some(uuid) = uuid {
            let head = changes.load(self.first, 1)?;
            let is_newer = |place: Place| {
                let stored = Fields(&head).be64(place.lsn).filter(|stored| *stored != 0 && *stored != u64::MAX);
                stored >= Some(lsn) && Fields(&head).array(place.uuid) == Some(*uuid)
            };
            if Place::of(&head).is_some_and(is_newer) {
                return Ok(());
            }
            changes.sum_later(self.first, self.count);
        }
        for (at, bytes) in pieces(self.item)? {
            let (start, end) = (at / SECTOR, (at + bytes.len()).div_ceil(SECTOR));
            if end as u64 > self.count {
                return Err(Error::damaged("a buffer is changed behind its end"));
            }
            let first = self.first.saturating_add(start as u64);
            let mut sectors = changes.load(first, (end - start) as u64)?;
            sectors[at % SECTOR..][..bytes.len()].copy_from_slice(bytes);
            changes.store(first, &sectors)?;
        }
        Ok(())
    }
}

/// Returns where in a buffer (bytes) bytes are put, and which.
fn pieces<'a>(item: &Item<'a>) -> Result<Vec<(usize, &'a [u8])>> {
    let damaged = || Error::damaged("what is changed of a buffer is not there");
    let words = item.format().le32(16).and_then(|words| usize::try_from(words).ok()).ok_or_else(damaged)?;
    let bitmap = words.checked_mul(4).and_then(|len| item.format().bytes(BITMAP, len)).ok_or_else(damaged)?;
    let is_set = |bit: usize| bitmap.get(bit / 8).is_some_and(|byte| byte >> (bit % 8) & 1 == 1);
    let mut regions = item.data().iter();
    let (mut found, mut bit) = (Vec::new(), 0);
    while bit < bitmap.len() * 8 {
        if !is_set(bit) {
            bit += 1;
            continue;
        }
        // Those in a row are one region, or several where a page of memory ended.
        let region: &'a Cow<'a, [u8]> = regions.next().ok_or_else(damaged)?;
        let room = region.len() / PIECE;
        let count = (bit..).take_while(|bit| is_set(*bit)).take(room).count();
        if count == 0 {
            return Err(damaged());
        }
        found.push((bit * PIECE, &region[..count * PIECE]));
        bit += count;
    }
    Ok(found)
}

/// Buffers that are cancelled later in the log, and how often: by their first sector, then by how many they have.
#[derive(Default)]
pub(super) struct Cancelled {
    buffers: BTreeMap<u64, BTreeMap<u64, u64>>,
    count: usize,
}

impl Cancelled {
    /// Notes one that will be.
    pub(super) fn add(&mut self, buffer: &Buffer<'_>) -> Result<()> {
        self.count += 1;
        if self.count > MAX_CANCELLED {
            return Err(Error::new(ErrorKind::TooMuch, format!("it frees more than {MAX_CANCELLED} buffers")));
        }
        *self.buffers.entry(buffer.first).or_default().entry(buffer.count).or_default() += 1;
        Ok(())
    }

    /// Notes that one was.
    pub(super) fn remove(&mut self, buffer: &Buffer<'_>) {
        let Some(counts) = self.buffers.get_mut(&buffer.first) else { return };
        if let Some(left) = counts.get_mut(&buffer.count) {
            *left -= 1;
            if *left == 0 {
                counts.remove(&buffer.count);
            }
        }
        if counts.is_empty() {
            self.buffers.remove(&buffer.first);
        }
    }

    /// Whether a buffer will be.
    pub(super) fn has(&self, buffer: &Buffer<'_>) -> bool {
        self.has_sectors(buffer.first, buffer.count)
    }

    /// Whether a buffer of these sectors, and no others, will be.
    pub(super) fn has_sectors(&self, first: u64, count: u64) -> bool {
        self.buffers.get(&first).is_some_and(|counts| counts.contains_key(&count))
    }

    /// Whether a buffer of any of these sectors will be.
    pub(super) fn has_any(&self, first: u64, count: u64) -> bool {
        let mut before = self.buffers.range(first.saturating_sub(MAX_SECTORS)..first.saturating_add(count));
        before.any(|(start, counts)| {
            counts.last_key_value().is_some_and(|(count, _)| start.saturating_add(*count) > first)
        })
    }
}
