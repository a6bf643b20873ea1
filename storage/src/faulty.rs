//! A decorator that delays, fails or stalls operations on demand, for tests of what stands above a storage.
//!
//! A rule says for each operation and path which fault it meets, if any; the rule can be changed at any time, and holds
//! for objects that are open already. Operations are counted when they begin.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::BorrowedFd;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use crate::write::MovesByPath;
use crate::{
    Capabilities, Entry, Error, ErrorKind, Existing, Mark, Moves, Object, ObjectPath, Result, Room, Stat, Storage,
    Stream, Synced, WritableObject, WritableStorage, WritableStream,
};

/// What is asked of a storage or of an open object.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Operation {
    /// [`Storage::open`] and [`Storage::open_stream`].
    Open,
    /// [`Storage::read`].
    Read,
    /// [`Storage::list`].
    List,
    /// [`Storage::stat`].
    Stat,
    /// [`Object::read_at`] and [`Stream::read`].
    ReadAt,
    /// [`Object::stat`].
    StatOpen,
    /// [`WritableStorage::write`] and [`WritableStorage::write_and_stat`].
    Write,
    /// [`WritableStorage::create`] and [`WritableStorage::create_stream`].
    Create,
    /// [`WritableStorage::open_to_write`].
    OpenToWrite,
    /// [`WritableStorage::create_directory`].
    CreateDirectory,
    /// [`WritableStorage::rename`], by the name it has before.
    Rename,
    /// [`WritableStorage::remove`] and [`WritableStorage::remove_directory`].
    Remove,
    /// [`WritableStorage::touch`] and [`WritableStorage::set_modified`].
    Touch,
    /// [`WritableStorage::sync`], [`WritableStorage::sync_trees`], [`WritableObject::sync`] and [`WritableStream::finish`].
    Sync,
    /// [`WritableStorage::room`].
    Room,
    /// [`WritableObject::write_at`], [`WritableObject::copy_from`], [`WritableObject::set_len`] and
    /// [`WritableStream::append`].
    WriteAt,
}

impl Operation {
    /// Whether it changes what is stored, or makes it durable.
    #[must_use]
    pub fn is_change(self) -> bool {
        match self {
            Self::Open | Self::Read | Self::List | Self::Stat | Self::ReadAt | Self::StatOpen | Self::Room => false,
            Self::Write
            | Self::Create
            | Self::OpenToWrite
            | Self::CreateDirectory
            | Self::Rename
            | Self::Remove
            | Self::Touch
            | Self::Sync
            | Self::WriteAt => true,
        }
    }
}

/// What happens to an operation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// It begins later.
    Delay(Duration),
    /// It fails with this kind.
    Error(ErrorKind),
    /// It fails with this error number of the operating system.
    Errno(i32),
    /// It begins only after [`FaultyStorage::release`].
    Stall,
    /// Of bytes to be written the first half is, then it fails with this error number; anything else just fails so.
    Half(i32),
    /// Of bytes that are read only the first half comes, as of a file that was cut short; anything else is as ever.
    Short,
}

type Rule = Box<dyn Fn(Operation, &ObjectPath) -> Option<Fault> + Send>;

/// A storage whose operations meet faults.
pub struct FaultyStorage<S: ?Sized = dyn Storage> {
    inner: Arc<S>,
    control: Arc<Control>,
}

/// What the storage and its open objects share.
struct Control {
    state: Mutex<State>,
    changed: Condvar,
}

struct State {
    rule: Rule,
    counts: BTreeMap<Operation, u64>,
    /// How often [`FaultyStorage::release`] was called: a stalled operation waits for a change.
    releases: u64,
    stalled: usize,
}

impl<S: Storage + ?Sized> FaultyStorage<S> {
    /// Decorates `inner`; nothing fails until a rule says so.
    #[must_use]
    pub fn new(inner: Arc<S>) -> Self {
        let state = State { rule: Box::new(|_, _| None), counts: BTreeMap::new(), releases: 0, stalled: 0 };
        Self { inner, control: Arc::new(Control { state: Mutex::new(state), changed: Condvar::new() }) }
    }

