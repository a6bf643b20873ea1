//! What several runs did together: by stage, by host, SR, network and repository; and what failed, by reason.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use jiff::{SignedDuration, Timestamp};

use super::run::{RunFigures, sum};
use super::transfer::{Place, Times, Transfer, learn, rate};
use crate::job::log::{RunStatus, VmStatus};
use crate::probe::Kind;

/// Several runs.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Sums {
    /// How many runs stand how; those that there are, best first.
    pub runs: Vec<(RunStatus, u64)>,
    /// How many machines ended how, in their last try.
    pub vms: Vec<(VmStatus, u64)>,
    /// Bytes that were read of disks.
    pub read: u64,
    /// Bytes that were stored.
    pub stored: u64,
    /// The transfers.
    pub transfers: Work,
    /// The merges, which are no part of them.
    pub merges: Work,
    /// How the merges ended, by repository.
    pub repositories: Vec<Merged>,
    /// What failed, most often first.
    pub failures: Vec<Failures>,
}

/// What was done by stages.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Work {
    /// How many transfers told of their stages.
    pub count: u64,
    /// By stage, wherever it was.
    pub by_stage: Vec<Row>,
    /// By place and stage: hosts first, then SRs, networks, repositories, and this machine.
    pub by_place: Vec<Row>,
}

/// One stage, or one stage at one place, in several transfers.
#[derive(Debug, Clone, PartialEq)]
pub struct Row {
    /// The stage.
    pub stage: String,
    /// Where, and in which pool; `None` for all places together.
    pub of: Option<(Place, Option<String>)>,
    /// How many transfers had it.
    pub transfers: u64,
    /// In how many of them the others waited for it.
    pub limited: u64,
    /// Bytes that passed.
    pub bytes: u64,
    /// How long at least one of these transfers ran.
    pub active: Duration,
    /// How its workers spent their time.
    pub times: Times,
}

/// The merges in a repository.
#[derive(Debug, Clone, PartialEq)]
pub struct Merged {
    /// Where.
    pub repository: String,
    /// How often all was done.
    pub done: u64,
    /// How often not.
    pub pending: u64,
    /// How long they took.
    pub took: Duration,
    /// Backups that were forgotten.
    pub forgotten: u64,
    /// Disks that were merged.
    pub merged: u64,
}

/// What failed for one reason.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failures {
    /// The reason.
    pub reason: String,
    /// Whether merges failed for it.
    pub is_merge: bool,
    /// How often.
    pub count: u64,
    /// What failed: machines, repositories.
    pub of: BTreeSet<String>,
    /// When it failed last.
    pub last: Timestamp,
}

impl Row {
    /// Returns bytes a second, of the time in which anything of it ran.
    #[must_use]
    pub fn rate(&self) -> u64 {
        rate(self.bytes, self.active)
    }
}

impl Sums {
    /// Adds up runs.
    #[must_use]
    pub fn of(runs: &[RunFigures]) -> Self {
        let (mut transfers, mut merges) = (Adding::default(), Adding::default());
        for run in runs {
            for vm in &run.vms {
                transfers.add(vm.transfer.as_ref(), at(run.begun, vm.ended));
            }
            for merge in &run.merges {
                merges.add(merge.transfer.as_ref(), at(run.begun, merge.ended));
            }
        }
        let vms = || runs.iter().flat_map(|run| &run.vms).filter(|vm| vm.is_machine()).filter_map(|vm| vm.status);
        Self {
            runs: counted(&RunStatus::ALL, runs.iter().map(|run| run.status)),
            vms: counted(&VmStatus::ALL, vms()),
            read: sum(runs.iter().map(RunFigures::read)),
            stored: sum(runs.iter().map(RunFigures::stored)),
            transfers: transfers.work(),
            merges: merges.work(),
            repositories: repositories(runs),
            failures: failures(runs),
        }
    }
}

/// Counts values; of `all`, those that there are.
fn counted<T: Copy + PartialEq>(all: &[T], values: impl Iterator<Item = T> + Clone) -> Vec<(T, u64)> {
    let count = |value: &T| (*value, values.clone().filter(|other| other == value).count() as u64);
    all.iter().map(count).filter(|(_, count)| *count > 0).collect()
}

/// Returns the time that is so long after another.
fn at(begun: Timestamp, since: Duration) -> Timestamp {
    SignedDuration::try_from(since).ok().and_then(|since| begun.checked_add(since).ok()).unwrap_or(Timestamp::MAX)
}

/// What is known of a row while it is added up.
#[derive(Default)]
struct Added {
    transfers: u64,
    limited: u64,
    bytes: u64,
    times: Times,
    /// When the transfers ran.
    spans: Vec<(Timestamp, Timestamp)>,
}

