//! Full backups that are mirrored: the XVA has the same bytes, and whenever a mirror is ended, its backup is there as a whole or
//! not at all.

mod cut;
mod support;

use std::ffi::OsStr;
use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use serde_json::{Value, json};
use storage::{
    EncryptedStorage, EncryptionKey, Fault, FaultyStorage, Loss, MemoryStorage, ObjectPath, Operation, Storage,
    Summing, WritableStorage,
};
use support::{KEY, copy_of, files, fixture, init, run, scratch, succeed, xofs};
use tempfile::TempDir;
use xofs::ingest::{self, Destination, ErrorKind, Extent, Layout, RepositoryDestination, Reserve, Wanted, Watch};
use xofs::probe::Stage;
use xofs::repository::{Backup, Mode, OpenOptions, Repository, Vm};

const VM: &str = "1f2e3d4c-5b6a-4798-8a9b-0c1d2e3f4a5b";
const MIB: usize = 1 << 20;
/// The number of a backup that is larger than the others.
const LARGE: usize = 9;
/// That of one that is too long to be encrypted or decrypted in memory.
const HUGE: usize = 8;
const OTHER_KEY: &str = "fedcba9876543210fedcba9876543210";

fn path(text: &str) -> ObjectPath {
    ObjectPath::new(text).unwrap()
}

fn time(number: usize) -> String {
    format!("2026080{number}T020003Z")
}

fn file(number: usize, end: &str) -> String {
    format!("xo-vm-backups/{VM}/{}.{end}", time(number))
}

fn checksum(bytes: &[u8]) -> String {
    let mut summing = Summing::default();
    summing.add(bytes);
    summing.finish().to_string()
}

/// An XVA that is taken for one: of a compressed one nobody looks at more than its beginning. That of [`LARGE`] is copied in
/// three pieces, that of [`HUGE`] in many, the others in one.
fn xva(number: usize) -> Vec<u8> {
    let len = match number {
        LARGE => 5 * MIB + 9,
        HUGE => 65 * MIB + 12_345,
        _ => 3000,
    };
    let mut bytes = vec![u8::try_from(number).unwrap(); len];
    bytes[..2].copy_from_slice(&[0x1f, 0x8b]);
    bytes.chunks_mut(1000).zip(0_u32..).for_each(|(chunk, count)| chunk[2..6].copy_from_slice(&count.to_le_bytes()));
    bytes
}

/// A repository of Xen Orchestra with full backups of one VM, by number.
fn source(numbers: &[usize]) -> Arc<MemoryStorage> {
    let memory = Arc::new(MemoryStorage::new());
    for number in numbers {
        let bytes = xva(*number);
        let metadata = json!({
            "jobId": "job", "mode": "full", "scheduleId": "schedule", "timestamp": 1_785_549_603_125_u64,
            "version": "2.0.0", "vm": { "uuid": VM, "name_label": "web01" }, "vmSnapshot": { "é": 1.5 },
            "xva": format!("./{}.xva", time(*number)), "size": bytes.len(), "tags": ["a"],
        });
        // A number that no type here holds exactly.
        let metadata = metadata.to_string().replace("1.5", "1.50000000000000000000000001e400");
        memory.put(&file(*number, "json"), metadata).unwrap();
        memory.put(&file(*number, "xva.checksum"), checksum(&bytes)).unwrap();
        memory.put(&file(*number, "xva"), bytes).unwrap();
    }
    memory
}

fn wanted(source: Arc<dyn Storage>, number: usize) -> ingest::Result<Wanted> {
    let repository = Repository::with_storage(source, OpenOptions { key: None, cache_bytes: 0 })?;
    wanted_of(&repository, number)
}

fn wanted_of(repository: &Repository, number: usize) -> ingest::Result<Wanted> {
    let (vm, backups) = vm_of(repository, "web01");
    let backup = backups.iter().find(|backup| backup.time.stored() == time(number)).unwrap();
    Wanted::mirror(repository, &vm, backup)
}

fn vm_of(repository: &Repository, name: &str) -> (Vm, Arc<Vec<Arc<Backup>>>) {
    let vm = repository.vms().unwrap().iter().find(|vm| vm.name == name).cloned().unwrap();
    let backups = repository.backups(&vm.id).unwrap();
    (vm, backups)
}

fn empty() -> Arc<MemoryStorage> {
    let memory = Arc::new(MemoryStorage::with_power_cuts());
    WritableStorage::create_directory(&*memory, &path("xo-vm-backups")).unwrap();
    memory.sync_tree(&ObjectPath::root(), &memory.mark().unwrap()).unwrap();
    memory
}

/// Makes an empty repository an encrypted one.
fn encrypt(storage: &Arc<dyn WritableStorage>, key: &str) -> Arc<dyn WritableStorage> {
    let key = EncryptionKey::from_text(key).unwrap();
    EncryptedStorage::initialize(&**storage, &key, "8fd5b6a5-0d5c-4f0e-8d6b-0f1f3e2d1c0b").unwrap();
    decrypt(storage, key)
}

