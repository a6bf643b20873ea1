//! Numbers of guests' files.
//!
//! ```text
//! 63   62 ... 43    42 ...... 0
//!  1 |   slot     | number of the file in its filesystem
//! ```
//!
//! They are made of what they stand for, since a guest may have millions of files: only the volumes are counted, each by a slot
//! that it keeps while the tree lives. A file whose number does not fit is counted in its slot; bit 42 tells them apart.

use std::collections::HashMap;
use std::sync::{Arc, PoisonError, RwLock};

use guest::Inode;
use indexmap::IndexSet;

use crate::repository::BackupId;

const GUEST: u64 = 1 << 63;
const SLOT_SHIFT: u32 = 43;
const SLOTS: u64 = 1 << 20;
const COUNTED: u64 = 1 << 42;

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

/// The slots given so far.
#[derive(Default)]
pub(in crate::tree) struct Slots(RwLock<State>);

#[derive(Default)]
struct State {
    volumes: IndexSet<VolumeId>,
    /// By slot, those whose numbers are too large.
    counted: HashMap<u32, IndexSet<u64>>,
}

impl Slots {
    /// Returns the slot of a volume, a new one at first sight; `None` once there are no more.
    pub(in crate::tree) fn slot(&self, volume: &VolumeId) -> Option<u32> {
        let known = self.0.read().unwrap_or_else(PoisonError::into_inner).volumes.get_index_of(volume);
        let slot = match known {
            Some(slot) => slot,
            None => {
                let mut state = self.0.write().unwrap_or_else(PoisonError::into_inner);
                if state.volumes.len() as u64 >= SLOTS && !state.volumes.contains(volume) {
                    return None;
                }
                state.volumes.insert_full(volume.clone()).0
            }
        };
        u32::try_from(slot).ok()
    }

    /// Returns the volume that has a slot.
    pub(in crate::tree) fn volume(&self, slot: u32) -> Option<VolumeId> {
        let state = self.0.read().unwrap_or_else(PoisonError::into_inner);
        state.volumes.get_index(usize::try_from(slot).ok()?).cloned()
    }

    /// Returns the number by which a file is known outside.
    pub(in crate::tree) fn number(&self, place: Place) -> u64 {
        let Place { slot, inode: Inode(inode) } = place;
        let within = if inode < COUNTED {
            inode
        } else {
            let mut state = self.0.write().unwrap_or_else(PoisonError::into_inner);
            COUNTED | state.counted.entry(slot).or_default().insert_full(inode).0 as u64
        };
        GUEST | u64::from(slot) << SLOT_SHIFT | within
    }

    /// Returns what a number stands for, if it is one of a guest's file.
    pub(in crate::tree) fn place(&self, number: u64) -> Option<Place> {
        if number & GUEST == 0 {
            return None;
        }
        let slot = u32::try_from((number & !GUEST) >> SLOT_SHIFT).expect("20 bits");
        let within = number & ((1 << SLOT_SHIFT) - 1);
        if within & COUNTED == 0 {
            return Some(Place { slot, inode: Inode(within) });
        }
        let state = self.0.read().unwrap_or_else(PoisonError::into_inner);
        let inode = *state.counted.get(&slot)?.get_index(usize::try_from(within & !COUNTED).ok()?)?;
        Some(Place { slot, inode: Inode(inode) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::repository::{BackupTime, VmId};

    #[test]
    fn a_number_leads_back_to_its_file_and_no_two_files_have_one() {
        let slots = Slots::default();
        let volume = |name: &str| {
            let vm = VmId::new("1f2e3d4c-0000-0000-0000-000000000000").unwrap();
            let time = BackupTime::parse("20260801T020003Z").unwrap();
            VolumeId { backup: BackupId { vm, time }, name: Arc::from(name), identity: 0 }
        };
        let [a, b] = ["xvda1", "xvda2"].map(|name| slots.slot(&volume(name)).unwrap());
        assert_eq!((a, b, slots.slot(&volume("xvda1"))), (0, 1, Some(0)));
        assert_eq!(slots.volume(b), Some(volume("xvda2")));
        assert_eq!(slots.volume(2), None);
        let mut seen = std::collections::HashSet::new();
        for slot in [a, b] {
            for inode in [0, 2, COUNTED - 1, COUNTED, COUNTED + 1, u64::MAX] {
                let place = Place { slot, inode: Inode(inode) };
                let number = slots.number(place);
                assert_eq!(slots.place(number), Some(place));
                assert_eq!(slots.number(place), number);
                assert!(seen.insert(number), "{place:?}");
            }
        }
        assert_eq!((slots.place(1), slots.place(GUEST | COUNTED | 3)), (None, None));
    }
}
