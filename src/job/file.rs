//! A job as a person wrote it: a file of TOML whose name is the job's.
//!
//! ```toml
//! description = "web servers"
//! pools = ["lab"]                         # names of the configuration
//! mode = "incremental"                    # or "full": an XVA
//!
//! [vms]
//! tags = ["nightly"]                      # names, uuids, tags, all
//! exclude = ["web03"]
//!
//! [to]
//! repositories = ["main", "offsite"]
//!
//! [[schedules]]
//! name = "nightly"
//! cron = "0 2 * * *"
//! timezone = "Europe/Paris"
//! keep = { last = 7, weekly = 4 }
//! ```
//!
//! What is wrong is refused with its line; what nobody knows is refused, too. No secret is ever in such a file: pools and
//! repositories are named as in the configuration, which knows where their passwords are.

use std::collections::BTreeSet;
use std::ops::Range;
use std::path::Path;
use std::time::Duration;

use jiff::tz::TimeZone;
use vhd::Filter;

use super::schedule::Calendar;
use super::table::{Document, Faults, Placed, Section, nearest};
use crate::ingest::Layout;

/// Machines that are backed up at once; more would only wait for each other.
const MOST_AT_ONCE: u32 = 64;

/// What can be named in a job, as the configuration has it.
#[derive(Debug, Clone, Default)]
pub struct Known {
    /// Pools.
    pub pools: BTreeSet<String>,
    /// Repositories.
    pub repositories: BTreeSet<String>,
}

/// A job.
#[derive(Debug, Clone, PartialEq)]
pub struct Job {
    /// What repositories and snapshots call it: the name of its file, unless it says otherwise.
    pub id: String,
    /// What people call it.
    pub description: Option<String>,
    /// Pools, by their names in the configuration; at least one.
    pub pools: Vec<String>,
    /// Machines.
    pub vms: Which,
    /// What is made of each.
    pub kind: Kind,
    /// Repositories, by name or path; at least one.
    pub repositories: Vec<String>,
    /// When; never by itself, if there is none.
    pub schedules: Vec<Timed>,
    /// What it may use.
    pub limits: Limits,
    /// How long things may take.
    pub timeouts: Timeouts,
    /// What is tried again.
    pub retries: Retries,
    /// Who is told.
    pub report: Option<Reporting>,
}

/// Which machines are backed up: those that are named, or have a tag, or all; less those that are excluded.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Which {
    /// All of the pools.
    pub all: bool,
    /// By name.
    pub names: Vec<String>,
    /// By uuid, in lower case.
    pub uuids: Vec<String>,
    /// By tag.
    pub tags: Vec<String>,
    /// Only in these states, as XAPI calls them; in all, if there is none.
    pub power_states: Vec<PowerState>,
    /// Not these, by name or uuid.
    pub exclude: Vec<String>,
    /// Not those with these tags.
    pub exclude_tags: Vec<String>,
}

/// The state of a machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PowerState {
    /// It runs.
    Running,
    /// It is shut down.
    Halted,
    /// It is stopped, and in memory.
    Paused,
    /// It is stopped, and its memory is on a disk.
    Suspended,
}

impl PowerState {
    /// Returns what XAPI calls it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Running => "Running",
            Self::Halted => "Halted",
            Self::Paused => "Paused",
            Self::Suspended => "Suspended",
        }
    }
}

/// What is made of a machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Kind {
    /// Its disks, as chains.
    Incremental(Incremental),
    /// One XVA.
    Full(Full),
}

/// How increments are made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Incremental {
    /// So many backups, from one key to the next; `None` for no end.
    pub key_every: Option<u32>,
    /// How disks are stored, where it is said.
    pub layout: Option<Layout>,
    /// Whether NBD may be used.
    pub uses_nbd: bool,
    /// Whether changed block tracking is switched on.
    pub tracks_changes: bool,
    /// Whether the data of a kept snapshot is destroyed.
    pub purges_data: bool,
    /// Whether a snapshot is kept for the next increment.
    pub keeps_base: bool,
}

/// How XVAs are made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Full {
    /// How the pool compresses them.
    pub compression: xapi::Compression,
}

