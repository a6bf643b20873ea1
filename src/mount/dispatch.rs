//! Who works on a request: the thread that read it, or one of a pool, so that what waits for the storage holds up nothing
//! else.
//!
//! ```text
//! request ─ needs no storage, or what it needs is at hand ──────► answered at once
//!    │
//!    ├─ the file or the repository does not answer ─────────────► EIO at once
//!    ├─ the storage is local, and few wait for it ─ parked ─────► answered in the thread that read it
//!    └─ else ─────────────────────────────────────── parked ─────► a thread of the pool for names, or of that for reads
//!                                                      ▲
//!                       watcher: EIO at the deadline, EINTR when a signal waits for who asked
//! ```
//!
//! A hand-over to another thread costs a third of the speed of small random reads, so a local storage is read in the
//! threads that take the requests; but never in all of them, since a local disk may stall too.

use std::ffi::OsStr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use super::errno::Errno;
use super::filesystem::TreeFilesystem;
use super::pool::Pool;
use super::requests::Requests;
use super::transport::{Access, Ctx, Entries, Handler, Opened, Reply, Seek, Statfs, Timed};
use super::watcher;

/// Threads for names and attributes, and for the bytes of files: apart, so that neither waits for the other.
const NAME_THREADS: usize = 64;
const READ_THREADS: usize = 64;

/// Threads that take requests and never wait for a local storage, so that there is always one for what needs none.
const SPARE: usize = 3;

/// Returns how many of `threads` threads that take requests may wait for a local storage.
fn inline_limit(threads: usize) -> usize {
    // A few threads have none to spare; an only one waits for nothing.
    threads.saturating_sub(SPARE).max(1).min(threads.saturating_sub(1))
}

/// Decides who works on which request.
pub(super) struct Dispatcher {
    files: Arc<TreeFilesystem>,
    requests: Arc<Requests>,
    names: Pool,
    reads: Pool,
    is_remote: bool,
    /// Requests that the threads which took them work on, and how many may.
    inline: Arc<AtomicUsize>,
    inline_limit: usize,
}

/// The place of a request that is worked on in the thread that took it. Given back when it is answered, not when its thread
/// is free again: who is answered may ask again before that.
struct Inline(Arc<AtomicUsize>);

impl Drop for Inline {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::AcqRel);
    }
}

impl Dispatcher {
    /// Makes a dispatcher whose requests `threads` threads take. A request that takes longer than `deadline` is answered
    /// with EIO; with `None` it waits for ever.
    pub(super) fn new(files: TreeFilesystem, threads: usize, deadline: Option<Duration>) -> Self {
        let (files, requests) = (Arc::new(files), Arc::<Requests>::default());
        watcher::start(files.clone(), requests.clone(), deadline);
        Self {
            is_remote: files.is_remote(),
            files,
            requests,
            names: Pool::new("xofs-names", NAME_THREADS),
            reads: Pool::new("xofs-reads", READ_THREADS),
            inline: Arc::default(),
            inline_limit: inline_limit(threads),
        }
    }

    /// Returns the requests under way.
    pub(super) fn requests(&self) -> Arc<Requests> {
        self.requests.clone()
    }

    /// Takes a place among those that are worked on where they were taken; `None` if that may not be.
    fn inline(&self) -> Option<Inline> {
        if self.is_remote {
            return None;
        }
        let place = Inline(self.inline.clone());
        (self.inline.fetch_add(1, Ordering::AcqRel) < self.inline_limit).then_some(place)
    }

    /// Works on what is at hand, where it was taken. Parked all the same: what was at hand when it was looked at may have become
    /// old since, and then it waits for the storage, and a signal or the deadline must end that.
    fn run_at_hand<A: ?Sized + 'static>(
        &self,
        ctx: Ctx,
        inode: u64,
        reply: Reply<A>,
        act: impl FnOnce(&Arc<TreeFilesystem>, Reply<A>),
    ) {
        act(&self.files, self.requests.park(ctx, inode, reply, None::<Inline>));
    }

    /// Works on what may wait for the storage, about the file `inode`.
    fn run<A: ?Sized + 'static>(
        &self,
        pool: &Pool,
        ctx: Ctx,
        inode: u64,
        reply: Reply<A>,
        act: impl FnOnce(&Arc<TreeFilesystem>, Reply<A>) + Send + 'static,
    ) {
        let inode = self.files.group(inode);
        if !self.files.health().admits(inode) {
            return reply.error(Errno::IO);
        }
        let place = self.inline();
        let is_inline = place.is_some();
        let reply = self.requests.park(ctx, inode, reply, place);
        if is_inline {
            act(&self.files, reply);
            return watcher::answered(&self.files, inode);
        }
        let (files, requests) = (self.files.clone(), self.requests.clone());
        pool.run(inode, move || {
            // What was given up while it waited for a thread is not begun.
            if requests.is_waiting(ctx) {
                act(&files, reply);
                watcher::answered(&files, inode);
            }
        });
    }
}

