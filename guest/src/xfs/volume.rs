//! The volume: its superblock, its inodes, and the errors of both.
//!
//! rust-fs-xfs reads the structures and checks them. It is shown a volume that was unmounted: its log is one block of
//! zeroes, and no allocation group has a list of inodes that were deleted while open (it refuses those). The headers of
//! the groups that say so are made up, since no reader needs them: an open costs the same however many groups there are.
//! Its errors do not keep those of the disk, so the last of these is kept here: a network that failed is no damage.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use disk::Disk;
use fs_xfs::inode::Inode;
use fs_xfs::{Filesystem, Superblock};

use super::checksum;
use super::log::{self, Replay};
use crate::read::read_within;
use crate::{Error, ErrorKind, Overlay, Result};

/// Bytes in which the superblock is looked for; its sector is no longer in any volume that Linux has made.
const HEAD: usize = 4096;

/// Allocation groups at most, which bounds an open; those of a volume that grew from 16 MiB to 16 TiB are as many.
const MAX_GROUPS: u32 = 1 << 20;

/// Blocks of a group at least.
const MIN_GROUP: u32 = 64;

/// An inode that is in use, checked.
#[derive(Debug)]
pub(super) struct Node {
    pub(super) number: u64,
    pub(super) inode: Inode,
    /// As it stands on the volume, with what follows the fields.
    pub(super) raw: Vec<u8>,
}

impl Node {
    /// Returns the names that it has.
    pub(super) fn links(&self) -> u32 {
        // The first version had 16 bits for them, elsewhere.
        match self.inode.version {
            1 => u32::from(u16::from_be_bytes([self.raw[6], self.raw[7]])),
            _ => self.inode.nlink,
        }
    }
}

/// A volume whose inodes can be read.
pub(super) struct Volume {
    device: Arc<Device>,
    filesystem: Filesystem,
    uuid: [u8; 16],
}

impl Volume {
    /// Opens a volume as it is once its log was replayed.
    pub(super) fn open(disk: Arc<dyn Disk>) -> Result<(Self, Replay)> {
        let mut superblock = read_superblock(disk.as_ref())?;
        let mut replay = log::replay(&disk, &superblock)?;
        let mut overlay = Overlay::new(disk);
        if !replay.changes.is_empty() {
            for (offset, bytes) in std::mem::take(&mut replay.changes) {
                overlay.lay_bytes(offset, bytes)?;
            }
            superblock = read_superblock(&overlay)?;
        }
        hide_log(&mut overlay, &superblock)?;
        let groups = Groups::new(&superblock);
        let device = Arc::new(Device { disk: overlay, groups, state: Mutex::new(State::new(u64::MAX)) });
        let opened = Filesystem::mount_with_cache(device.clone(), 0);
        let filesystem = device.explain(opened, || "the filesystem cannot be opened".to_owned())?;
        Ok((Self { device, filesystem, uuid: superblock.uuid }, replay))
    }

    pub(super) fn filesystem(&self) -> &Filesystem {
        &self.filesystem
    }

    /// The superblock; its identifier is the one that metadata has.
    pub(super) fn superblock(&self) -> &Superblock {
        self.filesystem.superblock()
    }

    /// The identifier that a guest sees, which can be changed.
    pub(super) fn uuid(&self) -> [u8; 16] {
        self.uuid
    }

    pub(super) fn block_size(&self) -> u64 {
        u64::from(self.superblock().blocksize)
    }

    /// Lets what is asked next read so many bytes, which bounds what it keeps in memory.
    pub(super) fn allow(&self, bytes: u64) {
        *self.device.state() = State::new(bytes);
    }

    /// Fills `buffer` with bytes of metadata from `offset` on.
    pub(super) fn read(&self, offset: u64, buffer: &mut [u8], what: impl FnOnce() -> String) -> Result<()> {
        let read = fs_core::BlockRead::read_at(self.device.as_ref(), offset, buffer);
        self.explain(read.map_err(Into::into), what)
    }

