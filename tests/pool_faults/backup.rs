//! A round of backups: some that go well, one that something goes wrong with, perhaps one that is killed, and the last, which must
//! be an increment and leave nothing over.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

use rustix::process::Signal;
use serde_json::Value;
use xapi_simulator::scene::{Disk, Machine, Repository as Sr, Storage};
use xapi_simulator::{Class, Scene, Site};
use xofs::repository::{OpenOptions, Repository};

use crate::lab::{Ended, Lab};
use crate::pool::{Held, MIB, compare_backup};
use crate::seeds::Random;
use crate::support::{init, run, succeed, xofs};
use crate::trouble::{Kind, Moment, Trouble};

/// What the SR has room for (bytes).
const ROOM: u64 = 1 << 30;

/// How disks are read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    Stream,
    BlockList,
    ChangedBlocks {
        purges_data: bool,
    },
    Files,
    /// The machine as a whole, which keeps no snapshot.
    Xva,
}

impl Way {
    const ALL: [Self; 6] = [
        Self::Stream,
        Self::BlockList,
        Self::ChangedBlocks { purges_data: false },
        Self::ChangedBlocks { purges_data: true },
        Self::Files,
        Self::Xva,
    ];

    /// One of those to which something of this kind can happen.
    fn any(random: &mut Random, kind: Kind) -> Self {
        let fits = |way: &Self| match kind {
            Kind::NoChangedBlocks | Kind::WrongBitmap => matches!(way, Self::ChangedBlocks { .. }),
            Kind::Taken => matches!(way, Self::BlockList | Self::ChangedBlocks { .. }),
            Kind::DropBase | Kind::KilledAtPublish => *way != Self::Xva,
            _ => true,
        };
        let ways: Vec<Self> = Self::ALL.into_iter().filter(fits).collect();
        ways[random.below(ways.len())]
    }

    fn arguments(self) -> &'static [&'static str] {
        match self {
            Self::Stream => &["--no-nbd"],
            Self::BlockList | Self::Files => &[],
            Self::ChangedBlocks { purges_data: false } => &["--cbt"],
            Self::ChangedBlocks { purges_data: true } => &["--cbt", "--purge-snapshot-data"],
            Self::Xva => &["--mode", "full", "--xva-compression", "none"],
        }
    }

    /// Where bytes pass.
    fn sites(self, has_base: bool) -> &'static [Site] {
        match self {
            Self::Stream => &[Site::Export],
            Self::ChangedBlocks { .. } if has_base => &[Site::Nbd],
            Self::BlockList | Self::ChangedBlocks { .. } => &[Site::Nbd, Site::Export],
            Self::Files => &[],
            Self::Xva => &[Site::ExportVm],
        }
    }

    /// How reports call it.
    fn name(self) -> &'static str {
        match self {
            Self::Stream => "VHD stream",
            Self::BlockList => "NBD + block list",
            Self::ChangedBlocks { .. } => "NBD + CBT",
            Self::Files => "files of the SR",
            Self::Xva => "export",
        }
    }
}

/// A pool, and what its backups are stored in.
struct World {
    lab: Lab,
    repositories: Vec<PathBuf>,
    /// That are backed up; there may be one more, which is left out.
    disks: usize,
    has_left_out: bool,
    way: Way,
    format: &'static str,
    /// Of each backup in each repository.
    truths: BTreeMap<(usize, String), Held>,
    guest: u64,
}

