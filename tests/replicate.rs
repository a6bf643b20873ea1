//! Replicas of a simulated pool's machines by the built binary: every state of every replica is what the machine held at its
//! snapshot, nothing more is sent than changed, and whatever ends a run leaves the states before as they were.
//!
//! `XOFS_SEED=17` has guests write something else.

mod pool;
mod replica;
mod support;

use std::fs;
use std::process::Stdio;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use pool::{BLOCK, Lab, MIB, PATIENCE, wait_for};
use replica::{World, compare, compare_repository, held_by, mac_of, machines, read, sent, states, switch_off};
use serde_json::{Value, json};
use support::run;
use support::slow_path::SlowPath;
use uuid::Uuid;
use xapi::Record;
use xapi::record::{TaskObject, Vdi, Vm};
use xapi_simulator::failure::Failure;
use xapi_simulator::scene::{Disk, Machine};
use xapi_simulator::value::Reference;
use xapi_simulator::{Act, Class, Fault, Scene, Site, Upset};

#[test]
fn a_replica_has_a_state_for_each_run_and_cannot_be_started() {
    let world = World::with_one_disk();
    let mut held = vec![world.held()];
    let first = world.replicates(&["--to-sr", "spare", "--no-nbd", "--keep-replicas", "3"]);
    assert!(sent(&first, 0, 0).1, "{first:#}");
    world.is_at_rest(1);
    for round in 1..5 {
        world.guest_writes(round, 2);
        held.push(world.held());
        let next = world.replicates(&["--to-sr", "spare", "--no-nbd", "--keep-replicas", "3"]);
        // Two writes of at most 256 KiB touch at most four blocks.
        assert!(!sent(&next, 0, 0).1 && sent(&next, 0, 0).0 <= 4 * BLOCK && read(&next, 0) <= 4 * BLOCK, "{next:#}");
        world.is_at_rest(1);
    }
    compare(&world.lab, &held[2..]);
    let replicas = machines(&world.lab);
    assert_eq!(replicas.len(), 1);
    let replica = &replicas[0];
    assert!(replica.name_label.starts_with("web01 - xofs - (") && replica.tags.contains(&"xofs replica".to_owned()));
    let refused = world.lab.client().start_vm(&replica.reference, false).expect_err("it is blocked");
    assert_eq!(refused.code(), "OPERATION_BLOCKED");
    // What it holds now is its newest state, and its interfaces take nobody's traffic.
    assert_eq!(held_by(&world.lab, replica), held[4]);
    assert_ne!(mac_of(&world.lab, replica), mac_of(&world.lab, &world.record()));
}

#[test]
fn repositories_and_srs_of_two_pools_get_the_same_of_one_snapshot_each_block_once() {
    let world = World::with_one_disk();
    let repository = world.repository("main");
    let to = [
        "--to",
        repository.to_str().expect("text"),
        "--to-sr",
        "spare",
        "--to-sr",
        "dr=far",
        "--no-nbd",
        "--compression",
        "none",
    ];
    let mut held = vec![world.held()];
    world.replicates(&to);
    for round in 1..3 {
        world.guest_writes(round, 3);
        held.push(world.held());
        world.lab.simulator.log().clear();
        let next = world.replicates(&to);
        assert!((0..3).all(|destination| !sent(&next, destination, 0).1), "{next:#}");
        let snapshot: Record<Vdi> = world.lab.client().record(&world.disks()[0].snapshots[0]).expect("there");
        let uuid: Uuid = snapshot.uuid.parse().expect("a uuid");
        let counts = world.lab.simulator.log().blocks(uuid);
        assert!(!counts.is_empty() && counts.values().all(|count| *count == 1), "{counts:?}");
        world.is_at_rest(1);
    }
    compare(&world.lab, &held);
    compare(&world.far, &held);
    compare_repository(&repository, &held);
    // Where nothing has it, the MAC is that of the machine.
    assert_eq!(mac_of(&world.far, &machines(&world.far)[0]), mac_of(&world.lab, &world.record()));
}

