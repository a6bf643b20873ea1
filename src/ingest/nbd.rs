//! An NBD export as a disk: several connections where the server allows it, and its holes remembered.
//!
//! What reads as zeroes is a hole (`NBD_STATE_ZERO` of `base:allocation`); where the server does not tell, all is data. An
//! export of half a sector at its end is filled with zeroes, like a raw file. A connection that breaks is not made anew: the
//! ingest ends, and what was written is removed.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use disk::{Disk, Extent};
use nbd::{ALLOCATION, Connection, Options, Uri, dirty_bitmap};

use super::changes::PieceSet;
use super::error::{Error, ErrorKind, Result};
use super::qemu::Server;

/// Connections to one export, where several see the same: one for each thread that reads an image.
pub(super) const CONNECTIONS: usize = 4;
/// How long a server may take to answer; a disk behind it may have to wake up.
const TIMEOUT: Duration = Duration::from_secs(60);
/// A disk is made of whole sectors (bytes).
const SECTOR: u64 = 512;
/// Most extents that are remembered, some 50 bytes each; then they are asked for again.
const EXTENTS: usize = 1 << 20;
/// Says of an extent that it reads as zeroes.
const ZERO: u32 = 2;
/// Says of an extent that it is dirty.
const DIRTY: u32 = 1;

/// A disk behind NBD.
pub struct NbdDisk {
    connections: Vec<Connection>,
    next: AtomicUsize,
    /// What is known: where an extent begins, where it ends, and whether it is a hole. None overlap.
    known: Mutex<BTreeMap<u64, (u64, bool)>>,
    /// Ended after the connections.
    _server: Option<Server>,
}

/// Returns what is asked of a server.
pub(super) fn options(bitmap: Option<&str>) -> Options {
    let contexts = std::iter::once(ALLOCATION.to_owned()).chain(bitmap.map(dirty_bitmap)).collect();
    Options { timeout: TIMEOUT, contexts, ..Options::default() }
}

impl NbdDisk {
    /// Connects to an export of a server that somebody else runs.
    ///
    /// # Errors
    /// [`ErrorKind::Source`] if it cannot be had.
    pub fn open(uri: &Uri, bitmap: Option<&str>) -> Result<Self> {
        let options = options(bitmap);
        let first = Connection::open(&uri.address, &uri.export, &options).map_err(|error| of_nbd(&error))?;
        let count = if first.export().can_multi_connect { CONNECTIONS } else { 1 };
        let mut connections = vec![first];
        while connections.len() < count {
            match Connection::open(&uri.address, &uri.export, &options) {
                Ok(connection) => connections.push(connection),
                // A server may have enough of one client; the first connection does.
                Err(error) => {
                    tracing::debug!(%error, "fewer connections than wanted");
                    break;
                }
            }
        }
        Self::new(connections, None)
    }

    /// Makes a disk of connections, and ends the server with it that was started for it.
    pub(super) fn new(connections: Vec<Connection>, server: Option<Server>) -> Result<Self> {
        let disk = Self { connections, next: AtomicUsize::new(0), known: Mutex::default(), _server: server };
        let sizes = || disk.connections.iter().map(|connection| connection.export().size);
        let failed = |reason: &str| Err(Error::new(ErrorKind::Source, format!("an export of NBD {reason}")));
        match (sizes().min(), sizes().max()) {
            (Some(0), _) | (None, _) => failed("is empty, a disk was expected"),
            (smallest, largest) if smallest != largest => failed("changes its size while it is opened"),
            _ => Ok(disk),
        }
    }

