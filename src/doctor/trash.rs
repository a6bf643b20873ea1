//! The trash: what was moved instead of being deleted, and what it takes to put it back.
//!
//! ```text
//! .xofs-trash/<time>-<8 digits>/       a set: what one plan moved of one VM
//! ├── journal.json                     where each of its things was; durable before the first of them moves
//! └── xo-vm-backups/<vm>/...           the things, at the paths they had
//! ```
//!
//! It lies at the root of the repository, where Xen Orchestra leaves names alone that begin with a dot, and on the same file
//! system, so that moving is renaming: at any moment, also after a power cut, each thing is in its place or in the trash.
//!
//! | journal says | it stands for                                       | what may be done            |
//! |--------------|-----------------------------------------------------|-----------------------------|
//! | `moving`     | things are being moved, or put back, or who did so died | put back                |
//! | `moved`      | all are in the trash                                | put back, purge             |
//! | `purging`    | the user had it emptied, and parts may be gone      | purge                       |
//!
//! A set without a journal is empty folders: of one that did not begin, or that has come to its end.

use std::collections::BTreeSet;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use storage::{
    Kind as What, ObjectPath, WritableStorage, create_directories, publish, publish_rename, remove_tree, unless_gone,
};

use super::plan::Kind;
use crate::merge::note_of;
use crate::repository::{Error, ErrorKind, Result, VmFolder, VmId, VmLock};

/// Where it is.
const FOLDER: &str = ".xofs-trash";
const JOURNAL: &str = "journal.json";
/// Longest journal read (bytes); some hundred thousand moves fit.
const JOURNAL_LIMIT: u64 = 64 << 20;
/// What is written of a journal, and how.
const VERSION: u32 = 1;
/// The name of the listing cache, which Xen Orchestra makes anew.
const CACHE: &str = super::survey::CACHE;

/// How far a set has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum State {
    /// Some of it may still be in its place.
    Moving,
    /// It is in the trash.
    Moved,
    /// Some of it may be gone.
    Purging,
}

/// One thing that was moved.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Move {
    /// Where it was, relative to the repository.
    pub path: String,
    /// What was wrong with it.
    pub kind: Kind,
    /// Why it was moved.
    pub reason: String,
}

/// What a journal says.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Journal {
    version: u32,
    vm: String,
    /// The digest of the plan.
    plan: String,
    state: State,
    /// In the order in which they are moved.
    moves: Vec<Move>,
}

/// What one plan moved of one VM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Set {
    /// Its name.
    pub id: String,
    /// The VM.
    pub vm: VmId,
    /// How far it has come.
    pub state: State,
    /// What was moved.
    pub moves: Vec<Move>,
    /// What lies there, in bytes.
    pub size: u64,
}

/// What came of putting a set back.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct PutBack {
    /// What is in its place again.
    pub paths: Vec<String>,
    /// What is neither in the trash nor in its place.
    pub missing: Vec<String>,
}

/// Returns what lies in the trash, oldest first.
///
/// # Errors
/// [`ErrorKind::Damaged`] if a journal cannot be read; else what the storage says.
pub fn list(storage: &dyn WritableStorage) -> Result<Vec<Set>> {
    let folder = ObjectPath::new(FOLDER)?;
    let mut entries = match storage.list(&folder) {
        Err(error) if error.kind() == storage::ErrorKind::NotFound => return Ok(Vec::new()),
        other => other?,
    };
    entries.sort();
    let mut sets = Vec::new();
    for entry in entries.iter().filter(|entry| entry.is_directory) {
        let Some((journal, vm)) = read(storage, &entry.name)? else { continue };
        let size = size_of(storage, &folder.join(&entry.name)?)?;
        sets.push(Set { id: entry.name.clone(), vm, state: journal.state, moves: journal.moves, size });
    }
    Ok(sets)
}

/// Returns the set of this name.
///
/// # Errors
/// [`ErrorKind::NotFound`] if there is none; else as for [`list`].
pub fn find(storage: &dyn WritableStorage, id: &str) -> Result<Set> {
    let sets = list(storage)?;
    let names: Vec<String> = sets.iter().map(|set| format!("'{}'", set.id)).collect();
    sets.into_iter().find(|set| set.id == id).ok_or_else(|| {
        let there = if names.is_empty() { "nothing".to_owned() } else { names.join(", ") };
        Error::new(ErrorKind::NotFound, format!("no set '{}' is in the trash; there is {there}", id.escape_debug()))
    })
}

