//! What is wrong with a repository, as far as anybody has looked: named problems instead of failures.

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::sync::{Mutex, PoisonError};

use serde_json::{Value, json};
use storage::ObjectPath;

use super::{BackupId, BackupTime, VmId};

/// At most so many reported problems are kept; the ones reported later are only logged.
const REPORTED_LIMIT: usize = 4096;

/// What sort of thing is wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum ProblemKind {
    /// A folder cannot be listed.
    Listing,
    /// A metadata file cannot be read or does not say what it must.
    Metadata,
    /// A disk cannot be opened.
    Disk,
    /// Some bytes of a disk cannot be read.
    Read,
    /// Something in the disks of a guest is not shown.
    Guest,
    /// Anything else.
    Other,
}

impl fmt::Display for ProblemKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Listing => "listing",
            Self::Metadata => "metadata",
            Self::Disk => "disk",
            Self::Read => "read",
            Self::Guest => "guest",
            Self::Other => "other",
        })
    }
}

/// One thing that is wrong.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    /// The object it was found in.
    pub path: ObjectPath,
    /// The backup that suffers from it, if one does.
    pub backup: Option<BackupId>,
    /// What sort of thing is wrong.
    pub kind: ProblemKind,
    /// What was expected and what was found.
    pub message: String,
}

impl Problem {
    /// Returns it as `--json` and `.xofs/problems.json` write it.
    #[must_use]
    pub fn to_json(&self) -> Value {
        json!({
            "path": self.path.as_str(),
            "kind": self.kind.to_string(),
            "backup": self.backup.as_ref().map(ToString::to_string),
            "message": self.message,
        })
    }
}

/// The problems known now: what the last listing of each VM found, and what was reported while reading.
#[derive(Default)]
pub(super) struct Problems(Mutex<State>);

#[derive(Default)]
struct State {
    listed: HashMap<VmId, Vec<Problem>>,
    /// Of guests also by message: the path is that of the metadata of their backup.
    reported: BTreeMap<(ObjectPath, ProblemKind, String), Problem>,
}

impl Problems {
    /// Replaces what is wrong with a VM by what its newest listing found, and forgets what was reported of its backups
    /// for which `is_there` is false.
    pub fn set_listed(&self, vm: &VmId, found: Vec<Problem>, is_there: impl Fn(BackupTime) -> bool) {
        self.with(|state| {
            state.reported.retain(|_, problem| {
                let backup = problem.backup.as_ref().filter(|backup| backup.vm == *vm);
                backup.is_none_or(|backup| is_there(backup.time))
            });
            let before =
                if found.is_empty() { state.listed.remove(vm) } else { state.listed.insert(vm.clone(), found.clone()) };
            for problem in found.iter().filter(|found| before.as_ref().is_none_or(|before| !before.contains(found))) {
                log(problem);
            }
        });
    }

    /// Remembers a problem; one for each object and kind, the first one stays; of guests, one for each message.
    pub fn report(&self, problem: Problem) {
        self.with(|state| {
            let message = if problem.kind == ProblemKind::Guest { problem.message.clone() } else { String::new() };
            let key = (problem.path.clone(), problem.kind, message);
            if state.reported.contains_key(&key) {
                return;
            }
            log(&problem);
            if state.reported.len() < REPORTED_LIMIT {
                state.reported.insert(key, problem);
            }
        });
    }

    /// Forgets a reported problem: what it was about works now.
    pub fn resolve(&self, path: &ObjectPath, kind: ProblemKind) {
        self.with(|state| state.reported.remove(&(path.clone(), kind, String::new())));
    }

    /// Forgets what is wrong with VMs for which `is_there` is false.
    pub fn retain(&self, is_there: impl Fn(&VmId) -> bool) {
        self.with(|state| {
            state.listed.retain(|vm, _| is_there(vm));
            state.reported.retain(|_, problem| problem.backup.as_ref().is_none_or(|backup| is_there(&backup.vm)));
        });
    }

    /// Returns all of them, sorted by path.
    pub fn all(&self) -> Vec<Problem> {
        let mut all = self.with(|state| {
            let listed = state.listed.values().flatten();
            listed.chain(state.reported.values()).cloned().collect::<Vec<_>>()
        });
        all.sort_by(|a, b| (&a.path, a.kind, &a.message).cmp(&(&b.path, b.kind, &b.message)));
        all.dedup();
        all
    }

    fn with<T>(&self, act: impl FnOnce(&mut State) -> T) -> T {
        act(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

fn log(problem: &Problem) {
    let backup = problem.backup.as_ref().map(tracing::field::display);
    tracing::warn!(path = %problem.path, backup, kind = %problem.kind, "{}", problem.message);
}