fn decrypt(storage: &Arc<dyn WritableStorage>, key: EncryptionKey) -> Arc<dyn WritableStorage> {
    EncryptedStorage::detect_writable(storage.clone(), Some(key)).unwrap()
}

fn destination(storage: &Arc<dyn WritableStorage>) -> RepositoryDestination {
    let repository = Repository::to_change(storage.clone().reader(), 0);
    RepositoryDestination { name: "repository".to_owned(), repository, storage: storage.clone(), quota: None }
}

fn mirror(wanted: &Wanted, storages: &[&Arc<dyn WritableStorage>]) -> ingest::Result<ingest::Report> {
    let destinations: Vec<Destination> =
        storages.iter().map(|storage| Destination::Repository(destination(storage))).collect();
    ingest::run(wanted, &destinations, &Watch::new(|_| ()))
}

/// What the backups of these numbers have, and nothing else.
fn files_of(numbers: &[usize]) -> Vec<String> {
    numbers.iter().flat_map(|number| ["json", "xva", "xva.checksum"].map(|end| file(*number, end))).collect()
}

/// The backups that are listed, by number, each of which is whole.
fn listed(storage: Arc<dyn Storage>, when: &str) -> Vec<usize> {
    let repository = Repository::with_storage(storage.clone(), OpenOptions { key: None, cache_bytes: 0 }).unwrap();
    let vms = repository.vms().unwrap();
    let Some(vm) = vms.first() else { return Vec::new() };
    let whole = |backup: &Arc<Backup>| {
        let number = (0..=LARGE).find(|number| time(*number) == backup.time.stored()).unwrap();
        let read = |end| storage.read(&path(&file(number, end)), u64::MAX).unwrap_or_else(|it| panic!("{when}: {it}"));
        assert!(read("xva") == xva(number), "{when}: backup {number} has other bytes");
        assert_eq!(String::from_utf8(read("xva.checksum")).unwrap(), checksum(&xva(number)), "{when}");
        number
    };
    repository.backups(&vm.id).unwrap().iter().map(whole).collect()
}

#[test]
fn a_mirror_of_a_full_backup_that_is_cut_off_anywhere_leaves_it_whole_or_nothing_and_the_next_one_cleans_up() {
    let source = source(&[1, 2, 3]);
    let mirror_of = |number, storage: &Arc<dyn WritableStorage>| {
        mirror(&wanted(source.clone(), number).unwrap(), &[storage])?.outcomes.remove(0).stored
    };
    for count in 0.. {
        let when = format!("cut after {count} changes");
        let memory = empty();
        let storage: Arc<dyn WritableStorage> = memory.clone();
        mirror_of(1, &storage).unwrap();
        memory.sync_tree(&ObjectPath::root(), &memory.mark().unwrap()).unwrap();
        let (storage, is_cut) = cut::until(&memory, count);
        let done = mirror_of(2, &storage);
        drop(storage);
        if !is_cut.load(Ordering::SeqCst) {
            done.unwrap_or_else(|error| panic!("{when}: {error}"));
            assert!(count > 15, "{when}: a mirror takes more steps");
            assert_eq!(files(&*memory), files_of(&[1, 2]), "{when}");
            break;
        }
        // What was not synced is lost, or half of it; or the program alone was killed.
        for (round, mut loss) in [Some(Loss::All), Some(Loss::Half), Some(Loss::None), None].into_iter().enumerate() {
            let when = format!("{when}, round {round}");
            let left = loss.take().map_or(memory.clone(), |loss| Arc::new(memory.after_power_cut(|| loss)));
            let _ = left.remove_directory(&path(&format!("xo-vm-backups/{VM}.lock")));
            let before = listed(left.clone(), &when);
            assert!(before == [1] || before == [1, 2], "{when}: {before:?}");
            assert!(done.is_err() || before.len() == 2, "{when}: it said that it was done");
            let storage: Arc<dyn WritableStorage> = left.clone();
            match mirror_of(2, &storage) {
                Err(error) => assert!(error.kind() == ErrorKind::Present && before.len() == 2, "{when}: {error}"),
                Ok(_) => assert_eq!(before, [1], "{when}"),
            }
            // One that is there already is not looked at, so the next one does what is left of the listing cache.
            mirror_of(3, &storage).unwrap_or_else(|error| panic!("{when}: {error}"));
            assert_eq!(listed(left.clone(), &when), [1, 2, 3], "{when}");
            assert_eq!(files(&*left), files_of(&[1, 2, 3]), "{when}");
        }
    }
}

