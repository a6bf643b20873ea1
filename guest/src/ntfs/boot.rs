//! The boot sector: how large everything is, and where the table of files starts.
//!
//! Source: "$Boot" of the Linux-NTFS documentation.

use crate::{Error, Fields, Result};

/// Bytes of the boot sector that say anything.
pub(super) const SIZE: usize = 512;

/// Bytes of a cluster at most: Windows makes none larger.
const MAX_CLUSTER: u64 = 2 << 20;

/// Bytes of a record of the table of files at most.
const MAX_RECORD: u64 = 4096;

/// Bytes of a block of an index at most.
const MAX_INDEX_BLOCK: u64 = 64 << 10;

/// Bytes of a block of an index, of a record, and of what they stand on, at least.
const MIN_BLOCK: u64 = 512;

/// What a boot sector says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Boot {
    /// Bytes of a cluster.
    pub(super) cluster_size: u64,
    /// How many clusters there are.
    pub(super) clusters: u64,
    /// Bytes of a record of the table of files.
    pub(super) record_size: u64,
    /// Cluster in which the table of files starts.
    pub(super) table: u64,
    /// Number of the volume.
    pub(super) serial: u64,
}

impl Boot {
    /// Parses a boot sector.
    pub(super) fn parse(bytes: &[u8]) -> Result<Self> {
        let fields = Fields(bytes);
        let missing = || Error::damaged("the boot sector is too short");
        if fields.bytes(3, 8) != Some(b"NTFS    ") {
            return Err(Error::damaged("the boot sector is none of NTFS"));
        }
        let sector_size = u64::from(fields.le16(0x0b).ok_or_else(missing)?);
        if !sector_size.is_power_of_two() || !(256..=4096).contains(&sector_size) {
            return Err(Error::damaged(format!("the boot sector says that a sector has {sector_size} bytes")));
        }
        let sectors_per_cluster = match fields.u8(0x0d).ok_or_else(missing)? {
            // Two to the power of what is missing to 256: clusters of more than 64 KiB.
            stored @ 0xe0.. => 1_u64 << (256 - u32::from(stored)),
            stored => u64::from(stored),
        };
        let cluster_size = sector_size * sectors_per_cluster;
        if !cluster_size.is_power_of_two() || !(MIN_BLOCK..=MAX_CLUSTER).contains(&cluster_size) {
            return Err(Error::damaged(format!("the boot sector says that a cluster has {cluster_size} bytes")));
        }
        let sectors = fields.le64(0x28).ok_or_else(missing)?;
        let record_size = block_size(fields.u8(0x40).ok_or_else(missing)?, cluster_size, MAX_RECORD)
            .ok_or_else(|| Error::damaged("the boot sector says that a record has no size that one can have"))?;
        Ok(Self {
            cluster_size,
            clusters: sectors / sectors_per_cluster,
            record_size,
            table: fields.le64(0x30).ok_or_else(missing)?,
            serial: fields.le64(0x48).ok_or_else(missing)?,
        })
    }
}

/// Returns whether something that is read in blocks can have such.
pub(super) fn is_index_block(size: u64) -> bool {
    size.is_power_of_two() && (MIN_BLOCK..=MAX_INDEX_BLOCK).contains(&size)
}

/// Returns the bytes of a block: so many clusters, or two to the power of what is missing to 256.
fn block_size(stored: u8, cluster_size: u64, most: u64) -> Option<u64> {
    let size = if stored < 0x80 {
        u64::from(stored) * cluster_size
    } else {
        1_u64.checked_shl(256 - u32::from(stored)).unwrap_or(0)
    };
    (size.is_power_of_two() && (MIN_BLOCK..=most).contains(&size)).then_some(size)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn boot(sector_size: u16, per_cluster: u8, record: u8) -> Result<(u64, u64, u64)> {
        let mut bytes = [0; SIZE];
        bytes[3..11].copy_from_slice(b"NTFS    ");
        bytes[0x0b..0x0d].copy_from_slice(&sector_size.to_le_bytes());
        bytes[0x0d] = per_cluster;
        bytes[0x28..0x30].copy_from_slice(&0x10_0000_u64.to_le_bytes());
        bytes[0x40] = record;
        Boot::parse(&bytes).map(|boot| (boot.cluster_size, boot.clusters, boot.record_size))
    }

    #[test]
    fn sizes_are_counted_in_two_ways() {
        for (sector_size, per_cluster, record, expected) in [
            (512, 8, 0xf6, (4096, 0x2_0000, 1024)),
            (512, 1, 2, (512, 0x10_0000, 1024)),
            (512, 128, 0xf6, (65_536, 0x2000, 1024)),
            (512, 0xf8, 0xf6, (131_072, 0x1000, 1024)),
            (512, 0xf4, 0xf4, (2 << 20, 0x100, 4096)),
            (4096, 1, 1, (4096, 0x10_0000, 4096)),
            (4096, 16, 0xf4, (65_536, 0x1_0000, 4096)),
        ] {
            assert_eq!(boot(sector_size, per_cluster, record), Ok(expected));
        }
    }

    #[test]
    fn sizes_that_nothing_has_are_damage() {
        for (sector_size, per_cluster, record) in [
            (0, 8, 0xf6),
            (513, 8, 0xf6),
            (8192, 8, 0xf6),
            (512, 0, 0xf6),
            (512, 3, 0xf6),
            (512, 0x81, 0xf6),
            (512, 0xe0, 0xf6),
            (4096, 0xf4, 0xf6),
            (512, 8, 0),
            (512, 8, 3),
            (512, 8, 0x80),
            (512, 8, 0xff),
            (512, 128, 127),
        ] {
            boot(sector_size, per_cluster, record).expect_err("no such size");
        }
    }
}
