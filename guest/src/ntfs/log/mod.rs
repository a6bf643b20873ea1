//! The journal (`$LogFile`): what a machine that stopped without unmounting had not written yet, and had not ended.
//!
//! ```text
//! restart ─▶ journal ─▶ tables ─▶ analysis ─▶ passes ─▶ overlay
//!            records    of the    up to the   redo, undo
//!                       checkpoint   end      (record_changes, index_changes)
//! ```
//!
//! A wrong replay is worse than none: where anything is not as it is known to be, nothing at all is applied, and that is said.
//! Each change is checked against what it changes, and so is the result. The content of a file that is kept in its record
//! is not in the journal: where it was not written, there are zeroes, as Windows has it then, too.
//!
//! Besides, it is said whether Windows marked the volume to be checked.
//!
//! Source: "$LogFile" and "$Volume" of the Linux-NTFS documentation; journals that Windows wrote.

mod analysis;
mod bytes;
mod change;
mod index_changes;
mod journal;
mod passes;
mod record_changes;
mod restart;
mod tables;

use std::sync::Arc;

use disk::Disk;

use super::record::{DATA, VOLUME_INFORMATION};
use super::volume::{Node, Volume};
use crate::{Error, Fields, Result};
use journal::Journal;
use passes::Passes;
use restart::{MAX_START, Restart};
use tables::Tables;

const LOG: u64 = 2;
pub(super) const VOLUME: u64 = 3;

const DIRTY: u16 = 1;

/// Returns the disk as Windows would make it, if that is other than it stands.
///
/// # Errors
/// Whatever keeps the journal from being replayed as a whole.
pub(super) fn replay(volume: &Volume) -> Result<Option<Arc<dyn Disk>>> {
    let node: Node = volume.own_node(LOG)?;
    let stream = volume.stream(&node, DATA, &[])?.ok_or_else(|| Error::damaged("the journal is empty"))?;
    let len = usize::try_from(stream.size()?).unwrap_or(usize::MAX).min(MAX_START);
    let mut start = vec![0; len];
    super::content::read(volume, &node, &stream, 0, &mut start)?;
    let Some(restart) = Restart::parse(&start)?.filter(|restart| !restart.is_clean) else { return Ok(None) };
    let journal = Journal::open(volume, &node, &stream, restart.layout()?)?;
    if restart.checkpoint == 0 {
        return Err(Error::unsupported("the journal has no checkpoint yet"));
    }
    let mut tables = Tables::read(&journal, restart.checkpoint, volume.boot.cluster_size)?;
    analysis::analyse(&journal, &mut tables)?;
    Passes::new(&journal, &mut tables, volume).run()
}

/// Returns whether Windows marked the volume to be checked.
pub(super) fn is_marked_dirty(volume: &Volume) -> Result<bool> {
    let node = volume.own_node(VOLUME)?;
    let stream = volume.stream(&node, VOLUME_INFORMATION, &[])?;
    let bytes = stream.map(|stream| stream.read(volume, &node, 4096)).transpose()?.unwrap_or_default();
    let flags = Fields(&bytes).le16(0x0a).ok_or_else(|| Error::damaged("it says nothing of that"))?;
    Ok(flags & DIRTY != 0)
}
