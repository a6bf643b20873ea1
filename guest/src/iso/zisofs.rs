//! Files that are compressed where they lie (zisofs), as their field ZF says.
//!
//! ```text
//! header │ where block 0 starts │ block 1 │ ... │ end of the last │ block 0, by zlib │ block 1 │ ...
//! ```
//!
//! A block that takes no bytes is zeroes. Source: the zisofs documentation of libisofs, "zisofs format version 1".

use std::cell::RefCell;
use std::rc::Rc;

use flate2::{Decompress, FlushDecompress};

use super::rock::Compression;
use crate::{Error, Fields, Result};

/// Sizes of blocks that Linux reads.
const BLOCK_SHIFTS: std::ops::RangeInclusive<u8> = 12..=17;

/// Bytes of a block that is compressed at most; what zlib does not shorten grows a little.
const MAX_STORED: u64 = (1 << 17) + (1 << 10);

/// A file that is compressed.
#[derive(Debug)]
pub(super) struct Compressed {
    /// Where the places of blocks stand (bytes of what is stored).
    table: u64,
    block_shift: u8,
    /// Bytes of content.
    size: u64,
    /// The block that was decoded last.
    last: RefCell<Option<(u64, Rc<[u8]>)>>,
}

impl Compressed {
    /// Makes one of what its field says.
    ///
    /// # Errors
    /// [`Unsupported`](crate::ErrorKind::Unsupported) for another algorithm, or blocks of another size.
    pub(super) fn new(compression: Compression) -> Result<Self> {
        let Compression { algorithm, header_words, block_shift, size } = compression;
        if algorithm != *b"pz" {
            let name = algorithm.escape_ascii();
            return Err(Error::unsupported(format!("its content is compressed as '{name}', which is not read")));
        }
        if !BLOCK_SHIFTS.contains(&block_shift) {
            let what = format!("its content is compressed in blocks of 2^{block_shift} bytes, which are not read");
            return Err(Error::unsupported(what));
        }
        Ok(Self { table: u64::from(header_words) * 4, block_shift, size: size.into(), last: RefCell::default() })
    }

    /// Bytes of content.
    pub(super) fn size(&self) -> u64 {
        self.size
    }

    /// Fills `buffer` with content from `offset` on; `read` fills one with bytes from an offset of what is stored.
    pub(super) fn decode(
        &self,
        offset: u64,
        buffer: &mut [u8],
        read: impl Fn(u64, &mut [u8]) -> Result<()>,
    ) -> Result<()> {
        let (mut at, mut rest) = (offset, buffer);
        while !rest.is_empty() {
            let index = at >> self.block_shift;
            let block = self.block(index, &read)?;
            let within = usize::try_from(at - (index << self.block_shift)).unwrap_or(usize::MAX);
            let Some(there) = block.get(within..).filter(|there| !there.is_empty()) else {
                return Err(Error::damaged(format!("{at} is not within its {} bytes", self.size)));
            };
            let (now, later) = rest.split_at_mut(there.len().min(rest.len()));
            now.copy_from_slice(&there[..now.len()]);
            at += now.len() as u64;
            rest = later;
        }
        Ok(())
    }

