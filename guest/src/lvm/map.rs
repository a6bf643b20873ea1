//! Where the bytes of a logical volume lie: its segments followed down to the physical volumes.

use std::collections::HashMap;
use std::sync::Arc;

use disk::Disk;

use super::group::{Area, Group, Kind, Leg, Logical, Segment};
use crate::map::{Map, Place, SegmentSource, Stripes};
use crate::read::read_within;
use crate::{Error, ErrorKind, Fields, Mapped, Result, map};

/// Logical volumes that are parts of each other; LVM has three.
const MAX_DEPTH: usize = 6;
/// Pieces that all volumes of a survey may be followed to.
pub(super) const MAX_PIECES: usize = 1 << 18;

/// Follows segments of the logical volumes of a group.
pub(super) struct Resolver<'a> {
    pub(super) group: &'a Group,
    /// The maps of physical volumes by their UUID.
    pub(super) physical: &'a HashMap<[u8; 32], Map>,
    pub(super) disks: &'a [Arc<dyn Disk>],
    /// How many pieces more may be made.
    pub(super) room: &'a mut usize,
    /// What was found already.
    pub(super) found: HashMap<String, Result<Map>>,
}

impl Resolver<'_> {
    /// Returns where the bytes of a logical volume lie; `depth` says of how many others it is a part.
    ///
    /// # Errors
    /// Why they cannot be had: `NotFound` if a physical volume is on no disk.
    pub(super) fn logical(&mut self, logical: &Logical, depth: usize) -> Result<Map> {
        if let Some(map) = self.found.get(&logical.name) {
            return map.clone();
        }
        if depth > MAX_DEPTH {
            return Err(Error::damaged("it is part of itself"));
        }
        let map = self.segments(logical, depth);
        self.found.insert(logical.name.clone(), map.clone());
        map
    }

    fn segments(&mut self, logical: &Logical, depth: usize) -> Result<Map> {
        let mut pieces = vec![];
        for segment in logical.segments.as_ref().map_err(Clone::clone)? {
            pieces.extend(self.segment(segment, depth)?);
        }
        Map::new(pieces)
    }

    pub(super) fn bytes(&self, extents: u64) -> Result<u64> {
        let bytes = extents.checked_mul(self.group.extent_size);
        bytes.ok_or_else(|| Error::damaged(format!("{extents} extents are more bytes than there are numbers")))
    }

    fn segment(&mut self, segment: &Segment, depth: usize) -> Result<Vec<map::Segment>> {
        let len = self.bytes(segment.count)?;
        match &segment.kind {
            Kind::Zeroes => Ok(vec![map::Segment { len, source: SegmentSource::Zeroes }]),
            Kind::Striped { stripe_size, areas } => {
                let each = column_len(len, *stripe_size, areas.len())?;
                let columns = areas.iter().map(|area| self.area(area, each, depth)).collect::<Result<Vec<_>>>()?;
                striped(*stripe_size, columns)
            }
            Kind::Mirror(areas) => first_good(areas.iter().map(|area| self.area(area, len, depth))),
            Kind::Raid { stripe_size, columns, legs } => {
                let each = column_len(len, *stripe_size, *columns)?;
                let from = column_len(self.bytes(segment.start)?, *stripe_size, *columns)?;
                let columns = self.raid(legs, *columns, from, each, depth)?;
                striped(*stripe_size, columns)
            }
            Kind::Thin(_)
            | Kind::ThinPool { .. }
            | Kind::Cache { .. }
            | Kind::CachePool { .. }
            | Kind::Snapshot { .. } => {
                Err(Error::unsupported("it is made of pieces of thin volumes, snapshots or caches, which is not read"))
            }
            Kind::Other(kind) => {
                Err(Error::unsupported(format!("an LVM volume of type {kind}, which this version does not read")))
            }
        }
    }

    /// Returns where `len` bytes of an area lie.
    fn area(&mut self, area: &Area, len: u64, depth: usize) -> Result<Vec<map::Segment>> {
        let start = self.bytes(area.extent)?;
        let Some(physical) = self.group.physical.get(&area.name) else {
            return self.part(&area.name, start, len, depth);
        };
        let end = start.checked_add(len).filter(|end| self.bytes(physical.count).is_ok_and(|size| *end <= size));
        if end.is_none() {
            return Err(Error::damaged(format!(
                "it has {len} bytes from extent {} on of {}, which has fewer",
                area.extent, area.name
            )));
        }
        let uuid = super::shown_uuid(physical.uuid);
        let missing = |why: &str| Error::new(ErrorKind::NotFound, format!("needs PV {uuid}, which {why}"));
        if physical.is_missing {
            return Err(missing("its volume group counts as missing, since it was away when that changed"));
        }
        let map = self.physical.get(&physical.uuid).ok_or_else(|| missing("is on no disk of this backup"))?;
        let start = physical.start.checked_add(start);
        let pieces = start.and_then(|start| map.slice(start, len));
        let pieces = pieces.ok_or_else(|| Error::damaged(format!("needs more of PV {uuid} than lies on its disk")))?;
        self.count(&pieces)?;
        Ok(pieces)
    }

    /// Returns where a part of another logical volume lies.
    fn part(&mut self, name: &str, start: u64, len: u64, depth: usize) -> Result<Vec<map::Segment>> {
        let group = self.group;
        let logical =
            group.logical(name).ok_or_else(|| Error::damaged(format!("needs {name}, which does not exist")))?;
        let map = self.logical(logical, depth + 1)?;
        let pieces =
            map.slice(start, len).ok_or_else(|| Error::damaged(format!("needs more of {name} than it has")))?;
        self.count(&pieces)?;
        Ok(pieces)
    }

    /// Counts pieces that are shown.
    pub(super) fn count(&mut self, pieces: &[map::Segment]) -> Result<()> {
        *self.room = self.room.checked_sub(pieces.len()).ok_or_else(|| {
            *self.room = 0;
            Error::new(ErrorKind::TooMuch, format!("logical volumes are in more than {MAX_PIECES} pieces"))
        })?;
        Ok(())
    }

    /// Returns where `len` bytes from `from` on of each column lie, in a leg that is known to be complete.
    fn raid(
        &mut self,
        legs: &[Leg],
        columns: usize,
        from: u64,
        len: u64,
        depth: usize,
    ) -> Result<Vec<Vec<map::Segment>>> {
        let states = legs.iter().map(|leg| self.leg_state(leg, depth)).collect::<Result<Vec<_>>>()?;
        let last = states.iter().flatten().map(|state| state.events).max();
        let failed =
            states.iter().flatten().filter(|state| Some(state.events) == last).fold(0, |all, state| all | state.failed);
        let is_complete = |index: usize| match (last, &states[index]) {
            // The kernel never wrote any: none was ever in use.
            (None, _) => true,
            (Some(_), None) => false,
            (Some(last), Some(state)) => {
                let is_failed =
                    u32::try_from(index).ok().and_then(|index| failed.checked_shr(index)).unwrap_or(1) & 1 == 1;
                state.events == last && state.recovered == u64::MAX && !is_failed
            }
        };
        let copies = legs.len() / columns.max(1);
        let mut found = vec![];
        for index in 0..columns {
            let complete = (index * copies..(index + 1) * copies).filter(|leg| copies == 1 || is_complete(*leg));
            found.push(first_good(complete.map(|leg| self.part(&legs[leg].data, from, len, depth)))?);
        }
        Ok(found)
    }

    /// Returns what the kernel wrote of a leg, `None` if it did not or that is not there.
    fn leg_state(&mut self, leg: &Leg, depth: usize) -> Result<Option<LegState>> {
        let Some(metadata) = &leg.metadata else { return Ok(None) };
        let Ok(pieces) = self.part(metadata, 0, LEG_STATE, depth) else { return Ok(None) };
        let volume = Mapped::new(Map::new(pieces)?, self.disks.to_vec())?;
        let bytes = read_within(&volume, 0, usize::try_from(LEG_STATE).expect("it is 512"))?;
        Ok(LegState::parse(Fields(&bytes)))
    }
}

