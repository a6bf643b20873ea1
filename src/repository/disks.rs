//! Open disks: opened once however many hold them, closed when room is needed, and dead with their backup.

use std::collections::HashMap;
use std::num::NonZeroUsize;
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::thread;
use std::time::{Duration, Instant};

use disk::{Disk, Extent};
use lru::LruCache;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use storage::{Object, ObjectPath, Storage};
use vhd::{BlockCache, BlockIndex, ChainDigests, ChainDisk, Context, Liveness};
use xva::{Compression, Xva};

use super::catalog::Signature;
use super::metadata::{Backup, BackupDisk, DiskSource};
use super::problems::{Problem, ProblemKind, Problems};
use super::{BackupId, LooseDisk};

/// Held, across its decryption, by who looks into an XVA that is decrypted as a whole: one at a time, which bounds memory.
static DECRYPTED: Mutex<()> = Mutex::new(());

/// Most disks kept open though nobody holds them; the one unused for longest is closed first.
const KEPT: NonZeroUsize = NonZeroUsize::new(256).expect("not zero");
/// Most memory that the tables of the disks kept open though nobody holds them may take (bytes, estimated); then the one
/// unused for longest is closed.
const KEPT_BYTES: u64 = 128 << 20;
/// How long a disk is kept open that nobody holds or asks for. What an open file takes of a disk is free only once it is
/// closed, also if its backup was removed long ago.
const KEPT_FOR: Duration = Duration::from_secs(60);
/// Memory a disk takes for each block, and for itself (bytes, estimated).
const BYTES_PER_BLOCK: u64 = 8;
const BYTES_PER_DISK: u64 = 64 << 10;
/// Most open files asked of the system for the whole process.
const FILES_WANTED: u64 = 64 << 10;
/// What the disks of an XVA are stored in (bytes).
const XVA_CHUNK: u64 = 1 << 20;

/// A block that a table lists and that is not there, and the folder it was expected in.
pub type MissingBlock = (ObjectPath, BlockIndex);

/// The open disks of a repository.
pub(super) struct OpenDisks {
    context: Context,
    /// The storage below the encryption: to ask whether a file is there, without decrypting it.
    raw: Arc<dyn Storage>,
    open: Arc<Mutex<Open>>,
}

struct Open {
    /// All that are open; those that nobody holds any more are forgotten when their number doubled.
    known: HashMap<Key, (Option<Signature>, WeakDisk)>,
    sweep_at: usize,
    /// Those kept open.
    kept: LruCache<Key, Kept>,
    /// What they take, and what they may take.
    weight: Weight,
    limit: Weight,
    /// Whether a thread closes those that were kept for long enough.
    has_closer: bool,
}

/// A disk kept open, and what was counted for it.
struct Kept {
    disk: OpenDisk,
    weight: Weight,
    /// When it was last asked for.
    used: Instant,
}

/// What an open disk takes.
#[derive(Debug, Clone, Copy, Default)]
struct Weight {
    /// Memory, in bytes, estimated.
    bytes: u64,
    /// Open files.
    files: u64,
}

impl Weight {
    fn plus(self, other: Self) -> Self {
        Self { bytes: self.bytes.saturating_add(other.bytes), files: self.files.saturating_add(other.files) }
    }

    fn minus(self, other: Self) -> Self {
        Self { bytes: self.bytes.saturating_sub(other.bytes), files: self.files.saturating_sub(other.files) }
    }

    fn exceeds(self, limit: Self) -> bool {
        self.bytes > limit.bytes || self.files > limit.files
    }
}

#[derive(Clone, PartialEq, Eq, Hash)]
struct Key {
    path: ObjectPath,
    /// Which disk, of an XVA.
    index: usize,
    /// The metadata file of the backup it dies with.
    metadata: Option<ObjectPath>,
}

#[derive(Clone)]
enum OpenDisk {
    Chain(Arc<ChainDisk>),
    Xva(Arc<XvaDisk>),
}

enum WeakDisk {
    Chain(Weak<ChainDisk>),
    Xva(Weak<XvaDisk>),
}

impl OpenDisk {
    fn disk(self) -> Arc<dyn Disk> {
        match self {
            Self::Chain(chain) => chain,
            Self::Xva(disk) => disk,
        }
    }

