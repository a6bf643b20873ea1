//! Ingests: what was stored reads as the image did, and whenever one is ended, each backup is there as a whole or not at all.
//!
//! `XOFS_SEED=17` runs what is random with another seed.

mod support;

use std::fs;
use std::io::{Seek, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use disk::{Disk, Extent};
use jiff::Timestamp;
use serde_json::{Value, json};
use storage::{
    EncryptedStorage, EncryptionKey, Fault, FaultyStorage, LocalStorage, Loss, MemoryStorage, ObjectPath, Operation,
    Storage, WritableStorage,
};
use support::{files, run, scratch, seed, succeed, xofs};
use tempfile::TempDir;
use vhd::{BlockIndex, BlockSize, Digest, Filter, Format};
use xofs::ingest::{self, Destination, ErrorKind, Layout, RepositoryDestination, Reserve, Source, Wanted, Watch};
use xofs::repository::{OpenOptions, Repository};

const VM: &str = "1f2e3d4c-5b6a-4798-8a9b-0c1d2e3f4a5b";
const BLOCK: usize = 2 << 20;
const KEY: &str = "0123456789abcdef0123456789abcdef";
/// What EIO is for the tests: the machine is gone.
const GONE: i32 = 5;

/// Numbers that look random and are the same for the same seed.
struct Random(u64);

impl Random {
    fn new(seed: u64) -> Self {
        Self((seed ^ 0x5bd1_e995).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    fn below(&mut self, limit: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        usize::try_from(self.0 >> 11).unwrap() % limit
    }
}

fn path(text: &str) -> ObjectPath {
    ObjectPath::new(text).unwrap()
}

/// A disk in memory; zero blocks are holes.
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
        let at = usize::try_from(offset).unwrap();
        let end = (at / BLOCK * BLOCK + BLOCK).min(self.0.len());
        let is_hole = self.0[at..end] == vec![0; end - at];
        Ok(Extent { len: (end - at) as u64, is_hole })
    }
}

fn wanted(bytes: &[u8], number: i64) -> Wanted {
    Wanted {
        vm: VM.to_owned(),
        name: Some("web01".to_owned()),
        disks: vec![("xvda".to_owned(), Source::Disk(Arc::new(Image(bytes.to_vec()))))],
        time: Some(Timestamp::from_second(1_785_549_600 + number).unwrap()),
        ..Wanted::default()
    }
}

fn destination(storage: Arc<dyn WritableStorage>, raw: Arc<dyn Storage>, key: Option<EncryptionKey>) -> Destination {
    let repository = Repository::with_storage(raw, OpenOptions { key, cache_bytes: 8 << 20 }).unwrap();
    Destination::Repository(RepositoryDestination { name: "repository".to_owned(), repository, storage, quota: None })
}

fn plain(storage: &Arc<dyn WritableStorage>) -> Destination {
    destination(storage.clone(), storage.clone().reader(), None)
}

fn watch() -> Watch {
    Watch::new(|_| ())
}

/// What each backup of the VM reads as, oldest first.
fn read_all(raw: Arc<dyn Storage>, key: Option<EncryptionKey>) -> Vec<Vec<u8>> {
    let repository = Repository::with_storage(raw, OpenOptions { key, cache_bytes: 8 << 20 }).unwrap();
    let Some(vm) = repository.vms().unwrap().first().cloned() else { return Vec::new() };
    assert_eq!((vm.id.as_str(), vm.name.as_str()), (VM, "web01"));
    let backups = repository.backups(&vm.id).unwrap();
    let read = |backup: &Arc<xofs::repository::Backup>| {
        assert_eq!((backup.problem.as_deref(), backup.disks.len()), (None, 1), "{}", backup.time);
        assert_eq!(backup.disks[0].name, "xvda");
        let disk = repository.open_disk(backup, &backup.disks[0]).unwrap();
        let mut bytes = vec![0xee; usize::try_from(disk.size()).unwrap()];
        disk.read_at(0, &mut bytes).unwrap();
        // Whatever happened before: a digest that is valid is right.
        let digests = repository.digests(backup, &backup.disks[0]).unwrap().unwrap();
        for (index, block) in (0..).map(BlockIndex).zip(bytes.chunks(BLOCK)) {
            let real = Digest::of(block, BlockSize::DEFAULT);
            for known in [digests.of_read(index), digests.of_copy(index)] {
                assert!(known.is_none_or(|digest| digest == real), "{}: {index:?}", backup.time);
            }
        }
        bytes
    };
    backups.iter().map(read).collect()
}

/// Four states of a disk of five and a half blocks: bytes change, blocks become zero and come back.
fn states() -> Vec<Vec<u8>> {
    let mut image = vec![0; 5 * BLOCK + 100 * 512];
    image[..BLOCK].fill(1);
    image[2 * BLOCK + 7..3 * BLOCK].fill(2);
    *image.last_mut().unwrap() = 3;
    let mut states = vec![image.clone()];
    image[..BLOCK].fill(0);
    image[3 * BLOCK] = 4;
    states.push(image.clone());
    image[2 * BLOCK..3 * BLOCK].fill(0);
    image[100] = 5;
    *image.last_mut().unwrap() = 0;
    states.push(image.clone());
    states.push(image);
    states
}

/// The blocks that each of [`states`] stores.
const STORED: [u32; 4] = [3, 2, 3, 0];

#[test]
fn a_key_and_increments_of_a_changing_disk_read_as_the_image_did() {
    for (layout, format) in [
        (Layout::File, Format::File),
        (Layout::Exploded(None), Format::Exploded(Filter::Brotli)),
        (Layout::Exploded(Some(Filter::Gzip)), Format::Exploded(Filter::Gzip)),
        (Layout::Exploded(Some(Filter::None)), Format::Exploded(Filter::None)),
    ] {
        let memory: Arc<dyn WritableStorage> = Arc::new(MemoryStorage::new());
        memory.create_directory(&path("xo-vm-backups")).unwrap();
        for (number, state) in (0..).zip(states()) {
            // Only the first one says how; the others follow.
            let layout = (number == 0).then_some(layout);
            let report =
                ingest::run(&Wanted { layout, ..wanted(&state, number) }, &[plain(&memory)], &watch()).unwrap();
            let stored = report.outcomes[0].stored.as_ref().unwrap();
            let (disk, expected) = (&stored.disks[0], STORED[usize::try_from(number).unwrap()]);
            assert_eq!((disk.is_key, disk.blocks), (number == 0, expected), "{format:?} {number}");
        }
        assert!(read_all(memory.clone().reader(), None) == states(), "{format:?}");
        let repository = Repository::with_storage(memory.clone().reader(), OpenOptions::default()).unwrap();
        let backups = repository.backups(&repository.vms().unwrap()[0].id).unwrap();
        let chain = repository.chain(&backups[3], &backups[3].disks[0]).unwrap();
        assert_eq!((chain.len(), chain.iter().all(|layer| layer.format == format)), (4, true));
    }
}

#[test]
fn an_encrypted_repository_takes_backups_too() {
    let key = || EncryptionKey::from_text(KEY).unwrap();
    let memory: Arc<dyn WritableStorage> = Arc::new(MemoryStorage::new());
    EncryptedStorage::initialize(&*memory, &key(), "41d4623b-3c71-4b6c-8944-13f404302918").unwrap();
    let storage = EncryptedStorage::detect_writable(memory.clone(), Some(key())).unwrap();
    for (number, state) in (0..).zip(states()) {
        let destination = destination(storage.clone(), memory.clone().reader(), Some(key()));
        ingest::run(&wanted(&state, number), &[destination], &watch()).unwrap();
    }
    assert!(read_all(memory.reader(), Some(key())) == states());
}

/// How many blocks a backup stored, and how many it compared by digest and by bytes.
fn stored(state: &[u8], number: i64, layout: Layout, destination: Destination) -> (u32, u64, u64) {
    let wanted = Wanted { layout: Some(layout), ..wanted(state, number) };
    let report = ingest::run(&wanted, &[destination], &watch()).unwrap();
    let disk = &report.outcomes[0].stored.as_ref().unwrap().disks[0];
    (disk.blocks, disk.compared_by_digest, disk.compared_by_bytes)
}

#[test]
fn an_increment_on_what_has_digests_reads_none_of_its_blocks() {
    let key = || EncryptionKey::from_text(KEY).unwrap();
    let exploded = Layout::Exploded(Some(Filter::Gzip));
    for (layout, is_encrypted) in [(Layout::File, false), (exploded, false), (exploded, true)] {
        let memory: Arc<dyn WritableStorage> = Arc::new(MemoryStorage::new());
        memory.create_directory(&path("xo-vm-backups")).unwrap();
        if is_encrypted {
            EncryptedStorage::initialize(&*memory, &key(), "41d4623b-3c71-4b6c-8944-13f404302918").unwrap();
        }
        let key = is_encrypted.then(key);
        let faulty = Arc::new(FaultyStorage::new(memory.clone()));
        let storage = EncryptedStorage::detect_writable(faulty.clone(), key.clone()).unwrap();
        let ingest = |state: &[u8], number| {
            stored(state, number, layout, destination(storage.clone(), faulty.clone(), key.clone()))
        };
        let mut image: Vec<u8> = (1..=5).flat_map(|byte| vec![byte; BLOCK]).collect();
        image[3 * BLOCK..4 * BLOCK].fill(0);
        let mut truths = vec![image.clone()];
        let when = format!("{layout:?}, encrypted: {is_encrypted}");
        assert_eq!(ingest(&image, 0), (4, 0, 0), "{when}");
        // From now on no block is read, except of a VHD file, whose other parts are.
        faulty.set_rule(|operation, path| {
            let is_read = matches!(operation, Operation::Open | Operation::Read);
            (is_read && path.as_str().contains("/blocks/")).then_some(Fault::Errno(GONE))
        });
        for (number, change) in [(1, None), (2, Some((BLOCK + 5, 77))), (3, Some((3 * BLOCK, 1))), (4, Some((0, 9)))] {
            if let Some((at, byte)) = change {
                image[at] = byte;
            }
            truths.push(image.clone());
            // The fourth block is in no layer at first, and then a hole of nobody.
            let compared = if number < 3 { 4 } else { 5 };
            assert_eq!(ingest(&image, number), (u32::from(change.is_some()), compared, 0), "{when}: {number}");
        }
        image[3 * BLOCK..4 * BLOCK].fill(0);
        image[4 * BLOCK..].fill(0);
        truths.push(image.clone());
        assert_eq!(ingest(&image, 5), (2, 5, 0), "{when}: zeroes");
        faulty.release();
        assert!(read_all(memory.clone().reader(), key) == truths, "{when}");
    }
}

/// Changes the file of a block, of which the first holds ones and the second twos.
type Tamper = fn(&Path);

#[test]
fn a_block_whose_file_is_another_than_its_digest_was_made_of_is_read() {
    let rewritten: Tamper = |blocks| {
        let bytes = fs::read(blocks.join("1")).unwrap();
        fs::write(blocks.join("0"), bytes).unwrap();
    };
    let replaced: Tamper = |blocks| fs::rename(blocks.join("1"), blocks.join("0")).unwrap();
    let replaced_with_its_time: Tamper = |blocks| {
        let time = fs::metadata(blocks.join("0")).unwrap().modified().unwrap();
        fs::rename(blocks.join("1"), blocks.join("0")).unwrap();
        fs::File::options().write(true).open(blocks.join("0")).unwrap().set_modified(time).unwrap();
    };
    let none_is_older: Tamper = |blocks| {
        let time = |name| fs::metadata(blocks.join(name)).unwrap().modified().unwrap();
        let oldest = time("0").min(time("1")).min(time("2"));
        let sidecar = blocks.join("../..").join(vhd::DIGESTS);
        fs::File::options().write(true).open(sidecar).unwrap().set_modified(oldest).unwrap();
    };
    for (what, tamper, expected) in [
        ("rewritten", rewritten, (1, 2, 1)),
        ("replaced", replaced, (1, 1, 2)),
        ("replaced, with its time", replaced_with_its_time, (1, 1, 2)),
        ("written when the digests were", none_is_older, (0, 0, 3)),
    ] {
        let folder = folder();
        let one = folder.path().join("one");
        let storage: Arc<dyn WritableStorage> = Arc::new(LocalStorage::open(&one).unwrap());
        let layout = Layout::Exploded(Some(Filter::None));
        let mut image = vec![1; 3 * BLOCK];
        image[BLOCK..].fill(2);
        image[2 * BLOCK..].fill(3);
        assert_eq!(stored(&image, 0, layout, plain(&storage)), (3, 0, 0), "{what}");
        assert_eq!(stored(&image, 1, layout, plain(&storage)), (0, 3, 0), "{what}");
        let found = files(&*storage);
        let block = found.iter().find(|name| name.ends_with("/blocks/0/0")).unwrap();
        let blocks = one.join(block).parent().unwrap().to_path_buf();
        fs::copy(blocks.join("1"), folder.path().join("kept")).unwrap();
        tamper(&blocks);
        if !blocks.join("1").exists() {
            fs::copy(folder.path().join("kept"), blocks.join("1")).unwrap();
        }
        // What the first block has is not what its digest says; nor is the digest used of one that was written anew.
        assert_eq!(stored(&image, 2, layout, plain(&storage)), expected, "{what}");
        assert!(read_last(&one) == image, "{what}");
    }
}

fn read_last(repository: &Path) -> Vec<u8> {
    let repository = Repository::with_storage(local(repository), OpenOptions::default()).unwrap();
    let backups = repository.backups(&repository.vms().unwrap()[0].id).unwrap();
    let backup = backups.last().unwrap();
    let disk = repository.open_disk(backup, &backup.disks[0]).unwrap();
    let mut bytes = vec![0xee; usize::try_from(disk.size()).unwrap()];
    disk.read_at(0, &mut bytes).unwrap();
    bytes
}

#[test]
fn a_sidecar_that_is_damaged_or_of_another_layer_says_nothing() {
    let memory: Arc<dyn WritableStorage> = Arc::new(MemoryStorage::new());
    memory.create_directory(&path("xo-vm-backups")).unwrap();
    let layout = Layout::Exploded(Some(Filter::None));
    let image = vec![1; 2 * BLOCK];
    assert_eq!(stored(&image, 0, layout, plain(&memory)), (2, 0, 0));
    let sidecar = path(files(&*memory).iter().find(|name| name.ends_with(vhd::DIGESTS)).unwrap());
    let good = memory.read(&sidecar, 1 << 20).unwrap();
    let other: Arc<dyn WritableStorage> = Arc::new(MemoryStorage::new());
    other.create_directory(&path("xo-vm-backups")).unwrap();
    stored(&image, 0, layout, plain(&other));
    let foreign = files(&*other).into_iter().find(|name| name.ends_with(vhd::DIGESTS)).unwrap();
    let foreign = other.read(&path(&foreign), 1 << 20).unwrap();
    let mut number = 0;
    let mut compared = |bytes: Option<&[u8]>| {
        match bytes {
            Some(bytes) => memory.write(&sidecar, bytes, storage::Existing::Replace).unwrap(),
            None => memory.remove(&sidecar).unwrap(),
        }
        number += 1;
        let (blocks, by_digest, by_bytes) = stored(&image, number, layout, plain(&memory));
        assert_eq!(blocks, 0);
        (by_digest, by_bytes)
    };
    let (mut flipped, long) = (good.clone(), [&good[..], &[0]].concat());
    flipped[100] ^= 1;
    for bytes in [&good[..good.len() - 1], &good[..7], &[], &flipped, &long, &foreign, &vec![0x78; 70 << 20]] {
        assert_eq!(compared(Some(bytes)), (0, 2), "{} bytes", bytes.len());
    }
    assert_eq!(compared(Some(&good)), (2, 0));
    assert_eq!(compared(None), (0, 2));
}

#[test]
fn a_stream_is_stored_as_a_key_of_whole_sectors() {
    let memory: Arc<dyn WritableStorage> = Arc::new(MemoryStorage::new());
    memory.create_directory(&path("xo-vm-backups")).unwrap();
    for (number, len) in [(0, 1), (1, BLOCK), (2, 2 * BLOCK + 513)] {
        let bytes = vec![7; len];
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&bytes).unwrap();
        file.rewind().unwrap();
        let stream = Source::Stream(Arc::new(std::sync::Mutex::new(file)));
        let wanted = Wanted { disks: vec![("xvda".to_owned(), stream)], ..wanted(&[], number) };
        let report = ingest::run(&wanted, &[plain(&memory)], &watch()).unwrap();
        assert!(report.outcomes[0].stored.as_ref().unwrap().disks[0].is_key, "{len}");
        let mut expected = bytes;
        expected.resize(len.next_multiple_of(512), 0);
        assert!(read_all(memory.clone().reader(), None).last() == Some(&expected), "{len}");
    }
}

