//! Tests that begin with a number: how many are tried, and which failed.

use std::panic::catch_unwind;
use std::sync::atomic::{AtomicU64, Ordering};

/// Numbers that look random and are the same for the same seed.
pub struct Random(u64);

impl Random {
    /// The numbers of a seed; neighbouring ones do not begin alike.
    pub fn new(seed: u64) -> Self {
        Self((seed ^ 0x5bd1_e995).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    /// Returns a number below `limit`.
    pub fn below(&mut self, limit: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        usize::try_from(self.0 >> 11).unwrap() % limit
    }
}

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok().map(|text| text.parse().unwrap_or_else(|_| panic!("{name} must be a number: {text}")))
}

/// Runs `test` with each seed below `count`, or as many as `XOFS_SEEDS` says, or that of `XOFS_SEED` alone.
pub fn each(count: u64, threads: usize, test: fn(u64)) {
    if let Some(seed) = number("XOFS_SEED") {
        return test(seed);
    }
    let (count, next) = (number("XOFS_SEEDS").unwrap_or(count), AtomicU64::new(0));
    let failed: Vec<u64> = std::thread::scope(|scope| {
        let work = || {
            let mut failed = Vec::new();
            loop {
                let seed = next.fetch_add(1, Ordering::Relaxed);
                if seed >= count || failed.len() == 5 {
                    return failed;
                }
                if catch_unwind(|| test(seed)).is_err() {
                    eprintln!("seed {seed}: run it alone with XOFS_SEED={seed}");
                    failed.push(seed);
                }
            }
        };
        let threads: Vec<_> = (0..threads).map(|_| scope.spawn(work)).collect();
        threads.into_iter().flat_map(|thread| thread.join().unwrap()).collect()
    });
    assert!(failed.is_empty(), "seeds {failed:?}");
}
