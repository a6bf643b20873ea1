//! `xofs job report`: what runs moved, how fast, what they waited for, and what failed.
//!
//! ```text
//! jobs, logs ─► figures ─┬► text          a table for each run; with --since, the sums
//!                        ├► as_json       both
//!                        ├► page ─► picture   one page of HTML, and throughput over time in it
//!                        └► metrics       for Prometheus, with what logs no longer hold
//! ```

mod as_json;
mod metrics;
mod page;
mod picture;
#[cfg(test)]
mod tests;
mod text;

pub use text::{percent, place, speed, time};

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::io;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use clap::Args;
use jiff::civil::DateTime;
use jiff::tz::TimeZone;
use jiff::{Span, Timestamp, Zoned};

use super::files::FolderArgs;
use super::list::history;
use super::show::say_unread;
use super::state::StateArgs;
use crate::cli::exit::Exit;
use crate::cli::print;
use crate::cli::text::Shown;
use crate::job::figures::{Counts, RunFigures, Totals};
use crate::job::{is_id, log};
use crate::whole;

const EXAMPLES: &str = "\
For each machine the stages of its transfer, in the order in which bytes go through them: what part of the time they worked, waited for \
what is before them and for what is behind them, and which one the others waited for. Merges stand apart.

--since adds up runs: by stage, by host, SR, network and repository, and what failed by reason. --prometheus writes metrics for the \
textfile collector of the node exporter; docs/jobs.md has them and a timer. Ends with 3 if the file of a job is wrong.

Examples:
  xofs job report
  xofs job report nightly --last 5
  xofs job report --since 7d --html report.html
  xofs job report --json | jq '.runs[].vms[] | {name, line: .transfer.bottleneck.line}'
  xofs job report --prometheus --output /var/lib/prometheus/node-exporter/xofs.prom";

/// Shows what runs moved, how fast, and what they waited for
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub struct ReportArgs {
    /// Names of jobs, or paths of their files [default: all]
    jobs: Vec<OsString>,
    #[command(flatten)]
    folder: FolderArgs,
    #[command(flatten)]
    state: StateArgs,
    /// So many runs of each job
    #[arg(long, value_name = "N", default_value_t = 1, conflicts_with = "since", value_parser = clap::value_parser!(u32).range(1..))]
    last: u32,
    /// The runs that began since: a time before now like 7d or 36h, a date, or a time
    #[arg(long, value_name = "WHEN", value_parser = parse_since)]
    since: Option<Timestamp>,
    /// Writes JSON; docs/job-report.schema.json is its schema
    #[arg(long, conflicts_with_all = ["html", "prometheus"])]
    json: bool,
    /// Writes one page of HTML into this file, with the throughput over time as pictures
    #[arg(long, value_name = "FILE", conflicts_with_all = ["prometheus", "output"])]
    html: Option<PathBuf>,
    /// Writes metrics for Prometheus, of all that is known of the jobs
    #[arg(long, conflicts_with_all = ["since", "last"])]
    prometheus: bool,
    /// Writes into this file, as a whole or not at all [default: standard output]
    #[arg(long, value_name = "FILE")]
    output: Option<PathBuf>,
}

/// A job, and what is known of it.
struct Reported {
    id: String,
    /// Whether its file is right.
    is_right: bool,
    /// All runs of its log, oldest first.
    runs: Vec<RunFigures>,
    /// What its runs did, also those that its log no longer holds.
    counts: Counts,
}

/// The runs that are reported.
struct Selection {
    now: Timestamp,
    since: Option<Timestamp>,
    /// Oldest first.
    runs: Vec<RunFigures>,
    /// Lines of logs that could not be understood.
    unread: usize,
}

/// Reads since when runs are wanted.
fn parse_since(text: &str) -> std::result::Result<Timestamp, String> {
    since(text, &Zoned::now())
}

