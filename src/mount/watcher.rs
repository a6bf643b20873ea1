//! Answers in place of work that is stuck: EIO at the deadline, EINTR when a signal waits for who asked.
//!
//! The kernel tells of a signal by a request of its own, which the crate that speaks to it answers for us with "never
//! again"; after that not even SIGKILL frees a reader whose request was taken. So the signals of those who wait are looked
//! at in `/proc`, a few times a second and only while requests are old.

use std::collections::HashMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use super::errno::Errno;
use super::filesystem::TreeFilesystem;
use super::requests::Requests;

/// How often the table is looked at.
const TICK: Duration = Duration::from_millis(100);

/// Age from which a request's process is looked at.
const SLOW: Duration = Duration::from_millis(200);

/// How long the root of the repository may take to be listed before the repository is said not to answer.
const PROBE_PATIENCE: Duration = Duration::from_secs(1);

/// SIGSTOP, SIGTSTP, SIGTTIN and SIGTTOU: signal n is bit n - 1.
const STOPPING: u64 = 0b1111 << 18;

/// Starts the watcher of `requests`; it ends when they are closed.
pub(super) fn start(files: Arc<TreeFilesystem>, requests: Arc<Requests>, deadline: Option<Duration>) {
    let watch = move || {
        let mut probe = Probe::default();
        while requests.wait(TICK, probe.is_wanted || probe.running.is_some()) {
            turn(&files, &requests, deadline, &mut probe);
        }
    };
    if let Err(error) = thread::Builder::new().name("xofs-watcher".to_owned()).spawn(watch) {
        tracing::error!(%error, "no thread for deadlines could be made: what does not answer is waited for");
    }
}

/// Notes that work about a file is done.
pub(super) fn answered(files: &TreeFilesystem, inode: u64) {
    if let Some(silence) = files.health().answered(inode) {
        tracing::info!(file = files.place(inode), after = ?silence, "answers again");
    }
}

fn turn(files: &Arc<TreeFilesystem>, requests: &Requests, deadline: Option<Duration>, probe: &mut Probe) {
    let mut signalled = HashMap::new();
    for waiting in requests.older_than(SLOW) {
        if *signalled.entry(waiting.pid).or_insert_with(|| has_pending_signal(waiting.pid)) {
            requests.fail(&waiting, Errno::INTERRUPTED, || files.health().interrupted());
        } else if deadline.is_some_and(|deadline| waiting.since.elapsed() >= deadline) {
            requests.fail(&waiting, Errno::IO, || {
                if files.health().expired(waiting.inode) {
                    let waited = waiting.since.elapsed();
                    tracing::error!(file = files.place(waiting.inode), ?waited, "no answer from the repository");
                }
                probe.is_wanted = true;
            });
        }
    }
    probe.turn(files);
}

/// Whether the repository answers at all, asked for when something did not.
#[derive(Default)]
struct Probe {
    is_wanted: bool,
    running: Option<(Arc<AtomicBool>, Instant)>,
}

impl Probe {
    fn turn(&mut self, files: &Arc<TreeFilesystem>) {
        let health = files.health();
        match &self.running {
            Some((is_done, _)) if is_done.load(Ordering::Acquire) => self.running = None,
            Some((is_done, since)) if since.elapsed() >= PROBE_PATIENCE && health.silent() => {
                if is_done.load(Ordering::Acquire) {
                    // It came back meanwhile, and may have said so before this.
                    health.speaking();
                    return;
                }
                tracing::error!(
                    repository = files.repository(),
                    "does not answer; what needs it is refused until it does"
                );
            }
            Some(_) => {}
            None if self.is_wanted => {
                self.is_wanted = false;
                let is_done = Arc::new(AtomicBool::new(false));
                self.running = Some((is_done.clone(), Instant::now()));
                let files = files.clone();
                let ask = move || {
                    // Also an error is an answer, and so is a panic: else the repository would be refused for ever.
                    let answer = catch_unwind(AssertUnwindSafe(|| files.probe()));
                    is_done.store(true, Ordering::Release);
                    if let Some(silence) = files.health().speaking() {
                        let error =
                            answer.map_or_else(|_| Some("panic".to_owned()), |answer| Some(answer.err()?.to_string()));
                        tracing::info!(repository = files.repository(), after = ?silence, error, "answers again");
                    }
                };
                if thread::Builder::new().name("xofs-probe".to_owned()).spawn(ask).is_err() {
                    self.running = None;
                }
            }
            None => {}
        }
    }
}

/// Returns whether a signal that is neither blocked nor ignored waits for a process; false if nobody can tell.
fn has_pending_signal(pid: u32) -> bool {
    if pid == 0 {
        return false;
    }
    let Ok(status) = std::fs::read_to_string(format!("/proc/{pid}/status")) else { return false };
    is_signalled(&status)
}

/// Reads the masks of proc(5)'s `status`, which are in hexadecimal.
fn is_signalled(status: &str) -> bool {
    let mask = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
        line.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()).unwrap_or(0)
    };
    let pending = (mask("SigPnd") | mask("ShdPnd")) & !mask("SigBlk") & !mask("SigIgn");
    // Who is only stopped goes on later, and waits on.
    pending & !STOPPING != 0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_signal_counts_unless_it_is_blocked_or_ignored() {
        let status = |pending: u64, shared: u64, blocked: u64, ignored: u64| {
            format!(
                "Name:\tcp\nSigPnd:\t{pending:016x}\nShdPnd:\t{shared:016x}\nSigBlk:\t{blocked:016x}\nSigIgn:\t{ignored:016x}\n"
            )
        };
        assert!(is_signalled(&status(2, 0, 0, 0)) && is_signalled(&status(0, 0x100, 0, 0)));
        assert!(
            !is_signalled(&status(0, 0, 0, 0))
                && !is_signalled(&status(2, 0, 2, 0))
                && !is_signalled(&status(0, 2, 0, 2))
        );
        assert!(!is_signalled(&status(1 << (libc::SIGTSTP - 1), 1 << (libc::SIGSTOP - 1), 0, 0)));
        assert!(!is_signalled("") && !has_pending_signal(0));
    }
}
