//! The records that a restore hands to a pool, made of those that the backup has: pure.
//!
//! What XO sends, less what refers to objects of the pool that it was backed up from (`affinity`, `appliance`, `suspend_SR`,
//! `snapshot_schedule`) and what storages keep for themselves (`sm_config`, `xenstore_data` of a disk). Fields that the backup
//! does not have are XAPI's own to fill. Source: XO, `@xen-orchestra/xapi/vm.mjs`, `vdi.mjs`, `vbd.mjs`, `vif.mjs`.

use serde_json::{Value, json};

use super::document::{Fields, flag, list, number, text, texts};
use crate::pool::error::{Error, ErrorKind, Result};
use crate::pool::keys;

/// Nothing.
const NULL: &str = "OpaqueRef:NULL";
/// What what is being restored says of itself, from its creation until it is whole: by which run, and whose.
pub const RESTORING: &str = "xofs:restoring";
/// What the names of what is being restored begin with.
pub const PROVISIONAL: &str = "[restoring] ";
/// Which backup a VM or a disk was restored from.
pub const RESTORED_FROM: &str = "xofs:restored-from";
/// The tag that XO gives to what it restores.
pub const TAG: &str = "restored from backup";
/// Operations that are blocked until all disks are there.
pub const BLOCKED: [&str; 2] = ["start", "start_on"];
/// Why.
pub const BLOCKED_BECAUSE: &str = "its disks are being restored";
/// Why XO blocks migration during a backup; so it stands in the backup (`_AbstractXapi.mjs`).
const BLOCKED_BY_XO: &str = "VM migration is blocked during backup";
/// From it XAPI makes the MACs of new interfaces.
pub const MAC_SEED: &str = "mac_seed";

/// Prefixes of entries of `other_config` that belong to backups and replicas, not to what is restored of them.
const OF_BACKUPS: [&str; 4] = ["xo:backup:", "xo:base_delta", "xo:copy_of", keys::PREFIX];

/// Fields of a VM that are texts.
const TEXTS: [&str; 17] = [
    "name_description",
    "actions_after_crash",
    "actions_after_reboot",
    "actions_after_shutdown",
    "HVM_boot_policy",
    "PCI_bus",
    "PV_args",
    "PV_bootloader",
    "PV_bootloader_args",
    "PV_kernel",
    "PV_legacy_args",
    "PV_ramdisk",
    "recommendations",
    "domain_type",
    "generation_id",
    "ha_restart_priority",
    "reference_label",
];
/// Fields that are numbers.
const NUMBERS: [&str; 12] = [
    "memory_static_min",
    "memory_static_max",
    "memory_dynamic_min",
    "memory_dynamic_max",
    "VCPUs_at_startup",
    "VCPUs_max",
    "user_version",
    "order",
    "start_delay",
    "shutdown_delay",
    "version",
    "hardware_platform_version",
];
/// Fields that are maps of texts.
const MAPS: [&str; 5] = ["HVM_boot_params", "platform", "VCPUs_params", "NVRAM", "xenstore_data"];
/// The entries that `VM.set_bios_strings` takes (xen-api: `ocaml/xapi-consts/constants.ml`).
const BIOS_STRINGS: [&str; 13] = [
    "baseboard-asset-tag",
    "baseboard-location-in-chassis",
    "baseboard-manufacturer",
    "baseboard-product-name",
    "baseboard-serial-number",
    "baseboard-version",
    "bios-vendor",
    "bios-version",
    "enclosure-asset-tag",
    "system-manufacturer",
    "system-product-name",
    "system-serial-number",
    "system-version",
];

/// What marks what is made, until it is whole and for ever.
#[derive(Debug, Clone)]
pub struct Mark {
    /// The value of [`RESTORING`].
    pub restoring: String,
    /// The backup, as `uuid/time`.
    pub from: String,
}

/// Returns the record of the VM to be made, called `name`, which cannot be started yet.
///
/// # Errors
/// [`ErrorKind::Backup`] if the backup does not say what memory and how many processors it had.
pub fn machine(vm: &Fields, name: &str, mark: &Mark, keeps_macs: bool) -> Result<Fields> {
    let mut made = settings(vm)?;
    let mut tags = list(vm, "tags").unwrap_or_default();
    if !tags.iter().any(|tag| tag == TAG) {
        tags.push(json!(TAG));
    }
    // What was blocked before comes back once it is whole: `destroy` would keep what fails from being removed.
    let blocked: Fields = BLOCKED.iter().map(|operation| ((*operation).to_owned(), json!(BLOCKED_BECAUSE))).collect();
    let mut other_config = other_config(vm, mark);
    if !keeps_macs {
        other_config.remove(MAC_SEED);
    }
    for (field, value) in [
        ("name_label", json!(format!("{PROVISIONAL}{name}"))),
        ("tags", Value::Array(tags)),
        ("blocked_operations", Value::Object(blocked)),
        ("other_config", Value::Object(other_config)),
    ] {
        made.insert(field.to_owned(), value);
    }
    Ok(made)
}

