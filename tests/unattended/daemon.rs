//! What keeps the daemon from nothing: files that are wrong, a configuration that is changed, and what others do with its jobs.

use std::fs;
use std::os::unix::fs::symlink;

use crate::night::{Night, time};
use crate::pool::wait_for;
use crate::support::{run, succeed};

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
