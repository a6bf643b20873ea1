//! Backups by the built binary of a simulated pool in which one thing goes wrong, at any moment, or that are killed: a run succeeds
//! or says what failed, every backup that is listed reads right, the base is never lost, and the next run is an increment that
//! leaves nothing over in the pool or in a repository.
//!
//! Run by hand: `XOFS_ROUNDS=300` makes more rounds, `XOFS_SEED=17` others. A round is a seed of its own, so that
//! `XOFS_SEED=19 XOFS_ROUNDS=1` is the third of these.

mod pool;
#[allow(dead_code, reason = "each test file uses its part of the module")]
#[path = "../vhd/tests/seeds/mod.rs"]
mod seeds;
mod support;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use pool::{Held, Lab, MIB, compare_backup};
use rustix::process::{Pid, Signal, kill_process};
use seeds::Random;
use serde_json::Value;
use support::{init, run, scratch, succeed, xofs};
use tempfile::TempDir;
use xapi_simulator::failure::Failure;
use xapi_simulator::file_sr::FileSr;
use xapi_simulator::scene::{Disk, Machine, Repository as Sr, Storage};
use xapi_simulator::value::{Reference, Value as Field};
use xapi_simulator::{Act, Class, Fault, Scene, Site, Upset};
use xofs::repository::{OpenOptions, Repository};

/// How many rounds there are where `XOFS_ROUNDS` does not say it.
const ROUNDS: u64 = 5;
/// How long a run may take, whatever goes wrong: what takes longer hangs.
const ENDLESS: Duration = Duration::from_secs(300);
/// How often it is looked at what a run does.
const GLANCE: Duration = Duration::from_millis(2);

/// How disks are read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    Stream,
    BlockList,
    ChangedBlocks { purges_data: bool },
    Files,
}

impl Way {
    fn any(random: &mut Random) -> Self {
        match random.below(5) {
            0 => Self::Stream,
            1 => Self::BlockList,
            2 => Self::ChangedBlocks { purges_data: false },
            3 => Self::ChangedBlocks { purges_data: true },
            _ => Self::Files,
        }
    }

    fn arguments(self) -> &'static [&'static str] {
        match self {
            Self::Stream => &["--no-nbd"],
            Self::BlockList | Self::Files => &[],
            Self::ChangedBlocks { purges_data: false } => &["--cbt"],
            Self::ChangedBlocks { purges_data: true } => &["--cbt", "--purge-snapshot-data"],
        }
    }

    /// How reports call it.
    fn name(self) -> &'static str {
        match self {
            Self::Stream => "VHD stream",
            Self::BlockList => "NBD + block list",
            Self::ChangedBlocks { .. } => "NBD + CBT",
            Self::Files => "files of the SR",
        }
    }
}

/// What goes wrong in a round.
#[derive(Debug)]
enum Trouble {
    /// Something of the simulator's list.
    Fault(Fault),
    /// The pool stops answering in the middle of a transfer, and somebody ends the run.
    Stall(Site, u64),
    /// A signal, after so many requests and this time.
    Signal(Signal, usize, Duration),
    /// Somebody removes the snapshots that the next increment is relative to, after so many requests.
    NoBase(usize),
    /// Others hold all connections that a host serves by NBD.
    Taken,
}

