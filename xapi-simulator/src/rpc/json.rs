//! JSON-RPC 1.0 and 2.0. Source: xen-api `ocaml/xapi/api_server.ml`.

use super::{Reply, call};
use crate::value::Value;
use crate::world::World;
use serde_json::{Value as Json, json};
use std::sync::Arc;

/// Answers a body. `None` if it is no call; `Some(None)` if the connection is to end.
pub fn answer(world: &Arc<World>, host: usize, body: &[u8]) -> Option<Option<Answer>> {
    let request: Json = serde_json::from_slice(body).ok()?;
    let is_second = match request.get("jsonrpc") {
        None => false,
        Some(version) if version == "2.0" => true,
        Some(_) => return None,
    };
    let method = request.get("method")?.as_str()?;
    let params = match request.get("params") {
        None => Vec::new(),
        Some(Json::Array(params)) => params.iter().map(Value::from_json).collect::<Option<_>>()?,
        Some(_) => return None,
    };
    let id = request.get("id").cloned().unwrap_or(Json::Null);
    let outcome = match call(world, host, method, params) {
        Reply::Answer(outcome) => outcome,
        Reply::Nothing => return Some(None),
    };
    let is_slave = outcome.as_ref().is_err_and(|failure| failure.code == "HOST_IS_SLAVE");
    let answer = match (outcome, is_second) {
        (Ok(result), true) => json!({"jsonrpc": "2.0", "result": result.to_json(), "id": id}),
        (Ok(result), false) => json!({"result": result.to_json(), "error": null, "id": id}),
        (Err(failure), true) => {
            json!({"jsonrpc": "2.0", "error": {"code": 1, "message": failure.code, "data": failure.params}, "id": id})
        }
        (Err(failure), false) => json!({"result": null, "error": failure.to_list(), "id": id}),
    };
    Some(Some(Answer { body: answer.to_string(), is_slave }))
}

/// The body of an answer.
pub struct Answer {
    /// Its text.
    pub body: String,
    /// Whether it says that another host is the master.
    pub is_slave: bool,
}
