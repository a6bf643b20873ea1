//! The file systems that repositories lie on, and the states they get into: full, read-only, immutable. The built binary stores,
//! merges and reads on each; what cannot be done is said, changes nothing, and is done by the next run once it can be.

mod support;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use serde_json::Value;
use storage::{ErrorKind, Existing, LocalStorage, ObjectPath, WritableStorage};
use support::loop_mount::{FileSystem, LoopMount};
use support::slow_path::SlowPath;
use support::{Mounted, run, scratch, succeed, xofs};
use tempfile::TempDir;
use xofs::merge::{self, Watch};
use xofs::repository::{VmId, VmLock};

const VM: &str = "1f2e3d4c-5b6a-4798-8a9b-0c1d2e3f4a5b";
const BLOCK: usize = 2 << 20;
/// Backups of each repository.
const BACKUPS: usize = 4;

const PLAIN: &[&str] = &["--format", "exploded", "--compression", "none"];
const BROTLI: &[&str] = &["--format", "exploded", "--compression", "brotli"];
const VHD: &[&str] = &["--format", "vhd"];

/// What a disk of five blocks and a half holds at a time: its first block and its last sector differ each time, and the block of
/// this number is new.
fn content(number: usize) -> Vec<u8> {
    let mut bytes = vec![0; 5 * BLOCK + BLOCK / 2];
    let fill = |block: &mut [u8], seed: usize| {
        let mut state = 0x9e37_79b9_7f4a_7c15_u64 ^ u64::try_from(seed + 1).unwrap();
        for bytes in block.chunks_exact_mut(8) {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            bytes.copy_from_slice(&state.to_le_bytes());
        }
    };
    for block in 1..=number {
        fill(&mut bytes[block * BLOCK..][..BLOCK], block);
    }
    fill(&mut bytes[..BLOCK], 100 + number);
    let last = bytes.len() - 512;
    fill(&mut bytes[last..], 200 + number);
    bytes
}

/// Runs a command; returns its exit code, standard output and standard error.
/// A repository of one VM with one disk.
struct World {
    repository: PathBuf,
    layout: &'static [&'static str],
    folder: TempDir,
    /// By the time of the backup.
    truths: BTreeMap<String, Vec<u8>>,
}

