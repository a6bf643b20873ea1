use std::collections::BTreeSet;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc;

use storage::{Fault, FaultyStorage, LocalStorage, MemoryStorage, Operation, Storage};

use super::*;
use crate::repository::tests::VM;

const HOUR: Duration = Duration::from_secs(3600);
const PATIENCE: Duration = Duration::from_secs(60);

impl Pace {
    /// Nothing is renewed or lost by the time, and what gives no sign between two looks is abandoned.
    const HASTY: Self = Self {
        abandoned: Duration::ZERO,
        renewal: HOUR,
        retry: HOUR,
        lost: HOUR,
        settling: Duration::ZERO,
        poll: Duration::from_millis(1),
    };
    /// The same, but nothing is ever abandoned.
    const PATIENT: Self = Self { abandoned: HOUR, ..Self::HASTY };
}

impl VmLock {
    /// Takes the lock at once, from whoever has it.
    pub(in crate::repository) fn seize(storage: Arc<dyn WritableStorage>, vm: &VmId) -> Self {
        Self::take_at(Pace::HASTY, storage, vm, PATIENCE, |_| true).unwrap()
    }

    fn renew(&self) -> storage::Result<()> {
        self.held.renew(&mut self.held.state())
    }
}

fn vm() -> VmId {
    VmId::new(VM).unwrap()
}

fn path() -> ObjectPath {
    ObjectPath::new(&format!("{VM_FOLDER}/{VM}.lock")).unwrap()
}

fn names(storage: &dyn Storage) -> Vec<String> {
    let listed = storage.list(&ObjectPath::new(VM_FOLDER).unwrap()).unwrap();
    listed.into_iter().map(|entry| entry.name).collect()
}

fn take(pace: Pace, storage: &Arc<dyn WritableStorage>, patience: Duration) -> Result<VmLock> {
    VmLock::take_at(pace, storage.clone(), &vm(), patience, |_| true)
}

fn memory() -> Arc<dyn WritableStorage> {
    Arc::new(MemoryStorage::new())
}

/// A storage on which a dead program left its lock.
fn memory_with_a_lock() -> Arc<dyn WritableStorage> {
    let memory = MemoryStorage::new();
    memory.create_directory(path().as_str()).unwrap();
    Arc::new(memory)
}

#[test]
fn a_lock_is_a_folder_beside_the_vm_and_goes_when_it_is_dropped() {
    let storage = memory();
    let lock = VmLock::take(storage.clone(), &vm(), Duration::ZERO, |_| true).unwrap();
    assert_eq!(names(&*storage), [format!("{VM}.lock")]);
    assert_eq!(storage.stat(&path()).unwrap().kind, storage::Kind::Directory);
    lock.check().unwrap();
    let error = VmLock::take(storage.clone(), &vm(), Duration::ZERO, |_| true).err().unwrap();
    assert_eq!(error.kind(), ErrorKind::Locked);
    assert!(error.to_string().starts_with(&format!("'{}' is held: ", path())), "{error}");
    let other = VmId::new("other").unwrap();
    drop(VmLock::take(storage.clone(), &other, Duration::ZERO, |_| true).unwrap());
    drop(lock);
    assert_eq!(names(&*storage), [""; 0]);
    drop(VmLock::take(storage, &vm(), Duration::ZERO, |_| true).unwrap());
}

#[test]
fn who_is_patient_gets_the_lock_when_it_is_released() {
    let storage = memory();
    let mut holder = Some(take(Pace::PATIENT, &storage, Duration::ZERO).unwrap());
    let mut asked = 0;
    let lock = VmLock::take_at(Pace::PATIENT, storage, &vm(), PATIENCE, |age| {
        assert!(age < PATIENCE, "{age:?}");
        asked += 1;
        if asked == 3 {
            holder = None;
        }
        true
    });
    lock.unwrap().check().unwrap();
    assert_eq!(asked, 3);
}

#[test]
fn who_waits_for_a_lock_may_give_up() {
    let storage = memory();
    let lock = take(Pace::PATIENT, &storage, Duration::ZERO).unwrap();
    let mut asked = 0;
    let taken = VmLock::take_at(Pace::PATIENT, storage, &vm(), Duration::MAX, |_| {
        asked += 1;
        asked < 3
    });
    assert_eq!((taken.err().unwrap().kind(), asked), (ErrorKind::Locked, 3));
    lock.check().unwrap();
}

