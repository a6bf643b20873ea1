//! What all transfers share: who may, which task tells how it ended, which host it is sent to, and what befalls it on its way.
//!
//! Source: xen-api `ocaml/xapi/xapi_http.ml` (authentication, tasks), `importexport.ml` (redirects).

use super::connection::{Connection, Watch};
use super::request::Request;
use super::{Next, pages};
use crate::failure::{Failure, Outcome};
use crate::fault::{Act, Site};
use crate::log::Activity;
use crate::schema::Class;
use crate::upset;
use crate::value::{Reference, Value};
use crate::world::World;
use std::io::{self, Write};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How long to sleep before looking whether the client is still there.
const LOOK: Duration = Duration::from_millis(50);

/// A transfer that is let in.
pub struct Passage {
    world: Arc<World>,
    site: Site,
    /// Of what is transferred: names and uuids that faults may mean.
    names: Vec<String>,
    /// The task that tells how it ends.
    pub task: Reference,
    /// A session that was made for this transfer alone.
    own_session: Option<Reference>,
    /// Why it fails, if that is known.
    failure: Option<Failure>,
    is_cut: bool,
    /// How many bytes the rate of exports was kept for, and when the next may come.
    shaped: u64,
    due: Instant,
    percent: u64,
}

/// Lets a transfer in, or answers it and says what is next.
pub fn enter(
    world: &Arc<World>,
    connection: &mut Connection,
    request: &Request,
    site: Site,
) -> io::Result<Result<Passage, Next>> {
    let given_task = request.parameter("task_id").map(|task| Reference::from(task.as_str()));
    let (session, is_own) = match session(world, request) {
        Some(found) => found,
        None => {
            if let Some(task) = &given_task {
                finish(world, task, &Err(Failure::new("SESSION_AUTHENTICATION_FAILED", ["", ""])));
            }
            let field = [("WWW-Authenticate", "Basic realm=\"xapi\"")];
            pages::send_with(connection, 401, "Unauthorised", &field, "Log in first.")?;
            return Ok(Err(Next::Close));
        }
    };
    let task = {
        let mut access = world.lock();
        let state = &mut *access;
        match given_task.filter(|task| state.store.find(Class::Task, task).is_some()) {
            Some(task) => task,
            None => {
                let above =
                    request.parameter("subtask_of").map_or_else(Reference::null, |task| Reference::from(task.as_str()));
                state.tasks.create(&mut state.store, &state.clock, &session, &request.path, "", &above)
            }
        }
    };
    Ok(Ok(Passage {
        world: Arc::clone(world),
        site,
        names: Vec::new(),
        task,
        own_session: is_own.then_some(session),
        failure: None,
        is_cut: false,
        shaped: 0,
        due: Instant::now(),
        percent: 0,
    }))
}

impl Passage {
    /// Names what is transferred, for faults that are meant for it.
    pub fn concerns(&mut self, names: impl IntoIterator<Item = String>) {
        self.names.extend(names);
    }

    /// Is to be called before each piece: waits, or fails, as the pool's settings and faults want. `done` counts the bytes of
    /// the transfer before, `whole` all of them if that is known.
    ///
    /// # Errors
    /// If the transfer is to end here; [`end`](Self::end) knows why.
    pub fn pass(&mut self, watch: Option<&Watch>, done: u64, whole: Option<u64>) -> io::Result<()> {
        if self.world.is_stopping() {
            return Err(io::ErrorKind::Interrupted.into());
        }
        let names: Vec<&str> = self.names.iter().map(String::as_str).collect();
        match self.world.faults.at_transfer(&self.site, &names, done) {
            None | Some(Act::Bitmap(_)) => {}
            Some(Act::Fail(failure)) => return Err(self.fail(failure)),
            Some(Act::Cut | Act::Refuse) => {
                self.is_cut = true;
                return Err(self.fail(Failure::device()));
            }
            Some(Act::Delay(duration)) => self.wait(watch, duration)?,
            Some(Act::Upset(upset)) => upset::happen(&self.world, &upset),
        }
        if matches!(self.site, Site::Export | Site::ExportVm) {
            let rate = || {
                let rate = self.world.lock().settings.export_rate;
                rate.map(|rate| rate(self.world.log.now(Activity::Export)))
            };
            while rate() == Some(0) {
                self.wait(watch, LOOK)?;
            }
            if let Some(rate) = rate() {
                let bytes = done.saturating_sub(std::mem::replace(&mut self.shaped, done));
                // What was lost by a client that reads slowly is not made up for.
                self.due = self.due.max(Instant::now()) + time(bytes, rate);
                self.wait(watch, self.due.saturating_duration_since(Instant::now()))?;
            }
        }
        let percent = whole.and_then(|whole| done.saturating_mul(100).checked_div(whole)).unwrap_or(0);
        if percent > self.percent {
            self.percent = percent;
            // The transfer goes on without its task.
            let _gone = self.world.lock().store.set(Class::Task, &self.task, "progress", fraction(percent));
        }
        Ok(())
    }

    /// Ends the transfer if somebody has cancelled its task.
    ///
    /// # Errors
    /// If so.
    pub fn check_cancelled(&mut self) -> io::Result<()> {
        let cancelled = self.world.lock().tasks.check(&self.task);
        cancelled.map_err(|failure| self.fail(failure))
    }

