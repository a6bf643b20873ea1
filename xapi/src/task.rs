//! Tasks of the pool: what an asynchronous call or a transfer says of itself.
//!
//! A task is watched by `event.from` on it alone. XAPI keeps tasks in memory only: one that vanished has not failed, nobody
//! knows what became of it ([`ErrorKind::Unknown`]). Source: XAPI, `ocaml/xapi/taskHelper.ml`.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use roxmltree::{Document, ParsingOptions};
use serde_json::json;

use crate::event::{Cursor, Operation, poll};
use crate::record::TaskObject;
use crate::storage::unless_gone;
use crate::{Cancel, Error, ErrorKind, Pool, Record, Ref, Result};

/// How long one look at events waits for one: by then one is noticed that vanished without a word.
const LOOK: Duration = Duration::from_secs(5);
/// How long what has to be done with a task whatever else is cancelled may take.
const CLEANUP: Duration = Duration::from_secs(10);
/// How long a transfer that was broken off may take to notice, before its task is ended.
const BROKEN_OFF: Duration = Duration::from_secs(1);
/// Most parts of a result: references, one for each object made.
const NODES: u32 = 10_000;

/// A task, which is destroyed with this handle.
#[derive(Debug)]
pub struct Task {
    pool: Pool,
    reference: Ref<TaskObject>,
    label: String,
    /// Whether ending it ends what it stands for.
    is_call: bool,
    /// Whether the pool ends it: one that nobody ends cannot be destroyed.
    is_held: bool,
    /// Whether it is known to have ended.
    is_over: AtomicBool,
    /// Whether it outlives this.
    is_left: bool,
}

/// What a task resulted in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Outcome {
    values: Vec<String>,
    subject: String,
}

impl Outcome {
    /// Returns the only value.
    ///
    /// # Errors
    /// [`ErrorKind::Protocol`] if there is none, or several.
    pub fn reference<C>(&self) -> Result<Ref<C>> {
        match self.values.as_slice() {
            [value] if !value.is_empty() => Ok(Ref::new(value.as_str())),
            values => {
                let reason = format!("one reference was expected as its result, {} were found", values.len());
                Err(Error::new(ErrorKind::Protocol, &self.subject, reason))
            }
        }
    }

    /// Returns all values.
    #[must_use]
    pub fn values(&self) -> &[String] {
        &self.values
    }
}

impl Pool {
    /// Makes a task of ours: what a transfer is to say how it went.
    ///
    /// # Errors
    /// As [`Pool::call`].
    pub fn task(&self, label: &str) -> Result<Task> {
        let mark = self.mark();
        let name = if mark.is_empty() { label.to_owned() } else { format!("{mark} {label}") };
        let reference = self.call("task.create", &[name.into(), "".into()])?;
        Ok(Task::new(self, reference, label, false))
    }

    /// Takes a task of ours that a transfer of a run that died was to end.
    #[must_use]
    pub fn watch(&self, task: &Ref<TaskObject>, label: &str) -> Task {
        Task::new(self, task.clone(), label, false)
    }

    /// Destroys a task of ours that nobody ends any more, such as one of a run that died. One that is gone is no error.
    ///
    /// # Errors
    /// As [`Pool::call`].
    pub fn destroy_task(&self, task: &Ref<TaskObject>) -> Result<()> {
        // The pool only marks a pending one. It may have ended by itself.
        let _ = self.set(task, "status", "cancelled");
        unless_gone(task, self.act("task.destroy", &[json!(task)]))
    }
}

impl Task {
    /// Takes a task that the pool made for a call.
    pub(crate) fn adopt(pool: &Pool, reference: Ref<TaskObject>, label: &str) -> Self {
        Self::new(pool, reference, label, true)
    }

    fn new(pool: &Pool, reference: Ref<TaskObject>, label: &str, is_call: bool) -> Self {
        pool.session.keeper.add(&reference);
        Self {
            pool: pool.clone(),
            reference,
            label: label.to_owned(),
            is_call,
            is_held: is_call,
            is_over: AtomicBool::new(false),
            is_left: false,
        }
    }

    /// Takes note that a transfer has begun, which ends it.
    pub(crate) fn hold(&mut self) {
        self.is_held = true;
    }

    /// Leaves it in the pool: until somebody destroys it, it says what was made.
    pub fn leave(&mut self) {
        self.is_left = true;
    }

    /// Whether it is known to have ended, or to be gone.
    #[must_use]
    pub fn is_over(&self) -> bool {
        self.is_over.load(Ordering::Acquire)
    }

