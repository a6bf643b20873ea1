//! What runs left that died is undone: as their journals tell it, and as snapshots say of themselves where a journal is lost.
//!
//! Only what this machine and folder of the state made is touched, only of runs whose process is gone, and of snapshots only those
//! that no backup is known to rest on. Objects of Xen Orchestra and of anybody else say nothing of the kind.
//!
//! A run that died while it published may have left a backup of its snapshot, in some destinations or in each: that is found out by the
//! next one of the same VM and job, which looks at its own.
//!
//! | the newest backup in its destinations is of this snapshot | what becomes of it |
//! |---|---|
//! | in each | it is told to be stored, and the base before goes |
//! | in some, or one cannot be asked | it stays beside the base until the next one is stored, and tells that it came after that |
//! | in none | destroyed |

use uuid::Uuid;
use xapi::record::{PoolObject, TaskObject, Vm};
use xapi::{Pool, Record};

use super::error::{Error, ErrorKind, Result};
use super::journal::{self, Act, Journal, Left};
use super::keys::Keys;
use super::snapshot::{adopt, attach_again, destroy_named, destroy_ours};
use super::state::State;
use super::survey::{LiveDisk, OurSnapshot, Survey, uuid_of};
use super::{keys, replica, restore};
use crate::ingest::Bases;

/// Begins a run: undoes what earlier ones left that died, and returns a handle whose tasks are told by this run, its journal, and
/// what the pool says of itself.
///
/// # Errors
/// What the pool says; if the journals cannot be listed, or the new one not written.
pub fn begin(pool: Pool, state: &State, say: &dyn Fn(&str)) -> Result<(Pool, Journal, Option<Record<PoolObject>>)> {
    let of = pool.records::<PoolObject>()?.into_iter().next();
    let uuid = of.as_ref().map(|of| of.uuid.clone()).unwrap_or_default();
    runs(&pool, state, &uuid, say)?;
    let run = crate::repository::random_uuid()
        .map_err(|error| Error::new(ErrorKind::State, format!("ask the system for random numbers: {error}")))?;
    let journal = Journal::begin(state, run, &uuid)?;
    Ok((pool.marked(&keys::mark(run, &state.keeper())), journal, of))
}

/// Ends the tasks of dead runs, and undoes what their journals tell about a pool, which is known by its uuid. What cannot be
/// undone now is said, and tried again by the next run.
///
/// # Errors
/// If the journals cannot be listed.
fn runs(pool: &Pool, state: &State, uuid: &str, say: &dyn Fn(&str)) -> Result<()> {
    let tell = |error: Error| say(&format!("what a run left that was ended cannot be removed yet: {error}"));
    let keeper = state.keeper();
    destroy_tasks(pool, &keeper, |run| !journal::is_alive(state, run)).unwrap_or_else(tell);
    for left in Left::find(state, uuid, say)? {
        // Where this machine has another name since.
        let renamed = left.keeper != keeper;
        let tasks = if renamed { destroy_tasks(pool, &left.keeper, |run| run == left.run) } else { Ok(()) };
        let undone = tasks.and_then(|()| left.acts.iter().rev().try_for_each(|act| undo(pool, &left, act)));
        undone.and_then(|()| left.undone()).unwrap_or_else(tell);
    }
    Ok(())
}

/// Ends the tasks of some runs, by what their names say: also those of which nobody knows, because the answer to who made them did
/// not come any more. What an import of an XVA made goes with it.
///
/// # Errors
/// If the tasks cannot be listed, or one cannot be ended.
pub fn destroy_tasks(pool: &Pool, keeper: &str, is_meant: impl Fn(Uuid) -> bool) -> Result<()> {
    let mut destroyed = Ok(());
    for task in pool.records::<TaskObject>()? {
        if !keys::run_of(&task.name_label, keeper).is_some_and(&is_meant) {
            continue;
        }
        // One that cannot be ended yet keeps no other.
        destroyed = destroyed.and(if task.name_label.ends_with(xapi::IMPORT_OF_A_MACHINE) {
            restore::undo_import(pool, pool.watch(&task.reference, xapi::IMPORT_OF_A_MACHINE))
        } else {
            pool.destroy_task(&task.reference).map_err(Error::from)
        });
    }
    destroyed
}

fn undo(pool: &Pool, left: &Left, act: &Act) -> Result<()> {
    match act {
        Act::Snapshot { vm, name, is_published } => {
            let Some(vm) = live(pool, vm)? else { return Ok(()) };
            destroy_named(pool, &vm, name)?;
            // What it says of itself is enough for who decides about it.
            if *is_published {
                return Ok(());
            }
            let survey = Survey::of(pool, vm)?;
            let is_of_it = |keys: &Keys| keys.run == left.run && keys.keeper == left.keeper && !keys.is_stored;
            for snapshot in survey.snapshots.iter().filter(|snapshot| is_of_it(&snapshot.keys)) {
                destroy_ours(pool, &survey.vm.reference, snapshot)?;
            }
        }
        Act::Restore { vm, disks } => {
            restore::undo(pool, &keys::mark(left.run, &left.keeper), vm.as_deref(), disks)?;
        }
        Act::Replica { sr } => replica::settle(pool, &replica::mark(&keys::mark(left.run, &left.keeper), sr))?,
        Act::Detached { vm, devices } => {
            let Some(vm) = live(pool, vm)? else { return Ok(()) };
            attach_again(pool, &vm.reference, devices)?;
        }
    }
    Ok(())
}

