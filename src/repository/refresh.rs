//! Something that is looked at again when it is old: by one at a time, while the others make do with what is known.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// How long one waits for another who is looking, if there is something older to show.
const PATIENCE: Duration = Duration::from_millis(500);

/// What is shown, `T`, and what only the one who looks needs, `K`.
pub(super) struct Refreshed<T, K> {
    state: Mutex<State<T>>,
    done: Condvar,
    known: Mutex<K>,
}

struct State<T> {
    shown: Option<T>,
    checked: Option<Instant>,
    looking_since: Option<Instant>,
}

impl<T, K: Default> Default for Refreshed<T, K> {
    fn default() -> Self {
        let state = State { shown: None, checked: None, looking_since: None };
        Self { state: Mutex::new(state), done: Condvar::new(), known: Mutex::default() }
    }
}

impl<T: Clone, K> Refreshed<T, K> {
    /// Returns what is shown now, however old, without looking or waiting.
    pub(super) fn shown(&self) -> Option<T> {
        self.state().shown.clone()
    }

    /// Returns what is shown if it is younger than `age`, else what `look` brings, which is given what is shown now.
    ///
    /// One looks at a time; the others wait for it, but where something older can be shown not for longer than half a
    /// second, so that a storage which does not answer hides nothing that is known.
    ///
    /// # Errors
    /// What `look` says.
    pub(super) fn get<E>(&self, age: Duration, look: impl FnOnce(&mut K, Option<&T>) -> Result<T, E>) -> Result<T, E> {
        let mut state = self.state();
        loop {
            let is_fresh = state.checked.is_some_and(|checked| checked.elapsed() < age);
            if let Some(shown) = state.shown.as_ref().filter(|_| is_fresh) {
                return Ok(shown.clone());
            }
            let Some(since) = state.looking_since else { break };
            state = match &state.shown {
                Some(shown) if since.elapsed() >= PATIENCE => return Ok(shown.clone()),
                Some(_) => {
                    let left = PATIENCE.saturating_sub(since.elapsed());
                    self.done.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0
                }
                None => self.done.wait(state).unwrap_or_else(PoisonError::into_inner),
            };
        }
        state.looking_since = Some(Instant::now());
        let shown = state.shown.clone();
        drop(state);
        let looking = Looking(self);
        let found = look(&mut self.known.lock().unwrap_or_else(PoisonError::into_inner), shown.as_ref());
        if let Ok(found) = &found {
            let mut state = self.state();
            state.shown = Some(found.clone());
            state.checked = Some(Instant::now());
        }
        drop(looking);
        found
    }

    fn state(&self) -> MutexGuard<'_, State<T>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Lets the others look once this one has, also if it panicked.
struct Looking<'a, T: Clone, K>(&'a Refreshed<T, K>);

impl<T: Clone, K> Drop for Looking<'_, T, K> {
    fn drop(&mut self) {
        self.0.state().looking_since = None;
        self.0.done.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    #[test]
    fn what_is_known_is_shown_while_another_looks_in_vain() {
        let refreshed = Refreshed::<u32, ()>::default();
        assert_eq!(refreshed.shown(), None);
        assert_eq!(refreshed.get(Duration::ZERO, |(), shown| Ok::<_, ()>(shown.copied().unwrap_or(1))), Ok(1));
        assert_eq!(refreshed.get(Duration::MAX, |(), _| Err(())), Ok(1));
        let (release, gate) = mpsc::channel::<()>();
        std::thread::scope(|scope| {
            let (begun, is_looking) = mpsc::channel();
            let looker = scope.spawn(|| {
                let look = move |(): &mut (), _: Option<&u32>| {
                    begun.send(()).unwrap();
                    let _ = gate.recv();
                    Ok::<_, ()>(2)
                };
                refreshed.get(Duration::ZERO, look)
            });
            is_looking.recv().unwrap();
            assert_eq!(refreshed.get(Duration::ZERO, |(), _| Err(())), Ok(1));
            drop(release);
            assert_eq!(looker.join().unwrap(), Ok(2));
        });
        assert_eq!(refreshed.shown(), Some(2));
        assert_eq!(refreshed.get(Duration::ZERO, |(), _| Err(7)), Err(7));
        assert_eq!(refreshed.shown(), Some(2));
    }
}
