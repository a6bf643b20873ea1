//! What is visible of a repository, as directories and files; it never hears of who looks at it.
//!
//! ```text
//! /vms/web01~1f2e3d4c/latest -> 2026-11-20T030007Z
//!                     2026-11-20T030007Z/backup.json
//!                                        disks/xvda.raw  xvda.vhd
//!                                        volumes/xvda1.raw  files/xvda1/...     what lies in them (`guest`)
//! /by-uuid/<vm uuid> -> ../vms/web01~1f2e3d4c
//! /by-date/2026-11-20/030007Z-web01~1f2e3d4c -> ../../vms/web01~1f2e3d4c/2026-11-20T030007Z
//! /config/<schedule>/<time>/  /pools/<uuid>/<time>/      files as stored
//! /.xofs/status.json  problems.json  metrics
//! ```
//!
//! VHDs without metadata stand in the root instead, as `<name>.raw` and `<name>.vhd`.
//!
//! Nothing is kept but the numbers of places (`key`) and two numbers for each disk (`disks`): every question is put
//! to the repository, which lists again when what it knows is old. A list that was returned does not change. Looking at
//! directories opens no VHD; the first `stat` of a disk does, since its exact size stands nowhere else.

mod attributes;
mod control;
mod directory;
mod disks;
mod error;
mod guest;
mod health;
mod key;
mod metrics;
mod names;
mod xattrs;

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use disk::Disk;
use storage::{Object, ObjectPath};

use crate::repository::{Backup, BackupId, BackupTime, Layout, Problem, ProblemKind, Repository, StoredBackup, VmId};
use crate::worker::Workers;
pub use attributes::{Attributes, GuestAttributes, Kind};
pub use directory::Directory;
use disks::Sizes;
pub use error::{Error, Result};
use guest::Guests;
pub use health::{Health, Report};
pub use key::ROOT;
use key::{Inodes, Key, Link, Store};
use names::{Names, VmNames};

/// The directory in the root for what the mount says about itself.
const CONTROL: &str = ".xofs";

/// One name in a directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Its number.
    pub inode: u64,
    /// What it is.
    pub kind: Kind,
    /// The name, any bytes but `/` and zero.
    pub name: OsString,
}

/// The bytes of a file.
pub enum Content {
    /// A disk.
    Disk(Arc<dyn Disk>),
    /// A file of a guest, which never changes.
    File(Arc<dyn Disk>),
    /// A file as stored, decrypted.
    Object(Arc<dyn Object>),
    /// A small file, whole.
    Bytes(Arc<[u8]>),
    /// A small file, whole, that says something else at each opening.
    Live(Arc<[u8]>),
}

/// A repository as directories and files.
pub struct Tree {
    repository: Arc<Repository>,
    inodes: Inodes,
    names: Names,
    sizes: Sizes,
    guests: Guests,
    health: Health,
    since: SystemTime,
}

impl Tree {
    /// Makes the tree of a repository; reads nothing yet. What lies in guests is read by `workers`, and their symbolic links are
    /// files if they are to be inert.
    #[must_use]
    pub fn new(repository: Arc<Repository>, workers: Arc<Workers>, has_inert_symlinks: bool) -> Self {
        Self {
            guests: Guests::new(workers, has_inert_symlinks),
            repository,
            inodes: Inodes::new(),
            names: Names::default(),
            sizes: Sizes::default(),
            health: Health::default(),
            since: SystemTime::now(),
        }
    }

    /// Reads what the top level needs, so that looking at it is fast.
    ///
    /// # Errors
    /// `Repository` if it cannot be listed.
    pub fn warm_up(&self) -> Result<()> {
        match self.repository.layout() {
            Layout::Repository => self.names.get(&self.repository).map(drop)?,
            Layout::Disks => self.repository.loose_disks().map(drop)?,
        }
        Ok(())
    }

    /// Returns whether looking again crosses a network.
    #[must_use]
    pub fn is_remote(&self) -> bool {
        self.repository.storage().capabilities().is_remote
    }

