//! The trees of a filesystem, and where its logical addresses lie.
//!
//! ```text
//! logical  ──┬── chunk ──┬────── chunk ──────┬──
//!            │           ├─ stripe ─┬─ stripe ┤      copies, or stripes, on devices
//! devices    1           1          2
//! ```
//!
//! rust-fs-btrfs keeps blocks for each subvolume it opens; here all trees share one store, however many there are.

use std::cell::RefCell;
use std::collections::HashMap;
use std::ops::ControlFlow;

use fs_btrfs::btree::{Tree, TreeBlock, TreeGeometry};
use fs_btrfs::chunk::{ChunkMap, DiskKey, chunk_from_item, key_type, objectid};

use super::devices::Devices;
use super::view::{Edits, View};
use crate::{Error, ErrorKind, Result};

/// Bytes of blocks of trees that are kept; parsed they take some three times that.
const KEPT_BYTES: usize = 16 << 20;

/// Chunks of a filesystem at most, some 200 bytes each. They are of 1 GiB, but for small volumes.
const MAX_CHUNKS: usize = 500_000;

/// Where a tree starts, and the commit of which that block is: one that stands there of another, on a device that was left
/// behind, is sound as well.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Root {
    pub(super) at: u64,
    pub(super) generation: u64,
    /// Its number.
    pub(super) tree: u64,
}

/// A filesystem whose trees can be read.
pub(super) struct Volume {
    devices: Devices,
    chunks: ChunkMap,
    blocks: RefCell<Blocks>,
    /// What is to be said of devices that are not here, if any.
    missing: Option<String>,
    /// What is seen of subvolumes instead of what stands there.
    edits: HashMap<u64, Edits>,
}

impl Volume {
    /// Reads the map of the logical addresses.
    pub(super) fn open(devices: Devices) -> Result<Self> {
        let superblock = devices.superblock();
        let chunks = ChunkMap::bootstrap(superblock)
            .map_err(|error| Error::new(kind_of(&error), format!("the filesystem cannot be opened: {error}")))?;
        let (sector, count) = (superblock.sectorsize, superblock.num_devices);
        let (at, generation) = (superblock.chunk_root, superblock.chunk_root_generation);
        let root = Root { at, generation, tree: objectid::CHUNK_TREE };
        let blocks = RefCell::new(Blocks::new(KEPT_BYTES / node_size(&devices)));
        let mut volume = Self { devices, chunks, blocks, missing: None, edits: HashMap::new() };
        let mut numbers = Vec::new();
        let mut chunks = volume.chunks.clone();
        let start = DiskKey { objectid: 0, key_type: 0, offset: 0 };
        let read = volume.visit_stored(root, start, |key, item| {
            if key.objectid == objectid::DEV_ITEMS && key.key_type == key_type::DEV_ITEM {
                numbers.push(key.offset);
            }
            let bad = |error| volume.explain(error, "a chunk cannot be read");
            if let Some(chunk) = chunk_from_item(key, item, sector).map_err(bad)? {
                // Those of the system are in the superblock, too.
                if chunks.chunk_for(chunk.logical) != Some(&chunk) {
                    chunks.insert(chunk).map_err(bad)?;
                }
            }
            if chunks.len() + numbers.len() > MAX_CHUNKS {
                let message = format!("it has more than {MAX_CHUNKS} chunks");
                return Err(Error::new(ErrorKind::TooMuch, message));
            }
            Ok(ControlFlow::Continue(()))
        });
        volume.missing = volume.find_missing(count, read.is_ok().then_some(&numbers));
        read.map_err(|error| volume.blame(error))?;
        volume.chunks = chunks;
        Ok(volume)
    }

    /// Returns which devices are missing, as far as their numbers are known.
    fn find_missing(&self, count: u64, numbers: Option<&Vec<u64>>) -> Option<String> {
        let here: Vec<_> = self.devices.numbers().collect();
        let missing: Vec<_> = numbers.into_iter().flatten().filter(|number| !here.contains(number)).collect();
        if missing.is_empty() && here.len() as u64 >= count {
            return None;
        }
        let missing: Vec<_> = missing.into_iter().take(16).map(|number| format!("device {number}")).collect();
        let which = match &missing[..] {
            [] => format!("only {} of them can be read", here.len()),
            [one] => format!("{one} is missing"),
            several => format!("{} are missing", several.join(", ")),
        };
        Some(format!("the filesystem is on {count} devices, and {which}"))
    }

    /// Returns what an error means that keeps the filesystem from being opened: devices that are missing, if any are.
    pub(super) fn blame(&self, error: Error) -> Error {
        match &self.missing {
            Some(missing) if error.kind() != ErrorKind::Disk => Error::unsupported(format!("{missing}: {error}")),
            _ => error,
        }
    }

