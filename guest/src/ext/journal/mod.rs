//! What was committed to the journal and may not stand in its place yet (jbd2).
//!
//! ```text
//! block 0      1 ... a ring of transactions with ascending sequence numbers ... last   fast commits
//! superblock   ┌ revoked ┬ descriptor: tags ┬ as many blocks ┬ ... ┬ commit ┐ ...      (blocks that bypass the ring)
//! ```
//!
//! As Linux does, in three passes: find the last transaction that was committed, collect what later transactions revoke,
//! then let each block that a tag names be the one in the journal; the last wins. Nothing is copied: the result says where
//! in the volume the newer bytes stand. Sequence numbers wrap around, so they are compared by their distance.
//!
//! Unlike Linux, a block of the journal that is damaged is left out and said, and the volume is read as it stands if the
//! journal as a whole cannot be read.
//! Source: "Journal (jbd2)" of the kernel's documentation of ext4, and fs/jbd2/recovery.c of Linux for what it leaves open.

mod fast_commit;
mod form;
mod log;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::sync::Arc;

use disk::Disk;
use fs_ext4::features::{Compat, Incompat};
use fs_ext4::jbd2::JBD2_MAGIC_NUMBER;

use super::volume::Volume;
use crate::{Error, ErrorKind, Overlay, Result};
pub(super) use fast_commit::Change;
use log::Log;

/// Sentences about blocks of the journal at most.
const MAX_PROBLEMS: usize = 8;

/// What a journal holds.
#[derive(Debug, Default)]
pub(super) struct Replay {
    /// By block of the filesystem.
    logged: BTreeMap<u64, Logged>,
    /// What was committed fast after all of these.
    pub(super) changes: Vec<Change>,
    /// Whether there was one to take into account, and it was.
    pub(super) is_replayed: bool,
    /// What of it is not shown, a sentence each.
    pub(super) problems: Vec<String>,
    /// Blocks that are not shown and not named there.
    unnamed: u64,
}

/// A block in the journal.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Logged {
    /// Where it stands (bytes).
    place: u64,
    /// Its first four bytes are those of a header, and zeroes in the journal.
    is_escaped: bool,
}

impl Replay {
    /// Says that a block is not shown, and why.
    fn leave_out(&mut self, problem: String) {
        if self.problems.len() < MAX_PROBLEMS {
            self.problems.push(problem);
        } else {
            self.unnamed += 1;
        }
    }

    /// Returns a disk with what it holds, but for what was committed fast.
    pub(super) fn laid_over(&self, disk: Arc<dyn Disk>, block_size: u64) -> Result<Overlay> {
        let mut overlay = Overlay::new(disk);
        let mut logged = self.logged.iter().peekable();
        while let Some((&block, first)) = logged.next() {
            if first.is_escaped {
                let mut bytes = vec![0; usize::try_from(block_size).expect("64 KiB at most")];
                overlay.base().read_at(first.place, &mut bytes)?;
                bytes[..4].copy_from_slice(&JBD2_MAGIC_NUMBER.to_be_bytes());
                overlay.lay_bytes(block * block_size, bytes)?;
                continue;
            }
            let mut len = block_size;
            while logged
                .next_if(|(next, then)| {
                    !then.is_escaped
                        && **next * block_size == block * block_size + len
                        && then.place == first.place + len
                })
                .is_some()
            {
                len += block_size;
            }
            overlay.lay_elsewhere(block * block_size, len, first.place)?;
        }
        Ok(overlay)
    }
}

/// Reads the journal of a volume that was not unmounted.
///
/// # Errors
/// [`ErrorKind::Disk`]; what else keeps a journal from being read is said in the result.
pub(super) fn replay(volume: &Volume, superblock: &fs_ext4::superblock::Superblock) -> Result<Replay> {
    if superblock.feature_incompat & Incompat::RECOVER.bits() == 0 {
        return Ok(Replay::default());
    }
    let is_elsewhere = superblock.feature_compat & Compat::HAS_JOURNAL.bits() == 0 || superblock.journal_inode == 0;
    let replay = if is_elsewhere {
        Err(Error::unsupported("it is on a disk of its own"))
    } else {
        Log::open(volume, superblock.journal_inode).and_then(|log| log.replay())
    };
    replay.or_else(impossible)
}

/// Returns what a journal comes to that cannot be replayed.
///
/// # Errors
/// The one that is given, if it is [`ErrorKind::Disk`].
pub(super) fn impossible(error: Error) -> Result<Replay> {
    if error.kind() == ErrorKind::Disk {
        return Err(error);
    }
    let problem = format!(
        "The filesystem was in use and its journal cannot be replayed ({error}): what was written last may be missing, old or \
         damaged"
    );
    Ok(Replay { problems: vec![problem], ..Replay::default() })
}

/// Returns what is said where fast commits cannot be replayed.
///
/// # Errors
/// The one that is given, if it is [`ErrorKind::Disk`].
pub(super) fn without_fast_commits(error: Error) -> Result<String> {
    if error.kind() == ErrorKind::Disk {
        return Err(error);
    }
    Ok(format!(
        "What programs synced last cannot be replayed ({error}): files that were written in the last seconds may be missing \
         or old"
    ))
}
