//! A VDI attached to a host's control domain while its bytes move, by a VBD that others see.
//!
//! Source: xen-api `ocaml/xapi/sm_fs_ops.ml`, `attach_helpers.ml`.

use crate::failure::{Failure, Outcome};
use crate::schema::Class;
use crate::value::Reference;
use crate::world::World;
use std::sync::Arc;

/// A VDI that is attached; when this is dropped it is detached, after the delay that the pool's settings say.
pub struct Attachment {
    world: Arc<World>,
    vbd: Reference,
}

/// Attaches a VDI to the control domain of a host.
///
/// # Errors
/// `VDI_IN_USE` if something writes to it, or if it is to be written and something has it; `SR_NOT_ATTACHED`.
pub fn attach(world: &Arc<World>, host: usize, vdi: &Reference, is_written: bool) -> Outcome<Attachment> {
    let mut access = world.lock();
    let reference = access.hosts.get(host).cloned().unwrap_or_else(Reference::null);
    let sr = access.store.reference(Class::Vdi, vdi, "SR")?;
    if !access.hosts_of(&sr).contains(&reference) {
        return Err(Failure::new("SR_NOT_ATTACHED", [sr.as_str()]));
    }
    for vbd in access.store.references(Class::Vdi, vdi, "VBDs")? {
        let is_attached = access.store.flag(Class::Vbd, &vbd, "currently_attached")?;
        if is_attached && (is_written || access.store.text(Class::Vbd, &vbd, "mode")? == "RW") {
            return Err(Failure::in_use(vdi, "attach"));
        }
    }
    let domain = access.control_domain(&reference);
    let vbd = access.store.create(
        Class::Vbd,
        [
            ("VM", (&domain).into()),
            ("VDI", vdi.into()),
            ("mode", if is_written { "RW" } else { "RO" }.into()),
            ("userdevice", "autodetect".into()),
            ("device", "xvda".into()),
            ("currently_attached", true.into()),
        ],
    );
    Ok(Attachment { world: Arc::clone(world), vbd })
}

impl Drop for Attachment {
    fn drop(&mut self) {
        let delay = self.world.lock().settings.detach_delay;
        if delay.is_zero() || self.world.is_stopping() {
            self.world.lock().store.destroy(Class::Vbd, &self.vbd);
            return;
        }
        let vbd = self.vbd.clone();
        self.world.spawn(move |world| {
            world.pause(delay);
            world.lock().store.destroy(Class::Vbd, &vbd);
        });
    }
}
