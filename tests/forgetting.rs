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
use storage::{Loss, WritableStorage};
use uuid::Uuid;
use vhd::{BlockSize, Filter, Format, NewLayer, create_layer, write_alias};
use world::{BLOCK, JOB, VM, World, path, time};
use xofs::repository::ErrorKind;

/// How many are tried where `XOFS_SEEDS` does not say it.
const SEEDS: u64 = 6;

fn cut_everywhere(seed: u64) {
    let mut random = Random::new(seed.wrapping_add(1 << 32));
    for count in 0.. {
        let world = World::new(seed);
        let when = format!("seed {seed}, cut after {count} changes");
        let (storage, is_cut) = until(&world.memory, count);
        let forgotten = world.forget(storage);
        if !is_cut.load(Ordering::SeqCst) {
            let forgotten = forgotten.unwrap_or_else(|error| panic!("{when}: {error}"));
            assert_eq!(forgotten.backups.len(), world.truths.len() - world.kept.len(), "{when}");
            assert_eq!(world.check(&world.memory, &when, true), world.kept, "{when}");
            return;
        }
        world.check(&world.memory, &when, false);
        for loss in [Some(Loss::All), Some(Loss::None), None] {
            let when = format!("{when}, {loss:?}");
            let mut losses = || loss.unwrap_or_else(|| [Loss::All, Loss::Half, Loss::None][random.below(3)]);
            let left = Arc::new(world.memory.after_power_cut(&mut losses));
            world.check(&left, &when, false);
            world.finish(&left, &format!("{when}, in the end"));
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
        [("20260731T020003Z.json", "{\"mode\":"), ("20261399T020003Z.json", "{}"), ("other.json", "{}")]
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

#[test]
fn a_backup_stays_that_another_chain_is_built_on() {
    let mut world = World::new(3);
    world.kept = world.truths.keys().next_back().into_iter().cloned().collect();
    let lineage = format!("xo-vm-backups/{VM}/vdis/{JOB}/0a1b2c3d-0000-4000-8000-0000000000d1");
    let storage: Arc<dyn WritableStorage> = world.memory.clone();
    // A second child of the first backup's disk, which no metadata names.
    let data = path(&format!("{lineage}/data/branch.vhd"));
    let uuid = Uuid::from_u128(0x1111_1111_1111_4111_8111_ffff_ffff_ffff);
    let parent = Uuid::from_u128(0x1111_1111_1111_4111_8111_0000_0000_0001);
    let layer = NewLayer::new(uuid, BLOCK as u64 * 6, 0).unwrap();
    let layer = layer.with_block_size(BlockSize::new(u32::try_from(BLOCK).unwrap()).unwrap()).unwrap();
    let layer = layer.child_of(parent, &format!("{}.alias.vhd", time(0))).unwrap();
    create_layer(storage.clone(), Format::Exploded(Filter::None), data.clone(), layer).unwrap().finish().unwrap();
    write_alias(&*storage, &path(&format!("{lineage}/branch.alias.vhd")), &data).unwrap();
    let done = world.forget(storage).unwrap();
    let refused: Vec<String> = done.refused.iter().map(|(time, _)| time.stored()).collect();
    assert_eq!(refused.len(), world.truths.len() - 1, "{done:?}");
    assert!(done.refused.iter().all(|(_, reason)| reason.contains("is built on it, too")), "{done:?}");
    assert_eq!(done.backups, []);
    assert_eq!(world.check(&world.memory, "refused", true).len(), world.truths.len());
}
