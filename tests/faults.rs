//! One operation of the storage fails, in each way, at each point of an ingest and of a forget: no backup is lost, the error names
//! the file, and the next run, which nothing disturbs, ends as if nothing had been.
//!
//! Each run of the tests takes some of the combinations; `XOFS_EVERY=1` takes all.

#[allow(dead_code, reason = "each test file uses its part of the module")]
#[path = "../vhd/tests/seeds/mod.rs"]
mod seeds;
mod world;

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use disk::{Disk, Extent};
use jiff::Timestamp;
use serde_json::json;
use storage::{ErrorKind, Fault, FaultyStorage, MemoryStorage, ObjectPath, Operation, Storage, WritableStorage};
use world::{VM, World, path};
use xofs::ingest::{self, Destination, Layout, RepositoryDestination, Source, Wanted};
use xofs::repository::{OpenOptions, Repository};

/// Of so many combinations one is taken.
const EVERY: u64 = 30;

/// What happens once, by what it is called in a failure.
const FAULTS: [(&str, Fault); 7] = [
    ("EIO", Fault::Errno(5)),
    ("EACCES", Fault::Errno(13)),
    ("ENOSPC", Fault::Errno(28)),
    ("ESTALE", Fault::Errno(116)),
    ("EIO after the first half", Fault::Half(5)),
    ("only the first half", Fault::Short),
    ("vanished", Fault::Error(ErrorKind::NotFound)),
];

/// Whether such a fault can meet such an operation.
fn can_meet(fault: Fault, operation: Operation) -> bool {
    match fault {
        Fault::Half(_) => matches!(operation, Operation::Write | Operation::WriteAt),
        Fault::Short => matches!(operation, Operation::Read | Operation::ReadAt),
        // A folder that is there is not said to be gone, and what is made new cannot be.
        Fault::Error(_) => matches!(operation, Operation::Open | Operation::ReadAt | Operation::Rename),
        _ => true,
    }
}

/// What came of a fault: how many operations there were, and which of them met it.
#[derive(Default)]
struct Seen {
    done: u64,
    met: Option<(Operation, ObjectPath)>,
}

/// The storage, of which the operation after `count` others meets a fault. Those of the lock do not count: its signs of life
/// come when they do.
fn with_fault(memory: &Arc<MemoryStorage>, fault: Fault, count: u64) -> (Arc<dyn WritableStorage>, Arc<Mutex<Seen>>) {
    let faulty = FaultyStorage::new(memory.clone());
    let seen = Arc::new(Mutex::new(Seen::default()));
    let seen_by_rule = seen.clone();
    faulty.set_rule(move |operation, path| {
        let mut seen = seen_by_rule.lock().unwrap();
        if path.as_str().ends_with(".lock") {
            return None;
        }
        seen.done += 1;
        if seen.done != count + 1 || !can_meet(fault, operation) {
            return None;
        }
        seen.met = Some((operation, path.clone()));
        Some(fault)
    });
    (Arc::new(faulty), seen)
}

/// Has operations meet faults, one combination of `every`: `attempt` does what is tested with a fault after so many operations,
/// and judges it.
fn each_fault(what: &str, every: u64, attempt: impl Fn(&str, Fault, u64) -> Seen) {
    let every = std::env::var("XOFS_EVERY").map_or(every, |text| text.parse().expect("a number"));
    let mut met = 0;
    for count in 0.. {
        let mut is_over = false;
        for (number, (name, fault)) in (0..).zip(FAULTS) {
            if (count + number) % every == 0 {
                let seen = attempt(&format!("{what}, {name} after {count} operations"), fault, count);
                met += u64::from(seen.met.is_some());
                is_over |= seen.done <= count;
            }
        }
        if is_over {
            break;
        }
    }
    println!("{what}: {met} faults were met");
    assert!(met > 8, "{what}: {met} faults");
}

