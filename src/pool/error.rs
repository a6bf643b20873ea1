//! What can go wrong with work on a pool, in the kinds by which a command decides how it ends.

use std::sync::Arc;

use crate::{ingest, repository};

/// The result of work on a pool.
pub type Result<T> = std::result::Result<T, Error>;

/// What a caller can do about an error.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ErrorKind {
    /// What is asked for cannot be done as it is asked.
    Usage,
    /// The pool refused, or does not answer.
    Pool(xapi::ErrorKind),
    /// Nothing says yet that the pool is the one it is taken for.
    Untrusted,
    /// The disks of the VM are not fit for a snapshot now.
    Chain,
    /// The folder of the state cannot be used.
    State,
    /// Another run works on the same.
    Locked,
    /// It was asked to stop.
    Interrupted,
    /// A repository, or what is written to it.
    Ingest(ingest::ErrorKind),
    /// A repository that is restored from.
    Repository(repository::ErrorKind),
    /// What a backup says or holds cannot be restored.
    Backup,
    /// What a backup holds is damaged.
    Damaged,
    /// There is no room in the pool.
    Room,
    /// What the pool has is not what was sent.
    Differs,
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

    /// Makes the error of a folder or a file of the state.
    pub(super) fn state(act: &str, path: &std::path::Path, reason: &dyn std::fmt::Display) -> Self {
        let shown = path.display();
        let message = format!("{act} '{shown}': {reason}; --state-dir names another folder for what xofs remembers");
        Self::new(ErrorKind::State, message)
    }

    /// Makes the error of what was asked to stop.
    pub(super) fn interrupted() -> Self {
        Self::new(ErrorKind::Interrupted, "interrupted")
    }

    /// Returns the kind.
    #[must_use]
    pub fn kind(&self) -> ErrorKind {
        self.kind
    }

    /// Says what was being done.
    #[must_use]
    pub fn while_doing(self, act: &str) -> Self {
        Self { message: Arc::from(format!("{act}: {}", self.message)), ..self }
    }
}

impl std::fmt::Display for Error {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Error {}

impl From<ingest::Error> for Error {
    fn from(error: ingest::Error) -> Self {
        match error.kind() {
            ingest::ErrorKind::Interrupted => Self::new(ErrorKind::Interrupted, error.to_string()),
            kind => Self::new(ErrorKind::Ingest(kind), error.to_string()),
        }
    }
}

impl From<xapi::Error> for Error {
    fn from(error: xapi::Error) -> Self {
        match error.kind() {
            xapi::ErrorKind::Cancelled => Self::new(ErrorKind::Interrupted, error.to_string()),
            kind => Self::new(ErrorKind::Pool(kind), error.to_string()),
        }
    }
}

impl From<repository::Error> for Error {
    fn from(error: repository::Error) -> Self {
        Self::new(ErrorKind::Repository(error.kind()), error.to_string())
    }
}

impl From<disk::Error> for Error {
    fn from(error: disk::Error) -> Self {
        let kind = match error.kind() {
            disk::ErrorKind::Damaged => ErrorKind::Damaged,
            _ => ErrorKind::Backup,
        };
        Self::new(kind, error.to_string())
    }
}