    /// Sets the rule. It is called under a lock and must not use this storage.
    pub fn set_rule(&self, rule: impl Fn(Operation, &ObjectPath) -> Option<Fault> + Send + 'static) {
        self.control.state().rule = Box::new(rule);
    }

    /// Removes the rule and lets go what is stalled.
    pub fn release(&self) {
        let mut state = self.control.state();
        state.rule = Box::new(|_, _| None);
        state.releases += 1;
        state.stalled = 0;
        drop(state);
        self.control.changed.notify_all();
    }

    /// Waits until `count` operations are stalled at once; false if that takes longer than `patience`.
    #[must_use]
    pub fn wait_for_stalled(&self, count: usize, patience: Duration) -> bool {
        let end = Instant::now() + patience;
        let mut state = self.control.state();
        while state.stalled < count {
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            state = self.control.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        true
    }

    /// Returns how many such operations began since the last [`FaultyStorage::reset_counts`].
    #[must_use]
    pub fn count(&self, operation: Operation) -> u64 {
        self.control.state().counts.get(&operation).copied().unwrap_or(0)
    }

    /// Returns how many operations of any kind began since the last [`FaultyStorage::reset_counts`].
    #[must_use]
    pub fn total(&self) -> u64 {
        self.control.state().counts.values().sum()
    }

    /// Starts counting anew.
    pub fn reset_counts(&self) {
        self.control.state().counts.clear();
    }
}

/// How much of what is read comes.
#[derive(PartialEq, Eq)]
enum Come {
    All,
    Half,
}

impl Control {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Counts an operation and lets it meet its fault.
    fn begin(&self, operation: Operation, act: &'static str, path: &ObjectPath) -> Result<()> {
        self.begin_or_half(operation, act, path, || {}).map(drop)
    }

    /// The same of a read of `len` bytes in an object; returns how many of them come.
    fn begin_read(&self, path: &ObjectPath, len: usize) -> Result<usize> {
        let come = self.begin_or_half(Operation::ReadAt, "read", path, || {})?;
        Ok(if come == Come::Half { len / 2 } else { len })
    }

    /// The same of a write, of which `half` does the first half.
    fn begin_or_half(
        &self,
        operation: Operation,
        act: &'static str,
        path: &ObjectPath,
        half: impl FnOnce(),
    ) -> Result<Come> {
        let mut state = self.state();
        *state.counts.entry(operation).or_default() += 1;
        match (state.rule)(operation, path) {
            None => Ok(Come::All),
            Some(Fault::Error(kind)) => Err(Error::new(kind, act, path, "a fault was asked for")),
            Some(Fault::Errno(number)) => Err(of_errno(number, act, path)),
            Some(Fault::Short) => Ok(Come::Half),
            Some(Fault::Half(number)) => {
                drop(state);
                half();
                Err(of_errno(number, act, path))
            }
            Some(Fault::Delay(delay)) => {
                drop(state);
                std::thread::sleep(delay);
                Ok(Come::All)
            }
            Some(Fault::Stall) => {
                let releases = state.releases;
                state.stalled += 1;
                self.changed.notify_all();
                while state.releases == releases {
                    state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
                }
                Ok(Come::All)
            }
        }
    }
}

fn of_errno(number: i32, act: &'static str, path: &ObjectPath) -> Error {
    Error::from_io(act, path, io::Error::from_raw_os_error(number))
}

impl<S: Storage + ?Sized> Storage for FaultyStorage<S> {
    fn open(&self, path: &ObjectPath) -> Result<Arc<dyn Object>> {
        self.control.begin(Operation::Open, "open", path)?;
        let inner = self.inner.open(path)?;
        Ok(Arc::new(FaultyObject { inner, path: path.clone(), control: Arc::clone(&self.control) }))
    }

    fn open_stream(&self, path: &ObjectPath) -> Result<Box<dyn Stream>> {
        self.control.begin(Operation::Open, "open", path)?;
        let inner = self.inner.open_stream(path)?;
        Ok(Box::new(FaultyStream { inner, path: path.clone(), control: Arc::clone(&self.control) }))
    }

