//! A week of nights, by a seed: machines that are written to, grow, get and lose disks; two jobs with several schedules, each with its
//! own rules; and in most nights something that goes wrong. After each run the repositories must hold exactly what they held before,
//! less what the rules say, and what the log says was made; at the end every disk of every backup is compared.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use jiff::tz::TimeZone;
use jiff::{SignedDuration, Timestamp};
use rustix::process::{Pid, Signal, kill_process, kill_process_group};
use serde_json::Value;
use xapi_simulator::content::Content;
use xapi_simulator::scene::{Disk, Machine};
use xapi_simulator::value::{Reference, Value as Field};
use xapi_simulator::{Class, Upset};
use xofs::repository::Backup;

use crate::jobs::{self, Job};
use crate::judge::Run;
use crate::pool::{self, MIB, hosts};
use crate::seeds::Random;
use crate::site::{Ended, REPOSITORIES, Site, remove_locks};
use crate::trouble::{Moment, Trouble};

/// How long a run may take, whatever goes wrong: what takes longer hangs.
const PATIENCE: Duration = Duration::from_secs(300);
/// How often it is looked at what a run does.
const GLANCE: Duration = Duration::from_millis(3);
/// When weeks begin, and where: with a clock that is put back, one that is put forward, the turn of a year, and none of it.
const WEEKS: [(&str, &str); 4] = [
    ("2026-10-21T10:00:00Z", "Europe/Paris"),
    ("2027-03-24T10:00:00Z", "Europe/Paris"),
    ("2026-12-28T12:00:00Z", "America/New_York"),
    ("2027-02-10T12:00:00Z", "UTC"),
];
const DAYS: i64 = 7;

/// A run that is due.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Due {
    pub at: Timestamp,
    pub job: usize,
    pub schedule: usize,
}

/// A backup that there is.
#[derive(Debug, Clone)]
pub struct Made {
    pub backup: Backup,
    pub held: BTreeMap<String, Content>,
    /// The uuids of the snapshots that it was read of.
    pub snapshots: BTreeSet<String>,
}

/// Where a backup is: repository, machine and name of its metadata.
pub type Place = (usize, String, String);

pub struct Week {
    pub seed: u64,
    pub random: Random,
    pub site: Site,
    pub zone: TimeZone,
    pub zone_name: &'static str,
    pub start: Timestamp,
    pub end: Timestamp,
    pub jobs: Vec<Job>,
    pub made: BTreeMap<Place, Made>,
    pub guest: u64,
    /// How far the pool's clock is ahead of the machine's.
    pub ahead: Duration,
    pub troubles: usize,
}

impl Week {
    fn new(seed: u64) -> Self {
        let random = &mut Random::new(seed);
        let (start, zone_name) = WEEKS[usize::try_from(seed).expect("small") % WEEKS.len()];
        let start: Timestamp = start.parse().expect("a time");
        let disk = |random: &mut Random, name: &str| Disk::new(name, (3 + random.below(6)) as u64 * MIB).filled(50);
        let mut machine = |name: &str, disks| {
            let machine =
                (0..disks).fold(Machine::new(name), |vm, number| vm.disk(disk(random, &format!("{name}-{number}"))));
            if random.below(2) == 0 { machine.running() } else { machine }
        };
        let scene = hosts(seed).vm(machine("web01", 2)).vm(machine("db01", 1)).vm(machine("app01", 1));
        let site = Site::new(scene, start);
        let jobs = jobs::draw(random);
        let end = start.checked_add(SignedDuration::from_hours(24 * DAYS)).expect("in range");
        let zone = TimeZone::get(zone_name).expect("known");
        let random = Random::new(seed ^ 0xfeed);
        Self {
            seed,
            random,
            site,
            zone,
            zone_name,
            start,
            end,
            jobs,
            made: BTreeMap::new(),
            guest: seed << 10,
            ahead: Duration::ZERO,
            troubles: 0,
        }
    }

    /// All runs of the week, in their order.
    fn due(&self) -> Vec<Due> {
        let mut all: Vec<Due> = Vec::new();
        for (job, of) in self.jobs.iter().enumerate() {
            for (schedule, timed) in of.schedules.iter().enumerate() {
                let runs = timed.pattern.runs(&self.zone, self.start, self.end);
                all.extend(runs.into_iter().map(|at| Due { at, job, schedule }));
            }
        }
        all.sort();
        all
    }

    pub fn machine(&self, name: &str) -> Reference {
        self.site.lab.simulator.only(Class::Vm, name)
    }

