//! The checksum of metadata in version 5: CRC-32C of a structure whose own checksum counts as zero.

use fs_ext4::checksum::linux_crc32c;

/// Sets the checksum, which stands at `at`.
pub(super) fn set(bytes: &mut [u8], at: usize) {
    let field = at..at + 4;
    bytes[field.clone()].fill(0);
    let checksum = !linux_crc32c(!0, bytes);
    bytes[field].copy_from_slice(&checksum.to_le_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_the_checksum_of_the_catalogues() {
        let mut bytes = *b"123456789\0\0\0\0";
        set(&mut bytes, 9);
        let expected = !linux_crc32c(linux_crc32c(!0, b"123456789"), &[0; 4]);
        assert_eq!(bytes[9..], expected.to_le_bytes());
        assert_eq!(!linux_crc32c(!0, b"123456789"), 0xe306_9283);
    }
}