    /// Returns whether the repository answers, as far as it is known.
    #[must_use]
    pub fn health(&self) -> &Health {
        &self.health
    }

    /// Asks the repository for its root, to see whether it answers.
    ///
    /// # Errors
    /// What the storage says; an error is an answer too.
    pub fn probe(&self) -> Result<()> {
        self.repository.storage().list(&ObjectPath::root())?;
        Ok(())
    }

    /// Returns what the repository is called, without secrets.
    #[must_use]
    pub fn repository(&self) -> String {
        self.repository.storage().describe()
    }

    /// Returns what a place is called in messages; nothing is asked of the repository.
    #[must_use]
    pub fn place(&self, inode: u64) -> String {
        if let Some(place) = self.guests.place(inode) {
            return self.guests.describe(place);
        }
        self.inodes.key(inode).map_or_else(|| format!("inode {inode}"), |key| key.to_string())
    }

    /// Returns the place that answers, or does not, together with this one: of a guest's file the root of its volume.
    #[must_use]
    pub fn group(&self, inode: u64) -> u64 {
        self.guests.place(inode).map_or(inode, |place| self.guests.root_of(place))
    }

    /// Returns whether the names in a directory, or the bytes of a file, are known without asking the repository.
    #[must_use]
    pub fn is_at_hand(&self, inode: u64) -> bool {
        if let Some(place) = self.guests.place(inode) {
            return self.guests.is_listed(place);
        }
        match self.inodes.key(inode) {
            Some(Key::Root) => self.repository.layout() == Layout::Repository,
            Some(Key::Control | Key::Status | Key::Problems | Key::Metrics) | None => true,
            Some(_) => false,
        }
    }

    /// Returns whether a directory can be listed without asking the repository: also if its names are only shown as they
    /// were, because it does not answer.
    #[must_use]
    pub fn is_list_at_hand(&self, inode: u64) -> bool {
        let is_shown = || self.health.is_silent(ROOT) && self.repository.known_loose_disks().is_some();
        self.is_at_hand(inode) || inode == ROOT && is_shown()
    }

    /// Returns whether what stands at a name is known, with its attributes, without asking the repository.
    #[must_use]
    pub fn is_name_at_hand(&self, parent: u64, name: &OsStr) -> bool {
        if self.guests.place(parent).is_some() {
            return self.is_at_hand(parent);
        }
        let Some(name) = name.to_str() else { return true };
        match self.inodes.key(parent) {
            Some(Key::Root) => name == CONTROL || self.repository.layout() == Layout::Repository,
            _ => self.is_at_hand(parent),
        }
    }

    /// Returns whether the attributes of a place are known without asking the repository.
    #[must_use]
    pub fn has_attributes_at_hand(&self, inode: u64) -> bool {
        if let Some(place) = self.guests.place(inode) {
            return self.guests.has_attributes(place);
        }
        match self.inodes.key(inode) {
            Some(key) => matches!(
                key,
                Key::Root
                    | Key::Vms
                    | Key::ByUuid
                    | Key::ByDate
                    | Key::Store(_)
                    | Key::Control
                    | Key::Status
                    | Key::Problems
                    | Key::Metrics
                    | Key::Link(_)
            ),
            None => true,
        }
    }

    /// Returns whether the target of a symbolic link is known without asking the repository.
    #[must_use]
    pub fn is_target_at_hand(&self, inode: u64) -> bool {
        self.guests.place(inode).is_none()
    }

    /// Returns how many places were seen so far, not counting guests' files.
    #[must_use]
    pub fn seen(&self) -> u64 {
        self.inodes.count()
    }

