//! A disk as a qcow2 image, version 3, assembled on the fly.
//!
//! ```text
//! header │ refcount table │ refcount blocks │ L1 table │ L2 tables │ data clusters, ascending
//! ```
//!
//! Which clusters hold data is known before the first byte is asked, so every table can be computed and the image be
//! written from its beginning to its end, into a pipe too. All clusters of the image are in use once, so each refcount
//! is 1. There are no snapshots, no backing file, and nothing is compressed.
//! Source: QEMU, docs/interop/qcow2.rst ("The qcow2 image format", version 3).

use std::sync::Arc;

use disk::{Disk, Error, ErrorKind, Extent, Result};

/// Bytes of a cluster; QEMU's default.
const CLUSTER: u64 = 64 << 10;
const CLUSTER_BITS: u32 = 16;
/// Entries of an L2 table: 8 bytes each.
const L2_ENTRIES: u64 = CLUSTER / 8;
/// Entries of a refcount block: 16 bits each.
const REFCOUNTS: u64 = CLUSTER / 2;
/// The largest L1 table QEMU opens is 32 MiB: far more than any VHD needs.
const MAX_SIZE: u64 = (32 << 20) / 8 * L2_ENTRIES * CLUSTER;
/// In L1 and L2 entries: the cluster is in use exactly once.
const COPIED: u64 = 1 << 63;
const HEADER_LENGTH: u32 = 104;

/// A disk seen as a qcow2 image: a [`Disk`] whose bytes are those of the image.
pub struct Qcow2View {
    disk: Arc<dyn Disk>,
    /// Runs of guest clusters that hold data, ascending.
    runs: Vec<Run>,
    /// Numbers of the L2 tables there are (guest cluster / L2_ENTRIES), ascending.
    tables: Vec<u64>,
    layout: Layout,
}

/// Guest clusters `first..first + count`, of which the first is data cluster number `rank`.
#[derive(Debug, Clone, Copy)]
struct Run {
    first: u64,
    count: u64,
    rank: u64,
}

/// Where the parts begin, in clusters.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Layout {
    refcount_table: u64,
    refcount_blocks: u64,
    l1: u64,
    l2: u64,
    data: u64,
    end: u64,
    l1_entries: u64,
}

impl Layout {
    fn new(size: u64, table_count: u64, data_count: u64) -> Self {
        let l1_entries = size.div_ceil(L2_ENTRIES * CLUSTER);
        let rest = 1 + (l1_entries * 8).div_ceil(CLUSTER) + table_count + data_count;
        // The refcounts count their own clusters too: grow until they fit.
        let (mut blocks, mut table) = (1, 1);
        loop {
            let needed_blocks = (rest + blocks + table).div_ceil(REFCOUNTS);
            let needed_table = (needed_blocks * 8).div_ceil(CLUSTER);
            if needed_blocks <= blocks && needed_table <= table {
                break;
            }
            (blocks, table) = (needed_blocks.max(blocks), needed_table.max(table));
        }
        let refcount_blocks = 1 + table;
        let l1 = refcount_blocks + blocks;
        let l2 = l1 + (l1_entries * 8).div_ceil(CLUSTER);
        let data = l2 + table_count;
        Self { refcount_table: 1, refcount_blocks, l1, l2, data, end: data + data_count, l1_entries }
    }
}

