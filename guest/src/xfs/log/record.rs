//! Records: what was written to the log at once. Those from the tail, behind which all is in its place, to the head.
//!
//! ```text
//! ─┬─ header ─┬─ more headers ─┬─ operations ─┬─ header ─ ...     sectors of 512 bytes
//!  │          │ a large one's  │              │
//! ```
//!
//! The first four bytes of each sector of operations stand in the headers, and the number of the cycle in their place.
//!
//! Source: `struct xlog_rec_header` in Linux `fs/xfs/libxfs/xfs_log_format.h`; `xlog_find_tail` in `fs/xfs/xfs_log_recover.c`.

use std::ops::Range;

use fs_ext4::checksum::linux_crc32c;
use fs_xfs::Superblock;

use super::ring::{MAX_RECORD, Ring, SECTOR};
use crate::{Error, ErrorKind, Fields, Result};

/// Sectors from the tail to the head at most, all in memory.
const MAX_LIVE: u64 = (128 << 20) / SECTOR as u64;

/// Records that were on their way at once at most.
const IN_FLIGHT: usize = 8;

/// Bytes of operations whose sectors one header has room for.
const PER_HEADER: usize = 32 << 10;

/// Bytes of operations of a record at most.
const MAX_BODY: usize = 256 << 10;

/// Bytes of a header that its checksum covers: as 64-bit and as 32-bit machines lay it out.
const COVERED: [usize; 2] = [328, 324];

/// Bytes of a further header that the checksum covers.
const COVERED_FURTHER: usize = 260;

/// Logs have records of the second version, which can be of several headers.
const SECOND_VERSION: u16 = 0x0400;

/// Numbers in items are as x86 has them.
const LITTLE_ENDIAN: u32 = 1;

/// The only operation of a record that ends the log of an unmounted filesystem.
const UNMOUNT: u8 = 0x20;

/// The first sector of a record.
pub(super) struct Header {
    /// The sector that it is.
    pub(super) start: u64,
    version: u32,
    /// Bytes of operations.
    len: usize,
    /// Bytes of operations that its buffer had room for.
    size: usize,
    lsn: u64,
    /// The sector from which on not all was in its place.
    tail: u64,
    checksum: u32,
    operations: u32,
    format: u32,
    uuid: [u8; 16],
}

impl Header {
    /// Whether a sector is one.
    pub(super) fn is_at(sector: &[u8]) -> bool {
        sector.starts_with(&[0xfe, 0xed, 0xba, 0xbe])
    }

    /// Parses a sector, if it is one.
    pub(super) fn parse(start: u64, sector: &[u8]) -> Option<Self> {
        let fields = Fields(sector);
        let len = |at| fields.be32(at).and_then(|len| usize::try_from(len).ok());
        Self::is_at(sector).then_some(())?;
        Some(Self {
            start,
            version: fields.be32(8)?,
            len: len(12)?,
            size: len(320)?,
            lsn: fields.be64(16)?,
            tail: fields.be64(24)? & 0xffff_ffff,
            checksum: fields.le32(32)?,
            operations: fields.be32(40)?,
            format: fields.be32(300)?,
            uuid: fields.array(304)?,
        })
    }

    /// Sectors of headers.
    fn headers(&self) -> usize {
        if self.version & 2 != 0 { self.size.div_ceil(PER_HEADER).max(1) } else { 1 }
    }

    /// Sectors of the whole record.
    pub(super) fn sectors(&self) -> u64 {
        (self.headers() + self.len.div_ceil(SECTOR)) as u64
    }

    /// Whether it can be, in a log whose records are of the second version or not.
    fn is_sound(&self, is_second: bool) -> bool {
        let is_known = self.version == 1 || (is_second && matches!(self.version, 2 | 3));
        let room = if self.version & 2 != 0 { self.size.min(MAX_BODY) } else { PER_HEADER };
        is_known && self.len > 0 && self.len <= room && self.size <= MAX_BODY
    }
}

/// A record that was found whole.
struct Record {
    header: Header,
    /// Where its operations are among the bytes that were read.
    body: Range<usize>,
}

/// The records from the tail to the head.
pub(super) struct Records {
    /// With the first bytes of each sector where they were.
    bytes: Vec<u8>,
    records: Vec<Record>,
}

impl Records {
    /// Reads those that are to be replayed, or nothing if the filesystem was unmounted.
    pub(super) fn read(ring: &Ring<'_>, superblock: &Superblock) -> Result<Option<Self>> {
        let Some(mut head) = ring.head()? else { return Ok(None) };
        let last = ring.header_before(head, MAX_RECORD)?;
        let mut last = last.ok_or_else(|| Error::damaged("no record is before its head"))?;
        if is_unmount(ring, &last, head)? {
            return Ok(None);
        }
        let mut live = Live::read(ring, superblock, last.tail, head)?;
        if let Some(torn) = live.torn() {
            // What was on its way when the machine stopped. The one before knew of an older tail.
            let before = live.last_header_before(torn);
            last = before.ok_or_else(|| Error::damaged("none of its last records is whole"))?;
            head = live.sector(torn);
            if is_unmount(ring, &last, head)? {
                return Ok(None);
            }
            live = Live::read(ring, superblock, last.tail, head)?;
        }
        let records = live.records(&last)?;
        let mut bytes = live.bytes;
        for record in &records {
            if record.header.uuid != superblock.uuid || record.header.format != LITTLE_ENDIAN {
                return Err(Error::damaged("it is of another filesystem, or of another kind of machine"));
            }
            unpack(&mut bytes, record);
        }
        Ok(Some(Self { bytes, records }))
    }

