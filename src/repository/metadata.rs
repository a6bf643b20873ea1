//! The metadata file of a backup: JSON in, what we show of it out.
//!
//! The file is XO's, and its records are XAPI's as received: any value may be missing or of another type, which never
//! is an error here. Only what is kept is ever held in memory, a few hundred bytes in general, and texts are cut
//! ([`LABEL_LIMIT`], [`DESCRIPTION_LIMIT`], [`TAG_LIMIT`]): a backup of four disks whose texts are all that long takes
//! 4 KiB, and its tags, all of which are kept since any may protect it.
//!
//! Source: XO, `@xen-orchestra/backups/_runners/_writers/IncrementalRemoteWriter.mjs` and `FullRemoteWriter.mjs`.

use jiff::Timestamp;
use serde::de::{Deserialize, IgnoredAny, MapAccess};
use storage::ObjectPath;
use uuid::Uuid;

use super::fields::{Entries, Fields, Record, Scalar, Texts, cut};
use super::naming::{Device, device_of_user_device, disk_names, is_device_name};
use super::{BackupId, BackupTime, VmId};

/// Longest name of a VM, disk, job or schedule kept (bytes).
const LABEL_LIMIT: usize = 256;
/// Longest description of a disk kept (bytes).
const DESCRIPTION_LIMIT: usize = 256;
/// Longest tag kept (bytes).
const TAG_LIMIT: usize = 64;
/// Longest path taken (bytes); a longer one makes its disk unusable.
const PATH_LIMIT: usize = 1024;
/// A reference of XAPI to nothing.
const NULL_REFERENCE: &str = "OpaqueRef:NULL";

/// What a backup holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Mode {
    /// Chains of VHDs, one for each disk.
    Incremental,
    /// One XVA.
    Full,
    /// Not known: the metadata cannot be read, or says something else.
    Unreadable,
}

/// One backup of one VM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Backup {
    /// The VM, as the folder says.
    pub vm: VmId,
    /// The time, as the file's name says.
    pub time: BackupTime,
    /// The time to the millisecond, as the metadata says it; `None` if it says none.
    ///
    /// Only retention looks at it, as XO's does: everything else goes by the name, which all files of a backup share.
    pub timestamp: Option<Timestamp>,
    /// What it holds.
    pub mode: Mode,
    /// Its disks, in the order of the metadata; their names differ.
    pub disks: Vec<BackupDisk>,
    /// Its size as XO says it (bytes): what was transferred; 0 if unknown.
    pub size: u64,
    /// Whether it needs no other backup; `None` if unknown.
    pub is_key: Option<bool>,
    /// The job that wrote it; empty if unknown.
    pub job_id: String,
    /// The schedule it belongs to; empty if unknown.
    pub schedule_id: String,
    /// The buckets of long-term retention it filled, `daily=2026-08-01`.
    pub tags: Vec<String>,
    /// The tags of the VM when it was made.
    pub vm_tags: Vec<String>,
    /// Why it, or a disk of it, cannot be read, if that is known without opening a disk.
    pub problem: Option<String>,
    /// Its metadata file.
    pub metadata: ObjectPath,
}

impl Backup {
    /// Returns its identity.
    #[must_use]
    pub fn id(&self) -> BackupId {
        BackupId { vm: self.vm.clone(), time: self.time }
    }

    /// Makes a backup whose metadata cannot be read.
    pub(super) fn unreadable(vm: &VmId, time: BackupTime, metadata: ObjectPath, reason: String) -> Self {
        Self {
            vm: vm.clone(),
            time,
            timestamp: None,
            mode: Mode::Unreadable,
            disks: Vec::new(),
            size: 0,
            is_key: None,
            job_id: String::new(),
            schedule_id: String::new(),
            tags: Vec::new(),
            vm_tags: Vec::new(),
            problem: Some(reason),
            metadata,
        }
    }
}

/// One disk of a backup.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BackupDisk {
    /// Its name in the tree: `xvda`, `memory`, `disk0`.
    pub name: String,
    /// Where it is.
    pub source: DiskSource,
    /// The disk that was backed up: the same in all backups of it (the snapshot's own uuid if XO did not say).
    pub vdi: Option<Uuid>,
    /// Its name in the pool; may be empty.
    pub label: String,
    /// Its description in the pool; may be empty.
    pub description: String,
    /// Its size in bytes as the metadata says; the disk itself, opened, knows better.
    pub virtual_size: Option<u64>,
}

