//! Backups and restores by the built binary of a simulated pool in which one thing goes wrong, at any moment, or that are killed: a
//! run succeeds or says what failed, every backup that is listed reads right, the base is never lost, nothing half made can be
//! started, and the next run is an increment, or restores all, and leaves nothing over in the pool or in a repository.
//!
//! Each round has a kind of trouble, by its seed. A round whose trouble came too late says nothing, so each kind is tried until it
//! has struck. `XOFS_ROUNDS=300` makes more rounds, `XOFS_SEED=17 XOFS_ROUNDS=1` is the one that a failure has printed.

#[path = "../pool/mod.rs"]
mod pool;
#[allow(dead_code, reason = "each test file uses its part of the module")]
#[path = "../../vhd/tests/seeds/mod.rs"]
mod seeds;
#[path = "../support/mod.rs"]
mod support;

mod backup;
mod lab;
mod restore;
mod trouble;

use std::collections::BTreeMap;
use std::panic::catch_unwind;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;

use trouble::Kind;

/// How many rounds are at work at once: most of a round is waiting.
const THREADS: usize = 2;
/// How many rounds more a kind gets that did not strike.
const MORE: u64 = 10;

/// What is known of a batch: rounds and how many of them struck, by kind; seeds that failed.
#[derive(Default)]
struct Known {
    kinds: BTreeMap<Kind, (u64, u64)>,
    failed: Vec<u64>,
}

/// Makes one round of each kind, or as many as `XOFS_ROUNDS` says, from `XOFS_SEED` on; the kind of a seed is always the same.
fn batch(kinds: &[Kind], round: fn(u64, Kind) -> bool) {
    let number = |name: &str| std::env::var(name).ok().map(|text| text.parse::<u64>().expect("a number"));
    let count = kinds.len() as u64;
    let (first, rounds) = (number("XOFS_SEED").unwrap_or(0), number("XOFS_ROUNDS").unwrap_or(count));
    let kind_of = |seed: u64| kinds[usize::try_from(seed % count).expect("small")];
    let known = Mutex::new(Known::default());
    let make = |seed: u64| {
        let struck = catch_unwind(|| round(seed, kind_of(seed)));
        let mut known = known.lock().expect("nothing panics with it");
        let entry = known.kinds.entry(kind_of(seed)).or_default();
        *entry = (entry.0 + 1, entry.1 + u64::from(*struck.as_ref().unwrap_or(&false)));
        if struck.is_err() {
            known.failed.push(seed);
        }
    };
    let next = AtomicU64::new(first);
    thread::scope(|scope| {
        for _ in 0..THREADS {
            scope.spawn(|| {
                while let Some(seed) = Some(next.fetch_add(1, Ordering::Relaxed)).filter(|seed| *seed < first + rounds)
                {
                    make(seed);
                }
            });
        }
    });
    // A single round is there to be looked at.
    if rounds >= count {
        for seed in (0..count).map(|place| first + rounds + place) {
            let has_struck =
                || known.lock().expect("nothing panics with it").kinds.get(&kind_of(seed)).is_some_and(|of| of.1 > 0);
            (0..MORE).map(|more| seed + more * count).take_while(|_| !has_struck()).for_each(make);
        }
    }
    let known = known.into_inner().expect("nothing panics with it");
    println!("rounds, and how many struck: {:?}", known.kinds);
    assert!(known.failed.is_empty(), "XOFS_ROUNDS=1 with each XOFS_SEED of {:?}", known.failed);
    let missed: Vec<_> = known.kinds.iter().filter(|(_, (_, struck))| *struck == 0).map(|(kind, _)| kind).collect();
    assert!(rounds < count || missed.is_empty(), "never struck: {missed:?}");
}

#[test]
fn backups_that_something_goes_wrong_with_fail_clean_and_the_next_one_is_an_increment_that_leaves_nothing_over() {
    batch(&Kind::OF_BACKUPS, backup::round);
}

#[test]
fn restores_that_something_goes_wrong_with_leave_nothing_half_made_and_the_next_one_brings_all_back() {
    batch(&Kind::OF_RESTORES, restore::round);
}
