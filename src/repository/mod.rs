//! A backup repository of Xen Orchestra: its VMs, their backups, and the disks in them.
//!
//! ```text
//! Repository
//!   ├─ catalog    VMs and backups, listed again on access     ◄─ cache, metadata (fields), crew
//!   ├─ disks      open disks, shared                          ─► vhd, xva
//!   ├─ loose      VHDs without any metadata
//!   ├─ stored     backups of XO's configuration and of pool metadata
//!   ├─ problems   what is wrong, instead of failing
//!   ├─ selector   `VM[/BACKUP[/DISK]]`
//!   ├─ usage      how large it is
//!   └─ retention  which backups may be forgotten             ─► period; immutability
//! VmLock ─ lock     XO's lock of a VM
//! initialize  a new one, in an empty place
//! VmFolder ─ changes   backups added, removed and rewritten, under that lock
//! ids, time, naming, error: what the others are said with
//! ```
//!
//! A [`Repository`] only reads. Nothing here opens a VHD in order to list, and nothing fails because of one bad file: what cannot be
//! read is listed with its [`Problem`]. A folder that cannot be listed is an error, never an empty list.

mod cache;
mod catalog;
mod changes;
mod crew;
mod disks;
mod error;
mod fields;
mod ids;
mod immutability;
mod initialize;
mod lock;
mod loose;
mod metadata;
mod naming;
mod period;
mod problems;
mod read;
mod refresh;
mod retention;
mod selector;
mod stored;
#[cfg(test)]
pub(crate) mod tests;
mod time;
mod usage;

use std::path::Path;
use std::sync::Arc;

use disk::Disk;
use jiff::SignedDuration;
use storage::{EncryptedStorage, LocalStorage, ObjectPath, Storage, WritableStorage};

pub(crate) use changes::remove_empty_lineage;
pub use changes::{Document, VmFolder};
pub use disks::MissingBlock;
pub use error::{Error, ErrorKind, Result};
pub(crate) use ids::random_uuid;
pub use ids::{BackupId, VmId};
pub use lock::VmLock;
pub use loose::LooseDisk;
pub use metadata::{Backup, BackupDisk, DiskSource, Mode};
pub(crate) use naming::is_device_name;
pub use naming::{escape_name, unescape_name, vm_directory_names};
pub use period::Period;
pub use problems::{Problem, ProblemKind};
pub use retention::{Decision, PeriodRule, Protection, Reason, Rules};
pub use selector::Selection;
pub use stored::StoredBackup;
pub use time::BackupTime;

use catalog::Catalog;
use disks::OpenDisks;
use loose::LooseDisks;
use problems::Problems;

/// Where the backups of VMs are.
pub(crate) const VM_FOLDER: &str = "xo-vm-backups";
/// Where the backups of XO's configuration are.
const CONFIG_FOLDER: &str = "xo-config-backups";
/// Where the backups of pool metadata are.
const POOL_FOLDER: &str = "xo-pool-metadata-backups";
/// What only stands in a repository, at its root.
const MARKERS: [&str; 5] = [VM_FOLDER, CONFIG_FOLDER, POOL_FOLDER, "encryption.json", "metadata.json"];
/// Longest metadata file read (bytes); a longer one is a problem of its backup.
pub(crate) const METADATA_LIMIT: u64 = 64 << 20;
/// Longest file read in one piece by [`Repository::read_stored`] (bytes); a longer one is refused.
const STORED_LIMIT: u64 = 1 << 30;

/// The backups of a VM, oldest first.
pub type Backups = Arc<Vec<Arc<Backup>>>;

/// How a repository is opened.
pub struct OpenOptions {
    /// The key of an encrypted repository.
    pub key: Option<storage::EncryptionKey>,
    /// Bytes of decoded blocks kept in memory, over all disks.
    pub cache_bytes: u64,
}

impl Default for OpenOptions {
    fn default() -> Self {
        Self { key: None, cache_bytes: 256 << 20 }
    }
}

/// What was opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Layout {
    /// A repository with VMs and their backups.
    Repository,
    /// One VHD or a folder of VHDs, without metadata: see [`Repository::loose_disks`].
    Disks,
}