#[test]
fn disks_may_grow_come_and_go() {
    let disk = |name: &str| Disk::new(name, 16 * MIB).filled(50);
    let world = World::new(Machine::new("web01").running().disk(disk("system")).disk(disk("data")));
    let (pool, to) = (world.lab.client(), ["--to-sr", "spare", "--no-nbd"]);
    let mut held = vec![world.held()];
    world.replicates(&to);
    let disks = world.disks();
    switch_off(&pool, &world.record().reference);
    pool.resize_vdi(&disks[1].reference, 24 * MIB).expect("resized");
    world.guest_writes(1, 3);
    held.push(world.held());
    let grown = world.replicates(&to);
    assert!(!sent(&grown, 0, 0).1 && !sent(&grown, 0, 1).1, "{grown:#}");
    world.is_at_rest(1);

    let fields = json!({
        "name_label": "more", "name_description": "", "SR": disks[0].sr, "virtual_size": 8 * MIB, "type": "user",
        "sharable": false, "read_only": false, "other_config": {},
    });
    let more = pool.create_vdi(fields.as_object().expect("an object")).expect("made");
    let fields = json!({
        "VM": world.machine().as_str(), "VDI": more, "userdevice": "4", "bootable": false, "mode": "RW", "type": "Disk",
        "unpluggable": true, "empty": false, "other_config": {}, "qos_algorithm_type": "", "qos_algorithm_params": {},
    });
    pool.create_vbd(fields.as_object().expect("an object")).expect("made");
    // The disk itself goes, too.
    disks[1].vbds.iter().for_each(|vbd| pool.destroy_vbd(vbd).expect("destroyed"));
    pool.destroy_vdi(&disks[1].reference).expect("destroyed");
    world.guest_writes(2, 3);
    held.push(world.held());
    assert_eq!(held[2].keys().collect::<Vec<_>>(), ["xvda", "xvde"]);
    let changed = world.replicates(&to);
    assert!(!sent(&changed, 0, 0).1 && sent(&changed, 0, 1).1, "{changed:#}");
    world.guest_writes(3, 3);
    held.push(world.held());
    let next = world.replicates(&to);
    assert!(!sent(&next, 0, 0).1 && !sent(&next, 0, 1).1, "{next:#}");
    compare(&world.lab, &held[1..]);
    world.is_at_rest(1);
}

#[test]
fn a_replica_that_somebody_used_is_left_to_him_and_the_next_is_an_increment_nevertheless() {
    let world = World::with_one_disk();
    let (pool, to) = (world.lab.client(), ["--to-sr", "spare", "--no-nbd", "--keep-replicas", "2"]);
    let mut held = vec![world.held()];
    world.replicates(&to);
    let used = machines(&world.lab)[0].clone();
    for operation in used.blocked_operations.keys() {
        pool.remove_entry(&used.reference, "blocked_operations", operation).expect("removed");
    }
    pool.start_vm(&used.reference, false).expect("starts");
    world.lab.simulator.guest_writes(&Reference::from(used.reference.as_str()), world.seed ^ 77, 3).expect("written");
    switch_off(&pool, &used.reference);
    for (operation, reason) in &used.blocked_operations {
        pool.set_entry(&used.reference, "blocked_operations", operation, reason).expect("set");
    }
    let his = held_by(&world.lab, &used);
    assert_ne!(his, held[0]);
    for round in 1..4 {
        world.guest_writes(round, 2);
        held.push(world.held());
        let (next, said) = world.ends(&to, 0);
        assert_eq!(said.contains("was written to"), round == 1, "{said}");
        assert!(!sent(&next, 0, 0).1, "{next:#}");
        world.is_at_rest(1);
        assert!(held_by(&world.lab, &used) == his, "what he made of it stays");
    }
    // His, and the one that was made then.
    assert_eq!(machines(&world.lab).len(), 2);
    compare(&world.lab, &held[2..]);
}

