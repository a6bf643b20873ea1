//! Tasks: what a client watches, and how they end.
//!
//! A task's status is written last, so that who sees it sees the rest, too. Tasks are not persistent. Source: xen-api
//! `ocaml/xapi/taskHelper.ml` (order of writes), `db_gc_util.ml` (which go by themselves).

use crate::clock::{Clock, date};
use crate::failure::{Failure, Outcome};
use crate::schema::Class;
use crate::store::Store;
use crate::value::{Reference, Value};
use crate::xml;
use std::collections::BTreeMap;
use std::time::Duration;

/// A finished task is kept for so long.
const FINISHED: Duration = Duration::from_secs(65 * 60);
/// A pending task is kept for so long; longer while its progress moves from one collection to the next.
const PENDING: Duration = Duration::from_secs(24 * 3600);
/// Above this number, the oldest finished ones go early.
const MANY: usize = 200;

#[derive(Clone, Debug)]
struct Task {
    session: Reference,
    created: Duration,
    finished: Option<Duration>,
    /// As it was at the last collection.
    progress: Option<f64>,
    is_cancelled: bool,
    is_destroyed_at_end: bool,
}

/// All tasks.
#[derive(Clone, Debug, Default)]
pub struct Tasks(BTreeMap<Reference, Task>);

impl Tasks {
    /// Makes a pending task.
    pub fn create(
        &mut self,
        store: &mut Store,
        clock: &Clock,
        session: &Reference,
        label: &str,
        description: &str,
        subtask_of: &Reference,
    ) -> Reference {
        let now = clock.now();
        let master = store.all(Class::Pool).next().and_then(|(_, pool)| pool.record["master"].as_text());
        let resident_on = Value::from(master.unwrap_or(crate::value::NULL));
        let task = store.create(
            Class::Task,
            [
                ("name_label", Value::from(label)),
                ("name_description", description.into()),
                ("created", Value::Date(date(now))),
                ("finished", Value::Date(date(now))),
                ("resident_on", resident_on),
                ("allowed_operations", ["cancel", "destroy"].into_iter().collect()),
                ("subtask_of", subtask_of.into()),
            ],
        );
        self.0.insert(
            task.clone(),
            Task {
                session: session.clone(),
                created: now,
                finished: None,
                progress: None,
                is_cancelled: false,
                is_destroyed_at_end: false,
            },
        );
        task
    }

    /// Ends a task; one that is gone, or has ended, stays so.
    pub fn finish(&mut self, store: &mut Store, clock: &Clock, task: &Reference, outcome: &Outcome<Value>) {
        if store.text(Class::Task, task, "status") != Ok("pending") {
            return;
        }
        let now = clock.now();
        let mut write = |field, value| {
            // It was there a line ago, under the same lock.
            let _gone = store.set(Class::Task, task, field, value);
        };
        write("allowed_operations", Value::Set(Vec::new()));
        write("finished", Value::Date(date(now)));
        write("progress", Value::Float(1.0));
        let status = match outcome {
            Ok(result) => {
                write("result", xml::result(result).into());
                "success"
            }
            Err(failure) => {
                write("error_info", failure.to_list().into_iter().collect());
                if failure.code == "TASK_CANCELLED" { "cancelled" } else { "failure" }
            }
        };
        write("status", status.into());
        if let Some(known) = self.0.get_mut(task) {
            known.finished = Some(now);
            if known.is_destroyed_at_end {
                self.remove(store, task);
            }
        }
    }

    /// Notes that a client has set the status.
    pub fn note_status(&mut self, store: &mut Store, clock: &Clock, task: &Reference, status: &str) {
        let Some(known) = self.0.get_mut(task) else { return };
        known.finished = (status != "pending").then(|| clock.now());
        if known.finished.is_some() && known.is_destroyed_at_end {
            self.remove(store, task);
        }
    }

    /// Destroys a task; a pending one goes when it ends.
    ///
    /// # Errors
    /// `HANDLE_INVALID`.
    pub fn destroy(&mut self, store: &mut Store, task: &Reference) -> Outcome<()> {
        let is_pending = store.text(Class::Task, task, "status")? == "pending";
        match self.0.get_mut(task) {
            Some(known) if is_pending => known.is_destroyed_at_end = true,
            _ => self.remove(store, task),
        }
        Ok(())
    }

    /// Asks a task to end.
    ///
    /// # Errors
    /// `HANDLE_INVALID`.
    pub fn cancel(&mut self, store: &mut Store, task: &Reference) -> Outcome<()> {
        if store.text(Class::Task, task, "status")? == "pending" {
            store.set(Class::Task, task, "current_operations", crate::value::map([(task.as_str(), "cancel")]))?;
            if let Some(known) = self.0.get_mut(task) {
                known.is_cancelled = true;
            }
        }
        Ok(())
    }

    /// Returns an error if somebody asked the task to end.
    ///
    /// # Errors
    /// `TASK_CANCELLED`.
    pub fn check(&self, task: &Reference) -> Outcome<()> {
        match self.0.get(task) {
            Some(known) if known.is_cancelled => Err(Failure::new("TASK_CANCELLED", [task.as_str()])),
            _ => Ok(()),
        }
    }

    /// Removes a task, whatever it does.
    pub fn remove(&mut self, store: &mut Store, task: &Reference) {
        store.destroy(Class::Task, task);
        self.0.remove(task);
    }

    /// Forgets all tasks, as a restart of the toolstack does: without a deletion that anybody could be told of.
    pub fn forget(&mut self, store: &mut Store) {
        self.0.clear();
        store.forget(Class::Task);
    }

    /// Returns whether a session has pending tasks.
    pub fn are_pending(&self, session: &Reference) -> bool {
        self.0.values().any(|task| task.session == *session && task.finished.is_none())
    }

    /// Removes tasks that are too old or too many.
    pub fn collect(&mut self, store: &mut Store, clock: &Clock) {
        let now = clock.now();
        let mut removed = Vec::new();
        let mut finished: Vec<(Duration, Reference)> = Vec::new();
        for (reference, task) in &mut self.0 {
            let progress = match store.value(Class::Task, reference, "progress") {
                Ok(Value::Float(progress)) => *progress,
                _ => 0.0,
            };
            let has_moved = task.progress.replace(progress) != Some(progress);
            match task.finished {
                Some(at) if now.saturating_sub(at) > FINISHED => removed.push(reference.clone()),
                Some(at) => finished.push((at, reference.clone())),
                None if now.saturating_sub(task.created) > PENDING && !has_moved => removed.push(reference.clone()),
                None => {}
            }
        }
        let excess = (self.0.len() - removed.len()).saturating_sub(MANY);
        finished.sort();
        removed.extend(finished.into_iter().take(excess).map(|(_, task)| task));
        for task in removed {
            self.remove(store, &task);
        }
    }
}
