//! What the device mapper makes of disks by metadata of its own: thin volumes, snapshots, caches.
//!
//! ```text
//! thin      metadata (B-trees) ─► chunks of the pool's data; elsewhere an external origin, or a hole
//! snapshot  store (a list)     ─► chunks of the store itself; elsewhere the origin
//! cache     metadata (array)   ─► chunks of the cache's data; elsewhere the origin
//! ```
//!
//! A volume can have millions of such chunks, so they are no [`Map`](crate::Map): a layer is a filesystem of one file
//! ([`GuestFs`]), of which the [extents](GuestFs::extents) are asked for as they are needed, some thousands at a time.

mod blocks;
mod cache;
mod snapshot;
mod thin;

use std::sync::{Arc, Mutex, PoisonError};

use disk::{Disk, ErrorKind as DiskErrorKind};
use serde::{Deserialize, Serialize};

use crate::{Attributes, Entry, Error, ErrorKind, Extent, Extents, Facts, GuestFs, Inode, Kind, Result, Source, Xattr};

/// What a layer does with its members.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Layer {
    /// A volume of a thin pool. Members: the metadata of the pool, its data, and the origin of what was never written, if it
    /// has one.
    Thin {
        /// The number that the pool knows it by.
        device: u32,
    },
    /// A snapshot as the device mapper always had it. Members: the store of its exceptions, the origin.
    Snapshot,
    /// A volume in front of which a cache is. Members: the metadata of the cache, its data, the origin.
    Cache,
}

/// Pieces of metadata, of 64 KiB at most, that a layer may read before it can say anything: a snapshot with chunks of 4 KiB has
/// exceptions of 32 GiB in so many.
const MAX_INDEX: usize = 1 << 15;

/// Exceptions of a snapshot, or chunks in a cache, at most: 16 bytes of memory each.
const MAX_CHUNKS: usize = 8 << 20;

impl Layer {
    /// The number of the only file.
    pub const VOLUME: Inode = Inode(0);

    /// Returns whether it can have so many members.
    #[must_use]
    pub fn has_members(self, count: usize) -> bool {
        match self {
            Self::Thin { .. } => (2..=3).contains(&count),
            Self::Snapshot => count == 2,
            Self::Cache => count == 3,
        }
    }

    /// Opens a volume of `size` bytes, as the only file of a filesystem: its root.
    ///
    /// # Errors
    /// What is wrong with its metadata; `Unsupported` if they are of a kind that is not read.
    pub fn open(self, size: u64, members: Vec<Arc<dyn Disk>>) -> Result<Box<dyn GuestFs>> {
        Ok(Box::new(Layered::open(self, size, members, &mut MAX_INDEX.clone())?))
    }

    /// Opens a volume of `size` bytes as a disk.
    ///
    /// # Errors
    /// As for [`Layer::open`].
    pub fn disk(self, size: u64, members: Vec<Arc<dyn Disk>>) -> Result<Arc<dyn Disk>> {
        Ok(Arc::new(Layered::open(self, size, members, &mut MAX_INDEX.clone())?))
    }
}

/// Chunks that follow each other, in the volume and where their bytes lie.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Run {
    /// The first of them.
    chunk: u64,
    count: u64,
    /// Where that lies.
    place: u64,
}

impl Run {
    /// Appends a chunk to runs, to the last of them if it continues that.
    fn add(runs: &mut Vec<Self>, chunk: u64, place: u64) {
        match runs.last_mut() {
            Some(last)
                if last.chunk.checked_add(last.count) == Some(chunk)
                    && last.place.checked_add(last.count) == Some(place) =>
            {
                last.count += 1;
            }
            _ => runs.push(Self { chunk, count: 1, place }),
        }
    }
}

/// Which chunks of a volume lie elsewhere than their surroundings.
trait Chunks: Send + Sync {
    /// Returns those from chunk `from` on, about `room` runs at most, and up to which chunk there are no others.
    fn runs(&self, from: u64, room: usize) -> Result<(Vec<Run>, u64)>;

    /// How many there are.
    fn count(&self) -> u64;

    /// What is not as it should be.
    fn problem(&self) -> Option<String> {
        None
    }
}

/// Chunks that are all in memory, in ascending order.
struct Index(Vec<(u64, u64)>);

impl Index {
    /// Sorts chunks, each of which must be there once.
    fn new(mut chunks: Vec<(u64, u64)>) -> Result<Self> {
        chunks.sort_unstable();
        match chunks.windows(2).find(|pair| pair[0].0 == pair[1].0) {
            Some(pair) => Err(Error::damaged(format!("its chunk {} is in two places", pair[0].0))),
            None => Ok(Self(chunks)),
        }
    }
}

