//! What is done with machines: snapshots, creating, destroying, starting and stopping.

use serde_json::{Map, Value, json};

use crate::record::{Vbd, Vdi, Vif, Vm, Vtpm};
use crate::storage::unless_gone;
use crate::{Pool, Ref, Result};

impl Pool {
    /// Makes a snapshot of a machine with all its disks but `ignored`; each disk is as after a crash, one moment after the
    /// other. After an error there may be a snapshot nevertheless, of this name.
    ///
    /// # Errors
    /// As [`Pool::run`]; `MESSAGE_PARAMETER_COUNT_MISMATCH` if disks are ignored and the pool, older than XAPI 21.4, cannot do
    /// that: nothing was done then. `SR_BACKEND_FAILURE_109` if the chain of a disk is too long.
    pub fn snapshot_vm(&self, vm: &Ref<Vm>, name: &str, ignored: &[&Ref<Vdi>]) -> Result<Ref<Vm>> {
        let mut arguments = vec![json!(vm), name.into()];
        // Older pools do not know the argument.
        if !ignored.is_empty() {
            arguments.push(json!(ignored));
        }
        self.run("VM.snapshot", &arguments)?.reference()
    }

    /// Destroys the disks of a snapshot that were made of `unwanted` ones.
    ///
    /// # Errors
    /// As [`Pool::destroy_vdi`].
    pub fn destroy_disks_of(&self, snapshot: &Ref<Vm>, unwanted: &[&Ref<Vdi>]) -> Result<()> {
        let vbds: Vec<Ref<Vbd>> = self.field(snapshot, "VBDs")?;
        for vbd in self.records_of(&vbds)? {
            let Some(reference) = vbd.vdi.known() else { continue };
            let vdi = self.record(reference)?;
            if vdi.is_a_snapshot && unwanted.contains(&&vdi.snapshot_of) {
                // First the disk: nothing would lead to it from the snapshot any more.
                self.destroy_vdi(reference)?;
                self.destroy_vbd(&vbd.reference)?;
            }
        }
        Ok(())
    }

    /// Destroys a machine or a snapshot of one, but none of its disks. One that is gone is no error.
    ///
    /// # Errors
    /// As [`Pool::run`]; `VDI_IN_USE` after some minutes.
    pub fn destroy_vm(&self, vm: &Ref<Vm>) -> Result<()> {
        self.destroy(vm, "destroy", || Ok(()))
    }

    /// Makes a machine of the fields that XAPI has for it, without disks and networks.
    ///
    /// # Errors
    /// As [`Pool::call`].
    pub fn create_vm(&self, fields: &Map<String, Value>) -> Result<Ref<Vm>> {
        self.call("VM.create", &[json!(fields)])
    }

    /// Starts a machine, or starts it paused; disks that were written or read a moment ago are waited for until they are let go.
    ///
    /// # Errors
    /// As [`Pool::run`].
    pub fn start_vm(&self, vm: &Ref<Vm>, is_paused: bool) -> Result<()> {
        self.once_let_go("VM.start", &[json!(vm), is_paused.into(), false.into()])
    }

    /// Has the pool see anew what may be done with a machine, after its blocked operations were changed.
    ///
    /// # Errors
    /// As [`Pool::call`].
    pub fn update_allowed_operations(&self, vm: &Ref<Vm>) -> Result<()> {
        self.act("VM.update_allowed_operations", &[json!(vm)])
    }

    /// Sets the memory of a machine (bytes), all of it at once.
    ///
    /// # Errors
    /// As [`Pool::call`].
    pub fn set_memory(&self, vm: &Ref<Vm>, fixed: (u64, u64), dynamic: (u64, u64)) -> Result<()> {
        let limits = [json!(vm), fixed.0.into(), fixed.1.into(), dynamic.0.into(), dynamic.1.into()];
        self.act("VM.set_memory_limits", &limits)
    }

    /// Adds a tag to a machine.
    ///
    /// # Errors
    /// As [`Pool::call`].
    pub fn add_tag(&self, vm: &Ref<Vm>, tag: &str) -> Result<()> {
        self.act("VM.add_tags", &[json!(vm), tag.into()])
    }

    /// Returns the places where a machine can have another disk.
    ///
    /// # Errors
    /// As [`Pool::call`].
    pub fn allowed_devices(&self, vm: &Ref<Vm>) -> Result<Vec<String>> {
        self.call("VM.get_allowed_VBD_devices", &[json!(vm)])
    }

    /// Connects a machine to a disk.
    ///
    /// # Errors
    /// As [`Pool::call`].
    pub fn create_vbd(&self, fields: &Map<String, Value>) -> Result<Ref<Vbd>> {
        self.call("VBD.create", &[json!(fields)])
    }

    /// Takes the connection to a disk away. One that is gone is no error.
    ///
    /// # Errors
    /// As [`Pool::call`].
    pub fn destroy_vbd(&self, vbd: &Ref<Vbd>) -> Result<()> {
        unless_gone(vbd, self.act("VBD.destroy", &[json!(vbd)]))
    }

    /// Connects a machine to a network.
    ///
    /// # Errors
    /// As [`Pool::call`].
    pub fn create_vif(&self, fields: &Map<String, Value>) -> Result<Ref<Vif>> {
        self.call("VIF.create", &[json!(fields)])
    }

    /// Takes the connection to a network away. One that is gone is no error.
    ///
    /// # Errors
    /// As [`Pool::call`].
    pub fn destroy_vif(&self, vif: &Ref<Vif>) -> Result<()> {
        unless_gone(vif, self.act("VIF.destroy", &[json!(vif)]))
    }

    /// Returns what a virtual TPM holds.
    ///
    /// # Errors
    /// As [`Pool::call`]; [`crate::ErrorKind::Unsupported`] of a pool that has none.
    pub fn tpm_contents(&self, vtpm: &Ref<Vtpm>) -> Result<zeroize::Zeroizing<String>> {
        self.call("VTPM.get_contents", &[json!(vtpm)]).map(zeroize::Zeroizing::new)
    }
}
