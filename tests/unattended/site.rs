//! A pool, repositories, a clock, and jobs that go by it: what is configured, run, killed, written down and left.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;

use jiff::Timestamp;
use serde_json::Value;
use tempfile::TempDir;
use xapi_simulator::store::Object;
use xapi_simulator::value::{Reference, Value as Field};
use xapi_simulator::{Class, Scene};
use xofs::repository::{Backup, OpenOptions, Repository};

use crate::clock::Clock;
use crate::pool;
use crate::support::{init, scratch, xofs};

/// The repositories, by their names in the configuration.
pub const REPOSITORIES: [&str; 2] = ["main", "other"];

/// Everything that a machine has which runs jobs, and the pool.
pub struct Site {
    pub lab: pool::Lab,
    pub clock: Clock,
    /// Goes last.
    folder: TempDir,
}

/// What became of a process.
#[derive(Debug)]
pub struct Ended {
    /// `None` if it was killed.
    pub code: Option<i32>,
    pub out: String,
    pub err: String,
}

impl Site {
    pub fn new(scene: Scene, at: Timestamp) -> Self {
        let folder = tempfile::Builder::new().prefix("unattended-").tempdir_in(scratch()).expect("a folder");
        let lab = pool::Lab::new(folder.path(), "lab", scene);
        let site = Self { lab, clock: Clock::new(folder.path(), at), folder };
        for made in ["config/xofs", "jobs"] {
            fs::create_dir_all(site.path(made)).expect("made");
        }
        let mut config = format!(
            "[pools.lab]\naddress = '{}'\nfingerprint = '{}'\npassword_file = '{}'\n",
            site.lab.simulator.address(),
            site.lab.simulator.fingerprint(),
            site.lab.password.display(),
        );
        for name in REPOSITORIES {
            let path = init(site.folder.path(), name, &[]);
            config.push_str(&format!("[repositories.{name}]\npath = '{}'\n", path.display()));
        }
        fs::write(site.path("config/xofs/config.toml"), config).expect("written");
        site
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    pub fn write_job(&self, name: &str, text: &str) {
        // A daemon may read it just now.
        let fresh = self.path("jobs.new");
        fs::write(&fresh, text).expect("written");
        fs::rename(fresh, self.path("jobs").join(format!("{name}.toml"))).expect("renamed");
    }

    /// `xofs job`, with these jobs and this state.
    pub fn command(&self, arguments: &[&str]) -> Command {
        let mut command = xofs();
        command.arg("job").args(arguments).arg("--jobs").arg(self.path("jobs"));
        command.arg("--state-dir").arg(&self.lab.state);
        command.env("XDG_CONFIG_HOME", self.path("config")).env("HOME", self.folder.path()).env("TZ", "UTC");
        command
    }

    /// Starts it, in a group of processes of its own, with what it says in files of this name.
    pub fn start(&self, arguments: &[&str], name: &str) -> Child {
        let mut command = self.command(arguments);
        let file = |end: &str| fs::File::create(self.path(&format!("{name}.{end}"))).expect("a new file");
        command.stdin(Stdio::null()).stdout(file("out")).stderr(file("err")).process_group(0);
        self.clock.start(&mut command)
    }

    /// What became of a process that has ended.
    pub fn ended(&self, child: &mut Child, name: &str) -> Ended {
        let code = child.wait().expect("it is our child").code();
        let text = |end: &str| fs::read_to_string(self.path(&format!("{name}.{end}"))).expect("UTF-8");
        let ended = Ended { code, out: text("out"), err: text("err") };
        let has_word = |word: &str| ended.err.contains(word) || ended.out.contains(word);
        assert!(!has_word("panicked") && !has_word(&self.lab.simulator.password()), "{ended:?}");
        ended
    }

    /// Runs it to its end; returns what it wrote.
    pub fn run(&self, arguments: &[&str], expected: i32) -> String {
        let mut child = self.start(arguments, "asked");
        let ended = self.ended(&mut child, "asked");
        assert_eq!(ended.code, Some(expected), "{arguments:?}: {ended:?}");
        ended.out
    }

    /// Runs it, and reads the JSON that it writes.
    pub fn ask(&self, arguments: &[&str]) -> Value {
        serde_json::from_str(&self.run(arguments, 0)).expect("JSON")
    }

    /// The lines of a job's log that are whole, by the runs they are of, in their order.
    pub fn log(&self, job: &str) -> Vec<Vec<Value>> {
        let text = fs::read_to_string(self.lab.state.join(format!("jobs/{job}/log.jsonl"))).unwrap_or_default();
        let mut runs: Vec<Vec<Value>> = Vec::new();
        for line in text.split_inclusive('\n').filter(|line| line.ends_with('\n')) {
            let line: Value = serde_json::from_str(line).expect("JSON");
            match runs.iter_mut().find(|run| run[0]["run"] == line["run"]) {
                Some(run) => run.push(line),
                None => runs.push(vec![line]),
            }
        }
        runs
    }

    /// All backups of a repository, by VM.
    pub fn backups(&self, repository: &str) -> BTreeMap<String, Vec<Backup>> {
        let repository = self.open(repository);
        let vms = repository.vms().expect("listed");
        let of = |vm: &xofs::repository::Vm| {
            let backups = repository.backups(&vm.id).expect("listed");
            (vm.id.as_str().to_owned(), backups.iter().map(|backup| Backup::clone(backup)).collect())
        };
        vms.iter().map(of).collect()
    }

    pub fn open(&self, repository: &str) -> Arc<Repository> {
        Repository::open(&self.path(repository), OpenOptions::default()).expect("a repository")
    }

    /// The uuid of a machine.
    pub fn uuid(&self, vm: &Reference) -> String {
        self.lab.field(Class::Vm, vm, "uuid").as_str().expect("a uuid").to_owned()
    }

    /// The snapshots of a class that are kept for the next increment, as machine and job, and their uuids.
    pub fn bases(&self, class: Class) -> BTreeMap<(String, String), BTreeSet<String>> {
        let mut bases: BTreeMap<_, BTreeSet<String>> = BTreeMap::new();
        self.lab.simulator.look(|store| {
            for (_, object) in store.all(class) {
                let Some(Field::Map(entries)) = object.record.get("other_config") else { continue };
                let entry = |name: &str| entries.get(name).and_then(Field::as_text).map(str::to_owned);
                if class == Class::Vdi && entry("xofs:stored").is_none() {
                    continue;
                }
                let (Some(vm), Some(job)) = (entry("xofs:vm"), entry("xofs:job")) else { continue };
                let uuid = object.record.get("uuid").and_then(Field::as_text).expect("it has one").to_owned();
                bases.entry((vm, job)).or_default().insert(uuid);
            }
        });
        bases
    }

    /// Checks that the pool has no task and no device of a control domain, and this machine no journal.
    pub fn is_at_rest(&self, when: &str) {
        let left = || {
            let tasks = self.lab.simulator.look(|store| {
                // Where the answer to a call was lost nobody knows its task, which the pool removes an hour after its end.
                let name = |task: &Object| format!("{:?}", task.record.get("name_label"));
                let is_over = |task: &Object| task.record.get("status") != Some(&Field::from("pending"));
                let tasks = store.all(Class::Task).map(|(_, task)| task);
                tasks.filter(|task| !(is_over(task) && name(task).contains("\"Async."))).map(name).collect::<Vec<_>>()
            });
            (tasks, self.lab.control_domain_devices())
        };
        let is_idle = || left() == (Vec::new(), 0);
        pool::wait_for(&format!("{when}: the end of {:?}", left()), is_idle);
        assert_eq!(self.lab.journals(), 0, "{when}: journals of runs");
    }
}

/// Removes the locks that dead programs left on machines: waiting for them takes ten seconds each, which other tests do.
pub fn remove_locks(repository: &Path) {
    for entry in fs::read_dir(repository.join("xo-vm-backups")).into_iter().flatten().flatten() {
        if entry.path().extension().is_some_and(|end| end == "lock") {
            let _ = fs::remove_dir(entry.path());
        }
    }
}
