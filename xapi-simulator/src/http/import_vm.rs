//! `PUT /import/`: machines out of an XVA.
//!
//! Source: xen-api `ocaml/xapi/import.ml`.

use super::Next;
use super::connection::Connection;
use super::passage::{self, Passage};
use super::request::Request;
use crate::archive::ova::Object;
use crate::archive::{ArchiveError, Import};
use crate::content::OutOfRange;
use crate::failure::{Failure, Outcome};
use crate::fault::Site;
use crate::log::Activity;
use crate::methods::lifecycle;
use crate::methods::machine::{new_mac, remove};
use crate::schema::{Class, Kind};
use crate::transfer::Piece;
use crate::value::{NULL, Reference, Value};
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
    let mut passage = match passage::enter(world, connection, request, Site::ImportVm)? {
        Ok(passage) => passage,
        Err(next) => return Ok(next),
    };
    if request.is_chunked() {
        return passage.refuse(connection, 403, "Forbidden", Failure::internal("chunks are not taken"));
    }
    let sr = {
        let access = world.lock();
        let named = request.parameter("sr_id").or_else(|| request.parameter("sr_uuid"));
        match named {
            Some(named) => access.store.by_either(Class::Sr, &named),
            None => access.store.reference(Class::Pool, &access.pool(), "default_SR"),
        }
    };
    let sr = match sr {
        Ok(sr) => sr,
        Err(failure) => return passage.refuse(connection, 500, "Internal Error", failure),
    };
    if let Some(next) = passage.redirect(connection, host, request, std::slice::from_ref(&sr))? {
        return Ok(next);
    }
    passage::send_head(connection, "1.1", &passage.task, &[])?;
    let running = world.log.begin(Activity::Import);
    let keeps_ids = request.parameter("restore").as_deref() == Some("true");
    let force = request.parameter("force").as_deref() == Some("true");
    let outcome = receive(world, connection, &mut passage, &sr, keeps_ids, force, request.length());
    world.lock().settle(&sr);
    // Before the client knows: it may begin another at once.
    drop(running);
    Ok(passage.end(connection, outcome))
}

fn receive(
    world: &Arc<World>,
    connection: &mut Connection,
    passage: &mut Passage,
    sr: &Reference,
    keeps_ids: bool,
    force: bool,
    length: Option<u64>,
) -> io::Result<Value> {
    let limited = io::Read::take(connection, length.unwrap_or(u64::MAX));
    let import = Import::begin(limited).map_err(|error| broken(passage, &error))?;
    let created = create(&mut world.lock(), sr, &import.ova().objects, keeps_ids, passage.task.as_str());
    let created = created.map_err(|failure| passage.fail(failure))?;
    let mut sink = |disk: &str, offset: u64, bytes: &[u8]| {
        let gone = || OutOfRange { range: offset..offset, size: 0 };
        let vdi = created.disks.get(disk).ok_or_else(gone)?;
        world.lock().disks.get_mut(vdi).ok_or_else(gone)?.write(offset, bytes)
    };
    let mut hook = |piece: &Piece| {
        passage.check_cancelled()?;
        passage.pass(None, piece.done, piece.total)
    };
    let outcome = import.disks(&mut sink, force, &mut hook);
    let mut access = world.lock();
    match outcome {
        Ok(()) => {
            for vm in &created.machines {
                // Somebody may have destroyed it.
                lifecycle::end(&mut access, vm, passage.task.as_str());
            }
            Ok(created.machines.iter().map(Value::from).collect())
        }
        Err(error) => {
            for vm in &created.machines {
                let _gone = remove(&mut access, vm);
            }
            for vdi in created.disks.values() {
                let _gone = access.destroy_vdi(vdi);
            }
            Err(broken(passage, &error))
        }
    }
}

