//! A folder of this machine, or one that NFS or SMB put there.
//!
//! Every name is resolved beneath the root by the kernel (`openat2` with `RESOLVE_BENEATH`), so neither `..` nor a
//! symbolic link leads out; what is changed is a name in a folder that was opened so.

use std::fs::File;
use std::io;
use std::num::NonZeroU64;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, SystemTime};

use rustix::fs::{
    Advice, AtFlags, CWD, Dir, FileType, Mode, OFlags, RenameFlags, ResolveFlags, Statx, StatxAttributes, StatxFlags,
    Timespec, Timestamps, UTIME_NOW, UTIME_OMIT, copy_file_range, fadvise, fstatvfs, futimens, mkdirat, openat,
    openat2, renameat, renameat_with, statat, statx, syncfs, unlinkat,
};
use rustix::io::Errno;

use crate::direct;
use crate::write::copy_in_pieces;
use crate::{
    Capabilities, Entry, Error, ErrorKind, Existing, Kind, Mark, Moves, Object, ObjectPath, Result, Room, Stat,
    Storage, Synced, WritableObject, WritableStorage,
};

/// Files that are synced at the same time where each has to be asked of a server.
const SYNCS_AT_ONCE: usize = 16;
/// From how many bytes on that were written at once the system is asked to begin with them.
const WRITE_BACK_BYTES: usize = 64 << 10;
/// What a new file may be used for, less what the process's mask takes away.
const FILE_MODE: u32 = 0o666;
/// The same of a folder: as Xen Orchestra makes them (`dirMode`), since what is in them tells passwords.
const DIRECTORY_MODE: u32 = 0o700;

/// Why an act is refused to everybody.
const IMMUTABLE: &str = "it is immutable (chattr +i) until that is lifted";

/// Neither waits for a pipe nor becomes a terminal's process, whatever a repository holds.
const TO_WRITE: OFlags = OFlags::WRONLY.union(OFlags::NONBLOCK).union(OFlags::NOCTTY);
const TO_READ_AND_WRITE: OFlags = OFlags::RDWR.union(OFlags::NONBLOCK).union(OFlags::NOCTTY);

/// A folder as a storage.
pub struct LocalStorage {
    root: OwnedFd,
    shown: PathBuf,
    is_remote: bool,
    /// Whether one call syncs the whole file system.
    syncs_at_once: bool,
}

