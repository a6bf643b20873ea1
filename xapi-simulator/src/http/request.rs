//! Heads of requests.

use super::connection::Connection;
use base64::Engine;
use std::io::{self, Read};

/// The longest head, in bytes.
const HEAD: usize = 64 << 10;
/// Header fields at most.
const FIELDS: usize = 64;

/// The head of a request.
#[derive(Debug)]
pub struct Request {
    /// `GET`.
    pub verb: String,
    /// Without the query.
    pub path: String,
    /// After the `?`, as it came.
    pub query: String,
    /// Whether HTTP/1.0 is spoken.
    pub is_old: bool,
    headers: Vec<(String, String)>,
}

impl Request {
    /// Reads a head. `None` if the connection ended, or was idle for too long, before one.
    ///
    /// # Errors
    /// If it is none.
    pub fn read(connection: &mut Connection) -> io::Result<Option<Request>> {
        let mut bytes = Vec::new();
        let mut buffer = [0; 4096];
        loop {
            let length = match connection.read(&mut buffer) {
                Err(error) if bytes.is_empty() && is_timeout(&error) => return Ok(None),
                other => other?,
            };
            if length == 0 {
                return if bytes.is_empty() { Ok(None) } else { Err(io::ErrorKind::UnexpectedEof.into()) };
            }
            bytes.extend_from_slice(&buffer[..length]);
            if let Some((request, end)) = Request::parse(&bytes)? {
                connection.unread(&bytes[end..]);
                return Ok(Some(request));
            }
            if bytes.len() > HEAD {
                return Err(io::Error::other("the head of a request is too long"));
            }
        }
    }

    fn parse(bytes: &[u8]) -> io::Result<Option<(Request, usize)>> {
        let mut fields = [httparse::EMPTY_HEADER; FIELDS];
        let mut head = httparse::Request::new(&mut fields);
        let httparse::Status::Complete(end) = head.parse(bytes).map_err(io::Error::other)? else {
            return Ok(None);
        };
        let (verb, target) = (head.method.unwrap_or_default(), head.path.unwrap_or_default());
        let (path, query) = target.split_once('?').unwrap_or((target, ""));
        let headers = head
            .headers
            .iter()
            .map(|field| (field.name.to_ascii_lowercase(), String::from_utf8_lossy(field.value).trim().to_owned()));
        let request = Request {
            verb: verb.to_owned(),
            path: path.to_owned(),
            query: query.to_owned(),
            is_old: head.version == Some(0),
            headers: headers.collect(),
        };
        Ok(Some((request, end)))
    }

    /// Returns a header field, by its name in lower case.
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(known, _)| known == name).map(|(_, value)| value.as_str())
    }

    /// Returns the length of the body that was announced.
    pub fn length(&self) -> Option<u64> {
        self.header("content-length")?.parse().ok()
    }

    /// Returns whether the body comes in chunks.
    pub fn is_chunked(&self) -> bool {
        self.header("transfer-encoding").is_some_and(|coding| !coding.eq_ignore_ascii_case("identity"))
    }

    /// Returns whether the connection is to end after the answer.
    pub fn is_last(&self) -> bool {
        match self.header("connection") {
            Some(wish) => !wish.eq_ignore_ascii_case("keep-alive"),
            None => self.is_old,
        }
    }

    /// Returns a parameter of the query, or of a cookie.
    pub fn parameter(&self, name: &str) -> Option<String> {
        let of = |text: &str, separator| {
            let pair = text.split(separator).filter_map(|pair: &str| pair.trim().split_once('='));
            pair.filter(|(known, _)| decoded(known) == name).map(|(_, value)| decoded(value)).next()
        };
        of(&self.query, '&').or_else(|| of(self.header("cookie")?, ';'))
    }

    /// Returns user and password of basic authentication.
    pub fn credentials(&self) -> Option<(String, String)> {
        let encoded = self.header("authorization")?.strip_prefix("Basic ")?;
        let bytes = base64::engine::general_purpose::STANDARD.decode(encoded.trim()).ok()?;
        let text = String::from_utf8(bytes).ok()?;
        let (user, password) = text.split_once(':')?;
        Some((user.to_owned(), password.to_owned()))
    }

    /// Returns the parameters of the query but for the session, which is a secret.
    pub fn shown_parameters(&self) -> Vec<String> {
        self.query.split('&').filter(|pair| !pair.starts_with("session_id=") && !pair.is_empty()).map(decoded).collect()
    }
}

fn is_timeout(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut)
}

/// Returns a text without `%XX` and `+`.
fn decoded(text: &str) -> String {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let [first, after @ ..] = rest {
        rest = after;
        match (first, after) {
            (b'%', [high, low, after @ ..]) => {
                let digits = [*high, *low];
                match std::str::from_utf8(&digits).ok().and_then(|digits| u8::from_str_radix(digits, 16).ok()) {
                    Some(byte) => {
                        bytes.push(byte);
                        rest = after;
                    }
                    None => bytes.push(b'%'),
                }
            }
            (b'+', _) => bytes.push(b' '),
            (other, _) => bytes.push(*other),
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parameters_come_from_the_query_before_the_cookie_and_are_decoded() {
        let head = b"GET /x?vdi=OpaqueRef%3A1&a=b+c HTTP/1.1\r\nCookie: session_id=s; vdi=2\r\n\r\nrest";
        let (request, end) = Request::parse(head).unwrap().unwrap();
        assert_eq!(&head[end..], b"rest");
        assert_eq!(request.parameter("vdi").as_deref(), Some("OpaqueRef:1"));
        assert_eq!(request.parameter("a").as_deref(), Some("b c"));
        assert_eq!(request.parameter("session_id").as_deref(), Some("s"));
        assert_eq!(decoded("%zz%4"), "%zz%4");
    }
}
