//! What all threads of a simulated pool share.
//!
//! One lock is around the objects and what disks hold ([`State`]); nobody holds it while talking to a client or waiting. A
//! disk is read from a clone, which is cheap, and shares what it does not write. Files of an SR are written under it, so that
//! they always are what the objects say.

use crate::clock::Clock;
use crate::content::Content;
use crate::event;
use crate::failure::{Failure, Outcome};
use crate::fault::Faults;
use crate::file_sr::FileSr;
use crate::line::Line;
use crate::log::Log;
use crate::nbd;
use crate::node::Nodes;
use crate::scene::Settings;
use crate::schema::Class;
use crate::session::Sessions;
use crate::store::Store;
use crate::task::Tasks;
use crate::value::{Reference, Value};
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// The longest that who waits for a change sleeps before looking around.
const LOOK: Duration = Duration::from_secs(1);

/// Objects and disks.
#[derive(Debug)]
pub struct State {
    /// All objects.
    pub store: Store,
    /// What VDIs hold.
    pub disks: BTreeMap<Reference, Content>,
    /// The folders of the SRs that keep files.
    pub folders: BTreeMap<Reference, FileSr>,
    /// What VTPMs hold.
    pub tpms: BTreeMap<Reference, String>,
    /// What is known of sessions beside their records.
    pub sessions: Sessions,
    /// What is known of tasks beside their records.
    pub tasks: Tasks,
    /// The pool's time.
    pub clock: Clock,
    /// What the pool is like at present; tests change it.
    pub settings: Settings,
    /// The hosts in the order of the scene.
    pub hosts: Vec<Reference>,
    /// Who may log in, and with which password.
    pub credentials: (String, String),
}

/// A simulated pool.
pub struct World {
    state: Mutex<State>,
    changed: Condvar,
    /// What goes wrong on demand.
    pub faults: Faults,
    /// What was asked for and served.
    pub log: Log,
    /// The hosts as machines with addresses.
    pub nodes: Nodes,
    servers: Mutex<Vec<(nbd::Server, Option<Line>)>>,
    is_stopping: AtomicBool,
    threads: Mutex<Vec<JoinHandle<()>>>,
}

/// Exclusive access to the objects; who waits for changes is woken when it ends, if something may have changed.
pub struct Access<'a> {
    world: &'a World,
    state: MutexGuard<'a, State>,
    is_changed: bool,
}

impl std::ops::Deref for Access<'_> {
    type Target = State;

    fn deref(&self) -> &State {
        &self.state
    }
}

impl std::ops::DerefMut for Access<'_> {
    fn deref_mut(&mut self) -> &mut State {
        self.is_changed = true;
        &mut self.state
    }
}

impl Drop for Access<'_> {
    fn drop(&mut self) {
        if self.is_changed {
            self.world.changed.notify_all();
        }
    }
}

impl World {
    /// Returns a pool that nobody can reach yet.
    pub fn new(state: State, nodes: Nodes) -> World {
        World {
            state: Mutex::new(state),
            changed: Condvar::new(),
            faults: Faults::default(),
            log: Log::default(),
            nodes,
            servers: Mutex::default(),
            is_stopping: AtomicBool::new(false),
            threads: Mutex::new(Vec::new()),
        }
    }

