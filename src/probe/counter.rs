//! One stage of a transfer, counted by all its threads.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use super::history::History;
use super::spent::{Spent, nanoseconds};
use super::stage::{Crew, Identity, Stage, Subject, Way, identity};
use super::transfer::StageReading;
use super::within::{Part, timed};

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
    /// By how much each piece of work is made longer; usually not at all.
    slowed: Duration,
    /// What is counted of other stages within this one, unless it is such a part itself.
    parts: Option<Parts>,
    workers: AtomicUsize,
    pieces: AtomicU64,
    bytes: AtomicU64,
    busy: Spent,
    input: Spent,
    output: Spent,
    history: History,
}

/// The stages that happen within others, where nobody knows of transfers.
#[derive(Debug)]
pub(super) struct Parts {
    pub bandwidth: Arc<Probe>,
    pub network: Arc<Probe>,
    pub decode: Arc<Probe>,
}

impl Probe {
    /// Makes one of a transfer that `begun` then; without, it counts nothing.
    pub(super) fn new(identity: (Stage, Subject, Crew, Way), begun: Option<Instant>, parts: Option<Parts>) -> Self {
        let (stage, of, crew, way) = identity;
        Self {
            stage,
            of,
            crew,
            way,
            is_seen: begun.is_some(),
            begun: begun.unwrap_or_else(Instant::now),
            slowed: Duration::ZERO,
            parts,
            workers: AtomicUsize::new(0),
            pieces: AtomicU64::new(0),
            bytes: AtomicU64::new(0),
            busy: Spent::default(),
            input: Spent::default(),
            output: Spent::default(),
            history: History::default(),
        }
    }

    /// Makes each piece of its work longer.
    pub(super) fn slowed(self, by: Duration) -> Self {
        Self { slowed: by, ..self }
    }