impl LocalStorage {
    /// Opens the folder `root`.
    ///
    /// # Errors
    /// What the operating system says; a path that is no folder is `NotADirectory`.
    pub fn open(root: &Path) -> io::Result<Self> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let fd = openat(CWD, root, flags, Mode::empty())?;
        let place = rustix::fs::fstatfs(&fd).map_or(Place::Local, |stat| place(stat.f_type));
        let (is_remote, syncs_at_once) = (place != Place::Local, place != Place::OtherServer);
        Ok(Self { root: fd, shown: root.to_path_buf(), is_remote, syncs_at_once })
    }

    fn open_fd(&self, path: &ObjectPath, act: &'static str, flags: OFlags) -> Result<OwnedFd> {
        let name = if path.as_str().is_empty() { "." } else { path.as_str() };
        // The kernel answers EAGAIN when a rename elsewhere made it unsure whether the path stayed beneath the root.
        const ATTEMPTS: u32 = 16;
        let is_to_change = flags.intersects(OFlags::WRONLY | OFlags::RDWR);
        let mode = if flags.contains(OFlags::CREATE) { Mode::from_raw_mode(FILE_MODE) } else { Mode::empty() };
        for _ in 0..ATTEMPTS {
            let how = ResolveFlags::BENEATH | ResolveFlags::NO_MAGICLINKS;
            match openat2(&self.root, name, flags | OFlags::CLOEXEC, mode, how) {
                Ok(fd) => return Ok(fd),
                Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => {}
                Err(error) if is_to_change => return Err(self.refused(act, &[path], error)),
                Err(error) => return Err(Error::from_io(act, path, error.into())),
            }
        }
        Err(Error::from_io(act, path, rustix::io::Errno::AGAIN.into()))
    }

    /// Opens for reading, leaving the access time alone where the kernel lets us: to the owner and to root.
    fn open_to_read(&self, path: &ObjectPath, act: &'static str, flags: OFlags) -> Result<OwnedFd> {
        match self.open_fd(path, act, flags | OFlags::RDONLY | OFlags::NOATIME) {
            Err(error) if error.raw_os_error() == Some(rustix::io::Errno::PERM.raw_os_error()) => {
                self.open_fd(path, act, flags | OFlags::RDONLY)
            }
            other => other,
        }
    }

    /// Opens a file or a folder to be synced.
    fn open_to_sync(&self, path: &ObjectPath) -> Result<OwnedFd> {
        if !self.syncs_at_once {
            // SMB has its server sync only what is open to be written, and says of anything else that it did.
            match self.open_fd(path, "sync", TO_WRITE) {
                Err(error) if error.kind() == ErrorKind::NotFound => return Err(error),
                // A folder, or what may only be read, which nobody has just written.
                Err(_) => {}
                opened => return opened,
            }
        }
        self.open_to_read(path, "sync", OFlags::NONBLOCK | OFlags::NOCTTY)
    }

    /// Whether a name just listed is, or leads to, a directory.
    fn is_directory(&self, path: &ObjectPath) -> Result<bool> {
        match self.stat(path) {
            Ok(stat) => Ok(stat.kind == Kind::Directory),
            Err(error) => match error.kind() {
                // It is gone, leads nowhere, or leads where nobody follows; one such link hides nothing else.
                ErrorKind::NotFound | ErrorKind::NotDirectory | ErrorKind::Escape | ErrorKind::PermissionDenied => {
                    Ok(false)
                }
                _ => Err(error),
            },
        }
    }

    fn open_file(&self, path: &ObjectPath, act: &'static str) -> Result<(File, Stat)> {
        // Without O_NONBLOCK a FIFO planted in a repository would block the open for ever.
        let file = File::from(self.open_to_read(path, act, OFlags::NONBLOCK | OFlags::NOCTTY)?);
        let stat = stat_of_file(&file, path, act)?;
        Ok((file, stat))
    }

    /// Writes a whole file, and returns it still open.
    fn written(&self, path: &ObjectPath, bytes: &[u8], existing: Existing) -> Result<File> {
        let flags = match existing {
            Existing::Refuse => OFlags::CREATE | OFlags::EXCL,
            Existing::Replace => OFlags::CREATE | OFlags::TRUNC,
        };
        let file = File::from(self.open_fd(path, "write", flags | TO_WRITE)?);
        let is_direct = !self.is_remote && bytes.len() >= direct::WORTH;
        let direct = if is_direct { direct::write(&file, bytes) } else { Ok(0) };
        let written = direct.and_then(|done| {
            file.write_all_at(&bytes[done..], done as u64)?;
            write_back(&file, done as u64, bytes.len() - done);
            Ok(file)
        });
        written.map_err(|error| Error::from_io("write", path, error))
    }

    /// Makes the error of an act on the first of `paths`. Where one of them, or its folder, is immutable, it says so: the system
    /// says then that it is not permitted, even to root.
    fn refused(&self, act: &'static str, paths: &[&ObjectPath], errno: Errno) -> Error {
        let path = paths[0];
        if errno != Errno::PERM {
            return Error::from_io(act, path, errno.into());
        }
        let mut places = paths.iter().flat_map(|path| [(*path).clone(), path.parent()]);
        match places.find(|place| self.is_immutable(place).unwrap_or(false)) {
            Some(place) if place == *path => Error::new(ErrorKind::ReadOnly, act, path, IMMUTABLE),
            Some(place) => Error::new(ErrorKind::ReadOnly, act, path, format!("'{place}': {IMMUTABLE}")),
            None => Error::from_io(act, path, errno.into()),
        }
    }

    /// Opens the folder that holds `path`, to act on a name in it: no link leads out of it then.
    fn parent_fd(&self, path: &ObjectPath, act: &'static str) -> Result<OwnedFd> {
        self.open_fd(&path.parent(), act, OFlags::PATH | OFlags::DIRECTORY)
    }

    fn in_parent(
        &self,
        path: &ObjectPath,
        act: &'static str,
        change: impl FnOnce(&OwnedFd, &str) -> rustix::io::Result<()>,
    ) -> Result<()> {
        let parent = self.parent_fd(path, act)?;
        change(&parent, path.file_name()).map_err(|error| self.refused(act, &[path], error))
    }
}

