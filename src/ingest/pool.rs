//! What a pool gives: disks of a snapshot, at any offset or as a stream of blocks, and whole VMs as an XVA.
//!
//! How it is asked for is the caller's: this module never hears of XAPI. Each is read once, for all destinations.
//!
//! | access | what was not said to differ | end |
//! |--------|-----------------------------|-----|
//! | random, with changes | is as in the base | none: each read succeeds or fails |
//! | random, without | is read | the same |
//! | sequential since a base | is as in the base | proven by [`Blocks::finish`] |
//! | sequential | is zero | proven by [`Blocks::finish`] |
//!
//! What is told of a base is believed only if each destination that lives has that very snapshot as the newest backup of the
//! disk, or a later one of those whose order is known ([`PoolDisk::history`]). An error of the kind [`ErrorKind::Difference`](super::ErrorKind::Difference) says that it cannot be had this way: then the disk is opened without a base,
//! in the same run. After one of the kind [`ErrorKind::Broken`](super::ErrorKind::Broken) it is opened again as before, as often as is wanted.

use std::io::Read;
use std::sync::Arc;

use disk::Disk;
use uuid::Uuid;

use super::changes::PieceSet;
use super::error::Result;
use crate::probe::{Subject, Way};

/// The right to transfer something, until it is dropped.
pub type Turn = Box<dyn Send>;

/// A disk of a snapshot.
pub trait PoolDisk: Send + Sync {
    /// Returns its size in bytes, always the same.
    fn size(&self) -> u64;

    /// Returns what it is read from, as people call it.
    fn source(&self) -> Subject;

    /// Returns snapshots of the same disk of which it is certain in what order they were taken, oldest first: what changed since one of
    /// them includes what changed since a later one.
    fn history(&self) -> &[Uuid] {
        &[]
    }

    /// Waits until it may be transferred, where there are limits; `say` is told if that is long. Called once, before it is opened;
    /// what is returned is held until all of it is in all destinations.
    ///
    /// # Errors
    /// As for [`PoolDisk::open`].
    fn turn(&self, say: &dyn Fn(&str)) -> Result<Turn> {
        let _ = say;
        Ok(Box::new(()))
    }

    /// Begins to read it: what may differ from `base`, a snapshot of it, or the whole. Called when its turn comes, again if that
    /// breaks off, and without a base if the first way ends with [`ErrorKind::Difference`](super::ErrorKind::Difference).
    ///
    /// # Errors
    /// [`ErrorKind::Difference`](super::ErrorKind::Difference) if it can be read without a base only; else
    /// [`ErrorKind::Source`](super::ErrorKind::Source): then there is no backup.
    fn open(&self, base: Option<Uuid>) -> Result<Opened>;
}

/// A disk that can be read.
pub struct Opened {
    /// How, and why so, in words for the report.
    pub way: String,
    /// The same for who asks what would be faster.
    pub by: Way,
    /// The bytes.
    pub access: Access,
}

/// How the bytes of a disk come.
pub enum Access {
    /// At any offset, by several threads at once.
    Random {
        /// As large as [`PoolDisk::size`] says.
        disk: Arc<dyn Disk>,
        /// What may differ from the base that it was opened with; of the rest nothing is read.
        changed: Option<PieceSet>,
    },
    /// Once, in ascending order.
    Sequential {
        /// The blocks of 2 MiB.
        blocks: Box<dyn Blocks>,
        /// The base that they differ from: the one that it was opened with, or none.
        since: Option<Uuid>,
    },
}

/// Blocks of a disk, of 2 MiB, in ascending order.
pub trait Blocks: Send {
    /// Returns the numbers of those that will come, ascending.
    fn listed(&self) -> &[u32];

    /// Fills `buffer`, of 2 MiB, with the next block and returns its number; `None` after the last one. What lies past the end
    /// of the disk is ignored.
    ///
    /// # Errors
    /// [`ErrorKind::Broken`](super::ErrorKind::Broken).
    fn read(&mut self, buffer: &mut [u8]) -> Result<Option<u32>>;

    /// Proves, after the last block, that all came as it was meant: the disk is stored only then.
    ///
    /// # Errors
    /// [`ErrorKind::Broken`](super::ErrorKind::Broken).
    fn finish(self: Box<Self>) -> Result<()>;
}

/// A VM that can be exported as an XVA.
pub trait PoolVm: Send + Sync {
    /// Returns how many bytes the XVA will have, about, for the room that it takes; as far as it is known, at most.
    fn expected_size(&self) -> u64;

    /// Does the same as [`PoolDisk::turn`].
    ///
    /// # Errors
    /// As for [`PoolVm::open`].
    fn turn(&self, say: &dyn Fn(&str)) -> Result<Turn> {
        let _ = say;
        Ok(Box::new(()))
    }

    /// Begins the export.
    ///
    /// # Errors
    /// [`ErrorKind::Source`](super::ErrorKind::Source).
    fn open(&self) -> Result<Box<dyn Export>>;
}

/// The bytes of an XVA that is exported; the end of what can be read is where it seems to end.
pub trait Export: Read + Send {
    /// Proves, at that end, that it is whole as far as the pool knows: the XVA is stored only then.
    ///
    /// # Errors
    /// [`ErrorKind::Source`](super::ErrorKind::Source).
    fn finish(self: Box<Self>) -> Result<()>;
}

/// What the newest backup of a disk is in each destination, before anything is stored.
#[derive(Debug, Clone)]
pub struct Bases {
    /// The disk.
    pub vdi: Uuid,
    /// By the name of each destination that lives: the snapshot that its newest backup is of, or why nothing can be built on it.
    pub destinations: Vec<(String, std::result::Result<Uuid, String>)>,
}

impl Bases {
    /// Returns the snapshot that the disk may be read relative to, if its snapshots of [`PoolDisk::history`] are these.
    #[must_use]
    pub fn agreed(&self, history: &[Uuid]) -> Option<Uuid> {
        agreed(self.destinations.iter().map(|(_, base)| base.as_ref().ok().copied()), history)
    }
}

/// Returns the snapshot that all have, or else the oldest of those that they have, if the order of these is known: what did not change
/// since that is in none of the others different.
pub(super) fn agreed(bases: impl Iterator<Item = Option<Uuid>>, history: &[Uuid]) -> Option<Uuid> {
    let bases: Vec<Uuid> = bases.collect::<Option<_>>()?;
    let first = bases.first()?;
    if bases.iter().all(|base| base == first) {
        return Some(*first);
    }
    let place = |base: &Uuid| history.iter().position(|known| known == base);
    let places: Vec<usize> = bases.iter().map(place).collect::<Option<_>>()?;
    history.get(places.into_iter().min()?).copied()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_different_snapshots_the_oldest_counts_if_their_order_is_known() {
        let [old, new, other] = [1, 2, 3].map(Uuid::from_u128);
        for (bases, history, expected) in [
            (vec![Some(new), Some(new)], vec![], Some(new)),
            (vec![Some(new), Some(old)], vec![], None),
            (vec![Some(new), Some(old)], vec![old, new], Some(old)),
            (vec![Some(new), Some(new)], vec![old, new], Some(new)),
            (vec![Some(new), Some(other)], vec![old, new], None),
            (vec![Some(new), None], vec![old, new], None),
            (vec![], vec![old, new], None),
        ] {
            assert_eq!(agreed(bases.iter().copied(), &history), expected, "{bases:?} {history:?}");
        }
    }
}
