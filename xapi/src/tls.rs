//! An encrypted connection (TLS 1.2 or 1.3) that is read by one thread while it is written to by another.
//!
//! ```text
//! read  ─► receiving: bytes of the socket ─┐                       ┌─ sending: records on their way ◄─ write
//!                                          └─► state (rustls) ◄────┘
//! ```
//!
//! Locks: `receiving` or `sending`, then `state`. The first two belong to who reads and who writes, and are held while the
//! socket is waited for; `state` is held only while bytes are encrypted or decrypted, so neither waits for the other's
//! network. What TLS itself answers while data is read (new keys) goes out at once if nobody is writing, else with what is
//! written next.

use std::fmt;
use std::io::{self, Read, Write};
use std::net::{IpAddr, Ipv4Addr};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError};
use std::time::{Duration, Instant};

use nbd::{Stream, Upgrade};
use rustls::pki_types::ServerName;
use rustls::{CertificateError, ClientConfig, ClientConnection};

use crate::trust::{Fingerprint, Trust, Untrusted};

/// How much is taken from the socket at once (bytes): 16 records.
const ARRIVING: usize = 256 << 10;
/// How much is encrypted before it is sent (bytes): 16 records.
const DEPARTING: usize = 256 << 10;
/// How long a handshake may take however fast its parts come.
const HANDSHAKE: Duration = Duration::from_secs(60);
/// How long the farewell of a connection may take.
const FAREWELL: Duration = Duration::from_millis(100);

/// What makes encrypted connections to one server.
#[derive(Clone)]
pub struct Tls {
    config: Arc<ClientConfig>,
    name: ServerName<'static>,
}

/// A connection that is encrypted; handles of it share all.
pub struct TlsStream {
    shared: Arc<Shared>,
}

struct Shared {
    state: Mutex<ClientConnection>,
    receiving: Mutex<Receiving>,
    sending: Mutex<Sending>,
    /// Sets timeouts and ends the connection, both of which wait for nobody.
    socket: Box<dyn Stream>,
    is_closed: AtomicBool,
    fingerprint: Fingerprint,
}

struct Receiving {
    socket: Box<dyn Stream>,
    arrived: Vec<u8>,
    /// What of it is not decrypted yet.
    start: usize,
    end: usize,
    /// Why nothing more can be decrypted; told to each who reads.
    broken: Option<rustls::Error>,
}

struct Sending {
    socket: Box<dyn Stream>,
    records: Vec<u8>,
    /// How many bytes of them are with the system.
    sent: usize,
}

