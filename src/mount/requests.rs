//! The requests under way, each with its reply, so that a request can be answered although its work is stuck.
//!
//! A reply is taken by who answers first: the work when it is done, or the watcher at the deadline or at a signal. The
//! loser's answer is dropped. What the work reads into belongs to the work, so an early answer frees nothing that a stuck
//! system call may still write to.

use std::collections::HashMap;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::errno::Errno;
use super::transport::{Ctx, Reply, Sink};

/// For how long the watcher stays awake after the last request, so that not every request wakes it.
const LINGER: Duration = Duration::from_secs(1);

/// A request under way, as the watcher sees it.
#[derive(Debug, Clone, Copy)]
pub(super) struct Waiting {
    /// Number of the request.
    pub(super) unique: u64,
    /// Process that waits; 0 if it is not visible from here.
    pub(super) pid: u32,
    /// What it is about.
    pub(super) inode: u64,
    /// When it came.
    pub(super) since: Instant,
}

/// The table of requests under way.
#[derive(Default)]
pub(super) struct Requests {
    state: Mutex<State>,
    /// Wakes the watcher, which sleeps while nothing is under way.
    woken: Condvar,
}

#[derive(Default)]
struct State {
    entries: HashMap<u64, Entry>,
    is_watcher_asleep: bool,
    last: Option<Instant>,
    is_closed: bool,
}

struct Entry {
    waiting: Waiting,
    reply: Arc<dyn Answer>,
}

/// A reply of any type, as far as an error goes.
trait Answer: Send + Sync {
    /// Answers with an error, unless it was answered.
    fn fail(&self, errno: Errno);
}

/// A reply that two may give.
struct Parked<A: ?Sized>(Mutex<Option<Reply<A>>>);

impl<A: ?Sized> Parked<A> {
    fn take(&self) -> Option<Reply<A>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

impl<A: ?Sized> Answer for Parked<A> {
    fn fail(&self, errno: Errno) {
        if let Some(reply) = self.take() {
            reply.error(errno);
        }
    }
}

/// What the work answers through.
struct ParkedSink<A: ?Sized, H> {
    parked: Arc<Parked<A>>,
    requests: Arc<Requests>,
    unique: u64,
    is_claimed: bool,
    held: Option<H>,
}

impl<A: ?Sized, H: Send> Sink<A> for ParkedSink<A, H> {
    fn claim(&mut self) -> bool {
        self.is_claimed = self.is_claimed || self.requests.remove(self.unique, &self.parked);
        self.is_claimed
    }

    fn send(mut self: Box<Self>, answer: Result<&A, Errno>) {
        drop(self.held.take());
        // Removed before it is answered: then the kernel may give the number to another request.
        if !self.claim() {
            return;
        }
        match (self.parked.take(), answer) {
            (Some(reply), Ok(answer)) => reply.ok(answer),
            (Some(reply), Err(errno)) => reply.error(errno),
            (None, _) => {}
        }
    }
}

impl Requests {
    /// Parks a reply; returns the one that the work is to answer. What is `held` is dropped just before that.
    pub(super) fn park<A: ?Sized + 'static>(
        self: &Arc<Self>,
        ctx: Ctx,
        inode: u64,
        reply: Reply<A>,
        held: Option<impl Send + 'static>,
    ) -> Reply<A> {
        let parked = Arc::new(Parked(Mutex::new(Some(reply))));
        let waiting = Waiting { unique: ctx.unique, pid: ctx.pid, inode, since: Instant::now() };
        let mut state = self.state();
        state.last = Some(waiting.since);
        state.entries.insert(ctx.unique, Entry { waiting, reply: parked.clone() });
        let wake = std::mem::take(&mut state.is_watcher_asleep);
        drop(state);
        if wake {
            self.woken.notify_one();
        }
        Reply::new(ParkedSink { parked, requests: self.clone(), unique: ctx.unique, is_claimed: false, held })
    }

    /// Removes what the work answers; false if it was answered already.
    fn remove<A: ?Sized>(&self, unique: u64, parked: &Arc<Parked<A>>) -> bool {
        let mut state = self.state();
        let is_own = state
            .entries
            .get(&unique)
            .is_some_and(|entry| std::ptr::addr_eq(Arc::as_ptr(&entry.reply), Arc::as_ptr(parked)));
        let removed = if is_own { state.entries.remove(&unique) } else { None };
        drop(state);
        removed.is_some()
    }

    /// Answers a request with an error in place of its work, which goes on; before, so that who waits finds it noted,
    /// does `note`. Does neither if it was answered meanwhile.
    pub(super) fn fail(&self, waiting: &Waiting, errno: Errno, note: impl FnOnce()) {
        let mut state = self.state();
        let is_same = state.entries.get(&waiting.unique).is_some_and(|entry| entry.waiting.since == waiting.since);
        let entry = if is_same { state.entries.remove(&waiting.unique) } else { None };
        drop(state);
        if let Some(entry) = entry {
            note();
            entry.reply.fail(errno);
        }
    }

