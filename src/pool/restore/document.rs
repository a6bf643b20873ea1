//! What the metadata of a backup tells of a VM: the records of XAPI that were stored with it, as far as a restore needs them.
//!
//! Whoever can write to the repository wrote them: any field may be missing or of another type, and what is unknown is left out.
//! Source: XO, `@xen-orchestra/backups/_runners/_writers/IncrementalRemoteWriter.mjs`, `FullRemoteWriter.mjs`.

use serde_json::{Map, Value};
use storage::ObjectPath;

use crate::pool::error::{Error, ErrorKind, Result};
use crate::repository::{Backup, BackupDisk, DiskSource};

/// A record of XAPI.
pub type Fields = Map<String, Value>;

/// More of a kind no VM has (VBDs, VIFs, virtual TPMs).
const MOST: usize = 256;
/// A reference of XAPI to nothing.
const NULL: &str = "OpaqueRef:NULL";

/// What a backup tells of its VM.
#[derive(Debug, Clone)]
pub struct Document {
    /// The VM, as it was when it was backed up.
    pub vm: Fields,
    /// Its disks, in the order of the backup; none of a full backup.
    pub disks: Vec<StoredDisk>,
    /// Its network interfaces; none of a full backup.
    pub vifs: Vec<Fields>,
    /// What its virtual TPMs held; `None` for one that could not be read.
    pub vtpms: Vec<Option<String>>,
    /// The XVA of a full backup.
    pub xva: Option<ObjectPath>,
}

/// A disk of a backup.
#[derive(Debug, Clone)]
pub struct StoredDisk {
    /// Where its bytes are, and what it is called.
    pub disk: BackupDisk,
    /// Its record; of the snapshot that was backed up.
    pub vdi: Fields,
    /// What connected it to the VM.
    pub vbds: Vec<Fields>,
    /// Whether it is the memory of a suspended VM.
    pub is_memory: bool,
}

impl Document {
    /// Reads the metadata of a backup.
    ///
    /// # Errors
    /// [`ErrorKind::Backup`] if it is no JSON, or tells of a VM that no pool can have.
    pub fn parse(bytes: &[u8], backup: &Backup) -> Result<Self> {
        let wrong = |reason: String| Error::new(ErrorKind::Backup, format!("'{}': {reason}", backup.metadata));
        let Ok(Value::Object(mut document)) = serde_json::from_slice(bytes) else {
            return Err(wrong("it is no JSON object".to_owned()));
        };
        let vm = object(document.remove("vm"));
        if vm.is_empty() {
            return Err(wrong("it does not say what the VM was ('vm' is missing)".to_owned()));
        }
        let snapshot = object(document.remove("vmSnapshot"));
        let vhds = object(document.remove("vhds"));
        let mut vdis = object(document.remove("vdis"));
        let vbds: Vec<Fields> = object(document.remove("vbds")).into_iter().map(|(_, vbd)| object(Some(vbd))).collect();
        let vifs: Vec<Fields> = object(document.remove("vifs")).into_iter().map(|(_, vif)| object(Some(vif))).collect();
        let vtpms: Vec<Option<String>> = match document.remove("vtpms") {
            Some(Value::Array(contents)) => {
                contents.iter().map(|content| content.as_str().map(str::to_owned)).collect()
            }
            _ => Vec::new(),
        };
        for (what, count) in [("disks", backup.disks.len()), ("VBDs", vbds.len()), ("VIFs", vifs.len())] {
            if count > MOST {
                return Err(wrong(format!("it tells of {count} {what}: no VM has more than {MOST}")));
            }
        }
        let folder = backup.metadata.parent();
        let of_disk = |disk: &BackupDisk| {
            let reference = match &disk.source {
                DiskSource::Vhd(path) => {
                    let is_its = |stored: &Value| {
                        stored.as_str().is_some_and(|stored| folder.resolve(stored).is_ok_and(|stored| stored == *path))
                    };
                    vhds.iter().find(|(_, stored)| is_its(stored)).map_or("", |(reference, _)| reference)
                }
                DiskSource::Xva { .. } | DiskSource::Unusable(_) => "",
            };
            let vdi = object(vdis.remove(reference));
            let is_suspended = |vm: &Fields| text(vm, "suspend_VDI").is_some_and(|vdi| vdi == reference && vdi != NULL);
            let is_memory = text(&vdi, "type") == Some("suspend") || is_suspended(&snapshot) || is_suspended(&vm);
            let vbds = vbds.iter().filter(|vbd| text(vbd, "VDI") == Some(reference)).cloned().collect();
            StoredDisk { disk: disk.clone(), vdi, vbds, is_memory }
        };
        let disks = backup.disks.iter().filter(|disk| !matches!(disk.source, DiskSource::Xva { .. })).map(of_disk);
        let disks = disks.collect();
        let xva = document.get("xva").and_then(Value::as_str).map(|path| folder.resolve(path));
        let xva = xva.transpose().map_err(|error| wrong(error.to_string()))?;
        Ok(Self { vm, disks, vifs, vtpms, xva })
    }

