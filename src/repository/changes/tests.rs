use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use serde_json::{Value, json};
use storage::{
    EncryptedStorage, EncryptionKey, Existing, Fault, FaultyStorage, Loss, MemoryStorage, Operation, Storage,
};

use super::*;
use crate::repository::tests::VM;
use crate::repository::{OpenOptions, Repository, VmId};

fn vm() -> VmId {
    VmId::new(VM).unwrap()
}

fn time(day: u32) -> BackupTime {
    BackupTime::parse(&format!("202608{day:02}T020003Z")).unwrap()
}

fn path(name: &str) -> ObjectPath {
    ObjectPath::new(&format!("{VM_FOLDER}/{VM}/{name}")).unwrap()
}

fn file(day: u32) -> ObjectPath {
    path(&format!("{}.json", time(day).stored()))
}

/// Numbers, order and spelling as no parser of ours would give them back.
fn metadata(size: u32) -> String {
    format!(
        r#"{{"vm":{{"name_label":"web01"}},"mode":"delta","size":{size},"x":[1e+21,18446744073709552000,-0],"a":"\u00e9"}}"#
    )
}

fn raw(text: &str) -> Box<RawValue> {
    RawValue::from_string(text.to_owned()).unwrap()
}

fn key(is_encrypted: bool) -> Option<EncryptionKey> {
    is_encrypted.then(|| EncryptionKey::from_text("73c1838d7d8a6088ca2317fb5f29cd91").unwrap())
}

/// What the memory holds, as it is written and read through whatever encrypts it.
fn decrypting(memory: Arc<dyn WritableStorage>, is_encrypted: bool) -> Arc<dyn WritableStorage> {
    EncryptedStorage::detect_writable(memory, key(is_encrypted)).unwrap()
}

fn gzip(text: &str) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), Compression::fast());
    encoder.write_all(text.as_bytes()).unwrap();
    encoder.finish().unwrap()
}