/// Moves things to the trash, in their order; returns the name of the set.
///
/// 1. The folders they go to are made, and the journal is published: from here on it is known what is where.
/// 2. Each is renamed, and that made durable before the next.
/// 3. The journal says that all are moved.
///
/// # Errors
/// What the storage says, or [`ErrorKind::Locked`]; then all that was moved is put back, as far as possible, and what is not
/// is put back by [`put_back`].
pub(super) fn discard(lock: &VmLock, digest: &str, moves: Vec<Move>) -> Result<String> {
    let storage = &**lock.storage();
    let time = Timestamp::now().strftime("%Y%m%dT%H%M%SZ");
    let id = format!("{time}-{}", digest.get(..8).unwrap_or(digest));
    let set = ObjectPath::new(FOLDER)?.join(&id)?;
    if read(storage, &id)?.is_some() {
        return Err(Error::new(ErrorKind::Exists, format!("'{set}' is there already: try again in a second")));
    }
    let folders = moves.iter().map(|step| Ok(set.resolve(&step.path)?.parent())).collect::<Result<BTreeSet<_>>>()?;
    for folder in folders {
        create_directories(storage, &folder)?;
    }
    let (vm, plan) = (lock.vm().as_str().to_owned(), digest.to_owned());
    let mut journal = Journal { version: VERSION, vm, plan, state: State::Moving, moves };
    write(storage, &set, &journal)?;
    let moved = journal.moves.iter().try_for_each(|step| -> Result<()> {
        lock.check()?;
        let place = ObjectPath::new(&step.path)?;
        if place.parent() == vm_folder(lock)? && place.file_name().ends_with(".json") {
            // XO believes a cache whatever the folder holds.
            VmFolder::new(lock)?.remove_cache()?;
        }
        Ok(publish_rename(storage, &place, &set.resolve(&step.path)?)?)
    });
    let moved = moved.and_then(|()| {
        lock.check()?;
        journal.state = State::Moved;
        write(storage, &set, &journal)
    });
    if let Err(error) = moved {
        // What this fails with is told by the next run, which finds the journal.
        let _ = put_back(lock, &id);
        return Err(error);
    }
    Ok(id)
}

/// Returns the set that holds what this plan of the VM moved, if all of it was.
pub(super) fn of_plan(lock: &VmLock, digest: &str) -> Result<Option<String>> {
    let storage = &**lock.storage();
    for set in list(storage)?.iter().filter(|set| set.vm == *lock.vm() && set.state == State::Moved) {
        if read(storage, &set.id)?.is_some_and(|(journal, _)| journal.plan == digest) {
            return Ok(Some(set.id.clone()));
        }
    }
    Ok(None)
}

/// Puts back what runs left of this VM that died while they moved things.
pub(super) fn recover(lock: &VmLock) -> Result<()> {
    for set in list(&**lock.storage())? {
        if set.vm == *lock.vm() && set.state == State::Moving {
            tracing::info!(set = set.id, "puts back what a repair moved that was ended");
            put_back(lock, &set.id)?;
        }
    }
    Ok(())
}

