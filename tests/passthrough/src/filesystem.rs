//! The requests of the kernel: each gets a thread of the pool, waits there as the rules say, and is done on the source.
//!
//! Extended attributes and `ioctl` are not passed on; locks are the kernel's, local to the mount. Bytes are copied within the
//! source where the kernel asks for it, as servers of NFS 4.2 and SMB do.

use std::ffi::OsStr;
use std::fs::{self, File, Permissions};
use std::io;
use std::os::unix::fs::{FileExt, PermissionsExt, lchown, symlink};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use fuser::{
    BsdFileFlags, CopyFileRangeFlags, Errno, FileHandle, Filesystem, FopenFlags, Generation, INodeNo, InitFlags,
    KernelConfig, LockOwner, OpenAccMode, OpenFlags, RenameFlags, ReplyAttr, ReplyCreate, ReplyData, ReplyDirectory,
    ReplyEmpty, ReplyEntry, ReplyLseek, ReplyOpen, ReplyStatfs, ReplyWrite, Request, TimeOrNow, WriteFlags,
};
use nix::fcntl::{AT_FDCWD, FallocateFlags, OFlag, copy_file_range, fallocate, open, renameat2};
use nix::sys::stat::{Mode, SFlag, UtimensatFlags, mknod, utimensat};
use nix::sys::time::TimeSpec;
use nix::unistd::{Whence, lseek};

use crate::pool::Pool;
use crate::rules::Rules;
use crate::tree::Tree;

/// Longest read and write, in bytes.
const MAX_REQUEST: u32 = 1 << 20;
/// Most bytes that are copied at a time: the kernel asks again for the rest.
const MAX_COPY: u64 = 1 << 30;

pub(crate) struct Passthrough {
    pub(crate) tree: Arc<Tree>,
    pub(crate) rules: Arc<Rules>,
    pub(crate) pool: Arc<Pool>,
    /// How long the kernel may keep names and attributes.
    pub(crate) valid: Duration,
}

/// A reply that can say why there is none.
trait Refuse: Send + 'static {
    fn refuse(self, errno: Errno);
}

macro_rules! refuse {
    ($($reply:ty)*) => { $(impl Refuse for $reply { fn refuse(self, errno: Errno) { self.error(errno); } })* };
}
refuse!(ReplyAttr ReplyCreate ReplyData ReplyDirectory ReplyEmpty ReplyEntry);
refuse!(ReplyLseek ReplyOpen ReplyStatfs ReplyWrite);

impl Passthrough {
    /// Has `act` done and answered by a thread that may wait. The rules look at `paths`.
    fn serve<R: Refuse, T>(
        &self,
        operation: &'static str,
        request: &Request,
        paths: Vec<PathBuf>,
        reply: R,
        act: impl FnOnce(&Tree, &[PathBuf]) -> io::Result<T> + Send + 'static,
        answer: impl FnOnce(R, T) + Send + 'static,
    ) {
        let (tree, rules, pid) = (Arc::clone(&self.tree), Arc::clone(&self.rules), request.pid());
        self.pool.run(Box::new(move || {
            let done = rules.begin(operation, &paths, pid).map_err(io::Error::from);
            match done.and_then(|()| act(&tree, &paths)) {
                Ok(value) => answer(reply, value),
                Err(error) => reply.refuse(error.into()),
            }
        }));
    }

    /// As [`Passthrough::serve`], for what makes a new entry: it belongs to who asked.
    fn make(
        &self,
        operation: &'static str,
        request: &Request,
        path: PathBuf,
        reply: ReplyEntry,
        act: impl FnOnce(&Path) -> io::Result<()> + Send + 'static,
    ) {
        let (valid, owner) = (self.valid, (request.uid(), request.gid()));
        let act = move |tree: &Tree, paths: &[PathBuf]| {
            act(&tree.at(&paths[0]))?;
            adopt(&tree.at(&paths[0]), owner)?;
            tree.entry(&paths[0])
        };
        self.serve(operation, request, vec![path], reply, act, move |reply, attributes| {
            reply.entry(&valid, &attributes, Generation(0));
        });
    }

    fn child(&self, parent: INodeNo, name: &OsStr) -> PathBuf {
        self.tree.path(parent).join(name)
    }
}

