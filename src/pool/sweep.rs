//! What runs left that died is undone: as their journals tell it, and as snapshots say of themselves where a journal is lost.
//!
//! Only what this machine and folder of the state made is touched, only of runs whose process is gone, and of snapshots only those
//! that no backup is known to rest on. Objects of Xen Orchestra and of anybody else say nothing of the kind.

use uuid::Uuid;
use xapi::record::{PoolObject, TaskObject, Vm};
use xapi::{Pool, Record};

use super::error::{Error, ErrorKind, Result};
use super::journal::{self, Act, Journal, Left};
use super::limits::PoolId;
use super::snapshot::{attach_again, destroy_named, destroy_ours};
use super::state::State;
use super::survey::Survey;
use super::{keys, replica, restore};

/// Begins a run: undoes what earlier ones left that died, and returns a handle whose tasks are told by this run, its journal, and
/// what limits know the pool by.
///
/// # Errors
/// What the pool says; if the journals cannot be listed, or the new one not written.
pub fn begin(pool: Pool, state: &State, say: &dyn Fn(&str)) -> Result<(Pool, Journal, PoolId)> {
    let pools = pool.records::<PoolObject>()?;
    let uuid = pools.first().map(|of| of.uuid.clone()).unwrap_or_default();
    runs(&pool, state, &uuid, say)?;
    let run = crate::repository::random_uuid()
        .map_err(|error| Error::new(ErrorKind::State, format!("ask the system for random numbers: {error}")))?;
    let journal = Journal::begin(state, run, &uuid)?;
    Ok((pool.marked(&keys::mark(run, &state.keeper())), journal, PoolId::new(pools.first())))
}

/// Ends the tasks of dead runs, and undoes what their journals tell about a pool, which is known by its uuid. What cannot be
/// undone now is said, and tried again by the next run.
///
/// # Errors
/// If the journals or the tasks cannot be listed.
fn runs(pool: &Pool, state: &State, uuid: &str, say: &dyn Fn(&str)) -> Result<()> {
    destroy_tasks(pool, state, |run| !journal::is_alive(state, run))?;
    for left in Left::find(state, uuid, say)? {
        let undone = left.acts.iter().rev().try_for_each(|act| undo(pool, state, &left, act));
        match undone.and_then(|()| left.undone()) {
            Ok(()) => {}
            Err(error) => say(&format!("what a run left that was ended cannot be removed yet: {error}")),
        }
    }
    Ok(())
}

/// Ends the tasks of some runs, by what their names say: also those of which nobody knows, because the answer to who made them did
/// not come any more. What an import of an XVA made goes with it.
///
/// # Errors
/// If the tasks cannot be listed, or one cannot be ended.
pub fn destroy_tasks(pool: &Pool, state: &State, is_meant: impl Fn(Uuid) -> bool) -> Result<()> {
    let keeper = state.keeper();
    for task in pool.records::<TaskObject>()? {
        if !keys::run_of(&task.name_label, &keeper).is_some_and(&is_meant) {
            continue;
        }
        if task.name_label.ends_with(xapi::IMPORT_OF_A_MACHINE) {
            restore::undo_import(pool, &pool.watch(&task.reference, xapi::IMPORT_OF_A_MACHINE))?;
        } else {
            pool.destroy_task(&task.reference)?;
        }
    }
    Ok(())
}

fn undo(pool: &Pool, state: &State, left: &Left, act: &Act) -> Result<()> {
    match act {
        Act::Snapshot { vm, name } => {
            let Some(vm) = live(pool, vm)? else { return Ok(()) };
            destroy_named(pool, &vm, name)?;
            let survey = Survey::of(pool, vm)?;
            let is_of_it = |keys: &keys::Keys| keys.run == left.run && keys.keeper == state.keeper() && !keys.is_stored;
            for snapshot in survey.snapshots.iter().filter(|snapshot| is_of_it(&snapshot.keys)) {
                destroy_ours(pool, snapshot)?;
            }
        }
        Act::Restore { vm, disks } => {
            restore::undo(pool, &keys::mark(left.run, &state.keeper()), vm.as_deref(), disks)?;
        }
        Act::Replica { sr } => replica::settle(pool, &replica::mark(&keys::mark(left.run, &state.keeper()), sr))?,
        Act::Detached { vm, devices } => {
            let Some(vm) = live(pool, vm)? else { return Ok(()) };
            attach_again(pool, &vm.reference, devices)?;
        }
    }
    Ok(())
}

/// Destroys the snapshots of a VM that runs of ours left unfinished, whose journal may be lost. Who calls it holds the lock of the
/// VM and job, so that no run of this machine is at it.
///
/// # Errors
/// What the pool says.
pub fn unfinished(pool: &Pool, state: &State, survey: &Survey, job: &str, say: &dyn Fn(&str)) -> Result<()> {
    let keeper = state.keeper();
    for snapshot in survey.snapshots.iter().filter(|snapshot| !snapshot.keys.is_stored) {
        let keys = &snapshot.keys;
        if keys.keeper != keeper {
            say(&format!(
                "left alone: a snapshot of {} that {} made at {} and did not finish with",
                survey.vm.name_label.escape_debug(),
                keys.keeper.escape_debug(),
                keys.datetime.escape_debug()
            ));
        } else if keys.is_of(&survey.vm.uuid, job) && !journal::is_alive(state, keys.run) {
            destroy_ours(pool, snapshot)?;
        }
    }
    for snapshot in pool.records_of::<Vm>(&survey.vm.snapshots)? {
        let run = keys::run_of(&snapshot.name_label, &keeper);
        if run.is_some_and(|run| !journal::is_alive(state, run)) {
            destroy_named(pool, &survey.vm, &snapshot.name_label)?;
        }
    }
    Ok(())
}

/// Returns a VM, if it is still there.
fn live(pool: &Pool, uuid: &str) -> Result<Option<Record<Vm>>> {
    match pool.by_uuid::<Vm>(uuid).and_then(|vm| pool.record(&vm)) {
        Err(error) if error.is_gone() => Ok(None),
        found => Ok(Some(found?)),
    }
}
