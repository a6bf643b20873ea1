//! A volume as a disk: its bytes are read where its map says they lie.

use std::sync::Arc;

use disk::{Disk, Error, ErrorKind, Extent};

use crate::map::{Map, Piece, Place, SegmentSource, Stripes};

/// A volume on the disks of a guest. Holes of those are holes of the volume.
pub struct Mapped {
    map: Map,
    disks: Vec<Arc<dyn Disk>>,
}

impl Mapped {
    /// Makes the volume that `map` describes; `disks` are those it counts.
    ///
    /// # Errors
    /// [`Damaged`](crate::ErrorKind::Damaged) if something of it does not lie on them.
    pub fn new(map: Map, disks: Vec<Arc<dyn Disk>>) -> crate::Result<Self> {
        for (Place { disk, offset }, len) in map.needs() {
            let size = disks.get(usize::from(disk)).map(|disk| disk.size());
            if size.is_none_or(|size| offset.checked_add(len).is_none_or(|end| end > size)) {
                return Err(crate::Error::damaged(format!(
                    "it needs {len} bytes at {offset} of disk {disk}, which has {} bytes",
                    size.unwrap_or(0)
                )));
            }
        }
        Ok(Self { map, disks })
    }

    fn disk(&self, place: Place) -> &dyn Disk {
        &*self.disks[usize::from(place.disk)]
    }

    fn check(&self, offset: u64, len: usize) -> disk::Result<u64> {
        let len = u64::try_from(len).expect("a usize fits");
        match offset.checked_add(len) {
            Some(end) if end <= self.map.size() => Ok(len),
            _ => Err(Error::new(
                ErrorKind::OutOfRange,
                format!("{len} bytes at {offset} are not within the {} bytes of the volume", self.map.size()),
            )),
        }
    }

    /// Yields the pieces of a range that was checked, each with its part of `buffer`.
    fn pieces<'a>(&'a self, mut offset: u64, mut buffer: &'a mut [u8]) -> impl Iterator<Item = (Piece, &'a mut [u8])> {
        std::iter::from_fn(move || {
            if buffer.is_empty() {
                return None;
            }
            let piece = self.map.piece(offset, u64::try_from(buffer.len()).expect("a usize fits"))?;
            let len = usize::try_from(piece.len).expect("it is at most the length of a buffer");
            let (part, rest) = std::mem::take(&mut buffer).split_at_mut(len);
            buffer = rest;
            offset += piece.len;
            Some((piece, part))
        })
    }

    /// Returns up to where in the stripes, from `at` on, bytes are of one kind, and of which.
    fn stripes_extent(&self, stripes: &Stripes, at: u64, end: u64) -> disk::Result<Extent> {
        let extent_of = |column: usize| {
            let within = stripes.first_in_column(column, at);
            let place = stripes.columns[column];
            let extent = (stripes.whole_of(column, within) < end)
                .then(|| self.disk(place).extent_at(place.offset + within))
                .transpose()?;
            Ok(extent.map(|extent| (column, within, extent)))
        };
        let extents = (0..stripes.columns.len()).map(extent_of).filter_map(disk::Result::transpose);
        let extents = extents.collect::<disk::Result<Vec<_>>>()?;
        let first = extents.iter().find(|(column, within, _)| stripes.whole_of(*column, *within) == at);
        let is_hole = first.expect("some column holds the byte").2.is_hole;
        let until = extents.iter().map(|(column, within, extent)| {
            let len = if extent.is_hole == is_hole { extent.len } else { 0 };
            stripes.whole_of(*column, within.saturating_add(len))
        });
        Ok(Extent { len: until.fold(end, u64::min) - at, is_hole })
    }
}

