//! What stands in a directory.
//!
//! A record is 32 bytes: a file or directory, a part of the long name of the one that follows, or the label of the volume.
//! Source: Microsoft, "FAT: General Overview of On-Disk Format" 1.03, "FAT Directory Structure".

use super::name::{self, Long};
use crate::clusters::{DosTime, RECORD, Records};
use crate::{Entry, Error, ErrorKind, Fields, Inode, Result};

/// Names of one directory at most. The format has 65,536 records, which no reader checks.
const MAX_ENTRIES: usize = 1_000_000;

/// Attributes.
const READ_ONLY: u8 = 0x01;
const LABEL: u8 = 0x08;
const DIRECTORY: u8 = 0x10;
/// All of the lower ones but that of a directory and of what is to be archived; the last two bits have no meaning.
const LONG: u8 = 0x0f;
const MASK: u8 = 0x3f;

/// The first byte of a record.
const END: u8 = 0x00;
const DELETED: u8 = 0xe5;

/// A record of a file or directory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Node {
    name: [u8; 11],
    case: u8,
    attributes: u8,
    /// The first cluster, 0 if it has none.
    pub(super) first: u32,
    /// In bytes; 0 of a directory.
    pub(super) size: u32,
    pub(super) modified: DosTime,
    /// Only the day.
    pub(super) accessed: DosTime,
    /// Zero where it is not kept.
    pub(super) created: DosTime,
}

/// What a record is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Meaning {
    End,
    Deleted,
    LongName,
    Label([u8; 11]),
    /// The directory itself, and the one it is in.
    Dots,
    Node(Node),
}

impl Node {
    /// Returns the file or directory that a record is, if it is one.
    pub(super) fn parse(record: &[u8; RECORD]) -> Option<Self> {
        match meaning(record) {
            Meaning::Node(node) => Some(node),
            _ => None,
        }
    }

    pub(super) fn is_directory(&self) -> bool {
        self.attributes & DIRECTORY != 0
    }

    pub(super) fn is_read_only(&self) -> bool {
        self.attributes & READ_ONLY != 0
    }
}

fn meaning(record: &[u8; RECORD]) -> Meaning {
    let fields = Fields(record);
    let (name, attributes) = (fields.array(0).expect("of 32"), record[11]);
    let (le16, time) =
        (|at| fields.le16(at).expect("of 32"), |date, time, hundredths| DosTime { date, time, hundredths });
    match record[0] {
        END => Meaning::End,
        DELETED => Meaning::Deleted,
        _ if attributes & MASK == LONG => Meaning::LongName,
        _ if attributes & LABEL != 0 => Meaning::Label(name),
        _ if name == *b".          " || name == *b"..         " => Meaning::Dots,
        _ => Meaning::Node(Node {
            name,
            case: record[12],
            attributes,
            first: u32::from(le16(20)) << 16 | u32::from(le16(26)),
            size: fields.le32(28).expect("of 32"),
            modified: time(le16(24), le16(22), 0),
            accessed: time(le16(18), 0, 0),
            created: time(le16(16), le16(14), record[13]),
        }),
    }
}

/// Returns all names; their numbers are where their records stand.
pub(super) fn list(records: Records) -> Result<Vec<Entry>> {
    let mut found = Vec::new();
    let mut long = Long::default();
    for record in records {
        let record = record?;
        match meaning(&record.bytes) {
            Meaning::End => break,
            Meaning::LongName => long.add(&record.bytes),
            Meaning::Deleted | Meaning::Label(_) | Meaning::Dots => long = Long::default(),
            Meaning::Node(node) => {
                let name = long.take(&node.name).unwrap_or_else(|| name::short(&node.name, node.case));
                // Only blanks: Linux leaves it out, too.
                if name.is_empty() {
                    continue;
                }
                if found.len() >= MAX_ENTRIES {
                    return Err(Error::new(ErrorKind::TooMuch, format!("it holds more than {MAX_ENTRIES} names")));
                }
                found.push(Entry { name, inode: Inode(record.place / RECORD as u64) });
            }
        }
    }
    Ok(found)
}

/// Returns the label of the volume, which is in its root.
pub(super) fn label(records: Records) -> Result<Option<String>> {
    for record in records {
        match meaning(&record?.bytes) {
            Meaning::End => break,
            Meaning::Label(stored) => return Ok(Some(name::label(&stored))),
            _ => {}
        }
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_is_what_its_attributes_say() {
        let mut record = [0; RECORD];
        record[..13].copy_from_slice(b"NAME    TXT\x21\x08");
        record[13..]
            .copy_from_slice(&[150, 1, 2, 3, 4, 5, 6, 0x34, 0x12, 7, 8, 9, 10, 0x78, 0x56, 0xef, 0xcd, 0xab, 0x89]);
        let time = |date, time, hundredths| DosTime { date, time, hundredths };
        let node = Node {
            name: *b"NAME    TXT",
            case: 8,
            attributes: 0x21,
            first: 0x1234_5678,
            size: 0x89ab_cdef,
            modified: time(0x0a09, 0x0807, 0),
            accessed: time(0x0605, 0, 0),
            created: time(0x0403, 0x0201, 150),
        };
        assert_eq!(meaning(&record), Meaning::Node(node));
        assert!(node.is_read_only() && !node.is_directory());
        let with = |changes: &[(usize, u8)]| {
            let mut record = record;
            changes.iter().for_each(|(at, byte)| record[*at] = *byte);
            meaning(&record)
        };
        assert_eq!(with(&[(0, 0)]), Meaning::End);
        assert_eq!(with(&[(0, 0xe5)]), Meaning::Deleted);
        assert_eq!(with(&[(11, 0x0f)]), Meaning::LongName);
        assert_eq!(with(&[(11, 0xcf)]), Meaning::LongName);
        assert_eq!(with(&[(11, 0x08)]), Meaning::Label(*b"NAME    TXT"));
        assert!(matches!(with(&[(11, 0x30)]), Meaning::Node(node) if node.is_directory()));
        for name in [b".          ", b"..         "] {
            record[..11].copy_from_slice(name);
            record[11] = DIRECTORY;
            assert_eq!(meaning(&record), Meaning::Dots);
        }
    }
}
