//! `xofs repair --apply`: one VM after the other, each under its lock.

use std::fmt::Write as _;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::Result;
use serde_json::{Value, json};
use storage::WritableStorage;

use super::RepairArgs;
use crate::cli::exit::{self, Exit, Failure};
use crate::cli::text::{Shown, count};
use crate::cli::{open, print};
use crate::doctor::{self, Applied, Plan, VmPlan};
use crate::merge::Watch;
use crate::repository::{VmId, VmLock};

/// Blocks that are moved at a time by merges.
const THREADS: usize = 4;

/// Does what a plan says.
///
/// # Errors
/// If it is about one VM, what kept that from being repaired.
pub fn run(
    arguments: &RepairArgs,
    storage: &Arc<dyn WritableStorage>,
    plan: &Plan,
    is_stopped: &AtomicBool,
) -> Result<Exit> {
    let mut all = Vec::new();
    for vm in plan.vms.iter().filter(|vm| !vm.actions.is_empty()) {
        if is_stopped.load(Ordering::Relaxed) {
            break;
        }
        all.push((vm, apply(arguments, storage, plan, vm, is_stopped)));
    }
    if let [(_, Err(_))] = all.as_slice() {
        if let Some((_, Err(error))) = all.pop() {
            return Err(error);
        }
    }
    if arguments.json {
        let vms: Vec<Value> = all.iter().map(|(vm, done)| to_json(vm, done)).collect();
        print::json(&json!({ "vms": vms }))?;
    } else {
        print::text(&to_text(&all))?;
    }
    let is_whole = |done: &Result<Applied>| {
        done.as_ref().is_ok_and(|done| done.merges.problems.is_empty() && !done.merges.is_stopped)
    };
    Ok(match all.iter().all(|(_, done)| is_whole(done)) {
        _ if is_stopped.load(Ordering::Relaxed) => Exit::Interrupted,
        true => Exit::Done,
        false => Exit::Partial,
    })
}

fn apply(
    arguments: &RepairArgs,
    storage: &Arc<dyn WritableStorage>,
    plan: &Plan,
    vm: &VmPlan,
    is_stopped: &AtomicBool,
) -> Result<Applied> {
    let id = VmId::new(&vm.uuid).ok_or_else(|| Failure::usage(format!("'{}' is no VM", vm.uuid.escape_debug())))?;
    let lock = lock(arguments, storage, &id, is_stopped)?;
    let watch = Watch {
        threads: THREADS,
        jobs: 1,
        planned: &|_| {},
        moved: &|_| {},
        is_stopped: &|| is_stopped.load(Ordering::Relaxed),
    };
    Ok(doctor::apply(&lock, vm, plan.include, &watch)?)
}

/// Takes the lock of a VM, as patiently as is asked for.
pub fn lock(
    arguments: &RepairArgs,
    storage: &Arc<dyn WritableStorage>,
    vm: &VmId,
    is_stopped: &AtomicBool,
) -> Result<VmLock> {
    open::lock(storage, vm, vm.as_str(), Duration::from_secs(arguments.wait), is_stopped)
}

fn to_text(all: &[(&VmPlan, Result<Applied>)]) -> String {
    let mut text = String::new();
    let (mut moved, mut merged) = (0, 0);
    for (vm, done) in all {
        let name = Shown(if vm.name.is_empty() { &vm.uuid } else { &vm.name }).to_string();
        // Writing to a String cannot fail.
        match done {
            Ok(done) => {
                if let Some(set) = &done.set {
                    let things = count(done.moved, "thing");
                    let _ = writeln!(text, "{name}: {things} moved to the trash as {set}; --undo {set} puts back");
                }
                for (path, reason) in &done.merges.problems {
                    let _ = writeln!(text, "{name}: left as it is: {}: {}", Shown(path.as_str()), Shown(reason));
                }
                moved += done.moved;
                merged += done.merges.merged;
            }
            Err(error) => {
                let _ = writeln!(text, "{name}: not repaired: {}", Shown(&format!("{error:#}")));
            }
        }
    }
    let merges = count(usize::try_from(merged).unwrap_or(usize::MAX), "merge");
    let _ = writeln!(text, "{} moved, {merges} finished", count(moved, "thing"));
    text
}

fn to_json(vm: &VmPlan, done: &Result<Applied>) -> Value {
    match done {
        Ok(done) => json!({
            "uuid": vm.uuid,
            "name": vm.name,
            "set": done.set,
            "moved": done.moved,
            "finishedMerges": done.merges.merged,
            "movedBlocks": done.merges.blocks,
            "interrupted": done.merges.is_stopped,
            "problems": done.merges.problems.iter()
                .map(|(path, reason)| json!({ "path": path.as_str(), "reason": reason })).collect::<Vec<_>>(),
            "error": null,
        }),
        Err(error) => json!({
            "uuid": vm.uuid,
            "name": vm.name,
            "error": format!("{error:#}"),
            "exitCode": exit::of(error) as u8,
        }),
    }
}
