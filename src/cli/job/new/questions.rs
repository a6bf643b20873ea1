//! What is asked where no option says it. Each answer is checked at once, as a part of the file, and asked for again if it is wrong.

use std::collections::BTreeSet;

use anyhow::Result;
use clap::ValueEnum;

use super::Mode;
use super::answers::{Answers, Draft, Vms};
use super::terminal::Terminal;
use crate::cli::text::Shown;

/// What an option has to say, or a person.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Question {
    /// Of which pools.
    Pools,
    /// Which machines.
    Vms,
    /// Where to.
    Destinations,
    /// When, and what is kept.
    Schedule,
}

impl Question {
    /// Returns the options that say it.
    pub fn options(self) -> &'static str {
        match self {
            Self::Pools => "--pool",
            Self::Vms => "--vm, --tag or --all",
            Self::Destinations => "--to or --to-sr",
            Self::Schedule => "--cron or --no-schedule",
        }
    }
}

/// Asks for all that is missing in answers that are right so far. Nothing missing, nothing asked.
///
/// # Errors
/// `Interrupted` if somebody has enough of it; what the terminal says.
pub(super) fn ask(draft: &Draft, answers: Answers, missing: &[Question]) -> Result<Answers> {
    if missing.is_empty() {
        return Ok(answers);
    }
    let asking = Asking { draft, terminal: Terminal::open()? };
    let is_missing = |question| missing.contains(&question);
    let mut answers = answers;
    if is_missing(Question::Pools) {
        let question = format!("Pools, of {}", list(&draft.known.pools));
        asking.ask(&question, &mut answers, |answers, text| {
            answers.pools = words(text);
            Ok(())
        })?;
    }
    if is_missing(Question::Vms) {
        asking.ask("VMs: names or uuids, tag:NAME, or all", &mut answers, |answers, text| {
            answers.vms = vms(text);
            Ok(())
        })?;
    }
    if is_missing(Question::Destinations) {
        asking.destinations(&mut answers)?;
    }
    if draft.arguments.mode.is_none() {
        asking.ask("Incremental or full backups? (incremental)", &mut answers, |answers, text| {
            let unknown = |_| format!("'{}' is no kind of backups; expected incremental or full", text.escape_debug());
            answers.mode =
                if text.is_empty() { Mode::Incremental } else { Mode::from_str(text, true).map_err(unknown)? };
            Ok(())
        })?;
    }
    if is_missing(Question::Schedule) {
        let question = "When: minute, hour, day of month, month, day of week, like 0 2 * * *; nothing for never";
        asking.ask(question, &mut answers, |answers, text| {
            answers.cron = (!text.is_empty()).then(|| text.to_owned());
            Ok(())
        })?;
        if answers.cron.is_some() && answers.keep.is_empty() {
            asking.ask("How many backups are kept? Nothing for all", &mut answers, |answers, text| {
                let wrong = |_| format!("'{}' is no number of backups; expected one like 7", text.escape_debug());
                answers.keep = if text.is_empty() { Vec::new() } else { vec![("last", text.parse().map_err(wrong)?)] };
                Ok(())
            })?;
        }
    }
    Ok(answers)
}

/// Somebody who answers, and what the answers are for.
struct Asking<'a> {
    draft: &'a Draft<'a>,
    terminal: Terminal,
}

impl Asking<'_> {
    /// Asks until the answer makes no file that is wrong. `set` puts it among those that were right, or says why it cannot.
    fn ask(
        &self,
        question: &str,
        answers: &mut Answers,
        set: impl Fn(&mut Answers, &str) -> Result<(), String>,
    ) -> Result<()> {
        loop {
            let text = self.terminal.ask(question)?;
            let mut next = answers.clone();
            let faults = match set(&mut next, &text) {
                Ok(()) => self.draft.faults(&next),
                Err(fault) => vec![fault],
            };
            if faults.is_empty() {
                *answers = next;
                return Ok(());
            }
            faults.iter().for_each(|fault| say!("  {}", Shown(fault)));
        }
    }

    fn destinations(&self, answers: &mut Answers) -> Result<()> {
        let known = &self.draft.known.repositories;
        let of = if known.is_empty() { String::new() } else { format!(", or of {}", list(known)) };
        self.ask(&format!("Repositories: paths{of}; nothing for replicas only"), answers, |answers, text| {
            answers.to = words(text);
            // Where there is none, there is an SR: it is asked for next.
            answers.to_sr = if answers.to.is_empty() { vec!["SR".to_owned()] } else { Vec::new() };
            Ok(())
        })?;
        let least = if answers.to.is_empty() { "at least one" } else { "nothing for none" };
        self.ask(&format!("SRs for replicas: SR, or POOL=SR; {least}"), answers, |answers, text| {
            answers.to_sr = words(text);
            Ok(())
        })
    }
}

fn list(names: &BTreeSet<String>) -> String {
    names.iter().map(String::as_str).collect::<Vec<_>>().join(", ")
}

/// Splits a list at its commas.
fn words(text: &str) -> Vec<String> {
    text.split(',').map(str::trim).filter(|word| !word.is_empty()).map(str::to_owned).collect()
}

fn vms(answer: &str) -> Vms {
    if answer.eq_ignore_ascii_case("all") {
        return Vms::All;
    }
    let (tags, names): (Vec<String>, Vec<String>) =
        words(answer).into_iter().partition(|word| word.starts_with("tag:"));
    Vms::Named(names, tags.iter().map(|tag| tag["tag:".len()..].trim().to_owned()).collect())
}
