//! What a backup of a VM will be, before anything is made.

use super::base::Base;
use super::error::Error;
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
    /// What becomes of each replica.
    pub replicas: Vec<ExplainedReplica>,
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

/// A replica.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExplainedReplica {
    /// The storage, as it was named.
    pub name: String,
    /// The VM that gets the new state, by name and uuid; or why one is made.
    pub machine: Result<(String, String), String>,
    /// Each disk by its name: when the state is of that it is put on, or why all of it is sent.
    pub disks: Vec<(String, Result<String, String>)>,
    /// How many states are there.
    pub states: usize,
    /// Bytes that what is sent as a whole takes at most.
    pub takes: u64,
    /// Bytes that are free.
    pub free: u64,
}

impl ExplainedReplica {
    /// Says of one that it cannot be reached.
    #[must_use]
    pub fn absent(name: &str, error: &Error) -> Self {
        let (name, machine) = (name.to_owned(), Err(error.to_string()));
        Self { name, machine, disks: Vec::new(), states: 0, takes: 0, free: 0 }
    }
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