/// Where the bytes of a disk are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DiskSource {
    /// A VHD, alias or exploded folder.
    Vhd(ObjectPath),
    /// A disk of an XVA.
    Xva {
        /// The XVA.
        path: ObjectPath,
        /// Which of its disks, from 0.
        index: usize,
    },
    /// Nowhere it may be read from: why.
    Unusable(String),
}

/// What a metadata file says.
#[derive(Debug, Default)]
pub(super) struct Metadata {
    mode: String,
    job_id: String,
    schedule_id: String,
    timestamp: Option<Timestamp>,
    size: u64,
    tags: Vec<String>,
    xva: Option<String>,
    vhds: Vec<(String, Option<String>)>,
    vdis: Vec<(String, Vdi)>,
    vbds: Vec<(String, Vbd)>,
    is_differencing: Vec<(String, Option<bool>)>,
    vm: VmRecord,
    snapshot: VmRecord,
}

#[derive(Debug, Default)]
struct Vdi {
    uuid: Option<Uuid>,
    live: Option<Uuid>,
    label: String,
    description: String,
    virtual_size: Option<u64>,
    is_suspend: bool,
}

#[derive(Debug, Default)]
struct Vbd {
    vdi: String,
    device: Option<String>,
    user_device: Option<String>,
}

#[derive(Debug, Default)]
struct VmRecord {
    name: String,
    tags: Vec<String>,
    suspend_vdi: String,
}

impl Metadata {
    /// Parses a metadata file.
    ///
    /// # Errors
    /// Only if it is no JSON object: the place, in a sentence.
    pub fn parse(bytes: &[u8]) -> Result<Self, String> {
        let start = bytes.iter().find(|byte| !byte.is_ascii_whitespace());
        match start {
            None => return Err("it is empty, JSON was expected".to_owned()),
            Some(b'{') => {}
            Some(_) => return Err("a JSON object was expected".to_owned()),
        }
        serde_json::from_slice(bytes)
            .map(|Fields(metadata)| metadata)
            .map_err(|error| format!("it is no JSON: {error}"))
    }

    /// Returns the name of the VM, empty if it is not said.
    pub fn vm_name(self) -> String {
        self.vm.name
    }

    /// Returns the path of the XVA, relative to the VM's folder, if this is a full backup.
    pub fn xva(&self) -> Option<&str> {
        self.xva.as_deref().filter(|_| self.mode == "full")
    }

    /// Makes the backup it describes; `directory` is the VM's folder. The disks of an XVA are not looked for.
    pub fn into_backup(self, vm: &VmId, time: BackupTime, directory: &ObjectPath, metadata: ObjectPath) -> Backup {
        let mut problem = None;
        let (mode, disks, is_key) = match self.mode.as_str() {
            "delta" => (Mode::Incremental, self.disks(directory), self.is_key()),
            "full" => (Mode::Full, Vec::new(), Some(true)),
            other => {
                problem = Some(format!("its mode is '{}': 'delta' or 'full' was expected", other.escape_debug()));
                (Mode::Unreadable, Vec::new(), None)
            }
        };
        if mode == Mode::Incremental && disks.is_empty() {
            problem = Some("it names no disks ('vhds' is missing or empty)".to_owned());
        }
        for disk in &disks {
            if let DiskSource::Unusable(reason) = &disk.source {
                problem.get_or_insert_with(|| format!("disk {}: {reason}", disk.name));
            }
        }
        Backup {
            vm: vm.clone(),
            time,
            timestamp: self.timestamp,
            mode,
            disks,
            size: self.size,
            is_key,
            job_id: self.job_id,
            schedule_id: self.schedule_id,
            tags: self.tags,
            vm_tags: self.vm.tags,
            problem,
            metadata,
        }
    }

    fn disks(&self, directory: &ObjectPath) -> Vec<BackupDisk> {
        let nothing = Vdi::default();
        let vdi = |reference: &str| find(&self.vdis, reference).unwrap_or(&nothing);
        let devices: Vec<Device> =
            self.vhds.iter().map(|(reference, _)| self.device(reference, vdi(reference))).collect();
        let names = disk_names(&devices);
        let disk = |(name, (reference, path)): (String, &(String, Option<String>))| {
            let vdi = vdi(reference);
            BackupDisk {
                name,
                source: disk_source(directory, path.as_deref()),
                vdi: vdi.live.or(vdi.uuid),
                label: vdi.label.clone(),
                description: vdi.description.clone(),
                virtual_size: vdi.virtual_size,
            }
        };
        names.into_iter().zip(&self.vhds).map(disk).collect()
    }

