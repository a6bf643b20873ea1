//! What a repository holds: VMs and their backups, looked at again on access.
//!
//! A listing is an immutable snapshot behind an `Arc`, replaced whole when something changed. A file is read again only
//! if its name, inode, time or size changed; backups that did not change keep their pointer. Each VM is listed by one at
//! a time, so that a crowd of readers lists it once; the others wait for it only shortly if they have an older listing.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use storage::{ObjectPath, Stat, Storage};

use super::crew::{Crew, Work};
use super::metadata::{self, Backup, BackupDisk, DiskSource, Metadata, Mode};
use super::naming::{Device, device_of_user_device, disk_names};
use super::problems::{Problem, ProblemKind, Problems};
use super::read::{self, Unread};
use super::refresh::Refreshed;
use super::{BackupTime, Backups, ErrorKind, Result, VM_FOLDER, Vm, VmId, cache};

/// How long a listing is believed without looking again, on this machine.
const LOCAL_AGE: Duration = Duration::from_secs(1);
/// The same, over a network.
const REMOTE_AGE: Duration = Duration::from_secs(5);
/// With fewer metadata files to read than this, the cache, which holds all, is not looked at.
const CACHE_WORTH: usize = 4;

/// How long a listing of `storage` is believed without looking again.
pub(super) fn listing_age(storage: &dyn Storage) -> Duration {
    if storage.capabilities().is_remote { REMOTE_AGE } else { LOCAL_AGE }
}

/// The VMs and backups of a repository.
pub(super) struct Catalog {
    storage: Arc<dyn Storage>,
    age: Duration,
    /// Each of its threads holds at most one metadata file, or one listing cache, in memory.
    crew: Crew,
    /// Whether XO's cache may stand for the metadata files.
    believes_cache: bool,
    vms: Refreshed<Arc<Vec<Vm>>, HashMap<VmId, Named>>,
    backups: Mutex<HashMap<VmId, Arc<BackupListing>>>,
}

/// The backups of a VM, and their metadata files by name.
type BackupListing = Refreshed<Arc<Vec<Arc<Backup>>>, HashMap<String, Known>>;

/// Where a VM's name comes from.
#[derive(Clone)]
struct Named {
    name: String,
    /// The newest metadata file, as it was when it was read; `None` to look again.
    newest: Option<(String, Signature)>,
}

struct Known {
    /// `None` if it was not read well for a reason that may pass.
    signature: Option<Signature>,
    backup: Arc<Backup>,
}

impl Known {
    /// Returns what to show instead of `before`: the same pointer if nothing changed, and also for as long as what
    /// keeps it from being read may pass.
    fn after(self, before: Self) -> Self {
        let is_read_before = before.signature.is_some() || before.backup.problem.is_none();
        if self.backup == before.backup || (self.signature.is_none() && is_read_before) {
            if self.backup != before.backup {
                let problem = self.backup.problem.as_deref().unwrap_or_default();
                tracing::warn!(backup = %before.backup.id(), problem, "shown as it was");
            }
            return Self { backup: before.backup, ..self };
        }
        self
    }
}

/// What shows that a file is as it was.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Signature {
    inode: u64,
    size: u64,
    modified: SystemTime,
}

impl From<&Stat> for Signature {
    fn from(stat: &Stat) -> Self {
        Self { inode: stat.inode, size: stat.size, modified: stat.modified }
    }
}

/// What a look at a metadata file found.
enum Look {
    /// It was removed since the folder was listed.
    Gone,
    /// It is as it was.
    Same,
    /// It was read.
    Read(Known),
}

/// Whether a metadata file is as it was when it was read.
fn is_known(before: &HashMap<String, Known>, name: &str, stat: Option<&Stat>) -> bool {
    let signature = stat.map(Signature::from);
    signature.is_some() && before.get(name).is_some_and(|known| known.signature == signature)
}

/// What a VM's folder holds, as far as it concerns a listing.
struct Folder {
    path: ObjectPath,
    /// The metadata files, oldest first.
    files: Vec<(BackupTime, String)>,
    /// Names that look like metadata files but say no time that exists.
    odd: Vec<String>,
    has_cache: bool,
}

impl Catalog {
    pub fn new(storage: Arc<dyn Storage>) -> Self {
        let (age, crew) = (listing_age(storage.as_ref()), Crew::of(storage.as_ref()));
        Self { storage, age, crew, believes_cache: true, vms: Refreshed::default(), backups: Mutex::default() }
    }

    /// Reads every metadata file itself from now on: who removes something does not rely on what somebody noted of them.
    pub fn believe_no_cache(&mut self) {
        self.believes_cache = false;
    }

    /// Looks again at each access from now on.
    #[cfg(test)]
    pub fn look_always(&mut self) {
        self.age = Duration::ZERO;
    }

