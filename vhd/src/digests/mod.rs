//! What the blocks of a layer hold, known without reading them: a file beside the blocks, the *sidecar*, that Xen Orchestra
//! does not look at, with the digest of each block and how its file stood when that was made.
//!
//! ```text
//! exploded VHD  <folder>/.xofs-digests             goes with the folder
//! VHD file      .<file name>.xofs-digests beside   left behind where Xen Orchestra removes or renames the file
//! ```
//!
//! A digest that is taken for valid and is not loses data: an ingest leaves out a block that changed. Nobody but us keeps
//! sidecars up to date, so each record proves itself. It is valid if all of this is so:
//!
//! 1. The sidecar is whole, by its checksum, and says the uuid that the layer's footer has *now*.
//! 2. The file that holds the block (its own; a VHD file) has the size, the time of its last write and, where not copies of
//!    the repository are meant, the inode that the record says; in a VHD file the table names the place that it says.
//! 3. That time has a part below the second: a coarse clock tells nothing of what happens within a second.
//! 4. That time is before the sidecar's own, both by the file system's clock: what is written to the file after the sidecar
//!    was made gets another time. Who makes a sidecar waits for the clock to tick ([`publish`]).
//!
//! Before the sidecar is made, who makes a record sees to it that the digest is of the bytes in the file: an ingest has just
//! written the file, which nobody else knows of, and writes it once; a check looks at the file before and after it read, and
//! only if the last write was long before; a merge takes over records that are valid. So each way to be stale is caught:
//!
//! | what happens | what tells |
//! |---|---|
//! | a merge by XO gives a layer other blocks, and the child's uuid | 1 once it is done; while it is under way, no digest of the chain is used, and 2 |
//! | the same, and an ingest of ours that goes on from there | 1: the sidecar in the folder is that of the layer that was |
//! | the file of another block takes the place of one, of the same size and time | 2: the inode |
//! | a block is written again in place, within the same tick of the clock | 4 |
//! | the same on a file system that counts whole seconds | 3 |
//! | a restore by `rsync -a` over what had changed since | 2: it gives each file the bytes that go with its size and time; the inode besides |
//! | a VHD file is merged into, widened or sealed | 2, whoever did it |
//! | a VHD file gets the name of another | 1 and 2 |
//! | a sidecar outlives a power cut, and what it is about does not | it is published once that is durable |
//!
//! What is left: who gives a file other bytes and has its size, its inode and its time to the nanosecond stay, on purpose.
//! And a block that decayed on the disk is still known by its digest, which is how `xofs check --data` finds it.
//!
//! A sidecar that is missing, damaged or not ours is no error: nothing is known then.

mod format;
mod of_chain;

use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::{Duration, SystemTime};

use storage::{Existing, ObjectPath, Stat, Storage, UNPUBLISHED, WritableStorage, publish_rename};
use uuid::Uuid;

pub use of_chain::{ChainDigests, Unread};

pub(crate) use format::{MAX_RECORDS, Record, Sidecar};

use crate::digest::Digest;
use crate::error::{Error, ErrorKind, Result};
use crate::geometry::{BlockIndex, FileSector};
use crate::layer::{Body, Layer};

/// What the names of sidecars end with.
pub const DIGESTS: &str = ".xofs-digests";

/// How long the clock of a file system is waited for, at most, and how long between two looks at it. Those that count parts of
/// seconds tick every 16 ms or faster.
const TICK: Duration = Duration::from_millis(100);
const PAUSE: Duration = Duration::from_millis(5);

/// Returns the name of the sidecar of a VHD file, in the same folder.
#[must_use]
pub fn digests_name(file: &str) -> String {
    format!(".{file}{DIGESTS}")
}

