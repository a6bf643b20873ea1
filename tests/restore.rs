//! Restores into a simulated pool by the built binary: what comes back is what was backed up, in this pool or an empty one, and
//! whatever ends a run leaves nothing of it.
//!
//! `XOFS_SEED=17` has guests write something else.

mod pool;
mod support;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use pool::{Lab, MIB, World, wait_for};
use serde_json::{Value, json};
use support::{init, run};
use xapi::Ref;
use xapi::record::{Vdi, Vm};
use xapi_simulator::scene::{Disk, Machine, Repository as Sr, Storage};
use xapi_simulator::value::Reference;
use xapi_simulator::{Class, Fault, Scene};

impl Lab {
    fn restore(&self, repository: &Path, arguments: &[&str]) -> Command {
        let mut command = self.command("restore", &[]);
        command.arg(repository).args(arguments);
        command
    }

    /// Restores, which must succeed; returns what is said of the only VM.
    fn restored(&self, repository: &Path, arguments: &[&str]) -> Value {
        let (code, out, err) = run(self.restore(repository, arguments).arg("--json"));
        assert_eq!(code, 0, "{out}\n{err}");
        let mut said: Value = serde_json::from_str(&out).expect("JSON");
        said["restores"][0].take()
    }

    /// Restores, which must fail with this code; returns what is said.
    fn fails(&self, repository: &Path, arguments: &[&str], expected: i32) -> String {
        let (code, out, err) = run(&mut self.restore(repository, arguments));
        assert_eq!(code, expected, "{out}\n{err}");
        err
    }

    /// Checks that nothing is left of runs: no mark, no task, no device of a control domain, no journal.
    fn is_at_rest(&self) {
        let marked = self.simulator.look(|store| {
            let of = |class| {
                store.all(class).filter(move |(object, _)| {
                    let mark = store.entry(class, object, "other_config", "xofs:restoring");
                    let name = store.text(class, object, "name_label").expect("it has one");
                    mark.is_ok_and(|mark| mark.is_some()) || name.starts_with("[restoring]")
                })
            };
            of(Class::Vm).count() + of(Class::Vdi).count()
        });
        assert_eq!(marked, 0, "objects that say they are being restored");
        self.is_let_go();
    }

    /// How many machines and disks there are, but for what snapshots left behind.
    fn count(&self) -> (usize, usize) {
        self.simulator.look(|store| {
            let is_managed = |(vdi, _): &(&Reference, _)| store.flag(Class::Vdi, vdi, "managed").expect("it says it");
            (store.count(Class::Vm), store.all(Class::Vdi).filter(is_managed).count())
        })
    }
}

/// A running machine `web01` with two disks, and a tag.
fn with_one_machine() -> World {
    let machine = Machine::new("web01").running().tag("prod");
    let (system, data) = (Disk::new("system", 32 * MIB).filled(50), Disk::new("data", 20 * MIB));
    World::new(|scene| scene.vm(machine.disk(system).disk(data)))
}

#[test]
fn a_machine_comes_back_equal_beside_the_one_that_is_there() {
    let world = with_one_machine();
    world.back_up(&[]);
    let held = world.lab.held(&world.machine());
    world.guest_writes(1, 20);
    let lab = &world.lab;
    let said = lab.restored(&world.repository, &["web01", "--verify"]);
    let vm = lab.by_uuid(Class::Vm, &said["vm"]);
    assert_ne!(vm, world.machine());
    assert_eq!(lab.held(&vm), held);
    let name = said["name"].as_str().expect("a name");
    assert!(name.starts_with("web01 (2"), "{name}");
    assert_eq!(lab.field(Class::Vm, &vm, "name_label"), json!(name));
    for field in
        ["memory_static_max", "memory_dynamic_max", "VCPUs_max", "VCPUs_at_startup", "HVM_boot_params", "platform"]
    {
        assert_eq!(lab.field(Class::Vm, &vm, field), lab.field(Class::Vm, &world.machine(), field), "{field}");
    }
    assert_eq!(lab.field(Class::Vm, &vm, "tags"), json!(["prod", "restored from backup"]));
    assert_eq!(lab.field(Class::Vm, &vm, "blocked_operations"), json!({}));
    assert_eq!(lab.field(Class::Vm, &vm, "is_a_template"), json!(false));
    for disk in said["disks"].as_array().expect("disks") {
        assert_eq!(disk["digest"], disk["verifiedDigest"], "{disk}");
        let vdi = lab.by_uuid(Class::Vdi, &disk["uuid"]);
        let label = if disk["name"] == "xvda" { "system" } else { "data" };
        assert_eq!(lab.field(Class::Vdi, &vdi, "name_label"), json!(label));
    }
    // The one that is there has the MACs of its backup.
    assert!(said["remarks"].to_string().contains("gets a new MAC"), "{}", said["remarks"]);
    lab.is_at_rest();
}