/// Returns what an import fails with that is not the fault of the pool.
fn broken(passage: &mut Passage, error: &ArchiveError) -> io::Error {
    let failure = match error {
        ArchiveError::Truncated => Failure::new("IMPORT_ERROR_PREMATURE_EOF", Vec::<String>::new()),
        ArchiveError::Checksum(_) => Failure::new("IMPORT_ERROR_SOME_CHECKSUMS_FAILED", Vec::<String>::new()),
        other => Failure::new("IMPORT_ERROR", [other.to_string()]),
    };
    passage.fail(failure)
}

/// What an archive has become.
struct Created {
    machines: Vec<Reference>,
    /// By their references in the archive.
    disks: BTreeMap<String, Reference>,
}

fn create(state: &mut State, sr: &Reference, objects: &[Object], keeps_ids: bool, task: &str) -> Outcome<Created> {
    let mut created = Created { machines: Vec::new(), disks: BTreeMap::new() };
    let mut known: BTreeMap<String, Reference> = BTreeMap::new();
    let of = |class: Class| objects.iter().filter(move |object| object.class == class.name());
    for object in of(Class::Vdi) {
        let size = object.record.get("virtual_size").and_then(serde_json::Value::as_u64).unwrap_or(0);
        let mut fields = admitted(Class::Vdi, object, &known);
        fields.retain(|name, _| {
            ["name_label", "name_description", "type", "sharable", "read_only", "other_config", "xenstore_data", "tags"]
                .contains(name)
        });
        let vdi = state.create_vdi(sr, size, fields)?;
        known.insert(object.reference.clone(), vdi.clone());
        created.disks.insert(object.reference.clone(), vdi);
    }
    for object in of(Class::Network) {
        let name = object.record.get("name_label").and_then(serde_json::Value::as_str);
        let same = state.store.all(Class::Network).find(|(_, one)| one.record["name_label"].as_text() == name);
        let any = || state.store.all(Class::Network).next();
        if let Some((network, _)) = same.or_else(any) {
            known.insert(object.reference.clone(), network.clone());
        }
    }
    for object in of(Class::Vm) {
        let mut fields = admitted(Class::Vm, object, &known);
        for field in ["snapshot_of", "parent", "resident_on", "guest_metrics", "suspend_VDI", "affinity", "metrics"] {
            fields.insert(field, NULL.into());
        }
        if !keeps_ids
            || fields
                .get("uuid")
                .and_then(Value::as_text)
                .is_some_and(|uuid| state.store.by_uuid(Class::Vm, uuid).is_ok())
        {
            fields.insert("uuid", Value::void());
        }
        fields.insert("power_state", "Halted".into());
        fields.insert("current_operations", crate::value::map([(task, "import")]));
        fields.insert("is_a_snapshot", false.into());
        let vm = state.store.create(Class::Vm, fields);
        known.insert(object.reference.clone(), vm.clone());
        created.machines.push(vm);
    }
    for class in [Class::Vbd, Class::Vif] {
        for object in of(class) {
            let mut fields = admitted(class, object, &known);
            fields.insert("uuid", Value::void());
            fields.insert("currently_attached", false.into());
            if class == Class::Vif && !keeps_ids {
                fields.insert("MAC", new_mac().into());
            }
            let is_cd = fields.get("type").and_then(Value::as_text) == Some("CD");
            if class == Class::Vbd && is_cd {
                fields.insert("VDI", NULL.into());
                fields.insert("empty", true.into());
            }
            state.store.create(class, fields);
        }
    }
    Ok(created)
}

/// Returns the fields of an object that are fields here, with references of the pool.
fn admitted(class: Class, object: &Object, known: &BTreeMap<String, Reference>) -> BTreeMap<&'static str, Value> {
    let fields = class.fields().iter().filter(|field| field.listed_by.is_none());
    let admit = |field: &crate::schema::Field| {
        let value = field.kind.admit(Value::from_json(object.record.get(field.name)?)?)?;
        let value = match field.kind {
            Kind::Reference => known.get(value.as_text()?).map_or_else(|| NULL.into(), Value::from),
            _ => value,
        };
        Some((field.name, value))
    };
    fields.filter_map(admit).collect()
}
