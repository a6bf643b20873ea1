//! The NBD server of a host: one daemon that gives disks read-only, with the limits of the real one.
//!
//! - this module: connections, of which there are 16 at most, and what a server is asked to give
//! - `handshake`: fixed newstyle, without anything that came after it
//! - `transmission`: reads, one after the other
//!
//! It has no structured replies and no block status; clients that use those are tested against other servers.
//! Source: xen-api `ocaml/nbd/src/main.ml`; nbd `lib/server.ml`, `lib/protocol.ml`.

mod handshake;
mod transmission;

use std::collections::BTreeMap;
use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};

use rustls::{ServerConfig, ServerConnection, StreamOwned};
use uuid::Uuid;

use crate::content::Content;
use crate::layer::RUN_BYTES;

/// Connections at once; what comes then is closed without a byte.
pub const MAX_CONNECTIONS: usize = 16;

/// Whether connections are encrypted, which is decided for each one anew.
#[derive(Debug, Clone)]
pub enum Security {
    /// Nothing but TLS: some network is for `nbd`, none for `insecure_nbd`.
    Tls(Arc<ServerConfig>),
    /// Nothing but cleartext: the reverse.
    Cleartext,
    /// Both, or none: connections are closed without a byte.
    Refused,
}

/// What a server gives.
pub trait Exports: Send + Sync {
    /// Returns what a new connection is to be.
    fn security(&self) -> Security;

    /// Returns the disk that an export name means; `None` if the session or the VDI is not valid.
    fn open(&self, name: &str) -> Option<Export>;
}

/// Is called with the bytes of each piece of at most 512 KiB before they are sent, but after the reply to their request has
/// begun: may wait, and an error closes the connection.
pub type BeforePiece = Box<dyn FnMut(&Range<u64>) -> io::Result<()> + Send>;

/// A disk given to one connection.
pub struct Export {
    /// What is read.
    pub content: Content,
    /// Is dropped after the connection ended: removes the VBD of the control domain.
    pub guard: Box<dyn Send>,
    /// Is called before each piece.
    pub before: BeforePiece,
    /// Counts what was sent.
    pub served: Arc<Served>,
}

/// Counts the bytes that were sent of each run of 64 KiB of a disk.
#[derive(Debug, Default)]
pub struct Served(Mutex<BTreeMap<u64, u64>>);

impl Served {
    fn add(&self, bytes: &Range<u64>) {
        let mut runs = lock(&self.0);
        let mut at = bytes.start;
        while at < bytes.end {
            let end = (at + 1).next_multiple_of(RUN_BYTES as u64).min(bytes.end);
            *runs.entry(at / RUN_BYTES as u64).or_default() += end - at;
            at = end;
        }
    }

    /// Returns the bytes sent of each run of which any were, by its number.
    pub fn runs(&self) -> BTreeMap<u64, u64> {
        lock(&self.0).clone()
    }

    /// Returns all bytes sent.
    pub fn bytes(&self) -> u64 {
        lock(&self.0).values().sum()
    }
}

/// Takes an export name apart: `/<uuid of the VDI>?session_id=<reference>`.
pub fn parse_name(name: &str) -> Option<(Uuid, &str)> {
    let (uuid, session) = name.strip_prefix('/')?.split_once("?session_id=")?;
    Some((uuid.parse().ok()?, session))
}

/// A running server; stops, closes its connections and waits for their ends when it is dropped.
pub struct Server {
    address: SocketAddr,
    connections: Arc<Mutex<Connections>>,
    listener: Option<JoinHandle<()>>,
}

#[derive(Default)]
struct Connections {
    is_stopped: bool,
    next: u64,
    open: BTreeMap<u64, TcpStream>,
}

impl Server {
    /// Serves what comes to a socket.
    ///
    /// # Errors
    /// If the socket has no address, or there is no thread.
    pub fn start(listener: TcpListener, exports: Arc<dyn Exports>) -> io::Result<Self> {
        let address = listener.local_addr()?;
        let connections = Arc::new(Mutex::new(Connections::default()));
        let shared = connections.clone();
        let listener = thread::Builder::new().name("nbd".into()).spawn(move || listen(&listener, &shared, &exports))?;
        Ok(Self { address, connections, listener: Some(listener) })
    }

    /// Returns the address it serves at.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Returns how many connections there are.
    pub fn connections(&self) -> usize {
        lock(&self.connections).open.len()
    }

    /// Cuts all connections, as a restart of the daemon does.
    pub fn cut(&self) {
        for stream in lock(&self.connections).open.values() {
            // Fails if the other side was faster.
            let _ = stream.shutdown(Shutdown::Both);
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        lock(&self.connections).is_stopped = true;
        self.cut();
        // Wakes the listener; if nothing listens, it has ended.
        let _ = TcpStream::connect(self.address);
        if let Some(listener) = self.listener.take() {
            let _ = listener.join();
        }
    }
}

fn listen(listener: &TcpListener, connections: &Arc<Mutex<Connections>>, exports: &Arc<dyn Exports>) {
    thread::scope(|scope| {
        for stream in listener.incoming() {
            // Such errors are about one connection, or pass.
            let Ok(stream) = stream else { continue };
            let Ok(second) = stream.try_clone() else { continue };
            let number = {
                let mut connections = lock(connections);
                if connections.is_stopped {
                    break;
                }
                if connections.open.len() >= MAX_CONNECTIONS {
                    continue;
                }
                connections.next += 1;
                let number = connections.next;
                connections.open.insert(number, second);
                number
            };
            let (connections, exports) = (&**connections, &**exports);
            scope.spawn(move || {
                // How it ended, the other side knows.
                let _ = serve(stream, exports);
                lock(connections).open.remove(&number);
            });
        }
    });
}

/// Serves one connection to its end.
fn serve(stream: TcpStream, exports: &dyn Exports) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let Some((mut connection, mut export)) = handshake::greet(stream, exports)? else { return Ok(()) };
    let served = transmission::serve(&mut connection, &mut export);
    connection.close();
    served
}

/// A connection, before or after TLS began.
enum Connection {
    Cleartext(TcpStream),
    Tls(Box<StreamOwned<ServerConnection, TcpStream>>),
}

impl Connection {
    /// Ends it, so that the other side knows before the VBD is removed. What fails ended already.
    fn close(self) {
        let socket = match self {
            Self::Cleartext(stream) => stream,
            Self::Tls(mut stream) => {
                stream.conn.send_close_notify();
                let _ = stream.flush();
                stream.sock
            }
        };
        let _ = socket.shutdown(Shutdown::Both);
    }
}

impl Read for Connection {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Cleartext(stream) => stream.read(buffer),
            Self::Tls(stream) => stream.read(buffer),
        }
    }
}

impl Write for Connection {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Self::Cleartext(stream) => stream.write(bytes),
            Self::Tls(stream) => stream.write(bytes),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        match self {
            Self::Cleartext(stream) => stream.flush(),
            Self::Tls(stream) => stream.flush(),
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
