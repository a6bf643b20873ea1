//! The files in `.xofs/`: what the mount says about itself.

use std::time::{SystemTime, UNIX_EPOCH};

use serde_json::{Value, json};

use crate::repository::{Layout, Repository};

/// Returns `status.json`.
pub(super) fn status(repository: &Repository, since: SystemTime) -> Vec<u8> {
    let (layout, disks) = match repository.layout() {
        Layout::Repository => ("repository", None),
        Layout::Disks => ("disks", repository.loose_disks().ok().map(|disks| disks.len())),
    };
    let vms = repository.vms();
    let seconds = since.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
    lines(&json!({
        "program": concat!("xofs ", env!("CARGO_PKG_VERSION")),
        "repository": repository.storage().describe(),
        "layout": layout,
        "mounted_at": seconds,
        "remote": repository.storage().capabilities().is_remote,
        "available": vms.is_ok(),
        "error": vms.as_ref().err().map(ToString::to_string),
        "vms": vms.as_ref().ok().map(|vms| vms.len()),
        "loose_disks": disks,
        "problems": repository.problems().len(),
    }))
}

/// Returns `problems.json`: a list, empty when nothing is known to be wrong.
pub(super) fn problems(repository: &Repository) -> Vec<u8> {
    let problems = repository.problems().into_iter().map(|problem| {
        json!({
            "path": problem.path.as_str(),
            "vm": problem.backup.as_ref().map(|id| id.vm.to_string()),
            "backup": problem.backup.as_ref().map(|id| id.time.to_string()),
            "kind": problem.kind.to_string(),
            "message": problem.message,
        })
    });
    lines(&Value::Array(problems.collect()))
}

fn lines(value: &Value) -> Vec<u8> {
    let mut text = format!("{value:#}").into_bytes();
    text.push(b'\n');
    text
}
