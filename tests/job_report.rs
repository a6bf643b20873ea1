//! What runs of jobs did, as the built binary reports it in all forms, and what they are doing: real runs against a simulated pool.

mod job;
mod support;

use std::fs;
use std::io::Write;
use std::process::{Child, Command, Stdio};

use job::{MIB, PATIENCE, Pool, mismatch, wait_for};
use serde_json::{Value, json};
use support::run;
use xapi_simulator::failure::Failure;
use xapi_simulator::scene::{Disk, Machine};
use xapi_simulator::{Act, Fault, Site};

/// A name that would break a page, a metric and a terminal; it is the first of all.
const HOSTILE: &str = "</td><script>alert(1)</script>\"\\ \u{1b}[2J";
/// The same as people may see it.
const SHOWN: &str = "</td><script>alert(1)</script>\"\\ \\u{1b}[2J";

/// A pool with a machine of that name, and a job of it and another, one at a time.
fn pool() -> Pool {
    let machine = Machine::new(HOSTILE).running().disk(Disk::new("system", 8 * MIB).filled(100));
    let pool = Pool::with(|scene| scene.vm(machine), |_| String::new());
    let how = "vms.exclude = ['web02', 'db01']\nincremental = { compression = 'none', nbd = false }\nretries.vm = 0\nlimits.vms = 1";
    let text = format!(
        "pools = ['lab']\nvms.all = true\nto.repositories = ['main']\n{how}\n\
         [[schedules]]\nname = 'night'\ncron = '0 2 * * *'\nkeep.last = 1\n"
    );
    pool.world.write("nightly.toml", &text);
    pool
}

/// Runs `xofs job`, which must end with this code and say nothing on standard error; returns what it wrote.
fn says(pool: &Pool, arguments: &[&str], expected: i32) -> String {
    let (code, out, err) = run(pool.command(arguments).env("TZ", "UTC"));
    assert_eq!((code, err.as_str()), (expected, ""), "{arguments:?}\n{out}");
    out
}

fn said(pool: &Pool, arguments: &[&str]) -> Value {
    serde_json::from_str(&says(pool, arguments, 0)).expect("JSON")
}

/// A run that is killed when it is dropped.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Has Python read a text with these lines; returns the JSON that they print. It is the one that scripts/setup has packages for.
fn python(lines: &str, text: &str) -> Value {
    let mut child = Command::new("/usr/bin/python3")
        .args(["-c", lines])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("python3 is installed by scripts/setup");
    child.stdin.take().expect("piped").write_all(text.as_bytes()).expect("it reads all");
    let output = child.wait_with_output().expect("it ends");
    assert!(output.status.success(), "python3 ended with {}\n{text}", output.status);
    serde_json::from_slice(&output.stdout).expect("JSON")
}

/// Reads metrics with the parser of Prometheus' own client for Python: name, labels and value of each.
const METRICS: &str = "
import json, sys
from prometheus_client.parser import text_string_to_metric_families
families = list(text_string_to_metric_families(sys.stdin.read()))
assert all(family.documentation and family.type in ('gauge', 'counter') for family in families)
print(json.dumps([[s.name, s.labels, s.value] for family in families for s in family.samples]))
";

/// Reads a page: all its tags in their order, each closed where it must be, and its text.
const PAGE: &str = "
import json, sys
from html.parser import HTMLParser
class Page(HTMLParser):
    def __init__(self):
        super().__init__(convert_charrefs=True)
        self.open, self.tags, self.words, self.links = [], [], [], []
    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.links += [value for name, value in attributes if name in ('href', 'src', 'xlink:href', 'action')]
        assert not any(name.startswith('on') for name, _ in attributes), attributes
        if tag not in ('meta', 'br', 'line'):
            self.open.append(tag)
    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)
    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, (tag, self.open, self.getpos())
        self.open.pop()
    def handle_data(self, data):
        self.words.append(data)
page = Page()
page.feed(sys.stdin.read())
page.close()
assert not page.open, page.open
print(json.dumps({'tags': sorted(set(page.tags)), 'links': page.links, 'text': ''.join(page.words),
                  'pictures': page.tags.count('svg')}))
";

