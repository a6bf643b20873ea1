//! Why a place of the tree cannot be shown.

use std::fmt;

use crate::{repository, worker};

/// The result of an operation on the tree.
pub type Result<T> = std::result::Result<T, Error>;

/// What a caller can do about an error; each becomes an error number in one place of the mount.
#[derive(Debug, Clone)]
pub enum Error {
    /// Nothing has that name.
    NotFound,
    /// What had that number is gone: the backup was removed.
    Stale,
    /// A file stands where a directory was expected.
    NotDirectory,
    /// A directory stands where a file was expected.
    IsDirectory,
    /// It is no symbolic link.
    NotLink,
    /// The disk cannot be read.
    Disk(disk::Error),
    /// The repository cannot be read.
    Repository(repository::Error),
    /// What lies in a guest cannot be read.
    Guest(worker::Error),
}

impl Error {
    /// Turns "nothing has that name" into "it is gone", for what had a number already.
    pub(super) fn of_known(self) -> Self {
        match self {
            Self::NotFound => Self::Stale,
            other => other,
        }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotFound => f.write_str("no such file or directory"),
            Self::Stale => f.write_str("the backup was removed"),
            Self::NotDirectory => f.write_str("not a directory"),
            Self::IsDirectory => f.write_str("is a directory"),
            Self::NotLink => f.write_str("not a symbolic link"),
            Self::Disk(error) => error.fmt(f),
            Self::Repository(error) => error.fmt(f),
            Self::Guest(error) => error.fmt(f),
        }
    }
}

impl std::error::Error for Error {}

impl From<disk::Error> for Error {
    fn from(error: disk::Error) -> Self {
        match error.kind() {
            disk::ErrorKind::Stale => Self::Stale,
            _ => Self::Disk(error),
        }
    }
}

impl From<repository::Error> for Error {
    fn from(error: repository::Error) -> Self {
        match error.kind() {
            repository::ErrorKind::NotFound => Self::NotFound,
            _ => Self::Repository(error),
        }
    }
}

impl From<storage::Error> for Error {
    fn from(error: storage::Error) -> Self {
        Self::from(repository::Error::from(error))
    }
}

impl From<worker::Error> for Error {
    fn from(error: worker::Error) -> Self {
        match error {
            worker::Error::Disk(error) => error.into(),
            worker::Error::Guest(error) if error.kind() == guest::ErrorKind::NotFound => Self::NotFound,
            error => Self::Guest(error),
        }
    }
}
