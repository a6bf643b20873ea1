//! The machine of a replica: made once, like the one that it is a replica of, and brought up to date by each run.

use serde_json::{Value, json};
use xapi::record::{Class, Vbd, Vdi, Vif, Vm};
use xapi::{Pool, Record, Ref};

use super::marks::{self, BLOCKED, BLOCKED_BECAUSE, Identity, REPLICATING, SELF, TAG};
use super::source::{Source, SourceDisk};
use crate::ingest::JOB;
use crate::pool::error::Result;
use crate::pool::restore::document::{Fields, list, number, texts};
use crate::pool::restore::networks::{self, Macs};
use crate::pool::restore::target::Target;
use crate::pool::restore::{parts, records};
use crate::pool::survey::is_disk;

/// Fields that a machine which is there gets again, where they changed. Numbers of processors and memory have rules of their own.
const KEPT_UP: [&str; 17] = [
    "name_description",
    "tags",
    "actions_after_crash",
    "actions_after_reboot",
    "actions_after_shutdown",
    "HVM_boot_policy",
    "HVM_boot_params",
    "platform",
    "PCI_bus",
    "PV_args",
    "PV_bootloader",
    "PV_bootloader_args",
    "PV_kernel",
    "PV_legacy_args",
    "PV_ramdisk",
    "VCPUs_params",
    "recommendations",
];

/// Makes a machine without disks, which is marked as unfinished. `say` is told what is left out.
///
/// # Errors
/// What the pool says.
pub fn create(
    pool: &Pool,
    source: &Source,
    identity: &Identity,
    name: &str,
    mark: &str,
    say: &dyn Fn(&str),
) -> Result<Ref<Vm>> {
    let target = Target::of(pool)?;
    let interfaces = networks::choose(&source.vifs, &target.networks, &[], Macs::KeptIfFree, &target.macs)?;
    let keeps_macs = interfaces.iter().all(|interface| !interface.mac.is_empty());
    let mut fields = wanted(source)?;
    let mut other_config = texts(&source.vm, "other_config").unwrap_or_default();
    other_config.retain(|key, _| !records::is_of_backups(key) && (keeps_macs || key != records::MAC_SEED));
    other_config.extend(identity.entries().map(|(entry, value)| (entry.to_owned(), json!(value))));
    other_config.insert(REPLICATING.to_owned(), json!(mark));
    let blocked: Fields = BLOCKED.iter().map(|operation| ((*operation).to_owned(), json!(BLOCKED_BECAUSE))).collect();
    fields.insert("name_label".to_owned(), json!(name));
    fields.insert("other_config".to_owned(), Value::Object(other_config));
    fields.insert("blocked_operations".to_owned(), Value::Object(blocked));
    let vm = pool.create_vm(&fields)?;
    set_itself(pool, &vm)?;
    block_start(pool, &vm)?;
    parts::set_bios_strings(pool, &vm, &source.vm, say)?;
    for interface in &interfaces {
        parts::make_interface(pool, &vm, interface, say)?;
    }
    for contents in source.vtpms.iter().flatten() {
        parts::make_tpm(pool, &vm, contents, say)?;
    }
    Ok(vm)
}

/// Returns the record of the machine, without its name and entries.
fn wanted(source: &Source) -> Result<Fields> {
    let mut fields = records::settings(&source.vm)?;
    let mut tags = list(&source.vm, "tags").unwrap_or_default();
    if !tags.iter().any(|tag| tag == TAG) {
        tags.push(json!(TAG));
    }
    fields.insert("tags".to_owned(), Value::Array(tags));
    Ok(fields)
}

/// Blocks what a replica must not do.
pub fn block_start(pool: &Pool, vm: &Ref<Vm>) -> Result<()> {
    parts::block(pool, vm, &BLOCKED, BLOCKED_BECAUSE)?;
    Ok(pool.update_allowed_operations(vm)?)
}

