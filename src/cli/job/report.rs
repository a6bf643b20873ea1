//! What is told of a run: for people, and as JSON.

use std::fmt::Write as _;

use serde_json::{Value, json};

use crate::cli::text::{Shown, count};
use crate::job::figures::CUT_OFF;
use crate::job::log::{Event, Record, Run, RunStatus, VmStatus};

/// How the last try of a machine ended.
#[derive(Debug)]
pub struct VmEnd<'a> {
    pub vm: &'a str,
    pub name: &'a str,
    pub pool: &'a str,
    pub attempt: u32,
    pub status: VmStatus,
    pub reason: Option<&'a str>,
    pub next: Option<&'a str>,
    pub seconds: f64,
    /// What a person should know of it, though it may be good: in sentences.
    pub remarks: Vec<String>,
}

impl VmEnd<'_> {
    /// Whether it is a machine: else a pool, a repository, or what a job names and no pool has, of which there is no uuid.
    fn is_machine(&self) -> bool {
        !self.vm.is_empty()
    }
}

/// Returns how the last try of each machine ended, in the order in which they were begun with. `is_dead`: what has no end had none.
pub fn last_tries(records: &[Record], is_dead: bool) -> Vec<VmEnd<'_>> {
    let mut ends: Vec<VmEnd> = Vec::new();
    for record in records {
        let end = match &record.event {
            Event::VmEnd { vm, name, pool, attempt, status, reason, next, seconds, backup } => VmEnd {
                vm,
                name,
                pool,
                attempt: *attempt,
                status: *status,
                reason: reason.as_deref(),
                next: next.as_deref(),
                seconds: *seconds,
                remarks: backup.as_ref().map(remarks).unwrap_or_default(),
            },
            // Until its end is found.
            Event::VmStart { vm, name, pool, attempt } if is_dead => VmEnd {
                vm,
                name,
                pool,
                attempt: *attempt,
                status: VmStatus::Interrupted,
                reason: Some(CUT_OFF),
                next: None,
                seconds: 0.0,
                remarks: Vec::new(),
            },
            _ => continue,
        };
        match ends.iter_mut().find(|known| end.is_machine() && known.vm == end.vm) {
            Some(known) => *known = end,
            None => ends.push(end),
        }
    }
    ends
}

/// Returns what is remarkable of a backup: disks that had to be read more than once.
fn remarks(backup: &Value) -> Vec<String> {
    let disks = backup["reads"].as_array().into_iter().flatten();
    let of_disk = |disk: &Value| {
        let name = disk["name"].as_str().unwrap_or_default().to_owned();
        let passes = disk["passes"].as_array().cloned().unwrap_or_default();
        let given_up = passes.into_iter().filter_map(|pass| pass["givenUp"].as_str().map(str::to_owned));
        given_up.map(move |why| format!("disk {name} was read again: {why}")).collect::<Vec<_>>()
    };
    disks.flat_map(of_disk).collect()
}

/// Says in a word how a run stands.
pub fn status_name(status: RunStatus) -> &'static str {
    match status {
        RunStatus::Running => "running",
        RunStatus::Done => "done",
        RunStatus::MergePending => "done, merge pending",
        RunStatus::Partial => "partly failed",
        RunStatus::Failed => "failed",
        RunStatus::Interrupted => "interrupted",
    }
}

/// Says in a word how a machine ended.
pub fn vm_status_name(status: VmStatus) -> &'static str {
    match status {
        VmStatus::Done => "done",
        VmStatus::Partial => "partly failed",
        VmStatus::Failed => "failed",
        VmStatus::LeftOut => "left out",
        VmStatus::Interrupted => "interrupted",
    }
}

/// Returns the job, the schedule and the reason that a run's lines tell.
fn head(run: &Run) -> (&str, Option<&str>, Option<&str>, Option<f64>) {
    let mut head = ("", None, None, None);
    for record in &run.records {
        match &record.event {
            Event::RunStart { job, schedule, .. } => (head.0, head.1) = (job, schedule.as_deref()),
            Event::RunEnd { reason, seconds, .. } => (head.2, head.3) = (reason.as_deref(), Some(*seconds)),
            _ => {}
        }
    }
    head
}

/// Says what became of a run, for people.
pub fn to_text(run: &Run) -> String {
    let (job, schedule, reason, seconds) = head(run);
    let ends = last_tries(&run.records, run.status == RunStatus::Interrupted);
    let time = run.records.first().map(|record| format!("{:.0}", record.time)).unwrap_or_default();
    let schedule = schedule.map(|name| format!(" ({name})")).unwrap_or_default();
    let took = seconds.map(|seconds| format!(" in {seconds:.1} s")).unwrap_or_default();
    let vms = ends.iter().filter(|end| end.is_machine()).count();
    let mut text = format!("{time}  {job}{schedule}: {}, {}{took}\n", status_name(run.status), count(vms, "VM"));
    // Writing to a String cannot fail.
    let mut explain = |reason: Option<&str>, next: Option<&str>, line: String| {
        let _ = write!(text, "  {line}");
        let why: Vec<&str> = [reason, next].into_iter().flatten().filter(|part| !part.is_empty()).collect();
        let colon = if why.is_empty() { "" } else { ": " };
        let _ = writeln!(text, "{colon}{}", Shown(&why.join("; ")));
    };
    if reason.is_some() {
        explain(reason, None, "all".to_owned());
    }
    for end in &ends {
        let tries = if end.attempt > 1 { format!(", try {}", end.attempt) } else { String::new() };
        let line = format!("{}  {}{tries}, {:.1} s", Shown(end.name), vm_status_name(end.status), end.seconds);
        explain(end.reason, end.next, line);
        end.remarks.iter().for_each(|remark| explain(None, None, format!("  {}", Shown(remark))));
    }
    for record in &run.records {
        let Event::MergeEnd { repository, is_done, reason, next, seconds, .. } = &record.event else { continue };
        let status = if *is_done { "merged" } else { "merge pending" };
        explain(reason.as_deref(), next.as_deref(), format!("{}  {status}, {seconds:.1} s", Shown(repository)));
    }
    text
}

/// Says the same as JSON.
pub fn to_json(run: &Run) -> Value {
    let (job, schedule, reason, seconds) = head(run);
    let vm = |end: &VmEnd| {
        json!({
            "vm": end.vm,
            "name": end.name,
            "pool": end.pool,
            "attempt": end.attempt,
            "status": end.status,
            "reason": end.reason,
            "next": end.next,
            "seconds": end.seconds,
            "remarks": end.remarks,
        })
    };
    let merge = |record: &Record| match &record.event {
        Event::MergeEnd { repository, is_done, reason, next, seconds, .. } => Some(json!({
            "repository": repository,
            "isDone": is_done,
            "reason": reason,
            "next": next,
            "seconds": seconds,
        })),
        _ => None,
    };
    json!({
        "job": job,
        "schedule": schedule,
        "run": run.id,
        "time": run.records.first().map(|record| record.time),
        "status": run.status,
        "reason": reason,
        "seconds": seconds,
        "vms": last_tries(&run.records, run.status == RunStatus::Interrupted).iter().map(vm).collect::<Vec<_>>(),
        "merges": run.records.iter().filter_map(merge).collect::<Vec<_>>(),
    })
}
