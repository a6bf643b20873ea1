//! `GET /export/`: a machine as an XVA.
//!
//! Source: xen-api `ocaml/xapi/export.ml`.

use super::Next;
use super::connection::Connection;
use super::export_disk::names;
use super::passage::{self, Passage};
use super::request::Request;
use crate::archive::ova::{Object, Ova};
use crate::archive::{self, Compression, Options};
use crate::attach::{Attachment, attach};
use crate::content::Content;
use crate::failure::Outcome;
use crate::fault::Site;
use crate::log::Activity;
use crate::methods::lifecycle;
use crate::schema::{Class, Kind};
use crate::transfer::Piece;
use crate::value::{Reference, Value};
use crate::world::{State, World};
use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;

pub(super) fn answer(
    world: &Arc<World>,
    host: usize,
    connection: &mut Connection,
    request: &Request,
) -> io::Result<Next> {
    let mut passage = match passage::enter(world, connection, request, Site::ExportVm)? {
        Ok(passage) => passage,
        Err(next) => return Ok(next),
    };
    let named = request.parameter("ref").or_else(|| request.parameter("uuid")).unwrap_or_default();
    let found = check(&world.lock(), &named);
    let (vm, disks) = match found {
        Ok(found) => found,
        Err(failure) => return passage.refuse(connection, 500, "Internal Error", failure),
    };
    let repositories: Vec<Reference> = {
        let access = world.lock();
        disks.iter().filter_map(|vdi| access.store.reference(Class::Vdi, vdi, "SR").ok()).collect()
    };
    if let Some(next) = passage.redirect(connection, host, request, &repositories)? {
        return Ok(next);
    }
    passage.concerns(disks.iter().flat_map(|vdi| names(world, vdi)));
    let compression = match request.parameter("use_compression").as_deref() {
        Some("true" | "gzip") => Compression::Gzip,
        Some("zstd") => Compression::Zstd,
        _ => Compression::None,
    };
    let fields =
        [("content-type", "application/octet-stream"), ("content-disposition", "attachment; filename=\"export.xva\"")];
    passage::send_head(connection, "1.0", &passage.task, &fields)?;
    let running = world.log.begin(Activity::Export);
    // Checked above; if it went since, it fails below.
    let _gone = lifecycle::begin(&mut world.lock(), &vm, passage.task.as_str(), "export");
    let outcome = send(world, host, connection, &mut passage, &vm, &disks, compression);
    lifecycle::end(&mut world.lock(), &vm, passage.task.as_str());
    // Before the client knows: it may begin another at once.
    drop(running);
    Ok(passage.end(connection, outcome.map(|()| Value::void())))
}

/// Returns a machine that can be exported, and its disks.
fn check(state: &State, named: &str) -> Outcome<(Reference, Vec<Reference>)> {
    let vm = state.store.by_either(Class::Vm, named)?;
    lifecycle::check(state, &vm, "export")?;
    let mut disks = Vec::new();
    for vbd in state.store.references(Class::Vm, &vm, "VBDs")? {
        let vdi = state.store.reference(Class::Vbd, &vbd, "VDI")?;
        if state.store.text(Class::Vbd, &vbd, "type")? == "Disk" && !vdi.is_null() {
            disks.push(vdi);
        }
    }
    Ok((vm, disks))
}

fn send(
    world: &Arc<World>,
    host: usize,
    connection: &mut Connection,
    passage: &mut Passage,
    vm: &Reference,
    disks: &[Reference],
    compression: Compression,
) -> io::Result<()> {
    let attached: Outcome<Vec<Attachment>> = disks.iter().map(|vdi| attach(world, host, vdi, false)).collect();
    let _attached = attached.map_err(|failure| passage.fail(failure))?;
    let described = describe(&world.lock(), vm, disks);
    let (ova, contents) = described.map_err(|failure| passage.fail(failure))?;
    let disks = contents.iter().map(|(reference, content)| archive::Disk { reference, content }).collect();
    let export = archive::Export::new(&ova, disks, Options { compression, empty_piece_after: None });
    let watch = connection.watch()?;
    export.send(connection, &mut |piece: &Piece| {
        passage.check_cancelled()?;
        passage.pass(Some(&watch), piece.done, piece.total)
    })
}

/// Returns the records of a machine and of all that belongs to it with references of their own, and what its disks hold.
fn describe(state: &State, vm: &Reference, disks: &[Reference]) -> Outcome<(Ova, Vec<(String, Content)>)> {
    let store = &state.store;
    let mut members = vec![(Class::Vm, vm.clone())];
    for (list, class, other) in [("VBDs", Class::Vbd, None), ("VIFs", Class::Vif, Some(("network", Class::Network)))] {
        for device in store.references(Class::Vm, vm, list)? {
            if let Some((field, class_of_other)) = other {
                members.push((class_of_other, store.reference(class, &device, field)?));
            }
            members.push((class, device));
        }
    }
    for vdi in disks {
        members.push((Class::Vdi, vdi.clone()));
        members.push((Class::Sr, store.reference(Class::Vdi, vdi, "SR")?));
    }
    let mut numbers: BTreeMap<Reference, String> = BTreeMap::new();
    for (_, reference) in &members {
        let next = format!("Ref:{}", numbers.len());
        numbers.entry(reference.clone()).or_insert(next);
    }
    let mut objects: Vec<Object> = Vec::new();
    for (class, reference) in &members {
        let number = &numbers[reference];
        if objects.iter().any(|object| object.reference == *number) {
            continue;
        }
        let record = &store.object(*class, reference)?.record;
        let fields = class.fields().iter().map(|field| {
            let value = record.get(field.name).cloned().unwrap_or_else(Value::void);
            (field.name.to_owned(), renamed(field.kind, value, &numbers).to_json())
        });
        let record = fields.collect();
        objects.push(Object { class: class.name().to_owned(), reference: number.clone(), record });
    }
    let version =
        [("hostname", "simulated"), ("product_brand", "XCP-ng"), ("product_version", "8.3.0"), ("export_vsn", "2")];
    let ova =
        Ova { version: version.into_iter().map(|(key, value)| (key.to_owned(), value.into())).collect(), objects };
    let contents = disks.iter().map(|vdi| Ok((numbers[vdi].clone(), state.content(vdi)?)));
    Ok((ova, contents.collect::<Outcome<_>>()?))
}

/// Returns a field's value with the references of an archive; what is not in it is null or missing.
fn renamed(kind: Kind, value: Value, numbers: &BTreeMap<Reference, String>) -> Value {
    let is_reference = |text: &str| text.starts_with("OpaqueRef:");
    match (kind, value) {
        (Kind::Reference, Value::Text(text)) => match numbers.get(text.as_str()) {
            Some(number) => number.as_str().into(),
            None => crate::value::NULL.into(),
        },
        (Kind::Set, Value::Set(members)) => Value::Set(
            members
                .into_iter()
                .filter_map(|member| match member.as_text() {
                    Some(text) if is_reference(text) => Some(numbers.get(text)?.as_str().into()),
                    _ => Some(member),
                })
                .collect(),
        ),
        (_, other) => other,
    }
}
