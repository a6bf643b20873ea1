//! What a run is about to write, so that the next one can remove it if this one dies.
//!
//! Once it is certain that nothing has the names of a new disk, and before a file of it is made, `.<time>.xofs-ingest` is
//! published in the disk's folder (its lineage). It is removed after the backup's metadata was published. Xen Orchestra leaves
//! names there alone that do not end in `.vhd`. (What announces an XVA is in the folder of the VM: `archive`.)
//!
//! | intent | metadata of that time | then |
//! |--------|-----------------------|------|
//! | there  | names the disk        | the backup is complete: the intent alone is removed |
//! | there  | none                  | alias, then data, then the intent are removed, and the folder if it is empty then |
//! | there  | anything else         | nothing is removed |
//!
//! What an intent stands for is removed only while the lock of the VM is held, and only if nothing can depend on it: no disk
//! of the lineage is newer, and no other alias leads to its data. An intent may outlive its backup: a merge may
//! since have put what it names to another use, and then one of these is so.

use storage::{
    ObjectPath, Storage, UNPUBLISHED, WritableStorage, create_directories, publish, remove_tree, unless_gone,
};
use vhd::{DIGESTS, digests_name};

use super::error::Result;
use crate::repository::{self, Backup, BackupTime, DiskSource, VmLock, remove_empty_lineage};

/// What an intent holds: enough for a person who finds it.
const TEXT: &[u8] = b"xofs ingest writes, or wrote, what has this time\n";
/// Longest alias that is read (bytes).
const ALIAS_LIMIT: u64 = 4096;

fn path_of(folder: &ObjectPath, time: BackupTime) -> Result<ObjectPath> {
    Ok(folder.join(&time.intent_name())?)
}

/// Says durably that something of that time is about to be written in a folder.
pub(super) fn announce(storage: &dyn WritableStorage, folder: &ObjectPath, time: BackupTime) -> Result<()> {
    Ok(publish(storage, &path_of(folder, time)?, TEXT)?)
}

/// Says durably that nothing of that time is under way any more.
pub(super) fn conclude(storage: &dyn WritableStorage, folder: &ObjectPath, time: BackupTime) -> Result<()> {
    unless_gone(storage.remove(&path_of(folder, time)?))?;
    Ok(storage.sync(folder)?)
}

/// Whether a file is an intent that was not published: nothing was done yet.
pub(super) fn is_unpublished(name: &str) -> bool {
    let hidden = name.strip_prefix('.').and_then(|name| name.strip_suffix(UNPUBLISHED));
    hidden.and_then(BackupTime::of_intent_name).is_some()
}

/// The names of one disk of a backup, in the folder of its lineage.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Names {
    /// `vdis/<job>/<vdi>` of the VM.
    pub lineage: ObjectPath,
    time: BackupTime,
}

impl Names {
    pub fn new(lineage: ObjectPath, time: BackupTime) -> Self {
        Self { lineage, time }
    }

    /// The alias of an exploded VHD.
    pub fn alias(&self) -> Result<ObjectPath> {
        Ok(self.lineage.join(&format!("{}.alias.vhd", self.time.stored()))?)
    }

    /// The folder of an exploded VHD.
    pub fn data(&self) -> Result<ObjectPath> {
        Ok(self.lineage.join("data")?.join(&format!("{}.vhd", self.time.stored()))?)
    }

    /// A VHD file.
    pub fn file(&self) -> Result<ObjectPath> {
        Ok(self.lineage.join(&format!("{}.vhd", self.time.stored()))?)
    }

    /// Makes the folders it needs, and sees to it that nothing has its names: what an intent stands for may be removed.
    ///
    /// # Errors
    /// [`repository::ErrorKind::Exists`] if something has; then nothing was announced.
    pub fn prepare(&self, storage: &dyn WritableStorage) -> Result<()> {
        let data = self.data()?;
        create_directories(storage, &data.parent())?;
        for path in [self.alias()?, self.file()?, data] {
            if storage.list(&path.parent())?.iter().any(|entry| entry.name == path.file_name()) {
                let message = format!("'{path}' is there already, though no backup has this time; try again");
                return Err(repository::Error::new(repository::ErrorKind::Exists, message).into());
            }
        }
        Ok(())
    }

    /// Says durably that the disk is about to be written.
    pub fn announce(&self, storage: &dyn WritableStorage) -> Result<()> {
        announce(storage, &self.lineage, self.time)
    }

    /// Says durably that nothing is under way any more.
    pub fn conclude(&self, storage: &dyn WritableStorage) -> Result<()> {
        conclude(storage, &self.lineage, self.time)
    }

