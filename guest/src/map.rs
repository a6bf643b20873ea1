//! Where the bytes of a volume lie on the disks of a guest: plain data, which whoever has the disks makes a
//! [`Mapped`](crate::Mapped) of.
//!
//! ```text
//! volume   |0 ...   segment ...|...   segment   ...|... segment ... size|
//!           disk 0 from 1 MiB on  stripes over 1, 2      zeroes
//! ```
//!
//! Segments follow each other without gaps, so only their lengths are kept. A striped one is a single segment, however many
//! stripes it has: a volume of terabytes would have millions.

use serde::{Deserialize, Serialize};

use crate::{Error, ErrorKind, Result};

/// More segments, each column of a striped one counted, are refused.
pub(crate) const MAX_SEGMENTS: usize = 1 << 16;
/// Volumes must be smaller than this many bytes: what reads them has signed offsets.
pub(crate) const MAX_SIZE: u64 = 1 << 63;

/// A byte of a disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Place {
    /// Which disk of the guest: 0 is the first.
    pub disk: u16,
    /// Where on it, in bytes.
    pub offset: u64,
}

/// Bytes that alternate between places in pieces of one size.
///
/// Byte `n` of it lies in stripe `n / stripe_size`; stripes go to the columns in turn, row after row.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stripes {
    /// Bytes of a stripe.
    pub stripe_size: u64,
    /// Where each column starts.
    pub columns: Vec<Place>,
    /// Which byte of it is the first of the segment.
    pub from: u64,
}

/// Where the bytes of a segment lie.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum SegmentSource {
    /// Together, from here on.
    Disk(Place),
    /// In turn on several disks.
    Striped(Stripes),
    /// Nowhere: they are zeroes.
    Zeroes,
}

/// A run of bytes of a volume.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Segment {
    /// How long it is in bytes, never 0.
    pub len: u64,
    /// Where its bytes lie.
    pub source: SegmentSource,
}

/// Where all bytes of a volume lie, in order.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "Vec<Segment>", into = "Vec<Segment>")]
pub struct Map {
    segments: Vec<Segment>,
    /// Where each segment ends in the volume.
    ends: Vec<u64>,
}

/// Bytes of a volume that lie together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Piece {
    pub(crate) len: u64,
    /// `None` if they are zeroes.
    pub(crate) place: Option<Place>,
}

impl Stripes {
    fn width(&self) -> u64 {
        u64::try_from(self.columns.len()).expect("a usize fits")
    }

    /// Returns the first byte of column `index`, counted from its start, that is byte `at` of the whole or a later one.
    pub(crate) fn first_in_column(&self, index: usize, at: u64) -> u64 {
        let (stripe, within) = (at / self.stripe_size, at % self.stripe_size);
        let (row, column) = (stripe / self.width(), stripe % self.width());
        let index = u64::try_from(index).expect("a usize fits");
        row * self.stripe_size
            + match index.cmp(&column) {
                std::cmp::Ordering::Less => self.stripe_size,
                std::cmp::Ordering::Equal => within,
                std::cmp::Ordering::Greater => 0,
            }
    }

    /// Returns which byte of the whole is byte `at` of column `index`; `u64::MAX` past what a number can say.
    pub(crate) fn whole_of(&self, index: usize, at: u64) -> u64 {
        let index = u64::try_from(index).expect("a usize fits");
        let stripe = (at / self.stripe_size).saturating_mul(self.width()).saturating_add(index);
        stripe.saturating_mul(self.stripe_size).saturating_add(at % self.stripe_size)
    }

    fn piece(&self, at: u64) -> Piece {
        let column =
            usize::try_from(at / self.stripe_size % self.width()).expect("it is less than the number of columns");
        let Place { disk, offset } = self.columns[column];
        let place = Place { disk, offset: offset + self.first_in_column(column, at) };
        Piece { len: self.stripe_size - at % self.stripe_size, place: Some(place) }
    }

    /// Returns the bytes that each column must have for `len` of the whole: whole rows.
    fn column_len(&self, len: u64) -> Option<u64> {
        let row = self.stripe_size.checked_mul(self.width()).filter(|row| *row > 0)?;
        self.from.checked_add(len)?.div_ceil(row).checked_mul(self.stripe_size)
    }
}

impl Segment {
    /// Returns the part of it from `start` on.
    fn part(&self, start: u64, len: u64) -> Self {
        let source = match &self.source {
            SegmentSource::Zeroes => SegmentSource::Zeroes,
            SegmentSource::Disk(Place { disk, offset }) => {
                SegmentSource::Disk(Place { disk: *disk, offset: offset + start })
            }
            SegmentSource::Striped(stripes) => {
                SegmentSource::Striped(Stripes { from: stripes.from + start, ..stripes.clone() })
            }
        };
        Self { len, source }
    }

