//! Whether there is room, before anything is written.
//!
//! If there is not enough for all blocks as they are, some that are spread over each disk are read, compared and encoded as they
//! would be; what they take stands for the rest. So it is an estimate: what turns out to need more ends with a full disk, and
//! then what was written is removed.

use storage::WritableStorage;
use vhd::{BlockIndex, BlockSize, Filter, Format};

use super::block::{Compared, encode, is_needed};
use super::error::{Error, ErrorKind, Result};
use super::feed::Feed;
use super::intake::{Taken, read_block};
use super::plan::DiskPlan;
use super::run::Stages;
use super::wanted::Reserve;
use crate::repository;

/// Blocks of a disk that are looked at.
const SAMPLES: u64 = 16;
/// Bytes of a block, as it is stored, at most: what cannot be compressed becomes longer by some headers.
const BLOCK_AT_MOST: u64 = (2 << 20) + 4096;
/// To which part compressed blocks are taken to shrink that come only once, so that none can be looked at before.
const COMPRESSED_TO: u64 = 2;
/// What is left free unless it is said otherwise: a part of what is free, at most this many bytes.
const RESERVE: u64 = 1 << 30;
const RESERVE_PART: u64 = 20;
/// The same of files and folders.
const RESERVE_INODES: u64 = 1000;
/// Bytes of what an XVA has beside it, about: checksum, metadata, intent.
const XVA_BESIDE: u64 = 64 << 10;

/// What a backup will take.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Estimate {
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

/// The blocks that disks may have to store; none of a stream, of which nothing is known.
pub(super) struct Needs<'a>(Vec<(&'a Feed, &'a DiskPlan, Vec<u32>)>);

impl<'a> Needs<'a> {
    pub fn of(disks: impl Iterator<Item = (&'a Feed, &'a DiskPlan)>) -> Result<Self> {
        disks
            .map(|(feed, plan)| Ok((feed, plan, feed.candidates(&[plan], false)?.all)))
            .collect::<Result<_>>()
            .map(Self)
    }

    /// What they will take if each block has to be stored, and none can be compressed.
    pub fn at_most(&self) -> Estimate {
        let mut sum = Estimate::default();
        for (_, plan, candidates) in &self.0 {
            let blocks = candidates.len() as u64;
            sum.add(plan, blocks, blocks * BLOCK_AT_MOST);
        }
        sum
    }

    /// What they will take, as far as some of the blocks tell; of those that come only once, and are compressed, about.
    pub fn estimate(&self) -> Result<Estimate> {
        let mut sum = Estimate::default();
        for (feed, plan, candidates) in &self.0 {
            let all = candidates.len() as u64;
            let Feed::Random { disk, changed } = feed else {
                // How much of a disk differs that comes as a whole is not known before it came.
                if plan.base.is_some() && feed.changed().is_none() {
                    continue;
                }
                let is_compressed = !matches!(plan.format, Format::File | Format::Exploded(Filter::None));
                let block = if is_compressed { BLOCK_AT_MOST / COMPRESSED_TO } else { BLOCK_AT_MOST };
                sum.add(plan, all, all * block);
                continue;
            };
            let every = all.div_ceil(SAMPLES).max(1);
            let (mut looked, mut stored, mut bytes) = (0, 0, 0);
            for block in candidates.iter().step_by(usize::try_from(every).unwrap_or(usize::MAX)) {
                looked += 1;
                let base = Some(plan.base.iter());
                // What is looked at here comes again: it is planning.
                let (stages, taken) = (Stages::unseen(), Taken::default());
                let block = read_block(
                    disk.as_ref(),
                    changed.as_deref(),
                    BlockIndex(*block),
                    base,
                    Vec::new(),
                    &stages.read,
                    &taken,
                )?;
                if is_needed(plan, &block, &mut Vec::new(), &stages, &Compared::default())? {
                    stored += 1;
                    bytes += encode(plan, &block)?.bytes().len() as u64;
                }
            }
            let scale = |sampled: u64| sampled * all / looked.max(1);
            sum.add(plan, scale(stored), scale(bytes));
        }
        Ok(sum)
    }
}

impl Estimate {
    /// What the XVA of a full backup takes, of `size` bytes.
    pub fn of_xva(size: u64) -> Self {
        Self { blocks: 0, bytes: size.saturating_add(XVA_BESIDE), inodes: 5 }
    }

    fn add(&mut self, plan: &DiskPlan, blocks: u64, bytes: u64) {
        let table = u64::from(plan.layer.block_count()) * 4 + 4096;
        self.blocks += blocks;
        match plan.format {
            Format::File => {
                self.bytes += bytes + table;
                self.inodes += 4;
            }
            Format::Exploded(_) => {
                // A file takes whole pages, and its inode some room.
                self.bytes += bytes + blocks * 4096 + table;
                self.inodes += blocks + u64::from(plan.layer.block_count()).div_ceil(1000).min(blocks) + 12;
            }
        }
    }
}

/// Refuses what the storage has no room for.
pub(super) fn check(
    storage: &dyn WritableStorage,
    estimate: Estimate,
    reserve: Reserve,
    is_exploded: bool,
) -> Result<()> {
    let room = storage.room()?;
    let kept = reserve.bytes.unwrap_or_else(|| RESERVE.min(room.bytes / RESERVE_PART));
    let free = room.bytes.saturating_sub(kept);
    if estimate.bytes > free {
        let blocks = match estimate.blocks {
            0 => String::new(),
            count => format!(" ({count} blocks of {} MiB)", mebibytes(BlockSize::DEFAULT.bytes())),
        };
        let way = if reserve.is_option {
            "forget old backups, make room, or lower --reserve"
        } else {
            "forget old backups or make room"
        };
        let message = format!(
            "too little room: about {} MiB are needed{blocks}, {} MiB are free and {} MiB of them kept as the reserve; {way}",
            mebibytes(estimate.bytes),
            mebibytes(room.bytes),
            mebibytes(kept)
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
    match storage.room() {
        Ok(room) if error.kind() == ErrorKind::Repository(repository::ErrorKind::Unavailable) && room.is_full() => {
            error.and("the place is full: forget old backups or make room")
        }
        _ => error,
    }
}

fn mebibytes(bytes: u64) -> u64 {
    bytes.div_ceil(1 << 20)
}
