//! VDIs and SRs.

use super::{Method, record};
use crate::failure::{Failure, Outcome};
use crate::rpc::{Arguments, Call, argument, optional};
use crate::schema::Class;
use crate::schema::Kind::{Int, Map, Record, Reference};
use crate::value::{self, Value};

pub(super) const METHODS: &[Method] = &[
    Method::new("VDI.create", &[argument("args", Record)], create),
    Method::new("VDI.destroy", &[argument("self", Reference)], |call, arguments| {
        call.world.lock().destroy_vdi(&arguments.reference(0))?;
        Ok(Value::void())
    }),
    Method::new("VDI.snapshot", &[argument("vdi", Reference), optional("driver_params", Map)], |call, arguments| {
        Ok(call.world.lock().branch_vdi(&arguments.reference(0), true)?.into())
    }),
    Method::new("VDI.clone", &[argument("vdi", Reference), optional("driver_params", Map)], |call, arguments| {
        Ok(call.world.lock().branch_vdi(&arguments.reference(0), false)?.into())
    }),
    Method::new(
        "VDI.copy",
        &[
            argument("vdi", Reference),
            argument("sr", Reference),
            optional("base_vdi", Reference),
            optional("into_vdi", Reference),
        ],
        copy,
    ),
    Method::new("VDI.resize", &[argument("vdi", Reference), argument("size", Int)], resize),
    Method::new("VDI.resize_online", &[argument("vdi", Reference), argument("size", Int)], resize),
    Method::new("SR.scan", &[argument("sr", Reference)], scan),
    Method::new("SR.update", &[argument("sr", Reference)], scan),
];

fn create(call: &Call, arguments: &Arguments) -> Outcome<Value> {
    let mut fields = record(
        Class::Vdi,
        arguments.entries(0),
        &["SR", "virtual_size", "type", "sharable", "read_only", "other_config"],
        &["name_label", "name_description", "xenstore_data", "sm_config", "tags"],
    )?;
    let sr = match fields.remove("SR") {
        Some(Value::Text(sr)) => value::Reference::from(sr.as_str()),
        _ => return Err(Failure::kind("SR")),
    };
    let size = match fields.remove("virtual_size") {
        Some(Value::Int(size)) => u64::try_from(size).map_err(|_| Failure::storage(79, "VDI Invalid size"))?,
        _ => return Err(Failure::kind("virtual_size")),
    };
    Ok(call.world.lock().create_vdi(&sr, size, fields)?.into())
}

fn copy(call: &Call, arguments: &Arguments) -> Outcome<Value> {
    let (vdi, sr) = (arguments.reference(0), arguments.reference(1));
    let (base, into) = (arguments.reference(2), arguments.reference(3));
    let mut access = call.world.lock();
    // What is no VDI is as if nothing was said.
    if access.store.find(Class::Vdi, &into).is_none() {
        return Ok(access.copy_vdi(&vdi, &sr)?.into());
    }
    let content = access.content_to_copy(&vdi)?;
    let base = access.store.find(Class::Vdi, &base).is_some().then(|| access.content(&base)).transpose()?;
    if access.store.flag(Class::Vdi, &into, "read_only")? {
        return Err(Failure::new("VDI_READONLY", [into.as_str()]));
    }
    if access.store.size(Class::Vdi, &into, "virtual_size")? < content.size() {
        return Err(Failure::new("VDI_TOO_SMALL", [into.as_str(), &content.size().to_string()]));
    }
    access.check_unused(&into, "copy")?;
    access.fill_vdi(&into, &content, base.as_ref())?;
    Ok(into.into())
}

fn resize(call: &Call, arguments: &Arguments) -> Outcome<Value> {
    let vdi = arguments.reference(0);
    let mut access = call.world.lock();
    access.check_unused(&vdi, "resize")?;
    let sr = access.store.reference(Class::Vdi, &vdi, "SR")?;
    let invalid = || Failure::storage(79, "VDI Invalid size");
    let size = crate::content::rounded_size(u64::try_from(arguments.number(1)).map_err(|_| invalid())?);
    let before = access.store.size(Class::Vdi, &vdi, "virtual_size")?;
    if access.is_thick(&sr)? && size.saturating_sub(before) > access.room(&sr)? {
        return Err(Failure::no_space());
    }
    let content = access.disks.get_mut(&vdi).ok_or_else(|| Failure::gone(Class::Vdi, vdi.as_str()))?;
    content.grow(size).map_err(|_| invalid())?;
    access.settle(&sr);
    Ok(Value::void())
}

fn scan(call: &Call, arguments: &Arguments) -> Outcome<Value> {
    let sr = arguments.reference(0);
    let mut access = call.world.lock();
    access.check_repository(&sr)?;
    access.settle(&sr);
    Ok(Value::void())
}
