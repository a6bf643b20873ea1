//! Backups that were killed between the moment in which a repository or a replica had the new one and that in which the pool was told: the
//! next run is an increment that reads what changed and no more, and leaves one snapshot.
//!
//! `XOFS_SEED=17` has guests write something else.

mod pool;
mod support;

use std::collections::BTreeSet;
use std::fs;
use std::ops::RangeInclusive;
use std::path::Path;
use std::process::{Command, Stdio};

use pool::{BLOCK, MIB, PATIENCE, World, is_key, read, wait_for};
use serde_json::{Value, json};
use support::slow_path::SlowPath;
use support::{init, run};
use uuid::Uuid;
use xapi_simulator::failure::Failure;
use xapi_simulator::scene::{Disk, Machine, Repository as Sr, Storage};
use xapi_simulator::{Act, Class, Fault};

/// Sets whose a disk, or a snapshot of a machine, is: what comes after is that it is stored.
const ENTRIES: u64 = 6;
/// What changed block tracking tells of (bytes).
const PIECE: usize = 64 << 10;
/// Pieces that are compared at most though nothing says that they changed.
const SPOTS: u64 = 8;

fn world() -> World {
    let vm = Machine::new("web01").running().disk(Disk::new("system", 32 * MIB).filled(50));
    World::new(|scene| scene.sr(Sr::new("spare", Storage::Ext)).vm(vm))
}

/// Starts a command that is killed once `has_come` says so.
fn kill(command: &mut Command, what: &str, has_come: impl Fn() -> bool) {
    let mut child =
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn().expect("it starts");
    wait_for(what, has_come);
    child.kill().expect("it lives");
    assert_eq!(child.wait().expect("it ends").code(), None, "it did not end by itself");
}

/// Kills a backup at a call to the pool, by its method and how many like it came before.
fn kill_at(world: &World, arguments: &[&str], method: &str, after: u64) {
    let simulator = &world.lab.simulator;
    simulator.fault(Fault::call(method, Act::Delay(PATIENCE)).after(after));
    kill(&mut world.command(arguments), method, || simulator.faults_left() == 0);
    simulator.clear_faults();
}

/// The uuids of the snapshots of the disk, in the order in which they were taken.
fn snapshots(world: &World) -> Vec<String> {
    world.lab.simulator.look(|store| {
        let all = store.all(Class::Vdi).filter(|(_, vdi)| vdi.record["is_a_snapshot"].to_json() == true);
        let mut all: Vec<(u64, String)> =
            all.map(|(_, vdi)| (vdi.created, vdi.record["uuid"].as_text().expect("text").to_owned())).collect();
        all.sort();
        all.into_iter().map(|(_, uuid)| uuid).collect()
    })
}

/// Checks that the disk was read once, relative to this snapshot, and how much was: what the guest wrote in a few places.
fn is_read_since(said: &Value, base: &str) {
    let passes = said["backup"]["reads"][0]["passes"].as_array().expect("passes");
    assert_eq!((passes.len(), passes[0]["base"].as_str()), (1, Some(base)), "{said:#}");
    assert!(!is_key(said, 0), "{said:#}");
}

/// Bytes that the pool sent of all snapshots of disks since its log was cleared.
fn sent(world: &World) -> u64 {
    let of = |uuid: &String| world.lab.simulator.log().bytes(uuid.parse::<Uuid>().expect("a uuid"));
    snapshots(world).iter().map(of).sum()
}

/// Has the guest write 64 KiB at the beginning of some blocks, other bytes than were there.
fn write(world: &World, round: u8, blocks: &[u64]) {
    let disk = world.lab.disks(&world.machine())["xvda"].clone();
    for block in blocks {
        let written = world.lab.simulator.write(&disk, |content| content.write(block * BLOCK, &[round; PIECE]));
        written.expect("it is there").expect("in range");
    }
}

/// Bytes that are read of so many blocks with a piece that changed, and at most sent.
fn expected(is_tracked: bool, blocks: u64) -> RangeInclusive<u64> {
    let piece = PIECE as u64;
    // Some of what did not change is compared.
    if is_tracked { blocks * piece..=blocks * piece + SPOTS * piece } else { blocks * BLOCK..=blocks * BLOCK }
}

