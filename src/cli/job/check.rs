//! `xofs job check`: whether files of jobs are right, and when they run next.

use std::ffi::OsString;
use std::fmt::Write as _;

use anyhow::Result;
use clap::Args;
use jiff::Timestamp;
use serde_json::{Value, json};

use super::files::{FolderArgs, Loaded};
use crate::cli::exit::Exit;
use crate::cli::print;
use crate::cli::text::{Shown, count};
use crate::job::{Fault, Job, Timed};

const EXAMPLES: &str = "\
Each mistake is named with its file and line. Ends with 2 if there is one.

Examples:
  xofs job check
  xofs job check nightly ./weekly.toml";

/// Checks files of jobs: each mistake with its line, and when they run next
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub struct CheckArgs {
    /// Names of jobs, or paths of their files [default: all]
    #[arg(value_name = "JOB|FILE")]
    jobs: Vec<OsString>,
    #[command(flatten)]
    folder: FolderArgs,
    /// Writes JSON
    #[arg(long)]
    json: bool,
}

/// Runs the command.
///
/// # Errors
/// If the configuration is wrong, or the folder cannot be listed.
pub fn run(arguments: &CheckArgs) -> Result<Exit> {
    let files = arguments.folder.files()?;
    let loaded = match arguments.jobs.as_slice() {
        [] => files.all()?,
        named => named.iter().map(|name| files.load(&files.path_of(name))).collect(),
    };
    let is_right = loaded.iter().all(|loaded| loaded.job.is_ok());
    let now = Timestamp::now();
    if arguments.json {
        let jobs: Vec<Value> = loaded.iter().map(|loaded| to_json(loaded, now)).collect();
        print::json(&json!({ "jobs": jobs }))?;
    } else if loaded.is_empty() {
        print::text(&format!("no job in {}\n", Shown(&files.folder.display().to_string())))?;
    } else {
        for loaded in &loaded {
            match &loaded.job {
                Ok(job) => print::text(&to_text(job, now))?,
                Err(faults) => faults.to_string().lines().for_each(|line| say!("{}", Shown(line))),
            }
        }
    }
    Ok(if is_right { Exit::Done } else { Exit::Usage })
}

/// Returns when a schedule runs next, in its time zone.
fn next(timed: &Timed, now: Timestamp) -> Option<String> {
    let next = timed.calendar.after(now)?.to_zoned(timed.calendar.zone().clone());
    Some(next.strftime("%Y-%m-%d %H:%M %Z").to_string())
}

fn to_text(job: &Job, now: Timestamp) -> String {
    let mut text = format!("{}: right, {}\n", Shown(&job.id), count(job.schedules.len(), "schedule"));
    for timed in &job.schedules {
        let next = next(timed, now).unwrap_or_else(|| "never".to_owned());
        // Writing to a String cannot fail.
        let _ = writeln!(text, "  {}  {}  next {next}", timed.name, timed.calendar.pattern());
    }
    text
}

fn to_json(loaded: &Loaded, now: Timestamp) -> Value {
    let fault = |fault: &Fault| json!({ "line": fault.line, "message": fault.message });
    let timed = |timed: &Timed| {
        json!({
            "name": timed.name,
            "cron": timed.calendar.pattern(),
            "timezone": timed.timezone,
            "next": timed.calendar.after(now).map(|next| next.to_string()),
        })
    };
    let (id, schedules, faults) = match &loaded.job {
        Ok(job) => (Some(&job.id), job.schedules.iter().map(timed).collect(), Vec::new()),
        Err(faults) => (None, Vec::new(), faults.faults.iter().map(fault).collect::<Vec<_>>()),
    };
    json!({ "file": loaded.path.to_string_lossy(), "job": id, "schedules": schedules, "faults": faults })
}
