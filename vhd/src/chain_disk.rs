//! A chain as one disk: which layer a byte is in, reading it, and being sure that it was it.
//!
//! ```text
//! read_at ─ spans of blocks ─ table (made at open): layer and place per block ─ layer ─ bytes
//!    │                                                                                   │
//!    └── the backup is still there, the places still are those used? ────────────────────┘
//!           yes: answer · backup gone: stale · changed or missing: resolve anew, read again, for at most 5 s
//! ```
//!
//! The table never changes. When the files under it do (a merge moves blocks), a new one is made and swapped in.
//! A disk without metadata is still there if nobody touched its files since they were opened.

use std::num::NonZeroUsize;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError, RwLock};
use std::time::{Duration, Instant};

use disk::{Disk, Extent};
use lru::LruCache;
use storage::{Object, ObjectPath, Storage};
use uuid::Uuid;

use crate::by_name::ByName;
use crate::cache::{BlockCache, Form, Key};
use crate::chain::{Chain, Evidence, Member};
use crate::difference;
use crate::digests::ChainDigests;
use crate::error::{Error, ErrorKind, Result};
use crate::exploded::Exploded;
use crate::filter::Filter;
use crate::footer::DiskType;
use crate::geometry::{BlockIndex, BlockSize, BlockSpan, FileSector, SECTOR_LEN};
use crate::layer::{BitmapRule, BlockMap, Body, Format, Layer, Outcome};

/// How long a read is tried again while the files under it change; XO's own pauses (an alias that is empty for an
/// instant) are far shorter.
const PATIENCE: Duration = Duration::from_secs(5);

/// How long a file that was made empty is waited for to be filled.
const UNFINISHED: Duration = Duration::from_secs(2);

/// Pause before names are resolved again. None for a fuzzer: under it nothing changes by itself.
const PAUSE: Duration = Duration::from_millis(if cfg!(fuzzing) { 0 } else { 20 });

/// How long a backup seen over a network is believed to be there when what is read of it is in memory: as long as a listing.
const BELIEVED: Duration = Duration::from_secs(5);

/// How far ahead of a sequential reader blocks are brought into memory, in blocks: over a network as many as hide its
/// delay; else what keeps all cores decoding while one block is read from memory. Never more than a quarter of the cache.
const AHEAD_REMOTE: u64 = 16;
const AHEAD_PER_CORE: u64 = 4;

/// Block files kept open per disk, so that random reads of uncompressed blocks do not open one each time.
const OPEN_BLOCK_FILES: NonZeroUsize = NonZeroUsize::new(64).expect("not zero");

/// Blocks that XO's merge has in flight at most; it moves them in ascending order.
const MERGE_IN_FLIGHT: usize = 16;

/// What disks share: where they lie, and the cache of their decoded blocks.
#[derive(Clone)]
pub struct Context {
    /// The repository.
    pub storage: Arc<dyn Storage>,
    /// Decoded blocks of all disks.
    pub cache: Arc<BlockCache>,
}

/// Says whether what a disk belongs to still exists.
pub trait Liveness: Send + Sync {
    /// Returns whether the backup is still there.
    ///
    /// # Errors
    /// What the storage says; then nobody knows.
    fn is_alive(&self) -> storage::Result<bool>;
}

/// What is known of one layer, for people.
#[derive(Debug, Clone)]
pub struct LayerInfo {
    /// The path by which it is named: a VHD file, an alias, or a folder.
    pub name: ObjectPath,
    /// The VHD file or folder that holds its bytes.
    pub data: ObjectPath,
    /// How it is stored.
    pub format: Format,
    /// Its type.
    pub disk_type: DiskType,
    /// Its uuid.
    pub uuid: Uuid,
    /// The uuid of its parent, `None` for a base.
    pub parent_uuid: Option<Uuid>,
    /// Virtual size in bytes.
    pub size: u64,
    /// Bytes per block.
    pub block_size: u64,
    /// Blocks it holds.
    pub allocated_blocks: u64,
    /// The creator field of its footer.
    pub creator: [u8; 4],
    /// The time field of its footer: Unix seconds where XO wrote it, else seconds since 2000.
    pub timestamp: u32,
    /// Whether a merge is taking its blocks away.
    pub is_merging: bool,
}

/// What is known of a chain without asking the storage again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Leaf {
    /// The uuid of the leaf.
    pub uuid: Uuid,
    /// The uuid of its parent, `None` for a base.
    pub parent_uuid: Option<Uuid>,
    /// The time field of its footer, as in [`LayerInfo`].
    pub timestamp: u32,
    /// The number of layers.
    pub chain_length: usize,
}

/// A chain of VHDs as a disk.
pub struct ChainDisk(Arc<Shared>);

/// A disk, as its readers and those who read ahead of them hold it.
struct Shared {
    context: Context,
    name: ObjectPath,
    liveness: Arc<dyn Liveness>,
    /// In bytes.
    size: u64,
    /// Invariant: every snapshot has the uuid and the size of the first, which a merge leaves as they are.
    current: RwLock<Arc<Snapshot>>,
    /// When it was last seen alive.
    seen_alive: RwLock<Option<Instant>>,
}