impl World {
    fn new(repository: PathBuf, layout: &'static [&'static str]) -> Self {
        fs::create_dir_all(repository.join("xo-vm-backups")).unwrap();
        let folder = tempfile::Builder::new().prefix("places-").tempdir_in(scratch()).unwrap();
        Self { repository, layout, folder, truths: BTreeMap::new() }
    }

    /// One on a place, with backups.
    fn with_backups(place: &LoopMount, layout: &'static [&'static str]) -> Self {
        let mut world = Self::new(place.path().join("repository"), layout);
        (0..BACKUPS).for_each(|number| world.add(number));
        world
    }

    fn ingest(&self, number: usize) -> Command {
        let image = self.folder.path().join("image");
        fs::write(&image, content(number)).unwrap();
        let mut command = xofs();
        command.arg("ingest").arg(&self.repository).args(["--vm", VM, "--name", "web01"]).args(self.layout);
        command.arg("--disk").arg(format!("xvda={}", image.display()));
        command
    }

    /// Adds a backup.
    fn add(&mut self, number: usize) {
        succeed(&mut self.ingest(number));
        let time = self.listed().pop().expect("the new one");
        assert!(self.truths.insert(time, content(number)).is_none());
    }

    fn forget(&self, kept: usize) -> Command {
        let mut command = xofs();
        command.arg("forget").arg(&self.repository).args(["--all", "--apply", "--keep-last", &kept.to_string()]);
        command
    }

    /// A plan that would move something to the trash.
    fn plan(&self) -> PathBuf {
        let leftover = self.lineage().join(".gone.xofs-new");
        fs::write(leftover, "").unwrap();
        let plan = self.folder.path().join("plan");
        succeed(xofs().arg("repair").arg(&self.repository).arg("--output").arg(&plan));
        plan
    }

    fn repair(&self, plan: &Path) -> Command {
        let mut command = xofs();
        command.arg("repair").arg(&self.repository).arg("--apply").arg(plan);
        command
    }

    /// The folder of the disk.
    fn lineage(&self) -> PathBuf {
        let job = self.repository.join("xo-vm-backups").join(VM).join("vdis").join(xofs::ingest::JOB);
        fs::read_dir(job).unwrap().next().expect("a disk").unwrap().path()
    }

    /// The times of the backups, oldest first.
    fn listed(&self) -> Vec<String> {
        let listed: Value =
            serde_json::from_str(&succeed(xofs().args(["list", "--json"]).arg(&self.repository))).unwrap();
        let backups = listed["vms"][0]["backups"].as_array().expect("backups").iter();
        backups.map(|backup| backup["time"].as_str().expect("a time").to_owned()).collect()
    }

    /// Looks that the newest `count` backups and no others are there, and that they read right.
    fn check(&self, count: usize, when: &str) {
        let truths: Vec<_> = self.truths.iter().skip(self.truths.len() - count).collect();
        assert_eq!(self.listed(), truths.iter().map(|(time, _)| (*time).clone()).collect::<Vec<_>>(), "{when}");
        for (time, truth) in truths {
            let what = format!("{VM}/{time}");
            let output = xofs().arg("export").arg(&self.repository).args([&what, "--output", "-"]).output().unwrap();
            assert!(output.status.success(), "{when}: {time}: {}", String::from_utf8_lossy(&output.stderr));
            assert!(output.stdout == *truth, "{when}: {time} reads wrong");
        }
        let (code, out, err) = run(xofs().args(["check", "--data"]).arg(&self.repository));
        assert!(code == 0 && out.contains("no damage found"), "{when}: {code} {out}{err}");
    }

    /// Every file and folder, with what it holds, but for the listing's cache and the trash.
    fn tree(&self) -> BTreeMap<PathBuf, Option<Vec<u8>>> {
        let (mut tree, mut folders) = (BTreeMap::new(), vec![self.repository.clone()]);
        while let Some(folder) = folders.pop() {
            for entry in fs::read_dir(folder).unwrap() {
                let path = entry.unwrap().path();
                if path.ends_with(".xofs-trash") {
                    continue;
                }
                if path.is_dir() {
                    tree.insert(path.clone(), None);
                    folders.push(path);
                } else if !path.ends_with("cache.json.gz") {
                    tree.insert(path.clone(), Some(fs::read(path).unwrap()));
                }
            }
        }
        tree
    }

    /// Looks that a command is refused with an exit code and one line that has all `parts`, and changes nothing.
    fn refused(&self, command: &mut Command, expected: i32, parts: &[&str]) {
        let before = self.tree();
        let (code, out, err) = run(command);
        let told = format!("{out}{err}");
        let is_said = told.lines().any(|line| parts.iter().all(|part| line.contains(part)));
        assert!(code == expected && is_said && !told.contains("panicked"), "{command:?}: {code} {told}");
        let left = self.tree();
        let changed = before.iter().filter(|(path, bytes)| left.get(*path) != Some(*bytes)).map(|(path, _)| path);
        let new = left.keys().filter(|path| !before.contains_key(*path));
        assert_eq!(changed.chain(new).collect::<Vec<_>>(), Vec::<&PathBuf>::new(), "{command:?}: {told}");
    }

    /// Makes immutable what is of the newest `count` backups, as XO's daemon does, or mutable again.
    fn protect(&self, count: usize, how: &str) {
        let lineage = self.lineage();
        for time in self.truths.keys().rev().take(count).map(|time| time.replace('-', "")) {
            let vm = self.repository.join("xo-vm-backups").join(VM);
            let all = [
                vm.join(format!("{time}.json")),
                lineage.join(format!("{time}.vhd")),
                lineage.join(format!("{time}.alias.vhd")),
                lineage.join(format!("data/{time}.vhd")),
            ];
            succeed(Command::new("chattr").args(["-R", how]).args(all.iter().filter(|path| path.exists())));
        }
    }
}