impl Tls {
    /// Makes what connects to the server `host` (a name or an address), of which `trust` says who it is.
    ///
    /// # Errors
    /// [`Untrusted`] if a text of `trust` is no certificate, or an authority cannot be asked about `host`.
    pub fn new(trust: &Trust, host: &str) -> Result<Self, Untrusted> {
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let verifier = trust.verifier(provider.clone())?;
        let bare = host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host);
        let name = match (ServerName::try_from(bare.to_owned()), trust) {
            (Ok(name), _) => name,
            (Err(_), Trust::Authority(_)) => return Err(Untrusted::nameless(bare)),
            // The name plays no role; an address is not told to the server.
            (Err(_), _) => ServerName::from(IpAddr::V4(Ipv4Addr::UNSPECIFIED)),
        };
        let config = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .expect("the provider has suites for TLS 1.2 and 1.3")
            .dangerous()
            .with_custom_certificate_verifier(verifier)
            .with_no_client_auth();
        Ok(Self { config: Arc::new(config), name })
    }

    /// Does the handshake over a stream that is connected to the server. Each wait ends by the timeout of the stream.
    ///
    /// # Errors
    /// One with an [`Untrusted`] inside if it is another server; [`io::ErrorKind::InvalidData`] if it does not keep to TLS;
    /// else what the stream says.
    pub fn connect(&self, socket: Box<dyn Stream>) -> io::Result<TlsStream> {
        let mut connection = ClientConnection::new(self.config.clone(), self.name.clone()).map_err(of_tls)?;
        // A batch is encrypted at once and taken out at once.
        connection.set_buffer_limit(None);
        let mut receiving =
            Receiving { socket: socket.another()?, arrived: vec![0; ARRIVING], start: 0, end: 0, broken: None };
        let mut sending = Sending { socket: socket.another()?, records: Vec::new(), sent: 0 };
        let since = Instant::now();
        loop {
            sending.take(&mut connection)?;
            sending.push()?;
            if !connection.is_handshaking() {
                break;
            }
            if since.elapsed() > HANDSHAKE {
                let reason = format!("the TLS handshake is not done after {} s", HANDSHAKE.as_secs());
                return Err(io::Error::new(io::ErrorKind::TimedOut, reason));
            }
            if receiving.start == receiving.end && receiving.receive()? == 0 {
                let reason = "the server closed the connection in the TLS handshake";
                return Err(io::Error::new(io::ErrorKind::UnexpectedEof, reason));
            }
            if let Err(error) = receiving.decrypt(&mut connection) {
                // The alert tells the server why; it may have gone.
                let _ = sending.take(&mut connection).and_then(|()| sending.push());
                return Err(error);
            }
        }
        let leaf = connection.peer_certificates().and_then(<[_]>::first);
        let fingerprint = leaf.map(|leaf| Fingerprint::of(leaf)).ok_or_else(|| {
            io::Error::new(io::ErrorKind::InvalidData, "the server has no certificate, which TLS wants here")
        })?;
        let shared = Shared {
            state: Mutex::new(connection),
            receiving: Mutex::new(receiving),
            sending: Mutex::new(sending),
            socket,
            is_closed: AtomicBool::new(false),
            fingerprint,
        };
        Ok(TlsStream { shared: Arc::new(shared) })
    }
}

impl fmt::Debug for Tls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tls").field("name", &self.name).finish_non_exhaustive()
    }
}

impl Upgrade for Tls {
    fn upgrade(&self, stream: Box<dyn Stream>) -> io::Result<Box<dyn Stream>> {
        Ok(Box::new(self.connect(stream)?))
    }
}

impl TlsStream {
    /// Returns the fingerprint of the server's certificate.
    #[must_use]
    pub fn fingerprint(&self) -> Fingerprint {
        self.shared.fingerprint
    }
}

impl Read for TlsStream {
    /// Returns 0 at an end that the server has announced (or that is ours). A connection that ends otherwise may have
    /// been cut off by anybody: [`io::ErrorKind::UnexpectedEof`], which is an end only for who can prove that nothing is
    /// missing. After a timeout reading goes on where it was.
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.shared.read(buffer)
    }
}

impl Write for TlsStream {
    /// Takes all or a part of `bytes`. What was taken and is not sent when the time is over stays, and is sent by the next
    /// write or flush.
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.shared.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.shared.flush()
    }
}

impl Stream for TlsStream {
    fn another(&self) -> io::Result<Box<dyn Stream>> {
        Ok(Box::new(Self { shared: self.shared.clone() }))
    }

    fn set_timeout(&self, timeout: Duration) -> io::Result<()> {
        self.shared.socket.set_timeout(timeout)
    }

    fn set_waiting(&self, waits: bool) -> io::Result<()> {
        self.shared.socket.set_waiting(waits)
    }

