//! Checksums of metadata, made right again after a byte was changed: what a guest would do that means harm.
//!
//! Not of `compare`, which others use that know nothing of the crates below.

#![allow(dead_code, reason = "every test binary uses a part of this")]

use std::ops::Range;

use fs_btrfs::superblock::ChecksumType;
use fs_ext4::checksum::linux_crc32c;
use guest::Fields;

/// How an area of fast commits of ext4 begins: a head without features. Source: Linux, `fs/ext4/fast_commit.h`.
const FAST_COMMITS: [u8; 8] = [9, 0, 8, 0, 0, 0, 0, 0];
const FAST_TAIL: u16 = 8;

/// None: of images that have none.
pub fn none(_: &[u8], _: &Range<usize>, _: usize) -> Option<(usize, Vec<u8>)> {
    None
}

/// Of the fast commit of ext4 that a byte is in, on an image without other checksums whose blocks have 1024 bytes.
pub fn fast_commits(disk: &[u8], _: &Range<usize>, changed: usize) -> Option<(usize, Vec<u8>)> {
    let block = changed / 1024;
    let start = (block.saturating_sub(256)..=block).rev().map(|block| block * 1024);
    let start = start.into_iter().find(|at| disk[*at..].starts_with(&FAST_COMMITS))?;
    let (mut at, mut sum) = (start, 0);
    loop {
        // What does not fit into a block is left over.
        let left = 1024 - at % 1024;
        if left < 4 {
            at += left;
            continue;
        }
        let fields = Fields(disk.get(at..at + left)?);
        let len = 4 + usize::from(fields.le16(2)?);
        if fields.le16(0)? == FAST_TAIL {
            if at + len > changed {
                return Some((at + 8, linux_crc32c(sum, fields.bytes(0, 8)?).to_le_bytes().to_vec()));
            }
            sum = 0;
        } else {
            sum = linux_crc32c(sum, fields.bytes(0, len)?);
        }
        at += len;
    }
}

/// Bytes of an inode of XFS in the images of tests.
const XFS_INODE: usize = 512;

/// Of a structure of XFS, or the record of its log.
pub fn xfs(disk: &[u8], read: &Range<usize>, changed: usize) -> Option<(usize, Vec<u8>)> {
    let has_none = Fields(disk).be16(100)? & 15 < 5;
    of_xfs_log(disk, changed).or_else(|| {
        if has_none {
            return None;
        }
        let (mut start, mut end) = (read.start, read.end);
        let fields = Fields(&disk[read.clone()]);
        let at = match (fields.bytes(0, 4)?, fields.be16(8)?) {
            (b"XFSB", _) => {
                end = start + 512;
                224
            }
            ([b'I', b'N', ..], _) => {
                // Several are read at once when the log changes one.
                start += (changed - start) / XFS_INODE * XFS_INODE;
                end = start + XFS_INODE;
                100
            }
            (b"BMA3", _) => 64,
            (b"XDB3" | b"XDD3" | b"XDF3", _) => 4,
            (b"XSLM" | b"XARM", _) | (_, 0x3df1 | 0x3dff | 0x3ebe | 0x3bee) => 12,
            (b"XAGI", _) => 312,
            (b"XAGF", _) => 216,
            (b"AB3B" | b"AB3C" | b"IAB3" | b"FIB3" | b"RMB3" | b"R3FC", _) => 52,
            _ => return None,
        };
        let place = start + at;
        let parts = [disk.get(start..place)?, &[0; 4], disk.get(place + 4..end)?];
        Some((place, sum(&parts)))
    })
}

/// Returns where the log of an XFS is.
pub fn xfs_log(disk: &[u8]) -> Option<Range<usize>> {
    let superblock = Fields(disk);
    let start = superblock.be64(48)?;
    let (bits, group) = (superblock.u8(124)?, u64::from(superblock.be32(84)?));
    let block = (start >> (bits & 31)) * group + (start & ((1 << (bits & 31)) - 1));
    let start = usize::try_from(block * 4096).ok()?;
    Some(start..start + usize::try_from(superblock.be32(96)?).ok()? * 4096)
}

/// Of the record of the log that a byte is in.
fn of_xfs_log(disk: &[u8], changed: usize) -> Option<(usize, Vec<u8>)> {
    let log = xfs_log(disk)?;
    if !log.contains(&changed) {
        return None;
    }
    let mut at = changed / 512 * 512;
    while disk.get(at..at + 4)? != [0xfe, 0xed, 0xba, 0xbe] {
        at = at.checked_sub(512).filter(|at| log.contains(at))?;
    }
    let record = Fields(&disk[at..log.end.min(disk.len())]);
    let len = usize::try_from(record.be32(12)?).ok()?;
    let headers = usize::try_from(record.be32(320)?).ok()?.div_ceil(32 << 10).max(1);
    let mut parts = vec![record.bytes(0, 32)?, &[0; 4], record.bytes(36, 328 - 36)?];
    for header in 1..len.div_ceil(32 << 10) {
        parts.push(record.bytes(header * 512, 260)?);
    }
    parts.push(record.bytes(headers * 512, len)?);
    Some((at + 32, sum(&parts)))
}

