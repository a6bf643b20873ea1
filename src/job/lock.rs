//! The lock of a job: one run at a time, and who has it.
//!
//! The process of a run holds a lock of the system on a file, which says its number. The system gives the lock back however the
//! process ends, so whether a run lives is never guessed; and a number that an earlier process left there is not believed, unless the
//! process of that number has the file open.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use rustix::fs::{FlockOperation, flock};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

/// How long a lock is tried for that somebody may just look at.
const PATIENCE: Duration = Duration::from_secs(2);
/// How often.
const POLL: Duration = Duration::from_millis(50);

/// The right to run a job, until it is dropped.
#[derive(Debug)]
pub struct RunLock {
    file: File,
}

impl RunLock {
    /// Takes the lock in a job's folder; `None` if another process has it.
    ///
    /// # Errors
    /// What the system says.
    pub fn take(folder: &Path) -> io::Result<Option<Self>> {
        let file =
            OpenOptions::new().read(true).write(true).create(true).truncate(false).mode(0o600).open(path(folder))?;
        let begun = Instant::now();
        loop {
            match flock(&file, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => break,
                Err(rustix::io::Errno::WOULDBLOCK) if begun.elapsed() >= PATIENCE => return Ok(None),
                Err(rustix::io::Errno::WOULDBLOCK | rustix::io::Errno::INTR) => thread::sleep(POLL),
                Err(error) => return Err(error.into()),
            }
        }
        let mut lock = Self { file };
        lock.file.set_len(0)?;
        lock.file.seek(SeekFrom::Start(0))?;
        // A full disk has no room for it, and keeps no job from running: then only `stop` does not know whom to ask.
        let _ = writeln!(lock.file, "{}", std::process::id());
        Ok(Some(lock))
    }
}

impl Drop for RunLock {
    fn drop(&mut self) {
        let _ = self.file.set_len(0);
    }
}

fn path(folder: &Path) -> PathBuf {
    folder.join("lock")
}

/// Whether a process runs the job.
///
/// # Errors
/// What the system says.
pub fn is_held(folder: &Path) -> io::Result<bool> {
    let file = match File::open(path(folder)) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
        opened => opened?,
    };
    match flock(&file, FlockOperation::NonBlockingLockShared) {
        Ok(()) => Ok(false),
        Err(rustix::io::Errno::WOULDBLOCK) => Ok(true),
        Err(error) => Err(error.into()),
    }
}

/// Returns what says whether the process of a number runs the job: between a run's lock and its first line it is not the run before.
///
/// # Errors
/// What the system says.
pub fn runner(folder: &Path) -> io::Result<impl Fn(u32) -> bool + use<>> {
    let (is_held, path) = (is_held(folder)?, path(folder));
    Ok(move |process| {
        is_held
            && match has_open(process, &path) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => false,
                // Who may not look believes the lock.
                has_open => has_open.unwrap_or(true),
            }
    })
}

/// Asks the process that runs the job to stop; returns its number, `None` if none does.
///
/// # Errors
/// What the system says; that it cannot be told which process it is.
pub fn stop(folder: &Path) -> io::Result<Option<u32>> {
    if !is_held(folder)? {
        return Ok(None);
    }
    let mut text = String::new();
    File::open(path(folder))?.take(32).read_to_string(&mut text)?;
    let unknown = || io::Error::other("it runs, but its process cannot be told; try again");
    let signal = || -> io::Result<u32> {
        let process: u32 = text.trim().parse().map_err(|_| unknown())?;
        let number = i32::try_from(process).ok().and_then(Pid::from_raw).ok_or_else(unknown)?;
        // From here on the number cannot come to mean another process.
        let handle = pidfd_open(number, PidfdFlags::empty())?;
        if !has_open(process, &path(folder))? {
            return Err(unknown());
        }
        pidfd_send_signal(&handle, Signal::TERM)?;
        Ok(process)
    };
    match signal() {
        // It ended meanwhile.
        Err(_) if !is_held(folder)? => Ok(None),
        signalled => signalled.map(Some),
    }
}

/// Whether a process has a file open.
fn has_open(process: u32, path: &Path) -> io::Result<bool> {
    let wanted = fs::metadata(path)?;
    for entry in fs::read_dir(format!("/proc/{process}/fd"))? {
        let found = entry.and_then(|entry| fs::metadata(entry.path()));
        if found.is_ok_and(|found| (found.dev(), found.ino()) == (wanted.dev(), wanted.ino())) {
            return Ok(true);
        }
    }
    Ok(false)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_job_is_run_by_one_at_a_time_and_the_lock_goes_with_it() {
        let folder = tempfile::tempdir().expect("a folder");
        assert!(!is_held(folder.path()).expect("asked"));
        assert_eq!(stop(folder.path()).expect("asked"), None);
        let lock = RunLock::take(folder.path()).expect("asked").expect("free");
        assert!(is_held(folder.path()).expect("asked"));
        assert!(RunLock::take(folder.path()).expect("asked").is_none());
        assert_eq!(fs::read_to_string(path(folder.path())).expect("read"), format!("{}\n", std::process::id()));
        // Neither the first process there is, nor one that there cannot be.
        let runner = runner(folder.path()).expect("asked");
        assert_eq!([std::process::id(), 1, 1 << 30].map(runner), [true, false, false]);
        drop(lock);
        assert!(!is_held(folder.path()).expect("asked"));
        assert!(!super::runner(folder.path()).expect("asked")(std::process::id()));
        assert_eq!(stop(folder.path()).expect("asked"), None);
    }

    #[test]
    fn the_number_that_another_process_left_is_not_believed() {
        let folder = tempfile::tempdir().expect("a folder");
        let lock = RunLock::take(folder.path()).expect("asked").expect("free");
        // The first process there is has no file of ours open.
        fs::write(path(folder.path()), "1\n").expect("written");
        stop(folder.path()).expect_err("not that one");
        fs::write(path(folder.path()), "").expect("written");
        stop(folder.path()).expect_err("none is said");
        drop(lock);
    }
}
