//! `xofs info`: a repository, a VM, a backup, a disk or a VHD, in the manner of `qemu-img info`.

use std::ffi::OsString;
use std::fmt::Write as _;

use anyhow::Result;
use clap::Args;
use serde_json::{Value, json};
use vhd::{DiskType, Filter, Format, LayerInfo};

use super::exit::{Exit, Failure};
use super::list::backup_to_json;
use super::text::{Shown, count, size};
use super::{Global, open, print};
use crate::repository::{Backup, BackupDisk, DiskSource, Layout, LooseDisk, Mode, Problem, Repository, Selection, Vm};

const EXAMPLES: &str = "\
Examples:
  xofs info /srv/backups web01/latest
  xofs info /srv/backups web01/latest/xvda --chain
  xofs info /srv/backups/disk.vhd --json";

/// Shows what is known of a repository, a VM, a backup, a disk or a VHD
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES, override_usage = "xofs info [OPTIONS] [REPO] [WHAT]")]
pub struct InfoArgs {
    /// The repository (else XOFS_REPOSITORY or --repository), and VM[/BACKUP[/DISK]] in it
    #[arg(num_args = 0..=2, value_names = ["REPO", "WHAT"])]
    names: Vec<OsString>,
    /// Shows the chain of a disk, from the root to the leaf
    #[arg(long)]
    chain: bool,
    /// Writes JSON
    #[arg(long)]
    json: bool,
}

/// Lines for people, and the same as JSON.
type Facts = (String, Value);

/// Runs the command.
///
/// # Errors
/// If nothing has that name, or it cannot be read.
pub fn run(global: &Global, arguments: &InfoArgs) -> Result<Exit> {
    let (address, what) = open::split_names(global, &arguments.names);
    let place = open::place(global, address)?;
    let repository = open::repository(global, &place, open::SMALL_CACHE)?;
    let what = open::text_of(what)?;
    let is_whole =
        what.is_empty() && (repository.layout() == Layout::Repository || repository.loose_disks()?.len() != 1);
    let mut exit = Exit::Done;
    let (text, value) = if is_whole {
        of_repository(&repository, &place.name)?
    } else {
        match repository.select(&what)? {
            Selection::Vm(vm) => of_vm(&repository, &vm)?,
            Selection::Backup(vm, backup) => of_backup(&vm, &backup),
            Selection::Disk(vm, backup, disk) => {
                let (facts, is_readable) = of_disk(&repository, &vm, &backup, &disk, arguments.chain)?;
                if !is_readable {
                    exit = Exit::Partial;
                }
                facts
            }
            Selection::Loose(disk) => of_loose(&repository, &disk, arguments.chain)?,
        }
    };
    if arguments.chain && value.get("chain").is_none() {
        return Err(Failure::usage("only a disk has a chain: name VM/BACKUP/DISK or a VHD").into());
    }
    if arguments.json {
        print::json(&value)?
    } else {
        print::text(&text)?
    }
    Ok(exit)
}

fn of_repository(repository: &Repository, name: &str) -> Result<Facts> {
    let vms = repository.vms()?;
    // Problems are known of what was looked at.
    let listings: Vec<_> = vms.iter().filter_map(|vm| repository.backups(&vm.id).ok()).collect();
    let backups: usize = listings.iter().map(|backups| backups.len()).sum();
    let bytes: u64 = listings.iter().flat_map(|backups| backups.iter()).map(|backup| backup.size).sum();
    let disks = repository.loose_disks()?;
    let storage = repository.storage().describe();
    let mut lines = vec![("repository", Shown(name).to_string()), ("storage", Shown(&storage).to_string())];
    let is_repository = repository.layout() == Layout::Repository;
    if is_repository {
        lines.push(("VMs", vms.len().to_string()));
        lines.push(("backups", format!("{backups}, {}", exact(bytes))));
    } else {
        lines.push(("VHDs", disks.len().to_string()));
    }
    let problems = repository.problems();
    lines.push(("problems", problems.len().to_string()));
    let value = json!({
        "repository": name,
        "storage": storage,
        "layout": if is_repository { "repository" } else { "disks" },
        "vms": vms.len(),
        "backups": backups,
        "size": bytes,
        "disks": disks.len(),
        "problems": problems.iter().map(Problem::to_json).collect::<Vec<_>>(),
    });
    Ok((table(&lines), value))
}

