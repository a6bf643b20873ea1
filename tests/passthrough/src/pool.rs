//! Threads that may be held up: as many as there are jobs that wait, up to [`THREADS`]; more jobs queue.

use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::Duration;

/// Most threads, and so most requests that can be held up while others go on.
const THREADS: usize = 256;

type Job = Box<dyn FnOnce() + Send>;

#[derive(Default)]
pub(crate) struct Pool {
    state: Mutex<State>,
    work: Condvar,
    done: Condvar,
}

#[derive(Default)]
struct State {
    queue: VecDeque<Job>,
    threads: usize,
    idle: usize,
}

impl Pool {
    /// Runs a job in a thread that nothing else occupies, if there are not too many.
    pub(crate) fn run(self: &Arc<Self>, job: Job) {
        let mut state = self.state();
        state.queue.push_back(job);
        if state.queue.len() > state.idle && state.threads < THREADS {
            state.threads += 1;
            let pool = Arc::clone(self);
            std::thread::spawn(move || pool.work());
        }
        drop(state);
        self.work.notify_one();
    }

    /// Waits until no job is left, but no longer than `patience`.
    pub(crate) fn wait(&self, patience: Duration) {
        let is_busy = |state: &mut State| !state.queue.is_empty() || state.idle < state.threads;
        drop(self.done.wait_timeout_while(self.state(), patience, is_busy));
    }

    fn work(&self) {
        let mut state = self.state();
        loop {
            if let Some(job) = state.queue.pop_front() {
                drop(state);
                // A job that panics drops its reply, which answers EIO; the thread goes on.
                let _ = catch_unwind(AssertUnwindSafe(job));
                state = self.state();
            } else {
                state.idle += 1;
                self.done.notify_all();
                state = self.work.wait(state).expect("no job runs under the lock");
                state.idle -= 1;
            }
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("no job runs under the lock")
    }
}
