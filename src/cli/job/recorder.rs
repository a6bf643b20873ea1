//! What a run writes down: in the log of its job, and in memory for its report.

use std::sync::{Mutex, PoisonError};

use uuid::Uuid;

use crate::cli::text::Shown;
use crate::job::log::{Event, Log, Record, VmStatus};

/// The lines of one run. A log that cannot be written is said, and stops nothing.
pub struct Recorder {
    run: Uuid,
    written: Mutex<Written>,
}

struct Written {
    log: Log,
    records: Vec<Record>,
    is_said: bool,
}

impl Recorder {
    /// Begins a run.
    pub fn new(run: Uuid, log: Log) -> Self {
        Self { run, written: Mutex::new(Written { log, records: Vec::new(), is_said: false }) }
    }

    /// Notes what happens now.
    pub fn note(&self, event: Event) {
        let mut written = self.written.lock().unwrap_or_else(PoisonError::into_inner);
        let record = Record::now(self.run, event);
        match written.log.append(&record) {
            Ok(()) => written.is_said = false,
            Err(error) if !std::mem::replace(&mut written.is_said, true) => {
                say!("xofs: {}; the run goes on, and is in the log once there is room", Shown(&error.to_string()));
            }
            Err(_) => {}
        }
        written.records.push(record);
    }

    /// Notes what could not even be tried: a machine that is not there, a pool, a repository.
    pub fn never_tried(&self, name: &str, pool: &str, reason: &str) {
        let next = "the next run looks again";
        say!("xofs: {}: {}; {next}", Shown(name), Shown(reason));
        self.note(Event::VmEnd {
            vm: String::new(),
            name: name.to_owned(),
            pool: pool.to_owned(),
            attempt: 0,
            status: VmStatus::Failed,
            reason: Some(reason.to_owned()),
            next: Some(next.to_owned()),
            seconds: 0.0,
            backup: None,
        });
    }

    /// Whether the log lacks lines.
    pub fn lacks_lines(&self) -> bool {
        self.written.lock().unwrap_or_else(PoisonError::into_inner).is_said
    }

    /// Returns the lines so far.
    pub fn records(&self) -> Vec<Record> {
        self.written.lock().unwrap_or_else(PoisonError::into_inner).records.clone()
    }
}
