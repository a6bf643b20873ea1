//! What of a thread's work is another stage's: timed where it happens, told to whatever stage surrounds it.

use std::cell::Cell;
use std::time::{Duration, Instant};

use super::spent::nanoseconds;

/// What was done of another stage.
#[derive(Debug, Clone, Copy, Default)]
pub struct Part {
    pub time_ns: u64,
    pub bytes: usize,
}

impl Part {
    fn add(&mut self, time_ns: u64, bytes: usize) {
        self.time_ns = self.time_ns.saturating_add(time_ns);
        self.bytes = self.bytes.saturating_add(bytes);
    }
}

/// What was timed within something that a thread does.
#[derive(Clone, Copy)]
pub struct Within {
    /// Of other stages (nanoseconds).
    pub others: u64,
    /// Waiting for the limit of bandwidth.
    pub bandwidth: Part,
    /// On the way to the source and back.
    pub network: Part,
    /// Decrypting, decompressing.
    pub decode: Part,
}

impl Within {
    const NOTHING: Self = {
        let part = Part { time_ns: 0, bytes: 0 };
        Self { others: 0, bandwidth: part, network: part, decode: part }
    };

    /// Returns how long all of it took (nanoseconds).
    pub fn time_ns(&self) -> u64 {
        let parts = [self.bandwidth, self.network, self.decode];
        parts.iter().fold(self.others, |sum, part| sum.saturating_add(part.time_ns))
    }
}

thread_local! {
    static WITHIN: Cell<Within> = const { Cell::new(Within::NOTHING) };
}

/// Does something that began at `start`; returns how long it took (nanoseconds), and what of that was another stage's. What surrounds it
/// sees all of it as of another stage.
pub fn timed<T>(start: Instant, act: impl FnOnce() -> T) -> (T, u64, Within) {
    let before = WITHIN.replace(Within::NOTHING);
    let (result, decoded) = storage::with_decoded(act);
    let all = nanoseconds(start.elapsed());
    let within = WITHIN.replace(Within { others: before.others.saturating_add(all), ..before });
    let decode = Part { time_ns: nanoseconds(decoded.time), bytes: decoded.bytes };
    (result, all, Within { decode, ..within })
}

/// Waits until so many bytes may be read, within the work of whatever stage reads them: that is not its work.
pub fn held_back<T>(bytes: usize, act: impl FnOnce() -> T) -> T {
    let start = Instant::now();
    let result = act();
    let mut within = WITHIN.get();
    within.bandwidth.add(nanoseconds(start.elapsed()), bytes);
    WITHIN.set(within);
    result
}

/// Says that of what was read of so many bytes, within the work of whatever stage reads them, so long was spent on the way.
pub fn on_the_way(bytes: usize, time: Duration) {
    let mut within = WITHIN.get();
    within.network.add(nanoseconds(time), bytes);
    WITHIN.set(within);
}