fn sum(parts: &[&[u8]]) -> Vec<u8> {
    (!parts.iter().fold(!0, |sum, part| linux_crc32c(sum, part))).to_le_bytes().to_vec()
}

/// The first superblock of Btrfs.
const SUPERBLOCK: usize = 64 << 10;

/// Of a superblock or a block of a tree of Btrfs, which have the number of the filesystem at the same place.
pub fn btrfs(bytes: &[u8], read: &Range<usize>, _: usize) -> Option<(usize, Vec<u8>)> {
    let number = |at: usize| bytes.get(at + 32..at + 48);
    let block = &bytes[read.clone()];
    let is_metadata = block.len() >= 4096 && number(read.start) == number(SUPERBLOCK);
    is_metadata.then(|| {
        let digest = ChecksumType::Crc32c.digest(&block[32..]);
        (read.start, digest[..4].to_vec())
    })
}

/// Of a set of records of exFAT. That of its boot region is not made: it fills a sector.
pub fn exfat(disk: &[u8], _: &Range<usize>, changed: usize) -> Option<(usize, Vec<u8>)> {
    let at = changed / 32 * 32;
    let start = (0..19).filter_map(|record| at.checked_sub(record * 32)).find(|at| disk[*at] == 0x85)?;
    let set = disk.get(start..start + 32 * (usize::from(disk[start + 1]) + 1))?;
    let counted = set.iter().enumerate().filter(|(at, _)| !matches!(at, 2 | 3));
    let sum = counted.fold(0_u16, |sum, (_, byte)| sum.rotate_right(1).wrapping_add(u16::from(*byte)));
    Some((start + 2, sum.to_le_bytes().to_vec()))
}

/// Continues a CRC-32 as GPT and LVM have it.
fn crc32(sum: u32, bytes: &[u8]) -> u32 {
    bytes.iter().fold(sum, |sum, byte| {
        (0..8).fold(sum ^ u32::from(*byte), |sum, _| if sum & 1 == 1 { sum >> 1 ^ 0xedb8_8320 } else { sum >> 1 })
    })
}

/// Of a GPT or of LVM, on disks of which some lie after each other in one image.
pub fn volumes(disk: &[u8], _: &Range<usize>, changed: usize) -> Option<(usize, Vec<u8>)> {
    gpt(disk, changed).or_else(|| lvm(disk, changed))
}

/// Of the header of a GPT that is up to 32 sectors before or after the byte, and of its entries.
fn gpt(disk: &[u8], changed: usize) -> Option<(usize, Vec<u8>)> {
    let sector = changed / 512;
    let near = sector.saturating_sub(33)..=sector + 33;
    let at =
        near.map(|sector| sector * 512).find(|at| disk.get(*at..).is_some_and(|rest| rest.starts_with(b"EFI PART")))?;
    let (header, fields) = (disk.get(at..at + 512)?, Fields(&disk[at..]));
    // The sector it says it stands at leads to where its disk starts.
    let first = at.checked_sub(usize::try_from(fields.le64(24)?).ok()?.checked_mul(512)?)?;
    let entries = first.checked_add(usize::try_from(fields.le64(72)?).ok()?.checked_mul(512)?)?;
    let len = usize::try_from(fields.le32(80)?.min(1 << 16).checked_mul(fields.le32(84)?.min(1 << 12))?).ok()?;
    let mut new = header[..92].to_vec();
    if let Some(entries) = entries.checked_add(len).and_then(|end| disk.get(entries..end)) {
        new[88..92].copy_from_slice(&(!crc32(!0, entries)).to_le_bytes());
    }
    new[16..20].fill(0);
    let sum = !crc32(!0, &new);
    new[16..20].copy_from_slice(&sum.to_le_bytes());
    Some((at + 16, new[16..].to_vec()))
}

/// Of the label of LVM, or of the header of the metadata that is less than a MiB before the byte, and of its text.
fn lvm(disk: &[u8], changed: usize) -> Option<(usize, Vec<u8>)> {
    const START: u32 = 0xf597_a6cf;
    let sector = changed / 512 * 512;
    if disk[sector..].starts_with(b"LABELONE") {
        return Some((sector + 16, crc32(START, disk.get(sector + 20..sector + 512)?).to_le_bytes().to_vec()));
    }
    let mut sectors = (0..2048).filter_map(|back| sector.checked_sub(back * 512));
    let at = sectors.find(|at| disk.get(at + 4..at + 20) == Some(b" LVM2 x[5A%r0N*>"))?;
    let mut header = disk.get(at..at + 512)?.to_vec();
    let fields = Fields(&header);
    let place = at.checked_add(usize::try_from(fields.le64(40)?).ok()?)?;
    let text = place.checked_add(usize::try_from(fields.le64(48)?).ok()?).and_then(|end| disk.get(place..end));
    if let Some(text) = text.filter(|text| text.len() < 1 << 20) {
        let sum = crc32(START, text);
        header[56..60].copy_from_slice(&sum.to_le_bytes());
    }
    let sum = crc32(START, &header[4..]);
    header[..4].copy_from_slice(&sum.to_le_bytes());
    header.truncate(60);
    Some((at, header))
}