    fn close(&self) {
        self.shared.close();
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Shared {
    fn read(&self, buffer: &mut [u8]) -> io::Result<usize> {
        if buffer.is_empty() {
            return Ok(0);
        }
        let mut receiving = lock(&self.receiving);
        loop {
            let mut state = lock(&self.state);
            let read = receiving.read(&mut state, buffer);
            let is_answering = state.wants_write();
            drop(state);
            if is_answering {
                self.answer();
            }
            if let Some(read) = read? {
                return Ok(read);
            }
            if receiving.receive()? == 0 {
                if self.is_closed.load(Ordering::Acquire) {
                    return Ok(0);
                }
                let reason = "the connection ended without the farewell of TLS: what came may be cut off";
                return Err(io::Error::new(io::ErrorKind::UnexpectedEof, reason));
            }
        }
    }

    /// Sends what TLS has to say, unless a writer is at it.
    fn answer(&self) {
        let mut sending = match self.sending.try_lock() {
            Ok(sending) => sending,
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
            Err(TryLockError::WouldBlock) => return,
        };
        // An error shows where something is read or written.
        let _ = sending.take(&mut lock(&self.state)).and_then(|()| sending.push());
    }

    fn write(&self, bytes: &[u8]) -> io::Result<usize> {
        let mut sending = lock(&self.sending);
        sending.push()?;
        let taken = {
            let mut state = lock(&self.state);
            let taken = state.writer().write(&bytes[..bytes.len().min(DEPARTING)])?;
            sending.take(&mut state)?;
            taken
        };
        match sending.push() {
            // They are kept, so they are written.
            Err(error) if taken > 0 && is_timeout(&error) => Ok(taken),
            pushed => pushed.map(|()| taken),
        }
    }

    fn flush(&self) -> io::Result<()> {
        let mut sending = lock(&self.sending);
        sending.take(&mut lock(&self.state))?;
        sending.push()?;
        sending.socket.flush()
    }

    fn close(&self) {
        if !self.is_closed.swap(true, Ordering::AcqRel) {
            // Nobody waits for a server that does not take it, nor for who is writing.
            if let (Ok(mut sending), Ok(())) = (self.sending.try_lock(), self.socket.set_timeout(FAREWELL)) {
                let mut state = lock(&self.state);
                state.send_close_notify();
                let taken = sending.take(&mut state);
                drop(state);
                let _ = taken.and_then(|()| sending.push());
            }
        }
        self.socket.close();
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        self.close();
    }
}

impl Receiving {
    /// Decrypts what has come until `buffer` is full; `None` if that is nothing.
    fn read(&mut self, state: &mut ClientConnection, buffer: &mut [u8]) -> io::Result<Option<usize>> {
        let mut read = 0;
        while read < buffer.len() {
            match state.reader().read(&mut buffer[read..]) {
                // The server said farewell.
                Ok(0) => return Ok(Some(read)),
                Ok(more) => read += more,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    if self.start == self.end && self.broken.is_none() {
                        break;
                    }
                    match self.decrypt(state) {
                        // Told at the next read; the first bytes are right.
                        Err(_) if read > 0 => return Ok(Some(read)),
                        decrypted => decrypted?,
                    }
                }
                Err(error) => return Err(error),
            }
        }
        Ok((read > 0).then_some(read))
    }

    /// Gives rustls some of what has come, once it has no more bytes for the reader.
    fn decrypt(&mut self, state: &mut ClientConnection) -> io::Result<()> {
        if self.broken.is_none() {
            self.start += state.read_tls(&mut &self.arrived[self.start..self.end])?;
            self.broken = state.process_new_packets().err();
        }
        self.broken.clone().map_or(Ok(()), |error| Err(of_tls(error)))
    }

    /// Waits for more of the socket, once all that came is decrypted. Returns 0 at its end.
    fn receive(&mut self) -> io::Result<usize> {
        let read = loop {
            match self.socket.read(&mut self.arrived) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                read => break read?,
            }
        };
        (self.start, self.end) = (0, read);
        Ok(read)
    }
}

impl Sending {
    /// Takes the records that are to be sent.
    fn take(&mut self, state: &mut ClientConnection) -> io::Result<()> {
        while state.wants_write() {
            state.write_tls(&mut self.records)?;
        }
        Ok(())
    }

    /// Sends them all; what is not sent stays.
    fn push(&mut self) -> io::Result<()> {
        while self.sent < self.records.len() {
            match self.socket.write(&self.records[self.sent..]) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(written) => self.sent += written,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        self.records.clear();
        self.sent = 0;
        Ok(())
    }
}

fn is_timeout(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut)
}

fn of_tls(error: rustls::Error) -> io::Error {
    if let rustls::Error::InvalidCertificate(CertificateError::Other(other)) = &error
        && let Some(untrusted) = other.0.downcast_ref::<Untrusted>()
    {
        return io::Error::new(io::ErrorKind::InvalidData, untrusted.clone());
    }
    io::Error::new(io::ErrorKind::InvalidData, format!("TLS: {error}"))
}
