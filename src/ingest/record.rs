//! The metadata of a backup, as Xen Orchestra writes it, for disks that no pool gave.
//!
//! Of a VM that has backups the newest one is the template: its records are XAPI's own. What is the snapshot's is made anew,
//! what says how the VM is restored is kept. A new VM gets records with all that a restore reads.
//!
//! Source: XO, `@xen-orchestra/backups/_runners/_writers/IncrementalRemoteWriter.mjs`, `_incrementalVm.mjs`;
//! `@xen-orchestra/xapi/vm.mjs`, `vdi.mjs`, `vbd.mjs` for what a restore reads.

use indexmap::IndexMap;
use jiff::Timestamp;
use serde::Serialize;
use serde_json::value::{RawValue, to_raw_value};
use serde_json::{Value, json};
use uuid::Uuid;

use super::report::StoredXva;
use crate::repository::{Backup, Document};

const NULL_REFERENCE: &str = "OpaqueRef:NULL";

/// What the metadata of a backup tells.
pub(super) struct Record<'a> {
    pub vm: &'a str,
    /// The name of the VM, if it is another than the template's.
    pub name: Option<&'a str>,
    pub job: &'a str,
    pub schedule: &'a str,
    pub timestamp: Timestamp,
    pub snapshot: Uuid,
    pub disks: Vec<DiskRecord>,
    /// Of a full backup.
    pub xva: Option<StoredXva>,
}

/// What it holds besides what is known of how it lies.
pub(super) struct Parts {
    /// Under which each disk stands in `vdis` and `vhds`.
    pub keys: Vec<String>,
    pub vbds: Box<RawValue>,
    pub vdis: Box<RawValue>,
    pub vifs: Box<RawValue>,
    pub vm: Box<RawValue>,
    pub vm_snapshot: Box<RawValue>,
    pub vtpms: Box<RawValue>,
    pub tags: Box<RawValue>,
}

/// What it tells of a disk.
pub(super) struct DiskRecord {
    pub name: String,
    /// The disk that is backed up.
    pub vdi: Uuid,
    /// Its snapshot, whose uuid the footer has.
    pub snapshot: Uuid,
    /// The snapshot that it is the child of.
    pub base: Option<Uuid>,
    /// In bytes.
    pub virtual_size: u64,
    /// That of an equivalent VHD file, in bytes.
    pub size: u64,
    /// Relative to the folder of the VM.
    pub path: String,
    /// Makes the references of its records.
    pub reference: Uuid,
}

/// The metadata of an older backup of the VM.
pub(super) struct Template {
    document: Document,
    /// For each disk its name and its key in `vdis`.
    disks: Vec<(String, String)>,
}

impl Template {
    /// Reads the metadata of `backup`; `None` if it is no JSON object.
    pub fn new(backup: &Backup, stored: &[u8]) -> Option<Self> {
        let document: Document = serde_json::from_slice(stored).ok()?;
        // The disks of a backup are in the order of `vhds`.
        let keys = map(&document, "vhds").into_keys();
        let disks = backup.disks.iter().map(|disk| disk.name.clone()).zip(keys).collect();
        Some(Self { document, disks })
    }

    fn record(&self, field: &str) -> Option<Document> {
        serde_json::from_str(self.document.get(field)?.get()).ok().filter(|record: &Document| !record.is_empty())
    }

    fn vdi(&self, name: &str) -> Option<Document> {
        let (_, key) = self.disks.iter().find(|(disk, _)| disk == name)?;
        serde_json::from_str(map(&self.document, "vdis").get(key)?.get()).ok()
    }

    fn vbd(&self, name: &str) -> Option<Document> {
        let (_, key) = self.disks.iter().find(|(disk, _)| disk == name)?;
        let records = map(&self.document, "vbds").into_values();
        let mut records = records.filter_map(|record| serde_json::from_str::<Document>(record.get()).ok());
        records.find(|record| text(record, "VDI").as_ref() == Some(key))
    }
}

