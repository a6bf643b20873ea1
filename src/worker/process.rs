//! A worker as the mount sees it: a process that is asked, and never trusted.

use std::io::{self, Read};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use disk::Disk;
use guest::{Error as GuestError, ErrorKind};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::ARGUMENT;
use super::check;
use super::error::{Error, Result};
use super::protocol::{Frame, Message, PIECE_LIMIT, Request, receive, send, send_bytes};

/// Most bytes that a worker may read for one request: the journal of a volume, or all inodes of a large directory.
const READ_LIMIT: u64 = 4 << 30;

/// What a read counts at least (bytes): many short ones cost more.
const LEAST_READ: u64 = 64 << 10;

/// A process that reads one volume. Dropped, it is killed.
#[derive(Debug)]
pub(super) struct Process {
    socket: UnixStream,
    child: Child,
    patience: Duration,
}

/// Why a request has no answer.
pub(super) enum Failure {
    /// The worker lives, and may be asked again.
    Answered(Error),
    /// It is to be dropped; the reason. `true` if it was dead before it was asked.
    Broken(String, bool),
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        match error {
            Error::Worker(why) => Self::Broken(why, false),
            error => Self::Answered(error),
        }
    }
}

impl Process {
    /// Starts one, of this program if `program` leads to it, and waits until it is confined. It may work for `patience` for
    /// each request; while the disk is read for it, the clock stands.
    ///
    /// # Errors
    /// What the system says; what the worker died of.
    pub(super) fn start(program: &Path, patience: Duration) -> Result<Self> {
        let failed = |error: &dyn std::fmt::Display| Error::Worker(format!("no worker could be started: {error}"));
        let (socket, other) = UnixStream::pair().map_err(|error| failed(&error))?;
        // One that does not take its answer is stuck.
        socket.set_write_timeout(Some(patience)).map_err(|error| failed(&error))?;
        let child = Command::new(program)
            .arg0("xofs")
            .arg(ARGUMENT)
            .env_clear()
            .current_dir("/")
            // Ctrl-C is for the mount, which unmounts first.
            .process_group(0)
            .stdin(OwnedFd::from(other))
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .map_err(|error| failed(&error))?;
        let mut process = Self { socket, child, patience };
        match process.receive(&mut patience.clone()) {
            Ok(Frame::Message(Message::Ready)) => Ok(process),
            Ok(Frame::Message(Message::Panicked(why))) => Err(failed(&check::sentence(&why))),
            Ok(_) => Err(failed(&"it began with an answer")),
            Err(error) => Err(failed(&process.epitaph(&error))),
        }
    }

    /// Asks, and gives it what it needs of the disks until it answers.
    pub(super) fn ask(
        &mut self,
        request: &Request,
        disks: &[Arc<dyn Disk>],
    ) -> std::result::Result<Frame<Message>, Failure> {
        let mut patience = self.patience;
        if let Err(error) = timed(&mut patience, || send(&mut self.socket, request)) {
            return Err(self.broken(&error, true));
        }
        let (mut read, mut is_silent) = (0, true);
        // What the disk itself says is worth more than what comes back of it through the reader.
        let mut unreadable: Option<disk::Error> = None;
        loop {
            let frame = self.receive(&mut patience).map_err(|error| self.broken(&error, is_silent))?;
            is_silent = false;
            let broken = |why: &str| Failure::Broken(why.to_owned(), false);
            match frame {
                Frame::Message(Message::Read(number, offset, len)) => {
                    read += u64::from(len).max(LEAST_READ);
                    let disk = disks.get(usize::from(number));
                    let disk = disk.ok_or_else(|| broken("it asked for a disk that there is not"))?;
                    let piece = usize::try_from(len).ok().filter(|len| (1..=PIECE_LIMIT).contains(len));
                    let piece =
                        piece.filter(|_| offset.checked_add(u64::from(len)).is_some_and(|end| end <= disk.size()));
                    let piece = piece.ok_or_else(|| broken("it asked for bytes that its disk has not"))?;
                    if read > READ_LIMIT {
                        return Err(broken(&format!("it read more than {} GiB for one answer", READ_LIMIT >> 30)));
                    }
                    let mut bytes = vec![0; piece];
                    let answer = match disk.read_at(offset, &mut bytes) {
                        Ok(()) => None,
                        Err(error) => {
                            let message = Request::Unreadable(error.to_string());
                            // One that may pass is not forgotten for one that lasts.
                            if unreadable.as_ref().is_none_or(is_lasting) {
                                unreadable = Some(error);
                            }
                            Some(message)
                        }
                    };
                    let sent = timed(&mut patience, || match answer {
                        None => send_bytes(&mut self.socket, &bytes),
                        Some(message) => send(&mut self.socket, &message),
                    });
                    sent.map_err(|error| self.broken(&error, false))?;
                }
                Frame::Message(Message::Failed(kind, message)) => {
                    let error = match unreadable {
                        Some(error) if kind == ErrorKind::Disk => Error::Disk(error),
                        None if kind == ErrorKind::Disk => return Err(broken("it blamed a disk that could be read")),
                        _ => Error::Guest(GuestError::new(kind, check::sentence(&message))),
                    };
                    return Err(Failure::Answered(error));
                }
                Frame::Message(Message::Panicked(message)) => return Err(broken(&check::sentence(&message))),
                Frame::Message(Message::Ready) => return Err(broken("it answered what was not asked")),
                Frame::Message(Message::Survey(survey)) => match unreadable {
                    // Asked again it may find more.
                    Some(error) if !is_lasting(&error) => return Err(Failure::Answered(Error::Disk(error))),
                    _ => return Ok(Frame::Message(Message::Survey(survey))),
                },
                // What had to be read and could not be would have failed it.
                answer => return Ok(answer),
            }
        }
    }

