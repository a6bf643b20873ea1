//! Backups of a simulated pool by the built binary: every disk of every backup is what the machine held at its snapshot, no more
//! is read than changed, and whatever ends a run leaves the pool as it should be.
//!
//! `XOFS_SEED=17` has guests write something else.

mod pool;
mod support;

use std::fs;
use std::process::Stdio;
use std::time::{Duration, Instant};

use pool::{BLOCK, Held, MIB, PATIENCE, World, is_key, read, wait_for};
use serde_json::json;
use support::{init, run, scratch, xofs};
use xapi::record::{Vdi, Vm};
use xapi::{Record, Ref};
use xapi_simulator::failure::Failure;
use xapi_simulator::scene::{Disk, Machine, Repository as Sr, Storage};
use xapi_simulator::{Act, Class, Fault, Site};

/// Makes a key and three increments, and compares them; `way` is how each is to be read, and `most` bytes of an increment.
fn backs_up(world: &World, arguments: &[&str], ways: [&str; 2], most: u64) {
    let mut held = vec![world.held()];
    let first = world.back_up(arguments);
    assert!(is_key(&first, 0));
    assert!(read(&first, 0).1.starts_with(ways[0]), "{first:#}");
    assert!(read(&first, 0).0 <= 24 * MIB, "what is not there is not read: {first:#}");
    world.is_at_rest(1, 1);
    for round in 1..4 {
        world.guest_writes(round, 2);
        held.push(world.held());
        let next = world.back_up(arguments);
        assert!(!is_key(&next, 0), "{next:#}");
        let (bytes, way) = read(&next, 0);
        assert!(way.starts_with(ways[1]), "{way}");
        assert!(bytes <= most, "{bytes} read, {most} expected at most");
        world.is_at_rest(1, 1);
    }
    world.compare(&held);
}

#[test]
fn a_vm_is_stored_as_a_key_and_then_as_what_changed_by_stream() {
    // Two writes of at most 256 KiB touch at most four blocks.
    backs_up(&World::with_one_disk(), &["--no-nbd"], ["VHD stream"; 2], 4 * BLOCK);
}

#[test]
fn a_vm_is_stored_as_a_key_and_then_as_what_changed_by_nbd() {
    // Eight pieces of 64 KiB are looked at besides.
    backs_up(&World::with_one_disk(), &[], ["NBD + block list"; 2], 4 * BLOCK + 8 * (64 << 10));
}

#[test]
fn a_vm_is_stored_as_a_key_and_then_as_what_changed_by_changed_block_tracking() {
    // Two writes of at most 256 KiB touch at most ten pieces.
    backs_up(&World::with_one_disk(), &["--cbt"], ["NBD + block list", "NBD + CBT"], (10 + 8) * (64 << 10));
}