/// Returns the record of a VM like another: all of it but its name, tags, entries, and what is blocked.
///
/// # Errors
/// [`ErrorKind::Backup`] if nothing says what memory and how many processors it had.
pub fn settings(vm: &Fields) -> Result<Fields> {
    let mut made = Fields::new();
    for field in TEXTS {
        copy(&mut made, field, text(vm, field).map(Value::from));
    }
    for field in NUMBERS {
        copy(&mut made, field, number(vm, field).map(Value::from));
    }
    for field in MAPS {
        copy(&mut made, field, texts(vm, field).map(Value::Object));
    }
    copy(&mut made, "has_vendor_device", flag(vm, "has_vendor_device").map(Value::from));
    made.insert("affinity".to_owned(), json!(NULL));
    made.insert("is_a_template".to_owned(), json!(false));
    // A float, which servers misread without decimals: left out where it is what it is without.
    if let Some(multiplier) =
        vm.get("HVM_shadow_multiplier").and_then(Value::as_f64).filter(|value| value.fract() != 0.0)
    {
        made.insert("HVM_shadow_multiplier".to_owned(), json!(multiplier));
    }
    for needed in ["memory_static_max", "VCPUs_max"] {
        if number(&made, needed).is_none_or(|number| number <= 0) {
            let message = format!(
                "the metadata of the backup does not say '{needed}' of the VM: only its disks can be restored (--disk)"
            );
            return Err(Error::new(ErrorKind::Backup, message));
        }
    }
    fill(&mut made);
    Ok(made)
}

/// Returns the operations that were blocked, and why, without those that XO blocks for the time of a backup.
#[must_use]
pub fn blocked(vm: &Fields) -> Fields {
    let mut blocked = texts(vm, "blocked_operations").unwrap_or_default();
    blocked.retain(|_, reason| reason != BLOCKED_BY_XO);
    blocked
}

/// Fills what XAPI insists on and the backup does not say.
fn fill(made: &mut Fields) {
    let of = |made: &Fields, field: &str| made.get(field).cloned().unwrap_or_default();
    let (memory, processors) = (of(made, "memory_static_max"), of(made, "VCPUs_max"));
    let defaults = [
        ("memory_static_min", json!(0)),
        ("memory_dynamic_min", memory.clone()),
        ("memory_dynamic_max", memory),
        ("VCPUs_at_startup", processors),
        ("VCPUs_params", json!({})),
        ("user_version", json!(1)),
        ("actions_after_crash", json!("restart")),
        ("actions_after_reboot", json!("restart")),
        ("actions_after_shutdown", json!("destroy")),
        ("HVM_boot_params", json!({})),
        ("HVM_boot_policy", json!("")),
        ("platform", json!({})),
        ("PCI_bus", json!("")),
        ("PV_args", json!("")),
        ("PV_bootloader", json!("")),
        ("PV_bootloader_args", json!("")),
        ("PV_kernel", json!("")),
        ("PV_legacy_args", json!("")),
        ("PV_ramdisk", json!("")),
        ("recommendations", json!("")),
    ];
    for (field, value) in defaults {
        made.entry(field).or_insert(value);
    }
}

/// Returns what `VM.set_bios_strings` is given; `None` if there is nothing.
#[must_use]
pub fn bios_strings(vm: &Fields) -> Option<Fields> {
    let mut strings = texts(vm, "bios_strings")?;
    strings.retain(|key, value| BIOS_STRINGS.contains(&key.as_str()) && value != "");
    (!strings.is_empty()).then_some(strings)
}

/// Returns the record of a disk to be made of `size` bytes.
#[must_use]
pub fn disk(vdi: &Fields, sr: &str, size: u64, mark: &Mark) -> Fields {
    let mut made = Fields::new();
    copy(&mut made, "name_description", text(vdi, "name_description").map(Value::from));
    copy(&mut made, "tags", list(vdi, "tags").map(Value::Array));
    let kind = text(vdi, "type").filter(|kind| matches!(*kind, "system" | "ephemeral")).unwrap_or("user");
    for (field, value) in [
        ("name_label", json!(format!("{PROVISIONAL}{}", disk_name(vdi)))),
        ("SR", json!(sr)),
        ("virtual_size", json!(size)),
        ("type", json!(kind)),
        ("sharable", json!(flag(vdi, "sharable").unwrap_or(false))),
        // Nothing could be written to it: set once it is whole.
        ("read_only", json!(false)),
        ("other_config", Value::Object(other_config(vdi, mark))),
    ] {
        made.insert(field.to_owned(), value);
    }
    made
}

