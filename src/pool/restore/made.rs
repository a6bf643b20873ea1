//! What a restore has made so far: how it is known, how it is undone, and what becomes of what a run left that died.
//!
//! | the VM | its disks | what died | what the next run does |
//! |---|---|---|---|
//! | marked, halted | marked | before the VM was whole | destroys all |
//! | marked, running | marked | the moment after it could be started, and somebody did | takes the marks away |
//! | not marked | some are marked | while marks were taken away | takes the rest away, and gives them their names |
//! | none | marked, no VM has them | before a disk alone was whole | destroys them |
//! | of an XVA, which has no mark | none has | before it says what it was restored from | destroys all that the import's task names |

use std::time::Duration;

use xapi::record::{Class, Texts, Vbd, Vdi, Vm};
use xapi::{Pool, Record, Ref, Task};

use super::records::{self, PROVISIONAL, RESTORED_FROM, RESTORING};
use crate::pool::error::Result;
use crate::pool::{replica, survey};

/// How long the pool may take to end the import of a run that died.
const ENDING: Duration = Duration::from_secs(10);

/// What was made, until it is whole.
#[derive(Debug, Default)]
pub struct Made {
    /// The VM.
    pub vm: Option<Ref<Vm>>,
    /// Disks.
    pub disks: Vec<Ref<Vdi>>,
}

impl Made {
    /// Destroys it.
    ///
    /// # Errors
    /// What the pool says; as much as can be is destroyed.
    pub fn undo(self, pool: &Pool) -> Result<()> {
        let vm = self.vm.map_or(Ok(()), |vm| pool.destroy_vm(&vm));
        let disks: Vec<_> = self.disks.iter().map(|disk| pool.destroy_vdi(disk)).collect();
        vm?;
        Ok(disks.into_iter().collect::<xapi::Result<()>>()?)
    }
}

/// Undoes what a run made that has this mark, by the names that it was to have, or had.
///
/// # Errors
/// What the pool says.
pub fn undo(pool: &Pool, mark: &str, vm: Option<&str>, disks: &[String]) -> Result<()> {
    for machine in marked::<Vm>(pool, mark, vm.as_slice(), |vm| &vm.other_config)? {
        if machine.power_state == "Halted" {
            pool.destroy_vm(&machine.reference)?;
        } else {
            pool.remove_entry(&machine.reference, "other_config", RESTORING)?;
        }
    }
    let names: Vec<&str> = disks.iter().map(String::as_str).collect();
    for disk in marked::<Vdi>(pool, mark, &names, |vdi| &vdi.other_config)? {
        if is_of_a_machine(pool, &disk)? {
            if let Some(name) = disk.name_label.strip_prefix(PROVISIONAL) {
                pool.set(&disk.reference, "name_label", name)?;
            }
            pool.remove_entry(&disk.reference, "other_config", RESTORING)?;
        } else {
            pool.destroy_vdi(&disk.reference)?;
        }
    }
    Ok(())
}

/// Undoes what a run made of an XVA and died: the task of its import tells which VM that is. One that says what it was restored
/// from, or that it is a replica, stays: its task is left over, too, where the pool did not destroy it at once.
///
/// # Errors
/// What the pool says.
pub fn undo_import(pool: &Pool, import: &Task) -> Result<()> {
    // What is cut off fails, and what failed the pool has removed itself.
    let Ok(outcome) = import.wait(&pool.cancel().part(ENDING)) else { return Ok(()) };
    for vm in outcome.values() {
        let vm: Record<Vm> = match pool.record(&Ref::new(vm.as_str())) {
            Err(error) if error.is_gone() => continue,
            vm => vm?,
        };
        // A replica that says to be one, whole or not, is known by its own marks.
        let is_known = vm.other_config.contains_key(RESTORED_FROM) || replica::is_itself(&vm.uuid, &vm.other_config);
        if vm.power_state != "Halted" || is_known {
            continue;
        }
        let vbds = pool.records_of::<Vbd>(&vm.vbds)?;
        let disks = vbds.iter().filter(|vbd| survey::is_disk(vbd)).map(|vbd| vbd.vdi.clone()).collect();
        Made { vm: Some(vm.reference), disks }.undo(pool)?;
    }
    Ok(())
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
        let is_ours = |object: &Record<C>| other_config(object).get(RESTORING).is_some_and(|value| value == mark);
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

/// Whether a VM has the disk: one that is no control domain.
///
/// # Errors
/// What the pool says.
pub fn is_of_a_machine(pool: &Pool, disk: &Vdi) -> Result<bool> {
    for vbd in pool.records_of::<Vbd>(&disk.vbds)? {
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
