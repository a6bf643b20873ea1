//! What stands on a volume, told by its first and last bytes.
//!
//! Sources: the headers of each format as their own programs document them; util-linux `libblkid`, for which wins where
//! several are found. What belongs to a set of disks is asked first, since a member may look like what the set holds.

use disk::Disk;
use serde::{Deserialize, Serialize};

use crate::Fields;
use crate::read::read_within;

/// The last that is looked for at the start is the superblock of Btrfs: 4 KiB at 64 KiB.
const HEAD: usize = 68 << 10;
/// The first that is looked for at the end is a superblock of md, less than this before it.
const TAIL: usize = 128 << 10;

/// What stands on a volume.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Content {
    /// Zeroes wherever something known would begin.
    Empty,
    /// Something, but nothing known.
    Unknown,
    /// It could not be looked at.
    Unread,
    /// The second extended filesystem.
    Ext2,
    /// The same with a journal.
    Ext3,
    /// The same with anything that came later.
    Ext4,
    /// XFS.
    Xfs,
    /// Btrfs, or the first of its devices.
    Btrfs,
    /// Another device of a Btrfs; only a [survey](fn@crate::survey) tells it from the first.
    BtrfsDevice,
    /// NTFS.
    Ntfs,
    /// FAT with less than 4,085 clusters.
    Fat12,
    /// FAT with less than 65,525 clusters.
    Fat16,
    /// FAT with more.
    Fat32,
    /// exFAT.
    ExFat,
    /// Squashfs.
    Squashfs,
    /// ISO 9660.
    Iso9660,
    /// A physical volume of LVM2.
    LvmPhysicalVolume,
    /// A member of an array of Linux md.
    MdMember,
    /// Swap space, or what Linux wrote there to hibernate.
    Swap,
    /// LUKS, the first version.
    Luks1,
    /// LUKS, the second version.
    Luks2,
    /// BitLocker.
    BitLocker,
    /// ReFS.
    ReFs,
    /// A device of a ZFS pool.
    Zfs,
    /// VMFS.
    Vmfs,
    /// Part of a dynamic disk of Windows.
    WindowsDynamicDisk,
    /// Part of a pool of Windows' Storage Spaces.
    StorageSpaces,
    /// A device of bcache.
    Bcache,
    /// A journal of an ext3 or ext4 on another volume.
    ExtJournal,
    /// F2FS.
    F2fs,
    /// `ReiserFS`.
    ReiserFs,
    /// JFS.
    Jfs,
    /// HFS+.
    HfsPlus,
    /// APFS.
    Apfs,
    /// UFS.
    Ufs,
    /// UDF.
    Udf,
}

