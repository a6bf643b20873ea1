//! Where a mount stands that this process serves, as a signal finds it.

use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context, Result};

use super::exit::Exit;
use super::signals;
use crate::mount;

/// What ends a mount.
type End = Arc<dyn Fn() -> mount::Result<()> + Send + Sync>;

/// Ends a mount at a signal.
pub struct Serving(Arc<Mutex<Progress>>);

enum Progress {
    /// Nothing is mounted: a signal ends the process at once.
    Opening,
    /// The mount is being made: a signal waits for it.
    Mounting,
    /// A signal came meanwhile.
    Ending,
    Mounted(End),
}

impl Serving {
    /// Takes over the signals. Call it before other threads are started.
    ///
    /// # Errors
    /// What the system says.
    pub fn start() -> Result<Self> {
        let progress = Arc::new(Mutex::new(Progress::Opening));
        let seen = progress.clone();
        signals::handle(move || on_signal(&seen)).context("take over the signals")?;
        Ok(Self(progress))
    }

    /// Notes that the mount is being made.
    pub fn mounting(&self) {
        set(&self.0, Progress::Mounting);
    }

    /// Notes that it is made, and what ends it; returns false if a signal came meanwhile.
    pub fn mounted(&self, end: impl Fn() -> mount::Result<()> + Send + Sync + 'static) -> bool {
        !matches!(set(&self.0, Progress::Mounted(Arc::new(end))), Progress::Ending)
    }
}

fn set(progress: &Mutex<Progress>, next: Progress) -> Progress {
    std::mem::replace(&mut *progress.lock().unwrap_or_else(PoisonError::into_inner), next)
}

fn on_signal(progress: &Mutex<Progress>) {
    let end = {
        let mut progress = progress.lock().unwrap_or_else(PoisonError::into_inner);
        match &*progress {
            Progress::Mounting => {
                *progress = Progress::Ending;
                return;
            }
            Progress::Mounted(end) => end.clone(),
            // The second signal does not wait any more.
            Progress::Opening | Progress::Ending => std::process::exit(Exit::Interrupted as i32),
        }
    };
    match end() {
        // Who still has a file open, or waits for a dead disk, is waited for until the next signal.
        Ok(()) => drop(set(progress, Progress::Ending)),
        Err(error) => tracing::error!(%error, "the mount stays"),
    }
}
