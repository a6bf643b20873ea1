//! Simulated pools, what the built binary makes of them, and the repository that takes it.

#![allow(dead_code, reason = "every test binary uses a part of this")]

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use serde_json::Value;
use tempfile::TempDir;
use xapi::{Cancel, Fingerprint, Pool, Settings, Trust};
use xapi_simulator::scene::{Disk, Machine};
use xapi_simulator::store::Object;
use xapi_simulator::value::{Reference, Value as Field};
use xapi_simulator::{Class, Scene, Simulator};
use xofs::repository::{Backup, OpenOptions, Repository};
use zeroize::Zeroizing;

use crate::support::{init, run, scratch, seed, xofs};

/// Bytes.
pub const MIB: u64 = 1 << 20;
/// The blocks that repositories store and streams carry, in bytes.
pub const BLOCK: u64 = 2 * MIB;
/// How long something may take that happens by itself. Generous: slow machines are not wrong.
pub const PATIENCE: Duration = Duration::from_secs(120);
/// How often hosts merge what nobody needs any more.
pub const COALESCE_INTERVAL: Duration = Duration::from_millis(50);

/// What the disks of a machine held, by name.
pub type Held = BTreeMap<String, Vec<u8>>;

/// A pool with hosts as they are: what snapshots leave behind is merged soon, else a run would wait for that.
pub fn hosts(seed: u64) -> Scene {
    Scene::new(seed).settings(|settings| settings.coalesce_interval = Some(COALESCE_INTERVAL))
}

/// A pool, and how a command reaches it.
pub struct Lab {
    pub simulator: Simulator,
    pub password: PathBuf,
    pub state: PathBuf,
}

impl Lab {
    /// Starts a pool; what xofs needs for it is in the folder, by this name.
    pub fn new(folder: &Path, name: &str, scene: Scene) -> Self {
        let simulator = Simulator::start(scene).expect("a pool starts");
        let password = folder.join(format!("{name}.password"));
        fs::write(&password, format!("{}\n", simulator.password())).expect("a short file fits");
        Self { simulator, password, state: folder.join(format!("{name}.state")) }
    }

    /// A command of xofs that logs in to this pool; `arguments` may say by what else its certificate is known.
    pub fn command(&self, command: &str, arguments: &[&str]) -> Command {
        let mut xofs = xofs();
        xofs.arg(command).args(["--pool", &self.simulator.address().to_string()]);
        xofs.arg("--pool-password-file").arg(&self.password).arg("--state-dir").arg(&self.state);
        if !arguments.iter().any(|argument| ["--fingerprint", "--trust-first"].contains(argument)) {
            xofs.args(["--fingerprint", self.simulator.fingerprint()]);
        }
        xofs.args(arguments).env("HOME", self.state.parent().expect("it is in a folder"));
        xofs
    }

    /// A client that is not xofs: it has another originator.
    pub fn client(&self) -> Pool {
        let fingerprint: Fingerprint = self.simulator.fingerprint().parse().expect("a fingerprint");
        let address = self.simulator.address().to_string().parse().expect("an address");
        let password = Zeroizing::new(self.simulator.password());
        let settings = Settings::new(address, &self.simulator.user(), password, Trust::Pinned(vec![fingerprint]));
        Pool::connect(Settings { originator: "test".into(), ..settings }, &Cancel::within(PATIENCE)).expect("logged in")
    }

    pub fn by_uuid(&self, class: Class, uuid: &Value) -> Reference {
        let uuid = uuid.as_str().expect("a uuid");
        self.simulator.look(|store| store.by_uuid(class, uuid)).expect("it is there")
    }

    /// A field of an object, as JSON.
    pub fn field(&self, class: Class, object: &Reference, field: &str) -> Value {
        self.simulator.look(|store| store.value(class, object, field).expect("it has it").to_json())
    }

    /// What a disk holds.
    pub fn bytes_of(&self, vdi: &Reference) -> Vec<u8> {
        let content = self.simulator.content(vdi).expect("it is there");
        let mut bytes = vec![0; usize::try_from(content.size()).expect("small")];
        content.read(0, &mut bytes).expect("in range");
        bytes
    }

    /// The disks of a machine by name, but for those that are left out of backups.
    pub fn disks(&self, vm: &Reference) -> BTreeMap<String, Reference> {
        self.simulator.look(|store| {
            let vbds = store.references(Class::Vm, vm, "VBDs").expect("it is there");
            let disks = vbds.iter().filter(|vbd| store.text(Class::Vbd, vbd, "type") == Ok("Disk"));
            let named = disks.map(|vbd| {
                let place = store.text(Class::Vbd, vbd, "userdevice").expect("it has one").parse::<u8>();
                let vdi = store.reference(Class::Vbd, vbd, "VDI").expect("it has one");
                (format!("xvd{}", char::from(b'a' + place.expect("small"))), vdi)
            });
            let label = |vdi: &Reference| store.text(Class::Vdi, vdi, "name_label").expect("it has one").to_owned();
            named.filter(|(_, vdi)| !label(vdi).contains("[NOBAK]")).collect()
        })
    }