/// Returns where the sidecar of a layer is; `None` if it can have none: a fixed disk, which has no blocks, and a VHD file
/// behind an alias, beside which XO's cleaner tolerates nothing.
pub(crate) fn path_of(layer: &Layer) -> Option<ObjectPath> {
    let path = match &layer.body {
        Body::Exploded(_) => layer.data.join(DIGESTS),
        Body::Flat(_) if layer.header.is_some() && layer.name == layer.data => path_of_file(&layer.data),
        Body::Flat(_) => return None,
    };
    path.ok()
}

/// Returns where the sidecar of a VHD file is.
pub(crate) fn path_of_file(file: &ObjectPath) -> storage::Result<ObjectPath> {
    file.parent().join(&digests_name(file.file_name()))
}

/// Returns the time of a last write in nanoseconds since 1970; `None` if the clock is too coarse to tell two writes apart.
pub(crate) fn exact_time(time: SystemTime) -> Option<u64> {
    let since = time.duration_since(SystemTime::UNIX_EPOCH).ok().filter(|since| since.subsec_nanos() != 0)?;
    u64::try_from(since.as_nanos()).ok()
}

/// The valid digests of one layer, as far as its sidecar alone can tell.
#[derive(Debug, Default)]
pub(crate) struct Digests {
    file_size: Option<u64>,
    records: Vec<Record>,
}

/// A digest that is valid.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Known {
    pub(crate) digest: Digest,
    /// Whether the file is the very one that the record was made of, not one with the same size and time.
    pub(crate) is_same_file: bool,
}

impl Digests {
    /// Reads the sidecar of a layer; none are known if it has none, or that of a layer that was in its place before.
    ///
    /// # Errors
    /// [`ErrorKind::Damaged`] or [`ErrorKind::Unsupported`] if it cannot be understood; else what the storage says.
    pub(crate) fn load(storage: &dyn Storage, layer: &Layer) -> Result<Self> {
        Self::load_of(storage, layer, &[layer.footer.uuid])
    }

    /// The same of a layer that may have one of several uuids.
    pub(crate) fn load_of(storage: &dyn Storage, layer: &Layer, uuids: &[Uuid]) -> Result<Self> {
        let Some(path) = path_of(layer) else { return Ok(Self::default()) };
        let object = match storage.open(&path) {
            Err(error) if error.kind() == storage::ErrorKind::NotFound => return Ok(Self::default()),
            opened => opened?,
        };
        let stat = object.stat()?;
        let len = usize::try_from(stat.size).ok().filter(|len| *len <= format::MAX_SIDECAR).ok_or_else(|| {
            let reason = format!("digests of at most {} bytes were expected, not {}", format::MAX_SIDECAR, stat.size);
            Error::new(ErrorKind::Damaged, &path, reason)
        })?;
        let mut bytes = vec![0; len];
        let found = object.read_at(0, &mut bytes)?;
        let sidecar = Sidecar::parse(&bytes[..found]).map_err(|error| error.at(&path))?;
        let is_file = matches!(layer.body, Body::Flat(_));
        if !uuids.contains(&sidecar.uuid)
            || sidecar.block_size != layer.block_size
            || sidecar.file_size.is_some() != is_file
        {
            return Ok(Self::default());
        }
        let made = stat.modified.duration_since(SystemTime::UNIX_EPOCH).map_or(0, |since| since.as_nanos());
        let mut records = sidecar.records;
        records.retain(|record| record.modified % 1_000_000_000 != 0 && u128::from(record.modified) < made);
        Ok(Self { file_size: sidecar.file_size, records })
    }

    /// Returns the digest of a block at `sector` (of a VHD file), if its file stands as `file` says.
    pub(crate) fn get(&self, block: BlockIndex, sector: FileSector, file: &Stat) -> Option<Known> {
        let at = self.records.binary_search_by_key(&block, |record| record.block).ok()?;
        let record = &self.records[at];
        let is_in_place = match self.file_size {
            Some(size) => size == file.size && record.size_or_sector == sector.0,
            None => u64::from(record.size_or_sector) == file.size,
        };
        let is_valid = is_in_place && exact_time(file.modified) == Some(record.modified);
        is_valid.then_some(Known { digest: record.digest, is_same_file: record.inode == file.inode })
    }