/// Stores, merges and reads in each layout.
fn live_on(file_system: FileSystem, bytes: u64) {
    let place = LoopMount::new(file_system, bytes);
    let layouts = [("plain", PLAIN), ("brotli", BROTLI), ("vhd", VHD)];
    let mut worlds = layouts.map(|(name, layout)| World::new(place.path().join(name), layout));
    // In turn, since backups are a second apart.
    for number in 0..BACKUPS {
        worlds.iter_mut().for_each(|world| world.add(number));
    }
    for world in &worlds {
        let when = format!("{file_system:?} {:?}", world.layout);
        for kept in [2, 1] {
            succeed(&mut world.forget(kept));
            world.check(kept, &when);
        }
        let names = fs::read_dir(world.repository.join("xo-vm-backups")).unwrap().count();
        let images = fs::read_dir(world.lineage()).unwrap().filter(|entry| {
            let path = entry.as_ref().unwrap().path();
            path.extension().is_some_and(|end| end == "vhd")
        });
        assert_eq!((names, images.count()), (1, 1), "{when}");
    }
}

#[test]
fn backups_are_stored_and_merged_on_ext4() {
    live_on(FileSystem::Ext4, 96 << 20);
}

#[test]
fn backups_are_stored_and_merged_on_xfs() {
    // The least that it may have.
    live_on(FileSystem::Xfs, 300 << 20);
}

#[test]
fn backups_are_stored_and_merged_on_btrfs() {
    live_on(FileSystem::Btrfs, 256 << 20);
}

#[test]
fn backups_are_stored_and_merged_on_tmpfs() {
    live_on(FileSystem::Tmpfs, 96 << 20);
}

/// Fills a place until `left` bytes are free, as far as that can be done.
fn fill(place: &LoopMount, left: u64) -> PathBuf {
    let path = place.path().join("filled");
    let file = fs::File::create(&path).unwrap();
    let mut at = 0;
    for piece in [1 << 20, 4096, 512] {
        while std::os::unix::fs::FileExt::write_all_at(&file, &vec![1; piece], at).is_ok() {
            at += piece as u64;
        }
    }
    file.set_len(at - left.min(at)).unwrap();
    file.sync_all().unwrap();
    path
}

#[test]
fn a_full_place_takes_no_backup_and_loses_none() {
    for layout in [BROTLI, VHD] {
        let place = LoopMount::new(FileSystem::Ext4, 64 << 20);
        let mut world = World::with_backups(&place, layout);
        let filled = fill(&place, 0);
        let full = ["No space left", ".lock'", "the place is full", "make room"];
        world.refused(&mut world.ingest(BACKUPS), 1, &full);
        world.refused(&mut world.forget(1), 1, &full);
        fs::remove_file(filled).unwrap();
        // Room for a lock and a little more, by which blocks can be moved.
        let filled = fill(&place, 64 << 10);
        world.refused(&mut world.ingest(BACKUPS), 1, &["too little room: about", "MiB are needed", "make room"]);
        if layout == VHD {
            let told = ["not forgotten: web01/", "about 7 MiB are copied to merge it, and 0 MiB are free; make room"];
            world.refused(&mut world.forget(1), 3, &told);
            world.check(BACKUPS, "refused");
            fs::remove_file(filled).unwrap();
            succeed(&mut world.forget(1));
        } else {
            succeed(&mut world.forget(1));
            world.check(1, "merged on the full place");
            fs::remove_file(filled).unwrap();
        }
        world.check(1, &format!("{layout:?}"));
        world.add(BACKUPS);
        world.check(2, "room was made");
    }
}

#[test]
fn a_block_that_the_server_refuses_as_its_file_is_closed_is_in_no_backup() {
    let place = LoopMount::new(FileSystem::Ext4, 64 << 20);
    let mut world = World::with_backups(&place, PLAIN);
    let slow = SlowPath::mount(&world.repository);
    slow.fail("EDQUOT", "*/blocks/* ops=flush");
    let real = std::mem::replace(&mut world.repository, slow.path().to_path_buf());
    world.refused(&mut world.ingest(BACKUPS), 1, &["close ", "/blocks/", "quota"]);
    slow.release();
    world.repository = real;
    world.check(BACKUPS, "refused");
    world.add(BACKUPS);
    world.check(BACKUPS + 1, "taken");
}