    /// Returns the name of the VM.
    #[must_use]
    pub fn name(&self) -> &str {
        text(&self.vm, "name_label").filter(|name| !name.is_empty()).unwrap_or("restored")
    }

    /// Finds a disk by the name that the guest has for it: one of an XVA, too, of which only its name is known.
    #[must_use]
    pub fn disk(&self, name: &str, backup: &Backup) -> Option<StoredDisk> {
        if let Some(stored) = self.disks.iter().find(|stored| stored.disk.name == name) {
            return Some(stored.clone());
        }
        let disk = backup.disks.iter().find(|disk| disk.name == name)?.clone();
        let label = if disk.label.is_empty() { name } else { &disk.label };
        let vdi = [("name_label", label), ("name_description", disk.description.as_str())];
        let vdi = vdi.into_iter().map(|(field, text)| (field.to_owned(), Value::from(text))).collect();
        Some(StoredDisk { disk, vdi, vbds: Vec::new(), is_memory: false })
    }
}

fn object(value: Option<Value>) -> Fields {
    match value {
        Some(Value::Object(fields)) => fields,
        _ => Fields::new(),
    }
}

/// Returns a field that is a text.
pub fn text<'a>(fields: &'a Fields, name: &str) -> Option<&'a str> {
    fields.get(name).and_then(Value::as_str)
}

/// Returns a field that is a whole number, which XML-RPC has as text.
pub fn number(fields: &Fields, name: &str) -> Option<i64> {
    let value = fields.get(name)?;
    value.as_i64().or_else(|| value.as_str()?.parse().ok())
}

/// Returns a field that says yes or no.
pub fn flag(fields: &Fields, name: &str) -> Option<bool> {
    fields.get(name).and_then(Value::as_bool)
}

/// Returns a field that is a map of texts; what is no text in it is left out.
pub fn texts(fields: &Fields, name: &str) -> Option<Fields> {
    let Value::Object(map) = fields.get(name)? else { return None };
    Some(map.iter().filter(|(_, value)| value.is_string()).map(|(key, value)| (key.clone(), value.clone())).collect())
}

/// Returns a field that is a list of texts; what is no text in it is left out.
pub fn list(fields: &Fields, name: &str) -> Option<Vec<Value>> {
    let Value::Array(values) = fields.get(name)? else { return None };
    Some(values.iter().filter(|value| value.is_string()).cloned().collect())
}

#[cfg(test)]
pub mod tests {
    use serde_json::json;

    use super::*;
    use crate::repository::{BackupTime, Mode, VmId};