impl Record<'_> {
    /// Makes the metadata of disks, its fields in the order in which Xen Orchestra writes them.
    pub fn of_disks(&self, parts: Parts) -> Document {
        let each = |value: fn(&DiskRecord) -> Value| -> Box<RawValue> {
            raw(&parts.keys.iter().zip(&self.disks).map(|(key, disk)| (key, value(disk))).collect::<IndexMap<_, _>>())
        };
        let fields: [(&str, Box<RawValue>); 16] = [
            ("includeNonNbdQcow2Fix", raw(&true)),
            ("isVhdDifferencing", each(|disk| json!(disk.base.is_some()))),
            ("jobId", raw(self.job)),
            ("mode", raw("delta")),
            ("scheduleId", raw(self.schedule)),
            ("timestamp", raw(&self.timestamp.as_millisecond())),
            ("vbds", parts.vbds),
            ("vdis", parts.vdis),
            ("version", raw("2.0.0")),
            ("vifs", parts.vifs),
            ("vhds", each(|disk| json!(disk.path))),
            ("vm", parts.vm),
            ("vmSnapshot", parts.vm_snapshot),
            ("vtpms", parts.vtpms),
            ("tags", parts.tags),
            ("size", raw(&self.disks.iter().map(|disk| disk.size).sum::<u64>())),
        ];
        fields.into_iter().map(|(name, value)| (name.to_owned(), value)).collect()
    }

    /// Makes it of a backup that no pool gave.
    pub fn to_document(&self, template: Option<&Template>) -> Document {
        let vm = self.vm_record(template);
        let vm_reference = reference(self.snapshot);
        let vdis = |disk: &DiskRecord| (reference(disk.snapshot), self.vdi_record(disk, template));
        let vbds = |disk: &DiskRecord| (reference(disk.reference), vbd_record(disk, &vm_reference, template));
        let vifs = template.and_then(|template| template.document.get("vifs").cloned());
        self.of_disks(Parts {
            keys: self.disks.iter().map(|disk| reference(disk.snapshot)).collect(),
            vbds: raw(&self.disks.iter().map(vbds).collect::<IndexMap<_, _>>()),
            vdis: raw(&self.disks.iter().map(vdis).collect::<IndexMap<_, _>>()),
            vifs: vifs.unwrap_or_else(|| raw(&json!({}))),
            vm_snapshot: raw(&self.snapshot_record(&vm, template)),
            vm: raw(&vm),
            vtpms: raw(&json!([])),
            tags: raw(&json!([])),
        })
    }

    fn vm_record(&self, template: Option<&Template>) -> Document {
        let mut vm = template.and_then(|template| template.record("vm")).unwrap_or_else(default_vm);
        set(&mut vm, "uuid", self.vm);
        if let Some(name) = self.name {
            set(&mut vm, "name_label", name);
        }
        vm
    }

    fn snapshot_record(&self, vm: &Document, template: Option<&Template>) -> Document {
        let mut snapshot = template.and_then(|template| template.record("vmSnapshot")).unwrap_or_else(|| vm.clone());
        set(&mut snapshot, "uuid", &self.snapshot);
        let name = text(vm, "name_label").unwrap_or_default();
        set(&mut snapshot, "name_label", &format!("[xofs] {name}"));
        set(&mut snapshot, "is_a_template", &true);
        set(&mut snapshot, "is_a_snapshot", &true);
        set(&mut snapshot, "snapshot_time", &self.snapshot_time());
        set(&mut snapshot, "suspend_VDI", NULL_REFERENCE);
        snapshot
    }

    fn vdi_record(&self, disk: &DiskRecord, template: Option<&Template>) -> Document {
        let mut vdi = template
            .and_then(|template| template.vdi(&disk.name))
            .unwrap_or_else(|| document(&default_vdi(&disk.name)));
        let mut config: IndexMap<String, Value> =
            vdi.get("other_config").and_then(|config| serde_json::from_str(config.get()).ok()).unwrap_or_default();
        config.shift_remove("xo:base_delta_vdi");
        if let Some(base) = disk.base {
            config.insert("xo:base_delta_vdi".to_owned(), json!(base));
        }
        config.insert("xo:backup:vm".to_owned(), json!(self.vm));
        set(&mut vdi, "uuid", &disk.snapshot);
        set(&mut vdi, "VBDs", &[reference(disk.reference)]);
        set(&mut vdi, "virtual_size", &disk.virtual_size);
        set(&mut vdi, "other_config", &config);
        set(&mut vdi, "is_a_snapshot", &true);
        set(&mut vdi, "snapshot_time", &self.snapshot_time());
        set(&mut vdi, "$snapshot_of$uuid", &disk.vdi);
        vdi
    }

    /// As XAPI writes a time.
    fn snapshot_time(&self) -> String {
        self.timestamp.strftime("%Y%m%dT%H:%M:%SZ").to_string()
    }
}

fn vbd_record(disk: &DiskRecord, vm: &str, template: Option<&Template>) -> Document {
    let known = template.and_then(|template| template.vbd(&disk.name));
    let mut vbd = known.unwrap_or_else(|| document(&default_vbd(&disk.name)));
    set(&mut vbd, "uuid", &disk.reference);
    set(&mut vbd, "VM", vm);
    set(&mut vbd, "VDI", &reference(disk.snapshot));
    vbd
}

