//! squashfs 4.0, in any of its compressions.
//!
//! Its files are numbered by where their inodes stand, so that no table is needed to find them. All content is
//! [encoded](Source::Encoded): even what is not compressed may end in a piece that it shares with other files.
//!
//! rust-fs-squashfs reads all of it; here are bounds, and the errors of the disk, which it does not keep.

use std::cell::RefCell;
use std::rc::Rc;
use std::sync::{Arc, Mutex, PoisonError};

use disk::Disk;
use fs_core::BlockRead;
use fs_squashfs::inode::FileType;
use fs_squashfs::superblock::Superblock;
use fs_squashfs::{Filesystem, superblock};

use crate::read::read_within;
use crate::{
    Attributes, Entry, Error, ErrorKind, Extent, Extents, Facts, Fields, GuestFs, Inode, Kind, Result, Source, Time,
    Xattr,
};

/// Bytes of decoded content that are kept.
const KEPT_BYTES: usize = 16 << 20;

/// Bytes of one directory at most, 9 for the shortest name.
const MAX_LISTING: usize = 128 << 20;

/// Bytes in which Linux counts what a file takes.
const SECTOR: u64 = 512;

/// A squashfs.
pub struct Squashfs {
    device: Arc<Device>,
    filesystem: Filesystem,
    root: u64,
    block_size: u64,
    /// The inode that was last asked for: that of a large file takes long to read.
    last: RefCell<Option<(Inode, Rc<fs_squashfs::Inode>)>>,
}

impl Squashfs {
    /// Opens the squashfs that a disk is.
    ///
    /// # Errors
    /// [`ErrorKind::Damaged`] if it is none, [`ErrorKind::Unsupported`] if it is of another version or compression,
    /// [`ErrorKind::Disk`].
    pub fn open(disk: Arc<dyn Disk>) -> Result<Self> {
        let version = Fields(&read_within(disk.as_ref(), 0, superblock::SUPERBLOCK_SIZE)?).le16(28);
        if let Some(version) = version.filter(|version| *version != 4) {
            return Err(Error::unsupported(format!("it is of version {version}, where 4 is read")));
        }
        let device = Arc::new(Device { disk, failed: Mutex::default() });
        let what = "the filesystem cannot be opened";
        let Superblock { root_inode_ref, block_size, .. } =
            superblock::read(device.as_ref()).map_err(|error| device.explain(error, what))?;
        // Below are granules already.
        let filesystem = Filesystem::open_with_cache(device.clone(), 0).map_err(|error| device.explain(error, what))?;
        let block_size = u64::from(block_size).max(1);
        filesystem.set_data_cache_capacity(KEPT_BYTES / usize::try_from(block_size).unwrap_or(usize::MAX));
        let fs = Self { device, filesystem, root: root_inode_ref, block_size, last: RefCell::default() };
        fs.attributes(fs.root())?;
        Ok(fs)
    }

    fn stored(&self, inode: Inode) -> Result<Rc<fs_squashfs::Inode>> {
        if let Some((last, stored)) = &*self.last.borrow()
            && *last == inode
        {
            return Ok(stored.clone());
        }
        if inode.0 >> 48 != 0 {
            return Err(Error::new(ErrorKind::NotFound, format!("nothing has the number {}", inode.0)));
        }
        let stored = self.filesystem.read_inode(inode.0).map_err(|error| self.explain(error, inode))?;
        let stored = Rc::new(stored);
        *self.last.borrow_mut() = Some((inode, stored.clone()));
        Ok(stored)
    }

    fn explain(&self, error: fs_squashfs::Error, inode: Inode) -> Error {
        self.device.explain(error, &format!("file {} cannot be read", inode.0))
    }

    /// Returns how many bytes of a file stand nowhere, being zeroes.
    fn holes(&self, stored: &fs_squashfs::Inode) -> u64 {
        let holes = (0..).zip(&stored.block_sizes).filter(|(_, size)| is_hole(**size));
        holes.map(|(block, _): (u64, _)| self.block_size.min(stored.file_size - block * self.block_size)).sum()
    }
}

/// Returns whether a block of which this is said is not stored.
fn is_hole(size: u32) -> bool {
    fs_squashfs::table::data_on_disk_size(size) == 0
}

fn not(what: &str, inode: Inode) -> Error {
    Error::new(ErrorKind::WrongKind, format!("file {} is no {what}", inode.0))
}

impl GuestFs for Squashfs {
    fn root(&self) -> Inode {
        Inode(self.root)
    }

    fn facts(&self) -> Facts {
        Facts { kind: "squashfs".to_owned(), ..Facts::default() }
    }

    fn list(&self, directory: Inode) -> Result<Vec<Entry>> {
        let stored = self.stored(directory)?;
        if !stored.is_dir() {
            return Err(not("directory", directory));
        }
        if stored.dir_listing_len() > MAX_LISTING {
            let message = format!("directory {} takes more than {MAX_LISTING} bytes", directory.0);
            return Err(Error::new(ErrorKind::TooMuch, message));
        }
        let entries = self.filesystem.read_dir(&stored).map_err(|error| self.explain(error, directory))?;
        Ok(entries.into_iter().map(|entry| Entry { name: entry.name, inode: Inode(entry.inode_ref) }).collect())
    }

