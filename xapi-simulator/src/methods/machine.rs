//! Machines as records: made, changed and destroyed.

use super::{Method, lifecycle, record, tpm};
use crate::failure::{Failure, Outcome};
use crate::random::fresh_uuid;
use crate::rpc::{Arguments, Call, argument};
use crate::schema::Class;
use crate::schema::Kind::{Int, Map, Record, Reference};
use crate::value::{self, Value};
use crate::world::State;
use std::collections::BTreeMap;

pub(super) const METHODS: &[Method] = &[
    Method::new("VM.create", &[argument("args", Record)], create),
    Method::new("VM.destroy", &[argument("self", Reference)], destroy),
    Method::new("VM.update_allowed_operations", &[argument("self", Reference)], |call, arguments| {
        let (vm, mut access) = (arguments.reference(0), call.world.lock());
        if !access.store.touch(Class::Vm, &vm) {
            return Err(Failure::gone(Class::Vm, vm.as_str()));
        }
        lifecycle::refresh(&mut access, &vm);
        Ok(Value::void())
    }),
    Method::new("VM.get_allowed_VBD_devices", &[argument("vm", Reference)], |call, arguments| {
        allowed_devices(call, arguments, Class::Vbd, "userdevice", "VBDs", 255)
    })
    .only_synchronous(),
    Method::new("VM.get_allowed_VIF_devices", &[argument("vm", Reference)], |call, arguments| {
        allowed_devices(call, arguments, Class::Vif, "device", "VIFs", 7)
    })
    .only_synchronous(),
    Method::new(
        "VM.set_memory_limits",
        &[
            argument("self", Reference),
            argument("static_min", Int),
            argument("static_max", Int),
            argument("dynamic_min", Int),
            argument("dynamic_max", Int),
        ],
        set_memory_limits,
    ),
    Method::new("VM.set_bios_strings", &[argument("self", Reference), argument("value", Map)], set_bios_strings),
];

/// What must be in the record of a new machine.
const REQUIRED: &[&str] = &[
    "user_version",
    "is_a_template",
    "affinity",
    "memory_static_max",
    "memory_dynamic_max",
    "memory_dynamic_min",
    "memory_static_min",
    "VCPUs_params",
    "VCPUs_max",
    "VCPUs_at_startup",
    "actions_after_shutdown",
    "actions_after_reboot",
    "actions_after_crash",
    "PV_bootloader",
    "PV_kernel",
    "PV_ramdisk",
    "PV_args",
    "PV_bootloader_args",
    "PV_legacy_args",
    "HVM_boot_policy",
    "HVM_boot_params",
    "platform",
    "PCI_bus",
    "other_config",
    "recommendations",
];

/// What may be in it.
const OPTIONAL: &[&str] = &[
    "name_label",
    "name_description",
    "HVM_shadow_multiplier",
    "actions_after_softreboot",
    "xenstore_data",
    "ha_always_run",
    "ha_restart_priority",
    "tags",
    "blocked_operations",
    "is_snapshot_from_vmpp",
    "snapshot_schedule",
    "is_vmss_snapshot",
    "appliance",
    "start_delay",
    "shutdown_delay",
    "order",
    "suspend_SR",
    "suspend_VDI",
    "version",
    "generation_id",
    "hardware_platform_version",
    "has_vendor_device",
    "reference_label",
    "domain_type",
    "NVRAM",
    "last_booted_record",
    "last_boot_CPU_flags",
    "power_state",
];

fn create(call: &Call, arguments: &Arguments) -> Outcome<Value> {
    let mut fields = record(Class::Vm, arguments.entries(0), REQUIRED, OPTIONAL)?;
    check_memory(&fields)?;
    let power_state = fields.get("power_state").and_then(Value::as_text).unwrap_or("Halted");
    if power_state != "Halted" && power_state != "Suspended" {
        return Err(Failure::new("VALUE_NOT_SUPPORTED", ["power_state", power_state, "only Halted and Suspended"]));
    }
    if let Some(Value::Map(config)) = fields.get_mut("other_config") {
        config.entry("mac_seed".to_owned()).or_insert_with(|| fresh_uuid().to_string().into());
    }
    let mut access = call.world.lock();
    let vm = access.store.create(Class::Vm, fields);
    lifecycle::refresh(&mut access, &vm);
    Ok(vm.into())
}

