//! Figures of runs as tables for a terminal.

use std::fmt::Write as _;
use std::time::Duration;

use jiff::tz::TimeZone;

use super::Selection;
use crate::cli::job::report::{status_name, vm_status_name};
use crate::cli::text::{Shown, count, size};
use crate::job::figures::{
    Bottleneck, MergeFigures, Place, Row, RunFigures, Shares, Sums, Transfer, VmFigures, Work, rate,
};

/// So many reasons are told, and so many names of what failed for one.
const REASONS: usize = 20;
const NAMES: usize = 5;

/// Writes a table for each run, or the sums of all of them if they are asked for since some time.
pub fn to_text(selection: &Selection, zone: &TimeZone) -> String {
    match selection.since {
        Some(since) => {
            let since = since.to_zoned(zone.clone()).strftime("%Y-%m-%d %H:%M %Z");
            format!("since {since}: {}", sums(&Sums::of(&selection.runs), selection.runs.len()))
        }
        None if selection.runs.is_empty() => "no runs\n".to_owned(),
        None => selection.runs.iter().map(run).collect::<Vec<_>>().join("\n"),
    }
}

/// Writes parts of a thousand as percent.
pub fn percent(thousandths: u32) -> String {
    format!("{} %", (thousandths + 5) / 10)
}

/// Writes bytes a second.
pub fn speed(bytes: u64) -> String {
    format!("{}/s", size(bytes))
}

/// Writes a time in words that people use: `41.2 s`, `12 m 5 s`, `3 h 20 m`.
pub fn time(time: Duration) -> String {
    let tenths = (time.as_millis() + 50) / 100;
    let seconds = (time.as_millis() + 500) / 1000;
    match seconds {
        _ if tenths < 600 => format!("{}.{} s", tenths / 10, tenths % 10),
        0..=3599 => format!("{} m {} s", seconds / 60, seconds % 60),
        _ => format!("{} h {} m", seconds / 3600, seconds % 3600 / 60),
    }
}

/// Says where a stage is: of what is in a pool, in which.
pub fn place(of: &Place, pool: Option<&str>) -> String {
    match pool.filter(|pool| !pool.is_empty()) {
        Some(pool) => format!("{of} ({pool})"),
        None => of.to_string(),
    }
}

/// Writes columns, the first so many of them to the left, all others to the right.
fn table(indent: &str, left: usize, rows: &[Vec<String>]) -> String {
    // As they are shown: what is escaped is longer.
    let rows: Vec<Vec<String>> =
        rows.iter().map(|row| row.iter().map(|cell| Shown(cell).to_string()).collect()).collect();
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let width = |column: usize| {
        rows.iter().filter_map(|row| row.get(column)).map(|cell| cell.chars().count()).max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..columns).map(width).collect();
    let mut text = String::new();
    for row in &rows {
        let mut line = indent.to_owned();
        for (column, (cell, width)) in row.iter().zip(&widths).enumerate() {
            let gap = if column == 0 { "" } else { "  " };
            // Writing to a String cannot fail.
            let _ =
                if column < left { write!(line, "{gap}{cell:<width$}") } else { write!(line, "{gap}{cell:>width$}") };
        }
        let _ = writeln!(text, "{}", line.trim_end());
    }
    text
}

fn shares(shares: Shares) -> [String; 3] {
    [shares.busy, shares.input, shares.output].map(percent)
}

fn run(run: &RunFigures) -> String {
    let schedule = run.schedule.as_ref().map(|name| format!(" ({name})")).unwrap_or_default();
    let took = run.took.map(|took| format!(" in {}", time(took))).unwrap_or_default();
    let (job, vms) = (Shown(&run.job), count(run.vms.iter().filter(|vm| vm.is_machine()).count(), "VM"));
    let mut text = format!("{:.0}  {job}{}: {}, {vms}{took}", run.begun, Shown(&schedule), status_name(run.status));
    let _ = writeln!(text, ", {} read, {} stored", size(run.read()), size(run.stored()));
    if let Some(reason) = &run.reason {
        let _ = writeln!(text, "  {}", Shown(reason));
    }
    for vm in &run.vms {
        text.push_str(&machine(vm));
    }
    if !run.merges.is_empty() {
        let all = run.merges.iter().fold(Duration::ZERO, |all, merge| all.saturating_add(merge.took));
        let _ = writeln!(text, "  merges, {} in all", time(all));
        run.merges.iter().for_each(|one| text.push_str(&merge(one)));
    }
    text
}

