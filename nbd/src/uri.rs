//! Where an export is: `nbd://host:port/export`, `nbd+unix:///export?socket=/path`.
//!
//! Source: NetworkBlockDevice, `doc/uri.md`.

use std::fmt;
use std::io;
use std::net::{TcpStream, ToSocketAddrs};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::Duration;

use crate::Stream;

/// The port of the protocol.
const PORT: u16 = 10809;

/// Where a server is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Address {
    /// A socket of this machine.
    Unix(PathBuf),
    /// A host and a port.
    Tcp(String, u16),
}

/// A server and an export of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Uri {
    /// The server.
    pub address: Address,
    /// The export; often empty.
    pub export: String,
}

impl Address {
    /// Connects.
    pub(crate) fn connect(&self, timeout: Duration) -> io::Result<Box<dyn Stream>> {
        match self {
            Self::Unix(path) => Ok(Box::new(UnixStream::connect(path)?)),
            Self::Tcp(host, port) => {
                let mut failed = io::Error::new(io::ErrorKind::NotFound, "the name of the host is not known");
                for address in (host.as_str(), *port).to_socket_addrs()? {
                    match TcpStream::connect_timeout(&address, timeout) {
                        Ok(stream) => {
                            stream.set_nodelay(true)?;
                            return Ok(Box::new(stream));
                        }
                        Err(error) => failed = error,
                    }
                }
                Err(failed)
            }
        }
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unix(path) => write!(f, "'{}'", path.display()),
            Self::Tcp(host, port) => write!(f, "{host}:{port}"),
        }
    }
}

impl Uri {
    /// Reads an address; `None` if it is none of NBD at all.
    ///
    /// # Errors
    /// What is wrong with it, in a sentence.
    pub fn parse(text: &str) -> Option<Result<Self, String>> {
        if let Some(rest) = text.strip_prefix("nbd://") {
            return Some(
                Self::tcp(rest).ok_or_else(|| format!("'{text}' is no address: nbd://host:port/export was expected")),
            );
        }
        if let Some(rest) = text.strip_prefix("nbd+unix://") {
            let expected = || format!("'{text}' is no address: nbd+unix:///export?socket=/path was expected");
            return Some(Self::unix(rest).ok_or_else(expected));
        }
        let is_tls = ["nbds://", "nbds+unix://"].iter().any(|scheme| text.starts_with(scheme));
        is_tls.then(|| {
            Err(format!("'{text}' asks for encryption (TLS), which is not spoken yet: give an nbd:// address"))
        })
    }

    fn tcp(rest: &str) -> Option<Self> {
        let (server, export) = rest.split_once('/').unwrap_or((rest, ""));
        // IPv6 stands in brackets.
        let (host, port) = match server.strip_prefix('[') {
            Some(v6) => {
                let (host, port) = v6.split_once(']')?;
                (host, if port.is_empty() { None } else { Some(port.strip_prefix(':')?) })
            }
            None => server.split_once(':').map_or((server, None), |(host, port)| (host, Some(port))),
        };
        let port = port.map_or(Some(PORT), |port| port.parse().ok())?;
        let is_named = !host.is_empty() && !server.contains('@');
        is_named.then_some(())?;
        Some(Self { address: Address::Tcp(host.to_owned(), port), export: decoded(export)? })
    }

    fn unix(rest: &str) -> Option<Self> {
        let (path, query) = rest.split_once('?')?;
        let export = path.strip_prefix('/').unwrap_or(path);
        let socket = query.split('&').find_map(|part| part.strip_prefix("socket="))?;
        let socket = decoded(socket).filter(|socket| !socket.is_empty())?;
        Some(Self { address: Address::Unix(PathBuf::from(socket)), export: decoded(export)? })
    }
}

/// Replaces `%41`; `None` if what comes of it is no text.
fn decoded(text: &str) -> Option<String> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((byte, after)) = rest.split_first() {
        if *byte == b'%' {
            let (digits, after) = after.split_first_chunk::<2>()?;
            bytes.push(u8::from_str_radix(std::str::from_utf8(digits).ok()?, 16).ok()?);
            rest = after;
        } else {
            bytes.push(*byte);
            rest = after;
        }
    }
    String::from_utf8(bytes).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_read_as_the_specification_has_them() {
        let tcp = |host: &str, port| Address::Tcp(host.to_owned(), port);
        for (text, address, export) in [
            ("nbd://host", tcp("host", 10809), ""),
            ("nbd://host/", tcp("host", 10809), ""),
            ("nbd://host:10810/disk", tcp("host", 10810), "disk"),
            ("nbd://[2001:db8::1]:1/a%20b/c", tcp("2001:db8::1", 1), "a b/c"),
            ("nbd://[::1]", tcp("::1", 10809), ""),
            ("nbd+unix:///disk?socket=/run/a%3Fb.sock", Address::Unix("/run/a?b.sock".into()), "disk"),
            ("nbd+unix://?socket=/s", Address::Unix("/s".into()), ""),
        ] {
            assert_eq!(Uri::parse(text), Some(Ok(Uri { address, export: export.to_owned() })), "{text}");
        }
        for text in [
            "nbd://",
            "nbd://:1/x",
            "nbd://host:port/x",
            "nbd://host:99999/",
            "nbd://a@host/",
            "nbd://host/%4",
            "nbd://host/%ff",
            "nbd+unix:///x",
            "nbd+unix:///x?socket=",
            "nbds://host/",
        ] {
            assert!(matches!(Uri::parse(text), Some(Err(_))), "{text}");
        }
        assert_eq!(Uri::parse("/dev/nbd0"), None);
    }
}
