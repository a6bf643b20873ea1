//! One header of a tar, and the names an XVA uses.
//!
//! Only what an XVA needs: regular files with short names. Extended headers (PAX, GNU long names) are refused, since
//! they could change the name or the size of the entry that follows.

use crate::{Error, ErrorKind, Result};

/// Bytes of a header, and what the content of an entry is padded to.
pub(crate) const SECTOR: u64 = 512;

/// One header.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Header {
    /// Name of the entry, with its folder.
    pub name: String,
    /// Bytes of content, without padding.
    pub size: u64,
}

impl Header {
    /// Parses a header and verifies its checksum; `None` for a block of zeroes, which begins the end of the archive.
    ///
    /// `at` is its place in the file in bytes, for messages. Source: POSIX.1-2017 pax, "ustar Interchange Format"; GNU
    /// tar for sizes in base 256.
    ///
    /// # Errors
    /// `Damaged` if it is no header, `Unsupported` if it is one of an entry that is not a regular file.
    pub fn parse(block: &[u8; 512], at: u64) -> Result<Option<Self>> {
        if block.iter().all(|byte| *byte == 0) {
            return Ok(None);
        }
        let damaged = |what: &str| Error::damaged(format!("at byte {at}: a tar header was expected, {what}"));
        let stored = number(&block[148..156]).ok_or_else(|| damaged("its checksum is no number"))?;
        let unsigned: u64 = summed(block).map(u64::from).sum();
        // Some old tars added signed bytes.
        let signed: i64 = summed(block).map(|byte| i64::from(i8::from_ne_bytes([byte]))).sum();
        if stored != unsigned && i64::try_from(stored) != Ok(signed) {
            return Err(damaged(&format!("its checksum is {stored} instead of {unsigned}")));
        }
        let text = |field: &[u8]| {
            let end = field.iter().position(|byte| *byte == 0).unwrap_or(field.len());
            String::from_utf8(field[..end].to_vec()).map_err(|_| damaged("its name is not UTF-8"))
        };
        let mut name = text(&block[..100])?;
        // GNU's own magic ("ustar  ") has other fields in the place of the prefix.
        if &block[257..263] == b"ustar\0" {
            let prefix = text(&block[345..500])?;
            if !prefix.is_empty() {
                name = format!("{prefix}/{name}");
            }
        }
        let size = number(&block[124..136]).ok_or_else(|| damaged("its size is no number"))?;
        match block[156] {
            b'0' | 0 => Ok(Some(Self { name, size })),
            kind => Err(Error::new(
                ErrorKind::Unsupported,
                format!(
                    "at byte {at}: '{}' is a tar entry of type '{}', an XVA holds regular files only",
                    name.escape_debug(),
                    char::from(kind).escape_debug()
                ),
            )),
        }
    }
}

/// Returns the bytes that are added up, the checksum itself taken as spaces.
fn summed(block: &[u8; 512]) -> impl Iterator<Item = u8> + '_ {
    block.iter().enumerate().map(|(at, byte)| if (148..156).contains(&at) { b' ' } else { *byte })
}

/// Parses a number in octal, or in base 256 where the first bit is set.
fn number(field: &[u8]) -> Option<u64> {
    if field[0] & 0x80 != 0 {
        // The second bit is the sign.
        if field[0] & 0x40 != 0 {
            return None;
        }
        let first = u64::from(field[0] & 0x3f);
        return field[1..].iter().try_fold(first, |sum, byte| sum.checked_mul(256)?.checked_add(u64::from(*byte)));
    }
    let is_filler = |byte: &u8| matches!(byte, b' ' | 0);
    let start = field.iter().position(|byte| *byte != b' ')?;
    let digits = &field[start..];
    let end = digits.iter().position(is_filler).unwrap_or(digits.len());
    if end == 0 || !digits[end..].iter().all(is_filler) {
        return None;
    }
    digits[..end].iter().try_fold(0_u64, |sum, byte| match byte {
        b'0'..=b'7' => sum.checked_mul(8)?.checked_add(u64::from(byte - b'0')),
        _ => None,
    })
}

/// Returns the bytes that an entry of `size` bytes takes with its header and padding, `None` if that is no length.
pub(crate) fn room(size: u64) -> Option<u64> {
    size.checked_next_multiple_of(SECTOR)?.checked_add(SECTOR)
}

