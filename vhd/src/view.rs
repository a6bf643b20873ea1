//! A disk seen as a complete dynamic VHD file, put together as it is read; nothing is stored.
//!
//! Which blocks are present is known once the view is made, so the file never changes its size or its layout, which is that of
//! [`FileLayout`]. A differencing one has the blocks that it was asked to have; a block of zeroes among them says that there are zeroes.

use std::ops::Range;
use std::sync::Arc;

use disk::{Disk, Error, ErrorKind, Extent, Result};
use uuid::Uuid;

use crate::error;
use crate::file_layout::{BITMAP_BYTES, FULL_BLOCK_BYTES, FileLayout, bytes};
use crate::geometry::BlockSize;

const BLOCK: BlockSize = BlockSize::DEFAULT;

/// A dynamic or differencing VHD over any disk.
pub struct VhdView {
    disk: Arc<dyn Disk>,
    layout: Arc<FileLayout>,
}

impl VhdView {
    /// The largest disk a VHD can hold for all tools: that of [`FileLayout::MAX_SIZE`].
    pub const MAX_SIZE: u64 = FileLayout::MAX_SIZE;

    /// Makes the view and finds out which blocks the disk has data in.
    ///
    /// `uuid` and `timestamp` are as for [`FileLayout::new`].
    ///
    /// # Errors
    /// `Unsupported` if the disk is larger than [`VhdView::MAX_SIZE`]; others as for [`Disk::extent_at`].
    pub fn new(disk: Arc<dyn Disk>, uuid: Uuid, timestamp: u32) -> Result<Self> {
        Self::check_size(&*disk)?;
        let present = present_blocks(&*disk)?;
        Self::assemble(disk, present, None, uuid, timestamp)
    }

    /// Makes the view of what another disk, which `parent` is the UUID of, needs to become this one: the blocks in which
    /// `changed` lies, whole, whatever they hold. What is past the end of the disk is left out.
    ///
    /// `uuid` and `timestamp` are as for [`VhdView::new`]. There is no path of the parent: who takes such a file from a stream
    /// applies it to a disk that holds what the parent does.
    ///
    /// # Errors
    /// `Unsupported` if the disk is larger than [`VhdView::MAX_SIZE`].
    pub fn difference(
        disk: Arc<dyn Disk>,
        changed: &[Range<u64>],
        uuid: Uuid,
        parent: Uuid,
        timestamp: u32,
    ) -> Result<Self> {
        Self::check_size(&*disk)?;
        let present = touched_blocks(changed, disk.size());
        Self::assemble(disk, present, Some(parent), uuid, timestamp)
    }

    fn check_size(disk: &dyn Disk) -> Result<()> {
        if disk.size() > Self::MAX_SIZE {
            let message = format!(
                "a VHD file holds a disk of at most {} bytes, but this one has {}; read the raw disk instead",
                Self::MAX_SIZE,
                disk.size()
            );
            return Err(Error::new(ErrorKind::Unsupported, message));
        }
        Ok(())
    }

    fn assemble(
        disk: Arc<dyn Disk>,
        present: Vec<u32>,
        parent: Option<Uuid>,
        uuid: Uuid,
        timestamp: u32,
    ) -> Result<Self> {
        let invalid = |error: error::FormatError| Error::new(ErrorKind::Unsupported, error.reason);
        let layout = FileLayout::new(disk.size(), present, parent, uuid, timestamp).map_err(invalid)?;
        Ok(Self { disk, layout: Arc::new(layout) })
    }

    /// Returns the layout of the file.
    #[must_use]
    pub fn layout(&self) -> &Arc<FileLayout> {
        &self.layout
    }

    /// Returns how many bytes of the disk the file holds: whole blocks.
    #[must_use]
    pub fn payload(&self) -> u64 {
        self.layout.payload()
    }

    /// Fills as much of `buffer` as lies in the same part of the file as `offset`, and returns how much that was.
    fn read_part(&self, offset: u64, buffer: &mut [u8]) -> Result<usize> {
        let Range { start, end } = self.layout.blocks();
        if offset < start {
            return Ok(copy_from(self.layout.head(), offset, buffer));
        }
        if offset >= end {
            return Ok(copy_from(self.layout.footer(), offset - end, buffer));
        }
        let slot = usize::try_from((offset - start) / FULL_BLOCK_BYTES).expect("the blocks are listed in memory");
        let within = (offset - start) % FULL_BLOCK_BYTES;
        if within < BITMAP_BYTES {
            let part = at_most(buffer, BITMAP_BYTES - within);
            part.fill(0xff);
            return Ok(part.len());
        }
        let part = at_most(buffer, FULL_BLOCK_BYTES - within);
        let disk_offset = u64::from(self.layout.present()[slot]) * BLOCK.bytes() + (within - BITMAP_BYTES);
        let stored = at_most(part, self.disk.size().saturating_sub(disk_offset)).len();
        if stored > 0 {
            self.disk.read_at(disk_offset, &mut part[..stored])?;
        }
        part[stored..].fill(0);
        Ok(part.len())
    }
}

