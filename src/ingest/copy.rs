//! One pass over a disk, to all destinations at once.
//!
//! ```text
//! source ─► readers ─► blocks ─► workers: hash, compare with each base, encode per format ─┬► lane of a destination ─► writers
//!                    (bounded)                                                            └► lane ...      (bounded)
//! ```
//!
//! The slowest destination that lives sets the pace. One that failed takes no more blocks, and the others go on. Blocks are
//! stored in no order; each is there once.
//!
//! Memory: with R readers, N workers (one for each core), F formats and D destinations, at most
//! R + N + N × (2 + F) + D × ([`DEPTH`] + 2 × [`WRITERS`]) blocks of 2 MiB, besides the caches and digests of the bases.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, Builder, Scope};

use crossbeam::channel::{self, Receiver, Sender};
use vhd::{BlockSink, EncodedBlock, Format};

use super::block::{BLOCK, Block, Compared, encode, is_needed};
use super::error::{Error, ErrorKind, Result};
use super::feed::Feed;
use super::intake::{Intake, Taken};
use super::plan::DiskPlan;
use super::probe::Probe;
use super::run::Stages;
use super::watch::Watch;

/// Threads that read a disk, enough to keep a disk or a network busy.
const READERS: usize = 4;
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

/// A destination of one disk.
pub(super) struct Lane<'a> {
    pub plan: &'a DiskPlan,
    pub compared: &'a Compared,
    pub sink: &'a dyn BlockSink,
    pub failure: &'a Failure,
    pub probe: &'a Probe,
}

/// Stores what a disk holds in each lane; returns its size in bytes. Errors of a lane are its failure.
///
/// # Errors
/// What the source says if it cannot be read, or ends otherwise than it should; [`ErrorKind::Interrupted`].
pub(super) fn copy(feed: &Feed, lanes: &[Lane], stages: &Stages, watch: &Watch, taken: &Taken) -> Result<u64> {
    let workers = thread::available_parallelism().map_or(1, usize::from);
    let broken = Failure::default();
    let (give_block, take_block) = channel::bounded::<Block>(workers);
    let (give_spare, take_spare) = channel::bounded::<Vec<u8>>(READERS + 2 * workers);
    let is_over = || watch.is_cancelled() || broken.is_failed() || lanes.iter().all(|lane| lane.failure.is_failed());
    let candidates = feed.candidates(&lanes.iter().map(|lane| lane.plan).collect::<Vec<_>>())?;
    let live = || lanes.iter().filter(|lane| !lane.failure.is_failed());
    let bases = || live().filter_map(|lane| lane.plan.base.as_ref()).filter(|base| base.changed.is_some());
    watch.expect(candidates.len() as u64 * BLOCK as u64);
    let (next, size) = (AtomicUsize::new(0), Mutex::new(feed.size()));
    thread::scope(|scope| {
        let mut outputs = Vec::with_capacity(lanes.len());
        for lane in lanes {
            let (give, take) = channel::bounded::<Arc<EncodedBlock>>(DEPTH);
            start(scope, WRITERS, || {
                let take = take.clone();
                move || write(lane, &take)
            })?;
            outputs.push(give);
        }
        start(scope, workers, || {
            let (take_block, outputs, give_spare) = (take_block.clone(), outputs.clone(), give_spare.clone());
            move || work(&take_block, lanes, &outputs, stages, watch, &give_spare)
        })?;
        drop((take_block, outputs));
        start(scope, feed.readers(READERS), || {
            let (give, spare) = (give_block.clone(), take_spare.clone());
            let intake = Intake { give, spare, is_over: &is_over, probe: &stages.read, taken };
            let (broken, candidates, next, bases, size) = (&broken, &candidates, &next, &bases, &size);
            move || match intake.read(feed, candidates, next, bases) {
                Ok(None) => {}
                Ok(found) => *size.lock().unwrap_or_else(PoisonError::into_inner) = found,
                Err(error) => broken.set(error),
            }
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

/// Decides for each lane whether it stores a block, and encodes it once for each format.
fn work(
    take: &Receiver<Block>,
    lanes: &[Lane],
    outputs: &[Sender<Arc<EncodedBlock>>],
    stages: &Stages,
    watch: &Watch,
    spare: &Sender<Vec<u8>>,
) {
    let mut scratch = Vec::new();
    while let Ok(block) = stages.compare.take(|| take.recv()) {
        let mut made: Vec<(Format, Arc<EncodedBlock>)> = Vec::new();
        for (lane, output) in lanes.iter().zip(outputs).filter(|(lane, _)| !lane.failure.is_failed()) {
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
        watch.sees(take.is_empty(), outputs.iter().any(Sender::is_full));
        if let Some(data) = block.data {
            // A full channel of buffers needs no more.
            let _ = spare.try_send(data);
        }
    }
}

/// Stores blocks until there are no more; once it failed they are dropped, so that nobody waits for it.
fn write(lane: &Lane, take: &Receiver<Arc<EncodedBlock>>) {
    while let Ok(block) = lane.probe.take(|| take.recv()) {
        if lane.failure.is_failed() {
            continue;
        }
        match lane.probe.work(|| lane.sink.store(&block)) {
            Ok(()) => lane.probe.add(block.bytes().len()),
            Err(error) => lane.failure.set(error.into()),
        }
    }
}