/// An error names the file that the fault met; of a block's file, the disk, beside which it gives the number of the block; of
/// a parent, its name beside its child.
fn check_names(message: &str, seen: &Seen, when: &str) {
    let (operation, path) =
        seen.met.as_ref().unwrap_or_else(|| panic!("{when}: nothing met the fault, but: {message}"));
    let named = path.as_str().split("/blocks/").next().unwrap();
    let is_beside_child =
        message.contains(path.parent().as_str()) && message.contains(&format!("its parent '{}'", path.file_name()));
    assert!(
        message.contains(named) || is_beside_child,
        "{when}: {operation:?} of '{path}' failed, and it says: {message}"
    );
}

#[test]
fn a_forget_that_meets_a_fault_loses_no_backup_and_the_next_one_finishes() {
    for seed in [3, 4] {
        each_fault(&format!("forget, seed {seed}"), EVERY, |when, fault, count| {
            let world = World { may_lose_digests: true, ..World::new(seed) };
            let (storage, seen) = with_fault(&world.memory, fault, count);
            let done = world.forget(storage);
            let seen = std::mem::take(&mut *seen.lock().unwrap());
            let when = format!("{when} ({:?})", seen.met);
            world.check(&world.memory, &when, false);
            match done {
                Err(error) => check_names(&error.to_string(), &seen, &when),
                Ok(done) => {
                    let told = done.refused.iter().map(|(_, why)| why).chain(done.problems.iter().map(|(_, why)| why));
                    told.for_each(|why| check_names(why, &seen, &when));
                }
            }
            world.finish(&world.memory, &when);
            seen
        });
    }
}

/// A disk in memory, all of it data.
struct Image(Vec<u8>);

impl Disk for Image {
    fn size(&self) -> u64 {
        self.0.len() as u64
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> disk::Result<()> {
        let at = usize::try_from(offset).unwrap();
        buffer.copy_from_slice(&self.0[at..at + buffer.len()]);
        Ok(())
    }

    fn extent_at(&self, offset: u64) -> disk::Result<Extent> {
        Ok(Extent { len: self.size() - offset, is_hole: false })
    }
}

/// The disk at the time of a backup: two blocks, the second of which does not change.
fn state(number: u8) -> Vec<u8> {
    let mut bytes = vec![7; (2 << 20) + 512];
    bytes[..2 << 20].fill(number + 1);
    bytes
}

fn ingest(storage: &Arc<dyn WritableStorage>, number: u8, layout: Layout) -> ingest::Result<ingest::Report> {
    let options = OpenOptions { key: None, cache_bytes: 8 << 20 };
    let repository = Repository::with_storage(storage.clone().reader(), options)?;
    let wanted = Wanted {
        vm: VM.to_owned(),
        name: Some("web01".to_owned()),
        disks: vec![("xvda".to_owned(), Source::Disk(Arc::new(Image(state(number)))))],
        layout: Some(layout),
        time: Some(Timestamp::from_second(1_785_549_600 + i64::from(number)).unwrap()),
        ..Wanted::default()
    };
    let destination = Destination::Repository(RepositoryDestination {
        name: "repository".to_owned(),
        repository,
        storage: storage.clone(),
        quota: None,
    });
    let mut report = ingest::run(&wanted, &[destination], &ingest::Watch::new(|_| ()))?;
    match report.outcomes.remove(0).stored {
        Ok(_) => Ok(report),
        Err(error) => Err(error),
    }
}

/// The backups that are listed, by the number of their state, each of which reads right.
fn listed(memory: &Arc<MemoryStorage>, when: &str) -> Vec<u8> {
    let repository = Repository::with_storage(memory.clone(), OpenOptions { key: None, cache_bytes: 0 }).unwrap();
    let backups = repository.backups(&repository.vms().unwrap()[0].id).unwrap();
    let read = |backup: &Arc<xofs::repository::Backup>| {
        assert_eq!(backup.problem, None, "{when}");
        let number = u8::try_from(backup.time.unix() - 1_785_549_600).unwrap();
        let disk = repository.open_disk(backup, &backup.disks[0]).unwrap_or_else(|error| panic!("{when}: {error}"));
        let mut bytes = vec![0xee; usize::try_from(disk.size()).unwrap()];
        disk.read_at(0, &mut bytes).unwrap_or_else(|error| panic!("{when}: {error}"));
        assert!(bytes == state(number), "{when}: backup {number} reads wrong");
        number
    };
    backups.iter().map(read).collect()
}

/// Counts the files by how their names end; whatever is of no backup is counted as something else.
fn files(memory: &MemoryStorage) -> BTreeMap<&'static str, usize> {
    let (mut counts, mut folders) = (BTreeMap::new(), vec![ObjectPath::root()]);
    while let Some(folder) = folders.pop() {
        for entry in Storage::list(memory, &folder).unwrap() {
            if entry.is_directory {
                folders.push(folder.join(&entry.name).unwrap());
            } else {
                let ends = ["Z.json", "Z.alias.vhd", "Z.vhd", "footer", "Z.xva", "Z.xva.checksum"];
                let is_odd = entry.name.starts_with('.');
                let end = ends.into_iter().find(|end| !is_odd && entry.name.ends_with(end));
                let is_of_disk = ["header", "bat", "chunk-filters.json"].contains(&entry.name.as_str());
                let is_block = folder.as_str().contains("/blocks/");
                let may_be = entry.name == "cache.json.gz" || entry.name.ends_with(".xofs-digests");
                if !is_of_disk && !is_block && !may_be {
                    *counts.entry(end.unwrap_or("something else")).or_default() += 1;
                }
            }
        }
    }
    counts
}

