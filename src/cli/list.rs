//! `xofs list`: what a repository holds, or every configured one.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fmt::Write as _;
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, anyhow};
use clap::Args;
use serde_json::{Value, json};

use super::address::Place;
use super::config::Config;
use super::exit::Exit;
use super::text::{Shown, count, size};
use super::{Global, open, print};
use crate::repository::{Backup, DiskSource, Error, Layout, Mode, Problem, ProblemKind, Repository, StoredBackup};

const EXAMPLES: &str = "\
Examples:
  xofs list /srv/backups
  xofs list                      every repository of the configuration
  xofs list main --json | jq -r '.vms[].name'
  xofs list --json | jq -r '.repositories[] | select(.error) | .repository'

Ends with 3 if one of several repositories, or a folder in one, could not be listed.";

/// Lists VMs, their backups, sizes, chain lengths and problems
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub struct ListArgs {
    /// The repository [default: XOFS_REPOSITORY, else every one of the configuration]
    #[arg(value_name = "REPO")]
    address: Option<OsString>,
    /// Writes JSON
    #[arg(long)]
    json: bool,
    /// Seconds after which one of several repositories is given up
    #[arg(long, value_name = "SECONDS", default_value_t = 10)]
    timeout: u32,
}

/// Runs the command.
///
/// # Errors
/// If the one repository that was named cannot be listed.
pub fn run(global: &Global, arguments: &ListArgs) -> Result<Exit> {
    if arguments.address.is_none() && global.repository.is_none() {
        let config = Config::load()?;
        if !config.repositories.is_empty() {
            return run_all(global, &config, arguments);
        }
    }
    let place = open::place(global, arguments.address.as_deref())?;
    let repository = open::repository(global, &place, open::SMALL_CACHE)?;
    let listing = Listing::of(&repository)?;
    if arguments.json {
        print::json(&listing.to_json(&place.name))?;
    } else {
        print::text(&listing.to_text())?;
    }
    Ok(if listing.is_whole() { Exit::Done } else { Exit::Partial })
}

/// Lists every configured repository, each in a thread of its own: one that does not answer delays nothing.
fn run_all(global: &Global, config: &Config, arguments: &ListArgs) -> Result<Exit> {
    let deadline = Instant::now() + Duration::from_secs(u64::from(arguments.timeout));
    let (give, take) = mpsc::channel();
    for name in config.repositories.keys() {
        let (give, name, global, config) = (give.clone(), name.clone(), global.clone(), config.clone());
        thread::Builder::new().name(format!("list {name}")).spawn(move || {
            let listing = Place::find(name.as_ref(), &config)
                .and_then(|place| open::repository_silently(&global, &place, open::SMALL_CACHE))
                .and_then(|repository| Listing::of(&repository));
            // Past the deadline nobody listens.
            let _ = give.send((name, listing));
        })?;
    }
    drop(give);
    let mut listings = BTreeMap::new();
    while listings.len() < config.repositories.len() {
        match take.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
            Ok((name, listing)) => {
                tell(&name, &listing, arguments)?;
                listings.insert(name, listing);
            }
            Err(_) => break,
        };
    }
    for name in config.repositories.keys().filter(|name| !listings.contains_key(*name)).cloned().collect::<Vec<_>>() {
        let silent = Err(anyhow!("no answer within {} s: is the share mounted and reachable?", arguments.timeout));
        tell(&name, &silent, arguments)?;
        listings.insert(name, silent);
    }
    let is_whole = listings.values().all(|listing| listing.as_ref().is_ok_and(Listing::is_whole));
    if arguments.json {
        let all = listings.iter().map(|(name, listing)| match listing {
            Ok(listing) => listing.to_json(name),
            Err(error) => json!({"repository": name, "error": format!("{error:#}")}),
        });
        print::json(&json!({"repositories": all.collect::<Vec<_>>()}))?;
    }
    Ok(if is_whole { Exit::Done } else { Exit::Partial })
}

/// Says what is known of one of several repositories as soon as it is.
fn tell(name: &str, listing: &Result<Listing>, arguments: &ListArgs) -> Result<()> {
    match listing {
        Ok(_) if arguments.json => {}
        Ok(listing) => print::text(&format!("repository {}\n{}\n", Shown(name), listing.to_text()))?,
        Err(error) => say!("xofs: repository '{}': {}", Shown(name), Shown(&format!("{error:#}"))),
    }
    Ok(())
}

