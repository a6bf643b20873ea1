//! What can go wrong, always with the pool and the call or object it is about.

use std::io;
use std::sync::Arc;

use crate::Fingerprint;

/// The result of an operation on a pool.
pub type Result<T> = std::result::Result<T, Error>;

/// What a caller can do about an error.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ErrorKind {
    /// The host cannot be reached, went away, or has not finished starting.
    Unreachable,
    /// Its certificate is not the one that was expected; [`Error::fingerprint`] says which it has.
    Untrusted,
    /// It does not know the user, or not with this password.
    Credentials,
    /// The user's role does not allow the call.
    Denied,
    /// The pool refused the call; [`Error::code`] says why.
    Api,
    /// The object does not exist (any more).
    Gone,
    /// The server answered, but not by the protocol.
    Protocol,
    /// The caller cancelled it.
    Cancelled,
    /// It took longer than it may.
    TimedOut,
    /// A task ended with an error; [`Error::code`] says which.
    Failed,
    /// Nobody can say whether it was done: the connection broke after the call was sent, or its task vanished. The objects
    /// have to be looked at.
    Unknown,
    /// The server does not know the call, or does not do it for this object.
    Unsupported,
    /// More or fewer bytes were given than was said, or an argument is outside its range.
    OutOfRange,
}

/// An error with its kind and a sentence that names what it is about.
#[derive(Debug, Clone)]
pub struct Error(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    kind: ErrorKind,
    message: String,
    codes: Vec<String>,
    fingerprint: Option<Fingerprint>,
}

/// Longest text of a server that is quoted (characters).
const QUOTED: usize = 300;

impl Error {
    /// Makes an error about `subject`: the pool, the call, or the object.
    pub(crate) fn new(kind: ErrorKind, subject: impl std::fmt::Display, reason: impl std::fmt::Display) -> Self {
        Self::with(kind, format!("{subject}: {reason}"), Vec::new(), None)
    }

    /// Makes the error that a host has another certificate than was expected.
    pub(crate) fn untrusted(
        subject: impl std::fmt::Display,
        reason: impl std::fmt::Display,
        fingerprint: Option<Fingerprint>,
    ) -> Self {
        Self::with(ErrorKind::Untrusted, format!("{subject}: {reason}"), Vec::new(), fingerprint)
    }

    /// Makes the error of `codes`: a code of XAPI (`ocaml/xapi-consts/api_errors.ml`), then its parameters.
    ///
    /// `otherwise` is the kind of the codes that have none of their own.
    pub(crate) fn api(subject: impl std::fmt::Display, codes: Vec<String>, otherwise: ErrorKind) -> Self {
        let code = codes.first().map_or("", String::as_str);
        let (kind, advice) = match code {
            "HANDLE_INVALID" | "UUID_INVALID" => (ErrorKind::Gone, "it does not exist (any more)"),
            "SESSION_AUTHENTICATION_FAILED" => (ErrorKind::Credentials, "check the user and the password"),
            "RBAC_PERMISSION_DENIED"
            | "PERMISSION"
            | "LICENCE_RESTRICTION"
            | "LICENSE_RESTRICTION"
            | "FEATURE_RESTRICTED" => (ErrorKind::Denied, "the user needs another role, or the pool another licence"),
            "MESSAGE_METHOD_UNKNOWN" | "MESSAGE_REMOVED" | "MESSAGE_PARAMETER_COUNT_MISMATCH" => {
                (ErrorKind::Unsupported, "the pool is too old or too new for it")
            }
            "HOST_STILL_BOOTING" | "HOST_OFFLINE" | "CANNOT_CONTACT_HOST" => {
                (ErrorKind::Unreachable, "a host is not there, or still starts")
            }
            _ => (otherwise, ""),
        };
        let refused = if otherwise == ErrorKind::Failed { "failed with" } else { "the pool answered" };
        let mut message = format!("{subject}: {refused} {}", quoted(code));
        // The reference of a session is as good as a password.
        let is_secret = code.starts_with("SESSION");
        let rest = codes.get(1..).unwrap_or_default().iter().filter(|param| !param.is_empty());
        let rest: Vec<_> = if is_secret { Vec::new() } else { rest.map(|param| quoted(param)).collect() };
        if !rest.is_empty() {
            message.push_str(&format!(" ({})", rest.join(", ")));
        }
        if !advice.is_empty() {
            message.push_str(&format!(": {advice}"));
        }
        Self::with(kind, message, codes, None)
    }

    fn with(kind: ErrorKind, message: String, codes: Vec<String>, fingerprint: Option<Fingerprint>) -> Self {
        Self(Arc::new(Inner { kind, message, codes, fingerprint }))
    }

    /// Returns the kind.
    #[must_use]
    pub fn kind(&self) -> ErrorKind {
        self.0.kind
    }

    /// Returns the code of XAPI, such as `VDI_IN_USE`; empty where the error is none of XAPI's.
    #[must_use]
    pub fn code(&self) -> &str {
        self.0.codes.first().map_or("", String::as_str)
    }

    /// Returns the parameters of the code.
    #[must_use]
    pub fn params(&self) -> &[String] {
        self.0.codes.get(1..).unwrap_or_default()
    }

    /// Returns the fingerprint of a certificate that was not the expected one.
    #[must_use]
    pub fn fingerprint(&self) -> Option<&Fingerprint> {
        self.0.fingerprint.as_ref()
    }

    /// Whether the object does not exist: success, for who wanted to destroy it.
    #[must_use]
    pub fn is_gone(&self) -> bool {
        self.kind() == ErrorKind::Gone
    }

    /// Returns the error that a reader or writer of this crate wrapped, or what an error of the system says about `subject`.
    pub(crate) fn of_io(subject: impl std::fmt::Display, error: io::Error) -> Self {
        match error.downcast::<Self>() {
            Ok(own) => own,
            Err(error) => Self::new(ErrorKind::Unreachable, subject, broken(&error)),
        }
    }
}

impl From<Error> for io::Error {
    fn from(error: Error) -> Self {
        let kind = match error.kind() {
            ErrorKind::Cancelled => io::ErrorKind::ConnectionAborted,
            ErrorKind::TimedOut => io::ErrorKind::TimedOut,
            ErrorKind::Gone => io::ErrorKind::NotFound,
            ErrorKind::Protocol => io::ErrorKind::InvalidData,
            _ => io::ErrorKind::Other,
        };
        Self::new(kind, error)
    }
}

/// Says in words how a connection broke.
fn broken(error: &io::Error) -> String {
    match error.kind() {
        io::ErrorKind::UnexpectedEof | io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe => {
            format!("the connection was closed by the other side ({error})")
        }
        _ => format!("the connection failed ({error})"),
    }
}

/// Shows a text of a server, without what could disturb a terminal, and not all of a long one.
pub(crate) fn quoted(text: &str) -> String {
    let mut shown: String = text.chars().take(QUOTED).flat_map(char::escape_debug).collect();
    if text.chars().nth(QUOTED).is_some() {
        shown.push('…');
    }
    shown
}

impl std::fmt::Display for Error {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0.message)
    }
}

impl std::error::Error for Error {}
