//! Disks as files: their names, sizes, bytes and what is said of them.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::num::NonZeroUsize;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use disk::Disk;
use lru::LruCache;
use storage::{ObjectPath, Stat};
use uuid::Uuid;
use vhd::{Leaf, VhdView};

use super::key::{Form, Key, ROOT};
use super::{Error, Result, Tree};
use crate::repository::{Backup, BackupDisk, BackupId, DiskSource, LooseDisk};

/// For how long the size of a disk that cannot be opened is answered without trying again.
const RETRY: Duration = Duration::from_secs(5);

/// Seconds from 1970 to 2000, where VHD's clock starts. Source: VHD specification 1.0, "Time Stamp".
const VHD_EPOCH: i64 = 946_684_800;

/// Disks whose sizes are remembered at most, some 300 bytes each; beyond, the one not asked for for longest is measured
/// again when it is.
const SIZES_LIMIT: NonZeroUsize = NonZeroUsize::new(16 << 10).expect("not zero");

/// What `stat` needs of each disk: (size, allocated) in bytes.
///
/// Where nothing but its name stands for a disk, another may come to stand there: what the storage says of the file
/// tells them apart.
pub(super) struct Sizes(Mutex<LruCache<Key, (Option<Stat>, Known)>>);

#[derive(Clone, Copy)]
enum Known {
    Exact(u64, u64),
    /// It could not be opened; the size is what the metadata says.
    Guess(u64, Instant),
}

impl Default for Sizes {
    fn default() -> Self {
        Self(Mutex::new(LruCache::new(SIZES_LIMIT)))
    }
}

impl Sizes {
    fn get(&self, key: &Key, file: Option<&Stat>) -> Option<(u64, u64)> {
        match self.0.lock().unwrap_or_else(PoisonError::into_inner).get(key)? {
            (seen, _) if seen.as_ref() != file => None,
            (_, Known::Exact(size, allocated)) => Some((*size, *allocated)),
            (_, Known::Guess(size, at)) => (at.elapsed() < RETRY).then_some((*size, 0)),
        }
    }

    fn set(&self, key: &Key, file: Option<Stat>, known: Known) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).put(key.clone(), (file, known));
    }

    /// Answers from memory, else by opening it for `measure`; a disk that cannot be read has the size `guess`.
    ///
    /// `file` is what was known of its file before it was opened.
    pub(super) fn get_or_measure(
        &self,
        key: &Key,
        file: Option<Stat>,
        guess: u64,
        measure: impl FnOnce() -> Result<(u64, u64)>,
    ) -> Result<(u64, u64)> {
        if let Some(sizes) = self.get(key, file.as_ref()) {
            return Ok(sizes);
        }
        match measure() {
            Ok((size, allocated)) => {
                self.set(key, file, Known::Exact(size, allocated));
                Ok((size, allocated))
            }
            Err(Error::Disk(_)) => {
                self.set(key, file, Known::Guess(guess, Instant::now()));
                Ok((guess, 0))
            }
            Err(error) => Err(error),
        }
    }
}

impl Tree {
    /// Returns the files of a backup's disks. A VHD is left out where the disk is known to be larger than one can be.
    pub(super) fn disk_files(&self, id: &BackupId) -> Result<Vec<(String, Key)>> {
        let backup = self.backup(id)?;
        let mut files = Vec::with_capacity(2 * backup.disks.len());
        for disk in &backup.disks {
            let name: Arc<str> = Arc::from(disk.name.as_str());
            for form in forms(disk.virtual_size) {
                files.push((format!("{name}{}", form.suffix()), Key::Disk(id.clone(), name.clone(), *form)));
            }
        }
        Ok(files)
    }

    /// Returns the files of the disks that have no metadata; while the repository does not answer, those known.
    pub(super) fn loose_files(&self) -> Result<Vec<(String, Key)>> {
        let known = if self.health.is_silent(ROOT) { self.repository.known_loose_disks() } else { None };
        let disks = known.map_or_else(|| self.repository.loose_disks(), Ok)?;
        let mut files = Vec::with_capacity(2 * disks.len());
        for disk in disks.iter() {
            let name: Arc<str> = Arc::from(disk.name.as_str());
            for form in forms(None) {
                files.push((format!("{name}{}", form.suffix()), Key::Loose(name.clone(), *form)));
            }
        }
        Ok(files)
    }

    pub(super) fn disk_sizes(&self, key: &Key, id: &BackupId, name: &str, form: Form) -> Result<(u64, u64)> {
        let (_, disk) = self.disk(id, name)?;
        // Of a VHD that cannot be made, nothing is known.
        let guess = if form == Form::Raw { disk.virtual_size.unwrap_or(0) } else { 0 };
        self.sizes.get_or_measure(key, None, guess, || {
            let open = self.open_disk(id, name, form)?;
            // An XVA has no map: what it holds of a disk is known from a header for each MiB, too many for a `stat`.
            let has_map = !matches!((&disk.source, form), (DiskSource::Xva { .. }, Form::Raw));
            Ok((open.size(), if has_map { open.allocated()? } else { open.size() }))
        })
    }