#[test]
fn what_runs_did_is_reported_as_table_sums_json_page_and_metrics() {
    let pool = pool();
    assert_eq!(says(&pool, &["report"], 0), "no runs\n");
    pool.run(&[], 0);
    pool.run(&[], 0);
    pool.simulator.fault(Fault::call("VM.snapshot", Act::Fail(Failure::internal("no"))));
    pool.run(&[], 3);

    let text = says(&pool, &["report"], 0);
    let lines: Vec<&str> = text.lines().collect();
    assert!(lines[0].contains("nightly (night): partly failed, 2 VMs in "), "{text}");
    assert!(text.contains(&format!("\n  {SHOWN}  failed, ")), "{text}");
    assert!(text.contains("\n  web01  done, ") && text.contains("\n  merges, "), "{text}");
    // The first run read and wrote something, however long that took.
    let text = says(&pool, &["report", "--last", "3"], 0);
    let has = |stage: &str, of: &str| text.lines().any(|line| line.starts_with(stage) && line.contains(of));
    assert!(has("    read ", "  host host1") && has("    write ", "  repository main  "), "{text}");

    let schema: Value = serde_json::from_str(include_str!("../docs/job-report.schema.json")).expect("JSON");
    let report = said(&pool, &["report", "nightly", "--last", "9", "--json"]);
    assert_eq!(mismatch(&schema, &schema, &report), None, "{report:#}");
    let runs = report["runs"].as_array().expect("a list");
    let statuses: Vec<&str> = runs.iter().filter_map(|run| run["status"].as_str()).collect();
    assert_eq!(statuses, ["done", "done", "partial"]);
    let failed = runs[2]["vms"].as_array().into_iter().flatten().find(|vm| vm["status"] == "failed");
    let stages = failed.expect("one failed")["transfer"]["stages"].as_array().expect("time went by all the same");
    assert!(stages.iter().any(|stage| stage["stage"] == "snapshot"), "{stages:#?}");
    assert_eq!(report["sums"]["vms"], json!([{ "status": "done", "count": 5 }, { "status": "failed", "count": 1 }]));
    assert_eq!(report["sums"]["repositories"][0]["forgottenBackups"], 3, "{report:#}");
    let by_place = report["sums"]["transfers"]["byPlace"].as_array().expect("a list");
    let row = |stage: &str, kind: &str| by_place.iter().find(|row| row["stage"] == stage && row["of"]["kind"] == kind);
    let read = row("read", "host").expect("hosts were read from");
    assert_eq!((&read["of"]["name"], &read["transfers"]), (&json!("host1"), &json!(5)), "{read:#}");
    assert!(read["bytes"].as_u64().is_some_and(|bytes| bytes >= 8 * MIB), "{read:#}");
    assert_eq!(row("write", "repository").expect("it was written to")["of"]["name"], "main");

    let sums = says(&pool, &["report", "--since", "1d"], 0);
    assert!(sums.contains(" 3 runs (2 done; 1 partly failed), 6 VMs (5 done; 1 failed), "), "{sums}");
    assert!(sums.contains(&format!(" ({SHOWN}; last 20")), "{sums}");
    assert!(says(&pool, &["report", "--since", "2100-01-01"], 0).contains(": 0 runs, 0 VMs, "));

    let page = pool.world.path("report.html");
    assert_eq!(says(&pool, &["report", "--since", "1d", "--html", page.to_str().expect("UTF-8")], 0), "");
    let page = python(PAGE, &fs::read_to_string(&page).expect("written"));
    let links = page["links"].as_array().expect("a list");
    assert!(links.iter().all(|link| link.as_str().is_some_and(|link| link.starts_with("#run-"))), "{page:#}");
    let tags = page["tags"].as_array().expect("a list");
    assert!(["script", "img", "link", "iframe", "object"].iter().all(|tag| !tags.contains(&json!(tag))), "{page:#}");
    assert!(page["text"].as_str().is_some_and(|text| text.contains(SHOWN)), "{page:#}");
    assert!(page["pictures"].as_u64().is_some_and(|count| count >= 3), "{page:#}");

    let file = pool.world.path("xofs.prom");
    says(&pool, &["report", "--prometheus", "--output", file.to_str().expect("UTF-8")], 0);
    let metrics = fs::read_to_string(&file).expect("written");
    assert_eq!(says(&pool, &["report", "--prometheus"], 0), metrics);
    let samples = python(METRICS, &metrics);
    let value = |name: &str, labels: &[(&str, &str)]| -> Option<f64> {
        let is_it = |sample: &&Value| sample[0] == name && labels.iter().all(|(label, text)| sample[1][label] == *text);
        samples.as_array().expect("a list").iter().find(is_it)?[2].as_f64()
    };
    assert_eq!(value("xofs_job_runs_total", &[("job_id", "nightly"), ("status", "done")]), Some(2.0));
    assert_eq!(value("xofs_job_run_status", &[("job_id", "nightly"), ("status", "partial")]), Some(1.0));
    assert!(value("xofs_vm_last_backup_timestamp_seconds", &[("vm_name", SHOWN)]).is_some_and(|time| time > 1.7e9));
    let passed = value("xofs_transfer_bytes_total", &[("stage", "read"), ("kind", "host"), ("name", "host1")]);
    assert_eq!(passed, read["bytes"].as_f64());
    assert_eq!(value("xofs_merges_total", &[("repository", "main"), ("status", "done")]), Some(3.0));
}

