//! What is written to a disk that only reads: kept beside it, in a file without a name, and gone with the process.
//!
//! Sectors of 512 bytes, as a loop device writes them: nothing of one has to be read to write another part of it.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, PoisonError, RwLock};

use disk::Disk;
use rustix::fs::{MemfdFlags, Mode, OFlags};

use super::super::errno::Errno;
use super::ranges::Ranges;

/// Bytes of a sector.
const SECTOR: u64 = 512;

/// A disk, and what was written over it.
pub(super) struct Overlay {
    below: Arc<dyn Disk>,
    /// What was written, each byte at its place on the disk.
    file: File,
    written: RwLock<Ranges>,
    /// Bytes that may be written, not counting those written again.
    limit: u64,
    is_full: AtomicBool,
}

impl Overlay {
    /// Makes an overlay that takes `limit` bytes; more only by what is written at the same moment.
    ///
    /// # Errors
    /// If no file can be made.
    pub(super) fn new(below: Arc<dyn Disk>, limit: u64) -> io::Result<Self> {
        let file = unnamed_file()?;
        Ok(Self { below, file, written: RwLock::default(), limit, is_full: AtomicBool::new(false) })
    }

    /// Returns the disk without what was written.
    pub(super) fn below(&self) -> &dyn Disk {
        self.below.as_ref()
    }

    /// Returns how many bytes differ from the disk, or may.
    pub(super) fn written(&self) -> u64 {
        self.written.read().unwrap_or_else(PoisonError::into_inner).len()
    }

    /// Returns whether something was refused since it was full.
    pub(super) fn is_full(&self) -> bool {
        self.is_full.load(Ordering::Relaxed)
    }

    /// Reads, as [`Disk::read_at`].
    pub(super) fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<(), disk::Error> {
        let end = offset.saturating_add(buffer.len() as u64);
        let pieces = self.written.read().unwrap_or_else(PoisonError::into_inner).pieces(offset..end);
        let mut rest = buffer;
        for (piece, is_written) in pieces {
            let len = usize::try_from(piece.end - piece.start).expect("a part of the buffer");
            let (part, after) = rest.split_at_mut(len);
            rest = after;
            if !is_written {
                self.below.read_at(piece.start, part)?;
            } else if let Err(error) = self.file.read_exact_at(part, piece.start) {
                let message = format!("read {len} bytes at {} that were written: {error}", piece.start);
                return Err(disk::Error::new(disk::ErrorKind::Unavailable, message));
            }
        }
        Ok(())
    }

    /// Writes whole sectors.
    ///
    /// # Errors
    /// That it is full, that no such sectors are there, or what the file says.
    pub(super) fn write_at(&self, offset: u64, bytes: &[u8]) -> Result<(), Errno> {
        let len = bytes.len() as u64;
        let end = offset.checked_add(len).filter(|end| *end <= self.below.size()).ok_or(Errno::INVALID)?;
        if !offset.is_multiple_of(SECTOR) || !len.is_multiple_of(SECTOR) {
            return Err(Errno::INVALID);
        }
        let more = {
            let written = self.written.read().unwrap_or_else(PoisonError::into_inner);
            let new = written.pieces(offset..end).into_iter().filter(|(_, is_written)| !is_written);
            written.len() + new.map(|(piece, _)| piece.end - piece.start).sum::<u64>()
        };
        if more > self.limit {
            if !self.is_full.swap(true, Ordering::Relaxed) {
                tracing::error!(limit = self.limit, "the overlay is full: nothing more can be written");
            }
            return Err(Errno::NO_SPACE);
        }
        if let Err(error) = self.file.write_all_at(bytes, offset) {
            tracing::error!(%error, offset, "what was to be written over the disk cannot be kept");
            return Err(Errno::IO);
        }
        // Only now that it is there: one that failed leaves the disk's own bytes.
        self.written.write().unwrap_or_else(PoisonError::into_inner).insert(offset..end);
        Ok(())
    }
}

/// Makes a file that goes with who has it open: in TMPDIR, else `/var/tmp`, and in memory where that has no files without names.
fn unnamed_file() -> io::Result<File> {
    let folder = std::env::var_os("TMPDIR").filter(|folder| !folder.is_empty());
    let folder = folder.map_or_else(|| PathBuf::from("/var/tmp"), PathBuf::from);
    let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
    let made = rustix::fs::open(&folder, flags, Mode::RUSR | Mode::WUSR);
    Ok(made.or_else(|_| rustix::fs::memfd_create("xofs-overlay", MemfdFlags::CLOEXEC))?.into())
}

#[cfg(test)]
mod tests {
    use disk::Extent;

    use super::*;

    /// Each byte tells where it stands.
    struct Counting(u64);

    impl Disk for Counting {
        fn size(&self) -> u64 {
            self.0
        }

        fn read_at(&self, offset: u64, buffer: &mut [u8]) -> disk::Result<()> {
            for (byte, at) in buffer.iter_mut().zip(offset..) {
                *byte = u8::try_from(at % 251).unwrap();
            }
            Ok(())
        }

        fn extent_at(&self, offset: u64) -> disk::Result<Extent> {
            Ok(Extent { len: self.0 - offset, is_hole: false })
        }
    }

    #[test]
    fn what_was_written_is_read_and_all_else_is_the_disks() {
        let overlay = Overlay::new(Arc::new(Counting(1 << 20)), 1 << 20).unwrap();
        let mut truth = vec![0; 1 << 20];
        overlay.below().read_at(0, &mut truth).unwrap();
        for (start, sectors) in [(0, 1), (3, 5), (5, 1), (2047, 1), (100, 64), (99, 2)] {
            let bytes = vec![0xa0 + u8::try_from(sectors).unwrap(); sectors * 512];
            overlay.write_at(start * 512, &bytes).unwrap();
            let at = usize::try_from(start).unwrap() * 512;
            truth[at..at + bytes.len()].copy_from_slice(&bytes);
        }
        assert_eq!(overlay.written(), 512 * (1 + 5 + 1 + 65));
        let mut read = vec![0; 1 << 20];
        overlay.read_at(0, &mut read).unwrap();
        assert_eq!(read, truth);
        let mut some = vec![0; 5000];
        overlay.read_at(49_999, &mut some).unwrap();
        assert_eq!(some, truth[49_999..54_999]);
    }

    #[test]
    fn what_is_too_much_or_no_sector_is_refused_and_changes_nothing() {
        let overlay = Overlay::new(Arc::new(Counting(4096)), 1024).unwrap();
        for (offset, len) in [(1, 512), (0, 100), (4096, 512), (3584, 1024), (u64::MAX - 511, 512)] {
            assert_eq!(overlay.write_at(offset, &vec![1; len]), Err(Errno::INVALID), "{len} bytes at {offset}");
        }
        overlay.write_at(0, &[1; 1024]).unwrap();
        assert!(!overlay.is_full());
        assert_eq!(overlay.write_at(512, &[2; 1024]), Err(Errno::NO_SPACE));
        assert!(overlay.is_full());
        overlay.write_at(512, &[3; 512]).unwrap();
        let mut read = [0; 1536];
        overlay.read_at(0, &mut read).unwrap();
        assert_eq!((read[0], read[512], read[1024]), (1, 3, u8::try_from(1024 % 251).unwrap()));
    }
}
