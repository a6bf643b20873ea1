//! Repairs: whenever applying or undoing is cut off, every good backup reads right, each thing is in its place or in the
//! trash, and who goes on ends where an undisturbed run ends.
//!
//! Each seed is a VM with some of all faults. `XOFS_SEEDS=100` tries more of them, `XOFS_SEED=17` that one alone.

mod cut;
#[path = "../vhd/tests/seeds/mod.rs"]
mod seeds;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use cut::{GONE, until};
use seeds::Random;
use serde_json::{Value, json};
use storage::{
    Fault, FaultyStorage, Kind, Loss, MemoryStorage, ObjectPath, Operation, Storage, WritableStorage,
    create_directories, remove_tree,
};
use uuid::Uuid;
use vhd::{BlockIndex, BlockSize, Filter, Format, NewLayer, WholeBlock, create_layer, write_alias};
use xofs::doctor::{self, Act, Applied, Include, Kind as Sort, Plan, VmPlan};
use xofs::merge::Watch;
use xofs::repository::{ErrorKind, OpenOptions, Repository, Vm, VmId, VmLock};

const VM: &str = "0a1b2c3d-0000-4000-8000-000000000001";
const FOLDER: &str = "xo-vm-backups/0a1b2c3d-0000-4000-8000-000000000001";
/// The disk with the chain that is good, and the one of which parts are missing.
const GOOD: &str = "vdis/job/0a1b2c3d-0000-4000-8000-0000000000d0";
const LOST: &str = "vdis/job/0a1b2c3d-0000-4000-8000-0000000000d1";
const BLOCK: usize = 512;
/// How many are tried where `XOFS_SEEDS` does not say it.
const SEEDS: u64 = 1;
const ALL: Include = Include { broken_backups: true };

fn path(text: &str) -> ObjectPath {
    ObjectPath::new(text).unwrap()
}

fn time(number: usize) -> String {
    format!("2026080{}T020003Z", number + 1)
}

fn uuid(number: usize) -> Uuid {
    Uuid::from_u128(0x1111_1111_1111_4111_8111_0000_0000_0000 + number as u128)
}

fn vm() -> Vm {
    Vm { id: VmId::new(VM).unwrap(), name: "web01".to_owned() }
}

/// A VM: what its good backups read as, by time.
struct World {
    memory: Arc<MemoryStorage>,
    truths: BTreeMap<String, Vec<u8>>,
}

impl World {
    /// Makes a VM with three good backups and no fault.
    fn sound() -> Self {
        let mut world = Self { memory: Arc::new(MemoryStorage::with_power_cuts()), truths: BTreeMap::new() };
        let mut content = vec![0; BLOCK * 4];
        for number in 0..3_usize {
            let parent = number.checked_sub(1).map(|parent| (uuid(parent), format!("{}.alias.vhd", time(parent))));
            let block = u8::try_from(number + 1).unwrap();
            content[number * BLOCK..][..BLOCK].fill(block);
            world.image(GOOD, &time(number), uuid(number), parent, number, block);
            world.backup(number, GOOD);
            world.truths.insert(time(number), content.clone());
        }
        world.memory.sync_tree(&ObjectPath::root(), &world.memory.mark().unwrap()).unwrap();
        world
    }

    /// Makes an exploded VHD of one block behind an alias.
    fn image(&self, disk: &str, name: &str, uuid: Uuid, parent: Option<(Uuid, String)>, block: usize, fill: u8) {
        let storage: Arc<dyn WritableStorage> = self.memory.clone();
        let lineage = path(&format!("{FOLDER}/{disk}"));
        create_directories(&*storage, &lineage.join("data").unwrap()).unwrap();
        let mut layer = NewLayer::new(uuid, BLOCK as u64 * 4, 1_785_549_603).unwrap();
        layer = layer.with_block_size(BlockSize::new(u32::try_from(BLOCK).unwrap()).unwrap()).unwrap();
        if let Some((parent, name)) = parent {
            layer = layer.child_of(parent, &name).unwrap();
        }
        let data = lineage.join("data").unwrap().join(&format!("{name}.vhd")).unwrap();
        let format = Format::Exploded(Filter::Gzip);
        let sink = create_layer(storage.clone(), format, data.clone(), layer.clone()).unwrap();
        let index = BlockIndex(u32::try_from(block).unwrap());
        let whole = Arc::new(WholeBlock::copy_of(&vec![fill; BLOCK], layer.block_size()).unwrap());
        sink.store(&layer.encode(format, index, &whole).unwrap()).unwrap();
        sink.finish().unwrap();
        write_alias(&*storage, &lineage.join(&format!("{name}.alias.vhd")).unwrap(), &data).unwrap();
    }

    fn backup(&self, number: usize, disk: &str) {
        let metadata = json!({
            "mode": "delta", "jobId": "job", "scheduleId": "s", "timestamp": 1_785_549_603_000_u64 + number as u64,
            "vhds": { "OpaqueRef:0": format!("{disk}/{}.alias.vhd", time(number)) },
            "vdis": { "OpaqueRef:0": { "uuid": uuid(number).to_string() } },
            "vm": { "name_label": "web01" }, "size": 1,
        });
        self.memory.put(&format!("{FOLDER}/{}.json", time(number)), metadata.to_string()).unwrap();
    }

