//! The files in `.xofs/`: what the mount says about itself.

use std::time::{SystemTime, UNIX_EPOCH};

use serde_json::{Value, json};

use super::Report;
use crate::repository::{Layout, Repository};

/// Returns `status.json`. Nothing is asked of the repository: what does not answer is told too.
///
/// `place` names an inode.
pub(super) fn status(
    repository: &Repository,
    since: SystemTime,
    health: &Report,
    place: impl Fn(u64) -> String,
) -> Vec<u8> {
    let layout = match repository.layout() {
        Layout::Repository => "repository",
        Layout::Disks => "disks",
    };
    let seconds = since.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
    let silent = health.silent_files.iter();
    let silent = silent.map(|(inode, silence)| json!({ "file": place(*inode), "seconds": silence.as_secs() }));
    lines(&json!({
        "program": concat!("xofs ", env!("CARGO_PKG_VERSION")),
        "repository": repository.storage().describe(),
        "layout": layout,
        "mounted_at": seconds,
        "remote": repository.storage().capabilities().is_remote,
        "answers": health.silent_for.is_none(),
        "silent_seconds": health.silent_for.map(|silence| silence.as_secs()),
        "silent_files": silent.collect::<Vec<_>>(),
        "timed_out": health.timed_out,
        "interrupted": health.interrupted,
        "vms": repository.known_vms().map(|vms| vms.len()),
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
