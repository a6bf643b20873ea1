//! A tree of objects in memory, for tests.
//!
//! It behaves like a file system where readers could notice: an open object outlives its name, sees what is written in
//! place, and does not see what replaces it under its name. Inode numbers are never given twice, and modification times
//! always advance.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};
use std::time::{Duration, SystemTime};

use crate::{Capabilities, Entry, Error, ErrorKind, Kind, Object, ObjectPath, Result, Stat, Storage};

/// A storage in memory.
///
/// Locks: that of the tree before that of a file; never two files.
pub struct MemoryStorage {
    tree: Mutex<Tree>,
}

/// Invariants: the root is there, and the parent of every node is a directory.
struct Tree {
    nodes: BTreeMap<ObjectPath, Node>,
    last_inode: u64,
    last_modified: SystemTime,
}

#[derive(Clone)]
enum Node {
    Directory { inode: u64, modified: SystemTime },
    File(Arc<MemoryFile>),
}

struct MemoryFile {
    inode: u64,
    links: AtomicU64,
    contents: RwLock<Contents>,
}

struct Contents {
    bytes: Vec<u8>,
    modified: SystemTime,
}

impl Default for MemoryStorage {
    fn default() -> Self {
        Self::new()
    }
}

impl MemoryStorage {
    /// Makes an empty storage.
    #[must_use]
    pub fn new() -> Self {
        let mut tree = Tree { nodes: BTreeMap::new(), last_inode: 0, last_modified: SystemTime::UNIX_EPOCH };
        let root = tree.new_directory();
        tree.nodes.insert(ObjectPath::root(), root);
        Self { tree: Mutex::new(tree) }
    }

    /// Puts a new file at `path`, making the directories it needs; a file of that name loses it, as by a rename.
    ///
    /// # Errors
    /// [`ErrorKind::IsDirectory`] or [`ErrorKind::NotDirectory`] if `path` or what leads to it is of another kind.
    pub fn put(&self, path: &str, bytes: impl Into<Vec<u8>>) -> Result<()> {
        let path = ObjectPath::new(path)?;
        let mut tree = self.tree();
        tree.make_directories("write", &path.parent())?;
        if let Some(Node::Directory { .. }) = tree.nodes.get(&path) {
            return Err(is_directory("write", &path));
        }
        let contents = RwLock::new(Contents { bytes: bytes.into(), modified: tree.next_modified() });
        let file = MemoryFile { inode: tree.next_inode(), links: AtomicU64::new(1), contents };
        tree.insert(path, Node::File(Arc::new(file)));
        Ok(())
    }

    /// Replaces the bytes of the file at `path` in place: what has it open sees them, and its inode stays.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] or [`ErrorKind::IsDirectory`] if no file is there.
    pub fn overwrite(&self, path: &str, bytes: impl Into<Vec<u8>>) -> Result<()> {
        let path = ObjectPath::new(path)?;
        let mut tree = self.tree();
        let file = tree.file("write", &path)?;
        let modified = tree.next_modified();
        *file.contents.write().unwrap_or_else(PoisonError::into_inner) = Contents { bytes: bytes.into(), modified };
        Ok(())
    }

    /// Makes the directory `path`, and those that lead to it.
    ///
    /// # Errors
    /// [`ErrorKind::NotDirectory`] if a file is in the way.
    pub fn create_directory(&self, path: &str) -> Result<()> {
        self.tree().make_directories("create", &ObjectPath::new(path)?)
    }

    /// Removes the file or directory at `path`, with all it holds. What has a file open keeps it.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] if nothing is there.
    pub fn remove(&self, path: &str) -> Result<()> {
        let path = ObjectPath::new(path)?;
        let mut tree = self.tree();
        tree.get("remove", &path)?;
        tree.take(&path);
        tree.touch(&path.parent());
        Ok(())
    }

    /// Renames a file, or a directory with all it holds; what had the name `to` loses it.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] if nothing is at `from`, [`ErrorKind::NotDirectory`] if no directory holds `to`, and
    /// [`ErrorKind::Escape`] if `to` is inside `from`.
    pub fn rename(&self, from: &str, to: &str) -> Result<()> {
        let (from, to) = (ObjectPath::new(from)?, ObjectPath::new(to)?);
        let mut tree = self.tree();
        tree.get("rename", &from)?;
        if from == to {
            return Ok(());
        }
        if is_beneath(&to, &from) || is_beneath(&from, &to) {
            return Err(Error::new(ErrorKind::Escape, "rename", &from, format!("'{to}' and it hold each other")));
        }
        match tree.get("rename", &to.parent())? {
            Node::Directory { .. } => {}
            Node::File(_) => return Err(not_directory("rename", &to.parent())),
        }
        let moved = tree.detach(&from);
        tree.take(&to);
        for (path, node) in moved {
            let rest = path.as_str()[from.as_str().len()..].trim_start_matches('/');
            let path = if rest.is_empty() { to.clone() } else { to.resolve(rest)? };
            tree.nodes.insert(path, node);
        }
        tree.touch(&from.parent());
        tree.touch(&to.parent());
        Ok(())
    }

