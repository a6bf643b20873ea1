//! Where a host is: `https://host`, `http://host:port`, `[::1]:443`, or a bare name.

use std::fmt;
use std::io;
use std::net::{Ipv6Addr, TcpStream, ToSocketAddrs};
use std::str::FromStr;
use std::sync::mpsc::{RecvTimeoutError, sync_channel};
use std::thread;
use std::time::Duration;

use crate::cancel::TICK;
use crate::{Cancel, Error, ErrorKind, Result};

/// How long one of a host's addresses may take to accept a connection.
const CONNECT: Duration = Duration::from_secs(20);
/// Most addresses of one name that are tried.
const TRIED: usize = 8;

/// The address of a host's HTTP server.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Address {
    /// Whether it is encrypted (TLS).
    pub is_encrypted: bool,
    /// A name, an IPv4 address, or an IPv6 address without brackets.
    pub host: String,
    /// 443 or 80 where nothing else is said.
    pub port: u16,
}

impl Address {
    /// Returns the address of another host of the pool, as XAPI says it (an IP address or a name, IPv6 without brackets): with
    /// the scheme and the port of this one.
    ///
    /// # Errors
    /// [`ErrorKind::OutOfRange`] if that is no host.
    pub fn of_host(&self, host: &str) -> Result<Self> {
        let host = host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host);
        check_host(host)?;
        Ok(Self { host: host.to_owned(), ..self.clone() })
    }

    /// Connects to it by TCP.
    ///
    /// Names are looked up and connections made by system calls that nothing ends: a thread does that, which is left alone
    /// when the token says so.
    pub(crate) fn connect(&self, cancel: &Cancel) -> Result<TcpStream> {
        let unreachable = |reason: &dyn fmt::Display| {
            Error::new(ErrorKind::Unreachable, self, format!("it cannot be reached: {reason}"))
        };
        let (done, connected) = sync_channel(1);
        let (host, port) = (self.host.clone(), self.port);
        let connect = move || {
            // Who waited may have gone.
            let _ = done.send(connect(&host, port));
        };
        thread::Builder::new().name("xapi-connect".to_owned()).spawn(connect).map_err(|error| unreachable(&error))?;
        loop {
            match connected.recv_timeout(TICK) {
                Ok(connected) => return connected.map_err(|error| unreachable(&error)),
                Err(RecvTimeoutError::Timeout) => cancel.check(self)?,
                Err(RecvTimeoutError::Disconnected) => return Err(unreachable(&"the thread for it failed")),
            }
        }
    }
}

fn connect(host: &str, port: u16) -> io::Result<TcpStream> {
    let mut last = io::Error::new(io::ErrorKind::NotFound, "its name has no address");
    for found in (host, port).to_socket_addrs()?.take(TRIED) {
        match TcpStream::connect_timeout(&found, CONNECT) {
            Ok(stream) => return stream.set_nodelay(true).map(|()| stream),
            Err(error) => last = error,
        }
    }
    Err(last)
}

/// Whether an error of the system says that the time was over.
pub(crate) fn is_timeout(error: &std::io::Error) -> bool {
    matches!(error.kind(), std::io::ErrorKind::WouldBlock | std::io::ErrorKind::TimedOut)
}

fn check_host(host: &str) -> Result<()> {
    let is_name = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'-' | b'_');
    // An IPv6 address may name its interface.
    let address = host.split_once('%').map_or(host, |(address, _)| address);
    let is_right =
        !host.is_empty() && host.len() <= 255 && host.bytes().all(is_name) || address.parse::<Ipv6Addr>().is_ok();
    if is_right {
        return Ok(());
    }
    let shown = crate::error::quoted(host);
    Err(Error::new(ErrorKind::OutOfRange, format!("'{shown}'"), "this is no name and no IP address of a host"))
}

impl FromStr for Address {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let (is_encrypted, rest) = match text.split_once("://") {
            Some((scheme, rest)) if scheme.eq_ignore_ascii_case("https") => (true, rest),
            Some((scheme, rest)) if scheme.eq_ignore_ascii_case("http") => (false, rest),
            Some(_) => {
                let shown = crate::error::quoted(text);
                return Err(Error::new(ErrorKind::OutOfRange, format!("'{shown}'"), "'https://' was expected"));
            }
            None => (true, text),
        };
        let rest = rest.strip_suffix('/').unwrap_or(rest);
        let (host, port) = if let Some(bracketed) = rest.strip_prefix('[') {
            match bracketed.split_once(']') {
                Some((host, "")) => (host, None),
                Some((host, port)) => (host, Some(port.strip_prefix(':').unwrap_or("none"))),
                None => (rest, None),
            }
        } else if rest.bytes().filter(|byte| *byte == b':').count() > 1 {
            (rest, None)
        } else {
            rest.split_once(':').map_or((rest, None), |(host, port)| (host, Some(port)))
        };
        check_host(host)?;
        let default = if is_encrypted { 443 } else { 80 };
        let port = match port {
            None => default,
            Some(port) => port.parse().ok().filter(|port| *port != 0).ok_or_else(|| {
                Error::new(ErrorKind::OutOfRange, format!("'{}'", crate::error::quoted(text)), "a port is 1 to 65535")
            })?,
        };
        Ok(Self { is_encrypted, host: host.to_owned(), port })
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (scheme, default) = if self.is_encrypted { ("https", 443) } else { ("http", 80) };
        write!(f, "{scheme}://")?;
        if self.host.contains(':') {
            write!(f, "[{}]", self.host)?
        } else {
            f.write_str(&self.host)?
        }
        if self.port == default { Ok(()) } else { write!(f, ":{}", self.port) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_read_as_people_write_them_and_shown_in_one_way() {
        for (text, shown) in [
            ("xen1", "https://xen1"),
            ("https://xen1/", "https://xen1"),
            ("http://10.0.0.1", "http://10.0.0.1"),
            ("10.0.0.1:8443", "https://10.0.0.1:8443"),
            ("http://10.0.0.1:80", "http://10.0.0.1"),
            ("fe80::1", "https://[fe80::1]"),
            ("fe80::1%eth0", "https://[fe80::1%eth0]"),
            ("[fe80::1]:8443", "https://[fe80::1]:8443"),
            ("HTTPS://[::1]", "https://[::1]"),
        ] {
            assert_eq!(text.parse::<Address>().unwrap().to_string(), shown, "{text}");
        }
    }

    #[test]
    fn what_is_no_address_is_refused() {
        for text in
            ["", "ftp://xen1", "xen1:0", "xen1:65536", "user@xen1", "xen1/path", "a b", "[::1", "[::1]8443", "xen\r\n1"]
        {
            assert_eq!(text.parse::<Address>().unwrap_err().kind(), ErrorKind::OutOfRange, "{text:?}");
        }
    }

    #[test]
    fn another_host_of_the_pool_has_its_scheme_and_port() {
        let address: Address = "http://10.0.0.1:8080".parse().unwrap();
        assert_eq!(address.of_host("10.0.0.2").unwrap().to_string(), "http://10.0.0.2:8080");
        assert_eq!(address.of_host("fd00::2").unwrap().to_string(), "http://[fd00::2]:8080");
        assert_eq!(address.of_host("a\r\nb").unwrap_err().kind(), ErrorKind::OutOfRange);
    }
}
