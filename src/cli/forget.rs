//! `xofs forget`: which backups the rules of retention keep, and which not; with `--apply` ([`apply`]) these go.

mod apply;
mod expired;
mod jobs;
mod rules;

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsString;
use std::fmt::Write as _;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use clap::{ArgGroup, Args};
use jiff::Timestamp;
use serde_json::{Value, json};
use storage::ObjectPath;

use super::exit::{Exit, Failure};
use super::text::{Shown, count};
use super::{Global, open, print, signals};
use crate::merge::disks_of;
use crate::repository::{
    Backup, Backups, Decision, Error, ErrorKind, Layout, Mode, Protection, Reason, Repository, Rules, Selection, Vm,
};
use apply::Manner;
pub use expired::{Expired, forget_expired};
use jobs::Jobs;
pub use rules::RetentionArgs;

const EXAMPLES: &str = "\
Examples:
  xofs forget /srv/backups --all --keep-last 7 --keep-weekly 4 --keep-monthly 12
  xofs forget main --all --keep-last 7 --apply
  xofs forget main --vm web01 --keep-daily 14 --timezone Europe/Paris --keep-tag keep
  xofs forget main --job nightly --schedule night --keep-last 7
  xofs forget main --schedule 3f1c --keep-last 3 --json | jq -r '.vms[].backups[] | select(.decision == \"forget\").time'

Each VM, mode, job and schedule is judged by itself. Whatever the rules say, a backup is kept that is the newest of its chain, \
immutable, protected by a tag, or cannot be read.

With --apply their metadata is removed, and what later backups need of their disks is merged into these. It may be \
interrupted at any moment, and goes on when it is run again; what Xen Orchestra began to merge it finishes, too.

Ends with 3 if something could not be listed or forgotten, with 11 if the VM is being written by another program.";

/// Says which backups the rules keep and which may be forgotten, and forgets them
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES, group(ArgGroup::new("scope").args(["vm", "job", "all"])))]
pub struct ForgetArgs {
    /// The repository [default: XOFS_REPOSITORY]
    #[arg(value_name = "REPO")]
    address: Option<OsString>,
    #[command(flatten)]
    retention: RetentionArgs,
    /// Only the backups of this VM: its name, uuid or the beginning of it
    #[arg(long, value_name = "VM")]
    vm: Option<String>,
    /// Only the backups of this job: its id or the beginning of it
    #[arg(long, value_name = "ID")]
    job: Option<String>,
    /// Only the backups of this schedule, of the job if one is named: its id or the beginning of it
    #[arg(long, value_name = "ID", conflicts_with_all = ["vm", "all"])]
    schedule: Option<String>,
    /// The backups of all VMs, jobs and schedules
    #[arg(long)]
    all: bool,
    /// Forgets what no rule keeps
    #[arg(long)]
    apply: bool,
    /// How long to wait for another program that writes a backup of the same VM
    #[arg(long, value_name = "SECONDS", default_value_t = 60, requires = "apply")]
    wait: u64,
    /// Disks that are merged at a time [default: by how long a rename takes, 1 on disks that turn and slow networks, up to 4]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=64), requires = "apply")]
    jobs: Option<u32>,
    /// Says how far it is every ten seconds, where there is no terminal
    #[arg(long, requires = "apply")]
    progress: bool,
    /// Writes JSON
    #[arg(long)]
    json: bool,
}

