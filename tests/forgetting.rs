//! Forgetting backups: whenever it is cut off, every backup that is listed reads right, the kept ones are all listed, and the next
//! run ends where an undisturbed one ends, with nothing left over.

#[path = "../vhd/tests/seeds/mod.rs"]
mod seeds;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use seeds::Random;
use serde_json::{Value, json};
use storage::{
    Existing, Fault, FaultyStorage, Loss, MemoryStorage, ObjectPath, Storage, WritableStorage, create_directories,
};
use uuid::Uuid;
use vhd::{BlockIndex, BlockSize, Digest, Filter, Format, NewLayer, create_layer, write_alias};
use xofs::merge::{self, Forgotten, Watch};
use xofs::repository::{Backup, ErrorKind, OpenOptions, Repository, VmId, VmLock};

const VM: &str = "0a1b2c3d-0000-4000-8000-000000000001";
const JOB: &str = "0a1b2c3d-0000-4000-8000-00000000000b";
const BLOCK: usize = 512;
/// How many are tried where `XOFS_SEEDS` does not say it.
const SEEDS: u64 = 6;
/// What EIO is for the tests: the machine is gone.
const GONE: i32 = 5;

fn path(text: &str) -> ObjectPath {
    ObjectPath::new(text).unwrap()
}

fn time(number: usize) -> String {
    format!("2026080{}T020003Z", number + 1)
}

/// A VM with backups of two disks each: what these read as, by the time of the backup.
struct World {
    memory: Arc<MemoryStorage>,
    truths: BTreeMap<String, Vec<Vec<u8>>>,
    kept: BTreeSet<String>,
}

impl World {
    fn new(seed: u64) -> Self {
        let random = &mut Random::new(seed);
        let memory = Arc::new(MemoryStorage::with_power_cuts());
        let storage: Arc<dyn WritableStorage> = memory.clone();
        let backups = 2 + random.below(4);
        let any_filter = |random: &mut Random| [Filter::None, Filter::Gzip, Filter::Brotli][random.below(3)];
        let (mut filter, is_mixed) = (any_filter(random), random.below(3) == 0);
        let folder = format!("xo-vm-backups/{VM}");
        let mut disks = vec![vec![0; BLOCK * 6]; 2];
        let mut uuids: Vec<Option<Uuid>> = vec![None; 2];
        let mut world = Self { memory, truths: BTreeMap::new(), kept: BTreeSet::new() };
        for number in 0..backups {
            if is_mixed {
                filter = any_filter(random);
            }
            let mut vhds = serde_json::Map::new();
            let mut vdis = serde_json::Map::new();
            for (disk, content) in disks.iter_mut().enumerate() {
                let lineage = path(&format!("{folder}/vdis/{JOB}/0a1b2c3d-0000-4000-8000-0000000000d{disk}"));
                create_directories(&*storage, &lineage.join("data").unwrap()).unwrap();
                let uuid = Uuid::from_u128(0x1111_1111_1111_4111_8111_0000_0000_0000 + (number * 2 + disk) as u128);
                let mut layer = NewLayer::new(uuid, content.len() as u64, 1_785_549_603).unwrap();
                layer = layer.with_block_size(BlockSize::new(u32::try_from(BLOCK).unwrap()).unwrap()).unwrap();
                if let Some(parent) = uuids[disk] {
                    layer = layer.child_of(parent, &format!("{}.alias.vhd", time(number - 1))).unwrap();
                }
                let data = lineage.join("data").unwrap().join(&format!("{}.vhd", time(number))).unwrap();
                let sink =
                    create_layer(storage.clone(), Format::Exploded(filter), data.clone(), layer.clone()).unwrap();
                for block in 0..content.len() / BLOCK {
                    if random.below(2) == 0 {
                        let bytes = vec![u8::try_from(1 + number * 16 + block).unwrap(); BLOCK];
                        content[block * BLOCK..][..BLOCK].copy_from_slice(&bytes);
                        let index = BlockIndex(u32::try_from(block).unwrap());
                        let block = layer.encode(Format::Exploded(filter), index, &bytes).unwrap();
                        sink.store(&block.with_digest(Digest::of(&bytes, layer.block_size()))).unwrap();
                    }
                }
                sink.finish().unwrap();
                let alias = lineage.join(&format!("{}.alias.vhd", time(number))).unwrap();
                write_alias(&*storage, &alias, &data).unwrap();
                uuids[disk] = Some(uuid);
                let reference = format!("OpaqueRef:{disk}");
                vhds.insert(reference.clone(), Value::from(&alias.as_str()[folder.len() + 1..]));
                vdis.insert(reference, json!({ "uuid": uuid.to_string() }));
            }
            let metadata = json!({
                "mode": "delta", "jobId": JOB, "scheduleId": "s", "timestamp": 1_785_549_603_000_u64 + number as u64,
                "vhds": vhds, "vdis": vdis, "vm": { "name_label": "web01" }, "size": 1,
            });
            let name = path(&format!("{folder}/{}.json", time(number)));
            storage.write(&name, metadata.to_string().as_bytes(), Existing::Refuse).unwrap();
            world.truths.insert(time(number), disks.clone());
            if number + 1 == backups || random.below(3) == 0 {
                world.kept.insert(time(number));
            }
        }
        storage.sync_tree(&ObjectPath::root()).unwrap();
        world
    }

