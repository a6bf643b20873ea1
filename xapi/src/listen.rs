//! Listeners: who wants to hear of a class or an object, and one thread that asks the pool for exactly those.
//!
//! | what happens | then |
//! |---|---|
//! | a first listener of a class or object | what is there of it is told as added; the call under way is left for one that names it |
//! | its last listener goes | the call under way is left for one that does not name it |
//! | no listener is left | nothing is asked |
//! | the token is lost (another session, another master) | what is there now is compared with what was known |
//! | the pool counts another number of objects of a class than is known | the same, of this class alone |
//!
//! Locks: the state, which is held neither while the pool is asked nor while a listener is told.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use crate::cancel::TICK;
use crate::event::{Batch, Cursor, Event, Operation, poll};
use crate::record::Class;
use crate::{Cancel, Error, ErrorKind, Pool, Ref, Result};

/// How long one look at events waits for one.
const LOOK: Duration = Duration::from_secs(30);
/// How often at most a class is listed anew because its number of objects is not what is known.
const RECOUNT: Duration = Duration::from_secs(30);

/// What is listened to.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Subject(String);

impl Subject {
    /// All objects of a class.
    #[must_use]
    pub fn class<C: Class>() -> Self {
        Self(C::NAME.to_ascii_lowercase())
    }

    /// One object.
    #[must_use]
    pub fn object<C: Class>(reference: &Ref<C>) -> Self {
        Self(format!("{}/{}", C::NAME.to_ascii_lowercase(), reference.as_str()))
    }

    fn is_of(&self, event: &Event) -> bool {
        match self.0.split_once('/') {
            Some((class, reference)) => class == event.class && reference == event.reference,
            None => self.0 == event.class,
        }
    }
}

type Act = Arc<dyn Fn(&Event) + Send + Sync>;

struct Entry {
    subject: Subject,
    operations: BTreeSet<Operation>,
    act: Act,
    /// The objects that it was told of.
    known: HashSet<String>,
    /// When it was last told of all that is there; nothing if it has to be.
    listed: Option<Instant>,
}

#[derive(Default)]
struct State {
    listeners: BTreeMap<u64, Entry>,
    next: u64,
    /// Stops the call under way.
    call: Cancel,
    is_over: bool,
}

#[derive(Default)]
struct Hub {
    state: Mutex<State>,
    changed: Condvar,
}

/// The events of a pool. Asks nothing while nobody listens.
pub struct Events {
    hub: Arc<Hub>,
    thread: Option<JoinHandle<()>>,
}

/// Listens until it is dropped; may be told once more while it is.
pub struct Listener {
    hub: Arc<Hub>,
    id: u64,
}

impl std::fmt::Debug for Events {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Events").finish_non_exhaustive()
    }
}

impl std::fmt::Debug for Listener {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Listener").field("id", &self.id).finish_non_exhaustive()
    }
}

impl Pool {
    /// Returns what tells of changes, by a thread of its own, until it is dropped.
    ///
    /// # Errors
    /// [`ErrorKind::Unreachable`] if the system has no thread for it.
    pub fn events(&self) -> Result<Events> {
        let hub = Arc::new(Hub::default());
        let (of_thread, pool) = (hub.clone(), self.clone());
        let thread = thread::Builder::new().name("xapi-events".to_owned()).spawn(move || of_thread.run(&pool));
        let thread = thread.map_err(|error| Error::new(ErrorKind::Unreachable, self.subject("events"), error))?;
        Ok(Events { hub, thread: Some(thread) })
    }
}

impl Events {
    /// Has `act` told of the `operations` on a subject. What is there already is told as added.
    ///
    /// It is called in the thread of the events, and must not wait: the next event waits for it.
    pub fn listen(
        &self,
        subject: Subject,
        operations: &[Operation],
        act: impl Fn(&Event) + Send + Sync + 'static,
    ) -> Listener {
        let mut state = self.hub.state();
        state.next += 1;
        let id = state.next;
        let operations = operations.iter().copied().collect();
        let entry = Entry { subject, operations, act: Arc::new(act), known: HashSet::new(), listed: None };
        state.listeners.insert(id, entry);
        state.call.cancel();
        self.hub.changed.notify_all();
        Listener { hub: self.hub.clone(), id }
    }
}

impl Drop for Events {
    fn drop(&mut self) {
        {
            let mut state = self.hub.state();
            state.is_over = true;
            state.call.cancel();
        }
        self.hub.changed.notify_all();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        let mut state = self.hub.state();
        let Some(entry) = state.listeners.remove(&self.id) else { return };
        if !state.listeners.values().any(|other| other.subject == entry.subject) {
            state.call.cancel();
        }
    }
}

