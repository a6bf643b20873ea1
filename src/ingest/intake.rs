//! Reading the blocks of a disk, by the threads that do nothing else.
//!
//! What is taken from a base is compared with its digest, where that is known. A base that cannot be read, or has other bytes, is
//! passed over: then that of the next destination serves, and if there is none the whole block is read.

use std::fs::File;
use std::io::{self, Read};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

use crossbeam::channel::{Receiver, Sender};
use disk::Disk;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use vhd::{BlockIndex, BlockMemory, BlockSize, Digest};

use super::block::{BLOCK, Block, place};
use super::changes::PieceSet;
use super::error::{Error, ErrorKind, Result};
use super::feed::{Feed, of_source};
use super::ordered::Order;
use super::plan::{Base, STREAM_SIZE};
use super::pool::Blocks;
use super::source::refuse_foreign;
use crate::probe::Probe;

/// Bytes that blocks were made of.
#[derive(Debug, Default)]
pub(super) struct Taken {
    /// Read from the source.
    pub source: AtomicU64,
    /// Taken from a base.
    pub base: AtomicU64,
}

impl Taken {
    pub fn add_source(&self, bytes: usize) {
        self.source.fetch_add(bytes as u64, Ordering::Relaxed);
    }
}

/// What a reader works with, besides what it reads.
pub(super) struct Intake<'a> {
    pub give: Sender<Block>,
    /// Memory for blocks.
    pub spare: Receiver<Vec<u8>>,
    pub is_over: &'a (dyn Fn() -> bool + Sync),
    /// That of what replicas get.
    pub order: &'a Order<'a>,
    pub probe: &'a Probe,
    pub taken: &'a Taken,
}

