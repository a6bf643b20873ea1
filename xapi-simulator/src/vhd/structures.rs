//! Footer, header and table of a VHD as bytes. All integers are big-endian.
//!
//! Source: VHD specification 1.0; xen-api `ocaml/libs/vhd/vhd_format/f.ml`; blktap `include/libvhd.h` for what it adds.

use std::fmt;

use uuid::Uuid;

use crate::layer::BLOCK_BYTES;

/// Bytes of a footer, of a sector, and of the sector bitmap of a block.
pub(crate) const FOOTER_BYTES: usize = 512;
/// Bytes of a header.
pub(crate) const HEADER_BYTES: usize = 1024;
/// An entry of the table whose block is absent.
pub(crate) const ABSENT: u32 = u32::MAX;
/// Bytes of a block with its sector bitmap.
pub(crate) const STORED_BLOCK_BYTES: u64 = BLOCK_BYTES + FOOTER_BYTES as u64;
/// Entries of the table at most: those of 2040 GiB, and some.
const MAX_ENTRIES: u32 = 1 << 20;

const FOOTER_CHECKSUM: usize = 64;
const HEADER_CHECKSUM: usize = 36;
const VERSION: u32 = 0x0001_0000;

/// What is wrong with a structure.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Fault {
    /// It does not begin with its cookie.
    Cookie,
    /// Its checksum is another.
    Checksum,
    /// A field has a value that is not supported.
    Field(&'static str),
}

impl fmt::Display for Fault {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Cookie => formatter.write_str("does not begin with its cookie"),
            Self::Checksum => formatter.write_str("has a wrong checksum"),
            Self::Field(field) => write!(formatter, "has an unsupported {field}"),
        }
    }
}

/// The footer, and its copy at the start of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Footer {
    /// The program and its version.
    pub(crate) creator: ([u8; 4], u32),
    /// Seconds since 2000-01-01.
    pub(crate) timestamp: u32,
    pub(crate) size: u64,
    pub(crate) is_differencing: bool,
    pub(crate) uuid: Uuid,
    /// Set by the storage manager on base copies.
    pub(crate) is_hidden: bool,
}

impl Footer {
    pub(crate) fn bytes(&self) -> [u8; FOOTER_BYTES] {
        let mut bytes = [0; FOOTER_BYTES];
        let (cylinders, heads, sectors) = geometry(self.size / 512);
        put(&mut bytes, 0, b"conectix");
        put(&mut bytes, 8, &2_u32.to_be_bytes());
        put(&mut bytes, 12, &VERSION.to_be_bytes());
        put(&mut bytes, 16, &(FOOTER_BYTES as u64).to_be_bytes());
        put(&mut bytes, 24, &self.timestamp.to_be_bytes());
        put(&mut bytes, 28, &self.creator.0);
        put(&mut bytes, 32, &self.creator.1.to_be_bytes());
        put(&mut bytes, 40, &self.size.to_be_bytes());
        put(&mut bytes, 48, &self.size.to_be_bytes());
        put(&mut bytes, 56, &cylinders.to_be_bytes());
        put(&mut bytes, 58, &[heads, sectors]);
        put(&mut bytes, 60, &if self.is_differencing { 4_u32 } else { 3 }.to_be_bytes());
        put(&mut bytes, 68, self.uuid.as_bytes());
        bytes[85] = u8::from(self.is_hidden);
        seal(&mut bytes, FOOTER_CHECKSUM);
        bytes
    }

    /// Parses a footer, and returns it with the offset of the header.
    pub(crate) fn parse(bytes: &[u8; FOOTER_BYTES]) -> Result<(Self, u64), Fault> {
        if &bytes[..8] != b"conectix" {
            return Err(Fault::Cookie);
        }
        if number(bytes, FOOTER_CHECKSUM) != checksum(bytes, FOOTER_CHECKSUM) {
            return Err(Fault::Checksum);
        }
        if number(bytes, 12) != VERSION {
            return Err(Fault::Field("version"));
        }
        let is_differencing = match number(bytes, 60) {
            3 => false,
            4 => true,
            _ => return Err(Fault::Field("disk type")),
        };
        let footer = Self {
            creator: (bytes[28..32].try_into().expect("four bytes"), number(bytes, 32)),
            timestamp: number(bytes, 24),
            size: long(bytes, 48),
            is_differencing,
            uuid: Uuid::from_bytes(bytes[68..84].try_into().expect("sixteen bytes")),
            is_hidden: bytes[85] != 0,
        };
        Ok((footer, long(bytes, 16)))
    }
}

/// The header: where the table is, and who the parent is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Header {
    pub(crate) table_offset: u64,
    pub(crate) entries: u32,
    pub(crate) parent: Option<Parent>,
}

/// How a header names the parent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Parent {
    /// The uuid in the parent's footer.
    pub(crate) uuid: Uuid,
    pub(crate) timestamp: u32,
    pub(crate) name: String,
    pub(crate) locators: Vec<Locator>,
}

/// Where another name of the parent lies in the file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Locator {
    pub(crate) platform: [u8; 4],
    /// What the writer says of the space: xapi in sectors, blktap in bytes.
    pub(crate) space: u32,
    /// Bytes of the name.
    pub(crate) length: u32,
    pub(crate) offset: u64,
}