    /// What these disks hold now.
    pub fn held(&self, vm: &Reference) -> Held {
        self.disks(vm).into_iter().map(|(name, vdi)| (name, self.bytes_of(&vdi))).collect()
    }

    /// How many snapshots there are, of machines or of disks.
    pub fn snapshots(&self, class: Class) -> usize {
        let is_one = |object: &Object| object.record.get("is_a_snapshot") == Some(&Field::Bool(true));
        self.simulator.look(|store| store.all(class).filter(|(_, object)| is_one(object)).count())
    }

    /// How many devices control domains have: exports and NBD connections make one each.
    pub fn control_domain_devices(&self) -> usize {
        self.simulator.look(|store| {
            let is_of_one = |vbd: &Reference| {
                let vm = store.reference(Class::Vbd, vbd, "VM");
                vm.and_then(|vm| store.flag(Class::Vm, &vm, "is_control_domain")).unwrap_or(false)
            };
            store.all(Class::Vbd).filter(|(vbd, _)| is_of_one(vbd)).count()
        })
    }

    /// What `--sr-path` takes for an SR whose files are in this folder.
    pub fn sr_path(&self, name: &str, folder: &Path) -> String {
        let sr = self.simulator.only(Class::Sr, name);
        let uuid = self.simulator.look(|store| store.text(Class::Sr, &sr, "uuid").map(str::to_owned));
        format!("{}={}", uuid.expect("it has one"), folder.display())
    }

    /// Checks that since the log was cleared nobody asked for events but of single tasks, each of which was begun before and not
    /// destroyed yet. Returns how many tasks that were.
    pub fn listened_to_tasks_alone(&self) -> usize {
        let (mut begun, mut destroyed, mut heard) = (0, BTreeSet::new(), BTreeSet::new());
        for request in self.simulator.log().requests() {
            let argument = || -> Value { serde_json::from_str(&request.arguments[0]).expect("JSON") };
            match request.method.as_str() {
                "task.destroy" => drop(destroyed.insert(format!("task/{}", argument().as_str().expect("a reference")))),
                "event.from" => {
                    for subject in argument().as_array().expect("a list") {
                        let subject = subject.as_str().expect("a name").to_owned();
                        let is_task = subject.starts_with("task/OpaqueRef:");
                        assert!(is_task && !destroyed.contains(&subject), "{subject} was listened to");
                        heard.insert(subject);
                    }
                    assert!(heard.len() <= begun, "{heard:?} were listened to, and {begun} tasks had begun");
                }
                method if method == "task.create" || method.starts_with("Async.") => begun += 1,
                _ => {}
            }
        }
        heard.len()
    }

    /// The tasks that are left, as they are called.
    pub fn tasks(&self) -> Vec<String> {
        let name = |object: &Object| format!("{:?}", object.record.get("name_label"));
        self.simulator.look(|store| store.all(Class::Task).map(|(_, task)| name(task)).collect())
    }

    /// How many journals of runs there are.
    pub fn journals(&self) -> usize {
        fs::read_dir(self.state.join("runs")).expect("listed").count()
    }

    /// Waits until no run has a task or a device of a control domain any more, and checks that none has a journal.
    pub fn is_let_go(&self) {
        wait_for("the end of tasks and devices", || self.tasks().is_empty() && self.control_domain_devices() == 0);
        assert_eq!(self.journals(), 0, "journals of runs");
    }
}

/// A pool with a machine `web01`, a repository, and a folder for both.
pub struct World {
    pub lab: Lab,
    pub folder: TempDir,
    pub repository: PathBuf,
    pub seed: u64,
}

impl World {
    pub fn new(scene: impl FnOnce(Scene) -> Scene) -> Self {
        let seed = seed();
        let folder = tempfile::Builder::new().prefix("pool-").tempdir_in(scratch()).expect("a folder");
        let repository = init(folder.path(), "main", &[]);
        let lab = Lab::new(folder.path(), "lab", scene(hosts(seed)));
        Self { lab, folder, repository, seed }
    }

    /// A running machine with a disk of 32 MiB.
    pub fn with_one_disk() -> Self {
        Self::new(|scene| scene.vm(Machine::new("web01").running().disk(Disk::new("system", 32 * MIB).filled(50))))
    }

    /// Another pool, which knows nothing of the first.
    pub fn other(&self, name: &str, scene: impl FnOnce(Scene) -> Scene) -> Lab {
        Lab::new(self.folder.path(), name, scene(Scene::new(self.seed ^ 0x5eed)))
    }

