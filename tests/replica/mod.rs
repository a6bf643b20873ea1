//! A machine that has replicas, the pools that they are in, and what is known of them there.

#![allow(dead_code, reason = "every test binary uses a part of this")]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::{Value, json};
use tempfile::TempDir;
use xapi::record::{Vdi, Vif, Vm};
use xapi::{Pool, Record, Ref};
use xapi_simulator::scene::{Disk, Machine, Repository as Sr, Storage};
use xapi_simulator::value::Reference;
use xapi_simulator::{Class, Scene};
use xofs::repository::{OpenOptions, Repository};

use crate::pool::{Held, Lab, MIB, compare_backup, hosts, wait_for};
use crate::support::{init, run, scratch, seed};

/// A pool with a machine `web01` and an SR `spare`, another with an SR `far`, and a folder for what xofs remembers.
pub struct World {
    pub lab: Lab,
    pub far: Lab,
    pub folder: TempDir,
    pub seed: u64,
}

impl World {
    pub fn new(machine: Machine) -> Self {
        Self::with(machine, |scene| scene)
    }

    /// The same with what is `more` in the first pool.
    pub fn with(machine: Machine, more: impl FnOnce(Scene) -> Scene) -> Self {
        let seed = seed();
        let hosts = || hosts(seed);
        let sr = |name| Sr::new(name, Storage::Ext);
        let folder = tempfile::Builder::new().prefix("replicate-").tempdir_in(scratch()).expect("a folder");
        let lab = Lab::new(folder.path(), "lab", more(hosts().sr(sr("storage")).sr(sr("spare"))).vm(machine));
        let far = Lab::new(folder.path(), "far", hosts().sr(sr("far")));
        let world = Self { lab, far, folder, seed };
        world.configure();
        world
    }

    /// Writes the configuration, which calls the other pool `dr`.
    fn configure(&self) {
        let config = self.folder.path().join(".config/xofs");
        fs::create_dir_all(&config).expect("a folder");
        let (address, fingerprint) = (self.far.simulator.address(), self.far.simulator.fingerprint());
        let password = self.far.password.display();
        let entry = format!(
            "[pools.dr]\naddress = \"{address}\"\nfingerprint = \"{fingerprint}\"\npassword_file = \"{password}\"\n"
        );
        fs::write(config.join("config.toml"), entry).expect("a short file fits");
    }

    pub fn with_one_disk() -> Self {
        Self::new(Machine::new("web01").running().disk(Disk::new("system", 32 * MIB).filled(50)))
    }

    /// `xofs backup` of `web01`, to what `arguments` say.
    pub fn command(&self, arguments: &[&str]) -> Command {
        let mut command = self.lab.command("backup", arguments);
        command.args(["--vm", "web01"]).env_remove("XDG_CONFIG_HOME").env_remove("XOFS_REPOSITORY");
        command
    }

    /// Runs it, which must end with this code; returns what it says of the VM, and on standard error.
    pub fn ends(&self, arguments: &[&str], expected: i32) -> (Value, String) {
        let (code, out, err) = run(self.command(arguments).arg("--json"));
        assert_eq!(code, expected, "{out}\n{err}");
        // Nothing is said of a VM where nothing could be begun.
        let said: Value = serde_json::from_str(&out).unwrap_or_default();
        (said["vms"][0].clone(), err)
    }

    pub fn replicates(&self, arguments: &[&str]) -> Value {
        self.ends(arguments, 0).0
    }

    pub fn repository(&self, name: &str) -> PathBuf {
        init(self.folder.path(), name, &[])
    }

    pub fn machine(&self) -> Reference {
        self.lab.simulator.only(Class::Vm, "web01")
    }

    pub fn record(&self) -> Record<Vm> {
        self.lab.client().record(&Ref::new(self.machine().as_str())).expect("there")
    }

    /// The disks of `web01`.
    pub fn disks(&self) -> Vec<Record<Vdi>> {
        let pool = self.lab.client();
        let disks = self.lab.simulator.disks_of(&self.machine()).expect("there");
        disks.iter().map(|disk| pool.record(&Ref::new(disk.as_str())).expect("there")).collect()
    }

    pub fn held(&self) -> Held {
        self.lab.held(&self.machine())
    }

    pub fn guest_writes(&self, round: u64, writes: u64) {
        self.lab.simulator.guest_writes(&self.machine(), self.seed ^ (round << 20), writes).expect("written");
    }

