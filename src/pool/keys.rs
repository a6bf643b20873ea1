//! How objects of ours are known in a pool: by entries of `other_config`, which all begin with `xofs:`, and by names.
//!
//! A snapshot of ours says for which VM, job and run it was made, by whom, and when; one that is known to be stored in each
//! repository says that, too, and only such a one may be what the next increment is relative to. Until a snapshot has its
//! entries, its name tells the run. Whatever does not say all of this is not ours and is never removed.
//!
//! Each object says its own uuid, too: the disks that a VM has after somebody went back to a snapshot of ours have its entries, and
//! so has each later snapshot of theirs, but not its uuid. Such are not ours. A storage that a disk of ours is moved to gives it
//! another uuid: then the snapshot that has it tells.
//!
//! Where only the disks of a snapshot are kept nothing leads to the one of a disk that the VM has no more: so the VM tells
//! which disks a run left, in an entry for each run.

use std::collections::BTreeMap;

use uuid::Uuid;

/// What all names of entries of ours begin with.
pub const PREFIX: &str = "xofs:";
const JOB: &str = "xofs:job";
const VM: &str = "xofs:vm";
const RUN: &str = "xofs:run";
const KEEPER: &str = "xofs:keeper";
const DATETIME: &str = "xofs:datetime";
const SELF: &str = "xofs:self";
/// Set once what the snapshot holds is durable in each repository.
pub const STORED: &str = "xofs:stored";
/// The value of [`STORED`].
pub const TRUE: &str = "true";
/// What the name of an entry begins with that tells of a VM which disks without a machine a run left of it; the run follows.
const DISKS_OF_RUN: &str = "xofs:disks-of-run:";
/// What names of entries of Xen Orchestra begin with.
const XO_BACKUP: &str = "xo:backup:";

/// What a snapshot of ours says of itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Keys {
    /// The job that it belongs to.
    pub job: String,
    /// The uuid of the VM.
    pub vm: String,
    /// The run that made it.
    pub run: Uuid,
    /// The machine and folder of the state that this run belonged to.
    pub keeper: String,
    /// When it was made, as XAPI writes times; sorts by time.
    pub datetime: String,
    /// Whether it is known to be stored in each repository.
    pub is_stored: bool,
}

impl Keys {
    /// Reads what an object says; `None` unless it says all of it. It is ours only if it is the one that this was said of:
    /// [`is_itself`].
    #[must_use]
    pub fn parse(other_config: &BTreeMap<String, String>) -> Option<Self> {
        let entry = |name: &str| other_config.get(name).cloned();
        Some(Self {
            job: entry(JOB)?,
            vm: entry(VM)?,
            run: Uuid::try_parse(&entry(RUN)?).ok()?,
            keeper: entry(KEEPER)?,
            datetime: entry(DATETIME)?,
            is_stored: other_config.get(STORED).is_some_and(|value| value == TRUE),
        })
    }

