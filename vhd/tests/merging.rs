//! Merges of ours: whenever they are cut off, nothing is lost, and who goes on with them ends where an undisturbed merge ends.
//!
//! Each seed is a chain with its truth. Its merge is stopped after every change of the storage; then the power is cut, which
//! takes any part of what was not synced; what is left is read, and merged to the end, at times with another power cut on
//! the way. Who opened a disk before the merge goes on reading it. Every image has digests of its blocks, written here by hand;
//! whatever happened, those that are valid are right, and a merge that nothing disturbed keeps them all. `XOFS_SEEDS=1000` tries more of them, `XOFS_SEED=17` that
//! one alone.

#[allow(dead_code, reason = "each test file uses its part of the module")]
mod builder;
mod seeds;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::UNIX_EPOCH;

use aws_lc_rs::digest::{SHA256, digest};
use builder::{Image, Kind, SECTOR};
use disk::Disk;
use seeds::Random;
use storage::{Fault, FaultyStorage, Loss, MemoryStorage, ObjectPath, Operation, Storage, WritableStorage};
use vhd::{
    BlockCache, BlockIndex, BlockSize, ChainDisk, Context, Control, DIGESTS, Digest, Liveness, Merge, Outcome,
    digests_name,
};

/// How many are tried where `XOFS_SEEDS` does not say it.
const SEEDS: u64 = 16;
/// What EIO is for the tests: the machine is gone.
const GONE: i32 = 5;

/// A chain: what its disks read as, by name, and what of it is merged.
struct World {
    memory: Arc<MemoryStorage>,
    truths: BTreeMap<String, Vec<u8>>,
    chain: Vec<String>,
    /// Bytes of a block.
    block_len: usize,
    /// Blocks of which some image has only a part: they may have no digest.
    partial: BTreeSet<u32>,
}

const KINDS: [Kind; 4] = [Kind::Flat, Kind::Plain, Kind::Gzip, Kind::Brotli];

/// Bytes of a block of an exploded VHD; of a VHD file it has sectors that another layer may hold.
const BLOCK: usize = 512;
const FLAT_BLOCK: usize = 2048;
/// Entries of a sector of a table.
const ENTRIES: usize = SECTOR / 4;

fn name(number: usize, kind: Kind) -> String {
    let end = if kind == Kind::Flat { "vhd" } else { "alias.vhd" };
    format!("2026080{number}T000000Z.{end}")
}

/// Puts the digests of an image beside it.
fn put_digests(memory: &MemoryStorage, name: &str, image: &Image, partial: &BTreeSet<u32>) {
    let is_file = image.kind == Kind::Flat;
    let stem = name.strip_suffix(".alias.vhd").unwrap_or(name);
    let stat = |of: &str| memory.stat(&path(of)).unwrap();
    let mut blocks: Vec<_> = image.blocks.iter().filter(|(block, _)| !partial.contains(block)).collect();
    blocks.sort();
    let file_size = if is_file { stat(name).size } else { 0 };
    let head = [&b"xofsdig1"[..], image.uuid.as_bytes()].concat();
    let numbers = [u32::try_from(image.block).unwrap(), u32::try_from(blocks.len()).unwrap()];
    let mut bytes = [head, numbers.iter().flat_map(|number| number.to_be_bytes()).collect()].concat();
    bytes.extend(file_size.to_be_bytes());
    bytes.extend([0; 8]);
    for (block, data) in blocks {
        let (file, place) = if is_file {
            let table = memory.read(&path(name), 1 << 30).unwrap()[1536 + 4 * *block as usize..][..4].to_vec();
            (stat(name), table)
        } else {
            let file = stat(&format!("data/{stem}.vhd/blocks/{}/{}", block / 1000, block % 1000));
            (file, u32::try_from(file.size).unwrap().to_be_bytes().to_vec())
        };
        let modified = u64::try_from(file.modified.duration_since(UNIX_EPOCH).unwrap().as_nanos()).unwrap();
        bytes.extend(block.to_be_bytes());
        bytes.extend(place);
        bytes.extend(modified.to_be_bytes());
        bytes.extend(file.inode.to_be_bytes());
        bytes.extend(digest(&SHA256, data).as_ref());
    }
    let checksum = digest(&SHA256, &bytes);
    bytes.extend(checksum.as_ref());
    let sidecar = if is_file { digests_name(name) } else { format!("data/{stem}.vhd/{DIGESTS}") };
    memory.put(&sidecar, bytes).unwrap();
}

