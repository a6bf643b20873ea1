//! The log: what was committed and not yet written in its place, replayed into what the disk would be after that.
//!
//! ```text
//! ring ─► records ─► transactions ─► items ─┬─ buffers  of 128-byte pieces ─┐
//!  head    from the   whole ones,           ├─ inodes                       ├─► changes: sectors
//!          tail on    as committed          ├─ new inodes                  ─┘
//!                                           └─ intents: inodes that are not as they were to be
//! ```
//!
//! It is replayed as Linux does: once to learn which buffers are cancelled, once to change what is not. In version 5 what is
//! newer than a transaction is left as it is, and checksums are made anew; before that there was neither.
//! Numbers in items are as the machine had them, which is little-endian here.

mod buffer;
mod changes;
mod inode;
mod intent;
mod owner;
mod record;
mod ring;
#[cfg(test)]
mod tests;
mod transaction;

use std::collections::BTreeSet;
use std::sync::Arc;

use disk::Disk;
use fs_xfs::Superblock;

use crate::{Error, ErrorKind, Result};
use buffer::{Action, Buffer, Cancelled};
use changes::Changes;
use intent::Intents;
use record::Records;
use ring::Ring;
use transaction::Item;

// Kinds of items.
const INODE: u16 = 0x123b;
const BUFFER: u16 = 0x123c;
const NEW_INODES: u16 = 0x123f;

/// Whether a kind of item is known. Those that are not named above are intents, or change nothing that a reader shows.
fn is_known(kind: u16) -> bool {
    matches!(kind, 0x1236..=0x1238 | INODE..=0x124f)
}

/// The only feature of a log that is known: attributes have intents.
const KNOWN_FEATURES: u32 = 1;

/// What a log changes.
#[derive(Debug, Default)]
pub(super) struct Replay {
    pub(super) is_replayed: bool,
    /// What could not be done, a sentence each.
    pub(super) problems: Vec<String>,
    /// Bytes and where they lie.
    pub(super) changes: Vec<(u64, Vec<u8>)>,
    /// Inodes of which a change is half done.
    pub(super) unfinished: BTreeSet<u64>,
}

/// Replays the log of a volume.
///
/// # Errors
/// [`ErrorKind::Disk`]. All else that fails is among the problems.
pub(super) fn replay(disk: &Arc<dyn Disk>, superblock: &Superblock) -> Result<Replay> {
    let failed = |reason: &str| Replay {
        problems: vec![format!(
            "the log could not be replayed ({reason}): what changed in the last seconds before the backup may be missing \
             or damaged"
        )],
        ..Replay::default()
    };
    match replay_records(disk.as_ref(), superblock) {
        Err(error) if error.kind() == ErrorKind::Disk => Err(error),
        Err(error) => Ok(failed(&error.to_string())),
        Ok(replay) => Ok(replay),
    }
}

fn replay_records(disk: &dyn Disk, superblock: &Superblock) -> Result<Replay> {
    let ring = Ring::new(disk, superblock)?;
    let Some(records) = Records::read(&ring, superblock)? else { return Ok(Replay::default()) };
    let features = superblock.features_log_incompat & !KNOWN_FEATURES;
    if superblock.is_v5() && features != 0 {
        return Err(Error::unsupported(format!("it has features that are not known, {features:#x}")));
    }
    let (mut cancelled, mut intents) = (Cancelled::default(), Intents::default());
    transaction::each(&records, |_, items| {
        for item in items {
            if !is_known(item.kind) {
                return Err(Error::unsupported(format!("it has an item of kind {:#x}, which is not known", item.kind)));
            }
            if item.kind == BUFFER {
                let buffer = Buffer::parse(&item)?;
                if buffer.action == Action::Cancel {
                    cancelled.add(&buffer)?;
                }
            }
            intents.note(&item)?;
        }
        Ok(())
    })?;
    let mut replay = Replay { unfinished: intents.unfinished(), ..Replay::default() };
    if !replay.unfinished.is_empty() {
        let inodes: Vec<_> = replay.unfinished.iter().take(10).map(u64::to_string).collect();
        replay.problems.push(format!(
            "changes of {} inodes were half done when the guest stopped, and are not finished: what these hold is not shown \
             ({}{})",
            replay.unfinished.len(),
            inodes.join(", "),
            if replay.unfinished.len() > inodes.len() { ", ..." } else { "" }
        ));
    }
    let uuid = superblock.is_v5().then_some(&superblock.meta_uuid);
    let mut changes = Changes::new(disk, &ring.place());
    transaction::each(&records, |lsn, mut items| {
        replay.is_replayed = true;
        items.sort_by_key(order);
        for item in &items {
            match item.kind {
                BUFFER => {
                    let buffer = Buffer::parse(item)?;
                    match buffer.action {
                        Action::Cancel => cancelled.remove(&buffer),
                        Action::Change if !cancelled.has(&buffer) => buffer.apply(&mut changes, lsn, uuid)?,
                        Action::Change | Action::Nothing => {}
                    }
                }
                INODE => inode::apply(item, &mut changes, &cancelled, superblock, lsn)?,
                NEW_INODES => inode::create(item, &mut changes, &cancelled, superblock)?,
                _ => {}
            }
        }
        Ok(())
    })?;
    replay.changes = changes.finish()?;
    Ok(replay)
}

/// When in its transaction an item is done: inodes after the buffers that they are made in, what is freed last.
fn order(item: &Item<'_>) -> u8 {
    match item.kind {
        BUFFER if Buffer::parse(item).is_ok_and(|buffer| buffer.action == Action::Cancel) => 2,
        BUFFER | NEW_INODES => 0,
        _ => 1,
    }
}
