//! Transfers by HTTP: how one begins, at which host, and what its task says about its end.
//!
//! ```text
//! task of ours ─► request at a host ─┬─ 200 ─► bytes ─► end ─► the task says whether it was right
//!                                    └─ 302 ─► the host that has the SR, recognised by its own certificate
//! ```
//!
//! A status of 200 means nothing: it is sent before anything is done. Source: XAPI, `ocaml/xapi/importexport.ml`,
//! `export_raw_vdi.ml`, `import_raw_vdi.ml`.

use std::fmt::Write;
use std::time::Duration;

use zeroize::Zeroizing;

use crate::connections::{Host as HostHeader, Target};
use crate::error::quoted;
use crate::record::{Host, Sr};
use crate::session::Login;
use crate::wire::{Head, Patience, Wire};
use crate::{Address, Cancel, Error, ErrorKind, Outcome, Pool, Ref, Result, Task, Trust};

/// How often one host may send to another.
const HOPS: usize = 3;
/// How long the answer may take that only says that the transfer begins, or where.
const ANSWER: Duration = Duration::from_secs(60);
/// How long the task may take to end, once the bytes have.
pub(crate) const END: Duration = Duration::from_secs(60);
/// How long it may take to say what an answer other than 200 is about.
const REASON: Duration = Duration::from_secs(10);

/// In which form a disk is transferred.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// All of its bytes.
    Raw,
    /// A VHD with what it holds, or with what differs from another disk.
    Vhd,
}

impl Format {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::Vhd => "vhd",
        }
    }
}

/// What is asked of a host.
pub(crate) struct Request<'a> {
    /// GET or PUT.
    pub method: &'a str,
    pub path: &'a str,
    pub query: Vec<(&'a str, String)>,
    /// Bytes that are sent.
    pub length: Option<u64>,
}

/// A transfer that has begun.
pub(crate) struct Begun {
    pub wire: Wire,
    pub head: Head,
    pub task: Task,
    pub subject: String,
}

impl Pool {
    /// Begins a transfer called `label`, at the master or at `first`.
    pub(crate) fn begin(&self, label: &str, request: &Request<'_>, first: Option<Target>) -> Result<Begun> {
        match self.try_to_begin(label, request, first.clone())? {
            Some(begun) => Ok(begun),
            // The session ended between the call that made the task and this: that task failed with it.
            None => self.try_to_begin(label, request, first)?.ok_or_else(|| {
                let reason = "the pool refuses a session that was made for it just now";
                Error::new(ErrorKind::Credentials, self.subject(label), reason)
            }),
        }
    }

    /// Begins it with the session that there is; `None` if it does not hold any more.
    fn try_to_begin(&self, label: &str, request: &Request<'_>, first: Option<Target>) -> Result<Option<Begun>> {
        let mut task = self.task(label)?;
        let login = self.core.login(&self.cancel)?;
        let mut target = first.unwrap_or_else(|| login.master.clone());
        for _ in 0..HOPS {
            let (wire, head) = self.ask(&target, request, &login, &task)?;
            match head.status {
                200 => {
                    task.hold();
                    let subject = format!("{label} at {}", target.address);
                    return Ok(Some(Begun { wire, head, task, subject }));
                }
                301 | 302 | 303 | 307 | 308 => target = self.redirected(label, &target, &head)?,
                401 => {
                    self.core.renew(&login);
                    return Ok(None);
                }
                status => {
                    wire.close();
                    return Err(self.refused(&task, label, &target.address, status));
                }
            }
        }
        Err(Error::new(ErrorKind::Protocol, self.subject(label), "the hosts send from one to the other"))
    }

    fn ask(&self, target: &Target, request: &Request<'_>, login: &Login, task: &Task) -> Result<(Wire, Head)> {
        let mut wire = target.connect(&self.cancel)?.wire;
        let patience = Patience { cancel: self.cancel.part(ANSWER), silence: ANSWER };
        let mut text = Zeroizing::new(String::with_capacity(4096));
        let _ = write!(text, "{} {}?session_id=", request.method, request.path);
        escape(&mut text, &login.reference);
        text.push_str("&task_id=");
        escape(&mut text, task.reference().as_str());
        for (name, value) in &request.query {
            let _ = write!(text, "&{name}=");
            escape(&mut text, value);
        }
        let host = HostHeader(&target.address);
        let agent = &self.core.settings.originator;
        let _ = write!(text, " HTTP/1.1\r\nHost: {host}\r\nUser-Agent: {agent}\r\nConnection: close\r\n");
        if let Some(length) = request.length {
            let _ = write!(text, "Content-Length: {length}\r\n");
        }
        text.push_str("\r\n");
        wire.send(text.as_bytes(), &patience)?;
        let head = wire.head(&patience)?;
        Ok((wire, head))
    }

