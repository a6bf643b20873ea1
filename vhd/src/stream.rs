//! A VHD as it comes over a connection, once, from its first byte to its last.
//!
//! ```text
//! 0      footer      512                                 what is read first, and then known: the size,
//! 512    header      1024                                whether it is differencing, which blocks there are,
//! 2048   table       4 bytes per block, to a sector      the exact length
//!        blocks      512 bytes of bitmap and 2 MiB each, without gaps
//!        footer      512, the same again, then the end
//! ```
//!
//! That is what XAPI writes (creator `caml`), and of its streams every byte of structure must be as it writes them. Others
//! may have the table at 1536, blocks in another order, small gaps in front of blocks, and bitmaps with holes.
//!
//! A stream ends with its connection, so only its own structure can tell that nothing is missing: that is why
//! [`StreamReader::next_block`] says that there are no more blocks only after the second footer and the end. A server that
//! fails in the middle puts an error page of HTTP behind what it has sent so far: where one is found, it is told.
//! Sources: VHD specification 1.0; xen-api, `ocaml/libs/vhd/vhd_format/f.ml`, `ocaml/libs/http-lib/http_svr.ml`.

use std::io::{self, Read};

use crate::error::{ErrorKind, FormatError};
use crate::footer::{DiskType, FOOTER_BYTES, Footer};
use crate::geometry::{BlockIndex, BlockSize, FileSector, SECTOR, SECTOR_LEN};
use crate::header::{HEADER_BYTES, Header};
use crate::stream_error::{StreamError, is_page, page_in};

const BLOCK: BlockSize = BlockSize::DEFAULT;
const HEADER_AT: u64 = 512;
const HEAD_END: u64 = 1536;
/// Most entries of a table: 8 TiB in blocks of 2 MiB, four times what a VHD can hold.
const ENTRIES: u32 = 4 << 20;
/// How far behind the header the table may be, and how large a gap in front of a block (bytes).
const GAP: u64 = 64 << 10;
/// How much of the table is read at once (bytes): memory grows with what comes.
const TABLE_PIECE: usize = 64 << 10;
/// How much of what came is remembered (bytes), twice the length of an error page.
const RECENT: usize = 1024;
const ABSENT: u32 = u32::MAX;
/// The creator of what XAPI streams.
const XAPI: [u8; 4] = *b"caml";

/// Reads a VHD from a stream.
pub struct StreamReader<R> {
    input: Input<R>,
    leading: [u8; FOOTER_BYTES],
    footer: Footer,
    header: Header,
    /// Where the bitmap of each present block is, ascending.
    blocks: Vec<(FileSector, BlockIndex)>,
    next: usize,
    state: State,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum State {
    Blocks,
    Complete,
    Broken,
}

impl<R: Read> StreamReader<R> {
    /// Reads footer, header and table; a caller who wants only to know which blocks there are may stop here.
    ///
    /// # Errors
    /// What of it is not as it should be, and at which byte.
    pub fn open(source: R) -> Result<Self, StreamError> {
        let mut input = Input { source, at: 0, recent: Vec::new() };
        let mut leading = [0; FOOTER_BYTES];
        input.fill(&mut leading, "the footer")?;
        let footer = Footer::parse(&leading).map_err(|error| input.page_or(&[], of_format(0, error)))?;
        if footer.disk_type == DiskType::Fixed {
            return Err(StreamError::unsupported(0, "a disk with blocks was expected, this one is fixed"));
        }
        if footer.data_offset != HEADER_AT {
            let reason = format!("the header was expected at {HEADER_AT}, the footer says {}", footer.data_offset);
            return Err(StreamError::unsupported(0, reason));
        }
        let mut bytes = [0; HEADER_BYTES];
        input.fill(&mut bytes, "the header")?;
        let header = Header::parse(&bytes).map_err(|error| input.page_or(&[], of_format(HEADER_AT, error)))?;
        check_header(&footer, &header)?;
        let is_of_xapi = footer.creator == XAPI;
        input.skip(header.table_offset - HEAD_END, is_of_xapi.then_some(0), "what is in front of the table")?;
        let blocks = input.table(&footer, &header)?;
        let reader = Self { input, leading, footer, header, blocks, next: 0, state: State::Blocks };
        reader.check_places()?;
        Ok(reader)
    }