#[test]
fn what_an_intent_names_is_left_alone_where_metadata_says_something_else() {
    let (memory, source) = (empty(), source(&[1, 2, 3]));
    let storage: Arc<dyn WritableStorage> = memory.clone();
    for number in [1, 2] {
        mirror(&wanted(source.clone(), number).unwrap(), &[&storage]).unwrap();
    }
    let metadata = |number| String::from_utf8(memory.read(&path(&file(number, "json")), u64::MAX).unwrap()).unwrap();
    // The metadata names another XVA; or there is none, and that of another time names it.
    memory.put(&file(1, "json"), metadata(1).replace(&time(1), &time(2))).unwrap();
    memory.put(&file(4, "json"), metadata(2)).unwrap();
    memory.remove(&file(2, "json")).unwrap();
    let intents = [1, 2].map(|number| format!("xo-vm-backups/{VM}/.{}.xofs-ingest", time(number)));
    for intent in &intents {
        memory.put(intent, "left").unwrap();
    }
    let before = files(&*memory);
    mirror(&wanted(source.clone(), 3).unwrap(), &[&storage]).unwrap();
    let mut expected = [before, files_of(&[3])].concat();
    expected.sort();
    assert_eq!(files(&*memory), expected);
}

#[test]
fn what_an_intent_names_is_left_alone_while_some_metadata_cannot_be_read() {
    let (memory, source) = (empty(), source(&[1, 3, 4]));
    let storage: Arc<dyn WritableStorage> = memory.clone();
    mirror(&wanted(source.clone(), 1).unwrap(), &[&storage]).unwrap();
    memory.remove(&file(1, "json")).unwrap();
    memory.put(&format!("xo-vm-backups/{VM}/.{}.xofs-ingest", time(1)), "left").unwrap();
    memory.put(&file(2, "json"), "{\"mode\":\"fu").unwrap();
    let before = files(&*memory);
    mirror(&wanted(source.clone(), 3).unwrap(), &[&storage]).unwrap();
    let mut expected = [before, files_of(&[3])].concat();
    expected.sort();
    assert_eq!(files(&*memory), expected);
    memory.remove(&file(2, "json")).unwrap();
    mirror(&wanted(source.clone(), 4).unwrap(), &[&storage]).unwrap();
    assert_eq!(files(&*memory), files_of(&[3, 4]));
}

#[test]
fn an_xva_that_cannot_be_read_to_its_end_or_is_not_what_was_written_leaves_nothing() {
    let whole = xva(1);
    let tar = |end: &[u8]| [vec![7; 4096 - 1024].as_slice(), end].concat();
    let mut flipped = whole.clone();
    flipped[2000] ^= 1;
    for (what, bytes, part) in [
        ("shorter than its metadata says", whole[..2900].to_vec(), "and its metadata says 3000: it is not whole"),
        ("with a byte that changed", flipped, "is damaged: the checksum of its bytes is $1$$"),
    ] {
        let source = source(&[1]);
        source.put(&file(1, "xva"), bytes).unwrap();
        refuses(&source, 1, what, part);
    }
    for (what, bytes, part) in [
        ("cut off", tar(&[7; 1024]), Some("is cut off: it does not end as a tar does")),
        ("cut off within a block", tar(&[0; 1000]), Some("is cut off: it does not end as a tar does")),
        ("tiny", vec![0x1f, 0x8b], Some("has 2 bytes: an XVA was expected")),
        ("whole", tar(&[0; 1024]), None),
    ] {
        let source = source(&[1]);
        let metadata = String::from_utf8(source.read(&path(&file(1, "json")), u64::MAX).unwrap()).unwrap();
        let size = format!("\"size\":{}", bytes.len());
        source.put(&file(1, "json"), metadata.replace("\"size\":3000", &size)).unwrap();
        // One without a checksum is believed.
        source.remove(&file(1, "xva.checksum")).unwrap();
        source.put(&file(1, "xva"), bytes).unwrap();
        match part {
            Some(part) => refuses(&source, 1, what, part),
            None => {
                let memory = empty();
                let storage: Arc<dyn WritableStorage> = memory.clone();
                mirror(&wanted(source, 1).unwrap(), &[&storage]).unwrap();
                assert_eq!(files(&*memory), files_of(&[1]), "{what}");
            }
        }
    }
    let missing = source(&[1]);
    missing.remove(&file(1, "xva")).unwrap();
    refuses(&missing, 1, "missing", &format!("open '{}'", file(1, "xva")));
}

#[test]
fn an_xva_that_ends_or_fails_while_it_is_copied_leaves_nothing() {
    // The source, of which the read of its XVA after `count` others meets a fault; and how many there were.
    let with_fault = |fault, count| {
        let faulty = FaultyStorage::new(source(&[LARGE]));
        let reads = Arc::new(AtomicU64::new(0));
        let seen = reads.clone();
        faulty.set_rule(move |operation, path| {
            let is_read = operation == Operation::ReadAt && path.file_name().ends_with(".xva");
            (is_read && reads.fetch_add(1, Ordering::SeqCst) == count).then_some(fault)
        });
        (Arc::new(faulty), seen)
    };
    let (whole, reads) = with_fault(Fault::Short, u64::MAX);
    let storage: Arc<dyn WritableStorage> = empty();
    mirror(&wanted(whole, LARGE).unwrap(), &[&storage]).unwrap();
    let last = reads.load(Ordering::SeqCst) - 1;
    for (fault, part) in [
        (Fault::Errno(5), "cannot be read at byte 4194304: "),
        (Fault::Short, "ends at byte 4718596, and had 5242889: somebody writes to it"),
    ] {
        refuses(&with_fault(fault, last).0, LARGE, "the last read", part);
    }
}

