//! One stage of a transfer, counted by all its threads.

use std::cell::Cell;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use super::history::History;
use super::stage::{Crew, Identity, Stage, Subject, Way, identity};
use super::transfer::StageReading;

/// One stage, counted by all its threads.
#[derive(Debug)]
pub struct Probe {
    pub(super) stage: Stage,
    pub(super) of: Subject,
    pub(super) crew: Crew,
    pub(super) way: Way,
    /// Whether it counts at all.
    is_seen: bool,
    /// When the transfer began.
    begun: Instant,
    /// Threads that are at it, and the most there were.
    at_it: AtomicUsize,
    workers: AtomicUsize,
    pieces: AtomicU64,
    bytes: AtomicU64,
    busy_ns: AtomicU64,
    input_ns: AtomicU64,
    output_ns: AtomicU64,
    history: History,
}

/// What was timed within something that a thread does (nanoseconds).
#[derive(Clone, Copy, Default)]
struct Within {
    /// Of other stages.
    others: u64,
    /// Waiting.
    waited: u64,
}

thread_local! {
    static WITHIN: Cell<Within> = const { Cell::new(Within { others: 0, waited: 0 }) };
}

/// Does something that waits, as for a limit, within the work of a stage: that is not work, but waiting for input.
pub fn waiting<T>(act: impl FnOnce() -> T) -> T {
    let before = WITHIN.get();
    let (result, spent, _) = timed(act);
    WITHIN.set(Within { others: before.others, waited: before.waited.saturating_add(spent) });
    result
}

/// Does something; returns how long it took (nanoseconds) and what of that was timed within. What surrounds it sees all of it as of
/// another stage.
fn timed<T>(act: impl FnOnce() -> T) -> (T, u64, Within) {
    let before = WITHIN.replace(Within::default());
    let start = Instant::now();
    let result = act();
    let spent = nanoseconds(start.elapsed());
    let within = WITHIN.replace(Within { others: before.others.saturating_add(spent), ..before });
    (result, spent, within)
}

impl Probe {
    /// Makes one of a transfer that `begun` then; without, it counts nothing.
    pub(super) fn new(stage: Stage, of: Subject, crew: Crew, way: Way, begun: Option<Instant>) -> Self {
        Self {
            stage,
            of,
            crew,
            way,
            is_seen: begun.is_some(),
            begun: begun.unwrap_or_else(Instant::now),
            at_it: AtomicUsize::new(0),
            workers: AtomicUsize::new(0),
            pieces: AtomicU64::new(0),
            bytes: AtomicU64::new(0),
            busy_ns: AtomicU64::new(0),
            input_ns: AtomicU64::new(0),
            output_ns: AtomicU64::new(0),
            history: History::default(),
        }
    }