    /// Returns the footer, in which the identity of a stream of XAPI is a random one.
    #[must_use]
    pub fn footer(&self) -> &Footer {
        &self.footer
    }

    /// Returns the header; in a stream of XAPI its parent is a file of the host, not an image that anybody else knows.
    #[must_use]
    pub fn header(&self) -> &Header {
        &self.header
    }

    /// Returns the size of the disk in bytes. That of XAPI may be rounded up to whole blocks.
    #[must_use]
    pub fn virtual_size(&self) -> u64 {
        self.footer.virtual_size()
    }

    /// Returns whether blocks that are not present are those of another disk, not zeroes.
    #[must_use]
    pub fn is_differencing(&self) -> bool {
        self.footer.disk_type == DiskType::Differencing
    }

    /// Yields the present blocks in the order they come, each with the byte of the stream where its bitmap begins. The order
    /// is that of the disk in what XAPI writes.
    pub fn blocks(&self) -> impl ExactSizeIterator<Item = (BlockIndex, u64)> + '_ {
        self.blocks.iter().map(|(sector, block)| (*block, sector.bytes()))
    }

    /// Returns how many bytes the whole stream must have.
    #[must_use]
    pub fn total_bytes(&self) -> u64 {
        self.blocks_end() + FOOTER_BYTES as u64
    }

    /// Returns how many bytes have come.
    #[must_use]
    pub fn bytes_read(&self) -> u64 {
        self.input.at
    }

    /// Returns what is read from.
    pub fn source(&self) -> &R {
        &self.input.source
    }

    /// Ends the reading and returns what was read from.
    pub fn into_source(self) -> R {
        self.input.source
    }

    /// Fills `buffer` with the next block (2 MiB, also if the disk ends within it) and returns its number; `None` if there
    /// was none left, and the stream is complete: the footer came again and then the end.
    ///
    /// # Errors
    /// What is not as it should be, and at which byte; nothing more can be read then.
    ///
    /// # Panics
    /// If `buffer` does not have 2 MiB.
    pub fn next_block(&mut self, buffer: &mut [u8]) -> Result<Option<BlockIndex>, StreamError> {
        assert_eq!(buffer.len(), BLOCK.len(), "the buffer holds a block");
        match self.state {
            State::Complete => return Ok(None),
            State::Broken => return Err(StreamError::damaged(self.input.at, "the stream was found broken before")),
            State::Blocks => self.state = State::Broken,
        }
        let Some((sector, block)) = self.blocks.get(self.next).copied() else {
            self.finish()?;
            self.state = State::Complete;
            return Ok(None);
        };
        self.next += 1;
        let is_of_xapi = self.footer.creator == XAPI;
        self.input.skip(sector.bytes() - self.input.at, None, "a gap between blocks")?;
        self.input.block(block, buffer, self.footer.disk_type, is_of_xapi)?;
        self.state = State::Blocks;
        Ok(Some(block))
    }

    /// Reads the second footer and the end.
    fn finish(&mut self) -> Result<(), StreamError> {
        let (begin, mut trailing) = (self.input.at, [0; FOOTER_BYTES]);
        self.input.fill(&mut trailing, "the footer at the end")?;
        if let Some(at) = trailing.iter().zip(&self.leading).position(|(last, first)| last != first) {
            let reason =
                format!("the footer at the end was expected to be that of the beginning, byte {at} of it is not");
            return Err(self.input.page_or(&[], StreamError::damaged(begin + at as u64, reason)));
        }
        let (end, mut after) = (self.input.at, [0; SECTOR_LEN]);
        match self.input.some(&mut after)? {
            0 => Ok(()),
            len => {
                let error = StreamError::damaged(end, "the end of the stream was expected, there is more");
                Err(self.input.page_or(&after[..len], error))
            }
        }
    }

    fn blocks_end(&self) -> u64 {
        match self.blocks.last() {
            Some((sector, _)) => sector.bytes() + BLOCK.full_bytes() as u64,
            None => self.table_end(),
        }
    }

    fn table_end(&self) -> u64 {
        self.header.table_offset + table_bytes(&self.header)
    }