#[test]
fn a_run_that_is_killed_midway_leaves_what_was_there_and_the_next_is_an_increment() {
    let world = World::with_one_disk();
    let to = ["--to-sr", "spare", "--no-nbd"];
    let mut held = vec![world.held()];
    world.replicates(&to);
    // While it sends; while the disks of the replica are changed; while its snapshot is taken, and just after that.
    let faults = [
        Fault::new(Site::Import, Act::Delay(Duration::from_secs(3600))).after(BLOCK),
        Fault::call("VBD.create", Act::Delay(Duration::from_secs(3600))),
        Fault::call("VM.snapshot", Act::Delay(Duration::from_secs(3600))).after(1),
        Fault::call("VM.set_name_label", Act::Delay(Duration::from_secs(3600))).after(1),
        Fault::call("VDI.destroy", Act::Delay(Duration::from_secs(3600))),
    ];
    for (round, fault) in (1..).zip(faults) {
        world.guest_writes(round, 3);
        let now = world.held();
        world.lab.simulator.fault(fault.clone());
        let mut killed = world.command(&to).stdout(Stdio::null()).stderr(Stdio::null()).spawn().expect("starts");
        let begun = Instant::now();
        while world.lab.simulator.faults_left() > 0 {
            assert!(begun.elapsed() < PATIENCE && killed.try_wait().expect("ours").is_none(), "{fault:?} never struck");
            std::thread::sleep(Duration::from_millis(20));
        }
        std::thread::sleep(Duration::from_millis(200));
        killed.kill().expect("it is ours");
        killed.wait().expect("it is ours");
        world.lab.simulator.clear_faults();
        // Only after the last call is its state there.
        let is_there = states(&world.lab).len() > held.len();
        if is_there {
            held.push(now.clone());
        }
        compare(&world.lab, &held);
        world.guest_writes(100 + round, 1);
        held.push(world.held());
        let next = world.replicates(&[&to[..], &["--keep-replicas", "100"]].concat());
        assert!(!sent(&next, 0, 0).1, "{fault:?}: {next:#}");
        compare(&world.lab, &held);
        assert_eq!(machines(&world.lab).len(), 1, "{fault:?}");
        world.is_at_rest(1);
    }
}

#[test]
fn without_the_snapshot_of_before_all_of_the_disk_is_sent() {
    let world = World::with_one_disk();
    let to = ["--to-sr", "spare", "--no-nbd"];
    let mut held = vec![world.held()];
    world.replicates(&to);
    world.lab.simulator.happen(&Upset::DropSnapshots);
    // Those of the replica went, too.
    world.guest_writes(1, 2);
    held.push(world.held());
    let next = world.replicates(&to);
    assert!(sent(&next, 0, 0).1, "{next:#}");
    compare(&world.lab, &held[1..]);

    let (pool, vm, live) = (world.lab.client(), world.record(), world.disks().remove(0));
    vm.snapshots.iter().for_each(|snapshot| pool.destroy_vm(snapshot).expect("destroyed"));
    live.snapshots.iter().for_each(|snapshot| pool.destroy_vdi(snapshot).expect("destroyed"));
    world.guest_writes(2, 2);
    held.push(world.held());
    let next = world.replicates(&to);
    assert!(sent(&next, 0, 0).1, "{next:#}");
    compare(&world.lab, &held[1..]);
    world.is_at_rest(1);
}

#[test]
fn what_fails_is_undone_and_of_several_only_that() {
    let world = World::with_one_disk();
    let to = ["--to-sr", "spare", "--no-nbd"];
    let mut held = vec![world.held()];
    world.replicates(&to);
    let no = || Act::Fail(Failure::internal("no"));
    let faults = [
        Fault::new(Site::Import, no()).after(BLOCK),
        Fault::new(Site::Import, Act::Cut).after(BLOCK),
        // Done, and nobody is told.
        Fault::call("VDI.clone", Act::Cut),
        Fault::call("VM.snapshot", Act::Cut).after(1),
        Fault::call("VBD.create", no()),
        Fault::call("VM.snapshot", Act::Fail(Failure::no_space())).after(1),
    ];
    for (round, fault) in (1..).zip(faults) {
        world.guest_writes(round, 3);
        world.lab.simulator.fault(fault.clone());
        let (_, said) = world.ends(&to, 1);
        assert_eq!(world.lab.simulator.faults_left(), 0, "{fault:?}: {said}");
        world.is_at_rest(1);
        compare(&world.lab, &held);
        assert!(
            held_by(&world.lab, &machines(&world.lab)[0]) == held[0],
            "{fault:?}: the machine has its disks of before"
        );
    }
    held.push(world.held());
    let next = world.replicates(&to);
    assert!(!sent(&next, 0, 0).1, "{next:#}");
    compare(&world.lab, &held);

    // The repository gets it, whatever becomes of the replica.
    let repository = world.repository("main");
    let to = [&to[..], &["--to", repository.to_str().expect("text"), "--compression", "none"]].concat();
    world.lab.simulator.fault(Fault::new(Site::Import, no()).after(BLOCK));
    let now = world.held();
    let (said, err) = world.ends(&to, 3);
    assert!(said["backup"]["repositories"][1]["error"].is_string() && err.contains("spare"), "{said:#}\n{err}");
    compare_repository(&repository, std::slice::from_ref(&now));
    compare(&world.lab, &held);
    world.is_at_rest(1);
}

