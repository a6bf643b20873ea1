//! The side of a storage that changes it.
//!
//! Apart from [`Storage`], so that what only reads is handed nothing it could write with. Two acts of which no step may be
//! left out stand here once: [`publish`] and [`publish_rename`].

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::SystemTime;

use crate::stream::into_object;
use crate::{ErrorKind, ObjectPath, Result, Stat, Storage, WritableStream};

/// What becomes of an object that has the name already.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Existing {
    /// It stays, and the operation fails with [`ErrorKind::Exists`].
    Refuse,
    /// Its bytes are replaced in place.
    Replace,
}

/// What is to outlive a power cut of a folder and all that is in it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Synced {
    /// Names and bytes.
    All,
    /// Names, which is enough where files were moved whose bytes are durable.
    Names,
}

/// A moment in what is written. Whoever writes much and syncs it at the end marks when it begins.
///
/// A system that writes later what it was given tells an error of that to whoever syncs next, and that once: so who syncs one thing
/// would hear of the loss of another, which then passes for written. Each mark is told of all errors since.
#[derive(Debug, Default)]
pub struct Mark(pub(crate) Option<OwnedFd>);

/// What is left of a place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Room {
    /// Bytes that may still be written.
    pub bytes: u64,
    /// Files and folders that may still be made; `None` where their number is not limited.
    pub inodes: Option<u64>,
}

impl Room {
    /// Whether so little is left that what has just failed may have failed for it: less than two blocks of 2 MiB, or eight files.
    #[must_use]
    pub fn is_full(self) -> bool {
        self.bytes < 4 << 20 || self.inodes.is_some_and(|left| left < 8)
    }
}

/// A storage that can be changed.
///
/// Every later call sees what a call did. Whether it outlives a power cut is another matter: bytes do once the object was
/// [synced](WritableStorage::sync), names (made, renamed, removed) once their folder was. Of what was not, any part may be
/// lost; only a rename is all or nothing even then. A file that is made holds nothing, some or all of its bytes while it is
/// written: what readers look for is made under another name and renamed.
pub trait WritableStorage: Storage {
    /// Returns it as those take it who only read.
    fn reader(self: Arc<Self>) -> Arc<dyn Storage>;

    /// Writes a whole object. The folder must be there.
    ///
    /// # Errors
    /// [`ErrorKind::Exists`] as `existing` says, [`ErrorKind::NoSpace`], or what the storage says; a new object may then
    /// hold a part of the bytes.
    fn write(&self, path: &ObjectPath, bytes: &[u8], existing: Existing) -> Result<()>;

    /// Writes a whole object as [`WritableStorage::write`] does, and returns what [`Storage::stat`] says of it then.
    ///
    /// # Errors
    /// As for [`WritableStorage::write`] and [`Storage::stat`].
    fn write_and_stat(&self, path: &ObjectPath, bytes: &[u8], existing: Existing) -> Result<Stat> {
        self.write(path, bytes, existing)?;
        self.stat(path)
    }

    /// Writes a whole object as [`WritableStorage::write`] does, and returns once its bytes would outlive a power cut.
    ///
    /// # Errors
    /// As for [`WritableStorage::write`] and [`WritableStorage::sync`].
    fn write_and_sync(&self, path: &ObjectPath, bytes: &[u8], existing: Existing) -> Result<()> {
        self.write(path, bytes, existing)?;
        self.sync(path)
    }

    /// Makes a new, empty object that is written in pieces.
    ///
    /// # Errors
    /// [`ErrorKind::Exists`] if the name is taken, [`ErrorKind::Unsupported`] where objects are encrypted as a whole; else
    /// what the storage says.
    fn create(&self, path: &ObjectPath) -> Result<Arc<dyn WritableObject>>;

    /// Makes a new object that is written from its beginning to its end, also where objects are encrypted as a whole.
    ///
    /// # Errors
    /// [`ErrorKind::Exists`] if the name is taken; else what the storage says.
    fn create_stream(&self, path: &ObjectPath) -> Result<Box<dyn WritableStream>> {
        Ok(into_object(self.create(path)?))
    }

    /// Refuses an object of `size` bytes that is too long to be written there.
    ///
    /// # Errors
    /// [`ErrorKind::TooLarge`].
    fn check_size(&self, _path: &ObjectPath, _size: u64) -> Result<()> {
        Ok(())
    }

    /// Opens an object that is there, to be changed in place.
    ///
    /// # Errors
    /// As for [`Storage::open`]; [`ErrorKind::Unsupported`] as for [`WritableStorage::create`].
    fn open_to_write(&self, path: &ObjectPath) -> Result<Arc<dyn WritableObject>>;

    /// Makes a folder. The one above must be there.
    ///
    /// # Errors
    /// [`ErrorKind::Exists`] if the name is taken; else what the storage says.
    fn create_directory(&self, path: &ObjectPath) -> Result<()>;

    /// Renames an object, which takes the place of a file of the name `to`; a folder moves with all it holds, and nothing
    /// may have its new name.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] if nothing is at `from` or no folder holds `to`; else what the storage says.
    fn rename(&self, from: &ObjectPath, to: &ObjectPath) -> Result<()>;