    fn put(&self, name: &str, bytes: &[u8]) {
        self.memory.put(&format!("{FOLDER}/{name}"), bytes).unwrap();
    }

    /// Makes each fault, or some of them; returns the sorts that a plan must name.
    fn with_faults(seed: u64) -> (Self, BTreeSet<String>) {
        let world = Self::sound();
        let random = &mut Random::new(seed);
        let mut sorts = BTreeSet::new();
        // The first seed has them all.
        let mut has = |sort: &str| {
            let has = seed == 0 || random.below(3) > 0;
            has.then(|| sorts.insert(sort.to_owned())).is_some()
        };
        let last = || Some((uuid(2), format!("{}.alias.vhd", time(2))));
        if has("orphan-disk") {
            world.image(GOOD, "20260805T020003Z", uuid(100), last(), 1, 0xaa);
            let parent = Some((uuid(100), "20260805T020003Z.alias.vhd".to_owned()));
            world.image(GOOD, "20260806T020003Z", uuid(101), parent, 2, 0xbb);
            world.image("vdis/job/other", "20260801T020003Z", uuid(102), None, 0, 0xcc);
        }
        if has("dead-ingest") {
            world.image(GOOD, "20260807T020003Z", uuid(103), last(), 1, 0xdd);
            world.put(&format!("{GOOD}/.20260807T020003Z.xofs-ingest"), b"intent");
            // One of a full backup, whose XVA is the orphan below.
            world.put(".20260701T020003Z.xofs-ingest", b"intent");
        }
        if has("dead-forget") {
            let note = r#"{"disks":{},"files":["20260701T020003Z.xva"]}"#;
            world.memory.put(&format!("xo-vm-backups/.{VM}.xofs-forget"), note).unwrap();
        }
        if has("dead-alias") {
            world.put(&format!("{GOOD}/20260808T020003Z.alias.vhd"), b"data/nothing.vhd");
        }
        if has("dangling-data") {
            world.put(&format!("{GOOD}/data/20260809T020003Z.vhd/blocks/0/1"), b"a block");
        }
        if has("leftover") {
            world.put(&format!("{GOOD}/.20260810T020003Z.alias.vhd.xofs-new"), b"data/x.vhd");
            world.put(".1785587696789.20260801T123456Z.xva", b"xva");
        }
        if has("orphan-xva") {
            world.put("20260701T020003Z.xva", b"xva");
            world.put("20260701T020003Z.xva.checksum", b"$1$$0");
        }
        if has("stale-cache") {
            world.put("cache.json.gz", b"no gzip");
        }
        if has("broken-backup") {
            let parent = Some((uuid(200), format!("{}.alias.vhd", time(6))));
            world.image(LOST, &time(7), uuid(201), parent, 1, 0xee);
            world.backup(7, LOST);
        }
        world.memory.sync_tree(&ObjectPath::root(), &world.memory.mark().unwrap()).unwrap();
        (world, sorts)
    }

    /// Every good backup is listed and reads right.
    fn check(&self, storage: &Arc<MemoryStorage>, when: &str) {
        let options = OpenOptions { key: None, cache_bytes: 0 };
        let repository = Repository::with_storage(storage.clone(), options).unwrap();
        let backups = repository.backups(&vm().id).unwrap_or_else(|error| panic!("{when}: {error}"));
        let mut found = 0;
        for backup in backups.iter() {
            let Some(truth) = self.truths.get(&backup.time.stored()) else { continue };
            let opened = repository.open_disk(backup, &backup.disks[0]);
            let opened = opened.unwrap_or_else(|error| panic!("{when}: {}: {error}", backup.time));
            let mut bytes = vec![0xee; truth.len()];
            opened.read_at(0, &mut bytes).unwrap_or_else(|error| panic!("{when}: {}: {error}", backup.time));
            assert!(bytes == *truth, "{when}: {} reads wrong", backup.time);
            found += 1;
        }
        assert_eq!(found, self.truths.len(), "{when}");
    }
}

/// What is stored, by path: where it is, or in the trash, where it was. Listing caches and journals are left out.
fn everything(storage: &MemoryStorage, when: &str) -> BTreeMap<String, Vec<u8>> {
    let mut all = BTreeMap::new();
    for (path, bytes) in files(storage) {
        let place = match path.strip_prefix(".xofs-trash/") {
            Some(rest) => rest.split_once('/').unwrap().1.to_owned(),
            None => path.clone(),
        };
        if !place.contains("journal.json") && !place.ends_with("cache.json.gz") {
            assert_eq!(all.insert(place, bytes), None, "{when}: twice: {path}");
        }
    }
    all
}

fn files(storage: &MemoryStorage) -> BTreeMap<String, Vec<u8>> {
    let (mut all, mut folders) = (BTreeMap::new(), vec![ObjectPath::root()]);
    while let Some(folder) = folders.pop() {
        for entry in storage.list(&folder).unwrap() {
            let path = folder.join(&entry.name).unwrap();
            match storage.stat(&path).unwrap().kind {
                Kind::Directory => folders.push(path),
                _ => drop(all.insert(path.to_string(), storage.read(&path, 1 << 20).unwrap())),
            }
        }
    }
    all
}