fn of_vm(repository: &Repository, vm: &Vm) -> Result<Facts> {
    let backups = repository.backups(&vm.id)?;
    let bytes: u64 = backups.iter().map(|backup| backup.size).sum();
    let mut lines = vec![
        ("VM", Shown(&vm.name).to_string()),
        ("uuid", Shown(vm.id.as_str()).to_string()),
        ("backups", format!("{}, {}", backups.len(), exact(bytes))),
    ];
    if let (Some(oldest), Some(newest)) = (backups.first(), backups.last()) {
        lines.push(("oldest", oldest.time.to_string()));
        lines.push(("newest", newest.time.to_string()));
    }
    let value = json!({
        "uuid": vm.id.as_str(),
        "name": vm.name,
        "size": bytes,
        "backups": backups.iter().map(|backup| backup_to_json(backup, None)).collect::<Vec<_>>(),
    });
    Ok((table(&lines), value))
}

fn of_backup(vm: &Vm, backup: &Backup) -> Facts {
    let mode = match (backup.mode, backup.is_key) {
        (Mode::Full, _) => "full",
        (Mode::Incremental, Some(true)) => "incremental, a key",
        (Mode::Incremental, _) => "incremental",
        (Mode::Unreadable, _) => "unreadable",
    };
    let mut lines = vec![
        ("backup", format!("{}/{}", Shown(&vm.name), backup.time)),
        ("VM uuid", Shown(vm.id.as_str()).to_string()),
        ("mode", mode.to_owned()),
        ("size", exact(backup.size)),
        ("job", Shown(&backup.job_id).to_string()),
        ("schedule", Shown(&backup.schedule_id).to_string()),
        ("tags", Shown(&backup.tags.join(", ")).to_string()),
        ("metadata", Shown(&backup.metadata.to_string()).to_string()),
    ];
    for disk in &backup.disks {
        let bytes = disk.virtual_size.map_or("size unknown".to_owned(), size);
        lines.push(("disk", format!("{}  {bytes}  {}", Shown(&disk.name), Shown(&disk.label))));
    }
    if let Some(problem) = &backup.problem {
        lines.push(("problem", Shown(problem).to_string()));
    }
    (table(&lines), backup_to_json(backup, None))
}

/// Returns what is known of a disk, and whether it can be read.
fn of_disk(repository: &Repository, vm: &Vm, backup: &Backup, disk: &BackupDisk, chain: bool) -> Result<(Facts, bool)> {
    let (size, allocated, layers, problem) = match repository.open_disk(backup, disk) {
        Ok(opened) => (Some(opened.size()), Some(opened.allocated()?), repository.chain(backup, disk)?, None),
        // What the metadata says is known all the same.
        Err(error) if matches!(error.kind(), disk::ErrorKind::Damaged | disk::ErrorKind::Unsupported) => {
            (disk.virtual_size, None, Vec::new(), Some(error.to_string()))
        }
        Err(error) => return Err(error.into()),
    };
    let (path, xva_index) = match &disk.source {
        DiskSource::Vhd(path) => (path.to_string(), None),
        DiskSource::Xva { path, index } => (path.to_string(), Some(*index)),
        DiskSource::Unusable(_) => (String::new(), None),
    };
    let form = match (xva_index, layers.len()) {
        (Some(_), _) => "XVA".to_owned(),
        (None, 0) => String::new(),
        (None, layers) => count(layers, "VHD layer"),
    };
    let lines = [
        ("disk", format!("{}/{}/{}", Shown(&vm.name), backup.time, Shown(&disk.name))),
        ("label", Shown(&disk.label).to_string()),
        ("description", Shown(&disk.description).to_string()),
        ("VDI uuid", disk.vdi.map(|uuid| uuid.to_string()).unwrap_or_default()),
        ("format", form),
        ("virtual size", size.map(exact).unwrap_or_default()),
        ("allocated", allocated.map(exact).unwrap_or_default()),
        ("file", Shown(&path).to_string()),
        ("problem", Shown(problem.as_deref().unwrap_or_default()).to_string()),
    ];
    let value = json!({
        "vm": {"uuid": vm.id.as_str(), "name": vm.name},
        "backup": backup.time.to_string(),
        "disk": disk.name,
        "label": disk.label,
        "description": disk.description,
        "vdi": disk.vdi,
        "virtualSize": size,
        "allocated": allocated,
        "path": path,
        "xvaIndex": xva_index,
        "chain": chain_to_json(&layers),
        "problem": problem,
    });
    Ok(((table(&lines) + &chain_to_text(&layers, chain), value), problem.is_none()))
}

