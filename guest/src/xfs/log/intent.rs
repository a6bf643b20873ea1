//! Intents: what takes several transactions is announced by the first and done by the last.
//!
//! Linux finishes what the last did not. Here that is not done: of what is freed, and of who shares blocks, a reader never
//! hears; what was to become of the map or the attributes of an inode it does, so such an inode is noted.
//!
//! Source: the items in Linux `fs/xfs/libxfs/xfs_log_format.h`.

use std::collections::{BTreeMap, BTreeSet};

use super::transaction::Item;
use crate::{Error, ErrorKind, Result};

/// Intents that are not done yet at most, some 50 bytes each; more is an error.
const MAX_INTENTS: usize = 1_000_000;

const MAP: u16 = 0x1244;
const MAP_DONE: u16 = 0x1245;
const ATTRIBUTE: u16 = 0x1246;
const ATTRIBUTE_DONE: u16 = 0x1247;
const EXCHANGE: u16 = 0x1248;
const EXCHANGE_DONE: u16 = 0x1249;

/// Intents that are not done yet: by kind and number, the inodes that they are about.
#[derive(Default)]
pub(super) struct Intents(BTreeMap<(u16, u64), [u64; 2]>);

impl Intents {
    /// Notes what an item says, if it is of these.
    pub(super) fn note(&mut self, item: &Item<'_>) -> Result<()> {
        let format = item.format();
        let number = |at| format.le64(at).ok_or_else(|| Error::damaged("an intent is cut off"));
        match item.kind {
            // Of one inode each.
            MAP => self.announce(item.kind, number(8)?, [number(16)?; 2])?,
            // A parent, which is no attribute that a reader shows, or any other.
            ATTRIBUTE if matches!(number(24)? & 0xff, 4..=6) => {}
            ATTRIBUTE => self.announce(item.kind, number(8)?, [number(16)?; 2])?,
            EXCHANGE => self.announce(item.kind, number(8)?, [number(16)?, number(24)?])?,
            MAP_DONE | ATTRIBUTE_DONE | EXCHANGE_DONE => {
                self.0.remove(&(item.kind - 1, number(8)?));
            }
            _ => {}
        }
        Ok(())
    }

    fn announce(&mut self, kind: u16, number: u64, inodes: [u64; 2]) -> Result<()> {
        self.0.insert((kind, number), inodes);
        if self.0.len() > MAX_INTENTS {
            return Err(Error::new(ErrorKind::TooMuch, format!("it has more than {MAX_INTENTS} intents")));
        }
        Ok(())
    }

    /// Returns the inodes of which something was not done.
    pub(super) fn unfinished(&self) -> BTreeSet<u64> {
        self.0.values().flatten().copied().collect()
    }
}