#[test]
fn jobs_whose_file_is_wrong_are_reported_all_the_same_and_told() {
    let pool = pool();
    pool.run(&[], 0);
    let path = pool.world.path("jobs/nightly.toml");
    let job = fs::read_to_string(&path).expect("there");
    fs::write(&path, job.replace("cron =", "corn =")).expect("written");
    let (code, out, err) = run(&mut pool.command(&["report", "--prometheus"]));
    assert_eq!(code, 3, "{out}{err}");
    assert!(err.contains("'corn' is no key"), "{err}");
    assert!(out.contains("xofs_job_valid{job_id=\"nightly\"} 0\n"), "{out}");
    assert!(out.contains("xofs_job_run_status{job_id=\"nightly\",status=\"done\"} 1\n"), "{out}");
}

#[test]
fn top_shows_what_runs_do_and_never_one_whose_process_is_gone() {
    let pool = pool();
    assert_eq!(says(&pool, &["top"], 0), "no job runs\n");
    pool.simulator.fault(Fault::new(Site::Export, Act::Delay(PATIENCE)).after(MIB));
    let running = Running(pool.start());
    wait_for("the export", || pool.simulator.faults_left() == 0);
    // What was read until it stalled is written down within a second or two.
    let mut seen = Value::Null;
    wait_for("what it does", || {
        seen = said(&pool, &["top", "--json"]);
        seen["runs"][0]["vms"][0]["expectedBytes"].as_u64().is_some_and(|bytes| bytes > 0)
    });
    // It moves nothing any more, and ends nothing: what it is at is named all the same.
    wait_for("what stalls", || {
        let recent = said(&pool, &["top", "--json"])["runs"][0]["vms"][0]["recent"].take();
        let moved = recent["stages"].as_array().into_iter().flatten().filter_map(|stage| stage["bytes"].as_u64());
        let is_named = recent["bottleneck"]["stage"] == "read" && recent["seconds"].as_f64() > Some(5.0);
        moved.sum::<u64>() == 0 && is_named && recent["bottleneck"].to_string().contains("nothing came of it in ")
    });
    let runs = &seen["runs"];
    let (job, done, merging) = (&runs[0]["job"], &runs[0]["doneVms"], &runs[0]["merging"]);
    assert_eq!((job, done, merging), (&json!("nightly"), &json!(0), &json!([])), "{seen:#}");
    let vm = &runs[0]["vms"][0];
    assert_eq!((&vm["name"], &vm["pool"], &vm["attempt"]), (&json!(HOSTILE), &json!("lab"), &json!(1)), "{seen:#}");
    assert!(vm["recent"]["stages"].is_array() && vm["waitsFor"].is_string(), "{seen:#}");
    let text = says(&pool, &["top", "nightly", "--once"], 0);
    assert!(
        text.starts_with("nightly (night)  for ") && text.contains(": 1 VM under way, 0 done, 0 failed\n"),
        "{text}"
    );
    assert!(text.contains(&format!("\n  {SHOWN} (lab)  ")), "{text}");
    assert!(text.contains(" of "), "{text}");

    let live = pool.state().join("jobs/nightly/live.json");
    drop(running);
    assert!(live.exists(), "nobody could remove it");
    assert_eq!(says(&pool, &["top"], 0), "no job runs\n");
    assert_eq!(said(&pool, &["top", "--json"])["runs"], json!([]));
    pool.run(&[], 0);
    assert!(!live.exists(), "it is removed at the end");
}
