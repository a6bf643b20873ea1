//! Doing what a plan says to one VM, under its lock.
//!
//! ```text
//! 0  put back what an earlier run moved that was cut off: what it began is begun again, from the same facts
//! 1  survey and judge the VM anew; go on only if that finds all the plan says, for the facts it gives
//! 2  move things to the trash, each durable before the next          (trash); done already if a set there is this plan's
//! 3  finish merges that have begun                                   (merge)
//! ```
//!
//! Until step 2 nothing was changed. Whatever fails in step 2 is put back; a merge that is stopped goes on the next time.

use std::sync::Arc;

use storage::{ObjectPath, WritableStorage};

use super::judge;
use super::plan::{Act, Action, Include, VmPlan};
use super::trash::{self, Move};
use crate::merge::{self, Begun, Forgotten, Watch};
use crate::repository::{Repository, Result, Vm, VmLock};

/// What was done to a VM.
#[derive(Debug, Default)]
pub struct Applied {
    /// The set in the trash, if anything was moved.
    pub set: Option<String>,
    /// How many things were moved.
    pub moved: usize,
    /// What came of merges.
    pub merges: Forgotten,
}

/// Does what a plan says.
///
/// # Errors
/// [`crate::repository::ErrorKind::Changed`] if anything is not as it was when the plan was made;
/// [`crate::repository::ErrorKind::Locked`] if the lock is lost; else what the storage says, also if it cannot all be read.
/// What was moved is back in its place then, or the next run puts it there.
pub fn apply(lock: &VmLock, plan: &VmPlan, include: Include, watch: &Watch) -> Result<Applied> {
    trash::recover(lock)?;
    let storage: &Arc<dyn WritableStorage> = lock.storage();
    let vm = Vm { id: lock.vm().clone(), name: plan.name.clone() };
    let repository = Repository::to_change(storage.clone().reader(), 0);
    let now = judge(&repository, Some(storage), &vm, include)?;
    let merges = plan.checked(Act::FinishMerge, &now)?;
    let digest = plan.digest();
    let mut applied = Applied { set: trash::of_plan(lock, &digest)?, ..Applied::default() };
    if applied.set.is_none() {
        plan.check_facts(&now)?;
        let moves: Vec<Move> = plan.checked(Act::Trash, &now)?.into_iter().flat_map(moves_of).collect();
        applied.moved = moves.len();
        if !moves.is_empty() {
            applied.set = Some(trash::discard(lock, &digest, moves)?);
        }
    }
    let begun = merges.into_iter().map(begun_of).collect::<Result<Vec<_>>>()?;
    if !begun.is_empty() {
        applied.merges = merge::finish(lock, begun, watch)?;
    }
    Ok(applied)
}

fn moves_of(action: &Action) -> impl Iterator<Item = Move> {
    let (kind, reason) = (action.kind, &action.reason);
    action.paths.iter().map(move |path| Move { path: path.clone(), kind, reason: reason.clone() })
}

/// Returns the merge that an action names: its state file, and the images of it if the file does not say them.
fn begun_of(action: &Action) -> Result<Begun> {
    let paths = action.paths.iter().map(|path| ObjectPath::new(path)).collect::<storage::Result<Vec<_>>>()?;
    let chain = paths.iter().skip(1).map(|path| path.file_name().to_owned()).collect();
    Ok(Begun { state: paths.into_iter().next().unwrap_or_else(ObjectPath::root), chain })
}