    fn attributes(&self, inode: Inode) -> Result<Attributes> {
        let stored = self.stored(inode)?;
        let kind = match stored.file_type() {
            FileType::Dir => Kind::Directory,
            FileType::RegFile => Kind::File,
            FileType::Symlink => Kind::Symlink,
            FileType::Fifo => Kind::Fifo,
            FileType::Socket => Kind::Socket,
            FileType::CharDev => Kind::CharacterDevice,
            FileType::BlockDev => Kind::BlockDevice,
            FileType::Unknown => return Err(Error::damaged(format!("file {} is of no kind", inode.0))),
        };
        if i64::try_from(stored.file_size).is_err() {
            return Err(Error::damaged(format!("file {} is of {} bytes", inode.0, stored.file_size)));
        }
        let owner = |owner: fs_squashfs::Result<u32>| owner.map_err(|error| self.explain(error, inode));
        let allocated = match kind {
            Kind::File => (stored.file_size - self.holes(&stored)).next_multiple_of(SECTOR),
            _ => 0,
        };
        let time = Time { seconds: stored.mtime.into(), nanoseconds: 0 };
        Ok(Attributes {
            kind,
            mode: stored.permissions & 0o7777,
            uid: owner(self.filesystem.resolve_uid(stored.uid_idx))?,
            gid: owner(self.filesystem.resolve_gid(stored.gid_idx))?,
            links: stored.nlink,
            size: stored.file_size,
            allocated,
            device: (stored.rdev_major(), stored.rdev_minor()),
            accessed: time,
            modified: time,
            changed: time,
            created: None,
        })
    }

    fn target(&self, inode: Inode) -> Result<Vec<u8>> {
        let stored = self.stored(inode)?;
        if !stored.is_symlink() {
            return Err(not("symbolic link", inode));
        }
        Ok(stored.symlink_target.clone())
    }

    fn xattrs(&self, inode: Inode) -> Result<Vec<Xattr>> {
        let stored = self.stored(inode)?;
        let found = self.filesystem.list_xattrs(&stored).map_err(|error| self.explain(error, inode))?;
        Ok(found.into_iter().map(|found| Xattr { name: found.name, value: found.value }).collect())
    }

    fn extents(&self, inode: Inode, from: u64, room: usize) -> Result<Extents> {
        let stored = self.stored(inode)?;
        if !stored.is_regular_file() {
            return Err(not("file", inode));
        }
        let size = stored.file_size;
        let mut found = Vec::new();
        let mut at = from;
        // Past the blocks is what the file shares with others.
        let is_stored = |at: u64| {
            let block = usize::try_from(at / self.block_size).unwrap_or(usize::MAX);
            stored.block_sizes.get(block).is_none_or(|size| !is_hole(*size))
        };
        let next = |at: u64| (at / self.block_size).saturating_add(1).saturating_mul(self.block_size).min(size);
        while at < size && found.len() < room.max(1) {
            let start = at;
            while at < size && is_stored(at) {
                at = next(at);
            }
            if at > start {
                found.push(Extent { start, len: at - start, source: Source::Encoded });
            }
            while at < size && !is_stored(at) {
                at = next(at);
            }
        }
        Ok(Extents { found, until: at })
    }

    fn decode(&self, inode: Inode, offset: u64, buffer: &mut [u8]) -> Result<()> {
        let stored = self.stored(inode)?;
        if !stored.is_regular_file() {
            return Err(not("file", inode));
        }
        let read = self.filesystem.read_file(&stored, offset, buffer).map_err(|error| self.explain(error, inode))?;
        if read < buffer.len() {
            let (len, size) = (buffer.len(), stored.file_size);
            return Err(Error::damaged(format!("{len} bytes at {offset} do not lie within a file of {size} bytes")));
        }
        Ok(())
    }
}

/// What rust-fs-squashfs reads.
struct Device {
    disk: Arc<dyn Disk>,
    /// What the disk failed with last.
    failed: Mutex<Option<disk::Error>>,
}

impl Device {
    /// Returns what an error means: one of the disk, if that failed meanwhile.
    fn explain(&self, error: fs_squashfs::Error, what: &str) -> Error {
        if let Some(error) = self.failed.lock().unwrap_or_else(PoisonError::into_inner).take() {
            return error.into();
        }
        let kind = match error {
            fs_squashfs::Error::UnsupportedCompression(_) => ErrorKind::Unsupported,
            _ => ErrorKind::Damaged,
        };
        Error::new(kind, format!("{what}: {error}"))
    }
}

impl BlockRead for Device {
    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> fs_core::Result<()> {
        // A reference past the end is the guest's, not the disk's.
        if offset.checked_add(buffer.len() as u64).is_none_or(|end| end > self.disk.size()) {
            return Err(fs_core::Error::Custom(format!("{} bytes at {offset} do not lie within it", buffer.len())));
        }
        self.disk.read_at(offset, buffer).map_err(|error| {
            let cause = fs_core::Error::Custom(error.to_string());
            *self.failed.lock().unwrap_or_else(PoisonError::into_inner) = Some(error);
            cause
        })
    }

    fn size_bytes(&self) -> u64 {
        self.disk.size()
    }
}