/// Opens the disk called `name`: a VHD file, an alias, or an exploded VHD's folder.
///
/// Without `liveness`, it lives as long as its name, and until a merge into it begins; while nobody touches the files that
/// are read, it may be read for longer, as it was.
///
/// # Errors
/// [`ErrorKind::Missing`] if a member of its chain is not there, [`ErrorKind::Damaged`] if a structure is wrong or
/// two contradict each other, [`ErrorKind::Escape`] if a name leads outside, [`ErrorKind::Stale`] if the backup is gone.
pub fn open(context: &Context, name: &ObjectPath, liveness: Option<Arc<dyn Liveness>>) -> Result<ChainDisk> {
    let deadline = Instant::now() + PATIENCE;
    let is_by_name = liveness.is_none();
    let liveness = match liveness {
        Some(liveness) => liveness,
        None => Arc::new(ByName::new(context.storage.clone(), name.clone())?),
    };
    let mut first = resolve(context, name, deadline)?;
    // Over a network the times of a file may be old ones; and an alias may go while its data stays.
    let may_prove_itself =
        is_by_name && first.leaf().name == first.leaf().data && !context.storage.capabilities().is_remote;
    // Asked once the files are open: a merge that had changed one of them by then had begun.
    first.proves_itself = may_prove_itself && liveness.is_alive()?;
    let (context, name, size) = (context.clone(), name.clone(), first.size);
    let (current, seen_alive) = (RwLock::new(Arc::new(first)), RwLock::default());
    Ok(ChainDisk(Arc::new(Shared { context, name, liveness, size, current, seen_alive })))
}

/// Resolves until it succeeds, or fails while nobody changes anything, or the deadline passes.
///
/// What is seen of the folder does not tell that the footer of an exploded base became the target's between two looks at
/// it. So damage counts once it was found twice.
fn resolve(context: &Context, name: &ObjectPath, deadline: Instant) -> Result<Snapshot> {
    // All images of the folder are looked at only where one cannot be opened: there may be many, far away.
    match Snapshot::open(context, name) {
        Err(error) if error.kind() != ErrorKind::Unavailable => {}
        opened => return opened,
    }
    let mut found = None;
    loop {
        let before = Evidence::of(&context.storage, name);
        let error = match Snapshot::open(context, name) {
            Ok(snapshot) => return Ok(snapshot),
            Err(error) => error,
        };
        std::thread::sleep(PAUSE);
        let is_unchanged = match (before, Evidence::of(&context.storage, name)) {
            (Ok(before), Ok(after)) => before == after && !after.is_unfinished(UNFINISHED),
            _ => true,
        };
        let (is_damage, text) = (matches!(error.kind(), ErrorKind::Missing | ErrorKind::Damaged), error.to_string());
        let is_certain = is_unchanged && (!is_damage || found.as_ref() == Some(&text));
        if is_certain || Instant::now() >= deadline {
            return Err(error);
        }
        found = is_unchanged.then_some(text);
    }
}

impl ChainDisk {
    /// Returns what is known of its layers, leaf first.
    ///
    /// # Errors
    /// If a map cannot be read again.
    pub fn layers(&self) -> Result<Vec<LayerInfo>> {
        let snapshot = self.0.snapshot();
        let mut layers = Vec::with_capacity(snapshot.chain.members.len());
        each_map(&snapshot.chain, &snapshot.storage, |member, map| {
            layers.push(layer_info(member, &map));
            Ok(())
        })?;
        Ok(layers)
    }

    /// Returns what is known of its leaf.
    #[must_use]
    pub fn leaf(&self) -> Leaf {
        let snapshot = self.0.snapshot();
        let leaf = snapshot.leaf();
        let (uuid, parent_uuid, timestamp) = (leaf.footer.uuid, leaf.parent_uuid(), leaf.footer.timestamp);
        Leaf { uuid, parent_uuid, timestamp, chain_length: snapshot.chain.members.len() }
    }

    /// Reads what is known of its blocks without reading them, as they are now.
    #[must_use]
    pub fn digests(&self) -> ChainDigests {
        ChainDigests::load(self.0.snapshot())
    }

    /// Returns the ranges of bytes outside of which this disk holds what `other` does, of the same lineage or not: ascending,
    /// whole blocks, up to the end of the larger one. Only tables are read; what lies within may be equal, too.
    ///
    /// Both must have been opened in the same [`Context`], which is what they know each other's layers by.
    ///
    /// # Errors
    /// `Unavailable` while a merge takes blocks away from what only one of them has; `Unsupported` if their blocks are of
    /// different sizes; or if a table cannot be read.
    pub fn differing_ranges(&self, other: &Self) -> Result<Vec<std::ops::Range<u64>>> {
        difference::between(&self.0.snapshot(), &other.0.snapshot())
    }

    /// Returns the number of bytes per block.
    #[must_use]
    pub fn block_size(&self) -> u64 {
        self.0.snapshot().block_size.bytes()
    }

