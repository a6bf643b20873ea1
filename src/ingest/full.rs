//! A full backup of another repository, an XVA, as it is: one pass over its bytes, to all destinations at once.
//!
//! ```text
//! source ─► reader ─► pieces ─► sum ─┬► lane of a destination ─► writer
//!                    (bounded)       └► lane ...      (bounded)
//! ```
//!
//! Whether it is compressed does not matter: what is stored are its bytes. They are those that were written if Xen Orchestra's
//! checksum says so, and as many as the metadata says; a tar that has no end is refused as by Xen Orchestra.
//!
//! The slowest destination that lives sets the pace. Memory: with D destinations at most 3 + [`DEPTH`] × (1 + D) + D pieces of
//! 2 MiB, besides what is encrypted as a whole ([`WHOLE_AT_MOST`]).
//!
//! Source: XO, `@xen-orchestra/backups/_isValidXva.mjs`, `_runners/_vmRunners/FullRemote.mjs`.

use std::sync::Arc;
use std::thread;

use crossbeam::channel::{self, Receiver, Sender};
use storage::{Capabilities, Checksum, MAX_OPEN_OBJECT, Object, ObjectPath, Storage, Summing};
use xva::Compression;

use super::archive::Writing;
use super::copy::{Failure, start};
use super::error::{Error, ErrorKind, Result};
use super::probe::Probe;
use super::{Stages, Watch};

/// Bytes that are read at a time.
const PIECE: usize = 2 << 20;
/// Pieces that wait for the sum, and for the writer of each destination.
const DEPTH: usize = 4;
/// The longest XVA that an encrypted repository takes (bytes): it is encrypted as a whole, in memory, and has to be opened again.
pub(super) const WHOLE_AT_MOST: u64 = MAX_OPEN_OBJECT - 64;
/// The longest checksum file (bytes); that of a SHA-512 has 132.
const CHECKSUM_LIMIT: u64 = 1 << 10;
/// What a tar ends with: two empty blocks (bytes).
const TAR_END: usize = 1024;
const TAR_BLOCK: u64 = 512;
/// Less is no XVA of any kind (bytes).
const SHORTEST: u64 = 20;

/// The XVA of a backup in another repository.
pub(super) struct Xva {
    path: ObjectPath,
    object: Arc<dyn Object>,
    /// In bytes.
    pub size: u64,
    /// What was written beside it; `None` if nothing was, or it is of another algorithm.
    checksum: Option<Checksum>,
}

impl Xva {
    /// Opens one of `expected` bytes, or of any number if that is 0, and sees whether it has a beginning and an end.
    ///
    /// # Errors
    /// [`ErrorKind::Source`] if it cannot be read, or is not whole.
    pub fn open(storage: &dyn Storage, path: ObjectPath, expected: u64) -> Result<Self> {
        let object = storage.open(&path).map_err(|error| match error.kind() {
            storage::ErrorKind::TooLarge => Error::new(
                ErrorKind::Source,
                format!(
                    "'{path}' is longer than {} MiB and encrypted as a whole, and such an XVA cannot be read yet: mirror it \
                     with Xen Orchestra",
                    MAX_OPEN_OBJECT >> 20
                ),
            ),
            _ => Error::new(ErrorKind::Source, error.to_string()),
        })?;
        let size = object.stat().map_err(|error| Error::new(ErrorKind::Source, error.to_string()))?.size;
        let mut xva = Self { path, object, size, checksum: None };
        if expected != 0 && size != expected {
            return Err(xva.broken(&format!("has {size} bytes, and its metadata says {expected}: it is not whole")));
        }
        xva.check_ends()?;
        if !is_whole(storage.capabilities()) {
            xva.checksum = xva.stored_checksum(storage)?;
        }
        Ok(xva)
    }

    fn check_ends(&self) -> Result<()> {
        if self.size < SHORTEST {
            return Err(self.broken(&format!("has {} bytes: an XVA was expected", self.size)));
        }
        let failed = |error: &dyn std::fmt::Display| self.broken(&format!("cannot be read: {error}"));
        if xva::compression(self.object.as_ref()).map_err(|error| failed(&error))? != Compression::None {
            return Ok(());
        }
        let mut end = [1; TAR_END];
        let is_tar = self.size > TAR_END as u64 && self.size.is_multiple_of(TAR_BLOCK) && {
            let read = self.object.read_at(self.size - TAR_END as u64, &mut end).map_err(|error| failed(&error))?;
            read == TAR_END && end == [0; TAR_END]
        };
        if is_tar { Ok(()) } else { Err(self.broken("is cut off: it does not end as a tar does")) }
    }

