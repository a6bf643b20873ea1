//! Connections to the hosts of a pool: each call has one for itself, and some are kept for the next calls.

use std::fmt;
use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use nbd::Stream;
use zeroize::Zeroizing;

use crate::address::is_timeout;
use crate::cancel::TICK;
use crate::wire::{Head, Patience, Wire};
use crate::{Address, Cancel, Error, Fingerprint, Result, Tls, Trust, Untrusted};

/// Calls under way at once.
const CALLS: usize = 20;
/// Connections that are kept.
const IDLE: usize = 8;
/// How long one is kept: shorter than any server keeps it.
const IDLE_TIME: Duration = Duration::from_secs(10);
/// How long an encryption may take to be agreed on.
const HANDSHAKE: Duration = Duration::from_secs(20);
/// Longest reply to a call (bytes): the records of the largest class of a very large pool.
const REPLY_LIMIT: usize = 256 << 20;

/// A host, and by what it is recognised.
#[derive(Debug, Clone)]
pub struct Target {
    pub address: Address,
    pub trust: Trust,
    /// What makes encrypted connections to it, from the first one on: it takes up what was agreed on before.
    tls: OnceLock<Tls>,
}

/// A new connection.
pub struct Connected {
    pub wire: Wire,
    /// Of the host's certificate; `None` if the connection is not encrypted.
    pub fingerprint: Option<Fingerprint>,
}

/// Why there is no reply.
#[derive(Debug)]
pub struct Broken {
    pub error: Error,
    /// Whether the server may have done what it was told.
    pub was_sent: bool,
}

/// A reply of HTTP.
pub struct Reply {
    pub head: Head,
    pub body: Zeroizing<Vec<u8>>,
    pub fingerprint: Option<Fingerprint>,
}

struct Idle {
    connected: Connected,
    address: Address,
    since: Instant,
}

/// The connections of a session.
#[derive(Default)]
pub struct Connections {
    idle: Mutex<Vec<Idle>>,
    calls: Mutex<usize>,
    freed: Condvar,
}

/// A place among the calls that may be under way.
struct Place<'a>(&'a Connections);

impl Drop for Place<'_> {
    fn drop(&mut self) {
        *self.0.calls.lock().unwrap_or_else(PoisonError::into_inner) -= 1;
        self.0.freed.notify_one();
    }
}

impl Target {
    pub fn new(address: Address, trust: Trust) -> Self {
        Self { address, trust, tls: OnceLock::new() }
    }

    /// Connects to the host, and makes sure that it is the one meant.
    ///
    /// # Errors
    /// `Unreachable`, `Untrusted`, or what the token says.
    pub fn connect(&self, cancel: &Cancel) -> Result<Connected> {
        let stream = self.address.connect(cancel)?;
        let shown = self.address.to_string();
        if !self.address.is_encrypted {
            return Ok(Connected { wire: Wire::new(Box::new(stream), shown)?, fingerprint: None });
        }
        let untrusted = |error: &Untrusted| Error::untrusted(&self.address, error, error.seen());
        let tls = match self.tls.get() {
            Some(tls) => tls,
            None => {
                let made = Tls::new(&self.trust, &self.address.host).map_err(|error| untrusted(&error))?;
                self.tls.get_or_init(|| made)
            }
        };
        let is_new = Arc::new(AtomicBool::new(true));
        stream.set_timeout(TICK).map_err(|error| Error::of_io(&shown, error))?;
        let until = cancel.part(HANDSHAKE);
        let stream = Patient { stream, is_new: is_new.clone(), until };
        let encrypted = tls.connect(Box::new(stream)).map_err(|error| match Untrusted::of(&error) {
            Some(error) => untrusted(error),
            None => Error::of_io(&shown, error),
        })?;
        is_new.store(false, Ordering::Release);
        let fingerprint = Some(encrypted.fingerprint());
        Ok(Connected { wire: Wire::new(Box::new(encrypted), shown)?, fingerprint })
    }
}