/// A cache of some days as a full listing of XO makes it, newest first, with a field that nobody knows.
fn cache_of(days: &[u32]) -> String {
    let entry = |day: &u32| {
        let (key, metadata) = (cache_key(&file(*day)), metadata(*day));
        let fields = metadata.strip_suffix('}').unwrap();
        format!(r#""{key}":{fields},"_filename":"{key}","isImmutable":false,"id":"{key}"}}"#)
    };
    format!("{{{}}}", days.iter().rev().map(entry).collect::<Vec<_>>().join(","))
}

/// A repository with backups of these days, and with a cache of this text.
fn repository(is_encrypted: bool, days: &[u32], cache: Option<&str>) -> MemoryStorage {
    let memory = Arc::new(MemoryStorage::with_power_cuts());
    memory.create_directory("xo-config-backups").unwrap();
    if let Some(key) = key(is_encrypted) {
        EncryptedStorage::initialize(&*memory, &key, "01234567-89ab-4cde-8f01-23456789abcd").unwrap();
    }
    let storage = decrypting(memory.clone(), is_encrypted);
    if !days.is_empty() {
        create_directories(&*storage, &file(1).parent()).unwrap();
    }
    for day in days {
        storage.write(&file(*day), metadata(*day).as_bytes(), Existing::Refuse).unwrap();
    }
    if let Some(text) = cache {
        storage.write(&path(cache::NAME), &gzip(text), Existing::Refuse).unwrap();
    }
    memory.sync_tree(&ObjectPath::root(), &memory.mark().unwrap()).unwrap();
    memory.after_power_cut(|| Loss::None)
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Change {
    Add(u32),
    Remove(u32),
    Rewrite(u32, u32),
}

impl Change {
    fn make(self, storage: &Arc<dyn WritableStorage>) -> Result<()> {
        let lock = VmLock::seize(storage.clone(), &vm());
        self.make_under(&lock)
    }

    fn make_under(self, lock: &VmLock) -> Result<()> {
        let folder = VmFolder::new(lock)?;
        match self {
            Self::Add(day) => folder.add(time(day), &raw(&metadata(day))),
            Self::Remove(day) => folder.remove(time(day)),
            Self::Rewrite(day, size) => folder.rewrite(time(day), &raw(&metadata(size))),
        }
    }

    /// Makes it of metadata by the names of files.
    fn apply(self, backups: &mut BTreeMap<String, String>) {
        match self {
            Self::Add(day) => drop(backups.insert(file(day).file_name().to_owned(), metadata(day))),
            Self::Remove(day) => drop(backups.remove(file(day).file_name())),
            Self::Rewrite(day, size) => drop(backups.insert(file(day).file_name().to_owned(), metadata(size))),
        }
    }
}

fn backups_of(days: &[u32]) -> BTreeMap<String, String> {
    days.iter().map(|day| (file(*day).file_name().to_owned(), metadata(*day))).collect()
}

/// Returns the backups that the reading side lists, and their metadata.
fn listed(memory: &Arc<MemoryStorage>, is_encrypted: bool) -> BTreeMap<String, String> {
    let options = OpenOptions { key: key(is_encrypted), ..OpenOptions::default() };
    let repository = Repository::with_storage(memory.clone(), options).unwrap();
    let backups = match repository.backups(&vm()) {
        Err(error) if error.kind() == ErrorKind::NotFound => return BTreeMap::new(),
        backups => backups.unwrap(),
    };
    let listed = backups.iter().map(|backup| {
        let metadata = String::from_utf8(repository.backup_metadata(backup).unwrap()).unwrap();
        let size = serde_json::from_str::<Value>(&metadata).unwrap()["size"].as_u64();
        assert_eq!(Some(backup.size), size, "what is listed is not what is stored");
        (backup.metadata.file_name().to_owned(), metadata)
    });
    listed.collect()
}

/// Returns what XO lists, which believes any cache that it can parse: metadata by the names of files.
fn believed(storage: &dyn Storage) -> Option<BTreeMap<String, Value>> {
    let packed = storage.read(&path(cache::NAME), 1 << 20).ok()?;
    let mut text = Vec::new();
    MultiGzDecoder::new(&*packed).read_to_end(&mut text).ok()?;
    let entries: BTreeMap<String, Value> = serde_json::from_slice(&text).ok()?;
    let named = entries.into_iter().map(|(key, mut entry)| {
        let fields = entry.as_object_mut().unwrap();
        assert_eq!(fields.remove("_filename").unwrap(), json!(key));
        assert_eq!(fields.remove("id").unwrap(), json!(key));
        fields.remove("isImmutable");
        (key.strip_prefix(&format!("/{VM_FOLDER}/{VM}/")).unwrap().to_owned(), entry)
    });
    Some(named.collect())
}

/// Asserts that XO, if it finds a cache, sees what there is; it may already miss the backup that is being removed.
fn assert_not_misled(storage: &dyn Storage, backups: &BTreeMap<String, String>, change: Change, context: &str) {
    let Some(seen) = believed(storage) else { return };
    let mut there: BTreeMap<String, Value> =
        backups.iter().map(|(name, metadata)| (name.clone(), serde_json::from_str(metadata).unwrap())).collect();
    if let (Change::Remove(day), true) = (change, seen.len() < there.len()) {
        there.remove(file(day).file_name());
    }
    assert_eq!(seen, there, "{context}");
}

fn cache_text(storage: &dyn Storage) -> Option<String> {
    let packed = storage.read(&path(cache::NAME), 1 << 20).ok()?;
    assert_eq!(packed[..10], [0x1f, 0x8b, 8, 0, 0, 0, 0, 0, 0, 3], "as Node's zlib begins it");
    let mut text = String::new();
    MultiGzDecoder::new(&*packed).read_to_string(&mut text).unwrap();
    Some(text)
}

#[test]
fn the_cache_is_carried_on_letter_by_letter() {
    let new = |day: u32, size: u32| {
        let (key, metadata) = (cache_key(&file(day)), metadata(size));
        format!(r#""{key}":{},"_filename":"{key}","id":"{key}"}}"#, metadata.strip_suffix('}').unwrap())
    };
    let before = cache_of(&[1, 2, 3]);
    let old = |day: u32| cache_of(&[day]).trim_start_matches('{').strip_suffix('}').unwrap().to_owned();
    for (change, expected) in [
        (Change::Add(4), format!("{},{}}}", before.strip_suffix('}').unwrap(), new(4, 4))),
        (Change::Rewrite(2, 22), format!("{{{},{},{}}}", old(3), new(2, 22), old(1))),
        (Change::Remove(2), format!("{{{},{}}}", old(3), old(1))),
        (Change::Remove(9), before.clone()),
    ] {
        for is_encrypted in [false, true] {
            let memory = Arc::new(repository(is_encrypted, &[1, 2, 3], Some(&before)));
            let storage = decrypting(memory.clone(), is_encrypted);
            change.make(&storage).unwrap();
            assert_eq!(cache_text(&*storage).unwrap(), expected, "{change:?}");
            let mut backups = backups_of(&[1, 2, 3]);
            change.apply(&mut backups);
            assert_eq!(listed(&memory, is_encrypted), backups, "{change:?}");
        }
    }
}

#[test]
fn our_own_listing_believes_the_cache_that_was_written() {
    let days = [1, 2, 3, 4, 5];
    for change in [Change::Add(6), Change::Rewrite(5, 55), Change::Remove(1)] {
        let memory = Arc::new(repository(false, &days, Some(&cache_of(&days))));
        change.make(&decrypting(memory.clone(), false)).unwrap();
        let faulty = Arc::new(FaultyStorage::<dyn Storage>::new(memory));
        let repository = Repository::with_storage(faulty.clone(), OpenOptions::default()).unwrap();
        repository.backups(&vm()).unwrap();
        assert_eq!(faulty.count(Operation::Read), 2, "{change:?}: encryption.json and the cache");
    }
}

#[test]
fn a_cache_that_is_missing_or_disagrees_is_not_carried_on() {
    let broken = "{\"";
    let other = cache_of(&[1, 2, 3]).replace(VM, "other");
    for (why, cache) in [
        ("there is none", None),
        ("one is missing", Some(cache_of(&[1, 2]))),
        ("one is too many", Some(cache_of(&[1, 2, 3, 7]))),
        ("one is another", Some(cache_of(&[1, 2, 7]))),
        ("it is no JSON", Some(broken.to_owned())),
        ("it is of another VM", Some(other)),
        ("it is no object", Some("[]".to_owned())),
    ] {
        for change in [Change::Add(4), Change::Rewrite(3, 33), Change::Remove(3)] {
            if (why, change) == ("one is missing", Change::Remove(3)) {
                // What a removal leaves that was interrupted.
                continue;
            }
            let memory = Arc::new(repository(false, &[1, 2, 3], cache.as_deref()));
            let storage = decrypting(memory.clone(), false);
            change.make(&storage).unwrap();
            assert_eq!(storage.stat(&path(cache::NAME)).unwrap_err().kind(), storage::ErrorKind::NotFound, "{why}");
            let mut backups = backups_of(&[1, 2, 3]);
            change.apply(&mut backups);
            assert_eq!(listed(&memory, false), backups, "{why}: {change:?}");
        }
    }
}

#[test]
fn a_second_is_given_to_one_backup_only() {
    let memory = Arc::new(repository(false, &[1], None));
    let storage = decrypting(memory.clone(), false);
    let lock = VmLock::seize(storage, &vm());
    let folder = VmFolder::new(&lock).unwrap();
    assert_eq!(folder.add(time(1), &json!({ "another": 1 })).unwrap_err().kind(), ErrorKind::Exists);
    // The same again: who asked did not learn that it was done.
    folder.add(time(1), &raw(&metadata(1))).unwrap();
    assert_eq!(folder.rewrite(time(2), &json!({})).unwrap_err().kind(), ErrorKind::NotFound);
    assert_eq!(folder.metadata(time(2)).unwrap_err().kind(), ErrorKind::NotFound);
    for no_object in [json!([]), json!("text"), json!(null)] {
        assert_eq!(folder.add(time(2), &no_object).unwrap_err().kind(), ErrorKind::Damaged);
    }
    assert_eq!(listed(&memory, false), backups_of(&[1]));
    folder.add(time(2), &json!({ "mode": "full", "size": 7, "é\u{1}": null })).unwrap();
    assert_eq!(memory.read(&file(2), 99).unwrap(), "{\"mode\":\"full\",\"size\":7,\"é\\u0001\":null}".as_bytes());
    memory.overwrite(file(2).as_str(), "{\"mode\":").unwrap();
    assert_eq!(folder.metadata(time(2)).unwrap_err().kind(), ErrorKind::Damaged);
}

#[test]
fn metadata_that_is_rewritten_keeps_what_nobody_looks_at() {
    let memory = Arc::new(repository(false, &[1, 2], None));
    let lock = VmLock::seize(decrypting(memory.clone(), false), &vm());
    let folder = VmFolder::new(&lock).unwrap();
    let mut document = folder.metadata(time(2)).unwrap();
    document["size"] = to_raw_value(&4096).unwrap();
    folder.rewrite(time(2), &document).unwrap();
    assert_eq!(memory.read(&file(2), 999).unwrap(), metadata(4096).as_bytes());
}

#[test]
fn what_is_gone_is_removed_without_complaint() {
    let memory = Arc::new(repository(false, &[], None));
    let storage = decrypting(memory.clone(), false);
    Change::Remove(1).make(&storage).unwrap();
    Change::Add(1).make(&storage).unwrap();
    memory.put(path(".20260701T000000Z.json.xofs-new").as_str(), "{").unwrap();
    memory.put(path(".20260701T000000Z.xva.xofs-new").as_str(), "an XVA that is being written").unwrap();
    for _ in 0..2 {
        Change::Remove(1).make(&storage).unwrap();
        let mut names: Vec<_> = storage.list(&file(1).parent()).unwrap().into_iter().map(|entry| entry.name).collect();
        names.sort();
        assert_eq!(names, [".20260701T000000Z.xva.xofs-new", "cache.json.gz"]);
    }
}

#[test]
fn nothing_is_changed_once_the_lock_is_lost() {
    for change in [Change::Add(3), Change::Rewrite(2, 22), Change::Remove(2)] {
        let memory = Arc::new(repository(false, &[1, 2], Some(&cache_of(&[1, 2]))));
        let lock = VmLock::seize(decrypting(memory.clone(), false), &vm());
        memory.touch(&ObjectPath::new(&format!("{VM_FOLDER}/{VM}.lock")).unwrap()).unwrap();
        let before = memory.stat(&file(1).parent()).unwrap();
        assert_eq!(change.make_under(&lock).unwrap_err().kind(), ErrorKind::Locked, "{change:?}");
        assert_eq!(memory.stat(&file(1).parent()).unwrap(), before, "{change:?}");
        assert_eq!(believed(&*memory).unwrap().len(), 2);
    }
}

#[test]
fn a_cache_that_xo_writes_meanwhile_of_what_was_before_does_not_stay() {
    for change in [Change::Add(3), Change::Rewrite(2, 22), Change::Remove(2)] {
        let memory = Arc::new(repository(false, &[1, 2], Some(&cache_of(&[1, 2]))));
        let faulty = Arc::new(FaultyStorage::<dyn WritableStorage>::new(memory.clone()));
        let storage: Arc<dyn WritableStorage> = faulty.clone();
        let lock = VmLock::seize(storage, &vm());
        let written = memory.clone();
        // XO has listed before, and writes once the cache was published: before it is read for the last time.
        let changes = AtomicUsize::new(0);
        faulty.set_rule(move |operation, path| {
            if operation == Operation::Read
                && path.file_name() == cache::NAME
                && changes.fetch_add(1, Ordering::SeqCst) == 1
            {
                written.put(path.as_str(), gzip(&cache_of(&[1, 2]))).unwrap();
            }
            None
        });
        change.make_under(&lock).unwrap();
        assert_eq!(believed(&*memory), None, "{change:?}");
    }
}

/// A random number generator that anybody can repeat (xorshift64).
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn loss(&mut self) -> Loss {
        [Loss::All, Loss::Half, Loss::None][usize::try_from(self.next() % 3).unwrap()]
    }
}

/// What a power cut does, by the number of the trial: first everything, nothing and half, then at random.
fn loss(trial: u64) -> Box<dyn FnMut() -> Loss> {
    match trial {
        0 => Box::new(|| Loss::All),
        1 => Box::new(|| Loss::None),
        2 => Box::new(|| Loss::Half),
        seed => {
            let mut random = Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15));
            Box::new(move || random.loss())
        }
    }
}

