//! What an inode says of a file, in the form in which Linux gives it.

use fs_ext4::features::{Incompat, RoCompat};
use fs_ext4::inode::{self, InodeFlags};

use super::map::Blocks;
use super::volume::{Node, Volume};
use crate::{Attributes, Error, Fields, Kind, Result, Time};

/// Bytes in which an inode counts what it takes.
const SECTOR: u64 = 512;

/// Returns what is known of a file.
pub(super) fn of(volume: &Volume, node: &Node) -> Result<Attributes> {
    let stored = &node.inode;
    let kind = kind(node)?;
    let device = match kind {
        Kind::CharacterDevice | Kind::BlockDevice => device(&stored.block),
        _ => (0, 0),
    };
    Ok(Attributes {
        kind,
        mode: stored.mode & 0o7777,
        uid: stored.uid,
        gid: stored.gid,
        links: u32::from(stored.links_count),
        size: size(volume, node)?,
        allocated: allocated(volume, node),
        device,
        accessed: time(stored.atime, stored.atime_nsec),
        modified: time(stored.mtime, stored.mtime_nsec),
        changed: time(stored.ctime, stored.ctime_nsec),
        // Only where it is among the extra fields.
        created: Fields(&node.raw)
            .le16(0x80)
            .filter(|extra| *extra >= 24)
            .map(|_| time(stored.crtime, stored.crtime_nsec)),
    })
}

fn kind(node: &Node) -> Result<Kind> {
    Ok(match node.inode.file_type() {
        inode::S_IFDIR => Kind::Directory,
        inode::S_IFREG => Kind::File,
        inode::S_IFLNK => Kind::Symlink,
        inode::S_IFIFO => Kind::Fifo,
        inode::S_IFSOCK => Kind::Socket,
        inode::S_IFCHR => Kind::CharacterDevice,
        inode::S_IFBLK => Kind::BlockDevice,
        other => return Err(Error::damaged(format!("inode {} is of no kind ({other:o})", node.number))),
    })
}

/// Returns the size in bytes.
pub(super) fn size(volume: &Volume, node: &Node) -> Result<u64> {
    // Above 32 bits other kinds had another field once.
    let has_high = node.inode.is_file() || volume.has_incompat(Incompat::LARGEDIR);
    let size = if has_high { node.inode.size } else { node.inode.size & u64::from(u32::MAX) };
    if i64::try_from(size).is_err() {
        return Err(Error::damaged(format!("inode {} is of {size} bytes", node.number)));
    }
    Ok(size)
}

fn allocated(volume: &Volume, node: &Node) -> u64 {
    let blocks = node.inode.blocks;
    let counted = if !volume.has_ro_compat(RoCompat::HUGE_FILE) {
        (blocks & u64::from(u32::MAX)) * SECTOR
    } else if node.has(InodeFlags::HUGE_FILE) {
        // 48 bits times 64 KiB at most.
        blocks.saturating_mul(volume.block_size())
    } else {
        blocks * SECTOR
    };
    // Linux says so, lest a program takes it for one hole.
    let inline = if node.inode.is_file() && node.has(InodeFlags::INLINE_DATA) {
        node.inode.size.div_ceil(SECTOR).saturating_mul(SECTOR)
    } else {
        0
    };
    counted.saturating_add(inline)
}

fn time(seconds: i64, nanoseconds: u32) -> Time {
    Time { seconds, nanoseconds: nanoseconds.min(999_999_999) }
}

/// Returns the numbers of a device: 8 and 8 bits, or 12 and 20 where those are zero.
fn device(block: &[u8; 60]) -> (u32, u32) {
    let fields = Fields(block);
    let (old, new) = (fields.le32(0).unwrap_or_default(), fields.le32(4).unwrap_or_default());
    if old != 0 {
        return (old >> 8 & 0xff, old & 0xff);
    }
    (new >> 8 & 0xfff, new & 0xff | new >> 12 & 0xfff00)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_forms_of_a_device_are_read() {
        for (old, new, expected) in
            [(0x0103, 0, (1, 3)), (0, 0xabc1_23de, (0x123, 0xabcde)), (0xffff, 1, (255, 255)), (0, 0, (0, 0))]
        {
            let mut block = [0; 60];
            block[..4].copy_from_slice(&u32::to_le_bytes(old));
            block[4..8].copy_from_slice(&u32::to_le_bytes(new));
            assert_eq!(device(&block), expected);
        }
    }

    #[test]
    fn no_time_has_a_second_of_nanoseconds() {
        assert_eq!(time(-1, 0x3fff_ffff), Time { seconds: -1, nanoseconds: 999_999_999 });
    }
}
