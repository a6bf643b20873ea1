//! The machines of a run: found in their pools, backed up a few at a time, and tried again where that may help.
//!
//! ```text
//! pools ─► machines that are meant ─► round 1: all, a few at a time ─► round 2: those that failed ─► ...
//! ```
//!
//! Each try is a run of its own in the pool: with its own journal there, and a token that stops nothing but it.

use std::collections::VecDeque;
use std::path::PathBuf;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::json;
use xapi::Cancel;

use super::live::Writer;
use super::pools::{Asked, Connected, Pools, connect_replicas};
use super::recorder::Recorder;
use super::until::{Ended, Until};
use crate::cli::exit::Exit;
use crate::cli::replicas::ReplicaPools;
use crate::cli::store;
use crate::cli::text::{Shown, count};
use crate::ingest::{Destination, Extent, Report, Wanted, Watch};
use crate::job::log::{Event, VmStatus};
use crate::job::{Job, Kind, Machine, SinceKey, Timed, select};
use crate::pool::{self, Done, Run, State};
use crate::probe;

/// How often it is looked whether something is to be stopped.
const TICK: Duration = Duration::from_millis(100);
/// What happens next to a machine that has no new backup.
const NEXT_RUN: &str = "its backups of before are as they were; the next run tries again";
/// The schedule of what a person started, where no other is meant.
const BY_HAND: &str = "by-hand";

/// What a run is made of.
pub struct Machines<'a> {
    pub job: &'a Job,
    pub timed: Option<&'a Timed>,
    pub is_full: bool,
    pub state: &'a State,
    pub state_dir: Option<PathBuf>,
    pub destinations: &'a [Destination],
    pub since_key: &'a SinceKey,
    pub recorder: &'a Recorder,
    /// Tells what is being done.
    pub live: &'a Writer,
    /// Ends all.
    pub until: &'a Until,
}

/// What became of a try.
struct Tried {
    status: VmStatus,
    reason: Option<String>,
    backup: Option<serde_json::Value>,
    is_worth_another: bool,
}

/// A machine that is to be tried, again if it was.
struct Open {
    machine: Machine,
    last: Option<Last>,
}

/// The last try of a machine, which failed.
struct Last {
    attempt: u32,
    reason: String,
    seconds: f64,
    backup: Option<serde_json::Value>,
}

/// Machines whose turn comes in a round.
struct Queue {
    waiting: Mutex<Waiting>,
    changed: Condvar,
}

struct Waiting {
    open: VecDeque<Open>,
    /// How many pools may still bring some.
    late: usize,
}

/// A pool that may still bring machines, as long as it is there.
struct Late<'a>(&'a Queue);

impl Queue {
    fn new(open: VecDeque<Open>, late: usize) -> Self {
        Self { waiting: Mutex::new(Waiting { open, late }), changed: Condvar::new() }
    }

