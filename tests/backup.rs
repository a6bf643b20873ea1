//! Backups of a simulated pool by the built binary: every disk of every backup is what the machine held at its snapshot, no more
//! is read than changed, and whatever ends a run leaves the pool as it should be.
//!
//! `XOFS_SEED=17` has guests write something else.

mod pool;
mod support;

use std::fs;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use pool::{BLOCK, COALESCE_INTERVAL, Held, MIB, PATIENCE, World, is_key, read, wait_for};
use serde_json::{Value, json};
use support::slow_path::SlowPath;
use support::{init, run, scratch, xofs};
use xapi::record::{Vdi, Vm};
use xapi::{Record, Ref};
use xapi_simulator::failure::Failure;
use xapi_simulator::log::Activity;
use xapi_simulator::scene::{Disk, Machine, Repository as Sr, Storage};
use xapi_simulator::value::Reference;
use xapi_simulator::{Act, Class, Fault, Site, Upset};

#[test]
fn the_data_of_a_snapshot_may_go_once_changed_block_tracking_was_used() {
    let world = World::with_one_disk();
    let arguments = ["--cbt", "--purge-snapshot-data"];
    let mut held = vec![world.held()];
    world.back_up(&arguments);
    world.is_at_rest(1, 1);
    for round in 1..4 {
        world.guest_writes(round, 2);
        held.push(world.held());
        let next = world.back_up(&arguments);
        assert!(read(&next, 0).1.starts_with("NBD + CBT"), "{next:#}");
        // Only what changed is known of it any more: a disk without data, and no snapshot of the machine.
        world.is_at_rest(0, 1);
    }
    world.compare(&held);
}

#[test]
fn a_disk_is_read_over_as_many_connections_as_are_asked_for_at_most() {
    let world = World::with_one_disk();
    let held = vec![world.held()];
    let made = world.back_up(&["--nbd-connections", "1"]);
    assert!(read(&made, 0).1.starts_with("NBD + block list"), "{made:#}");
    let log = world.lab.simulator.log();
    assert_eq!((0..8).map(|host| log.most(Activity::Nbd(host))).sum::<usize>(), 1);
    world.compare(&held);
    let (code, _, err) = run(&mut world.command(&["--nbd-connections", "13"]));
    assert!(code == 2 && err.contains("1..=12"), "{code} {err}");
}

