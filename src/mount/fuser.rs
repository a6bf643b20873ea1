//! The adapter to the crate `fuser`: the only file that names it.
//!
//! It speaks the kernel's protocol over `/dev/fuse` and runs the threads that read requests. Requests that would write are
//! refused by the kernel where the mount is read-only; of the others, files are only written, never made or removed.

use std::ffi::OsStr;
use std::io;
use std::os::fd::OwnedFd;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::{Duration, UNIX_EPOCH};

use ::fuser::{
    AccessFlags, Config, Errno as FuserErrno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags, Generation,
    INodeNo, InitFlags, KernelConfig, LockOwner, OpenAccMode, OpenFlags, ReplyAttr, ReplyData, ReplyDirectory,
    ReplyDirectoryPlus, ReplyEmpty, ReplyEntry, ReplyLseek, ReplyOpen, ReplyStatfs, ReplyWrite, ReplyXattr, Request,
    SessionACL, WriteFlags,
};

use super::attributes::FILE_BLOCK;
use super::errno::Errno;
use super::transport::{
    Access, Attributes, Caching, Ctx, DirectoryEntry, Entries, Handler, Opened, Reply, Seek, Sink, Statfs, Timed,
};
use crate::tree::Kind;

/// Longest answer to a read, in bytes: the most the kernel asks for by default (`fs.fuse.max_pages_limit`).
const MAX_REQUEST: u32 = 1 << 20;

/// Requests that readers need not wait for (read-ahead) and that may be under way at once; more queue in the kernel.
const MAX_BACKGROUND: u16 = 64;

/// Longest target of a symbolic link or value of an attribute that the protocol can carry, in bytes.
const MAX_XATTR: usize = 64 << 10;

/// A mount whose requests nobody answers yet.
pub(super) struct Connection<H: Handler>(::fuser::Session<Adapter<H>>);

impl<H: Handler> Connection<H> {
    /// Shakes hands with the kernel over the connection of a mount, whose requests `threads` threads will take. With `has_acls` it
    /// applies the access control lists of files, which are among their extended attributes.
    ///
    /// # Errors
    /// What the system says.
    pub(super) fn new(
        handler: H,
        connection: OwnedFd,
        allow_other: bool,
        has_acls: bool,
        threads: usize,
    ) -> io::Result<Self> {
        let mut config = Config::default();
        let acl = if allow_other { SessionACL::All } else { SessionACL::Owner };
        config.acl = acl;
        config.n_threads = Some(threads);
        // Not mounted by the crate: it would unmount by path in the end, whatever is mounted there by then.
        ::fuser::Session::from_fd(Adapter { handler, has_acls, maps_direct: false }, connection, acl, config).map(Self)
    }

    /// Answers requests until the mount ends.
    ///
    /// # Errors
    /// What ended it, unless it was an unmount. A forced one, while a request is under way, aborts the connection.
    pub(super) fn run(self) -> io::Result<()> {
        self.0.run().or_else(|error| match error.raw_os_error() {
            Some(libc::ECONNABORTED) => Ok(()),
            _ => Err(error),
        })
    }
}

struct Adapter<H> {
    handler: H,
    /// Whether the kernel is to ask for access control lists, and to apply them.
    has_acls: bool,
    /// Whether the kernel maps what is read without the page cache.
    maps_direct: bool,
}

impl<H> Adapter<H> {
    /// Has the handler work on a request. A panic is that request's: its reply is dropped, which answers it, and the thread
    /// lives on; without it the mount would end.
    fn ask(&self, act: impl FnOnce(&H)) {
        if catch_unwind(AssertUnwindSafe(|| act(&self.handler))).is_err() {
            tracing::error!("a panic while a request was worked on; it is answered with an error");
        }
    }
}

fn ctx(request: &Request) -> Ctx {
    Ctx { unique: request.unique().0, pid: request.pid() }
}

fn errno(errno: Errno) -> FuserErrno {
    FuserErrno::from_i32(errno.code())
}

fn file_type(kind: Kind) -> FileType {
    match kind {
        Kind::Directory => FileType::Directory,
        Kind::File => FileType::RegularFile,
        Kind::Symlink => FileType::Symlink,
        Kind::Fifo => FileType::NamedPipe,
        Kind::Socket => FileType::Socket,
        Kind::CharacterDevice => FileType::CharDevice,
        Kind::BlockDevice => FileType::BlockDevice,
    }
}

/// Returns a device's number as the protocol has it: twelve bits of major, twenty of minor. One that has more is 0, since no
/// other device may be taken for it. Source: `new_encode_dev` in `include/linux/kdev_t.h` of Linux.
fn rdev((major, minor): (u32, u32)) -> u32 {
    u32::try_from(rustix::fs::makedev(major, minor)).unwrap_or(0)
}

