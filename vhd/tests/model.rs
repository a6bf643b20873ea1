//! Thousands of random repositories against flat arrays; the seed of one that is not read right is printed.
//!
//! `XOFS_SEEDS=100000` runs more of them, `XOFS_SEED=17` that one alone.

#[allow(dead_code, reason = "each test file uses its part of the module")]
mod builder;
#[allow(dead_code, reason = "each test file uses its part of the module")]
mod seeds;
#[allow(dead_code, reason = "a fuzzer uses the rest")]
mod world;

/// How many are tried where `XOFS_SEEDS` does not say it.
const SEEDS: u64 = 2500;
/// Threads; most of them wait for a pause between two looks at what a merge changed.
const THREADS: usize = 12;

#[test]
fn random_repositories_read_as_flat_arrays_do() {
    seeds::each(SEEDS, THREADS, |seed| world::run(world::Choices::of_seed(seed)));
}