    fn device(&self, reference: &str, vdi: &Vdi) -> Device {
        let is_suspended = |vm: &VmRecord| vm.suspend_vdi == reference && reference != NULL_REFERENCE;
        if vdi.is_suspend || is_suspended(&self.snapshot) || is_suspended(&self.vm) {
            return Device::Memory;
        }
        let Some((_, vbd)) = self.vbds.iter().find(|(_, vbd)| vbd.vdi == reference) else { return Device::Unknown };
        // XAPI leaves `device` empty while a VM is halted.
        let device = vbd.device.clone().filter(|device| is_device_name(device));
        let device = device.or_else(|| vbd.user_device.as_deref().and_then(device_of_user_device));
        device.map_or(Device::Unknown, Device::Named)
    }

    fn is_key(&self) -> Option<bool> {
        let differencing: Option<Vec<bool>> = self.is_differencing.iter().map(|(_, is)| *is).collect();
        differencing.filter(|all| !all.is_empty()).map(|all| !all.contains(&true))
    }
}

/// Resolves a path of metadata, which is relative to the VM's folder and must not leave the repository.
fn disk_source(directory: &ObjectPath, path: Option<&str>) -> DiskSource {
    match path {
        None => DiskSource::Unusable("a path was expected in 'vhds'".to_owned()),
        Some(path) => match resolve(directory, path) {
            Ok(path) => DiskSource::Vhd(path),
            Err(reason) => DiskSource::Unusable(reason),
        },
    }
}

/// Resolves a path found in metadata; the reason if it is refused.
pub(super) fn resolve(directory: &ObjectPath, path: &str) -> Result<ObjectPath, String> {
    if path.len() >= PATH_LIMIT {
        return Err(format!("its path is longer than {PATH_LIMIT} bytes"));
    }
    directory.resolve(path).map_err(|error| error.to_string())
}

fn find<'a, T>(entries: &'a [(String, T)], key: &str) -> Option<&'a T> {
    entries.iter().find(|(name, _)| name == key).map(|(_, value)| value)
}

/// Whether a backup, or its VM when it was made, has a tag. Of tags longer than are kept, the beginning decides.
pub(super) fn has_tag(backup: &Backup, tag: &str) -> bool {
    let kept = cut(tag.to_owned(), TAG_LIMIT);
    backup.tags.iter().chain(&backup.vm_tags).any(|tag| *tag == kept)
}

/// Returns a name as it is kept.
pub(super) fn label_of(text: &str) -> String {
    cut(text.to_owned(), LABEL_LIMIT)
}

impl Record for Metadata {
    fn take<'de, A: MapAccess<'de>>(&mut self, field: &str, map: &mut A) -> Result<(), A::Error> {
        match field {
            "mode" => self.mode = label(map)?,
            "jobId" => self.job_id = label(map)?,
            "scheduleId" => self.schedule_id = label(map)?,
            "size" => self.size = map.next_value::<Scalar>()?.number().unwrap_or(0),
            "timestamp" => {
                let timestamp_ms = map.next_value::<Scalar>()?.number().and_then(|number| i64::try_from(number).ok());
                self.timestamp = timestamp_ms.and_then(|number| Timestamp::from_millisecond(number).ok());
            }
            "tags" => self.tags = tags(map)?,
            "xva" => self.xva = path_of(map.next_value()?),
            "vhds" => self.vhds = entries(map, path_of)?,
            "vdis" => self.vdis = entries(map, |Fields(vdi)| vdi)?,
            "vbds" => self.vbds = entries(map, |Fields(vbd)| vbd)?,
            "isVhdDifferencing" => self.is_differencing = entries(map, |value: Scalar| value.flag())?,
            "vm" => self.vm = map.next_value::<Fields<_>>()?.0,
            "vmSnapshot" => self.snapshot = map.next_value::<Fields<_>>()?.0,
            _ => skip(map)?,
        }
        Ok(())
    }
}

impl Record for Vdi {
    fn take<'de, A: MapAccess<'de>>(&mut self, field: &str, map: &mut A) -> Result<(), A::Error> {
        match field {
            "uuid" => self.uuid = map.next_value::<Scalar>()?.uuid(),
            "$snapshot_of$uuid" => self.live = map.next_value::<Scalar>()?.uuid(),
            "name_label" => self.label = label(map)?,
            "name_description" => self.description = cut(map.next_value::<Scalar>()?.text(), DESCRIPTION_LIMIT),
            "virtual_size" => self.virtual_size = map.next_value::<Scalar>()?.number(),
            "type" => self.is_suspend = map.next_value::<Scalar>()?.text() == "suspend",
            _ => skip(map)?,
        }
        Ok(())
    }
}

