//! What has to be told to the pool again and again while long transfers go on.
//!
//! - XAPI drops tasks that are older than a day and whose progress did not move between two looks, 30 s apart; the progress of a
//!   transfer moves by whole percents, too seldom. So it is moved, by steps that nobody sees
//!   (`ocaml/xapi/db_gc_util.ml`, `ocaml/vhd-tool/src/impl.ml`).
//! - XAPI drops sessions that were not used for a day; reading by NBD is no use of a session.

use std::collections::HashMap;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use serde_json::json;

use crate::session::Core;
use crate::{Cancel, Ref, record};

/// How often a task is moved.
const STEP: Duration = Duration::from_secs(10);
/// How often a session is used.
const TOUCH: Duration = Duration::from_secs(3600);
/// How long that may take.
const CALL: Duration = Duration::from_secs(10);

/// Which tasks are under way.
#[derive(Default)]
pub struct Keeper {
    state: Mutex<State>,
    changed: Condvar,
    cancel: Cancel,
}

#[derive(Default)]
struct State {
    tasks: HashMap<Ref<record::TaskObject>, Kept>,
    is_over: bool,
}

#[derive(Clone, Copy)]
struct Kept {
    since: Instant,
    /// How often it was moved.
    steps: u32,
    /// Its progress as the pool saw it last, 0 to 1.
    progress: f64,
}

impl Keeper {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Begins to look after a task.
    pub fn add(&self, task: &Ref<record::TaskObject>) {
        self.state().tasks.insert(task.clone(), Kept { since: Instant::now(), steps: 0, progress: 0.0 });
    }

    /// Leaves a task alone.
    pub fn remove(&self, task: &Ref<record::TaskObject>) {
        self.state().tasks.remove(task);
    }

    /// Ends the thread.
    pub fn stop(&self) {
        self.state().is_over = true;
        self.cancel.cancel();
        self.changed.notify_all();
    }

    /// Does it until [`Keeper::stop`].
    pub fn run(&self, core: &Core) {
        let step = STEP.min(core.settings.keepalive / 10).max(Duration::from_millis(10));
        let mut touched = Instant::now();
        loop {
            let old: Vec<_> = {
                let state = self.state();
                let (state, _) = self
                    .changed
                    .wait_timeout_while(state, step, |state| !state.is_over)
                    .unwrap_or_else(PoisonError::into_inner);
                if state.is_over {
                    return;
                }
                let old = state.tasks.iter().filter(|(_, kept)| kept.since.elapsed() >= core.settings.keepalive);
                old.map(|(task, kept)| (task.clone(), *kept)).collect()
            };
            for (task, kept) in old {
                self.move_on(core, &task, kept);
            }
            if touched.elapsed() >= TOUCH {
                touched = Instant::now();
                // Any call is a use of the session.
                let touch = core.call("pool.get_all", &[], &self.cancel.part(CALL));
                if let Err(error) = touch {
                    tracing::debug!(%error, "the session could not be kept in use");
                }
            }
        }
    }

    fn move_on(&self, core: &Core, task: &Ref<record::TaskObject>, kept: Kept) {
        let cancel = self.cancel.part(CALL);
        let moved = core.call("task.get_progress", &[json!(task)], &cancel).and_then(|shown| {
            let shown = shown.as_f64().unwrap_or(0.0);
            // What the transfer itself has said since counts from there.
            let (base, steps) = if shown >= kept.progress + 0.005 { (shown, 0) } else { (kept.progress, kept.steps) };
            let moved = (base + f64::from(steps + 1) * 1e-9).min(1.0);
            core.call("task.set_progress", &[json!(task), json!(moved)], &cancel)?;
            Ok((base, steps + 1))
        });
        match moved {
            Ok((progress, steps)) => {
                if let Some(kept) = self.state().tasks.get_mut(task) {
                    (kept.progress, kept.steps) = (progress, steps);
                }
            }
            Err(error) => tracing::debug!(%error, "the progress of a task could not be moved"),
        }
    }
}