    fn downgrade(&self) -> WeakDisk {
        match self {
            Self::Chain(chain) => WeakDisk::Chain(Arc::downgrade(chain)),
            Self::Xva(disk) => WeakDisk::Xva(Arc::downgrade(disk)),
        }
    }

    /// Returns what it takes.
    fn weight(&self) -> Weight {
        let (blocks, files) = match self {
            Self::Chain(chain) => (chain.size().div_ceil(chain.block_size()), chain.open_files()),
            Self::Xva(disk) => (disk.size().div_ceil(XVA_CHUNK), 1),
        };
        let bytes = blocks.saturating_mul(BYTES_PER_BLOCK).saturating_add(BYTES_PER_DISK);
        // And the metadata file of its backup.
        Weight { bytes, files: files as u64 + 1 }
    }
}

impl WeakDisk {
    fn is_open(&self) -> bool {
        match self {
            Self::Chain(chain) => chain.strong_count() > 0,
            Self::Xva(disk) => disk.strong_count() > 0,
        }
    }

    fn upgrade(&self) -> Option<OpenDisk> {
        match self {
            Self::Chain(chain) => chain.upgrade().map(OpenDisk::Chain),
            Self::Xva(disk) => disk.upgrade().map(OpenDisk::Xva),
        }
    }
}

impl OpenDisks {
    pub fn new(storage: Arc<dyn Storage>, raw: Arc<dyn Storage>, cache_bytes: u64) -> Self {
        let context = Context { storage, cache: BlockCache::new(cache_bytes) };
        let open = Open {
            known: HashMap::new(),
            sweep_at: KEPT.get(),
            kept: LruCache::new(KEPT),
            weight: Weight::default(),
            limit: Weight { bytes: KEPT_BYTES, files: files_to_keep() },
            has_closer: false,
        };
        Self { context, raw, open: Arc::new(Mutex::new(open)) }
    }

    /// Returns how many disks are open.
    pub fn count(&self) -> usize {
        self.with_open(|open| open.known.values().filter(|(_, disk)| disk.is_open()).count())
    }

    /// Returns the bytes of decoded blocks in memory.
    pub fn cached_bytes(&self) -> u64 {
        self.context.cache.bytes()
    }

    /// Returns the memory counted for the disks kept open.
    #[cfg(test)]
    pub fn kept_bytes(&self) -> u64 {
        self.with_open(|open| open.weight.bytes)
    }

    /// Sets how many files the disks kept open may take.
    #[cfg(test)]
    pub fn keep_files(&self, files: u64) {
        self.with_open(|open| open.limit.files = files);
    }

    pub fn open(&self, backup: &Backup, disk: &BackupDisk, problems: &Problems) -> disk::Result<Arc<dyn Disk>> {
        self.open_of(backup, disk, problems).map(OpenDisk::disk)
    }

    pub fn chain(&self, backup: &Backup, disk: &BackupDisk, problems: &Problems) -> disk::Result<Vec<vhd::LayerInfo>> {
        layers(&self.open_of(backup, disk, problems)?)
    }

    pub fn leaf(&self, backup: &Backup, disk: &BackupDisk, problems: &Problems) -> disk::Result<Option<vhd::Leaf>> {
        Ok(leaf(&self.open_of(backup, disk, problems)?))
    }

    pub fn differing_ranges(
        &self,
        one: (&Backup, &BackupDisk),
        other: (&Backup, &BackupDisk),
        problems: &Problems,
    ) -> disk::Result<Option<Vec<Range<u64>>>> {
        match (self.open_of(one.0, one.1, problems)?, self.open_of(other.0, other.1, problems)?) {
            (OpenDisk::Chain(one), OpenDisk::Chain(other)) => Ok(Some(one.differing_ranges(&other)?)),
            _ => Ok(None),
        }
    }

    pub fn loose_leaf(&self, disk: &LooseDisk, problems: &Problems) -> disk::Result<Option<vhd::Leaf>> {
        Ok(leaf(&self.open_loose_of(disk, problems)?))
    }

    pub fn digests(
        &self,
        backup: &Backup,
        disk: &BackupDisk,
        problems: &Problems,
    ) -> disk::Result<Option<ChainDigests>> {
        Ok(digests(&self.open_of(backup, disk, problems)?))
    }

