//! The open files, each known to the kernel by a number.
//!
//! A lookup takes a shared lock for as long as it takes to copy a pointer; no lock is held while anything is read.

use std::sync::{Arc, PoisonError, RwLock};

/// A table of what is open. Numbers are used again after [`Handles::remove`], as those of file descriptors are.
pub(super) struct Handles<T>(RwLock<Slots<T>>);

struct Slots<T> {
    slots: Vec<Option<Arc<T>>>,
    free: Vec<usize>,
}

impl<T> Handles<T> {
    pub(super) fn new() -> Self {
        Self(RwLock::new(Slots { slots: Vec::new(), free: Vec::new() }))
    }

    /// Keeps something and returns its number.
    pub(super) fn insert(&self, value: T) -> u64 {
        let value = Some(Arc::new(value));
        let mut table = self.0.write().unwrap_or_else(PoisonError::into_inner);
        let index = match table.free.pop() {
            Some(index) => {
                table.slots[index] = value;
                index
            }
            None => {
                table.slots.push(value);
                table.slots.len() - 1
            }
        };
        index as u64
    }

    /// Returns what has that number.
    pub(super) fn get(&self, number: u64) -> Option<Arc<T>> {
        let index = usize::try_from(number).ok()?;
        self.0.read().unwrap_or_else(PoisonError::into_inner).slots.get(index)?.clone()
    }

    /// Forgets what has that number, and returns it; whoever still uses it keeps it.
    pub(super) fn remove(&self, number: u64) -> Option<Arc<T>> {
        let index = usize::try_from(number).ok()?;
        let mut table = self.0.write().unwrap_or_else(PoisonError::into_inner);
        let removed = table.slots.get_mut(index).and_then(Option::take);
        if removed.is_some() {
            table.free.push(index);
        }
        // What it held is dropped without the lock: closing a chain closes files.
        drop(table);
        removed
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_number_is_free_again_after_removal_and_only_once() {
        let handles = Handles::new();
        let (a, b) = (handles.insert("a"), handles.insert("b"));
        let held = handles.get(a).unwrap();
        handles.remove(a);
        handles.remove(a);
        handles.remove(99);
        assert_eq!((handles.get(a), *held, handles.get(b).as_deref()), (None, "a", Some(&"b")));
        assert_eq!(handles.insert("c"), a);
        assert_eq!(handles.insert("d"), 2);
    }
}
