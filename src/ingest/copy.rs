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

use std::cell::OnceCell;
use std::fs::File;
use std::io::{self, Read};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, Builder, Scope};

use crossbeam::channel::{self, Receiver, Sender};
use disk::Disk;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use vhd::{BlockIndex, BlockSink, BlockSize, Digest, EncodedBlock, Format};

use super::error::{Error, ErrorKind, Result};
use super::plan::{DiskPlan, STREAM_SIZE};
use super::probe::Probe;
use super::run::Stages;
use super::source::{Source, refuse_foreign};
use super::watch::Watch;

/// Threads that read an image, enough to keep a disk or a network busy.
const READERS: usize = 4;
/// Threads that write to one destination; a file is made for each block, which waits more than it works.
const WRITERS: usize = 4;
/// Blocks that wait for the writers of a destination.
const DEPTH: usize = 4;
/// Bytes of a block, the size that Xen Orchestra writes.
const BLOCK: usize = 2 << 20;
/// Bytes compared at a time.
const PIECE: usize = 64 << 10;
static ZEROES: [u8; BLOCK] = [0; BLOCK];

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

/// How blocks of a disk were compared with the base.
#[derive(Default)]
pub(super) struct Compared {
    by_digest: AtomicU64,
    by_bytes: AtomicU64,
}

