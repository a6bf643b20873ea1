//! How a replica and what belongs to it are known in a pool: by entries of `other_config`, never by names.
//!
//! | entry | of what | says |
//! |---|---|---|
//! | `xofs:replica` | machine, version, disk | the uuid of the object itself |
//! | `xofs:replica-of`, `-job`, `-sr` | all | the machine that it is a replica of, the job, the storage |
//! | `xofs:replica-kind` | machine, version | `increments`, or `full` |
//! | `xofs:replica-number`, `-time`, `-schedule`, `-run` | version | which one it is, when it was made, by which schedule and run |
//! | `xofs:replica-disk`, `-content`, `-size` | disk | whose replica it is, the snapshot of that which it holds, the size of this in bytes |
//! | `xofs:replicating` | what is not finished | by which run: it is undone after that died |
//! | `xofs:replica-cloning` | a disk of a version, and its clone until that has entries of its own | by which run |
//! | `xofs:replaced` | a disk that another takes the place of | by which run |
//!
//! A copy, clone or snapshot that somebody made of an object has its entries, but not its uuid: so it is told apart, and not ours.

use uuid::Uuid;
use xapi::record::{Texts, Vdi, Vm};

use crate::ingest;

pub const SELF: &str = "xofs:replica";
const OF: &str = "xofs:replica-of";
const JOB: &str = "xofs:replica-job";
const SR: &str = "xofs:replica-sr";
const KIND: &str = "xofs:replica-kind";
pub const NUMBER: &str = "xofs:replica-number";
pub const TIME: &str = "xofs:replica-time";
pub const SCHEDULE: &str = "xofs:replica-schedule";
pub const RUN: &str = "xofs:replica-run";
pub const DISK: &str = "xofs:replica-disk";
pub const CONTENT: &str = "xofs:replica-content";
pub const SIZE: &str = "xofs:replica-size";
pub const CLONING: &str = "xofs:replica-cloning";
pub const REPLICATING: &str = "xofs:replicating";
pub const REPLACED: &str = "xofs:replaced";
/// What a person sees of it.
pub const TAG: &str = "xofs replica";
/// Operations that are blocked: a replica that ran is none any more.
pub const BLOCKED: [&str; 4] = ["start", "start_on", "resume", "resume_on"];
/// Why.
pub const BLOCKED_BECAUSE: &str = "it is a replica: copy it, or start the copy of one of its snapshots";

/// How a replica is kept up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// One machine, with a snapshot for each run.
    Increments,
    /// A machine for each run.
    Full,
}

impl Kind {
    fn name(self) -> &'static str {
        match self {
            Self::Increments => "increments",
            Self::Full => "full",
        }
    }
}

/// What is a replica of what, where.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Identity {
    /// The uuid of the machine.
    pub of: String,
    /// The job.
    pub job: String,
    /// The uuid of the storage that it is on.
    pub sr: String,
    /// How it is kept up.
    pub kind: Kind,
}

impl Identity {
    /// Returns the entries that say it.
    pub fn entries(&self) -> [(&'static str, String); 4] {
        [(OF, self.of.clone()), (JOB, self.job.clone()), (SR, self.sr.clone()), (KIND, self.kind.name().to_owned())]
    }

    fn is_said_by(&self, entries: &Texts) -> bool {
        self.entries().iter().all(|(name, value)| entries.get(*name) == Some(value))
    }

    /// Whether an object with this uuid and these entries is ours, and belongs to it.
    pub fn has(&self, uuid: &str, entries: &Texts) -> bool {
        is_itself(uuid, entries) && self.is_said_by(entries)
    }

    /// Whether a machine is the one that increments are put on.
    pub fn has_machine(&self, vm: &Vm) -> bool {
        !vm.is_a_snapshot && !vm.is_a_template && self.has(&vm.uuid, &vm.other_config)
    }

    /// Returns the number of the whole state that this machine or snapshot is; `None` if it is none.
    pub fn number_of(&self, vm: &Vm) -> Option<u64> {
        let is_version = vm.is_a_snapshot == (self.kind == Kind::Increments) && self.has(&vm.uuid, &vm.other_config);
        number_of(vm).filter(|_| is_version)
    }
}

/// Returns the number of the whole state that a machine or snapshot is of any replica: later ones have higher numbers.
pub fn number_of(vm: &Vm) -> Option<u64> {
    let is_whole = is_itself(&vm.uuid, &vm.other_config) && !vm.other_config.contains_key(REPLICATING);
    vm.other_config.get(NUMBER).filter(|_| is_whole)?.parse().ok()
}

/// Returns the schedule that a whole state is of.
pub fn schedule_of(vm: &Vm) -> &str {
    vm.other_config.get(SCHEDULE).map_or(ingest::SCHEDULE, String::as_str)
}

/// Whether an object with this uuid is the one that its entries were given to: of a replica that is being made, or was.
pub fn is_itself(uuid: &str, entries: &Texts) -> bool {
    entries.get(SELF).is_some_and(|itself| itself == uuid)
}

/// Returns the disk that a disk is a replica of, the snapshot of it that it holds, and the size of that in bytes.
pub fn content_of(vdi: &Vdi) -> Option<(Uuid, Uuid, u64)> {
    let entry = |name: &str| Uuid::try_parse(vdi.other_config.get(name)?).ok();
    Some((entry(DISK)?, entry(CONTENT)?, vdi.other_config.get(SIZE)?.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn identity(kind: Kind) -> Identity {
        Identity { of: "vm".into(), job: "job".into(), sr: "sr".into(), kind }
    }

    fn machine(uuid: &str, entries: &[(&str, &str)]) -> Vm {
        let mut other_config: Texts =
            identity(Kind::Increments).entries().into_iter().map(|(name, value)| (name.to_owned(), value)).collect();
        other_config.extend(entries.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())));
        Vm { uuid: uuid.into(), other_config, ..Vm::default() }
    }

    #[test]
    fn what_has_the_entries_of_another_object_is_not_ours() {
        let ours = machine("a", &[(SELF, "a")]);
        assert!(identity(Kind::Increments).has_machine(&ours));
        assert!(!identity(Kind::Full).has_machine(&ours));
        // A copy, a snapshot of it, and one that was set back to a snapshot.
        assert!(!identity(Kind::Increments).has_machine(&machine("b", &[(SELF, "a")])));
        assert!(!identity(Kind::Increments).has_machine(&Vm { is_a_snapshot: true, ..ours.clone() }));
        let other = Identity { sr: "other".into(), ..identity(Kind::Increments) };
        assert!(!other.has_machine(&ours));
    }

    #[test]
    fn a_version_is_a_snapshot_of_ours_that_is_finished() {
        let entries = [(SELF, "s"), (NUMBER, "3")];
        let version = Vm { is_a_snapshot: true, ..machine("s", &entries) };
        let of = identity(Kind::Increments);
        assert_eq!(of.number_of(&version), Some(3));
        assert_eq!(of.number_of(&Vm { uuid: "t".into(), ..version.clone() }), None);
        let unfinished = machine("s", &[entries[0], entries[1], (REPLICATING, "run")]);
        assert_eq!(of.number_of(&Vm { is_a_snapshot: true, ..unfinished }), None);
        assert_eq!(of.number_of(&Vm { is_a_snapshot: false, ..version }), None);
    }
}
