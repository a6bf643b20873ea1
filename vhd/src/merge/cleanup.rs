//! What is left of a merge once the target is the base.

use std::sync::Arc;

use storage::{ObjectPath, Storage, UNPUBLISHED, WritableStorage, remove_tree};

use super::plan::is_image;
use super::{Control, Merge};
use crate::chain;
use crate::digests::digests_name;
use crate::error::{Error, ErrorKind, Result};

/// Step 6. Nothing goes that a name still leads to.
pub(super) fn run(merge: &Merge, control: &Control) -> Result<()> {
    let storage = &*merge.storage;
    (control.barrier)()?;
    for name in &merge.chain[..merge.chain.len() - 1] {
        for name in [name, &digests_name(name)] {
            match storage.remove(&merge.path(name)) {
                Err(error) if error.kind() != storage::ErrorKind::NotFound => return Err(error.into()),
                _ => {}
            }
        }
    }
    // A name that comes back after a power cut must not lead to nothing.
    storage.sync(&merge.folder)?;
    remove_unnamed(merge, control)
}

/// Removes what the names led to, and no name leads to any more.
pub(super) fn remove_unnamed(merge: &Merge, control: &Control) -> Result<()> {
    let storage = &*merge.storage;
    let named = named_data(&merge.reader, &merge.folder)?;
    let target = merge.target();
    if !named.iter().any(|(name, _)| *name == target) {
        let reason = "it was merged, but no name leads to the result; nothing more is removed";
        return Err(Error::new(ErrorKind::Damaged, &target, reason));
    }
    let is_named = |data: &&ObjectPath| named.iter().any(|(_, led_to)| led_to == *data);
    for data in merge.data.iter().filter(|data| !is_named(data)) {
        (control.barrier)()?;
        remove_tree(storage, data)?;
    }
    let kept = merge.data.iter().filter(is_named).cloned();
    for folder in kept.chain([merge.folder.clone()]) {
        remove_unpublished(merge, &folder)?;
    }
    for folder in merge.data.iter().map(ObjectPath::parent).chain([merge.folder.clone()]) {
        match storage.sync(&folder) {
            Err(error) if error.kind() != storage::ErrorKind::NotFound => return Err(error.into()),
            _ => {}
        }
    }
    Ok(())
}

/// Removes an image that nothing is built on and that no backup names: its name, and what it led to.
pub(super) fn remove_image(storage: &Arc<dyn WritableStorage>, name: &ObjectPath, data: &ObjectPath) -> Result<()> {
    let folder = name.parent();
    if !data.is_beneath(&folder) {
        let reason = format!("it leads to '{data}', which is not in its folder: it is not removed");
        return Err(Error::new(ErrorKind::Escape, name, reason));
    }
    let named = named_data(&storage.clone().reader(), &folder)?;
    for name in [name, &folder.join(&digests_name(name.file_name()))?] {
        match storage.remove(name) {
            Err(error) if error.kind() != storage::ErrorKind::NotFound => return Err(error.into()),
            _ => {}
        }
    }
    storage.sync(&folder)?;
    let is_led_to = |to: &ObjectPath| to == data || to.is_beneath(data) || data.is_beneath(to);
    if named.iter().any(|(other, led_to)| other != name && is_led_to(led_to)) {
        return Ok(());
    }
    remove_tree(&**storage, data)?;
    match storage.sync(&data.parent()) {
        Err(error) if error.kind() != storage::ErrorKind::NotFound => Err(error.into()),
        _ => Ok(()),
    }
}

/// Removes what an earlier attempt wrote and did not publish.
fn remove_unpublished(merge: &Merge, folder: &ObjectPath) -> Result<()> {
    let entries = match merge.reader.list(folder) {
        // A VHD file.
        Err(error) if error.kind() == storage::ErrorKind::NotDirectory => return Ok(()),
        other => other?,
    };
    for entry in entries.iter().filter(|entry| entry.name.ends_with(UNPUBLISHED)) {
        merge.storage.remove(&folder.join(&entry.name)?)?;
    }
    Ok(())
}

/// Returns the names in a folder of disks, and what they lead to.
fn named_data(reader: &Arc<dyn Storage>, folder: &ObjectPath) -> Result<Vec<(ObjectPath, ObjectPath)>> {
    let mut named = Vec::new();
    for entry in reader.list(folder)?.into_iter().filter(is_image) {
        let name = folder.join(&entry.name)?;
        let data = chain::data_path(reader, &name)?;
        named.push((name, data));
    }
    Ok(named)
}