    /// Returns what stands at a name in a directory.
    ///
    /// # Errors
    /// `NotFound`, `Stale`, `NotDirectory`, or why it cannot be looked at.
    pub fn lookup(&self, parent: u64, name: &OsStr) -> Result<Attributes> {
        if let Some(directory) = self.guests.place(parent) {
            return self.counted(self.guest_lookup(directory, name));
        }
        if let Some(Key::Files(id)) = self.inodes.key(parent) {
            return self.counted(self.lookup_filesystem(&id, name));
        }
        // All names of keys are UTF-8.
        let name = name.to_str().ok_or(Error::NotFound)?;
        let found = self.key(parent).and_then(|parent| self.child(&parent, name));
        self.counted(found.and_then(|key| self.attributes_of(&key)))
    }

    /// Returns what is known of a place.
    ///
    /// # Errors
    /// `Stale` if it is gone.
    pub fn attributes(&self, inode: u64) -> Result<Attributes> {
        if let Some(place) = self.guests.place(inode) {
            return self.counted(self.guest_attributes(place)).map_err(Error::of_known);
        }
        self.counted(self.attributes_of(&self.key(inode)?)).map_err(Error::of_known)
    }

    /// Returns the number of the folder of a backup, whether there is one or not.
    #[must_use]
    pub fn backup_folder(&self, id: &BackupId) -> u64 {
        self.inodes.number(&Key::Backup(id.clone()))
    }

    /// Returns the number of the directory above; the root is above itself.
    ///
    /// # Errors
    /// `Stale` if the number was never given.
    pub fn parent(&self, inode: u64) -> Result<u64> {
        if let Some(place) = self.guests.place(inode) {
            return self.guest_parent(place);
        }
        Ok(self.inodes.number(&self.key(inode)?.parent()))
    }

    /// Returns the target of a symbolic link.
    ///
    /// # Errors
    /// `NotLink` if it is none; of a guest's, why it cannot be read.
    pub fn target(&self, inode: u64) -> Result<OsString> {
        if let Some(place) = self.guests.place(inode) {
            return self.counted(self.guest_target(place)).map_err(Error::of_known);
        }
        match self.key(inode)? {
            Key::Link(link) => Ok(link.target.clone().into()),
            _ => Err(Error::NotLink),
        }
    }

    /// Opens a file.
    ///
    /// # Errors
    /// `IsDirectory`, `Stale`, or why it cannot be read.
    pub fn open(&self, inode: u64) -> Result<Content> {
        if let Some(place) = self.guests.place(inode) {
            return self.counted(self.guest_open(place)).map_err(Error::of_known);
        }
        let key = self.key(inode)?;
        self.counted(self.open_key(&key)).map_err(Error::of_known)
    }

    /// Remembers that some bytes of a disk could not be read.
    pub fn report(&self, inode: u64, message: &str) {
        if let Some(place) = self.guests.place(inode) {
            return self.report_guest(place, message);
        }
        let Ok(key) = self.key(inode) else { return };
        let Some(path) = self.path_of(&key) else { return };
        let backup = match &key {
            Key::Disk(id, ..) | Key::Metadata(id) => Some(id.clone()),
            _ => None,
        };
        self.repository.report_problem(Problem { path, backup, kind: ProblemKind::Read, message: message.to_owned() });
    }

    /// Counts what could not be answered; that something is not there is an answer.
    fn counted<T>(&self, found: Result<T>) -> Result<T> {
        if matches!(found, Err(Error::Disk(_) | Error::Repository(_))) {
            self.health.failed();
        }
        found
    }

    fn status(&self) -> Vec<u8> {
        control::status(&self.repository, self.since, &self.health.report(), |inode| self.place(inode))
    }

    fn metrics(&self) -> Vec<u8> {
        metrics::text(&self.repository, self.since, &self.health.report())
    }

    fn key(&self, inode: u64) -> Result<Key> {
        self.inodes.key(inode).ok_or(Error::Stale)
    }