#[test]
fn all_machines_come_back_in_an_empty_pool_with_other_networks() {
    let machines = |scene: Scene| {
        scene
            .network("lan", &["nbd"])
            .vm(Machine::new("web01").tag("prod").disk(Disk::new("system", 24 * MIB).filled(60)))
            .vm(Machine::new("db01").disk(Disk::new("system", 16 * MIB)).disk(Disk::new("data", 40 * MIB).filled(30)))
    };
    let world = World::new(machines);
    world.back_up(&["--vm", "web01", "--vm", "db01"]);
    // Only the repository is left, and of that no more than its backups.
    for entry in fs::read_dir(world.repository.join("xo-vm-backups")).expect("listed") {
        let _gone = fs::remove_file(entry.expect("listed").path().join("cache.json.gz"));
    }
    let other = world.other("new", |scene| {
        let nfs = Sr::new("fast", Storage::Nfs);
        scene.host("a").host("b").sr(Sr::new("slow", Storage::Ext)).sr(nfs).network("wan", &[]).network("office", &[])
    });
    let (code, out, err) = run(other
        .restore(&world.repository, &["--all", "--sr", "fast", "--network", "lan=office", "--json"])
        .env("XDG_STATE_HOME", other.state.join("none")));
    assert_eq!(code, 0, "{out}\n{err}");
    for name in ["web01", "db01"] {
        let (old, new) = (world.lab.simulator.only(Class::Vm, name), other.simulator.only(Class::Vm, name));
        assert_eq!(other.held(&new), world.lab.held(&old), "{name}");
        for field in ["memory_static_max", "memory_static_min", "VCPUs_max", "HVM_boot_policy", "domain_type"] {
            assert_eq!(other.field(Class::Vm, &new, field), world.lab.field(Class::Vm, &old, field), "{name}: {field}");
        }
        let interface = |lab: &Lab, vm: &Reference| -> (String, String) {
            lab.simulator.look(|store| {
                let vifs = store.references(Class::Vm, vm, "VIFs").expect("it is there");
                let network = store.reference(Class::Vif, &vifs[0], "network").expect("it has one");
                let mac = store.text(Class::Vif, &vifs[0], "MAC").expect("it has one").to_owned();
                (store.text(Class::Network, &network, "name_label").expect("it has one").to_owned(), mac)
            })
        };
        let (before, after) = (interface(&world.lab, &old), interface(&other, &new));
        assert_eq!((before.0.as_str(), after.0.as_str()), ("lan", "office"), "{name}");
        assert_eq!(before.1, after.1, "{name}: nobody has its MAC");
        for vdi in other.simulator.disks_of(&new).expect("it has disks") {
            let sr = other.simulator.look(|store| store.reference(Class::Vdi, &vdi, "SR")).expect("it has one");
            assert_eq!(other.field(Class::Sr, &sr, "name_label"), json!("fast"));
        }
    }
    let tags = other.field(Class::Vm, &other.simulator.only(Class::Vm, "web01"), "tags");
    assert_eq!(tags, json!(["prod", "restored from backup"]));
    other.is_at_rest();
}

#[test]
fn an_interface_whose_network_is_nowhere_is_left_out_and_that_is_said() {
    let world = with_one_machine();
    world.back_up(&[]);
    let other = world.other("new", |scene| scene.network("wan", &[]));
    let said = other.restored(&world.repository, &["web01"]);
    assert!(said["remarks"].to_string().contains("is left out"), "{}", said["remarks"]);
    let vm = other.by_uuid(Class::Vm, &said["vm"]);
    assert_eq!(other.field(Class::Vm, &vm, "VIFs"), json!([]));
    let said = other.restored(&world.repository, &["web01", "--network", "wan", "--new-mac", "--name", "second"]);
    let vm = other.by_uuid(Class::Vm, &said["vm"]);
    assert_eq!(other.field(Class::Vm, &vm, "VIFs").as_array().map(Vec::len), Some(1));
    assert_eq!(other.field(Class::Vm, &vm, "name_label"), json!("second"));
}

#[test]
fn what_is_explained_is_what_is_done_and_explaining_does_nothing() {
    let world = with_one_machine();
    world.back_up(&[]);
    let before = world.lab.count();
    let (code, out, err) = run(&mut world.lab.restore(&world.repository, &["web01", "--explain"]));
    assert_eq!((code, err.as_str()), (0, ""), "{out}");
    for part in ["a new VM", "xvda  32 MiB", "all that is not zero", "interface 0", "free"] {
        assert!(out.contains(part), "{part}: {out}");
    }
    let plan = world.lab.restored(&world.repository, &["web01", "--explain"]);
    assert_eq!(world.lab.count(), before);
    let said = world.lab.restored(&world.repository, &["web01"]);
    let sent = |said: &Value, field: &str| -> u64 {
        said.as_array().expect("disks").iter().map(|disk| disk[field].as_u64().expect("a number")).sum()
    };
    assert_eq!(sent(&plan["plan"]["disks"], "bytesToSend"), sent(&said["disks"], "bytesSent"));
}

