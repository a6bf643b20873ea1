//! One layer of a disk: what one VHD file of a storage repository holds.
//!
//! A layer has blocks of 2 MiB, present or absent, and of a present block each sector is present or absent, too, as the
//! sector bitmap of a VHD says; what is absent is the parent's. In memory a block is made of 32 runs of 64 KiB: a run that
//! was never written, or only with zeroes, takes no memory for its data.
//!
//! Cloning a layer is cheap: blocks and runs are shared until one of both writes to them.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

use uuid::Uuid;

use crate::random::fresh_uuid;

/// Bytes of a sector.
pub const SECTOR_BYTES: usize = 512;
/// Bytes of a run: what changed block tracking knows as one block.
pub const RUN_BYTES: usize = 64 << 10;
/// Bytes of a block of a VHD.
pub const BLOCK_BYTES: u64 = 2 << 20;
/// Runs of a block.
pub const RUNS_PER_BLOCK: usize = 32;

/// All 128 sectors of a run.
const ALL_SECTORS: u128 = u128::MAX;

/// A layer of a disk.
#[derive(Debug, Clone)]
pub struct Layer {
    pub(crate) uuid: Uuid,
    file_uuid: Uuid,
    pub(crate) size: u64,
    blocks: BTreeMap<u32, Arc<Block>>,
}

impl Layer {
    /// Makes an empty layer of a disk of `size` bytes; `uuid` is the VDI's, and the name of its file.
    pub(crate) fn new(uuid: Uuid, size: u64) -> Self {
        Self { uuid, file_uuid: fresh_uuid(), size, blocks: BTreeMap::new() }
    }

    /// Returns the uuid of the VDI, by which the file is called.
    pub fn uuid(&self) -> Uuid {
        self.uuid
    }

    /// Returns the uuid within the footer of the file, which stays the same when the file is renamed.
    pub fn file_uuid(&self) -> Uuid {
        self.file_uuid
    }

    /// Returns the size of the disk when this layer was written last, in bytes.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Returns the present blocks by their index, ascending.
    pub fn blocks(&self) -> impl Iterator<Item = (u32, &Arc<Block>)> {
        self.blocks.iter().map(|(index, block)| (*index, block))
    }

    /// Returns a block, if it is present.
    pub fn block(&self, index: u32) -> Option<&Arc<Block>> {
        self.blocks.get(&index)
    }

    /// Returns whether nothing was ever written to it.
    pub fn is_empty(&self) -> bool {
        self.blocks.is_empty()
    }

    /// Returns a run, if its block is present.
    pub(crate) fn run(&self, run: RunIndex) -> Option<&Run> {
        Some(&self.blocks.get(&run.block)?.runs[run.within])
    }

    /// Returns a run to write to, whose block is then present.
    pub(crate) fn run_mut(&mut self, run: RunIndex) -> &mut Run {
        &mut Arc::make_mut(self.blocks.entry(run.block).or_default()).runs[run.within]
    }

    /// Takes over all that a child holds, as the storage manager does when it coalesces a child into its parent.
    pub(crate) fn absorb(&mut self, child: &Layer) {
        for (index, block) in &child.blocks {
            match self.blocks.get_mut(index) {
                Some(own) => Arc::make_mut(own).absorb(block),
                None => {
                    self.blocks.insert(*index, block.clone());
                }
            }
        }
        self.size = self.size.max(child.size);
    }
}

/// Where a run of 64 KiB lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct RunIndex {
    block: u32,
    within: usize,
}

impl RunIndex {
    /// Returns the run that holds a byte of a disk, `None` past the 2^32nd block.
    pub(crate) fn of(offset: u64) -> Option<Self> {
        let block = u32::try_from(offset / BLOCK_BYTES).ok()?;
        let within = usize::try_from(offset % BLOCK_BYTES).ok()? / RUN_BYTES;
        Some(Self { block, within })
    }
}

/// A present block of a layer.
#[derive(Debug, Clone, Default)]
pub struct Block {
    runs: [Run; RUNS_PER_BLOCK],
}

impl Block {
    /// Returns the runs, in their order.
    pub fn runs(&self) -> &[Run; RUNS_PER_BLOCK] {
        &self.runs
    }

