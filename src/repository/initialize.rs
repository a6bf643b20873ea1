//! A new repository in an empty place.
//!
//! Xen Orchestra (XO) takes any folder it may write to, and in an empty one makes what says that it is encrypted. What is
//! empty for it: nothing but names that begin with a dot, and the two files of the encryption (`@xen-orchestra/fs`,
//! `abstract.js`, `_canWriteMetadata`). A repository made here also has the folder of the backups, so that it is not
//! empty any more: XO never replaces its key, and every program knows it for what it is.

use std::fs::DirBuilder;
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::Path;

use storage::{
    EncryptedStorage, EncryptionKey, LocalStorage, ObjectPath, Storage, WritableStorage, create_directories,
};

use super::ids::random_uuid;
use super::{Error, ErrorKind, Result, VM_FOLDER, open_error};

/// The file of the encryption that is written last: with it, the encryption is complete.
const ENCRYPTION: &str = "encryption.json";
/// The one that is written before, and that XO does not mind in an empty place.
const KEY_CHECK: &str = "metadata.json";

/// Makes `path` a repository, encrypted if there is a key; the folder itself, but none above it, is made if it is missing.
///
/// # Errors
/// [`ErrorKind::Exists`] if something is there; else what the storage says.
pub(super) fn initialize(path: &Path, key: Option<&EncryptionKey>) -> Result<()> {
    match DirBuilder::new().mode(0o700).create(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            let message = format!(
                "the folder above '{}' does not exist: check the path, and that the share is mounted, or make it first",
                path.display()
            );
            return Err(Error::new(ErrorKind::NoSuchRepository, message));
        }
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(open_error(path, &error)),
        _ => {}
    }
    let storage = LocalStorage::open(path).map_err(|error| open_error(path, &error))?;
    refuse_what_is_there(&storage)?;
    if let Some(key) = key {
        let random = random_uuid().map_err(|error| {
            Error::new(ErrorKind::Unavailable, format!("ask the system for random numbers: {error}"))
        })?;
        EncryptedStorage::initialize(&storage, key, &random.to_string())?;
    }
    // Last: until then the place counts as empty, and it can be begun anew.
    create_directories(&storage, &ObjectPath::new(VM_FOLDER)?)?;
    Ok(())
}

fn refuse_what_is_there(storage: &dyn WritableStorage) -> Result<()> {
    let there = Storage::list(storage, &ObjectPath::root())?.into_iter().map(|entry| entry.name);
    let there: Vec<String> = there.filter(|name| !name.starts_with('.') && name != KEY_CHECK).collect();
    let Some(first) = there.iter().find(|name| *name == VM_FOLDER || *name == ENCRYPTION).or(there.first()) else {
        return Ok(());
    };
    let place = storage.describe();
    let message = if first == VM_FOLDER || first == ENCRYPTION {
        format!("'{place}' is a repository already: it holds '{first}'")
    } else {
        format!("'{place}' is not empty, it holds '{}': give an empty folder, or a new one", first.escape_debug())
    };
    Err(Error::new(ErrorKind::Exists, message))
}
