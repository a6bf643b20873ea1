//! An open export: requests of any thread go out as they come, and one thread takes the replies, in whatever order.
//!
//! ```text
//! read, block_status ─► a place in the table, request sent ─► server ─► receiver ─► the waiting thread
//! ```
//!
//! However many threads read, no more than [`OUTSTANDING`] bytes are asked for at once: who comes then waits for a reply to
//! anybody. Buffers go round: one that was copied from is the next reply's.
//!
//! Locks: the table, then nothing; the writing half, then nothing. Neither is held while a reply is read. An error of the
//! connection is that of all who wait, and of all who come later.

use std::collections::{HashMap, VecDeque};
use std::io;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use crate::handshake::{self, Export, Options};
use crate::reply::{Broken, Kind, Pending};
use crate::stream::Stream;
use crate::wire::{self, u16_of, u32_of, u64_of};
use crate::{Address, Error, ErrorKind, Result};

/// Bytes of one request: the size of a block of a backup. What is longer is asked for in pieces.
const PIECE: u32 = 2 << 20;
/// Pieces of one read that are asked for at once.
const PIPELINE: usize = 4;
/// What is asked for at once over a connection (bytes), so that memory on both sides is bounded.
const OUTSTANDING: u64 = 32 << 20;
/// Buffers that are kept for the next replies: what is asked for at once, and what is copied meanwhile.
const BUFFERS: usize = 20;
/// The longest range whose extents are asked for at once (bytes), less than a number of 32 bits holds.
const STATUS_RANGE: u64 = 1 << 31;

/// A run of bytes of which a metadata context says the same.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Status {
    /// In bytes, never 0.
    pub len: u64,
    /// As the context defines them: of `base:allocation`, 1 is a hole and 2 reads as zeroes; of a dirty bitmap, 1 is dirty.
    pub flags: u32,
}

/// A connection to an export, shared by any number of threads.
pub struct Connection {
    export: Export,
    round_trip: Duration,
    shown: String,
    shared: Arc<Shared>,
    writer: Mutex<Box<dyn Stream>>,
    closer: Box<dyn Stream>,
    receiver: Option<JoinHandle<()>>,
}

struct Shared {
    table: Mutex<Table>,
    /// Told when less is outstanding, and when the connection is over.
    room: Condvar,
}

#[derive(Default)]
struct Table {
    pending: HashMap<u64, Waiting>,
    next: u64,
    /// Bytes that are asked for and not there.
    outstanding: u64,
    /// Of answered reads.
    buffers: Vec<Vec<u8>>,
    /// Why there are no more replies.
    over: Option<Error>,
}

struct Waiting {
    pending: Pending,
    since: Instant,
    done: SyncSender<Result<Pending>>,
}

impl Connection {
    /// Connects to the export `name` of a server.
    ///
    /// # Errors
    /// [`ErrorKind::Unavailable`] if it cannot be reached; else as for [`Connection::over`].
    pub fn open(address: &Address, name: &str, options: &Options) -> Result<Self> {
        let shown = format!("'{}' of {address}", name.escape_debug());
        let stream = address.connect(options.timeout).map_err(|error| {
            Error::new(ErrorKind::Unavailable, &shown, format!("the server cannot be reached: {error}"))
        })?;
        Self::over(stream, name, &shown, options)
    }

    /// Negotiates the export `name` over a stream that is connected to a server; `shown` is what errors call it.
    ///
    /// # Errors
    /// [`ErrorKind::Refused`] if the server does not give it or not as it is wanted, [`ErrorKind::Protocol`] if it speaks otherwise,
    /// [`ErrorKind::Unavailable`] if it goes away or does not answer.
    pub fn over(stream: Box<dyn Stream>, name: &str, shown: &str, options: &Options) -> Result<Self> {
        let system = |error: io::Error| Error::new(ErrorKind::Unavailable, shown, error);
        stream.set_timeout(options.timeout.max(Duration::from_millis(1))).map_err(system)?;
        let (stream, export, round_trip) = handshake::negotiate(stream, name, shown, options)?;
        let (mut reader, closer) = (stream.another().map_err(system)?, stream.another().map_err(system)?);
        let shared = Arc::new(Shared { table: Mutex::default(), room: Condvar::new() });
        let (of_receiver, is_structured, timeout) = (shared.clone(), export.is_structured, options.timeout);
        let name = shown.to_owned();
        let receiver = thread::Builder::new()
            .name("nbd-replies".to_owned())
            .spawn(move || {
                let broken = of_receiver.receive(reader.as_mut(), is_structured, timeout);
                of_receiver.end(&broken.into_error(&name));
                reader.close();
            })
            .map_err(system)?;
        let writer = Mutex::new(stream);
        Ok(Self { export, round_trip, shown: shown.to_owned(), shared, writer, closer, receiver: Some(receiver) })
    }