fn adopt(path: &Path, (uid, gid): (u32, u32)) -> io::Result<()> {
    if uid == nix::unistd::geteuid().as_raw() { Ok(()) } else { lchown(path, Some(uid), Some(gid)) }
}

/// The permissions asked for, less those the caller masks.
fn mode(mode: u32, umask: u32) -> Mode {
    Mode::from_bits_truncate(mode & !umask)
}

/// Opens with those of the caller's flags that matter below; the kernel has resolved appending and links.
fn open_at(path: &Path, flags: i32, mode: Mode) -> io::Result<File> {
    let kept = OFlag::O_ACCMODE | OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_TRUNC | OFlag::O_SYNC;
    Ok(open(path, (OFlag::from_bits_truncate(flags) & kept) | OFlag::O_CLOEXEC, mode)?.into())
}

fn open_flags(flags: i32) -> FopenFlags {
    // A reader that was killed must not wait again when its file is closed. Never FOPEN_KEEP_CACHE.
    let is_reader = OpenFlags(flags).acc_mode() == OpenAccMode::O_RDONLY;
    if is_reader { FopenFlags::FOPEN_NOFLUSH } else { FopenFlags::empty() }
}

fn time_spec(time: Option<TimeOrNow>) -> io::Result<TimeSpec> {
    let time: SystemTime = match time {
        None => return Ok(TimeSpec::UTIME_OMIT),
        Some(TimeOrNow::Now) => return Ok(TimeSpec::UTIME_NOW),
        Some(TimeOrNow::SpecificTime(time)) => time,
    };
    Ok(TimeSpec::from_duration(time.duration_since(UNIX_EPOCH).map_err(|_| nix::errno::Errno::EINVAL)?))
}

fn signed(offset: u64) -> io::Result<i64> {
    i64::try_from(offset).map_err(|_| nix::errno::Errno::EINVAL.into())
}

impl Filesystem for Passthrough {
    fn init(&mut self, _request: &Request, config: &mut KernelConfig) -> io::Result<()> {
        let _ = config.set_max_write(MAX_REQUEST);
        // Readers' requests count as background ones: stalled ones must not keep others in the kernel's queue.
        let _ = config.set_max_background(1024);
        let _ = config.set_congestion_threshold(1024);
        // Without the first, a stalled lookup holds up its directory; the second drops pages of a file that changed.
        for capability in [InitFlags::FUSE_PARALLEL_DIROPS, InitFlags::FUSE_AUTO_INVAL_DATA] {
            let _ = config.add_capabilities(capability);
        }
        Ok(())
    }

    fn lookup(&self, request: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let (paths, valid) = (vec![self.child(parent, name)], self.valid);
        self.serve(
            "lookup",
            request,
            paths,
            reply,
            |tree, paths| tree.entry(&paths[0]),
            move |reply, attributes| {
                reply.entry(&valid, &attributes, Generation(0));
            },
        );
    }

    fn getattr(&self, request: &Request, inode: INodeNo, _handle: Option<FileHandle>, reply: ReplyAttr) {
        let (paths, valid) = (vec![self.tree.path(inode)], self.valid);
        let act = move |tree: &Tree, paths: &[PathBuf]| tree.attributes_of(inode, &paths[0]);
        self.serve("getattr", request, paths, reply, act, move |reply, attributes| reply.attr(&valid, &attributes));
    }

    fn setattr(
        &self,
        request: &Request,
        inode: INodeNo,
        mode: Option<u32>,
        uid: Option<u32>,
        gid: Option<u32>,
        size: Option<u64>,
        atime: Option<TimeOrNow>,
        mtime: Option<TimeOrNow>,
        _ctime: Option<SystemTime>,
        handle: Option<FileHandle>,
        _crtime: Option<SystemTime>,
        _chgtime: Option<SystemTime>,
        _bkuptime: Option<SystemTime>,
        _flags: Option<BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        let (paths, valid) = (vec![self.tree.path(inode)], self.valid);
        let act = move |tree: &Tree, paths: &[PathBuf]| {
            let path = tree.at(&paths[0]);
            if let Some(size) = size {
                match handle {
                    Some(handle) => tree.file(handle)?.set_len(size)?,
                    None => File::options().write(true).open(&path)?.set_len(size)?,
                }
            }
            if uid.is_some() || gid.is_some() {
                lchown(&path, uid, gid)?;
            }
            if let Some(mode) = mode {
                fs::set_permissions(&path, Permissions::from_mode(mode & 0o7777))?;
            }
            if atime.is_some() || mtime.is_some() {
                let (atime, mtime) = (time_spec(atime)?, time_spec(mtime)?);
                utimensat(AT_FDCWD, &path, &atime, &mtime, UtimensatFlags::NoFollowSymlink)?;
            }
            tree.attributes_of(inode, &paths[0])
        };
        self.serve("setattr", request, paths, reply, act, move |reply, attributes| reply.attr(&valid, &attributes));
    }