#[test]
fn a_lock_is_renewed_as_long_as_it_is_held() {
    let storage = memory();
    let pace = Pace { renewal: Duration::from_millis(1), ..Pace::PATIENT };
    let lock = take(pace, &storage, Duration::ZERO).unwrap();
    let (start, mut times) = (Instant::now(), BTreeSet::new());
    while times.len() < 4 {
        assert!(start.elapsed() < PATIENCE, "it is not renewed");
        times.insert(storage.stat(&path()).unwrap().modified);
        lock.check().unwrap();
    }
    drop(lock);
    assert_eq!(names(&*storage), [""; 0]);
}

#[test]
fn an_abandoned_lock_is_taken_over_but_not_because_it_looks_old() {
    let storage = memory_with_a_lock();
    assert_eq!(storage.stat(&path()).unwrap().modified.max(SystemTime::UNIX_EPOCH), SystemTime::UNIX_EPOCH);
    let error = VmLock::take(storage.clone(), &vm(), Duration::from_millis(5), |_| true).err().unwrap();
    assert_eq!(error.kind(), ErrorKind::Locked);
    let pace = Pace { abandoned: Duration::from_millis(20), ..Pace::PATIENT };
    let lock = take(pace, &storage, PATIENCE).unwrap();
    lock.check().unwrap();
    assert_eq!(names(&*storage), [format!("{VM}.lock")]);
    drop(lock);
    assert_eq!(names(&*storage), [""; 0]);
}

#[test]
fn a_lock_that_gives_signs_is_not_taken_over() {
    let storage = memory();
    let lock = take(Pace::HASTY, &storage, Duration::ZERO).unwrap();
    // Each time it waits, its clock starts anew: a sign was given since.
    let pace = Pace { abandoned: Duration::from_nanos(1), ..Pace::HASTY };
    let mut asked = 0;
    let taken = VmLock::take_at(pace, storage, &vm(), Duration::from_millis(30), |_| {
        asked += 1;
        lock.renew().unwrap();
        true
    });
    assert_eq!(taken.err().unwrap().kind(), ErrorKind::Locked);
    assert!(asked > 0);
    lock.check().unwrap();
}

#[test]
fn a_lost_lock_stays_lost_and_what_another_made_stays_there() {
    type Spoil<'a> = &'a dyn Fn(&dyn WritableStorage);
    let cases: [(&str, Spoil<'_>, bool, bool); 4] = [
        ("its time is another's", &|storage| storage.touch(&path()).unwrap(), true, false),
        ("it was removed", &|storage| storage.remove_directory(&path()).unwrap(), false, false),
        (
            "another made it",
            &|storage| {
                storage.remove_directory(&path()).unwrap();
                storage.create_directory(&path()).unwrap();
            },
            true,
            false,
        ),
        ("renewed at last too late", &|_| {}, false, true),
    ];
    for (why, spoil, is_left, is_late) in cases {
        let storage = memory();
        let lock = take(Pace::PATIENT, &storage, Duration::ZERO).unwrap();
        lock.check().unwrap();
        spoil(&*storage);
        if is_late {
            lock.held.state().renewed = Instant::now().checked_sub(HOUR).unwrap();
        }
        for _ in 0..2 {
            let error = lock.check().unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Locked, "{why}");
            assert!(error.to_string().contains(&format!("'{}' is lost: ", path())), "{error}");
        }
        let before = storage.stat(&path()).ok();
        lock.renew().unwrap();
        assert_eq!(storage.stat(&path()).ok(), before, "{why}: it is not renewed any more");
        drop(lock);
        assert_eq!(names(&*storage).len(), usize::from(is_left), "{why}");
    }
}

