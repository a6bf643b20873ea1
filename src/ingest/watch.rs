//! What is seen of an ingest while it runs, and how it is stopped.

use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};

use super::error::{Error, Result};
use crate::probe::Transfer;

/// What is seen of an ingest while it runs, and how it is stopped.
pub struct Watch {
    is_cancelled: AtomicBool,
    done: AtomicU64,
    expected: AtomicU64,
    /// What is read from, what works, what is written to.
    names: [&'static str; 3],
    /// As an index of them.
    awaited: AtomicU8,
    transfer: Transfer,
    say: Box<dyn Fn(&str) + Send + Sync>,
}

impl Watch {
    /// Makes one; `say` is told, in a sentence, what a person should know.
    pub fn new(say: impl Fn(&str) + Send + Sync + 'static) -> Self {
        Self::between(["image", "processor", "repository"], say)
    }

    /// Makes one of work that reads from the first of `names`, and writes to the last.
    pub fn between(names: [&'static str; 3], say: impl Fn(&str) + Send + Sync + 'static) -> Self {
        Self {
            names,
            is_cancelled: AtomicBool::new(false),
            done: AtomicU64::new(0),
            expected: AtomicU64::new(0),
            awaited: AtomicU8::new(0),
            transfer: Transfer::default(),
            say: Box::new(say),
        }
    }

    /// Counts where the time goes in this transfer, instead of one that began now.
    #[must_use]
    pub fn counted_by(self, transfer: Transfer) -> Self {
        Self { transfer, ..self }
    }

    /// Stops it soon: what was written is removed, unless the backup is complete by then.
    pub fn cancel(&self) {
        self.is_cancelled.store(true, Ordering::Release);
    }

    /// Returns how many bytes of the sources were looked at, and how many will be as far as is known.
    #[must_use]
    pub fn progress(&self) -> (u64, u64) {
        (self.done.load(Ordering::Relaxed), self.expected.load(Ordering::Relaxed))
    }

    /// Returns what is waited for.
    #[must_use]
    pub fn waits_for(&self) -> &'static str {
        self.names[usize::from(self.awaited.load(Ordering::Relaxed)) % self.names.len()]
    }

    /// Returns what counts where the time goes; it began when the watch was made.
    #[must_use]
    pub fn transfer(&self) -> &Transfer {
        &self.transfer
    }

    /// Says what is waited for, by which queues are empty or full.
    pub(crate) fn sees(&self, is_input_empty: bool, is_output_full: bool) {
        let awaited = if is_output_full { 2 } else { u8::from(!is_input_empty) };
        self.awaited.store(awaited, Ordering::Relaxed);
    }

    pub(crate) fn is_cancelled(&self) -> bool {
        self.is_cancelled.load(Ordering::Acquire)
    }

    pub(crate) fn check(&self) -> Result<()> {
        if self.is_cancelled() { Err(Error::interrupted()) } else { Ok(()) }
    }

    pub(crate) fn advance(&self, bytes: u64) {
        self.done.fetch_add(bytes, Ordering::Relaxed);
    }

    pub(crate) fn expect(&self, bytes: u64) {
        self.expected.fetch_add(bytes, Ordering::Relaxed);
    }

    pub(crate) fn say(&self, sentence: &str) {
        (self.say)(sentence);
    }
}
