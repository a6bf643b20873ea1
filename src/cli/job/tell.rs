//! Whom a run is told to: a program reads its report, and is ended if it takes too long. That nobody could be told is in the log.

use std::io::Write;
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rustix::process::{Pid, Signal, kill_process_group};
use serde_json::json;

use super::recorder::Recorder;
use super::report::{status_name, to_json, to_text};
use crate::cli::text::Shown;
use crate::job::log::{Event, Run, RunStatus};
use crate::job::{Form, Job, Reporting};

/// How often it is looked whether the program has ended.
const TICK: Duration = Duration::from_millis(50);

/// Tells the program that the job names, if it is to be told, and notes what became of that. `cancel` ends it, too.
pub fn tell(job: &Job, run: &Run, recorder: &Recorder, cancel: &xapi::Cancel) {
    let Some(reporting) = job.report.as_ref().filter(|reporting| reporting.always || run.status != RunStatus::Done)
    else {
        return;
    };
    let begun = Instant::now();
    let (text, mistake) = written(job, reporting, run);
    let told = hand_over(reporting, text, cancel).err().map(|error| format!("nobody was told of the run: {error:#}"));
    let reasons: Vec<String> = mistake.into_iter().chain(told).collect();
    let reason = (!reasons.is_empty()).then(|| reasons.join("; "));
    if let Some(reason) = &reason {
        say!("xofs: {}", Shown(reason));
    }
    recorder.note(Event::ReportEnd { is_done: reason.is_none(), reason, seconds: begun.elapsed().as_secs_f64() });
}

/// Writes what the program reads. A template that cannot be filled in is a mistake of its own: then the usual text says so.
fn written(job: &Job, reporting: &Reporting, run: &Run) -> (String, Option<String>) {
    match &reporting.form {
        Form::Json => (format!("{:#}\n", to_json(run)), None),
        Form::Mail(to) => (mail(job, to, run), None),
        Form::Template(template) => {
            let (mut report, text) = (to_json(run), to_text(run));
            report["statusName"] = json!(status_name(run.status));
            match template.fill(&report, &text) {
                Ok(text) => (text, None),
                Err(error) => (format!("{text}\n{error}\n"), Some(error)),
            }
        }
    }
}

fn mail(job: &Job, to: &str, run: &Run) -> String {
    let status = status_name(run.status);
    let head =
        format!("To: {to}\nSubject: xofs: {}: {status}\nAuto-Submitted: auto-generated\nMIME-Version: 1.0\n", job.id);
    format!("{head}Content-Type: text/plain; charset=utf-8\nContent-Transfer-Encoding: 8bit\n\n{}", to_text(run))
}

/// Runs a program that reads a text.
fn hand_over(reporting: &Reporting, text: String, cancel: &xapi::Cancel) -> Result<()> {
    let [program, arguments @ ..] = reporting.command.as_slice() else { return Ok(()) };
    let act = || format!("run '{program}'");
    // What it starts ends with it, if it has to be ended.
    let mut command = Command::new(program);
    command.args(arguments).stdin(Stdio::piped()).stdout(Stdio::null()).process_group(0);
    let mut child = command.spawn().with_context(act)?;
    // It may end, or be ended, without reading all of it; nobody waits for this thread.
    let pipe = child.stdin.take();
    let _ = thread::Builder::new()
        .name("job-report".to_owned())
        .spawn(move || pipe.map(|mut pipe| pipe.write_all(text.as_bytes())));
    // A run that was stopped is told of, too.
    let was_stopped = cancel.is_cancelled();
    let begun = Instant::now();
    loop {
        let why = match child.try_wait().with_context(act)? {
            Some(status) if status.success() => return Ok(()),
            Some(status) => bail!("'{program}' ended with {status}"),
            None if begun.elapsed() > reporting.timeout => {
                format!("it took more than {} s", reporting.timeout.as_secs_f64())
            }
            None if cancel.is_cancelled() && !was_stopped => "the run was stopped".to_owned(),
            None => {
                thread::sleep(TICK);
                continue;
            }
        };
        // It was not waited for yet, so the number is still its own.
        if let Some(process) = i32::try_from(child.id()).ok().and_then(Pid::from_raw) {
            let _ = kill_process_group(process, Signal::KILL);
        }
        child.wait().with_context(act)?;
        bail!("'{program}' was ended: {why}");
    }
}
