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
}

/// Says of a node of a tree whether a checksum is that of bytes; always true where there are none.
pub(super) type Verify<'a> = &'a dyn Fn(&[u8], u32) -> bool;

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
pub(super) fn of_extents(blocks: &dyn Blocks, verify: Verify, root: &[u8; 60], window: Window) -> Result<Runs> {
    let mut walk = Walk { verify, ..Walk::new(blocks, window) };
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

/// Whether a walk is over.
#[derive(Debug, PartialEq, Eq)]
enum Next {
    GoOn,
    Stop,
}

struct Walk<'a> {
    blocks: &'a dyn Blocks,
    verify: Verify<'a>,
    window: Window,
    found: Vec<Run>,
    /// Nodes that may be read until a run is found.
    idle: usize,
    is_full: bool,
}

impl<'a> Walk<'a> {
    fn new(blocks: &'a dyn Blocks, window: Window) -> Self {
        Self { blocks, verify: &|_, _| true, window, found: Vec::new(), idle: IDLE_NODES, is_full: false }
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
                && !(self.verify)(&bytes[..tail], stored)
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

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use super::*;
    use crate::ErrorKind;

    /// Blocks of 1 KiB, those that were never written full of zeroes.
    #[derive(Default)]
    struct Written(HashMap<u64, Vec<u8>>);

    impl Blocks for Written {
        fn block_size(&self) -> u64 {
            1024
        }

        fn count(&self) -> u64 {
            1 << 20
        }

        fn read(&self, block: u64) -> Result<Vec<u8>> {
            let mut bytes = self.0.get(&block).cloned().unwrap_or_default();
            bytes.resize(1024, 0);
            Ok(bytes)
        }
    }

    /// A node with entries of three fields: those of a leaf, or first block, node, nothing.
    fn node(depth: u16, max: u16, entries: &[(u32, u16, u32)]) -> Vec<u8> {
        let mut bytes = [0xf30a, u16::try_from(entries.len()).unwrap(), max, depth, 0, 0]
            .iter()
            .flat_map(|field: &u16| field.to_le_bytes())
            .collect::<Vec<_>>();
        for (start, len, block) in entries {
            bytes.extend(start.to_le_bytes());
            if depth == 0 {
                bytes.extend(len.to_le_bytes());
                bytes.extend([0; 2]);
                bytes.extend(block.to_le_bytes());
            } else {
                bytes.extend(block.to_le_bytes());
                bytes.extend([0; 4]);
            }
        }
        bytes
    }

    fn root(bytes: &[u8]) -> [u8; 60] {
        let mut root = [0; 60];
        root[..bytes.len()].copy_from_slice(bytes);
        root
    }

    const ALL: Window = Window { from: 0, end: 1 << 32, room: 1000 };

    fn at(start: u64, len: u64, block: u64) -> Run {
        Run { start, len, place: Place::At(block) }
    }

    #[test]
    fn a_window_of_a_tree_has_what_lies_in_it() {
        let mut blocks = Written::default();
        blocks.0.insert(100, node(0, 84, &[(0, 4, 500), (4, 4, 504), (8, 32_770, 600), (10, 2, 700)]));
        blocks.0.insert(101, node(0, 84, &[(50, 1, 800), (1 << 20, 32_768, 0x8000)]));
        let root = root(&node(1, 4, &[(0, 0, 100), (50, 0, 101)]));
        let found = |window| of_extents(&blocks, &|_, _| true, &root, window).expect("a tree");
        let unwritten = Run { start: 8, len: 2, place: Place::Unwritten };
        let all = [at(0, 8, 500), unwritten, at(10, 2, 700), at(50, 1, 800), at(1 << 20, 32_768, 0x8000)];
        assert_eq!(found(ALL), Runs { found: all.to_vec(), until: 1 << 32 });
        for (from, end, room, expected, until) in [
            (0, 8, 9, &all[..1], 8),
            (7, 11, 9, &all[..3], 11),
            (8, 1 << 32, 2, &all[1..3], 12),
            (12, 50, 9, &all[..0], 50),
            (12, 51, 1, &all[3..4], 51),
            (1 << 21, 1 << 32, 1, &all[..0], 1 << 32),
        ] {
            // Neighbours are one only where both are in the window.
            let runs = found(Window { from, end, room });
            let clipped: Vec<_> = runs.found.iter().map(|run| run.start + run.len).collect();
            assert_eq!(clipped, expected.iter().map(|run| run.start + run.len).collect::<Vec<_>>(), "{from}..{end}");
            assert_eq!(runs.until, until, "{from}..{end}");
        }
    }

    #[test]
    fn a_tree_that_is_none_is_damage() {
        let leaf = |entries: &[_]| node(0, 84, entries);
        let cases = [
            ("a node that lists itself", node(1, 4, &[(0, 0, 100)]), node(1, 84, &[(0, 0, 100)])),
            ("a depth that does not fall", node(2, 4, &[(0, 0, 100)]), leaf(&[(0, 1, 500)])),
            ("a depth that grows", node(1, 4, &[(0, 0, 100)]), node(2, 84, &[(0, 0, 101)])),
            ("the same leaf twice", node(1, 4, &[(0, 0, 100), (1, 0, 100)]), leaf(&[(0, 1, 500)])),
            ("nodes in no order", node(1, 4, &[(5, 0, 100), (5, 0, 100)]), leaf(&[(5, 1, 500)])),
            ("an extent over another", node(1, 4, &[(0, 0, 100)]), leaf(&[(0, 5, 500), (4, 1, 600)])),
            ("an extent of no blocks", node(1, 4, &[(0, 0, 100)]), leaf(&[(0, 0, 500)])),
            ("an extent past its node", node(1, 4, &[(0, 0, 100), (5, 0, 101)]), leaf(&[(0, 6, 500)])),
            ("blocks past the last", node(1, 4, &[(0, 0, 100)]), leaf(&[(0, 2, (1 << 20) - 1)])),
            ("block 0", node(1, 4, &[(0, 0, 100)]), leaf(&[(0, 1, 0)])),
            ("a node past the last block", node(1, 4, &[(0, 0, 1 << 20)]), leaf(&[])),
            ("more entries than room", node(0, 3, &[(0, 1, 1), (1, 1, 2), (2, 1, 3), (3, 1, 4)]), leaf(&[])),
            ("more room than bytes", node(0, 5, &[(0, 1, 500)]), leaf(&[])),
            ("a tree that is too deep", node(6, 4, &[(0, 0, 100)]), leaf(&[])),
            ("no header", vec![0; 60], leaf(&[])),
        ];
        for (what, top, child) in cases {
            let blocks = Written(HashMap::from([(100, child)]));
            let error = of_extents(&blocks, &|_, _| true, &root(&top), ALL).expect_err(what);
            assert_eq!(error.kind(), ErrorKind::Damaged, "{what}");
        }
    }

    #[test]
    fn a_node_with_a_wrong_checksum_is_damage() {
        let mut child = node(0, 84, &[(0, 1, 500)]);
        child.resize(1020, 0);
        child.extend(77_u32.to_le_bytes());
        let blocks = Written(HashMap::from([(100, child)]));
        let root = root(&node(1, 4, &[(0, 0, 100)]));
        let verify = |sum| move |covered: &[u8], stored| covered.len() == 1020 && stored == sum;
        assert!(of_extents(&blocks, &verify(77), &root, ALL).is_ok());
        assert_eq!(of_extents(&blocks, &verify(78), &root, ALL).expect_err("wrong").kind(), ErrorKind::Damaged);
    }

    #[test]
    fn pointers_lead_through_up_to_three_levels() {
        let pointers = |at: &[(usize, u32)]| {
            let mut bytes = vec![0; 1024];
            for (at, block) in at {
                bytes[at * 4..at * 4 + 4].copy_from_slice(&block.to_le_bytes());
            }
            bytes
        };
        let mut blocks = Written::default();
        blocks.0.insert(100, pointers(&[(0, 512), (1, 513), (255, 600)]));
        blocks.0.insert(101, pointers(&[(3, 102)]));
        blocks.0.insert(102, pointers(&[(7, 700)]));
        blocks.0.insert(103, pointers(&[(255, 101)]));
        let root = root(&pointers(&[(0, 500), (1, 501), (3, 503), (11, 511), (12, 100), (13, 101), (14, 103)])[..60]);
        let (double, triple) = (12 + 256, 12 + 256 + 65_536);
        let all = [
            at(0, 2, 500),
            at(3, 1, 503),
            at(11, 3, 511),
            at(12 + 255, 1, 600),
            at(double + 3 * 256 + 7, 1, 700),
            at(triple + 255 * 65_536 + 3 * 256 + 7, 1, 700),
        ];
        let found = |window| of_pointers(&blocks, &root, window).expect("pointers");
        assert_eq!(found(ALL), Runs { found: all.to_vec(), until: 1 << 32 });
        assert_eq!(found(Window { room: 3, ..ALL }), Runs { found: all[..3].to_vec(), until: 14 });
        assert_eq!(found(Window { from: 14, ..ALL }), Runs { found: all[3..].to_vec(), until: 1 << 32 });
        let window = Window { from: triple, end: triple + 255 * 65_536, room: 1 };
        assert_eq!(found(window), Runs { found: vec![], until: window.end });
    }

    #[test]
    fn pointers_that_lead_nowhere_in_circles_end() {
        // A block full of pointers to itself, which map the same block again and again, or nothing at all.
        let circle = 100_u32.to_le_bytes().repeat(256);
        let root = root(&[[0; 56].as_slice(), &100_u32.to_le_bytes()].concat());
        let blocks = Written(HashMap::from([(100, circle)]));
        let runs = of_pointers(&blocks, &root, Window { room: 10, ..ALL }).expect("blocks, if strange ones");
        assert_eq!(runs.found.len(), 10);
        let blocks = HashMap::from([(100, 101_u32.to_le_bytes().repeat(256)), (101, [102, 0, 0, 0].repeat(256))]);
        let error = of_pointers(&Written(blocks), &root, ALL).expect_err("tens of thousands of blocks without one");
        assert_eq!(error.kind(), ErrorKind::Damaged);
        let outside = Written(HashMap::from([(100, [0xff; 1024].to_vec())]));
        assert_eq!(of_pointers(&outside, &root, ALL).expect_err("outside").kind(), ErrorKind::Damaged);
    }
}