#[test]
fn an_ingest_that_meets_a_fault_loses_no_backup_and_the_next_one_cleans_up() {
    for layout in [Layout::Exploded(Some(vhd::Filter::Gzip)), Layout::File] {
        each_fault(&format!("ingest, {layout:?}"), EVERY, |when, fault, count| {
            let memory = Arc::new(MemoryStorage::new());
            WritableStorage::create_directory(&*memory, &path("xo-vm-backups")).unwrap();
            let whole: Arc<dyn WritableStorage> = memory.clone();
            ingest(&whole, 0, layout).unwrap();
            let (storage, seen) = with_fault(&memory, fault, count);
            let done = ingest(&storage, 1, layout);
            let seen = std::mem::take(&mut *seen.lock().unwrap());
            let when = format!("{when} ({:?})", seen.met);
            let there = listed(&memory, &when);
            match done {
                Ok(_) => assert_eq!(there, [0, 1], "{when}"),
                Err(error) => {
                    check_names(&error.to_string(), &seen, &when);
                    assert!(there == [0] || there == [0, 1], "{when}: {there:?}");
                }
            }
            let _ = memory.remove(&format!("xo-vm-backups/{VM}.lock"));
            ingest(&whole, 2, layout).unwrap_or_else(|error| panic!("{when}: {error}"));
            let expected = [there, vec![2]].concat();
            assert_eq!(listed(&memory, &when), expected, "{when}");
            let count = expected.len();
            let names = match layout {
                Layout::File => BTreeMap::from([("Z.json", count), ("Z.vhd", count)]),
                Layout::Exploded(_) => BTreeMap::from([("Z.json", count), ("Z.alias.vhd", count), ("footer", count)]),
            };
            assert_eq!(files(&memory), names, "{when}");
            seen
        });
    }
}

/// An XVA: of a compressed one nobody looks at more than its beginning.
fn xva(number: u8) -> Vec<u8> {
    [&[0x1f, 0x8b][..], &vec![number; (2 << 20) + 100]].concat()
}

fn of_full(number: u8, end: &str) -> String {
    format!("xo-vm-backups/{VM}/2026080{}T020003Z.{end}", number + 1)
}

