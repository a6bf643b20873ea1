//! What all runs of a job did that ever ended, also those that its log no longer holds: counters that never go back.
//!
//! `totals.json` beside the log holds the counts of all runs up to one that it names. Who begins a run adds those that ended since; who
//! reads adds what the log has after the run that is named. So nothing is counted twice or lost, whatever is killed when, unless a log is
//! put aside that nobody could add because the disk was full.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read};
use std::path::Path;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::run::RunFigures;
use super::transfer::{Place, Transfer};
use crate::job::log::{RunStatus, VmStatus};
use crate::whole;

/// The file, in the folder of a job.
const FILE: &str = "totals.json";
/// No such file is longer (bytes).
const LONGEST: u64 = 8 << 20;

/// What is kept in the file.
#[derive(Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct Totals {
    /// The last run that is counted.
    through: Option<Uuid>,
    counts: Counts,
}

/// What runs did that ended.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct Counts {
    /// Runs, by how they ended.
    pub runs: BTreeMap<RunStatus, u64>,
    /// Machines of them, by how their last try ended.
    pub vms: BTreeMap<VmStatus, u64>,
    /// Stages of transfers.
    pub transfers: Vec<StageCounts>,
    /// Stages of merges.
    pub merges: Vec<StageCounts>,
    /// Merges, by repository.
    pub repositories: BTreeMap<String, MergeCounts>,
}

/// One stage at one place.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct StageCounts {
    /// The stage.
    pub stage: String,
    /// Where.
    pub of: Place,
    /// In which pool that is.
    pub pool: Option<String>,
    /// Bytes that passed.
    pub bytes: u64,
    /// Time at work.
    pub busy: Duration,
    /// Time blocked on input.
    pub input: Duration,
    /// Time blocked on output.
    pub output: Duration,
    /// In how many transfers the others waited for it.
    pub limited: u64,
}

/// The merges in a repository.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct MergeCounts {
    /// How often all was done.
    pub done: u64,
    /// How often not.
    pub pending: u64,
    /// How long they took.
    pub took: Duration,
}

impl Totals {
    /// Reads those of a job from its folder. What cannot be understood is as if nothing had been kept.
    ///
    /// # Errors
    /// What the system says.
    pub fn read(folder: &Path) -> io::Result<Self> {
        let mut bytes = Vec::new();
        match File::open(folder.join(FILE)) {
            Ok(file) => file.take(LONGEST).read_to_end(&mut bytes)?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => 0,
            Err(error) => return Err(error),
        };
        Ok(serde_json::from_slice(&bytes).unwrap_or_default())
    }

    /// Adds the runs of a log that ended since, and keeps that. The lock of the job must be held.
    ///
    /// # Errors
    /// What the system says; then it is as it was.
    pub fn keep(folder: &Path, runs: &[RunFigures]) -> io::Result<()> {
        let before = Self::read(folder)?;
        let through = runs.iter().rev().find(|run| run.status != RunStatus::Running).map(|run| run.id);
        if through.is_none() || through == before.through {
            return Ok(());
        }
        let fresh = Self { through, counts: before.counts(runs) };
        whole::replace(&folder.join(FILE), ".totals.new".as_ref(), &serde_json::to_vec(&fresh)?, 0o600, true)
    }

    /// Returns what was counted, and what the runs of the log did after the last one of these.
    #[must_use]
    pub fn counts(self, runs: &[RunFigures]) -> Counts {
        let counted = runs.iter().rposition(|run| Some(run.id) == self.through).map_or(0, |last| last + 1);
        let mut counts = self.counts;
        runs.iter().skip(counted).filter(|run| run.status != RunStatus::Running).for_each(|run| counts.add(run));
        counts
    }
}

impl Counts {
    fn add(&mut self, run: &RunFigures) {
        add(self.runs.entry(run.status).or_default(), 1);
        for vm in &run.vms {
            if let Some(status) = vm.status {
                add(self.vms.entry(status).or_default(), 1);
            }
            vm.transfer.iter().for_each(|transfer| add_stages(&mut self.transfers, transfer));
        }
        for merge in &run.merges {
            let merges = self.repositories.entry(merge.repository.clone()).or_default();
            add(if merge.is_done == Some(true) { &mut merges.done } else { &mut merges.pending }, 1);
            merges.took = merges.took.saturating_add(merge.took);
            merge.transfer.iter().for_each(|transfer| add_stages(&mut self.merges, transfer));
        }
    }
}

fn add(count: &mut u64, more: u64) {
    *count = count.saturating_add(more);
}

fn add_stages(all: &mut Vec<StageCounts>, transfer: &Transfer) {
    let slowest = transfer.slowest();
    for (number, stage) in transfer.stages.iter().enumerate() {
        let key = |counts: &StageCounts| (counts.of.clone(), counts.pool.clone(), counts.stage.clone());
        let wanted = (stage.of.clone(), stage.pool.clone(), stage.name.clone());
        let at = match all.binary_search_by_key(&wanted, key) {
            Ok(at) => at,
            Err(at) => {
                let (of, pool, stage) = wanted;
                let [busy, input, output] = [Duration::ZERO; 3];
                all.insert(at, StageCounts { stage, of, pool, bytes: 0, busy, input, output, limited: 0 });
                at
            }
        };
        let Some(counts) = all.get_mut(at) else { continue };
        add(&mut counts.bytes, stage.bytes);
        add(&mut counts.limited, u64::from(slowest == Some(number)));
        counts.busy = counts.busy.saturating_add(stage.busy);
        counts.input = counts.input.saturating_add(stage.input);
        counts.output = counts.output.saturating_add(stage.output);
    }
}
