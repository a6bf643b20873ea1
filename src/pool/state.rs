//! What xofs remembers between runs that work on pools, in a folder of its own.
//!
//! ```text
//! known-pools        address and fingerprint of each pool that a person has accepted, one a line
//! runs/<run>         the journal of a run: see `journal`
//! locks/<name>       held while a run works on a VM; by connections by NBD, and by all that is limited: see `limits`
//! jobs/<job>/        the lock and the log of a job: see `job`
//! ```
//!
//! Only its owner reads it. Whether a run lives is told by the lock that its process holds on its file, which the system takes
//! away however the process ends.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use rustix::fs::{FlockOperation, flock};

use super::error::{Error, ErrorKind, Result};
use crate::whole;

/// How often who waits for a lock looks.
const POLL: Duration = Duration::from_millis(100);
/// No file of known pools is longer (bytes).
const LONGEST: u64 = 1 << 20;

/// The folder.
#[derive(Debug, Clone)]
pub struct State {
    folder: PathBuf,
}

/// The right to work on something, until it is dropped.
#[derive(Debug)]
pub struct Lock {
    _file: File,
}

impl State {
    /// Opens the folder, and makes it if it is missing.
    ///
    /// # Errors
    /// [`ErrorKind::State`] if it cannot be used.
    pub fn open(folder: &Path) -> Result<Self> {
        let folder = std::path::absolute(folder).map_err(|error| Error::state("find", folder, &error))?;
        for part in ["runs", "locks"] {
            let path = folder.join(part);
            let made = DirBuilder::new().recursive(true).mode(0o700).create(&path);
            made.map_err(|error| Error::state("make the folder", &path, &error))?;
        }
        Ok(Self { folder })
    }

    /// Returns where it is unless somebody says otherwise: below `/var/lib` for root, else where the user's state is.
    #[must_use]
    pub fn default_folder() -> Option<PathBuf> {
        let folder = |name| std::env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
        if let Some(state) = folder("XDG_STATE_HOME") {
            return Some(state.join("xofs"));
        }
        if rustix::process::geteuid().is_root() {
            return Some(PathBuf::from("/var/lib/xofs"));
        }
        Some(folder("HOME")?.join(".local/state/xofs"))
    }

    /// Returns the folder.
    #[must_use]
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Names this machine and folder: who made an object in a pool says it there. Machines often share a name, so the system's id
    /// (machine-id(5)) stands behind it, where there is one: a part of its digest, since it is not for others to know.
    #[must_use]
    pub fn keeper(&self) -> String {
        let machine = rustix::system::uname().nodename().to_string_lossy().into_owned();
        let id = fs::read("/etc/machine-id").ok().filter(|id| !id.trim_ascii().is_empty());
        let id = id.map(|id| format!(" {}", &storage::sha256(&[b"xofs ", id.trim_ascii()].concat())[..8]));
        format!("{machine}:{}{}", self.folder.display(), id.unwrap_or_default())
    }

    /// Returns where the journals are.
    pub(super) fn runs(&self) -> PathBuf {
        self.folder.join("runs")
    }

    /// Returns the folder of the slots that all processes of this machine share.
    #[must_use]
    pub fn slots(&self) -> PathBuf {
        self.folder.join("locks")
    }

    /// Takes a lock of this machine, waiting for another run that has it.
    ///
    /// # Errors
    /// [`ErrorKind::Locked`] if another has it still after `patience`; [`ErrorKind::Interrupted`]; [`ErrorKind::State`].
    pub fn lock(&self, name: &str, patience: Duration, is_cancelled: impl Fn() -> bool) -> Result<Lock> {
        let path = self.folder.join("locks").join(name);
        let file = OpenOptions::new().write(true).create(true).truncate(false).mode(0o600).open(&path);
        let file = file.map_err(|error| Error::state("open", &path, &error))?;
        let start = Instant::now();
        loop {
            match flock(&file, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => return Ok(Lock { _file: file }),
                Err(rustix::io::Errno::WOULDBLOCK | rustix::io::Errno::INTR) => {}
                Err(error) => return Err(Error::state("lock", &path, &error)),
            }
            if is_cancelled() {
                return Err(Error::interrupted());
            }
            if start.elapsed() >= patience {
                let message = format!(
                    "another run of xofs on this machine works on it for more than {} s; wait for it, or let this one wait longer \
                     (--wait, in a job timeouts.lock)",
                    patience.as_secs()
                );
                return Err(Error::new(ErrorKind::Locked, message));
            }
            thread::sleep(POLL);
        }
    }

    /// Returns the fingerprints that a person has accepted for an address.
    ///
    /// # Errors
    /// [`ErrorKind::State`] if they cannot be read.
    pub fn known(&self, address: &str) -> Result<Vec<String>> {
        let text = self.read_known()?;
        let of_line = |line: &str| {
            let (known, fingerprint) = line.trim().split_once(' ')?;
            (known == address).then(|| fingerprint.trim().to_owned())
        };
        Ok(text.lines().filter_map(of_line).collect())
    }

    /// Remembers that a fingerprint was accepted for an address, instead of what was before.
    ///
    /// # Errors
    /// [`ErrorKind::State`] if it cannot be written.
    pub fn accept(&self, address: &str, fingerprint: &str) -> Result<()> {
        let _lock = self.lock("known-pools", Duration::from_secs(10), || false)?;
        let path = self.folder.join("known-pools");
        let is_other = |line: &&str| line.split_once(' ').is_none_or(|(known, _)| known != address);
        let mut text: String = self.read_known()?.lines().filter(is_other).map(|line| format!("{line}\n")).collect();
        text.push_str(&format!("{address} {fingerprint}\n"));
        let written = whole::put(&path, ".known-pools.new".as_ref(), text.as_bytes(), 0o600, true);
        written.map_err(|error| Error::state("write", &path, &error))
    }

    fn read_known(&self) -> Result<String> {
        let path = self.folder.join("known-pools");
        match fs::metadata(&path) {
            Ok(metadata) if metadata.len() > LONGEST => {
                Err(Error::state("read", &path, &"it is longer than any list of pools"))
            }
            Ok(_) => fs::read_to_string(&path).map_err(|error| Error::state("read", &path, &error)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(String::new()),
            Err(error) => Err(Error::state("read", &path, &error)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pool_is_known_by_what_was_accepted_last() {
        let folder = tempfile::tempdir().expect("a folder");
        let state = State::open(&folder.path().join("state")).expect("is made");
        assert_eq!(state.known("pool:443").expect("empty"), Vec::<String>::new());
        state.accept("pool:443", "AA:BB").expect("written");
        state.accept("other:443", "CC").expect("written");
        state.accept("pool:443", "DD").expect("written");
        assert_eq!(state.known("pool:443").expect("read"), ["DD"]);
        assert_eq!(state.known("other:443").expect("read"), ["CC"]);
        assert!(state.keeper().contains("/state"), "{}", state.keeper());
    }

    #[test]
    fn a_lock_is_had_by_one_until_it_is_dropped() {
        let folder = tempfile::tempdir().expect("a folder");
        let state = State::open(folder.path()).expect("is made");
        let first = state.lock("vm", Duration::ZERO, || false).expect("free");
        let refused = state.lock("vm", Duration::ZERO, || false).expect_err("held");
        assert_eq!(refused.kind(), ErrorKind::Locked);
        let stopped = state.lock("vm", Duration::from_secs(60), || true).expect_err("held");
        assert_eq!(stopped.kind(), ErrorKind::Interrupted);
        drop(first);
        state.lock("vm", Duration::ZERO, || false).expect("free again");
    }
}