    /// Makes a run, with what goes wrong, and judges it.
    fn night(&mut self, due: Due, trouble: &Trouble) {
        let (at, late) = (due.at, SignedDuration::from_secs(i64::try_from(self.random.below(40)).expect("small")));
        let retries = self.random.below(2);
        self.set_clocks(at.checked_add(late).expect("in range"));
        let job = &self.jobs[due.job];
        let (name, schedule) = (job.name, job.schedules[due.schedule].name);
        let when = format!("seed {}: {name} {schedule} of {at}, {trouble:?}", self.seed);
        self.site.write_job(name, &job.text(trouble, retries, self.zone_name));
        let held = job.machines.iter().map(|name| (self.site.uuid(&self.machine(name)), self.contents(name))).collect();
        let runs = self.site.log(name).len();
        if matches!(trouble, Trouble::NoBase) {
            self.remove_bases(name);
        }
        let bases = self.site.bases(Class::Vdi);
        let begun = Instant::now();
        let ended = self.troubled(due, trouble, &when);
        let seconds = begun.elapsed().as_secs_f64();
        let log = self.site.log(name);
        assert_eq!(log.len(), runs + 1, "{when}: runs in the log: {ended:?}");
        let lines = log.last().expect("one at least");
        let when = format!("{when}: {ended:?}\n{}", lines.iter().map(|line| format!("{line}\n")).collect::<String>());
        let run = Run { due, trouble, ended: &ended, lines, held: &held, bases: &bases };
        let fresh = self.judge(&run, &when);
        println!(
            "seed {}: {name} {schedule} of {at}: {trouble:?}: {:?}, {} new, {} there; {seconds:.1} s",
            self.seed,
            ended.code,
            fresh.len(),
            self.made.len() + fresh.len(),
        );
        self.made.extend(fresh);
        // It was made, whatever became of it.
        let again = ["run", name, "--schedule", schedule, "--due", &at.to_string()];
        assert!(self.site.run(&again, 0).contains("was made already"), "{when}");
        assert_eq!(self.site.log(name).len(), runs + 1, "{when}: it was made twice");
    }

    /// Sets the clocks of the pool and of this machine.
    fn set_clocks(&mut self, at: Timestamp) {
        let ahead = since(at, Timestamp::now());
        self.site.lab.simulator.advance(ahead.saturating_sub(self.ahead));
        self.ahead = ahead.max(self.ahead);
        self.site.clock.set(at);
    }

    pub fn contents(&self, name: &str) -> BTreeMap<String, Content> {
        let content = |vdi: Reference| self.site.lab.simulator.content(&vdi).expect("there");
        self.site.lab.disks(&self.machine(name)).into_iter().map(|(name, vdi)| (name, content(vdi))).collect()
    }

    fn remove_bases(&self, job: &str) {
        let bases = self.site.bases(Class::Vdi);
        let of_job = bases.iter().filter(|((_, of), _)| of == job).flat_map(|(_, uuids)| uuids);
        self.site.lab.simulator.change(|state| {
            for uuid in of_job {
                let vdi = state.store.by_uuid(Class::Vdi, uuid).expect("there");
                state.destroy_vdi(&vdi).expect("free");
            }
        });
    }

    /// Runs the job with what goes wrong, until it has ended and all that it started; then what is wrong is over.
    fn troubled(&self, due: Due, trouble: &Trouble, when: &str) -> Ended {
        let (site, job) = (&self.site, &self.jobs[due.job]);
        let simulator = &site.lab.simulator;
        simulator.log().clear();
        let folder = |number: &usize| site.path(REPOSITORIES[*number]);
        let (away, stop) = (site.path("away"), |number| folder(number).join("immutability.json"));
        let sizes: Vec<(Reference, u64)> = simulator.look(|store| {
            let size = |sr: &Reference| store.size(Class::Sr, sr, "physical_size");
            store.all(Class::Sr).map(|(sr, _)| (sr.clone(), size(sr).expect("it has one"))).collect()
        });
        match trouble {
            Trouble::Fault(fault) | Trouble::Stall(fault) => simulator.fault(fault.clone()),
            Trouble::FullStorage => simulator.happen(&Upset::FillStorage),
            Trouble::Away(number) => fs::rename(folder(number), &away).expect("moved"),
            Trouble::Kept(number) => fs::write(stop(number), "{").expect("written"),
            Trouble::Locked(number) => self.lock(&folder(number), true),
            _ => {}
        }
        let begins = self.visible();
        let runs = site.log(job.name).len();
        let name = job.schedules[due.schedule].name;
        let mut child = site.start(&["run", job.name, "--schedule", name, "--due", &due.at.to_string()], "run");
        let pid = Pid::from_child(&child);
        let (begun, mut is_over) = (Instant::now(), false);
        while child.try_wait().expect("it is our child").is_none() {
            assert!(begun.elapsed() < PATIENCE || kill_process_group(pid, Signal::KILL).is_err(), "{when}: it hangs");
            let (Trouble::Killed { moment, .. } | Trouble::Terminated(moment)) = trouble else {
                std::thread::sleep(GLANCE);
                continue;
            };
            let has_begun = || site.log(job.name).len() > runs;
            let has_come = || match moment {
                Moment::Requests(count) => simulator.log().requests().len() >= *count && has_begun(),
                Moment::Publish => self.visible() != begins,
                Moment::Merge => {
                    let is_merge = |line: &Value| line["event"] == "mergeStart";
                    has_begun() && site.log(job.name).last().is_some_and(|run| run.iter().any(is_merge))
                }
            };
            if !is_over && has_come() {
                is_over = true;
                let _ = match trouble {
                    Trouble::Killed { is_machine, delay, .. } => {
                        std::thread::sleep(*delay);
                        if *is_machine {
                            kill_process_group(pid, Signal::KILL)
                        } else {
                            kill_process(pid, Signal::KILL)
                        }
                    }
                    _ => kill_process(pid, Signal::TERM),
                };
            }
            std::thread::sleep(GLANCE);
        }
        let ended = site.ended(&mut child, "run");
        // A merge goes on without the run.
        pool::wait_for("the end of all that a run started", || !lives(child.id()));
        simulator.clear_faults();
        match trouble {
            Trouble::Away(number) => fs::rename(&away, folder(number)).expect("moved"),
            Trouble::Kept(number) => fs::remove_file(stop(number)).expect("there"),
            Trouble::Locked(number) => self.lock(&folder(number), false),
            _ => {}
        }
        simulator.change(|state| {
            for (sr, size) in sizes {
                state.store.set(Class::Sr, &sr, "physical_size", Field::from(size)).expect("there");
            }
        });
        if ended.code.is_none() {
            (0..REPOSITORIES.len()).for_each(|number| remove_locks(&folder(&number)));
        }
        ended
    }

