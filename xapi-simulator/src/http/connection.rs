//! Bytes of a connection, in the clear or by TLS, and how it ends.

use rustls::{ServerConfig, ServerConnection, StreamOwned};
use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How long what a client still sends is taken after the last byte of an answer, so that it sees the answer.
const LINGER: Duration = Duration::from_secs(1);

enum Channel {
    Plain(TcpStream),
    Tls(Box<StreamOwned<ServerConnection, TcpStream>>),
}

/// A connection.
pub struct Connection {
    channel: Channel,
    /// What was read too far.
    ahead: Vec<u8>,
}

impl Connection {
    /// Takes over a socket.
    ///
    /// # Errors
    /// If there can be no TLS.
    pub fn new(stream: TcpStream, tls: Option<Arc<ServerConfig>>) -> io::Result<Connection> {
        stream.set_nodelay(true)?;
        let channel = match tls {
            None => Channel::Plain(stream),
            Some(config) => {
                let server = ServerConnection::new(config).map_err(io::Error::other)?;
                Channel::Tls(Box::new(StreamOwned::new(server, stream)))
            }
        };
        Ok(Connection { channel, ahead: Vec::new() })
    }

    /// Sets how long a read may take.
    ///
    /// # Errors
    /// Of the socket.
    pub fn set_read_timeout(&self, timeout: Option<Duration>) -> io::Result<()> {
        self.socket().set_read_timeout(timeout)
    }

    /// Gives back bytes that belong to what comes next.
    pub fn unread(&mut self, bytes: &[u8]) {
        self.ahead.splice(0..0, bytes.iter().copied());
    }

    /// Returns what sees whether the client has gone.
    ///
    /// # Errors
    /// Of the socket.
    pub fn watch(&self) -> io::Result<Watch> {
        Ok(Watch { socket: self.socket().try_clone()?, is_tls: matches!(self.channel, Channel::Tls(_)) })
    }

    /// Ends the connection after all that was written.
    ///
    /// # Errors
    /// Of the socket.
    pub fn close(mut self) -> io::Result<()> {
        if let Channel::Tls(stream) = &mut self.channel {
            stream.conn.send_close_notify();
        }
        self.flush()?;
        self.socket().shutdown(Shutdown::Write)?;
        // Closing with bytes unread would reset the connection, and the answer could be lost.
        let deadline = Instant::now() + LINGER;
        let mut socket = match &self.channel {
            Channel::Plain(stream) => stream,
            Channel::Tls(stream) => &stream.sock,
        };
        let mut dropped = [0; 16 << 10];
        while let Some(left) = deadline.checked_duration_since(Instant::now()).filter(|left| !left.is_zero()) {
            socket.set_read_timeout(Some(left))?;
            if socket.read(&mut dropped)? == 0 {
                break;
            }
        }
        Ok(())
    }

    /// Ends the connection at once.
    ///
    /// # Errors
    /// Of the socket.
    pub fn cut(self) -> io::Result<()> {
        self.socket().shutdown(Shutdown::Both)
    }

    fn socket(&self) -> &TcpStream {
        match &self.channel {
            Channel::Plain(stream) => stream,
            Channel::Tls(stream) => &stream.sock,
        }
    }
}

/// Sees whether a client has gone that is sent something and has nothing to say.
#[derive(Debug)]
pub struct Watch {
    socket: TcpStream,
    is_tls: bool,
}

impl Watch {
    /// Returns whether it has gone. Is to be asked by the thread that uses the connection.
    pub fn is_deserted(&self) -> bool {
        if self.socket.set_nonblocking(true).is_err() {
            return true;
        }
        let is_gone = match self.socket.peek(&mut [0]) {
            Ok(0) => true,
            // The end of TLS is a message.
            Ok(_) => self.is_tls,
            Err(error) => error.kind() != io::ErrorKind::WouldBlock,
        };
        self.socket.set_nonblocking(false).is_err() || is_gone
    }
}

impl Read for Connection {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if !self.ahead.is_empty() {
            let length = self.ahead.len().min(buffer.len());
            buffer[..length].copy_from_slice(&self.ahead[..length]);
            self.ahead.drain(..length);
            return Ok(length);
        }
        match &mut self.channel {
            Channel::Plain(stream) => stream.read(buffer),
            Channel::Tls(stream) => stream.read(buffer),
        }
    }
}

impl Write for Connection {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match &mut self.channel {
            Channel::Plain(stream) => stream.write(bytes),
            Channel::Tls(stream) => stream.write(bytes),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        match &mut self.channel {
            Channel::Plain(stream) => stream.flush(),
            Channel::Tls(stream) => stream.flush(),
        }
    }
}
