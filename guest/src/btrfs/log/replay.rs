//! The replay of one log, in the order in which Linux does it: inodes and what was removed, then names in directories, then
//! all else; at last the links of what was touched are counted.
//!
//! What would make Linux refuse the filesystem is an error here.

use std::collections::{BTreeSet, HashSet};
use std::ops::ControlFlow;

use fs_btrfs::csum::EXTENT_CSUM_KEY;
use fs_btrfs::dir::{DIR_INDEX_KEY, DIR_ITEM_KEY, XATTR_ITEM_KEY, name_hash};
use fs_btrfs::fs::EXTENT_DATA_KEY;
use fs_btrfs::inode::INODE_ITEM_KEY;

use super::super::view::{Edits, Key, View};
use super::super::volume::{Root, Volume};
use super::Log;
use super::extents;
use super::inode::{Inode, Type};
use super::names::{self, EXTENDED_REFERENCE, REFERENCE, entries, entry, reference, reference_key, references};
use crate::{Error, Fields, Result};

/// From here to where the item says, the log has all names of a directory. Older ones say it of both items of names.
const RANGE: u8 = 72;
const OLD_RANGE: u8 = 60;

/// Replays a log of the tree that has this root.
pub(super) fn replay(volume: &Volume, root: Root, log: &Log) -> Result<Edits> {
    let mut replay = Replay { volume, root, log, edits: Edits::default(), touched: BTreeSet::new() };
    for stage in [Stage::Inodes, Stage::Names, Stage::Others] {
        let mut is_ignored = false;
        for (key, item) in log {
            if key.kind == INODE_ITEM_KEY {
                // It never had a name, or has none any more.
                is_ignored = Inode::new(item)?.links() == 0;
            }
            if !is_ignored {
                replay.item(stage, *key, item)?;
            }
        }
    }
    replay.count_links()?;
    Ok(replay.edits)
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Stage {
    Inodes,
    Names,
    Others,
}

pub(super) struct Replay<'a> {
    volume: &'a Volume,
    root: Root,
    log: &'a Log,
    edits: Edits,
    /// Inodes whose links are to be counted.
    touched: BTreeSet<u64>,
}

