//! HTTP: connections of a host, and what comes over them.
//!
//! - [`connection`]: bytes, in the clear or by TLS
//! - [`request`]: heads of requests
//! - `pages`: answers that are no answers of RPC
//! - `rpc`: calls
//! - `passage`: what all transfers share: who may, which task, which host, faults, speed
//! - `export_disk`, `import_disk`, `export_vm`, `import_vm`: one transfer each

pub mod connection;
mod export_disk;
mod export_vm;
mod import_disk;
mod import_vm;
mod pages;
mod passage;
pub mod request;
mod rpc;

pub use export_disk::names;

use crate::node::Service;
use crate::world::World;
use connection::Connection;
use request::Request;
use std::io;
use std::net::TcpStream;
use std::sync::Arc;

/// What becomes of a connection after a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Next {
    /// Another request may come.
    Keep,
    /// It ends, after all that was written.
    Close,
    /// It ends at once, as in a crash.
    Cut,
}

/// Serves a connection to a host until it ends.
pub fn serve(world: &Arc<World>, host: usize, service: Service, stream: TcpStream) {
    // Who only connected and went has no error that anybody could be told of.
    let _ended = talk(world, host, service, stream);
}

fn talk(world: &Arc<World>, host: usize, service: Service, stream: TcpStream) -> io::Result<()> {
    let tls = match service {
        Service::Https => Some(world.nodes.hosts[host].certificate.tls.clone()),
        Service::Http | Service::Nbd => None,
    };
    let mut connection = Connection::new(stream, tls)?;
    loop {
        let idle = world.lock().settings.idle_timeout;
        connection.set_read_timeout(Some(idle))?;
        let Some(request) = Request::read(&mut connection)? else {
            return connection.close();
        };
        connection.set_read_timeout(None)?;
        match answer(world, host, &mut connection, &request)? {
            Next::Keep => {}
            Next::Close => return connection.close(),
            Next::Cut => return connection.cut(),
        }
        if world.is_stopping() {
            return Ok(());
        }
    }
}

/// Paths are matched by the longest that they begin with, so that any other is that of XML-RPC.
fn answer(world: &Arc<World>, host: usize, connection: &mut Connection, request: &Request) -> io::Result<Next> {
    const GETS: [(&str, Handler); 2] = [("/export_raw_vdi", export_disk::answer), ("/export", export_vm::answer)];
    const PUTS: [(&str, Handler); 2] = [("/import_raw_vdi", import_disk::answer), ("/import", import_vm::answer)];
    let transfers = match request.verb.as_str() {
        "GET" => GETS,
        "PUT" => PUTS,
        "POST" => return rpc::answer(world, host, connection, request),
        _ => {
            return pages::send(connection, 405, "Method Not Allowed", "There is nothing for this verb here.")
                .map(|()| Next::Close);
        }
    };
    for (path, handler) in transfers {
        if request.path.strip_prefix(path).is_some_and(|rest| rest.is_empty() || rest.starts_with('/')) {
            world.log.request(host, &format!("{} {path}/", request.verb), request.shown_parameters());
            return handler(world, host, connection, request);
        }
    }
    pages::send(connection, 404, "Not Found", "There is nothing at this path.")?;
    Ok(Next::Close)
}

type Handler = fn(&Arc<World>, usize, &mut Connection, &Request) -> io::Result<Next>;