/// Closes a file that was written: what only then goes to its server may fail only then (NFS, SMB, many over FUSE), and nobody
/// is told of it later.
fn close(file: File, path: &ObjectPath) -> Result<()> {
    nix::unistd::close(file).map_err(|error| Error::from_io("close", path, error.into()))
}

/// Returns what is known of an open file, which must be one.
fn stat_of_file(file: &File, path: &ObjectPath, act: &'static str) -> Result<Stat> {
    let stat = stat_of(file).map_err(|error| Error::from_io(act, path, error))?;
    match stat.kind {
        Kind::File => Ok(stat),
        Kind::Directory => Err(Error::is_directory(act, path)),
        Kind::Other => Err(Error::new(ErrorKind::Io, act, path, "a regular file was expected")),
    }
}

/// Where a file system keeps what it holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Place {
    /// On this machine.
    Local,
    /// On a server; syncfs(2) has it written there.
    Server,
    /// On a server, where syncfs(2) ends on this machine: it has SMB and FUSE write, but not their servers sync.
    OtherServer,
}

/// Returns where a file system of this magic number (statfs(2)) keeps what it holds.
#[expect(clippy::cast_sign_loss, clippy::cast_possible_truncation, reason = "magic numbers are 32 bits wide")]
fn place(magic: rustix::fs::FsWord) -> Place {
    const NFS: u32 = 0x6969;
    const SMB2: u32 = 0xfe53_4d42;
    const CIFS: u32 = 0xff53_4d42;
    const FUSE: u32 = 0x6573_5546;
    const CEPH: u32 = 0x00c3_6400;
    // Of a host to its guests.
    const NINE_P: u32 = 0x0102_1997;
    match magic as u32 {
        NFS | CEPH => Place::Server,
        SMB2 | CIFS | FUSE | NINE_P => Place::OtherServer,
        _ => Place::Local,
    }
}

