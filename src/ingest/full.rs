//! A full backup of another repository, an XVA, as it is: one pass over its bytes, to all destinations at once.
//!
//! ```text
//! source ─► reader ─► pieces ─► sum ─┬► lane of a destination ─► writer
//!                    (bounded)       └► lane ...      (bounded)
//! ```
//!
//! Whether it is compressed does not matter: what is stored are its bytes. They are those that were written if Xen Orchestra's
//! checksum or the encryption says so, which is known at the end, and as many as the metadata says; a tar that has no end is
//! refused as by Xen Orchestra.
//!
//! The slowest destination that lives sets the pace. Memory: with D destinations at most 3 + [`DEPTH`] × (1 + D) + D pieces of
//! 2 MiB, and one more of each place that is encrypted.
//!
//! Source: XO, `@xen-orchestra/backups/_isValidXva.mjs`, `_runners/_vmRunners/FullRemote.mjs`.

use std::sync::Arc;
use std::thread;

use crossbeam::channel::{self, Receiver, Sender};
use storage::{Capabilities, Checksum, ObjectPath, Storage, Summing, WritableStream};
use xva::Compression;

use super::copy::{Failure, start_one};
use super::error::{Error, ErrorKind, Result};
use super::probe::Probe;
use super::run::Stages;
use super::watch::Watch;

/// Bytes that are read at a time.
const PIECE: usize = 2 << 20;
/// Pieces that wait for the sum, and for the writer of each destination.
const DEPTH: usize = 4;
/// The longest checksum file (bytes); that of a SHA-512 has 132.
const CHECKSUM_LIMIT: u64 = 1 << 10;
/// What a tar ends with: two empty blocks (bytes).
const TAR_END: usize = 1024;
const TAR_BLOCK: u64 = 512;
/// Less is no XVA of any kind (bytes).
const SHORTEST: u64 = 20;

/// The XVA of a backup in another repository.
pub(super) struct Xva {
    storage: Arc<dyn Storage>,
    path: ObjectPath,
    /// In bytes.
    pub size: u64,
    /// What was written beside it; `None` if nothing was, or it is of another algorithm.
    checksum: Option<Checksum>,
}

impl Xva {
    /// Finds one of `expected` bytes, or of any number if that is 0, and sees whether it has a beginning and an end, unless it
    /// is encrypted as a whole: then that is seen when it is read.
    ///
    /// # Errors
    /// [`ErrorKind::Source`] if it cannot be read, or is not whole.
    pub fn open(storage: Arc<dyn Storage>, path: ObjectPath, expected: u64) -> Result<Self> {
        let stream = storage.open_stream(&path).map_err(|error| match error.kind() {
            storage::ErrorKind::TooLarge => {
                Error::new(ErrorKind::Source, format!("{error}; mirror it with Xen Orchestra"))
            }
            _ => of_source(&error),
        })?;
        let size = stream.size();
        let mut xva = Self { storage, path, size, checksum: None };
        if expected != 0 && size != expected {
            return Err(xva.broken(&format!("has {size} bytes, and its metadata says {expected}: it is not whole")));
        }
        if size < SHORTEST {
            return Err(xva.broken(&format!("has {size} bytes: an XVA was expected")));
        }
        if !is_encrypted(xva.storage.capabilities()) {
            xva.check_ends(&xva.read_ends()?)?;
            xva.checksum = xva.stored_checksum()?;
        }
        Ok(xva)
    }

    fn read_ends(&self) -> Result<Ends> {
        let object = self.storage.open(&self.path).map_err(|error| of_source(&error))?;
        let mut ends = Ends::default();
        for (offset, len) in [(0, Compression::TOLD_BY), (self.size.saturating_sub(TAR_END as u64), TAR_END)] {
            let mut bytes = vec![0; len];
            let read = object.read_at(offset, &mut bytes);
            ends.add(&bytes[..read.map_err(|error| self.broken(&format!("cannot be read: {error}")))?]);
        }
        Ok(ends)
    }

    fn check_ends(&self, ends: &Ends) -> Result<()> {
        let is_tar = || self.size > TAR_END as u64 && self.size.is_multiple_of(TAR_BLOCK) && ends.last == [0; TAR_END];
        if Compression::of(&ends.first) == Compression::None && !is_tar() {
            return Err(self.broken("is cut off: it does not end as a tar does"));
        }
        Ok(())
    }

    fn stored_checksum(&self) -> Result<Option<Checksum>> {
        let path = self.path.parent().join(&checksum_name(self.path.file_name()))?;
        match self.storage.read(&path, CHECKSUM_LIMIT) {
            Err(error) if error.kind() == storage::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(of_source(&error)),
            Ok(text) => {
                let checksum = std::str::from_utf8(&text).ok().and_then(Checksum::parse);
                if checksum.is_none() {
                    tracing::warn!(%path, "is no MD5 as Xen Orchestra writes it: the XVA is mirrored without being compared");
                }
                Ok(checksum)
            }
        }
    }

    fn broken(&self, what: &str) -> Error {
        Error::new(ErrorKind::Source, format!("the XVA '{}' {what}", self.path))
    }

