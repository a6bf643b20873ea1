//! What carries the bytes of a connection, both ways at once, and what encrypts it.

use std::fmt;
use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::unix::net::UnixStream;
use std::time::Duration;

/// A connection to a server, before the protocol begins.
pub trait Stream: Read + Write + Send + Sync {
    /// Returns another handle of the same connection: one is read from while the other is written to.
    ///
    /// # Errors
    /// What the system says.
    fn another(&self) -> io::Result<Box<dyn Stream>>;

    /// Sets how long a read or a write waits before it fails with [`io::ErrorKind::WouldBlock`] or
    /// [`io::ErrorKind::TimedOut`]. Not zero.
    ///
    /// # Errors
    /// What the system says.
    fn set_timeout(&self, timeout: Duration) -> io::Result<()>;

    /// Sets whether reads and writes wait at all; else they fail at once with [`io::ErrorKind::WouldBlock`]. It is so for all
    /// handles.
    ///
    /// # Errors
    /// What the system says.
    fn set_waiting(&self, waits: bool) -> io::Result<()>;

    /// Ends it, so that whoever reads from any handle sees its end.
    fn close(&self);
}

/// What encrypts a connection once the server has agreed to it (`NBD_OPT_STARTTLS`); nothing was read ahead by then.
pub trait Upgrade: fmt::Debug + Send + Sync {
    /// Does the handshake of the encryption, and verifies the server.
    ///
    /// # Errors
    /// Whatever makes it not certain that only the server meant reads what is sent.
    fn upgrade(&self, stream: Box<dyn Stream>) -> io::Result<Box<dyn Stream>>;
}

macro_rules! socket {
    ($kind:ty) => {
        impl Stream for $kind {
            fn another(&self) -> io::Result<Box<dyn Stream>> {
                Ok(Box::new(self.try_clone()?))
            }

            fn set_timeout(&self, timeout: Duration) -> io::Result<()> {
                self.set_read_timeout(Some(timeout))?;
                self.set_write_timeout(Some(timeout))
            }

            fn set_waiting(&self, waits: bool) -> io::Result<()> {
                self.set_nonblocking(!waits)
            }

            fn close(&self) {
                // It may be closed already.
                let _ = self.shutdown(Shutdown::Both);
            }
        }
    };
}

socket!(UnixStream);
socket!(TcpStream);
