//! The descriptors of a volume: which trees of names it has, and where they start.
//!
//! ```text
//! 32 KiB, not used │ primary │ boot │ supplementary (Joliet) │ ... │ end │ of UDF, if it is that, too
//! ```
//!
//! Each is a sector. Source: ECMA-119, 8; the Joliet specification, "Identifying the Joliet SVD".

use disk::Disk;

use super::record::{Record, SECTOR};
use crate::read::read_within;
use crate::{Error, Fields, Result, utf16};

/// The first and the last sector that are looked at, as in Linux.
const SECTORS: std::ops::Range<u64> = 16..100;

/// Kinds of descriptors.
const PRIMARY: u8 = 1;
const SUPPLEMENTARY: u8 = 2;
const END: u8 = 255;

/// Where a tree of names starts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Tree {
    /// Bytes of a block: 512, 1024 or 2048.
    pub(super) block_size: u64,
    /// The block of the root.
    pub(super) root: u64,
    /// The name of the volume.
    pub(super) label: String,
    /// When it was changed, or made: what Linux takes for an identifier. Empty if that is not told.
    pub(super) uuid: String,
    /// Bytes of the volume.
    pub(super) size: u64,
}

/// What is of use in all descriptors; each the first of its kind.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Descriptors {
    pub(super) primary: Option<Tree>,
    pub(super) joliet: Option<Tree>,
    /// Whether the volume is one of UDF at the same time.
    pub(super) has_udf: bool,
}

impl Descriptors {
    /// Reads the descriptors of a volume.
    pub(super) fn read(disk: &dyn Disk) -> Result<Self> {
        let mut found = Self::default();
        let mut has_ended = false;
        for sector in SECTORS {
            let bytes = read_within(disk, sector * SECTOR as u64, SECTOR)?;
            let fields = Fields(&bytes);
            match (fields.bytes(1, 5), fields.u8(0)) {
                (Some(b"NSR02" | b"NSR03"), _) => found.has_udf = true,
                (Some(b"CD001"), Some(END)) => has_ended = true,
                (Some(b"CD001"), Some(PRIMARY)) if found.primary.is_none() && !has_ended => {
                    found.primary = Some(Tree::parse(fields, false)?);
                }
                (Some(b"CD001"), Some(SUPPLEMENTARY)) if found.joliet.is_none() && !has_ended && is_joliet(fields) => {
                    found.joliet = Some(Tree::parse(fields, true)?);
                }
                (Some(b"CD001" | b"BEA01" | b"TEA01" | b"BOOT2"), _) => {}
                _ if has_ended => break,
                _ => {}
            }
        }
        Ok(found)
    }
}

/// Returns whether the escape sequence of a supplementary descriptor is one of the three levels of Joliet.
fn is_joliet(fields: Fields) -> bool {
    matches!(fields.array(88), Some([b'%', b'/', b'@' | b'C' | b'E']))
}

impl Tree {
    fn parse(fields: Fields, is_joliet: bool) -> Result<Self> {
        Self::fields(fields, is_joliet).unwrap_or_else(|| Err(Error::damaged("a descriptor of the volume is cut off")))
    }

    /// `None` if there are not enough bytes.
    fn fields(fields: Fields, is_joliet: bool) -> Option<Result<Self>> {
        let block_size = fields.le16(128)?;
        if ![512, 1024, 2048].contains(&block_size) {
            return Some(Err(Error::unsupported(format!("its blocks have {block_size} bytes"))));
        }
        let root = fields.bytes(156, 34)?;
        let Some(root) = Record::parse(root) else {
            return Some(Err(Error::damaged("the descriptor of the volume has no record of the root")));
        };
        let label = fields.bytes(40, 32)?;
        let label = match is_joliet {
            true => String::from_utf8_lossy(&utf16::to_bytes(utf16::big_endian(label))).into_owned(),
            false => String::from_utf8_lossy(label).into_owned(),
        };
        let (made, changed) = (fields.bytes(813, 16)?, fields.bytes(830, 16)?);
        Some(Ok(Self {
            block_size: block_size.into(),
            root: root.block(),
            label: label.trim_end_matches([' ', '\0']).to_owned(),
            uuid: date(changed).or_else(|| date(made)).unwrap_or_default(),
            size: u64::from(fields.le32(80)?) * u64::from(block_size),
        }))
    }
}

/// Returns the parts of a date with lines between, `None` if it is not told.
fn date(digits: &[u8]) -> Option<String> {
    let text = std::str::from_utf8(digits).ok().filter(|text| text.bytes().all(|byte| byte.is_ascii_digit()))?;
    let parts = [0..4, 4..6, 6..8, 8..10, 10..12, 12..14, 14..16].map(|range| &text[range]);
    text.contains(|digit| digit != '0').then(|| parts.join("-"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ErrorKind;
    use crate::memory::Memory;

    /// A descriptor with blocks of 2,048 bytes and the root in block 30.
    fn descriptor(kind: u8, escape: &[u8]) -> Vec<u8> {
        let mut bytes = vec![0; SECTOR];
        bytes[0] = kind;
        bytes[1..6].copy_from_slice(b"CD001");
        bytes[40..72].fill(b' ');
        bytes[40..44].copy_from_slice(b"NAME");
        bytes[80] = 200;
        bytes[88..88 + escape.len()].copy_from_slice(escape);
        bytes[129] = 8;
        (bytes[156], bytes[158], bytes[188]) = (34, 30, 1);
        bytes[813..829].copy_from_slice(b"2026112216000099");
        bytes[830..846].fill(b'0');
        bytes
    }

    fn read(descriptors: &[Vec<u8>]) -> Result<Descriptors> {
        let mut disk = Memory::new(200 * 2048);
        disk.write(16 * 2048, &descriptors.concat());
        Descriptors::read(&disk)
    }

    #[test]
    fn trees_are_found_up_to_the_end_and_udf_behind_it() {
        let tree = |label: &str| Tree {
            block_size: 2048,
            root: 30,
            label: label.to_owned(),
            uuid: "2026-11-22-16-00-00-99".to_owned(),
            size: 200 * 2048,
        };
        let joliet = || descriptor(SUPPLEMENTARY, b"%/E");
        let mut udf = vec![0; SECTOR];
        udf[1..6].copy_from_slice(b"NSR02");
        let found = read(&[
            descriptor(0, b""),
            descriptor(PRIMARY, b""),
            descriptor(SUPPLEMENTARY, b"%/G"),
            joliet(),
            descriptor(END, b""),
            udf,
        ]);
        let units = String::from_utf16_lossy(&[0x4e41, 0x4d45]) + &"\u{2020}".repeat(14);
        let expected = Descriptors { primary: Some(tree("NAME")), joliet: Some(tree(&units)), has_udf: true };
        assert_eq!(found, Ok(expected));
        let found = read(&[descriptor(PRIMARY, b""), descriptor(END, b""), joliet(), descriptor(PRIMARY, b"")]);
        assert_eq!(found, Ok(Descriptors { primary: Some(tree("NAME")), ..Descriptors::default() }));
        assert_eq!(read(&[]), Ok(Descriptors::default()));
    }

    #[test]
    fn blocks_of_other_sizes_are_not_read() {
        let mut other = descriptor(PRIMARY, b"");
        other[129] = 16;
        let error = read(&[other]).unwrap_err();
        assert_eq!((error.kind(), error.to_string().as_str()), (ErrorKind::Unsupported, "its blocks have 4096 bytes"));
        let mut none = descriptor(PRIMARY, b"");
        none[156] = 3;
        assert_eq!(read(&[none]).unwrap_err().kind(), ErrorKind::Damaged);
    }
}
