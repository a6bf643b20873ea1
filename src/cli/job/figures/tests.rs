//! What is made of logs, with names of somebody who means no good among them.

use std::time::Duration;

use jiff::tz::TimeZone;
use jiff::{Timestamp, Zoned};
use serde_json::{Value, json};

use super::*;
use crate::job::figures::Pace;
use crate::job::figures::samples::{HOSTILE, backup, end, figures, lines, start, vm_end, vm_start};

fn merge_end(is_done: bool) -> Value {
    let reason = if is_done { Value::Null } else { json!(HOSTILE) };
    json!({
        "event": "mergeEnd", "repository": HOSTILE, "isDone": is_done, "reason": reason, "next": null, "seconds": 0.5,
        "result": { "applied": { "vms": [{ "forgotten": ["a"], "mergedDisks": 2 }] } },
    })
}

/// A run of three machines, one of which fails, and is called what nobody should be called.
fn night() -> Vec<RunFigures> {
    let text = lines(
        1,
        &[
            ("00:00", start()),
            ("00:00", vm_start("web01")),
            ("00:03", vm_end("web01", "done", Value::Null, backup(4 << 20))),
            ("00:03", vm_end(HOSTILE, "failed", json!(HOSTILE), Value::Null)),
            ("00:04", json!({ "event": "mergeStart", "repository": HOSTILE })),
            ("00:05", merge_end(false)),
            ("00:05", end("partial")),
        ],
    );
    figures(&text, false)
}

fn selection(runs: Vec<RunFigures>, since: Option<Timestamp>) -> Selection {
    let now = "2026-11-20T03:00:00Z".parse().expect("a time");
    Selection { now, since, runs, unread: 0 }
}

fn since_midnight() -> Option<Timestamp> {
    "2026-11-20T00:00:00Z".parse().ok()
}

#[test]
fn a_run_is_a_table_of_what_each_machine_did() {
    let text = text::to_text(&selection(night(), None), &TimeZone::UTC);
    let hostile = "</script><b onload=1>&\"'\\u{1b}[2J\\u{202e}\\u{a}";
    let expected = format!(
        "\
2026-11-20T02:00:00Z  nightly (night): partly failed, 2 VMs in 10.0 s, 4 MiB read, 2 MiB stored
  web01  done, 3.0 s, 4 MiB read, 2 MiB stored, 2 MiB/s
    stage  where            busy  input  output  throughput  bytes
    read   host xcp1 (lab)  90 %    0 %    10 %     2 MiB/s  4 MiB
    write  repository main  25 %   75 %     0 %     1 MiB/s  2 MiB
    limited by host xcp1: busy 90 %
  {hostile}  failed, 3.0 s: {hostile}
  merges, 0.5 s in all
    {hostile}  merge pending, 0.5 s, 1 backup forgotten, 2 disks merged: {hostile}
"
    );
    assert_eq!(text, expected);
    assert_eq!(text::to_text(&selection(Vec::new(), None), &TimeZone::UTC), "no runs\n");
}

#[test]
fn several_runs_are_added_up_by_stage_and_place_and_reason() {
    let mut runs = night();
    runs.extend(night());
    let text = text::to_text(&selection(runs, since_midnight()), &TimeZone::UTC);
    let hostile = "</script><b onload=1>&\"'\\u{1b}[2J\\u{202e}\\u{a}";
    let expected = format!(
        "\
since 2026-11-20 00:00 UTC: 2 runs (2 partly failed), 4 VMs (2 done; 2 failed), 8 MiB read, 4 MiB stored

stages of 2 transfers
  stage  transfers  limited  busy  input  output  throughput  bytes
  read           2        2  90 %    0 %    10 %     4 MiB/s  8 MiB
  write          2        0  25 %   75 %     0 %     2 MiB/s  4 MiB

  where            stage  transfers  limited  busy  input  output  throughput  bytes
  host xcp1 (lab)  read           2        2  90 %    0 %    10 %     4 MiB/s  8 MiB
  repository main  write          2        0  25 %   75 %     0 %     2 MiB/s  4 MiB

merges, 1.0 s in all
  {hostile}  0 done  2 pending  1.0 s  2 backups forgotten  4 disks merged

failures
  2 x  {hostile} ({hostile}; last 2026-11-20T02:00:03Z)
  2 x  merge: {hostile} ({hostile}; last 2026-11-20T02:00:05Z)
"
    );
    assert_eq!(text, expected);
    let nothing = text::to_text(&selection(Vec::new(), since_midnight()), &TimeZone::UTC);
    assert_eq!(nothing, "since 2026-11-20 00:00 UTC: 0 runs, 0 VMs, 0 B read, 0 B stored\n");
}