impl Record for Vbd {
    fn take<'de, A: MapAccess<'de>>(&mut self, field: &str, map: &mut A) -> Result<(), A::Error> {
        match field {
            "VDI" => self.vdi = label(map)?,
            "device" => self.device = Some(label(map)?),
            "userdevice" => self.user_device = Some(label(map)?),
            _ => skip(map)?,
        }
        Ok(())
    }
}

impl Record for VmRecord {
    fn take<'de, A: MapAccess<'de>>(&mut self, field: &str, map: &mut A) -> Result<(), A::Error> {
        match field {
            "name_label" => self.name = label(map)?,
            "tags" => self.tags = tags(map)?,
            "suspend_VDI" => self.suspend_vdi = label(map)?,
            _ => skip(map)?,
        }
        Ok(())
    }
}

fn skip<'de, A: MapAccess<'de>>(map: &mut A) -> Result<(), A::Error> {
    map.next_value::<IgnoredAny>().map(|_| ())
}

fn label<'de, A: MapAccess<'de>>(map: &mut A) -> Result<String, A::Error> {
    Ok(cut(map.next_value::<Scalar>()?.text(), LABEL_LIMIT))
}

fn tags<'de, A: MapAccess<'de>>(map: &mut A) -> Result<Vec<String>, A::Error> {
    Ok(map.next_value::<Texts>()?.0.into_iter().map(|tag| cut(tag, TAG_LIMIT)).collect())
}

/// A path, cut after [`PATH_LIMIT`] bytes, which [`resolve`] then refuses.
fn path_of(value: Scalar) -> Option<String> {
    match value {
        Scalar::Text(path) => Some(cut(path, PATH_LIMIT + 3)),
        _ => None,
    }
}

