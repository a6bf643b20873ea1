//! How many connections to the NBD server of a host there are at once, over all processes of this machine.
//!
//! The server of a host ends the 17th connection without a word, whoever made the others. So each takes one of the host's slots.
//! The last of them are for disks that have no connection yet, so that a few greedy ones keep nobody waiting.

use std::io;
use std::path::PathBuf;

use crate::slots::{Slot, Slots};

/// Connections to a host where nothing else is said.
const USUAL: usize = 8;
/// The slots of all hosts. Clones share them, as does whoever uses the same folder.
#[derive(Debug, Clone)]
pub struct Budget {
    slots: Slots,
    usual: usize,
}

impl Budget {
    /// Most connections to a host: its server takes 16, and is slow to forget those that ended; others may read, too.
    pub const MOST: u8 = 12;

    /// Makes the budget of `folder`, which is made if it is not there and should be the same for all processes.
    #[must_use]
    pub fn new(folder: impl Into<PathBuf>) -> Self {
        Self { slots: Slots::new(folder), usual: USUAL }
    }

    /// Allows `count` connections to a host where fewer are allowed, at most [`Self::MOST`].
    #[must_use]
    pub fn at_least(self, count: usize) -> Self {
        Self { usual: self.usual.max(count).min(Self::MOST.into()), ..self }
    }

    #[cfg(test)]
    pub(crate) fn of(self, usual: usize) -> Self {
        Self { usual, ..self }
    }

    /// Takes a slot of a host; `None` if all are taken. `is_first`: also one of those that are kept for the first connection
    /// of a disk.
    pub(crate) fn take(&self, host: &str, is_first: bool) -> io::Result<Option<Slot>> {
        self.slots.take(&format!("nbd-{host}"), 0..if is_first { Self::MOST.into() } else { self.usual })
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn slots_are_shared_by_all_who_use_the_folder_and_given_back() {
        let folder = tempfile::tempdir().unwrap();
        let (one, other) =
            (Budget::new(folder.path().join("slots")).of(3), Budget::new(folder.path().join("slots")).of(3));
        let taken: Vec<_> = (0..3).map(|_| one.take("fe80::1%eth0/../x", false).unwrap().unwrap()).collect();
        assert!(other.take("fe80::1%eth0/../x", false).unwrap().is_none());
        assert!(other.take("10.0.0.1", false).unwrap().is_some());
        let first: Vec<_> =
            (3..Budget::MOST).map(|_| other.take("fe80::1%eth0/../x", true).unwrap().unwrap()).collect();
        assert!(one.take("fe80::1%eth0/../x", true).unwrap().is_none());
        drop(taken);
        assert!(other.take("fe80::1%eth0/../x", false).unwrap().is_some());
        drop(first);
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
    }
}
