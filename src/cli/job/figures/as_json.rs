//! Figures of runs as JSON: docs/job-report.schema.json.

use std::time::Duration;

use serde_json::{Value, json};

use super::Selection;
use crate::job::figures::{
    Failures, MergeFigures, Merged, Place, Row, RunFigures, Shares, Stage, Sums, Transfer, VmFigures, Work, rate,
};

/// The version of the schema.
const VERSION: u32 = 1;

/// Says the runs, and their sums.
pub fn to_json(selection: &Selection) -> Value {
    json!({
        "version": VERSION,
        "time": selection.now,
        "since": selection.since,
        "unreadLines": selection.unread,
        "runs": selection.runs.iter().map(run).collect::<Vec<_>>(),
        "sums": sums(&Sums::of(&selection.runs)),
    })
}

fn run(run: &RunFigures) -> Value {
    json!({
        "job": run.job,
        "schedule": run.schedule,
        "run": run.id,
        "time": run.begun,
        "status": run.status,
        "reason": run.reason,
        "seconds": run.took.as_ref().map(Duration::as_secs_f64),
        "readBytes": run.read(),
        "storedBytes": run.stored(),
        "vms": run.vms.iter().map(vm).collect::<Vec<_>>(),
        "merges": run.merges.iter().map(merge).collect::<Vec<_>>(),
    })
}

fn vm(vm: &VmFigures) -> Value {
    json!({
        "vm": vm.vm,
        "name": vm.name,
        "pool": vm.pool,
        "attempt": vm.attempt,
        "status": vm.status,
        "reason": vm.reason,
        "next": vm.next,
        "seconds": vm.took.as_secs_f64(),
        "readBytes": vm.read,
        "storedBytes": vm.stored,
        "transfer": vm.transfer.as_ref().map(transfer),
    })
}

fn merge(merge: &MergeFigures) -> Value {
    json!({
        "repository": merge.repository,
        "isDone": merge.is_done,
        "reason": merge.reason,
        "next": merge.next,
        "seconds": merge.took.as_secs_f64(),
        "forgottenBackups": merge.forgotten,
        "mergedDisks": merge.merged,
        "transfer": merge.transfer.as_ref().map(transfer),
    })
}

fn transfer(transfer: &Transfer) -> Value {
    let stage = |stage: &Stage| {
        let moved = rate(stage.bytes, transfer.took);
        let times = stage.times(transfer.took);
        of_stage(&stage.name, Some((&stage.of, stage.pool.as_deref())), stage.bytes, moved, times.shares())
    };
    let bottleneck = transfer.bottleneck.as_ref();
    json!({
        "seconds": transfer.took.as_secs_f64(),
        "stages": transfer.stages.iter().map(stage).collect::<Vec<_>>(),
        "bottleneck": bottleneck.map(|one| json!({ "stage": one.stage, "of": one.of, "line": one.line })),
    })
}

fn of_stage(stage: &str, of: Option<(&Place, Option<&str>)>, bytes: u64, moved: u64, shares: Shares) -> Value {
    let part = |thousandths: u32| f64::from(thousandths) / 1000.0;
    json!({
        "stage": stage,
        "of": of.map(|(of, _)| of),
        "pool": of.and_then(|(_, pool)| pool),
        "bytes": bytes,
        "bytesPerSecond": moved,
        "busy": part(shares.busy),
        "waitsForInput": part(shares.input),
        "waitsForOutput": part(shares.output),
    })
}

fn sums(sums: &Sums) -> Value {
    json!({
        "runs": sums.runs.iter().map(|(status, count)| json!({ "status": status, "count": count })).collect::<Vec<_>>(),
        "vms": sums.vms.iter().map(|(status, count)| json!({ "status": status, "count": count })).collect::<Vec<_>>(),
        "readBytes": sums.read,
        "storedBytes": sums.stored,
        "transfers": work(&sums.transfers),
        "merges": work(&sums.merges),
        "repositories": sums.repositories.iter().map(merged).collect::<Vec<_>>(),
        "failures": sums.failures.iter().map(failures).collect::<Vec<_>>(),
    })
}

fn work(work: &Work) -> Value {
    let row = |row: &Row| {
        let of = row.of.as_ref().map(|(of, pool)| (of, pool.as_deref()));
        let mut value = of_stage(&row.stage, of, row.bytes, row.rate(), row.times.shares());
        value["transfers"] = json!(row.transfers);
        value["limited"] = json!(row.limited);
        value["seconds"] = json!(row.active.as_secs_f64());
        value
    };
    json!({
        "count": work.count,
        "byStage": work.by_stage.iter().map(row).collect::<Vec<_>>(),
        "byPlace": work.by_place.iter().map(row).collect::<Vec<_>>(),
    })
}

fn merged(merged: &Merged) -> Value {
    json!({
        "repository": merged.repository,
        "done": merged.done,
        "pending": merged.pending,
        "seconds": merged.took.as_secs_f64(),
        "forgottenBackups": merged.forgotten,
        "mergedDisks": merged.merged,
    })
}

fn failures(failures: &Failures) -> Value {
    json!({
        "reason": failures.reason,
        "isMerge": failures.is_merge,
        "count": failures.count,
        "of": failures.of,
        "last": failures.last,
    })
}