    /// Returns the VMs of the last listing; nothing is asked of the storage.
    pub fn known_vms(&self) -> Option<Arc<Vec<Vm>>> {
        self.vms.shown()
    }

    pub fn vms(&self, problems: &Problems) -> Result<Arc<Vec<Vm>>> {
        self.vms.get(self.age, |named, shown| self.list_vms(named, shown, problems))
    }

    fn list_vms(
        &self,
        before: &mut HashMap<VmId, Named>,
        shown: Option<&Arc<Vec<Vm>>>,
        problems: &Problems,
    ) -> Result<Arc<Vec<Vm>>> {
        let root = ObjectPath::new(VM_FOLDER)?;
        let ids: Vec<VmId> = match self.storage.list(&root) {
            Ok(entries) => {
                entries.iter().filter(|entry| entry.is_directory).filter_map(|entry| VmId::new(&entry.name)).collect()
            }
            // A repository may hold nothing but backups of configuration; then its root tells so.
            Err(error) if error.kind() == storage::ErrorKind::NotFound && self.has_no_vm_folder()? => Vec::new(),
            Err(error) => return Err(error.into()),
        };
        let named = self.crew.each(Work::File, &ids, |id| self.name(id, before.get(id), problems));
        let mut next = HashMap::with_capacity(ids.len());
        let mut list = Vec::with_capacity(ids.len());
        for (id, named) in ids.into_iter().zip(named) {
            let Some(named) = named else { continue };
            list.push(Vm { id: id.clone(), name: named.name.clone() });
            next.insert(id, named);
        }
        list.sort_by(|a, b| (&a.name, &a.id).cmp(&(&b.name, &b.id)));
        let is_there = |id: &VmId| next.contains_key(id);
        lock(&self.backups).retain(|id, _| is_there(id));
        problems.retain(is_there);
        *before = next;
        match shown {
            Some(shown) if **shown == list => Ok(shown.clone()),
            _ => Ok(Arc::new(list)),
        }
    }

    fn has_no_vm_folder(&self) -> Result<bool> {
        Ok(!self.storage.list(&ObjectPath::root())?.iter().any(|entry| entry.name == VM_FOLDER))
    }

    /// Returns the name of a VM; `None` if it has no backups.
    fn name(&self, id: &VmId, before: Option<&Named>, problems: &Problems) -> Option<Named> {
        let unnamed = || Named { name: before.map(|named| named.name.clone()).unwrap_or_default(), newest: None };
        let path = ObjectPath::new(VM_FOLDER).and_then(|root| root.join(id.as_str())).ok()?;
        let folder = match self.folder(id) {
            Ok(folder) => folder,
            Err(error) if error.kind() == ErrorKind::NotFound => {
                problems.resolve(&path, ProblemKind::Listing);
                return None;
            }
            Err(error) => {
                let message = error.to_string();
                problems.report(Problem { path, backup: None, kind: ProblemKind::Listing, message });
                return Some(unnamed());
            }
        };
        problems.resolve(&path, ProblemKind::Listing);
        if folder.files.is_empty() {
            return None;
        }
        let mut newest = None;
        let mut is_certain = true;
        for (number, (_, name)) in folder.files.iter().enumerate().rev() {
            let Ok(path) = folder.path.join(name) else { continue };
            match self.storage.stat(&path) {
                Ok(stat) => {
                    let found = newest.get_or_insert_with(|| (name.clone(), Signature::from(&stat)));
                    if before.is_some_and(|before| before.newest.as_ref() == Some(found)) {
                        return before.cloned();
                    }
                }
                Err(error) => {
                    is_certain &= !error.kind().is_unavailable();
                    continue;
                }
            }
            // Another one may give the name, but for the last.
            let pauses = if number == 0 && before.is_none() { read::PAUSES } else { &[] };
            match read::read(&*self.storage, &path, pauses) {
                Ok(metadata) => {
                    return Some(Named { name: metadata.vm_name(), newest: newest.filter(|_| is_certain) });
                }
                Err(Unread::Broken { may_pass: true, .. }) if before.is_some() => return Some(unnamed()),
                Err(Unread::Broken { may_pass, .. }) => is_certain &= !may_pass,
                Err(Unread::Gone) => {}
            }
        }
        Some(Named { newest: newest.filter(|_| is_certain), ..unnamed() })
    }

    /// Returns the backups of every VM, in the order of [`Catalog::vms`].
    pub fn all_backups(&self, problems: &Problems) -> Result<Vec<(Vm, Result<Backups>)>> {
        let vms = self.vms(problems)?;
        let all = self.crew.each(Work::Folder, &vms, |vm| self.backups(&vm.id, problems));
        Ok(vms.iter().cloned().zip(all).collect())
    }