    /// Returns how many files it may hold open, beside those it opens for a moment.
    #[must_use]
    pub fn open_files(&self) -> usize {
        let snapshot = self.0.snapshot();
        let bodies = || snapshot.chain.members.iter().map(|member| &member.layer.body);
        let flat = bodies().filter(|body| matches!(body, Body::Flat(_))).count();
        let has_plain_blocks =
            bodies().any(|body| matches!(body, Body::Exploded(exploded) if exploded.filter == Filter::None));
        flat + if snapshot.files.is_some() && has_plain_blocks { OPEN_BLOCK_FILES.get() } else { 0 }
    }

    /// Returns the blocks that the table of an exploded layer lists and whose files are not there, with the folders
    /// they were expected in; those that lie hidden under a child's block too, since another backup may need them.
    ///
    /// # Errors
    /// If a map or folder cannot be read.
    pub fn missing_blocks(&self) -> Result<Vec<(ObjectPath, BlockIndex)>> {
        let snapshot = self.0.snapshot();
        let mut missing = Vec::new();
        each_map(&snapshot.chain, &snapshot.storage, |member, map| {
            if !matches!(member.layer.body, Body::Exploded(_)) {
                return Ok(());
            }
            let mut there = Exploded::listed(&member.layer, &snapshot.storage)?;
            if let Some(moving) = &member.moving {
                // After its own folder: what leaves it meanwhile is found here.
                there.extend(Exploded::listed(&moving.into, &snapshot.storage)?);
            }
            let count = u32::try_from(member.layer.block_count()).expect("at most MAX_BLOCKS");
            let listed = (0..count).filter(|block| map.place(*block as usize).is_some()).map(BlockIndex);
            missing
                .extend(listed.filter(|block| !there.contains(block)).map(|block| (member.layer.data.clone(), block)));
            Ok(())
        })?;
        Ok(missing)
    }
}

impl Shared {
    fn snapshot(&self) -> Arc<Snapshot> {
        self.current.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Returns when it was asked whether the disk is alive, which it was.
    fn check_alive(&self) -> Result<Instant> {
        let asked = Instant::now();
        if self.liveness.is_alive()? {
            *self.seen_alive.write().unwrap_or_else(PoisonError::into_inner) = Some(asked);
            return Ok(asked);
        }
        Err(Error::new(ErrorKind::Stale, &self.name, "it was removed, or is being merged with a later one"))
    }

    fn read_from_files(&self, offset: u64, buffer: &mut [u8]) -> Result<()> {
        let mut snapshot = self.snapshot();
        let mut deadline = None;
        loop {
            let outcome = snapshot.read(&self.context, offset, buffer);
            if matches!(outcome, Ok(Outcome::Untouched)) && snapshot.is_untouched()? {
                return Ok(());
            }
            // After the bytes, before the answer: a backup's metadata is removed before its blocks may be merged away.
            let seen = self.check_alive()?;
            let error = match outcome {
                Ok(Outcome::Untouched | Outcome::Right) => {
                    if snapshot.storage.capabilities().is_remote {
                        self.verify(&snapshot, offset, buffer.len(), seen);
                    }
                    return Ok(());
                }
                Ok(Outcome::Changed) => None,
                Err(error) if matches!(error.kind(), ErrorKind::Missing | ErrorKind::Damaged) => Some(error),
                Err(error) => return Err(error),
            };
            let deadline = *deadline.get_or_insert_with(|| Instant::now() + PATIENCE);
            let fresh = match resolve(&self.context, &self.name, deadline) {
                Ok(fresh) => Arc::new(fresh),
                Err(resolving) => {
                    self.check_alive()?;
                    return Err(error.unwrap_or(resolving));
                }
            };
            if (fresh.leaf().footer.uuid, fresh.size) != (snapshot.leaf().footer.uuid, snapshot.size) {
                return Err(Error::new(ErrorKind::Stale, &self.name, "another disk has its name since it was opened"));
            }
            if let Some(error) = error.filter(|_| fresh.chain == snapshot.chain || Instant::now() >= deadline) {
                self.check_alive()?;
                return Err(error);
            }
            if Instant::now() >= deadline {
                let reason = "it changed again and again while it was read; try again when the merge has ended";
                return Err(Error::new(ErrorKind::Unavailable, &self.name, reason));
            }
            tracing::debug!(disk = %self.name, "resolved anew: the files under it changed");
            *self.current.write().unwrap_or_else(PoisonError::into_inner) = fresh.clone();
            snapshot = fresh;
            std::thread::sleep(PAUSE);
        }
    }
}

impl Disk for ChainDisk {
    fn size(&self) -> u64 {
        self.0.size
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> disk::Result<()> {
        let end = offset.checked_add(buffer.len() as u64);
        if end.is_none_or(|end| end > self.size()) {
            return Err(out_of_range(&self.0.name, offset, self.size()));
        }
        Ok(self.0.read(offset, buffer)?)
    }

    fn extent_at(&self, offset: u64) -> disk::Result<Extent> {
        let snapshot = self.0.snapshot();
        if offset >= snapshot.size {
            return Err(out_of_range(&self.0.name, offset, snapshot.size));
        }
        Ok(snapshot.extent_at(offset))
    }

    fn allocated(&self) -> disk::Result<u64> {
        let snapshot = self.0.snapshot();
        Ok((snapshot.allocated_blocks * snapshot.block_size.bytes()).min(snapshot.size))
    }

    fn read_in_memory(&self, offset: u64, buffer: &mut [u8]) -> bool {
        self.0.read_in_memory(offset, buffer)
    }

    fn prefetch_window(&self) -> u64 {
        self.0.snapshot().prefetch_window
    }

    fn prefetch(&self, offset: u64, len: u64) {
        let snapshot = self.0.snapshot();
        let end = offset.saturating_add(len).min(snapshot.size);
        let len = usize::try_from(end.saturating_sub(offset)).unwrap_or(usize::MAX);
        for span in snapshot.block_size.spans(offset, len) {
            let Some(ahead) = snapshot.ahead_of(span.block) else { continue };
            if self.0.context.cache.has_begun(ahead.key()) {
                continue;
            }
            let shared = Arc::downgrade(&self.0);
            let load = move || {
                // Nobody reads the disk any more.
                if let Some(shared) = shared.upgrade() {
                    shared.load_ahead(span.block);
                }
            };
            if !self.0.context.cache.ahead().offer(load) {
                return;
            }
        }
    }
}

/// How a block is brought into memory ahead of its reader.
#[derive(Clone, Copy)]
enum Ahead {
    /// It is decoded, as its layer holds it.
    Decoded(Key),
    /// It is read whole, over a network.
    Whole(Key),
}

impl Ahead {
    fn key(self) -> Key {
        match self {
            Self::Decoded(key) | Self::Whole(key) => key,
        }
    }
}

impl Shared {
    /// Brings a block into memory. A failure is not remembered: who needs the block meets it again.
    fn load_ahead(&self, block: BlockIndex) {
        let snapshot = self.snapshot();
        let Some(ahead) = snapshot.ahead_of(block) else { return };
        let start = u64::from(block.0) * snapshot.block_size.bytes();
        let len =
            usize::try_from(snapshot.size.saturating_sub(start)).unwrap_or(usize::MAX).min(snapshot.block_size.len());
        let loaded = match ahead {
            // One sector has the whole block decoded.
            Ahead::Decoded(_) => self.read(start, &mut [0; SECTOR_LEN][..SECTOR_LEN.min(len)]),
            Ahead::Whole(key) => {
                let load = || {
                    let mut bytes = self.context.cache.memory(len);
                    let buffer = Arc::get_mut(&mut bytes).expect("nobody else has it");
                    self.read_from_files(start, buffer).map(|()| bytes)
                };
                self.context.cache.get(key, load).map(drop)
            }
        };
        if let Err(error) = loaded {
            tracing::debug!(disk = %self.name, block = block.0, %error, "not read ahead");
        }
    }

