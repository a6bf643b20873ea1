//! Forgetting backups: whenever it is cut off, every backup that is listed reads right, the kept ones are all listed, and the next
//! run ends where an undisturbed one ends, with nothing left over.

mod cut;
#[path = "../vhd/tests/seeds/mod.rs"]
mod seeds;
mod world;

use std::sync::Arc;
use std::sync::atomic::Ordering;

use cut::until;
use seeds::Random;
use serde_json::json;
use storage::{Loss, Storage, WritableStorage};
use uuid::Uuid;
use vhd::{BlockSize, Filter, Format, NewLayer, create_layer, write_alias};
use world::{BLOCK, FULL, JOB, VM, World, path, time};
use xofs::repository::ErrorKind;

/// How many are tried where `XOFS_SEEDS` does not say it.
const SEEDS: u64 = 6;
/// The uuid of nothing.
const ABSENT: Uuid = Uuid::from_u128(0x2222_2222_2222_4222_8222_2222_2222_2222);
/// The time of a backup that is kept, later than all others.
const KEPT: &str = "20260821T020003Z";

fn cut_everywhere(seed: u64) {
    let mut random = Random::new(seed.wrapping_add(1 << 32));
    for count in 0.. {
        let mut world = World::new(seed);
        let when = format!("seed {seed}, cut after {count} changes");
        let (storage, is_cut) = until(&world.memory, count);
        let forgotten = world.forget(storage);
        if !is_cut.load(Ordering::SeqCst) {
            let forgotten = forgotten.unwrap_or_else(|error| panic!("{when}: {error}"));
            assert_eq!(forgotten.backups.len(), world.truths.len() + 1 - world.kept.len(), "{when}");
            assert_eq!(world.check(&world.memory, &when, true), world.kept, "{when}");
            return;
        }
        world.check(&world.memory, &when, false);
        let newest = time(world.truths.len() - 1);
        for loss in [Some(Loss::All), Some(Loss::None), None] {
            let when = format!("{when}, {loss:?}");
            let mut losses = || loss.unwrap_or_else(|| [Loss::All, Loss::Half, Loss::None][random.below(3)]);
            let left = Arc::new(world.memory.after_power_cut(&mut losses));
            world.check(&left, &when, false);
            // At times the next run keeps less: then there is nothing to merge into of what the first one meant to.
            let kept = world.kept.clone();
            if random.below(2) == 0 {
                world.kept.retain(|time| *time == newest);
            }
            world.finish(&left, &format!("{when}, in the end, with {:?}", world.kept));
            world.kept = kept;
        }
        world.finish(&world.memory, &format!("{when}, gone on"));
    }
}

#[test]
fn what_is_cut_off_anywhere_loses_no_backup_and_is_finished_by_the_next_run() {
    seeds::each(SEEDS, 2, cut_everywhere);
}

#[test]
fn nothing_goes_while_a_backup_of_the_vm_cannot_be_read() {
    let world = World::new(1);
    for (name, bytes) in
        [("20260730T020003Z.json", "{\"mode\":"), ("20261399T020003Z.json", "{}"), ("other.json", "{}")]
    {
        let metadata = format!("xo-vm-backups/{VM}/{name}");
        world.memory.put(&metadata, bytes).unwrap();
        let error = world.forget(world.memory.clone()).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Damaged, "{name}: {error}");
        assert!(error.to_string().contains(name), "{error}");
        world.memory.remove(&metadata).unwrap();
    }
    world.finish(&world.memory, "once it is gone");
}

/// The uuid of the second disk of a backup.
fn uuid_of(number: usize) -> Uuid {
    Uuid::from_u128(0x1111_1111_1111_4111_8111_0000_0000_0001 + 2 * number as u128)
}

/// Puts an image that no metadata names beside the second disks, built on `parent`: its uuid, and the name it is called by.
fn put_child(world: &World, name: &str, parent: (Uuid, &str)) {
    let lineage = second_disks();
    let storage: Arc<dyn WritableStorage> = world.memory.clone();
    let data = path(&format!("{lineage}/data/{name}.vhd"));
    let uuid = Uuid::from_u128(0x1111_1111_1111_4111_8111_ffff_ffff_ffff);
    let layer = NewLayer::new(uuid, BLOCK as u64 * 6, 0).unwrap();
    let layer = layer.with_block_size(BlockSize::new(u32::try_from(BLOCK).unwrap()).unwrap()).unwrap();
    let layer = layer.child_of(parent.0, parent.1).unwrap();
    create_layer(storage.clone(), Format::Exploded(Filter::None), data.clone(), layer).unwrap().finish().unwrap();
    write_alias(&*storage, &path(&format!("{lineage}/{name}.alias.vhd")), &data).unwrap();
}

