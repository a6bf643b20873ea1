//! What can go wrong with an object, cut by what a caller does about it.

use std::io;

use crate::ObjectPath;

/// The result of an operation on a storage.
pub type Result<T> = std::result::Result<T, Error>;

/// What a caller can do about an error.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ErrorKind {
    /// Nothing has that name.
    NotFound,
    /// A directory stands where an object of bytes was expected.
    IsDirectory,
    /// An object of bytes stands where a directory was expected.
    NotDirectory,
    /// Something has the name already.
    Exists,
    /// A directory that should be empty is not.
    NotEmpty,
    /// The place is full, or a quota is used up.
    NoSpace,
    /// The place, or the object, can only be read.
    ReadOnly,
    /// The storage refuses access.
    PermissionDenied,
    /// The storage has no such operation.
    Unsupported,
    /// A name or link leads out of the storage, or is no name at all.
    Escape,
    /// The object is larger than what was expected to stand there.
    TooLarge,
    /// Decryption failed: damaged, not encrypted, or another key.
    Authentication,
    /// The key is wrong or missing, or the storage's encryption is unknown.
    Key,
    /// Anything else the storage says; trying again may help.
    Io,
}

impl ErrorKind {
    /// Whether it says nothing of the object: the place did not answer, or did not let it be asked.
    #[must_use]
    pub fn is_unavailable(self) -> bool {
        match self {
            Self::Io
            | Self::PermissionDenied
            | Self::Exists
            | Self::NotEmpty
            | Self::NoSpace
            | Self::ReadOnly
            | Self::Unsupported => true,
            Self::NotFound
            | Self::IsDirectory
            | Self::NotDirectory
            | Self::Escape
            | Self::TooLarge
            | Self::Authentication
            | Self::Key => false,
        }
    }
}

/// An error with its kind and the object.
///
/// It reads `read 'a/b': a reason`; an error that concerns no object has no act and shows its reason alone.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{}{reason}", shown(act, path))]
pub struct Error {
    kind: ErrorKind,
    act: &'static str,
    path: ObjectPath,
    reason: String,
    errno: Option<i32>,
}

impl Error {
    /// Makes an error. `act` is a present-tense verb ("read", "list"); `reason` says what was expected and found.
    pub fn new(kind: ErrorKind, act: &'static str, path: &ObjectPath, reason: impl Into<String>) -> Self {
        Self { kind, act, path: path.clone(), reason: reason.into(), errno: None }
    }

    /// Makes the error of an object longer than `limit` bytes.
    #[must_use]
    pub fn too_large(act: &'static str, path: &ObjectPath, limit: u64) -> Self {
        Self::new(ErrorKind::TooLarge, act, path, format!("at most {limit} bytes were expected, it has more"))
    }

    /// Makes the error of a folder that stands where a file was expected.
    pub(crate) fn is_directory(act: &'static str, path: &ObjectPath) -> Self {
        Self::new(ErrorKind::IsDirectory, act, path, "a file was expected, not a folder")
    }

    /// Makes the error of a file that stands where a folder was expected.
    pub(crate) fn not_directory(act: &'static str, path: &ObjectPath) -> Self {
        Self::new(ErrorKind::NotDirectory, act, path, "a folder was expected, not a file")
    }

    /// Makes the error of a key that cannot be one, whatever it is for.
    pub(crate) fn of_key(reason: impl Into<String>) -> Self {
        Self::new(ErrorKind::Key, "", &ObjectPath::root(), reason)
    }

    /// Makes an error of what the operating system said.
    pub fn from_io(act: &'static str, path: &ObjectPath, error: io::Error) -> Self {
        const TOO_LONG: i32 = rustix::io::Errno::NAMETOOLONG.raw_os_error();
        const LOOP: i32 = rustix::io::Errno::LOOP.raw_os_error();
        let kind = match (error.kind(), error.raw_os_error()) {
            // A name no file can have, and links that lead to each other, stay so: trying again does not help.
            (io::ErrorKind::NotFound, _) | (_, Some(TOO_LONG | LOOP)) => ErrorKind::NotFound,
            (io::ErrorKind::IsADirectory, _) => ErrorKind::IsDirectory,
            (io::ErrorKind::NotADirectory, _) => ErrorKind::NotDirectory,
            (io::ErrorKind::AlreadyExists, _) => ErrorKind::Exists,
            (io::ErrorKind::DirectoryNotEmpty, _) => ErrorKind::NotEmpty,
            (io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded, _) => ErrorKind::NoSpace,
            (io::ErrorKind::ReadOnlyFilesystem, _) => ErrorKind::ReadOnly,
            (io::ErrorKind::PermissionDenied, _) => ErrorKind::PermissionDenied,
            (io::ErrorKind::CrossesDevices, _) => ErrorKind::Escape,
            _ => ErrorKind::Io,
        };
        let reason = match kind {
            ErrorKind::Escape => "leads outside the repository".to_owned(),
            _ => error.to_string(),
        };
        Self { kind, act, path: path.clone(), reason, errno: error.raw_os_error() }
    }

    /// Returns the kind.
    #[must_use]
    pub fn kind(&self) -> ErrorKind {
        self.kind
    }

    /// Returns what failed and why, without the path.
    #[must_use]
    pub fn reason(&self) -> String {
        format!("cannot {} it: {}", self.act, self.reason)
    }

    /// Returns the path of the object.
    #[must_use]
    pub fn path(&self) -> &ObjectPath {
        &self.path
    }

    /// Whether an open object is gone from its server, as over NFS a file is that another machine removed or replaced.
    #[must_use]
    pub fn is_gone(&self) -> bool {
        self.errno == Some(rustix::io::Errno::STALE.raw_os_error())
    }

    /// Returns the error number of the operating system, if it was the one to fail.
    #[must_use]
    pub fn raw_os_error(&self) -> Option<i32> {
        self.errno
    }
}

fn shown(act: &str, path: &ObjectPath) -> String {
    if act.is_empty() { String::new() } else { format!("{act} '{}': ", path.to_string().escape_debug()) }
}
