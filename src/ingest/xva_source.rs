//! Where the XVA of a full backup comes from: another repository, in which it lies as it was written, or a pool that exports it.
//!
//! It is read once, from beginning to end. Whether it is whole is known by its beginning and its end, which are those of a tar
//! unless it is compressed, and by what was said of it: in a repository its length, and the checksum beside it; by a pool, whether
//! the export succeeded.
//!
//! Source: XO, `@xen-orchestra/backups/_isValidXva.mjs`, `_runners/_vmRunners/FullRemote.mjs`.

use std::io;
use std::sync::Arc;

use crossbeam::channel::Sender;
use storage::{Capabilities, Checksum, ObjectPath, Storage};
use xva::Compression;

use super::error::{Error, ErrorKind, Result};
use super::pool::{Export, PoolVm, Turn};
use crate::probe::Probe;

/// Bytes that are read at a time.
pub(super) const PIECE: usize = 2 << 20;
/// The longest checksum file (bytes); that of a SHA-512 has 132.
const CHECKSUM_LIMIT: u64 = 1 << 10;
/// What a tar ends with: two empty blocks (bytes).
const TAR_END: usize = 1024;
const TAR_BLOCK: u64 = 512;
/// Less is no XVA of any kind (bytes).
const SHORTEST: u64 = 20;

/// An XVA that is to be stored.
pub(super) enum Xva {
    /// That of a backup in another repository.
    Stored(StoredArchive),
    /// That of a VM of a pool.
    Exported(Box<dyn PoolVm>),
}

impl Xva {
    /// Waits until it may be transferred, where there are limits; see [`PoolVm::turn`].
    ///
    /// # Errors
    /// As for [`PoolVm::open`].
    pub fn turn(&self, say: &dyn Fn(&str)) -> Result<Turn> {
        match self {
            Self::Exported(vm) => vm.turn(say),
            Self::Stored(_) => Ok(Box::new(())),
        }
    }

    /// Returns how many bytes it has; about, if that is not known.
    pub fn expected_size(&self) -> u64 {
        match self {
            Self::Stored(archive) => archive.size,
            Self::Exported(vm) => vm.expected_size(),
        }
    }

    /// Returns how many bytes it has, if that is known.
    pub fn size(&self) -> Option<u64> {
        match self {
            Self::Stored(archive) => Some(archive.size),
            Self::Exported(_) => None,
        }
    }

    /// Reads it from beginning to end; returns its size in bytes.
    ///
    /// # Errors
    /// [`ErrorKind::Source`] if it cannot be read, or is not whole.
    pub fn read(&self, give: &Sender<Vec<u8>>, is_over: impl Fn() -> bool, probe: &Probe) -> Result<u64> {
        match self {
            Self::Stored(archive) => archive.read(give, is_over, probe).map(|()| archive.size),
            Self::Exported(vm) => read_export(vm.open()?, give, is_over, probe),
        }
    }

    /// Compares the checksum of its bytes with what is written beside it.
    ///
    /// # Errors
    /// [`ErrorKind::Source`] if it is another.
    pub fn check_sum(&self, found: Checksum) -> Result<()> {
        match self {
            Self::Stored(archive) => archive.check_sum(found),
            Self::Exported(_) => Ok(()),
        }
    }
}

/// Reads what a pool exports, until its end is proven; returns its size in bytes.
fn read_export(
    mut export: Box<dyn Export>,
    give: &Sender<Vec<u8>>,
    is_over: impl Fn() -> bool,
    probe: &Probe,
) -> Result<u64> {
    let broken = |what: String| Error::new(ErrorKind::Source, format!("the XVA that the pool exports {what}"));
    let (mut size, mut ends) = (0, Ends::default());
    loop {
        let mut bytes = vec![0; PIECE];
        let mut len = 0;
        while len < PIECE && !is_over() {
            match probe.work(|| export.read(&mut bytes[len..])) {
                Ok(0) => break,
                Ok(read) => len += read,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(broken(format!("cannot be read at byte {}: {error}", size + len as u64))),
            }
        }
        if is_over() {
            return Ok(size);
        }
        bytes.truncate(len);
        size += len as u64;
        ends.add(&bytes);
        probe.add(len);
        if len > 0 {
            drop(probe.give(|| give.send(bytes)));
        }
        if len < PIECE {
            break;
        }
    }
    // What the pool says of it tells more than that its end is missing.
    export.finish()?;
    ends.check(size).map_err(broken)?;
    Ok(size)
}

/// The XVA of a backup in another repository.
pub struct StoredArchive {
    storage: Arc<dyn Storage>,
    path: ObjectPath,
    /// In bytes.
    size: u64,
    /// What was written beside it; `None` if nothing was, or it is of another algorithm.
    checksum: Option<Checksum>,
}

impl StoredArchive {
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
            return Err(xva.broken(&too_short(size)));
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
        ends.check(self.size).map_err(|what| self.broken(&what))
    }

    /// Compares the checksum of its bytes with what is written beside it.
    ///
    /// # Errors
    /// [`ErrorKind::Source`] if it is another.
    pub fn check_sum(&self, found: Checksum) -> Result<()> {
        match self.checksum.filter(|expected| *expected != found) {
            Some(expected) => {
                let name = checksum_name(self.path.file_name());
                let what = format!("is damaged: the checksum of its bytes is {found}, and '{name}' says {expected}");
                Err(self.broken(&what))
            }
            None => Ok(()),
        }
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

    /// Returns how many bytes it has.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Reads it from beginning to end.
    ///
    /// # Errors
    /// [`ErrorKind::Source`] if it cannot be read, or is not whole.
    pub fn read(&self, give: &Sender<Vec<u8>>, is_over: impl Fn() -> bool, probe: &Probe) -> Result<()> {
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

    /// Says why they cannot be those of a whole XVA of `size` bytes.
    fn check(&self, size: u64) -> std::result::Result<(), String> {
        if size < SHORTEST {
            return Err(too_short(size));
        }
        let is_tar = || size > TAR_END as u64 && size.is_multiple_of(TAR_BLOCK) && self.last == [0; TAR_END];
        if Compression::of(&self.first) == Compression::None && !is_tar() {
            return Err("is cut off: it does not end as a tar does".to_owned());
        }
        Ok(())
    }
}

fn too_short(size: u64) -> String {
    format!("has {size} bytes: an XVA was expected")
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
