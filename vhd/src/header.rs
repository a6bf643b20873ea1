//! The 1024-byte header of a dynamic or differencing VHD: where its table is, how big its blocks are, who its parent is.

use uuid::Uuid;

use crate::error::FormatError;
use crate::footer::{array_at, checksum, put, u32_at, u64_at};
use crate::geometry::BlockSize;

/// The length of a header in bytes.
pub const HEADER_BYTES: usize = 1024;
/// The room for the parent's name, in UTF-16 code units.
pub const PARENT_NAME_UNITS: usize = 256;

const COOKIE: &[u8; 8] = b"cxsparse";
const VERSION: u32 = 0x0001_0000;
const CHECKSUM_AT: usize = 36;
const NAME_AT: usize = 64;
const LOCATORS_AT: usize = 576;
const LOCATOR_BYTES: usize = 24;
/// Offsets from here on cannot lie in a file.
const MAX_OFFSET: u64 = 1 << 63;

/// Where a path to the parent is stored in the file, in the way of one platform.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct ParentLocator {
    /// The platform, such as `W2ku`; zeroes for an unused slot.
    pub platform_code: [u8; 4],
    /// Room in the file; in sectors from Xen Orchestra and in newer versions of the specification, else in bytes.
    pub space: u32,
    /// Length of the path in bytes.
    pub length: u32,
    /// Where it is, in bytes from the start of the file.
    pub offset: u64,
}

/// The header.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Header {
    /// Where the block allocation table is, in bytes, below 2^63; meaningless in an exploded VHD.
    pub table_offset: u64,
    /// The number of entries of the table; more than the disk has blocks is usual.
    pub max_table_entries: u32,
    /// The size of a block.
    pub block_size: BlockSize,
    /// The identity of the parent; `None` if it is all zeroes.
    pub parent_uuid: Option<Uuid>,
    /// The timestamp of the parent; 0 from Xen Orchestra, never compared.
    pub parent_timestamp: u32,
    /// The path of the parent relative to the directory of the VHD, as named; at most 256 UTF-16 code units.
    pub parent_name: String,
    /// Other ways to the parent; not used by Xen Orchestra.
    pub locators: [ParentLocator; 8],
}

impl Header {
    /// Parses a header and verifies its checksum. All fields are big-endian, the parent's name too.
    ///
    /// A unit of the name that is not UTF-16 becomes U+FFFD. Source: VHD specification 1.0, "Dynamic Disk Header
    /// Format".
    ///
    /// # Errors
    /// `Damaged` if the cookie, the checksum, the block size or the table's offset cannot be right, `Unsupported` for
    /// another version or blocks above 256 MiB.
    pub fn parse(bytes: &[u8; HEADER_BYTES]) -> Result<Self, FormatError> {
        if bytes[..8] != COOKIE[..] {
            return Err(FormatError::damaged("a VHD header must start with 'cxsparse', but this one does not"));
        }
        let stored = u32_at(bytes, CHECKSUM_AT);
        let computed = checksum(bytes, CHECKSUM_AT);
        if stored != computed {
            return Err(FormatError::damaged(format!(
                "the checksum of the VHD header is {stored:#010x}, but its bytes add up to {computed:#010x}"
            )));
        }
        let version = u32_at(bytes, 24);
        if version != VERSION {
            return Err(FormatError::unsupported(format!(
                "VHD headers of version {VERSION:#010x} can be read, but this one says {version:#010x}"
            )));
        }
        let table_offset = u64_at(bytes, 16);
        if table_offset >= MAX_OFFSET {
            return Err(FormatError::damaged(format!(
                "the offset of the table must be below 2^63 bytes, but the header says {table_offset}"
            )));
        }
        let parent_uuid = Uuid::from_bytes(array_at(bytes, 40));
        let locators = std::array::from_fn(|slot| {
            let at = LOCATORS_AT + slot * LOCATOR_BYTES;
            ParentLocator {
                platform_code: array_at(bytes, at),
                space: u32_at(bytes, at + 4),
                length: u32_at(bytes, at + 8),
                offset: u64_at(bytes, at + 16),
            }
        });
        Ok(Self {
            table_offset,
            max_table_entries: u32_at(bytes, 28),
            block_size: BlockSize::new(u32_at(bytes, 32))?,
            parent_uuid: (!parent_uuid.is_nil()).then_some(parent_uuid),
            parent_timestamp: u32_at(bytes, 56),
            parent_name: decode_name(&bytes[NAME_AT..LOCATORS_AT]),
            locators,
        })
    }