fn machine(vm: &VmFigures) -> String {
    let status = vm.status.map_or("under way", vm_status_name);
    let tries = if vm.attempt > 1 { format!(", try {}", vm.attempt) } else { String::new() };
    let mut text = format!("  {}  {status}{tries}", Shown(&vm.name));
    if vm.status.is_some() {
        let _ = write!(text, ", {}", time(vm.took));
    }
    if vm.read > 0 || vm.stored > 0 {
        let _ = write!(text, ", {} read, {} stored", size(vm.read), size(vm.stored));
    }
    if vm.read > 0 {
        let took = vm.transfer.as_ref().map_or(vm.took, |transfer| transfer.took);
        let _ = write!(text, ", {}", speed(rate(vm.read, took)));
    }
    explain(&mut text, vm.reason.as_deref(), vm.next.as_deref());
    text.extend(vm.transfer.as_ref().map(|transfer| stages("    ", transfer)));
    text
}

fn merge(merge: &MergeFigures) -> String {
    let status = match merge.is_done {
        Some(true) => "merged",
        Some(false) => "merge pending",
        None => "under way",
    };
    let mut text = format!("    {}  {status}", Shown(&merge.repository));
    if merge.is_done.is_some() {
        let _ = write!(text, ", {}", time(merge.took));
    }
    if merge.forgotten > 0 || merge.merged > 0 {
        let _ =
            write!(text, ", {} forgotten, {} merged", number(merge.forgotten, "backup"), number(merge.merged, "disk"));
    }
    explain(&mut text, merge.reason.as_deref(), merge.next.as_deref());
    text.extend(merge.transfer.as_ref().map(|transfer| stages("      ", transfer)));
    text
}

/// Says why something is not good, and what happens next, at the end of a line.
fn explain(text: &mut String, reason: Option<&str>, next: Option<&str>) {
    let why: Vec<&str> = [reason, next].into_iter().flatten().filter(|part| !part.is_empty()).collect();
    let colon = if why.is_empty() { "" } else { ": " };
    let _ = writeln!(text, "{colon}{}", Shown(&why.join("; ")));
}

fn number(number: u64, what: &str) -> String {
    count(usize::try_from(number).unwrap_or(usize::MAX), what)
}

/// Writes the stages of a transfer, and what the others waited for.
fn stages(indent: &str, transfer: &Transfer) -> String {
    let mut text = String::new();
    let stages: Vec<_> =
        transfer.stages.iter().filter(|stage| is_told(stage.bytes, stage.times(transfer.took).shares())).collect();
    if !stages.is_empty() {
        let head = ["stage", "where", "busy", "input", "output", "throughput", "bytes"];
        let mut rows = vec![head.map(str::to_owned).to_vec()];
        for stage in stages {
            let [busy, input, output] = shares(stage.times(transfer.took).shares());
            let place = place(&stage.of, stage.pool.as_deref());
            let [throughput, bytes] = moved(stage.bytes, rate(stage.bytes, transfer.took));
            rows.push(vec![stage.name.clone(), place, busy, input, output, throughput, bytes]);
        }
        text.push_str(&table(indent, 2, &rows));
    }
    let limit = transfer.bottleneck.as_ref().map(Bottleneck::sentence).filter(|sentence| !sentence.is_empty());
    if let Some(sentence) = limit {
        let _ = writeln!(text, "{indent}{}", Shown(&sentence));
    }
    text
}

/// Whether a stage moved anything, or took any time to speak of; what did not is left out of tables.
fn is_told(bytes: u64, shares: Shares) -> bool {
    bytes > 0 || shares.busy.max(shares.input).max(shares.output) >= 10
}

/// Writes throughput and bytes; nothing of stages that move none.
fn moved(bytes: u64, rate: u64) -> [String; 2] {
    if bytes == 0 { [String::new(), String::new()] } else { [speed(rate), size(bytes)] }
}

/// Counts runs and machines by how they stand.
fn by_status<T: Copy>(counts: &[(T, u64)], name: fn(T) -> &'static str) -> String {
    let parts: Vec<String> = counts.iter().map(|(status, count)| format!("{count} {}", name(*status))).collect();
    if parts.is_empty() { String::new() } else { format!(" ({})", parts.join("; ")) }
}

