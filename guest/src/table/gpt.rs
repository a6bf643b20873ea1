//! GUID partition tables: the one at the start of a disk, and its backup wherever it can be.
//!
//! ```text
//! LBA 0              1        2 ...                            last
//! protective MBR | header | entries |  partitions | entries | backup header
//! ```
//!
//! A header says at which sector it stands itself, so what was copied or grown is told from what is in its place. Only what
//! its checksums confirm is believed. Source: the UEFI specification 2.10, section 5.3.

use disk::Disk;

use super::{Partition, Purpose, SECTOR_SIZES, Table};
use crate::crc32::crc32;
use crate::read::read_within;
use crate::{Error, Fields};

const SIGNATURE: &[u8] = b"EFI PART";
/// A header is at least this long, and never longer than a sector.
const MIN_HEADER: usize = 92;
/// Entries are refused that take more bytes than this: 8,192 of the usual size.
const MAX_ENTRIES: u64 = 1 << 20;
/// A backup is looked for in so many bytes at the end of the disk, which a change of its size by a little leaves.
const TAIL: u64 = 2 << 20;

struct Header {
    sector_size: u64,
    /// Whether the checksum is right, and so is the sector that it says it stands at.
    is_sound: bool,
    alternate: u64,
    entries: u64,
    count: u64,
    size: u64,
    checksum: u32,
}

impl Header {
    fn parse(sector: &[u8], at: u64, sector_size: u64) -> Option<Self> {
        let fields = Fields(sector);
        (fields.bytes(0, 8)? == SIGNATURE).then_some(())?;
        let covered = usize::try_from(fields.le32(12)?).ok().filter(|len| *len >= MIN_HEADER);
        let checked = covered.and_then(|len| fields.bytes(0, len)).map(|header| {
            let mut header = header.to_vec();
            header[16..20].fill(0);
            crc32(&header)
        });
        Some(Self {
            sector_size,
            is_sound: checked == fields.le32(16) && fields.le64(24)? == at,
            alternate: fields.le64(32)?,
            entries: fields.le64(72)?,
            count: fields.le32(80)?.into(),
            size: fields.le32(84)?.into(),
            checksum: fields.le32(88)?,
        })
    }

    fn read(disk: &dyn Disk, at: u64, sector_size: u64) -> disk::Result<Option<Self>> {
        let len = usize::try_from(sector_size).expect("a sector fits into memory");
        let sector = read_within(disk, at.saturating_mul(sector_size), len)?;
        Ok(Self::parse(&sector, at, sector_size))
    }

    /// Returns the partitions, `None` if the header or its entries are not sound.
    fn table(&self, disk: &dyn Disk) -> disk::Result<Option<Table>> {
        let is_size = self.size.is_power_of_two() && (128..=4096).contains(&self.size);
        let len = self.count * self.size;
        if !self.is_sound || !is_size || len > MAX_ENTRIES {
            return Ok(None);
        }
        let len = usize::try_from(len).expect("it is at most a MiB");
        let bytes = read_within(disk, self.entries.saturating_mul(self.sector_size), len)?;
        if bytes.len() < len || crc32(&bytes) != self.checksum {
            return Ok(None);
        }
        let mut table = Table::default();
        let size = usize::try_from(self.size).expect("it is at most 4 KiB");
        for (number, entry) in (1..).zip(bytes.chunks_exact(size)) {
            let fields = Fields(entry);
            let (Some(purpose), Some(first), Some(last)) = (fields.array(0), fields.le64(32), fields.le64(40)) else {
                continue;
            };
            if purpose == [0; 16] {
                continue;
            }
            let Some(count) = last.checked_sub(first).and_then(|count| count.checked_add(1)) else {
                table.problems.push(Error::damaged(format!(
                    "partition {number} ends at sector {last}, but starts at {first}: it is not shown"
                )));
                continue;
            };
            let purpose = Purpose::Gpt(purpose);
            table.partitions.push(Partition::of_sectors(number, first, count, self.sector_size, purpose));
        }
        Ok(Some(table))
    }
}

/// Returns what the header at the start says, or the backup that it names if it or its entries are not sound.
pub(super) fn read_first(disk: &dyn Disk) -> disk::Result<Option<Table>> {
    for sector_size in SECTOR_SIZES {
        let Some(header) = Header::read(disk, 1, sector_size)? else { continue };
        if let Some(table) = header.table(disk)? {
            return Ok(Some(table));
        }
        if let Some(table) = backup(disk, header.alternate, sector_size)? {
            return Ok(Some(table));
        }
    }
    Ok(None)
}

