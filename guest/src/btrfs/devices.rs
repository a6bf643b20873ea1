//! The devices of a filesystem: what each says of itself, and reading from them.
//!
//! Source: "On-disk Format" of the documentation of Btrfs; Linux `include/uapi/linux/btrfs_tree.h`.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::sync::Arc;

use disk::Disk;
use fs_btrfs::superblock::{SUPER_INFO_SIZE, SUPER_OFFSETS, Superblock};

use super::volume::kind_of;
use crate::read::read_within;
use crate::{Error, Result};

/// What has one of the numbers by which a filesystem knows its devices.
struct Device {
    member: u16,
    disk: Arc<dyn Disk>,
    /// Of its superblock.
    generation: u64,
}

/// Whether a device can be had, and has what is new; the best is the least.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Standing {
    Current,
    /// It did not take part in the last commit: what it has may be old. All devices write their data before their superblocks,
    /// so what a commit was that broke off between these is on all.
    LeftBehind,
    Missing,
}

/// What a device says of itself and its filesystem.
pub(crate) struct Identity {
    pub(crate) filesystem: [u8; 16],
    pub(crate) number: u64,
    /// How many devices the filesystem is on.
    pub(crate) count: u64,
    pub(crate) generation: u64,
}

impl Identity {
    /// Reads what the device on a disk says.
    pub(crate) fn read(disk: &dyn Disk) -> Result<Self> {
        let superblock = read_superblock(disk)?;
        Ok(Self {
            filesystem: superblock.fsid,
            number: superblock.dev_item.devid,
            count: superblock.num_devices,
            generation: superblock.generation,
        })
    }
}

/// The devices of one filesystem, maybe not all of them.
pub(super) struct Devices {
    by_number: BTreeMap<u64, Device>,
    /// The newest.
    superblock: Superblock,
    /// What a disk failed with last.
    failed: RefCell<Option<disk::Error>>,
}

impl Devices {
    /// Reads the superblocks of the members.
    pub(super) fn open(members: Vec<Arc<dyn Disk>>) -> Result<Self> {
        let mut by_number = BTreeMap::new();
        let mut newest: Option<Superblock> = None;
        for (member, disk) in (0..).zip(members) {
            let superblock = read_superblock(disk.as_ref())?;
            if superblock.is_metadump() {
                return Err(Error::unsupported("it is a dump of metadata by btrfs-image: it has no contents of files"));
            }
            if newest.as_ref().is_some_and(|newest| newest.fsid != superblock.fsid) {
                return Err(Error::unsupported("these volumes are of different filesystems"));
            }
            let (number, generation) = (superblock.dev_item.devid, superblock.generation);
            if by_number.insert(number, Device { member, disk, generation }).is_some() {
                return Err(Error::unsupported(format!("two volumes are both device {number} of the filesystem")));
            }
            if newest.as_ref().is_none_or(|newest| newest.generation < generation) {
                newest = Some(superblock);
            }
        }
        let superblock = newest.ok_or_else(|| Error::unsupported("a filesystem has one volume at least"))?;
        Ok(Self { by_number, superblock, failed: RefCell::default() })
    }

    pub(super) fn superblock(&self) -> &Superblock {
        &self.superblock
    }

    /// Returns the numbers of the devices that are here.
    pub(super) fn numbers(&self) -> impl Iterator<Item = u64> {
        self.by_number.keys().copied()
    }

    /// Returns what can be had of a device.
    pub(super) fn standing(&self, number: u64) -> Standing {
        match self.by_number.get(&number) {
            None => Standing::Missing,
            Some(device) if device.generation < self.superblock.generation => Standing::LeftBehind,
            Some(_) => Standing::Current,
        }
    }

    /// Returns what is to be said of them.
    pub(super) fn problems(&self) -> Vec<String> {
        let behind = self.numbers().filter(|number| self.standing(*number) == Standing::LeftBehind);
        behind
            .map(|number| {
                format!(
                    "device {number} is older than the others: what has a second copy is read from there, what has none may \
                     be old or damaged"
                )
            })
            .collect()
    }

    /// Returns which of the members a device is, if `len` bytes at `offset` lie on it.
    pub(super) fn member(&self, number: u64, offset: u64, len: u64) -> Result<u16> {
        let device = self.by_number.get(&number).ok_or_else(|| missing(number))?;
        check_within(device, number, offset, len)?;
        Ok(device.member)
    }

    /// Fills a buffer.
    pub(super) fn read(&self, number: u64, offset: u64, buffer: &mut [u8]) -> Result<()> {
        let device = self.by_number.get(&number).ok_or_else(|| missing(number))?;
        check_within(device, number, offset, buffer.len() as u64)?;
        device.disk.read_at(offset, buffer).map_err(|error| {
            *self.failed.borrow_mut() = Some(error.clone());
            error.into()
        })
    }

    /// Returns what a disk failed with since this was last asked.
    pub(super) fn take_failure(&self) -> Option<disk::Error> {
        self.failed.take()
    }
}

fn missing(number: u64) -> Error {
    Error::unsupported(format!("device {number} of the filesystem is missing"))
}

fn check_within(device: &Device, number: u64, offset: u64, len: u64) -> Result<()> {
    let size = device.disk.size();
    if offset.checked_add(len).is_none_or(|end| end > size) {
        return Err(Error::damaged(format!(
            "{len} bytes at {offset} of device {number} do not lie within its {size} bytes"
        )));
    }
    Ok(())
}

/// Returns the superblock of a device: the first, as Linux does, or if that is damaged the newest of its copies.
fn read_superblock(disk: &dyn Disk) -> Result<Superblock> {
    let mut first_error = None;
    let mut newest: Option<Superblock> = None;
    for offset in SUPER_OFFSETS {
        let bytes = read_within(disk, offset, SUPER_INFO_SIZE)?;
        if bytes.len() < SUPER_INFO_SIZE {
            break;
        }
        match Superblock::parse_at(&bytes, offset) {
            Ok(superblock) if offset == SUPER_OFFSETS[0] => return Ok(superblock),
            Ok(superblock) if newest.as_ref().is_none_or(|newest| newest.generation < superblock.generation) => {
                newest = Some(superblock);
            }
            Ok(_) => {}
            Err(error) => {
                first_error.get_or_insert(error);
            }
        }
    }
    newest.ok_or_else(|| match first_error {
        Some(error) => Error::new(kind_of(&error), format!("the filesystem cannot be opened: {error}")),
        None => Error::damaged(format!("{} bytes are too few for a filesystem", disk.size())),
    })
}
