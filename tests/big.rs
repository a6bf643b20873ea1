//! Disks of as many blocks as a disk can have, and places with room for fewer files.
//!
//! The full size is for running by hand ([`docs/testing.md`](../docs/testing.md)): it takes long, and 2.2 million inodes.

mod support;

use std::fs;
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use disk::{Disk, Extent};
use jiff::Timestamp;
use storage::{LocalStorage, WritableStorage};
use support::loop_mount::LoopMount;
use support::{Mounted, succeed, xofs};
use xofs::ingest::{self, Destination, ErrorKind, RepositoryDestination, Source, Wanted};
use xofs::merge::{self, Watch};
use xofs::repository::{OpenOptions, Repository, VmId, VmLock};

const VM: &str = "1f2e3d4c-5b6a-4798-8a9b-0c1d2e3f4a5b";
const BLOCK: u64 = 2 << 20;
/// Of the largest disk that an ingest takes.
const ALL_BLOCKS: u64 = 1 << 20;

/// A disk whose first blocks each begin with their number and a generation; the rest is a hole.
struct Numbered {
    size: u64,
    blocks: u64,
    /// Of the first blocks of all; those after them are of generation 0.
    changed: u64,
}

impl Numbered {
    fn head(&self, block: u64) -> [u8; 16] {
        let generation = u64::from(block < self.changed);
        u128::from(((block + 1) << 1) | generation).to_le_bytes()
    }
}

impl Disk for Numbered {
    fn size(&self) -> u64 {
        self.size
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> disk::Result<()> {
        buffer.fill(0);
        let mut at = offset.next_multiple_of(BLOCK);
        // Only whole heads are asked for here.
        while at + 16 <= offset + buffer.len() as u64 && at / BLOCK < self.blocks {
            let place = usize::try_from(at - offset).unwrap();
            buffer[place..place + 16].copy_from_slice(&self.head(at / BLOCK));
            at += BLOCK;
        }
        Ok(())
    }

    fn extent_at(&self, offset: u64) -> disk::Result<Extent> {
        let data = self.blocks * BLOCK;
        let is_hole = offset >= data;
        Ok(Extent { len: if is_hole { self.size - offset } else { data - offset }, is_hole })
    }
}

fn ingest(place: &LoopMount, disk: Numbered, number: i64) -> ingest::Result<ingest::Report> {
    let storage: Arc<dyn WritableStorage> = Arc::new(LocalStorage::open(&place.path()).unwrap());
    let options = OpenOptions { key: None, cache_bytes: 8 << 20 };
    let repository = Repository::with_storage(storage.clone().reader(), options).unwrap();
    let wanted = Wanted {
        vm: VM.to_owned(),
        name: Some("big".to_owned()),
        disks: vec![("xvda".to_owned(), Source::Disk(Arc::new(disk)))],
        time: Some(Timestamp::from_second(1_785_549_600 + number).unwrap()),
        ..Wanted::default()
    };
    let destination =
        Destination::Repository(RepositoryDestination { name: "big".to_owned(), repository, storage, quota: None });
    ingest::run(&wanted, &[destination], &ingest::Watch::new(|_| ()))
}

/// The most memory that this process had since the last time it was asked (MiB).
fn peak() -> u64 {
    let status = fs::read_to_string("/proc/self/status").expect("/proc is mounted");
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).expect("Linux says it");
    let peak = line.trim().trim_end_matches(" kB").parse::<u64>().expect("a number") >> 10;
    fs::write("/proc/self/clear_refs", "5").expect("a process may forget its own peak");
    peak
}

/// Runs a part of the test, says how long it took and how much memory, and returns this.
fn measured<T>(what: &str, act: impl FnOnce() -> T) -> (T, u64) {
    peak();
    let start = Instant::now();
    let done = act();
    let (seconds, peak) = (start.elapsed().as_secs_f64(), peak());
    println!("{what:40} {seconds:8.1} s {peak:6} MiB");
    (done, peak)
}

