//! What Xen Orchestra writes beside a file to know its bytes by: `$1$$`, and their MD5 in hexadecimal.
//!
//! It shows damage, and no more: MD5 keeps nobody from making other bytes of the same sum.
//!
//! Source: XO, `@xen-orchestra/fs/src/checksum.js`.

use std::fmt;

use md5::{Digest, Md5};

/// What the sum of an MD5 begins with, as in `crypt(3)`.
const PREFIX: &str = "$1$$";
/// The sum of a file's bytes, as it stands in the file of the same name with `.checksum` behind it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Checksum([u8; 16]);

impl Checksum {
    /// Reads one; `None` if it is none, or of another algorithm.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        let digits = text.trim_end().strip_prefix(PREFIX).filter(|digits| digits.len() == 32 && digits.is_ascii())?;
        let mut sum = [0; 16];
        for (byte, pair) in sum.iter_mut().zip((0..32).step_by(2)) {
            *byte = u8::from_str_radix(&digits[pair..pair + 2], 16).ok()?;
        }
        Some(Self(sum))
    }
}

impl fmt::Display for Checksum {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(PREFIX)?;
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

/// Makes a [`Checksum`] of bytes that come in pieces.
#[derive(Default)]
pub struct Summing(Md5);

impl Summing {
    /// Adds the bytes that come next.
    pub fn add(&mut self, bytes: &[u8]) {
        self.0.update(bytes);
    }

    /// Returns the sum of all bytes.
    #[must_use]
    pub fn finish(self) -> Checksum {
        Checksum(self.0.finalize().into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sum(pieces: &[&[u8]]) -> String {
        let mut summing = Summing::default();
        pieces.iter().for_each(|piece| summing.add(piece));
        summing.finish().to_string()
    }

    #[test]
    fn a_checksum_is_the_md5_however_the_bytes_come() {
        let digits = b"12345678901234567890123456789012345678901234567890123456789012345678901234567890";
        for (bytes, expected) in [
            (&b""[..], "d41d8cd98f00b204e9800998ecf8427e"),
            (b"a", "0cc175b9c0f1b6a831c399e269772661"),
            (b"abc", "900150983cd24fb0d6963f7d28e17f72"),
            (b"message digest", "f96b697d7cb7938d525a2f31aaf161d0"),
            (b"abcdefghijklmnopqrstuvwxyz", "c3fcd3d76192e4007dfb496cca67e13b"),
            (digits, "57edf4a22be3c955ac49da2e2107b67a"),
        ] {
            let expected = format!("$1$${expected}");
            assert_eq!(sum(&[bytes]), expected);
            for at in 0..bytes.len() {
                assert_eq!(sum(&[&bytes[..at], &bytes[at..]]), expected, "in two pieces, the first of {at} bytes");
            }
        }
    }

    #[test]
    fn a_checksum_is_read_as_it_is_written_and_nothing_else_is() {
        let text = "$1$$5c4942ee5968483451a55e2dbd6dc648";
        assert_eq!(Checksum::parse(text).unwrap().to_string(), text);
        assert_eq!(Checksum::parse(&format!("{text}\n")), Checksum::parse(text));
        for other in ["", "$1$$", "$1$$0", &text.replace("$1", "$5"), &text.replace('e', "g"), "$1$$éééééééééééééééé"]
        {
            assert_eq!(Checksum::parse(other), None, "{other}");
        }
    }
}
