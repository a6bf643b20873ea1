//! What the pool has that a restore is made of: networks, SRs, MACs. Read from the pool, once for a run.

use std::collections::{BTreeMap, BTreeSet};

use xapi::record::{Network, Pif, PoolObject, Sr, Vif};
use xapi::{Pool, Record, Ref};

use super::networks;
use crate::pool::error::{Error, ErrorKind, Result};

/// What the pool has.
pub struct Target {
    /// Its networks.
    pub networks: Vec<networks::Network>,
    /// The MACs of all its interfaces, in lower case.
    pub macs: BTreeSet<String>,
    storages: Vec<Record<Sr>>,
    default: Ref<Sr>,
}

impl Target {
    /// Looks at the pool.
    ///
    /// # Errors
    /// What the pool says.
    pub fn of(pool: &Pool) -> Result<Self> {
        let vlans: BTreeMap<Ref<Pif>, i64> =
            pool.records::<Pif>()?.into_iter().map(|pif| (pif.reference.clone(), pif.vlan)).collect();
        let network = |network: Record<Network>| networks::Network {
            vlan: network.pifs.iter().find_map(|pif| vlans.get(pif).copied()),
            uuid: network.uuid.clone(),
            name: network.name_label.clone(),
            mtu: network.mtu,
            reference: network.reference.as_str().to_owned(),
        };
        let pools = pool.records::<PoolObject>()?;
        Ok(Self {
            networks: pool.records::<Network>()?.into_iter().map(network).collect(),
            macs: pool.records::<Vif>()?.iter().map(|vif| vif.mac.to_ascii_lowercase()).collect(),
            storages: pool.records()?,
            default: pools.first().map_or_else(Ref::null, |pool| pool.default_sr.clone()),
        })
    }

    /// Finds the SR that was asked for, by uuid or name; the pool's default without.
    ///
    /// # Errors
    /// [`ErrorKind::Usage`] if there is none, or it takes no disks.
    pub fn storage(&self, wanted: Option<&str>) -> Result<&Record<Sr>> {
        let names = || {
            let usable = self.storages.iter().filter(|sr| refusal(sr).is_none());
            usable.map(|sr| format!("'{}' ({})", sr.name_label.escape_debug(), sr.uuid)).collect::<Vec<_>>().join(", ")
        };
        let usage = |message: String| Error::new(ErrorKind::Usage, message);
        let Some(wanted) = wanted else {
            return self.storages.iter().find(|sr| sr.reference == self.default).ok_or_else(|| {
                usage(format!("the pool has no default SR: name one with --sr; there are {}", names()))
            });
        };
        let shown = wanted.escape_debug();
        let by_uuid = self.storages.iter().find(|sr| sr.uuid == wanted.to_ascii_lowercase());
        let found: Vec<&Record<Sr>> = match by_uuid {
            Some(one) => vec![one],
            None => self.storages.iter().filter(|sr| sr.name_label == wanted).collect(),
        };
        match found.as_slice() {
            [one] => match refusal(one) {
                Some(why) => Err(usage(format!("the SR '{shown}' {why}"))),
                None => Ok(one),
            },
            [] => Err(usage(format!("the pool has no SR '{shown}'; there are {}", names()))),
            several => {
                let uuids: Vec<&str> = several.iter().map(|sr| sr.uuid.as_str()).collect();
                Err(usage(format!("several SRs are called '{shown}': {}; say which by its uuid", uuids.join(", "))))
            }
        }
    }

    /// Returns the SR of a reference.
    #[must_use]
    pub fn storage_of(&self, reference: &Ref<Sr>) -> Option<&Record<Sr>> {
        self.storages.iter().find(|sr| sr.reference == *reference)
    }
}

/// Says why an SR takes no disks.
fn refusal(sr: &Sr) -> Option<&'static str> {
    if sr.content_type == "iso" || sr.r#type == "iso" || sr.r#type == "udev" {
        return Some("is for images and drives, not for disks");
    }
    let allows = sr.allowed_operations.is_empty() || sr.allowed_operations.iter().any(|act| act == "vdi_create");
    (!allows).then_some("allows no disk to be made now: see whether it is attached to a host")
}
