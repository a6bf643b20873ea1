//! Threads that ask a storage several things at a time.
//!
//! How many there are at once is bounded for all who use the same crew; whoever has something to do also works himself,
//! so nobody waits for a thread. A thread that is free joins where something is left to do.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread::{Builder, Scope};

use storage::Storage;

/// Most threads over a network, where they wait: 1,000 files of three requests at 10 ms each take half a second.
const REMOTE: usize = 64;
/// Most threads for a disk of this machine.
const LOCAL: usize = 16;
/// Files of a disk of this machine that are worth a thread.
const LOCAL_FILES: usize = 8;

/// What one piece of work is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Work {
    /// A file or two.
    File,
    /// A folder with all that is in it.
    Folder,
}

/// The threads there may be.
pub(super) struct Crew {
    free: AtomicUsize,
    files_per_thread: usize,
}

/// A list of work in progress.
struct Job<'a, T, U, F> {
    crew: &'a Crew,
    items: &'a [T],
    act: F,
    next: AtomicUsize,
    running: AtomicUsize,
    items_per_thread: usize,
    done: Mutex<Vec<(usize, U)>>,
}

impl Crew {
    pub fn of(storage: &dyn Storage) -> Self {
        let (free, files_per_thread) =
            if storage.capabilities().is_remote { (REMOTE, 1) } else { (LOCAL, LOCAL_FILES) };
        Self { free: AtomicUsize::new(free), files_per_thread }
    }

    /// Does `act` to each item; the results are in the order of the items.
    pub fn each<T: Sync, U: Send>(&self, work: Work, items: &[T], act: impl Fn(&T) -> U + Sync) -> Vec<U> {
        let items_per_thread = if work == Work::File { self.files_per_thread } else { 1 };
        if items.len() <= items_per_thread {
            return items.iter().map(act).collect();
        }
        let (next, running) = (AtomicUsize::new(0), AtomicUsize::new(1));
        let done = Mutex::new(Vec::with_capacity(items.len()));
        let job = Job { crew: self, items, act, next, running, items_per_thread, done };
        std::thread::scope(|scope| job.work(scope));
        let mut done = job.done.into_inner().unwrap_or_else(PoisonError::into_inner);
        done.sort_unstable_by_key(|(index, _)| *index);
        done.into_iter().map(|(_, result)| result).collect()
    }

    fn take(&self) -> bool {
        self.free.fetch_update(Ordering::AcqRel, Ordering::Acquire, |free| free.checked_sub(1)).is_ok()
    }
}

/// A place in a crew that is taken, until dropped.
struct Place<'a>(&'a Crew);

impl Drop for Place<'_> {
    fn drop(&mut self) {
        self.0.free.fetch_add(1, Ordering::AcqRel);
    }
}

impl<T: Sync, U: Send, F: Fn(&T) -> U + Sync> Job<'_, T, U, F> {
    fn work<'scope>(&'scope self, scope: &'scope Scope<'scope, '_>) {
        loop {
            self.call_another(scope);
            let index = self.next.fetch_add(1, Ordering::Relaxed);
            let Some(item) = self.items.get(index) else { break };
            let result = (self.act)(item);
            self.done.lock().unwrap_or_else(PoisonError::into_inner).push((index, result));
        }
        self.running.fetch_sub(1, Ordering::Relaxed);
    }

    /// Starts another thread if that pays and one is free. Where the system refuses it, there are fewer.
    fn call_another<'scope>(&'scope self, scope: &'scope Scope<'scope, '_>) {
        let left = self.items.len().saturating_sub(self.next.load(Ordering::Relaxed));
        if left <= self.running.load(Ordering::Relaxed) * self.items_per_thread || !self.crew.take() {
            return;
        }
        let place = Place(self.crew);
        self.running.fetch_add(1, Ordering::Relaxed);
        let started = Builder::new().spawn_scoped(scope, move || {
            let _place = place;
            self.work(scope);
        });
        if started.is_err() {
            self.running.fetch_sub(1, Ordering::Relaxed);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Barrier};

    use storage::MemoryStorage;

    use super::*;

    #[test]
    fn results_are_in_the_order_of_the_items_also_of_work_within_work() {
        let crew = Crew::of(&MemoryStorage::new());
        let outer: Vec<usize> = (0..40).collect();
        let sums = crew.each(Work::Folder, &outer, |outer| {
            let inner: Vec<usize> = (0..*outer).collect();
            crew.each(Work::File, &inner, |inner| outer * inner)
        });
        for (outer, found) in sums.iter().enumerate() {
            assert_eq!(*found, (0..outer).map(|inner| outer * inner).collect::<Vec<_>>());
        }
        assert_eq!(crew.free.load(Ordering::Relaxed), LOCAL);
    }

    #[test]
    fn as_many_work_at_once_as_there_may_be_and_no_more() {
        let crew = Crew { free: AtomicUsize::new(3), files_per_thread: 1 };
        let all = Barrier::new(4);
        let (now, most) = (AtomicUsize::new(0), AtomicUsize::new(0));
        crew.each(Work::File, &[(); 40], |()| {
            most.fetch_max(now.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
            // Ends only if four are here.
            all.wait();
            now.fetch_sub(1, Ordering::SeqCst);
        });
        assert_eq!((most.into_inner(), crew.free.into_inner()), (4, 3));
    }

    #[test]
    fn a_panic_gives_its_place_back() {
        let crew = Arc::new(Crew { free: AtomicUsize::new(2), files_per_thread: 1 });
        let other = crew.clone();
        let ended = std::thread::spawn(move || other.each(Work::File, &[0; 9], |_| panic!("on purpose"))).join();
        assert!(ended.is_err());
        assert_eq!(crew.free.load(Ordering::Relaxed), 2);
    }
}
