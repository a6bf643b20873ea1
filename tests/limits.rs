//! How much is done at once, over all processes of a machine: a pool never sees more than it should, and as much as it may.

mod pool;
mod support;

use std::fs;
use std::ops::Range;
use std::path::PathBuf;
use std::process::{Child, Output, Stdio};
use std::time::{Duration, Instant};

use pool::{Lab, MIB, hosts, wait_for};
use serde_json::Value;
use support::{init, scratch, xofs};
use tempfile::TempDir;
use xapi_simulator::Class;
use xapi_simulator::log::Activity;
use xapi_simulator::scene::{Disk, Machine, Settings};

/// A pool, two repositories, and jobs with one state.
struct Jobs {
    lab: Lab,
    folder: TempDir,
}

/// Exports are held back.
const HELD: Option<fn(usize) -> u64> = Some(|_| 0);

/// A process; killed when it is dropped.
struct Running(Option<Child>);

impl Running {
    fn end(mut self) -> Output {
        self.0.take().expect("it is ended once").wait_with_output().expect("it ends")
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if let Some(mut child) = self.0.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

impl Jobs {
    /// A pool with so many machines of so many disks of 2 MiB, all of it data. What it sends is held back until the test lets it go.
    fn new(machines: usize, disks: usize) -> Self {
        let machine = |number| {
            let disk = |disk| Disk::new(&format!("disk{disk}"), 2 * MIB).filled(100);
            (0..disks).map(disk).fold(Machine::new(&format!("web{number:02}")).running(), Machine::disk)
        };
        let hosts = hosts(1).settings(|settings| {
            settings.snapshot_time = Duration::from_millis(30);
            settings.export_rate = HELD;
        });
        let scene = (0..machines).fold(hosts, |scene, number| scene.vm(machine(number)));
        let folder = tempfile::Builder::new().prefix("limits-").tempdir_in(scratch()).expect("a folder");
        let lab = Lab::new(folder.path(), "lab", scene);
        let jobs = Self { lab, folder };
        fs::create_dir_all(jobs.path("config/xofs")).expect("made");
        fs::create_dir(jobs.path("jobs")).expect("made");
        let config = format!(
            "[pools.lab]\naddress = '{}'\nfingerprint = '{}'\npassword_file = '{}'\n\
             [repositories.main]\npath = '{}'\n[repositories.other]\npath = '{}'\n",
            jobs.lab.simulator.address(),
            jobs.lab.simulator.fingerprint(),
            jobs.lab.password.display(),
            init(jobs.folder.path(), "main", &[]).display(),
            init(jobs.folder.path(), "other", &[]).display(),
        );
        fs::write(jobs.path("config/xofs/config.toml"), config).expect("written");
        jobs
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Runs the job `main` and the job `other`, into the repositories that are called so, each in a process of its own, and `meanwhile`;
    /// both must succeed.
    fn run(&self, jobs: [&str; 2], meanwhile: impl FnOnce()) {
        let children = ["main", "other"].into_iter().zip(jobs).map(|(name, job)| {
            let text =
                format!("pools = ['lab']\nto.repositories = ['{name}']\nlimits.vms = 12\nretries.vm = 0\n{job}\n");
            fs::write(self.path("jobs").join(format!("{name}.toml")), text).expect("written");
            let mut command = xofs();
            command.args(["job", "run", name, "--json", "--jobs"]).arg(self.path("jobs"));
            command.arg("--state-dir").arg(&self.lab.state);
            command.env("XDG_CONFIG_HOME", self.path("config")).env("HOME", self.folder.path());
            Running(Some(
                command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("it starts"),
            ))
        });
        let children: Vec<Running> = children.collect();
        meanwhile();
        for child in children {
            let end = child.end();
            let (out, err) = (String::from_utf8_lossy(&end.stdout), String::from_utf8_lossy(&end.stderr));
            assert_eq!(end.status.code(), Some(0), "{out}\n{err}");
            let report: Value = serde_json::from_str(&out).expect("JSON");
            assert_eq!(report["status"], "done", "{report:#}");
        }
    }

    /// Waits until there are so many exports, all that are allowed, and lets them go at this rate.
    fn let_go(&self, exports: usize, rate: Option<fn(usize) -> u64>) {
        wait_for("all exports that may be", || self.lab.simulator.log().now(Activity::Export) >= exports);
        // Time for one more, if it were allowed.
        std::thread::sleep(Duration::from_millis(300));
        self.lab.simulator.settings(|settings| settings.export_rate = rate);
    }

    fn most(&self, activity: Activity) -> usize {
        self.lab.simulator.log().most(activity)
    }
}

const STREAM: &str = "incremental.compression = 'none'\nincremental.nbd = false";
const LISTED: &str = "incremental.compression = 'none'";

#[test]
fn ten_machines_of_three_disks_in_two_jobs_are_never_more_than_twelve_exports_and_one_snapshot() {
    let jobs = Jobs::new(10, 3);
    let log = jobs.lab.simulator.log();
    let both = |job: &str| format!("vms.all = true\n{job}");
    // Each of twenty transfers a disk at a time, which is more than may be.
    let job = both(STREAM);
    jobs.run([&job, &job], || jobs.let_go(12, None));
    assert_eq!((jobs.most(Activity::Export), jobs.most(Activity::Snapshot)), (12, 1));
    // By the list of an export and NBD: each export is for its list alone.
    log.clear();
    let job = both(LISTED);
    jobs.run([&job, &job], || {});
    println!("{} exports at most for lists", jobs.most(Activity::Export));
    assert!((1..=12).contains(&jobs.most(Activity::Export)));
    assert_eq!((jobs.most(Activity::Snapshot), jobs.lab.snapshots(Class::Vm)), (1, 20));
    // Whole machines, and a limit of these jobs.
    log.clear();
    jobs.lab.simulator.settings(|settings| settings.export_rate = HELD);
    let job = both("mode = 'full'\nfull.compression = 'none'\nlimits.exports = 3");
    jobs.run([&job, &job], || jobs.let_go(3, None));
    assert_eq!((jobs.most(Activity::Export), jobs.most(Activity::Snapshot)), (3, 1));
    jobs.lab.is_let_go();
}

/// How fast all exports together were, in MiB a second, by what the pool gives to so many at once: counted by the bytes that were
/// sent while there were so many.
fn throughput(jobs: &Jobs) -> f64 {
    let number = |count: u64| f64::from(u32::try_from(count).expect("small"));
    let (mut bytes, mut seconds) = (0.0, 0.0);
    for (exports, sent) in jobs.lab.simulator.log().exported_beside() {
        let each = number(Settings::measured_export_rate(exports));
        bytes += number(sent);
        seconds += number(sent) / (each * number(u64::try_from(exports).expect("small")));
    }
    bytes / seconds / number(MIB)
}

#[test]
fn what_a_pool_sends_grows_with_the_exports_that_are_allowed() {
    let mut before = 0.0;
    for exports in [1, 2, 12] {
        let jobs = Jobs::new(12, 1);
        let half = |numbers: Range<usize>| {
            let names: Vec<String> = numbers.map(|number| format!("'web{number:02}'")).collect();
            format!("vms.names = [{}]\n{STREAM}\nlimits.exports = {exports}", names.join(", "))
        };
        jobs.run([&half(0..6), &half(6..12)], || jobs.let_go(exports, Some(Settings::measured_export_rate)));
        let found = throughput(&jobs);
        println!("{exports} exports: {found:.1} MiB/s, {:?}", jobs.lab.simulator.log().exported_beside());
        assert_eq!(jobs.most(Activity::Export), exports);
        // Even if the first twelve ended one after the other.
        assert!(found > before, "{found} MiB/s with {exports} exports, {before} with fewer");
        before = found;
    }
}

#[test]
fn bandwidth_and_transfers_are_limited_over_all_processes() {
    let jobs = Jobs::new(4, 3);
    jobs.lab.simulator.settings(|settings| settings.export_rate = None);
    let job = format!("vms.all = true\n{STREAM}\nlimits.bandwidth = '16 MiB/s'\nlimits.transfers = 2");
    let begun = Instant::now();
    jobs.run([&job, &job], || {});
    // 48 MiB, of which the last that is read of each disk at once is counted, and not waited for; the rest no machine can read faster.
    println!("{:.1} s", begun.elapsed().as_secs_f64());
    assert!(begun.elapsed() >= Duration::from_millis(42 * 1000 / 16), "{:?}", begun.elapsed());
    assert!(jobs.most(Activity::Export) <= 2);
}