#[test]
fn a_mirror_that_is_stopped_removes_what_was_written() {
    for is_encrypted in [false, true] {
        let (memory, watch) = (empty(), Arc::new(Watch::new(|_| ())));
        if is_encrypted {
            drop(encrypt(&(memory.clone() as _), KEY));
        }
        let before = files(&*memory);
        let (faulty, stopped) = (FaultyStorage::new(memory.clone()), watch.clone());
        faulty.set_rule(move |operation, _| {
            if operation == Operation::WriteAt {
                stopped.cancel();
            }
            None
        });
        let key = is_encrypted.then(|| EncryptionKey::from_text(KEY).unwrap());
        let storage = EncryptedStorage::detect_writable(Arc::new(faulty), key).unwrap();
        let wanted = wanted(source(&[LARGE]), LARGE).unwrap();
        let Err(error) = ingest::run(&wanted, &[Destination::Repository(destination(&storage))], &watch) else {
            panic!("it went on")
        };
        assert_eq!(error.kind(), ErrorKind::Interrupted, "{error}");
        assert_eq!(files(&*memory), before);
    }
}

fn refuses<S: Storage + 'static>(source: &Arc<S>, number: usize, what: &str, part: &str) {
    let memory = empty();
    let storage: Arc<dyn WritableStorage> = memory.clone();
    let refused = wanted(source.clone(), number).and_then(|wanted| mirror(&wanted, &[&storage]));
    let Err(error) = refused else { panic!("{what}: it was mirrored") };
    let message = error.to_string();
    assert!(error.kind() == ErrorKind::Source && message.contains(part), "{what}: {message}");
    assert!(message.contains(&file(number, "xva")), "{what}: {message}");
    assert_eq!(files(&*memory), [""; 0], "{what}");
}

#[test]
fn a_destination_that_fails_is_given_up_and_the_others_are_right() {
    let (good, full, bad) = (empty(), empty(), empty());
    let faulty = FaultyStorage::new(bad.clone());
    faulty.set_rule(|operation, path| {
        let is_met = operation == Operation::WriteAt && path.file_name().ends_with(".xva.xofs-new");
        is_met.then_some(Fault::Error(storage::ErrorKind::NoSpace))
    });
    let storages: [Arc<dyn WritableStorage>; 3] = [Arc::new(faulty), good.clone(), full.clone()];
    let mut destinations = storages.each_ref().map(destination);
    destinations[2].quota = Some(4 << 20);
    let destinations = destinations.map(Destination::Repository);
    let source = source(&[LARGE]);
    let watch = Watch::new(|_| ());
    let report = ingest::run(&wanted(source.clone(), LARGE).unwrap(), &destinations, &watch).unwrap();
    let errors = report.outcomes.iter().map(|outcome| outcome.stored.as_ref().map(|_| ()).map_err(ToString::to_string));
    let [bad_said, good_said, full_said]: [Result<(), String>; 3] = errors.collect::<Vec<_>>().try_into().unwrap();
    assert!(bad_said.as_ref().unwrap_err().contains(".xva.xofs-new"), "{bad_said:?}");
    assert!(
        full_said.as_ref().unwrap_err().contains("about 6 MiB are to come, and 4 MiB are allowed"),
        "{full_said:?}"
    );
    assert_eq!(good_said, Ok(()));
    assert_eq!(listed(good.clone(), "good"), [LARGE]);
    for memory in [bad, full] {
        assert_eq!(files(&*memory), [""; 0]);
    }
    // What is not said of this repository is the same letter by letter.
    let metadata = |memory: &MemoryStorage| {
        String::from_utf8(memory.read(&path(&file(LARGE, "json")), u64::MAX).unwrap()).unwrap()
    };
    let expected = metadata(&source).replace("\"job\"", &json!(ingest::JOB).to_string());
    assert_eq!(metadata(&good), expected.replace("\"schedule\"", &json!(ingest::SCHEDULE).to_string()));
    let stored = report.outcomes[1].stored.as_ref().unwrap();
    let xva = stored.xva.as_ref().unwrap();
    assert_eq!((xva.path.as_str(), xva.bytes), (format!("./{}.xva", time(LARGE)).as_str(), 5 * MIB as u64 + 9));
    assert_eq!(watch.progress(), (xva.bytes, xva.bytes));
    let moved = |stage| {
        let of = report.transfer.stages.iter().filter(move |reading| reading.stage == stage);
        of.map(|reading| (reading.of.name.as_str(), reading.bytes)).collect::<Vec<_>>()
    };
    assert_eq!([Stage::Read, Stage::Hash].map(|stage| report.transfer.bytes(stage)), [xva.bytes; 2]);
    // By each destination; the first one failed.
    assert!(moved(Stage::Write).contains(&(report.outcomes[1].name.as_str(), xva.bytes)), "{:?}", moved(Stage::Write));
    assert!(moved(Stage::Sync).contains(&(report.outcomes[1].name.as_str(), xva.bytes)), "{:?}", moved(Stage::Sync));
    // Where none is left, nothing was done.
    let Err(error) = mirror(
        &Wanted { reserve: Reserve { bytes: Some(u64::MAX), is_option: true }, ..wanted(source, LARGE).unwrap() },
        &[&storages[2]],
    ) else {
        panic!("there is no room")
    };
    assert!(error.kind() == ErrorKind::NoRoom && error.to_string().contains("about 6 MiB are needed, "), "{error}");
}

