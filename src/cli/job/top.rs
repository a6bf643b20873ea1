//! `xofs job top`: what runs are doing now.
//!
//! Which runs there are, and which machines they are at, is told by logs and locks; how far these are, by what the process of each run
//! writes down every second.

mod screen;
#[cfg(test)]
mod tests;

use std::ffi::OsString;
use std::fmt::Write as _;
use std::io::{self, IsTerminal};
use std::time::Duration;

use anyhow::{Context, Result};
use clap::Args;
use jiff::Timestamp;
use serde_json::{Value, json};

use super::figures::{percent, place, speed, time};
use super::files::FolderArgs;
use super::list::history;
use super::state::StateArgs;
use crate::cli::exit::Exit;
use crate::cli::print;
use crate::cli::text::{Shown, count, size};
use crate::job::figures::{RunFigures, Stage, Transfer, VmFigures, rate};
use crate::job::live::{Live, LiveVm};
use crate::job::log::{self, RunStatus, VmStatus};
use crate::probe;

const EXAMPLES: &str = "\
On a terminal it is shown anew every second, until Ctrl-C; else, or with --once, one time. Bars and throughput of stages are those of the \
last ten seconds, and so is what limits. A run whose process is gone is none.

Examples:
  xofs job top
  xofs job top nightly --once
  xofs job top --json | jq '.runs[].vms[] | {name, secondsLeft}'";

/// What the process of a run wrote down is old after this.
const OLD: Duration = Duration::from_secs(10);
/// Characters of a bar.
const BAR: u64 = 20;

/// Shows what runs are doing now
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub struct TopArgs {
    /// Names of jobs, or paths of their files [default: all]
    jobs: Vec<OsString>,
    #[command(flatten)]
    folder: FolderArgs,
    #[command(flatten)]
    state: StateArgs,
    /// Shows it one time, and ends
    #[arg(long)]
    once: bool,
    /// Writes JSON, one time; docs/json.md
    #[arg(long)]
    json: bool,
}

/// A run that is under way.
struct Running {
    run: RunFigures,
    /// What it is doing, if its process said so.
    live: Option<Live>,
}

/// Runs the command.
///
/// # Errors
/// If a job that is named is wrong, or a log cannot be read.
pub fn run(arguments: &TopArgs) -> Result<Exit> {
    let look = || -> Result<(Timestamp, Vec<Running>)> {
        let running = running(arguments)?;
        Ok((Timestamp::now(), running))
    };
    if arguments.json {
        let (now, running) = look()?;
        print::json(&to_json(&running, now))?;
    } else if arguments.once || !io::stdout().is_terminal() {
        let (now, running) = look()?;
        print::text(&to_text(&running, now))?;
    } else {
        screen::show(|| look().map(|(now, running)| to_text(&running, now)))?;
    }
    Ok(Exit::Done)
}

/// Finds the runs that are under way.
fn running(arguments: &TopArgs) -> Result<Vec<Running>> {
    let files = arguments.folder.files()?;
    let mut ids: Vec<String> = Vec::new();
    if arguments.jobs.is_empty() {
        ids.extend(files.all()?.into_iter().filter_map(|loaded| Some(loaded.job.ok()?.id)));
    }
    for named in &arguments.jobs {
        ids.push(files.job(named)?.1.id);
    }
    let state = arguments.state.open()?;
    let mut running = Vec::new();
    for id in ids {
        let folder = log::path(state.folder(), &id);
        if !crate::job::lock::is_held(&folder).with_context(|| format!("see whether the job '{id}' runs"))? {
            continue;
        }
        let history = history(state.folder(), &id)?;
        let Some(run) = history.runs.last().filter(|run| run.status == RunStatus::Running) else { continue };
        let live = Live::read(&folder).with_context(|| format!("read what the job '{id}' does"))?;
        let live = live.filter(|live| live.run == run.id);
        running.push(Running { run: RunFigures::of(run), live });
    }
    Ok(running)
}

