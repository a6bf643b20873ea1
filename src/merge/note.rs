//! What goes with the backups that are forgotten: written down before the first of them goes, since afterwards nothing would say
//! that it was to go, and removed with what it names.
//!
//! Disks that are to be merged are among it: of a run that dies before it begins to merge, the next one may have nothing left to
//! merge them into.
//!
//! `.<vm>.xofs-forget`, beside the folder of the VM, is JSON: `disks` with what their names lead to, and `files`, all paths
//! relative to that folder. In the folder itself Xen Orchestra's cleaner removes what it does not know.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};
use storage::{ObjectPath, Storage, WritableStorage, publish};

use crate::repository::{Error, ErrorKind, Result};

/// Returns where it is written down for the VM of a `folder`.
pub(crate) fn note_of(folder: &ObjectPath) -> ObjectPath {
    folder.parent().join(&format!(".{}.xofs-forget", folder.file_name())).expect("what follows a name makes a name")
}

/// Longest one that is read (bytes): a path has some 120 bytes.
const LIMIT: u64 = 16 << 20;

/// What goes.
#[derive(Debug, Default)]
pub(super) struct Note {
    /// Disks of backups that went, or were about to go, and what their names lead to.
    pub disks: BTreeMap<ObjectPath, ObjectPath>,
    /// XVAs of such backups, and their checksums.
    pub files: BTreeSet<ObjectPath>,
    /// Whether something is written down.
    is_written: bool,
}

#[derive(Serialize, Deserialize)]
struct Stored {
    disks: BTreeMap<String, String>,
    files: BTreeSet<String>,
}

impl Note {
    /// Reads what a run left in the `folder` of a VM that died; nothing if there is nothing.
    ///
    /// # Errors
    /// [`ErrorKind::Damaged`] if it makes no sense, or names what is not in the folder; else what the storage says.
    pub fn read(storage: &dyn Storage, folder: &ObjectPath) -> Result<Self> {
        let path = note_of(folder);
        let damaged = |why: String| {
            let message = format!(
                "'{path}' says what was to go with forgotten backups, and cannot be understood: {why}; 'xofs repair' moves \
                 it away"
            );
            Error::new(ErrorKind::Damaged, message)
        };
        let bytes = match storage.read(&path, LIMIT) {
            Err(error) if error.kind() == storage::ErrorKind::NotFound => return Ok(Self::default()),
            Err(error) if error.kind().is_unavailable() => return Err(error.into()),
            read => read.map_err(|error| damaged(error.to_string()))?,
        };
        let note: Stored = serde_json::from_slice(&bytes).map_err(|error| damaged(error.to_string()))?;
        // What it names is removed.
        let resolve = |within: &ObjectPath, name: &str, end: &str| match folder.resolve(name) {
            Ok(path) if path.is_beneath(within) && path.file_name().ends_with(end) => Ok(path),
            Ok(_) => Err(damaged(format!("'{}' is no '*{end}' in '{within}'", name.escape_debug()))),
            Err(error) => Err(damaged(error.to_string())),
        };
        let disks = note.disks.iter().map(|(name, data)| {
            let name = resolve(folder, name, ".vhd")?;
            let data = resolve(&name.parent(), data, ".vhd")?;
            Ok((name, data))
        });
        let files = note.files.iter().map(|name| resolve(folder, name, ""));
        Ok(Self { disks: disks.collect::<Result<_>>()?, files: files.collect::<Result<_>>()?, is_written: true })
    }

    /// Writes it down durably, if there is anything.
    pub fn write(&mut self, storage: &dyn WritableStorage, folder: &ObjectPath) -> Result<()> {
        if self.disks.is_empty() && self.files.is_empty() {
            return Ok(());
        }
        let below = |path: &ObjectPath| {
            let relative = path.as_str().strip_prefix(folder.as_str()).and_then(|path| path.strip_prefix('/'));
            relative.expect("it is in the folder of the VM").to_owned()
        };
        let disks = self.disks.iter().map(|(name, data)| (below(name), below(data))).collect();
        let note = Stored { disks, files: self.files.iter().map(below).collect() };
        let bytes = serde_json::to_vec(&note).expect("strings can be written");
        publish(storage, &note_of(folder), &bytes)?;
        self.is_written = true;
        Ok(())
    }

    /// Forgets it, once what it names is gone.
    pub fn forget(&self, storage: &dyn WritableStorage, folder: &ObjectPath) -> Result<()> {
        if !self.is_written {
            return Ok(());
        }
        let path = note_of(folder);
        match storage.remove(&path) {
            Err(error) if error.kind() != storage::ErrorKind::NotFound => return Err(error.into()),
            _ => {}
        }
        Ok(storage.sync(&path.parent())?)
    }
}