    /// Refuses blocks that lie over each other or over what is before them, and in a stream of XAPI any other place than
    /// the next one.
    fn check_places(&self) -> Result<(), StreamError> {
        let is_of_xapi = self.footer.creator == XAPI;
        let entry_at = |block: BlockIndex| self.header.table_offset + u64::from(block.0) * 4;
        let (mut end, mut last) = (self.table_end(), None);
        for (sector, block) in &self.blocks {
            let gap = sector.bytes().checked_sub(end).filter(|gap| *gap <= if is_of_xapi { 0 } else { GAP });
            let is_in_order = last.is_none_or(|last| last < *block);
            if gap.is_none() || is_of_xapi && !is_in_order {
                let reason = format!(
                    "block {} was expected at byte {end}, right behind what is before it, the table says {}",
                    block.0,
                    sector.bytes()
                );
                return Err(StreamError::damaged(entry_at(*block), reason));
            }
            (end, last) = (sector.bytes() + BLOCK.full_bytes() as u64, Some(*block));
        }
        Ok(())
    }
}

fn check_header(footer: &Footer, header: &Header) -> Result<(), StreamError> {
    if header.block_size != BLOCK {
        let found = header.block_size.bytes();
        let reason = format!("blocks of {} bytes were expected, the header says {found}", BLOCK.bytes());
        return Err(StreamError::unsupported(HEADER_AT, reason));
    }
    let at = header.table_offset;
    if !(HEAD_END..=HEAD_END + GAP).contains(&at) || !at.is_multiple_of(SECTOR) {
        let reason = format!("the table was expected at 1536 or some sectors behind it, the header says {at}");
        return Err(StreamError::damaged(HEADER_AT, reason));
    }
    let (blocks, entries) = (BLOCK.block_count(footer.virtual_size()), header.max_table_entries);
    if blocks > u64::from(entries) || entries > ENTRIES {
        let size = footer.virtual_size();
        let reason = format!(
            "a table of {blocks} to {ENTRIES} entries was expected for {size} bytes, the header says {entries}"
        );
        return Err(StreamError::damaged(HEADER_AT, reason));
    }
    Ok(())
}

/// Returns the length of the table, rounded up to sectors.
fn table_bytes(header: &Header) -> u64 {
    (u64::from(header.max_table_entries) * 4).next_multiple_of(SECTOR)
}

fn of_format(at: u64, error: FormatError) -> StreamError {
    match error.kind {
        ErrorKind::Unsupported => StreamError::unsupported(at, error.reason),
        _ => StreamError::damaged(at, error.reason),
    }
}

/// What is read from, and how far.
struct Input<R> {
    source: R,
    /// How many bytes came.
    at: u64,
    /// The last of them, in front of what is read now: an error page may begin in what was taken for data.
    recent: Vec<u8>,
}