    /// Returns the object in the repository that a file is made of.
    fn path_of(&self, key: &Key) -> Option<ObjectPath> {
        match key {
            Key::Disk(id, name, _) => self.disk_path(id, name),
            Key::Loose(name, _) => self.loose_path(name),
            Key::Metadata(id) => Some(self.backup(id).ok()?.metadata.clone()),
            Key::StoredFile(store, group, time, name) => {
                self.stored(*store, group, *time).ok()?.directory.join(name).ok()
            }
            _ => None,
        }
    }

    /// Returns the key of a name in a directory.
    fn child(&self, parent: &Key, name: &str) -> Result<Key> {
        let found = match parent {
            // The VHDs beside it are not listed for it.
            Key::Root if name == CONTROL => Some(Key::Control),
            Key::Vms => self.names.get(&self.repository)?.vm(name).map(|vm| Key::Vm(vm.clone())),
            Key::ByUuid => {
                let names = self.names.get(&self.repository)?;
                VmId::new(name).and_then(|vm| names.name(&vm).map(|target| uuid_link(&vm, target)))
            }
            Key::Vm(vm) if name != "latest" => BackupTime::parse(&name.replace('-', ""))
                .filter(|time| time.to_string() == name)
                .and_then(|time| {
                    let id = BackupId { vm: vm.clone(), time };
                    match self.backup(&id) {
                        Ok(_) => Some(Ok(Key::Backup(id))),
                        Err(Error::NotFound) => None,
                        Err(error) => Some(Err(error)),
                    }
                })
                .transpose()?,
            Key::Day(day) => self.day_link(day, name)?,
            Key::Status
            | Key::Problems
            | Key::Metrics
            | Key::Metadata(_)
            | Key::Disk(..)
            | Key::Volume(..)
            | Key::Link(_)
            | Key::StoredFile(..)
            | Key::Loose(..) => return Err(Error::NotDirectory),
            _ => self.children(parent)?.into_iter().find(|(found, _)| found == name).map(|(_, key)| key),
        };
        found.ok_or(Error::NotFound)
    }

    /// Returns every name in a directory and its key, sorted by name.
    fn children(&self, parent: &Key) -> Result<Vec<(String, Key)>> {
        let named = |name: &str, key: Key| (name.to_owned(), key);
        let mut children = match parent {
            Key::Root => {
                let mut children = vec![named(CONTROL, Key::Control)];
                match self.repository.layout() {
                    Layout::Repository => children.extend([
                        named("by-date", Key::ByDate),
                        named("by-uuid", Key::ByUuid),
                        named("config", Key::Store(Store::Config)),
                        named("pools", Key::Store(Store::Pools)),
                        named("vms", Key::Vms),
                    ]),
                    Layout::Disks => children.extend(self.loose_files()?),
                }
                children
            }
            Key::Control => vec![
                named("metrics", Key::Metrics),
                named("problems.json", Key::Problems),
                named("status.json", Key::Status),
            ],
            Key::Vms => {
                let names = self.names.get(&self.repository)?;
                names.iter().map(|(name, vm)| named(name, Key::Vm(vm.clone()))).collect()
            }
            Key::ByUuid => {
                let names = self.names.get(&self.repository)?;
                names.iter().map(|(name, vm)| named(vm.as_str(), uuid_link(vm, name))).collect()
            }
            Key::Vm(vm) => {
                let backups = self.repository.backups(vm)?;
                let latest = backups.last().map(|newest| named("latest", latest_link(vm, newest.time)));
                let dated = backups.iter().map(|backup| {
                    named(&backup.time.to_string(), Key::Backup(BackupId { vm: vm.clone(), time: backup.time }))
                });
                dated.chain(latest).collect()
            }
            Key::Backup(id) => {
                self.backup(id)?;
                vec![
                    named("backup.json", Key::Metadata(id.clone())),
                    named("disks", Key::Disks(id.clone())),
                    named("files", Key::Files(id.clone())),
                    named("volumes", Key::Volumes(id.clone())),
                ]
            }
            Key::Disks(id) => self.disk_files(id)?,
            Key::Volumes(id) => self.volume_files(id)?,
            // Its children are no keys.
            Key::Files(_) => Vec::new(),
            Key::ByDate => self.days()?.into_keys().map(|day| (day.clone(), Key::Day(Arc::from(day)))).collect(),
            Key::Day(day) => {
                let names = self.names.get(&self.repository)?;
                let mut days = self.days()?;
                let backups = days.remove(&**day).ok_or(Error::NotFound)?;
                backups.iter().filter_map(|id| dated_link(day, id, &names)).collect()
            }
            Key::Store(store) => {
                let mut groups: Vec<String> = self.store(*store)?.into_iter().map(|stored| stored.group).collect();
                groups.sort_unstable();
                groups.dedup();
                groups.into_iter().map(|group| (group.clone(), Key::Group(*store, Arc::from(group)))).collect()
            }
            Key::Group(store, group) => {
                let stored = self.store(*store)?.into_iter().filter(|stored| *stored.group == **group);
                stored
                    .map(|stored| (stored.time.to_string(), Key::Stored(*store, group.clone(), stored.time)))
                    .collect()
            }
            Key::Stored(store, group, time) => {
                let stored = self.stored(*store, group, *time)?;
                let file = |name: String| {
                    let key = Key::StoredFile(*store, group.clone(), *time, Arc::from(name.as_str()));
                    (name, key)
                };
                stored.files.into_iter().map(|(name, _)| file(name)).collect()
            }
            Key::Status
            | Key::Problems
            | Key::Metrics
            | Key::Metadata(_)
            | Key::Disk(..)
            | Key::Volume(..)
            | Key::Link(_)
            | Key::StoredFile(..)
            | Key::Loose(..) => return Err(Error::NotDirectory),
        };
        children.sort_unstable_by(|(a, _), (b, _)| a.cmp(b));
        Ok(children)
    }

