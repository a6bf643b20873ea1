//! Snapshots and clones of machines.
//!
//! Disks are taken one after the other, and what was taken goes again when one fails. Source: xen-api
//! `ocaml/xapi/xapi_vm_clone.ml`, `xapi_vm_snapshot.ml`.

use super::Method;
use super::machine::{check_blocked, copy_devices};
use crate::failure::{Failure, Outcome};
use crate::log::Activity;
use crate::rpc::{Arguments, Call, argument, optional};
use crate::schema::Class;
use crate::schema::Kind::{Reference, Set, Text};
use crate::value::{self, Value, map};
use crate::world::State;
use std::collections::BTreeMap;

pub(super) const METHODS: &[Method] = &[
    Method::new(
        "VM.snapshot",
        &[argument("vm", Reference), argument("new_name", Text), optional("ignore_vdis", Set)],
        |call, arguments| take(call, arguments, false),
    ),
    Method::new("VM.checkpoint", &[argument("vm", Reference), argument("new_name", Text)], |call, arguments| {
        take(call, arguments, true)
    }),
    Method::new("VM.clone", &[argument("vm", Reference), argument("new_name", Text)], clone),
];

fn take(call: &Call, arguments: &Arguments, has_memory: bool) -> Outcome<Value> {
    let (vm, name) = (arguments.reference(0), arguments.text(1));
    let operation = if has_memory { "checkpoint" } else { "snapshot" };
    let ignored = arguments.texts(2);
    let _running = call.world.log.begin(Activity::Snapshot);
    let time = {
        let mut access = call.world.lock();
        check_blocked(&access, &vm, operation)?;
        if access.store.flag(Class::Vm, &vm, "is_a_snapshot")? {
            return Err(Failure::new("VM_IS_SNAPSHOT", [vm.as_str(), operation]));
        }
        if access.store.flag(Class::Vm, &vm, "is_a_template")? {
            return Err(Failure::new("VM_IS_TEMPLATE", [vm.as_str(), operation]));
        }
        if has_memory && access.store.text(Class::Vm, &vm, "power_state")? != "Running" {
            let state = access.store.text(Class::Vm, &vm, "power_state")?;
            return Err(Failure::power_state(&vm, "Running", state));
        }
        access.store.set(Class::Vm, &vm, "current_operations", map([(call.operation(), operation)]))?;
        access.settings.snapshot_time
    };
    if !time.is_zero() {
        call.world.pause(time);
    }
    let mut access = call.world.lock();
    let outcome = copy(&mut access, &vm, name, true, &ignored, has_memory);
    // It may have been destroyed meanwhile; then it has failed above.
    let _gone = access.store.set(Class::Vm, &vm, "current_operations", Value::Map(BTreeMap::new()));
    Ok(outcome?.into())
}

fn clone(call: &Call, arguments: &Arguments) -> Outcome<Value> {
    let vm = arguments.reference(0);
    let mut access = call.world.lock();
    check_blocked(&access, &vm, "clone")?;
    let state = access.store.text(Class::Vm, &vm, "power_state")?;
    if state != "Halted" {
        return Err(Failure::power_state(&vm, "Halted", state));
    }
    Ok(copy(&mut access, &vm, arguments.text(1), false, &[], false)?.into())
}

fn copy(
    state: &mut State,
    vm: &value::Reference,
    name: &str,
    is_snapshot: bool,
    ignored: &[&str],
    has_memory: bool,
) -> Outcome<value::Reference> {
    let mut disks = BTreeMap::new();
    for vbd in state.store.references(Class::Vm, vm, "VBDs")? {
        let vdi = state.store.reference(Class::Vbd, &vbd, "VDI")?;
        let is_disk = state.store.text(Class::Vbd, &vbd, "type")? == "Disk";
        if !is_disk || vdi.is_null() || ignored.contains(&vdi.as_str()) || disks.contains_key(&vdi) {
            continue;
        }
        match state.branch_vdi(&vdi, is_snapshot) {
            Ok(branch) => disks.insert(vdi, branch),
            Err(failure) => {
                for branch in disks.values() {
                    // Nobody knows of it yet.
                    let _kept = state.destroy_vdi(branch);
                }
                return Err(failure);
            }
        };
    }
    let mut record = state.store.object(Class::Vm, vm)?.record.clone();
    let power_state = record["power_state"].as_text().unwrap_or_default().to_owned();
    let metrics = copy_metrics(state, &record["guest_metrics"]);
    let blank = Class::Vm.blank();
    let reset = [
        "uuid",
        "power_state",
        "resident_on",
        "current_operations",
        "VBDs",
        "VIFs",
        "VTPMs",
        "snapshots",
        "children",
        "blocked_operations",
        "domid",
        "ha_always_run",
        "order",
        "start_delay",
        "shutdown_delay",
        "suspend_VDI",
        "is_control_domain",
        "consoles",
    ];
    for field in reset {
        record.insert(field, blank[field].clone());
    }
    record.insert("name_label", name.into());
    record.insert("guest_metrics", metrics);
    if let Some(Value::Map(config)) = record.get_mut("other_config") {
        config.remove("default_template");
        if !is_snapshot {
            config.insert("mac_seed".to_owned(), crate::random::fresh_uuid().to_string().into());
        }
    }
    let time = state.clock.date();
    record.insert("is_a_snapshot", is_snapshot.into());
    record.insert("snapshot_of", if is_snapshot { vm.into() } else { blank["snapshot_of"].clone() });
    record.insert("is_a_template", is_snapshot.into());
    record.insert("is_default_template", false.into());
    if is_snapshot {
        record.insert("snapshot_time", Value::Date(time));
        record.insert(
            "snapshot_info",
            map([("power-state-at-snapshot", power_state.as_str()), ("disk-snapshot-type", "crash_consistent")]),
        );
    }
    if has_memory {
        record.insert("power_state", "Suspended".into());
        record.insert("suspend_VDI", suspend_image(state, vm)?.into());
    }
    let copy = state.store.create(Class::Vm, record);
    if is_snapshot {
        state.store.set(Class::Vm, vm, "parent", &copy)?;
    }
    copy_devices(state, vm, &copy, &disks, !is_snapshot)?;
    Ok(copy)
}

fn copy_metrics(state: &mut State, metrics: &Value) -> Value {
    let known = metrics.as_text().map(value::Reference::from);
    let record = known.and_then(|known| Some(state.store.find(Class::GuestMetrics, &known)?.record.clone()));
    match record {
        Some(mut record) => {
            record.insert("uuid", Value::void());
            state.store.create(Class::GuestMetrics, record).into()
        }
        None => value::NULL.into(),
    }
}

/// Makes the disk that a checkpoint's memory is in, on the pool's default SR.
fn suspend_image(state: &mut State, vm: &value::Reference) -> Outcome<value::Reference> {
    let memory = state.store.size(Class::Vm, vm, "memory_static_max")?.max(1 << 20);
    let sr = state.store.reference(Class::Pool, &state.pool(), "default_SR")?;
    state.create_vdi(&sr, memory, [("name_label", Value::from("Suspend image")), ("type", "suspend".into())])
}
