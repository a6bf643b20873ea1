//! Which block is taken from which child, and the threads that take them.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread;

use super::{Control, Image, Outcome};
use crate::error::Result;
use crate::geometry::BlockIndex;

/// Blocks a thread takes at a time.
const AT_ONCE: usize = 64;

/// For each block the topmost child that holds it, by the tables: only its copy counts. Moving whatever is still in a child
/// would, after a crash, let an older copy take the place of a younger one.
pub(super) struct Tops(Vec<u16>);

impl Tops {
    /// `children` are ordered from the oldest to the target.
    pub(super) fn of(base: &Image, children: &[Image]) -> Self {
        let count = children.last().unwrap_or(base).block_count();
        let mut tops = vec![0; count];
        for (number, child) in (1..).zip(children) {
            child.map.each_held(count.min(child.block_count()), |block, _| tops[block] = number);
        }
        Self(tops)
    }

    /// Blocks that are taken, from whichever child.
    pub(super) fn marked(is_taken: &[bool]) -> Self {
        Self(is_taken.iter().map(|is_taken| u16::from(*is_taken)).collect())
    }

    /// Returns the number of blocks of the disk.
    pub(super) fn len(&self) -> usize {
        self.0.len()
    }

    pub(super) fn count(&self) -> u64 {
        self.0.iter().filter(|top| **top > 0).count() as u64
    }

    /// Whether a child holds a block.
    pub(super) fn has(&self, block: BlockIndex) -> bool {
        self.0.get(block.0 as usize).is_some_and(|top| *top > 0)
    }

    /// Returns which image the target reads a block from: 0 for the base (if that holds it), else the child of that number,
    /// counted from 1; `None` if the target does not have the block.
    pub(super) fn source(&self, block: BlockIndex) -> Option<usize> {
        self.0.get(block.0 as usize).map(|top| usize::from(*top))
    }

    /// Returns the blocks that are moved from a child.
    pub(super) fn held_by(&self, child: usize) -> impl Iterator<Item = BlockIndex> {
        let is_of = move |top: &u16| usize::from(*top) == child + 1;
        (0..).zip(&self.0).filter(move |(_, top)| is_of(top)).map(|(block, _)| BlockIndex(block))
    }

    pub(super) fn all(&self) -> impl Iterator<Item = BlockIndex> {
        (0..).zip(&self.0).filter(|(_, top)| **top > 0).map(|(block, _)| BlockIndex(block))
    }

    /// Has `take` take each block from its topmost child, whose number it gets, several at a time; what it remembers of one
    /// block to the next is a thread's own.
    pub(super) fn each<S: Default>(
        &self,
        control: &Control,
        take: impl Fn(&mut S, usize, BlockIndex) -> Result<()> + Sync,
    ) -> Result<Outcome> {
        let (next, is_over, failure) = (AtomicUsize::new(0), AtomicBool::new(false), Mutex::new(None));
        let take_some = || -> Result<()> {
            let mut memory = S::default();
            loop {
                let from = next.fetch_add(AT_ONCE, Ordering::Relaxed);
                if from >= self.0.len() {
                    return Ok(());
                }
                let mut taken = 0;
                for block in from..(from + AT_ONCE).min(self.0.len()) {
                    let Some(child) = usize::from(self.0[block]).checked_sub(1) else { continue };
                    if is_over.load(Ordering::Relaxed) || (control.is_stopped)() {
                        is_over.store(true, Ordering::Relaxed);
                        return Ok(());
                    }
                    take(&mut memory, child, BlockIndex(u32::try_from(block).expect("at most MAX_BLOCKS")))?;
                    taken += 1;
                }
                if taken > 0 {
                    (control.moved)(taken);
                }
            }
        };
        let work = || {
            if let Err(error) = take_some() {
                is_over.store(true, Ordering::Relaxed);
                failure.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
            }
        };
        thread::scope(|scope| {
            for _ in 1..control.threads {
                // Where the system refuses another thread, there are fewer.
                if thread::Builder::new().name("xofs-merge".to_owned()).spawn_scoped(scope, work).is_err() {
                    break;
                }
            }
            work();
        });
        match failure.into_inner().unwrap_or_else(PoisonError::into_inner) {
            Some(error) => Err(error),
            None if is_over.into_inner() => Ok(Outcome::Stopped),
            None => Ok(Outcome::Merged),
        }
    }
}