impl World {
    fn new(seed: u64, random: &mut Random, kind: Kind) -> Self {
        let (way, disks) = (Way::any(random, kind), 1 + random.below(3));
        let is_old = kind == Kind::KilledDetached || random.below(4) == 0;
        let has_left_out = is_old || random.below(2) == 0;
        let is_running = kind != Kind::KilledDetached && random.below(3) > 0;
        let disk = |name: &str, size| Disk::new(name, size).filled(50);
        let machine = (0..disks).fold(Machine::new("web01"), |vm, number| {
            vm.disk(disk(&format!("disk{number}"), (3 + random.below(6)) as u64 * MIB))
        });
        let machine = if has_left_out { machine.disk(disk("[NOBAK] scratch", 4 * MIB)) } else { machine };
        let machine = if is_running { machine.running() } else { machine };
        let time = |random: &mut Random, most| Duration::from_millis(random.below(most) as u64);
        // Long enough for the next run to meet one that is being taken.
        let is_met = matches!(kind, Kind::KilledAtSnapshot | Kind::MadeUnknown);
        let (snapshot_time, detach_delay) = (time(random, if is_met { 1500 } else { 60 }), time(random, 200));
        let lab = Lab::new("backup-faults-", ROOM, |folder| {
            let sr = Sr::new("shared", Storage::Nfs).size(ROOM);
            let sr = if way == Way::Files { sr.folder(folder) } else { sr };
            Scene::new(seed).host("one").host("two").sr(sr).vm(machine).settings(|settings| {
                settings.has_ignore_vdis = !is_old;
                settings.snapshot_time = snapshot_time;
                settings.detach_delay = detach_delay;
            })
        });
        let count = 1 + random.below(2);
        let repositories =
            (0..count).map(|number| init(lab.folder.path(), &format!("repository{number}"), &[])).collect();
        let format = ["exploded", "vhd"][random.below(2)];
        Self { lab, repositories, disks, has_left_out, way, format, truths: BTreeMap::new(), guest: seed << 8 }
    }

    fn command(&self) -> Command {
        let mut command = self.lab.command("backup", &["--json"]);
        command.args(["--vm", "web01"]).args(self.way.arguments());
        if self.way != Way::Xva {
            command.args(["--format", self.format]);
            if self.format == "exploded" {
                command.args(["--compression", "none"]);
            }
        }
        for repository in &self.repositories {
            command.arg("--to").arg(repository);
        }
        if self.way == Way::Files {
            command.arg("--sr-path").arg(self.lab.sr_path("shared", &self.lab.folder.path().join("sr")));
        }
        command
    }

    fn held(&self) -> Held {
        self.lab.held(&self.lab.machine())
    }

    fn guest_writes(&mut self, writes: usize) {
        self.guest += 1;
        let machine = self.lab.machine();
        self.lab.simulator.guest_writes(&machine, self.guest << 20, writes as u64).expect("written");
    }

    /// Runs a backup, with whatever happens to it; the guest goes on writing once there is a snapshot. Every backup that is there
    /// afterwards is compared.
    fn back_up(&mut self, trouble: Option<&Trouble>, when: &str) -> Ended {
        let held = self.held();
        let snapshots = self.lab.snapshots(Class::Vm);
        let (command, machine, mut has_written) = (self.command(), self.lab.machine(), false);
        self.guest += 1;
        let lab = &self.lab;
        let ended = lab.run(command, trouble, &self.repositories, when, || {
            // One that a dead run asked for comes before this one asks for its own.
            let is_asked_for = || lab.simulator.log().count("Async.VM.snapshot") > 0;
            if !has_written && is_asked_for() && lab.snapshots(Class::Vm) > snapshots {
                lab.simulator.guest_writes(&machine, self.guest << 20, 2).expect("written");
                has_written = true;
            }
        });
        self.compare(&held, when, &ended);
        ended
    }

