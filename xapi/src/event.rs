//! Events of the pool: what changed, of exactly the classes and objects that somebody listens to.
//!
//! `event.from` has no history, only states: who was away learns what is there now, not what was between. Source: XAPI,
//! `ocaml/xapi/xapi_event.ml`.

use std::collections::BTreeMap;
use std::time::Duration;

use serde::Deserialize;
use serde_json::{Value, json};

use crate::session::Core;
use crate::wire::Patience;
use crate::{Cancel, Error, ErrorKind, Result};

/// How long the server may take longer than it was told to wait.
const GRACE: Duration = Duration::from_secs(30);
/// How long is waited for the state of what is there already, which comes at once if there is any.
const PRESENT: Duration = Duration::from_secs(1);

/// What happened to an object.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Deserialize)]
pub enum Operation {
    /// It is there, and was not known before.
    #[serde(rename = "add")]
    Add,
    /// It changed; its state is the last of several, perhaps.
    #[serde(rename = "mod")]
    Modify,
    /// It is gone.
    #[serde(rename = "del")]
    Delete,
}

/// An event, as the pool says it.
#[derive(Debug, Clone, Deserialize)]
pub struct Event {
    /// The class, in lower case.
    pub class: String,
    /// What happened.
    pub operation: Operation,
    /// The object.
    #[serde(rename = "ref")]
    pub reference: String,
    /// Its record; nothing if it is gone.
    #[serde(default)]
    pub snapshot: Option<Value>,
}

/// How far events were told.
#[derive(Debug, Default)]
pub(crate) struct Cursor {
    token: String,
    /// The session that it was told in: in another one the pool may have forgotten.
    generation: u64,
}

impl Cursor {
    /// Whether nothing was told yet.
    pub fn is_new(&self) -> bool {
        self.token.is_empty()
    }
}

/// What one look at events found.
#[derive(Debug, Default)]
pub(crate) struct Batch {
    pub events: Vec<Event>,
    /// How many objects there are of each class, in lower case.
    pub counts: BTreeMap<String, u64>,
    /// Whether all that is there was told as added, since it was not known what was told before.
    pub is_fresh: bool,
}

#[derive(Deserialize)]
struct Reply {
    #[serde(default)]
    events: Vec<Event>,
    #[serde(default)]
    valid_ref_counts: BTreeMap<String, u64>,
    token: String,
}

/// Waits until something happens to `subjects` (classes, or `class/reference`), for at most `time`.
pub(crate) fn poll(
    core: &Core,
    subjects: &[String],
    cursor: &mut Cursor,
    time: Duration,
    cancel: &Cancel,
) -> Result<Batch> {
    let method = "event.from";
    let mut is_fresh = false;
    loop {
        let polled = core.repeat(method, cancel, |login| {
            if cursor.generation != login.generation {
                *cursor = Cursor { token: String::new(), generation: login.generation };
            }
            is_fresh = cursor.token.is_empty();
            let time = if is_fresh { time.min(PRESENT) } else { time };
            let arguments = [json!(subjects), json!(cursor.token), json!(time.as_secs_f64())];
            let patience = Patience { cancel: cancel.part(time + GRACE), silence: time + GRACE };
            core.attempt(login, method, &arguments, &patience, true)
        });
        let value = match polled {
            Err(error) if error.code() == "EVENT_FROM_TOKEN_PARSE_FAILURE" && !is_fresh => {
                cursor.token.clear();
                continue;
            }
            polled => polled?,
        };
        let reply: Reply = serde_json::from_value(value).map_err(|error| {
            let reason = format!("what it answered are no events: {error}");
            Error::new(ErrorKind::Protocol, format!("{method} at {}", core.settings.address), reason)
        })?;
        cursor.token = reply.token;
        return Ok(Batch { events: reply.events, counts: reply.valid_ref_counts, is_fresh });
    }
}