#[test]
fn one_disk_comes_back_alone_or_for_a_machine_that_is_there() {
    let world = with_one_machine();
    world.back_up(&[]);
    let held = world.lab.held(&world.machine());
    world.guest_writes(1, 10);
    let lab = &world.lab;
    let said = lab.restored(&world.repository, &["web01/latest/xvdb", "--name", "data of before"]);
    let vdi = lab.by_uuid(Class::Vdi, &said["disks"][0]["uuid"]);
    assert_eq!(lab.bytes_of(&vdi), held["xvdb"]);
    assert_eq!(lab.field(Class::Vdi, &vdi, "name_label"), json!("data of before"));
    assert_eq!(lab.field(Class::Vdi, &vdi, "VBDs"), json!([]));
    let (code, out, err) =
        run(&mut lab.restore(&world.repository, &["web01", "--disk", "xvdb", "--attach-to", "web01"]));
    assert_eq!(code, 0, "{out}\n{err}");
    let vdi = lab.field(Class::Vdi, &lab.disks(&world.machine())["xvdc"], "uuid");
    let vm = lab.field(Class::Vm, &world.machine(), "uuid");
    let [vdi, vm] = [&vdi, &vm].map(|uuid| uuid.as_str().expect("text"));
    assert!(out.contains(&format!("' {vdi} of the VM 'web01' {vm}\n")), "{vdi} {vm} {out}");
    let now = lab.held(&world.machine());
    assert_eq!((now.len(), &now["xvdc"]), (3, &held["xvdb"]));
    assert!(lab.fails(&world.repository, &["web01", "--disk", "xvdz"], 2).contains("it has xvda, xvdb"));
    lab.is_at_rest();
}

#[test]
fn onto_a_snapshot_only_what_differs_is_sent_whichever_is_older() {
    let world =
        World::new(|scene| scene.vm(Machine::new("web01").running().disk(Disk::new("system", 64 * MIB).filled(80))));
    let (mut held, lab) = (Vec::new(), &world.lab);
    for round in 0..3 {
        world.back_up(&[]);
        held.push(lab.held(&world.machine()));
        // Three blocks, another each time.
        let vdi = lab.simulator.disks_of(&world.machine()).expect("it has disks")[0].clone();
        for block in [1, 9, 20 + round] {
            let byte = u8::try_from(round + 1).expect("small");
            lab.simulator
                .write(&vdi, |content| content.write(block * 2 * MIB, &[byte; 4096]).expect("in range"))
                .expect("there");
        }
    }
    // The pool has the snapshot of the newest backup only.
    for (back, blocks) in [(0, 0), (1, 3), (2, 4)] {
        let what = format!("web01/latest~{back}");
        let said = lab.restored(&world.repository, &[&what, "--onto-snapshot", "--verify"]);
        assert_eq!(said["disks"][0]["bytesSent"], json!(blocks * 2 * MIB), "{what}: {said}");
        assert!(said["disks"][0]["snapshot"].is_string(), "{said}");
        let vm = lab.by_uuid(Class::Vm, &said["vm"]);
        assert_eq!(lab.held(&vm), held[2 - back], "{what}");
        let vdi = lab.by_uuid(Class::Vdi, &said["disks"][0]["uuid"]);
        let entries = lab.field(Class::Vdi, &vdi, "other_config").to_string();
        assert!(!entries.contains("xofs:run") && !entries.contains("xofs:stored"), "{entries}");
    }
    // It stays what the next backup is made upon.
    world.back_up(&["--incremental"]);
    lab.is_at_rest();
}

#[test]
fn a_full_backup_comes_back_from_a_plain_and_from_an_encrypted_repository() {
    let world = with_one_machine();
    let key = world.folder.path().join("key");
    fs::write(&key, support::KEY).expect("a short file fits");
    let key = key.to_str().expect("UTF-8");
    let encrypted = init(world.folder.path(), "encrypted", &["--encrypted", "--password-file", key]);
    let to = encrypted.to_str().expect("UTF-8");
    let held = world.lab.held(&world.machine());
    world.back_up(&["--mode", "full", "--xva-compression", "none"]);
    world.back_up(&["--to", to, "--mode", "full", "--password-file", key]);
    for (name, repository, more) in
        [("plain", &world.repository, &[][..]), ("encrypted", &encrypted, &["--password-file", key])]
    {
        let other = world.other(name, |scene| scene.network("lan", &[]));
        let arguments: Vec<&str> = ["web01"].iter().chain(more).copied().collect();
        let said = other.restored(repository, &arguments);
        let vm = other.by_uuid(Class::Vm, &said["vm"]);
        assert_eq!(other.held(&vm), held, "{name}");
        assert_eq!(other.field(Class::Vm, &vm, "name_label"), json!("web01"));
        assert_eq!(other.field(Class::Vm, &vm, "is_a_template"), json!(false));
        assert!(said["xva"]["checksum"].is_string(), "{said}");
        let entries = other.field(Class::Vm, &vm, "other_config").to_string();
        assert!(entries.contains("xofs:restored-from") && !entries.contains("xofs:run"), "{entries}");
        other.is_at_rest();
    }
}

