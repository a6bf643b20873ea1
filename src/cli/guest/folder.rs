//! A folder that files are restored into, held open: nothing that others put there leads out of it.
//!
//! Each name is made in a folder that is open, and no link is followed. A file is made under a temporary name, with all that
//! belongs to it, and gets its own last: it is whole, or not there. What can only be made by its name (folders, links, pipes,
//! devices) is opened after that, and is nothing of value that others put in its place meanwhile: it is as it was made, empty or
//! without another name.

use std::ffi::{OsStr, OsString};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, bail};
use rustix::fs::{AtFlags, Dev, FileType, Gid, Mode, OFlags, RenameFlags, Timespec, Timestamps, Uid, XattrFlags};
use rustix::io::Errno;

use crate::cli::unfinished::{self, Remove};

/// The file under a temporary name that must not stay behind, by its folder and name.
pub type Unfinished = unfinished::Unfinished<(OwnedFd, OsString)>;

impl Remove for (OwnedFd, OsString) {
    fn remove(&self) {
        let _ = rustix::fs::unlinkat(&self.0, &self.1, AtFlags::empty());
    }
}

/// Most temporary names that are tried.
const TEMPORARIES: u32 = 1000;

/// What a name that is not a folder is made of.
pub enum New<'a> {
    /// An empty file with these permissions, less the umask.
    File(u16),
    Symlink(&'a OsStr),
    /// A pipe, socket or device, with these permissions, less the umask.
    Node(FileType, Dev, u16),
    /// Another name of what has one in a folder already, if it is the one that the system knows by device and inode.
    Link(&'a Folder, &'a OsStr, (u64, u64)),
}

impl New<'_> {
    /// Checks that what was opened under the name of what was just made is that: others may have exchanged it, and what it is
    /// given (an owner, permissions) is not for theirs.
    fn check(&self, made: &OwnedFd) -> Result<()> {
        let stat = rustix::fs::fstat(made)?;
        // Not by its owner: file servers make files others' (`root_squash`), and what is new, as this, can harm nobody.
        let is_new = stat.st_nlink == 1;
        let kind = FileType::from_raw_mode(stat.st_mode);
        let is_it = match self {
            // Made and opened at once.
            Self::File(_) => true,
            Self::Symlink(target) => {
                let found = || rustix::fs::readlinkat(made, "", Vec::new());
                kind == FileType::Symlink && is_new && found()?.to_bytes() == target.as_bytes()
            }
            Self::Node(expected, device, _) => kind == *expected && is_new && stat.st_rdev == *device,
            Self::Link(_, _, identity) => (stat.st_dev, stat.st_ino) == *identity,
        };
        if is_it { Ok(()) } else { bail!(EXCHANGED) }
    }
}

/// Something that was made and is to be completed, by which it is meant whatever becomes of its name.
#[derive(Clone, Copy)]
pub struct Handle<'a>(BorrowedFd<'a>);