    /// Says in a header as stored that its table has so many entries, and leaves all else as it is. Only the first sector of
    /// it changes.
    pub(crate) fn set_max_table_entries(bytes: &mut [u8; HEADER_BYTES], entries: u32) {
        put(bytes, 28, entries.to_be_bytes());
        let sum = checksum(bytes, CHECKSUM_AT);
        put(bytes, CHECKSUM_AT, sum.to_be_bytes());
    }

    /// Returns the header as stored, with its checksum; reserved bytes are zero.
    ///
    /// # Panics
    /// If the parent's name is longer than a header can hold: cut off, it would name another file.
    #[must_use]
    pub fn to_bytes(&self) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        bytes[..8].copy_from_slice(COOKIE);
        put(&mut bytes, 8, u64::MAX.to_be_bytes());
        put(&mut bytes, 16, self.table_offset.to_be_bytes());
        put(&mut bytes, 24, VERSION.to_be_bytes());
        put(&mut bytes, 28, self.max_table_entries.to_be_bytes());
        let block_size = u32::try_from(self.block_size.bytes()).expect("block sizes are at most 256 MiB");
        put(&mut bytes, 32, block_size.to_be_bytes());
        put(&mut bytes, 40, self.parent_uuid.unwrap_or_default().into_bytes());
        put(&mut bytes, 56, self.parent_timestamp.to_be_bytes());
        let units = self.parent_name.encode_utf16().count();
        assert!(units <= PARENT_NAME_UNITS, "the name of a parent has at most 256 UTF-16 code units");
        for (index, unit) in self.parent_name.encode_utf16().enumerate() {
            put(&mut bytes, NAME_AT + index * 2, unit.to_be_bytes());
        }
        for (slot, locator) in self.locators.iter().enumerate() {
            let at = LOCATORS_AT + slot * LOCATOR_BYTES;
            put(&mut bytes, at, locator.platform_code);
            put(&mut bytes, at + 4, locator.space.to_be_bytes());
            put(&mut bytes, at + 8, locator.length.to_be_bytes());
            put(&mut bytes, at + 16, locator.offset.to_be_bytes());
        }
        let sum = checksum(&bytes, CHECKSUM_AT);
        put(&mut bytes, CHECKSUM_AT, sum.to_be_bytes());
        bytes
    }
}

