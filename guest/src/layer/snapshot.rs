//! A snapshot that has its own copy of each chunk in which it is not its origin.
//!
//! ```text
//! store: header | exceptions | chunk ... chunk | exceptions | chunk ...     an area of exceptions is one chunk
//! exception: which chunk of the origin, which chunk of the store (0: there are no more), 8 bytes each
//! ```
//!
//! All numbers are little-endian. An exception is written after the chunk that it leads to, and before the origin is changed, so
//! that what a machine leaves that loses its power is whole. Source: Linux `drivers/md/dm-snap-persistent.c`.

use disk::Disk;

use super::{Index, MAX_CHUNKS};
use crate::read::read_within;
use crate::{Error, ErrorKind, Fields, Result};

const MAGIC: u32 = 0x7041_6e53;

/// The largest chunk (bytes); LVM makes none beyond 512 KiB.
const MAX_CHUNK: u64 = 16 << 20;

/// Bytes of an exception.
const EXCEPTION: usize = 16;

/// Reads all exceptions of a store, and the size of chunks in bytes; `room` is how many areas may be read.
pub(super) fn read(store: &dyn Disk, room: &mut usize) -> Result<(Index, u64)> {
    let header = read_within(store, 0, 16)?;
    let damaged = || Error::damaged("the store of the snapshot is damaged");
    let number = |at| Fields(&header).le32(at).ok_or_else(damaged);
    match number(0)? {
        MAGIC => {}
        // The kernel begins a new one.
        0 => return Ok((Index::new(vec![])?, 512)),
        _ => return Err(damaged()),
    }
    if number(4)? == 0 {
        return Err(Error::damaged("the snapshot is invalid: it ran out of room, and what it held is lost"));
    }
    if number(8)? != 1 {
        return Err(Error::unsupported("a snapshot of another version, which this version does not read"));
    }
    let chunk_size = u64::from(number(12)?) * 512;
    if !chunk_size.is_power_of_two() || !(512..=MAX_CHUNK).contains(&chunk_size) {
        return Err(damaged());
    }
    let len = usize::try_from(chunk_size).map_err(|_| damaged())?;
    let chunks = store.size() / chunk_size;
    let mut found = vec![];
    for area in (1..chunks).step_by(len / EXCEPTION + 1) {
        *room = room.checked_sub(len.div_ceil(64 << 10)).ok_or_else(too_much)?;
        let bytes = read_within(store, area * chunk_size, len)?;
        for exception in bytes.chunks_exact(EXCEPTION) {
            let field = |at| Fields(exception).le64(at).ok_or_else(damaged);
            let (old, new) = (field(0)?, field(8)?);
            if new == 0 {
                return Ok((Index::new(found)?, chunk_size));
            }
            if new >= chunks {
                return Err(Error::damaged(format!("chunk {old} of it lies past the end of the snapshot's store")));
            }
            if found.len() == MAX_CHUNKS {
                return Err(too_much());
            }
            found.push((old, new));
        }
    }
    Ok((Index::new(found)?, chunk_size))
}

fn too_much() -> Error {
    Error::new(ErrorKind::TooMuch, "the snapshot has more exceptions than are read")
}
