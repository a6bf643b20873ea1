//! Work that mostly waits for a storage, done for several items at once where that is a server's.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread;

use storage::Capabilities;

/// Items that are waited for at once; each is a few small requests.
pub(crate) const AT_ONCE: usize = 64;

/// Calls `act` with each item, and returns what that gave in the order of the items.
pub(crate) fn each<T, R>(storage: Capabilities, items: &[T], act: impl Fn(&T) -> R + Sync) -> Vec<R>
where
    T: Sync,
    R: Send,
{
    let threads = if storage.is_remote { items.len().min(AT_ONCE) } else { 1 };
    let (next, done) = (AtomicUsize::new(0), Mutex::new(Vec::with_capacity(items.len())));
    let work = || {
        loop {
            let number = next.fetch_add(1, Ordering::Relaxed);
            let Some(item) = items.get(number) else { return };
            let result = act(item);
            done.lock().unwrap_or_else(PoisonError::into_inner).push((number, result));
        }
    };
    thread::scope(|scope| {
        for _ in 1..threads {
            // Where the system refuses another thread, there are fewer.
            if thread::Builder::new().name("xofs-open".to_owned()).spawn_scoped(scope, work).is_err() {
                break;
            }
        }
        work();
    });
    let mut done = done.into_inner().unwrap_or_else(PoisonError::into_inner);
    done.sort_unstable_by_key(|(number, _)| *number);
    done.into_iter().map(|(_, result)| result).collect()
}

#[cfg(test)]
mod tests {
    use std::sync::Barrier;

    use super::*;

    const ITEMS: [usize; 5] = [3, 1, 4, 1, 5];

    #[test]
    fn items_of_a_server_are_waited_for_at_once_and_their_results_are_in_order() {
        let all = Barrier::new(ITEMS.len());
        let doubled = each(Capabilities { ranged_reads: true, is_remote: true }, &ITEMS, |item| {
            // Ends only if all are here.
            all.wait();
            2 * item
        });
        assert_eq!(doubled, [6, 2, 8, 2, 10]);
    }

    #[test]
    fn items_of_this_machine_are_taken_one_after_the_other() {
        let caller = thread::current().id();
        let own = each(Capabilities { ranged_reads: true, is_remote: false }, &ITEMS, |item| {
            (*item, thread::current().id() == caller)
        });
        assert_eq!(own, ITEMS.map(|item| (item, true)));
    }
}
