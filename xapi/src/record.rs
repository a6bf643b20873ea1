//! Records: the fields of an object that are used, typed, and all that the pool says of it, as it says it.
//!
//! A field that a server does not have is as if it were empty; one that is new is kept in the raw record. Sizes are in
//! bytes. Source: XAPI, `ocaml/idl/datamodel.ml`, `datamodel_vm.ml`, `datamodel_host.ml`, `datamodel_pool.ml`.

use std::collections::BTreeMap;

use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

use crate::{Error, ErrorKind, Pool, Ref, Result};

/// A map of texts, such as `other_config`.
pub type Texts = BTreeMap<String, String>;

/// A class of XAPI, as the fields of it that are used.
pub trait Class: DeserializeOwned {
    /// What XAPI calls it.
    const NAME: &'static str;
}

/// An object, as it was when it was asked for.
#[derive(Debug, Clone)]
pub struct Record<C> {
    /// What it is called by.
    pub reference: Ref<C>,
    /// The fields that are used.
    pub fields: C,
    /// All fields, as the pool said them.
    pub raw: Map<String, Value>,
}

impl<C> std::ops::Deref for Record<C> {
    type Target = C;

    fn deref(&self) -> &C {
        &self.fields
    }
}

impl<C: Class> Record<C> {
    /// Takes what the pool says of an object.
    ///
    /// # Errors
    /// [`ErrorKind::Protocol`] if a field has another type than XAPI says.
    pub fn parse(reference: Ref<C>, value: Value) -> Result<Self> {
        let wrong = |reason: &dyn std::fmt::Display| {
            let subject = format!("the record of {} {reference}", C::NAME);
            Error::new(ErrorKind::Protocol, subject, reason)
        };
        let Value::Object(raw) = value else { return Err(wrong(&"it is no record")) };
        let fields = C::deserialize(&raw).map_err(|error| wrong(&error))?;
        Ok(Self { reference, fields, raw })
    }
}

impl Pool {
    /// Returns what the pool says of an object now.
    ///
    /// # Errors
    /// [`ErrorKind::Gone`], or as [`Pool::call`].
    pub fn record<C: Class>(&self, reference: &Ref<C>) -> Result<Record<C>> {
        let value = self.call(&format!("{}.get_record", C::NAME), &[reference.as_str().into()])?;
        Record::parse(reference.clone(), value)
    }

    /// Returns all objects of a class; of a large pool, megabytes.
    ///
    /// # Errors
    /// As [`Pool::call`].
    pub fn records<C: Class>(&self) -> Result<Vec<Record<C>>> {
        let found: Map<String, Value> = self.call(&format!("{}.get_all_records", C::NAME), &[])?;
        found.into_iter().map(|(reference, value)| Record::parse(Ref::new(reference), value)).collect()
    }

    /// Returns the records of some objects, without those that are gone.
    ///
    /// # Errors
    /// As [`Pool::call`].
    pub fn records_of<'a, C: Class + 'a>(
        &self,
        references: impl IntoIterator<Item = &'a Ref<C>>,
    ) -> Result<Vec<Record<C>>> {
        let known = references.into_iter().filter_map(Ref::known);
        let found = known.map(|reference| self.record(reference));
        found.filter(|found| !found.as_ref().is_err_and(Error::is_gone)).collect()
    }

    /// Returns the object of a uuid.
    ///
    /// # Errors
    /// [`ErrorKind::Gone`], or as [`Pool::call`].
    pub fn by_uuid<C: Class>(&self, uuid: &str) -> Result<Ref<C>> {
        self.call(&format!("{}.get_by_uuid", C::NAME), &[uuid.into()])
    }

    /// Returns the objects of a name; there may be several.
    ///
    /// # Errors
    /// As [`Pool::call`].
    pub fn by_name<C: Class>(&self, name: &str) -> Result<Vec<Ref<C>>> {
        self.call(&format!("{}.get_by_name_label", C::NAME), &[name.into()])
    }

