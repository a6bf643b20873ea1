//! How long a run goes on: until it is stopped, or its time is over. Merges have theirs beside it.

use std::fmt;
use std::time::{Duration, Instant};

use xapi::Cancel;

use crate::job::Timeouts;
use crate::job::log::VmStatus;

/// What ends a run early, or a try.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ended {
    /// The run was stopped.
    Stopped,
    /// A machine took as long as it may (a try of it).
    VmTimeout(Duration),
    /// The run took as long as it may.
    JobTimeout(Duration),
}

/// The end of a run. It counts from when this is made.
pub struct Until {
    stop: Cancel,
    late: Option<(Instant, Ended)>,
    of_vm: Option<Duration>,
}

impl fmt::Display for Ended {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (what, limit) = match self {
            Self::Stopped => return f.write_str("the run was stopped"),
            Self::VmTimeout(limit) => ("a VM", limit),
            Self::JobTimeout(limit) => ("the job", limit),
        };
        write!(f, "{what} may take {} s by the job's timeouts", limit.as_secs())
    }
}

impl Ended {
    /// Says why what it ended has failed.
    pub fn reason(self) -> String {
        match self {
            Self::Stopped => self.to_string(),
            Self::VmTimeout(_) | Self::JobTimeout(_) => format!("it was ended: {self}"),
        }
    }

    /// Returns how a machine stands that is ended so.
    pub fn status(self) -> VmStatus {
        match self {
            Self::Stopped => VmStatus::Interrupted,
            Self::VmTimeout(_) | Self::JobTimeout(_) => VmStatus::Failed,
        }
    }
}

impl Until {
    /// Begins to count; `stop` ends it at any time.
    pub fn new(stop: &Cancel, timeouts: &Timeouts) -> Self {
        let late = timeouts.job.and_then(|limit| Some((Instant::now().checked_add(limit)?, Ended::JobTimeout(limit))));
        Self { stop: stop.clone(), late, of_vm: timeouts.vm }
    }

    /// Returns the end of a try that begins now: that of the run, or earlier.
    pub fn of_vm(&self) -> Self {
        let own = self.of_vm.and_then(|limit| Some((Instant::now().checked_add(limit)?, Ended::VmTimeout(limit))));
        let late = own.into_iter().chain(self.late).min_by_key(|(at, _)| *at);
        Self { stop: self.stop.clone(), late, of_vm: None }
    }

    /// Returns what ended it, once it is over.
    pub fn ended(&self) -> Option<Ended> {
        if self.stop.is_cancelled() {
            return Some(Ended::Stopped);
        }
        self.late.filter(|(at, _)| Instant::now() >= *at).map(|(_, ended)| ended)
    }

    /// Returns a token that ends whatever waits with it then.
    pub fn token(&self) -> Cancel {
        self.stop.part(self.late.map_or(Duration::MAX, |(at, _)| at.saturating_duration_since(Instant::now())))
    }
}