#[test]
fn a_backup_that_was_published_everywhere_is_the_base_whoever_killed_its_run() {
    for (method, after, is_tracked, left) in [
        ("VDI.add_to_other_config", ENTRIES, false, (2, 2)),
        ("VM.add_to_other_config", ENTRIES, false, (2, 2)),
        // The snapshot of the machine is gone, that of the disk has no data any more.
        ("VDI.add_to_other_config", ENTRIES, true, (1, 2)),
    ] {
        let world = world();
        let arguments: &[&str] = if is_tracked { &["--cbt", "--purge-snapshot-data"] } else { &["--no-nbd"] };
        let mut held = vec![world.held()];
        world.back_up(arguments);
        let base = snapshots(&world);
        write(&world, 1, &[3, 7]);
        held.push(world.held());
        kill_at(&world, arguments, method, after);
        world.compare(&held);
        assert_eq!((world.lab.snapshots(Class::Vm), world.lab.snapshots(Class::Vdi)), left, "{method}");
        let both = snapshots(&world);
        assert_eq!((both.len(), &both[0]), (2, &base[0]));

        write(&world, 2, &[7, 9, 11]);
        held.push(world.held());
        // One who only looks says so, and changes nothing.
        let plan = world.back_up(&[arguments, &["--explain", "--wait", "60"]].concat())["plan"].take();
        assert_eq!(plan["disks"][0]["kind"], "increment", "{plan:#}");
        assert_eq!(snapshots(&world), both);
        world.lab.simulator.log().clear();
        let next = world.back_up(&[arguments, &["--wait", "60"]].concat());
        let sent = sent(&world);
        is_read_since(&next, &both[1]);
        let expected = expected(is_tracked, 3);
        assert!(expected.contains(&read(&next, 0).0) && expected.contains(&sent), "{sent} bytes were sent: {next:#}");
        world.is_at_rest(usize::from(!is_tracked), 1);
        world.compare(&held);
    }
}

#[test]
fn the_base_goes_only_if_the_run_that_adopts_the_next_one_can_ask_each_destination() {
    let world = world();
    let second = init(world.folder.path(), "second", &[]);
    let (main, other) = (world.repository.display().to_string(), second.display().to_string());
    let both = ["--no-nbd", "--wait", "60", "--to", &main, "--to", &other];
    let mut held = vec![world.held()];
    world.back_up(&both);
    world.guest_writes(1, 2);
    held.push(world.held());
    kill_at(&world, &both, "VDI.add_to_other_config", ENTRIES);
    let left = snapshots(&world);
    assert_eq!(left.len(), 2);
    // One does not answer: nobody knows what it has, so both stay, and what is made now is not kept.
    let slow = SlowPath::mount(&second);
    slow.fail("EIO", "xo-vm-backups/*");
    let through = slow.path().display().to_string();
    world.guest_writes(2, 2);
    held.push(world.held());
    let (code, out, err) = run(&mut world.command(&["--no-nbd", "--wait", "60", "--to", &main, "--to", &through]));
    assert_eq!(code, 3, "{out}\n{err}");
    assert_eq!(snapshots(&world), left);
    drop(slow);
    world.compare(&held);
    world.compare_in(&second, &held[..2]);
    world.guest_writes(3, 2);
    held.push(world.held());
    world.back_up(&both);
    world.is_at_rest(1, 1);
    world.compare(&held);
    world.compare_in(&second, &[&held[..2], &held[3..]].concat());
}

#[test]
fn where_one_of_two_repositories_has_it_both_get_what_changed_since_the_base() {
    for is_tracked in [false, true] {
        let world = world();
        let second = init(world.folder.path(), "second", &[]);
        let way = if is_tracked { "--cbt" } else { "--no-nbd" };
        let main = world.repository.display().to_string();
        let to = |second: &Path| {
            [way, "--wait", "60", "--to", &main, "--to", &second.display().to_string()].map(str::to_owned)
        };
        let back_up = |second: &Path| world.back_up(&to(second).each_ref().map(String::as_str));
        let mut held = vec![world.held()];
        back_up(&second);
        let base = snapshots(&world);
        write(&world, 1, &[3, 7]);
        held.push(world.held());
        let mut slow = SlowPath::mount(&second);
        slow.stall("*.json ops=create,rename,link");
        let published = || backups(&world.repository) == 2 && slow.stalled() > 0;
        kill(&mut world.command(&to(slow.path()).each_ref().map(String::as_str)), "the first to have it", published);
        // What waits fails.
        slow.kill();
        drop(slow);
        world.compare(&held);
        world.compare_in(&second, &held[..1]);
        let left = snapshots(&world);
        assert_eq!((left.len(), &left[0]), (2, &base[0]));

        write(&world, 2, &[7, 9, 11]);
        held.push(world.held());
        world.lab.simulator.log().clear();
        let next = back_up(&second);
        let sent = sent(&world);
        is_read_since(&next, &base[0]);
        let expected = expected(is_tracked, 4);
        assert!(expected.contains(&read(&next, 0).0) && expected.contains(&sent), "{sent} bytes were sent: {next:#}");
        // Each stores what differs from its own newest backup.
        for (repository, blocks) in [(0, 3), (1, 4)] {
            let stored = &next["backup"]["repositories"][repository]["disks"][0];
            assert_eq!((&stored["isKey"], &stored["blocks"]), (&json!(false), &json!(blocks)), "{next:#}");
        }
        world.is_at_rest(1, 1);
        world.compare(&held);
        world.compare_in(&second, &[&held[..1], &held[2..]].concat());

        // From here on both have the same base again.
        world.guest_writes(3, 1);
        held.push(world.held());
        let kept = snapshots(&world);
        is_read_since(&back_up(&second), &kept[0]);
        world.is_at_rest(1, 1);
        world.compare(&held);
        world.compare_in(&second, &[&held[..1], &held[2..]].concat());
    }
}