fn examine(storage: &Arc<MemoryStorage>, include: Include) -> VmPlan {
    let writable: Arc<dyn WritableStorage> = storage.clone();
    let repository = Repository::to_change(storage.clone(), 0);
    doctor::examine(&repository, Some(&writable), &vm(), include)
}

/// Takes the lock; one that a dead machine left behind is gone by then.
fn lock(storage: Arc<dyn WritableStorage>) -> xofs::repository::Result<VmLock> {
    VmLock::take(storage, &vm().id, Duration::ZERO, |_| true)
}

fn free(storage: &MemoryStorage) {
    let _ = storage.remove(&format!("{FOLDER}.lock"));
}

fn apply(storage: Arc<dyn WritableStorage>, plan: &VmPlan) -> xofs::repository::Result<Applied> {
    let watch = Watch { threads: 1, jobs: 1, planned: &|_| {}, moved: &|_| {}, is_stopped: &|| false };
    doctor::apply(&lock(storage)?, plan, ALL, &watch)
}

/// Puts back all there is in the trash.
fn undo(storage: Arc<dyn WritableStorage>) -> xofs::repository::Result<()> {
    for set in doctor::list(&*storage)? {
        let done = doctor::put_back(&lock(storage.clone())?, &set.id)?;
        assert_eq!(done.missing, Vec::<String>::new());
    }
    Ok(())
}

fn sorts_of(plan: &VmPlan) -> BTreeSet<String> {
    let name = |sort: Sort| serde_json::to_value(sort).unwrap().as_str().unwrap().to_owned();
    plan.actions.iter().map(|action| name(action.kind)).collect()
}

/// Calls `cut` with 0, 1, 2 and so on until one says that nothing was cut off any more.
///
/// Many at once: most of the time of each is for a backup that is broken and young, whose writer may not be done.
fn everywhere(cut: impl Fn(u64) -> bool + Sync) {
    let (next, is_done) = (AtomicU64::new(0), AtomicBool::new(false));
    let work = || {
        while !is_done.load(Ordering::SeqCst) {
            if cut(next.fetch_add(1, Ordering::SeqCst)) {
                is_done.store(true, Ordering::SeqCst);
            }
        }
    };
    std::thread::scope(|scope| (0..16).for_each(|_| drop(scope.spawn(work))));
}

fn cut_everywhere(seed: u64) {
    everywhere(|count| {
        let mut random = Random::new(seed.wrapping_add(1 << 32).wrapping_add(count << 40));
        let (world, _) = World::with_faults(seed);
        let before = everything(&world.memory, "before");
        let plan = examine(&world.memory, ALL);
        let when = format!("seed {seed}, cut after {count} changes");
        let (storage, is_cut) = until(&world.memory, count);
        let applied = apply(storage, &plan);
        let is_done = !is_cut.load(Ordering::SeqCst);
        // It may also be cut off while the lock is released.
        assert!(applied.is_ok() || !is_done, "{when}: {:?}", applied.err());
        let mut left = vec![(world.memory.clone(), when.clone())];
        for loss in [Some(Loss::All), Some(Loss::None), None] {
            let mut losses = || loss.unwrap_or_else(|| [Loss::All, Loss::Half, Loss::None][random.below(3)]);
            left.push((Arc::new(world.memory.after_power_cut(&mut losses)), format!("{when}, {loss:?}")));
        }
        for (number, (storage, when)) in left.into_iter().enumerate() {
            world.check(&storage, &when);
            assert!(everything(&storage, &when) == before, "{when}: something vanished");
            free(&storage);
            if !is_done && number % 2 == 0 {
                apply(storage.clone(), &plan).unwrap_or_else(|error| panic!("{when}, gone on: {error}"));
                world.check(&storage, &when);
                assert!(everything(&storage, &when) == before, "{when}: something vanished");
                let again = examine(&storage, ALL);
                assert_eq!((again.actions.len(), again.explanations.len()), (0, 0), "{when}: {again:?}");
            }
            undo(storage.clone()).unwrap_or_else(|error| panic!("{when}, undone: {error}"));
            world.check(&storage, &when);
            check_undone(&storage, &before, &when);
        }
        is_done
    });
}

/// All is where it was, and nothing in the trash.
fn check_undone(storage: &MemoryStorage, before: &BTreeMap<String, Vec<u8>>, when: &str) {
    let mut now = files(storage);
    // A journal that was being published when the power went harms nobody.
    now.retain(|path, _| !path.ends_with("cache.json.gz") && !path.ends_with(".journal.json.xofs-new"));
    assert_eq!(now.keys().collect::<Vec<_>>(), before.keys().collect::<Vec<_>>(), "{when}");
    assert!(now == *before, "{when}");
}

