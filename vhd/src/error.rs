//! What can go wrong with a VHD, in few kinds, each error with the object it is about.

use storage::ObjectPath;

use crate::geometry::BlockIndex;

/// The result of an operation on a VHD.
pub type Result<T> = std::result::Result<T, Error>;

/// What a caller can do about an error.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ErrorKind {
    /// A file, block or member of the chain does not exist.
    Missing,
    /// A structure or block is damaged, contradicts another, or fails authentication.
    Damaged,
    /// Sound, as far as one can tell, but of a kind that cannot be read.
    Unsupported,
    /// A name found inside a file leads outside the repository.
    Escape,
    /// The backup was removed since it was opened.
    Stale,
    /// The storage did not answer.
    Unavailable,
}

/// An error with its kind, the object and a sentence.
#[derive(Debug, Clone, thiserror::Error)]
#[error("'{}': {reason}", path.to_string().escape_debug())]
pub struct Error {
    kind: ErrorKind,
    path: ObjectPath,
    reason: String,
}

impl Error {
    /// Makes an error; `reason` says what was expected and what was found.
    pub fn new(kind: ErrorKind, path: &ObjectPath, reason: impl Into<String>) -> Self {
        Self { kind, path: path.clone(), reason: reason.into() }
    }

    /// Names the block the error is about.
    #[must_use]
    pub(crate) fn in_block(mut self, block: BlockIndex) -> Self {
        self.reason = format!("block {}: {}", block.0, self.reason);
        self
    }

    /// Returns the kind.
    #[must_use]
    pub fn kind(&self) -> ErrorKind {
        self.kind
    }

    /// Returns the reason, with the object only if it is not `path`.
    pub(crate) fn reason_seen_from(&self, path: &ObjectPath) -> String {
        if self.path == *path { self.reason.clone() } else { self.to_string() }
    }

    /// Returns the object the error is about.
    #[must_use]
    pub fn path(&self) -> &ObjectPath {
        &self.path
    }
}

impl From<storage::Error> for Error {
    fn from(error: storage::Error) -> Self {
        let kind = match error.kind() {
            storage::ErrorKind::NotFound => ErrorKind::Missing,
            // Looked for by its name again, it may be found: a merge over there replaced it.
            _ if error.is_gone() => ErrorKind::Missing,
            storage::ErrorKind::Escape => ErrorKind::Escape,
            storage::ErrorKind::Authentication | storage::ErrorKind::TooLarge => ErrorKind::Damaged,
            storage::ErrorKind::IsDirectory | storage::ErrorKind::NotDirectory => ErrorKind::Damaged,
            storage::ErrorKind::Key => ErrorKind::Unsupported,
            storage::ErrorKind::PermissionDenied
            | storage::ErrorKind::Io
            | storage::ErrorKind::Exists
            | storage::ErrorKind::NotEmpty
            | storage::ErrorKind::NoSpace
            | storage::ErrorKind::ReadOnly
            | storage::ErrorKind::Unsupported => ErrorKind::Unavailable,
        };
        Self { kind, path: error.path().clone(), reason: error.reason() }
    }
}

impl From<Error> for disk::Error {
    fn from(error: Error) -> Self {
        let kind = match error.kind {
            ErrorKind::Missing | ErrorKind::Damaged | ErrorKind::Escape => disk::ErrorKind::Damaged,
            ErrorKind::Unsupported => disk::ErrorKind::Unsupported,
            ErrorKind::Stale => disk::ErrorKind::Stale,
            ErrorKind::Unavailable => disk::ErrorKind::Unavailable,
        };
        Self::new(kind, error.to_string())
    }
}

/// What is wrong with a structure, before the path of its file is known.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FormatError {
    /// Whether it is damaged or merely unknown.
    pub kind: ErrorKind,
    /// What was expected and what was found.
    pub reason: String,
}

impl FormatError {
    /// Makes an error of a structure that cannot be right.
    pub fn damaged(reason: impl Into<String>) -> Self {
        Self { kind: ErrorKind::Damaged, reason: reason.into() }
    }

    /// Makes an error of a structure of an unknown kind.
    pub fn unsupported(reason: impl Into<String>) -> Self {
        Self { kind: ErrorKind::Unsupported, reason: reason.into() }
    }

    /// Says in which file it was found.
    #[must_use]
    pub fn at(self, path: &ObjectPath) -> Error {
        Error { kind: self.kind, path: path.clone(), reason: self.reason }
    }
}