/// When it runs, and what is kept of these runs.
#[derive(Debug, Clone, PartialEq)]
pub struct Timed {
    /// What repositories call it.
    pub name: String,
    /// When.
    pub calendar: Calendar,
    /// The time zone as it was written, if it was.
    pub timezone: Option<String>,
    /// Whether what was missed is made up for, once.
    pub makes_up: bool,
    /// Whether all blocks are stored each time.
    pub is_full: bool,
    /// What is kept of its backups; all, if nothing is said.
    pub keep: Option<Keep>,
}

/// What is kept of the backups of a schedule; at least one rule keeps something.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Keep {
    /// The most recent ones.
    pub last: Option<u32>,
    /// Of days.
    pub daily: Option<u32>,
    /// Of weeks.
    pub weekly: Option<u32>,
    /// Of months.
    pub monthly: Option<u32>,
    /// Of years.
    pub yearly: Option<u32>,
    /// Those with one of these tags.
    pub tags: Vec<String>,
}

/// What a job may use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Machines at once, of this run.
    pub vms: u32,
}

/// How long things may take.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Timeouts {
    /// The whole run, but for the merges after it.
    pub job: Option<Duration>,
    /// Each machine, each time that it is tried.
    pub vm: Option<Duration>,
    /// How long another program is waited for that works on the same machine.
    pub lock: Duration,
    /// How long chains are waited for that the host has to coalesce; `None` not to look at them.
    pub chain: Option<Duration>,
}

/// What is tried again, and when.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Retries {
    /// How often a machine that failed is tried again, after all others.
    pub vm: u32,
    /// How long is waited before.
    pub pause: Duration,
}

/// Who is told how a run ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reporting {
    /// A program and its arguments, which reads the report.
    pub command: Vec<String>,
    /// Whether it gets JSON, else a mail.
    pub is_json: bool,
    /// To whom a mail goes.
    pub to: Option<String>,
    /// Whether also good runs are told.
    pub always: bool,
}

impl Job {
    /// Reads a job. `path` is its file, whose name is the job's unless it says otherwise.
    ///
    /// # Errors
    /// All that is wrong, by line.
    pub fn parse(text: &str, path: &Path, known: &Known) -> Result<Self, Faults> {
        let document = Document::new(text);
        let table = document.parse();
        let job = table.as_ref().and_then(|table| {
            let root = Section::root(&document, table);
            let job = of_root(&root, path, known);
            root.finish();
            job
        });
        document.finish(job, path)
    }
}

/// Whether a text can name a job or a schedule.
#[must_use]
pub fn is_id(text: &str) -> bool {
    let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_';
    (1..=64).contains(&text.len()) && text.bytes().all(is_plain)
}

fn of_root(root: &Section, path: &Path, known: &Known) -> Option<Job> {
    let id = id(root, path);
    let description = root.text("description").map(|text| text.value);
    let pools = pools(root, known);
    let vms = root.section("vms").map(which);
    if vms.is_none() {
        root.note("[vms] is missing: it says which machines are backed up, by names, uuids, tags, or all = true");
    }
    let repositories = root.section("to").map(|to| repositories(to, known));
    if repositories.is_none() {
        root.note("[to] is missing: it says where backups are stored, like repositories = [\"main\"]");
    }
    let kind = kind(root);
    let is_incremental = matches!(kind, Kind::Incremental(_));
    let schedules = schedules(root, is_incremental);
    let limits = limits(root.section("limits"));
    let timeouts = timeouts(root.section("timeouts"));
    let retries = retries(root.section("retries"));
    let report = root.section("report").and_then(report);
    let (vms, repositories) = (vms?, repositories?);
    Some(Job { id: id?, description, pools, vms, kind, repositories, schedules, limits, timeouts, retries, report })
}

fn id(root: &Section, path: &Path) -> Option<String> {
    let wrong = "expected up to 64 letters, digits, - and _";
    let said = root.text("id");
    if let Some(said) = said {
        if !is_id(&said.value) {
            root.note_at(&said.span, format!("'{}' is no id of a job: {wrong}", said.value.escape_debug()));
        }
        return Some(said.value);
    }
    let name = path.file_stem().and_then(|stem| stem.to_str()).unwrap_or_default();
    if !is_id(name) {
        let shown = name.escape_debug();
        root.note(format!("the file's name, '{shown}', is no name of a job: {wrong}; or give it an id = \"...\""));
        return None;
    }
    Some(name.to_owned())
}