    /// Waits for access to the objects.
    pub fn lock(&self) -> Access<'_> {
        Access { world: self, state: self.state.lock().unwrap_or_else(PoisonError::into_inner), is_changed: false }
    }

    /// Returns whether the simulation ends.
    pub fn is_stopping(&self) -> bool {
        self.is_stopping.load(Ordering::Relaxed)
    }

    /// Waits until `done` gives an answer, and looks after each change; `None` if `timeout` passes or the simulation ends.
    pub fn wait_until<T>(&self, timeout: Duration, mut done: impl FnMut(&mut State) -> Option<T>) -> Option<T> {
        let deadline = Instant::now().checked_add(timeout);
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            if let Some(answer) = done(&mut state) {
                return Some(answer);
            }
            let left = deadline.map_or(LOOK, |deadline| deadline.saturating_duration_since(Instant::now()));
            if left.is_zero() || self.is_stopping() {
                return None;
            }
            state = self.changed.wait_timeout(state, left.min(LOOK)).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Sleeps; shorter if the simulation ends.
    pub fn pause(&self, duration: Duration) {
        self.wait_until(duration, |_| None::<()>);
    }

    /// Runs something beside; the simulation's end waits for it.
    pub fn spawn(self: &Arc<Self>, work: impl FnOnce(&Arc<World>) + Send + 'static) {
        let world = Arc::clone(self);
        let thread = std::thread::spawn(move || work(&world));
        let mut threads = self.threads.lock().unwrap_or_else(PoisonError::into_inner);
        threads.retain(|thread| !thread.is_finished());
        threads.push(thread);
    }

    /// Adds the NBD server of the next host, and the line to it, if it is a long one.
    pub fn add_server(&self, server: nbd::Server, line: Option<Line>) {
        self.servers.lock().unwrap_or_else(PoisonError::into_inner).push((server, line));
    }

    /// Cuts the NBD connections of a host.
    pub fn cut_disks(&self, host: usize) {
        if let Some((server, _)) = self.servers.lock().unwrap_or_else(PoisonError::into_inner).get(host) {
            server.cut();
        }
    }

    /// Ends all connections and waits for all threads.
    pub fn stop(&self) {
        {
            // Under the lock, so that who is about to wait for a change sees it or is woken.
            let _access = self.lock();
            self.is_stopping.store(true, Ordering::Relaxed);
        }
        self.changed.notify_all();
        // Not under the lock: connections that end look for it.
        let servers = std::mem::take(&mut *self.servers.lock().unwrap_or_else(PoisonError::into_inner));
        drop(servers);
        self.nodes.close();
        loop {
            let threads = std::mem::take(&mut *self.threads.lock().unwrap_or_else(PoisonError::into_inner));
            if threads.is_empty() {
                return;
            }
            // A connection that was accepted meanwhile.
            self.nodes.close();
            for thread in threads {
                if thread.join().is_err() {
                    eprintln!("xapi-simulator: a thread panicked");
                }
            }
        }
    }

    /// Blocks until something that `subscriptions` are about changed after `token`, or for `timeout`.
    ///
    /// # Errors
    /// `SESSION_INVALID` also when the session ends meanwhile.
    pub fn events(
        &self,
        session: &Reference,
        subscriptions: &[event::Subscription],
        token: u64,
        timeout: Duration,
    ) -> Outcome<Value> {
        let answer = |state: &mut State| {
            if !state.sessions.has(session) {
                return Some(Err(Failure::session(session.as_str())));
            }
            let events = event::since(&state.store, subscriptions, token);
            (!events.is_empty()).then(|| Ok(event::answer(&state.store, events)))
        };
        let deadline = Instant::now().checked_add(timeout);
        let first = self.wait_until(timeout, answer);
        let batching = self.lock().settings.event_batching;
        if matches!(first, Some(Ok(_))) && !event::are_about_tasks(subscriptions) {
            let left = deadline.map_or(batching, |deadline| deadline.saturating_duration_since(Instant::now()));
            self.pause(batching.min(left));
        }
        let mut access = self.lock();
        match (first, answer(&mut access)) {
            (_, Some(now)) => now,
            (Some(first), None) => first,
            (None, None) => Ok(event::answer(&access.store, Vec::new())),
        }
    }
}

impl State {
    /// Returns the pool object.
    pub fn pool(&self) -> Reference {
        self.store.all(Class::Pool).next().map_or_else(Reference::null, |(pool, _)| pool.clone())
    }

    /// Returns the pool's master.
    pub fn master(&self) -> Reference {
        self.store.reference(Class::Pool, &self.pool(), "master").unwrap_or_else(|_| Reference::null())
    }

    /// Returns the position of a host in the scene.
    pub fn position(&self, host: &Reference) -> Option<usize> {
        self.hosts.iter().position(|known| known == host)
    }

    /// Returns the control domain of a host.
    pub fn control_domain(&self, host: &Reference) -> Reference {
        self.store.reference(Class::Host, host, "control_domain").unwrap_or_else(|_| Reference::null())
    }

    /// Returns the hosts that see an SR: those with an attached PBD.
    pub fn hosts_of(&self, sr: &Reference) -> Vec<Reference> {
        let pbds = self.store.references(Class::Sr, sr, "PBDs").unwrap_or_default();
        pbds.iter()
            .filter(|pbd| self.store.flag(Class::Pbd, pbd, "currently_attached") == Ok(true))
            .filter_map(|pbd| self.store.reference(Class::Pbd, pbd, "host").ok())
            .collect()
    }
}
