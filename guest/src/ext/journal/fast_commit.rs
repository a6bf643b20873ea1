//! Fast commits: what changed in single files since the last transaction, beside the ring of the journal.
//!
//! ```text
//! u16 tag, u16 length, that many bytes │ ... │ head: features, transaction │ ... │ tail: transaction, checksum of all of it
//! ```
//!
//! This reads them; [`Changes`](super::super::changes::Changes) applies them.
//! Source: "Fast commits" of the kernel's documentation of ext4, and fs/ext4/fast_commit.h of Linux.

use fs_ext4::checksum::linux_crc32c;
use fs_ext4::extent::Extent;

use crate::Fields;

use super::super::map::Place;

const ADD_RANGE: u16 = 1;
const DELETE_RANGE: u16 = 2;
const CREATE: u16 = 3;
const LINK: u16 = 4;
const UNLINK: u16 = 5;
const INODE: u16 = 6;
const PADDING: u16 = 7;
const TAIL: u16 = 8;
const HEAD: u16 = 9;

/// Bytes of a tag and a length.
const TAG: usize = 4;

/// What a fast commit says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in super::super) enum Change {
    /// An inode is this, but for its map.
    Inode { inode: u32, raw: Vec<u8> },
    /// Blocks of a file lie there now, or nowhere.
    Range { inode: u32, start: u64, len: u64, place: Option<Place> },
    /// A name leads to a new inode.
    Create { directory: u32, inode: u32, name: Vec<u8> },
    /// A name leads to an inode.
    Link { directory: u32, inode: u32, name: Vec<u8> },
    /// A name does not lead to an inode any more.
    Unlink { directory: u32, inode: u32, name: Vec<u8> },
}

/// The area of fast commits, read block by block.
#[derive(Debug)]
pub(super) struct Area {
    /// The transaction after which they come.
    transaction: u32,
    has_head: bool,
    sum: u32,
    /// Of a commit of which the end was not found yet.
    pending: Vec<Change>,
    changes: Vec<Change>,
}

impl Area {
    /// Starts with the transaction that was not committed yet.
    pub(super) fn new(transaction: u32) -> Self {
        Self { transaction, has_head: false, sum: 0, pending: Vec::new(), changes: Vec::new() }
    }

    /// Adds the next block; returns whether more may follow.
    pub(super) fn add(&mut self, block: &[u8]) -> bool {
        let mut rest = block;
        // Padding may be of no bytes.
        while rest.len() >= TAG {
            let Some(len) = self.add_tag(rest) else { return false };
            rest = &rest[len..];
        }
        true
    }

    /// Returns what was committed.
    pub(super) fn changes(self) -> Vec<Change> {
        self.changes
    }

    /// Adds the first tag of `bytes`, and returns what it takes of them; `None` where the commits end.
    fn add_tag(&mut self, bytes: &[u8]) -> Option<usize> {
        let fields = Fields(bytes);
        let tag = fields.le16(0)?;
        let len = TAG + usize::from(fields.le16(2)?);
        let value = Fields(fields.bytes(TAG, len - TAG)?);
        match tag {
            HEAD => {
                // None of an older transaction, none with features that nobody knows.
                if value.le32(0)? != 0 || value.le32(4)? != self.transaction {
                    return None;
                }
                self.has_head = true;
            }
            TAIL => {
                let sum = linux_crc32c(self.sum, fields.bytes(0, TAG + 4)?);
                if !self.has_head || value.le32(0)? != self.transaction || value.le32(4)? != sum {
                    return None;
                }
                self.changes.append(&mut self.pending);
                self.sum = 0;
                return Some(len);
            }
            PADDING if self.has_head => {}
            _ if self.has_head => self.pending.push(change(tag, value)?),
            _ => return None,
        }
        self.sum = linux_crc32c(self.sum, &bytes[..len]);
        Some(len)
    }
}