#[test]
fn what_cannot_be_an_increment_says_why_and_is_a_key_only_if_that_may_be() {
    let memory: Arc<dyn WritableStorage> = Arc::new(MemoryStorage::new());
    memory.create_directory(&path("xo-vm-backups")).unwrap();
    let image = vec![1; BLOCK];
    let ingest = |image: &[u8], number: i64, change: &dyn Fn(&mut Wanted)| {
        let mut wanted = wanted(image, number);
        change(&mut wanted);
        let mut report = ingest::run(&wanted, &[plain(&memory)], &watch())?;
        Ok::<_, ingest::Error>(report.outcomes.remove(0).stored?.disks.remove(0).why_full.unwrap_or_default())
    };
    let refused = |image: &[u8], number, change: &dyn Fn(&mut Wanted)| {
        let error = ingest(image, number, &|wanted| {
            change(wanted);
            wanted.extent = Some(ingest::Extent::Incremental);
        })
        .unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Usage, "{error}");
        error.to_string()
    };
    assert!(refused(&image, 0, &|_| ()).contains("has no backup of this VM yet"));
    assert!(ingest(&image, 0, &|_| ()).unwrap().contains("has no backup"));
    assert_eq!(ingest(&image, 1, &|_| ()).unwrap(), "");
    let grown = vec![1; BLOCK + 512];
    assert!(refused(&grown, 2, &|_| ()).contains("the disk grew"));
    assert!(refused(&image[..512], 2, &|_| ()).contains("became smaller"));
    assert!(refused(&image, 2, &|wanted| wanted.layout = Some(Layout::File)).contains("never mixed"));
    assert!(refused(&image, 2, &|wanted| wanted.job = Some("other".to_owned())).contains("the job other"));
    assert!(refused(&image, 2, &|wanted| wanted.disks[0].0 = "xvdb".to_owned()).contains("no disk of this name"));
    assert!(ingest(&grown, 2, &|_| ()).unwrap().contains("the disk grew"));
    // Two of a second, and one of the past.
    for number in [0, 2] {
        assert_eq!(ingest(&grown, number, &|_| ()).unwrap_err().kind(), ErrorKind::Usage, "{number}");
    }
    assert_eq!(read_all(memory.clone().reader(), None), [image.clone(), image, grown]);
}

