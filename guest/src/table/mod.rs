//! Partitions of a disk.
//!
//! Which table a disk has is decided as Linux does, and more is found where that is safe:
//!
//! | sector 0 | |
//! |---|---|
//! | the boot sector of a FAT, exFAT or NTFS volume | no table |
//! | partitions, none of them protecting a GPT | MBR |
//! | one that protects a GPT | GPT; the others of a hybrid MBR if no GPT can be read |
//! | nothing | GPT if its first header is sound, or its backup on a disk that holds nothing else |

mod gpt;
mod mbr;

use std::sync::Arc;

use disk::Disk;

use crate::map::{Map, Place};
use crate::probe::{self, Content};
use crate::{Error, Mapped, Result};

/// Sector sizes, in the order in which they are tried.
const SECTOR_SIZES: [u64; 2] = [512, 4096];

/// What a table says a partition is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Purpose {
    /// The type of an MBR's entry.
    Mbr(u8),
    /// The type of a GPT's entry, as stored.
    Gpt([u8; 16]),
}

/// A partition: where it lies.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Partition {
    /// As Linux counts it: its slot in the table from 1 on; the logical ones of an MBR from 5 on.
    pub(crate) number: u32,
    /// Where it starts, in bytes.
    pub(crate) start: u64,
    /// Its length in bytes as the table says; it may reach past the end of the disk.
    pub(crate) len: u64,
    /// What for.
    pub(crate) purpose: Purpose,
}

/// What a table says.
#[derive(Debug, Default)]
pub(crate) struct Table {
    pub(crate) partitions: Vec<Partition>,
    /// What is wrong with it; the partitions are right as far as one can tell.
    pub(crate) problems: Vec<Error>,
}

impl Partition {
    /// Makes a partition of numbers of sectors; what no disk can have ends at the last byte that a number can say.
    fn of_sectors(number: u32, start: u64, count: u64, sector_size: u64, purpose: Purpose) -> Self {
        let start = start.saturating_mul(sector_size);
        let len = count.saturating_mul(sector_size).min(u64::MAX - start);
        Self { number, start, len, purpose }
    }

    /// Returns where it ends, in bytes.
    pub(crate) fn end(&self) -> u64 {
        self.start.saturating_add(self.len)
    }

    /// Returns how many bytes of it lie on a disk of that size.
    pub(crate) fn len_within(&self, disk_size: u64) -> u64 {
        self.end().min(disk_size).saturating_sub(self.start)
    }
}

impl Table {
    /// Says which partitions lie over each other.
    fn find_overlaps(&mut self) {
        let mut by_start: Vec<&Partition> = self.partitions.iter().filter(|partition| partition.len > 0).collect();
        by_start.sort_by_key(|partition| (partition.start, partition.number));
        let mut longest: Option<&Partition> = None;
        let mut found = vec![];
        for next in by_start {
            if let Some(before) = longest.filter(|before| before.end() > next.start) {
                found.push(format!("partitions {} and {} lie over each other", before.number, next.number));
            }
            if longest.is_none_or(|before| before.end() < next.end()) {
                longest = Some(next);
            }
        }
        self.problems.extend(found.into_iter().map(Error::damaged));
    }
}

/// Returns the table of a disk, `None` if it has none.
///
/// # Errors
/// The disk could not be read where its table begins. What is damaged is in [`Table::problems`].
pub(crate) fn read(disk: &Arc<dyn Disk>) -> disk::Result<Option<Table>> {
    let Some(mut table) = find(disk)? else { return Ok(None) };
    table.find_overlaps();
    Ok(Some(table))
}

fn find(disk: &Arc<dyn Disk>) -> disk::Result<Option<Table>> {
    let bytes: &dyn Disk = &**disk;
    let Some(mbr) = mbr::read(bytes)? else {
        if let Some(table) = gpt::read_first(bytes)? {
            return Ok(Some(table));
        }
        return match probe::probe(bytes)? {
            Content::Empty | Content::Unknown => gpt::read_backup(bytes, None),
            _ => Ok(None),
        };
    };
    let Some(last_sector) = mbr.protected_until() else { return Ok(Some(mbr_table(disk, &mbr))) };
    let found = match gpt::read_first(bytes)? {
        None => gpt::read_backup(bytes, Some(last_sector))?,
        found => found,
    };
    Ok(Some(found.unwrap_or_else(|| {
        let mut table = mbr_table(disk, &mbr);
        let said = "sector 0 says that the disk has a GPT, but neither that nor its backup is sound";
        table.problems.push(Error::damaged(match table.partitions.len() {
            0 => format!("{said}: no partition can be shown"),
            _ => format!("{said}: only the partitions that sector 0 names are shown"),
        }));
        table
    })))
}

/// An MBR does not say how long a sector is: it is the first size with which something known stands on a partition.
fn mbr_table(disk: &Arc<dyn Disk>, mbr: &mbr::Mbr) -> Table {
    for sector_size in SECTOR_SIZES {
        let table = mbr.table(&**disk, sector_size);
        // Of another size than the usual one all must be right.
        let fits = table.partitions.iter().all(|partition| partition.end() <= disk.size());
        if sector_size != SECTOR_SIZES[0] && !fits {
            continue;
        }
        // What cannot be read says nothing, so the usual size is kept.
        if table.partitions.iter().any(|partition| has_something(disk, partition).unwrap_or(true)) {
            return table;
        }
    }
    mbr.table(&**disk, SECTOR_SIZES[0])
}

fn has_something(disk: &Arc<dyn Disk>, partition: &Partition) -> Result<bool> {
    let map = Map::of_range(Place { disk: 0, offset: partition.start }, partition.len_within(disk.size()))?;
    let content = probe::probe(&Mapped::new(map, vec![disk.clone()])?)?;
    Ok(!matches!(content, Content::Empty | Content::Unknown))
}

#[cfg(test)]
pub(crate) mod tests;
