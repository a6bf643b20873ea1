//! `xofs restore`: backups of a repository into a pool.

mod report;

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context, Result};
use clap::Args;
use serde_json::{Value, json};

use super::exit::{self, Exit, Failure};
use super::pool::{Named, PoolArgs};
use super::store::with_progress;
use super::text::Shown;
use super::{Global, open, print, signals};
use crate::ingest::Watch;
use crate::pool::restore::{self, Macs, Options, Plan, Planner, Run, Target, Wish};
use crate::probe::Subject;
use crate::repository::{Backup, Mode, Repository, Selection, Vm};

const EXAMPLES: &str = "\
WHAT is VM[/BACKUP[/DISK]]: VM by name or by uuid or its first characters; BACKUP is latest (if nothing is said), latest~2, or a \
time or its beginning (2026-11); DISK as it is named in the mount, for that disk alone.

Examples:
  xofs restore --pool lab /srv/backups web01
  xofs restore --pool lab main web01/2026-11-20T030007Z --name web01-test --network lab-net --start
  xofs restore --pool lab main web01/latest --explain
  xofs restore --pool lab main web01/latest/xvdb --attach-to web01
  xofs restore --pool lab main web01/latest~1 --onto-snapshot --verify
  xofs restore --pool new main --all --sr fast --network 'Pool-wide network associated with eth0=LAN'

The VM is new, whatever the pool has. It gets its disks from the repository without anything being stored in between, bears \
'[restoring]' in its name and cannot be started until they are all there. What fails or is interrupted is removed; what a killed \
run left is removed by the next one.

An interface gets the network of the same uuid, else of the same name, else none, which is said; --network says otherwise. Its MAC \
is kept unless the pool has it already. Disks go to the default SR of the pool unless --sr or --sr-of says otherwise, and only if \
there is room. --explain says all of this beforehand and makes nothing.

The pool's certificate and password are handled as by xofs backup.

Ends with 3 if some of several VMs failed, 12 if the password is wrong, 13 if a disk is damaged in the repository, 130 if it was \
interrupted.";

/// Restores backups into an XCP-ng or XenServer pool: a VM, one disk, or all VMs
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES, override_usage = "xofs restore [OPTIONS] --pool <POOL> [REPO] [WHAT]")]
pub struct RestoreArgs {
    #[command(flatten)]
    pool: PoolArgs,
    /// The repository (else XOFS_REPOSITORY or --repository), and what of it
    #[arg(num_args = 0..=2, value_names = ["REPO", "WHAT"])]
    names: Vec<OsString>,
    /// Restores the newest backup of every VM
    #[arg(long, conflicts_with_all = ["disk", "name", "attach_to"])]
    all: bool,
    /// Only this disk, as the guest sees it (xvda)
    #[arg(long, value_name = "NAME")]
    disk: Option<String>,
    /// Attaches the only disk to this VM of the pool: its name or uuid
    #[arg(long, value_name = "NAME|UUID")]
    attach_to: Option<String>,
    /// Another name for the VM, or for the only disk
    #[arg(long)]
    name: Option<String>,
    /// The SR of the disks: its name or uuid [default: the pool's default SR]
    #[arg(long, value_name = "NAME|UUID")]
    sr: Option<String>,
    /// The SR of one disk; may be repeated
    #[arg(long, value_name = "DISK=NAME|UUID", value_parser = parse_pair)]
    sr_of: Vec<(String, String)>,
    /// The network of interfaces: of those that had OLD, or of all that nothing else is said of; may be repeated
    #[arg(long, value_name = "[OLD=]NAME|UUID")]
    network: Vec<String>,
    /// Keeps MACs, whatever the pool has
    #[arg(long, conflicts_with = "new_mac")]
    keep_mac: bool,
    /// Has the pool make new MACs
    #[arg(long)]
    new_mac: bool,
    /// Makes a disk of the snapshot that the pool still has of it, and sends only what differs
    #[arg(long)]
    onto_snapshot: bool,
    /// Restores a VM that was suspended without its memory
    #[arg(long)]
    without_memory: bool,
    /// Reads each disk back and compares it with the repository
    #[arg(long)]
    verify: bool,
    /// Starts the VM once it is whole
    #[arg(long)]
    start: bool,
    /// How many disks are sent at the same time
    #[arg(long, value_name = "NUMBER", default_value_t = 2, value_parser = clap::value_parser!(u8).range(1..=16))]
    jobs: u8,
    /// Only says what would be made, and why
    #[arg(long)]
    explain: bool,
    /// Says how far it is every ten seconds, where there is no terminal
    #[arg(long)]
    progress: bool,
    /// Writes JSON
    #[arg(long)]
    json: bool,
}

