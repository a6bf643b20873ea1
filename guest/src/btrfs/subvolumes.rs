//! Subvolumes: each is a tree with inodes of its own, and a directory where its parent says so.
//!
//! ```text
//! 63 | 62 ....... 42 | 41 .. 32 | 31 ..... 0
//!  0 |             0 |   tree   |  inode         small numbers, of which there are most
//! 63 | 62 ... 40 | 39 ................... 0
//!  1 |   tree    |         inode                 larger ones
//! ```
//!
//! A file's number is made of both numbers, and of nothing that was counted: it stays the same whenever the filesystem is
//! opened.

use std::fmt;
use std::ops::ControlFlow;

use fs_btrfs::chunk::{DiskKey, objectid};
use fs_btrfs::fs::{ROOT_ITEM_KEY, root_item};

use super::volume::{Root, Volume};
use crate::{Error, ErrorKind, Fields, Inode, Result};

/// The tree that all others are in.
pub(super) const TOP: u64 = objectid::FS_TREE;

/// The root directory of each tree; what has a lower number is the filesystem's own.
pub(super) const ROOT: u64 = fs_btrfs::inode::FIRST_FREE_OBJECTID;

/// The empty directory that Linux shows in place of a subvolume that is not there: in a snapshot, since the subvolumes in
/// what it was made of are not in it.
pub(super) const EMPTY: u64 = fs_btrfs::subvol::EMPTY_SUBVOL_DIR_OBJECTID;

const ROOT_REF_KEY: u8 = 156;

/// Of a root item, where it counts its names.
const REFERENCES: usize = 216;

const SMALL: (u32, u32) = (10, 32);
const LARGE: (u32, u32) = (23, 40);

/// A file: its tree, and its number there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Place {
    pub(super) tree: u64,
    pub(super) inode: u64,
}

impl Place {
    /// Returns the number of a file in the filesystem.
    pub(super) fn number(self) -> Result<Inode> {
        // The top level is 0, and others are from 256 on.
        let tree = if self.tree == TOP { 0 } else { self.tree - (ROOT - 1) };
        let fits = |(trees, inodes): (u32, u32)| tree >> trees == 0 && self.inode >> inodes == 0;
        if fits(SMALL) {
            return Ok(Inode(tree << SMALL.1 | self.inode));
        }
        if fits(LARGE) {
            return Ok(Inode(1 << 63 | tree << LARGE.1 | self.inode));
        }
        Err(Error::new(ErrorKind::TooMuch, format!("{self} has a larger number than is ever shown")))
    }

    /// Returns the file that has a number.
    pub(super) fn of(Inode(number): Inode) -> Self {
        let (_, inodes) = if number >> 63 == 0 { SMALL } else { LARGE };
        let tree = (number & !(1 << 63)) >> inodes;
        let tree = if tree == 0 { TOP } else { tree + (ROOT - 1) };
        Self { tree, inode: number & ((1 << inodes) - 1) }
    }

    /// Returns the key of an item of the file.
    pub(super) fn key(self, key_type: u8, offset: u64) -> DiskKey {
        DiskKey { objectid: self.inode, key_type, offset }
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(f, "inode {} of subvolume {}", self.inode, self.tree)
    }
}

/// Returns the root of a tree, if that is there.
pub(super) fn root(volume: &Volume, tree: u64) -> Result<Option<Root>> {
    if tree != TOP && !fs_btrfs::subvol::is_subvolume_id(tree) {
        return Ok(None);
    }
    let mut found = None;
    let first = DiskKey { objectid: tree, key_type: ROOT_ITEM_KEY, offset: 0 };
    // The last one counts.
    volume.items(volume.root(), first, |_, item| {
        found = Some(item.to_vec());
        Ok(ControlFlow::Continue(()))
    })?;
    let Some(item) = found else { return Ok(None) };
    match Fields(&item).le32(REFERENCES) {
        Some(0) => Ok(None),
        _ => root_of(&item, tree).map(Some),
    }
}

/// Returns where a tree starts, of its item in another.
pub(super) fn root_of(item: &[u8], tree: u64) -> Result<Root> {
    let fields = Fields(item);
    match (fields.le64(root_item::BYTENR), fields.le64(root_item::GENERATION), fields.le32(REFERENCES)) {
        (Some(at), Some(generation), Some(_)) => Ok(Root { at, generation, tree }),
        _ => Err(Error::damaged(format!("the root item of tree {tree} is too short"))),
    }
}

/// Returns where a name in a directory leads to that stands for a subvolume.
pub(super) fn enter(volume: &Volume, directory: Place, name: &[u8], tree: u64) -> Result<Place> {
    let nowhere = Place { inode: EMPTY, ..directory };
    let key = DiskKey { objectid: directory.tree, key_type: ROOT_REF_KEY, offset: tree };
    let Some(item) = volume.item(volume.root(), key)? else { return Ok(nowhere) };
    let fields = Fields(&item);
    let is_here = fields.le64(0) == Some(directory.inode)
        && fields.le16(16).map(usize::from) == Some(name.len())
        && fields.bytes(18, name.len()) == Some(name);
    let is_there = is_here && root(volume, tree)?.is_some();
    Ok(if is_there { Place { tree, inode: ROOT } } else { nowhere })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_file_has_a_number_of_its_own_and_most_have_small_ones() {
        let trees = [TOP, 256, 257, 1278, 1279, 100_000, ROOT - 1 + (1 << 23) - 1];
        let inodes = [2, 256, 257, (1 << 32) - 1, 1 << 32, (1 << 40) - 1];
        let mut seen = std::collections::HashSet::new();
        for tree in trees {
            for inode in inodes {
                let place = Place { tree, inode };
                let number = place.number().expect("it fits");
                assert_eq!(Place::of(number), place);
                assert!(seen.insert(number), "{place}");
                assert_eq!(number.0 < 1 << 42, tree <= 1278 && inode < 1 << 32, "{place}");
            }
        }
        assert_eq!(Place { tree: TOP, inode: 257 }.number(), Ok(Inode(257)));
        for place in [Place { tree: ROOT - 1 + (1 << 23), inode: 256 }, Place { tree: TOP, inode: 1 << 40 }] {
            assert_eq!(place.number().expect_err("it does not fit").kind(), ErrorKind::TooMuch);
        }
    }
}