impl Compared {
    /// Returns how many were compared by digest, and how many by bytes.
    pub fn counts(&self) -> (u64, u64) {
        (self.by_digest.load(Ordering::Relaxed), self.by_bytes.load(Ordering::Relaxed))
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

/// A block of the source; `None` for zeroes.
struct Block {
    index: BlockIndex,
    len: usize,
    data: Option<Vec<u8>>,
    /// Made when it is first asked for.
    digest: OnceCell<Digest>,
}

impl Block {
    fn new(index: BlockIndex, len: usize, data: Option<Vec<u8>>) -> Self {
        Self { index, len, data, digest: OnceCell::new() }
    }

    fn digest(&self, probe: &Probe) -> Digest {
        *self.digest.get_or_init(|| match &self.data {
            Some(data) => {
                probe.add(self.len);
                probe.work(|| Digest::of(data, BlockSize::DEFAULT))
            }
            None => Digest::of_zeroes(BlockSize::DEFAULT),
        })
    }

    fn bytes(&self) -> &[u8] {
        self.data.as_deref().unwrap_or(&ZEROES[..self.len])
    }
}

/// Stores what a disk holds in each lane; returns its size in bytes. Errors of a lane are its failure.
///
/// # Errors
/// [`ErrorKind::Source`] if the image cannot be read, [`ErrorKind::Interrupted`].
pub(super) fn copy(source: &Source, lanes: &[Lane], stages: &Stages, watch: &Watch) -> Result<u64> {
    let workers = thread::available_parallelism().map_or(1, usize::from);
    let broken = Failure::default();
    let (give_block, take_block) = channel::bounded::<Block>(workers);
    let (give_spare, take_spare) = channel::bounded::<Vec<u8>>(READERS + 2 * workers);
    let is_over = || watch.is_cancelled() || broken.is_failed() || lanes.iter().all(|lane| lane.failure.is_failed());
    let candidates = match source {
        Source::Disk(disk) => candidates(disk.as_ref(), &lanes.iter().map(|lane| lane.plan).collect::<Vec<_>>())?,
        Source::Stream(_) => Vec::new(),
    };
    watch.expect(candidates.len() as u64 * BLOCK as u64);
    let (next, size) = (AtomicUsize::new(0), Mutex::new(source.size().unwrap_or(0)));
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
        match source {
            Source::Disk(disk) => start(scope, READERS, || {
                let (give_block, take_spare, next, candidates) =
                    (give_block.clone(), take_spare.clone(), &next, &candidates);
                let (is_over, broken) = (&is_over, &broken);
                move || {
                    while !is_over() {
                        let Some(block) = candidates.get(next.fetch_add(1, Ordering::Relaxed)) else { return };
                        let spare = take_spare.try_recv().unwrap_or_default();
                        match read(disk.as_ref(), BlockIndex(*block), spare, &stages.read) {
                            Ok(block) => drop(stages.read.give(|| give_block.send(block))),
                            Err(error) => broken.set(of_source(&error)),
                        }
                    }
                }
            })?,
            Source::Stream(stream) => start(scope, 1, || {
                let (give_block, size, is_over, broken) = (give_block.clone(), &size, &is_over, &broken);
                move || match read_stream(stream, &give_block, is_over, &stages.read) {
                    Ok(len) => *size.lock().unwrap_or_else(PoisonError::into_inner) = len,
                    Err(error) => broken.set(error),
                }
            })?,
        }
        drop(give_block);
        Ok::<(), Error>(())
    })?;
    match broken.take() {
        _ if watch.is_cancelled() => Err(Error::interrupted()),
        Some(error) => Err(error),
        None => Ok(size.into_inner().unwrap_or_else(PoisonError::into_inner)),
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

/// Returns the blocks that may have to be stored: all but those that are holes in the source and in each base, or are known to
/// be the same in each base.
pub(super) fn candidates(source: &dyn Disk, plans: &[&DiskPlan]) -> Result<Vec<u32>> {
    let mut holes = Holes::new(source);
    let is_same = |block: u64| plans.iter().all(|plan| plan.base.as_ref().is_some_and(|base| base.has(block)));
    let mut bases: Vec<Holes> =
        plans.iter().filter_map(|plan| Some(Holes::new(plan.base.as_ref()?.disk.as_ref()))).collect();
    let mut candidates = Vec::new();
    let count = BlockSize::DEFAULT.block_count(source.size());
    for block in 0..u32::try_from(count).expect("a disk to be stored has at most 2^24 blocks") {
        let start = BlockIndex(block).0.into();
        if is_same(start) {
            continue;
        }
        let is_hole = holes.covers(start).map_err(|error| of_source(&error))?;
        // What a base does not say is found out when it is read.
        if !is_hole || bases.iter_mut().any(|base| !matches!(base.covers(start), Ok(true))) {
            candidates.push(block);
        }
    }
    Ok(candidates)
}

/// Returns a block of the source as `plan` stores it; `None` if it does not.
pub(super) fn encoded(source: &dyn Disk, plan: &DiskPlan, index: BlockIndex) -> Result<Option<EncodedBlock>> {
    let block = read(source, index, Vec::new(), &Probe::default()).map_err(|error| of_source(&error))?;
    if !is_needed(plan, &block, &mut Vec::new(), &Stages::default(), &Compared::default())? {
        return Ok(None);
    }
    encode(plan, &block).map(Some)
}

fn encode(plan: &DiskPlan, block: &Block) -> Result<EncodedBlock> {
    let failed = |error: vhd::FormatError| Error::new(ErrorKind::Source, error.reason);
    plan.layer.encode(plan.format, block.index, block.bytes()).map_err(failed)
}

fn of_source(error: &disk::Error) -> Error {
    Error::new(ErrorKind::Source, error.to_string())
}

/// The holes of a disk, asked for in ascending order.
struct Holes<'a> {
    disk: &'a dyn Disk,
    from: u64,
    until: u64,
    is_hole: bool,
}

impl<'a> Holes<'a> {
    fn new(disk: &'a dyn Disk) -> Self {
        Self { disk, from: 0, until: 0, is_hole: false }
    }

