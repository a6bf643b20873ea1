//! Reading ahead: several threads read pieces of a disk, one consumer gets them in order.
//!
//! ```text
//! ranges ─► planner ─► jobs (bounded) ─► readers ─► one answer channel per piece
//!              └─────► order of the pieces (bounded) ─► consumer
//! ```
//!
//! At most `threads + 2` pieces per channel exist at a time, so memory is bounded by about `2 × (threads + 2)` pieces.

use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::thread::{self, Builder};
use std::time::{Duration, Instant};

use crossbeam::channel::{self, Receiver, Sender};
use disk::{Disk, ErrorKind};

use crate::probe::Probe;

/// Bytes of a piece: XO's block, so that a compressed one is decoded once.
pub const PIECE: u64 = 2 << 20;
/// Readers, enough to keep a network busy and to decode on every core of a small machine.
pub const THREADS: usize = 4;

type Answer = disk::Result<Vec<u8>>;
type Job = (Range<u64>, Sender<Answer>);

/// Time spent on either side, by which what is slow can be explained.
#[derive(Debug, Clone, Copy, Default)]
pub struct Times {
    /// Waiting for what is read.
    pub reading: Duration,
    /// In the consumer.
    pub writing: Duration,
}

/// Reads `ranges` (ascending) of `disk` and gives them to `consume` in order, in pieces that end where a multiple of
/// [`PIECE`] is. What the readers do, and how long they wait for the consumer, is counted by `probe`.
///
/// # Errors
/// The first of: an error among the ranges, of a read, or of `consume`. Nothing is consumed after it. Where the system refuses
/// the threads that are needed, `Unavailable`.
pub fn read<E: From<disk::Error>>(
    disk: &Arc<dyn Disk>,
    ranges: impl Iterator<Item = disk::Result<Range<u64>>> + Send,
    probe: Option<&Probe>,
    mut consume: impl FnMut(u64, &[u8], Times) -> Result<(), E>,
) -> Result<(), E> {
    let (give_job, take_job) = channel::bounded::<Job>(THREADS + 2);
    let (give_order, take_order) = channel::bounded::<(u64, Receiver<Answer>)>(THREADS + 2);
    let (give_back, take_back) = channel::bounded::<Vec<u8>>(4 * THREADS);
    thread::scope(|scope| {
        let start_reader = |_| {
            let (take_job, take_back) = (take_job.clone(), take_back.clone());
            let work = move || {
                let wait = || take_job.recv();
                while let Ok((range, answer)) = probe.map_or_else(wait, |probe| probe.give(wait)) {
                    let buffer = take_back.try_recv().unwrap_or_default();
                    let read = || read_piece(disk.as_ref(), range, buffer);
                    let piece = match probe {
                        Some(probe) => probe.work(read).inspect(|piece| probe.add(piece.len())),
                        None => read(),
                    };
                    // The consumer may have given up: then nobody takes the answer.
                    let _ = answer.send(piece);
                }
            };
            Builder::new().spawn_scoped(scope, work)
        };
        // Where the system refuses another thread, there are fewer; but one is needed for either task.
        let refused = |error: io::Error| {
            let advice = "raise the limit of processes, or end other programs";
            disk::Error::new(ErrorKind::Unavailable, format!("start a thread that reads the disk: {error}; {advice}"))
        };
        start_reader(0).map_err(refused)?;
        (1..THREADS).map_while(|number| start_reader(number).ok()).for_each(drop);
        drop(take_job);
        Builder::new().spawn_scoped(scope, move || plan(ranges, &give_job, &give_order)).map_err(refused)?;
        let mut times = Times::default();
        let mut before = Instant::now();
        for (offset, answer) in take_order {
            let ended = |_| disk::Error::new(ErrorKind::Unavailable, "a thread that reads the disk ended");
            let bytes = answer.recv().map_err(ended)??;
            let read = Instant::now();
            times.reading += read - before;
            consume(offset, &bytes, times)?;
            before = Instant::now();
            times.writing += before - read;
            // A full channel of buffers needs no more.
            let _ = give_back.try_send(bytes);
        }
        Ok(())
    })
}