#[test]
fn what_has_no_meaning_for_an_xva_is_refused() {
    let (storage, source): (Arc<dyn WritableStorage>, _) = (empty(), source(&[1]));
    for change in [
        |wanted: &mut Wanted| wanted.layout = Some(Layout::File),
        |wanted: &mut Wanted| wanted.extent = Some(Extent::Incremental),
    ] {
        let mut wanted = wanted(source.clone(), 1).unwrap();
        change(&mut wanted);
        let Err(error) = mirror(&wanted, &[&storage]) else { panic!("it was mirrored") };
        assert!(error.kind() == ErrorKind::Usage && error.to_string().contains("is stored as it is"), "{error}");
    }
    // It is stored in full anyway.
    let wanted = Wanted { extent: Some(Extent::Full), ..wanted(source, 1).unwrap() };
    mirror(&wanted, &[&storage]).unwrap();
}

#[test]
fn an_xva_that_is_too_long_for_memory_is_mirrored_to_and_from_encrypted_repositories() {
    let [one, other, plain, back, again]: [Arc<dyn WritableStorage>; 5] = std::array::from_fn(|_| empty() as _);
    let (one, other) = (encrypt(&one, KEY), encrypt(&other, OTHER_KEY));
    let of = |storage: &Arc<dyn WritableStorage>| wanted_of(&destination(storage).repository, HUGE).unwrap();
    mirror(&wanted(source(&[HUGE]), HUGE).unwrap(), &[&one, &plain]).unwrap();
    mirror(&of(&one), &[&other, &back]).unwrap();
    mirror(&of(&other), &[&again]).unwrap();
    let expected = xva(HUGE);
    for (name, storage) in [("one", one), ("other", other), ("plain", plain), ("back", back), ("again", again)] {
        let read = |end| storage.read(&path(&file(HUGE, end)), u64::MAX);
        assert!(read("xva").unwrap() == expected, "{name}");
        let beside = read("xva.checksum").ok().map(|text| String::from_utf8(text).unwrap());
        let has_one = storage.capabilities().ranged_reads;
        assert_eq!(beside, has_one.then(|| checksum(&expected)), "{name}");
        assert!(files(&*storage.reader()).iter().all(|file| !file.contains("xofs")), "{name}");
    }
}

#[test]
fn an_encrypted_xva_with_a_byte_that_changed_anywhere_is_mirrored_nowhere() {
    let memory = empty();
    let storage: Arc<dyn WritableStorage> = memory.clone();
    let encrypted = encrypt(&storage, KEY);
    mirror(&wanted(source(&[HUGE]), HUGE).unwrap(), &[&encrypted]).unwrap();
    let name = file(HUGE, "xva");
    let stored = memory.read(&path(&name), u64::MAX).unwrap();
    let end = stored.len();
    // In the nonce, the first bytes, a piece, the last bytes and the tag.
    for at in [0, 12, 30 * MIB, end - 17, end - 16, end - 1] {
        let mut changed = stored.clone();
        changed[at] ^= 1;
        memory.put(&name, changed).unwrap();
        let [to, other] = [empty(), empty()];
        let plain: Arc<dyn WritableStorage> = to.clone();
        let sealed = encrypt(&(other.clone() as _), OTHER_KEY);
        let before = files(&*other);
        let wanted = wanted_of(&destination(&encrypted).repository, HUGE).unwrap();
        let Err(error) = mirror(&wanted, &[&plain, &sealed]) else { panic!("byte {at}: it was mirrored") };
        let message = error.to_string();
        assert_eq!(error.kind(), ErrorKind::Source, "byte {at}: {message}");
        assert!(message.contains(&name) && message.contains("its authentication tag does not match"), "{message}");
        assert_eq!((files(&*to), files(&*other)), (Vec::new(), before), "byte {at}");
    }
    for (what, changed) in [("cut", stored[..end - 1].to_vec()), ("longer", [&stored[..], &[0]].concat())] {
        memory.put(&name, changed).unwrap();
        let refused = wanted_of(&destination(&encrypted).repository, HUGE);
        let Err(error) = refused else { panic!("{what}: it was mirrored") };
        let message = error.to_string();
        assert!(message.contains(&name) && message.contains("it is not whole"), "{what}: {message}");
    }
}

