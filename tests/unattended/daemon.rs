//! What keeps the daemon from nothing: files that are wrong, a configuration that is changed, and what others do with its jobs.

use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::symlink;

use rustix::fs::{FlockOperation, flock};

use crate::night::{Night, Runs, time};
use crate::pool::wait_for;
use crate::support::{init, run, succeed};

#[test]
fn files_that_cannot_be_read_are_told_of_and_the_other_jobs_run() {
    let mut night = Night::new("2027-03-01T00:50:00Z", &[("good", "0 2 * * *")]);
    let jobs = night.site.path("jobs");
    symlink("nowhere", jobs.join("a-link.toml")).expect("made");
    fs::create_dir(jobs.join("b-folder.toml")).expect("made");
    succeed(std::process::Command::new("mkfifo").arg(jobs.join("c-pipe.toml")));
    night.start_daemon();
    night.site.clock.set(time("2027-03-01T01:00:00Z"));
    let done = || night.runs()["good"] == [("2027-03-01T01:00:00Z".to_owned(), "done".to_owned())];
    wait_for("the run that is due", done);
    let expected = [
        ("a-link", "it cannot be read: No such file or directory (os error 2)"),
        ("b-folder", "it cannot be read: it is no regular file"),
        ("c-pipe", "it cannot be read: it is no regular file"),
    ];
    let expected = expected.map(|(name, why)| format!("{}:1: {why}", jobs.join(format!("{name}.toml")).display()));
    let has_all = |said: &str| expected.iter().all(|line| said.contains(line));
    assert!(has_all(&night.said()), "{}", night.said());
    for (arguments, listed) in
        [(["list", "--json"], "\"job\": \"good\""), (["report", "--prometheus"], "xofs_job_valid{job_id=\"a-link\"} 0")]
    {
        let (code, out, err) = run(&mut night.site.command(&arguments));
        assert_eq!(code, 3, "{out}{err}");
        assert!(out.contains(listed) && has_all(&err), "{out}{err}");
    }
}

#[test]
fn a_configuration_that_is_changed_counts_at_once_and_one_that_is_wrong_stops_nothing() {
    let mut night = Night::new("2027-03-01T00:50:00Z", &[("good", "0 2 * * *")]);
    let job = Night::text("good", "0 2 * * *", "").replace("'main'", "'third'");
    night.site.write_job("good", &job);
    night.start_daemon();
    let wrong = "'third' is no repository of the configuration";
    assert!(night.said().contains(wrong), "{}", night.said());
    let path = night.site.path("config/xofs/config.toml");
    let before = fs::read_to_string(&path).expect("there");
    let configure = |text: &str| {
        let fresh = path.with_extension("new");
        fs::write(&fresh, text).expect("written");
        fs::rename(fresh, &path).expect("renamed");
    };
    let third = init(&night.site.path(""), "third", &[]);
    configure(&format!("{before}[repositories.third]\npath = '{}'\n", third.display()));
    // A job with a mistake is not one that has been seen: its schedule counts from now on.
    let listed = |night: &Night| fs::exists(night.site.lab.state.join("jobs/good/schedules.json")).expect("looked");
    wait_for("the job to be right", || listed(&night));
    night.site.clock.set(time("2027-03-01T01:00:00Z"));
    let expected: Runs = [("good", vec![("2027-03-01T01:00:00Z", "done")])].into();
    night.were(&expected);
    configure("[repositories.third]\n");
    let told = "config.toml', line 1: missing field `path`; what was configured before still counts";
    wait_for("what is wrong with the configuration", || night.said().contains(told));
    // The run itself has only what the configuration says now.
    night.site.clock.set(time("2027-03-02T01:00:00Z"));
    wait_for("a run that fails to begin", || night.said().matches(told.split(';').next().expect("a word")).count() > 1);
    assert_eq!(night.said().matches(wrong).count(), 1, "{}", night.said());
}

