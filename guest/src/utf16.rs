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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lone_surrogates_have_bytes_of_their_own() {
        assert_eq!(to_bytes("aé€😀".encode_utf16()), "aé€😀".as_bytes());
        assert_eq!(to_bytes([0xd83d, 0x61]), b"\xed\xa0\xbda");
        assert_eq!(to_bytes([0x61, 0xdfff]), b"a\xed\xbf\xbf");
        assert_eq!(to_bytes([0xdc00, 0xd800]), b"\xed\xb0\x80\xed\xa0\x80");
    }
}