#[test]
fn an_encrypted_tar_that_does_not_end_as_one_leaves_nothing() {
    let tar = |end: &[u8]| [vec![7; 3 * MIB - 1024].as_slice(), end].concat();
    for (bytes, is_whole) in [(tar(&[7; 1024]), false), (tar(&[0; 1000]), false), (tar(&[0; 1024]), true)] {
        let (storage, to): (Arc<dyn WritableStorage>, _) = (empty(), empty());
        let encrypted = encrypt(&storage, KEY);
        mirror(&wanted(source(&[1]), 1).unwrap(), &[&encrypted]).unwrap();
        encrypted.write(&path(&file(1, "xva")), &bytes, storage::Existing::Replace).unwrap();
        let metadata = String::from_utf8(encrypted.read(&path(&file(1, "json")), u64::MAX).unwrap()).unwrap();
        let metadata = metadata.replace("\"size\":3000", &format!("\"size\":{}", bytes.len()));
        encrypted.write(&path(&file(1, "json")), metadata.as_bytes(), storage::Existing::Replace).unwrap();
        let done = wanted_of(&destination(&encrypted).repository, 1).and_then(|it| mirror(&it, &[&(to.clone() as _)]));
        match done {
            Ok(_) => assert!(is_whole && files(&*to) == files_of(&[1]), "{} bytes", bytes.len()),
            Err(error) => {
                assert!(!is_whole && error.to_string().contains("it does not end as a tar does"), "{error}");
                assert_eq!((error.kind(), files(&*to)), (ErrorKind::Source, Vec::new()), "{} bytes", bytes.len());
            }
        }
    }
}

#[test]
fn an_encrypted_mirror_that_is_cut_off_anywhere_leaves_it_whole_or_nothing_and_the_next_one_cleans_up() {
    let source = source(&[1, LARGE]);
    let key = || EncryptionKey::from_text(KEY).unwrap();
    let mirror_of = |number, storage: &Arc<dyn WritableStorage>| {
        mirror(&wanted(source.clone(), number).unwrap(), &[storage])?.outcomes.remove(0).stored
    };
    let expected = xva(LARGE);
    // Whether it is there, as it must be then.
    let is_there = |storage: &Arc<dyn WritableStorage>, when: &str| {
        let vms = destination(storage).repository.vms().unwrap();
        let is_it = !vms.is_empty() && {
            let (_, backups) = vm_of(&destination(storage).repository, "web01");
            backups.iter().any(|backup| backup.time.stored() == time(LARGE))
        };
        assert!(!is_it || storage.read(&path(&file(LARGE, "xva")), u64::MAX).unwrap() == expected, "{when}");
        is_it
    };
    for count in 0.. {
        let when = format!("cut after {count} changes");
        let memory = empty();
        let storage: Arc<dyn WritableStorage> = memory.clone();
        drop(encrypt(&storage, KEY));
        memory.sync_tree(&ObjectPath::root(), &memory.mark().unwrap()).unwrap();
        let (storage, is_cut) = cut::until(&memory, count);
        let done = mirror_of(LARGE, &decrypt(&storage, key()));
        drop(storage);
        if !is_cut.load(Ordering::SeqCst) {
            done.unwrap_or_else(|error| panic!("{when}: {error}"));
            assert!(count > 15, "{when}: a mirror takes more steps");
            break;
        }
        for (round, mut loss) in [Some(Loss::All), Some(Loss::Half), Some(Loss::None), None].into_iter().enumerate() {
            let when = format!("{when}, round {round}");
            let left = loss.take().map_or(memory.clone(), |loss| Arc::new(memory.after_power_cut(|| loss)));
            let _ = left.remove_directory(&path(&format!("xo-vm-backups/{VM}.lock")));
            let storage: Arc<dyn WritableStorage> = left.clone();
            let storage = decrypt(&storage, key());
            let was_there = is_there(&storage, &when);
            assert!(done.is_err() || was_there, "{when}: it said that it was done");
            match mirror_of(LARGE, &storage) {
                Err(error) => assert!(error.kind() == ErrorKind::Present && was_there, "{when}: {error}"),
                Ok(_) => assert!(!was_there, "{when}"),
            }
            mirror_of(1, &storage).unwrap_or_else(|error| panic!("{when}: {error}"));
            assert!(is_there(&storage, &when), "{when}");
            let mut files = files(&*left);
            files.retain(|file| file.starts_with("xo-vm-backups"));
            let of_both = [1, LARGE].map(|number| ["json", "xva"].map(|end| file(number, end)));
            assert_eq!(files, of_both.concat(), "{when}");
        }
    }
}

#[test]
fn an_xva_that_is_longer_than_the_encryption_protects_is_refused_before_anything_is_written() {
    const SIZE: u64 = 256 << 30;
    // Holes, which end as a tar does.
    let place = folder();
    let of_vm = place.path().join("xo-vm-backups").join(VM);
    fs::create_dir_all(&of_vm).unwrap();
    let metadata = source(&[1]).read(&path(&file(1, "json")), u64::MAX).unwrap();
    let metadata = String::from_utf8(metadata).unwrap().replace("\"size\":3000", &format!("\"size\":{SIZE}"));
    fs::write(place.path().join(file(1, "json")), metadata).unwrap();
    fs::File::create(place.path().join(file(1, "xva"))).unwrap().set_len(SIZE).unwrap();
    let storage: Arc<dyn WritableStorage> = empty();
    let encrypted = encrypt(&storage, KEY);
    let before = files(&*storage.clone().reader());
    let Err(error) = mirror(&wanted_of(&open(place.path(), false), 1).unwrap(), &[&encrypted]) else {
        panic!("it was mirrored")
    };
    let message = error.to_string();
    assert!(error.kind() == ErrorKind::Usage && message.contains("it has 274877906944 bytes"), "{message}");
    assert_eq!(files(&*storage.reader()), before);
}