    /// Makes a backup with these disks, by name and path.
    pub fn backup(disks: &[(&str, &str)]) -> Backup {
        let vm = VmId::new("1e2d3c4b-5a69-4788-9655-443322110fed").expect("an id");
        let time = BackupTime::parse("20260802T120000Z").expect("a time");
        let metadata = ObjectPath::new("xo-vm-backups/1e2d3c4b-5a69-4788-9655-443322110fed/20260802T120000Z.json");
        let metadata = metadata.expect("a path");
        let disk = |(name, path): &(&str, &str)| BackupDisk {
            name: (*name).to_owned(),
            source: DiskSource::Vhd(metadata.parent().resolve(path).expect("a path")),
            vdi: None,
            label: String::new(),
            description: String::new(),
            virtual_size: None,
        };
        let disks = disks.iter().map(disk).collect();
        Backup {
            vm,
            time,
            timestamp: None,
            mode: Mode::Incremental,
            disks,
            size: 0,
            is_key: None,
            job_id: String::new(),
            schedule_id: String::new(),
            tags: Vec::new(),
            vm_tags: Vec::new(),
            problem: None,
            metadata,
        }
    }

    #[test]
    fn records_belong_to_disks_by_where_these_are_stored() {
        let backup = backup(&[("xvda", "vdis/j/a/1.vhd"), ("memory", "vdis/j/m/1.vhd"), ("disk0", "vdis/j/b/1.vhd")]);
        let document = json!({
            "mode": "delta",
            "vm": { "name_label": "web01", "suspend_VDI": NULL },
            "vmSnapshot": { "suspend_VDI": "OpaqueRef:m" },
            "vhds": { "OpaqueRef:b": "vdis/j/b/1.vhd", "OpaqueRef:m": "vdis/j/m/1.vhd", "OpaqueRef:a": "./vdis/j/a/1.vhd" },
            "vdis": { "OpaqueRef:a": { "name_label": "system" }, "OpaqueRef:m": {}, "OpaqueRef:b": 7 },
            "vbds": { "x": { "VDI": "OpaqueRef:a", "userdevice": "0" }, "y": { "VDI": "OpaqueRef:z" }, "z": null },
            "vifs": { "v": { "device": "0" } },
            "vtpms": ["secret", null, 5],
        });
        let document = Document::parse(document.to_string().as_bytes(), &backup).expect("is read");
        let found: Vec<_> = document
            .disks
            .iter()
            .map(|disk| (disk.disk.name.as_str(), text(&disk.vdi, "name_label"), disk.vbds.len(), disk.is_memory))
            .collect();
        assert_eq!(found, [("xvda", Some("system"), 1, false), ("memory", None, 0, true), ("disk0", None, 0, false)]);
        assert_eq!((document.name(), document.vifs.len()), ("web01", 1));
        assert_eq!(document.vtpms, [Some("secret".to_owned()), None, None]);
    }

    #[test]
    fn what_tells_of_no_vm_is_refused() {
        for (text, part) in [("[]", "no JSON object"), ("{", "no JSON object"), ("{}", "'vm' is missing")] {
            let error = Document::parse(text.as_bytes(), &backup(&[])).expect_err(text);
            assert_eq!(error.kind(), ErrorKind::Backup);
            assert!(error.to_string().contains(part), "{error}");
        }
        let vifs: Fields = (0..257).map(|number| (number.to_string(), json!({}))).collect();
        let document = json!({ "vm": { "name_label": "x" }, "vifs": vifs });
        let error = Document::parse(document.to_string().as_bytes(), &backup(&[])).expect_err("too many");
        assert!(error.to_string().contains("257 VIFs"), "{error}");
    }

    #[test]
    fn fields_are_taken_in_the_forms_that_xapi_has_and_no_other() {
        let fields = json!({ "a": "12", "b": 12, "c": true, "d": ["x", 1], "e": { "k": "v", "n": 1 }, "f": 1.5 });
        let fields = object(Some(fields));
        assert_eq!((number(&fields, "a"), number(&fields, "b"), number(&fields, "f")), (Some(12), Some(12), None));
        assert_eq!((flag(&fields, "c"), flag(&fields, "a")), (Some(true), None));
        assert_eq!(list(&fields, "d"), Some(vec![json!("x")]));
        assert_eq!(texts(&fields, "e").map(Value::Object), Some(json!({ "k": "v" })));
    }
}
