//! What `PUT /import_raw_vdi/?format=vhd` takes.
//!
//! The stream is read once, forwards: footer, header and table, then the blocks in the order in which they lie in it,
//! then the sector that is the last one by the length that was declared, which must be a footer, too. Parent and uuids
//! are not looked at: sectors whose bit is set are written over what the disk holds. Nothing is undone when the stream
//! turns out to be wrong. Source: xen-api `ocaml/libs/vhd/vhd_format/f.ml`, and what a real one was seen to do.

use std::fmt;
use std::io::{self, Read};

use super::structures::{ABSENT, FOOTER_BYTES, Fault, Footer, HEADER_BYTES, Header, STORED_BLOCK_BYTES, number};
use crate::content::OutOfRange;
use crate::layer::BLOCK_BYTES;
use crate::transfer::{Hook, Piece};

/// Writes to a disk at an offset.
pub type Sink<'a> = &'a mut dyn FnMut(u64, &[u8]) -> Result<(), OutOfRange>;

/// Why an import ended; what came before may have been written.
#[derive(Debug)]
pub enum ImportError {
    /// The stream ended within something.
    Truncated(&'static str),
    /// A structure is wrong.
    Invalid {
        /// Which.
        what: &'static str,
        /// What is wrong with it.
        fault: Fault,
    },
    /// Something lies before what was read already, in bytes of the stream.
    Backwards {
        /// What.
        what: &'static str,
        /// Where it lies.
        at: u64,
        /// What was read.
        read: u64,
    },
    /// The image is larger than the disk.
    OutOfRange(OutOfRange),
    /// The stream could not be read.
    Io(io::Error),
}

impl fmt::Display for ImportError {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Truncated(what) => write!(formatter, "the stream ended within {what}"),
            Self::Invalid { what, fault } => write!(formatter, "{what} {fault}"),
            Self::Backwards { what, at, read } => {
                write!(formatter, "{what} at byte {at}, of which {read} were read already")
            }
            Self::OutOfRange(range) => write!(formatter, "the image writes {range}"),
            Self::Io(error) => write!(formatter, "the stream could not be read: {error}"),
        }
    }
}

impl std::error::Error for ImportError {}

impl From<OutOfRange> for ImportError {
    fn from(range: OutOfRange) -> Self {
        Self::OutOfRange(range)
    }
}

impl From<io::Error> for ImportError {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

/// Writes a VHD stream to a disk; `declared_length` is its `Content-Length`, `hook` is called before each block.
///
/// # Errors
/// As [`ImportError`] says.
pub fn import(sink: Sink<'_>, from: &mut dyn Read, declared_length: u64, hook: Hook<'_>) -> Result<(), ImportError> {
    let mut stream = Stream { from, position: 0 };
    let (_, header_offset) = stream.footer("the first footer")?;
    stream.skip_to("the header", header_offset)?;
    let mut bytes = [0; HEADER_BYTES];
    stream.read("the header", &mut bytes)?;
    let header = Header::parse(&bytes).map_err(|fault| ImportError::Invalid { what: "the header", fault })?;
    stream.skip_to("the table", header.table_offset)?;
    let mut table = vec![0; usize::try_from(header.table_bytes()).map_err(io::Error::other)?];
    stream.read("the table", &mut table)?;
    let mut blocks: Vec<(u32, u32)> = (0..header.entries)
        .zip(table.chunks_exact(4).map(|entry| number(entry, 0)))
        .filter(|(_, sector)| *sector != ABSENT)
        .map(|(index, sector)| (sector, index))
        .collect();
    drop(table);
    blocks.sort_unstable();
    let mut stored = vec![0; usize::try_from(STORED_BLOCK_BYTES).map_err(io::Error::other)?];
    for (count, (sector, index)) in (0..).zip(blocks) {
        let offset = u64::from(index) * BLOCK_BYTES;
        let total = Some(declared_length);
        hook(&Piece { number: count, offset, length: BLOCK_BYTES, done: stream.position, total })?;
        stream.skip_to("a block", u64::from(sector) * 512)?;
        stream.read("a block", &mut stored)?;
        let (bitmap, data) = stored.split_at(FOOTER_BYTES);
        write_sectors(&mut *sink, offset, bitmap, data)?;
    }
    stream.skip_to("the last sector", declared_length.saturating_sub(1) / 512 * 512)?;
    stream.footer("the last footer")?;
    Ok(())
}

/// Writes the sectors of a block whose bit is set, contiguous ones at once.
fn write_sectors(sink: Sink<'_>, offset: u64, bitmap: &[u8], data: &[u8]) -> Result<(), ImportError> {
    let is_present = |sector: usize| bitmap[sector / 8] & (0x80 >> (sector % 8)) != 0;
    let count = data.len() / 512;
    let mut sector = 0;
    while sector < count {
        let start = sector;
        let wanted = is_present(start);
        while sector < count && is_present(sector) == wanted {
            sector += 1;
        }
        if wanted {
            sink(offset + (start * 512) as u64, &data[start * 512..sector * 512])?;
        }
    }
    Ok(())
}

struct Stream<'a> {
    from: &'a mut dyn Read,
    position: u64,
}

impl Stream<'_> {
    fn read(&mut self, what: &'static str, buffer: &mut [u8]) -> Result<(), ImportError> {
        self.from.read_exact(buffer).map_err(|error| match error.kind() {
            io::ErrorKind::UnexpectedEof => ImportError::Truncated(what),
            _ => ImportError::Io(error),
        })?;
        self.position += buffer.len() as u64;
        Ok(())
    }

    fn footer(&mut self, what: &'static str) -> Result<(Footer, u64), ImportError> {
        let mut bytes = [0; FOOTER_BYTES];
        self.read(what, &mut bytes)?;
        Footer::parse(&bytes).map_err(|fault| ImportError::Invalid { what, fault })
    }

    fn skip_to(&mut self, what: &'static str, at: u64) -> Result<(), ImportError> {
        let Some(gap) = at.checked_sub(self.position) else {
            return Err(ImportError::Backwards { what, at, read: self.position });
        };
        let skipped = io::copy(&mut self.from.take(gap), &mut io::sink())?;
        self.position += skipped;
        match skipped == gap {
            true => Ok(()),
            false => Err(ImportError::Truncated(what)),
        }
    }
}