    /// Begins to move files from one folder to another, many of them: what is found of the folders is found once.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] if one of the folders is not there; else what the storage says.
    fn moves<'a>(&'a self, from: &ObjectPath, to: &ObjectPath) -> Result<Box<dyn Moves + 'a>>;

    /// Removes a file. What has it open keeps it.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`], [`ErrorKind::IsDirectory`], or what the storage says.
    fn remove(&self, path: &ObjectPath) -> Result<()>;

    /// Removes an empty folder.
    ///
    /// # Errors
    /// [`ErrorKind::NotEmpty`], [`ErrorKind::NotFound`], [`ErrorKind::NotDirectory`], or what the storage says.
    fn remove_directory(&self, path: &ObjectPath) -> Result<()>;

    /// Sets the time at which an object was last changed to now.
    ///
    /// # Errors
    /// As for [`Storage::stat`].
    fn touch(&self, path: &ObjectPath) -> Result<()>;

    /// Sets that time to `modified`, or to what the storage keeps of it: many cut off what is below their grain, which is
    /// 1 ns to 2 s.
    ///
    /// # Errors
    /// As for [`Storage::stat`]; [`ErrorKind::PermissionDenied`] also to who may touch it, but does not own it.
    fn set_modified(&self, path: &ObjectPath, modified: SystemTime) -> Result<()>;

    /// Returns once the bytes of a file, or the names in a folder, would outlive a power cut.
    ///
    /// # Errors
    /// What the storage says; then nothing is known of what was written since the last time.
    fn sync(&self, path: &ObjectPath) -> Result<()>;

    /// The same for several, in any order: at once where a server has to be asked for each.
    ///
    /// # Errors
    /// As for [`WritableStorage::sync`].
    fn sync_each(&self, paths: &[ObjectPath]) -> Result<()> {
        paths.iter().try_for_each(|path| self.sync(path))
    }

    /// Marks this moment, for [`WritableStorage::sync_tree`].
    ///
    /// # Errors
    /// What the storage says.
    fn mark(&self) -> Result<Mark>;

    /// The same for a folder and all that is in it, at any depth, which was written since a moment.
    ///
    /// # Errors
    /// As for [`WritableStorage::sync`]; also if anything at all that was written since could not be kept.
    fn sync_tree(&self, path: &ObjectPath, since: &Mark) -> Result<()> {
        self.sync_trees(std::slice::from_ref(path), Synced::All, since)
    }

    /// The same for several folders, or for `what` of them.
    ///
    /// # Errors
    /// As for [`WritableStorage::sync_tree`].
    fn sync_trees(&self, paths: &[ObjectPath], what: Synced, since: &Mark) -> Result<()>;

    /// Whether an object may be neither changed, renamed nor removed, by nobody, until that is lifted (`chattr +i`, or `+a`).
    ///
    /// # Errors
    /// As for [`Storage::stat`].
    fn is_immutable(&self, path: &ObjectPath) -> Result<bool>;

    /// Returns what is left of the place.
    ///
    /// # Errors
    /// What the storage says.
    fn room(&self) -> Result<Room>;
}

/// Moves files from one folder to another ([`WritableStorage::moves`]).
pub trait Moves {
    /// Moves a file, which keeps its name and takes the place of a file that has it there.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] if there is none; else what the storage says.
    fn rename(&self, name: &str) -> Result<()>;
}

/// Moves files by their paths, where there is nothing to be found once.
pub(crate) struct MovesByPath<'a, S> {
    storage: &'a S,
    from: ObjectPath,
    to: ObjectPath,
}

impl<'a, S: WritableStorage> MovesByPath<'a, S> {
    pub(crate) fn begin(storage: &'a S, from: &ObjectPath, to: &ObjectPath) -> Result<Box<dyn Moves + 'a>> {
        for folder in [from, to] {
            if storage.stat(folder)?.kind != crate::Kind::Directory {
                return Err(crate::Error::new(ErrorKind::NotDirectory, "rename", folder, "a folder was expected"));
            }
        }
        Ok(Box::new(Self { storage, from: from.clone(), to: to.clone() }))
    }
}

impl<S: WritableStorage> Moves for MovesByPath<'_, S> {
    fn rename(&self, name: &str) -> Result<()> {
        self.storage.rename(&self.from.join(name)?, &self.to.join(name)?)
    }
}

/// Bytes of a copy that are in memory at a time.
const COPIED_AT_ONCE: u64 = 1 << 20;

/// An object that is open to be changed in place. Those who read it see each change at once.
pub trait WritableObject: crate::Object {
    /// Writes `bytes` at `offset`; a gap behind the end reads as zeroes.
    ///
    /// # Errors
    /// [`ErrorKind::NoSpace`], or what the storage says; some of the bytes may then be written.
    fn write_at(&self, offset: u64, bytes: &[u8]) -> Result<()>;

