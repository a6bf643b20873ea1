//! The records of a directory: where a file lies, how long it is, what it is called.
//!
//! ```text
//! length │ extent │ size │ date │ flags │ ... │ name │ what Rock Ridge adds
//! ```
//!
//! None crosses a sector, the end of which is zeroes. Where a number stands in both byte orders, the little-endian one is read.
//! Source: ECMA-119, 9.1 and 6.8.1.1.

use crate::{Error, Fields, Result};

/// Bytes of a sector, whatever those of a block.
pub(super) const SECTOR: usize = 2048;

/// Bytes of the longest record.
pub(super) const MAX_RECORD: usize = 255;

/// Bytes of a record before its name.
const HEAD: usize = 33;

/// Flags of a record: what it is of, and that it is not the last of its file.
const DIRECTORY: u8 = 0x02;
const ASSOCIATED: u8 = 0x04;
const CONTINUED: u8 = 0x80;

/// A record of a directory.
#[derive(Debug, Clone, Copy)]
pub(super) struct Record<'a> {
    fields: Fields<'a>,
    name_len: usize,
}

impl<'a> Record<'a> {
    /// Returns the record that bytes start with, `None` if they are none.
    pub(super) fn parse(bytes: &'a [u8]) -> Option<Self> {
        let len = usize::from(*bytes.first()?);
        let fields = Fields(bytes.get(..len)?);
        let name_len = usize::from(fields.u8(HEAD - 1)?);
        fields.bytes(HEAD, name_len)?;
        Some(Self { fields, name_len })
    }

    /// Its length in bytes.
    pub(super) fn len(&self) -> usize {
        self.fields.0.len()
    }

    /// The block that content starts at: after attributes of another kind that may stand before it.
    pub(super) fn block(&self) -> u64 {
        u64::from(self.number(2)) + u64::from(self.byte(1))
    }

    /// Bytes of content.
    pub(super) fn size(&self) -> u32 {
        self.number(10)
    }

    pub(super) fn date(&self) -> [u8; 7] {
        self.fields.array(18).unwrap_or_default()
    }

    pub(super) fn is_directory(&self) -> bool {
        self.byte(25) & DIRECTORY != 0
    }

    /// Whether it is of what belongs to another file of the same name, which Linux does not show.
    pub(super) fn is_associated(&self) -> bool {
        self.byte(25) & ASSOCIATED != 0
    }

    /// Whether the next record is of the same file.
    pub(super) fn is_continued(&self) -> bool {
        self.byte(25) & CONTINUED != 0
    }

    /// Whether other files lie in between its blocks.
    pub(super) fn is_interleaved(&self) -> bool {
        self.byte(27) != 0
    }

    /// Whether it is of the directory that it is in, or of the one above.
    pub(super) fn is_dots(&self) -> bool {
        matches!(self.name(), [0 | 1])
    }

    pub(super) fn name(&self) -> &'a [u8] {
        self.fields.bytes(HEAD, self.name_len).unwrap_or_default()
    }

    /// What follows the name.
    pub(super) fn system_use(&self) -> &'a [u8] {
        self.fields.0.get((HEAD + self.name_len).next_multiple_of(2)..).unwrap_or_default()
    }

    fn byte(&self, offset: usize) -> u8 {
        self.fields.u8(offset).unwrap_or_default()
    }

    fn number(&self, offset: usize) -> u32 {
        self.fields.le32(offset).unwrap_or_default()
    }
}

/// The records of a directory, each with where it starts in that (bytes).
pub(super) struct Records<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Records<'a> {
    /// Starts at the first record of a directory.
    pub(super) fn new(bytes: &'a [u8]) -> Self {
        Self { bytes, at: 0 }
    }
}

impl<'a> Iterator for Records<'a> {
    type Item = Result<(usize, Record<'a>)>;

    fn next(&mut self) -> Option<Self::Item> {
        while *self.bytes.get(self.at)? == 0 {
            self.at = (self.at + 1).next_multiple_of(SECTOR);
        }
        let at = self.at;
        let Some(record) = Record::parse(&self.bytes[at..]) else {
            self.at = self.bytes.len();
            return Some(Err(Error::damaged(format!("what stands at {at} in the directory is no record"))));
        };
        self.at += record.len();
        Some(Ok((at, record)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(len: u8, name: &[u8]) -> Vec<u8> {
        let mut bytes = vec![0; len.into()];
        bytes[0] = len;
        bytes[32] = u8::try_from(name.len()).unwrap();
        bytes[33..33 + name.len()].copy_from_slice(name);
        bytes
    }

    #[test]
    fn records_go_on_in_the_next_sector_after_a_zero() {
        let mut bytes = [record(34, &[0]), record(40, b"ABC")].concat();
        bytes.resize(SECTOR, 0);
        bytes.extend(record(36, b"D"));
        let found: Vec<_> = Records::new(&bytes).map(|record| record.map(|(at, record)| (at, record.name()))).collect();
        assert_eq!(found, [Ok((0, &[0][..])), Ok((34, b"ABC")), Ok((SECTOR, b"D"))]);
        bytes.truncate(SECTOR + 35);
        let last = Records::new(&bytes).last().unwrap().map(|(at, _)| at);
        assert_eq!(last, Err(Error::damaged("what stands at 2048 in the directory is no record")));
    }

    #[test]
    fn a_name_that_is_longer_than_its_record_is_none() {
        let mut bytes = record(36, b"ABC");
        assert_eq!(Record::parse(&bytes).map(|record| record.system_use().len()), Some(0));
        bytes[32] = 4;
        assert!(Record::parse(&bytes).is_none());
        assert!(
            Record::parse(&bytes[..35]).is_none() && Record::parse(&[]).is_none() && Record::parse(&[32; 32]).is_none()
        );
    }
}
