//! Logs as they are written, and what is counted of them.

use std::fs;
use std::time::Duration;

use serde_json::{Value, json};

use super::samples::{HOSTILE, backup, end, figures, lines, stage, start, vm_end, vm_start};
use super::*;
use crate::job::log::{RunStatus, VmStatus};

#[test]
fn an_empty_log_has_no_runs_and_sums_of_nothing() {
    assert_eq!(figures("", true), []);
    assert_eq!(Sums::of(&[]), Sums::default());
}

#[test]
fn a_run_is_told_with_its_machines_its_merges_apart_and_what_failed() {
    let partial = json!({
        "reads": [], "repositories": [{ "repository": "main", "error": null }, { "repository": "other", "error": "no room" }],
    });
    let forgotten = json!({ "applied": { "vms": [{ "forgotten": ["a", "b"], "mergedDisks": 3 }, { "error": "locked" }] },
        "transfer": { "seconds": 0.5, "stages": [stage("move", "repository", "main", 7, [0.5, 0.0, 0.0])] } });
    let text = lines(
        1,
        &[
            ("00:00", start()),
            ("00:00", vm_start("web01")),
            ("00:01", vm_end("web01", "failed", json!("no answer"), Value::Null)),
            ("00:01", vm_start("db01")),
            ("00:02", vm_end("db01", "partial", json!("other: no room"), partial)),
            ("00:02", vm_start("web01")),
            ("00:05", vm_end("web01", "done", Value::Null, backup(4_000_001))),
            ("00:05", json!({ "event": "mergeStart", "repository": "main" })),
            (
                "00:06",
                json!({ "event": "mergeEnd", "repository": "main", "isDone": true, "reason": null, "next": null, "seconds": 0.75, "result": forgotten }),
            ),
            ("00:06", json!({ "event": "mergeStart", "repository": "other" })),
            (
                "00:07",
                json!({ "event": "mergeEnd", "repository": "other", "isDone": false, "reason": "locked", "next": "later", "seconds": 0.25, "result": null }),
            ),
            ("00:08", end("partial")),
        ],
    );
    let runs = figures(&text, false);
    let [run] = runs.as_slice() else { panic!("{runs:#?}") };
    let vms: Vec<_> = run.vms.iter().map(|vm| (vm.name.as_str(), vm.status, vm.read, vm.stored)).collect();
    assert_eq!(vms, [("web01", Some(VmStatus::Done), 4_000_001, 2_000_000), ("db01", Some(VmStatus::Partial), 0, 0)]);
    assert_eq!((run.vms[0].ended, run.vms[0].took), (Duration::from_secs(5), Duration::from_secs(3)));
    let merges: Vec<_> = run
        .merges
        .iter()
        .map(|merge| (merge.repository.as_str(), merge.is_done, merge.forgotten, merge.merged))
        .collect();
    assert_eq!(merges, [("main", Some(true), 2, 3), ("other", Some(false), 0, 0)]);
    let failed: Vec<_> =
        run.failures.iter().map(|failed| (failed.of.as_str(), failed.reason.as_str(), failed.is_merge)).collect();
    assert_eq!(failed, [("web01", "no answer", false), ("db01 in other", "no room", false), ("other", "locked", true)]);
    assert_eq!((run.status, run.took, run.read()), (RunStatus::Partial, Some(Duration::from_secs(10)), 4_000_001));

    let sums = Sums::of(&runs);
    assert_eq!((sums.read, sums.stored, sums.transfers.count, sums.merges.count), (4_000_001, 2_000_000, 1, 1));
    let merged: Vec<_> = sums
        .repositories
        .iter()
        .map(|one| (one.repository.as_str(), one.done, one.pending, one.took.as_millis()))
        .collect();
    assert_eq!(merged, [("main", 1, 0, 750), ("other", 0, 1, 250)]);
    assert_eq!(sums.merges.by_place.len(), 1);
}

