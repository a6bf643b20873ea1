//! The session with a pool: who is its master, logging in again when it is lost, and what a failed call is answered with.
//!
//! | a call fails with | then |
//! |---|---|
//! | `SESSION_INVALID` | logged in again, and repeated, once: nothing was done |
//! | `HOST_IS_SLAVE` | the master is asked, whom the slave's word is taken for |
//! | `HOST_STILL_BOOTING` | repeated every few seconds |
//! | `TOO_MANY_PENDING_TASKS` | repeated every few seconds, ten times |
//! | no connection, or the call not sent whole | repeated; after ten seconds all known hosts are asked who the master is |
//! | a connection that breaks after the call was sent | the same for a call that only reads; else the outcome is unknown |
//! | anything else | told to the caller |
//!
//! Locks: the state, which is never held while the network is waited for.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::Value;
use zeroize::Zeroizing;

use crate::cancel::TICK;
use crate::connections::{Broken, Call, Connections, Target};
use crate::error::quoted;
use crate::rpc::{self, Arguments};
use crate::wire::Patience;
use crate::{Address, Cancel, Error, ErrorKind, Fingerprint, Result, Settings, Trust};

/// How long one host may take to let us in, when others are asked too.
const PROBE: Duration = Duration::from_secs(20);
/// How often a slave may name another master.
const HOPS: usize = 3;
/// Most hosts of a pool that are known; XAPI allows 64.
const HOSTS: usize = 128;
/// How often a call is repeated at the same host before the others are asked, a second apart.
const DIRECT: usize = 10;
/// How long a farewell may take.
const FAREWELL: Duration = Duration::from_secs(5);

/// A session, as it was when a call began.
pub struct Login {
    /// As good as the password.
    pub reference: Zeroizing<String>,
    /// Which session it is: changes when the pool is logged into again.
    pub generation: u64,
    pub master: Target,
    fingerprint: Option<Fingerprint>,
}

#[derive(Default)]
struct State {
    login: Option<Arc<Login>>,
    /// One that may be alive, but could not be used for long.
    stale: Option<Arc<Login>>,
    /// Whom to ask for a session.
    master: Option<Target>,
    hosts: Vec<Target>,
    generation: u64,
    is_busy: bool,
    is_over: bool,
}

/// What all handles of a pool share.
pub struct Core {
    pub settings: Settings,
    connections: Connections,
    state: Mutex<State>,
    changed: Condvar,
    next: AtomicU64,
}

/// What a failed call has used up.
struct Failures {
    begun: Instant,
    sessions: usize,
    pending: usize,
    direct: usize,
}

