//! Answers the requests of a mount from the tree.
//!
//! A read goes from the number of an open file to its disk, is clamped to the disk's size and filled into a buffer of
//! the thread: no lock is held meanwhile, and nothing is allocated.

use std::cell::RefCell;
use std::collections::HashSet;
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use disk::Readahead;

use super::attributes::{Appearance, FILE_BLOCK, Owner};
use super::caching::{Habits, Watched};
use super::errno::Errno;
use super::handles::Handles;
use super::transport::{Access, Caching, Ctx, DirectoryEntry, Entries, Opened, Reply, Seek, Statfs, Timed};
use crate::tree::{self, Content, Directory, Health, Kind, Tree};

/// A guest's file of so many bytes is read as disks are by programs that read in large pieces; of smaller ones finding out who
/// reads would cost more than it brings.
const LARGE_FILE: u64 = 16 << 20;

/// Longest name, in bytes.
const NAME_LENGTH: u32 = 255;

/// Errors of reads remembered as logged; past it each new one is logged again.
const LOGGED_LIMIT: usize = 4096;

/// For how long holes are looked for: `lseek(2)` may say that what follows is data.
const SEEK_PATIENCE: Duration = Duration::from_secs(5);

thread_local! {
    /// Grows to the largest read of the thread (1 MiB) and is then reused as it is.
    static BUFFER: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

/// An open file or directory.
pub(super) enum Open {
    File {
        inode: u64,
        content: Content,
        readahead: Readahead,
        /// Of a disk.
        watched: Option<Watched>,
    },
    Directory {
        inode: u64,
        /// What was there when reading last began at the start; offsets count in it.
        listed: Mutex<Option<Arc<Listed>>>,
    },
}

/// A directory as `readdir(3)` shows it: itself, the one above, and what is in it.
pub(super) struct Listed {
    own: [(u64, &'static str); 2],
    directory: Directory,
}

/// What is left of one from an entry on.
struct Rest {
    files: Arc<TreeFilesystem>,
    listed: Arc<Listed>,
    from: usize,
}

impl Entries for Rest {
    fn get(&self, index: usize) -> Option<DirectoryEntry> {
        let index = self.from.checked_add(index)?;
        let Listed { own, directory } = &*self.listed;
        let next = index as u64 + 1;
        if let Some((inode, name)) = own.get(index) {
            return Some(DirectoryEntry { inode: *inode, kind: Kind::Directory, name: name.into(), next });
        }
        let entry = self.files.tree.entry(directory, index - own.len())?;
        Some(DirectoryEntry { inode: entry.inode, kind: entry.kind, name: entry.name, next })
    }

    fn known(&self, index: usize) -> Option<Timed> {
        let Listed { own, directory } = &*self.listed;
        let index = self.from.checked_add(index)?.checked_sub(own.len())?;
        self.files.tree.known_entry(directory, index).map(|known| self.files.appearance.timed(&known))
    }
}

impl Open {
    pub(super) fn inode(&self) -> u64 {
        match self {
            Self::File { inode, .. } | Self::Directory { inode, .. } => *inode,
        }
    }

    /// Whether it keeps something in the repository open.
    pub(super) fn is_stored(&self) -> bool {
        matches!(self, Self::File { content: Content::Disk(_) | Content::File(_) | Content::Object(_), .. })
    }

    /// Whether it is a directory of which the names were read.
    pub(super) fn is_listed(&self) -> bool {
        matches!(self, Self::Directory { listed, .. } if lock(listed).is_some())
    }

    /// Whether its bytes are in memory.
    pub(super) fn is_at_hand(&self) -> bool {
        matches!(self, Self::File { content: Content::Bytes(_) | Content::Live(_), .. })
    }
}

/// A tree, as a mount shows it.
pub(super) struct TreeFilesystem {
    tree: Tree,
    appearance: Appearance,
    open: Handles<Open>,
    habits: Habits,
    /// (inode, message) of the errors that were logged.
    logged: Mutex<HashSet<(u64, String)>>,
}

impl TreeFilesystem {
    pub(super) fn new(tree: Tree, owner: Owner) -> Self {
        let appearance = Appearance::new(owner, tree.is_remote());
        Self { tree, appearance, open: Handles::new(), habits: Habits::new(), logged: Mutex::default() }
    }

    /// Makes a number of an error; one that means trouble is logged, once for each file and message.
    fn tree_errno(&self, inode: u64, error: &tree::Error) -> Errno {
        let errno = Errno::of_tree(error);
        if errno == Errno::IO {
            self.log(inode, &error.to_string());
        }
        errno
    }

    fn read_errno(&self, inode: u64, error: &disk::Error) -> Errno {
        let errno = Errno::of_disk(error);
        if errno == Errno::IO {
            self.tree.health().failed();
            let message = error.to_string();
            if self.log(inode, &message) {
                self.tree.report(inode, &message);
            }
        }
        errno
    }

    /// Logs an error unless it was logged; returns whether it was new.
    fn log(&self, inode: u64, message: &str) -> bool {
        let mut logged = lock(&self.logged);
        if logged.len() >= LOGGED_LIMIT {
            logged.clear();
        }
        let is_new = logged.insert((inode, message.to_owned()));
        drop(logged);
        if is_new {
            tracing::error!(inode, "{message}");
        }
        is_new
    }

    fn read_disk(&self, inode: u64, disk: &dyn disk::Disk, offset: u64, len: u32, reply: Reply<[u8]>) {
        let left = disk.size().saturating_sub(offset);
        let len = usize::try_from(left.min(u64::from(len))).expect("at most len");
        if len == 0 {
            return reply.ok(&[]);
        }
        with_buffer(len, |buffer| match disk.read_at(offset, buffer) {
            Ok(()) => reply.ok(buffer),
            Err(error) => reply.error(self.read_errno(inode, &error)),
        });
    }

    fn read_object(&self, inode: u64, object: &dyn storage::Object, offset: u64, len: u32, reply: Reply<[u8]>) {
        with_buffer(usize::try_from(len).expect("usize holds 32 bits"), |buffer| {
            let mut filled = 0;
            while filled < buffer.len() {
                match object.read_at(offset + filled as u64, &mut buffer[filled..]) {
                    Ok(0) => break,
                    Ok(count) => filled += count,
                    Err(error) => {
                        self.tree.health().failed();
                        return reply.error(self.tree_errno(inode, &tree::Error::from(error)));
                    }
                }
            }
            reply.ok(&buffer[..filled]);
        });
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Lends a buffer of the thread, of `len` bytes.
fn with_buffer<T>(len: usize, act: impl FnOnce(&mut [u8]) -> T) -> T {
    BUFFER.with_borrow_mut(|buffer| {
        if buffer.len() < len {
            buffer.resize(len, 0);
        }
        act(&mut buffer[..len])
    })
}

/// Returns the bytes that a read from a whole file gives.
fn part(bytes: &[u8], offset: u64, len: u32) -> &[u8] {
    let start = usize::try_from(offset).unwrap_or(usize::MAX).min(bytes.len());
    let end = start.saturating_add(usize::try_from(len).unwrap_or(usize::MAX)).min(bytes.len());
    &bytes[start..end]
}

/// What the dispatcher asks. Whatever may wait for the storage says so; the rest is answered from memory.
impl TreeFilesystem {
    pub(super) fn health(&self) -> &Health {
        self.tree.health()
    }

    pub(super) fn is_remote(&self) -> bool {
        self.tree.is_remote()
    }

    /// Returns what a place is called in messages.
    pub(super) fn place(&self, inode: u64) -> String {
        self.tree.place(inode)
    }

    /// Returns the place that answers, or does not, together with this one.
    pub(super) fn group(&self, inode: u64) -> u64 {
        self.tree.group(inode)
    }

    /// Returns what the repository is called in messages.
    pub(super) fn repository(&self) -> String {
        self.tree.repository()
    }

    /// Lists the root of the repository: whether it answers. May wait.
    pub(super) fn probe(&self) -> tree::Result<()> {
        self.tree.probe()
    }

    /// Whether the bytes of a file are known without asking the storage.
    pub(super) fn is_at_hand(&self, inode: u64) -> bool {
        self.tree.is_at_hand(inode)
    }

    /// Whether what stands at a name is known without asking the storage.
    pub(super) fn is_name_at_hand(&self, parent: u64, name: &OsStr) -> bool {
        self.tree.is_name_at_hand(parent, name)
    }

    /// Whether a directory can be listed without asking the storage.
    pub(super) fn is_list_at_hand(&self, inode: u64) -> bool {
        self.tree.is_list_at_hand(inode)
    }

    /// Whether the attributes of a place are known without asking the storage.
    pub(super) fn has_attributes_at_hand(&self, inode: u64) -> bool {
        self.tree.has_attributes_at_hand(inode)
    }

    /// Whether the target of a link is known without asking the storage.
    pub(super) fn is_target_at_hand(&self, inode: u64) -> bool {
        self.tree.is_target_at_hand(inode)
    }

    /// Whether an extended attribute is known without asking the storage.
    pub(super) fn is_xattr_at_hand(&self, inode: u64, name: &OsStr) -> bool {
        self.tree.is_xattr_at_hand(inode, name)
    }

    /// Returns an open file or directory.
    pub(super) fn file(&self, handle: u64) -> Option<Arc<Open>> {
        self.open.get(handle)
    }

    /// Looks a name up. May wait, unless it [is at hand](Self::is_name_at_hand).
    pub(super) fn lookup(&self, parent: u64, name: &OsStr, reply: Reply<Timed>) {
        match self.tree.lookup(parent, name) {
            Ok(attributes) => reply.ok(&self.appearance.timed(&attributes)),
            Err(error) => reply.error(self.tree_errno(parent, &error)),
        }
    }

    /// Returns attributes. May wait, unless they [are at hand](Self::has_attributes_at_hand).
    pub(super) fn getattr(&self, inode: u64, reply: Reply<Timed>) {
        match self.tree.attributes(inode) {
            Ok(attributes) => reply.ok(&self.appearance.timed(&attributes)),
            Err(error) => reply.error(self.tree_errno(inode, &error)),
        }
    }

    /// Returns the target of a link. May wait, unless it [is at hand](Self::is_target_at_hand).
    pub(super) fn readlink(&self, inode: u64, reply: Reply<[u8]>) {
        match self.tree.target(inode) {
            Ok(target) => reply.ok(target.as_bytes()),
            Err(error) => reply.error(self.tree_errno(inode, &error)),
        }
    }

    /// Opens a file. May wait, unless it [is at hand](Self::is_at_hand).
    pub(super) fn open(&self, ctx: Ctx, inode: u64, access: Access, mut reply: Reply<Opened>) {
        if access.is_writable {
            return reply.error(Errno::READ_ONLY);
        }
        match self.tree.open(inode) {
            Ok(content) => {
                // The kernel, once told that it failed, would never release it, nor drop the pages it has of another disk.
                if !reply.claim() {
                    return;
                }
                let is_large = |disk: &Arc<dyn disk::Disk>| disk.size() >= LARGE_FILE;
                let watched = match &content {
                    Content::Disk(disk) => Some(self.habits.open(ctx.pid, inode, disk, access)),
                    Content::File(disk) if is_large(disk) => Some(self.habits.open(ctx.pid, inode, disk, access)),
                    _ => None,
                };
                let caching = match (&content, &watched) {
                    // What was read of it stays right for as long as it has its number.
                    (Content::File(_), Some(watched)) if watched.caching() == Caching::Pages => Caching::KeptPages,
                    (_, Some(watched)) => watched.caching(),
                    (Content::Live(_), None) => Caching::Direct,
                    (Content::File(_), None) => Caching::KeptPages,
                    _ => Caching::Pages,
                };
                let open = Open::File { inode, content, readahead: Readahead::default(), watched };
                reply.ok(&Opened { handle: self.open.insert(open), caching });
            }
            Err(error) => reply.error(self.tree_errno(inode, &error)),
        }
    }

    /// Notes that a file is about to be read, so that what comes next is brought into memory.
    pub(super) fn note_read(&self, ctx: Ctx, file: &Open, offset: u64, len: u32) {
        if let Open::File { content: Content::Disk(disk) | Content::File(disk), readahead, watched, .. } = file {
            if let Some(watched) = watched {
                self.habits.read(watched, ctx.pid, len);
            }
            readahead.note(disk.as_ref(), offset, usize::try_from(len).expect("usize holds 32 bits"));
        }
    }

    /// Answers a read if that needs no storage; else gives the reply back.
    pub(super) fn read_at_hand(&self, file: &Open, offset: u64, len: u32, reply: Reply<[u8]>) -> Option<Reply<[u8]>> {
        match file {
            Open::File { content: Content::Bytes(bytes) | Content::Live(bytes), .. } => {
                reply.ok(part(bytes, offset, len));
                None
            }
            Open::File { content: Content::Disk(disk) | Content::File(disk), .. } => {
                let left = usize::try_from(disk.size().saturating_sub(offset)).unwrap_or(usize::MAX);
                let len = left.min(usize::try_from(len).expect("usize holds 32 bits"));
                with_buffer(len, |buffer| {
                    if buffer.is_empty() || disk.read_in_memory(offset, buffer) {
                        reply.ok(buffer);
                        return None;
                    }
                    Some(reply)
                })
            }
            Open::File { content: Content::Object(_), .. } => Some(reply),
            Open::Directory { .. } => {
                reply.error(Errno::IS_DIRECTORY);
                None
            }
        }
    }

    /// Reads. May wait.
    pub(super) fn read(&self, file: &Open, offset: u64, len: u32, reply: Reply<[u8]>) {
        match file {
            Open::File { inode, content, .. } => match content {
                Content::Disk(disk) | Content::File(disk) => self.read_disk(*inode, disk.as_ref(), offset, len, reply),
                Content::Object(object) => self.read_object(*inode, object.as_ref(), offset, len, reply),
                Content::Bytes(bytes) | Content::Live(bytes) => reply.ok(part(bytes, offset, len)),
            },
            Open::Directory { .. } => reply.error(Errno::IS_DIRECTORY),
        }
    }

    /// Looks for data or a hole. May wait.
    pub(super) fn lseek(&self, file: &Open, offset: u64, seek: Seek, reply: Reply<u64>) {
        let Open::File { inode, content, .. } = file else { return reply.error(Errno::BAD_HANDLE) };
        // What is no disk is one run of data.
        let whole = |size: u64| match seek {
            _ if offset >= size => None,
            Seek::Data => Some(offset),
            Seek::Hole => Some(size),
        };
        let found = match content {
            Content::Disk(disk) | Content::File(disk) => {
                let found = disk::seek_for(disk.as_ref(), offset, matches!(seek, Seek::Hole), SEEK_PATIENCE);
                found.map_err(|error| self.read_errno(*inode, &error))
            }
            Content::Object(object) => object
                .stat()
                .map(|stat| whole(stat.size))
                .map_err(|error| self.tree_errno(*inode, &tree::Error::from(error))),
            Content::Bytes(bytes) | Content::Live(bytes) => Ok(whole(bytes.len() as u64)),
        };
        match found {
            Ok(Some(offset)) => reply.ok(&offset),
            Ok(None) => reply.error(Errno::NO_SUCH_OFFSET),
            Err(errno) => reply.error(errno),
        }
    }

    /// Forgets an open file or directory, and returns it. To drop it may wait, if it is [stored](Open::is_stored).
    pub(super) fn release(&self, handle: u64) -> Option<Arc<Open>> {
        self.open.remove(handle)
    }

    /// Opens a directory, which is read when it is listed.
    pub(super) fn opendir(&self, inode: u64, reply: Reply<Opened>) {
        let listed = Mutex::default();
        let handle = self.open.insert(Open::Directory { inode, listed });
        reply.ok(&Opened { handle, caching: Caching::Pages });
    }

    /// Lists a directory from `offset` on. May wait at the start, unless it [is at hand](Self::is_list_at_hand).
    pub(super) fn readdir(self: &Arc<Self>, directory: &Open, offset: u64, reply: Reply<dyn Entries>) {
        let Open::Directory { inode, listed } = directory else { return reply.error(Errno::BAD_HANDLE) };
        let last = lock(listed).clone();
        let found = match last.filter(|_| offset > 0) {
            Some(listed) => listed,
            // Listed without the lock held; the start is also where `rewinddir(3)` comes back to see what is new.
            None => match self.list(*inode) {
                Ok(found) => lock(listed).insert(Arc::new(found)).clone(),
                Err(error) => return reply.error(self.tree_errno(*inode, &error)),
            },
        };
        let from = usize::try_from(offset).unwrap_or(usize::MAX);
        reply.ok(&Rest { files: self.clone(), listed: found, from });
    }

    fn list(&self, inode: u64) -> tree::Result<Listed> {
        let directory = self.tree.list(inode)?;
        Ok(Listed { own: [(inode, "."), (self.tree.parent(inode)?, "..")], directory })
    }

    /// Returns an extended attribute. May wait, unless it [is at hand](Self::is_xattr_at_hand).
    pub(super) fn getxattr(&self, inode: u64, name: &OsStr, reply: Reply<[u8]>) {
        match self.tree.xattr(inode, name) {
            Ok(Some(value)) => reply.ok(&value),
            Ok(None) => reply.error(Errno::NO_ATTRIBUTE),
            Err(error) => reply.error(self.tree_errno(inode, &error)),
        }
    }

    /// Returns the names of the extended attributes. May wait.
    pub(super) fn listxattr(&self, inode: u64, reply: Reply<[u8]>) {
        match self.tree.xattr_names(inode) {
            Ok(names) => {
                let names: Vec<u8> =
                    names.iter().flat_map(|name| [name.as_bytes(), b"\0"]).flatten().copied().collect();
                reply.ok(&names);
            }
            Err(error) => reply.error(self.tree_errno(inode, &error)),
        }
    }

    pub(super) fn statfs(&self, reply: Reply<Statfs>) {
        reply.ok(&Statfs { files: self.tree.seen(), block_size: FILE_BLOCK, name_length: NAME_LENGTH });
    }
}