impl Content {
    /// Returns what it is called.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Empty => "empty",
            Self::Unknown => "unknown",
            Self::Unread => "not looked at",
            Self::Ext2 => "ext2",
            Self::Ext3 => "ext3",
            Self::Ext4 => "ext4",
            Self::Xfs => "XFS",
            Self::Btrfs => "Btrfs",
            Self::BtrfsDevice => "Btrfs device",
            Self::Ntfs => "NTFS",
            Self::Fat12 => "FAT12",
            Self::Fat16 => "FAT16",
            Self::Fat32 => "FAT32",
            Self::ExFat => "exFAT",
            Self::Squashfs => "squashfs",
            Self::Iso9660 => "ISO 9660",
            Self::LvmPhysicalVolume => "LVM physical volume",
            Self::MdMember => "md member",
            Self::Swap => "swap",
            Self::Luks1 => "LUKS1",
            Self::Luks2 => "LUKS2",
            Self::BitLocker => "BitLocker",
            Self::ReFs => "ReFS",
            Self::Zfs => "ZFS",
            Self::Vmfs => "VMFS",
            Self::WindowsDynamicDisk => "Windows dynamic disk",
            Self::StorageSpaces => "Storage Spaces",
            Self::Bcache => "bcache",
            Self::ExtJournal => "journal of ext4",
            Self::F2fs => "F2FS",
            Self::ReiserFs => "ReiserFS",
            Self::Jfs => "JFS",
            Self::HfsPlus => "HFS+",
            Self::Apfs => "APFS",
            Self::Ufs => "UFS",
            Self::Udf => "UDF",
        }
    }

    /// Returns a sentence on how to get at the files in `volume`, the path of its bytes, of what is never read here.
    ///
    /// `None` for filesystems that have a reader or will have one, for what holds no files, and for what other volumes are
    /// made of.
    #[must_use]
    pub fn advice(self, volume: &str) -> Option<String> {
        let what = match self {
            Self::Luks1 | Self::Luks2 => format!("encrypted; map {volume} on a host that has its passphrase"),
            Self::BitLocker => {
                format!("encrypted; unlock {volume} with its password or recovery key (dislocker, cryptsetup)")
            }
            Self::ReFs => format!("attach {volume} to a Windows Server, read-only"),
            Self::Zfs => format!("import the pool read-only from {volume} and its other devices on a host with ZFS"),
            Self::Vmfs => format!("mount {volume} with vmfs-tools or attach it to a host with ESXi"),
            Self::WindowsDynamicDisk => "its volumes are not assembled; map the whole disks with ldmtool".to_owned(),
            Self::StorageSpaces => "attach the whole disks to a Windows that knows the pool, read-only".to_owned(),
            Self::Bcache => format!("register {volume} and its cache on a host with bcache"),
            Self::F2fs | Self::ReiserFs | Self::Jfs | Self::HfsPlus | Self::Apfs | Self::Ufs | Self::Udf => {
                format!("not read here; mount {volume} read-only on a host that knows it")
            }
            Self::Empty | Self::Unknown | Self::Unread | Self::Swap | Self::ExtJournal => return None,
            Self::LvmPhysicalVolume | Self::MdMember | Self::BtrfsDevice => return None,
            Self::Ext2 | Self::Ext3 | Self::Ext4 | Self::Xfs | Self::Btrfs | Self::Ntfs => return None,
            Self::Fat12 | Self::Fat16 | Self::Fat32 | Self::ExFat | Self::Squashfs | Self::Iso9660 => return None,
        };
        Some(format!("{}: {what}", self.name()))
    }
}

/// Returns what stands on a volume.
///
/// # Errors
/// It could not be read.
pub fn probe(volume: &dyn Disk) -> disk::Result<Content> {
    let head = read_within(volume, 0, HEAD)?;
    let head = Fields(&head);
    let tail_at = volume.size().saturating_sub(u64::try_from(TAIL).expect("it is 128 KiB"));
    let tail = read_within(volume, tail_at, TAIL)?;
    let found = member(head).or_else(|| md_at_end(volume.size(), tail_at, Fields(&tail))).or_else(|| filesystem(head));
    if let Some(content) = found {
        return Ok(content);
    }
    if let Some(content) = further_in(volume)? {
        return Ok(content);
    }
    let is_zero = |bytes: &[u8]| bytes == &[0; HEAD + TAIL][..bytes.len()];
    Ok(if is_zero(head.0) && is_zero(&tail) { Content::Empty } else { Content::Unknown })
}

/// Returns what a volume of which this is the first sector is, if it is one that starts as it were a boot sector: its code
/// stands where a partition table would be.
pub(crate) fn boot_sector(head: Fields) -> Option<Content> {
    match head.bytes(3, 8)? {
        b"NTFS    " => Some(Content::Ntfs),
        b"EXFAT   " => Some(Content::ExFat),
        b"ReFS\0\0\0\0" => Some(Content::ReFs),
        b"-FVE-FS-" => Some(Content::BitLocker),
        _ => fat(head),
    }
}

/// BitLocker To Go looks like FAT, but for this identifier where FAT has code.
const BITLOCKER_TO_GO: [u8; 16] =
    [0x3b, 0xd6, 0x67, 0x49, 0x29, 0x2e, 0xd8, 0x4a, 0x83, 0x99, 0xf6, 0xa3, 0x39, 0xe3, 0xd0, 0x01];