    /// Every backup that is listed reads right, and none that is kept is missing; of digests those that are valid are right,
    /// and in the end, all are.
    fn check(&self, storage: &Arc<MemoryStorage>, when: &str, is_end: bool) -> BTreeSet<String> {
        let options = OpenOptions { key: None, cache_bytes: 0 };
        let repository = Repository::with_storage(storage.clone(), options).unwrap();
        let backups = repository.backups(&VmId::new(VM).unwrap()).unwrap_or_else(|error| panic!("{when}: {error}"));
        for backup in backups.iter() {
            assert_eq!(backup.problem, None, "{when}");
            for (number, truth) in self.truths[&backup.time.stored()].iter().enumerate() {
                let disk = &backup.disks[number];
                let opened = repository.open_disk(backup, disk);
                let opened = opened.unwrap_or_else(|error| panic!("{when}: {}: {error}", backup.time));
                let mut bytes = vec![0xee; truth.len()];
                opened.read_at(0, &mut bytes).unwrap_or_else(|error| panic!("{when}: {}: {error}", backup.time));
                assert!(bytes == *truth, "{when}: {} reads wrong", backup.time);
                let digests = repository.digests(backup, disk).unwrap().unwrap();
                let block_size = digests.block_size();
                for (index, block) in (0..).map(BlockIndex).zip(truth.chunks(BLOCK)) {
                    let known = digests.of_read(index);
                    let is_right = known.is_none_or(|known| known == Digest::of(block, block_size));
                    assert!(is_right, "{when}: {}: {index:?} has another digest", backup.time);
                    // Ours are taken along, whatever cuts a merge off, until it is finished.
                    assert!(known.is_some() || !is_end, "{when}: {}: the digest of {index:?} is lost", backup.time);
                }
            }
        }
        let listed: BTreeSet<String> = backups.iter().map(|backup| backup.time.stored()).collect();
        assert!(self.kept.is_subset(&listed), "{when}: {listed:?}");
        listed
    }

    /// Forgets what is not kept; a lock that a dead machine left behind is gone by then.
    fn forget(&self, storage: Arc<dyn WritableStorage>) -> xofs::repository::Result<Forgotten> {
        let lock = VmLock::take(storage, &VmId::new(VM).unwrap(), Duration::ZERO, |_| {})?;
        // At times both disks at a time.
        let jobs = 1 + self.truths.len() % 2;
        let watch = Watch { threads: 1, jobs, planned: &|_| {}, moved: &|_| {}, is_stopped: &|| false };
        let goes = |backup: &&Arc<Backup>| !self.kept.contains(&backup.time.stored());
        merge::forget(&lock, |backups| backups.iter().filter(goes).cloned().collect(), &watch)
    }

    fn finish(&self, storage: &Arc<MemoryStorage>, when: &str) {
        let _ = storage.remove(&format!("xo-vm-backups/{VM}.lock"));
        let done = self.forget(storage.clone()).unwrap_or_else(|error| panic!("{when}: {error}"));
        assert!(done.refused.is_empty() && done.problems.is_empty() && !done.is_stopped, "{when}: {done:?}");
        assert_eq!(self.check(storage, when, true), self.kept, "{when}");
        self.check_nothing_is_left_over(storage, when);
    }

    fn check_nothing_is_left_over(&self, storage: &Arc<MemoryStorage>, when: &str) {
        let names = |folder: &str| -> Vec<String> {
            let mut names: Vec<_> = storage.list(&path(folder)).unwrap().into_iter().map(|entry| entry.name).collect();
            names.sort();
            names
        };
        // A lock that was being released when the power went leaves an empty hidden folder, which harms nobody.
        let is_of_lock = |name: &String| name.starts_with(&format!(".{VM}.lock."));
        let vms: Vec<_> = names("xo-vm-backups").into_iter().filter(|name| !is_of_lock(name)).collect();
        assert_eq!(vms, [VM], "{when}");
        let folder = format!("xo-vm-backups/{VM}");
        let metadata: Vec<_> = self.kept.iter().map(|time| format!("{time}.json")).chain(["vdis".to_owned()]).collect();
        assert_eq!(names(&folder), metadata, "{when}");
        for disk in names(&format!("{folder}/vdis/{JOB}")) {
            let lineage = format!("{folder}/vdis/{JOB}/{disk}");
            let aliases: Vec<_> = self.kept.iter().map(|time| format!("{time}.alias.vhd")).collect();
            assert_eq!(names(&lineage), [aliases, vec!["data".to_owned()]].concat(), "{when}");
            assert_eq!(names(&format!("{lineage}/data")).len(), self.kept.len(), "{when}");
        }
        for time in &self.kept {
            let metadata = storage.read(&path(&format!("{folder}/{time}.json")), 1 << 20).unwrap();
            let metadata: Value = serde_json::from_slice(&metadata).unwrap();
            let is_first = Some(time) == self.kept.first();
            let flags: Vec<_> =
                metadata["isVhdDifferencing"].as_object().into_iter().flatten().map(|(_, it)| it).collect();
            // What was not merged into says what it said.
            assert!(flags.iter().all(|flag| **flag == Value::Bool(!is_first)), "{when}: {metadata}");
        }
    }
}