impl Disk for Mapped {
    fn size(&self) -> u64 {
        self.map.size()
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> disk::Result<()> {
        self.check(offset, buffer.len())?;
        for (piece, part) in self.pieces(offset, buffer) {
            match piece.place {
                Some(place) => self.disk(place).read_at(place.offset, part)?,
                None => part.fill(0),
            }
        }
        Ok(())
    }

    fn extent_at(&self, offset: u64) -> disk::Result<Extent> {
        self.check(offset, 1)?;
        let (segment, within) = self.map.segment_at(offset).expect("it was checked to lie within");
        let left = segment.len - within;
        match &segment.source {
            SegmentSource::Zeroes => Ok(Extent { len: left, is_hole: true }),
            SegmentSource::Disk(place) => {
                let extent = self.disk(*place).extent_at(place.offset + within)?;
                Ok(Extent { len: extent.len.min(left), ..extent })
            }
            SegmentSource::Striped(stripes) => {
                self.stripes_extent(stripes, stripes.from + within, stripes.from + segment.len)
            }
        }
    }

    fn allocated(&self) -> disk::Result<u64> {
        if let [segment] = self.map.segments() {
            if let SegmentSource::Disk(place @ Place { offset: 0, .. }) = segment.source {
                if self.disk(place).size() == segment.len {
                    return self.disk(place).allocated();
                }
            }
        }
        disk::data_ranges(self).try_fold(0, |sum, range| range.map(|range| sum + (range.end - range.start)))
    }

    fn read_in_memory(&self, offset: u64, buffer: &mut [u8]) -> bool {
        self.check(offset, buffer.len()).is_ok()
            && self.pieces(offset, buffer).all(|(piece, part)| match piece.place {
                Some(place) => self.disk(place).read_in_memory(place.offset, part),
                None => {
                    part.fill(0);
                    true
                }
            })
    }

    fn prefetch_window(&self) -> u64 {
        self.map.needs().map(|(place, _)| self.disk(place).prefetch_window()).max().unwrap_or(0)
    }

    fn prefetch(&self, offset: u64, len: u64) {
        let end = offset.saturating_add(len).min(self.map.size());
        let mut at = offset;
        while at < end {
            let Some((segment, within)) = self.map.segment_at(at) else { return };
            let len = (segment.len - within).min(end - at);
            match &segment.source {
                SegmentSource::Zeroes => {}
                SegmentSource::Disk(place) => self.disk(*place).prefetch(place.offset + within, len),
                SegmentSource::Striped(stripes) => {
                    for (index, place) in stripes.columns.iter().enumerate() {
                        let first = stripes.first_in_column(index, stripes.from + within);
                        let end = stripes.first_in_column(index, stripes.from + within + len);
                        if first < end {
                            self.disk(*place).prefetch(place.offset + first, end - first);
                        }
                    }
                }
            }
            at += len;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use disk::data_ranges;

    use super::*;
    use crate::map::Segment;
    use crate::memory::Memory;

    const PAGE: u64 = 4096;

    fn on(disk: u16, offset: u64, len: u64) -> Segment {
        Segment { len, source: SegmentSource::Disk(Place { disk, offset }) }
    }

    /// Two disks of 64 pages, of which the named pages hold their disk and number in each byte.
    fn disks(pages: [&[u8]; 2]) -> Vec<Arc<dyn Disk>> {
        let made = pages.iter().zip([0, 64]).map(|(pages, base)| {
            let mut memory = Memory::new(64 * PAGE);
            for page in *pages {
                memory.write(u64::from(*page) * PAGE, &[page + base; 4096]);
            }
            Arc::new(memory) as Arc<dyn Disk>
        });
        made.collect()
    }

    fn stripes(stripe_size: u64, columns: &[(u16, u64)], from: u64, len: u64) -> Segment {
        let columns = columns.iter().map(|&(disk, offset)| Place { disk, offset }).collect();
        Segment { len, source: SegmentSource::Striped(Stripes { stripe_size, columns, from }) }
    }

    #[test]
    fn a_read_goes_over_all_segments_that_it_touches() {
        let map = Map::new(vec![
            on(0, PAGE, 2 * PAGE),
            Segment { len: 10, source: SegmentSource::Zeroes },
            stripes(PAGE, &[(1, 8 * PAGE), (0, 32 * PAGE)], 0, 4 * PAGE),
        ]);
        let volume = Mapped::new(map.unwrap(), disks([&[1, 2, 32, 33], &[8, 9]])).unwrap();
        let mut bytes = vec![0xff; usize::try_from(volume.size()).unwrap()];
        volume.read_at(0, &mut bytes).unwrap();
        let expected =
            [vec![1; 4096], vec![2; 4096], vec![0; 10], vec![72; 4096], vec![32; 4096], vec![73; 4096]].concat();
        assert!(bytes[..expected.len()] == expected && bytes[expected.len()..] == [33; 4096]);

        for (start, len) in [(0, 1), (4095, 2), (8190, 14), (8201, 8000), (20000, 0)] {
            let mut part = vec![0xff; len];
            volume.read_at(u64::try_from(start).unwrap(), &mut part).unwrap();
            assert!(part == bytes[start..start + len], "{start} {len}");
        }
        for (start, len) in [(volume.size(), 1), (u64::MAX, 1), (0, bytes.len() + 1)] {
            let error = volume.read_at(start, &mut vec![0; len]).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::OutOfRange);
        }
        assert_eq!(volume.extent_at(volume.size()).unwrap_err().kind(), ErrorKind::OutOfRange);
    }

    #[test]
    fn holes_of_the_disks_are_holes_of_the_volume() {
        let columns = [(0, 0), (1, 0)];
        for (stripe_pages, from_pages, data) in
            [(1, 0, [0, 5, 6, 7, 11]), (2, 0, [0, 3, 6, 9, 11]), (2, 3, [0, 3, 6, 9, 11])]
        {
            // Row and column of each page of the whole, as the stripes have it.
            let place =
                |page: u64| (page / stripe_pages % 2, page / stripe_pages / 2 * stripe_pages + page % stripe_pages);
            let mut pages = [vec![], vec![]];
            for page in data {
                let (column, at) = place(page + from_pages);
                pages[usize::try_from(column).unwrap()].push(u8::try_from(at).unwrap());
            }
            let map = Map::new(vec![stripes(stripe_pages * PAGE, &columns, from_pages * PAGE, 15 * PAGE)]).unwrap();
            let volume = Mapped::new(map, disks([&pages[0], &pages[1]])).unwrap();
            let ranges: Vec<_> = data_ranges(&volume).map(Result::unwrap).collect();
            let found: Vec<u64> = ranges.iter().flat_map(|range| range.start / PAGE..range.end / PAGE).collect();
            assert_eq!(found, data, "{stripe_pages} {from_pages}");
            assert_eq!(volume.allocated().unwrap(), 5 * PAGE);
        }
    }

    #[test]
    fn stripes_of_terabytes_are_walked_by_their_extents() {
        let sparse: Vec<Arc<dyn Disk>> = vec![Arc::new(Memory::new(1 << 40)), Arc::new(Memory::new(1 << 40))];
        let map = Map::new(vec![stripes(1 << 16, &[(0, 0), (1, 0)], 0, 1 << 41)]).unwrap();
        let volume = Mapped::new(map, sparse).unwrap();
        assert_eq!(volume.extent_at(12345).unwrap(), Extent { len: (1 << 41) - 12345, is_hole: true });
    }

    #[test]
    fn a_map_that_needs_more_than_the_disks_have_is_refused() {
        let needs = [on(0, 63 * PAGE, PAGE + 1), on(2, 0, 1), stripes(PAGE, &[(0, 0), (1, 62 * PAGE)], 0, 5 * PAGE)];
        for segment in needs {
            let map = Map::new(vec![segment.clone()]).unwrap();
            let error = Mapped::new(map, disks([&[], &[]])).err().expect("it does not fit");
            assert_eq!(error.kind(), crate::ErrorKind::Damaged, "{segment:?}");
        }
        assert!(Mapped::new(Map::new(vec![on(1, 63 * PAGE, PAGE)]).unwrap(), disks([&[], &[]])).is_ok());
    }

    /// Keeps what it was asked to prefetch, and has all in memory.
    #[derive(Default)]
    struct Asked(Mutex<Vec<(u64, u64)>>);

    impl Disk for Asked {
        fn size(&self) -> u64 {
            1 << 20
        }

        fn read_at(&self, _: u64, buffer: &mut [u8]) -> disk::Result<()> {
            buffer.fill(7);
            Ok(())
        }

        fn extent_at(&self, offset: u64) -> disk::Result<Extent> {
            Ok(Extent { len: self.size() - offset, is_hole: false })
        }

        fn allocated(&self) -> disk::Result<u64> {
            Ok(99)
        }

        fn read_in_memory(&self, _: u64, buffer: &mut [u8]) -> bool {
            buffer.fill(7);
            true
        }

        fn prefetch_window(&self) -> u64 {
            1 << 16
        }

        fn prefetch(&self, offset: u64, len: u64) {
            self.0.lock().unwrap().push((offset, len));
        }
    }

    #[test]
    fn what_is_asked_of_a_volume_in_advance_is_asked_of_its_disks() {
        let asked = Arc::new(Asked::default());
        let disks: Vec<Arc<dyn Disk>> = vec![asked.clone(), Arc::new(Memory::new(1 << 20))];
        let map = Map::new(vec![on(0, 100, 50), stripes(10, &[(0, 1000), (1, 0)], 0, 100), on(1, 0, 10)]).unwrap();
        let volume = Mapped::new(map, disks).unwrap();
        volume.prefetch(40, 1 << 40);
        volume.prefetch(75, 10);
        assert_eq!(*asked.0.lock().unwrap(), [(140, 10), (1000, 50), (1015, 5)]);
        assert_eq!(volume.prefetch_window(), 1 << 16);
        let mut bytes = [0; 15];
        assert!(volume.read_in_memory(45, &mut bytes) && bytes == [7; 15]);
        assert!(!volume.read_in_memory(45, &mut [0; 16]), "the second column is not in memory");
        assert!(!volume.read_in_memory(160, &mut [0]), "past the end");

        let whole = Mapped::new(Map::of_range(Place { disk: 0, offset: 0 }, 1 << 20).unwrap(), vec![asked]).unwrap();
        assert_eq!(whole.allocated().unwrap(), 99);
    }
}
