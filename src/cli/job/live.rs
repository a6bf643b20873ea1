//! What a run is doing, written down every second for `xofs job top` by a thread beside it. That it cannot be is nobody's trouble.

use std::collections::VecDeque;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use jiff::Timestamp;
use uuid::Uuid;

use crate::ingest::Watch;
use crate::job::Machine;
use crate::job::figures::rate;
use crate::job::live::{Live, LiveVm};
use crate::probe::{self, Reading};

/// How often it is written.
const PAUSE: Duration = Duration::from_secs(1);
/// What happened lately is what happened in so many of these.
const LATELY: usize = 10;

/// Writes what a run is doing, until it is dropped.
pub struct Writer {
    watched: Arc<Mutex<Vec<Watched>>>,
    thread: Option<(Sender<()>, JoinHandle<()>)>,
}

/// A machine that is being backed up.
struct Watched {
    vm: String,
    name: String,
    pool: String,
    since: Timestamp,
    watch: Arc<Watch>,
    /// Lately, oldest first.
    seen: VecDeque<Seen>,
}

/// What was seen of a transfer.
struct Seen {
    at: Instant,
    done: u64,
    reading: Reading,
}

/// As long as it is there, a machine is told of.
pub struct Shown<'a> {
    writer: &'a Writer,
    watch: &'a Arc<Watch>,
}

impl Writer {
    /// Begins to write into a job's folder what its run does.
    pub fn begin(folder: &Path, run: Uuid) -> Self {
        let watched = Arc::new(Mutex::new(Vec::new()));
        let (end, is_over) = mpsc::channel::<()>();
        let (folder, of_thread) = (PathBuf::from(folder), watched.clone());
        let act = move || {
            loop {
                // Where the disk is full, the file grows old.
                let _ = live(run, &of_thread).write(&folder);
                if !matches!(is_over.recv_timeout(PAUSE), Err(RecvTimeoutError::Timeout)) {
                    break;
                }
            }
            let _ = Live::remove(&folder);
        };
        // Where the system refuses another thread, nobody sees what it does.
        let thread = thread::Builder::new().name("job-live".to_owned()).spawn(act).ok();
        Self { watched, thread: thread.map(|thread| (end, thread)) }
    }

    /// Tells of a machine that is being backed up, until what is returned is dropped.
    pub fn show<'a>(&'a self, machine: &Machine, watch: &'a Arc<Watch>) -> Shown<'a> {
        let watched = Watched {
            vm: machine.uuid.clone(),
            name: machine.name.clone(),
            pool: machine.pool.clone(),
            since: Timestamp::now(),
            watch: watch.clone(),
            seen: VecDeque::new(),
        };
        self.watched.lock().unwrap_or_else(PoisonError::into_inner).push(watched);
        Shown { writer: self, watch }
    }
}

impl Drop for Shown<'_> {
    fn drop(&mut self) {
        let mut all = self.writer.watched.lock().unwrap_or_else(PoisonError::into_inner);
        all.retain(|watched| !Arc::ptr_eq(&watched.watch, self.watch));
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        if let Some((end, thread)) = self.thread.take() {
            drop(end);
            // It cannot have panicked with anything that matters to the run.
            let _ = thread.join();
        }
    }
}

/// Looks at all transfers.
fn live(run: Uuid, watched: &Mutex<Vec<Watched>>) -> Live {
    let mut all = watched.lock().unwrap_or_else(PoisonError::into_inner);
    Live { run, time: Timestamp::now(), vms: all.iter_mut().map(Watched::look).collect() }
}

impl Watched {
    fn look(&mut self) -> LiveVm {
        let (done, expected) = self.watch.progress();
        let now = Seen { at: Instant::now(), done, reading: self.watch.transfer().reading() };
        let before = self.seen.front();
        let recent = before.map_or_else(|| now.reading.clone(), |before| now.reading.since(&before.reading));
        let speed = before.map_or_else(
            || rate(now.done, now.reading.elapsed),
            |before| rate(now.done.saturating_sub(before.done), now.at.duration_since(before.at)),
        );
        self.seen.push_back(now);
        if self.seen.len() > LATELY {
            self.seen.pop_front();
        }
        LiveVm {
            vm: self.vm.clone(),
            name: self.name.clone(),
            pool: self.pool.clone(),
            since: self.since,
            done_bytes: done,
            expected_bytes: expected,
            bytes_per_second: speed,
            waits_for: self.watch.waits_for().to_owned(),
            recent: probe::transfer_to_json(&recent),
        }
    }
}
