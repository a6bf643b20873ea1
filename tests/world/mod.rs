//! A VM whose backups are forgotten: what they read as, which are kept, and what is left in the end.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use serde_json::{Value, json};
use storage::{Existing, MemoryStorage, ObjectPath, Storage, WritableStorage, create_directories};
use uuid::Uuid;
use vhd::{BlockIndex, BlockSize, Digest, Filter, Format, NewLayer, WholeBlock, create_layer, write_alias};
use xofs::merge::{self, Forgotten, Watch};
use xofs::repository::{Backup, OpenOptions, Repository, VmId, VmLock};

use crate::seeds::Random;

pub const VM: &str = "0a1b2c3d-0000-4000-8000-000000000001";
pub const JOB: &str = "0a1b2c3d-0000-4000-8000-00000000000b";
pub const BLOCK: usize = 512;
/// The time of the full backup.
pub const FULL: &str = "20260731T020003Z";

pub fn path(text: &str) -> ObjectPath {
    ObjectPath::new(text).unwrap()
}

pub fn time(number: usize) -> String {
    format!("2026080{}T020003Z", number + 1)
}

/// A VM with backups of two disks each: what these read as, by the time of the backup; and with a full backup.
pub struct World {
    pub memory: Arc<MemoryStorage>,
    pub truths: BTreeMap<String, Vec<Vec<u8>>>,
    /// By disk the backups of which it is built on nothing, by number.
    pub keys: [BTreeSet<usize>; 2],
    pub kept: BTreeSet<String>,
    /// Whether digests were written, or read, in vain: an error there keeps nothing else from being done.
    pub may_lose_digests: bool,
}

impl World {
    pub fn new(seed: u64) -> Self {
        let random = &mut Random::new(seed);
        let memory = Arc::new(MemoryStorage::with_power_cuts());
        let storage: Arc<dyn WritableStorage> = memory.clone();
        let backups = 2 + random.below(4);
        let any_filter = |random: &mut Random| [Filter::None, Filter::Gzip, Filter::Brotli][random.below(3)];
        let (mut filter, is_mixed) = (any_filter(random), random.below(3) == 0);
        let folder = format!("xo-vm-backups/{VM}");
        let mut disks = vec![vec![0; BLOCK * 6]; 2];
        let mut uuids: Vec<Option<Uuid>> = vec![None; 2];
        let mut world = Self {
            memory,
            truths: BTreeMap::new(),
            keys: [BTreeSet::new(), BTreeSet::new()],
            kept: BTreeSet::new(),
            may_lose_digests: false,
        };
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
                // Now and then a chain ends, as that of a disk that grew does.
                let parent = uuids[disk].filter(|_| random.below(4) > 0);
                if parent.is_none() {
                    world.keys[disk].insert(number);
                }
                if let Some(parent) = parent {
                    layer = layer.child_of(parent, &format!("{}.alias.vhd", time(number - 1))).unwrap();
                }
                let data = lineage.join("data").unwrap().join(&format!("{}.vhd", time(number))).unwrap();
                let sink =
                    create_layer(storage.clone(), Format::Exploded(filter), data.clone(), layer.clone()).unwrap();
                for (block, bytes) in content.chunks_mut(BLOCK).enumerate() {
                    let is_changed = random.below(2) == 0;
                    if is_changed {
                        bytes.fill(u8::try_from(1 + number * 16 + block).unwrap());
                    }
                    if is_changed || parent.is_none() && bytes[0] != 0 {
                        let index = BlockIndex(u32::try_from(block).unwrap());
                        let whole = Arc::new(WholeBlock::copy_of(bytes, layer.block_size()).unwrap());
                        let block = layer.encode(Format::Exploded(filter), index, &whole).unwrap();
                        sink.store(&block.with_digest(Digest::of(bytes, layer.block_size()))).unwrap();
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
        let metadata = json!({
            "mode": "full", "jobId": JOB, "scheduleId": "s", "timestamp": 1_785_463_203_000_u64, "xva": format!("./{FULL}.xva"),
            "vm": { "name_label": "web01" }, "size": 3,
        });
        world.memory.put(&format!("{folder}/{FULL}.json"), metadata.to_string()).unwrap();
        world.memory.put(&format!("{folder}/{FULL}.xva"), "xva").unwrap();
        world.memory.put(&format!("{folder}/{FULL}.xva.checksum"), "$1$$0").unwrap();
        if random.below(2) == 0 {
            world.kept.insert(FULL.to_owned());
        }
        storage.sync_tree(&ObjectPath::root(), &storage.mark().unwrap()).unwrap();
        world
    }

    /// Every backup that is listed reads right, and none that is kept is missing; of digests those that are valid are right,
    /// and in the end, all are.
    pub fn check(&self, storage: &Arc<MemoryStorage>, when: &str, is_end: bool) -> BTreeSet<String> {
        let options = OpenOptions { key: None, cache_bytes: 0 };
        let repository = Repository::with_storage(storage.clone(), options).unwrap();
        let backups = repository.backups(&VmId::new(VM).unwrap()).unwrap_or_else(|error| panic!("{when}: {error}"));
        let full = format!("xo-vm-backups/{VM}/{FULL}");
        for backup in backups.iter() {
            if backup.time.stored() == FULL {
                for file in ["xva", "xva.checksum"] {
                    assert!(storage.stat(&path(&format!("{full}.{file}"))).is_ok(), "{when}: {file}");
                }
                continue;
            }
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
                    assert!(
                        known.is_some() || self.may_lose_digests || !is_end,
                        "{when}: {}: the digest of {index:?} is lost",
                        backup.time
                    );
                }
            }
        }
        let listed: BTreeSet<String> = backups.iter().map(|backup| backup.time.stored()).collect();
        assert!(self.kept.is_subset(&listed), "{when}: {listed:?}");
        listed
    }