impl Hub {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn run(&self, pool: &Pool) {
        let mut cursor = Cursor::default();
        while let Some((subjects, is_new, call)) = self.next(pool) {
            let names: Vec<String> = subjects.iter().map(|subject| subject.0.clone()).collect();
            let mut fresh = Cursor::default();
            let used = if is_new { &mut fresh } else { &mut cursor };
            match poll(&pool.core, &names, used, LOOK, &call) {
                Ok(batch) if batch.is_fresh => {
                    self.list(&subjects, &batch, is_new);
                    // Else what changed of the others since is yet to be told.
                    if is_new && cursor.is_new() {
                        cursor = fresh;
                    }
                }
                Ok(batch) => {
                    batch.events.iter().for_each(|event| self.tell(event));
                    self.recount(&batch);
                }
                // Another set of subjects, or the end.
                Err(_) if call.is_cancelled() => {}
                Err(error) => {
                    tracing::warn!(%error, "the pool tells no events");
                    // A token stops it, or the next round.
                    let _ = call.sleep(pool.core.settings.pause, "events");
                }
            }
        }
    }

    /// Waits until there is something to ask. Returns what, whether it is to be listed, and what stops the call; nothing at
    /// the end.
    fn next(&self, pool: &Pool) -> Option<(Vec<Subject>, bool, Cancel)> {
        let mut state = self.state();
        loop {
            if state.is_over || pool.cancel.check("events").is_err() {
                return None;
            }
            let of = |entry: &Entry| entry.subject.clone();
            let subjects: BTreeSet<_> = state.listeners.values().map(of).collect();
            if subjects.is_empty() {
                state = self.changed.wait_timeout(state, TICK).unwrap_or_else(PoisonError::into_inner).0;
                continue;
            }
            let new: BTreeSet<_> = state.listeners.values().filter(|entry| entry.listed.is_none()).map(of).collect();
            state.call = pool.cancel.part(Duration::MAX);
            let is_new = !new.is_empty();
            let asked = if is_new { new } else { subjects }.into_iter().collect();
            return Some((asked, is_new, state.call.clone()));
        }
    }

    /// Tells of what is there, and of what is not any more: those who have to be told alone if `is_new`, else all.
    fn list(&self, subjects: &[Subject], batch: &Batch, is_new: bool) {
        let mut told: Vec<(Act, Event)> = Vec::new();
        let mut state = self.state();
        for entry in state.listeners.values_mut().filter(|entry| subjects.contains(&entry.subject)) {
            if is_new && entry.listed.is_some() {
                continue;
            }
            let there: Vec<_> = batch.events.iter().filter(|event| entry.subject.is_of(event)).collect();
            let references: HashSet<_> = there.iter().map(|event| &event.reference).collect();
            let gone: Vec<_> = entry.known.iter().filter(|known| !references.contains(known)).cloned().collect();
            let class = entry.subject.0.split('/').next().unwrap_or_default();
            let deleted = gone.into_iter().map(|reference| Event {
                class: class.to_owned(),
                operation: Operation::Delete,
                reference,
                snapshot: None,
            });
            let events: Vec<_> = deleted.chain(there.into_iter().cloned()).collect();
            told.extend(events.into_iter().filter_map(|event| entry.hear(event)));
            entry.listed = Some(Instant::now());
        }
        drop(state);
        told.iter().for_each(|(act, event)| act(event));
    }

    /// Has classes listed again of which the pool has another number of objects than is known: a deletion was lost.
    fn recount(&self, batch: &Batch) {
        for entry in self.state().listeners.values_mut() {
            let count = batch.counts.get(&entry.subject.0).copied();
            let is_old = entry.listed.is_some_and(|listed| listed.elapsed() >= RECOUNT);
            if is_old && count.is_some_and(|count| count != entry.known.len() as u64) {
                tracing::debug!(class = entry.subject.0, "the number of objects is not what is known");
                entry.listed = None;
            }
        }
    }

    /// Tells all who listen to it of an event.
    fn tell(&self, event: &Event) {
        let told: Vec<_> = {
            let mut state = self.state();
            let who = state.listeners.values_mut().filter(|entry| entry.subject.is_of(event));
            who.filter_map(|entry| entry.hear(event.clone())).collect()
        };
        told.iter().for_each(|(act, event)| act(event));
    }
}

impl Entry {
    /// Takes note of an event; returns what is to be told, as what it is to what is known.
    fn hear(&mut self, event: Event) -> Option<(Act, Event)> {
        let operation = match event.operation {
            Operation::Delete if !self.known.remove(&event.reference) => return None,
            Operation::Delete => Operation::Delete,
            _ if self.known.insert(event.reference.clone()) => Operation::Add,
            _ => Operation::Modify,
        };
        self.operations.contains(&operation).then(|| (self.act.clone(), Event { operation, ..event }))
    }
}