fn change(tag: u16, value: Fields) -> Option<Change> {
    let inode = value.le32(0)?;
    let name = || Some((inode, value.le32(4)?, value.0.get(8..)?.to_vec()));
    Some(match tag {
        ADD_RANGE => {
            let extent = Extent::parse(value.bytes(4, 12)?).ok()?;
            let place = if extent.uninitialized { Place::Unwritten } else { Place::At(extent.physical_block) };
            let (start, len) = (u64::from(extent.logical_block), u64::from(extent.length));
            Change::Range { inode, start, len, place: Some(place) }
        }
        DELETE_RANGE => {
            Change::Range { inode, start: u64::from(value.le32(4)?), len: u64::from(value.le32(8)?), place: None }
        }
        CREATE => name().map(|(directory, inode, name)| Change::Create { directory, inode, name })?,
        LINK => name().map(|(directory, inode, name)| Change::Link { directory, inode, name })?,
        UNLINK => name().map(|(directory, inode, name)| Change::Unlink { directory, inode, name })?,
        INODE => Change::Inode { inode, raw: value.0.get(4..)?.to_vec() },
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Blocks of 256 bytes of fast commits.
    struct Writer {
        bytes: Vec<u8>,
        sum: u32,
    }

    impl Writer {
        fn tag(&mut self, tag: u16, value: &[u8]) -> &mut Self {
            let start = self.bytes.len();
            self.bytes.extend(tag.to_le_bytes());
            self.bytes.extend(u16::try_from(value.len()).unwrap().to_le_bytes());
            self.bytes.extend(value);
            self.sum = linux_crc32c(self.sum, &self.bytes[start..]);
            self
        }

        fn head(&mut self, transaction: u32) -> &mut Self {
            self.tag(HEAD, &[[0; 4], transaction.to_le_bytes()].concat())
        }

        /// Ends a commit, and with it a block.
        fn tail(&mut self, transaction: u32) -> &mut Self {
            let len = 256 - self.bytes.len() % 256 - TAG;
            let start = self.bytes.len();
            self.bytes.extend(TAIL.to_le_bytes());
            self.bytes.extend(u16::try_from(len).unwrap().to_le_bytes());
            self.bytes.extend(transaction.to_le_bytes());
            let sum = linux_crc32c(self.sum, &self.bytes[start..]);
            self.bytes.extend(sum.to_le_bytes());
            self.bytes.resize(start + TAG + len, 0xee);
            self.sum = 0;
            self
        }

        fn read(&self) -> Vec<Change> {
            let mut area = Area::new(7);
            for block in self.bytes.chunks(256) {
                if !area.add(block) {
                    break;
                }
            }
            area.changes()
        }
    }

    fn writer() -> Writer {
        Writer { bytes: Vec::new(), sum: 0 }
    }

    const NAME: [u8; 10] = [2, 0, 0, 0, 12, 0, 0, 0, b'h', b'i'];

    #[test]
    fn every_tag_is_read() {
        let extent = [12, 0, 0, 0, 5, 0, 0, 0, 3, 0, 0, 0, 100, 0, 0, 0];
        let unwritten = [12, 0, 0, 0, 5, 0, 0, 0, 3, 0x80, 0, 0, 100, 0, 0, 0];
        let deleted = [12, 0, 0, 0, 9, 0, 0, 0, 4, 0, 0, 0];
        let mut writer = writer();
        writer.head(7).tag(INODE, &[12, 0, 0, 0, 1, 2, 3]).tag(ADD_RANGE, &extent).tag(ADD_RANGE, &unwritten);
        writer.tag(DELETE_RANGE, &deleted).tag(CREATE, &NAME).tag(PADDING, &[0; 9]).tail(7);
        writer.tag(LINK, &NAME).tag(UNLINK, &NAME).tail(7);
        let (directory, inode, name) = (2, 12, b"hi".to_vec());
        let range = |start, len, place| Change::Range { inode, start, len, place };
        let expected = [
            Change::Inode { inode, raw: vec![1, 2, 3] },
            range(5, 3, Some(Place::At(100))),
            range(5, 3, Some(Place::Unwritten)),
            range(9, 4, None),
            Change::Create { directory, inode, name: name.clone() },
            Change::Link { directory, inode, name: name.clone() },
            Change::Unlink { directory, inode, name },
        ];
        assert_eq!(writer.read(), expected);
    }

    #[test]
    fn a_commit_goes_on_in_the_next_block() {
        for left in [0, TAG, TAG + 1] {
            let mut writer = writer();
            writer.head(7);
            let len = 256 - writer.bytes.len() - TAG - left;
            writer.tag(INODE, &vec![1; len]);
            if left > 0 {
                writer.tag(PADDING, &vec![0; left - TAG]);
            }
            writer.tag(LINK, &NAME).tail(7);
            assert_eq!(writer.read().len(), 2, "{left}");
        }
    }

    #[test]
    fn only_whole_commits_after_the_last_transaction_count() {
        let one = writer().head(7).tag(LINK, &NAME).tail(7).read();
        assert_eq!(one.len(), 1);
        let mut damaged = writer();
        damaged.head(7).tag(LINK, &NAME).tail(7).tag(UNLINK, &NAME).tail(7);
        damaged.bytes[256 + 9] ^= 1;
        assert_eq!(damaged.read(), one);
        assert_eq!(writer().head(7).tag(LINK, &NAME).tail(7).tag(UNLINK, &NAME).read(), one);
        for nothing in [
            writer().head(6).tag(LINK, &NAME).tail(6),
            writer().head(7).tag(LINK, &NAME).tail(6),
            writer().tag(LINK, &NAME).tail(7),
            writer().head(7).tag(LINK, &NAME[..7]).tail(7),
            writer().head(7).tag(10, &NAME).tail(7),
            writer().tag(HEAD, &[1, 0, 0, 0, 7, 0, 0, 0]).tag(LINK, &NAME).tail(7),
        ] {
            assert_eq!(nothing.read(), [], "{:?}", nothing.bytes);
        }
    }
}