    fn attributes_of(&self, key: &Key) -> Result<Attributes> {
        let sizes = match key {
            Key::Status => whole(self.status().len()),
            Key::Problems => whole(control::problems(&self.repository).len()),
            Key::Metrics => whole(self.metrics().len()),
            Key::Link(link) => whole(link.target.len()),
            Key::Metadata(id) => {
                let size = self.repository.metadata_size(&*self.backup(id)?)?;
                (size, size)
            }
            Key::Disk(id, name, form) => self.disk_sizes(key, id, name, *form)?,
            Key::Loose(name, form) => self.loose_sizes(key, name, *form)?,
            Key::StoredFile(store, group, time, name) => {
                let stored = self.stored(*store, group, *time)?;
                let size = stored.files.iter().find(|(found, _)| **found == **name).ok_or(Error::NotFound)?.1;
                (size, size)
            }
            Key::Volume(id, name) => self.volume_sizes(key, id, name)?,
            Key::Backup(id) | Key::Disks(id) | Key::Volumes(id) | Key::Files(id) => {
                self.backup(id)?;
                (0, 0)
            }
            _ => (0, 0),
        };
        Ok(self.attributes_with(key, sizes))
    }

    fn attributes_with(&self, key: &Key, (size, allocated): (u64, u64)) -> Attributes {
        Attributes {
            inode: self.inodes.number(key),
            kind: kind_of(key),
            size,
            allocated,
            modified: key.time().map_or(self.since, |time| at(time.unix())),
            is_disk: matches!(key, Key::Disk(..) | Key::Loose(..) | Key::Volume(..)),
            is_constant: false,
            guest: None,
        }
    }