/// Reads the name of a disk and of an SR.
fn parse_pair(text: &str) -> std::result::Result<(String, String), String> {
    match text.split_once('=') {
        Some((disk, sr)) if !disk.is_empty() && !sr.is_empty() => Ok((disk.to_owned(), sr.to_owned())),
        _ => Err(format!("'{text}' does not say the SR of a disk: DISK=SR was expected, like xvdb=fast")),
    }
}

/// What a signal stops.
#[derive(Default)]
struct Stop {
    cancel: xapi::Cancel,
    /// What is being restored.
    watch: Mutex<Option<Arc<Watch>>>,
    is_second: AtomicBool,
}

impl Stop {
    fn stop(&self) {
        if self.is_second.swap(true, Ordering::AcqRel) {
            // As if it were killed: the next run removes what is left.
            std::process::exit(i32::from(Exit::Interrupted as u8));
        }
        self.cancel.cancel();
        if let Some(watch) = &*self.watch.lock().unwrap_or_else(PoisonError::into_inner) {
            watch.cancel();
        }
        say!("xofs: stops, and removes what was made; once more, and it is left for the next run to remove");
    }

    /// Makes what one restore is watched by.
    fn watch(&self, say: impl Fn(&str) + Send + Sync + 'static) -> Arc<Watch> {
        let watch = Arc::new(Watch::between(["repository", "processor", "pool"], say));
        *self.watch.lock().unwrap_or_else(PoisonError::into_inner) = Some(watch.clone());
        watch
    }
}

/// What is to be restored.
struct Wanted {
    vm: Vm,
    backup: Arc<Backup>,
    disk: Option<String>,
    /// What a person should know of the choice.
    remark: Option<String>,
}

/// What became of it.
struct Outcome {
    json: Value,
    error: Option<anyhow::Error>,
    name: String,
}

/// Runs the command.
///
/// # Errors
/// If the pool or the repository cannot be used, or the only VM is not there in the end.
pub fn run(global: &Global, arguments: &RestoreArgs) -> Result<Exit> {
    if arguments.attach_to.is_some() && arguments.start {
        return Err(Failure::usage("--start is for a VM that is restored, not for one that gets a disk").into());
    }
    let named = arguments.pool.named()?;
    // Before other threads are started.
    let stop = Arc::new(Stop::default());
    let stopping = stop.clone();
    signals::handle(move || stopping.stop()).context("take the signals that end a program")?;
    let (address, what) = match arguments.all {
        true => (arguments.names.first().map(OsString::as_os_str), None),
        false => open::split_names(global, &arguments.names),
    };
    let place = open::place(global, address)?;
    let repository = open::repository(global, &place, open::SMALL_CACHE)?;
    let (wanted, mut outcomes) = if arguments.all {
        if arguments.names.len() > 1 {
            return Err(Failure::usage("--all restores every VM: name the repository alone").into());
        }
        all(&repository)?
    } else {
        (vec![one(&repository, &open::text_of(what)?, arguments.disk.as_deref())?], Vec::new())
    };
    if wanted.iter().any(|wanted| wanted.disk.is_none()) && arguments.attach_to.is_some() {
        return Err(Failure::usage("--attach-to is for one disk: name it with --disk, or as VM/BACKUP/DISK").into());
    }
    let options = options(arguments, Subject::repository(&place.name));
    let pool = named.connect(&stop.cancel)?;
    let target = Target::of(&pool)?;
    let mut planner = Planner { pool: &pool, repository: &repository, options: &options, target };
    let mut plans = Vec::new();
    for wanted in wanted {
        let planned = match &wanted.disk {
            Some(disk) => planner.only_disk(&wanted.vm, &wanted.backup, disk, arguments.attach_to.as_deref()),
            None => planner.machine(&wanted.vm, &wanted.backup),
        };
        match planned {
            Ok(mut plan) => {
                plan.remarks.extend(wanted.remark);
                plans.push(plan);
            }
            Err(error) => outcomes.push(Outcome::failed(&wanted.vm, error.into())),
        }
        stop.cancel.check("the restore")?;
    }
    if arguments.explain {
        explain(arguments, &plans, &mut outcomes)?;
    } else {
        for room in restore::room(&plans) {
            room.check()?;
        }
        make(arguments, &named, &pool, &options, &plans, &stop, &mut outcomes)?;
    }
    drop(pool);
    if arguments.json {
        print::json(&json!({ "restores": outcomes.iter().map(|outcome| outcome.json.clone()).collect::<Vec<_>>() }))?;
    }
    finish(outcomes, stop.cancel.is_cancelled())
}