/// A VM that has backups.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Vm {
    /// Its uuid.
    pub id: VmId,
    /// Its name in its newest backup that can be read; empty if unknown.
    pub name: String,
}

/// A repository, or what is mounted like one.
pub struct Repository {
    storage: Arc<dyn Storage>,
    /// The storage under the encryption, the same as `storage` where there is none.
    raw: Arc<dyn Storage>,
    layout: Layout,
    catalog: Catalog,
    disks: OpenDisks,
    loose: LooseDisks,
    stored: stored::Sizes,
    problems: Problems,
}

impl Repository {
    /// Opens the repository at `path`: the root of one, a single `.vhd`, alias or exploded folder, or a folder of VHDs.
    ///
    /// # Errors
    /// [`ErrorKind::NoSuchRepository`] if it is none of these; [`ErrorKind::Key`] if it is encrypted and the key is
    /// wrong or missing; [`ErrorKind::PermissionDenied`] or [`ErrorKind::Unavailable`] as the storage says.
    pub fn open(path: &Path, options: OpenOptions) -> Result<Arc<Self>> {
        let place = loose::locate(path)?;
        let local = LocalStorage::open(&place.root).map_err(|error| open_error(path, &error))?;
        match place.disk {
            Some(name) => {
                let storage: Arc<dyn Storage> = Arc::new(local);
                let disk = loose::named_disk(&storage, &name)?;
                Ok(Self::assemble(
                    storage.clone(),
                    storage,
                    Layout::Disks,
                    LooseDisks::single(disk),
                    options.cache_bytes,
                ))
            }
            None => Self::with_storage(Arc::new(local), options),
        }
    }

    /// Opens what lies on `storage`: a repository or a folder of VHDs.
    ///
    /// # Errors
    /// As for [`Repository::open`].
    pub fn with_storage(storage: Arc<dyn Storage>, options: OpenOptions) -> Result<Arc<Self>> {
        let entries = storage.list(&ObjectPath::root())?;
        if entries.iter().any(|entry| MARKERS.contains(&entry.name.as_str())) {
            let readable = EncryptedStorage::detect(storage.clone(), options.key)?;
            return Ok(Self::assemble(
                storage,
                readable,
                Layout::Repository,
                LooseDisks::folder(),
                options.cache_bytes,
            ));
        }
        if entries.iter().any(loose::is_vhd) {
            return Ok(Self::assemble(
                storage.clone(),
                storage,
                Layout::Disks,
                LooseDisks::folder(),
                options.cache_bytes,
            ));
        }
        let what = if entries.is_empty() { "is empty" } else { "holds neither" };
        let message = format!(
            "'{}' {what}: a backup repository (a folder with '{VM_FOLDER}') or a folder of .vhd files was expected; \
             check the path, and that the share is mounted",
            storage.describe()
        );
        Err(Error::new(ErrorKind::NoSuchRepository, message))
    }

    /// Makes the empty folder at `path` a repository, encrypted if there is a key; a folder that is missing is made.
    ///
    /// # Errors
    /// [`ErrorKind::Exists`] if something is there; [`ErrorKind::NoSuchRepository`] if the folder above is missing; else
    /// what the storage says.
    pub fn initialize(path: &Path, key: Option<&storage::EncryptionKey>) -> Result<()> {
        initialize::initialize(path, key)
    }

    /// Makes a repository of a storage that needs no key any more, for those who change it: every metadata file is read,
    /// whatever a listing cache or another `Repository` says.
    #[must_use]
    pub fn to_change(storage: Arc<dyn Storage>, cache_bytes: u64) -> Arc<Self> {
        let mut repository =
            Self::assemble(storage.clone(), storage, Layout::Repository, LooseDisks::folder(), cache_bytes);
        Arc::get_mut(&mut repository).expect("nobody else has it").catalog.believe_no_cache();
        repository
    }

