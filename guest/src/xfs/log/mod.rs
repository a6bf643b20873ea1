//! The log: what was committed and not yet written in its place, replayed by lamxfs.
//!
//! lamxfs replays the log of version 5 as Linux does, but shows files and directories, never a block. So it is shown
//! a file that is any block:
//!
//! ```text
//! disk     ─┬─ superblock ─┬─ ... ─┬─ log ───────────────┬─ ... ─┬─ block ─┬─
//!           │              │       │ inode ──────────────┼───────┼▶        │
//!           │              │       │ made up, once lamxfs │       │         │
//!           │              │       │ has read the log     │       │         │
//! ```
//!
//! It keeps what it replayed to itself, lays that over all it reads, and reads an inode anew each time a file is read. An
//! inode in the first block of the log, which no change can be for, is therefore the one that is made up, and the content
//! of its file is the block as it is after the replay. Which blocks to ask for is known from what lamxfs read to change it.

#[cfg(test)]
mod tests;

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::ops::Range;
use std::rc::Rc;
use std::sync::Arc;

use disk::Disk;
use fs_xfs::Superblock;
use fs_xfs::log::LogState;
use lamxfs::{BlockRead, Inode, SuperblockReason, Xfs};

use super::checksum;
use super::volume::Device;
use crate::{ErrorKind, Result};

/// Bytes of blocks that a replay reads at most.
const MAX_READ: u64 = 256 << 20;

/// Bytes of blocks that it changes at most, which are kept in memory.
const MAX_CHANGED: u64 = 120 << 20;

const TOO_MUCH: &str = "it changes more than is kept in memory, or what is not there";

/// What a log changes.
#[derive(Default)]
pub(super) struct Replay {
    pub(super) is_replayed: bool,
    /// What could not be done, a sentence each.
    pub(super) problems: Vec<String>,
    /// Bytes and where they lie, a block each.
    pub(super) changes: Vec<(u64, Vec<u8>)>,
}

impl Replay {
    fn failed(reason: &str) -> Self {
        let problem = format!(
            "the log could not be replayed ({reason}): what changed in the last seconds before the backup may be missing \
             or damaged"
        );
        Self { problems: vec![problem], ..Self::default() }
    }
}

/// Replays the log of a volume.
///
/// # Errors
/// [`ErrorKind::Disk`]. All else that fails is among the problems.
pub(super) fn replay(disk: &Arc<dyn Disk>, superblock: &Superblock) -> Result<Replay> {
    let log = superblock.fsblock_offset(superblock.logstart);
    let log = log..log + u64::from(superblock.logblocks) * u64::from(superblock.blocksize);
    let state = Rc::new(RefCell::new(State::default()));
    let block_size = u64::from(superblock.blocksize);
    let reader = Reader { disk: disk.clone(), log, block_size, state: state.clone() };
    let opened = Xfs::open(reader, disk.size());
    if let Some(error) = state.borrow_mut().failed.take() {
        return Err(error.into());
    }
    let mut replayed = match opened {
        Ok(replayed) => replayed,
        Err(error) => return refused(disk, superblock, &error),
    };
    let mut blocks = std::mem::take(&mut state.borrow_mut().blocks);
    let mut replay = Replay { is_replayed: !blocks.is_empty(), ..Replay::default() };
    blocks.insert(0);
    let inode = Inode { ino: superblock.logstart << superblock.inopblog };
    let mut before = vec![0; usize::try_from(block_size).expect("64 KiB at most")];
    for block in blocks {
        state.borrow_mut().inode = inode_of_block(superblock, block);
        let mut after = vec![0; before.len()];
        let read = replayed.read_file_at(&inode, 0, &mut after);
        if let Some(error) = state.borrow_mut().failed.take() {
            return Err(error.into());
        }
        if read != Ok(after.len()) {
            return Ok(Replay::failed("it changes itself"));
        }
        disk.read_at(block * block_size, &mut before)?;
        if before != after {
            replay.is_replayed = true;
            replay.changes.push((block * block_size, after));
            if replay.changes.len() as u64 * block_size > MAX_CHANGED {
                return Ok(Replay::failed(TOO_MUCH));
            }
        }
    }
    Ok(replay)
}

