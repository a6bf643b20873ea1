//! The disks as a worker has them: it asks the mount for pieces, and keeps the last ones.
//!
//! How often it asks is what reading a guest costs, not how much: a piece is [`GRANULE`] long, and where one follows another
//! they grow.

use std::num::NonZeroUsize;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, PoisonError};

use disk::{Disk, Error, ErrorKind, Extent, Result};
use lru::LruCache;

use super::protocol::{Frame, Message, PIECE_LIMIT, Request, receive, send};

/// The smallest piece that is asked for (bytes).
const GRANULE: usize = 64 << 10;

/// Pieces kept, of all disks: 32 MiB.
const KEPT: NonZeroUsize = NonZeroUsize::new(512).expect("not zero");

/// The socket to the mount, and what came through it.
pub(super) struct Channel {
    socket: UnixStream,
    granules: LruCache<(u16, u64), Arc<[u8]>>,
    /// Disk and granule at which the last piece ended, and how many granules it had.
    last: (u16, u64, usize),
    /// Why a disk could not be read.
    unreadable: Option<String>,
}

impl Channel {
    pub(super) fn new(socket: UnixStream) -> Self {
        Self { socket, granules: LruCache::new(KEPT), last: (0, 0, 0), unreadable: None }
    }

    pub(super) fn socket(&mut self) -> &mut UnixStream {
        &mut self.socket
    }

    /// Returns why a disk could not be read since this was asked last.
    pub(super) fn take_unreadable(&mut self) -> Option<String> {
        self.unreadable.take()
    }

    fn granule(&mut self, disk: u16, size: u64, number: u64) -> Result<Arc<[u8]>> {
        if let Some(granule) = self.granules.get(&(disk, number)) {
            return Ok(granule.clone());
        }
        let count = match self.last {
            (last, end, count) if (last, end) == (disk, number) => (2 * count).clamp(1, PIECE_LIMIT / GRANULE),
            _ => 1,
        };
        let offset = number * GRANULE as u64;
        let len = (size - offset).min((count * GRANULE) as u64);
        let bytes = self.ask(disk, offset, u32::try_from(len).expect("at most PIECE_LIMIT"))?;
        for (number, bytes) in (number..).zip(bytes.chunks(GRANULE)) {
            self.granules.put((disk, number), Arc::from(bytes));
        }
        self.last = (disk, number + count as u64, count);
        Ok(self.granules.get(&(disk, number)).expect("it was just put there").clone())
    }

    /// Reads just what is needed, of what has something beside it that cannot be read.
    fn read_only(&mut self, disk: u16, offset: u64, buffer: &mut [u8]) -> Result<()> {
        for (offset, piece) in (offset..).step_by(PIECE_LIMIT).zip(buffer.chunks_mut(PIECE_LIMIT)) {
            let bytes = self.ask(disk, offset, u32::try_from(piece.len()).expect("at most PIECE_LIMIT"));
            let bytes = bytes.inspect_err(|error| self.unreadable = Some(error.to_string()))?;
            piece.copy_from_slice(&bytes);
        }
        Ok(())
    }

    fn ask(&mut self, disk: u16, offset: u64, len: u32) -> Result<Vec<u8>> {
        let broken =
            |why: &dyn std::fmt::Display| Error::new(ErrorKind::Unavailable, format!("the mount is gone: {why}"));
        send(&mut self.socket, &Message::Read(disk, offset, len)).map_err(|error| broken(&error))?;
        match receive(&mut self.socket).map_err(|error| broken(&error))? {
            Frame::Bytes(bytes) if bytes.len() == len as usize => Ok(bytes),
            Frame::Message(Request::Unreadable(message)) => Err(Error::new(ErrorKind::Unavailable, message)),
            _ => Err(broken(&"it answered what was not asked")),
        }
    }
}

/// A disk of the mount.
pub(super) struct Remote {
    channel: Arc<Mutex<Channel>>,
    number: u16,
    size: u64,
}

impl Remote {
    /// Makes disks of these sizes (bytes), of which the mount knows the first as 0.
    pub(super) fn all(channel: &Arc<Mutex<Channel>>, sizes: &[u64]) -> Vec<Arc<dyn Disk>> {
        let remote = |(number, size): (u16, &u64)| -> Arc<dyn Disk> {
            Arc::new(Self { channel: channel.clone(), number, size: *size })
        };
        (0..).zip(sizes).map(remote).collect()
    }

    fn check(&self, offset: u64, len: u64) -> Result<()> {
        match offset.checked_add(len) {
            Some(end) if end <= self.size => Ok(()),
            _ => {
                let message = format!("{len} bytes at {offset} of a disk of {} bytes", self.size);
                Err(Error::new(ErrorKind::OutOfRange, message))
            }
        }
    }
}

impl Disk for Remote {
    fn size(&self) -> u64 {
        self.size
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<()> {
        self.check(offset, buffer.len() as u64)?;
        let mut channel = self.channel.lock().unwrap_or_else(PoisonError::into_inner);
        let mut done = 0;
        while done < buffer.len() {
            let at = offset + done as u64;
            let Ok(granule) = channel.granule(self.number, self.size, at / GRANULE as u64) else {
                return channel.read_only(self.number, at, &mut buffer[done..]);
            };
            let within = usize::try_from(at % GRANULE as u64).expect("less than GRANULE");
            let count = (granule.len() - within).min(buffer.len() - done);
            buffer[done..done + count].copy_from_slice(&granule[within..within + count]);
            done += count;
        }
        Ok(())
    }

    /// Nobody asks a worker's disk for holes: it is read in granules.
    fn extent_at(&self, offset: u64) -> Result<Extent> {
        self.check(offset, 1)?;
        Ok(Extent { len: self.size - offset, is_hole: false })
    }
}