impl Trouble {
    fn any(random: &mut Random, way: Way) -> Self {
        let number = |random: &mut Random, limit: u64| random.below(usize::try_from(limit).expect("small")) as u64;
        let site = |random: &mut Random| match way {
            Way::Stream => Site::Export,
            _ if random.below(3) == 0 => Site::Export,
            _ => Site::Nbd,
        };
        match random.below(13) {
            0 => Self::Stall(site(random), number(random, 4 * MIB)),
            1 => Self::Fault(
                Fault::new(site(random), Act::Cut).after(number(random, 4 * MIB)).times([1, 2, 3][random.below(3)]),
            ),
            2 => Self::Fault(Fault::new(site(random), Act::Fail(Failure::device())).after(number(random, 4 * MIB))),
            3 => {
                let slow = Duration::from_millis(random.below(1500) as u64);
                Self::Fault(Fault::new(site(random), Act::Delay(slow)).after(number(random, 2 * MIB)).times(3))
            }
            4 => {
                let upset = match random.below(7) {
                    0 => Upset::LoseSessions,
                    1 => Upset::RestartToolstack,
                    2 => Upset::Reboot(random.below(2), Duration::from_millis(100 + random.below(1500) as u64)),
                    3 => Upset::ChangeMaster(1),
                    4 => Upset::LoseTasks,
                    5 => Upset::Coalesce,
                    _ => Upset::FillStorage,
                };
                // In the middle of a transfer.
                Self::Fault(Fault::new(site(random), Act::Upset(upset)).after(number(random, 4 * MIB)))
            }
            5 | 6 => {
                let upset = match random.below(7) {
                    0 => Upset::LoseSessions,
                    1 => Upset::RestartToolstack,
                    2 => Upset::Reboot(random.below(2), Duration::from_millis(100 + random.below(1500) as u64)),
                    3 => Upset::ChangeMaster(1),
                    4 => Upset::LoseTasks,
                    5 => Upset::Coalesce,
                    _ => Upset::FillStorage,
                };
                Self::Fault(Fault::call("*", Act::Upset(upset)).after(number(random, 120)))
            }
            7 => {
                let act = match random.below(4) {
                    0 => Act::Cut,
                    1 => Act::Refuse,
                    2 => Act::Fail(Failure::internal("not now")),
                    _ => Act::Delay(Duration::from_millis(random.below(1500) as u64)),
                };
                Self::Fault(Fault::call("*", act).after(number(random, 120)))
            }
            8 => {
                let failure = Failure::storage(460, "Failed to calculate changed blocks for given VDIs.");
                let act = match random.below(3) {
                    0 => Act::Fail(failure),
                    1 => Act::Bitmap(random.below(64)),
                    _ => Act::Cut,
                };
                Self::Fault(Fault::call("VDI.list_changed_blocks", act).times([1, 2, 3][random.below(3)]))
            }
            9 => match random.below(3) {
                0 => Self::Fault(Fault::call("VM.snapshot", Act::Fail(Failure::no_space()))),
                1 => Self::Fault(Fault::call("VM.snapshot", Act::Cut)),
                _ => Self::Fault(Fault::call(
                    "VDI.destroy",
                    Act::Fail(Failure::in_use(&Reference::from("OpaqueRef:1"), "destroy")),
                )),
            },
            10 => match random.below(2) {
                0 => Self::NoBase(random.below(100)),
                _ => Self::Taken,
            },
            11 => Self::Signal(Signal::TERM, random.below(100), Duration::from_millis(random.below(60) as u64)),
            _ => Self::Signal(Signal::KILL, random.below(100), Duration::from_millis(random.below(60) as u64)),
        }
    }
}

/// What became of a run.
#[derive(Debug)]
struct Ended {
    /// `None` if it was killed.
    code: Option<i32>,
    out: String,
    err: String,
}

/// A pool, and what its backups are stored in.
struct World {
    lab: Lab,
    folder: TempDir,
    repositories: Vec<PathBuf>,
    disks: usize,
    way: Way,
    files: FileSr,
    sr: String,
    /// Of each backup in each repository.
    truths: BTreeMap<(usize, String), Held>,
    /// What the pool's storage had room for before somebody filled it.
    room: u64,
    guest: u64,
}

impl World {
    fn new(seed: u64, random: &mut Random) -> Self {
        let (way, disks) = (Way::any(random), 2 + random.below(2));
        let room = 1 << 30;
        let vm = (0..disks).fold(Machine::new("web01").running(), |vm, number| {
            let size = (4 + random.below(12)) as u64 * MIB;
            vm.disk(Disk::new(&format!("disk{number}"), size).filled(50))
        });
        let scene = Scene::new(seed).host("one").host("two").sr(Sr::new("shared", Storage::Nfs).size(room)).vm(vm);
        let folder = tempfile::Builder::new().prefix("backup-faults-").tempdir_in(scratch()).expect("a folder");
        let count = 1 + random.below(2);
        let repositories = (0..count).map(|number| init(folder.path(), &format!("repository{number}"), &[])).collect();
        let lab = Lab::new(folder.path(), "lab", scene);
        fs::create_dir(folder.path().join("sr")).expect("a new folder");
        let files = FileSr::new(&folder.path().join("sr"));
        let sr = lab.simulator.only(Class::Sr, "shared");
        let sr = lab.simulator.look(|store| store.text(Class::Sr, &sr, "uuid").map(str::to_owned)).expect("it has one");
        Self { lab, folder, repositories, disks, way, files, sr, truths: BTreeMap::new(), room, guest: seed }
    }

