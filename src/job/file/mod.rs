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
//! srs = ["dr=fast"]                       # replicas, if any: an SR of another pool
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

mod destinations;
mod kind;
mod limits;
mod reporting;
mod schedules;
mod which;

use std::collections::BTreeSet;
use std::path::Path;

use super::table::{Document, Faults, Placed, Section, nearest};
use crate::pool::SrAddress;
use destinations::Destinations;

pub use kind::{Full, Incremental, Kind};
pub use limits::{Limits, Retries, Timeouts};
pub use reporting::{Form, Reporting};
pub use schedules::{Keep, Timed};
pub use which::{PowerState, Which};

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
    /// Repositories, by name or path.
    pub repositories: Vec<String>,
    /// SRs that replicas are kept on; at least one, if there is no repository.
    pub srs: Vec<SrAddress>,
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
    let vms = root.section("vms").map(which::which);
    if vms.is_none() {
        root.note_by(
            &["vms"],
            "[vms] is missing: it says which machines are backed up, by names, uuids, tags, or all = true",
        );
    }
    let destinations = root.section("to").map(|to| destinations::destinations(to, known));
    if destinations.is_none() {
        root.note_by(&["to"], "[to] is missing: it says where backups are stored, like repositories = [\"main\"]");
    }
    let kind = kind::kind(root);
    // Where [to] is missing, that is what is wrong, and not what refers to it.
    let of_job = schedules::OfJob {
        is_incremental: matches!(kind, Kind::Incremental(_)),
        has_repositories: destinations.as_ref().is_none_or(|to| to.has_repositories),
        has_srs: destinations.as_ref().is_none_or(|to| to.has_srs),
    };
    let schedules = schedules::schedules(root, &of_job);
    let limits = limits::limits(root.section("limits"));
    let timeouts = limits::timeouts(root.section("timeouts"));
    let retries = limits::retries(root.section("retries"));
    let report = root.section("report").and_then(|section| {
        // Of a path of one part the parent is empty, which is where the program was started.
        reporting::report(section, path.parent().unwrap_or(Path::new("")))
    });
    let (vms, Destinations { repositories, srs, .. }) = (vms?, destinations?);
    Some(Job {
        id: id?,
        description,
        pools,
        vms,
        kind,
        repositories,
        srs,
        schedules,
        limits,
        timeouts,
        retries,
        report,
    })
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
        root.note_by(
            &["pools"],
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
#[cfg(test)]
mod tests;