/// Fails each operation after the first `left` that change something, and of the next, if it writes, does the half.
fn die_after(left: usize, is_half: bool) -> impl Fn(Operation, &ObjectPath) -> Option<Fault> + Send + 'static {
    const EIO: i32 = 5;
    let begun = AtomicUsize::new(0);
    move |operation, _| {
        let before = begun.fetch_add(usize::from(operation.is_change()), Ordering::SeqCst);
        if before < left || (before == left && !operation.is_change()) {
            return None;
        }
        let is_last = before == left && is_half;
        Some(if is_last { Fault::Half(EIO) } else { Fault::Errno(EIO) })
    }
}

/// Makes `change` die at each of its steps, cuts the power, and looks at what is left.
fn survives(is_encrypted: bool, days: &[u32], has_cache: bool, change: Change) {
    let cache = has_cache.then(|| cache_of(days));
    let base = repository(is_encrypted, days, cache.as_deref());
    let before = backups_of(days);
    let mut after = before.clone();
    change.apply(&mut after);
    let mut was_interrupted = true;
    let mut step = 0;
    while was_interrupted {
        for is_half in [false, true] {
            let memory = Arc::new(base.after_power_cut(|| Loss::None));
            let faulty = Arc::new(FaultyStorage::<dyn WritableStorage>::new(memory.clone()));
            let lock = VmLock::seize(decrypting(faulty.clone(), is_encrypted), &vm());
            faulty.reset_counts();
            faulty.set_rule(die_after(step, is_half));
            let made = change.make_under(&lock);
            let changes: u64 = CHANGES.iter().map(|operation| faulty.count(*operation)).sum();
            was_interrupted = changes > step as u64;
            assert!(was_interrupted || made.is_ok(), "{change:?}: {made:?}");
            for trial in 0..23 {
                let left = Arc::new(memory.after_power_cut(loss(trial)));
                let context =
                    format!("{change:?}, step {step}, half {is_half}, trial {trial}, encrypted {is_encrypted}");
                let found = listed(&left, is_encrypted);
                assert!(found == after || (found == before && made.is_err()), "{context}: {found:#?}");
                let storage = decrypting(left.clone(), is_encrypted);
                assert_not_misled(&*storage, &found, change, &context);
                change.make(&storage).unwrap_or_else(|error| panic!("{context}: again: {error}"));
                for loss in [Loss::All, Loss::None] {
                    let left = Arc::new(left.after_power_cut(|| loss));
                    assert_eq!(listed(&left, is_encrypted), after, "{context}: after it was made again");
                    assert_not_misled(&*decrypting(left, is_encrypted), &after, change, &context);
                }
            }
            // A process that dies takes nothing with it.
            drop(lock);
            faulty.release();
            let storage = decrypting(memory.clone(), is_encrypted);
            assert_not_misled(&*storage, &listed(&memory, is_encrypted), change, "dead");
            change.make(&storage).unwrap();
            let cut = Arc::new(memory.after_power_cut(|| Loss::All));
            assert_eq!(listed(&cut, is_encrypted), after, "{change:?}, step {step}: after it was made again");
        }
        step += 1;
    }
    assert!(step > 4, "{change:?} has {step} steps");
}

const CHANGES: [Operation; 6] = [
    Operation::Write,
    Operation::CreateDirectory,
    Operation::Rename,
    Operation::Remove,
    Operation::Touch,
    Operation::Sync,
];

#[test]
fn whatever_a_crash_leaves_is_the_old_or_the_new_and_xo_is_not_misled() {
    for is_encrypted in [false, true] {
        for has_cache in [true, false] {
            let days = [1, 2, 3, 4, 5];
            for change in [Change::Add(6), Change::Remove(2), Change::Rewrite(3, 33)] {
                survives(is_encrypted, &days, has_cache, change);
            }
        }
        survives(is_encrypted, &[], false, Change::Add(1));
    }
}