impl Chunks for Index {
    fn runs(&self, from: u64, room: usize) -> Result<(Vec<Run>, u64)> {
        let first = self.0.partition_point(|(chunk, _)| *chunk < from);
        let mut runs = vec![];
        for (chunk, place) in &self.0[first..] {
            if runs.len() > room {
                return Ok((runs, *chunk));
            }
            Run::add(&mut runs, *chunk, *place);
        }
        Ok((runs, u64::MAX))
    }

    fn count(&self) -> u64 {
        self.0.len() as u64
    }
}

/// What a layer's metadata says.
struct Opened {
    chunks: Box<dyn Chunks>,
    /// In bytes, never 0.
    chunk_size: u64,
    /// Which member the chunks lie on.
    data: u16,
    /// Which member all else lies on; it is a hole without.
    base: Option<u16>,
}

/// A layer over its members.
pub(crate) struct Layered {
    opened: Opened,
    size: u64,
    members: Vec<Arc<dyn Disk>>,
    /// What was asked for last, for who reads on.
    last: Mutex<Option<Arc<(u64, Extents)>>>,
}

impl Layered {
    /// Opens a volume of `size` bytes; `room` says how many blocks of metadata may be read for it, and is lowered.
    pub(crate) fn open(layer: Layer, size: u64, members: Vec<Arc<dyn Disk>>, room: &mut usize) -> Result<Self> {
        let opened = match (layer, &members[..]) {
            (Layer::Thin { device }, [metadata, _, rest @ ..]) if rest.len() <= 1 => {
                let (thin, chunk_size) = thin::Thin::open(metadata.clone(), device)?;
                let base = (!rest.is_empty()).then_some(2);
                Opened { chunks: Box::new(thin), chunk_size, data: 1, base }
            }
            (Layer::Snapshot, [store, _]) => {
                let (index, chunk_size) = snapshot::read(&**store, room)?;
                Opened { chunks: Box::new(index), chunk_size, data: 0, base: Some(1) }
            }
            (Layer::Cache, [metadata, _, _]) => {
                let (index, chunk_size) = cache::read(metadata.clone(), room)?;
                Opened { chunks: Box::new(index), chunk_size, data: 1, base: Some(2) }
            }
            _ => return Err(Error::unsupported(format!("{layer:?} of {} members is not read", members.len()))),
        };
        Ok(Self { opened, size, members, last: Mutex::default() })
    }

    /// What is not as it should be.
    pub(crate) fn problem(&self) -> Option<String> {
        self.opened.chunks.problem()
    }

    fn member_size(&self, member: u16) -> u64 {
        self.members.get(usize::from(member)).map_or(0, |member| member.size())
    }

    /// Returns extents from `from` on, about `room` at most.
    fn extents_from(&self, from: u64, room: usize) -> Result<Extents> {
        let Opened { chunks, chunk_size, data, .. } = &self.opened;
        if from >= self.size {
            return Ok(Extents { found: vec![], until: u64::MAX });
        }
        let (runs, until) = chunks.runs(from / chunk_size, room)?;
        let until = until.saturating_mul(*chunk_size).min(self.size);
        let (mut found, mut at) = (vec![], from);
        for run in runs {
            let past = || Error::damaged(format!("its chunk {} lies past the end of its data", run.chunk));
            let start = run.chunk.saturating_mul(*chunk_size);
            let end = run.chunk.saturating_add(run.count).saturating_mul(*chunk_size).min(until);
            let start = start.max(at);
            if start >= end {
                continue;
            }
            self.base(at, start, &mut found);
            let place = run.place.checked_mul(*chunk_size).and_then(|place| {
                let place = place.checked_add(start - run.chunk.saturating_mul(*chunk_size))?;
                let is_there = place.checked_add(end - start)? <= self.member_size(*data);
                is_there.then_some(place)
            });
            found.push(Extent { start, len: end - start, source: Source::Member(*data, place.ok_or_else(past)?) });
            at = end;
        }
        self.base(at, until, &mut found);
        Ok(Extents { found, until: if until == self.size { u64::MAX } else { until } })
    }

    /// Adds what lies between chunks, as far as the base has it.
    fn base(&self, start: u64, end: u64, found: &mut Vec<Extent>) {
        let Some(base) = self.opened.base else { return };
        let end = end.min(self.member_size(base));
        if start < end {
            found.push(Extent { start, len: end - start, source: Source::Member(base, start) });
        }
    }

