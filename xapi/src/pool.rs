//! A pool: what it takes to connect to one, and handles of the session with it.

use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use serde::de::DeserializeOwned;
use serde_json::Value;
use zeroize::Zeroizing;

use crate::keeper::Keeper;
use crate::session::Core;
use crate::{Address, Cancel, Error, ErrorKind, Fingerprint, Ref, Result, Task, Trust};

/// How a pool is connected to.
#[derive(Clone)]
pub struct Settings {
    /// Any host of the pool; a slave names the master.
    pub address: Address,
    /// A user of the pool.
    pub user: String,
    /// Its password.
    pub password: Zeroizing<String>,
    /// By what the host at `address` is recognised, if the connection is encrypted.
    pub trust: Trust,
    /// What the pool calls us in its lists of sessions and in its limits: letters, digits, `-`, `.`, `/`.
    pub originator: String,
    /// How long a call may take.
    pub patience: Duration,
    /// How long nothing may come in a transfer that has begun, or be taken.
    pub silence: Duration,
    /// How long a pool that is not there, or starts, is waited for once it was logged into.
    pub outage: Duration,
    /// How long at most is paused before something is tried again.
    pub pause: Duration,
    /// From which age on the progress of a task is kept moving: XAPI drops tasks that are a day old and do not move.
    pub keepalive: Duration,
}

impl Settings {
    /// Returns those of a pool, with times that suit all.
    #[must_use]
    pub fn new(address: Address, user: &str, password: Zeroizing<String>, trust: Trust) -> Self {
        Self {
            address,
            user: user.to_owned(),
            password,
            trust,
            originator: "xofs".to_owned(),
            patience: Duration::from_secs(600),
            silence: Duration::from_secs(300),
            outage: Duration::from_secs(300),
            pause: Duration::from_secs(5),
            keepalive: Duration::from_secs(23 * 3600),
        }
    }

    /// Returns how long is paused before something is tried again that was tried again `tried` times: much passes soon.
    pub(crate) fn pause_after(&self, tried: u32) -> Duration {
        (self.pause / 250 * (1 << tried.min(8))).min(self.pause)
    }
}

impl std::fmt::Debug for Settings {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Settings").field("address", &self.address).field("user", &self.user).finish_non_exhaustive()
    }
}

/// A handle of the session with a pool, with the token that stops what is done by it.
///
/// The last one that is dropped logs out, which may take five seconds.
#[derive(Clone)]
pub struct Pool {
    pub(crate) core: Arc<Core>,
    pub(crate) cancel: Cancel,
    pub(crate) session: Arc<Session>,
    /// What the names of our tasks begin with.
    mark: Arc<str>,
}

/// Ends with the last handle.
pub(crate) struct Session {
    core: Arc<Core>,
    pub keeper: Arc<Keeper>,
    thread: Option<JoinHandle<()>>,
}

impl Drop for Session {
    fn drop(&mut self) {
        self.keeper.stop();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
        self.core.log_out();
    }
}

impl std::fmt::Debug for Pool {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Pool").field("settings", &self.core.settings).finish_non_exhaustive()
    }
}

impl Pool {
    /// Logs into a pool. A host that is a slave is left for its master; one that still starts is waited for.
    ///
    /// # Errors
    /// [`ErrorKind::Unreachable`], [`ErrorKind::Untrusted`] (with the fingerprint seen), [`ErrorKind::Credentials`], ...
    pub fn connect(settings: Settings, cancel: &Cancel) -> Result<Self> {
        let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-./_".contains(&byte);
        if settings.originator.is_empty() || !settings.originator.bytes().all(is_plain) {
            let reason = "the originator consists of letters, digits and '-./_'";
            return Err(Error::new(ErrorKind::OutOfRange, &settings.address, reason));
        }
        let core = Arc::new(Core::new(settings));
        core.login(cancel)?;
        let keeper = Arc::new(Keeper::default());
        let (of_thread, pool) = (keeper.clone(), core.clone());
        // From here on an error logs out.
        let mut session = Session { core: core.clone(), keeper, thread: None };
        let thread = thread::Builder::new().name("xapi-keeper".to_owned()).spawn(move || of_thread.run(&pool));
        session.thread = Some(thread.map_err(|error| {
            let reason = format!("the system has no thread for it: {error}");
            Error::new(ErrorKind::Unreachable, &core.settings.address, reason)
        })?);
        let session = Arc::new(session);
        Ok(Self { core, cancel: cancel.clone(), session, mark: Arc::from("") })
    }