fn cut_undo_everywhere(seed: u64) {
    everywhere(|count| {
        let mut random = Random::new(seed.wrapping_add(1 << 33).wrapping_add(count << 40));
        let (world, _) = World::with_faults(seed);
        let before = everything(&world.memory, "before");
        let plan = examine(&world.memory, ALL);
        apply(world.memory.clone(), &plan).unwrap();
        let when = format!("seed {seed}, undo cut after {count} changes");
        let (storage, is_cut) = until(&world.memory, count);
        let undone = undo(storage);
        let is_done = !is_cut.load(Ordering::SeqCst);
        assert!(undone.is_ok() || !is_done, "{when}: {:?}", undone.err());
        for loss in [Some(Loss::All), Some(Loss::None), None] {
            let mut losses = || loss.unwrap_or_else(|| [Loss::All, Loss::Half, Loss::None][random.below(3)]);
            let storage = Arc::new(world.memory.after_power_cut(&mut losses));
            let when = format!("{when}, {loss:?}");
            world.check(&storage, &when);
            assert!(everything(&storage, &when) == before, "{when}: something vanished");
            free(&storage);
            if loss == Some(Loss::None) && count % 4 == 0 {
                // What is back in part is not what the plan moved.
                if apply(storage.clone(), &plan).is_ok() {
                    assert_eq!(examine(&storage, ALL).actions, [], "{when}");
                }
            }
            undo(storage.clone()).unwrap_or_else(|error| panic!("{when}, gone on: {error}"));
            world.check(&storage, &when);
            check_undone(&storage, &before, &when);
        }
        is_done
    });
}

#[test]
fn what_is_cut_off_anywhere_is_gone_on_with_or_put_back_and_nothing_vanishes() {
    seeds::each(SEEDS, 2, cut_everywhere);
}

#[test]
fn an_undo_that_is_cut_off_anywhere_is_gone_on_with() {
    seeds::each(SEEDS, 2, cut_undo_everywhere);
}

#[test]
fn each_fault_has_its_action_and_a_sound_vm_has_none() {
    let plan = examine(&World::sound().memory, ALL);
    assert_eq!((plan.actions.len(), plan.explanations.len(), plan.good.len()), (0, 0, 3), "{plan:?}");
    for seed in 0..16 {
        let (world, sorts) = World::with_faults(seed);
        let plan = examine(&world.memory, ALL);
        // What the disks that are lost may be built on is not told, but those are in a folder of their own.
        assert_eq!(sorts_of(&plan), sorts, "seed {seed}: {plan:#?}");
        assert!(plan.actions.iter().all(|action| action.kind == Sort::BrokenBackup || action.backups.is_empty()));
        assert_eq!(plan.good.len(), 3);
        let careful = sorts_of(&examine(&world.memory, Include::default()));
        assert!(!careful.contains("broken-backup"), "seed {seed}");
    }
}

#[test]
fn nothing_is_planned_where_anything_cannot_be_read() {
    let (world, _) = World::with_faults(0);
    let count = FaultyStorage::<MemoryStorage>::new(world.memory.clone());
    let repository = |storage: Arc<FaultyStorage<MemoryStorage>>| Repository::to_change(storage, 0);
    let whole = Arc::new(count);
    let undisturbed = doctor::examine(&repository(whole.clone()), None, &vm(), ALL);
    assert!(!undisturbed.actions.is_empty());
    let operations = whole.total();
    // Of each operation that fails alone, whatever it is.
    let mut failed = 0;
    for number in 0..operations {
        let faulty = FaultyStorage::<MemoryStorage>::new(world.memory.clone());
        let asked = AtomicU64::new(0);
        faulty.set_rule(move |_, _| (asked.fetch_add(1, Ordering::SeqCst) == number).then_some(Fault::Errno(GONE)));
        let plan = doctor::examine(&repository(Arc::new(faulty)), None, &vm(), ALL);
        if plan == undisturbed {
            // It was asked for only to save another question.
            continue;
        }
        let is_unread = plan.explanations.iter().any(|said| matches!(said.kind, Sort::Unread | Sort::UnknownMetadata));
        assert!(plan.actions.is_empty() && is_unread, "operation {number} of {operations}: {plan:#?}");
        failed += 1;
    }
    assert!(failed * 10 > operations * 9, "{failed} of {operations}");
}

#[test]
fn an_image_is_opened_twice_however_many_backups_are_built_on_it() {
    for count in [3, 6] {
        let world = World::sound();
        for number in 3..count {
            let parent = Some((uuid(number - 1), format!("{}.alias.vhd", time(number - 1))));
            world.image(GOOD, &time(number), uuid(number), parent, 1, 1);
            world.backup(number, GOOD);
        }
        let footers = Arc::new(AtomicU64::new(0));
        let counted = FaultyStorage::<MemoryStorage>::new(world.memory.clone());
        let read = footers.clone();
        counted.set_rule(move |operation, path| {
            if operation == Operation::Read && path.file_name() == "footer" {
                read.fetch_add(1, Ordering::SeqCst);
            }
            None
        });
        let plan = doctor::examine(&Repository::to_change(Arc::new(counted), 0), None, &vm(), ALL);
        assert_eq!((plan.good.len(), plan.explanations.len()), (count, 0), "{plan:#?}");
        // By itself, for what it says, and in a chain.
        assert_eq!(footers.load(Ordering::SeqCst), 2 * count as u64);
    }
}

