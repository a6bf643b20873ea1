//! The names of files, which stand in three places: twice in the directory, and in the file itself.
//!
//! ```text
//! directory   by hash of the name     name ─► inode
//!             by place in its order   name ─► inode
//! file        by directory            name, place in its order
//! ```

use std::collections::HashSet;

use fs_btrfs::dir::{DIR_INDEX_KEY, DIR_ITEM_KEY, name_hash};
use fs_btrfs::inode::INODE_ITEM_KEY;

use super::super::view::Key;
use super::inode::{Inode, Type};
use super::names::{self, EXTENDED_REFERENCE, REFERENCE, entries, entry, reference, reference_key, references};
use super::replay::Replay;
use crate::{Error, Result};

impl Replay<'_> {
    /// Takes a name of a directory over, unless a file that the log has says the same of itself.
    pub(super) fn names(&mut self, key: Key, item: &[u8]) -> Result<()> {
        let directory = key.object;
        self.existing(directory)?;
        for logged in entries(item)? {
            let name_key = dir_item(directory, logged.name);
            let by_name = self.find(name_key, logged.name)?;
            let is_same = |found: &(Key, u8)| *found == (logged.location, logged.kind);
            let is_named = by_name.as_ref().is_some_and(is_same);
            if logged.location.kind != INODE_ITEM_KEY {
                if is_named && self.find(key, logged.name)?.as_ref().is_some_and(is_same) {
                    continue;
                }
                return Err(Error::unsupported("it has a new name of a subvolume"));
            }
            let inode = logged.location.object;
            let is_there = self.known(inode)?.is_some();
            if let Some((location, _)) = by_name.filter(|_| !is_named && is_there) {
                self.drop(directory, location, logged.name)?;
            }
            let by_index = self.find(key, logged.name)?;
            let is_indexed = by_index.as_ref().is_some_and(is_same);
            if let Some((location, _)) = by_index.filter(|_| !is_indexed && is_there) {
                self.drop(directory, location, logged.name)?;
            }
            let is_to_come = self.is_referred_in_log(REFERENCE, inode, directory, logged.name)?
                || self.is_referred_in_log(EXTENDED_REFERENCE, inode, directory, logged.name)?;
            // Of a file that was not synced, and is not there, the directory alone does not make one.
            let is_done = is_named && is_indexed;
            if is_done || is_to_come || !is_there || self.find(name_key, logged.name)?.is_some() {
                continue;
            }
            self.add_reference(inode, directory, key.offset, logged.name)?;
            self.link(directory, inode, key.offset, logged.name)?;
            if !self.existing(inode)?.is(Type::Directory) {
                self.touched.insert(inode);
            }
        }
        Ok(())
    }

    /// Takes the names of a file over that are in one item.
    pub(super) fn references(&mut self, key: Key, item: &[u8]) -> Result<()> {
        let inode = key.object;
        let logged = references(key, item)?;
        let Some(first) = logged.first() else { return Err(Error::damaged("an item of names has none")) };
        if self.known(first.directory)?.is_none() {
            // A directory that was not synced: without it there is no such name.
            if key.kind == REFERENCE || logged.len() == 1 {
                return Ok(());
            }
            return Err(Error::unsupported("an item has names in several directories, of which some are not there"));
        }
        self.existing(inode)?;
        let mut is_first = true;
        for name in &logged {
            self.existing(name.directory)?;
            if self.is_linked(inode, name)? {
                continue;
            }
            if inode == name.directory && self.view().item(reference_key(REFERENCE, inode, inode, b""))?.is_some() {
                return Ok(());
            }
            // All names of a plain item are in one directory.
            if is_first || key.kind == EXTENDED_REFERENCE {
                self.remove_old(reference_key(REFERENCE, inode, name.directory, name.name))?;
                is_first = false;
            }
            self.remove_old(reference_key(EXTENDED_REFERENCE, inode, name.directory, name.name))?;
            self.make_room(name)?;
            if self.has_reference(reference_key(key.kind, inode, name.directory, name.name), name)? {
                self.unlink(name.directory, inode, name.name)?;
            }
            self.link(name.directory, inode, name.index, name.name)?;
        }
        self.remove_old(key)?;
        self.put(key, Some(item.to_vec()))
    }

    /// Removes the names in an item of references that are not in the same item of the log.
    fn remove_old(&mut self, key: Key) -> Result<()> {
        let there = self.view().item(key)?.unwrap_or_default();
        let logged = self.log.get(&key).map_or(Ok(Vec::new()), |item| references(key, item))?;
        let logged: HashSet<_> = logged.iter().map(|name| (name.directory, name.name)).collect();
        let there = references(key, &there)?;
        let mut old = there.iter().filter(|name| !logged.contains(&(name.directory, name.name)));
        old.try_for_each(|name| self.unlink(name.directory, key.object, name.name))
    }

    /// Removes what stands in a directory where a name is to be.
    fn make_room(&mut self, name: &names::Reference) -> Result<()> {
        let index = Key { object: name.directory, kind: DIR_INDEX_KEY, offset: name.index };
        for key in [index, dir_item(name.directory, name.name)] {
            if let Some((location, _)) = self.find(key, name.name)? {
                self.drop(name.directory, location, name.name)?;
            }
        }
        Ok(())
    }

    /// Whether a name is already as the file says it.
    fn is_linked(&self, inode: u64, name: &names::Reference) -> Result<bool> {
        let index = Key { object: name.directory, kind: DIR_INDEX_KEY, offset: name.index };
        for key in [index, dir_item(name.directory, name.name)] {
            if self.find(key, name.name)?.is_none_or(|(location, _)| location.object != inode) {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Returns to what a name in an item of a directory leads, and what that is.
    fn find(&self, key: Key, name: &[u8]) -> Result<Option<(Key, u8)>> {
        let item = self.view().item(key)?.unwrap_or_default();
        let found = entries(&item)?.into_iter().find(|entry| entry.name == name);
        Ok(found.map(|entry| (entry.location, entry.kind)))
    }

    fn has_reference(&self, key: Key, name: &names::Reference) -> Result<bool> {
        let item = self.view().item(key)?.unwrap_or_default();
        Ok(references(key, &item)?.iter().any(|there| (there.directory, there.name) == (name.directory, name.name)))
    }

    /// Whether the log has the name in an item of that kind.
    fn is_referred_in_log(&self, kind: u8, inode: u64, directory: u64, name: &[u8]) -> Result<bool> {
        let key = reference_key(kind, inode, directory, name);
        let Some(item) = self.log.get(&key) else { return Ok(false) };
        Ok(references(key, item)?.iter().any(|there| (there.directory, there.name) == (directory, name)))
    }

    /// Removes a name that leads to that, whose links are counted later.
    pub(super) fn drop(&mut self, directory: u64, location: Key, name: &[u8]) -> Result<()> {
        if location.kind != INODE_ITEM_KEY {
            return Err(Error::unsupported("it removes the name of a subvolume"));
        }
        self.existing(location.object)?;
        self.touched.insert(location.object);
        self.unlink(directory, location.object, name)
    }

    /// Removes a name from a directory and from the file.
    fn unlink(&mut self, directory: u64, inode: u64, name: &[u8]) -> Result<()> {
        let missing = || Error::damaged(format!("inode {inode} has no such name in directory {directory}"));
        let key = dir_item(directory, name);
        let item = self.view().item(key)?.ok_or_else(missing)?;
        let there = entries(&item)?;
        let left: Vec<u8> =
            there.iter().filter(|entry| entry.name != name).flat_map(|entry| entry.bytes).copied().collect();
        if left.len() == item.len() {
            return Err(missing());
        }
        self.put(key, Some(left).filter(|left| !left.is_empty()))?;
        let mut index = None;
        for kind in [REFERENCE, EXTENDED_REFERENCE] {
            let key = reference_key(kind, inode, directory, name);
            let Some(item) = self.view().item(key)? else { continue };
            let mut left = Vec::with_capacity(item.len());
            for there in references(key, &item)? {
                if (there.directory, there.name) == (directory, name) {
                    index = Some(there.index);
                } else {
                    left.extend_from_slice(there.bytes);
                }
            }
            if index.is_some() {
                self.put(key, Some(left).filter(|left| !left.is_empty()))?;
                break;
            }
        }
        let offset = index.ok_or_else(missing)?;
        self.put(Key { object: directory, kind: DIR_INDEX_KEY, offset }, None)?;
        let mut above = self.existing(directory)?;
        above.set_size(above.size().saturating_sub(2 * name.len() as u64));
        self.put_inode(directory, above)
    }

    /// Adds a name to a directory, in which it is not.
    fn link(&mut self, directory: u64, inode: u64, index: u64, name: &[u8]) -> Result<()> {
        let kind = self.existing(inode)?.kind_of_name()?;
        let record = entry(Inode::key(inode), kind, name);
        let key = dir_item(directory, name);
        let mut item = self.view().item(key)?.unwrap_or_default();
        item.extend_from_slice(&record);
        self.put(key, Some(item))?;
        let key = Key { object: directory, kind: DIR_INDEX_KEY, offset: index };
        if self.view().item(key)?.is_some() {
            return Err(Error::damaged(format!("two names of directory {directory} have one place")));
        }
        self.put(key, Some(record))?;
        let mut above = self.existing(directory)?;
        above.set_size(above.size().saturating_add(2 * name.len() as u64));
        self.put_inode(directory, above)
    }

    /// Adds a name to those that a file says that it has.
    fn add_reference(&mut self, inode: u64, directory: u64, index: u64, name: &[u8]) -> Result<()> {
        // In which of the two items it is makes no difference here.
        let key = reference_key(REFERENCE, inode, directory, name);
        let mut item = self.view().item(key)?.unwrap_or_default();
        item.extend_from_slice(&reference(REFERENCE, directory, index, name));
        self.put(key, Some(item))
    }
}

/// Returns the key of the item in which a name of a directory is.
fn dir_item(directory: u64, name: &[u8]) -> Key {
    Key { object: directory, kind: DIR_ITEM_KEY, offset: name_hash(name) }
}
