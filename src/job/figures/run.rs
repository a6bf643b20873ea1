//! The figures of one run, by the lines of its log.

use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use serde_json::Value;
use uuid::Uuid;

use super::transfer::{Transfer, duration};
use crate::job::log::{Event, History, Record, Run, RunStatus, VmStatus};

/// What is said of what was begun with by a run that was cut off.
pub const CUT_OFF: &str = "the process of the run ended before it did";

/// One run.
#[derive(Debug, Clone, PartialEq)]
pub struct RunFigures {
    /// Which.
    pub id: Uuid,
    /// Its job.
    pub job: String,
    /// The schedule that it counts for.
    pub schedule: Option<String>,
    /// When it began.
    pub begun: Timestamp,
    /// When its last line was written; never before it began, whatever the clock said.
    pub last: Timestamp,
    /// How it stands.
    pub status: RunStatus,
    /// Why, unless it is good.
    pub reason: Option<String>,
    /// How long it took, if it said so in the end.
    pub took: Option<Duration>,
    /// The last try of each machine, in the order in which they were begun with.
    pub vms: Vec<VmFigures>,
    /// What expired and was forgotten, by repository.
    pub merges: Vec<MergeFigures>,
    /// What failed, each try of it.
    pub failures: Vec<Failure>,
}

/// One machine, in its last try.
#[derive(Debug, Clone, PartialEq)]
pub struct VmFigures {
    /// Its uuid; empty for what could not be tried.
    pub vm: String,
    /// Its name.
    pub name: String,
    /// Its pool.
    pub pool: String,
    /// Which try it was.
    pub attempt: u32,
    /// How it ended; `None` if it has not.
    pub status: Option<VmStatus>,
    /// Why, unless it is good.
    pub reason: Option<String>,
    /// What happens next, unless it is good.
    pub next: Option<String>,
    /// When it ended, since the run began.
    pub ended: Duration,
    /// How long it took.
    pub took: Duration,
    /// Bytes that were read of its disks.
    pub read: u64,
    /// Bytes that were stored, in all repositories and replicas together.
    pub stored: u64,
    /// The transfer, if it was told.
    pub transfer: Option<Transfer>,
}

/// What a run forgot and merged in a repository.
#[derive(Debug, Clone, PartialEq)]
pub struct MergeFigures {
    /// Where.
    pub repository: String,
    /// Whether all of it was done; `None` if it has not ended.
    pub is_done: Option<bool>,
    /// Why not.
    pub reason: Option<String>,
    /// What happens next, if not.
    pub next: Option<String>,
    /// When it ended, since the run began.
    pub ended: Duration,
    /// How long it took.
    pub took: Duration,
    /// Backups that were forgotten.
    pub forgotten: u64,
    /// Disks that were merged.
    pub merged: u64,
    /// How its time was spent, if it was told.
    pub transfer: Option<Transfer>,
}

/// Something that failed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failure {
    /// What: a machine, a repository.
    pub of: String,
    /// Why.
    pub reason: String,
    /// Whether it was a merge.
    pub is_merge: bool,
    /// When.
    pub time: Timestamp,
}

impl VmFigures {
    /// Whether it is a machine: else a pool, a repository, or what a job names and no pool has, of which there is no uuid.
    #[must_use]
    pub fn is_machine(&self) -> bool {
        !self.vm.is_empty()
    }
}

impl RunFigures {
    /// Reads the runs of a log, oldest first.
    #[must_use]
    pub fn all(history: &History) -> Vec<Self> {
        history.runs.iter().map(Self::of).collect()
    }

    /// Reads the lines of a run.
    #[must_use]
    pub fn of(run: &Run) -> Self {
        let begun = run.records.first().map(|record| record.time).unwrap_or_default();
        let mut figures = Self {
            id: run.id,
            job: String::new(),
            schedule: None,
            begun,
            last: begun,
            status: run.status,
            reason: None,
            took: None,
            vms: Vec::new(),
            merges: Vec::new(),
            failures: Vec::new(),
        };
        let (mut since, mut before) = (Duration::ZERO, begun);
        for record in &run.records {
            // A clock that went back says nothing of how long something took.
            let step = record.time.duration_since(before);
            since = since.saturating_add(Duration::try_from(step).unwrap_or_default());
            before = record.time;
            figures.add(record, since);
        }
        figures.last =
            SignedDuration::try_from(since).ok().and_then(|since| begun.checked_add(since).ok()).unwrap_or(begun);
        if run.status != RunStatus::Running {
            figures.cut_off();
        }
        figures
    }