    /// Returns what of disks it needs: from where on, and how many bytes. `None` if it cannot be.
    fn needs(&self) -> Option<Vec<(Place, u64)>> {
        let needs = match &self.source {
            SegmentSource::Zeroes => vec![],
            SegmentSource::Disk(place) => vec![(*place, self.len)],
            SegmentSource::Striped(stripes) => {
                let len = stripes.column_len(self.len)?;
                stripes.columns.iter().map(|place| (*place, len)).collect()
            }
        };
        let is_sound = |(place, len): &(Place, u64)| place.offset.checked_add(*len).is_some();
        needs.iter().all(is_sound).then_some(needs)
    }

    /// Appends `next`, of which the bytes follow; returns it if they do not lie behind those here.
    fn join(&mut self, next: Self) -> Option<Self> {
        match (&self.source, &next.source) {
            (SegmentSource::Zeroes, SegmentSource::Zeroes) => {}
            (SegmentSource::Disk(here), SegmentSource::Disk(there))
                if here.disk == there.disk && here.offset.checked_add(self.len) == Some(there.offset) => {}
            _ => return Some(next),
        }
        match self.len.checked_add(next.len) {
            Some(len) => self.len = len,
            None => return Some(next),
        }
        None
    }
}

impl TryFrom<Vec<Segment>> for Map {
    type Error = Error;

    fn try_from(segments: Vec<Segment>) -> Result<Self> {
        Self::new(segments)
    }
}

impl From<Map> for Vec<Segment> {
    fn from(map: Map) -> Self {
        map.segments
    }
}

impl Map {
    /// Makes a map of the segments of a volume, in order; those that lie together become one.
    ///
    /// # Errors
    /// [`ErrorKind::TooMuch`] for more than 65,536 segments, each column of a striped one
    /// counted; `Damaged` if one is empty, its numbers cannot be, or all are 2^63 bytes or more.
    pub fn new(segments: Vec<Segment>) -> Result<Self> {
        let mut joined: Vec<Segment> = Vec::new();
        let mut count = 0;
        for segment in segments {
            count += match &segment.source {
                SegmentSource::Striped(stripes) => stripes.columns.len().max(1),
                _ => 1,
            };
            if count > MAX_SEGMENTS {
                return Err(Error::new(ErrorKind::TooMuch, format!("it is in more than {MAX_SEGMENTS} pieces")));
            }
            if segment.len == 0 || segment.needs().is_none() {
                return Err(Error::damaged(format!("a piece of it cannot be: {segment:?}")));
            }
            let left = match joined.last_mut() {
                Some(last) => last.join(segment),
                None => Some(segment),
            };
            joined.extend(left);
        }
        let mut size = 0_u64;
        let mut ends = Vec::with_capacity(joined.len());
        for segment in &joined {
            size = size
                .checked_add(segment.len)
                .filter(|size| *size < MAX_SIZE)
                .ok_or_else(|| Error::damaged("its size is 2^63 bytes or more"))?;
            ends.push(size);
        }
        Ok(Self { segments: joined, ends })
    }

    /// Makes the map of `len` bytes of a disk that lie together.
    ///
    /// # Errors
    /// As for [`Map::new`]; no bytes at all are a map of size 0.
    pub fn of_range(place: Place, len: u64) -> Result<Self> {
        let segment = Segment { len, source: SegmentSource::Disk(place) };
        Self::new(if len == 0 { vec![] } else { vec![segment] })
    }

