//! What is wrong with a repository, what that costs, and what can be done about it without ever deleting anything.
//!
//! ```text
//! survey ─► diagnose ─► plan (JSON, given back by the user) ─► apply ─► trash, merge
//!    │         └ needed, unclaimed      │                        │        └► put back, purge
//!    └ facts ───────────────────────────┴─── looked at again ────┘
//! ```
//!
//! Everything is done per VM. What is judged rests on a complete survey: an error while reading never leads to an action.
//! What is applied is found twice, when the plan is made and under the lock of the VM, from the same facts.

mod apply;
mod diagnose;
mod facts;
mod needed;
mod plan;
mod survey;
mod trash;
mod unclaimed;

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use storage::{ObjectPath, WritableStorage};

pub use apply::{Applied, apply};
pub use facts::{Fact, Facts, What};
pub use plan::{Act, Action, Explanation, Include, Kind, Plan, VmPlan};
pub use trash::{Move, PutBack, Set, State, find, list, purge, put_back};

use crate::repository::{Repository, Result, VM_FOLDER, Vm, VmId, VmLock};
use survey::Survey;

/// A lock whose last sign is older than this was left behind, as far as clocks tell. Xen Orchestra takes one over after ten
/// seconds; clocks of two machines may differ.
const LEFT_BEHIND: Duration = Duration::from_secs(15 * 60);

/// The lock of a VM, looked at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Lock {
    /// There is none, or it is ours.
    Free,
    /// Somebody holds it: when it was last renewed.
    Held(SystemTime),
    /// Nobody has renewed it for long: since when.
    LeftBehind(SystemTime),
}

impl Lock {
    /// Looks at the lock of a VM.
    ///
    /// # Errors
    /// What the storage says.
    fn look(repository: &Repository, vm: &VmId) -> Result<Self> {
        let path = VmLock::path(vm)?;
        let storage = repository.storage();
        // NFS answers a question for the time alone by what it knew; a listing asks the server.
        match storage.list(&path).and_then(|_| storage.stat(&path)) {
            Ok(stat) => {
                let age = SystemTime::now().duration_since(stat.modified).unwrap_or_default();
                Ok(if age > LEFT_BEHIND { Self::LeftBehind(stat.modified) } else { Self::Held(stat.modified) })
            }
            Err(error) if error.kind() == storage::ErrorKind::NotFound => Ok(Self::Free),
            Err(error) => Err(error.into()),
        }
    }
}

/// Returns every VM that has a folder, also those without a backup, and those of which only a lock is left, by name and
/// uuid.
///
/// # Errors
/// What the storage says if the folder of all VMs cannot be listed.
pub fn vms(repository: &Repository) -> Result<Vec<Vm>> {
    let known = repository.vms()?;
    let entries = match repository.storage().list(&ObjectPath::new(VM_FOLDER)?) {
        Err(error) if error.kind() == storage::ErrorKind::NotFound => return Ok(Vec::new()),
        other => other?,
    };
    let named = |id: VmId| match known.iter().find(|vm| vm.id == id) {
        Some(vm) => vm.clone(),
        None => Vm { id, name: String::new() },
    };
    let folders = entries.iter().filter(|entry| entry.is_directory).map(|entry| &entry.name);
    let ids: BTreeSet<VmId> = folders.filter_map(|name| VmId::new(name).or_else(|| VmLock::vm_of(name))).collect();
    let mut vms: Vec<Vm> = ids.into_iter().map(named).collect();
    vms.sort_by(|a, b| (&a.name, &a.id).cmp(&(&b.name, &b.id)));
    Ok(vms)
}