impl Running {
    /// Returns the machines that it is at, with what its process says of them.
    fn vms(&self) -> impl Iterator<Item = (&VmFigures, Option<&LiveVm>)> {
        let live = |vm: &VmFigures| self.live.as_ref()?.vms.iter().find(|live| live.vm == vm.vm);
        self.run.vms.iter().filter(|vm| vm.status.is_none()).map(move |vm| (vm, live(vm)))
    }

    /// Returns the repositories that it merges in.
    fn merging(&self) -> impl Iterator<Item = &str> {
        self.run.merges.iter().filter(|merge| merge.is_done.is_none()).map(|merge| merge.repository.as_str())
    }

    /// Counts machines that are done with: well, and not.
    fn ended(&self) -> (usize, usize) {
        let is_good = |vm: &&VmFigures| matches!(vm.status, Some(VmStatus::Done | VmStatus::LeftOut));
        let ended = self.run.vms.iter().filter(|vm| vm.status.is_some()).count();
        let good = self.run.vms.iter().filter(is_good).count();
        (good, ended - good)
    }

    /// Returns how old what its process said is, if that is old.
    fn age(&self, now: Timestamp) -> Option<Duration> {
        let age = Duration::try_from(now.duration_since(self.live.as_ref()?.time)).unwrap_or_default();
        (age >= OLD).then_some(age)
    }
}

/// Returns how long a transfer will take still, at its pace.
fn left(vm: &LiveVm) -> Option<Duration> {
    let left = vm.expected_bytes.checked_sub(vm.done_bytes)?;
    Some(Duration::from_secs(left.checked_div(vm.bytes_per_second)?))
}

fn since(time: Timestamp, now: Timestamp) -> Duration {
    Duration::try_from(now.duration_since(time)).unwrap_or_default()
}

fn to_json(running: &[Running], now: Timestamp) -> Value {
    let vm = |(vm, live): (&VmFigures, Option<&LiveVm>)| {
        json!({
            "vm": vm.vm,
            "name": vm.name,
            "pool": vm.pool,
            "attempt": vm.attempt,
            "since": live.map(|live| live.since),
            "doneBytes": live.map(|live| live.done_bytes),
            "expectedBytes": live.map(|live| live.expected_bytes),
            "bytesPerSecond": live.map(|live| live.bytes_per_second),
            "secondsLeft": live.and_then(left).map(|left| left.as_secs()),
            "waitsFor": live.map(|live| &live.waits_for),
            "recent": live.map(|live| &live.recent),
        })
    };
    let one = |running: &Running| {
        let (done, failed) = running.ended();
        json!({
            "job": running.run.job,
            "schedule": running.run.schedule,
            "run": running.run.id,
            "time": running.run.begun,
            "seconds": since(running.run.begun, now).as_secs_f64(),
            "doneVms": done,
            "failedVms": failed,
            "vms": running.vms().map(vm).collect::<Vec<_>>(),
            "merging": running.merging().collect::<Vec<_>>(),
            "seen": running.live.as_ref().map(|live| live.time),
        })
    };
    json!({ "time": now, "runs": running.iter().map(one).collect::<Vec<_>>() })
}

fn to_text(running: &[Running], now: Timestamp) -> String {
    if running.is_empty() {
        return "no job runs\n".to_owned();
    }
    running.iter().map(|running| one_to_text(running, now)).collect::<Vec<_>>().join("\n")
}

