//! The storage that fails on demand does what it is told, no more.

#[allow(dead_code, reason = "each test file uses its part of the module")]
mod places;

use std::sync::Arc;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use places::path;
use storage::{ErrorKind, Fault, FaultyStorage, MemoryStorage, Operation, Storage};

const PATIENCE: Duration = Duration::from_secs(10);

fn storage() -> Arc<FaultyStorage> {
    let memory = MemoryStorage::new();
    memory.put("a", "bytes of a").unwrap();
    memory.put("b", "bytes of b").unwrap();
    Arc::new(FaultyStorage::new(Arc::new(memory)))
}

#[test]
fn an_error_meets_the_operation_and_the_path_of_the_rule() {
    let storage = storage();
    let object = storage.open(&path("a")).unwrap();
    storage.set_rule(|operation, path| {
        (operation == Operation::Read && path.as_str() == "a").then_some(Fault::Error(ErrorKind::PermissionDenied))
    });
    let error = storage.read(&path("a"), 100).unwrap_err();
    assert_eq!((error.kind(), error.path()), (ErrorKind::PermissionDenied, &path("a")));
    assert!(storage.read(&path("b"), 100).is_ok() && storage.stat(&path("a")).is_ok());

    storage.set_rule(|operation, _| matches!(operation, Operation::ReadAt).then_some(Fault::Errno(116)));
    let error = object.read_at(0, &mut [0; 4]).unwrap_err();
    assert_eq!((error.kind(), error.raw_os_error()), (ErrorKind::Io, Some(116)));
    assert!(object.stat().is_ok() && storage.read(&path("a"), 100).is_ok());

    storage.release();
    assert_eq!(object.read_at(0, &mut [0; 4]).unwrap(), 4);
}

#[test]
fn operations_are_counted_each_by_its_kind() {
    let storage = storage();
    let object = storage.open(&path("a")).unwrap();
    object.read_at(0, &mut [0; 4]).unwrap();
    object.read_at(4, &mut [0; 4]).unwrap();
    object.stat().unwrap();
    storage.stat(&path("a")).unwrap();
    storage.list(&path("")).unwrap();
    storage.read(&path("missing"), 1).unwrap_err();
    let count = |operation| storage.count(operation);
    assert_eq!((count(Operation::Open), count(Operation::ReadAt), count(Operation::StatOpen)), (1, 2, 1));
    assert_eq!((count(Operation::Stat), count(Operation::List), count(Operation::Read)), (1, 1, 1));
    assert_eq!(storage.total(), 7);
    storage.reset_counts();
    assert_eq!(storage.total(), 0);
}

#[test]
fn a_delay_passes_before_the_operation() {
    let storage = storage();
    let delay = Duration::from_millis(40);
    storage.set_rule(move |operation, _| (operation == Operation::Stat).then_some(Fault::Delay(delay)));
    let start = Instant::now();
    storage.stat(&path("a")).unwrap();
    assert!(start.elapsed() >= delay, "{:?}", start.elapsed());
}

#[test]
fn a_stalled_operation_goes_on_when_released_and_holds_up_no_other() {
    let storage = storage();
    storage.set_rule(|_, path| (path.as_str() == "a").then_some(Fault::Stall));
    assert!(!storage.wait_for_stalled(1, Duration::from_millis(1)));
    let (sender, receiver) = mpsc::channel();
    std::thread::scope(|scope| {
        for _ in 0..2 {
            let (storage, sender) = (&storage, sender.clone());
            scope.spawn(move || sender.send(storage.read(&path("a"), 100).unwrap()).unwrap());
        }
        assert!(storage.wait_for_stalled(2, PATIENCE));
        assert_eq!(storage.read(&path("b"), 100).unwrap(), b"bytes of b");
        assert!(receiver.try_recv().is_err());
        storage.release();
        for _ in 0..2 {
            assert_eq!(receiver.recv_timeout(PATIENCE).unwrap(), b"bytes of a");
        }
    });
    assert!(storage.wait_for_stalled(0, PATIENCE) && !storage.wait_for_stalled(1, Duration::ZERO));
}