    /// Returns what was agreed on.
    #[must_use]
    pub fn export(&self) -> &Export {
        &self.export
    }

    /// Returns how long the way to the server and back takes at most, as it was when it was agreed on what is read.
    #[must_use]
    pub fn round_trip(&self) -> Duration {
        self.round_trip
    }

    /// Returns whether there will be no more replies.
    #[must_use]
    pub fn is_over(&self) -> bool {
        self.shared.table().over.is_some()
    }

    /// Ends the connection: whoever waits for a reply gets an error.
    pub fn close(&self) {
        self.closer.close();
    }

    /// Fills `buffer` with the bytes that start at `offset`.
    ///
    /// # Errors
    /// [`ErrorKind::OutOfRange`]; [`ErrorKind::Failed`] if the server cannot read it; else the connection is over.
    pub fn read(&self, offset: u64, buffer: &mut [u8]) -> Result<()> {
        let end = self.end(offset, buffer.len() as u64)?;
        let minimum = u64::from(self.export.minimum);
        let piece = u64::from(PIECE.min(self.export.maximum / self.export.minimum * self.export.minimum));
        let mut asked = offset - offset % minimum;
        // What lies behind the last whole block of the export cannot be asked for with it.
        let until = end.next_multiple_of(minimum).min(self.export.size);
        let mut outstanding = VecDeque::new();
        while asked < until || !outstanding.is_empty() {
            while asked < until && outstanding.len() < PIPELINE {
                let len = piece.min(until - asked);
                let space = self.shared.buffer(usize::try_from(len).unwrap_or(usize::MAX));
                outstanding.push_back(self.send(wire::COMMAND_READ, Pending::read(asked, space, 0))?);
                asked += len;
            }
            let Some(reply) = outstanding.pop_front() else { break };
            let done = self.wait(&reply)?;
            let Kind::Read { buffer: bytes, .. } = done.kind else { continue };
            // The part of the piece that was wanted.
            let from = offset.max(done.offset);
            let to = end.min(done.offset + u64::from(done.len));
            if from < to {
                let index = |at: u64, base: u64| usize::try_from(at - base).unwrap_or(usize::MAX);
                let wanted = &bytes[index(from, done.offset)..index(to, done.offset)];
                buffer[index(from, offset)..index(to, offset)].copy_from_slice(wanted);
            }
            self.shared.keep(bytes);
        }
        Ok(())
    }

    /// Does the same as [`Connection::read`] with what follows the first `head` bytes of `buffer`; the buffer itself is filled by who
    /// receives, so nothing is copied once more. After an error it may be empty.
    ///
    /// # Errors
    /// As for [`Connection::read`].
    ///
    /// # Panics
    /// If `buffer` is shorter than `head`.
    pub fn read_into(&self, offset: u64, buffer: &mut Vec<u8>, head: usize) -> Result<()> {
        let end = self.end(offset, buffer[head..].len() as u64)?;
        let minimum = u64::from(self.export.minimum);
        let is_one = (1..=u64::from(PIECE.min(self.export.maximum))).contains(&(end - offset));
        if !is_one || !offset.is_multiple_of(minimum) || (!end.is_multiple_of(minimum) && end != self.export.size) {
            return self.read(offset, &mut buffer[head..]);
        }
        let pending = Pending::read(offset, std::mem::take(buffer), head);
        let done = self.wait(&self.send(wire::COMMAND_READ, pending)?)?;
        let Kind::Read { buffer: bytes, .. } = done.kind else { unreachable!("a read stays one") };
        *buffer = bytes;
        Ok(())
    }