    /// Checks that nothing is under way, or left of what ended, but so many snapshots of `web01`. Tasks that a pool made for a call
    /// whose answer nobody got are the pool's.
    pub fn is_at_rest(&self, snapshots: usize) {
        assert_eq!(self.lab.journals(), 0, "journals of runs");
        for lab in [&self.lab, &self.far] {
            let is_over = || !lab.tasks().iter().any(|name| name.contains("[xofs run"));
            wait_for("the end of tasks and devices", || is_over() && lab.control_domain_devices() == 0);
            let pool = lab.client();
            for vdi in pool.records::<Vdi>().expect("answered").iter().filter(|vdi| vdi.managed) {
                let marks: Vec<&String> = vdi.other_config.keys().filter(|key| is_mark(key)).collect();
                assert!(marks.is_empty(), "{} has {marks:?}", vdi.name_label);
                assert!(!vdi.vbds.is_empty(), "no machine has the disk '{}'", vdi.name_label);
            }
            for vm in pool.records::<Vm>().expect("answered") {
                let marks: Vec<&String> = vm.other_config.keys().filter(|key| is_mark(key)).collect();
                assert!(marks.is_empty(), "{} has {marks:?}", vm.name_label);
            }
        }
        assert_eq!(self.record().snapshots.len(), snapshots, "snapshots of web01");
    }
}

pub fn is_mark(key: &str) -> bool {
    ["xofs:replicating", "xofs:replaced", "xofs:replica-cloning"].contains(&key)
}

pub fn switch_off(pool: &Pool, vm: &Ref<Vm>) {
    pool.run("VM.hard_shutdown", &[json!(vm)]).expect("off");
}

/// What the disks of a machine or snapshot hold.
pub fn held_by(lab: &Lab, vm: &Record<Vm>) -> Held {
    lab.held(&Reference::from(vm.reference.as_str()))
}

/// The machines of replicas in a pool that increments are put on, of any SR.
pub fn machines(lab: &Lab) -> Vec<Record<Vm>> {
    let all = lab.client().records::<Vm>().expect("answered");
    let is_one = |vm: &Record<Vm>| !vm.is_a_snapshot && vm.other_config.get("xofs:replica") == Some(&vm.uuid);
    all.into_iter().filter(is_one).collect()
}

/// The states of replicas in a pool, oldest first.
pub fn states(lab: &Lab) -> Vec<Record<Vm>> {
    let mut all = lab.client().records::<Vm>().expect("answered");
    let number = |vm: &Record<Vm>| vm.other_config.get("xofs:replica-number")?.parse::<u64>().ok();
    all.retain(|vm| vm.other_config.get("xofs:replica") == Some(&vm.uuid) && number(vm).is_some());
    all.retain(|vm| !vm.other_config.keys().any(|key| is_mark(key)));
    all.sort_by_key(number);
    all
}

/// Compares all states of the replica in a pool with what was held when they were made, oldest first.
pub fn compare(lab: &Lab, expected: &[Held]) {
    let states = states(lab);
    assert_eq!(states.len(), expected.len(), "states");
    for (number, (state, held)) in states.iter().zip(expected).enumerate() {
        let found = held_by(lab, state);
        assert_eq!(found.keys().collect::<Vec<_>>(), held.keys().collect::<Vec<_>>(), "state {number}");
        for (name, bytes) in held {
            let differs = bytes.iter().zip(&found[name]).position(|(expected, found)| expected != found);
            assert_eq!((bytes.len(), differs), (found[name].len(), None), "state {number}, disk {name}");
        }
    }
}

/// Compares the backups of `web01` with what was held when they were made, oldest first.
pub fn compare_repository(repository: &Path, expected: &[Held]) {
    let repository = Repository::open(repository, OpenOptions::default()).expect("a repository");
    let vms = repository.vms().expect("listed");
    let backups = repository.backups(&vms[0].id).expect("listed");
    assert_eq!(backups.len(), expected.len(), "backups");
    backups.iter().zip(expected).for_each(|(backup, held)| compare_backup(&repository, backup, held, "compared"));
}

/// Bytes that were read of a disk in all passes.
pub fn read(said: &Value, disk: usize) -> u64 {
    let passes = said["backup"]["reads"][disk]["passes"].as_array().expect("it was read");
    passes.iter().map(|pass| pass["bytes"].as_u64().expect("a number")).sum()
}

/// Bytes that a destination was sent of a disk, and whether that was all of it.
pub fn sent(said: &Value, destination: usize, disk: usize) -> (u64, bool) {
    let disk = &said["backup"]["repositories"][destination]["disks"][disk];
    (disk["storedBytes"].as_u64().expect("said"), disk["isKey"].as_bool().expect("said"))
}

pub fn mac_of(lab: &Lab, vm: &Record<Vm>) -> String {
    lab.client().record::<Vif>(&vm.vifs[0]).expect("there").mac.clone()
}
