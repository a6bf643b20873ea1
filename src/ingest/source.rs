//! What is ingested: an image file, a block device or an export of NBD as a disk, or a stream.
//!
//! Anything that our own reader opens without metadata (a VHD file, an alias, an exploded VHD) is a disk already; this module
//! adds what is raw. Other formats are told by their first bytes, and read by `qemu` where that is possible: taken for raw, they
//! would be stored as they are.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, FileTypeExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use disk::{Disk, Extent};
use rustix::fs::{SeekFrom, seek};

use super::changes::PieceSet;
use super::error::{Error, ErrorKind, Result};
use super::nbd::NbdDisk;
use super::pool::{PoolDisk, Turn};
use super::qemu;
use crate::repository::{OpenOptions, Repository};

/// Memory for decoded blocks of an image that is a VHD (bytes).
const CACHE: u64 = 32 << 20;
/// A disk is made of whole sectors (bytes).
const SECTOR: u64 = 512;
/// What images of other formats begin with.
const FOREIGN: [(&[u8], &str); 8] = [
    (b"QFI\xfb", "qcow2"),
    (b"KDMV", "VMDK"),
    (b"# Disk DescriptorFile", "VMDK"),
    (b"vhdxfile", "VHDX"),
    (b"<<< ", "VDI"),
    (b"QED\0", "QED"),
    (b"WithoutFreeSpace", "Parallels"),
    (b"WithouFreSpacExt", "Parallels"),
];
/// What a VHD begins with, but for a fixed one.
const VHD: &[u8] = b"conectix";

/// How images are opened.
#[derive(Debug, Clone, Default)]
pub struct ImageOptions {
    /// Whether an image may name other files that its bytes are in.
    pub allow_backing: bool,
    /// A dirty bitmap that is to be read, too.
    pub bitmap: Option<String>,
}

/// Where the bytes of a disk come from.
#[derive(Clone)]
pub enum Source {
    /// Something that can be read anywhere.
    Disk(Arc<dyn Disk>),
    /// Raw bytes that come once, in order; their end is the end of the disk.
    Stream(Arc<Mutex<File>>),
    /// A disk of a pool, read in the way that it says when its turn comes.
    Pool(Arc<dyn PoolDisk>),
}

impl Source {
    /// Opens an image: a raw file, a block device, a `.vhd` file or alias, the folder of an exploded VHD, or what `qemu-nbd`
    /// reads. Returns with it the blocks that the bitmap says have changed, if one is asked for. To be called by a thread that
    /// lives as long as the disk is read: a `qemu-nbd` ends with the thread that started it.
    ///
    /// # Errors
    /// [`ErrorKind::Source`] if it cannot be opened, is empty, or is of a format that is not read; [`ErrorKind::Usage`] if it
    /// has no bitmaps.
    pub fn open(path: &Path, options: &ImageOptions) -> Result<(Self, Option<PieceSet>)> {
        if path.metadata().is_ok_and(|metadata| metadata.is_file() || metadata.file_type().is_block_device())
            && foreign(&head(path)?).is_some()
        {
            return Self::of_nbd(qemu::open(path, options)?, options);
        }
        match options.bitmap {
            Some(_) => {
                let message = format!("the image '{}' has no dirty bitmaps: leave --bitmap out", path.display());
                Err(Error::new(ErrorKind::Usage, message))
            }
            None => Ok((Self::open_ours(path)?, None)),
        }
    }

    /// Opens an export of NBD that somebody else serves.
    ///
    /// # Errors
    /// As for [`Source::open`].
    pub fn open_nbd(uri: &::nbd::Uri, options: &ImageOptions) -> Result<(Self, Option<PieceSet>)> {
        Self::of_nbd(NbdDisk::open(uri, options.bitmap.as_deref())?, options)
    }

    fn of_nbd(disk: NbdDisk, options: &ImageOptions) -> Result<(Self, Option<PieceSet>)> {
        let changed = options.bitmap.as_deref().map(|bitmap| disk.changed(bitmap)).transpose()?;
        Ok((Self::Disk(Arc::new(disk)), changed))
    }