    pub fn loose_digests(&self, disk: &LooseDisk, problems: &Problems) -> disk::Result<Option<ChainDigests>> {
        Ok(digests(&self.open_loose_of(disk, problems)?))
    }

    pub fn missing_blocks(
        &self,
        backup: &Backup,
        disk: &BackupDisk,
        problems: &Problems,
    ) -> disk::Result<Vec<MissingBlock>> {
        missing_blocks(&self.open_of(backup, disk, problems)?)
    }

    pub fn missing_loose_blocks(&self, disk: &LooseDisk, problems: &Problems) -> disk::Result<Vec<MissingBlock>> {
        missing_blocks(&self.open_loose_of(disk, problems)?)
    }

    pub fn open_loose(&self, disk: &LooseDisk, problems: &Problems) -> disk::Result<Arc<dyn Disk>> {
        self.open_loose_of(disk, problems).map(OpenDisk::disk)
    }

    pub fn loose_chain(&self, disk: &LooseDisk, problems: &Problems) -> disk::Result<Vec<vhd::LayerInfo>> {
        layers(&self.open_loose_of(disk, problems)?)
    }

    fn open_loose_of(&self, disk: &LooseDisk, problems: &Problems) -> disk::Result<OpenDisk> {
        let key = Key { path: disk.path.clone(), index: 0, metadata: None };
        // A file without metadata may be replaced by another of the same name at any time.
        let signature = self.context.storage.stat(&disk.path).ok().as_ref().map(Signature::from);
        let opened =
            self.shared(key, signature, || Ok(OpenDisk::Chain(Arc::new(vhd::open(&self.context, &disk.path, None)?))));
        report(opened, &disk.path, None, problems)
    }

    fn open_of(&self, backup: &Backup, disk: &BackupDisk, problems: &Problems) -> disk::Result<OpenDisk> {
        let id = backup.id();
        let (path, index) = match &disk.source {
            DiskSource::Vhd(path) => (path, 0),
            DiskSource::Xva { path, index } => (path, *index),
            DiskSource::Unusable(reason) => {
                let message = format!("disk {} of {id}: {reason}", disk.name);
                return Err(disk::Error::new(disk::ErrorKind::Damaged, message));
            }
        };
        let stale = || {
            let message = format!("the backup {id} was removed ('{}' is gone)", backup.metadata);
            disk::Error::new(disk::ErrorKind::Stale, message)
        };
        // A metadata file that was written again tells of a merge: what was open before it is not handed out any more.
        let signature = match self.context.storage.stat(&backup.metadata) {
            Ok(stat) => Some(Signature::from(&stat)),
            Err(error) if error.kind() == storage::ErrorKind::NotFound => return Err(stale()),
            Err(error) => return Err(unavailable(&error)),
        };
        let liveness = || -> Arc<MetadataFile> {
            Arc::new(MetadataFile::new(self.raw.clone(), backup.metadata.clone(), &*self.context.storage))
        };
        let key = Key { path: path.clone(), index, metadata: Some(backup.metadata.clone()) };
        let opened = self.shared(key, signature, || match &disk.source {
            DiskSource::Xva { .. } => {
                let xva = open_xva(self.context.storage.as_ref(), path)?;
                xva.believe_written(backup.size);
                if index >= xva.disks().len() {
                    let message = format!("'{path}': it has {} disks, number {index} was expected", xva.disks().len());
                    return Err(disk::Error::new(disk::ErrorKind::Damaged, message));
                }
                let disk = XvaDisk { disk: xva.disk(index), liveness: liveness(), backup: id.clone() };
                Ok(OpenDisk::Xva(Arc::new(disk)))
            }
            _ => Ok(OpenDisk::Chain(Arc::new(vhd::open(&self.context, path, Some(liveness()))?))),
        });
        let opened = match opened {
            // What belongs to a removed backup may be gone, or half gone, too: that is no damage.
            Err(_) if matches!(liveness().is_alive(), Ok(false)) => return Err(stale()),
            opened => opened,
        };
        match &opened {
            // The listing has said so.
            Err(error) if backup.problem.as_deref() == Some(error.to_string().as_str()) => opened,
            _ => report(opened, path, Some(id), problems),
        }
    }