#[test]
#[ignore = "takes hours and 2.2 million inodes; XOFS_BLOCKS takes fewer"]
fn a_full_disk_of_2_tib_is_ingested_merged_and_listed_in_bounded_memory() {
    let blocks = std::env::var("XOFS_BLOCKS").map_or(ALL_BLOCKS, |text| text.parse().expect("a number of blocks"));
    let place = LoopMount::with_inodes(24 << 30, 2 * blocks + 20_000);
    fs::create_dir(place.path().join("xo-vm-backups")).unwrap();
    let disk = |changed| Numbered { size: ALL_BLOCKS * BLOCK, blocks, changed };
    let changed = blocks / 2;
    for (number, what, changed, stored) in
        [(0, "ingest of a key", 0, blocks), (1, "ingest of an increment", changed, changed)]
    {
        let (report, peak) = measured(what, || ingest(&place, disk(changed), number).unwrap());
        let disk = &report.outcomes[0].stored.as_ref().unwrap().disks[0];
        assert_eq!((disk.is_key, u64::from(disk.blocks)), (number == 0, stored));
        assert!(peak < 512, "{what} took {peak} MiB");
    }
    let mounted = Mounted::new(&place.path(), None);
    let (_, peak) = measured("list, check, and a mounted disk", || {
        succeed(xofs().args(["list", "--json"]).arg(place.path()));
        succeed(xofs().args(["check", "--json"]).arg(place.path()));
        let shown = mounted.backup(VM, "20260801T020001Z.json").join("disks/xvda.raw");
        assert_eq!(fs::metadata(shown).unwrap().len(), ALL_BLOCKS * BLOCK);
    });
    // Others did it; this is what `Mounted` takes.
    assert!(peak < 512, "{peak} MiB");
    drop(mounted);

    let storage: Arc<dyn WritableStorage> = Arc::new(LocalStorage::open(&place.path()).unwrap());
    let lock = VmLock::take(storage.clone(), &VmId::new(VM).unwrap(), Duration::ZERO, |_| true).unwrap();
    let watch = Watch { threads: 4, jobs: 1, planned: &|_| {}, moved: &|_| {}, is_stopped: &|| false };
    let (forgotten, peak) =
        measured("merge", || merge::forget(&lock, |backups| vec![backups[0].clone()], &watch).unwrap());
    assert_eq!((forgotten.merged, forgotten.blocks, forgotten.problems), (1, changed, Vec::new()));
    assert!(peak < 512, "the merge took {peak} MiB");
    drop(lock);

    let repository = Repository::with_storage(storage.reader(), OpenOptions::default()).unwrap();
    let backups = repository.backups(&VmId::new(VM).unwrap()).unwrap();
    assert_eq!(backups.len(), 1);
    let merged = repository.open_disk(&backups[0], &backups[0].disks[0]).unwrap();
    let (truth, mut found) = (disk(changed), [0xee; 16]);
    for block in (0..ALL_BLOCKS).step_by(997).chain([changed - 1, changed, blocks - 1]) {
        merged.read_at(block * BLOCK, &mut found).unwrap();
        let expected = if block < blocks { truth.head(block) } else { [0; 16] };
        assert_eq!(found, expected, "block {block}");
    }
}

#[test]
fn a_place_with_too_few_inodes_is_refused_with_the_numbers_before_anything_is_written() {
    let place = LoopMount::with_inodes(64 << 20, 256);
    fs::create_dir(place.path().join("xo-vm-backups")).unwrap();
    let count = |what: &str| -> u64 {
        let told = succeed(Command::new("stat").args(["--file-system", "--format", what]).arg(place.path()));
        told.trim().parse().unwrap()
    };
    let before = count("%d");
    let error = ingest(&place, Numbered { size: 1000 * BLOCK, blocks: 1000, changed: 0 }, 0).err().unwrap();
    assert_eq!(error.kind(), ErrorKind::NoRoom, "{error}");
    // The lock, a folder, is there while it is asked.
    let free = before - 1;
    let expected = format!("about 1013 files are to be made, and the file system has room for {free} more");
    let message = error.to_string();
    assert!(message.contains(&expected) && message.contains("--format vhd"), "{message}");
    let left: Vec<_> = fs::read_dir(place.path().join("xo-vm-backups")).unwrap().map(|entry| entry.unwrap()).collect();
    assert!(left.is_empty(), "{left:?}");
    assert_eq!(count("%d"), before);
    // What fits is taken.
    ingest(&place, Numbered { size: 1000 * BLOCK, blocks: 100, changed: 0 }, 0).unwrap();
}