/// Makes the kernel ask the server for the attributes of an open file.
///
/// Over a network `fstat(2)` answers what was known up to a minute ago (`acregmax` of nfs(5)), so that a file changed by
/// another machine would pass for unchanged.
fn ask_server(file: &File) -> io::Result<()> {
    let flags = AtFlags::EMPTY_PATH | AtFlags::STATX_FORCE_SYNC;
    match statx(file, "", flags, StatxFlags::BASIC_STATS) {
        // Linux before 4.11, or a filter of system calls that does not know it.
        Ok(_) | Err(rustix::io::Errno::NOSYS) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

fn stat_of(file: &File) -> io::Result<Stat> {
    let metadata = file.metadata()?;
    let kind = if metadata.is_file() {
        Kind::File
    } else if metadata.is_dir() {
        Kind::Directory
    } else {
        Kind::Other
    };
    let modified = metadata.modified()?;
    // Before 1970 only on a machine that has lost its clock.
    let changed =
        Duration::new(metadata.ctime().max(0).unsigned_abs(), u32::try_from(metadata.ctime_nsec()).unwrap_or(0));
    let changed = SystemTime::UNIX_EPOCH + changed;
    Ok(Stat { kind, size: metadata.len(), inode: metadata.ino(), links: metadata.nlink(), modified, changed })
}

impl Storage for LocalStorage {
    fn open(&self, path: &ObjectPath) -> Result<Arc<dyn Object>> {
        let (file, _) = self.open_file(path, "open")?;
        Ok(Arc::new(LocalObject { file, path: path.clone(), is_remote: self.is_remote }))
    }

    fn read(&self, path: &ObjectPath, limit: u64) -> Result<Vec<u8>> {
        let (file, stat) = self.open_file(path, "read")?;
        let too_large = || Error::too_large("read", path, limit);
        if stat.size > limit {
            return Err(too_large());
        }
        let limit = usize::try_from(limit).unwrap_or(usize::MAX);
        let mut bytes = Vec::with_capacity(usize::try_from(stat.size).map_err(|_| too_large())?);
        // One byte past the limit shows a file that grew since its size was asked.
        io::Read::read_to_end(&mut io::Read::take(&file, (limit as u64).saturating_add(1)), &mut bytes)
            .map_err(|error| Error::from_io("read", path, error))?;
        if bytes.len() > limit { Err(too_large()) } else { Ok(bytes) }
    }

    fn list(&self, path: &ObjectPath) -> Result<Vec<Entry>> {
        let fd = self.open_to_read(path, "list", OFlags::DIRECTORY)?;
        let failed = |error: rustix::io::Errno| Error::from_io("list", path, error.into());
        let mut entries = Vec::new();
        for entry in Dir::new(fd).map_err(failed)? {
            let entry = entry.map_err(failed)?;
            let Ok(name) = entry.file_name().to_str() else { continue };
            if name == "." || name == ".." {
                continue;
            }
            let is_directory = match entry.file_type() {
                FileType::Directory => true,
                FileType::Unknown | FileType::Symlink => self.is_directory(&path.join(name)?)?,
                _ => false,
            };
            entries.push(Entry { name: name.to_owned(), is_directory });
        }
        Ok(entries)
    }

    fn stat(&self, path: &ObjectPath) -> Result<Stat> {
        let fd = self.open_fd(path, "stat", OFlags::PATH)?;
        stat_of(&File::from(fd)).map_err(|error| Error::from_io("stat", path, error))
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities { ranged_reads: true, is_remote: self.is_remote }
    }

    fn describe(&self) -> String {
        self.shown.display().to_string()
    }
}

impl WritableStorage for LocalStorage {
    fn reader(self: Arc<Self>) -> Arc<dyn Storage> {
        self
    }

    fn write(&self, path: &ObjectPath, bytes: &[u8], existing: Existing) -> Result<()> {
        close(self.written(path, bytes, existing)?, path)
    }

    fn write_and_stat(&self, path: &ObjectPath, bytes: &[u8], existing: Existing) -> Result<Stat> {
        // Of the open file: over a network, its bytes are on the server then, which has given it its time.
        let file = self.written(path, bytes, existing)?;
        let stat = stat_of_file(&file, path, "stat")?;
        close(file, path)?;
        Ok(stat)
    }

    fn write_and_sync(&self, path: &ObjectPath, bytes: &[u8], existing: Existing) -> Result<()> {
        let file = self.written(path, bytes, existing)?;
        file.sync_all().map_err(|error| Error::from_io("sync", path, error))?;
        close(file, path)
    }

    fn create(&self, path: &ObjectPath) -> Result<Arc<dyn WritableObject>> {
        let file = File::from(self.open_fd(path, "create", OFlags::CREATE | OFlags::EXCL | TO_READ_AND_WRITE)?);
        Ok(Arc::new(LocalObject { file, path: path.clone(), is_remote: self.is_remote }))
    }

    fn open_to_write(&self, path: &ObjectPath) -> Result<Arc<dyn WritableObject>> {
        let file = File::from(self.open_fd(path, "open", OFlags::NONBLOCK | TO_READ_AND_WRITE)?);
        stat_of_file(&file, path, "open")?;
        Ok(Arc::new(LocalObject { file, path: path.clone(), is_remote: self.is_remote }))
    }

    fn create_directory(&self, path: &ObjectPath) -> Result<()> {
        if path.as_str().is_empty() {
            return Err(Error::new(ErrorKind::Exists, "create", path, "the root is there already"));
        }
        self.in_parent(path, "create", |parent, name| mkdirat(parent, name, Mode::from_raw_mode(DIRECTORY_MODE)))
    }

    fn rename(&self, from: &ObjectPath, to: &ObjectPath) -> Result<()> {
        if from == to {
            return self.stat(from).map(drop);
        }
        let parent = self.parent_fd(to, "rename")?;
        // Between names in one folder, which all but merges are.
        if from.parent() == to.parent() {
            return rename_at(&parent, from.file_name(), &parent, to.file_name())
                .map_err(|error| self.refused("rename", &[from, to], error));
        }
        let old_parent = self.parent_fd(from, "rename")?;
        rename_at(&old_parent, from.file_name(), &parent, to.file_name())
            .map_err(|error| self.refused("rename", &[from, to], error))
    }

    fn moves<'a>(&'a self, from: &ObjectPath, to: &ObjectPath) -> Result<Box<dyn Moves + 'a>> {
        let open = |folder| self.open_fd(folder, "rename", OFlags::PATH | OFlags::DIRECTORY);
        let (source, target) = (from.clone(), to.clone());
        Ok(Box::new(LocalMoves { storage: self, from: open(from)?, to: open(to)?, source, target }))
    }

    fn remove(&self, path: &ObjectPath) -> Result<()> {
        let removed = self.in_parent(path, "remove", |parent, name| unlinkat(parent, name, AtFlags::empty()));
        match removed {
            // What some servers say of a folder.
            Err(error) if error.raw_os_error() == Some(rustix::io::Errno::PERM.raw_os_error()) => {
                match self.stat(path) {
                    Ok(stat) if stat.kind == Kind::Directory => Err(Error::is_directory("remove", path)),
                    _ => Err(error),
                }
            }
            other => other,
        }
    }

    fn remove_directory(&self, path: &ObjectPath) -> Result<()> {
        self.in_parent(path, "remove", |parent, name| unlinkat(parent, name, AtFlags::REMOVEDIR))
    }

    fn touch(&self, path: &ObjectPath) -> Result<()> {
        let fd = self.open_to_read(path, "touch", OFlags::NONBLOCK | OFlags::NOCTTY)?;
        let now = Timespec { tv_sec: 0, tv_nsec: UTIME_NOW };
        let times = Timestamps { last_access: Timespec { tv_sec: 0, tv_nsec: UTIME_OMIT }, last_modification: now };
        futimens(&fd, &times).map_err(|error| self.refused("touch", &[path], error))
    }

    fn set_modified(&self, path: &ObjectPath, modified: SystemTime) -> Result<()> {
        let file = File::from(self.open_to_read(path, "touch", OFlags::NONBLOCK | OFlags::NOCTTY)?);
        file.set_modified(modified).map_err(|error| match Errno::from_io_error(&error) {
            Some(errno) => self.refused("touch", &[path], errno),
            None => Error::from_io("touch", path, error),
        })
    }

    fn sync(&self, path: &ObjectPath) -> Result<()> {
        let file = File::from(self.open_to_sync(path)?);
        let synced = match file.sync_all() {
            // Where a folder cannot be synced (some over FUSE and SMB), its server keeps the names.
            Err(error)
                if error.kind() == io::ErrorKind::InvalidInput && file.metadata().is_ok_and(|it| it.is_dir()) =>
            {
                Ok(())
            }
            other => other,
        };
        synced.map_err(|error| Error::from_io("sync", path, error))
    }

    fn sync_each(&self, paths: &[ObjectPath]) -> Result<()> {
        let next = AtomicUsize::new(0);
        let work = || {
            while let Some(path) = paths.get(next.fetch_add(1, Ordering::Relaxed)) {
                self.sync(path)?;
            }
            Ok(())
        };
        thread::scope(|scope| {
            // This thread works too, so that where the system refuses others nothing is left undone.
            let start = |_| thread::Builder::new().name("xofs-sync".to_owned()).spawn_scoped(scope, work).ok();
            let threads: Vec<_> = (1..paths.len().min(SYNCS_AT_ONCE)).map_while(start).collect();
            let joined = threads.into_iter().map(|thread| thread.join().expect("syncing does not panic"));
            joined.fold(work(), Result::and)
        })
    }

    fn mark(&self) -> Result<Mark> {
        if !self.syncs_at_once {
            return Ok(Mark::default());
        }
        // Opened anew: the system remembers what it has told for each file that was opened, not for each that leads to it.
        Ok(Mark(Some(self.open_fd(&ObjectPath::root(), "open", OFlags::RDONLY | OFlags::DIRECTORY)?)))
    }

    fn sync_trees(&self, paths: &[ObjectPath], what: Synced, since: &Mark) -> Result<()> {
        let Some(first) = paths.first() else { return Ok(()) };
        if self.syncs_at_once {
            // Also finds errors of what was written back since, by whom and from where ever.
            let marked = since.0.as_ref().unwrap_or(&self.root);
            return syncfs(marked).map_err(|error| Error::from_io("sync", first, error.into()));
        }
        let mut folders = paths.to_vec();
        while let Some(folder) = folders.pop() {
            let mut files = Vec::new();
            for entry in self.list(&folder)? {
                let path = folder.join(&entry.name)?;
                if entry.is_directory { folders.push(path) } else { files.push(path) }
            }
            if what == Synced::All {
                self.sync_each(&files)?;
            }
            self.sync(&folder)?;
        }
        Ok(())
    }

    fn is_immutable(&self, path: &ObjectPath) -> Result<bool> {
        const IMMUTABLE: StatxAttributes = StatxAttributes::IMMUTABLE.union(StatxAttributes::APPEND);
        let fd = self.open_fd(path, "stat", OFlags::PATH)?;
        match statx(fd, "", AtFlags::EMPTY_PATH, StatxFlags::empty()) {
            Ok(found) => Ok(found.stx_attributes.intersects(IMMUTABLE)),
            // Nobody says it, or may ask: some containers forbid the call.
            Err(Errno::NOSYS | Errno::PERM) => Ok(false),
            Err(error) => Err(Error::from_io("stat", path, error.into())),
        }
    }

    fn room(&self) -> Result<Room> {
        let root = ObjectPath::root();
        let stat = fstatvfs(&self.root).map_err(|error| Error::from_io("ask the room of", &root, error.into()))?;
        // A file system that makes inodes as it needs them says that it has none at all.
        let inodes = (stat.f_files > 0).then_some(stat.f_favail);
        // Nor does one without a limit, as a tmpfs of size 0, say that it has any blocks.
        let bytes = if stat.f_blocks > 0 { stat.f_bavail.saturating_mul(stat.f_frsize) } else { u64::MAX };
        Ok(Room { bytes, inodes })
    }
}