fn entries<'de, A: MapAccess<'de>, T: Deserialize<'de>, U>(
    map: &mut A,
    of: impl Fn(T) -> U,
) -> Result<Vec<(String, U)>, A::Error> {
    Ok(map.next_value::<Entries<T>>()?.0.into_iter().map(|(key, value)| (key, of(value))).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn backup(json: &str) -> Backup {
        let vm = VmId::new("vm").unwrap();
        let directory = ObjectPath::new("xo-vm-backups/vm").unwrap();
        let metadata = directory.join("20260801T020003Z.json").unwrap();
        let time = BackupTime::parse("20260801T020003Z").unwrap();
        Metadata::parse(json.as_bytes()).unwrap().into_backup(&vm, time, &directory, metadata)
    }

    #[test]
    fn an_incremental_backup_says_where_its_disks_are() {
        let backup = backup(
            r#"{"mode":"delta","jobId":"job","scheduleId":"schedule","size":4096,"tags":["daily=2026-08-01"],
            "isVhdDifferencing":{"OpaqueRef:1":true,"OpaqueRef:2":false},
            "vbds":{"OpaqueRef:b1":{"VDI":"OpaqueRef:1","device":"xvda","userdevice":"0"},
                    "OpaqueRef:b3":{"VDI":"OpaqueRef:3","device":"","userdevice":"2"}},
            "vdis":{"OpaqueRef:1":{"uuid":"a67ec284-6e18-4649-8455-5cc3d9a848f3","name_label":"system","type":"user",
                      "$snapshot_of$uuid":"35dc9828-1cad-4e68-9519-dd387bfcabca",
                      "name_description":"the disk","virtual_size":67108864},
                    "OpaqueRef:2":{"uuid":"92372447-7be1-4cdc-a9db-a065f9d20559","type":"suspend","virtual_size":"512"}},
            "vhds":{"OpaqueRef:1":"vdis/job/a/x.vhd","OpaqueRef:2":"vdis/job/b/x.alias.vhd","OpaqueRef:3":"vdis/c.vhd",
                    "OpaqueRef:4":"../../../etc/passwd","OpaqueRef:5":7},
            "vm":{"name_label":"web01"},"vmSnapshot":{"suspend_VDI":"OpaqueRef:NULL"}}"#,
        );
        assert_eq!((backup.mode, backup.size, backup.is_key), (Mode::Incremental, 4096, Some(false)));
        assert_eq!((backup.job_id.as_str(), backup.schedule_id.as_str()), ("job", "schedule"));
        assert_eq!(backup.tags, ["daily=2026-08-01"]);
        let names: Vec<_> = backup.disks.iter().map(|disk| disk.name.as_str()).collect();
        assert_eq!(names, ["xvda", "memory", "xvdc", "disk0", "disk1"]);
        let system = &backup.disks[0];
        assert_eq!(system.source, DiskSource::Vhd(ObjectPath::new("xo-vm-backups/vm/vdis/job/a/x.vhd").unwrap()));
        assert_eq!(system.vdi.unwrap().to_string(), "35dc9828-1cad-4e68-9519-dd387bfcabca");
        assert_eq!((system.label.as_str(), system.description.as_str()), ("system", "the disk"));
        assert_eq!(system.virtual_size, Some(67_108_864));
        assert_eq!(backup.disks[1].virtual_size, Some(512));
        assert!(matches!(&backup.disks[3].source, DiskSource::Unusable(why) if why.contains("outside the repository")));
        assert!(matches!(&backup.disks[4].source, DiskSource::Unusable(why) if why == "a path was expected in 'vhds'"));
        assert!(backup.problem.unwrap().starts_with("disk disk0: "));
    }

    #[test]
    fn what_retention_asks_for_is_kept_to_the_last_tag_and_millisecond() {
        let tags: Vec<String> = (0..100).map(|number| format!("\"tag {number}\"")).collect();
        let long = "t".repeat(100);
        let json = format!(
            r#"{{"mode":"full","timestamp":1785587696789,"tags":["{long}"],"vm":{{"tags":[{}]}}}}"#,
            tags.join(",")
        );
        let backup = backup(&json);
        assert_eq!(backup.timestamp.map(|at| at.as_millisecond()), Some(1_785_587_696_789));
        assert_eq!(backup.vm_tags.len(), 100);
        for (tag, expected) in [("tag 99", true), (&long, true), ("tag", false), ("tag 100", false), ("", false)] {
            assert_eq!(has_tag(&backup, tag), expected, "{tag}");
        }
        for value in ["-1", "1.5", "1e300", "18446744073709551615", "null", "\"soon\"", "[]"] {
            let json = format!("{{\"mode\":\"full\",\"timestamp\":{value}}}");
            assert_eq!(super::tests::backup(&json).timestamp, None, "{value}");
        }
    }

    #[test]
    fn values_of_a_wrong_shape_are_as_if_they_were_missing() {
        let odd = ["null", "7", "-1", "1.5", "\"x\"", "true", "[]", "[{}]", "{}", "{\"a\":[]}", "{\"a\":null}"];
        for value in odd {
            let fields =
                ["jobId", "scheduleId", "size", "tags", "xva", "vdis", "vbds", "vm", "vmSnapshot", "isVhdDifferencing"];
            let rest: String = fields.iter().map(|field| format!(",\"{field}\":{value}")).collect();
            let backup = backup(&format!("{{\"mode\":\"delta\",\"vhds\":{{\"r\":\"vdis/x.vhd\"}}{rest}}}"));
            assert_eq!((backup.mode, backup.disks.len()), (Mode::Incremental, 1), "{value}");
            assert_eq!(backup.problem, None, "{value}");
        }
        for value in odd {
            assert_eq!(backup(&format!("{{\"mode\":{value}}}")).mode, Mode::Unreadable, "{value}");
            assert!(backup(&format!("{{\"mode\":\"delta\",\"vhds\":{value}}}")).problem.is_some(), "{value}");
        }
    }

    #[test]
    fn what_is_no_json_object_does_not_parse() {
        for bytes in [
            &b""[..],
            b"  \n",
            b"[]",
            b"7",
            b"{",
            b"{\"mode\":\"delta\"",
            b"{\"vm\":{\"name_label\":\"web",
            b"{}x",
            b"\0\0",
        ] {
            assert!(Metadata::parse(bytes).is_err(), "{}", bytes.escape_ascii());
        }
        let deep = format!("{{\"a\":{}", "[".repeat(1 << 20));
        assert!(Metadata::parse(deep.as_bytes()).is_err());
    }

    #[test]
    fn the_last_of_two_equal_fields_counts_as_for_javascript() {
        assert_eq!(backup(r#"{"mode":"full","mode":"delta"}"#).mode, Mode::Incremental);
    }

    #[test]
    fn texts_are_cut_at_a_character() {
        assert_eq!(cut("aéb".to_owned(), 2), "a");
        assert_eq!(cut("aéb".to_owned(), 3), "aé");
        assert_eq!(cut("ab".to_owned(), 9), "ab");
        let name = "é".repeat(10_000);
        let json = format!("{{\"vm\":{{\"name_label\":\"{name}\"}}}}");
        assert_eq!(Metadata::parse(json.as_bytes()).unwrap().vm_name().len(), LABEL_LIMIT);
        let json = format!("{{\"mode\":\"delta\",\"vhds\":{{\"r\":\"{}\"}}}}", "a/".repeat(1000));
        assert!(matches!(&backup(&json).disks[0].source, DiskSource::Unusable(why) if why.contains("1024")));
    }
}
