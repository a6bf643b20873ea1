//! Figures of runs as metrics: the text format of Prometheus, version 0.0.4.
//!
//! Counters count runs that ended, also those that logs no longer hold, so they never go back. The label is `job_id`: `job` is what
//! Prometheus calls what it asks.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::time::Duration;

use jiff::{SignedDuration, Timestamp};

use super::Reported;
use crate::cli::text::Shown;
use crate::job::figures::{Counts, RunFigures, StageCounts, VmFigures};
use crate::job::log::{RunStatus, VmStatus};

/// Values of one name.
struct Family {
    name: String,
    kind: &'static str,
    help: String,
    samples: String,
}

impl Family {
    fn gauge(name: &str, help: &str) -> Self {
        Self { name: name.to_owned(), kind: "gauge", help: help.to_owned(), samples: String::new() }
    }

    fn counter(name: &str, help: &str) -> Self {
        Self { kind: "counter", ..Self::gauge(name, help) }
    }

    /// Adds a value.
    fn add(&mut self, labels: &[(&str, &str)], value: impl std::fmt::Display) {
        let label = |(name, text): &(&str, &str)| format!("{name}=\"{}\"", escaped(text));
        let labels: Vec<String> = labels.iter().map(label).collect();
        // Writing to a String cannot fail.
        let _ = writeln!(self.samples, "{}{{{}}} {value}", self.name, labels.join(","));
    }
}

/// Escapes the value of a label. Control characters are shown as on a terminal: parsers do not agree on where lines end.
fn escaped(text: &str) -> String {
    Shown(text).to_string().replace('\\', r"\\").replace('"', "\\\"")
}

/// Writes seconds to the millisecond.
fn seconds(time: Duration) -> String {
    format!("{}.{:03}", time.as_secs(), time.subsec_millis())
}

/// Writes a time as seconds since 1970; 0 for none.
fn timestamp(time: Option<Timestamp>) -> i64 {
    time.map_or(0, Timestamp::as_second)
}

/// Returns what labels call how a run stands.
fn status_label(status: RunStatus) -> &'static str {
    match status {
        RunStatus::Running => "running",
        RunStatus::Done => "done",
        RunStatus::MergePending => "merge_pending",
        RunStatus::Partial => "partial",
        RunStatus::Failed => "failed",
        RunStatus::Interrupted => "interrupted",
    }
}

/// Returns what labels call how a machine ended.
fn vm_status_label(status: VmStatus) -> &'static str {
    match status {
        VmStatus::Done => "done",
        VmStatus::Partial => "partial",
        VmStatus::Failed => "failed",
        VmStatus::LeftOut => "left_out",
        VmStatus::Interrupted => "interrupted",
    }
}

/// Writes all that is known of jobs.
pub fn to_text(jobs: &[Reported]) -> String {
    let transfers = stages(jobs, "transfer", |counts| &counts.transfers);
    let merges = stages(jobs, "merge", |counts| &counts.merges);
    let families = [of_jobs(jobs), of_vms(jobs), runs(jobs), transfers, merges].into_iter().flatten();
    let mut text = String::new();
    for family in families.filter(|family| !family.samples.is_empty()) {
        let Family { name, kind, help, samples } = family;
        let _ = write!(text, "# HELP {name} {help}\n# TYPE {name} {kind}\n{samples}");
    }
    text
}

fn of_jobs(jobs: &[Reported]) -> Vec<Family> {
    let mut valid = Family::gauge("xofs_job_valid", "Whether the file of the job is right.");
    let mut begun = Family::gauge("xofs_job_last_run_timestamp_seconds", "When the last run began.");
    let mut good = Family::gauge(
        "xofs_job_last_success_timestamp_seconds",
        "When the last run ended that made a new backup of each machine in each repository; 0 if none did.",
    );
    let mut stands =
        Family::gauge("xofs_job_run_status", "How the last run stands: 1 for that status, 0 for the others.");
    let mut took = Family::gauge("xofs_job_last_run_duration_seconds", "How long the last run took, if it ended.");
    let mut vms = Family::gauge("xofs_job_last_run_vms", "Machines of the last run, by how their last try ended.");
    let mut read = Family::gauge("xofs_job_last_run_read_bytes", "Bytes that the last run read of disks.");
    let mut stored =
        Family::gauge("xofs_job_last_run_stored_bytes", "Bytes that the last run stored, in all repositories.");
    let mut pending =
        Family::gauge("xofs_job_last_run_merges_pending", "Repositories in which not all that expired was forgotten.");
    for job in jobs {
        let id = ("job_id", job.id.as_str());
        valid.add(&[id], u8::from(job.is_right));
        let Some(last) = job.runs.last() else { continue };
        let is_good = |run: &&RunFigures| matches!(run.status, RunStatus::Done | RunStatus::MergePending);
        begun.add(&[id], timestamp(Some(last.begun)));
        good.add(&[id], timestamp(job.runs.iter().rev().find(is_good).map(|run| run.last)));
        for status in RunStatus::ALL {
            stands.add(&[id, ("status", status_label(status))], u8::from(last.status == status));
        }
        last.took.into_iter().for_each(|time| took.add(&[id], seconds(time)));
        for status in VmStatus::ALL {
            let count = last.vms.iter().filter(|vm| vm.status == Some(status)).count();
            vms.add(&[id, ("status", vm_status_label(status))], count);
        }
        read.add(&[id], last.read());
        stored.add(&[id], last.stored());
        pending.add(&[id], last.merges.iter().filter(|merge| merge.is_done == Some(false)).count());
    }
    vec![valid, begun, good, stands, took, vms, read, stored, pending]
}

