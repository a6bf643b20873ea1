//! LZX as images of Windows have it: each chunk on its own, with a window of 32 KiB.
//!
//! ```text
//! block ─ kind (3 bits), length ┬ verbatim ─ lengths of codes ─ symbols: bytes, and copies of a length and distance
//!                               ├ aligned  ─ the same, and codes for the lowest 3 bits of far distances
//!                               └ as it is
//! ```
//!
//! At last, what looks like a call in a program of x86 gets its relative address back.
//! Source: \[MS-PATCH\] 2, "LZX DELTA", but for the differences of these images, which wimlib documents.

use super::bits::{Bits, Codes, copy};

/// Bytes that are symbols of the main codes; copies are the others: 8 lengths from each slot of distances.
const BYTES: usize = 256;
const SLOTS: usize = 30;
const MAIN: usize = BYTES + 8 * SLOTS;

/// Lengths that have codes of their own.
const LENGTHS: usize = 249;

/// Copies of fewer bytes there are none of, and from this length header on the length has a code of its own.
const MIN_COPY: usize = 2;
const LONG: usize = 7;

/// Bytes of a block of which the length is not said.
const DEFAULT_BLOCK: usize = 32 << 10;

/// What a program is taken to be long where addresses are relative (bytes).
const PROGRAM: i32 = 12_000_000;

/// Fills `output` with what `input` decodes to; none if it is not LZX.
pub(super) fn decode(input: &[u8], output: &mut [u8]) -> Option<()> {
    let mut decoder = Decoder { bits: Bits::new(input), main: [0; MAIN], lengths: [0; LENGTHS], recent: [1; 3] };
    let mut at = 0;
    while at < output.len() {
        let kind = decoder.bits.read(3)?;
        let len = match decoder.bits.read(1)? {
            1 => DEFAULT_BLOCK,
            _ => usize::try_from(decoder.bits.read(16)?).ok()?,
        };
        let end = at.checked_add(len).filter(|end| len > 0 && *end <= output.len())?;
        match kind {
            1 => decoder.block(&mut output[..end], &mut at, false)?,
            2 => decoder.block(&mut output[..end], &mut at, true)?,
            3 => decoder.plain(&mut output[..end], &mut at)?,
            _ => return None,
        }
    }
    restore_calls(output);
    Some(())
}

struct Decoder<'a> {
    bits: Bits<'a>,
    /// Lengths of codes, which the next block says by their differences.
    main: [u8; MAIN],
    lengths: [u8; LENGTHS],
    /// The distances of the last copies, the latest first.
    recent: [usize; 3],
}

impl Decoder<'_> {
    fn block(&mut self, output: &mut [u8], at: &mut usize, is_aligned: bool) -> Option<()> {
        let aligned = if is_aligned {
            let mut lengths = [0; 8];
            for length in &mut lengths {
                *length = u8::try_from(self.bits.read(3)?).ok()?;
            }
            Some(Codes::new(&lengths)?)
        } else {
            None
        };
        let (bytes, copies) = self.main.split_at_mut(BYTES);
        read_lengths(&mut self.bits, bytes)?;
        read_lengths(&mut self.bits, copies)?;
        read_lengths(&mut self.bits, &mut self.lengths)?;
        let (main, lengths) = (Codes::new(&self.main)?, Codes::new(&self.lengths)?);
        while *at < output.len() {
            let symbol = self.bits.symbol(&main)?;
            if let Ok(byte) = u8::try_from(symbol) {
                output[*at] = byte;
                *at += 1;
                continue;
            }
            let (slot, mut len) = ((symbol - BYTES) / 8, (symbol - BYTES) % 8);
            if len == LONG {
                len += self.bits.symbol(&lengths)?;
            }
            let distance = self.distance(slot, aligned.as_ref())?;
            copy(output, at, distance, len + MIN_COPY)?;
        }
        Some(())
    }

    fn distance(&mut self, slot: usize, aligned: Option<&Codes>) -> Option<usize> {
        if slot < 3 {
            self.recent.swap(0, slot);
            return Some(self.recent[0]);
        }
        let (first, bits) = place(slot);
        let rest = match aligned {
            Some(codes) if bits >= 3 => {
                let high = usize::try_from(self.bits.read(bits - 3)?).ok()? << 3;
                high + self.bits.symbol(codes)?
            }
            _ => usize::try_from(self.bits.read(bits)?).ok()?,
        };
        // The first two numbers are those of recent distances, but for one.
        let distance = first + rest - 2;
        self.recent = [distance, self.recent[0], self.recent[1]];
        Some(distance)
    }

    fn plain(&mut self, output: &mut [u8], at: &mut usize) -> Option<()> {
        // If bytes follow anyway, a word is left out.
        self.bits.ensure(1)?;
        self.bits.align();
        for recent in &mut self.recent {
            let bytes = self.bits.bytes(4)?;
            *recent = usize::try_from(u32::from_le_bytes(bytes.try_into().ok()?)).ok()?;
        }
        let len = output.len() - *at;
        output[*at..].copy_from_slice(self.bits.bytes(len)?);
        *at += len;
        if !len.is_multiple_of(2) {
            // The next block starts at a word; after the last there may be nothing.
            let _ = self.bits.bytes(1);
        }
        Some(())
    }
}