    /// Opens what is read without QEMU.
    fn open_ours(path: &Path) -> Result<Self> {
        let shown = path.display();
        let failed = |error: &dyn std::fmt::Display| {
            Error::new(ErrorKind::Source, format!("the image '{shown}' cannot be opened: {error}"))
        };
        let metadata = path.metadata().map_err(|error| failed(&error))?;
        let is_vhd = path.extension().is_some_and(|extension| extension == "vhd");
        if metadata.is_dir() || is_vhd {
            let options = OpenOptions { cache_bytes: CACHE, ..OpenOptions::default() };
            let folder = Repository::open(path, options).map_err(|error| failed(&error))?;
            let loose = folder.loose_disks().map_err(|error| failed(&error))?;
            let [disk] = loose.as_slice() else {
                let message = format!(
                    "the image '{shown}' holds {} disks without metadata: name one, a .vhd file, an alias or the folder of \
                     an exploded VHD",
                    loose.len()
                );
                return Err(Error::new(ErrorKind::Source, message));
            };
            return Ok(Self::Disk(folder.open_loose(disk).map_err(|error| failed(&error))?));
        }
        let kind = metadata.file_type();
        if !kind.is_file() && !kind.is_block_device() {
            return Ok(Self::Stream(Arc::new(Mutex::new(File::open(path).map_err(|error| failed(&error))?))));
        }
        Ok(Self::Disk(Arc::new(RawFile::open(path)?)))
    }

    /// Returns standard input.
    ///
    /// # Errors
    /// [`ErrorKind::Source`] if there is none.
    pub fn stdin() -> Result<Self> {
        let descriptor = io::stdin().as_fd().try_clone_to_owned();
        let failed = |error| Error::new(ErrorKind::Source, format!("standard input cannot be read: {error}"));
        Ok(Self::Stream(Arc::new(Mutex::new(File::from(descriptor.map_err(failed)?)))))
    }

    /// Waits until it may be transferred, where there are limits; see [`PoolDisk::turn`].
    ///
    /// # Errors
    /// As for [`PoolDisk::open`].
    pub(super) fn turn(&self, say: &dyn Fn(&str)) -> Result<Turn> {
        match self {
            Self::Pool(disk) => disk.turn(say),
            Self::Disk(_) | Self::Stream(_) => Ok(Box::new(())),
        }
    }

    /// Returns its size in bytes; `None` of a stream.
    #[must_use]
    pub fn size(&self) -> Option<u64> {
        match self {
            Self::Disk(disk) => Some(disk.size()),
            Self::Pool(disk) => Some(disk.size()),
            Self::Stream(_) => None,
        }
    }
}

/// A raw image: each byte of the file is one of the disk. The last sector is filled with zeroes.
pub struct RawFile {
    file: File,
    path: PathBuf,
    len: u64,
    /// Positions of `file` are set while holes are looked for.
    position: Mutex<()>,
}

impl RawFile {
    /// Opens a file or a block device.
    ///
    /// # Errors
    /// [`ErrorKind::Source`] if it cannot be read, is empty, or is an image of another format.
    pub fn open(path: &Path) -> Result<Self> {
        let failed = |reason: &dyn std::fmt::Display| {
            Error::new(ErrorKind::Source, format!("the image '{}' cannot be opened: {reason}", path.display()))
        };
        let file = File::open(path).map_err(|error| failed(&error))?;
        // A block device says its size nowhere else.
        let len = seek(&file, SeekFrom::End(0)).map_err(|error| failed(&error))?;
        if len == 0 {
            return Err(failed(&"it is empty, a disk was expected"));
        }
        refuse_foreign(&path.display().to_string(), &head(path)?)?;
        Ok(Self { file, path: path.to_path_buf(), len, position: Mutex::new(()) })
    }

    fn failed(&self, error: &dyn std::fmt::Display) -> disk::Error {
        disk::Error::new(disk::ErrorKind::Unavailable, format!("read the image '{}': {error}", self.path.display()))
    }

    fn check(&self, offset: u64, len: u64) -> disk::Result<()> {
        if offset.checked_add(len).is_some_and(|end| end <= self.size()) {
            return Ok(());
        }
        let message = format!("'{}' has {} bytes, {len} at {offset} were asked for", self.path.display(), self.size());
        Err(disk::Error::new(disk::ErrorKind::OutOfRange, message))
    }
}

/// Returns the first bytes of a file or device.
fn head(path: &Path) -> Result<Vec<u8>> {
    let failed = |error: io::Error| {
        Error::new(ErrorKind::Source, format!("the image '{}' cannot be opened: {error}", path.display()))
    };
    let mut head = vec![0; 64];
    let read = File::open(path).and_then(|file| file.read_at(&mut head, 0)).map_err(failed)?;
    head.truncate(read);
    Ok(head)
}