#[test]
fn increments_come_back_from_an_encrypted_repository() {
    let world = with_one_machine();
    let key = world.folder.path().join("key");
    fs::write(&key, support::KEY).expect("a short file fits");
    let key = key.to_str().expect("UTF-8");
    let encrypted = init(world.folder.path(), "encrypted", &["--encrypted", "--password-file", key]);
    let to = encrypted.to_str().expect("UTF-8");
    world.back_up(&["--to", to, "--password-file", key]);
    world.guest_writes(1, 30);
    world.back_up(&["--to", to, "--password-file", key]);
    let held = world.lab.held(&world.machine());
    let said = world.lab.restored(&encrypted, &["web01", "--password-file", key]);
    assert_eq!(world.lab.held(&world.lab.by_uuid(Class::Vm, &said["vm"])), held);
}

#[test]
fn whatever_fails_leaves_nothing_of_it() {
    let world = with_one_machine();
    world.back_up(&[]);
    let before = world.lab.count();
    let lab = &world.lab;
    for fault in [
        "import after 4MiB cut",
        "import after 6MiB page",
        "import after 4MiB full",
        "call VBD.create fail INTERNAL_ERROR,broken",
        "call VDI.create after 1 cut",
        "call VM.create cut",
        "call VIF.create fail MAC_INVALID,x",
    ] {
        lab.simulator.fault(fault.parse::<Fault>().expect(fault));
        let err = lab.fails(&world.repository, &["web01"], 1);
        assert!(err.contains("restore web01/"), "{fault}: {err}");
        assert_eq!((lab.count(), lab.simulator.faults_left()), (before, 0), "{fault}: {err}");
        if fault.contains("VDI.create") {
            // Nobody knows the task of a call whose answer was lost: the pool removes it in time.
            lab.simulator.change(|state| state.store.forget(Class::Task));
        }
        lab.is_at_rest();
    }
    let err = lab.fails(&world.repository, &["web01", "--sr", "nowhere"], 2);
    assert!(err.contains("no SR 'nowhere'"), "{err}");
}

#[test]
fn an_sr_without_room_is_known_before_anything_is_made() {
    let world = with_one_machine();
    world.back_up(&[]);
    for (name, storage, size) in [("thick", Storage::Lvm, 48 * MIB), ("thin", Storage::Nfs, 8 * MIB)] {
        let other = world.other(name, |scene| scene.sr(Sr::new("small", storage).size(size)));
        let err = other.fails(&world.repository, &["web01"], 1);
        assert!(err.contains("the SR 'small'") && err.contains("bytes free"), "{name}: {err}");
        assert_eq!(other.count().1, 0, "{name}");
        assert_eq!(other.simulator.log().count("VM.create"), 0, "{name}");
    }
}

#[test]
fn a_host_that_does_not_have_the_sr_is_not_where_disks_are_sent() {
    let world = with_one_machine();
    world.back_up(&[]);
    let held = world.lab.held(&world.machine());
    let other = world.other("two", |scene| {
        scene
            .host("master")
            .host("other")
            .sr(Sr::new("shared", Storage::Nfs))
            .sr(Sr::new("local", Storage::Ext).on(&[1]))
    });
    let said = other.restored(&world.repository, &["web01", "--sr", "local", "--verify"]);
    assert_eq!(other.held(&other.by_uuid(Class::Vm, &said["vm"])), held);
}

/// Waits until `web01` is being restored and some of a disk has arrived.
fn wait_for_transfer(lab: &Lab) {
    wait_for("a disk", || lab.simulator.log().now(xapi_simulator::log::Activity::Import) > 0);
}

#[test]
fn a_signal_ends_it_at_once_and_removes_what_was_made() {
    let world = with_one_machine();
    world.back_up(&[]);
    let (before, lab) = (world.lab.count(), &world.lab);
    lab.simulator.fault("import after 4MiB stall".parse::<Fault>().expect("a fault"));
    let mut child = lab.restore(&world.repository, &["web01"]).stderr(Stdio::piped()).spawn().expect("starts");
    wait_for_transfer(lab);
    support::succeed(Command::new("kill").arg("-TERM").arg(child.id().to_string()));
    let status = child.wait().expect("ends");
    assert_eq!(status.code(), Some(130));
    assert_eq!(lab.count(), before);
    lab.simulator.clear_faults();
    lab.is_at_rest();
}

