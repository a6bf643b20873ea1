//! The files in `.xofs/`: what the mount says about itself.

use std::time::{SystemTime, UNIX_EPOCH};

use serde_json::{Value, json};

use super::Report;
use crate::repository::{Layout, Problem, Repository};

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
        "mountedAt": seconds,
        "isRemote": repository.storage().capabilities().is_remote,
        "answers": health.silent_for.is_none(),
        "silentSeconds": health.silent_for.map(|silence| silence.as_secs()),
        "silentFiles": silent.collect::<Vec<_>>(),
        "timedOut": health.timed_out,
        "interrupted": health.interrupted,
        "vms": repository.known_vms().map(|vms| vms.len()),
        "problems": repository.problems().len(),
    }))
}

/// Returns `problems.json`: a list, empty when nothing is known to be wrong.
pub(super) fn problems(repository: &Repository) -> Vec<u8> {
    lines(&Value::Array(repository.problems().iter().map(Problem::to_json).collect()))
}

fn lines(value: &Value) -> Vec<u8> {
    let mut text = format!("{value:#}").into_bytes();
    text.push(b'\n');
    text
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use storage::MemoryStorage;

    use super::*;
    use crate::repository::OpenOptions;
    use crate::tree::Health;

    fn repository() -> Arc<Repository> {
        let storage = Arc::new(MemoryStorage::new());
        storage.put("a.vhd", "").unwrap();
        Repository::with_storage(storage, OpenOptions::default()).unwrap()
    }

    #[test]
    fn the_status_tells_what_does_not_answer() {
        let health = Health::default();
        health.expired(7);
        health.interrupted();
        health.silent();
        let status = status(&repository(), UNIX_EPOCH, &health.report(), |inode| format!("file {inode}"));
        let status: Value = serde_json::from_slice(&status).unwrap();
        let expected = json!({
            "program": concat!("xofs ", env!("CARGO_PKG_VERSION")),
            "repository": "memory",
            "layout": "disks",
            "mountedAt": 0,
            "isRemote": false,
            "answers": false,
            "silentSeconds": 0,
            "silentFiles": [{ "file": "file 7", "seconds": 0 }],
            "timedOut": 1,
            "interrupted": 1,
            "vms": null,
            "problems": 0,
        });
        assert_eq!(status, expected);
    }
}