#[test]
fn a_disk_that_somebody_put_a_child_on_gets_no_second_one() {
    let memory: Arc<dyn WritableStorage> = Arc::new(MemoryStorage::new());
    memory.create_directory(&path("xo-vm-backups")).unwrap();
    let state = &states()[0];
    for number in 0..2 {
        ingest::run(&wanted(state, number), &[plain(&memory)], &watch()).unwrap();
    }
    // The newest backup is removed, its disks are left to a cleaner.
    memory.remove(&path(&format!("xo-vm-backups/{VM}/20260801T020001Z.json"))).unwrap();
    let report = ingest::run(&wanted(state, 2), &[plain(&memory)], &watch()).unwrap();
    let why = report.outcomes[0].stored.as_ref().unwrap().disks[0].why_full.clone().unwrap();
    assert!(why.contains("'20260801T020001Z.alias.vhd' is newer"), "{why}");
}

#[test]
fn a_destination_that_fails_is_given_up_and_the_other_is_right() {
    let good: Arc<dyn WritableStorage> = Arc::new(MemoryStorage::new());
    let memory: Arc<dyn WritableStorage> = Arc::new(MemoryStorage::new());
    for storage in [&good, &memory] {
        storage.create_directory(&path("xo-vm-backups")).unwrap();
        ingest::run(&wanted(&states()[0], 0), &[plain(storage)], &watch()).unwrap();
    }
    let before = files(&*memory);
    let bad = Arc::new(FaultyStorage::new(memory.clone()));
    bad.set_rule(|operation, path| {
        let is_block = path.as_str().contains("/blocks/") && operation == Operation::Write;
        is_block.then_some(Fault::Error(storage::ErrorKind::NoSpace))
    });
    let bad: Arc<dyn WritableStorage> = bad;
    let report = ingest::run(&wanted(&states()[1], 1), &[plain(&bad), plain(&good)], &watch()).unwrap();
    assert!(report.outcomes[0].stored.is_err() && report.outcomes[1].stored.is_ok());
    assert!(read_all(good.reader(), None) == states()[..2]);
    assert_eq!(files(&*memory), before);
}

