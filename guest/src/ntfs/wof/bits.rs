//! Bits of words of 16 bits, the highest first, and the codes of Huffman in them.

use crate::Fields;

/// Longest code (bits).
const MAX_CODE: usize = 16;

/// Words that may be read past the end: those are needed to look at the last bits.
const MAX_PAST: usize = 2;

/// What is read bit by bit, and between that byte by byte.
#[derive(Debug)]
pub(super) struct Bits<'a> {
    input: &'a [u8],
    at: usize,
    past: usize,
    /// Bits that were read, the next one highest.
    held: u32,
    count: u32,
}

impl<'a> Bits<'a> {
    pub(super) fn new(input: &'a [u8]) -> Self {
        Self { input, at: 0, past: 0, held: 0, count: 0 }
    }

    /// Has `count` bits ready, 16 at most.
    pub(super) fn ensure(&mut self, count: u32) -> Option<()> {
        if self.count < count {
            let word = match Fields(self.input).le16(self.at) {
                Some(word) => {
                    self.at += 2;
                    word
                }
                None if self.past < MAX_PAST => {
                    self.past += 1;
                    0
                }
                None => return None,
            };
            self.held |= u32::from(word) << (16 - self.count);
            self.count += 16;
        }
        Some(())
    }

    /// Takes `count` bits, 16 at most, of those that are ready.
    pub(super) fn take(&mut self, count: u32) -> u32 {
        if count == 0 {
            return 0;
        }
        let value = self.held >> (32 - count);
        self.held <<= count;
        self.count -= count;
        value
    }

    /// Returns the next `count` bits, 16 at most.
    pub(super) fn read(&mut self, count: u32) -> Option<u32> {
        self.ensure(count)?;
        Some(self.take(count))
    }

    /// Returns the symbol of the next code.
    pub(super) fn symbol(&mut self, codes: &Codes) -> Option<usize> {
        self.ensure(16)?;
        let (symbol, len) = codes.find(self.held >> 16)?;
        self.take(len);
        Some(symbol)
    }

    /// Forgets the bits that are ready, so that bytes follow.
    pub(super) fn align(&mut self) {
        (self.held, self.count) = (0, 0);
    }

    /// Returns the bytes after the words that were read.
    pub(super) fn bytes(&mut self, len: usize) -> Option<&'a [u8]> {
        let bytes = Fields(self.input).bytes(self.at, len)?;
        self.at += len;
        Some(bytes)
    }
}

/// Canonical codes: shorter ones first, and of a length in the order of their symbols.
#[derive(Debug)]
pub(super) struct Codes {
    /// How many there are of each length.
    counts: [u32; MAX_CODE + 1],
    symbols: Vec<usize>,
}

impl Codes {
    /// Makes codes of these lengths, 16 at most, 0 for what has none; none if there are too many.
    pub(super) fn new(lengths: &[u8]) -> Option<Self> {
        let mut counts = [0; MAX_CODE + 1];
        let mut symbols: Vec<_> = (0..lengths.len()).filter(|symbol| lengths[*symbol] > 0).collect();
        symbols.sort_by_key(|symbol| lengths[*symbol]);
        for symbol in &symbols {
            *counts.get_mut(usize::from(lengths[*symbol]))? += 1;
        }
        let used = (1..).zip(&counts[1..]).map(|(len, count)| u64::from(*count) << (MAX_CODE - len)).sum::<u64>();
        (used <= 1 << MAX_CODE).then_some(Self { counts, symbols })
    }

    /// Returns the symbol of the code that 16 bits start with, and its length.
    fn find(&self, bits: u32) -> Option<(usize, u32)> {
        let (mut first, mut before) = (0, 0);
        for len in 1..=16_u32 {
            let count = self.counts[usize::try_from(len).ok()?];
            let code = bits >> (16 - len);
            if code < first + count {
                let symbol = self.symbols.get(before + usize::try_from(code.checked_sub(first)?).ok()?)?;
                return Some((*symbol, len));
            }
            before += usize::try_from(count).ok()?;
            first = (first + count) << 1;
        }
        None
    }
}

/// Copies `len` bytes from `distance` before `at`, one after the other; none if they are not there or do not fit.
pub(super) fn copy(output: &mut [u8], at: &mut usize, distance: usize, len: usize) -> Option<()> {
    if distance == 0 || distance > *at || len > output.len() - *at {
        return None;
    }
    for _ in 0..len {
        output[*at] = output[*at - distance];
        *at += 1;
    }
    Some(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_are_in_order_of_length_and_symbol() {
        // a: 10, b: 0, d: 110, e: 111.
        let codes = Codes::new(&[2, 1, 0, 3, 3]).expect("they fit");
        let mut bits = Bits::new(&[0b0111_1110, 0b1001_1010, 0x55, 7]);
        let symbols: Vec<_> = std::iter::repeat_with(|| bits.symbol(&codes).expect("a code")).take(7).collect();
        assert_eq!(symbols, [0, 1, 3, 0, 1, 4, 4]);
        assert_eq!(bits.read(1), Some(0));
        assert!(Codes::new(&[1, 1, 1]).is_none());
        assert!(Codes::new(&[17]).is_none());
        assert_eq!(Codes::new(&[]).expect("none at all").find(0), None);
    }

    #[test]
    fn bits_end_soon_after_what_they_are_in() {
        let mut bits = Bits::new(&[1, 2]);
        assert_eq!((bits.read(16), bits.read(16), bits.read(16), bits.read(1)), (Some(0x0201), Some(0), Some(0), None));
    }
}
