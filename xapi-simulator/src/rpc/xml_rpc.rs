//! XML-RPC: `Status` with `Value` or `ErrorDescription`. Source: xen-api `doc/content/xen-api/wire-protocol.md`.

use super::json::Answer;
use super::{Reply, call};
use crate::value::Value;
use crate::world::World;
use crate::xml;
use std::collections::BTreeMap;
use std::sync::Arc;

/// Answers a body. `None` if it is no call; `Some(None)` if the connection is to end.
pub fn answer(world: &Arc<World>, host: usize, body: &[u8]) -> Option<Option<Answer>> {
    let (method, arguments) = xml::parse_call(std::str::from_utf8(body).ok()?)?;
    let outcome = match call(world, host, &method, arguments) {
        Reply::Answer(outcome) => outcome,
        Reply::Nothing => return Some(None),
    };
    let is_slave = outcome.as_ref().is_err_and(|failure| failure.code == "HOST_IS_SLAVE");
    let entries = match outcome {
        Ok(value) => [("Status".to_owned(), "Success".into()), ("Value".to_owned(), value)],
        Err(failure) => [
            ("Status".to_owned(), "Failure".into()),
            ("ErrorDescription".to_owned(), failure.to_list().into_iter().collect()),
        ],
    };
    Some(Some(Answer { body: xml::response(&Value::Map(BTreeMap::from(entries))), is_slave }))
}