    fn block(&self, index: u64, read: impl Fn(u64, &mut [u8]) -> Result<()>) -> Result<Rc<[u8]>> {
        if let Some((last, block)) = &*self.last.borrow()
            && *last == index
        {
            return Ok(block.clone());
        }
        let len = self.size.saturating_sub(index << self.block_shift).min(1 << self.block_shift);
        let len = usize::try_from(len).unwrap_or_default();
        let mut places = [0; 8];
        read(self.table + index * 4, &mut places)?;
        let place = |at| u64::from(Fields(&places).le32(at).unwrap_or_default());
        let (start, end) = (place(0), place(4));
        let damaged = |what: &str| Error::damaged(format!("block {index} of its compressed content {what}"));
        let stored = end.checked_sub(start).filter(|len| *len <= MAX_STORED);
        let stored = stored.ok_or_else(|| damaged(&format!("stands at {start} to {end}")))?;
        let mut block = vec![0; len];
        if stored > 0 {
            let mut bytes = vec![0; usize::try_from(stored).unwrap_or_default()];
            read(start, &mut bytes)?;
            let mut zlib = Decompress::new(true);
            let decoded = zlib.decompress(&bytes, &mut block, FlushDecompress::Finish);
            if decoded.is_err() || zlib.total_out() != len as u64 {
                return Err(damaged("is not sound"));
            }
        }
        let block: Rc<[u8]> = block.into();
        *self.last.borrow_mut() = Some((index, block.clone()));
        Ok(block)
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use flate2::Compression as Level;
    use flate2::write::ZlibEncoder;

    use super::*;
    use crate::ErrorKind;

    const OF: Compression = Compression { algorithm: *b"pz", header_words: 4, block_shift: 15, size: 70_000 };

    /// Three blocks, of which the second is not stored.
    fn stored() -> (Vec<u8>, Vec<u8>) {
        let mut content: Vec<u8> = (0..).flat_map(|line| format!("line {line}\n").into_bytes()).take(70_000).collect();
        content[32_768..65_536].fill(0);
        let zlib = |block: &[u8]| {
            let mut encoder = ZlibEncoder::new(Vec::new(), Level::best());
            encoder.write_all(block).unwrap();
            encoder.finish().unwrap()
        };
        let (first, last) = (zlib(&content[..32_768]), zlib(&content[65_536..]));
        let middle = 32 + first.len();
        let places = [32, middle, middle, middle + last.len()].map(|place| u32::try_from(place).unwrap().to_le_bytes());
        ([&[0; 16][..], &places.concat(), &first, &last].concat(), content)
    }

    fn decode(compressed: &Compressed, stored: &[u8], offset: u64, len: usize) -> Result<Vec<u8>> {
        let mut buffer = vec![0xaa; len];
        compressed.decode(offset, &mut buffer, |at, part| {
            let found = Fields(stored).bytes(usize::try_from(at).unwrap(), part.len());
            part.copy_from_slice(found.ok_or_else(|| Error::damaged("past the end"))?);
            Ok(())
        })?;
        Ok(buffer)
    }

    #[test]
    fn any_range_is_what_was_compressed() {
        let (stored, content) = stored();
        let compressed = Compressed::new(OF).unwrap();
        for (from, to) in [(0, 70_000), (32_767, 32_769), (65_530, 70_000), (40_000, 40_001), (5, 5)] {
            let found = decode(&compressed, &stored, from as u64, to - from).unwrap();
            assert!(found == content[from..to], "{from} to {to}");
        }
        assert_eq!(decode(&compressed, &stored, 69_999, 2).unwrap_err().kind(), ErrorKind::Damaged);
    }

    #[test]
    fn what_is_damaged_or_of_another_kind_is_an_error() {
        let (sound, _) = stored();
        for (at, byte, block) in [(16, 31, 0), (19, 1, 0), (23, 1, 0), (24, 0, 1), (40, 0xff, 0)] {
            let mut damaged = sound.clone();
            damaged[at] = byte;
            let found = decode(&Compressed::new(OF).unwrap(), &damaged, block << 15, 1);
            assert_eq!(found.map_err(|error| error.kind()), Err(ErrorKind::Damaged), "{at}");
        }
        let longer = Compressed::new(Compression { size: 70_001, ..OF }).unwrap();
        assert_eq!(decode(&longer, &sound, 70_000, 1).unwrap_err().kind(), ErrorKind::Damaged);
        for (other, expected) in [
            (Compression { algorithm: *b"PZ", ..OF }, "its content is compressed as 'PZ', which is not read"),
            (
                Compression { block_shift: 18, ..OF },
                "its content is compressed in blocks of 2^18 bytes, which are not read",
            ),
        ] {
            let error = Compressed::new(other).unwrap_err();
            assert_eq!((error.kind(), error.to_string().as_str()), (ErrorKind::Unsupported, expected));
        }
    }
}