    /// `xofs backup` of `web01` into the repository, as far as it is not said otherwise.
    pub fn command(&self, arguments: &[&str]) -> Command {
        let mut command = self.lab.command("backup", arguments);
        if !arguments.contains(&"--to") {
            command.arg("--to").arg(&self.repository);
        }
        if !arguments.contains(&"--vm") {
            command.args(["--vm", "web01"]);
        }
        if !arguments.contains(&"--mode") && !arguments.contains(&"--compression") {
            command.args(["--compression", "none"]);
        }
        command
    }

    /// Runs it, which must succeed; returns what it says of the first VM.
    pub fn back_up(&self, arguments: &[&str]) -> Value {
        let (code, out, err) = run(self.command(arguments).arg("--json"));
        assert_eq!(code, 0, "{out}\n{err}");
        let mut said: Value = serde_json::from_str(&out).expect("JSON");
        said["vms"][0].take()
    }

    /// Runs it, which must fail with this code; returns what it says on standard error.
    pub fn fails(&self, arguments: &[&str], expected: i32) -> String {
        let (code, out, err) = run(&mut self.command(arguments));
        assert_eq!(code, expected, "{out}\n{err}");
        err
    }

    pub fn machine(&self) -> Reference {
        self.lab.simulator.only(Class::Vm, "web01")
    }

    /// What its disks hold now, but for those that are left out.
    pub fn held(&self) -> Held {
        self.lab.held(&self.machine())
    }

    pub fn guest_writes(&self, round: u64, writes: u64) {
        self.lab.simulator.guest_writes(&self.machine(), self.seed ^ (round << 20), writes).expect("written");
    }

    /// Compares every disk of every backup in the repository with what was held when it was made, oldest first.
    pub fn compare(&self, expected: &[Held]) {
        self.compare_in(&self.repository, expected);
    }

    pub fn compare_in(&self, repository: &Path, expected: &[Held]) {
        let repository = Repository::open(repository, OpenOptions::default()).expect("a repository");
        let vms = repository.vms().expect("listed");
        let vm = vms.iter().find(|vm| vm.name == "web01").expect("it has backups");
        let backups = repository.backups(&vm.id).expect("listed");
        assert_eq!(backups.len(), expected.len());
        for (backup, held) in backups.iter().zip(expected) {
            compare_backup(&repository, backup, held, "compared");
        }
    }

    /// Checks that nothing of a run is left in the pool but so many snapshots of machines, and of disks.
    pub fn is_at_rest(&self, snapshots: usize, disks: usize) {
        assert_eq!(self.lab.snapshots(Class::Vm), snapshots, "snapshots of machines");
        assert_eq!(self.lab.snapshots(Class::Vdi), disks, "snapshots of disks");
        self.lab.is_let_go();
    }
}

/// Compares every disk of a backup with what was held when it was made.
pub fn compare_backup(repository: &Repository, backup: &Backup, held: &Held, when: &str) {
    let when = format!("{when}: {}", backup.time.stored());
    assert_eq!(backup.problem, None, "{when}");
    let names: Vec<&str> = backup.disks.iter().map(|disk| disk.name.as_str()).collect();
    assert_eq!(names, held.keys().map(String::as_str).collect::<Vec<_>>(), "{when}");
    for disk in &backup.disks {
        let (name, held) = (&disk.name, &held[&disk.name]);
        let open = repository.open_disk(backup, disk).unwrap_or_else(|error| panic!("{when}: {name}: {error}"));
        assert_eq!(open.size(), held.len() as u64, "{when}: {name}");
        let mut bytes = vec![0xee; held.len()];
        open.read_at(0, &mut bytes).unwrap_or_else(|error| panic!("{when}: {name}: {error}"));
        // At once: byte by byte takes long where nothing is optimised.
        if bytes != *held {
            let differs = bytes.iter().zip(held).position(|(found, held)| found != held);
            panic!("{when}: {name}: byte {differs:?} is not what it was");
        }
    }
}

/// Bytes that were read of a disk, in the pass that counted, and how.
pub fn read(said: &Value, disk: usize) -> (u64, String) {
    let pass =
        said["backup"]["reads"][disk]["passes"].as_array().and_then(|passes| passes.last()).expect("it was read");
    (pass["bytes"].as_u64().expect("a number"), pass["way"].as_str().expect("words").to_owned())
}

/// Whether a disk was stored as a key in the first repository.
pub fn is_key(said: &Value, disk: usize) -> bool {
    said["backup"]["repositories"][0]["disks"][disk]["isKey"].as_bool().expect("said")
}

/// Waits until something is so.
pub fn wait_for(what: &str, is_so: impl Fn() -> bool) {
    let begun = Instant::now();
    while !is_so() {
        assert!(begun.elapsed() < PATIENCE, "{what} did not come");
        std::thread::sleep(Duration::from_millis(10));
    }
}
