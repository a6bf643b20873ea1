//! A backup of another repository as what is stored: the same VM, disks, snapshots and time, and its metadata letter by
//! letter but for what says where and how it lies here.
//!
//! Like Xen Orchestra's own mirror: the disks are read through their chains and stored anew, as keys or increments on what is
//! here, and the backup belongs to the job that mirrors. Of the job that made it, which may write here too, two programs would
//! continue one chain. Of a full backup the XVA is stored as it is.
//!
//! Source: XO, `@xen-orchestra/backups/_runners/_vmRunners/IncrementalRemote.mjs`, `FullRemote.mjs`.

use indexmap::IndexMap;
use jiff::Timestamp;
use serde_json::{Value, json};
use uuid::Uuid;

use super::archive::named_by;
use super::error::{Error, ErrorKind, Result};
use super::origin::Origin;
use super::record::{Record, map, raw, set, text};
use super::run::fresh;
use super::source::Source;
use super::wanted::Wanted;
use super::xva_source::{StoredArchive, Xva};
use crate::repository::{Backup, Document, Mode, Repository, Vm};

/// The backup that is mirrored.
pub(super) struct Mirror {
    document: Document,
    /// None of a full one.
    disks: Vec<MirroredDisk>,
}

struct MirroredDisk {
    /// What `vdis` and `vhds` call it.
    key: String,
    /// The disk that was backed up, and its snapshot.
    identity: (Uuid, Uuid),
}

impl Wanted {
    /// Makes what is wanted to mirror a backup.
    ///
    /// # Errors
    /// [`ErrorKind::Source`] if it, a disk of it or its XVA cannot be read.
    pub fn mirror(repository: &Repository, vm: &Vm, backup: &Backup) -> Result<Self> {
        let name = format!("{}/{}", if vm.name.is_empty() { vm.id.as_str() } else { &vm.name }, backup.time);
        let source = |reason: &dyn std::fmt::Display| {
            Error::new(ErrorKind::Source, format!("the backup {} cannot be mirrored: {reason}", name.escape_debug()))
        };
        // An XVA need not be understood to be stored as it is.
        if let Some(problem) = backup.problem.as_ref().filter(|_| backup.mode != Mode::Full) {
            return Err(source(problem));
        }
        let stored = repository.backup_metadata(backup).map_err(|error| source(&error))?;
        let unreadable = |error| source(&format!("'{}': {error}", backup.metadata));
        let document: Document = serde_json::from_slice(&stored).map_err(unreadable)?;
        let time = Timestamp::from_second(backup.time.unix()).map_err(|error| source(&error))?;
        let wanted =
            Self { vm: vm.id.as_str().to_owned(), name: Some(vm.name.clone()), time: Some(time), ..Self::default() };
        if backup.mode == Mode::Full {
            let path = named_by(&document, &backup.metadata.parent());
            let names_none = || source(&format!("'{}' names no XVA of this repository", backup.metadata));
            let path = path.ok_or_else(names_none)?;
            let xva =
                StoredArchive::open(repository.storage().clone(), path, backup.size).map_err(|error| source(&error))?;
            let mirror = Mirror { document, disks: Vec::new() };
            return Ok(Self { origin: Some(Origin::of_mirror(mirror, Some(Xva::Stored(xva)))), ..wanted });
        }
        let vdis = map(&document, "vdis");
        let mut disks = Vec::with_capacity(backup.disks.len());
        let mut mirrored = Vec::with_capacity(backup.disks.len());
        // The disks of a backup are in the order of `vhds`.
        for (disk, key) in backup.disks.iter().zip(map(&document, "vhds").into_keys()) {
            let record: Option<Document> = vdis.get(&key).and_then(|record| serde_json::from_str(record.get()).ok());
            let snapshot = record.as_ref().and_then(|record| Uuid::try_parse(&text(record, "uuid")?).ok());
            let vdi = disk.vdi.ok_or_else(|| source(&format!("it does not say which disk {} is", disk.name)))?;
            let opened = repository.open_disk(backup, disk).map_err(|error| source(&error))?;
            disks.push((disk.name.clone(), Source::Disk(opened)));
            mirrored.push(MirroredDisk { key, identity: (vdi, snapshot.map_or_else(fresh, Ok)?) });
        }
        let mirror = Mirror { document, disks: mirrored };
        Ok(Self { disks, origin: Some(Origin::of_mirror(mirror, None)), ..wanted })
    }
}

impl Mirror {
    /// Returns the uuids of each disk and of its snapshot.
    pub fn identities(&self) -> Vec<(Uuid, Uuid)> {
        self.disks.iter().map(|disk| disk.identity).collect()
    }

    /// Returns the metadata: its own, with what `record` says of this repository.
    pub fn to_document(&self, record: &Record) -> Document {
        let mut document = self.document.clone();
        set(&mut document, "jobId", record.job);
        set(&mut document, "scheduleId", record.schedule);
        if let Some(xva) = &record.xva {
            set(&mut document, "xva", &xva.path);
            set(&mut document, "size", &xva.bytes);
            return document;
        }
        let of_disks = |value: &dyn Fn(usize) -> Value| -> IndexMap<&str, Value> {
            self.disks.iter().enumerate().map(|(number, disk)| (disk.key.as_str(), value(number))).collect()
        };
        let mut vdis = map(&document, "vdis");
        for (disk, written) in self.disks.iter().zip(&record.disks) {
            let Some(vdi) = vdis.get_mut(&disk.key) else { continue };
            let Ok(mut fields) = serde_json::from_str::<Document>(vdi.get()) else { continue };
            let mut config = map(&fields, "other_config");
            config.shift_remove("xo:base_delta_vdi");
            if let Some(base) = written.base {
                set(&mut config, "xo:base_delta_vdi", &base);
            }
            set(&mut fields, "other_config", &config);
            // XO finds the folder of a disk by it.
            set(&mut fields, "$snapshot_of$uuid", &written.vdi);
            *vdi = raw(&fields);
        }
        set(&mut document, "isVhdDifferencing", &of_disks(&|number| json!(record.disks[number].base.is_some())));
        set(&mut document, "vdis", &vdis);
        set(&mut document, "vhds", &of_disks(&|number| json!(record.disks[number].path)));
        set(&mut document, "size", &record.disks.iter().map(|disk| disk.size).sum::<u64>());
        document
    }
}