    /// Returns the entries that say it of the object with this uuid, without that of being stored, which comes later.
    #[must_use]
    pub fn entries(&self, uuid: &str) -> [(&'static str, String); 6] {
        [
            (JOB, self.job.clone()),
            (VM, self.vm.clone()),
            (RUN, self.run.to_string()),
            (KEEPER, self.keeper.clone()),
            (DATETIME, self.datetime.clone()),
            (SELF, uuid.to_owned()),
        ]
    }

    /// Whether it belongs to a VM and job.
    #[must_use]
    pub fn is_of(&self, vm: &str, job: &str) -> bool {
        self.vm == vm && self.job == job
    }
}

/// Whether an object with this uuid is the one that its entries were given to.
#[must_use]
pub fn is_itself(uuid: &str, other_config: &BTreeMap<String, String>) -> bool {
    other_config.get(SELF).is_some_and(|itself| itself == uuid)
}

/// Returns the names of those entries that snapshots of ours have, and nothing else has of its own: a live object has some after
/// somebody went back to one.
pub fn of_snapshots(other_config: &BTreeMap<String, String>) -> impl Iterator<Item = &str> {
    let all = [JOB, VM, RUN, KEEPER, DATETIME, SELF, STORED];
    all.into_iter().filter(|name| other_config.contains_key(*name))
}

/// Returns the name of the entry of a VM that tells the uuids of the disks, parted by spaces, that a run left of it.
#[must_use]
pub fn disks_of_run(run: Uuid) -> String {
    format!("{DISKS_OF_RUN}{run}")
}

/// Returns what a VM tells of disks that runs left of it.
pub fn left_disks(other_config: &BTreeMap<String, String>) -> impl Iterator<Item = (Uuid, Vec<Uuid>)> {
    other_config.iter().filter_map(|(name, value)| {
        let run = Uuid::try_parse(name.strip_prefix(DISKS_OF_RUN)?).ok()?;
        Some((run, value.split(' ').filter_map(|uuid| Uuid::try_parse(uuid).ok()).collect()))
    })
}

/// Whether Xen Orchestra made a snapshot for a backup of its own.
#[must_use]
pub fn is_of_xen_orchestra(other_config: &BTreeMap<String, String>) -> bool {
    other_config.keys().any(|name| name.starts_with(XO_BACKUP))
}

/// Returns what names of objects begin with that cannot have entries: tasks, and a snapshot until it has its own.
#[must_use]
pub fn mark(run: Uuid, keeper: &str) -> String {
    format!("[xofs run {run} of {keeper}]")
}

/// Returns the run that a name with a mark of `keeper` is of.
#[must_use]
pub fn run_of(name: &str, keeper: &str) -> Option<Uuid> {
    let (run, rest) = name.strip_prefix("[xofs run ")?.split_once(" of ")?;
    rest.strip_prefix(keeper)?.strip_prefix(']')?;
    Uuid::try_parse(run).ok()
}

/// Returns the name of a snapshot of a VM.
#[must_use]
pub fn snapshot_name(vm: &str) -> String {
    format!("[xofs] {vm}")
}

/// What a VM's tag says about its backup: with the tag `xo:no-bak` it is left out.
///
/// Returns the reason in `xo:no-bak=reason`, empty if none is given, and `None` if it is to be backed up.
#[must_use]
pub fn left_out(tags: &[String]) -> Option<&str> {
    tags.iter().find_map(|tag| {
        let rest = tag.strip_prefix("xo:no-bak")?;
        if rest.is_empty() { Some("") } else { rest.strip_prefix('=') }
    })
}

/// Whether a disk is left out, by its name: `[NOBAK]` in it says so.
#[must_use]
pub fn is_left_out(disk_name: &str) -> bool {
    disk_name.contains("[NOBAK]")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read_and_less_is_not_ours() {
        let run = Uuid::from_u128(7);
        let keys = Keys {
            job: "j".into(),
            vm: "v".into(),
            run,
            keeper: "backup1:/var/lib/xofs".into(),
            datetime: "20261120T03:00:07Z".into(),
            is_stored: false,
        };
        let mut config: BTreeMap<String, String> =
            keys.entries("a").into_iter().map(|(name, value)| (name.to_owned(), value)).collect();
        assert_eq!(Keys::parse(&config), Some(keys.clone()));
        config.insert(disks_of_run(run), format!("{run} nonsense {}", Uuid::nil()));
        assert_eq!(left_disks(&config).collect::<Vec<_>>(), [(run, vec![run, Uuid::nil()])]);
        assert!(keys.is_of("v", "j") && !keys.is_of("v", "k"));
        config.insert(STORED.into(), TRUE.into());
        config.insert("xofs:restored-from".into(), "a backup".into());
        assert_eq!(of_snapshots(&config).collect::<Vec<_>>(), [JOB, VM, RUN, KEEPER, DATETIME, SELF, STORED]);
        assert_eq!(Keys::parse(&config), Some(Keys { is_stored: true, ..keys.clone() }));
        for (name, _) in keys.entries("a") {
            let mut less = config.clone();
            less.remove(name);
            assert!(Keys::parse(&less).is_none() || !is_itself("a", &less), "{name}");
        }
        assert!(is_itself("a", &config) && !is_itself("b", &config));
        let xo = BTreeMap::from([("xo:backup:job".to_owned(), "x".to_owned())]);
        assert!(is_of_xen_orchestra(&xo) && !is_of_xen_orchestra(&config) && Keys::parse(&xo).is_none());
    }

    #[test]
    fn what_has_no_entries_is_known_by_its_name_to_who_made_it() {
        let name = mark(Uuid::from_u128(7), "here:/s");
        assert_eq!(run_of(&name, "here:/s"), Some(Uuid::from_u128(7)));
        assert_eq!(run_of(&format!("{name} export of a disk"), "here:/s"), Some(Uuid::from_u128(7)));
        assert_eq!(run_of(&name, "here:/"), None);
        assert_eq!((run_of(&name, "there:/s"), run_of("[xofs] web01", "here:/s")), (None, None));
    }

    #[test]
    fn a_vm_is_left_out_by_its_tag_with_or_without_a_reason() {
        let reason = |tag: &str| left_out(&["prod".to_owned(), tag.to_owned()]).map(str::to_owned);
        assert_eq!(reason("xo:no-bak"), Some(String::new()));
        assert_eq!(reason("xo:no-bak=scratch machine"), Some("scratch machine".to_owned()));
        assert_eq!(reason("xo:no-bakery"), None);
        assert!(is_left_out("[NOBAK] swap") && !is_left_out("NOBAK"));
    }
}