    fn readlink(&self, request: &Request, inode: INodeNo, reply: ReplyData) {
        let act = |tree: &Tree, paths: &[PathBuf]| fs::read_link(tree.at(&paths[0]));
        self.serve("readlink", request, vec![self.tree.path(inode)], reply, act, |reply, target| {
            reply.data(target.as_os_str().as_encoded_bytes());
        });
    }

    fn mknod(
        &self,
        request: &Request,
        parent: INodeNo,
        name: &OsStr,
        bits: u32,
        umask: u32,
        device: u32,
        reply: ReplyEntry,
    ) {
        self.make("mknod", request, self.child(parent, name), reply, move |path| {
            Ok(mknod(path, SFlag::from_bits_truncate(bits) & SFlag::S_IFMT, mode(bits, umask), device.into())?)
        });
    }

    fn mkdir(&self, request: &Request, parent: INodeNo, name: &OsStr, bits: u32, umask: u32, reply: ReplyEntry) {
        self.make("mkdir", request, self.child(parent, name), reply, move |path| {
            Ok(nix::unistd::mkdir(path, mode(bits, umask))?)
        });
    }

    fn symlink(&self, request: &Request, parent: INodeNo, name: &OsStr, target: &Path, reply: ReplyEntry) {
        let target = target.to_owned();
        self.make("symlink", request, self.child(parent, name), reply, move |path| symlink(target, path));
    }

    fn unlink(&self, request: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        let act = |tree: &Tree, paths: &[PathBuf]| fs::remove_file(tree.at(&paths[0]));
        self.serve("unlink", request, vec![self.child(parent, name)], reply, act, |reply, ()| reply.ok());
    }

    fn rmdir(&self, request: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        let act = |tree: &Tree, paths: &[PathBuf]| fs::remove_dir(tree.at(&paths[0]));
        self.serve("rmdir", request, vec![self.child(parent, name)], reply, act, |reply, ()| reply.ok());
    }

    fn rename(
        &self,
        request: &Request,
        parent: INodeNo,
        name: &OsStr,
        new_parent: INodeNo,
        new_name: &OsStr,
        flags: RenameFlags,
        reply: ReplyEmpty,
    ) {
        let paths = vec![self.child(parent, name), self.child(new_parent, new_name)];
        let act = move |tree: &Tree, paths: &[PathBuf]| {
            if !RenameFlags::RENAME_NOREPLACE.contains(flags) {
                return Err(nix::errno::Errno::EINVAL.into());
            }
            let flags = nix::fcntl::RenameFlags::from_bits_truncate(flags.bits());
            renameat2(AT_FDCWD, &tree.at(&paths[0]), AT_FDCWD, &tree.at(&paths[1]), flags)?;
            tree.moved(&paths[0], &paths[1]);
            Ok(())
        };
        self.serve("rename", request, paths, reply, act, |reply, ()| reply.ok());
    }

    fn link(&self, request: &Request, inode: INodeNo, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let (paths, valid) = (vec![self.child(parent, name), self.tree.path(inode)], self.valid);
        let act = |tree: &Tree, paths: &[PathBuf]| {
            fs::hard_link(tree.at(&paths[1]), tree.at(&paths[0]))?;
            tree.entry(&paths[0])
        };
        self.serve("link", request, paths, reply, act, move |reply, attributes| {
            reply.entry(&valid, &attributes, Generation(0));
        });
    }

