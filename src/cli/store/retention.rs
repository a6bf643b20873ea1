//! `--keep-last ...`: once the backup is there, those of its job that expired are forgotten.

use std::fmt::Write as _;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use serde_json::{Value, json};

use super::StoreArgs;
use crate::cli::exit::{self, Exit};
use crate::cli::forget::{self, Expired};
use crate::cli::text::Shown;
use crate::ingest::{Destination, Report};
use crate::repository::{Rules, Vm};

/// What became of the expired backups in each destination, in their order; `None` where there is no new backup.
pub struct Retention(Vec<Option<(Exit, String, Value)>>);

impl Retention {
    /// Forgets what `rules` do not keep of the VM called `name`, in each destination that has the new backup.
    pub fn apply(
        arguments: &StoreArgs,
        name: &str,
        rules: &Rules,
        report: &Report,
        destinations: &[Destination],
        is_stopped: &Arc<AtomicBool>,
    ) -> Self {
        let vm = Vm { id: report.vm.clone(), name: name.to_owned() };
        let of_one = |(destination, outcome): (&Destination, &crate::ingest::Outcome)| {
            let (destination, stored) = (destination.repository()?, outcome.stored.as_ref().ok()?);
            let expired = Expired {
                name: &destination.name,
                vm: &vm,
                job: &stored.job,
                rules,
                tags: arguments.retention.tags(),
                wait: arguments.patience(),
                progress: arguments.progress,
            };
            let done =
                forget::forget_expired(&expired, &destination.repository, &destination.storage, is_stopped.clone());
            Some(done.unwrap_or_else(|error| failed(&error)))
        };
        Self(destinations.iter().zip(&report.outcomes).map(of_one).collect())
    }

    /// Returns how the command ends, if nothing else failed.
    pub fn exit(&self) -> Exit {
        let exits = || self.0.iter().flatten().map(|(exit, ..)| *exit);
        if exits().any(|exit| exit == Exit::Interrupted) {
            return Exit::Interrupted;
        }
        if exits().all(|exit| exit == Exit::Done) { Exit::Done } else { Exit::Retention }
    }

    pub fn to_text(&self, report: &Report) -> String {
        let mut text = String::new();
        for (outcome, done) in report.outcomes.iter().zip(&self.0) {
            for line in done.iter().flat_map(|(_, text, _)| text.lines()) {
                // Writing to a String cannot fail.
                let _ = writeln!(text, "{}: {line}", Shown(&outcome.name));
            }
        }
        text
    }

    /// Returns what is said of each destination.
    pub fn to_json(&self) -> Vec<Value> {
        self.0.iter().map(|done| done.as_ref().map_or(Value::Null, |(_, _, json)| json.clone())).collect()
    }
}

fn failed(error: &anyhow::Error) -> (Exit, String, Value) {
    let message = format!("{error:#}");
    let json = json!({ "error": message, "exitCode": exit::of(error) as u8 });
    (Exit::Partial, format!("nothing was forgotten: {}\n", Shown(&message)), json)
}
