//! A machine becomes again what a snapshot of it is.
//!
//! ```text
//! off ─► fields ─► its disks go ─► clones of the snapshot's disks come ─► interfaces, tools, TPM, power state
//! ```
//!
//! Its disks are destroyed before the clones are made, as on a real server: what fails in between leaves a machine without
//! disks. Disks that the snapshot does not have stay, attached to nothing. The clones are other VDIs; all snapshots of the old
//! one say to be of the new one. Source: xen-api `ocaml/xapi/xapi_vm_snapshot.ml`, `message_forwarding.ml`.

use super::machine::copy_devices;
use super::snapshot::copy_metrics;
use super::{Method, lifecycle, power, tpm};
use crate::failure::{Failure, Outcome};
use crate::rpc::{Arguments, Call, argument};
use crate::schema::Class;
use crate::schema::Kind::Reference;
use crate::value::{self, Value};
use crate::world::State;
use std::collections::{BTreeMap, BTreeSet};

pub(super) const METHODS: &[Method] = &[Method::new("VM.revert", &[argument("snapshot", Reference)], revert)];

/// Fields that stay as they are.
const KEPT: &[&str] = &[
    "uuid",
    "suspend_VDI",
    "power_state",
    "parent",
    "current_operations",
    "allowed_operations",
    "metrics",
    "guest_metrics",
    "resident_on",
    "domid",
    "protection_policy",
    "snapshot_schedule",
    "scheduled_to_be_resident_on",
    "tags",
    "affinity",
    "consoles",
    "VGPUs",
    "VUSBs",
    "attached_PCIs",
    "is_snapshot_from_vmpp",
];

/// What a machine has by a class of devices: their references and what disks they connect.
type Drives = Vec<(value::Reference, value::Reference)>;

fn revert(call: &Call, arguments: &Arguments) -> Outcome<Value> {
    let snapshot = arguments.reference(0);
    let mut access = call.world.lock();
    let state = &mut *access;
    let mut vm = state.store.reference(Class::Vm, &snapshot, "snapshot_of")?;
    let failed = |vm: &value::Reference| Failure::new("VM_REVERT_FAILED", [snapshot.as_str(), vm.as_str()]);
    if state.store.find(Class::Vm, &vm).is_none() {
        vm = make_anew(state, &snapshot, &vm).map_err(|_| failed(&vm))?;
    }
    lifecycle::check(state, &snapshot, "revert")?;
    let task = call.operation();
    lifecycle::begin(state, &vm, &task, "reverting")?;
    let outcome = change(state, &snapshot, &vm);
    lifecycle::end(state, &vm, &task);
    outcome?;
    Ok(Value::void())
}

fn change(state: &mut State, snapshot: &value::Reference, vm: &value::Reference) -> Outcome<()> {
    if state.store.text(Class::Vm, vm, "power_state")? != "Halted" {
        lifecycle::check(state, vm, "hard_shutdown")?;
        power::halt(state, vm)?;
    }
    take_fields(state, snapshot, vm)?;
    let Err(failure) = take_devices(state, snapshot, vm) else { return Ok(()) };
    lifecycle::rest(state, vm, "Halted")?;
    match failure.code.as_str() {
        "SR_BACKEND_FAILURE_44" | "SR_BACKEND_FAILURE_109" | "VDI_INCOMPATIBLE_TYPE" => Err(failure),
        _ => Err(Failure::new("VM_REVERT_FAILED", [snapshot.as_str(), vm.as_str()])),
    }
}

/// Makes the machine of a snapshot that was destroyed since, under its old uuid.
fn make_anew(state: &mut State, snapshot: &value::Reference, gone: &value::Reference) -> Outcome<value::Reference> {
    let uuid = metadata(state, snapshot)?.remove("uuid").ok_or_else(|| Failure::internal("uuid"))?;
    let others: Vec<value::Reference> = state
        .store
        .all(Class::Vm)
        .filter(|(_, object)| object.record["snapshot_of"] == Value::from(gone))
        .map(|(other, _)| other.clone())
        .collect();
    let vm = state.store.create(Class::Vm, [("uuid", uuid)]);
    for other in others {
        state.store.set(Class::Vm, &other, "snapshot_of", &vm)?;
    }
    Ok(vm)
}

/// Returns what the machine was when the snapshot was taken.
fn metadata(state: &State, snapshot: &value::Reference) -> Outcome<BTreeMap<String, Value>> {
    let text = state.store.text(Class::Vm, snapshot, "snapshot_metadata")?;
    let known = serde_json::from_str(text).ok().and_then(|json| Value::from_json(&json));
    known.as_ref().and_then(Value::as_map).cloned().ok_or_else(|| Failure::internal("no metadata of a snapshot"))
}