impl Drop for Dispatcher {
    fn drop(&mut self) {
        self.requests.close();
    }
}

impl Handler for Dispatcher {
    fn lookup(&self, ctx: Ctx, parent: u64, name: &OsStr, reply: Reply<Timed>) {
        if self.files.is_name_at_hand(parent, name) {
            return self.run_at_hand(ctx, parent, reply, |files, reply| files.lookup(parent, name, reply));
        }
        let name = name.to_owned();
        self.run(&self.names, ctx, parent, reply, move |files, reply| files.lookup(parent, &name, reply));
    }

    fn getattr(&self, ctx: Ctx, inode: u64, reply: Reply<Timed>) {
        if self.files.has_attributes_at_hand(inode) {
            return self.run_at_hand(ctx, inode, reply, |files, reply| files.getattr(inode, reply));
        }
        self.run(&self.names, ctx, inode, reply, move |files, reply| files.getattr(inode, reply));
    }

    fn readlink(&self, ctx: Ctx, inode: u64, reply: Reply<[u8]>) {
        if self.files.is_target_at_hand(inode) {
            return self.run_at_hand(ctx, inode, reply, |files, reply| files.readlink(inode, reply));
        }
        self.run(&self.names, ctx, inode, reply, move |files, reply| files.readlink(inode, reply));
    }

    fn open(&self, ctx: Ctx, inode: u64, access: Access, reply: Reply<Opened>) {
        if self.files.is_at_hand(inode) {
            return self.run_at_hand(ctx, inode, reply, |files, reply| files.open(ctx, inode, access, reply));
        }
        self.run(&self.names, ctx, inode, reply, move |files, reply| files.open(ctx, inode, access, reply));
    }

    fn read(&self, ctx: Ctx, handle: u64, offset: u64, len: u32, reply: Reply<[u8]>) {
        let Some(file) = self.files.file(handle) else { return reply.error(Errno::BAD_HANDLE) };
        // What does not answer is not read ahead of, which would take the threads for it from all other files.
        if !self.files.health().is_silent(file.inode()) {
            self.files.note_read(ctx, &file, offset, len);
        }
        if self.is_remote || file.is_at_hand() {
            let Some(reply) = self.files.read_at_hand(&file, offset, len, reply) else { return };
            return self.run(&self.reads, ctx, file.inode(), reply, move |files, reply| {
                files.read(&file, offset, len, reply);
            });
        }
        self.run(&self.reads, ctx, file.inode(), reply, move |files, reply| files.read(&file, offset, len, reply));
    }

    fn lseek(&self, ctx: Ctx, handle: u64, offset: u64, seek: Seek, reply: Reply<u64>) {
        let Some(file) = self.files.file(handle) else { return reply.error(Errno::BAD_HANDLE) };
        self.run(&self.reads, ctx, file.inode(), reply, move |files, reply| files.lseek(&file, offset, seek, reply));
    }

    fn release(&self, handle: u64) {
        let released = self.files.release(handle);
        if let Some(file) = released.filter(|file| self.is_remote && file.is_stored()) {
            // Closing a file asks some servers as well.
            self.names.run(file.inode(), move || drop(file));
        }
    }

    fn opendir(&self, _ctx: Ctx, inode: u64, reply: Reply<Opened>) {
        self.files.opendir(inode, reply);
    }

    fn readdir(&self, ctx: Ctx, handle: u64, offset: u64, reply: Reply<dyn Entries>) {
        let Some(directory) = self.files.file(handle) else { return reply.error(Errno::BAD_HANDLE) };
        let inode = directory.inode();
        if offset > 0 && directory.is_listed() || self.files.is_list_at_hand(inode) {
            return self.run_at_hand(ctx, inode, reply, |files, reply| files.readdir(&directory, offset, reply));
        }
        self.run(&self.names, ctx, inode, reply, move |files, reply| files.readdir(&directory, offset, reply));
    }

    fn getxattr(&self, ctx: Ctx, inode: u64, name: &OsStr, reply: Reply<[u8]>) {
        if self.files.is_xattr_at_hand(inode, name) {
            return self.run_at_hand(ctx, inode, reply, |files, reply| files.getxattr(inode, name, reply));
        }
        let name = name.to_owned();
        self.run(&self.names, ctx, inode, reply, move |files, reply| files.getxattr(inode, &name, reply));
    }

    fn listxattr(&self, ctx: Ctx, inode: u64, reply: Reply<[u8]>) {
        self.run(&self.names, ctx, inode, reply, move |files, reply| files.listxattr(inode, reply));
    }

    fn statfs(&self, _ctx: Ctx, reply: Reply<Statfs>) {
        self.files.statfs(reply);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_thread_that_takes_requests_never_waits_for_a_storage() {
        let limits = [1, 2, 3, 4, 5, 8].map(|threads| (threads, inline_limit(threads)));
        assert_eq!(limits, [(1, 0), (2, 1), (3, 1), (4, 1), (5, 2), (8, 5)]);
    }
}