fn file_attr(attributes: &Attributes) -> FileAttr {
    FileAttr {
        ino: INodeNo(attributes.inode),
        size: attributes.size,
        blocks: attributes.blocks,
        atime: attributes.accessed,
        mtime: attributes.modified,
        ctime: attributes.changed,
        // Carried on macOS only.
        crtime: attributes.created,
        kind: file_type(attributes.kind),
        perm: attributes.mode,
        nlink: attributes.links,
        uid: attributes.uid,
        gid: attributes.gid,
        rdev: rdev(attributes.device),
        blksize: attributes.block_size,
        flags: 0,
    }
}

impl Sink<Timed> for ReplyEntry {
    fn send(self: Box<Self>, answer: Result<&Timed, Errno>) {
        match answer {
            // Inode numbers are never reused, so the generation is always 0.
            Ok(timed) => self.entry(&timed.valid, &file_attr(&timed.attributes), Generation(0)),
            Err(error) => self.error(errno(error)),
        }
    }
}

impl Sink<Timed> for ReplyAttr {
    fn send(self: Box<Self>, answer: Result<&Timed, Errno>) {
        match answer {
            Ok(timed) => self.attr(&timed.valid, &file_attr(&timed.attributes)),
            Err(error) => self.error(errno(error)),
        }
    }
}

impl Sink<[u8]> for ReplyData {
    fn send(self: Box<Self>, answer: Result<&[u8], Errno>) {
        match answer {
            Ok(bytes) => self.data(bytes),
            Err(error) => self.error(errno(error)),
        }
    }
}

impl Sink<Opened> for ReplyOpen {
    fn send(self: Box<Self>, answer: Result<&Opened, Errno>) {
        match answer {
            Ok(opened) => {
                // Without NOFLUSH every close would wait for an answer that says nothing.
                let flags = match opened.caching {
                    Caching::Direct => FopenFlags::FOPEN_NOFLUSH | FopenFlags::FOPEN_DIRECT_IO,
                    Caching::Pages => FopenFlags::FOPEN_NOFLUSH,
                    Caching::KeptPages => FopenFlags::FOPEN_NOFLUSH | FopenFlags::FOPEN_KEEP_CACHE,
                };
                self.opened(FileHandle(opened.handle), flags);
            }
            Err(error) => self.error(errno(error)),
        }
    }
}

/// Adds entries until `add` says that there is no room for one.
fn fill(entries: &dyn Entries, mut add: impl FnMut(usize, &DirectoryEntry) -> bool) {
    let mut numbered = (0..).map_while(|index| Some((index, entries.get(index)?)));
    while numbered.next().is_some_and(|(index, entry)| !add(index, &entry)) {}
}

impl Sink<dyn Entries> for ReplyDirectory {
    fn send(mut self: Box<Self>, answer: Result<&dyn Entries, Errno>) {
        match answer {
            Ok(entries) => {
                fill(entries, |_, entry| {
                    self.add(INodeNo(entry.inode), entry.next, file_type(entry.kind), &entry.name)
                });
                self.ok();
            }
            Err(error) => self.error(errno(error)),
        }
    }
}

/// Names with attributes, each of which is a lookup that the kernel need not ask for. Nothing counts them: numbers are never
/// reused, so there is nothing to be forgotten.
impl Sink<dyn Entries> for ReplyDirectoryPlus {
    fn send(mut self: Box<Self>, answer: Result<&dyn Entries, Errno>) {
        match answer {
            Ok(entries) => {
                fill(entries, |index, entry| {
                    let (valid, attributes) = match entries.known(index) {
                        Some(Timed { attributes, valid }) => (valid, file_attr(&attributes)),
                        None => (Duration::ZERO, unknown(entry)),
                    };
                    self.add(INodeNo(entry.inode), entry.next, &entry.name, &valid, &attributes, Generation(0))
                });
                self.ok();
            }
            Err(error) => self.error(errno(error)),
        }
    }
}

/// Returns attributes with a size that no file has: the kernel takes the name and the kind from them, and looks the name up when
/// it needs more. Source: `fuse_direntplus_link` and `fuse_invalid_attr` in `fs/fuse` of Linux.
///
/// An inode number of 0 would say the same, but the crate puts it into the name's entry as well, which readers then skip.
fn unknown(entry: &DirectoryEntry) -> FileAttr {
    FileAttr {
        ino: INodeNo(entry.inode),
        size: u64::MAX,
        blocks: 0,
        atime: UNIX_EPOCH,
        mtime: UNIX_EPOCH,
        ctime: UNIX_EPOCH,
        crtime: UNIX_EPOCH,
        kind: file_type(entry.kind),
        perm: 0,
        nlink: 1,
        uid: 0,
        gid: 0,
        rdev: 0,
        blksize: FILE_BLOCK,
        flags: 0,
    }
}

