//! A block as it is stored where nothing compresses it: a sector bitmap of ones, whichever sectors there are (Xen Orchestra never
//! looks at it), and its data. Who reads the data leaves room for the bitmap before it, so that nothing is copied.

use crate::error::FormatError;
use crate::geometry::BlockSize;

/// A sector bitmap of ones and the data of a block; zeroes stand for what the data is short of.
#[derive(Debug, PartialEq, Eq)]
pub struct WholeBlock {
    /// As many as a block is stored in.
    bytes: Vec<u8>,
    block_size: BlockSize,
    /// Bytes of the data that were given.
    given: usize,
}

impl WholeBlock {
    /// Takes memory whose first [`BlockSize::bitmap_bytes`] are of no meaning, and the rest data.
    ///
    /// # Errors
    /// `Damaged` if it has no room for a bitmap, or is longer than a block with its bitmap.
    pub fn of_memory(mut memory: Vec<u8>, block_size: BlockSize) -> Result<Self, FormatError> {
        let (head, full) = (block_size.bitmap_bytes(), block_size.full_bytes());
        if !(head..=full).contains(&memory.len()) {
            let found = memory.len();
            return Err(FormatError::damaged(format!("{found} bytes for a block, {head} to {full} were expected")));
        }
        let given = memory.len() - head;
        memory[..head].fill(0xff);
        memory.resize(full, 0);
        Ok(Self { bytes: memory, block_size, given })
    }

    /// Copies data.
    ///
    /// # Errors
    /// `Damaged` if it is longer than a block.
    pub fn copy_of(data: &[u8], block_size: BlockSize) -> Result<Self, FormatError> {
        let mut memory = Vec::with_capacity(block_size.full_bytes());
        memory.resize(block_size.bitmap_bytes(), 0);
        memory.extend_from_slice(data);
        Self::of_memory(memory, block_size)
    }

    /// Returns the data, as much as a block has.
    #[must_use]
    pub fn data(&self) -> &[u8] {
        &self.bytes[self.block_size.bitmap_bytes()..]
    }

    /// Returns the bitmap and the data.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Returns the size of its block.
    #[must_use]
    pub fn block_size(&self) -> BlockSize {
        self.block_size
    }

    /// Returns how many bytes of the data were given.
    #[must_use]
    pub fn given(&self) -> usize {
        self.given
    }

    /// Gives the memory back.
    #[must_use]
    pub fn into_memory(self) -> Vec<u8> {
        self.bytes
    }
}