    fn command(&self) -> Command {
        let mut command = self.lab.command("backup", self.way.arguments());
        command.args(["--vm", "web01", "--json", "--compression", "none"]);
        for repository in &self.repositories {
            command.arg("--to").arg(repository);
        }
        if self.way == Way::Files {
            command.arg("--sr-path").arg(format!("{}={}", self.sr, self.folder.path().join("sr").display()));
        }
        command
    }

    fn machine(&self) -> Reference {
        self.lab.simulator.only(Class::Vm, "web01")
    }

    fn guest_writes(&mut self, writes: usize) {
        self.guest += 1;
        self.lab.simulator.guest_writes(&self.machine(), self.guest << 20, writes as u64).expect("written");
    }

    /// The snapshots of disks that are known to be stored.
    fn bases(&self) -> BTreeSet<String> {
        self.lab.simulator.look(|store| {
            let is_stored = |object: &xapi_simulator::store::Object| match object.record.get("other_config") {
                Some(Field::Map(entries)) => entries.contains_key("xofs:stored"),
                _ => false,
            };
            let all = store.all(Class::Vdi).filter(|(_, object)| is_stored(object));
            all.filter_map(|(_, object)| Some(object.record.get("uuid")?.as_text()?.to_owned())).collect()
        })
    }

    /// Brings the files of the storage to what its disks hold, as its host does.
    fn keep_files(&mut self) {
        if self.way != Way::Files {
            return;
        }
        let contents: Vec<_> = self.lab.simulator.change(|state| {
            let all: Vec<Reference> = state.store.all(Class::Vdi).map(|(vdi, _)| vdi.clone()).collect();
            all.iter().filter_map(|vdi| state.content(vdi).ok()).collect()
        });
        self.files.keep(&contents).expect("there is room");
    }

    /// Runs a backup, with whatever happens to it; the guest goes on writing once there is a snapshot.
    fn back_up(&mut self, trouble: Option<&Trouble>, when: &str) -> Ended {
        self.keep_files();
        let held = self.lab.held(&self.machine());
        self.lab.simulator.log().clear();
        let _taken: Vec<TcpStream> = match trouble {
            Some(Trouble::Fault(fault)) => {
                self.lab.simulator.fault(fault.clone());
                Vec::new()
            }
            Some(Trouble::Stall(site, after)) => {
                self.lab.simulator.fault(Fault::new(site.clone(), Act::Delay(2 * ENDLESS)).after(*after));
                Vec::new()
            }
            Some(Trouble::Taken) => {
                (0..16).map(|_| TcpStream::connect(self.lab.simulator.nbd_address()).expect("it listens")).collect()
            }
            _ => Vec::new(),
        };
        let snapshots = self.lab.snapshots(Class::Vm);
        let [out, err] = ["out", "err"].map(|name| self.folder.path().join(name));
        let file = |path: &Path| Stdio::from(fs::File::create(path).expect("a new file"));
        let mut command = self.command();
        let mut child = command.stdin(Stdio::null()).stdout(file(&out)).stderr(file(&err)).spawn().expect("it starts");
        let pid = Pid::from_child(&child);
        let (begun, mut is_struck, mut has_written) = (Instant::now(), false, false);
        let status = loop {
            if let Some(status) = child.try_wait().expect("it is our child") {
                break status;
            }
            if begun.elapsed() > ENDLESS {
                child.kill().expect("it is our child");
                child.wait().expect("it is our child");
                panic!("{when}: it hangs\n{}", fs::read_to_string(&err).unwrap_or_default());
            }
            if !has_written && self.lab.snapshots(Class::Vm) > snapshots {
                self.guest_writes(2);
                has_written = true;
            }
            self.keep_files();
            let requests = if is_struck { 0 } else { self.lab.simulator.log().requests().len() };
            match trouble {
                Some(Trouble::Signal(signal, after, delay)) if !is_struck && requests > *after => {
                    std::thread::sleep(*delay);
                    // It may have ended meanwhile.
                    let _ended = kill_process(pid, *signal);
                    is_struck = true;
                }
                Some(Trouble::NoBase(after)) if !is_struck && requests > *after => {
                    self.remove_bases();
                    is_struck = true;
                }
                Some(Trouble::Stall(..)) if !is_struck && self.lab.simulator.faults_left() == 0 => {
                    kill_process(pid, Signal::TERM).expect("it is our child");
                    is_struck = true;
                }
                _ => std::thread::sleep(GLANCE),
            }
        };
        self.lab.simulator.clear_faults();
        let text = |path: &Path| fs::read_to_string(path).expect("UTF-8");
        let ended = Ended { code: status.code(), out: text(&out), err: text(&err) };
        if ended.code.is_none() {
            // A dead program's lock is waited for ten seconds, which other tests do.
            for repository in &self.repositories {
                let vms = fs::read_dir(repository.join("xo-vm-backups")).into_iter().flatten().flatten();
                vms.filter(|entry| entry.path().extension().is_some_and(|end| end == "lock"))
                    .for_each(|entry| drop(fs::remove_dir(entry.path())));
            }
        }
        self.compare(&held, when, &ended);
        ended
    }