    fn open(&self, request: &Request, inode: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
        let act = move |tree: &Tree, paths: &[PathBuf]| {
            Ok(tree.keep(inode, open_at(&tree.at(&paths[0]), flags.0, Mode::empty())?))
        };
        self.serve("open", request, vec![self.tree.path(inode)], reply, act, move |reply, handle| {
            reply.opened(handle, open_flags(flags.0));
        });
    }

    fn create(
        &self,
        request: &Request,
        parent: INodeNo,
        name: &OsStr,
        bits: u32,
        umask: u32,
        flags: i32,
        reply: ReplyCreate,
    ) {
        let (owner, valid) = ((request.uid(), request.gid()), self.valid);
        let act = move |tree: &Tree, paths: &[PathBuf]| {
            let path = tree.at(&paths[0]);
            let file = open_at(&path, flags | OFlag::O_CREAT.bits(), mode(bits, umask))?;
            adopt(&path, owner)?;
            let attributes = tree.entry(&paths[0])?;
            Ok((attributes, tree.keep(attributes.ino, file)))
        };
        let paths = vec![self.child(parent, name)];
        self.serve("create", request, paths, reply, act, move |reply, (attributes, handle)| {
            reply.created(&valid, &attributes, Generation(0), handle, open_flags(flags));
        });
    }

    fn read(
        &self,
        request: &Request,
        inode: INodeNo,
        handle: FileHandle,
        offset: u64,
        size: u32,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let rules = Arc::clone(&self.rules);
        let act = move |tree: &Tree, paths: &[PathBuf]| {
            let size = usize::try_from(size.min(MAX_REQUEST)).expect("a usize has 32 bits or more");
            let end = rules.end_of_reads(&paths[0]).saturating_sub(offset);
            let mut bytes = vec![0; size.min(usize::try_from(end).unwrap_or(usize::MAX))];
            let (file, mut filled) = (tree.file(handle)?, 0);
            // Less than was asked for would mean the end of the file.
            while filled < bytes.len() {
                match file.read_at(&mut bytes[filled..], offset + filled as u64)? {
                    0 => break,
                    read => filled += read,
                }
            }
            bytes.truncate(filled);
            Ok(bytes)
        };
        self.serve("read", request, vec![self.tree.path(inode)], reply, act, |reply, bytes| reply.data(&bytes));
    }

    fn write(
        &self,
        request: &Request,
        inode: INodeNo,
        handle: FileHandle,
        offset: u64,
        data: &[u8],
        _write_flags: WriteFlags,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        let data = data.to_owned();
        let act = move |tree: &Tree, _: &[PathBuf]| {
            tree.file(handle)?.write_all_at(&data, offset)?;
            Ok(u32::try_from(data.len()).expect("a request is at most MAX_REQUEST"))
        };
        self.serve("write", request, vec![self.tree.path(inode)], reply, act, |reply, size| reply.written(size));
    }

    fn flush(&self, request: &Request, inode: INodeNo, _handle: FileHandle, _owner: LockOwner, reply: ReplyEmpty) {
        self.serve("flush", request, vec![self.tree.path(inode)], reply, |_, _| Ok(()), |reply, ()| reply.ok());
    }

    fn release(
        &self,
        _request: &Request,
        _inode: INodeNo,
        handle: FileHandle,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        _flush: bool,
        reply: ReplyEmpty,
    ) {
        // Nobody waits for it.
        self.tree.forget(handle);
        reply.ok();
    }

    fn fsync(&self, request: &Request, inode: INodeNo, handle: FileHandle, datasync: bool, reply: ReplyEmpty) {
        let act = move |tree: &Tree, _: &[PathBuf]| {
            let file = tree.file(handle)?;
            if datasync { file.sync_data() } else { file.sync_all() }
        };
        self.serve("fsync", request, vec![self.tree.path(inode)], reply, act, |reply, ()| reply.ok());
    }

    fn fallocate(
        &self,
        request: &Request,
        inode: INodeNo,
        handle: FileHandle,
        offset: u64,
        length: u64,
        mode: i32,
        reply: ReplyEmpty,
    ) {
        let act = move |tree: &Tree, _: &[PathBuf]| {
            let mode = FallocateFlags::from_bits_retain(mode);
            Ok(fallocate(tree.file(handle)?, mode, signed(offset)?, signed(length)?)?)
        };
        self.serve("fallocate", request, vec![self.tree.path(inode)], reply, act, |reply, ()| reply.ok());
    }

