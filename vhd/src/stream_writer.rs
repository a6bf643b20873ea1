//! Writes a VHD file from its first byte to its last, of which it is known beforehand which blocks it has: the opposite of
//! [`StreamReader`](crate::StreamReader). What it is written to needs no seeking, and can be told its exact length first.

use std::io::{self, Write};
use std::ops::Range;
use std::sync::Arc;

use crate::file_layout::FileLayout;
use crate::geometry::{BlockIndex, SECTOR_LEN};

const BLOCK_LEN: usize = 2 << 20;
/// What a short last block is filled with.
static ZEROES: [u8; BLOCK_LEN] = [0; BLOCK_LEN];

/// A VHD file that is being written.
pub struct StreamWriter<W> {
    layout: Arc<FileLayout>,
    output: W,
    /// How many blocks were written.
    written: usize,
}

impl<W: Write> StreamWriter<W> {
    /// Writes what is in front of the blocks.
    ///
    /// # Errors
    /// Those of `output`.
    pub fn begin(layout: Arc<FileLayout>, mut output: W) -> io::Result<Self> {
        output.write_all(layout.head())?;
        Ok(Self { layout, output, written: 0 })
    }

    /// Writes the next block, all of which is `data`, or fewer bytes where the disk ends. Of a differencing file only those sectors are
    /// the disk's that `changed` touches, in ranges of `data`; the others stay those of the parent. Of another all of them have
    /// to be.
    ///
    /// # Errors
    /// `InvalidInput` if it is not the next one, or too long; those of what is written to.
    pub fn write(&mut self, block: BlockIndex, data: &[u8], changed: &[Range<usize>]) -> io::Result<()> {
        let invalid = |what: String| io::Error::new(io::ErrorKind::InvalidInput, what);
        let expected = self.layout.present().get(self.written);
        if expected != Some(&block.0) {
            return Err(invalid(format!("block {} came where {expected:?} was expected", block.0)));
        }
        let padding = BLOCK_LEN.checked_sub(data.len());
        let padding = padding.ok_or_else(|| invalid(format!("block {} has {} bytes", block.0, data.len())))?;
        self.output.write_all(&bitmap(data.len(), changed))?;
        self.output.write_all(data)?;
        self.output.write_all(&ZEROES[..padding])?;
        self.written += 1;
        Ok(())
    }

    /// Writes what is behind the blocks; returns what it was written to.
    ///
    /// # Errors
    /// `InvalidInput` if not all blocks came; those of what is written to.
    pub fn finish(mut self) -> io::Result<W> {
        let count = self.layout.present().len();
        if self.written != count {
            let message = format!("{} of {count} blocks of a VHD were written", self.written);
            return Err(io::Error::new(io::ErrorKind::InvalidInput, message));
        }
        self.output.write_all(self.layout.footer())?;
        Ok(self.output)
    }
}

/// Returns the bitmap of a block of `len` bytes: all ones if all of them changed, whatever is behind the end of the disk.
fn bitmap(len: usize, changed: &[Range<usize>]) -> [u8; SECTOR_LEN] {
    if matches!(changed, [all] if *all == (0..len)) {
        return [0xff; SECTOR_LEN];
    }
    let mut bitmap = [0; SECTOR_LEN];
    for range in changed.iter().filter(|range| !range.is_empty()) {
        for sector in range.start / SECTOR_LEN..range.end.min(BLOCK_LEN).div_ceil(SECTOR_LEN) {
            bitmap[sector / 8] |= 0x80 >> (sector % 8);
        }
    }
    bitmap
}

#[cfg(test)]
#[expect(clippy::single_range_in_vec_init, reason = "one range is meant")]
mod tests {
    use std::sync::Arc;

    use disk::Disk;
    use uuid::Uuid;

    use super::*;
    use crate::{StreamReader, VhdView};

    /// A disk of which each byte tells its block.
    struct Numbered(u64);

    impl Disk for Numbered {
        fn size(&self) -> u64 {
            self.0
        }

        fn read_at(&self, offset: u64, buffer: &mut [u8]) -> disk::Result<()> {
            for (at, byte) in (offset..).zip(buffer) {
                *byte = u8::try_from(at / (2 << 20) + 1).unwrap();
            }
            Ok(())
        }