impl Disk for VhdView {
    /// Returns the exact length of the VHD file.
    fn size(&self) -> u64 {
        self.layout.file_size()
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<()> {
        if offset.checked_add(bytes(buffer.len())).is_none_or(|end| end > self.size()) {
            let message =
                format!("{} bytes at {offset} do not lie within the VHD file of {} bytes", buffer.len(), self.size());
            return Err(Error::new(ErrorKind::OutOfRange, message));
        }
        let mut done = 0;
        while done < buffer.len() {
            done += self.read_part(offset + bytes(done), &mut buffer[done..])?;
        }
        Ok(())
    }

    /// Returns the rest of the file as data: what is not present is not in the file either.
    fn extent_at(&self, offset: u64) -> Result<Extent> {
        match self.size().checked_sub(offset) {
            None | Some(0) => {
                let message = format!("offset {offset} does not lie within the VHD file of {} bytes", self.size());
                Err(Error::new(ErrorKind::OutOfRange, message))
            }
            Some(len) => Ok(Extent { len, is_hole: false }),
        }
    }

    fn prefetch_window(&self) -> u64 {
        self.disk.prefetch_window()
    }

    fn prefetch(&self, offset: u64, len: u64) {
        let Range { start, end } = self.layout.blocks();
        let first = offset.max(start);
        let last = offset.saturating_add(len).min(end);
        let mut at = first;
        while at < last {
            let slot = (at - start) / FULL_BLOCK_BYTES;
            let Some(block) = usize::try_from(slot).ok().and_then(|slot| self.layout.present().get(slot)) else {
                return;
            };
            self.disk.prefetch(u64::from(*block) * BLOCK.bytes(), BLOCK.bytes());
            at = start + (slot + 1) * FULL_BLOCK_BYTES;
        }
    }
}

/// Returns the blocks that have any data in them, ascending.
fn present_blocks(disk: &dyn Disk) -> Result<Vec<u32>> {
    let mut present = Vec::new();
    let mut at = 0;
    while let Some(data) = disk::seek_data(disk, at)? {
        let block = data / BLOCK.bytes();
        present.push(u32::try_from(block).expect("2040 GiB have about a million blocks"));
        at = (block + 1) * BLOCK.bytes();
    }
    Ok(present)
}

/// Returns the blocks that any of `ranges` lies in, ascending, up to the end of a disk of `size` bytes.
fn touched_blocks(ranges: &[Range<u64>], size: u64) -> Vec<u32> {
    let blocks = |range: &Range<u64>| {
        let end = range.end.min(size);
        let last = if range.start < end { end.div_ceil(BLOCK.bytes()) } else { 0 };
        range.start / BLOCK.bytes()..last
    };
    let mut touched: Vec<u32> = ranges
        .iter()
        .flat_map(blocks)
        .map(|block| u32::try_from(block).expect("2040 GiB have about a million"))
        .collect();
    touched.sort_unstable();
    touched.dedup();
    touched
}

fn at_most(buffer: &mut [u8], len: u64) -> &mut [u8] {
    let len = usize::try_from(len).unwrap_or(usize::MAX).min(buffer.len());
    &mut buffer[..len]
}

/// Copies what `source` has from `offset` on, as far as it goes, and returns how much that was.
fn copy_from(source: &[u8], offset: u64, buffer: &mut [u8]) -> usize {
    let rest = usize::try_from(offset).ok().and_then(|at| source.get(at..)).unwrap_or_default();
    let len = rest.len().min(buffer.len());
    buffer[..len].copy_from_slice(&rest[..len]);
    len
}

#[cfg(test)]
#[expect(clippy::single_range_in_vec_init, reason = "a disk with data in one range is meant")]
mod tests {
    use std::ops::Range;
    use std::path::{Path, PathBuf};
    use std::process::Command;
    use std::sync::Mutex;

    use super::*;
    use crate::footer::{DiskType, Footer};
    use crate::geometry::BlockIndex;
    use crate::geometry::tests::Random;
    use crate::header::Header;

