//! A storage whose acts are stages: what a merge does is told apart by what it asks of the place.

use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::time::SystemTime;

use storage::{
    Capabilities, Entry, Existing, Mark, Moves, Object, ObjectPath, Result, Room, Stat, Storage, Stream, Synced,
    WritableObject, WritableStorage, WritableStream,
};

use super::{Crew, Probe, Small, Stage, Subject, Transfer, Way};

/// A storage whose acts are counted, each by itself.
pub struct CountedStorage {
    storage: Arc<dyn WritableStorage>,
    acts: Acts,
}

#[derive(Clone)]
struct Acts {
    read: Arc<Probe>,
    write: Arc<Probe>,
    moved: Arc<Probe>,
    sync: Arc<Probe>,
    remove: Arc<Probe>,
}

impl CountedStorage {
    /// Takes the storage of a repository.
    pub fn new(storage: Arc<dyn WritableStorage>, transfer: &Transfer, of: &Subject) -> Self {
        let act = |stage| transfer.stage(stage, of, Crew::Own, Way::Only);
        let acts = Acts {
            read: act(Stage::Read),
            write: act(Stage::Write),
            moved: act(Stage::Move),
            sync: act(Stage::Sync),
            remove: act(Stage::Delete),
        };
        Self { storage, acts }
    }
}

/// Counts an act that moves nothing of a known length.
fn act<T>(probe: &Probe, act: impl FnOnce() -> Result<T>) -> Result<T> {
    let done = probe.work(act)?;
    probe.add(0);
    Ok(done)
}

impl Storage for CountedStorage {
    fn open(&self, path: &ObjectPath) -> Result<Arc<dyn Object>> {
        let object = self.acts.read.work(|| self.storage.open(path))?;
        Ok(Arc::new(CountedObject { object, read: self.acts.read.clone() }))
    }

    fn open_stream(&self, path: &ObjectPath) -> Result<Box<dyn Stream>> {
        self.acts.read.work(|| self.storage.open_stream(path))
    }

    fn read(&self, path: &ObjectPath, limit: u64) -> Result<Vec<u8>> {
        let bytes = self.acts.read.work(|| self.storage.read(path, limit))?;
        self.acts.read.add(bytes.len());
        Ok(bytes)
    }

    fn list(&self, path: &ObjectPath) -> Result<Vec<Entry>> {
        self.acts.read.work(|| self.storage.list(path))
    }

    fn stat(&self, path: &ObjectPath) -> Result<Stat> {
        self.acts.read.work(|| self.storage.stat(path))
    }

    fn capabilities(&self) -> Capabilities {
        self.storage.capabilities()
    }

    fn describe(&self) -> String {
        self.storage.describe()
    }
}

impl WritableStorage for CountedStorage {
    fn reader(self: Arc<Self>) -> Arc<dyn Storage> {
        self
    }

    fn write(&self, path: &ObjectPath, bytes: &[u8], existing: Existing) -> Result<()> {
        self.acts.write.work(|| self.storage.write(path, bytes, existing))?;
        self.acts.write.add(bytes.len());
        Ok(())
    }

    fn write_and_stat(&self, path: &ObjectPath, bytes: &[u8], existing: Existing) -> Result<Stat> {
        let stat = self.acts.write.work(|| self.storage.write_and_stat(path, bytes, existing))?;
        self.acts.write.add(bytes.len());
        Ok(stat)
    }

    fn write_and_sync(&self, path: &ObjectPath, bytes: &[u8], existing: Existing) -> Result<()> {
        self.acts.sync.work(|| self.storage.write_and_sync(path, bytes, existing))?;
        self.acts.sync.add(bytes.len());
        Ok(())
    }

    fn create(&self, path: &ObjectPath) -> Result<Arc<dyn WritableObject>> {
        let object = self.acts.write.work(|| self.storage.create(path))?;
        Ok(Arc::new(CountedWriting { object, acts: self.acts.clone() }))
    }

    fn create_stream(&self, path: &ObjectPath) -> Result<Box<dyn WritableStream>> {
        self.acts.write.work(|| self.storage.create_stream(path))
    }

    fn check_size(&self, path: &ObjectPath, size: u64) -> Result<()> {
        self.storage.check_size(path, size)
    }

    fn open_to_write(&self, path: &ObjectPath) -> Result<Arc<dyn WritableObject>> {
        let object = self.acts.write.work(|| self.storage.open_to_write(path))?;
        Ok(Arc::new(CountedWriting { object, acts: self.acts.clone() }))
    }