/// Decodes big-endian UTF-16 up to the first NUL.
fn decode_name(bytes: &[u8]) -> String {
    let units = bytes.chunks_exact(2).map(|pair| u16::from_be_bytes([pair[0], pair[1]])).take_while(|unit| *unit != 0);
    char::decode_utf16(units).map(|unit| unit.unwrap_or(char::REPLACEMENT_CHARACTER)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::ErrorKind;

    /// The header vhd-lib writes for a differencing disk of five blocks.
    fn sample() -> Header {
        Header {
            table_offset: 1536,
            max_table_entries: 5,
            block_size: BlockSize::DEFAULT,
            parent_uuid: Some(Uuid::parse_str("fedcba98-7654-4321-8fed-cba987654321").unwrap()),
            parent_timestamp: 0,
            parent_name: "20260801T000000Z.alias.vhd".to_owned(),
            locators: [ParentLocator::default(); 8],
        }
    }

    /// Returns the bytes with the field at `at` replaced and the checksum made right again.
    fn changed<const N: usize>(at: usize, field: [u8; N]) -> [u8; HEADER_BYTES] {
        let mut bytes = sample().to_bytes();
        put(&mut bytes, at, field);
        let sum = checksum(&bytes, CHECKSUM_AT);
        put(&mut bytes, CHECKSUM_AT, sum.to_be_bytes());
        bytes
    }

    fn kind(bytes: &[u8; HEADER_BYTES]) -> ErrorKind {
        Header::parse(bytes).unwrap_err().kind
    }

    #[test]
    fn a_header_is_written_as_by_xen_orchestra() {
        let expected = concat!(
            "6378737061727365ffffffffffffffff00000000000006000001000000000005",
            "00200000ffffe4cffedcba98765443218fedcba9876543210000000000000000",
            "0032003000320036003000380030003100540030003000300030003000300",
            "05a002e0061006c006900610073002e0076006800640000"
        );
        let bytes = sample().to_bytes();
        let start: String = bytes[..118].iter().map(|byte| format!("{byte:02x}")).collect();
        assert_eq!(start, expected);
        assert_eq!(bytes[118..], [0; 906]);
        assert_eq!(Header::parse(&bytes), Ok(sample()));
    }

    #[test]
    fn a_wrong_byte_anywhere_is_damage() {
        for at in 0..HEADER_BYTES {
            let mut bytes = sample().to_bytes();
            bytes[at] ^= 0x10;
            assert_eq!(kind(&bytes), ErrorKind::Damaged, "byte {at}");
        }
        assert_eq!(kind(&[0; HEADER_BYTES]), ErrorKind::Damaged);
    }

    #[test]
    fn other_versions_and_impossible_values_are_refused() {
        assert_eq!(kind(&changed(24, [0, 2, 0, 0])), ErrorKind::Unsupported);
        assert_eq!(kind(&changed(16, (1_u64 << 63).to_be_bytes())), ErrorKind::Damaged);
        assert_eq!(kind(&changed(32, 0_u32.to_be_bytes())), ErrorKind::Damaged);
        assert_eq!(kind(&changed(32, (3_u32 << 20).to_be_bytes())), ErrorKind::Damaged);
        assert_eq!(kind(&changed(32, (512_u32 << 20).to_be_bytes())), ErrorKind::Unsupported);
        assert_eq!(Header::parse(&changed(28, [0xff; 4])).unwrap().max_table_entries, u32::MAX);
    }

    #[test]
    fn a_parent_of_zeroes_is_no_parent() {
        let orphan = Header { parent_uuid: None, parent_name: String::new(), ..sample() };
        let bytes = orphan.to_bytes();
        assert_eq!(bytes[40..56], [0; 16]);
        assert_eq!(Header::parse(&bytes), Ok(orphan));
    }

    #[test]
    fn the_name_of_a_parent_may_fill_its_field() {
        let long = Header { parent_name: format!("é😀{}", "a".repeat(253)), ..sample() };
        assert_eq!(Header::parse(&long.to_bytes()), Ok(long));
    }

    #[test]
    fn a_lone_surrogate_in_a_name_is_replaced() {
        assert_eq!(Header::parse(&changed(64, [0xd8, 0, 0, b'a', 0, 0])).unwrap().parent_name, "\u{fffd}a");
    }

    #[test]
    fn locators_keep_their_slots() {
        let mut header = sample();
        header.locators[0] = ParentLocator { platform_code: *b"W2ku", space: 1, length: 54, offset: 3584 };
        header.locators[7] = ParentLocator { platform_code: *b"MacX", space: 512, length: u32::MAX, offset: u64::MAX };
        let bytes = header.to_bytes();
        assert_eq!(bytes[576..600], *b"W2ku\0\0\0\x01\0\0\0\x36\0\0\0\0\0\0\0\0\0\0\x0e\0");
        assert_eq!(Header::parse(&bytes), Ok(header));
    }
}
