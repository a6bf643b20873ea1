//! The workers of a mount: not more than so many at a time, and none that nobody needs.
//!
//! A volume keeps its worker between requests, in its *seat*. When all seats are taken, the one not used for longest gives
//! its worker up, unless it is at work; the volume starts another when it is asked again, and nobody notices.
//!
//! Who waits for a seat or for a worker waits as long as a request may, since those before him may each take their time.

use std::path::PathBuf;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError, Weak};
use std::thread;
use std::time::{Duration, Instant};

use disk::Disk;
use guest::Survey;

use super::check;
use super::error::{Error, Result};
use super::process::{Failure, Patience, Process};
use super::protocol::{Frame, Message, Request};

/// How long a worker may be without work.
const IDLE: Duration = Duration::from_secs(60);

/// After what time a worker is replaced: before the system ends it for all that it computed.
const LIFE: Duration = Duration::from_secs(50 * 60);

/// How often idle workers are looked for.
const ROUND: Duration = Duration::from_secs(5);

/// How long a worker may work for one request.
const PATIENCE: Duration = Duration::from_secs(20);

/// Workers at a time, unless it is said otherwise. Each may have 1 GiB of address space, and takes some 10 to 200 MiB.
pub const WORKERS: u16 = 16;

/// Starts workers and ends them.
#[derive(Debug)]
pub struct Workers {
    program: PathBuf,
    limit: u16,
    patience: Duration,
    /// How long a request may wait for what others use; for ever without it.
    wait: Option<Duration>,
    state: Mutex<State>,
    /// A worker was ended, or is without work.
    freed: Condvar,
    below: OnceLock<Arc<Workers>>,
}

#[derive(Debug, Default)]
struct State {
    running: u16,
    /// How often a worker ended, or was left without work.
    changes: u64,
    seats: Vec<Weak<Seat>>,
    /// Whether a thread looks for those that are idle.
    is_watched: bool,
}

/// Where a volume keeps its worker.
#[derive(Debug, Default)]
pub(super) struct Seat {
    place: Mutex<Place>,
    /// The worker is no more at work.
    left: Condvar,
}

#[derive(Debug, Default)]
enum Place {
    #[default]
    Empty,
    Resting(Seated),
    AtWork,
}

/// The right to the worker of a seat. Dropped, the seat has the worker that rests then.
struct Turn<'a> {
    seat: &'a Seat,
    rests: Option<Seated>,
}

#[derive(Debug)]
struct Seated {
    worker: Hired,
    used: Instant,
}

/// A worker that counts; dropped, it is ended.
#[derive(Debug)]
pub(super) struct Hired {
    process: Option<Process>,
    since: Instant,
    workers: Arc<Workers>,
}

impl Workers {
    /// Makes workers of this program, at most `limit` at a time (at least one). A request waits at most `wait` for one that others
    /// use, and for ever without that.
    #[must_use]
    pub fn new(limit: u16, wait: Option<Duration>) -> Arc<Self> {
        // Not by a name: the program may have been exchanged meanwhile.
        Self::of_program(PathBuf::from("/proc/self/exe"), limit, PATIENCE, wait)
    }

    /// Makes workers of a program, which may work for `patience` for each request.
    #[must_use]
    pub fn of_program(program: PathBuf, limit: u16, patience: Duration, wait: Option<Duration>) -> Arc<Self> {
        Arc::new(Self {
            program,
            limit: limit.max(1),
            patience,
            wait,
            state: Mutex::default(),
            freed: Condvar::new(),
            below: OnceLock::new(),
        })
    }

    /// Returns the workers of layers that stand on `height` layers, themselves counted (from 1 on).
    ///
    /// What is read for a worker may need another that reads the layer below. Waited for among the same ones, it might never
    /// come; among these it does, since those of a layer wait only for those of lower ones.
    #[must_use]
    pub fn below(self: &Arc<Self>, height: usize) -> Arc<Self> {
        let mut workers = self.clone();
        for _ in 0..height {
            let next = || Self::of_program(workers.program.clone(), workers.limit, workers.patience, workers.wait);
            let below = workers.below.get_or_init(next).clone();
            workers = below;
        }
        workers
    }

    /// Returns how long workers may work for one request.
    pub(super) fn patience(&self) -> Patience {
        Patience::new(self.patience)
    }

    /// Returns the volumes on disks, each given with its name.
    ///
    /// # Errors
    /// If a disk cannot be read, or the worker fails.
    pub fn survey(self: &Arc<Self>, disks: &[(String, Arc<dyn Disk>)]) -> Result<Survey> {
        let sizes = disks.iter().map(|(name, disk)| (name.clone(), disk.size())).collect();
        let disks: Vec<_> = disks.iter().map(|(_, disk)| disk.clone()).collect();
        let mut worker = self.hire()?;
        match worker.process().ask(&Request::Survey(sizes), &disks, &self.patience()) {
            Ok(Frame::Message(Message::Survey(survey))) => check::survey(survey),
            Ok(_) => Err(Error::Worker("the worker that looked for volumes answered something else".to_owned())),
            Err(Failure::Answered(error)) => Err(error),
            Err(Failure::Broken(why, _)) => {
                Err(Error::Worker(format!("the worker that looked for volumes failed: {why}")))
            }
        }
    }

    /// Returns how many there are now, those of layers with them.
    #[must_use]
    pub fn running(&self) -> u16 {
        let below = self.below.get().map_or(0, |below| below.running());
        self.state().running.saturating_add(below)
    }

