//! Snapshots, clones and copies of machines.
//!
//! Disks are taken one after the other, and what was taken goes again when one fails. Source: xen-api
//! `ocaml/xapi/xapi_vm_clone.ml`, `xapi_vm_snapshot.ml`.

use super::machine::copy_devices;
use super::{Method, lifecycle, tpm};
use crate::event;
use crate::failure::Outcome;
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
    Method::new("VM.clone", &[argument("vm", Reference), argument("new_name", Text)], |call, arguments| {
        duplicate(call, arguments, "clone", &Way::Clone)
    }),
    Method::new(
        "VM.copy",
        &[argument("vm", Reference), argument("new_name", Text), argument("sr", Reference)],
        |call, arguments| {
            let sr = arguments.reference(2);
            // Without an SR each disk's own.
            let way = Way::Copy(Some(sr).filter(|sr| !sr.is_null() && !sr.as_str().is_empty()));
            duplicate(call, arguments, "copy", &way)
        },
    ),
];

/// How a machine and its disks are taken.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Way {
    Snapshot,
    /// A snapshot with memory.
    Checkpoint,
    Clone,
    /// With disks of their own, on this SR or each on its own.
    Copy(Option<value::Reference>),
}

impl Way {
    fn is_snapshot(&self) -> bool {
        matches!(self, Way::Snapshot | Way::Checkpoint)
    }

    fn take(&self, state: &mut State, vdi: &value::Reference) -> Outcome<value::Reference> {
        match self {
            Way::Snapshot | Way::Checkpoint => state.branch_vdi(vdi, true),
            Way::Clone => state.branch_vdi(vdi, false),
            Way::Copy(Some(sr)) => state.copy_vdi(vdi, sr),
            Way::Copy(None) => {
                let sr = state.store.reference(Class::Vdi, vdi, "SR")?;
                state.copy_vdi(vdi, &sr)
            }
        }
    }
}

fn take(call: &Call, arguments: &Arguments, has_memory: bool) -> Outcome<Value> {
    let (vm, name) = (arguments.reference(0), arguments.text(1));
    let (way, operation) = if has_memory { (Way::Checkpoint, "checkpoint") } else { (Way::Snapshot, "snapshot") };
    let ignored = arguments.texts(2);
    let _running = call.world.log.begin(Activity::Snapshot);
    let task = call.operation();
    let time = {
        let mut access = call.world.lock();
        lifecycle::begin(&mut access, &vm, &task, operation)?;
        access.settings.snapshot_time
    };
    if !time.is_zero() {
        call.world.pause(time);
    }
    let mut access = call.world.lock();
    let outcome = copy(&mut access, &vm, name, &way, &ignored);
    // It may have been destroyed meanwhile; then it has failed above.
    lifecycle::end(&mut access, &vm, &task);
    Ok(outcome?.into())
}

fn duplicate(call: &Call, arguments: &Arguments, operation: &str, way: &Way) -> Outcome<Value> {
    let vm = arguments.reference(0);
    let mut access = call.world.lock();
    lifecycle::check(&access, &vm, operation)?;
    Ok(copy(&mut access, &vm, arguments.text(1), way, &[])?.into())
}

fn copy(
    state: &mut State,
    vm: &value::Reference,
    name: &str,
    way: &Way,
    ignored: &[&str],
) -> Outcome<value::Reference> {
    let mut disks = BTreeMap::new();
    for vbd in state.store.references(Class::Vm, vm, "VBDs")? {
        let vdi = state.store.reference(Class::Vbd, &vbd, "VDI")?;
        let is_disk = state.store.text(Class::Vbd, &vbd, "type")? == "Disk";
        if !is_disk || vdi.is_null() || ignored.contains(&vdi.as_str()) || disks.contains_key(&vdi) {
            continue;
        }
        match way.take(state, &vdi) {
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
    let image = state.store.reference(Class::Vm, vm, "suspend_VDI")?;
    let image = match (way, image.is_null()) {
        (Way::Checkpoint, true) if power_state == "Running" => suspend_image(state, vm)?.into(),
        (Way::Snapshot, _) | (_, true) => value::NULL.into(),
        (_, false) => way.take(state, &image)?.into(),
    };
    let is_snapshot = way.is_snapshot();
    let metadata = if is_snapshot { event::snapshot(&record).to_json().to_string() } else { String::new() };
    let metrics = copy_metrics(state, &record["guest_metrics"]);
    let blank = Class::Vm.blank();
    let reset = [
        "uuid",
        "power_state",
        "resident_on",
        "allowed_operations",
        "current_operations",
        "VBDs",
        "VIFs",
        "VTPMs",
        "snapshots",
        "snapshot_of",
        "snapshot_time",
        "snapshot_info",
        "children",
        "blocked_operations",
        "domid",
        "appliance",
        "ha_always_run",
        "order",
        "start_delay",
        "shutdown_delay",
        "snapshot_schedule",
        "suspend_SR",
        "suspend_VDI",
        "is_control_domain",
        "is_default_template",
        "consoles",
    ];
    for field in reset {
        record.insert(field, blank[field].clone());
    }
    let was_template = record["is_a_template"] == Value::Bool(true);
    let old_name = record["name_label"].clone();
    record.insert("name_label", name.into());
    record.insert("guest_metrics", metrics);
    if let Some(Value::Map(config)) = record.get_mut("other_config") {
        config.remove("default_template");
        if was_template {
            config.entry("base_template_name".to_owned()).or_insert(old_name);
        }
        if !is_snapshot {
            config.insert("mac_seed".to_owned(), crate::random::fresh_uuid().to_string().into());
        }
    }
    record.insert("is_a_snapshot", is_snapshot.into());
    record.insert("is_a_template", (is_snapshot || was_template).into());
    record.insert("snapshot_metadata", metadata.into());
    if is_snapshot {
        record.insert("snapshot_of", vm.into());
        record.insert("snapshot_time", Value::Date(state.clock.date()));
        record.insert(
            "snapshot_info",
            map([("power-state-at-snapshot", power_state.as_str()), ("disk-snapshot-type", "crash_consistent")]),
        );
    } else {
        record.insert("parent", value::NULL.into());
    }
    // What has memory is suspended.
    let is_suspended = image != Value::from(value::NULL);
    record.insert("power_state", if is_suspended { "Suspended" } else { "Halted" }.into());
    record.insert("suspend_VDI", image);
    let copy = state.store.create(Class::Vm, record);
    if is_snapshot {
        state.store.set(Class::Vm, vm, "parent", &copy)?;
    }
    for class in [Class::Vbd, Class::Vif] {
        copy_devices(state, vm, &copy, class, &disks, !is_snapshot)?;
    }
    tpm::copy_all(state, vm, &copy)?;
    lifecycle::refresh(state, &copy);
    Ok(copy)
}

/// Returns a copy of what a machine's tools tell.
pub fn copy_metrics(state: &mut State, metrics: &Value) -> Value {
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

/// Makes the disk that a machine's memory is in, on the SR that it names for that, or the pool's default one.
///
/// # Errors
/// As [`State::create_vdi`].
pub fn suspend_image(state: &mut State, vm: &value::Reference) -> Outcome<value::Reference> {
    let memory = state.store.size(Class::Vm, vm, "memory_static_max")?.max(1 << 20);
    let own = state.store.reference(Class::Vm, vm, "suspend_SR")?;
    let sr = match state.store.find(Class::Sr, &own) {
        Some(_) => own,
        None => state.store.reference(Class::Pool, &state.pool(), "default_SR")?,
    };
    state.create_vdi(&sr, memory, [("name_label", Value::from("Suspend image")), ("type", "suspend".into())])
}
