//! Numbers in untrusted bytes: whatever lies outside of them is `None`, never a panic.

/// Bytes with numbers at offsets.
#[derive(Debug, Clone, Copy)]
pub struct Fields<'a>(pub &'a [u8]);

impl<'a> Fields<'a> {
    /// Returns `len` bytes at `offset`.
    #[must_use]
    pub fn bytes(self, offset: usize, len: usize) -> Option<&'a [u8]> {
        self.0.get(offset..offset.checked_add(len)?)
    }

    /// Returns `N` bytes at `offset`.
    #[must_use]
    pub fn array<const N: usize>(self, offset: usize) -> Option<[u8; N]> {
        self.bytes(offset, N)?.try_into().ok()
    }

    /// Returns the byte at `offset`.
    #[must_use]
    pub fn u8(self, offset: usize) -> Option<u8> {
        self.0.get(offset).copied()
    }

    /// Returns the little-endian number of 16 bits at `offset`.
    #[must_use]
    pub fn le16(self, offset: usize) -> Option<u16> {
        self.array(offset).map(u16::from_le_bytes)
    }

    /// Returns the little-endian number of 32 bits at `offset`.
    #[must_use]
    pub fn le32(self, offset: usize) -> Option<u32> {
        self.array(offset).map(u32::from_le_bytes)
    }

    /// Returns the little-endian number of 64 bits at `offset`.
    #[must_use]
    pub fn le64(self, offset: usize) -> Option<u64> {
        self.array(offset).map(u64::from_le_bytes)
    }

    /// Returns the big-endian number of 16 bits at `offset`.
    #[must_use]
    pub fn be16(self, offset: usize) -> Option<u16> {
        self.array(offset).map(u16::from_be_bytes)
    }

    /// Returns the big-endian number of 32 bits at `offset`.
    #[must_use]
    pub fn be32(self, offset: usize) -> Option<u32> {
        self.array(offset).map(u32::from_be_bytes)
    }

    /// Returns the big-endian number of 64 bits at `offset`.
    #[must_use]
    pub fn be64(self, offset: usize) -> Option<u64> {
        self.array(offset).map(u64::from_be_bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_does_not_lie_within_is_none_at_any_offset() {
        let fields = Fields(&[1, 2, 3, 4, 5, 6, 7, 8, 9]);
        assert_eq!((fields.le16(7), fields.be16(7)), (Some(0x0908), Some(0x0809)));
        assert_eq!((fields.le32(5), fields.be32(5)), (Some(0x0908_0706), Some(0x0607_0809)));
        assert_eq!((fields.le64(1), fields.be64(1)), (Some(0x0908_0706_0504_0302), Some(0x0203_0405_0607_0809)));
        assert_eq!((fields.u8(8), fields.u8(9)), (Some(9), None));
        for offset in [2, 9, usize::MAX - 3, usize::MAX] {
            assert_eq!((fields.le64(offset), fields.be64(offset)), (None, None), "{offset}");
        }
        assert_eq!(fields.bytes(1, usize::MAX), None);
    }
}