    fn stored_checksum(&self, storage: &dyn Storage) -> Result<Option<Checksum>> {
        let path = self.path.parent().join(&checksum_name(self.path.file_name()))?;
        match storage.read(&path, CHECKSUM_LIMIT) {
            Err(error) if error.kind() == storage::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(Error::new(ErrorKind::Source, error.to_string())),
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
    fn read(&self, give: &Sender<Piece>, is_over: impl Fn() -> bool, probe: &Probe) -> Result<()> {
        let mut offset = 0;
        while offset < self.size && !is_over() {
            let len = usize::try_from(self.size - offset).unwrap_or(usize::MAX).min(PIECE);
            let mut bytes = vec![0; len];
            let read = probe.work(|| self.object.read_at(offset, &mut bytes));
            let read = read.map_err(|error| self.broken(&format!("cannot be read at byte {offset}: {error}")))?;
            if read < len {
                let end = offset + read as u64;
                let size = self.size;
                return Err(self.broken(&format!("ends at byte {end}, and had {size}: somebody writes to it")));
            }
            probe.add(len);
            drop(probe.give(|| give.send(Piece { offset, bytes })));
            offset += len as u64;
        }
        Ok(())
    }
}

/// Whether objects are read and written as a whole, since they are encrypted. Xen Orchestra writes no checksums beside them.
pub(super) fn is_whole(storage: Capabilities) -> bool {
    !storage.ranged_reads
}

/// Returns the name of the file that the checksum of another is in.
pub(super) fn checksum_name(name: &str) -> String {
    format!("{name}.checksum")
}

/// Bytes of the XVA, and where they are.
struct Piece {
    offset: u64,
    bytes: Vec<u8>,
}

/// A destination of the XVA.
pub(super) struct Lane<'a> {
    pub writing: &'a Writing,
    pub failure: &'a Failure,
    pub probe: &'a Probe,
}

/// Stores the bytes of an XVA in each lane; returns their checksum. Errors of a lane are its failure, and where all failed the
/// checksum says nothing.
///
/// # Errors
/// [`ErrorKind::Source`] if the XVA cannot be read, or is not what was written; [`ErrorKind::Interrupted`].
pub(super) fn copy(xva: &Xva, lanes: &[Lane], stages: &Stages, watch: &Watch) -> Result<Checksum> {
    let broken = Failure::default();
    let are_failed = || lanes.iter().all(|lane| lane.failure.is_failed());
    let is_over = || watch.is_cancelled() || are_failed();
    let mut summing = Summing::default();
    watch.expect(xva.size);
    thread::scope(|scope| {
        let mut outputs = Vec::with_capacity(lanes.len());
        for lane in lanes {
            let (give, take) = channel::bounded::<Arc<Piece>>(DEPTH);
            start(scope, 1, || {
                let take = take.clone();
                move || write(lane, &take)
            })?;
            outputs.push(give);
        }
        let (give, take) = channel::bounded::<Piece>(DEPTH);
        start(scope, 1, || {
            let (give, is_over, broken) = (give.clone(), &is_over, &broken);
            move || {
                if let Err(error) = xva.read(&give, is_over, &stages.read) {
                    broken.set(error);
                }
            }
        })?;
        drop(give);
        while let Ok(piece) = stages.hash.take(|| take.recv()) {
            let len = piece.bytes.len();
            stages.hash.work(|| summing.add(&piece.bytes));
            stages.hash.add(len);
            let piece = Arc::new(piece);
            for (_, output) in lanes.iter().zip(&outputs).filter(|(lane, _)| !lane.failure.is_failed()) {
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
fn write(lane: &Lane, take: &Receiver<Arc<Piece>>) {
    while let Ok(piece) = lane.probe.take(|| take.recv()) {
        if lane.failure.is_failed() {
            continue;
        }
        match lane.probe.work(|| lane.writing.write_at(piece.offset, &piece.bytes)) {
            Ok(()) => lane.probe.add(piece.bytes.len()),
            Err(error) => lane.failure.set(error.into()),
        }
    }
}
