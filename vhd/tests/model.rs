//! Thousands of random repositories against flat arrays; the seed of one that is not read right is printed.
//!
//! `XOFS_SEEDS=100000` runs more of them, `XOFS_SEED=17` that one alone.

#[allow(dead_code, reason = "each test file uses its part of the module")]
mod builder;
#[allow(dead_code, reason = "a fuzzer uses the rest")]
mod world;

use std::panic::catch_unwind;
use std::sync::atomic::{AtomicU64, Ordering};

/// How many are tried where `XOFS_SEEDS` does not say it.
const SEEDS: u64 = 2500;
/// Threads; most of them wait for a pause between two looks at what a merge changed.
const THREADS: usize = 12;

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok().map(|text| text.parse().unwrap_or_else(|_| panic!("{name} must be a number: {text}")))
}

#[test]
fn random_repositories_read_as_flat_arrays_do() {
    if let Some(seed) = number("XOFS_SEED") {
        return world::run(world::Choices::of_seed(seed));
    }
    let (count, next) = (number("XOFS_SEEDS").unwrap_or(SEEDS), AtomicU64::new(0));
    let failed: Vec<u64> = std::thread::scope(|scope| {
        let work = || {
            let mut failed = Vec::new();
            loop {
                let seed = next.fetch_add(1, Ordering::Relaxed);
                if seed >= count || failed.len() == 5 {
                    return failed;
                }
                if catch_unwind(|| world::run(world::Choices::of_seed(seed))).is_err() {
                    eprintln!("seed {seed}: run it alone with XOFS_SEED={seed}");
                    failed.push(seed);
                }
            }
        };
        let threads: Vec<_> = (0..THREADS).map(|_| scope.spawn(work)).collect();
        threads.into_iter().flat_map(|thread| thread.join().unwrap()).collect()
    });
    assert!(failed.is_empty(), "seeds {failed:?}");
}
