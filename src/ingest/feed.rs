//! How the blocks of a disk get to those who store them: which, in what order, and out of what.
//!
//! | feed | blocks | bytes of a block |
//! |------|--------|------------------|
//! | random | all but what is a hole everywhere, by several threads | read |
//! | random, with changes | those with a piece that may have changed | these pieces are read; the others are the base's |
//! | listed | those that come; without a base also those that are zero now and were not | come once, ascending |
//! | stream | all | come once, ascending, to an end that nobody knows |
//!
//! `intake` reads them.

use std::fs::File;
use std::sync::{Arc, Mutex};

use disk::Disk;
use uuid::Uuid;
use vhd::BlockSize;

use super::block::BLOCK;
use super::changes::PieceSet;
use super::error::{Error, ErrorKind, Result};
use super::intake::Taken;
use super::plan::DiskPlan;
use super::pool::{Access, Blocks, PoolDisk};
use super::source::Source;
use crate::probe::Way;

/// Threads that read a disk, whatever it asks for; each holds a block.
const MOST_READERS: usize = 16;

/// A disk that is read once, for all destinations.
pub(super) enum Feed {
    /// At any offset.
    Random {
        disk: Arc<dyn Disk>,
        /// What may differ from the base.
        changed: Option<Arc<PieceSet>>,
    },
    /// Blocks of a pool, in order.
    Listed {
        /// Until they are read.
        blocks: Mutex<Option<Box<dyn Blocks>>>,
        /// Their numbers, ascending.
        listed: Vec<u32>,
        /// What may differ from the base, if they are what does; else the others are zero.
        changed: Option<Arc<PieceSet>>,
        /// Of the disk, in bytes.
        size: u64,
    },
    /// Raw bytes.
    Stream(Arc<Mutex<File>>),
}

impl Feed {
    /// Begins to read a source, relative to `base`, a snapshot and its size in bytes, if that can be; returns also how, in words, and as who
    /// asks what would be faster sees it.
    ///
    /// # Errors
    /// What a disk of a pool says; [`ErrorKind::Source`] if it is not what was asked for, or [`ErrorKind::Difference`] if only
    /// what it says of the base is not.
    pub fn open(source: &Source, base: Option<(Uuid, u64)>) -> Result<(Self, String, Way)> {
        match source {
            Source::Disk(disk) => {
                Ok((Self::Random { disk: disk.clone(), changed: None }, "image".to_owned(), Way::Only))
            }
            Source::Stream(stream) => Ok((Self::Stream(stream.clone()), "stream".to_owned(), Way::Only)),
            Source::Pool(disk) => Self::open_pool(disk.as_ref(), base),
        }
    }

    fn open_pool(disk: &dyn PoolDisk, base: Option<(Uuid, u64)>) -> Result<(Self, String, Way)> {
        let (base, base_size) = base.map_or((None, 0), |(uuid, size)| (Some(uuid), size));
        let (size, opened) = (disk.size(), disk.open(base)?);
        let kind = if base.is_some() { ErrorKind::Difference } else { ErrorKind::Source };
        let wrong = |kind, what: String| Err(Error::new(kind, format!("the pool's disk ({}) {what}", opened.way)));
        let feed = match opened.access {
            Access::Random { disk, .. } if disk.size() != size => {
                return wrong(ErrorKind::Source, format!("has {} bytes, {size} were expected", disk.size()));
            }
            Access::Random { changed: Some(changed), .. } if base.is_none() || changed.size() != size => {
                let what = format!("comes with changes of {} bytes since {base:?}, of {size} bytes", changed.size());
                return wrong(kind, what);
            }
            Access::Random { disk, mut changed } => {
                // What the base does not have differs from it.
                changed.iter_mut().for_each(|changed| changed.insert(base_size, u64::MAX));
                Self::Random { disk, changed: changed.map(Arc::new) }
            }
            Access::Sequential { since, .. } if since.is_some() && since != base => {
                return wrong(kind, format!("is what differs from {since:?}, and {base:?} was asked for"));
            }
            Access::Sequential { blocks, since } => {
                let listed = blocks.listed().to_vec();
                let count = BlockSize::DEFAULT.block_count(size);
                if !listed.is_sorted_by(|a, b| a < b) || listed.last().is_some_and(|last| u64::from(*last) >= count) {
                    let kind = if since.is_some() { kind } else { ErrorKind::Source };
                    return wrong(kind, format!("lists blocks that are not those of a disk of {size} bytes, in order"));
                }
                let changed = since.and_then(|_| PieceSet::new(size)).map(|mut changed| {
                    listed.iter().for_each(|block| changed.insert(u64::from(*block) * BLOCK as u64, BLOCK as u64));
                    Arc::new(changed)
                });
                if since.is_some() && changed.is_none() {
                    return wrong(kind, format!("has {size} bytes, more than any backup may have"));
                }
                Self::Listed { blocks: Mutex::new(Some(blocks)), listed, changed, size }
            }
        };
        Ok((feed, opened.way, opened.by))
    }

    /// Returns the size of the disk in bytes; `None` if it is known only at the end.
    pub fn size(&self) -> Option<u64> {
        match self {
            Self::Random { disk, .. } => Some(disk.size()),
            Self::Listed { size, .. } => Some(*size),
            Self::Stream(_) => None,
        }
    }

    /// Returns what may differ from the base that it was opened with, if that is all that is read.
    pub fn changed(&self) -> Option<&Arc<PieceSet>> {
        match self {
            Self::Random { changed, .. } | Self::Listed { changed, .. } => changed.as_ref(),
            Self::Stream(_) => None,
        }
    }