/// The same job; what it missed is left out.
fn skipping(more: &str) -> String {
    Night::text("good", "0 2 * * *", more) + "missed = 'skip'\n"
}

#[test]
fn what_was_missed_is_left_out_where_the_schedule_says_so_but_for_the_last_five_minutes() {
    let mut night = Night::new("2027-03-01T00:50:00Z", &[("good", "0 2 * * *"), ("other", "0 2 * * *")]);
    night.site.write_job("good", &skipping(""));
    night.start_daemon();
    night.kill_daemon();
    // Off for two nights, and on again in the morning.
    night.site.clock.set(time("2027-03-03T06:00:00Z"));
    night.start_daemon();
    let mut expected: Runs = [("good", Vec::new()), ("other", vec![("2027-03-01T01:00:00Z", "done")])].into();
    night.were(&expected);
    night.kill_daemon();
    // On again a little late.
    night.site.clock.set(time("2027-03-04T01:02:00Z"));
    night.start_daemon();
    for job in ["good", "other"] {
        expected.get_mut(job).expect("one of them").push(("2027-03-04T01:00:00Z", "done"));
    }
    night.were(&expected);
}

#[test]
fn a_run_by_hand_that_is_still_told_of_costs_no_run_that_is_due() {
    let mut night = Night::new("2027-03-01T00:50:00Z", &[("good", "0 2 * * *")]);
    let told = night.site.path("told");
    let tell = format!("while ! test -e {}; do sleep 0.1; done", told.display());
    night.site.write_job(
        "good",
        &skipping(&format!("[report]\ncommand = ['sh', '-c', '{tell}']\nformat = 'json'\nwhen = 'always'\n")),
    );
    night.start_daemon();
    let mut by_hand = night.site.start(&["run", "good"], "by-hand");
    wait_for("its end", || night.site.log("good").iter().flatten().any(|line| line["event"] == "runEnd"));
    night.site.clock.set(time("2027-03-01T01:00:00Z"));
    // Long enough for a process that was started in vain to have ended.
    (0..5).for_each(|_| night.is_looked_at());
    fs::write(told, "").expect("written");
    assert_eq!(night.site.ended(&mut by_hand, "by-hand").code, Some(0));
    night.were(&[("good", vec![("none", "done"), ("2027-03-01T01:00:00Z", "done")])].into());
    assert!(!night.said().contains("runs already"), "{}", night.said());
}

#[test]
fn a_run_that_was_refused_because_another_one_had_the_lock_is_tried_again_at_once() {
    let mut night = Night::new("2027-03-01T00:50:00Z", &[("good", "0 2 * * *")]);
    night.start_daemon();
    // Who looks sees nobody who runs it, but nobody can: as if it were taken each time just after the look.
    let lock = fs::File::create(night.site.lab.state.join("jobs/good/lock")).expect("made");
    flock(&lock, FlockOperation::LockShared).expect("free");
    night.site.clock.set(time("2027-03-01T01:00:00Z"));
    wait_for("three that are refused", || night.said().matches("the job 'good' runs already").count() >= 3);
    drop(lock);
    night.were(&[("good", vec![("2027-03-01T01:00:00Z", "done")])].into());
}

#[test]
fn a_job_runs_by_itself_whatever_bytes_its_file_is_named_with() {
    let mut night = Night::new("2027-03-01T00:50:00Z", &[("good", "0 2 * * *")]);
    let jobs = night.site.path("jobs");
    fs::write(jobs.join("good.toml"), format!("id = 'good'\n{}", Night::text("good", "0 2 * * *", "")))
        .expect("written");
    fs::rename(jobs.join("good.toml"), jobs.join(OsStr::from_bytes(b"g\xff.toml"))).expect("renamed");
    night.start_daemon();
    night.site.clock.set(time("2027-03-01T01:00:00Z"));
    night.were(&[("good", vec![("2027-03-01T01:00:00Z", "done")])].into());
}
