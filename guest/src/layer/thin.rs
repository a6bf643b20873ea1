//! A volume of a thin pool.
//!
//! ```text
//! superblock ─► tree of devices ─► for each a tree: chunk of the volume ─► chunk of the data (40 bits) | time (24 bits)
//!            └► tree of what is known of each device: its chunks, when it was made
//! ```
//!
//! What the superblock leads to is never written over before there is the next one, so what a machine leaves that loses its
//! power is whole. Source: Linux `drivers/md/dm-thin-metadata.c`.

use std::sync::Arc;

use disk::Disk;

use super::blocks::{BLOCK, Blocks, Walk};
use super::{Chunks, Run};
use crate::{Error, ErrorKind, Fields, Result};

const SUPERBLOCK: u32 = 160_774;
const MAGIC: u64 = 27_022_010;

/// Sizes of chunks (bytes) and the step between them. Source: Linux `Documentation/admin-guide/device-mapper/thin-provisioning.rst`.
const MIN_CHUNK: u64 = 64 << 10;
const MAX_CHUNK: u64 = 1 << 30;

/// Chunks that are looked at for one answer, and nodes of the tree: where they are one run, an answer must end all the same.
const MAX_ENTRIES: usize = 1 << 15;
const MAX_NODES: usize = 1024;

/// Bytes of what is known of a device.
const DETAILS: usize = 24;

/// The chunks of a thin volume.
pub(super) struct Thin {
    blocks: Blocks,
    root: u64,
    count: u64,
    /// Chunks that the data of the pool has.
    data_chunks: u64,
    is_to_be_checked: bool,
}

impl Thin {
    /// Opens the volume of that number; returns the size of chunks in bytes, too.
    pub(super) fn open(metadata: Arc<dyn Disk>, device: u32) -> Result<(Self, u64)> {
        const IS_TO_BE_CHECKED: u32 = 1;
        let blocks = Blocks::new(metadata);
        let superblock = blocks.read(0, SUPERBLOCK, 8)?;
        let damaged = || Error::damaged("the superblock of its thin pool is damaged");
        let fields = Fields(&superblock);
        let number = |at| fields.le64(at).ok_or_else(damaged);
        let small = |at| fields.le32(at).ok_or_else(damaged);
        let (version, incompatible, block_size) = (small(40)?, small(360)?, small(340)?);
        if number(32)? != MAGIC {
            return Err(damaged());
        }
        if !(1..=2).contains(&version) || incompatible != 0 || u64::from(block_size) * 512 != BLOCK as u64 {
            return Err(Error::unsupported(format!(
                "a thin pool of version {version} with features {incompatible:#x}, which this version does not read"
            )));
        }
        let chunk_size = u64::from(small(336)?) * 512;
        if !(MIN_CHUNK..=MAX_CHUNK).contains(&chunk_size) || !chunk_size.is_multiple_of(MIN_CHUNK) {
            return Err(damaged());
        }
        let device = u64::from(device);
        let missing = || Error::new(ErrorKind::NotFound, format!("its thin pool has no volume of number {device}"));
        let root = blocks.value(number(320)?, device, 8)?.ok_or_else(missing)?;
        let root = Fields(&root).le64(0).ok_or_else(damaged)?;
        let details = blocks.value(number(328)?, device, DETAILS)?.ok_or_else(missing)?;
        let count = Fields(&details).le64(0).ok_or_else(damaged)?;
        let is_to_be_checked = small(4)? & IS_TO_BE_CHECKED > 0;
        Ok((Self { blocks, root, count, data_chunks: number(64)?, is_to_be_checked }, chunk_size))
    }
}

impl Chunks for Thin {
    fn runs(&self, from: u64, room: usize) -> Result<(Vec<Run>, u64)> {
        let mut walk = Walk::new(&self.blocks, self.root, from, 8);
        let (mut runs, mut entries) = (vec![], 0);
        while let Some((chunk, value)) = walk.next()? {
            if runs.len() > room || entries == MAX_ENTRIES || walk.visited > MAX_NODES && entries > 0 {
                return Ok((runs, chunk));
            }
            // The lower bits say when it was written.
            let place = Fields(&value).le64(0).unwrap_or(u64::MAX) >> 24;
            if place >= self.data_chunks {
                return Err(Error::damaged(format!("chunk {chunk} of it lies past the end of its thin pool")));
            }
            Run::add(&mut runs, chunk, place);
            entries += 1;
        }
        Ok((runs, u64::MAX))
    }

    fn count(&self) -> u64 {
        self.count
    }

    fn problem(&self) -> Option<String> {
        let text = "its thin pool is marked as one that must be checked (thin_check): what is shown may be damaged";
        self.is_to_be_checked.then(|| text.to_owned())
    }
}
