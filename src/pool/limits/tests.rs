use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use super::*;
use crate::pool::error::ErrorKind;

/// How long something may take that happens by itself. Generous: slow machines are not wrong.
const PATIENCE: Duration = Duration::from_secs(120);

fn of(uuid: &str) -> PoolId {
    PoolId { uuid: uuid.to_owned(), name: format!("name of {uuid}") }
}

fn turns(folder: &tempfile::TempDir, limits: Limits) -> Turns {
    Turns::new(&State::open(folder.path()).expect("is made"), limits)
}

fn quiet(_: &str) {}

#[test]
fn a_run_with_a_lower_limit_shares_the_slots_of_the_others() {
    let folder = tempfile::tempdir().expect("a folder");
    let wide = turns(&folder, Limits { exports: 3, ..Limits::default() });
    let narrow = turns(&folder, Limits { exports: 1, ..Limits::default() });
    let (pools, never) = (BTreeSet::from([of("a")]), Cancel::new());
    // Two of three are left to it that a narrow one may not have.
    let first: Vec<Turn> = (0..2).map(|_| wide.transfer(&pools, &never, &quiet).expect("free")).collect();
    let second = narrow.transfer(&pools, &never, &quiet).expect("free");
    let late = || Cancel::within(Duration::from_millis(200));
    let full = ErrorKind::Pool(xapi::ErrorKind::TimedOut);
    assert_eq!(wide.transfer(&pools, &late(), &quiet).expect_err("full").kind(), full);
    drop(first);
    assert_eq!(narrow.transfer(&pools, &late(), &quiet).expect_err("full").kind(), full);
    let others = [wide.transfer(&pools, &never, &quiet), narrow.transfer(&BTreeSet::from([of("b")]), &never, &quiet)];
    others.into_iter().for_each(|turn| drop(turn.expect("free")));
    drop(second);
    drop(narrow.transfer(&pools, &never, &quiet).expect("free"));
}

/// Has something wait until it says so, which is noted, and cancels it then.
fn waits(said: &Mutex<Vec<String>>, act: impl FnOnce(&Cancel, &dyn Fn(&str)) -> Result<Turn>) {
    let cancel = Cancel::new();
    let say = |sentence: &str| {
        said.lock().expect("whole").push(sentence.to_owned());
        cancel.cancel();
    };
    assert_eq!(act(&cancel, &say).expect_err("taken").kind(), ErrorKind::Interrupted);
}

#[test]
fn who_waits_is_told_why_and_ends_when_it_is_cancelled() {
    let folder = tempfile::tempdir().expect("a folder");
    let turns = turns(&folder, Limits { transfers: Some(1), ..Limits::default() });
    let (pools, never) = (BTreeSet::from([of("a"), of("b")]), Cancel::new());
    let transfer = turns.transfer(&pools, &never, &quiet).expect("free");
    let snapshot = turns.snapshot(&of("a"), &never, &quiet).expect("free");
    let said = Mutex::new(Vec::new());
    waits(&said, |cancel, say| turns.snapshot(&of("a"), cancel, say));
    waits(&said, |cancel, say| turns.transfer(&pools, cancel, say));
    drop((transfer, snapshot));
    let expected = [
        "waits for the snapshot of another VM of the pool name of a: other runs on this machine come first",
        "waits for one of 1 transfers of this machine: other runs on this machine come first",
    ];
    assert_eq!(*said.lock().expect("whole"), expected);
}

#[test]
fn one_who_always_wants_another_keeps_nobody_waiting() {
    let folder = tempfile::tempdir().expect("a folder");
    let turns = turns(&folder, Limits { exports: 2, ..Limits::default() });
    let pools = BTreeSet::from([of("a")]);
    let (patience, left) = (Cancel::within(PATIENCE), AtomicUsize::new(3));
    let (now, is_over) = (AtomicUsize::new(0), AtomicBool::new(false));
    let with_turn = || {
        let turn = turns.transfer(&pools, &patience, &quiet).expect("its turn comes");
        assert!(now.fetch_add(1, Ordering::SeqCst) < 2, "more than two at once");
        thread::sleep(Duration::from_millis(5));
        now.fetch_sub(1, Ordering::SeqCst);
        drop(turn);
    };
    thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                while !is_over.load(Ordering::SeqCst) {
                    with_turn();
                }
            });
        }
        for _ in 0..3 {
            scope.spawn(|| {
                (0..3).for_each(|_| with_turn());
                if left.fetch_sub(1, Ordering::SeqCst) == 1 {
                    is_over.store(true, Ordering::SeqCst);
                }
            });
        }
    });
}
