//! Where the blocks of a file lie: a tree of extents, or blocks of pointers in ext2 and ext3.
//!
//! ```text
//! inode ─┬─ depth 1: first block of the file, node ─▶ header, depth 0: first block, length, block of the volume
//!        └─ ...                                               ...
//! inode ─┬─ 12 pointers                                                                   0: a hole
//!        ├─ pointer ─▶ pointers
//!        ├─ pointer ─▶ pointers ─▶ pointers
//!        └─ pointer ─▶ pointers ─▶ pointers ─▶ pointers
//! ```
//!
//! Only what a window of the file needs is read. A tree cannot lead astray: depth falls by one at each level, what a child
//! maps lies within what its parent says of it, and a walk reads a bounded number of nodes.
//! Source: "Contents of i_block" of the kernel's documentation of ext4.

use fs_ext4::extent::{EXT4_EXT_MAX_DEPTH, Extent, ExtentHeader, ExtentIdx};

use crate::{Error, Fields, Result};

/// Bytes of a header and of each entry behind it.
const ENTRY: usize = 12;

/// Nodes that a walk reads at most without one that maps anything.
const IDLE_NODES: usize = 4096;

/// What a map is read from.
pub(super) trait Blocks {
    /// Bytes of a block.
    fn block_size(&self) -> u64;

    /// Blocks that there are.
    fn count(&self) -> u64;

    /// Returns the bytes of a block.
    fn read(&self, block: u64) -> Result<Vec<u8>>;

    /// Returns whether the checksum of a node of a tree is right, or there is none.
    fn is_genuine(&self, covered: &[u8], stored: u32) -> bool;
}

/// Where blocks lie.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Place {
    /// From this block of the volume on.
    At(u64),
    /// Allocated, never written.
    Unwritten,
}

/// Blocks of a file that lie together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Run {
    /// The first, counted in the file.
    pub(super) start: u64,
    /// How many.
    pub(super) len: u64,
    pub(super) place: Place,
}

/// What of a file is wanted, in blocks.
#[derive(Debug, Clone, Copy)]
pub(super) struct Window {
    /// Nothing that ends at or before this.
    pub(super) from: u64,
    /// Nothing that starts at or after this.
    pub(super) end: u64,
    /// Runs at most.
    pub(super) room: usize,
}

/// Runs in ascending order, and up to which block of the file no others lie.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Runs {
    pub(super) found: Vec<Run>,
    pub(super) until: u64,
}

/// Returns what a tree of extents maps; `root` are the 60 bytes of the inode.
///
/// # Errors
/// [`ErrorKind::Damaged`](crate::ErrorKind::Damaged) for a tree that is none.
pub(super) fn of_extents(blocks: &dyn Blocks, root: &[u8; 60], window: Window) -> Result<Runs> {
    let mut walk = Walk::new(blocks, window);
    let depth = header(root)?.depth;
    if depth > EXT4_EXT_MAX_DEPTH {
        return Err(Error::damaged(format!("the tree of extents is {depth} deep, and 5 are the most there are")));
    }
    // The number of a file's block has 32 bits.
    walk.node(root, depth, 0, 1 << 32)?;
    walk.runs()
}

/// Returns what pointers map; `root` are the 60 bytes of the inode.
///
/// # Errors
/// [`ErrorKind::Damaged`](crate::ErrorKind::Damaged) for pointers that lead out of the volume.
pub(super) fn of_pointers(blocks: &dyn Blocks, root: &[u8; 60], window: Window) -> Result<Runs> {
    let mut walk = Walk::new(blocks, window);
    let mut start = 0;
    for (pointers, level) in [(&root[..48], 0), (&root[48..52], 1), (&root[52..56], 2), (&root[56..], 3)] {
        let span = walk.span(level);
        if walk.pointers(pointers, level, start)? == Next::Stop {
            break;
        }
        start += span * (pointers.len() as u64 / 4);
    }
    walk.runs()
}

#[derive(Debug, PartialEq, Eq)]
enum Next {
    GoOn,
    Stop,
}

struct Walk<'a> {
    blocks: &'a dyn Blocks,
    window: Window,
    found: Vec<Run>,
    /// Nodes that may be read until a run is found.
    idle: usize,
    is_full: bool,
}

impl<'a> Walk<'a> {
    fn new(blocks: &'a dyn Blocks, window: Window) -> Self {
        Self { blocks, window, found: Vec::new(), idle: IDLE_NODES, is_full: false }
    }

    fn runs(self) -> Result<Runs> {
        let last = self.found.last().map(|run| run.start + run.len);
        let until = match (self.is_full, last) {
            (false, _) => self.window.end,
            (true, Some(end)) => end,
            (true, None) => return Err(Error::damaged("the map of the file holds nothing in thousands of blocks")),
        };
        Ok(Runs { found: self.found, until })
    }

    /// Walks a node of a tree that maps blocks of the file from `low` up to `high`.
    fn node(&mut self, bytes: &[u8], depth: u16, low: u64, high: u64) -> Result<Next> {
        let header = header(bytes)?;
        if header.depth != depth {
            return Err(Error::damaged(format!("a node of extents has depth {} instead of {depth}", header.depth)));
        }
        let entries: Vec<&[u8]> = bytes[ENTRY..].chunks_exact(ENTRY).take(usize::from(header.entries)).collect();
        if depth == 0 { self.leaf(&entries, low, high) } else { self.index(&entries, depth, low, high) }
    }