#[test]
fn what_a_killed_run_left_is_removed_by_the_next_and_nothing_else() {
    let world = with_one_machine();
    world.back_up(&[]);
    let (before, lab) = (world.lab.count(), &world.lab);
    lab.simulator.fault("import after 4MiB stall".parse::<Fault>().expect("a fault"));
    let mut child = lab.restore(&world.repository, &["web01"]).stderr(Stdio::null()).spawn().expect("starts");
    wait_for_transfer(lab);
    child.kill().expect("it lives");
    child.wait().expect("ends");
    assert_eq!(lab.count(), (before.0 + 1, before.1 + 2), "it left what it made");
    lab.simulator.clear_faults();
    // Somebody else's, of the same name.
    let said = lab.restored(&world.repository, &["web01/latest/xvdb", "--name", "[restoring] system"]);
    assert!(said["vm"].is_null());
    let after = lab.count();
    assert_eq!((after.0, after.1), (before.0, before.1 + 1));
}

impl Lab {
    /// Has a restore of `web01` stall at `fault`, and kills it so long after it has.
    fn kill_at(&self, repository: &Path, arguments: &[&str], fault: &str, after: Duration) {
        self.simulator.fault(fault.parse::<Fault>().expect(fault));
        let mut command = self.restore(repository, &[&["web01"], arguments].concat());
        let mut killed = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().expect("starts");
        wait_for("the moment", || self.simulator.faults_left() == 0);
        std::thread::sleep(after);
        killed.kill().expect("it is ours");
        killed.wait().expect("it is ours");
    }
}

#[test]
fn a_machine_that_somebody_may_have_used_stays_though_its_marks_do_too() {
    let world = with_one_machine();
    world.back_up(&[]);
    let (before, lab, pool) = (world.lab.count(), &world.lab, world.lab.client());
    // It may be started, and still says to be restored.
    lab.kill_at(&world.repository, &["--name", "new"], "call VM.remove_from_other_config stall", Duration::ZERO);
    let vm = lab.simulator.only(Class::Vm, "new");
    pool.start_vm(&Ref::new(vm.as_str()), false).expect("starts");
    lab.simulator.guest_writes(&vm, world.seed ^ 77, 3).expect("written");
    pool.run("VM.hard_shutdown", &[json!(vm.as_str())]).expect("off");
    let held = lab.held(&vm);
    world.back_up(&[]);
    assert_eq!((lab.count(), lab.held(&vm)), ((before.0 + 1, before.1 + 2), held));
    assert_eq!(lab.field(Class::Vm, &vm, "blocked_operations"), json!({}));
    lab.is_at_rest();
}

#[test]
fn a_disk_that_was_taken_from_a_whole_machine_stays_though_its_mark_does_too() {
    let world = with_one_machine();
    world.back_up(&[]);
    let (lab, pool) = (&world.lab, world.lab.client());
    for has_mark in [true, false] {
        let before = lab.count();
        // The two disks have got their names of the beginning; the third time it is that of the end.
        let name = format!("new {has_mark}");
        let fault = "call VDI.set_name_label after 2 stall";
        lab.kill_at(&world.repository, &["--name", &name], fault, Duration::ZERO);
        let vm = lab.simulator.only(Class::Vm, &name);
        let disk = lab.disks(&vm)["xvdb"].clone();
        if !has_mark {
            let vm: Ref<Vm> = Ref::new(vm.as_str());
            pool.remove_entry(&vm, "other_config", "xofs:restoring").expect("removed");
        }
        let taken = pool.record::<Vdi>(&Ref::new(disk.as_str())).expect("there").vbds.clone();
        taken.iter().for_each(|vbd| pool.destroy_vbd(vbd).expect("destroyed"));
        world.back_up(&[]);
        assert_eq!(lab.count(), (before.0 + 1, before.1 + 2), "{has_mark}");
        assert_eq!(lab.field(Class::Vdi, &disk, "name_label"), json!("data"));
        lab.is_at_rest();
    }
}

