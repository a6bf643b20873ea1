//! Compares what this crate reads of a filesystem with what the kernel shows of it: every field, every byte.
//!
//! Making images needs root, loop devices, and the kernel's own driver.

#![allow(dead_code, reason = "every test binary uses a part of this")]

pub mod churn;
pub mod fat;
pub mod generator;
pub mod hostile;
pub mod image;
pub mod journal;
pub mod machine;
pub mod subject;
pub mod tree;

/// Random numbers of a seed (xorshift).
pub struct Random(u64);

impl Random {
    /// Starts anew from a seed.
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    /// Returns a seed from the environment (`XOFS_SEED`) or the clock, and prints it.
    pub fn seed() -> u64 {
        let given = std::env::var("XOFS_SEED").ok().and_then(|text| text.parse().ok());
        let seed = given.unwrap_or_else(|| {
            let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).expect("after 1970");
            u64::from(now.subsec_nanos())
        });
        println!("XOFS_SEED={seed}");
        seed
    }

    /// Returns a number below `bound`.
    pub fn below(&mut self, bound: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) % bound
    }

    /// Returns bytes that do not repeat.
    pub fn bytes(&mut self, len: usize) -> Vec<u8> {
        std::iter::repeat_with(|| u8::try_from(self.below(256)).expect("a byte")).take(len).collect()
    }
}

/// Returns how many times to do what there is a short and a long form of (`XOFS_ROUNDS`).
pub fn rounds(short: u64) -> u64 {
    std::env::var("XOFS_ROUNDS").ok().and_then(|text| text.parse().ok()).unwrap_or(short)
}