impl Qcow2View {
    /// Makes the image of a disk; asks it for all its ranges of data.
    ///
    /// # Errors
    /// `Unsupported` if the disk is larger than an image can be; else as for [`Disk::extent_at`].
    pub fn new(disk: Arc<dyn Disk>) -> Result<Self> {
        let size = disk.size();
        if size > MAX_SIZE {
            let message =
                format!("a qcow2 image holds at most {MAX_SIZE} bytes, the disk has {size}: export it as raw");
            return Err(Error::new(ErrorKind::Unsupported, message));
        }
        let (mut runs, mut tables) = (Vec::<Run>::new(), Vec::<u64>::new());
        let mut count = 0;
        for range in disk::data_ranges(disk.as_ref()) {
            let range = range?;
            let end = range.end.div_ceil(CLUSTER);
            // Two ranges may touch one cluster.
            let taken = runs.last().map_or(0, |run| run.first + run.count);
            let first = (range.start / CLUSTER).max(taken);
            if first >= end {
                continue;
            }
            match runs.last_mut() {
                Some(run) if run.first + run.count == first => run.count += end - first,
                _ => runs.push(Run { first, count: end - first, rank: count }),
            }
            count += end - first;
            let from = (first / L2_ENTRIES).max(tables.last().map_or(0, |table| table + 1));
            tables.extend(from..=(end - 1) / L2_ENTRIES);
        }
        let table_count = u64::try_from(tables.len()).expect("a usize has at most 64 bits");
        let layout = Layout::new(size, table_count, count);
        Ok(Self { disk, runs, tables, layout })
    }

    fn header(&self) -> Vec<u8> {
        let layout = &self.layout;
        let mut header = Vec::with_capacity(usize_of(CLUSTER));
        let word = |number: u64| u32::try_from(number).expect("bounded by the largest size").to_be_bytes();
        header.extend(b"QFI\xfb");
        header.extend(3_u32.to_be_bytes());
        header.extend([0; 12]); // no backing file
        header.extend(CLUSTER_BITS.to_be_bytes());
        // QEMU counts in sectors.
        header.extend(self.disk.size().next_multiple_of(512).to_be_bytes());
        header.extend([0; 4]); // not encrypted
        header.extend(word(layout.l1_entries));
        header.extend((layout.l1 * CLUSTER).to_be_bytes());
        header.extend((layout.refcount_table * CLUSTER).to_be_bytes());
        header.extend(word(layout.refcount_blocks - layout.refcount_table));
        header.extend([0; 12]); // no snapshots
        header.extend([0; 24]); // no features
        header.extend(4_u32.to_be_bytes()); // refcounts of 1 << 4 bits
        header.extend(HEADER_LENGTH.to_be_bytes());
        header.resize(usize_of(CLUSTER), 0);
        header
    }

    /// Returns the content of cluster `cluster` of the image, which is not one of data.
    fn metadata(&self, cluster: u64) -> Vec<u8> {
        let layout = &self.layout;
        let entries = |count: u64, of: &dyn Fn(u64) -> u64| -> Vec<u8> {
            (0..count).flat_map(|entry| of(entry).to_be_bytes()).collect()
        };
        if cluster < layout.refcount_table {
            return self.header();
        }
        if cluster < layout.refcount_blocks {
            let first = (cluster - layout.refcount_table) * L2_ENTRIES;
            let blocks = layout.l1 - layout.refcount_blocks;
            return entries(L2_ENTRIES, &|entry| {
                if first + entry < blocks { (layout.refcount_blocks + first + entry) * CLUSTER } else { 0 }
            });
        }
        if cluster < layout.l1 {
            let first = (cluster - layout.refcount_blocks) * REFCOUNTS;
            return (0..REFCOUNTS).flat_map(|entry| u16::from(first + entry < layout.end).to_be_bytes()).collect();
        }
        if cluster < layout.l2 {
            let first = (cluster - layout.l1) * L2_ENTRIES;
            return entries(L2_ENTRIES, &|entry| match self.tables.binary_search(&(first + entry)) {
                Ok(at) => ((layout.l2 + u64_of(at)) * CLUSTER) | COPIED,
                Err(_) => 0,
            });
        }
        let first = self.tables[usize_of(cluster - layout.l2)] * L2_ENTRIES;
        let mut table = vec![0; usize_of(CLUSTER)];
        let start = self.runs.partition_point(|run| run.first + run.count <= first);
        for run in self.runs[start..].iter().take_while(|run| run.first < first + L2_ENTRIES) {
            for guest in run.first.max(first)..(run.first + run.count).min(first + L2_ENTRIES) {
                let entry = ((layout.data + run.rank + (guest - run.first)) * CLUSTER) | COPIED;
                let at = usize_of(guest - first) * 8;
                table[at..at + 8].copy_from_slice(&entry.to_be_bytes());
            }
        }
        table
    }

