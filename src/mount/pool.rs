//! Threads for work that may wait for a storage.
//!
//! They are made when needed and end when idle. One that is stuck in a system call cannot be ended: it counts against the
//! bound until it comes back, and nothing ever waits for it. At most [`PER_FILE`] work for one file, so that a file which
//! does not answer leaves threads for the others.

use std::collections::{HashMap, VecDeque};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

/// Most threads that work for one file.
pub(super) const PER_FILE: usize = 16;

/// How long a thread waits for work before it ends.
const IDLE: Duration = Duration::from_secs(30);

/// Stack of a thread, in bytes: no work recurses deeply.
const STACK: usize = 1 << 20;

/// Threads, and the work that waits for one.
pub(super) struct Pool(Arc<Shared>);

struct Shared {
    name: &'static str,
    limit: usize,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    queue: VecDeque<Job>,
    threads: usize,
    idle: usize,
    /// Threads at work, by file.
    working: HashMap<u64, usize>,
}

struct Job {
    file: u64,
    run: Box<dyn FnOnce() + Send>,
}

impl State {
    /// Takes the first job whose file has not all the threads it may have.
    fn next(&mut self) -> Option<Job> {
        let working = &self.working;
        let is_free = |job: &Job| working.get(&job.file).is_none_or(|count| *count < PER_FILE);
        let at = self.queue.iter().position(is_free)?;
        let job = self.queue.remove(at)?;
        *self.working.entry(job.file).or_default() += 1;
        Some(job)
    }

    fn done(&mut self, file: u64) {
        if let Some(count) = self.working.get_mut(&file) {
            *count -= 1;
            if *count == 0 {
                self.working.remove(&file);
            }
        }
    }
}

impl Pool {
    /// Makes a pool of at most `limit` threads, which are called `name`.
    pub(super) fn new(name: &'static str, limit: usize) -> Self {
        Self(Arc::new(Shared { name, limit, state: Mutex::default(), changed: Condvar::new() }))
    }

    /// Has a thread do something that is about a file, as soon as there is one.
    pub(super) fn run(&self, file: u64, run: impl FnOnce() + Send + 'static) {
        let shared = &self.0;
        let mut state = shared.state();
        state.queue.push_back(Job { file, run: Box::new(run) });
        // An idle thread that was woken for an earlier job still counts as idle: it takes one of the queue only.
        if state.queue.len() <= state.idle || state.threads >= shared.limit {
            drop(state);
            shared.changed.notify_one();
            return;
        }
        state.threads += 1;
        drop(state);
        let worker = shared.clone();
        let spawned =
            thread::Builder::new().name(shared.name.to_owned()).stack_size(STACK).spawn(move || worker.work());
        if let Err(error) = spawned {
            tracing::warn!(%error, "no thread could be made; the work waits for another");
            let mut state = shared.state();
            state.threads -= 1;
            if state.threads == 0 {
                // Nobody would ever do it. Dropping a job answers its request with an error.
                let dropped = std::mem::take(&mut state.queue);
                drop(state);
                drop(dropped);
            }
        }
    }
}

impl Shared {
    fn work(&self) {
        let mut state = self.state();
        loop {
            let Some(job) = state.next() else {
                state.idle += 1;
                let (woken, waited) = self.changed.wait_timeout(state, IDLE).unwrap_or_else(PoisonError::into_inner);
                state = woken;
                state.idle -= 1;
                if waited.timed_out() && state.queue.is_empty() {
                    state.threads -= 1;
                    return;
                }
                continue;
            };
            drop(state);
            // A panic is one request's: its reply is dropped, which answers it, and the thread lives on.
            if catch_unwind(AssertUnwindSafe(job.run)).is_err() {
                tracing::error!("a panic while a request was worked on; it is answered with an error");
            }
            state = self.state();
            state.done(job.file);
            if !state.queue.is_empty() {
                self.changed.notify_one();
            }
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    const PATIENCE: Duration = Duration::from_secs(10);

    #[test]
    fn a_file_that_does_not_answer_leaves_threads_for_others() {
        let pool = Pool::new("test", PER_FILE + 1);
        let (release, gate) = mpsc::channel::<()>();
        let gate = Arc::new(Mutex::new(gate));
        let (sender, receiver) = mpsc::channel();
        for _ in 0..PER_FILE + 8 {
            let (gate, sender) = (gate.clone(), sender.clone());
            pool.run(1, move || {
                let _ = gate.lock().unwrap().recv();
                sender.send(1).unwrap();
            });
        }
        for _ in 0..50 {
            let sender = sender.clone();
            pool.run(2, move || sender.send(2).unwrap());
        }
        let first: Vec<i32> = (0..50).map(|_| receiver.recv_timeout(PATIENCE).unwrap()).collect();
        assert_eq!(first, [2; 50]);
        drop(release);
        let rest: Vec<i32> = (0..PER_FILE + 8).map(|_| receiver.recv_timeout(PATIENCE).unwrap()).collect();
        assert_eq!(rest, [1; PER_FILE + 8]);
    }

    #[test]
    fn a_panic_ends_no_thread() {
        let pool = Pool::new("test", 1);
        pool.run(1, || panic!("on purpose"));
        let (sender, receiver) = mpsc::channel();
        pool.run(1, move || sender.send(()).unwrap());
        assert_eq!(receiver.recv_timeout(PATIENCE), Ok(()));
    }
}
