//! `xofs backup`: VMs of a pool, into repositories and onto SRs.

mod explain;

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result};
use clap::{Args, ValueEnum};
use serde_json::{Value, json};
use xapi::Budget;

use super::exit::{self, Exit, Failure};
use super::pool::PoolArgs;
use super::replicas::ReplicaPools;
use super::store::{self, Retention, StoreArgs, say_failures, with_progress};
use super::text::Shown;
use super::{Global, print, signals};
use crate::ingest::{Destination, Wanted, Watch};
use crate::pool::{Done, Limits, MOST_REPLICAS, Mode, Options, Run, SrAddress, USUAL_CONNECTIONS, USUAL_REPLICAS};
use crate::repository::Rules;

const EXAMPLES: &str = "\
Examples:
  xofs backup --pool pool.example.org --vm web01 --to /srv/backups
  xofs backup --pool lab --vm web01 --vm db01 --to main --to offsite --keep-last 7 --keep-weekly 4
  xofs backup --pool lab --vm web01 --to main --explain
  xofs backup --pool lab --vm web01 --to main --cbt --purge-snapshot-data
  xofs backup --pool lab --vm web01 --to main --mode full
  xofs backup --pool lab --vm web01 --to main --to-sr spare --to-sr dr=fast --keep-replicas 7

A snapshot of the VM is taken and read; only what changed since the backup before is transferred and stored. It is kept for the \
next backup, one for each VM and job, and replaced only once the new one is stored in every repository and replica. Disks with [NOBAK] \
in their name and VMs with the tag xo:no-bak are left out. --explain says beforehand what will be read of each disk, and why.

--to-sr keeps a replica of each VM on an SR, with or without repositories: a VM that cannot be started, with a snapshot for each \
run. 'spare' is an SR of the same pool, 'dr=fast' one of the pool 'dr' of the configuration, or of the pool at an address \
('10.0.0.7=fast', 'https://host:8443=fast'); what is before the first '=' is the pool. With --mode full it is a VM for each run.

A disk is read in the first of these ways that works: the files of its SR (--sr-path), NBD with changed block tracking, NBD with \
the block list of an export, a stream of VHD. The last line says which stage the others waited for.

The certificate of a pool is shown when it is first seen; --fingerprint names the right one, --trust-first accepts it. The \
password comes from --pool-password-file, --pool-password-command, XOFS_POOL_PASSWORD, the configuration, or is asked for.

Ends with 3 if some of several VMs, repositories or SRs failed, 4 if the backup is there but what expired could not be forgotten, 11 \
if another program works on the VM, 12 if the password is wrong, 130 if it was interrupted.";

/// Kinds of backups.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Kind {
    /// Each disk as a chain: what changed since the backup before
    Incremental,
    /// The whole VM as one XVA
    Full,
}

/// Compressions of an XVA, by the pool.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum XvaCompression {
    None,
    Gzip,
    Zstd,
}

/// Backs up VMs of an XCP-ng or XenServer pool
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub struct BackupArgs {
    #[command(flatten)]
    pool: PoolArgs,
    /// A VM: its name, or its uuid; may be repeated
    #[arg(long = "vm", value_name = "NAME|UUID", required = true)]
    vms: Vec<String>,
    /// A repository to write to; of several, all get it in the same pass [default: XOFS_REPOSITORY, unless an SR is named]
    #[arg(long, value_name = "REPO")]
    to: Vec<OsString>,
    /// An SR that replicas of the VMs are kept on, by name or uuid; in another pool: its name or address, '=', the SR
    #[arg(long, value_name = "[POOL=]SR")]
    to_sr: Vec<SrAddress>,
    /// How many states of a VM are kept in each replica; of one schedule, where --schedule names several
    #[arg(long, value_name = "COUNT", default_value_t = USUAL_REPLICAS,
        value_parser = clap::value_parser!(u32).range(1..=i64::from(MOST_REPLICAS)))]
    keep_replicas: u32,
    /// What kind of backup is made
    #[arg(long, value_enum, default_value_t = Kind::Incremental)]
    mode: Kind,
    /// Only says what will be read of each disk, and why, and what room the snapshot takes
    #[arg(long)]
    explain: bool,
    /// Keeps no snapshot: each disk is read as a whole, and what differs from the backup before is stored
    #[arg(long)]
    no_base: bool,
    /// Switches changed block tracking on for the disks
    #[arg(long)]
    cbt: bool,
    /// Destroys the data of the kept snapshot once changed block tracking was used for all disks
    #[arg(long, requires = "cbt", conflicts_with = "no_base")]
    purge_snapshot_data: bool,
    /// Never uses NBD
    #[arg(long)]
    no_nbd: bool,
    /// Connections to read a disk by NBD over, if its hosts have so many to spare
    #[arg(long, value_name = "N", default_value_t = USUAL_CONNECTIONS, conflicts_with = "no_nbd",
        value_parser = clap::value_parser!(u8).range(1..=i64::from(Budget::MOST)))]
    nbd_connections: u8,
    /// The folder of an SR of files (NFS, ext) on this machine; may be repeated
    #[arg(long, value_name = "UUID=FOLDER", value_parser = parse_sr_path)]
    sr_path: Vec<(String, PathBuf)>,
    /// How long to wait for the host to coalesce before a snapshot, in seconds
    #[arg(long, value_name = "SECONDS", default_value_t = 600, conflicts_with = "ignore_chain")]
    chain_wait: u64,
    /// Takes a snapshot whatever the host still has to coalesce
    #[arg(long)]
    ignore_chain: bool,
    /// How the pool compresses the XVA of a full backup
    #[arg(long, value_enum, default_value_t = XvaCompression::Zstd)]
    xva_compression: XvaCompression,
    #[command(flatten)]
    store: StoreArgs,
}