#[test]
fn json_says_the_same_in_numbers() {
    let said = as_json::to_json(&selection(night(), since_midnight()));
    let run = &said["runs"][0];
    assert_eq!(
        (&run["status"], &run["readBytes"], &run["seconds"]),
        (&json!("partial"), &json!(4 << 20), &json!(10.0))
    );
    assert_eq!(run["vms"][1]["name"], HOSTILE);
    let stage = json!({
        "stage": "read", "of": { "kind": "host", "name": "xcp1" }, "pool": "lab", "bytes": 4 << 20, "bytesPerSecond": 2 << 20,
        "busy": 0.9, "waitsForInput": 0.0, "waitsForOutput": 0.1,
    });
    assert_eq!(run["vms"][0]["transfer"]["stages"][0], stage);
    assert_eq!((&run["vms"][1]["transfer"], &run["merges"][0]["transfer"]), (&Value::Null, &Value::Null));
    assert_eq!(said["sums"]["transfers"]["byStage"][0]["limited"], 1);
    assert_eq!(said["sums"]["failures"][0]["of"], json!([HOSTILE]));
    assert_eq!(as_json::to_json(&selection(Vec::new(), None))["runs"], json!([]));
}

#[test]
fn the_page_holds_no_tag_that_a_name_brought_and_nothing_from_elsewhere() {
    let mut of_hostile = backup(4 << 20);
    of_hostile["transfer"]["stages"][0]["of"]["name"] = json!(HOSTILE);
    of_hostile["transfer"]["stages"][0]["stage"] = json!(HOSTILE);
    of_hostile["transfer"]["stages"][0]["pool"] = json!(HOSTILE);
    of_hostile["transfer"]["bottleneck"] =
        json!({ "stage": HOSTILE, "of": { "kind": "host", "name": HOSTILE }, "line": HOSTILE });
    let mut runs = night();
    let mut begun = start();
    (begun["job"], begun["schedule"]) = (json!(HOSTILE), json!(HOSTILE));
    let events =
        [("10:00", begun), ("10:02", vm_end("web01", "done", Value::Null, of_hostile)), ("10:03", end("done"))];
    runs.extend(figures(&lines(2, &events), false));
    let html = page::to_html(&selection(runs, None));
    for forbidden in ["<b onload", "</script", "\u{1b}", "\u{202e}", "://", "url(", "@import"] {
        assert!(!html.contains(forbidden), "{forbidden}");
    }
    let escaped = "&lt;/script&gt;&lt;b onload=1&gt;&amp;&quot;&#39;\\u{1b}[2J\\u{202e}\\u{a}";
    assert!(html.contains(&format!("<span class=\"limit\">limited by {escaped}</span>")), "{html}");
    assert!(html.contains(&format!("<title>{escaped}, host {escaped} ({escaped})</title>")), "{html}");
    // A picture of each run and of each machine in it that told of its stages.
    assert_eq!(html.matches("<svg ").count(), 4);
    let empty = page::to_html(&selection(Vec::new(), since_midnight()));
    assert!(empty.contains("There are no runs."), "{empty}");
}

#[test]
fn a_picture_is_as_high_as_more_passed_and_marks_what_limited() {
    let mut transfer = night()[0].vms[0].transfer.clone().expect("told");
    // In the second second reading is half as fast, and writing bursts.
    transfer.stages[0].history = Some(Pace { step: Duration::from_secs(1), bytes: vec![120_000, 60_000] });
    transfer.stages[1].history = Some(Pace { step: Duration::from_secs(1), bytes: vec![6_000, 600_000] });
    let length = Duration::from_secs(2);
    let strips = crate::job::figures::strips(&[(Duration::ZERO, &transfer)], length, picture::PARTS);
    let svg = picture::draw(&strips, length);
    assert!(svg.contains("<path d=\"M230 30V0H440V15H650V30Z\"/>"), "{svg}");
    assert!(svg.contains("<path d=\"M230 68V67.7H440V38H650V68Z\"/>"), "{svg}");
    assert!(svg.contains(">peak 117 KiB/s</text>") && svg.contains(">peak 585 KiB/s</text>"), "{svg}");
    assert_eq!((svg.matches("class=\"strip slow\"").count(), svg.matches("class=\"strip\"").count()), (1, 1));
    assert!(svg.contains(">2 MiB/s</text>") && svg.contains(">busy 90 %</text>"), "{svg}");
    assert_eq!(picture::draw(&[], length), "");
}

