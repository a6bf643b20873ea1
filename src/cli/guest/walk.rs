//! Everything below a folder of a guest, in the order of names; a folder comes before what is in it.

use std::collections::HashSet;
use std::os::unix::ffi::OsStrExt;

use anyhow::{Result, anyhow};

use crate::tree::{Attributes, Directory, Entry, Kind, Tree};

/// Folders in each other that are followed. Deeper, no program reaches a file by its path (4,096 bytes).
const DEPTH: usize = 2048;

/// What is met on the way.
pub enum Step {
    /// A folder, into which the walk goes now; it can be listed.
    Enter(Item),
    /// The end of the last folder that was entered and not left.
    Leave,
    /// Anything else, and a folder into which the walk does not go.
    Other(Item),
    /// What cannot be looked at, by its path; the walk goes on.
    Failed(Vec<u8>, anyhow::Error),
}

/// A file or folder.
pub struct Item {
    /// From where the walk began, of which it is empty.
    pub path: Vec<u8>,
    pub attributes: Attributes,
}

/// A walk through a folder of a guest.
pub struct Walk<'a> {
    tree: &'a Tree,
    first: Option<Attributes>,
    is_recursive: bool,
    levels: Vec<Level>,
    /// Folders that were entered: a damaged filesystem may have one in several places, or in itself.
    entered: HashSet<u64>,
}

struct Level {
    inode: u64,
    path: Vec<u8>,
    /// `None` if the walk turned back.
    directory: Option<Directory>,
    next: usize,
}

impl<'a> Walk<'a> {
    /// Begins at a file or folder; goes into the folders in that only if it `is_recursive`.
    pub fn new(tree: &'a Tree, attributes: Attributes, is_recursive: bool) -> Self {
        Self { tree, first: Some(attributes), is_recursive, levels: Vec::new(), entered: HashSet::new() }
    }

    /// Does not go into the folder that was just entered: the next step leaves it.
    pub fn turn_back(&mut self) {
        if let Some(level) = self.levels.last_mut() {
            level.directory = None;
        }
    }

    fn step(&mut self, item: Item) -> Step {
        let Attributes { kind, inode, .. } = item.attributes;
        if kind != Kind::Directory || (!self.is_recursive && !self.levels.is_empty()) {
            return Step::Other(item);
        }
        if let Err(error) = self.enter(&item.path, inode) {
            return Step::Failed(item.path, error);
        }
        Step::Enter(item)
    }

    fn enter(&mut self, path: &[u8], inode: u64) -> Result<()> {
        if !self.entered.insert(inode) {
            return Err(anyhow!("the folder stands in another place, too: the filesystem is damaged"));
        }
        if self.levels.len() == DEPTH {
            return Err(anyhow!("more than {DEPTH} folders in each other"));
        }
        let directory = Some(self.tree.list(inode)?);
        self.levels.push(Level { inode, path: path.to_vec(), directory, next: 0 });
        Ok(())
    }
}

impl Iterator for Walk<'_> {
    type Item = Step;

    fn next(&mut self) -> Option<Step> {
        if let Some(attributes) = self.first.take() {
            return Some(self.step(Item { path: Vec::new(), attributes }));
        }
        let level = self.levels.last_mut()?;
        let entry = level.directory.as_ref().and_then(|directory| self.tree.entry(directory, level.next));
        let Some(Entry { name, .. }) = entry else {
            self.levels.pop();
            return Some(Step::Leave);
        };
        level.next += 1;
        let slash: &[u8] = if level.path.is_empty() { b"" } else { b"/" };
        let path = [&level.path, slash, name.as_bytes()].concat();
        // No name of the tree is one of these; whatever writes files by them rests on that.
        if matches!(name.as_bytes(), b"" | b"." | b"..") || name.as_bytes().contains(&b'/') {
            return Some(Step::Failed(path, anyhow!("it has a name that no file can have")));
        }
        Some(match self.tree.lookup(level.inode, &name) {
            Ok(attributes) => self.step(Item { path, attributes }),
            Err(error) => Step::Failed(path, error.into()),
        })
    }
}