/// The storage until `count` changes were made; then nothing works any more. Signs of life of the lock do not count.
fn until(memory: &Arc<MemoryStorage>, count: u64) -> (Arc<dyn WritableStorage>, Arc<AtomicBool>) {
    let faulty = FaultyStorage::new(memory.clone());
    let (done, is_cut) = (AtomicU64::new(0), Arc::new(AtomicBool::new(false)));
    let cut = is_cut.clone();
    faulty.set_rule(move |operation, path| {
        let is_counted = operation.is_change() && !path.as_str().ends_with(".lock");
        if is_counted && done.fetch_add(1, Ordering::SeqCst) == count {
            cut.store(true, Ordering::SeqCst);
            return Some(Fault::Half(GONE));
        }
        cut.load(Ordering::SeqCst).then_some(Fault::Errno(GONE))
    });
    (Arc::new(faulty), is_cut)
}

fn cut_everywhere(seed: u64) {
    let mut random = Random::new(seed.wrapping_add(1 << 32));
    for count in 0.. {
        let world = World::new(seed);
        let when = format!("seed {seed}, cut after {count} changes");
        let (storage, is_cut) = until(&world.memory, count);
        let forgotten = world.forget(storage);
        if !is_cut.load(Ordering::SeqCst) {
            let forgotten = forgotten.unwrap_or_else(|error| panic!("{when}: {error}"));
            assert_eq!(forgotten.backups.len(), world.truths.len() - world.kept.len(), "{when}");
            assert_eq!(world.check(&world.memory, &when, true), world.kept, "{when}");
            return;
        }
        world.check(&world.memory, &when, false);
        for loss in [Some(Loss::All), Some(Loss::None), None] {
            let when = format!("{when}, {loss:?}");
            let mut losses = || loss.unwrap_or_else(|| [Loss::All, Loss::Half, Loss::None][random.below(3)]);
            let left = Arc::new(world.memory.after_power_cut(&mut losses));
            world.check(&left, &when, false);
            world.finish(&left, &format!("{when}, in the end"));
        }
        world.finish(&world.memory, &format!("{when}, gone on"));
    }
}

#[test]
fn what_is_cut_off_anywhere_loses_no_backup_and_is_finished_by_the_next_run() {
    seeds::each(SEEDS, 2, cut_everywhere);
}

#[test]
fn nothing_goes_while_a_backup_of_the_vm_cannot_be_read() {
    let world = World::new(1);
    for (name, bytes) in
        [("20260731T020003Z.json", "{\"mode\":"), ("20261399T020003Z.json", "{}"), ("other.json", "{}")]
    {
        let metadata = format!("xo-vm-backups/{VM}/{name}");
        world.memory.put(&metadata, bytes).unwrap();
        let error = world.forget(world.memory.clone()).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Damaged, "{name}: {error}");
        assert!(error.to_string().contains(name), "{error}");
        world.memory.remove(&metadata).unwrap();
    }
    world.finish(&world.memory, "once it is gone");
}

#[test]
fn a_backup_stays_that_another_chain_is_built_on() {
    let mut world = World::new(3);
    world.kept = world.truths.keys().next_back().into_iter().cloned().collect();
    let lineage = format!("xo-vm-backups/{VM}/vdis/{JOB}/0a1b2c3d-0000-4000-8000-0000000000d1");
    let storage: Arc<dyn WritableStorage> = world.memory.clone();
    // A second child of the first backup's disk, which no metadata names.
    let data = path(&format!("{lineage}/data/branch.vhd"));
    let uuid = Uuid::from_u128(0x1111_1111_1111_4111_8111_ffff_ffff_ffff);
    let parent = Uuid::from_u128(0x1111_1111_1111_4111_8111_0000_0000_0001);
    let layer = NewLayer::new(uuid, BLOCK as u64 * 6, 0).unwrap();
    let layer = layer.with_block_size(BlockSize::new(u32::try_from(BLOCK).unwrap()).unwrap()).unwrap();
    let layer = layer.child_of(parent, &format!("{}.alias.vhd", time(0))).unwrap();
    create_layer(storage.clone(), Format::Exploded(Filter::None), data.clone(), layer).unwrap().finish().unwrap();
    write_alias(&*storage, &path(&format!("{lineage}/branch.alias.vhd")), &data).unwrap();
    let done = world.forget(storage).unwrap();
    let refused: Vec<String> = done.refused.iter().map(|(time, _)| time.stored()).collect();
    assert_eq!(refused.len(), world.truths.len() - 1, "{done:?}");
    assert!(done.refused.iter().all(|(_, reason)| reason.contains("is built on it, too")), "{done:?}");
    assert_eq!(done.backups, []);
    assert_eq!(world.check(&world.memory, "refused", true).len(), world.truths.len());
}
