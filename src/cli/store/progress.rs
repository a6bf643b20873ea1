//! How far writing a backup is.

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use crate::cli::export::progress::Progress;
use crate::ingest::Watch;

/// Shows how far `what` is while `act` runs.
pub fn with_progress<T: Send>(what: &str, watch: &Watch, is_asked: bool, act: impl FnOnce() -> T + Send) -> T {
    const PAUSE: Duration = Duration::from_millis(200);
    let (is_done, watching) = (AtomicBool::new(false), thread::current());
    thread::scope(|scope| {
        let working = scope.spawn(|| {
            let result = act();
            is_done.store(true, Ordering::Release);
            watching.unpark();
            result
        });
        let mut progress = Progress::new(what, 0, is_asked);
        let (mut shown, mut total) = (0, 0);
        while !is_done.load(Ordering::Acquire) && !working.is_finished() {
            let (done, expected) = watch.progress();
            if expected != total {
                progress.next(what, expected);
                (shown, total) = (0, expected);
            }
            progress.advance_waiting(done - shown, watch.waits_for());
            shown = done;
            thread::park_timeout(PAUSE);
        }
        drop(progress);
        working.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}
