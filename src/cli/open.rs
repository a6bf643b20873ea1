//! From what was named on the command line to an open repository.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context, Result};
use storage::{EncryptionKey, WritableStorage};

use super::Global;
use super::address::Place;
use super::config::{Config, Entry};
use super::exit::{Exit, Failure};
use super::password::{self, KEY, Source};
use super::text::Shown;
use crate::repository::{ErrorKind, OpenOptions, Repository, VmId, VmLock};

/// Memory for decoded blocks of commands that read every block once (bytes).
pub const SMALL_CACHE: u64 = 64 << 20;

/// Finds the repository `address` names, or the default one.
///
/// # Errors
/// `Usage` if none is named, or the address is of a kind that cannot be opened.
pub fn place(global: &Global, address: Option<&OsStr>) -> Result<Place> {
    let address = address.or(global.repository.as_deref()).ok_or_else(|| {
        Failure::usage("no repository is named: give its path, --repository or the variable XOFS_REPOSITORY")
    })?;
    Place::find(address, &Config::load()?)
}

/// Opens a repository; asks for its key if it needs one that is given nowhere.
///
/// # Errors
/// As for [`Repository::open`], and what reading the key fails with.
pub fn repository(global: &Global, place: &Place, cache_bytes: u64) -> Result<Arc<Repository>> {
    or_asking(global, place, |key| open(place, OpenOptions { key, cache_bytes }))
}

/// Opens a repository without ever asking a person.
///
/// # Errors
/// As for [`repository`].
pub fn repository_silently(global: &Global, place: &Place, cache_bytes: u64) -> Result<Arc<Repository>> {
    attempt(source(global, place).as_ref(), &|key| open(place, OpenOptions { key, cache_bytes }))
}

/// Opens the storage of a repository, to change what is in it; asks for its key as [`repository`] does.
///
/// # Errors
/// As for [`Repository::open_writable`], and what reading the key fails with.
pub fn writable(global: &Global, place: &Place) -> Result<Arc<dyn WritableStorage>> {
    or_asking(global, place, |key| Ok(Repository::open_writable(&absolute(place)?, key)?))
}

/// Opens a repository to be read, and its storage to be changed; asks for its key as [`repository`] does, once.
///
/// # Errors
/// As for [`repository`] and [`writable`].
pub fn both(global: &Global, place: &Place, cache_bytes: u64) -> Result<(Arc<Repository>, Arc<dyn WritableStorage>)> {
    or_asking(global, place, |key| {
        let storage = Repository::open_writable(&absolute(place)?, key.clone())?;
        Ok((open(place, OpenOptions { key, cache_bytes })?, storage))
    })
}

/// Makes a repository; its key is given as to other commands, else a person is asked for it, twice.
///
/// # Errors
/// `Usage` if a key is meant for this repository, but it is not to be encrypted; `Key` if there is none for one that is;
/// else as for [`Repository::initialize`].
pub fn initialize(global: &Global, place: &Place, is_encrypted: bool) -> Result<()> {
    let source = source(global, place);
    let key = match source {
        Some(source) if is_encrypted => Some(source.read()?),
        // One of the environment is meant for whatever needs it.
        Some(source) if !source.is_ambient => {
            return Err(Failure::usage("a key is given: say --encrypted, or leave the key out").into());
        }
        None if is_encrypted => Some(password::ask_twice(&place.name)?.ok_or_else(|| {
            let message = "an encrypted repository needs a key of 32 characters: give it with --password-file, \
                           --password-command or XOFS_PASSWORD";
            Failure::new(Exit::Key, message)
        })?),
        _ => None,
    };
    Ok(Repository::initialize(&absolute(place)?, key.as_ref())?)
}

