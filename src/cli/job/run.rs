//! `xofs job run`: one run of a job, in this process: lock, log, machines, merges, report.

use std::collections::BTreeSet;
use std::ffi::{OsStr, OsString};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use clap::Args;
use jiff::Timestamp;

use super::files::FolderArgs;
use super::live::Writer;
use super::machines::{self, Machines};
use super::merges::{self, Merges};
use super::recorder::Recorder;
use super::report;
use super::state::StateArgs;
use super::tell;
use super::until::{Ended, Until};
use crate::cli::exit::{Exit, Failure};
use crate::cli::text::Shown;
use crate::cli::{Global, print, signals, store};
use crate::ingest::Destination;
use crate::job::figures::{RunFigures, Totals};
use crate::job::lock::RunLock;
use crate::job::log::{self, Event, History, Log, RunStatus, VmStatus};
use crate::job::{Job, SinceKey, Starts, Timed};
use crate::repository;

const EXAMPLES: &str = "\
Only one run of a job at a time. A VM that fails stops none of the others, and is tried again after them; what expired is forgotten \
after the last one, by processes of their own. Ctrl-C or 'xofs job stop' ends it at once, and removes what it made.

Ends with 1 if no VM has a new backup, 3 if some have none, 4 if all have one but not all that expired is forgotten, 11 if the job \
runs already, 130 if it was stopped.

Examples:
  xofs job run nightly
  xofs job run nightly --schedule monthly --full";

/// How often it is looked whether the run has ended.
const TICK: Duration = Duration::from_millis(100);

/// Runs a job now
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub struct RunArgs {
    /// The name of a job, or the path of its file
    job: OsString,
    #[command(flatten)]
    folder: FolderArgs,
    #[command(flatten)]
    state: StateArgs,
    /// The schedule that it counts for, and by whose rules is forgotten [default: the only one, else none]
    #[arg(long, value_name = "NAME")]
    schedule: Option<String>,
    /// Stores all blocks
    #[arg(long)]
    full: bool,
    /// Since when it is due: it runs only if the schedule has not since.
    #[arg(long, value_name = "TIME", hide = true, requires = "schedule")]
    due: Option<Timestamp>,
    /// Writes JSON
    #[arg(long)]
    json: bool,
}

/// Runs the command.
///
/// # Errors
/// If the job is wrong or runs already; else how it ended is said by its report.
pub fn run(global: &Global, arguments: &RunArgs) -> Result<Exit> {
    let (_, job) = arguments.folder.files()?.job(&arguments.job)?;
    let timed = timed(&job, arguments.schedule.as_deref())?;
    let state = arguments.state.open()?;
    let act = || format!("use the folder of the job '{}'", job.id);
    let folder = log::folder(state.folder(), &job.id).with_context(act)?;
    // Before other threads are started.
    let cancel = xapi::Cancel::new();
    let (stopping, is_second) = (cancel.clone(), AtomicBool::new(false));
    let on_signal = move || {
        if is_second.swap(true, Ordering::AcqRel) {
            // As if it were killed: the next run removes what is left.
            std::process::exit(i32::from(Exit::Interrupted as u8));
        }
        stopping.cancel();
        say!("xofs: stops, and removes what was made; once more, and it is left for the next run to remove");
    };
    signals::handle(on_signal).context("take the signals that end a program")?;
    let Some(lock) = RunLock::take(&folder).with_context(act)? else {
        let message = format!("the job '{}' runs already: 'xofs job stop' ends it", job.id);
        return Err(Failure::new(Exit::Locked, message).into());
    };
    let history = History::read(&folder, &|_| false).with_context(act)?;
    if let (Some(due), Some(timed)) = (arguments.due, timed) {
        if Starts::of(&history).last(&timed.name, Timestamp::now()).is_some_and(|last| last >= due) {
            print::text(&format!("{}: the run of {} was made already\n", job.id, timed.name))?;
            return Ok(Exit::Done);
        }
    }
    // Before the log is put aside. A disk that is full keeps no run from being made.
    let since_key = SinceKey::of(&folder, &history).with_context(act)?;
    if let Err(error) = Totals::keep(&folder, &RunFigures::all(&history)).and(since_key.keep(&folder)) {
        say!("xofs: what earlier runs did is not counted yet: {}", Shown(&error.to_string()));
    }
    let id = repository::random_uuid().context("ask the system for random numbers")?;
    let recorder = Recorder::new(id, Log::open(&folder).with_context(act)?);
    let (begun, until) = (Instant::now(), Until::new(&cancel, &job.timeouts));
    recorder.note(Event::RunStart {
        job: job.id.clone(),
        schedule: timed.map(|timed| timed.name.clone()),
        due: arguments.due,
        host: rustix::system::uname().nodename().to_string_lossy().into_owned(),
        process: std::process::id(),
    });
    let live = Writer::begin(&folder, id);
    let destinations = destinations(global, &job, &recorder, &until);
    let machines = Machines {
        job: &job,
        timed,
        is_full: arguments.full,
        state: &state,
        state_dir: arguments.state.folder(),
        destinations: &destinations,
        since_key: &since_key,
        recorder: &recorder,
        live: &live,
        until: &until,
    };
    let reason = if destinations.is_empty() && job.srs.is_empty() {
        Some("no repository can be opened".to_owned())
    } else {
        machines::back_up(&machines)
    };
    let stored = stored(&recorder);
    let merges = Merges { global, job: &job, recorder: &recorder, cancel: &cancel };
    if let Some((name, keep)) = timed.and_then(|timed| Some((&timed.name, timed.keep.as_ref()?))) {
        let zone = timed.and_then(|timed| timed.timezone.as_deref());
        job.repositories
            .iter()
            .filter(|to| stored.contains(*to))
            .for_each(|to| merges::forget(&merges, to, name, keep, zone));
    }
    let status = status(&recorder, cancel.is_cancelled(), reason.is_some());
    recorder.note(Event::RunEnd { status, reason, seconds: begun.elapsed().as_secs_f64() });
    let run = log::Run { id, status, records: recorder.records() };
    drop(live);
    tell::tell(&job, &run, &recorder, &cancel);
    if recorder.lacks_lines() {
        let place = Shown(&folder.display().to_string()).to_string();
        say!("xofs: the log does not tell all of this run, since there was no room in '{place}': make room there");
    }
    drop((recorder, lock));
    if arguments.json {
        print::json(&report::to_json(&run))?;
    } else {
        print::text(&report::to_text(&run))?;
    }
    Ok(match status {
        RunStatus::Done => Exit::Done,
        RunStatus::MergePending => Exit::Retention,
        RunStatus::Partial => Exit::Partial,
        RunStatus::Failed => Exit::Failed,
        RunStatus::Running | RunStatus::Interrupted => Exit::Interrupted,
    })
}

