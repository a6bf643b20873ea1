//! Changed blocks, and where disks are read over NBD.

use super::Method;
use crate::cbt::changed_blocks;
use crate::failure::{Failure, Outcome};
use crate::rpc::{Arguments, Call, argument};
use crate::schema::Class;
use crate::schema::Kind::Reference;
use crate::value::{self, Value, map};
use crate::world::State;
use base64::Engine;
use std::time::Duration;

pub(super) const METHODS: &[Method] = &[
    Method::new("VDI.enable_cbt", &[argument("self", Reference)], |call, arguments| switch(call, arguments, true)),
    Method::new("VDI.disable_cbt", &[argument("self", Reference)], |call, arguments| switch(call, arguments, false)),
    Method::new("VDI.data_destroy", &[argument("self", Reference)], data_destroy),
    Method::new(
        "VDI.list_changed_blocks",
        &[argument("vdi_from", Reference), argument("vdi_to", Reference)],
        list_changed_blocks,
    ),
    Method::new("VDI.get_nbd_info", &[argument("self", Reference)], get_nbd_info).only_synchronous(),
];

/// Returns bytes as base64, as bitmaps are answered.
pub fn encode(bytes: &[u8]) -> String {
    base64::engine::general_purpose::STANDARD.encode(bytes)
}

fn switch(call: &Call, arguments: &Arguments, is_on: bool) -> Outcome<Value> {
    let vdi = arguments.reference(0);
    let mut access = call.world.lock();
    if access.store.flag(Class::Vdi, &vdi, "is_a_snapshot")? {
        return Err(Failure::new(
            "OPERATION_NOT_ALLOWED",
            ["VDI is a snapshot: changed block tracking can't be switched"],
        ));
    }
    let sr = access.store.reference(Class::Vdi, &vdi, "SR")?;
    let content =
        access.disks.get_mut(&vdi).ok_or_else(|| Failure::new("VDI_INCOMPATIBLE_TYPE", [vdi.as_str(), "raw"]))?;
    if is_on {
        content.enable_cbt();
    } else {
        content.disable_cbt();
    }
    access.settle(&sr);
    Ok(Value::void())
}

fn data_destroy(call: &Call, arguments: &Arguments) -> Outcome<Value> {
    let vdi = arguments.reference(0);
    let wait = {
        let access = call.world.lock();
        if access.store.text(Class::Vdi, &vdi, "type")? == "cbt_metadata" {
            return Ok(Value::void());
        }
        if !access.store.flag(Class::Vdi, &vdi, "is_a_snapshot")? {
            return Err(Failure::new("OPERATION_NOT_ALLOWED", ["VDI is not a snapshot"]));
        }
        if !access.store.flag(Class::Vdi, &vdi, "cbt_enabled")? {
            return Err(Failure::new("VDI_NO_CBT_METADATA", [vdi.as_str()]));
        }
        access.settings.data_destroy_wait
    };
    let done = call.world.wait_until(wait.max(Duration::from_millis(1)), |state| match free_of_vbds(state, &vdi) {
        Ok(true) => Some(destroy_data(state, &vdi)),
        Ok(false) => None,
        Err(failure) => Some(Err(failure)),
    });
    done.unwrap_or_else(|| Err(Failure::in_use(&vdi, "data_destroy")))?;
    Ok(Value::void())
}

fn free_of_vbds(state: &State, vdi: &value::Reference) -> Outcome<bool> {
    Ok(state.store.references(Class::Vdi, vdi, "VBDs")?.is_empty())
}

fn destroy_data(state: &mut State, vdi: &value::Reference) -> Outcome<()> {
    let sr = state.store.reference(Class::Vdi, vdi, "SR")?;
    if let Some(content) = state.disks.get_mut(vdi) {
        content.destroy_data();
    }
    state.store.set(Class::Vdi, vdi, "type", "cbt_metadata")?;
    state.settle(&sr);
    Ok(())
}

fn list_changed_blocks(call: &Call, arguments: &Arguments) -> Outcome<Value> {
    let (from, to) = (arguments.reference(0), arguments.reference(1));
    let access = call.world.lock();
    for vdi in [&from, &to] {
        access.store.object(Class::Vdi, vdi)?;
    }
    access.check_unused(&to, "list_changed_blocks")?;
    let log = |vdi| access.disks.get(vdi).and_then(|disk| disk.log());
    match changed_blocks(log(&from), log(&to)) {
        Ok(bits) => Ok(encode(&bits).into()),
        Err(unavailable) => Err(Failure::storage(unavailable.number(), unavailable.text())),
    }
}

fn get_nbd_info(call: &Call, arguments: &Arguments) -> Outcome<Value> {
    let vdi = arguments.reference(0);
    let access = call.world.lock();
    let store = &access.store;
    let uuid = store.text(Class::Vdi, &vdi, "uuid")?;
    if store.text(Class::Vdi, &vdi, "type")? == "cbt_metadata" {
        return Err(Failure::new("VDI_INCOMPATIBLE_TYPE", [vdi.as_str(), "CBT metadata"]));
    }
    let name = format!("/{uuid}?session_id={}", call.session);
    let port = call.world.nodes.ports.nbd;
    let mut answers = Vec::new();
    for host in access.hosts_of(&store.reference(Class::Vdi, &vdi, "SR")?) {
        let Some(position) = access.position(&host) else { continue };
        let node = &call.world.nodes.hosts[position];
        for pif in store.references(Class::Host, &host, "PIFs")? {
            let network = store.reference(Class::Pif, &pif, "network")?;
            let purpose = store.texts(Class::Network, &network, "purpose").unwrap_or_default();
            let is_for_nbd = purpose.iter().any(|one| one == "nbd" || one == "insecure_nbd");
            if !is_for_nbd || !store.flag(Class::Pif, &pif, "currently_attached")? {
                continue;
            }
            let mut addresses = vec![store.text(Class::Pif, &pif, "IP")?.to_owned()];
            addresses.extend(store.texts(Class::Pif, &pif, "IPv6")?);
            for address in addresses.into_iter().filter(|address| !address.is_empty()) {
                let Value::Map(mut answer) = map([
                    ("exportname", name.as_str()),
                    ("address", &address),
                    ("cert", &node.certificate.pem),
                    ("subject", &node.name),
                ]) else {
                    continue;
                };
                answer.insert("port".to_owned(), Value::Int(port.into()));
                answers.push(Value::Map(answer));
            }
        }
    }
    Ok(Value::Set(answers))
}