fn of_vms(jobs: &[Reported]) -> Vec<Family> {
    let mut family = Family::gauge(
        "xofs_vm_last_backup_timestamp_seconds",
        "When the job made the last backup of the machine in each repository; 0 if its log has none.",
    );
    for job in jobs {
        for (vm, last) in last_backups(&job.runs) {
            let labels = [("job_id", job.id.as_str()), ("pool", &vm.pool), ("vm", &vm.vm), ("vm_name", &vm.name)];
            family.add(&labels, timestamp(last));
        }
    }
    vec![family]
}

/// Returns when the machines of the last run were backed up last; also those of earlier runs, back to one that reached all it meant.
fn last_backups(runs: &[RunFigures]) -> Vec<(&VmFigures, Option<Timestamp>)> {
    let mut machines: BTreeMap<&str, &VmFigures> = BTreeMap::new();
    for run in runs.iter().rev() {
        let (reached, missed): (Vec<_>, Vec<_>) = run.vms.iter().partition(|vm| !vm.vm.is_empty());
        let is_whole = !reached.is_empty() && missed.is_empty() && run.status != RunStatus::Interrupted;
        for vm in reached {
            machines.entry(&vm.vm).or_insert(vm);
        }
        if is_whole && run.status != RunStatus::Running {
            break;
        }
    }
    let good = |run: &RunFigures, vm: &VmFigures| {
        let is_it = |known: &&VmFigures| known.vm == vm.vm && known.status == Some(VmStatus::Done);
        let ended = SignedDuration::try_from(run.vms.iter().find(is_it)?.ended).ok()?;
        run.begun.checked_add(ended).ok()
    };
    machines.into_values().map(|vm| (vm, runs.iter().rev().find_map(|run| good(run, vm)))).collect()
}

fn runs(jobs: &[Reported]) -> Vec<Family> {
    let mut runs = Family::counter("xofs_job_runs_total", "Runs, by how they ended.");
    let mut vms = Family::counter("xofs_job_vms_total", "Machines of runs, by how their last try ended.");
    let mut merges = Family::counter("xofs_merges_total", "Merges in repositories, by whether all was done.");
    let mut took = Family::counter("xofs_merge_seconds_total", "How long merges in repositories took.");
    for job in jobs {
        let id = ("job_id", job.id.as_str());
        for (status, count) in &job.counts.runs {
            runs.add(&[id, ("status", status_label(*status))], count);
        }
        for (status, count) in &job.counts.vms {
            vms.add(&[id, ("status", vm_status_label(*status))], count);
        }
        for (repository, counts) in &job.counts.repositories {
            let of = ("repository", repository.as_str());
            merges.add(&[id, of, ("status", "done")], counts.done);
            merges.add(&[id, of, ("status", "pending")], counts.pending);
            took.add(&[id, of], seconds(counts.took));
        }
    }
    vec![runs, vms, merges, took]
}

/// Writes the stages of transfers, or of merges.
fn stages(jobs: &[Reported], what: &str, of: fn(&Counts) -> &[StageCounts]) -> Vec<Family> {
    let family = |name: &str, help: &str| {
        Family::counter(&format!("xofs_{what}_{name}_total"), &format!("{help} of {what}s, of runs that ended."))
    };
    let mut bytes = family("bytes", "Bytes that passed a stage");
    let mut busy = family("busy_seconds", "Time that the workers of a stage were at work,");
    let mut input = family("input_wait_seconds", "Time that the workers of a stage waited for what is before them,");
    let mut output = family("output_wait_seconds", "Time that the workers of a stage waited for what is behind them,");
    let mut limited = family("limited", "How often the others waited for a stage");
    for job in jobs {
        for stage in of(&job.counts) {
            let labels = [
                ("job_id", job.id.as_str()),
                ("stage", &stage.stage),
                ("kind", stage.of.kind.name()),
                ("name", &stage.of.name),
                ("pool", stage.pool.as_deref().unwrap_or_default()),
            ];
            bytes.add(&labels, stage.bytes);
            busy.add(&labels, seconds(stage.busy));
            input.add(&labels, seconds(stage.input));
            output.add(&labels, seconds(stage.output));
            limited.add(&labels, stage.limited);
        }
    }
    vec![bytes, busy, input, output, limited]
}
