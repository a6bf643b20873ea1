//! Jobs that nobody looks after, by the built binary and a clock that the tests set: a week of nights in which things go wrong, and
//! four jobs at once in a night in which the clock is changed; and what keeps the daemon from running what is due, which is nothing.
//!
//! `XOFS_ROUNDS=100` makes more weeks, from `XOFS_SEED` on; `XOFS_SEED=17 XOFS_ROUNDS=1` is the one that a failure has printed. With
//! `XOFS_XO=1` Xen Orchestra's own code judges what a week leaves (`tests/interop/week.mjs`).

#[path = "../pool/mod.rs"]
mod pool;
#[allow(dead_code, reason = "each test file uses its part of the module")]
#[path = "../../vhd/tests/seeds/mod.rs"]
mod seeds;
#[path = "../support/mod.rs"]
mod support;

mod clock;
mod daemon;
mod four;
mod guests;
mod jobs;
mod judge;
mod night;
mod rest;
mod rules;
mod site;
mod trouble;
mod week;

use std::panic::catch_unwind;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;

/// How many weeks are at work at once: most of one is waiting.
const THREADS: usize = 2;

#[test]
fn a_week_of_nights_leaves_what_the_rules_say_whatever_goes_wrong() {
    let number = |name: &str| std::env::var(name).ok().map(|text| text.parse::<u64>().expect("a number"));
    let (first, rounds) = (number("XOFS_SEED").unwrap_or(0), number("XOFS_ROUNDS").unwrap_or(2));
    let (next, failed) = (AtomicU64::new(first), Mutex::new(Vec::new()));
    thread::scope(|scope| {
        for _ in 0..THREADS {
            scope.spawn(|| {
                while let Some(seed) = Some(next.fetch_add(1, Ordering::Relaxed)).filter(|seed| *seed < first + rounds)
                {
                    if catch_unwind(|| week::unfold(seed)).is_err() {
                        failed.lock().expect("nothing panics with it").push(seed);
                    }
                }
            });
        }
    });
    let failed = failed.into_inner().expect("nothing panics with it");
    assert!(failed.is_empty(), "XOFS_ROUNDS=1 with each XOFS_SEED of {failed:?}");
}
