//! A filesystem with one file, which is a disk under an overlay.
//!
//! It is mounted nowhere, so that the loop device alone has to do with it. Reads wait for the storage in threads of their own, and
//! one that takes too long is an error; what is written asks no storage.

use std::ffi::{OsStr, OsString};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, SystemTime};

use disk::Readahead;

use super::super::errno::Errno;
use super::super::pool::Pool;
use super::super::requests::Requests;
use super::super::transport::{Access, Attributes, Caching, Ctx, Entries, Handler, Opened, Reply, Seek, Statfs, Timed};
use super::overlay::Overlay;
use crate::tree::Kind;

const ROOT: u64 = 1;
const FILE: u64 = 2;

/// How often it is looked for reads that take too long.
const TICK: Duration = Duration::from_millis(100);

/// Nothing ever changes but the bytes, which the kernel writes itself.
const BELIEVED: Duration = Duration::from_secs(60 * 60);

/// Threads for reads: as many as work for one file at most.
const THREADS: usize = super::super::pool::PER_FILE;

/// The filesystem.
pub(super) struct OneFile {
    name: OsString,
    overlay: Arc<Overlay>,
    readahead: Readahead,
    requests: Arc<Requests>,
    reads: Pool,
    made: SystemTime,
}

impl OneFile {
    /// Makes one whose file is called `name`. A read that takes longer than `deadline` is EIO; with `None` it waits for ever.
    pub(super) fn new(name: OsString, overlay: Arc<Overlay>, deadline: Option<Duration>) -> Self {
        let requests = Arc::<Requests>::default();
        if let Some(deadline) = deadline {
            watch(requests.clone(), deadline);
        }
        let reads = Pool::new("xofs-reads", THREADS);
        Self { name, overlay, readahead: Readahead::default(), requests, reads, made: SystemTime::now() }
    }

    /// Returns the requests under way.
    pub(super) fn requests(&self) -> Arc<Requests> {
        self.requests.clone()
    }

    fn timed(&self, inode: u64) -> Timed {
        let is_root = inode == ROOT;
        let attributes = Attributes {
            inode,
            kind: if is_root { Kind::Directory } else { Kind::File },
            size: if is_root { 0 } else { self.overlay.below().size() },
            blocks: 0,
            block_size: 4096,
            accessed: self.made,
            modified: self.made,
            changed: self.made,
            created: self.made,
            mode: if is_root { 0o500 } else { 0o600 },
            links: if is_root { 2 } else { 1 },
            uid: 0,
            gid: 0,
            device: (0, 0),
        };
        Timed { attributes, valid: BELIEVED }
    }
}

/// Answers reads that take too long.
fn watch(requests: Arc<Requests>, deadline: Duration) {
    let watch = move || {
        while requests.wait(TICK, false) {
            for waiting in requests.older_than(deadline) {
                requests.fail(&waiting, Errno::IO, || {
                    tracing::error!(waited = ?waiting.since.elapsed(), "no answer from the repository");
                });
            }
        }
    };
    if let Err(error) = thread::Builder::new().name("xofs-watcher".to_owned()).spawn(watch) {
        tracing::error!(%error, "no thread for deadlines could be made: what does not answer is waited for");
    }
}

impl Drop for OneFile {
    fn drop(&mut self) {
        self.requests.close();
    }
}

impl Handler for OneFile {
    fn lookup(&self, _ctx: Ctx, parent: u64, name: &OsStr, reply: Reply<Timed>) {
        if parent == ROOT && name == self.name {
            reply.ok(&self.timed(FILE));
        } else {
            reply.error(Errno::NOT_FOUND);
        }
    }

    fn getattr(&self, _ctx: Ctx, inode: u64, reply: Reply<Timed>) {
        reply.ok(&self.timed(inode));
    }

    fn readlink(&self, _ctx: Ctx, _inode: u64, reply: Reply<[u8]>) {
        reply.error(Errno::INVALID);
    }

    fn open(&self, _ctx: Ctx, _inode: u64, _access: Access, reply: Reply<Opened>) {
        reply.ok(&Opened { handle: 0, caching: Caching::KeptPages });
    }

    fn read(&self, ctx: Ctx, _handle: u64, offset: u64, len: u32, reply: Reply<[u8]>) {
        let left = self.overlay.below().size().saturating_sub(offset);
        let len = usize::try_from(left.min(u64::from(len))).expect("at most 32 bits");
        self.readahead.note(self.overlay.below(), offset, len);
        let reply = self.requests.park(ctx, FILE, reply, None::<()>);
        let (overlay, requests) = (self.overlay.clone(), self.requests.clone());
        self.reads.run(FILE, move || {
            // What was given up while it waited for a thread is not begun.
            if !requests.is_waiting(ctx) {
                return;
            }
            let mut buffer = vec![0; len];
            match overlay.read_at(offset, &mut buffer) {
                Ok(()) => reply.ok(&buffer),
                Err(error) => {
                    tracing::error!(offset, "{error}");
                    reply.error(Errno::of_disk(&error));
                }
            }
        });
    }

    fn write(&self, _ctx: Ctx, _handle: u64, offset: u64, bytes: &[u8], reply: Reply<()>) {
        match self.overlay.write_at(offset, bytes) {
            Ok(()) => reply.ok(&()),
            Err(errno) => reply.error(errno),
        }
    }

    fn lseek(&self, _ctx: Ctx, _handle: u64, _offset: u64, _seek: Seek, reply: Reply<u64>) {
        reply.error(Errno::NOT_KNOWN);
    }

    fn release(&self, _handle: u64) {}

    fn opendir(&self, _ctx: Ctx, _inode: u64, reply: Reply<Opened>) {
        reply.error(Errno::NOT_KNOWN);
    }

    fn readdir(&self, _ctx: Ctx, _handle: u64, _offset: u64, reply: Reply<dyn Entries>) {
        reply.error(Errno::NOT_KNOWN);
    }

    /// Asked for before each write, unless the kernel is told that there is nothing of the kind.
    fn getxattr(&self, _ctx: Ctx, _inode: u64, _name: &OsStr, reply: Reply<[u8]>) {
        reply.error(Errno::NOT_KNOWN);
    }

    fn listxattr(&self, _ctx: Ctx, _inode: u64, reply: Reply<[u8]>) {
        reply.error(Errno::NOT_KNOWN);
    }

    fn statfs(&self, _ctx: Ctx, reply: Reply<Statfs>) {
        reply.ok(&Statfs { files: 1, block_size: 4096, name_length: 255 });
    }
}