#[test]
fn each_backup_of_a_damaged_chain_is_judged_by_what_it_needs_itself() {
    let data = |number| format!("data/{}.vhd", time(number));
    let another = vec![format!("{}.alias.vhd", time(1)), data(1)];
    let cases: [(&str, Vec<String>, &[usize]); 5] = [
        ("while a merge changes a parent into its child", vec![], &[1, 2]),
        ("sound", vec![], &[0, 1, 2]),
        ("without the table of a parent", vec![format!("{}/bat", data(1))], &[0]),
        ("without the header of a leaf", vec![format!("{}/header", data(2))], &[0, 1]),
        ("with another image in the place of a parent", another.clone(), &[0, 1]),
    ];
    for (what, removed, good) in cases {
        let world = World::sound();
        for name in &removed {
            remove_tree(&*world.memory, &path(&format!("{FOLDER}/{GOOD}/{name}"))).unwrap();
        }
        if what.starts_with("while a merge") {
            let state = json!({
                "child": { "uuid": uuid(1).to_string() }, "parent": { "uuid": uuid(0).to_string() },
                "chain": [format!("{}.alias.vhd", time(0)), format!("{}.alias.vhd", time(1))],
                "currentBlock": 0, "mergedDataSize": 0, "step": "mergeBlocks", "diskSize": 0,
            });
            world.put(&format!("{GOOD}/.{}.alias.vhd.merge.json", time(0)), state.to_string().as_bytes());
        }
        if removed == another {
            world.image(GOOD, &time(1), uuid(9), None, 1, 1);
        }
        let plan = examine(&world.memory, Include::default());
        let names: Vec<_> = good.iter().map(|number| format!("2026-08-0{}T020003Z", number + 1)).collect();
        assert_eq!(plan.good, names, "{what}: {plan:#?}");
    }
}

#[test]
fn a_plan_is_refused_if_anything_is_not_as_it_was() {
    type Change = fn(&World);
    let changes: [(&str, Change); 8] = [
        ("a new backup", |world| world.backup(3, GOOD)),
        ("metadata rewritten", |world| world.backup(1, GOOD)),
        ("a new image", |world| {
            world.image(
                GOOD,
                "20260811T020003Z",
                uuid(300),
                Some((uuid(101), "20260806T020003Z.alias.vhd".to_owned())),
                1,
                1,
            )
        }),
        ("an orphan that a backup names", |world| {
            let name = format!("{FOLDER}/{}.json", time(4));
            let metadata =
                json!({ "mode": "delta", "vhds": { "OpaqueRef:0": format!("{GOOD}/20260806T020003Z.alias.vhd") } });
            world.memory.put(&name, metadata.to_string()).unwrap();
        }),
        ("an alias that leads elsewhere", |world| {
            world.put(&format!("{GOOD}/20260805T020003Z.alias.vhd"), b"data/20260801T020003Z.vhd");
        }),
        ("a leftover that grew", |world| world.put(".1785587696789.20260801T123456Z.xva", b"more of it")),
        ("the same bytes, written again", |world| world.put("20260701T020003Z.xva", b"xva")),
        ("data that was found", |world| world.put(&format!("{GOOD}/data/nothing.vhd/footer"), b"")),
    ];
    for (what, change) in changes {
        let (world, _) = World::with_faults(0);
        let plan = examine(&world.memory, ALL);
        change(&world);
        let before = files(&world.memory);
        let error = apply(world.memory.clone(), &plan).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Changed, "{what}: {error}");
        assert!(files(&world.memory) == before, "{what}");
    }
}

#[test]
fn an_action_that_nobody_planned_is_refused_and_one_that_is_left_out_is_not_done() {
    let (world, _) = World::with_faults(0);
    let plan = examine(&world.memory, ALL);
    let mut forged = plan.clone();
    let position = forged.actions.iter().position(|action| action.kind == Sort::DeadAlias).unwrap();
    forged.actions[position].paths = vec![format!("{FOLDER}/{}.json", time(0))];
    assert_eq!(apply(world.memory.clone(), &forged).unwrap_err().kind(), ErrorKind::Changed);
    let mut part = plan;
    part.actions.retain(|action| action.kind == Sort::DeadAlias);
    let applied = apply(world.memory.clone(), &part).unwrap();
    assert_eq!(applied.moved, 1);
    world.check(&world.memory, "a part");
    assert!(!sorts_of(&examine(&world.memory, ALL)).contains("dead-alias"));
    assert!(sorts_of(&examine(&world.memory, ALL)).contains("orphan-disk"));
}

#[test]
fn a_plan_says_the_same_after_it_was_written_and_read() {
    let (world, _) = World::with_faults(0);
    let plan = Plan::new("main", ALL, vec![examine(&world.memory, ALL)]);
    let json = serde_json::to_vec(&plan).unwrap();
    assert_eq!(Plan::parse(&json).unwrap(), plan);
    let mut other: Value = serde_json::from_slice(&json).unwrap();
    other["version"] = Value::from(2);
    for bytes in [b"{}".to_vec(), b"".to_vec(), other.to_string().into_bytes()] {
        assert_eq!(Plan::parse(&bytes).unwrap_err().kind(), ErrorKind::Damaged);
    }
}

