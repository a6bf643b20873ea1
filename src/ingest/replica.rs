//! A destination that is no repository: it takes each disk in order, and becomes visible only when all of it is there.
//!
//! What it is and where is the caller's: this module never hears of XAPI. What it is asked, of one run:
//!
//! ```text
//! base_of  for each disk: what it has of it
//! open ─► ReplicaSink: write ... finish    for each disk, one after the other; again, as a whole, if a difference cannot be had
//! open_archive ─► ReplicaArchive: append ... finish    instead, of a full backup
//! commit   once all of it is there in all destinations that live; or, at any moment before, undo
//! ```
//!
//! A replica that fails is undone, and nothing is asked of it any more; the others go on. A sink that is dropped before its end
//! is to be given up: what came is of no use.

use std::ops::Range;

use uuid::Uuid;

use super::error::Result;
use crate::probe::{Kind, Subject};
use crate::repository::BackupTime;

/// A destination that is no repository.
///
/// Whatever waits in it, for a network or a pool, is to end soon, with any error, once the run is cancelled: who cancels the
/// run cancels that, too.
pub trait Replica: Send + Sync {
    /// Returns its name as it was given; holds no secret.
    fn name(&self) -> &str;

    /// Returns what it is kept in, for who asks where the time goes.
    fn subject(&self) -> Subject {
        Subject::new(Kind::Sr, self.name())
    }

    /// Returns what it has of a disk, which has `size` bytes now, so that a difference from it can be put on that; or why
    /// nothing can be. Asked once before anything is written, and perhaps before that.
    ///
    /// # Errors
    /// If that cannot be found out; then the replica has failed.
    fn base_of(&self, vdi: Uuid, size: u64) -> Result<std::result::Result<ReplicaBase, String>>;

    /// Begins a disk. What was begun of the same disk before is of no use.
    ///
    /// # Errors
    /// Any; then the replica has failed.
    fn open(&self, disk: &ReplicaDisk) -> Result<Box<dyn ReplicaSink>>;

    /// Begins a full backup, an XVA: of that many bytes, if it is known.
    ///
    /// # Errors
    /// Any; then the replica has failed.
    fn open_archive(&self, size: Option<u64>) -> Result<Box<dyn ReplicaArchive>>;

    /// Makes what came the newest state; returns what it is called. All of it was finished.
    ///
    /// # Errors
    /// Any; then it is undone, as far as it can be.
    fn commit(&self, time: BackupTime) -> Result<String>;

    /// Removes whatever was begun; the state before stays. Nothing is open any more. After a commit that failed it
    /// is the replica's to find out what of it is to stay.
    ///
    /// # Errors
    /// What could not be removed.
    fn undo(&self) -> Result<()>;
}

/// The newest state of a disk in a replica.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ReplicaBase {
    /// The snapshot that it is of.
    pub snapshot: Uuid,
    /// How many bytes the disk had then, at most: what it has behind them is sent, whatever is said of it.
    pub size: u64,
}

/// A disk that is about to come.
#[derive(Debug, Clone)]
pub struct ReplicaDisk<'a> {
    /// As the guest sees it, or as the pool calls it.
    pub name: &'a str,
    /// The disk, the same in all backups of it.
    pub vdi: Uuid,
    /// The snapshot that it is of.
    pub snapshot: Uuid,
    /// In bytes.
    pub size: u64,
    /// The snapshot that what comes differs from, which is the one that the replica has. `None` if all of the disk comes: what is
    /// not among the blocks is zero.
    pub base: Option<Uuid>,
    /// The numbers of the blocks of 2 MiB that will come, in this order, ascending.
    pub blocks: &'a [u32],
}

/// Takes the blocks of a disk.
pub trait ReplicaSink: Send {
    /// Takes the next block.
    ///
    /// # Errors
    /// Any; then the replica has failed.
    fn write(&mut self, block: &ReplicaBlock) -> Result<()>;

    /// Ends the disk: all of its blocks came, and the source has proven that they are what it held. Returns where it lies, in words.
    ///
    /// # Errors
    /// Any; then the replica has failed.
    fn finish(self: Box<Self>) -> Result<String>;
}

/// A block of a disk.
#[derive(Debug, Clone, Copy)]
pub struct ReplicaBlock<'a> {
    /// Its number.
    pub index: u32,
    /// Its bytes: 2 MiB, or fewer where the disk ends.
    pub data: &'a [u8],
    /// Which of them count, ascending, in pieces of 64 KiB that begin at multiples of that: the others are as in the base, whatever
    /// `data` has there. All of it, if there is no base.
    pub changed: &'a [Range<usize>],
}

/// Takes the bytes of an XVA.
pub trait ReplicaArchive: Send {
    /// Takes the next bytes. The last ones come only after the source has proven that they are the end: what is made of all others
    /// is not whole.
    ///
    /// # Errors
    /// Any; then the replica has failed.
    fn append(&mut self, bytes: &[u8]) -> Result<()>;

    /// Ends it; returns where it lies, in words.
    ///
    /// # Errors
    /// Any; then the replica has failed.
    fn finish(self: Box<Self>) -> Result<String>;
}