    const MIB: u64 = 1 << 20;
    const ABSENT: [u8; 4] = [0xff; 4];

    /// A disk in memory that remembers what was read of it.
    struct Memory {
        bytes: Vec<u8>,
        data: Vec<Range<u64>>,
        reads: Mutex<Vec<Range<u64>>>,
    }

    impl Memory {
        fn new(size: u64, data: &[Range<u64>]) -> Arc<Self> {
            let mut content = vec![0; usize::try_from(size).unwrap()];
            let mut random = Random(0x2545_f491_4f6c_dd1d);
            for range in data {
                let range = usize::try_from(range.start).unwrap()..usize::try_from(range.end).unwrap();
                let noise = random.bytes(range.len());
                content[range].copy_from_slice(&noise);
            }
            Arc::new(Self { bytes: content, data: data.to_vec(), reads: Mutex::default() })
        }
    }

    impl Disk for Memory {
        fn size(&self) -> u64 {
            bytes(self.bytes.len())
        }

        fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<()> {
            let end = offset + bytes(buffer.len());
            assert!(end <= self.size(), "the view reads past the end of the disk");
            self.reads.lock().unwrap().push(offset..end);
            let at = usize::try_from(offset).unwrap();
            buffer.copy_from_slice(&self.bytes[at..at + buffer.len()]);
            Ok(())
        }

        fn extent_at(&self, offset: u64) -> Result<Extent> {
            assert!(offset < self.size());
            if let Some(range) = self.data.iter().find(|range| range.contains(&offset)) {
                return Ok(Extent { len: range.end - offset, is_hole: false });
            }
            let next = self.data.iter().map(|range| range.start).filter(|start| *start > offset).min();
            Ok(Extent { len: next.unwrap_or(self.size()) - offset, is_hole: true })
        }
    }

    /// A disk of any size without data.
    struct Empty(u64);

    impl Disk for Empty {
        fn size(&self) -> u64 {
            self.0
        }

        fn read_at(&self, _: u64, buffer: &mut [u8]) -> Result<()> {
            buffer.fill(0);
            Ok(())
        }

        fn extent_at(&self, offset: u64) -> Result<Extent> {
            Ok(Extent { len: self.0 - offset, is_hole: true })
        }
    }

    fn uuid() -> Uuid {
        Uuid::parse_str("01234567-89ab-4cde-8f01-23456789abcd").unwrap()
    }

    fn view(disk: Arc<dyn Disk>) -> VhdView {
        VhdView::new(disk, uuid(), 0x6a6d_3700).unwrap()
    }

    fn whole(disk: &dyn Disk) -> Vec<u8> {
        let mut bytes = vec![0xa5; usize::try_from(disk.size()).unwrap()];
        disk.read_at(0, &mut bytes).unwrap();
        bytes
    }

    /// The disks of which the views are handed to other programs.
    fn disks() -> Vec<(&'static str, Arc<Memory>)> {
        let odd = 5 * 2 * MIB + 512;
        vec![
            ("one sector", Memory::new(512, &[0..512])),
            ("one empty sector", Memory::new(512, &[])),
            ("whole blocks", Memory::new(4 * MIB, &[0..4 * MIB])),
            ("holes and a last block of one sector", Memory::new(odd, &[0..4096, 6 * MIB..8 * MIB, odd - 512..odd])),
            ("holes within blocks", Memory::new(7 * MIB + 1536, &[MIB..MIB + 1024, 3 * MIB + 512..3 * MIB + 1024])),
            ("data across blocks", Memory::new(9 * MIB, &[2 * MIB - 512..4 * MIB + 512])),
        ]
    }

    /// Returns whether `program` is there; with `XOFS_REQUIRE_TOOLS` set its absence fails the test.
    fn has(program: &str) -> bool {
        let found = Command::new(program).arg("--version").output().is_ok_and(|output| output.status.success());
        assert!(found || std::env::var_os("XOFS_REQUIRE_TOOLS").is_none(), "{program} is required");
        if !found {
            eprintln!("skipped: there is no {program}");
        }
        found
    }

    fn qemu_img(arguments: &[&str]) -> String {
        let output = Command::new("qemu-img").args(arguments).output().unwrap();
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(output.status.success(), "{arguments:?}: {text}{}", String::from_utf8_lossy(&output.stderr));
        text
    }

    fn write(directory: &Path, name: &str, bytes: &[u8]) -> PathBuf {
        let path = directory.join(name);
        std::fs::write(&path, bytes).unwrap();
        path
    }

