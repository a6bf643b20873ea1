//! `xofs job new`: a file for a new job, out of options and answers.

mod answers;
mod questions;
mod terminal;

use std::fs::{self, OpenOptions};
use std::io::{self, Write};
use std::path::Path;

use anyhow::{Context, Result};
use clap::{Args, ValueEnum};

use super::files::{self, FolderArgs};
use crate::cli::exit::{Exit, Failure};
use crate::cli::print;
use crate::cli::text::Shown;
use crate::job::{Known, is_id};
use answers::{Answers, Draft, Vms};
use questions::Question;
use terminal::Terminal;

const EXAMPLES: &str = "\
What is not given by an option is asked for on a terminal. The file is written only if it is right, and never over another.

Examples:
  xofs job new nightly
  xofs job new nightly --pool lab --tag backup --to main --to offsite --cron '0 2 * * *' --keep-last 7 --keep-weekly 4
  xofs job new once --pool lab --vm web01 --to main --no-schedule";

/// Kinds of backups.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Mode {
    /// Each disk as a chain: what changed since the backup before
    Incremental,
    /// The whole VM as one XVA
    Full,
}

/// Asks which VMs, where, how and when, and writes a job's file
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub struct NewArgs {
    /// The name of the job
    name: String,
    #[command(flatten)]
    folder: FolderArgs,
    /// What people call it
    #[arg(long, value_name = "TEXT")]
    description: Option<String>,
    /// A pool, by its name in the configuration; may be repeated
    #[arg(long = "pool", value_name = "NAME")]
    pools: Vec<String>,
    /// A VM: its name, or its uuid; may be repeated
    #[arg(long = "vm", value_name = "NAME|UUID")]
    vms: Vec<String>,
    /// VMs with this tag; may be repeated
    #[arg(long = "tag", value_name = "TAG")]
    tags: Vec<String>,
    /// All VMs
    #[arg(long, conflicts_with_all = ["vms", "tags"])]
    all: bool,
    /// Not this VM; may be repeated
    #[arg(long, value_name = "NAME|UUID")]
    exclude: Vec<String>,
    /// A repository; may be repeated
    #[arg(long, value_name = "REPO")]
    to: Vec<String>,
    /// An SR that replicas are kept on; in another pool: its name, '=', the SR; may be repeated
    #[arg(long, value_name = "[POOL=]SR")]
    to_sr: Vec<String>,
    /// What kind of backup is made
    #[arg(long, value_enum)]
    mode: Option<Mode>,
    /// When it runs: minute, hour, day of month, month, day of week
    #[arg(long, value_name = "PATTERN")]
    cron: Option<String>,
    /// It never runs by itself
    #[arg(long, conflicts_with = "cron")]
    no_schedule: bool,
    /// The time zone of the schedule [default: that of this machine]
    #[arg(long, value_name = "TZ", requires = "cron")]
    timezone: Option<String>,
    /// Keeps the N most recent backups
    #[arg(long, value_name = "N", conflicts_with = "no_schedule")]
    keep_last: Option<u32>,
    /// Keeps one of each of the N most recent days that have any
    #[arg(long, value_name = "N", conflicts_with = "no_schedule")]
    keep_daily: Option<u32>,
    /// The same of weeks
    #[arg(long, value_name = "N", conflicts_with = "no_schedule")]
    keep_weekly: Option<u32>,
    /// The same of months
    #[arg(long, value_name = "N", conflicts_with = "no_schedule")]
    keep_monthly: Option<u32>,
    /// The same of years
    #[arg(long, value_name = "N", conflicts_with = "no_schedule")]
    keep_yearly: Option<u32>,
}

