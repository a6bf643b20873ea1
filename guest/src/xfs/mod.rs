//! XFS, versions 4 and 5.
//!
//! ```text
//! Xfs ─┬─ attributes, directory, content    what a guest would see
//!      ├─ Volume ─ inodes by rust-fs-xfs    of what looks unmounted
//!      └─ Overlay ◀─ log                    what was committed and not yet written in its place
//! ```
//!
//! A volume that was not unmounted is read as Linux would after it replayed the log. What Linux does besides is not done:
//! it frees what was deleted while open, which has no name. A log that cannot be replayed is said to be so.
//! What a file holds is never in a log, so the extents of files lead to the disk itself.

mod attributes;
mod checksum;
mod content;
mod directory;
mod log;
mod volume;

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, PoisonError};

use disk::Disk;

use crate::ext::uuid;
use crate::{Attributes, Entry, Error, ErrorKind, Extents, Facts, GuestFs, Inode, Result, Xattr};
use content::Map;
use volume::{Node, Volume};

/// Bytes of metadata that one question but a listing costs at most.
const METADATA: u64 = 128 << 20;

/// Bytes of a directory at most.
const DIRECTORY: u64 = 1 << 30;

/// Bytes of all extended attributes of a file at most.
const MAX_XATTRS: usize = 1 << 20;

/// A volume of XFS.
pub struct Xfs {
    volume: Volume,
    facts: Facts,
    /// Inodes of which a change is half done.
    unfinished: BTreeSet<u64>,
    /// Of the file that was asked for last: windows of one are asked for in a row.
    map: Mutex<Option<Arc<Map>>>,
}

impl Xfs {
    /// Opens the volume that a disk is, and replays its log in memory.
    ///
    /// # Errors
    /// [`ErrorKind::Damaged`] if it is none, [`ErrorKind::Unsupported`] if it has a feature that is not read,
    /// [`ErrorKind::Disk`]. A log that cannot be replayed is no error but among the [facts](GuestFs::facts).
    pub fn open(disk: Arc<dyn Disk>) -> Result<Self> {
        let (volume, replay) = Volume::open(disk)?;
        let superblock = volume.superblock();
        let facts = Facts {
            kind: "xfs".to_owned(),
            label: superblock.fname.clone(),
            uuid: uuid(&volume.uuid()),
            is_replayed: replay.is_replayed,
            problems: replay.problems,
        };
        Ok(Self { volume, facts, unfinished: replay.unfinished, map: Mutex::new(None) })
    }

    /// Returns an inode to be asked what it holds.
    fn node(&self, inode: Inode) -> Result<Node> {
        if self.unfinished.contains(&inode.0) {
            return Err(Error::unsupported(format!(
                "a change of inode {} was half done when the guest stopped",
                inode.0
            )));
        }
        self.volume.node(inode)
    }

    fn map(&self, inode: Inode) -> Result<Arc<Map>> {
        let mut kept = self.map.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(map) = kept.as_ref().filter(|map| map.inode() == inode) {
            return Ok(map.clone());
        }
        // What is kept makes room first.
        *kept = None;
        let node = self.node(inode)?;
        let map = Arc::new(Map::of_file(&self.volume, &node)?);
        *kept = Some(map.clone());
        Ok(map)
    }
}

impl GuestFs for Xfs {
    fn root(&self) -> Inode {
        Inode(self.volume.superblock().rootino)
    }

    fn facts(&self) -> Facts {
        self.facts.clone()
    }

    fn list(&self, directory: Inode) -> Result<Vec<Entry>> {
        self.volume.allow(DIRECTORY);
        directory::list(&self.volume, &self.node(directory)?)
    }

    fn attributes(&self, inode: Inode) -> Result<Attributes> {
        self.volume.allow(METADATA);
        attributes::of(&self.volume, &self.volume.node(inode)?)
    }

    fn target(&self, inode: Inode) -> Result<Vec<u8>> {
        self.volume.allow(METADATA);
        let node = self.node(inode)?;
        if !node.inode.is_symlink() {
            return Err(Error::new(ErrorKind::WrongKind, format!("inode {} is no symbolic link", inode.0)));
        }
        let found = self.volume.filesystem().read_link(&node.inode, &node.raw);
        let mut target = self.volume.explain(found, || format!("the target of inode {}", inode.0))?;
        // For the kernel it ends there.
        if let Some(end) = target.iter().position(|byte| *byte == 0) {
            target.truncate(end);
        }
        Ok(target)
    }

    fn xattrs(&self, inode: Inode) -> Result<Vec<Xattr>> {
        self.volume.allow(METADATA);
        let node = self.node(inode)?;
        let found = self.volume.filesystem().list_xattrs(&node.inode, &node.raw);
        let found = self.volume.explain(found, || format!("attributes of inode {}", inode.0))?;
        if found.iter().map(|xattr| xattr.name.len() + xattr.value.len()).sum::<usize>() > MAX_XATTRS {
            let message = format!("the attributes of inode {} take more than {MAX_XATTRS} bytes", inode.0);
            return Err(Error::new(ErrorKind::TooMuch, message));
        }
        Ok(found.into_iter().map(|xattr| Xattr { name: xattr.name, value: xattr.value }).collect())
    }

    fn extents(&self, inode: Inode, from: u64, room: usize) -> Result<Extents> {
        self.volume.allow(METADATA);
        Ok(self.map(inode)?.window(from, room))
    }
}
