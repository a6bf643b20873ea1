//! A tree of objects in memory, for tests.
//!
//! It behaves like a file system where readers and writers could notice: an open object outlives its name, sees what is
//! written in place, and does not see what replaces it under its name. Inode numbers are never given twice, and modification
//! times always advance, unless they are set. It can also be asked what a power cut would leave of it
//! ([`crate::power_cut`]).

use std::collections::{BTreeMap, HashMap};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};
use std::time::{Duration, SystemTime};

use crate::power_cut::{Change, Durable, Loss};
use crate::write::MovesByPath;
use crate::{
    Capabilities, Entry, Error, ErrorKind, Existing, Kind, Mark, Moves, Object, ObjectPath, Result, Room, Stat,
    Storage, Synced, WritableObject, WritableStorage,
};

/// The inode of the root.
pub(crate) const ROOT: u64 = 1;

/// A storage in memory.
///
/// Locks: that of the tree before that of a file; never two files.
pub struct MemoryStorage {
    tree: Arc<Mutex<Tree>>,
}

/// Invariants: the root is there, and every name of a folder leads to a node.
struct Tree {
    nodes: HashMap<u64, Node>,
    last_inode: u64,
    last_modified: SystemTime,
    /// What would outlive a power cut, if that is of interest.
    durable: Option<Durable>,
}

enum Node {
    Directory(Directory),
    File(Arc<MemoryFile>),
}

#[derive(Default)]
struct Directory {
    names: BTreeMap<String, u64>,
    modified: Option<SystemTime>,
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

impl MemoryFile {
    fn new(inode: u64, bytes: Vec<u8>, modified: SystemTime) -> Arc<Self> {
        Arc::new(Self { inode, links: AtomicU64::new(1), contents: RwLock::new(Contents { bytes, modified }) })
    }

    fn change<T>(&self, act: impl FnOnce(&mut Contents) -> T) -> T {
        act(&mut self.contents.write().unwrap_or_else(PoisonError::into_inner))
    }

    fn look<T>(&self, act: impl FnOnce(&Contents) -> T) -> T {
        act(&self.contents.read().unwrap_or_else(PoisonError::into_inner))
    }

    fn stat(&self) -> Stat {
        self.look(|contents| Stat {
            kind: Kind::File,
            size: contents.bytes.len() as u64,
            inode: self.inode,
            links: self.links.load(Ordering::SeqCst),
            modified: contents.modified,
            changed: contents.modified,
        })
    }
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
        Self::with_durable(None)
    }

    /// Makes an empty storage that [`MemoryStorage::after_power_cut`] can be asked of.
    #[must_use]
    pub fn with_power_cuts() -> Self {
        Self::with_durable(Some(Durable::default()))
    }

    fn with_durable(durable: Option<Durable>) -> Self {
        let nodes = HashMap::from([(ROOT, Node::Directory(Directory::default()))]);
        let tree = Tree { nodes, last_inode: ROOT, last_modified: SystemTime::UNIX_EPOCH, durable };
        Self { tree: Arc::new(Mutex::new(tree)) }
    }

    /// Returns what a power cut now would leave: what was synced, and of each change that was not what `loss` says, in the
    /// order in which they were made. The storage itself goes on as it is.
    ///
    /// # Panics
    /// If it was not made by [`MemoryStorage::with_power_cuts`].
    #[must_use]
    pub fn after_power_cut(&self, mut loss: impl FnMut() -> Loss) -> Self {
        let tree = self.tree();
        let durable = tree.durable.as_ref().expect("it was made to be asked this").after(&mut loss);
        let after = Self::with_durable(None);
        {
            let mut left = after.tree();
            (left.last_inode, left.last_modified) = (tree.last_inode, tree.last_modified);
            left.restore(&durable, |inode| match tree.nodes.get(&inode) {
                Some(Node::File(file)) => file.look(|contents| contents.modified),
                _ => tree.last_modified,
            });
            left.durable = Some(durable);
        }
        after
    }

