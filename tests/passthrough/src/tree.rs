//! The source, by the numbers the kernel knows its files by.
//!
//! A file has the inode number it has in the source, the root has 1; so a file that was replaced is another one, and the
//! source must be one filesystem. Paths are relative to the source; that of the root is empty.

use std::collections::HashMap;
use std::ffi::OsString;
use std::fs::{self, File, Metadata};
use std::io;
use std::os::unix::fs::{DirEntryExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use fuser::{FileAttr, FileHandle, FileType, INodeNo};
use nix::errno::Errno;

/// A directory as it was listed when its reader began.
pub(crate) type Listing = Arc<Vec<(u64, FileType, OsString)>>;

pub(crate) struct Tree {
    source: PathBuf,
    root: u64,
    /// Where each file was seen last. Never shrinks.
    paths: Mutex<HashMap<u64, PathBuf>>,
    next_handle: AtomicU64,
    files: Mutex<HashMap<u64, (u64, Arc<File>)>>,
    listings: Mutex<HashMap<u64, Listing>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().expect("nothing panics under it")
}

impl Tree {
    pub(crate) fn new(source: &Path) -> io::Result<Self> {
        let source = source.canonicalize()?;
        Ok(Self {
            root: source.metadata()?.ino(),
            source,
            paths: Mutex::new(HashMap::from([(INodeNo::ROOT.0, PathBuf::new())])),
            next_handle: AtomicU64::new(1),
            files: Mutex::default(),
            listings: Mutex::default(),
        })
    }

    /// Where a path lies in the source.
    pub(crate) fn at(&self, path: &Path) -> PathBuf {
        self.source.join(path)
    }

    pub(crate) fn path(&self, inode: INodeNo) -> PathBuf {
        lock(&self.paths).get(&inode.0).expect("the kernel asks for what it was told of").clone()
    }

    fn attributes(&self, metadata: &Metadata) -> FileAttr {
        let narrow = |number: u64| u32::try_from(number).unwrap_or(u32::MAX);
        let time = |seconds: i64, nanoseconds: i64| {
            let seconds = Duration::from_secs(seconds.try_into().unwrap_or_default());
            UNIX_EPOCH + seconds + Duration::from_nanos(nanoseconds.try_into().unwrap_or_default())
        };
        FileAttr {
            ino: INodeNo(if metadata.ino() == self.root { INodeNo::ROOT.0 } else { metadata.ino() }),
            size: metadata.size(),
            blocks: metadata.blocks(),
            atime: time(metadata.atime(), metadata.atime_nsec()),
            mtime: time(metadata.mtime(), metadata.mtime_nsec()),
            ctime: time(metadata.ctime(), metadata.ctime_nsec()),
            crtime: SystemTime::UNIX_EPOCH,
            kind: FileType::from_std(metadata.file_type()).unwrap_or(FileType::RegularFile),
            perm: u16::try_from(metadata.mode() & 0o7777).expect("twelve bits"),
            nlink: narrow(metadata.nlink()),
            uid: metadata.uid(),
            gid: metadata.gid(),
            rdev: narrow(metadata.rdev()),
            blksize: narrow(metadata.blksize()),
            flags: 0,
        }
    }

    /// Looks a path up and remembers what is there.
    pub(crate) fn entry(&self, path: &Path) -> io::Result<FileAttr> {
        let attributes = self.attributes(&fs::symlink_metadata(self.at(path))?);
        lock(&self.paths).insert(attributes.ino.0, path.to_owned());
        Ok(attributes)
    }

    /// The attributes of a file, which may have lost its name while somebody has it open.
    ///
    /// # Errors
    /// ESTALE if its name is another file's now, as NFS says it.
    pub(crate) fn attributes_of(&self, inode: INodeNo, path: &Path) -> io::Result<FileAttr> {
        let named = fs::symlink_metadata(self.at(path)).map(|metadata| self.attributes(&metadata));
        if named.as_ref().is_ok_and(|attributes| attributes.ino == inode) {
            return named;
        }
        let open = lock(&self.files).values().find(|(of, _)| *of == inode.0).map(|(_, file)| Arc::clone(file));
        match open {
            Some(file) => Ok(self.attributes(&file.metadata()?)),
            None => named.and(Err(Errno::ESTALE.into())),
        }
    }

    /// Takes note that `old`, and all that lies in it, is at `new` now.
    pub(crate) fn moved(&self, old: &Path, new: &Path) {
        for path in lock(&self.paths).values_mut() {
            let below = path.strip_prefix(old).map(Path::to_owned);
            match below {
                Ok(below) if below.as_os_str().is_empty() => new.clone_into(path),
                Ok(below) => *path = new.join(below),
                Err(_) => {}
            }
        }
    }

    pub(crate) fn keep(&self, inode: INodeNo, file: File) -> FileHandle {
        let handle = self.next_handle.fetch_add(1, Ordering::Relaxed);
        lock(&self.files).insert(handle, (inode.0, Arc::new(file)));
        FileHandle(handle)
    }

    pub(crate) fn file(&self, handle: FileHandle) -> io::Result<Arc<File>> {
        lock(&self.files).get(&handle.0).map(|(_, file)| Arc::clone(file)).ok_or_else(|| Errno::EBADF.into())
    }

    /// A new handle of a directory: its listing is made when it is read from the start.
    pub(crate) fn keep_directory(&self) -> FileHandle {
        FileHandle(self.next_handle.fetch_add(1, Ordering::Relaxed))
    }

    pub(crate) fn listing(&self, handle: FileHandle, path: &Path, is_start: bool) -> io::Result<Listing> {
        let known = lock(&self.listings).get(&handle.0).map(Arc::clone);
        if let (Some(listing), false) = (known, is_start) {
            return Ok(listing);
        }
        let mut entries: Vec<_> = [".", ".."].map(|name| (INodeNo::ROOT.0, FileType::Directory, name.into())).into();
        for entry in fs::read_dir(self.at(path))? {
            let entry = entry?;
            let kind = FileType::from_std(entry.file_type()?).unwrap_or(FileType::RegularFile);
            entries.push((entry.ino(), kind, entry.file_name()));
        }
        let listing = Arc::new(entries);
        lock(&self.listings).insert(handle.0, Arc::clone(&listing));
        Ok(listing)
    }

    /// Closes a file or a directory.
    pub(crate) fn forget(&self, handle: FileHandle) {
        let file = lock(&self.files).remove(&handle.0);
        let listing = lock(&self.listings).remove(&handle.0);
        drop((file, listing));
    }
}