/// Returns the name that a disk has in the pool.
#[must_use]
pub fn disk_name(vdi: &Fields) -> &str {
    text(vdi, "name_label").unwrap_or_default()
}

/// Returns the record of what connects a disk to a VM, at `place` if the backup does not say where it was.
#[must_use]
pub fn device(vbd: &Fields, vm: &str, vdi: &str, place: &str) -> Fields {
    let mut made = Fields::new();
    let mode = text(vbd, "mode").filter(|mode| *mode == "RO").unwrap_or("RW");
    let place = text(vbd, "userdevice").filter(|place| !place.is_empty()).unwrap_or(place);
    for (field, value) in [
        ("VM", json!(vm)),
        ("VDI", json!(vdi)),
        ("userdevice", json!(place)),
        ("bootable", json!(flag(vbd, "bootable").unwrap_or(false))),
        ("mode", json!(mode)),
        ("type", json!("Disk")),
        ("unpluggable", json!(flag(vbd, "unpluggable").unwrap_or(true))),
        ("empty", json!(false)),
        ("other_config", json!(texts(vbd, "other_config").unwrap_or_default())),
        ("qos_algorithm_type", json!(text(vbd, "qos_algorithm_type").unwrap_or_default())),
        ("qos_algorithm_params", json!(texts(vbd, "qos_algorithm_params").unwrap_or_default())),
    ] {
        made.insert(field.to_owned(), value);
    }
    made
}

/// Returns the record of an interface to be made; an empty `mac` has the pool make one.
#[must_use]
pub fn interface(vif: &Fields, vm: &str, network: &str, mac: &str, mtu: i64) -> Fields {
    let mut made = Fields::new();
    let mode = text(vif, "locking_mode").unwrap_or("network_default");
    for (field, value) in [
        ("VM", json!(vm)),
        ("network", json!(network)),
        ("device", json!(text(vif, "device").unwrap_or("0"))),
        ("MAC", json!(mac)),
        ("MTU", json!(number(vif, "MTU").filter(|mtu| *mtu > 0).unwrap_or(mtu))),
        ("locking_mode", json!(mode)),
        ("ipv4_allowed", json!(list(vif, "ipv4_allowed").unwrap_or_default())),
        ("ipv6_allowed", json!(list(vif, "ipv6_allowed").unwrap_or_default())),
        ("other_config", json!(texts(vif, "other_config").unwrap_or_default())),
        ("qos_algorithm_type", json!(text(vif, "qos_algorithm_type").unwrap_or_default())),
        ("qos_algorithm_params", json!(texts(vif, "qos_algorithm_params").unwrap_or_default())),
    ] {
        made.insert(field.to_owned(), value);
    }
    made
}

/// Returns the entries of an object without those of backups, marked.
pub fn other_config(fields: &Fields, mark: &Mark) -> Fields {
    let mut entries = texts(fields, "other_config").unwrap_or_default();
    entries.retain(|key, _| !is_of_backups(key));
    entries.insert(RESTORING.to_owned(), json!(mark.restoring));
    entries.insert(RESTORED_FROM.to_owned(), json!(mark.from));
    entries
}

/// Whether an entry of `other_config` belongs to backups.
#[must_use]
pub fn is_of_backups(key: &str) -> bool {
    OF_BACKUPS.iter().any(|prefix| key.starts_with(prefix))
}