    #[test]
    fn the_layout_is_that_of_xen_orchestra() {
        let odd = 5 * 2 * MIB + 512;
        let disk = Memory::new(odd, &[0..512, 6 * MIB..8 * MIB, odd - 512..odd]);
        let bytes = whole(&view(disk.clone()));
        assert_eq!(bytes.len(), 6_295_552);
        let footer = Footer::parse(bytes[..512].try_into().unwrap()).unwrap();
        assert_eq!(bytes[bytes.len() - 512..], bytes[..512]);
        assert_eq!((footer.disk_type, footer.data_offset), (DiskType::Dynamic, 512));
        assert_eq!((footer.original_size, footer.current_size), (odd, odd));
        assert_eq!((footer.uuid, footer.timestamp, footer.features), (uuid(), 0x6a6d_3700, 2));
        let header = Header::parse(bytes[512..1536].try_into().unwrap()).unwrap();
        assert_eq!((header.table_offset, header.max_table_entries, header.parent_uuid), (1536, 6, None));
        let table = [[0, 0, 0, 4], ABSENT, ABSENT, [0, 0, 0x10, 5], ABSENT, [0, 0, 0x20, 6]].concat();
        assert_eq!(bytes[1536..1560], table);
        assert!(bytes[1560..2048].iter().all(|byte| *byte == 0xff));
        let block = usize::try_from(BLOCK.bytes()).unwrap();
        for (slot, number) in [0, 3, 5].into_iter().enumerate() {
            let at = 2048 + slot * (512 + block);
            assert!(bytes[at..at + 512].iter().all(|byte| *byte == 0xff));
            let mut expected = vec![0; block];
            let stored = &disk.bytes[number * block..disk.bytes.len().min((number + 1) * block)];
            expected[..stored.len()].copy_from_slice(stored);
            assert!(bytes[at + 512..at + 512 + block] == expected, "block {number}");
        }
    }

    #[test]
    fn a_difference_has_the_blocks_that_were_asked_for_zeroes_too() {
        let odd = 5 * 2 * MIB + 512;
        let disk = Memory::new(odd, &[0..512, 6 * MIB..8 * MIB, odd - 512..odd]);
        // One that is all zero, one of which a part changed, the last one twice, and nothing past the end.
        let changed =
            [odd - 1..odd + 9 * MIB, 2 * MIB..2 * MIB + 1, 7 * MIB..8 * MIB, odd - 512..odd, 64 * MIB..65 * MIB];
        let parent = Uuid::from_u128(7);
        let view = VhdView::difference(disk.clone(), &changed, uuid(), parent, 0).unwrap();
        let file = whole(&view);
        let footer = Footer::parse(file[..512].try_into().unwrap()).unwrap();
        assert_eq!((footer.disk_type, footer.current_size), (DiskType::Differencing, odd));
        assert_eq!(file[file.len() - 512..], file[..512]);
        let header = Header::parse(file[512..1536].try_into().unwrap()).unwrap();
        assert_eq!((header.max_table_entries, header.parent_uuid), (6, Some(parent)));
        let table = [ABSENT, [0, 0, 0, 4], ABSENT, [0, 0, 0x10, 5], ABSENT, [0, 0, 0x20, 6]].concat();
        assert_eq!(file[1536..1560], table);
        assert_eq!(view.layout().present(), [1, 3, 5]);
        let full = FULL_BLOCK_BYTES;
        let places = [(2560, BlockIndex(1)), (2560 + full, BlockIndex(3)), (2560 + 2 * full, BlockIndex(5))];
        assert_eq!((view.payload(), bytes(file.len())), (6 * MIB, 2048 + 3 * full + 512));
        for (at, block) in places {
            let at = usize::try_from(at).unwrap();
            assert!(file[at - 512..at].iter().all(|byte| *byte == 0xff));
            let from = usize::try_from(u64::from(block.0) * 2 * MIB).unwrap();
            let mut expected = disk.bytes[from..disk.bytes.len().min(from + (2 << 20))].to_vec();
            expected.resize(2 << 20, 0);
            assert!(file[at..at + (2 << 20)] == expected, "{block:?}");
        }
        let nothing = VhdView::difference(disk, &[], uuid(), parent, 0).unwrap();
        assert_eq!((nothing.size(), nothing.layout().present()), (2560, &[][..]));
    }