    /// Returns an inode that is in use.
    pub(super) fn node(&self, inode: crate::Inode) -> Result<Node> {
        let number = inode.0;
        let missing = || Error::new(ErrorKind::NotFound, format!("no inode {number} is in use"));
        let superblock = self.superblock();
        let block_bits = u32::from(superblock.inopblog);
        let block = number >> block_bits;
        let (group, in_group) = (block >> superblock.agblklog, block & ((1 << superblock.agblklog) - 1));
        if group >= u64::from(superblock.agcount) || in_group >= u64::from(superblock.agblocks) {
            return Err(missing());
        }
        let read = self.filesystem.read_inode_raw(number);
        let (inode, raw) = self.explain(read, || format!("inode {number} cannot be read"))?;
        let node = Node { number, inode, raw };
        if node.inode.mode == 0 || node.links() == 0 {
            return Err(missing());
        }
        Ok(node)
    }

    /// Returns what an error means: one of the disk, if that failed meanwhile.
    pub(super) fn explain<T>(&self, result: fs_xfs::Result<T>, what: impl FnOnce() -> String) -> Result<T> {
        self.device.explain(result, what)
    }
}

/// Reads the superblock, and checks that it is of a filesystem that lies on the disk.
fn read_superblock(disk: &dyn Disk) -> Result<Superblock> {
    let superblock = Superblock::parse(&read_within(disk, 0, HEAD)?).map_err(|error| convert(&error, None))?;
    let size = superblock.dblocks.checked_mul(u64::from(superblock.blocksize));
    if size.is_none_or(|size| size > disk.size()) {
        return Err(Error::damaged(format!(
            "the filesystem has {} blocks of {} bytes, which is more than its volume of {} bytes",
            superblock.dblocks,
            superblock.blocksize,
            disk.size()
        )));
    }
    let count = superblock.dblocks.div_ceil(u64::from(superblock.agblocks));
    if superblock.agblocks < MIN_GROUP || count != u64::from(superblock.agcount) {
        return Err(Error::damaged(format!(
            "{} blocks cannot be {} allocation groups of {} blocks",
            superblock.dblocks, superblock.agcount, superblock.agblocks
        )));
    }
    if superblock.agcount > MAX_GROUPS {
        let message = format!("it has {} allocation groups; {MAX_GROUPS} are read at most", superblock.agcount);
        return Err(Error::new(ErrorKind::TooMuch, message));
    }
    if !superblock.has_internal_log() {
        return Err(Error::unsupported("its log is on a device of its own, which is not read"));
    }
    Ok(superblock)
}

// Offsets in a superblock.
const UUID: usize = 32;
const LOG_BLOCKS: usize = 96;
const INCOMPATIBLE: usize = 216;
const CHECKSUM: usize = 224;

/// The identifier of metadata is not that of the filesystem.
const META_UUID: u32 = 1 << 2;

/// Lets the log be empty, and the identifier of the filesystem be that of its metadata, which rust-fs-xfs expects of some.
fn hide_log(overlay: &mut Overlay, superblock: &Superblock) -> Result<()> {
    let log = superblock.fsblock_offset(superblock.logstart);
    overlay.lay_zeroes(log, u64::from(superblock.blocksize))?;
    let mut sector = vec![0; usize::from(superblock.sectsize)];
    overlay.read_at(0, &mut sector)?;
    sector[LOG_BLOCKS..LOG_BLOCKS + 4].copy_from_slice(&1_u32.to_be_bytes());
    if superblock.is_v5() {
        sector[UUID..UUID + 16].copy_from_slice(&superblock.meta_uuid);
        let incompatible = superblock.features_incompat & !META_UUID;
        sector[INCOMPATIBLE..INCOMPATIBLE + 4].copy_from_slice(&incompatible.to_be_bytes());
        checksum::set(&mut sector, CHECKSUM);
    }
    overlay.lay_bytes(0, sector)
}

