//! Disks as raw streams: all bytes, zeroes included.

use std::io::{self, Read, Write};

use crate::content::Content;
use crate::transfer::{Hook, Piece};
use crate::vhd::{ImportError, Sink};

/// Bytes read and sent at once.
const PIECE_BYTES: usize = 1 << 20;

/// Sends a whole disk; `hook` is called before each piece of 1 MiB.
///
/// # Errors
/// Of `to` and of `hook`.
pub fn export(content: &Content, to: &mut dyn Write, hook: Hook<'_>) -> io::Result<()> {
    let mut buffer = vec![0; PIECE_BYTES];
    for (number, offset) in (0..content.size()).step_by(PIECE_BYTES).enumerate() {
        let length = length(content.size() - offset);
        let piece =
            Piece { number: number as u64, offset, length: length as u64, done: offset, total: Some(content.size()) };
        hook(&piece)?;
        content.read(offset, &mut buffer[..length]).map_err(io::Error::other)?;
        to.write_all(&buffer[..length])?;
    }
    Ok(())
}

/// Writes a raw stream of `declared_length` bytes to a disk from its start on.
///
/// # Errors
/// `Truncated` if it ends before, `OutOfRange` if it is longer than the disk.
pub fn import(sink: Sink<'_>, from: &mut dyn Read, declared_length: u64, hook: Hook<'_>) -> Result<(), ImportError> {
    let mut buffer = vec![0; PIECE_BYTES];
    for (number, offset) in (0..declared_length).step_by(PIECE_BYTES).enumerate() {
        let length = length(declared_length - offset);
        let total = Some(declared_length);
        hook(&Piece { number: number as u64, offset, length: length as u64, done: offset, total })?;
        from.read_exact(&mut buffer[..length]).map_err(|error| match error.kind() {
            io::ErrorKind::UnexpectedEof => ImportError::Truncated("the disk"),
            _ => ImportError::Io(error),
        })?;
        sink(offset, &buffer[..length])?;
    }
    Ok(())
}

fn length(left: u64) -> usize {
    usize::try_from(left).map_or(PIECE_BYTES, |left| left.min(PIECE_BYTES))
}
