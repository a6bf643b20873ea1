//! `PUT /import_raw_vdi/`: a disk that exists is written.
//!
//! The answer comes before the body is read, so it says nothing: the task does. What fails may have written all there was.
//! Source: xen-api `ocaml/xapi/import_raw_vdi.ml`.

use super::Next;
use super::connection::Connection;
use super::export_disk::{Format, find, format, names};
use super::passage::{self, Passage};
use super::request::Request;
use crate::attach::attach;
use crate::content::OutOfRange;
use crate::failure::{Failure, Outcome};
use crate::fault::Site;
use crate::log::Activity;
use crate::raw;
use crate::schema::Class;
use crate::transfer::Piece;
use crate::value::{Reference, Value};
use crate::vhd;
use crate::world::World;
use std::io;
use std::sync::Arc;

/// How much may be written before the room in the SR is looked at again, in bytes.
const ROOM_STEP: u64 = 8 << 20;

pub(super) fn answer(
    world: &Arc<World>,
    host: usize,
    connection: &mut Connection,
    request: &Request,
) -> io::Result<Next> {
    let mut passage = match passage::enter(world, connection, request, Site::Import)? {
        Ok(passage) => passage,
        Err(next) => return Ok(next),
    };
    let refused = |passage: Passage, connection: &mut Connection, text: &str| {
        passage.refuse(connection, 404, "Not Found", Failure::internal(text))
    };
    if request.is_chunked() || request.parameter("chunked").is_some() {
        return refused(passage, connection, "chunks are not taken");
    }
    let Some(length) = request.length() else {
        return refused(passage, connection, "We require a content-length");
    };
    let format = match format(request) {
        Ok(format) => format,
        Err(failure) => return passage.refuse(connection, 404, "Not Found", failure),
    };
    let vdi = match target(world, request, format, length) {
        Ok(vdi) => vdi,
        Err(failure) => return passage.refuse(connection, 500, "Internal Error", failure),
    };
    let Ok(sr) = world.lock().store.reference(Class::Vdi, &vdi, "SR") else { return Ok(Next::Cut) };
    if let Some(next) = passage.redirect(connection, host, request, std::slice::from_ref(&sr))? {
        return Ok(next);
    }
    passage.concerns(names(world, &vdi));
    passage::send_head(connection, "1.1", &passage.task, &[])?;
    let running = world.log.begin(Activity::Import);
    let outcome = receive(world, host, connection, &mut passage, format, &vdi, &sr, length);
    world.lock().settle(&sr);
    // Before the client knows: it may begin another at once.
    drop(running);
    Ok(passage.end(connection, outcome.map(|()| (&vdi).into())))
}

/// Returns the VDI to be written; where only an SR is named, a new one.
fn target(world: &World, request: &Request, format: Format, length: u64) -> Outcome<Reference> {
    if let Some(vdi) = find(world, request, "vdi")? {
        return Ok(vdi);
    }
    let sr = request.parameter("sr_id").or_else(|| request.parameter("sr_uuid"));
    match sr {
        Some(sr) if format == Format::Raw => {
            let mut access = world.lock();
            let sr = access.store.by_either(Class::Sr, &sr)?;
            access.create_vdi(&sr, length, [("name_label", Value::from("Imported VDI"))])
        }
        _ => Err(Failure::internal("no VDI is named")),
    }
}

#[expect(clippy::too_many_arguments, reason = "all that the two ways of receiving differ in")]
fn receive(
    world: &Arc<World>,
    host: usize,
    connection: &mut Connection,
    passage: &mut Passage,
    format: Format,
    vdi: &Reference,
    sr: &Reference,
    length: u64,
) -> io::Result<()> {
    let _attached = attach(world, host, vdi, true).map_err(|failure| passage.fail(failure))?;
    let is_zeroed = world.lock().is_zeroed(sr).map_err(|failure| passage.fail(failure))?;
    if !is_zeroed && format == Format::Vhd {
        return Err(passage.fail(Failure::internal("unimplemented: prezeroed")));
    }
    let mut written = 0_u64;
    let mut sink = |offset: u64, bytes: &[u8]| {
        let mut access = world.lock();
        match access.disks.get_mut(vdi) {
            Some(content) => content.write(offset, bytes),
            // It was destroyed meanwhile: nothing is on it.
            None => Err(OutOfRange { range: offset..offset, size: 0 }),
        }
    };
    let mut hook = |piece: &Piece| {
        passage.pass(None, piece.done, piece.total)?;
        written += piece.length;
        if written >= ROOM_STEP {
            written = 0;
            let mut access = world.lock();
            access.settle(sr);
            if access.room(sr).is_ok_and(|room| room == 0) {
                return Err(passage.fail(Failure::device()));
            }
        }
        Ok(())
    };
    let outcome = match format {
        Format::Raw => raw::import(&mut sink, connection, length, &mut hook),
        Format::Vhd => vhd::import(&mut sink, connection, length, &mut hook),
    };
    outcome.map_err(|error| {
        // Only who looks at the host's log learns more than that.
        let _same = passage.fail(Failure::device());
        io::Error::other(error)
    })
}
