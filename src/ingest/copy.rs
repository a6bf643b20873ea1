//! One pass over a disk, to all destinations at once.
//!
//! ```text
//! source ─► readers ─► blocks ─► workers: hash, compare with each base, encode per format ─┬► lane of a repository ─► writers
//!                    (bounded)           as they are, to replicas                         ├► lane ...      (bounded)
//!                                                                                         └► lane of a replica ─► in order (ordered)
//! ```
//!
//! The slowest destination that lives sets the pace. One that failed takes no more blocks, and the others go on. In repositories
//! blocks are stored in no order; each is there once.
//!
//! Memory: with R readers (4, or 16 of a disk behind NBD), N workers (one for each core), F formats and D repositories, at most
//! R + N + N × (2 + F) + D × ([`DEPTH`] + 2 × [`WRITERS`]) blocks of 2 MiB, and with replicas [`WINDOW`] more; besides the caches
//! and digests of the bases. It goes round: what was written is read into again. A block that nothing compresses is stored from where
//! it was read to.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, Builder, Scope};

use crossbeam::channel::{self, Receiver, Sender};
use vhd::{BlockSink, EncodedBlock, Format, WholeBlock};

use super::block::{BLOCK, Block, Compared, encode, is_needed};
use super::error::{Error, ErrorKind, Result};
use super::feed::{Candidates, Feed};
use super::intake::{Intake, Taken};
use super::ordered::{self, Order, Queued, ReplicaLane, WINDOW};
use super::plan::DiskPlan;
use super::run::Stages;
use super::watch::Watch;
use crate::probe::Probe;

/// Threads that write to one destination; a file is made for each block, which waits more than it works.
const WRITERS: usize = 4;
/// Blocks that wait for the writers of a destination.
const DEPTH: usize = 4;
/// Why a destination takes no more; the first error counts.
#[derive(Default)]
pub(super) struct Failure {
    is_failed: AtomicBool,
    error: Mutex<Option<Error>>,
}

impl Failure {
    pub fn set(&self, error: Error) {
        self.error.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
        self.is_failed.store(true, Ordering::Release);
    }

    pub fn take(&self) -> Option<Error> {
        self.error.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    pub fn is_failed(&self) -> bool {
        self.is_failed.load(Ordering::Acquire)
    }
}

/// The destinations of one disk.
#[derive(Default)]
pub(super) struct Lanes<'a> {
    pub repositories: Vec<Lane<'a>>,
    pub replicas: Vec<ReplicaLane<'a>>,
}

/// A repository that takes the blocks of one disk.
pub(super) struct Lane<'a> {
    pub plan: &'a DiskPlan,
    pub compared: &'a Compared,
    pub sink: &'a dyn BlockSink,
    pub failure: &'a Failure,
    pub probe: &'a Probe,
}

/// Where the blocks go that are worked on: repositories with what they are stored by, and replicas.
#[derive(Clone)]
struct Outputs<'a> {
    repositories: Vec<(&'a Lane<'a>, Sender<Arc<EncodedBlock>>)>,
    replicas: Vec<(&'a Failure, Sender<Queued>)>,
    order: &'a Order<'a>,
    /// Memory for blocks.
    spare: &'a Sender<Vec<u8>>,
}

impl Outputs<'_> {
    /// Whether one is waited for.
    fn are_full(&self) -> bool {
        self.repositories.iter().any(|(_, output)| output.is_full())
            || self.replicas.iter().any(|(_, output)| output.len() >= WINDOW / 2)
    }
}

/// Stores `candidates` of what a disk holds in each lane; returns its size in bytes. Errors of a lane are its failure.
///
/// # Errors
/// What the source says if it cannot be read, or ends otherwise than it should; [`ErrorKind::Interrupted`].
pub(super) fn copy(
    feed: &Feed,
    candidates: &Candidates,
    lanes: Lanes,
    stages: &Stages,
    watch: &Watch,
    taken: &Taken,
) -> Result<u64> {
    let Lanes { repositories, replicas } = lanes;
    let workers = thread::available_parallelism().map_or(1, usize::from);
    let broken = Failure::default();
    let of_repositories = repositories.iter().map(|lane| lane.failure);
    let failures: Vec<&Failure> = of_repositories.chain(replicas.iter().map(|lane| lane.failure)).collect();
    let order = Order::new(&candidates.replicated, replicas.len(), WINDOW);
    let (give_block, take_block) = channel::bounded::<Block>(workers);
    let spares = feed.readers() + 2 * workers + repositories.len() * (DEPTH + WRITERS);
    let (give_spare, take_spare) = channel::bounded::<Vec<u8>>(spares);
    let is_over = || watch.is_cancelled() || broken.is_failed() || failures.iter().all(|failure| failure.is_failed());
    let live = || repositories.iter().filter(|lane| !lane.failure.is_failed());
    let bases = || live().filter_map(|lane| lane.plan.base.as_ref()).filter(|base| base.changed.is_some());
    let bases = || (!repositories.is_empty()).then(bases);
    watch.expect(candidates.all.len() as u64 * BLOCK as u64);
    let (next, size) = (AtomicUsize::new(0), Mutex::new(feed.size()));
    thread::scope(|scope| {
        let (broken, order, is_over, spare) = (&broken, &order, &is_over, &give_spare);
        let mut outputs = Outputs { repositories: Vec::new(), replicas: Vec::new(), order, spare };
        for lane in &repositories {
            let (give, take) = channel::bounded::<Arc<EncodedBlock>>(DEPTH);
            start(scope, WRITERS, || {
                let take = take.clone();
                move || write(lane, &take, spare)
            })?;
            outputs.repositories.push((lane, give));
        }
        for (number, lane) in replicas.into_iter().enumerate() {
            let (give, take) = channel::bounded::<Queued>(WINDOW);
            outputs.replicas.push((lane.failure, give));
            let write = move || ordered::write(lane, number, order, &take, is_over, &|block| recycle(block, spare));
            start_one(scope, move || told(broken, write))?;
        }
        start(scope, workers, || {
            let (take_block, outputs) = (take_block.clone(), outputs.clone());
            move || told(broken, || work(&take_block, &outputs, stages, watch))
        })?;
        drop((take_block, outputs));
        start(scope, feed.readers(), || {
            let (give, spare) = (give_block.clone(), take_spare.clone());
            let intake = Intake { give, spare, is_over, order, probe: &stages.read, taken };
            let (next, bases, size) = (&next, &bases, &size);
            let read = move || match intake.read(feed, &candidates.all, next, bases) {
                Ok(None) => {}
                Ok(found) => *size.lock().unwrap_or_else(PoisonError::into_inner) = found,
                Err(error) => broken.set(error),
            };
            move || told(broken, read)
        })?;
        drop(give_block);
        Ok::<(), Error>(())
    })?;
    match broken.take() {
        _ if watch.is_cancelled() => Err(Error::interrupted()),
        Some(error) => Err(error),
        None => Ok(size.into_inner().unwrap_or_else(PoisonError::into_inner).unwrap_or(0)),
    }
}

