//! What can go wrong with an ingest, in the kinds by which a command decides how it ends.

use std::sync::Arc;

use crate::repository;

/// The result of an ingest, or of a part of it.
pub type Result<T> = std::result::Result<T, Error>;

/// What a caller can do about an error.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ErrorKind {
    /// What is asked for cannot be done as it is asked.
    Usage,
    /// The image cannot be read.
    Source,
    /// Reading the image broke off; another try may go through.
    Broken,
    /// What differs from a base cannot be had this way; the disk as a whole may be.
    Difference,
    /// The destination has too little room.
    NoRoom,
    /// The backup that is mirrored is there already: nothing was to be done.
    Present,
    /// It was asked to stop.
    Interrupted,
    /// A destination failed.
    Repository(repository::ErrorKind),
}

/// An error with its kind and a sentence that says what to do.
#[derive(Debug, Clone)]
pub struct Error {
    kind: ErrorKind,
    message: Arc<str>,
}

impl Error {
    /// Makes an error; `message` must never hold a secret.
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self { kind, message: Arc::from(message.into()) }
    }

    /// Makes the error of an ingest that was asked to stop.
    pub(super) fn interrupted() -> Self {
        Self::new(ErrorKind::Interrupted, "interrupted; what was written is removed")
    }

    /// Returns the kind.
    #[must_use]
    pub fn kind(&self) -> ErrorKind {
        self.kind
    }

    /// Says more of it.
    pub(super) fn and(self, more: &str) -> Self {
        Self { message: Arc::from(format!("{}; {more}", self.message)), ..self }
    }
}

impl std::fmt::Display for Error {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Error {}

impl From<repository::Error> for Error {
    fn from(error: repository::Error) -> Self {
        Self::new(ErrorKind::Repository(error.kind()), error.to_string())
    }
}

impl From<storage::Error> for Error {
    fn from(error: storage::Error) -> Self {
        repository::Error::from(error).into()
    }
}

impl From<disk::Error> for Error {
    fn from(error: disk::Error) -> Self {
        repository::Error::from(error).into()
    }
}

impl From<vhd::Error> for Error {
    fn from(error: vhd::Error) -> Self {
        disk::Error::from(error).into()
    }
}