    /// Returns one field.
    ///
    /// # Errors
    /// As [`Pool::call`].
    pub fn field<C: Class, T: DeserializeOwned>(&self, reference: &Ref<C>, field: &str) -> Result<T> {
        self.call(&format!("{}.get_{field}", C::NAME), &[reference.as_str().into()])
    }

    /// Sets one field.
    ///
    /// # Errors
    /// As [`Pool::call`].
    pub fn set<C: Class>(&self, reference: &Ref<C>, field: &str, value: impl Into<Value>) -> Result<()> {
        self.act(&format!("{}.set_{field}", C::NAME), &[reference.as_str().into(), value.into()])
    }

    /// Sets an entry of a map of texts (`other_config`, `blocked_operations`). XAPI has no call that changes one: for a moment
    /// an entry that is there is missing.
    ///
    /// # Errors
    /// As [`Pool::call`].
    pub fn set_entry<C: Class>(&self, reference: &Ref<C>, map: &str, key: &str, value: &str) -> Result<()> {
        let arguments = [reference.as_str().into(), key.into(), value.into()];
        // The second time it is gone, unless somebody else sets it, too.
        for _ in 0..3 {
            match self.act(&format!("{}.add_to_{map}", C::NAME), &arguments) {
                Err(error) if error.code() == "MAP_DUPLICATE_KEY" => self.remove_entry(reference, map, key)?,
                done => return done,
            }
        }
        let reason = format!("somebody else sets the entry '{key}' of {map} again and again");
        Err(Error::new(ErrorKind::Api, self.subject(C::NAME), reason))
    }

    /// Removes an entry of a map of texts, if it is there.
    ///
    /// # Errors
    /// As [`Pool::call`].
    pub fn remove_entry<C: Class>(&self, reference: &Ref<C>, map: &str, key: &str) -> Result<()> {
        self.act(&format!("{}.remove_from_{map}", C::NAME), &[reference.as_str().into(), key.into()])
    }
}

