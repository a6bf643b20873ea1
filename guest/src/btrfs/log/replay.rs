//! The replay of one log, in the order in which Linux does it: inodes and what was removed, then names in directories, then
//! all else; at last the links of what was touched are counted.
//!
//! What would make Linux refuse the filesystem is an error here.

use std::collections::BTreeSet;
use std::ops::ControlFlow;

use fs_btrfs::csum::EXTENT_CSUM_KEY;
use fs_btrfs::dir::{DIR_INDEX_KEY, DIR_ITEM_KEY, XATTR_ITEM_KEY};
use fs_btrfs::fs::EXTENT_DATA_KEY;
use fs_btrfs::inode::INODE_ITEM_KEY;

use super::super::view::{Edits, Key, View};
use super::super::volume::{Root, Volume};
use super::Log;
use super::extents;
use super::inode::{Inode, Type};
use super::names::{EXTENDED_REFERENCE, REFERENCE, entries, references};
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
    pub(super) log: &'a Log,
    edits: Edits,
    /// Inodes whose links are to be counted.
    pub(super) touched: BTreeSet<u64>,
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
