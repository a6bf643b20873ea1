//! What programs synced after the last commit, laid over what that left.
//!
//! ```text
//! superblock ─ tree of logs ─┬─ log of subvolume 5 ── items of inodes that were synced
//!                            └─ log of subvolume 257 ...
//! ```
//!
//! ```text
//! replay ─ inodes, and in which order ─┬─ extents  contents
//!                                      └─ links    names, in items of names
//! ```
//!
//! A log has those items of a subvolume that changed, and of directories the ranges of which it knows every name. It is
//! replayed as Linux does when such a filesystem is mounted, on items in memory; a log that has anything that is not
//! understood is left out as a whole, and that is said.
//! Source: "On-disk Format" of the documentation of Btrfs; for the order of things, what Linux makes of such filesystems.

mod extents;
mod inode;
mod links;
mod names;
mod replay;

use std::collections::{BTreeMap, HashMap};
use std::ops::ControlFlow;

use fs_btrfs::chunk::DiskKey;
use fs_btrfs::fs::ROOT_ITEM_KEY;

use super::subvolumes;
use super::view::{Edits, Key};
use super::volume::{Root, Volume};
use crate::{Error, ErrorKind, Result};

/// The object under which the logs are filed, and whose all of their blocks are.
const TREE_LOG: u64 = 6_u64.wrapping_neg();

/// Logs at most; Linux has one for each subvolume in which something was synced.
const MAX_LOGS: usize = 10_000;

/// Bytes of the items of a log at most, which are kept in memory meanwhile.
const MAX_LOG: usize = 64 << 20;

/// What an item takes besides its bytes, about.
const ITEM: usize = 100;

const FIRST: DiskKey = DiskKey { objectid: 0, key_type: 0, offset: 0 };

/// The items of a log.
type Log = BTreeMap<Key, Vec<u8>>;

/// What the logs change.
#[derive(Default)]
pub(super) struct Replayed {
    /// By subvolume.
    pub(super) edits: HashMap<u64, Edits>,
    /// What is not shown, a sentence each.
    pub(super) problems: Vec<String>,
}

/// Replays all logs.
///
/// # Errors
/// [`ErrorKind::Disk`] alone: what is wrong with a log is a problem.
pub(super) fn replay(volume: &Volume) -> Result<Replayed> {
    let mut replayed = Replayed::default();
    if !volume.devices().superblock().has_dirty_log() {
        return Ok(replayed);
    }
    let logs = match logs(volume) {
        Err(error) if error.kind() != ErrorKind::Disk => {
            replayed.problems.push(not_shown("", &error));
            return Ok(replayed);
        }
        logs => logs?,
    };
    for (tree, log) in logs {
        match replay_one(volume, tree, log) {
            Ok(Some(edits)) => drop(replayed.edits.insert(tree, edits)),
            Ok(None) => {}
            Err(error) if error.kind() == ErrorKind::Disk => return Err(error),
            Err(error) => replayed.problems.push(not_shown(&format!(" in subvolume {tree}"), &error)),
        }
    }
    Ok(replayed)
}

fn not_shown(place: &str, error: &Error) -> String {
    format!(
        "files{place} that programs synced in the last seconds before the backup (30 at most, unless the guest set more) are \
         shown as they were before that, since its log cannot be replayed: {error}; mount the volume itself to see them"
    )
}

/// Returns where the log of each subvolume starts.
fn logs(volume: &Volume) -> Result<Vec<(u64, Root)>> {
    let superblock = volume.devices().superblock();
    // Of the commit that was to follow.
    let generation = superblock.generation.saturating_add(1);
    let root = Root { at: superblock.log_root, generation, tree: TREE_LOG };
    let mut found = Vec::new();
    volume.visit_stored(root, FIRST, |key, item| {
        if (key.objectid, key.key_type) != (TREE_LOG, ROOT_ITEM_KEY) {
            return Err(Error::unsupported("there is something else among the logs"));
        }
        if found.len() == MAX_LOGS {
            return Err(Error::new(ErrorKind::TooMuch, format!("there are more than {MAX_LOGS} logs")));
        }
        found.push((key.offset, subvolumes::root_of(item, TREE_LOG)?));
        Ok(ControlFlow::Continue(()))
    })?;
    Ok(found)
}

/// Replays the log of a subvolume; one that is no more has nothing to change.
fn replay_one(volume: &Volume, tree: u64, log: Root) -> Result<Option<Edits>> {
    let Some(root) = subvolumes::root(volume, tree)? else { return Ok(None) };
    let (mut items, mut bytes) = (Log::new(), 0);
    volume.visit_stored(log, FIRST, |key, item| {
        bytes += ITEM + item.len();
        if bytes > MAX_LOG {
            return Err(Error::new(ErrorKind::TooMuch, format!("it has more than {MAX_LOG} bytes")));
        }
        items.insert((*key).into(), item.to_vec());
        Ok(ControlFlow::Continue(()))
    })?;
    replay::replay(volume, root, &items).map(Some)
}