/// The headers of allocation groups in which inodes are found, without any that was deleted while open.
struct Groups {
    count: u32,
    bytes: u64,
    sector: usize,
    uuid: Option<[u8; 16]>,
}

impl Groups {
    fn new(superblock: &Superblock) -> Self {
        Self {
            count: superblock.agcount,
            bytes: u64::from(superblock.agblocks) * u64::from(superblock.blocksize),
            sector: usize::from(superblock.sectsize),
            uuid: superblock.is_v5().then_some(superblock.meta_uuid),
        }
    }

    /// Returns the header, if it is the one that lies there: the third sector of a group.
    ///
    /// Source: `struct xfs_agi` in Linux `fs/xfs/libxfs/xfs_format.h`.
    fn header_at(&self, offset: u64, len: usize) -> Option<Vec<u8>> {
        let group = u32::try_from(offset / self.bytes).ok().filter(|group| *group < self.count)?;
        if offset % self.bytes != 2 * self.sector as u64 || len != self.sector {
            return None;
        }
        let mut header = vec![0; self.sector];
        header[..4].copy_from_slice(b"XAGI");
        header[4..8].copy_from_slice(&1_u32.to_be_bytes());
        header[8..12].copy_from_slice(&group.to_be_bytes());
        // A tree of one level.
        header[24..28].copy_from_slice(&1_u32.to_be_bytes());
        header[40..296].fill(0xff);
        if let Some(uuid) = self.uuid {
            header[296..312].copy_from_slice(&uuid);
            checksum::set(&mut header, 312);
        }
        Some(header)
    }
}

/// What rust-fs-xfs reads.
pub(super) struct Device {
    disk: Overlay,
    /// Those that are made up.
    groups: Groups,
    state: Mutex<State>,
}

struct State {
    /// What the disk failed with last.
    failed: Option<disk::Error>,
    /// Bytes that may still be read.
    left: u64,
}

impl State {
    fn new(left: u64) -> Self {
        Self { failed: None, left }
    }
}

impl Device {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn explain<T>(&self, result: fs_xfs::Result<T>, what: impl FnOnce() -> String) -> Result<T> {
        result.map_err(|error| {
            let state = &mut *self.state();
            match state.failed.take() {
                Some(error) => error.into(),
                None if state.left == 0 => {
                    Error::new(ErrorKind::TooMuch, format!("{}: it takes more bytes than are read at once", what()))
                }
                None => convert(&error, Some(what())),
            }
        })
    }
}

fn convert(error: &fs_xfs::Error, what: Option<String>) -> Error {
    use fs_xfs::Error as Cause;
    let kind = match error {
        Cause::UnsupportedFeature(_) | Cause::RealtimeDeviceAbsent { .. } => ErrorKind::Unsupported,
        Cause::NotFound => ErrorKind::NotFound,
        Cause::NotADirectory | Cause::NotAFile => ErrorKind::WrongKind,
        _ => ErrorKind::Damaged,
    };
    let what = what.map(|what| format!("{what}: ")).unwrap_or_default();
    Error::new(kind, format!("{what}{error}"))
}

impl fs_core::BlockRead for Device {
    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> fs_core::Result<()> {
        let len = buffer.len() as u64;
        // A pointer past the end is the guest's, not the disk's.
        if offset.checked_add(len).is_none_or(|end| end > self.disk.size()) {
            return Err(fs_core::Error::OutOfBounds { offset, len, size: self.disk.size() });
        }
        if let Some(header) = self.groups.header_at(offset, buffer.len()) {
            buffer.copy_from_slice(&header);
            return Ok(());
        }
        {
            let state = &mut *self.state();
            if len > state.left {
                state.left = 0;
                return Err(fs_core::Error::Custom("more than is read at once".to_owned()));
            }
            state.left -= len;
        }
        self.disk.read_at(offset, buffer).map_err(|error| {
            let cause = fs_core::Error::Custom(error.to_string());
            self.state().failed = Some(error);
            cause
        })
    }

    fn size_bytes(&self) -> u64 {
        self.disk.size()
    }
}