/// A VHD file of a layer: its blocks in any order with gaps, each with its sector bitmap.
fn file(image: &Image, bitmaps: &BTreeMap<u32, u8>, random: &mut Random) -> Vec<u8> {
    let entries = usize::try_from(image.size.div_ceil(image.block as u64)).unwrap();
    let gap = |random: &mut Random| [0, 0, 0, SECTOR, 2 * SECTOR][random.below(5)];
    let mut table = vec![0xff; (entries * 4).next_multiple_of(SECTOR)];
    let mut data = vec![0xdd; gap(random)];
    let mut left: Vec<_> = image.blocks.iter().collect();
    while !left.is_empty() {
        let (index, bytes) = left.swap_remove(random.below(left.len()));
        let sector = u32::try_from((1536 + table.len() + data.len()) / SECTOR).unwrap();
        table[*index as usize * 4..][..4].copy_from_slice(&sector.to_be_bytes());
        let mut bitmap = image.bitmap();
        bitmap[0] = bitmaps.get(index).copied().unwrap_or(0xff);
        data.extend(bitmap);
        data.extend(bytes);
        data.resize(data.len() + gap(random), 0xdd);
    }
    [&image.footer()[..], &image.header(), &table, &data, &image.footer()].concat()
}

impl World {
    /// Makes a chain of two to seven disks, some of which are merged into the one that follows them.
    fn new(random: &mut Random) -> Self {
        let memory = Arc::new(MemoryStorage::with_power_cuts());
        let common = [Kind::Plain, Kind::Gzip, Kind::Brotli, Kind::Flat, Kind::Flat, Kind::Flat][random.below(6)];
        let (is_mixed, is_uneven) = (random.below(4) == 0, random.below(4) == 0);
        let block_len = if common == Kind::Flat || is_mixed || is_uneven { FLAT_BLOCK } else { BLOCK };
        let is_near_end_of_sector = common == Kind::Flat && random.below(2) == 0;
        let disks = 2 + random.below(5);
        let first = random.below(disks - 1);
        let last = first + 1 + random.below(disks - 1 - first);
        let (mut truth, mut truths): (Vec<u8>, _) = (Vec::new(), BTreeMap::new());
        let mut kinds: Vec<Kind> = Vec::new();
        let mut partial = BTreeSet::new();
        let mut blocks = if is_near_end_of_sector { ENTRIES - random.below(2) } else { 1 + random.below(9) };
        for number in 0..disks {
            let kind = if is_mixed && random.below(2) == 0 { KINDS[random.below(4)] } else { common };
            // Past a byte of the table, at times; past a sector of it, at times.
            blocks += match is_near_end_of_sector {
                true if number == last => 1 + random.below(9),
                false if random.below(4) == 0 => random.below(9),
                _ => 0,
            };
            let mut size = blocks * block_len;
            if is_uneven {
                blocks = 1 + random.below(9);
                let cut = if random.below(3) == 0 { random.below(block_len / SECTOR) } else { 0 };
                size = blocks * block_len - SECTOR * cut;
            }
            if size % block_len != 0 {
                // What lies past the end is hashed, too.
                partial.insert(u32::try_from(blocks - 1).unwrap());
            }
            truth.resize(size, 0);
            let mut image = Image::new(number as u128 + 1, size as u64, &[]).stored(kind);
            image.block = block_len;
            if number > 0 {
                image = image.child_of(number as u128, &name(number - 1, kinds[number - 1]));
            }
            let density = (1 + random.below(3)) * if is_near_end_of_sector { 16 } else { 1 };
            let mut bitmaps = BTreeMap::new();
            for block in 0..blocks {
                if random.below(density) == 0 {
                    let byte = u8::try_from(number * 32 + block % 32).unwrap();
                    let bytes = if random.below(8) == 0 { vec![0; block_len] } else { vec![byte; block_len] };
                    let index = u32::try_from(block).unwrap();
                    if kind == Kind::Flat && random.below(4) == 0 {
                        bitmaps.insert(index, u8::try_from(random.below(16) << 4).unwrap());
                        partial.insert(index);
                    }
                    let bits = bitmaps.get(&index).copied().unwrap_or(0xff);
                    for (sector, bytes) in bytes.chunks(SECTOR).enumerate() {
                        let at = block * block_len + sector * SECTOR;
                        if bits & (0x80 >> sector) != 0 && at < size {
                            truth[at..][..SECTOR].copy_from_slice(bytes);
                        }
                    }
                    image.blocks.push((index, bytes));
                }
            }
            match kind {
                Kind::Flat => memory.put(&name(number, kind), file(&image, &bitmaps, random)).unwrap(),
                _ => image.put(&memory, name(number, kind).strip_suffix(".alias.vhd").unwrap()),
            }
            put_digests(&memory, &name(number, kind), &image, &partial);
            if !(first..last).contains(&number) {
                truths.insert(name(number, kind), truth.clone());
            }
            kinds.push(kind);
        }
        memory.sync_tree(&ObjectPath::root(), &memory.mark().unwrap()).unwrap();
        let chain = (first..=last).map(|number| name(number, kinds[number])).collect();
        Self { memory, truths, chain, block_len, partial }
    }