    fn absorb(&mut self, child: &Block) {
        for (own, newer) in self.runs.iter_mut().zip(&child.runs) {
            if own.present & !newer.present == 0 {
                own.clone_from(newer);
            } else if newer.present != 0 {
                for sectors in ranges(newer.present) {
                    let bytes = bytes_of(&sectors);
                    match &newer.data {
                        Some(data) => own.write(bytes.start, &data[bytes]),
                        None => own.zero(bytes),
                    }
                }
            }
        }
    }
}

/// 64 KiB of a block: which of its 128 sectors are present, and their bytes.
#[derive(Debug, Clone, Default)]
pub struct Run {
    /// Bit n for sector n.
    present: u128,
    /// 64 KiB, zeroes where absent; `None` if all are zeroes.
    data: Option<Arc<[u8]>>,
}

impl Run {
    /// Returns which sectors are present: bit n, counted from the least significant, is sector n.
    pub fn present(&self) -> u128 {
        self.present
    }

    /// Returns the 64 KiB, `None` if they are zeroes.
    pub fn data(&self) -> Option<&[u8]> {
        self.data.as_deref()
    }

    /// Copies into `buffer`, which starts at byte `start` of the run, those of the wanted sectors that are present, and
    /// returns those that are still wanted.
    pub(crate) fn read(&self, start: usize, buffer: &mut [u8], wanted: u128) -> u128 {
        for sectors in ranges(self.present & wanted) {
            let bytes = bytes_of(&sectors);
            let (from, to) = (bytes.start.max(start), bytes.end.min(start + buffer.len()));
            if from >= to {
                continue;
            }
            match &self.data {
                Some(data) => buffer[from - start..to - start].copy_from_slice(&data[from..to]),
                None => buffer[from - start..to - start].fill(0),
            }
        }
        wanted & !self.present
    }

    /// Writes whole sectors from byte `start` on.
    pub(crate) fn write(&mut self, start: usize, bytes: &[u8]) {
        let end = start + bytes.len();
        if is_zero(bytes) {
            return self.zero(start..end);
        }
        self.present |= sectors(start..end);
        let data = self.data.get_or_insert_with(|| vec![0; RUN_BYTES].into());
        Arc::make_mut(data)[start..end].copy_from_slice(bytes);
    }

    /// Writes zeroes to whole sectors.
    pub(crate) fn zero(&mut self, bytes: Range<usize>) {
        let zeroed = sectors(bytes.clone());
        self.present |= zeroed;
        if zeroed == ALL_SECTORS {
            self.data = None;
        } else if let Some(data) = &mut self.data {
            Arc::make_mut(data)[bytes].fill(0);
        }
    }
}

/// Returns the sectors that a range of bytes of a run touches.
pub(crate) fn sectors(bytes: Range<usize>) -> u128 {
    if bytes.is_empty() {
        return 0;
    }
    let (first, end) = (bytes.start / SECTOR_BYTES, bytes.end.div_ceil(SECTOR_BYTES));
    (ALL_SECTORS >> (128 - (end - first))) << first
}

/// Returns whether all bytes are zero.
pub(crate) fn is_zero(bytes: &[u8]) -> bool {
    // Sixteen at a time: compared as one number also where nothing is optimised.
    let mut pieces = bytes.chunks_exact(16);
    pieces.all(|piece| piece == [0; 16]) && pieces.remainder().iter().all(|byte| *byte == 0)
}

/// Returns the contiguous ranges of sectors in a mask.
fn ranges(mask: u128) -> impl Iterator<Item = Range<usize>> {
    let mut left = mask;
    std::iter::from_fn(move || {
        if left == 0 {
            return None;
        }
        let start = left.trailing_zeros();
        let length = (left >> start).trailing_ones();
        left &= ALL_SECTORS.checked_shl(start + length).unwrap_or(0);
        Some(usize::try_from(start).ok()?..usize::try_from(start + length).ok()?)
    })
}

fn bytes_of(sectors: &Range<usize>) -> Range<usize> {
    sectors.start * SECTOR_BYTES..sectors.end * SECTOR_BYTES
}