    pub(super) fn identity(&self) -> Identity<'_> {
        identity(self.stage, &self.of, self.crew, &self.way)
    }

    /// Does a piece of work, and counts its time.
    pub fn work<T>(&self, act: impl FnOnce() -> T) -> T {
        self.counted(&self.busy_ns, act)
    }

    /// Waits for the stage before.
    pub fn take<T>(&self, act: impl FnOnce() -> T) -> T {
        self.counted(&self.input_ns, act)
    }

    /// Waits for the stage behind.
    pub fn give<T>(&self, act: impl FnOnce() -> T) -> T {
        self.counted(&self.output_ns, act)
    }

    /// Counts that it was waited so long for the stage before, where another one timed that.
    pub fn has_waited(&self, time: Duration) {
        self.input_ns.fetch_add(nanoseconds(time), Ordering::Relaxed);
    }

    /// Counts a piece of so many bytes that passed.
    pub fn add(&self, bytes: usize) {
        if !self.is_seen {
            return;
        }
        let bytes = u64::try_from(bytes).unwrap_or(u64::MAX);
        self.pieces.fetch_add(1, Ordering::Relaxed);
        // Renames are many, and have none.
        if bytes > 0 {
            self.bytes.fetch_add(bytes, Ordering::Relaxed);
            self.history.add(nanoseconds(self.begun.elapsed()), bytes);
        }
    }

    fn counted<T>(&self, counter: &AtomicU64, act: impl FnOnce() -> T) -> T {
        if !self.is_seen {
            return act();
        }
        let at_it = self.at_it.fetch_add(1, Ordering::Relaxed) + 1;
        if at_it > self.workers.load(Ordering::Relaxed) {
            self.workers.fetch_max(at_it, Ordering::Relaxed);
        }
        let (result, spent, within) = timed(act);
        counter.fetch_add(spent.saturating_sub(within.others).saturating_sub(within.waited), Ordering::Relaxed);
        if within.waited > 0 {
            self.input_ns.fetch_add(within.waited, Ordering::Relaxed);
        }
        self.at_it.fetch_sub(1, Ordering::Relaxed);
        result
    }

    /// Returns what was counted so far.
    pub(super) fn reading(&self) -> StageReading {
        let time = |counter: &AtomicU64| Duration::from_nanos(counter.load(Ordering::Relaxed));
        let (step, history) = self.history.reading();
        StageReading {
            stage: self.stage,
            of: self.of.clone(),
            crew: self.crew,
            way: self.way.clone(),
            workers: self.workers.load(Ordering::Relaxed),
            pieces: self.pieces.load(Ordering::Relaxed),
            bytes: self.bytes.load(Ordering::Relaxed),
            busy: time(&self.busy_ns),
            input: time(&self.input_ns),
            output: time(&self.output_ns),
            step,
            history,
        }
    }
}

fn nanoseconds(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::thread::sleep;

    use super::*;
    use crate::probe::Transfer;

    const PAUSE: Duration = Duration::from_millis(20);

    fn probe(transfer: &Transfer, stage: Stage) -> Arc<Probe> {
        transfer.stage(stage, &Subject::machine(), Crew::Own, Way::Only)
    }

    #[test]
    fn work_and_both_ways_to_wait_are_told_apart() {
        let transfer = Transfer::default();
        let probe = probe(&transfer, Stage::Read);
        probe.work(|| sleep(PAUSE));
        probe.take(|| sleep(PAUSE * 2));
        probe.give(|| sleep(PAUSE * 4));
        probe.add(7);
        let reading = probe.reading();
        assert!(reading.busy >= PAUSE && reading.input >= PAUSE * 2 && reading.output >= PAUSE * 4, "{reading:?}");
        assert_eq!((reading.bytes, reading.pieces, reading.workers), (7, 1, 1));
        assert_eq!(reading.history.iter().sum::<u64>(), 7);
    }

    #[test]
    fn what_is_timed_within_another_stage_is_counted_once() {
        let transfer = Transfer::default();
        let (outer, inner) = (probe(&transfer, Stage::Read), probe(&transfer, Stage::Base));
        let start = Instant::now();
        outer.work(|| {
            inner.work(|| {
                sleep(PAUSE * 3);
                waiting(|| sleep(PAUSE * 3));
            });
            waiting(|| sleep(PAUSE * 3));
            sleep(PAUSE);
        });
        let all = start.elapsed();
        let (outer, inner) = (outer.reading(), inner.reading());
        assert!(outer.busy >= PAUSE && inner.busy >= PAUSE * 3, "{outer:?} {inner:?}");
        assert!(outer.input >= PAUSE * 3 && inner.input >= PAUSE * 3, "{outer:?} {inner:?}");
        assert!(outer.busy + inner.busy + outer.input + inner.input <= all, "{all:?} {outer:?} {inner:?}");
    }

    #[test]
    fn as_many_work_at_it_as_do_at_once() {
        let transfer = Transfer::default();
        let probe = probe(&transfer, Stage::Write);
        let barrier = std::sync::Barrier::new(3);
        std::thread::scope(|scope| {
            for _ in 0..3 {
                scope.spawn(|| probe.work(|| barrier.wait()));
            }
        });
        probe.take(|| ());
        assert_eq!(probe.reading().workers, 3);
    }
}
