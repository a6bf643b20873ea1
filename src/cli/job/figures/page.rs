//! Figures of runs as one page of HTML: nothing in it is fetched from elsewhere, and nothing in it is a program.
//!
//! Names are whatever somebody called a machine: each text goes through [`Escaped`], and the page forbids all else.

use std::fmt::{self, Write as _};
use std::time::Duration;

use jiff::tz::TimeZone;

use super::Selection;
use super::picture;
use super::text::{percent, place, speed, time};
use crate::cli::job::report::{status_name, vm_status_name};
use crate::cli::text::{Shown, count, size};
use crate::job::figures::{
    Bottleneck, MergeFigures, Merged, Row, RunFigures, Shares, Sums, Transfer, VmFigures, Work, rate, strips,
};
use crate::job::log::{RunStatus, VmStatus};

/// Runs of which stages and pictures are shown; of older ones only a line.
const PICTURES: usize = 200;
/// Reasons that are shown.
const REASONS: usize = 200;

const STYLE: &str = include_str!("page.css");

/// Text within HTML, between tags or quotes; control characters are shown as on a terminal.
pub struct Escaped<'a>(pub &'a str);

impl fmt::Display for Escaped<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for character in Shown(self.0).to_string().chars() {
            match character {
                '&' => f.write_str("&amp;")?,
                '<' => f.write_str("&lt;")?,
                '>' => f.write_str("&gt;")?,
                '"' => f.write_str("&quot;")?,
                '\'' => f.write_str("&#39;")?,
                other => f.write_char(other)?,
            }
        }
        Ok(())
    }
}

/// Writes the page.
pub fn to_html(selection: &Selection) -> String {
    let sums = Sums::of(&selection.runs);
    let zone = TimeZone::system();
    let at = |time: jiff::Timestamp| time.to_zoned(zone.clone()).strftime("%Y-%m-%d %H:%M %Z").to_string();
    let of = match selection.since {
        Some(since) => format!("{} since {}", count(selection.runs.len(), "run"), at(since)),
        None => format!("The last {}", count(selection.runs.len(), "run")),
    };
    let mut html = format!(
        "<!DOCTYPE html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
         <meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n<meta name=\"color-scheme\" content=\"light dark\">\n\
         <title>Backups: {0}</title>\n<style>\n{STYLE}</style>\n</head>\n<body>\n<header><h1>Backups</h1><p>{0}; \
         written {1}</p></header>\n<main>\n",
        Escaped(&of),
        Escaped(&at(selection.now)),
    );
    html.push_str(&tiles(&sums, selection));
    html.push_str(&runs(selection, &zone));
    html.push_str(&failures(&sums, &zone));
    html.push_str(&work(&sums.transfers, "Where transfers spent their time"));
    html.push_str(&merges(&sums));
    let first = selection.runs.len().saturating_sub(PICTURES);
    if !selection.runs.is_empty() {
        html.push_str("<h2>Each run</h2>\n<p class=\"legend\">Throughput over time, each strip as high as its peak; ");
        html.push_str("<i class=\"limits\"></i> what the others waited for, in one transfer at least</p>\n");
    }
    for (number, figures) in selection.runs.iter().enumerate().skip(first).rev() {
        html.push_str(&run(number, figures, &zone));
    }
    if first > 0 {
        // Writing to a String cannot fail.
        let _ = writeln!(html, "<p class=\"note\">{} are older, and only in the table above.</p>", count(first, "run"));
    }
    html.push_str("</main>\n</body>\n</html>\n");
    html
}

fn tiles(sums: &Sums, selection: &Selection) -> String {
    let of = |wanted: &[VmStatus]| -> u64 {
        sums.vms.iter().filter(|(status, _)| wanted.contains(status)).map(|(_, count)| count).sum()
    };
    let (all, left_out) = (of(&VmStatus::ALL), of(&[VmStatus::LeftOut]));
    let is_good = |run: &&RunFigures| matches!(run.status, RunStatus::Done | RunStatus::MergePending);
    let good = selection.runs.iter().filter(is_good).count();
    let merging = sums.repositories.iter().fold(Duration::ZERO, |all, merged| all.saturating_add(merged.took));
    let mut html = "<section class=\"tiles\">\n".to_owned();
    for (value, label) in [
        (format!("{good} of {}", selection.runs.len()), "runs done"),
        (format!("{} of {}", of(&[VmStatus::Done]), all - left_out), "machines backed up"),
        (size(sums.read), "read"),
        (size(sums.stored), "stored"),
        (time(merging), "merging"),
    ] {
        let _ = writeln!(html, "<div><b>{}</b><span>{label}</span></div>", Escaped(&value));
    }
    html.push_str("</section>\n");
    html
}