    /// Forgets what is not kept; a lock that a dead machine left behind is gone by then.
    pub fn forget(&self, storage: Arc<dyn WritableStorage>) -> xofs::repository::Result<Forgotten> {
        let lock = VmLock::take(storage, &VmId::new(VM).unwrap(), Duration::ZERO, |_| true)?;
        // At times both disks at a time.
        let jobs = 1 + self.truths.len() % 2;
        let watch = Watch { threads: 1, jobs, planned: &|_| {}, moved: &|_| {}, is_stopped: &|| false };
        let goes = |backup: &&Arc<Backup>| !self.kept.contains(&backup.time.stored());
        merge::forget(&lock, |backups| backups.iter().filter(goes).cloned().collect(), &watch)
    }

    pub fn finish(&self, storage: &Arc<MemoryStorage>, when: &str) {
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
        assert_eq!(names("xo-vm-backups"), [VM], "{when}");
        let folder = format!("xo-vm-backups/{VM}");
        let mut files: Vec<_> =
            self.kept.iter().map(|time| format!("{time}.json")).chain(["vdis".to_owned()]).collect();
        if self.kept.contains(FULL) {
            files.splice(1..1, ["xva", "xva.checksum"].map(|file| format!("{FULL}.{file}")));
        }
        assert_eq!(names(&folder), files, "{when}");
        let kept: BTreeSet<&String> = self.kept.iter().filter(|time| *time != FULL).collect();
        for disk in names(&format!("{folder}/vdis/{JOB}")) {
            let lineage = format!("{folder}/vdis/{JOB}/{disk}");
            let aliases: Vec<_> = kept.iter().map(|time| format!("{time}.alias.vhd")).collect();
            assert_eq!(names(&lineage), [aliases, vec!["data".to_owned()]].concat(), "{when}");
            assert_eq!(names(&format!("{lineage}/data")).len(), kept.len(), "{when}");
        }
        let times: Vec<String> = self.truths.keys().cloned().collect();
        for stored in kept {
            let metadata = storage.read(&path(&format!("{folder}/{stored}.json")), 1 << 20).unwrap();
            let metadata: Value = serde_json::from_slice(&metadata).unwrap();
            // What was not merged into says what it said.
            let Some(flags) = metadata["isVhdDifferencing"].as_object() else { continue };
            let number = times.iter().position(|time| time == stored).unwrap();
            for (keys, (_, flag)) in self.keys.iter().zip(flags) {
                let key = *keys.range(..=number).next_back().unwrap();
                let is_built_on_one = times[key..number].iter().any(|time| self.kept.contains(time));
                assert_eq!(*flag, is_built_on_one, "{when}: {metadata}");
            }
        }
    }
}
