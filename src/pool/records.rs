//! What the pool says of a VM and its snapshot, as a backup's metadata wants it: whole records, as they came.

use serde_json::value::to_raw_value;
use serde_json::{Map, Value, json};
use uuid::Uuid;
use xapi::record::Sr;
use xapi::{Pool, Record};

use super::error::{Error, ErrorKind, Result};
use super::snapshot::Taken;
use super::survey::{LiveDisk, Survey, interfaces, uuid_of};
use crate::ingest::{PoolRecords, PoolVdi, PoolVif};
use crate::repository::Document;

/// Returns what the metadata of a backup of `disks` tells, in their order; none of a full backup.
///
/// # Errors
/// What the pool says.
pub fn of(pool: &Pool, survey: &Survey, taken: &Taken, disks: &[&LiveDisk]) -> Result<PoolRecords> {
    let mut records =
        PoolRecords { vm: document(&survey.vm.raw), snapshot: document(&taken.vm.raw), ..PoolRecords::default() };
    for disk in disks {
        let Some(vdi) = taken.disk_of(disk) else { continue };
        records.vdis.push(PoolVdi {
            reference: vdi.reference.as_str().to_owned(),
            record: document(&vdi.raw),
            uuid: uuid_of(vdi)?,
            snapshot_of: Some(disk.uuid),
            sr: sr_uuid(survey, disk)?,
        });
        let devices = taken.devices.iter().filter(|device| device.vdi == vdi.reference);
        records.vbds.extend(devices.map(|device| (device.reference.as_str().to_owned(), document(&device.raw))));
    }
    for interface in interfaces(pool, &taken.vm)? {
        let network = Uuid::try_parse(&interface.network.uuid);
        records.vifs.push(PoolVif {
            reference: interface.vif.reference.as_str().to_owned(),
            record: document(&interface.vif.raw),
            network: network.map_err(|_| odd("a network", &interface.network.uuid))?,
            network_name: interface.network.name_label.clone(),
            vlan: interface.vlan,
        });
    }
    for vtpm in &survey.vm.vtpms {
        let contents: xapi::Result<String> = pool.call("VTPM.get_contents", &[json!(vtpm)]);
        records.vtpms.push(contents.map_err(|error| tracing::warn!(%error, "a virtual TPM is not read")).ok());
    }
    Ok(records)
}

fn sr_uuid(survey: &Survey, disk: &LiveDisk) -> Result<Uuid> {
    let sr: Option<&Record<Sr>> = survey.storages.get(&disk.vdi.sr);
    let uuid = sr.map_or("", |sr| sr.uuid.as_str());
    Uuid::try_parse(uuid).map_err(|_| odd("a storage", uuid))
}

fn odd(what: &str, uuid: &str) -> Error {
    let message = format!("the pool says '{}' of {what} where a uuid was expected", uuid.escape_debug());
    Error::new(ErrorKind::Pool(xapi::ErrorKind::Protocol), message)
}

fn document(record: &Map<String, Value>) -> Document {
    let raw = |value: &Value| to_raw_value(value).expect("what was parsed can be written");
    record.iter().map(|(name, value)| (name.clone(), raw(value))).collect()
}
