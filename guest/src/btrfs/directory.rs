//! The names in a directory.

use std::ops::ControlFlow;

use fs_btrfs::dir::{self, DIR_INDEX_KEY};
use fs_btrfs::fs::ROOT_ITEM_KEY;

use super::subvolumes::{self, Place};
use super::volume::{Root, Volume};
use crate::{Entry, Error, ErrorKind, Result};

/// Names of one directory at most: some 100 bytes each, all in memory.
const MAX_ENTRIES: usize = 4_000_000;

/// Returns all names, in the order in which they were made.
pub(super) fn list(volume: &Volume, root: Root, directory: Place) -> Result<Vec<Entry>> {
    let mut found = Vec::new();
    let mut subvolumes = Vec::new();
    volume.items(root, directory.key(DIR_INDEX_KEY, 0), |_, item| {
        let bad = |error| volume.explain(error, &format!("a name in {directory} cannot be read"));
        for stored in dir::parse_dir_items(item).map_err(bad)? {
            if stored.is_inode() {
                let inode = Place { inode: stored.ino, ..directory }.number()?;
                found.push(Entry { name: stored.name, inode });
            } else if stored.location_type == ROOT_ITEM_KEY && fs_btrfs::subvol::is_subvolume_id(stored.ino) {
                subvolumes.push((stored.name, stored.ino));
            } else {
                return Err(Error::damaged(format!("a name in {directory} leads to no file")));
            }
        }
        if found.len() + subvolumes.len() > MAX_ENTRIES {
            let message = format!("{directory} has more than {MAX_ENTRIES} names");
            return Err(Error::new(ErrorKind::TooMuch, message));
        }
        Ok(ControlFlow::Continue(()))
    })?;
    for (name, tree) in subvolumes {
        let inode = subvolumes::enter(volume, directory, &name, tree)?.number()?;
        found.push(Entry { name, inode });
    }
    Ok(found)
}
