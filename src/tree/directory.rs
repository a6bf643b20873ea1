//! The names in a directory, as they were when it was listed.
//!
//! Whoever has a directory open holds one of these, and takes the entries out one at a time: that of a guest is the listing that
//! the tree keeps, so a million names are in memory once, however many read them.

use std::sync::Arc;

use super::guest::{Listing, Place};
use super::key::Key;
use super::{Attributes, Entry, Kind, Result, Tree, kind_of, whole};

/// A directory that was listed. It does not change.
pub struct Directory(Names);

enum Names {
    /// Of the tree itself, sorted.
    Keys(Vec<(String, Key)>),
    /// Roots of guests' filesystems.
    Roots(Vec<Entry>),
    /// Of a guest.
    Guest(Place, Arc<Listing>),
}

impl Directory {
    fn len(&self) -> usize {
        match &self.0 {
            Names::Keys(children) => children.len(),
            Names::Roots(roots) => roots.len(),
            Names::Guest(_, listing) => listing.len(),
        }
    }
}

impl Tree {
    /// Lists a directory: its names without `.` and `..`, sorted.
    ///
    /// # Errors
    /// `Stale`, `NotDirectory`, or why it cannot be listed: a list is complete or not there.
    pub fn list(&self, inode: u64) -> Result<Directory> {
        let listed = || {
            if let Some(place) = self.guests.place(inode) {
                return Ok(Names::Guest(place, self.listing(place)?));
            }
            if let Some(Key::Files(id)) = self.inodes.key(inode) {
                return Ok(Names::Roots(self.list_filesystems(&id)?));
            }
            Ok(Names::Keys(self.children(&self.key(inode)?)?))
        };
        self.counted(listed()).map(Directory).map_err(super::Error::of_known)
    }

    /// Returns an entry of a directory; `None` past the last.
    #[must_use]
    pub fn entry(&self, directory: &Directory, index: usize) -> Option<Entry> {
        Some(match &directory.0 {
            Names::Keys(children) => {
                let (name, key) = children.get(index)?;
                Entry { inode: self.inodes.number(key), kind: kind_of(key), name: name.into() }
            }
            Names::Roots(roots) => roots.get(index)?.clone(),
            Names::Guest(place, listing) => self.guests.entry(*place, listing.get(index)?),
        })
    }

    /// Returns all entries of a directory.
    pub fn entries(&self, directory: &Directory) -> impl Iterator<Item = Entry> {
        (0..directory.len()).filter_map(|index| self.entry(directory, index))
    }

    /// Returns what [looking up](Tree::lookup) an entry would say, if that is known of what was listed.
    #[must_use]
    pub fn known_entry(&self, directory: &Directory, index: usize) -> Option<Attributes> {
        match &directory.0 {
            Names::Keys(children) => match &children.get(index)?.1 {
                key @ Key::Link(link) => Some(self.attributes_with(key, whole(link.target.len()))),
                key if kind_of(key) == Kind::Directory => Some(self.attributes_with(key, (0, 0))),
                // How large a file is may have to be asked for.
                _ => None,
            },
            // Nobody has opened them yet.
            Names::Roots(_) => None,
            Names::Guest(place, listing) => self.known_of_guest(*place, listing.get(index)?),
        }
    }
}
