//! An item that says where bytes of a file are.

use fs_btrfs::compression::{Compression, MAX_COMPRESSED, MAX_UNCOMPRESSED};

use crate::{Error, Fields, Result};

/// Bytes of a file that stand in the tree at most.
const MAX_INLINE: usize = 64 << 10;

const INLINE: u8 = 0;
const PLAIN: u8 = 1;
const UNWRITTEN: u8 = 2;

/// Bytes of a file that lie together.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Stored<'a> {
    /// Where they start in the file.
    pub(super) start: u64,
    /// How many they are, more than 0 but for an inline extent.
    pub(super) len: u64,
    pub(super) content: Content<'a>,
}

/// What the bytes are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Content<'a> {
    Hole,
    Unwritten,
    /// They are from this logical address on.
    Plain(u64),
    /// They are a part of what this unpacks to.
    Packed {
        packed: Packed,
        skip: u64,
    },
    /// These, maybe compressed.
    Inline(&'a [u8], Compression),
}

/// An extent that is compressed as a whole.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Packed {
    pub(super) logical: u64,
    /// Bytes that it takes, and those that it unpacks to.
    pub(super) len: usize,
    pub(super) unpacked: usize,
    pub(super) compression: Compression,
}

/// Parses an item. Source: Linux, `struct btrfs_file_extent_item` and what its tree checker demands of it.
pub(super) fn parse(start: u64, item: &[u8], sector: u64) -> Result<Stored<'_>> {
    let short = || Error::damaged(format!("the extent at {start} has an item that is too short"));
    let fields = Fields(item);
    let unpacked = fields.le64(8).ok_or_else(short)?;
    let (compression, kind) = (fields.u8(16).ok_or_else(short)?, fields.u8(20).ok_or_else(short)?);
    if fields.u8(17) != Some(0) || fields.le16(18) != Some(0) {
        return Err(Error::unsupported(format!("the extent at {start} is encrypted or encoded in an unknown way")));
    }
    let compression = Compression::from_byte(compression).map_err(|error| Error::unsupported(error.to_string()))?;
    let bad = |what: &str| Error::damaged(format!("the extent at {start} {what}"));
    if kind == INLINE {
        let bytes = item.get(21..).ok_or_else(short)?;
        let len = if compression.is_compressed() { unpacked } else { bytes.len() as u64 };
        let is_sound = start == 0 && usize::try_from(len).is_ok_and(|len| len <= MAX_INLINE);
        let content = Content::Inline(bytes, compression);
        return if is_sound { Ok(Stored { start, len, content }) } else { Err(bad("is not one that is inline")) };
    }
    if !matches!(kind, PLAIN | UNWRITTEN) {
        return Err(bad(&format!("is of no kind ({kind})")));
    }
    let mut numbers = [0; 4];
    for (number, at) in numbers.iter_mut().zip([21, 29, 37, 45]) {
        *number = fields.le64(at).ok_or_else(short)?;
    }
    let [logical, taken, skip, len] = numbers;
    if len == 0 || [start, logical, taken, skip, len].iter().any(|number| number % sector != 0) {
        return Err(bad("is not of whole sectors"));
    }
    if start.checked_add(len).is_none_or(|end| i64::try_from(end).is_err()) {
        return Err(bad("ends past all files"));
    }
    let stored = |content| Ok(Stored { start, len, content });
    if logical == 0 {
        return stored(Content::Hole);
    }
    let whole = if compression.is_compressed() { unpacked } else { taken };
    if skip.checked_add(len).is_none_or(|end| end > whole) {
        return Err(bad("is a part of one that is shorter"));
    }
    if logical.checked_add(taken).is_none() {
        return Err(bad("lies past all addresses"));
    }
    if kind == UNWRITTEN {
        return stored(Content::Unwritten);
    }
    if !compression.is_compressed() {
        return stored(Content::Plain(logical + skip));
    }
    let too_long = || bad("is longer than a compressed one can be");
    let within = |len: u64, most: usize| usize::try_from(len).ok().filter(|len| *len <= most).ok_or_else(too_long);
    let most = usize::try_from(MAX_COMPRESSED).expect("128 KiB");
    let packed =
        Packed { logical, len: within(taken, most)?, unpacked: within(unpacked, MAX_UNCOMPRESSED)?, compression };
    stored(Content::Packed { packed, skip })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ErrorKind;

    const SECTOR: u64 = 4096;

    fn item(kind: u8, compression: u8, unpacked: u64, numbers: [u64; 4]) -> Vec<u8> {
        let mut item = vec![0; 53];
        item[8..16].copy_from_slice(&unpacked.to_le_bytes());
        (item[16], item[20]) = (compression, kind);
        for (at, number) in (21..).step_by(8).zip(numbers) {
            item[at..at + 8].copy_from_slice(&number.to_le_bytes());
        }
        item
    }

    #[test]
    fn every_kind_of_extent_is_told_from_the_others() {
        let packed = Packed { logical: 8192, len: 4096, unpacked: 65536, compression: Compression::Zstd };
        let cases = [
            (item(1, 0, 8192, [0, 0, 0, 8192]), Content::Hole),
            (item(2, 0, 8192, [4096, 8192, 0, 8192]), Content::Unwritten),
            (item(1, 0, 12288, [4096, 12288, 4096, 8192]), Content::Plain(8192)),
            (item(1, 3, 65536, [8192, 4096, 12288, 8192]), Content::Packed { packed, skip: 12288 }),
        ];
        for (item, content) in cases {
            assert_eq!(parse(4096, &item, SECTOR), Ok(Stored { start: 4096, len: 8192, content }));
        }
        let inline = item(0, 0, 32, [u64::MAX; 4]);
        let content = Content::Inline(&[0xff; 32], Compression::None);
        assert_eq!(parse(0, &inline, SECTOR), Ok(Stored { start: 0, len: 32, content }));
    }

    #[test]
    fn what_contradicts_itself_is_refused() {
        let damaged = [
            (0, item(3, 0, 4096, [4096, 4096, 0, 4096])),
            (0, item(1, 0, 4096, [4096, 4096, 4096, 4096])),
            (0, item(1, 0, 8192, [4096, 4096, 0, 8192])),
            (0, item(1, 0, 4096, [4096, 4096, u64::MAX - 4095, 4096])),
            (0, item(1, 0, 4096, [4096, 4096, 0, 0])),
            (1, item(1, 0, 4096, [4096, 4096, 0, 4096])),
            (0, item(1, 0, 4096, [4097, 4096, 0, 4096])),
            (0, item(1, 0, 8192, [u64::MAX - 4095, 8192, 4096, 4096])),
            (0, item(1, 0, 8192, [u64::MAX - 8191, 8192, 4096, 4096])),
            (u64::MAX - 4095, item(1, 0, 4096, [4096, 4096, 0, 4096])),
            (0, item(1, 1, 1 << 20, [4096, 4096, 0, 4096])),
            (0, item(1, 1, 4096, [4096, 1 << 20, 0, 4096])),
            (4096, item(0, 0, 32, [0; 4])),
            (0, item(0, 1, 1 << 40, [0; 4])),
            (0, item(1, 0, 4096, [4096, 4096, 0, 4096])[..52].to_vec()),
            (0, vec![0; 20]),
        ];
        for (start, item) in damaged {
            assert_eq!(
                parse(start, &item, SECTOR).expect_err("damaged").kind(),
                ErrorKind::Damaged,
                "{start} {item:?}"
            );
        }
        let mut encrypted = item(1, 0, 4096, [4096, 4096, 0, 4096]);
        encrypted[17] = 1;
        for item in [encrypted, item(1, 4, 4096, [4096, 4096, 0, 4096])] {
            assert_eq!(parse(0, &item, SECTOR).expect_err("unknown").kind(), ErrorKind::Unsupported);
        }
    }
}