    /// Whether a block, by its number, is a hole as far as the disk reaches.
    fn covers(&mut self, block: u64) -> disk::Result<bool> {
        let mut at = block * BLOCK as u64;
        let end = (at + BLOCK as u64).min(self.disk.size());
        while at < end {
            if !(self.from..self.until).contains(&at) {
                let extent = self.disk.extent_at(at)?;
                (self.from, self.until, self.is_hole) = (at, at.saturating_add(extent.len), extent.is_hole);
            }
            if !self.is_hole {
                return Ok(false);
            }
            at = self.until;
        }
        Ok(true)
    }
}

/// Returns where a block begins and how many bytes of a disk of `size` bytes it has.
fn place(index: BlockIndex, size: u64) -> (u64, usize) {
    let offset = u64::from(index.0) * BLOCK as u64;
    (offset, usize::try_from(size.saturating_sub(offset)).unwrap_or(usize::MAX).min(BLOCK))
}

fn read(disk: &dyn Disk, index: BlockIndex, mut spare: Vec<u8>, probe: &Probe) -> disk::Result<Block> {
    let (offset, len) = place(index, disk.size());
    probe.work(|| {
        let extent = disk.extent_at(offset)?;
        if extent.is_hole && extent.len >= len as u64 {
            return Ok(Block::new(index, len, None));
        }
        spare.resize(len, 0);
        disk.read_at(offset, &mut spare)?;
        probe.add(len);
        Ok(Block::new(index, len, Some(spare)))
    })
}

/// Reads a stream to its end; returns the size of the disk in bytes, whole sectors.
fn read_stream(stream: &Mutex<File>, give: &Sender<Block>, is_over: impl Fn() -> bool, probe: &Probe) -> Result<u64> {
    let failed = |reason: &dyn std::fmt::Display| Error::new(ErrorKind::Source, format!("read the stream: {reason}"));
    let mut stream = stream.lock().unwrap_or_else(PoisonError::into_inner);
    let mut size = 0;
    for index in 0.. {
        let mut data = vec![0; BLOCK];
        let mut len = 0;
        while len < BLOCK && !is_over() {
            match probe.work(|| read_what_comes(&mut stream, &mut data[len..])) {
                Ok(0) => break,
                Ok(read) => len += read,
                Err(error) if matches!(error.kind(), io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock) => {}
                Err(error) => return Err(failed(&error)),
            }
        }
        if is_over() {
            return Ok(size);
        }
        if index == 0 {
            refuse_foreign("-", &data[..len])?;
        }
        size += len as u64;
        if len > 0 && size > STREAM_SIZE {
            return Err(failed(&format!("it is longer than {STREAM_SIZE} bytes, the most that a disk may have")));
        }
        probe.add(len);
        if len > 0 {
            // What lies past the end is zero.
            let block = Block::new(BlockIndex(index), BLOCK, Some(data));
            drop(probe.give(|| give.send(block)));
        }
        if len < BLOCK {
            break;
        }
    }
    if size == 0 {
        return Err(failed(&"it is empty, the bytes of a disk were expected"));
    }
    Ok(size.next_multiple_of(512))
}

/// Reads what is there; an error of the kind `WouldBlock` if nothing comes for a moment, so that who is to stop does.
fn read_what_comes(stream: &mut File, buffer: &mut [u8]) -> io::Result<usize> {
    const MOMENT: Timespec = Timespec { tv_sec: 0, tv_nsec: 100_000_000 };
    if poll(&mut [PollFd::new(&*stream, PollFlags::IN)], Some(&MOMENT))? == 0 {
        return Err(io::ErrorKind::WouldBlock.into());
    }
    stream.read(buffer)
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

/// Whether a block is to be stored: in a key if it is not all zeroes, in an increment if the base has other bytes there. What
/// lies past the end of the base is zero.
///
/// What the base has is told by its digest, if that is known, else read.
fn is_needed(
    plan: &DiskPlan,
    block: &Block,
    scratch: &mut Vec<u8>,
    stages: &Stages,
    compared: &Compared,
) -> Result<bool> {
    let is_same = |other: &[u8]| is_equal(block.bytes(), other);
    let Some(base) = &plan.base else {
        return Ok(block.data.is_some() && !stages.compare.work(|| is_same(&ZEROES[..block.len])));
    };
    if base.has(block.index.0.into()) {
        return Ok(false);
    }
    if let Some(digest) = base.digests.as_ref().and_then(|digests| digests.of_read(block.index)) {
        compared.by_digest.fetch_add(1, Ordering::Relaxed);
        return Ok(digest != block.digest(&stages.hash));
    }
    compared.by_bytes.fetch_add(1, Ordering::Relaxed);
    stages.compare.add(block.len);
    stages.compare.work(|| {
        let (offset, there) = place(block.index, base.disk.size());
        let there = there.min(block.len);
        scratch.resize(block.len, 0);
        if there > 0 {
            base.disk.read_at(offset, &mut scratch[..there])?;
        }
        scratch[there..].fill(0);
        Ok(!is_same(scratch))
    })
}

/// Whether two pieces of memory are equal; ends soon where they are not.
fn is_equal(a: &[u8], b: &[u8]) -> bool {
    a.len() == b.len() && a.chunks(PIECE).zip(b.chunks(PIECE)).all(|(a, b)| a == b)
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
