//! What a disk holds: a chain of [layers](Layer) as a storage repository made of VHD files keeps it, and the log of what
//! was written.
//!
//! ```text
//!   oldest                                   newest, written
//!   base copy (unmanaged) ◄── base copy ◄── leaf of the live disk
//!                                      ◄── leaf of the snapshot
//! ```
//!
//! A snapshot freezes the leaf, which becomes a base copy under a new uuid; live disk and snapshot get an empty leaf of
//! their own. Frozen layers are shared. A content is a value: who wants to read it for long clones it, which copies no data
//! and sees nothing of what is written afterwards; who writes keeps it behind a lock.

use std::fmt;
use std::hash::Hasher as _;
use std::ops::Range;
use std::sync::Arc;

use twox_hash::XxHash64;
use uuid::Uuid;

use crate::cbt::Log;
use crate::layer::{BLOCK_BYTES, Layer, RUN_BYTES, RunIndex, SECTOR_BYTES, is_zero, sectors};
use crate::random::fresh_uuid;

/// The size of the largest disk, in bytes: no VHD is larger than this 2040 GiB.
pub const MAX_SIZE: u64 = 2040 << 30;

/// What a disk holds.
#[derive(Debug, Clone)]
pub struct Content {
    /// Oldest first; never empty. Only the last is written.
    pub(crate) layers: Vec<Arc<Layer>>,
    log: Option<Arc<Log>>,
}

/// Bytes that were asked for are not on the disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OutOfRange {
    /// The bytes.
    pub range: Range<u64>,
    /// The size of the disk in bytes.
    pub size: u64,
}

impl fmt::Display for OutOfRange {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "bytes {} to {} of a disk of {}", self.range.start, self.range.end, self.size)
    }
}

impl std::error::Error for OutOfRange {}

/// Returns the size that a repository of VHD files gives to a disk for which `size` bytes were asked: whole blocks.
///
/// Source: sm `libs/sm/vhdutil.py`.
pub fn rounded_size(size: u64) -> u64 {
    size.next_multiple_of(BLOCK_BYTES)
}

impl Content {
    /// Makes an empty disk of `size` bytes; `uuid` is its VDI's.
    ///
    /// # Panics
    /// If `size` is no multiple of 512, or above [`MAX_SIZE`].
    pub fn new(uuid: Uuid, size: u64) -> Self {
        assert!(size.is_multiple_of(SECTOR_BYTES as u64) && size <= MAX_SIZE, "{size} is no size of a disk");
        Self { layers: vec![Arc::new(Layer::new(uuid, size))], log: None }
    }

    /// Returns the size in bytes.
    pub fn size(&self) -> u64 {
        self.leaf().size()
    }

    /// Returns the layers, oldest first; the last is the one that is written.
    pub fn layers(&self) -> &[Arc<Layer>] {
        &self.layers
    }

    /// Returns the layer that is written.
    pub fn leaf(&self) -> &Layer {
        self.layers.last().expect("a disk has a layer")
    }

    /// Returns the uuid of the layer below: `vhd-parent` in `sm_config` of the VDI.
    pub fn parent(&self) -> Option<Uuid> {
        self.layers.iter().nth_back(1).map(|layer| layer.uuid())
    }

    /// Returns the blocks of 2 MiB that are present in any layer, ascending.
    pub fn present(&self) -> Vec<u32> {
        let mut present: Vec<u32> =
            self.layers.iter().flat_map(|layer| layer.blocks().map(|(index, _)| index)).collect();
        present.sort_unstable();
        present.dedup();
        present
    }

    /// Returns the bytes of the blocks that are present in any layer.
    pub fn allocated(&self) -> u64 {
        self.present().len() as u64 * BLOCK_BYTES
    }