    fn create_directory(&self, path: &ObjectPath) -> Result<()> {
        act(&self.acts.write, || self.storage.create_directory(path))
    }

    fn rename(&self, from: &ObjectPath, to: &ObjectPath) -> Result<()> {
        act(&self.acts.moved, || self.storage.rename(from, to))
    }

    fn moves<'a>(&'a self, from: &ObjectPath, to: &ObjectPath) -> Result<Box<dyn Moves + 'a>> {
        let moved = &*self.acts.moved;
        let moves = moved.work(|| self.storage.moves(from, to))?;
        Ok(Box::new(CountedMoves { moves, moved: Small::new(moved) }))
    }

    fn remove(&self, path: &ObjectPath) -> Result<()> {
        act(&self.acts.remove, || self.storage.remove(path))
    }

    fn remove_directory(&self, path: &ObjectPath) -> Result<()> {
        act(&self.acts.remove, || self.storage.remove_directory(path))
    }

    fn touch(&self, path: &ObjectPath) -> Result<()> {
        self.storage.touch(path)
    }

    fn set_modified(&self, path: &ObjectPath, modified: SystemTime) -> Result<()> {
        self.storage.set_modified(path, modified)
    }

    fn sync(&self, path: &ObjectPath) -> Result<()> {
        act(&self.acts.sync, || self.storage.sync(path))
    }

    fn sync_each(&self, paths: &[ObjectPath]) -> Result<()> {
        act(&self.acts.sync, || self.storage.sync_each(paths))
    }

    fn mark(&self) -> Result<Mark> {
        self.storage.mark()
    }

    fn sync_tree(&self, path: &ObjectPath, since: &Mark) -> Result<()> {
        act(&self.acts.sync, || self.storage.sync_tree(path, since))
    }

    fn sync_trees(&self, paths: &[ObjectPath], what: Synced, since: &Mark) -> Result<()> {
        act(&self.acts.sync, || self.storage.sync_trees(paths, what, since))
    }

    fn is_immutable(&self, path: &ObjectPath) -> Result<bool> {
        self.acts.read.work(|| self.storage.is_immutable(path))
    }

    fn room(&self) -> Result<Room> {
        self.storage.room()
    }
}

struct CountedMoves<'a> {
    moves: Box<dyn Moves + 'a>,
    moved: Small<'a>,
}

impl Moves for CountedMoves<'_> {
    fn rename(&self, name: &str) -> Result<()> {
        self.moved.work(|| self.moves.rename(name))
    }
}

struct CountedObject {
    object: Arc<dyn Object>,
    read: Arc<Probe>,
}

impl Object for CountedObject {
    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<usize> {
        let read = self.read.work(|| self.object.read_at(offset, buffer))?;
        self.read.add(read);
        Ok(read)
    }

    fn stat(&self) -> Result<Stat> {
        self.read.work(|| self.object.stat())
    }

    fn local_file(&self) -> Option<BorrowedFd<'_>> {
        self.object.local_file()
    }
}

struct CountedWriting {
    object: Arc<dyn WritableObject>,
    acts: Acts,
}

impl Object for CountedWriting {
    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<usize> {
        let read = self.acts.read.work(|| self.object.read_at(offset, buffer))?;
        self.acts.read.add(read);
        Ok(read)
    }

    fn stat(&self) -> Result<Stat> {
        self.acts.read.work(|| self.object.stat())
    }

    fn local_file(&self) -> Option<BorrowedFd<'_>> {
        self.object.local_file()
    }
}

impl WritableObject for CountedWriting {
    fn write_at(&self, offset: u64, bytes: &[u8]) -> Result<()> {
        self.acts.write.work(|| self.object.write_at(offset, bytes))?;
        self.acts.write.add(bytes.len());
        Ok(())
    }

    fn copy_from(&self, source: &dyn Object, from: u64, to: u64, len: u64) -> Result<u64> {
        let copied = self.acts.moved.work(|| self.object.copy_from(source, from, to, len))?;
        self.acts.moved.add(usize::try_from(copied).unwrap_or(usize::MAX));
        Ok(copied)
    }

    fn set_len(&self, len: u64) -> Result<()> {
        self.acts.write.work(|| self.object.set_len(len))
    }

    fn sync(&self) -> Result<()> {
        act(&self.acts.sync, || self.object.sync())
    }
}
