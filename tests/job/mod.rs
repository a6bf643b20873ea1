//! Jobs for tests: a configuration, a folder of jobs, and a simulated pool that they back up.

#![allow(dead_code, reason = "every test binary uses a part of this")]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tempfile::TempDir;
use xapi_simulator::scene::{Disk, Machine};
use xapi_simulator::value::Reference;
use xapi_simulator::{Class, Scene, Simulator};

use crate::support::{init, run, scratch, succeed, xofs};

pub const MIB: u64 = 1 << 20;
/// How long something may take that happens by itself. Generous: slow machines are not wrong.
pub const PATIENCE: Duration = Duration::from_secs(240);

/// A configuration, and a folder for jobs.
pub struct World {
    pub folder: TempDir,
}

impl World {
    pub fn new() -> Self {
        let folder = tempfile::Builder::new().prefix("jobs-").tempdir_in(scratch()).expect("a folder");
        let world = Self { folder };
        fs::create_dir_all(world.path("config/xofs")).expect("made");
        fs::create_dir(world.path("jobs")).expect("made");
        let config = "[pools.lab]\naddress = 'pool.example.org'\n[repositories.main]\npath = '/srv/main'\n";
        fs::write(world.path("config/xofs/config.toml"), config).expect("written");
        world
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// `xofs job` with this folder of jobs.
    pub fn command(&self, arguments: &[&str]) -> Command {
        let mut command = xofs();
        command.arg("job").args(arguments).arg("--jobs").arg(self.path("jobs"));
        command.env("XDG_CONFIG_HOME", self.path("config")).env("HOME", self.folder.path());
        command
    }

    pub fn write(&self, name: &str, text: &str) {
        fs::write(self.path("jobs").join(name), text).expect("written");
    }
}

/// A pool of three machines, of which two are to be backed up, and two repositories.
pub struct Pool {
    pub world: World,
    pub simulator: Simulator,
}

impl Pool {
    pub fn new() -> Self {
        Self::with(|scene| scene, |_| String::new())
    }

    /// The same, of a scene that has more, with what `configured` adds to the configuration; it is told the folder.
    pub fn with(more: impl FnOnce(Scene) -> Scene, configured: impl FnOnce(&Path) -> String) -> Self {
        let world = World::new();
        let machine = |name| Machine::new(name).running().disk(Disk::new("system", 8 * MIB).filled(50));
        let scene = Scene::new(1)
            .settings(|settings| settings.coalesce_interval = Some(Duration::from_millis(50)))
            .vm(machine("web01"))
            .vm(machine("web02"))
            .vm(machine("db01"));
        let simulator = Simulator::start(more(scene)).expect("a pool starts");
        let folder = world.folder.path();
        fs::write(folder.join("password"), format!("{}\n", simulator.password())).expect("written");
        let config = format!(
            "[pools.lab]\naddress = '{}'\nfingerprint = '{}'\npassword_file = '{}'\n\
             [repositories.main]\npath = '{}'\n[repositories.other]\npath = '{}'\n{}",
            simulator.address(),
            simulator.fingerprint(),
            folder.join("password").display(),
            init(folder, "main", &[]).display(),
            init(folder, "other", &[]).display(),
            configured(folder),
        );
        fs::write(folder.join("config/xofs/config.toml"), config).expect("written");
        Self { world, simulator }
    }

    /// Writes a job of the two machines, with more of it.
    pub fn job(&self, more: &str) {
        self.job_to("to.repositories = ['main', 'other']", &format!("incremental.compression = 'none'\n{more}"));
    }

    /// Writes a job of the two machines to what it says.
    pub fn job_to(&self, to: &str, more: &str) {
        let which = "pools = ['lab']\nvms.names = ['web01', 'web02']\nretries.pause = '0s'";
        self.world.write("nightly.toml", &format!("{which}\n{to}\n{more}"));
    }

    /// `xofs job` with this state.
    pub fn command(&self, arguments: &[&str]) -> Command {
        let mut command = self.world.command(arguments);
        command.arg("--state-dir").arg(self.state());
        command
    }

    pub fn state(&self) -> PathBuf {
        self.world.path("state")
    }

    /// Runs the job, which must end with this code; returns its report.
    pub fn run(&self, arguments: &[&str], expected: i32) -> Value {
        let (code, out, err) = run(self.command(&["run", "nightly", "--json"]).args(arguments));
        assert_eq!(code, expected, "{out}\n{err}");
        serde_json::from_str(&out).expect("JSON")
    }

    /// Begins to run the job.
    pub fn start(&self) -> Child {
        let mut command = self.command(&["run", "nightly"]);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn().expect("it starts")
    }

    /// How the last run stands, by `xofs job list`.
    pub fn status(&self) -> String {
        let (code, out, err) = run(&mut self.command(&["list", "--json"]));
        assert_eq!(code, 0, "{out}{err}");
        let said: Value = serde_json::from_str(&out).expect("JSON");
        said["jobs"][0]["last"]["status"].as_str().unwrap_or("none").to_owned()
    }

