//! The 512-byte footer of a VHD, which every kind of VHD ends with and all but the fixed ones start with.
//!
//! Bytes in, value out: whether two copies agree, and which one to believe, is decided by who reads the file.

use uuid::Uuid;

use crate::error::FormatError;
use crate::geometry::Chs;

/// The length of a footer in bytes.
pub const FOOTER_BYTES: usize = 512;
/// What [`Footer::data_offset`] holds for a fixed disk, which has no header.
pub const NO_HEADER: u64 = u64::MAX;

const COOKIE: &[u8; 8] = b"conectix";
const VERSION: u32 = 0x0001_0000;
const CHECKSUM_AT: usize = 64;
/// Sizes from here on cannot be offsets in a file.
const MAX_SIZE: u64 = 1 << 63;

/// How the data of a VHD is laid out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum DiskType {
    /// The raw disk, then the footer.
    Fixed,
    /// Blocks found by a table; what is absent reads as zeroes.
    Dynamic,
    /// Blocks found by a table; what is absent is the parent's.
    Differencing,
}

/// The footer: who wrote a VHD, how big its disk is, and of what kind it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Footer {
    /// Feature bits; bit 1 is reserved and always set by writers that follow the specification.
    pub features: u32,
    /// Where the header lies in the file, in bytes; [`NO_HEADER`] for a fixed disk.
    pub data_offset: u64,
    /// Seconds since 2000-01-01 or, from Xen Orchestra, since 1970-01-01: opaque.
    pub timestamp: u32,
    /// The program that wrote it, padded with spaces.
    pub creator: [u8; 4],
    /// The version of that program.
    pub creator_version: u32,
    /// The system it ran on.
    pub creator_host_os: [u8; 4],
    /// The size of the disk when it was made, in bytes.
    pub original_size: u64,
    /// The size of the disk, in bytes, below 2^63; not always a multiple of the sector size in the wild.
    pub current_size: u64,
    /// The geometry, for show.
    pub chs: Chs,
    /// The layout.
    pub disk_type: DiskType,
    /// The identity of the disk, by which its children name it.
    pub uuid: Uuid,
}

impl Footer {
    /// Parses a footer and verifies its checksum. All fields are big-endian.
    ///
    /// Source: VHD specification 1.0, "Hard Disk Footer Format". The creator, features and geometry are not judged.
    ///
    /// # Errors
    /// `Damaged` if the cookie, the checksum or a size cannot be right, `Unsupported` for another version or disk type.
    pub fn parse(bytes: &[u8; FOOTER_BYTES]) -> Result<Self, FormatError> {
        if bytes[..8] != COOKIE[..] {
            return Err(FormatError::damaged("a VHD footer must start with 'conectix', but this one does not"));
        }
        let stored = u32_at(bytes, CHECKSUM_AT);
        let computed = checksum(bytes, CHECKSUM_AT);
        if stored != computed {
            return Err(FormatError::damaged(format!(
                "the checksum of the VHD footer is {stored:#010x}, but its bytes add up to {computed:#010x}"
            )));
        }
        let version = u32_at(bytes, 12);
        if version != VERSION {
            return Err(FormatError::unsupported(format!(
                "VHD footers of version {VERSION:#010x} can be read, but this one says {version:#010x}"
            )));
        }
        let disk_type = match u32_at(bytes, 60) {
            2 => DiskType::Fixed,
            3 => DiskType::Dynamic,
            4 => DiskType::Differencing,
            other => {
                return Err(FormatError::unsupported(format!(
                    "VHD disk types 2, 3 and 4 can be read, but the footer says {other}"
                )));
            }
        };
        let data_offset = u64_at(bytes, 16);
        if disk_type != DiskType::Fixed && data_offset >= MAX_SIZE {
            return Err(FormatError::damaged(format!(
                "the footer of a VHD with blocks must say where its header is, but says {data_offset:#x}"
            )));
        }
        let current_size = u64_at(bytes, 48);
        if current_size >= MAX_SIZE {
            return Err(FormatError::damaged(format!(
                "the size of the disk must be below 2^63 bytes, but the footer says {current_size}"
            )));
        }
        Ok(Self {
            features: u32_at(bytes, 8),
            data_offset,
            timestamp: u32_at(bytes, 24),
            creator: array_at(bytes, 28),
            creator_version: u32_at(bytes, 32),
            creator_host_os: array_at(bytes, 36),
            original_size: u64_at(bytes, 40),
            current_size,
            chs: Chs { cylinders: u16::from_be_bytes(array_at(bytes, 56)), heads: bytes[58], sectors: bytes[59] },
            disk_type,
            uuid: Uuid::from_bytes(array_at(bytes, 68)),
        })
    }

    /// Returns the size of the disk in bytes.
    ///
    /// It is `current_size` whoever wrote the file: tools that count in the geometry write its product there as well.
    #[must_use]
    pub fn virtual_size(&self) -> u64 {
        self.current_size
    }

    /// Returns the footer as stored, with its checksum; reserved bytes are zero.
    #[must_use]
    pub fn to_bytes(&self) -> [u8; FOOTER_BYTES] {
        let mut bytes = [0; FOOTER_BYTES];
        bytes[..8].copy_from_slice(COOKIE);
        put(&mut bytes, 8, self.features.to_be_bytes());
        put(&mut bytes, 12, VERSION.to_be_bytes());
        put(&mut bytes, 16, self.data_offset.to_be_bytes());
        put(&mut bytes, 24, self.timestamp.to_be_bytes());
        put(&mut bytes, 28, self.creator);
        put(&mut bytes, 32, self.creator_version.to_be_bytes());
        put(&mut bytes, 36, self.creator_host_os);
        put(&mut bytes, 40, self.original_size.to_be_bytes());
        put(&mut bytes, 48, self.current_size.to_be_bytes());
        put(&mut bytes, 56, self.chs.cylinders.to_be_bytes());
        put(&mut bytes, 58, [self.chs.heads, self.chs.sectors]);
        let disk_type: u32 = match self.disk_type {
            DiskType::Fixed => 2,
            DiskType::Dynamic => 3,
            DiskType::Differencing => 4,
        };
        put(&mut bytes, 60, disk_type.to_be_bytes());
        put(&mut bytes, 68, self.uuid.into_bytes());
        let sum = checksum(&bytes, CHECKSUM_AT);
        put(&mut bytes, CHECKSUM_AT, sum.to_be_bytes());
        bytes
    }
}

/// Returns the one's complement of the sum of all bytes but the four at `at`, where the checksum itself stands.
pub(crate) fn checksum(bytes: &[u8], at: usize) -> u32 {
    let sum = |part: &[u8]| part.iter().fold(0_u32, |sum, byte| sum.wrapping_add(u32::from(*byte)));
    !sum(&bytes[..at]).wrapping_add(sum(&bytes[at + 4..]))
}

pub(crate) fn array_at<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    bytes[at..at + N].try_into().expect("fields lie within their structure")
}

pub(crate) fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_be_bytes(array_at(bytes, at))
}

pub(crate) fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_be_bytes(array_at(bytes, at))
}

pub(crate) fn put<const N: usize>(bytes: &mut [u8], at: usize, field: [u8; N]) {
    bytes[at..at + N].copy_from_slice(&field);
}
