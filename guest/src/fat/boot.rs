//! The boot sector of a FAT volume: where everything lies.
//!
//! ```text
//! boot sector ... │ table │ table │ root (12 and 16 bits) │ clusters: directories and files, the root too (32 bits)
//! └── reserved ───┘
//! ```
//!
//! Source: Microsoft, "FAT: General Overview of On-Disk Format" 1.03, "Boot Sector and BPB".

use disk::Disk;

use super::name;
use crate::clusters::{Heap, RECORD, Width};
use crate::read::read_within;
use crate::{Error, Fields, Result};

const SECTOR: usize = 512;

/// Most clusters of FAT12, and of FAT16. Which of the two a volume is depends on nothing else.
const MOST_OF_TWELVE: u64 = 4084;
const MOST_OF_SIXTEEN: u64 = 65_524;

/// Where the root directory lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Root {
    /// In a place of its own, from and to (bytes).
    Fixed(u64, u64),
    /// In a chain with this first cluster.
    Chain(u32),
}

/// What a boot sector says, checked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Boot {
    pub(super) width: Width,
    pub(super) heap: Heap,
    pub(super) root: Root,
    /// Where each copy of the table starts (bytes); only one if it is said which counts.
    pub(super) tables: Vec<u64>,
    /// The first byte of each copy.
    pub(super) media: u8,
    /// Bytes of the volume.
    pub(super) size: u64,
    pub(super) label: String,
    /// Its serial number, if it has one.
    pub(super) serial: Option<u32>,
}

impl Boot {
    /// Reads the boot sector of a volume.
    pub(super) fn read(disk: &dyn Disk) -> Result<Self> {
        let sector = read_within(disk, 0, SECTOR)?;
        let boot = Self::parse(Fields(&sector), disk.size());
        boot.unwrap_or_else(|| Err(Error::damaged(format!("{} bytes are too few for a boot sector", sector.len()))))
    }

    /// `None` if there are not enough bytes.
    fn parse(sector: Fields, disk_size: u64) -> Option<Result<Self>> {
        let wrong = |what: String| Some(Err(Error::damaged(format!("the boot sector says {what}"))));
        let sector_size = sector.le16(11)?;
        if !(512..=4096).contains(&sector_size) || !sector_size.is_power_of_two() {
            return wrong(format!("that a sector has {sector_size} bytes"));
        }
        let per_cluster = sector.u8(13)?;
        let cluster_size = u32::from(sector_size) * u32::from(per_cluster);
        if !per_cluster.is_power_of_two() {
            return wrong(format!("that a cluster has {per_cluster} sectors"));
        }
        let (reserved, copies) = (sector.le16(14)?, sector.u8(16)?);
        if reserved == 0 || copies == 0 {
            return wrong(format!("that there are {copies} tables after {reserved} sectors"));
        }
        let either = |short: u16, long: u32| if short == 0 { long } else { short.into() };
        let bytes = |sectors: u64| sectors * u64::from(sector_size);
        let has_long_fields = sector.le16(22)? == 0;
        let table_len = bytes(either(sector.le16(22)?, sector.le32(36)?).into());
        let size = bytes(either(sector.le16(19)?, sector.le32(32)?).into());
        let tables_at = bytes(reserved.into());
        let root_at = tables_at + u64::from(copies) * table_len;
        let root_len = u64::from(sector.le16(17)?) * RECORD as u64;
        let heap_at = root_at + root_len.div_ceil(sector_size.into()) * u64::from(sector_size);
        if heap_at >= size || heap_at >= disk_size {
            return wrong(format!("that its first cluster is at {heap_at} of {size} bytes"));
        }
        let stated = (size - heap_at) / u64::from(cluster_size);
        let width = match () {
            _ if has_long_fields => Width::TwentyEight,
            _ if stated <= MOST_OF_TWELVE => Width::Twelve,
            _ if stated <= MOST_OF_SIXTEEN => Width::Sixteen,
            _ => return wrong(format!("that there are {stated} clusters, and FAT16 has {MOST_OF_SIXTEEN} at most")),
        };
        let count = u32::try_from(stated).unwrap_or(u32::MAX).min(width.clusters_in(table_len));
        let (root, flags, tail) = match width {
            Width::TwentyEight if sector.le16(42)? != 0 => {
                let version = sector.le16(42)?;
                return Some(Err(Error::unsupported(format!("version {version:#x} of FAT32 is not known"))));
            }
            Width::TwentyEight => (Root::Chain(sector.le32(44)?), sector.le16(40)?, 64),
            _ => (Root::Fixed(root_at, root_at + root_len), 0, 36),
        };
        let copies: Vec<u8> = match flags {
            // All copies are written alike.
            flags if flags & 0x80 == 0 => (0..copies).collect(),
            flags if flags & 0xf < copies.into() => vec![flags.to_le_bytes()[0] & 0xf],
            flags => return wrong(format!("that table {} counts of {copies}", flags & 0xf)),
        };
        // What follows is there if this says so, the last two of the three fields only with the second value.
        let (serial, label) = match sector.u8(tail + 2)? {
            0x29 => (sector.le32(tail + 3), name::label(&sector.array(tail + 7)?)),
            0x28 => (sector.le32(tail + 3), String::new()),
            _ => (None, String::new()),
        };
        Some(Ok(Self {
            width,
            heap: Heap::new(heap_at, cluster_size, count, disk_size),
            root,
            tables: copies.into_iter().map(|copy| tables_at + u64::from(copy) * table_len).collect(),
            media: sector.u8(21)?,
            size,
            label: if label == "NO NAME" { String::new() } else { label },
            serial,
        }))
    }

