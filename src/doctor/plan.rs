//! A plan: what a repair would do, with everything that was seen and that it rests on. JSON, to be read, cut down and
//! given back.
//!
//! A plan is no script. What it names is done only if looking again finds exactly the same things to do, resting on
//! exactly the same facts: an action that somebody wrote by hand is never found again, and so never done.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::facts::{Facts, difference};
use crate::repository::{Error, ErrorKind, Result, Vm};

/// What the first field of a plan says.
const FORMAT: &str = "xofs repair plan";
/// What is written of a plan, and how; another number is of another version of xofs.
const VERSION: u32 = 1;

/// What sort of fault something is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    /// A file that was being written and was not published.
    Leftover,
    /// What a run of `xofs ingest` left that died.
    DeadIngest,
    /// What a run of `xofs forget` noted that did not end.
    DeadForget,
    /// An alias that leads nowhere, or says nothing.
    DeadAlias,
    /// Images that no backup names and nothing needed is built on.
    OrphanDisk,
    /// Data that no alias leads to.
    DanglingData,
    /// An XVA or its checksum that no backup names.
    OrphanXva,
    /// A listing cache that does not say what there is.
    StaleCache,
    /// A backup of which nothing can be read any more.
    BrokenBackup,
    /// A backup that cannot be read, or not whole.
    DamagedBackup,
    /// A lock that its holder left behind, in its place or moved aside.
    StaleLock,
    /// A merge that has begun and not ended.
    UnfinishedMerge,
    /// Two images that are built on one.
    Branch,
    /// Metadata that nobody can read: it is not known which disks its backup needs.
    UnknownMetadata,
    /// Something cannot be told, and so nothing near it is judged.
    Unjudged,
    /// The folder of a VM of which no backup is left.
    NoBackups,
    /// Another program works on the VM.
    Busy,
    /// Something could not be read.
    Unread,
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.serialize(f)
    }
}

/// What an action does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Act {
    /// Moves its paths to the trash, in their order.
    Trash,
    /// Goes on with a merge until it is done; this cannot be undone, and loses nothing.
    FinishMerge,
    /// Takes the lock, over from who left it behind, and releases it; what was left of others is removed by that.
    TakeLock,
}

/// One thing to do.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Action {
    /// Names it in this plan: its VM and a number.
    pub id: String,
    /// What sort of fault it is for.
    pub kind: Kind,
    /// What it does.
    pub act: Act,
    /// What it is done to, relative to the repository, in this order.
    pub paths: Vec<String>,
    /// Why, in a sentence.
    pub reason: String,
    /// The backups it touches.
    pub backups: Vec<String>,
    /// What was seen of its own paths.
    pub facts: Facts,
}

/// What is only said.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Explanation {
    /// What sort of fault it is.
    pub kind: Kind,
    /// What it is about.
    pub path: String,
    /// What is wrong and what can be done, in a sentence or two.
    pub message: String,
    /// The backups it touches.
    pub backups: Vec<String>,
}

/// What is to be done to one VM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct VmPlan {
    /// Its uuid.
    pub uuid: String,
    /// Its name; empty if unknown.
    pub name: String,
    /// The backups that can be read, and can be read afterwards.
    pub good: Vec<String>,
    /// What was seen of its folder: every action rests on all of it.
    pub facts: Facts,
    /// What can be done, in the order in which it is done.
    pub actions: Vec<Action>,
    /// What else there is to know.
    pub explanations: Vec<Explanation>,
}

/// What may be planned beyond what nobody needs.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Include {
    /// Also backups of which nothing can be read.
    #[serde(default)]
    pub broken_backups: bool,
}

/// What a repair would do.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Plan {
    format: String,
    version: u32,
    /// The repository, as it was named when the plan was made.
    pub repository: String,
    /// What it was to include.
    #[serde(default)]
    pub include: Include,
    /// The VMs of which there is something to say.
    pub vms: Vec<VmPlan>,
}

impl Plan {
    /// Makes a plan.
    #[must_use]
    pub fn new(repository: &str, include: Include, vms: Vec<VmPlan>) -> Self {
        Self { format: FORMAT.to_owned(), version: VERSION, repository: repository.to_owned(), include, vms }
    }

    /// Reads a plan that was written as JSON.
    ///
    /// # Errors
    /// [`ErrorKind::Damaged`] if it is none, or one of another version of xofs.
    pub fn parse(bytes: &[u8]) -> Result<Self> {
        let damaged =
            |reason: String| Error::new(ErrorKind::Damaged, format!("it is no plan of xofs repair: {reason}"));
        let plan: Self = serde_json::from_slice(bytes).map_err(|error| damaged(error.to_string()))?;
        if plan.format != FORMAT || plan.version != VERSION {
            let (format, version) = (&plan.format, plan.version);
            let found = format!("'{FORMAT}' {VERSION} was expected, '{}' {version} was found", format.escape_debug());
            return Err(damaged(format!("{found}; make a new one")));
        }
        Ok(plan)
    }

    /// Returns how many things there are to do.
    #[must_use]
    pub fn actions(&self) -> usize {
        self.vms.iter().map(|vm| vm.actions.len()).sum()
    }
}

impl VmPlan {
    /// A plan of a VM of which there is nothing to say.
    pub(super) fn nothing(vm: &Vm) -> Self {
        let (good, actions, explanations) = Default::default();
        Self {
            uuid: vm.id.as_str().to_owned(),
            name: vm.name.clone(),
            good,
            facts: Facts::new(),
            actions,
            explanations,
        }
    }

    /// Refuses unless `now` rests on the same facts.
    ///
    /// # Errors
    /// [`ErrorKind::Changed`], saying what is not as it was.
    pub(super) fn check_facts(&self, now: &Self) -> Result<()> {
        difference(&self.facts, &now.facts).map_or(Ok(()), |difference| Err(self.changed(&difference)))
    }

    /// Returns the actions that do `act`, if each of them is to be done by `now` too, for the same facts.
    ///
    /// One against a listing cache is left out instead: Xen Orchestra may write that at any time, also without a lock, and so
    /// do what the action is for.
    ///
    /// # Errors
    /// [`ErrorKind::Changed`], saying what is not as it was.
    pub(super) fn checked(&self, act: Act, now: &Self) -> Result<Vec<&Action>> {
        let mut checked = Vec::new();
        for action in self.actions.iter().filter(|action| action.act == act) {
            let same = |other: &&Action| {
                (other.kind, other.act, &other.paths, &other.backups)
                    == (action.kind, action.act, &action.paths, &action.backups)
            };
            let change = match now.actions.iter().find(same) {
                Some(found) => difference(&action.facts, &found.facts),
                None => Some(format!("action {} would not be planned now", action.id)),
            };
            match change {
                None => checked.push(action),
                Some(_) if action.kind == Kind::StaleCache => {}
                Some(change) => return Err(self.changed(&change)),
            }
        }
        Ok(checked)
    }

    fn changed(&self, what: &str) -> Error {
        let message = format!(
            "VM {}: it is not as it was when the plan was made: {what}; nothing was changed, make a new plan",
            self.uuid
        );
        Error::new(ErrorKind::Changed, message)
    }

    /// Returns what tells this plan from another: the same for the same actions.
    pub(super) fn digest(&self) -> String {
        storage::sha256(&serde_json::to_vec(&(&self.uuid, &self.actions)).unwrap_or_default())
    }
}
