//! Why something in a guest cannot be shown, in the kinds by which callers act.

use serde::{Deserialize, Serialize};

/// The result of an operation on a guest.
pub type Result<T> = std::result::Result<T, Error>;

/// What a caller can do about an error; matched instead of the text.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum ErrorKind {
    /// Nothing has that name or number.
    NotFound,
    /// It is of another kind than the operation needs.
    WrongKind,
    /// What the guest wrote contradicts itself.
    Damaged,
    /// It is sound, as far as one can tell, but of a kind that is not read.
    Unsupported,
    /// More was found than is ever shown.
    TooMuch,
    /// The disk below could not be read.
    Disk,
}

/// An error with its kind and a sentence that says what was expected and what was found.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error, Serialize, Deserialize)]
#[error("{message}")]
pub struct Error {
    kind: ErrorKind,
    message: String,
}

impl Error {
    /// Makes an error.
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self { kind, message: message.into() }
    }

    /// Makes an error of [`ErrorKind::Damaged`].
    pub fn damaged(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::Damaged, message)
    }

    /// Makes an error of [`ErrorKind::Unsupported`].
    pub fn unsupported(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::Unsupported, message)
    }

    /// Returns the kind.
    #[must_use]
    pub fn kind(&self) -> ErrorKind {
        self.kind
    }
}

impl From<disk::Error> for Error {
    fn from(error: disk::Error) -> Self {
        Self::new(ErrorKind::Disk, error.to_string())
    }
}
