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

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use storage::{ObjectPath, WritableStorage};

pub use apply::{Applied, apply};
pub use facts::{Fact, Facts, What};
pub use plan::{Act, Action, Explanation, Include, Kind, Plan, VmPlan};
pub use trash::{Move, PutBack, Set, State, find, list, purge, put_back};

use crate::repository::{Repository, Result, VM_FOLDER, Vm, VmId};
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
        let path = lock_path(vm)?;
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

fn lock_path(vm: &VmId) -> Result<ObjectPath> {
    Ok(ObjectPath::new(VM_FOLDER)?.join(&format!("{vm}.lock"))?)
}

/// Returns every VM that has a folder, also those without a backup, by name and uuid.
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
    let folders = entries.into_iter().filter(|entry| entry.is_directory);
    let mut vms: Vec<Vm> = folders.filter_map(|entry| VmId::new(&entry.name)).map(named).collect();
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
    let before = Lock::look(repository, &vm.id);
    let plan = before.as_ref().map(|lock| examine_with(repository, writable, vm, include, *lock));
    match (plan, Lock::look(repository, &vm.id)) {
        (Ok(plan), Ok(after)) if before.as_ref().is_ok_and(|before| *before == after) => plan,
        // Somebody came, went, or gave a sign meanwhile.
        (Ok(_), Ok(Lock::Free)) => only_said(vm, Kind::Busy, &busy(SystemTime::now())),
        (Ok(_), Ok(Lock::Held(modified) | Lock::LeftBehind(modified))) => only_said(vm, Kind::Busy, &busy(modified)),
        (Err(error), _) => only_said(vm, Kind::Unread, &error.to_string()),
        (_, Err(error)) => only_said(vm, Kind::Unread, &error.to_string()),
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

/// The same, where it is known how the lock stands.
fn examine_with(
    repository: &Repository,
    writable: Option<&Arc<dyn WritableStorage>>,
    vm: &Vm,
    include: Include,
    lock: Lock,
) -> VmPlan {
    if let Lock::Held(modified) = lock {
        return only_said(vm, Kind::Busy, &busy(modified));
    }
    let judged = Survey::read(repository, writable, vm)
        .and_then(|survey| diagnose::diagnose(repository.storage().as_ref(), vm, &survey, include));
    let mut plan = match judged {
        Ok(plan) => plan,
        Err(error) => return only_said(vm, Kind::Unread, &format!("{error}; nothing of this VM is judged")),
    };
    if let (Lock::LeftBehind(modified), Ok(path)) = (lock, lock_path(&vm.id)) {
        let age = SystemTime::now().duration_since(modified).unwrap_or_default().as_secs();
        let reason = format!(
            "nobody has renewed this lock for {age} s, and Xen Orchestra does each 5 s: it is watched for ten seconds more, taken \
             over and released"
        );
        let digits: String = vm.id.as_str().chars().filter(|digit| *digit != '-').take(8).collect();
        plan.actions.insert(
            0,
            Action {
                id: format!("{digits}-0"),
                kind: Kind::StaleLock,
                act: Act::TakeLock,
                paths: vec![path.to_string()],
                reason,
                backups: Vec::new(),
                facts: Facts::new(),
            },
        );
    }
    plan
}

/// A VM of which nothing is judged.
fn only_said(vm: &Vm, kind: Kind, message: &str) -> VmPlan {
    VmPlan {
        uuid: vm.id.as_str().to_owned(),
        name: vm.name.clone(),
        good: Vec::new(),
        facts: Facts::new(),
        actions: Vec::new(),
        explanations: vec![Explanation {
            kind,
            path: format!("{VM_FOLDER}/{}", vm.id),
            message: message.to_owned(),
            backups: Vec::new(),
        }],
    }
}
