//! The lane of a replica: blocks that several threads read and finish in any order are handed over in that of the disk.
//!
//! ```text
//! readers: claim the next candidate ─► wait until it is in the window ─► read ─► workers ─► queue ─► writer: waits for its next block
//!                                          ▲                                                              │
//!                                          └──────────── how far the slowest replica has come ◄───────────┘
//! ```
//!
//! Memory: no block is read that is [`WINDOW`] or more of them ahead of what the slowest replica that lives has written, so at most
//! so many wait, however many replicas there are; they share them.
//!
//! Nothing waits for ever. Candidates are claimed in ascending order, so the block that a replica waits for was claimed, or is before
//! all that wait, and is in the window: its reader reads it. A queue holds a window, so workers never wait for a replica. One that
//! failed is out of the reckoning and takes whatever comes. Who waits looks at every [`MOMENT`] whether it is over: the source
//! broke, a thread panicked, all destinations failed, or it was cancelled.

use std::collections::BTreeMap;
use std::ops::Range;
use std::slice;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Duration;

use crossbeam::channel::{Receiver, Sender};
use vhd::BlockIndex;

use super::block::Block;
use super::copy::Failure;
use super::replica::{ReplicaBlock, ReplicaSink};
use crate::probe::Probe;

/// How many blocks are read before the slowest replica has written the first of them: 64 MiB.
pub(super) const WINDOW: usize = 32;
/// How often who waits looks whether it is over.
const MOMENT: Duration = Duration::from_millis(100);

/// A replica that takes the blocks of one disk.
pub(super) struct ReplicaLane<'a> {
    pub sink: &'a mut dyn ReplicaSink,
    pub sent: &'a mut Sent,
    pub failure: &'a Failure,
    pub probe: &'a Probe,
}

/// What a replica took.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Sent {
    pub blocks: usize,
    pub bytes: u64,
}

/// A block, and how many come before it.
pub(super) type Queued = (usize, Arc<Block>);

/// The blocks that replicas get, and how far each has come.
pub(super) struct Order<'a> {
    /// Their numbers, ascending.
    blocks: &'a [u32],
    window: usize,
    /// How many of them each replica has written; `usize::MAX` of one that takes no more.
    written: Mutex<Vec<usize>>,
    moved: Condvar,
}

impl<'a> Order<'a> {
    pub fn new(blocks: &'a [u32], replicas: usize, window: usize) -> Self {
        Self { blocks, window, written: Mutex::new(vec![0; replicas]), moved: Condvar::new() }
    }

