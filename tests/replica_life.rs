//! What happens to a machine, to its replica and to this one between two runs: settings that change, a user who takes the replica for
//! something, an SR that has too little room, a folder of the state that is lost.
//!
//! `XOFS_SEED=17` has guests write something else.

mod pool;
mod replica;
mod support;

use std::collections::BTreeSet;
use std::fs;

use pool::{BLOCK, MIB, wait_for};
use replica::{World, compare, held_by, machines, sent, states, switch_off};
use serde_json::{Value, json};
use support::run;
use xapi::record::{Vdi, Vif, Vm};
use xapi::{Record, Ref};
use xapi_simulator::Class;
use xapi_simulator::scene::{Disk, Machine, Repository as Sr, Storage};
use xapi_simulator::value::Reference;

/// What changed block tracking tells of (bytes).
const PIECE: u64 = 64 << 10;
const TO: [&str; 3] = ["--to-sr", "spare", "--no-nbd"];

/// Has the guest write pieces of 64 KiB, by their numbers.
fn write(world: &World, byte: u8, pieces: &[u64]) {
    let disk = Reference::from(world.disks()[0].reference.as_str());
    let bytes = vec![byte; usize::try_from(PIECE).expect("small")];
    for piece in pieces {
        let written = world.lab.simulator.write(&disk, |content| content.write(piece * PIECE, &bytes));
        written.expect("it is there").expect("in range");
    }
}

/// The last pass over the first disk: what was read of it, and how.
fn pass(said: &Value) -> (u64, String) {
    let passes = said["backup"]["reads"][0]["passes"].as_array().expect("it was read");
    assert_eq!(passes.len(), 1, "{said:#}");
    (passes[0]["bytes"].as_u64().expect("a number"), passes[0]["way"].as_str().expect("words").to_owned())
}

#[test]
fn an_sr_alone_gets_by_changed_block_tracking_what_was_written_and_no_more() {
    let world = World::with_one_disk();
    let to = ["--to-sr", "spare", "--cbt"];
    let mut held = vec![world.held()];
    world.replicates(&to);
    // Blocks of 2 MiB have 32 of them.
    for (byte, pieces, blocks) in [(1, [96, 101, 290], 2), (2, [0, 101, 511], 3)] {
        write(&world, byte, &pieces);
        held.push(world.held());
        let next = world.replicates(&to);
        let (bytes, way) = pass(&next);
        assert!(way.starts_with("NBD + CBT"), "{way}");
        assert_eq!(bytes, 3 * PIECE, "{next:#}");
        let stored = &next["backup"]["repositories"][0]["disks"][0];
        assert_eq!((&stored["blocks"], &stored["isKey"]), (&json!(blocks), &json!(false)), "{next:#}");
        world.is_at_rest(1);
    }
    compare(&world.lab, &held);
}