    /// Returns the host that a redirect names, if it is one of the pool, recognised by its own certificate.
    fn redirected(&self, label: &str, from: &Target, head: &Head) -> Result<Target> {
        let location = head.header("location").unwrap_or_default();
        // What comes after the host holds the session.
        let origin = location.split_once("://").map(|(scheme, rest)| {
            let end = rest.find(['/', '?']).unwrap_or(rest.len());
            format!("{scheme}://{}", &rest[..end])
        });
        let address = origin.as_deref().map(str::parse::<Address>);
        let Some(Ok(address)) = address else {
            let reason = "it sends to another host, but does not say to which";
            return Err(Error::new(ErrorKind::Protocol, format!("{label} at {}", from.address), reason));
        };
        if from.address.is_encrypted && !address.is_encrypted {
            let reason = format!("it sends to {address}, where everybody could read what goes over the network");
            return Err(Error::new(ErrorKind::Untrusted, format!("{label} at {}", from.address), reason));
        }
        tracing::debug!(from = %from.address, to = %address, "a transfer is sent to another host");
        let hosts = self.records::<Host>()?;
        let Some(host) = hosts.iter().find(|host| host.address == address.host) else {
            let reason = format!("it sends to {address}, which is no host of the pool");
            return Err(Error::new(ErrorKind::Untrusted, format!("{label} at {}", from.address), reason));
        };
        self.target(&host.reference, address)
    }

    /// Returns how a host at `address` is recognised: by the certificate that the pool knows of it.
    fn target(&self, host: &Ref<Host>, address: Address) -> Result<Target> {
        if !address.is_encrypted {
            return Ok(Target::new(address, Trust::Unknown));
        }
        let trust = match self.host_certificate(host) {
            Ok(pem) => Trust::Certificate(pem),
            Err(error) if error.kind() == ErrorKind::Unsupported => {
                self.core.known(&address).unwrap_or_else(|| self.core.settings.trust.clone())
            }
            Err(error) => return Err(error),
        };
        Ok(Target::new(address, trust))
    }

    /// Returns a host that has an SR: the master if it does (`None`), since it is known already.
    pub(crate) fn host_for(&self, sr: &Ref<Sr>) -> Result<Option<Target>> {
        let hosts = self.hosts_of_sr(sr)?;
        let pools = self.records::<crate::record::PoolObject>()?;
        if pools.iter().any(|pool| hosts.contains(&pool.master)) {
            return Ok(None);
        }
        let Some(host) = hosts.first() else {
            let name: String = self.field(sr, "name_label")?;
            let subject = self.subject(&format!("the SR '{}'", quoted(&name)));
            return Err(Error::new(ErrorKind::Unreachable, subject, "no host has it now: plug it"));
        };
        let address: String = self.field(host, "address")?;
        self.target(host, self.core.settings.address.of_host(&address)?).map(Some)
    }

    /// Returns why a host refused a transfer: what the task says, if it does, else the status of HTTP.
    fn refused(&self, task: &Task, label: &str, address: &Address, status: u16) -> Error {
        match task.wait(&self.cancel.part(REASON)) {
            Err(error) if error.kind() != ErrorKind::TimedOut => error,
            _ => {
                let reason = format!("it answered with status {status} of HTTP, 200 was expected");
                Error::new(ErrorKind::Protocol, format!("{label} at {address}"), reason)
            }
        }
    }
}

/// Waits for the end of a transfer's task, for at most `time`.
pub(crate) fn outcome(task: &Task, subject: &str, cancel: &Cancel, time: Duration) -> Result<Outcome> {
    let ended = task.wait(&cancel.part(time));
    if ended.as_ref().is_err_and(|error| error.kind() == ErrorKind::TimedOut) && cancel.check(subject).is_ok() {
        let reason = format!("the pool has not said after {} s whether all of it was right", time.as_secs());
        return Err(Error::new(ErrorKind::TimedOut, subject, reason));
    }
    ended
}

/// Appends a text as a query has it.
fn escape(text: &mut String, value: &str) {
    for byte in value.bytes() {
        if byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) {
            text.push(char::from(byte));
        } else {
            let _ = write!(text, "%{byte:02X}");
        }
    }
}

/// Makes the value of a query of a reference.
pub(crate) fn value_of<C>(reference: &Ref<C>) -> String {
    reference.as_str().to_owned()
}