    fn leaf(&mut self, entries: &[&[u8]], mut low: u64, high: u64) -> Result<Next> {
        for entry in entries {
            let extent = Extent::parse(entry).map_err(|error| Error::damaged(error.to_string()))?;
            let run = Run {
                start: u64::from(extent.logical_block),
                len: u64::from(extent.length),
                place: if extent.uninitialized { Place::Unwritten } else { Place::At(extent.physical_block) },
            };
            let end = run.start + run.len;
            if run.start < low || run.len == 0 || end > high {
                return Err(Error::damaged(format!(
                    "an extent maps the blocks {} to {end} of the file where those from {low} to {high} belong",
                    run.start
                )));
            }
            low = end;
            self.check(extent.physical_block, run.len)?;
            if self.push(run) == Next::Stop {
                return Ok(Next::Stop);
            }
        }
        Ok(Next::GoOn)
    }

    fn index(&mut self, entries: &[&[u8]], depth: u16, low: u64, high: u64) -> Result<Next> {
        let mut children = Vec::with_capacity(entries.len());
        let mut least = low;
        for entry in entries {
            let child = ExtentIdx::parse(entry).map_err(|error| Error::damaged(error.to_string()))?;
            let start = u64::from(child.logical_block);
            if start < least || start >= high {
                return Err(Error::damaged(format!("a node of extents has {start} where {least} to {high} belong")));
            }
            least = start + 1;
            children.push((start, child.leaf_block));
        }
        for (at, &(start, block)) in children.iter().enumerate() {
            let end = children.get(at + 1).map_or(high, |(next, _)| *next);
            if end <= self.window.from {
                continue;
            }
            if start >= self.window.end || self.is_out_of_patience() {
                return Ok(Next::Stop);
            }
            self.check(block, 1)?;
            let bytes = self.blocks.read(block)?;
            let tail = ENTRY * (1 + usize::from(header(&bytes)?.max));
            // What a block has too little room for has no checksum.
            if let Some(stored) = Fields(&bytes).le32(tail)
                && !self.blocks.is_genuine(&bytes[..tail], stored)
            {
                return Err(Error::damaged(format!("block {block}, a node of extents, has a wrong checksum")));
            }
            if self.node(&bytes, depth - 1, start, end)? == Next::Stop {
                return Ok(Next::Stop);
            }
        }
        Ok(Next::GoOn)
    }

    /// Walks pointers to what is `level` levels of pointers above data, the first of which maps `start`.
    fn pointers(&mut self, pointers: &[u8], level: u32, start: u64) -> Result<Next> {
        let span = self.span(level);
        let skipped = self.window.from.saturating_sub(start) / span;
        let skipped = usize::try_from(skipped).unwrap_or(usize::MAX);
        for (at, pointer) in pointers.chunks_exact(4).enumerate().skip(skipped) {
            let start = start + at as u64 * span;
            if start >= self.window.end {
                return Ok(Next::Stop);
            }
            let block = u64::from(u32::from_le_bytes(pointer.try_into().expect("four bytes")));
            if block == 0 {
                continue;
            }
            self.check(block, 1)?;
            let next = if level == 0 {
                self.push(Run { start, len: 1, place: Place::At(block) })
            } else if self.is_out_of_patience() {
                Next::Stop
            } else {
                let bytes = self.blocks.read(block)?;
                self.pointers(&bytes, level - 1, start)?
            };
            if next == Next::Stop {
                return Ok(Next::Stop);
            }
        }
        Ok(Next::GoOn)
    }

    /// Blocks of a file that a pointer maps, `level` levels above data.
    fn span(&self, level: u32) -> u64 {
        (self.blocks.block_size() / 4).pow(level)
    }

    fn check(&self, block: u64, len: u64) -> Result<()> {
        let count = self.blocks.count();
        if block == 0 || block + len > count {
            return Err(Error::damaged(format!(
                "the map of the file leads to {len} blocks at {block}, and the filesystem has {count}"
            )));
        }
        Ok(())
    }

    fn is_out_of_patience(&mut self) -> bool {
        self.is_full |= self.idle == 0;
        self.idle = self.idle.saturating_sub(1);
        self.is_full
    }

    fn push(&mut self, run: Run) -> Next {
        if run.start + run.len <= self.window.from {
            return Next::GoOn;
        }
        if run.start >= self.window.end {
            return Next::Stop;
        }
        if let Some(last) = self.found.last_mut()
            && last.start + last.len == run.start
            && match (last.place, run.place) {
                (Place::At(before), Place::At(block)) => before + last.len == block,
                (before, place) => before == place,
            }
        {
            last.len += run.len;
            return Next::GoOn;
        }
        if self.found.len() >= self.window.room.max(1) {
            self.is_full = true;
            return Next::Stop;
        }
        self.idle = IDLE_NODES;
        self.found.push(run);
        Next::GoOn
    }
}

/// Returns the header of a node that has room for its entries.
fn header(bytes: &[u8]) -> Result<ExtentHeader> {
    let header = ExtentHeader::parse(bytes).map_err(|error| Error::damaged(error.to_string()))?;
    if usize::from(header.max) > (bytes.len() - ENTRY) / ENTRY {
        return Err(Error::damaged(format!("a node of {} bytes has room for {} extents", bytes.len(), header.max)));
    }
    Ok(header)
}