#[test]
fn transfers_add_up_by_stage_and_place_and_their_time_counts_once_where_they_ran_at_once() {
    let events = [
        ("00:00", start()),
        ("00:00", vm_start("web01")),
        ("00:01", vm_start("web02")),
        // From second 1 to 3, and from 2 to 4: three seconds in all.
        ("00:03", vm_end("web01", "done", Value::Null, backup(6_000_000))),
        ("00:04", vm_end("web02", "done", Value::Null, backup(3_000_000))),
        ("00:05", end("done")),
    ];
    let sums = Sums::of(&figures(&lines(1, &events), false));
    let rows: Vec<_> = sums
        .transfers
        .by_place
        .iter()
        .map(|row| {
            let (place, pool) = row.of.as_ref().expect("of a place");
            (row.stage.as_str(), place.to_string(), pool.as_deref(), row.bytes, row.rate(), row.limited)
        })
        .collect();
    assert_eq!(
        rows,
        [
            ("read", "host xcp1".to_owned(), Some("lab"), 9_000_000, 3_000_000, 2),
            ("write", "repository main".to_owned(), None, 4_500_000, 1_500_000, 0),
        ]
    );
    let stages: Vec<_> =
        sums.transfers.by_stage.iter().map(|row| (row.stage.as_str(), row.transfers, row.times.shares())).collect();
    let expected = [
        ("read", 2, Shares { busy: 900, input: 0, output: 100 }),
        ("write", 2, Shares { busy: 250, input: 750, output: 0 }),
    ];
    assert_eq!(stages, expected);
    assert_eq!((sums.runs, sums.vms), (vec![(RunStatus::Done, 1)], vec![(VmStatus::Done, 2)]));
}

#[test]
fn what_failed_is_counted_by_its_reason_however_often_it_was_tried() {
    let failed = |second, name, reason| (second, vm_end(name, "failed", json!(reason), Value::Null));
    let one = [
        ("00:00", start()),
        failed("00:01", "web01", "no answer"),
        failed("00:02", "db01", "no answer"),
        ("00:03", end("failed")),
    ];
    let two = [
        ("10:00", start()),
        failed("10:01", "web01", HOSTILE),
        failed("10:02", "web01", "no answer"),
        ("10:03", end("failed")),
    ];
    let sums = Sums::of(&figures(&(lines(1, &one) + &lines(2, &two)), false));
    let shown: Vec<_> = sums
        .failures
        .iter()
        .map(|failures| {
            (failures.reason.as_str(), failures.count, failures.of.iter().map(String::as_str).collect::<Vec<_>>())
        })
        .collect();
    assert_eq!(shown, [("no answer", 3, vec!["db01", "web01"]), (HOSTILE, 1, vec!["web01"])]);
    assert_eq!(sums.failures[0].last.to_string(), "2026-11-20T02:10:02Z");
    assert_eq!(sums.runs, [(RunStatus::Failed, 2)]);
}

#[test]
fn what_a_dead_process_began_is_cut_off_and_what_a_living_one_began_is_under_way() {
    let text = lines(
        1,
        &[
            ("00:00", start()),
            ("00:00", vm_start("web01")),
            ("00:02", json!({ "event": "mergeStart", "repository": "main" })),
        ],
    );
    let dead = &figures(&text, false)[0];
    assert_eq!((dead.status, dead.took), (RunStatus::Interrupted, None));
    assert_eq!((dead.vms[0].status, dead.merges[0].is_done), (Some(VmStatus::Interrupted), Some(false)));
    assert_eq!(dead.vms[0].reason.as_deref(), Some(CUT_OFF));
    let failed: Vec<_> = dead.failures.iter().map(|failed| (failed.of.as_str(), failed.is_merge)).collect();
    assert_eq!(failed, [("web01", false), ("main", true)]);
    let living = &figures(&text, true)[0];
    assert_eq!(living.status, RunStatus::Running);
    assert_eq!((living.vms[0].status, living.merges[0].is_done), (None, None));
}

#[test]
fn a_torn_line_costs_only_itself_and_logs_without_transfers_are_read() {
    let whole = lines(
        1,
        &[("00:00", start()), ("00:03", vm_end("web01", "done", Value::Null, json!({ "bottleneck": "read" })))],
    );
    let torn = whole.clone()
        + &lines(2, &[("01:00", start()), ("01:03", vm_end("web01", "done", Value::Null, backup(8)))])[..330]
        + "\n";
    let text = torn + &lines(3, &[("02:00", start()), ("02:01", end("done"))]);
    let runs = figures(&text, false);
    let statuses: Vec<_> = runs.iter().map(|run| (run.status, run.vms.len())).collect();
    assert_eq!(statuses, [(RunStatus::Interrupted, 1), (RunStatus::Interrupted, 0), (RunStatus::Done, 0)]);
    assert_eq!((runs[0].vms[0].transfer.as_ref(), runs[0].read()), (None, 0));
    assert_eq!(Sums::of(&runs).transfers, Work::default());
}