fn options(arguments: &RestoreArgs, from: Subject) -> Options {
    let wish = |text: &String| match text.split_once('=') {
        Some((old, new)) => Wish { old: Some(old.to_owned()), new: new.to_owned() },
        None => Wish { old: None, new: text.clone() },
    };
    Options {
        storage: arguments.sr.clone(),
        storages_of: arguments.sr_of.clone(),
        networks: arguments.network.iter().map(wish).collect(),
        macs: match (arguments.keep_mac, arguments.new_mac) {
            (true, _) => Macs::Kept,
            (_, true) => Macs::New,
            _ => Macs::KeptIfFree,
        },
        name: arguments.name.clone(),
        uses_snapshots: arguments.onto_snapshot,
        leaves_memory: arguments.without_memory,
        verifies: arguments.verify,
        starts: arguments.start,
        at_once: usize::from(arguments.jobs),
        from,
    }
}

/// Finds what one WHAT names.
fn one(repository: &Repository, what: &str, disk: Option<&str>) -> Result<Wanted> {
    let wanted = |vm, backup, disk| Wanted { vm, backup, disk, remark: None };
    match repository.select(what)? {
        Selection::Vm(vm) => {
            let backups = repository.backups(&vm.id)?;
            let newest = backups.last().cloned();
            let none = || Failure::new(Exit::Failed, format!("'{}' has no backups", Shown(what)));
            Ok(wanted(vm, newest.ok_or_else(none)?, disk.map(str::to_owned)))
        }
        Selection::Backup(vm, backup) => Ok(wanted(vm, backup, disk.map(str::to_owned))),
        Selection::Disk(_, _, named) if disk.is_some_and(|disk| disk != named.name) => {
            Err(Failure::usage("two disks are named: leave --disk out").into())
        }
        Selection::Disk(vm, backup, disk) => Ok(wanted(vm, backup, Some(disk.name))),
        Selection::Loose(_) => {
            let message = "these are disks without a VM: a backup repository was expected";
            Err(Failure::new(Exit::NoRepository, message).into())
        }
    }
}

/// Finds the newest backup of every VM that can be read, and those VMs that have none.
fn all(repository: &Repository) -> Result<(Vec<Wanted>, Vec<Outcome>)> {
    let (mut wanted, mut outcomes) = (Vec::new(), Vec::new());
    for (vm, backups) in repository.all_backups()? {
        let backups = match backups {
            Ok(backups) => backups,
            Err(error) => {
                outcomes.push(Outcome::failed(&vm, error.into()));
                continue;
            }
        };
        let is_whole = |backup: &&Arc<Backup>| backup.mode != Mode::Unreadable && backup.problem.is_none();
        let Some(backup) = backups.iter().rev().find(is_whole) else {
            if !backups.is_empty() {
                outcomes.push(Outcome::failed(&vm, anyhow::anyhow!("none of its backups can be read")));
            }
            continue;
        };
        let newer = backups.iter().filter(|other| other.time > backup.time).count();
        let remark = (newer > 0).then(|| format!("an older backup is used: {newer} newer cannot be read"));
        wanted.push(Wanted { vm, backup: backup.clone(), disk: None, remark });
    }
    Ok((wanted, outcomes))
}