    /// Returns whether a request of that number waits.
    pub(super) fn is_waiting(&self, ctx: Ctx) -> bool {
        self.state().entries.contains_key(&ctx.unique)
    }

    /// Returns the requests that wait for at least `age`, the oldest first.
    pub(super) fn older_than(&self, age: Duration) -> Vec<Waiting> {
        let now = Instant::now();
        let state = self.state();
        let is_old = |entry: &&Entry| now.duration_since(entry.waiting.since) >= age;
        let mut old: Vec<Waiting> = state.entries.values().filter(is_old).map(|entry| entry.waiting).collect();
        drop(state);
        old.sort_unstable_by_key(|waiting| waiting.since);
        old
    }

    /// Waits for the watcher's next turn: `tick` while requests are under way or the watcher is busy, else until there is
    /// one. Returns false when the table was closed.
    pub(super) fn wait(&self, tick: Duration, is_busy: bool) -> bool {
        let mut state = self.state();
        let is_quiet = !is_busy && state.entries.is_empty() && state.last.is_none_or(|last| last.elapsed() >= LINGER);
        if is_quiet {
            state.is_watcher_asleep = true;
            while state.is_watcher_asleep && !state.is_closed {
                state = self.woken.wait(state).unwrap_or_else(PoisonError::into_inner);
            }
        }
        if !state.is_closed {
            state = self.woken.wait_timeout(state, tick).unwrap_or_else(PoisonError::into_inner).0;
        }
        !state.is_closed
    }

    /// Ends [`Requests::wait`].
    pub(super) fn close(&self) {
        self.state().is_closed = true;
        self.woken.notify_all();
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::super::transport::tests::Recorder;
    use super::*;

    const NOTHING: Option<()> = None;

    fn ctx(unique: u64) -> Ctx {
        Ctx { unique, pid: 0 }
    }

    #[test]
    fn a_request_is_answered_once_by_who_comes_first() {
        let requests = Arc::<Requests>::default();
        let (sender, receiver) = mpsc::channel();
        let reply = requests.park(ctx(1), 9, Reply::new(Recorder(sender.clone())), NOTHING);
        reply.ok(&5);
        assert!(requests.older_than(Duration::ZERO).is_empty());

        let late = requests.park(ctx(2), 9, Reply::new(Recorder(sender.clone())), NOTHING);
        let waiting = requests.older_than(Duration::ZERO)[0];
        assert_eq!((waiting.unique, waiting.inode), (2, 9));
        let noted = std::cell::Cell::new(0);
        requests.fail(&waiting, Errno::IO, || noted.set(noted.get() + 1));
        requests.fail(&waiting, Errno::IO, || noted.set(noted.get() + 1));
        assert_eq!(noted.get(), 1);
        // The kernel gives the number to another request, which the late answer must not touch.
        let next = requests.park(ctx(2), 9, Reply::new(Recorder(sender.clone())), NOTHING);
        late.ok(&6);
        assert!(requests.is_waiting(ctx(2)));
        next.ok(&7);
        drop(requests.park(ctx(3), 9, Reply::new(Recorder(sender)), NOTHING));
        assert_eq!(receiver.iter().collect::<Vec<_>>(), [Ok(5), Err(Errno::IO), Ok(7), Err(Errno::IO)]);
        assert!(requests.older_than(Duration::ZERO).is_empty());
    }

    #[test]
    fn who_claims_a_request_is_the_one_who_answers_it() {
        let requests = Arc::<Requests>::default();
        let (sender, receiver) = mpsc::channel();
        let mut won = requests.park(ctx(1), 9, Reply::new(Recorder(sender.clone())), NOTHING);
        let mut lost = requests.park(ctx(2), 9, Reply::new(Recorder(sender)), NOTHING);
        assert!(won.claim() && won.claim());
        for waiting in requests.older_than(Duration::ZERO) {
            requests.fail(&waiting, Errno::IO, || {});
        }
        assert!(!lost.claim());
        won.ok(&1);
        lost.ok(&2);
        assert_eq!(receiver.iter().collect::<Vec<_>>(), [Err(Errno::IO), Ok(1)]);
    }

    #[test]
    fn the_watcher_sleeps_until_a_request_comes() {
        let requests = Arc::<Requests>::default();
        let (sender, receiver) = mpsc::channel();
        let watcher = {
            let requests = requests.clone();
            std::thread::spawn(move || {
                while requests.wait(Duration::from_millis(1), false) {
                    let _ = sender.send(requests.older_than(Duration::ZERO).len());
                }
            })
        };
        assert!(receiver.recv_timeout(Duration::from_millis(100)).is_err());
        let (reply_sender, replies) = mpsc::channel();
        let reply = requests.park(ctx(1), 1, Reply::new(Recorder(reply_sender)), NOTHING);
        assert_eq!(receiver.recv_timeout(Duration::from_secs(5)), Ok(1));
        reply.ok(&1);
        assert_eq!(replies.recv(), Ok(Ok(1)));
        requests.close();
        watcher.join().unwrap();
    }
}
