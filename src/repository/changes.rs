//! Changes of a VM's folder: backups added, removed and rewritten, as far as that is metadata and listing cache.
//!
//! A backup exists when its metadata file does. XO believes the listing cache whatever the folder holds, so at no moment
//! may a cache be there that disagrees with it, also after a power cut:
//!
//! | change    | steps, each of them durable before the next |
//! |-----------|----------------------------------------------|
//! | add       | cache removed · metadata published · cache with the backup published |
//! | rewrite   | cache removed · metadata published in place of the old · cache with the new one published |
//! | remove    | cache without the backup published · metadata removed |
//!
//! So what may be seen is no cache, which XO then makes anew, and while a backup is being removed a cache that lacks it.
//! What was interrupted is done by asking for the same change again.
//!
//! A cache that disagrees already, or cannot be read, is not carried on. XO lists without a lock and may write a cache of
//! what it saw before: what is there in the end and is not what was written here is removed.
//!
//! Source: XO, `@xen-orchestra/backups/RemoteAdapter.mjs`.

use std::collections::BTreeSet;
use std::io::{Read, Write};

use flate2::{Compression, GzBuilder, read::MultiGzDecoder};
use indexmap::IndexMap;
use serde::Serialize;
use serde_json::value::{RawValue, to_raw_value};
use storage::{ObjectPath, Storage, UNPUBLISHED, WritableStorage, create_directories, publish, unless_gone};

use super::{BackupTime, Error, ErrorKind, METADATA_LIMIT, Result, VM_FOLDER, VmLock, cache};

#[cfg(test)]
mod tests;

/// A JSON object as it is written: its fields in their order, each value letter by letter.
///
/// What is not known of a metadata file, or is a number that no type here holds exactly, is so passed on unchanged.
pub type Document = IndexMap<String, Box<RawValue>>;

/// The entries of a listing cache, out of its text.
type Entries<'a> = IndexMap<String, &'a RawValue>;

/// The folder of a VM whose lock is held.
pub struct VmFolder<'a> {
    lock: &'a VmLock,
    path: ObjectPath,
}

impl<'a> VmFolder<'a> {
    /// Returns the folder of the VM that `lock` is of; it need not be there yet.
    ///
    /// # Errors
    /// None that a [`super::VmId`] allows.
    pub fn new(lock: &'a VmLock) -> Result<Self> {
        Ok(Self { lock, path: ObjectPath::new(VM_FOLDER)?.join(lock.vm().as_str())? })
    }

