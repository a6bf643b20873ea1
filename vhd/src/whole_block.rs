//! A block as it is stored where nothing compresses it: a sector bitmap of ones, whichever sectors there are (Xen Orchestra never
//! looks at it), and its data. Who reads the data leaves room for the bitmap before it, so that nothing is copied.

use std::fmt;

use crate::error::FormatError;
use crate::geometry::BlockSize;

/// The address of a block is a multiple of this: what is written past the page cache need not be copied then.
const GRAIN: usize = 4096;

/// Memory that the data of a block is read into.
pub struct BlockMemory {
    bytes: Vec<u8>,
    /// Where the bitmap begins.
    start: usize,
    block_size: BlockSize,
}

/// A sector bitmap of ones and the data of a block; zeroes stand for what the data is short of.
pub struct WholeBlock {
    memory: BlockMemory,
    /// Bytes of the data that were given.
    given: usize,
}

impl BlockMemory {
    /// Makes room for `len` bytes of data, at most those of a block, of any memory: best of what [`WholeBlock::into_memory`] gave.
    /// What they are is of no meaning.
    #[must_use]
    pub fn new(mut bytes: Vec<u8>, block_size: BlockSize, len: usize) -> Self {
        let all = GRAIN + block_size.full_bytes();
        bytes.reserve(all.saturating_sub(bytes.len()));
        let start = bytes.as_ptr().align_offset(GRAIN).min(GRAIN);
        let mut memory = Self { bytes, start, block_size };
        memory.resize(len);
        memory
    }

    /// Makes it `len` bytes of data, at most those of a block; those that are new are zero.
    pub fn resize(&mut self, len: usize) {
        self.bytes.resize(self.head() + len.min(self.block_size.len()), 0);
    }

    /// Returns the data.
    pub fn data(&mut self) -> &mut [u8] {
        let head = self.head();
        &mut self.bytes[head..]
    }

    /// Returns all memory, of which the data follows the first bytes, and how many those are. Its length must stay.
    pub fn with_head(&mut self) -> (&mut Vec<u8>, usize) {
        let head = self.head();
        (&mut self.bytes, head)
    }

    fn head(&self) -> usize {
        self.start + self.block_size.bitmap_bytes()
    }
}

impl WholeBlock {
    /// Takes data from where it was read to.
    #[must_use]
    pub fn new(mut memory: BlockMemory) -> Self {
        let (start, head, block_size) = (memory.start, memory.head(), memory.block_size);
        let given = memory.bytes.len().saturating_sub(head);
        memory.bytes.resize(start + block_size.full_bytes(), 0);
        memory.bytes[start..head].fill(0xff);
        Self { memory, given }
    }

    /// Copies data.
    ///
    /// # Errors
    /// `Damaged` if it is longer than a block.
    pub fn copy_of(data: &[u8], block_size: BlockSize) -> Result<Self, FormatError> {
        if data.len() > block_size.len() {
            let (found, most) = (data.len(), block_size.len());
            return Err(FormatError::damaged(format!("{found} bytes for a block, at most {most} were expected")));
        }
        let mut memory = BlockMemory::new(Vec::new(), block_size, data.len());
        memory.data().copy_from_slice(data);
        Ok(Self::new(memory))
    }

    /// Returns the data, as much as a block has.
    #[must_use]
    pub fn data(&self) -> &[u8] {
        &self.memory.bytes[self.memory.head()..]
    }

    /// Returns the bitmap and the data.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        &self.memory.bytes[self.memory.start..]
    }

    /// Returns the size of its block.
    #[must_use]
    pub fn block_size(&self) -> BlockSize {
        self.memory.block_size
    }

    /// Returns how many bytes of the data were given.
    #[must_use]
    pub fn given(&self) -> usize {
        self.given
    }

    /// Gives the memory back.
    #[must_use]
    pub fn into_memory(self) -> Vec<u8> {
        self.memory.bytes
    }
}

impl fmt::Debug for WholeBlock {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("WholeBlock").field("given", &self.given).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_that_is_used_again_holds_what_is_read_then_and_zeroes_behind_it() {
        let block_size = BlockSize::new(4096).unwrap();
        let mut spare = vec![7; 100];
        for (len, byte) in [(4096, 1), (5, 2), (4096, 3), (0, 4), (900, 5)] {
            let mut memory = BlockMemory::new(spare, block_size, 4096);
            memory.data().fill(0xee);
            memory.resize(len);
            memory.data().fill(byte);
            let block = WholeBlock::new(memory);
            let mut expected = vec![0; 4096];
            expected[..len].fill(byte);
            assert_eq!((block.data(), block.given(), block.block_size()), (expected.as_slice(), len, block_size));
            assert_eq!(block.bytes(), [vec![0xff; 512], expected].concat());
            assert_eq!(block.bytes().as_ptr().align_offset(GRAIN), 0);
            spare = block.into_memory();
        }
        assert!(WholeBlock::copy_of(&[0; 4097], block_size).is_err());
    }
}