#[test]
fn a_renewal_that_fails_is_tried_again_until_it_is_too_late() {
    let faulty = Arc::new(FaultyStorage::<dyn WritableStorage>::new(memory()));
    let storage: Arc<dyn WritableStorage> = faulty.clone();
    let lock = take(Pace::PATIENT, &storage, Duration::ZERO).unwrap();
    let fail = |failing: Operation| {
        faulty.set_rule(move |operation, _| (operation == failing).then_some(Fault::Error(storage::ErrorKind::Io)));
    };
    fail(Operation::Touch);
    lock.renew().unwrap_err();
    lock.check().unwrap();
    // Whether it was asked, and what it says: nobody knows, but nobody else can have set it yet.
    let touched = Arc::new(AtomicUsize::new(0));
    let touches = touched.clone();
    faulty.set_rule(move |operation, _| match operation {
        Operation::Touch => {
            touches.store(1, Ordering::SeqCst);
            None
        }
        _ => (touches.load(Ordering::SeqCst) == 1).then_some(Fault::Error(storage::ErrorKind::Io)),
    });
    lock.renew().unwrap_err();
    assert_eq!(lock.check().unwrap_err().kind(), ErrorKind::Unavailable);
    faulty.release();
    lock.check().unwrap();
    storage.touch(&path()).unwrap();
    assert_eq!(lock.check().unwrap_err().kind(), ErrorKind::Locked, "a second time it is another's");
    drop(lock);
    storage.remove_directory(&path()).unwrap();

    let pace = Pace { renewal: Duration::from_millis(1), retry: Duration::from_millis(1), ..Pace::PATIENT };
    let lock = take(Pace { lost: Duration::from_millis(20), ..pace }, &storage, Duration::ZERO).unwrap();
    fail(Operation::Touch);
    let start = Instant::now();
    while lock.check().is_ok() {
        assert!(start.elapsed() < PATIENCE, "it is not lost");
    }
    assert_eq!(lock.check().unwrap_err().kind(), ErrorKind::Locked);
}

#[test]
fn who_comes_late_to_an_abandoned_lock_puts_back_what_another_made() {
    let storage = memory_with_a_lock();
    let faulty = Arc::new(FaultyStorage::<dyn WritableStorage>::new(storage.clone()));
    faulty.set_rule(|operation, _| (operation == Operation::Rename).then_some(Fault::Stall));
    std::thread::scope(|scope| {
        let late = scope.spawn(|| {
            let storage: Arc<dyn WritableStorage> = faulty.clone();
            take(Pace::HASTY, &storage, Duration::ZERO).err().map(|error| error.kind())
        });
        assert!(faulty.wait_for_stalled(1, PATIENCE));
        let lock = take(Pace::HASTY, &storage, PATIENCE).unwrap();
        faulty.release();
        assert_eq!(late.join().unwrap(), Some(ErrorKind::Locked));
        lock.check().unwrap();
        assert_eq!(names(&*storage), [format!("{VM}.lock")]);
    });
}

#[test]
fn what_cannot_be_put_back_is_lost_and_the_third_has_it_alone() {
    let storage = memory_with_a_lock();
    let faulty = Arc::new(FaultyStorage::<dyn WritableStorage>::new(storage.clone()));
    let (arrived, arrival) = mpsc::channel();
    let (go, gone) = mpsc::channel::<()>();
    let gone = std::sync::Mutex::new(gone);
    faulty.set_rule(move |operation, path| {
        let is_aside = path.file_name().starts_with('.');
        if operation == Operation::Rename || (operation == Operation::List && is_aside) {
            arrived.send(operation).unwrap();
            let _ = gone.lock().unwrap().recv();
        }
        None
    });
    std::thread::scope(|scope| {
        let late = scope.spawn(|| {
            let storage: Arc<dyn WritableStorage> = faulty.clone();
            take(Pace::HASTY, &storage, Duration::ZERO).err().map(|error| error.kind())
        });
        assert_eq!(arrival.recv_timeout(PATIENCE).unwrap(), Operation::Rename);
        let second = take(Pace::HASTY, &storage, PATIENCE).unwrap();
        go.send(()).unwrap();
        assert_eq!(arrival.recv_timeout(PATIENCE).unwrap(), Operation::List);
        let third = take(Pace::PATIENT, &storage, Duration::ZERO).unwrap();
        drop(go);
        assert_eq!(late.join().unwrap(), Some(ErrorKind::Locked));
        assert_eq!(second.check().unwrap_err().kind(), ErrorKind::Locked);
        third.check().unwrap();
        drop(second);
        third.check().unwrap();
        assert_eq!(names(&*storage), [format!("{VM}.lock")]);
    });
}

