//! Numbers of guests' files.
//!
//! ```text
//! 63   62 ... 43    42 ...... 0
//!  1 |   part     | the low bits of the number of the file in its filesystem
//! ```
//!
//! They are made of what they stand for, since a guest may have millions of files: only *parts* are counted, each a volume and the
//! high bits of numbers of files in it, and kept while the tree lives. Most volumes have one, and one for the root. A Btrfs with more
//! than a thousand subvolumes has one for each eight that are looked at. A volume that wants more than any filesystem needs is refused, so
//! that it takes none from the others.

use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard};

use guest::Inode;
use indexmap::{IndexMap, IndexSet};

use super::ROOT;
use crate::repository::BackupId;

const GUEST: u64 = 1 << 63;
const LOW: u32 = 43;
const PARTS: usize = 1 << 20;

/// Most parts of a volume: beyond, no more of its files have numbers.
const PARTS_OF_VOLUME: u32 = 4096;

/// A volume of a backup.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(in crate::tree) struct VolumeId {
    pub(in crate::tree) backup: BackupId,
    pub(in crate::tree) name: Arc<str>,
    /// Tells it apart from a volume of another backup that came to have the same name.
    pub(in crate::tree) identity: u64,
}

/// A file of a guest: the slot of its volume, and its number there.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(in crate::tree) struct Place {
    pub(in crate::tree) slot: u32,
    pub(in crate::tree) inode: Inode,
}

/// The slots and parts given so far.
#[derive(Default)]
pub(in crate::tree) struct Slots(RwLock<State>);

#[derive(Default)]
struct State {
    /// By slot, with how many parts it has.
    volumes: IndexMap<VolumeId, u32>,
    /// Slots, and the high bits of numbers there.
    parts: IndexSet<(u32, u32)>,
}

impl State {
    /// Makes a part of a volume, unless it is there; `None` if there may be no more.
    fn add(&mut self, part: (u32, u32)) -> Option<()> {
        if self.parts.contains(&part) {
            return Some(());
        }
        let (_, count) = self.volumes.get_index_mut(usize::try_from(part.0).ok()?)?;
        if *count >= PARTS_OF_VOLUME || self.parts.len() >= PARTS {
            return None;
        }
        *count += 1;
        self.parts.insert(part);
        Some(())
    }
}

/// Splits what a file is called by into the part that it is in, and the rest.
fn split(Place { slot, inode: Inode(inode) }: Place) -> ((u32, u32), u64) {
    ((slot, u32::try_from(inode >> LOW).expect("21 bits")), inode & ((1 << LOW) - 1))
}

impl Slots {
    /// Returns the slot of a volume, a new one, with the number of its root, at first sight; `None` once there are no more.
    pub(in crate::tree) fn slot(&self, volume: &VolumeId) -> Option<u32> {
        if let Some(slot) = self.state().volumes.get_index_of(volume) {
            return u32::try_from(slot).ok();
        }
        let mut state = self.0.write().unwrap_or_else(PoisonError::into_inner);
        if state.parts.len() >= PARTS && !state.volumes.contains_key(volume) {
            return None;
        }
        // If another was first, it is its slot.
        let entry = state.volumes.entry(volume.clone());
        let slot = u32::try_from(entry.index()).ok()?;
        entry.or_insert(0);
        state.add(split(Place { slot, inode: ROOT }).0)?;
        Some(slot)
    }

    /// Returns the volume that has a slot.
    pub(in crate::tree) fn volume(&self, slot: u32) -> Option<VolumeId> {
        Some(self.state().volumes.get_index(usize::try_from(slot).ok()?)?.0.clone())
    }

    /// Sees to it that files of a volume [have numbers](Slots::number); false if one has none.
    pub(in crate::tree) fn admit(&self, slot: u32, inodes: impl Iterator<Item = Inode>) -> bool {
        let mut last = None;
        inodes.map(|inode| split(Place { slot, inode }).0).all(|part| {
            // Most files of a directory are in one.
            let is_known = last == Some(part) || self.state().parts.contains(&part);
            last = Some(part);
            is_known || self.0.write().unwrap_or_else(PoisonError::into_inner).add(part).is_some()
        })
    }

    /// Returns the number by which a file is known outside: of a root, and of what was [admitted](Slots::admit).
    ///
    /// # Panics
    /// If it was not.
    pub(in crate::tree) fn number(&self, place: Place) -> u64 {
        let (part, low) = split(place);
        let index = self.state().parts.get_index_of(&part).expect("it was admitted");
        GUEST | (index as u64) << LOW | low
    }

    /// Returns what a number stands for, if it is one of a guest's file.
    pub(in crate::tree) fn place(&self, number: u64) -> Option<Place> {
        if number & GUEST == 0 {
            return None;
        }
        let index = usize::try_from((number & !GUEST) >> LOW).ok()?;
        let (slot, high) = *self.state().parts.get_index(index)?;
        Some(Place { slot, inode: Inode(u64::from(high) << LOW | number & ((1 << LOW) - 1)) })
    }

    fn state(&self) -> RwLockReadGuard<'_, State> {
        self.0.read().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::repository::{BackupTime, VmId};

    fn volume(name: &str) -> VolumeId {
        let vm = VmId::new("1f2e3d4c-0000-0000-0000-000000000000").unwrap();
        let time = BackupTime::parse("20260801T020003Z").unwrap();
        VolumeId { backup: BackupId { vm, time }, name: Arc::from(name), identity: 0 }
    }

    #[test]
    fn a_number_leads_back_to_its_file_and_no_two_files_have_one() {
        let slots = Slots::default();
        let [a, b] = ["xvda1", "xvda2"].map(|name| slots.slot(&volume(name)).unwrap());
        assert_eq!((a, b, slots.slot(&volume("xvda1"))), (0, 1, Some(0)));
        assert_eq!(slots.volume(b), Some(volume("xvda2")));
        assert_eq!(slots.volume(2), None);
        let mut seen = std::collections::HashSet::new();
        let inodes = [0, 2, (1 << LOW) - 1, 1 << LOW, (1 << LOW) + 1, 1 << 63, u64::MAX - 1, u64::MAX].map(Inode);
        for slot in [a, b] {
            assert!(slots.admit(slot, inodes.into_iter()));
            for inode in inodes {
                let place = Place { slot, inode };
                let number = slots.number(place);
                assert_eq!(slots.place(number), Some(place));
                assert_eq!(slots.number(place), number);
                assert!(seen.insert(number), "{place:?}");
            }
        }
        assert_eq!((slots.place(1), slots.place(GUEST | 8 << LOW)), (None, None));
    }

    #[test]
    fn a_volume_with_scattered_numbers_takes_none_from_others() {
        let slots = Slots::default();
        let scattered = slots.slot(&volume("xvda1")).unwrap();
        let parts = |range: std::ops::Range<u64>| range.map(|part| Inode(part << LOW));
        let room = u64::from(PARTS_OF_VOLUME) - 1;
        assert!(slots.admit(scattered, parts(0..room)));
        assert!(!slots.admit(scattered, parts(room..room + 1)));
        assert!(slots.admit(scattered, parts(0..room)));
        let root = Place { slot: scattered, inode: ROOT };
        assert_eq!(slots.place(slots.number(root)), Some(root));
        let other = slots.slot(&volume("xvda2")).unwrap();
        assert!(slots.admit(other, parts(0..room)));
    }
}