#[test]
fn whoever_reads_what_is_said_may_go_and_every_machine_is_backed_up() {
    let machine = |name: &str| Machine::new(name).disk(Disk::new("system", 4 * MIB));
    let world = World::new(|scene| scene.vm(machine("web01")).vm(machine("web02")));
    let mut child = world
        .command(&["--vm", "web01", "--vm", "web02"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("it starts");
    drop((child.stdout.take(), child.stderr.take()));
    assert_eq!(child.wait().expect("it is our child").code(), Some(0));
    let (_, out, _) = run(xofs().arg("list").arg(&world.repository));
    assert!(out.contains("web01") && out.contains("web02"), "{out}");
    world.is_at_rest(2, 2);
}

#[test]
fn a_disk_that_is_left_out_is_in_no_snapshot_of_an_older_pool_either() {
    for is_running in [true, false] {
        let world = World::new(|scene| {
            let disk = |name: &str| Disk::new(name, 8 * MIB).filled(50);
            let vm = Machine::new("web01").disk(disk("system")).disk(disk("[NOBAK] scratch"));
            scene.vm(if is_running { vm.running() } else { vm }).settings(|settings| settings.has_ignore_vdis = false)
        });
        let held = vec![world.held()];
        let devices = world.lab.simulator.disks_of(&world.machine()).expect("there");
        let (code, out, err) = run(&mut world.command(&["--no-nbd"]));
        assert_eq!(code, 0, "{out}\n{err}");
        assert_eq!(err.contains("are destroyed at once"), is_running, "{err}");
        world.is_at_rest(1, 1);
        assert_eq!(world.lab.simulator.disks_of(&world.machine()).expect("there"), devices, "its own disks stay");
        world.compare(&held);
    }
}

#[test]
fn a_failed_run_never_costs_the_base() {
    let world = World::with_one_disk();
    let mut held = vec![world.held()];
    world.back_up(&["--no-nbd"]);
    for fault in [
        Fault::call("VM.snapshot", Act::Fail(Failure::internal("no"))),
        Fault::new(Site::Export, Act::Cut).after(BLOCK).times(2),
        Fault::new(Site::Export, Act::Fail(Failure::internal("no"))).after(BLOCK).times(2),
    ] {
        world.guest_writes(9, 2);
        world.lab.simulator.fault(fault.clone());
        let said = world.fails(&["--no-nbd"], 1);
        assert_eq!(world.lab.simulator.faults_left(), 0, "{fault:?} struck: {said}");
        world.is_at_rest(1, 1);
    }
    held.push(world.held());
    let next = world.back_up(&["--no-nbd"]);
    assert!(!is_key(&next, 0) && read(&next, 0).0 < 16 * MIB, "{next:#}");
    world.compare(&held);
}

#[test]
fn a_snapshot_that_cannot_be_destroyed_goes_later_though_its_disk_was_removed_meanwhile() {
    let machine = Machine::new("web01").disk(Disk::new("system", 4 * MIB)).disk(Disk::new("data", 4 * MIB));
    let world = World::new(|scene| scene.vm(machine));
    world.back_up(&["--no-nbd"]);
    let busy = Failure::new("SR_BACKEND_FAILURE_40", ["", "busy", ""]);
    world.lab.simulator.fault(Fault::call("VDI.destroy", Act::Fail(busy)).times(1000));
    let (code, out, err) = run(&mut world.command(&["--no-nbd"]));
    assert!(code == 0 && err.contains("could be removed"), "{code} {out}\n{err}");
    world.lab.simulator.clear_faults();
    let pool = world.lab.client();
    let vbds = world.lab.field(Class::Vdi, &world.lab.disks(&world.machine())["xvdb"], "VBDs");
    pool.destroy_vbd(&Ref::new(vbds[0].as_str().expect("it has one"))).expect("destroyed");
    let held = world.held();
    world.back_up(&["--no-nbd"]);
    world.is_at_rest(1, 1);
    assert_eq!(held.len(), 1);
}

#[test]
fn changes_without_data_are_gone_after_their_disk_was_taken_from_the_machine() {
    let arguments = ["--cbt", "--purge-snapshot-data"];
    for is_destroyed in [false, true] {
        let machine = Machine::new("web01").disk(Disk::new("system", 4 * MIB)).disk(Disk::new("data", 4 * MIB));
        let world = World::new(|scene| scene.vm(machine));
        let mut held = vec![world.held()];
        world.back_up(&arguments);
        held.push(world.held());
        world.back_up(&arguments);
        world.is_at_rest(0, 2);
        let told = || {
            let entries = world.lab.field(Class::Vm, &world.machine(), "other_config");
            let names = entries.as_object().expect("a map").keys();
            names.filter(|name| name.starts_with("xofs:")).cloned().collect::<Vec<_>>()
        };
        let before = told();
        assert_eq!(before.len(), 1, "{before:?}");

        let pool = world.lab.client();
        let data = world.lab.disks(&world.machine())["xvdb"].clone();
        let vbds = world.lab.field(Class::Vdi, &data, "VBDs");
        let vbd = Ref::new(vbds[0].as_str().expect("it has one"));
        pool.destroy_vbd(&vbd).expect("destroyed");
        if is_destroyed {
            pool.destroy_vdi(&Ref::new(data.as_str())).expect("destroyed");
        }
        held.push(world.held());
        world.back_up(&arguments);
        world.is_at_rest(0, 1);
        let after = told();
        assert!(after.len() == 1 && after != before, "{before:?} {after:?}");
        world.compare(&held);
    }
}

#[test]
fn a_base_that_is_gone_has_the_disk_read_as_a_whole_and_stored_as_an_increment() {
    let world = World::with_one_disk();
    let mut held = vec![world.held()];
    world.back_up(&["--no-nbd"]);
    let pool = world.lab.client();
    let vm: Record<Vm> = pool.record(&Ref::new(world.machine().as_str())).expect("there");
    let disks = world.lab.simulator.disks_of(&world.machine()).expect("there");
    let live: Record<Vdi> = pool.record(&Ref::new(disks[0].as_str())).expect("there");
    vm.snapshots.iter().for_each(|snapshot| pool.destroy_vm(snapshot).expect("destroyed"));
    live.snapshots.iter().for_each(|snapshot| pool.destroy_vdi(snapshot).expect("destroyed"));
    world.guest_writes(1, 1);
    held.push(world.held());
    let (code, out, err) = run(&mut world.command(&["--no-nbd"]));
    assert_eq!(code, 0, "{out}\n{err}");
    assert!(err.contains("gone from the pool"), "{err}");
    assert!(out.contains("increment"), "{out}");
    world.is_at_rest(1, 1);

    // Gone while it is read: the difference breaks, and the whole is read in the same run.
    world.guest_writes(2, 1);
    held.push(world.held());
    world.lab.simulator.fault(Fault::new(Site::Export, Act::Fail(Failure::internal("gone"))));
    let next = world.back_up(&["--no-nbd"]);
    let passes = next["backup"]["reads"][0]["passes"].as_array().expect("passes");
    assert!(passes.len() <= 2 && !is_key(&next, 0), "{next:#}");
    world.is_at_rest(1, 1);
    world.compare(&held);
}

#[test]
fn without_a_base_no_snapshot_stays_and_only_what_differs_is_stored() {
    let world = World::with_one_disk();
    let mut held = vec![world.held()];
    world.back_up(&["--no-nbd"]);
    world.guest_writes(1, 4);
    held.push(world.held());
    let next = world.back_up(&["--no-nbd", "--no-base"]);
    assert!(!is_key(&next, 0));
    let of = |held: &Held| -> Vec<Vec<u8>> {
        held["xvda"].chunks(usize::try_from(BLOCK).expect("small")).map(<[u8]>::to_vec).collect()
    };
    let differing = of(&held[0]).iter().zip(&of(&held[1])).filter(|(old, new)| old != new).count();
    assert_eq!(next["backup"]["repositories"][0]["disks"][0]["blocks"], json!(differing), "{next:#}");
    world.is_at_rest(0, 0);
    world.compare(&held);
}

#[test]
fn a_full_backup_is_one_xva_and_leaves_no_snapshot() {
    let world = World::new(|scene| {
        let disk = |name: &str| Disk::new(name, 8 * MIB).filled(50);
        scene.vm(Machine::new("web01").running().disk(disk("system")).disk(disk("[NOBAK] scratch")))
    });
    let held = vec![world.held()];
    let made = world.back_up(&["--mode", "full", "--xva-compression", "none"]);
    assert!(made["backup"]["repositories"][0]["xva"]["bytes"].as_u64().is_some_and(|bytes| bytes > MIB), "{made:#}");
    world.is_at_rest(0, 0);
    world.compare(&held);
    world.lab.simulator.fault(Fault::new(Site::ExportVm, Act::Cut).after(MIB));
    world.fails(&["--mode", "full", "--xva-compression", "none"], 1);
    world.is_at_rest(0, 0);
    world.compare(&held);
}

#[test]
fn an_explanation_says_what_each_disk_will_be_and_makes_nothing() {
    let world = World::new(|scene| {
        let disk = |name: &str| Disk::new(name, 16 * MIB).filled(50);
        let sr = |name: &str, storage| Sr::new(name, storage).size(1 << 30);
        let vm = Machine::new("web01").running().disk(disk("system").on("thick")).disk(disk("data").on("thin"));
        scene.sr(sr("thick", Storage::Lvm)).sr(sr("thin", Storage::Ext)).vm(vm)
    });
    let explain = || world.back_up(&["--no-nbd", "--explain"])["plan"].take();
    let before = world.lab.simulator.objects();
    let plan = explain();
    assert_eq!(plan["disks"][0]["kind"], "key");
    assert!(plan["disks"][0]["why"].as_str().is_some_and(|why| why.contains("no backup")), "{plan:#}");
    assert_eq!(plan["room"][0]["storage"], "thick");
    assert_eq!(plan["room"][0]["takes"].as_u64(), Some(16 * MIB));
    assert_eq!(plan["room"].as_array().map(Vec::len), Some(1), "the other one is thin");
    assert_eq!(world.lab.simulator.objects()["VM"], before["VM"]);
    world.back_up(&["--no-nbd"]);
    let plan = explain();
    assert_eq!((&plan["disks"][0]["kind"], &plan["disks"][1]["kind"]), (&json!("increment"), &json!("increment")));
    assert_eq!(plan["disks"][1]["ways"], json!(["VHD stream"]));
    world.is_at_rest(1, 2);
}

#[test]
fn chains_that_the_host_has_not_coalesced_are_waited_for_and_then_an_error() {
    // Of a storage with many disks all are asked for at once.
    for others in [0, 10] {
        let other = |number| (0..4).fold(Machine::new(&format!("other{number}")), |vm, _| vm.disk(Disk::new("d", MIB)));
        let machine = Machine::new("web01").running().disk(Disk::new("system", 32 * MIB).filled(50));
        let world = World::new(|scene| (0..others).fold(scene.vm(machine), |scene, number| scene.vm(other(number))));
        world.lab.simulator.settings(|settings| settings.coalesce_interval = None);
        let mut held = Vec::new();
        for round in 0..3 {
            world.guest_writes(round, 1);
            held.push(world.held());
            world.back_up(&["--no-nbd", "--ignore-chain"]);
        }
        let said = world.fails(&["--no-nbd", "--chain-wait", "1"], 1);
        assert!(said.contains("wait to be coalesced") && said.contains("--ignore-chain"), "{said}");
        world.is_at_rest(1, 1);
        world.lab.simulator.settings(|settings| settings.coalesce_interval = Some(COALESCE_INTERVAL));
        held.push(world.held());
        world.back_up(&["--no-nbd"]);
        world.compare(&held);
    }
}

#[test]
fn a_certificate_is_accepted_once_and_another_one_never() {
    let world = World::with_one_disk();
    let said = world.fails(&["--explain", "--fingerprint", &["AA"; 32].join(":")], 1);
    assert!(said.contains(world.lab.simulator.fingerprint()), "{said}");
    let mut unknown = xofs();
    unknown.arg("backup").args(["--pool", &world.lab.simulator.address().to_string(), "--vm", "web01", "--explain"]);
    unknown.arg("--pool-password-file").arg(&world.lab.password);
    unknown.arg("--state-dir").arg(&world.lab.state).arg("--to").arg(&world.repository);
    let (code, _, said) = run(&mut unknown);
    assert_eq!(code, 1);
    assert!(said.contains(&format!("--fingerprint {}", world.lab.simulator.fingerprint())), "{said}");
    let (code, _, said) = run(world.command(&["--trust-first", "--explain"]).env("XOFS_LOG", "error"));
    assert!(code == 0 && said.contains(world.lab.simulator.fingerprint()), "{said}");
    let (code, out, said) = run(&mut unknown);
    assert_eq!(code, 0, "it is known now: {out} {said}");
}

#[test]
fn of_several_vms_one_that_fails_never_stops_the_others() {
    let world = World::new(|scene| {
        let disk = || Disk::new("system", 8 * MIB).filled(50);
        let scene = scene.vm(Machine::new("web01").running().disk(disk())).vm(Machine::new("db01").disk(disk()));
        scene.vm(Machine::new("tmp01").tag("xo:no-bak=scratch").disk(disk()))
    });
    let arguments = ["--no-nbd", "--vm", "db01", "--vm", "missing", "--vm", "tmp01", "--vm", "web01"];
    world.lab.simulator.fault(Fault::call("VM.snapshot", Act::Fail(Failure::internal("no"))));
    let (code, out, err) = run(&mut world.command(&arguments));
    assert_eq!(code, 3, "{out}\n{err}");
    assert!(err.contains("missing") && err.contains("2 of 4"), "{err}");
    assert!(out.contains("tmp01") && out.contains("scratch"), "{out}");
    world.compare(&[world.held()]);
    world.is_at_rest(1, 1);
}

#[test]
fn a_signal_ends_a_run_at_once_and_leaves_nothing_but_the_base() {
    let world = World::with_one_disk();
    let held = vec![world.held()];
    world.back_up(&["--no-nbd"]);
    world.guest_writes(1, 60);
    world.lab.simulator.fault(Fault::new(Site::Export, Act::Delay(PATIENCE)).after(MIB));
    let mut child = world.command(&["--no-nbd"]).stdin(Stdio::null()).stderr(Stdio::null()).spawn().expect("starts");
    wait_for("the export", || world.lab.simulator.faults_left() == 0);
    let pid = rustix::process::Pid::from_child(&child);
    rustix::process::kill_process(pid, rustix::process::Signal::INT).expect("it lives");
    let begun = Instant::now();
    let status = child.wait().expect("it ends");
    assert_eq!(status.code(), Some(130));
    assert!(begun.elapsed() < PATIENCE / 2, "it did not wait for the pool");
    world.is_at_rest(1, 1);
    world.compare(&held);
}

#[test]
fn what_a_killed_run_left_is_removed_by_the_next_with_or_without_its_journal_or_the_name_of_its_machine() {
    for (has_journal, has_name) in [(true, true), (false, true), (true, false)] {
        let world = World::with_one_disk();
        let mut held = vec![world.held()];
        world.back_up(&["--no-nbd"]);
        world.guest_writes(1, 60);
        world.lab.simulator.fault(Fault::new(Site::Export, Act::Delay(PATIENCE)).after(MIB));
        let mut command = world.command(&["--no-nbd"]);
        if !has_name {
            // As another machine would be called, with the same process and folders.
            let mut named = Command::new("unshare");
            named.args(["--uts", "sh", "-c", "hostname before && exec \"$0\" \"$@\""]);
            named.arg(command.get_program()).args(command.get_args());
            named.envs(command.get_envs().filter_map(|(name, value)| Some((name, value?))));
            command = named;
        }
        let mut child = command.stdin(Stdio::null()).stderr(Stdio::null()).spawn().expect("starts");
        wait_for("the export", || world.lab.simulator.faults_left() == 0);
        child.kill().expect("it lives");
        child.wait().expect("it ends");
        if !has_journal {
            fs::remove_dir_all(&world.lab.state).expect("removed");
        }
        // A snapshot of somebody else stays.
        let theirs =
            world.lab.client().snapshot_vm(&Ref::new(world.machine().as_str()), "by hand", &[]).expect("taken");
        held.push(world.held());
        let next = world.back_up(&["--no-nbd", "--wait", "60"]);
        assert!(!is_key(&next, 0) && next["backup"]["reads"][0]["passes"][0]["base"].is_string(), "{next:#}");
        world.is_at_rest(2, 2);
        assert!(world.lab.client().record(&theirs).is_ok());
        world.compare(&held);
    }
}

#[test]
fn a_snapshot_that_somebody_took_of_a_machine_set_back_to_ours_keeps_its_disks() {
    for arguments in [["--no-nbd"].as_slice(), &["--cbt", "--purge-snapshot-data"]] {
        let world = World::with_one_disk();
        let pool = world.lab.client();
        let mut held = vec![world.held()];
        world.back_up(arguments);
        // It has data still: only what was read by changed block tracking is purged.
        let ours = pool.by_name::<Vm>("[xofs] web01").expect("answered").remove(0);
        let ours: Record<Vm> = pool.record(&ours).expect("there");
        world.guest_writes(1, 4);
        pool.run("VM.revert", &[json!(ours.reference)]).expect("set back");
        let live: Record<Vdi> = pool.record(&live_disks(&world)[0]).expect("there");
        assert!(live.other_config.contains_key("xofs:run"), "it is a clone of a disk of ours");
        // The machine has the entries of its own past; one that was made of the snapshot would have these, too.
        let vm: Ref<Vm> = Ref::new(world.machine().as_str());
        for (name, value) in ours.other_config.iter().filter(|(name, _)| name.starts_with("xofs:")) {
            pool.set_entry(&vm, "other_config", name, value).expect("set");
        }
        world.guest_writes(2, 4);
        let before_upgrade = world.held();
        let theirs = pool.snapshot_vm(&vm, "before upgrade", &[]).expect("taken");
        let kept: Vec<Reference> = world.lab.disks(&Reference::from(theirs.as_str())).into_values().collect();
        for round in 3..6 {
            world.guest_writes(round, 2);
            held.push(world.held());
            world.back_up(arguments);
            let is_purged = round > 3 && arguments.len() > 1;
            world.is_at_rest(if is_purged { 1 } else { 2 }, 2);
            let disks = world.lab.disks(&Reference::from(theirs.as_str()));
            assert_eq!(disks.into_values().collect::<Vec<_>>(), kept, "his snapshot has its own disks");
            assert!(world.lab.held(&Reference::from(theirs.as_str())) == before_upgrade, "as they were");
        }
        world.compare(&held);
    }
}

#[test]
fn a_restored_machine_says_where_it_came_from_after_its_backup_and_half_a_machine_has_none() {
    let world = World::new(|scene| scene.vm(Machine::new("web01").disk(Disk::new("system", 4 * MIB))));
    let (lab, pool) = (&world.lab, world.lab.client());
    world.back_up(&["--mode", "full", "--xva-compression", "none"]);
    let (code, out, err) = run(lab.command("restore", &["--json"]).arg(&world.repository).arg("web01"));
    assert_eq!(code, 0, "{out}\n{err}");
    let said: Value = serde_json::from_str(&out).expect("JSON");
    let uuid = said["restores"][0]["vm"].as_str().expect("it says").to_owned();
    let vm = pool.by_uuid::<Vm>(&uuid).expect("there");
    pool.set(&vm, "name_label", "web01").expect("set");
    world.back_up(&["--no-nbd", "--vm", &uuid]);
    let names = |vm: &Ref<Vm>| {
        let vm: Record<Vm> = pool.record(vm).expect("there");
        vm.other_config.keys().filter(|name| name.starts_with("xofs:")).cloned().collect::<Vec<_>>()
    };
    assert_eq!(names(&vm), ["xofs:restored-from"], "without it, it is taken for what a dead restore left");

    let counted = || (lab.snapshots(Class::Vm), xofs::pool::all_vms(&pool).expect("answered").len());
    let before = counted();
    for (mark, act) in [("xofs:restoring", "restored"), ("xofs:replicating", "replicated")] {
        pool.set_entry(&vm, "other_config", mark, "of somebody").expect("set");
        // Whole, if it may be started: then only the mark was left, and it stays for who looks after it.
        world.back_up(&["--no-nbd", "--vm", &uuid]);
        assert!(names(&vm).iter().any(|name| name == mark), "{:?}", names(&vm));
        pool.set_entry(&vm, "blocked_operations", "start", "not whole").expect("set");
        let said = world.fails(&["--no-nbd", "--vm", &uuid], 2);
        assert!(said.contains("is not whole") && said.contains(act) && said.contains(&uuid), "{said}");
        assert_eq!(counted(), (before.0, before.1 - 1), "{mark}");
        // Of two with this name one is meant.
        world.back_up(&["--no-nbd", "--explain"]);
        pool.remove_entry(&vm, "other_config", mark).expect("removed");
        pool.remove_entry(&vm, "blocked_operations", "start").expect("removed");
    }
    assert_eq!(counted(), before);
    assert!(world.fails(&["--no-nbd"], 2).contains("several VMs"));
}

#[test]
fn two_repositories_get_it_in_one_pass_and_the_base_goes_only_when_both_have_the_next() {
    let world = World::new(|scene| {
        let vm = Machine::new("web01").running().disk(Disk::new("system", 24 * MIB).filled(50));
        scene.vm(vm.disk(Disk::new("data", 12 * MIB).filled(50)))
    });
    let second = init(world.folder.path(), "second", &[]);
    let slow = SlowPath::mount(&second);
    let (main, through) = (world.repository.display().to_string(), slow.path().display().to_string());
    let both = ["--no-nbd", "--to", &main, "--to", &through];
    let mut held = vec![world.held()];
    world.back_up(&both);

    // The second disk of one of them meets a full storage, when the first is there already.
    world.guest_writes(1, 4);
    held.push(world.held());
    let disks = world.lab.disks(&world.machine());
    let data = world.lab.field(Class::Vdi, &disks["xvdb"], "uuid");
    slow.fail("ENOSPC", &format!("*{}*/blocks/* ops=write", data.as_str().expect("a uuid")));
    let (code, out, err) = run(&mut world.command(&both));
    assert_eq!(code, 3, "{out}\n{err}");
    assert!(err.contains(&through), "{err}");
    slow.release();
    world.is_at_rest(1, 2);
    world.compare(&held);
    world.compare_in(&second, &held[..1]);

    // Their newest backups are of different snapshots: the whole is read, and what differs from either is stored.
    world.guest_writes(2, 2);
    held.push(world.held());
    let next = world.back_up(&both);
    for repository in 0..2 {
        for disk in 0..2 {
            let stored = &next["backup"]["repositories"][repository]["disks"][disk];
            assert_eq!(stored["isKey"], json!(false), "{next:#}");
        }
    }
    world.is_at_rest(1, 2);

    // From here on both have the same base again.
    world.guest_writes(3, 2);
    held.push(world.held());
    let next = world.back_up(&both);
    for disk in 0..2 {
        assert!(next["backup"]["reads"][disk]["passes"][0]["base"].is_string(), "{next:#}");
        assert!(read(&next, disk).0 <= 4 * BLOCK, "{next:#}");
    }
    world.compare(&held);
    world.compare_in(&second, &[&held[..1], &held[2..]].concat());
    world.is_at_rest(1, 2);
}

#[test]
fn an_increment_is_right_if_the_files_of_the_sr_are_coalesced_or_gone_while_they_are_read() {
    let folder = tempfile::Builder::new().prefix("sr-").tempdir_in(scratch()).expect("a folder");
    let sr = Sr::new("share", Storage::Nfs).folder(folder.path());
    let world = World::new(|scene| {
        let vm = Machine::new("web01").running().disk(Disk::new("system", 64 * MIB));
        scene.sr(sr).vm(vm.disk(Disk::new("data", 8 * MIB).filled(50)))
    });
    let (lab, log) = (&world.lab, world.lab.simulator.log());
    lab.simulator.settings(|settings| settings.coalesce_interval = None);
    let (share, repository) = (SlowPath::mount(folder.path()), SlowPath::mount(&world.repository));
    let (path, to) = (lab.sr_path("share", share.path()), repository.path().display().to_string());
    let arguments = ["--ignore-chain", "--sr-path", &path, "--to", &to];
    let mut held = vec![world.held()];
    world.back_up(&arguments);
    let client = lab.client();
    for (are_gone, rounds) in [(false, 0..2), (true, 3..5)] {
        // Images that nobody needs any more, and which the host has not merged yet. More changes than is read ahead.
        let last = rounds.end;
        for round in rounds {
            world.guest_writes(round, 30);
            let snapshot = client.snapshot_vm(&Ref::new(world.machine().as_str()), "by hand", &[]).expect("taken");
            client.destroy_disks_of(&snapshot, &live_disks(&world).iter().collect::<Vec<_>>()).expect("destroyed");
            client.destroy_vm(&snapshot).expect("destroyed");
        }
        world.guest_writes(last, 30);
        held.push(world.held());
        log.clear();
        // It waits in the middle of the first disk, whose files are open.
        repository.stall("*/blocks/* ops=write");
        let mut child = world.command(&arguments).stdin(Stdio::null()).stdout(Stdio::null()).spawn().expect("starts");
        repository.wait_for_stalled(1);
        assert_eq!(log.count("VDI.get_nbd_info"), 0, "it is read from files");
        match are_gone {
            true => share.fail("ESTALE", "*"),
            false => {
                let before = lab.simulator.objects()["VDI"];
                lab.simulator.happen(&Upset::Coalesce);
                assert!(lab.simulator.objects()["VDI"] < before, "images were merged");
            }
        }
        repository.release();
        assert_eq!(child.wait().expect("ends").code(), Some(0));
        // What was merged is found where it is now.
        assert_eq!(log.count("VDI.get_nbd_info") > 0, are_gone, "what is gone is read by NBD");
        share.release();
        world.is_at_rest(1, 2);
    }
    world.compare(&held);
}

/// The disks of `web01`, as a client calls them.
fn live_disks(world: &World) -> Vec<Ref<Vdi>> {
    world.lab.disks(&world.machine()).values().map(|vdi| Ref::new(vdi.as_str())).collect()
}

#[test]
fn events_are_asked_for_of_own_tasks_alone_and_of_nothing_where_there_is_none() {
    let world = World::with_one_disk();
    let lab = &world.lab;
    // A task that has ended when it is looked at first is not listened to.
    lab.simulator.settings(|settings| settings.snapshot_time = Duration::from_millis(500));
    for arguments in [["--no-nbd"].as_slice(), &["--cbt"], &["--cbt"]] {
        lab.simulator.log().clear();
        world.back_up(&[arguments, &["--explain"]].concat());
        assert_eq!(lab.simulator.log().count("event.from"), 0, "it only looks");
        world.back_up(arguments);
        assert!(lab.listened_to_tasks_alone() > 0, "the snapshot takes its time");
        lab.simulator.happen(&Upset::Coalesce);
    }
    lab.simulator.log().clear();
    let (code, out, err) = run(lab.command("restore", &[]).arg(&world.repository).arg("web01"));
    assert_eq!(code, 0, "{out}\n{err}");
    lab.listened_to_tasks_alone();
    lab.is_let_go();
}
