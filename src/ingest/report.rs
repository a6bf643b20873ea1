//! What an ingest did.

use std::time::Duration;

use storage::Checksum;
use uuid::Uuid;

use super::error::Result;
use super::run::Attempt;
use super::wanted::Wanted;
use crate::probe::Reading;
use crate::repository::{BackupTime, VmId};

/// What was done.
pub struct Report {
    /// The VM.
    pub vm: VmId,
    /// The time of the backup.
    pub time: BackupTime,
    /// Where the time went, since the watch was made.
    pub transfer: Reading,
    /// How each disk was read, in their order; none of a full backup.
    pub disks: Vec<ReadDisk>,
    /// What became of each destination, in their order.
    pub outcomes: Vec<Outcome>,
    /// How long it took.
    pub elapsed: Duration,
}

/// How a disk was read, once for all destinations.
#[derive(Debug, Clone)]
pub struct ReadDisk {
    /// As the guest sees it.
    pub name: String,
    /// How often it was begun with: one that was given up is followed by another.
    pub passes: Vec<Pass>,
}

/// One pass over a disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pass {
    /// How it was read, in words; empty if it could not be begun with.
    pub way: String,
    /// The snapshot that it was read relative to, which all destinations had.
    pub base: Option<Uuid>,
    /// Bytes that were read of the source.
    pub bytes: u64,
    /// Bytes of changed blocks that were the same in the base, and were taken from there.
    pub base_bytes: u64,
    /// Why it was given up.
    pub given_up: Option<String>,
}

/// What became of a destination.
pub struct Outcome {
    /// As it was named.
    pub name: String,
    /// The backup, or why there is none.
    pub stored: Result<Stored>,
}

impl Outcome {
    /// Says what became of a destination, whose metadata file is `metadata`.
    pub(super) fn of(attempt: Attempt, wanted: &Wanted, job: &str, metadata: &str) -> Self {
        let stored = attempt.state.and_then(|target| target.stored(wanted, job, metadata));
        Self { name: attempt.name, stored }
    }
}

/// Where a backup is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Place {
    /// In a repository: its metadata file.
    Repository(String),
    /// In a replica: what that calls it.
    Replica(String),
}

/// A backup that was stored.
#[derive(Debug, Clone)]
pub struct Stored {
    /// Where it is.
    pub place: Place,
    /// Its job.
    pub job: String,
    /// Its schedule.
    pub schedule: String,
    /// Its disks; none of a full one.
    pub disks: Vec<StoredDisk>,
    /// Its XVA, if it is a full one.
    pub xva: Option<StoredXva>,
}

/// A disk that was stored.
#[derive(Debug, Clone)]
pub struct StoredDisk {
    /// As the guest sees it.
    pub name: String,
    /// The disk that was backed up.
    pub vdi: Uuid,
    /// Where it lies, relative to the folder of the VM, or as a replica says it.
    pub path: String,
    /// In words: `vhd`, `exploded, brotli`, `replica`.
    pub format: &'static str,
    /// Whether it is complete by itself.
    pub is_key: bool,
    /// Why it is, though that was not asked for.
    pub why_full: Option<String>,
    /// In bytes.
    pub virtual_size: u64,
    /// Blocks that were stored, or sent.
    pub blocks: u32,
    /// Bytes that were stored; of a replica, that were sent.
    pub stored_bytes: u64,
    /// Blocks that were compared with the backup before by the digest of what it has there.
    pub compared_by_digest: u64,
    /// Those that had to be read there, and were compared by their bytes.
    pub compared_by_bytes: u64,
}

/// An XVA that was stored.
#[derive(Debug, Clone)]
pub struct StoredXva {
    /// Where it lies, relative to the folder of the VM, or as a replica says it.
    pub path: String,
    /// In bytes, before it was encrypted.
    pub bytes: u64,
    /// Of these, as Xen Orchestra writes it.
    pub checksum: Checksum,
}
