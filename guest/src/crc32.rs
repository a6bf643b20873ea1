//! The checksum of GPT and LVM: CRC-32 with the reflected polynomial 0xedb88320.

const TABLE: [u32; 256] = {
    let mut table = [0; 256];
    let mut index = 0_u32;
    while index < 256 {
        let (mut value, mut bit) = (index, 0);
        while bit < 8 {
            value = (value >> 1) ^ if value & 1 == 1 { 0xedb8_8320 } else { 0 };
            bit += 1;
        }
        table[index as usize] = value;
        index += 1;
    }
    table
};

/// Returns the state after `bytes`, of which the one before was `state`: LVM's checksum, which starts at a number of its own.
pub(crate) fn update(state: u32, bytes: &[u8]) -> u32 {
    bytes.iter().fold(state, |state, byte| TABLE[usize::from(state.to_le_bytes()[0] ^ byte)] ^ (state >> 8))
}

/// Returns the usual CRC-32, which starts at all ones and ends inverted.
pub(crate) fn crc32(bytes: &[u8]) -> u32 {
    !update(u32::MAX, bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_the_checksum_of_the_catalogues() {
        assert_eq!(crc32(b"123456789"), 0xcbf4_3926);
        assert_eq!(crc32(b""), 0);
        assert_eq!(update(update(7, b"1234"), b"56789"), update(7, b"123456789"));
    }
}