#[test]
fn what_a_dead_program_left_aside_is_removed_by_who_takes_the_lock_next() {
    let other = VmId::new("other").unwrap();
    let left = format!(".{VM}.lock.0123456789abcdef");
    let kept = [
        format!(".{other}.lock.0123456789abcdef"),
        format!(".{VM}.lock.0123456789ABCDEF"),
        format!(".{VM}.lock.123456789abcdef"),
        format!(".{VM}.lock"),
        format!("{VM}.0123456789abcdef"),
    ];
    let memory = Arc::new(MemoryStorage::new());
    for name in kept.iter().chain([&left]) {
        memory.create_directory(&format!("{VM_FOLDER}/{name}")).unwrap();
    }
    // Of which no lock is made.
    let with_a_file = format!(".{VM}.lock.fedcba9876543210");
    memory.put(&format!("{VM_FOLDER}/{with_a_file}/file"), b"").unwrap();
    let storage: Arc<dyn WritableStorage> = memory.clone();
    let path_of = |name: &str| ObjectPath::new(&format!("{VM_FOLDER}/{name}")).unwrap();
    assert_eq!(VmLock::set_aside(&*storage, &vm()).unwrap(), [path_of(&left), path_of(&with_a_file)]);
    assert_eq!(VmLock::vm_of(&left), Some(vm()));
    assert_eq!(VmLock::vm_of(&format!("{VM}.lock")), Some(vm()));
    assert!(kept[1..].iter().all(|name| VmLock::vm_of(name).is_none()));

    let held = take(Pace::PATIENT, &storage, Duration::ZERO).unwrap();
    let mut expected: BTreeSet<String> = kept.into_iter().chain([with_a_file]).collect();
    expected.insert(format!("{VM}.lock"));
    assert_eq!(names(&*storage).into_iter().collect::<BTreeSet<_>>(), expected);
    // Who does not get the lock removes nothing: it may be put back.
    memory.create_directory(&format!("{VM_FOLDER}/{left}")).unwrap();
    take(Pace::PATIENT, &storage, Duration::ZERO).err().unwrap();
    assert!(names(&*storage).contains(&left));
    held.check().unwrap();
}

#[test]
fn who_finds_gone_what_it_moved_aside_goes_on_without_harm() {
    // Each question it asks once it has moved the abandoned lock aside.
    for operation in [Operation::List, Operation::Stat, Operation::Remove] {
        let storage = memory_with_a_lock();
        let faulty = Arc::new(FaultyStorage::<dyn WritableStorage>::new(storage.clone()));
        faulty.set_rule(move |asked, path| {
            (asked == operation && path.file_name().starts_with('.')).then_some(Fault::Stall)
        });
        std::thread::scope(|scope| {
            let late = scope.spawn(|| {
                let storage: Arc<dyn WritableStorage> = faulty.clone();
                take(Pace::HASTY, &storage, PATIENCE).map(|lock| lock.check().unwrap())
            });
            assert!(faulty.wait_for_stalled(1, PATIENCE));
            let (seen, checked) = {
                let lock = take(Pace::PATIENT, &storage, Duration::ZERO).unwrap();
                (names(&*storage), lock.check())
            };
            faulty.release();
            assert_eq!(seen, [format!("{VM}.lock")]);
            checked.unwrap();
            late.join().unwrap().unwrap_or_else(|error| panic!("{operation:?}: {error}"));
            assert_eq!(names(&*storage), [""; 0], "{operation:?}");
        });
    }
}