    /// Compares each disk of each backup; those that are new hold what the disks did when the run began.
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
        }
    }

    /// Has everything read by a check, which must find no damage.
    fn check(&self, when: &str, ended: &Ended) {
        for folder in &self.repositories {
            let (code, out, err) = run(xofs().arg("check").arg(folder).arg("--data"));
            assert_eq!(code, 0, "{when}: {out}{err}\n{ended:?}");
        }
    }

    /// Whether a run that failed says so as it should.
    fn judge(&self, ended: &Ended, kind: Kind, when: &str) {
        match ended.code {
            Some(0) => {}
            Some(130) => assert!(kind.is_termination(), "{when}: {ended:?}"),
            Some(1 | 3) => {
                // What of the pool, of the VM or of the repository it was.
                let host = self.lab.simulator.address().ip().to_string();
                let network = host.rsplit_once('.').expect("four numbers").0;
                let names = [network, "xvd", "web01", "VM.", "VDI.", "repository"];
                assert!(names.iter().any(|name| ended.err.contains(name)), "{when}: {ended:?}");
            }
            Some(_) => panic!("{when}: {ended:?}"),
            None => assert!(kind.is_kill() || kind.is_termination(), "{when}: {ended:?}"),
        }
    }

    /// The uuids of the bases that are told to be stored.
    fn bases(&self) -> BTreeSet<String> {
        self.lab.bases().into_iter().map(|(uuid, _)| uuid).collect()
    }

    /// Whether the pool has the snapshots that the newest backup in each repository is of, and says so.
    fn has_base(&self) -> bool {
        let bases = self.bases();
        let newest = |number: usize| {
            let newest = self.truths.keys().filter(|(of, _)| *of == number).map(|(_, time)| time).max()?;
            let vms = fs::read_dir(self.repositories[number].join("xo-vm-backups")).expect("listed").flatten();
            let metadata = vms.map(|vm| vm.path().join(format!("{newest}.json"))).find(|path| path.exists())?;
            let metadata: Value = serde_json::from_slice(&fs::read(metadata).expect("readable")).expect("JSON");
            let uuid = |vdi: &Value| vdi["uuid"].as_str().expect("a uuid").to_owned();
            Some(metadata["vdis"].as_object()?.values().map(uuid).collect::<BTreeSet<String>>())
        };
        self.way != Way::Xva && (0..self.repositories.len()).all(|number| newest(number).is_some_and(|of| of == bases))
    }

    /// Whether nothing is left of any run but one base, and in the repositories nothing but backups.
    fn is_at_rest(&self, is_purged: bool, when: &str, ended: &Ended) {
        let (snapshots, bases) = match self.way {
            Way::Xva => (0, 0),
            _ => (usize::from(!is_purged), self.disks),
        };
        let found = (self.lab.snapshots(Class::Vm), self.lab.snapshots(Class::Vdi));
        assert_eq!(found, (snapshots, bases), "{when}: snapshots, and disks of snapshots\n{ended:?}");
        assert_eq!(self.bases().len(), bases, "{when}: bases");
        let disks = self.lab.simulator.disks_of(&self.lab.machine()).expect("it is there").len();
        assert_eq!(
            disks,
            self.disks + usize::from(self.has_left_out),
            "{when}: the machine keeps its disks\n{ended:?}"
        );
        self.lab.is_at_rest(when, ended);
        for (number, repository) in self.repositories.iter().enumerate() {
            let times: BTreeSet<&String> =
                self.truths.keys().filter(|(of, _)| *of == number).map(|(_, at)| at).collect();
            let found = succeed(Command::new("find").arg(repository.join("xo-vm-backups")).args(["-type", "f"]));
            let is_of_none = |path: &&str| {
                let is_block = path.contains("/data/");
                let is_cache = path.ends_with("cache.json.gz");
                !is_cache && !is_block && !times.iter().any(|time| path.contains(time.as_str()))
            };
            let left: Vec<&str> = found.lines().filter(is_of_none).collect();
            assert!(left.is_empty(), "{when}: left in the repository: {left:?}\n{ended:?}");
            let images =
                succeed(Command::new("find").arg(repository).args(["-path", "*/data/*.vhd", "-prune", "-print"]));
            let has_folders = self.way != Way::Xva && self.format == "exploded";
            let expected = if has_folders { times.len() * self.disks } else { 0 };
            assert_eq!(images.lines().count(), expected, "{when}: images\n{images}{times:?}");
            let other =
                succeed(Command::new("find").arg(repository).args(["-name", "*.lock", "-o", "-name", ".*tmp*"]));
            assert_eq!(other, "", "{when}: locks and the like");
        }
    }

    /// Checks what the last run says: each disk was read in its way, relative to the base if it is there.
    fn is_increment(&self, ended: &Ended, has_base: bool, when: &str) -> bool {
        let said: Value = serde_json::from_str(&ended.out).expect("JSON");
        let backup = &said["vms"][0]["backup"];
        if self.way == Way::Xva {
            return false;
        }
        let reads = backup["reads"].as_array().expect("reads");
        assert_eq!(reads.len(), self.disks, "{when}: {said:#}");
        let mut is_tracked = true;
        for read in reads {
            let passes = read["passes"].as_array().expect("passes");
            // Where the base is gone, that is found out first.
            assert!(passes.len() == 1 || passes.len() == 2 && !has_base, "{when}: {said:#}\n{ended:?}");
            let pass = passes.last().expect("one at least");
            let is_relative = pass["base"].is_string();
            assert!(!has_base || is_relative, "{when}: {said:#}\n{ended:?}");
            let way = pass["way"].as_str().expect("words");
            let best = match self.way {
                // There is nothing to have tracked.
                Way::ChangedBlocks { .. } if !is_relative => Way::BlockList,
                best => best,
            };
            assert!(way.starts_with(best.name()), "{when}: {way}\n{ended:?}");
            is_tracked &= way.starts_with(Way::ChangedBlocks { purges_data: true }.name());
        }
        for (number, stored) in backup["repositories"].as_array().expect("repositories").iter().enumerate() {
            let had = self.truths.keys().filter(|(of, _)| *of == number).count() > 1;
            for disk in stored["disks"].as_array().expect("disks") {
                assert_eq!(disk["isKey"].as_bool(), Some(!had), "{when}: {said:#}\n{ended:?}");
            }
        }
        is_tracked
    }
}

