//! A volume in front of which a cache is: chunks that are in it are read there, whatever its mode.
//!
//! So does the kernel after a crash: of a cache that writes through both places are the same, and of one that writes back what is
//! in the cache is newer or the same.
//!
//! ```text
//! superblock ─► array: for each chunk of the cache the chunk of the origin (48 bits) | flags (16 bits)
//! array: a tree of blocks ─ checksum, most entries, entries, bytes of one | number (8) | entries
//! ```
//!
//! Source: Linux `drivers/md/dm-cache-metadata.c`, `persistent-data/dm-array.c`.

use std::sync::Arc;

use disk::Disk;

use super::blocks::{BLOCK, Blocks, Walk};
use super::{Index, MAX_CHUNKS};
use crate::{Error, ErrorKind, Fields, Result};

const SUPERBLOCK: u32 = 9_031_977;
const MAGIC: u64 = 0o6_142_003;
const ARRAY: u32 = 595_846_735;

/// Sizes of chunks (bytes) and the step between them. Source: Linux `Documentation/admin-guide/device-mapper/cache.rst`.
const MIN_CHUNK: u64 = 32 << 10;
const MAX_CHUNK: u64 = 1 << 30;

/// Reads which chunks are in the cache, and the size of chunks in bytes; `room` is how many blocks may be read.
pub(super) fn read(metadata: Arc<dyn Disk>, room: &mut usize) -> Result<(Index, u64)> {
    const IS_VALID: u64 = 1;
    let blocks = Blocks::new(metadata);
    let superblock = blocks.read(0, SUPERBLOCK, 8)?;
    let damaged = |what: &str| Error::damaged(format!("the metadata of its cache {what}"));
    let fields = Fields(&superblock);
    let number = |at| fields.le64(at).ok_or_else(|| damaged("are too short"));
    let small = |at| fields.le32(at).ok_or_else(|| damaged("are too short"));
    if number(32)? != MAGIC {
        return Err(damaged("have another superblock"));
    }
    let (version, incompatible, block_size) = (small(40)?, small(252)?, small(236)?);
    // Version 2 keeps apart which chunks are newer than the origin.
    if !(1..=2).contains(&version) || incompatible > 1 || u64::from(block_size) * 512 != BLOCK as u64 {
        return Err(Error::unsupported(format!(
            "a cache of version {version} with features {incompatible:#x}, which this version does not read"
        )));
    }
    let chunk_size = u64::from(small(232)?) * 512;
    if !(MIN_CHUNK..=MAX_CHUNK).contains(&chunk_size) || !chunk_size.is_multiple_of(MIN_CHUNK) {
        return Err(damaged("have chunks of a size that none has"));
    }
    let count = u64::from(small(240)?);
    let too_much = || Error::new(ErrorKind::TooMuch, "its cache has more chunks than are read");
    let mut found = vec![];
    let mut walk = Walk::new(&blocks, number(192)?, 0, 8);
    let mut place = 0_u64;
    let mut next = 0;
    while let Some((index, value)) = walk.next()? {
        *room = room.checked_sub(1).ok_or_else(too_much)?;
        if index != next {
            return Err(damaged("lack a part of their array"));
        }
        next += 1;
        let array = Fields(&value).le64(0).ok_or_else(|| damaged("are too short"))?;
        for entry in entries(&blocks, array)? {
            if entry & IS_VALID > 0 && place < count {
                if found.len() == MAX_CHUNKS {
                    return Err(too_much());
                }
                found.push((entry >> 16, place));
            }
            place += 1;
        }
    }
    if place < count {
        return Err(damaged("lack a part of their array"));
    }
    Ok((Index::new(found)?, chunk_size))
}

/// Returns the entries of a block of an array, 8 bytes each.
fn entries(blocks: &Blocks, number: u64) -> Result<Vec<u64>> {
    const HEADER: usize = 24;
    let bytes = blocks.read(number, ARRAY, 16)?;
    let fields = Fields(&bytes);
    let entries = || -> Option<Vec<u64>> {
        let small = |at| usize::try_from(fields.le32(at)?).ok();
        let (most, count, size) = (small(4)?, small(8)?, small(12)?);
        (size == 8 && count <= most && most <= (BLOCK - HEADER) / 8 && count > 0).then_some(())?;
        (0..count).map(|index| fields.le64(HEADER + 8 * index)).collect()
    };
    entries().ok_or_else(|| Error::damaged(format!("block {number} of the metadata of its cache is no array")))
}
