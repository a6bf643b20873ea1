//! `xofs ingest`: a new backup out of disk images or another repository, in one or several repositories.

mod sources;

use std::ffi::{OsStr, OsString};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, Result};
use clap::Args;
use jiff::Timestamp;

use super::exit::Exit;
use super::store::{Retention, StoreArgs, exit, say_failures, to_json, to_text, with_progress};
use super::text::Shown;
use super::{Global, print, signals};
use crate::ingest::{self, Wanted, Watch};
use crate::repository::BackupTime;

const EXAMPLES: &str = "\
Examples:
  xofs ingest /srv/backups --vm web01 --disk xvda=/dev/vg0/web01-snap
  xofs ingest main --vm 1f2e3d4c-5b6a-4798-8a9b-0c1d2e3f4a5b --name web01 --disk xvda=system.raw --disk xvdb=data.vhd
  zcat old.img.gz | xofs ingest main --to offsite --vm web01 --disk xvda=-
  xofs ingest main --vm web01 --disk xvda=/dev/vg0/web01-snap --keep-last 7 --keep-weekly 4
  xofs ingest main --vm web01 --disk xvda=/var/lib/libvirt/images/web01.qcow2
  xofs ingest offsite --from main --backup web01/latest

A full backup (XVA) that is mirrored is stored as it is: --format, --compression and --incremental are not for it.

IMAGE is a raw file or block device (holes are skipped), - for standard input (raw), a .vhd file, an alias or the folder \
of an exploded VHD, a qcow2, VMDK, VHDX, VDI, QED or Parallels image (read by qemu-nbd, of the package qemu-utils), or an \
export: nbd://HOST:PORT/EXPORT, nbd+unix:///EXPORT?socket=PATH. An image must not change meanwhile: take a snapshot.

A backup is there as a whole or not at all, whenever the program ends. Never give --job the id of a job that Xen \
Orchestra still runs: two programs that continue one chain destroy it.

With rules of retention (--keep-...), the backups of its job that no rule keeps are forgotten afterwards, as by xofs \
forget --apply.

Ends with 3 if a repository of several failed, 4 if the backup is there but what expired could not be forgotten, 11 if the \
VM is locked by another program for longer than --wait, 130 if it was interrupted.";

/// Makes a new backup out of disk images, or out of one of another repository
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub struct IngestArgs {
    /// The repository [default: XOFS_REPOSITORY]
    #[arg(value_name = "REPO")]
    address: Option<OsString>,
    /// The VM: its name, or its uuid if it is new
    #[arg(long, value_name = "NAME|UUID", required_unless_present = "from")]
    vm: Option<String>,
    /// The name of a new VM, or a new name
    #[arg(long)]
    name: Option<String>,
    /// A disk, by the name that the guest has for it, and its image; may be repeated
    #[arg(long = "disk", value_name = "NAME=IMAGE", required_unless_present = "from")]
    disks: Vec<OsString>,
    /// Mirrors a backup of this repository instead: its VM, disks and time, or the XVA of a full one as it is
    #[arg(long, value_name = "REPO", requires = "backup", conflicts_with_all = ["vm", "name", "disks", "time"])]
    from: Option<OsString>,
    /// The backup that is mirrored: VM, for its newest, or VM/BACKUP, as in xofs export
    #[arg(long, value_name = "WHAT", requires = "from")]
    backup: Option<String>,
    /// Reads an image that names other files, which its bytes are in: a backing file, a data file, parts
    #[arg(long, conflicts_with = "from")]
    allow_backing: bool,
    /// A dirty bitmap of the images: what it calls clean is not even compared
    #[arg(long, value_name = "BITMAP", requires = "bitmap_since", conflicts_with_all = ["from", "full"])]
    bitmap: Option<String>,
    /// The time of the backup since which the bitmap records; compared as a whole if that is not the newest one
    #[arg(long, value_name = "BACKUP", requires = "bitmap", value_parser = parse_backup_time)]
    bitmap_since: Option<BackupTime>,
    /// Another repository to write to, in the same pass; may be repeated
    #[arg(long, value_name = "REPO")]
    to: Vec<OsString>,
    #[command(flatten)]
    store: StoreArgs,
    /// When it was made
    #[arg(long, value_name = "TIME", hide = true, value_parser = parse_time)]
    time: Option<Timestamp>,
}