#[test]
fn what_changes_in_the_settings_of_a_machine_arrives_with_the_next_run() {
    let world = World::with_one_disk();
    let pool = world.lab.client();
    world.replicates(&TO);
    let source = world.record();
    switch_off(&pool, &source.reference);
    let memory = (256 * MIB, 512 * MIB);
    pool.set(&source.reference, "name_label", "shop").expect("set");
    pool.set(&source.reference, "name_description", "it moved").expect("set");
    pool.set(&source.reference, "VCPUs_max", 4).expect("set");
    pool.set_memory(&source.reference, memory, memory).expect("set");
    let vif: Record<Vif> = pool.record(&source.vifs[0]).expect("there");
    pool.destroy_vif(&vif.reference).expect("destroyed");
    let mut fields = vif.raw.clone();
    fields.insert("device".to_owned(), json!("3"));
    fields.insert("MAC".to_owned(), json!("02:00:00:00:00:77"));
    pool.create_vif(&fields).expect("made");
    let made = || {
        let mut command = world.lab.command("backup", &TO);
        let (code, out, err) = run(command.args(["--vm", &source.uuid, "--json"]).env_remove("XDG_CONFIG_HOME"));
        assert_eq!(code, 0, "{out}\n{err}");
    };
    made();
    let replicas = machines(&world.lab);
    assert_eq!(replicas.len(), 1, "the same machine");
    let replica = &replicas[0];
    assert!(replica.name_label.starts_with("shop - xofs - ("), "{}", replica.name_label);
    let number = |field: &str| replica.raw[field].as_i64().map(|bytes| u64::try_from(bytes).expect("positive"));
    assert_eq!((number("memory_static_min"), number("memory_static_max")), (Some(memory.0), Some(memory.1)));
    assert_eq!((number("memory_dynamic_min"), number("memory_dynamic_max")), (Some(memory.0), Some(memory.1)));
    assert_eq!(number("VCPUs_max"), Some(4));
    assert_eq!(replica.raw["name_description"], "it moved");
    let interfaces: Vec<Record<Vif>> = pool.records_of(&replica.vifs).expect("there");
    let found: Vec<_> = interfaces.iter().map(|vif| (vif.device.as_str(), &vif.network)).collect();
    assert_eq!(found, [("3", &vif.network)]);
    assert_ne!(interfaces[0].mac, "02:00:00:00:00:77", "its pool has that one already");
    assert!(replica.tags.contains(&"xofs replica".to_owned()), "{:?}", replica.tags);
    // Without interfaces it has none, and it still cannot be started.
    let source: Record<Vm> = pool.record(&source.reference).expect("there");
    source.vifs.iter().for_each(|vif| pool.destroy_vif(vif).expect("destroyed"));
    made();
    let replica = machines(&world.lab).remove(0);
    assert!(replica.vifs.is_empty() && states(&world.lab).len() == 3);
    assert_eq!(pool.start_vm(&replica.reference, false).expect_err("blocked").code(), "OPERATION_BLOCKED");
}

#[test]
fn a_replica_that_was_set_back_to_a_state_is_the_users_and_the_next_one_is_an_increment_nevertheless() {
    let world = World::with_one_disk();
    let pool = world.lab.client();
    let mut held = vec![world.held()];
    world.replicates(&TO);
    write(&world, 1, &[40]);
    held.push(world.held());
    world.replicates(&TO);
    let (his, oldest) = (machines(&world.lab).remove(0), states(&world.lab).remove(0));
    pool.run("VM.revert", &[json!(oldest.reference)]).expect("set back");
    assert!(held_by(&world.lab, &his) == held[0], "it is what it was");
    write(&world, 2, &[80, 81]);
    held.push(world.held());
    let (next, said) = world.ends(&TO, 0);
    assert!(said.contains("the replica before stays as it is"), "{said}");
    assert_eq!((sent(&next, 0, 0), pass(&next).0), ((BLOCK, false), BLOCK), "{next:#}");
    let left: Record<Vm> = pool.record(&his.reference).expect("it stays");
    assert!(held_by(&world.lab, &left) == held[0]);
    // It says of itself what it said when the state was made, but has other disks than it was given.
    let all: BTreeSet<Ref<Vm>> = machines(&world.lab).into_iter().map(|vm| vm.reference).collect();
    let new = states(&world.lab).pop().expect("there").snapshot_of.clone();
    assert_eq!(all, BTreeSet::from([his.reference.clone(), new.clone()]));
    assert_ne!(new, his.reference);
    compare(&world.lab, &held);
    // From here on it is the new one that goes on.
    write(&world, 3, &[80]);
    held.push(world.held());
    let (next, said) = world.ends(&TO, 0);
    assert!(!said.contains("stays as it is") && sent(&next, 0, 0) == (BLOCK, false), "{said}\n{next:#}");
    assert_eq!(states(&world.lab).pop().expect("there").snapshot_of, new);
    assert_eq!(machines(&world.lab).len(), 2);
    compare(&world.lab, &held[1..]);
    assert!(held_by(&world.lab, &left) == held[0], "nobody touched it");
    assert_eq!(world.lab.journals(), 0);
}