/// Puts everything of a set back into its place, the last first, and removes the set. May be cut off and done again.
///
/// A listing cache is put back only if that is all there is to it: Xen Orchestra makes it anew.
///
/// # Errors
/// [`ErrorKind::Exists`] if something else has a place, [`ErrorKind::Damaged`] if a merge has begun there since, or the set
/// is being purged: nothing was changed then. [`ErrorKind::Locked`] if the lock is lost; else what the storage says.
pub fn put_back(lock: &VmLock, id: &str) -> Result<PutBack> {
    let storage = &**lock.storage();
    let set = ObjectPath::new(FOLDER)?.join(id)?;
    let Some((mut journal, vm)) = read(storage, id)? else {
        return Err(Error::new(ErrorKind::NotFound, format!("'{set}' is not there, or has no journal")));
    };
    if vm != *lock.vm() {
        return Err(Error::new(ErrorKind::Damaged, format!("'{set}' is of the VM '{vm}', not of '{}'", lock.vm())));
    }
    if journal.state == State::Purging {
        let message =
            format!("'{set}' was being purged, and a part of it may be gone: 'xofs repair --purge {id}' goes on");
        return Err(Error::new(ErrorKind::Damaged, message));
    }
    let folder = vm_folder(lock)?;
    let is_cache = |place: &ObjectPath| place.parent() == folder && place.file_name() == CACHE;
    let is_metadata = |place: &ObjectPath| place.parent() == folder && place.file_name().ends_with(".json");
    let mut done = PutBack::default();
    let mut left = Vec::new();
    for step in journal.moves.iter().rev() {
        let (place, there) = (ObjectPath::new(&step.path)?, set.resolve(&step.path)?);
        match (exists(storage, &there)?, exists(storage, &place)?) {
            (true, true) | (false, false) if is_cache(&place) => {}
            (true, true) => {
                let message = format!(
                    "'{place}' is there again, so what was moved to '{there}' cannot be put back: move one of them away; \
                     nothing was changed"
                );
                return Err(Error::new(ErrorKind::Exists, message));
            }
            (true, false) => left.push((place, there)),
            (false, true) => done.paths.push(step.path.clone()),
            (false, false) => done.missing.push(step.path.clone()),
        }
    }
    for (place, _) in &left {
        check_no_merge(storage, &place.parent())?;
    }
    if journal.state == State::Moved && !left.is_empty() {
        // From here on it is neither what a plan moved nor anything to purge.
        lock.check()?;
        journal.state = State::Moving;
        write(storage, &set, &journal)?;
    }
    let has_metadata =
        journal.moves.iter().any(|step| ObjectPath::new(&step.path).is_ok_and(|place| is_metadata(&place)));
    if left.iter().any(|(place, _)| is_metadata(place)) {
        VmFolder::new(lock)?.remove_cache()?;
    }
    for (place, there) in left.iter().filter(|(place, _)| !(has_metadata && is_cache(place))) {
        lock.check()?;
        if !exists(storage, &place.parent())? {
            create_directories(storage, &place.parent())?;
        }
        publish_rename(storage, there, place)?;
        done.paths.push(place.to_string());
    }
    lock.check()?;
    // One that stayed in the trash is of no use to anybody.
    unless_gone(storage.remove(&set.resolve(&format!("{folder}/{CACHE}"))?))?;
    remove_set(storage, &set)?;
    Ok(done)
}

/// Deletes a set for good.
///
/// # Errors
/// [`ErrorKind::Damaged`] if some of it may still be in its place; else as for [`put_back`].
pub fn purge(lock: &VmLock, id: &str) -> Result<()> {
    let storage = &**lock.storage();
    let set = ObjectPath::new(FOLDER)?.join(id)?;
    let Some((mut journal, _)) = read(storage, id)? else {
        return Err(Error::new(ErrorKind::NotFound, format!("'{set}' is not there, or has no journal")));
    };
    if journal.state == State::Moving {
        let message =
            format!("'{set}' is of a repair that did not come to its end: put it back first, with --undo {id}");
        return Err(Error::new(ErrorKind::Damaged, message));
    }
    lock.check()?;
    journal.state = State::Purging;
    write(storage, &set, &journal)?;
    for entry in storage.list(&set)?.iter().filter(|entry| entry.name != JOURNAL) {
        lock.check()?;
        remove_tree(storage, &set.join(&entry.name)?)?;
    }
    storage.sync(&set)?;
    remove_set(storage, &set)
}

/// Removes what is left of a set that holds nothing any more: its folders, then its journal.
///
/// # Errors
/// [`storage::ErrorKind::NotEmpty`] as the storage says it if something is in it that the journal does not know.
fn remove_set(storage: &dyn WritableStorage, set: &ObjectPath) -> Result<()> {
    for entry in storage.list(set)?.iter().filter(|entry| entry.is_directory) {
        remove_empty(storage, &set.join(&entry.name)?)?;
    }
    storage.sync(set)?;
    unless_gone(storage.remove(&set.join(JOURNAL)?))?;
    storage.sync(set)?;
    // What a power cut left of a journal that was being published.
    for entry in storage.list(set)? {
        unless_gone(storage.remove(&set.join(&entry.name)?))?;
    }
    unless_gone(storage.remove_directory(set))?;
    Ok(storage.sync(&set.parent())?)
}

