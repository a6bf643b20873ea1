//! What may be done with a machine, and when: by its power state, by what is done with it already, by what it is, and by what
//! somebody has blocked.
//!
//! The first of these reasons that applies, in this order, is the error: blocked, power state, another operation, template,
//! snapshot, control domain. `allowed_operations` says which have none; as on a real server it is what it was when something of
//! the machine was last done, and an operation that is blocked since is in it until `VM.update_allowed_operations`.
//!
//! Source: xen-api `ocaml/xapi/xapi_vm_lifecycle.ml`.

use crate::failure::{Failure, Outcome};
use crate::schema::Class;
use crate::value::{Reference, Value, map};
use crate::world::State;

const HALTED: &[&str] = &["Halted"];
const RUNNING: &[&str] = &["Running"];
const SUSPENDED: &[&str] = &["Suspended"];
const ANY: &[&str] = &["Halted", "Paused", "Suspended", "Running"];

/// Operations that clients are told of, and the power states that allow them.
const LISTED: &[(&str, &[&str])] = &[
    ("snapshot", ANY),
    ("clone", HALTED),
    ("copy", HALTED),
    ("revert", ANY),
    ("checkpoint", &["Paused", "Suspended", "Running"]),
    ("provision", HALTED),
    ("start", HALTED),
    ("start_on", HALTED),
    ("pause", RUNNING),
    ("unpause", &["Paused"]),
    ("clean_shutdown", RUNNING),
    ("clean_reboot", RUNNING),
    ("hard_shutdown", &["Paused", "Suspended", "Running"]),
    ("hard_reboot", &["Paused", "Running"]),
    ("suspend", RUNNING),
    ("resume", SUSPENDED),
    ("resume_on", SUSPENDED),
    ("pool_migrate", RUNNING),
    ("migrate_send", &["Halted", "Suspended", "Running"]),
    ("export", &["Halted", "Suspended"]),
    ("metadata_export", ANY),
    ("make_into_template", HALTED),
    ("destroy", &["Halted", "Suspended"]),
    ("changing_dynamic_range", &["Halted", "Running"]),
    ("changing_static_range", HALTED),
    ("changing_shadow_memory", HALTED),
    ("changing_NVRAM", HALTED),
    ("changing_VCPUs_live", RUNNING),
    ("create_vtpm", HALTED),
];

/// Those that they are not told of.
const UNLISTED: &[(&str, &[&str])] = &[("reverting", ANY)];

const OF_TEMPLATES: &[&str] = &[
    "changing_dynamic_range",
    "changing_static_range",
    "changing_shadow_memory",
    "changing_NVRAM",
    "clone",
    "copy",
    "export",
    "metadata_export",
    "provision",
    "destroy",
    "migrate_send",
];

const OF_SNAPSHOTS: &[&str] = &["revert", "clone", "copy", "export", "destroy", "hard_shutdown", "metadata_export"];

const OF_CONTROL_DOMAINS: &[&str] =
    &["metadata_export", "changing_dynamic_range", "changing_static_range", "start", "start_on"];

/// Operations that go on beside each other.
const TOGETHER: &[&[&str]] = &[&["clone", "copy", "export"], &["snapshot", "checkpoint"]];