#[test]
fn orphans_stay_where_a_needed_image_is_missing_or_nobody_knows_what_is_needed() {
    type Change = fn(&World);
    let changes: [(&str, Sort, Change); 7] = [
        ("a parent is missing", Sort::Unjudged, |world| {
            world.memory.remove(&format!("{FOLDER}/{GOOD}/{}.alias.vhd", time(1))).unwrap();
        }),
        ("a leaf is empty", Sort::Unjudged, |world| {
            world.memory.overwrite(&format!("{FOLDER}/{GOOD}/{}.alias.vhd", time(2)), b"").unwrap();
        }),
        ("an image is not understood", Sort::Unjudged, |world| {
            world.put(&format!("{GOOD}/data/20260805T020003Z.vhd/chunk-filters.json"), b"[\"zstd\"]");
        }),
        ("a uuid comes twice", Sort::Unjudged, |world| world.image(GOOD, "20260812T020003Z", uuid(1), None, 0, 9)),
        ("metadata is cut off", Sort::UnknownMetadata, |world| world.put(&format!("{}.json", time(2)), b"{\"mode\":")),
        ("disks are elsewhere", Sort::UnknownMetadata, |world| {
            // What is in its folder 'data' would be taken for the images of a disk.
            world.image("vdis/job", &time(8), uuid(400), None, 0, 1);
            world.backup(8, "vdis/job");
        }),
        ("no backup is left", Sort::NoBackups, |world| {
            for number in [0, 1, 2, 7] {
                world.memory.remove(&format!("{FOLDER}/{}.json", time(number))).unwrap();
            }
        }),
    ];
    for (what, sort, change) in changes {
        let (world, _) = World::with_faults(0);
        change(&world);
        let plan = examine(&world.memory, Include::default());
        assert!(plan.explanations.iter().any(|said| said.kind == sort), "{what}: {plan:#?}");
        let in_folder = |paths: &[String]| paths.iter().any(|path| path.starts_with(&format!("{FOLDER}/{GOOD}/")));
        let moved = plan.actions.iter().find(|action| action.kind != Sort::Leftover && in_folder(&action.paths));
        assert_eq!(moved, None, "{what}");
    }
}

#[test]
fn two_children_of_one_image_are_explained_and_neither_is_touched() {
    let world = World::sound();
    world.image(GOOD, &time(4), uuid(4), Some((uuid(1), format!("{}.alias.vhd", time(1)))), 3, 7);
    world.backup(4, GOOD);
    let plan = examine(&world.memory, ALL);
    assert_eq!((plan.actions.len(), plan.good.len()), (0, 4), "{plan:#?}");
    let [said] = plan.explanations.as_slice() else { panic!("{plan:#?}") };
    assert_eq!(
        (said.kind, said.path.as_str()),
        (Sort::Branch, format!("{FOLDER}/{GOOD}/{}.alias.vhd", time(1)).as_str())
    );
    assert_eq!(said.backups, ["2026-08-03T020003Z", "2026-08-05T020003Z"]);
}

#[test]
fn a_listing_cache_is_stale_that_says_of_a_backup_what_its_file_does_not() {
    type Change = fn(&mut serde_json::Map<String, Value>);
    let changes: [(&str, Option<&str>, Change); 7] = [
        ("as it is written with a backup", None, |_| {}),
        ("as a full listing makes it", None, |entry| drop(entry.insert("isImmutable".to_owned(), false.into()))),
        ("with a field that nobody knows", None, |entry| drop(entry.insert("dirty".to_owned(), true.into()))),
        ("as before a merge", Some("size"), |entry| entry["size"] = 2.into()),
        ("of another job", Some("jobId"), |entry| entry["jobId"] = "other".into()),
        ("with another disk", Some("vhds"), |entry| entry["vhds"] = json!({ "OpaqueRef:0": "vdis/x/y/z.vhd" })),
        ("with the file of another", Some("_filename"), |entry| entry["_filename"] = format!("/{FOLDER}/x").into()),
    ];
    for (what, field, change) in changes {
        let world = World::sound();
        let mut entries = serde_json::Map::new();
        for number in 0..3 {
            let name = path(&format!("{FOLDER}/{}.json", time(number)));
            let mut entry: Value = serde_json::from_slice(&world.memory.read(&name, 1 << 20).unwrap()).unwrap();
            let key = format!("/{name}");
            (entry["_filename"], entry["id"]) = (key.as_str().into(), key.as_str().into());
            if number == 1 {
                change(entry.as_object_mut().unwrap());
            }
            entries.insert(key, entry);
        }
        let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        std::io::Write::write_all(&mut gzip, Value::from(entries).to_string().as_bytes()).unwrap();
        world.put("cache.json.gz", &gzip.finish().unwrap());
        let plan = examine(&world.memory, ALL);
        let Some(field) = field else {
            assert_eq!(plan.actions, [], "{what}");
            continue;
        };
        let [action] = plan.actions.as_slice() else { panic!("{what}: {plan:#?}") };
        let reason = format!("the listing cache says of '{}.json' another '{field}' than that file,", time(1));
        assert!(action.kind == Sort::StaleCache && action.reason.starts_with(&reason), "{what}: {action:?}");
        assert_eq!(apply(world.memory.clone(), &plan).unwrap().moved, 1);
        assert_eq!(examine(&world.memory, ALL).actions, [], "{what}");
    }
}