    /// Returns the metadata of a backup, to be changed and given to [`VmFolder::rewrite`].
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] if there is no such backup, [`ErrorKind::Damaged`] if it is no JSON object; else what the
    /// storage says.
    pub fn metadata(&self, time: BackupTime) -> Result<Document> {
        let path = self.metadata_path(time)?;
        document(&path, &self.storage().read(&path, METADATA_LIMIT)?)
    }

    /// Adds a backup, whose disks must be there and durable: when this returns, it exists and outlives a power cut.
    ///
    /// Asked for once more, of the same metadata, it does what may be left to do. A listing cache that cannot be written is
    /// no error: XO makes it anew.
    ///
    /// # Errors
    /// [`ErrorKind::Exists`] if another backup has that second, [`ErrorKind::Locked`] if the lock is lost,
    /// [`ErrorKind::Damaged`] if the metadata is no JSON object or too long; else what the storage says. After an error the
    /// backup may be there or not, so nothing it needs may be removed then.
    pub fn add(&self, time: BackupTime, metadata: &(impl Serialize + ?Sized)) -> Result<()> {
        let path = self.metadata_path(time)?;
        let stored = stored(&path, metadata)?;
        self.make()?;
        let mut names = self.names()?;
        if names.contains(path.file_name()) && !self.holds(&path, &stored)? {
            let message =
                format!("'{path}' is there already: two backups of a VM must differ in their second; try again");
            return Err(Error::new(ErrorKind::Exists, message));
        }
        let text = self.cache_text()?;
        // Of the first backup of a VM nothing is left out.
        let entries = match text.as_deref() {
            None if names.is_empty() => Some(Entries::new()),
            text => text.and_then(|text| self.entries(text)).filter(|entries| self.agrees(entries, &names)),
        };
        self.publish_metadata(&path, &stored)?;
        names.insert(path.file_name().to_owned());
        self.write_entry(&path, &stored, entries, &names);
        Ok(())
    }

    /// Gives a backup other metadata: XO's own, after a merge.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] if there is no such backup; else as for [`VmFolder::add`].
    pub fn rewrite(&self, time: BackupTime, metadata: &(impl Serialize + ?Sized)) -> Result<()> {
        let path = self.metadata_path(time)?;
        let stored = stored(&path, metadata)?;
        let names = self.names()?;
        if !names.contains(path.file_name()) {
            let message = format!("'{path}' does not exist: the metadata of a backup was expected");
            return Err(Error::new(ErrorKind::NotFound, message));
        }
        let text = self.cache_text()?;
        let entries =
            text.as_deref().and_then(|text| self.entries(text)).filter(|entries| self.agrees(entries, &names));
        self.publish_metadata(&path, &stored)?;
        self.write_entry(&path, &stored, entries, &names);
        Ok(())
    }

    /// Removes a backup; its disks stay, for who calls this. One that is gone already is no error.
    ///
    /// # Errors
    /// [`ErrorKind::Locked`] if the lock is lost; else what the storage says. The backup may then be there or not.
    pub fn remove(&self, time: BackupTime) -> Result<()> {
        let path = self.metadata_path(time)?;
        let mut names = match self.names() {
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
            names => names?,
        };
        names.remove(path.file_name());
        let text = self.cache_text()?;
        let entries = text.as_deref().and_then(|text| self.entries(text)).map(|mut entries| {
            entries.shift_remove(&cache_key(&path));
            entries
        });
        let packed = entries.filter(|entries| self.agrees(entries, &names)).as_ref().and_then(packed);
        match &packed {
            Some(packed) => self.publish_cache(packed)?,
            None => self.remove_cache()?,
        }
        self.lock.check()?;
        unless_gone(self.storage().remove(&path))?;
        self.storage().sync(&self.path)?;
        self.settle_cache(packed.as_deref(), &names);
        Ok(())
    }

    fn storage(&self) -> &dyn WritableStorage {
        &**self.lock.storage()
    }

    fn metadata_path(&self, time: BackupTime) -> Result<ObjectPath> {
        Ok(self.path.join(&format!("{}.json", time.stored()))?)
    }

    fn cache_path(&self) -> Result<ObjectPath> {
        Ok(self.path.join(cache::NAME)?)
    }

    /// Makes the folder where it is missing, and sees to it that it outlives a power cut.
    fn make(&self) -> Result<()> {
        self.lock.check()?;
        create_directories(self.storage(), &self.path)?;
        // It may have been made by one who died before this.
        let above = self.path.parent();
        self.storage().sync(&above)?;
        Ok(self.storage().sync(&above.parent())?)
    }

    /// Returns the names that XO takes for metadata, and removes what one left behind who died while publishing.
    fn names(&self) -> Result<BTreeSet<String>> {
        let mut names = BTreeSet::new();
        for entry in self.storage().list(&self.path)? {
            let unpublished = entry.name.strip_suffix(UNPUBLISHED).and_then(|name| name.strip_prefix('.'));
            if unpublished.is_some_and(|name| name.ends_with(".json") || name == cache::NAME) {
                self.lock.check()?;
                unless_gone(self.storage().remove(&self.path.join(&entry.name)?))?;
            } else if entry.name.ends_with(".json") && !entry.is_directory {
                names.insert(entry.name);
            }
        }
        Ok(names)
    }

    /// Whether a file holds these bytes.
    fn holds(&self, path: &ObjectPath, bytes: &[u8]) -> Result<bool> {
        match self.storage().read(path, METADATA_LIMIT) {
            Ok(found) => Ok(found == bytes),
            Err(error) if error.kind().is_unavailable() => Err(error.into()),
            Err(_) => Ok(false),
        }
    }

    /// Publishes metadata while no cache is there.
    fn publish_metadata(&self, path: &ObjectPath, stored: &[u8]) -> Result<()> {
        self.remove_cache()?;
        self.lock.check()?;
        Ok(publish(self.storage(), path, stored)?)
    }

    /// Removes the cache; one who died may have done so before, but not made it durable.
    ///
    /// # Errors
    /// [`ErrorKind::Locked`] if the lock is lost; else what the storage says.
    pub(crate) fn remove_cache(&self) -> Result<()> {
        self.lock.check()?;
        unless_gone(self.storage().remove(&self.cache_path()?))?;
        Ok(self.storage().sync(&self.path)?)
    }

    fn publish_cache(&self, packed: &[u8]) -> Result<()> {
        self.lock.check()?;
        Ok(publish(self.storage(), &self.cache_path()?, packed)?)
    }

    /// Says in what the listing cache of a VM's folder is wrong, where `names` are the metadata files there; `None` if it
    /// names these, and says of each what decides.
    ///
    /// # Errors
    /// What the storage says if it cannot be read for another reason than that it is damaged.
    pub(crate) fn fault_of_cache(
        storage: &(impl Storage + ?Sized),
        folder: &ObjectPath,
        names: &BTreeSet<String>,
    ) -> Result<Option<String>> {
        let Some(text) = cache_text(storage, &folder.join(cache::NAME)?)? else {
            return Ok(Some("cannot be unpacked".to_owned()));
        };
        let Some(entries) = entries(folder, &text) else { return Ok(Some("is none of this VM".to_owned())) };
        for name in names {
            let path = folder.join(name)?;
            let key = cache_key(&path);
            let Some(entry) = entries.get(&key) else { return Ok(Some(format!("lacks '{name}'"))) };
            let stored = match storage.read(&path, METADATA_LIMIT) {
                Ok(stored) => stored,
                Err(error) if error.kind().is_unavailable() => return Err(error.into()),
                // No cache is right or wrong about that.
                Err(_) => continue,
            };
            if let Some(field) = cache::difference(&key, &stored, entry) {
                return Ok(Some(format!("says of '{name}' another '{field}' than that file")));
            }
        }
        let is_more = entries.len() > names.len();
        Ok(is_more.then(|| format!("names {} backups, and {} are there", entries.len(), names.len())))
    }

    /// Returns the text of the cache; `None` if there is none, or none that can be read.
    fn cache_text(&self) -> Result<Option<Vec<u8>>> {
        cache_text(self.storage(), &self.cache_path()?)
    }

    /// Parses the text of a cache; `None` if it is none of this folder.
    fn entries<'t>(&self, text: &'t [u8]) -> Option<Entries<'t>> {
        entries(&self.path, text)
    }

    /// Whether a cache names exactly these files of the folder.
    fn agrees(&self, entries: &Entries, names: &BTreeSet<String>) -> bool {
        agrees(&self.path, entries, names)
    }

    /// Writes the cache anew with the entry of a backup that was published, if there was one that agreed.
    fn write_entry(&self, path: &ObjectPath, stored: &[u8], entries: Option<Entries>, names: &BTreeSet<String>) {
        let packed = entries.zip(entry(path, stored).ok()).and_then(|(mut entries, entry)| {
            entries.insert(cache_key(path), &entry);
            packed(&entries)
        });
        if let Some(Err(error)) = packed.as_ref().map(|packed| self.publish_cache(packed)) {
            tracing::warn!(%error, "listing cache not written; XO makes it anew");
        }
        self.settle_cache(packed.as_deref(), names);
    }

    /// Leaves the cache only if it is the one that was written and the folder holds what it says.
    ///
    /// The change is done by now, so nothing here makes it fail.
    fn settle_cache(&self, written: Option<&[u8]>, names: &BTreeSet<String>) {
        let settle = || {
            self.lock.check()?;
            let path = self.cache_path()?;
            let found = match self.storage().read(&path, cache::STORED_LIMIT) {
                Err(error) if error.kind() == storage::ErrorKind::NotFound => return Ok(()),
                Err(error) if error.kind().is_unavailable() => return Err(error.into()),
                found => found.ok(),
            };
            if found.is_some() && found.as_deref() == written && self.names()? == *names {
                // Not older than the folder, which its rename changed: else nobody here believes it.
                return Ok(self.storage().touch(&path)?);
            }
            self.remove_cache()
        };
        if let Err(error) = settle() {
            let error: Error = error;
            tracing::warn!(%error, "listing cache not looked at after a change");
        }
    }
}