/// Returns the class of how a run stands.
fn class(status: RunStatus) -> &'static str {
    match status {
        RunStatus::Done | RunStatus::MergePending => "good",
        RunStatus::Running => "live",
        RunStatus::Partial | RunStatus::Interrupted => "odd",
        RunStatus::Failed => "bad",
    }
}

fn vm_class(status: Option<VmStatus>) -> &'static str {
    match status {
        Some(VmStatus::Done | VmStatus::LeftOut) => "good",
        Some(VmStatus::Partial | VmStatus::Interrupted) => "odd",
        Some(VmStatus::Failed) => "bad",
        None => "live",
    }
}

fn badge(class: &str, text: &str) -> String {
    format!("<span class=\"badge {class}\">{}</span>", Escaped(text))
}

/// A table: its head, in which names that begin with `#` are of numbers, and rows of cells that are HTML already.
fn table(head: &[&str], rows: &[Vec<String>]) -> String {
    let class = |column: usize| {
        if head.get(column).is_some_and(|name| name.starts_with('#')) { " class=\"number\"" } else { "" }
    };
    let mut html = "<div class=\"wide\"><table><thead><tr>".to_owned();
    for (column, name) in head.iter().enumerate() {
        let _ = write!(html, "<th{}>{}</th>", class(column), Escaped(name.trim_start_matches('#')));
    }
    html.push_str("</tr></thead><tbody>\n");
    for row in rows {
        html.push_str("<tr>");
        for (column, cell) in row.iter().enumerate() {
            let _ = write!(html, "<td{}>{cell}</td>", class(column));
        }
        html.push_str("</tr>\n");
    }
    html.push_str("</tbody></table></div>\n");
    html
}

fn runs(selection: &Selection, zone: &TimeZone) -> String {
    if selection.runs.is_empty() {
        return "<p class=\"note\">There are no runs.</p>\n".to_owned();
    }
    let head = ["began", "job", "status", "#machines", "#read", "#stored", "#took", "#merges", "limited by"];
    let first = selection.runs.len().saturating_sub(PICTURES);
    let row = |(number, run): (usize, &RunFigures)| {
        let began = run.begun.to_zoned(zone.clone()).strftime("%Y-%m-%d %H:%M:%S").to_string();
        let began = Escaped(&began).to_string();
        let merging = run.merges.iter().fold(Duration::ZERO, |all, merge| all.saturating_add(merge.took));
        vec![
            if number < first { began } else { format!("<a class=\"when\" href=\"#run-{number}\">{began}</a>") },
            Escaped(&title(run)).to_string(),
            badge(class(run.status), status_name(run.status)),
            run.vms.len().to_string(),
            Escaped(&size(run.read())).to_string(),
            Escaped(&size(run.stored())).to_string(),
            run.took.map(time).unwrap_or_default(),
            if run.merges.is_empty() { String::new() } else { time(merging) },
            limits(run),
        ]
    };
    format!("<h2>Runs</h2>\n{}", table(&head, &selection.runs.iter().enumerate().rev().map(row).collect::<Vec<_>>()))
}

fn title(run: &RunFigures) -> String {
    let schedule = run.schedule.as_ref().map(|name| format!(" ({name})")).unwrap_or_default();
    format!("{}{schedule}", run.job)
}

/// Names what limited most of the transfers of a run, and how many.
fn limits(run: &RunFigures) -> String {
    let mut found: Vec<(String, usize)> = Vec::new();
    let transfers: Vec<&Transfer> = run.vms.iter().filter_map(|vm| vm.transfer.as_ref()).collect();
    let bottlenecks = transfers.iter().filter_map(|transfer| transfer.bottleneck.as_ref());
    for (stage, of) in bottlenecks.filter_map(|one| one.stage.as_ref().zip(one.of.as_ref())) {
        let name = format!("{stage}, {of}");
        match found.iter_mut().find(|(known, _)| *known == name) {
            Some((_, count)) => *count += 1,
            None => found.push((name, 1)),
        }
    }
    found.sort_by_key(|(_, count)| std::cmp::Reverse(*count));
    let of =
        |count: usize| if transfers.len() > 1 { format!(" ({count} of {})", transfers.len()) } else { String::new() };
    found.first().map(|(name, count)| format!("{}{}", Escaped(name), of(*count))).unwrap_or_default()
}

