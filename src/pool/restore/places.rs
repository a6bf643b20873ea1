//! Where each disk goes, and whether there is room: pure.
//!
//! On a thick SR a disk takes its whole size; elsewhere what is written to it. What the tables of VHDs take is counted too.

use std::collections::BTreeMap;

use crate::pool::error::{Error, ErrorKind, Result};
use crate::pool::room::Storage;

/// Bytes that a VHD takes beside its blocks: a table of 4 bytes and a bitmap for each block of 2 MiB, and its headers.
fn overhead(size: u64) -> u64 {
    size.div_ceil(2 << 20).saturating_mul(4 + 512).saturating_add(8 << 10)
}

/// What a disk needs.
#[derive(Debug, Clone, Copy)]
pub struct Need {
    /// Its size, in bytes.
    pub size: u64,
    /// What is written to it, in bytes.
    pub written: u64,
}

/// What all disks that go to an SR take there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Room {
    /// The SR.
    pub storage: Storage,
    /// In bytes, at most.
    pub takes: u64,
}

impl Room {
    /// Whether it is enough; of an SR that does not say how large it is nobody knows.
    #[must_use]
    pub fn is_enough(&self) -> bool {
        self.storage.size == 0 || self.takes <= self.storage.free()
    }

    /// Makes sure that it is.
    ///
    /// # Errors
    /// [`ErrorKind::Room`] if it is not.
    pub fn check(&self) -> Result<()> {
        if self.is_enough() {
            return Ok(());
        }
        let (name, free) = (self.storage.name.escape_debug(), self.storage.free());
        let message = format!(
            "the SR '{name}' ({}) has {free} bytes free, and {} are needed: free some, or name another with --sr or --sr-of",
            self.storage.uuid, self.takes
        );
        Err(Error::new(ErrorKind::Room, message))
    }
}

/// Sums up what disks take, for each SR.
#[must_use]
pub fn rooms<'a>(disks: impl IntoIterator<Item = (&'a Storage, Need)>) -> Vec<Room> {
    let mut rooms: BTreeMap<&str, Room> = BTreeMap::new();
    for (storage, need) in disks {
        let data = if storage.is_thick() { need.size } else { need.written };
        let takes = data.saturating_add(overhead(need.size));
        let room = rooms.entry(&storage.uuid).or_insert_with(|| Room { storage: storage.clone(), takes: 0 });
        room.takes = room.takes.saturating_add(takes);
    }
    rooms.into_values().collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn storage(uuid: &str, kind: &str, size: u64) -> Storage {
        Storage { uuid: uuid.into(), name: uuid.into(), kind: kind.into(), says_thin: false, size, used: size / 2 }
    }

    #[test]
    fn disks_on_one_sr_are_summed_up_whole_if_it_is_thick_else_as_written() {
        let (thick, thin) = (storage("a", "lvm", 100 << 20), storage("b", "nfs", 100 << 20));
        let need = |mib: u64| Need { size: mib << 20, written: 2 << 20 };
        let rooms = rooms([(&thick, need(20)), (&thin, need(80)), (&thick, need(40))]);
        let takes: Vec<u64> = rooms.iter().map(|room| room.takes).collect();
        assert_eq!(takes, [(60 << 20) + 30 * 516 + (16 << 10), (2 << 20) + 40 * 516 + (8 << 10)]);
        assert_eq!(rooms[0].check().expect_err("too much").kind(), ErrorKind::Room);
        rooms[1].check().expect("fits");
        let unknown = Room { storage: storage("c", "nfs", 0), takes: u64::MAX };
        assert!(unknown.is_enough());
    }
}