    fn open_key(&self, key: &Key) -> Result<Content> {
        match key {
            Key::Status => Ok(Content::Live(Arc::from(self.status()))),
            Key::Problems => Ok(Content::Live(Arc::from(control::problems(&self.repository)))),
            Key::Metrics => Ok(Content::Live(Arc::from(self.metrics()))),
            Key::Metadata(id) => Ok(Content::Bytes(Arc::from(self.repository.backup_metadata(&*self.backup(id)?)?))),
            Key::Disk(id, name, form) => self.open_disk(id, name, *form).map(Content::Disk),
            Key::Loose(name, form) => self.open_loose(name, *form).map(Content::Disk),
            Key::Volume(id, name) => self.open_volume(id, name).map(Content::Disk),
            Key::StoredFile(store, group, time, name) => {
                let path = self.stored(*store, group, *time)?.directory.join(name)?;
                Ok(Content::Object(self.repository.storage().open(&path)?))
            }
            Key::Link(_) => Err(Error::NotFound),
            _ => Err(Error::IsDirectory),
        }
    }

    /// Returns a backup as it is now.
    fn backup(&self, id: &BackupId) -> Result<Arc<Backup>> {
        let backups = self.repository.backups(&id.vm)?;
        // Oldest first, so by time.
        let found = backups.binary_search_by_key(&id.time, |backup| backup.time);
        found.map(|index| backups[index].clone()).map_err(|_| Error::NotFound)
    }

    fn store(&self, store: Store) -> Result<Vec<StoredBackup>> {
        Ok(match store {
            Store::Config => self.repository.config_backups()?,
            Store::Pools => self.repository.pool_backups()?,
        })
    }

    fn stored(&self, store: Store, group: &str, time: BackupTime) -> Result<StoredBackup> {
        let mut all = self.store(store)?.into_iter();
        all.find(|stored| *stored.group == *group && stored.time == time).ok_or(Error::NotFound)
    }

    /// Returns the backups of every day, listing all VMs. One whose backups cannot be listed has none here: the
    /// repository names the problem, and its own directory says the error.
    fn days(&self) -> Result<BTreeMap<String, Vec<BackupId>>> {
        let mut days = BTreeMap::<String, Vec<BackupId>>::new();
        for (vm, backups) in self.repository.all_backups()? {
            match backups {
                Ok(backups) => {
                    for backup in backups.iter() {
                        days.entry(split_time(backup.time).0).or_default().push(backup.id());
                    }
                }
                Err(error) => tracing::debug!(vm = %vm.id, %error, "left out of by-date"),
            }
        }
        Ok(days)
    }

    /// Returns the link of a name like `030007Z-web01~1f2e3d4c`.
    fn day_link(&self, day: &str, name: &str) -> Result<Option<Key>> {
        let Some((clock, vm_name)) = name.split_once('-') else { return Ok(None) };
        let names = self.names.get(&self.repository)?;
        let Some(vm) = names.vm(vm_name) else { return Ok(None) };
        let time = BackupTime::parse(&format!("{}T{clock}", day.replace('-', "")));
        let Some(time) = time.filter(|time| split_time(*time).1 == clock) else { return Ok(None) };
        let id = BackupId { vm: vm.clone(), time };
        match self.backup(&id) {
            Ok(_) => Ok(dated_link(day, &id, &names).map(|(_, key)| key)),
            Err(Error::NotFound) => Ok(None),
            Err(error) => Err(error),
        }
    }
}

/// Splits a time into the names of its day and of its clock.
fn split_time(time: BackupTime) -> (String, String) {
    let shown = time.to_string();
    let (day, clock) = shown.split_once('T').expect("a time is shown with a T");
    (day.to_owned(), clock.to_owned())
}

fn link(directory: Key, name: &str, target: String, time: Option<BackupTime>) -> Key {
    Key::Link(Arc::new(Link { directory, name: name.to_owned(), target, time }))
}

fn latest_link(vm: &VmId, newest: BackupTime) -> Key {
    link(Key::Vm(vm.clone()), "latest", newest.to_string(), Some(newest))
}

fn uuid_link(vm: &VmId, directory: &str) -> Key {
    link(Key::ByUuid, vm.as_str(), format!("../vms/{directory}"), None)
}

fn dated_link(day: &str, id: &BackupId, names: &VmNames) -> Option<(String, Key)> {
    let vm = names.name(&id.vm)?;
    let name = format!("{}-{vm}", split_time(id.time).1);
    let key = link(Key::Day(Arc::from(day)), &name, format!("../../vms/{vm}/{}", id.time), Some(id.time));
    Some((name, key))
}