fn failures(sums: &Sums, zone: &TimeZone) -> String {
    if sums.failures.is_empty() {
        return String::new();
    }
    let row = |failures: &crate::job::figures::Failures| {
        let names: Vec<&str> = failures.of.iter().take(10).map(String::as_str).collect();
        let more = failures.of.len().saturating_sub(10);
        let more = if more > 0 { format!(" and {more} more") } else { String::new() };
        let last = failures.last.to_zoned(zone.clone()).strftime("%Y-%m-%d %H:%M").to_string();
        vec![
            failures.count.to_string(),
            if failures.is_merge { "merge" } else { "backup" }.to_owned(),
            Escaped(&failures.reason).to_string(),
            format!("{}{more}", Escaped(&names.join(", "))),
            Escaped(&last).to_string(),
        ]
    };
    let rows: Vec<_> = sums.failures.iter().take(REASONS).map(row).collect();
    let more = sums.failures.len().saturating_sub(REASONS);
    let more = if more > 0 { format!("<p class=\"note\">And {more} other reasons.</p>\n") } else { String::new() };
    format!("<h2>Failures</h2>\n{}{more}", table(&["#times", "of", "reason", "what", "last"], &rows))
}

/// Writes a bar of how the time was spent, and the numbers.
fn bar(shares: Shares) -> String {
    let mut html = "<span class=\"bar\">".to_owned();
    for (class, part) in [("busy", shares.busy), ("input", shares.input), ("output", shares.output)] {
        let _ = write!(html, "<i class=\"{class}\" style=\"width:{}.{}%\"></i>", part / 10, part % 10);
    }
    html.push_str("</span>");
    html
}

fn times(shares: Shares) -> Vec<String> {
    let [busy, input, output] = [shares.busy, shares.input, shares.output].map(percent);
    vec![bar(shares), busy, input, output]
}

fn moved(bytes: u64, rate: u64) -> Vec<String> {
    if bytes == 0 { vec![String::new(); 2] } else { vec![speed(rate), size(bytes)] }
}

fn work(work: &Work, title: &str) -> String {
    if work.by_stage.is_empty() {
        return String::new();
    }
    let cells = |row: &Row, first: Vec<String>| {
        let counts = [row.transfers, row.limited].map(|count| count.to_string()).to_vec();
        [first, counts, times(row.times.shares()), moved(row.bytes, row.rate())].concat()
    };
    let numbers = ["#transfers", "#limited", "time", "#busy", "#input", "#output", "#throughput", "#bytes"];
    let stage = |row: &Row| Escaped(&row.stage).to_string();
    let by_stage: Vec<_> = work.by_stage.iter().map(|row| cells(row, vec![stage(row)])).collect();
    let of = |row: &Row| row.of.as_ref().map(|(of, pool)| place(of, pool.as_deref())).unwrap_or_default();
    let by_place: Vec<_> =
        work.by_place.iter().map(|row| cells(row, vec![Escaped(&of(row)).to_string(), stage(row)])).collect();
    format!(
        "<h2>{title}</h2>\n{LEGEND}<h3>By stage</h3>\n{}<h3>By host, SR, network and repository</h3>\n{}",
        table(&[&["stage"], &numbers[..]].concat(), &by_stage),
        table(&[&["where", "stage"], &numbers[..]].concat(), &by_place)
    )
}

const LEGEND: &str = "<p class=\"legend\"><i class=\"busy\"></i> at work <i class=\"input\"></i> waiting for what is before it \
                      <i class=\"output\"></i> waiting for what is behind it</p>\n";

fn merges(sums: &Sums) -> String {
    if sums.repositories.is_empty() {
        return String::new();
    }
    let row = |merged: &Merged| {
        let counts = [merged.done, merged.pending, merged.forgotten, merged.merged].map(|count| count.to_string());
        [vec![Escaped(&merged.repository).to_string()], counts.to_vec(), vec![time(merged.took)]].concat()
    };
    let rows: Vec<_> = sums.repositories.iter().map(row).collect();
    let head = ["repository", "#done", "#pending", "#backups forgotten", "#disks merged", "#took"];
    format!("<h2>Merges</h2>\n{}{}", table(&head, &rows), work(&sums.merges, "Where merges spent their time"))
}

fn run(number: usize, run: &RunFigures, zone: &TimeZone) -> String {
    let began = run.begun.to_zoned(zone.clone()).strftime("%Y-%m-%d %H:%M:%S").to_string();
    let took = run.took.map(|took| format!(", {}", time(took))).unwrap_or_default();
    let mut html = format!(
        "<section class=\"run\" id=\"run-{number}\">\n<h3>{} <small>{}{took}</small> {}</h3>\n",
        Escaped(&title(run)),
        Escaped(&began),
        badge(class(run.status), status_name(run.status))
    );
    if let Some(reason) = &run.reason {
        let _ = writeln!(html, "<p>{}</p>", Escaped(reason));
    }
    html.push_str(&picture_of(run));
    run.vms.iter().for_each(|vm| html.push_str(&machine(vm)));
    if !run.merges.is_empty() {
        html.push_str("<h4>Merges</h4>\n");
        run.merges.iter().for_each(|one| html.push_str(&merge(one)));
    }
    html.push_str("</section>\n");
    html
}