#[test]
fn a_lock_that_was_moved_aside_by_mistake_is_not_put_back_once_another_had_it() {
    let storage = memory_with_a_lock();
    let faulty = Arc::new(FaultyStorage::<dyn WritableStorage>::new(storage.clone()));
    let (arrived, arrival) = mpsc::channel();
    let (go, gone) = mpsc::channel::<()>();
    let gone = std::sync::Mutex::new(gone);
    faulty.set_rule(move |operation, path| {
        let is_aside = path.file_name().starts_with('.');
        if operation == Operation::Rename || (operation == Operation::List && is_aside) {
            arrived.send(operation).unwrap();
            let _ = gone.lock().unwrap().recv();
        }
        None
    });
    std::thread::scope(|scope| {
        let late = scope.spawn(|| {
            let storage: Arc<dyn WritableStorage> = faulty.clone();
            take(Pace::HASTY, &storage, Duration::ZERO).map(drop)
        });
        assert_eq!(arrival.recv_timeout(PATIENCE).unwrap(), Operation::Rename);
        let second = take(Pace::HASTY, &storage, PATIENCE).unwrap();
        go.send(()).unwrap();
        assert_eq!(arrival.recv_timeout(PATIENCE).unwrap(), Operation::List);
        // While the second one's lock lies aside, a third one comes and goes.
        drop(take(Pace::PATIENT, &storage, Duration::ZERO).unwrap());
        drop(go);
        drop(late.join().unwrap());
        assert_eq!(second.check().unwrap_err().kind(), ErrorKind::Locked, "it was not alone");
    });
}

/// Takes a lock while, just before the `late`-th question about what was made, somebody who is late moves that aside and
/// another one takes the lock. Returns both, and whether it came to that.
fn take_twice(open: &dyn Fn() -> Arc<dyn WritableStorage>, late: usize) -> (Option<VmLock>, Option<VmLock>, bool) {
    let storage = open();
    let faulty = Arc::new(FaultyStorage::<dyn WritableStorage>::new(storage.clone()));
    let second: Arc<Mutex<Option<VmLock>>> = Arc::default();
    let (questions, made) = (AtomicUsize::new(0), second.clone());
    faulty.set_rule(move |operation, asked| {
        let is_about_it = *asked == path() && operation != Operation::CreateDirectory;
        if is_about_it && questions.fetch_add(1, Ordering::SeqCst) == late {
            let aside = path().parent().join(&name_aside(path().file_name())).unwrap();
            storage.rename(&path(), &aside).unwrap();
            let lock = take(Pace::PATIENT, &storage, Duration::ZERO).unwrap();
            lock.check().unwrap();
            *made.lock().unwrap() = Some(lock);
        }
        None
    });
    let storage: Arc<dyn WritableStorage> = faulty.clone();
    let first = take(Pace::PATIENT, &storage, Duration::ZERO).ok();
    faulty.release();
    let second = second.lock().unwrap().take();
    let is_done = second.is_some();
    (first, second, is_done)
}

#[test]
fn who_made_a_lock_does_not_take_anothers_for_it() {
    on_each_place(|open| {
        let mut late = 0;
        loop {
            let (first, second, is_late) = take_twice(open, late);
            if !is_late {
                break;
            }
            let passed = [&first, &second].into_iter().flatten().filter(|lock| lock.check().is_ok()).count();
            assert!(passed <= 1, "question {late}: {passed} hold it");
            drop((first, second));
            let _ = open().remove_directory(&path());
            late += 1;
        }
        // It is looked at, marked and looked at again; a look asks twice.
        assert!(late >= 5, "{late}");
    });
}

#[test]
fn a_lock_can_be_made_where_no_time_can_be_set() {
    let storage = memory();
    let faulty = Arc::new(FaultyStorage::<dyn WritableStorage>::new(storage.clone()));
    let touches = AtomicUsize::new(0);
    faulty.set_rule(move |operation, _| {
        let is_first = operation == Operation::Touch && touches.fetch_add(1, Ordering::SeqCst) == 0;
        is_first.then_some(Fault::Error(storage::ErrorKind::PermissionDenied))
    });
    let refusing: Arc<dyn WritableStorage> = faulty.clone();
    let lock = take(Pace::PATIENT, &refusing, Duration::ZERO).unwrap();
    lock.check().unwrap();
    assert_eq!(faulty.count(Operation::Touch), 2);
    drop(lock);
    faulty.set_rule(|operation, _| (operation == Operation::Touch).then_some(Fault::Error(storage::ErrorKind::Io)));
    assert_eq!(take(Pace::PATIENT, &refusing, Duration::ZERO).err().unwrap().kind(), ErrorKind::Unavailable);
    assert_eq!(names(&*storage), [""; 0], "what could not be marked is removed");
}