    fn read_in_memory(&self, offset: u64, mut buffer: &mut [u8]) -> bool {
        // What is in memory is right for ever; this is for a backup that was removed to be said to be.
        let seen_alive = *self.seen_alive.read().unwrap_or_else(PoisonError::into_inner);
        if seen_alive.is_none_or(|seen| seen.elapsed() > BELIEVED) {
            return false;
        }
        let snapshot = self.snapshot();
        if offset.checked_add(buffer.len() as u64).is_none_or(|end| end > snapshot.size) {
            return false;
        }
        for span in snapshot.block_size.spans(offset, buffer.len()) {
            let (part, rest) = buffer.split_at_mut(span.len);
            buffer = rest;
            let Some(place) = snapshot.place(span.block) else {
                part.fill(0);
                continue;
            };
            let whole = self.context.cache.get_verified(snapshot.whole_key(span.block));
            if let Some(bytes) = whole {
                let Some(found) = bytes.get(span.skip..span.skip + span.len) else { return false };
                part.copy_from_slice(found);
                continue;
            }
            let Some((key, visible)) = snapshot.decoded_part(place, &span) else { return false };
            let Some(bytes) = self.context.cache.get_verified(key) else { return false };
            let skip = snapshot.block_size.bitmap_bytes() + span.skip;
            let Some(found) = bytes.get(skip..skip + visible) else { return false };
            part[..visible].copy_from_slice(found);
            part[visible..].fill(0);
        }
        true
    }

    /// Reads what was brought into memory ahead from there, the rest from the files.
    fn read(&self, offset: u64, buffer: &mut [u8]) -> Result<()> {
        if !self.context.storage.capabilities().is_remote {
            return self.read_from_files(offset, buffer);
        }
        let snapshot = self.snapshot();
        let mut rest = buffer;
        let mut at = offset;
        for span in snapshot.block_size.spans(offset, rest.len()) {
            let (part, next) = rest.split_at_mut(span.len);
            rest = next;
            let whole = match snapshot.ahead_of(span.block) {
                Some(Ahead::Whole(key)) => self.context.cache.get_begun(key),
                _ => None,
            };
            match whole {
                // It was verified when it was read; whether the backup is still there is asked now and then.
                Some(Ok(bytes)) if bytes.len() >= span.skip + span.len => {
                    part.copy_from_slice(&bytes[span.skip..span.skip + span.len]);
                    self.check_alive_sometimes()?;
                }
                _ => self.read_from_files(at, part)?,
            }
            at += span.len as u64;
        }
        Ok(())
    }