/// Reads a time as RFC 3339 has it, or as names in a repository do.
fn parse_time(text: &str) -> std::result::Result<Timestamp, String> {
    let of_name = BackupTime::parse(text).and_then(|time| Timestamp::from_second(time.unix()).ok());
    of_name.map_or_else(|| text.parse::<Timestamp>().map_err(|error| error.to_string()), Ok)
}

/// Reads the time of a backup, as `xofs list` says it or as its files are called.
fn parse_backup_time(text: &str) -> std::result::Result<BackupTime, String> {
    let expected = || format!("'{text}' is no time of a backup: one like 2026-11-20T030007Z was expected");
    BackupTime::parse(&text.replace('-', "")).ok_or_else(expected)
}

/// Runs the command.
///
/// # Errors
/// If no repository has the backup in the end.
pub fn run(global: &Global, arguments: &IngestArgs) -> Result<Exit> {
    let shares_key = arguments.from.is_some() || !arguments.to.is_empty();
    let global = &Global { shares_key, ..global.clone() };
    let layout = arguments.store.layout()?;
    let rules = arguments.store.rules()?;
    // Before other threads are started; nothing is watched yet.
    let watch = Arc::new(Watch::new(|sentence| say!("xofs: {}", Shown(sentence))));
    let (cancelled, is_second) = (watch.clone(), AtomicBool::new(false));
    let (is_stopped, is_made) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicBool::new(false)));
    let (stop, made) = (is_stopped.clone(), is_made.clone());
    let on_signal = move || {
        if is_second.swap(true, Ordering::AcqRel) {
            // As if it were killed: the next ingest removes what is left.
            std::process::exit(i32::from(Exit::Interrupted as u8));
        }
        stop.store(true, Ordering::Release);
        cancelled.cancel();
        if made.load(Ordering::Acquire) {
            say!("xofs: stops; the backup is there, and what expired is forgotten the next time");
        } else {
            say!("xofs: stops, and removes what was written; once more, and it is left for the next ingest to remove");
        }
    };
    signals::handle(on_signal).context("take the signals that end a program")?;
    let wanted = Wanted {
        extent: arguments.store.extent(),
        layout,
        job: arguments.store.job.clone(),
        schedule: arguments.store.schedule.clone(),
        patience: arguments.store.patience(),
        reserve: arguments.store.reserve(),
        ..sources::wanted(global, arguments)?
    };
    let addresses: Vec<Option<&OsStr>> = std::iter::once(arguments.address.as_deref())
        .chain(arguments.to.iter().map(|to| Some(to.as_os_str())))
        .collect();
    let destinations = arguments.store.destinations(global, &addresses, arguments.from.as_deref())?;
    let report =
        with_progress("ingest", &watch, arguments.store.progress, || ingest::run(&wanted, &destinations, &watch))?;
    is_made.store(true, Ordering::Release);
    let name = arguments.name.as_deref().unwrap_or_default();
    let apply = |rules| Retention::apply(&arguments.store, name, rules, &report, &destinations, &is_stopped);
    let retention = rules.as_ref().map(apply);
    if arguments.store.json {
        print::json(&to_json(&report, retention.as_ref()))?;
    } else {
        let forgotten = retention.as_ref().map(|retention| retention.to_text(&report)).unwrap_or_default();
        print::text(&format!("{}{forgotten}", to_text(&report)))?;
    }
    say_failures(&report);
    Ok(exit(&report, retention.as_ref()))
}
