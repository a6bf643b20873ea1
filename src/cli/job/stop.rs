//! `xofs job stop`: ends the run of a job.

use std::ffi::OsString;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use clap::Args;

use super::files::FolderArgs;
use super::state::StateArgs;
use crate::cli::exit::{Exit, Failure};
use crate::cli::print;
use crate::job::lock;

const EXAMPLES: &str = "\
The run removes what it made in pool and repositories, and its log says 'interrupted'. Merges stop, and go on with the next run.

Examples:
  xofs job stop nightly";

/// How often it is looked whether the run has ended.
const TICK: Duration = Duration::from_millis(100);

/// Stops the run of a job, and waits until it has ended
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub struct StopArgs {
    /// The name of a job, or the path of its file
    job: OsString,
    #[command(flatten)]
    folder: FolderArgs,
    #[command(flatten)]
    state: StateArgs,
    /// How long to wait for its end, in seconds
    #[arg(long, value_name = "SECONDS", default_value_t = 300)]
    wait: u64,
}

/// Runs the command.
///
/// # Errors
/// If the job is wrong, or its run does not end in time.
pub fn run(arguments: &StopArgs) -> Result<Exit> {
    let (_, job) = arguments.folder.files()?.job(&arguments.job)?;
    let folder = arguments.state.open()?.folder().join("jobs").join(&job.id);
    let act = || format!("stop the job '{}'", job.id);
    let Some(process) = lock::stop(&folder).with_context(act)? else {
        print::text(&format!("{}: does not run\n", job.id))?;
        return Ok(Exit::Done);
    };
    let begun = Instant::now();
    while lock::is_held(&folder).with_context(act)? {
        if begun.elapsed() >= Duration::from_secs(arguments.wait) {
            let message = format!(
                "{}: its process {process} was asked to stop, and still removes what it made after {} s",
                job.id, arguments.wait
            );
            return Err(Failure::new(Exit::Failed, message).into());
        }
        thread::sleep(TICK);
    }
    print::text(&format!("{}: stopped, after {:.1} s\n", job.id, begun.elapsed().as_secs_f64()))?;
    Ok(Exit::Done)
}