    fn check_alive_sometimes(&self) -> Result<()> {
        let seen_alive = *self.seen_alive.read().unwrap_or_else(PoisonError::into_inner);
        if seen_alive.is_some_and(|seen| seen.elapsed() <= BELIEVED) {
            return Ok(());
        }
        self.check_alive().map(drop)
    }

    /// Notes of the decoded blocks of a range that the disk was alive at `seen`, after they were read.
    fn verify(&self, snapshot: &Snapshot, offset: u64, len: usize, seen: Instant) {
        for span in snapshot.block_size.spans(offset, len) {
            let decoded = snapshot.place(span.block).and_then(|place| snapshot.decoded_part(place, &span));
            if let Some((key, _)) = decoded {
                self.context.cache.verify(key, seen);
            }
        }
    }
}

fn out_of_range(name: &ObjectPath, offset: u64, size: u64) -> disk::Error {
    let reason = format!("'{name}': a range within {size} bytes was expected, {offset} and more was asked");
    disk::Error::new(disk::ErrorKind::OutOfRange, reason)
}

fn layer_info(member: &Member, map: &BlockMap) -> LayerInfo {
    let layer = &member.layer;
    let count = usize::try_from(layer.block_count()).expect("at most MAX_BLOCKS");
    let mut allocated_blocks = 0;
    map.each_held(count, |_, _| allocated_blocks += 1);
    LayerInfo {
        name: layer.name.clone(),
        data: layer.data.clone(),
        format: layer.format(),
        disk_type: layer.footer.disk_type,
        uuid: layer.footer.uuid,
        parent_uuid: layer.parent_uuid(),
        size: layer.virtual_size(),
        block_size: layer.block_size.bytes(),
        allocated_blocks,
        creator: layer.footer.creator,
        timestamp: layer.footer.timestamp,
        is_merging: member.moving.is_some(),
    }
}

/// The chain as it was found once, and where each block is.
pub(crate) struct Snapshot {
    pub(crate) chain: Chain,
    size: u64,
    pub(crate) block_size: BlockSize,
    /// Per layer: the first byte that it and the layers above do not reach; what lies beyond is zero.
    pub(crate) limits: Vec<u64>,
    /// Per block: the topmost layer that holds it, plus 1; 0 if none does.
    layers: Vec<u16>,
    /// Per block: the sector of its bitmap, if any layer is a VHD file.
    sectors: Vec<u32>,
    allocated_blocks: u64,
    /// Per block a bit: its sector bitmap was found full.
    full: Vec<AtomicU8>,
    /// The layers' own maps, read again only for blocks that are composed of several layers.
    maps: OnceLock<Vec<BlockMap>>,
    pub(crate) storage: Arc<dyn Storage>,
    files: Option<Mutex<OpenFiles>>,
    /// Bytes.
    prefetch_window: u64,
    /// Whether files that nobody touched since they were opened prove that the disk is alive, too: if it lives as long as
    /// its name, and was alive after they were opened. Not of a disk resolved anew, which a merge may have changed by then.
    proves_itself: bool,
}

/// Open block files, by the number of their layer and their block.
type OpenFiles = LruCache<(u16, BlockIndex), Arc<dyn Object>>;

/// The answer of a block's topmost layer: its number in the chain and the block's place in it.
#[derive(Clone, Copy)]
pub(crate) struct Place {
    pub(crate) layer: usize,
    pub(crate) sector: FileSector,
}

impl Snapshot {
    fn open(context: &Context, name: &ObjectPath) -> Result<Self> {
        let storage = &context.storage;
        let chain = Chain::resolve(storage, &context.cache, name)?;
        let leaf = chain.members[0].layer.clone();
        let block_size = leaf.block_size;
        let mut limit = u64::MAX;
        let limits: Vec<u64> = chain
            .members
            .iter()
            .map(|member| {
                limit = limit.min(member.layer.virtual_size());
                limit
            })
            .collect();
        let count = usize::try_from(leaf.block_count()).expect("at most MAX_BLOCKS");
        let has_files = chain.members.iter().any(|member| {
            // A fixed disk has no table.
            matches!(member.layer.body, Body::Flat(_)) && member.layer.header.is_some()
        });
        let mut layers = vec![0_u16; count];
        let mut sectors = if has_files { vec![0; count] } else { Vec::new() };
        let mut allocated_blocks = 0;
        let mut number = 0_u16;
        each_map(&chain, storage, |_, map| {
            let limit = limits[usize::from(number)];
            let visible = usize::try_from(block_size.block_count(limit)).expect("at most MAX_BLOCKS");
            number += 1;
            map.each_held(visible.min(count), |block, place| {
                if layers[block] == 0 {
                    layers[block] = number;
                    allocated_blocks += 1;
                    if let Some(sector) = sectors.get_mut(block) {
                        *sector = place;
                    }
                }
            });
            Ok(())
        })?;
        let full = if has_files { (0..count.div_ceil(8)).map(|_| AtomicU8::new(0)).collect() } else { Vec::new() };
        // Behind a network a name is asked for each time: an open file would hide that it moved.
        let keeps_files = !storage.capabilities().is_remote;
        let files = keeps_files.then(|| Mutex::new(LruCache::new(OPEN_BLOCK_FILES)));
        let size = leaf.virtual_size();
        let prefetch_window = prefetch_window(&chain, storage.as_ref(), &context.cache);
        let (storage, maps) = (storage.clone(), OnceLock::new());
        Ok(Self {
            chain,
            size,
            block_size,
            limits,
            layers,
            sectors,
            allocated_blocks,
            full,
            maps,
            storage,
            files,
            prefetch_window,
            proves_itself: false,
        })
    }