/// Removes the folder of a disk in which there is none any more, nor anything else; Xen Orchestra calls it orphaned.
///
/// # Errors
/// What the storage says.
pub(crate) fn remove_empty_lineage(storage: &dyn WritableStorage, lineage: &ObjectPath) -> storage::Result<()> {
    let is_empty = match storage.list(lineage) {
        Err(error) if error.kind() == storage::ErrorKind::NotFound => return Ok(()),
        listed => listed?.iter().all(|entry| entry.is_directory && entry.name == "data"),
    };
    if is_empty {
        for folder in [&lineage.join("data")?, lineage] {
            match storage.remove_directory(folder) {
                Err(error) if matches!(error.kind(), storage::ErrorKind::NotEmpty | storage::ErrorKind::NotFound) => {}
                removed => removed?,
            }
        }
    }
    Ok(())
}

/// Returns the text of a cache; `None` if there is none, or none that can be read.
fn cache_text(storage: &(impl Storage + ?Sized), path: &ObjectPath) -> Result<Option<Vec<u8>>> {
    let packed = match storage.read(path, cache::STORED_LIMIT) {
        Ok(packed) => packed,
        Err(error) if error.kind().is_unavailable() => return Err(error.into()),
        Err(_) => return Ok(None),
    };
    let mut text = Vec::new();
    let unpacked = MultiGzDecoder::new(&*packed).take(cache::PLAIN_LIMIT).read_to_end(&mut text);
    Ok(unpacked.is_ok().then_some(text))
}

