//! Ends what a run began with a replica: what is whole stays and loses its marks, all else goes, and the state before is there again.
//!
//! It goes by what the pool has, whatever ended the run: so the same is done after a commit, after a failure, and by the next run.
//!
//! | marked | and | what becomes of it |
//! |---|---|---|
//! | a snapshot | is not whole | destroyed with its disks |
//! | the machine | the run's snapshot of it is whole | loses the mark; the disks that were replaced are destroyed |
//! | | else, an older snapshot is | the disks that were replaced are connected again, the new ones destroyed |
//! | | else | it is new, and destroyed with those of its disks that are marked |
//! | | runs, or is new and may be started | somebody uses it: loses the mark |
//! | a disk | no machine has it | destroyed |
//!
//! What somebody made of a marked object by a copy has the mark, too, but bears another's uuid: it is left alone. A machine bears its own
//! before it has a disk.

use serde_json::{Map, Value, json};
use xapi::record::{Texts, Vbd, Vdi, Vm};
use xapi::{Pool, Record, Ref};

use super::marks::{self, BLOCKED, CLONING, REPLACED, REPLICATING, RUN, SELF, is_itself};
use crate::pool::error::Result;
use crate::pool::restore::made::is_of_a_machine;
use crate::pool::snapshot::attach_again;
use crate::pool::survey::is_disk;

/// Ends what the run with this mark began.
///
/// # Errors
/// What the pool says: then the rest is as it was, and the next run goes on.
pub fn settle(pool: &Pool, mark: &str) -> Result<()> {
    let machines = pool.records::<Vm>()?;
    let has = |entries: &Texts, entry: &str| entries.get(entry).is_some_and(|value| value == mark);
    let is_new = |vm: &Vm| vm.vbds.is_empty() && !vm.other_config.contains_key(SELF);
    let is_ours = |vm: &Vm| is_itself(&vm.uuid, &vm.other_config) || is_new(vm);
    let may_start = |vm: &Vm| !is_new(vm) && !vm.blocked_operations.contains_key(BLOCKED[0]);
    let marked = || machines.iter().filter(|vm| has(&vm.other_config, REPLICATING));
    // Ours is named by the run until it is itself; one that somebody took meanwhile is neither.
    for snapshot in
        marked().filter(|vm| vm.is_a_snapshot && (vm.name_label == mark || is_itself(&vm.uuid, &vm.other_config)))
    {
        destroy_with_disks(pool, snapshot, |vdi| vdi.is_a_snapshot)?;
    }
    for machine in marked().filter(|vm| !vm.is_a_snapshot && is_ours(vm)) {
        let of_it = machines.iter().filter(|version| version.is_a_snapshot && version.snapshot_of == machine.reference);
        let whole: Vec<&Record<Vm>> = of_it.filter(|version| marks::number_of(version).is_some()).collect();
        let newest = whole.iter().max_by_key(|version| marks::number_of(version));
        let is_finished = whole.iter().any(|version| has(&version.other_config, RUN));
        match newest {
            _ if is_finished || machine.power_state != "Halted" => {}
            None if may_start(machine) => {}
            None => {
                let is_new = |vdi: &Vdi| has(&vdi.other_config, REPLICATING) && !vdi.is_a_snapshot;
                destroy_with_disks(pool, machine, is_new)?;
                continue;
            }
            Some(version) => set_back(pool, machine, version, |vdi| has(&vdi.other_config, REPLICATING))?,
        }
        pool.remove_entry(&machine.reference, "other_config", REPLICATING)?;
    }
    for disk in pool.records::<Vdi>()? {
        let entries = &disk.other_config;
        for entry in [REPLICATING, CLONING, REPLACED].into_iter().filter(|entry| has(entries, entry)) {
            // A clone bears the uuid of what it was made of until it has entries of its own.
            let is_ours = entry == CLONING || entries.get(SELF).is_none_or(|_| is_itself(&disk.uuid, entries));
            if is_ours && !disk.is_a_snapshot && !is_of_a_machine(pool, &disk, &[])? {
                pool.destroy_vdi(&disk.reference)?;
                break;
            }
            unless_gone(pool.remove_entry(&disk.reference, "other_config", entry))?;
        }
    }
    Ok(())
}

/// Destroys a machine, and those of its disks that `is_meant` says.
///
/// # Errors
/// What the pool says.
pub fn destroy_with_disks(pool: &Pool, vm: &Record<Vm>, is_meant: impl Fn(&Vdi) -> bool) -> Result<()> {
    let devices: Vec<Record<Vbd>> = pool.records_of(&vm.vbds)?;
    let disks = devices.iter().filter(|device| is_disk(device)).map(|device| &device.vdi);
    let disks: Vec<Record<Vdi>> = pool.records_of(disks)?;
    pool.destroy_vm(&vm.reference)?;
    for disk in disks.iter().filter(|disk| is_meant(disk)) {
        pool.destroy_vdi(&disk.reference)?;
    }
    Ok(())
}

/// Gives a machine the disks again that its newest snapshot was taken of, in the place of those that `is_new`.
fn set_back(pool: &Pool, machine: &Record<Vm>, version: &Vm, is_new: impl Fn(&Vdi) -> bool) -> Result<()> {
    for device in pool.records_of::<Vbd>(&machine.vbds)?.iter().filter(|device| is_disk(device)) {
        let vdi: Record<Vdi> = pool.record(&device.vdi)?;
        if is_new(&vdi) {
            pool.destroy_vbd(&device.reference)?;
        }
    }
    let mut devices: Vec<Map<String, Value>> = Vec::new();
    for device in pool.records_of::<Vbd>(&version.vbds)?.into_iter().filter(is_disk) {
        let of: Ref<Vdi> = pool.field(&device.vdi, "snapshot_of")?;
        let mut fields = device.raw;
        fields.insert("VM".to_owned(), json!(machine.reference));
        fields.insert("VDI".to_owned(), json!(of));
        devices.push(fields);
    }
    attach_again(pool, &machine.reference, &devices)
}

/// Takes an object that does not exist for one without the entry.
fn unless_gone(done: xapi::Result<()>) -> Result<()> {
    match done {
        Err(error) if error.is_gone() => Ok(()),
        done => Ok(done?),
    }
}
