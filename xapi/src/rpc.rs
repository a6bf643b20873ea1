//! The envelope of a call: JSON-RPC 2.0.
//!
//! Source: XAPI, `ocaml/xapi/api_server.ml`, `doc/content/xen-api/wire-protocol.md`.

use serde::ser::{Serialize, SerializeSeq, Serializer};
use serde_json::Value;
use zeroize::Zeroizing;

use crate::error::quoted;
use crate::{Error, ErrorKind, Result};

/// Longest request that XAPI takes (bytes; `ocaml/xapi-consts/constants.ml`). It answers a longer one with a page of HTML.
const REQUEST_LIMIT: usize = 300 << 10;

/// The arguments of a call: the reference of the session, then the others.
pub struct Arguments<'a> {
    pub session: &'a str,
    pub rest: &'a [Value],
}

impl Serialize for Arguments<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
        let mut sequence = serializer.serialize_seq(Some(self.rest.len() + 1))?;
        sequence.serialize_element(self.session)?;
        self.rest.iter().try_for_each(|argument| sequence.serialize_element(argument))?;
        sequence.end()
    }
}

/// Makes the body of a call. It holds a secret: the reference of the session, or the password.
pub fn request(id: u64, method: &str, arguments: &impl Serialize) -> Result<Zeroizing<Vec<u8>>> {
    #[derive(serde::Serialize)]
    struct Request<'a, A> {
        jsonrpc: &'static str,
        id: u64,
        method: &'a str,
        params: &'a A,
    }
    // As long as any is from the start: what grows leaves copies behind that nobody overwrites.
    let mut body = Zeroizing::new(Vec::with_capacity(REQUEST_LIMIT));
    let request = Request { jsonrpc: "2.0", id, method, params: arguments };
    serde_json::to_writer(&mut *body, &request)
        .map_err(|error| Error::new(ErrorKind::OutOfRange, method, format!("its arguments are no JSON: {error}")))?;
    if body.len() > REQUEST_LIMIT {
        let reason = format!("a call of {} bytes, XAPI takes at most {REQUEST_LIMIT}", body.len());
        return Err(Error::new(ErrorKind::OutOfRange, method, reason));
    }
    Ok(body)
}

/// Parses the reply to call `id`: its result, or the codes of an error. `Err` is what is wrong with it.
pub fn reply(id: u64, body: &[u8]) -> std::result::Result<std::result::Result<Value, Vec<String>>, String> {
    let parsed: Value = serde_json::from_slice(body).map_err(|error| format!("it answered no JSON ({error})"))?;
    let Value::Object(mut reply) = parsed else { return Err("it answered no object of JSON-RPC".to_owned()) };
    match reply.remove("error") {
        None | Some(Value::Null) => {}
        Some(error) => return codes(error).map(Err),
    }
    if reply.get("id").and_then(Value::as_u64) != Some(id) {
        return Err("it answered another call".to_owned());
    }
    reply.remove("result").map(Ok).ok_or_else(|| "it answered neither a result nor an error".to_owned())
}

/// Returns the code of an error and its parameters, in the form of version 2 or of version 1, which XAPI uses where it could
/// not tell the version.
fn codes(error: Value) -> std::result::Result<Vec<String>, String> {
    let text = |value: Value| match value {
        Value::String(text) => text,
        other => other.to_string(),
    };
    match error {
        Value::Array(codes) if !codes.is_empty() => Ok(codes.into_iter().map(text).collect()),
        Value::Object(mut error) => {
            let code = error.remove("message").and_then(|code| code.as_str().map(str::to_owned)).unwrap_or_default();
            if code.is_empty() {
                return Err("it answered an error without a code".to_owned());
            }
            let params = match error.remove("data") {
                Some(Value::Array(params)) => params,
                None | Some(Value::Null) => Vec::new(),
                Some(other) => vec![other],
            };
            Ok(std::iter::once(code).chain(params.into_iter().map(text)).collect())
        }
        other => Err(format!("it answered an error that is none: {}", quoted(&other.to_string()))),
    }
}

/// Whether a call changes nothing, so that it may be repeated.
pub fn is_read(method: &str) -> bool {
    let name = method.split_once('.').map_or(method, |(_, name)| name);
    name.starts_with("get_") || matches!(method, "event.from" | "event.inject" | "VDI.list_changed_blocks")
}