    /// Puts a new file at `path`, making the directories it needs; a file of that name loses it, as by a rename.
    ///
    /// # Errors
    /// [`ErrorKind::IsDirectory`] or [`ErrorKind::NotDirectory`] if `path` or what leads to it is of another kind.
    pub fn put(&self, path: &str, bytes: impl Into<Vec<u8>>) -> Result<()> {
        let path = ObjectPath::new(path)?;
        let mut tree = self.tree();
        let folder = tree.make_directories("write", &path.parent())?;
        if let Ok((_, Node::Directory(_))) = tree.get("write", &path) {
            return Err(Error::is_directory("write", &path));
        }
        tree.add_file(folder, path.file_name(), bytes.into());
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
        tree.replace(&file, bytes.into());
        Ok(())
    }

    /// Makes the directory `path`, and those that lead to it.
    ///
    /// # Errors
    /// [`ErrorKind::NotDirectory`] if a file is in the way.
    pub fn create_directory(&self, path: &str) -> Result<()> {
        self.tree().make_directories("create", &ObjectPath::new(path)?).map(drop)
    }

    /// Removes the file or directory at `path`, with all it holds. What has a file open keeps it.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] if nothing is there.
    pub fn remove(&self, path: &str) -> Result<()> {
        let path = ObjectPath::new(path)?;
        let mut tree = self.tree();
        let (inode, _) = tree.get("remove", &path)?;
        if inode == ROOT {
            for name in tree.names_of(ROOT) {
                tree.unlink(ROOT, &name);
            }
            return Ok(());
        }
        let (folder, _) = tree.folder("remove", &path.parent())?;
        tree.unlink(folder, path.file_name());
        Ok(())
    }

    /// Renames a file, or a directory with all it holds; what had the name `to` loses it.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] if nothing is at `from`, [`ErrorKind::NotDirectory`] if no directory holds `to`, and
    /// [`ErrorKind::Escape`] if `to` is inside `from`.
    pub fn rename(&self, from: &str, to: &str) -> Result<()> {
        self.tree().rename(&ObjectPath::new(from)?, &ObjectPath::new(to)?)
    }

    fn tree(&self) -> MutexGuard<'_, Tree> {
        lock(&self.tree)
    }
}

