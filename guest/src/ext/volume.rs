//! The volume: its blocks, its inodes, and the errors of both.
//!
//! rust-fs-ext4 finds an inode and checks it; it is shown a volume without a journal, so that it never looks for one.
//! Its errors do not keep those of the disk, so the last of these is kept here: a network that failed is no damage.

use std::sync::{Arc, Mutex, PoisonError};

use disk::Disk;
use fs_ext4::bgd;
use fs_ext4::block_io::BlockDevice;
use fs_ext4::checksum::linux_crc32c;
use fs_ext4::features::{Compat, Incompat, RoCompat};
use fs_ext4::fs::Filesystem;
use fs_ext4::inode::{Inode, InodeFlags};
use fs_ext4::superblock::{SUPERBLOCK_OFFSET, SUPERBLOCK_SIZE, Superblock};

use super::changes::Changes;
use super::map::Blocks;
use crate::{Error, ErrorKind, Fields, Overlay, Result};

/// The root directory; lower than this and up to the first of the superblock are what the filesystem keeps for itself.
pub(super) const ROOT: u32 = 2;

/// Groups of blocks at most, some 100 bytes each in memory: those of 256 TiB in blocks of 4 KiB.
const MAX_GROUPS: u64 = 1 << 21;

/// Blocks that rust-fs-ext4 keeps in memory, 64 KiB each at most.
const CACHED_BLOCKS: usize = 256;

/// An inode that is in use, checked.
#[derive(Debug)]
pub(super) struct Node {
    pub(super) number: u32,
    pub(super) inode: Inode,
    /// As it stands on the volume, with what follows the fields.
    pub(super) raw: Vec<u8>,
}

impl Node {
    pub(super) fn has(&self, flag: InodeFlags) -> bool {
        self.inode.flags & flag.bits() != 0
    }

    /// Refuses what only the guest has the key to.
    pub(super) fn check_plain(&self) -> Result<()> {
        if self.has(InodeFlags::ENCRYPT) {
            return Err(Error::unsupported(format!(
                "inode {} is encrypted by the guest's filesystem: the key is not in the volume",
                self.number
            )));
        }
        Ok(())
    }
}

/// A volume whose blocks and inodes can be read.
pub(super) struct Volume {
    device: Arc<Device>,
    filesystem: Filesystem,
    changes: Changes,
}

impl Volume {
    /// Opens what the overlay shows; from here on it has no journal.
    pub(super) fn open(mut overlay: Overlay) -> Result<Self> {
        let mut superblock = read_superblock(&overlay)?;
        check_groups(&superblock)?;
        hide_journal(&mut superblock);
        overlay.lay_bytes(SUPERBLOCK_OFFSET, superblock)?;
        let device = Arc::new(Device { disk: overlay, failed: Mutex::new(None) });
        let mount = || Filesystem::mount_with_cache(device.clone(), CACHED_BLOCKS);
        let filesystem = device.explained("the filesystem cannot be opened", mount)?;
        Ok(Self { device, filesystem, changes: Changes::default() })
    }

    /// Lays inodes that were committed fast over what this volume shows.
    pub(super) fn lay_inodes(&self, changes: &Changes, overlay: &mut Overlay) -> Result<()> {
        for (number, raw) in changes.inodes() {
            let place = || bgd::locate_inode(&self.filesystem.sb, &self.filesystem.groups, number);
            let (block, offset) = self.device.explained(&format!("inode {number} is nowhere"), place)?;
            let start = block.checked_mul(self.block_size()).and_then(|start| start.checked_add(u64::from(offset)));
            let start = start.ok_or_else(|| Error::damaged(format!("inode {number} is in block {block}")))?;
            overlay.lay_bytes(start, self.with_checksum(number, raw))?;
        }
        Ok(())
    }

    /// Keeps names and ranges that were committed fast in mind.
    pub(super) fn with_changes(self, changes: Changes) -> Self {
        Self { changes, ..self }
    }

    pub(super) fn changes(&self) -> &Changes {
        &self.changes
    }

    /// Returns the bytes of an inode, whatever they are.
    pub(super) fn raw_inode(&self, number: u32) -> Result<Vec<u8>> {
        self.device.explained(&format!("inode {number} cannot be read"), || self.filesystem.read_inode_raw(number))
    }

    fn with_checksum(&self, number: u32, raw: &[u8]) -> Vec<u8> {
        let mut raw = raw.to_vec();
        let generation = Fields(&raw).le32(0x64).unwrap_or_default();
        if let Some((low, high)) = self.checksummer().compute_inode_checksum(number, generation, &raw) {
            raw[0x7c..0x7e].copy_from_slice(&low.to_le_bytes());
            // Where it is among the extra fields.
            if Fields(&raw).le16(0x80).is_some_and(|extra| extra >= 4) {
                raw[0x82..0x84].copy_from_slice(&high.to_le_bytes());
            }
        }
        raw
    }

    pub(super) fn superblock(&self) -> &Superblock {
        &self.filesystem.sb
    }

    pub(super) fn overlay(&self) -> &Overlay {
        &self.device.disk
    }

    pub(super) fn has_incompat(&self, feature: Incompat) -> bool {
        self.superblock().feature_incompat & feature.bits() != 0
    }

    pub(super) fn has_ro_compat(&self, feature: RoCompat) -> bool {
        self.superblock().feature_ro_compat & feature.bits() != 0
    }

    pub(super) fn checksummer(&self) -> &fs_ext4::checksum::Checksummer {
        &self.filesystem.csum
    }