/// Source: Microsoft, "FAT32 File System Specification" 1.03.
fn fat(head: Fields) -> Option<Content> {
    let (bytes, per_cluster) = (head.le16(11)?, head.u8(13)?);
    let (reserved, tables, roots) = (head.le16(14)?, head.u8(16)?, head.le16(17)?);
    let is_sound = (512..=4096).contains(&bytes)
        && bytes.is_power_of_two()
        && per_cluster.is_power_of_two()
        && reserved > 0
        && (1..=4).contains(&tables)
        && matches!(head.u8(21)?, 0xf0 | 0xf8..)
        && matches!(head.u8(0)?, 0xeb | 0xe9)
        && head.le16(510)? == 0xaa55;
    if !is_sound {
        return None;
    }
    if head.array(424)? == BITLOCKER_TO_GO {
        return Some(Content::BitLocker);
    }
    let per_table = match head.le16(22)? {
        0 => head.le32(36)?,
        sectors => sectors.into(),
    };
    let all = match head.le16(19)? {
        0 => head.le32(32)?,
        sectors => sectors.into(),
    };
    let root_sectors = (u64::from(roots) * 32).div_ceil(bytes.into());
    let before = u64::from(reserved) + u64::from(tables) * u64::from(per_table) + root_sectors;
    let clusters = u64::from(all).checked_sub(before)? / u64::from(per_cluster);
    Some(match clusters {
        _ if head.le16(22)? == 0 && roots == 0 => Content::Fat32,
        0..4085 => Content::Fat12,
        4085..65525 => Content::Fat16,
        _ => Content::Fat32,
    })
}

/// What is part of something larger, or encrypted.
fn member(head: Fields) -> Option<Content> {
    let is_md = |at| head.le32(at) == Some(crate::md::MAGIC) && head.le32(at + 4) == Some(1);
    if is_md(0) || is_md(4096) {
        return Some(Content::MdMember);
    }
    if crate::lvm::label_offset(head.0).is_some() {
        return Some(Content::LvmPhysicalVolume);
    }
    if head.bytes(0, 6)? == b"LUKS\xba\xbe" {
        return match head.be16(6)? {
            1 => Some(Content::Luks1),
            2 => Some(Content::Luks2),
            _ => None,
        };
    }
    const BCACHE: &[u8] =
        &[0xc6, 0x85, 0x73, 0xf6, 0x4e, 0x1a, 0x45, 0xca, 0x82, 0x65, 0xf5, 0x7f, 0x48, 0xba, 0x6d, 0x81];
    (head.bytes(4096 + 24, 16)? == BCACHE).then_some(Content::Bcache)
}

/// Superblocks of md at the end, 0.90 and 1.0: `tail` starts at `tail_at`.
fn md_at_end(size: u64, tail_at: u64, tail: Fields) -> Option<Content> {
    let fields_at = |at: u64| usize::try_from(at.checked_sub(tail_at)?).ok();
    let old = crate::md::old_superblock_at(size).and_then(fields_at);
    let new = crate::md::last_superblock_at(size).and_then(fields_at);
    let is_md = |at: usize, version| tail.le32(at) == Some(crate::md::MAGIC) && tail.le32(at + 4) == Some(version);
    (old.is_some_and(|at| is_md(at, 0)) || new.is_some_and(|at| is_md(at, 1))).then_some(Content::MdMember)
}

fn filesystem(head: Fields) -> Option<Content> {
    boot_sector(head).or_else(|| xfs(head)).or_else(|| by_magic(head)).or_else(|| ext(head)).or_else(|| swap(head))
}

/// Source: Linux `fs/xfs/libxfs/xfs_format.h`.
fn xfs(head: Fields) -> Option<Content> {
    let block_size = head.be32(4)?;
    let is_size = block_size.is_power_of_two() && (512..=65536).contains(&block_size);
    (head.bytes(0, 4)? == b"XFSB" && is_size && head.be32(88)? > 0).then_some(Content::Xfs)
}

