//! Randomness: seeded, for what must be the same at each run, and fresh, for what must never be the same twice.

use rustls::crypto::aws_lc_rs;
use uuid::{Builder, Uuid};

/// A generator of numbers that are the same for the same seed (SplitMix64); no use against an adversary.
#[derive(Debug, Clone)]
pub struct Random(u64);

impl Random {
    /// Starts at a seed.
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// Returns the next number.
    pub fn number(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        mixed ^ (mixed >> 31)
    }

    /// Returns a number below `end`; 0 if `end` is 0.
    pub fn below(&mut self, end: u64) -> u64 {
        self.number().checked_rem(end).unwrap_or(0)
    }

    /// Fills a buffer with bytes that no compression makes smaller.
    pub fn fill(&mut self, buffer: &mut [u8]) {
        for piece in buffer.chunks_mut(8) {
            piece.copy_from_slice(&self.number().to_le_bytes()[..piece.len()]);
        }
    }
}

/// Returns a uuid that nobody had before.
///
/// # Panics
/// If the system gives no random numbers.
pub fn fresh_uuid() -> Uuid {
    let mut bytes = [0; 16];
    aws_lc_rs::default_provider().secure_random.fill(&mut bytes).expect("the system gives random numbers");
    Builder::from_random_bytes(bytes).into_uuid()
}