    fn read(&self, path: &ObjectPath, limit: u64) -> Result<Vec<u8>> {
        let come = self.control.begin_or_half(Operation::Read, "read", path, || {})?;
        let mut bytes = self.inner.read(path, limit)?;
        if come == Come::Half {
            bytes.truncate(bytes.len() / 2);
        }
        Ok(bytes)
    }

    fn list(&self, path: &ObjectPath) -> Result<Vec<Entry>> {
        self.control.begin(Operation::List, "list", path)?;
        self.inner.list(path)
    }

    fn stat(&self, path: &ObjectPath) -> Result<Stat> {
        self.control.begin(Operation::Stat, "stat", path)?;
        self.inner.stat(path)
    }

    fn capabilities(&self) -> Capabilities {
        self.inner.capabilities()
    }

    fn describe(&self) -> String {
        self.inner.describe()
    }
}

struct FaultyObject {
    inner: Arc<dyn Object>,
    path: ObjectPath,
    control: Arc<Control>,
}

impl Object for FaultyObject {
    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<usize> {
        let len = self.control.begin_read(&self.path, buffer.len())?;
        self.inner.read_at(offset, &mut buffer[..len])
    }

    fn stat(&self) -> Result<Stat> {
        self.control.begin(Operation::StatOpen, "stat", &self.path)?;
        self.inner.stat()
    }

    fn local_file(&self) -> Option<BorrowedFd<'_>> {
        self.inner.local_file()
    }
}

/// A stream that is read, or one that is written.
struct FaultyStream<S: ?Sized> {
    inner: Box<S>,
    path: ObjectPath,
    control: Arc<Control>,
}

impl Stream for FaultyStream<dyn Stream> {
    fn size(&self) -> u64 {
        self.inner.size()
    }

    fn read(&mut self, buffer: &mut [u8]) -> Result<usize> {
        let len = self.control.begin_read(&self.path, buffer.len())?;
        self.inner.read(&mut buffer[..len])
    }
}

impl WritableStream for FaultyStream<dyn WritableStream> {
    fn append(&mut self, bytes: &[u8]) -> Result<()> {
        self.control.begin_or_half(Operation::WriteAt, "write", &self.path, || {
            let _ = self.inner.append(&bytes[..bytes.len() / 2]);
        })?;
        self.inner.append(bytes)
    }

    fn finish(self: Box<Self>) -> Result<()> {
        self.control.begin(Operation::Sync, "sync", &self.path)?;
        self.inner.finish()
    }
}