#[test]
fn a_replica_that_was_published_is_the_base_of_the_next_one() {
    let world = world();
    let arguments = ["--no-nbd", "--to-sr", "spare", "--keep-replicas", "1", "--wait", "60"];
    let command = || {
        let mut command = world.lab.command("backup", &arguments);
        command.args(["--vm", "web01"]);
        command
    };
    let back_up = || {
        let (code, out, err) = run(command().arg("--json"));
        assert_eq!(code, 0, "{out}\n{err}");
        let mut said: Value = serde_json::from_str(&out).expect("JSON");
        said["vms"][0].take()
    };
    back_up();
    let of_source = || {
        let disk = world.lab.disks(&world.machine())["xvda"].clone();
        let uuid = |vdi: &Value| world.lab.field(Class::Vdi, &vdi.as_str().expect("a reference").into(), "uuid");
        let all = world.lab.field(Class::Vdi, &disk, "snapshots");
        let mut all: Vec<Value> = all.as_array().expect("a list").iter().map(uuid).collect();
        all.sort_by_key(|uuid| uuid.to_string());
        all
    };
    let base = of_source();
    world.guest_writes(1, 2);
    // The snapshot gets its name, then the new state of the replica, which is its last step but one, then its machine.
    let simulator = &world.lab.simulator;
    simulator.fault(Fault::call("VM.set_name_label", Act::Delay(PATIENCE)).after(2));
    kill(&mut command(), "the replica", || simulator.faults_left() == 0);
    simulator.clear_faults();
    assert_eq!(replica_numbers(&world), ["1", "2"]);
    let left = of_source();
    assert_eq!(left.len(), 2);
    let new = left.iter().find(|uuid| **uuid != base[0]).expect("one is new");

    world.guest_writes(2, 2);
    let held = world.held();
    let next = back_up();
    let passes = next["backup"]["reads"][0]["passes"].as_array().expect("passes");
    assert_eq!((passes.len(), &passes[0]["base"]), (1, new), "{next:#}");
    assert_eq!(of_source().len(), 1);
    let replica = world.lab.simulator.look(|store| {
        let is_replica = |vm: &xapi_simulator::store::Object| {
            vm.record["name_label"].as_text().is_some_and(|name| name.starts_with("web01 - xofs"))
                && vm.record["is_a_snapshot"].to_json() == false
        };
        store.all(Class::Vm).find(|(_, vm)| is_replica(vm)).expect("there").0.clone()
    });
    assert!(world.lab.held(&replica) == held, "the replica holds what the machine held");
    world.lab.is_let_go();
}

#[test]
fn what_nobody_has_is_destroyed_though_it_was_about_to_be_published() {
    let world = world();
    let mut held = vec![world.held()];
    world.back_up(&["--no-nbd"]);
    let base = snapshots(&world);
    world.guest_writes(1, 2);
    let mut slow = SlowPath::mount(&world.repository);
    slow.stall("*.json ops=create,rename,link");
    let through = slow.path().display().to_string();
    kill(&mut world.command(&["--no-nbd", "--to", &through]), "the publishing", || slow.stalled() > 0);
    slow.kill();
    drop(slow);
    world.compare(&held);
    assert_eq!(snapshots(&world).len(), 2);
    // Where it cannot be destroyed nothing is made, and the base is kept.
    world.lab.simulator.fault(Fault::call("VM.destroy", Act::Fail(Failure::internal("no"))).times(9));
    world.fails(&["--no-nbd", "--wait", "60"], 1);
    world.lab.simulator.clear_faults();
    assert_eq!(snapshots(&world)[0], base[0]);
    held.push(world.held());
    is_read_since(&world.back_up(&["--no-nbd", "--wait", "60"]), &base[0]);
    world.is_at_rest(1, 1);
    world.compare(&held);
}

/// How many backups a repository has.
fn backups(repository: &Path) -> usize {
    let vms = fs::read_dir(repository.join("xo-vm-backups")).into_iter().flatten().flatten();
    let files = vms.flat_map(|vm| fs::read_dir(vm.path())).flatten().flatten();
    files.filter(|file| file.path().extension().is_some_and(|extension| extension == "json")).count()
}

/// The numbers of the whole states of replicas.
fn replica_numbers(world: &World) -> Vec<String> {
    world.lab.simulator.look(|store| {
        let entries = store.all(Class::Vm).map(|(_, vm)| vm.record["other_config"].to_json());
        let whole = entries.filter(|entries| entries.get("xofs:replicating").is_none());
        let number = |entries: Value| Some(entries.get("xofs:replica-number")?.as_str()?.to_owned());
        whole.filter_map(number).collect::<BTreeSet<String>>().into_iter().collect()
    })
}
