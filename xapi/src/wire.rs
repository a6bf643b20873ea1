//! HTTP/1.x as XAPI speaks it, over any stream: heads that are bounded, bodies by length or until the end of the connection.
//!
//! Who waits looks at its token every 100 ms. Nothing is sent in chunks (XAPI refuses that), and chunks are not read: XAPI
//! sends none. A body until the end of the connection is not proven complete by its end; that is up to who reads it.

use std::fmt;
use std::io;
use std::time::{Duration, Instant};

use nbd::Stream;
use zeroize::Zeroizing;

use crate::address::is_timeout;
use crate::cancel::TICK;
use crate::error::quoted;
use crate::{Cancel, Error, ErrorKind, Result};

/// Longest head of a reply (bytes).
const HEAD_LIMIT: usize = 32 << 10;
/// Most headers of a reply.
const HEADERS: usize = 64;
/// Most replies that only say to go on (status 1xx).
const INTERIM: usize = 4;
/// Bytes that are read ahead at once.
const AHEAD: usize = 16 << 10;

/// How long who waits goes on.
#[derive(Debug, Clone)]
pub struct Patience {
    /// Stops it.
    pub cancel: Cancel,
    /// How long nothing may come, or be taken.
    pub silence: Duration,
}

/// A connection, and what was read ahead from it.
pub struct Wire {
    stream: Box<dyn Stream>,
    /// The reply to a login holds a secret.
    ahead: Zeroizing<Vec<u8>>,
    taken: usize,
    shown: String,
}

/// How long the body of a reply is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Length {
    Bytes(u64),
    UntilEnd,
}

/// The head of a reply.
#[derive(Debug)]
pub struct Head {
    pub status: u16,
    pub length: Length,
    /// Whether the connection can be used again after the body.
    pub is_kept: bool,
    headers: Vec<(String, String)>,
}

impl Head {
    /// Returns the first header of this name (in lower case).
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(known, _)| known == name).map(|(_, value)| value.as_str())
    }
}

impl fmt::Debug for Wire {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Wire").field("shown", &self.shown).finish_non_exhaustive()
    }
}

impl Wire {
    /// Takes a stream that is connected to a server; `shown` is what errors call the server.
    pub fn new(stream: Box<dyn Stream>, shown: String) -> Result<Self> {
        stream.set_timeout(TICK).map_err(|error| Error::of_io(&shown, error))?;
        Ok(Self { stream, ahead: Zeroizing::default(), taken: 0, shown })
    }

    /// Ends the connection.
    pub fn close(&self) {
        self.stream.close();
    }

    /// Whether the server left the connection open, and said nothing unasked.
    pub fn is_usable(&mut self) -> bool {
        // A timeout, however short, would last some ticks of the system's clock, and this is asked before each call.
        if self.taken < self.ahead.len() || self.stream.set_waiting(false).is_err() {
            return false;
        }
        let is_quiet = matches!(self.stream.read(&mut [0]), Err(error) if is_timeout(&error));
        is_quiet && self.stream.set_waiting(true).is_ok()
    }

    /// Sends all of `bytes`; after an error, not all of them reached the server.
    pub fn send(&mut self, bytes: &[u8], patience: &Patience) -> Result<()> {
        let mut rest = bytes;
        while !rest.is_empty() {
            let sent = self.send_some(rest, patience)?;
            rest = &rest[sent..];
        }
        self.flush(patience)
    }

    /// Sends a part of `bytes`, not empty; returns of how many bytes.
    pub fn send_some(&mut self, bytes: &[u8], patience: &Patience) -> Result<usize> {
        let sent = wait(&self.shown, patience, "it takes nothing more", || self.stream.write(bytes))?;
        if sent == 0 {
            return Err(Error::of_io(&self.shown, io::ErrorKind::BrokenPipe.into()));
        }
        Ok(sent)
    }

    /// Sends what is held back by an encryption.
    pub fn flush(&mut self, patience: &Patience) -> Result<()> {
        wait(&self.shown, patience, "it takes nothing more", || self.stream.flush())
    }

    /// Reads some bytes, those that were read ahead first; 0 at the end of the connection.
    pub fn read(&mut self, buffer: &mut [u8], patience: &Patience) -> Result<usize> {
        let ahead = &self.ahead[self.taken..];
        if !ahead.is_empty() {
            let count = ahead.len().min(buffer.len());
            buffer[..count].copy_from_slice(&ahead[..count]);
            self.taken += count;
            return Ok(count);
        }
        let read = wait(&self.shown, patience, "it says nothing more", || match self.stream.read(buffer) {
            // An encrypted connection whose end is not announced: as good as the end of a plain one.
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(0),
            read => read,
        })?;
        Ok(read.min(buffer.len()))
    }

    /// Reads the head of a reply.
    ///
    /// # Errors
    /// `Protocol` if it is none or too long, `Unreachable` if the connection ends before it does.
    pub fn head(&mut self, patience: &Patience) -> Result<Head> {
        for _ in 0..INTERIM {
            let head = self.any_head(patience)?;
            if head.status >= 200 {
                return Ok(head);
            }
        }
        Err(self.protocol("it says again and again that it goes on"))
    }

