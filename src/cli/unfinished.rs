//! What a command has begun and must not leave behind, also if a signal ends it.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::exit::Exit;
use super::signals;

/// What can be taken away again, as far as that goes.
pub trait Remove {
    /// Removes it.
    fn remove(&self);
}

/// What was begun last, until it is whole.
pub struct Unfinished<T>(Arc<Mutex<Option<T>>>);

impl<T> Clone for Unfinished<T> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl<T> Default for Unfinished<T> {
    fn default() -> Self {
        Self(Arc::default())
    }
}

impl<T> Unfinished<T> {
    /// Returns it; while it is held, no signal ends the process.
    pub fn lock(&self) -> MutexGuard<'_, Option<T>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<T: Remove + Send + 'static> Unfinished<T> {
    /// From now on a signal removes it, whatever it is then, and ends the process.
    ///
    /// # Errors
    /// What the system says.
    pub fn watch_signals(&self) -> io::Result<()> {
        let seen = self.clone();
        signals::handle(move || {
            // Held until the process ends, so that it is neither finished any more, nor another begun.
            let unfinished = seen.lock();
            if let Some(begun) = &*unfinished {
                begun.remove();
            }
            say!("xofs: interrupted");
            std::process::exit(Exit::Interrupted as i32)
        })
    }
}