    /// Returns what the context `name` says of the bytes from `offset` on, as far as the server tells at once, at least of
    /// one; `None` if it has no such context. What lies past the export is cut off.
    ///
    /// # Errors
    /// As for [`Connection::read`].
    pub fn block_status(&self, name: &str, offset: u64) -> Result<Option<Vec<Status>>> {
        let Some((_, id)) = self.export.contexts.iter().find(|(context, _)| context == name) else { return Ok(None) };
        self.end(offset, 1)?;
        let begin = offset - offset % u64::from(self.export.minimum);
        let len = (self.export.size - begin).min(STATUS_RANGE - u64::from(self.export.minimum));
        let len = u32::try_from(len).expect("less than 2^31");
        let done = self.wait(&self.send(wire::COMMAND_BLOCK_STATUS, Pending::status(begin, len))?)?;
        let Kind::Status(contexts) = done.kind else { return Ok(None) };
        let of_it = contexts.into_iter().find(|(found, _)| found == id).map(|(_, extents)| extents);
        let (mut at, mut told) = (begin, Vec::new());
        for extent in of_it.unwrap_or_default() {
            let end = at.saturating_add(extent.len).min(self.export.size);
            if end > offset {
                told.push(Status { len: end - at.max(offset), ..extent });
            }
            at = end;
            if at == self.export.size {
                break;
            }
        }
        if told.is_empty() {
            return Err(Error::new(
                ErrorKind::Protocol,
                &self.shown,
                format!("nothing is told of the bytes at {offset}"),
            ));
        }
        Ok(Some(told))
    }

    fn end(&self, offset: u64, len: u64) -> Result<u64> {
        let end = offset.checked_add(len).filter(|end| *end <= self.export.size);
        end.ok_or_else(|| {
            let reason = format!("it has {} bytes, {len} at {offset} were asked for", self.export.size);
            Error::new(ErrorKind::OutOfRange, &self.shown, reason)
        })
    }

    fn send(&self, command: u16, pending: Pending) -> Result<Receiver<Result<Pending>>> {
        let (done, wait) = sync_channel(1);
        let (offset, len) = (pending.offset, pending.len);
        let cookie = {
            let mut table = self.shared.table();
            // What is longer than all goes alone.
            while table.over.is_none() && table.outstanding > 0 && table.outstanding + pending.cost() > OUTSTANDING {
                table = self.shared.room.wait(table).unwrap_or_else(PoisonError::into_inner);
            }
            if let Some(error) = &table.over {
                return Err(error.clone());
            }
            table.next += 1;
            table.outstanding += pending.cost();
            let cookie = table.next;
            table.pending.insert(cookie, Waiting { pending, since: Instant::now(), done });
            cookie
        };
        let request = wire::request(command, cookie, offset, len);
        let mut writer = self.writer.lock().unwrap_or_else(PoisonError::into_inner);
        if let Err(error) = writer.write_all(&request).and_then(|()| writer.flush()) {
            drop(writer);
            // A part of it may have gone out: nobody can go on from there.
            self.shared.end(&Error::new(ErrorKind::Unavailable, &self.shown, format!("send a request: {error}")));
            self.closer.close();
        }
        Ok(wait)
    }

    fn wait(&self, reply: &Receiver<Result<Pending>>) -> Result<Pending> {
        let over = || Err(Error::new(ErrorKind::Unavailable, &self.shown, "the connection is over"));
        let done = reply.recv().unwrap_or_else(|_| over())?;
        match &done.failed {
            Some(reason) => Err(Error::new(ErrorKind::Failed, &self.shown, reason)),
            None => Ok(done),
        }
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        let farewell = wire::request(wire::COMMAND_DISCONNECT, 0, 0, 0);
        // It may be over already.
        let _ = self.writer.lock().unwrap_or_else(PoisonError::into_inner).write_all(&farewell);
        self.closer.close();
        if let Some(receiver) = self.receiver.take() {
            let _ = receiver.join();
        }
    }
}

impl Broken {
    fn into_error(self, shown: &str) -> Error {
        match self {
            Self::Protocol(reason) => {
                Error::new(ErrorKind::Protocol, shown, format!("the server does not keep to the protocol: {reason}"))
            }
            Self::Io(error) => {
                let reason = match error.kind() {
                    io::ErrorKind::UnexpectedEof => "the server closed the connection".to_owned(),
                    io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => "the server does not answer".to_owned(),
                    _ => format!("receive a reply: {error}"),
                };
                Error::new(ErrorKind::Unavailable, shown, reason)
            }
        }
    }
}

