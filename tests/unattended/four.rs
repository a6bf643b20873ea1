//! Four jobs at once, by the daemon, in the nights in which the clock is changed: one is killed, one stands still, the daemon is
//! killed and started again, and somebody sets the clock.

use std::time::{Duration, Instant};

use rustix::process::{Signal, kill_process};
use serde_json::Value;
use xapi_simulator::{Act, Class, Fault, Site as Where};

use crate::night::{Night, Runs, time};
use crate::pool::{MIB, wait_for};

/// Longer than any run lasts.
const FOR_EVER: Duration = Duration::from_secs(3600);
/// How long what stands still may take.
const LIMIT: Duration = Duration::from_secs(10);

#[test]
fn four_jobs_in_the_night_that_skips_an_hour_run_once_each_whatever_ends_them_and_whoever_sets_the_clock() {
    // The clock goes from 02:00 to 03:00, at 01:00 in Greenwich: all four are due then.
    let jobs = [("good", "0 2 * * *"), ("killed", "30 2 * * *"), ("late", "59 2 * * *"), ("still", "0 3 * * *")];
    let mut night = Night::new("2027-03-28T00:10:00Z", &jobs);
    night.write_job("still", "0 3 * * *", &format!("timeouts.vm = '{}s'\n", LIMIT.as_secs()));
    night.start_daemon();
    night.were(&jobs.iter().map(|(job, _)| (*job, Vec::new())).collect());
    for job in ["killed", "still"] {
        night.site.lab.simulator.fault(Fault::new(Where::Export, Act::Delay(FOR_EVER)).of(job).after(MIB / 4));
    }
    night
        .site
        .lab
        .simulator
        .fault(Fault::new(Where::Export, Act::Delay(Duration::from_secs(5))).of("late").after(MIB / 4));
    night.site.clock.set(time("2027-03-28T01:00:00Z"));
    // Where the machine is slow, the time of one may be over before it stands still.
    let is_over = || night.site.log("still").iter().flatten().any(|line| line["event"] == "runEnd");
    wait_for("three transfers that stand still", || {
        let left = night.site.lab.simulator.faults_left();
        left == 0 || left == 1 && is_over()
    });
    night.site.lab.simulator.clear_faults();
    let begun = Instant::now();
    night.kill_daemon();
    kill_process(night.process_of("killed"), Signal::KILL).expect("it runs");
    night.start_daemon();
    // Nobody runs the daemon twice.
    night.site.run(&["daemon"], 11);
    let skipped = "2027-03-28T01:00:00Z";
    let mut expected: Runs = [("good", "done"), ("late", "done"), ("still", "failed")]
        .into_iter()
        .map(|(job, how)| (job, vec![(skipped, how)]))
        .chain([("killed", vec![(skipped, "none")])])
        .collect();
    night.were(&expected);
    println!("what stood still was over {:.1} s after the others began", begun.elapsed().as_secs_f64());
    let still = night.site.log("still");
    let end = still[0].iter().find(|line| line["event"] == "vmEnd").expect("it ended");
    assert_eq!(end["reason"], "it was ended: a VM may take 10 s by the job's timeouts");
    let shown = night.site.ask(&["list", "--json"]);
    let status = |job: &Value| {
        format!("{} {}", job["job"].as_str().expect("a name"), job["last"]["status"].as_str().expect("said"))
    };
    let shown: Vec<String> = shown["jobs"].as_array().expect("a list").iter().map(status).collect();
    assert_eq!(shown, ["good done", "killed interrupted", "late done", "still failed"]);
    assert_eq!(night.backups(), [1, 0, 1, 0]);
    // Put back by hand, and it goes on until after what it had shown.
    for at in ["2027-03-28T00:00:30Z", "2027-03-28T00:59:50Z", "2027-03-28T01:00:10Z", "2027-03-28T02:10:00Z"] {
        night.site.clock.set(time(at));
        night.were(&expected);
    }
    night.write_job("still", "0 3 * * *", "");
    // A day later, each is due once, at its own time; what the killed run left is removed.
    night.site.clock.set(time("2027-03-29T01:10:00Z"));
    let times = ["2027-03-29T00:00:00Z", "2027-03-29T00:30:00Z", "2027-03-29T00:59:00Z", "2027-03-29T01:00:00Z"];
    for ((job, _), at) in jobs.iter().zip(times) {
        expected.get_mut(job).expect("one of them").push((at, "done"));
    }
    night.were(&expected);
    assert_eq!(night.backups(), [2, 1, 2, 1]);
    assert_eq!(night.site.lab.snapshots(Class::Vm), 4);
    night.site.is_at_rest("at the end");
}

#[test]
fn jobs_in_the_night_that_has_an_hour_twice_run_the_first_time_and_a_clock_that_was_years_ahead_stops_none() {
    // The clock goes from 03:00 to 02:00, at 01:00 in Greenwich.
    let jobs = [("hourly", "0 * * * *"), ("nightly", "30 2 * * *")];
    let mut night = Night::new("2026-10-24T23:10:00Z", &jobs);
    night.start_daemon();
    let mut expected: Runs = jobs.iter().map(|(job, _)| (*job, Vec::new())).collect();
    for (at, job) in [
        ("2026-10-25T00:00:00Z", Some("hourly")),
        ("2026-10-25T00:30:00Z", Some("nightly")),
        // 02:00 and 02:30 once more.
        ("2026-10-25T01:00:00Z", None),
        ("2026-10-25T01:30:00Z", None),
        ("2026-10-25T02:00:00Z", Some("hourly")),
    ] {
        night.site.clock.set(time(at));
        if let Some(job) = job {
            expected.get_mut(job).expect("one of them").push((at, "done"));
        }
        night.were(&expected);
    }
    // Somebody mistakes the year, and sees it after a while.
    night.site.clock.set(time("2029-10-25T02:10:00Z"));
    for (job, at) in [("hourly", "2026-10-25T03:00:00Z"), ("nightly", "2026-10-26T01:30:00Z")] {
        expected.get_mut(job).expect("one of them").push((at, "done"));
    }
    night.were(&expected);
    night.site.clock.set(time("2026-10-25T02:30:00Z"));
    night.were(&expected);
    night.site.clock.set(time("2026-10-25T03:00:00Z"));
    expected.get_mut("hourly").expect("one of them").push(("2026-10-25T03:00:00Z", "failed"));
    night.were(&expected);
}
