//! What an inode says of a file, in the form in which Linux gives it.

use fs_btrfs::inode::{FileType, Inode, Timestamp};

use super::volume::Volume;
use crate::{Attributes, Error, Kind, Result, Time};

/// Returns what is known of a file.
pub(super) fn of(volume: &Volume, inode: &Inode) -> Result<Attributes> {
    let kind = match inode.file_type() {
        Some(FileType::Directory) => Kind::Directory,
        Some(FileType::Regular) => Kind::File,
        Some(FileType::Symlink) => Kind::Symlink,
        Some(FileType::Fifo) => Kind::Fifo,
        Some(FileType::Socket) => Kind::Socket,
        Some(FileType::CharDevice) => Kind::CharacterDevice,
        Some(FileType::BlockDevice) => Kind::BlockDevice,
        None => return Err(Error::damaged(format!("inode {} is of no kind ({:o})", inode.ino, inode.mode))),
    };
    let device = match kind {
        Kind::CharacterDevice | Kind::BlockDevice => device(inode.rdev),
        _ => (0, 0),
    };
    Ok(Attributes {
        kind,
        mode: u16::try_from(inode.permissions()).expect("twelve bits"),
        uid: inode.uid,
        gid: inode.gid,
        links: inode.nlink,
        size: size(inode)?,
        allocated: inode.nbytes.checked_next_multiple_of(volume.sector()).unwrap_or(inode.nbytes),
        device,
        accessed: time(inode.atime),
        modified: time(inode.mtime),
        changed: time(inode.ctime),
        created: Some(time(inode.otime)),
    })
}

/// Returns what is known of the directory that stands for a subvolume that is not there. Linux makes it up, with the time of
/// looking; here it has those of the directory `top`.
pub(super) fn of_empty(volume: &Volume, top: &Inode) -> Result<Attributes> {
    Ok(Attributes { mode: 0o755, links: 1, size: 0, allocated: 0, ..of(volume, top)? })
}

/// Returns the size in bytes.
pub(super) fn size(inode: &Inode) -> Result<u64> {
    if i64::try_from(inode.size).is_err() {
        return Err(Error::damaged(format!("inode {} is of {} bytes", inode.ino, inode.size)));
    }
    Ok(inode.size)
}

fn time(stored: Timestamp) -> Time {
    Time { seconds: stored.sec, nanoseconds: stored.nsec }
}

/// Returns the numbers of a device, which stand as the kernel has them in memory: 12 and 20 bits.
fn device(stored: u64) -> (u32, u32) {
    let number = u32::try_from(stored & u64::from(u32::MAX)).expect("32 bits");
    (number >> 20, number & 0xf_ffff)
}
