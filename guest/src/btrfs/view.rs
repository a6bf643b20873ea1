//! What is seen of a tree: the items that stand there, but for those that were changed in memory.

use std::collections::BTreeMap;
use std::ops::ControlFlow;

use fs_btrfs::chunk::DiskKey;

use super::volume::{Root, Volume};
use crate::{Error, ErrorKind, Result};

/// Bytes that changes write at most, also where one changes what another wrote; they are kept in memory.
const MAX_WRITTEN: usize = 128 << 20;

/// What an item takes besides its bytes, about.
const ITEM: usize = 100;

/// The key of an item, in the order in which a tree has them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Key {
    pub(super) object: u64,
    pub(super) kind: u8,
    pub(super) offset: u64,
}

impl From<DiskKey> for Key {
    fn from(DiskKey { objectid, key_type, offset }: DiskKey) -> Self {
        Self { object: objectid, kind: key_type, offset }
    }
}

impl From<Key> for DiskKey {
    fn from(Key { object, kind, offset }: Key) -> Self {
        Self { objectid: object, key_type: kind, offset }
    }
}

/// Items of a tree that were changed, or are no more.
#[derive(Debug, Default)]
pub(super) struct Edits {
    items: BTreeMap<Key, Option<Vec<u8>>>,
    written: usize,
}

impl Edits {
    /// Has an item be seen with these bytes, or not at all.
    ///
    /// # Errors
    /// [`ErrorKind::TooMuch`] if more was written than is kept.
    pub(super) fn put(&mut self, key: Key, item: Option<Vec<u8>>) -> Result<()> {
        self.written += ITEM + item.as_ref().map_or(0, Vec::len);
        if self.written > MAX_WRITTEN {
            return Err(Error::new(ErrorKind::TooMuch, "it changes more than is kept in memory"));
        }
        self.items.insert(key, item);
        Ok(())
    }
}

/// A tree with what was changed in it, if anything was.
#[derive(Clone, Copy)]
pub(super) struct View<'a> {
    pub(super) volume: &'a Volume,
    pub(super) root: Root,
    pub(super) edits: Option<&'a Edits>,
}

impl View<'_> {
    /// Returns an item.
    pub(super) fn item(self, key: Key) -> Result<Option<Vec<u8>>> {
        match self.edits.and_then(|edits| edits.items.get(&key)) {
            Some(item) => Ok(item.clone()),
            None => self.volume.stored_item(self.root, key.into()),
        }
    }

    /// Shows all items from a key on, until told to stop.
    pub(super) fn visit(self, first: Key, mut show: impl FnMut(Key, &[u8]) -> Result<ControlFlow<()>>) -> Result<()> {
        let Some(edits) = self.edits else {
            return self.volume.visit_stored(self.root, first.into(), |key, item| show((*key).into(), item));
        };
        let mut edits = edits.items.range(first..).peekable();
        let mut flow = ControlFlow::Continue(());
        self.volume.visit_stored(self.root, first.into(), |stored, item| {
            let stored = Key::from(*stored);
            while let Some((key, edit)) = edits.next_if(|(key, _)| **key < stored) {
                if let Some(item) = edit {
                    flow = show(*key, item)?;
                    if flow.is_break() {
                        return Ok(flow);
                    }
                }
            }
            flow = match edits.next_if(|(key, _)| **key == stored) {
                Some((_, Some(item))) => show(stored, item)?,
                Some((_, None)) => ControlFlow::Continue(()),
                None => show(stored, item)?,
            };
            Ok(flow)
        })?;
        for (key, edit) in edits {
            if flow.is_break() {
                break;
            }
            if let Some(item) = edit {
                flow = show(*key, item)?;
            }
        }
        Ok(())
    }

    /// Shows the items of the object and the kind of `first` from that on, until told to stop.
    pub(super) fn items(self, first: Key, mut show: impl FnMut(u64, &[u8]) -> Result<ControlFlow<()>>) -> Result<()> {
        self.visit(first, |key, item| {
            if (key.object, key.kind) != (first.object, first.kind) {
                return Ok(ControlFlow::Break(()));
            }
            show(key.offset, item)
        })
    }

    /// Returns the offset of the last item of the object and the kind of `key` that is not past it.
    pub(super) fn last_until(self, key: Key) -> Result<Option<u64>> {
        let at = |offset| Key { offset, ..key };
        let edited = self.edits.and_then(|edits| {
            let mut before = edits.items.range(at(0)..=key).rev();
            before.find(|(_, item)| item.is_some()).map(|(key, _)| key.offset)
        });
        // What was changed was found there, or is no more.
        let is_as_stored = |offset: &&u64| self.edits.is_none_or(|edits| !edits.items.contains_key(&at(**offset)));
        let mut until = Some(key.offset);
        while let Some(offset) = until.filter(|until| edited.is_none_or(|edited| edited < *until)) {
            let stored = self.volume.stored_until(self.root, at(offset).into())?;
            if let Some(found) = stored.iter().rev().find(is_as_stored) {
                return Ok(Some(*found).max(edited));
            }
            until = stored.first().and_then(|first| first.checked_sub(1));
        }
        Ok(edited)
    }
}
