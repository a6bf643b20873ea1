//! What a power cut leaves of a storage in memory.
//!
//! A change of bytes or names is durable once the file or the folder was synced. Of the others any may be lost, each on its
//! own: more than a journaling file system would lose, so what survives here survives there. Only a rename is one change.

use std::collections::{BTreeMap, HashMap, HashSet};

use crate::memory::write_at;

/// What a power cut does to a change that was not synced.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Loss {
    /// It is lost.
    All,
    /// Of bytes that were written the first half is kept; of names as [`Loss::None`].
    Half,
    /// It is kept.
    None,
}

/// One change of the tree. Files and folders are known by their inodes.
pub(crate) enum Change {
    /// A file was made, empty; that it is one is known wherever a name of it is kept.
    Made { inode: u64 },
    /// The bytes of a file were replaced by others.
    Replaced { inode: u64, bytes: Vec<u8> },
    /// Bytes were written into a file.
    Written { inode: u64, offset: u64, bytes: Vec<u8> },
    /// A file was made shorter, or longer by zeroes.
    Resized { inode: u64, len: usize },
    /// Names in folders were given to inodes, or taken away, all at once.
    Named(Vec<(u64, String, Option<u64>)>),
}

/// What is durable, and what was changed since.
#[derive(Default)]
pub(crate) struct Durable {
    state: State,
    pending: Vec<Change>,
}

#[derive(Default, Clone)]
struct State {
    names: HashMap<u64, BTreeMap<String, u64>>,
    files: HashMap<u64, Vec<u8>>,
}

impl State {
    fn apply(&mut self, change: &Change, loss: Loss) {
        let kept = |bytes: &[u8]| match loss {
            Loss::Half => bytes[..bytes.len() / 2].to_vec(),
            _ => bytes.to_vec(),
        };
        match change {
            Change::Made { inode } => drop(self.files.entry(*inode).or_default()),
            _ if loss == Loss::All => {}
            Change::Replaced { inode, bytes } => drop(self.files.insert(*inode, kept(bytes))),
            Change::Written { inode, offset, bytes } => {
                write_at(self.files.entry(*inode).or_default(), *offset, &kept(bytes));
            }
            Change::Resized { inode, len } => self.files.entry(*inode).or_default().resize(*len, 0),
            Change::Named(names) => {
                for (folder, name, inode) in names {
                    let folder = self.names.entry(*folder).or_default();
                    match inode {
                        Some(inode) => drop(folder.insert(name.clone(), *inode)),
                        None => drop(folder.remove(name)),
                    }
                }
            }
        }
    }
}

impl Durable {
    pub(crate) fn record(&mut self, change: Change) {
        // Nothing can be done with a file that has no name: that it is there does not have to be synced.
        match change {
            Change::Made { .. } => self.state.apply(&change, Loss::None),
            other => self.pending.push(other),
        }
    }

    /// Makes durable what was done to a file or folder.
    ///
    /// A name is kept together with the changes it came from: where it had been before, and what else happened to the names
    /// it was given or taken by.
    pub(crate) fn sync(&mut self, synced: u64) {
        let mut inodes = HashSet::new();
        let mut names = HashSet::new();
        let mut is_kept = vec![false; self.pending.len()];
        for (at, change) in self.pending.iter().enumerate().rev() {
            is_kept[at] = match change {
                Change::Made { .. } => false,
                Change::Replaced { inode, .. } | Change::Written { inode, .. } | Change::Resized { inode, .. } => {
                    *inode == synced
                }
                Change::Named(changed) => changed.iter().any(|(folder, name, inode)| {
                    *folder == synced
                        || names.contains(&(*folder, name.clone()))
                        || inode.is_some_and(|inode| inodes.contains(&inode))
                }),
            };
            if let (true, Change::Named(changed)) = (is_kept[at], change) {
                for (folder, name, inode) in changed {
                    names.insert((*folder, name.clone()));
                    inodes.extend(*inode);
                }
            }
        }
        let mut is_kept = is_kept.into_iter();
        let state = &mut self.state;
        self.pending.retain(|change| {
            let is_kept = is_kept.next().expect("one for each");
            if is_kept {
                state.apply(change, Loss::None);
            }
            !is_kept
        });
    }

    /// Returns what is left if each change that is not durable meets the `loss` it is given.
    pub(crate) fn after(&self, loss: &mut dyn FnMut() -> Loss) -> Self {
        let mut state = self.state.clone();
        for change in &self.pending {
            state.apply(change, loss());
        }
        Self { state, pending: Vec::new() }
    }

    /// Returns the names in a folder; none of one that nothing is known of.
    pub(crate) fn names(&self, folder: u64) -> BTreeMap<String, u64> {
        self.state.names.get(&folder).cloned().unwrap_or_default()
    }

    /// Returns the bytes of a file, `None` for a folder.
    pub(crate) fn bytes(&self, inode: u64) -> Option<Vec<u8>> {
        self.state.files.get(&inode).cloned()
    }
}