#[test]
fn a_vm_is_stored_as_a_key_and_then_as_what_changed_out_of_the_files_of_the_sr() {
    let folder = tempfile::Builder::new().prefix("sr-").tempdir_in(scratch()).expect("a folder");
    let world = World::new(|scene| {
        let vm = Machine::new("web01").running().disk(Disk::new("system", 32 * MIB).filled(50));
        scene.sr(Sr::new("share", Storage::Nfs).folder(folder.path())).vm(vm)
    });
    let sr = world.lab.simulator.only(Class::Sr, "share");
    let uuid =
        world.lab.simulator.look(|store| store.text(Class::Sr, &sr, "uuid").map(str::to_owned)).expect("it has one");
    let path = format!("{uuid}={}", folder.path().display());
    world.lab.simulator.log().clear();
    backs_up(&world, &["--sr-path", &path], ["files of the SR"; 2], 4 * BLOCK + 8 * (64 << 10));
    let requests = world.lab.simulator.log().requests();
    assert!(requests.iter().all(|request| !request.method.contains("export")), "nothing is exported");
    assert_eq!(world.lab.simulator.log().count("VDI.get_nbd_info"), 0, "nor read by NBD");
}

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
fn disks_may_come_go_grow_and_be_left_out() {
    let world = World::new(|scene| {
        let disk = |name: &str| Disk::new(name, 16 * MIB).filled(50);
        scene.vm(Machine::new("web01").running().disk(disk("system")).disk(disk("[NOBAK] scratch")).disk(disk("data")))
    });
    let pool = world.lab.client();
    let mut held = vec![world.held()];
    assert_eq!(held[0].keys().collect::<Vec<_>>(), ["xvda", "xvdc"]);
    world.back_up(&["--no-nbd"]);
    world.is_at_rest(1, 2);
    let disks = world.lab.simulator.disks_of(&world.machine()).expect("there");

    // Larger: stored exploded, it has to begin anew.
    pool.run("VM.hard_shutdown", &[json!(world.machine().as_str())]).expect("off");
    pool.resize_vdi(&Ref::new(disks[2].as_str()), 24 * MIB).expect("resized");
    world.guest_writes(1, 3);
    held.push(world.held());
    let grown = world.back_up(&["--no-nbd"]);
    assert!(!is_key(&grown, 0) && is_key(&grown, 1), "{grown:#}");
    world.is_at_rest(1, 2);

    // One more, and one less.
    let system: Record<Vdi> = pool.record(&Ref::new(disks[0].as_str())).expect("there");
    let fields = json!({
        "name_label": "more", "name_description": "", "SR": system.sr, "virtual_size": 8 * MIB, "type": "user",
        "sharable": false, "read_only": false, "other_config": {},
    });
    let more = pool.create_vdi(fields.as_object().expect("an object")).expect("made");
    let fields = json!({
        "VM": world.machine().as_str(), "VDI": more, "userdevice": "3", "bootable": false, "mode": "RW", "type": "Disk",
        "unpluggable": true, "empty": false, "other_config": {}, "qos_algorithm_type": "", "qos_algorithm_params": {},
    });
    pool.create_vbd(fields.as_object().expect("an object")).expect("made");
    let data: Record<Vdi> = pool.record(&Ref::new(disks[2].as_str())).expect("there");
    data.vbds.iter().for_each(|vbd| pool.destroy_vbd(vbd).expect("destroyed"));
    world.guest_writes(2, 3);
    held.push(world.held());
    assert_eq!(held[2].keys().collect::<Vec<_>>(), ["xvda", "xvdd"]);
    let changed = world.back_up(&["--no-nbd"]);
    assert!(!is_key(&changed, 0) && is_key(&changed, 1), "{changed:#}");
    world.is_at_rest(1, 2);
    world.compare(&held);
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
    let world = World::with_one_disk();
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
    world.lab.simulator.settings(|settings| settings.coalesce_interval = Some(Duration::from_millis(50)));
    held.push(world.held());
    world.back_up(&["--no-nbd"]);
    world.compare(&held);
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
fn what_a_killed_run_left_is_removed_by_the_next_with_or_without_its_journal() {
    for has_journal in [true, false] {
        let world = World::with_one_disk();
        let mut held = vec![world.held()];
        world.back_up(&["--no-nbd"]);
        world.guest_writes(1, 60);
        world.lab.simulator.fault(Fault::new(Site::Export, Act::Delay(PATIENCE)).after(MIB));
        let mut child =
            world.command(&["--no-nbd"]).stdin(Stdio::null()).stderr(Stdio::null()).spawn().expect("starts");
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
fn two_repositories_get_it_in_one_pass_and_the_base_goes_only_when_both_have_the_next() {
    let world = World::with_one_disk();
    let second = init(world.folder.path(), "second", &[]);
    let (main, second) = (world.repository.display().to_string(), second.display().to_string());
    let both = ["--no-nbd", "--to", &main, "--to", &second];
    let mut held = vec![world.held()];
    world.back_up(&both);
    world.guest_writes(1, 2);
    held.push(world.held());
    let next = world.back_up(&both);
    assert!(next["backup"]["reads"][0]["passes"][0]["base"].is_string() && read(&next, 0).0 <= 4 * BLOCK, "{next:#}");
    world.compare(&held);
    world.compare_in(second.as_ref(), &held);
    world.is_at_rest(1, 1);
}