fn lock(tree: &Mutex<Tree>) -> MutexGuard<'_, Tree> {
    tree.lock().unwrap_or_else(PoisonError::into_inner)
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

    fn record(&mut self, change: impl FnOnce() -> Change) {
        if let Some(durable) = &mut self.durable {
            durable.record(change());
        }
    }

    /// Makes the nodes that are left of a power cut.
    fn restore(&mut self, durable: &Durable, modified: impl Fn(u64) -> SystemTime) {
        let mut folders = vec![ROOT];
        while let Some(folder) = folders.pop() {
            let names = durable.names(folder);
            for inode in names.values() {
                if let Some(Node::File(file)) = self.nodes.get(inode) {
                    file.links.fetch_add(1, Ordering::SeqCst);
                } else if let Some(bytes) = durable.bytes(*inode) {
                    self.nodes.insert(*inode, Node::File(MemoryFile::new(*inode, bytes, modified(*inode))));
                } else {
                    folders.push(*inode);
                }
            }
            let modified = Some(modified(folder));
            self.nodes.insert(folder, Node::Directory(Directory { names, modified }));
        }
    }

    fn get(&self, act: &'static str, path: &ObjectPath) -> Result<(u64, &Node)> {
        let mut inode = ROOT;
        for name in path.components() {
            match self.node(inode) {
                Node::File(_) => return Err(Error::not_directory(act, path)),
                Node::Directory(directory) => match directory.names.get(name) {
                    Some(found) => inode = *found,
                    None => return Err(Error::new(ErrorKind::NotFound, act, path, "no such file or directory")),
                },
            }
        }
        Ok((inode, self.node(inode)))
    }

    fn node(&self, inode: u64) -> &Node {
        &self.nodes[&inode]
    }

    fn names_of(&self, folder: u64) -> Vec<String> {
        match self.node(folder) {
            Node::Directory(directory) => directory.names.keys().cloned().collect(),
            Node::File(_) => Vec::new(),
        }
    }

    fn file(&self, act: &'static str, path: &ObjectPath) -> Result<Arc<MemoryFile>> {
        match self.get(act, path)? {
            (_, Node::File(file)) => Ok(file.clone()),
            (_, Node::Directory(_)) => Err(Error::is_directory(act, path)),
        }
    }

    fn folder(&self, act: &'static str, path: &ObjectPath) -> Result<(u64, &Directory)> {
        match self.get(act, path)? {
            (inode, Node::Directory(directory)) => Ok((inode, directory)),
            (_, Node::File(_)) => Err(Error::not_directory(act, path)),
        }
    }

    fn make_directories(&mut self, act: &'static str, path: &ObjectPath) -> Result<u64> {
        match self.folder(act, path) {
            Ok((inode, _)) => return Ok(inode),
            Err(error) if error.kind() == ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
        let above = self.make_directories(act, &path.parent())?;
        let inode = self.next_inode();
        self.add(above, path.file_name(), inode, Node::Directory(Directory::default()));
        Ok(inode)
    }

    fn add_file(&mut self, folder: u64, name: &str, bytes: Vec<u8>) -> Arc<MemoryFile> {
        let (inode, modified) = (self.next_inode(), self.next_modified());
        let file = MemoryFile::new(inode, bytes, modified);
        self.record(|| Change::Made { inode });
        if file.stat().size > 0 {
            self.record(|| Change::Replaced { inode, bytes: file.look(|contents| contents.bytes.clone()) });
        }
        self.add(folder, name, inode, Node::File(file.clone()));
        file
    }

    /// Gives a new node its name.
    fn add(&mut self, folder: u64, name: &str, inode: u64, node: Node) {
        self.nodes.insert(inode, node);
        self.set_names(vec![(folder, name.to_owned(), Some(inode))]);
    }

    fn unlink(&mut self, folder: u64, name: &str) {
        self.set_names(vec![(folder, name.to_owned(), None)]);
    }

    /// Changes names, all at once; a file that loses one has one less, a folder is gone with all it holds.
    fn set_names(&mut self, names: Vec<(u64, String, Option<u64>)>) {
        let moved: Vec<u64> = names.iter().filter_map(|(_, _, inode)| *inode).collect();
        for (folder, name, inode) in &names {
            let now = self.next_modified();
            let Some(Node::Directory(directory)) = self.nodes.get_mut(folder) else { continue };
            directory.modified = Some(now);
            let lost = match inode {
                Some(inode) => directory.names.insert(name.clone(), *inode),
                None => directory.names.remove(name),
            };
            if let Some(lost) = lost.filter(|lost| !moved.contains(lost)) {
                self.lose(lost);
            }
        }
        self.record(|| Change::Named(names));
    }

    fn lose(&mut self, inode: u64) {
        match self.nodes.get(&inode) {
            Some(Node::File(file)) => drop(file.links.fetch_sub(1, Ordering::SeqCst)),
            Some(Node::Directory(_)) => {
                for name in self.names_of(inode) {
                    self.unlink(inode, &name);
                }
            }
            None => {}
        }
        self.nodes.remove(&inode);
    }

    fn rename(&mut self, from: &ObjectPath, to: &ObjectPath) -> Result<()> {
        let (moved, _) = self.get("rename", from)?;
        if from == to {
            return Ok(());
        }
        if to.is_beneath(from) || from.is_beneath(to) {
            return Err(Error::new(ErrorKind::Escape, "rename", from, format!("'{to}' and it hold each other")));
        }
        let (old_folder, _) = self.folder("rename", &from.parent())?;
        let (new_folder, _) = self.folder("rename", &to.parent())?;
        self.set_names(vec![
            (old_folder, from.file_name().to_owned(), None),
            (new_folder, to.file_name().to_owned(), Some(moved)),
        ]);
        Ok(())
    }

    fn set_modified(&mut self, inode: u64, modified: SystemTime) {
        match self.nodes.get_mut(&inode) {
            Some(Node::Directory(directory)) => directory.modified = Some(modified),
            Some(Node::File(file)) => file.change(|contents| contents.modified = modified),
            None => {}
        }
    }

    /// Replaces the bytes of a file.
    fn replace(&mut self, file: &MemoryFile, bytes: Vec<u8>) {
        let modified = self.next_modified();
        let inode = file.inode;
        self.record(|| Change::Replaced { inode, bytes: bytes.clone() });
        file.change(|contents| *contents = Contents { bytes, modified });
    }

    /// Writes into a file, which grows as far as is needed.
    fn write_at(&mut self, file: &MemoryFile, offset: u64, bytes: &[u8]) {
        let modified = self.next_modified();
        let inode = file.inode;
        self.record(|| Change::Written { inode, offset, bytes: bytes.to_vec() });
        file.change(|contents| {
            write_at(&mut contents.bytes, offset, bytes);
            contents.modified = modified;
        });
    }

    /// Makes a file `len` bytes long.
    fn resize(&mut self, file: &MemoryFile, len: usize) {
        let modified = self.next_modified();
        let inode = file.inode;
        self.record(|| Change::Resized { inode, len });
        file.change(|contents| {
            contents.bytes.resize(len, 0);
            contents.modified = modified;
        });
    }
}

