//! The reads of a client: one after the other, and the first thing that is not one ends the connection.
//!
//! The reply says that all is well before anything was read: what fails then shows as a connection that ends.

use std::io::{self, Read, Write};

use super::{Connection, Export};

const REQUEST_MAGIC: u32 = 0x2560_9513;
const REPLY_MAGIC: u32 = 0x6744_6698;
/// Bytes read and sent at once.
const PIECE_BYTES: usize = 512 << 10;
/// What offsets and lengths are multiples of.
const SECTOR_BYTES: u64 = 512;

// Flags and type as the one number that the daemon takes them for.
const READ: u32 = 0;
const WRITE: u32 = 1;
const DISCONNECT: u32 = 2;

const EPERM: u32 = 1;
const EINVAL: u32 = 22;

/// Serves reads until the client says goodbye, asks for something else, or a hook fails.
pub(super) fn serve(connection: &mut Connection, export: &mut Export) -> io::Result<()> {
    let mut buffer = vec![0; PIECE_BYTES];
    loop {
        let mut request = [0; 28];
        connection.read_exact(&mut request)?;
        let number = |at: usize| u32::from_be_bytes([request[at], request[at + 1], request[at + 2], request[at + 3]]);
        let handle = &request[8..16];
        let offset = u64::from(number(16)) << 32 | u64::from(number(20));
        if number(0) != REQUEST_MAGIC {
            return Ok(());
        }
        // Lengths are signed numbers to it.
        let length = i32::try_from(number(24)).ok().and_then(|length| u64::try_from(length).ok());
        match (number(4), length) {
            (READ, Some(length)) if offset.is_multiple_of(SECTOR_BYTES) && length.is_multiple_of(SECTOR_BYTES) => {
                reply(connection, 0, handle)?;
                send(connection, export, offset, length, &mut buffer)?;
            }
            (DISCONNECT, _) => return Ok(()),
            (WRITE, _) => return reply(connection, EPERM, handle),
            _ => return reply(connection, EINVAL, handle),
        }
    }
}

fn send(
    connection: &mut Connection,
    export: &mut Export,
    offset: u64,
    length: u64,
    buffer: &mut [u8],
) -> io::Result<()> {
    let end = offset.checked_add(length).ok_or(io::ErrorKind::InvalidInput)?;
    let mut at = offset;
    while at < end {
        let piece = usize::try_from(end - at).map_or(PIECE_BYTES, |left| left.min(PIECE_BYTES));
        let range = at..at + piece as u64;
        (export.before)(&range)?;
        export.content.read(at, &mut buffer[..piece]).map_err(io::Error::other)?;
        connection.write_all(&buffer[..piece])?;
        export.served.add(&range);
        at = range.end;
    }
    connection.flush()
}

fn reply(connection: &mut Connection, error: u32, handle: &[u8]) -> io::Result<()> {
    let mut bytes = Vec::from(REPLY_MAGIC.to_be_bytes());
    bytes.extend(error.to_be_bytes());
    bytes.extend(handle);
    connection.write_all(&bytes)?;
    connection.flush()
}
