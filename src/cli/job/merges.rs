//! What expired is forgotten after the last transfer, in each repository by a process of its own: `xofs forget --apply`.

use std::io::Read;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

use super::recorder::Recorder;
use crate::cli::Global;
use crate::cli::exit::Exit;
use crate::cli::text::Shown;
use crate::job::log::Event;
use crate::job::{Job, Keep};

/// How often it is looked whether a process has ended.
const TICK: Duration = Duration::from_millis(100);
/// Of what a process says no more is kept (bytes).
const LONGEST: u64 = 16 << 20;

/// What the merges of a run have in common.
pub struct Merges<'a> {
    pub global: &'a Global,
    pub job: &'a Job,
    pub recorder: &'a Recorder,
    /// Stops them; a merge goes on when it is run again.
    pub cancel: &'a xapi::Cancel,
}

/// Forgets what `keep` does not keep of a schedule's backups in a repository, and notes what became of it.
pub fn forget(merges: &Merges, repository: &str, schedule: &str, keep: &Keep, zone: Option<&str>) {
    if merges.cancel.is_cancelled() {
        return;
    }
    merges.recorder.note(Event::MergeStart { repository: repository.to_owned() });
    let begun = Instant::now();
    let (reason, result) = match run(merges, &arguments(merges, repository, schedule, keep, zone)) {
        Ok((status, result, said)) => (why(status, &result, &said), Some(result).filter(|result| !result.is_null())),
        Err(error) => (Some(format!("{error:#}")), None),
    };
    let next = reason.is_some().then(|| "the new backups are good; the next run goes on with it".to_owned());
    if let (Some(reason), Some(next)) = (&reason, &next) {
        say!("xofs: {}: {}; {next}", Shown(repository), Shown(reason));
    }
    let seconds = begun.elapsed().as_secs_f64();
    let repository = repository.to_owned();
    merges.recorder.note(Event::MergeEnd { repository, is_done: reason.is_none(), reason, next, seconds, result });
}

fn arguments(merges: &Merges, repository: &str, schedule: &str, keep: &Keep, zone: Option<&str>) -> Vec<String> {
    let mut arguments: Vec<String> =
        ["forget", "--apply", "--json", "--job", &merges.job.id, "--schedule", schedule].map(str::to_owned).into();
    let wait = merges.job.timeouts.lock.as_secs().to_string();
    arguments.extend(["--wait".to_owned(), wait]);
    let rules = [
        ("--keep-last", keep.last),
        ("--keep-daily", keep.daily),
        ("--keep-weekly", keep.weekly),
        ("--keep-monthly", keep.monthly),
        ("--keep-yearly", keep.yearly),
    ];
    for (option, count) in rules.into_iter().filter_map(|(option, count)| Some((option, count?))) {
        arguments.extend([option.to_owned(), count.to_string()]);
    }
    let zone = zone.map(|zone| format!("--timezone={zone}"));
    arguments.extend(keep.tags.iter().map(|tag| format!("--keep-tag={tag}")).chain(zone));
    arguments.extend(["--".to_owned(), repository.to_owned()]);
    arguments
}

/// Runs this program with these arguments; returns how it ended, the JSON it wrote, and what it said.
fn run(merges: &Merges, arguments: &[String]) -> Result<(ExitStatus, Value, String)> {
    let act = "start 'xofs forget'";
    // Not by a name: the program may have been exchanged meanwhile.
    let mut command = Command::new("/proc/self/exe");
    command.arg0("xofs").args(arguments).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    // As keys of the environment: they are for the repositories that need one.
    if let Some(file) = &merges.global.password_file {
        command.env("XOFS_PASSWORD_FILE", file);
    }
    if let Some(password) = &merges.global.password_command {
        command.env("XOFS_PASSWORD_COMMAND", password);
    }
    let mut child = command.spawn().context(act)?;
    let (stdout, stderr) = (child.stdout.take(), child.stderr.take());
    let collect = |pipe: Option<Box<dyn Read + Send>>| {
        let mut bytes = Vec::new();
        if let Some(pipe) = pipe {
            // What cannot be read is not there.
            let _ = pipe.take(LONGEST).read_to_end(&mut bytes);
        }
        String::from_utf8_lossy(&bytes).into_owned()
    };
    thread::scope(|scope| {
        let out = scope.spawn(move || collect(stdout.map(|pipe| Box::new(pipe) as _)));
        let err = scope.spawn(move || collect(stderr.map(|pipe| Box::new(pipe) as _)));
        let status = wait(&mut child, merges.cancel).context("wait for 'xofs forget'")?;
        let text = |thread: thread::ScopedJoinHandle<String>| thread.join().unwrap_or_default();
        Ok((status, serde_json::from_str(&text(out)).unwrap_or_default(), text(err)))
    })
}

/// Waits for a process; asks it to end if the run is stopped.
fn wait(child: &mut Child, cancel: &xapi::Cancel) -> std::io::Result<ExitStatus> {
    let mut is_asked = false;
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(status);
        }
        if cancel.is_cancelled() && !std::mem::replace(&mut is_asked, true) {
            if let Some(process) = i32::try_from(child.id()).ok().and_then(Pid::from_raw) {
                // It was not waited for yet, so the number is still its own.
                let _ = kill_process(process, Signal::TERM);
            }
        }
        thread::sleep(TICK);
    }
}

/// Says why not all was forgotten, if that is so.
fn why(status: ExitStatus, result: &Value, said: &str) -> Option<String> {
    if status.success() {
        return None;
    }
    if status.code() == Some(i32::from(Exit::Interrupted as u8)) {
        return Some("it was stopped".to_owned());
    }
    let mut reasons = Vec::new();
    for vm in result["applied"]["vms"].as_array().into_iter().flatten() {
        let name = vm["name"].as_str().unwrap_or_default();
        let problems = ["refused", "problems"].map(|key| vm[key].as_array().cloned().unwrap_or_default()).concat();
        let all = problems.iter().map(|problem| &problem["reason"]).chain([&vm["error"]]);
        reasons.extend(all.filter_map(|reason| Some(format!("{name}: {}", reason.as_str()?))));
    }
    if reasons.is_empty() {
        let last = said.lines().last().map(|line| line.trim_start_matches("xofs: ").to_owned());
        reasons.push(last.unwrap_or_else(|| format!("'xofs forget' ended with {status}")));
    }
    Some(reasons.join("; "))
}
