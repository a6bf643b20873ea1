//! What a disk holds, as digests of its blocks: known while it is sent, found again when it is read back.
//!
//! Blocks of zeroes have none, so that a large empty disk costs nothing. The digest of a whole disk is the SHA-256 of, for each
//! block of 2 MiB that is not all zero, ascending, its number (8 bytes, big-endian) and the SHA-256 of its bytes, filled up with
//! zeroes past the end of the disk.

use vhd::{BlockIndex, BlockSize, Digest};

/// The digests of the blocks of a disk that are not all zero, ascending.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Digests(Vec<(BlockIndex, Digest)>);

impl Digests {
    /// Adds a block, which comes after all that were added; returns its digest. What is missing of it is zero.
    pub fn add(&mut self, block: BlockIndex, bytes: &[u8]) -> Digest {
        let digest = Digest::of(bytes, BlockSize::DEFAULT);
        if digest != Digest::of_zeroes(BlockSize::DEFAULT) {
            self.0.push((block, digest));
        }
        digest
    }

    /// Returns the digest of all, in hexadecimal.
    #[must_use]
    pub fn sum(&self) -> String {
        let entries = self
            .0
            .iter()
            .flat_map(|(block, digest)| u64::from(block.0).to_be_bytes().into_iter().chain(*digest.bytes()));
        storage::sha256(&entries.collect::<Vec<u8>>())
    }

    /// Returns the first block that is not the same in both.
    #[must_use]
    pub fn first_difference(&self, other: &Self) -> Option<BlockIndex> {
        let differing = self.0.iter().zip(&other.0).find(|(ours, theirs)| ours != theirs);
        let shorter = self.0.len().min(other.0.len());
        let rest = || self.0.get(shorter).or_else(|| other.0.get(shorter)).map(|(block, _)| *block);
        differing.map(|((ours, _), (theirs, _))| *ours.min(theirs)).or_else(rest)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(blocks: &[(u32, u8)]) -> Digests {
        let mut digests = Digests::default();
        for (block, byte) in blocks {
            digests.add(BlockIndex(*block), &[*byte; 4096]);
        }
        digests
    }

    #[test]
    fn zeroes_do_not_count_and_the_first_block_that_differs_is_named() {
        assert_eq!(of(&[(0, 1), (1, 0), (2, 2)]), of(&[(0, 1), (2, 2)]));
        assert_eq!(of(&[(0, 1), (2, 2)]).first_difference(&of(&[(0, 1), (2, 2)])), None);
        for (one, other, expected) in [
            (vec![(0, 1), (2, 2)], vec![(0, 1), (2, 3)], 2),
            (vec![(0, 1), (2, 2)], vec![(0, 1), (1, 3), (2, 2)], 1),
            (vec![(0, 1), (2, 2)], vec![(0, 1)], 2),
            (vec![], vec![(5, 1)], 5),
        ] {
            assert_eq!(of(&one).first_difference(&of(&other)), Some(BlockIndex(expected)));
            assert_eq!(of(&other).first_difference(&of(&one)), Some(BlockIndex(expected)));
        }
        // printf '' | sha256sum
        assert_eq!(of(&[(7, 0)]).sum(), "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855");
        assert_ne!(of(&[(0, 1)]).sum(), of(&[(1, 1)]).sum());
    }
}
