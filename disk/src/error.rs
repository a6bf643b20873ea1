//! Why a byte of a disk cannot be had, in the kinds by which callers act.

use std::sync::Arc;

/// The result of an operation on a disk.
pub type Result<T> = std::result::Result<T, Error>;

/// What a caller can do about an error; matched instead of the text.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ErrorKind {
    /// The range does not lie within the disk.
    OutOfRange,
    /// What the disk belongs to was removed since it was opened; opening it again says what is there now.
    Stale,
    /// What is stored is damaged, incomplete or fails authentication.
    Damaged,
    /// What is stored is sound, as far as one can tell, but of a kind that cannot be read.
    Unsupported,
    /// The storage did not answer; trying again may help.
    Unavailable,
}

/// An error with its kind and a sentence that names the object, what was expected and what was found.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{message}")]
pub struct Error {
    kind: ErrorKind,
    message: Arc<str>,
}

impl Error {
    /// Makes an error; `message` must never hold a secret.
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self { kind, message: Arc::from(message.into()) }
    }

    /// Returns the kind.
    #[must_use]
    pub fn kind(&self) -> ErrorKind {
        self.kind
    }
}