/// Parses the text of a cache; `None` if it is none of this folder.
fn entries<'t>(folder: &ObjectPath, text: &'t [u8]) -> Option<Entries<'t>> {
    let entries: Entries<'t> = serde_json::from_slice(text).ok()?;
    let prefix = format!("/{folder}/");
    entries.keys().all(|key| key.starts_with(&prefix)).then_some(entries)
}

/// Whether a cache names exactly these files of the folder.
fn agrees(folder: &ObjectPath, entries: &Entries, names: &BTreeSet<String>) -> bool {
    let key = |name: &String| format!("/{folder}/{name}");
    entries.len() == names.len() && names.iter().all(|name| entries.contains_key(&key(name)))
}

/// The key of a backup in the listing cache, by its metadata file.
fn cache_key(path: &ObjectPath) -> String {
    format!("/{path}")
}

/// Returns metadata as `JSON.stringify` writes it.
fn stored(path: &ObjectPath, metadata: &(impl Serialize + ?Sized)) -> Result<Vec<u8>> {
    let no_object = |reason: &str| {
        let message = format!("'{path}' cannot be written: its metadata is no JSON object: {reason}");
        Error::new(ErrorKind::Damaged, message)
    };
    let stored = serde_json::to_vec(metadata).map_err(|error| no_object(&error.to_string()))?;
    if !stored.starts_with(b"{") {
        return Err(no_object("another value was found"));
    }
    if stored.len() as u64 > METADATA_LIMIT {
        return Err(storage::Error::too_large("write", path, METADATA_LIMIT).into());
    }
    Ok(stored)
}

fn document(path: &ObjectPath, stored: &[u8]) -> Result<Document> {
    serde_json::from_slice(stored).map_err(|error| {
        Error::new(ErrorKind::Damaged, format!("'{path}' is damaged: a JSON object was expected: {error}"))
    })
}

/// Returns the entry of a backup in the cache, as XO makes it when it has written one.
fn entry(path: &ObjectPath, stored: &[u8]) -> Result<Box<RawValue>> {
    let broken = |error: serde_json::Error| Error::new(ErrorKind::Damaged, error.to_string());
    let mut fields = document(path, stored)?;
    for field in ["_filename", "id"] {
        fields.insert(field.to_owned(), to_raw_value(&cache_key(path)).map_err(broken)?);
    }
    to_raw_value(&fields).map_err(broken)
}

/// Returns a cache as it is stored, as Node's zlib packs it; `None` if it would be longer than is read.
fn packed(entries: &Entries) -> Option<Vec<u8>> {
    /// Unix, of RFC 1952.
    const OPERATING_SYSTEM: u8 = 3;
    let text = serde_json::to_vec(entries).ok().filter(|text| text.len() as u64 <= cache::PLAIN_LIMIT)?;
    let builder = GzBuilder::new().mtime(0).operating_system(OPERATING_SYSTEM);
    let mut encoder = builder.write(Vec::new(), Compression::new(6));
    let packed = encoder.write_all(&text).and_then(|()| encoder.finish()).ok()?;
    (packed.len() as u64 <= cache::STORED_LIMIT).then_some(packed)
}