/// Runs the command.
///
/// # Errors
/// `Usage` if no rule or no scope is given, or the time zone is unknown; if what is named is not there, or the
/// repository cannot be listed.
pub fn run(global: &Global, arguments: &ForgetArgs) -> Result<Exit> {
    if arguments.vm.is_none() && arguments.job.is_none() && arguments.schedule.is_none() && !arguments.all {
        let message = "it is not said which backups are meant: give --vm, --job, --schedule or --all";
        return Err(Failure::usage(message).into());
    }
    let (rules, zone) = arguments.retention.rules()?;
    // Before there are other threads.
    let is_stopped = if arguments.apply { Some(signals::stop_on_signals()?) } else { None };
    let place = open::place(global, arguments.address.as_deref())?;
    let repository = open::repository(global, &place, open::SMALL_CACHE)?;
    if repository.layout() == Layout::Disks {
        let message = format!("'{}' holds VHDs without metadata: nobody can say which backups they are", place.name);
        return Err(Failure::new(Exit::Failed, message).into());
    }
    let protection = Protection {
        tags: arguments.retention.tags().to_vec(),
        immutability: repository.immutability().context("find out which backups are immutable")?,
        now: Timestamp::now(),
    };
    let (judged, named) = judge(&repository, arguments, &rules, &protection)?;
    let applied = match is_stopped {
        Some(is_stopped) => {
            if !arguments.json {
                print::text(&to_text(&judged, zone.as_deref(), ""))?;
            }
            let storage = open::writable(global, &place)?;
            let choose = |backups: &Backups| {
                let decided = decide(backups, &rules, &protection, &named);
                decided.into_iter().filter(|row| !row.decision.is_keep()).map(|row| row.backup).collect()
            };
            let jobs = Jobs::new(arguments.jobs.or((!is_side_by_side(&judged)).then_some(1)), &*storage);
            if let Some(rename) = jobs.rename.filter(|_| !arguments.json) {
                let milliseconds = rename.as_secs_f64() * 1000.0;
                say!("xofs: {} at a time: a rename takes {milliseconds:.1} ms here", count(jobs.count, "merge"));
            }
            let (wait, progress) = (Duration::from_secs(arguments.wait), arguments.progress);
            let manner = Manner { repository: place.name.clone(), wait, progress, jobs: jobs.count };
            let vms: Vec<&Vm> = judged.iter().map(|judged| &judged.vm).collect();
            Some((apply::run(&manner, &storage, &vms, &choose, &is_stopped).or_its_error()?, jobs))
        }
        None => None,
    };
    if arguments.json {
        let kept = judged.iter().flat_map(Judged::rows).filter(|row| row.decision.is_keep()).count();
        let all = judged.iter().flat_map(Judged::rows).count();
        print::json(&json!({
            "repository": place.name,
            "timeZone": zone,
            "vms": judged.iter().map(Judged::to_json).collect::<Vec<_>>(),
            "keep": kept,
            "forget": all - kept,
            "applied": applied.as_ref().map(|(applied, jobs)| {
                let mut told = applied.to_json();
                told["jobs"] = json!(jobs.count);
                told["renameSeconds"] = json!(jobs.rename.map(|rename| rename.as_secs_f64()));
                told
            }),
        }))?;
    } else {
        match &applied {
            Some((applied, _)) => print::text(&applied.to_text())?,
            None => print::text(&to_text(&judged, zone.as_deref(), "; nothing was changed"))?,
        }
    }
    let is_listed = judged.iter().all(|vm| vm.rows.is_ok());
    Ok(match applied.map_or(Exit::Done, |(applied, _)| applied.exit()) {
        Exit::Done if !is_listed => Exit::Partial,
        exit => exit,
    })
}

/// Whether there is something to be done at a time: what goes is of several VMs, or of several of a VM's disks. What was begun
/// earlier is finished one after the other.
fn is_side_by_side(judged: &[Judged]) -> bool {
    let going = |vm: &Judged| vm.rows().filter(|row| !row.decision.is_keep()).map(|row| row.backup.clone()).collect();
    let going: Vec<Vec<Arc<Backup>>> = judged.iter().map(going).filter(|going: &Vec<_>| !going.is_empty()).collect();
    let disks = going.iter().flatten().flat_map(|backup| disks_of(backup));
    going.len() > 1 || disks.map(ObjectPath::parent).collect::<BTreeSet<_>>().len() > 1
}

/// A VM with what is to become of those of its backups that were named.
struct Judged {
    vm: Vm,
    /// By group, oldest first; else why they cannot be listed.
    rows: Result<BTreeMap<Group, Vec<Row>>, Error>,
}

