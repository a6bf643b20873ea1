//! How many backups of each machine were made since its last key, also by runs that the log of the job no longer holds.
//!
//! `keys.json` beside the log has the counts of all runs up to one that it names; who begins a run adds those since. What is not known,
//! because all of that is gone, counts from now on: then the next key comes late, but it comes.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read};
use std::path::Path;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::log::{Event, History, Record, VmStatus};
use crate::whole;

/// The file, in the folder of a job.
const FILE: &str = "keys.json";
/// No such file is longer (bytes); one that is counts for nothing.
const LONGEST: u64 = 8 << 20;

/// The counts.
#[derive(Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct SinceKey {
    /// The last run that is counted.
    through: Option<Uuid>,
    /// By the uuids of machines.
    vms: BTreeMap<String, u32>,
}

impl SinceKey {
    /// Counts what a log has, after what was kept in the folder of its job.
    ///
    /// # Errors
    /// What the system says.
    pub fn of(folder: &Path, history: &History) -> io::Result<Self> {
        let mut bytes = Vec::new();
        match File::open(folder.join(FILE)) {
            Ok(file) => file.take(LONGEST).read_to_end(&mut bytes)?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => 0,
            Err(error) => return Err(error),
        };
        // What cannot be understood is as if nothing had been kept.
        let mut counts: Self = serde_json::from_slice(&bytes).unwrap_or_default();
        let counted = history.runs.iter().rposition(|run| Some(run.id) == counts.through).map_or(0, |last| last + 1);
        for run in history.runs.iter().skip(counted) {
            run.records.iter().for_each(|record| counts.add(record));
            counts.through = Some(run.id);
        }
        Ok(counts)
    }

    /// Keeps the counts. The lock of the job must be held.
    ///
    /// # Errors
    /// What the system says; then those of before are there.
    pub fn keep(&self, folder: &Path) -> io::Result<()> {
        whole::replace(&folder.join(FILE), ".keys.new".as_ref(), &serde_json::to_vec(self)?, 0o600, true)
    }

    /// Returns how many backups were made of a machine since its last key, as far as it is known.
    #[must_use]
    pub fn count(&self, vm: &str) -> u32 {
        self.vms.get(vm).copied().unwrap_or(0)
    }

    fn add(&mut self, record: &Record) {
        let Event::VmEnd { vm, backup: Some(backup), status: VmStatus::Done | VmStatus::Partial, .. } = &record.event
        else {
            return;
        };
        let repositories = backup["repositories"].as_array().into_iter().flatten();
        let disks = repositories.flat_map(|repository| repository["disks"].as_array().into_iter().flatten());
        let mut keys = disks.map(|disk| disk["isKey"] == true).peekable();
        let is_key = keys.peek().is_some() && keys.all(|is_key| is_key);
        let count = self.vms.entry(vm.clone()).or_default();
        *count = if is_key { 0 } else { count.saturating_add(1) };
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use serde_json::json;

    use super::super::log::{Run, RunStatus};
    use super::*;

    /// A run that backed up these machines, each as a key or not.
    fn run(id: u128, vms: &[(&str, bool)]) -> Run {
        let id = Uuid::from_u128(id);
        let end = |(vm, is_key): &(&str, bool)| {
            let disks = json!([{ "isKey": is_key }, { "isKey": is_key }]);
            let event = Event::VmEnd {
                vm: (*vm).into(),
                name: "web01".into(),
                pool: "lab".into(),
                attempt: 1,
                status: VmStatus::Done,
                reason: None,
                next: None,
                seconds: 2.0,
                backup: Some(json!({ "repositories": [{ "disks": disks }] })),
            };
            Record::now(id, event)
        };
        Run { id, status: RunStatus::Done, records: vms.iter().map(end).collect() }
    }

    #[test]
    fn backups_since_the_last_key_are_counted_whatever_the_log_still_holds() {
        let folder = tempfile::tempdir().expect("a folder");
        let runs = [
            run(1, &[("a", true), ("b", true)]),
            run(2, &[("a", false), ("b", false)]),
            run(3, &[("a", false), ("b", true)]),
            run(4, &[("a", false), ("b", false), ("c", false)]),
        ];
        let keep = |of: &[Run]| {
            let counts = SinceKey::of(folder.path(), &History { runs: of.to_vec(), unread: 0 }).expect("read");
            counts.keep(folder.path()).expect("written");
            ["a", "b", "c"].map(|vm| counts.count(vm))
        };
        assert_eq!(keep(&runs[..2]), [1, 1, 0]);
        assert_eq!(keep(&runs[..2]), [1, 1, 0]);
        // Those before are put aside.
        assert_eq!(keep(&runs[1..3]), [2, 0, 0]);
        assert_eq!(keep(&runs[3..]), [3, 1, 1]);
        // The log is gone; then the counts, too.
        assert_eq!(keep(&[]), [3, 1, 1]);
        assert_eq!(keep(&runs[3..]), [3, 1, 1]);
        fs::write(folder.path().join(FILE), "{").expect("written");
        assert_eq!(keep(&runs[3..]), [1, 1, 1]);
    }
}