/// What calls the second disk of a backup its parent.
fn alias_of(number: usize) -> String {
    format!("{}.alias.vhd", time(number))
}

fn second_disks() -> String {
    format!("xo-vm-backups/{VM}/vdis/{JOB}/0a1b2c3d-0000-4000-8000-0000000000d1")
}

#[test]
fn what_an_ingest_left_that_was_ended_is_in_nobodys_way() {
    const LATER: &str = "20260820T020003Z";
    let world = World::new(4);
    let newest = world.truths.len() - 1;
    put_child(&world, LATER, (uuid_of(newest), &alias_of(newest)));
    let done = world.forget(world.memory.clone()).unwrap();
    assert_eq!(done.problems.len(), 1, "nobody knows what it is: {done:?}");
    let world = World::new(4);
    let newest = world.truths.len() - 1;
    put_child(&world, LATER, (uuid_of(newest), &alias_of(newest)));
    world.memory.put(&format!("{}/.{LATER}.xofs-ingest", second_disks()), "begun").unwrap();
    let done = world.forget(world.memory.clone()).unwrap();
    assert!(done.problems.is_empty() && done.refused.is_empty() && !done.backups.is_empty(), "{done:?}");
    assert_eq!(world.check(&world.memory, "forgotten", true), world.kept);
    for left in [format!("{LATER}.alias.vhd"), format!(".{LATER}.xofs-ingest")] {
        assert!(world.memory.stat(&path(&format!("{}/{left}", second_disks()))).is_ok(), "{left}");
    }
}

#[test]
fn the_folder_of_a_disk_goes_with_its_last_backup_unless_something_else_is_there() {
    for is_empty in [true, false] {
        let mut world = World::new(6);
        world.kept = [FULL.to_owned()].into();
        let note = format!("{}/note.txt", second_disks());
        if !is_empty {
            world.memory.put(&note, "mine").unwrap();
        }
        let done = world.forget(world.memory.clone()).unwrap();
        assert_eq!((done.backups.len(), done.problems.len()), (world.truths.len(), 0), "{done:?}");
        let is_there = |name: &str| world.memory.stat(&path(name)).is_ok();
        assert_eq!([is_there(&second_disks()), is_there(&note)], [!is_empty; 2]);
        assert!(!is_there(&second_disks().replace("00d1", "00d0")), "the first disk has nothing else");
    }
}

#[test]
fn a_backup_stays_that_another_chain_is_built_on() {
    // One whose second disk has one chain.
    let is_fit = |world: &World| world.truths.len() > 2 && world.keys[1].len() == 1;
    // By uuid and by name, or by one of these.
    let first = alias_of(0);
    for parent in [(uuid_of(0), &*first), (uuid_of(0), "renamed.alias.vhd"), (ABSENT, &first)] {
        let mut world = (0..).map(World::new).find(is_fit).unwrap();
        world.kept = world.truths.keys().next_back().into_iter().cloned().chain([FULL.to_owned()]).collect();
        // A second child of the first backup's disk, which no metadata names.
        put_child(&world, "branch", parent);
        let done = world.forget(world.memory.clone()).unwrap();
        let refused: Vec<String> = done.refused.iter().map(|(time, _)| time.stored()).collect();
        assert_eq!(refused.len(), world.truths.len() - 1, "{parent:?}: {done:?}");
        assert!(done.refused.iter().all(|(_, reason)| reason.contains("is built on it, too")), "{parent:?}: {done:?}");
        assert_eq!(done.backups, [], "{parent:?}");
        assert_eq!(world.check(&world.memory, "refused", true).len(), world.truths.len() + 1);
    }
}

#[test]
fn all_backups_stay_where_nobody_knows_what_a_kept_one_is_built_on_or_can_read_what_is_left() {
    // What the disk of the one that is kept is said to be built on, by uuid and by name, and the reason.
    let second = alias_of(1);
    for (parent, expected) in [
        ((uuid_of(0), &*second), "by the uuid of its parent"),
        ((ABSENT, &second), "was expected in its folder"),
        ((ABSENT, "nothing.alias.vhd"), "was expected in its folder"),
        ((uuid_of(0), "nothing.alias.vhd"), "nothing that can be read would be left"),
    ] {
        let mut world = World::new(4);
        let all = world.truths.len() + 1;
        put_child(&world, KEPT, parent);
        let disk = format!("vdis/{JOB}/0a1b2c3d-0000-4000-8000-0000000000d1/{KEPT}.alias.vhd");
        let metadata = json!({
            "mode": "delta", "jobId": JOB, "scheduleId": "s", "vhds": { "OpaqueRef:1": disk },
            "vdis": { "OpaqueRef:1": { "uuid": ABSENT.to_string() } }, "vm": { "name_label": "web01" },
        });
        let metadata_path = format!("xo-vm-backups/{VM}/{KEPT}.json");
        world.memory.put(&metadata_path, metadata.to_string()).unwrap();
        world.kept = [KEPT.to_owned(), FULL.to_owned()].into();
        let done = world.forget(world.memory.clone()).unwrap();
        assert_eq!((done.backups.len(), done.refused.len()), (0, all - 1), "{parent:?}: {done:?}");
        assert!(done.refused.iter().all(|(_, reason)| reason.contains(expected)), "{parent:?}: {done:?}");
        // All the others read as ever.
        world.memory.remove(&metadata_path).unwrap();
        world.kept.remove(KEPT);
        assert_eq!(world.check(&world.memory, "refused", true).len(), all, "{parent:?}");
    }
}