struct LocalObject {
    file: File,
    path: ObjectPath,
    is_remote: bool,
}

impl Object for LocalObject {
    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<usize> {
        // No file reaches further: what is asked beyond is past the end, where the system call would find an error.
        const END: u64 = u64::MAX >> 1;
        let wanted = usize::try_from(END.saturating_sub(offset)).unwrap_or(usize::MAX).min(buffer.len());
        let buffer = &mut buffer[..wanted];
        let mut done = 0;
        while done < buffer.len() {
            match self.file.read_at(&mut buffer[done..], offset + done as u64) {
                Ok(0) => break,
                Ok(n) => done += n,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(Error::from_io("read", &self.path, error)),
            }
        }
        Ok(done)
    }

    fn stat(&self) -> Result<Stat> {
        let asked = if self.is_remote { ask_server(&self.file) } else { Ok(()) };
        asked.and_then(|()| stat_of(&self.file)).map_err(|error| Error::from_io("stat", &self.path, error))
    }

    fn local_file(&self) -> Option<BorrowedFd<'_>> {
        Some(self.file.as_fd())
    }
}

/// Moves files between two open folders.
struct LocalMoves<'a> {
    storage: &'a LocalStorage,
    from: OwnedFd,
    to: OwnedFd,
    /// Of both folders, for messages.
    source: ObjectPath,
    target: ObjectPath,
}