#[test]
fn a_clock_that_went_back_makes_no_time_negative_or_long() {
    let events = [
        ("30:00", start()),
        ("30:04", vm_end("web01", "done", Value::Null, backup(6_000_000))),
        // An hour back would be the same.
        ("10:00", vm_end("web02", "done", Value::Null, backup(6_000_000))),
        ("10:03", vm_end("web03", "done", Value::Null, backup(6_000_000))),
        ("10:04", end("done")),
    ];
    let runs = figures(&lines(1, &events), false);
    let ended: Vec<u64> = runs[0].vms.iter().map(|vm| vm.ended.as_secs()).collect();
    assert_eq!(ended, [4, 4, 7]);
    assert_eq!(runs[0].last.to_string(), "2026-11-20T02:30:08Z");
    let row = &Sums::of(&runs).transfers.by_stage[0];
    assert_eq!((row.bytes, row.active, row.rate()), (18_000_000, Duration::from_secs(4), 4_500_000));
}

#[test]
fn numbers_that_are_too_great_end_at_the_greatest() {
    let mut huge = backup(u64::MAX);
    huge["transfer"]["seconds"] = json!(1e9);
    huge["transfer"]["stages"][0]["busySeconds"] = json!(3e9);
    huge["transfer"]["stages"][0]["workers"] = json!(u64::MAX);
    let ends =
        [("00:01", vm_end("a", "done", Value::Null, huge.clone())), ("00:01", vm_end("b", "done", Value::Null, huge))];
    let runs = figures(&lines(1, &ends), false);
    let sums = Sums::of(&runs);
    assert_eq!((sums.read, sums.transfers.by_stage[0].bytes), (u64::MAX, u64::MAX));
    assert_eq!(sums.transfers.by_stage[0].times.shares().busy, 0);
    let transfers: Vec<_> = runs[0].vms.iter().filter_map(|vm| Some((vm.ended, vm.transfer.as_ref()?))).collect();
    assert_eq!(strips(&transfers, Duration::from_secs(1), 10)[0].total, u64::MAX);
}

#[test]
fn counts_go_on_where_a_log_was_put_aside_and_count_no_run_twice() {
    let folder = tempfile::tempdir().expect("a folder");
    let counted = |runs: &[RunFigures]| Totals::read(folder.path()).expect("read").counts(runs);
    let night = |number| {
        lines(
            number,
            &[("00:00", start()), ("00:03", vm_end("web01", "done", Value::Null, backup(10))), ("00:04", end("done"))],
        )
    };
    let of = |numbers: &[u128]| figures(&numbers.iter().map(|number| night(*number)).collect::<String>(), false);
    let seen = |counts: &Counts| {
        let stages: Vec<_> = counts.transfers.iter().map(|one| (one.stage.clone(), one.bytes, one.limited)).collect();
        (counts.runs.get(&RunStatus::Done).copied().unwrap_or_default(), stages)
    };
    let times = |count| (count, vec![("read".to_owned(), 10 * count, count), ("write".to_owned(), 5 * count, 0)]);
    assert_eq!(counted(&[]), Counts::default());
    assert_eq!(seen(&counted(&of(&[1, 2]))), times(2));
    Totals::keep(folder.path(), &of(&[1, 2])).expect("kept");
    assert_eq!(seen(&counted(&of(&[1, 2]))), times(2));
    assert_eq!(seen(&counted(&of(&[1, 2, 3]))), times(3));
    Totals::keep(folder.path(), &of(&[1, 2, 3])).expect("kept");
    Totals::keep(folder.path(), &of(&[1, 2, 3])).expect("kept");
    // The first two are put aside; then all of them, and the log begins anew.
    assert_eq!(seen(&counted(&of(&[3, 4]))), times(4));
    assert_eq!(seen(&counted(&of(&[5]))), times(4));
    let under_way = figures(
        &(night(3) + &lines(4, &[("10:00", start()), ("10:01", vm_end("web01", "done", Value::Null, backup(10)))])),
        true,
    );
    assert_eq!(seen(&counted(&under_way)), times(3));
    Totals::keep(folder.path(), &under_way).expect("kept");
    assert_eq!(seen(&counted(&of(&[3, 4]))), times(4));
    fs::write(folder.path().join("totals.json"), "{").expect("written");
    assert_eq!(seen(&counted(&of(&[3, 4]))), times(2));
}
