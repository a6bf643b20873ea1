//! What is written to, of whichever kind: what both kinds do at the same point of an ingest.

use storage::Checksum;
use uuid::Uuid;

use super::error::{Error, Result};
use super::full;
use super::replica_target::ReplicaTarget;
use super::report::Stored;
use super::repository_target::RepositoryTarget;
use super::wanted::{Destination, Wanted};
use super::watch::Watch;
use crate::probe::Subject;
use crate::repository::VmId;

/// A destination that is written to.
pub(super) enum Target<'a> {
    Repository(Box<RepositoryTarget<'a>>),
    Replica(Box<ReplicaTarget<'a>>),
}

impl<'a> Target<'a> {
    /// Begins with a destination; nothing is written yet.
    pub fn begin(destination: &'a Destination, vm: &VmId, job: &str, wanted: &Wanted, watch: &Watch) -> Result<Self> {
        Ok(match destination {
            Destination::Repository(destination) => {
                Self::Repository(Box::new(RepositoryTarget::begin(destination, vm, job, wanted, watch)?))
            }
            Destination::Replica(replica) => {
                Self::Replica(Box::new(ReplicaTarget::new(replica.as_ref(), watch.transfer())))
            }
        })
    }

    /// Returns what it is, for who asks where the time goes.
    pub fn subject(&self) -> Subject {
        match self {
            Self::Repository(target) => target.subject(),
            Self::Replica(target) => target.subject(),
        }
    }

    /// Returns it if it is a repository.
    pub fn repository(&self) -> Option<&RepositoryTarget<'a>> {
        match self {
            Self::Repository(target) => Some(target),
            Self::Replica(_) => None,
        }
    }

    /// Returns what a new backup of a disk of `size` bytes can be built upon: the uuid of a snapshot, or why there is none.
    pub fn base_of(
        &self,
        wanted: &Wanted,
        job: &str,
        vdi: Uuid,
        size: u64,
    ) -> Result<std::result::Result<Uuid, String>> {
        match self {
            Self::Repository(target) => target.base_of(wanted, job, vdi, size),
            Self::Replica(target) => Ok(target.base_of(wanted, vdi, size)?.map(|base| base.snapshot)),
        }
    }

    /// Returns the snapshot that a disk is to be built upon, and its size in bytes.
    pub fn base(&self, disk: usize) -> Option<(Uuid, u64)> {
        match self {
            Self::Repository(target) => target.base(disk),
            Self::Replica(target) => target.base(disk),
        }
    }

    /// Takes back what was written of a disk that comes once more.
    pub fn restart(&mut self, disk: usize) -> Result<()> {
        match self {
            Self::Repository(target) => target.restart(disk),
            Self::Replica(target) => target.restart(),
        }
    }

    /// Ends a disk of `size` bytes.
    pub fn finish(&mut self, disk: usize, size: u64) -> Result<()> {
        match self {
            Self::Repository(target) => target.finish(disk, size),
            Self::Replica(target) => target.finish(disk),
        }
    }

    /// Begins to write an XVA, of that many bytes if it is known.
    pub fn create_xva(&mut self, size: Option<u64>) -> Result<()> {
        match self {
            Self::Repository(target) => target.create_xva(),
            Self::Replica(target) => target.create_xva(size),
        }
    }

    /// Returns what takes the bytes of the XVA that was begun.
    pub fn archive_lane(&mut self) -> Option<full::Lane<'_>> {
        match self {
            Self::Repository(target) => target.archive_lane(),
            Self::Replica(target) => target.archive_lane(),
        }
    }

    /// Ends the XVA.
    pub fn finish_xva(&mut self, checksum: Checksum, size: u64) -> Result<()> {
        match self {
            Self::Repository(target) => target.finish_xva(checksum, size),
            Self::Replica(target) => target.finish_xva(checksum, size),
        }
    }

    /// Removes what was written; returns `error`, and what could not be removed.
    pub fn undo(&mut self, error: Error) -> Error {
        match self {
            Self::Repository(target) => target.undo(error),
            Self::Replica(target) => target.undo(error),
        }
    }

    /// Says what was stored, of which a repository has the `metadata`.
    pub fn stored(self, wanted: &Wanted, job: &str, metadata: &str) -> Result<Stored> {
        match self {
            Self::Repository(target) => target.stored(wanted, job, metadata),
            Self::Replica(target) => Ok(target.stored(wanted, job)),
        }
    }
}
