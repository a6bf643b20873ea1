//! What a restore has made so far: how it is known, how it is undone, and what becomes of what a run left that died.
//!
//! A VM is whole once its start is not blocked any more by what blocked it first: from then on it is somebody's, and is never destroyed,
//! whatever marks it bears. It has its mark before it has a disk, or before the import's task goes; it is destroyed after its disks, and
//! loses its mark after them: so where there is none with the mark, its disks are whole, too.
//!
//! | the VM | its disks | what died | what the next run does |
//! |---|---|---|---|
//! | marked, its start blocked | marked | before the VM was whole | destroys the disks that are marked and no other VM has, then the VM |
//! | marked, may be started | some are marked | while marks were taken away | takes the rest away, and gives them their names |
//! | none has the mark | some are marked | nothing: somebody changed it | the same |
//! | none is meant | marked, no VM has them | before a disk alone was whole | destroys them |
//! | of an XVA, without a mark | some or none are marked | just after the import | destroys what its task names, if all disks bear a sign of it |
//! | | a snapshot is marked | while it was cloned | takes the mark away |
//!
//! A VM that somebody copied has no operation blocked, and snapshots of others have marks, too: both only lose them.

use std::time::Duration;

use xapi::record::{Class, Texts, Vbd, Vdi, Vm};
use xapi::{Pool, Record, Ref, Task};

use super::records::{self, BLOCKED, BLOCKED_BECAUSE, PROVISIONAL, RESTORED_FROM, RESTORING};
use crate::pool::error::{Error, ErrorKind, Result};
use crate::pool::{replica, survey};

/// How long the pool may take to end the import of a run that died.
const ENDING: Duration = Duration::from_secs(10);

/// Undoes what a run made that has this mark, by the names that it was to have, or had.
///
/// # Errors
/// What the pool says; as many disks as can be are destroyed.
pub fn undo(pool: &Pool, mark: &str, vm: Option<&str>, disks: &[String]) -> Result<()> {
    let machines = marked::<Vm>(pool, mark, vm.as_slice(), |vm| &vm.other_config)?;
    let machines = machines.into_iter().filter(|machine| !machine.is_a_snapshot);
    let (unfinished, whole): (Vec<_>, Vec<_>) = machines.partition(|machine| is_unfinished(machine));
    let names: Vec<&str> = disks.iter().map(String::as_str).collect();
    let mut found = marked::<Vdi>(pool, mark, &names, |vdi| &vdi.other_config)?;
    for machine in unfinished.iter().chain(&whole) {
        // Those of an XVA have names that nobody chose.
        for disk in disks_of(pool, machine)?.into_iter().filter(|disk| has(&disk.other_config, mark)) {
            if !found.iter().any(|known| known.reference == disk.reference) {
                found.push(disk);
            }
        }
    }
    let of_none: Vec<&Ref<Vm>> = unfinished.iter().map(|machine| &machine.reference).collect();
    let is_undone = vm.is_none() || !unfinished.is_empty();
    let mut destroyed = Ok(());
    for disk in found {
        if is_undone && !disk.is_a_snapshot && !is_of_a_machine(pool, &disk, &of_none)? {
            destroyed = destroyed.and(pool.destroy_vdi(&disk.reference));
            continue;
        }
        if let Some(name) = disk.name_label.strip_prefix(PROVISIONAL) {
            pool.set(&disk.reference, "name_label", name)?;
        }
        pool.remove_entry(&disk.reference, "other_config", RESTORING)?;
    }
    destroyed?;
    for machine in &unfinished {
        pool.destroy_vm(&machine.reference)?;
    }
    for machine in &whole {
        let is_left =
            |operation: &&str| machine.blocked_operations.get(*operation).is_some_and(|why| why == BLOCKED_BECAUSE);
        for operation in BLOCKED.iter().filter(|operation| is_left(operation)) {
            pool.remove_entry(&machine.reference, "blocked_operations", operation)?;
        }
        pool.remove_entry(&machine.reference, "other_config", RESTORING)?;
    }
    Ok(())
}

/// Whether a marked VM is not whole, and nobody can have used it.
#[must_use]
pub fn is_unfinished(vm: &Vm) -> bool {
    let is_blocked = vm.blocked_operations.get(BLOCKED[0]).is_some_and(|why| why == BLOCKED_BECAUSE);
    // Some versions of XAPI leave out what is blocked when they make a VM.
    let is_bare = vm.vbds.is_empty() && vm.name_label.starts_with(PROVISIONAL);
    vm.power_state == "Halted" && (is_blocked || is_bare)
}

/// Undoes what a run made of an XVA and died before it was marked: the task of its import tells which VM that is. The task stays until
/// that is done.
///
/// # Errors
/// What the pool says; if the import has not ended yet.
pub fn undo_import(pool: &Pool, mut import: Task) -> Result<()> {
    let undone = destroy_imported(pool, &import);
    if undone.is_err() {
        import.leave();
    }
    undone
}