    /// Returns the blocks that a dirty bitmap, asked for when it was opened, says have changed.
    ///
    /// # Errors
    /// [`ErrorKind::Usage`] if the export has no such bitmap; [`ErrorKind::Source`] if the server does not tell.
    pub fn changed(&self, bitmap: &str) -> Result<PieceSet> {
        let connection = self.connection();
        let too_large = || Error::new(ErrorKind::Source, format!("no backup has a disk of {} bytes", self.size()));
        let (mut changed, mut at) = (PieceSet::new(self.size()).ok_or_else(too_large)?, 0);
        while at < connection.export().size {
            let extents = connection.block_status(&dirty_bitmap(bitmap), at).map_err(|error| of_nbd(&error))?;
            let Some(extents) = extents else {
                let message = format!("the image has no dirty bitmap '{}': leave --bitmap out", bitmap.escape_debug());
                return Err(Error::new(ErrorKind::Usage, message));
            };
            for extent in extents {
                if extent.flags & DIRTY != 0 {
                    changed.insert(at, extent.len);
                }
                at += extent.len;
            }
        }
        Ok(changed)
    }

    fn connection(&self) -> &Connection {
        &self.connections[self.next.fetch_add(1, Ordering::Relaxed) % self.connections.len()]
    }

    fn exported(&self) -> u64 {
        self.connections[0].export().size
    }

    fn check(&self, offset: u64, len: u64) -> disk::Result<()> {
        if offset.checked_add(len).is_some_and(|end| end <= self.size()) {
            return Ok(());
        }
        let message = format!("an NBD export has {} bytes, {len} at {offset} were asked for", self.size());
        Err(disk::Error::new(disk::ErrorKind::OutOfRange, message))
    }

    fn known(&self, offset: u64) -> Option<Extent> {
        let known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        let (_, (end, is_hole)) = known.range(..=offset).next_back().filter(|(_, (end, _))| *end > offset)?;
        Some(Extent { len: end - offset, is_hole: *is_hole })
    }

    /// Remembers extents that begin at `offset`, where nothing was known.
    fn learn(&self, mut offset: u64, extents: &[nbd::Status]) {
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        if known.len() >= EXTENTS {
            known.clear();
        }
        for extent in extents {
            let end = offset + extent.len;
            // Another thread may have learned what follows meanwhile.
            if known.range(..end).next_back().is_some_and(|(_, (known_end, _))| *known_end > offset) {
                return;
            }
            known.insert(offset, (end, extent.flags & ZERO != 0));
            offset = end;
        }
    }
}

impl Disk for NbdDisk {
    fn size(&self) -> u64 {
        self.exported().next_multiple_of(SECTOR)
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> disk::Result<()> {
        self.check(offset, buffer.len() as u64)?;
        let there = self.exported().saturating_sub(offset);
        let there = usize::try_from(there).unwrap_or(usize::MAX).min(buffer.len());
        if there > 0 {
            self.connection().read(offset, &mut buffer[..there]).map_err(|error| of_read(&error))?;
        }
        buffer[there..].fill(0);
        Ok(())
    }

    fn extent_at(&self, offset: u64) -> disk::Result<Extent> {
        self.check(offset, 1)?;
        let left = self.size() - offset;
        if offset >= self.exported() {
            return Ok(Extent { len: left, is_hole: true });
        }
        if let Some(extent) = self.known(offset) {
            return Ok(extent);
        }
        match self.connection().block_status(ALLOCATION, offset).map_err(|error| of_read(&error))? {
            Some(extents) => {
                self.learn(offset, &extents);
                let first = extents.first().map(|extent| (extent.len, extent.flags & ZERO != 0));
                let (len, is_hole) = first.unwrap_or((left, false));
                Ok(Extent { len, is_hole })
            }
            None => Ok(Extent { len: left, is_hole: false }),
        }
    }
}

pub(super) fn of_nbd(error: &nbd::Error) -> Error {
    Error::new(ErrorKind::Source, error.to_string())
}

fn of_read(error: &nbd::Error) -> disk::Error {
    let kind = match error.kind() {
        nbd::ErrorKind::OutOfRange => disk::ErrorKind::OutOfRange,
        _ => disk::ErrorKind::Unavailable,
    };
    disk::Error::new(kind, error.to_string())
}
