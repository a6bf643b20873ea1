//! How long all threads did one thing, with what is under way.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// How long all threads did one thing.
#[derive(Debug, Default)]
pub struct Spent {
    /// What is over (nanoseconds).
    over_ns: AtomicU64,
    /// What is under way: [`THREAD`] for each thread that is at it, and the sum of the times at which these began, each below [`LATEST_US`].
    under_way: AtomicU64,
}

const THREAD: u64 = 1 << 54;
/// No later beginning is told apart: microseconds of half a year. So a thousand of them are no [`THREAD`].
const LATEST_US: u64 = (1 << 44) - 1;

impl Spent {
    /// Begins so long after the transfer; returns what ends it.
    pub fn begin(&self, after: Duration) -> u64 {
        let begun = THREAD + microseconds(after);
        self.under_way.fetch_add(begun, Ordering::Relaxed);
        begun
    }

    /// Ends what began so, of which this much counts (nanoseconds).
    pub fn end(&self, begun: u64, counted_ns: u64) {
        self.under_way.fetch_sub(begun, Ordering::Relaxed);
        self.add(counted_ns);
    }

    /// Adds what was timed by somebody else.
    pub fn add(&self, time_ns: u64) {
        self.over_ns.fetch_add(time_ns, Ordering::Relaxed);
    }

    /// Returns how many threads are at it.
    pub fn threads(&self) -> usize {
        usize::try_from(self.under_way.load(Ordering::Relaxed) / THREAD).unwrap_or(usize::MAX)
    }

    /// Returns all of it, so long after the transfer began.
    pub fn reading(&self, after: Duration) -> Duration {
        let under_way = self.under_way.load(Ordering::Relaxed);
        let (threads, begun) = (under_way / THREAD, under_way % THREAD);
        let under_way = Duration::from_micros((threads * microseconds(after)).saturating_sub(begun));
        Duration::from_nanos(self.over_ns.load(Ordering::Relaxed)) + under_way
    }
}

/// Returns a time in nanoseconds, at most as many as there can be.
pub fn nanoseconds(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

fn microseconds(after: Duration) -> u64 {
    (after.as_secs().saturating_mul(1_000_000)).saturating_add(u64::from(after.subsec_micros())).min(LATEST_US)
}