    /// Returns its reference.
    #[must_use]
    pub fn reference(&self) -> &Ref<TaskObject> {
        &self.reference
    }

    /// Returns how far it says to be, 0 to 1. 1 does not mean success.
    ///
    /// # Errors
    /// [`ErrorKind::Gone`], or as [`Pool::call`].
    pub fn progress(&self) -> Result<f64> {
        self.pool.field(&self.reference, "progress")
    }

    /// Says how far it is, 0 to 1: of a task of ours that no transfer moves.
    ///
    /// # Errors
    /// As [`Pool::call`].
    pub fn set_progress(&self, progress: f64) -> Result<()> {
        self.pool.act("task.set_progress", &[json!(self.reference), json!(progress.clamp(0.0, 1.0))])
    }

    /// Says how it ended: of a task of ours that no transfer ends.
    ///
    /// # Errors
    /// As [`Pool::call`].
    pub fn finish(&self, is_success: bool) -> Result<()> {
        self.pool.set(&self.reference, "status", if is_success { "success" } else { "failure" })
    }

    /// Asks the pool to end it; it may succeed nevertheless.
    ///
    /// # Errors
    /// As [`Pool::call`].
    pub fn cancel(&self) -> Result<()> {
        let pool = self.pool.with(&Cancel::within(CLEANUP));
        pool.act("task.cancel", &[json!(self.reference)])
    }

    /// Waits for its end. If `cancel` stops that, the pool is asked to end a task that is a call; whether it was done is
    /// unknown then.
    ///
    /// # Errors
    /// [`ErrorKind::Failed`] with the code of the task's error, or the kind that code has; [`ErrorKind::Unknown`] if it
    /// vanished; what `cancel` says; or as [`Pool::call`].
    pub fn wait(&self, cancel: &Cancel) -> Result<Outcome> {
        let ended = self.ended(cancel);
        if self.is_call
            && ended.as_ref().is_err_and(|error| matches!(error.kind(), ErrorKind::Cancelled | ErrorKind::TimedOut))
        {
            // It may have ended meanwhile.
            let _ = self.cancel();
        }
        self.outcome(&ended?)
    }

    /// Returns its error if it has ended with one by now.
    pub(crate) fn failure(&self) -> Option<Error> {
        let record = self.pool.with(&Cancel::within(CLEANUP)).record(&self.reference).ok()?;
        if record.status == "pending" { None } else { self.outcome(&record.fields).err() }
    }

    /// Waits until it is not pending any more.
    fn ended(&self, cancel: &Cancel) -> Result<TaskObject> {
        let ended = self.watched(cancel);
        let is_over = ended.as_ref().map_or_else(|error| error.kind() == ErrorKind::Unknown, |_| true);
        self.is_over.fetch_or(is_over, Ordering::AcqRel);
        ended
    }

    fn watched(&self, cancel: &Cancel) -> Result<TaskObject> {
        let pool = self.pool.with(cancel);
        let subjects = [format!("task/{}", self.reference.as_str())];
        let mut cursor = Cursor::default();
        let mut is_seen = false;
        loop {
            cancel.check(self.subject())?;
            if !is_seen {
                let record = pool.record(&self.reference);
                let record = record.map_err(|error| if error.is_gone() { self.vanished() } else { error })?;
                if record.status != "pending" {
                    return Ok(record.fields);
                }
            }
            let batch = poll(&pool.core, &subjects, &mut cursor, LOOK, cancel)?;
            // Nothing new: it may have vanished without a word.
            is_seen = !batch.events.is_empty();
            for event in batch.events.into_iter().filter(|event| event.reference == self.reference.as_str()) {
                if event.operation == Operation::Delete {
                    return Err(self.vanished());
                }
                let Some(snapshot) = event.snapshot else { continue };
                let record = Record::<TaskObject>::parse(self.reference.clone(), snapshot)?;
                if record.status != "pending" {
                    return Ok(record.fields);
                }
            }
        }
    }