    pub(super) fn identity(&self) -> Identity<'_> {
        identity(self.stage, &self.of, self.crew, &self.way)
    }

    /// Does a piece of work, and counts its time.
    pub fn work<T>(&self, act: impl FnOnce() -> T) -> T {
        self.counted(&self.busy, || {
            self.slow_down();
            act()
        })
    }

    /// Waits for the stage before.
    pub fn take<T>(&self, act: impl FnOnce() -> T) -> T {
        self.counted(&self.input, act)
    }

    /// Waits for the stage behind.
    pub fn give<T>(&self, act: impl FnOnce() -> T) -> T {
        self.counted(&self.output, act)
    }

    /// Counts that it was waited so long for the stage before, where another one timed that.
    pub fn has_waited(&self, time: Duration) {
        self.input.add(nanoseconds(time));
    }

    /// Counts a piece of so many bytes that passed.
    pub fn add(&self, bytes: usize) {
        if !self.is_seen {
            return;
        }
        let bytes = u64::try_from(bytes).unwrap_or(u64::MAX);
        self.pieces.fetch_add(1, Ordering::Relaxed);
        if bytes > 0 {
            self.bytes.fetch_add(bytes, Ordering::Relaxed);
            self.history.add(nanoseconds(self.begun.elapsed()), bytes);
        }
    }

    /// Counts small pieces that took so long together (nanoseconds).
    pub(super) fn add_small(&self, pieces: u64, busy_ns: u64) {
        self.pieces.fetch_add(pieces, Ordering::Relaxed);
        self.busy.add(busy_ns);
    }

    /// Whether it counts at all.
    pub(super) fn is_seen(&self) -> bool {
        self.is_seen
    }

    /// Takes longer, if it is to.
    pub(super) fn slow_down(&self) {
        if !self.slowed.is_zero() {
            std::thread::sleep(self.slowed);
        }
    }

    fn counted<T>(&self, spent: &Spent, act: impl FnOnce() -> T) -> T {
        if !self.is_seen {
            return act();
        }
        let start = Instant::now();
        let begun = spent.begin(start.saturating_duration_since(self.begun));
        let at_it = self.busy.threads() + self.input.threads() + self.output.threads();
        if at_it > self.workers.load(Ordering::Relaxed) {
            self.workers.fetch_max(at_it, Ordering::Relaxed);
        }
        let (result, all, within) = timed(start, act);
        let others = within.time_ns();
        spent.end(begun, all.saturating_sub(others));
        if others > within.others
            && let Some(parts) = &self.parts
        {
            parts.bandwidth.did(&parts.bandwidth.input, within.bandwidth, self);
            parts.network.did(&parts.network.busy, within.network, self);
            parts.decode.did(&parts.decode.busy, within.decode, self);
        }
        result
    }

    /// Counts what threads did of it within another stage.
    fn did(&self, spent: &Spent, part: Part, within: &Self) {
        if part.time_ns == 0 {
            return;
        }
        self.slow_down();
        spent.add(part.time_ns.saturating_add(nanoseconds(self.slowed)));
        self.workers.fetch_max(within.workers.load(Ordering::Relaxed), Ordering::Relaxed);
        self.add(part.bytes);
    }

    /// Returns what was counted so far, with what is under way: what happens within that is counted as of both until it is over.
    pub(super) fn reading(&self) -> StageReading {
        let after = self.begun.elapsed();
        let (step, history) = self.history.reading();
        StageReading {
            stage: self.stage,
            of: self.of.clone(),
            crew: self.crew,
            way: self.way.clone(),
            workers: self.workers.load(Ordering::Relaxed),
            pieces: self.pieces.load(Ordering::Relaxed),
            bytes: self.bytes.load(Ordering::Relaxed),
            busy: self.busy.reading(after),
            input: self.input.reading(after),
            output: self.output.reading(after),
            step,
            history,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::thread::sleep;

    use super::*;
    use crate::probe::{Transfer, held_back, on_the_way};

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
                held_back(1, || sleep(PAUSE * 3));
            });
            held_back(2, || sleep(PAUSE * 3));
            storage::decoding(5, || sleep(PAUSE * 3));
            sleep(PAUSE * 3);
            on_the_way(7, PAUSE * 2);
        });
        let all = start.elapsed();
        let reading = transfer.reading();
        let told: Vec<_> = reading.stages.iter().map(|stage| (stage.stage, stage.bytes, stage.workers)).collect();
        let expected = [
            (Stage::Bandwidth, 3, 1),
            (Stage::Read, 0, 1),
            (Stage::Network, 7, 1),
            (Stage::Base, 0, 1),
            (Stage::Decode, 5, 1),
        ];
        assert_eq!(told, expected);
        let [bandwidth, read, network, base, decode] = &reading.stages[..] else { unreachable!("five were told") };
        assert!(read.busy >= PAUSE && base.busy >= PAUSE * 3 && decode.busy >= PAUSE * 3, "{reading:?}");
        assert!(bandwidth.input >= PAUSE * 6 && bandwidth.busy.is_zero(), "{bandwidth:?}");
        assert_eq!(network.busy, PAUSE * 2);
        let sum: Duration = reading.stages.iter().map(|stage| stage.busy + stage.input).sum();
        assert!(sum <= all, "{all:?} {reading:?}");
    }

    #[test]
    fn what_is_under_way_counts_already() {
        let transfer = Transfer::default();
        let probe = probe(&transfer, Stage::Write);
        let looked = probe.work(|| {
            sleep(PAUSE);
            probe.reading()
        });
        assert!(looked.busy >= PAUSE - Duration::from_micros(1), "{looked:?}");
        let (first, second) = (probe.reading(), probe.reading());
        // What is under way is told in microseconds.
        let is_all = first.busy + Duration::from_micros(1) >= looked.busy;
        assert!(is_all && first.busy == second.busy, "{looked:?} {first:?} {second:?}");
    }

    #[test]
    fn a_stage_is_slowed_on_purpose_and_only_that() {
        let start = Instant::now();
        let transfer = Transfer::slowed(Stage::Decode, PAUSE * 2);
        let read = probe(&transfer, Stage::Read);
        read.work(|| storage::decoding(1, || sleep(PAUSE)));
        let reading = transfer.reading();
        let [read, decode] = &reading.stages[..] else { panic!("two were counted: {reading:?}") };
        assert!(decode.busy >= PAUSE * 3 && decode.busy + read.busy <= start.elapsed(), "{reading:?}");
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
