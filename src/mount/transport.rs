//! What a mount is asked and how it answers, whatever carries the requests.
//!
//! A [`Reply`] answers exactly once and may be sent to another thread first. One that is dropped unanswered says EIO, so
//! that a panic never leaves a reader waiting.

use std::ffi::{OsStr, OsString};
use std::time::{Duration, SystemTime};

use super::errno::Errno;
use crate::tree::Kind;

/// Who asks, and the number of the request.
#[derive(Debug, Clone, Copy)]
pub(super) struct Ctx {
    /// Number of the request, unique among those not yet answered.
    pub(super) unique: u64,
    /// Process or thread that asks; 0 if it is not visible from here.
    pub(super) pid: u32,
}

/// What `stat(2)` shows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Attributes {
    pub(super) inode: u64,
    pub(super) kind: Kind,
    /// Size in bytes.
    pub(super) size: u64,
    /// Allocated, in units of 512 bytes.
    pub(super) blocks: u64,
    /// Bytes a reader should ask for at once, a power of two.
    pub(super) block_size: u32,
    pub(super) accessed: SystemTime,
    pub(super) modified: SystemTime,
    pub(super) changed: SystemTime,
    pub(super) created: SystemTime,
    pub(super) mode: u16,
    pub(super) links: u32,
    pub(super) uid: u32,
    pub(super) gid: u32,
    /// Major and minor number of a device.
    pub(super) device: (u32, u32),
}

/// Attributes, and for how long the kernel may believe them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Timed {
    pub(super) attributes: Attributes,
    pub(super) valid: Duration,
}

/// What a program asks for when it opens a file.
#[derive(Debug, Clone, Copy)]
pub(super) struct Access {
    /// It wants to write as well.
    pub(super) is_writable: bool,
    /// It wants no page cache in between (`O_DIRECT`).
    pub(super) is_direct: bool,
    /// What is read without the page cache can be mapped all the same.
    pub(super) maps_direct: bool,
}

/// How an open file is to be read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Caching {
    /// Every read comes to us; nothing is kept in the page cache.
    Direct,
    /// Through the page cache, dropped at each open.
    Pages,
    /// Through the page cache, and what is in it is still right.
    KeptPages,
}

/// An open file or directory.
#[derive(Debug, Clone, Copy)]
pub(super) struct Opened {
    pub(super) handle: u64,
    pub(super) caching: Caching,
}

/// A name in a directory.
#[derive(Debug, Clone)]
pub(super) struct DirectoryEntry {
    pub(super) inode: u64,
    pub(super) kind: Kind,
    pub(super) name: OsString,
    /// Offset from which a later request goes on after this entry.
    pub(super) next: u64,
}

/// The entries of a directory from an offset on, made one at a time: nobody knows how many there is room for.
pub(super) trait Entries {
    /// Returns one of them; `None` past the last.
    fn get(&self, index: usize) -> Option<DirectoryEntry>;
    /// Returns what a lookup of its name would answer, if that is known.
    fn known(&self, index: usize) -> Option<Timed>;
}

/// What `statfs(2)` shows.
#[derive(Debug, Clone, Copy)]
pub(super) struct Statfs {
    /// Files and directories seen so far.
    pub(super) files: u64,
    /// Block size in bytes.
    pub(super) block_size: u32,
    /// Longest name in bytes.
    pub(super) name_length: u32,
}

/// Where `lseek(2)` is to look.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Seek {
    Data,
    Hole,
}

/// Carries an answer of type `A` to whoever asked.
pub(super) trait Sink<A: ?Sized>: Send {
    /// Takes the right to answer; false if somebody else answered already.
    fn claim(&mut self) -> bool {
        true
    }

    /// Sends the answer.
    fn send(self: Box<Self>, answer: Result<&A, Errno>);
}

/// A request's answer, to be given once.
pub(super) struct Reply<A: ?Sized>(Option<Box<dyn Sink<A>>>);

