//! How many bytes the files of a repository have: what a quota is compared with.
//!
//! Stored bytes, not blocks of a file system: the same on every kind of storage, whatever else lies there.

use storage::{ErrorKind as Of, ObjectPath, Storage};

use super::crew::{Crew, Work};
use super::{Error, ErrorKind, Result};

/// Folders in folders, at most: a repository has eight. A link to a folder above would have no end.
const DEPTH: usize = 32;

/// Returns the bytes of all files; one that is gone meanwhile has none.
///
/// # Errors
/// What the storage says: nothing that could not be looked at counts as empty.
pub(super) fn used_bytes(storage: &dyn Storage) -> Result<u64> {
    let crew = Crew::of(storage);
    let (mut folders, mut used) = (vec![ObjectPath::root()], 0_u64);
    for _ in 0..DEPTH {
        if folders.is_empty() {
            return Ok(used);
        }
        let looked = crew.each(Work::Folder, &folders, |folder| look(storage, folder));
        folders = Vec::new();
        for one in looked {
            let (bytes, below) = one?;
            used = used.saturating_add(bytes);
            folders.extend(below);
        }
    }
    let message =
        format!("'{}' has folders nested deeper than {DEPTH}: it cannot be said how large it is", storage.describe());
    Err(Error::new(ErrorKind::Damaged, message))
}

/// Returns the bytes of the files in a folder, and the folders in it.
fn look(storage: &dyn Storage, folder: &ObjectPath) -> Result<(u64, Vec<ObjectPath>)> {
    let entries = match storage.list(folder) {
        Err(error) if error.kind() == Of::NotFound => return Ok((0, Vec::new())),
        listed => listed?,
    };
    let (mut bytes, mut below) = (0_u64, Vec::new());
    for entry in entries {
        let path = folder.join(&entry.name)?;
        if entry.is_directory {
            below.push(path);
            continue;
        }
        match storage.stat(&path) {
            Ok(stat) => bytes = bytes.saturating_add(stat.size),
            // Removed meanwhile, or a link that leads nowhere or out.
            Err(error) if matches!(error.kind(), Of::NotFound | Of::Escape) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok((bytes, below))
}

#[cfg(test)]
mod tests {
    use storage::{Fault, FaultyStorage, LocalStorage, MemoryStorage};

    use super::*;

    #[test]
    fn the_bytes_of_all_files_are_counted_and_a_folder_that_cannot_be_listed_is_no_empty_one() {
        let memory = MemoryStorage::new();
        assert_eq!(used_bytes(&memory).unwrap(), 0);
        for (path, len) in [("a", 1), ("b/c", 20), ("b/d/e/f", 300), ("b/d/g", 0)] {
            memory.put(path, vec![7; len]).unwrap();
        }
        assert_eq!(used_bytes(&memory).unwrap(), 321);
        let faulty = FaultyStorage::new(std::sync::Arc::new(memory));
        faulty.set_rule(|_, path| (path.as_str() == "b/d/e").then_some(Fault::Errno(5)));
        assert_eq!(used_bytes(&faulty).unwrap_err().kind(), ErrorKind::Unavailable);
    }

    #[test]
    fn links_in_a_circle_have_an_end() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::create_dir(folder.path().join("a")).unwrap();
        std::os::unix::fs::symlink(".", folder.path().join("a/again")).unwrap();
        let local = LocalStorage::open(folder.path()).unwrap();
        assert_eq!(used_bytes(&local).unwrap_err().kind(), ErrorKind::Damaged);
    }
}