/// Bytes that are read of a leg's metadata.
const LEG_STATE: u64 = 512;

/// What dm-raid keeps of a leg. Source: Linux `drivers/md/dm-raid.c`, `struct dm_raid_superblock`.
struct LegState {
    /// Counts changes: a leg that was left behind has fewer.
    events: u64,
    /// The legs that failed, one bit each.
    failed: u64,
    /// Up to which sector the leg was made anew; all ones if it is complete.
    recovered: u64,
}

impl LegState {
    fn parse(fields: Fields) -> Option<Self> {
        const MAGIC: u32 = 0x6452_6d44;
        (fields.le32(0)? == MAGIC).then_some(())?;
        Some(Self { events: fields.le64(16)?, failed: fields.le64(24)?, recovered: fields.le64(32)? })
    }
}

/// Returns the first that is there, or why the first is not.
fn first_good<T>(all: impl Iterator<Item = Result<T>>) -> Result<T> {
    let mut reason = None;
    for result in all {
        match result {
            Ok(good) => return Ok(good),
            Err(error) => reason = reason.or(Some(error)),
        }
    }
    Err(reason.unwrap_or_else(|| Error::damaged("no copy of it that is here is known to be complete")))
}

/// Returns the length of each of `count` columns that have `len` bytes together.
fn column_len(len: u64, stripe_size: u64, count: usize) -> Result<u64> {
    if count == 1 {
        return Ok(len);
    }
    let count = u64::try_from(count).expect("a usize fits");
    let row = stripe_size.checked_mul(count).filter(|row| *row > 0 && len.is_multiple_of(*row));
    row.ok_or_else(|| {
        Error::damaged(format!("{len} bytes are no whole rows of {count} stripes of {stripe_size} bytes"))
    })?;
    Ok(len / count)
}

