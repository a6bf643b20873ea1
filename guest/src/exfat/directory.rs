//! What stands in a directory.
//!
//! ```text
//! file: attributes, times, how many follow, checksum of all │ stream: where it lies, how long │ name │ name ...
//! ```
//!
//! Each record is of 32 bytes, and starts with its type: in use, secondary (it belongs to one before), benign, code.
//! Source: Microsoft, "exFAT file system specification", sections 6 and 7.

use crate::clusters::{DosTime, RECORD, Record, Records};
use crate::{Entry, Error, ErrorKind, Fields, Inode, Result, Time, utf16};

/// Names of one directory at most.
const MAX_ENTRIES: usize = 1_000_000;

/// Types of records.
const END: u8 = 0x00;
const LABEL: u8 = 0x83;
const FILE: u8 = 0x85;
const STREAM: u8 = 0xc0;
const NAME: u8 = 0xc1;
/// In a type, that the record is in use and belongs to one before.
const SECONDARY_IN_USE: u8 = 0xc0;

/// Records of a file after the first: a stream, names, and perhaps some of others.
const SECONDARIES: std::ops::RangeInclusive<u8> = 2..=18;

/// Units of UTF-16 in a record of a name.
const UNITS: usize = 15;

/// Attributes.
const READ_ONLY: u16 = 0x01;
const DIRECTORY: u16 = 0x10;

/// Flags of a stream: that it has clusters, that they lie in a row and are in no chain.
const HAS_CLUSTERS: u8 = 0x01;
const IN_A_ROW: u8 = 0x02;

/// Seconds of the step in which a zone is told.
const ZONE_STEP: i64 = 15 * 60;

/// A file or directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Node {
    pub(super) name: Vec<u8>,
    pub(super) is_directory: bool,
    pub(super) is_read_only: bool,
    /// The first cluster, `None` if it has none.
    pub(super) first: Option<u32>,
    /// Whether its clusters lie in a row.
    pub(super) is_in_a_row: bool,
    /// In bytes.
    pub(super) size: u64,
    /// Bytes that were written, `size` at most; those after them are zeroes.
    pub(super) valid: u64,
    pub(super) created: Time,
    pub(super) modified: Time,
    pub(super) accessed: Time,
}

impl Node {
    /// Returns the file whose first record comes next, if one does.
    ///
    /// # Errors
    /// [`ErrorKind::Damaged`] if its records do not belong together.
    pub(super) fn read(records: &mut Records) -> Result<Option<Self>> {
        match records.next().transpose()? {
            Some(first) if first.bytes[0] == FILE => Self::after(&first, records).map(Some),
            _ => Ok(None),
        }
    }

    /// Returns the file of which `first` is the first record.
    fn after(first: &Record, records: &mut Records) -> Result<Self> {
        let count = first.bytes[1];
        let damaged = |what: String| Error::damaged(format!("the file at {}: {what}", first.place));
        if !SECONDARIES.contains(&count) {
            return Err(damaged(format!("{count} records follow")));
        }
        let mut set = vec![first.bytes];
        for number in 1..=count {
            match records.next().transpose()? {
                Some(next) if next.bytes[0] & SECONDARY_IN_USE == SECONDARY_IN_USE => set.push(next.bytes),
                _ => return Err(damaged(format!("record {number} of {count} that follow is missing"))),
            }
        }
        let stored = Fields(&first.bytes).le16(2).expect("of 32");
        if checksum(&set) != stored {
            return Err(damaged("its records have a wrong checksum".to_owned()));
        }
        Self::parse(&set).ok_or_else(|| damaged("its records contradict each other".to_owned()))
    }

    /// Returns the file that a set of records is; the first is that of a file.
    fn parse(set: &[[u8; RECORD]]) -> Option<Self> {
        let (file, stream) = (Fields(set.first()?), Fields(set.get(1)?));
        if stream.u8(0)? != STREAM {
            return None;
        }
        let len = usize::from(stream.u8(3)?);
        let names = set.get(2..2 + len.div_ceil(UNITS))?;
        if len == 0 || names.iter().any(|record| record[0] != NAME) {
            return None;
        }
        let units = names.iter().flat_map(|record| record[2..].chunks_exact(2));
        let units: Vec<u16> = units.take(len).map(|unit| u16::from_le_bytes([unit[0], unit[1]])).collect();
        let (attributes, flags) = (file.le16(4)?, stream.u8(1)?);
        let (first, valid, size) = (stream.le32(20)?, stream.le64(8)?, stream.le64(24)?);
        let has_clusters = flags & HAS_CLUSTERS != 0 && first != 0;
        if valid > size || size > i64::MAX.unsigned_abs() || size > 0 && !has_clusters {
            return None;
        }
        let time = |at: usize, hundredths: u8, zone: usize| {
            let dos = DosTime { date: file.le16(at + 2)?, time: file.le16(at)?, hundredths };
            Some(in_zone(dos.as_utc(), file.u8(zone)?))
        };
        Some(Self {
            name: utf16::to_bytes(units),
            is_directory: attributes & DIRECTORY != 0,
            is_read_only: attributes & READ_ONLY != 0,
            first: has_clusters.then_some(first),
            is_in_a_row: flags & IN_A_ROW != 0,
            size,
            valid,
            created: time(8, file.u8(20)?, 22)?,
            modified: time(12, file.u8(21)?, 23)?,
            accessed: time(16, 0, 24)?,
        })
    }
}