    /// Opens every disk that is kept, for [`World::check_opened`].
    fn open_all(&self) -> Vec<(ChainDisk, &Vec<u8>)> {
        let context = Context { storage: self.memory.clone(), cache: BlockCache::new(0) };
        let open = |name: &String| vhd::open(&context, &path(name), Some(Arc::new(Kept))).unwrap();
        self.truths.iter().map(|(name, truth)| (open(name), truth)).collect()
    }

    /// Every disk that was opened before reads as it did.
    fn check_opened(opened: &[(ChainDisk, &Vec<u8>)], when: &str) {
        for (disk, truth) in opened {
            let mut bytes = vec![0xee; truth.len()];
            disk.read_at(0, &mut bytes).unwrap_or_else(|error| panic!("{when}: opened before: {error}"));
            assert!(bytes == **truth, "{when}: opened before, {:?} reads wrong", disk.leaf().uuid);
        }
    }

    /// Every digest that is valid is right; if nothing disturbed what was done, all are.
    fn check_digests(&self, disk: &ChainDisk, truth: &[u8], is_undisturbed: bool, when: &str) {
        let digests = disk.digests();
        assert!(digests.problems().is_empty(), "{when}: {:?}", digests.problems());
        let block_len = self.block_len;
        let block_size = BlockSize::new(u32::try_from(block_len).unwrap()).unwrap();
        for (index, block) in (0..).zip(truth.chunks(block_len)) {
            let (known, real) = (digests.of_read(BlockIndex(index)), Digest::of(block, block_size));
            assert!(known.is_none_or(|known| known == real), "{when}: block {index} has another digest");
            let copy = digests.of_copy(BlockIndex(index));
            assert!(copy.is_none_or(|known| known == real), "{when}: block {index} of a copy has another digest");
            let is_lost = known.is_none() && is_undisturbed && !self.partial.contains(&index);
            assert!(!is_lost, "{when}: the digest of block {index} is lost");
        }
    }

    /// Every digest of a kept disk is known and right.
    fn check_all_digests(&self, storage: &Arc<MemoryStorage>, when: &str) {
        for (name, truth) in &self.truths {
            let context = Context { storage: storage.clone(), cache: BlockCache::new(0) };
            let disk = vhd::open(&context, &path(name), Some(Arc::new(Kept))).unwrap();
            self.check_digests(&disk, truth, true, &format!("{when}: {name}"));
        }
    }

    /// Every disk that is kept reads as it did.
    fn check(&self, storage: &Arc<MemoryStorage>, when: &str) {
        for (name, truth) in &self.truths {
            let context = Context { storage: storage.clone(), cache: BlockCache::new(0) };
            let mut bytes = vec![0xee; truth.len()];
            let disk = vhd::open(&context, &path(name), Some(Arc::new(Kept)));
            let read = disk.map_err(disk::Error::from).and_then(|disk| {
                assert_eq!(disk.size(), truth.len() as u64, "{when}: {name}");
                self.check_digests(&disk, truth, false, &format!("{when}: {name}"));
                disk.read_at(0, &mut bytes)
            });
            assert!(read.is_ok(), "{when}: {name}: {}", read.unwrap_err());
            assert!(bytes == *truth, "{when}: {name} reads wrong");
        }
    }