    /// Returns the size of the volume in bytes.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.ends.last().copied().unwrap_or(0)
    }

    /// Returns its segments in order.
    #[must_use]
    pub fn segments(&self) -> &[Segment] {
        &self.segments
    }

    /// Returns the disks that its bytes lie on, in ascending order.
    #[must_use]
    pub fn disks(&self) -> Vec<u16> {
        let mut disks: Vec<u16> = self.needs().map(|(place, _)| place.disk).collect();
        disks.sort_unstable();
        disks.dedup();
        disks
    }

    /// Returns the segments of a part of it, `None` if it does not lie within.
    #[must_use]
    pub fn slice(&self, start: u64, len: u64) -> Option<Vec<Segment>> {
        let end = start.checked_add(len).filter(|end| *end <= self.size())?;
        let mut segments = Vec::new();
        let mut at = start;
        while at < end {
            let (segment, within) = self.segment_at(at)?;
            let part = segment.part(within, (segment.len - within).min(end - at));
            at += part.len;
            segments.push(part);
        }
        Some(segments)
    }

    /// Returns all ranges of disks that it needs.
    pub(crate) fn needs(&self) -> impl Iterator<Item = (Place, u64)> + '_ {
        self.segments.iter().flat_map(|segment| segment.needs().expect("segments were checked"))
    }

    /// Returns the segment that holds byte `at`, and which byte of it that is.
    pub(crate) fn segment_at(&self, at: u64) -> Option<(&Segment, u64)> {
        let index = self.ends.partition_point(|end| *end <= at);
        let start = if index == 0 { 0 } else { self.ends[index - 1] };
        Some((self.segments.get(index)?, at - start))
    }

    /// Returns the bytes from `at` on that lie together, at most `len`.
    pub(crate) fn piece(&self, at: u64, len: u64) -> Option<Piece> {
        let (segment, within) = self.segment_at(at)?;
        let left = segment.len - within;
        let piece = match &segment.source {
            SegmentSource::Zeroes => Piece { len: left, place: None },
            SegmentSource::Disk(Place { disk, offset }) => {
                Piece { len: left, place: Some(Place { disk: *disk, offset: offset + within }) }
            }
            SegmentSource::Striped(stripes) => stripes.piece(stripes.from + within),
        };
        Some(Piece { len: piece.len.min(left).min(len), ..piece })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn on(disk: u16, offset: u64, len: u64) -> Segment {
        Segment { len, source: SegmentSource::Disk(Place { disk, offset }) }
    }

    fn striped(stripe_size: u64, columns: &[(u16, u64)], len: u64) -> Segment {
        let columns = columns.iter().map(|&(disk, offset)| Place { disk, offset }).collect();
        Segment { len, source: SegmentSource::Striped(Stripes { stripe_size, columns, from: 0 }) }
    }

    fn zeroes(len: u64) -> Segment {
        Segment { len, source: SegmentSource::Zeroes }
    }

    #[test]
    fn segments_that_lie_together_become_one() {
        let map = Map::new(vec![on(0, 10, 5), on(0, 15, 5), on(1, 20, 5), zeroes(1), zeroes(2), on(1, 25, 1)]).unwrap();
        assert_eq!(map.segments(), [on(0, 10, 10), on(1, 20, 5), zeroes(3), on(1, 25, 1)]);
        assert_eq!((map.size(), map.disks()), (19, vec![0, 1]));
    }

    #[test]
    fn a_slice_is_the_same_bytes_as_the_whole_there() {
        let map =
            Map::new(vec![on(3, 100, 10), striped(4, &[(0, 1000), (1, 2000), (2, 3000)], 30), zeroes(7)]).unwrap();
        for start in 0..map.size() {
            for len in 1..=map.size() - start {
                let part = Map::new(map.slice(start, len).unwrap()).unwrap();
                assert_eq!(part.size(), len);
                for at in 0..len {
                    let place = |map: &Map, at| map.piece(at, 1).unwrap().place;
                    assert_eq!(place(&part, at), place(&map, start + at), "{start} {len} {at}");
                }
            }
        }
        assert_eq!(map.slice(0, map.size() + 1), None);
        assert_eq!(map.slice(u64::MAX, 2), None);
        assert_eq!(map.slice(map.size(), 0), Some(vec![]));
    }

    #[test]
    fn stripes_go_to_the_columns_in_turn() {
        let map = Map::new(vec![striped(4, &[(0, 100), (5, 200)], 20)]).unwrap();
        let places: Vec<_> = (0..5).map(|stripe| map.piece(stripe * 4 + 1, 100).unwrap()).collect();
        let piece = |disk, offset| Piece { len: 3, place: Some(Place { disk, offset }) };
        assert_eq!(places, [piece(0, 101), piece(5, 201), piece(0, 105), piece(5, 205), piece(0, 109)]);
        let needs: Vec<_> = map.needs().collect();
        assert_eq!(needs, [(Place { disk: 0, offset: 100 }, 12), (Place { disk: 5, offset: 200 }, 12)]);
    }

    #[test]
    fn columns_and_the_whole_agree_on_every_byte() {
        let Segment { source: SegmentSource::Striped(stripes), .. } = striped(4, &[(0, 0), (1, 0), (2, 0)], 60) else {
            panic!("it is striped")
        };
        for at in 0..60 {
            let column = usize::try_from(at / 4 % 3).unwrap();
            assert_eq!(stripes.whole_of(column, stripes.first_in_column(column, at)), at);
            for other in 0..3 {
                let next = stripes.whole_of(other, stripes.first_in_column(other, at));
                assert!(next >= at && next - at <= 8, "{at} {other} {next}");
            }
        }
        assert_eq!(stripes.whole_of(2, u64::MAX), u64::MAX);
    }

    #[test]
    fn numbers_that_cannot_be_are_refused() {
        let damaged = [
            vec![on(0, 0, 0)],
            vec![on(0, u64::MAX, 1)],
            vec![zeroes(u64::MAX), zeroes(u64::MAX)],
            vec![zeroes(1 << 63)],
            vec![striped(0, &[(0, 0)], 10)],
            vec![striped(8, &[], 10)],
            vec![striped(u64::MAX, &[(0, 0), (1, 0)], 10)],
            vec![striped(8, &[(0, 0), (1, u64::MAX - 6)], 10)],
        ];
        for segments in damaged {
            assert_eq!(Map::new(segments.clone()).unwrap_err().kind(), ErrorKind::Damaged, "{segments:?}");
        }
        let many = vec![striped(1, &vec![(0, 0); 1025], 1); 64];
        assert_eq!(Map::new(many).unwrap_err().kind(), ErrorKind::TooMuch);
    }
}