/// Returns the pieces of stripes over columns, all of one length, that are themselves in pieces.
fn striped(stripe_size: u64, mut columns: Vec<Vec<map::Segment>>) -> Result<Vec<map::Segment>> {
    if columns.len() == 1 {
        return Ok(columns.remove(0));
    }
    let refused = || Error::unsupported("its stripes are in pieces that are not read as such");
    let mut pieces = vec![];
    let mut left: Vec<_> =
        columns.into_iter().map(|pieces| Pieces { rest: pieces.into_iter(), current: None }).collect();
    let count = u64::try_from(left.len()).expect("a usize fits");
    loop {
        let places = left.iter_mut().map(Pieces::place).collect::<Result<Vec<_>>>()?;
        let Some(places) = places.into_iter().collect::<Option<Vec<_>>>() else { return Ok(pieces) };
        let len = places.iter().map(|(_, len)| *len).min().ok_or_else(refused)?;
        if len < stripe_size || !len.is_multiple_of(stripe_size) || pieces.len() >= map::MAX_SEGMENTS / left.len() {
            return Err(refused());
        }
        let columns = places.iter().map(|(place, _)| *place).collect();
        let stripes = Stripes { stripe_size, columns, from: 0 };
        let len_of_all = len.checked_mul(count).ok_or_else(refused)?;
        pieces.push(map::Segment { len: len_of_all, source: SegmentSource::Striped(stripes) });
        left.iter_mut().for_each(|pieces| pieces.take(len));
    }
}

/// What is left of the pieces of a column.
struct Pieces {
    rest: std::vec::IntoIter<map::Segment>,
    current: Option<(Place, u64)>,
}

impl Pieces {
    /// Returns where what is left starts, and how much of it lies together.
    fn place(&mut self) -> Result<Option<(Place, u64)>> {
        if self.current.is_none() {
            self.current = match self.rest.next() {
                None => None,
                Some(map::Segment { len, source: SegmentSource::Disk(place) }) => Some((place, len)),
                Some(_) => return Err(Error::unsupported("it is striped over what is striped itself")),
            };
        }
        Ok(self.current)
    }

    /// Takes bytes of those that lie together.
    fn take(&mut self, taken: u64) {
        self.current = self.current.and_then(|(Place { disk, offset }, len)| {
            (len > taken).then(|| (Place { disk, offset: offset + taken }, len - taken))
        });
    }
}