impl Connections {
    /// Sends a call and returns the reply; `waits` if it only waits for events, which is no work for the server.
    pub fn exchange(
        &self,
        target: &Target,
        call: &Call<'_>,
        patience: &Patience,
    ) -> std::result::Result<Reply, Broken> {
        let unsent = |error| Broken { error, was_sent: false };
        let place =
            if call.waits { None } else { Some(self.place(&patience.cancel, &target.address).map_err(unsent)?) };
        let mut connected = match self.take(&target.address) {
            Some(connected) => connected,
            None => target.connect(&patience.cancel).map_err(unsent)?,
        };
        let mut request = Zeroizing::new(Vec::with_capacity(call.body.len() + 1024 + call.headers.len()));
        let host = Host(&target.address);
        write!(
            request,
            "POST /jsonrpc HTTP/1.1\r\nHost: {host}\r\nUser-Agent: {}\r\nContent-Type: application/json\r\nAccept: \
             application/json\r\nConnection: keep-alive\r\nContent-Length: {}\r\n{}\r\n",
            call.agent,
            call.body.len(),
            call.headers
        )
        .expect("memory takes all");
        request.extend_from_slice(call.body);
        connected.wire.send(&request, patience).map_err(unsent)?;
        let sent = |error| Broken { error, was_sent: true };
        let head = connected.wire.head(patience).map_err(sent)?;
        let body = connected.wire.body(head.length, REPLY_LIMIT, patience).map_err(sent)?;
        let fingerprint = connected.fingerprint;
        if head.is_kept {
            self.keep(&target.address, connected);
        }
        drop(place);
        Ok(Reply { head, body, fingerprint })
    }

    /// Ends all that are kept.
    pub fn forget(&self) {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner).clear();
    }

    fn place(&self, cancel: &Cancel, address: &Address) -> Result<Place<'_>> {
        let mut calls = self.calls.lock().unwrap_or_else(PoisonError::into_inner);
        while *calls >= CALLS {
            cancel.check(address)?;
            calls = self.freed.wait_timeout(calls, TICK).unwrap_or_else(PoisonError::into_inner).0;
        }
        *calls += 1;
        Ok(Place(self))
    }

    fn take(&self, address: &Address) -> Option<Connected> {
        loop {
            let idle = {
                let mut idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner);
                idle.retain(|idle| idle.since.elapsed() < IDLE_TIME);
                let index = idle.iter().rposition(|idle| idle.address == *address)?;
                idle.swap_remove(index)
            };
            let mut connected = idle.connected;
            // One that the server closed would leave open whether it took the call.
            if connected.wire.is_usable() {
                return Some(connected);
            }
        }
    }

    fn keep(&self, address: &Address, connected: Connected) {
        let mut idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner);
        if idle.len() < IDLE {
            idle.push(Idle { connected, address: address.clone(), since: Instant::now() });
        }
    }
}

/// What is sent.
pub struct Call<'a> {
    pub agent: &'a str,
    /// Further headers, each with its end of line.
    pub headers: &'a str,
    pub body: &'a [u8],
    /// Whether it only waits, which is no work for the server.
    pub waits: bool,
}

/// The value of the header `Host`.
pub struct Host<'a>(pub &'a Address);

impl fmt::Display for Host<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let host = self.0.host.split('%').next().unwrap_or_default();
        if host.contains(':') { write!(f, "[{host}]:{}", self.0.port) } else { write!(f, "{host}:{}", self.0.port) }
    }
}

/// A socket that goes on waiting while an encryption is agreed on, until a token says no; then as any other.
struct Patient {
    stream: TcpStream,
    is_new: Arc<AtomicBool>,
    until: Cancel,
}

impl Patient {
    fn wait<T>(&self, mut act: impl FnMut() -> io::Result<T>) -> io::Result<T> {
        loop {
            match act() {
                Err(error) if is_timeout(&error) && self.is_new.load(Ordering::Acquire) => {
                    self.until.check("the encryption of the connection")?;
                }
                done => return done,
            }
        }
    }
}

impl Read for Patient {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.wait(|| (&self.stream).read(buffer))
    }
}

impl Write for Patient {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.wait(|| (&self.stream).write(bytes))
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Stream for Patient {
    fn another(&self) -> io::Result<Box<dyn Stream>> {
        let stream = self.stream.try_clone()?;
        Ok(Box::new(Self { stream, is_new: self.is_new.clone(), until: self.until.clone() }))
    }

    fn set_timeout(&self, timeout: Duration) -> io::Result<()> {
        Stream::set_timeout(&self.stream, timeout)
    }

    fn set_waiting(&self, waits: bool) -> io::Result<()> {
        self.stream.set_waiting(waits)
    }

    fn close(&self) {
        // It may be closed already.
        let _ = self.stream.shutdown(Shutdown::Both);
    }
}