    /// What it is called.
    pub(super) fn kind(&self) -> &'static str {
        match self.width {
            Width::Twelve => "fat12",
            Width::Sixteen => "fat16",
            Width::TwentyEight | Width::ThirtyTwo => "fat32",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ErrorKind;

    /// A boot sector of FAT16 with 20,000 sectors, two tables of 80 and 512 entries in the root.
    fn sector() -> Vec<u8> {
        let mut sector = vec![0; SECTOR];
        sector[11..17].copy_from_slice(&[0, 2, 1, 1, 0, 2]);
        sector[17..24].copy_from_slice(&[0, 2, 0x20, 0x4e, 0xf8, 80, 0]);
        sector[38..43].copy_from_slice(&[0x29, 1, 2, 3, 4]);
        sector[43..54].copy_from_slice(b"\x80BC DE     ");
        sector
    }

    fn parse(changes: &[(usize, &[u8])]) -> Result<Boot> {
        let mut sector = sector();
        for (at, bytes) in changes {
            sector[*at..at + bytes.len()].copy_from_slice(bytes);
        }
        Boot::parse(Fields(&sector), 10_240_000).unwrap()
    }

    #[test]
    fn everything_follows_from_a_few_numbers() {
        let boot = parse(&[]).unwrap();
        assert_eq!((boot.kind(), boot.label.as_str(), boot.serial), ("fat16", "ÇBC DE", Some(0x0403_0201)));
        assert_eq!((boot.tables.as_slice(), boot.size), ([512, 81 * 512].as_slice(), 20_000 * 512));
        assert_eq!(boot.root, Root::Fixed(161 * 512, 193 * 512));
        assert_eq!((boot.heap.count(), boot.heap.place(2)), (19_807, 193 * 512));
        let boot = parse(&[(38, &[0x28]), (19, &[0xa0, 0x0f])]).unwrap();
        assert_eq!((boot.kind(), boot.label.as_str(), boot.serial), ("fat12", "", Some(0x0403_0201)));
        let long: &[(usize, &[u8])] =
            &[(17, &[0, 0]), (22, &[0, 0]), (36, &[160, 0, 0, 0, 0x81, 0, 0, 0, 5, 0, 0, 0]), (66, &[0])];
        let boot = parse(long).unwrap();
        assert_eq!((boot.kind(), boot.root, boot.tables.as_slice()), ("fat32", Root::Chain(5), [161 * 512].as_slice()));
        assert_eq!((boot.serial, boot.heap.count()), (None, 19_679));
    }

    #[test]
    fn clusters_are_as_many_as_the_table_has_entries_for() {
        assert_eq!(parse(&[(22, &[10, 0])]).unwrap().heap.count(), 2558);
    }

    #[test]
    fn what_contradicts_itself_is_damage() {
        let cases: [&[(usize, &[u8])]; 9] = [
            &[(11, &[0, 3])],
            &[(11, &[0, 0])],
            &[(11, &[0, 0x20])],
            &[(13, &[0])],
            &[(13, &[3])],
            &[(14, &[0, 0])],
            &[(16, &[0])],
            &[(19, &[100, 0])],
            &[(19, &[0, 0]), (32, &[0xff, 0xff, 0xff, 0xff])],
        ];
        for case in cases {
            assert_eq!(parse(case).unwrap_err().kind(), ErrorKind::Damaged, "{case:?}");
        }
        let long = |flags, version| parse(&[(22, &[0, 0]), (36, &[160, 0, 0, 0, flags, 0, version, 0, 2, 0, 0, 0])]);
        assert_eq!(long(0, 1).unwrap_err().kind(), ErrorKind::Unsupported);
        let active = |flags| long(flags, 0).map(|boot| boot.tables.len());
        assert_eq!(active(0x82).unwrap_err().kind(), ErrorKind::Damaged);
        assert_eq!((active(0x02), active(0x81)), (Ok(2), Ok(1)));
        assert!(Boot::parse(Fields(&sector()[..300]), 1 << 20).is_some_and(|boot| boot.is_ok()));
        assert!(Boot::parse(Fields(&[]), 0).is_none());
    }
}