fn sums(sums: &Sums, runs: usize) -> String {
    let vms = sums.vms.iter().map(|(_, count)| count).sum();
    let (runs, vms) = (count(runs, "run"), number(vms, "VM"));
    let (of_runs, of_vms) = (by_status(&sums.runs, status_name), by_status(&sums.vms, vm_status_name));
    let mut text = format!("{runs}{of_runs}, {vms}{of_vms}, {} read, {} stored\n", size(sums.read), size(sums.stored));
    text.push_str(&work(&sums.transfers, "transfer"));
    if !sums.repositories.is_empty() {
        let all = sums.repositories.iter().fold(Duration::ZERO, |all, merged| all.saturating_add(merged.took));
        let _ = writeln!(text, "\nmerges, {} in all", time(all));
        let row = |merged: &crate::job::figures::Merged| {
            let (forgotten, disks) = (number(merged.forgotten, "backup"), number(merged.merged, "disk"));
            vec![
                merged.repository.clone(),
                format!("{} done", merged.done),
                format!("{} pending", merged.pending),
                time(merged.took),
                format!("{forgotten} forgotten"),
                format!("{disks} merged"),
            ]
        };
        text.push_str(&table("  ", 1, &sums.repositories.iter().map(row).collect::<Vec<_>>()));
        text.push_str(&work(&sums.merges, "merge"));
    }
    if !sums.failures.is_empty() {
        text.push_str("\nfailures\n");
    }
    for failures in sums.failures.iter().take(REASONS) {
        let names: Vec<&str> = failures.of.iter().take(NAMES).map(String::as_str).collect();
        let more = failures.of.len().saturating_sub(NAMES);
        let more = if more > 0 { format!(" and {more} more") } else { String::new() };
        let merge = if failures.is_merge { "merge: " } else { "" };
        let (reason, of) = (Shown(&failures.reason), names.join(", "));
        let last = format!("{:.0}", failures.last);
        let _ = writeln!(text, "  {} x  {merge}{reason} ({}{more}; last {last})", failures.count, Shown(&of));
    }
    let more = sums.failures.len().saturating_sub(REASONS);
    if more > 0 {
        let _ = writeln!(text, "  and {more} other reasons: --json has them");
    }
    text
}

/// Writes the stages of several transfers, then those of each place.
fn work(work: &Work, what: &str) -> String {
    if work.by_stage.is_empty() {
        return String::new();
    }
    let head = |first: &str| {
        let head = [first, "stage", "transfers", "limited", "busy", "input", "output", "throughput", "bytes"];
        head.map(str::to_owned).to_vec()
    };
    let cells = |row: &Row, place: String| {
        let [busy, input, output] = shares(row.times.shares());
        let [throughput, bytes] = moved(row.bytes, row.rate());
        let counts = [row.transfers, row.limited].map(|count| count.to_string());
        let stage = row.stage.clone();
        [vec![place, stage], counts.to_vec(), vec![busy, input, output, throughput, bytes]].concat()
    };
    let is_told = |row: &&Row| is_told(row.bytes, row.times.shares());
    let mut by_stage = vec![head("")];
    by_stage.extend(work.by_stage.iter().filter(is_told).map(|row| cells(row, String::new())));
    // No place: no column for it.
    by_stage.iter_mut().for_each(|row| drop(row.remove(0)));
    let mut by_place = vec![head("where")];
    for row in work.by_place.iter().filter(is_told) {
        let of = row.of.as_ref().map(|(of, pool)| place(of, pool.as_deref())).unwrap_or_default();
        by_place.push(cells(row, of));
    }
    let (by_stage, by_place) = (table("  ", 1, &by_stage), table("  ", 2, &by_place));
    format!("\nstages of {}\n{by_stage}\n{by_place}", number(work.count, what))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_written_as_people_say_them() {
        for (millis, text) in [
            (0, "0.0 s"),
            (41_249, "41.2 s"),
            (59_949, "59.9 s"),
            (59_950, "1 m 0 s"),
            (3_599_500, "1 h 0 m"),
            (725_000, "12 m 5 s"),
            (12_000_000, "3 h 20 m"),
        ] {
            assert_eq!(time(Duration::from_millis(millis)), text);
        }
        assert_eq!([0, 4, 5, 994, 1000].map(percent), ["0 %", "0 %", "1 %", "99 %", "100 %"]);
    }
}
