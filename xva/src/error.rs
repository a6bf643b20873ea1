//! What can go wrong with an XVA, in few kinds.

/// The result of an operation on an XVA.
pub type Result<T> = std::result::Result<T, Error>;

/// What a caller can do about an error.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ErrorKind {
    /// The archive is cut off, or a structure in it is wrong or contradicts another.
    Damaged,
    /// Sound, as far as one can tell, but of a kind that cannot be read: compressed, or an unknown kind of tar entry.
    Unsupported,
    /// The file was removed since it was opened.
    Stale,
    /// The storage did not answer.
    Unavailable,
}

/// An error with its kind and a sentence that says where in the XVA, what was expected and what was found.
///
/// The file is named by what the storage says and by the caller: an object does not know its name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
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

    pub(crate) fn damaged(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::Damaged, message)
    }

    /// Returns the kind.
    #[must_use]
    pub fn kind(&self) -> ErrorKind {
        self.kind
    }
}

impl From<storage::Error> for Error {
    fn from(error: storage::Error) -> Self {
        // What NFS answers for an open file whose last name was removed by another client.
        const ESTALE: i32 = 116;
        let kind = match error.kind() {
            _ if error.raw_os_error() == Some(ESTALE) => ErrorKind::Stale,
            storage::ErrorKind::NotFound => ErrorKind::Stale,
            storage::ErrorKind::Authentication
            | storage::ErrorKind::TooLarge
            | storage::ErrorKind::Escape
            | storage::ErrorKind::IsDirectory
            | storage::ErrorKind::NotDirectory => ErrorKind::Damaged,
            storage::ErrorKind::Key => ErrorKind::Unsupported,
            storage::ErrorKind::PermissionDenied
            | storage::ErrorKind::Io
            | storage::ErrorKind::Exists
            | storage::ErrorKind::NotEmpty
            | storage::ErrorKind::NoSpace
            | storage::ErrorKind::ReadOnly
            | storage::ErrorKind::Unsupported => ErrorKind::Unavailable,
        };
        Self::new(kind, error.to_string())
    }
}

impl From<Error> for disk::Error {
    fn from(error: Error) -> Self {
        let kind = match error.kind {
            ErrorKind::Damaged => disk::ErrorKind::Damaged,
            ErrorKind::Unsupported => disk::ErrorKind::Unsupported,
            ErrorKind::Stale => disk::ErrorKind::Stale,
            ErrorKind::Unavailable => disk::ErrorKind::Unavailable,
        };
        Self::new(kind, error.message)
    }
}