fn pools(root: &Section, known: &Known) -> Vec<String> {
    let pools = root.texts("pools");
    if pools.is_empty() {
        root.note(
            "pools is missing: it names the pools of the machines, like pools = [\"lab\"], as the configuration does",
        );
    }
    for pool in pools.iter().filter(|pool| !known.pools.contains(&pool.value)) {
        let message = unknown(&pool.value, "pool", &known.pools);
        root.note_at(&pool.span, format!("{message}; it needs an entry [pools.NAME] there"));
    }
    values(pools)
}

fn unknown(name: &str, what: &str, known: &BTreeSet<String>) -> String {
    let shown = name.escape_debug();
    let there: Vec<&str> = known.iter().map(String::as_str).collect();
    match nearest(name, known.iter().map(String::as_str)) {
        Some(near) => format!("'{shown}' is no {what} of the configuration; did you mean '{near}'?"),
        None if there.is_empty() => format!("'{shown}' is no {what} of the configuration, which has none"),
        None => format!("'{shown}' is no {what} of the configuration, which has {}", there.join(", ")),
    }
}

fn values(texts: Vec<Placed<String>>) -> Vec<String> {
    texts.into_iter().map(|text| text.value).collect()
}

fn which(vms: Section) -> Which {
    const STATES: [(&str, PowerState); 4] = [
        ("running", PowerState::Running),
        ("halted", PowerState::Halted),
        ("paused", PowerState::Paused),
        ("suspended", PowerState::Suspended),
    ];
    let all = vms.flag("all").unwrap_or(false);
    let names = vms.texts("names");
    let uuids = vms.texts("uuids");
    for text in &uuids {
        if uuid::Uuid::try_parse(&text.value).is_err() {
            vms.note_at(&text.span, format!("'{}' is no uuid", text.value.escape_debug()));
        }
    }
    let tags = vms.texts("tags");
    let mut power_states = Vec::new();
    for text in vms.texts("power_states") {
        match STATES.iter().find(|(word, _)| *word == text.value) {
            Some((_, state)) => power_states.push(*state),
            None => {
                let words = STATES.map(|(word, _)| word).join(", ");
                vms.note_at(&text.span, format!("'{}' is no state; there are {words}", text.value.escape_debug()));
            }
        }
    }
    let chosen = names.len() + uuids.len() + tags.len();
    match (all, chosen) {
        (false, 0) => vms.note("[vms] names no machine: give names, uuids, tags, or all = true"),
        (true, 1..) => vms.note("[vms] says all = true, and names some: leave the one or the other out"),
        _ => {}
    }
    let (exclude, exclude_tags) = (values(vms.texts("exclude")), values(vms.texts("exclude_tags")));
    let uuids = values(uuids).into_iter().map(|uuid| uuid.to_ascii_lowercase()).collect();
    let which = Which { all, names: values(names), uuids, tags: values(tags), power_states, exclude, exclude_tags };
    vms.finish();
    which
}

fn repositories(to: Section, known: &Known) -> Vec<String> {
    let repositories = to.texts("repositories");
    if repositories.is_empty() {
        to.note("[to] names no repository: give repositories = [\"NAME\"]");
    }
    let is_path = |text: &str| text.starts_with('/') || text.starts_with("file:///");
    for repository in
        repositories.iter().filter(|text| !is_path(&text.value) && !known.repositories.contains(&text.value))
    {
        let message = unknown(&repository.value, "repository", &known.repositories);
        to.note_at(&repository.span, format!("{message}; a path begins with /"));
    }
    to.finish();
    values(repositories)
}

fn kind(root: &Section) -> Kind {
    let is_full = root.choice("mode", &[("incremental", false), ("full", true)]).is_some_and(|mode| mode.value);
    let incremental = root.section("incremental");
    let full = root.section("full");
    for (section, other) in
        [(incremental.as_ref().filter(|_| is_full), "full"), (full.as_ref().filter(|_| !is_full), "incremental")]
    {
        if let Some(section) = section {
            section.note(format!("the job has mode = \"{other}\", to which this does not apply"));
        }
    }
    let incremental = incremental.map_or_else(Incremental::default, of_incremental);
    let full = full.map_or_else(Full::default, of_full);
    if is_full { Kind::Full(full) } else { Kind::Incremental(incremental) }
}

