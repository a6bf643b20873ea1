//! Whether the repository answers: what the mount found out, for `.xofs/status.json` and for deciding what is not even
//! tried.
//!
//! | state                      | how it is entered                           | how it is left              | what is asked meanwhile     |
//! |----------------------------|---------------------------------------------|-----------------------------|-----------------------------|
//! | a file is silent           | a request about it passed the deadline      | a request about it is done  | EIO at once, but for one try now and then |
//! | the repository is silent   | and then listing its root took long as well | that listing is done        | EIO at once                 |

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// How often something about a silent file is tried although it did not answer.
const RETRY: Duration = Duration::from_secs(10);

/// Whether the repository answers.
#[derive(Debug, Default)]
pub struct Health {
    /// Whether a file is silent, or the repository: what a request looks at first, without a lock.
    is_troubled: AtomicBool,
    answered: AtomicU64,
    failed: AtomicU64,
    timed_out: AtomicU64,
    interrupted: AtomicU64,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    silent_since: Option<Instant>,
    files: BTreeMap<u64, Silence>,
}

#[derive(Debug, Clone, Copy)]
struct Silence {
    since: Instant,
    tried: Instant,
}

/// What is known of a repository that does not answer as it should.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Report {
    /// For how long it has not answered at all.
    pub silent_for: Option<Duration>,
    /// Inodes of the files about which nothing was answered, and for how long.
    pub silent_files: Vec<(u64, Duration)>,
    /// Requests that may ask the repository whose work came to its end, also if too late or with an error.
    pub answered: u64,
    /// Requests for which the repository gave an error, or something damaged.
    pub failed: u64,
    /// Requests answered with an error at the deadline, since the mount was made.
    pub timed_out: u64,
    /// Requests given up because a signal came for who waited.
    pub interrupted: u64,
}

impl Health {
    /// Returns whether a request about a file should be tried.
    pub fn admits(&self, inode: u64) -> bool {
        if !self.is_troubled.load(Ordering::Acquire) {
            return true;
        }
        let mut state = self.state();
        if state.silent_since.is_some() {
            return false;
        }
        match state.files.get_mut(&inode) {
            Some(silence) if silence.tried.elapsed() < RETRY => false,
            Some(silence) => {
                silence.tried = Instant::now();
                true
            }
            None => true,
        }
    }

    /// Returns whether nothing was heard of a file, or of the repository, so that what is known is to be shown instead.
    pub fn is_silent(&self, inode: u64) -> bool {
        if !self.is_troubled.load(Ordering::Acquire) {
            return false;
        }
        let state = self.state();
        state.silent_since.is_some() || state.files.contains_key(&inode)
    }

    /// Notes that a request passed the deadline; returns whether its file is newly silent.
    pub fn expired(&self, inode: u64) -> bool {
        self.timed_out.fetch_add(1, Ordering::Relaxed);
        let now = Instant::now();
        let mut state = self.state();
        let is_new = !state.files.contains_key(&inode);
        state.files.entry(inode).or_insert(Silence { since: now, tried: now }).tried = now;
        self.note(&state);
        is_new
    }

    /// Notes that a request cannot be answered for what the repository gives.
    pub fn failed(&self) {
        self.failed.fetch_add(1, Ordering::Relaxed);
    }

    /// Notes that a request was given up for a signal.
    pub fn interrupted(&self) {
        self.interrupted.fetch_add(1, Ordering::Relaxed);
    }

    /// Notes that work about a file is done; returns for how long it was silent.
    pub fn answered(&self, inode: u64) -> Option<Duration> {
        self.answered.fetch_add(1, Ordering::Relaxed);
        if !self.is_troubled.load(Ordering::Acquire) {
            return None;
        }
        let mut state = self.state();
        let silence = state.files.remove(&inode);
        self.note(&state);
        silence.map(|silence| silence.since.elapsed())
    }

    /// Notes that the repository does not answer at all; returns whether that is new.
    pub fn silent(&self) -> bool {
        let mut state = self.state();
        let is_new = state.silent_since.is_none();
        state.silent_since.get_or_insert_with(Instant::now);
        self.note(&state);
        is_new
    }

    /// Notes that the repository answers; returns for how long it did not.
    pub fn speaking(&self) -> Option<Duration> {
        let mut state = self.state();
        let since = state.silent_since.take();
        self.note(&state);
        since.map(|since| since.elapsed())
    }

    /// Returns what is known.
    pub fn report(&self) -> Report {
        let state = self.state();
        Report {
            silent_for: state.silent_since.map(|since| since.elapsed()),
            silent_files: state.files.iter().map(|(inode, silence)| (*inode, silence.since.elapsed())).collect(),
            answered: self.answered.load(Ordering::Relaxed),
            failed: self.failed.load(Ordering::Relaxed),
            timed_out: self.timed_out.load(Ordering::Relaxed),
            interrupted: self.interrupted.load(Ordering::Relaxed),
        }
    }

    fn note(&self, state: &State) {
        self.is_troubled.store(state.silent_since.is_some() || !state.files.is_empty(), Ordering::Release);
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_silent_file_is_not_asked_again_until_it_answers_and_others_are() {
        let health = Health::default();
        assert!(health.admits(5) && !health.is_silent(5));
        assert!(health.expired(5) && !health.expired(5));
        assert!(health.is_silent(5) && !health.is_silent(6));
        assert!(!health.admits(5) && health.admits(6));
        assert_eq!(health.report().timed_out, 2);
        let wait = Duration::from_millis(2);
        std::thread::sleep(wait);
        assert!(!health.expired(5) && health.report().silent_files[0].1 >= wait);
        assert!(health.answered(6).is_none() && health.answered(5).is_some());
        assert!(health.admits(5));
    }

    #[test]
    fn nothing_of_a_silent_repository_is_asked_until_it_answers() {
        let health = Health::default();
        assert!(health.silent() && !health.silent());
        assert!(!health.admits(6) && health.is_silent(6));
        assert!(health.report().silent_for.is_some());
        assert!(health.speaking().is_some() && health.speaking().is_none());
        assert!(health.admits(6));
    }
}
