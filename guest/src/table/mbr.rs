//! The partition table of sector 0, and the chain of records in its extended partitions.
//!
//! Source: the UEFI specification 2.10, section 5.2; Linux `block/partitions/msdos.c`.

use std::collections::HashSet;

use disk::Disk;

use super::{Partition, Purpose, Table};
use crate::read::read_within;
use crate::{Error, Fields, probe};

/// Length of a record in bytes, whatever the size of a sector.
const RECORD: usize = 512;
/// The first logical partition has this number.
const FIRST_LOGICAL: u32 = 5;
/// More logical partitions are not looked for: Linux has 256 minors for a disk.
const MAX_LOGICAL: u32 = 251;

#[derive(Debug, Clone, Copy)]
struct Entry {
    kind: u8,
    start: u32,
    count: u32,
}

/// The four entries of sector 0.
#[derive(Debug)]
pub(super) struct Mbr([Entry; 4]);

impl Entry {
    fn is_extended(self) -> bool {
        matches!(self.kind, 0x05 | 0x0f | 0x85)
    }

    fn is_protective(self) -> bool {
        self.kind == 0xee
    }

    fn is_used(self) -> bool {
        self.kind != 0 && self.count > 0
    }
}

/// Returns the four entries of a record, `None` if the bytes are none.
fn entries(record: &[u8]) -> Option<[Entry; 4]> {
    let fields = Fields(record);
    (fields.le16(510)? == 0xaa55).then_some(())?;
    let mut entries = [Entry { kind: 0, start: 0, count: 0 }; 4];
    for (entry, at) in entries.iter_mut().zip((446..).step_by(16)) {
        // Where code stands instead of a table, some flag is another.
        matches!(fields.u8(at)?, 0 | 0x80).then_some(())?;
        *entry = Entry { kind: fields.u8(at + 4)?, start: fields.le32(at + 8)?, count: fields.le32(at + 12)? };
    }
    Some(entries)
}

/// Returns what sector 0 says, `None` if it names no partition.
pub(super) fn read(disk: &dyn Disk) -> disk::Result<Option<Mbr>> {
    let record = read_within(disk, 0, RECORD)?;
    if probe::boot_sector(Fields(&record)).is_some() {
        return Ok(None);
    }
    Ok(entries(&record).filter(|entries| entries.iter().any(|entry| entry.is_used())).map(Mbr))
}

impl Mbr {
    /// Returns the last sector that an entry protects for a GPT, `None` if none does.
    pub(super) fn protected_until(&self) -> Option<u64> {
        let entry = self.0.iter().find(|entry| entry.is_protective())?;
        Some((u64::from(entry.start) + u64::from(entry.count)).saturating_sub(1))
    }

    /// Returns the partitions but those that hold others or protect a GPT.
    pub(super) fn table(&self, disk: &dyn Disk, sector_size: u64) -> Table {
        let mut table = Table::default();
        for (number, entry) in (1..).zip(self.0) {
            if entry.is_used() && !entry.is_extended() && !entry.is_protective() {
                let (start, count) = (entry.start.into(), entry.count.into());
                table.partitions.push(Partition::of_sectors(
                    number,
                    start,
                    count,
                    sector_size,
                    Purpose::Mbr(entry.kind),
                ));
            }
        }
        let mut next = FIRST_LOGICAL;
        for entry in self.0.into_iter().filter(|entry| entry.is_used() && entry.is_extended()) {
            if let Err(problem) = logical(disk, sector_size, entry, &mut next, &mut table.partitions) {
                table.problems.push(problem);
            }
        }
        table
    }
}

