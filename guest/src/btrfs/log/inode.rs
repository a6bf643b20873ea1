//! The item of an inode, as far as a replay changes it.
//!
//! Source: Linux `include/uapi/linux/btrfs_tree.h`, `struct btrfs_inode_item`.

use fs_btrfs::inode::{INODE_ITEM_KEY, INODE_ITEM_SIZE};

use super::super::view::Key;
use crate::{Error, Result};

const GENERATION: usize = 0;
const SIZE: usize = 16;
const BYTES: usize = 24;
const LINKS: usize = 40;
const MODE: usize = 52;

/// What an inode is, of what makes a difference.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Type {
    File,
    Directory,
}

/// An item.
#[derive(Clone)]
pub(super) struct Inode(Vec<u8>);

impl Inode {
    pub(super) fn key(number: u64) -> Key {
        Key { object: number, kind: INODE_ITEM_KEY, offset: 0 }
    }

    pub(super) fn new(item: &[u8]) -> Result<Self> {
        if item.len() < INODE_ITEM_SIZE {
            return Err(Error::damaged(format!("the item of an inode has {} bytes", item.len())));
        }
        Ok(Self(item.to_vec()))
    }

    pub(super) fn into_item(self) -> Vec<u8> {
        self.0
    }

    fn number<const N: usize>(&self, at: usize) -> [u8; N] {
        self.0[at..at + N].try_into().expect("the item is long enough")
    }

    fn set<const N: usize>(&mut self, at: usize, value: [u8; N]) {
        self.0[at..at + N].copy_from_slice(&value);
    }

    pub(super) fn links(&self) -> u32 {
        u32::from_le_bytes(self.number(LINKS))
    }

    pub(super) fn set_links(&mut self, links: u32) {
        self.set(LINKS, links.to_le_bytes());
    }

    pub(super) fn size(&self) -> u64 {
        u64::from_le_bytes(self.number(SIZE))
    }

    pub(super) fn set_size(&mut self, size: u64) {
        self.set(SIZE, size.to_le_bytes());
    }

    /// Bytes that its content takes.
    pub(super) fn bytes(&self) -> u64 {
        u64::from_le_bytes(self.number(BYTES))
    }

    pub(super) fn set_bytes(&mut self, bytes: u64) {
        self.set(BYTES, bytes.to_le_bytes());
    }

    /// Returns the bits of the mode that say what it is.
    fn kind(&self) -> u32 {
        u32::from_le_bytes(self.number(MODE)) & 0o170_000
    }

    pub(super) fn is(&self, what: Type) -> bool {
        self.kind()
            == match what {
                Type::File => 0o100_000,
                Type::Directory => 0o040_000,
            }
    }

    /// Whether both are of one kind.
    pub(super) fn is_alike(&self, other: &Self) -> bool {
        self.kind() == other.kind()
    }

    /// Returns what a name says that leads to it.
    pub(super) fn kind_of_name(&self) -> Result<u8> {
        // Source: Linux `include/linux/fs_types.h`.
        match self.kind() >> 12 {
            0o10 => Ok(1),
            0o04 => Ok(2),
            0o02 => Ok(3),
            0o06 => Ok(4),
            0o01 => Ok(5),
            0o14 => Ok(6),
            0o12 => Ok(7),
            kind => Err(Error::damaged(format!("an inode is of no kind ({kind})"))),
        }
    }

    /// Returns what it is once it was taken from a log, over the one that is there, if any.
    ///
    /// What its content takes, and the size of a directory, follow from what is added and removed. Without a generation it only
    /// says that the inode exists, and of a file how long it is if that is known.
    pub(super) fn over(&self, there: Option<Self>) -> Self {
        let mut inode = self.clone();
        let is_directory = self.is(Type::Directory);
        match there {
            None => {
                inode.set_bytes(0);
                if is_directory {
                    inode.set_size(0);
                }
            }
            Some(mut there) if u64::from_le_bytes(self.number(GENERATION)) == 0 => {
                if self.is(Type::File) && self.size() != 0 {
                    there.set_size(self.size());
                }
                return there;
            }
            Some(there) => {
                inode.set_bytes(there.bytes());
                if is_directory {
                    inode.set_size(there.size());
                }
            }
        }
        inode
    }
}