/// Surveys and judges a VM; `writable` is the storage where it is to be said whether merges can be gone on with. Changes
/// nothing. What keeps it from being judged is an explanation, and then there are no actions.
#[must_use]
pub fn examine(
    repository: &Repository,
    writable: Option<&Arc<dyn WritableStorage>>,
    vm: &Vm,
    include: Include,
) -> VmPlan {
    let before = match Lock::look(repository, &vm.id) {
        Ok(Lock::Held(modified)) => return only_said(vm, Kind::Busy, &busy(modified)),
        Ok(lock) => lock,
        Err(error) => return only_said(vm, Kind::Unread, &error.to_string()),
    };
    let mut plan = match judge(repository, writable, vm, include) {
        Ok(plan) => plan,
        Err(error) => return only_said(vm, Kind::Unread, &format!("{error}; nothing of this VM is judged")),
    };
    let looked = Lock::look(repository, &vm.id);
    let aside = VmLock::set_aside(repository.storage().as_ref(), &vm.id);
    match looked.and_then(|after| Ok((after, aside?))) {
        Ok((after, aside)) if after == before => match stale_locks(vm, after, aside, plan.facts.is_empty()) {
            Ok(action) => {
                plan.actions.splice(..0, action);
                plan
            }
            Err(error) => only_said(vm, Kind::Unread, &error.to_string()),
        },
        // Somebody came, went, or gave a sign meanwhile.
        Ok((Lock::Free, _)) => only_said(vm, Kind::Busy, &busy(SystemTime::now())),
        Ok((Lock::Held(modified) | Lock::LeftBehind(modified), _)) => only_said(vm, Kind::Busy, &busy(modified)),
        Err(error) => only_said(vm, Kind::Unread, &error.to_string()),
    }
}

fn busy(modified: SystemTime) -> String {
    format!(
        "another program works on this VM, or did until {} s ago: what it writes cannot be told from what is left over; try \
         again when it is done. A lock that was left behind is judged once it is {} minutes old",
        SystemTime::now().duration_since(modified).unwrap_or_default().as_secs(),
        LEFT_BEHIND.as_secs() / 60
    )
}

/// The same where the lock is ours, or nobody's. Of a VM that has no folder there is nothing to say, and no fact.
fn judge(
    repository: &Repository,
    writable: Option<&Arc<dyn WritableStorage>>,
    vm: &Vm,
    include: Include,
) -> Result<VmPlan> {
    match repository.storage().stat(&ObjectPath::new(VM_FOLDER)?.join(vm.id.as_str())?) {
        Err(error) if error.kind() == storage::ErrorKind::NotFound => return Ok(VmPlan::nothing(vm)),
        looked => looked?,
    };
    let survey = Survey::read(repository, writable, vm)?;
    diagnose::diagnose(repository.storage().as_ref(), vm, &survey, include)
}

/// Plans to remove what dead programs left of locks: the lock itself, and those that lie `aside`. Taking the lock and
/// releasing it does both.
fn stale_locks(vm: &Vm, lock: Lock, aside: Vec<ObjectPath>, is_vm_gone: bool) -> Result<Option<Action>> {
    let (mut paths, mut why) = (Vec::new(), Vec::new());
    if let Lock::LeftBehind(modified) = lock {
        let age = SystemTime::now().duration_since(modified).unwrap_or_default().as_secs();
        paths.push(VmLock::path(&vm.id)?);
        why.push(format!(
            "nobody has renewed this lock for {age} s, and Xen Orchestra does each 5 s: it is watched for ten seconds more, taken \
             over and released"
        ));
    }
    if !aside.is_empty() {
        paths.extend(aside);
        why.push(
            "a program died while it removed a lock that it had moved aside; who takes the lock next removes it"
                .to_owned(),
        );
    }
    if is_vm_gone {
        why.push("its VM has no folder any more".to_owned());
    }
    let digits: String = vm.id.as_str().chars().filter(|digit| *digit != '-').take(8).collect();
    Ok((!paths.is_empty()).then(|| Action {
        id: format!("{digits}-0"),
        kind: Kind::StaleLock,
        act: Act::TakeLock,
        paths: paths.iter().map(ToString::to_string).collect(),
        reason: why.join("; "),
        backups: Vec::new(),
        facts: Facts::new(),
    }))
}

/// A VM of which nothing is judged.
fn only_said(vm: &Vm, kind: Kind, message: &str) -> VmPlan {
    let path = format!("{VM_FOLDER}/{}", vm.id);
    let said = Explanation { kind, path, message: message.to_owned(), backups: Vec::new() };
    VmPlan { explanations: vec![said], ..VmPlan::nothing(vm) }
}
