//! The bytes of a stage over time, in at most [`STEPS`] steps of the same length; it doubles when they are full.
//!
//! Who counts adds to an atomic. While the steps are doubled, which happens seldom and under a lock, another thread may still
//! count by the old length: its piece is then told later than it came. None is lost.

use std::array;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

/// The most steps.
const STEPS: usize = 240;
/// How long a step is at first (nanoseconds): 30 s fit.
const FIRST_NS: u64 = 125_000_000;

#[derive(Debug)]
pub(super) struct History {
    /// How often the length of a step was doubled.
    doubled: AtomicU32,
    steps: [AtomicU64; STEPS],
    doubling: Mutex<()>,
}

impl Default for History {
    fn default() -> Self {
        Self { doubled: AtomicU32::new(0), steps: array::from_fn(|_| AtomicU64::new(0)), doubling: Mutex::default() }
    }
}

impl History {
    /// Adds bytes that passed so long after the beginning (nanoseconds).
    pub fn add(&self, at_ns: u64, bytes: u64) {
        loop {
            let doubled = self.doubled.load(Ordering::Acquire);
            let step = usize::try_from(at_ns / step_ns(doubled)).ok().and_then(|step| self.steps.get(step));
            match step {
                Some(step) => {
                    step.fetch_add(bytes, Ordering::Relaxed);
                    return;
                }
                None => self.double(doubled),
            }
        }
    }

    /// Doubles the length of a step, unless another thread did.
    fn double(&self, doubled: u32) {
        let _one = self.doubling.lock().unwrap_or_else(PoisonError::into_inner);
        if self.doubled.load(Ordering::Acquire) != doubled {
            return;
        }
        for (number, step) in self.steps.iter().enumerate() {
            let bytes = step.swap(0, Ordering::Relaxed);
            self.steps[number / 2].fetch_add(bytes, Ordering::Relaxed);
        }
        self.doubled.store(doubled + 1, Ordering::Release);
    }

    /// Returns the length of a step, and the bytes of each up to the last in which something passed.
    pub fn reading(&self) -> (Duration, Vec<u64>) {
        let _one = self.doubling.lock().unwrap_or_else(PoisonError::into_inner);
        let mut bytes: Vec<u64> = self.steps.iter().map(|step| step.load(Ordering::Relaxed)).collect();
        bytes.truncate(bytes.iter().rposition(|bytes| *bytes > 0).map_or(0, |last| last + 1));
        (Duration::from_nanos(step_ns(self.doubled.load(Ordering::Acquire))), bytes)
    }
}

/// Returns the length of a step in nanoseconds. After 30 doublings 240 steps are more than a `u64` of nanoseconds.
fn step_ns(doubled: u32) -> u64 {
    FIRST_NS << doubled.min(32)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_grow_with_the_time_and_no_byte_is_lost() {
        let history = History::default();
        assert_eq!(history.reading(), (Duration::from_millis(125), Vec::new()));
        history.add(0, 1);
        history.add(FIRST_NS - 1, 2);
        history.add(FIRST_NS, 4);
        history.add(3 * FIRST_NS, 8);
        assert_eq!(history.reading(), (Duration::from_millis(125), vec![3, 4, 0, 8]));
        // The first that does not fit, at 30 s.
        history.add(240 * FIRST_NS, 16);
        let (step, bytes) = history.reading();
        assert_eq!((step, bytes.len(), &bytes[..2], bytes[120]), (Duration::from_millis(250), 121, &[7, 8][..], 16));
        history.add(u64::MAX, 32);
        let (step, bytes) = history.reading();
        assert_eq!((bytes.iter().sum::<u64>(), bytes.len() <= STEPS), (63, true), "{step:?}");
    }

    #[test]
    fn threads_that_count_while_it_doubles_lose_nothing() {
        let history = History::default();
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| (0..20_000).for_each(|number| history.add(number * FIRST_NS, 1)));
            }
        });
        assert_eq!(history.reading().1.iter().sum::<u64>(), 80_000);
    }
}