    /// Whether it proves itself, and its leaf still is what it was and has its name.
    fn is_untouched(&self) -> Result<bool> {
        match &self.leaf().body {
            Body::Flat(flat) if self.proves_itself => flat.is_untouched(),
            _ => Ok(false),
        }
    }

    fn whole_key(&self, block: BlockIndex) -> Key {
        Key { layer: self.leaf().id, block, form: Form::Whole }
    }

    /// Returns the key of the decoded block that a part is taken from, and how much of the part its layer reaches;
    /// `None` if the part does not come from one.
    fn decoded_part(&self, place: Place, span: &BlockSpan) -> Option<(Key, usize)> {
        let layer = &self.chain.members[place.layer].layer;
        if !is_decoded(layer, self.storage.as_ref()) {
            return None;
        }
        let start = u64::from(span.block.0) * self.block_size.bytes() + span.skip as u64;
        let visible = self.limits[place.layer].saturating_sub(start).min(span.len as u64);
        let key = Key { layer: layer.id, block: span.block, form: Form::Stored };
        Some((key, usize::try_from(visible).expect("within the part")))
    }

    /// Returns how a block is best brought into memory ahead of its reader; `None` if that does not pay.
    fn ahead_of(&self, block: BlockIndex) -> Option<Ahead> {
        let place = self.place(block)?;
        let span = BlockSpan { block, skip: 0, len: 1 };
        match self.decoded_part(place, &span) {
            Some((key, _)) => Some(Ahead::Decoded(key)),
            None => self.storage.capabilities().is_remote.then(|| Ahead::Whole(self.whole_key(block))),
        }
    }

    fn leaf(&self) -> &Layer {
        &self.chain.members[0].layer
    }

    fn maps(&self) -> Result<&[BlockMap]> {
        if let Some(maps) = self.maps.get() {
            return Ok(maps);
        }
        let mut maps = Vec::with_capacity(self.chain.members.len());
        each_map(&self.chain, &self.storage, |_, map| {
            maps.push(map);
            Ok(())
        })?;
        Ok(self.maps.get_or_init(|| maps))
    }

    pub(crate) fn place(&self, block: BlockIndex) -> Option<Place> {
        let block = block.0 as usize;
        let layer = usize::from(*self.layers.get(block)?).checked_sub(1)?;
        Some(Place { layer, sector: FileSector(self.sectors.get(block).copied().unwrap_or(0)) })
    }

    fn extent_at(&self, offset: u64) -> Extent {
        let first = offset / self.block_size.bytes();
        let index = usize::try_from(first).expect("below MAX_BLOCKS");
        let is_hole = self.layers[index] == 0;
        let run = self.layers[index..].iter().take_while(|layer| (**layer == 0) == is_hole).count() as u64;
        let end = ((first + run) * self.block_size.bytes()).min(self.size);
        Extent { len: end - offset, is_hole }
    }

    /// Reads a range within the disk.
    fn read(&self, context: &Context, offset: u64, mut buffer: &mut [u8]) -> Result<Outcome> {
        let mut outcome = Outcome::Untouched;
        for span in self.block_size.spans(offset, buffer.len()) {
            let (part, rest) = buffer.split_at_mut(span.len);
            buffer = rest;
            match self.place(span.block) {
                Some(place) => outcome = outcome.max(self.read_block(context, place, &span, part)?),
                None => part.fill(0),
            }
            if outcome == Outcome::Changed {
                break;
            }
        }
        Ok(outcome)
    }

    /// Reads a part of a block from `place` and, where its sector bitmap says so, from the layers below.
    ///
    /// Not by recursion: thousands of layers may each hold some sectors of one block.
    fn read_block(&self, context: &Context, place: Place, span: &BlockSpan, part: &mut [u8]) -> Result<Outcome> {
        let mut below = Vec::new();
        let mut next = Some((place, *span, part));
        let mut outcome = Outcome::Untouched;
        while let Some((place, span, part)) = next {
            outcome = outcome.max(self.read_layer(context, place, &span, part, &mut below)?);
            if outcome == Outcome::Changed {
                break;
            }
            next = below.pop();
        }
        Ok(outcome)
    }

