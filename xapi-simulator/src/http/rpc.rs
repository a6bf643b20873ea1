//! Calls over HTTP: `/jsonrpc` and `/json`, anything else is XML.
//!
//! Source: xen-api `ocaml/libs/http-lib/http_svr.ml`, `ocaml/xapi-consts/constants.ml` (the longest body),
//! `ocaml/xapi/api_server.ml` (content types, thumbprints).

use super::connection::Connection;
use super::request::Request;
use super::{Next, pages};
use crate::rpc::{json, xml_rpc};
use crate::world::World;
use std::io::{self, Read, Write};
use std::sync::Arc;

/// The longest body, in bytes.
const BODY: u64 = 300 << 10;

pub(super) fn answer(
    world: &Arc<World>,
    host: usize,
    connection: &mut Connection,
    request: &Request,
) -> io::Result<Next> {
    let length = match request.length() {
        Some(length) if !request.is_chunked() => length,
        _ => {
            pages::send_error(connection, "We require a content-length")?;
            return Ok(Next::Close);
        }
    };
    if length > BODY {
        pages::send_error(connection, "the body is too large")?;
        return Ok(Next::Close);
    }
    let mut body = Vec::new();
    Read::take(&mut *connection, length).read_to_end(&mut body)?;
    if u64::try_from(body.len()) != Ok(length) {
        return Ok(Next::Cut);
    }
    let is_json = ["/jsonrpc", "/json"].iter().any(|path| request.path.starts_with(path));
    let (answer, content_type) = match is_json {
        true => (json::answer(world, host, &body), "application/json"),
        false => (xml_rpc::answer(world, host, &body), "text/xml"),
    };
    let answer = match answer {
        None => {
            pages::send_error(connection, "the body is no call")?;
            return Ok(Next::Close);
        }
        Some(None) => return Ok(Next::Cut),
        Some(Some(answer)) => answer,
    };
    let mut head = format!(
        "HTTP/1.1 200 OK\r\nconnection: {}\r\ncache-control: no-cache, no-store\r\ncontent-type: {content_type}\r\n",
        if request.is_last() { "close" } else { "keep-alive" }
    );
    if answer.is_slave
        && let Some(thumbprint) = thumbprint(world, request)
    {
        head.push_str(&format!("x-xenapi-response-host-certificate-thumbprint: {thumbprint}\r\n"));
    }
    head.push_str(&format!("content-length: {}\r\n\r\n", answer.body.len()));
    connection.write_all(head.as_bytes())?;
    connection.write_all(answer.body.as_bytes())?;
    connection.flush()?;
    Ok(if request.is_last() { Next::Close } else { Next::Keep })
}

/// Returns the fingerprint of the master's certificate, if it is asked for in a way that there is.
fn thumbprint(world: &World, request: &Request) -> Option<String> {
    let asked = request.header("x-xenapi-request-host-certificate-thumbprint")?;
    let position = {
        let access = world.lock();
        access.position(&access.master())?
    };
    let certificate = &world.nodes.hosts[position].certificate;
    match asked {
        "sha-256:master" => Some(certificate.sha256.clone()),
        "sha-1:master" => Some(certificate.sha1.clone()),
        _ => None,
    }
}