    /// Removes all that was written, in the order in which nothing ever leads nowhere, and then the intent.
    pub fn remove(&self, storage: &dyn WritableStorage) -> Result<()> {
        let hidden = |name: &str| self.lineage.join(&format!(".{name}{UNPUBLISHED}"));
        let (alias, file) = (self.alias()?, self.file()?);
        let digests = self.lineage.join(&digests_name(file.file_name()))?;
        let unpublished = [alias.file_name(), file.file_name(), digests.file_name()].map(hidden);
        for name in unpublished {
            unless_gone(storage.remove(&name?))?;
        }
        for name in [alias, file, digests] {
            unless_gone(storage.remove(&name))?;
        }
        storage.sync(&self.lineage)?;
        let data = self.data()?;
        remove_tree(storage, &data)?;
        match storage.sync(&data.parent()) {
            Err(error) if error.kind() == storage::ErrorKind::NotFound => {}
            synced => synced?,
        }
        self.conclude(storage)?;
        // It was the first of its disk, or the others were forgotten meanwhile.
        Ok(remove_empty_lineage(storage, &self.lineage)?)
    }
}

/// Removes what runs left in the folder of a VM that died; `backups` are those of the VM. Returns what was left alone, and why.
///
/// # Errors
/// If a folder cannot be listed, something cannot be removed, or the lock is lost.
pub(super) fn recover(lock: &VmLock, folder: &ObjectPath, backups: &[std::sync::Arc<Backup>]) -> Result<Vec<String>> {
    let storage = &**lock.storage();
    let mut left_alone = Vec::new();
    for job in folders(storage, &folder.join("vdis")?)? {
        for lineage in folders(storage, &job)? {
            let names: Vec<String> = storage.list(&lineage)?.into_iter().map(|entry| entry.name).collect();
            for name in &names {
                let Some(hidden) = name.strip_prefix('.') else { continue };
                if is_unpublished(name) {
                    lock.check()?;
                    unless_gone(storage.remove(&lineage.join(name)?))?;
                }
                // Of a VHD file that Xen Orchestra removed, or gave another name.
                if hidden
                    .strip_suffix(DIGESTS)
                    .is_some_and(|file| file.ends_with(".vhd") && !names.iter().any(|name| name == file))
                {
                    lock.check()?;
                    unless_gone(storage.remove(&lineage.join(name)?))?;
                }
                let Some(time) = BackupTime::of_intent_name(name) else { continue };
                let disk = Names::new(lineage.clone(), time);
                lock.check()?;
                match disk.fate(storage, folder, backups, &names)? {
                    Fate::Complete => disk.conclude(storage)?,
                    Fate::Abandoned => {
                        tracing::info!(lineage = %lineage, %time, "removes what an ingest left that was ended");
                        disk.remove(storage)?;
                    }
                    Fate::Unknown(why) => left_alone.push(format!("'{lineage}/{name}': {why}")),
                }
            }
        }
    }
    Ok(left_alone)
}

/// What is to become of what an intent names.
pub(super) enum Fate {
    Complete,
    Abandoned,
    Unknown(String),
}

impl Names {
    fn fate(
        &self,
        storage: &dyn WritableStorage,
        folder: &ObjectPath,
        backups: &[std::sync::Arc<Backup>],
        there: &[String],
    ) -> Result<Fate> {
        let (alias, file, data) = (self.alias()?, self.file()?, self.data()?);
        let names_it = |backup: &Backup| {
            let is_it =
                |source: &DiskSource| matches!(source, DiskSource::Vhd(path) if *path == alias || *path == file);
            backup.disks.iter().any(|disk| is_it(&disk.source))
        };
        if backups.iter().any(|backup| names_it(backup)) {
            // One who was killed may not have come to make the metadata durable.
            storage.sync(folder)?;
            return Ok(Fate::Complete);
        }
        // The listing of backups may lack what has an odd name.
        let is_of_time = |name: &str| name.starts_with(&self.time.stored()) && name.ends_with(".json");
        if storage.list(folder)?.iter().any(|entry| is_of_time(&entry.name)) {
            return Ok(Fate::Unknown("its metadata is there, but does not name it, or cannot be read".to_owned()));
        }
        let disks = || there.iter().filter(|name| !name.starts_with('.') && name.ends_with(".vhd"));
        let (alias_name, file_name) = (alias.file_name(), file.file_name());
        if let Some(newer) = disks().find(|name| name.as_str() > alias_name.max(file_name)) {
            return Ok(Fate::Unknown(format!("'{newer}' is newer and may need it")));
        }
        for other in disks().filter(|name| vhd::is_alias(name) && *name != alias_name) {
            let target = match storage.read(&self.lineage.join(other)?, ALIAS_LIMIT) {
                Err(error) if error.kind().is_unavailable() => return Err(error.into()),
                read => read.ok().and_then(|text| self.lineage.resolve(String::from_utf8_lossy(&text).trim()).ok()),
            };
            if target.is_none_or(|target| target == data) {
                return Ok(Fate::Unknown(format!("'{other}' may lead to its data")));
            }
        }
        Ok(Fate::Abandoned)
    }
}

/// Returns the folders in a folder; none if it is not there.
fn folders(storage: &(impl Storage + ?Sized), path: &ObjectPath) -> Result<Vec<ObjectPath>> {
    let entries = match storage.list(path) {
        Err(error) if error.kind() == storage::ErrorKind::NotFound => return Ok(Vec::new()),
        listed => listed?,
    };
    let folders = entries.iter().filter(|entry| entry.is_directory).map(|entry| Ok(path.join(&entry.name)?));
    folders.collect()
}