/// Runs the command.
///
/// # Errors
/// `Usage` if something is missing and cannot be asked for, if it is not right, or if the file is there already.
pub fn run(arguments: &NewArgs) -> Result<Exit> {
    if !is_id(&arguments.name) {
        let shown = arguments.name.escape_debug();
        let message = format!("'{shown}' is no name of a job: expected up to 64 letters, digits, - and _");
        return Err(Failure::usage(message).into());
    }
    let files = arguments.folder.files()?;
    let known = files::known()?;
    let path = files.path_of(arguments.name.as_ref());
    if path.exists() {
        return Err(taken(&path).into());
    }
    let (answers, missing) = given(arguments, &known);
    if !missing.is_empty() && !Terminal::is_there() {
        let options: Vec<&str> = missing.iter().map(|question| question.options()).collect();
        let message = format!("there is no terminal to ask on: give {}", options.join(", "));
        return Err(Failure::usage(message).into());
    }
    if known.pools.is_empty() {
        let message = "nothing was written: the configuration names no pool; it needs an entry [pools.NAME]";
        return Err(Failure::usage(message).into());
    }
    let draft = Draft { arguments, path: &path, known: &known };
    let faults = draft.faults(&answers);
    if !faults.is_empty() {
        return Err(Failure::usage(format!("nothing was written: {}", faults.join("; "))).into());
    }
    let answers = questions::ask(&draft, answers, &missing)?;
    write(&path, &draft.to_toml(&answers))?;
    let name = &arguments.name;
    print::text(&format!(
        "{} was written. Next: 'xofs job check {name}', and look at it.\n",
        Shown(&path.display().to_string())
    ))?;
    Ok(Exit::Done)
}

fn taken(path: &Path) -> Failure {
    Failure::usage(format!("'{}' is there already: it is never written over; give another name", path.display()))
}

fn write(path: &Path, text: &str) -> Result<()> {
    let act = || format!("write '{}'", path.display());
    if let Some(folder) = path.parent() {
        fs::create_dir_all(folder).with_context(act)?;
    }
    let mut file = match OpenOptions::new().write(true).create_new(true).open(path) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => return Err(taken(path).into()),
        opened => opened.with_context(act)?,
    };
    let written = file.write_all(text.as_bytes()).and_then(|()| file.sync_all());
    if written.is_err() {
        // Half a job is none.
        let _ = fs::remove_file(path);
    }
    written.with_context(act)
}

/// Takes what the options say. What none says is right in itself meanwhile, so that the rest can be checked, and is named beside it.
fn given(arguments: &NewArgs, known: &Known) -> (Answers, Vec<Question>) {
    let keep: Vec<(&'static str, u32)> = [
        ("last", arguments.keep_last),
        ("daily", arguments.keep_daily),
        ("weekly", arguments.keep_weekly),
        ("monthly", arguments.keep_monthly),
        ("yearly", arguments.keep_yearly),
    ]
    .into_iter()
    .filter_map(|(rule, count)| Some((rule, count?)))
    .collect();
    let has_pool = !arguments.pools.is_empty();
    let is_named = !(arguments.vms.is_empty() && arguments.tags.is_empty());
    let has_destination = !(arguments.to.is_empty() && arguments.to_sr.is_empty());
    let is_scheduled = arguments.cron.is_some() || arguments.no_schedule;
    let missing = [
        (has_pool, Question::Pools),
        (is_named || arguments.all, Question::Vms),
        (has_destination, Question::Destinations),
        (is_scheduled, Question::Schedule),
    ]
    .into_iter()
    .filter_map(|(is_said, question)| (!is_said).then_some(question))
    .collect();
    let answers = Answers {
        pools: if has_pool { arguments.pools.clone() } else { known.pools.first().cloned().into_iter().collect() },
        vms: if is_named { Vms::Named(arguments.vms.clone(), arguments.tags.clone()) } else { Vms::All },
        to: if has_destination { arguments.to.clone() } else { vec!["/".to_owned()] },
        to_sr: arguments.to_sr.clone(),
        mode: arguments.mode.unwrap_or(Mode::Incremental),
        cron: if is_scheduled { arguments.cron.clone() } else { Some("@daily".to_owned()) },
        keep,
    };
    (answers, missing)
}