/// Mode, schedule and job: the rules judge each by itself.
type Group = (&'static str, String, String);

struct Row {
    backup: Arc<Backup>,
    decision: Decision,
}

/// Decides about the backups that were named.
fn judge(
    repository: &Repository,
    arguments: &ForgetArgs,
    rules: &Rules,
    protection: &Protection,
) -> Result<(Vec<Judged>, Vec<Named>)> {
    let mut vms = match &arguments.vm {
        Some(name) => match repository.select(name)? {
            Selection::Vm(vm) => vec![(vm.clone(), repository.backups(&vm.id))],
            _ => return Err(Failure::usage(format!("'{name}' is one backup or disk: --vm takes a VM")).into()),
        },
        None => repository.all_backups()?,
    };
    let of_job = |backup: &Backup| backup.job_id.clone();
    let of_schedule = |backup: &Backup| backup.schedule_id.clone();
    let job = arguments.job.iter().map(|id| Named::find("job", id, of_job, &vms));
    let schedule = arguments.schedule.iter().map(|id| Named::find("schedule", id, of_schedule, &vms));
    let named = job.chain(schedule).collect::<Result<Vec<_>>>()?;
    let judged = vms.drain(..).map(|(vm, backups)| {
        let rows = backups.map(|backups| {
            let mut groups: BTreeMap<Group, Vec<Row>> = BTreeMap::new();
            for row in decide(&backups, rules, protection, &named) {
                let group = (mode_of(&row.backup), row.backup.schedule_id.clone(), row.backup.job_id.clone());
                groups.entry(group).or_default().push(row);
            }
            groups
        });
        Judged { vm, rows }
    });
    let is_meant = |vm: &Judged| named.is_empty() || vm.rows.as_ref().map_or(true, |rows| !rows.is_empty());
    Ok((judged.filter(is_meant).collect(), named))
}

/// Decides about those of a VM's backups that were named: all that they have to be of.
fn decide(backups: &Backups, rules: &Rules, protection: &Protection, named: &[Named]) -> Vec<Row> {
    // Of all the VM's backups, named or not: they decide about each other.
    let decisions = rules.decide(backups, protection);
    let rows = backups.iter().zip(decisions).map(|(backup, decision)| Row { backup: backup.clone(), decision });
    rows.filter(|row| named.iter().all(|named| (named.of)(&row.backup) == named.id)).collect()
}

/// The job or schedule that was named.
struct Named {
    id: String,
    of: fn(&Backup) -> String,
}

impl Named {
    /// Finds the one whose id is `wanted`, or begins with it.
    fn find(
        what: &str,
        wanted: &str,
        of: fn(&Backup) -> String,
        vms: &[(Vm, crate::repository::Result<Backups>)],
    ) -> Result<Self> {
        let backups = vms.iter().filter_map(|(_, backups)| backups.as_ref().ok()).flat_map(|all| all.iter());
        let ids: BTreeSet<String> = backups.map(|backup| of(backup)).filter(|id| !id.is_empty()).collect();
        let matching: Vec<&String> = match ids.get(wanted) {
            Some(id) => vec![id],
            None if wanted.is_empty() => Vec::new(),
            None => ids.iter().filter(|id| id.starts_with(wanted)).collect(),
        };
        let list = |ids: &mut dyn Iterator<Item = &String>| {
            ids.take(8).map(|id| format!("'{}'", id.escape_debug())).collect::<Vec<_>>().join(", ")
        };
        let wanted = wanted.escape_debug();
        match matching.as_slice() {
            [id] => Ok(Self { id: (*id).clone(), of }),
            [] => {
                let there = if ids.is_empty() { "none".to_owned() } else { list(&mut ids.iter()) };
                let message = format!("no backup is of a {what} '{wanted}'; there are {there}");
                Err(Error::new(ErrorKind::NotFound, message).into())
            }
            several => {
                let several = list(&mut several.iter().copied());
                let message = format!("'{wanted}' names several {what}s: {several}; say which");
                Err(Error::new(ErrorKind::Ambiguous, message).into())
            }
        }
    }
}

impl Judged {
    fn rows(&self) -> impl Iterator<Item = &Row> {
        self.rows.iter().flat_map(BTreeMap::values).flatten()
    }

    fn write_text(&self, text: &mut String) -> std::fmt::Result {
        let name = if self.vm.name.is_empty() { "(name unknown)" } else { &self.vm.name };
        write!(text, "{}  {}", Shown(name), Shown(self.vm.id.as_str()))?;
        let groups = match &self.rows {
            Ok(groups) => groups,
            Err(error) => return writeln!(text, "  cannot be listed: {}", Shown(&error.to_string())),
        };
        writeln!(text)?;
        for ((mode, schedule, job), rows) in groups {
            let is_shared = groups.keys().filter(|(of, name, _)| (of, name) == (mode, schedule)).count() > 1;
            let known = |id: &str| Shown(if id.is_empty() { "unknown" } else { id }).to_string();
            let job = if is_shared { format!("job {}, ", known(job)) } else { String::new() };
            writeln!(text, "  {mode}, {job}schedule {}: {}", known(schedule), count(rows.len(), "backup"))?;
            for row in rows {
                row.write_text(text)?;
            }
        }
        Ok(())
    }

    fn to_json(&self) -> Value {
        json!({
            "uuid": self.vm.id.as_str(),
            "name": self.vm.name,
            "backups": self.rows().map(Row::to_json).collect::<Vec<_>>(),
            "problem": self.rows.as_ref().err().map(ToString::to_string),
        })
    }
}

impl Row {
    fn write_text(&self, text: &mut String) -> std::fmt::Result {
        let reasons: Vec<String> = self.decision.reasons().iter().map(ToString::to_string).collect();
        let (decision, reasons) =
            if self.decision.is_keep() { ("keep", reasons.join(", ")) } else { ("forget", "no rule keeps it".into()) };
        write!(text, "    {:<18} {decision:<6}  {}", self.backup.time, Shown(&reasons))?;
        if let Some(problem) = &self.backup.problem {
            write!(text, "  problem: {}", Shown(problem))?;
        }
        writeln!(text)
    }

    fn to_json(&self) -> Value {
        json!({
            "time": self.backup.time.to_string(),
            "timestamp": self.backup.time.unix(),
            "mode": mode_of(&self.backup),
            "jobId": self.backup.job_id,
            "scheduleId": self.backup.schedule_id,
            "metadata": self.backup.metadata.to_string(),
            "decision": if self.decision.is_keep() { "keep" } else { "forget" },
            "reasons": self.decision.reasons().iter().map(reason_to_json).collect::<Vec<_>>(),
            "problem": self.backup.problem,
        })
    }
}

fn reason_to_json(reason: &Reason) -> Value {
    match reason {
        Reason::Last(count) => json!({"kind": "last", "count": count}),
        Reason::Period(period, bucket) => json!({"kind": period.name(), "bucket": bucket}),
        Reason::Tag(tag) => json!({"kind": "tag", "tag": tag}),
        Reason::Immutable(until) => json!({"kind": "immutable", "until": until.as_second()}),
        Reason::BeforeImmutable(until) => json!({"kind": "beforeImmutable", "until": until.as_second()}),
        Reason::NewestOfChain => json!({"kind": "newestOfChain"}),
        Reason::Unreadable => json!({"kind": "unreadable"}),
    }
}

fn mode_of(backup: &Backup) -> &'static str {
    match backup.mode {
        Mode::Incremental => "incremental",
        Mode::Full => "full",
        Mode::Unreadable => "unreadable",
    }
}

fn to_text(judged: &[Judged], zone: Option<&str>, end: &str) -> String {
    let mut text = String::new();
    let (mut kept, mut all) = (0, 0);
    for vm in judged {
        // Writing to a String cannot fail.
        let _ = vm.write_text(&mut text);
        kept += vm.rows().filter(|row| row.decision.is_keep()).count();
        all += vm.rows().count();
    }
    let zone = zone.map(|zone| format!(" (time zone {zone})")).unwrap_or_default();
    let _ = writeln!(text, "{}: {kept} to keep, {} to forget{zone}{end}", count(all, "backup"), all - kept);
    text
}