/// Names the format of an image that QEMU reads, by its first bytes.
fn foreign(head: &[u8]) -> Option<&'static str> {
    FOREIGN.iter().find(|(magic, _)| head.starts_with(magic)).map(|(_, format)| *format)
}

/// Refuses what is not raw, by its first bytes.
pub(super) fn refuse_foreign(name: &str, head: &[u8]) -> Result<()> {
    let message = match foreign(head) {
        Some(format) => {
            format!("the image '{name}' is {format}, which is read from a file: a raw image was expected here")
        }
        None if head.starts_with(VHD) => format!(
            "the image '{name}' is a VHD, which is read from a file whose name ends in .vhd: a raw image was expected here"
        ),
        None => return Ok(()),
    };
    Err(Error::new(ErrorKind::Source, message))
}

impl Disk for RawFile {
    fn size(&self) -> u64 {
        self.len.next_multiple_of(SECTOR)
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> disk::Result<()> {
        self.check(offset, buffer.len() as u64)?;
        let there = usize::try_from(self.len.saturating_sub(offset)).unwrap_or(usize::MAX).min(buffer.len());
        self.file.read_exact_at(&mut buffer[..there], offset).map_err(|error| match error.kind() {
            io::ErrorKind::UnexpectedEof => self.failed(&"it became shorter while it was read"),
            _ => self.failed(&error),
        })?;
        buffer[there..].fill(0);
        Ok(())
    }

    fn extent_at(&self, offset: u64) -> disk::Result<Extent> {
        self.check(offset, 1)?;
        let left = self.size() - offset;
        if offset >= self.len {
            return Ok(Extent { len: left, is_hole: true });
        }
        let _held = self.position.lock();
        let data = match seek(&self.file, SeekFrom::Data(offset)) {
            Ok(data) => data,
            // No data follows.
            Err(rustix::io::Errno::NXIO) => return Ok(Extent { len: left, is_hole: true }),
            // A device, or a file system that knows no holes.
            Err(rustix::io::Errno::INVAL | rustix::io::Errno::OPNOTSUPP) => {
                return Ok(Extent { len: left, is_hole: false });
            }
            Err(error) => return Err(self.failed(&error)),
        };
        if data > offset {
            return Ok(Extent { len: (data - offset).min(left), is_hole: true });
        }
        let hole = seek(&self.file, SeekFrom::Hole(offset)).map_err(|error| self.failed(&error))?;
        Ok(Extent { len: hole.saturating_sub(offset).clamp(1, left), is_hole: false })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn holes_of_a_raw_file_are_found_and_its_last_sector_is_filled() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("disk.raw");
        let file = File::create(&path).unwrap();
        file.set_len((4 << 20) + 100).unwrap();
        file.write_all_at(&[7; 4096], 2 << 20).unwrap();
        let disk = RawFile::open(&path).unwrap();
        assert_eq!(disk.size(), (4 << 20) + 512);
        let ranges: Vec<_> =
            disk::data_ranges(&disk).map(|range| range.unwrap()).map(|it| (it.start, it.end)).collect();
        assert_eq!(ranges, [(2 << 20, (2 << 20) + 4096)]);
        file.write_all_at(&[9; 100], 4 << 20).unwrap();
        let mut last = [1; 512];
        disk.read_at(4 << 20, &mut last).unwrap();
        assert_eq!((&last[..100], &last[100..]), (&[9; 100][..], &[0; 412][..]));
        assert_eq!(disk.read_at(4 << 20, &mut [0; 513]).unwrap_err().kind(), disk::ErrorKind::OutOfRange);
    }

    #[test]
    fn an_image_of_another_format_is_never_taken_for_raw() {
        let folder = tempfile::tempdir().unwrap();
        for (magic, format) in FOREIGN.into_iter().chain([(VHD, "a VHD")]) {
            let path = folder.path().join("disk.img");
            std::fs::write(&path, [magic, &[0; 600]].concat()).unwrap();
            let Err(error) = RawFile::open(&path) else { panic!("{format}") };
            assert_eq!(error.kind(), ErrorKind::Source, "{format}");
            assert!(error.to_string().contains(&format!("is {format}, which is read from a file")), "{error}");
            let Err(error) = Source::open(&path, &ImageOptions::default()) else { panic!("{format}") };
            assert_eq!(error.kind(), ErrorKind::Source, "{format}: {error}");
        }
    }
}