    /// Reads what the layer of `place` has of a part of a block; what it leaves to the layers below goes to `below`.
    fn read_layer<'b>(
        &self,
        context: &Context,
        place: Place,
        span: &BlockSpan,
        part: &'b mut [u8],
        below: &mut Vec<(Place, BlockSpan, &'b mut [u8])>,
    ) -> Result<Outcome> {
        let member = &self.chain.members[place.layer];
        let start = u64::from(span.block.0) * self.block_size.bytes() + span.skip as u64;
        let visible = self.limits[place.layer].saturating_sub(start).min(part.len() as u64);
        let (part, beyond) = part.split_at_mut(usize::try_from(visible).expect("within the part"));
        beyond.fill(0);
        if part.is_empty() {
            return Ok(Outcome::Untouched);
        }
        match &member.layer.body {
            Body::Flat(flat) => {
                let bitmap = self.partial_bitmap(member, place, span.block)?;
                match &bitmap {
                    None => flat.read(&member.layer, span.block, place.sector, span.skip, part)?,
                    Some(bitmap) => self.compose(place, bitmap, span, part, below)?,
                }
                let outcome = flat.verify(&member.layer, span.block, place.sector)?;
                if bitmap.is_none() && outcome != Outcome::Changed {
                    self.remember_full(span.block, place);
                }
                Ok(outcome)
            }
            Body::Exploded(exploded) => {
                self.check_order(member, place, span.block)?;
                let skip = self.block_size.bitmap_bytes() + span.skip;
                if !is_decoded(&member.layer, self.storage.as_ref()) {
                    let file = self.block_file(member, place, span.block)?;
                    if file.read_at(skip as u64, part).map_err(|error| Error::from(error).in_block(span.block))?
                        != part.len()
                    {
                        let reason = "its file was cut off while it was read";
                        return Err(member.layer.block_error(ErrorKind::Damaged, span.block, reason));
                    }
                } else {
                    let (cache, layer, moving) = (&context.cache, &member.layer, member.moving.as_ref());
                    let load = || exploded.load_block(cache, layer, moving, &self.storage, span.block);
                    let bytes = cache.get(Key { layer: layer.id, block: span.block, form: Form::Stored }, load)?;
                    part.copy_from_slice(&bytes[skip..skip + part.len()]);
                }
                Ok(Outcome::Right)
            }
        }
    }

    /// Returns the bitmap of a block if some of its sectors are not in its layer.
    pub(crate) fn partial_bitmap(&self, member: &Member, place: Place, block: BlockIndex) -> Result<Option<Vec<u8>>> {
        let layer = &member.layer;
        let Body::Flat(flat) = &layer.body else { return Ok(None) };
        if layer.header.is_none() || layer.format().bitmap_rule() == BitmapRule::Ignore || self.is_full(block, place) {
            return Ok(None);
        }
        let bitmap = flat.bitmap(layer, block, place.sector)?;
        let sectors = self.block_size.len() / SECTOR_LEN;
        let is_full = (0..sectors).all(|sector| has_sector(&bitmap, sector));
        Ok((!is_full).then_some(bitmap))
    }

    /// Whether `place` is the block's topmost layer, and its bitmap was seen full by a read that was verified.
    fn is_full(&self, block: BlockIndex, place: Place) -> bool {
        let index = block.0 as usize;
        let is_known =
            self.full.get(index / 8).is_some_and(|byte| byte.load(Ordering::Relaxed) & (1 << (index % 8)) != 0);
        is_known && self.is_topmost(block, place)
    }

    fn is_topmost(&self, block: BlockIndex, place: Place) -> bool {
        self.place(block).is_some_and(|topmost| topmost.layer == place.layer)
    }

    /// Notes that a block's bitmap is full; of a lower layer it says nothing about the topmost one.
    fn remember_full(&self, block: BlockIndex, place: Place) {
        if !self.is_topmost(block, place) {
            return;
        }
        let block = block.0 as usize;
        if let Some(byte) = self.full.get(block / 8) {
            byte.fetch_or(1 << (block % 8), Ordering::Relaxed);
        }
    }

    /// Reads the sectors of a part of a block that its layer has; those of the layers below go to `below`.
    fn compose<'b>(
        &self,
        place: Place,
        bitmap: &[u8],
        span: &BlockSpan,
        mut part: &'b mut [u8],
        below: &mut Vec<(Place, BlockSpan, &'b mut [u8])>,
    ) -> Result<()> {
        let layer = &self.chain.members[place.layer].layer;
        let Body::Flat(flat) = &layer.body else { unreachable!("only a VHD file has partial bitmaps") };
        let mut at = span.skip;
        let last = span.skip + part.len();
        while at < last {
            let is_here = has_sector(bitmap, at / SECTOR_LEN);
            let mut end = (at / SECTOR_LEN + 1) * SECTOR_LEN;
            while end < last && has_sector(bitmap, end / SECTOR_LEN) == is_here {
                end += SECTOR_LEN;
            }
            let len = end.min(last) - at;
            let (run, rest) = part.split_at_mut(len);
            part = rest;
            if is_here {
                flat.read(layer, span.block, place.sector, at, run)?;
            } else {
                match self.place_below(place.layer, span.block)? {
                    None => run.fill(0),
                    Some(lower) => below.push((lower, BlockSpan { block: span.block, skip: at, len }, run)),
                }
            }
            at += len;
        }
        Ok(())
    }