/// One world, one thing of a kind that goes wrong. Returns whether it did.
pub fn round(seed: u64, kind: Kind) -> bool {
    let random = &mut Random::new(seed);
    let mut world = World::new(seed, random, kind);
    let needs_base = matches!(kind, Kind::DropBase | Kind::NoChangedBlocks | Kind::WrongBitmap);
    let before = if needs_base { 1 + random.below(2) } else { random.below(3) };
    let trouble = Trouble::of(kind, random, world.way.sites(before > 0));
    let when = format!(
        "seed {seed}: {:?} {} of {} disks into {} repositories with {before} backups, {trouble:?}",
        world.way,
        world.format,
        world.disks,
        world.repositories.len()
    );
    let begun = Instant::now();
    for _ in 0..before {
        let ended = world.back_up(None, &when);
        assert_eq!(ended.code, Some(0), "{when}: {ended:?}");
        world.guest_writes(1 + random.below(4));
    }
    let undisturbed = begun.elapsed();
    let bases = world.bases();
    let known = world.truths.len();
    let ended = world.back_up(Some(&trouble), &when);
    world.judge(&ended, kind, &when);
    world.check(&when, &ended);
    let made = world.truths.len() - known;
    let left = world.bases();
    if !matches!(kind, Kind::DropBase | Kind::DropSnapshots) && world.way != Way::Xva {
        // The bases of before stay until those of now are told to be stored.
        let is_next = made == world.repositories.len() && left.difference(&bases).count() == world.disks;
        assert!(bases.is_subset(&left) || is_next, "{when}: {bases:?} became {left:?}\n{ended:?}");
    }
    if ended.code == Some(0) {
        assert_eq!(made, world.repositories.len(), "{when}: {ended:?}");
    }
    let disturbed = begun.elapsed() - undisturbed;
    world.lab.settle();
    world.guest_writes(1 + random.below(4));
    // What undoes what is left may die, too.
    if random.below(3) == 0 {
        let delay = Duration::from_millis(random.below(30) as u64);
        let kill = Trouble::Signal(Signal::KILL, Moment::Requests(random.below(60)), delay);
        world.back_up(Some(&kill), &format!("{when}, then {kill:?}"));
        world.lab.settle();
    }
    // What was published is found out, and what the others have is not lost for it.
    let has_base = world.has_base() || kind == Kind::KilledAtPublish && before > 0;
    let ended_well = world.back_up(None, &when);
    assert_eq!(ended_well.code, Some(0), "{when}: the run after: {ended_well:?}\nbefore: {ended:?}");
    world.check(&when, &ended_well);
    let is_tracked = world.is_increment(&ended_well, has_base, &when);
    world.is_at_rest(is_tracked && world.way == Way::ChangedBlocks { purges_data: true }, &when, &ended_well);
    println!(
        "{when}: {} {:?} with {made} new; {undisturbed:.1?} before, {disturbed:.1?}, {:.1?} in all: {}",
        if ended.is_struck { "struck" } else { "missed" },
        ended.code,
        begun.elapsed(),
        ended.err.lines().last().unwrap_or_default()
    );
    ended.is_struck
}
