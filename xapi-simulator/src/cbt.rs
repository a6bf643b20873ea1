//! Changed block tracking: a log of what was written, per disk and snapshot, and the bitmaps made of them.
//!
//! ```text
//!   log of snapshot 1  ◄──parent──  log of snapshot 2  ◄──parent──  log of the live disk
//!   written before 1                written between 1 and 2          written since 2
//! ```
//!
//! At a snapshot the live disk's log becomes the snapshot's, and the live disk starts a new one. Logs have nothing to do
//! with layers: coalescing leaves them alone, and a snapshot whose data was destroyed keeps its log. The log of a
//! snapshot that is gone is part of the next one's.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::layer::RUN_BYTES;

/// Names each log, so that one is known again after its disk was cloned for reading.
static NEXT: AtomicU64 = AtomicU64::new(0);

/// What was written to a disk between two snapshots.
#[derive(Debug, Clone)]
pub struct Log {
    number: u64,
    parent: Option<Arc<Log>>,
    size: u64,
    /// Most significant bit of byte 0 is the first run of 64 KiB.
    bits: Vec<u8>,
    is_consistent: bool,
}

impl Log {
    pub(crate) fn new(size: u64, parent: Option<Arc<Log>>) -> Self {
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        Self { number, parent, size, bits: vec![0; bitmap_bytes(size)], is_consistent: true }
    }

    /// Notes that bytes were written, or zeroed; `length` is not 0 and the range is within the disk.
    pub(crate) fn mark(&mut self, offset: u64, length: u64) {
        let last = (offset + length - 1) / RUN_BYTES as u64;
        for run in offset / RUN_BYTES as u64..=last {
            let byte = usize::try_from(run / 8).expect("a bitmap fits into memory");
            self.bits[byte] |= 0x80 >> (run % 8);
        }
    }

    pub(crate) fn grow(&mut self, size: u64) {
        self.size = size;
        self.bits.resize(bitmap_bytes(size), 0);
    }

    /// Makes the log unusable, as a crash of its host does.
    pub(crate) fn break_off(&mut self) {
        self.is_consistent = false;
    }

    /// Takes in the logs of snapshots that are gone: those that no one but this log refers to.
    pub(crate) fn fold(&mut self) {
        while let Some(parent) = self.parent.take_if(|parent| Arc::strong_count(parent) == 1) {
            merge(&mut self.bits, &parent.bits);
            self.is_consistent &= parent.is_consistent;
            self.parent.clone_from(&parent.parent);
        }
    }
}

/// Why there is no bitmap.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unavailable {
    /// The same disk, unrelated ones, a chain that is broken, or tracking off on either: `SR_BACKEND_FAILURE_460`.
    Unrelated(&'static str),
    /// The logs contradict each other, or their host crashed: `SR_BACKEND_FAILURE_459`.
    Inconsistent(&'static str),
}

impl Unavailable {
    /// Returns the storage manager's number of the error.
    pub fn number(self) -> u32 {
        match self {
            Self::Unrelated(_) => 460,
            Self::Inconsistent(_) => 459,
        }
    }

    /// Returns what it says of the error.
    pub fn text(self) -> &'static str {
        match self {
            Self::Unrelated(text) | Self::Inconsistent(text) => text,
        }
    }
}

/// Returns what changed after `from`, up to and including what `to` has logged.
///
/// One bit per 64 KiB, the most significant bit of byte 0 first; it has the size of `to`.
/// `None` is a disk whose blocks are not tracked.
///
/// # Errors
/// As [`Unavailable`] says.
pub fn changed_blocks(from: Option<&Log>, to: Option<&Log>) -> Result<Vec<u8>, Unavailable> {
    let (Some(from), Some(to)) = (from, to) else {
        return Err(Unavailable::Unrelated("changed block tracking is not enabled on both disks"));
    };
    if from.number == to.number {
        return Err(Unavailable::Unrelated("source and target are the same disk"));
    }
    let mut bits = vec![0; to.bits.len()];
    let mut log = to;
    while log.number != from.number {
        if !log.is_consistent {
            return Err(Unavailable::Inconsistent("a log between the disks was not closed"));
        }
        if log.size > to.size {
            return Err(Unavailable::Inconsistent("the disk became smaller"));
        }
        merge(&mut bits, &log.bits);
        log = log.parent.as_deref().ok_or(Unavailable::Unrelated("the disks are not in one chain of logs"))?;
    }
    if from.size > to.size {
        return Err(Unavailable::Inconsistent("the disk became smaller"));
    }
    Ok(bits)
}

/// Returns the bytes of the bitmap of a disk of `size` bytes.
pub fn bitmap_bytes(size: u64) -> usize {
    usize::try_from(size.div_ceil(RUN_BYTES as u64).div_ceil(8)).expect("a bitmap fits into memory")
}

fn merge(into: &mut [u8], from: &[u8]) {
    for (own, other) in into.iter_mut().zip(from) {
        *own |= other;
    }
}