/// Returns what the backup says: at `last_sector`, or at the end of the disk.
pub(super) fn read_backup(disk: &dyn Disk, last_sector: Option<u64>) -> disk::Result<Option<Table>> {
    for sector_size in SECTOR_SIZES {
        for at in last_sector.into_iter().chain((disk.size() / sector_size).checked_sub(1)) {
            if let Some(table) = backup(disk, at, sector_size)? {
                return Ok(Some(table));
            }
        }
    }
    let from = disk.size().saturating_sub(TAIL).next_multiple_of(SECTOR_SIZES[1]);
    let tail = read_within(disk, from, usize::try_from(TAIL).expect("it is 2 MiB"))?;
    let step = usize::try_from(SECTOR_SIZES[0]).expect("it is 512");
    let starts =
        tail.chunks(step).enumerate().filter(|(_, sector)| sector.starts_with(SIGNATURE)).map(|(index, _)| index);
    // The last one first: what is before it is what an earlier size of the disk left.
    for index in starts.rev() {
        let at = from + u64::try_from(index * step).expect("it is less than 2 MiB");
        for sector_size in SECTOR_SIZES.into_iter().filter(|size| at.is_multiple_of(*size)) {
            if let Some(table) = backup(disk, at / sector_size, sector_size)? {
                return Ok(Some(table));
            }
        }
    }
    Ok(None)
}