    /// Fills `buffer` from `offset` of the data clusters; both lie within them.
    fn read_data(&self, mut offset: u64, mut buffer: &mut [u8]) -> Result<()> {
        while !buffer.is_empty() {
            let rank = offset / CLUSTER;
            let run = self.runs[self.runs.partition_point(|run| run.rank + run.count <= rank)];
            let skip = offset - run.rank * CLUSTER;
            let len = (run.count * CLUSTER - skip).min(u64_of(buffer.len()));
            let (now, later) = buffer.split_at_mut(usize_of(len));
            let guest = run.first * CLUSTER + skip;
            // The last cluster of the disk may reach past its end.
            let inside = usize_of(self.disk.size().saturating_sub(guest).min(len));
            self.disk.read_at(guest, &mut now[..inside])?;
            now[inside..].fill(0);
            offset += len;
            buffer = later;
        }
        Ok(())
    }
}

impl Disk for Qcow2View {
    fn size(&self) -> u64 {
        self.layout.end * CLUSTER
    }

    fn read_at(&self, mut offset: u64, mut buffer: &mut [u8]) -> Result<()> {
        let end = offset.checked_add(u64_of(buffer.len())).filter(|end| *end <= self.size());
        if end.is_none() {
            return Err(Error::new(ErrorKind::OutOfRange, "read past the end of a qcow2 image"));
        }
        let data = self.layout.data * CLUSTER;
        while !buffer.is_empty() && offset < data {
            let skip = usize_of(offset % CLUSTER);
            let len = (usize_of(CLUSTER) - skip).min(buffer.len());
            let (now, later) = buffer.split_at_mut(len);
            now.copy_from_slice(&self.metadata(offset / CLUSTER)[skip..skip + len]);
            offset += u64_of(len);
            buffer = later;
        }
        if buffer.is_empty() { Ok(()) } else { self.read_data(offset - data, buffer) }
    }

    fn extent_at(&self, offset: u64) -> Result<Extent> {
        match self.size().checked_sub(offset) {
            Some(len) if len > 0 => Ok(Extent { len, is_hole: false }),
            _ => Err(Error::new(ErrorKind::OutOfRange, "past the end of a qcow2 image")),
        }
    }
}

/// Numbers of bytes or entries that come from a buffer, or fit one.
fn usize_of(number: u64) -> usize {
    usize::try_from(number).expect("at most the length of a buffer")
}

fn u64_of(number: usize) -> u64 {
    u64::try_from(number).expect("a usize has at most 64 bits")
}

#[cfg(test)]
mod tests {
    use std::ops::Range;

    use super::*;

    /// Data of which every byte is the number of its 4 KiB page, where `pages` says so.
    struct Pages {
        size: u64,
        pages: Vec<Range<u64>>,
    }

    impl Disk for Pages {
        fn size(&self) -> u64 {
            self.size
        }

        fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<()> {
            assert!(offset + u64_of(buffer.len()) <= self.size, "within the disk");
            for (at, byte) in buffer.iter_mut().enumerate() {
                let page = (offset + u64_of(at)) / 4096;
                let is_data = self.pages.iter().any(|pages| pages.contains(&page));
                *byte = if is_data { u8::try_from(page % 255 + 1).expect("at most 255") } else { 0 };
            }
            Ok(())
        }

        fn extent_at(&self, offset: u64) -> Result<Extent> {
            let page = offset / 4096;
            let is_data = self.pages.iter().any(|pages| pages.contains(&page));
            Ok(Extent { len: (4096 - offset % 4096).min(self.size - offset), is_hole: !is_data })
        }
    }