    /// Returns where the bytes from `at` on lie, and how many of them: a member and an offset, `None` in a hole.
    fn piece(&self, at: u64, len: u64) -> Result<(Option<(u16, u64)>, u64)> {
        /// Extents that a reader asks for at once.
        const ROOM: usize = 512;
        let known = self.last.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let known = known.filter(|known| (known.0..known.1.until).contains(&at));
        let part = match known {
            Some(known) => known,
            None => {
                let part = Arc::new((at, self.extents_from(at, ROOM)?));
                *self.last.lock().unwrap_or_else(PoisonError::into_inner) = Some(part.clone());
                part
            }
        };
        let Extents { found, until } = &part.1;
        let next = found.partition_point(|extent| extent.start + extent.len <= at);
        let len = len.min(until - at);
        Ok(match found.get(next) {
            Some(Extent { start, len: there, source: Source::Member(member, place) }) if *start <= at => {
                (Some((*member, place + (at - start))), len.min(there - (at - start)))
            }
            Some(extent) => (None, len.min(extent.start - at)),
            None => (None, len),
        })
    }
}

impl Disk for Layered {
    fn size(&self) -> u64 {
        self.size
    }

    fn read_at(&self, mut offset: u64, mut buffer: &mut [u8]) -> disk::Result<()> {
        if offset.checked_add(buffer.len() as u64).is_none_or(|end| end > self.size) {
            let message = format!("{} bytes at {offset} do not lie within {} bytes", buffer.len(), self.size);
            return Err(disk::Error::new(DiskErrorKind::OutOfRange, message));
        }
        while !buffer.is_empty() {
            let (place, len) = self.piece(offset, buffer.len() as u64).map_err(disk_error)?;
            let (here, rest) = buffer.split_at_mut(usize::try_from(len).expect("no more than the buffer"));
            match place {
                Some((member, at)) => self.members[usize::from(member)].read_at(at, here)?,
                None => here.fill(0),
            }
            offset += len;
            buffer = rest;
        }
        Ok(())
    }

    fn extent_at(&self, offset: u64) -> disk::Result<disk::Extent> {
        if offset >= self.size {
            let message = format!("{offset} does not lie within {} bytes", self.size);
            return Err(disk::Error::new(DiskErrorKind::OutOfRange, message));
        }
        match self.piece(offset, self.size - offset).map_err(disk_error)? {
            (Some((member, at)), len) => {
                let below = self.members[usize::from(member)].extent_at(at)?;
                Ok(disk::Extent { len: below.len.min(len), ..below })
            }
            (None, len) => Ok(disk::Extent { len, is_hole: true }),
        }
    }
}

/// What is wrong with a layer, in the words of disks.
fn disk_error(error: Error) -> disk::Error {
    let kind = match error.kind() {
        ErrorKind::Disk => DiskErrorKind::Unavailable,
        ErrorKind::Unsupported => DiskErrorKind::Unsupported,
        _ => DiskErrorKind::Damaged,
    };
    disk::Error::new(kind, error.to_string())
}

impl GuestFs for Layered {
    fn root(&self) -> Inode {
        Layer::VOLUME
    }

    fn facts(&self) -> Facts {
        Facts { problems: self.problem().into_iter().collect(), ..Facts::default() }
    }

    fn list(&self, _: Inode) -> Result<Vec<Entry>> {
        Err(Error::new(ErrorKind::WrongKind, "a volume has no names in it"))
    }

    fn attributes(&self, _: Inode) -> Result<Attributes> {
        let never = crate::Time::default();
        let Opened { chunks, chunk_size, .. } = &self.opened;
        Ok(Attributes {
            kind: Kind::File,
            mode: 0o400,
            uid: 0,
            gid: 0,
            links: 1,
            size: self.size,
            allocated: chunks.count().saturating_mul(*chunk_size).min(self.size),
            device: (0, 0),
            accessed: never,
            modified: never,
            changed: never,
            created: None,
        })
    }

    fn target(&self, _: Inode) -> Result<Vec<u8>> {
        Err(Error::new(ErrorKind::WrongKind, "a volume is no link"))
    }

    fn xattrs(&self, _: Inode) -> Result<Vec<Xattr>> {
        Ok(vec![])
    }

    fn extents(&self, _: Inode, from: u64, room: usize) -> Result<Extents> {
        self.extents_from(from, room)
    }
}

#[cfg(test)]
mod tests;
