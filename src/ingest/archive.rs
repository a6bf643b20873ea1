//! The XVA of a full backup in one destination, from what announces it to its checksum.
//!
//! ```text
//! .<time>.xofs-ingest     the intent: what follows is being written
//! .<time>.xva.xofs-new    the bytes, synced, then renamed to
//! <time>.xva
//! <time>.xva.checksum     where the repository is not encrypted
//! <time>.json             the commit; then the intent is removed
//! ```
//!
//! All of it lies in the folder of the VM, where Xen Orchestra's cleaner removes what no metadata names, in any order: what is
//! left then is again one of these states.
//!
//! | intent | metadata of that time | then |
//! |--------|-----------------------|------|
//! | there  | names the XVA         | the backup is complete: the intent alone is removed |
//! | there  | none, nor another that names the XVA | XVA and checksum, then the intent are removed |
//! | there  | anything else         | nothing is removed |

use std::sync::{Arc, Mutex, PoisonError};

use storage::{
    Checksum, Existing, ObjectPath, UNPUBLISHED, WritableObject, WritableStorage, create_directories, publish,
    publish_rename,
};

use super::error::{Error, ErrorKind, Result};
use super::full::{WHOLE_AT_MOST, checksum_name};
use super::intent::{self, Fate, unless_gone};
use crate::repository::{self, Backup, BackupTime, Document, METADATA_LIMIT, Mode, VmLock};

/// The files of one full backup.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Archive {
    /// Of the VM.
    folder: ObjectPath,
    time: BackupTime,
}

/// Where the bytes of an XVA go while they come.
pub(super) enum Writing {
    /// To a file.
    File(Arc<dyn WritableObject>),
    /// To memory: what is encrypted is written as a whole.
    Memory(Mutex<Vec<u8>>),
}

impl Writing {
    /// Takes the bytes that follow those that it has, which end at `offset`.
    pub fn write_at(&self, offset: u64, bytes: &[u8]) -> storage::Result<()> {
        match self {
            Self::File(object) => object.write_at(offset, bytes),
            Self::Memory(all) => {
                all.lock().unwrap_or_else(PoisonError::into_inner).extend_from_slice(bytes);
                Ok(())
            }
        }
    }
}

impl Archive {
    /// Returns the names that a backup of `time` has in the `folder` of its VM; nothing is made.
    pub fn new(folder: ObjectPath, time: BackupTime) -> Self {
        Self { folder, time }
    }

    /// The name of the XVA.
    pub fn name(&self) -> String {
        format!("{}.xva", self.time.stored())
    }

    fn path(&self) -> Result<ObjectPath> {
        Ok(self.folder.join(&self.name())?)
    }

    fn unpublished(&self) -> Result<ObjectPath> {
        Ok(self.folder.join(&format!(".{}{UNPUBLISHED}", self.name()))?)
    }

    fn checksum(&self) -> Result<ObjectPath> {
        Ok(self.folder.join(&checksum_name(&self.name()))?)
    }

    /// Refuses an XVA of `size` bytes that the storage cannot take.
    ///
    /// # Errors
    /// [`ErrorKind::Usage`] if it is too long to be encrypted.
    pub fn check_size(storage: &dyn WritableStorage, size: u64) -> Result<()> {
        if storage.capabilities().ranged_reads || size <= WHOLE_AT_MOST {
            return Ok(());
        }
        let message = format!(
            "the XVA has {} MiB, and of one that is to be encrypted at most {} can be written yet: mirror it to a repository \
             that is not encrypted, or with Xen Orchestra",
            size.div_ceil(1 << 20),
            WHOLE_AT_MOST >> 20
        );
        Err(Error::new(ErrorKind::Usage, message))
    }

    /// Makes the folder of the VM, and sees to it that nothing has the names: what an intent stands for may be removed.
    ///
    /// # Errors
    /// [`repository::ErrorKind::Exists`] if something has; then nothing was announced.
    pub fn prepare(&self, storage: &dyn WritableStorage) -> Result<()> {
        create_directories(storage, &self.folder)?;
        let there = storage.list(&self.folder)?;
        for path in [self.path()?, self.unpublished()?, self.checksum()?] {
            if there.iter().any(|entry| entry.name == path.file_name()) {
                let message = format!(
                    "'{path}' is there already, though no backup has this time: 'xofs repair', or the next backup by Xen \
                     Orchestra, removes what no backup names"
                );
                return Err(repository::Error::new(repository::ErrorKind::Exists, message).into());
            }
        }
        Ok(())
    }

    /// Says durably that the XVA is about to be written.
    pub fn announce(&self, storage: &dyn WritableStorage) -> Result<()> {
        intent::announce(storage, &self.folder, self.time)
    }

    /// Begins to write it.
    pub fn create(&self, storage: &dyn WritableStorage) -> Result<Writing> {
        if !storage.capabilities().ranged_reads {
            return Ok(Writing::Memory(Mutex::default()));
        }
        Ok(Writing::File(storage.create(&self.unpublished()?)?))
    }

    /// Makes what was written durable, still under the name of what is not published.
    pub fn sync(&self, storage: &dyn WritableStorage, writing: Writing) -> Result<()> {
        let path = self.unpublished()?;
        match writing {
            Writing::File(object) => object.sync()?,
            Writing::Memory(all) => {
                let all = all.into_inner().unwrap_or_else(PoisonError::into_inner);
                storage.write(&path, &all, Existing::Refuse)?;
                storage.sync(&path)?;
            }
        }
        Ok(())
    }