impl Default for Incremental {
    fn default() -> Self {
        Self {
            key_every: None,
            layout: None,
            uses_nbd: true,
            tracks_changes: false,
            purges_data: false,
            keeps_base: true,
        }
    }
}

impl Default for Full {
    fn default() -> Self {
        Self { compression: xapi::Compression::Zstd }
    }
}

fn of_incremental(section: Section) -> Incremental {
    let usual = Incremental::default();
    let is_file = section.choice("format", &[("exploded", false), ("vhd", true)]).map(|format| format.value);
    let compressions = [("none", Filter::None), ("gzip", Filter::Gzip), ("brotli", Filter::Brotli)];
    let compression = section.choice("compression", &compressions);
    let layout = match (is_file, compression) {
        (Some(true), Some(Placed { value: Filter::Gzip | Filter::Brotli, span })) => {
            section.note_at(&span, "a VHD file is not compressed: leave compression out, or use format = \"exploded\"");
            None
        }
        (Some(true), _) => Some(Layout::File),
        (Some(false), compression) => Some(Layout::Exploded(compression.map(|found| found.value))),
        (None, compression) => compression.map(|found| Layout::Exploded(Some(found.value))),
    };
    let incremental = Incremental {
        key_every: section.number("key_every", 1..=10_000),
        layout,
        uses_nbd: section.flag("nbd").unwrap_or(usual.uses_nbd),
        tracks_changes: section.flag("cbt").unwrap_or(usual.tracks_changes),
        purges_data: section.flag("purge_snapshot_data").unwrap_or(usual.purges_data),
        keeps_base: section.flag("keep_snapshot").unwrap_or(usual.keeps_base),
    };
    if incremental.purges_data && !(incremental.tracks_changes && incremental.keeps_base) {
        section.note("purge_snapshot_data needs cbt = true, and a snapshot that is kept");
    }
    section.finish();
    incremental
}

fn of_full(section: Section) -> Full {
    let choices =
        [("none", xapi::Compression::None), ("gzip", xapi::Compression::Gzip), ("zstd", xapi::Compression::Zstd)];
    let compression = section.choice("compression", &choices).map(|found| found.value);
    section.finish();
    Full { compression: compression.unwrap_or(Full::default().compression) }
}

fn schedules(root: &Section, is_incremental: bool) -> Vec<Timed> {
    let mut names = BTreeSet::new();
    let sections = root.sections("schedules");
    let timed = |section: Section| {
        let timed = schedule(&section, is_incremental, &mut names);
        section.finish();
        timed
    };
    sections.into_iter().filter_map(timed).collect()
}

fn schedule(section: &Section, is_incremental: bool, names: &mut BTreeSet<String>) -> Option<Timed> {
    let name = section.text("name");
    match &name {
        None => section.note("name is missing: repositories remember it with each backup of this schedule"),
        Some(name) if !is_id(&name.value) => {
            let shown = name.value.escape_debug();
            section.note_at(
                &name.span,
                format!("'{shown}' is no name of a schedule: expected up to 64 letters, digits, - and _"),
            );
        }
        Some(name) if !names.insert(name.value.clone()) => {
            section.note_at(&name.span, format!("there are two schedules called '{}'", name.value));
        }
        Some(_) => {}
    }
    let timezone = section.text("timezone");
    let zone = match &timezone {
        None => Some(TimeZone::system()),
        Some(zone) => {
            let found = TimeZone::get(&zone.value).ok();
            if found.is_none() {
                let shown = zone.value.escape_debug();
                section
                    .note_at(&zone.span, format!("'{shown}' is no time zone; expected one like Europe/Paris, or UTC"));
            }
            found
        }
    };
    let cron = section.text("cron");
    if cron.is_none() {
        section.note("cron is missing: it says when, like cron = \"0 2 * * *\" for two o'clock each night");
    }
    let calendar = cron.zip(zone).and_then(|(cron, zone)| {
        let calendar = Calendar::new(&cron.value, zone);
        let expected = "expected minute, hour, day of month, month, day of week, like \"0 2 * * mon-fri\"";
        let wrong = |why| {
            let shown = cron.value.escape_debug();
            section.note_at(&cron.span, format!("'{shown}' is no pattern of cron: {why}; {expected}"));
        };
        calendar.map_err(wrong).ok()
    });
    let makes_up = section.choice("missed", &[("run", true), ("skip", false)]).is_none_or(|found| found.value);
    let is_full = section.flag("full").unwrap_or(false);
    if is_full && !is_incremental {
        section.note("full = true is for mode = \"incremental\": a full backup is always one");
    }
    let keep = section.section("keep").map(keep);
    Some(Timed {
        name: name?.value,
        calendar: calendar?,
        timezone: timezone.map(|zone| zone.value),
        makes_up,
        is_full,
        keep,
    })
}

