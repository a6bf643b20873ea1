//! Btrfs, on one device or several.
//!
//! ```text
//! Btrfs ─┬─ subvolumes, directory, attributes, content (extent)    what a guest would see
//!        ├─ log ─ what was synced after the last commit, laid over it
//!        └─ Volume ─ trees (View: with what is laid over them), and logical addresses by the chunk map
//!             └─ Devices ─ superblocks, members
//! ```
//!
//! Each item is found and checked by rust-fs-btrfs, and each block of a tree by its checksum, or else its other copy is
//! read. Data is not: it is read by whoever has the disk, who knows of no checksums, so what Linux would refuse to read
//! is read as it stands. Of two copies the first is taken, unless its device was left behind by the others.
//!
//! The last commit is always complete; what was synced after it stands in logs, which are replayed in memory. The top level
//! is shown, whatever the default subvolume is: all others are in it.
//!
//! A device that is missing costs what has no copy elsewhere. The [facts](GuestFs::facts) say it, and which log was left out.

mod attributes;
mod content;
mod devices;
mod directory;
mod extent;
mod log;
mod subvolumes;
mod view;
mod volume;

use std::ops::ControlFlow;
use std::sync::Arc;

use disk::Disk;

use crate::{Attributes, Entry, Error, ErrorKind, Extents, Facts, GuestFs, Inode, Result, Xattr};
use content::Unpacked;
use devices::Devices;
pub(crate) use devices::Identity;
use subvolumes::{EMPTY, Place, ROOT, TOP};
use volume::{Root, Volume};

/// Bytes of all extended attributes of a file at most.
const MAX_VALUES: usize = 1 << 20;

/// Bytes of a target at most.
const MAX_TARGET: u64 = 4095;

/// A filesystem on one device or several.
pub struct Btrfs {
    volume: Volume,
    unpacked: Unpacked,
    is_replayed: bool,
    /// What of the logs is not shown.
    problems: Vec<String>,
}

impl Btrfs {
    /// Opens the filesystem that is on these devices, in any order; [`Source::Member`](crate::Source::Member) numbers them
    /// in this one.
    ///
    /// # Errors
    /// [`ErrorKind::Damaged`] if there is none, [`ErrorKind::Unsupported`] if it has a feature that is not read or a
    /// device is missing without which no file can be found, [`ErrorKind::Disk`].
    pub fn open(members: Vec<Arc<dyn Disk>>) -> Result<Self> {
        let mut volume = Volume::open(Devices::open(members)?)?;
        let log::Replayed { edits, problems } = log::replay(&volume)?;
        let is_replayed = !edits.is_empty();
        volume.edit(edits);
        let fs = Self { volume, unpacked: Unpacked::default(), is_replayed, problems };
        fs.attributes(fs.root()).map_err(|error| fs.volume.blame(error))?;
        Ok(fs)
    }

    /// Returns the root of the tree that a file is in, and its inode.
    fn stored(&self, place: Place) -> Result<(Root, fs_btrfs::inode::Inode)> {
        let missing = || Error::new(ErrorKind::NotFound, format!("no {place} is in use"));
        if place.inode < ROOT {
            return Err(missing());
        }
        let root = subvolumes::root(&self.volume, place.tree)?.ok_or_else(missing)?;
        let item = self.volume.item(root, place.key(fs_btrfs::inode::INODE_ITEM_KEY, 0))?.ok_or_else(missing)?;
        let what = format!("{place} cannot be read");
        let inode =
            fs_btrfs::inode::Inode::parse(&item, place.inode).map_err(|error| self.volume.explain(error, &what))?;
        if inode.nlink == 0 {
            return Err(missing());
        }
        Ok((root, inode))
    }
}

impl GuestFs for Btrfs {
    fn root(&self) -> Inode {
        Place { tree: TOP, inode: ROOT }.number().expect("both are small")
    }

    fn facts(&self) -> Facts {
        let superblock = self.volume.devices().superblock();
        let problems = self.volume.problems().into_iter().chain(self.problems.iter().cloned()).collect();
        Facts {
            kind: "btrfs".to_owned(),
            label: superblock.label.clone(),
            uuid: crate::ext::uuid(&superblock.fsid),
            is_replayed: self.is_replayed,
            problems,
        }
    }

    fn list(&self, directory: Inode) -> Result<Vec<Entry>> {
        let place = Place::of(directory);
        if place.inode == EMPTY {
            return Ok(Vec::new());
        }
        let (root, inode) = self.stored(place)?;
        if !inode.is_dir() {
            return Err(Error::new(ErrorKind::WrongKind, format!("{place} is no directory")));
        }
        directory::list(&self.volume, root, place)
    }

    fn attributes(&self, inode: Inode) -> Result<Attributes> {
        let place = Place::of(inode);
        let volume = &self.volume;
        if place.inode == EMPTY {
            let (_, top) = self.stored(Place { inode: ROOT, ..place })?;
            return attributes::of_empty(volume, &top);
        }
        attributes::of(volume, &self.stored(place)?.1)
    }

    fn target(&self, inode: Inode) -> Result<Vec<u8>> {
        let place = Place::of(inode);
        let (root, inode) = self.stored(place)?;
        if !inode.is_symlink() {
            return Err(Error::new(ErrorKind::WrongKind, format!("{place} is no symbolic link")));
        }
        if inode.size > MAX_TARGET {
            return Err(Error::damaged(format!("{place} is a symbolic link of {} bytes", inode.size)));
        }
        let mut target = content::first_inline(&self.volume, root, place)?;
        target.truncate(usize::try_from(inode.size).expect("no more than MAX_TARGET"));
        Ok(target)
    }

    fn xattrs(&self, inode: Inode) -> Result<Vec<Xattr>> {
        let place = Place::of(inode);
        if place.inode == EMPTY {
            return Ok(Vec::new());
        }
        let (root, _) = self.stored(place)?;
        let mut found = Vec::new();
        let mut bytes = 0;
        self.volume.items(root, place.key(fs_btrfs::dir::XATTR_ITEM_KEY, 0), |_, item| {
            bytes += item.len();
            if bytes > MAX_VALUES {
                let message = format!("the attributes of {place} take more than {MAX_VALUES} bytes");
                return Err(Error::new(ErrorKind::TooMuch, message));
            }
            let what = format!("the attributes of {place} cannot be read");
            let stored = fs_btrfs::xattr::parse_xattr_items(item).map_err(|error| self.volume.explain(error, &what))?;
            found.extend(stored.into_iter().map(|stored| Xattr { name: stored.name, value: stored.value }));
            Ok(ControlFlow::Continue(()))
        })?;
        Ok(found)
    }

    fn extents(&self, inode: Inode, from: u64, room: usize) -> Result<Extents> {
        let place = Place::of(inode);
        let (root, inode) = self.stored(place)?;
        if !inode.is_regular_file() {
            return Err(Error::new(ErrorKind::WrongKind, format!("{place} is no file")));
        }
        let size = attributes::size(&inode)?;
        content::extents(&self.volume, root, place, content::Window { from, size, room: room.max(1) })
    }

    fn decode(&self, inode: Inode, offset: u64, buffer: &mut [u8]) -> Result<()> {
        let place = Place::of(inode);
        let (root, _) = self.stored(place)?;
        self.unpacked.read(&self.volume, root, place, offset, buffer)
    }
}
