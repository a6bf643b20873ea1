//! `xofs job log`: what runs did.

use std::ffi::OsString;
use std::path::Path;

use anyhow::Result;
use clap::Args;
use serde_json::json;

use super::files::FolderArgs;
use super::list::history;
use super::report;
use super::state::StateArgs;
use crate::cli::exit::Exit;
use crate::cli::print;
use crate::cli::text::{Shown, count};
use crate::job::log::{self, Run};

const EXAMPLES: &str = "\
With --json, the lines of the log as they are, one JSON object each; their schema is docs/job-log.schema.json.

Examples:
  xofs job log nightly
  xofs job log nightly --last 30 --json | jq 'select(.event == \"vmEnd\" and .status != \"done\")'";

/// Shows what the runs of jobs did
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub struct LogArgs {
    /// The name of a job, or the path of its file [default: all]
    job: Option<OsString>,
    #[command(flatten)]
    folder: FolderArgs,
    #[command(flatten)]
    state: StateArgs,
    /// So many runs of each job
    #[arg(long, value_name = "N", default_value_t = 10)]
    last: usize,
    /// Writes JSON
    #[arg(long)]
    json: bool,
}

/// Runs the command.
///
/// # Errors
/// If the job is wrong, or its log cannot be read.
pub fn run(arguments: &LogArgs) -> Result<Exit> {
    let files = arguments.folder.files()?;
    let ids: Vec<String> = match &arguments.job {
        Some(named) => vec![files.job(named)?.1.id],
        None => files.all()?.into_iter().filter_map(|loaded| Some(loaded.job.ok()?.id)).collect(),
    };
    let state = arguments.state.open()?;
    let mut runs = Vec::new();
    for id in &ids {
        let mut history = history(state.folder(), id)?;
        say_unread(state.folder(), id, history.unread);
        runs.extend(history.runs.drain(history.runs.len().saturating_sub(arguments.last)..));
    }
    runs.sort_by_key(|run: &Run| run.records.first().map(|record| record.time));
    for run in &runs {
        if arguments.json {
            for record in &run.records {
                print::text(&format!("{}\n", json!(record)))?;
            }
        } else {
            print::text(&report::to_text(run))?;
        }
    }
    Ok(Exit::Done)
}

/// Says how many lines of the log of a job could not be understood, if any.
pub fn say_unread(state: &Path, job: &str, unread: usize) {
    if unread > 0 {
        let (lines, folder) = (count(unread, "line"), log::path(state, job).display().to_string());
        say!(
            "xofs: {lines} of the log in '{}' could not be understood: cut off by a crash, or of another version",
            Shown(&folder)
        );
    }
}