type PlaceKey = (Kind, String, Option<String>);

#[derive(Default)]
struct Adding {
    count: u64,
    /// The names of stages in their order.
    order: Vec<String>,
    by_stage: BTreeMap<String, Added>,
    by_place: BTreeMap<(PlaceKey, String), Added>,
}

impl Adding {
    fn add(&mut self, transfer: Option<&Transfer>, ended: Timestamp) {
        let Some(transfer) = transfer else { return };
        let length = SignedDuration::try_from(transfer.took).unwrap_or_default();
        let span = (ended.checked_sub(length).unwrap_or(ended), ended);
        self.count += 1;
        learn(&mut self.order, &transfer.stages);
        let slowest = transfer.slowest();
        let mut seen = BTreeSet::new();
        for (number, stage) in transfer.stages.iter().enumerate() {
            let is_slowest = slowest == Some(number);
            let is_first = seen.insert(&stage.name);
            let times = stage.times(transfer.took);
            let of_stage = self.by_stage.entry(stage.name.clone()).or_default();
            of_stage.add(stage.bytes, times, span, is_slowest, is_first);
            let place = (stage.of.kind, stage.of.name.clone(), stage.pool.clone());
            let at_place = self.by_place.entry((place, stage.name.clone())).or_default();
            at_place.add(stage.bytes, times, span, is_slowest, true);
        }
    }

    fn work(self) -> Work {
        let rank = |stage: &str| self.order.iter().position(|known| known == stage);
        let mut by_stage: Vec<Row> = self.by_stage.into_iter().map(|(stage, added)| added.row(stage, None)).collect();
        by_stage.sort_by_key(|row| rank(&row.stage));
        let row = |(((kind, name, pool), stage), added): ((PlaceKey, String), Added)| {
            added.row(stage, Some((Place { kind, name }, pool)))
        };
        let mut by_place: Vec<Row> = self.by_place.into_iter().map(row).collect();
        by_place.sort_by(|a, b| (&a.of, rank(&a.stage)).cmp(&(&b.of, rank(&b.stage))));
        Work { count: self.count, by_stage, by_place }
    }
}

impl Added {
    fn add(&mut self, bytes: u64, times: Times, span: (Timestamp, Timestamp), is_slowest: bool, is_first: bool) {
        self.transfers += u64::from(is_first);
        self.limited += u64::from(is_slowest);
        self.bytes = self.bytes.saturating_add(bytes);
        self.times.add(times);
        self.spans.push(span);
    }

    fn row(self, stage: String, of: Option<(Place, Option<String>)>) -> Row {
        let Self { transfers, limited, bytes, times, spans } = self;
        Row { stage, of, transfers, limited, bytes, active: covered(spans), times }
    }
}

/// Returns how long at least one of several spans lasted.
fn covered(mut spans: Vec<(Timestamp, Timestamp)>) -> Duration {
    spans.sort_unstable();
    let (mut all, mut until) = (Duration::ZERO, Timestamp::MIN);
    for (from, to) in spans {
        let more = to.duration_since(from.max(until));
        all = all.saturating_add(Duration::try_from(more).unwrap_or_default());
        until = until.max(to);
    }
    all
}

fn repositories(runs: &[RunFigures]) -> Vec<Merged> {
    let mut all: BTreeMap<&str, Merged> = BTreeMap::new();
    for merge in runs.iter().flat_map(|run| &run.merges) {
        let merged = all.entry(&merge.repository).or_insert_with(|| Merged {
            repository: merge.repository.clone(),
            done: 0,
            pending: 0,
            took: Duration::ZERO,
            forgotten: 0,
            merged: 0,
        });
        match merge.is_done {
            Some(true) => merged.done += 1,
            Some(false) => merged.pending += 1,
            None => {}
        }
        merged.took = merged.took.saturating_add(merge.took);
        merged.forgotten = merged.forgotten.saturating_add(merge.forgotten);
        merged.merged = merged.merged.saturating_add(merge.merged);
    }
    all.into_values().collect()
}

fn failures(runs: &[RunFigures]) -> Vec<Failures> {
    let mut all: BTreeMap<(bool, &str), Failures> = BTreeMap::new();
    for failure in runs.iter().flat_map(|run| &run.failures) {
        let failures = all.entry((failure.is_merge, &failure.reason)).or_insert_with(|| Failures {
            reason: failure.reason.clone(),
            is_merge: failure.is_merge,
            count: 0,
            of: BTreeSet::new(),
            last: failure.time,
        });
        failures.count += 1;
        failures.of.insert(failure.of.clone());
        failures.last = failures.last.max(failure.time);
    }
    let mut all: Vec<Failures> = all.into_values().collect();
    all.sort_by_key(|failures| std::cmp::Reverse(failures.count));
    all
}