/// What a few bytes at one place tell.
fn by_magic(head: Fields) -> Option<Content> {
    const MAGICS: [(usize, &[u8], Content); 14] = [
        (0, b"hsqs", Content::Squashfs),
        (0x10040, b"_BHRfS_M", Content::Btrfs),
        (0x8001, b"CD001", Content::Iso9660),
        (0x8001, b"BEA01", Content::Udf),
        (0x8000, b"JFS1", Content::Jfs),
        (0x10034, b"ReIsErFs", Content::ReiserFs),
        (0x10034, b"ReIsEr2Fs", Content::ReiserFs),
        (0x10034, b"ReIsEr3Fs", Content::ReiserFs),
        (0x400, &[0x10, 0x20, 0xf5, 0xf2], Content::F2fs),
        (0x400, b"H+\0\x04", Content::HfsPlus),
        (0x400, b"HX\0\x05", Content::HfsPlus),
        (32, b"NXSB", Content::Apfs),
        (0x1055c, &[0x19, 0x01, 0x54, 0x19], Content::Ufs),
        (0x255c, &[0x54, 0x19, 0x01, 0x00], Content::Ufs),
    ];
    let found = MAGICS.iter().find(|(at, magic, _)| head.bytes(*at, magic.len()) == Some(*magic));
    found.map(|(_, _, content)| *content)
}

/// Source: Linux `fs/ext4/ext4.h`.
fn ext(head: Fields) -> Option<Content> {
    const JOURNAL: u32 = 0x4;
    const JOURNAL_DEVICE: u32 = 0x8;
    // filetype, recover, meta_bg; sparse_super, large_file, btree_dir: what ext3 has, too.
    const OF_EXT3: (u32, u32) = (0x2 | 0x4 | 0x10, 0x1 | 0x2 | 0x4);
    let at = 1024;
    let is_sound = head.le16(at + 56)? == 0xef53
        && head.le32(at + 4)? > 0
        && head.le32(at + 24)? <= 6
        && (head.le32(at + 40)? > 0 || head.le32(at + 96)? & JOURNAL_DEVICE > 0);
    if !is_sound {
        return None;
    }
    let (compatible, incompatible, read_only) = (head.le32(at + 92)?, head.le32(at + 96)?, head.le32(at + 100)?);
    Some(match () {
        () if incompatible & JOURNAL_DEVICE > 0 => Content::ExtJournal,
        () if incompatible & !OF_EXT3.0 > 0 || read_only & !OF_EXT3.1 > 0 => Content::Ext4,
        () if compatible & JOURNAL > 0 => Content::Ext3,
        () => Content::Ext2,
    })
}

/// Swap ends its first page with its name, and a page is as long as the guest's processor has it.
fn swap(head: Fields) -> Option<Content> {
    const NAMES: [&[u8]; 6] =
        [b"SWAPSPACE2", b"SWAP-SPACE", b"S1SUSPEND\0", b"S2SUSPEND\0", b"ULSUSPEND\0", b"LINHIB0001"];
    let is_swap = |page: usize| head.bytes(page - 10, 10).is_some_and(|name| NAMES.contains(&name));
    (12..=16).any(|shift| is_swap(1 << shift)).then_some(Content::Swap)
}