/// Writes into `contents`, which grow as far as is needed.
pub(crate) fn write_at(contents: &mut Vec<u8>, offset: u64, bytes: &[u8]) {
    let start = usize::try_from(offset).expect("a test's file fits in memory");
    let end = start + bytes.len();
    if contents.len() < end {
        contents.resize(end, 0);
    }
    contents[start..end].copy_from_slice(bytes);
}

impl Object for MemoryFile {
    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<usize> {
        Ok(self.look(|contents| copy_at(&contents.bytes, offset, buffer)))
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
        self.tree().file("read", path)?.look(|contents| {
            if contents.bytes.len() as u64 > limit {
                return Err(Error::too_large("read", path, limit));
            }
            Ok(contents.bytes.clone())
        })
    }

    fn list(&self, path: &ObjectPath) -> Result<Vec<Entry>> {
        let tree = self.tree();
        let (_, directory) = tree.folder("list", path)?;
        let entry = |(name, inode): (&String, &u64)| Entry {
            name: name.clone(),
            is_directory: matches!(tree.node(*inode), Node::Directory(_)),
        };
        Ok(directory.names.iter().map(entry).collect())
    }

    fn stat(&self, path: &ObjectPath) -> Result<Stat> {
        match self.tree().get("stat", path)? {
            (_, Node::File(file)) => Ok(file.stat()),
            (inode, Node::Directory(directory)) => {
                let modified = directory.modified.unwrap_or(SystemTime::UNIX_EPOCH);
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

impl WritableStorage for MemoryStorage {
    fn reader(self: Arc<Self>) -> Arc<dyn Storage> {
        self
    }

    fn write(&self, path: &ObjectPath, bytes: &[u8], existing: Existing) -> Result<()> {
        let mut tree = self.tree();
        match tree.file("write", path) {
            Ok(_) if existing == Existing::Refuse => return Err(exists("write", path)),
            Ok(file) => tree.replace(&file, bytes.to_vec()),
            Err(error) if error.kind() == ErrorKind::NotFound => {
                let (folder, _) = tree.folder("write", &path.parent())?;
                tree.add_file(folder, path.file_name(), bytes.to_vec());
            }
            Err(error) => return Err(error),
        }
        Ok(())
    }

    fn create(&self, path: &ObjectPath) -> Result<Arc<dyn WritableObject>> {
        let mut tree = self.tree();
        if tree.get("create", path).is_ok() {
            return Err(exists("create", path));
        }
        let (folder, _) = tree.folder("create", &path.parent())?;
        let file = tree.add_file(folder, path.file_name(), Vec::new());
        Ok(Arc::new(Writer { tree: self.tree.clone(), file }))
    }

    fn open_to_write(&self, path: &ObjectPath) -> Result<Arc<dyn WritableObject>> {
        let file = self.tree().file("open", path)?;
        Ok(Arc::new(Writer { tree: self.tree.clone(), file }))
    }

    fn create_directory(&self, path: &ObjectPath) -> Result<()> {
        let mut tree = self.tree();
        if tree.get("create", path).is_ok() {
            return Err(exists("create", path));
        }
        tree.folder("create", &path.parent())?;
        let inode = tree.make_directories("create", path)?;
        let now = tree.next_modified();
        tree.set_modified(inode, now);
        Ok(())
    }

    fn rename(&self, from: &ObjectPath, to: &ObjectPath) -> Result<()> {
        let mut tree = self.tree();
        if from != to && matches!(tree.get("rename", to), Ok((_, Node::Directory(_)))) {
            return Err(exists("rename", to));
        }
        tree.rename(from, to)
    }

    fn moves<'a>(&'a self, from: &ObjectPath, to: &ObjectPath) -> Result<Box<dyn Moves + 'a>> {
        MovesByPath::begin(self, from, to)
    }

    fn remove(&self, path: &ObjectPath) -> Result<()> {
        let mut tree = self.tree();
        tree.file("remove", path)?;
        let (folder, _) = tree.folder("remove", &path.parent())?;
        tree.unlink(folder, path.file_name());
        Ok(())
    }

    fn remove_directory(&self, path: &ObjectPath) -> Result<()> {
        let mut tree = self.tree();
        let (inode, directory) = tree.folder("remove", path)?;
        if inode == ROOT || !directory.names.is_empty() {
            return Err(Error::new(ErrorKind::NotEmpty, "remove", path, "an empty folder was expected"));
        }
        let (folder, _) = tree.folder("remove", &path.parent())?;
        tree.unlink(folder, path.file_name());
        Ok(())
    }

    fn touch(&self, path: &ObjectPath) -> Result<()> {
        let mut tree = self.tree();
        let now = tree.next_modified();
        let (inode, _) = tree.get("touch", path)?;
        tree.set_modified(inode, now);
        Ok(())
    }

    fn set_modified(&self, path: &ObjectPath, modified: SystemTime) -> Result<()> {
        let mut tree = self.tree();
        let (inode, _) = tree.get("touch", path)?;
        tree.set_modified(inode, modified);
        Ok(())
    }

    fn sync(&self, path: &ObjectPath) -> Result<()> {
        let mut tree = self.tree();
        let (inode, _) = tree.get("sync", path)?;
        if let Some(durable) = &mut tree.durable {
            durable.sync(inode);
        }
        Ok(())
    }

    fn mark(&self) -> Result<Mark> {
        Ok(Mark::default())
    }

    fn sync_trees(&self, paths: &[ObjectPath], what: Synced, _: &Mark) -> Result<()> {
        let mut tree = self.tree();
        let mut inodes = Vec::new();
        for path in paths {
            inodes.push(tree.get("sync", path)?.0);
        }
        while let Some(inode) = inodes.pop() {
            match tree.node(inode) {
                Node::Directory(directory) => inodes.extend(directory.names.values()),
                _ if what == Synced::Names => continue,
                _ => {}
            }
            if let Some(durable) = &mut tree.durable {
                durable.sync(inode);
            }
        }
        Ok(())
    }

    fn is_immutable(&self, path: &ObjectPath) -> Result<bool> {
        self.stat(path).map(|_| false)
    }

    fn room(&self) -> Result<Room> {
        Ok(Room { bytes: u64::MAX, inodes: None })
    }
}

fn exists(act: &'static str, path: &ObjectPath) -> Error {
    Error::new(ErrorKind::Exists, act, path, "the name is taken")
}

/// A file that is open to be changed.
struct Writer {
    tree: Arc<Mutex<Tree>>,
    file: Arc<MemoryFile>,
}

impl Object for Writer {
    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<usize> {
        self.file.read_at(offset, buffer)
    }

    fn stat(&self) -> Result<Stat> {
        Ok(self.file.stat())
    }
}

impl WritableObject for Writer {
    fn write_at(&self, offset: u64, bytes: &[u8]) -> Result<()> {
        lock(&self.tree).write_at(&self.file, offset, bytes);
        Ok(())
    }

    fn set_len(&self, len: u64) -> Result<()> {
        let len = usize::try_from(len).expect("a test's file fits in memory");
        lock(&self.tree).resize(&self.file, len);
        Ok(())
    }

    fn sync(&self) -> Result<()> {
        if let Some(durable) = &mut lock(&self.tree).durable {
            durable.sync(self.file.inode);
        }
        Ok(())
    }
}