/// Declares classes: the name that XAPI has for each, and the fields that are used.
macro_rules! classes {
    ($($(#[$doc:meta])* $class:ident = $name:literal { $($(#[$of:meta])* $field:ident: $type:ty,)* })*) => {$(
        $(#[$doc])*
        #[derive(Debug, Clone, Default, Deserialize)]
        #[serde(default)]
        pub struct $class {
            $($(#[$of])* #[doc = concat!("The field `", stringify!($field), "`.")] pub $field: $type,)*
        }

        impl Class for $class {
            const NAME: &'static str = $name;
        }
    )*};
}

classes! {
    /// A pool.
    PoolObject = "pool" {
        uuid: String,
        name_label: String,
        master: Ref<Host>,
        #[serde(rename = "default_SR")]
        default_sr: Ref<Sr>,
        other_config: Texts,
    }

    /// A host.
    Host = "host" {
        uuid: String,
        name_label: String,
        address: String,
        hostname: String,
        enabled: bool,
        #[serde(rename = "PBDs")]
        pbds: Vec<Ref<Pbd>>,
        software_version: Texts,
        other_config: Texts,
    }

    /// A storage repository.
    Sr = "SR" {
        uuid: String,
        name_label: String,
        r#type: String,
        content_type: String,
        shared: bool,
        #[serde(rename = "PBDs")]
        pbds: Vec<Ref<Pbd>>,
        #[serde(rename = "VDIs")]
        vdis: Vec<Ref<Vdi>>,
        /// -1 of some whose size nobody knows.
        physical_size: i64,
        physical_utilisation: i64,
        virtual_allocation: i64,
        sm_config: Texts,
        other_config: Texts,
        allowed_operations: Vec<String>,
    }

    /// The connection of a host to an SR.
    Pbd = "PBD" {
        uuid: String,
        host: Ref<Host>,
        #[serde(rename = "SR")]
        sr: Ref<Sr>,
        currently_attached: bool,
        device_config: Texts,
    }

    /// A network.
    Network = "network" {
        uuid: String,
        name_label: String,
        purpose: Vec<String>,
        #[serde(rename = "PIFs")]
        pifs: Vec<Ref<Pif>>,
        #[serde(rename = "MTU")]
        mtu: i64,
        other_config: Texts,
    }

    /// The connection of a host to a network.
    Pif = "PIF" {
        uuid: String,
        network: Ref<Network>,
        host: Ref<Host>,
        #[serde(rename = "IP")]
        ip: String,
        #[serde(rename = "IPv6")]
        ipv6: Vec<String>,
        #[serde(rename = "VLAN")]
        vlan: i64,
        currently_attached: bool,
    }

    /// A virtual machine, a snapshot of one, a template, or a host's control domain.
    Vm = "VM" {
        uuid: String,
        name_label: String,
        name_description: String,
        power_state: String,
        is_a_template: bool,
        is_a_snapshot: bool,
        is_default_template: bool,
        is_control_domain: bool,
        snapshot_of: Ref<Vm>,
        snapshots: Vec<Ref<Vm>>,
        snapshot_time: String,
        #[serde(rename = "VBDs")]
        vbds: Vec<Ref<Vbd>>,
        #[serde(rename = "VIFs")]
        vifs: Vec<Ref<Vif>>,
        #[serde(rename = "VTPMs")]
        vtpms: Vec<Ref<Vtpm>>,
        #[serde(rename = "suspend_VDI")]
        suspend_vdi: Ref<Vdi>,
        resident_on: Ref<Host>,
        other_config: Texts,
        tags: Vec<String>,
        blocked_operations: Texts,
        current_operations: Texts,
        allowed_operations: Vec<String>,
        guest_metrics: Ref<GuestMetrics>,
    }

    /// What a guest says of itself.
    GuestMetrics = "VM_guest_metrics" {
        uuid: String,
        #[serde(rename = "PV_drivers_detected")]
        pv_drivers_detected: bool,
        os_version: Texts,
    }

    /// The connection of a machine to a disk.
    Vbd = "VBD" {
        uuid: String,
        #[serde(rename = "VM")]
        vm: Ref<Vm>,
        #[serde(rename = "VDI")]
        vdi: Ref<Vdi>,
        device: String,
        userdevice: String,
        bootable: bool,
        mode: String,
        r#type: String,
        empty: bool,
        currently_attached: bool,
        other_config: Texts,
    }

    /// A disk.
    Vdi = "VDI" {
        uuid: String,
        name_label: String,
        name_description: String,
        #[serde(rename = "SR")]
        sr: Ref<Sr>,
        #[serde(rename = "VBDs")]
        vbds: Vec<Ref<Vbd>>,
        virtual_size: u64,
        physical_utilisation: i64,
        r#type: String,
        sharable: bool,
        read_only: bool,
        other_config: Texts,
        sm_config: Texts,
        location: String,
        managed: bool,
        missing: bool,
        is_a_snapshot: bool,
        snapshot_of: Ref<Vdi>,
        snapshots: Vec<Ref<Vdi>>,
        snapshot_time: String,
        tags: Vec<String>,
        cbt_enabled: bool,
        current_operations: Texts,
    }

    /// The connection of a machine to a network.
    Vif = "VIF" {
        uuid: String,
        #[serde(rename = "VM")]
        vm: Ref<Vm>,
        network: Ref<Network>,
        device: String,
        #[serde(rename = "MAC")]
        mac: String,
        #[serde(rename = "MTU")]
        mtu: i64,
        currently_attached: bool,
        other_config: Texts,
    }

    /// A virtual TPM.
    Vtpm = "VTPM" {
        uuid: String,
        #[serde(rename = "VM")]
        vm: Ref<Vm>,
    }

    /// A task.
    TaskObject = "task" {
        uuid: String,
        name_label: String,
        status: String,
        progress: f64,
        result: String,
        error_info: Vec<String>,
    }
}

impl Vdi {
    /// Returns the uuid of the disk that it is built on in its SR, if it is.
    #[must_use]
    pub fn parent(&self) -> Option<&str> {
        self.sm_config.get("vhd-parent").map(String::as_str).filter(|parent| !parent.is_empty())
    }
}
