//! A machine that is gone after some changes of its storage.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use storage::{Fault, FaultyStorage, MemoryStorage, WritableStorage};

/// What EIO is for the tests: the machine is gone.
pub const GONE: i32 = 5;

/// The storage until `count` changes were made; then nothing works any more. Signs of life of the lock do not count.
pub fn until(memory: &Arc<MemoryStorage>, count: u64) -> (Arc<dyn WritableStorage>, Arc<AtomicBool>) {
    let faulty = FaultyStorage::new(memory.clone());
    let (done, is_cut) = (AtomicU64::new(0), Arc::new(AtomicBool::new(false)));
    let cut = is_cut.clone();
    faulty.set_rule(move |operation, path| {
        let is_counted = operation.is_change() && !path.as_str().ends_with(".lock");
        if is_counted && done.fetch_add(1, Ordering::SeqCst) == count {
            cut.store(true, Ordering::SeqCst);
            return Some(Fault::Half(GONE));
        }
        cut.load(Ordering::SeqCst).then_some(Fault::Errno(GONE))
    });
    (Arc::new(faulty), is_cut)
}