    /// What was merged can be merged again.
    fn merge_the_rest(&mut self, when: &str) {
        let chain: Vec<String> = self.truths.keys().cloned().collect();
        if chain.len() > 1 {
            let storage: Arc<dyn WritableStorage> = self.memory.clone();
            merge(&storage, &chain).unwrap_or_else(|error| panic!("{when}, the rest: {error}"));
            self.truths.retain(|name, _| Some(name) == chain.last());
            self.check_end(&self.memory, &format!("{when}, all merged"));
        }
    }

    /// Nothing but what is kept is there.
    fn check_end(&self, storage: &Arc<MemoryStorage>, when: &str) {
        self.check(storage, when);
        let list = |folder: &str| -> Vec<String> {
            let mut names: Vec<_> = storage.list(&path(folder)).unwrap().into_iter().map(|entry| entry.name).collect();
            names.sort();
            names
        };
        let mut found = list("");
        // Empty, it stays.
        let data = if found.last().is_some_and(|name| name == "data") { list("data") } else { Vec::new() };
        // The digests go with their files, or are lost.
        let digests: Vec<_> = self.truths.keys().map(|name| digests_name(name)).collect();
        found.retain(|name| name != "data" && !digests.contains(name));
        assert_eq!(found, self.truths.keys().cloned().collect::<Vec<_>>(), "{when}");
        let aliases = found.iter().filter(|name| name.ends_with(".alias.vhd")).count();
        assert_eq!(data.len(), aliases, "{when}: {data:?}");
        for folder in data {
            let names = list(&format!("data/{folder}"));
            let is_known = |name: &String| {
                [DIGESTS, "bat", "blocks", "chunk-filters.json", "footer", "header"].contains(&name.as_str())
            };
            assert!(names.iter().all(is_known), "{when}: {names:?}");
        }
    }
}

/// A backup whose metadata stays.
struct Kept;

impl Liveness for Kept {
    fn is_alive(&self) -> storage::Result<bool> {
        Ok(true)
    }
}

fn path(text: &str) -> ObjectPath {
    ObjectPath::new(text).unwrap()
}

fn control<T>(is_stopped: &(dyn Fn() -> bool + Sync), run: impl FnOnce(&Control) -> vhd::Result<T>) -> vhd::Result<T> {
    run(&Control { threads: 1, barrier: &|| Ok(()), moved: &|_| {}, is_stopped })
}

/// Goes on with what has begun, or begins, and goes to the end; as a caller would who finds the folder so.
fn merge(storage: &Arc<dyn WritableStorage>, chain: &[String]) -> vhd::Result<()> {
    let (reader, root) = (storage.clone().reader(), ObjectPath::root());
    let states = Merge::unfinished(&*reader, &root)?;
    if let Some(state) = states.first() {
        let mut begun = Merge::resume(storage, state)?;
        let outcome = control(&|| false, |control| {
            let outcome = begun.run(control)?;
            begun.forget()?;
            Ok(outcome)
        })?;
        if outcome == Outcome::Undone {
            return merge(storage, chain);
        }
        assert_eq!(outcome, Outcome::Merged);
        return Ok(());
    }
    let mut todo = match reader.stat(&path(&chain[0])) {
        Ok(_) => Merge::new(storage, &root, chain)?,
        Err(error) if error.kind() == storage::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error.into()),
    };
    control(&|| false, |control| {
        assert_eq!(todo.run(control)?, Outcome::Merged);
        todo.forget()
    })
}