#[test]
fn a_clone_of_a_snapshot_of_which_nobody_heard_is_removed() {
    let world = with_one_machine();
    world.back_up(&[]);
    let (before, lab) = (world.lab.count(), &world.lab);
    lab.simulator.fault("call VDI.clone cut".parse::<Fault>().expect("a fault"));
    lab.fails(&world.repository, &["web01", "--onto-snapshot"], 1);
    assert_eq!((lab.count(), lab.simulator.faults_left()), (before, 0));
    let fault = "call VDI.remove_from_other_config stall";
    lab.kill_at(&world.repository, &["--onto-snapshot"], fault, Duration::ZERO);
    assert_eq!(lab.count(), (before.0 + 1, before.1 + 1), "the clone is there");
    world.back_up(&[]);
    assert_eq!(lab.count(), before);
    // Nobody knows the task of a call whose answer was lost: the pool removes it in time.
    lab.simulator.change(|state| state.store.forget(Class::Task));
    lab.is_at_rest();
}

/// A pool with a full backup of `web01`.
fn with_one_full_backup() -> World {
    let disk = Disk::new("system", 4 * MIB).filled(100);
    let world = World::new(|scene| scene.vm(Machine::new("web01").disk(disk)));
    world.back_up(&["--mode", "full", "--xva-compression", "none"]);
    world
}

#[test]
fn what_a_killed_run_had_the_pool_make_of_an_xva_goes_with_the_next_whenever_it_was_killed() {
    let world = with_one_full_backup();
    let (before, lab) = (world.lab.count(), &world.lab);
    for call in [
        "VM.add_to_blocked_operations",
        "VDI.add_to_other_config",
        "VM.set_name_label",
        "VM.add_to_other_config",
        "VM.add_tags",
        "VM.remove_from_blocked_operations",
    ] {
        lab.kill_at(&world.repository, &["--name", "new"], &format!("call {call} stall"), Duration::ZERO);
        assert_eq!(lab.count(), (before.0 + 1, before.1 + 1), "{call}: it left what it made");
        world.back_up(&["--mode", "full"]);
        assert_eq!(lab.count(), before, "{call}");
        lab.is_at_rest();
    }
}

#[test]
fn an_import_that_outlives_its_run_is_waited_for_by_those_that_come_after() {
    let world = with_one_full_backup();
    let (before, lab) = (world.lab.count(), &world.lab);
    // The pool has all bytes, and takes its time.
    let fault = "import-vm after 2900KiB delay 20";
    lab.kill_at(&world.repository, &["--name", "new"], fault, Duration::from_secs(2));
    let is_there = || lab.tasks().iter().any(|task| task.contains("import of a machine"));
    world.back_up(&["--mode", "full"]);
    assert!(is_there(), "it says still what was made");
    wait_for("the end of the import", || lab.simulator.log().now(xapi_simulator::log::Activity::Import) == 0);
    assert_eq!(lab.count(), (before.0 + 1, before.1 + 1), "it came to its end");
    world.back_up(&["--mode", "full"]);
    assert_eq!(lab.count(), before);
    lab.is_at_rest();
}

#[test]
fn a_disk_that_somebody_gave_to_a_machine_of_an_xva_stays() {
    let world = with_one_full_backup();
    let (lab, pool) = (&world.lab, world.lab.client());
    let his = pool.record::<Vdi>(&Ref::new(lab.disks(&world.machine())["xvda"].as_str())).expect("there");
    let mut fields = his.raw.clone();
    fields.insert("name_label".to_owned(), json!("his"));
    fields.insert("other_config".to_owned(), json!({}));
    let all = || pool.records::<Vm>().expect("answered").into_iter().map(|vm| vm.reference).collect::<Vec<_>>();
    for call in ["VM.add_to_blocked_operations", "VM.add_tags"] {
        let before = all();
        lab.kill_at(&world.repository, &["--name", "new"], &format!("call {call} stall"), Duration::ZERO);
        let made = all().into_iter().find(|vm| !before.contains(vm)).expect("it left what it made");
        let disk = pool.create_vdi(&fields).expect("made");
        let device = json!({
            "VM": made, "VDI": disk, "userdevice": "4", "bootable": false,
            "mode": "RW", "type": "Disk", "unpluggable": true, "empty": false, "other_config": {},
            "qos_algorithm_type": "", "qos_algorithm_params": {},
        });
        pool.create_vbd(device.as_object().expect("an object")).expect("made");
        world.back_up(&["--mode", "full"]);
        assert!(pool.record::<Vdi>(&disk).is_ok(), "{call}");
    }
}

/// The devices of a machine in one of its lists.
fn members(lab: &Lab, vm: &Reference, list: &str) -> Vec<Reference> {
    lab.simulator.look(|store| store.references(Class::Vm, vm, list).expect("it is there"))
}