fn copy(made: &mut Fields, field: &str, value: Option<Value>) {
    if let Some(value) = value {
        made.insert(field.to_owned(), value);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fields(value: Value) -> Fields {
        match value {
            Value::Object(fields) => fields,
            _ => panic!("an object was expected"),
        }
    }

    fn mark() -> Mark {
        Mark { restoring: "run keeper".into(), from: "uuid/time".into() }
    }

    #[test]
    fn a_vm_is_made_as_it_was_without_what_belongs_to_its_old_pool_or_to_backups() {
        let vm = fields(json!({
            "uuid": "u", "name_label": "web01", "name_description": "d", "tags": ["prod"], "memory_static_max": "4294967296",
            "memory_static_min": 1, "memory_dynamic_max": 2, "memory_dynamic_min": 2, "VCPUs_max": 4, "VCPUs_at_startup": 2,
            "HVM_boot_params": { "order": "cd", "firmware": "uefi" }, "HVM_shadow_multiplier": 1.0, "domain_type": "hvm",
            "platform": { "nx": "true" }, "affinity": "OpaqueRef:h", "appliance": "OpaqueRef:a", "suspend_SR": "OpaqueRef:s",
            "other_config": { "xo:backup:job": "j", "xofs:run": "r", "mac_seed": "m", "mine": "1" },
            "blocked_operations": { "destroy": "no" }, "power_state": "Running", "is_a_template": true, "ha_always_run": true,
        }));
        let made = machine(&vm, "web01", &mark(), true).expect("is made");
        let expect = |field: &str, value: Value| assert_eq!(made.get(field), Some(&value), "{field}");
        expect("name_label", json!("[restoring] web01"));
        expect("memory_static_max", json!(4_294_967_296_u64));
        expect("VCPUs_at_startup", json!(2));
        expect("tags", json!(["prod", TAG]));
        expect("affinity", json!(NULL));
        expect("is_a_template", json!(false));
        expect("HVM_boot_params", json!({ "order": "cd", "firmware": "uefi" }));
        expect("blocked_operations", json!({ "start": BLOCKED_BECAUSE, "start_on": BLOCKED_BECAUSE }));
        let entries =
            json!({ "mac_seed": "m", "mine": "1", "xofs:restoring": "run keeper", "xofs:restored-from": "uuid/time" });
        expect("other_config", entries);
        let during = json!({ "destroy": "no", "pool_migrate": BLOCKED_BY_XO });
        let during = fields(json!({ "blocked_operations": during }));
        assert_eq!(Value::Object(blocked(&during)), json!({ "destroy": "no" }));
        for absent in ["uuid", "power_state", "appliance", "suspend_SR", "ha_always_run", "HVM_shadow_multiplier"] {
            assert_eq!(made.get(absent), None, "{absent}");
        }
        let other = machine(&vm, "web01", &mark(), false).expect("is made");
        assert_eq!(other["other_config"].get("mac_seed"), None);
    }

    #[test]
    fn what_a_backup_does_not_say_is_filled_and_memory_and_processors_are_needed() {
        let made = machine(&fields(json!({ "memory_static_max": 512, "VCPUs_max": 1, "tags": 7 })), "x", &mark(), true);
        let made = made.expect("is made");
        assert_eq!((&made["memory_dynamic_min"], &made["VCPUs_at_startup"]), (&json!(512), &json!(1)));
        assert_eq!((&made["actions_after_crash"], &made["platform"]), (&json!("restart"), &json!({})));
        for vm in [json!({ "VCPUs_max": 1 }), json!({ "memory_static_max": 512, "VCPUs_max": 0 })] {
            let error = machine(&fields(vm), "x", &mark(), true).expect_err("says too little");
            assert_eq!(error.kind(), ErrorKind::Backup);
        }
    }

    #[test]
    fn disks_devices_and_interfaces_are_made_as_they_were() {
        let vdi = fields(json!({
            "name_label": "system", "name_description": "root", "type": "system", "read_only": true, "sharable": false,
            "sm_config": { "vhd-parent": "p" }, "xenstore_data": { "vdi-uuid": "u" }, "tags": ["t"],
            "other_config": { "xo:base_delta_vdi": "b", "content_id": "c" },
        }));
        let made = disk(&vdi, "OpaqueRef:sr", 1 << 30, &mark());
        let expected = json!({
            "name_label": "[restoring] system", "name_description": "root", "type": "system", "read_only": false,
            "sharable": false, "tags": ["t"], "SR": "OpaqueRef:sr", "virtual_size": 1 << 30,
            "other_config": { "content_id": "c", "xofs:restoring": "run keeper", "xofs:restored-from": "uuid/time" },
        });
        assert_eq!(Value::Object(made), expected);
        let vbd = fields(json!({ "userdevice": "3", "bootable": true, "mode": "RO", "currently_attached": true }));
        let made = device(&vbd, "vm", "vdi", "0");
        assert_eq!((&made["userdevice"], &made["bootable"], &made["mode"]), (&json!("3"), &json!(true), &json!("RO")));
        assert_eq!(made.get("currently_attached"), None);
        assert_eq!(device(&Fields::new(), "vm", "vdi", "1")["userdevice"], json!("1"));
        let vif = fields(
            json!({ "device": "1", "MAC": "aa", "MTU": 9000, "locking_mode": "locked", "ipv4_allowed": ["1.2.3.4"] }),
        );
        let made = interface(&vif, "vm", "net", "", 1500);
        assert_eq!((&made["device"], &made["MAC"], &made["MTU"]), (&json!("1"), &json!(""), &json!(9000)));
        assert_eq!(made["ipv4_allowed"], json!(["1.2.3.4"]));
    }

    #[test]
    fn only_known_bios_strings_that_say_something_are_set() {
        let vm = fields(
            json!({ "bios_strings": { "bios-vendor": "Xen", "bios-version": "", "hp-rombios": "x", "oem-1": "Xen" } }),
        );
        assert_eq!(bios_strings(&vm).map(Value::Object), Some(json!({ "bios-vendor": "Xen" })));
        assert_eq!(bios_strings(&Fields::new()), None);
    }
}
