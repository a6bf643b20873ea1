//! Tar, as much as XVAs have of it: files with short names.

use std::io::{self, Read, Write};

use super::import::ArchiveError;

const BLOCK_BYTES: usize = 512;
const CHECKSUM: std::ops::Range<usize> = 148..156;

/// A file of an archive.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Entry {
    pub(super) name: String,
    pub(super) bytes: Vec<u8>,
}

/// Appends a file.
pub(super) fn append(to: &mut dyn Write, name: &str, bytes: &[u8]) -> io::Result<()> {
    let mut header = [0; BLOCK_BYTES];
    let mut put = |at: usize, field: &[u8]| header[at..at + field.len()].copy_from_slice(field);
    if name.len() > 100 {
        return Err(io::Error::other("a name that is too long"));
    }
    put(0, name.as_bytes());
    put(100, b"0000644\0");
    put(108, b"0000000\0");
    put(116, b"0000000\0");
    put(124, format!("{:011o}\0", bytes.len()).as_bytes());
    put(136, b"00000000000\0");
    put(CHECKSUM.start, b"        ");
    put(156, b"0");
    let sum = checksum(&header);
    header[CHECKSUM].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    to.write_all(&header)?;
    to.write_all(bytes)?;
    to.write_all(&[0; BLOCK_BYTES][..padding(bytes.len())])
}

/// Ends an archive.
pub(super) fn finish(to: &mut dyn Write) -> io::Result<()> {
    to.write_all(&[0; 2 * BLOCK_BYTES])
}

/// Reads the next file, of at most `limit` bytes; `None` at the end of the archive.
pub(super) fn next(from: &mut dyn Read, limit: u64) -> Result<Option<Entry>, ArchiveError> {
    let mut header = [0; BLOCK_BYTES];
    read(from, &mut header)?;
    if header == [0; BLOCK_BYTES] {
        return Ok(None);
    }
    let invalid = |what: &str| ArchiveError::Invalid(format!("a header of the archive has no {what}"));
    let claimed = octal(&header[CHECKSUM]).ok_or_else(|| invalid("checksum"))?;
    let mut blank = header;
    blank[CHECKSUM].fill(b' ');
    if claimed != checksum(&blank) {
        return Err(invalid("right checksum"));
    }
    let name = text(&header[..100]).ok_or_else(|| invalid("name"))?;
    let size = octal(&header[124..136]).ok_or_else(|| invalid("size"))?;
    if size > limit {
        return Err(ArchiveError::Invalid(format!("'{name}' has {size} bytes, more than {limit}")));
    }
    let mut bytes = vec![0; usize::try_from(size).map_err(io::Error::other)?];
    read(from, &mut bytes)?;
    read(from, &mut [0; BLOCK_BYTES][..padding(bytes.len())])?;
    Ok(Some(Entry { name: name.to_owned(), bytes }))
}

fn read(from: &mut dyn Read, buffer: &mut [u8]) -> Result<(), ArchiveError> {
    from.read_exact(buffer).map_err(|error| match error.kind() {
        io::ErrorKind::UnexpectedEof => ArchiveError::Truncated,
        _ => ArchiveError::Io(error),
    })
}

/// Returns what a field says up to its first NUL.
fn text(field: &[u8]) -> Option<&str> {
    let end = field.iter().position(|byte| *byte == 0).unwrap_or(field.len());
    std::str::from_utf8(&field[..end]).ok()
}

fn octal(field: &[u8]) -> Option<u64> {
    u64::from_str_radix(text(field)?.trim(), 8).ok()
}

fn checksum(header: &[u8]) -> u64 {
    header.iter().map(|byte| u64::from(*byte)).sum()
}

fn padding(length: usize) -> usize {
    length.next_multiple_of(BLOCK_BYTES) - length
}
