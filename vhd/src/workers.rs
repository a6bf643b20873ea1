//! Threads for work that nobody waits for yet. They are made when there is work and end when there is none for a while;
//! work that finds the queue full is dropped.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use crossbeam::channel::{Receiver, Sender, bounded};

/// How long a thread waits for work before it ends.
const IDLE: Duration = Duration::from_secs(10);

type Work = Box<dyn FnOnce() + Send>;

/// Threads, and what they have to do.
pub(crate) struct Workers {
    sender: Sender<Work>,
    receiver: Receiver<Work>,
    threads: Arc<AtomicUsize>,
    limit: usize,
}

impl Workers {
    /// Makes at most `limit` threads, for whom at most `queue` pieces of work wait.
    pub(crate) fn new(limit: usize, queue: usize) -> Self {
        let (sender, receiver) = bounded(queue);
        Self { sender, receiver, threads: Arc::default(), limit }
    }

    /// Has a thread do `work`, soon; false if there is too much to do.
    pub(crate) fn offer(&self, work: impl FnOnce() + Send + 'static) -> bool {
        if self.sender.try_send(Box::new(work)).is_err() {
            return false;
        }
        let is_room = self.threads.fetch_update(Ordering::AcqRel, Ordering::Acquire, |threads| {
            // A thread for each piece that waits, up to the limit.
            (threads < self.limit).then_some(threads + 1)
        });
        if is_room.is_ok() {
            let (receiver, threads) = (self.receiver.clone(), self.threads.clone());
            let spawned = thread::Builder::new().name("xofs-ahead".to_owned()).spawn(move || {
                while let Ok(work) = receiver.recv_timeout(IDLE) {
                    // What failed is loaded again by who needs it, who then says why.
                    let _ = catch_unwind(AssertUnwindSafe(work));
                }
                threads.fetch_sub(1, Ordering::AcqRel);
            });
            if spawned.is_err() {
                self.threads.fetch_sub(1, Ordering::AcqRel);
            }
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    #[test]
    fn work_is_done_by_several_at_once_and_dropped_where_there_is_too_much() {
        let workers = Workers::new(2, 3);
        let (sender, receiver) = mpsc::channel();
        let (release, gate) = crossbeam::channel::unbounded::<()>();
        let begun = mpsc::channel();
        let offer = |number: u32| {
            let (sender, gate, begun) = (sender.clone(), gate.clone(), begun.0.clone());
            workers.offer(move || {
                begun.send(()).unwrap();
                let _ = gate.recv();
                sender.send(number).unwrap();
            })
        };
        assert!(offer(0) && offer(1));
        begun.1.recv().unwrap();
        begun.1.recv().unwrap();
        assert!(offer(2) && offer(3) && offer(4) && !offer(5));
        drop(release);
        let mut done: Vec<u32> = (0..5).map(|_| receiver.recv_timeout(Duration::from_secs(10)).unwrap()).collect();
        done.sort_unstable();
        assert_eq!(done, [0, 1, 2, 3, 4]);
    }

    #[test]
    fn a_panic_ends_no_thread() {
        let workers = Workers::new(1, 2);
        assert!(workers.offer(|| panic!("on purpose")));
        let (sender, receiver) = mpsc::channel();
        assert!(workers.offer(move || sender.send(()).unwrap()));
        assert_eq!(receiver.recv_timeout(Duration::from_secs(10)), Ok(()));
    }
}
