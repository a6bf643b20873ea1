//! Which host of a pool is its master now: by asking for a session, which only the master makes.
//!
//! ```text
//! the master known last ─┬─ a session
//!                        ├─ HOST_IS_SLAVE: the master that it names, with the certificate that it vouches for
//!                        └─ not there ─► all hosts that the pool had, at once
//! ```

use std::thread;
use std::time::{Duration, Instant};

use serde_json::Value;
use zeroize::Zeroizing;

use crate::connections::Target;
use crate::session::{Core, Login, One};
use crate::wire::Patience;
use crate::{Address, Cancel, Error, ErrorKind, Fingerprint, Result, Trust};

/// How long one host may take to let us in, when others are asked too.
const PROBE: Duration = Duration::from_secs(20);
/// How often a slave may name another master.
const HOPS: usize = 3;
/// Most hosts of a pool that are known; XAPI allows 64.
const HOSTS: usize = 128;

impl Core {
    /// Makes a session: with the known master, or else with whichever of the known hosts is the master now.
    pub fn log_in(&self, cancel: &Cancel) -> Result<Login> {
        let begun = Instant::now();
        let (master, hosts, generation) = {
            let state = self.state();
            (state.master.clone(), state.hosts.clone(), state.generation + 1)
        };
        let master = master.unwrap_or_else(|| unreachable!("a pool begins with an address"));
        let is_known = !hosts.is_empty();
        let mut tried = 0;
        loop {
            let error = match self.ask(&master, generation, &cancel.part(PROBE)) {
                Ok(login) => return Ok(login),
                Err(error) => error,
            };
            cancel.check(&master.address)?;
            let may_pass = matches!(error.kind(), ErrorKind::Unreachable | ErrorKind::TimedOut)
                || error.code() == "HOST_IS_SLAVE"
                || error.kind() == ErrorKind::Untrusted && is_known;
            let is_starting = error.code() == "HOST_STILL_BOOTING";
            if !may_pass {
                return Err(error);
            }
            if is_known && let Some(login) = self.ask_all(&hosts, &master, generation, cancel) {
                tracing::info!(master = %login.master.address, "the pool has another master");
                return Ok(login);
            }
            let is_waited_for = is_known && error.kind() != ErrorKind::Untrusted || is_starting;
            if !is_waited_for || begun.elapsed() >= self.settings.outage {
                return Err(error);
            }
            cancel.sleep(self.settings.pause_after(tried), &master.address)?;
            tried += 1;
        }
    }

    /// Asks all but `except` at once for a session; only the master makes one.
    fn ask_all(&self, hosts: &[Target], except: &Target, generation: u64, cancel: &Cancel) -> Option<Login> {
        let until = cancel.part(PROBE);
        let asked: Vec<_> = hosts.iter().filter(|host| host.address != except.address).collect();
        let logins: Vec<Login> = thread::scope(|scope| {
            let threads: Vec<_> = asked
                .into_iter()
                .map(|host| {
                    scope.spawn(|| {
                        let login = self.ask(host, generation, &until).ok();
                        if login.is_some() {
                            until.cancel();
                        }
                        login
                    })
                })
                .collect();
            threads.into_iter().filter_map(|thread| thread.join().ok().flatten()).collect()
        });
        let mut logins = logins.into_iter();
        let first = logins.next();
        // Slaves may have named the same master.
        logins.for_each(|login| self.farewell(&login.reference, &login.master));
        first
    }