    fn any_head(&mut self, patience: &Patience) -> Result<Head> {
        self.ahead.drain(..self.taken);
        self.taken = 0;
        let mut is_grown = !self.ahead.is_empty();
        loop {
            // A head ends with a line: nothing can have changed without one.
            if is_grown && let Some((head, len)) = self.parse()? {
                self.taken = len;
                return Ok(head);
            }
            if self.ahead.len() >= HEAD_LIMIT {
                return Err(self.protocol(format_args!("the head of a reply is longer than {HEAD_LIMIT} bytes")));
            }
            let mut piece = Zeroizing::new([0; AHEAD]);
            let stream = &mut self.stream;
            let read = wait(&self.shown, patience, "it does not answer", || match stream.read(&mut *piece) {
                Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(0),
                read => read,
            })?;
            if read == 0 {
                return Err(Error::of_io(&self.shown, io::ErrorKind::UnexpectedEof.into()));
            }
            let new = &piece[..read.min(AHEAD)];
            is_grown = new.contains(&b'\n');
            self.ahead.extend_from_slice(new);
        }
    }

    /// Parses what was read ahead; `None` if the head has not ended yet. Returns its length in bytes, too.
    fn parse(&self) -> Result<Option<(Head, usize)>> {
        let mut headers = [httparse::EMPTY_HEADER; HEADERS];
        let mut parsed = httparse::Response::new(&mut headers);
        let len = match parsed.parse(&self.ahead) {
            Ok(httparse::Status::Complete(len)) => len,
            Ok(httparse::Status::Partial) => return Ok(None),
            Err(error) => return Err(self.protocol(format_args!("what answers is no HTTP server ({error})"))),
        };
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim().to_owned();
        let headers: Vec<_> =
            parsed.headers.iter().map(|header| (header.name.to_ascii_lowercase(), text(header.value))).collect();
        let is_new = parsed.version == Some(1);
        let says = |value: &str| {
            let mut connection = headers.iter().filter(|(name, _)| name == "connection");
            connection.any(|(_, found)| found.split(',').any(|found| found.trim().eq_ignore_ascii_case(value)))
        };
        let is_kept = if is_new { !says("close") } else { says("keep-alive") };
        let status = parsed.code.unwrap_or(0);
        let length = self.length(status, &headers)?;
        let is_kept = is_kept && length != Length::UntilEnd;
        Ok(Some((Head { status, length, is_kept, headers }, len)))
    }

    fn length(&self, status: u16, headers: &[(String, String)]) -> Result<Length> {
        let encoding = headers.iter().find(|(name, value)| name == "transfer-encoding" && value != "identity");
        if let Some((_, encoding)) = encoding {
            return Err(
                self.protocol(format_args!("it sends its body encoded ({}), which XAPI does not", quoted(encoding)))
            );
        }
        let mut lengths = headers.iter().filter(|(name, _)| name == "content-length").map(|(_, value)| value);
        let Some(length) = lengths.next() else {
            let is_empty = status < 200 || status == 204 || status == 304;
            return Ok(if is_empty { Length::Bytes(0) } else { Length::UntilEnd });
        };
        let is_number = !length.is_empty() && length.bytes().all(|byte| byte.is_ascii_digit());
        match length.parse() {
            Ok(bytes) if is_number && lengths.all(|other| other == length) => Ok(Length::Bytes(bytes)),
            _ => Err(self.protocol(format_args!("'{}' is no length of a body", quoted(length)))),
        }
    }

    /// Reads the body of a reply, of at most `limit` bytes.
    ///
    /// # Errors
    /// `Protocol` if it is longer, `Unreachable` if it is cut off.
    pub fn body(&mut self, length: Length, limit: usize, patience: &Patience) -> Result<Zeroizing<Vec<u8>>> {
        let expected = match length {
            Length::Bytes(bytes) => match usize::try_from(bytes).ok().filter(|bytes| *bytes <= limit) {
                Some(bytes) => Some(bytes),
                None => {
                    return Err(self.protocol(format_args!("a reply of {bytes} bytes, at most {limit} were expected")));
                }
            },
            Length::UntilEnd => None,
        };
        let mut body = Zeroizing::new(Vec::with_capacity(expected.unwrap_or(0).min(AHEAD)));
        let mut piece = Zeroizing::new(vec![0; AHEAD]);
        while expected.is_none_or(|expected| body.len() < expected) {
            let wanted = expected.map_or(AHEAD, |expected| (expected - body.len()).min(AHEAD));
            let read = self.read(&mut piece[..wanted], patience)?;
            if read == 0 && expected.is_some() {
                return Err(Error::of_io(&self.shown, io::ErrorKind::UnexpectedEof.into()));
            }
            if read == 0 {
                break;
            }
            body.extend_from_slice(&piece[..read]);
            if body.len() > limit {
                return Err(self.protocol(format_args!("a reply of more than {limit} bytes")));
            }
        }
        Ok(body)
    }

    fn protocol(&self, reason: impl fmt::Display) -> Error {
        Error::new(ErrorKind::Protocol, &self.shown, reason)
    }
}

/// Repeats what the system does until it is done, for as long as the patience lasts.
fn wait<T>(shown: &str, patience: &Patience, late: &str, mut act: impl FnMut() -> io::Result<T>) -> Result<T> {
    let begun = Instant::now();
    loop {
        match act() {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) if is_timeout(&error) => {
                if begun.elapsed() >= patience.silence {
                    let reason = format!("{late} for {} s", patience.silence.as_secs());
                    return Err(Error::new(ErrorKind::TimedOut, shown, reason));
                }
            }
            result => return result.map_err(|error| Error::of_io(shown, error)),
        }
        patience.cancel.check(shown)?;
    }
}