#[test]
fn what_could_not_be_written_back_is_told_to_each_that_wrote_meanwhile() {
    // A disk that is smaller than it says: what is written later than it was taken finds no room.
    let place = LoopMount::over_full(64 << 20, 8 << 20);
    let storage = LocalStorage::open(&place.path()).unwrap();
    let marks = [storage.mark().unwrap(), storage.mark().unwrap()];
    let folder = ObjectPath::new("folder").unwrap();
    storage.create_directory(&folder).unwrap();
    // Less than is written past the system's cache.
    for number in 0..512 {
        storage.write(&folder.join(&number.to_string()).unwrap(), &[7; 32 << 10], Existing::Refuse).unwrap();
    }
    for mark in &marks {
        let error = storage.sync_tree(&folder, mark).unwrap_err();
        assert!(matches!(error.kind(), ErrorKind::NoSpace | ErrorKind::Io), "{error}");
    }
}

#[test]
fn a_merge_that_fills_the_place_stops_and_is_finished_when_there_is_room() {
    let place = LoopMount::new(FileSystem::Ext4, 64 << 20);
    let world = World::with_backups(&place, VHD);
    // It is stopped once it has begun, and then somebody else fills the place.
    let lineage = world.lineage();
    let has_begun = || {
        let mut names = fs::read_dir(&lineage).unwrap().map(|entry| entry.unwrap().file_name());
        names.any(|name| name.to_string_lossy().ends_with(".merge.json"))
    };
    let storage: Arc<dyn WritableStorage> = Arc::new(LocalStorage::open(&world.repository).unwrap());
    let lock = VmLock::take(storage, &VmId::new(VM).unwrap(), Duration::ZERO, |_| true).unwrap();
    let watch = Watch { threads: 1, jobs: 1, planned: &|_| {}, moved: &|_| {}, is_stopped: &has_begun };
    let forgotten = merge::forget(&lock, |backups| backups[..BACKUPS - 1].to_vec(), &watch).unwrap();
    assert!(forgotten.is_stopped && forgotten.backups.len() == BACKUPS - 1, "{forgotten:?}");
    drop(lock);
    let filled = fill(&place, 3 << 20);
    for _ in 0..2 {
        let (code, out, err) = run(&mut world.forget(1));
        let parts = [".vhd'", "No space left", "the place is full: make room, and run it again"];
        assert!(code == 1 && parts.iter().all(|part| err.contains(part)), "{code} {out}{err}");
        let (code, out, err) = run(xofs().arg("check").arg(&world.repository));
        assert!(code == 0 && out.contains("unfinished-merge"), "{code} {out}{err}");
        world.check(1, "not merged");
    }
    fs::remove_file(filled).unwrap();
    succeed(&mut world.forget(1));
    world.check(1, "merged");
    assert!(!has_begun());
}

#[test]
fn a_read_only_place_is_read_and_not_changed() {
    let place = LoopMount::new(FileSystem::Ext4, 64 << 20);
    let world = World::with_backups(&place, BROTLI);
    let plan = world.plan();
    place.remount(true);
    let told = [&format!("xo-vm-backups/{VM}.lock'")[..], "Read-only file system"];
    world.refused(&mut world.ingest(BACKUPS), 1, &told);
    world.refused(&mut world.forget(1), 1, &told);
    world.refused(&mut world.repair(&plan), 1, &told);
    world.check(BACKUPS, "read-only");
    succeed(xofs().arg("info").arg(&world.repository).arg(format!("{VM}/latest")));
    let mounted = Mounted::new(&world.repository, None);
    for (time, truth) in &world.truths {
        let shown = mounted.path().join("by-uuid").join(VM).join(time).join("disks/xvda.raw");
        assert!(fs::read(shown).unwrap() == *truth, "{time}");
    }
    drop(mounted);
    place.remount(false);
    succeed(&mut world.repair(&plan));
    succeed(&mut world.forget(1));
    world.check(1, "writable again");
}