/// Draws all transfers of a run on one line of time.
fn picture_of(run: &RunFigures) -> String {
    let begun = |vm: &VmFigures, transfer: &Transfer| vm.ended.saturating_sub(transfer.took);
    let transfers: Vec<(Duration, &Transfer)> =
        run.vms.iter().filter_map(|vm| vm.transfer.as_ref().map(|transfer| (begun(vm, transfer), transfer))).collect();
    let length = run.vms.iter().filter(|vm| vm.transfer.is_some()).map(|vm| vm.ended).max().unwrap_or_default();
    picture::draw(&strips(&transfers, length, picture::PARTS), length)
}

fn machine(vm: &VmFigures) -> String {
    let status = vm.status.map_or("under way", vm_status_name);
    let tries = if vm.attempt > 1 { format!(", try {}", vm.attempt) } else { String::new() };
    let mut figures = Vec::new();
    if vm.status.is_some() {
        figures.push(time(vm.took));
    }
    if vm.read > 0 || vm.stored > 0 {
        figures.extend([format!("{} read", size(vm.read)), format!("{} stored", size(vm.stored))]);
    }
    if vm.read > 0 {
        figures.push(speed(rate(vm.read, vm.transfer.as_ref().map_or(vm.took, |transfer| transfer.took))));
    }
    let summary = format!(
        "<b>{}</b> {} {}{}",
        Escaped(&vm.name),
        badge(vm_class(vm.status), &format!("{status}{tries}")),
        Escaped(&figures.join(", ")),
        why(vm.reason.as_deref(), vm.next.as_deref())
    );
    details(&summary, vm.transfer.as_ref())
}

fn merge(merge: &MergeFigures) -> String {
    let (class, status) = match merge.is_done {
        Some(true) => ("good", "merged"),
        Some(false) => ("odd", "merge pending"),
        None => ("live", "under way"),
    };
    let summary = format!(
        "<b>{}</b> {} {}, {} forgotten, {} merged{}",
        Escaped(&merge.repository),
        badge(class, status),
        time(merge.took),
        count(usize::try_from(merge.forgotten).unwrap_or(usize::MAX), "backup"),
        count(usize::try_from(merge.merged).unwrap_or(usize::MAX), "disk"),
        why(merge.reason.as_deref(), merge.next.as_deref())
    );
    details(&summary, merge.transfer.as_ref())
}

/// Says why something is not good, and what happens next.
fn why(reason: Option<&str>, next: Option<&str>) -> String {
    let why: Vec<&str> = [reason, next].into_iter().flatten().filter(|part| !part.is_empty()).collect();
    if why.is_empty() { String::new() } else { format!("<br><span class=\"why\">{}</span>", Escaped(&why.join("; "))) }
}

/// A line, and what is seen once it is opened.
fn details(summary: &str, transfer: Option<&Transfer>) -> String {
    let Some(transfer) = transfer.filter(|transfer| !transfer.stages.is_empty()) else {
        return format!("<p class=\"line\">{summary}</p>\n");
    };
    let limit = transfer.bottleneck.as_ref().map(Bottleneck::sentence).filter(|sentence| !sentence.is_empty());
    let limit = limit.map(|sentence| format!("<br><span class=\"limit\">{}</span>", Escaped(&sentence)));
    let slowest = transfer.slowest();
    let row = |(number, stage): (usize, &crate::job::figures::Stage)| {
        let mark = if slowest == Some(number) { " <span class=\"badge slow\">limits</span>" } else { "" };
        let first = vec![
            format!("{}{mark}", Escaped(&stage.name)),
            Escaped(&place(&stage.of, stage.pool.as_deref())).to_string(),
        ];
        [first, times(stage.times(transfer.took).shares()), moved(stage.bytes, rate(stage.bytes, transfer.took))]
            .concat()
    };
    let rows: Vec<_> = transfer.stages.iter().enumerate().map(row).collect();
    let head = ["stage", "where", "time", "#busy", "#input", "#output", "#throughput", "#bytes"];
    let strips = strips(&[(Duration::ZERO, transfer)], transfer.took, picture::PARTS);
    let picture = picture::draw(&strips, transfer.took);
    let limit = limit.unwrap_or_default();
    format!("<details><summary>{summary}{limit}</summary>\n{picture}{}</details>\n", table(&head, &rows))
}
