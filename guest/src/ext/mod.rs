//! ext2, ext3 and ext4.
//!
//! ```text
//! Ext ─┬─ directory, xattrs (acl), attributes, content (map)    what a guest would see
//!      ├─ Volume ─ inodes by rust-fs-ext4, blocks
//!      │    └─ changes ◀─ journal                               ... fast, since the last transaction
//!      └─ Overlay ◀─ journal                                    what was committed and not yet written in its place
//! ```
//!
//! A volume that was not unmounted is read as Linux would after it replayed the journal. What Linux does besides is not
//! done: it frees what was deleted while open, which has no name, and what a file has past its end, which nobody sees;
//! of a file whose truncation was under way it also sets the times to those of the mount, where the guest's stay here.

mod acl;
mod attributes;
mod changes;
mod content;
mod directory;
mod journal;
mod map;
mod volume;
mod xattrs;

use std::sync::Arc;

use disk::Disk;
use fs_ext4::checksum::Checksummer;
use fs_ext4::features::{Compat, Incompat, RoCompat};
use fs_ext4::inode::InodeFlags;
use fs_ext4::superblock::{EXT4_VALID_FS, Superblock};

use crate::{Attributes, Entry, Error, ErrorKind, Extents, Facts, GuestFs, Inode, Overlay, Result, Xattr};
use changes::Changes;
use journal::{Change, Replay, without_fast_commits};
use map::Blocks;
use volume::{ROOT, Volume};

/// Bytes of a target at most; the kernel takes a path of 4,095.
const MAX_TARGET: u32 = 4096;

/// Bytes of an inode in which a short target stands.
const FAST_TARGET: usize = 60;

/// A volume of ext2, ext3 or ext4.
pub struct Ext {
    volume: Volume,
    facts: Facts,
}

impl Ext {
    /// Opens the volume that a disk is, and replays its journal in memory.
    ///
    /// # Errors
    /// [`ErrorKind::Damaged`] if it is none, [`ErrorKind::Unsupported`] if it has a feature that is not read,
    /// [`ErrorKind::Disk`]. A journal that cannot be replayed is no error but among the [facts](GuestFs::facts).
    pub fn open(disk: Arc<dyn Disk>) -> Result<Self> {
        let stored = volume::read_superblock(disk.as_ref())?;
        let superblock = Superblock::parse(stored).map_err(|error| Error::damaged(error.to_string()))?;
        if !Checksummer::from_superblock(&superblock).verify_superblock(&superblock.raw) {
            return Err(Error::damaged("the superblock has a wrong checksum"));
        }
        let mut volume = Volume::open(Overlay::new(disk.clone()))?;
        let mut replay = journal::replay(&volume, &superblock)?;
        if replay.is_replayed {
            match replay.laid_over(disk.clone(), volume.block_size()).and_then(Volume::open) {
                Ok(replayed) => volume = replayed,
                Err(error) => replay = journal::impossible(error)?,
            }
        }
        if !replay.changes.is_empty() {
            let changes = std::mem::take(&mut replay.changes);
            match changed(&volume, changes, &replay, disk) {
                Ok(changed) => volume = changed,
                Err(error) => replay.problems.push(without_fast_commits(error)?),
            }
        }
        if superblock.state & EXT4_VALID_FS == 0 && superblock.feature_compat & Compat::HAS_JOURNAL.bits() == 0 {
            replay.problems.push(
                "The filesystem was in use and has no journal: what was written last may be missing, old or damaged"
                    .to_owned(),
            );
        }
        let facts = Facts {
            kind: kind(&superblock).to_owned(),
            label: volume.superblock().volume_name.clone(),
            uuid: uuid(&superblock.uuid),
            is_replayed: replay.is_replayed,
            problems: replay.problems,
        };
        Ok(Self { volume, facts })
    }
}

/// Returns the volume with what was committed fast.
fn changed(volume: &Volume, changes: Vec<Change>, replay: &Replay, disk: Arc<dyn Disk>) -> Result<Volume> {
    let changes = Changes::new(volume, changes)?;
    let mut overlay = replay.laid_over(disk, volume.block_size())?;
    volume.lay_inodes(&changes, &mut overlay)?;
    Ok(Volume::open(overlay)?.with_changes(changes))
}

impl GuestFs for Ext {
    fn root(&self) -> Inode {
        Inode(u64::from(ROOT))
    }

    fn facts(&self) -> Facts {
        self.facts.clone()
    }

    fn list(&self, directory: Inode) -> Result<Vec<Entry>> {
        directory::list(&self.volume, &self.volume.node(directory)?)
    }

    fn attributes(&self, inode: Inode) -> Result<Attributes> {
        attributes::of(&self.volume, &self.volume.node(inode)?)
    }

    fn target(&self, inode: Inode) -> Result<Vec<u8>> {
        let node = self.volume.node(inode)?;
        if !node.inode.is_symlink() {
            return Err(Error::new(ErrorKind::WrongKind, format!("inode {} is no symbolic link", inode.0)));
        }
        node.check_plain()?;
        let size = usize::try_from(node.inode.size).unwrap_or(usize::MAX);
        let mut target = if size < FAST_TARGET && !node.has(InodeFlags::INLINE_DATA) {
            node.inode.block[..size].to_vec()
        } else {
            content::read(&self.volume, &node, MAX_TARGET)?
        };
        // For the kernel it ends there.
        if let Some(end) = target.iter().position(|byte| *byte == 0) {
            target.truncate(end);
        }
        Ok(target)
    }

    fn xattrs(&self, inode: Inode) -> Result<Vec<Xattr>> {
        xattrs::list(&self.volume, &self.volume.node(inode)?)
    }

    fn extents(&self, inode: Inode, from: u64, room: usize) -> Result<Extents> {
        let node = self.volume.node(inode)?;
        if !node.inode.is_file() {
            return Err(Error::new(ErrorKind::WrongKind, format!("inode {} is no file", inode.0)));
        }
        content::extents(&self.volume, &node, from, room)
    }
}

/// Returns which of the three it is, as blkid says it.
fn kind(superblock: &Superblock) -> &'static str {
    let ext3 = Incompat::FILETYPE.bits() | Incompat::RECOVER.bits() | Incompat::META_BG.bits();
    let ext3_ro = RoCompat::SPARSE_SUPER.bits() | RoCompat::LARGE_FILE.bits() | RoCompat::BTREE_DIR.bits();
    if superblock.feature_incompat & !ext3 != 0 || superblock.feature_ro_compat & !ext3_ro != 0 {
        "ext4"
    } else if superblock.feature_compat & Compat::HAS_JOURNAL.bits() != 0 {
        "ext3"
    } else {
        "ext2"
    }
}

/// Returns an identifier as it is written; nothing for one that is all zeroes.
pub(crate) fn uuid(bytes: &[u8; 16]) -> String {
    if *bytes == [0; 16] {
        return String::new();
    }
    let mut text = String::with_capacity(36);
    for (at, byte) in bytes.iter().enumerate() {
        if matches!(at, 4 | 6 | 8 | 10) {
            text.push('-');
        }
        text.push_str(&format!("{byte:02x}"));
    }
    text
}