fn kind_of(key: &Key) -> Kind {
    match key {
        Key::Link(_) => Kind::Symlink,
        Key::Status
        | Key::Problems
        | Key::Metrics
        | Key::Metadata(_)
        | Key::Disk(..)
        | Key::Volume(..)
        | Key::StoredFile(..)
        | Key::Loose(..) => Kind::File,
        _ => Kind::Directory,
    }
}

/// The size and allocation of something that has no holes.
fn whole(len: usize) -> (u64, u64) {
    (len as u64, len as u64)
}

/// The time so many seconds after 1970.
fn at(unix: i64) -> SystemTime {
    let distance = Duration::from_secs(unix.unsigned_abs());
    let time = if unix < 0 { UNIX_EPOCH.checked_sub(distance) } else { UNIX_EPOCH.checked_add(distance) };
    time.unwrap_or(UNIX_EPOCH)
}

#[cfg(test)]
mod tests {
    use std::os::unix::ffi::OsStrExt;

    use storage::{Fault, FaultyStorage, MemoryStorage, Storage};

    use super::*;
    use crate::repository::OpenOptions;

    /// The tree of what is in a storage.
    pub(super) fn tree_on(storage: Arc<dyn Storage>) -> Tree {
        Tree::new(Repository::with_storage(storage, OpenOptions::default()).unwrap(), Workers::new(1, None), false)
    }

    // Promise 17: "What needs no storage goes on: the root, `.xofs`"
    #[test]
    fn a_folder_of_vhds_that_does_not_answer_shows_its_status_and_the_names_that_are_known() {
        let memory = Arc::new(MemoryStorage::new());
        memory.put("a.vhd", "no VHD").unwrap();
        let faulty = Arc::new(FaultyStorage::new(memory));
        let tree = tree_on(faulty.clone());
        tree.warm_up().unwrap();
        faulty.set_rule(|_, path| Some(Fault::Error(storage::ErrorKind::Io)).filter(|_| path.as_str().is_empty()));
        faulty.reset_counts();
        let names = || Ok::<_, Error>(tree.entries(&tree.list(ROOT)?).map(|entry| entry.name).collect::<Vec<_>>());
        assert!(!tree.is_list_at_hand(ROOT));
        tree.health().silent();
        assert!(tree.is_list_at_hand(ROOT) && tree.is_name_at_hand(ROOT, CONTROL.as_ref()));
        assert!(!tree.is_at_hand(ROOT) && !tree.is_name_at_hand(ROOT, "a.raw".as_ref()));
        assert_eq!(names().unwrap(), [".xofs", "a.raw", "a.vhd"]);
        let control = tree.lookup(ROOT, CONTROL.as_ref()).unwrap().inode;
        for entry in tree.entries(&tree.list(control).unwrap()) {
            assert!(tree.is_name_at_hand(control, &entry.name) && tree.is_at_hand(entry.inode), "{:?}", entry.name);
            assert!(tree.has_attributes_at_hand(entry.inode) && tree.open(entry.inode).is_ok(), "{:?}", entry.name);
        }
        assert_eq!(faulty.total(), 0, "the storage was asked");
    }

    #[test]
    fn a_name_that_is_not_utf_8_stands_nowhere_and_no_storage_is_asked() {
        let memory = Arc::new(MemoryStorage::new());
        memory.put("a.vhd", "no VHD").unwrap();
        let faulty = Arc::new(FaultyStorage::new(memory));
        let tree = tree_on(faulty.clone());
        faulty.reset_counts();
        let name = OsStr::from_bytes(b"a\xff.raw");
        assert!(tree.is_name_at_hand(ROOT, name));
        assert!(matches!(tree.lookup(ROOT, name), Err(Error::NotFound)));
        assert_eq!(faulty.total(), 0);
    }
}
