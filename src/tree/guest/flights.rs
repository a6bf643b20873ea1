//! Work that is done once, however many want it at the same moment.

use std::collections::HashSet;
use std::hash::Hash;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

/// What is being worked on.
pub(super) struct Flights<K> {
    busy: Mutex<HashSet<K>>,
    landed: Condvar,
}

/// The right to work on something, until it is dropped.
pub(super) struct Flight<'a, K: Eq + Hash> {
    flights: &'a Flights<K>,
    key: K,
}

impl<K> Default for Flights<K> {
    fn default() -> Self {
        Self { busy: Mutex::default(), landed: Condvar::new() }
    }
}

impl<K: Clone + Eq + Hash> Flights<K> {
    /// Waits until nobody else works on it. What the other found is looked up then, before the work is done again.
    pub(super) fn begin(&self, key: &K) -> Flight<'_, K> {
        let mut busy = self.busy();
        while !busy.insert(key.clone()) {
            busy = self.landed.wait(busy).unwrap_or_else(PoisonError::into_inner);
        }
        Flight { flights: self, key: key.clone() }
    }
}

impl<K> Flights<K> {
    fn busy(&self) -> MutexGuard<'_, HashSet<K>> {
        self.busy.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<K: Eq + Hash> Drop for Flight<'_, K> {
    fn drop(&mut self) {
        self.flights.busy().remove(&self.key);
        self.flights.landed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};
    use std::thread;

    use super::*;

    #[test]
    fn one_at_a_time_works_on_the_same_and_all_get_their_turn() {
        let (flights, working, done) = (Flights::default(), AtomicU32::new(0), AtomicU32::new(0));
        thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| {
                    for _ in 0..200 {
                        let flight = flights.begin(&7);
                        assert_eq!(working.fetch_add(1, Ordering::SeqCst), 0);
                        working.fetch_sub(1, Ordering::SeqCst);
                        done.fetch_add(1, Ordering::SeqCst);
                        drop(flight);
                        drop(flights.begin(&8));
                    }
                });
            }
        });
        assert_eq!(done.load(Ordering::SeqCst), 1600);
    }
}