#[test]
fn a_repository_that_failed_costs_the_replica_no_whole_disk() {
    let world = World::with_one_disk();
    let repository = world.repository("main");
    let to = ["--to", repository.to_str().expect("text"), "--to-sr", "spare", "--no-nbd", "--compression", "none"];
    let mut held = vec![world.held()];
    world.replicates(&to);
    world.guest_writes(1, 2);
    held.push(world.held());
    // Another program has the VM: the repository gives up, the replica goes on.
    let lock = repository.join("xo-vm-backups").join(format!("{}.lock", world.record().uuid));
    let beats = AtomicBool::new(true);
    std::thread::scope(|scope| {
        fs::create_dir(&lock).expect("nobody has it");
        scope.spawn(|| {
            while beats.load(Ordering::Acquire) {
                let _there = fs::File::open(&lock).and_then(|lock| lock.set_modified(std::time::SystemTime::now()));
                std::thread::sleep(Duration::from_millis(200));
            }
        });
        world.ends(&[&to[..], &["--wait", "1"]].concat(), 3);
        beats.store(false, Ordering::Release);
    });
    fs::remove_dir(&lock).expect("it is ours");
    compare(&world.lab, &held);
    // Both have the state before that, of which the snapshot was kept.
    world.guest_writes(2, 2);
    held.push(world.held());
    let next = world.replicates(&to);
    assert!(!sent(&next, 0, 0).1 && !sent(&next, 1, 0).1, "{next:#}");
    assert!(read(&next, 0) <= 8 * BLOCK, "{next:#}");
    compare(&world.lab, &held);
    world.is_at_rest(1);
}

#[test]
fn an_sr_that_is_full_is_said_and_nothing_of_it_is_left() {
    let world = World::with_one_disk();
    let held = [world.held()];
    world.replicates(&["--to-sr", "spare", "--no-nbd"]);
    world.guest_writes(1, 4);
    world.lab.simulator.fault(Fault::new(Site::Import, Act::Fail(Failure::no_space())).after(BLOCK));
    let (_, said) = world.ends(&["--to-sr", "spare", "--no-nbd"], 1);
    assert!(said.contains("space"), "{said}");
    world.is_at_rest(1);
    compare(&world.lab, &held);
}

#[test]
fn a_full_backup_becomes_a_machine_for_each_run() {
    let world = World::with_one_disk();
    let to = ["--to-sr", "dr=far", "--mode", "full", "--keep-replicas", "2"];
    let mut held = Vec::new();
    for round in 1..4 {
        world.guest_writes(round, 2);
        held.push(world.held());
        world.replicates(&to);
        world.is_at_rest(0);
    }
    compare(&world.far, &held[1..]);
    let pool = world.far.client();
    let oldest = states(&world.far)[0].clone();
    assert!(oldest.name_label.starts_with("web01 - xofs - (") && oldest.tags.contains(&"xofs replica".to_owned()));
    assert_eq!(pool.start_vm(&oldest.reference, false).expect_err("blocked").code(), "OPERATION_BLOCKED");
    // One that somebody uses is no longer ours to remove.
    for operation in oldest.blocked_operations.keys() {
        pool.remove_entry(&oldest.reference, "blocked_operations", operation).expect("removed");
    }
    held.push(world.held());
    let (_, said) = world.ends(&to, 0);
    assert!(said.contains("stays"), "{said}");
    compare(&world.far, &held[1..]);
    // Broken off, nothing of it is left.
    world.lab.simulator.fault(Fault::new(Site::ExportVm, Act::Cut).after(MIB));
    world.ends(&to, 1);
    world.is_at_rest(0);
    compare(&world.far, &held[1..]);
}

#[test]
fn a_whole_machine_stays_though_the_task_that_made_it_was_left_over() {
    let world = World::with_one_disk();
    let to = ["--to-sr", "dr=far", "--mode", "full", "--keep-replicas", "3"];
    let mut held = vec![world.held()];
    world.far.simulator.fault(Fault::call("task.destroy", Act::Fail(Failure::internal("not now"))).times(1000));
    world.replicates(&to);
    world.far.simulator.clear_faults();
    let tasks = || world.far.client().records::<TaskObject>().expect("answered").len();
    assert_eq!(tasks(), 1);
    world.guest_writes(1, 2);
    held.push(world.held());
    world.replicates(&to);
    assert_eq!(tasks(), 0);
    compare(&world.far, &held);
    world.is_at_rest(0);
}

