//! The bytes of a disk or of an XVA, from the repository into the pool, and back to be compared. Nothing is stored in between.
//!
//! ```text
//! blocks of the disk ─► ahead (several readers) ─► digest ─► bitmap and data, in a VHD of exactly the length that was said ─► pool
//! ```

use std::io::{self, Write};
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use crossbeam::channel;
use disk::Disk;
use storage::Summing;
use vhd::{BlockIndex, BlockSize, ChainDigests, StreamReader, StreamWriter, VhdView};
use xapi::record::{Sr, Vdi, Vm};
use xapi::{ExportOptions, Format, Pool, Ref, Task};

use super::digests::Digests;
use crate::ahead;
use crate::ingest::{self, StoredArchive, Watch};
use crate::pool::error::{Error, ErrorKind, Result};
use crate::probe::{Crew, Probe, Stage, Subject, Transfer, Way};

/// Bytes of a block.
const BLOCK: u64 = 2 << 20;
const BLOCK_LEN: usize = 2 << 20;
/// How long a control domain is waited for that still holds a disk; then it is used nevertheless.
const MOST_HELD: Duration = Duration::from_secs(120);
/// How often that is looked at.
const PAUSE: Duration = Duration::from_millis(200);
/// Pieces of an XVA that wait to be sent.
const DEPTH: usize = 4;

/// What is sent of a disk.
pub struct Content<'a> {
    /// The disk.
    pub disk: &'a Arc<dyn Disk>,
    /// What of it is sent, as a VHD.
    pub image: &'a VhdView,
    /// What is known of its blocks since they were written.
    pub known: Option<&'a ChainDigests>,
}

/// Where the time goes of what is sent into one SR.
pub struct Stages {
    read: Arc<Probe>,
    hash: Arc<Probe>,
    import: Arc<Probe>,
    prepare: Arc<Probe>,
    sync: Arc<Probe>,
    /// Reading back.
    pub verify: Arc<Probe>,
}

impl Stages {
    /// Returns those of a transfer out of the repository `from` into the SR `to`.
    pub fn of(transfer: &Transfer, from: &Subject, to: &Subject) -> Self {
        Self {
            read: transfer.stage(Stage::Read, from, Crew::Readers, Way::Only),
            hash: transfer.stage(Stage::Hash, &Subject::machine(), Crew::Workers, Way::Only),
            import: transfer.stage(Stage::Import, to, Crew::Workers, Way::Only),
            prepare: transfer.step(Stage::Prepare, to),
            sync: transfer.step(Stage::Sync, to),
            verify: transfer.step(Stage::Verify, to),
        }
    }
}

/// Sends a disk into one of the pool, which is free to be used afterwards; returns what its blocks held. Each is compared with what
/// is known of it.
///
/// # Errors
/// [`ErrorKind::Damaged`] if a block is not what was written once, or cannot be read; what the pool says.
pub fn send(pool: &Pool, vdi: &Ref<Vdi>, content: &Content, stages: &Stages, watch: &Watch) -> Result<Digests> {
    let Content { disk, image, known } = content;
    let layout = image.layout();
    let import = stages.prepare.work(|| pool.import_vdi(vdi, Format::Vhd, layout.file_size()))?;
    let mut vhd = StreamWriter::begin(layout.clone(), import).map_err(of_io)?;
    let ranges = layout.present().iter().map(|block| Ok(range_of(BlockIndex(*block), disk.size())));
    let (mut digests, mut next) = (Digests::default(), layout.present().iter());
    let mut waited = Duration::ZERO;
    ahead::read::<Error>(disk, ranges, Some(&stages.read), |offset, bytes, times| {
        pool.cancel().check("the transfer of a disk")?;
        stages.import.has_waited(times.reading.saturating_sub(waited));
        waited = times.reading;
        let block = BlockIndex(*next.next().expect("each piece is one of the blocks"));
        let digest = stages.hash.work(|| digests.add(block, bytes));
        stages.hash.add(bytes.len());
        let expected = known.filter(|known| known.block_size() == BlockSize::DEFAULT);
        if expected.and_then(|known| known.of_read(block)).is_some_and(|expected| expected != digest) {
            let message = format!(
                "the block at byte {offset} is not what was written when it was backed up: the repository is damaged there. \
                 'xofs check --data' says what else is, and 'xofs export' gives the disk as it is"
            );
            return Err(Error::new(ErrorKind::Damaged, message));
        }
        let sent = stages.import.work(|| vhd.write(block, bytes, std::slice::from_ref(&(0..bytes.len()))));
        sent.map_err(of_io)?;
        stages.import.add(bytes.len());
        watch.advance(BLOCK);
        watch.sees(times.reading > times.writing, times.writing > times.reading);
        Ok(())
    })?;
    stages.sync.work(|| -> Result<()> {
        vhd.finish().map_err(of_io)?.conclude()?;
        wait_until_free(pool, vdi)
    })?;
    Ok(digests)
}

/// Reads what a disk holds from the repository.
///
/// # Errors
/// If it cannot be read.
pub fn read(pool: &Pool, disk: &Arc<dyn Disk>) -> Result<Digests> {
    let mut digests = Digests::default();
    let mut last = None;
    // Whole blocks, each once, though ranges of data may end within them.
    let blocks = disk::data_ranges(disk.as_ref()).flat_map(|range| match range {
        Ok(range) => (range.start / BLOCK..range.end.div_ceil(BLOCK)).map(Ok).collect::<Vec<_>>(),
        Err(error) => vec![Err(error)],
    });
    let ranges = blocks.filter_map(move |block| match block {
        Ok(block) if last.is_some_and(|last| block <= last) => None,
        Ok(block) => {
            last = Some(block);
            Some(Ok(block * BLOCK..((block + 1) * BLOCK).min(disk.size())))
        }
        Err(error) => Some(Err(error)),
    });
    ahead::read::<Error>(disk, ranges, None, |offset, bytes, _| {
        pool.cancel().check("the reading of a disk")?;
        digests.add(block_at(offset)?, bytes);
        Ok(())
    })?;
    Ok(digests)
}

