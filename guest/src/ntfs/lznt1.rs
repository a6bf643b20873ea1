//! LZNT1, in which NTFS compresses: pieces of 4 KiB, each of bytes and of copies of what came before in the piece.
//!
//! ```text
//! piece  ─ 16 bits: length - 1 (12), 3 (3), whether it is compressed (1) ┬ 4 KiB as they are
//!                                                                        └ groups; all zeroes end it
//! group  ─ 8 bits ─ for each, from the lowest ┬ 0: a byte
//!                                             └ 1: 16 bits: how far back - 1, length - 3; the further in the piece,
//!                                                  the more of them say how far: 4 to 12
//! ```
//!
//! Source: \[MS-XCA\] 2.5, "LZNT1 Algorithm Details".

use crate::{Error, Fields, Result};

/// Bytes of a piece.
const PIECE: usize = 4096;

/// Fills `output`, which is zeroes, with what `input` decodes to: what it says nothing of stays as it is.
///
/// # Errors
/// [`Damaged`](crate::ErrorKind::Damaged) if it is none of LZNT1.
pub(super) fn decode(input: &[u8], output: &mut [u8]) -> Result<()> {
    let mut input = input;
    for piece in output.chunks_mut(PIECE) {
        let Some(head) = Fields(input).le16(0).filter(|head| *head != 0) else { return Ok(()) };
        let len = usize::from(head & 0x0fff) + 1;
        let Some(bytes) = input.get(2..2 + len).filter(|_| head & 0x7000 == 0x3000) else {
            return Err(Error::damaged("what is compressed starts with no length that it can have"));
        };
        input = &input[2 + len..];
        if head & 0x8000 == 0 {
            let len = bytes.len().min(piece.len());
            piece[..len].copy_from_slice(&bytes[..len]);
        } else {
            decode_piece(bytes, piece)?;
        }
    }
    Ok(())
}

fn decode_piece(input: &[u8], output: &mut [u8]) -> Result<()> {
    let (mut from, mut at) = (0, 0);
    while from < input.len() {
        let kinds = input[from];
        from += 1;
        for bit in 0..8 {
            if from >= input.len() || at >= output.len() {
                break;
            }
            if kinds >> bit & 1 == 0 {
                output[at] = input[from];
                (from, at) = (from + 1, at + 1);
                continue;
            }
            let copy = Fields(input).le16(from).ok_or_else(|| Error::damaged("what is compressed ends too early"))?;
            from += 2;
            // As many bits as it takes to reach back to the start of the piece, but 4 at least.
            let distance_bits = usize::BITS - at.saturating_sub(1).max(8).leading_zeros();
            let len_bits = 16 - distance_bits;
            let distance = usize::from(copy >> len_bits) + 1;
            let len = usize::from(copy & ((1 << len_bits) - 1)) + 3;
            if distance > at {
                return Err(Error::damaged("what is compressed leads to what is before it"));
            }
            for _ in 0..len.min(output.len() - at) {
                output[at] = output[at - distance];
                at += 1;
            }
        }
        if at >= output.len() {
            break;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn decoded(input: &[u8], len: usize) -> Result<Vec<u8>> {
        let mut output = vec![0; len];
        decode(input, &mut output)?;
        Ok(output)
    }

    #[test]
    fn bytes_copies_and_whole_pieces_are_decoded() {
        // The example of [MS-XCA] 3.3.
        let example = [
            0x38, 0xb0, 0x88, 0x46, 0x23, 0x20, 0x00, 0x20, 0x47, 0x20, 0x41, 0x00, 0x10, 0xa2, 0x47, 0x01, 0xa0, 0x45,
            0x20, 0x44, 0x00, 0x08, 0x45, 0x01, 0x50, 0x79, 0x00, 0xc0, 0x45, 0x20, 0x05, 0x24, 0x13, 0x88, 0x05, 0xb4,
            0x02, 0x4a, 0x44, 0xef, 0x03, 0x58, 0x02, 0x8c, 0x09, 0x16, 0x01, 0x48, 0x45, 0x00, 0xbe, 0x00, 0x9e, 0x00,
            0x04, 0x01, 0x18, 0x90, 0x00,
        ];
        let text = "F# F# G A A G F# E D D E F# F# E E F# F# G A A G F# E D D E F# E D D E E F# D E F# G F# D E F# G F# E D \
                    E A F# F# G A A G F# E D D E F# E D D\0";
        let text = text.as_bytes();
        assert_eq!(decoded(&example, 256).map(|found| found[..text.len()].to_vec()), Ok(text.to_vec()));
        // One byte again and again, as far as a copy reaches; then a piece as it is.
        let mut input = vec![0x03, 0xb0, 0x02, 7, 0xfc, 0x0f];
        input.extend([0xff, 0x3f]);
        input.extend([9; PIECE]);
        assert_eq!(
            decoded(&input, 2 * PIECE + 5),
            Ok([[7; PIECE], [9; PIECE]].concat().into_iter().chain([0; 5]).collect())
        );
    }

    #[test]
    fn what_is_no_lznt1_is_damage() {
        let cases: [&[u8]; 4] =
            [&[0x10, 0xb0, 1], &[0x00, 0x80, 0], &[0x02, 0xb0, 0x01, 0, 0x10], &[0x01, 0xb0, 0x01, 7]];
        for input in cases {
            decoded(input, 100).expect_err("no LZNT1");
        }
        assert_eq!(decoded(&[], 3), Ok(vec![0; 3]));
    }
}