impl Handle<'_> {
    /// Writes bytes of a file.
    ///
    /// # Errors
    /// What the system says.
    pub fn write(self, mut offset: u64, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            let written = rustix::io::retry_on_intr(|| rustix::io::pwrite(self.0, bytes, offset))?;
            if written == 0 {
                return Err(io::ErrorKind::WriteZero.into());
            }
            offset += written as u64;
            bytes = &bytes[written..];
        }
        Ok(())
    }

    /// Makes a file so long; what was not written is a hole.
    ///
    /// # Errors
    /// What the system says.
    pub fn set_size(self, size: u64) -> io::Result<()> {
        Ok(rustix::fs::ftruncate(self.0, size)?)
    }

    /// Sets its owner.
    ///
    /// # Errors
    /// What the system says.
    pub fn set_owner(self, uid: u32, gid: u32) -> io::Result<()> {
        if uid == u32::MAX || gid == u32::MAX {
            // To the system it means that the owner stays.
            return Err(io::Error::other("no file can belong to the number 4294967295"));
        }
        let (uid, gid) = (Uid::from_raw(uid), Gid::from_raw(gid));
        Ok(rustix::fs::chownat(self.0, "", Some(uid), Some(gid), AtFlags::EMPTY_PATH)?)
    }

    /// Sets its permissions: the twelve bits. A link has none.
    ///
    /// # Errors
    /// What the system says.
    pub fn set_mode(self, mode: u16) -> io::Result<()> {
        Ok(rustix::fs::chmod(self.path(), Mode::from_raw_mode(mode.into()))?)
    }

    /// Takes away the access control lists that it got from the folder it was made in.
    ///
    /// # Errors
    /// What the system says; that there are none is none.
    pub fn remove_acls(self) -> io::Result<()> {
        for name in ["system.posix_acl_access", "system.posix_acl_default"] {
            match rustix::fs::removexattr(self.path(), name) {
                Ok(()) | Err(Errno::NODATA | Errno::OPNOTSUPP | Errno::INVAL | Errno::ACCESS) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    /// Sets an extended attribute.
    ///
    /// # Errors
    /// What the system says.
    pub fn set_xattr(self, name: &OsStr, value: &[u8]) -> io::Result<()> {
        Ok(rustix::fs::setxattr(self.path(), name, value, XattrFlags::empty())?)
    }

    /// Sets when it was last read, and when it last changed.
    ///
    /// # Errors
    /// What the system says.
    pub fn set_times(self, accessed: SystemTime, modified: SystemTime) -> io::Result<()> {
        let times = Timestamps { last_access: timespec(accessed), last_modification: timespec(modified) };
        Ok(rustix::fs::utimensat(self.0, "", &times, AtFlags::EMPTY_PATH)?)
    }

    /// Where the system shows what is open, also if it can be neither read nor written. Source: open(2), "O_PATH".
    fn path(self) -> String {
        format!("/proc/self/fd/{}", self.0.as_raw_fd())
    }
}

fn timespec(time: SystemTime) -> Timespec {
    let (seconds, nanoseconds) = match time.duration_since(UNIX_EPOCH) {
        Ok(after) => (i64::try_from(after.as_secs()), after.subsec_nanos()),
        Err(before) => {
            let before = before.duration();
            let part = before.subsec_nanos();
            let seconds = i64::try_from(before.as_secs()).map(|seconds| -seconds - i64::from(part > 0));
            (seconds, if part > 0 { 1_000_000_000 - part } else { 0 })
        }
    };
    Timespec { tv_sec: seconds.unwrap_or(i64::MAX), tv_nsec: nanoseconds.into() }
}

/// An open folder.
pub struct Folder(OwnedFd);

impl Folder {
    /// Opens a folder that a person named, through whatever links.
    ///
    /// # Errors
    /// What the system says.
    pub fn open(path: &Path) -> io::Result<Self> {
        Ok(Self(rustix::fs::open(path, OFlags::DIRECTORY | OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?))
    }

    /// Opens a folder in this one; a link to one is none.
    ///
    /// # Errors
    /// What the system says.
    pub fn enter(&self, name: &OsStr) -> io::Result<Self> {
        let flags = OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::RDONLY | OFlags::CLOEXEC;
        Ok(Self(rustix::fs::openat(&self.0, name, flags, Mode::empty())?))
    }

    /// Makes a folder in this one, or takes the one that is there.
    ///
    /// # Errors
    /// What the system says; that something else has the name.
    pub fn make(&self, name: &OsStr, mode: u16) -> Result<Self> {
        match rustix::fs::mkdirat(&self.0, name, Mode::from_raw_mode(mode.into())) {
            Ok(()) => {
                let made = self.enter(name)?;
                made.check_new().context("look at the folder that was made")?;
                Ok(made)
            }
            Err(Errno::EXIST) => match self.enter(name) {
                Err(error) if matches!(Errno::from_io_error(&error), Some(Errno::NOTDIR | Errno::LOOP)) => {
                    bail!("something that is no folder has that name already; it is left alone")
                }
                entered => Ok(entered?),
            },
            Err(error) => Err(error.into()),
        }
    }

    /// Checks that nobody put another in the place of a folder that was just made: one with something in it is another.
    fn check_new(&self) -> Result<()> {
        for entry in rustix::fs::Dir::read_from(&self.0)? {
            if !matches!(entry?.file_name().to_bytes(), b"." | b"..") {
                bail!(EXCHANGED);
            }
        }
        Ok(())
    }

    /// Makes something, has it completed by `complete`, and gives it its name. What has the name already is replaced only with
    /// `force`, and never if it is a folder. Returns how the system knows it: device and inode.
    ///
    /// # Errors
    /// Those of `complete`, or of the system; then nothing was made.
    pub fn put(
        &self,
        name: &OsStr,
        new: &New<'_>,
        force: bool,
        unfinished: &Unfinished,
        complete: impl FnOnce(Handle<'_>) -> Result<()>,
    ) -> Result<(u64, u64)> {
        // Sooner than after all of it was read.
        if !force && rustix::fs::statat(&self.0, name, AtFlags::SYMLINK_NOFOLLOW).is_ok() {
            bail!(EXISTS);
        }
        let (file, temporary) = self.begin(new, unfinished)?;
        let done = complete(Handle(file.as_fd())).and_then(|()| {
            // Some systems say only now that there is no room.
            if matches!(new, New::File(_)) {
                rustix::fs::fsync(&file).context("write it")?;
            }
            self.publish(&temporary, name, force)
        });
        // Gone, unless it failed; or another name of what has this name, too, which renaming leaves alone.
        let mut begun = unfinished.lock();
        let _ = rustix::fs::unlinkat(&self.0, &temporary, AtFlags::empty());
        *begun = None;
        done?;
        let stat = rustix::fs::fstat(&file)?;
        Ok((stat.st_dev, stat.st_ino))
    }

    /// Makes something under a temporary name, which it returns.
    fn begin(&self, new: &New<'_>, unfinished: &Unfinished) -> Result<(OwnedFd, OsString)> {
        // Before there is anything, so that no signal comes between.
        let mut begun = unfinished.lock();
        let folder = rustix::io::fcntl_dupfd_cloexec(&self.0, 0)?;
        // Those that exist are of processes that were killed, or live elsewhere.
        for number in 0..TEMPORARIES {
            let temporary = OsString::from(format!(".xofs-{}-{number}.part", std::process::id()));
            match self.begin_as(&temporary, new) {
                Err(Errno::EXIST) => {}
                Err(error) => return Err(error).with_context(|| format!("create '{}'", temporary.display())),
                Ok(file) => {
                    // What is there in its place is not ours to remove.
                    new.check(&file).with_context(|| format!("look at '{}'", temporary.display()))?;
                    *begun = Some((folder, temporary.clone()));
                    return Ok((file, temporary));
                }
            }
        }
        bail!("{TEMPORARIES} files '.xofs-*.part' are left of earlier copies: remove them")
    }

    fn begin_as(&self, temporary: &OsStr, new: &New<'_>) -> rustix::io::Result<OwnedFd> {
        match new {
            New::File(mode) => {
                let flags = OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::RDWR | OFlags::CLOEXEC;
                return rustix::fs::openat(&self.0, temporary, flags, Mode::from_raw_mode((*mode).into()));
            }
            New::Symlink(target) => rustix::fs::symlinkat(*target, &self.0, temporary)?,
            New::Node(kind, device, mode) => {
                rustix::fs::mknodat(&self.0, temporary, *kind, Mode::from_raw_mode((*mode).into()), *device)?;
            }
            New::Link(folder, other, _) => {
                rustix::fs::linkat(&folder.0, *other, &self.0, temporary, AtFlags::empty())?;
            }
        }
        self.hold(temporary).inspect_err(|_| {
            let _ = rustix::fs::unlinkat(&self.0, temporary, AtFlags::empty());
        })
    }

    /// Opens what a name stands for, without being able to read it.
    fn hold(&self, name: &OsStr) -> rustix::io::Result<OwnedFd> {
        rustix::fs::openat(&self.0, name, OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty())
    }

    fn publish(&self, temporary: &OsStr, name: &OsStr, force: bool) -> Result<()> {
        if force {
            return rustix::fs::renameat(&self.0, temporary, &self.0, name).context("replace what has its name");
        }
        match rustix::fs::renameat_with(&self.0, temporary, &self.0, name, RenameFlags::NOREPLACE) {
            // Where the filesystem cannot promise it (NFS), it was looked for before.
            Err(Errno::INVAL | Errno::NOSYS | Errno::NOTSUP) => {
                Ok(rustix::fs::renameat(&self.0, temporary, &self.0, name)?)
            }
            Err(Errno::EXIST) => bail!(EXISTS),
            renamed => Ok(renamed?),
        }
    }

    /// Returns how the system knows what has a name.
    pub fn identity(&self, name: &OsStr) -> Option<(u64, u64)> {
        let stat = rustix::fs::statat(&self.0, name, AtFlags::SYMLINK_NOFOLLOW).ok()?;
        Some((stat.st_dev, stat.st_ino))
    }

    /// Returns the folder itself, to be completed.
    pub fn handle(&self) -> Handle<'_> {
        Handle(self.0.as_fd())
    }

    /// Opens the folder at the end of a path below this one.
    ///
    /// # Errors
    /// What the system says.
    pub fn descend(&self, path: &[OsString]) -> io::Result<Self> {
        let start = self.enter(OsStr::new("."))?;
        path.iter().try_fold(start, |folder, name| folder.enter(name))
    }
}

const EXISTS: &str = "it exists already: remove it, give another place, or --force to replace files";

const EXCHANGED: &str = "somebody put something else in its place while it was made";

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::thread;
    use std::time::{Duration, Instant};

    use super::*;

    #[test]
    fn times_before_1970_are_exact() {
        for (time, seconds, nanoseconds) in [
            (UNIX_EPOCH, 0, 0),
            (UNIX_EPOCH + Duration::new(1, 5), 1, 5),
            (UNIX_EPOCH - Duration::new(1, 0), -1, 0),
            (UNIX_EPOCH - Duration::new(1, 5), -2, 999_999_995),
            (UNIX_EPOCH - Duration::new(0, 999_999_999), -1, 1),
        ] {
            let found = timespec(time);
            assert_eq!((found.tv_sec, found.tv_nsec), (seconds, nanoseconds), "{time:?}");
        }
    }

    #[test]
    fn what_could_not_be_completed_leaves_nothing_and_replaces_nothing() {
        let place = tempfile::tempdir().unwrap();
        let folder = Folder::open(place.path()).unwrap();
        let unfinished = Unfinished::default();
        let kept = place.path().join("kept");
        std::fs::write(&kept, "kept").unwrap();
        // Left by another that was killed.
        let other = place.path().join(format!(".xofs-{}-0.part", std::process::id()));
        std::fs::write(&other, "other").unwrap();
        let names = || std::fs::read_dir(place.path()).unwrap().count();
        let target = OsStr::new("nowhere");
        let put = |name: &str, new: &New<'_>, force, is_well: bool| {
            folder.put(name.as_ref(), new, force, &unfinished, |handle| {
                if let New::File(_) = new {
                    handle.write(1, b"new")?;
                }
                if is_well { Ok(()) } else { bail!("unreadable") }
            })
        };
        let itself = || New::Link(&folder, OsStr::new("kept"), folder.identity("kept".as_ref()).unwrap());
        for new in [New::File(0o600), New::Symlink(target), itself()] {
            for (name, force, is_well, expected) in [
                ("new", false, false, "unreadable"),
                ("kept", true, false, "unreadable"),
                ("kept", false, true, EXISTS),
            ] {
                let error = put(name, &new, force, is_well).unwrap_err();
                assert_eq!((error.to_string().as_str(), names()), (expected, 2));
                assert_eq!(std::fs::read(&kept).unwrap(), b"kept");
            }
        }
        // Another name of itself is left as it is, and nothing beside it.
        put("kept", &itself(), true, true).unwrap();
        let other_one = folder.identity(other.file_name().unwrap()).unwrap();
        let error = put("linked", &New::Link(&folder, OsStr::new("kept"), other_one), false, true).unwrap_err();
        assert_eq!(error.root_cause().to_string(), EXCHANGED);
        std::fs::remove_file(place.path().join(format!(".xofs-{}-1.part", std::process::id()))).unwrap();
        put("new", &New::File(0o600), false, true).unwrap();
        assert_eq!((names(), std::fs::read(place.path().join("new")).unwrap()), (3, b"\0new".to_vec()));
        let known = put("kept", &New::Symlink(target), true, true).unwrap();
        assert_eq!((names(), folder.identity("kept".as_ref())), (3, Some(known)));
        assert_eq!(std::fs::read_link(&kept).unwrap(), std::path::Path::new("nowhere"));
        assert_eq!(std::fs::read(&other).unwrap(), b"other");
        let error = folder.make("kept".as_ref(), 0o700).err().unwrap().to_string();
        assert!(error.contains("something that is no folder has that name"), "{error}");
    }

    /// Others who may write in the folder exchange whatever comes to be in it for something that they chose, as fast as they can.
    #[test]
    fn what_others_put_in_the_place_of_what_was_made_is_not_touched() {
        use std::os::unix::fs::MetadataExt;

        let place = tempfile::tempdir().unwrap();
        let (open, kept, link) = (place.path().join("open"), place.path().join("kept"), place.path().join("link"));
        std::fs::create_dir(&open).unwrap();
        std::fs::write(&kept, "kept").unwrap();
        let facts = || std::fs::metadata(&kept).map(|found| (found.mode(), found.mtime(), found.mtime_nsec())).unwrap();
        let before = facts();
        let temporary = open.join(format!(".xofs-{}-0.part", std::process::id()));
        let (is_over, exchanged) = (AtomicBool::new(false), AtomicBool::new(false));
        let folder = Folder::open(&open).unwrap();
        let mut refused = 0;
        thread::scope(|scope| {
            scope.spawn(|| {
                while !is_over.load(Ordering::Relaxed) {
                    let _ = std::fs::hard_link(&kept, &link);
                    if temporary.symlink_metadata().is_ok() && std::fs::rename(&link, &temporary).is_ok() {
                        exchanged.store(true, Ordering::Relaxed);
                    }
                }
            });
            let start = Instant::now();
            while start.elapsed() < Duration::from_secs(2) {
                let unfinished = Unfinished::default();
                let link =
                    folder.put("link".as_ref(), &New::Symlink("nowhere".as_ref()), true, &unfinished, |handle| {
                        Ok(handle.set_times(UNIX_EPOCH, UNIX_EPOCH)?)
                    });
                let pipe = New::Node(FileType::Fifo, 0, 0o600);
                let pipe = folder.put("pipe".as_ref(), &pipe, true, &unfinished, |handle| Ok(handle.set_mode(0o777)?));
                refused += usize::from(link.is_err()) + usize::from(pipe.is_err());
                let _ = std::fs::remove_file(&temporary);
            }
            is_over.store(true, Ordering::Relaxed);
        });
        assert!(exchanged.load(Ordering::Relaxed), "nothing was exchanged");
        assert_eq!(facts(), before, "{refused} were refused");
        assert_eq!(std::fs::read(&kept).unwrap(), b"kept");
    }

    #[test]
    fn a_folder_that_was_just_made_has_nothing_in_it() {
        let place = tempfile::tempdir().unwrap();
        let folder = Folder::open(place.path()).unwrap();
        folder.check_new().unwrap();
        folder.make("made".as_ref(), 0o700).unwrap();
        assert_eq!(folder.check_new().unwrap_err().to_string(), EXCHANGED);
    }
}
