//! Jobs that a daemon runs, by a clock that the test sets.

use std::collections::BTreeMap;
use std::fs;
use std::process::Child;
use std::thread;
use std::time::{Duration, Instant};

use jiff::Timestamp;
use rustix::process::Pid;
use serde_json::Value;
use xapi_simulator::Class;
use xapi_simulator::scene::{Disk, Machine};

use crate::pool::{MIB, PATIENCE, hosts, wait_for};
use crate::site::Site;

/// Runs, by their jobs: when each was due, and how it ended.
pub type Runs = BTreeMap<&'static str, Vec<(&'static str, &'static str)>>;

/// A site whose jobs are run by a daemon; that is killed in the end.
pub struct Night {
    pub site: Site,
    jobs: Vec<&'static str>,
    daemon: Option<Child>,
    looks: u32,
}

impl Night {
    /// Each job is of a machine of its name.
    pub fn new(at: &str, jobs: &[(&'static str, &str)]) -> Self {
        let machine = |name: &str| Machine::new(name).disk(Disk::new(name, 8 * MIB).filled(100));
        let scene = jobs.iter().fold(hosts(1), |scene, (name, _)| scene.vm(machine(name)));
        let site = Site::new(scene, time(at));
        let night = Self { site, jobs: jobs.iter().map(|(name, _)| *name).collect(), daemon: None, looks: 0 };
        jobs.iter().for_each(|(name, cron)| night.write_job(name, cron, ""));
        night
    }

    /// The file of a job of a machine of its name; its schedule is the end of it.
    pub fn text(name: &str, cron: &str, more: &str) -> String {
        format!(
            "pools = ['lab']\nvms.names = ['{name}']\nto.repositories = ['main']\nincremental.nbd = false\n\
             incremental.compression = 'none'\nretries.vm = 0\n{more}\
             [[schedules]]\nname = 'night'\ncron = '{cron}'\ntimezone = 'Europe/Paris'\nkeep.last = 2\n",
        )
    }

    pub fn write_job(&self, name: &str, cron: &str, more: &str) {
        self.site.write_job(name, &Self::text(name, cron, more));
    }

    pub fn start_daemon(&mut self) {
        self.daemon = Some(self.site.start(&["daemon"], "daemon"));
        self.is_looked_at();
    }

    pub fn kill_daemon(&mut self) {
        let mut daemon = self.daemon.take().expect("it runs");
        daemon.kill().expect("it is our child");
        self.site.ended(&mut daemon, "daemon");
    }

    /// Waits until the daemon has looked at everything since now: each time it tells what is wrong with a file that is new.
    pub fn is_looked_at(&mut self) {
        self.looks += 1;
        let name = format!("look{}", self.looks);
        self.site.write_job(&name, "");
        wait_for("a look of the daemon", || self.said().contains(&name));
        fs::remove_file(self.site.path("jobs").join(format!("{name}.toml"))).expect("there");
    }

    /// What the daemon has said.
    pub fn said(&self) -> String {
        fs::read_to_string(self.site.path("daemon.err")).unwrap_or_default()
    }

    /// The runs of all jobs, by the log.
    pub fn runs(&self) -> BTreeMap<&'static str, Vec<(String, String)>> {
        let said = |line: &Value, key: &str| line[key].as_str().unwrap_or("none").to_owned();
        let end = |run: &[Value]| run.iter().rfind(|line| line["event"] == "runEnd").cloned().unwrap_or_default();
        let of = |run: &Vec<Value>| (said(&run[0], "due"), said(&end(run), "status"));
        self.jobs.iter().map(|job| (*job, self.site.log(job).iter().map(of).collect())).collect()
    }

    /// Waits until these are all runs that there were, and that no look of the daemon begins another one.
    pub fn were(&mut self, expected: &Runs) {
        let text = |all: &Vec<(&str, &str)>| all.iter().map(|(due, how)| ((*due).into(), (*how).into())).collect();
        let expected: BTreeMap<&str, Vec<(String, String)>> =
            expected.iter().map(|(job, all)| (*job, text(all))).collect();
        let begun = Instant::now();
        while self.runs() != expected && begun.elapsed() < PATIENCE {
            thread::sleep(Duration::from_millis(20));
        }
        // What is due because a run has ended; the first look may find that its process is about to.
        (0..3).for_each(|_| self.is_looked_at());
        assert_eq!(self.runs(), expected);
    }

    pub fn process_of(&self, job: &str) -> Pid {
        let process = self.site.log(job).last().expect("it runs")[0]["process"].as_i64().expect("a number");
        Pid::from_raw(i32::try_from(process).expect("small")).expect("not zero")
    }

    /// How many backups each machine has.
    pub fn backups(&self) -> Vec<usize> {
        let all = self.site.backups("main");
        let uuid = |job: &&str| self.site.uuid(&self.site.lab.simulator.only(Class::Vm, job));
        self.jobs.iter().map(|job| all.get(&uuid(job)).map_or(0, Vec::len)).collect()
    }
}

impl Drop for Night {
    fn drop(&mut self) {
        if let Some(mut daemon) = self.daemon.take() {
            let _ = daemon.kill();
            let _ = daemon.wait();
        }
    }
}

pub fn time(text: &str) -> Timestamp {
    text.parse().expect("a time")
}
