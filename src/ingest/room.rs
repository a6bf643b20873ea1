//! Whether there is room, before anything is written.
//!
//! Blocks spread over each disk are read, compared and encoded as they would be; what they take stands for the rest. So it is
//! an estimate: what turns out to need more ends with a full disk, and then what was written is removed.

use storage::WritableStorage;
use vhd::{BlockIndex, BlockSize, Format};

use super::copy;
use super::error::{Error, ErrorKind, Result};
use super::plan::DiskPlan;
use super::source::Source;

/// Blocks of a disk that are looked at.
const SAMPLES: u64 = 16;
/// What is left free unless it is said otherwise: a part of what is free, at most this many bytes.
const RESERVE: u64 = 1 << 30;
const RESERVE_PART: u64 = 20;
/// The same of files and folders.
const RESERVE_INODES: u64 = 1000;

/// What a backup will take.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Estimate {
    /// Blocks that are stored.
    pub blocks: u64,
    /// Bytes of files.
    pub bytes: u64,
    /// Files and folders.
    pub inodes: u64,
}

/// What a repository may take, whatever the place it lies in has room for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Quota {
    /// Bytes of all its files.
    pub limit: u64,
    /// Those that were there before.
    pub used: u64,
}

impl Quota {
    /// Refuses `bytes` more than the limit; `what` becomes of them.
    pub fn check(self, bytes: u64, what: &str) -> Result<()> {
        if self.used.saturating_add(bytes) <= self.limit {
            return Ok(());
        }
        let message = format!(
            "the quota is exceeded: {} MiB are used, about {} MiB {what}, and {} MiB are allowed; forget old backups (xofs \
             forget --apply), or raise --quota",
            mebibytes(self.used),
            mebibytes(bytes),
            self.limit >> 20
        );
        Err(Error::new(ErrorKind::NoRoom, message))
    }
}

/// Estimates what the disks will take; nothing for a stream, of which nothing is known.
pub(super) fn estimate(sources: &[&Source], plans: &[DiskPlan]) -> Result<Estimate> {
    let mut sum = Estimate::default();
    for (source, plan) in sources.iter().zip(plans) {
        let Source::Disk(disk) = source else { continue };
        let all = copy::candidates(disk.as_ref(), &[plan])?;
        let every = (all.len() as u64).div_ceil(SAMPLES).max(1);
        let (mut looked, mut stored, mut bytes) = (0, 0, 0);
        for block in all.iter().step_by(usize::try_from(every).unwrap_or(usize::MAX)) {
            looked += 1;
            if let Some(encoded) = copy::encoded(disk.as_ref(), plan, BlockIndex(*block))? {
                stored += 1;
                bytes += encoded.bytes().len() as u64;
            }
        }
        let scale = |sampled: u64| sampled * all.len() as u64 / looked.max(1);
        let (blocks, bytes) = (scale(stored), scale(bytes));
        let table = u64::from(plan.layer.block_count()) * 4 + 4096;
        sum.blocks += blocks;
        match plan.format {
            Format::File => {
                sum.bytes += bytes + table;
                sum.inodes += 4;
            }
            Format::Exploded(_) => {
                // A file takes whole pages, and its inode some room.
                sum.bytes += bytes + blocks * 4096 + table;
                sum.inodes += blocks + u64::from(plan.layer.block_count()).div_ceil(1000).min(blocks) + 12;
            }
        }
    }
    Ok(sum)
}

/// Refuses what the storage has no room for.
pub(super) fn check(
    storage: &dyn WritableStorage,
    estimate: Estimate,
    reserve: Option<u64>,
    is_exploded: bool,
) -> Result<()> {
    let room = storage.room()?;
    let reserve = reserve.unwrap_or_else(|| RESERVE.min(room.bytes / RESERVE_PART));
    let free = room.bytes.saturating_sub(reserve);
    if estimate.bytes > free {
        let message = format!(
            "too little room: about {} MiB are needed ({} blocks of {} MiB), {} MiB are free and {} MiB of them kept as the \
             reserve; forget old backups, make room, or lower --reserve",
            mebibytes(estimate.bytes),
            estimate.blocks,
            mebibytes(BlockSize::DEFAULT.bytes()),
            mebibytes(room.bytes),
            mebibytes(reserve)
        );
        return Err(Error::new(ErrorKind::NoRoom, message));
    }
    if let Some(inodes) = room.inodes {
        if estimate.inodes > inodes.saturating_sub(RESERVE_INODES.min(inodes / RESERVE_PART)) {
            let way = if is_exploded { "use --format vhd, which takes one file for a disk, or " } else { "" };
            let message = format!(
                "too few inodes: about {} files are to be made, and the file system has room for {inodes} more; {way}forget \
                 old backups",
                estimate.inodes
            );
            return Err(Error::new(ErrorKind::NoRoom, message));
        }
    }
    Ok(())
}

/// Says of an error while writing that the place is full, if it is.
pub(super) fn explain(storage: &dyn WritableStorage, error: Error) -> Error {
    let is_full =
        |room: storage::Room| room.bytes < 2 * BlockSize::DEFAULT.bytes() || room.inodes.is_some_and(|left| left < 8);
    match storage.room() {
        Ok(room) if matches!(error.kind(), ErrorKind::Repository(_)) && is_full(room) => {
            error.and("the place is full: forget old backups or make room")
        }
        _ => error,
    }
}

fn mebibytes(bytes: u64) -> u64 {
    bytes.div_ceil(1 << 20)
}