#[test]
fn a_place_without_room_is_refused_before_anything_is_written() {
    let memory: Arc<dyn WritableStorage> = Arc::new(MemoryStorage::new());
    memory.create_directory(&path("xo-vm-backups")).unwrap();
    let wanted = Wanted { reserve: Reserve { bytes: Some(u64::MAX), is_option: false }, ..wanted(&states()[0], 0) };
    let error = ingest::run(&wanted, &[plain(&memory)], &watch()).err().unwrap();
    assert_eq!(error.kind(), ErrorKind::NoRoom, "{error}");
    // Only who has an option is told of it.
    assert!(error.to_string().ends_with("kept as the reserve; forget old backups or make room"), "{error}");
    let wanted = Wanted { reserve: Reserve { is_option: true, ..wanted.reserve }, ..wanted };
    let error = ingest::run(&wanted, &[plain(&memory)], &watch()).err().unwrap();
    assert!(error.to_string().ends_with("; forget old backups, make room, or lower --reserve"), "{error}");
    assert!(files(&*memory).is_empty(), "{:?}", files(&*memory));
}

#[test]
fn a_quota_is_never_exceeded_and_the_numbers_are_said() {
    let folder = folder();
    let (one, two) = (folder.path().join("one"), folder.path().join("two"));
    let mut random = Random::new(seed());
    let state: Vec<u8> = (0..4 * BLOCK).map(|_| u8::try_from(random.below(256)).unwrap()).collect();
    let image = write_image(folder.path(), &state);
    let told = |code: i32, err: &str, part: &str| assert!(code == 1 && err.contains(part), "{code} {err}");
    let (code, _, err) = run(ingest(&one, &image).args(["--quota", "8MiB"]));
    told(code, &err, "the quota is exceeded: 0 MiB are used, about 9 MiB are to come, and 8 MiB are allowed");
    // Of a stream nothing is known before.
    let mut command = ingest(&one, Path::new("-"));
    let stream = fs::File::open(&image).unwrap();
    let Output { status, stderr, .. } = command.args(["--quota", "7MiB"]).stdin(stream).output().unwrap();
    told(status.code().unwrap(), &String::from_utf8(stderr).unwrap(), "MiB were written, and 7 MiB are allowed");
    assert!(files(&LocalStorage::open(&one).unwrap()).is_empty());
    // One that the configuration knows has its own, and the other of two is right.
    let config = folder.path().join("config/xofs");
    fs::create_dir_all(&config).unwrap();
    fs::write(
        config.join("config.toml"),
        format!("[repositories.small]\npath = '{}'\nquota = '7MiB'\n", two.display()),
    )
    .unwrap();
    let mut command = ingest(&one, &image);
    let (code, _, err) = run(command.args(["--to", "small"]).env("XDG_CONFIG_HOME", config.parent().unwrap()));
    assert!(code == 3 && err.contains("small: the quota is exceeded"), "{code} {err}");
    // What is there already counts, and what is not stored again does not.
    let stored = Repository::open(&one, OpenOptions::default()).unwrap().used_bytes().unwrap();
    let (limit, image) = (stored.to_string(), write_image(folder.path(), &[&state[..3 * BLOCK], &[1; BLOCK]].concat()));
    let (code, _, err) = run(ingest(&one, &image).args(["--full", "--quota", &limit]));
    told(code, &err, "the quota is exceeded: 9 MiB are used");
    succeed(ingest(&one, &image).args(["--quota", &(stored + (1 << 20)).to_string()]));
    assert_eq!((read_all(local(&one), None).len(), read_all(local(&two), None).len()), (2, 0));
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

/// Removes the lock that a dead program left, which takes ten seconds otherwise.
fn unlock(memory: &MemoryStorage) {
    let _ = memory.remove_directory(&path(&format!("xo-vm-backups/{VM}.lock")));
}

/// What a repository holds in the end is what its backups need, and nothing else.
fn check_end(memory: &Arc<MemoryStorage>, layout: Layout, backups: usize, when: &str) {
    let found = files(&**memory);
    let count = |end: &str| found.iter().filter(|name| name.ends_with(end)).count();
    let disks = match layout {
        Layout::File => count("Z.vhd"),
        Layout::Exploded(_) => {
            assert_eq!(count("/footer"), backups, "{when}: {found:#?}");
            count("Z.alias.vhd")
        }
    };
    assert_eq!((count("Z.json"), disks), (backups, backups), "{when}: {found:#?}");
    let left = |name: &&String| !name.ends_with(vhd::DIGESTS) && (name.contains("xofs") || name.contains("/."));
    assert_eq!(count(vhd::DIGESTS), backups, "{when}: {found:#?}");
    assert_eq!(found.iter().find(left), None, "{when}");
}

#[test]
fn an_exploded_ingest_that_is_cut_off_anywhere_leaves_a_whole_backup_or_none_and_the_next_one_cleans_up() {
    cut_everywhere(Layout::Exploded(Some(Filter::Gzip)));
}

#[test]
fn an_ingest_of_a_vhd_file_that_is_cut_off_anywhere_leaves_a_whole_backup_or_none_and_the_next_one_cleans_up() {
    cut_everywhere(Layout::File);
}

/// Cuts the power at every point of an ingest, and kills it there.
fn cut_everywhere(layout: Layout) {
    let mut random = Random::new(seed());
    // A disk of two blocks: each cut is tried, and each is a whole repository.
    let states: Vec<Vec<u8>> = (1..4).map(|byte| vec![byte; BLOCK + 512]).collect();
    let begin = || {
        let memory = Arc::new(MemoryStorage::with_power_cuts());
        WritableStorage::create_directory(&*memory, &path("xo-vm-backups")).unwrap();
        let storage: Arc<dyn WritableStorage> = memory.clone();
        let wanted = Wanted { layout: Some(layout), ..wanted(&states[0], 0) };
        ingest::run(&wanted, &[plain(&storage)], &watch()).unwrap();
        memory.sync_tree(&ObjectPath::root(), &memory.mark().unwrap()).unwrap();
        memory
    };
    for count in 0.. {
        let when = format!("{layout:?}, cut after {count} changes");
        let memory = begin();
        let (storage, is_cut) = until(&memory, count, random.below(2) == 0);
        let wanted_now = || wanted(&states[1], 1);
        let done = ingest::run(&wanted_now(), &[plain(&storage)], &watch());
        drop(storage);
        if !is_cut.load(Ordering::SeqCst) {
            done.unwrap_or_else(|error| panic!("{when}: {error}"));
            assert!(count > 20, "{when}: an ingest takes more steps");
            check_end(&memory, layout, 2, &when);
            break;
        }
        for round in 0..3 {
            let when = format!("{when}, round {round}");
            let mut loss = || match round {
                0 => Loss::All,
                _ => [Loss::All, Loss::Half, Loss::None][random.below(3)],
            };
            // Killed alone, in the last round.
            let left = if round < 2 { Arc::new(memory.after_power_cut(&mut loss)) } else { memory.clone() };
            unlock(&left);
            let before = read_all(left.clone(), None);
            assert!(before == states[..1] || before == states[..2], "{when}: {} backups", before.len());
            assert!(done.is_err() || before.len() == 2, "{when}: it said that it was done");
            let storage: Arc<dyn WritableStorage> = left.clone();
            ingest::run(&wanted(&states[2], 2), &[plain(&storage)], &watch())
                .unwrap_or_else(|error| panic!("{when}: {error}"));
            let expected = [before, vec![states[2].clone()]].concat();
            assert!(read_all(left.clone(), None) == expected, "{when}");
            check_end(&left, layout, expected.len(), &when);
        }
    }
}

#[test]
fn what_an_intent_names_is_left_alone_where_something_may_need_it() {
    let memory: Arc<dyn WritableStorage> = Arc::new(MemoryStorage::new());
    memory.create_directory(&path("xo-vm-backups")).unwrap();
    for number in 0..2 {
        ingest::run(&wanted(&states()[usize::try_from(number).unwrap()], number), &[plain(&memory)], &watch()).unwrap();
    }
    let alias = files(&*memory).into_iter().find(|name| name.ends_with("20260801T020000Z.alias.vhd")).unwrap();
    let lineage = path(&alias).parent();
    // An intent that outlived its backup, whose metadata was removed to be merged: the next backup needs its blocks.
    memory.remove(&path(&format!("xo-vm-backups/{VM}/20260801T020000Z.json"))).unwrap();
    let intent = lineage.join(".20260801T020000Z.xofs-ingest").unwrap();
    memory.write(&intent, b"left", storage::Existing::Refuse).unwrap();
    ingest::run(&wanted(&states()[2], 2), &[plain(&memory)], &watch()).unwrap();
    assert!(read_all(memory.clone().reader(), None) == states()[1..3]);
    assert!(files(&*memory).contains(&alias));
}

/// A folder for a repository, with the place for one.
fn folder() -> TempDir {
    let folder = tempfile::Builder::new().prefix("ingest-").tempdir_in(scratch()).expect("a folder");
    for name in ["one", "two"] {
        fs::create_dir_all(folder.path().join(name).join("xo-vm-backups")).unwrap();
    }
    folder
}

/// Writes a state as a sparse file.
fn write_image(folder: &Path, state: &[u8]) -> PathBuf {
    let image = folder.join("disk.raw");
    let file = fs::File::create(&image).unwrap();
    file.set_len(state.len() as u64).unwrap();
    for (index, block) in (0..).zip(state.chunks(BLOCK)) {
        if block.iter().any(|byte| *byte != 0) {
            file.write_all_at(block, index * BLOCK as u64).unwrap();
        }
    }
    image
}

fn ingest(repository: &Path, image: &Path) -> Command {
    let mut command = xofs();
    command.arg("ingest").arg(repository).args(["--vm", VM, "--name", "web01"]);
    command.arg("--disk").arg(format!("xvda={}", image.display()));
    command
}

fn local(repository: &Path) -> Arc<dyn Storage> {
    Arc::new(LocalStorage::open(repository).unwrap())
}

#[test]
fn the_command_stores_a_key_and_increments_and_tells_what_it_did() {
    let folder = folder();
    let (one, two) = (folder.path().join("one"), folder.path().join("two"));
    for (number, state) in states().iter().enumerate() {
        let image = write_image(folder.path(), state);
        let told = succeed(ingest(&one, &image).arg("--to").arg(&two).arg("--json"));
        let told: Value = serde_json::from_str(&told).unwrap();
        let stages = told["transfer"]["stages"].as_array().unwrap();
        let read = stages.iter().find(|stage| stage["stage"] == "read").unwrap();
        assert!(read["busySeconds"].as_f64().unwrap() > 0.0, "{told}");
        let written: Vec<&Value> =
            stages.iter().filter(|stage| stage["stage"] == "write").map(|stage| &stage["of"]).collect();
        let of = |place: &Path| json!({ "kind": "repository", "name": place.to_str().unwrap() });
        assert_eq!(written, [&of(&one), &of(&two)], "{told}");
        assert!(told["transfer"]["bottleneck"]["line"].is_string(), "{told}");
        for repository in told["repositories"].as_array().unwrap() {
            let disk = &repository["disks"][0];
            assert_eq!((&disk["isKey"], &disk["blocks"]), (&(number == 0).into(), &STORED[number].into()), "{told}");
        }
    }
    for repository in [&one, &two] {
        assert!(read_all(local(repository), None) == states());
        succeed(xofs().arg("check").arg(repository).arg("--data"));
    }
    // An image may be a VHD.
    let exported = folder.path().join("disk.vhd");
    succeed(xofs().arg("export").arg(&one).args(["web01/latest", "--format", "vhd", "-o"]).arg(&exported));
    let told = succeed(ingest(&one, &exported).args(["--incremental", "--json"]));
    let told: Value = serde_json::from_str(&told).unwrap();
    assert_eq!(told["repositories"][0]["disks"][0]["blocks"], 0, "{told}");
}

/// What `xofs check --data --json` says, with its exit code.
fn check(repository: &Path, arguments: &[&str]) -> (i32, Value) {
    let (code, told, stderr) = run(xofs().arg("check").arg(repository).args(["--data", "--json"]).args(arguments));
    (code, serde_json::from_str(&told).unwrap_or_else(|error| panic!("{error}: {told}\n{stderr}")))
}

#[test]
fn a_check_finds_bytes_that_are_not_those_that_were_written_also_in_a_copy_and_makes_digests_that_are_missing() {
    for how in [&["--format", "vhd"][..], &["--format", "exploded", "--compression", "none"]] {
        let folder = folder();
        let (one, two) = (folder.path().join("one"), folder.path().join("copied"));
        let state: Vec<u8> = (1..=4).flat_map(|byte| vec![byte; BLOCK]).collect();
        let image = write_image(folder.path(), &state);
        let mut command = ingest(&one, &image);
        succeed(command.args(how).arg("--full"));
        // Digests are of what was written long ago, else nobody could say that it stays.
        std::thread::sleep(Duration::from_millis(2100));
        succeed(Command::new("cp").arg("-a").arg(&one).arg(&two));
        for repository in [&one, &two] {
            let (code, told) = check(repository, &[]);
            assert_eq!((code, &told["blocksCompared"], &told["digestsMade"]), (0, &4.into(), &Value::Null), "{told}");
        }
        // Of files that are others, nothing is left unread.
        let told = succeed(ingest(&two, &image).arg("--json"));
        let told: Value = serde_json::from_str(&told).unwrap();
        let disk = &told["repositories"][0]["disks"][0];
        assert_eq!((&disk["comparedByDigest"], &disk["comparedByBytes"]), (&0.into(), &4.into()), "{told}");

        let storage = LocalStorage::open(&one).unwrap();
        let found = files(&storage);
        let sidecar = one.join(found.iter().find(|name| name.ends_with(vhd::DIGESTS)).unwrap());
        let is_holder = |name: &&String| name.ends_with("Z.vhd") || name.ends_with("/blocks/0/2");
        let holder = one.join(found.iter().find(is_holder).unwrap());
        fs::write(&sidecar, "other").unwrap();
        let (code, told) = check(&one, &[]);
        assert_eq!(
            (code, &told["blocksCompared"], told["notes"].as_array().unwrap().len()),
            (0, &0.into(), 1),
            "{told}"
        );
        for made in [4, 0] {
            let (code, told) = check(&one, &["--digest-missing"]);
            let compared = 4 - made;
            assert_eq!(
                (code, &told["digestsMade"], &told["blocksCompared"]),
                (0, &made.into(), &compared.into()),
                "{told}"
            );
        }
        // Those of a copy are of other files, and made anew, if they are right; not of files that are only just there.
        std::thread::sleep(Duration::from_millis(2100));
        let (code, told) = check(&two, &["--digest-missing"]);
        assert_eq!((code, &told["digestsMade"], &told["blocksCompared"]), (0, &4.into(), &8.into()), "{told}");
        // A bit flips on the disk, where no time tells.
        let file = fs::File::options().read(true).write(true).open(&holder).unwrap();
        let time = file.metadata().unwrap().modified().unwrap();
        let at = file.metadata().unwrap().len() - 1000;
        let mut byte = [0];
        file.read_exact_at(&mut byte, at).unwrap();
        file.write_all_at(&[byte[0] ^ 1], at).unwrap();
        file.set_modified(time).unwrap();
        let (code, told) = check(&one, &["--digest-missing"]);
        let fault = told["faults"][0]["message"].as_str().unwrap();
        assert!(fault.ends_with("its bytes are not those that were written"), "{told}");
        assert_eq!(
            (code, &told["digestsMade"], &told["faults"][0]["isDamage"]),
            (13, &0.into(), &true.into()),
            "{told}"
        );
    }
}

#[test]
fn what_expired_is_forgotten_in_the_same_run_and_a_failure_of_that_leaves_the_backup() {
    let folder = folder();
    let (one, two) = (folder.path().join("one"), folder.path().join("two"));
    let run_at = |number: usize, arguments: &[&str]| {
        let image = write_image(folder.path(), &states()[number]);
        let mut command = ingest(&one, &image);
        command.arg("--to").arg(&two).args(["--time", &format!("2026-08-0{}T02:00:03Z", number + 1), "--json"]);
        let (code, out, err) = run(command.args(arguments));
        (code, serde_json::from_str::<Value>(&out).unwrap_or_default(), err)
    };
    // A backup of another job is none of its business.
    succeed(ingest(&one, &write_image(folder.path(), &states()[0])).args([
        "--job",
        "other",
        "--time",
        "2026-07-01T02:00:00Z",
    ]));
    for number in 0..3 {
        let (code, told, err) = run_at(number, &["--keep-last", "2"]);
        assert_eq!(code, 0, "{err}");
        for repository in told["repositories"].as_array().unwrap() {
            let forgotten = &repository["retention"]["vms"][0]["forgotten"];
            let expected = if number == 2 { serde_json::json!(["2026-08-01T020003Z"]) } else { serde_json::json!([]) };
            assert_eq!(*forgotten, expected, "{told}");
        }
    }
    let of_other = states()[..1].to_vec();
    assert!(read_all(local(&one), None) == [of_other, states()[1..3].to_vec()].concat());
    assert!(read_all(local(&two), None) == states()[1..3]);
    // Nobody knows what a backup needs whose metadata cannot be read: nothing is forgotten, and the new one is there.
    fs::write(two.join(format!("xo-vm-backups/{VM}/20260801T020003Z.json")), "{").unwrap();
    let (code, told, err) = run_at(3, &["--keep-last", "1"]);
    assert!(code == 4 && err.is_empty(), "{code} {err} {told}");
    let of = |number: usize| &told["repositories"][number]["retention"]["vms"][0];
    assert_eq!(of(0)["forgotten"].as_array().unwrap().len(), 2, "{told}");
    assert!(
        of(1)["error"].as_str().unwrap().contains("nothing of its VM is forgotten") && of(1)["exitCode"] == 13,
        "{told}"
    );
    fs::remove_file(two.join(format!("xo-vm-backups/{VM}/20260801T020003Z.json"))).unwrap();
    assert!(read_all(local(&one), None) == [states()[0].clone(), states()[3].clone()]);
    assert!(read_all(local(&two), None) == states()[1..4]);
    // Rules that keep nothing are refused before anything is written.
    for rule in [&["--keep-last", "0"][..], &["--keep-tag", "legal"]] {
        let (code, _, err) = run_at(3, rule);
        assert!(code == 2 && err.contains("no rule keeps anything"), "{rule:?}: {code} {err}");
    }
}

#[test]
fn wrong_usage_says_what_to_do() {
    let folder = folder();
    let one = folder.path().join("one");
    let image = write_image(folder.path(), &states()[0]);
    for (arguments, code, expected) in [
        (&["--vm", "web01"][..], 1, "--vm UUID --name NAME"),
        (&["--vm", VM][..], 2, "--name"),
        (&["--vm", VM, "--name", "web01", "--format", "vhd", "--compression", "gzip"][..], 2, "not compressed"),
        (&["--vm", VM, "--name", "web01", "--incremental"][..], 2, "cannot be stored as an increment"),
        (&["--vm", VM, "--name", "web01", "--to", one.to_str().unwrap()][..], 2, "named twice"),
        (&["--vm", VM, "--name", "web01", "--job", "../.."][..], 2, "no id of a job"),
    ] {
        let disk = format!("xvda={}", image.display());
        let (found, _, stderr) = run(xofs().arg("ingest").arg(&one).args(["--disk", &disk]).args(arguments));
        assert!(found == code && stderr.contains(expected), "{arguments:?}: {found}\n{stderr}");
    }
    assert!(read_all(local(&one), None).is_empty());
}

#[test]
fn of_two_repositories_one_full_the_other_is_right_and_the_command_ends_with_3() {
    support::require_root();
    let folder = folder();
    let (one, two) = (folder.path().join("one"), folder.path().join("two"));
    succeed(Command::new("mount").args(["-t", "tmpfs", "-o", "size=5m", "xofs-test"]).arg(&one));
    let _unmounted = Unmounted(one.clone());
    fs::create_dir(one.join("xo-vm-backups")).unwrap();
    let mut random = Random::new(seed());
    let state: Vec<u8> = (0..4 * BLOCK).map(|_| u8::try_from(random.below(256)).unwrap()).collect();
    let image = write_image(folder.path(), &state);
    // Refused beforehand, and then by the place itself, where it is believed to be large enough.
    let (code, _, stderr) = run(ingest(&two, &image).arg("--to").arg(&one));
    assert!(code == 3 && stderr.contains("too little room"), "{code}\n{stderr}");
    let zeroes = folder.path().join("zeroes");
    fs::write(&zeroes, &state).unwrap();
    let stream = fs::File::open(&zeroes).unwrap();
    let mut command = ingest(&two, Path::new("-"));
    let Output { status, stderr, .. } = command.arg("--to").arg(&one).stdin(stream).output().unwrap();
    let stderr = String::from_utf8(stderr).unwrap();
    assert!(status.code() == Some(3) && stderr.contains("the place is full"), "{status}\n{stderr}");
    assert!(read_all(local(&two), None) == [state.clone(), state]);
    let storage = LocalStorage::open(&one).unwrap();
    assert!(files(&storage).is_empty(), "{:?}", files(&storage));
}

struct Unmounted(PathBuf);

impl Drop for Unmounted {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(&self.0).status();
    }
}