    pub(super) fn loose_sizes(&self, key: &Key, name: &str, form: Form) -> Result<(u64, u64)> {
        let disk = self.loose(name)?;
        let file = self.repository.storage().stat(&disk.path).ok();
        self.sizes.get_or_measure(key, file, 0, || {
            let open = self.open_loose(name, form)?;
            Ok((open.size(), open.allocated()?))
        })
    }

    pub(super) fn open_disk(&self, id: &BackupId, name: &str, form: Form) -> Result<Arc<dyn Disk>> {
        let (backup, disk) = self.disk(id, name)?;
        let open = self.repository.open_disk(&backup, &disk)?;
        if form == Form::Raw {
            return Ok(open);
        }
        let leaf = self.repository.leaf(&backup, &disk)?;
        view(open, leaf, (id, name), id.time.unix())
    }

    pub(super) fn open_loose(&self, name: &str, form: Form) -> Result<Arc<dyn Disk>> {
        let disk = self.loose(name)?;
        let open = self.repository.open_loose(&disk)?;
        if form == Form::Raw {
            return Ok(open);
        }
        let leaf = self.repository.loose_leaf(&disk)?;
        view(open, leaf, name, VHD_EPOCH)
    }

    /// Returns what is said of a disk; of one that cannot be opened, why.
    pub(super) fn disk_properties(&self, id: &BackupId, name: &str) -> Result<Vec<(&'static str, String)>> {
        let (backup, disk) = self.disk(id, name)?;
        let mut properties = Vec::new();
        for (property, value) in [("name", &disk.label), ("description", &disk.description)] {
            if !value.is_empty() {
                properties.push((property, value.clone()));
            }
        }
        let opened = self.repository.open_disk(&backup, &disk);
        let leaf = opened.as_ref().ok().map(|_| self.repository.leaf(&backup, &disk));
        let problem = describe(opened, leaf, &mut properties)?;
        if let Some(problem) = problem.or_else(|| backup.problem.clone()) {
            properties.push(("problem", problem));
        }
        Ok(properties)
    }

    pub(super) fn loose_properties(&self, name: &str) -> Result<Vec<(&'static str, String)>> {
        let disk = self.loose(name)?;
        let mut properties = Vec::new();
        let opened = self.repository.open_loose(&disk);
        let leaf = opened.as_ref().ok().map(|_| self.repository.loose_leaf(&disk));
        if let Some(problem) = describe(opened, leaf, &mut properties)? {
            properties.push(("problem", problem));
        }
        Ok(properties)
    }

    /// Returns where a disk is stored.
    pub(super) fn disk_path(&self, id: &BackupId, name: &str) -> Option<ObjectPath> {
        match self.disk(id, name).ok()?.1.source {
            DiskSource::Vhd(path) | DiskSource::Xva { path, .. } => Some(path),
            DiskSource::Unusable(_) => None,
        }
    }

    pub(super) fn loose_path(&self, name: &str) -> Option<ObjectPath> {
        Some(self.loose(name).ok()?.path.clone())
    }

    fn disk(&self, id: &BackupId, name: &str) -> Result<(Arc<Backup>, BackupDisk)> {
        let backup = self.backup(id)?;
        let disk = backup.disks.iter().find(|disk| disk.name == name).ok_or(Error::NotFound)?.clone();
        Ok((backup, disk))
    }

    fn loose(&self, name: &str) -> Result<Arc<LooseDisk>> {
        let disks = self.repository.loose_disks()?;
        disks.iter().find(|disk| disk.name == name).cloned().ok_or(Error::NotFound)
    }
}

/// Returns the forms in which a disk of that size is shown.
fn forms(size: Option<u64>) -> &'static [Form] {
    match size {
        Some(size) if size > VhdView::MAX_SIZE => &[Form::Raw],
        _ => &[Form::Raw, Form::Vhd],
    }
}

/// Makes one VHD of a whole disk.
///
/// Its id is the leaf's; that of a disk which has no VHD is made of `identity`, the same each time.
fn view(disk: Arc<dyn Disk>, leaf: Option<Leaf>, identity: impl Hash, unix: i64) -> Result<Arc<dyn Disk>> {
    if disk.size() > VhdView::MAX_SIZE {
        return Err(Error::NotFound);
    }
    let uuid = leaf.map_or_else(|| made_uuid(identity), |leaf| leaf.uuid);
    let timestamp = leaf.map_or_else(|| u32::try_from(unix - VHD_EPOCH).unwrap_or(0), |leaf| leaf.timestamp);
    Ok(Arc::new(VhdView::new(disk, uuid, timestamp)?))
}