/// Returns what it means that lamxfs refused a volume: nothing, if its log is empty.
fn refused(disk: &Arc<dyn Disk>, superblock: &Superblock, error: &lamxfs::Error) -> Result<Replay> {
    let reason = match error {
        lamxfs::Error::BadSuperblock(SuperblockReason::DirtyLog) if !superblock.is_v5() => "it is of XFS version 4",
        lamxfs::Error::BadSuperblock(SuperblockReason::DirtyLog) => {
            "it is damaged, or holds what is not understood or not finished"
        }
        lamxfs::Error::Io { .. } => TOO_MUCH,
        // Of the filesystem, which says nothing of the log.
        other => {
            let device = Device::plain(disk.clone());
            return match fs_xfs::log::inspect(&device, superblock) {
                Ok(LogState::Empty | LogState::CleanlyUnmounted) => Ok(Replay::default()),
                Ok(LogState::NeedsReplay) => Ok(Replay::failed(match other {
                    lamxfs::Error::UnsupportedFeature("feat_ascii_ci") => "the filesystem ignores case in names",
                    lamxfs::Error::BadSuperblock(SuperblockReason::RealtimeDevice) => {
                        "the filesystem has a realtime section"
                    }
                    _ => "the filesystem has a feature that is not known",
                })),
                Err(error) => match device.explain::<()>(Err(error), || "the log".to_owned()) {
                    Err(error) if error.kind() == ErrorKind::Disk => Err(error),
                    _ => Ok(Replay::failed("it is damaged")),
                },
            };
        }
    };
    Ok(Replay::failed(reason))
}

/// Returns an inode of a file that is one block of the volume.
///
/// Source: `struct xfs_dinode` and `xfs_bmbt_rec` in Linux `fs/xfs/libxfs/xfs_format.h`.
fn inode_of_block(superblock: &Superblock, block: u64) -> Vec<u8> {
    let per_group = u64::from(superblock.agblocks);
    let packed = ((block / per_group) << superblock.agblklog) | (block % per_group);
    let mut inode = vec![0; usize::from(superblock.inodesize)];
    inode[..2].copy_from_slice(b"IN");
    // A file with all permissions, of the third version, with a list of extents.
    inode[2..4].copy_from_slice(&0o100_777_u16.to_be_bytes());
    inode[4..6].copy_from_slice(&[3, 2]);
    inode[56..64].copy_from_slice(&u64::from(superblock.blocksize).to_be_bytes());
    inode[76..80].copy_from_slice(&1_u32.to_be_bytes());
    // From its block 0 on: 52 bits of the block, 21 of how many.
    inode[176..184].copy_from_slice(&(packed >> 43).to_be_bytes());
    inode[184..192].copy_from_slice(&((packed << 21) | 1).to_be_bytes());
    checksum::set(&mut inode, 100);
    inode
}

/// What lamxfs reads.
struct Reader {
    disk: Arc<dyn Disk>,
    /// Where the log lies.
    log: Range<u64>,
    block_size: u64,
    state: Rc<RefCell<State>>,
}

#[derive(Default)]
struct State {
    has_read_log: bool,
    /// Blocks that were read since, but those of the log.
    blocks: BTreeSet<u64>,
    /// What stands at the start of the log, if not the log.
    inode: Vec<u8>,
    /// What the disk failed with.
    failed: Option<disk::Error>,
}

impl BlockRead for Reader {
    type Error = ();

    fn read_at(&mut self, offset: u64, buffer: &mut [u8]) -> std::result::Result<(), ()> {
        let state = &mut *self.state.borrow_mut();
        let end = offset.checked_add(buffer.len() as u64).filter(|end| *end <= self.disk.size()).ok_or(())?;
        if offset == self.log.start && !state.inode.is_empty() && buffer.len() == state.inode.len() {
            buffer.copy_from_slice(&state.inode);
            return Ok(());
        }
        let is_log = self.log.contains(&offset) && end <= self.log.end;
        state.has_read_log |= is_log;
        // The superblock is read before, and what is asked for with an inode after the replay.
        if state.has_read_log && !is_log && state.inode.is_empty() {
            state.blocks.extend(offset / self.block_size..end.div_ceil(self.block_size));
            if state.blocks.len() as u64 * self.block_size > MAX_READ {
                return Err(());
            }
        }
        self.disk.read_at(offset, buffer).map_err(|error| state.failed = Some(error))
    }
}