/// Returns the first distance (plus 2) of a slot, and how many bits say which one.
fn place(slot: usize) -> (usize, u32) {
    if slot < 4 {
        return (slot, 0);
    }
    let bits = slot / 2 - 1;
    ((2 + slot % 2) << bits, u32::try_from(bits).expect("there are 30 slots"))
}

/// Reads by how much lengths of codes differ from those before.
fn read_lengths(bits: &mut Bits<'_>, lengths: &mut [u8]) -> Option<()> {
    let mut own = [0; 20];
    for length in &mut own {
        *length = u8::try_from(bits.read(4)?).ok()?;
    }
    let codes = Codes::new(&own)?;
    let changed = |before: u8, by: usize| u8::try_from((usize::from(before) + 17 - by) % 17).ok();
    let mut at = 0;
    while at < lengths.len() {
        let symbol = bits.symbol(&codes)?;
        let (count, value) = match symbol {
            0..=16 => (1, changed(lengths[at], symbol)?),
            17 => (4 + bits.read(4)?, 0),
            18 => (20 + bits.read(5)?, 0),
            _ => {
                let count = 4 + bits.read(1)?;
                let by = bits.symbol(&codes).filter(|by| *by <= 16)?;
                (count, changed(lengths[at], by)?)
            }
        };
        // The last may say more than there are.
        let end = at.saturating_add(usize::try_from(count).ok()?).min(lengths.len());
        lengths[at..end].fill(value);
        at = end;
    }
    Some(())
}

/// Makes addresses after calls relative again.
fn restore_calls(output: &mut [u8]) {
    const CALL: u8 = 0xe8;
    // The last ten bytes are left as they are.
    let Some(last) = output.len().checked_sub(10) else { return };
    let mut at = 0;
    while at < last {
        if output[at] != CALL {
            at += 1;
            continue;
        }
        let field: &mut [u8; 4] = (&mut output[at + 1..at + 5]).try_into().expect("four bytes");
        let absolute = i32::from_le_bytes(*field);
        let place = i32::try_from(at).expect("within a chunk");
        if absolute >= -place && absolute < PROGRAM {
            let relative = if absolute >= 0 { absolute - place } else { absolute + PROGRAM };
            *field = relative.to_le_bytes();
        }
        at += 5;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slots_of_distances_follow_each_other() {
        for slot in 3..SLOTS - 1 {
            let ((first, bits), (next, _)) = (place(slot), place(slot + 1));
            assert_eq!(first + (1 << bits), next, "{slot}");
        }
        assert_eq!(place(SLOTS - 1), (24_576, 13));
    }

    #[test]
    fn calls_get_their_relative_addresses_back() {
        let mut code = vec![0; 40];
        code[7] = 0xe8;
        code[8..12].copy_from_slice(&100_i32.to_le_bytes());
        code[20] = 0xe8;
        code[21..25].copy_from_slice(&(-3_i32).to_le_bytes());
        code[31] = 0xe8;
        code[32] = 9;
        restore_calls(&mut code);
        assert_eq!(i32::from_le_bytes(code[8..12].try_into().unwrap()), 93);
        assert_eq!(i32::from_le_bytes(code[21..25].try_into().unwrap()), 11_999_997);
        assert_eq!(code[32], 9);
    }
}
