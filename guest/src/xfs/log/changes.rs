//! What the log changes: sectors, as they are after what was replayed so far.

use std::collections::BTreeMap;
use std::ops::Range;

use disk::Disk;

use super::ring::SECTOR;
use crate::xfs::checksum;
use crate::{Error, ErrorKind, Fields, Result};

/// Sectors that are changed at most, all in memory.
const MAX_CHANGED: usize = (120 << 20) / SECTOR;

/// Bytes that are read at most, some of them several times.
const MAX_READ: u64 = 1 << 30;

/// Sectors of what is changed at once at most: inodes of 2 KiB, 64 of them.
pub(super) const MAX_SECTORS: u64 = 256;

/// Sectors of a disk that were changed.
pub(super) struct Changes<'a> {
    disk: &'a dyn Disk,
    /// Sectors in which the log itself lies.
    log: Range<u64>,
    sectors: BTreeMap<u64, Box<[u8; SECTOR]>>,
    /// Sectors that structures start in whose checksum is to be set, and how many each has.
    unsummed: BTreeMap<u64, u64>,
    /// Bytes that may still be read.
    left: u64,
}

impl<'a> Changes<'a> {
    /// Begins with none; `log` is where the log lies (bytes).
    pub(super) fn new(disk: &'a dyn Disk, log: &Range<u64>) -> Self {
        let log = log.start / SECTOR as u64..log.end / SECTOR as u64;
        Self { disk, log, sectors: BTreeMap::new(), unsummed: BTreeMap::new(), left: MAX_READ }
    }

    /// Returns so many sectors from one on as they are by now.
    pub(super) fn load(&mut self, first: u64, count: u64) -> Result<Vec<u8>> {
        let end = first.checked_add(count).filter(|end| *end <= self.disk.size() / SECTOR as u64);
        let (Some(end), true) = (end, count <= MAX_SECTORS) else {
            return Err(Error::damaged(format!("it changes {count} sectors at {first}, which are not there")));
        };
        let len = usize::try_from(count).expect("256 at most") * SECTOR;
        let left = self.left.checked_sub(len as u64);
        self.left = left.ok_or_else(|| Error::new(ErrorKind::TooMuch, "it changes more than is read"))?;
        let mut bytes = vec![0; len];
        let missing = bytes.chunks_exact_mut(SECTOR).zip(first..).filter(|(_, at)| !self.sectors.contains_key(at));
        if missing.count() > 0 {
            self.disk.read_at(first * SECTOR as u64, &mut bytes)?;
        }
        for (at, sector) in self.sectors.range(first..end) {
            let start = usize::try_from(at - first).expect("256 at most") * SECTOR;
            bytes[start..start + SECTOR].copy_from_slice(&sector[..]);
        }
        Ok(bytes)
    }

    /// Lets whole sectors from one on be these bytes.
    pub(super) fn store(&mut self, first: u64, bytes: &[u8]) -> Result<()> {
        for (at, bytes) in (first..).zip(bytes.chunks_exact(SECTOR)) {
            if self.log.contains(&at) {
                return Err(Error::damaged("it changes itself"));
            }
            self.sectors.insert(at, Box::new(bytes.try_into().expect("a sector")));
        }
        if self.sectors.len() > MAX_CHANGED {
            let message = format!("it changes more than {MAX_CHANGED} sectors");
            return Err(Error::new(ErrorKind::TooMuch, message));
        }
        Ok(())
    }

    /// Lets the checksum of a structure of so many sectors be set in the end.
    pub(super) fn sum_later(&mut self, first: u64, count: u64) {
        self.unsummed.insert(first, count);
    }

    /// Returns all changes: where bytes lie, and what they are.
    pub(super) fn finish(mut self) -> Result<Vec<(u64, Vec<u8>)>> {
        for (first, count) in std::mem::take(&mut self.unsummed) {
            let mut bytes = self.load(first, count)?;
            if let Some(at) = Place::of(&bytes).map(|place| place.checksum) {
                checksum::set(&mut bytes, at);
                self.store(first, &bytes[..SECTOR])?;
            }
        }
        let mut runs: Vec<(u64, Vec<u8>)> = Vec::new();
        // Each is freed as it is taken.
        while let Some((at, sector)) = self.sectors.pop_first() {
            let at = at * SECTOR as u64;
            match runs.last_mut() {
                Some((start, run)) if *start + run.len() as u64 == at => run.extend_from_slice(&sector[..]),
                _ => runs.push((at, sector.to_vec())),
            }
        }
        Ok(runs)
    }
}

/// Where in its first sector a structure of version 5 has what is in all of them (bytes).
pub(super) struct Place {
    /// The number in the log of what changed it last (LSN).
    pub(super) lsn: usize,
    checksum: usize,
    pub(super) uuid: usize,
}

impl Place {
    /// Finds them by what a structure begins with; nothing if it is none that has any.
    ///
    /// Source: `xlog_recover_get_buf_lsn` in Linux `fs/xfs/xfs_buf_item_recover.c`, and the structures it names.
    pub(super) fn of(bytes: &[u8]) -> Option<Self> {
        let fields = Fields(bytes);
        let (lsn, checksum, uuid) = match fields.bytes(0, 4)? {
            // The identifier of metadata stands elsewhere if the filesystem got another one.
            b"XFSB" => (240, 224, if fields.be32(216)? & META_UUID == 0 { 32 } else { 248 }),
            b"XAGF" => (208, 216, 64),
            b"XAGI" => (320, 312, 296),
            b"XAFL" => (24, 32, 8),
            // Trees of a group, and of a file.
            b"AB3B" | b"AB3C" | b"IAB3" | b"FIB3" | b"RMB3" | b"R3FC" => (24, 52, 32),
            b"BMA3" => (32, 64, 40),
            // Directories, and the targets of links.
            b"XDB3" | b"XDD3" | b"XDF3" => (16, 4, 24),
            b"XSLM" => (48, 12, 16),
            // Indexes of directories, and attributes.
            _ if matches!(fields.be16(8)?, 0x3df1 | 0x3dff | 0x3ebe | 0x3bee) => (24, 12, 32),
            _ => return None,
        };
        Some(Self { lsn, checksum, uuid })
    }
}

/// In a superblock: the identifier of metadata is not that of the filesystem.
const META_UUID: u32 = 1 << 2;
