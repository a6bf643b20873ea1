//! `xofs job daemon`: runs jobs by their schedules, each in a process of its own.
//!
//! ```text
//! every few seconds: configuration, files of the jobs ─► what is due, by log and calendar ─► 'xofs job run', one for each job
//! ```
//!
//! It keeps nothing in memory that matters: killed at any time and started again, it finds out from the logs what was run. A run goes on
//! without it.

use std::collections::BTreeMap;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use clap::Args;
use jiff::Timestamp;
use xapi::Cancel;

use super::files::{Files, FolderArgs, Loaded};
use super::state::StateArgs;
use crate::cli::exit::{Exit, Failure};
use crate::cli::text::Shown;
use crate::cli::{Global, daemon, signals};
use crate::job::{Job, Kept, Seen, Timed, lock, log};
use crate::pool::{ErrorKind, State};

const EXAMPLES: &str = "\
It reads the configuration and the files of the jobs again and again, so it need not be told of changes. Runs go on when it ends. Started by systemd, as by \
the example xofs-jobs.service, it says when it is ready.

Examples:
  xofs job daemon
  systemctl enable --now xofs-jobs";

/// How often files and processes are looked at.
const TICK: Duration = Duration::from_secs(1);
/// How long a job is left alone whose process ended without having begun: twice as long is still no run missed.
const PAUSE: Duration = Duration::from_secs(120);

/// Runs jobs by their schedules
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub struct DaemonArgs {
    #[command(flatten)]
    folder: FolderArgs,
    #[command(flatten)]
    state: StateArgs,
}

struct Daemon<'a> {
    global: &'a Global,
    files: Files,
    state: State,
    /// The processes that run jobs.
    running: BTreeMap<String, Child>,
    /// When runs of jobs began, as it was read.
    starts: BTreeMap<String, Kept>,
    /// Jobs that are left alone.
    paused: BTreeMap<String, Instant>,
    /// What is wrong with files, as it was said.
    said: String,
}

/// Runs the command.
///
/// # Errors
/// If another one runs with the same state, or the configuration is wrong.
pub fn run(global: &Global, arguments: &DaemonArgs) -> Result<Exit> {
    // Before other threads are started.
    let cancel = Cancel::new();
    let stopping = cancel.clone();
    signals::handle(move || stopping.cancel()).context("take the signals that end a program")?;
    let files = arguments.folder.files()?;
    let state = arguments.state.open()?;
    let _only = match state.lock("job-daemon", Duration::ZERO, || false) {
        Err(error) if error.kind() == ErrorKind::Locked => {
            let folder = state.folder().display();
            return Err(Failure::new(Exit::Locked, format!("a daemon runs already for the state in '{folder}'")).into());
        }
        locked => locked.context("begin to run jobs by their schedules")?,
    };
    let (running, starts, paused) = (BTreeMap::new(), BTreeMap::new(), BTreeMap::new());
    let mut jobs = Daemon { global, files, state, running, starts, paused, said: String::new() };
    daemon::notify();
    while !cancel.is_cancelled() {
        if let Err(error) = jobs.look() {
            jobs.say(format!("{error:#}"));
        }
        // What is stopped meanwhile is seen above.
        let _ = cancel.sleep(TICK, "wait for what is due");
    }
    Ok(Exit::Done)
}

impl Daemon<'_> {
    /// Says what is wrong, once.
    fn say(&mut self, wrong: String) {
        if wrong != self.said {
            wrong.lines().for_each(|line| say!("xofs: {}", Shown(line)));
            self.said = wrong;
        }
    }

    /// Looks at everything once, and starts what is due.
    fn look(&mut self) -> Result<()> {
        self.reap();
        let mut wrong = Vec::new();
        if let Err(error) = self.files.refresh() {
            wrong.push(format!("{error:#}; what was configured before still counts"));
        }
        for Loaded { path, job } in self.files.all()? {
            match job {
                Ok(job) => {
                    if let Err(error) = self.look_at(&path, &job) {
                        wrong.push(format!("{}: {error:#}", job.id));
                    }
                }
                Err(faults) => wrong.push(faults.to_string()),
            }
        }
        self.say(wrong.join("\n"));
        Ok(())
    }

    fn look_at(&mut self, path: &Path, job: &Job) -> Result<()> {
        let is_paused = self.paused.get(&job.id).is_some_and(|until| Instant::now() < *until);
        if job.schedules.is_empty() || is_paused || self.running.contains_key(&job.id) {
            return Ok(());
        }
        let now = Timestamp::now();
        let folder = log::folder(self.state.folder(), &job.id).context("make the folder of its log")?;
        let seen = Seen::update(&folder, &job.schedules, now).context("note its schedules")?;
        if lock::is_held(&folder).context("see whether it runs")? {
            // Somebody else runs it, or tells of it still, which the log does not say; what is due is so afterwards, too.
            return Ok(());
        }
        let starts = self.starts.entry(job.id.clone()).or_default().read(&folder).context("read its log")?;
        let due = |timed: &Timed| Some((seen.due(timed, starts, now).filter(|due| *due <= now)?, timed.name.clone()));
        let Some((due, schedule)) = job.schedules.iter().filter_map(due).min() else { return Ok(()) };
        let child = self.start(path, &schedule, due)?;
        self.running.insert(job.id.clone(), child);
        Ok(())
    }

    fn start(&self, path: &Path, schedule: &str, due: Timestamp) -> Result<Child> {
        // Not by a name: the program may have been exchanged meanwhile.
        let mut command = Command::new("/proc/self/exe");
        command.arg0("xofs").args(["job", "run", "--schedule", schedule, "--due", &due.to_string()]);
        command.arg("--state-dir").arg(self.state.folder());
        if let Some(file) = &self.global.password_file {
            command.arg("--password-file").arg(file);
        }
        if let Some(password) = &self.global.password_command {
            command.arg("--password-command").arg(password);
        }
        // Ctrl-C is for this one; runs go on.
        command.arg("--").arg(path).stdin(Stdio::null()).process_group(0);
        command.spawn().context("start 'xofs job run'")
    }

    /// Lets go of the processes that have ended.
    fn reap(&mut self) {
        let mut ended = Vec::new();
        for (id, child) in &mut self.running {
            match child.try_wait() {
                Ok(None) => {}
                Ok(Some(status)) => ended.push((id.clone(), status.code())),
                // What cannot be waited for is no child any more.
                Err(_) => ended.push((id.clone(), None)),
            }
        }
        for (id, code) in ended {
            let Some(child) = self.running.remove(&id) else { continue };
            // Somebody else had begun just before it.
            let is_refused = code == Some(i32::from(Exit::Locked as u8));
            let folder = log::path(self.state.folder(), &id);
            let starts = self.starts.entry(id.clone()).or_default().read(&folder);
            if !is_refused && !starts.is_ok_and(|starts| starts.has_begun(child.id())) {
                // It said why.
                self.paused.insert(id, Instant::now() + PAUSE);
            }
        }
    }
}