/// Removes a folder that holds nothing but empty folders.
fn remove_empty(storage: &dyn WritableStorage, folder: &ObjectPath) -> Result<()> {
    let mut folders = vec![folder.clone()];
    let mut at = 0;
    while let Some(folder) = folders.get(at).cloned() {
        at += 1;
        for entry in storage.list(&folder)?.iter().filter(|entry| entry.is_directory) {
            folders.push(folder.join(&entry.name)?);
        }
    }
    for folder in folders.iter().rev() {
        unless_gone(storage.remove_directory(folder))?;
    }
    Ok(())
}

/// Refuses to put anything into a folder where a merge has begun: it must not find other images than it was begun with.
fn check_no_merge(storage: &dyn WritableStorage, folder: &ObjectPath) -> Result<()> {
    let lineage = if folder.file_name() == "data" { folder.parent() } else { folder.clone() };
    let entries = match storage.list(&lineage) {
        Err(error) if error.kind() == storage::ErrorKind::NotFound => return Ok(()),
        other => other?,
    };
    // `.<base>.merge.json` is Xen Orchestra's and ours, `.<target>.xofs-merge.json` ours alone.
    match entries.iter().find(|entry| entry.name.starts_with('.') && entry.name.ends_with("merge.json")) {
        None => Ok(()),
        Some(state) => {
            let message = format!(
                "'{lineage}/{}': a merge has begun there since: finish it first ('xofs repair'); nothing was changed",
                state.name
            );
            Err(Error::new(ErrorKind::Damaged, message))
        }
    }
}

fn vm_folder(lock: &VmLock) -> Result<ObjectPath> {
    Ok(ObjectPath::new(crate::repository::VM_FOLDER)?.join(lock.vm().as_str())?)
}

/// Reads the journal of a set, and which VM it is of; `None` if there is none.
fn read(storage: &dyn WritableStorage, id: &str) -> Result<Option<(Journal, VmId)>> {
    let path = ObjectPath::new(FOLDER)?.join(id)?.join(JOURNAL)?;
    let bytes = match storage.read(&path, JOURNAL_LIMIT) {
        Err(error) if error.kind() == storage::ErrorKind::NotFound => return Ok(None),
        other => other?,
    };
    let damaged = |reason: &str| Error::new(ErrorKind::Damaged, format!("'{path}': {reason}; nothing was changed"));
    let journal: Journal = serde_json::from_slice(&bytes).map_err(|error| damaged(&error.to_string()))?;
    if journal.version != VERSION {
        return Err(damaged("it is of another version of xofs"));
    }
    let vm = VmId::new(&journal.vm).ok_or_else(|| damaged("it names no VM"))?;
    let folder = ObjectPath::new(crate::repository::VM_FOLDER)?.join(vm.as_str())?;
    for step in &journal.moves {
        let place = ObjectPath::new(&step.path)?;
        if !place.is_beneath(&folder) && place != note_of(&folder) {
            return Err(damaged("it names a place that is not its VM's"));
        }
    }
    Ok(Some((journal, vm)))
}

fn write(storage: &dyn WritableStorage, set: &ObjectPath, journal: &Journal) -> Result<()> {
    let bytes = serde_json::to_vec_pretty(journal).expect("it holds text and numbers");
    Ok(publish(storage, &set.join(JOURNAL)?, &bytes)?)
}

fn exists(storage: &dyn WritableStorage, path: &ObjectPath) -> Result<bool> {
    match storage.stat(path) {
        Ok(_) => Ok(true),
        Err(error) if error.kind() == storage::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error.into()),
    }
}

/// Returns how many bytes the files in a folder have.
fn size_of(storage: &dyn WritableStorage, folder: &ObjectPath) -> Result<u64> {
    let (mut size, mut folders) = (0, vec![folder.clone()]);
    while let Some(folder) = folders.pop() {
        for entry in storage.list(&folder)? {
            let path = folder.join(&entry.name)?;
            let stat = storage.stat(&path)?;
            match stat.kind {
                What::Directory => folders.push(path),
                What::File if entry.name != JOURNAL => size += stat.size,
                What::File | What::Other => {}
            }
        }
    }
    Ok(size)
}