#[test]
fn nothing_is_judged_while_somebody_holds_the_lock() {
    let (world, _) = World::with_faults(0);
    let held = lock(world.memory.clone()).unwrap();
    let plan = examine(&world.memory, ALL);
    assert!(plan.actions.is_empty() && plan.explanations[0].kind == Sort::Busy, "{plan:#?}");
    drop(held);
    // In memory a folder that nobody has touched is as old as can be.
    world.memory.create_directory(&format!("{FOLDER}.lock")).unwrap();
    let plan = examine(&world.memory, ALL);
    assert_eq!((plan.actions[0].kind, plan.actions[0].act), (Sort::StaleLock, Act::TakeLock));
}

#[test]
fn what_is_left_of_locks_is_found_also_of_a_vm_that_is_gone_and_goes_when_the_plan_is_applied() {
    const GONE_VM: &str = "0a1b2c3d-0000-4000-8000-000000000009";
    let names = |storage: &MemoryStorage| -> Vec<String> {
        let mut names: Vec<_> =
            storage.list(&path("xo-vm-backups")).unwrap().into_iter().map(|entry| entry.name).collect();
        names.sort();
        names
    };
    let aside = |vm: &str| format!("xo-vm-backups/.{vm}.lock.0123456789abcdef");
    for (vm, name, good) in [(VM, "web01", 3), (GONE_VM, "", 0)] {
        let world = World::sound();
        let writable: Arc<dyn WritableStorage> = world.memory.clone();
        let found = || {
            let repository = Repository::to_change(world.memory.clone(), 0);
            let vms = doctor::vms(&repository).unwrap();
            let vm = vms.into_iter().find(|found| found.id.as_str() == vm);
            vm.map(|vm| doctor::examine(&repository, Some(&writable), &vm, ALL))
        };
        world.memory.create_directory(&format!("xo-vm-backups/{vm}.lock")).unwrap();
        let plan = found().unwrap();
        assert_eq!(plan.actions[0].paths, [format!("xo-vm-backups/{vm}.lock")]);
        assert_eq!(plan.actions[0].reason.contains("its VM has no folder any more"), vm == GONE_VM, "{plan:#?}");
        world.memory.create_directory(&aside(vm)).unwrap();
        assert_eq!(found().unwrap().actions[0].paths, [format!("xo-vm-backups/{vm}.lock"), aside(vm)]);

        world.memory.remove(&format!("xo-vm-backups/{vm}.lock")).unwrap();
        let plan = found().unwrap();
        let [action] = plan.actions.as_slice() else { panic!("{plan:#?}") };
        assert_eq!((action.kind, action.act, &action.paths), (Sort::StaleLock, Act::TakeLock, &vec![aside(vm)]));
        assert_eq!((plan.explanations.len(), plan.good.len(), plan.name.as_str()), (0, good, name));
        let lock = VmLock::take(world.memory.clone(), &VmId::new(vm).unwrap(), Duration::ZERO, |_| true).unwrap();
        if vm == GONE_VM {
            assert_eq!(found().unwrap().explanations[0].kind, Sort::Busy);
        }
        let watch = Watch { threads: 1, jobs: 1, planned: &|_| {}, moved: &|_| {}, is_stopped: &|| false };
        assert_eq!(doctor::apply(&lock, &plan, ALL, &watch).unwrap().moved, 0);
        drop(lock);
        assert_eq!(names(&world.memory), [VM]);
        assert_eq!(found().map(|plan| plan.actions.len()), (vm == VM).then_some(0));
    }
}

#[test]
fn a_merge_that_has_begun_is_finished_and_nothing_beside_it_is_touched() {
    let (world, _) = World::with_faults(0);
    world.memory.remove(&format!("{FOLDER}/{}.json", time(0))).unwrap();
    let state = json!({
        "child": { "uuid": uuid(1).to_string() }, "parent": { "uuid": uuid(0).to_string() },
        "chain": [format!("{}.alias.vhd", time(0)), format!("{}.alias.vhd", time(1))],
        "currentBlock": 0, "mergedDataSize": 0, "step": "mergeBlocks", "diskSize": 0,
    });
    let name = format!("{GOOD}/.{}.alias.vhd.merge.json", time(0));
    world.put(&name, state.to_string().as_bytes());
    let mut world = world;
    world.truths.remove(&time(0));
    let plan = examine(&world.memory, ALL);
    let in_folder =
        |action: &&doctor::Action| action.paths.iter().any(|path| path.starts_with(&format!("{FOLDER}/{GOOD}/")));
    // An alias that leads nowhere keeps it from being known what is built on what goes.
    let there = |plan: &VmPlan| plan.actions.iter().filter(in_folder).map(|action| action.kind).collect::<Vec<_>>();
    assert_eq!(there(&plan), [Sort::DeadAlias], "{plan:#?}");
    assert_eq!(apply(world.memory.clone(), &plan).unwrap().merges.merged, 0);
    let plan = examine(&world.memory, ALL);
    assert_eq!(there(&plan), [Sort::UnfinishedMerge], "{plan:#?}");
    let applied = apply(world.memory.clone(), &plan).unwrap();
    assert_eq!(applied.merges.merged, 1);
    assert!(applied.merges.problems.is_empty());
    world.check(&world.memory, "merged");
    let then = examine(&world.memory, ALL);
    assert!(sorts_of(&then).contains("orphan-disk") && !sorts_of(&then).contains("unfinished-merge"), "{then:#?}");
}