    /// Gives it its name, and writes its checksum if the repository has such: one that is encrypted has none.
    ///
    /// # Errors
    /// [`repository::ErrorKind::Damaged`] if it has not `size` bytes there.
    pub fn publish(&self, storage: &dyn WritableStorage, checksum: Checksum, size: u64) -> Result<()> {
        let path = self.path()?;
        publish_rename(storage, &self.unpublished()?, &path)?;
        if !storage.capabilities().ranged_reads {
            return Ok(());
        }
        let found = storage.stat(&path)?.size;
        if found != size {
            let message = format!("'{path}' was written with {size} bytes and has {found}");
            return Err(repository::Error::new(repository::ErrorKind::Damaged, message).into());
        }
        Ok(publish(storage, &self.checksum()?, checksum.to_string().as_bytes())?)
    }

    /// Says durably that nothing is under way any more.
    pub fn conclude(&self, storage: &dyn WritableStorage) -> Result<()> {
        intent::conclude(storage, &self.folder, self.time)
    }

    /// Removes all that was written, and then the intent.
    pub fn remove(&self, storage: &dyn WritableStorage) -> Result<()> {
        let checksum = self.checksum()?;
        let hidden = self.folder.join(&format!(".{}{UNPUBLISHED}", checksum.file_name()))?;
        for path in [self.unpublished()?, self.path()?, hidden, checksum] {
            unless_gone(storage.remove(&path))?;
        }
        // The intent goes only after what it stands for.
        storage.sync(&self.folder)?;
        self.conclude(storage)
    }

    /// Says what is to become of what an intent names; `backups` are those of the VM.
    fn fate(&self, storage: &dyn WritableStorage, backups: &[Arc<Backup>]) -> Result<Fate> {
        let path = self.path()?;
        let metadata = self.folder.join(&format!("{}.json", self.time.stored()))?;
        if let Some(read) = unless_unavailable(storage.read(&metadata, METADATA_LIMIT))? {
            if read.is_none_or(|bytes| named_in(&bytes, &self.folder).as_ref() != Some(&path)) {
                let why = "its metadata is there, but does not name it, or cannot be read";
                return Ok(Fate::Unknown(why.to_owned()));
            }
            // One who was killed may not have come to make the metadata durable.
            storage.sync(&self.folder)?;
            return Ok(Fate::Complete);
        }
        for other in backups.iter().filter(|backup| backup.mode == Mode::Full) {
            let read = unless_unavailable(storage.read(&other.metadata, METADATA_LIMIT))?.flatten();
            if read.and_then(|bytes| named_in(&bytes, &self.folder)).as_ref() == Some(&path) {
                return Ok(Fate::Unknown(format!("the backup of {} has it", other.time)));
            }
        }
        Ok(Fate::Abandoned)
    }
}

/// Returns what was read, `None` within if it cannot be; `None` if nothing is there.
///
/// # Errors
/// What the storage says if that may pass.
fn unless_unavailable(read: storage::Result<Vec<u8>>) -> Result<Option<Option<Vec<u8>>>> {
    match read {
        Err(error) if error.kind() == storage::ErrorKind::NotFound => Ok(None),
        Err(error) if error.kind().is_unavailable() => Err(error.into()),
        read => Ok(Some(read.ok())),
    }
}

fn named_in(metadata: &[u8], folder: &ObjectPath) -> Option<ObjectPath> {
    named_by(&serde_json::from_slice(metadata).ok()?, folder)
}

/// Returns the XVA that metadata names, relative to the `folder` of the VM that it lies in.
pub(super) fn named_by(metadata: &Document, folder: &ObjectPath) -> Option<ObjectPath> {
    let name: String = serde_json::from_str(metadata.get("xva")?.get()).ok()?;
    folder.resolve(&name).ok()
}

/// Removes what runs left in the folder of a VM that died; `backups` are those of the VM. Returns what was left alone, and why.
///
/// # Errors
/// If the folder cannot be listed, something cannot be removed, or the lock is lost.
pub(super) fn recover(lock: &VmLock, folder: &ObjectPath, backups: &[Arc<Backup>]) -> Result<Vec<String>> {
    let storage = &**lock.storage();
    let entries = match storage.list(folder) {
        Err(error) if error.kind() == storage::ErrorKind::NotFound => return Ok(Vec::new()),
        listed => listed?,
    };
    let mut left_alone = Vec::new();
    for entry in entries {
        if intent::is_unpublished(&entry.name) {
            lock.check()?;
            unless_gone(storage.remove(&folder.join(&entry.name)?))?;
        }
        let Some(time) = intent::time_of(&entry.name) else { continue };
        let archive = Archive::new(folder.clone(), time);
        lock.check()?;
        match archive.fate(storage, backups)? {
            Fate::Complete => archive.conclude(storage)?,
            Fate::Abandoned => {
                tracing::info!(folder = %folder, %time, "removes what an ingest left that was ended");
                archive.remove(storage)?;
            }
            Fate::Unknown(why) => left_alone.push(format!("'{folder}/{}': {why}", entry.name)),
        }
    }
    Ok(left_alone)
}