    /// Returns a handle of the same session that another token stops: what has to be cleaned up after a cancel needs one.
    #[must_use]
    pub fn with(&self, cancel: &Cancel) -> Self {
        Self { cancel: cancel.clone(), ..self.clone() }
    }

    /// Returns a handle of the same session whose tasks have names that begin with `mark`: so those of a run that died are
    /// found ([`Pool::destroy_task`]). Tasks of calls have names that the pool gives them.
    #[must_use]
    pub fn marked(&self, mark: &str) -> Self {
        Self { mark: Arc::from(mark), ..self.clone() }
    }

    /// Returns that mark; empty if there is none.
    #[must_use]
    pub fn mark(&self) -> &str {
        &self.mark
    }

    /// Returns the token.
    #[must_use]
    pub fn cancel(&self) -> &Cancel {
        &self.cancel
    }

    /// Returns the address that was asked for.
    #[must_use]
    pub fn address(&self) -> &Address {
        &self.core.settings.address
    }

    /// Returns the fingerprint of the master's certificate; `None` if the connection is not encrypted.
    #[must_use]
    pub fn fingerprint(&self) -> Option<Fingerprint> {
        self.core.fingerprint()
    }

    /// Returns a number that changes when the pool was logged into again: names of NBD exports hold only until then.
    #[must_use]
    pub fn generation(&self) -> u64 {
        self.core.generation()
    }

    /// Calls `method` (`VM.get_record`) with arguments, without the session, which comes first by itself.
    ///
    /// What only reads is repeated when a connection breaks. What may change something never is, unless nothing was done.
    ///
    /// # Errors
    /// What the pool says; [`ErrorKind::Unknown`] if it may or may not have been done, as also after
    /// [`ErrorKind::Cancelled`]; [`ErrorKind::Protocol`] if the result is no `T`.
    pub fn call<T: DeserializeOwned>(&self, method: &str, arguments: &[Value]) -> Result<T> {
        let value = self.core.call(method, arguments, &self.cancel)?;
        serde_json::from_value(value).map_err(|error| {
            let reason = format!("what it answered is not what was expected: {error}");
            Error::new(ErrorKind::Protocol, self.subject(method), reason)
        })
    }

    /// Calls `method`, which has no result.
    ///
    /// # Errors
    /// As [`Pool::call`].
    pub fn act(&self, method: &str, arguments: &[Value]) -> Result<()> {
        self.core.call(method, arguments, &self.cancel).map(|_| ())
    }

    /// Calls `method` as a task of the pool; its outcome is that of the task. It has to be a method that has this form
    /// (`Async.`).
    ///
    /// # Errors
    /// As [`Pool::call`].
    pub fn call_async(&self, method: &str, arguments: &[Value]) -> Result<Task> {
        let reference: Ref<crate::record::TaskObject> = self.call(&format!("Async.{method}"), arguments)?;
        Ok(Task::adopt(self, reference, method))
    }

    /// Calls `method` as a task, and waits for it.
    ///
    /// # Errors
    /// As [`Pool::call`] and [`Task::wait`].
    pub fn run(&self, method: &str, arguments: &[Value]) -> Result<crate::Outcome> {
        let task = self.call_async(method, arguments)?;
        task.wait(&self.cancel)
    }

    /// Names a call in errors.
    pub(crate) fn subject(&self, what: &str) -> String {
        format!("{what} at {}", self.core.settings.address)
    }
}
