//! What a replica is made after: the machine, its disks and interfaces, as the pool that it is in says it of them.

use serde_json::{Value, json};
use uuid::Uuid;
use xapi::Pool;

use crate::pool::error::Result;
use crate::pool::restore::document::Fields;
use crate::pool::snapshot::Taken;
use crate::pool::survey::{LiveDisk, Survey, interfaces};

/// A machine.
pub struct Source {
    /// Its name.
    pub name: String,
    /// Its record.
    pub vm: Fields,
    /// Its disks, in the order of their places; none of a full backup, which has them itself.
    pub disks: Vec<SourceDisk>,
    /// Its interfaces, with what is known of their networks, as backups have it.
    pub vifs: Vec<Fields>,
    /// What its virtual TPMs hold; `None` for one that could not be read.
    pub vtpms: Vec<Option<String>>,
}

/// A disk of a machine.
pub struct SourceDisk {
    /// Its uuid.
    pub uuid: Uuid,
    /// Its record; of the snapshot that is read.
    pub vdi: Fields,
    /// What connects it.
    pub vbds: Vec<Fields>,
}

impl Source {
    /// Gathers it. `vtpms` is what its virtual TPMs hold.
    ///
    /// # Errors
    /// What the pool says.
    pub fn of(
        pool: &Pool,
        survey: &Survey,
        taken: &Taken,
        disks: &[&LiveDisk],
        vtpms: &[Option<String>],
    ) -> Result<Self> {
        let of_disk = |disk: &&LiveDisk| {
            let vdi = taken.disk_of(disk)?;
            let devices = taken.devices.iter().filter(|device| device.vdi == vdi.reference);
            let vbds = devices.map(|device| device.raw.clone()).collect();
            Some(SourceDisk { uuid: disk.uuid, vdi: vdi.raw.clone(), vbds })
        };
        let vif = |interface: crate::pool::survey::Interface| {
            let mut vif = interface.vif.raw;
            for (name, value) in [
                ("$network$uuid", json!(interface.network.uuid)),
                ("$network$name_label", json!(interface.network.name_label)),
                ("$network$VLAN", interface.vlan.map_or(Value::Null, Value::from)),
            ] {
                vif.insert(name.to_owned(), value);
            }
            vif
        };
        Ok(Self {
            name: survey.vm.name_label.clone(),
            vm: survey.vm.raw.clone(),
            disks: disks.iter().filter_map(of_disk).collect(),
            vifs: interfaces(pool, &taken.vm)?.into_iter().map(vif).collect(),
            vtpms: vtpms.to_vec(),
        })
    }
}
