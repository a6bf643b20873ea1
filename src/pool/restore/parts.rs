//! What a machine has beside its disks, made in a pool one by one, for restores and replicas alike: what the pool does not know how
//! to make is told, and left out.

use std::collections::BTreeMap;

use serde_json::{Value, json};
use xapi::record::Vm;
use xapi::{ErrorKind, Pool, Ref};

use super::document::Fields;
use super::networks::Interface;
use super::records;
use crate::pool::error::Result;

/// Who is told what is left out.
type Say<'a> = &'a dyn Fn(&str);

/// Blocks `operations` of a machine that was made to have them blocked, which some versions of XAPI leave out.
pub fn block(pool: &Pool, vm: &Ref<Vm>, operations: &[&str], because: &str) -> Result<()> {
    let blocked: BTreeMap<String, String> = pool.field(vm, "blocked_operations")?;
    for operation in operations.iter().filter(|operation| !blocked.contains_key(**operation)) {
        pool.set_entry(vm, "blocked_operations", operation, because)?;
    }
    Ok(())
}

/// Gives a machine the BIOS strings that `record` says, if it says any.
pub fn set_bios_strings(pool: &Pool, vm: &Ref<Vm>, record: &Fields, say: Say) -> Result<()> {
    let Some(strings) = records::bios_strings(record) else { return Ok(()) };
    match pool.act("VM.set_bios_strings", &[json!(vm), Value::Object(strings)]) {
        Err(error) if error.kind() == ErrorKind::Unsupported => {
            say("this pool is too old for the BIOS strings of the VM: they are left out");
            Ok(())
        }
        set => Ok(set?),
    }
}

/// Gives a machine an interface, if there is a network for it.
pub fn make_interface(pool: &Pool, vm: &Ref<Vm>, interface: &Interface, say: Say) -> Result<()> {
    let network = match &interface.network {
        Ok(network) => network,
        Err(why) => {
            let (device, old) = (interface.device.escape_debug(), interface.old.escape_debug());
            say(&format!("the interface {device} on '{old}' is left out: {why}"));
            return Ok(());
        }
    };
    let (mac, mtu) = (&interface.mac, network.mtu);
    pool.create_vif(&records::interface(&interface.vif, vm.as_str(), &network.reference, mac, mtu))?;
    Ok(())
}

/// Gives a machine a virtual TPM with `contents`.
pub fn make_tpm(pool: &Pool, vm: &Ref<Vm>, contents: &str, say: Say) -> Result<()> {
    match pool.call::<String>("VTPM.create", &[json!(vm), json!(false)]) {
        Err(error) if matches!(error.kind(), ErrorKind::Unsupported | ErrorKind::Denied) => {
            say(&format!("the virtual TPM is left out: this pool makes none ({error})"));
            Ok(())
        }
        made => Ok(pool.act("VTPM.set_contents", &[json!(made?), json!(contents)])?),
    }
}