    /// Takes all machines' locks in a repository, or lets them go.
    fn lock(&self, repository: &Path, is_taken: bool) {
        let vms = repository.join("xo-vm-backups");
        fs::create_dir_all(&vms).expect("made");
        for name in ["web01", "db01", "app01"] {
            let lock = vms.join(format!("{}.lock", self.site.uuid(&self.machine(name))));
            if is_taken { fs::create_dir(lock).expect("made") } else { fs::remove_dir(lock).expect("there") }
        }
    }

    /// The names of all metadata.
    fn visible(&self) -> BTreeSet<PathBuf> {
        let vms = REPOSITORIES.iter().flat_map(|name| fs::read_dir(self.site.path(name).join("xo-vm-backups")));
        let of_vms = vms.flatten().flatten().flat_map(|vm| fs::read_dir(vm.path())).flatten().flatten();
        of_vms.map(|entry| entry.path()).filter(|path| path.extension().is_some_and(|end| end == "json")).collect()
    }
}

/// How much later a time is than another; nothing, if it is not.
fn since(time: Timestamp, other: Timestamp) -> Duration {
    Duration::from_secs(u64::try_from(time.as_second() - other.as_second()).unwrap_or(0))
}

/// Whether a group of processes has one that is not dead.
fn lives(group: u32) -> bool {
    fs::read_dir("/proc").expect("mounted").flatten().any(|entry| {
        let stat = fs::read_to_string(entry.path().join("stat")).unwrap_or_default();
        // The name may hold anything but ends with the last bracket.
        let fields: Vec<&str> =
            stat.rsplit_once(')').map(|(_, rest)| rest.split_whitespace().collect()).unwrap_or_default();
        fields.get(2).and_then(|of| of.parse().ok()) == Some(group) && !matches!(fields.first(), Some(&("Z" | "X")))
    })
}

/// Makes the week of a seed.
pub fn unfold(seed: u64) {
    let begun = Instant::now();
    let mut week = Week::new(seed);
    for due in week.due() {
        week.goes_on();
        let transfers = week.jobs[due.job].transfers();
        let trouble = Trouble::any(&mut week.random, transfers);
        week.troubles += usize::from(!matches!(trouble, Trouble::Nothing));
        week.night(due, &trouble);
    }
    // One more of each, which finds what the week has left.
    week.goes_on();
    for (job, minutes) in [(0, 1), (1, 2)] {
        let at = week.end.checked_add(SignedDuration::from_mins(minutes)).expect("in range");
        week.night(Due { at, job, schedule: 0 }, &Trouble::Nothing);
    }
    for (place, made) in &week.made {
        week.compare(place, made, &format!("seed {seed}: at the end"));
    }
    week.is_at_rest();
    if std::env::var_os("XOFS_XO").is_some() {
        week.judged_by_xo();
    }
    println!(
        "seed {seed}: {} backups at the end, {} troubles, {:.1} s",
        week.made.len(),
        week.troubles,
        begun.elapsed().as_secs_f64()
    );
}