/// What was listed, taken out of the repository.
struct Listing {
    layout: Layout,
    vms: Vec<(String, String, Result<Vec<Row>, String>)>,
    loose: Vec<LooseRow>,
    config_backups: Vec<StoredBackup>,
    pool_backups: Vec<StoredBackup>,
    /// Why those cannot be listed.
    unlisted: Vec<String>,
    problems: Vec<Problem>,
}

struct LooseRow {
    name: String,
    virtual_size: Result<u64, String>,
}

/// A backup with the length of its chain: how many backups a restore of it reads, itself included.
struct Row {
    backup: std::sync::Arc<Backup>,
    chain_length: Option<usize>,
}

impl Listing {
    fn of(repository: &Repository) -> Result<Self> {
        let mut vms = Vec::new();
        for (vm, backups) in repository.all_backups()? {
            let backups = backups.map(|backups| rows(&backups)).map_err(|error| error.to_string());
            vms.push((vm.id.to_string(), vm.name, backups));
        }
        let loose = repository.loose_disks()?;
        let loose = loose.iter().map(|disk| LooseRow {
            name: disk.name.clone(),
            virtual_size: repository.open_loose(disk).map(|disk| disk.size()).map_err(|error| error.to_string()),
        });
        let loose = loose.collect();
        let mut unlisted = Vec::new();
        let mut list = |backups: Result<Vec<StoredBackup>, Error>| {
            backups.unwrap_or_else(|error| {
                unlisted.push(error.to_string());
                Vec::new()
            })
        };
        let is_repository = repository.layout() == Layout::Repository;
        Ok(Self {
            layout: repository.layout(),
            vms,
            loose,
            config_backups: if is_repository { list(repository.config_backups()) } else { Vec::new() },
            pool_backups: if is_repository { list(repository.pool_backups()) } else { Vec::new() },
            unlisted,
            problems: repository.problems(),
        })
    }

    /// Whether every folder could be listed.
    fn is_whole(&self) -> bool {
        self.unlisted.is_empty()
            && self.vms.iter().all(|(_, _, rows)| rows.is_ok())
            && self.problems.iter().all(|problem| problem.kind != ProblemKind::Listing)
    }

    fn to_text(&self) -> String {
        let mut text = String::new();
        // Writing to a String cannot fail.
        let _ = self.write_text(&mut text);
        text
    }

    fn write_text(&self, text: &mut String) -> std::fmt::Result {
        for disk in &self.loose {
            match &disk.virtual_size {
                Ok(bytes) => writeln!(text, "{:<40} {:>10}", Shown(&disk.name), size(*bytes))?,
                Err(reason) => writeln!(text, "{:<40} unreadable: {}", Shown(&disk.name), Shown(reason))?,
            }
        }
        for (id, name, rows) in &self.vms {
            let name = if name.is_empty() { "(name unknown)" } else { name };
            match rows {
                Ok(rows) => {
                    let bytes = rows.iter().map(|row| row.backup.size).sum();
                    let many = count(rows.len(), "backup");
                    writeln!(text, "{}  {}  {many}, {}", Shown(name), Shown(id), size(bytes))?;
                    for row in rows {
                        row.write_text(text)?;
                    }
                }
                Err(reason) => writeln!(text, "{}  {}  cannot be listed: {}", Shown(name), Shown(id), Shown(reason))?,
            }
        }
        if self.layout == Layout::Repository && self.vms.is_empty() {
            writeln!(text, "no backups of VMs")?;
        }
        for (what, backups) in [("XO configuration", &self.config_backups), ("pool metadata", &self.pool_backups)] {
            if let Some(newest) = backups.iter().map(|backup| backup.time).max() {
                writeln!(text, "{what}: {}, newest {newest}", count(backups.len(), "backup"))?;
            }
        }
        for reason in &self.unlisted {
            writeln!(text, "problem: {}", Shown(reason))?;
        }
        for problem in &self.problems {
            writeln!(text, "problem: {}: {}", Shown(&problem.path.to_string()), Shown(&problem.message))?;
        }
        Ok(())
    }