impl Core {
    /// Makes one that is not logged in.
    pub fn new(settings: Settings) -> Self {
        let master = Some(Target { address: settings.address.clone(), trust: settings.trust.clone() });
        let state = State { master, ..State::default() };
        Self {
            settings,
            connections: Connections::default(),
            state: Mutex::new(state),
            changed: Condvar::new(),
            next: AtomicU64::new(1),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns the session, logging in if there is none.
    pub fn login(&self, cancel: &Cancel) -> Result<Arc<Login>> {
        let mut state = self.state();
        loop {
            cancel.check(&self.settings.address)?;
            if let Some(login) = &state.login {
                return Ok(login.clone());
            }
            if state.is_over {
                return Err(Error::new(ErrorKind::Cancelled, &self.settings.address, "it was logged out of"));
            }
            if !state.is_busy {
                break;
            }
            // Somebody else is at it.
            state = self.changed.wait_timeout(state, TICK).unwrap_or_else(PoisonError::into_inner).0;
        }
        state.is_busy = true;
        drop(state);
        let made = self.log_in(cancel);
        let mut state = self.state();
        state.is_busy = false;
        self.changed.notify_all();
        let login = Arc::new(made?);
        state.generation = login.generation;
        state.master = Some(login.master.clone());
        state.login = Some(login.clone());
        let stale = state.stale.take();
        drop(state);
        if let Some(stale) = stale {
            // It is not needed any more; most often it does not exist either.
            self.farewell(&stale.reference, &login.master);
        }
        self.meet_hosts(&login, cancel);
        Ok(login)
    }

    /// Returns the fingerprint of the master's certificate; `None` without encryption.
    pub fn fingerprint(&self) -> Option<Fingerprint> {
        self.state().login.as_ref().and_then(|login| login.fingerprint)
    }

    /// Returns the number of the session.
    pub fn generation(&self) -> u64 {
        self.state().generation
    }

    /// Ends the session; nothing can be called afterwards.
    pub fn log_out(&self) {
        let login = {
            let mut state = self.state();
            state.is_over = true;
            state.login.take()
        };
        if let Some(login) = login {
            self.farewell(&login.reference, &login.master);
        }
        self.connections.forget();
    }

    /// Hides the reference of the session from the codes of an error.
    pub fn hide(&self, codes: Vec<String>) -> Vec<String> {
        let login = self.state().login.clone();
        hide(codes, login.as_ref().map_or("", |login| &login.reference))
    }

    /// Calls `method`, repeating it as the table above says.
    pub fn call(&self, method: &str, params: &[Value], cancel: &Cancel) -> Result<Value> {
        self.repeat(method, cancel, |login| {
            let patience = Patience { cancel: cancel.part(self.settings.patience), silence: self.settings.patience };
            self.attempt(login, method, params, &patience, false)
        })
    }

    /// Does what `attempt` does with a session, repeating it as the table above says.
    pub fn repeat<T>(
        &self,
        method: &str,
        cancel: &Cancel,
        mut attempt: impl FnMut(&Login) -> std::result::Result<T, Broken>,
    ) -> Result<T> {
        let mut failures = Failures { begun: Instant::now(), sessions: 0, pending: 0, direct: 0 };
        loop {
            let login = self.login(cancel)?;
            match attempt(&login) {
                Ok(done) => return Ok(done),
                Err(broken) => self.recover(method, &login, broken, &mut failures, cancel)?,
            }
        }
    }

    /// Calls `method` once.
    pub fn attempt(
        &self,
        login: &Login,
        method: &str,
        params: &[Value],
        patience: &Patience,
        waits: bool,
    ) -> std::result::Result<Value, Broken> {
        let arguments = Arguments { session: &login.reference, rest: params };
        let call = One { method, arguments: &arguments, secret: &login.reference, headers: "", waits };
        self.one(&login.master, &call, patience).map(|(value, ..)| value).map_err(|refused| refused.broken)
    }

    /// Decides what a failed call is answered with: an error if it is not to be repeated.
    fn recover(
        &self,
        method: &str,
        login: &Login,
        broken: Broken,
        failures: &mut Failures,
        cancel: &Cancel,
    ) -> Result<()> {
        let Broken { error, was_sent } = broken;
        let is_read = rpc::is_read(method);
        let subject = || format!("{method} at {}", login.master.address);
        let is_over = failures.begun.elapsed() >= self.settings.outage;
        match error.code() {
            "SESSION_INVALID" if failures.sessions == 0 => {
                failures.sessions += 1;
                self.lose(login.generation, false);
                return Ok(());
            }
            "HOST_IS_SLAVE" if !is_over => {
                self.lose(login.generation, false);
                return cancel.sleep(self.settings.pause / 5, subject());
            }
            "HOST_STILL_BOOTING" if !is_over => return cancel.sleep(self.settings.pause, subject()),
            "HOST_OFFLINE" | "CANNOT_CONTACT_HOST" if is_read && !is_over => {
                return cancel.sleep(self.settings.pause, subject());
            }
            "TOO_MANY_PENDING_TASKS" if failures.pending < 10 => {
                failures.pending += 1;
                return cancel.sleep(self.settings.pause, subject());
            }
            "" => {}
            _ => return Err(error),
        }
        cancel.check(subject())?;
        let is_broken = matches!(error.kind(), ErrorKind::Unreachable | ErrorKind::TimedOut);
        if was_sent && !is_read {
            let reason = format!("nobody can say whether it was done, the objects have to be looked at: {error}");
            return Err(Error::new(ErrorKind::Unknown, subject(), reason));
        }
        if !is_broken || is_over {
            return Err(error);
        }
        failures.direct += 1;
        if failures.direct >= DIRECT {
            // It may not be the master any more, or not be at all.
            self.lose(login.generation, true);
            return Ok(());
        }
        cancel.sleep(self.settings.pause / 5, subject())
    }

    /// Forgets a session that a transfer was refused with.
    pub fn renew(&self, login: &Login) {
        self.lose(login.generation, true);
    }

    /// Forgets a session, unless another was made since.
    fn lose(&self, generation: u64, is_alive: bool) {
        let mut state = self.state();
        if state.login.as_ref().is_some_and(|login| login.generation == generation) {
            let lost = state.login.take();
            state.stale = lost.filter(|_| is_alive);
        }
    }

    /// Makes a session: with the known master, or else with whichever of the known hosts is the master now.
    fn log_in(&self, cancel: &Cancel) -> Result<Login> {
        let begun = Instant::now();
        let (master, hosts, generation) = {
            let state = self.state();
            (state.master.clone(), state.hosts.clone(), state.generation + 1)
        };
        let master = master.unwrap_or_else(|| unreachable!("a pool begins with an address"));
        let is_known = !hosts.is_empty();
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
            if !is_known && !is_starting || begun.elapsed() >= self.settings.outage {
                return Err(error);
            }
            cancel.sleep(self.settings.pause, &master.address)?;
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
            host = Target { address, trust };
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
    fn meet_hosts(&self, login: &Login, cancel: &Cancel) {
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
        let certificates = if is_encrypted { read("Certificate.get_all_records")? } else { serde_json::Map::new() };
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
            hosts.push(Target { address, trust });
        }
        Ok(hosts)
    }

    /// Ends a session, if that is possible soon.
    fn farewell(&self, reference: &str, master: &Target) {
        let patience = Patience { cancel: Cancel::within(FAREWELL), silence: FAREWELL };
        let arguments = Arguments { session: reference, rest: &[] };
        let call =
            One { method: "session.logout", arguments: &arguments, secret: reference, headers: "", waits: false };
        if let Err(refused) = self.one(master, &call, &patience)
            && refused.broken.error.code() != "SESSION_INVALID"
        {
            tracing::debug!(error = %refused.broken.error, "the session could not be ended; the pool does after a day");
        }
    }

    fn one<A: serde::Serialize>(
        &self,
        target: &Target,
        call: &One<'_, A>,
        patience: &Patience,
    ) -> std::result::Result<(Value, Option<Fingerprint>), Refused> {
        let subject = || format!("{} at {}", call.method, target.address);
        let refuse = |error, was_sent| Refused { broken: Broken { error, was_sent }, thumbprint: None };
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        let body = rpc::request(id, call.method, call.arguments).map_err(|error| refuse(error, false))?;
        let sent = Call { agent: &self.settings.originator, headers: call.headers, body: &body, waits: call.waits };
        let reply = self.connections.exchange(target, &sent, patience);
        let reply = reply.map_err(|broken| Refused { broken, thumbprint: None })?;
        if reply.head.status != 200 {
            let reason = format!("it answered with status {} of HTTP, 200 was expected", reply.head.status);
            return Err(refuse(Error::new(ErrorKind::Protocol, subject(), reason), true));
        }
        match rpc::reply(id, &reply.body) {
            Ok(Ok(value)) => Ok((value, reply.fingerprint)),
            Ok(Err(codes)) => {
                let codes = hide(codes, call.secret);
                let thumbprint = reply.head.header("x-xenapi-response-host-certificate-thumbprint");
                let thumbprint = thumbprint.map(|text| text.strip_prefix("sha-256:").unwrap_or(text));
                let thumbprint = thumbprint.and_then(|text| text.parse().ok());
                let error = Error::api(subject(), codes, ErrorKind::Api);
                Err(Refused { broken: Broken { error, was_sent: false }, thumbprint })
            }
            Err(reason) => Err(refuse(Error::new(ErrorKind::Protocol, subject(), quoted(&reason)), true)),
        }
    }
}

/// A call, once.
struct One<'a, A> {
    method: &'a str,
    arguments: &'a A,
    /// What no error may show.
    secret: &'a str,
    headers: &'a str,
    waits: bool,
}

struct Refused {
    broken: Broken,
    /// Of the master's certificate, if a slave said so.
    thumbprint: Option<Fingerprint>,
}

/// Replaces what holds a secret.
fn hide(codes: Vec<String>, secret: &str) -> Vec<String> {
    let is_secret = |text: &str| !secret.is_empty() && text.contains(secret);
    codes.into_iter().map(|text| if is_secret(&text) { "(hidden)".to_owned() } else { text }).collect()
}