    fn copy_file_range(
        &self,
        request: &Request,
        inode: INodeNo,
        handle: FileHandle,
        offset: u64,
        to_inode: INodeNo,
        to_handle: FileHandle,
        to_offset: u64,
        length: u64,
        _flags: CopyFileRangeFlags,
        reply: ReplyWrite,
    ) {
        let act = move |tree: &Tree, _: &[PathBuf]| {
            let (mut from, mut to) = (signed(offset)?, signed(to_offset)?);
            let length = usize::try_from(length.min(MAX_COPY)).expect("a usize has 32 bits or more");
            let (source, target) = (tree.file(handle)?, tree.file(to_handle)?);
            let copied = copy_file_range(source, Some(&mut from), target, Some(&mut to), length)?;
            Ok(u32::try_from(copied).expect("at most MAX_COPY"))
        };
        let paths = vec![self.tree.path(inode), self.tree.path(to_inode)];
        self.serve("copy_file_range", request, paths, reply, act, |reply, size| reply.written(size));
    }

    fn lseek(
        &self,
        request: &Request,
        inode: INodeNo,
        handle: FileHandle,
        offset: i64,
        whence: i32,
        reply: ReplyLseek,
    ) {
        let act = move |tree: &Tree, _: &[PathBuf]| {
            let whence = if whence == Whence::SeekData as i32 { Whence::SeekData } else { Whence::SeekHole };
            Ok(lseek(tree.file(handle)?, offset, whence)?)
        };
        self.serve("lseek", request, vec![self.tree.path(inode)], reply, act, |reply, offset| reply.offset(offset));
    }

    fn opendir(&self, request: &Request, inode: INodeNo, _flags: OpenFlags, reply: ReplyOpen) {
        let act = |tree: &Tree, _: &[PathBuf]| Ok(tree.keep_directory());
        self.serve("opendir", request, vec![self.tree.path(inode)], reply, act, |reply, handle| {
            reply.opened(handle, FopenFlags::empty());
        });
    }

    fn readdir(&self, request: &Request, inode: INodeNo, handle: FileHandle, offset: u64, reply: ReplyDirectory) {
        let act = move |tree: &Tree, paths: &[PathBuf]| tree.listing(handle, &paths[0], offset == 0);
        let answer = move |mut reply: ReplyDirectory, listing: crate::tree::Listing| {
            for (next, (inode, kind, name)) in (1..).zip(listing.iter()).filter(|(next, _)| *next > offset) {
                if reply.add(INodeNo(*inode), next, *kind, name) {
                    break;
                }
            }
            reply.ok();
        };
        self.serve("readdir", request, vec![self.tree.path(inode)], reply, act, answer);
    }

    fn releasedir(&self, _: &Request, _: INodeNo, handle: FileHandle, _: OpenFlags, reply: ReplyEmpty) {
        self.tree.forget(handle);
        reply.ok();
    }

    fn fsyncdir(&self, request: &Request, inode: INodeNo, _: FileHandle, _datasync: bool, reply: ReplyEmpty) {
        let act = |tree: &Tree, paths: &[PathBuf]| File::open(tree.at(&paths[0]))?.sync_all();
        self.serve("fsyncdir", request, vec![self.tree.path(inode)], reply, act, |reply, ()| reply.ok());
    }

    fn statfs(&self, request: &Request, inode: INodeNo, reply: ReplyStatfs) {
        let act = |tree: &Tree, paths: &[PathBuf]| Ok(nix::sys::statvfs::statvfs(&tree.at(&paths[0]))?);
        self.serve("statfs", request, vec![self.tree.path(inode)], reply, act, |reply, of| {
            let narrow = |number: u64| u32::try_from(number).unwrap_or(u32::MAX);
            let (size, names, fragment) = (narrow(of.block_size()), narrow(of.name_max()), narrow(of.fragment_size()));
            reply.statfs(
                of.blocks(),
                of.blocks_free(),
                of.blocks_available(),
                of.files(),
                of.files_free(),
                size,
                names,
                fragment,
            );
        });
    }
}
