//! One block of a disk: whether a destination stores it, and as what.

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, LazyLock, OnceLock};

use vhd::{BlockIndex, BlockMemory, BlockSize, Digest, EncodedBlock, WholeBlock};

use super::error::{Error, ErrorKind, Result};
use super::plan::DiskPlan;
use super::run::Stages;
use crate::probe::Probe;

/// Bytes of a block, the size that Xen Orchestra writes.
pub(super) const BLOCK: usize = 2 << 20;
/// Bytes compared at a time.
const PIECE: usize = 64 << 10;
static ZEROES: LazyLock<Arc<WholeBlock>> =
    LazyLock::new(|| Arc::new(WholeBlock::copy_of(&[0; BLOCK], BlockSize::DEFAULT).expect("as long as a block")));

/// How blocks of a disk were compared with the base.
#[derive(Default)]
pub(super) struct Compared {
    by_digest: AtomicU64,
    by_bytes: AtomicU64,
}

impl Compared {
    /// Returns how many were compared by digest, and how many by bytes.
    pub fn counts(&self) -> (u64, u64) {
        (self.by_digest.load(Ordering::Relaxed), self.by_bytes.load(Ordering::Relaxed))
    }
}

/// A block of the source; `None` for zeroes.
pub(super) struct Block {
    pub index: BlockIndex,
    pub len: usize,
    pub data: Option<Arc<WholeBlock>>,
    /// What of it was read, if the rest is as in the base and nobody needs it.
    pub changed: Option<Vec<Range<usize>>>,
    /// Made when it is first asked for.
    digest: OnceLock<Digest>,
}

impl Block {
    /// Makes a block of `len` bytes: what was read to `memory`, or zeroes.
    pub fn new(index: BlockIndex, len: usize, memory: Option<BlockMemory>) -> Self {
        let data = memory.map(|memory| Arc::new(WholeBlock::new(memory)));
        Self { index, len, data, changed: None, digest: OnceLock::new() }
    }

    pub fn digest(&self, probe: &Probe) -> Digest {
        *self.digest.get_or_init(|| match &self.data {
            Some(data) => {
                probe.add(self.len);
                probe.work(|| Digest::of(data.data(), BlockSize::DEFAULT))
            }
            None => Digest::of_zeroes(BlockSize::DEFAULT),
        })
    }

    pub fn bytes(&self) -> &[u8] {
        &self.whole().data()[..self.len]
    }

    fn whole(&self) -> &Arc<WholeBlock> {
        self.data.as_ref().unwrap_or(&ZEROES)
    }
}

/// Returns a block as `plan` stores it.
pub(super) fn encode(plan: &DiskPlan, block: &Block) -> Result<EncodedBlock> {
    let failed = |error: vhd::FormatError| Error::new(ErrorKind::Source, error.reason);
    plan.layer.encode(plan.format, block.index, block.whole()).map_err(failed)
}

/// Returns where a block begins and how many bytes of a disk of `size` bytes it has.
pub(super) fn place(index: BlockIndex, size: u64) -> (u64, usize) {
    let offset = u64::from(index.0) * BLOCK as u64;
    (offset, usize::try_from(size.saturating_sub(offset)).unwrap_or(usize::MAX).min(BLOCK))
}

/// Whether a block is to be stored: in a key if it is not all zeroes, in an increment if the base has other bytes there. What
/// lies past the end of the base is zero.
///
/// What the base has is told by its digest, if that is known, else read.
pub(super) fn is_needed(
    plan: &DiskPlan,
    block: &Block,
    scratch: &mut Vec<u8>,
    stages: &Stages,
    compared: &Compared,
) -> Result<bool> {
    let is_same = |other: &[u8]| is_equal(block.bytes(), other);
    let Some(base) = &plan.base else {
        return Ok(block.data.is_some() && !stages.compare.work(|| is_same(&ZEROES.data()[..block.len])));
    };
    if base.has(block.index.0.into()) {
        return Ok(false);
    }
    if let Some(digest) = base.digests.as_ref().and_then(|digests| digests.of_read(block.index)) {
        compared.by_digest.fetch_add(1, Ordering::Relaxed);
        return Ok(digest != block.digest(&stages.hash));
    }
    compared.by_bytes.fetch_add(1, Ordering::Relaxed);
    stages.compare.work(|| {
        let (offset, there) = place(block.index, base.disk.size());
        let there = there.min(block.len);
        scratch.resize(block.len, 0);
        if there > 0 {
            base.disk.read_at(offset, &mut scratch[..there])?;
        }
        scratch[there..].fill(0);
        Ok(!is_same(scratch))
    })
}

/// Whether two pieces of memory are equal; ends soon where they are not.
fn is_equal(a: &[u8], b: &[u8]) -> bool {
    a.len() == b.len() && a.chunks(PIECE).zip(b.chunks(PIECE)).all(|(a, b)| a == b)
}