    /// Reads it from beginning to end.
    fn read(&self, give: &Sender<Vec<u8>>, is_over: impl Fn() -> bool, probe: &Probe) -> Result<()> {
        let mut stream = self.storage.open_stream(&self.path).map_err(|error| of_source(&error))?;
        let now = stream.size();
        if now != self.size {
            return Err(self.broken(&format!("has {now} bytes, and had {}: somebody writes to it", self.size)));
        }
        let (mut offset, mut ends) = (0, Ends::default());
        while offset < self.size && !is_over() {
            let len = usize::try_from(self.size - offset).unwrap_or(usize::MAX).min(PIECE);
            let mut bytes = vec![0; len];
            let read = probe.work(|| stream.read(&mut bytes));
            let read = read.map_err(|error| self.broken(&format!("cannot be read at byte {offset}: {error}")))?;
            if read < len {
                let end = offset + read as u64;
                let size = self.size;
                return Err(self.broken(&format!("ends at byte {end}, and had {size}: somebody writes to it")));
            }
            ends.add(&bytes);
            probe.add(len);
            drop(probe.give(|| give.send(bytes)));
            offset += len as u64;
        }
        if offset < self.size { Ok(()) } else { self.check_ends(&ends) }
    }
}

/// What tells whether an XVA is whole.
#[derive(Default)]
struct Ends {
    first: Vec<u8>,
    /// As far as a tar needs.
    last: Vec<u8>,
}

impl Ends {
    /// Adds the bytes that come next.
    fn add(&mut self, bytes: &[u8]) {
        let missing = Compression::TOLD_BY.saturating_sub(self.first.len());
        self.first.extend_from_slice(&bytes[..bytes.len().min(missing)]);
        self.last.extend_from_slice(&bytes[bytes.len().saturating_sub(TAR_END)..]);
        self.last.drain(..self.last.len().saturating_sub(TAR_END));
    }
}

fn of_source(error: &storage::Error) -> Error {
    Error::new(ErrorKind::Source, error.to_string())
}

/// Whether objects are encrypted as a whole: of a long one no part can be read, and Xen Orchestra writes no checksums beside them.
pub(super) fn is_encrypted(storage: Capabilities) -> bool {
    !storage.ranged_reads
}

/// Returns the name of the file that the checksum of another is in.
pub(super) fn checksum_name(name: &str) -> String {
    format!("{name}.checksum")
}

/// A destination of the XVA.
pub(super) struct Lane<'a> {
    pub writing: &'a mut dyn WritableStream,
    pub failure: &'a Failure,
    pub probe: &'a Probe,
}

/// Stores the bytes of an XVA in each lane; returns their checksum. Errors of a lane are its failure, and where all failed the
/// checksum says nothing.
///
/// # Errors
/// [`ErrorKind::Source`] if the XVA cannot be read, or is not what was written; [`ErrorKind::Interrupted`].
pub(super) fn copy(xva: &Xva, lanes: Vec<Lane>, stages: &Stages, watch: &Watch) -> Result<Checksum> {
    let broken = Failure::default();
    let failures: Vec<&Failure> = lanes.iter().map(|lane| lane.failure).collect();
    let are_failed = || failures.iter().all(|failure| failure.is_failed());
    let is_over = || watch.is_cancelled() || are_failed();
    let mut summing = Summing::default();
    watch.expect(xva.size);
    thread::scope(|scope| {
        let mut outputs = Vec::with_capacity(lanes.len());
        for lane in lanes {
            let (give, take) = channel::bounded::<Arc<Vec<u8>>>(DEPTH);
            start_one(scope, move || write(lane, &take))?;
            outputs.push(give);
        }
        let (give, take) = channel::bounded::<Vec<u8>>(DEPTH);
        let (is_over, broken) = (&is_over, &broken);
        start_one(scope, move || {
            if let Err(error) = xva.read(&give, is_over, &stages.read) {
                broken.set(error);
            }
        })?;
        while let Ok(piece) = stages.hash.take(|| take.recv()) {
            let len = piece.len();
            stages.hash.work(|| summing.add(&piece));
            stages.hash.add(len);
            let piece = Arc::new(piece);
            for (_, output) in failures.iter().zip(&outputs).filter(|(failure, _)| !failure.is_failed()) {
                drop(stages.hash.give(|| output.send(piece.clone())));
            }
            watch.advance(len as u64);
            watch.sees(take.is_empty(), outputs.iter().any(Sender::is_full));
        }
        Ok::<(), Error>(())
    })?;
    watch.check()?;
    if let Some(error) = broken.take() {
        return Err(error);
    }
    let found = summing.finish();
    match xva.checksum.filter(|expected| *expected != found && !are_failed()) {
        Some(expected) => {
            let name = checksum_name(xva.path.file_name());
            Err(xva.broken(&format!("is damaged: the checksum of its bytes is {found}, and '{name}' says {expected}")))
        }
        None => Ok(found),
    }
}

/// Stores pieces until there are no more; once it failed they are dropped, so that nobody waits for it.
fn write(lane: Lane, take: &Receiver<Arc<Vec<u8>>>) {
    while let Ok(piece) = lane.probe.take(|| take.recv()) {
        if lane.failure.is_failed() {
            continue;
        }
        match lane.probe.work(|| lane.writing.append(&piece)) {
            Ok(()) => lane.probe.add(piece.len()),
            Err(error) => lane.failure.set(error.into()),
        }
    }
}
