//! `xofs job new`: a file for a new job, out of options and answers.

use std::fmt::Write as _;
use std::fs::{self, OpenOptions};
use std::io::{self, BufRead, IsTerminal, Write};
use std::path::Path;

use anyhow::{Context, Result};
use clap::{Args, ValueEnum};

use super::files::{self, FolderArgs};
use crate::cli::exit::{Exit, Failure};
use crate::cli::print;
use crate::cli::text::Shown;
use crate::job::{Job, Known, is_id};

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

/// What the file will say.
struct Answers {
    pools: Vec<String>,
    vms: Vms,
    to: Vec<String>,
    to_sr: Vec<String>,
    mode: Mode,
    cron: Option<String>,
    keep: Vec<(&'static str, u32)>,
}

enum Vms {
    All,
    /// Names or uuids, and tags.
    Named(Vec<String>, Vec<String>),
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
    let answers = answers(arguments, &known)?;
    let text = to_toml(arguments, &answers);
    Job::parse(&text, &path, &known).map_err(|faults| {
        let reasons: Vec<String> = faults.faults.into_iter().map(|fault| fault.message).collect();
        Failure::usage(format!("nothing was written: {}", reasons.join("; ")))
    })?;
    write(&path, &text)?;
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

/// Takes what the options say, and asks for the rest.
fn answers(arguments: &NewArgs, known: &Known) -> Result<Answers> {
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
    let vms = match (arguments.all, arguments.vms.is_empty() && arguments.tags.is_empty()) {
        (true, _) => Some(Vms::All),
        (false, false) => Some(Vms::Named(arguments.vms.clone(), arguments.tags.clone())),
        (false, true) => None,
    };
    let has_destination = !(arguments.to.is_empty() && arguments.to_sr.is_empty());
    let is_scheduled = arguments.cron.is_some() || arguments.no_schedule;
    let missing: Vec<&str> = [
        (arguments.pools.is_empty(), "--pool"),
        (vms.is_none(), "--vm, --tag or --all"),
        (!has_destination, "--to or --to-sr"),
        (!is_scheduled, "--cron or --no-schedule"),
    ]
    .into_iter()
    .filter_map(|(is_missing, option)| is_missing.then_some(option))
    .collect();
    let is_terminal = io::stdin().is_terminal() && io::stderr().is_terminal();
    if !missing.is_empty() && !is_terminal {
        let message = format!("there is no terminal to ask on: give {}", missing.join(", "));
        return Err(Failure::usage(message).into());
    }
    let list = |names: &mut dyn Iterator<Item = &String>| names.map(String::as_str).collect::<Vec<_>>().join(", ");
    let pools = match arguments.pools.as_slice() {
        [] => words(&ask(&format!("Pools, of {}", list(&mut known.pools.iter())))?),
        pools => pools.to_vec(),
    };
    let vms = vms.map_or_else(|| Ok(vms_of(&ask("VMs: names or uuids, tag:NAME, or all")?)), Ok::<_, anyhow::Error>)?;
    let (to, to_sr) = if has_destination {
        (arguments.to.clone(), arguments.to_sr.clone())
    } else {
        let to = words(&ask(&format!("Repositories: paths, or of {}", list(&mut known.repositories.iter())))?);
        (to, words(&ask("SRs for replicas: SR, or POOL=SR; nothing for none")?))
    };
    let asks = !missing.is_empty();
    let mode = match arguments.mode {
        Some(mode) => mode,
        None if asks && ask("Incremental or full backups? (incremental)")?.eq_ignore_ascii_case("full") => Mode::Full,
        None => Mode::Incremental,
    };
    let cron = match &arguments.cron {
        None if !is_scheduled => {
            Some(ask("When: minute, hour, day of month, month, day of week, like 0 2 * * *; nothing for never")?)
                .filter(|cron| !cron.is_empty())
        }
        cron => cron.clone(),
    };
    let keep = if keep.is_empty() && !is_scheduled && cron.is_some() {
        let count = ask("How many backups are kept? Nothing for all")?;
        let number = || count.parse().map_err(|_| Failure::usage(format!("'{}' is no number", count.escape_debug())));
        if count.is_empty() { keep } else { vec![("last", number()?)] }
    } else {
        keep
    };
    Ok(Answers { pools, vms, to, to_sr, mode, cron, keep })
}

/// Asks on the terminal.
fn ask(question: &str) -> Result<String> {
    write!(io::stderr(), "{question}: ").context("ask on the terminal")?;
    let mut answer = String::new();
    if io::stdin().lock().read_line(&mut answer).context("ask on the terminal")? == 0 {
        return Err(Failure::new(Exit::Interrupted, "interrupted; nothing was written").into());
    }
    Ok(answer.trim().to_owned())
}

/// Splits a list at its commas.
fn words(text: &str) -> Vec<String> {
    text.split(',').map(str::trim).filter(|word| !word.is_empty()).map(str::to_owned).collect()
}

fn vms_of(answer: &str) -> Vms {
    if answer.eq_ignore_ascii_case("all") {
        return Vms::All;
    }
    let (tags, names): (Vec<String>, Vec<String>) =
        words(answer).into_iter().partition(|word| word.starts_with("tag:"));
    Vms::Named(names, tags.iter().map(|tag| tag["tag:".len()..].trim().to_owned()).collect())
}

/// A text as TOML has it.
fn quoted(text: &str) -> String {
    toml::Value::String(text.to_owned()).to_string()
}

fn list(texts: &[String]) -> String {
    let texts: Vec<String> = texts.iter().map(|text| quoted(text)).collect();
    format!("[{}]", texts.join(", "))
}

/// Writes the file, with what else there is as comments.
fn to_toml(arguments: &NewArgs, answers: &Answers) -> String {
    let mut text =
        String::from("# A job of xofs. 'xofs job check' says what is wrong with it; docs/jobs.md has all settings.\n");
    // Writing to a String cannot fail.
    let mut line = |written: String| {
        let _ = writeln!(text, "{written}");
    };
    if let Some(description) = &arguments.description {
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
    match arguments.exclude.as_slice() {
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
            "\n# [incremental]\n# key_every = 30                      # each 30th backup stores all blocks".to_owned(),
        );
        line("# cbt = true                          # switches changed block tracking on".to_owned());
    }
    match &answers.cron {
        None => line("\n# [[schedules]]                       # it runs by 'xofs job run' only\n# name = \"nightly\"\n# cron = \"0 2 * * *\"".to_owned()),
        Some(cron) => {
            line(format!("\n[[schedules]]\nname = {}", quoted(&arguments.name)));
            line(format!("# Minute, hour, day of month, month, day of week.\ncron = {}", quoted(cron)));
            match &arguments.timezone {
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