    /// Returns an inode that is in use.
    pub(super) fn node(&self, inode: crate::Inode) -> Result<Node> {
        let missing = || Error::new(ErrorKind::NotFound, format!("no inode {} is in use", inode.0));
        let number = u32::try_from(inode.0).map_err(|_| missing())?;
        if number != ROOT && number < self.superblock().first_inode || number > self.superblock().inodes_count {
            return Err(missing());
        }
        match self.own_node(number) {
            Ok(node) if node.inode.links_count == 0 || node.inode.mode == 0 => Err(missing()),
            // One that was never written has no checksum either.
            Err(error)
                if error.kind() == ErrorKind::Damaged && self.raw_inode(number)?.iter().all(|byte| *byte == 0) =>
            {
                Err(missing())
            }
            result => result,
        }
    }

    /// Returns an inode, even one that no name leads to.
    pub(super) fn own_node(&self, number: u32) -> Result<Node> {
        let what = format!("inode {number} cannot be read");
        let (inode, raw) = self.device.explained(&what, || self.filesystem.read_inode_verified(number))?;
        Ok(Node { number, inode, raw })
    }
}

impl Blocks for Volume {
    fn block_size(&self) -> u64 {
        u64::from(self.superblock().block_size())
    }

    fn count(&self) -> u64 {
        self.superblock().blocks_count
    }

    fn read(&self, block: u64) -> Result<Vec<u8>> {
        if block == 0 || block >= self.count() {
            let count = self.count();
            return Err(Error::damaged(format!("block {block} is referred to, and the filesystem has {count}")));
        }
        let mut bytes = vec![0; usize::try_from(self.block_size()).expect("64 KiB at most")];
        self.overlay().read_at(block * self.block_size(), &mut bytes)?;
        Ok(bytes)
    }
}

/// Returns the superblock as it stands.
pub(super) fn read_superblock(disk: &dyn Disk) -> Result<Vec<u8>> {
    if disk.size() < SUPERBLOCK_OFFSET + SUPERBLOCK_SIZE as u64 {
        return Err(Error::damaged(format!("{} bytes are too few for a filesystem", disk.size())));
    }
    let mut bytes = vec![0; SUPERBLOCK_SIZE];
    disk.read_at(SUPERBLOCK_OFFSET, &mut bytes)?;
    Ok(bytes)
}

/// Refuses a superblock that makes rust-fs-ext4 read more descriptors of groups than there is memory for.
fn check_groups(superblock: &[u8]) -> Result<()> {
    let parsed = Superblock::parse(superblock.to_vec()).map_err(|error| Error::damaged(error.to_string()))?;
    let groups = parsed.block_group_count();
    if groups > MAX_GROUPS {
        let message = format!("the filesystem has {groups} groups of blocks; {MAX_GROUPS} are read at most");
        return Err(Error::new(ErrorKind::TooMuch, message));
    }
    Ok(())
}

const COMPAT: usize = 0x5c;
const INCOMPAT: usize = 0x60;
const JOURNAL_INODE: usize = 0xe0;
const JOURNAL_DEVICE: usize = 0xe4;
const CHECKSUM: usize = 0x3fc;

/// Takes the journal out of a superblock: rust-fs-ext4 looks into one whenever there is one, and refuses many that were
/// replayed here.
fn hide_journal(superblock: &mut [u8]) {
    let clear = |at: usize, bits: u32, superblock: &mut [u8]| {
        let field = &mut superblock[at..at + 4];
        let value = u32::from_le_bytes(field.try_into().expect("four bytes")) & !bits;
        field.copy_from_slice(&value.to_le_bytes());
    };
    clear(COMPAT, Compat::HAS_JOURNAL.bits(), superblock);
    clear(INCOMPAT, Incompat::RECOVER.bits(), superblock);
    clear(JOURNAL_INODE, u32::MAX, superblock);
    clear(JOURNAL_DEVICE, u32::MAX, superblock);
    let checksum = linux_crc32c(!0, &superblock[..CHECKSUM]);
    superblock[CHECKSUM..].copy_from_slice(&checksum.to_le_bytes());
}

/// What rust-fs-ext4 reads.
struct Device {
    disk: Overlay,
    /// What the disk failed with last.
    failed: Mutex<Option<disk::Error>>,
}

impl Device {
    /// Returns what `act` does; its error becomes one of the disk, if that failed meanwhile.
    fn explained<T>(&self, what: &str, act: impl FnOnce() -> fs_ext4::Result<T>) -> Result<T> {
        use fs_ext4::Error as Cause;
        let failed = || self.failed.lock().unwrap_or_else(PoisonError::into_inner);
        *failed() = None;
        let error = match act() {
            Ok(value) => return Ok(value),
            Err(error) => error,
        };
        if let Some(error) = failed().take() {
            return Err(error.into());
        }
        let kind = match error {
            Cause::UnsupportedIncompat(_) | Cause::UnsupportedRoCompat(_) | Cause::Unsupported(_) => {
                ErrorKind::Unsupported
            }
            Cause::NotFound | Cause::InvalidInode(_) | Cause::Stale => ErrorKind::NotFound,
            _ => ErrorKind::Damaged,
        };
        Err(Error::new(kind, format!("{what}: {error}")))
    }
}

impl BlockDevice for Device {
    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> fs_ext4::Result<()> {
        // A pointer past the end is the guest's, not the disk's.
        if offset.checked_add(buffer.len() as u64).is_none_or(|end| end > self.disk.size()) {
            return Err(fs_ext4::Error::OutOfBounds);
        }
        self.disk.read_at(offset, buffer).map_err(|error| {
            let cause = std::io::Error::other(error.to_string());
            *self.failed.lock().unwrap_or_else(PoisonError::into_inner) = Some(error);
            cause.into()
        })
    }

    fn size_bytes(&self) -> u64 {
        self.disk.size()
    }
}