    /// Returns what is to be said of the devices.
    pub(super) fn problems(&self) -> Vec<String> {
        let missing = self.missing.iter().map(|missing| format!("{missing}: what lies only there cannot be read"));
        missing.chain(self.devices.problems()).collect()
    }

    /// Returns the root of the tree of trees.
    pub(super) fn root(&self) -> Root {
        let superblock = self.devices.superblock();
        Root { at: superblock.root, generation: superblock.generation, tree: objectid::ROOT_TREE }
    }

    pub(super) fn devices(&self) -> &Devices {
        &self.devices
    }

    /// Bytes of a sector, 4,096 to 65,536.
    pub(super) fn sector(&self) -> u64 {
        self.devices.superblock().sectorsize.into()
    }

    /// Has other items of subvolumes be seen from now on.
    pub(super) fn edit(&mut self, edits: HashMap<u64, Edits>) {
        self.edits = edits;
    }

    fn view(&self, root: Root) -> View<'_> {
        View { volume: self, root, edits: self.edits.get(&root.tree) }
    }

    /// Returns an item of the tree that has this root.
    pub(super) fn item(&self, root: Root, key: DiskKey) -> Result<Option<Vec<u8>>> {
        self.view(root).item(key.into())
    }

    /// Shows the items of the object and the type of `first` from that on, until told to stop.
    pub(super) fn items(
        &self,
        root: Root,
        first: DiskKey,
        show: impl FnMut(u64, &[u8]) -> Result<ControlFlow<()>>,
    ) -> Result<()> {
        self.view(root).items(first.into(), show)
    }

    /// Returns the offset of the last item of the object and the type of `key` that is not past it.
    pub(super) fn last_until(&self, root: Root, key: DiskKey) -> Result<Option<u64>> {
        self.view(root).last_until(key.into())
    }

    /// Returns an item that stands in a tree.
    pub(super) fn stored_item(&self, root: Root, key: DiskKey) -> Result<Option<Vec<u8>>> {
        let found = self.with_tree(root, |tree| tree.search(root.at, &key));
        let found = found.map_err(|error| self.explain(error, &format!("item {} cannot be looked for", Shown(key))))?;
        Ok(found.map(|item| item.data))
    }

    /// Returns the offsets of the last items that stand in a tree, are of the object and the type of `key`, and are not past
    /// it: as many as are in one leaf, in ascending order.
    pub(super) fn stored_until(&self, root: Root, key: DiskKey) -> Result<Vec<u64>> {
        let leaf = self.with_tree(root, |tree| tree.descend(root.at, &key));
        let leaf = leaf.map_err(|error| self.explain(error, &format!("item {} cannot be looked for", Shown(key))))?;
        let keys = leaf.body.items().unwrap_or_default().iter().map(|item| item.key);
        let of_object = keys.filter(|other| (other.objectid, other.key_type) == (key.objectid, key.key_type));
        Ok(of_object.map(|other| other.offset).take_while(|offset| *offset <= key.offset).collect())
    }

    /// Shows all items that stand in a tree, from a key on, until told to stop.
    pub(super) fn visit_stored(
        &self,
        root: Root,
        first: DiskKey,
        mut show: impl FnMut(&DiskKey, &[u8]) -> Result<ControlFlow<()>>,
    ) -> Result<()> {
        let mut refused = None;
        let visited = self.with_tree(root, |tree| {
            tree.for_each_from(root.at, &first, &mut |key, item| match show(key, item) {
                Ok(flow) => Ok(flow.is_continue()),
                Err(error) => {
                    refused = Some(error);
                    Ok(false)
                }
            })
        });
        visited.map_err(|error| self.explain(error, &format!("items from {} on cannot be read", Shown(first))))?;
        refused.map_or(Ok(()), Err)
    }

    fn with_tree<T>(
        &self,
        root: Root,
        act: impl FnOnce(&Tree) -> fs_btrfs::error::Result<T>,
    ) -> fs_btrfs::error::Result<T> {
        // What failed before had another copy.
        self.devices.take_failure();
        let read = |logical: u64, buffer: &mut [u8]| self.read_copy(logical, 0, buffer);
        let copies = |logical: u64| self.chunks.mirrors_at(logical);
        let read_copy = |logical: u64, copy: usize, buffer: &mut [u8]| self.read_copy(logical, copy, buffer);
        let get = |logical: u64| self.blocks.borrow_mut().get(logical);
        let put = |logical: u64, block: &TreeBlock| self.blocks.borrow_mut().put(logical, block);
        let geometry = TreeGeometry::from_superblock(self.devices.superblock());
        let tree = Tree::new(geometry, &read).with_redundancy(&copies, &read_copy).with_cache(&get, &put);
        // From now on it is kept: no other finds its way to the root.
        tree.read_child(root.at, root.generation)?;
        act(&tree)
    }

    /// Fills a buffer from one of the copies.
    fn read_copy(&self, logical: u64, copy: usize, mut buffer: &mut [u8]) -> fs_btrfs::error::Result<()> {
        let mut at = logical;
        while !buffer.is_empty() {
            let mapping = self.chunks.map_mirror(at, copy)?;
            let len = usize::try_from(mapping.len).unwrap_or(usize::MAX).min(buffer.len());
            let (here, rest) = buffer.split_at_mut(len);
            self.devices
                .read(mapping.devid, mapping.physical, here)
                .map_err(|error| fs_btrfs::error::Error::Io(error.to_string()))?;
            // A chunk does not end past the last address.
            at = at.saturating_add(mapping.len);
            buffer = rest;
        }
        Ok(())
    }

    /// Returns the copies of what lies at an address: first those on devices that have what is new, last those that are missing.
    fn copies(&self, logical: u64) -> Result<Vec<usize>> {
        let bad = |error| self.explain(error, "contents cannot be found");
        let mut found = Vec::new();
        for copy in 0..self.chunks.mirrors_at(logical).map_err(bad)? {
            let mapping = self.chunks.map_mirror(logical, copy).map_err(bad)?;
            found.push((self.devices.standing(mapping.devid), copy));
        }
        found.sort_unstable();
        Ok(found.into_iter().map(|(_, copy)| copy).collect())
    }

    /// Returns where the bytes from a logical address on lie: member, offset, and how many of the next `len` (more than 0)
    /// lie there.
    pub(super) fn place(&self, logical: u64, len: u64) -> Result<(u16, u64, u64)> {
        let copy = self.copies(logical)?.first().copied().unwrap_or(0);
        let mapping =
            self.chunks.map_mirror(logical, copy).map_err(|error| self.explain(error, "contents cannot be found"))?;
        let len = len.min(mapping.len);
        Ok((self.devices.member(mapping.devid, mapping.physical, len)?, mapping.physical, len))
    }

    /// Reads `len` bytes of data and makes something of them, of another copy if that fails.
    ///
    /// `len` is allocated at once.
    pub(super) fn read_data<T>(&self, logical: u64, len: usize, make: impl Fn(&[u8]) -> Result<T>) -> Result<T> {
        self.devices.take_failure();
        let mut bytes = vec![0; len];
        let mut first_error = None;
        for copy in self.copies(logical)? {
            let read = self.read_copy(logical, copy, &mut bytes);
            match read.map_err(|error| self.explain(error, "contents cannot be read")).and_then(|()| make(&bytes)) {
                Ok(made) => return Ok(made),
                Err(error) => _ = first_error.get_or_insert(error),
            }
        }
        Err(first_error.unwrap_or_else(|| Error::damaged(format!("nothing lies at logical address {logical}"))))
    }

    /// Returns what an error means: one of a disk, if one failed meanwhile.
    pub(super) fn explain(&self, error: fs_btrfs::error::Error, what: &str) -> Error {
        match self.devices.take_failure() {
            Some(error) => error.into(),
            None => Error::new(kind_of(&error), format!("{what}: {error}")),
        }
    }
}

