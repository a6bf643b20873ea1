//! Pieces of work that are so small, and so many, that counting each by itself would be felt.

use std::cell::Cell;
use std::time::Instant;

use super::counter::Probe;
use super::within::timed;

/// Pieces of work of one thread that are as small as a rename, and as many: each is timed, and what they took is added up here, and counted
/// when there are 64 of them, or no more.
pub struct Small<'a> {
    probe: &'a Probe,
    pieces: Cell<u64>,
    busy_ns: Cell<u64>,
}

/// Pieces that are counted at once.
const BATCH: u64 = 64;

impl<'a> Small<'a> {
    /// Begins with none.
    #[must_use]
    pub fn new(probe: &'a Probe) -> Self {
        Self { probe, pieces: Cell::new(0), busy_ns: Cell::new(0) }
    }

    /// Does a piece of work.
    pub fn work<T>(&self, act: impl FnOnce() -> T) -> T {
        if !self.probe.is_seen() {
            return act();
        }
        if self.pieces.get() == 0 {
            self.pieces.set(1);
            return self.probe.work(act);
        }
        let (result, all, within) = timed(Instant::now(), || {
            self.probe.slow_down();
            act()
        });
        self.busy_ns.set(self.busy_ns.get().saturating_add(all.saturating_sub(within.time_ns())));
        self.pieces.set(self.pieces.get() + 1);
        if self.pieces.get() == BATCH {
            self.count();
        }
        result
    }

    fn count(&self) {
        self.probe.add_small(self.pieces.take(), self.busy_ns.take());
    }
}

impl Drop for Small<'_> {
    fn drop(&mut self) {
        self.count();
    }
}

#[cfg(test)]
mod tests {
    use std::thread::sleep;
    use std::time::Duration;

    use super::*;
    use crate::probe::{Crew, Stage, Subject, Transfer, Way};

    const PAUSE: Duration = Duration::from_millis(20);

    #[test]
    fn small_pieces_are_all_counted_and_their_time_once() {
        let transfer = Transfer::default();
        let probe = |stage| transfer.stage(stage, &Subject::machine(), Crew::Own, Way::Only);
        let (outer, inner) = (probe(Stage::Read), probe(Stage::Move));
        let start = Instant::now();
        outer.work(|| {
            let small = Small::new(&inner);
            (0..2 * BATCH + 3).for_each(|number| small.work(|| sleep(PAUSE * u32::from(number % BATCH < 2))));
        });
        let all = start.elapsed();
        let (outer, inner) = (outer.reading(), inner.reading());
        assert_eq!((inner.pieces, inner.bytes, inner.workers), (2 * BATCH + 3, 0, 1));
        assert!(inner.busy >= PAUSE * 6 && inner.busy + outer.busy <= all, "{all:?} {inner:?} {outer:?}");
    }
}