impl<R: Read> Input<R> {
    /// Reads at least a byte, unless the stream has ended: 0. A connection that ends without saying so ends as well, since
    /// the structure decides whether it was too early.
    fn some(&mut self, buffer: &mut [u8]) -> Result<usize, StreamError> {
        loop {
            match self.source.read(buffer) {
                Ok(read) => {
                    self.at += read as u64;
                    return Ok(read);
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(0),
                Err(error) => return Err(StreamError::read(self.at, error)),
            }
        }
    }

    /// Fills `buffer` with `what` of the structure, or says that it is missing, or that a page of HTTP is in its place.
    fn fill(&mut self, buffer: &mut [u8], what: &str) -> Result<(), StreamError> {
        let begin = self.at;
        self.fill_any(buffer, what)?;
        if is_page(buffer) {
            return Err(self.page_or(buffer, StreamError::damaged(begin, format!("{what} was expected"))));
        }
        self.remember(buffer);
        Ok(())
    }

    /// Fills `buffer` with any bytes.
    fn fill_any(&mut self, buffer: &mut [u8], what: &str) -> Result<(), StreamError> {
        let (begin, mut filled) = (self.at, 0);
        while filled < buffer.len() {
            match self.some(&mut buffer[filled..])? {
                0 => {
                    let reason =
                        format!("the stream is cut off: {what} begins at {begin} and has {} bytes", buffer.len());
                    return Err(self.page_or(&buffer[..filled], StreamError::damaged(self.at, reason)));
                }
                read => filled += read,
            }
        }
        Ok(())
    }

    fn remember(&mut self, bytes: &[u8]) {
        self.recent.drain(..self.recent.len().saturating_sub(RECENT));
        self.recent.extend_from_slice(&bytes[bytes.len().saturating_sub(RECENT)..]);
    }

    /// Makes an error out of the page that begins in `last`, which came last and is not remembered yet, or shortly before, if
    /// there is one.
    fn page_or(&mut self, last: &[u8], error: StreamError) -> StreamError {
        let last = match last.len().checked_sub(StreamError::PAGE) {
            Some(skipped) => last[skipped..].to_vec(),
            None => [&self.recent, last].concat(),
        };
        let Some(begin) = page_in(&last) else { return error };
        let at = self.at - (last.len() - begin) as u64;
        let mut page = last[begin..].to_vec();
        // What is missing of it; how it ends says nothing more.
        let _ = (&mut self.source).take(StreamError::PAGE as u64).read_to_end(&mut page);
        StreamError::page(at, &page)
    }

    fn skip(&mut self, mut len: u64, expected: Option<u8>, what: &str) -> Result<(), StreamError> {
        let mut sector = [0; SECTOR_LEN];
        while len > 0 {
            let part = usize::try_from(len).unwrap_or(SECTOR_LEN).min(SECTOR_LEN);
            let begin = self.at;
            self.fill(&mut sector[..part], what)?;
            self.check_all(&sector[..part], expected, begin, what)?;
            len -= part as u64;
        }
        Ok(())
    }

    /// Reads the table with its padding; returns what is present, ascending in the stream.
    fn table(&mut self, footer: &Footer, header: &Header) -> Result<Vec<(FileSector, BlockIndex)>, StreamError> {
        let (count, entries) = (BLOCK.block_count(footer.virtual_size()), header.max_table_entries);
        let (mut index, mut present, mut left) = (0, Vec::new(), table_bytes(header));
        let mut piece = vec![0; TABLE_PIECE];
        while left > 0 {
            let len = usize::try_from(left).unwrap_or(TABLE_PIECE).min(TABLE_PIECE);
            let begin = self.at;
            self.fill(&mut piece[..len], "the table")?;
            for (entry, bytes) in piece[..len].chunks_exact(4).enumerate() {
                let sector = u32::from_be_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
                let is_of_disk = u64::from(index) < count;
                let is_of_others = index >= entries && footer.creator != XAPI;
                if sector != ABSENT && is_of_disk {
                    present.push((FileSector(sector), BlockIndex(index)));
                } else if sector != ABSENT && !is_of_others {
                    let reason = format!("the disk has {count} blocks, and the table something for a block {index}");
                    let error = StreamError::damaged(begin + entry as u64 * 4, reason);
                    return Err(self.page_or(&[], error));
                }
                index += 1;
            }
            left -= len as u64;
        }
        present.sort_unstable();
        Ok(present)
    }

    fn block(
        &mut self,
        block: BlockIndex,
        buffer: &mut [u8],
        disk_type: DiskType,
        is_of_xapi: bool,
    ) -> Result<(), StreamError> {
        let (begin, mut bitmap) = (self.at, [0; SECTOR_LEN]);
        self.fill(&mut bitmap, "the bitmap of a block")?;
        if is_of_xapi {
            self.check_all(&bitmap, Some(0xff), begin, "the bitmap of a block")?;
        }
        self.fill_any(buffer, "a block")?;
        self.remember(buffer);
        if bitmap == [0xff; SECTOR_LEN] {
            return Ok(());
        }
        for (index, sector) in buffer.chunks_exact_mut(SECTOR_LEN).enumerate() {
            if bitmap[index / 8] & 0x80 >> (index % 8) != 0 {
                continue;
            }
            if disk_type == DiskType::Differencing {
                let reason =
                    format!("sector {index} of block {} is another disk's: whole blocks were expected", block.0);
                return Err(StreamError::unsupported(begin, reason));
            }
            sector.fill(0);
        }
        Ok(())
    }

    /// Refuses bytes, the last that came, of which one is not what is expected.
    fn check_all(&mut self, bytes: &[u8], expected: Option<u8>, begin: u64, what: &str) -> Result<(), StreamError> {
        let wrong = expected.and_then(|it| bytes.iter().position(|byte| *byte != it).map(|at| (it, at)));
        wrong.map_or(Ok(()), |(expected, at)| {
            let reason = format!("{what} was expected to be {expected:#04x} everywhere, {:#04x} was found", bytes[at]);
            Err(self.page_or(&[], StreamError::damaged(begin + at as u64, reason)))
        })
    }
}