#[test]
fn the_binary_killed_at_any_time_leaves_whole_backups() {
    let mut random = Random::new(seed());
    let folder = folder();
    let one = folder.path().join("one");
    let mut state: Vec<u8> = (0..6 * BLOCK).map(|at| u8::try_from(at % 251).unwrap()).collect();
    succeed(ingest(&one, &write_image(folder.path(), &state)).arg("--full"));
    let mut expected = vec![state.clone()];
    for round in 0..10_usize {
        let at = random.below(state.len());
        state[at] ^= 0x55;
        let image = write_image(folder.path(), &state);
        let mut command = ingest(&one, &image);
        let mut child = command.arg("--full").stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        std::thread::sleep(Duration::from_millis(random.below(400) as u64));
        child.kill().unwrap();
        child.wait().unwrap();
        let _ = fs::remove_dir(one.join(format!("xo-vm-backups/{VM}.lock")));
        let found = read_all(local(&one), None);
        if found.len() > expected.len() {
            expected.push(state.clone());
        }
        assert!(found == expected, "round {round}: {} backups, {} expected", found.len(), expected.len());
    }
    succeed(&mut ingest(&one, &write_image(folder.path(), &state)));
    expected.push(state);
    let storage = LocalStorage::open(&one).unwrap();
    assert!(read_all(local(&one), None) == expected);
    let found = files(&storage);
    assert_eq!(found.iter().find(|name| name.contains("xofs") && !name.ends_with(vhd::DIGESTS)), None);
    assert_eq!(found.iter().filter(|name| name.ends_with("/footer")).count(), expected.len(), "{found:#?}");
}

#[test]
fn a_signal_removes_what_was_written() {
    let folder = folder();
    let one = folder.path().join("one");
    let mut command = ingest(&one, Path::new("-"));
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    let mut input = child.stdin.take().unwrap();
    std::io::Write::write_all(&mut input, &vec![7; 2 * BLOCK]).unwrap();
    let id = child.id().to_string();
    let storage = LocalStorage::open(&one).unwrap();
    for _ in 0..600 {
        if files(&storage).iter().any(|name| name.contains("/blocks/")) {
            break;
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    succeed(Command::new("kill").args(["-TERM", &id]));
    // A read that waits is not interrupted, the next one is not begun.
    drop(input);
    assert_eq!(child.wait().unwrap().code(), Some(130));
    assert!(files(&storage).is_empty(), "{:?}", files(&storage));
    // Nor the folder of the disk, which had no other backup.
    let jobs = fs::read_dir(one.join(format!("xo-vm-backups/{VM}/vdis"))).unwrap();
    let lineages: Vec<_> = jobs.flat_map(|job| fs::read_dir(job.unwrap().path()).unwrap()).collect();
    assert!(lineages.is_empty(), "{lineages:?}");
}
