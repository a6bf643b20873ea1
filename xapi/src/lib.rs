//! A client of XAPI, the interface of XCP-ng and XenServer pools: blocking, with a token to stop whatever waits.

mod tls;
mod trust;

pub use tls::{Tls, TlsStream};
pub use trust::{Fingerprint, Trust, Untrusted};