fn made_uuid(identity: impl Hash) -> Uuid {
    let hash = |salt: u8| {
        let mut hasher = DefaultHasher::new();
        (salt, &identity).hash(&mut hasher);
        hasher.finish()
    };
    // Version 8 is for ids made in a way of one's own. Source: RFC 9562, section 5.8.
    uuid::Builder::from_u128(u128::from(hash(0)) << 64 | u128::from(hash(1)))
        .with_version(uuid::Version::Custom)
        .with_variant(uuid::Variant::RFC4122)
        .into_uuid()
}

/// Adds what the leaf of an open disk says; returns why it could not be opened.
fn describe(
    opened: disk::Result<Arc<dyn Disk>>,
    leaf: Option<disk::Result<Option<Leaf>>>,
    properties: &mut Vec<(&'static str, String)>,
) -> Result<Option<String>> {
    let found = opened.and_then(|disk| Ok((disk.allocated()?, leaf.transpose()?.flatten())));
    match found.map_err(Error::from) {
        Ok((allocated, leaf)) => {
            properties.push(("allocated", allocated.to_string()));
            if let Some(leaf) = leaf {
                properties.push(("uuid", leaf.uuid.to_string()));
                if let Some(parent) = leaf.parent_uuid {
                    properties.push(("parent", parent.to_string()));
                }
                properties.push(("chain", leaf.chain_length.to_string()));
            }
            Ok(None)
        }
        Err(Error::Disk(error)) => Ok(Some(error.to_string())),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use disk::Extent;
    use storage::{FaultyStorage, MemoryStorage, Operation};

    use super::*;
    use crate::repository::tests::{VM, put_full, xva_of};
    use crate::repository::{BackupTime, VmId};
    use crate::tree::tests::tree_on;
    use crate::tree::{Content, ROOT};

    /// A disk without data.
    struct Empty(u64);

    impl Disk for Empty {
        fn size(&self) -> u64 {
            self.0
        }

        fn read_at(&self, _: u64, buffer: &mut [u8]) -> disk::Result<()> {
            buffer.fill(0);
            Ok(())
        }

        fn extent_at(&self, offset: u64) -> disk::Result<Extent> {
            Ok(Extent { len: self.0 - offset, is_hole: true })
        }
    }

    #[test]
    fn the_size_of_a_disk_in_an_xva_is_told_without_looking_for_its_holes() {
        const SIZE: u64 = 64 << 20;
        let memory = Arc::new(MemoryStorage::new());
        let chunk = |number: u64| (format!("Ref:2/{number:08}"), vec![7; 1 << 20]);
        let chunks: Vec<_> = (0..32).chain([63]).map(chunk).collect();
        let xva = xva_of(&[("Ref:2", SIZE, "0")], &chunks);
        put_full(&memory, 1, xva);
        let faulty = Arc::new(FaultyStorage::new(memory));
        let tree = tree_on(faulty.clone());
        let backup = BackupId { vm: VmId::new(VM).unwrap(), time: BackupTime::parse("20260801T020003Z").unwrap() };
        let key = Key::Disk(backup, Arc::from("xvda"), Form::Raw);
        faulty.reset_counts();
        let attributes = tree.attributes(tree.inodes.number(&key)).unwrap();
        assert_eq!((attributes.size, attributes.allocated), (SIZE, SIZE));
        assert!(faulty.count(Operation::ReadAt) < 16, "{} reads", faulty.count(Operation::ReadAt));
        let Ok(Content::Disk(disk)) = tree.open(attributes.inode) else { panic!("a disk") };
        assert_eq!(disk::seek_hole(disk.as_ref(), 0).unwrap(), Some(32 << 20));
    }

    #[test]
    fn a_disk_that_takes_the_name_of_another_has_its_own_size() {
        let storage = Arc::new(MemoryStorage::new());
        let put = |number: u128, size: u64| {
            let view = VhdView::new(Arc::new(Empty(size)), Uuid::from_u128(number), 0).unwrap();
            let mut file = vec![0; usize::try_from(view.size()).unwrap()];
            view.read_at(0, &mut file).unwrap();
            storage.put("a.vhd", file).unwrap();
        };
        put(1, 4096);
        let tree = tree_on(storage.clone());
        let sizes = || ["a.raw", "a.vhd"].map(|name| tree.lookup(ROOT, name.as_ref()).unwrap().size);
        assert_eq!(sizes(), [4096, 2560]);
        put(2, 1 << 31);
        assert_eq!(sizes(), [1 << 31, 512 + 1024 + 4096 + 512]);
    }
}