#[test]
fn a_note_of_what_was_to_go_takes_nothing_that_a_backup_needs_and_nothing_elsewhere() {
    let mut world = World::new(5);
    world.kept = world.truths.keys().cloned().chain([FULL.to_owned()]).collect();
    let folder = format!("xo-vm-backups/{VM}");
    let lineage = format!("vdis/{JOB}/0a1b2c3d-0000-4000-8000-0000000000d0");
    let other = "xo-vm-backups/0a1b2c3d-0000-4000-8000-000000000002";
    world.memory.put(&format!("{other}/{FULL}.xva"), "xva").unwrap();
    world.memory.put(&format!("{other}/vdis/{JOB}/d/data/a.vhd/bat"), "bat").unwrap();
    world.memory.put(&format!("{folder}/notes.txt"), "notes").unwrap();
    let note_path = format!("xo-vm-backups/.{VM}.xofs-forget");
    let named = |name: &str, data: &str| json!({ "disks": { name: data }, "files": [] });
    let data = format!("{lineage}/data/{}.vhd", time(0));
    let notes = [
        ("a disk of a backup", named(&format!("{lineage}/{}.alias.vhd", time(0)), &data)),
        ("its data by another name", named(&format!("{lineage}/20250101T020003Z.alias.vhd"), &data)),
        ("the XVA of a backup", json!({ "disks": {}, "files": [format!("{FULL}.xva"), format!("{FULL}.json")] })),
        ("no archive", json!({ "disks": {}, "files": ["notes.txt", "vdis"] })),
    ];
    for (what, note) in notes {
        world.memory.put(&note_path, note.to_string()).unwrap();
        let done = world.forget(world.memory.clone()).unwrap_or_else(|error| panic!("{what}: {error}"));
        assert!(done.backups.is_empty() && done.problems.is_empty(), "{what}: {done:?}");
        assert_eq!(world.check(&world.memory, what, true), world.kept, "{what}");
        for kept in [
            format!("{other}/{FULL}.xva"),
            format!("{other}/vdis/{JOB}/d/data/a.vhd/bat"),
            format!("{folder}/notes.txt"),
        ] {
            assert!(world.memory.stat(&path(&kept)).is_ok(), "{what}: {kept}");
        }
        let left = world.memory.stat(&path(&note_path));
        assert_eq!(left.unwrap_err().kind(), storage::ErrorKind::NotFound, "{what}");
    }
    let elsewhere = format!("../{}", &other[14..]);
    let damaged = [
        named(&format!("{elsewhere}/vdis/{JOB}/d/a.alias.vhd"), &format!("{elsewhere}/vdis/{JOB}/d/data/a.vhd"))
            .to_string(),
        named(&format!("{lineage}/a.alias.vhd"), &format!("{elsewhere}/vdis/{JOB}/d/data/a.vhd")).to_string(),
        json!({ "disks": {}, "files": [format!("{elsewhere}/{FULL}.xva")] }).to_string(),
        named(&format!("{lineage}/a.alias.vhd"), &format!("{lineage}/data")).to_string(),
        named(&format!("{lineage}/a.alias.vhd"), &format!("{data}/blocks")).to_string(),
        "{".to_owned(),
    ];
    for note in damaged {
        world.memory.put(&note_path, note.clone()).unwrap();
        let done = world.forget(world.memory.clone()).unwrap();
        let [(problem, why)] = done.problems.as_slice() else { panic!("{note}: {done:?}") };
        assert!(problem.as_str() == note_path && why.contains("xofs repair"), "{note}: {why}");
        for kept in [format!("{other}/{FULL}.xva"), format!("{other}/vdis/{JOB}/d/data/a.vhd/bat")] {
            assert!(world.memory.stat(&path(&kept)).is_ok(), "{note}: {kept}");
        }
    }
}