/// Has a run stall at `fault` in the other pool, does something meanwhile, and kills it.
fn kill_at(world: &World, to: &[&str], fault: Fault, meanwhile: impl FnOnce()) {
    world.far.simulator.fault(fault);
    let mut killed = world.command(to).stdout(Stdio::null()).stderr(Stdio::null()).spawn().expect("starts");
    wait_for("the moment", || world.far.simulator.faults_left() == 0);
    meanwhile();
    killed.kill().expect("it is ours");
    killed.wait().expect("it is ours");
}

#[test]
fn a_copy_that_somebody_made_of_a_machine_that_was_not_whole_is_his() {
    let world = World::with_one_disk();
    let to = ["--to-sr", "dr=far", "--mode", "full"];
    let (held, pool) = (world.held(), world.far.client());
    let all = || pool.records::<Vm>().expect("answered").into_iter().filter(|vm| !vm.is_control_domain);
    // What the pool made of the XVA is marked, and more is about to be told of it.
    kill_at(&world, &to, Fault::call("VM.add_tags", Act::Delay(Duration::from_secs(3600))), || {
        let made = all().next().expect("one is there");
        pool.run("VM.copy", &[json!(made.reference), json!("his"), json!("")]).expect("copied");
    });
    assert_eq!((all().count(), states(&world.far).len()), (2, 0));
    world.replicates(&to);
    let his = all().find(|vm| vm.name_label == "his").expect("it is there");
    assert!(held_by(&world.far, &his) == held, "it has its disk, with what it held");
    // The other is gone, and there is one that is whole.
    assert_eq!(all().count(), 2);
    compare(&world.far, &[held]);
    let disks = pool.records::<Vdi>().expect("answered").into_iter().filter(|vdi| vdi.managed);
    assert_eq!(disks.count(), 2, "his, and that of the replica");
}

#[test]
fn an_explanation_says_what_becomes_of_each_replica_and_makes_nothing() {
    let world = World::with_one_disk();
    let repository = world.repository("main");
    let to = ["--to", repository.to_str().expect("text"), "--to-sr", "spare", "--to-sr", "dr=far"];
    world.replicates(&to[..4]);
    let count = |lab: &Lab| lab.simulator.look(|store| (store.count(Class::Vm), store.count(Class::Vdi)));
    let before = (count(&world.lab), count(&world.far));
    let plan = world.replicates(&[&to[..], &["--explain"]].concat())["plan"].take();
    let [spare, far] = [&plan["replicas"][0], &plan["replicas"][1]];
    assert_eq!((&spare["name"], &far["name"]), (&json!("spare"), &json!("dr=far")));
    assert!(spare["vm"]["name"].as_str().is_some_and(|name| name.starts_with("web01 - xofs")), "{plan:#}");
    assert!(spare["disks"][0]["since"].is_string() && spare["takes"] == json!(0), "{plan:#}");
    assert!(far["vm"].is_null() && far["disks"][0]["whyWhole"].is_string(), "{plan:#}");
    assert!(far["takes"].as_u64().is_some_and(|bytes| bytes >= 32 * MIB) && far["free"].as_u64() > Some(32 * MIB));
    assert_eq!((count(&world.lab), count(&world.far)), before);
    let (code, out, err) = run(&mut world.command(&[&to[..], &["--explain"]].concat()));
    assert!(code == 0 && out.contains("dr=far:\n  onto a new VM: there is none yet\n"), "{out}\n{err}");
}

#[test]
fn a_pool_that_does_not_answer_keeps_nobody_else_from_the_backup() {
    let mut world = World::with_one_disk();
    let repository = world.repository("main");
    let to = ["--to", repository.to_str().expect("text"), "--to-sr", "dr=far", "--compression", "none"];
    let mut held = vec![world.held()];
    world.replicates(&to);
    world.guest_writes(1, 2);
    held.push(world.held());
    // The pool of the configuration is gone.
    world.far = Lab::new(world.folder.path(), "another", Scene::new(1));
    let (said, err) = world.ends(&to, 3);
    assert!(said["backup"]["repositories"][1]["error"].is_string() && err.contains("dr=far"), "{said:#}\n{err}");
    compare_repository(&repository, &held);
    world.ends(&["--to-sr", "dr=far"], 1);
    world.is_at_rest(1);
}