/// Returns a moment whose clock ran so far ahead of UTC: seven bits of quarters of an hour, signed, if the eighth says so.
fn in_zone(local: Time, zone: u8) -> Time {
    if zone & 0x80 == 0 {
        return local;
    }
    // The seventh bit is the sign.
    let steps = i64::from(zone & 0x3f) - i64::from(zone & 0x40);
    Time { seconds: local.seconds - steps * ZONE_STEP, ..local }
}

/// Returns the checksum of the records of a file, in the first of which it stands.
fn checksum(set: &[[u8; RECORD]]) -> u16 {
    let counted = set.iter().flatten().enumerate().filter(|(at, _)| !matches!(at, 2 | 3));
    counted.fold(0, |sum: u16, (_, byte)| sum.rotate_right(1).wrapping_add(u16::from(*byte)))
}

/// Returns all names; `number` says the number of the file whose first record is at a place.
pub(super) fn list(mut records: Records, number: impl Fn(u64) -> Inode) -> Result<Vec<Entry>> {
    let mut found = Vec::new();
    while let Some(record) = records.next().transpose()? {
        match record.bytes[0] {
            END => break,
            FILE => {
                let node = Node::after(&record, &mut records)?;
                if found.len() >= MAX_ENTRIES {
                    return Err(Error::new(ErrorKind::TooMuch, format!("it holds more than {MAX_ENTRIES} names")));
                }
                found.push(Entry { name: node.name, inode: number(record.place) });
            }
            // Not in use, of the volume itself, or of a later version.
            _ => {}
        }
    }
    Ok(found)
}

/// Returns the label of the volume, which is in its root.
pub(super) fn label(records: Records) -> Result<Option<String>> {
    for record in records {
        let bytes = record?.bytes;
        match bytes[0] {
            END => break,
            LABEL => {
                let units = bytes[2..24].chunks_exact(2).take(bytes[1].into());
                let units: Vec<u16> = units.map(|unit| u16::from_le_bytes([unit[0], unit[1]])).collect();
                return Ok(Some(String::from_utf16_lossy(&units)));
            }
            _ => {}
        }
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The records of a file of 5,000 bytes, 700 of them written, with a sound checksum unless changed after.
    fn set(name: &str, changes: &[(usize, usize, u8)]) -> Vec<[u8; RECORD]> {
        let units: Vec<u16> = name.encode_utf16().collect();
        let (mut file, mut stream) = ([0; RECORD], [0; RECORD]);
        file[0] = FILE;
        file[1] = u8::try_from(1 + units.len().div_ceil(UNITS)).unwrap();
        (file[4], file[20], file[22], file[23]) = (0x21, 150, 0x80 | 8, 0x80 | 0x78);
        for at in [8, 12, 16] {
            // 2020-02-29 12:30:10.
            file[at..at + 4]
                .copy_from_slice(&(((40 << 9 | 2 << 5 | 29) << 16 | 12 << 11 | 30 << 5 | 5_u32).to_le_bytes()));
        }
        (stream[0], stream[1], stream[3]) = (STREAM, 3, u8::try_from(units.len()).unwrap());
        stream[8..16].copy_from_slice(&700_u64.to_le_bytes());
        stream[20] = 9;
        stream[24..32].copy_from_slice(&5000_u64.to_le_bytes());
        let mut set = vec![file, stream];
        for part in units.chunks(UNITS) {
            let mut record = [0; RECORD];
            record[0] = NAME;
            for (at, unit) in part.iter().enumerate() {
                record[2 + 2 * at..4 + 2 * at].copy_from_slice(&unit.to_le_bytes());
            }
            set.push(record);
        }
        for (number, at, byte) in changes {
            set[*number][*at] = *byte;
        }
        let sum = checksum(&set).to_le_bytes();
        set[0][2..4].copy_from_slice(&sum);
        set
    }

    #[test]
    fn a_set_of_records_is_a_file() {
        for name in ["a", "fifteen-letters", "a name longer than a record", "日本 😀"] {
            let node = Node::parse(&set(name, &[])).unwrap();
            let local = 1_582_979_410;
            let time = |seconds, nanoseconds| Time { seconds, nanoseconds };
            let expected = Node {
                name: name.as_bytes().to_vec(),
                is_directory: false,
                is_read_only: true,
                first: Some(9),
                is_in_a_row: true,
                size: 5000,
                valid: 700,
                // Two hours ahead of UTC, two behind it, not told.
                created: time(local - 7200 + 1, 500_000_000),
                modified: time(local + 7200, 0),
                accessed: time(local, 0),
            };
            assert_eq!(node, expected);
        }
    }

    #[test]
    fn what_contradicts_itself_is_no_file() {
        let cases: [(usize, usize, u8); 7] =
            [(1, 0, NAME), (1, 3, 0), (1, 3, 200), (2, 0, STREAM), (1, 9, 0xff), (1, 20, 0), (1, 1, 2)];
        for change in cases {
            assert_eq!(Node::parse(&set("a name", &[change])), None, "{change:?}");
        }
    }
}