/// Reads the uuid of an SR and where it is.
fn parse_sr_path(text: &str) -> std::result::Result<(String, PathBuf), String> {
    let expected = || format!("'{text}' does not name the folder of an SR: UUID=FOLDER was expected");
    let (sr, folder) = text.split_once('=').ok_or_else(expected)?;
    let sr = uuid::Uuid::try_parse(sr).map_err(|_| expected())?;
    Ok((sr.to_string(), PathBuf::from(folder)))
}

/// What a signal stops.
#[derive(Default)]
struct Stop {
    /// What the configuration calls the pool.
    pool: Option<String>,
    cancel: xapi::Cancel,
    /// The VM that is being backed up.
    watch: Mutex<Option<Arc<Watch>>>,
    is_stopped: Arc<AtomicBool>,
    is_second: AtomicBool,
}

impl Stop {
    fn stop(&self) {
        if self.is_second.swap(true, Ordering::AcqRel) {
            // As if it were killed: the next run removes what is left.
            std::process::exit(i32::from(Exit::Interrupted as u8));
        }
        self.is_stopped.store(true, Ordering::Release);
        self.cancel.cancel();
        if let Some(watch) = &*self.watch.lock().unwrap_or_else(PoisonError::into_inner) {
            watch.cancel();
        }
        say!("xofs: stops, and removes what was made; once more, and it is left for the next run to remove");
    }

    /// Makes what one VM is watched by.
    fn watch(&self, say: impl Fn(&str) + Send + Sync + 'static) -> Arc<Watch> {
        let watch = Arc::new(Watch::new(say));
        self.pool.iter().for_each(|pool| watch.transfer().is_of_pool(pool));
        *self.watch.lock().unwrap_or_else(PoisonError::into_inner) = Some(watch.clone());
        if self.is_stopped() {
            watch.cancel();
        }
        watch
    }

    fn is_stopped(&self) -> bool {
        self.is_stopped.load(Ordering::Acquire)
    }
}

/// Runs the command.
///
/// # Errors
/// If the pool cannot be used, or the only VM has no backup in the end.
pub fn run(global: &Global, arguments: &BackupArgs) -> Result<Exit> {
    let global = &Global { shares_key: arguments.to.len() > 1, ..global.clone() };
    let layout = arguments.store.layout()?;
    let rules = arguments.store.rules()?;
    let named = arguments.pool.named()?;
    // Before other threads are started.
    let stop = Arc::new(Stop { pool: named.name.clone(), ..Stop::default() });
    let stopping = stop.clone();
    signals::handle(move || stopping.stop()).context("take the signals that end a program")?;
    let mut addresses: Vec<Option<&OsStr>> = arguments.to.iter().map(|to| Some(to.as_os_str())).collect();
    if addresses.is_empty() && arguments.to_sr.is_empty() {
        addresses.push(None);
    }
    let destinations = arguments.store.destinations(global, &addresses, None)?;
    let say = |sentence: &str| say!("xofs: {}", Shown(sentence));
    let pool = named.connect(&stop.cancel)?;
    let mut pools = ReplicaPools::default();
    pools.connect(&arguments.to_sr, |pool| Ok(arguments.pool.another(pool)?.connect(&stop.cancel)))?;
    let replicas = pools.wishes(&arguments.to_sr, "", &stop.cancel);
    let options = options(arguments, named.sr_paths.clone());
    let run = Run::begin(pool, &named.state, &options, &destinations, replicas, &say)?;
    run.check_places()?;
    let mut results = Vec::with_capacity(arguments.vms.len());
    for vm in &arguments.vms {
        if stop.is_stopped() {
            break;
        }
        let wanted = || Wanted {
            extent: arguments.store.extent(),
            layout,
            schedule: arguments.store.schedule.clone(),
            reserve: arguments.store.reserve(),
            ..Wanted::default()
        };
        results.push(back_up(arguments, &run, vm, wanted(), rules.as_ref(), &destinations, &stop));
    }
    drop(run);
    if arguments.store.json {
        let vms: Vec<Value> = results.iter().map(|result| result.json.clone()).collect();
        print::json(&json!({ "vms": vms }))?;
    }
    finish(results, stop.is_stopped())
}