fn explain(arguments: &RestoreArgs, plans: &[Plan], outcomes: &mut Vec<Outcome>) -> Result<()> {
    let rooms = restore::room(plans);
    for plan in plans {
        if !arguments.json {
            print::text(&report::plan_to_text(plan))?;
        }
        let json = json!({ "backup": plan.source, "error": null, "plan": report::plan_to_json(plan) });
        outcomes.push(Outcome { json, error: None, name: plan.source.clone() });
    }
    if !arguments.json {
        print::text(&report::room_to_text(&rooms))?;
    } else if let Some(last) = outcomes.last_mut() {
        last.json["room"] = report::room_to_json(&rooms);
    }
    Ok(())
}

fn make(
    arguments: &RestoreArgs,
    named: &Named,
    pool: &xapi::Pool,
    options: &Options,
    plans: &[Plan],
    stop: &Arc<Stop>,
    outcomes: &mut Vec<Outcome>,
) -> Result<()> {
    let say = |sentence: &str| say!("xofs: {}", Shown(sentence));
    let run = Run::begin(pool.clone(), &named.state, options, &say)?;
    for plan in plans {
        if stop.cancel.is_cancelled() {
            return Ok(());
        }
        for remark in &plan.remarks {
            say!("xofs: {}: {}", Shown(&plan.source), Shown(remark));
        }
        let watch = stop.watch(|sentence| say!("xofs: {}", Shown(sentence)));
        if let Some(name) = &named.name {
            watch.transfer().is_of_pool(name);
        }
        let begun = std::time::Instant::now();
        match with_progress("restore", &watch, arguments.progress, || run.restore(plan, &watch)) {
            Ok(restored) => {
                if !arguments.json {
                    print::text(&report::to_text(plan, &restored, begun.elapsed()))?;
                }
                let json = report::to_json(plan, &restored, begun.elapsed());
                outcomes.push(Outcome { json, error: None, name: plan.source.clone() });
            }
            Err(error) => outcomes.push(Outcome::of(&plan.source, error.into())),
        }
    }
    Ok(())
}

impl Outcome {
    fn of(name: &str, error: anyhow::Error) -> Self {
        let code = exit::of(&error) as u8;
        let json = json!({ "backup": name, "error": format!("{error:#}"), "exitCode": code });
        Self { json, error: Some(error), name: name.to_owned() }
    }

    fn failed(vm: &Vm, error: anyhow::Error) -> Self {
        Self::of(if vm.name.is_empty() { vm.id.as_str() } else { &vm.name }, error)
    }
}

/// Decides how the command ends: of one VM as that did, of several by whether some of them failed.
fn finish(mut outcomes: Vec<Outcome>, is_stopped: bool) -> Result<Exit> {
    if outcomes.len() == 1 && outcomes[0].error.is_some() {
        let only = outcomes.remove(0);
        return Err(only
            .error
            .unwrap_or_else(|| anyhow::anyhow!("failed"))
            .context(format!("restore {}", Shown(&only.name))));
    }
    let mut kinds = BTreeSet::new();
    for outcome in &outcomes {
        if let Some(error) = &outcome.error {
            say!("xofs: {}: {}", Shown(&outcome.name), Shown(&format!("{error:#}")));
            kinds.insert(outcome.name.clone());
        }
    }
    if is_stopped {
        return Ok(Exit::Interrupted);
    }
    if kinds.is_empty() {
        return Ok(Exit::Done);
    }
    let message = format!("{} of {} VMs are not restored", kinds.len(), outcomes.len());
    let exit = if kinds.len() == outcomes.len() { Exit::Failed } else { Exit::Partial };
    Err(Failure::new(exit, message).into())
}
