//! `xofs ingest`: a new backup out of disk images or another repository, in one or several repositories.

mod expired;
mod sources;

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::fmt::Write as _;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result};
use clap::{Args, ValueEnum};
use jiff::Timestamp;
use serde_json::{Value, json};
use vhd::Filter;

use super::config::Entry;
use super::exit::{Exit, Failure};
use super::export::progress::Progress;
use super::forget::RetentionArgs;
use super::text::{Shown, count, parse_size, size};
use super::{Global, open, print, signals};
use crate::ingest::{self, Destination, ErrorKind, Extent, Layout, Outcome, Reading, Report, Stored, Wanted, Watch};
use crate::repository::BackupTime;
use expired::Retention;

/// The stages that the same threads do, one after the other for each block.
const OF_WORKERS: [&str; 3] = ["compare", "hash", "encode"];

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

/// Formats of disks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Format {
    /// A file for each block of 2 MiB
    Exploded,
    /// One VHD file for each disk
    Vhd,
}

/// Compressions of blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Compression {
    None,
    Gzip,
    Brotli,
}

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
    /// Stores all blocks, not only those that changed
    #[arg(long, conflicts_with = "incremental")]
    full: bool,
    /// Fails where blocks that did not change would have to be stored
    #[arg(long)]
    incremental: bool,
    /// How disks are stored [default: as the newest backup, else exploded]
    #[arg(long, value_enum)]
    format: Option<Format>,
    /// How blocks of an exploded disk are compressed [default: as the newest backup, else brotli]
    #[arg(long, value_enum)]
    compression: Option<Compression>,
    /// The id of the job it belongs to [default: one of xofs]
    #[arg(long, value_name = "ID")]
    job: Option<String>,
    /// The id of its schedule [default: as the newest backup of the job, else one of xofs]
    #[arg(long, value_name = "ID")]
    schedule: Option<String>,
    /// When it was made
    #[arg(long, value_name = "TIME", hide = true, value_parser = parse_time)]
    time: Option<Timestamp>,
    /// How long to wait for another program that works on the VM, in seconds
    #[arg(long, value_name = "SECONDS", default_value_t = 60)]
    wait: u64,
    /// How much is left free in each repository [default: 5 % of what is free, at most 1 GiB]
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    reserve: Option<u64>,
    /// What all files of each repository may have together [default: what the configuration says of it]
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    quota: Option<u64>,
    /// Says how far it is every ten seconds, where there is no terminal
    #[arg(long)]
    progress: bool,
    /// Writes JSON
    #[arg(long)]
    json: bool,
    #[command(flatten, next_help_heading = "Retention, after the backup was made")]
    retention: RetentionArgs,
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
    let layout = layout(arguments)?;
    let rules = expired::rules(arguments)?;
    // Before other threads are started; nothing is watched yet.
    let watch = Arc::new(Watch::new(|sentence| eprintln!("xofs: {}", Shown(sentence))));
    let (cancelled, is_second) = (watch.clone(), AtomicBool::new(false));
    let (is_stopped, is_made) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicBool::new(false)));
    let (stop, made) = (is_stopped.clone(), is_made.clone());
    let on_signal = move || {
        if is_second.swap(true, Ordering::AcqRel) {
            // As if it were killed: the next ingest removes what is left.
            std::process::exit(i32::from(Exit::Interrupted as u8));
        }
        if made.load(Ordering::Acquire) {
            eprintln!("xofs: stops; the backup is there, and what expired is forgotten the next time");
        } else {
            eprintln!(
                "xofs: stops, and removes what was written; once more, and it is left for the next ingest to remove"
            );
        }
        stop.store(true, Ordering::Release);
        cancelled.cancel();
    };
    signals::handle(on_signal).context("take the signals that end a program")?;
    let wanted = Wanted {
        extent: match (arguments.full, arguments.incremental) {
            (true, _) => Some(Extent::Full),
            (_, true) => Some(Extent::Incremental),
            _ => None,
        },
        layout,
        job: arguments.job.clone(),
        schedule: arguments.schedule.clone(),
        patience: Duration::from_secs(arguments.wait),
        reserve: arguments.reserve,
        ..sources::wanted(global, arguments)?
    };
    let destinations = destinations(global, arguments)?;
    let report = with_progress(&watch, arguments.progress, || ingest::run(&wanted, &destinations, &watch))?;
    is_made.store(true, Ordering::Release);
    let apply = |rules| Retention::apply(arguments, rules, &report, &destinations, &is_stopped);
    let retention = rules.as_ref().map(apply);
    if arguments.json {
        print::json(&to_json(&report, retention.as_ref()))?;
    } else {
        let forgotten = retention.as_ref().map(|retention| retention.to_text(&report)).unwrap_or_default();
        print::text(&format!("{}{forgotten}", to_text(&report)))?;
    }
    for outcome in &report.outcomes {
        if let Err(error) = &outcome.stored {
            eprintln!("xofs: {}: {}", Shown(&outcome.name), Shown(&error.to_string()));
        }
    }
    let failed = |kind: fn(ErrorKind) -> bool| {
        report.outcomes.iter().any(|outcome| outcome.stored.as_ref().is_err_and(|error| kind(error.kind())))
    };
    Ok(match (failed(|kind| kind == ErrorKind::Interrupted), failed(|kind| kind != ErrorKind::Present)) {
        (true, _) => Exit::Interrupted,
        (_, true) => Exit::Partial,
        _ => retention.map_or(Exit::Done, |retention| retention.exit()),
    })
}