    fn tree(&self) -> MutexGuard<'_, Tree> {
        self.tree.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Tree {
    fn next_inode(&mut self) -> u64 {
        self.last_inode += 1;
        self.last_inode
    }

    fn next_modified(&mut self) -> SystemTime {
        self.last_modified = SystemTime::now().max(self.last_modified + Duration::from_nanos(1));
        self.last_modified
    }

    fn new_directory(&mut self) -> Node {
        Node::Directory { inode: self.next_inode(), modified: self.next_modified() }
    }

    fn get(&self, act: &'static str, path: &ObjectPath) -> Result<Node> {
        if let Some(node) = self.nodes.get(path) {
            return Ok(node.clone());
        }
        let mut parent = path.parent();
        while !self.nodes.contains_key(&parent) {
            parent = parent.parent();
        }
        match self.nodes.get(&parent) {
            Some(Node::File(_)) => Err(not_directory(act, path)),
            _ => Err(Error::new(ErrorKind::NotFound, act, path, "no such file or directory")),
        }
    }

    fn file(&self, act: &'static str, path: &ObjectPath) -> Result<Arc<MemoryFile>> {
        match self.get(act, path)? {
            Node::File(file) => Ok(file),
            Node::Directory { .. } => Err(is_directory(act, path)),
        }
    }

    fn make_directories(&mut self, act: &'static str, path: &ObjectPath) -> Result<()> {
        match self.nodes.get(path) {
            Some(Node::Directory { .. }) => Ok(()),
            Some(Node::File(_)) => Err(not_directory(act, path)),
            None => {
                self.make_directories(act, &path.parent())?;
                let node = self.new_directory();
                self.insert(path.clone(), node);
                Ok(())
            }
        }
    }

    fn insert(&mut self, path: ObjectPath, node: Node) {
        self.touch(&path.parent());
        if let Some(Node::File(old)) = self.nodes.insert(path, node) {
            old.links.fetch_sub(1, Ordering::SeqCst);
        }
    }

    /// Takes `path` and all beneath it out of the tree.
    fn detach(&mut self, path: &ObjectPath) -> BTreeMap<ObjectPath, Node> {
        let is_taken = |candidate: &ObjectPath| candidate == path || is_beneath(candidate, path);
        let (taken, kept) = std::mem::take(&mut self.nodes).into_iter().partition(|(candidate, _)| is_taken(candidate));
        self.nodes = kept;
        taken
    }

    /// Removes `path` and all beneath it; the root stays.
    fn take(&mut self, path: &ObjectPath) {
        for (path, node) in self.detach(path) {
            match node {
                Node::File(file) => drop(file.links.fetch_sub(1, Ordering::SeqCst)),
                Node::Directory { .. } if path == ObjectPath::root() => drop(self.nodes.insert(path, node)),
                Node::Directory { .. } => {}
            }
        }
    }

    fn touch(&mut self, directory: &ObjectPath) {
        let now = self.next_modified();
        if let Some(Node::Directory { modified, .. }) = self.nodes.get_mut(directory) {
            *modified = now;
        }
    }
}

fn is_beneath(path: &ObjectPath, directory: &ObjectPath) -> bool {
    let mut components = path.components();
    directory.components().all(|name| components.next() == Some(name)) && components.next().is_some()
}

fn is_directory(act: &'static str, path: &ObjectPath) -> Error {
    Error::new(ErrorKind::IsDirectory, act, path, "a file was expected, not a folder")
}

fn not_directory(act: &'static str, path: &ObjectPath) -> Error {
    Error::new(ErrorKind::NotDirectory, act, path, "a folder was expected, not a file")
}

impl MemoryFile {
    fn stat(&self) -> Stat {
        let contents = self.contents.read().unwrap_or_else(PoisonError::into_inner);
        Stat {
            kind: Kind::File,
            size: contents.bytes.len() as u64,
            inode: self.inode,
            links: self.links.load(Ordering::SeqCst),
            modified: contents.modified,
            changed: contents.modified,
        }
    }
}

impl Object for MemoryFile {
    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<usize> {
        let contents = self.contents.read().unwrap_or_else(PoisonError::into_inner);
        Ok(copy_at(&contents.bytes, offset, buffer))
    }

    fn stat(&self) -> Result<Stat> {
        Ok(self.stat())
    }
}

/// Fills `buffer` with what `bytes` hold from `offset` on; returns how many bytes that were.
pub(crate) fn copy_at(bytes: &[u8], offset: u64, buffer: &mut [u8]) -> usize {
    let start = usize::try_from(offset).unwrap_or(usize::MAX).min(bytes.len());
    let count = buffer.len().min(bytes.len() - start);
    buffer[..count].copy_from_slice(&bytes[start..start + count]);
    count
}

impl Storage for MemoryStorage {
    fn open(&self, path: &ObjectPath) -> Result<Arc<dyn Object>> {
        Ok(self.tree().file("open", path)?)
    }

    fn read(&self, path: &ObjectPath, limit: u64) -> Result<Vec<u8>> {
        let file = self.tree().file("read", path)?;
        let contents = file.contents.read().unwrap_or_else(PoisonError::into_inner);
        if contents.bytes.len() as u64 > limit {
            return Err(Error::too_large("read", path, limit));
        }
        Ok(contents.bytes.clone())
    }

    fn list(&self, path: &ObjectPath) -> Result<Vec<Entry>> {
        let tree = self.tree();
        if let Node::File(_) = tree.get("list", path)? {
            return Err(not_directory("list", path));
        }
        let is_child = |candidate: &ObjectPath| *candidate != ObjectPath::root() && candidate.parent() == *path;
        let entry = |(child, node): (&ObjectPath, &Node)| Entry {
            name: child.file_name().to_owned(),
            is_directory: matches!(node, Node::Directory { .. }),
        };
        Ok(tree.nodes.iter().filter(|(candidate, _)| is_child(candidate)).map(entry).collect())
    }

    fn stat(&self, path: &ObjectPath) -> Result<Stat> {
        match self.tree().get("stat", path)? {
            Node::File(file) => Ok(file.stat()),
            Node::Directory { inode, modified } => {
                Ok(Stat { kind: Kind::Directory, size: 0, inode, links: 1, modified, changed: modified })
            }
        }
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities { ranged_reads: true, is_remote: false }
    }

    fn describe(&self) -> String {
        "memory".to_owned()
    }
}