#[test]
fn a_copy_of_a_state_starts_and_the_replica_goes_on() {
    let world = World::with_one_disk();
    let pool = world.lab.client();
    let mut held = vec![world.held()];
    world.replicates(&TO);
    let (replica, state) = (machines(&world.lab).remove(0), states(&world.lab).remove(0));
    let before: Vec<Ref<Vm>> = pool.records::<Vm>().expect("answered").into_iter().map(|vm| vm.reference).collect();
    pool.run("VM.clone", &[json!(state.reference), json!("web01 again")]).expect("cloned");
    let all = pool.records::<Vm>().expect("answered");
    let copy = all.into_iter().find(|vm| !before.contains(&vm.reference)).expect("one is new");
    // A clone of a snapshot of a machine is a template until somebody says otherwise.
    pool.set(&copy.reference, "is_a_template", false).expect("set");
    pool.start_vm(&copy.reference, false).expect("it starts");
    let of_copy = Reference::from(copy.reference.as_str());
    world.lab.simulator.guest_writes(&of_copy, world.seed ^ 77, 3).expect("written");
    let his = world.lab.held(&of_copy);
    assert_ne!(his, held[0]);
    for round in 1..5 {
        write(&world, round, &[u64::from(round) * 33]);
        held.push(world.held());
        let next = world.replicates(&TO);
        assert_eq!(sent(&next, 0, 0), (BLOCK, false), "{next:#}");
        assert!(world.lab.held(&of_copy) == his, "his goes on");
    }
    // Also once the state that it is a copy of is gone.
    compare(&world.lab, &held[2..]);
    let replicas = machines(&world.lab);
    assert!(replicas.len() == 1 && replicas[0].reference == replica.reference);
    assert_eq!(pool.record::<Vm>(&copy.reference).expect("there").power_state, "Running");
}

#[test]
fn what_a_thick_sr_has_to_have_free_is_said_and_looked_at_before_anything_is_sent() {
    let machine = || Machine::new("web01").running().disk(Disk::new("system", 32 * MIB).filled(50));
    let thick = |name: &str, size| Sr::new(name, Storage::Lvm).size(size);
    let world = World::with(machine(), |scene| scene.sr(thick("thick", 512 * MIB)).sr(thick("tight", 24 * MIB)));
    let room = |sr: &str| {
        let plan = world.replicates(&["--to-sr", sr, "--no-nbd", "--explain"])["plan"]["replicas"][0].take();
        (plan["takes"].as_u64().expect("said"), plan["free"].as_u64().expect("said"))
    };
    let (takes, free) = room("thick");
    assert!((32 * MIB..36 * MIB).contains(&takes) && free <= 512 * MIB && free > takes, "{takes} {free}");
    let (takes, free) = room("tight");
    assert!((32 * MIB..36 * MIB).contains(&takes) && free <= 24 * MIB, "{takes} {free}");
    let count = || world.lab.simulator.look(|store| (store.count(Class::Vm), store.count(Class::Vdi)));
    let before = count();
    let (_, said) = world.ends(&["--to-sr", "tight", "--no-nbd"], 1);
    assert!(said.contains("'tight'") && said.contains("bytes free") && said.contains("are needed"), "{said}");
    // The host merges what the snapshot leaves.
    wait_for("nothing that was not there before", || count() == before);
    world.is_at_rest(0);
    let mut held = vec![world.held()];
    world.replicates(&["--to-sr", "thick", "--no-nbd"]);
    assert_eq!(room("thick").0, 0, "an increment is not known beforehand");
    write(&world, 1, &[40]);
    held.push(world.held());
    let next = world.replicates(&["--to-sr", "thick", "--no-nbd"]);
    assert_eq!(sent(&next, 0, 0), (BLOCK, false), "{next:#}");
    compare(&world.lab, &held);
    world.is_at_rest(1);
}

#[test]
fn a_lost_folder_of_the_state_costs_no_replica_anything() {
    let world = World::with_one_disk();
    let mut held = vec![world.held()];
    world.replicates(&TO);
    for round in 1..3 {
        fs::remove_dir_all(&world.lab.state).expect("removed");
        write(&world, round, &[u64::from(round) * 40]);
        held.push(world.held());
        let next = world.replicates(&TO);
        assert_eq!((sent(&next, 0, 0), pass(&next).0), ((BLOCK, false), BLOCK), "{next:#}");
        world.is_at_rest(1);
    }
    compare(&world.lab, &held);
    assert_eq!(machines(&world.lab).len(), 1);
    let vdis = world.lab.client().records::<Vdi>().expect("answered");
    let of_replicas = vdis.iter().filter(|vdi| vdi.managed && vdi.other_config.contains_key("xofs:replica"));
    assert_eq!(of_replicas.count(), 4, "a disk, and one of each of three states");
}
