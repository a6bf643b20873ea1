//! The boot region of an exFAT volume: where everything lies.
//!
//! ```text
//! main boot region │ backup │ ... │ table │ table (TexFAT) │ ... │ clusters: everything else, the root too
//! └─ 12 sectors: boot sector, ..., checksum of those before
//! ```
//!
//! Source: Microsoft, "exFAT file system specification", section 3.

use disk::Disk;

use crate::clusters::{FIRST, Heap, Width};
use crate::read::read_within;
use crate::{Error, Fields, Result};

/// Sectors of a region, the last of which holds the checksum of the others.
const SECTORS: usize = 12;

/// Sectors have 2^9 to 2^12 bytes, clusters 2^25 at most.
const SECTOR_SHIFTS: std::ops::RangeInclusive<u8> = 9..=12;
const MAX_CLUSTER_SHIFT: u8 = 25;

/// In the flags, that the second table counts.
const SECOND_TABLE: u16 = 1;

/// What a boot region says, checked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Boot {
    pub(super) heap: Heap,
    /// Where the table that counts starts (bytes).
    pub(super) table: u64,
    /// The first cluster of the root.
    pub(super) root: u32,
    pub(super) serial: u32,
    /// Bytes of the volume.
    pub(super) size: u64,
    /// Whether the main region is damaged, and this is the backup.
    pub(super) is_backup: bool,
}

impl Boot {
    /// Reads the main boot region of a volume, or if that is damaged the backup.
    pub(super) fn read(disk: &dyn Disk) -> Result<Self> {
        let main = match region(disk, 0)? {
            Ok(sector) => return Self::parse(Fields(&sector), disk.size(), false),
            Err(error) => error,
        };
        // How long a sector is, is in the region.
        for shift in SECTOR_SHIFTS {
            if let Ok(sector) = region(disk, (SECTORS as u64) << shift)?
                && sector.get(108) == Some(&shift)
            {
                return Self::parse(Fields(&sector), disk.size(), true);
            }
        }
        Err(Error::damaged(format!("both boot regions are damaged; the first: {main}")))
    }

    fn parse(sector: Fields, disk_size: u64, is_backup: bool) -> Result<Self> {
        Self::fields(sector, disk_size, is_backup)
            .unwrap_or_else(|| Err(Error::damaged("the boot sector is too short")))
    }

    /// `None` if there are not enough bytes.
    fn fields(sector: Fields, disk_size: u64, is_backup: bool) -> Option<Result<Self>> {
        let wrong = |what: String| Some(Err(Error::damaged(format!("the boot sector says {what}"))));
        let version = sector.le16(104)?;
        if version >> 8 != 1 {
            let version = format!("{}.{:02}", version >> 8, version & 0xff);
            return Some(Err(Error::unsupported(format!("version {version} of exFAT is not known"))));
        }
        let (sector_shift, more) = (sector.u8(108)?, sector.u8(109)?);
        let cluster_shift = sector_shift.saturating_add(more);
        if !SECTOR_SHIFTS.contains(&sector_shift) || cluster_shift > MAX_CLUSTER_SHIFT {
            return wrong(format!("that sectors have 2^{sector_shift} bytes and clusters 2^{cluster_shift}"));
        }
        let bytes = |sectors: u32| u64::from(sectors) << sector_shift;
        let (table_at, table_len, heap_at) =
            (bytes(sector.le32(80)?), bytes(sector.le32(84)?), bytes(sector.le32(88)?));
        let size = sector.le64(72)?.saturating_mul(1 << sector_shift);
        let tables = sector.u8(110)?;
        let uses_second = sector.le16(106)? & SECOND_TABLE != 0;
        if !(1..=2).contains(&tables) || uses_second && tables < 2 {
            return wrong(format!("that of {tables} tables number {} counts", 1 + u8::from(uses_second)));
        }
        let tables_end = table_at + table_len * u64::from(tables);
        if table_at == 0 || tables_end > heap_at || heap_at >= size || heap_at >= disk_size {
            return wrong(format!("that tables end at {tables_end} and clusters start at {heap_at} of {size} bytes"));
        }
        let count = sector.le32(92)?.min(Width::ThirtyTwo.clusters_in(table_len));
        let in_volume = u32::try_from((size - heap_at) >> cluster_shift).unwrap_or(u32::MAX);
        let heap = Heap::new(heap_at, 1 << cluster_shift, count.min(in_volume), disk_size);
        let root = sector.le32(96)?;
        if root < FIRST {
            return wrong(format!("that the root starts at cluster {root}"));
        }
        Some(Ok(Self {
            heap,
            table: table_at + if uses_second { table_len } else { 0 },
            root,
            serial: sector.le32(100)?,
            size,
            is_backup,
        }))
    }
}

/// Returns the first sector of a region that starts at `at` (bytes), or why the region cannot be believed.
fn region(disk: &dyn Disk, at: u64) -> Result<Result<Vec<u8>>> {
    let first = read_within(disk, at, 512)?;
    let shift = match first.get(108) {
        Some(shift) if SECTOR_SHIFTS.contains(shift) && first.get(3..11) == Some(b"EXFAT   ") => *shift,
        _ => return Ok(Err(Error::damaged("it does not start as one does"))),
    };
    let bytes = read_within(disk, at, SECTORS << shift)?;
    let (sectors, sums) = bytes.split_at(bytes.len().min((SECTORS - 1) << shift));
    let sum = checksum(sectors).to_le_bytes();
    if sums.len() != 1 << shift || !sums.chunks(4).all(|stored| stored == sum) {
        return Ok(Err(Error::damaged("its checksum is wrong")));
    }
    Ok(Ok(first))
}

/// Returns the checksum of a region; flags and how full the volume is are not part of it.
fn checksum(sectors: &[u8]) -> u32 {
    let counted = sectors.iter().enumerate().filter(|(at, _)| !matches!(at, 106 | 107 | 112));
    counted.fold(0, |sum: u32, (_, byte)| sum.rotate_right(1).wrapping_add(u32::from(*byte)))
}