    /// Notes why the transfer fails, and returns an error to leave it with.
    pub fn fail(&mut self, failure: Failure) -> io::Error {
        let error = io::Error::other(failure.code.clone());
        self.failure.get_or_insert(failure);
        error
    }

    /// Ends the task, and writes the page of the error into what was sent so far.
    pub fn end(mut self, connection: &mut Connection, outcome: Result<Value, io::Error>) -> Next {
        let outcome = outcome.map_err(|_| self.failure.take().unwrap_or_else(Failure::device));
        finish(&self.world, &self.task, &outcome);
        match outcome {
            Ok(_) => Next::Close,
            Err(_) if self.is_cut => Next::Cut,
            Err(failure) => {
                // The client may have gone.
                let _lost = pages::send_error(connection, &failure.to_list().join(": "));
                Next::Close
            }
        }
    }

    /// Refuses the transfer before it began.
    ///
    /// # Errors
    /// Of the connection.
    pub fn refuse(self, connection: &mut Connection, status: u16, reason: &str, failure: Failure) -> io::Result<Next> {
        let text = failure.to_list().join(": ");
        finish(&self.world, &self.task, &Err(failure));
        pages::send(connection, status, reason, &text)?;
        Ok(Next::Close)
    }

    /// Sends the client to a host that sees all of `repositories`, unless this is one.
    ///
    /// # Errors
    /// Of the connection.
    pub fn redirect(
        &mut self,
        connection: &mut Connection,
        host: usize,
        request: &Request,
        repositories: &[Reference],
    ) -> io::Result<Option<Next>> {
        let position = {
            let access = self.world.lock();
            let mut hosts = access.hosts.clone();
            for sr in repositories {
                let seeing = access.hosts_of(sr);
                hosts.retain(|host| seeing.contains(host));
            }
            if access.hosts.get(host).is_some_and(|here| hosts.contains(here)) {
                return Ok(None);
            }
            // Where none sees it, it fails here.
            match hosts.first().and_then(|host| access.position(host)) {
                Some(position) => position,
                None => return Ok(None),
            }
        };
        let node = &self.world.nodes.hosts[position];
        let port = self.world.nodes.ports.https;
        let location = format!("https://{}:{port}{}?{}", node.address, request.path, request.query);
        pages::send_with(connection, 302, "Found", &[("Location", &location)], "It is on another host.")?;
        Ok(Some(Next::Close))
    }

    fn wait(&self, watch: Option<&Watch>, duration: Duration) -> io::Result<()> {
        let until = Instant::now().checked_add(duration);
        loop {
            let left = until.map_or(LOOK, |until| until.saturating_duration_since(Instant::now()));
            if left.is_zero() {
                return Ok(());
            }
            if self.world.is_stopping() || watch.is_some_and(Watch::is_deserted) {
                return Err(io::ErrorKind::BrokenPipe.into());
            }
            self.world.pause(left.min(LOOK));
        }
    }
}

impl Drop for Passage {
    fn drop(&mut self) {
        if let Some(session) = &self.own_session {
            let mut access = self.world.lock();
            let state = &mut *access;
            state.sessions.close(&mut state.store, session);
        }
    }
}

/// Writes the head of an answer whose body ends with the connection.
pub fn send_head(to: &mut impl Write, version: &str, task: &Reference, fields: &[(&str, &str)]) -> io::Result<()> {
    let mut head = format!(
        "HTTP/{version} 200 OK\r\nConnection: close\r\nCache-Control: no-cache, no-store\r\ntask-id: {task}\r\n"
    );
    for (name, value) in fields {
        head.push_str(&format!("{name}: {value}\r\n"));
    }
    head.push_str("\r\n");
    to.write_all(head.as_bytes())?;
    to.flush()
}

/// Returns the session of a request, and whether it was made for it alone.
fn session(world: &Arc<World>, request: &Request) -> Option<(Reference, bool)> {
    let mut access = world.lock();
    let state = &mut *access;
    if let Some(given) = request.parameter("session_id") {
        let session = Reference::from(given.as_str());
        return state.sessions.note_use(&mut state.store, &state.clock, &session).then_some((session, false));
    }
    let (user, password) = request.credentials()?;
    if state.credentials != (user.clone(), password) {
        return None;
    }
    let host = state.master();
    Some((state.sessions.open(&mut state.store, &state.clock, &host, &user, "HTTP"), true))
}

fn finish(world: &World, task: &Reference, outcome: &Outcome<Value>) {
    let mut access = world.lock();
    let state = &mut *access;
    state.tasks.finish(&mut state.store, &state.clock, task, outcome);
}

/// Returns how long bytes take at a rate, in bytes a second.
fn time(bytes: u64, rate: u64) -> Duration {
    Duration::from_micros(bytes.saturating_mul(1_000_000).checked_div(rate).unwrap_or(0))
}

/// Returns whole percents as a task has its progress.
fn fraction(percent: u64) -> Value {
    Value::Float(f64::from(u8::try_from(percent.min(100)).unwrap_or(100)) / 100.0)
}
