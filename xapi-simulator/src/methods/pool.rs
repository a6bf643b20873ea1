//! The pool, its hosts and networks.

use super::Method;
use crate::failure::{Failure, Outcome};
use crate::rpc::{Arguments, Call, argument};
use crate::schema::Class;
use crate::schema::Kind::{Choice, Map, Record, Reference, Text};
use crate::upset;
use crate::value::{self, Value};

/// What networks can be for.
const PURPOSES: crate::schema::Kind = Choice(&["nbd", "insecure_nbd"]);

pub(super) const METHODS: &[Method] = &[
    Method::new("host.get_server_certificate", &[argument("host", Reference)], certificate),
    Method::new(
        "host.call_plugin",
        &[argument("host", Reference), argument("plugin", Text), argument("fn", Text), argument("args", Map)],
        call_plugin,
    ),
    Method::new("pool.designate_new_master", &[argument("host", Reference)], designate),
    Method::new("network.create", &[argument("args", Record)], create_network),
    Method::new("network.destroy", &[argument("self", Reference)], destroy_network),
    Method::new("network.add_purpose", &[argument("self", Reference), argument("value", PURPOSES)], add_purpose),
    Method::new("network.remove_purpose", &[argument("self", Reference), argument("value", PURPOSES)], remove_purpose),
    Method::new("PBD.plug", &[argument("self", Reference)], |call, arguments| switch_pbd(call, arguments, true)),
    Method::new("PBD.unplug", &[argument("self", Reference)], |call, arguments| switch_pbd(call, arguments, false)),
];

fn certificate(call: &Call, arguments: &Arguments) -> Outcome<Value> {
    let host = arguments.reference(0);
    let position = call.world.lock().position(&host).ok_or_else(|| Failure::gone(Class::Host, host.as_str()))?;
    Ok(call.world.nodes.hosts[position].certificate.pem.as_str().into())
}

fn call_plugin(call: &Call, arguments: &Arguments) -> Outcome<Value> {
    let (plugin, function) = (arguments.text(1), arguments.text(2));
    if (plugin, function) != ("coalesce-leaf", "leaf-coalesce") {
        return Err(Failure::new("XENAPI_MISSING_PLUGIN", [plugin]));
    }
    let entries = arguments.entries(3);
    let uuid = entries.get("vm_uuid").and_then(Value::as_text).unwrap_or_default();
    let mut access = call.world.lock();
    let vm = access.store.by_uuid(Class::Vm, uuid)?;
    for vbd in access.store.references(Class::Vm, &vm, "VBDs")? {
        let vdi = access.store.reference(Class::Vbd, &vbd, "VDI")?;
        if let Ok(sr) = access.store.reference(Class::Vdi, &vdi, "SR") {
            while access.coalesce(&sr) {}
        }
    }
    Ok("True".into())
}

fn designate(call: &Call, arguments: &Arguments) -> Outcome<Value> {
    let host = arguments.reference(0);
    let position = call.world.lock().position(&host).ok_or_else(|| Failure::gone(Class::Host, host.as_str()))?;
    upset::happen(call.world, &upset::Upset::ChangeMaster(position));
    Ok(Value::void())
}

fn create_network(call: &Call, arguments: &Arguments) -> Outcome<Value> {
    let fields = super::record(
        Class::Network,
        arguments.entries(0),
        &["other_config"],
        &["name_label", "name_description", "MTU", "tags", "managed"],
    )?;
    Ok(call.world.lock().store.create(Class::Network, fields).into())
}

fn destroy_network(call: &Call, arguments: &Arguments) -> Outcome<Value> {
    let network = arguments.reference(0);
    let mut access = call.world.lock();
    if let [pif, ..] = &access.store.references(Class::Network, &network, "PIFs")?[..] {
        return Err(Failure::new("NETWORK_CONTAINS_PIF", [pif.as_str()]));
    }
    if let [vif, ..] = &access.store.references(Class::Network, &network, "VIFs")?[..] {
        return Err(Failure::new("NETWORK_CONTAINS_VIF", [vif.as_str()]));
    }
    access.store.destroy(Class::Network, &network);
    Ok(Value::void())
}

fn add_purpose(call: &Call, arguments: &Arguments) -> Outcome<Value> {
    let (network, purpose) = (arguments.reference(0), arguments.text(1));
    let mut access = call.world.lock();
    let has_other = access.store.all(Class::Network).any(|(_, object)| {
        let purposes = object.record["purpose"].as_set().unwrap_or(&[]);
        purposes.iter().filter_map(Value::as_text).any(|known| known != purpose)
    });
    if has_other {
        return Err(Failure::new("NETWORK_INCOMPATIBLE_PURPOSES", [purpose]));
    }
    access.store.edit(Class::Network, &network, "purpose", |value| {
        if let Value::Set(members) = value
            && !members.contains(&purpose.into())
        {
            members.push(purpose.into());
        }
    })?;
    Ok(Value::void())
}

fn remove_purpose(call: &Call, arguments: &Arguments) -> Outcome<Value> {
    let (network, purpose) = (arguments.reference(0), arguments.text(1));
    call.world.lock().store.edit(Class::Network, &network, "purpose", |value| {
        if let Value::Set(members) = value {
            members.retain(|member| member.as_text() != Some(purpose));
        }
    })?;
    Ok(Value::void())
}

fn switch_pbd(call: &Call, arguments: &Arguments, is_on: bool) -> Outcome<Value> {
    let pbd = arguments.reference(0);
    let mut access = call.world.lock();
    let sr: value::Reference = access.store.reference(Class::Pbd, &pbd, "SR")?;
    if !is_on {
        for vdi in access.store.references(Class::Sr, &sr, "VDIs")? {
            access.check_unused(&vdi, "detach")?;
        }
    }
    access.store.set(Class::Pbd, &pbd, "currently_attached", is_on)?;
    Ok(Value::void())
}
