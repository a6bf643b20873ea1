//! How a command ends: the one place where exit codes are decided.

use std::fmt;
use std::process::ExitCode;

use crate::{ingest, mount, pool, repository, tree, worker};

/// The exit codes of `xofs`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exit {
    /// All was done.
    Done = 0,
    /// It failed.
    Failed = 1,
    /// The command line, the environment or the configuration is wrong.
    Usage = 2,
    /// Done, but some of it failed, and it was said what.
    Partial = 3,
    /// A backup was made, but what expired could not be forgotten, or not all of it.
    Retention = 4,
    /// No repository is there.
    NoRepository = 10,
    /// Somebody else works on it.
    Locked = 11,
    /// The encryption key is wrong or missing.
    Key = 12,
    /// Damage was found.
    Damaged = 13,
    /// A mount failed, as mount(8) says it.
    Mount = 32,
    /// A signal ended it.
    Interrupted = 130,
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        Self::from(exit as u8)
    }
}

/// An error that says itself how the command ends.
#[derive(Debug)]
pub struct Failure {
    exit: Exit,
    message: String,
}

impl Failure {
    /// Makes an error; `message` must never hold a secret.
    pub fn new(exit: Exit, message: impl Into<String>) -> Self {
        Self { exit, message: message.into() }
    }

    /// Makes an error of wrong usage.
    pub fn usage(message: impl Into<String>) -> Self {
        Self::new(Exit::Usage, message)
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Failure {}

/// Returns how a command ends that failed with `error`: by the outermost cause whose kind is known.
pub fn of(error: &anyhow::Error) -> Exit {
    error.chain().find_map(of_cause).unwrap_or(Exit::Failed)
}

fn of_cause(cause: &(dyn std::error::Error + 'static)) -> Option<Exit> {
    if let Some(failure) = cause.downcast_ref::<Failure>() {
        return Some(failure.exit);
    }
    if let Some(error) = cause.downcast_ref::<repository::Error>() {
        return Some(of_repository(error.kind()));
    }
    if let Some(error) = cause.downcast_ref::<storage::Error>() {
        return Some(match error.kind() {
            storage::ErrorKind::Key => Exit::Key,
            storage::ErrorKind::Authentication => Exit::Damaged,
            _ => Exit::Failed,
        });
    }
    if let Some(error) = cause.downcast_ref::<disk::Error>() {
        return Some(of_disk(error));
    }
    if let Some(error) = cause.downcast_ref::<tree::Error>() {
        return Some(of_tree(error));
    }
    if let Some(error) = cause.downcast_ref::<ingest::Error>() {
        return Some(of_ingest(error.kind()));
    }
    if let Some(error) = cause.downcast_ref::<pool::Error>() {
        return Some(of_pool(error.kind()));
    }
    if cause.downcast_ref::<mount::Error>().is_some() {
        return Some(Exit::Failed);
    }
    None
}

fn of_disk(error: &disk::Error) -> Exit {
    match error.kind() {
        disk::ErrorKind::Damaged => Exit::Damaged,
        _ => Exit::Failed,
    }
}

/// Returns how a command ends that could not read a place of the tree.
fn of_tree(error: &tree::Error) -> Exit {
    match error {
        tree::Error::Disk(error) | tree::Error::Guest(worker::Error::Disk(error)) => of_disk(error),
        tree::Error::Repository(error) => of_repository(error.kind()),
        tree::Error::Guest(worker::Error::Guest(error)) if error.kind() == guest::ErrorKind::Damaged => Exit::Damaged,
        _ => Exit::Failed,
    }
}

/// Returns how an ingest ends that failed with this kind.
fn of_ingest(kind: ingest::ErrorKind) -> Exit {
    match kind {
        ingest::ErrorKind::Usage => Exit::Usage,
        ingest::ErrorKind::Source
        | ingest::ErrorKind::Broken
        | ingest::ErrorKind::Difference
        | ingest::ErrorKind::NoRoom => Exit::Failed,
        ingest::ErrorKind::Present => Exit::Done,
        ingest::ErrorKind::Interrupted => Exit::Interrupted,
        ingest::ErrorKind::Repository(kind) => of_repository(kind),
    }
}

/// Returns how work on a pool ends that failed with this kind.
fn of_pool(kind: pool::ErrorKind) -> Exit {
    match kind {
        pool::ErrorKind::Usage => Exit::Usage,
        pool::ErrorKind::Pool(xapi::ErrorKind::Credentials) => Exit::Key,
        pool::ErrorKind::Pool(_)
        | pool::ErrorKind::Untrusted
        | pool::ErrorKind::Chain
        | pool::ErrorKind::State
        | pool::ErrorKind::Backup
        | pool::ErrorKind::Room
        | pool::ErrorKind::Differs => Exit::Failed,
        pool::ErrorKind::Damaged => Exit::Damaged,
        pool::ErrorKind::Repository(kind) => of_repository(kind),
        pool::ErrorKind::Locked => Exit::Locked,
        pool::ErrorKind::Interrupted => Exit::Interrupted,
        pool::ErrorKind::Ingest(kind) => of_ingest(kind),
    }
}

fn of_repository(kind: repository::ErrorKind) -> Exit {
    match kind {
        repository::ErrorKind::NoSuchRepository => Exit::NoRepository,
        repository::ErrorKind::Key => Exit::Key,
        repository::ErrorKind::Damaged => Exit::Damaged,
        repository::ErrorKind::Locked => Exit::Locked,
        _ => Exit::Failed,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_exit_code_is_that_of_the_outermost_known_cause() {
        let repository = |kind| anyhow::Error::new(repository::Error::new(kind, "reason"));
        let disk = |kind| anyhow::Error::new(disk::Error::new(kind, "reason"));
        let guest = |error| anyhow::Error::new(tree::Error::Guest(worker::Error::Guest(error)));
        for (error, expected) in [
            (anyhow::anyhow!("anything"), Exit::Failed),
            (Failure::usage("wrong").into(), Exit::Usage),
            (anyhow::Error::from(Failure::usage("wrong")).context("read the configuration"), Exit::Usage),
            (repository(repository::ErrorKind::NoSuchRepository), Exit::NoRepository),
            (repository(repository::ErrorKind::Key).context("open"), Exit::Key),
            (repository(repository::ErrorKind::Damaged), Exit::Damaged),
            (repository(repository::ErrorKind::Locked).context("remove"), Exit::Locked),
            (repository(repository::ErrorKind::Unavailable), Exit::Failed),
            (disk(disk::ErrorKind::Damaged), Exit::Damaged),
            (disk(disk::ErrorKind::Unavailable), Exit::Failed),
            (guest(guest::Error::damaged("reason")).context("list"), Exit::Damaged),
            (guest(guest::Error::unsupported("reason")), Exit::Failed),
            (tree::Error::NotFound.into(), Exit::Failed),
        ] {
            assert_eq!(of(&error), expected, "{error:#}");
        }
    }

    #[test]
    fn the_numbers_are_those_that_scripts_rely_on() {
        let numbers = [
            (Exit::Done, 0),
            (Exit::Failed, 1),
            (Exit::Usage, 2),
            (Exit::Partial, 3),
            (Exit::Retention, 4),
            (Exit::NoRepository, 10),
            (Exit::Locked, 11),
            (Exit::Key, 12),
            (Exit::Damaged, 13),
            (Exit::Mount, 32),
            (Exit::Interrupted, 130),
        ];
        for (exit, number) in numbers {
            assert_eq!(exit as u8, number, "{exit:?}");
        }
    }
}