/// Cuts the ranges into pieces and hands them out; ends early when nobody listens any more.
fn plan(
    ranges: impl Iterator<Item = disk::Result<Range<u64>>>,
    jobs: &Sender<Job>,
    order: &Sender<(u64, Receiver<Answer>)>,
) {
    for range in ranges {
        match range {
            Ok(range) => {
                let mut at = range.start;
                while at < range.end {
                    let end = (at / PIECE + 1).saturating_mul(PIECE).min(range.end);
                    let (answer, answered) = channel::bounded(1);
                    if order.send((at, answered)).is_err() || jobs.send((at..end, answer)).is_err() {
                        return;
                    }
                    at = end;
                }
            }
            Err(error) => {
                let (answer, answered) = channel::bounded(1);
                let _ = answer.send(Err(error));
                let _ = order.send((0, answered));
                return;
            }
        }
    }
}

fn read_piece(disk: &dyn Disk, range: Range<u64>, mut buffer: Vec<u8>) -> Answer {
    let len = usize::try_from(range.end - range.start).expect("at most one piece");
    buffer.resize(len, 0);
    disk.read_at(range.start, &mut buffer)?;
    Ok(buffer)
}

#[cfg(test)]
mod tests {
    use disk::{Error, Extent};

    use super::*;

    /// Every byte is the number of its MiB; from `broken` on nothing can be read.
    struct Numbered {
        broken: u64,
    }

    impl Disk for Numbered {
        fn size(&self) -> u64 {
            200 << 20
        }

        fn read_at(&self, offset: u64, buffer: &mut [u8]) -> disk::Result<()> {
            if offset >= self.broken {
                return Err(Error::new(ErrorKind::Damaged, "broken"));
            }
            buffer.fill(u8::try_from(offset >> 20).expect("below 200"));
            Ok(())
        }

        fn extent_at(&self, _: u64) -> disk::Result<Extent> {
            Ok(Extent { len: 1, is_hole: false })
        }
    }

    #[test]
    fn pieces_come_in_order_and_end_at_borders() {
        let disk: Arc<dyn Disk> = Arc::new(Numbered { broken: u64::MAX });
        let ranges = [(1 << 20)..(1 << 20) + 10, (3 << 20)..(150 << 20)];
        let mut seen = Vec::new();
        read::<anyhow::Error>(&disk, ranges.into_iter().map(Ok), None, |offset, bytes, _| {
            assert_eq!(bytes[0], u8::try_from(offset >> 20).expect("below 200"));
            seen.push((offset, bytes.len()));
            Ok(())
        })
        .expect("reads");
        assert_eq!(seen[..3], [(1 << 20, 10), (3 << 20, 1 << 20), (4 << 20, 2 << 20)]);
        assert_eq!(seen.last(), Some(&(148 << 20, 2 << 20)));
        assert_eq!(seen.iter().map(|(_, len)| len).sum::<usize>(), 10 + (147 << 20));
    }

    #[test]
    fn the_first_error_ends_it_and_nothing_hangs() {
        let disk: Arc<dyn Disk> = Arc::new(Numbered { broken: 20 << 20 });
        let mut count = 0;
        let result = read::<anyhow::Error>(&disk, [Ok(0..200 << 20)].into_iter(), None, |_, _, _| {
            count += 1;
            Ok(())
        });
        assert_eq!(result.expect_err("broken").to_string(), "broken");
        assert_eq!(count, 10);
        let result =
            read::<anyhow::Error>(&disk, [Ok(0..200 << 20)].into_iter(), None, |_, _, _| anyhow::bail!("full"));
        assert_eq!(result.expect_err("full").to_string(), "full");
        let damaged = || Err(Error::new(ErrorKind::Damaged, "no map"));
        let result = read::<anyhow::Error>(&disk, [Ok(0..10), damaged()].into_iter(), None, |_, _, _| Ok(()));
        assert_eq!(result.expect_err("damaged").to_string(), "no map");
    }
}