impl Shared {
    fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns a buffer for a reply; what it holds is of no meaning.
    fn buffer(&self, len: usize) -> Vec<u8> {
        let mut buffer = self.table().buffers.pop().unwrap_or_default();
        buffer.resize(len, 0);
        buffer
    }

    fn keep(&self, buffer: Vec<u8>) {
        let mut table = self.table();
        if table.buffers.len() < BUFFERS {
            table.buffers.push(buffer);
        }
    }

    /// Tells all who wait that there will be no reply.
    fn end(&self, error: &Error) {
        let waiting = {
            let mut table = self.table();
            table.over.get_or_insert_with(|| error.clone());
            std::mem::take(&mut table.pending)
        };
        self.room.notify_all();
        for waiting in waiting.into_values() {
            // It may have gone.
            let _ = waiting.done.try_send(Err(error.clone()));
        }
    }

    /// Takes replies until there can be no more; returns why.
    fn receive(&self, from: &mut dyn Stream, is_structured: bool, timeout: Duration) -> Broken {
        loop {
            if let Err(broken) = self.receive_one(from, is_structured, timeout) {
                return broken;
            }
        }
    }

    fn receive_one(
        &self,
        from: &mut dyn Stream,
        is_structured: bool,
        timeout: Duration,
    ) -> std::result::Result<(), Broken> {
        let magic = u32::from_be_bytes(self.begin(from, timeout)?);
        match magic {
            wire::SIMPLE_REPLY_MAGIC => {
                let (error, cookie) = (u32_of(from)?, u64_of(from)?);
                let mut waiting = self.take(cookie)?;
                let taken = if is_structured && error == 0 {
                    Err(Broken::Protocol("a simple reply, where structured ones were agreed on".to_owned()))
                } else {
                    waiting.pending.simple(error, from)
                };
                self.deliver(taken, cookie, waiting, true)
            }
            wire::STRUCTURED_REPLY_MAGIC if is_structured => {
                let (flags, kind, cookie, len) = (u16_of(from)?, u16_of(from)?, u64_of(from)?, u32_of(from)?);
                let mut waiting = self.take(cookie)?;
                self.deliver(waiting.pending.chunk(kind, len, from), cookie, waiting, flags & wire::CHUNK_DONE != 0)
            }
            _ => Err(Broken::Protocol(format!("a reply begins with {magic:#010x}, which no reply does"))),
        }
    }

    /// Waits for the beginning of a reply, for as long as nobody waits for one too long.
    fn begin(&self, from: &mut dyn Stream, timeout: Duration) -> std::result::Result<[u8; 4], Broken> {
        let (mut magic, mut len) = ([0; 4], 0);
        while len < magic.len() {
            match from.read(&mut magic[len..]) {
                Ok(0) => return Err(Broken::Io(io::ErrorKind::UnexpectedEof.into())),
                Ok(read) => len += read,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) => {
                    let is_late = self.table().pending.values().any(|waiting| waiting.since.elapsed() >= timeout);
                    if is_late || len > 0 {
                        return Err(Broken::Io(error));
                    }
                }
                Err(error) => return Err(Broken::Io(error)),
            }
        }
        Ok(magic)
    }

    fn take(&self, cookie: u64) -> std::result::Result<Waiting, Broken> {
        let found = self.table().pending.remove(&cookie);
        found.ok_or_else(|| {
            Broken::Protocol("a reply to a request that was not made, or is answered already".to_owned())
        })
    }

    /// Gives a request that is answered to who waits for it, and keeps one that is not.
    fn deliver(
        &self,
        taken: std::result::Result<(), Broken>,
        cookie: u64,
        mut waiting: Waiting,
        is_last: bool,
    ) -> std::result::Result<(), Broken> {
        let checked = taken.and_then(|()| if is_last { waiting.pending.check() } else { Ok(()) });
        if checked.is_ok() && is_last {
            self.table().outstanding -= waiting.pending.cost();
            self.room.notify_all();
            // It may have gone.
            let _ = waiting.done.try_send(Ok(waiting.pending));
            return Ok(());
        }
        // Also where the reply was broken: then the end of the connection is told to it as to all others.
        waiting.since = Instant::now();
        self.table().pending.insert(cookie, waiting);
        checked
    }
}