/// Adds the logical partitions of an extended one, up to what is wrong in its chain of records.
fn logical(
    disk: &dyn Disk,
    sector_size: u64,
    extended: Entry,
    next_number: &mut u32,
    partitions: &mut Vec<Partition>,
) -> crate::Result<()> {
    let (start, count) = (u64::from(extended.start), u64::from(extended.count));
    let mut at = start;
    let mut seen = HashSet::new();
    loop {
        // A chain can neither be longer than all numbers of partitions twice over, nor come back to where it was.
        if !seen.insert(at) || seen.len() > 512 {
            return Err(Error::damaged(format!("the chain of logical partitions comes back to sector {at}")));
        }
        let record = read_within(disk, at.saturating_mul(sector_size), RECORD)?;
        let Some(entries) = entries(&record) else {
            return Err(Error::damaged(format!(
                "no record of a logical partition is at sector {at}, where one should be: those after it are not shown"
            )));
        };
        let lies_within = |entry: &Entry| at - start + u64::from(entry.start) + u64::from(entry.count) <= count;
        let data = entries.iter().enumerate().filter(|(_, entry)| entry.is_used() && !entry.is_extended());
        // Two entries are in use; what others hold is believed only if it can be.
        for (_, entry) in data.filter(|(index, entry)| *index < 2 || lies_within(entry)) {
            if *next_number >= FIRST_LOGICAL + MAX_LOGICAL {
                return Err(Error::damaged(format!("there are more than {MAX_LOGICAL} logical partitions")));
            }
            let (start, count) = (at + u64::from(entry.start), entry.count.into());
            partitions.push(Partition::of_sectors(*next_number, start, count, sector_size, Purpose::Mbr(entry.kind)));
            *next_number += 1;
        }
        let Some(link) = entries.iter().find(|entry| entry.is_used() && entry.is_extended()) else { return Ok(()) };
        if u64::from(link.start) >= count {
            return Err(Error::damaged(format!(
                "the chain of logical partitions leaves the extended one, to sector {}",
                start + u64::from(link.start)
            )));
        }
        at = start + u64::from(link.start);
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::memory::Memory;

    /// A record of entries: type, first sector, number of sectors.
    pub(crate) fn record(entries: &[(u8, u32, u32)]) -> Vec<u8> {
        let mut record = vec![0; RECORD];
        for (entry, at) in entries.iter().zip((446..).step_by(16)) {
            record[at + 4] = entry.0;
            record[at + 8..at + 12].copy_from_slice(&entry.1.to_le_bytes());
            record[at + 12..at + 16].copy_from_slice(&entry.2.to_le_bytes());
        }
        record[510..].copy_from_slice(&[0x55, 0xaa]);
        record
    }

    type Record<'a> = (u64, &'a [(u8, u32, u32)]);

    fn disk(records: &[Record]) -> Memory {
        let mut disk = Memory::new(64 << 20);
        for (sector, entries) in records {
            disk.write(sector * 512, &record(entries));
        }
        disk
    }

    /// Number, first sector and number of sectors of all partitions, and the problems.
    fn table(disk: &Memory) -> (Vec<(u32, u64, u64)>, Vec<String>) {
        let table = read(disk).unwrap().expect("there is a table").table(disk, 512);
        let all =
            table.partitions.iter().map(|partition| (partition.number, partition.start / 512, partition.len / 512));
        (all.collect(), table.problems.iter().map(ToString::to_string).collect())
    }

    #[test]
    fn slots_give_primary_partitions_their_numbers_and_the_chain_the_logical_ones() {
        let disk = disk(&[
            (0, &[(0x83, 2048, 1000), (0, 0, 0), (0x0f, 10_000, 50_000), (0x07, 70_000, 5)]),
            (10_000, &[(0x83, 63, 100), (0x05, 20_000, 300)]),
            (30_000, &[(0x83, 63, 200), (0x05, 1_000, 300)]),
            (11_000, &[(0x82, 2, 3)]),
        ]);
        let expected = [(1, 2048, 1000), (4, 70_000, 5), (5, 10_063, 100), (6, 30_063, 200), (7, 11_002, 3)];
        assert_eq!(table(&disk), (expected.to_vec(), vec![]));
    }

    #[test]
    fn a_chain_ends_where_it_makes_no_sense_and_what_was_found_is_kept() {
        let extended: &[_] = &[(0x83, 1, 1), (0x05, 100, 1000)];
        let cases: [(&[Record], &str); 4] = [
            (&[(100, &[(0x83, 1, 1), (0x05, 0, 10)])], "comes back to sector 100"),
            (&[(100, &[(0x83, 1, 1), (0x05, 50, 10)]), (150, &[(0, 0, 0), (0x05, 0, 10)])], "comes back to sector 100"),
            (&[(100, &[(0x83, 1, 1), (0x05, 1000, 10)])], "leaves the extended one, to sector 1100"),
            (&[(100, &[(0x83, 1, 1), (0x05, 999, 10)])], "no record of a logical partition is at sector 1099"),
        ];
        for (records, problem) in cases {
            let records: Vec<_> = [(0, extended)].iter().chain(records).copied().collect();
            let (partitions, problems) = table(&disk(&records));
            assert_eq!(partitions, [(1, 1, 1), (5, 101, 1)]);
            assert!(problems.len() == 1 && problems[0].contains(problem), "{problems:?}");
        }
    }

    #[test]
    fn a_chain_of_thousands_ends_at_the_last_number() {
        let mut disk = disk(&[(0, &[(0x05, 100, u32::MAX)])]);
        for index in 0..1000 {
            disk.write((100 + u64::from(index)) * 512, &record(&[(0x83, 1, 1), (0x05, index + 1, 1)]));
        }
        let (partitions, problems) = table(&disk);
        assert_eq!((partitions.len(), partitions.last()), (251, Some(&(255, 351, 1))));
        assert_eq!(problems, ["there are more than 251 logical partitions"]);
    }

    #[test]
    fn what_is_no_table_is_none() {
        let mut code = record(&[(0x83, 1, 1)]);
        code[446] = 0x33;
        let unmarked = record(&[(0x83, 1, 1)])[..510].to_vec();
        for sector in [code, unmarked, record(&[]), record(&[(0x83, 5, 0)]), vec![]] {
            let mut disk = Memory::new(1 << 20);
            disk.write(0, &sector);
            assert!(read(&disk).unwrap().is_none(), "{sector:?}");
        }
        assert!(read(&Memory::new(100)).unwrap().is_none());
    }

    #[test]
    fn primary_partitions_are_known_even_if_the_chain_cannot_be_read() {
        let mut disk = disk(&[(0, &[(0x83, 1, 1), (0x05, 100, 1000)])]);
        disk.break_from(512);
        let table = read(&disk).unwrap().unwrap().table(&disk, 512);
        assert_eq!(table.partitions.len(), 1);
        assert_eq!(table.problems[0].kind(), crate::ErrorKind::Disk);
    }
}