fn of_loose(repository: &Repository, disk: &LooseDisk, chain: bool) -> Result<Facts> {
    let opened = repository.open_loose(disk)?;
    let layers = repository.loose_chain(disk)?;
    let allocated = opened.allocated()?;
    let lines = [
        ("disk", Shown(&disk.name).to_string()),
        ("format", count(layers.len(), "VHD layer")),
        ("virtual size", exact(opened.size())),
        ("allocated", exact(allocated)),
        ("file", Shown(&disk.path.to_string()).to_string()),
    ];
    let value = json!({
        "disk": disk.name,
        "virtualSize": opened.size(),
        "allocated": allocated,
        "path": disk.path.to_string(),
        "chain": chain_to_json(&layers),
    });
    Ok((table(&lines) + &chain_to_text(&layers, chain), value))
}

fn exact(bytes: u64) -> String {
    if bytes < 1024 { size(bytes) } else { format!("{} ({bytes} bytes)", size(bytes)) }
}

/// Lines of a name and a value; those without a value are left out.
fn table(lines: &[(&str, String)]) -> String {
    let mut text = String::new();
    for (name, value) in lines.iter().filter(|(_, value)| !value.is_empty()) {
        let _ = writeln!(text, "{name}: {value}");
    }
    text
}

fn format_of(layer: &LayerInfo) -> &'static str {
    match layer.format {
        Format::File => "VHD file",
        Format::Exploded(Filter::None) => "exploded VHD",
        Format::Exploded(Filter::Gzip) => "exploded VHD, gzip",
        Format::Exploded(Filter::Brotli) => "exploded VHD, brotli",
    }
}

fn type_of(layer: &LayerInfo) -> &'static str {
    match layer.disk_type {
        DiskType::Fixed => "fixed",
        DiskType::Dynamic => "dynamic",
        DiskType::Differencing => "differencing",
    }
}

/// The layers from the root to the leaf, as people read a history.
fn chain_to_text(layers: &[LayerInfo], is_asked: bool) -> String {
    let mut text = String::new();
    if !is_asked {
        return text;
    }
    for layer in layers.iter().rev() {
        let lines = [
            ("file", Shown(&layer.name.to_string()).to_string()),
            ("data", if layer.data == layer.name { String::new() } else { Shown(&layer.data.to_string()).to_string() }),
            ("format", format!("{}, {}", format_of(layer), type_of(layer))),
            ("uuid", layer.uuid.to_string()),
            ("parent uuid", layer.parent_uuid.map(|uuid| uuid.to_string()).unwrap_or_default()),
            ("virtual size", exact(layer.size)),
            ("blocks", format!("{} of {}", layer.allocated_blocks, size(layer.block_size))),
            ("creator", Shown(&String::from_utf8_lossy(&layer.creator)).to_string()),
            ("merge", if layer.is_merging { "under way".to_owned() } else { String::new() }),
        ];
        let _ = write!(text, "\n{}", table(&lines));
    }
    text
}

fn chain_to_json(layers: &[LayerInfo]) -> Value {
    let one = |layer: &LayerInfo| {
        json!({
            "name": layer.name.to_string(),
            "data": layer.data.to_string(),
            "format": format_of(layer),
            "type": type_of(layer),
            "uuid": layer.uuid,
            "parentUuid": layer.parent_uuid,
            "virtualSize": layer.size,
            "blockSize": layer.block_size,
            "allocatedBlocks": layer.allocated_blocks,
            "creator": String::from_utf8_lossy(&layer.creator),
            "timestamp": layer.timestamp,
            "isMerging": layer.is_merging,
        })
    };
    Value::Array(layers.iter().rev().map(one).collect())
}