fn check_memory(fields: &BTreeMap<&'static str, Value>) -> Outcome<()> {
    let limits: Vec<i64> = ["memory_static_min", "memory_dynamic_min", "memory_dynamic_max", "memory_static_max"]
        .iter()
        .filter_map(|field| match fields.get(field) {
            Some(Value::Int(bytes)) => Some(*bytes),
            _ => None,
        })
        .collect();
    match limits.is_sorted() && limits.first().is_some_and(|least| *least >= 0) {
        true => Ok(()),
        false => Err(Failure::new(
            "MEMORY_CONSTRAINT_VIOLATION",
            ["Memory limits must satisfy: static_min <= dynamic_min <= dynamic_max <= static_max"],
        )),
    }
}

fn set_memory_limits(call: &Call, arguments: &Arguments) -> Outcome<Value> {
    let fields = BTreeMap::from([
        ("memory_static_min", Value::Int(arguments.number(1))),
        ("memory_static_max", Value::Int(arguments.number(2))),
        ("memory_dynamic_min", Value::Int(arguments.number(3))),
        ("memory_dynamic_max", Value::Int(arguments.number(4))),
    ]);
    check_memory(&fields)?;
    let mut access = call.world.lock();
    for (field, value) in fields {
        access.store.set(Class::Vm, &arguments.reference(0), field, value)?;
    }
    Ok(Value::void())
}

/// The strings that a machine has unless somebody says otherwise, and whether that can be said.
///
/// Source: xen-api `ocaml/xapi-consts/constants.ml`.
const BIOS_STRINGS: &[(&str, &str, bool)] = &[
    ("bios-vendor", "Xen", true),
    ("bios-version", "", true),
    ("system-manufacturer", "Xen", true),
    ("system-product-name", "HVM domU", true),
    ("system-version", "", true),
    ("system-serial-number", "", true),
    ("baseboard-manufacturer", "", true),
    ("baseboard-product-name", "", true),
    ("baseboard-version", "", true),
    ("baseboard-serial-number", "", true),
    ("baseboard-asset-tag", "", true),
    ("baseboard-location-in-chassis", "", true),
    ("enclosure-asset-tag", "", true),
    ("hp-rombios", "", false),
    ("oem-1", "Xen", false),
    ("oem-2", "MS_VM_CERT/SHA1/bdbeb6e0a816d43fa6d3fe8aaef04c2bad9d3e3d", false),
];

/// The longest BIOS string, in bytes.
const LONGEST_BIOS_STRING: usize = 512;

fn set_bios_strings(call: &Call, arguments: &Arguments) -> Outcome<Value> {
    let (vm, mut given) = (arguments.reference(0), arguments.entries(1));
    let mut access = call.world.lock();
    if access.store.value(Class::Vm, &vm, "bios_strings")?.as_map().is_some_and(|known| !known.is_empty()) {
        return Err(Failure::new("VM_BIOS_STRINGS_ALREADY_SET", Vec::<String>::new()));
    }
    for (key, value) in &given {
        let value = value.as_text().unwrap_or_default();
        let wrong = if !BIOS_STRINGS.iter().any(|(known, _, can_be_set)| known == key && *can_be_set) {
            "Unknown key".to_owned()
        } else if value.is_empty() {
            "Value provided is empty".to_owned()
        } else if value.len() > LONGEST_BIOS_STRING {
            format!("{value} has length more than {LONGEST_BIOS_STRING} characters")
        } else if !value.bytes().all(|byte| (32..127).contains(&byte)) {
            format!("{value} has non-printable ASCII characters")
        } else {
            continue;
        };
        return Err(Failure::new("INVALID_VALUE", [key.as_str(), &wrong]));
    }
    let strings = BIOS_STRINGS
        .iter()
        .map(|(key, usual, _)| ((*key).to_owned(), given.remove(*key).unwrap_or_else(|| (*usual).into())));
    let strings = Value::Map(strings.collect());
    access.store.set(Class::Vm, &vm, "bios_strings", strings)?;
    Ok(Value::void())
}