impl Header {
    pub(crate) fn bytes(&self) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        put(&mut bytes, 0, b"cxsparse");
        put(&mut bytes, 8, &u64::MAX.to_be_bytes());
        put(&mut bytes, 16, &self.table_offset.to_be_bytes());
        put(&mut bytes, 24, &VERSION.to_be_bytes());
        put(&mut bytes, 28, &self.entries.to_be_bytes());
        put(&mut bytes, 32, &u32::try_from(BLOCK_BYTES).expect("2 MiB").to_be_bytes());
        if let Some(parent) = &self.parent {
            put(&mut bytes, 40, parent.uuid.as_bytes());
            put(&mut bytes, 56, &parent.timestamp.to_be_bytes());
            // 256 units of UTF-16; a longer name is cut, as its readers have no more.
            for (position, unit) in parent.name.encode_utf16().take(256).enumerate() {
                put(&mut bytes, 64 + 2 * position, &unit.to_be_bytes());
            }
            for (position, locator) in parent.locators.iter().take(8).enumerate() {
                let at = 576 + 24 * position;
                put(&mut bytes, at, &locator.platform);
                put(&mut bytes, at + 4, &locator.space.to_be_bytes());
                put(&mut bytes, at + 8, &locator.length.to_be_bytes());
                put(&mut bytes, at + 16, &locator.offset.to_be_bytes());
            }
        }
        seal(&mut bytes, HEADER_CHECKSUM);
        bytes
    }

    /// Parses the offset and the entries of the table; what is said of the parent is not looked at.
    pub(crate) fn parse(bytes: &[u8; HEADER_BYTES]) -> Result<Self, Fault> {
        if &bytes[..8] != b"cxsparse" {
            return Err(Fault::Cookie);
        }
        if number(bytes, HEADER_CHECKSUM) != checksum(bytes, HEADER_CHECKSUM) {
            return Err(Fault::Checksum);
        }
        let (entries, block_size) = (number(bytes, 28), number(bytes, 32));
        if u64::from(block_size) != BLOCK_BYTES {
            return Err(Fault::Field("block size"));
        }
        if entries > MAX_ENTRIES {
            return Err(Fault::Field("number of blocks"));
        }
        Ok(Self { table_offset: long(bytes, 16), entries, parent: None })
    }

    /// Returns the bytes of the table in the file: whole sectors.
    pub(crate) fn table_bytes(&self) -> u64 {
        (u64::from(self.entries) * 4).next_multiple_of(FOOTER_BYTES as u64)
    }
}

/// Returns the entries that the table of a disk has, one per block.
pub(crate) fn entries(size: u64) -> u32 {
    u32::try_from(size.div_ceil(BLOCK_BYTES)).expect("disks are at most 2040 GiB")
}

/// Returns a table as bytes, padded with absent entries to whole sectors.
pub(crate) fn table_bytes(table: &[u32]) -> Vec<u8> {
    let mut bytes: Vec<u8> = table.iter().flat_map(|entry| entry.to_be_bytes()).collect();
    bytes.resize(bytes.len().next_multiple_of(FOOTER_BYTES), 0xFF);
    bytes
}

/// Returns the complement of the sum of all bytes but those of the checksum itself.
pub(crate) fn checksum(bytes: &[u8], at: usize) -> u32 {
    let sum = |part: &[u8]| part.iter().fold(0_u32, |sum, byte| sum.wrapping_add(u32::from(*byte)));
    !sum(&bytes[..at]).wrapping_add(sum(&bytes[at + 4..]))
}

/// Returns cylinders, heads and sectors per track for a number of sectors.
///
/// Source: VHD specification 1.0, appendix "CHS Calculation".
fn geometry(sectors: u64) -> (u16, u8, u8) {
    let total = u32::try_from(sectors).unwrap_or(u32::MAX).min(65535 * 16 * 255);
    let (heads, track) = if total >= 65535 * 16 * 63 {
        (16, 255)
    } else {
        let heads = (total / 17).div_ceil(1024).max(4);
        if heads <= 16 && total / 17 < heads * 1024 {
            (heads, 17)
        } else if total / 31 < 16 * 1024 {
            (16, 31)
        } else {
            (16, 63)
        }
    };
    let cylinders = total / track / heads;
    let small = |number: u32| u8::try_from(number).expect("at most 255");
    (u16::try_from(cylinders).expect("at most 65535"), small(heads), small(track))
}

fn seal(bytes: &mut [u8], at: usize) {
    let sum = checksum(bytes, at);
    put(bytes, at, &sum.to_be_bytes());
}

fn put(bytes: &mut [u8], at: usize, value: &[u8]) {
    bytes[at..at + value.len()].copy_from_slice(value);
}

/// Returns the u32 at a place within a structure.
pub(crate) fn number(bytes: &[u8], at: usize) -> u32 {
    u32::from_be_bytes(bytes[at..at + 4].try_into().expect("four bytes"))
}

fn long(bytes: &[u8], at: usize) -> u64 {
    u64::from_be_bytes(bytes[at..at + 8].try_into().expect("eight bytes"))
}
