//! Names that stand on a volume in UTF-16, in bytes as they are shown.

/// Returns UTF-8 for UTF-16, and for a surrogate that stands alone the three bytes that UTF-8 would have for it (WTF-8): names
/// that differ stay different.
pub(crate) fn to_bytes(units: impl IntoIterator<Item = u16>) -> Vec<u8> {
    let mut bytes = Vec::new();
    for decoded in char::decode_utf16(units) {
        match decoded {
            Ok(character) => bytes.extend(character.encode_utf8(&mut [0; 4]).bytes()),
            Err(lone) => {
                let [high, low] = lone.unpaired_surrogate().to_be_bytes();
                bytes.extend([0xe0 | high >> 4, 0x80 | (high & 0xf) << 2 | low >> 6, 0x80 | low & 0x3f]);
            }
        }
    }
    bytes
}

/// Returns the units in bytes of a volume; an odd last byte is none.
pub(crate) fn units(bytes: &[u8]) -> impl Iterator<Item = u16> {
    bytes.chunks_exact(2).map(|unit| u16::from_le_bytes([unit[0], unit[1]]))
}

/// Returns the units in bytes of a volume that has them big-endian; an odd last byte is none.
pub(crate) fn big_endian(bytes: &[u8]) -> impl Iterator<Item = u16> {
    bytes.chunks_exact(2).map(|unit| u16::from_be_bytes([unit[0], unit[1]]))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_name_is_its_utf8_and_lone_surrogates_stay_apart() {
        let cases: [(&[u16], &[u8]); 5] = [
            (&[0x41, 0xe9, 0x20ac], "A\u{e9}\u{20ac}".as_bytes()),
            (&[0xd83d, 0xde00], "\u{1f600}".as_bytes()),
            (&[0xd83d], b"\xed\xa0\xbd"),
            (&[0xde00, 0xd83d, 0x41], b"\xed\xb8\x80\xed\xa0\xbdA"),
            (&[], b""),
        ];
        for (given, expected) in cases {
            assert_eq!(to_bytes(given.iter().copied()), expected, "{given:x?}");
        }
        assert_eq!(units(&[0x41, 0, 0xac, 0x20, 7]).collect::<Vec<_>>(), [0x41, 0x20ac]);
        assert_eq!(big_endian(&[0, 0x41, 0x20, 0xac, 7]).collect::<Vec<_>>(), [0x41, 0x20ac]);
    }

    #[test]
    fn lone_surrogates_have_bytes_of_their_own() {
        assert_eq!(to_bytes("aé€😀".encode_utf16()), "aé€😀".as_bytes());
        assert_eq!(to_bytes([0xd83d, 0x61]), b"\xed\xa0\xbda");
        assert_eq!(to_bytes([0x61, 0xdfff]), b"a\xed\xbf\xbf");
        assert_eq!(to_bytes([0xdc00, 0xd800]), b"\xed\xb0\x80\xed\xa0\x80");
    }
}
