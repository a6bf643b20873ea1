//! What is shown of runs that are under way.

use uuid::Uuid;

use super::*;
use crate::job::figures::samples::{HOSTILE, figures, lines, start, transfer, vm_end, vm_start};

const SHOWN: &str = "</script><b onload=1>&\"'\\u{1b}[2J\\u{202e}\\u{a}";

/// A run that is at two machines, has done one, and merges.
fn run() -> RunFigures {
    let events = [
        ("00:00", start()),
        ("00:00", vm_start("web01")),
        ("00:00", vm_start(HOSTILE)),
        ("00:01", vm_end("db01", "failed", json!("no"), Value::Null)),
        ("00:02", json!({ "event": "mergeStart", "repository": "main" })),
    ];
    figures(&lines(1, &events), true).remove(0)
}

fn vm(name: &str, done: u64, expected: u64, speed: u64) -> LiveVm {
    LiveVm {
        vm: name.to_owned(),
        name: name.to_owned(),
        pool: "lab".to_owned(),
        since: at("02:00:00"),
        done_bytes: done,
        expected_bytes: expected,
        bytes_per_second: speed,
        waits_for: "pool".to_owned(),
        recent: json!({ "seconds": 2.0, "stages": [], "bottleneck": null }),
    }
}

fn at(time: &str) -> Timestamp {
    format!("2026-11-20T{time}Z").parse().expect("a time")
}

fn live(seconds: &str, vms: Vec<LiveVm>) -> Option<Live> {
    Some(Live { run: Uuid::from_u128(1), time: at(seconds), vms })
}

#[test]
fn each_machine_has_a_bar_its_pace_its_stages_and_what_limits_it() {
    let mut web01 = vm("web01", 3 << 30, 4 << 30, 32 << 20);
    web01.recent = transfer(64 << 20);
    let running = Running { run: run(), live: live("02:01:04", vec![web01, vm(HOSTILE, 0, 0, 0)]) };
    let expected = format!(
        "\
nightly (night)  for 1 m 5 s: 2 VMs under way, 0 done, 1 failed
  web01 (lab)  ███████████████░░░░░   75 %  3 GiB of 4 GiB  32 MiB/s, 32.0 s left, for 1 m 5 s
    read      host xcp1 (lab)  ██████████████████░░   90 %      32 MiB/s
    write     repository main  █████░░░░░░░░░░░░░░░   25 %      16 MiB/s
    limited by host xcp1: busy 90 %
  {SHOWN} (lab)  ░░░░░░░░░░░░░░░░░░░░    0 %  0 B of 0 B  0 B/s, for 1 m 5 s
    nothing moved in 2.0 s: waits for the pool
  merges in main
"
    );
    assert_eq!(to_text(&[running], at("02:01:05")), expected);
    assert_eq!(to_text(&[], at("02:01:05")), "no job runs\n");
}

#[test]
fn what_the_process_has_not_said_yet_or_said_long_ago_is_told_as_that() {
    let silent = Running { run: run(), live: None };
    let expected = format!(
        "nightly (night)  for 5.0 s: 2 VMs under way, 0 done, 1 failed\n  web01 (lab)\n  {SHOWN} (lab)\n  merges in main\n"
    );
    assert_eq!(to_text(&[silent], at("02:00:05")), expected);
    let old = Running { run: run(), live: live("02:00:05", Vec::new()) };
    let text = to_text(&[old], at("02:02:05"));
    assert!(text.contains("\n  its process has said nothing for 2 m 0 s: what follows is as old\n"), "{text}");
    // The clock went back.
    let early = Running { run: run(), live: live("02:00:05", Vec::new()) };
    let text = to_text(&[early], at("01:00:00"));
    assert!(text.starts_with("nightly (night)  for 0.0 s: ") && !text.contains("nothing"), "{text}");
}

#[test]
fn json_says_the_same() {
    let running = Running { run: run(), live: live("02:01:04", vec![vm("web01", 5, 25, 10)]) };
    let said = to_json(&[running], at("02:01:05"));
    let run = &said["runs"][0];
    assert_eq!((&run["doneVms"], &run["failedVms"], &run["seconds"]), (&json!(0), &json!(1), &json!(65.0)));
    assert_eq!((&run["merging"], &run["seen"]), (&json!(["main"]), &json!("2026-11-20T02:01:04Z")));
    assert_eq!((&run["vms"][0]["secondsLeft"], &run["vms"][0]["doneBytes"]), (&json!(2), &json!(5)));
    assert_eq!((&run["vms"][1]["name"], &run["vms"][1]["doneBytes"]), (&json!(HOSTILE), &Value::Null));
    assert_eq!(to_json(&[], at("02:01:05"))["runs"], json!([]));
}

#[test]
fn what_is_left_is_told_only_where_it_can_be() {
    assert_eq!(left(&vm("a", 10, 30, 10)), Some(Duration::from_secs(2)));
    assert_eq!((left(&vm("a", 10, 30, 0)), left(&vm("a", 31, 30, 10))), (None, None));
    assert_eq!(
        [(0, 0), (1, 3), (3, 3), (u64::MAX, 1)].map(|(part, whole)| thousandths(part, whole)),
        [0, 333, 1000, 1000]
    );
}
