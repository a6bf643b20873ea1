//! What was written, for people and as JSON.

use std::fmt::Write as _;

use serde_json::{Value, json};

use super::Retention;
use crate::cli::exit::Exit;
use crate::cli::text::{Shown, count, size};
use crate::ingest::{self, ErrorKind, Outcome, Pass, Place, ReadDisk, Report, Stored};
use crate::probe::{self, Stage};

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
            say!("xofs: {}: {}", Shown(&outcome.name), Shown(&error.to_string()));
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
    let (read, seconds) = (report.transfer.bytes(Stage::Read), report.elapsed.as_secs_f64());
    let _ = writeln!(text, "{} read in {seconds:.1} s", size(read));
    let _ = writeln!(text, "{}", Shown(&report.transfer.bottleneck().line()));
    text
}

/// Says what was written, as JSON.
pub fn to_json(report: &Report, retention: Option<&Retention>) -> Value {
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
        "transfer": probe::transfer_to_json(&report.transfer),
        "reads": report.disks.iter().map(read_to_json).collect::<Vec<_>>(),
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