/// The storage until `count` changes were made; then nothing works any more. Of the last one only a half may be done.
fn until(memory: &Arc<MemoryStorage>, count: u64, is_half: bool) -> (Arc<dyn WritableStorage>, Arc<AtomicBool>) {
    let faulty = FaultyStorage::new(memory.clone());
    let (done, is_cut) = (AtomicU64::new(0), Arc::new(AtomicBool::new(false)));
    let cut = is_cut.clone();
    faulty.set_rule(move |operation, _| {
        if cut.load(Ordering::SeqCst) {
            return Some(Fault::Errno(GONE));
        }
        if operation.is_change() && done.fetch_add(1, Ordering::SeqCst) == count {
            cut.store(true, Ordering::SeqCst);
            return Some(if is_half { Fault::Half(GONE) } else { Fault::Errno(GONE) });
        }
        None
    });
    (Arc::new(faulty), is_cut)
}

/// The storage until a state file was removed; then nothing works any more.
fn until_forgotten(memory: &Arc<MemoryStorage>) -> Arc<dyn WritableStorage> {
    let faulty = FaultyStorage::new(memory.clone());
    let is_cut = AtomicBool::new(false);
    faulty.set_rule(move |operation, path| {
        let is_state = path.file_name().ends_with("merge.json");
        is_cut.fetch_or(operation == Operation::Remove && is_state, Ordering::SeqCst).then_some(Fault::Errno(GONE))
    });
    Arc::new(faulty)
}

/// Cuts the power at every point of a merge.
fn cut_everywhere(seed: u64) {
    let mut random = Random::new(seed.wrapping_add(1 << 32));
    for count in 0.. {
        let when = format!("seed {seed}, cut after {count} changes");
        // The same chain again and again.
        let mut world = World::new(&mut Random::new(seed));
        // Some read before, some not: what was read once is remembered.
        let opened = world.open_all();
        if count % 2 == 0 {
            World::check_opened(&opened, &when);
        }
        let (storage, is_cut) = until(&world.memory, count, random.below(2) == 0);
        let merged = merge(&storage, &world.chain);
        World::check_opened(&opened, &when);
        if !is_cut.load(Ordering::SeqCst) {
            merged.unwrap_or_else(|error| panic!("{when}: {error}"));
            world.check_end(&world.memory, &when);
            world.check_all_digests(&world.memory, &when);
            assert!(count > 10, "{when}: a merge takes more steps");
            drop(opened);
            return world.merge_the_rest(&when);
        }
        // Killed, and nothing lost.
        world.check(&world.memory, &when);
        for round in 0..3 {
            let mut loss = || match round {
                0 => Loss::All,
                1 => Loss::None,
                _ => [Loss::All, Loss::Half, Loss::None][random.below(3)],
            };
            let mut left = Arc::new(world.memory.after_power_cut(&mut loss));
            world.check(&left, &format!("{when}, round {round}"));
            if random.below(3) == 0 {
                let (storage, _) = until(&left, random.below(20) as u64, false);
                let _ = merge(&storage, &world.chain);
                left = Arc::new(left.after_power_cut(|| [Loss::All, Loss::Half, Loss::None][random.below(3)]));
                world.check(&left, &format!("{when}, round {round}, cut again"));
            }
            let storage: Arc<dyn WritableStorage> = left.clone();
            merge(&storage, &world.chain).unwrap_or_else(|error| panic!("{when}, round {round}: {error}"));
            world.check_end(&left, &format!("{when}, round {round}, in the end"));
        }
        // What either of two runs removed does not come back once nothing says that it is to go.
        let _ = merge(&until_forgotten(&world.memory), &world.chain);
        let left = Arc::new(world.memory.after_power_cut(|| [Loss::All, Loss::Half, Loss::None][random.below(3)]));
        let storage: Arc<dyn WritableStorage> = left.clone();
        merge(&storage, &world.chain).unwrap_or_else(|error| panic!("{when}, cut when all was done: {error}"));
        world.check_end(&left, &format!("{when}, cut when all was done"));
        let storage: Arc<dyn WritableStorage> = world.memory.clone();
        merge(&storage, &world.chain).unwrap_or_else(|error| panic!("{when}, gone on: {error}"));
        World::check_opened(&opened, &format!("{when}, gone on"));
        world.check_end(&world.memory, &format!("{when}, gone on"));
    }
}

#[test]
fn a_merge_that_is_cut_off_anywhere_loses_nothing_and_is_finished_by_the_next() {
    seeds::each(SEEDS, 4, cut_everywhere);
}