    /// Fills a buffer with what lies at `offset`.
    ///
    /// # Errors
    /// If it is not all within the disk.
    pub fn read(&self, offset: u64, buffer: &mut [u8]) -> Result<(), OutOfRange> {
        self.check(offset, buffer.len() as u64)?;
        for (position, run, within) in runs(offset, buffer.len() as u64) {
            let piece = &mut buffer[position..position + within.len()];
            piece.fill(0);
            let mut wanted = sectors(within.clone());
            for layer in self.layers.iter().rev() {
                if let Some(run) = layer.run(run) {
                    wanted = run.read(within.start, piece, wanted);
                }
                if wanted == 0 {
                    break;
                }
            }
        }
        Ok(())
    }

    /// Writes bytes; parts of sectors are filled up with what is there.
    ///
    /// # Errors
    /// If they are not all within the disk; nothing is written then.
    pub fn write(&mut self, offset: u64, bytes: &[u8]) -> Result<(), OutOfRange> {
        self.check(offset, bytes.len() as u64)?;
        self.mark(offset, bytes.len() as u64);
        for (position, run, within) in runs(offset, bytes.len() as u64) {
            let piece = &bytes[position..position + within.len()];
            let whole = within.start / SECTOR_BYTES * SECTOR_BYTES..within.end.next_multiple_of(SECTOR_BYTES);
            if whole == within {
                self.leaf_mut().run_mut(run).write(within.start, piece);
            } else {
                let mut merged = vec![0; whole.len()];
                let run_start = offset + position as u64 - within.start as u64;
                self.read(run_start + whole.start as u64, &mut merged)?;
                merged[within.start - whole.start..within.end - whole.start].copy_from_slice(piece);
                self.leaf_mut().run_mut(run).write(whole.start, &merged);
            }
        }
        Ok(())
    }

    /// Writes zeroes, which makes blocks present like any other write.
    ///
    /// # Errors
    /// As for [`Self::write`].
    pub fn zero(&mut self, offset: u64, length: u64) -> Result<(), OutOfRange> {
        self.check(offset, length)?;
        let zeroes = [0; RUN_BYTES];
        for (position, _, within) in runs(offset, length) {
            self.write(offset + position as u64, &zeroes[..within.len()])?;
        }
        Ok(())
    }

    /// Makes the disk larger; what is added reads as zeroes.
    ///
    /// # Errors
    /// If it would become smaller, or larger than any disk.
    pub fn grow(&mut self, size: u64) -> Result<(), OutOfRange> {
        if size < self.size() || size > MAX_SIZE || !size.is_multiple_of(SECTOR_BYTES as u64) {
            return Err(OutOfRange { range: 0..size, size: self.size() });
        }
        self.leaf_mut().size = size;
        if let Some(log) = &mut self.log {
            Arc::make_mut(log).grow(size);
        }
        Ok(())
    }

    /// Takes a snapshot, whose VDI has the given uuid. It gets the log of changed blocks, if there is one.
    ///
    /// A leaf that is still empty does not become a base copy: both stand on what it stood on.
    pub fn snapshot(&mut self, uuid: Uuid) -> Content {
        let size = self.size();
        let log = self.log.take().map(|mut log| {
            Arc::make_mut(&mut log).fold();
            log
        });
        self.log = log.clone().map(|log| Arc::new(Log::new(size, Some(log))));
        Content { layers: self.branch(uuid), log }
    }

    /// Makes a disk of the same content that goes its own way; it has no log, and ours goes on.
    pub fn clone_disk(&mut self, uuid: Uuid) -> Content {
        Content { layers: self.branch(uuid), log: None }
    }

    fn branch(&mut self, uuid: Uuid) -> Vec<Arc<Layer>> {
        let (size, live) = (self.size(), self.leaf().uuid());
        if !self.leaf().is_empty() {
            self.leaf_mut().uuid = fresh_uuid();
            self.layers.push(Arc::new(Layer::new(live, size)));
        }
        let mut layers = self.layers.clone();
        if let Some(leaf) = layers.last_mut() {
            *leaf = Arc::new(Layer::new(uuid, size));
        }
        layers
    }

