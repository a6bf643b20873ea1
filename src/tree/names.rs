//! The names of the VMs' directories, worked out once for each listing.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use crate::repository::{Repository, Result, Vm, VmId, vm_directory_names};

/// The names of one listing.
pub(super) struct VmNames {
    /// The listing.
    vms: Arc<Vec<Vm>>,
    by_name: HashMap<String, VmId>,
    by_vm: HashMap<VmId, String>,
}

impl VmNames {
    /// Returns the VM whose directory has that name.
    pub(super) fn vm(&self, name: &str) -> Option<&VmId> {
        self.by_name.get(name)
    }

    /// Returns the name of a VM's directory.
    pub(super) fn name(&self, vm: &VmId) -> Option<&str> {
        self.by_vm.get(vm).map(String::as_str)
    }

    /// Returns every name and its VM, in no order.
    pub(super) fn iter(&self) -> impl Iterator<Item = (&str, &VmId)> {
        self.by_name.iter().map(|(name, vm)| (name.as_str(), vm))
    }
}

/// The names of the newest listing.
#[derive(Default)]
pub(super) struct Names(Mutex<Option<Arc<VmNames>>>);

impl Names {
    /// Returns the names for what the repository lists now.
    pub(super) fn get(&self, repository: &Repository) -> Result<Arc<VmNames>> {
        let vms = repository.vms()?;
        let mut newest = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(names) = newest.as_ref().filter(|names| Arc::ptr_eq(&names.vms, &vms)) {
            return Ok(names.clone());
        }
        let named = vms.iter().map(|vm| vm.id.clone()).zip(vm_directory_names(&vms));
        let by_vm: HashMap<VmId, String> = named.collect();
        let by_name = by_vm.iter().map(|(vm, name)| (name.clone(), vm.clone())).collect();
        let names = Arc::new(VmNames { vms, by_name, by_vm });
        *newest = Some(names.clone());
        Ok(names)
    }
}
