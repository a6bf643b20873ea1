//! Why something in a guest cannot be had through a worker.

use std::fmt;

/// The result of a question to a worker.
pub type Result<T> = std::result::Result<T, Error>;

/// What a caller can tell apart.
#[derive(Debug, Clone)]
pub enum Error {
    /// What the reader says of the guest.
    Guest(guest::Error),
    /// A disk of the guest could not be read.
    Disk(disk::Error),
    /// The worker died, answered what no reader does, or took too much time; another may do better.
    Worker(String),
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Guest(error) => error.fmt(f),
            Self::Disk(error) => error.fmt(f),
            Self::Worker(message) => f.write_str(message),
        }
    }
}

impl std::error::Error for Error {}

impl From<guest::Error> for Error {
    fn from(error: guest::Error) -> Self {
        Self::Guest(error)
    }
}
