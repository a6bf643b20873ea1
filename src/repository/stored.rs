//! Backups of XO's configuration and of pool metadata: folders of files, shown as stored.
//!
//! ```text
//! xo-config-backups/<schedule>/<time>/          metadata.json, data.json or data
//! xo-pool-metadata-backups/<schedule>/<pool>/<time>/    metadata.json, data
//! ```

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};

use storage::{Entry, ObjectPath, Storage};

use super::catalog::Signature;
use super::crew::{Crew, Work};
use super::{BackupTime, CONFIG_FOLDER, POOL_FOLDER, Result};

/// Most sizes remembered; beyond, all are asked for again.
const SIZES_LIMIT: usize = 16 << 10;

/// A backup that is a folder of files.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoredBackup {
    /// What it belongs to: the schedule (configuration) or the pool (pool metadata), as the folder says.
    pub group: String,
    /// When it was made, as the folder says.
    pub time: BackupTime,
    /// Its folder.
    pub directory: ObjectPath,
    /// Its files by name, with their sizes in bytes as they read (decrypted).
    pub files: Vec<(String, u64)>,
}

/// The sizes of encrypted files, which only decrypting them tells.
#[derive(Default)]
pub(super) struct Sizes(Mutex<HashMap<ObjectPath, (Signature, u64)>>);

impl Sizes {
    /// Returns the size of a file as it reads.
    pub(super) fn size(&self, storage: &dyn Storage, path: &ObjectPath) -> storage::Result<u64> {
        let stat = storage.stat(path)?;
        if storage.capabilities().ranged_reads {
            return Ok(stat.size);
        }
        let signature = Signature::from(&stat);
        let lock = || self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, size)) = lock().get(path).filter(|(known, _)| *known == signature) {
            return Ok(*size);
        }
        let size = storage.open(path)?.stat()?.size;
        let mut sizes = lock();
        if sizes.len() >= SIZES_LIMIT {
            sizes.clear();
        }
        sizes.insert(path.clone(), (signature, size));
        Ok(size)
    }
}

pub(super) fn config_backups(storage: &dyn Storage, sizes: &Sizes) -> Result<Vec<StoredBackup>> {
    backups_in(storage, sizes, vec![ObjectPath::new(CONFIG_FOLDER)?])
}

pub(super) fn pool_backups(storage: &dyn Storage, sizes: &Sizes) -> Result<Vec<StoredBackup>> {
    backups_in(storage, sizes, folders(storage, &ObjectPath::new(POOL_FOLDER)?)?)
}

/// Returns the folders in `directory`; none if it does not exist.
fn folders(storage: &dyn Storage, directory: &ObjectPath) -> Result<Vec<ObjectPath>> {
    let is_shown = |entry: &Entry| entry.is_directory && !entry.name.starts_with('.');
    match storage.list(directory) {
        Ok(entries) => Ok(entries
            .iter()
            .filter(|entry| is_shown(entry))
            .map(|entry| directory.join(&entry.name))
            .collect::<storage::Result<_>>()?),
        Err(error) if error.kind() == storage::ErrorKind::NotFound => Ok(Vec::new()),
        Err(error) => Err(error.into()),
    }
}

/// Returns the backups below `parents`, whose folders are groups, whose folders are backups.
fn backups_in(storage: &dyn Storage, sizes: &Sizes, parents: Vec<ObjectPath>) -> Result<Vec<StoredBackup>> {
    let mut found = Vec::new();
    for parent in parents {
        for group in folders(storage, &parent)? {
            for directory in folders(storage, &group)? {
                if let Some(time) = BackupTime::parse(directory.file_name()) {
                    found.push((group.file_name().to_owned(), time, directory));
                }
            }
        }
    }
    found.sort();
    let backups = Crew::of(storage).each(Work::Folder, &found, |(group, time, directory)| {
        let files = files(storage, sizes, directory)?;
        Ok(files.map(|files| StoredBackup { group: group.clone(), time: *time, directory: directory.clone(), files }))
    });
    backups.into_iter().filter_map(Result::transpose).collect()
}

/// Returns the files of a backup; `None` if it was removed meanwhile.
fn files(storage: &dyn Storage, sizes: &Sizes, directory: &ObjectPath) -> Result<Option<Vec<(String, u64)>>> {
    let entries = match storage.list(directory) {
        Ok(entries) => entries,
        Err(error) if error.kind() == storage::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error.into()),
    };
    let mut files = Vec::with_capacity(entries.len());
    for entry in entries.into_iter().filter(|entry| !entry.is_directory && !entry.name.starts_with('.')) {
        let path = directory.join(&entry.name)?;
        match sizes.size(storage, &path) {
            Ok(size) => files.push((entry.name, size)),
            Err(error) if error.kind() == storage::ErrorKind::NotFound => {}
            Err(error) if error.kind() == storage::ErrorKind::Io => return Err(error.into()),
            // A file that does not decrypt, or may not be read, is shown with its stored size: reading it says what is
            // wrong. A link out of the repository is not shown.
            Err(_) => match storage.stat(&path) {
                Ok(stat) => files.push((entry.name, stat.size)),
                Err(error) if error.kind() == storage::ErrorKind::Io => return Err(error.into()),
                Err(_) => {}
            },
        }
    }
    files.sort();
    Ok(Some(files))
}