fn keep(section: Section) -> Keep {
    let number = |key| section.number(key, 0..=1_000_000);
    let keep = Keep {
        last: number("last"),
        daily: number("daily"),
        weekly: number("weekly"),
        monthly: number("monthly"),
        yearly: number("yearly"),
        tags: values(section.texts("tags")),
    };
    let rules = [keep.last, keep.daily, keep.weekly, keep.monthly, keep.yearly];
    if rules.iter().all(|rule| rule.unwrap_or(0) == 0) {
        section.note(
            "keep keeps nothing: give last, daily, weekly, monthly or yearly; or leave keep out, to keep everything",
        );
    }
    section.finish();
    keep
}

fn limits(section: Option<Section>) -> Limits {
    let usual = Limits { vms: 2 };
    let Some(section) = section else { return usual };
    let limits = Limits { vms: section.number("vms", 1..=MOST_AT_ONCE).unwrap_or(usual.vms) };
    section.finish();
    limits
}

fn timeouts(section: Option<Section>) -> Timeouts {
    let usual = Timeouts { job: None, vm: None, lock: Duration::from_secs(60), chain: Some(Duration::from_secs(600)) };
    let Some(section) = section else { return usual };
    let checks_chain = section.flag("check_chain").unwrap_or(true);
    let chain = section.duration("chain").or(usual.chain);
    let timeouts = Timeouts {
        job: positive(&section, "job"),
        vm: positive(&section, "vm"),
        lock: section.duration("lock").unwrap_or(usual.lock),
        chain: chain.filter(|_| checks_chain),
    };
    section.finish();
    timeouts
}

fn positive(section: &Section, key: &'static str) -> Option<Duration> {
    let duration = section.duration(key)?;
    if duration.is_zero() {
        section.note(format!("{key} is no time at all; leave it out for no limit"));
    }
    Some(duration)
}

fn retries(section: Option<Section>) -> Retries {
    let usual = Retries { vm: 1, pause: Duration::from_secs(60) };
    let Some(section) = section else { return usual };
    let retries = Retries {
        vm: section.number("vm", 0..=100).unwrap_or(usual.vm),
        pause: section.duration("pause").unwrap_or(usual.pause),
    };
    section.finish();
    retries
}

fn report(section: Section) -> Option<Reporting> {
    let command = values(section.texts("command"));
    if command.is_empty() {
        section.note("command is missing: a program and its arguments, like [\"/usr/sbin/sendmail\", \"-t\"]");
    }
    let format = section.choice("format", &[("mail", false), ("json", true)]);
    let is_json = format.is_some_and(|format| format.value);
    let to: Option<Placed<String>> = section.text("to");
    match &to {
        None if !is_json => section.note("to is missing: the address that a mail goes to; or say format = \"json\""),
        Some(to) if to.value.contains(['\r', '\n']) => no_line(&section, &to.span),
        _ => {}
    }
    let always = section.choice("when", &[("failure", false), ("always", true)]).is_some_and(|when| when.value);
    section.finish();
    (!command.is_empty()).then(|| Reporting { command, is_json, to: to.map(|to| to.value), always })
}

fn no_line(section: &Section, span: &Range<usize>) {
    section.note_at(span, "an address is one line");
}

#[cfg(test)]
mod tests {
    use super::*;

    const WHOLE: &str = r#"
description = "web servers"
pools = ["lab"]

[vms]
names = ["web01"]
uuids = ["1F2E3D4C-5B6A-4798-8A9B-0C1D2E3F4A5B"]
tags = ["nightly"]
power_states = ["running", "halted"]
exclude = ["web03"]
exclude_tags = ["test"]

[to]
repositories = ["main", "/srv/other"]

[incremental]
key_every = 30
compression = "gzip"
nbd = false
cbt = true

[[schedules]]
name = "nightly"
cron = "0 2 * * *"
timezone = "Europe/Paris"
keep = { last = 7, weekly = 4, tags = ["keep"] }

[[schedules]]
name = "monthly"
cron = "0 4 1 * *"
timezone = "UTC"
missed = "skip"
full = true

[limits]
vms = 4

[timeouts]
vm = "6h"
job = "1h 30m"
check_chain = false

[retries]
vm = 2
pause = "5s"

[report]
command = ["/usr/sbin/sendmail", "-t"]
to = "backup@example.org"
"#;