/// Does what a thread does; if it panics, all end, since nobody else brings what it had.
fn told(broken: &Failure, act: impl FnOnce()) {
    struct Told<'a>(&'a Failure);
    impl Drop for Told<'_> {
        fn drop(&mut self) {
            if thread::panicking() {
                self.0.set(Error::new(ErrorKind::Source, "a thread panicked"));
            }
        }
    }
    let _told = Told(broken);
    act();
}

/// Starts up to `count` threads; where the system refuses one there are fewer, but one is needed.
fn start<'scope, F: FnOnce() + Send + 'scope>(
    scope: &'scope Scope<'scope, '_>,
    count: usize,
    work: impl Fn() -> F,
) -> Result<()> {
    start_one(scope, work())?;
    let _fewer = (1..count).try_for_each(|_| start_one(scope, work()));
    Ok(())
}

/// Starts a thread.
pub(super) fn start_one<'scope>(scope: &'scope Scope<'scope, '_>, work: impl FnOnce() + Send + 'scope) -> Result<()> {
    let started = Builder::new().name("xofs-ingest".to_owned()).spawn_scoped(scope, work);
    started.map(drop).map_err(|error| {
        let message = format!("start a thread: {error}: raise the limit of processes, or end other programs");
        Error::new(ErrorKind::Source, message)
    })
}

/// Decides for each repository whether it stores a block, and encodes it once for each format. Replicas get it as it is.
fn work(take: &Receiver<Block>, outputs: &Outputs, stages: &Stages, watch: &Watch) {
    let mut scratch = Vec::new();
    while let Ok(block) = stages.compare.take(|| take.recv()) {
        let block = Arc::new(block);
        outputs.order.give(&block, &outputs.replicas);
        let mut made: Vec<(Format, Arc<EncodedBlock>)> = Vec::new();
        for (lane, output) in outputs.repositories.iter().filter(|(lane, _)| !lane.failure.is_failed()) {
            match is_needed(lane.plan, &block, &mut scratch, stages, lane.compared) {
                Ok(true) => {}
                Ok(false) => continue,
                Err(error) => {
                    lane.failure.set(error);
                    continue;
                }
            }
            let known = made.iter().find(|(format, _)| *format == lane.plan.format).map(|(_, block)| block.clone());
            let digest = block.digest(&stages.hash);
            // As many work as there are cores, at this as at all else.
            let encode = || encode(lane.plan, &block).map(|encoded| Arc::new(encoded.with_digest(digest)));
            let encoded = match known.map_or_else(|| stages.encode.work(encode), Ok) {
                Ok(encoded) => encoded,
                Err(error) => {
                    lane.failure.set(error);
                    continue;
                }
            };
            if !made.iter().any(|(format, _)| *format == lane.plan.format) {
                stages.encode.add(block.len);
                made.push((lane.plan.format, encoded.clone()));
            }
            drop(stages.encode.give(|| output.send(encoded)));
        }
        watch.advance(BLOCK as u64);
        watch.sees(take.is_empty(), outputs.are_full());
        recycle(block, outputs.spare);
    }
}

/// Gives the memory of a block back, once nobody has it any more.
fn recycle(block: Arc<Block>, spare: &Sender<Vec<u8>>) {
    recycle_memory(Arc::into_inner(block).and_then(|block| block.data), spare);
}

fn recycle_memory(block: Option<Arc<WholeBlock>>, spare: &Sender<Vec<u8>>) {
    if let Some(block) = block.and_then(Arc::into_inner) {
        // A full channel of buffers needs no more.
        let _ = spare.try_send(block.into_memory());
    }
}

/// Stores blocks until there are no more; once it failed they are dropped, so that nobody waits for it.
fn write(lane: &Lane, take: &Receiver<Arc<EncodedBlock>>, spare: &Sender<Vec<u8>>) {
    while let Ok(block) = lane.probe.take(|| take.recv()) {
        if lane.failure.is_failed() {
            continue;
        }
        match lane.probe.work(|| lane.sink.store(&block)) {
            Ok(()) => lane.probe.add(block.bytes().len()),
            Err(error) => lane.failure.set(error.into()),
        }
        recycle_memory(Arc::into_inner(block).and_then(EncodedBlock::into_plain), spare);
    }
}
