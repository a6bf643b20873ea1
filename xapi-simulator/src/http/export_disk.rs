//! `GET /export_raw_vdi/`: a disk, or what changed of it since another, as a VHD or raw.
//!
//! The head of the answer comes first; what fails after it ends the task, and writes a second answer into the body. Source:
//! xen-api `ocaml/xapi/export_raw_vdi.ml`.

use super::Next;
use super::connection::Connection;
use super::passage::{self, Passage};
use super::request::Request;
use crate::attach::attach;
use crate::content::Content;
use crate::failure::{Failure, Outcome};
use crate::fault::Site;
use crate::log::Activity;
use crate::raw;
use crate::schema::Class;
use crate::transfer::Piece;
use crate::value::{Reference, Value};
use crate::vhd::{Base, Export};
use crate::world::World;
use std::io;
use std::sync::Arc;
use uuid::Uuid;

/// What is sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Format {
    Raw,
    Vhd,
}

/// Returns the format that a request asks for.
pub(super) fn format(request: &Request) -> Outcome<Format> {
    match request.parameter("format").map(|format| format.to_lowercase()).as_deref() {
        None | Some("raw") => Ok(Format::Raw),
        Some("vhd") => Ok(Format::Vhd),
        Some(other) => Err(Failure::internal(&format!("format {other}"))),
    }
}

pub(super) fn answer(
    world: &Arc<World>,
    host: usize,
    connection: &mut Connection,
    request: &Request,
) -> io::Result<Next> {
    let mut passage = match passage::enter(world, connection, request, Site::Export)? {
        Ok(passage) => passage,
        Err(next) => return Ok(next),
    };
    let format = match format(request) {
        Ok(format) => format,
        Err(failure) => return passage.refuse(connection, 404, "Not Found", failure),
    };
    let vdi = match find(world, request, "vdi") {
        Ok(Some(vdi)) => vdi,
        Ok(None) => return passage.refuse(connection, 404, "Not Found", Failure::internal("no VDI is named")),
        Err(failure) => return passage.refuse(connection, 500, "Internal Error", failure),
    };
    let base = match find(world, request, "base") {
        Ok(base) => base,
        Err(failure) => return passage.refuse(connection, 500, "Internal Error", failure),
    };
    let Ok(sr) = world.lock().store.reference(Class::Vdi, &vdi, "SR") else { return Ok(Next::Cut) };
    if let Some(next) = passage.redirect(connection, host, request, &[sr])? {
        return Ok(next);
    }
    let Ok(uuid) = world.lock().vdi_uuid(&vdi) else { return Ok(Next::Cut) };
    passage.concerns(names(world, &vdi));
    let (content_type, ending) = match format {
        Format::Raw => ("application/octet-stream", "raw"),
        Format::Vhd => ("application/vhd", "vhd"),
    };
    let disposition = format!("attachment; filename=\"{uuid}.{ending}\"");
    let fields = [("content-type", content_type), ("content-disposition", disposition.as_str())];
    passage::send_head(connection, "1.1", &passage.task, &fields)?;
    let running = world.log.begin(Activity::Export);
    let outcome = send(world, host, connection, &mut passage, format, &vdi, base.as_ref(), uuid);
    // Before the client knows: it may begin another at once.
    drop(running);
    Ok(passage.end(connection, outcome.map(|()| Value::void())))
}

#[expect(clippy::too_many_arguments, reason = "all that the two ways of sending differ in")]
fn send(
    world: &Arc<World>,
    host: usize,
    connection: &mut Connection,
    passage: &mut Passage,
    format: Format,
    vdi: &Reference,
    base: Option<&Reference>,
    uuid: Uuid,
) -> io::Result<()> {
    let _attached = attach(world, host, vdi, false).map_err(|failure| passage.fail(failure))?;
    let _base_attached = match base {
        Some(base) => Some(attach(world, host, base, false).map_err(|failure| passage.fail(failure))?),
        None => None,
    };
    let content = world.lock().content(vdi).map_err(|failure| passage.fail(failure))?;
    let base: Option<(Content, String)> = match base {
        Some(base) => {
            let access = world.lock();
            let content = access.content(base).map_err(|failure| passage.fail(failure))?;
            let sr = access.store.reference(Class::Vdi, base, "SR").map_err(|failure| passage.fail(failure))?;
            let folder = access.store.text(Class::Sr, &sr, "uuid").unwrap_or_default().to_owned();
            let file = content.leaf().uuid();
            Some((content, format!("/run/sr-mount/{folder}/{file}.vhd")))
        }
        None => None,
    };
    // The writer is the connection itself: a hook cannot have it, but what it is asked about can be asked of the socket.
    let socket = connection.watch()?;
    let mut hook = |piece: &Piece| {
        passage.pass(Some(&socket), piece.done, piece.total)?;
        world.log.served(Activity::Export, uuid, piece.offset, piece.length);
        Ok(())
    };
    match format {
        Format::Raw => raw::export(&content, connection, &mut hook),
        Format::Vhd => {
            let base = base.as_ref().map(|(content, path)| Base { content, path });
            Export::new(&content, base).send(connection, &mut hook)
        }
    }
}

/// Returns the VDI that a parameter names, by reference or uuid.
pub(super) fn find(world: &World, request: &Request, name: &str) -> Outcome<Option<Reference>> {
    match request.parameter(name) {
        Some(text) => world.lock().store.by_either(Class::Vdi, &text).map(Some),
        None => Ok(None),
    }
}

/// Returns what faults may call a disk: its uuid and name, those of what it is a snapshot of, and its machines'.
pub fn names(world: &World, vdi: &Reference) -> Vec<String> {
    let access = world.lock();
    let store = &access.store;
    let mut names = Vec::new();
    let mut add = |class: Class, object: &Reference| {
        let texts = ["uuid", "name_label"].into_iter().filter_map(|field| store.text(class, object, field).ok());
        names.extend(texts.map(str::to_owned));
    };
    let live = store.reference(Class::Vdi, vdi, "snapshot_of").unwrap_or_else(|_| Reference::null());
    for vdi in [vdi, &live] {
        add(Class::Vdi, vdi);
        for vbd in store.references(Class::Vdi, vdi, "VBDs").unwrap_or_default() {
            if let Ok(vm) = store.reference(Class::Vbd, &vbd, "VM") {
                add(Class::Vm, &vm);
            }
        }
    }
    names
}