impl<A: ?Sized> Reply<A> {
    /// Makes a reply that goes to `sink`.
    pub(super) fn new(sink: impl Sink<A> + 'static) -> Self {
        Self(Some(Box::new(sink)))
    }

    /// Takes the right to answer; false if it was answered already. For answers that leave something behind, which
    /// nobody would ever take back if they were not heard.
    pub(super) fn claim(&mut self) -> bool {
        self.0.as_mut().is_some_and(|sink| sink.claim())
    }

    /// Answers.
    pub(super) fn ok(mut self, answer: &A) {
        if let Some(sink) = self.0.take() {
            sink.send(Ok(answer));
        }
    }

    /// Answers with an error.
    pub(super) fn error(mut self, errno: Errno) {
        if let Some(sink) = self.0.take() {
            sink.send(Err(errno));
        }
    }
}

impl<A: ?Sized> Drop for Reply<A> {
    fn drop(&mut self) {
        if let Some(sink) = self.0.take() {
            sink.send(Err(Errno::IO));
        }
    }
}

/// Answers the requests of a mount.
///
/// Called by several threads at once. Inode 1 is the root.
pub(super) trait Handler: Send + Sync + 'static {
    fn lookup(&self, ctx: Ctx, parent: u64, name: &OsStr, reply: Reply<Timed>);
    fn getattr(&self, ctx: Ctx, inode: u64, reply: Reply<Timed>);
    /// Returns the target of a symbolic link.
    fn readlink(&self, ctx: Ctx, inode: u64, reply: Reply<[u8]>);
    fn open(&self, ctx: Ctx, inode: u64, access: Access, reply: Reply<Opened>);
    /// Answers at most `len` bytes from `offset`, fewer only at the end.
    fn read(&self, ctx: Ctx, handle: u64, offset: u64, len: u32, reply: Reply<[u8]>);
    /// Writes all of `bytes`. Asked only of who lets files be opened for it.
    fn write(&self, _ctx: Ctx, _handle: u64, _offset: u64, _bytes: &[u8], reply: Reply<()>) {
        reply.error(Errno::READ_ONLY);
    }
    fn lseek(&self, ctx: Ctx, handle: u64, offset: u64, seek: Seek, reply: Reply<u64>);
    /// Forgets an open file or directory.
    fn release(&self, handle: u64);
    fn opendir(&self, ctx: Ctx, inode: u64, reply: Reply<Opened>);
    /// Answers the entries from `offset` on (0 is the start), of which as many are sent as there is room for.
    fn readdir(&self, ctx: Ctx, handle: u64, offset: u64, reply: Reply<dyn Entries>);
    fn getxattr(&self, ctx: Ctx, inode: u64, name: &OsStr, reply: Reply<[u8]>);
    /// Answers the names, each followed by a zero byte.
    fn listxattr(&self, ctx: Ctx, inode: u64, reply: Reply<[u8]>);
    fn statfs(&self, ctx: Ctx, reply: Reply<Statfs>);
}

#[cfg(test)]
pub(super) mod tests {
    use std::sync::mpsc;

    use super::*;

    /// Sends each answer on, for a test to see.
    pub(in crate::mount) struct Recorder(pub(in crate::mount) mpsc::Sender<Result<u64, Errno>>);

    impl Sink<u64> for Recorder {
        fn send(self: Box<Self>, answer: Result<&u64, Errno>) {
            self.0.send(answer.copied()).unwrap();
        }
    }

    #[test]
    fn a_reply_answers_once_from_any_thread_and_says_io_error_when_dropped() {
        let (sender, receiver) = mpsc::channel();
        let reply = Reply::new(Recorder(sender.clone()));
        std::thread::spawn(move || reply.ok(&7)).join().unwrap();
        drop(Reply::new(Recorder(sender.clone())));
        Reply::new(Recorder(sender)).error(Errno::NOT_FOUND);
        assert_eq!(receiver.iter().collect::<Vec<_>>(), [Ok(7), Err(Errno::IO), Err(Errno::NOT_FOUND)]);
    }
}