#[test]
fn a_tpm_and_what_the_firmware_tells_come_back_unless_the_pool_allows_no_tpm() {
    let contents = "c3RhdGUgb2YgYSB0cG0=";
    let machine =
        Machine::new("web01").tpm(contents).bios_string("bios-vendor", "Maker").bios_string("oem-1", "kept out");
    let world = World::new(|scene| scene.vm(machine.disk(Disk::new("system", 4 * MIB).filled(100))));
    world.back_up(&[]);
    let contents_of = |lab: &Lab, vm: &Reference| {
        let vtpms = members(lab, vm, "VTPMs");
        lab.simulator.change(|state| vtpms.iter().map(|vtpm| state.tpms[vtpm].clone()).collect::<Vec<_>>())
    };
    let other = world.other("other", |scene| scene);
    for lab in [&world.lab, &other] {
        let said = lab.restored(&world.repository, &["web01", "--start"]);
        let vm = lab.by_uuid(Class::Vm, &said["vm"]);
        assert_eq!(contents_of(lab, &vm), [contents]);
        let strings = lab.field(Class::Vm, &vm, "bios_strings");
        assert_eq!((&strings["bios-vendor"], &strings["system-product-name"]), (&json!("Maker"), &json!("HVM domU")));
        assert_ne!(strings["oem-1"], "kept out");
        assert_eq!(lab.field(Class::Vm, &vm, "power_state"), json!("Running"));
        let told = lab.simulator.log().requests();
        assert!(!told.iter().any(|request| request.arguments.iter().any(|argument| argument.contains(contents))));
        lab.is_at_rest();
    }
    let without = world.other("without", |scene| scene);
    without
        .simulator
        .change(|state| {
            let pool = state.pool();
            state.store.set(Class::Pool, &pool, "restrictions", xapi_simulator::value::map([("restrict_vtpm", "true")]))
        })
        .expect("there is a pool");
    let (code, out, err) = run(&mut without.restore(&world.repository, &["web01"]));
    assert_eq!(code, 0, "{out}\n{err}");
    assert!(err.contains("the virtual TPM is left out"), "{err}");
    assert_eq!(members(&without, &without.simulator.only(Class::Vm, "web01"), "VTPMs"), []);
    without.is_at_rest();
}

#[test]
fn disks_lie_where_each_is_wanted_on_thick_storage_too_and_the_machine_starts() {
    let world = with_one_machine();
    world.back_up(&[]);
    let held = world.lab.held(&world.machine());
    let other = world.other("new", |scene| {
        let (thin, thick) = (Sr::new("thin", Storage::Nfs), Sr::new("thick", Storage::Lvm));
        // What was read back is held on to for a while, as by a real host.
        let settled = scene.settings(|settings| settings.detach_delay = Duration::from_secs(2));
        settled.sr(Sr::new("first", Storage::Ext)).sr(thin).sr(thick)
    });
    let to = ["web01", "--sr", "thin", "--sr-of", "xvdb=thick", "--start", "--verify"];
    let said = other.restored(&world.repository, &to);
    let vm = other.by_uuid(Class::Vm, &said["vm"]);
    assert_eq!(other.field(Class::Vm, &vm, "power_state"), json!("Running"));
    assert_eq!(other.held(&vm), held);
    let names: Vec<Value> = other
        .simulator
        .disks_of(&vm)
        .expect("it has disks")
        .iter()
        .map(|vdi| {
            let sr = other.simulator.look(|store| store.reference(Class::Vdi, vdi, "SR")).expect("it has one");
            other.field(Class::Sr, &sr, "name_label")
        })
        .collect();
    assert_eq!(names, [json!("thin"), json!("thick")]);
    other.is_at_rest();
    let err = other.fails(&world.repository, &["web01", "--sr-of", "xvdz=thick"], 2);
    assert!(err.contains("it has xvda, xvdb"), "{err}");
}

#[test]
fn a_machine_that_was_suspended_comes_back_halted_and_starts() {
    let world = with_one_machine();
    let lab = &world.lab;
    let vm = world.machine();
    lab.simulator.change(|state| xapi_simulator::methods::power::suspend(state, &vm)).expect("it runs");
    let (code, out, err) =
        run(lab.command("backup", &["--vm", "web01", "--explain"]).arg("--to").arg(&world.repository));
    assert_eq!(code, 0, "{out}\n{err}");
    assert!(out.contains("its memory is not part of the backup"), "{out}");
    world.back_up(&[]);
    let held = lab.held(&world.machine());
    assert_eq!(lab.field(Class::Vm, &world.machine(), "power_state"), json!("Suspended"));
    let other = world.other("new", |scene| scene);
    let said = other.restored(&world.repository, &["web01"]);
    let vm = other.by_uuid(Class::Vm, &said["vm"]);
    assert_eq!(other.field(Class::Vm, &vm, "power_state"), json!("Halted"));
    assert_eq!(other.field(Class::Vm, &vm, "suspend_VDI"), json!("OpaqueRef:NULL"));
    assert_eq!(other.held(&vm), held);
    let said = other.restored(&world.repository, &["web01", "--name", "again", "--start"]);
    assert_eq!(other.field(Class::Vm, &other.by_uuid(Class::Vm, &said["vm"]), "power_state"), json!("Running"));
}

