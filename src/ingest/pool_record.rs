//! The metadata of a backup from a pool: the records as XAPI gave them, with what Xen Orchestra adds to them, in its order.
//!
//! Source: XO, `@xen-orchestra/backups/_incrementalVm.mjs` (`exportIncrementalVm`),
//! `_runners/_writers/IncrementalRemoteWriter.mjs`, `FullRemoteWriter.mjs`.

use indexmap::IndexMap;
use serde_json::json;
use serde_json::value::RawValue;
use uuid::Uuid;

use super::record::{Parts, Record, map, raw, set};
use crate::repository::Document;

/// What the pool says of a VM and its snapshot.
#[derive(Debug, Clone, Default)]
pub struct PoolRecords {
    /// The record of the VM.
    pub vm: Document,
    /// That of the snapshot; of the VM itself if it is halted and none was taken.
    pub snapshot: Document,
    /// The disks that are stored, in the order of [`Wanted::disks`](super::Wanted::disks); none of a full backup.
    pub vdis: Vec<PoolVdi>,
    /// The references and records of the snapshot's block devices that are disks.
    pub vbds: Vec<(String, Document)>,
    /// Its network interfaces.
    pub vifs: Vec<PoolVif>,
    /// The contents of its virtual TPMs; `None` of one that could not be read.
    pub vtpms: Vec<Option<String>>,
    /// The periods whose backup it is (`daily=2026-08-01`), where rules keep by such.
    pub tags: Vec<String>,
}

/// A disk of the snapshot.
#[derive(Debug, Clone)]
pub struct PoolVdi {
    /// Its reference.
    pub reference: String,
    /// Its record.
    pub record: Document,
    /// Its own uuid.
    pub uuid: Uuid,
    /// The uuid of the disk that it is the snapshot of: what its backups have in common. None of a memory image.
    pub snapshot_of: Option<Uuid>,
    /// The uuid of the storage that it lies in.
    pub sr: Uuid,
}

/// A network interface of the snapshot.
#[derive(Debug, Clone)]
pub struct PoolVif {
    /// Its reference.
    pub reference: String,
    /// Its record.
    pub record: Document,
    /// The uuid of its network.
    pub network: Uuid,
    /// The name of that.
    pub network_name: String,
    /// The VLAN of the first interface of a host on that network, if there is one.
    pub vlan: Option<i64>,
}

impl PoolRecords {
    /// Returns the uuids of each disk and of its snapshot. A memory image has a lineage of its own.
    pub(super) fn identities(&self) -> Vec<(Uuid, Uuid)> {
        self.vdis.iter().map(|vdi| (vdi.snapshot_of.unwrap_or(vdi.uuid), vdi.uuid)).collect()
    }

    /// Makes the metadata.
    pub(super) fn to_document(&self, record: &Record) -> Document {
        let Some(xva) = &record.xva else { return record.of_disks(self.parts(record)) };
        let fields: [(&str, Box<RawValue>); 10] = [
            ("jobId", raw(record.job)),
            ("mode", raw("full")),
            ("scheduleId", raw(record.schedule)),
            ("timestamp", raw(&record.timestamp.as_millisecond())),
            ("version", raw("2.0.0")),
            ("vm", raw(&self.vm)),
            ("vmSnapshot", raw(&self.snapshot)),
            ("xva", raw(&xva.path)),
            ("size", raw(&xva.bytes)),
            ("tags", raw(&self.tags)),
        ];
        fields.into_iter().map(|(name, value)| (name.to_owned(), value)).collect()
    }

    fn parts(&self, record: &Record) -> Parts {
        let vdis = self.vdis.iter().zip(&record.disks);
        let vdis = vdis.map(|(vdi, written)| (&vdi.reference, vdi.to_document(record.vm, written.base)));
        let vbds = self.vbds.iter().map(|(reference, record)| (reference, record));
        let vifs = self.vifs.iter().map(|vif| (&vif.reference, vif.to_document()));
        Parts {
            keys: self.vdis.iter().map(|vdi| vdi.reference.clone()).collect(),
            vbds: raw(&vbds.collect::<IndexMap<_, _>>()),
            vdis: raw(&vdis.collect::<IndexMap<_, _>>()),
            vifs: raw(&vifs.collect::<IndexMap<_, _>>()),
            vm: raw(&self.vm),
            vm_snapshot: raw(&self.snapshot),
            vtpms: raw(&self.vtpms),
            tags: raw(&self.tags),
        }
    }
}

impl PoolVdi {
    /// Returns the record with what Xen Orchestra adds to it: of a disk of `vm`, stored as the child of `base`.
    fn to_document(&self, vm: &str, base: Option<Uuid>) -> Document {
        let mut fields = self.record.clone();
        if let Some(snapshot_of) = self.snapshot_of {
            let mut config = map(&fields, "other_config");
            match base {
                Some(base) => set(&mut config, "xo:base_delta_vdi", &base),
                None => drop(config.shift_remove("xo:base_delta_vdi")),
            }
            set(&mut config, "xo:backup:vm", vm);
            set(&mut fields, "other_config", &config);
            set(&mut fields, "$snapshot_of$uuid", &snapshot_of);
        }
        set(&mut fields, "$SR$uuid", &self.sr);
        fields
    }
}

impl PoolVif {
    fn to_document(&self) -> Document {
        let mut fields = self.record.clone();
        set(&mut fields, "$network$uuid", &self.network);
        set(&mut fields, "$network$name_label", &self.network_name);
        if let Some(vlan) = self.vlan {
            set(&mut fields, "$network$VLAN", &json!(vlan));
        }
        fields
    }
}
