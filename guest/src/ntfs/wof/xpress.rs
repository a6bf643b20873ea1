//! XPRESS with Huffman codes. Source: \[MS-XCA\] 2.2, "LZ77+Huffman Decompression Algorithm Details".

use super::bits::{Bits, Codes, copy};

/// Symbols: 256 bytes, and copies of 16 lengths from 16 orders of distances.
const SYMBOLS: usize = 512;

/// A length that goes on in bytes, and so does one of these bytes.
const LONG: usize = 15;
const LONGER: usize = 255;

/// Copies of fewer bytes there are none of.
const MIN_COPY: usize = 3;

/// Fills `output` with what `input` decodes to; none if it is not XPRESS.
pub(super) fn decode(input: &[u8], output: &mut [u8]) -> Option<()> {
    let (lengths, input) = input.split_at_checked(SYMBOLS / 2)?;
    let lengths: Vec<_> = lengths.iter().flat_map(|byte| [byte & 0x0f, byte >> 4]).collect();
    let codes = Codes::new(&lengths)?;
    let mut bits = Bits::new(input);
    let mut at = 0;
    while at < output.len() {
        let symbol = bits.symbol(&codes)?;
        if let Ok(byte) = u8::try_from(symbol) {
            output[at] = byte;
            at += 1;
            continue;
        }
        let order = u32::try_from(symbol / 16 % 16).ok()?;
        bits.ensure(16)?;
        let distance = (1 << order) + usize::try_from(bits.take(order)).ok()?;
        let mut len = symbol % 16;
        if len == LONG {
            let more = usize::from(*bits.bytes(1)?.first()?);
            len = match more {
                LONGER => {
                    let bytes = bits.bytes(2)?;
                    usize::from(u16::from_le_bytes(bytes.try_into().ok()?))
                }
                _ => LONG + more,
            };
        }
        copy(output, &mut at, distance, len + MIN_COPY)?;
    }
    Some(())
}