fn node_size(devices: &Devices) -> usize {
    usize::try_from(devices.superblock().nodesize).expect("64 KiB at most")
}

/// Returns the kind of what is no error of a disk.
pub(super) fn kind_of(error: &fs_btrfs::error::Error) -> ErrorKind {
    use fs_btrfs::error::Error as Cause;
    match error {
        Cause::UnsupportedFeature(_) | Cause::UnsupportedProfile(_) | Cause::UnsupportedChecksum(_) => {
            ErrorKind::Unsupported
        }
        Cause::NotFound => ErrorKind::NotFound,
        _ => ErrorKind::Damaged,
    }
}

/// A key as `btrfs inspect-internal` writes it.
struct Shown(DiskKey);

impl std::fmt::Display for Shown {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        write!(f, "({} {} {})", self.0.objectid, self.0.key_type, self.0.offset)
    }
}

/// Blocks of trees, checked; those that were not used longest go first.
struct Blocks {
    room: usize,
    now: u64,
    kept: HashMap<u64, (u64, TreeBlock)>,
}

impl Blocks {
    fn new(room: usize) -> Self {
        Self { room, now: 0, kept: HashMap::new() }
    }

    fn get(&mut self, logical: u64) -> Option<TreeBlock> {
        self.now += 1;
        let (used, block) = self.kept.get_mut(&logical)?;
        *used = self.now;
        Some(block.clone())
    }

    fn put(&mut self, logical: u64, block: &TreeBlock) {
        if self.kept.len() >= self.room {
            // Half at once: looking for the oldest takes as long as looking at all.
            let mut used: Vec<_> = self.kept.values().map(|(used, _)| *used).collect();
            let (_, middle, _) = used.select_nth_unstable(self.room / 2);
            let middle = *middle;
            self.kept.retain(|_, (used, _)| *used > middle);
        }
        self.now += 1;
        self.kept.insert(logical, (self.now, block.clone()));
    }
}