    /// Whether it is one transfer of what differs from a base, which the pool may have no way to make.
    pub fn is_difference(&self) -> bool {
        matches!(self, Self::Listed { changed: Some(_), .. })
    }

    /// Returns the blocks that are read to be stored as `plans` say, and to be sent to replicas if there are any. None of a stream,
    /// of which nothing is known.
    pub fn candidates(&self, plans: &[&DiskPlan], has_replicas: bool) -> Result<Candidates> {
        let changed = self.changed().map(Arc::as_ref);
        let find = |size, is_hole: &mut dyn FnMut(u64) -> Result<bool>| {
            Candidates::find(size, plans, changed, has_replicas, is_hole)
        };
        match self {
            Self::Random { disk, .. } => {
                let mut holes = Holes::new(disk.as_ref());
                find(disk.size(), &mut |block| holes.covers(block).map_err(|error| of_source(&error)))
            }
            Self::Listed { listed, size, .. } => {
                let mut left = listed.iter().peekable();
                find(*size, &mut |block| {
                    while left.next_if(|listed| u64::from(**listed) < block).is_some() {}
                    Ok(left.peek().is_none_or(|listed| u64::from(**listed) != block))
                })
            }
            Self::Stream(_) => Ok(Candidates::default()),
        }
    }

    /// Compares some of what is said to be as in the base, where nothing else would show that it is not. A list of blocks is made
    /// of what is stored, and can be compared with nothing.
    ///
    /// # Errors
    /// [`ErrorKind::Difference`] if it is not; [`ErrorKind::Source`] if it cannot be read.
    pub fn spot_check(&self, base: &dyn Disk, taken: &Taken) -> Result<()> {
        match self {
            Self::Random { disk, changed: Some(changed) } => changed.spot_check(disk.as_ref(), base, taken),
            _ => Ok(()),
        }
    }

    /// Returns how many threads read it with profit.
    pub fn readers(&self) -> usize {
        match self {
            Self::Random { disk, .. } => disk.reads_at_once().clamp(1, MOST_READERS),
            Self::Listed { .. } | Self::Stream(_) => 1,
        }
    }
}

/// The blocks of a disk that are read, ascending.
#[derive(Debug, Default)]
pub(super) struct Candidates {
    /// All of them.
    pub all: Vec<u32>,
    /// Those that each replica gets: what may differ from the base, or else what is no hole.
    pub replicated: Vec<u32>,
}

impl Candidates {
    /// Finds those of a disk of `size` bytes: to be stored may have to be all but those that are holes in the source and in each
    /// base, or are known to be the same in each base. `is_hole` is asked for them in ascending order.
    fn find(
        size: u64,
        plans: &[&DiskPlan],
        changed: Option<&PieceSet>,
        has_replicas: bool,
        is_hole: &mut dyn FnMut(u64) -> Result<bool>,
    ) -> Result<Self> {
        let is_same = |block: u64| plans.iter().all(|plan| plan.base.as_ref().is_some_and(|base| base.has(block)));
        let mut bases: Vec<Holes> =
            plans.iter().filter_map(|plan| Some(Holes::new(plan.base.as_ref()?.disk.as_ref()))).collect();
        let mut found = Self::default();
        let count = u32::try_from(BlockSize::DEFAULT.block_count(size));
        for block in 0..count.map_err(|_| of_source(&too_large(size)))? {
            let number = u64::from(block);
            let may_be_stored = !is_same(number);
            let may_be_sent = has_replicas && changed.is_none_or(|changed| changed.touches(number));
            if !may_be_stored && !may_be_sent {
                continue;
            }
            let is_hole = is_hole(number)?;
            // What a base does not say is found out when it is read.
            let is_stored =
                may_be_stored && (!is_hole || bases.iter_mut().any(|base| !matches!(base.covers(number), Ok(true))));
            let is_sent = may_be_sent && (changed.is_some() || !is_hole);
            if is_stored || is_sent {
                found.all.push(block);
            }
            if is_sent {
                found.replicated.push(block);
            }
        }
        Ok(found)
    }
}

fn too_large(size: u64) -> disk::Error {
    let message = format!("a disk of {size} bytes has more blocks than can be counted");
    disk::Error::new(disk::ErrorKind::Unsupported, message)
}

/// Makes the error of a source that cannot be read.
pub(super) fn of_source(error: &disk::Error) -> Error {
    let is_broken = error.kind() == disk::ErrorKind::Unavailable;
    Error::new(if is_broken { ErrorKind::Broken } else { ErrorKind::Source }, error.to_string())
}

/// The holes of a disk, asked for in ascending order.
struct Holes<'a> {
    disk: &'a dyn Disk,
    from: u64,
    until: u64,
    is_hole: bool,
}

impl<'a> Holes<'a> {
    fn new(disk: &'a dyn Disk) -> Self {
        Self { disk, from: 0, until: 0, is_hole: false }
    }

    /// Whether a block, by its number, is a hole as far as the disk reaches.
    fn covers(&mut self, block: u64) -> disk::Result<bool> {
        let mut at = block * BLOCK as u64;
        let end = (at + BLOCK as u64).min(self.disk.size());
        while at < end {
            if !(self.from..self.until).contains(&at) {
                let extent = self.disk.extent_at(at)?;
                (self.from, self.until, self.is_hole) = (at, at.saturating_add(extent.len), extent.is_hole);
            }
            if !self.is_hole {
                return Ok(false);
            }
            at = self.until;
        }
        Ok(true)
    }
}