    /// Opens the storage of the repository at `path` to change what is in it.
    ///
    /// # Errors
    /// As for [`Repository::open`]; [`ErrorKind::NoSuchRepository`] also for a VHD or a folder of VHDs.
    pub fn open_writable(path: &Path, key: Option<storage::EncryptionKey>) -> Result<Arc<dyn WritableStorage>> {
        let local = LocalStorage::open(path).map_err(|error| open_error(path, &error))?;
        let entries = local.list(&ObjectPath::root())?;
        if !entries.iter().any(|entry| MARKERS.contains(&entry.name.as_str())) {
            let message = format!(
                "'{}' is no backup repository: a folder with '{VM_FOLDER}' was expected; check the path, and that the share \
                 is mounted; 'xofs repository init' makes a new one",
                path.display()
            );
            return Err(Error::new(ErrorKind::NoSuchRepository, message));
        }
        Ok(EncryptedStorage::detect_writable(Arc::new(local), key)?)
    }

    fn assemble(
        raw: Arc<dyn Storage>,
        storage: Arc<dyn Storage>,
        layout: Layout,
        loose: LooseDisks,
        cache_bytes: u64,
    ) -> Arc<Self> {
        Arc::new(Self {
            catalog: Catalog::new(storage.clone()),
            disks: OpenDisks::new(storage.clone(), raw.clone(), cache_bytes),
            loose,
            stored: stored::Sizes::default(),
            problems: Problems::default(),
            storage,
            raw,
            layout,
        })
    }

    /// Returns the storage, decrypting if need be.
    #[must_use]
    pub fn storage(&self) -> &Arc<dyn Storage> {
        &self.storage
    }

    /// Returns what was opened.
    #[must_use]
    pub fn layout(&self) -> Layout {
        self.layout
    }

    /// Returns the VMs that have backups, by name and uuid.
    ///
    /// Listed again if the last listing is older than a second (5 s over a network); the same pointer if nothing
    /// changed. A VM whose folder cannot be listed is there, with a problem.
    ///
    /// # Errors
    /// What the storage says when the folder of all VMs cannot be listed.
    pub fn vms(&self) -> Result<Arc<Vec<Vm>>> {
        match self.layout {
            Layout::Repository => self.catalog.vms(&self.problems),
            Layout::Disks => Ok(Arc::default()),
        }
    }

    /// Returns the VMs of the last listing; nothing is asked of the storage. `None` before the first one.
    #[must_use]
    pub fn known_vms(&self) -> Option<Arc<Vec<Vm>>> {
        self.catalog.known_vms()
    }

    /// Returns the backups of a VM, oldest first.
    ///
    /// Listed again like [`Repository::vms`]; only metadata files that changed are read. A backup that did not change
    /// stays the same pointer.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] if the VM has no folder; else what the storage says.
    pub fn backups(&self, vm: &VmId) -> Result<Arc<Vec<Arc<Backup>>>> {
        self.catalog.backups(vm, &self.problems)
    }

    /// Returns every VM and its backups, or why they cannot be listed; several VMs are looked at at the same time.
    ///
    /// # Errors
    /// As for [`Repository::vms`].
    pub fn all_backups(&self) -> Result<Vec<(Vm, Result<Backups>)>> {
        match self.layout {
            Layout::Repository => self.catalog.all_backups(&self.problems),
            Layout::Disks => Ok(Vec::new()),
        }
    }

    /// Returns the metadata of a backup as stored, decrypted.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] if the backup was removed; else what the storage says.
    pub fn backup_metadata(&self, backup: &Backup) -> Result<Vec<u8>> {
        Ok(self.storage.read(&backup.metadata, METADATA_LIMIT)?)
    }

    /// Returns how many bytes [`Repository::backup_metadata`] gives; read, once, only where it is encrypted.
    ///
    /// # Errors
    /// As for [`Repository::backup_metadata`].
    pub fn metadata_size(&self, backup: &Backup) -> Result<u64> {
        Ok(self.stored.size(self.storage.as_ref(), &backup.metadata)?)
    }

    /// Opens a disk of a backup, or shares it if it is open already.
    ///
    /// # Errors
    /// [`disk::ErrorKind::Stale`] if the backup was removed, [`disk::ErrorKind::Damaged`] or
    /// [`disk::ErrorKind::Unsupported`] if the disk cannot be read (also reported as a problem),
    /// [`disk::ErrorKind::Unavailable`] if the storage did not answer.
    pub fn open_disk(&self, backup: &Backup, disk: &BackupDisk) -> disk::Result<Arc<dyn Disk>> {
        self.disks.open(backup, disk, &self.problems)
    }