impl Moves for LocalMoves<'_> {
    fn rename(&self, name: &str) -> Result<()> {
        // Also proves that it is a name alone.
        let path = self.source.join(name)?;
        renameat(&self.from, name, &self.to, name).map_err(|error| {
            let target = self.target.join(name).unwrap_or_else(|_| self.target.clone());
            self.storage.refused("rename", &[&path, &target], error)
        })
    }
}

/// Has the system begin to write to the disk what was just written, as it does soon anyway: else the disk is idle until all of it
/// is to be synced. Advice of this kind starts that, and lets go of what is written already, which nobody reads soon.
fn write_back(file: &File, offset: u64, len: usize) {
    if len >= WRITE_BACK_BYTES {
        // What is not begun now is begun at the sync, which also tells of errors.
        let _ = fadvise(file, offset, NonZeroU64::new(len as u64), Advice::DontNeed);
    }
}

/// Renames a file over another one, or a folder where nothing is: rename(2) would have an empty folder replaced.
fn rename_at(old_parent: &OwnedFd, name: &str, parent: &OwnedFd, new_name: &str) -> rustix::io::Result<()> {
    // What something is never changes, so that no server has to be asked again.
    let flags = AtFlags::SYMLINK_NOFOLLOW | AtFlags::STATX_DONT_SYNC;
    let is_folder = |found: Statx| FileType::from_raw_mode(found.stx_mode.into()) == FileType::Directory;
    if statx(old_parent, name, flags, StatxFlags::TYPE).is_ok_and(|found| !is_folder(found)) {
        return renameat(old_parent, name, parent, new_name);
    }
    match renameat_with(old_parent, name, parent, new_name, RenameFlags::NOREPLACE) {
        Err(Errno::EXIST) => {
            let old = statat(old_parent, name, AtFlags::SYMLINK_NOFOLLOW)?;
            if FileType::from_raw_mode(old.st_mode) == FileType::Directory {
                return Err(Errno::EXIST);
            }
            renameat(old_parent, name, parent, new_name)
        }
        // A file system that does not know how, as over NFS and SMB.
        Err(Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP) => renameat(old_parent, name, parent, new_name),
        other => other,
    }
}