    /// Finds a block in the layers below `layer`.
    fn place_below(&self, layer: usize, block: BlockIndex) -> Result<Option<Place>> {
        let maps = self.maps()?;
        let found = maps.iter().enumerate().skip(layer + 1).find_map(|(number, map)| {
            map.place(block.0 as usize).map(|sector| Place { layer: number, sector: FileSector(sector) })
        });
        Ok(found)
    }

    /// Opens the file of an uncompressed block, or takes the one that is open.
    fn block_file(&self, member: &Member, place: Place, block: BlockIndex) -> Result<Arc<dyn Object>> {
        let key = (u16::try_from(place.layer).expect("at most MAX_LAYERS"), block);
        let files = self.files.as_ref().map(|files| files.lock().unwrap_or_else(PoisonError::into_inner));
        if let Some(file) = files.and_then(|mut files| files.get(&key).cloned()) {
            return Ok(file);
        }
        let file = Exploded::open_block(&member.layer, member.moving.as_ref(), &self.storage, block)?.object;
        if let Some(files) = &self.files {
            files.lock().unwrap_or_else(PoisonError::into_inner).put(key, file.clone());
        }
        Ok(file)
    }

    /// Refuses a block that is gone from its layer although a merge, which moves them in ascending order, has not
    /// come that far: it was lost before.
    fn check_order(&self, member: &Member, place: Place, block: BlockIndex) -> Result<()> {
        let may_be_lost = member.moving.as_ref().is_some_and(|moving| !moving.was_complete);
        if !may_be_lost || Exploded::is_there(&member.layer, &self.storage, block)? {
            return Ok(());
        }
        let number = u16::try_from(place.layer + 1).expect("at most MAX_LAYERS");
        let mut own = self.layers[..block.0 as usize].iter().enumerate().rev().filter(|(_, layer)| **layer == number);
        if let Some((lower, _)) = own.nth(MERGE_IN_FLIGHT) {
            let lower = BlockIndex(u32::try_from(lower).expect("at most MAX_BLOCKS"));
            if Exploded::is_there(&member.layer, &self.storage, lower)? {
                let reason = "its file is missing, and the merge under way has not come that far: it was lost before";
                return Err(member.layer.block_error(ErrorKind::Missing, block, reason));
            }
        }
        Ok(())
    }
}

/// Whether the blocks of a layer must be decoded whole before a part of one can be read.
fn is_decoded(layer: &Layer, storage: &dyn Storage) -> bool {
    match &layer.body {
        Body::Flat(_) => false,
        Body::Exploded(exploded) => exploded.filter != Filter::None || !storage.capabilities().ranged_reads,
    }
}

/// Returns how far ahead of a sequential reader to be, in bytes.
fn prefetch_window(chain: &Chain, storage: &dyn Storage, cache: &BlockCache) -> u64 {
    let block = chain.members[0].layer.block_size.bytes();
    let cores = std::thread::available_parallelism().map_or(1, |cores| cores.get() as u64);
    let blocks = if storage.capabilities().is_remote {
        AHEAD_REMOTE.max(AHEAD_PER_CORE * cores)
    } else if chain.members.iter().any(|member| is_decoded(&member.layer, storage)) {
        AHEAD_PER_CORE * cores
    } else {
        0
    };
    let most = cache.limit() / 4;
    // Blocks of which not even one fits are read when they are asked for.
    if block > most { 0 } else { blocks.saturating_mul(block).min(most) }
}

/// Whether a sector bitmap has a bit for the sector of that number.
pub(crate) fn has_sector(bitmap: &[u8], sector: usize) -> bool {
    bitmap.get(sector / 8).is_some_and(|byte| byte & (0x80 >> (sector % 8)) != 0)
}

/// Reads the map of each layer once, several at a time, and hands them to `act`, leaf first.
///
/// No more than those read at a time are in memory: all maps of a long chain of large disks would take gigabytes.
pub(crate) fn each_map(
    chain: &Chain,
    storage: &Arc<dyn Storage>,
    mut act: impl FnMut(&Member, BlockMap) -> Result<()>,
) -> Result<()> {
    // A disk of this machine has little delay to hide.
    let at_once = if storage.capabilities().is_remote { 16 } else { 4 };
    for group in chain.members.chunks(at_once) {
        let read = std::thread::scope(|scope| {
            let (first, others) = group.split_first().expect("no chunk is empty");
            let thread = std::thread::Builder::new;
            let others: Vec<_> = others
                .iter()
                .map(|member| (member, thread().spawn_scoped(scope, || member.layer.map(storage))))
                .collect();
            let mut read = vec![first.layer.map(storage)];
            read.extend(others.into_iter().map(|(member, thread)| match thread {
                Ok(thread) => thread.join().expect("reading a map does not panic"),
                // Where the system refuses another thread, this one reads.
                Err(_) => member.layer.map(storage),
            }));
            read
        });
        for (member, map) in group.iter().zip(read) {
            act(member, map?)?;
        }
    }
    Ok(())
}
