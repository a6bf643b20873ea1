//! What people call a VM, a backup or a disk: `VM[/BACKUP[/DISK]]`.

use std::sync::Arc;

use super::{
    Backup, BackupDisk, Error, ErrorKind, Layout, LooseDisk, Repository, Result, Vm, escape_name, vm_directory_names,
};

/// At most so many candidates are listed in an error.
const SHOWN: usize = 8;

/// What was named.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Selection {
    /// A VM.
    Vm(Vm),
    /// A backup of a VM.
    Backup(Vm, Arc<Backup>),
    /// A disk of a backup.
    Disk(Vm, Arc<Backup>, BackupDisk),
    /// A VHD without metadata.
    Loose(Arc<LooseDisk>),
}

/// Finds what `what` names; see [`Repository::select`].
pub(super) fn select(repository: &Repository, what: &str) -> Result<Selection> {
    let what = what.trim_matches('/');
    if repository.layout() == Layout::Disks {
        return loose(&repository.loose_disks()?, what).map(Selection::Loose);
    }
    let mut parts = what.splitn(3, '/');
    let vms = repository.vms()?;
    let vm = vms[vm(&vms, parts.next().unwrap_or_default())?].clone();
    let Some(backup_part) = parts.next() else { return Ok(Selection::Vm(vm)) };
    let backups = repository.backups(&vm.id)?;
    let backup = backups[backup(&backups, backup_part, &vm)?].clone();
    let Some(disk_part) = parts.next() else { return Ok(Selection::Backup(vm, backup)) };
    let disk = disk(&vm, &backup, disk_part)?.clone();
    Ok(Selection::Disk(vm, backup, disk))
}

fn vm(vms: &[Vm], wanted: &str) -> Result<usize> {
    let folders = vm_directory_names(vms);
    let shown = || list(folders.iter().map(|folder| format!("'{folder}'")).collect());
    if wanted.is_empty() {
        return Err(not_found(format!("a VM was expected; there are {}", shown())));
    }
    let lower = wanted.to_ascii_lowercase();
    let digits = lower.replace('-', "");
    let is_same = |index: &usize| vms[*index].id.as_str() == wanted || folders[*index] == wanted;
    let is_named = |index: &usize| vms[*index].name == wanted || escape_name(&vms[*index].name) == wanted;
    // As a folder is called in a mount, with any number of digits: how many it has there changes as VMs come and go.
    let is_folder = |index: &usize| {
        wanted.rsplit_once('~').is_some_and(|(name, digits)| {
            let id = vms[*index].id.as_str().replace('-', "").to_ascii_lowercase();
            !digits.is_empty()
                && id.starts_with(&digits.to_ascii_lowercase())
                && (vms[*index].name == name || escape_name(&vms[*index].name) == name)
        })
    };
    let begins = |index: &usize| {
        let id = vms[*index].id.as_str().to_ascii_lowercase();
        id.starts_with(&lower) || (!digits.is_empty() && id.replace('-', "").starts_with(&digits))
    };
    // The first way in which any VM is meant decides.
    let ways: [&dyn Fn(&usize) -> bool; 4] = [&is_same, &is_named, &is_folder, &begins];
    for way in ways {
        let found: Vec<usize> = (0..vms.len()).filter(way).collect();
        match found.as_slice() {
            [] => {}
            [one] => return Ok(*one),
            several => {
                let several = list(several.iter().map(|index| format!("'{}'", folders[*index])).collect());
                let message = format!("'{}' names several VMs: {several}; say which", wanted.escape_debug());
                return Err(Error::new(ErrorKind::Ambiguous, message));
            }
        }
    }
    Err(not_found(format!("no VM has the name or uuid '{}'; there are {}", wanted.escape_debug(), shown())))
}