    fn outcome(&self, record: &TaskObject) -> Result<Outcome> {
        match record.status.as_str() {
            "success" => {
                let values = values(&record.result).map_err(|reason| {
                    let reason = format!("it was done, but its result cannot be read: {reason}");
                    Error::new(ErrorKind::Protocol, self.subject(), reason)
                })?;
                Ok(Outcome { values, subject: self.subject() })
            }
            "failure" | "cancelled" => {
                let mut codes = record.error_info.clone();
                if codes.is_empty() {
                    codes.push(if record.status == "failure" { "INTERNAL_ERROR" } else { "TASK_CANCELLED" }.to_owned());
                }
                let codes = self.pool.core.hide(codes);
                Err(Error::api(self.subject(), codes, ErrorKind::Failed))
            }
            other => {
                let reason = format!("its status is '{}', which no task has", crate::error::quoted(other));
                Err(Error::new(ErrorKind::Protocol, self.subject(), reason))
            }
        }
    }

    fn vanished(&self) -> Error {
        let reason = "its task vanished, perhaps because the toolstack was restarted: nobody can say whether it was done, \
                      the objects have to be looked at";
        Error::new(ErrorKind::Unknown, self.subject(), reason)
    }

    fn subject(&self) -> String {
        self.pool.subject(&self.label)
    }
}

impl Drop for Task {
    fn drop(&mut self) {
        self.pool.session.keeper.remove(&self.reference);
        if self.is_left {
            return;
        }
        let pool = self.pool.with(&Cancel::within(CLEANUP));
        let is_transfer = self.is_held && !self.is_call;
        // One that was broken off ends by itself, and lets go of its disks first; unless its host hangs.
        let hangs = is_transfer
            && !self.is_over()
            && self.ended(&Cancel::within(BROKEN_OFF)).is_err_and(|error| error.kind() != ErrorKind::Unknown);
        if hangs {
            // In the same time as what follows: a pool that does not answer is not waited for twice.
            let _ = pool.act("task.cancel", &[json!(self.reference)]);
        }
        let destroyed = if self.is_held && !hangs {
            unless_gone(&self.reference, pool.act("task.destroy", &[json!(self.reference)]))
        } else {
            pool.destroy_task(&self.reference)
        };
        if let Err(error) = destroyed {
            tracing::warn!(%error, "a task could not be destroyed; the pool drops it");
        }
    }
}

/// Parses the result of a task: `<value>..</value>` of XML-RPC with a text, an array of texts, or nothing.
fn values(result: &str) -> std::result::Result<Vec<String>, String> {
    if result.trim().is_empty() {
        return Ok(Vec::new());
    }
    // Older servers answer a reference as it is.
    if !result.trim_start().starts_with('<') {
        return Ok(vec![result.trim().to_owned()]);
    }
    let options = ParsingOptions { allow_dtd: false, nodes_limit: NODES, ..ParsingOptions::default() };
    let document = Document::parse_with_options(result, options).map_err(|error| error.to_string())?;
    let root = document.root_element();
    if !root.has_tag_name("value") {
        return Err(format!("<value> was expected, <{}> was found", crate::error::quoted(root.tag_name().name())));
    }
    let leaves = root.descendants().filter(|node| {
        node.has_tag_name("value")
            && !node
                .descendants()
                .any(|inner| inner.has_tag_name("value") && inner != *node || inner.has_tag_name("array"))
    });
    let text = |node: roxmltree::Node<'_, '_>| -> String {
        node.descendants().filter(|inner| inner.is_text()).filter_map(|inner| inner.text()).collect()
    };
    let values: Vec<String> = leaves.map(text).collect();
    Ok(if values == [""] { Vec::new() } else { values })
}

#[cfg(test)]
mod tests {
    use super::values;

    #[test]
    fn the_results_of_tasks_are_read_in_all_their_forms() {
        for (result, expected) in [
            ("", vec![]),
            ("<value/>", vec![]),
            ("<value></value>", vec![]),
            ("<value>OpaqueRef:1</value>", vec!["OpaqueRef:1"]),
            ("OpaqueRef:1", vec!["OpaqueRef:1"]),
            ("<value><string>a &amp; b</string></value>", vec!["a & b"]),
            ("<value><array><data/></array></value>", vec![]),
            ("<value><array><data><value>1</value><value>2</value></data></array></value>", vec!["1", "2"]),
        ] {
            assert_eq!(values(result).unwrap(), expected, "{result}");
        }
    }

    #[test]
    fn results_that_are_none_are_refused() {
        let many = format!("<value>{}</value>", "<value>1</value>".repeat(20_000));
        let bomb = "<!DOCTYPE v [<!ENTITY a \"aaaa\">]><value>&a;</value>";
        for result in ["<value>", "<other>1</other>", "<value>1</other>", many.as_str(), bomb] {
            assert!(values(result).is_err(), "{}", &result[..result.len().min(80)]);
        }
    }
}