    /// Returns of each record, from the tail on, its number in the log (LSN), how many operations it has, and their bytes.
    pub(super) fn iter(&self) -> impl Iterator<Item = (u64, u32, &[u8])> {
        let of = |record: &Record| (record.header.lsn, record.header.operations, &self.bytes[record.body.clone()]);
        self.records.iter().map(of)
    }
}

/// Whether a record ends a log whose head is `head`, and all before it is in its place.
fn is_unmount(ring: &Ring<'_>, last: &Header, head: u64) -> Result<bool> {
    let body = (last.start + last.headers() as u64) % ring.sectors();
    if last.operations != 1 || ring.distance(last.start, head) != last.sectors() {
        return Ok(false);
    }
    Ok(ring.read(body, 1)?[9] & UNMOUNT != 0)
}

/// Puts the first bytes of sectors back.
fn unpack(bytes: &mut [u8], record: &Record) {
    let headers = record.body.start - record.header.headers() * SECTOR;
    for (index, sector) in record.body.clone().step_by(SECTOR).enumerate() {
        // Further headers begin with the cycle alone.
        let (header, within) = (index / 64, 4 * (index % 64));
        let from = headers + header * SECTOR + within + if header == 0 { 44 } else { 4 };
        bytes.copy_within(from..from + 4, sector);
    }
}

/// What lies from the tail to the head.
struct Live<'a> {
    ring: &'a Ring<'a>,
    tail: u64,
    bytes: Vec<u8>,
    is_second: bool,
    has_checksums: bool,
}

impl<'a> Live<'a> {
    fn read(ring: &'a Ring<'a>, superblock: &Superblock, tail: u64, head: u64) -> Result<Self> {
        if tail >= ring.sectors() || tail == head {
            return Err(Error::damaged("its tail is not before its head"));
        }
        let count = ring.distance(tail, head);
        if count > MAX_LIVE {
            let message = format!("{count} sectors of it are to be replayed; {MAX_LIVE} are at most");
            return Err(Error::new(ErrorKind::TooMuch, message));
        }
        let is_second = superblock.versionnum & SECOND_VERSION != 0;
        Ok(Self { ring, tail, bytes: ring.read(tail, count)?, is_second, has_checksums: superblock.is_v5() })
    }

    /// Returns the sector that is at an offset in what was read.
    fn sector(&self, offset: usize) -> u64 {
        (self.tail + (offset / SECTOR) as u64) % self.ring.sectors()
    }

    /// Returns where headers are, from an offset on.
    fn headers(&self, from: usize) -> impl DoubleEndedIterator<Item = usize> {
        (from..self.bytes.len()).step_by(SECTOR).filter(|at| Header::is_at(&self.bytes[*at..]))
    }

    fn last_header_before(&self, offset: usize) -> Option<Header> {
        let at = (0..offset).step_by(SECTOR).rev().find(|at| Header::is_at(&self.bytes[*at..]))?;
        Header::parse(self.sector(at), &self.bytes[at..at + SECTOR])
    }

    /// Returns where the first of the last records that is not whole should be.
    fn torn(&self) -> Option<usize> {
        let mut at = self.headers(0).rev().take(IN_FLIGHT).last()?;
        while at < self.bytes.len() {
            match self.record(at) {
                Some(record) => at = record.body.end.next_multiple_of(SECTOR),
                None => return Some(at),
            }
        }
        None
    }

    /// Returns all records.
    fn records(&self, last: &Header) -> Result<Vec<Record>> {
        // What was on its way when the machine stopped can have been over the oldest.
        let reach = (IN_FLIGHT * last.size.clamp(PER_HEADER, MAX_BODY) / SECTOR) as u64;
        let gap = self.ring.sectors() - (self.bytes.len() / SECTOR) as u64;
        let mut records = Vec::new();
        let mut at = self.headers(0).next().unwrap_or(self.bytes.len());
        while at < self.bytes.len() {
            if let Some(record) = self.record(at) {
                at = record.body.end.next_multiple_of(SECTOR);
                records.push(record);
                continue;
            }
            let next = self.headers(at).nth(1).filter(|_| gap + (at / SECTOR) as u64 <= reach);
            let damaged = || Error::damaged(format!("there is no whole record in its sector {}", self.sector(at)));
            at = next.ok_or_else(damaged)?;
            records.clear();
        }
        Ok(records)
    }

    /// Returns the record at an offset, if one is there as a whole.
    fn record(&self, at: usize) -> Option<Record> {
        let header = Header::parse(self.sector(at), self.bytes.get(at..at + SECTOR)?)?;
        if !header.is_sound(self.is_second) {
            return None;
        }
        let start = at + header.headers() * SECTOR;
        let body = start..start + header.len;
        if body.end.next_multiple_of(SECTOR) > self.bytes.len() {
            return None;
        }
        let is_right = if header.checksum == 0 {
            // Old kernels, and mkfs.xfs, make none.
            !self.has_checksums || (header.operations == 1 && self.bytes.get(start + 9)? & UNMOUNT != 0)
        } else {
            COVERED.iter().any(|covered| self.checksum(at, &body, *covered) == Some(header.checksum))
        };
        is_right.then_some(Record { header, body })
    }

    /// Returns the checksum of a record of which so many bytes of the first header count.
    fn checksum(&self, at: usize, body: &Range<usize>, covered: usize) -> Option<u32> {
        let mut sum = linux_crc32c(!0, self.bytes.get(at..at + 32)?);
        sum = linux_crc32c(sum, &[0; 4]);
        sum = linux_crc32c(sum, self.bytes.get(at + 36..at + covered)?);
        for header in 1..body.len().div_ceil(PER_HEADER) {
            let start = at + header * SECTOR;
            sum = linux_crc32c(sum, self.bytes.get(start..start + COVERED_FURTHER)?);
        }
        Some(!linux_crc32c(sum, self.bytes.get(body.clone())?))
    }
}