fn folder() -> TempDir {
    tempfile::Builder::new().prefix("full-").tempdir_in(scratch()).expect("a folder")
}

fn open(place: &Path, is_encrypted: bool) -> Arc<Repository> {
    let key = is_encrypted.then(|| EncryptionKey::from_text(KEY).unwrap());
    Repository::open(place, OpenOptions { key, cache_bytes: 0 }).unwrap()
}

/// The full backups of a repository, oldest first.
fn fulls(repository: &Repository) -> Vec<Arc<Backup>> {
    let all = repository.all_backups().unwrap().into_iter().flat_map(|(_, backups)| backups.unwrap().to_vec());
    all.filter(|backup| backup.mode == Mode::Full).collect()
}

fn document(repository: &Repository, backup: &Backup) -> Value {
    serde_json::from_slice(&repository.backup_metadata(backup).unwrap()).unwrap()
}

fn bytes_of(repository: &Repository, backup: &Backup) -> Vec<u8> {
    let name = document(repository, backup)["xva"].as_str().unwrap().to_owned();
    repository.read_stored(&backup.metadata.parent().resolve(&name).unwrap()).unwrap()
}

#[test]
fn a_mirrored_full_backup_is_the_same_but_for_where_it_lies_also_encrypted_and_mirrored_back() {
    let (main, folder) = (fixture("main").join("repo"), folder());
    let places = [
        (main.clone(), false),
        (init(folder.path(), "plain", &[]), false),
        (init(folder.path(), "encrypted", &["--encrypted"]), true),
        (init(folder.path(), "back", &[]), false),
    ];
    let source = open(&main, false);
    // As they are, and compressed in each way.
    let mut magics = fulls(&source).iter().map(|it| bytes_of(&source, it)[..2].to_vec()).collect::<Vec<_>>();
    magics.sort();
    magics.dedup();
    assert_eq!(magics.len(), 3, "{magics:x?}");
    let command = |from: &Path, to: &[&Path], backup: &Backup| {
        let what = format!("{}/{}", backup.vm, backup.time);
        let mut command = xofs();
        command.arg("ingest").arg(to[0]).arg("--from").arg(from).args(["--backup", &what, "--json"]);
        command.args(to[1..].iter().flat_map(|to| [OsStr::new("--to"), to.as_os_str()]));
        command.env("XOFS_PASSWORD", KEY);
        command
    };
    for backup in fulls(&source) {
        let two = [places[1].0.as_path(), &places[2].0];
        let told: Value = serde_json::from_str(&succeed(&mut command(&main, &two, &backup))).unwrap();
        let bytes = bytes_of(&source, &backup);
        let expected = json!({
            "path": format!("./{}.xva", backup.time.stored()), "bytes": bytes.len(), "checksum": checksum(&bytes),
        });
        for repository in told["repositories"].as_array().unwrap() {
            assert_eq!((&repository["xva"], &repository["disks"]), (&expected, &json!([])), "{told}");
        }
        // What is there is not mirrored again.
        let (code, out, err) = run(&mut command(&main, &two, &backup));
        assert!(code == 0 && err.contains("is there already"), "{code} {err}");
        let again: Value = serde_json::from_str(&out).unwrap();
        assert_eq!((&again["time"], &again["repositories"][0]["isPresent"]), (&told["time"], &json!(true)));
        succeed(&mut command(&places[2].0, &[&places[3].0], &backup));
    }
    for (place, is_encrypted) in &places[1..] {
        let mirrored = open(place, *is_encrypted);
        let copies = fulls(&mirrored);
        assert_eq!(copies.len(), fulls(&source).len(), "{}", place.display());
        for (backup, copy) in fulls(&source).iter().zip(&copies) {
            let bytes = bytes_of(&mirrored, copy);
            assert!(bytes == bytes_of(&source, backup), "{}: {}", place.display(), copy.time);
            let labels = |backup: &Backup| {
                backup.disks.iter().map(|disk| (disk.name.clone(), disk.label.clone())).collect::<Vec<_>>()
            };
            assert_eq!((copy.time, copy.timestamp, labels(copy)), (backup.time, backup.timestamp, labels(backup)));
            let (old, mut new) = (document(&source, backup), document(&mirrored, copy));
            assert_eq!(new["jobId"], ingest::JOB);
            assert_eq!(new["scheduleId"], ingest::SCHEDULE);
            assert_eq!(new["size"], bytes.len());
            for field in ["jobId", "scheduleId"] {
                new[field] = old[field].clone();
            }
            assert_eq!(new, old);
            let beside = place.join(copy.metadata.as_str()).with_extension("xva.checksum");
            assert_eq!(fs::read_to_string(beside).ok(), (!is_encrypted).then(|| checksum(&bytes)));
        }
        let (code, out, err) = run(xofs().arg("check").arg(place).env("XOFS_PASSWORD", KEY));
        // Disks of one that is compressed or encrypted as a whole are not read.
        assert!(code == 3 && out.contains("no damage found"), "{code} {out}{err}");
    }
}

