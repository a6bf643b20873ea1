//! The identity of a block: the SHA-256 of its payload, without the sector bitmap. Xen Orchestra's block store to come names
//! blocks so, too.

use std::fmt;
use std::sync::OnceLock;

use aws_lc_rs::digest::{Context, SHA256, SHA256_OUTPUT_LEN};

use crate::geometry::BlockSize;

/// The length of a digest in bytes.
pub(crate) const DIGEST_BYTES: usize = SHA256_OUTPUT_LEN;

/// Zeroes, to be hashed in pieces.
static ZEROES: [u8; 64 << 10] = [0; 64 << 10];

/// The SHA-256 of the payload of a block, all of it: what lies past the end of the disk counts, too.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Digest(pub(crate) [u8; DIGEST_BYTES]);

impl Digest {
    /// Hashes the payload of a block, whose end may be left out if it is zero.
    #[must_use]
    pub fn of(data: &[u8], block_size: BlockSize) -> Self {
        let mut context = Context::new(&SHA256);
        context.update(data);
        let mut left = block_size.len().saturating_sub(data.len());
        while left > 0 {
            let len = left.min(ZEROES.len());
            context.update(&ZEROES[..len]);
            left -= len;
        }
        Self::finished(context)
    }

    /// Returns the digest of a block of zeroes.
    #[must_use]
    pub fn of_zeroes(block_size: BlockSize) -> Self {
        static USUAL: OnceLock<Digest> = OnceLock::new();
        if block_size == BlockSize::DEFAULT {
            return *USUAL.get_or_init(|| Self::of(&[], block_size));
        }
        Self::of(&[], block_size)
    }

    /// Hashes any bytes.
    pub(crate) fn of_bytes(bytes: &[u8]) -> Self {
        let mut context = Context::new(&SHA256);
        context.update(bytes);
        Self::finished(context)
    }

    /// Returns its bytes.
    #[must_use]
    pub fn bytes(&self) -> &[u8; DIGEST_BYTES] {
        &self.0
    }

    fn finished(context: Context) -> Self {
        let digest = context.finish();
        Self(digest.as_ref().try_into().expect("SHA-256 has 32 bytes"))
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_digest_is_the_sha_256_of_the_whole_payload() {
        // printf abc | sha256sum
        let known = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
        assert_eq!(format!("{:?}", Digest::of_bytes(b"abc")), known);
        // head -c 2097152 /dev/zero | sha256sum
        let zeroes = "5647f05ec18958947d32874eeb788fa396a05d0bab7c1b71f112ceb7e9b31eee";
        assert_eq!(format!("{:?}", Digest::of_zeroes(BlockSize::DEFAULT)), zeroes);
        let block_size = BlockSize::new(128 << 10).unwrap();
        let mut block = vec![7; 70_001];
        let digest = Digest::of(&block, block_size);
        block.resize(block_size.len(), 0);
        assert_eq!((Digest::of(&block, block_size), Digest::of_bytes(&block)), (digest, digest));
        assert_ne!(Digest::of(&block[1..], block_size), digest);
    }
}