    /// Returns how many disks are open, whether or not somebody holds them; nothing is asked of the storage.
    #[must_use]
    pub fn open_disks(&self) -> usize {
        self.disks.count()
    }

    /// Returns the bytes of decoded blocks kept in memory; nothing is asked of the storage.
    #[must_use]
    pub fn cached_bytes(&self) -> u64 {
        self.disks.cached_bytes()
    }

    /// Returns the layers of a disk, leaf first; none for a disk in an XVA.
    ///
    /// # Errors
    /// As for [`Repository::open_disk`].
    pub fn chain(&self, backup: &Backup, disk: &BackupDisk) -> disk::Result<Vec<vhd::LayerInfo>> {
        self.disks.chain(backup, disk, &self.problems)
    }

    /// Returns what is known of the leaf of a disk, `None` for a disk in an XVA; of an open disk nothing is read.
    ///
    /// # Errors
    /// As for [`Repository::open_disk`].
    pub fn leaf(&self, backup: &Backup, disk: &BackupDisk) -> disk::Result<Option<vhd::Leaf>> {
        self.disks.leaf(backup, disk, &self.problems)
    }

    /// Returns where the disks of two backups may differ, by their tables alone; `None` for a disk in an XVA. See
    /// [`vhd::ChainDisk::differing_ranges`].
    ///
    /// # Errors
    /// As for [`Repository::open_disk`]; [`disk::ErrorKind::Unavailable`] while a merge changes one of them.
    pub fn differing_ranges(
        &self,
        one: (&Backup, &BackupDisk),
        other: (&Backup, &BackupDisk),
    ) -> disk::Result<Option<Vec<std::ops::Range<u64>>>> {
        self.disks.differing_ranges(one, other, &self.problems)
    }

    /// Returns what is known of the leaf of a VHD that has no metadata.
    ///
    /// # Errors
    /// As for [`Repository::open_disk`].
    pub fn loose_leaf(&self, disk: &LooseDisk) -> disk::Result<Option<vhd::Leaf>> {
        self.disks.loose_leaf(disk, &self.problems)
    }

    /// Reads what is known of the blocks of a disk without reading them; `None` for a disk in an XVA.
    ///
    /// # Errors
    /// As for [`Repository::open_disk`].
    pub fn digests(&self, backup: &Backup, disk: &BackupDisk) -> disk::Result<Option<vhd::ChainDigests>> {
        self.disks.digests(backup, disk, &self.problems)
    }

    /// The same of a VHD that has no metadata.
    ///
    /// # Errors
    /// As for [`Repository::open_disk`].
    pub fn loose_digests(&self, disk: &LooseDisk) -> disk::Result<Option<vhd::ChainDigests>> {
        self.disks.loose_digests(disk, &self.problems)
    }

    /// Returns the blocks that a disk's chain promises and whose files are missing; nothing is read but listings.
    ///
    /// # Errors
    /// As for [`Repository::open_disk`].
    pub fn missing_blocks(&self, backup: &Backup, disk: &BackupDisk) -> disk::Result<Vec<MissingBlock>> {
        self.disks.missing_blocks(backup, disk, &self.problems)
    }

    /// The same of a VHD that has no metadata.
    ///
    /// # Errors
    /// As for [`Repository::open_disk`].
    pub fn missing_loose_blocks(&self, disk: &LooseDisk) -> disk::Result<Vec<MissingBlock>> {
        self.disks.missing_loose_blocks(disk, &self.problems)
    }

    /// Returns the VHDs that lie around without metadata, by name: those that no other one has as its parent.
    /// Empty for a repository.
    ///
    /// # Errors
    /// What the storage says when the folder cannot be listed.
    pub fn loose_disks(&self) -> Result<Arc<Vec<Arc<LooseDisk>>>> {
        match self.layout {
            Layout::Repository => Ok(Arc::default()),
            Layout::Disks => self.loose.list(self.storage.as_ref()),
        }
    }

    /// Returns the VHDs of the last listing; nothing is asked of the storage. `None` before the first one.
    #[must_use]
    pub fn known_loose_disks(&self) -> Option<Arc<Vec<Arc<LooseDisk>>>> {
        match self.layout {
            Layout::Repository => Some(Arc::default()),
            Layout::Disks => self.loose.known(),
        }
    }