fn layout(arguments: &IngestArgs) -> Result<Option<Layout>> {
    let filter = arguments.compression.map(|compression| match compression {
        Compression::None => Filter::None,
        Compression::Gzip => Filter::Gzip,
        Compression::Brotli => Filter::Brotli,
    });
    Ok(match (arguments.format, filter) {
        (None, None) => None,
        (Some(Format::Vhd), None | Some(Filter::None)) => Some(Layout::File),
        (Some(Format::Vhd), Some(_)) => {
            let message = "a VHD file is not compressed: leave --compression out, or use --format exploded";
            return Err(Failure::usage(message).into());
        }
        (Some(Format::Exploded) | None, filter) => Some(Layout::Exploded(filter)),
    })
}

fn destinations(global: &Global, arguments: &IngestArgs) -> Result<Vec<Destination>> {
    let mut places = vec![open::place(global, arguments.address.as_deref())?];
    for address in &arguments.to {
        places.push(open::place(global, Some(address))?);
    }
    let mut known = BTreeSet::new();
    if let Some(from) = &arguments.from {
        known.extend(open::place(global, Some(from))?.path.canonicalize());
    }
    let mut destinations = Vec::with_capacity(places.len());
    for place in &places {
        if !known.insert(place.path.canonicalize().unwrap_or_else(|_| place.path.clone())) {
            return Err(Failure::usage(format!("the repository '{}' is named twice", place.name)).into());
        }
        let (repository, storage) = open::both(global, place, open::SMALL_CACHE)?;
        let of_entry = place.entry.as_ref().map_or(Ok(None), Entry::quota)?;
        let quota = arguments.quota.or(of_entry);
        destinations.push(Destination { name: place.name.clone(), repository, storage, quota });
    }
    Ok(destinations)
}