fn since(text: &str, now: &Zoned) -> std::result::Result<Timestamp, String> {
    let zone = now.time_zone();
    let of_date = |date: DateTime| Some(zone.to_ambiguous_zoned(date).compatible().ok()?.timestamp());
    let before_now = |span: Span| (span.signum() > 0).then(|| now.checked_sub(span).ok()).flatten();
    let time = text.parse::<Timestamp>().ok();
    // A date alone is its midnight.
    let time = time.or_else(|| of_date(text.parse::<DateTime>().ok()?));
    let time = time.or_else(|| Some(before_now(text.parse().ok()?)?.timestamp()));
    let expected = "expected how long ago, like 7d or 36h, a date like 2026-11-20, or a time like 2026-11-20T08:00:00Z";
    time.ok_or_else(|| format!("'{}' is no time; {expected}", text.escape_debug()))
}

/// Runs the command.
///
/// # Errors
/// If a job that is named is wrong, a log cannot be read, or the file not be written.
pub fn run(arguments: &ReportArgs) -> Result<Exit> {
    let (jobs, unread) = jobs(arguments)?;
    let is_right = jobs.iter().all(|job| job.is_right);
    let now = Timestamp::now();
    let written = if arguments.prometheus {
        metrics::to_text(&jobs)
    } else {
        let selection = select(arguments, jobs, unread, now);
        match &arguments.html {
            Some(_) => page::to_html(&selection),
            None if arguments.json => format!("{:#}\n", as_json::to_json(&selection)),
            None => text::to_text(&selection, &TimeZone::system()),
        }
    };
    match arguments.html.as_ref().or(arguments.output.as_ref()) {
        Some(path) => write(path, &written)?,
        None => print::text(&written)?,
    }
    Ok(if is_right { Exit::Done } else { Exit::Partial })
}

/// Writes a file that everybody may read, as the collector of the node exporter must.
fn write(path: &Path, text: &str) -> Result<()> {
    let write = || {
        let name = path.file_name().ok_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, "it names no file"))?;
        // Of each process its own; the collector reads none of them.
        let mut fresh = OsString::from(".");
        fresh.push(name);
        fresh.push(format!(".{}.new", std::process::id()));
        whole::replace(path, &fresh, text.as_bytes(), 0o644, true)
    };
    write().with_context(|| format!("write '{}'", path.display()))
}

/// Reads what is known of the jobs that are meant, and how many lines of their logs were not understood.
fn jobs(arguments: &ReportArgs) -> Result<(Vec<Reported>, usize)> {
    let files = arguments.folder.files()?;
    let mut ids = BTreeSet::new();
    if arguments.jobs.is_empty() {
        for loaded in files.all()? {
            match &loaded.job {
                Ok(job) => drop(ids.insert((job.id.clone(), true))),
                Err(faults) => {
                    faults.to_string().lines().for_each(|line| say!("{}", Shown(line)));
                    // It is most likely the job that this file described when it was right.
                    let stem = loaded.path.file_stem().and_then(|stem| stem.to_str()).filter(|stem| is_id(stem));
                    ids.extend(stem.map(|stem| (stem.to_owned(), false)));
                }
            }
        }
    }
    for named in &arguments.jobs {
        ids.insert((files.job(named)?.1.id, true));
    }
    let state = arguments.state.open()?;
    let (mut jobs, mut unread) = (Vec::with_capacity(ids.len()), 0);
    for (id, is_right) in ids {
        let history = history(state.folder(), &id)?;
        say_unread(state.folder(), &id, history.unread);
        unread += history.unread;
        let act = || format!("read what runs of the job '{id}' did");
        let runs = RunFigures::all(&history);
        let counts = Totals::read(&log::path(state.folder(), &id)).with_context(act)?.counts(&runs);
        jobs.push(Reported { id, is_right, runs, counts });
    }
    Ok((jobs, unread))
}

/// Chooses the runs that are wanted.
fn select(arguments: &ReportArgs, jobs: Vec<Reported>, unread: usize, now: Timestamp) -> Selection {
    let mut runs = Vec::new();
    for mut job in jobs {
        match arguments.since {
            Some(since) => runs.extend(job.runs.into_iter().filter(|run| run.begun >= since)),
            None => {
                let last = usize::try_from(arguments.last).unwrap_or(usize::MAX);
                runs.extend(job.runs.drain(job.runs.len().saturating_sub(last)..));
            }
        }
    }
    runs.sort_by(|a, b| (a.begun, &a.job).cmp(&(b.begun, &b.job)));
    Selection { now, since: arguments.since, runs, unread }
}