#[test]
fn a_time_of_ones_own_is_less_than_a_second_old_and_known_again_by_what_a_storage_keeps_of_it() {
    let at = |nanoseconds| SystemTime::UNIX_EPOCH + Duration::from_nanos(nanoseconds);
    let seen = at(1_785_000_001_234_567_890);
    for _ in 0..100 {
        let age = seen.duration_since(own_time(seen).unwrap()).unwrap();
        assert!(age > Duration::ZERO && age < Duration::from_secs(1), "{age:?}");
    }
    assert_ne!(own_time(seen), own_time(seen));
    assert_eq!(own_time(SystemTime::UNIX_EPOCH), None);
    let own = at(1_785_000_001_123_457_000);
    for (shown, is_own) in [
        (own, true),
        (at(1_785_000_001_123_000_000), true),
        (at(1_785_000_001_000_000_000), true),
        (at(1_785_000_000_000_000_000), true),
        (at(1_785_000_001_123_457_238), true),
        (at(1_785_000_001_123_456_762), true),
        (at(1_785_000_001_124_000_000), true),
        (at(1_785_000_002_000_000_000), true),
        (at(1_785_000_001_123_456_000), false),
        (at(1_785_000_001_123_458_000), false),
        (at(1_785_000_001_125_000_000), false),
        (at(1_785_000_003_000_000_000), false),
        (at(1_784_999_999_000_000_000), false),
        (seen, false),
    ] {
        assert_eq!(is_kept_as(own, shown), is_own, "{shown:?}");
    }
}

/// Runs `act` in several threads, each with a storage of its own, as if they were processes.
fn in_each_process(
    open: &(dyn Fn() -> Arc<dyn WritableStorage> + Sync),
    act: impl Fn(Arc<dyn WritableStorage>) + Sync,
) {
    std::thread::scope(|scope| {
        for _ in 0..6 {
            scope.spawn(|| act(open()));
        }
    });
}

/// Runs `test` where all share a storage in memory, and where each opens the same folder.
fn on_each_place(test: impl Fn(&(dyn Fn() -> Arc<dyn WritableStorage> + Sync))) {
    let storage = memory();
    test(&|| storage.clone());
    let folder = tempfile::tempdir().unwrap();
    test(&|| Arc::new(LocalStorage::open(folder.path()).unwrap()));
}

#[test]
fn of_many_only_one_is_inside() {
    on_each_place(|open| {
        let (inside, turns) = (AtomicUsize::new(0), AtomicUsize::new(0));
        in_each_process(open, |storage| {
            for _ in 0..10 {
                let lock = take(Pace::PATIENT, &storage, HOUR).unwrap();
                assert_eq!(inside.fetch_add(1, Ordering::SeqCst), 0);
                lock.check().unwrap();
                turns.fetch_add(1, Ordering::SeqCst);
                inside.fetch_sub(1, Ordering::SeqCst);
            }
        });
        assert_eq!(turns.into_inner(), 60);
        assert_eq!(names(&*open()), [""; 0]);
    });
}

#[test]
fn of_many_who_take_from_each_other_only_one_passes_the_check() {
    on_each_place(|open| {
        let held: Mutex<Vec<Arc<VmLock>>> = Mutex::default();
        // Longer than the grain of a file system's clock: inodes are used again, and then the time alone tells two holders apart.
        let abandoned = Duration::from_millis(30);
        // As with XO's pace, who was away for as long as it takes to be taken from has lost it, also while it was made.
        let pace = Pace { abandoned, lost: abandoned, settling: Duration::from_millis(2), ..Pace::HASTY };
        in_each_process(open, |storage| {
            for _ in 0..10 {
                let taken = take(pace, &storage, Duration::from_millis(200));
                let Ok(lock) = taken.map(Arc::new) else { continue };
                let mut held = held.lock().unwrap();
                held.push(lock);
                let passed: Vec<_> = held.iter().filter(|lock| lock.check().is_ok()).collect();
                // One that was taken from while they were asked passes no more.
                assert!(passed.iter().filter(|lock| lock.check().is_ok()).count() <= 1);
                if held.len() > 4 {
                    held.remove(0);
                }
            }
        });
        drop(held);
        let lock = take(Pace::HASTY, &open(), PATIENCE).unwrap();
        lock.check().unwrap();
        assert_eq!(names(&*open()), [format!("{VM}.lock")]);
    });
}