impl Sink<u64> for ReplyLseek {
    fn send(self: Box<Self>, answer: Result<&u64, Errno>) {
        match answer.and_then(|offset| i64::try_from(*offset).map_err(|_| Errno::INVALID)) {
            Ok(offset) => self.offset(offset),
            Err(error) => self.error(errno(error)),
        }
    }
}

/// The answer to a write of so many bytes.
struct Written {
    reply: ReplyWrite,
    len: u32,
}

impl Sink<()> for Written {
    fn send(self: Box<Self>, answer: Result<&(), Errno>) {
        match answer {
            Ok(()) => self.reply.written(self.len),
            Err(error) => self.reply.error(errno(error)),
        }
    }
}

impl Sink<Statfs> for ReplyStatfs {
    fn send(self: Box<Self>, answer: Result<&Statfs, Errno>) {
        match answer {
            Ok(statfs) => {
                self.statfs(0, 0, 0, statfs.files, 0, statfs.block_size, statfs.name_length, statfs.block_size);
            }
            Err(error) => self.error(errno(error)),
        }
    }
}

/// An attribute's answer: the caller asks for its size first, with room for nothing.
struct XattrReply {
    reply: ReplyXattr,
    room: u32,
}

impl Sink<[u8]> for XattrReply {
    fn send(self: Box<Self>, answer: Result<&[u8], Errno>) {
        match answer {
            Ok(bytes) if bytes.len() > MAX_XATTR => self.reply.error(errno(Errno::RANGE)),
            Ok(bytes) => {
                let size = u32::try_from(bytes.len()).expect("at most MAX_XATTR");
                match self.room {
                    0 => self.reply.size(size),
                    room if room < size => self.reply.error(errno(Errno::RANGE)),
                    _ => self.reply.data(bytes),
                }
            }
            Err(error) => self.reply.error(errno(error)),
        }
    }
}

impl<H: Handler> Filesystem for Adapter<H> {
    fn init(&mut self, _request: &Request, config: &mut KernelConfig) -> io::Result<()> {
        // Each setter that is refused says the nearest value it takes.
        if let Err(nearest) = config.set_max_write(MAX_REQUEST) {
            let _ = config.set_max_write(nearest);
        }
        if let Err(nearest) = config.set_max_readahead(MAX_REQUEST) {
            let _ = config.set_max_readahead(nearest);
        }
        let _ = config.set_max_background(MAX_BACKGROUND);
        // One by one: a set with one unknown member would be refused whole.
        for capability in [
            InitFlags::FUSE_PARALLEL_DIROPS,
            // Always, not where the kernel guesses that it is of use (`FUSE_READDIRPLUS_AUTO`): then names come with attributes in the
            // first piece of a directory alone, and older kernels ask for pieces of 25 names.
            InitFlags::FUSE_DO_READDIRPLUS,
            InitFlags::FUSE_ASYNC_DIO,
            InitFlags::FUSE_CACHE_SYMLINKS,
        ]
        .into_iter()
        .chain(self.has_acls.then_some(InitFlags::FUSE_POSIX_ACL))
        {
            if config.add_capabilities(capability).is_err() {
                tracing::debug!(?capability, "the kernel does not know a capability");
            }
        }
        self.maps_direct = config.add_capabilities(InitFlags::FUSE_DIRECT_IO_ALLOW_MMAP).is_ok();
        Ok(())
    }

    fn lookup(&self, request: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        self.ask(|handler| handler.lookup(ctx(request), parent.0, name, Reply::new(reply)));
    }

    fn getattr(&self, request: &Request, inode: INodeNo, _handle: Option<FileHandle>, reply: ReplyAttr) {
        self.ask(|handler| handler.getattr(ctx(request), inode.0, Reply::new(reply)));
    }

    fn readlink(&self, request: &Request, inode: INodeNo, reply: ReplyData) {
        self.ask(|handler| handler.readlink(ctx(request), inode.0, Reply::new(reply)));
    }

    fn open(&self, request: &Request, inode: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
        let access = Access {
            is_writable: flags.acc_mode() != OpenAccMode::O_RDONLY,
            is_direct: flags.0 & libc::O_DIRECT != 0,
            maps_direct: self.maps_direct,
        };
        self.ask(|handler| handler.open(ctx(request), inode.0, access, Reply::new(reply)));
    }

    fn read(
        &self,
        request: &Request,
        _inode: INodeNo,
        handle: FileHandle,
        offset: u64,
        size: u32,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyData,
    ) {
        self.ask(|handler| handler.read(ctx(request), handle.0, offset, size.min(MAX_REQUEST), Reply::new(reply)));
    }