impl Replay<'_> {
    pub(super) fn view(&self) -> View<'_> {
        View { volume: self.volume, root: self.root, edits: Some(&self.edits) }
    }

    pub(super) fn put(&mut self, key: Key, item: Option<Vec<u8>>) -> Result<()> {
        self.edits.put(key, item)
    }

    /// Bytes of a sector.
    pub(super) fn sector(&self) -> u64 {
        self.volume.sector()
    }

    fn item(&mut self, stage: Stage, key: Key, item: &[u8]) -> Result<()> {
        match (stage, key.kind) {
            (Stage::Inodes, INODE_ITEM_KEY) => self.inode(key, item),
            (Stage::Names, DIR_INDEX_KEY) => self.names(key, item),
            (Stage::Others, XATTR_ITEM_KEY) => self.put(key, Some(item.to_vec())),
            (Stage::Others, REFERENCE | EXTENDED_REFERENCE) => self.references(key, item),
            (Stage::Others, EXTENT_DATA_KEY) => extents::add(self, key, item),
            (_, INODE_ITEM_KEY | DIR_INDEX_KEY | XATTR_ITEM_KEY | REFERENCE | EXTENDED_REFERENCE | EXTENT_DATA_KEY) => {
                Ok(())
            }
            // What is known by the other item of a name, and checksums of data.
            (_, RANGE | OLD_RANGE | DIR_ITEM_KEY | EXTENT_CSUM_KEY) => Ok(()),
            (_, kind) => Err(Error::unsupported(format!("it has items of an unknown kind, {kind}"))),
        }
    }

    /// Returns the item of an inode, if there is one.
    pub(super) fn known(&self, inode: u64) -> Result<Option<Inode>> {
        self.view().item(Inode::key(inode))?.map(|item| Inode::new(&item)).transpose()
    }

    /// Returns the item of an inode that has to be there.
    pub(super) fn existing(&self, inode: u64) -> Result<Inode> {
        self.known(inode)?.ok_or_else(|| Error::damaged(format!("it needs inode {inode}, which is not there")))
    }

    pub(super) fn put_inode(&mut self, number: u64, inode: Inode) -> Result<()> {
        self.put(Inode::key(number), Some(inode.into_item()))
    }

    /// Takes an inode over, and removes what it has no more.
    fn inode(&mut self, key: Key, item: &[u8]) -> Result<()> {
        let number = key.object;
        let logged = Inode::new(item)?;
        self.remove_attributes(number)?;
        if logged.is(Type::Directory) && self.known(number)?.is_some() {
            for (start, end) in self.ranges(number)? {
                self.remove_names(number, start, end, Some(self.log))?;
            }
        }
        let known = self.known(number)?;
        if known.as_ref().is_some_and(|known| !known.is_alike(&logged)) {
            return Err(Error::damaged(format!("inode {number} is of another kind in it")));
        }
        let inode = logged.over(known);
        let size = inode.size();
        self.put_inode(number, inode)?;
        if logged.is(Type::File) {
            let end = size.checked_next_multiple_of(self.sector()).unwrap_or(u64::MAX);
            extents::remove(self, number, end, u64::MAX)?;
        }
        self.touched.insert(number);
        Ok(())
    }

    /// Removes extended attributes that an inode has and the log has not.
    fn remove_attributes(&mut self, number: u64) -> Result<()> {
        let mut changed = Vec::new();
        let first = Key { object: number, kind: XATTR_ITEM_KEY, offset: 0 };
        self.view().items(first, |offset, item| {
            let key = Key { offset, ..first };
            let logged = self.log.get(&key).map_or(Ok(Vec::new()), |item| entries(item))?;
            let there = entries(item)?;
            let is_logged = |name: &[u8]| logged.iter().any(|logged| logged.name == name);
            if there.iter().any(|entry| !is_logged(entry.name)) {
                let left = there.iter().filter(|entry| is_logged(entry.name)).flat_map(|entry| entry.bytes);
                changed.push((key, left.copied().collect::<Vec<_>>()));
            }
            Ok(ControlFlow::Continue(()))
        })?;
        changed.into_iter().try_for_each(|(key, left)| self.put(key, Some(left).filter(|left| !left.is_empty())))
    }

    /// Returns in which ranges of a directory the log has all names, none over another.
    fn ranges(&self, directory: u64) -> Result<Vec<(u64, u64)>> {
        let mut found: Vec<(u64, u64)> = Vec::new();
        let first = Key { object: directory, kind: RANGE, offset: 0 };
        for (key, item) in self.log.range(first..=Key { offset: u64::MAX, ..first }) {
            let end = Fields(item).le64(0).ok_or_else(|| Error::damaged("the range of a directory is too short"))?;
            if end < key.offset {
                return Err(Error::damaged("the range of a directory ends before it starts"));
            }
            match found.last_mut() {
                Some((_, last)) if *last >= key.offset => *last = end.max(*last),
                _ => found.push((key.offset, end)),
            }
        }
        Ok(found)
    }

    /// Removes the names from one place in the order of a directory to another, but for those in the log, if one is given.
    fn remove_names(&mut self, directory: u64, start: u64, end: u64, log: Option<&Log>) -> Result<()> {
        let mut gone = Vec::new();
        let first = Key { object: directory, kind: DIR_INDEX_KEY, offset: start };
        self.view().items(first, |offset, item| {
            if offset > end {
                return Ok(ControlFlow::Break(()));
            }
            let logged = log.and_then(|log| log.get(&Key { offset, ..first }));
            let logged = logged.map_or(Ok(Vec::new()), |item| entries(item))?;
            for entry in entries(item)? {
                if !logged.iter().any(|logged| logged.name == entry.name) {
                    gone.push((entry.location, entry.name.to_vec()));
                }
            }
            Ok(ControlFlow::Continue(()))
        })?;
        gone.into_iter().try_for_each(|(location, name)| self.drop(directory, location, &name))
    }

    /// Takes a name of a directory over, unless a file that the log has says the same of itself.
    fn names(&mut self, key: Key, item: &[u8]) -> Result<()> {
        let directory = key.object;
        self.existing(directory)?;
        for logged in entries(item)? {
            let by_name = self.find(Key { kind: DIR_ITEM_KEY, offset: name_hash(logged.name), ..key }, logged.name)?;
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
            let is_done = is_named && is_indexed;
            let is_to_come = self.is_referred_in_log(REFERENCE, inode, directory, logged.name)?
                || self.is_referred_in_log(EXTENDED_REFERENCE, inode, directory, logged.name)?;
            let dir_item = Key { kind: DIR_ITEM_KEY, offset: name_hash(logged.name), ..key };
            if is_done || is_to_come || !is_there || self.find(dir_item, logged.name)?.is_some() {
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
    fn references(&mut self, key: Key, item: &[u8]) -> Result<()> {
        let inode = key.object;
        let logged = references(key, item)?;
        let Some(first) = logged.first() else { return Err(Error::damaged("an item of names has none")) };
        if self.known(first.directory)?.is_none() {
            // A directory that was not synced: without it there is no such name.
            return match logged.len() {
                1 => Ok(()),
                _ if key.kind == REFERENCE => Ok(()),
                _ => Err(Error::unsupported("an item has names in several directories, of which some are not there")),
            };
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
    fn drop(&mut self, directory: u64, location: Key, name: &[u8]) -> Result<()> {
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

    /// Counts the names that each file says that it has. What has none is gone, and so is all in it.
    fn count_links(&mut self) -> Result<()> {
        while let Some(number) = self.touched.pop_last() {
            let mut inode = self.existing(number)?;
            let mut links = 0_u32;
            for kind in [REFERENCE, EXTENDED_REFERENCE] {
                let first = Key { object: number, kind, offset: 0 };
                self.view().items(first, |offset, item| {
                    let count = references(Key { offset, ..first }, item)?.len();
                    links = links.saturating_add(u32::try_from(count).unwrap_or(u32::MAX));
                    Ok(ControlFlow::Continue(()))
                })?;
            }
            let is_directory = inode.is(Type::Directory);
            inode.set_links(links);
            self.put_inode(number, inode)?;
            if links == 0 && is_directory {
                self.remove_names(number, 0, u64::MAX, None)?;
            }
        }
        Ok(())
    }
}

/// Returns the key of the item in which a name of a directory is.
fn dir_item(directory: u64, name: &[u8]) -> Key {
    Key { object: directory, kind: DIR_ITEM_KEY, offset: name_hash(name) }
}