#[test]
fn memory_in_a_backup_is_refused_or_left_out() {
    let world = with_one_machine();
    world.back_up(&[]);
    // Another program backs memory up as one more disk.
    let find = |folder: &Path, is_it: fn(&str) -> bool| -> PathBuf {
        let mut entries = fs::read_dir(folder).expect("listed").map(|entry| entry.expect("listed").path());
        entries.find(|path| path.file_name().and_then(|name| name.to_str()).is_some_and(is_it)).expect("it is there")
    };
    let vm = find(&world.repository.join("xo-vm-backups"), |name| name.len() == 36);
    let metadata = find(&vm, |name| name.ends_with("Z.json"));
    let mut document: Value = serde_json::from_slice(&fs::read(&metadata).expect("read")).expect("JSON");
    let data = document["vdis"].as_object_mut().expect("disks").values_mut();
    data.filter(|vdi| vdi["name_label"] == "data").for_each(|vdi| vdi["type"] = json!("suspend"));
    fs::write(&metadata, document.to_string()).expect("a short file fits");
    let _gone = fs::remove_file(vm.join("cache.json.gz"));
    let lab = &world.lab;
    let err = lab.fails(&world.repository, &["web01"], 2);
    assert!(err.contains("--without-memory"), "{err}");
    let said = lab.restored(&world.repository, &["web01", "--without-memory", "--start"]);
    assert!(said["remarks"].to_string().contains("as after a power failure"), "{said}");
    let vm = lab.by_uuid(Class::Vm, &said["vm"]);
    assert_eq!(lab.held(&vm).into_keys().collect::<Vec<_>>(), ["xvda"]);
    lab.is_at_rest();
}

#[test]
fn a_disk_larger_than_any_vhd_is_refused_before_anything_is_made() {
    let world = World::new(|scene| scene);
    let image = world.folder.path().join("large.raw");
    let length = (2040 << 30) + 2 * MIB;
    fs::File::create(&image).and_then(|file| file.set_len(length)).expect("a sparse file");
    let disk = format!("xvda={}", image.display());
    let vm = ["--vm", "1e2d3c4b-5a69-4788-9655-443322110fed", "--name", "web01", "--format", "exploded"];
    support::succeed(support::xofs().arg("ingest").arg(&world.repository).args(vm).args(["--disk", &disk]));
    let before = world.lab.count();
    for more in [&[][..], &["--explain"]] {
        let err = world.lab.fails(&world.repository, &[&["web01/latest/xvda"], more].concat(), 1);
        for part in [&*format!("xvda has {length} bytes"), "at most 2190433320960", "xofs export"] {
            assert!(err.contains(part), "{part}: {err}");
        }
    }
    assert_eq!(world.lab.count(), before);
}

#[test]
fn interfaces_of_a_full_backup_are_moved_to_the_networks_that_were_asked_for() {
    let world = World::new(|scene| {
        let scene = scene.network("lan", &[]).network("wan", &[]);
        scene.vm(Machine::new("web01").disk(Disk::new("system", 4 * MIB)))
    });
    world.back_up(&["--mode", "full", "--xva-compression", "none"]);
    let lab = &world.lab;
    for (wish, expected) in [("lan=wan", "wan"), ("wan", "wan"), ("wan=lan", "lan")] {
        let said = lab.restored(&world.repository, &["web01", "--network", wish, "--start"]);
        let vm = lab.by_uuid(Class::Vm, &said["vm"]);
        let vif = members(lab, &vm, "VIFs")[0].clone();
        let network = lab.simulator.look(|store| store.reference(Class::Vif, &vif, "network")).expect("it has one");
        assert_eq!(lab.field(Class::Network, &network, "name_label"), json!(expected), "{wish}");
        assert_eq!(lab.field(Class::Vm, &vm, "power_state"), json!("Running"));
    }
    let err = lab.fails(&world.repository, &["web01", "--network", "nowhere"], 2);
    assert!(err.contains("it has 'lan', 'wan'"), "{err}");
    lab.is_at_rest();
}

#[test]
fn an_sr_that_fills_midway_ends_it_and_nothing_is_left() {
    let world = with_one_machine();
    world.back_up(&[]);
    let (before, lab) = (world.lab.count(), &world.lab);
    lab.simulator.fault("import after 6MiB fill".parse::<Fault>().expect("a fault"));
    let err = lab.fails(&world.repository, &["web01", "--jobs", "1"], 1);
    assert!(err.contains("restore web01/"), "{err}");
    assert_eq!((lab.count(), lab.simulator.faults_left()), (before, 0), "{err}");
    lab.is_at_rest();
}