    #[test]
    fn reading_anywhere_equals_reading_the_whole_file() {
        for (name, disk) in disks() {
            let view = view(disk);
            let all = whole(&view);
            let mut random = Random(0x9e37_79b9_7f4a_7c15);
            let edges = [0, 511, 512, 1535, 1536, 2047, 2048, 2559, 2560, all.len() - 513, all.len() - 1];
            for round in 0..200 {
                let at = edges.get(round).copied().unwrap_or_else(|| random.index(all.len())).min(all.len() - 1);
                let len = (1 + random.index(if round % 2 == 0 { 5000 } else { 3 << 20 })).min(all.len() - at);
                let mut part = vec![0xa5; len];
                view.read_at(bytes(at), &mut part).unwrap();
                assert!(part == all[at..at + len], "{name}: {len} bytes at {at}");
            }
        }
    }

    #[test]
    fn only_the_block_that_is_touched_is_read() {
        let disk = Memory::new(8 * MIB, &[0..8 * MIB]);
        let view = view(disk.clone());
        let mut buffer = [0; 4096];
        view.read_at(0, &mut buffer[..2560]).unwrap();
        assert_eq!(*disk.reads.lock().unwrap(), []);
        view.read_at(2048 + 2 * FULL_BLOCK_BYTES + 512 + 100, &mut buffer[..50]).unwrap();
        assert_eq!(*disk.reads.lock().unwrap(), [4 * MIB + 100..4 * MIB + 150]);
    }

    #[test]
    fn ranges_past_the_end_are_refused() {
        let view = view(Memory::new(512, &[]));
        assert_eq!(view.size(), 2560);
        assert_eq!(view.read_at(2560, &mut []).map_err(|error| error.kind()), Ok(()));
        for (offset, len) in [(2560, 1), (2559, 2), (u64::MAX, 1)] {
            let mut buffer = vec![0; len];
            assert_eq!(view.read_at(offset, &mut buffer).unwrap_err().kind(), ErrorKind::OutOfRange);
        }
        assert_eq!(view.extent_at(60).unwrap(), Extent { len: 2500, is_hole: false });
        assert_eq!(view.extent_at(2560).unwrap_err().kind(), ErrorKind::OutOfRange);
        assert_eq!(view.extent_at(u64::MAX).unwrap_err().kind(), ErrorKind::OutOfRange);
        assert_eq!(view.allocated().unwrap(), 2560);
    }

    #[test]
    fn a_disk_of_2040_gib_is_the_largest_there_can_be() {
        let largest = view(Arc::new(Empty(VhdView::MAX_SIZE)));
        assert_eq!(largest.size(), 1536 + 1_044_480 * 4 + 512);
        let error = VhdView::new(Arc::new(Empty(VhdView::MAX_SIZE + 1)), uuid(), 0).err().unwrap();
        assert_eq!(error.kind(), ErrorKind::Unsupported);
    }

    #[test]
    fn a_last_partial_sector_is_completed() {
        let disk = Memory::new(1000, &[0..1000]);
        let bytes = whole(&view(disk.clone()));
        assert_eq!(Footer::parse(bytes[..512].try_into().unwrap()).unwrap().current_size, 1024);
        assert_eq!(bytes[2560..3560], disk.bytes);
        assert_eq!(bytes[3560..3584], [0; 24]);
    }

    #[test]
    fn an_empty_disk_is_a_vhd_without_blocks() {
        let bytes = whole(&view(Arc::new(Empty(0))));
        assert_eq!(bytes.len(), 2560);
        assert_eq!(Header::parse(bytes[512..1536].try_into().unwrap()).unwrap().max_table_entries, 0);
    }

    #[test]
    fn qemu_img_reads_the_same_disk_of_exactly_the_same_size() {
        if !has("qemu-img") {
            return;
        }
        let directory = tempfile::tempdir().unwrap();
        for (name, disk) in disks() {
            let raw = write(directory.path(), "disk.raw", &disk.bytes);
            let vhd = write(directory.path(), "disk.vhd", &whole(&view(disk.clone())));
            let (raw, vhd) = (raw.to_str().unwrap(), vhd.to_str().unwrap());
            assert_eq!(qemu_img(&["compare", "-f", "raw", "-F", "vpc", raw, vhd]), "Images are identical.\n");
            for calculation in ["", ",force_size_calc=current_size"] {
                let options = format!("driver=vpc{calculation},file.driver=file,file.filename={vhd}");
                let info = qemu_img(&["info", "--output=json", "--image-opts", &options]);
                let size = format!("\"virtual-size\": {}", disk.size());
                assert!(info.contains(&size), "{name}{calculation}: {info}");
            }
        }
    }
}
