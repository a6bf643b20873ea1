//! Fast commits: what changed in single files since the last transaction, beside the ring of the journal.
//!
//! ```text
//! u16 tag, u16 length, that many bytes │ ... │ head: features, transaction │ ... │ tail: transaction, checksum of all of it
//! ```
//!
//! They are found, not applied. Source: "Fast commits" of the kernel's documentation of ext4, and fs/ext4/fast_commit.h of
//! Linux.

use fs_ext4::checksum::linux_crc32c;

use crate::Fields;

const PADDING: u16 = 7;
const TAIL: u16 = 8;
const HEAD: u16 = 9;

/// Bytes of a tag and a length.
const TAG: usize = 4;

/// The area of fast commits, block by block.
#[derive(Debug)]
pub(super) struct Area {
    /// The transaction after which they come.
    transaction: u32,
    has_head: bool,
    sum: u32,
    commits: u32,
}

impl Area {
    /// Starts with the transaction that was not committed yet.
    pub(super) fn new(transaction: u32) -> Self {
        Self { transaction, has_head: false, sum: 0, commits: 0 }
    }

    /// Adds the next block; returns whether more may follow.
    pub(super) fn add(&mut self, block: &[u8]) -> bool {
        let fields = Fields(block);
        let mut at = 0;
        while let (Some(tag), Some(len)) = (fields.le16(at), fields.le16(at + 2)) {
            let len = usize::from(len);
            let Some(value) = fields.bytes(at + TAG, len) else { return false };
            let value = Fields(value);
            match tag {
                HEAD => {
                    // Features that nobody knows, or an older one.
                    if value.le32(0) != Some(0) || value.le32(4) != Some(self.transaction) {
                        return false;
                    }
                    self.has_head = true;
                    self.sum = linux_crc32c(self.sum, &block[at..at + TAG + len]);
                }
                TAIL => {
                    let summed = fields.bytes(at, TAG + 4).unwrap_or_default();
                    self.sum = linux_crc32c(self.sum, summed);
                    if value.le32(0) != Some(self.transaction) || value.le32(4) != Some(self.sum) {
                        return false;
                    }
                    self.commits += 1;
                    self.sum = 0;
                }
                1..=PADDING if self.has_head => self.sum = linux_crc32c(self.sum, &block[at..at + TAG + len]),
                _ => return false,
            }
            at += TAG + len;
        }
        true
    }

    /// Returns whether one was complete.
    pub(super) fn has_commits(&self) -> bool {
        self.commits > 0
    }
}