    fn remove_bases(&self) {
        let pool = self.lab.client();
        for vdi in self.bases() {
            // The run may have removed it itself.
            let _gone = pool.by_uuid::<xapi::record::Vdi>(&vdi).and_then(|vdi| pool.destroy_vdi(&vdi));
        }
    }

    /// Compares each disk of each backup; those that are new hold what the disks did when the run began. Has all read by a check.
    fn compare(&mut self, held: &Held, when: &str, ended: &Ended) {
        for (number, folder) in self.repositories.iter().enumerate() {
            let repository = Repository::open(folder, OpenOptions::default()).expect("a repository");
            let vms = repository.vms().unwrap_or_else(|error| panic!("{when}: {error}"));
            let Some(vm) = vms.first() else { continue };
            let backups = repository.backups(&vm.id).unwrap_or_else(|error| panic!("{when}: {error}"));
            for backup in backups.iter() {
                let time = backup.time.stored();
                let truth = self.truths.entry((number, time)).or_insert_with(|| held.clone());
                compare_backup(&repository, backup, truth, &format!("{when}: {ended:?}"));
            }
            let known = self.truths.keys().filter(|(of, _)| *of == number).count();
            assert_eq!(backups.len(), known, "{when}: a backup is gone");
            let (code, out, err) = run(xofs().arg("check").arg(folder).arg("--data"));
            assert_eq!(code, 0, "{when}: {out}{err}\n{ended:?}");
        }
    }

    /// Whether a run that failed says so as it should.
    fn judge(&self, ended: &Ended, trouble: &Trouble, when: &str) {
        let is_signal = matches!(trouble, Trouble::Signal(..) | Trouble::Stall(..));
        assert!(
            !ended.err.contains("panicked") && !ended.err.contains(&self.lab.simulator.password()),
            "{when}: {ended:?}"
        );
        match ended.code {
            Some(0) => {}
            Some(130) => assert!(is_signal, "{when}: {ended:?}"),
            Some(1 | 3) => {
                // What of the pool, of the VM or of the repository it was.
                let host = self.lab.simulator.address().ip().to_string();
                let network = host.rsplit_once('.').expect("four numbers").0;
                let names = [network, "xvd", "web01", "VM.", "VDI.", "repository"];
                assert!(names.iter().any(|name| ended.err.contains(name)), "{when}: {ended:?}");
            }
            Some(_) => panic!("{when}: {ended:?}"),
            None => assert!(is_signal, "{when}: {ended:?}"),
        }
    }