impl<S: WritableStorage + ?Sized + 'static> WritableStorage for FaultyStorage<S> {
    fn reader(self: Arc<Self>) -> Arc<dyn Storage> {
        self
    }

    fn write(&self, path: &ObjectPath, bytes: &[u8], existing: Existing) -> Result<()> {
        self.control.begin_or_half(Operation::Write, "write", path, || {
            let _ = self.inner.write(path, &bytes[..bytes.len() / 2], existing);
        })?;
        self.inner.write(path, bytes, existing)
    }

    fn write_and_stat(&self, path: &ObjectPath, bytes: &[u8], existing: Existing) -> Result<Stat> {
        self.control.begin_or_half(Operation::Write, "write", path, || {
            let _ = self.inner.write(path, &bytes[..bytes.len() / 2], existing);
        })?;
        self.inner.write_and_stat(path, bytes, existing)
    }

    fn create(&self, path: &ObjectPath) -> Result<Arc<dyn WritableObject>> {
        self.control.begin(Operation::Create, "create", path)?;
        let inner = self.inner.create(path)?;
        Ok(Arc::new(FaultyWriter { inner, path: path.clone(), control: Arc::clone(&self.control) }))
    }

    fn create_stream(&self, path: &ObjectPath) -> Result<Box<dyn WritableStream>> {
        self.control.begin(Operation::Create, "create", path)?;
        let inner = self.inner.create_stream(path)?;
        Ok(Box::new(FaultyStream { inner, path: path.clone(), control: Arc::clone(&self.control) }))
    }

    fn check_size(&self, path: &ObjectPath, size: u64) -> Result<()> {
        self.inner.check_size(path, size)
    }

    fn open_to_write(&self, path: &ObjectPath) -> Result<Arc<dyn WritableObject>> {
        self.control.begin(Operation::OpenToWrite, "open", path)?;
        let inner = self.inner.open_to_write(path)?;
        Ok(Arc::new(FaultyWriter { inner, path: path.clone(), control: Arc::clone(&self.control) }))
    }

    fn create_directory(&self, path: &ObjectPath) -> Result<()> {
        self.control.begin(Operation::CreateDirectory, "create", path)?;
        self.inner.create_directory(path)
    }

    fn rename(&self, from: &ObjectPath, to: &ObjectPath) -> Result<()> {
        self.control.begin(Operation::Rename, "rename", from)?;
        self.inner.rename(from, to)
    }

    fn moves<'a>(&'a self, from: &ObjectPath, to: &ObjectPath) -> Result<Box<dyn Moves + 'a>> {
        MovesByPath::begin(self, from, to)
    }

    fn remove(&self, path: &ObjectPath) -> Result<()> {
        self.control.begin(Operation::Remove, "remove", path)?;
        self.inner.remove(path)
    }

    fn remove_directory(&self, path: &ObjectPath) -> Result<()> {
        self.control.begin(Operation::Remove, "remove", path)?;
        self.inner.remove_directory(path)
    }

    fn touch(&self, path: &ObjectPath) -> Result<()> {
        self.control.begin(Operation::Touch, "touch", path)?;
        self.inner.touch(path)
    }

    fn set_modified(&self, path: &ObjectPath, modified: SystemTime) -> Result<()> {
        self.control.begin(Operation::Touch, "touch", path)?;
        self.inner.set_modified(path, modified)
    }

    fn sync(&self, path: &ObjectPath) -> Result<()> {
        self.control.begin(Operation::Sync, "sync", path)?;
        self.inner.sync(path)
    }

    fn mark(&self) -> Result<Mark> {
        self.inner.mark()
    }

    fn sync_trees(&self, paths: &[ObjectPath], what: Synced, since: &Mark) -> Result<()> {
        for path in paths {
            self.control.begin(Operation::Sync, "sync", path)?;
        }
        self.inner.sync_trees(paths, what, since)
    }

    fn is_immutable(&self, path: &ObjectPath) -> Result<bool> {
        self.control.begin(Operation::Stat, "stat", path)?;
        self.inner.is_immutable(path)
    }

    fn room(&self) -> Result<Room> {
        self.control.begin(Operation::Room, "ask the room of", &ObjectPath::root())?;
        self.inner.room()
    }
}

struct FaultyWriter {
    inner: Arc<dyn WritableObject>,
    path: ObjectPath,
    control: Arc<Control>,
}

impl Object for FaultyWriter {
    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<usize> {
        let len = self.control.begin_read(&self.path, buffer.len())?;
        self.inner.read_at(offset, &mut buffer[..len])
    }

    fn stat(&self) -> Result<Stat> {
        self.control.begin(Operation::StatOpen, "stat", &self.path)?;
        self.inner.stat()
    }

    fn local_file(&self) -> Option<BorrowedFd<'_>> {
        self.inner.local_file()
    }
}

impl WritableObject for FaultyWriter {
    fn write_at(&self, offset: u64, bytes: &[u8]) -> Result<()> {
        self.control.begin_or_half(Operation::WriteAt, "write", &self.path, || {
            let _ = self.inner.write_at(offset, &bytes[..bytes.len() / 2]);
        })?;
        self.inner.write_at(offset, bytes)
    }

    fn copy_from(&self, source: &dyn Object, from: u64, to: u64, len: u64) -> Result<u64> {
        self.control.begin_or_half(Operation::WriteAt, "write", &self.path, || {
            let _ = self.inner.copy_from(source, from, to, len / 2);
        })?;
        self.inner.copy_from(source, from, to, len)
    }

    fn set_len(&self, len: u64) -> Result<()> {
        self.control.begin(Operation::WriteAt, "write", &self.path)?;
        self.inner.set_len(len)
    }

    fn sync(&self) -> Result<()> {
        self.control.begin(Operation::Sync, "sync", &self.path)?;
        self.inner.sync()
    }
}
