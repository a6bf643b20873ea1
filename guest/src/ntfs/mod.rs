//! NTFS.
//!
//! ```text
//! Ntfs ─┬─ directory, attributes (reparse), xattrs, content (lznt1, wof), log     what a guest would see
//!       ├─ Volume ─ Record, Stream ─ attributes of a file, wherever they are
//!       └─ Boot, runs, name                                                       how it is stored
//! ```
//!
//! Shown as ntfs-3g does: all names but the short ones of DOS, none of the filesystem's own files, streams as extended
//! attributes. Security descriptors are not shown, nor is what is encrypted. `$LogFile` is replayed where all of it is
//! understood; else that is said.

mod attributes;
mod boot;
mod content;
mod directory;
mod log;
mod lznt1;
mod record;
mod reparse;
mod runs;
mod stream;
mod volume;
mod wof;
mod xattrs;

use std::sync::{Arc, Mutex, PoisonError};

use disk::Disk;

use crate::utf16;
use crate::{Attributes, Entry, Error, ErrorKind, Extents, Facts, GuestFs, Inode, Result, Xattr};
use attributes::{Information, What};
use content::Unit;
use record::{DATA, Reference, VOLUME_NAME};
use reparse::Reparse;
use volume::{Node, ROOT, Volume};

/// Bytes of a target at most; the kernel takes a path of 4,095.
const MAX_TARGET: usize = 4095;

/// A volume of NTFS.
pub struct Ntfs {
    volume: Volume,
    facts: Facts,
    /// Programs read in smaller pieces than are compressed.
    decoded: Mutex<Unit>,
}

impl Ntfs {
    /// Opens the volume that a disk is.
    ///
    /// # Errors
    /// [`ErrorKind::Damaged`] if it is none, [`ErrorKind::Disk`]. A volume that was not unmounted is no error but among the
    /// [facts](GuestFs::facts).
    pub fn open(disk: Arc<dyn Disk>) -> Result<Self> {
        let mut volume = Volume::open(disk)?;
        let mut problems = Vec::new();
        let mut is_replayed = false;
        match log::replay(&volume).and_then(|disk| disk.map(Volume::open).transpose()) {
            Ok(Some(replayed)) => {
                volume = replayed;
                is_replayed = true;
            }
            Ok(None) => {}
            Err(error) => problems.push(format!(
                "Windows did not unmount the volume, and its journal ($LogFile) is not replayed: {error}; \
                 what was changed last may be missing or half done"
            )),
        }
        match log::is_marked_dirty(&volume) {
            Ok(false) => {}
            Ok(true) => problems.push("Windows marked the volume to be checked (chkdsk)".to_owned()),
            Err(error) => problems.push(format!("whether the volume is to be checked cannot be read: {error}")),
        }
        if volume.clusters < volume.boot.clusters {
            problems.push(format!(
                "the volume has {} clusters of {} bytes, and only {} are there",
                volume.boot.clusters, volume.boot.cluster_size, volume.clusters
            ));
        }
        let label = label(&volume).unwrap_or_else(|error| {
            problems.push(format!("the name of the volume cannot be read: {error}"));
            String::new()
        });
        let uuid = format!("{:016X}", volume.boot.serial);
        let facts = Facts { kind: "ntfs".to_owned(), label, uuid, is_replayed, problems };
        Ok(Self { volume, facts, decoded: Mutex::default() })
    }

    /// Returns whether a name means the file that its record holds now. Only where a journal was not replayed is there any
    /// doubt: a record may be of another file already, which must not have the name of the one before.
    fn is_current(&self, reference: Reference) -> Result<bool> {
        if self.facts.problems.is_empty() {
            return Ok(true);
        }
        match self.volume.record(reference.number) {
            Ok(record) => Ok(record.reference() == reference),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(false),
            // It is shown, and what is wrong is said of it.
            Err(error) if error.kind() == ErrorKind::Damaged => Ok(true),
            Err(error) => Err(error),
        }
    }

    fn node(&self, inode: Inode) -> Result<(Node, What)> {
        let node = self.volume.node(inode)?;
        let information = Information::of(&self.volume, &node)?;
        let what = attributes::what(&self.volume, &node, &information)?;
        Ok((node, what))
    }
}

fn label(volume: &Volume) -> Result<String> {
    let node = volume.own_node(log::VOLUME)?;
    let Some(stream) = volume.stream(&node, VOLUME_NAME, &[])? else { return Ok(String::new()) };
    let bytes = stream.read(volume, &node, 4096)?;
    Ok(char::decode_utf16(utf16::units(&bytes)).map(|unit| unit.unwrap_or(char::REPLACEMENT_CHARACTER)).collect())
}

impl GuestFs for Ntfs {
    fn root(&self) -> Inode {
        Inode(ROOT)
    }

    fn facts(&self) -> Facts {
        self.facts.clone()
    }

    fn list(&self, directory: Inode) -> Result<Vec<Entry>> {
        match self.node(directory)? {
            (node, What::Directory) => directory::list(&self.volume, &node, |reference| self.is_current(reference)),
            _ => Err(Error::new(ErrorKind::WrongKind, format!("file {} is no directory", directory.0))),
        }
    }

    fn attributes(&self, inode: Inode) -> Result<Attributes> {
        attributes::of(&self.volume, &self.volume.node(inode)?)
    }

    fn target(&self, inode: Inode) -> Result<Vec<u8>> {
        match self.node(inode)? {
            (_, What::Link(target)) if (1..=MAX_TARGET).contains(&target.len()) && !target.contains(&0) => Ok(target),
            (_, What::Link(target)) => {
                Err(Error::damaged(format!("the target of file {} has {} bytes, or a zero", inode.0, target.len())))
            }
            _ => Err(Error::new(ErrorKind::WrongKind, format!("file {} is no symbolic link", inode.0))),
        }
    }

    fn xattrs(&self, inode: Inode) -> Result<Vec<Xattr>> {
        xattrs::list(&self.volume, &self.volume.node(inode)?)
    }

    fn extents(&self, inode: Inode, from: u64, room: usize) -> Result<Extents> {
        let node = match self.node(inode)? {
            (node, What::File | What::Reparsed(Reparse::Unknown(_))) => node,
            (_, What::Reparsed(Reparse::Elsewhere(place))) => {
                return Err(Error::unsupported(format!("the content of file {} is {place}", inode.0)));
            }
            (node, What::Reparsed(Reparse::Compressed(method))) => {
                return wof::extents(&self.volume, &node, method, from);
            }
            _ => return Err(Error::new(ErrorKind::WrongKind, format!("file {} is no file", inode.0))),
        };
        match self.volume.stream(&node, DATA, &[])? {
            Some(stream) => content::extents(&self.volume, &node, &stream, from, room),
            None => Ok(Extents { found: Vec::new(), until: from }),
        }
    }

    fn decode(&self, inode: Inode, offset: u64, buffer: &mut [u8]) -> Result<()> {
        let node = self.volume.node(inode)?;
        let mut last = self.decoded.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(Reparse::Compressed(method)) = reparse::of(&self.volume, &node)? {
            return wof::decode(&self.volume, &node, method, offset, buffer, &mut last);
        }
        let stream = self.volume.stream(&node, DATA, &[])?;
        let stream = stream.ok_or_else(|| Error::damaged(format!("file {} has no content", inode.0)))?;
        content::decode(&self.volume, &node, &stream, offset, buffer, &mut last)
    }
}