    fn add(&mut self, record: &Record, since: Duration) {
        match &record.event {
            // Says nothing of the run itself.
            Event::ReportEnd { .. } => {}
            Event::RunStart { job, schedule, .. } => (self.job, self.schedule) = (job.clone(), schedule.clone()),
            Event::RunEnd { reason, seconds, .. } => {
                (self.reason, self.took) = (reason.clone(), Some(duration(*seconds)));
                self.fail(reason.as_deref().map(|reason| (self.job.clone(), reason)), false, record.time);
            }
            Event::VmStart { vm, name, pool, attempt } => self.put(VmFigures {
                vm: vm.clone(),
                name: name.clone(),
                pool: pool.clone(),
                attempt: *attempt,
                status: None,
                reason: None,
                next: None,
                ended: since,
                took: Duration::ZERO,
                read: 0,
                stored: 0,
                transfer: None,
            }),
            Event::VmEnd { vm, name, pool, attempt, status, reason, next, seconds, backup } => {
                let backup = backup.as_ref().unwrap_or(&Value::Null);
                let transfer = Transfer::of(backup);
                let read = read(backup, transfer.as_ref());
                self.fail_vm(name, *status, reason.as_deref(), backup, record.time);
                self.put(VmFigures {
                    vm: vm.clone(),
                    name: name.clone(),
                    pool: pool.clone(),
                    attempt: *attempt,
                    status: Some(*status),
                    reason: reason.clone(),
                    next: next.clone(),
                    ended: since,
                    took: duration(*seconds),
                    read,
                    stored: stored(backup),
                    transfer,
                });
            }
            Event::MergeStart { repository } => self.merges.push(MergeFigures {
                repository: repository.clone(),
                is_done: None,
                reason: None,
                next: None,
                ended: since,
                took: Duration::ZERO,
                forgotten: 0,
                merged: 0,
                transfer: None,
            }),
            Event::MergeEnd { repository, is_done, reason, next, seconds, result } => {
                let result = result.as_ref().unwrap_or(&Value::Null);
                if !is_done {
                    self.fail(reason.as_deref().map(|reason| (repository.clone(), reason)), true, record.time);
                }
                let vms = || result["applied"]["vms"].as_array().into_iter().flatten();
                let merge = MergeFigures {
                    repository: repository.clone(),
                    is_done: Some(*is_done),
                    reason: reason.clone(),
                    next: next.clone(),
                    ended: since,
                    took: duration(*seconds),
                    forgotten: sum(vms().map(|vm| vm["forgotten"].as_array().map_or(0, |all| all.len() as u64))),
                    merged: sum(vms().map(|vm| vm["mergedDisks"].as_u64().unwrap_or_default())),
                    transfer: Transfer::of(result).or_else(|| Transfer::of(&result["applied"])),
                };
                let begun = |known: &&mut MergeFigures| known.repository == *repository && known.is_done.is_none();
                match self.merges.iter_mut().find(begun) {
                    Some(known) => *known = merge,
                    None => self.merges.push(merge),
                }
            }
        }
    }

    /// Notes a try of a machine, in the place of the one before.
    fn put(&mut self, vm: VmFigures) {
        match self.vms.iter_mut().find(|known| vm.is_machine() && known.vm == vm.vm) {
            Some(known) => *known = vm,
            None => self.vms.push(vm),
        }
    }

    /// Notes what failed of a try: where repositories are told apart, each of them.
    fn fail_vm(&mut self, name: &str, status: VmStatus, reason: Option<&str>, backup: &Value, time: Timestamp) {
        if matches!(status, VmStatus::Done | VmStatus::LeftOut) {
            return;
        }
        let mut is_told = false;
        for repository in backup["repositories"].as_array().into_iter().flatten() {
            let Some(reason) = repository["error"].as_str() else { continue };
            is_told = true;
            let of = format!("{name} in {}", repository["repository"].as_str().unwrap_or_default());
            self.fail(Some((of, reason)), false, time);
        }
        if !is_told {
            self.fail(reason.map(|reason| (name.to_owned(), reason)), false, time);
        }
    }

    fn fail(&mut self, failed: Option<(String, &str)>, is_merge: bool, time: Timestamp) {
        let failure = |(of, reason): (String, &str)| Failure { of, reason: reason.to_owned(), is_merge, time };
        self.failures.extend(failed.map(failure));
    }

    /// Says of what was begun with that it did not end.
    fn cut_off(&mut self) {
        let mut failed = Vec::new();
        for vm in self.vms.iter_mut().filter(|vm| vm.status.is_none()) {
            (vm.status, vm.reason) = (Some(VmStatus::Interrupted), Some(CUT_OFF.to_owned()));
            failed.push((vm.name.clone(), false));
        }
        for merge in self.merges.iter_mut().filter(|merge| merge.is_done.is_none()) {
            (merge.is_done, merge.reason) = (Some(false), Some(CUT_OFF.to_owned()));
            failed.push((merge.repository.clone(), true));
        }
        for (of, is_merge) in failed {
            self.fail(Some((of, CUT_OFF)), is_merge, self.last);
        }
    }

    /// Returns how many bytes were read in all.
    #[must_use]
    pub fn read(&self) -> u64 {
        sum(self.vms.iter().map(|vm| vm.read))
    }

    /// Returns how many bytes were stored in all.
    #[must_use]
    pub fn stored(&self) -> u64 {
        sum(self.vms.iter().map(|vm| vm.stored))
    }
}

/// Adds what a hostile log may say.
pub(super) fn sum(numbers: impl Iterator<Item = u64>) -> u64 {
    numbers.fold(0, u64::saturating_add)
}

fn read(backup: &Value, transfer: Option<&Transfer>) -> u64 {
    let disks = backup["reads"].as_array().into_iter().flatten();
    let passes = disks.flat_map(|disk| disk["passes"].as_array().into_iter().flatten());
    let of_disks = sum(passes.filter_map(|pass| pass["bytes"].as_u64()));
    let of_stage =
        |transfer: &Transfer| transfer.stages.iter().find(|stage| stage.name == "read").map(|stage| stage.bytes);
    // A full backup has no disks that are read one by one.
    if of_disks > 0 { of_disks } else { transfer.and_then(of_stage).unwrap_or_default() }
}

fn stored(backup: &Value) -> u64 {
    let repositories = backup["repositories"].as_array().into_iter().flatten();
    let of_one = |repository: &Value| {
        let disks = repository["disks"].as_array().into_iter().flatten();
        let xva = repository["xva"]["bytes"].as_u64();
        sum(disks.filter_map(|disk| disk["storedBytes"].as_u64()).chain(xva))
    };
    sum(repositories.map(of_one))
}