/// Takes the lock of a VM, which is called `name`; says once if it is waited for.
///
/// # Errors
/// That it was interrupted, if `is_stopped` was set while it waited; else as for [`VmLock::take`].
pub fn lock(
    storage: &Arc<dyn WritableStorage>,
    vm: &VmId,
    name: &str,
    patience: Duration,
    is_stopped: &AtomicBool,
) -> Result<VmLock> {
    let mut is_said = false;
    let taken = VmLock::take(storage.clone(), vm, patience, |age| {
        if !std::mem::replace(&mut is_said, true) {
            let seconds = age.as_secs();
            say!("xofs: {}: waiting for another program that writes it (last sign {seconds} s ago)", Shown(name));
        }
        !is_stopped.load(Ordering::Relaxed)
    });
    match taken {
        Err(error) if error.kind() == ErrorKind::Locked && is_stopped.load(Ordering::Relaxed) => {
            Err(Failure::new(Exit::Interrupted, "interrupted").into())
        }
        taken => Ok(taken?),
    }
}

/// Opens with the key that is given somewhere, else asks for one if it is needed.
fn or_asking<T>(global: &Global, place: &Place, open: impl Fn(Option<EncryptionKey>) -> Result<T>) -> Result<T> {
    let source = source(global, place);
    let failed = match attempt(source.as_ref(), &open) {
        Err(error) if source.is_none() && is_key(&error) => error,
        other => return other,
    };
    match password::ask(&place.name)? {
        Some(key) => open(Some(key)),
        None => Err(failed),
    }
}

fn source(global: &Global, place: &Place) -> Option<Source> {
    let of_entry = place.entry.as_ref().map_or((None, None), Entry::password);
    let own = || Source::choose(&KEY, (None, None), |_| None, of_entry);
    if let Some(own) = own().filter(|_| global.shares_key) {
        return Some(own);
    }
    let of_command_line = (global.password_file.as_deref(), global.password_command.as_deref());
    let mut source = Source::choose(&KEY, of_command_line, |name| std::env::var(name).ok(), of_entry)?;
    source.is_ambient |= global.shares_key;
    Some(source)
}

/// Opens with the key of `source`. One of the environment is meant for whatever needs it: a plain repository is opened
/// without, and the key is not even read.
fn attempt<T>(source: Option<&Source>, open: &impl Fn(Option<EncryptionKey>) -> Result<T>) -> Result<T> {
    if source.is_some_and(|source| source.is_ambient) {
        match open(None) {
            Err(error) if is_key(&error) => {}
            opened => return opened,
        }
    }
    open(source.map(Source::read).transpose()?)
}

fn is_key(error: &anyhow::Error) -> bool {
    super::exit::of(error) == Exit::Key
}

fn open(place: &Place, options: OpenOptions) -> Result<Arc<Repository>> {
    match Repository::open(&absolute(place)?, options) {
        Err(error) if error.kind() == ErrorKind::PermissionDenied && is_root() => Err(error).context(
            "root is refused: an NFS export may map root to nobody (root_squash); run xofs as the owner of the backups",
        ),
        opened => Ok(opened?),
    }
}

/// A daemon leaves the current folder.
fn absolute(place: &Place) -> Result<PathBuf> {
    std::path::absolute(&place.path)
        .with_context(|| format!("find the current folder, which '{}' starts from", place.path.display()))
}

/// Returns whether this is root.
pub fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

/// Splits the names of `xofs info [REPO] [WHAT]`: a lone name is WHAT where a default repository is known, unless it is
/// clearly a path or an address.
pub fn split_names<'a>(global: &Global, names: &'a [std::ffi::OsString]) -> (Option<&'a OsStr>, Option<&'a OsStr>) {
    match names {
        [repository, what, ..] => (Some(repository), Some(what)),
        [name] if global.repository.is_some() && !is_path(name) => (None, Some(name)),
        [name] => (Some(name), None),
        [] => (None, None),
    }
}

/// Returns whether a name is clearly a path or an address.
pub fn is_path(name: &OsStr) -> bool {
    let text = name.to_string_lossy();
    Path::new(name).is_absolute() || text.starts_with("./") || text.starts_with("../") || text.starts_with("file:")
}

/// Returns WHAT as text, empty if it was not given.
///
/// # Errors
/// `Usage` if it is not UTF-8.
pub fn text_of(what: Option<&OsStr>) -> Result<String> {
    match what.map(OsStr::to_str) {
        Some(Some(what)) => Ok(what.to_owned()),
        Some(None) => Err(Failure::usage("the name of the VM, backup or disk is not UTF-8").into()),
        None => Ok(String::new()),
    }
}
