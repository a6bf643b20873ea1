//! The 512-byte footer of a VHD, which every kind of VHD ends with and all but the fixed ones start with.
//!
//! Bytes in, value out: whether two copies agree, and which one to believe, is decided by who reads the file.

use uuid::Uuid;

use crate::error::FormatError;
use crate::geometry::Chs;

/// The length of a footer in bytes.
pub const FOOTER_BYTES: usize = 512;

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
    /// Where the header lies in the file, in bytes; all ones for a fixed disk, which has none.
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
    pub fn to_bytes(self) -> [u8; FOOTER_BYTES] {
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::ErrorKind;
    use crate::geometry::tests::Random;

    const NO_HEADER: u64 = u64::MAX;

    /// The footer vhd-lib writes for a disk of 10 MiB.
    fn sample() -> Footer {
        Footer {
            features: 2,
            data_offset: 512,
            timestamp: 0x6a6d_3700,
            creator: *b"xo  ",
            creator_version: 0,
            creator_host_os: *b"Wi2k",
            original_size: 10 << 20,
            current_size: 10 << 20,
            chs: Chs::of_size(10 << 20),
            disk_type: DiskType::Dynamic,
            uuid: Uuid::parse_str("01234567-89ab-4cde-8f01-23456789abcd").unwrap(),
        }
    }

    /// Returns the bytes with the field at `at` replaced and the checksum made right again.
    fn changed<const N: usize>(at: usize, field: [u8; N]) -> [u8; FOOTER_BYTES] {
        let mut bytes = sample().to_bytes();
        put(&mut bytes, at, field);
        let sum = checksum(&bytes, CHECKSUM_AT);
        put(&mut bytes, CHECKSUM_AT, sum.to_be_bytes());
        bytes
    }

    fn kind(bytes: &[u8; FOOTER_BYTES]) -> ErrorKind {
        Footer::parse(bytes).unwrap_err().kind
    }

    #[test]
    fn a_footer_is_written_as_by_xen_orchestra() {
        let expected = concat!(
            "636f6e6563746978000000020001000000000000000002006a6d3700786f2020",
            "000000005769326b0000000000a000000000000000a00000012e041100000003",
            "fffff0f60123456789ab4cde8f0123456789abcd00000000"
        );
        let bytes = sample().to_bytes();
        let start: String = bytes[..88].iter().map(|byte| format!("{byte:02x}")).collect();
        assert_eq!(start, expected);
        assert_eq!(bytes[88..], [0; 424]);
        assert_eq!(Footer::parse(&bytes), Ok(sample()));
    }

    #[test]
    fn a_wrong_byte_anywhere_is_damage() {
        for at in 0..FOOTER_BYTES {
            let mut bytes = sample().to_bytes();
            bytes[at] ^= 0x10;
            assert_eq!(kind(&bytes), ErrorKind::Damaged, "byte {at}");
        }
        assert_eq!(kind(&[0; FOOTER_BYTES]), ErrorKind::Damaged);
    }

    #[test]
    fn other_versions_and_types_are_unsupported() {
        assert_eq!(kind(&changed(12, [0, 2, 0, 0])), ErrorKind::Unsupported);
        for disk_type in [0_u32, 1, 5, 6, u32::MAX] {
            assert_eq!(kind(&changed(60, disk_type.to_be_bytes())), ErrorKind::Unsupported, "{disk_type}");
        }
    }

    #[test]
    fn sizes_and_offsets_beyond_any_file_are_damage() {
        assert_eq!(kind(&changed(48, (1_u64 << 63).to_be_bytes())), ErrorKind::Damaged);
        assert_eq!(kind(&changed(16, NO_HEADER.to_be_bytes())), ErrorKind::Damaged);
        let largest = Footer::parse(&changed(48, ((1_u64 << 63) - 1).to_be_bytes())).unwrap();
        assert_eq!(largest.virtual_size(), (1 << 63) - 1);
    }

    #[test]
    fn a_fixed_disk_has_no_header() {
        let fixed = Footer { disk_type: DiskType::Fixed, data_offset: NO_HEADER, ..sample() };
        assert_eq!(Footer::parse(&fixed.to_bytes()), Ok(fixed));
    }

    #[test]
    fn any_creator_and_geometry_are_accepted() {
        for creator in [*b"caml", *b"tap\0", *b"vpc ", [0; 4], [0xff; 4]] {
            let footer = Footer::parse(&changed(28, creator)).unwrap();
            assert_eq!((footer.creator, footer.virtual_size()), (creator, 10 << 20));
        }
        assert_eq!(Footer::parse(&changed(56, [0xff; 4])).unwrap().virtual_size(), 10 << 20);
    }

    #[test]
    fn bytes_that_pass_for_a_footer_never_panic() {
        let mut random = Random(0x2545_f491_4f6c_dd1d);
        let mut sound = 0;
        for _ in 0..2000 {
            let mut bytes = sample().to_bytes();
            bytes[12..].copy_from_slice(&random.bytes(500));
            put(&mut bytes, 12, VERSION.to_be_bytes());
            let disk_type = 2 + bytes[20] % 3;
            put(&mut bytes, 60, [0, 0, 0, disk_type]);
            let sum = checksum(&bytes, CHECKSUM_AT);
            put(&mut bytes, CHECKSUM_AT, sum.to_be_bytes());
            if let Ok(footer) = Footer::parse(&bytes) {
                assert_eq!(Footer::parse(&footer.to_bytes()), Ok(footer));
                sound += 1;
            }
        }
        assert!(sound > 100, "only {sound} were sound");
    }
}