/// Shows how far it is while `act` runs.
fn with_progress<T: Send>(watch: &Watch, is_asked: bool, act: impl FnOnce() -> T + Send) -> T {
    const PAUSE: Duration = Duration::from_millis(200);
    let (is_done, watching) = (AtomicBool::new(false), thread::current());
    thread::scope(|scope| {
        let working = scope.spawn(|| {
            let result = act();
            is_done.store(true, Ordering::Release);
            watching.unpark();
            result
        });
        let mut progress = Progress::new("ingest", 0, is_asked);
        let (mut shown, mut total) = (0, 0);
        while !is_done.load(Ordering::Acquire) && !working.is_finished() {
            let (done, expected) = watch.progress();
            if expected != total {
                progress.next("ingest", expected);
                (shown, total) = (0, expected);
            }
            progress.advance_waiting(done - shown, watch.waits_for());
            shown = done;
            thread::park_timeout(PAUSE);
        }
        drop(progress);
        working.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

/// Returns the stages of all that worked, with the destination where it is of one.
fn stages(report: &Report) -> Vec<(String, Reading)> {
    let mut all: Vec<(String, Reading)> =
        report.stages.iter().map(|(name, reading)| ((*name).to_owned(), *reading)).collect();
    for outcome in &report.outcomes {
        let Ok(stored) = &outcome.stored else { continue };
        all.extend(stored.stages.iter().map(|(name, reading)| (format!("{name} {}", outcome.name), *reading)));
    }
    all
}

/// Names the stage that the others waited for: of those in a row the one that waited least, unless the syncs took longer.
fn bottleneck(report: &Report) -> String {
    slowest(&stages(report), report.elapsed)
}

fn slowest(stages: &[(String, Reading)], elapsed: Duration) -> String {
    let is_last = |name: &str| name.starts_with("sync ") || name.starts_with("publish ");
    let longest = stages.iter().filter(|(name, _)| is_last(name)).max_by_key(|(_, reading)| reading.busy);
    if let Some((name, _)) = longest.filter(|(_, reading)| reading.busy * 2 > elapsed) {
        return name.clone();
    }
    let (workers, others): (Vec<_>, Vec<_>) =
        stages.iter().filter(|(name, _)| !is_last(name)).partition(|(name, _)| OF_WORKERS.contains(&name.as_str()));
    let busiest = workers.iter().max_by_key(|(_, reading)| reading.busy).map(|(name, _)| name);
    let together = workers.iter().map(|(_, reading)| *reading).sum::<Reading>();
    let in_a_row = others.iter().map(|(name, reading)| (name, *reading)).chain(busiest.map(|name| (name, together)));
    in_a_row.max_by_key(|(_, reading)| reading.utilization()).map(|(name, _)| name.clone()).unwrap_or_default()
}

fn to_text(report: &Report) -> String {
    let mut text = String::new();
    for outcome in &report.outcomes {
        let Ok(stored) = &outcome.stored else { continue };
        let _ = writeln!(text, "{}: backup {} of {}", Shown(&outcome.name), report.time, Shown(report.vm.as_str()));
        for disk in &stored.disks {
            let kind = if disk.is_key { "key" } else { "increment" };
            let _ = writeln!(
                text,
                "  {}  {kind}, {}  {} of {}, {} stored",
                disk.name,
                disk.format,
                count(usize::try_from(disk.blocks).unwrap_or(usize::MAX), "block"),
                size(disk.virtual_size),
                size(disk.stored_bytes),
            );
        }
        if let Some(xva) = &stored.xva {
            let _ = writeln!(text, "  full, an XVA  {} stored", size(xva.bytes));
        }
    }
    if report.outcomes.iter().all(|outcome| outcome.stored.is_err()) {
        return text;
    }
    let read = report.stages.iter().find(|(name, _)| *name == "read").map_or(0, |(_, reading)| reading.bytes);
    let seconds = report.elapsed.as_secs_f64();
    let _ = writeln!(text, "{} read in {seconds:.1} s; limited by: {}", size(read), Shown(&bottleneck(report)));
    text
}

fn to_json(report: &Report, retention: Option<&Retention>) -> Value {
    let stages = |stages: &[(&str, Reading)]| -> Value {
        stages.iter().map(|(name, reading)| ((*name).to_owned(), reading_to_json(reading))).collect()
    };
    let forgotten = retention.map(Retention::to_json).unwrap_or_default();
    let stored = |(number, outcome): (usize, &Outcome)| match &outcome.stored {
        Ok(stored) => json!({
            "repository": outcome.name,
            "error": null,
            "metadata": stored.metadata,
            "jobId": stored.job,
            "scheduleId": stored.schedule,
            "disks": disks_to_json(stored),
            "xva": stored.xva.as_ref().map(xva_to_json),
            "stages": stages(&stored.stages),
            "retention": forgotten.get(number),
        }),
        Err(error) => json!({
            "repository": outcome.name,
            "error": error.to_string(),
            "isPresent": error.kind() == ErrorKind::Present,
        }),
    };
    json!({
        "vm": report.vm.as_str(),
        "time": report.time.to_string(),
        "timestamp": report.time.unix(),
        "seconds": report.elapsed.as_secs_f64(),
        "stages": stages(&report.stages),
        "bottleneck": bottleneck(report),
        "repositories": report.outcomes.iter().enumerate().map(stored).collect::<Vec<_>>(),
    })
}

fn disks_to_json(stored: &Stored) -> Value {
    let disk = |disk: &ingest::StoredDisk| {
        json!({
            "name": disk.name,
            "vdi": disk.vdi,
            "path": disk.path,
            "format": disk.format,
            "isKey": disk.is_key,
            "whyFull": disk.why_full,
            "virtualSize": disk.virtual_size,
            "blocks": disk.blocks,
            "storedBytes": disk.stored_bytes,
            "comparedByDigest": disk.compared_by_digest,
            "comparedByBytes": disk.compared_by_bytes,
        })
    };
    stored.disks.iter().map(disk).collect()
}

fn xva_to_json(xva: &ingest::StoredXva) -> Value {
    json!({ "path": xva.path, "bytes": xva.bytes, "checksum": xva.checksum.to_string() })
}

fn reading_to_json(reading: &Reading) -> Value {
    json!({
        "bytes": reading.bytes,
        "busySeconds": reading.busy.as_secs_f64(),
        "inputSeconds": reading.input.as_secs_f64(),
        "outputSeconds": reading.output.as_secs_f64(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_bottleneck_is_what_the_others_wait_for() {
        // Seconds at work, and waiting for those before and behind.
        type Seconds = (u64, u64, u64);
        let reading = |(busy, input, output): Seconds| Reading {
            bytes: 0,
            busy: Duration::from_secs(busy),
            input: Duration::from_secs(input),
            output: Duration::from_secs(output),
        };
        let cases: [(&str, [Seconds; 6]); 6] = [
            ("read", [(9, 0, 0), (1, 6, 0), (1, 0, 0), (2, 0, 1), (1, 9, 0), (1, 0, 0)]),
            ("compare", [(1, 0, 9), (9, 0, 0), (1, 0, 0), (1, 0, 1), (1, 9, 0), (1, 0, 0)]),
            ("hash", [(1, 0, 9), (1, 1, 0), (7, 0, 0), (1, 0, 0), (1, 9, 0), (1, 0, 0)]),
            ("encode", [(1, 0, 9), (0, 1, 0), (1, 0, 0), (8, 0, 0), (1, 9, 0), (1, 0, 0)]),
            ("write here", [(1, 0, 9), (0, 0, 0), (1, 0, 0), (2, 0, 7), (9, 1, 0), (4, 0, 0)]),
            ("sync here", [(9, 0, 0), (1, 6, 0), (1, 0, 0), (2, 0, 1), (1, 9, 0), (6, 0, 0)]),
        ];
        let names = ["read", "compare", "hash", "encode", "write here", "sync here"];
        for (expected, seconds) in cases {
            let stages: Vec<_> =
                names.iter().zip(seconds).map(|(name, seconds)| ((*name).to_owned(), reading(seconds))).collect();
            assert_eq!(slowest(&stages, Duration::from_secs(10)), expected);
        }
    }
}