    /// Forgets the data and keeps the log, as `VDI.data_destroy` does. The size stays.
    pub fn destroy_data(&mut self) {
        self.layers = vec![Arc::new(Layer::new(self.leaf().uuid(), self.size()))];
    }

    /// Starts a log of changed blocks, if there is none.
    pub fn enable_cbt(&mut self) {
        if self.log.is_none() {
            self.log = Some(Arc::new(Log::new(self.size(), None)));
        }
    }

    /// Ends the log, and with it the chain of the older ones.
    pub fn disable_cbt(&mut self) {
        self.log = None;
    }

    /// Makes the log unusable, as a crash of the host does while the disk is in use.
    pub fn break_cbt(&mut self) {
        if let Some(log) = &mut self.log {
            Arc::make_mut(log).break_off();
        }
    }

    /// Returns the log of changed blocks.
    pub fn log(&self) -> Option<&Log> {
        self.log.as_deref()
    }

    /// Returns a digest of all bytes and the size, whatever layers and blocks they lie in (XXH64 of the runs of 64 KiB
    /// that are not zero, each after its offset).
    pub fn digest(&self) -> u64 {
        let mut digest = Digest::new(self.size());
        let mut buffer = vec![0; RUN_BYTES];
        for block in self.present() {
            let start = u64::from(block) * BLOCK_BYTES;
            for offset in (start..self.size().min(start + BLOCK_BYTES)).step_by(RUN_BYTES) {
                let length = usize::try_from(self.size() - offset).map_or(RUN_BYTES, |left| left.min(RUN_BYTES));
                self.read(offset, &mut buffer[..length]).expect("a block that is present is on the disk");
                digest.run(offset, &buffer[..length]);
            }
        }
        digest.0.finish()
    }

    fn check(&self, offset: u64, length: u64) -> Result<(), OutOfRange> {
        let end = offset.saturating_add(length);
        if end > self.size() {
            return Err(OutOfRange { range: offset..end, size: self.size() });
        }
        Ok(())
    }

    fn mark(&mut self, offset: u64, length: u64) {
        if let Some(log) = &mut self.log
            && length > 0
        {
            Arc::make_mut(log).mark(offset, length);
        }
    }

    fn leaf_mut(&mut self) -> &mut Layer {
        Arc::make_mut(self.layers.last_mut().expect("a disk has a layer"))
    }
}

/// Returns the digest of a disk given as bytes, equal to [`Content::digest`] of a disk that holds them.
pub fn digest_of(bytes: &[u8]) -> u64 {
    let mut digest = Digest::new(bytes.len() as u64);
    for (number, run) in bytes.chunks(RUN_BYTES).enumerate() {
        digest.run((number * RUN_BYTES) as u64, run);
    }
    digest.0.finish()
}

struct Digest(XxHash64);

impl Digest {
    fn new(size: u64) -> Self {
        let mut hash = XxHash64::with_seed(0);
        hash.write(&size.to_le_bytes());
        Self(hash)
    }

    fn run(&mut self, offset: u64, bytes: &[u8]) {
        if !is_zero(bytes) {
            self.0.write(&offset.to_le_bytes());
            self.0.write(bytes);
        }
    }
}

/// Cuts a range of a disk at runs: where each piece lies in the range, its run, and where it lies in the run.
fn runs(offset: u64, length: u64) -> impl Iterator<Item = (usize, RunIndex, Range<usize>)> {
    let mut at = offset;
    std::iter::from_fn(move || {
        let left = (offset + length).checked_sub(at).filter(|left| *left > 0)?;
        let start = usize::try_from(at % RUN_BYTES as u64).ok()?;
        let piece = usize::try_from(left).map_or(RUN_BYTES, |left| left.min(RUN_BYTES)).min(RUN_BYTES - start);
        let cut = (usize::try_from(at - offset).ok()?, RunIndex::of(at)?, start..start + piece);
        at += piece as u64;
        Some(cut)
    })
}