    /// Whatever is left to be done by the pool itself.
    fn settle(&self) {
        self.lab.simulator.change(|state| {
            let all: Vec<Reference> = state.store.all(Class::Sr).map(|(sr, _)| sr.clone()).collect();
            for sr in all {
                let room = Field::from(self.room);
                state.store.set(Class::Sr, &sr, "physical_size", room).expect("it is there");
            }
        });
        self.lab.simulator.happen(&Upset::Coalesce);
        // A host that was started anew is back.
        let begun = Instant::now();
        while [0, 1].iter().any(|&host| TcpStream::connect(self.lab.simulator.address_of(host)).is_err()) {
            assert!(begun.elapsed() < ENDLESS, "a host stays away");
            std::thread::sleep(GLANCE);
        }
    }

    /// Whether nothing is left of any run but one base, and in the repositories nothing but backups.
    fn is_at_rest(&self, is_purged: bool, when: &str, ended: &Ended) {
        let snapshots = usize::from(!is_purged);
        assert_eq!(
            (self.lab.snapshots(Class::Vm), self.lab.snapshots(Class::Vdi)),
            (snapshots, self.disks),
            "{when}: snapshots\n{ended:?}"
        );
        assert_eq!(self.bases().len(), self.disks, "{when}: bases");
        let begun = Instant::now();
        loop {
            let left = self.lab.simulator.look(|store| {
                let name = |object: &xapi_simulator::store::Object| format!("{:?}", object.record.get("name_label"));
                // Where the answer to a call was lost nobody knows its task, which the pool removes an hour after its end.
                let is_unknown = |object: &xapi_simulator::store::Object| {
                    name(object).contains("\"Async.") && object.record.get("status") != Some(&Field::from("pending"))
                };
                let tasks = store.all(Class::Task).filter(|(_, task)| !is_unknown(task));
                tasks.map(|(_, task)| name(task)).collect::<Vec<String>>()
            });
            let left = (left, self.lab.control_domain_devices());
            if left == (Vec::new(), 0) {
                break;
            }
            assert!(
                begun.elapsed() < Duration::from_secs(60),
                "{when}: tasks, and devices of hosts are left: {left:?}\n{ended:?}"
            );
            std::thread::sleep(Duration::from_millis(50));
        }
        assert_eq!(self.lab.journals(), 0, "{when}: journals of runs");
        for (number, repository) in self.repositories.iter().enumerate() {
            let times: BTreeSet<&String> =
                self.truths.keys().filter(|(of, _)| *of == number).map(|(_, at)| at).collect();
            let found = Command::new("find").arg(repository.join("xo-vm-backups")).arg("-type").arg("f").output();
            let found = String::from_utf8(found.expect("it runs").stdout).expect("UTF-8");
            let is_of_none = |path: &&str| {
                let is_block = path.contains("/data/");
                let is_cache = path.ends_with("cache.json.gz");
                !is_cache && !is_block && !times.iter().any(|time| path.contains(time.as_str()))
            };
            let left: Vec<&str> = found.lines().filter(is_of_none).collect();
            assert!(left.is_empty(), "{when}: left in the repository: {left:?}\n{ended:?}");
            let images =
                succeed(Command::new("find").arg(repository).args(["-path", "*/data/*.vhd", "-prune", "-print"]));
            assert_eq!(images.lines().count(), times.len() * self.disks, "{when}: images\n{images}{times:?}");
            let other =
                succeed(Command::new("find").arg(repository).args(["-name", "*.lock", "-o", "-name", ".*tmp*"]));
            assert_eq!(other, "", "{when}: locks and the like");
        }
    }
}

