//! The session with a pool: logging in again when it is lost, and what a failed call is answered with.
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
use std::time::{Duration, Instant};

use serde_json::Value;
use zeroize::Zeroizing;

use crate::cancel::TICK;
use crate::connections::{Broken, Call, Connections, Target};
use crate::error::quoted;
use crate::rpc::{self, Arguments};
use crate::wire::Patience;
use crate::{Cancel, Error, ErrorKind, Fingerprint, Result, Settings};

/// How often a call is repeated at the same host before the others are asked, ten seconds in all.
const DIRECT: u32 = 13;
/// How long a farewell may take.
const FAREWELL: Duration = Duration::from_secs(5);

/// A session, as it was when a call began.
pub struct Login {
    /// As good as the password.
    pub reference: Zeroizing<String>,
    /// Which session it is: changes when the pool is logged into again.
    pub generation: u64,
    pub master: Target,
    /// Of the master's certificate, if the connection is encrypted.
    pub fingerprint: Option<Fingerprint>,
}

/// What changes.
#[derive(Default)]
pub struct State {
    login: Option<Arc<Login>>,
    /// One that may be alive, but could not be used for long.
    stale: Option<Arc<Login>>,
    /// Whom to ask for a session.
    pub master: Option<Target>,
    /// The hosts that the pool had when it was last logged into.
    pub hosts: Vec<Target>,
    pub generation: u64,
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
    direct: u32,
}

impl Core {
    /// Makes one that is not logged in.
    pub fn new(settings: Settings) -> Self {
        let master = Some(Target::new(settings.address.clone(), settings.trust.clone()));
        let state = State { master, ..State::default() };
        Self {
            settings,
            connections: Connections::default(),
            state: Mutex::new(state),
            changed: Condvar::new(),
            next: AtomicU64::new(1),
        }
    }

    pub fn state(&self) -> MutexGuard<'_, State> {
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
        cancel.sleep(self.settings.pause_after(failures.direct).min(self.settings.pause / 5), subject())
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

    /// Ends a session, if that is possible soon.
    pub fn farewell(&self, reference: &str, master: &Target) {
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

    /// Sends one call, and returns what is answered with the fingerprint of who answered.
    pub fn one<A: serde::Serialize>(
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
pub struct One<'a, A> {
    pub method: &'a str,
    pub arguments: &'a A,
    /// What no error may show.
    pub secret: &'a str,
    pub headers: &'a str,
    pub waits: bool,
}

/// Why one is not answered.
pub struct Refused {
    pub broken: Broken,
    /// Of the master's certificate, if a slave said so.
    pub thumbprint: Option<Fingerprint>,
}

/// Replaces what holds a secret.
fn hide(codes: Vec<String>, secret: &str) -> Vec<String> {
    let is_secret = |text: &str| !secret.is_empty() && text.contains(secret);
    codes.into_iter().map(|text| if is_secret(&text) { "(hidden)".to_owned() } else { text }).collect()
}
