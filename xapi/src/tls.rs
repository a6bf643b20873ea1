//! An encrypted connection (TLS 1.2 or 1.3) that is read by one thread while it is written to by another.
//!
//! ```text
//! read  ─► receiving: bytes of the socket ─┐                       ┌─ sending: records on their way ◄─ write
//!                                          └─► state (rustls) ◄────┘
//! ```
//!
//! rustls decrypts where the bytes of the socket are ([`UnbufferedClientConnection`]): its other interface takes them 4 KiB at a time
//! into a buffer of its own, and keeps what it decrypts in another.
//!
//! Locks: `receiving` or `sending`, then `state`. The first two belong to who reads and who writes, and are held while the
//! socket is waited for; `state` is held only while bytes are encrypted or decrypted, so neither waits for the other's
//! network. What TLS itself answers while data is read (new keys) goes out at once if nobody is writing, else with what is
//! written next.

use std::fmt;
use std::io::{self, Read, Write};
use std::mem;
use std::net::{IpAddr, Ipv4Addr};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError};
use std::time::{Duration, Instant};

use nbd::{Stream, Upgrade};
use rustls::client::{ClientConnectionData, UnbufferedClientConnection};
use rustls::pki_types::ServerName;
use rustls::unbuffered::{
    ConnectionState, EncodeError, EncryptError, InsufficientSizeError, UnbufferedStatus, WriteTraffic,
};
use rustls::{CertificateError, ClientConfig};

use crate::trust::{Fingerprint, Trust, Untrusted};

/// How much is taken from the socket at once (bytes): 16 records.
const ARRIVING: usize = 256 << 10;
/// How much is encrypted before it is sent (bytes): 16 records.
const DEPARTING: usize = 256 << 10;
/// Most bytes of one record, and by how many more it is longer when it is encrypted, at most.
const RECORD: usize = 16 << 10;
const OVERHEAD: usize = 64;
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
    state: Mutex<State>,
    receiving: Mutex<Receiving>,
    sending: Mutex<Sending>,
    /// Sets timeouts and ends the connection, both of which wait for nobody.
    socket: Box<dyn Stream>,
    is_closed: AtomicBool,
    fingerprint: Fingerprint,
}

struct State {
    connection: UnbufferedClientConnection,
    /// What is to be sent, in the order in which it was encrypted.
    records: Vec<u8>,
    /// What came and is not decrypted, where rustls waits for more of it: it may have begun with that, and wants to see it again also
    /// when something is to be encrypted. Nothing, if the last that it took were bytes for the reader, which end what it has begun.
    held: Vec<u8>,
    /// Whether the server said farewell: there is nothing more to decrypt.
    is_over: bool,
    /// Why nothing more can be decrypted; told to each who reads or writes.
    broken: Option<rustls::Error>,
}

/// What became of bytes that came.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Step {
    /// Some were taken, or something is to be sent.
    On,
    /// More have to come.
    Waits,
}

struct Receiving {
    socket: Box<dyn Stream>,
    arrived: Vec<u8>,
    /// What of it is not decrypted yet.
    start: usize,
    end: usize,
    /// What was decrypted, and where it begins that was not read yet: of a record of which only a part was asked for.
    plain: Vec<u8>,
    read: usize,
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
        let connection = UnbufferedClientConnection::new(self.config.clone(), self.name.clone()).map_err(of_tls)?;
        let mut state = State { connection, records: Vec::new(), held: Vec::new(), is_over: false, broken: None };
        let mut receiving = Receiving {
            socket: socket.another()?,
            arrived: vec![0; ARRIVING],
            start: 0,
            end: 0,
            plain: Vec::new(),
            read: 0,
        };
        let mut sending = Sending { socket: socket.another()?, records: Vec::new(), sent: 0 };
        let since = Instant::now();
        loop {
            let step = receiving.decrypt(&mut state, &mut []);
            sending.take(&mut state);
            let pushed = sending.push();
            match step {
                // The alert has told the server why; it may have gone. What is wrong behind the handshake is told to who reads it.
                Err(error) if state.connection.is_handshaking() => return Err(of_tls(error)),
                _ => pushed?,
            }
            if !state.connection.is_handshaking() {
                break;
            }
            if since.elapsed() > HANDSHAKE {
                let reason = format!("the TLS handshake is not done after {} s", HANDSHAKE.as_secs());
                return Err(io::Error::new(io::ErrorKind::TimedOut, reason));
            }
            if receiving.receive()? == 0 {
                let reason = "the server closed the connection in the TLS handshake";
                return Err(io::Error::new(io::ErrorKind::UnexpectedEof, reason));
            }
        }
        let leaf = state.connection.peer_certificates().and_then(<[_]>::first);
        let fingerprint = leaf.map(|leaf| Fingerprint::of(leaf)).ok_or_else(|| {
            io::Error::new(io::ErrorKind::InvalidData, "the server has no certificate, which TLS wants here")
        })?;
        let shared = Shared {
            state: Mutex::new(state),
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
            let is_answering = !state.records.is_empty();
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
        sending.take(&mut lock(&self.state));
        let _ = sending.push();
    }

