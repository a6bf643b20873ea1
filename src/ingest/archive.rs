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
//! | none   | none                  | nothing is removed, and a mirror of that time is refused |

use storage::{
    Checksum, ObjectPath, UNPUBLISHED, WritableStorage, WritableStream, create_directories, publish, publish_rename,
    unless_gone,
};

use super::error::{Error, ErrorKind, Result};
use super::intent::{self, Fate};
use super::xva_source::{checksum_name, is_encrypted};
use crate::repository::{self, BackupTime, Document, METADATA_LIMIT, VmLock};

/// The files of one full backup.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Archive {
    /// Of the VM.
    folder: ObjectPath,
    time: BackupTime,
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
    /// [`ErrorKind::Usage`] if it is too long for the encryption.
    pub fn check_size(&self, storage: &dyn WritableStorage, size: u64) -> Result<()> {
        storage.check_size(&self.path()?, size).map_err(|error| match error.kind() {
            storage::ErrorKind::TooLarge => {
                let message = format!("{error}: mirror it to a repository of another encryption, or of none");
                Error::new(ErrorKind::Usage, message)
            }
            _ => error.into(),
        })
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

    /// Begins to write it, under the name of what is not published.
    pub fn create(&self, storage: &dyn WritableStorage) -> Result<Box<dyn WritableStream>> {
        Ok(storage.create_stream(&self.unpublished()?)?)
    }

    /// Gives it its name, and writes its checksum if the repository has such: one that is encrypted has none.
    ///
    /// # Errors
    /// [`repository::ErrorKind::Damaged`] if it has not `size` bytes there.
    pub fn publish(&self, storage: &dyn WritableStorage, checksum: Checksum, size: u64) -> Result<()> {
        let path = self.path()?;
        publish_rename(storage, &self.unpublished()?, &path)?;
        // Of one that is encrypted only the first bytes are read.
        let found = storage.open_stream(&path)?.size();
        if found != size {
            let message = format!("'{path}' was written with {size} bytes and has {found}");
            return Err(repository::Error::new(repository::ErrorKind::Damaged, message).into());
        }
        if is_encrypted(storage.capabilities()) {
            return Ok(());
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

    /// Says what is to become of what an intent names; `names` are those in the folder.
    fn fate(&self, storage: &dyn WritableStorage, names: &[String]) -> Result<Fate> {
        let (path, own) = (self.path()?, format!("{}.json", self.time.stored()));
        let others = names.iter().filter(|name| name.ends_with(".json") && **name != own);
        for name in std::iter::once(&own).chain(others) {
            let document: Option<Document> = match storage.read(&self.folder.join(name)?, METADATA_LIMIT) {
                Ok(bytes) => serde_json::from_slice(&bytes).ok(),
                Err(error) if error.kind().is_unavailable() => return Err(error.into()),
                Err(error) if error.kind() == storage::ErrorKind::NotFound && !names.contains(name) => continue,
                Err(_) => None,
            };
            let Some(document) = document else {
                return Ok(Fate::Unknown(format!("'{name}' cannot be read, and may name it")));
            };
            match named_by(&document, &self.folder) == Some(path.clone()) {
                true if *name == own => {
                    // One who was killed may not have come to make the metadata durable.
                    storage.sync(&self.folder)?;
                    return Ok(Fate::Complete);
                }
                true => return Ok(Fate::Unknown(format!("'{name}' names it"))),
                false if *name == own => {
                    return Ok(Fate::Unknown("its metadata is there, but does not name it".into()));
                }
                false => {}
            }
        }
        Ok(Fate::Abandoned)
    }
}

/// Returns the XVA that metadata names, relative to the `folder` of the VM that it lies in.
pub(super) fn named_by(metadata: &Document, folder: &ObjectPath) -> Option<ObjectPath> {
    let name: String = serde_json::from_str(metadata.get("xva")?.get()).ok()?;
    folder.resolve(&name).ok()
}

/// Removes what runs left in the folder of a VM that died. Returns what was left alone, and why.
///
/// # Errors
/// If the folder cannot be listed, something cannot be removed, or the lock is lost.
pub(super) fn recover(lock: &VmLock, folder: &ObjectPath) -> Result<Vec<String>> {
    let storage = &**lock.storage();
    let entries = match storage.list(folder) {
        Err(error) if error.kind() == storage::ErrorKind::NotFound => return Ok(Vec::new()),
        listed => listed?,
    };
    let names: Vec<String> = entries.into_iter().map(|entry| entry.name).collect();
    let mut left_alone = Vec::new();
    for name in &names {
        if intent::is_unpublished(name) {
            lock.check()?;
            unless_gone(storage.remove(&folder.join(name)?))?;
        }
        let Some(time) = BackupTime::of_intent_name(name) else { continue };
        let archive = Archive::new(folder.clone(), time);
        lock.check()?;
        match archive.fate(storage, &names)? {
            Fate::Complete => archive.conclude(storage)?,
            Fate::Abandoned => {
                tracing::info!(folder = %folder, %time, "removes what an ingest left that was ended");
                archive.remove(storage)?;
            }
            Fate::Unknown(why) => left_alone.push(format!("'{folder}/{}': {why}", name)),
        }
    }
    Ok(left_alone)
}