impl Intake<'_> {
    /// Reads `candidates`, of which other readers take some, too: `next` counts them. Of a stream returns its size.
    ///
    /// # Errors
    /// What the source says.
    pub fn read<'b, B: Iterator<Item = &'b Base>>(
        &self,
        feed: &Feed,
        candidates: &[u32],
        next: &AtomicUsize,
        bases: impl Fn() -> Option<B>,
    ) -> Result<Option<u64>> {
        match feed {
            Feed::Random { disk, changed } => {
                while !(self.is_over)() {
                    let Some(block) = candidates.get(next.fetch_add(1, Ordering::Relaxed)) else { break };
                    self.await_turn(*block);
                    let spare = self.spare.try_recv().unwrap_or_default();
                    let (index, changed) = (BlockIndex(*block), changed.as_deref());
                    self.give(read_block(disk.as_ref(), changed, index, bases(), spare, self.probe, self.taken)?);
                }
            }
            Feed::Listed { blocks, listed, size, changed } => {
                let blocks = blocks.lock().unwrap_or_else(PoisonError::into_inner).take();
                let kind = if changed.is_some() { ErrorKind::Difference } else { ErrorKind::Source };
                self.read_listed(blocks.expect("one reader reads them, once"), listed, candidates, *size, kind)?;
            }
            Feed::Stream(stream) => return self.read_stream(stream).map(Some),
        }
        Ok(None)
    }

    fn memory(&self) -> BlockMemory {
        BlockMemory::new(self.spare.try_recv().unwrap_or_default(), BlockSize::DEFAULT, BLOCK)
    }

    /// Waits until a block that was claimed is in the window of the replicas.
    fn await_turn(&self, block: u32) {
        self.probe.give(|| self.order.wait(block, self.is_over));
    }

    fn give(&self, block: Block) {
        drop(self.probe.give(|| self.give.send(block)));
    }

    /// Reads the blocks that a pool lists, and gives zeroes for the other candidates. Blocks that are not those that were listed
    /// are an error of that `kind`.
    fn read_listed(
        &self,
        mut blocks: Box<dyn Blocks>,
        listed: &[u32],
        candidates: &[u32],
        size: u64,
        kind: ErrorKind,
    ) -> Result<()> {
        let wrong = |what: String| Error::new(kind, format!("the pool's blocks are not those it listed: {what}"));
        let mut listed = listed.iter().peekable();
        for block in candidates {
            self.await_turn(*block);
            if (self.is_over)() {
                return Ok(());
            }
            let index = BlockIndex(*block);
            let (_, len) = place(index, size);
            if listed.next_if_eq(&block).is_none() {
                self.give(Block::new(index, len, None));
                continue;
            }
            let mut memory = self.memory();
            match self.next(&mut *blocks, memory.data())? {
                Some(found) if found == *block => {}
                found => return Err(wrong(format!("{found:?} came where {block} was expected"))),
            }
            memory.resize(len);
            self.give(Block::new(index, len, Some(memory)));
        }
        if (self.is_over)() {
            return Ok(());
        }
        if let Some(block) = self.next(&mut *blocks, &mut vec![0; BLOCK])? {
            return Err(wrong(format!("{block} came after the last one")));
        }
        blocks.finish()
    }

    fn next(&self, blocks: &mut dyn Blocks, data: &mut [u8]) -> Result<Option<u32>> {
        let found = self.probe.work(|| blocks.read(data))?;
        if found.is_some() {
            self.taken.add_source(BLOCK);
            self.probe.add(BLOCK);
        }
        Ok(found)
    }

    /// Reads a stream to its end; returns the size of the disk in bytes, whole sectors.
    fn read_stream(&self, stream: &Mutex<File>) -> Result<u64> {
        let failed =
            |reason: &dyn std::fmt::Display| Error::new(ErrorKind::Source, format!("read the stream: {reason}"));
        let mut stream = stream.lock().unwrap_or_else(PoisonError::into_inner);
        let mut size = 0;
        for index in 0.. {
            let mut memory = self.memory();
            let data = memory.data();
            let mut len = 0;
            while len < BLOCK && !(self.is_over)() {
                match self.probe.work(|| read_what_comes(&mut stream, &mut data[len..])) {
                    Ok(0) => break,
                    Ok(read) => len += read,
                    Err(error) if matches!(error.kind(), io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock) => {}
                    Err(error) => return Err(failed(&error)),
                }
            }
            if (self.is_over)() {
                return Ok(size);
            }
            if index == 0 {
                refuse_foreign("-", &data[..len])?;
            }
            size += len as u64;
            if len > 0 && size > STREAM_SIZE {
                return Err(failed(&format!("it is longer than {STREAM_SIZE} bytes, the most that a disk may have")));
            }
            self.probe.add(len);
            self.taken.add_source(len);
            if len > 0 {
                // What lies past the end is zero.
                data[len..].fill(0);
                self.give(Block::new(BlockIndex(index), BLOCK, Some(memory)));
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
}

/// Reads one block: what changed of it from the source and the rest from one of the bases, or all of it from the source. Without
/// `bases` nobody needs the rest.
pub(super) fn read_block<'b>(
    disk: &dyn Disk,
    changed: Option<&PieceSet>,
    index: BlockIndex,
    bases: Option<impl Iterator<Item = &'b Base>>,
    spare: Vec<u8>,
    probe: &Probe,
    taken: &Taken,
) -> Result<Block> {
    let (offset, len) = place(index, disk.size());
    probe.work(|| {
        let extent = disk.extent_at(offset).map_err(|error| of_source(&error))?;
        if extent.is_hole && extent.len >= len as u64 {
            return Ok(Block::new(index, len, None));
        }
        let mut memory = BlockMemory::new(spare, BlockSize::DEFAULT, len);
        let data = memory.data();
        let whole = 0..len;
        let mut ranges: Vec<_> = changed.map_or_else(Vec::new, |changed| changed.ranges(index.0.into()).collect());
        let is_whole = ranges.is_empty() || ranges.first() == Some(&whole);
        let is_part = !is_whole && bases.is_none();
        if is_part {
            data.fill(0);
        } else if is_whole || !bases.is_some_and(|bases| take_base(index, bases, data)) {
            ranges = vec![whole.clone()];
        }
        let mut read = 0;
        for range in &ranges {
            read += range.len();
            let at = offset + range.start as u64;
            let done = if *range == whole {
                let (memory, head) = memory.with_head();
                disk.read_into(at, memory, head)
            } else {
                disk.read_at(at, &mut memory.data()[range.clone()])
            };
            done.map_err(|error| of_source(&error))?;
        }
        probe.add(read);
        taken.add_source(read);
        let mut block = Block::new(index, len, Some(memory));
        if is_part {
            block.changed = Some(ranges);
        } else {
            taken.base.fetch_add((len - read) as u64, Ordering::Relaxed);
        }
        Ok(block)
    })
}

/// Fills `data` with what a base has of a block: one whose digest is known, if there is one. Returns whether that could be had.
fn take_base<'b>(index: BlockIndex, bases: impl Iterator<Item = &'b Base>, data: &mut [u8]) -> bool {
    let digest = |base: &Base| base.digests.as_ref().and_then(|digests| digests.of_read(index));
    let mut bases: Vec<_> = bases.map(|base| (base, digest(base))).collect();
    bases.sort_by_key(|(_, digest)| digest.is_none());
    bases.iter().any(|(base, digest)| {
        let (offset, there) = place(index, base.disk.size());
        let (old, new) = data.split_at_mut(there.min(data.len()));
        new.fill(0);
        let read = if old.is_empty() { Ok(()) } else { base.disk.read_at(offset, old) };
        match read {
            Ok(()) if digest.is_none_or(|digest| digest == Digest::of(data, BlockSize::DEFAULT)) => true,
            Ok(()) => {
                tracing::warn!(block = index.0, "the backup before has other bytes there than were written: the whole block is read");
                false
            }
            Err(error) => {
                tracing::warn!(block = index.0, %error, "the backup before cannot be read there: the whole block is read");
                false
            }
        }
    })
}

/// Reads what is there; an error of the kind `WouldBlock` if nothing comes for a moment, so that who is to stop does.
fn read_what_comes(stream: &mut File, buffer: &mut [u8]) -> io::Result<usize> {
    const MOMENT: Timespec = Timespec { tv_sec: 0, tv_nsec: 100_000_000 };
    if poll(&mut [PollFd::new(&*stream, PollFlags::IN)], Some(&MOMENT))? == 0 {
        return Err(io::ErrorKind::WouldBlock.into());
    }
    stream.read(buffer)
}
