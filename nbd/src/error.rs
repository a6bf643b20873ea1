//! What can go wrong, always with the export it is about.

use std::sync::Arc;

/// The result of an operation on an export.
pub type Result<T> = std::result::Result<T, Error>;

/// What a caller can do about an error.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ErrorKind {
    /// The server cannot be reached, went away, or does not answer in time.
    Unavailable,
    /// It ends new connections before it says a word: it has as many as it takes (XAPI: 16 for each host). Others that end
    /// make room.
    Busy,
    /// It does not give the export, or not to us: it has another name, or wants encryption.
    Refused,
    /// It answered, but not by the protocol; the connection is over.
    Protocol,
    /// It could not read what was asked for.
    Failed,
    /// A range was asked for that does not lie within the export.
    OutOfRange,
}

/// An error with its kind and a sentence that names the export.
#[derive(Debug, Clone)]
pub struct Error {
    kind: ErrorKind,
    message: Arc<str>,
}

impl Error {
    /// Makes an error about `export`.
    pub(crate) fn new(kind: ErrorKind, export: &str, reason: impl std::fmt::Display) -> Self {
        Self { kind, message: Arc::from(format!("the NBD export {export}: {reason}")) }
    }

    /// Returns the kind.
    #[must_use]
    pub fn kind(&self) -> ErrorKind {
        self.kind
    }
}

impl std::fmt::Display for Error {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Error {}
