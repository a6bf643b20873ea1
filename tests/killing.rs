//! The built binary, killed at any time while it ingests and while it forgets: every backup that is listed reads right, and the
//! next run finishes and leaves nothing over.
//!
//! `XOFS_ROUNDS=300` kills more often than the few times of each run of the tests, `XOFS_SEED=17` at other times.

#[allow(dead_code, reason = "each test file uses its part of the module")]
#[path = "../vhd/tests/seeds/mod.rs"]
mod seeds;
mod support;

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use jiff::Timestamp;
use seeds::Random;
use storage::LocalStorage;
use support::{scratch, succeed, xofs};
use xofs::repository::{OpenOptions, Repository};

const VM: &str = "1f2e3d4c-5b6a-4798-8a9b-0c1d2e3f4a5b";
const BLOCK: usize = 2 << 20;
const BLOCKS: usize = 4;
/// When the first one was made, in seconds since 1970: in August 2026.
const FIRST: i64 = 1_785_549_603;
/// Backups that a forget keeps.
const KEPT: usize = 2;
/// How often a process is killed where `XOFS_ROUNDS` does not say it.
const ROUNDS: usize = 20;

/// A repository of one VM, the image of its disk, and what each backup was made of.
struct World {
    repository: PathBuf,
    image: PathBuf,
    layout: [&'static str; 2],
    content: Vec<u8>,
    /// By the time of the backup.
    truths: BTreeMap<String, Vec<u8>>,
    /// How long the last ingest and the last forget took that were not killed.
    took: [Duration; 2],
    /// How many ingests there were; each is of a minute of its own, since several of one second would be set ahead of the clock.
    ingests: i64,
}

impl World {
    fn new(folder: &Path, layout: [&'static str; 2]) -> Self {
        let repository = folder.join(layout[1]);
        fs::create_dir_all(repository.join("xo-vm-backups")).unwrap();
        let image = folder.join(format!("{}.raw", layout[1]));
        Self {
            repository,
            image,
            layout,
            content: vec![0; BLOCKS * BLOCK],
            truths: BTreeMap::new(),
            took: [Duration::ZERO; 2],
            ingests: 0,
        }
    }

    /// Changes some blocks of the image, each by a byte or as a whole.
    fn change(&mut self, random: &mut Random) {
        for _ in 0..=random.below(BLOCKS) {
            let block = &mut self.content[random.below(BLOCKS) * BLOCK..][..BLOCK];
            let byte = u8::try_from(random.below(256)).unwrap();
            if random.below(2) == 0 { block.fill(byte) } else { block[random.below(BLOCK)] ^= byte }
        }
        fs::write(&self.image, &self.content).unwrap();
    }

    fn ingest(&mut self) -> Command {
        self.ingests += 1;
        let time = Timestamp::from_second(FIRST + 60 * self.ingests).unwrap();
        let mut command = xofs();
        command.arg("ingest").arg(&self.repository).args(["--vm", VM, "--name", "web01"]).args(self.layout);
        command.args(["--time", &time.to_string()]).arg("--disk").arg(format!("xvda={}", self.image.display()));
        command
    }

    fn forget(&self) -> Command {
        let mut command = xofs();
        command.arg("forget").arg(&self.repository).args(["--all", "--apply", "--keep-last", &KEPT.to_string()]);
        command
    }

    /// Reads all backups; what is new was made of the image as it is. Returns how many there are.
    fn check(&mut self, when: &str) -> usize {
        let storage = Arc::new(LocalStorage::open(&self.repository).unwrap());
        let repository = Repository::with_storage(storage, OpenOptions { key: None, cache_bytes: 8 << 20 }).unwrap();
        let vms = repository.vms().unwrap();
        let Some(vm) = vms.first() else { return 0 };
        let backups = repository.backups(&vm.id).unwrap_or_else(|error| panic!("{when}: {error}"));
        for backup in backups.iter() {
            assert_eq!((backup.problem.as_deref(), backup.disks.len()), (None, 1), "{when}: {}", backup.time);
            let time = backup.time;
            let disk = repository.open_disk(backup, &backup.disks[0]);
            let disk = disk.unwrap_or_else(|error| panic!("{when}: {time}: {error}"));
            let mut bytes = vec![0xee; usize::try_from(disk.size()).unwrap()];
            disk.read_at(0, &mut bytes).unwrap_or_else(|error| panic!("{when}: {time}: {error}"));
            let truth = self.truths.entry(backup.time.stored()).or_insert_with(|| self.content.clone());
            assert!(bytes == *truth, "{when}: {time} reads wrong");
        }
        let listed: Vec<String> = backups.iter().map(|backup| backup.time.stored()).collect();
        let kept: Vec<&String> = self.truths.keys().rev().take(KEPT).collect();
        assert!(kept.iter().all(|time| listed.contains(time)), "{when}: {listed:?}");
        self.truths.retain(|time, _| listed.contains(time));
        listed.len()
    }

    /// Runs to the end what was killed, and whatever else cleans up; nothing is left over.
    fn finish(&mut self, when: &str) {
        self.took[0] = duration(&mut self.ingest());
        self.check(when);
        self.took[1] = duration(&mut self.forget());
        assert_eq!(self.check(when), KEPT, "{when}");
        let times: Vec<&String> = self.truths.keys().collect();
        let vms = self.repository.join("xo-vm-backups");
        assert_eq!(names(&vms), [VM], "{when}");
        let metadata = times.iter().map(|time| format!("{time}.json"));
        // A forget that merged nothing last leaves the cache of the listing, which check() reads through.
        let found: Vec<String> = names(&vms.join(VM)).into_iter().filter(|name| name != "cache.json.gz").collect();
        assert_eq!(found, metadata.chain(["vdis".to_owned()]).collect::<Vec<_>>(), "{when}");
        let job = vms.join(VM).join("vdis").join(xofs::ingest::JOB);
        // A killed first ingest may have named the disk otherwise: its folder is empty then, but for `data`.
        let disks = names(&job).into_iter().map(|name| job.join(name)).filter(|disk| names(disk) != ["data"]);
        let disks: Vec<PathBuf> = disks.collect();
        assert_eq!(disks.len(), 1, "{when}: {disks:?}");
        let is_flat = self.layout[1] == "vhd";
        let end = if is_flat { "vhd" } else { "alias.vhd" };
        let images = times.iter().map(|time| format!("{time}.{end}"));
        // A VHD file has its digests beside it, if they could be written.
        let digests: Vec<String> = times.iter().map(|time| format!(".{time}.{end}.xofs-digests")).collect();
        let found: Vec<String> = names(&disks[0]).into_iter().filter(|name| !digests.contains(name)).collect();
        assert_eq!(found, images.chain(["data".to_owned()]).collect::<Vec<_>>(), "{when}");
        assert_eq!(names(&disks[0].join("data")).len(), if is_flat { 0 } else { KEPT }, "{when}");
    }
}

fn names(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display()));
    let mut names: Vec<String> = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

/// Runs a command and kills it some time before `limit`; returns whether it was still running.
fn kill(mut command: Command, limit: Duration, random: &mut Random) -> bool {
    let mut child = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    std::thread::sleep(Duration::from_micros(random.below(usize::try_from(limit.as_micros()).unwrap()) as u64));
    child.kill().unwrap();
    child.wait().unwrap().signal().is_some()
}

/// Returns how long a command takes undisturbed.
fn duration(command: &mut Command) -> Duration {
    let start = Instant::now();
    succeed(command);
    start.elapsed()
}

#[test]
fn ingests_and_forgets_that_are_killed_lose_no_backup_and_the_next_run_leaves_nothing_over() {
    let number = |name: &str| std::env::var(name).ok().map(|text| text.parse().expect("a number"));
    let seed = number("XOFS_SEED").unwrap_or_else(|| u64::from(std::process::id()));
    let rounds = number("XOFS_ROUNDS").map_or(ROUNDS, |rounds| usize::try_from(rounds).unwrap());
    println!("XOFS_SEED={seed} XOFS_ROUNDS={rounds}");
    let random = &mut Random::new(seed);
    let folder = tempfile::Builder::new().prefix("killing-").tempdir_in(scratch()).unwrap();
    let mut worlds = [["--format", "exploded"], ["--format", "vhd"]].map(|layout| World::new(folder.path(), layout));
    let mut killed = [0; 2];
    for round in 0..rounds {
        let world = &mut worlds[round % 2];
        // Three are there besides the one that is killed: the first round of each has nothing to build on.
        while world.truths.len() < KEPT + 1 + random.below(3) {
            world.change(random);
            world.took[0] = duration(&mut world.ingest());
            world.check(&format!("XOFS_SEED={seed}, before round {round}"));
        }
        world.change(random);
        // Those of ingests come first, after which it is known how long a forget takes.
        let is_forget = round / 2 % 2 == 1;
        let command = if is_forget { world.forget() } else { world.ingest() };
        let is_killed = kill(command, world.took[usize::from(is_forget)], random);
        killed[usize::from(is_forget)] += usize::from(is_killed);
        let what = if is_forget { "forget" } else { "ingest" };
        let when = format!("XOFS_SEED={seed}, round {round}, {what} of {}", world.layout[1]);
        // A dead program's lock is waited for ten seconds, which other tests do.
        let _ = fs::remove_dir(world.repository.join(format!("xo-vm-backups/{VM}.lock")));
        world.check(&when);
        world.finish(&when);
    }
    println!("{} ingests and {} forgets were killed while they ran", killed[0], killed[1]);
    assert!(rounds < ROUNDS || killed[0] > 0 && killed[1] > 0, "XOFS_SEED={seed}: {killed:?}");
}