    /// Returns the open disk of `key`, opened if it was not, or was when its backup was another (`signature`).
    fn shared(
        &self,
        key: Key,
        signature: Option<Signature>,
        open: impl FnOnce() -> disk::Result<OpenDisk>,
    ) -> disk::Result<OpenDisk> {
        if let Some(disk) = self.with_open(|state| state.get(&key, signature)) {
            return Ok(disk);
        }
        // Two may open the same disk here at the same time: no lock is held across I/O, and the first to come back wins.
        let disk = open()?;
        let (disk, closed) = self.with_open(|state| match state.get(&key, signature) {
            Some(first) => (first, vec![disk]),
            None => {
                let closed = state.keep(key, signature, disk.clone());
                (disk, closed)
            }
        });
        // Closed here, where the lock is not held.
        drop(closed);
        self.close_in_time();
        Ok(disk)
    }

    /// Sees to it that what is kept open is closed when nobody asked for it for a while.
    fn close_in_time(&self) {
        if self.with_open(|state| std::mem::replace(&mut state.has_closer, true)) {
            return;
        }
        let open = Arc::downgrade(&self.open);
        let close = move || {
            while let Some(open) = open.upgrade() {
                let (closed, is_last) = {
                    let mut state = open.lock().unwrap_or_else(PoisonError::into_inner);
                    let closed = state.close_unused(KEPT_FOR);
                    state.has_closer = !state.kept.is_empty();
                    (closed, !state.has_closer)
                };
                // Closing a file of a server may wait: no lock is held.
                drop((closed, open));
                if is_last {
                    return;
                }
                thread::sleep(KEPT_FOR / 4);
            }
        };
        if thread::Builder::new().name("xofs-closer".to_owned()).spawn(close).is_err() {
            self.with_open(|state| state.has_closer = false);
        }
    }

    /// Closes what was kept for `age` or longer.
    #[cfg(test)]
    pub fn close_unused(&self, age: Duration) {
        drop(self.with_open(|state| state.close_unused(age)));
    }