/// What starts further in than all others; looked for last, since it costs reads.
fn further_in(volume: &dyn Disk) -> disk::Result<Option<Content>> {
    const UBERBLOCK: u64 = 0x00ba_b10c;
    // The first label: 128 uberblocks of 1 KiB, fewer of larger ones.
    let label = read_within(volume, 128 << 10, 128 << 10)?;
    let is_uberblock = |block: &[u8]| {
        let block = Fields(block);
        block.le64(0) == Some(UBERBLOCK) || block.be64(0) == Some(UBERBLOCK)
    };
    if label.chunks(1024).any(is_uberblock) {
        return Ok(Some(Content::Zfs));
    }
    for (at, magic) in [(1 << 20, 0xc001_d00d), (2 << 20, 0x2fab_f15e)] {
        if Fields(&read_within(volume, at, 4)?).le32(0) == Some(magic) {
            return Ok(Some(Content::Vmfs));
        }
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::Memory;

    /// What stands on a volume of that many bytes with these bytes at offsets.
    fn found(size: u64, parts: &[(u64, &[u8])]) -> Content {
        let mut disk = Memory::new(size);
        for (at, bytes) in parts {
            disk.write(*at, bytes);
        }
        probe(&disk).unwrap()
    }

    /// A FAT boot sector: sectors of the volume, sectors of a table, entries of the root.
    fn fat(sectors: u32, per_table: u16, roots: u16) -> Vec<u8> {
        let mut sector = vec![0; 512];
        sector[..3].copy_from_slice(&[0xeb, 0x3c, 0x90]);
        sector[11..17].copy_from_slice(&[0, 2, 1, 1, 0, 2]);
        sector[17..19].copy_from_slice(&roots.to_le_bytes());
        sector[21] = 0xf8;
        sector[22..24].copy_from_slice(&per_table.to_le_bytes());
        sector[32..36].copy_from_slice(&sectors.to_le_bytes());
        sector[510..].copy_from_slice(&[0x55, 0xaa]);
        sector
    }

    fn ext(compatible: u32, incompatible: u32, read_only: u32) -> Vec<u8> {
        let mut block = vec![0; 104];
        block[4] = 1;
        block[41] = 1;
        block[56..58].copy_from_slice(&[0x53, 0xef]);
        for (at, features) in [(92, compatible), (96, incompatible), (100, read_only)] {
            block[at..at + 4].copy_from_slice(&features.to_le_bytes());
        }
        block
    }

    #[test]
    fn a_few_bytes_tell_what_stands_on_a_volume() {
        let bcache = [0xc6, 0x85, 0x73, 0xf6, 0x4e, 0x1a, 0x45, 0xca, 0x82, 0x65, 0xf5, 0x7f, 0x48, 0xba, 0x6d, 0x81];
        let md = [0xfc, 0x4e, 0x2b, 0xa9];
        let with_version = |version| [md, [version, 0, 0, 0]].concat();
        let mut xfs = b"XFSB\0\0\x10\0".to_vec();
        xfs.resize(92, 1);
        let mut bitlocker_to_go = fat(20_000, 60, 512);
        bitlocker_to_go[424..440].copy_from_slice(&BITLOCKER_TO_GO);
        type Parts = Vec<(u64, Vec<u8>)>;
        let cases: Vec<(Content, Parts)> = vec![
            (Content::Empty, vec![]),
            (Content::Unknown, vec![(700, vec![1])]),
            (Content::Unknown, vec![((4 << 20) - 1, vec![1])]),
            (Content::Ext2, vec![(1024, ext(0, 2, 3))]),
            (Content::Ext3, vec![(1024, ext(4, 6, 3))]),
            (Content::Ext4, vec![(1024, ext(4, 0x40, 3))]),
            (Content::Ext4, vec![(1024, ext(0, 0, 0x400))]),
            (Content::ExtJournal, vec![(1024, ext(0, 8, 0))]),
            (Content::Xfs, vec![(0, xfs)]),
            (Content::Btrfs, vec![(0x10040, b"_BHRfS_M".to_vec())]),
            (Content::Ntfs, vec![(3, b"NTFS    ".to_vec())]),
            (Content::ExFat, vec![(3, b"EXFAT   ".to_vec())]),
            (Content::Fat12, vec![(0, fat(4000, 12, 512))]),
            (Content::Fat16, vec![(0, fat(20_000, 60, 512))]),
            (Content::Fat32, vec![(0, fat(100_000, 0, 0))]),
            (Content::Unknown, vec![(0, fat(0, 60, 512))]),
            (Content::Squashfs, vec![(0, b"hsqs".to_vec())]),
            (Content::Iso9660, vec![(0x8001, b"CD001".to_vec())]),
            (Content::Udf, vec![(0x8001, b"BEA01".to_vec())]),
            (Content::MdMember, vec![(0, with_version(1))]),
            (Content::MdMember, vec![(4096, with_version(1)), (1024, ext(0, 0, 0))]),
            (Content::MdMember, vec![((4 << 20) - 8192, with_version(1)), (1024, ext(0, 0, 0))]),
            (Content::MdMember, vec![((4 << 20) - 65536, with_version(0)), (1024, ext(0, 0, 0))]),
            (Content::Ext2, vec![((4 << 20) - 65536 - 8, with_version(0)), (1024, ext(0, 0, 0))]),
            (Content::Swap, vec![(4086, b"SWAPSPACE2".to_vec())]),
            (Content::Swap, vec![(65526, b"SWAPSPACE2".to_vec())]),
            (Content::Swap, vec![(4086, b"S1SUSPEND\0".to_vec())]),
            (Content::Luks1, vec![(0, b"LUKS\xba\xbe\0\x01".to_vec())]),
            (Content::Luks2, vec![(0, b"LUKS\xba\xbe\0\x02".to_vec())]),
            (Content::Unknown, vec![(0, b"LUKS\xba\xbe\0\x03".to_vec())]),
            (Content::BitLocker, vec![(3, b"-FVE-FS-".to_vec())]),
            (Content::BitLocker, vec![(0, bitlocker_to_go)]),
            (Content::ReFs, vec![(3, b"ReFS\0\0\0\0".to_vec())]),
            (Content::Zfs, vec![((128 << 10) + 5 * 1024, 0x00ba_b10c_u64.to_le_bytes().to_vec())]),
            (Content::Zfs, vec![(128 << 10, 0x00ba_b10c_u64.to_be_bytes().to_vec())]),
            (Content::Vmfs, vec![(1 << 20, 0xc001_d00d_u32.to_le_bytes().to_vec())]),
            (Content::Vmfs, vec![(2 << 20, 0x2fab_f15e_u32.to_le_bytes().to_vec())]),
            (Content::Bcache, vec![(4096 + 24, bcache.to_vec())]),
            (Content::F2fs, vec![(1024, 0xf2f5_2010_u32.to_le_bytes().to_vec())]),
            (Content::ReiserFs, vec![(0x10034, b"ReIsEr2Fs".to_vec())]),
            (Content::Jfs, vec![(0x8000, b"JFS1".to_vec())]),
            (Content::HfsPlus, vec![(1024, b"H+\0\x04".to_vec())]),
            (Content::Apfs, vec![(32, b"NXSB".to_vec())]),
            (Content::Ufs, vec![(65536 + 1372, 0x1954_0119_u32.to_le_bytes().to_vec())]),
        ];
        for (content, parts) in cases {
            let parts: Vec<_> = parts.iter().map(|(at, bytes)| (*at, bytes.as_slice())).collect();
            assert_eq!(found(4 << 20, &parts), content, "{:?}", parts.iter().map(|(at, _)| at).collect::<Vec<_>>());
        }
    }

    #[test]
    fn volumes_of_any_size_are_looked_at() {
        for size in (0..2000).step_by(7).chain([4096, 65535, 65536, 1 << 17, (1 << 17) + 1]) {
            assert_eq!(found(size, &[]), Content::Empty, "{size}");
            assert_ne!(found(size, &[(0, &[0xff; 1 << 17])]), Content::Ext4, "{size}");
        }
    }

    #[test]
    fn what_is_not_read_says_what_to_do() {
        assert_eq!(
            Content::Luks2.advice("volumes/xvda3.raw").unwrap(),
            "LUKS2: encrypted; map volumes/xvda3.raw on a host that has its passphrase"
        );
        assert_eq!(Content::Ext4.advice("volumes/xvda1.raw"), None);
    }

    #[test]
    fn what_cannot_be_read_is_an_error() {
        let mut disk = Memory::new(4 << 20);
        disk.break_from(1 << 20);
        assert_eq!(probe(&disk).unwrap_err().kind(), disk::ErrorKind::Unavailable);
    }
}