/// Finds the schedule that a run counts for.
fn timed<'a>(job: &'a Job, named: Option<&str>) -> Result<Option<&'a Timed>> {
    let Some(named) = named else {
        return Ok(match job.schedules.as_slice() {
            [only] => Some(only),
            _ => None,
        });
    };
    let found = job.schedules.iter().find(|timed| timed.name == named);
    if found.is_none() {
        let names: Vec<&str> = job.schedules.iter().map(|timed| timed.name.as_str()).collect();
        let shown = named.escape_debug();
        let message = format!("the job '{}' has no schedule '{shown}'; there are: {}", job.id, names.join(", "));
        return Err(Failure::usage(message).into());
    }
    Ok(found)
}

/// Opens the repositories; one that cannot be opened, or does not answer before the run ends, is told, and keeps nothing from the
/// others.
fn destinations(global: &Global, job: &Job, recorder: &Recorder, until: &Until) -> Vec<Destination> {
    let global = Global { shares_key: job.repositories.len() > 1, ..global.clone() };
    let (names, (opened, answers)) = (job.repositories.clone(), mpsc::channel());
    let open = move || {
        for name in names {
            let _ = opened.send(store::destinations(&global, &[Some(OsStr::new(&name))], None, None));
        }
    };
    // A share whose server is gone does not even say so: its thread is left alone then.
    let thread = thread::Builder::new().name("job-open".to_owned()).spawn(open);
    let mut destinations = Vec::with_capacity(job.repositories.len());
    for to in &job.repositories {
        let never = |reason: &str| recorder.never_tried(&format!("repository {to}"), "", reason);
        match next(&answers, until) {
            Ok(Ok(opened)) => destinations.extend(opened),
            Ok(Err(error)) => never(&format!("{error:#}")),
            Err(Some(ended)) => never(&ended.reason()),
            Err(None) => never(&thread.as_ref().err().map_or("its thread failed".to_owned(), ToString::to_string)),
        }
    }
    destinations
}

/// Waits for what a thread sends, at most until the run ends; `None` if the thread has.
fn next<T>(answers: &Receiver<T>, until: &Until) -> Result<T, Option<Ended>> {
    loop {
        match answers.recv_timeout(TICK) {
            Ok(answer) => return Ok(answer),
            Err(RecvTimeoutError::Disconnected) => return Err(None),
            Err(RecvTimeoutError::Timeout) => until.ended().map_or(Ok(()), |ended| Err(Some(ended)))?,
        }
    }
}

/// Returns the repositories that have new backups, which SRs are not.
fn stored(recorder: &Recorder) -> BTreeSet<String> {
    let mut stored = BTreeSet::new();
    for record in recorder.records() {
        let Event::VmEnd { backup: Some(backup), .. } = record.event else { continue };
        for repository in backup["repositories"].as_array().into_iter().flatten() {
            let name = repository["repository"].as_str().filter(|_| repository["metadata"].is_string());
            stored.extend(name.map(str::to_owned));
        }
    }
    stored
}

/// Says how the run ended, by what was noted of it.
fn status(recorder: &Recorder, is_stopped: bool, has_failed: bool) -> RunStatus {
    if is_stopped {
        return RunStatus::Interrupted;
    }
    let records = recorder.records();
    let ends = report::last_tries(&records, false);
    let is_good = |status: &VmStatus| matches!(status, VmStatus::Done | VmStatus::LeftOut);
    let bad = ends.iter().filter(|end| !is_good(&end.status)).count();
    let merged = |event: &Event| matches!(event, Event::MergeEnd { is_done: false, .. });
    if has_failed || bad > 0 {
        let is_some_there = ends.iter().any(|end| matches!(end.status, VmStatus::Done | VmStatus::Partial));
        return if is_some_there { RunStatus::Partial } else { RunStatus::Failed };
    }
    if records.iter().any(|record| merged(&record.event)) { RunStatus::MergePending } else { RunStatus::Done }
}
