//! `xofs job list`: the jobs, how their last runs stand, and when the next ones are.

use std::fmt::Write as _;
use std::io;
use std::path::Path;

use anyhow::{Context, Result};
use clap::Args;
use jiff::Timestamp;
use serde_json::{Value, json};

use super::files::{FolderArgs, Loaded};
use super::report;
use super::state::StateArgs;
use crate::cli::exit::Exit;
use crate::cli::print;
use crate::cli::text::Shown;
use crate::job::log::{self, Event, History, Record, Run, RunStatus};
use crate::job::{Job, lock};

const EXAMPLES: &str = "\
How a run stands is looked up each time: one whose process is gone without an end is 'interrupted'. Ends with 3 if a job is wrong.

Examples:
  xofs job list
  xofs job list --json | jq -r '.jobs[] | select(.last.status != \"done\").job'";

/// How often a log is read whose last run has no end, and is another one each time.
const LOOKS: u32 = 5;

/// Lists the jobs, how their last runs stand, and when the next ones are
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub struct ListArgs {
    #[command(flatten)]
    folder: FolderArgs,
    #[command(flatten)]
    state: StateArgs,
    /// Writes JSON
    #[arg(long)]
    json: bool,
}

/// Reads what the runs of a job left.
///
/// # Errors
/// What the system says.
pub fn history(state: &Path, job: &str) -> Result<History> {
    let folder = log::path(state, job);
    let settled = settled(&folder, || lock::runner(&folder));
    settled.with_context(|| format!("read the log of the job '{job}' in '{}'", folder.display()))
}

/// Reads it with the answer to who runs the job, until that was asked after its last run had begun: a run that begins between the
/// question and the reading is not interrupted.
fn settled<R: Fn(u32) -> bool>(folder: &Path, ask: impl Fn() -> io::Result<R>) -> io::Result<History> {
    let is_end = |record: &Record| matches!(record.event, Event::RunEnd { .. });
    let (mut looks, mut seen) = (1, None);
    loop {
        let history = History::read(folder, &ask()?)?;
        let without_end = |run: &&Run| run.status == RunStatus::Interrupted && !run.records.iter().any(is_end);
        let last = history.runs.last().filter(without_end).map(|run| run.id);
        if last.is_none() || last == seen || looks == LOOKS {
            return Ok(history);
        }
        (looks, seen) = (looks + 1, last);
    }
}

/// Runs the command.
///
/// # Errors
/// If the files or logs cannot be read.
pub fn run(arguments: &ListArgs) -> Result<Exit> {
    let all = arguments.folder.files()?.all()?;
    let state = arguments.state.open()?;
    let now = Timestamp::now();
    let (mut text, mut jobs, mut is_right) = (String::new(), Vec::new(), true);
    for loaded in &all {
        match &loaded.job {
            Ok(job) => {
                let history = history(state.folder(), &job.id)?;
                let (last, next) = (history.runs.last(), next(job, now));
                text.push_str(&line(job, last, next.as_ref()));
                jobs.push(to_json(loaded, job, last, next.map(|(next, _)| next)));
            }
            Err(faults) => {
                is_right = false;
                faults.to_string().lines().for_each(|line| say!("{}", Shown(line)));
                jobs.push(json!({ "file": loaded.path.to_string_lossy(), "job": null, "isRight": false }));
            }
        }
    }
    if arguments.json {
        print::json(&json!({ "jobs": jobs }))?;
    } else {
        print::text(&text)?;
    }
    Ok(if is_right { Exit::Done } else { Exit::Partial })
}

/// Returns when a job runs next by itself, and by which schedule.
fn next(job: &Job, now: Timestamp) -> Option<(Timestamp, String)> {
    let of = |timed: &crate::job::Timed| {
        let next = timed.calendar.after(now)?;
        let shown = next.to_zoned(timed.calendar.zone().clone()).strftime("%Y-%m-%d %H:%M %Z").to_string();
        Some((next, format!("{shown} ({})", timed.name)))
    };
    job.schedules.iter().filter_map(of).min()
}

fn line(job: &Job, last: Option<&Run>, next: Option<&(Timestamp, String)>) -> String {
    let last = match last {
        None => "never ran".to_owned(),
        Some(run) => {
            let time = run.records.first().map(|record| format!("{:.0}", record.time)).unwrap_or_default();
            format!("{} {time}", report::status_name(run.status))
        }
    };
    let next = next.map_or("by hand only", |(_, shown)| shown.as_str());
    let mut line = String::new();
    // Writing to a String cannot fail.
    let _ = writeln!(line, "{}  {last}  next {next}", Shown(&job.id));
    line
}

fn to_json(loaded: &Loaded, job: &Job, last: Option<&Run>, next: Option<Timestamp>) -> Value {
    json!({
        "file": loaded.path.to_string_lossy(),
        "job": job.id,
        "isRight": true,
        "description": job.description,
        "last": last.map(report::to_json),
        "next": next,
    })
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;

    use uuid::Uuid;

    use super::*;
    use crate::job::lock::RunLock;
    use crate::job::log::Log;

    #[test]
    fn a_run_that_begins_while_somebody_looks_is_not_shown_as_interrupted() {
        let folder = tempfile::tempdir().expect("a folder");
        let running = RefCell::new(Vec::new());
        let begin = |number: u128| {
            running.borrow_mut().clear();
            let lock = RunLock::take(folder.path()).expect("asked").expect("free");
            let mut log = Log::open(folder.path()).expect("opens");
            let process = std::process::id();
            let event =
                Event::RunStart { job: "nightly".into(), schedule: None, due: None, host: String::new(), process };
            log.append(&Record::now(Uuid::from_u128(number), event)).expect("fits");
            running.borrow_mut().push((lock, log));
        };
        // Each begins between the question and the reading; the first of them is gone without an end by then.
        let next = RefCell::new(vec![2, 1]);
        let ask = || {
            let runner = lock::runner(folder.path());
            next.borrow_mut().pop().into_iter().for_each(begin);
            runner
        };
        let statuses = || -> Vec<RunStatus> {
            settled(folder.path(), ask).expect("read").runs.iter().map(|run| run.status).collect()
        };
        assert_eq!(statuses(), [RunStatus::Interrupted, RunStatus::Running]);
        running.borrow_mut().clear();
        assert_eq!(statuses(), [RunStatus::Interrupted, RunStatus::Interrupted]);
    }
}
