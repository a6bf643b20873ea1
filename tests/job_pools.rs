//! Jobs of pools that do not answer, by the built binary: they hold up nobody, and the run ends when it is to.

mod job;
mod support;

use std::fs::{self, File};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::Command;
use std::sync::mpsc::{self, Sender};
use std::thread::{self, JoinHandle};

use job::{Pool, wait_for, words};
use serde_json::{Value, json};
use support::{init, succeed};
use xapi_simulator::Act;
use xapi_simulator::Fault;
use xapi_simulator::failure::Failure;

/// A host that accepts connections, and never says anything.
struct Mute {
    address: String,
    accepts: Option<JoinHandle<()>>,
    end: Sender<()>,
}

impl Mute {
    fn new() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("bound");
        let address = listener.local_addr().expect("it has one").to_string();
        let (end, is_over) = mpsc::channel();
        let accept = move || {
            let mut held = Vec::new();
            while let Ok((stream, _)) = listener.accept() {
                if is_over.try_recv().is_ok() {
                    break;
                }
                held.push(stream);
            }
        };
        Self { address, accepts: Some(thread::spawn(accept)), end }
    }

    /// What the configuration says of it, as the pool `mute`.
    fn configured(&self, folder: &Path) -> String {
        let password = folder.join("password");
        format!("[pools.mute]\naddress = 'http://{}'\npassword_file = '{}'\n", self.address, password.display())
    }
}

impl Drop for Mute {
    fn drop(&mut self) {
        let _ = self.end.send(());
        let _ = TcpStream::connect(&self.address);
        let _ = self.accepts.take().map(JoinHandle::join);
    }
}

/// Changes words of the job.
fn changed(pool: &Pool, from: &str, to: &str) {
    let text = fs::read_to_string(pool.world.path("jobs/nightly.toml")).expect("there");
    assert!(text.contains(from), "{text}");
    pool.world.write("nightly.toml", &text.replace(from, to));
}

#[test]
fn the_time_of_a_job_ends_logging_in_to_a_pool_that_says_nothing() {
    let mute = Mute::new();
    let pool = Pool::with(|scene| scene, |folder| mute.configured(folder));
    pool.job("retries.vm = 3\ntimeouts.job = '2s'\n");
    changed(&pool, "['lab']", "['mute']");
    changed(&pool, "retries.pause = '0s'", "retries.pause = '1h'");
    let report = pool.run(&[], 1);
    assert_eq!(words(&report, "reason"), ["pool mute \"it was ended: the job may take 2 s by the job's timeouts\""]);
    assert_eq!(words(&report, "attempt"), ["pool mute 0"]);
    // One that replicas are kept in.
    pool.job_to("to.srs = ['mute=spare']", "timeouts.job = '2s'");
    let report = pool.run(&[], 1);
    let reason = "\"it never was its turn: the job may take 2 s by the job's timeouts\"";
    assert_eq!(words(&report, "reason"), [format!("web01 {reason}"), format!("web02 {reason}")], "{report:#}");
    pool.is_at_rest(0);
}

#[test]
fn the_time_of_a_job_ends_opening_a_repository_that_cannot_be_opened_before() {
    let configured = |folder: &Path| {
        let (locked, pipe) = (init(folder, "locked", &["--encrypted"]), folder.join("pipe"));
        succeed(Command::new("mkfifo").arg(&pipe));
        let (locked, pipe) = (locked.display(), pipe.display());
        format!("[repositories.locked]\npath = '{locked}'\npassword_command = 'exec 2> /dev/null; exec cat {pipe}'\n")
    };
    let pool = Pool::with(|scene| scene, configured);
    pool.job_to("to.repositories = ['main', 'locked', 'other']", "timeouts.job = '2s'");
    let report = pool.run(&[], 1);
    // Whoever reads it ends.
    drop(File::options().read(true).write(true).open(pool.world.path("pipe")).expect("opened"));
    let late = "the job may take 2 s by the job's timeouts";
    let expected = ["repository locked", "repository other"].map(|name| format!("{name} \"it was ended: {late}\""));
    let lab = format!("pool lab \"it was ended: {late}\"");
    assert_eq!(words(&report, "reason"), [lab.as_str(), &expected[0], &expected[1]], "{report:#}");
}

#[test]
fn a_pool_that_says_nothing_holds_up_no_machine_of_another() {
    let mute = Mute::new();
    let pool = Pool::with(|scene| scene, |folder| mute.configured(folder));
    pool.job("incremental.nbd = false\n");
    changed(&pool, "['lab']", "['mute', 'lab']");
    changed(&pool, "retries.pause = '0s'", "retries.pause = '1h'");
    let mut child = pool.start();
    let is_done = |line: &Value| line["event"] == "vmEnd" && line["status"] == "done";
    let log = pool.state().join("jobs/nightly/log.jsonl");
    wait_for("the machines", || log.exists() && pool.log().iter().filter(|line| is_done(line)).count() == 2);
    assert_eq!(pool.status(), "running");
    succeed(&mut pool.command(&["stop", "nightly"]));
    assert_eq!(child.wait().expect("it is our child").code(), Some(130));
    let lines = pool.log();
    let end = lines.iter().rev().find(|line| line["event"] == "vmEnd").expect("it is told");
    assert_eq!((&end["name"], &end["reason"]), (&json!("pool mute"), &json!("the run was stopped")));
    pool.is_at_rest(2);
}

#[test]
fn the_machines_of_a_pool_that_answers_late_are_backed_up_and_what_it_lacks_is_told() {
    let pool = Pool::new();
    pool.job("vms.uuids = ['00000000-0000-0000-0000-000000000001']\n");
    let breaks = |times| {
        let fault = Fault::call("session.login_with_password", Act::Fail(Failure::internal("no")));
        pool.simulator.fault(fault.times(times));
    };
    breaks(1);
    let report = pool.run(&[], 3);
    let absent = "00000000-0000-0000-0000-000000000001 \"failed\"";
    assert_eq!(words(&report, "status"), [absent, "web01 \"done\"", "web02 \"done\""], "{report:#}");
    assert_eq!(pool.simulator.faults_left(), 0);
    // As often as a machine is tried, and no more.
    breaks(2);
    let report = pool.run(&[], 1);
    assert_eq!(words(&report, "status"), ["pool lab \"failed\""], "{report:#}");
    assert_eq!(pool.simulator.faults_left(), 0);
    pool.is_at_rest(2);
}