    fn known() -> Known {
        let names = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect();
        Known { pools: names(&["lab", "production"]), repositories: names(&["main", "offsite"]) }
    }

    fn parse(text: &str) -> Result<Job, String> {
        Job::parse(text, Path::new("/jobs/web.toml"), &known()).map_err(|faults| faults.to_string())
    }

    #[test]
    fn all_that_a_job_says_is_read() {
        let job = parse(WHOLE).expect("right");
        assert_eq!((job.id.as_str(), job.description.as_deref()), ("web", Some("web servers")));
        assert_eq!(job.pools, ["lab"]);
        let texts = |texts: &[&str]| texts.iter().map(|text| (*text).to_owned()).collect::<Vec<String>>();
        let vms = Which {
            all: false,
            names: texts(&["web01"]),
            uuids: texts(&["1f2e3d4c-5b6a-4798-8a9b-0c1d2e3f4a5b"]),
            tags: texts(&["nightly"]),
            power_states: vec![PowerState::Running, PowerState::Halted],
            exclude: texts(&["web03"]),
            exclude_tags: texts(&["test"]),
        };
        assert_eq!(job.vms, vms);
        assert_eq!(job.repositories, ["main", "/srv/other"]);
        let incremental = Incremental {
            key_every: Some(30),
            layout: Some(Layout::Exploded(Some(Filter::Gzip))),
            uses_nbd: false,
            tracks_changes: true,
            ..Incremental::default()
        };
        assert_eq!(job.kind, Kind::Incremental(incremental));
        let [nightly, monthly] = job.schedules.as_slice() else { panic!("{:?}", job.schedules) };
        let keep = Keep { last: Some(7), weekly: Some(4), tags: texts(&["keep"]), ..Keep::default() };
        assert_eq!(
            (nightly.name.as_str(), nightly.makes_up, nightly.is_full, &nightly.keep),
            ("nightly", true, false, &Some(keep))
        );
        assert_eq!((nightly.calendar.pattern(), nightly.timezone.as_deref()), ("0 2 * * *", Some("Europe/Paris")));
        assert_eq!(
            (monthly.name.as_str(), monthly.makes_up, monthly.is_full, &monthly.keep),
            ("monthly", false, true, &None)
        );
        assert_eq!(job.limits, Limits { vms: 4 });
        let timeouts = Timeouts {
            job: Some(Duration::from_secs(5400)),
            vm: Some(Duration::from_secs(6 * 3600)),
            lock: Duration::from_secs(60),
            chain: None,
        };
        assert_eq!(job.timeouts, timeouts);
        assert_eq!(job.retries, Retries { vm: 2, pause: Duration::from_secs(5) });
        let report = Reporting {
            command: texts(&["/usr/sbin/sendmail", "-t"]),
            is_json: false,
            to: Some("backup@example.org".to_owned()),
            always: false,
        };
        assert_eq!(job.report, Some(report));
    }

    #[test]
    fn a_short_job_has_usual_settings() {
        let job = parse("pools=['lab']\nmode='full'\nvms.all=true\nto.repositories=['main']\n").expect("right");
        assert_eq!(job.kind, Kind::Full(Full { compression: xapi::Compression::Zstd }));
        assert_eq!(job.limits, Limits { vms: 2 });
        assert_eq!((job.schedules.len(), job.report), (0, None));
    }

    /// The whole file with one line in place of another.
    fn with(line: &str, other: &str) -> String {
        assert!(WHOLE.contains(line), "{line}");
        WHOLE.replace(line, other)
    }