    /// Waits until a block may be read, or it is over.
    pub fn wait(&self, block: u32, is_over: &dyn Fn() -> bool) {
        let before = self.blocks.partition_point(|other| *other < block);
        let mut written = self.written.lock().unwrap_or_else(PoisonError::into_inner);
        let is_ahead = |written: &[usize]| {
            written.iter().min().is_some_and(|slowest| before >= slowest.saturating_add(self.window))
        };
        while is_ahead(&written) && !is_over() {
            written = self.moved.wait_timeout(written, MOMENT).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Hands a block to each replica that lives, if they get it.
    pub fn give(&self, block: &Arc<Block>, outputs: &[(&Failure, Sender<Queued>)]) {
        let Ok(position) = self.blocks.binary_search(&block.index.0) else { return };
        for (_, output) in outputs.iter().filter(|(failure, _)| !failure.is_failed()) {
            drop(output.send((position, block.clone())));
        }
    }

    fn set_written(&self, replica: usize, count: usize) {
        self.written.lock().unwrap_or_else(PoisonError::into_inner)[replica] = count;
        self.moved.notify_all();
    }
}

/// Writes blocks in order until there are no more; once it failed or it is over they are dropped, so that nobody waits for it.
pub(super) fn write(
    lane: ReplicaLane,
    replica: usize,
    order: &Order,
    take: &Receiver<Queued>,
    is_over: &dyn Fn() -> bool,
    recycle: &dyn Fn(Arc<Block>),
) {
    let ReplicaLane { sink, sent, failure, probe } = lane;
    let mut waiting: BTreeMap<usize, Arc<Block>> = BTreeMap::new();
    while let Ok((position, block)) = probe.take(|| take.recv()) {
        if failure.is_failed() || is_over() {
            continue;
        }
        waiting.insert(position, block);
        while let Some(block) = waiting.remove(&sent.blocks).filter(|_| !is_over()) {
            let whole: Range<usize> = 0..block.len;
            let changed = block.changed.as_deref().unwrap_or(slice::from_ref(&whole));
            let BlockIndex(index) = block.index;
            match probe.work(|| sink.write(&ReplicaBlock { index, data: block.bytes(), changed })) {
                Ok(()) => {
                    probe.add(block.len);
                    sent.blocks += 1;
                    sent.bytes += changed.iter().map(|range| range.len() as u64).sum::<u64>();
                    recycle(block);
                    order.set_written(replica, sent.blocks);
                }
                Err(error) => {
                    failure.set(error);
                    waiting.clear();
                    order.set_written(replica, usize::MAX);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
    use std::sync::mpsc;
    use std::thread;

    use crossbeam::channel;

    use super::*;
    use crate::ingest::error::{Error, ErrorKind, Result};
    use crate::ingest::run::Stages;

    const PATIENCE: Duration = Duration::from_secs(120);

    /// A source of numbers that look random, the same for the same seed (xorshift).
    struct Random(u64);

    impl Random {
        fn below(&mut self, limit: u64) -> u64 {
            self.0 ^= self.0 << 13;
            self.0 ^= self.0 >> 7;
            self.0 ^= self.0 << 17;
            self.0 % limit
        }

        fn pause(&mut self) {
            match self.below(4) {
                0 => thread::sleep(Duration::from_micros(self.below(300))),
                1 => thread::yield_now(),
                _ => {}
            }
        }
    }

    /// How a replica is tried.
    #[derive(Debug, Clone, Copy)]
    enum Fate {
        Lives,
        FailsAt(usize),
        /// All is over when so many came.
        EndsAllAt(usize),
    }

    struct Collected<'a> {
        taken: Vec<u32>,
        fate: Fate,
        random: Random,
        count: &'a AtomicUsize,
        is_over: &'a AtomicBool,
    }

    impl ReplicaSink for Collected<'_> {
        fn write(&mut self, block: &ReplicaBlock) -> Result<()> {
            self.random.pause();
            match self.fate {
                Fate::FailsAt(at) if at == self.taken.len() => {
                    self.count.store(usize::MAX, Ordering::SeqCst);
                    return Err(Error::new(ErrorKind::Source, "it failed"));
                }
                Fate::EndsAllAt(at) if at == self.taken.len() => self.is_over.store(true, Ordering::SeqCst),
                _ => {}
            }
            self.taken.push(block.index);
            self.count.store(self.taken.len(), Ordering::SeqCst);
            Ok(())
        }

        fn finish(self: Box<Self>) -> Result<String> {
            Ok(String::new())
        }
    }

    /// Hands `candidates` of which `blocks` are the replicas' to some, read by four threads; returns what each took.
    fn hand_over(seed: u64, window: usize, candidates: &[u32], blocks: &[u32], fates: &[Fate]) -> Vec<Vec<u32>> {
        let order = Order::new(blocks, fates.len(), window);
        let counts: Vec<AtomicUsize> = fates.iter().map(|_| AtomicUsize::new(0)).collect();
        let failures: Vec<Failure> = fates.iter().map(|_| Failure::default()).collect();
        let (is_stopped, next) = (AtomicBool::new(false), AtomicUsize::new(0));
        let is_over = || is_stopped.load(Ordering::SeqCst) || failures.iter().all(Failure::is_failed);
        let mut sinks: Vec<Collected> = (1..)
            .zip(fates.iter().zip(&counts))
            .map(|(number, (fate, count))| Collected {
                taken: Vec::new(),
                fate: *fate,
                random: Random(seed ^ number),
                count,
                is_over: &is_stopped,
            })
            .collect();
        thread::scope(|scope| {
            let (order, is_over, counts, next) = (&order, &is_over, &counts, &next);
            let mut outputs = Vec::new();
            for (number, (sink, failure)) in sinks.iter_mut().zip(&failures).enumerate() {
                let (give, take) = channel::bounded(window);
                outputs.push((failure, give));
                scope.spawn(move || {
                    let mut sent = Sent::default();
                    let probe = &Stages::unseen().read;
                    let lane = ReplicaLane { sink, sent: &mut sent, failure, probe };
                    write(lane, number, order, &take, is_over, &drop);
                });
            }
            for reader in 1..=4 {
                let (outputs, mut random) = (outputs.clone(), Random(seed.wrapping_mul(2 * reader + 1) | 1));
                scope.spawn(move || {
                    while !is_over() {
                        let Some(block) = candidates.get(next.fetch_add(1, Ordering::SeqCst)) else { break };
                        order.wait(*block, is_over);
                        if is_over() {
                            break;
                        }
                        let before = blocks.partition_point(|other| other < block);
                        let slowest = counts.iter().map(|count| count.load(Ordering::SeqCst)).min();
                        let slowest = slowest.unwrap_or(usize::MAX);
                        assert!(before < slowest.saturating_add(window), "{before} was read at {slowest}");
                        random.pause();
                        order.give(&Arc::new(Block::new(BlockIndex(*block), 512, None)), &outputs);
                    }
                });
            }
        });
        sinks.into_iter().map(|sink| sink.taken).collect()
    }

    #[test]
    fn each_replica_that_lives_gets_all_blocks_in_order_within_the_window_whatever_others_do() {
        let seed = u64::from(std::process::id()) << 32 | 0x9e37_79b9;
        println!("seed {seed:#x}");
        let (done, is_done) = mpsc::channel();
        thread::spawn(move || {
            let mut random = Random(seed);
            for round in 0..150 {
                let candidates: Vec<u32> = (0..40).filter(|_| random.below(5) > 0).collect();
                let blocks: Vec<u32> = candidates.iter().copied().filter(|_| random.below(4) > 0).collect();
                let window = 1 + usize::try_from(random.below(5)).unwrap();
                let mut fate = || match (random.below(6), usize::try_from(random.below(40)).unwrap()) {
                    (0 | 1, at) => Fate::FailsAt(at),
                    (2, at) if round % 3 == 0 => Fate::EndsAllAt(at),
                    _ => Fate::Lives,
                };
                let fates: Vec<Fate> = (0..1 + round % 3).map(|_| fate()).collect();
                let taken = hand_over(seed.rotate_left(round) | 1, window, &candidates, &blocks, &fates);
                let ends = |fate: &&Fate| matches!(fate, Fate::EndsAllAt(at) if *at < blocks.len());
                let may_end = fates.iter().find(ends).is_some();
                for (fate, taken) in fates.iter().zip(taken) {
                    let context = format!("round {round}, window {window}, {fates:?}");
                    let expected = match fate {
                        Fate::FailsAt(at) if *at < blocks.len() => *at,
                        _ => blocks.len(),
                    };
                    assert_eq!(taken, blocks[..taken.len()], "{context}");
                    assert!(taken.len() == expected || may_end && taken.len() < expected, "{context}: {}", taken.len());
                }
            }
            done.send(()).unwrap();
        });
        // A panic over there drops the other end.
        is_done.recv_timeout(PATIENCE).expect("every round ends");
    }
}