/// What the name of an entry says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Name<'a> {
    /// A piece of a disk.
    Chunk { reference: &'a str, number: u64 },
    /// The checksum of the chunk of that number.
    Checksum { reference: &'a str, number: u64 },
    /// Anything else.
    Other,
}

impl<'a> Name<'a> {
    /// Reads a name.
    ///
    /// Source: xen-api `ocaml/xapi/stream_vdi.ml` (`%s/%08d`), XO `@xen-orchestra/xva/_formatBlockPath.mjs`.
    pub fn parse(name: &'a str) -> Self {
        let Some((reference, file)) = name.rsplit_once('/') else { return Self::Other };
        let bare = file.strip_suffix(".xxhash").or_else(|| file.strip_suffix(".checksum"));
        let digits = bare.unwrap_or(file);
        // Eight digits at least; fifteen are more than any file has room for, and no overflow.
        if !(8..=15).contains(&digits.len()) || !digits.bytes().all(|byte| byte.is_ascii_digit()) {
            return Self::Other;
        }
        let Ok(number) = digits.parse() else { return Self::Other };
        match bare {
            None => Self::Chunk { reference, number },
            Some(_) => Self::Checksum { reference, number },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn block(name: &str, size: &[u8], kind: u8) -> [u8; 512] {
        let mut block = [0; 512];
        block[..name.len()].copy_from_slice(name.as_bytes());
        block[124..124 + size.len()].copy_from_slice(size);
        block[156] = kind;
        block[257..265].copy_from_slice(b"ustar\x0000");
        let sum: u64 = summed(&block).map(u64::from).sum();
        block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        block
    }

    #[test]
    fn sizes_are_octal_or_base_256() {
        for (size, expected) in [
            (&b"00004000000 "[..], Some(1_048_576)),
            (b"     4000000", Some(1_048_576)),
            (b"77777777777\0", Some(0o77_777_777_777)),
            (b"\x80\0\0\0\0\0\0\x02\0\0\0\0", Some(0x2_0000_0000)),
            (b"\x80\0\0\0\xff\xff\xff\xff\xff\xff\xff\xff", Some(u64::MAX)),
            (b"\x80\0\0\x01\0\0\0\0\0\0\0\0", None),
            (b"\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff", None),
            (b"00004000008 ", None),
            (b"-0004000000 ", None),
            (b"0000400 0000", None),
            (b"            ", None),
            (b"\0\0\0\0\0\0\0\0\0\0\0\0", None),
        ] {
            let parsed = Header::parse(&block("a/00000000", size, b'0'), 0);
            assert_eq!(parsed.ok().flatten().map(|header| header.size), expected, "{size:?}");
        }
    }

    #[test]
    fn a_header_with_a_wrong_checksum_is_named_by_its_place() {
        let mut bytes = block("a/00000000", b"00000000001 ", b'0');
        bytes[0] = b'b';
        let error = Header::parse(&bytes, 1536).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Damaged);
        assert!(error.to_string().starts_with("at byte 1536: a tar header was expected"), "{error}");
    }

    #[test]
    fn headers_that_change_the_next_entry_are_refused() {
        for kind in [b'x', b'L', b'g', b'2', b'5'] {
            let error = Header::parse(&block("a", b"00000000001 ", kind), 0).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Unsupported, "{kind}");
        }
    }

    #[test]
    fn names_are_chunks_or_checksums_or_neither() {
        let reference = "Ref:2";
        for (name, expected) in [
            ("Ref:2/00000000", Name::Chunk { reference, number: 0 }),
            ("Ref:2/100000000", Name::Chunk { reference, number: 100_000_000 }),
            ("Ref:2/00000017.xxhash", Name::Checksum { reference, number: 17 }),
            ("Ref:2/00000017.checksum", Name::Checksum { reference, number: 17 }),
            ("Ref:2/0000017", Name::Other),
            ("Ref:2/+0000017", Name::Other),
            ("Ref:2/0000000000000000", Name::Other),
            ("Ref:2/00000017.xxhash.checksum", Name::Other),
            ("ova.xml", Name::Other),
        ] {
            assert_eq!(Name::parse(name), expected, "{name}");
        }
    }
}