#[test]
fn storages_that_are_not_there_or_named_twice_are_refused() {
    let world = World::with_one_disk();
    let uuid = world.lab.simulator.look(|store| {
        let sr = store.all(Class::Sr).find(|(_, sr)| sr.record["name_label"].as_text() == Some("spare"));
        sr.expect("there").1.record["uuid"].as_text().expect("text").to_owned()
    });
    for (arguments, part) in [
        (vec!["--to-sr", "nowhere"], "no SR 'nowhere'"),
        (vec!["--to-sr", "dr=spare"], "no SR 'spare'"),
        (vec!["--to-sr", "spare", "--to-sr", &uuid], "named twice"),
    ] {
        let (_, said) = world.ends(&arguments, 2);
        assert!(said.contains(part), "{said}");
    }
    world.is_at_rest(0);
}

/// The most memory that a process had (bytes), while it lives.
fn peak_memory(process: u32) -> Option<u64> {
    let status = fs::read_to_string(format!("/proc/{process}/status")).ok()?;
    let line = status.lines().find(|line| line.starts_with("VmHWM:"))?;
    Some(line.split_whitespace().nth(1)?.parse::<u64>().ok()? << 10)
}

#[test]
fn of_two_repositories_and_an_sr_a_slow_one_and_a_failing_one_keep_nobody_from_being_right_in_bounded_memory() {
    let size = 512 * MIB;
    let world = World::new(Machine::new("web01").running().disk(Disk::new("system", size).filled(60)));
    let (slow, failing) = (world.repository("slow"), world.repository("failing"));
    let (slow_path, failing_path) = (SlowPath::mount(&slow), SlowPath::mount(&failing));
    slow_path.delay(Duration::from_millis(10), "xo-vm-backups/* ops=write,create");
    let held = vec![world.held()];
    let to = |path: &SlowPath| path.path().to_str().expect("text").to_owned();
    let arguments = [
        "--to",
        &to(&slow_path),
        "--to",
        &to(&failing_path),
        "--to-sr",
        "spare",
        "--no-nbd",
        "--compression",
        "none",
        "--json",
    ];
    let mut command = world.command(&arguments);
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("starts");
    let (mut peak, process) = (0, child.id());
    let (mut snapshot, mut has_failed) = (Uuid::nil(), false);
    while child.try_wait().expect("ours").is_none() {
        peak = peak.max(peak_memory(process).unwrap_or(0));
        if let Some(taken) = world.disks()[0].snapshots.first()
            && let Ok(taken) = world.lab.client().record::<Vdi>(taken)
        {
            snapshot = taken.uuid.parse().expect("a uuid");
        }
        if !has_failed && world.lab.simulator.log().blocks(snapshot).len() > 30 {
            failing_path.fail("EIO", "xo-vm-backups/* ops=write,create");
            has_failed = true;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    let output = child.wait_with_output().expect("ours");
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(3), "{said}");
    let mut said: Value = serde_json::from_slice(&output.stdout).expect("JSON");
    let said = said["vms"][0].take();
    let errors: Vec<bool> = (0..3).map(|number| said["backup"]["repositories"][number]["error"].is_string()).collect();
    assert_eq!(errors, [false, true, false], "{said:#}");
    // The snapshot of web01 and that of its replica; web01's is gone again, since one has not stored it.
    assert_eq!(
        world.lab.simulator.log().count("Async.VM.snapshot") + world.lab.simulator.log().count("VM.snapshot"),
        2
    );
    let blocks = world.lab.simulator.log().blocks(snapshot);
    assert!(blocks.values().all(|count| *count == 1), "each block once");
    assert!(blocks.len() as u64 * BLOCK > 200 * MIB, "{}", blocks.len());
    println!("peak memory: {} MiB", peak / MIB);
    assert!(peak > 0 && peak < 256 * MIB, "{} MiB, of a disk with {} MiB", peak / MIB, blocks.len() as u64 * 2);
    drop((slow_path, failing_path));
    compare(&world.lab, &held);
    compare_repository(&slow, &held);
    world.is_at_rest(0);
}