    /// Asks a host for a session, and the master that it names if it is a slave.
    fn ask(&self, host: &Target, generation: u64, cancel: &Cancel) -> Result<Login> {
        let mut host = host.clone();
        let settings = &self.settings;
        let patience = Patience { cancel: cancel.clone(), silence: settings.patience };
        for _ in 0..HOPS {
            // Only who is asked in this way, and is a slave, says which certificate the master has.
            let headers = "x-xenapi-request-host-certificate-thumbprint: sha-256:master\r\n";
            let arguments = (settings.user.as_str(), settings.password.as_str(), "1.1", settings.originator.as_str());
            let method = "session.login_with_password";
            let call = One { method, arguments: &arguments, secret: settings.password.as_str(), headers, waits: false };
            let refused = match self.one(&host, &call, &patience) {
                Ok((Value::String(reference), fingerprint)) if reference.starts_with("OpaqueRef:") => {
                    let reference = Zeroizing::new(reference);
                    return Ok(Login { reference, generation, master: host, fingerprint });
                }
                Ok(_) => {
                    let subject = format!("{method} at {}", host.address);
                    return Err(Error::new(ErrorKind::Protocol, subject, "it answered no reference of a session"));
                }
                Err(refused) => refused,
            };
            let error = refused.broken.error;
            let master = error.params().first().map(String::as_str).unwrap_or_default();
            if error.code() != "HOST_IS_SLAVE" || master.is_empty() {
                return Err(error);
            }
            let address = host.address.of_host(master)?;
            tracing::debug!(slave = %host.address, master = %address, "the host is a slave");
            let trust = match (&host.trust, refused.thumbprint) {
                (Trust::Authority(pem), _) => Trust::Authority(pem.clone()),
                (_, Some(thumbprint)) => Trust::Pinned(vec![thumbprint]),
                // It may be known; else the error shows what it has.
                (_, None) => self.known(&address).unwrap_or(Trust::Unknown),
            };
            host = Target::new(address, trust);
        }
        Err(Error::new(ErrorKind::Unreachable, &host.address, "the hosts do not agree on which of them is the master"))
    }

    /// Returns by what a host of the pool is recognised, if that is known.
    pub fn known(&self, address: &Address) -> Option<Trust> {
        let state = self.state();
        let mut hosts = state.master.iter().chain(&state.hosts);
        hosts.find(|host| host.address == *address).map(|host| host.trust.clone())
    }

    /// Learns which hosts the pool has and how each is recognised, so that another master is found when this one is gone.
    pub fn meet_hosts(&self, login: &Login, cancel: &Cancel) {
        match self.hosts(login, cancel) {
            Ok(hosts) => self.state().hosts = hosts,
            Err(error) => tracing::warn!(%error, "the other hosts of the pool are not known"),
        }
    }

    fn hosts(&self, login: &Login, cancel: &Cancel) -> Result<Vec<Target>> {
        let patience = Patience { cancel: cancel.part(PROBE), silence: PROBE };
        let read = |method| match self.attempt(login, method, &[], &patience, false) {
            Ok(Value::Object(records)) => Ok(records),
            Ok(_) => Err(Error::new(ErrorKind::Protocol, method, "no records were answered")),
            Err(broken) => Err(broken.error),
        };
        let records = read("host.get_all_records")?;
        let is_encrypted = self.settings.address.is_encrypted;
        // Without them, another master is not recognised, and that is told then.
        let certificates = if is_encrypted { read("Certificate.get_all_records").ok() } else { None };
        let certificates = certificates.unwrap_or_default();
        let mut hosts = Vec::new();
        for (reference, record) in records.iter().take(HOSTS) {
            let Some(Ok(address)) = record["address"].as_str().map(|address| self.settings.address.of_host(address))
            else {
                continue;
            };
            let pins =
                certificates.values().filter(|found| found["host"].as_str() == Some(reference)).filter_map(|found| {
                    // Which of them has a name with SHA-256 in it is a matter of version.
                    let text =
                        [&found["fingerprint_sha256"], &found["fingerprint"]].into_iter().filter_map(Value::as_str);
                    text.filter(|text| !text.is_empty()).find_map(|text| text.parse::<Fingerprint>().ok())
                });
            let trust = match &self.settings.trust {
                Trust::Authority(pem) => Trust::Authority(pem.clone()),
                _ => Trust::Pinned(pins.collect()),
            };
            hosts.push(Target::new(address, trust));
        }
        Ok(hosts)
    }
}