    /// Returns the next one, waiting for pools that are late.
    fn next(&self) -> Option<Open> {
        let mut waiting = self.lock();
        loop {
            match waiting.open.pop_front() {
                None if waiting.late > 0 => {
                    waiting = self.changed.wait(waiting).unwrap_or_else(PoisonError::into_inner);
                }
                open => return open,
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Late<'_> {
    fn bring(self, machines: Vec<Machine>) {
        self.0.lock().open.extend(machines.into_iter().map(Open::new));
    }
}

impl Drop for Late<'_> {
    fn drop(&mut self) {
        let mut waiting = self.0.lock();
        waiting.late = waiting.late.saturating_sub(1);
        drop(waiting);
        self.0.changed.notify_all();
    }
}

impl Open {
    fn new(machine: Machine) -> Self {
        Self { machine, last: None }
    }
}

/// Backs up all that is meant. Returns why nothing could be, if that is so.
pub fn back_up(run: &Machines) -> Option<String> {
    let (pools, mut replicas) = (Pools::default(), ReplicaPools::default());
    let mut late = pools.ask(run);
    let are_all_known = late.is_empty();
    if let Some(nothing) = are_all_known.then(|| tell_missing(run, &pools)).flatten() {
        return Some(nothing);
    }
    let (machines, _) = select(&run.job.vms, &pools.machines());
    let mut left: VecDeque<Open> = machines.into_iter().map(Open::new).collect();
    for attempt in 1..=run.job.retries.vm.saturating_add(1) {
        if (left.is_empty() && late.is_empty()) || run.until.ended().is_some() {
            break;
        }
        if attempt > 1 {
            // What is ended meanwhile ends below.
            let _ = run.until.token().sleep(run.job.retries.pause, "wait before the next try");
        }
        connect_replicas(run, &mut replicas);
        left = round(run, &pools, std::mem::take(&mut late), &replicas, left, attempt);
        if let Some(nothing) = (attempt == 1 && !are_all_known).then(|| tell_missing(run, &pools)).flatten() {
            return Some(nothing);
        }
    }
    if let Some(ended) = run.until.ended() {
        give_up(run, left, ended);
    }
    None
}

/// Notes what is named in vain, once all pools have answered. Returns that nothing is meant, if it is so.
fn tell_missing(run: &Machines, pools: &Pools) -> Option<String> {
    // It may be in the pool that could not be asked.
    if pools.has_failed() {
        return None;
    }
    let (machines, missing) = select(&run.job.vms, &pools.machines());
    for missing in &missing {
        run.recorder.never_tried(&missing.name, "", &missing.reason);
    }
    let is_nothing = machines.is_empty() && missing.is_empty();
    is_nothing.then(|| "no VM of the pools is one that the job means".to_owned())
}

/// Notes what is true of machines that are not tried any more, whatever was noted of them before.
fn give_up(run: &Machines, left: VecDeque<Open>, ended: Ended) {
    if !left.is_empty() {
        say!(
            "xofs: {} {} not tried any more: {ended}",
            count(left.len(), "VM"),
            if left.len() == 1 { "is" } else { "are" }
        );
    }
    for Open { machine, last } in left {
        let (attempt, status, reason, seconds, backup) = match last {
            None => (0, ended.status(), format!("it never was its turn: {ended}"), 0.0, None),
            Some(Last { attempt, reason, seconds, backup }) => {
                (attempt, VmStatus::Failed, format!("{reason}; it is not tried again: {ended}"), seconds, backup)
            }
        };
        let Machine { uuid: vm, name, pool, .. } = machine;
        let (reason, next) = (Some(reason), Some(NEXT_RUN.to_owned()));
        run.recorder.note(Event::VmEnd { vm, name, pool, attempt, status, reason, next, seconds, backup });
    }
}

/// Tries each machine once, a few at a time, those of pools that are late behind the others. Returns those that are worth another
/// try, or whose turn it was not before the end.
fn round(
    run: &Machines,
    pools: &Pools,
    late: Vec<Asked>,
    replicas: &ReplicaPools,
    machines: VecDeque<Open>,
    attempt: u32,
) -> VecDeque<Open> {
    let at_most = if late.is_empty() { machines.len() } else { usize::MAX };
    let at_once = usize::try_from(run.job.limits.vms).unwrap_or(usize::MAX).min(at_most);
    let (queue, again) = (Queue::new(machines, late.len()), Mutex::new(VecDeque::new()));
    let work = || {
        while let Some(Open { machine, last }) = queue.next() {
            let Some(connected) = pools.get(&machine.pool) else { continue };
            let last = match run.until.ended() {
                Some(_) => last,
                None => match attempt_one(run, &connected, replicas, &machine, attempt) {
                    None => continue,
                    again => again,
                },
            };
            again.lock().unwrap_or_else(PoisonError::into_inner).push_back(Open { machine, last });
        }
    };
    thread::scope(|scope| {
        for asked in &late {
            let late = Late(&queue);
            let ask = move || late.bring(pools.ask_again(run, asked));
            if let Err(error) = thread::Builder::new().name("job-pool".to_owned()).spawn_scoped(scope, ask) {
                pools.fail(run, asked.name, &format!("it cannot be asked again: {error}"));
            }
        }
        for _ in 1..at_once {
            // Where the system refuses another thread, there are fewer.
            if thread::Builder::new().name("job-vm".to_owned()).spawn_scoped(scope, work).is_err() {
                break;
            }
        }
        work();
    });
    again.into_inner().unwrap_or_else(PoisonError::into_inner)
}

/// Tries a machine, and notes what became of it. Returns that if it is to be tried again.
fn attempt_one(
    run: &Machines,
    connected: &Connected,
    replicas: &ReplicaPools,
    machine: &Machine,
    attempt: u32,
) -> Option<Last> {
    let (vm, name, pool) = (machine.uuid.clone(), machine.name.clone(), machine.pool.clone());
    run.recorder.note(Event::VmStart { vm: vm.clone(), name: name.clone(), pool: pool.clone(), attempt });
    let begun = Instant::now();
    let Tried { status, reason, backup, is_worth_another } = tried(run, connected, replicas, machine);
    let is_again = is_worth_another && attempt <= run.job.retries.vm && run.until.ended().is_none();
    let next = match status {
        VmStatus::Done | VmStatus::LeftOut => None,
        _ if is_again => Some(format!("it is tried again after the others, in {} s", run.job.retries.pause.as_secs())),
        VmStatus::Partial => Some("the next run stores in each repository and SR what it needs".to_owned()),
        VmStatus::Failed | VmStatus::Interrupted => Some(NEXT_RUN.to_owned()),
    };
    if let Some(reason) = reason.as_ref().filter(|_| status != VmStatus::LeftOut) {
        say!("xofs: {}: {}; {}", Shown(&name), Shown(reason), next.as_deref().unwrap_or_default());
    }
    let seconds = begun.elapsed().as_secs_f64();
    let last =
        is_again.then(|| Last { attempt, reason: reason.clone().unwrap_or_default(), seconds, backup: backup.clone() });
    run.recorder.note(Event::VmEnd { vm, name, pool, attempt, status, reason, next, seconds, backup });
    last
}

fn tried(run: &Machines, connected: &Connected, replicas: &ReplicaPools, machine: &Machine) -> Tried {
    let until = run.until.of_vm();
    let own = until.token();
    let of = machine.name.clone();
    let watch = Arc::new(Watch::new(move |sentence| say!("xofs: {}: {}", Shown(&of), Shown(sentence))));
    watch.transfer().is_of_pool(&machine.pool);
    let _shown = run.live.show(machine, &watch);
    let act = || back_up_one(run, connected, replicas, machine, &own, &watch);
    let (done, ended) = watched(&until, &own, &watch, act);
    let failed = |reason: String, status, is_worth_another| {
        // Where its time went all the same.
        let transfer = watch.transfer().reading();
        let backup = (!transfer.stages.is_empty()).then(|| json!({ "transfer": probe::transfer_to_json(&transfer) }));
        Tried { status, reason: Some(reason), backup, is_worth_another }
    };
    match (done, ended) {
        (Ok(Done::Made(report)), _) => of_report(&report),
        (Ok(Done::LeftOut(reason)), _) => {
            Tried { status: VmStatus::LeftOut, reason: Some(reason), backup: None, is_worth_another: false }
        }
        // It is asked to be explained nowhere here.
        (Ok(Done::Explained(_)), _) => failed("it was only explained".to_owned(), VmStatus::Failed, false),
        (Err(_), Some(ended)) => failed(ended.reason(), ended.status(), matches!(ended, Ended::VmTimeout(_))),
        (Err(error), None) => {
            let is_worth_another = is_worth_another(&error);
            failed(error.to_string(), VmStatus::Failed, is_worth_another)
        }
    }
}

/// Whether another try may end otherwise.
pub fn is_worth_another(error: &pool::Error) -> bool {
    use pool::ErrorKind::{Pool, Untrusted, Usage};
    !matches!(error.kind(), Usage | Untrusted | Pool(xapi::ErrorKind::Credentials | xapi::ErrorKind::Untrusted))
}

fn back_up_one(
    run: &Machines,
    connected: &Connected,
    replicas: &ReplicaPools,
    machine: &Machine,
    own: &Cancel,
    watch: &Watch,
) -> pool::Result<Done> {
    let of = &machine.name;
    let say = |sentence: &str| say!("xofs: {}: {}", Shown(of), Shown(sentence));
    let pool = connected.pool.with(own);
    let wishes = replicas.wishes(&run.job.srs, &machine.pool, own);
    let in_pool = Run::begin(pool, run.state, &connected.options, run.destinations, wishes, &say)?;
    let vm = in_pool.find(&machine.uuid)?;
    let layout = match &run.job.kind {
        Kind::Incremental(how) => how.layout,
        Kind::Full(_) => None,
    };
    let wanted = Wanted {
        extent: extent(run, machine),
        layout,
        disk_retries: run.job.retries.disk,
        schedule: Some(run.timed.map_or(BY_HAND, |timed| timed.name.as_str()).to_owned()),
        ..Wanted::default()
    };
    in_pool.back_up(vm, wanted, watch, false)
}

/// Decides whether all blocks are stored: where it is asked for, or as many backups were made since the last key as the job says.
fn extent(run: &Machines, machine: &Machine) -> Option<Extent> {
    let Kind::Incremental(how) = &run.job.kind else { return None };
    let since = run.since_key.count(&machine.uuid);
    let is_due = how.key_every.is_some_and(|every| since.saturating_add(1) >= every);
    (run.is_full || run.timed.is_some_and(|timed| timed.is_full) || is_due).then_some(Extent::Full)
}

fn of_report(report: &Report) -> Tried {
    let failures: Vec<String> = report
        .outcomes
        .iter()
        .filter_map(|outcome| Some(format!("{}: {}", outcome.name, outcome.stored.as_ref().err()?)))
        .collect();
    let status = match (store::exit(report, None), failures.len() == report.outcomes.len()) {
        (Exit::Done, _) => VmStatus::Done,
        (_, true) => VmStatus::Failed,
        _ => VmStatus::Partial,
    };
    let reason = (!failures.is_empty()).then(|| failures.join("; "));
    let is_worth_another = status == VmStatus::Failed;
    Tried { status, reason, backup: Some(store::to_json(report, None)), is_worth_another }
}

/// Does something that is ended when its time is over. Returns what ended it, if anything.
fn watched<T>(until: &Until, own: &Cancel, watch: &Watch, act: impl FnOnce() -> T) -> (T, Option<Ended>) {
    let (done, is_done) = mpsc::channel::<()>();
    thread::scope(|scope| {
        let watcher = scope.spawn(move || {
            while let Err(RecvTimeoutError::Timeout) = is_done.recv_timeout(TICK) {
                let ended = until.ended();
                if ended.is_some() {
                    own.cancel();
                    watch.cancel();
                    return ended;
                }
            }
            None
        });
        let result = act();
        drop(done);
        let ended = watcher.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        // What waits with the token of its own may have seen it first.
        (result, ended.or_else(|| until.ended()))
    })
}