#[test]
fn a_mirrored_full_backup_takes_the_options_that_fit_it_and_retention_forgets_older_ones() {
    let (copy, folder) = (copy_of(&fixture("main").join("repo")), folder());
    let main = copy.path();
    let place = init(folder.path(), "place", &[]);
    let source = open(main, false);
    let newest = fulls(&source).pop().unwrap();
    // Twice, the second time as one of the day after.
    let time = newest.time.stored();
    let later = time.replacen("2026", "2027", 1);
    let folder_of_vm = main.join(newest.metadata.parent().as_str());
    let metadata = fs::read_to_string(folder_of_vm.join(format!("{time}.json"))).unwrap();
    fs::write(
        folder_of_vm.join(format!("{later}.json")),
        metadata.replace(&format!("{time}.xva"), &format!("{later}.xva")),
    )
    .unwrap();
    for end in ["xva", "xva.checksum"] {
        fs::copy(folder_of_vm.join(format!("{time}.{end}")), folder_of_vm.join(format!("{later}.{end}"))).unwrap();
    }
    let _ = fs::remove_file(folder_of_vm.join("cache.json.gz"));
    let command = |time: &str, arguments: &[&str]| {
        let mut command = xofs();
        command.arg("ingest").arg(&place).arg("--from").arg(main).args(["--backup", &format!("{}/{time}", newest.vm)]);
        run(command.args(arguments))
    };
    for arguments in [&["--format", "vhd"][..], &["--compression", "brotli"], &["--incremental"]] {
        let (code, _, err) = command(&time, arguments);
        assert!(code == 2 && err.contains("leave --format, --compression and --incremental out"), "{code} {err}");
    }
    // An older one may come after a newer one: nothing is built on it.
    let job = ["--job", "mirror", "--schedule", "nightly"];
    for time in [&later, &time] {
        let (code, out, err) = command(time, &job);
        assert!(code == 0 && out.contains("full, an XVA") && out.contains(" read in "), "{code} {out}{err}");
    }
    let mirrored = || fulls(&open(&place, false)).iter().map(|backup| backup.time.stored()).collect::<Vec<_>>();
    assert_eq!(mirrored(), [time.clone(), later.clone()]);
    fs::remove_file(place.join(newest.metadata.parent().as_str()).join(format!("{later}.json"))).unwrap();
    let (code, _, err) = command(&later, &job);
    assert!(code == 1 && err.contains(&format!("{later}.xva' is there already, though no backup")), "{code} {err}");
    for end in ["xva", "xva.checksum"] {
        fs::remove_file(place.join(newest.metadata.parent().as_str()).join(format!("{later}.{end}"))).unwrap();
    }
    let (code, out, err) = command(&later, &[&job[..], &["--keep-last", "1"]].concat());
    assert!(code == 0, "{code} {out}{err}");
    assert_eq!(mirrored(), std::slice::from_ref(&later));
    let left = fs::read_dir(place.join(newest.metadata.parent().as_str())).unwrap();
    let mut left: Vec<_> = left.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    left.retain(|name| name != "cache.json.gz");
    left.sort();
    assert_eq!(left, ["json", "xva", "xva.checksum"].map(|end| format!("{later}.{end}")));
}

#[test]
fn a_new_backup_has_the_network_of_the_last_one_that_says_it() {
    let (copy, folder) = (copy_of(&fixture("main").join("repo")), folder());
    let repository = open(copy.path(), false);
    let (vm, backups) = vm_of(&repository, "web01");
    let newest = backups.iter().rfind(|backup| backup.mode == Mode::Incremental).unwrap();
    let said = document(&repository, newest);
    assert!(said["vifs"].as_object().is_some_and(|vifs| !vifs.is_empty()), "{said}");
    // A full backup says nothing of it.
    let full = json!({"mode": "full", "version": "2.0.0", "vm": said["vm"], "xva": "./20270101T000000Z.xva"});
    let of_vm = copy.path().join(newest.metadata.parent().as_str());
    fs::write(of_vm.join("20270101T000000Z.json"), full.to_string()).unwrap();
    let image = folder.path().join("image.raw");
    fs::write(&image, "an image").unwrap();
    let disk = format!("xvda={}", image.display());
    succeed(xofs().arg("ingest").arg(copy.path()).args([
        "--vm",
        vm.id.as_str(),
        "--disk",
        &disk,
        "--time",
        "2027-01-02T00:00:00Z",
    ]));
    let repository = open(copy.path(), false);
    let (_, backups) = vm_of(&repository, "web01");
    let made = backups.iter().rfind(|backup| backup.mode == Mode::Incremental).unwrap();
    assert!(made.time != newest.time);
    assert_eq!(document(&repository, made)["vifs"], said["vifs"]);
}