fn reported(id: &str, runs: Vec<RunFigures>, is_right: bool) -> Reported {
    let counts = Totals::default().counts(&runs);
    Reported { id: id.to_owned(), is_right, runs, counts }
}

#[test]
fn metrics_have_each_name_once_and_labels_that_no_name_breaks() {
    let mut runs = night();
    let events = [("20:00", start()), ("20:00", vm_start("web01")), ("20:01", vm_start("db01"))];
    runs.extend(figures(&lines(2, &events), true));
    let text = metrics::to_text(&[reported("nightly", runs, true), reported("weekly", Vec::new(), false)]);
    let names: Vec<&str> = text.lines().filter_map(|line| line.strip_prefix("# TYPE ")).collect();
    let once: BTreeSet<&str> = names.iter().copied().collect();
    assert_eq!(names.len(), once.len(), "{text}");
    let hostile = r#"</script><b onload=1>&\"'\\u{1b}[2J\\u{202e}\\u{a}"#;
    for line in [
        "# HELP xofs_job_run_status How the last run stands: 1 for that status, 0 for the others.".to_owned(),
        "xofs_job_valid{job_id=\"nightly\"} 1".to_owned(),
        "xofs_job_valid{job_id=\"weekly\"} 0".to_owned(),
        "xofs_job_last_run_timestamp_seconds{job_id=\"nightly\"} 1795141200".to_owned(),
        // None was good.
        "xofs_job_last_success_timestamp_seconds{job_id=\"nightly\"} 0".to_owned(),
        "xofs_job_run_status{job_id=\"nightly\",status=\"running\"} 1".to_owned(),
        "xofs_job_run_status{job_id=\"nightly\",status=\"partial\"} 0".to_owned(),
        "xofs_vm_last_backup_timestamp_seconds{job_id=\"nightly\",pool=\"lab\",vm=\"web01\",vm_name=\"web01\"} 1795140003".to_owned(),
        "xofs_vm_last_backup_timestamp_seconds{job_id=\"nightly\",pool=\"lab\",vm=\"db01\",vm_name=\"db01\"} 0".to_owned(),
        // Only what ended is counted.
        "xofs_job_runs_total{job_id=\"nightly\",status=\"partial\"} 1".to_owned(),
        "xofs_job_vms_total{job_id=\"nightly\",status=\"done\"} 1".to_owned(),
        format!("xofs_merges_total{{job_id=\"nightly\",repository=\"{hostile}\",status=\"pending\"}} 1"),
        format!("xofs_merge_seconds_total{{job_id=\"nightly\",repository=\"{hostile}\"}} 0.500"),
        "xofs_transfer_bytes_total{job_id=\"nightly\",stage=\"read\",kind=\"host\",name=\"xcp1\",pool=\"lab\"} 4194304".to_owned(),
        "xofs_transfer_busy_seconds_total{job_id=\"nightly\",stage=\"read\",kind=\"host\",name=\"xcp1\",pool=\"lab\"} 1.800".to_owned(),
        "xofs_transfer_limited_total{job_id=\"nightly\",stage=\"write\",kind=\"repository\",name=\"main\",pool=\"\"} 0".to_owned(),
    ] {
        assert!(text.lines().any(|found| found == line), "{line}\n{text}");
    }
    assert!(!text.contains("xofs_job_last_run_duration_seconds"), "it has not ended\n{text}");
    assert_eq!(metrics::to_text(&[]), "");
}

#[test]
fn since_is_how_long_ago_a_date_or_a_time() {
    let now: Zoned = "2026-11-23T12:00:00+01:00[Europe/Paris]".parse().expect("a time");
    for (text, expected) in [
        ("7d", "2026-11-16T11:00:00Z"),
        ("36h", "2026-11-21T23:00:00Z"),
        ("2w 1d", "2026-11-08T11:00:00Z"),
        // Days of the calendar: the clock was put back since.
        ("30d", "2026-10-24T10:00:00Z"),
        ("2026-11-20", "2026-11-19T23:00:00Z"),
        ("2026-11-20 08:30", "2026-11-20T07:30:00Z"),
        ("2026-11-20T08:30:00Z", "2026-11-20T08:30:00Z"),
    ] {
        assert_eq!(since(text, &now).map(|time| time.to_string()), Ok(expected.to_owned()), "{text}");
    }
    for text in ["", "7", "-7d", "7d ago", "yesterday", "2026-13-01", "999999999999y", "0d"] {
        assert!(since(text, &now).is_err_and(|error| error.contains("is no time; expected")), "{text}");
    }
}
