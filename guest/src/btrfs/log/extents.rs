//! The contents of files: extents that are added, and what was where they are.

use std::ops::ControlFlow;

use fs_btrfs::fs::EXTENT_DATA_KEY;

use super::super::extent::{self, Content};
use super::super::view::Key;
use super::replay::Replay;
use crate::{Error, Fields, Result};

/// In an item: bytes of the file that it unpacks to, from where in the extent, and how many those are.
const UNPACKED: usize = 8;
const SKIP: usize = 37;
const LEN: usize = 45;

/// Takes an extent over.
pub(super) fn add(replay: &mut Replay, key: Key, item: &[u8]) -> Result<()> {
    let (file, start) = (key.object, key.offset);
    replay.existing(file)?;
    let piece = Piece::parse(start, item, replay.sector())?;
    remove(replay, file, start, piece.end)?;
    if !piece.is_hole {
        replay.put(key, Some(item.to_vec()))?;
    }
    let mut inode = replay.existing(file)?;
    inode.set_bytes(inode.bytes().saturating_add(piece.bytes));
    replay.put_inode(file, inode)
}

/// What an item says.
struct Piece {
    /// Where it ends in the file: what is inline takes whole sectors.
    end: u64,
    /// What it takes of the volume.
    bytes: u64,
    is_hole: bool,
    is_inline: bool,
}

impl Piece {
    fn parse(start: u64, item: &[u8], sector: u64) -> Result<Self> {
        let stored = extent::parse(start, item, sector)?;
        let end = start.saturating_add(stored.len);
        let (is_hole, is_inline) = match stored.content {
            Content::Hole => (true, false),
            Content::Inline(..) => {
                let unpacked = Fields(item).le64(UNPACKED).unwrap_or(stored.len);
                let end = unpacked.checked_next_multiple_of(sector).unwrap_or(u64::MAX);
                return Ok(Self { end, bytes: unpacked, is_hole: false, is_inline: true });
            }
            Content::Unwritten | Content::Plain(_) | Content::Packed { .. } => (false, false),
        };
        Ok(Self { end, bytes: if is_hole { 0 } else { stored.len }, is_hole, is_inline })
    }
}

/// Removes what a file has from `start` to `end`, both at borders of sectors or the end of all.
pub(super) fn remove(replay: &mut Replay, file: u64, start: u64, end: u64) -> Result<()> {
    let sector = replay.sector();
    let key = |offset| Key { object: file, kind: EXTENT_DATA_KEY, offset };
    let first = replay.view().last_until(key(start))?.unwrap_or(start);
    let (mut edits, mut freed) = (Vec::new(), 0_u64);
    replay.view().items(key(first), |offset, item| {
        if offset >= end {
            return Ok(ControlFlow::Break(()));
        }
        let piece = Piece::parse(offset, item, sector)?;
        if piece.end <= start {
            return Ok(ControlFlow::Continue(()));
        }
        if piece.is_inline && (start > offset || end < piece.end) {
            return Err(Error::damaged(format!("an extent of inode {file} lies over a part of what is inline")));
        }
        let (before, after) = (start.saturating_sub(offset), piece.end.saturating_sub(end));
        let is_kept = before > 0 || after > 0;
        edits.push((key(offset), (before > 0).then(|| cut(item, 0, before))));
        if after > 0 {
            edits.push((key(end), Some(cut(item, end - offset, after))));
        }
        freed =
            freed.saturating_add(if is_kept && !piece.is_hole { piece.bytes - before - after } else { piece.bytes });
        Ok(ControlFlow::Continue(()))
    })?;
    edits.into_iter().try_for_each(|(key, item)| replay.put(key, item))?;
    if freed > 0 {
        let mut inode = replay.existing(file)?;
        inode.set_bytes(inode.bytes().saturating_sub(freed));
        replay.put_inode(file, inode)?;
    }
    Ok(())
}

/// Returns the item of `len` bytes of what an item is of, which is not inline, without the first `skip`.
fn cut(item: &[u8], skip: u64, len: u64) -> Vec<u8> {
    let mut item = item.to_vec();
    let before = Fields(&item).le64(SKIP).unwrap_or(0);
    item[SKIP..SKIP + 8].copy_from_slice(&before.saturating_add(skip).to_le_bytes());
    item[LEN..LEN + 8].copy_from_slice(&len.to_le_bytes());
    item
}