/// Destroys what an import made; what says what it was restored from, or that it is a replica, stays: its task is left over where the
/// pool did not destroy it at once.
fn destroy_imported(pool: &Pool, import: &Task) -> Result<()> {
    let outcome = match import.wait(&pool.cancel().part(ENDING)) {
        // What failed the pool has removed itself.
        Err(error) if import.is_over() && error.kind() != xapi::ErrorKind::Protocol => return Ok(()),
        outcome => outcome?,
    };
    for vm in outcome.values() {
        let vm: Record<Vm> = match pool.record(&Ref::new(vm.as_str())) {
            Err(error) if error.is_gone() => continue,
            vm => vm?,
        };
        let mark = vm.other_config.get(RESTORING);
        // A replica that says to be one, whole or not, is known by its own marks.
        let is_known = mark.is_none() && vm.other_config.contains_key(RESTORED_FROM)
            || replica::is_itself(&vm.uuid, &vm.other_config);
        if vm.power_state != "Halted" || is_known || mark.is_some() && !is_unfinished(&vm) {
            continue;
        }
        let (ours, others): (Vec<_>, Vec<_>) =
            disks_of(pool, &vm)?.into_iter().partition(|disk| is_of_import(disk, mark));
        if let Some(other) = others.first().filter(|_| mark.is_none()) {
            let (name, disk) = (vm.name_label.escape_debug(), other.name_label.escape_debug());
            let message = format!(
                "the VM '{name}' {} is of an import that was ended, but its disk '{disk}' says nothing of that: both are left alone; \
                 destroy them if nobody uses them",
                vm.uuid
            );
            return Err(Error::new(ErrorKind::Usage, message));
        }
        for disk in &ours {
            pool.destroy_vdi(&disk.reference)?;
        }
        pool.destroy_vm(&vm.reference)?;
    }
    Ok(())
}

/// Whether a disk of a VM that was imported says that it came with it: by the mark of the VM, else by what a backup says of itself.
fn is_of_import(disk: &Vdi, mark: Option<&String>) -> bool {
    match mark {
        Some(mark) => has(&disk.other_config, mark),
        None => disk.other_config.keys().any(|key| records::is_of_backups(key)),
    }
}

/// Whether entries have a mark.
fn has(entries: &Texts, mark: &str) -> bool {
    entries.get(RESTORING).is_some_and(|value| value == mark)
}

/// Returns the disks of a VM.
///
/// # Errors
/// What the pool says.
pub fn disks_of(pool: &Pool, vm: &Vm) -> Result<Vec<Record<Vdi>>> {
    let vbds: Vec<Record<Vbd>> = pool.records_of(&vm.vbds)?;
    Ok(pool.records_of(vbds.iter().filter(|vbd| survey::is_disk(vbd)).map(|vbd| &vbd.vdi))?)
}

/// Finds the objects of some names, provisional or not, that have a mark.
fn marked<C: Class>(
    pool: &Pool,
    mark: &str,
    names: &[&str],
    other_config: impl Fn(&C) -> &Texts,
) -> Result<Vec<Record<C>>> {
    let mut found: Vec<Record<C>> = Vec::new();
    for name in names.iter().flat_map(|name| [format!("{PROVISIONAL}{name}"), (*name).to_owned()]) {
        let there = pool.by_name::<C>(&name)?;
        let is_ours = |object: &Record<C>| has(other_config(object), mark);
        for object in pool.records_of(&there)?.into_iter().filter(is_ours) {
            if !found.iter().any(|known| known.reference == object.reference) {
                found.push(object);
            }
        }
    }
    Ok(found)
}

/// Takes the entries of backups away, but for one: nobody is to take what was made of a backup for a snapshot or a replica.
///
/// # Errors
/// What the pool says.
pub fn forget_backups<C: Class>(pool: &Pool, object: &Ref<C>, entries: &Texts, kept: &str) -> Result<()> {
    for key in entries.keys().filter(|key| records::is_of_backups(key) && *key != kept) {
        pool.remove_entry(object, "other_config", key)?;
    }
    Ok(())
}

/// Whether a VM has the disk: one that is no control domain, and none of `but`.
///
/// # Errors
/// What the pool says.
pub fn is_of_a_machine(pool: &Pool, disk: &Vdi, but: &[&Ref<Vm>]) -> Result<bool> {
    for vbd in pool.records_of::<Vbd>(&disk.vbds)?.iter().filter(|vbd| !but.contains(&&vbd.vm)) {
        match pool.field::<Vm, bool>(&vbd.vm, "is_control_domain") {
            Err(error) if error.is_gone() => {}
            is_control_domain => {
                if !is_control_domain? {
                    return Ok(true);
                }
            }
        }
    }
    Ok(false)
}
