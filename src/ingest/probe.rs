//! Where the time goes: what each stage moved, how long it worked, and how long it waited for those before and behind it.

use std::iter::Sum;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// One stage, counted by all its threads.
#[derive(Debug, Default)]
pub struct Probe {
    bytes: AtomicU64,
    busy_ns: AtomicU64,
    input_ns: AtomicU64,
    output_ns: AtomicU64,
}

/// What a stage did; times are sums over its threads.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Reading {
    /// Bytes that passed.
    pub bytes: u64,
    /// Time at work.
    pub busy: Duration,
    /// Time blocked on input.
    pub input: Duration,
    /// Time blocked on output.
    pub output: Duration,
}

impl Probe {
    /// Does a piece of work, and counts its time.
    pub fn work<T>(&self, act: impl FnOnce() -> T) -> T {
        timed(&self.busy_ns, act)
    }

    /// Waits for the stage before.
    pub fn take<T>(&self, act: impl FnOnce() -> T) -> T {
        timed(&self.input_ns, act)
    }

    /// Waits for the stage behind.
    pub fn give<T>(&self, act: impl FnOnce() -> T) -> T {
        timed(&self.output_ns, act)
    }

    /// Counts bytes that passed.
    pub fn add(&self, bytes: usize) {
        self.bytes.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    /// Returns what was counted.
    #[must_use]
    pub fn reading(&self) -> Reading {
        let time = |counter: &AtomicU64| Duration::from_nanos(counter.load(Ordering::Relaxed));
        Reading {
            bytes: self.bytes.load(Ordering::Relaxed),
            busy: time(&self.busy_ns),
            input: time(&self.input_ns),
            output: time(&self.output_ns),
        }
    }
}

impl Reading {
    /// Returns for which part of its time it worked, in thousandths: the stage with the highest part is what all wait for.
    #[must_use]
    pub fn utilization(&self) -> u128 {
        let all = self.busy + self.input + self.output;
        self.busy.as_nanos() * 1000 / all.as_nanos().max(1)
    }
}

impl Sum for Reading {
    fn sum<I: Iterator<Item = Self>>(readings: I) -> Self {
        readings.fold(Self::default(), |a, b| Self {
            bytes: a.bytes + b.bytes,
            busy: a.busy + b.busy,
            input: a.input + b.input,
            output: a.output + b.output,
        })
    }
}

fn timed<T>(counter: &AtomicU64, act: impl FnOnce() -> T) -> T {
    let start = Instant::now();
    let result = act();
    let spent = u64::try_from(start.elapsed().as_nanos()).unwrap_or(u64::MAX);
    counter.fetch_add(spent, Ordering::Relaxed);
    result
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_stage_that_never_waits_is_used_most() {
        let (busy, idle) = (Probe::default(), Probe::default());
        let pause = || std::thread::sleep(Duration::from_millis(2));
        busy.work(pause);
        busy.add(7);
        idle.take(pause);
        idle.give(pause);
        assert_eq!((busy.reading().utilization(), idle.reading().utilization()), (1000, 0));
        assert_eq!((busy.reading().bytes, Reading::default().utilization()), (7, 0));
    }
}