/// What became of a VM.
struct Outcome {
    json: Value,
    exit: Exit,
    error: Option<anyhow::Error>,
}

fn options(arguments: &BackupArgs, mut sr_paths: BTreeMap<String, PathBuf>) -> Options {
    sr_paths.extend(arguments.sr_path.iter().cloned());
    let compression = match arguments.xva_compression {
        XvaCompression::None => xapi::Compression::None,
        XvaCompression::Gzip => xapi::Compression::Gzip,
        XvaCompression::Zstd => xapi::Compression::Zstd,
    };
    Options {
        mode: match arguments.mode {
            Kind::Incremental => Mode::Incremental,
            Kind::Full => Mode::Full(compression),
        },
        job: arguments.store.job.clone(),
        keeps_base: !arguments.no_base,
        tracks_changes: arguments.cbt,
        purges_data: arguments.purge_snapshot_data,
        nbd_connections: (!arguments.no_nbd).then_some(arguments.nbd_connections.into()),
        sr_paths,
        chain_patience: (!arguments.ignore_chain).then(|| Duration::from_secs(arguments.chain_wait)),
        patience: arguments.store.patience(),
        replicas_kept: usize::try_from(arguments.keep_replicas).unwrap_or(usize::MAX),
        limits: Limits::default(),
    }
}

/// Backs up one VM, and says what became of it.
fn back_up(
    arguments: &BackupArgs,
    run: &Run,
    named: &str,
    wanted: Wanted,
    rules: Option<&Rules>,
    destinations: &[Destination],
    stop: &Stop,
) -> Outcome {
    let made = || -> Result<(Value, Exit)> {
        let vm = run.find(named)?;
        let (uuid, name) = (vm.uuid.clone(), vm.name_label.clone());
        let of = name.clone();
        let watch = stop.watch(move |sentence| say!("xofs: {}: {}", Shown(&of), Shown(sentence)));
        let act = || run.back_up(vm, wanted, &watch, arguments.explain);
        let (text, mut json, exit) = match with_progress("backup", &watch, arguments.store.progress, act)? {
            Done::LeftOut(reason) => {
                let because = if reason.is_empty() { String::new() } else { format!(" ({})", Shown(&reason)) };
                let text = format!("{}: left out by its tag xo:no-bak{because}\n", Shown(&name));
                (text, json!({ "leftOut": reason }), Exit::Done)
            }
            Done::Explained(explanation) => {
                (explain::to_text(&explanation), json!({ "plan": explain::to_json(&explanation) }), Exit::Done)
            }
            Done::Made(report) => {
                let apply =
                    |rules| Retention::apply(&arguments.store, &name, rules, &report, destinations, &stop.is_stopped);
                let retention = rules.map(apply);
                say_failures(&report);
                let forgotten = retention.as_ref().map(|retention| retention.to_text(&report)).unwrap_or_default();
                let text = format!("{}{}{forgotten}", store::reads_to_text(&report), store::to_text(&report));
                (
                    text,
                    json!({ "backup": store::to_json(&report, retention.as_ref()) }),
                    store::exit(&report, retention.as_ref()),
                )
            }
        };
        if !arguments.store.json {
            print::text(&text)?;
        }
        json["uuid"] = json!(uuid);
        json["name"] = json!(name);
        json["error"] = Value::Null;
        Ok((json, exit))
    };
    match made() {
        Ok((json, exit)) => Outcome { json, exit, error: None },
        Err(error) => {
            let json = json!({ "name": named, "error": format!("{error:#}"), "exitCode": exit::of(&error) as u8 });
            Outcome { json, exit: exit::of(&error), error: Some(error) }
        }
    }
}

/// Decides how the command ends: of one VM as that did, of several by whether some of them failed.
fn finish(mut results: Vec<Outcome>, is_stopped: bool) -> Result<Exit> {
    if results.len() == 1 {
        let only = results.remove(0);
        return only.error.map_or(Ok(only.exit), Err);
    }
    let mut failed = 0;
    for result in &results {
        if let Some(error) = &result.error {
            failed += 1;
            let name = result.json["name"].as_str().unwrap_or_default();
            say!("xofs: {}: {}", Shown(name), Shown(&format!("{error:#}")));
        }
    }
    if is_stopped {
        return Ok(Exit::Interrupted);
    }
    if failed > 0 {
        let message = format!("{failed} of {} VMs have no new backup", results.len());
        let exit = if failed == results.len() { Exit::Failed } else { Exit::Partial };
        return Err(Failure::new(exit, message).into());
    }
    let worst = [Exit::Partial, Exit::Retention];
    let is_one = |exit: &Exit| results.iter().any(|result| result.exit == *exit);
    Ok(worst.into_iter().find(is_one).unwrap_or(Exit::Done))
}