    /// Says why it cannot be asked any more.
    fn broken(&mut self, error: &io::Error, is_silent: bool) -> Failure {
        let was_dead = is_silent && !matches!(error.kind(), io::ErrorKind::TimedOut | io::ErrorKind::WouldBlock);
        Failure::Broken(self.epitaph(error), was_dead)
    }

    fn receive(&self, patience: &mut Duration) -> io::Result<Frame<Message>> {
        let mut socket = Patient { socket: &self.socket, until: Instant::now() + *patience };
        timed(patience, || receive(&mut socket))
    }

    /// Says what became of it.
    fn epitaph(&mut self, error: &io::Error) -> String {
        match error.kind() {
            io::ErrorKind::TimedOut | io::ErrorKind::WouldBlock => {
                format!("it took more than {} s", self.patience.as_secs())
            }
            io::ErrorKind::InvalidData => format!("it answered what no reader does: {error}"),
            _ => {
                // It may have closed its socket, and live.
                let _ = self.child.kill();
                self.child.wait().map_or_else(|error| error.to_string(), |status| end(status, error))
            }
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Does something, and takes the time that it needs from what is left.
fn timed<T>(left: &mut Duration, act: impl FnOnce() -> T) -> T {
    let began = Instant::now();
    let done = act();
    *left = left.saturating_sub(began.elapsed());
    done
}

/// Whether a disk will never say more.
fn is_lasting(error: &disk::Error) -> bool {
    matches!(error.kind(), disk::ErrorKind::Damaged | disk::ErrorKind::Unsupported)
}

fn end(status: ExitStatus, error: &io::Error) -> String {
    use std::os::unix::process::ExitStatusExt;
    match status.signal() {
        Some(libc::SIGSYS) => "it was ended by the system for a call that no reader makes (SIGSYS)".to_owned(),
        Some(libc::SIGXCPU) => "it computed for too long, and was ended (SIGXCPU)".to_owned(),
        Some(libc::SIGABRT) => "it had no memory left, or gave up (SIGABRT)".to_owned(),
        Some(libc::SIGKILL) => format!("it was killed ({error})"),
        Some(signal) => format!("it was ended by signal {signal}"),
        None => format!("it ended ({status})"),
    }
}

/// A socket that is read until a moment, not longer.
struct Patient<'a> {
    socket: &'a UnixStream,
    until: Instant,
}

impl Read for Patient<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let left = self.until.saturating_duration_since(Instant::now());
        let timeout = Timespec::try_from(left).map_err(io::Error::other)?;
        let mut readable = [PollFd::new(self.socket, PollFlags::IN)];
        match poll(&mut readable, Some(&timeout)) {
            Ok(0) => Err(io::ErrorKind::TimedOut.into()),
            // `read_exact` asks again.
            Err(rustix::io::Errno::INTR) => Err(io::ErrorKind::Interrupted.into()),
            Err(error) => Err(error.into()),
            Ok(_) => self.socket.read(buffer),
        }
    }
}