/// Reads what a disk of the pool holds, of which the first `size` bytes are meant.
///
/// # Errors
/// What the pool says; if what it sends is no whole VHD.
pub fn read_back(pool: &Pool, vdi: &Ref<Vdi>, size: u64, watch: &Watch) -> Result<Digests> {
    let export = pool.export_vdi(&ExportOptions { vdi: vdi.clone(), base: None, format: Format::Vhd })?;
    let broken = |error: vhd::StreamError| {
        let message = format!("the disk cannot be read back from the pool: {error}");
        Error::new(ErrorKind::Pool(xapi::ErrorKind::Protocol), message)
    };
    let mut stream = StreamReader::open(export).map_err(broken)?;
    watch.expect(u64::try_from(stream.blocks().len()).unwrap_or(u64::MAX).saturating_mul(BLOCK));
    let (mut digests, mut buffer) = (Digests::default(), vec![0; BLOCK_LEN]);
    while let Some(block) = stream.next_block(&mut buffer).map_err(broken)? {
        pool.cancel().check("the reading of a disk")?;
        let range = range_of(block, size);
        let len = usize::try_from(range.end.saturating_sub(range.start)).unwrap_or(0);
        // What an SR rounds a disk up by is not part of it.
        digests.add(block, &buffer[..len]);
        watch.advance(BLOCK);
    }
    stream.into_source().conclude()?;
    Ok(digests)
}

/// Waits until the control domain, which wrote to a disk, has let it go: that may be after the transfer's task has ended.
pub(in crate::pool) fn wait_until_free(pool: &Pool, vdi: &Ref<Vdi>) -> Result<()> {
    let begun = Instant::now();
    while !pool.control_domain_vbds(vdi)?.is_empty() && begun.elapsed() < MOST_HELD {
        pool.cancel().sleep(PAUSE, "wait until a disk is free")?;
    }
    Ok(())
}

/// Sends an XVA; returns the VM that the pool made of it, the task that says so, and the checksum. Its bytes are compared with the checksum beside it before the pool is told
/// of their end.
///
/// # Errors
/// If it cannot be read, or is not whole; what the pool says.
pub fn send_archive(
    pool: &Pool,
    sr: &Ref<Sr>,
    archive: &StoredArchive,
    stages: &Stages,
    watch: &Watch,
) -> Result<(Ref<Vm>, Task, String)> {
    let mut import = stages.prepare.work(|| pool.import_vm(sr, Some(archive.size())))?;
    let mut summing = Summing::default();
    let (give, take) = channel::bounded::<Vec<u8>>(DEPTH);
    let (cancel, has_failed) = (pool.cancel(), &AtomicBool::new(false));
    let checksum = std::thread::scope(|scope| -> Result<String> {
        let is_over = || cancel.is_cancelled() || has_failed.load(Ordering::Acquire);
        let read = move || archive.read(&give, is_over, &stages.read);
        let reader = std::thread::Builder::new().spawn_scoped(scope, read).map_err(|error| {
            let message = format!("start a thread that reads the XVA: {error}");
            Error::new(ErrorKind::Backup, message)
        })?;
        // The last piece is kept back until all of it is known to be right: without it the pool makes nothing of the others.
        let mut last: Option<Vec<u8>> = None;
        while let Ok(piece) = stages.import.take(|| take.recv()) {
            stages.hash.work(|| summing.add(&piece));
            stages.hash.add(piece.len());
            watch.advance(piece.len() as u64);
            if let Some(before) = last.replace(piece) {
                let sent = stages.import.work(|| import.write_all(&before));
                stages.import.add(before.len());
                sent.map_err(of_io).inspect_err(|_| has_failed.store(true, Ordering::Release))?;
            }
        }
        let ended = reader.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        cancel.check("the transfer of an XVA")?;
        let checksum = summing.finish();
        ended.and_then(|()| archive.check_sum(checksum)).map_err(of_backup)?;
        let last = last.unwrap_or_default();
        stages.import.work(|| import.write_all(&last)).map_err(of_io)?;
        stages.import.add(last.len());
        Ok(checksum.to_string())
    })?;
    let (outcome, task) = stages.sync.work(|| import.conclude_held())?;
    Ok((outcome.reference()?, task, checksum))
}

/// Returns where a block is in a disk of `size` bytes.
fn range_of(block: BlockIndex, size: u64) -> Range<u64> {
    let start = u64::from(block.0) * BLOCK;
    start..(start + BLOCK).min(size).max(start)
}

fn block_at(offset: u64) -> Result<BlockIndex> {
    let block = u32::try_from(offset / BLOCK).map_err(|_| Error::new(ErrorKind::Backup, "the disk is too large"))?;
    Ok(BlockIndex(block))
}

/// Returns the error of the pool that a writer has wrapped.
pub(in crate::pool) fn of_io(error: io::Error) -> Error {
    match error.downcast::<xapi::Error>() {
        Ok(error) => error.into(),
        Err(error) => Error::new(ErrorKind::Pool(xapi::ErrorKind::Unreachable), error.to_string()),
    }
}

fn of_backup(error: ingest::Error) -> Error {
    Error::new(ErrorKind::Backup, error.to_string())
}