    /// Writes at `to` the `len` bytes at `from` of another object; returns how many there were, less than asked only if that
    /// one ends before. Where the system can, they never come into this process, or are not even copied.
    ///
    /// # Errors
    /// As for [`WritableObject::write_at`], and what the storage says of `source`.
    fn copy_from(&self, source: &dyn crate::Object, from: u64, to: u64, len: u64) -> Result<u64> {
        copy_in_pieces(self, source, from, to, len)
    }

    /// Makes it `len` bytes long.
    ///
    /// # Errors
    /// What the storage says.
    fn set_len(&self, len: u64) -> Result<()>;

    /// Returns once its bytes would outlive a power cut.
    ///
    /// # Errors
    /// As for [`WritableStorage::sync`].
    fn sync(&self) -> Result<()>;
}

/// Copies by reading and writing.
pub(crate) fn copy_in_pieces<O: WritableObject + ?Sized>(
    object: &O,
    source: &dyn crate::Object,
    from: u64,
    to: u64,
    len: u64,
) -> Result<u64> {
    let mut buffer = vec![0; usize::try_from(len.min(COPIED_AT_ONCE)).expect("bounded by COPIED_AT_ONCE")];
    let mut done = 0;
    while done < len {
        let wanted = usize::try_from(len - done).unwrap_or(usize::MAX).min(buffer.len());
        let read = source.read_at(from + done, &mut buffer[..wanted])?;
        object.write_at(to + done, &buffer[..read])?;
        done += read as u64;
        if read < wanted {
            break;
        }
    }
    Ok(done)
}

/// The end of the names that [`publish`] writes under; whoever finds one may remove it while nobody else writes.
pub const UNPUBLISHED: &str = ".xofs-new";

/// Makes a file appear with all its bytes, or take the place of another, and outlive a power cut from then on.
///
/// It is written under another name, synced, and renamed; then its folder is synced. At any moment its name stands for the
/// old bytes or for the new ones.
///
/// # Errors
/// What the storage says; the name may then stand for either, and may not outlive a power cut.
pub fn publish(storage: &dyn WritableStorage, path: &ObjectPath, bytes: &[u8]) -> Result<()> {
    let folder = path.parent();
    let unpublished = folder.join(&format!(".{}{UNPUBLISHED}", path.file_name()))?;
    if let Err(error) = storage.write_and_sync(&unpublished, bytes, Existing::Replace) {
        // A part of it is of no use to anybody; that it cannot be removed either is not what went wrong.
        let _ = storage.remove(&unpublished);
        return Err(error);
    }
    publish_rename(storage, &unpublished, path)
}

/// Renames an object, and sees to it that this outlives a power cut.
///
/// # Errors
/// What the storage says; the object may then have either name, and another one after a power cut.
pub fn publish_rename(storage: &dyn WritableStorage, from: &ObjectPath, to: &ObjectPath) -> Result<()> {
    storage.rename(from, to)?;
    storage.sync(&to.parent())?;
    if from.parent() == to.parent() { Ok(()) } else { storage.sync(&from.parent()) }
}

/// Makes a folder and those above it, as far as they are missing, and sees to it that they outlive a power cut: also those
/// that are there because somebody made them and did not come to sync them.
///
/// # Errors
/// [`ErrorKind::NotDirectory`] if a file is in the way; else what the storage says.
pub fn create_directories(storage: &dyn WritableStorage, path: &ObjectPath) -> Result<()> {
    let mut folder = ObjectPath::root();
    for name in path.components() {
        let above = folder;
        folder = above.join(name)?;
        match storage.create_directory(&folder) {
            Err(error) if error.kind() == ErrorKind::Exists => {
                if storage.stat(&folder)?.kind != crate::Kind::Directory {
                    let reason = "a file is where a folder is needed";
                    return Err(crate::Error::new(ErrorKind::NotDirectory, "create", &folder, reason));
                }
            }
            made => made?,
        }
        storage.sync(&above)?;
    }
    Ok(())
}

/// Returns what removing something gave, where it is as well if it was gone already.
///
/// # Errors
/// What the storage says but that.
pub fn unless_gone(removed: Result<()>) -> Result<()> {
    match removed {
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

/// Removes a file or a folder with all that is in it. What is gone already is no error.
///
/// # Errors
/// What the storage says; then a part may be gone.
pub fn remove_tree(storage: &dyn WritableStorage, path: &ObjectPath) -> Result<()> {
    match storage.remove(path) {
        Err(error) if error.kind() == ErrorKind::IsDirectory => {}
        other => return unless_gone(other),
    }
    // Each of the folders that are left to remove, those in it after it.
    let mut folders = vec![path.clone()];
    let mut at = 0;
    while let Some(folder) = folders.get(at).cloned() {
        at += 1;
        let entries = match storage.list(&folder) {
            Err(error) if error.kind() == ErrorKind::NotFound => continue,
            other => other?,
        };
        for entry in entries {
            let path = folder.join(&entry.name)?;
            match storage.remove(&path) {
                Err(error) if error.kind() == ErrorKind::IsDirectory => folders.push(path),
                other => unless_gone(other)?,
            }
        }
    }
    folders.iter().rev().try_for_each(|folder| unless_gone(storage.remove_directory(folder)))
}