fn backup(disk: &dyn Disk, at: u64, sector_size: u64) -> disk::Result<Option<Table>> {
    let Some(header) = Header::read(disk, at, sector_size)? else { return Ok(None) };
    let Some(mut table) = header.table(disk)? else { return Ok(None) };
    table.problems.push(Error::damaged(format!(
        "the GPT at the start of the disk is damaged; its backup at sector {at} is used"
    )));
    Ok(Some(table))
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::memory::Memory;

    /// A partition type that means nothing to us.
    const TYPE: [u8; 16] = [7; 16];

    pub(crate) struct Made {
        pub(crate) sector_size: u64,
        pub(crate) count: u32,
        pub(crate) size: u32,
    }

    impl Default for Made {
        fn default() -> Self {
            Self { sector_size: 512, count: 128, size: 128 }
        }
    }

    impl Made {
        fn header(&self, at: u64, alternate: u64, entries_at: u64, entries: &[u8]) -> Vec<u8> {
            let mut header = vec![0; usize::try_from(self.sector_size).unwrap()];
            let mut put = |at: usize, bytes: &[u8]| header[at..at + bytes.len()].copy_from_slice(bytes);
            put(0, SIGNATURE);
            put(8, &0x0001_0000_u32.to_le_bytes());
            put(12, &92_u32.to_le_bytes());
            put(24, &at.to_le_bytes());
            put(32, &alternate.to_le_bytes());
            put(72, &entries_at.to_le_bytes());
            put(80, &self.count.to_le_bytes());
            put(84, &self.size.to_le_bytes());
            put(88, &crc32(entries).to_le_bytes());
            let checksum = crc32(&header[..92]);
            header[16..20].copy_from_slice(&checksum.to_le_bytes());
            header
        }

        /// Writes both tables, of partitions at slots: first and last sector.
        pub(crate) fn write(&self, disk: &mut Memory, partitions: &[(usize, u64, u64)]) {
            let size = usize::try_from(self.size).unwrap();
            let len = size.saturating_mul(usize::try_from(self.count).unwrap()).min(1 << 21);
            let mut entries = vec![0; len];
            for (slot, first, last) in partitions {
                let at = slot * size;
                entries[at..at + 16].copy_from_slice(&TYPE);
                entries[at + 32..at + 40].copy_from_slice(&first.to_le_bytes());
                entries[at + 40..at + 48].copy_from_slice(&last.to_le_bytes());
            }
            let last = disk.size() / self.sector_size - 1;
            let entry_sectors = u64::try_from(len).unwrap().div_ceil(self.sector_size);
            disk.write(self.sector_size, &self.header(1, last, 2, &entries));
            disk.write(2 * self.sector_size, &entries);
            disk.write(last * self.sector_size, &self.header(last, 1, last - entry_sectors, &entries));
            disk.write((last - entry_sectors) * self.sector_size, &entries);
        }
    }

    /// Makes the checksums right of a header and of the entries that it leads to, if it leads to any.
    pub(crate) fn repair(disk: &mut Memory, at: u64) {
        let mut header = read_within(disk, at * 512, 512).unwrap();
        let fields = Fields(&header);
        let len = fields.le32(80).unwrap().wrapping_mul(fields.le32(84).unwrap()).min(1 << 20);
        let entries = fields.le64(72).unwrap().wrapping_mul(512);
        let checksum = crc32(&read_within(disk, entries, usize::try_from(len).unwrap()).unwrap());
        header[88..92].copy_from_slice(&checksum.to_le_bytes());
        header[16..20].fill(0);
        let checksum = crc32(&header[..92]);
        header[16..20].copy_from_slice(&checksum.to_le_bytes());
        disk.write(at * 512, &header);
    }

    const PARTITIONS: [(usize, u64, u64); 3] = [(0, 40, 99), (1, 100, 100), (127, 200, 299)];

    fn disk(made: &Made) -> Memory {
        let mut disk = Memory::new(8 << 20);
        made.write(&mut disk, &PARTITIONS);
        disk
    }

    fn is_right(table: &Table, sector_size: u64) -> bool {
        let found = table.partitions.iter().map(|partition| (partition.number, partition.start, partition.len));
        found
            .eq([(1, 40, 60), (2, 100, 1), (128, 200, 100)]
                .map(|(n, at, len)| (n, at * sector_size, len * sector_size)))
    }

    #[test]
    fn both_sizes_of_a_sector_and_larger_entries_are_read() {
        for (sector_size, size) in [(512, 128), (4096, 128), (512, 256), (4096, 4096)] {
            let disk = disk(&Made { sector_size, size, ..Made::default() });
            let table = read_first(&disk).unwrap().expect("there is a table");
            assert!(is_right(&table, sector_size) && table.problems.is_empty(), "{sector_size} {size}: {table:?}");
        }
    }

    #[test]
    fn the_backup_is_used_wherever_it_is() {
        type Change = fn(&mut Memory);
        // What was done to the disk, and whether the first header still leads to the backup.
        let cases: [(&str, Change, bool); 7] = [
            ("entry array damaged", |disk| disk.write(2 * 512 + 70, &[1]), true),
            ("header damaged", |disk| disk.write(512 + 60, &[1]), true),
            (
                "header damaged, then grown",
                |disk| {
                    disk.write(512 + 60, &[1]);
                    disk.resize(1 << 40)
                },
                true,
            ),
            ("header zeroed", |disk| disk.write(512, &[0; 512]), false),
            (
                "header zeroed, then grown by a little",
                |disk| {
                    disk.write(512, &[0; 512]);
                    disk.resize(9 << 20)
                },
                false,
            ),
            (
                "the same, by no whole sectors",
                |disk| {
                    disk.write(512, &[0; 512]);
                    disk.resize((9 << 20) + 100)
                },
                false,
            ),
            ("all of the start zeroed", |disk| disk.write(0, &[0; 40 * 512]), false),
        ];
        for (what, change, is_named) in cases {
            let mut disk = disk(&Made::default());
            change(&mut disk);
            let named = read_first(&disk).unwrap();
            assert_eq!(named.is_some(), is_named, "{what}");
            let table = named.or_else(|| read_backup(&disk, None).unwrap()).expect(what);
            assert!(is_right(&table, 512), "{what}: {table:?}");
            assert_eq!(
                table.problems[0].to_string(),
                "the GPT at the start of the disk is damaged; its backup at sector 16383 is used"
            );
        }
    }

    #[test]
    fn a_backup_far_from_the_end_is_found_where_sector_0_says_that_the_disk_ended() {
        let mut disk = disk(&Made::default());
        disk.write(512, &[0; 512]);
        disk.resize(1 << 40);
        assert!(read_backup(&disk, None).unwrap().is_none());
        assert!(is_right(&read_backup(&disk, Some(16383)).unwrap().unwrap(), 512));
    }

    #[test]
    fn a_disk_that_was_cut_off_needs_no_backup() {
        let mut disk = disk(&Made::default());
        disk.resize(100 * 512);
        let table = read_first(&disk).unwrap().unwrap();
        assert!(is_right(&table, 512));
        let lens: Vec<_> = table.partitions.iter().map(|partition| partition.len_within(disk.size()) / 512).collect();
        assert_eq!(lens, [60, 0, 0]);
    }

    #[test]
    fn absurd_entries_are_refused_though_the_checksums_are_right() {
        for (count, size) in
            [(u32::MAX, 128), (8193, 128), (1, 0), (128, 64), (128, 192), (1, 8192), (u32::MAX, u32::MAX)]
        {
            let made = Made { count, size, ..Made::default() };
            let mut disk = Memory::new(8 << 20);
            made.write(&mut disk, &[]);
            assert!(read_first(&disk).unwrap().is_none(), "{count} {size}");
            assert!(read_backup(&disk, None).unwrap().is_none(), "{count} {size}");
        }
    }

    #[test]
    fn a_partition_that_ends_before_it_starts_is_said_and_the_largest_numbers_are_only_numbers() {
        let mut disk = Memory::new(8 << 20);
        Made::default().write(&mut disk, &[(0, 10, 9), (1, 0, u64::MAX), (2, 1, u64::MAX), (3, 5, 5)]);
        let table = read_first(&disk).unwrap().unwrap();
        let numbers: Vec<_> = table.partitions.iter().map(|partition| partition.number).collect();
        assert_eq!((numbers, table.problems.len()), (vec![3, 4], 2), "{table:?}");
        assert_eq!(table.partitions[0].len_within(disk.size()), (8 << 20) - 512);
    }
}