    fn write(
        &self,
        request: &Request,
        _inode: INodeNo,
        handle: FileHandle,
        offset: u64,
        bytes: &[u8],
        _write_flags: WriteFlags,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        let len = u32::try_from(bytes.len()).expect("the protocol counts in 32 bits");
        let reply = Reply::new(Written { reply, len });
        self.ask(|handler| handler.write(ctx(request), handle.0, offset, bytes, reply));
    }

    fn fsync(&self, _request: &Request, _inode: INodeNo, _handle: FileHandle, _datasync: bool, reply: ReplyEmpty) {
        // What is written need not outlive the process.
        reply.ok();
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
        self.ask(|handler| handler.release(handle.0));
        reply.ok();
    }

    fn opendir(&self, request: &Request, inode: INodeNo, _flags: OpenFlags, reply: ReplyOpen) {
        self.ask(|handler| handler.opendir(ctx(request), inode.0, Reply::new(reply)));
    }

    fn readdir(&self, request: &Request, _inode: INodeNo, handle: FileHandle, offset: u64, reply: ReplyDirectory) {
        self.ask(|handler| handler.readdir(ctx(request), handle.0, offset, Reply::new(reply)));
    }

    fn readdirplus(
        &self,
        request: &Request,
        _inode: INodeNo,
        handle: FileHandle,
        offset: u64,
        reply: ReplyDirectoryPlus,
    ) {
        self.ask(|handler| handler.readdir(ctx(request), handle.0, offset, Reply::new(reply)));
    }

    fn releasedir(
        &self,
        _request: &Request,
        _inode: INodeNo,
        handle: FileHandle,
        _flags: OpenFlags,
        reply: ReplyEmpty,
    ) {
        self.ask(|handler| handler.release(handle.0));
        reply.ok();
    }

    fn statfs(&self, request: &Request, _inode: INodeNo, reply: ReplyStatfs) {
        self.ask(|handler| handler.statfs(ctx(request), Reply::new(reply)));
    }

    fn getxattr(&self, request: &Request, inode: INodeNo, name: &OsStr, size: u32, reply: ReplyXattr) {
        self.ask(|handler| handler.getxattr(ctx(request), inode.0, name, Reply::new(XattrReply { reply, room: size })));
    }

    fn listxattr(&self, request: &Request, inode: INodeNo, size: u32, reply: ReplyXattr) {
        self.ask(|handler| handler.listxattr(ctx(request), inode.0, Reply::new(XattrReply { reply, room: size })));
    }

    fn access(&self, _request: &Request, _inode: INodeNo, _mask: AccessFlags, reply: ReplyEmpty) {
        // The kernel decides by mode and owner (`default_permissions`) before it asks.
        reply.ok();
    }

    fn lseek(
        &self,
        request: &Request,
        _inode: INodeNo,
        handle: FileHandle,
        offset: i64,
        whence: i32,
        reply: ReplyLseek,
    ) {
        let seek = match whence {
            libc::SEEK_DATA => Seek::Data,
            libc::SEEK_HOLE => Seek::Hole,
            _ => return reply.error(errno(Errno::INVALID)),
        };
        let Ok(offset) = u64::try_from(offset) else {
            return reply.error(errno(Errno::NO_SUCH_OFFSET));
        };
        self.ask(|handler| handler.lseek(ctx(request), handle.0, offset, seek, Reply::new(reply)));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_attribute_reaches_the_kernel_as_it_is() {
        let before = |millis| UNIX_EPOCH - Duration::from_millis(millis);
        let attributes = Attributes {
            inode: 7,
            kind: Kind::CharacterDevice,
            size: 1,
            blocks: 2,
            block_size: 4096,
            accessed: before(1),
            modified: before(2),
            changed: before(3),
            created: before(4),
            mode: 0o620,
            links: 5,
            uid: 1000,
            gid: 100,
            device: (0xabc, 0xdef12),
        };
        let expected = FileAttr {
            ino: INodeNo(7),
            size: 1,
            blocks: 2,
            atime: before(1),
            mtime: before(2),
            ctime: before(3),
            crtime: before(4),
            kind: FileType::CharDevice,
            perm: 0o620,
            nlink: 5,
            uid: 1000,
            gid: 100,
            rdev: 0xdefa_bc12,
            blksize: 4096,
            flags: 0,
        };
        assert_eq!(file_attr(&attributes), expected);
        for (device, number) in [((0, 0), 0), ((8, 1), 0x801), ((0x1000, 1), 0), ((1, 1 << 20), 0)] {
            assert_eq!(rdev(device), number, "{device:?}");
        }
    }

    #[test]
    fn a_panic_ends_no_thread() {
        Adapter { handler: (), has_acls: false, maps_direct: false }.ask(|()| panic!("on purpose"));
    }
}