#[test]
fn immutable_backups_are_built_upon_and_neither_merged_nor_removed() {
    for layout in [PLAIN, VHD] {
        let place = LoopMount::new(FileSystem::Ext4, 96 << 20);
        let mut world = World::with_backups(&place, layout);
        // Metadata of one that goes, and of the one that its disk is merged into.
        for (number, what) in [(0, "removed"), (1, "changed")] {
            let time = world.truths.keys().nth(number).unwrap().replace('-', "");
            let metadata = world.repository.join("xo-vm-backups").join(VM).join(format!("{time}.json"));
            succeed(Command::new("chattr").arg("+i").arg(&metadata));
            let told = format!(".json': it is immutable (chattr +i), and can be {what} once that is lifted");
            world.refused(&mut world.forget(3), 3, &["not forgotten: web01/", &told]);
            succeed(Command::new("chattr").arg("-i").arg(&metadata));
        }
        world.protect(2, "+i");
        let told = ["not forgotten: web01/", "it is immutable (chattr +i), and can be changed once that is lifted"];
        // The newest of those that go would be merged into one of them.
        world.refused(&mut world.forget(2), 3, &told);
        world.refused(&mut world.forget(1), 3, &told);
        world.check(BACKUPS, "refused");
        succeed(&mut world.forget(3));
        world.check(3, "what is not immutable goes");
        world.add(BACKUPS);
        world.check(4, "one is built on what is immutable");
        world.protect(3, "-i");
        succeed(&mut world.forget(1));
        world.check(1, "lifted");
    }
}

#[test]
fn an_immutable_disk_stays_with_its_backup_also_where_nothing_is_built_on_it() {
    for layout in [PLAIN, VHD] {
        let place = LoopMount::new(FileSystem::Ext4, 96 << 20);
        let mut world = World::new(place.path().join("repository"), layout);
        world.add(0);
        succeed(world.ingest(1).arg("--full"));
        let time = world.listed().pop().unwrap();
        world.truths.insert(time, content(1));
        let oldest = world.truths.keys().next().unwrap().replace('-', "");
        let lineage = world.lineage();
        let data = [lineage.join(format!("{oldest}.vhd")), lineage.join(format!("data/{oldest}.vhd"))];
        let data = data.iter().find(|path| path.exists()).unwrap();
        succeed(Command::new("chattr").args(["-R", "+i"]).arg(data));
        let told =
            ["not forgotten: web01/", ".vhd': it is immutable (chattr +i), and can be removed once that is lifted"];
        world.refused(&mut world.forget(1), 3, &told);
        world.check(2, "refused");
        succeed(Command::new("chattr").args(["-R", "-i"]).arg(data));
        succeed(&mut world.forget(1));
        world.check(1, "lifted");
    }
}

#[test]
fn an_immutable_repository_is_not_changed() {
    let place = LoopMount::new(FileSystem::Ext4, 64 << 20);
    let world = World::with_backups(&place, BROTLI);
    let plan = world.plan();
    let leftover = world.lineage().join(".gone.xofs-new");
    succeed(Command::new("chattr").arg("+i").arg(&leftover));
    let told = [".gone.xofs-new': it is immutable (chattr +i) until that is lifted"];
    world.refused(&mut world.repair(&plan), 1, &told);
    let all = world.repository.join("xo-vm-backups");
    succeed(Command::new("chattr").args(["-R", "+i"]).arg(&all));
    let told = [&format!("create 'xo-vm-backups/{VM}.lock': 'xo-vm-backups': it is immutable (chattr +i)")[..]];
    world.refused(&mut world.ingest(BACKUPS), 1, &told);
    world.refused(&mut world.forget(1), 1, &told);
    world.refused(&mut world.repair(&plan), 1, &told);
    world.check(BACKUPS, "immutable");
    succeed(Command::new("chattr").args(["-R", "-i"]).arg(&all));
    succeed(&mut world.repair(&plan));
    succeed(&mut world.forget(1));
    world.check(1, "lifted");
}