        fn extent_at(&self, offset: u64) -> disk::Result<disk::Extent> {
            Ok(disk::Extent { len: self.0 - offset, is_hole: false })
        }
    }

    const SIZE: u64 = (6 << 20) + 1536;

    fn layout(present: &[u32], parent: Option<Uuid>) -> Arc<FileLayout> {
        Arc::new(FileLayout::new(SIZE, present.to_vec(), parent, Uuid::from_u128(7), 9).unwrap())
    }

    fn block(index: u32) -> Vec<u8> {
        let len = (SIZE - u64::from(index) * (2 << 20)).min(2 << 20);
        vec![u8::try_from(index + 1).unwrap(); usize::try_from(len).unwrap()]
    }

    #[test]
    fn what_is_written_is_the_view_of_the_same_disk_byte_by_byte() {
        let layout = layout(&[0, 1, 2, 3], None);
        let mut writer = StreamWriter::begin(layout.clone(), Vec::new()).unwrap();
        for index in 0..4 {
            let data = block(index);
            writer.write(BlockIndex(index), &data, &[0..data.len()]).unwrap();
        }
        let written = writer.finish().unwrap();
        let view = VhdView::new(Arc::new(Numbered(SIZE)), Uuid::from_u128(7), 9).unwrap();
        let mut whole = vec![0xee; usize::try_from(view.size()).unwrap()];
        view.read_at(0, &mut whole).unwrap();
        assert_eq!(layout.file_size(), view.size());
        assert!(whole == written);
    }

    #[test]
    fn sectors_that_did_not_change_are_left_to_the_parent() {
        assert_eq!(bitmap(BLOCK_LEN, &[0..BLOCK_LEN]), [0xff; SECTOR_LEN]);
        assert_eq!(bitmap(1536, &[0..1536]), [0xff; SECTOR_LEN]);
        let mut expected = [0; SECTOR_LEN];
        (expected[1], expected[2], expected[511]) = (0x3f, 0x80, 0x01);
        assert_eq!(bitmap(BLOCK_LEN, &[10 * 512..17 * 512, BLOCK_LEN - 1..BLOCK_LEN]), expected);
        let mut first = [0; SECTOR_LEN];
        first[0] = 0xc0;
        assert_eq!(bitmap(BLOCK_LEN, &[0..513, 5..5]), first);
        assert_eq!(bitmap(BLOCK_LEN, &[]), [0; SECTOR_LEN]);
        // Only 64 KiB of the block is the disk's.
        let mut writer = StreamWriter::begin(layout(&[1], Some(Uuid::from_u128(3))), Vec::new()).unwrap();
        writer.write(BlockIndex(1), &block(1), &[65536..131_072]).unwrap();
        let written = writer.finish().unwrap();
        let reader = StreamReader::open(written.as_slice()).unwrap();
        assert!(reader.is_differencing());
        let bitmap_at = usize::try_from(reader.blocks().next().unwrap().1).unwrap();
        let ones: u32 = written[bitmap_at..bitmap_at + 512].iter().map(|byte| byte.count_ones()).sum();
        assert_eq!((ones, written[bitmap_at + 15], written[bitmap_at + 16]), (128, 0, 0xff));
    }

    #[test]
    fn blocks_that_are_not_the_next_ones_are_refused() {
        let mut writer = StreamWriter::begin(layout(&[1, 3], None), Vec::new()).unwrap();
        let kind = |result: io::Result<()>| result.map_err(|error| error.kind());
        assert_eq!(kind(writer.write(BlockIndex(0), &block(0), &[])), Err(io::ErrorKind::InvalidInput));
        assert_eq!(kind(writer.write(BlockIndex(1), &[0; BLOCK_LEN + 1], &[])), Err(io::ErrorKind::InvalidInput));
        assert_eq!(kind(writer.write(BlockIndex(1), &block(1), &[0..BLOCK_LEN])), Ok(()));
        assert_eq!(writer.finish().map(drop).map_err(|error| error.kind()), Err(io::ErrorKind::InvalidInput));
    }
}
