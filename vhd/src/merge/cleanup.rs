//! What is left of a merge once the target is the base.

use std::collections::BTreeSet;
use std::sync::Arc;

use storage::{Entry, ObjectPath, Storage, UNPUBLISHED, WritableStorage, remove_tree, unless_gone};

use super::plan::images_of;
use super::{Control, Merge};
use crate::at_once;
use crate::chain;
use crate::digests::digests_name;
use crate::error::{Error, ErrorKind, Result};

/// Step 6. Nothing goes that a name still leads to.
pub(super) fn run(merge: &Merge, control: &Control) -> Result<()> {
    let storage = &*merge.storage;
    let going: BTreeSet<String> =
        merge.chain[..merge.chain.len() - 1].iter().flat_map(|name| [name.clone(), digests_name(name)]).collect();
    let there = merge.reader.list(&merge.folder)?;
    let (going, staying): (Vec<_>, Vec<_>) = there.into_iter().partition(|entry| going.contains(&entry.name));
    (control.barrier)()?;
    for entry in &going {
        unless_gone(storage.remove(&merge.path(&entry.name)))?;
    }
    if !going.is_empty() {
        // A name that comes back after a power cut must not lead to nothing.
        storage.sync(&merge.folder)?;
    }
    remove_unnamed(merge, &staying, control)
}

/// Removes what the names led to, and no name leads to any more. `there` is what the folder holds.
pub(super) fn remove_unnamed(merge: &Merge, there: &[Entry], control: &Control) -> Result<()> {
    let storage = &*merge.storage;
    let named = named_data(&merge.reader, &merge.folder, there)?;
    let target = merge.target();
    if !named.iter().any(|(name, _)| *name == target) {
        let reason = "it was merged, but no name leads to the result; nothing more is removed";
        return Err(Error::new(ErrorKind::Damaged, &target, reason));
    }
    let is_named = |data: &&ObjectPath| named.iter().any(|(_, led_to)| led_to == *data);
    let is_gone =
        |data: &ObjectPath| data.parent() == merge.folder && there.iter().all(|entry| entry.name != data.file_name());
    let mut changed = BTreeSet::new();
    for data in merge.data.iter().filter(|data| !is_named(data) && !is_gone(data)) {
        (control.barrier)()?;
        remove_tree(storage, data)?;
        // Also if it had gone before: whoever removed it may have ended before this.
        changed.insert(data.parent());
    }
    for data in merge.data.iter().filter(is_named) {
        match merge.reader.list(data) {
            // A VHD file.
            Err(error) if error.kind() == storage::ErrorKind::NotDirectory => {}
            entries => changed.extend(remove_unpublished(merge, data, &entries?)?),
        }
    }
    changed.extend(remove_unpublished(merge, &merge.folder, there)?);
    changed.iter().try_for_each(|folder| Ok(unless_gone(storage.sync(folder))?))
}

/// Removes an image that nothing is built on and that no backup names: its name, and what it led to.
pub(super) fn remove_image(storage: &Arc<dyn WritableStorage>, name: &ObjectPath, data: &ObjectPath) -> Result<()> {
    let folder = name.parent();
    if !data.is_beneath(&folder) {
        let reason = format!("it leads to '{data}', which is not in its folder: it is not removed");
        return Err(Error::new(ErrorKind::Escape, name, reason));
    }
    let reader = storage.clone().reader();
    let named = named_data(&reader, &folder, &reader.list(&folder)?)?;
    for name in [name, &folder.join(&digests_name(name.file_name()))?] {
        unless_gone(storage.remove(name))?;
    }
    storage.sync(&folder)?;
    let is_led_to = |to: &ObjectPath| to == data || to.is_beneath(data) || data.is_beneath(to);
    if named.iter().any(|(other, led_to)| other != name && is_led_to(led_to)) {
        return Ok(());
    }
    remove_tree(&**storage, data)?;
    Ok(unless_gone(storage.sync(&data.parent()))?)
}

/// Removes what an earlier attempt wrote and did not publish; returns the folder if it held something of that kind.
fn remove_unpublished(merge: &Merge, folder: &ObjectPath, there: &[Entry]) -> Result<Option<ObjectPath>> {
    let unpublished: Vec<_> = there.iter().filter(|entry| entry.name.ends_with(UNPUBLISHED)).collect();
    for entry in &unpublished {
        unless_gone(merge.storage.remove(&folder.join(&entry.name)?))?;
    }
    Ok((!unpublished.is_empty()).then(|| folder.clone()))
}

/// Returns the names in a folder of disks, which holds what is `there`, and what they lead to.
fn named_data(
    reader: &Arc<dyn Storage>,
    folder: &ObjectPath,
    there: &[Entry],
) -> Result<Vec<(ObjectPath, ObjectPath)>> {
    let names = images_of(folder, there)?;
    let led_to = at_once::each(reader.capabilities(), &names, |name| chain::data_path(reader, name));
    names.into_iter().zip(led_to).map(|(name, data)| Ok((name, data?))).collect()
}
