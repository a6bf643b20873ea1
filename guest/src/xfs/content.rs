//! Where the bytes of a file lie.

use fs_xfs::extent::Extent as Run;
use fs_xfs::inode::Format;

use super::attributes;
use super::volume::{Node, Volume};
use crate::{Error, ErrorKind, Extent, Extents, Inode, Result, Source};

/// Runs of blocks of one file at most, 32 bytes each, all in memory.
const MAX_RUNS: u64 = 2_000_000;

/// Where the bytes of one file lie.
pub(super) struct Map {
    inode: Inode,
    size: u64,
    block_size: u64,
    /// With the byte at which each lies.
    runs: Vec<(Run, u64)>,
}

impl Map {
    /// Reads the map of a file.
    pub(super) fn of_file(volume: &Volume, node: &Node) -> Result<Self> {
        if !node.inode.is_regular_file() {
            return Err(Error::new(ErrorKind::WrongKind, format!("inode {} is no file", node.number)));
        }
        let size = attributes::size(node)?;
        let block_size = volume.block_size();
        let mut runs = runs(volume, node)?;
        // What is allocated past the end is not the file's.
        runs.retain(|run| run.startoff < size.div_ceil(block_size));
        let superblock = volume.superblock();
        let runs = runs.into_iter().map(|run| (run, superblock.fsblock_offset(run.startblock))).collect();
        Ok(Self { inode: Inode(node.number), size, block_size, runs })
    }

    pub(super) fn inode(&self) -> Inode {
        self.inode
    }

    /// Returns extents from the one over `from` or the next one on, `room` at most but at least one.
    pub(super) fn window(&self, from: u64, room: usize) -> Extents {
        if from >= self.size {
            return Extents { found: Vec::new(), until: from };
        }
        let blocks = self.size.div_ceil(self.block_size);
        let block = from / self.block_size;
        let first = self.runs.partition_point(|(run, _)| run.end_offset() <= block);
        let rest = &self.runs[first..];
        let (here, after) = rest.split_at(room.max(1).min(rest.len()));
        let found = here
            .iter()
            .map(|(run, place)| Extent {
                start: run.startoff * self.block_size,
                len: (run.end_offset().min(blocks) - run.startoff) * self.block_size,
                source: if run.unwritten { Source::Zeroes } else { Source::Member(0, *place) },
            })
            .collect();
        let until = after.first().map_or(self.size, |(run, _)| run.startoff * self.block_size);
        Extents { found, until }
    }
}

/// Returns where the blocks of a file or directory lie, in ascending order.
pub(super) fn runs(volume: &Volume, node: &Node) -> Result<Vec<Run>> {
    let inode = &node.inode;
    if inode.is_realtime() {
        return Err(Error::unsupported(format!(
            "the content of inode {} is in the realtime section, which is on another device",
            node.number
        )));
    }
    if !matches!(inode.format, Format::Extents | Format::Btree) {
        return Err(Error::damaged(format!("inode {} has no map of blocks", node.number)));
    }
    if inode.nextents > MAX_RUNS {
        let message = format!("inode {} is in {} pieces; {MAX_RUNS} are read at most", node.number, inode.nextents);
        return Err(Error::new(ErrorKind::TooMuch, message));
    }
    let found = volume.filesystem().data_extents(inode, &node.raw);
    let runs = volume.explain(found, || format!("the map of inode {}", node.number))?;
    // rust-fs-xfs compares those of one leaf only.
    if runs.windows(2).any(|pair| pair[1].startoff < pair[0].end_offset()) {
        return Err(Error::damaged(format!("the map of inode {} is not in order", node.number)));
    }
    Ok(runs)
}