    pub fn backups(&self, vm: &VmId, problems: &Problems) -> Result<Arc<Vec<Arc<Backup>>>> {
        let listing = lock(&self.backups).entry(vm.clone()).or_default().clone();
        listing.get(self.age, |known, shown| self.list_backups(vm, known, shown, problems))
    }

    fn list_backups(
        &self,
        vm: &VmId,
        before: &mut HashMap<String, Known>,
        shown: Option<&Arc<Vec<Arc<Backup>>>>,
        problems: &Problems,
    ) -> Result<Arc<Vec<Arc<Backup>>>> {
        let folder = match self.folder(vm) {
            Ok(folder) => folder,
            Err(error) => {
                if error.kind() == ErrorKind::NotFound {
                    lock(&self.backups).remove(vm);
                }
                return Err(error);
            }
        };
        let stat = |name: &str| self.storage.stat(&folder.path.join(name)?);
        let look = |time: BackupTime, name: &str, stat: storage::Result<Stat>, cached: Option<Metadata>| {
            let stat = match stat {
                Ok(stat) => Some(stat),
                Err(error) if error.kind() == storage::ErrorKind::NotFound => return Look::Gone,
                Err(_) => None,
            };
            if is_known(before, name, stat.as_ref()) {
                return Look::Same;
            }
            self.read_backup(vm, &folder.path, time, name, stat.as_ref(), cached).map_or(Look::Gone, Look::Read)
        };
        let looks = if folder.has_cache {
            let stats = self.crew.each(Work::File, &folder.files, |(_, name)| stat(name));
            let cached = Mutex::new(self.cached(&folder, &stats, before).unwrap_or_default());
            let files: Vec<_> =
                folder.files.iter().zip(stats).map(|(file, stat)| (file, Mutex::new(Some(stat)))).collect();
            self.crew.each(Work::File, &files, |((time, name), stat)| {
                let stat = lock(stat).take().expect("looked at once");
                let metadata = lock(&cached).remove(name);
                look(*time, name, stat, metadata)
            })
        } else {
            self.crew.each(Work::File, &folder.files, |(time, name)| look(*time, name, stat(name), None))
        };
        let mut known = HashMap::with_capacity(looks.len());
        let mut list = Vec::with_capacity(looks.len());
        for ((_, name), look) in folder.files.iter().zip(looks) {
            let now = match (look, before.remove(name)) {
                (Look::Read(now), Some(before)) => now.after(before),
                (Look::Read(now), None) => now,
                (Look::Same, Some(before)) => before,
                (Look::Gone, _) | (Look::Same, None) => continue,
            };
            list.push(now.backup.clone());
            known.insert(name.clone(), now);
        }
        *before = known;
        let is_there = |time| list.binary_search_by_key(&time, |backup: &Arc<Backup>| backup.time).is_ok();
        problems.set_listed(vm, found_problems(&folder, &list), is_there);
        let is_same = |(a, b): (&Arc<Backup>, &Arc<Backup>)| Arc::ptr_eq(a, b);
        match shown {
            Some(shown) if shown.len() == list.len() && shown.iter().zip(&list).all(is_same) => Ok(shown.clone()),
            _ => Ok(Arc::new(list)),
        }
    }

    /// Lists the folder of a VM.
    fn folder(&self, vm: &VmId) -> Result<Folder> {
        let path = ObjectPath::new(VM_FOLDER)?.join(vm.as_str())?;
        let mut folder = Folder { files: Vec::new(), odd: Vec::new(), has_cache: false, path };
        for entry in self.storage.list(&folder.path)? {
            if entry.is_directory {
                continue;
            }
            if entry.name == cache::NAME {
                folder.has_cache = self.believes_cache;
            } else if let Some(time) = BackupTime::of_metadata_name(&entry.name) {
                folder.files.push((time, entry.name));
            } else if is_metadata_name(&entry.name) {
                folder.odd.push(entry.name);
            }
        }
        folder.files.sort();
        Ok(folder)
    }

    /// Returns the metadata of all files out of XO's cache, if it can be believed and enough of them changed.
    fn cached(
        &self,
        folder: &Folder,
        stats: &[storage::Result<Stat>],
        before: &HashMap<String, Known>,
    ) -> Option<HashMap<String, Metadata>> {
        let mut names = Vec::with_capacity(stats.len());
        let mut times = Vec::with_capacity(stats.len());
        let mut changed = 0;
        for ((_, name), stat) in folder.files.iter().zip(stats) {
            match stat {
                Ok(stat) => {
                    changed += usize::from(!is_known(before, name, Some(stat)));
                    times.push(stat.modified);
                    names.push(name.as_str());
                }
                Err(error) if error.kind() == storage::ErrorKind::NotFound => {}
                Err(_) => return None,
            }
        }
        if changed < CACHE_WORTH {
            return None;
        }
        let cache = self.storage.stat(&folder.path.join(cache::NAME).ok()?).ok()?;
        let modified = self.storage.stat(&folder.path).ok()?.modified;
        if !cache::is_current(cache.modified, modified, times) {
            return None;
        }
        cache::read(self.storage.as_ref(), &folder.path, &cache, &names)
    }