/// One world, one thing that goes wrong.
fn round(seed: u64) {
    let random = &mut Random::new(seed);
    let mut world = World::new(seed, random);
    let trouble = Trouble::any(random, world.way);
    let before = random.below(3);
    let when = format!(
        "XOFS_SEED={seed} XOFS_ROUNDS=1: {:?} of {} disks into {} repositories with {before} backups, {trouble:?}",
        world.way,
        world.disks,
        world.repositories.len()
    );
    let begun = Instant::now();
    for _ in 0..before {
        let ended = world.back_up(None, &when);
        assert_eq!(ended.code, Some(0), "{when}: {ended:?}");
        let writes = 1 + random.below(4);
        world.guest_writes(writes);
    }
    let bases = world.bases();
    let known = world.truths.len();
    let ended = world.back_up(Some(&trouble), &when);
    world.judge(&ended, &trouble, &when);
    let made = world.truths.len() - known;
    let left = world.bases();
    let is_base_kept = bases.is_subset(&left);
    if !matches!(trouble, Trouble::NoBase(_)) {
        // The bases of before stay until those of now are told to be stored.
        let is_next = made == world.repositories.len() && left.difference(&bases).count() == world.disks;
        assert!(is_base_kept || is_next, "{when}: {bases:?} became {left:?}\n{ended:?}");
    }
    if ended.code == Some(0) {
        assert_eq!(made, world.repositories.len(), "{when}: {ended:?}");
    }
    println!("{when}: {:?} with {made} new after {:?}: {}", ended.code, begun.elapsed(), ended.err.trim());
    world.settle();
    let writes = 1 + random.below(4);
    world.guest_writes(writes);
    let ended_well = world.back_up(None, &when);
    assert_eq!(ended_well.code, Some(0), "{when}: the run after: {ended_well:?}\nbefore: {ended:?}");
    let said: Value = serde_json::from_str(&ended_well.out).expect("JSON");
    let backup = &said["vms"][0]["backup"];
    let reads = backup["reads"].as_array().expect("reads");
    assert_eq!(reads.len(), world.disks, "{when}: {said:#}");
    // It is an increment of the pool's snapshot if that one is there which the repositories have.
    let has_base = if made == 0 { before > 0 && is_base_kept } else { ended.code == Some(0) };
    let has_base = has_base && !matches!(trouble, Trouble::NoBase(_));
    for read in reads {
        let passes = read["passes"].as_array().expect("passes");
        assert_eq!(passes.len(), 1, "{when}: {said:#}\n{ended:?}");
        assert!(!has_base || passes[0]["base"].is_string(), "{when}: {said:#}\n{ended:?}");
        let way = passes[0]["way"].as_str().expect("words");
        let is_best = match world.way {
            // There is nothing to have tracked.
            Way::ChangedBlocks { .. } if !passes[0]["base"].is_string() => way.starts_with(Way::BlockList.name()),
            // A tool keeps these files, some time after the snapshot.
            Way::Files => way.starts_with("files") || way.starts_with("NBD"),
            best => way.starts_with(best.name()),
        };
        assert!(is_best, "{when}: {way}\n{ended:?}");
    }
    for (number, stored) in backup["repositories"].as_array().expect("repositories").iter().enumerate() {
        let had = world.truths.keys().filter(|(of, _)| *of == number).count() > 1;
        for disk in stored["disks"].as_array().expect("disks") {
            assert_eq!(disk["isKey"].as_bool(), Some(!had), "{when}: {said:#}\n{ended:?}");
        }
    }
    let is_tracked =
        reads.iter().all(|read| read["passes"][0]["way"].as_str().is_some_and(|way| way.starts_with("NBD + CBT")));
    world.is_at_rest(is_tracked && world.way == Way::ChangedBlocks { purges_data: true }, &when, &ended_well);
}

#[test]
#[ignore = "takes minutes"]
fn backups_that_something_goes_wrong_with_fail_clean_and_the_next_one_is_an_increment_that_leaves_nothing_over() {
    let number = |name: &str| std::env::var(name).ok().map(|text| text.parse::<u64>().expect("a number"));
    let seed = number("XOFS_SEED").unwrap_or(1);
    let rounds = number("XOFS_ROUNDS").unwrap_or(ROUNDS);
    println!("XOFS_SEED={seed} XOFS_ROUNDS={rounds}");
    let failed: Vec<u64> =
        (seed..seed + rounds).filter(|&seed| std::panic::catch_unwind(|| round(seed)).is_err()).collect();
    assert!(failed.is_empty(), "XOFS_ROUNDS=1 with each XOFS_SEED of {failed:?}");
}
