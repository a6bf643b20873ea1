//! Logging in to a pool, by a certificate that somebody vouched for: on the command line, in the configuration, or once before.

use xapi::{Address, Cancel, Fingerprint, Pool, Settings, Trust};
use zeroize::Zeroizing;

use super::error::{Error, ErrorKind, Result};
use super::state::State;

/// What it takes to log in.
pub struct Login {
    /// Any host of the pool.
    pub address: String,
    /// The user.
    pub user: String,
    /// The user's password.
    pub password: Zeroizing<String>,
    /// The fingerprint of the certificate, if it is said.
    pub fingerprint: Option<String>,
    /// The certificates (PEM) of who signed it, if they are given.
    pub authority: Option<String>,
    /// The entry of the configuration that alone can say the fingerprint; `None` if an option can.
    pub entry: Option<String>,
}

/// A certificate that nobody vouched for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unknown {
    /// Whose it is.
    pub address: String,
    /// Its SHA-256.
    pub fingerprint: Fingerprint,
}

impl Unknown {
    /// What prints the fingerprint, to be compared, on a host of a pool.
    pub const COMMAND: &str = "openssl x509 -in /etc/xensource/xapi-ssl.pem -noout -fingerprint -sha256";
}

/// Logs in. `accepts` is asked about a certificate of which nothing is known; what it accepts is remembered.
///
/// # Errors
/// [`ErrorKind::Untrusted`] if the certificate is unknown and not accepted, or not the one that is known; what the pool says.
pub fn connect(
    login: &Login,
    state: &State,
    cancel: &Cancel,
    accepts: impl FnOnce(&Unknown) -> Result<bool>,
) -> Result<Pool> {
    let address: Address = login.address.parse()?;
    let known = state.known(&address.to_string())?;
    let is_known = !known.is_empty();
    let trust = match (&login.fingerprint, &login.authority) {
        (Some(fingerprint), _) => Trust::Pinned(vec![parse(fingerprint)?]),
        (None, Some(authority)) => Trust::Authority(authority.clone()),
        (None, None) if is_known => Trust::Pinned(known.iter().map(|text| parse(text)).collect::<Result<_>>()?),
        (None, None) => Trust::Unknown,
    };
    let is_unknown = matches!(trust, Trust::Unknown);
    let connect =
        |trust| Pool::connect(Settings::new(address.clone(), &login.user, login.password.clone(), trust), cancel);
    let error = match connect(trust) {
        Err(error) if error.kind() == xapi::ErrorKind::Untrusted => error,
        connected => return Ok(connected?),
    };
    let Some(fingerprint) = error.fingerprint().copied() else { return Err(untrusted(&error.to_string())) };
    if !is_unknown {
        let from = if is_known && login.fingerprint.is_none() { "was accepted before" } else { "was given" };
        return Err(untrusted(&format!(
            "{address} has another certificate than {from}; its fingerprint is {fingerprint}. If it was renewed, compare that \
             with what '{}' prints on the host, and {}",
            Unknown::COMMAND,
            match &login.entry {
                Some(name) => format!("give it as fingerprint in [pools.{name}] of the configuration"),
                None => "give --fingerprint".to_owned(),
            }
        )));
    }
    let unknown = Unknown { address: address.to_string(), fingerprint };
    if !accepts(&unknown)? {
        return Err(untrusted(&format!(
            "the certificate of {address} is not known; its fingerprint is {fingerprint}. Compare it with what '{}' prints on \
             the host, and {}",
            Unknown::COMMAND,
            match &login.entry {
                Some(name) => format!("give it as fingerprint in [pools.{name}] of the configuration"),
                None => format!("give --fingerprint {fingerprint}, or --trust-first to accept it and remember it"),
            }
        )));
    }
    let pool = connect(Trust::Pinned(vec![fingerprint]))?;
    state.accept(&address.to_string(), &fingerprint.to_string())?;
    Ok(pool)
}

fn untrusted(message: &str) -> Error {
    Error::new(ErrorKind::Untrusted, message)
}

fn parse(fingerprint: &str) -> Result<Fingerprint> {
    fingerprint.parse().map_err(|error: xapi::Untrusted| Error::new(ErrorKind::Usage, error.to_string()))
}