/// Gives a machine that is there what changed of the one that it is a replica of, its disks aside.
///
/// # Errors
/// What the pool says.
pub fn bring_up_to_date(pool: &Pool, vm: &Record<Vm>, source: &Source, say: &dyn Fn(&str)) -> Result<()> {
    let wanted = wanted(source)?;
    for field in KEPT_UP {
        let Some(value) = wanted.get(field).filter(|value| vm.raw.get(field) != Some(value)) else { continue };
        match pool.set(&vm.reference, field, value.clone()) {
            // What this pool does not have, or does not let anybody change, stays.
            Err(error) if error.kind() == xapi::ErrorKind::Unsupported => {}
            set => set?,
        }
    }
    let bytes = |fields: &Fields, field: &str| number(fields, field).and_then(|bytes| u64::try_from(bytes).ok());
    let memory = |fields: &Fields| {
        let [fixed, dynamic] = ["static", "dynamic"].map(|kind| {
            Some((bytes(fields, &format!("memory_{kind}_min"))?, bytes(fields, &format!("memory_{kind}_max"))?))
        });
        Some((fixed?, dynamic?))
    };
    if let Some((fixed, dynamic)) = memory(&wanted).filter(|limits| memory(&vm.raw) != Some(*limits)) {
        pool.set_memory(&vm.reference, fixed, dynamic)?;
    }
    let processors = |fields: &Fields| Some((number(fields, "VCPUs_max")?, number(fields, "VCPUs_at_startup")?));
    if let Some((most, started)) = processors(&wanted).filter(|counts| processors(&vm.raw) != Some(*counts)) {
        // Never more at the start than at most, in between either.
        let first = number(&vm.raw, "VCPUs_max").unwrap_or(0) < most;
        let [a, b] = if first { ["VCPUs_max", "VCPUs_at_startup"] } else { ["VCPUs_at_startup", "VCPUs_max"] };
        for field in [a, b] {
            pool.set(&vm.reference, field, if field == "VCPUs_max" { most } else { started })?;
        }
    }
    move_interfaces(pool, vm, source, say)
}

/// Makes the interfaces that are new, and removes those that are gone; the others stay, with their MACs.
fn move_interfaces(pool: &Pool, vm: &Record<Vm>, source: &Source, say: &dyn Fn(&str)) -> Result<()> {
    let there: Vec<Record<Vif>> = pool.records_of(&vm.vifs)?;
    if there.is_empty() && source.vifs.is_empty() {
        return Ok(());
    }
    let target = Target::of(pool)?;
    let wanted = networks::choose(&source.vifs, &target.networks, &[], Macs::KeptIfFree, &target.macs)?;
    let is_wanted = |vif: &Record<Vif>| {
        let network = vif.network.as_str();
        wanted
            .iter()
            .any(|one| one.device == vif.device && one.network.as_ref().is_ok_and(|new| new.reference == network))
    };
    let (kept, gone): (Vec<_>, Vec<_>) = there.into_iter().partition(is_wanted);
    for vif in &gone {
        pool.destroy_vif(&vif.reference)?;
    }
    for interface in wanted.iter().filter(|one| !kept.iter().any(|vif| vif.device == one.device)) {
        parts::make_interface(pool, &vm.reference, interface, say)?;
    }
    Ok(())
}

/// Takes the disks from a machine, which stay for themselves.
///
/// # Errors
/// What the pool says.
pub fn disconnect(pool: &Pool, vm: &Record<Vm>) -> Result<()> {
    for device in pool.records_of::<Vbd>(&vm.vbds)?.iter().filter(|device| is_disk(device)) {
        pool.destroy_vbd(&device.reference)?;
    }
    Ok(())
}

/// Gives a machine a disk, in the places of the one that it is a replica of.
///
/// # Errors
/// What the pool says.
pub fn connect(pool: &Pool, vm: &Ref<Vm>, disk: &SourceDisk, vdi: &Ref<Vdi>) -> Result<()> {
    for vbd in &disk.vbds {
        pool.create_vbd(&records::device(vbd, vm.as_str(), vdi.as_str(), "autodetect"))?;
    }
    Ok(())
}

/// Returns the record of a disk that holds nothing yet.
pub fn disk(disk: &SourceDisk, sr: &str, size: u64, identity: &Identity, mark: &str) -> Fields {
    let mut entries: Fields =
        identity.entries().map(|(entry, value)| (entry.to_owned(), json!(value))).into_iter().collect();
    entries.insert(REPLICATING.to_owned(), json!(mark));
    entries.insert(marks::DISK.to_owned(), json!(disk.uuid.to_string()));
    let of = |field: &str| disk.vdi.get(field).cloned().unwrap_or_else(|| json!(""));
    let fields = [
        ("name_label", of("name_label")),
        ("name_description", of("name_description")),
        ("SR", json!(sr)),
        ("virtual_size", json!(size)),
        ("type", json!("user")),
        ("sharable", json!(false)),
        ("read_only", json!(false)),
        ("other_config", Value::Object(entries)),
    ];
    fields.into_iter().map(|(field, value)| (field.to_owned(), value)).collect()
}

/// Returns what a state is called.
pub fn name_of(vm: &str, job: &str, time: &str) -> String {
    // That of xofs is a number that says nothing to anybody.
    format!("{vm} - {} - ({time})", if job == JOB { "xofs" } else { job })
}

/// Tells an object that its entries are its own.
///
/// # Errors
/// What the pool says.
pub fn set_itself<C: Class>(pool: &Pool, object: &Ref<C>) -> Result<()> {
    let uuid: String = pool.field(object, "uuid")?;
    Ok(pool.set_entry(object, "other_config", SELF, &uuid)?)
}