#[test]
fn a_merge_whose_state_file_is_empty_is_finished_if_there_is_but_one_it_can_be() {
    type Change = fn(&World);
    let changes: [(&str, bool, Change); 5] = [
        ("nothing was moved", true, |_| {}),
        ("a block was moved", true, |world| {
            let block = |number| format!("{FOLDER}/{GOOD}/data/{}.vhd/blocks/0/1", time(number));
            world.memory.rename(&block(1), &block(0)).unwrap();
        }),
        ("a fork", false, |world| {
            let parent = Some((uuid(0), format!("{}.alias.vhd", time(0))));
            world.image(GOOD, "20260805T020003Z", uuid(9), parent, 1, 1);
        }),
        ("an image that cannot be opened", false, |world| {
            world.put(&format!("{GOOD}/x.alias.vhd"), b"data/nothing.vhd");
        }),
        ("a block that is nowhere", false, |world| {
            world.memory.remove(&format!("{FOLDER}/{GOOD}/data/{}.vhd/blocks/0/1", time(1))).unwrap();
        }),
    ];
    for (what, is_finished, change) in changes {
        let mut world = World::sound();
        world.memory.remove(&format!("{FOLDER}/{}.json", time(0))).unwrap();
        world.truths.remove(&time(0));
        change(&world);
        world.put(&format!("{GOOD}/.{}.alias.vhd.merge.json", time(0)), b"");
        let plan = examine(&world.memory, ALL);
        if !is_finished {
            assert_eq!(plan.actions, [], "{what}");
            let is_said =
                |said: &doctor::Explanation| said.kind == Sort::UnfinishedMerge && said.message.contains("empty");
            assert!(plan.explanations.iter().any(is_said), "{what}: {plan:#?}");
            continue;
        }
        assert_eq!(sorts_of(&plan), BTreeSet::from(["unfinished-merge".to_owned()]), "{what}: {plan:#?}");
        let applied = apply(world.memory.clone(), &plan).unwrap();
        assert_eq!((applied.merges.merged, applied.merges.problems.len()), (1, 0), "{what}");
        world.check(&world.memory, what);
        assert_eq!(examine(&world.memory, ALL).actions, [], "{what}");
    }
}

#[test]
fn an_undo_changes_nothing_where_a_place_is_taken() {
    let (world, _) = World::with_faults(0);
    apply(world.memory.clone(), &examine(&world.memory, ALL)).unwrap();
    let taken = format!("{FOLDER}/20260701T020003Z.xva");
    world.memory.put(&taken, "another").unwrap();
    let before = files(&world.memory);
    assert_eq!(undo(world.memory.clone()).unwrap_err().kind(), ErrorKind::Exists);
    assert!(files(&world.memory) == before);
    world.memory.remove(&taken).unwrap();
    world.put(&format!("{GOOD}/.x.alias.vhd.merge.json"), b"{}");
    assert_eq!(undo(world.memory.clone()).unwrap_err().kind(), ErrorKind::Damaged);
    world.memory.remove(&format!("{FOLDER}/{GOOD}/.x.alias.vhd.merge.json")).unwrap();
    undo(world.memory.clone()).unwrap();
    assert_eq!(doctor::list(&*world.memory).unwrap(), []);
}

#[test]
fn a_purge_that_is_cut_off_is_gone_on_with_and_never_undone() {
    for count in 0.. {
        let (world, _) = World::with_faults(0);
        let applied = apply(world.memory.clone(), &examine(&world.memory, ALL)).unwrap();
        let id = applied.set.unwrap();
        let when = format!("purge cut after {count} changes");
        let (storage, is_cut) = until(&world.memory, count);
        let purged = lock(storage).and_then(|lock| doctor::purge(&lock, &id));
        world.check(&world.memory, &when);
        free(&world.memory);
        if !is_cut.load(Ordering::SeqCst) {
            purged.unwrap();
            assert_eq!(doctor::list(&*world.memory).unwrap(), []);
            assert!(files(&world.memory).keys().all(|path| !path.starts_with(".xofs-trash")));
            return;
        }
        let sets = doctor::list(&*world.memory).unwrap();
        if let Some(set) = sets.first().filter(|set| set.state == doctor::State::Purging) {
            let lock = lock(world.memory.clone()).unwrap();
            assert_eq!(doctor::put_back(&lock, &set.id).unwrap_err().kind(), ErrorKind::Damaged, "{when}");
            doctor::purge(&lock, &set.id).unwrap_or_else(|error| panic!("{when}: {error}"));
        }
    }
}