    fn to_json(&self, name: &str) -> Value {
        let vms = self.vms.iter().map(|(id, name, rows)| match rows {
            Ok(rows) => {
                json!({"uuid": id, "name": name, "backups": rows.iter().map(Row::to_json).collect::<Vec<_>>()})
            }
            Err(reason) => json!({"uuid": id, "name": name, "backups": [], "problem": reason}),
        });
        let stored = |backups: &[StoredBackup]| -> Vec<Value> {
            let one = |backup: &StoredBackup| json!({"group": backup.group, "time": backup.time.to_string(), "path": backup.directory.to_string()});
            backups.iter().map(one).collect()
        };
        let disks = self.loose.iter().map(|disk| {
            json!({
                "name": disk.name,
                "virtualSize": disk.virtual_size.as_ref().ok(),
                "problem": disk.virtual_size.as_ref().err(),
            })
        });
        json!({
            "repository": name,
            "vms": vms.collect::<Vec<_>>(),
            "disks": disks.collect::<Vec<_>>(),
            "configBackups": stored(&self.config_backups),
            "poolBackups": stored(&self.pool_backups),
            "unlisted": self.unlisted,
            "problems": self.problems.iter().map(Problem::to_json).collect::<Vec<_>>(),
        })
    }
}

/// Counts the length of each backup's chain from the last key before it.
fn rows(backups: &[std::sync::Arc<Backup>]) -> Vec<Row> {
    let mut length = None;
    let mut rows = Vec::new();
    for backup in backups {
        length = match (backup.mode, backup.is_key, length) {
            (Mode::Full, _, before) => {
                rows.push(Row { backup: backup.clone(), chain_length: Some(1) });
                length = before;
                continue;
            }
            (Mode::Incremental, Some(true), _) => Some(1),
            (Mode::Incremental, Some(false), Some(before)) => Some(before + 1),
            _ => None,
        };
        rows.push(Row { backup: backup.clone(), chain_length: length });
    }
    rows
}

impl Row {
    fn kind(&self) -> &'static str {
        match (self.backup.mode, self.backup.is_key) {
            (Mode::Full, _) => "full",
            (Mode::Incremental, Some(true)) => "key",
            (Mode::Incremental, _) => "incremental",
            (Mode::Unreadable, _) => "unreadable",
        }
    }

    fn write_text(&self, text: &mut String) -> std::fmt::Result {
        let backup = &self.backup;
        let chain = self.chain_length.map_or("?".to_owned(), |length| length.to_string());
        write!(
            text,
            "  {:<18} {:<11} chain {chain:>3}  {:>10}  {}",
            backup.time,
            self.kind(),
            size(backup.size),
            Shown(&backup.disks.iter().map(|disk| disk.name.as_str()).collect::<Vec<_>>().join(" ")),
        )?;
        if let Some(problem) = &backup.problem {
            write!(text, "  problem: {}", Shown(problem))?;
        }
        writeln!(text)
    }

    fn to_json(&self) -> Value {
        backup_to_json(&self.backup, self.chain_length)
    }
}

/// Says a backup in JSON.
pub fn backup_to_json(backup: &Backup, chain_length: Option<usize>) -> Value {
    let disks = backup.disks.iter().map(|disk| {
        let (path, index) = match &disk.source {
            DiskSource::Vhd(path) => (Some(path.to_string()), None),
            DiskSource::Xva { path, index } => (Some(path.to_string()), Some(*index)),
            DiskSource::Unusable(_) => (None, None),
        };
        json!({
            "name": disk.name,
            "label": disk.label,
            "description": disk.description,
            "vdi": disk.vdi,
            "virtualSize": disk.virtual_size,
            "path": path,
            "xvaIndex": index,
        })
    });
    json!({
        "time": backup.time.to_string(),
        "timestamp": backup.time.unix(),
        "mode": match backup.mode {
            Mode::Incremental => "incremental",
            Mode::Full => "full",
            Mode::Unreadable => "unreadable",
        },
        "isKey": backup.is_key,
        "chainLength": chain_length,
        "size": backup.size,
        "jobId": backup.job_id,
        "scheduleId": backup.schedule_id,
        "tags": backup.tags,
        "metadata": backup.metadata.to_string(),
        "disks": disks.collect::<Vec<_>>(),
        "problem": backup.problem,
    })
}