/// Destroys the snapshots of a VM that runs of ours left before they had said whose these are, as their names tell, and says which others
/// it leaves alone. Who calls it holds the lock of the VM and job, so that no run of this machine is at it. Returns whether there was one.
///
/// # Errors
/// What the pool says.
pub fn unfinished(pool: &Pool, state: &State, survey: &Survey, say: &dyn Fn(&str)) -> Result<bool> {
    let (keeper, mut is_changed) = (state.keeper(), false);
    for keys in survey.snapshots.iter().map(|snapshot| &snapshot.keys) {
        if !keys.is_stored && keys.keeper != keeper {
            say(&format!(
                "left alone: a snapshot of {} that {} made at {} and did not finish with",
                survey.vm.name_label.escape_debug(),
                keys.keeper.escape_debug(),
                keys.datetime.escape_debug()
            ));
        }
    }
    for name in &survey.snapshot_names {
        let run = keys::run_of(name, &keeper);
        if run.is_some_and(|run| !journal::is_alive(state, run)) {
            destroy_named(pool, &survey.vm, name)?;
            is_changed = true;
        }
    }
    Ok(is_changed)
}

/// Whether a run of ours left a snapshot, and nobody has decided about it. Who calls it holds the lock of the VM and job.
pub fn is_left(state: &State, keys: &Keys, vm: &str, job: &str) -> bool {
    !keys.is_stored && keys.keeper == state.keeper() && keys.is_of(vm, job) && !journal::is_alive(state, keys.run)
}

/// What the destinations of a run have.
pub struct Asked<'a> {
    /// The newest backup of each disk of the VM.
    pub bases: &'a [Bases],
    /// Whether each destination said so.
    pub are_all: bool,
}

/// Decides about the snapshots of a VM and job that dead runs left, by what the destinations have. One who only looks takes it for done.
///
/// # Errors
/// What the pool says.
pub fn decide(
    pool: &Pool,
    state: &State,
    survey: &mut Survey,
    job: &str,
    asked: &Asked,
    only_looks: bool,
    say: &dyn Fn(&str),
) -> Result<()> {
    let (vm, of) = (survey.vm.uuid.clone(), &survey.vm.reference);
    let all = std::mem::take(&mut survey.snapshots);
    let (left, mut others): (Vec<_>, Vec<_>) =
        all.into_iter().partition(|snapshot| is_left(state, &snapshot.keys, &vm, job));
    for mut snapshot in left {
        match published(&snapshot, &survey.disks, asked)? {
            Published::Everywhere if only_looks => snapshot.keys.is_stored = true,
            Published::Everywhere => {
                adopt(pool, &mut snapshot)?;
                // As the run would have done. What cannot go now goes with the next one.
                others.retain(|old| {
                    let is_before = old.keys.is_stored && old.keys.is_of(&vm, job);
                    let gone = if is_before { destroy_ours(pool, of, old).map(|()| true) } else { Ok(false) };
                    !gone.unwrap_or_else(|error| {
                        say(&format!("the snapshot of the backup before cannot be removed yet: {error}"));
                        false
                    })
                });
            }
            Published::Perhaps => {}
            Published::Nowhere => {
                if !only_looks {
                    destroy_ours(pool, of, &snapshot)?;
                }
                continue;
            }
        }
        others.push(snapshot);
    }
    survey.snapshots = others;
    Ok(())
}

/// In which destinations a snapshot is that of the newest backup.
enum Published {
    Everywhere,
    /// In some, or not all can be asked.
    Perhaps,
    Nowhere,
}

fn published(snapshot: &OurSnapshot, disks: &[LiveDisk], asked: &Asked) -> Result<Published> {
    let (mut is_in_one, mut is_in_all) = (false, asked.are_all);
    for vdi in &snapshot.disks {
        let live = disks.iter().find(|disk| disk.vdi.reference == vdi.snapshot_of);
        let Some(bases) = live.and_then(|live| asked.bases.iter().find(|bases| bases.vdi == live.uuid)) else {
            continue;
        };
        let uuid = uuid_of(vdi)?;
        let has = |(_, base): &(String, std::result::Result<Uuid, String>)| *base == Ok(uuid);
        is_in_one |= bases.destinations.iter().any(has);
        is_in_all &= bases.destinations.iter().all(has);
    }
    Ok(match (is_in_one, is_in_all) {
        (true, true) => Published::Everywhere,
        (false, _) if asked.are_all => Published::Nowhere,
        _ => Published::Perhaps,
    })
}

/// Returns a VM, if it is still there.
fn live(pool: &Pool, uuid: &str) -> Result<Option<Record<Vm>>> {
    match pool.by_uuid::<Vm>(uuid).and_then(|vm| pool.record(&vm)) {
        Err(error) if error.is_gone() => Ok(None),
        found => Ok(Some(found?)),
    }
}