fn take_fields(state: &mut State, snapshot: &value::Reference, vm: &value::Reference) -> Outcome<()> {
    let mut metadata = metadata(state, snapshot)?;
    metadata.insert("ha_always_run".to_owned(), false.into());
    for field in Class::Vm.fields().iter().filter(|field| field.listed_by.is_none() && !KEPT.contains(&field.name)) {
        if let Some(value) = metadata.remove(field.name).and_then(|value| field.kind.admit(value)) {
            state.store.set(Class::Vm, vm, field.name, value)?;
        }
    }
    Ok(())
}

fn take_devices(state: &mut State, snapshot: &value::Reference, vm: &value::Reference) -> Outcome<()> {
    take_disks(state, snapshot, vm)?;
    for vif in state.store.references(Class::Vm, vm, "VIFs")? {
        state.store.destroy(Class::Vif, &vif);
    }
    copy_devices(state, snapshot, vm, Class::Vif, &BTreeMap::new(), false)?;
    let tools = state.store.reference(Class::Vm, vm, "guest_metrics")?;
    state.store.destroy(Class::GuestMetrics, &tools);
    let tools = state.store.value(Class::Vm, snapshot, "guest_metrics")?.clone();
    let tools = copy_metrics(state, &tools);
    state.store.set(Class::Vm, vm, "guest_metrics", tools)?;
    state.store.set(Class::Vm, vm, "parent", snapshot)?;
    for vtpm in state.store.references(Class::Vm, vm, "VTPMs")? {
        tpm::destroy(state, &vtpm);
    }
    tpm::copy_all(state, snapshot, vm)?;
    let is_suspended = state.store.text(Class::Vm, snapshot, "power_state")? == "Suspended";
    lifecycle::rest(state, vm, if is_suspended { "Suspended" } else { "Halted" })
}

fn take_disks(state: &mut State, snapshot: &value::Reference, vm: &value::Reference) -> Outcome<()> {
    let (new, _) = drives(state, snapshot)?;
    let (old, drives_of_images) = drives(state, vm)?;
    let mut sources = Vec::new();
    for (_, vdi) in &new {
        sources.push((vdi.clone(), state.store.reference(Class::Vdi, vdi, "snapshot_of")?));
    }
    let kept = |vdi: &value::Reference| !sources.iter().any(|(_, of)| of == vdi);
    for (vbd, _) in old.iter().chain(&drives_of_images) {
        state.store.destroy(Class::Vbd, vbd);
    }
    let gone: BTreeSet<_> = old.iter().map(|(_, vdi)| vdi).filter(|vdi| !kept(vdi)).collect();
    for vdi in gone {
        state.destroy_vdi(vdi)?;
    }
    let mut clones = BTreeMap::new();
    let taken = take_clones(state, snapshot, vm, &sources, &mut clones);
    if taken.is_err() {
        for clone in clones.values() {
            // Made a moment ago; nothing has it.
            let _kept = state.destroy_vdi(clone);
        }
    }
    taken
}

fn take_clones(
    state: &mut State,
    snapshot: &value::Reference,
    vm: &value::Reference,
    sources: &[(value::Reference, value::Reference)],
    clones: &mut BTreeMap<value::Reference, value::Reference>,
) -> Outcome<()> {
    for (vdi, of) in sources {
        if clones.contains_key(vdi) {
            continue;
        }
        let clone = state.branch_vdi(vdi, false)?;
        clones.insert(vdi.clone(), clone.clone());
        let relatives: Vec<value::Reference> = state
            .store
            .all(Class::Vdi)
            .filter(|(_, object)| !of.is_null() && object.record["snapshot_of"] == Value::from(of))
            .map(|(relative, _)| relative.clone())
            .collect();
        for relative in relatives {
            state.store.set(Class::Vdi, &relative, "snapshot_of", &clone)?;
        }
    }
    let image = state.store.reference(Class::Vm, snapshot, "suspend_VDI")?;
    if !image.is_null() {
        let clone = state.branch_vdi(&image, false)?;
        clones.insert(image, clone.clone());
        state.store.set(Class::Vm, vm, "suspend_VDI", &clone)?;
    }
    copy_devices(state, snapshot, vm, Class::Vbd, clones, false)
}

/// Returns a machine's VBDs with their VDIs: those of disks, and those of CDs and of nothing.
fn drives(state: &State, vm: &value::Reference) -> Outcome<(Drives, Drives)> {
    let (mut disks, mut others) = (Vec::new(), Vec::new());
    for vbd in state.store.references(Class::Vm, vm, "VBDs")? {
        let vdi = state.store.reference(Class::Vbd, &vbd, "VDI")?;
        let is_disk = state.store.text(Class::Vbd, &vbd, "type")? == "Disk" && !vdi.is_null();
        if is_disk { &mut disks } else { &mut others }.push((vbd, vdi));
    }
    Ok((disks, others))
}