/// Has the system copy bytes from one file to another; returns how many it did. What it cannot copy is left: where one file
/// system does not copy to the other, and behind the end of `source`.
fn copy_by_system(source: BorrowedFd<'_>, file: &File, mut from: u64, mut to: u64, len: u64) -> io::Result<u64> {
    let mut done = 0;
    while done < len {
        let left = usize::try_from(len - done).unwrap_or(usize::MAX);
        match copy_file_range(source, Some(&mut from), file, Some(&mut to), left) {
            // Also what a file system says that only seems to copy.
            Ok(0) | Err(Errno::XDEV | Errno::OPNOTSUPP | Errno::NOSYS | Errno::INVAL) => break,
            Ok(copied) => done += copied as u64,
            Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(done)
}

impl WritableObject for LocalObject {
    fn write_at(&self, offset: u64, bytes: &[u8]) -> Result<()> {
        self.file.write_all_at(bytes, offset).map_err(|error| Error::from_io("write", &self.path, error))?;
        write_back(&self.file, offset, bytes.len());
        Ok(())
    }

    fn copy_from(&self, source: &dyn Object, from: u64, to: u64, len: u64) -> Result<u64> {
        let done = match source.local_file() {
            Some(file) => copy_by_system(file, &self.file, from, to, len)
                .map_err(|error| Error::from_io("write", &self.path, error))?,
            None => 0,
        };
        Ok(done + copy_in_pieces(self, source, from + done, to + done, len - done)?)
    }

    fn set_len(&self, len: u64) -> Result<()> {
        self.file.set_len(len).map_err(|error| Error::from_io("write", &self.path, error))
    }

    fn sync(&self) -> Result<()> {
        self.file.sync_all().map_err(|error| Error::from_io("sync", &self.path, error))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_open_file_of_a_server_is_asked_for_as_it_is_now() {
        let folder = tempfile::tempdir().unwrap();
        let storage = LocalStorage { is_remote: true, ..LocalStorage::open(folder.path()).unwrap() };
        let path = ObjectPath::new("a").unwrap();
        std::fs::write(folder.path().join("a"), "12").unwrap();
        let object = storage.open(&path).unwrap();
        assert_eq!(object.stat().unwrap(), storage.stat(&path).unwrap());
        std::fs::write(folder.path().join("a"), "123").unwrap();
        assert_eq!(object.stat().unwrap(), storage.stat(&path).unwrap());
        std::fs::remove_file(folder.path().join("a")).unwrap();
        assert_eq!((object.stat().unwrap().size, object.stat().unwrap().links), (3, 0));
    }

    #[test]
    fn a_file_of_a_tree_that_cannot_be_synced_is_told_whichever_it_is() {
        let folder = tempfile::tempdir().unwrap();
        let storage = LocalStorage { syncs_at_once: false, ..LocalStorage::open(folder.path()).unwrap() };
        let path = ObjectPath::new("tree").unwrap();
        std::fs::create_dir_all(folder.path().join("tree/below")).unwrap();
        for number in 0..3 * SYNCS_AT_ONCE {
            std::fs::write(folder.path().join(format!("tree/below/{number:03}")), "").unwrap();
        }
        storage.sync_tree(&path, &storage.mark().unwrap()).unwrap();
        for name in ["a", "000a", "020a", "zzz"] {
            let link = folder.path().join("tree/below").join(name);
            std::os::unix::fs::symlink("nowhere", &link).unwrap();
            assert_eq!(
                storage.sync_tree(&path, &storage.mark().unwrap()).unwrap_err().kind(),
                ErrorKind::NotFound,
                "{name}"
            );
            // Of names alone no file is synced.
            storage.sync_trees(std::slice::from_ref(&path), Synced::Names, &Mark::default()).unwrap();
            std::fs::remove_file(link).unwrap();
        }
    }
}
