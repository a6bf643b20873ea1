//! What was written, for people and as JSON.

use std::fmt::Write as _;
use std::time::Duration;

use serde_json::{Value, json};

use super::Retention;
use crate::cli::exit::Exit;
use crate::cli::text::{Shown, count, size};
use crate::ingest::{self, ErrorKind, Outcome, Pass, Place, ReadDisk, Reading, Report, Stored};

/// The stages that the same threads do, one after the other for each block.
const OF_WORKERS: [&str; 3] = ["compare", "hash", "encode"];

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

/// Says how each disk was read, for people: where a source has several ways.
pub fn reads_to_text(report: &Report) -> String {
    let mut text = String::new();
    for disk in &report.disks {
        for pass in &disk.passes {
            let since = if pass.base.is_some() { ", what changed" } else { "" };
            let (read, way) = (size(pass.bytes), Shown(&pass.way));
            // Writing to a String cannot fail.
            let _ = match &pass.given_up {
                None => writeln!(text, "  {}  {read} read{since}, by {way}", disk.name),
                Some(why) => writeln!(text, "  {}  given up after {read}{since}, by {way}: {}", disk.name, Shown(why)),
            };
        }
    }
    text
}

/// Says on standard error what became of the destinations that failed.
pub fn say_failures(report: &Report) {
    for outcome in &report.outcomes {
        if let Err(error) = &outcome.stored {
            eprintln!("xofs: {}: {}", Shown(&outcome.name), Shown(&error.to_string()));
        }
    }
}

/// Returns how a command ends that wrote this.
pub fn exit(report: &Report, retention: Option<&Retention>) -> Exit {
    let failed = |kind: fn(ErrorKind) -> bool| {
        report.outcomes.iter().any(|outcome| outcome.stored.as_ref().is_err_and(|error| kind(error.kind())))
    };
    match (failed(|kind| kind == ErrorKind::Interrupted), failed(|kind| kind != ErrorKind::Present)) {
        (true, _) => Exit::Interrupted,
        (_, true) => Exit::Partial,
        _ => retention.map_or(Exit::Done, Retention::exit),
    }
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

/// Says what was written, for people.
pub fn to_text(report: &Report) -> String {
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

/// Says what was written, as JSON.
pub fn to_json(report: &Report, retention: Option<&Retention>) -> Value {
    let stages = |stages: &[(&str, Reading)]| -> Value {
        stages.iter().map(|(name, reading)| ((*name).to_owned(), reading_to_json(reading))).collect()
    };
    let forgotten = retention.map(Retention::to_json).unwrap_or_default();
    let stored = |(number, outcome): (usize, &Outcome)| match &outcome.stored {
        Ok(stored) => json!({
            "repository": outcome.name,
            "error": null,
            (place_of(stored).0): place_of(stored).1,
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
        "reads": report.disks.iter().map(read_to_json).collect::<Vec<_>>(),
        "bottleneck": bottleneck(report),
        "repositories": report.outcomes.iter().enumerate().map(stored).collect::<Vec<_>>(),
    })
}

/// Says where a backup is: in a repository, or what a replica calls it.
fn place_of(stored: &Stored) -> (&'static str, &str) {
    match &stored.place {
        Place::Repository(metadata) => ("metadata", metadata),
        Place::Replica(name) => ("replica", name),
    }
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

fn read_to_json(disk: &ReadDisk) -> Value {
    let pass = |pass: &Pass| {
        json!({
            "way": pass.way,
            "base": pass.base,
            "bytes": pass.bytes,
            "baseBytes": pass.base_bytes,
            "givenUp": pass.given_up,
        })
    };
    json!({ "name": disk.name, "passes": disk.passes.iter().map(pass).collect::<Vec<_>>() })
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
