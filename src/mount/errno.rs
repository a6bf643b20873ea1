//! The one place where an error becomes an error number.
//!
//! | what happened                              | what a program sees |
//! |--------------------------------------------|---------------------|
//! | no such name                               | ENOENT              |
//! | the backup was removed since               | ESTALE              |
//! | damaged, unreadable or unsupported content | EIO                 |
//! | the storage did not answer                 | EIO                 |
//! | a signal came for who waited for it        | EINTR               |
//! | what is written over a disk has no room    | ENOSPC              |

use crate::{tree, worker};

/// A number of `errno(3)`, always positive.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Errno(i32);

impl Errno {
    pub(super) const BAD_HANDLE: Self = Self(libc::EBADF);
    pub(super) const INTERRUPTED: Self = Self(libc::EINTR);
    pub(super) const INVALID: Self = Self(libc::EINVAL);
    pub(super) const IO: Self = Self(libc::EIO);
    pub(super) const IS_DIRECTORY: Self = Self(libc::EISDIR);
    pub(super) const NO_ATTRIBUTE: Self = Self(libc::ENODATA);
    pub(super) const NO_SUCH_OFFSET: Self = Self(libc::ENXIO);
    pub(super) const NOT_FOUND: Self = Self(libc::ENOENT);
    pub(super) const NOT_KNOWN: Self = Self(libc::ENOSYS);
    pub(super) const NO_SPACE: Self = Self(libc::ENOSPC);
    pub(super) const RANGE: Self = Self(libc::ERANGE);
    pub(super) const READ_ONLY: Self = Self(libc::EROFS);

    /// Returns the number.
    pub(super) fn code(self) -> i32 {
        self.0
    }

    /// Returns the number for an error of the tree.
    pub(super) fn of_tree(error: &tree::Error) -> Self {
        match error {
            tree::Error::NotFound => Self::NOT_FOUND,
            tree::Error::Stale => Self(libc::ESTALE),
            tree::Error::NotDirectory => Self(libc::ENOTDIR),
            tree::Error::IsDirectory => Self::IS_DIRECTORY,
            tree::Error::NotLink => Self::INVALID,
            tree::Error::Disk(error) => Self::of_disk(error),
            tree::Error::Repository(_) => Self::IO,
            tree::Error::Guest(error) => Self::of_guest(error),
        }
    }

    fn of_guest(error: &worker::Error) -> Self {
        match error {
            worker::Error::Guest(error) if error.kind() == guest::ErrorKind::WrongKind => Self::INVALID,
            worker::Error::Disk(error) => Self::of_disk(error),
            worker::Error::Guest(_) | worker::Error::Worker(_) => Self::IO,
        }
    }

    /// Returns the number for an error of a disk.
    pub(super) fn of_disk(error: &disk::Error) -> Self {
        match error.kind() {
            disk::ErrorKind::OutOfRange => Self::INVALID,
            disk::ErrorKind::Stale => Self(libc::ESTALE),
            disk::ErrorKind::Damaged | disk::ErrorKind::Unsupported | disk::ErrorKind::Unavailable => Self::IO,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_removed_backup_is_stale_and_anything_unreadable_is_an_io_error() {
        for (kind, code) in [
            (disk::ErrorKind::OutOfRange, libc::EINVAL),
            (disk::ErrorKind::Stale, libc::ESTALE),
            (disk::ErrorKind::Damaged, libc::EIO),
            (disk::ErrorKind::Unsupported, libc::EIO),
            (disk::ErrorKind::Unavailable, libc::EIO),
        ] {
            assert_eq!(Errno::of_disk(&disk::Error::new(kind, "x")).code(), code, "{kind:?}");
        }
        assert_eq!(Errno::of_tree(&tree::Error::NotFound).code(), libc::ENOENT);
        assert_eq!(Errno::of_tree(&tree::Error::Stale).code(), libc::ESTALE);
    }
}