fn backup(backups: &[Arc<Backup>], wanted: &str, vm: &Vm) -> Result<usize> {
    let times =
        |indices: &mut dyn Iterator<Item = usize>| list(indices.map(|index| backups[index].time.to_string()).collect());
    let all = || times(&mut (0..backups.len()).rev());
    let name = shown_name(vm);
    if let Some(back) = wanted.strip_prefix("latest") {
        let back = match back.strip_prefix('~') {
            None if back.is_empty() => Some(0),
            None => None,
            Some(back) => back.parse::<usize>().ok(),
        };
        let Some(back) = back else {
            let message = format!("'{}' is no backup: 'latest' or 'latest~2' was expected", wanted.escape_debug());
            return Err(not_found(message));
        };
        return backups.len().checked_sub(1).and_then(|last| last.checked_sub(back)).ok_or_else(|| {
            not_found(format!("'{wanted}': VM '{name}' has {} backups; they are {}", backups.len(), all()))
        });
    }
    let matches = |index: &usize| {
        let time = &backups[*index].time;
        let begins = |text: &str| text.get(..wanted.len()).is_some_and(|head| head.eq_ignore_ascii_case(wanted));
        !wanted.is_empty() && (begins(&time.to_string()) || begins(&time.stored()))
    };
    let mut found: Vec<usize> = (0..backups.len()).filter(matches).collect();
    // One time may be the beginning of another: that without and that with its zone.
    if let Some(exact) = found.iter().copied().find(|index| {
        let time = &backups[*index].time;
        time.to_string() == wanted || time.stored() == wanted
    }) {
        found = vec![exact];
    }
    match found.as_slice() {
        [one] => Ok(*one),
        [] => {
            let wanted = wanted.escape_debug();
            Err(not_found(format!("VM '{name}' has no backup '{wanted}'; there are {}", all())))
        }
        several => {
            let several = times(&mut several.iter().rev().copied());
            let message = format!("'{wanted}' names several backups of VM '{name}': {several}; say which");
            Err(Error::new(ErrorKind::Ambiguous, message))
        }
    }
}

fn disk<'a>(vm: &Vm, backup: &'a Backup, wanted: &str) -> Result<&'a BackupDisk> {
    let bare = wanted.strip_prefix("disks/").unwrap_or(wanted);
    let bare = bare.strip_suffix(".raw").or_else(|| bare.strip_suffix(".vhd")).unwrap_or(bare);
    backup.disks.iter().find(|disk| disk.name == wanted || disk.name == bare).ok_or_else(|| {
        let names = list(backup.disks.iter().map(|disk| format!("'{}'", disk.name)).collect());
        let why = backup.problem.as_ref().map(|problem| format!(" ({problem})")).unwrap_or_default();
        let (name, wanted) = (shown_name(vm), wanted.escape_debug());
        not_found(format!("backup {} of VM '{name}' has no disk '{wanted}'; there are {names}{why}", backup.time))
    })
}

fn loose(disks: &[Arc<LooseDisk>], wanted: &str) -> Result<Arc<LooseDisk>> {
    if let (true, [one]) = (wanted.is_empty(), disks) {
        return Ok(one.clone());
    }
    let bare = wanted.strip_suffix(".raw").unwrap_or(wanted);
    let is_meant = |disk: &&Arc<LooseDisk>| disk.name == bare || disk.path.as_str() == wanted;
    disks.iter().find(is_meant).cloned().ok_or_else(|| {
        let names = list(disks.iter().map(|disk| format!("'{}'", disk.name)).collect());
        not_found(format!("there is no disk '{}'; there are {names}", wanted.escape_debug()))
    })
}

/// Returns what people call a VM: its name, or its uuid if it has none.
fn shown_name(vm: &Vm) -> String {
    let name = if vm.name.is_empty() { vm.id.as_str() } else { &vm.name };
    name.escape_debug().to_string()
}

fn not_found(message: String) -> Error {
    Error::new(ErrorKind::NotFound, message)
}

/// Joins candidates for a message, not more than people read.
fn list(mut all: Vec<String>) -> String {
    if all.is_empty() {
        return "none".to_owned();
    }
    let more = all.len().saturating_sub(SHOWN);
    all.truncate(SHOWN);
    let more = if more > 0 { format!(" and {more} more") } else { String::new() };
    format!("{}{more}", all.join(", "))
}