/// Another repository, with full backups.
fn fulls() -> Arc<MemoryStorage> {
    let memory = Arc::new(MemoryStorage::new());
    for number in 0..3 {
        let metadata = json!({
            "mode": "full", "jobId": "job", "scheduleId": "schedule", "timestamp": 1_785_549_603_000_u64,
            "xva": format!("./2026080{}T020003Z.xva", number + 1), "vm": { "name_label": "web01" },
            "size": xva(number).len(),
        });
        memory.put(&of_full(number, "json"), metadata.to_string()).unwrap();
        memory.put(&of_full(number, "xva"), xva(number)).unwrap();
    }
    memory
}

fn mirror(source: Arc<dyn Storage>, number: u8, storage: &Arc<dyn WritableStorage>) -> ingest::Result<()> {
    let options = || OpenOptions { key: None, cache_bytes: 0 };
    let origin = Repository::with_storage(source, options())?;
    let vm = origin.vms()?[0].clone();
    let backup = origin.backups(&vm.id)?[usize::from(number)].clone();
    let wanted = Wanted::mirror(&origin, &vm, &backup)?;
    let repository = Repository::with_storage(storage.clone().reader(), options())?;
    let destination = Destination::Repository(RepositoryDestination {
        name: "repository".to_owned(),
        repository,
        storage: storage.clone(),
        quota: None,
    });
    let mut report = ingest::run(&wanted, &[destination], &ingest::Watch::new(|_| ()))?;
    report.outcomes.remove(0).stored.map(|_| ())
}

/// The full backups that are there, by number, each of which has all its bytes.
fn mirrored(memory: &MemoryStorage, when: &str) -> Vec<u8> {
    let is_there = |number: &u8| memory.stat(&path(&of_full(*number, "json"))).is_ok();
    let whole = |number: u8| {
        let read = memory.read(&path(&of_full(number, "xva")), u64::MAX).unwrap_or_else(|it| panic!("{when}: {it}"));
        assert!(read == xva(number), "{when}: backup {number} has other bytes");
        number
    };
    (0..3).filter(is_there).map(whole).collect()
}

#[test]
fn a_mirror_of_a_full_backup_that_meets_a_fault_loses_no_backup_and_the_next_one_cleans_up() {
    for is_source in [false, true] {
        each_fault(&format!("mirror, source {is_source}"), if is_source { 3 } else { 11 }, |when, fault, count| {
            let (source, memory) = (fulls(), Arc::new(MemoryStorage::new()));
            WritableStorage::create_directory(&*memory, &path("xo-vm-backups")).unwrap();
            let whole: Arc<dyn WritableStorage> = memory.clone();
            mirror(source.clone(), 0, &whole).unwrap();
            let (storage, seen) = with_fault(if is_source { &source } else { &memory }, fault, count);
            let done = match is_source {
                true => mirror(storage.reader(), 1, &whole),
                false => mirror(source.clone(), 1, &storage),
            };
            let seen = std::mem::take(&mut *seen.lock().unwrap());
            let when = format!("{when} ({:?})", seen.met);
            let there = mirrored(&memory, &when);
            match done {
                Ok(()) => assert_eq!(there, [0, 1], "{when}"),
                Err(error) => {
                    check_names(&error.to_string(), &seen, &when);
                    assert!(there == [0] || there == [0, 1], "{when}: {there:?}");
                }
            }
            let _ = memory.remove(&format!("xo-vm-backups/{VM}.lock"));
            mirror(source, 2, &whole).unwrap_or_else(|error| panic!("{when}: {error}"));
            let expected = [there, vec![2]].concat();
            assert_eq!(mirrored(&memory, &when), expected, "{when}");
            let count = expected.len();
            let names = BTreeMap::from([("Z.json", count), ("Z.xva", count), ("Z.xva.checksum", count)]);
            assert_eq!(files(&memory), names, "{when}");
            seen
        });
    }
}