/// Returns an error if an operation cannot be done with a machine now.
///
/// # Errors
/// `OPERATION_BLOCKED`, `VM_BAD_POWER_STATE`, `OTHER_OPERATION_IN_PROGRESS`, `VM_IS_TEMPLATE`, `VM_IS_SNAPSHOT` and what else a
/// real server says of it; `HANDLE_INVALID`.
pub fn check(state: &State, vm: &Reference, operation: &str) -> Outcome<()> {
    let record = &state.store.object(Class::Vm, vm)?.record;
    let is = |field: &str| record[field] == Value::Bool(true);
    let is_snapshot = is("is_a_snapshot");
    if let Some(reason) = record["blocked_operations"].as_map().and_then(|blocked| blocked.get(operation)) {
        return Err(Failure::new("OPERATION_BLOCKED", [vm.as_str(), reason.as_text().unwrap_or_default()]));
    }
    let mut expected: Vec<&str> = states(operation)?.to_vec();
    if is_snapshot && ["clone", "copy"].contains(&operation) {
        // Checkpoints.
        expected.push("Suspended");
    }
    let power_state = record["power_state"].as_text().unwrap_or_default();
    if !expected.contains(&power_state) {
        return Err(Failure::power_state(vm, &expected, power_state));
    }
    let current: Vec<(&str, &str)> = record["current_operations"]
        .as_map()
        .map(|operations| {
            operations.iter().filter_map(|(task, value)| Some((task.as_str(), value.as_text()?))).collect()
        })
        .unwrap_or_default();
    if let [(task, other), ..] = current[..]
        && !goes_beside(operation, &current)
    {
        return Err(Failure::new("OTHER_OPERATION_IN_PROGRESS", ["VM", vm.as_str(), other, task]));
    }
    if is("is_a_template") && !is_snapshot && !OF_TEMPLATES.contains(&operation) {
        return Err(Failure::new("VM_IS_TEMPLATE", [vm.as_str(), operation]));
    }
    if is_snapshot && !OF_SNAPSHOTS.contains(&operation) {
        return Err(Failure::new("VM_IS_SNAPSHOT", [vm.as_str(), operation]));
    }
    if operation == "provision" && !is("is_a_template") {
        return Err(Failure::new("PROVISION_ONLY_ALLOWED_ON_TEMPLATE", Vec::<String>::new()));
    }
    if operation == "revert" && !is_snapshot {
        return Err(Failure::new("REVERT_ONLY_ALLOWED_ON_SNAPSHOT", Vec::<String>::new()));
    }
    if is("is_control_domain") && !OF_CONTROL_DOMAINS.contains(&operation) {
        return Err(Failure::new("OPERATION_NOT_ALLOWED", ["This operation is not allowed on a control domain"]));
    }
    match record["VTPMs"].as_set().map_or(0, <[Value]>::len) {
        count if operation == "create_vtpm" && count > 0 => {
            Err(Failure::new("VTPM_MAX_AMOUNT_REACHED", [count.to_string()]))
        }
        _ => Ok(()),
    }
}

fn states(operation: &str) -> Outcome<&'static [&'static str]> {
    let known = LISTED.iter().chain(UNLISTED).find(|(name, _)| *name == operation);
    known.map(|(_, states)| *states).ok_or_else(|| Failure::internal(&format!("unknown operation: {operation}")))
}

fn goes_beside(operation: &str, current: &[(&str, &str)]) -> bool {
    let is_switched_off = || current.iter().all(|(_, other)| *other != operation);
    (operation == "hard_shutdown" && is_switched_off())
        || TOGETHER
            .iter()
            .any(|group| group.contains(&operation) && current.iter().all(|(_, other)| group.contains(other)))
}

/// Brings `allowed_operations` of a machine to what [`check`] says of each.
pub fn refresh(state: &mut State, vm: &Reference) {
    let allowed = LISTED.iter().filter(|(operation, _)| check(state, vm, operation).is_ok()).map(|(name, _)| *name);
    let allowed: Value = allowed.collect();
    if state.store.value(Class::Vm, vm, "allowed_operations").is_ok_and(|known| *known != allowed) {
        // It was there a line ago, under the same lock.
        let _gone = state.store.set(Class::Vm, vm, "allowed_operations", allowed);
    }
}

/// Notes that a task does something with a machine, if it may.
///
/// # Errors
/// As [`check`].
pub fn begin(state: &mut State, vm: &Reference, task: &str, operation: &str) -> Outcome<()> {
    check(state, vm, operation)?;
    state.store.edit(Class::Vm, vm, "current_operations", |value| match value {
        Value::Map(operations) => drop(operations.insert(task.to_owned(), operation.into())),
        other => *other = map([(task, operation)]),
    })?;
    refresh(state, vm);
    Ok(())
}

/// Notes that a task does nothing more with a machine, which may be gone.
pub fn end(state: &mut State, vm: &Reference, task: &str) {
    let ended = state.store.edit(Class::Vm, vm, "current_operations", |value| {
        if let Value::Map(operations) = value {
            operations.remove(task);
        }
    });
    if ended.is_ok() {
        refresh(state, vm);
    }
}

/// Brings a machine into a power state in which it is on no host; a halted one's devices are not attached.
///
/// # Errors
/// `HANDLE_INVALID`.
pub fn rest(state: &mut State, vm: &Reference, power_state: &'static str) -> Outcome<()> {
    state.store.set(Class::Vm, vm, "power_state", power_state)?;
    if power_state == "Halted" {
        for (list, class) in [("VBDs", Class::Vbd), ("VIFs", Class::Vif)] {
            for device in state.store.references(Class::Vm, vm, list)? {
                state.store.set(class, &device, "currently_attached", false)?;
                state.store.set(class, &device, "reserved", false)?;
            }
        }
    }
    let host = state.store.reference(Class::Vm, vm, "resident_on")?;
    if !host.is_null() {
        state.store.set(Class::Vm, vm, "resident_on", crate::value::NULL)?;
        state.store.set(Class::Vm, vm, "domid", -1_i64)?;
    }
    refresh(state, vm);
    Ok(())
}
