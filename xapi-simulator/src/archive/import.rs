//! What `PUT /import/` takes.

use std::collections::BTreeSet;
use std::fmt;
use std::io::{self, BufReader, Cursor, Read};

use flate2::bufread::MultiGzDecoder;

use super::ova::Ova;
use super::zstd::ZstdReader;
use super::{OVA, PIECE_BYTES, tar, xxhash};
use crate::content::OutOfRange;
use crate::transfer::{Hook, Piece};

/// The longest `ova.xml`, in bytes.
const MAX_OVA_BYTES: u64 = 16 << 20;
/// The longest piece of a disk, in bytes: no server writes one of more than 1 MiB.
const MAX_PIECE_BYTES: u64 = 4 * PIECE_BYTES as u64;

/// Why an import ended; what came before was written.
#[derive(Debug)]
pub enum ArchiveError {
    /// The archive ended before its end.
    Truncated,
    /// It is no XVA.
    Invalid(String),
    /// A piece is not what its checksum says.
    Checksum(String),
    /// A disk is larger than it should be.
    OutOfRange(OutOfRange),
    /// It could not be read, or not be decompressed.
    Io(io::Error),
}

impl fmt::Display for ArchiveError {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Truncated => formatter.write_str("the archive ends before its end"),
            Self::Invalid(what) => formatter.write_str(what),
            Self::Checksum(name) => write!(formatter, "'{name}' is not what its checksum says"),
            Self::OutOfRange(range) => write!(formatter, "a disk of the archive has {range}"),
            Self::Io(error) => write!(formatter, "the archive could not be read: {error}"),
        }
    }
}

impl std::error::Error for ArchiveError {}

impl From<io::Error> for ArchiveError {
    fn from(error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::UnexpectedEof => Self::Truncated,
            _ => Self::Io(error),
        }
    }
}

/// Writes to a disk, given by its reference within the archive, at an offset.
pub type DiskSink<'a> = &'a mut dyn FnMut(&str, u64, &[u8]) -> Result<(), OutOfRange>;

/// An archive of which the records were read, and not yet the disks.
pub struct Import<'a> {
    from: Box<dyn Read + 'a>,
    ova: Ova,
}

impl<'a> Import<'a> {
    /// Reads the records; gzip and zstd are known by how they begin.
    ///
    /// # Errors
    /// `Invalid` if the first entry is no `ova.xml`.
    pub fn begin(from: impl Read + 'a) -> Result<Self, ArchiveError> {
        let mut from = decompressed(from)?;
        let first = tar::next(&mut *from, MAX_OVA_BYTES)?
            .filter(|entry| entry.name == OVA)
            .ok_or_else(|| ArchiveError::Invalid(format!("the archive does not begin with {OVA}")))?;
        let text = String::from_utf8(first.bytes).map_err(|_| ArchiveError::Invalid(format!("{OVA} is no text")))?;
        let ova = Ova::from_xml(&text).map_err(|what| ArchiveError::Invalid(format!("{OVA} {what}")))?;
        Ok(Self { from, ova })
    }

    /// Returns the records.
    pub fn ova(&self) -> &Ova {
        &self.ova
    }

    /// Reads the disks to the end of the archive; they must be empty, since zeroes were left out.
    ///
    /// `force` ignores checksums that are wrong; `hook` is called before each piece is written.
    ///
    /// # Errors
    /// As [`ArchiveError`] says.
    pub fn disks(mut self, sink: DiskSink<'_>, force: bool, hook: Hook<'_>) -> Result<(), ArchiveError> {
        let mut folder = Folder::default();
        let mut finished = BTreeSet::new();
        let mut last: Option<tar::Entry> = None;
        let (mut count, mut done) = (0, 0);
        while let Some(entry) = tar::next(&mut *self.from, MAX_PIECE_BYTES)? {
            if let Some(piece) = entry.name.strip_suffix(".xxhash") {
                let checked = last.take_if(|last| last.name == piece);
                let is_right = checked.is_some_and(|last| xxhash(&last.bytes).as_bytes() == entry.bytes);
                if !is_right && !force {
                    return Err(ArchiveError::Checksum(piece.to_owned()));
                }
                continue;
            }
            if entry.name.ends_with(".checksum") {
                // The SHA-1 that older servers wrote; nothing here makes one to compare.
                continue;
            }
            let (reference, number) = entry
                .name
                .split_once('/')
                .and_then(|(reference, number)| Some((reference, number.parse().ok()?)))
                .ok_or_else(|| ArchiveError::Invalid(format!("'{}' is no piece of a disk", entry.name)))?;
            if reference != folder.reference {
                let previous = std::mem::replace(&mut folder, Folder::new(reference));
                if !finished.insert(previous.reference) || finished.contains(reference) {
                    return Err(ArchiveError::Invalid(format!("the pieces of '{reference}' are not together")));
                }
            }
            let offset = folder
                .place(number, entry.bytes.len() as u64)
                .ok_or_else(|| ArchiveError::Invalid(format!("'{}' has a number that cannot be", entry.name)))?;
            let length = entry.bytes.len() as u64;
            hook(&Piece { number: count, offset, length, done, total: None })?;
            sink(reference, offset, &entry.bytes).map_err(ArchiveError::OutOfRange)?;
            count += 1;
            done += length;
            last = Some(entry);
        }
        Ok(())
    }
}

/// The disk whose pieces are read.
#[derive(Debug, Default)]
struct Folder {
    reference: String,
    /// The number after the one that was read last.
    next: u64,
    /// Where the disk was read up to, in bytes.
    position: u64,
    /// The length of its first piece: that of a number that was left out.
    skipped_bytes: u64,
}

impl Folder {
    fn new(reference: &str) -> Self {
        Self { reference: reference.to_owned(), ..Self::default() }
    }

    /// Returns where a piece lies: behind the last one, and as many pieces further as numbers were left out. An empty
    /// piece takes a number, but no place.
    fn place(&mut self, number: u64, length: u64) -> Option<u64> {
        let left_out = number.checked_sub(self.next)?;
        let offset = self.position.checked_add(left_out.checked_mul(self.skipped_bytes)?)?;
        if self.next == 0 {
            self.skipped_bytes = length;
        }
        self.next = number.checked_add(1)?;
        self.position = offset.checked_add(length)?;
        Some(offset)
    }
}

fn decompressed<'a>(mut from: impl Read + 'a) -> Result<Box<dyn Read + 'a>, ArchiveError> {
    let mut magic = vec![0; 4];
    from.read_exact(&mut magic)?;
    let kind = [magic[0], magic[1], magic[2], magic[3]];
    let whole = BufReader::new(Cursor::new(magic).chain(from));
    Ok(match kind {
        [0x1F, 0x8B, ..] => Box::new(MultiGzDecoder::new(whole)),
        [0x28, 0xB5, 0x2F, 0xFD] => Box::new(ZstdReader::new(whole)),
        _ => Box::new(whole),
    })
}