    /// Reads one backup, from `cached` if it is there; `None` if it was removed since it was listed.
    fn read_backup(
        &self,
        vm: &VmId,
        directory: &ObjectPath,
        time: BackupTime,
        name: &str,
        stat: Option<&Stat>,
        cached: Option<Metadata>,
    ) -> Option<Known> {
        let path = directory.join(name).ok()?;
        let mut signature = stat.map(Signature::from);
        let metadata = match cached {
            Some(metadata) => Ok(metadata),
            None => match read::read(&*self.storage, &path, read::PAUSES) {
                Ok(metadata) => Ok(metadata),
                Err(Unread::Gone) => return None,
                Err(Unread::Broken { reason, may_pass }) => {
                    signature = signature.filter(|_| !may_pass);
                    Err(reason)
                }
            },
        };
        let backup = match metadata {
            Ok(metadata) => {
                let xva = metadata.xva().map(|xva| metadata::resolve(directory, xva));
                let mut backup = metadata.into_backup(vm, time, directory, path);
                if backup.mode == Mode::Full {
                    let xva = xva.unwrap_or_else(|| Err("a path was expected in 'xva'".to_owned()));
                    let found = xva.map_err(|reason| (reason, false)).and_then(|xva| self.xva_disks(&xva));
                    match found {
                        Ok((disks, unreadable)) => (backup.disks, backup.problem) = (disks, unreadable),
                        Err((reason, may_pass)) => {
                            backup.problem = Some(reason);
                            if may_pass {
                                signature = None;
                            }
                        }
                    }
                }
                backup
            }
            Err(reason) => {
                let reason = if reason.contains(path.as_str()) { reason } else { format!("'{path}': {reason}") };
                Backup::unreadable(vm, time, path, reason)
            }
        };
        Some(Known { signature, backup: Arc::new(backup) })
    }

    /// Looks into an XVA for its disks, and why they cannot be read if so; else why not, and whether that may pass.
    fn xva_disks(&self, path: &ObjectPath) -> std::result::Result<(Vec<BackupDisk>, Option<String>), (String, bool)> {
        let (found, unreadable) = super::disks::describe_xva(self.storage.as_ref(), path)
            .map_err(|error| (error.to_string(), error.kind() == disk::ErrorKind::Unavailable))?;
        let devices: Vec<Device> = found
            .iter()
            .map(|disk| {
                disk.user_device.as_deref().and_then(device_of_user_device).map_or(Device::Unknown, Device::Named)
            })
            .collect();
        let disk = |(index, (name, disk)): (usize, (String, &xva::XvaDisk))| BackupDisk {
            name,
            source: DiskSource::Xva { path: path.clone(), index },
            vdi: None,
            label: metadata::label_of(&disk.name_label),
            description: metadata::label_of(&disk.description),
            virtual_size: Some(disk.size),
        };
        let disks = disk_names(&devices).into_iter().zip(&found).enumerate().map(disk).collect();
        Ok((disks, unreadable))
    }
}

/// Whether a file name is that of a metadata file, whether or not its time exists.
fn is_metadata_name(name: &str) -> bool {
    let Some(time) = name.strip_suffix(".json") else { return false };
    let time = time.strip_suffix('Z').unwrap_or(time).as_bytes();
    time.len() == 15
        && time.iter().enumerate().all(|(at, byte)| if at == 8 { *byte == b'T' } else { byte.is_ascii_digit() })
}

fn found_problems(folder: &Folder, backups: &[Arc<Backup>]) -> Vec<Problem> {
    let of_backup = |backup: &Arc<Backup>| {
        let message = backup.problem.clone()?;
        let kind = if backup.mode == Mode::Unreadable { ProblemKind::Metadata } else { ProblemKind::Disk };
        Some(Problem { path: backup.metadata.clone(), backup: Some(backup.id()), kind, message })
    };
    let of_name = |name: &String| {
        let message = "its name is no time that exists: <YYYYMMDD>T<HHMMSS>Z.json was expected".to_owned();
        Some(Problem { path: folder.path.join(name).ok()?, backup: None, kind: ProblemKind::Metadata, message })
    };
    backups.iter().filter_map(of_backup).chain(folder.odd.iter().filter_map(of_name)).collect()
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