fn destroy(call: &Call, arguments: &Arguments) -> Outcome<Value> {
    let vm = arguments.reference(0);
    let mut access = call.world.lock();
    lifecycle::check(&access, &vm, "destroy")?;
    remove(&mut access, &vm)?;
    Ok(Value::void())
}

/// Removes a machine and all that is nothing without it, but no disk.
pub fn remove(state: &mut State, vm: &value::Reference) -> Outcome<()> {
    for (list, class) in [("VBDs", Class::Vbd), ("VIFs", Class::Vif)] {
        for device in state.store.references(Class::Vm, vm, list)? {
            state.store.destroy(class, &device);
        }
    }
    for vtpm in state.store.references(Class::Vm, vm, "VTPMs")? {
        tpm::destroy(state, &vtpm);
    }
    let metrics = state.store.reference(Class::Vm, vm, "guest_metrics")?;
    state.store.destroy(Class::GuestMetrics, &metrics);
    let image = state.store.reference(Class::Vm, vm, "suspend_VDI")?;
    if !image.is_null() {
        // Somebody may look at it; then it stays.
        let _kept = state.destroy_vdi(&image);
    }
    state.store.destroy(Class::Vm, vm);
    Ok(())
}

/// Gives a machine VBDs or VIFs like those of another, with other disks.
///
/// # Errors
/// `HANDLE_INVALID`.
pub fn copy_devices(
    state: &mut State,
    from: &value::Reference,
    to: &value::Reference,
    class: Class,
    disks: &BTreeMap<value::Reference, value::Reference>,
    with_new_macs: bool,
) -> Outcome<()> {
    let list = if class == Class::Vbd { "VBDs" } else { "VIFs" };
    for device in state.store.references(Class::Vm, from, list)? {
        let mut record = state.store.object(class, &device)?.record.clone();
        if class == Class::Vbd {
            if record["type"].as_text() == Some("Disk") {
                let disk = record["VDI"].as_text().map(value::Reference::from);
                match disk.and_then(|disk| disks.get(&disk)) {
                    Some(copy) => record.insert("VDI", copy.into()),
                    None => continue,
                };
                if let Some(Value::Map(config)) = record.get_mut("other_config") {
                    // Who destroys the machine destroys the disk.
                    config.entry("owner".to_owned()).or_insert_with(Value::void);
                }
            }
            record.insert("device", Value::void());
        }
        record.insert("uuid", Value::void());
        record.insert("VM", to.into());
        record.insert("currently_attached", false.into());
        record.insert("reserved", false.into());
        record.insert("current_operations", Value::Map(BTreeMap::new()));
        if with_new_macs && class == Class::Vif {
            record.insert("MAC", new_mac().into());
            record.insert("MAC_autogenerated", true.into());
        }
        state.store.create(class, record);
    }
    Ok(())
}

/// Returns a MAC address that is administered locally.
pub fn new_mac() -> String {
    let [_, b, c, d, e, f, ..] = *fresh_uuid().as_bytes();
    format!("02:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{f:02x}")
}

fn allowed_devices(
    call: &Call,
    arguments: &Arguments,
    class: Class,
    field: &str,
    list: &'static str,
    count: u32,
) -> Outcome<Value> {
    let access = call.world.lock();
    let mut taken = Vec::new();
    for device in access.store.references(Class::Vm, &arguments.reference(0), list)? {
        taken.push(access.store.text(class, &device, field)?.to_owned());
    }
    Ok((0..count).map(|number| number.to_string()).filter(|number| !taken.contains(number)).collect())
}
