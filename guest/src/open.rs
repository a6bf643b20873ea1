//! The reader for each kind of filesystem.

use std::sync::Arc;

use disk::Disk;

use crate::{Content, Error, GuestFs, Result, btrfs, exfat, ext, fat, iso, ntfs, squashfs, xfs};

/// Returns whether there is a reader for it.
#[must_use]
pub fn is_read(content: Content) -> bool {
    matches!(
        content,
        Content::Ext2
            | Content::Ext3
            | Content::Ext4
            | Content::Xfs
            | Content::Fat12
            | Content::Fat16
            | Content::Fat32
            | Content::ExFat
            | Content::Ntfs
            | Content::Squashfs
            | Content::Iso9660
            | Content::Btrfs
    )
}

/// Opens a filesystem for reading; `members` are its volumes, one or more.
///
/// # Errors
/// [`Unsupported`](crate::ErrorKind::Unsupported) if there is no reader for it, or it is of a kind that the reader does not know;
/// what is damaged or could not be read.
pub fn open(content: Content, members: Vec<Arc<dyn Disk>>) -> Result<Box<dyn GuestFs>> {
    if content == Content::Btrfs {
        return Ok(Box::new(btrfs::Btrfs::open(members)?));
    }
    let Ok([volume]) = <[_; 1]>::try_from(members) else {
        return Err(Error::unsupported(format!("{} of several volumes is not read", content.name())));
    };
    match content {
        Content::Ext2 | Content::Ext3 | Content::Ext4 => Ok(Box::new(ext::Ext::open(volume)?)),
        Content::Xfs => Ok(Box::new(xfs::Xfs::open(volume)?)),
        Content::Fat12 | Content::Fat16 | Content::Fat32 => Ok(Box::new(fat::Fat::open(volume)?)),
        Content::ExFat => Ok(Box::new(exfat::ExFat::open(volume)?)),
        Content::Ntfs => Ok(Box::new(ntfs::Ntfs::open(volume)?)),
        Content::Squashfs => Ok(Box::new(squashfs::Squashfs::open(volume)?)),
        Content::Iso9660 => Ok(Box::new(iso::Iso::open(volume)?)),
        _ => Err(Error::unsupported(format!("{} is not read", content.name()))),
    }
}
