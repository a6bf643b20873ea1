//! A folder of this machine, or one that NFS or SMB put there.
//!
//! Every name is resolved beneath the root by the kernel (`openat2` with `RESOLVE_BENEATH`), so neither `..` nor a
//! symbolic link leads out.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use rustix::fs::{AtFlags, CWD, Dir, FileType, Mode, OFlags, ResolveFlags, StatxFlags, openat, openat2, statx};

use crate::{Capabilities, Entry, Error, ErrorKind, Kind, Object, ObjectPath, Result, Stat, Storage};

/// A folder as a storage.
pub struct LocalStorage {
    root: OwnedFd,
    shown: PathBuf,
    is_remote: bool,
}

impl LocalStorage {
    /// Opens the folder `root`.
    ///
    /// # Errors
    /// What the operating system says; a path that is no folder is `NotADirectory`.
    pub fn open(root: &Path) -> io::Result<Self> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let fd = openat(CWD, root, flags, Mode::empty())?;
        let is_remote = rustix::fs::fstatfs(&fd).is_ok_and(|stat| is_remote(stat.f_type));
        Ok(Self { root: fd, shown: root.to_path_buf(), is_remote })
    }

    fn open_fd(&self, path: &ObjectPath, act: &'static str, flags: OFlags) -> Result<OwnedFd> {
        let name = if path.as_str().is_empty() { "." } else { path.as_str() };
        // The kernel answers EAGAIN when a rename elsewhere made it unsure whether the path stayed beneath the root.
        const ATTEMPTS: u32 = 16;
        for _ in 0..ATTEMPTS {
            let how = ResolveFlags::BENEATH | ResolveFlags::NO_MAGICLINKS;
            match openat2(&self.root, name, flags | OFlags::CLOEXEC, Mode::empty(), how) {
                Ok(fd) => return Ok(fd),
                Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => {}
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
        let stat = stat_of(&file).map_err(|error| Error::from_io(act, path, error))?;
        match stat.kind {
            Kind::File => Ok((file, stat)),
            Kind::Directory => Err(Error::new(ErrorKind::IsDirectory, act, path, "a file was expected, not a folder")),
            Kind::Other => Err(Error::new(ErrorKind::Io, act, path, "a regular file was expected")),
        }
    }
}

/// Whether a file system of this magic number (statfs(2)) is reached over a network.
#[expect(clippy::cast_sign_loss, clippy::cast_possible_truncation, reason = "magic numbers are 32 bits wide")]
fn is_remote(magic: rustix::fs::FsWord) -> bool {
    const NFS: u32 = 0x6969;
    const SMB2: u32 = 0xfe53_4d42;
    const CIFS: u32 = 0xff53_4d42;
    const FUSE: u32 = 0x6573_5546;
    const CEPH: u32 = 0x00c3_6400;
    matches!(magic as u32, NFS | SMB2 | CIFS | FUSE | CEPH)
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
}