#[test]
fn what_nobody_synced_before_is_durable_once_a_merge_has_begun() {
    for kind in KINDS {
        let memory = Arc::new(MemoryStorage::with_power_cuts());
        let chain = [name(0, kind), name(1, kind), name(2, kind)];
        for (number, name) in chain.iter().enumerate() {
            let byte = u8::try_from(number + 1).unwrap();
            let mut image = Image::new(number as u128 + 1, 3 * FLAT_BLOCK as u64, &[]).stored(kind);
            image.block = FLAT_BLOCK;
            if number > 0 {
                image = image.child_of(number as u128, &chain[number - 1]);
            }
            // Each hides a block of the one before.
            image.blocks = (number..3).map(|block| (u32::try_from(block).unwrap(), vec![byte; FLAT_BLOCK])).collect();
            match kind {
                Kind::Flat => memory.put(name, file(&image, &BTreeMap::new(), &mut Random::new(0))).unwrap(),
                _ => image.put(&memory, name.strip_suffix(".alias.vhd").unwrap()),
            }
            if number == 0 {
                memory.sync_tree(&ObjectPath::root(), &memory.mark().unwrap()).unwrap();
            }
        }
        let truth = [1, 2, 3].map(|byte| [byte; FLAT_BLOCK]).concat();
        let storage: Arc<dyn WritableStorage> = memory.clone();
        let mut begun = Merge::new(&storage, &ObjectPath::root(), &chain).unwrap();
        assert_eq!(control(&|| true, |control| begun.run(control)).unwrap(), Outcome::Stopped, "{kind:?}");
        let left = Arc::new(memory.after_power_cut(|| Loss::All));
        let check = |when: &str| {
            let context = Context { storage: left.clone(), cache: BlockCache::new(0) };
            let disk = vhd::open(&context, &path(&chain[2]), Some(Arc::new(Kept))).unwrap();
            let mut bytes = vec![0xee; truth.len()];
            disk.read_at(0, &mut bytes).unwrap();
            assert!(bytes == truth, "{kind:?}, {when}");
        };
        check("cut");
        let storage: Arc<dyn WritableStorage> = left.clone();
        merge(&storage, &chain).unwrap();
        check("merged");
    }
}

#[test]
fn what_a_smaller_disk_hides_stays_hidden_when_it_is_merged_into_a_larger_one() {
    for kind in KINDS {
        // The sizes of three disks, of which the younger two are merged; sectors.
        for sizes in [[16, 8, 16], [16, 8, 12], [16, 5, 16], [13, 8, 16], [8, 8, 16], [16, 16, 8], [4, 8, 7]] {
            let memory = Arc::new(MemoryStorage::with_power_cuts());
            let mut truth = Vec::new();
            for (number, sectors) in sizes.into_iter().enumerate() {
                let size = sectors * SECTOR;
                let blocks = u32::try_from(size.div_ceil(FLAT_BLOCK)).unwrap();
                let mut image = Image::new(number as u128 + 1, size as u64, &[]).stored(kind);
                image.block = FLAT_BLOCK;
                if number > 0 {
                    image = image.child_of(number as u128, &name(number - 1, kind));
                }
                truth.resize(size, 0);
                // The oldest holds all, the others one block each.
                for block in if number == 0 { 0..blocks } else { blocks - 1..blocks } {
                    let bytes = vec![u8::try_from(number + 1).unwrap(); FLAT_BLOCK];
                    let start = block as usize * FLAT_BLOCK;
                    let end = size.min(start + FLAT_BLOCK);
                    truth[start..end].copy_from_slice(&bytes[..end - start]);
                    image.blocks.push((block, bytes));
                }
                let name = name(number, kind);
                image.put(&memory, name.strip_suffix(".vhd").map(|name| name.trim_end_matches(".alias")).unwrap());
            }
            let storage: Arc<dyn WritableStorage> = memory.clone();
            merge(&storage, &[name(1, kind), name(2, kind)]).unwrap();
            let mut bytes = vec![0xee; truth.len()];
            builder::open(&memory, &name(2, kind)).unwrap().read_at(0, &mut bytes).unwrap();
            assert!(bytes == truth, "{kind:?}, {sizes:?}");
        }
    }
}