    fn number(bytes: &[u8], at: u64) -> u64 {
        let at = usize_of(at);
        u64::from_be_bytes(bytes[at..at + 8].try_into().expect("eight bytes"))
    }

    /// Reads the image back by its own tables, as a reader would.
    fn decode(image: &[u8], size: u64) -> Vec<u8> {
        let mut disk = vec![0; usize_of(size.next_multiple_of(CLUSTER))];
        let l1 = number(image, 40);
        for guest in 0..size.div_ceil(CLUSTER) {
            let l2 = number(image, l1 + guest / L2_ENTRIES * 8) & !COPIED;
            if l2 == 0 {
                continue;
            }
            let host = number(image, l2 + guest % L2_ENTRIES * 8) & !COPIED;
            if host != 0 {
                let (to, from) = (usize_of(guest * CLUSTER), usize_of(host));
                disk[to..to + usize_of(CLUSTER)].copy_from_slice(&image[from..from + usize_of(CLUSTER)]);
            }
        }
        disk.truncate(usize_of(size));
        disk
    }

    #[test]
    #[expect(clippy::single_range_in_vec_init, reason = "one range of pages is meant")]
    fn the_image_holds_the_disk() {
        for (size, pages) in [
            (0, vec![]),
            (512, vec![0..1]),
            (1 << 20, vec![]),
            (1 << 20, vec![0..256]),
            (1 << 20, vec![3..4, 5..6, 17..40, 255..256]),
            ((1 << 20) + 512, vec![250..257]),
            // Into a second L2 table, across its border, with a table between that is not there.
            ((2 << 29) + (1 << 20), vec![0..1, (1 << 18) - 1..(1 << 18) - 1 + 2, (1 << 18) + 100..(1 << 18) + 200]),
        ] {
            let disk = Arc::new(Pages { size, pages: pages.clone() });
            let view = Qcow2View::new(disk.clone()).expect("fits");
            let mut image = vec![0; usize_of(view.size())];
            view.read_at(0, &mut image).expect("reads");
            assert_eq!(number(&image, 24), size, "{pages:?}");
            let mut expected = vec![0; usize_of(size)];
            for range in &pages {
                let (start, end) = (range.start * 4096, (range.end * 4096).min(size));
                disk.read_at(start, &mut expected[usize_of(start)..usize_of(end)]).expect("reads");
            }
            assert!(decode(&image, size) == expected, "{size} {pages:?}");
        }
    }

    #[test]
    fn an_image_read_in_odd_pieces_is_the_same() {
        let disk = Arc::new(Pages { size: 1 << 20, pages: vec![1..2, 30..33, 100..200] });
        let view = Qcow2View::new(disk).expect("fits");
        let mut whole = vec![0; usize_of(view.size())];
        view.read_at(0, &mut whole).expect("reads");
        let mut pieces = vec![0; whole.len()];
        for (number, piece) in pieces.chunks_mut(40_961).enumerate() {
            view.read_at(u64_of(number * 40_961), piece).expect("reads");
        }
        assert!(whole == pieces);
        assert_eq!(view.read_at(view.size() - 1, &mut [0; 2]).expect_err("past the end").kind(), ErrorKind::OutOfRange);
    }

    #[test]
    fn refcounts_cover_themselves() {
        // Sizes around those where one more refcount block, and one more table cluster, are needed.
        for data in [0, 1, REFCOUNTS - 6, REFCOUNTS - 5, REFCOUNTS - 4, REFCOUNTS * L2_ENTRIES, 1 << 31] {
            let layout = Layout::new(1 << 46, 1, data);
            let blocks = layout.l1 - layout.refcount_blocks;
            assert!(blocks * REFCOUNTS >= layout.end, "{data}");
            assert!((layout.refcount_blocks - layout.refcount_table) * L2_ENTRIES >= blocks, "{data}");
        }
    }
}