    #[test]
    fn each_mistake_is_named_with_its_line_and_what_is_expected() {
        for (line, other, expected) in [
            ("cbt = true", "ctb = true", "/jobs/web.toml:20: 'ctb' is no key of [incremental]; did you mean 'cbt'?"),
            (
                "cbt = true",
                "zzz = 1",
                "20: 'zzz' is no key of [incremental]; there are format, compression, key_every, nbd",
            ),
            ("cbt = true", "cbt = 'yes'", "20: 'cbt' is 'yes'; expected true or false"),
            (
                "description = \"web",
                "descriptoin = \"web",
                "2: 'descriptoin' is no key of a job; did you mean 'description'?",
            ),
            ("pools = [\"lab\"]", "", "1: pools is missing"),
            ("pools = [\"lab\"]", "pools = [\"lob\"]", "3: 'lob' is no pool of the configuration; did you mean 'lab'?"),
            ("pools = [\"lab\"]", "pools = [\"\"]", "3: 'pools' is ''; expected texts in quotes"),
            ("pools = [\"lab\"]", "pools = 7", "3: 'pools' is 7; expected a list of texts"),
            ("names = [\"web01\"]", "all = true", "5: [vms] says all = true, and names some"),
            ("names = [\"web01\"]", "names = [\"a\", \"a\"]", "6: 'a' is named twice"),
            ("[\"1F2E3D4C-5B6A-4798-8A9B-0C1D2E3F4A5B\"]", "[\"1F2E\"]", "7: '1F2E' is no uuid"),
            ("\"halted\"", "\"off\"", "9: 'off' is no state; there are running, halted, paused, suspended"),
            (
                "\"/srv/other\"",
                "\"other\"",
                "14: 'other' is no repository of the configuration, which has main, offsite",
            ),
            ("key_every = 30", "key_every = 0", "17: 'key_every' is 0; expected a number from 1 to 10000"),
            ("key_every = 30", "format = 'vhd'", "18: a VHD file is not compressed"),
            ("\"gzip\"", "\"lzma\"", "18: 'compression' is 'lzma'; expected \"none\" or \"gzip\" or \"brotli\""),
            ("cbt = true", "purge_snapshot_data = true", "16: purge_snapshot_data needs cbt = true"),
            ("pools = ", "mode = 'full'\npools = ", "17: the job has mode = \"full\", to which this does not apply"),
            ("\"0 2 * * *\"", "\"0 25 * * *\"", "24: '0 25 * * *' is no pattern of cron: "),
            (
                "\"0 2 * * *\"",
                "\"0 0 31 2 *\"",
                "24: '0 0 31 2 *' is no pattern of cron: there is no such day; expected minute",
            ),
            ("Europe/Paris", "Europe/Pariss", "25: 'Europe/Pariss' is no time zone; expected one like Europe/Paris"),
            ("\"monthly\"", "\"nightly\"", "29: there are two schedules called 'nightly'"),
            ("\"monthly\"", "\"every month\"", "29: 'every month' is no name of a schedule"),
            ("last = 7, weekly = 4, ", "", "26: keep keeps nothing"),
            ("\"skip\"", "\"never\"", "32: 'missed' is 'never'; expected \"run\" or \"skip\""),
            ("vm = \"6h\"", "vm = \"6 parsecs\"", "39: 'vm' is '6 parsecs'; expected a time like"),
            ("vm = \"6h\"", "vm = \"-6h\"", "39: 'vm' is '-6h'; expected a time like"),
            ("vm = \"6h\"", "vm = \"0s\"", "38: vm is no time at all"),
            ("to = \"backup@example.org\"", "", "47: to is missing: the address that a mail goes to"),
            ("cbt = true", "cbt = ", "20: no TOML: "),
            ("cbt = true", "cbt = true\ncbt = true", "21: no TOML: "),
        ] {
            let said = parse(&with(line, other)).expect_err(other);
            assert!(said.lines().any(|line| line.contains(expected)), "{other}\n{said}\nexpected: {expected}");
        }
    }

    #[test]
    fn all_mistakes_are_named_at_once_by_line() {
        let text = with("cbt = true", "ctb = true").replace("\"lab\"", "\"lob\"").replace("vms = 4", "vms = 1000");
        let said = parse(&text).expect_err("three mistakes");
        let lines: Vec<&str> = said.lines().filter_map(|line| line.split(':').nth(1)).collect();
        assert_eq!(lines, ["3", "20", "36"], "{said}");
        assert!(parse("").expect_err("nothing").contains("[vms] is missing"));
        let named = |path| Job::parse(WHOLE, Path::new(path), &known());
        assert!(named("/jobs/my job.toml").expect_err("a space").to_string().contains("'my job', is no name of a job"));
    }
}
