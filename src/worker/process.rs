//! A worker as the mount sees it: a process that is asked, and never trusted.

use std::cell::Cell;
use std::io::{self, Read, Write};
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
use rustix::io::Errno;
use rustix::net::SendFlags;

use super::ARGUMENT;
use super::check;
use super::error::{Error, Result};
use super::protocol::{Frame, Message, PIECE_LIMIT, Request, receive, send, send_bytes};

/// Most bytes that a worker may read for one request: the journal of a volume, or all inodes of a large directory.
const READ_LIMIT: u64 = 4 << 30;

/// What a read counts at least (bytes): many short ones cost more.
const LEAST_READ: u64 = 64 << 10;

/// How long workers may still work for what is being done, in however many questions. While a disk is read for them, the clock
/// stands.
#[derive(Debug)]
pub struct Patience(Cell<Duration>);

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

impl Patience {
    /// Begins anew.
    pub(super) fn new(left: Duration) -> Self {
        Self(Cell::new(left))
    }

    /// Returns as much patience, several times.
    pub(super) fn times(self, count: u32) -> Self {
        Self::new(self.0.get() * count)
    }

    /// Does something with a socket, which ends when this does, and takes the time that it needs.
    fn with<T>(&self, socket: &UnixStream, act: impl FnOnce(&mut Patient) -> T) -> T {
        let began = Instant::now();
        let done = act(&mut Patient { socket, until: began + self.0.get() });
        self.0.set(self.0.get().saturating_sub(began.elapsed()));
        done
    }
}

impl Process {
    /// Starts one, of this program if `program` leads to it, and waits until it is confined, at most for `patience`.
    ///
    /// # Errors
    /// What the system says; what the worker died of.
    pub(super) fn start(program: &Path, patience: Duration) -> Result<Self> {
        let failed = |error: &dyn std::fmt::Display| Error::Worker(format!("no worker could be started: {error}"));
        let (socket, other) = UnixStream::pair().map_err(|error| failed(&error))?;
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
        match process.receive(&Patience::new(patience)) {
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
        patience: &Patience,
    ) -> std::result::Result<Frame<Message>, Failure> {
        if let Err(error) = patience.with(&self.socket, |socket| send(socket, request)) {
            return Err(self.broken(&error, true));
        }
        let (mut read, mut is_silent) = (0, true);
        // What the disk itself says is worth more than what comes back of it through the reader.
        let mut unreadable: Option<disk::Error> = None;
        loop {
            let frame = self.receive(patience).map_err(|error| self.broken(&error, is_silent))?;
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
                    let sent = patience.with(&self.socket, |socket| match answer {
                        None => send_bytes(socket, &bytes),
                        Some(message) => send(socket, &message),
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

    fn receive(&self, patience: &Patience) -> io::Result<Frame<Message>> {
        patience.with(&self.socket, |socket| receive(socket))
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

/// A socket that is used until a moment, not longer, however little the other side gives or takes at a time.
struct Patient<'a> {
    socket: &'a UnixStream,
    until: Instant,
}

impl Patient<'_> {
    /// Waits until the socket can be read or written.
    fn wait(&self, what: PollFlags) -> io::Result<()> {
        let left = self.until.saturating_duration_since(Instant::now());
        let timeout = Timespec::try_from(left).map_err(io::Error::other)?;
        match poll(&mut [PollFd::new(self.socket, what)], Some(&timeout)) {
            Ok(0) => Err(io::ErrorKind::TimedOut.into()),
            Ok(_) => Ok(()),
            // Of [`io::ErrorKind::Interrupted`], after which who wants all asks again.
            Err(error) => Err(error.into()),
        }
    }
}

impl Read for Patient<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.wait(PollFlags::IN)?;
        self.socket.read(buffer)
    }
}

impl Write for Patient<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        loop {
            self.wait(PollFlags::OUT)?;
            // A call that waits would wait anew for each piece that is taken.
            match rustix::net::send(self.socket, bytes, SendFlags::DONTWAIT | SendFlags::NOSIGNAL) {
                Err(Errno::AGAIN) => {}
                sent => return Ok(sent?),
            }
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