    /// Whether there is a digest of a block, valid or not.
    fn has(&self, block: BlockIndex) -> bool {
        self.records.binary_search_by_key(&block, |record| record.block).is_ok()
    }

    /// Returns the records.
    pub(crate) fn records(&self) -> &[Record] {
        &self.records
    }

    /// Keeps only the records of some blocks.
    fn retain(&mut self, is_kept: impl Fn(BlockIndex) -> bool) {
        self.records.retain(|record| is_kept(record.block));
        self.records.shrink_to_fit();
    }
}

/// Makes a sidecar appear, or take the place of another, later by the file system's clock than what it is about.
///
/// Nothing depends on it but speed: if it cannot be written, that is logged, and what it would go with goes on without.
pub(crate) fn publish(storage: &dyn WritableStorage, path: &ObjectPath, sidecar: &Sidecar) {
    if sidecar.records.is_empty() {
        return;
    }
    if let Err(error) = try_publish(storage, path, sidecar) {
        tracing::warn!(%error, "digests of blocks were not stored: they will be read to be compared");
    }
}

/// The same, with what went wrong.
///
/// # Errors
/// What the storage says.
pub(crate) fn try_publish(storage: &dyn WritableStorage, path: &ObjectPath, sidecar: &Sidecar) -> Result<()> {
    let unpublished = path.parent().join(&format!(".{}{UNPUBLISHED}", path.file_name()))?;
    let newest = sidecar.records.iter().map(|record| record.modified).max().unwrap_or(0);
    let write = || -> storage::Result<()> {
        let mut stat = storage.write_and_stat(&unpublished, &sidecar.to_bytes(), Existing::Replace)?;
        let mut waited = Duration::ZERO;
        while exact_time(stat.modified).is_some_and(|time| time <= newest) && waited < TICK {
            thread::sleep(PAUSE);
            waited += PAUSE;
            storage.touch(&unpublished)?;
            stat = storage.stat(&unpublished)?;
        }
        storage.sync(&unpublished)
    };
    if let Err(error) = write() {
        // A part of it is of no use to anybody; that it cannot be removed either is not what went wrong.
        let _ = storage.remove(&unpublished);
        return Err(error.into());
    }
    Ok(publish_rename(storage, &unpublished, path)?)
}

/// Records that are made by several threads.
#[derive(Default)]
pub(crate) struct Collector(Mutex<Vec<Record>>);

impl Collector {
    /// Adds what is known of a block; nothing if there is room for no more.
    pub(crate) fn add(&self, record: Record) {
        let mut records = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if records.len() < MAX_RECORDS {
            records.push(record);
        }
    }

    /// Takes the records out, in their order.
    pub(crate) fn take(&self) -> Vec<Record> {
        let mut records = std::mem::take(&mut *self.0.lock().unwrap_or_else(PoisonError::into_inner));
        records.sort_unstable_by_key(|record| record.block);
        records
    }
}

/// Makes the record of a block with a file of its own; `None` if how that stands proves nothing.
pub(crate) fn record_of_block(block: BlockIndex, file: &Stat, digest: Digest) -> Option<Record> {
    let size_or_sector = u32::try_from(file.size).ok()?;
    Some(Record { block, size_or_sector, modified: exact_time(file.modified)?, inode: file.inode, digest })
}

/// Makes the record of a block of a VHD file; `None` as for [`record_of_block`].
pub(crate) fn record_in_file(block: BlockIndex, sector: FileSector, file: &Stat, digest: Digest) -> Option<Record> {
    let modified = exact_time(file.modified)?;
    Some(Record { block, size_or_sector: sector.0, modified, inode: file.inode, digest })
}