    fn with_open<T>(&self, act: impl FnOnce(&mut Open) -> T) -> T {
        act(&mut self.open.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl Open {
    fn get(&mut self, key: &Key, signature: Option<Signature>) -> Option<OpenDisk> {
        let (known, disk) = self.known.get(key)?;
        if *known != signature || signature.is_none() {
            return None;
        }
        let disk = disk.upgrade()?;
        if let Some(kept) = self.kept.get_mut(key) {
            kept.used = Instant::now();
        }
        Some(disk)
    }

    /// Keeps a disk; returns those that had to go for it.
    fn keep(&mut self, key: Key, signature: Option<Signature>, disk: OpenDisk) -> Vec<OpenDisk> {
        if self.known.len() >= self.sweep_at {
            // Not by holding it: whoever holds it last closes it, which may wait, and here the lock is held.
            self.known.retain(|_, (_, disk)| disk.is_open());
            self.sweep_at = (self.known.len() * 2).max(KEPT.get());
        }
        self.known.insert(key.clone(), (signature, disk.downgrade()));
        let weight = disk.weight();
        self.weight = self.weight.plus(weight);
        let mut closed = Vec::new();
        let mut gone = self.kept.push(key, Kept { disk, weight, used: Instant::now() });
        loop {
            if let Some((_, kept)) = gone {
                // What was counted, not what it takes by now.
                self.weight = self.weight.minus(kept.weight);
                closed.push(kept.disk);
            }
            if !self.weight.exceeds(self.limit) || self.kept.len() < 2 {
                return closed;
            }
            gone = self.kept.pop_lru();
        }
    }

    /// Takes out what nobody asked for since `age`, to be closed by the caller.
    fn close_unused(&mut self, age: Duration) -> Vec<OpenDisk> {
        let mut closed = Vec::new();
        while self.kept.peek_lru().is_some_and(|(_, kept)| kept.used.elapsed() >= age) {
            let Some((_, kept)) = self.kept.pop_lru() else { break };
            self.weight = self.weight.minus(kept.weight);
            closed.push(kept.disk);
        }
        closed
    }
}

/// Returns how many files the disks that nobody holds may keep open: half of those the process may have, of which it
/// asks for more. The usual limit of 1024 is that of programs that use `select(2)`.
fn files_to_keep() -> u64 {
    let limit = getrlimit(Resource::Nofile);
    let wanted = limit.maximum.unwrap_or(FILES_WANTED).min(FILES_WANTED);
    let has = limit.current.unwrap_or(FILES_WANTED);
    let is_raised =
        has < wanted && setrlimit(Resource::Nofile, Rlimit { current: Some(wanted), maximum: limit.maximum }).is_ok();
    (if is_raised { wanted } else { has }) / 2
}

fn layers(disk: &OpenDisk) -> disk::Result<Vec<vhd::LayerInfo>> {
    match disk {
        OpenDisk::Chain(chain) => Ok(chain.layers()?),
        OpenDisk::Xva(_) => Ok(Vec::new()),
    }
}

fn leaf(disk: &OpenDisk) -> Option<vhd::Leaf> {
    match disk {
        OpenDisk::Chain(chain) => Some(chain.leaf()),
        OpenDisk::Xva(_) => None,
    }
}

fn digests(disk: &OpenDisk) -> Option<ChainDigests> {
    match disk {
        OpenDisk::Chain(chain) => Some(chain.digests()),
        OpenDisk::Xva(_) => None,
    }
}

fn missing_blocks(disk: &OpenDisk) -> disk::Result<Vec<MissingBlock>> {
    match disk {
        OpenDisk::Chain(chain) => Ok(chain.missing_blocks()?),
        OpenDisk::Xva(_) => Ok(Vec::new()),
    }
}

fn unavailable(error: &storage::Error) -> disk::Error {
    disk::Error::new(disk::ErrorKind::Unavailable, error.to_string())
}

/// Remembers as a problem that a disk cannot be opened, or forgets it.
fn report(
    opened: disk::Result<OpenDisk>,
    path: &ObjectPath,
    backup: Option<BackupId>,
    problems: &Problems,
) -> disk::Result<OpenDisk> {
    match &opened {
        Ok(_) => problems.resolve(path, ProblemKind::Disk),
        Err(error) if matches!(error.kind(), disk::ErrorKind::Damaged | disk::ErrorKind::Unsupported) => {
            let message = error.to_string();
            problems.report(Problem { path: path.clone(), backup, kind: ProblemKind::Disk, message });
        }
        Err(_) => {}
    }
    opened
}

/// Opens an XVA, of which only the beginning is read.
///
/// # Errors
/// `Unsupported` if it is compressed, or encrypted as a whole; `Damaged` if it is missing or wrong; `Unavailable`.
pub(super) fn open_xva(storage: &dyn Storage, path: &ObjectPath) -> disk::Result<Xva> {
    if let Some(reason) = encrypted_xva(storage, path) {
        return Err(disk::Error::new(disk::ErrorKind::Unsupported, reason));
    }
    let object = open_object(storage, path)?;
    match compressed_xva(path, xva::compression(object.as_ref()).map_err(|error| named(path, error))?) {
        Some(reason) => Err(disk::Error::new(disk::ErrorKind::Unsupported, reason)),
        None => Xva::open(object).map_err(|error| named(path, error)),
    }
}

/// Returns the disks that an XVA holds, and why they cannot be read if it is compressed or encrypted as a whole.
///
/// An encrypted XVA is decrypted for it, in memory; one that is too large for that is refused.
///
/// # Errors
/// `Unsupported` if only its beginning could be read and that is not possible; else as for [`open_xva`].
pub(super) fn describe_xva(
    storage: &dyn Storage,
    path: &ObjectPath,
) -> disk::Result<(Vec<xva::XvaDisk>, Option<String>)> {
    let encrypted = encrypted_xva(storage, path);
    // Each takes its size in memory, up to 64 MiB, for as long as it is looked at.
    let _one_at_a_time = encrypted.is_some().then(|| DECRYPTED.lock().unwrap_or_else(PoisonError::into_inner));
    let described = open_object(storage, path).and_then(|object| {
        let (compression, disks) = xva::describe(object).map_err(|error| named(path, error))?;
        Ok((disks, compressed_xva(path, compression)))
    });
    match (described, encrypted) {
        (Ok((disks, compressed)), encrypted) => Ok((disks, encrypted.or(compressed))),
        // Whatever is wrong with the file, this is what keeps it from being read, unless it is not even there.
        (Err(error), Some(reason)) if error.kind() == disk::ErrorKind::Unsupported => {
            Err(disk::Error::new(error.kind(), reason))
        }
        (Err(error), _) => Err(error),
    }
}

/// Returns why an XVA that is encrypted as a whole cannot be read; `None` if it is not encrypted.
fn encrypted_xva(storage: &dyn Storage, path: &ObjectPath) -> Option<String> {
    (!storage.capabilities().ranged_reads).then(|| {
        format!(
            "'{path}': this XVA lies in an encrypted repository; reading its disks is not supported yet: it is \
             encrypted as a whole and cannot be read at an offset; restore it with Xen Orchestra"
        )
    })
}

/// Returns why a compressed XVA cannot be read; `None` if it is not compressed.
fn compressed_xva(path: &ObjectPath, compression: Compression) -> Option<String> {
    let name = match compression {
        Compression::None => return None,
        Compression::Gzip => "gzip",
        Compression::Zstd => "zstd",
    };
    Some(format!(
        "'{path}': this XVA is compressed with {name}; reading its disks is not supported yet: it cannot be read at an \
         offset; decompress a copy of it, or restore it with Xen Orchestra"
    ))
}

fn open_object(storage: &dyn Storage, path: &ObjectPath) -> disk::Result<Arc<dyn Object>> {
    storage.open(path).map_err(|error| match error.kind() {
        kind if kind.is_unavailable() => unavailable(&error),
        storage::ErrorKind::TooLarge => disk::Error::new(disk::ErrorKind::Unsupported, error.to_string()),
        _ => disk::Error::new(disk::ErrorKind::Damaged, error.to_string()),
    })
}

/// Says which XVA an error is about.
fn named(path: &ObjectPath, error: xva::Error) -> disk::Error {
    let error = disk::Error::from(error);
    let message = error.to_string();
    let message = if message.contains(path.as_str()) { message } else { format!("'{path}': {message}") };
    disk::Error::new(error.kind(), message)
}

/// A backup lives as long as its metadata file, which is removed before anything else of it.
struct MetadataFile {
    storage: Arc<dyn Storage>,
    path: ObjectPath,
    /// The open file, where asking it is as good as asking for the name, and cheaper.
    object: Option<Arc<dyn Object>>,
    is_remote: bool,
}

impl MetadataFile {
    /// `readable` is the storage through which disks are read.
    fn new(storage: Arc<dyn Storage>, path: ObjectPath, readable: &dyn Storage) -> Self {
        let is_remote = readable.capabilities().is_remote;
        let object = if is_remote { None } else { storage.open(&path).ok() };
        Self { storage, path, object, is_remote }
    }
}

impl Liveness for MetadataFile {
    fn is_alive(&self) -> storage::Result<bool> {
        if let Some(object) = &self.object {
            // Without a name it may have been replaced, by a rename over it: then its name still is there.
            if object.stat()?.links > 0 {
                return Ok(true);
            }
        }
        // Over a network, attributes are answered from a cache; opening asks the server.
        let found = if self.is_remote {
            self.storage.open(&self.path).map(|_| ())
        } else {
            self.storage.stat(&self.path).map(|_| ())
        };
        match found {
            Ok(()) => Ok(true),
            Err(error) if error.kind() == storage::ErrorKind::NotFound => Ok(false),
            Err(error) => Err(error),
        }
    }
}

/// A disk of an XVA that dies with its backup.
struct XvaDisk {
    disk: Arc<dyn Disk>,
    liveness: Arc<MetadataFile>,
    backup: BackupId,
}

impl XvaDisk {
    /// Answers `outcome` only if the backup is still there after it was obtained.
    fn alive<T>(&self, outcome: disk::Result<T>) -> disk::Result<T> {
        match self.liveness.is_alive() {
            Ok(true) => outcome,
            Ok(false) => {
                let message = format!("the backup {} was removed", self.backup);
                Err(disk::Error::new(disk::ErrorKind::Stale, message))
            }
            Err(error) => Err(unavailable(&error)),
        }
    }
}

impl Disk for XvaDisk {
    fn size(&self) -> u64 {
        self.disk.size()
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> disk::Result<()> {
        self.alive(self.disk.read_at(offset, buffer))
    }

    fn extent_at(&self, offset: u64) -> disk::Result<Extent> {
        self.alive(self.disk.extent_at(offset))
    }

    fn allocated(&self) -> disk::Result<u64> {
        self.alive(self.disk.allocated())
    }
}
