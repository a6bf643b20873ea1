//! `.xofs/metrics`: what the mount knows of itself, in the text format of Prometheus.
//!
//! Nothing is asked of the repository. Numbers that only grow are counted since the mount was made.

use std::fmt::Write as _;
use std::time::{SystemTime, UNIX_EPOCH};

use super::Report;
use crate::repository::Repository;

/// Returns the metrics; one whose value is not known yet is left out.
pub(super) fn text(repository: &Repository, since: SystemTime, health: &Report) -> Vec<u8> {
    let count = |count: usize| u64::try_from(count).unwrap_or(u64::MAX);
    let mounted_at = since.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
    let silent_for = health.silent_for.map_or(0, |silence| silence.as_secs());
    let mut text = String::from("# HELP xofs_build_info The program.\n# TYPE xofs_build_info gauge\n");
    let _ = writeln!(text, "xofs_build_info{{version=\"{}\"}} 1", env!("CARGO_PKG_VERSION"));
    for (name, kind, help, value) in [
        ("mount_time_seconds", "gauge", "When the mount was made, since 1970.", Some(mounted_at)),
        (
            "requests_answered_total",
            "counter",
            "Requests that may ask the repository whose work came to its end, also if too late or with an error.",
            Some(health.answered),
        ),
        (
            "requests_failed_total",
            "counter",
            "Requests for which the repository gave an error, or something damaged.",
            Some(health.failed),
        ),
        ("requests_timed_out_total", "counter", "Requests ended at the deadline.", Some(health.timed_out)),
        ("requests_interrupted_total", "counter", "Requests ended by a signal.", Some(health.interrupted)),
        (
            "repository_answers",
            "gauge",
            "Whether the repository answers, as far as it is known.",
            Some(u64::from(health.silent_for.is_none())),
        ),
        ("repository_silent_seconds", "gauge", "For how long the repository has not answered.", Some(silent_for)),
        ("silent_files", "gauge", "Files of which nothing was heard.", Some(count(health.silent_files.len()))),
        ("open_disks", "gauge", "Disks that are open or kept open.", Some(count(repository.open_disks()))),
        ("block_cache_bytes", "gauge", "Decoded blocks kept in memory.", Some(repository.cached_bytes())),
        ("vms", "gauge", "VMs that the last listing found.", repository.known_vms().map(|vms| count(vms.len()))),
        ("problems", "gauge", "Problems known.", Some(count(repository.problems().len()))),
    ] {
        if let Some(value) = value {
            let _ = writeln!(text, "# HELP xofs_{name} {help}\n# TYPE xofs_{name} {kind}\nxofs_{name} {value}");
        }
    }
    text.into_bytes()
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use storage::{FaultyStorage, MemoryStorage};

    use crate::tree::ROOT;
    use crate::tree::tests::tree_on;

    #[test]
    fn every_metric_has_its_help_its_type_and_one_number_and_no_storage_is_asked() {
        let memory = Arc::new(MemoryStorage::new());
        memory.put("xo-vm-backups/x/20260801T020003Z.json", "{").unwrap();
        memory.put("a.vhd", "no VHD").unwrap();
        let faulty = Arc::new(FaultyStorage::new(memory));
        let tree = tree_on(faulty.clone());
        let metrics = || String::from_utf8(tree.metrics()).unwrap();
        assert!(!metrics().contains("xofs_vms"), "before the first listing");
        tree.warm_up().unwrap();
        tree.health().expired(ROOT);
        tree.health().answered(ROOT);
        tree.health().failed();
        tree.health().interrupted();
        tree.health().silent();
        faulty.reset_counts();
        let text = metrics();
        assert_eq!(faulty.total(), 0);
        let lines: Vec<&str> = text.lines().collect();
        assert!(text.ends_with('\n') && lines.len().is_multiple_of(3), "{text}");
        for metric in lines.chunks(3) {
            let name = metric[2].split(['{', ' ']).next().unwrap();
            assert!(metric[0].starts_with(&format!("# HELP {name} ")), "{metric:?}");
            let kind = if name.ends_with("_total") { "counter" } else { "gauge" };
            assert_eq!(metric[1], format!("# TYPE {name} {kind}"));
            assert!(metric[2].rsplit_once(' ').unwrap().1.parse::<u64>().is_ok(), "{metric:?}");
        }
        for line in [
            concat!("xofs_build_info{version=\"", env!("CARGO_PKG_VERSION"), "\"} 1"),
            "xofs_requests_answered_total 1",
            "xofs_requests_failed_total 1",
            "xofs_requests_timed_out_total 1",
            "xofs_requests_interrupted_total 1",
            "xofs_repository_answers 0",
            "xofs_silent_files 0",
            "xofs_open_disks 0",
            "xofs_block_cache_bytes 0",
            "xofs_vms 1",
            "xofs_problems 0",
        ] {
            assert!(lines.contains(&line), "{line} in\n{text}");
        }
    }
}