    /// How many backups of each machine a repository has, by `xofs list`.
    pub fn backups(&self, repository: &str) -> Vec<(String, usize)> {
        let out = succeed(xofs().arg("list").arg(self.world.path(repository)).arg("--json"));
        let said: Value = serde_json::from_str(&out).expect("JSON");
        let of = |vm: &Value| {
            let backups = vm["backups"].as_array().expect("a list").len();
            (vm["name"].as_str().expect("a name").to_owned(), backups)
        };
        let mut found: Vec<_> = said["vms"].as_array().expect("a list").iter().map(of).collect();
        found.sort();
        found
    }

    /// Checks that nothing of a run is left in the pool but so many snapshots.
    pub fn is_at_rest(&self, snapshots: usize) {
        let found = self.simulator.look(|store| {
            let is_snapshot = |vm: &Reference| store.flag(Class::Vm, vm, "is_a_snapshot").unwrap_or(false);
            store.all(Class::Vm).filter(|(vm, _)| is_snapshot(vm)).count()
        });
        assert_eq!(found, snapshots, "snapshots");
        wait_for("the end of tasks and devices of control domains", || self.tasks_and_devices() == (0, 0));
        assert_eq!(fs::read_dir(self.state().join("runs")).expect("listed").count(), 0, "journals");
    }

    pub fn tasks_and_devices(&self) -> (usize, usize) {
        self.simulator.look(|store| {
            let is_of_one = |vbd: &Reference| {
                let vm = store.reference(Class::Vbd, vbd, "VM");
                vm.and_then(|vm| store.flag(Class::Vm, &vm, "is_control_domain")).unwrap_or(false)
            };
            (store.count(Class::Task), store.all(Class::Vbd).filter(|(vbd, _)| is_of_one(vbd)).count())
        })
    }

    /// All lines of the log, each as the schema has it.
    pub fn log(&self) -> Vec<Value> {
        let text = fs::read_to_string(self.state().join("jobs/nightly/log.jsonl")).expect("there");
        let schema: Value = serde_json::from_str(include_str!("../../docs/job-log.schema.json")).expect("JSON");
        let lines: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect();
        for line in &lines {
            assert_eq!(mismatch(&schema, &schema, line), None, "{line:#}");
        }
        lines
    }
}

pub fn wait_for(what: &str, mut is_so: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !is_so() {
        assert!(begun.elapsed() < PATIENCE, "{what}: waited in vain");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Says where a value is not as a schema has it, as far as the words go that the schemas in docs use.
pub fn mismatch(root: &Value, schema: &Value, value: &Value) -> Option<String> {
    if let Some(reference) = schema["$ref"].as_str() {
        let name = reference.strip_prefix("#/$defs/").expect("one of its own");
        assert!(root["$defs"][name].is_object(), "{name}");
        return mismatch(root, &root["$defs"][name], value);
    }
    if let Some(all) = schema["oneOf"].as_array() {
        let reasons: Vec<_> = all.iter().map(|one| mismatch(root, one, value)).collect();
        let is_one = reasons.iter().filter(|reason| reason.is_none()).count() == 1;
        return (!is_one).then(|| format!("not one of those: {reasons:?}"));
    }
    let is_listed = |list: &Value, found: &Value| list.as_array().is_none_or(|list| list.contains(found));
    let kind = match value {
        Value::Null => "null",
        Value::Bool(_) => "boolean",
        Value::Number(number) if number.is_u64() => "integer",
        Value::Number(_) => "number",
        Value::String(_) => "string",
        Value::Array(_) => "array",
        Value::Object(_) => "object",
    };
    let has_kind = |wanted: &str| wanted == kind || (wanted, kind) == ("number", "integer");
    let is_kind = match &schema["type"] {
        Value::Null => true,
        Value::String(one) => has_kind(one),
        several => several.as_array().expect("a list").iter().any(|one| has_kind(one.as_str().expect("a word"))),
    };
    let is_const = schema.get("const").is_none_or(|wanted| wanted == value);
    if !is_kind || !is_const || !is_listed(&schema["enum"], value) {
        return Some(format!("{value} is not {schema}"));
    }
    if let (Some(items), Some(values)) = (schema.get("items"), value.as_array()) {
        let of_one = |(number, value)| mismatch(root, items, value).map(|reason| format!("{number}: {reason}"));
        return values.iter().enumerate().find_map(of_one);
    }
    let properties = schema["properties"].as_object().filter(|_| value.is_object())?;
    let found = value.as_object().expect("an object");
    let missing = schema["required"]
        .as_array()
        .into_iter()
        .flatten()
        .find(|key| !found.contains_key(key.as_str().expect("a word")));
    if let Some(missing) = missing {
        return Some(format!("{missing} is missing"));
    }
    found.iter().find_map(|(key, value)| match properties.get(key) {
        Some(schema) => mismatch(root, schema, value).map(|reason| format!("{key}: {reason}")),
        None => (schema["additionalProperties"] == json!(false)).then(|| format!("{key} is not known")),
    })
}

/// A value of each machine of a report, after its name.
pub fn words(report: &Value, key: &str) -> Vec<String> {
    let vms = report["vms"].as_array().expect("a list");
    let mut all: Vec<String> = vms.iter().map(|vm| format!("{} {}", vm["name"].as_str().unwrap(), vm[key])).collect();
    all.sort();
    all
}