    /// Opens a VHD that has no metadata, or shares it if it is open already.
    ///
    /// # Errors
    /// As for [`Repository::open_disk`].
    pub fn open_loose(&self, disk: &LooseDisk) -> disk::Result<Arc<dyn Disk>> {
        self.disks.open_loose(disk, &self.problems)
    }

    /// Returns the layers of a VHD that has no metadata, leaf first.
    ///
    /// # Errors
    /// As for [`Repository::open_disk`].
    pub fn loose_chain(&self, disk: &LooseDisk) -> disk::Result<Vec<vhd::LayerInfo>> {
        self.disks.loose_chain(disk, &self.problems)
    }

    /// Returns the backups of XO's configuration, by schedule and time.
    ///
    /// # Errors
    /// What the storage says when a folder cannot be listed.
    pub fn config_backups(&self) -> Result<Vec<StoredBackup>> {
        stored::config_backups(self.storage.as_ref(), &self.stored)
    }

    /// Returns the backups of pool metadata, by pool and time.
    ///
    /// # Errors
    /// What the storage says when a folder cannot be listed.
    pub fn pool_backups(&self) -> Result<Vec<StoredBackup>> {
        stored::pool_backups(self.storage.as_ref(), &self.stored)
    }

    /// Returns the bytes of a file of the repository, decrypted; at most 1 GiB.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] if it is gone; else what the storage says.
    pub fn read_stored(&self, path: &ObjectPath) -> Result<Vec<u8>> {
        Ok(self.storage.read(path, STORED_LIMIT)?)
    }

    /// Returns the bytes of all files; each is looked at, which takes time.
    ///
    /// # Errors
    /// What the storage says: nothing that could not be looked at counts as empty.
    pub fn used_bytes(&self) -> Result<u64> {
        usage::used_bytes(self.raw.as_ref())
    }

    /// Returns for how long a backup is immutable from the time in its name; `None` if none is.
    ///
    /// # Errors
    /// [`ErrorKind::Damaged`] if XO's `immutability.json` is there and does not say so; else what the storage says.
    pub fn immutability(&self) -> Result<Option<SignedDuration>> {
        immutability::read(self.raw.as_ref())
    }

    /// Returns what is known to be wrong: what the last listings found and what was reported since.
    #[must_use]
    pub fn problems(&self) -> Vec<Problem> {
        self.problems.all()
    }

    /// Remembers and logs a problem, once for each object and kind.
    pub fn report_problem(&self, problem: Problem) {
        self.problems.report(problem);
    }

    /// Finds what `VM[/BACKUP[/DISK]]` names.
    ///
    /// VM is a name (if only one VM has it), a uuid or its first characters, or the name of its folder in a mount;
    /// BACKUP is `latest`, `latest~2`, or a time or its beginning (`2026-11`, `20261120T03`); DISK is the name of a
    /// disk. Where [`Layout::Disks`] was opened, it is the name of a VHD, or empty if there is but one.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] or [`ErrorKind::Ambiguous`], the message listing what there is; or as for
    /// [`Repository::backups`].
    pub fn select(&self, what: &str) -> Result<Selection> {
        selector::select(self, what)
    }
}

/// The error of a path that cannot be opened at all.
fn open_error(path: &Path, error: &std::io::Error) -> Error {
    let shown = path.display();
    match error.kind() {
        std::io::ErrorKind::NotFound => Error::new(
            ErrorKind::NoSuchRepository,
            format!("'{shown}' does not exist: the path of a backup repository was expected"),
        ),
        std::io::ErrorKind::NotADirectory => Error::new(
            ErrorKind::NoSuchRepository,
            format!("'{shown}' is no folder: a backup repository, a .vhd file or a folder of them was expected"),
        ),
        std::io::ErrorKind::PermissionDenied => Error::new(
            ErrorKind::PermissionDenied,
            format!("'{shown}' cannot be opened: permission denied (an NFS export may refuse root: root_squash)"),
        ),
        _ => Error::new(ErrorKind::Unavailable, format!("'{shown}' cannot be opened: {error}")),
    }
}
