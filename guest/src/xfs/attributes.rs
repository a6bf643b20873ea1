//! What an inode says of a file, in the form in which Linux gives it.

use fs_xfs::inode::{FileType, Timestamp};

use super::volume::{Node, Volume};
use crate::{Attributes, Error, Fields, Kind, Result, Time};

/// Returns what is known of a file.
pub(super) fn of(volume: &Volume, node: &Node) -> Result<Attributes> {
    let stored = &node.inode;
    let kind = kind(node)?;
    let device = match kind {
        Kind::CharacterDevice | Kind::BlockDevice => device(node)?,
        _ => (0, 0),
    };
    Ok(Attributes {
        kind,
        mode: stored.mode & 0o7777,
        uid: stored.uid,
        gid: stored.gid,
        links: node.links(),
        size: size(node)?,
        allocated: stored.nblocks.saturating_mul(volume.block_size()),
        device,
        accessed: time(stored.atime),
        modified: time(stored.mtime),
        changed: time(stored.ctime),
        created: (stored.version >= 3).then(|| time(stored.crtime)),
    })
}

fn kind(node: &Node) -> Result<Kind> {
    Ok(match node.inode.file_type() {
        Some(FileType::Directory) => Kind::Directory,
        Some(FileType::Regular) => Kind::File,
        Some(FileType::Symlink) => Kind::Symlink,
        Some(FileType::Fifo) => Kind::Fifo,
        Some(FileType::Socket) => Kind::Socket,
        Some(FileType::CharDevice) => Kind::CharacterDevice,
        Some(FileType::BlockDevice) => Kind::BlockDevice,
        None => return Err(Error::damaged(format!("inode {} is of no kind ({:o})", node.number, node.inode.mode))),
    })
}

/// Returns the size in bytes.
pub(super) fn size(node: &Node) -> Result<u64> {
    let size = node.inode.size;
    if i64::try_from(size).is_err() {
        return Err(Error::damaged(format!("inode {} is of {size} bytes", node.number)));
    }
    Ok(size)
}

fn time(stored: Timestamp) -> Time {
    Time { seconds: stored.sec, nanoseconds: stored.nsec.min(999_999_999) }
}

/// Returns the numbers of a device: 14 and 18 bits, where the map of a file would be.
fn device(node: &Node) -> Result<(u32, u32)> {
    let stored = Fields(&node.raw).be32(node.inode.data_fork_offset());
    let stored = stored.ok_or_else(|| Error::damaged(format!("inode {} has no place for a device", node.number)))?;
    Ok((stored >> 18, stored & 0x3ffff))
}
