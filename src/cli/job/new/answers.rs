//! What the file of a new job will say, how it is written, and what is wrong with it.

use std::fmt::Write as _;
use std::path::Path;

use super::{Mode, NewArgs};
use crate::job::{Job, Known};

/// What the file will say, beside what options alone do.
#[derive(Debug, Clone)]
pub(super) struct Answers {
    pub pools: Vec<String>,
    pub vms: Vms,
    pub to: Vec<String>,
    pub to_sr: Vec<String>,
    pub mode: Mode,
    /// `None` for never.
    pub cron: Option<String>,
    /// All are kept, if there is no rule.
    pub keep: Vec<(&'static str, u32)>,
}

/// Which machines.
#[derive(Debug, Clone)]
pub(super) enum Vms {
    All,
    /// Names or uuids, and tags.
    Named(Vec<String>, Vec<String>),
}

/// A file that is not written yet.
pub(super) struct Draft<'a> {
    pub arguments: &'a NewArgs,
    pub path: &'a Path,
    pub known: &'a Known,
}

impl Draft<'_> {
    /// Returns what would be wrong with the file.
    pub fn faults(&self, answers: &Answers) -> Vec<String> {
        match Job::parse(&self.to_toml(answers), self.path, self.known) {
            Ok(_) => Vec::new(),
            Err(faults) => faults.faults.into_iter().map(|fault| fault.message).collect(),
        }
    }

    /// Writes the file, with what else there is as comments.
    pub fn to_toml(&self, answers: &Answers) -> String {
        let mut text = String::from(
            "# A job of xofs. 'xofs job check' says what is wrong with it; docs/jobs.md has all settings.\n",
        );
        // Writing to a String cannot fail.
        let mut line = |written: String| {
            let _ = writeln!(text, "{written}");
        };
        if let Some(description) = &self.arguments.description {
            line(format!("description = {}", quoted(description)));
        }
        line(format!(
            "# By their names in the configuration, which knows where their passwords are.\npools = {}",
            list(&answers.pools)
        ));
        line(match answers.mode {
            Mode::Incremental => "mode = \"incremental\"                # or \"full\": an XVA each time".to_owned(),
            Mode::Full => "mode = \"full\"                       # or \"incremental\"".to_owned(),
        });
        line("\n[vms]".to_owned());
        match &answers.vms {
            Vms::All => line("all = true".to_owned()),
            Vms::Named(vms, tags) => {
                let (uuids, names): (Vec<String>, Vec<String>) =
                    vms.iter().cloned().partition(|vm| uuid::Uuid::try_parse(vm).is_ok());
                for (key, texts) in [("names", &names), ("uuids", &uuids), ("tags", tags)] {
                    if !texts.is_empty() {
                        line(format!("{key} = {}", list(texts)));
                    }
                }
            }
        }
        match self.arguments.exclude.as_slice() {
            [] => line("# exclude = [\"NAME or uuid\"]".to_owned()),
            exclude => line(format!("exclude = {}", list(exclude))),
        }
        line("# power_states = [\"running\"]          # only in these states".to_owned());
        line("\n[to]".to_owned());
        match answers.to.as_slice() {
            [] => line("# repositories = [\"NAME\"]".to_owned()),
            to => line(format!("repositories = {}", list(to))),
        }
        match answers.to_sr.as_slice() {
            [] => line("# srs = [\"SR\", \"POOL=SR\"]            # replicas, with or without repositories".to_owned()),
            srs => line(format!("srs = {}", list(srs))),
        }
        if answers.mode == Mode::Incremental {
            line(
                "\n# [incremental]\n# key_every = 30                      # each 30th backup stores all blocks"
                    .to_owned(),
            );
            line("# cbt = true                          # switches changed block tracking on".to_owned());
        }
        match &answers.cron {
            None => line("\n# [[schedules]]                       # it runs by 'xofs job run' only\n# name = \"nightly\"\n# cron = \"0 2 * * *\"".to_owned()),
            Some(cron) => {
                line(format!("\n[[schedules]]\nname = {}", quoted(&self.arguments.name)));
                line(format!("# Minute, hour, day of month, month, day of week.\ncron = {}", quoted(cron)));
                match &self.arguments.timezone {
                    Some(zone) => line(format!("timezone = {}", quoted(zone))),
                    None => line("# timezone = \"Europe/Paris\"          # that of this machine, if nothing is said".to_owned()),
                }
                line("# missed = \"skip\"                     # what the machine slept through is made up for once, unless".to_owned());
                let replicas = "# replicas = 3                        # states that each SR keeps";
                match (answers.to.is_empty(), answers.keep.as_slice()) {
                    (false, []) => line("# keep = { last = 7, weekly = 4 }     # all are kept, if nothing is said".to_owned()),
                    (true, []) => line(replicas.to_owned()),
                    (true, [("last", count)]) => line(format!("replicas = {count}")),
                    (_, rules) => {
                        let rules: Vec<String> = rules.iter().map(|(rule, count)| format!("{rule} = {count}")).collect();
                        line(format!("keep = {{ {} }}", rules.join(", ")));
                    }
                }
                if !answers.to.is_empty() && !answers.to_sr.is_empty() {
                    line(replicas.to_owned());
                }
            }
        }
        line("\n# [limits]                            # but for vms, over all jobs together".to_owned());
        line("# vms = 2\n# exports = 12                        # disks of a pool at once".to_owned());
        line("# bandwidth = \"100 MiB/s\"".to_owned());
        line("\n# [timeouts]\n# vm = \"6h\"\n# job = \"12h\"".to_owned());
        line(
            "\n# [retries]\n# vm = 1\n# disk = 1                            # a disk, at once, from the same snapshot"
                .to_owned(),
        );
        line("\n# [report]                            # who is told of runs that failed\n# command = [\"/usr/sbin/sendmail\", \"-t\"]\n# to = \"NAME@example.org\"".to_owned());
        text
    }
}

/// A text as TOML has it.
fn quoted(text: &str) -> String {
    toml::Value::String(text.to_owned()).to_string()
}

fn list(texts: &[String]) -> String {
    let texts: Vec<String> = texts.iter().map(|text| quoted(text)).collect();
    format!("[{}]", texts.join(", "))
}