    fn write(&self, bytes: &[u8]) -> io::Result<usize> {
        let mut sending = lock(&self.sending);
        sending.push()?;
        let taken = bytes.len().min(DEPARTING);
        {
            let mut state = lock(&self.state);
            state.encrypt(&bytes[..taken])?;
            sending.take(&mut state);
        }
        match sending.push() {
            // They are kept, so they are written.
            Err(error) if taken > 0 && is_timeout(&error) => Ok(taken),
            pushed => pushed.map(|()| taken),
        }
    }

    fn flush(&self) -> io::Result<()> {
        let mut sending = lock(&self.sending);
        sending.take(&mut lock(&self.state));
        sending.push()?;
        sending.socket.flush()
    }

    fn close(&self) {
        if !self.is_closed.swap(true, Ordering::AcqRel) {
            // Nobody waits for a server that does not take it, nor for who is writing.
            if let (Ok(mut sending), Ok(())) = (self.sending.try_lock(), self.socket.set_timeout(FAREWELL)) {
                let mut state = lock(&self.state);
                let said = state.say_farewell();
                sending.take(&mut state);
                drop(state);
                let _ = said.and_then(|()| sending.push());
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

impl State {
    /// Decrypts a piece of what came, from its beginning, and gives it to `take`. Returns how many of the bytes are done with.
    fn step(&mut self, arrived: &mut [u8], mut take: impl FnMut(&[u8])) -> (usize, Result<Step, rustls::Error>) {
        let UnbufferedStatus { mut discard, state } = self.connection.process_tls_records(arrived);
        let step = match state {
            Err(error) => Err(error),
            Ok(ConnectionState::ReadTraffic(mut traffic)) => loop {
                match traffic.next_record() {
                    Some(Ok(record)) => {
                        discard += record.discard;
                        take(record.payload);
                    }
                    Some(Err(error)) => break Err(error),
                    None => break Ok(Step::On),
                }
            },
            Ok(ConnectionState::EncodeTlsData(mut answer)) => {
                let encoded = append(&mut self.records, 0, |space| match answer.encode(space) {
                    Err(EncodeError::InsufficientSize(more)) => Err(Some(more)),
                    other => other.map_err(|_| None),
                });
                encoded.map(|()| Step::On)
            }
            // It goes out with all others.
            Ok(ConnectionState::TransmitTlsData(answer)) => {
                answer.done();
                Ok(Step::On)
            }
            Ok(ConnectionState::PeerClosed) => {
                self.is_over = true;
                Ok(Step::On)
            }
            Ok(_) => Ok(Step::Waits),
        };
        (discard, step)
    }

    /// Encrypts something, after what TLS itself has to say; nothing, if the connection is over.
    fn say(
        &mut self,
        room: usize,
        mut encrypt: impl FnMut(&mut WriteTraffic<'_, ClientConnectionData>, &mut [u8]) -> Result<usize, EncryptError>,
    ) -> io::Result<bool> {
        if let Some(broken) = &self.broken {
            return Err(of_tls(broken.clone()));
        }
        let mut held = mem::take(&mut self.held);
        let answered = loop {
            match self.step(&mut held, |_| ()).1 {
                Ok(Step::On) => {}
                answered => break answered,
            }
        };
        let said = answered.and_then(|_| match self.connection.process_tls_records(&mut held).state? {
            ConnectionState::WriteTraffic(mut traffic) => {
                let said = append(&mut self.records, room, |space| match encrypt(&mut traffic, space) {
                    Err(EncryptError::InsufficientSize(more)) => Err(Some(more)),
                    other => other.map_err(|_| None),
                });
                said.map(|()| true)
            }
            _ => Ok(false),
        });
        self.held = held;
        said.map_err(of_tls)
    }

    fn encrypt(&mut self, bytes: &[u8]) -> io::Result<()> {
        let room = bytes.len() + (bytes.len() / RECORD + 1) * OVERHEAD;
        let is_open = self.say(room, |traffic, space| traffic.encrypt(bytes, space))?;
        if is_open { Ok(()) } else { Err(io::ErrorKind::BrokenPipe.into()) }
    }

    fn say_farewell(&mut self) -> io::Result<()> {
        self.say(OVERHEAD, |traffic, space| traffic.queue_close_notify(space)).map(drop)
    }
}

impl Receiving {
    /// Decrypts what has come until `buffer` is full; `None` if that is nothing.
    fn read(&mut self, state: &mut State, buffer: &mut [u8]) -> io::Result<Option<usize>> {
        match self.decrypt(state, buffer) {
            Ok(0) => Ok(state.is_over.then_some(0)),
            Ok(read) => Ok(Some(read)),
            Err(error) => Err(of_tls(error)),
        }
    }

    /// Decrypts what has come until `buffer` is full, or all of it where that has no room; returns how many bytes there are. What is
    /// wrong is told once all before it is read.
    fn decrypt(&mut self, state: &mut State, buffer: &mut [u8]) -> Result<usize, rustls::Error> {
        let Self { arrived, start, end, plain, read, .. } = self;
        let mut filled = buffer.len().min(plain.len() - *read);
        buffer[..filled].copy_from_slice(&plain[*read..][..filled]);
        *read += filled;
        if *read == plain.len() {
            *read = 0;
            plain.clear();
        }
        while (filled < buffer.len() || buffer.is_empty()) && state.broken.is_none() && !state.is_over {
            let (done, step) = state.step(&mut arrived[*start..*end], |record| {
                let (fits, rest) = record.split_at(record.len().min(buffer.len() - filled));
                buffer[filled..][..fits.len()].copy_from_slice(fits);
                filled += fits.len();
                plain.extend_from_slice(rest);
            });
            *start += done;
            state.held.clear();
            match step {
                Ok(Step::On) => {}
                Ok(Step::Waits) => {
                    state.held.extend_from_slice(&arrived[*start..*end]);
                    break;
                }
                Err(error) => {
                    // The alert, and nothing that came.
                    while state.connection.wants_write() && state.step(&mut arrived[*start..*end], |_| ()).1.is_ok() {}
                    state.broken = Some(error);
                }
            }
        }
        match &state.broken {
            Some(error) if filled == 0 => Err(error.clone()),
            _ => Ok(filled),
        }
    }

    /// Waits for more of the socket, once all that came is decrypted but the beginning of a record. Returns 0 at its end.
    fn receive(&mut self) -> io::Result<usize> {
        self.arrived.copy_within(self.start..self.end, 0);
        (self.start, self.end) = (0, self.end - self.start);
        if self.end == self.arrived.len() {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "TLS: a message longer than any"));
        }
        let read = loop {
            match self.socket.read(&mut self.arrived[self.end..]) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                read => break read?,
            }
        };
        self.end += read;
        Ok(read)
    }
}

impl Sending {
    /// Takes the records that are to be sent.
    fn take(&mut self, state: &mut State) {
        self.records.append(&mut state.records);
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

/// Adds what is encoded to records: it takes `room` or what it says that it needs (bytes).
fn append(
    records: &mut Vec<u8>,
    room: usize,
    mut encode: impl FnMut(&mut [u8]) -> Result<usize, Option<InsufficientSizeError>>,
) -> Result<(), rustls::Error> {
    let len = records.len();
    records.resize(len + room, 0);
    let encoded = match encode(&mut records[len..]) {
        Err(Some(InsufficientSizeError { required_size })) => {
            records.resize(len + required_size, 0);
            encode(&mut records[len..])
        }
        encoded => encoded,
    };
    records.truncate(len + encoded.as_ref().map_or(0, |encoded| *encoded));
    encoded.map(|_| ()).map_err(|_| rustls::Error::EncryptError)
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
