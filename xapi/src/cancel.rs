//! A token that stops whatever waits: everything of this crate that waits looks at one every 100 ms.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use crate::{Error, ErrorKind, Result};

/// How often who waits looks at its token.
pub(crate) const TICK: Duration = Duration::from_millis(100);

/// A token shared by who waits and who may stop it. Clones are the same token.
#[derive(Debug, Clone, Default)]
pub struct Cancel(Arc<State>);

#[derive(Debug, Default)]
struct State {
    is_cancelled: AtomicBool,
    deadline: Option<Instant>,
    parent: Option<Cancel>,
}

impl Cancel {
    /// Makes a token that nothing stops yet.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Makes a token that stops by itself after `time`: what has to be cleaned up after a cancel needs one of its own.
    #[must_use]
    pub fn within(time: Duration) -> Self {
        Self(Arc::new(State { deadline: Instant::now().checked_add(time), ..State::default() }))
    }

    /// Makes a token that stops with this one, alone, or after `time`.
    #[must_use]
    pub fn part(&self, time: Duration) -> Self {
        let deadline = Instant::now().checked_add(time);
        Self(Arc::new(State { deadline, parent: Some(self.clone()), ..State::default() }))
    }

    /// Stops whoever waits with this token or a part of it.
    pub fn cancel(&self) {
        self.0.is_cancelled.store(true, Ordering::Release);
    }

    /// Whether somebody stopped it. A deadline that passed is none.
    #[must_use]
    pub fn is_cancelled(&self) -> bool {
        self.0.is_cancelled.load(Ordering::Acquire) || self.0.parent.as_ref().is_some_and(Self::is_cancelled)
    }

    /// Whether it may go on; `subject` is what an error says was stopped.
    ///
    /// # Errors
    /// [`ErrorKind::Cancelled`] if it was stopped, [`ErrorKind::TimedOut`] after its deadline.
    pub fn check(&self, subject: impl std::fmt::Display) -> Result<()> {
        if self.is_cancelled() {
            return Err(Error::new(ErrorKind::Cancelled, subject, "cancelled"));
        }
        if self.is_late() {
            return Err(Error::new(ErrorKind::TimedOut, subject, "it took longer than it may"));
        }
        Ok(())
    }

    /// Waits for `time`, or until it is stopped.
    ///
    /// # Errors
    /// As [`Cancel::check`].
    pub fn sleep(&self, time: Duration, subject: impl std::fmt::Display) -> Result<()> {
        let begun = Instant::now();
        loop {
            self.check(&subject)?;
            let Some(rest) = time.checked_sub(begun.elapsed()).filter(|rest| !rest.is_zero()) else { return Ok(()) };
            thread::sleep(rest.min(TICK));
        }
    }

    fn is_late(&self) -> bool {
        self.0.deadline.is_some_and(|deadline| Instant::now() >= deadline)
            || self.0.parent.as_ref().is_some_and(Self::is_late)
    }
}