fn one_to_text(running: &Running, now: Timestamp) -> String {
    let run = &running.run;
    let schedule = run.schedule.as_ref().map(|name| format!(" ({name})")).unwrap_or_default();
    let (done, failed) = running.ended();
    let took = time(since(run.begun, now));
    let under_way = running.vms().count();
    let (job, machines) = (format!("{}{schedule}", run.job), count(under_way, "VM"));
    let mut text = format!("{}  for {took}: {machines} under way, {done} done, {failed} failed\n", Shown(&job));
    if let Some(age) = running.age(now) {
        // Writing to a String cannot fail.
        let _ = writeln!(text, "  its process has said nothing for {}: what follows is as old", time(age));
    }
    for (vm, live) in running.vms() {
        text.push_str(&machine(vm, live, now));
    }
    for repository in running.merging() {
        let _ = writeln!(text, "  merges in {}", Shown(repository));
    }
    text
}

fn machine(vm: &VmFigures, live: Option<&LiveVm>, now: Timestamp) -> String {
    let tries = if vm.attempt > 1 { format!(", try {}", vm.attempt) } else { String::new() };
    let mut text = format!("  {} ({}){tries}", Shown(&vm.name), Shown(&vm.pool));
    let Some(live) = live else {
        text.push('\n');
        return text;
    };
    let (done, expected) = (live.done_bytes, live.expected_bytes);
    let part = if expected == 0 { 0 } else { thousandths(done, expected) };
    let _ = write!(text, "  {}  {:>5}  {} of {}", bar(part), percent(part), size(done), size(expected));
    let _ = write!(text, "  {}", speed(live.bytes_per_second));
    let left = left(live).map_or_else(String::new, |left| format!(", {} left", time(left)));
    let _ = writeln!(text, "{left}, for {}", time(since(live.since, now)));
    let Some(recent) = Transfer::of(&json!({ "transfer": live.recent })) else { return text };
    text.push_str(&stages(&recent));
    let has_moved = recent.stages.iter().any(|stage| stage.bytes > 0);
    let sentence = recent.bottleneck.filter(|bottleneck| bottleneck.stage.is_some()).map(|one| one.sentence());
    match sentence {
        Some(sentence) => {
            let _ = writeln!(text, "    {}", Shown(&sentence));
        }
        None if !has_moved => {
            let _ =
                writeln!(text, "    nothing moved in {}: waits for the {}", time(recent.took), Shown(&live.waits_for));
        }
        None => {}
    }
    text
}

/// Writes what the stages did that did anything, with a bar for how busy they were.
fn stages(recent: &Transfer) -> String {
    // What is nothing but waiting is shown by how long that was.
    let busy = |stage: &Stage| {
        let shares = stage.times(recent.took).shares();
        if stage.name == probe::Stage::Bandwidth.name() { shares.input } else { shares.busy }
    };
    let did = |stage: &&Stage| stage.bytes > 0 || busy(stage) >= 10;
    let stages: Vec<&Stage> = recent.stages.iter().filter(did).collect();
    let of = |stage: &Stage| Shown(&place(&stage.of, stage.pool.as_deref())).to_string();
    let names = stages.iter().map(|stage| stage.name.chars().count()).max().unwrap_or(0).max(8);
    let width = stages.iter().map(|stage| of(stage).chars().count()).max().unwrap_or(0);
    let mut text = String::new();
    for stage in stages {
        let busy = busy(stage);
        let moved = if stage.bytes == 0 { String::new() } else { speed(rate(stage.bytes, recent.took)) };
        let (name, of, bar, busy) = (Shown(&stage.name), of(stage), bar(busy), percent(busy));
        let line = format!("    {name:<names$}  {of:<width$}  {bar}  {busy:>5}  {moved:>12}");
        let _ = writeln!(text, "{}", line.trim_end());
    }
    text
}

/// Returns a part of a whole.
fn thousandths(part: u64, whole: u64) -> u32 {
    let thousandths = u128::from(part) * 1000 / u128::from(whole.max(1));
    u32::try_from(thousandths).unwrap_or(1000).min(1000)
}

fn bar(thousandths: u32) -> String {
    let full = (u64::from(thousandths) * BAR + 500) / 1000;
    (0..BAR).map(|place| if place < full { '█' } else { '░' }).collect()
}
