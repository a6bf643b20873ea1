//! What a backup of a VM will be, before anything is made.

use super::base::Base;
use super::way::Way;

/// What is known beforehand.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Explanation {
    /// The name of the VM.
    pub name: String,
    /// Its uuid.
    pub uuid: String,
    /// Each disk, in the order of their places.
    pub disks: Vec<ExplainedDisk>,
    /// What the snapshot takes on each storage where that is more than next to nothing.
    pub room: Vec<Room>,
    /// What keeps the disks from taking a snapshot now.
    pub chain_problem: Option<String>,
    /// What else a person should know.
    pub remarks: Vec<String>,
}

/// A disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExplainedDisk {
    /// As the guest sees it.
    pub name: String,
    /// Its name in the pool.
    pub label: String,
    /// In bytes.
    pub size: u64,
    /// What is made of it.
    pub fate: Fate,
}

/// What is made of a disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Fate {
    /// Nothing: its name says so.
    LeftOut,
    /// A part of a full backup.
    Full,
    /// It is read relative to a base, or why not; and by which way first.
    Read(Base, Vec<Way>),
}

/// The room of a snapshot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Room {
    /// The name of the storage.
    pub storage: String,
    /// Bytes that it takes at most.
    pub takes: u64,
    /// Bytes that are free.
    pub free: u64,
}
