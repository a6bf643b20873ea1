//! What can go wrong with a repository as a whole, in the kinds by which a command decides how it ends.

use std::sync::Arc;

/// The result of an operation on a repository.
pub type Result<T> = std::result::Result<T, Error>;

/// What a caller can do about an error; exit codes and errno are decided by it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ErrorKind {
    /// What was named is no repository, nor a VHD or a folder of VHDs.
    NoSuchRepository,
    /// The encryption key is wrong or missing, or the encryption is unknown.
    Key,
    /// What is stored is damaged, or leads outside the repository.
    Damaged,
    /// The storage did not answer; trying again may help.
    Unavailable,
    /// The storage refuses access, or to be written.
    PermissionDenied,
    /// No VM, backup, disk or file has that name.
    NotFound,
    /// Several VMs or backups have that name.
    Ambiguous,
    /// Something has the name already.
    Exists,
    /// Another program works on the VM, or took its lock over.
    Locked,
    /// Something is not as it was when it was decided about.
    Changed,
}

/// An error with its kind and a sentence that names the object, what was expected and what was found.
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

impl From<storage::Error> for Error {
    fn from(error: storage::Error) -> Self {
        use storage::ErrorKind as Storage;
        let kind = match error.kind() {
            Storage::NotFound => ErrorKind::NotFound,
            Storage::PermissionDenied | Storage::ReadOnly => ErrorKind::PermissionDenied,
            Storage::Key => ErrorKind::Key,
            Storage::Exists => ErrorKind::Exists,
            Storage::IsDirectory
            | Storage::NotDirectory
            | Storage::Escape
            | Storage::TooLarge
            | Storage::Authentication => ErrorKind::Damaged,
            Storage::Io | Storage::NotEmpty | Storage::NoSpace | Storage::Unsupported => ErrorKind::Unavailable,
        };
        Self::new(kind, error.to_string())
    }
}

impl From<disk::Error> for Error {
    fn from(error: disk::Error) -> Self {
        let kind = match error.kind() {
            disk::ErrorKind::Stale => ErrorKind::NotFound,
            disk::ErrorKind::Unavailable => ErrorKind::Unavailable,
            disk::ErrorKind::OutOfRange | disk::ErrorKind::Damaged | disk::ErrorKind::Unsupported => ErrorKind::Damaged,
        };
        Self::new(kind, error.to_string())
    }
}