    /// Starts a worker, as soon as there may be one more.
    pub(super) fn hire(self: &Arc<Self>) -> Result<Hired> {
        let until = self.wait.map(|wait| Instant::now() + wait);
        let mut state = self.state();
        while state.running >= self.limit {
            if until.is_some_and(|until| until <= Instant::now()) {
                return Err(Error::Worker(format!("all {} workers are at work for others", self.limit)));
            }
            let (seats, changes) = (state.seats(), state.changes);
            drop(state);
            // Without the lock, which is taken where a worker ends: here, or with the last hold of a seat.
            drop(longest_unused(&seats));
            drop(seats);
            state = self.state();
            if state.changes == changes {
                let left = until.map_or(ROUND, |until| until.saturating_duration_since(Instant::now()).min(ROUND));
                state = self.freed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
            }
        }
        state.running += 1;
        drop(state);
        self.watch();
        // Counted from here on: what fails below is uncounted again.
        let mut hired = Hired { process: None, since: Instant::now(), workers: self.clone() };
        hired.process = Some(Process::start(&self.program, self.patience)?);
        Ok(hired)
    }

    pub(super) fn seat(&self) -> Arc<Seat> {
        let seat = Arc::<Seat>::default();
        let mut state = self.state();
        state.seats.retain(|seat| seat.strong_count() > 0);
        state.seats.push(Arc::downgrade(&seat));
        seat
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn change(&self, act: impl FnOnce(&mut State)) {
        let mut state = self.state();
        act(&mut state);
        state.changes += 1;
        drop(state);
        self.freed.notify_all();
    }

    /// Sees to it that workers end that nobody needs.
    fn watch(self: &Arc<Self>) {
        if std::mem::replace(&mut self.state().is_watched, true) {
            return;
        }
        let workers = Arc::downgrade(self);
        let watch = move || {
            loop {
                thread::sleep(ROUND);
                let Some(workers) = workers.upgrade() else { return };
                let seats = workers.state().seats();
                // Not under the lock of the state, which is taken when one ends.
                seats.iter().for_each(|seat| drop(seat.retire(IDLE)));
                drop(seats);
                let mut state = workers.state();
                if state.running == 0 {
                    state.is_watched = false;
                    return;
                }
            }
        };
        if let Err(error) = thread::Builder::new().name("xofs-workers".to_owned()).spawn(watch) {
            tracing::warn!(%error, "no thread could be made that ends idle workers: they stay");
        }
    }
}

impl State {
    fn seats(&self) -> Vec<Arc<Seat>> {
        self.seats.iter().filter_map(Weak::upgrade).collect()
    }
}

/// Takes the worker that rests for longest, if any rests.
fn longest_unused(seats: &[Arc<Seat>]) -> Option<Hired> {
    let resting = seats.iter().filter_map(|seat| {
        let Place::Resting(seated) = &*seat.place() else { return None };
        Some((seated.used, seat))
    });
    let (_, seat) = resting.min_by_key(|(used, _)| *used)?;
    seat.retire(Duration::ZERO)
}

impl Seat {
    /// Has `act` done with the worker that sits here, or a new one that `prepare` is done with; the worker stays if `act` says so.
    pub(super) fn work<T>(
        &self,
        workers: &Arc<Workers>,
        prepare: impl FnOnce(&mut Process) -> Result<()>,
        act: impl FnOnce(&mut Process, bool) -> (T, bool),
    ) -> Result<T> {
        let mut turn = self.turn(workers.wait)?;
        // One thread has no more time on processors than has passed.
        let (mut worker, is_new) = match turn.rests.take().filter(|seated| seated.worker.since.elapsed() < LIFE) {
            Some(seated) => (seated.worker, false),
            None => {
                let mut hired = workers.hire()?;
                prepare(hired.process())?;
                (hired, true)
            }
        };
        let (result, stays) = act(worker.process(), is_new);
        if stays {
            turn.rests = Some(Seated { worker, used: Instant::now() });
            drop(turn);
            workers.change(|_| {});
        }
        Ok(result)
    }

    fn place(&self) -> MutexGuard<'_, Place> {
        self.place.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until nobody else has its worker at work.
    fn turn(&self, wait: Option<Duration>) -> Result<Turn<'_>> {
        let until = wait.map(|wait| Instant::now() + wait);
        let mut place = self.place();
        loop {
            match std::mem::replace(&mut *place, Place::AtWork) {
                Place::Empty => return Ok(Turn { seat: self, rests: None }),
                Place::Resting(seated) => return Ok(Turn { seat: self, rests: Some(seated) }),
                Place::AtWork => {}
            }
            place = match until.map(|until| until.saturating_duration_since(Instant::now())) {
                None => self.left.wait(place).unwrap_or_else(PoisonError::into_inner),
                Some(Duration::ZERO) => return Err(Error::Worker("its worker is at work for others".to_owned())),
                Some(left) => self.left.wait_timeout(place, left).unwrap_or_else(PoisonError::into_inner).0,
            };
        }
    }

    /// Takes its worker if that has been without work for `age`.
    fn retire(&self, age: Duration) -> Option<Hired> {
        let mut place = self.place();
        match std::mem::take(&mut *place) {
            Place::Resting(seated) if seated.used.elapsed() >= age => Some(seated.worker),
            other => {
                *place = other;
                None
            }
        }
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        *self.seat.place() = self.rests.take().map_or(Place::Empty, Place::Resting);
        self.seat.left.notify_one();
    }
}

impl Hired {
    pub(super) fn process(&mut self) -> &mut Process {
        self.process.as_mut().expect("set before it is handed out")
    }
}

impl Drop for Hired {
    fn drop(&mut self) {
        drop(self.process.take());
        self.workers.change(|state| state.running -= 1);
    }
}