/// A new VM: two gigabytes, one processor, a BIOS; whatever it needs more is set after a restore.
const DEFAULT_VM: &str = r#"{
    "uuid": "", "name_label": "", "name_description": "", "is_a_template": false, "is_a_snapshot": false,
    "power_state": "Halted", "suspend_VDI": "OpaqueRef:NULL", "suspend_SR": "OpaqueRef:NULL",
    "VCPUs_max": 1, "VCPUs_at_startup": 1, "VCPUs_params": {},
    "memory_static_min": 0, "memory_static_max": 2147483648,
    "memory_dynamic_min": 2147483648, "memory_dynamic_max": 2147483648,
    "HVM_boot_policy": "BIOS order", "HVM_boot_params": {"order": "cdn", "firmware": "bios"}, "HVM_shadow_multiplier": 1,
    "platform": {"acpi": "1", "apic": "true", "pae": "true", "viridian": "false", "timeoffset": "0"},
    "other_config": {}, "xenstore_data": {}, "NVRAM": {}, "bios_strings": {}, "blocked_operations": {},
    "PV_args": "", "PV_kernel": "", "PV_ramdisk": "", "PV_bootloader": "", "PV_bootloader_args": "",
    "PV_legacy_args": "", "PCI_bus": "", "recommendations": "", "affinity": "OpaqueRef:NULL", "tags": [],
    "actions_after_shutdown": "destroy", "actions_after_reboot": "restart", "actions_after_crash": "restart",
    "ha_always_run": false, "ha_restart_priority": "", "has_vendor_device": false, "domain_type": "hvm",
    "user_version": 1, "version": 0, "order": 0, "start_delay": 0, "shutdown_delay": 0, "hardware_platform_version": 0
}"#;

fn default_vm() -> Document {
    let vm: Document = serde_json::from_str(DEFAULT_VM).expect("it is an object");
    // Written as compactly as the rest.
    vm.into_iter()
        .map(|(name, value)| (name, raw(&serde_json::from_str::<Value>(value.get()).expect("it is JSON"))))
        .collect()
}

fn default_vdi(name: &str) -> Value {
    json!({
        "uuid": "", "name_label": name, "name_description": "", "SR": NULL_REFERENCE, "VBDs": [], "virtual_size": 0,
        "type": "user", "sharable": false, "read_only": false, "other_config": {}, "is_a_snapshot": true,
        "snapshot_of": NULL_REFERENCE, "snapshot_time": "", "tags": [], "xenstore_data": {}, "sm_config": {},
    })
}

fn default_vbd(name: &str) -> Value {
    let user_device = user_device(name);
    json!({
        "uuid": "", "VM": "", "VDI": "", "device": name, "bootable": user_device == "0", "userdevice": user_device,
        "mode": "RW", "type": "Disk", "unpluggable": user_device != "0", "storage_lock": false, "empty": false,
        "other_config": {}, "currently_attached": false, "qos_algorithm_type": "", "qos_algorithm_params": {},
    })
}

/// Returns what XAPI calls the place of a device: `0` of `xvda`, `26` of `xvdaa`; `autodetect` if it cannot be told.
fn user_device(name: &str) -> String {
    let letters = ["xvd", "hd", "sd", "vd"].iter().find_map(|prefix| name.strip_prefix(prefix)).unwrap_or_default();
    let number = letters.bytes().try_fold(0_u32, |number, letter| {
        let digit = u32::from(letter.checked_sub(b'a').filter(|digit| *digit < 26)?);
        number.checked_mul(26)?.checked_add(digit + 1)
    });
    match number {
        Some(number @ 1..=255) => (number - 1).to_string(),
        _ => "autodetect".to_owned(),
    }
}

fn reference(uuid: Uuid) -> String {
    format!("OpaqueRef:{uuid}")
}

pub(super) fn raw(value: &(impl Serialize + ?Sized)) -> Box<RawValue> {
    to_raw_value(value).expect("text, numbers and maps with keys of text can be written")
}

pub(super) fn set(record: &mut Document, field: &str, value: &(impl Serialize + ?Sized)) {
    record.insert(field.to_owned(), raw(value));
}

fn document(value: &Value) -> Document {
    serde_json::from_value::<IndexMap<String, Value>>(value.clone())
        .map(|fields| fields.into_iter().map(|(name, value)| (name, raw(&value))).collect())
        .expect("it is an object")
}

pub(super) fn map(document: &Document, field: &str) -> Document {
    document.get(field).and_then(|value| serde_json::from_str(value.get()).ok()).unwrap_or_default()
}

pub(super) fn text(record: &Document, field: &str) -> Option<String> {
    serde_json::from_str(record.get(field)?.get()).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_has_the_place_that_xapi_gives_it() {
        for (name, place) in [("xvda", "0"), ("xvdb", "1"), ("xvdz", "25"), ("xvdaa", "26"), ("sda", "0")] {
            assert_eq!(user_device(name), place, "{name}");
        }
        for name in ["disk0", "xvd", "xvdA", "xvdzzzzzzzz"] {
            assert_eq!(user_device(name), "autodetect", "{name}");
        }
    }
}
