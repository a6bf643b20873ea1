//! Lines of logs, for tests of what is made of them.

use std::fs;

use serde_json::{Value, json};

use super::RunFigures;
use crate::job::log::History;

/// A name, or a reason, of somebody who means no good.
pub const HOSTILE: &str = "</script><b onload=1>&\"'\u{1b}[2J\u{202e}\n";

/// One stage as a log has it.
pub fn stage(name: &str, kind: &str, of: &str, bytes: u64, seconds: [f64; 3]) -> Value {
    json!({
        "stage": name, "of": { "kind": kind, "name": of }, "pool": if kind == "host" { json!("lab") } else { Value::Null },
        "workers": 1, "bytes": bytes,
        "busySeconds": seconds[0], "inputSeconds": seconds[1], "outputSeconds": seconds[2],
        "history": { "stepSeconds": 1.0, "bytes": [bytes / 2, bytes - bytes / 2] },
    })
}

/// A transfer of two seconds that reading limited.
pub fn transfer(bytes: u64) -> Value {
    json!({
        "seconds": 2.0,
        "stages": [stage("read", "host", "xcp1", bytes, [1.8, 0.0, 0.2]), stage("write", "repository", "main", bytes / 2, [0.5, 1.5, 0.0])],
        "bottleneck": { "stage": "read", "of": { "kind": "host", "name": "xcp1" }, "line": "host xcp1: busy 90 %" },
    })
}

/// What is said of a backup with such a transfer.
pub fn backup(bytes: u64) -> Value {
    json!({
        "reads": [{ "name": "xvda", "passes": [{ "bytes": bytes }] }],
        "repositories": [{ "repository": "main", "error": null, "disks": [{ "storedBytes": bytes / 2 }], "xva": null }],
        "transfer": transfer(bytes),
    })
}

/// The lines of a run, each with the second in which it was written.
pub fn lines(run: u128, events: &[(&str, Value)]) -> String {
    let line = |(second, event): &(&str, Value)| {
        let mut line =
            json!({ "version": 1, "time": format!("2026-11-20T02:{second}Z"), "run": uuid::Uuid::from_u128(run) });
        let fields = event.as_object().expect("an object").clone();
        line.as_object_mut().expect("an object").extend(fields);
        format!("{line}\n")
    };
    events.iter().map(line).collect()
}

/// A run begins.
pub fn start() -> Value {
    json!({ "event": "runStart", "job": "nightly", "schedule": "night", "due": null, "host": "here", "process": 7 })
}

/// A machine is done with.
pub fn vm_end(name: &str, status: &str, reason: Value, backup: Value) -> Value {
    json!({
        "event": "vmEnd", "vm": name, "name": name, "pool": "lab", "attempt": 1, "status": status, "reason": reason, "next": null,
        "seconds": 3.0, "backup": backup,
    })
}

/// A machine is begun with.
pub fn vm_start(name: &str) -> Value {
    json!({ "event": "vmStart", "vm": name, "name": name, "pool": "lab", "attempt": 1 })
}

/// A run ends.
pub fn end(status: &str) -> Value {
    json!({ "event": "runEnd", "status": status, "reason": null, "seconds": 10.0 })
}

/// What a log of this text tells, by a process that lives or not.
pub fn figures(text: &str, is_held: bool) -> Vec<RunFigures> {
    let folder = tempfile::tempdir().expect("a folder");
    fs::write(folder.path().join("log.jsonl"), text).expect("written");
    let history = History::read(folder.path(), &|_| is_held).expect("read");
    RunFigures::all(&history)
}
