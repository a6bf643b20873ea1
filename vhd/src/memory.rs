//! Memory of blocks.

use std::ops::{Deref, DerefMut};

use memmap2::MmapMut;

/// From so many bytes on memory is mapped: then it goes back to the system once it is free. In the heaps of the allocator,
/// one for each of up to sixteen threads, blocks that stay would lie among what lives for a moment, and keep it from going.
const MAPPED: usize = 256 << 10;

/// The bytes of a block.
#[derive(Debug)]
pub(crate) enum Memory {
    /// Of the allocator.
    Heap(Box<[u8]>),
    /// Of the system.
    Mapped(MmapMut),
}

impl Memory {
    /// Returns `len` zero bytes.
    pub(crate) fn new(len: usize) -> Self {
        // Where the system has no mapping left the allocator may have room.
        let mapped = (len >= MAPPED).then(|| MmapMut::map_anon(len)).and_then(Result::ok);
        mapped.map_or_else(|| Self::Heap(vec![0; len].into()), Self::Mapped)
    }
}

impl Deref for Memory {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match self {
            Self::Heap(bytes) => bytes,
            Self::Mapped(bytes) => bytes,
        }
    }
}

impl DerefMut for Memory {
    fn deref_mut(&mut self) -> &mut [u8] {
        match self {
            Self::Heap(bytes) => bytes,
            Self::Mapped(bytes) => bytes,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn large_memory_is_mapped_and_all_of_it_is_zero_and_can_be_written() {
        for (len, is_mapped) in [(0, false), (1, false), (MAPPED - 1, false), (MAPPED, true), ((2 << 20) + 512, true)] {
            let mut memory = Memory::new(len);
            assert_eq!(matches!(memory, Memory::Mapped(_)), is_mapped, "{len}");
            assert!(memory.len() == len && memory.iter().all(|byte| *byte == 0), "{len}");
            memory.fill(7);
            assert!(memory.iter().all(|byte| *byte == 7), "{len}");
        }
    }
}
