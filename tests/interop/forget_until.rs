//! Forgets the older backups of a VM on a real folder as `xofs forget --apply` does, and dies after so many changes of the
//! storage: for tests of what Xen Orchestra makes of it.
//!
//! usage: forget_until REPOSITORY VM KEEP CHANGES      ends with 0 if it came to the end, with 7 if it died

use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use storage::{Fault, FaultyStorage, LocalStorage, WritableStorage};
use xofs::merge::{self, Watch};
use xofs::repository::{VmId, VmLock};

const DIED: u8 = 7;
const EIO: i32 = 5;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [repository, vm, keep, changes] = arguments.as_slice() else {
        eprintln!("usage: forget_until REPOSITORY VM KEEP CHANGES");
        return ExitCode::from(2);
    };
    let number = |text: &String| text.parse::<u64>().expect("a number");
    let (keep, changes) = (usize::try_from(number(keep)).expect("a small number"), number(changes));
    let vm = VmId::new(vm).expect("a VM");
    let local: Arc<dyn WritableStorage> = Arc::new(LocalStorage::open(Path::new(repository)).expect("a repository"));
    let faulty = Arc::new(FaultyStorage::new(local));
    let storage: Arc<dyn WritableStorage> = faulty.clone();
    let lock = VmLock::take(storage, &vm, Duration::ZERO, |_| true).expect("the lock");
    let done = AtomicU64::new(0);
    faulty.set_rule(move |operation, path| {
        // Signs of life come when they come.
        let is_counted = operation.is_change() && !path.as_str().ends_with(".lock");
        let before = if is_counted { done.fetch_add(1, Ordering::SeqCst) } else { done.load(Ordering::SeqCst) };
        (before >= changes).then_some(Fault::Errno(EIO))
    });
    let watch = Watch { threads: 1, jobs: 1, planned: &|_| {}, moved: &|_| {}, is_stopped: &|| false };
    let forgotten = merge::forget(&lock, |backups| backups[..backups.len().saturating_sub(keep)].to_vec(), &watch);
    match forgotten {
        Ok(done) if done.refused.is_empty() && done.problems.is_empty() => ExitCode::SUCCESS,
        Ok(done) => {
            eprintln!("{done:?}");
            ExitCode::from(DIED)
        }
        Err(error) => {
            eprintln!("{error}");
            ExitCode::from(DIED)
        }
    }
}
