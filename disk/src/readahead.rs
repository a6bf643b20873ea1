//! Seeing that somebody reads a disk from one end to the other, and having what comes next brought into memory.

use std::sync::{Mutex, PoisonError};

use crate::Disk;

/// Requests of one sequential reader may be under way together and arrive this far (bytes) from where they were expected.
const SLACK: u64 = 1 << 20;

/// Bytes that must have been read in sequence before anything is prefetched: below, it may be a file of a guest.
const PATIENCE: u64 = 256 << 10;

/// One reader of a disk.
///
/// Prefetching begins with a first large read at the start of the disk, else with the second read in sequence, reaches
/// four times as far as was read in sequence, up to [`Disk::prefetch_window`], and ends with a read elsewhere.
#[derive(Debug, Default)]
pub struct Readahead(Mutex<Stream>);

#[derive(Debug, Default, Clone, Copy)]
struct Stream {
    /// Where the next read of a sequence begins.
    next: u64,
    /// Bytes read in sequence.
    run: u64,
    /// The end of what was prefetched.
    ahead: u64,
}

impl Stream {
    /// Notes a read; returns the range to prefetch.
    fn read(&mut self, offset: u64, len: u64, window: u64) -> Option<(u64, u64)> {
        let end = offset.saturating_add(len);
        let is_sequential = offset.abs_diff(self.next) <= SLACK && (self.run > 0 || offset == 0);
        if !is_sequential {
            *self = Self { next: end, run: len, ahead: end };
            return None;
        }
        self.run = self.run.saturating_add(len);
        self.next = self.next.max(end);
        if self.run < PATIENCE {
            return None;
        }
        let wanted = self.next.saturating_add(window.min(self.run.saturating_mul(4)));
        let from = self.ahead.max(self.next);
        // In pieces worth asking for: an eighth of the window, at least.
        if wanted < from.saturating_add(window / 8) {
            return None;
        }
        self.ahead = wanted;
        Some((from, wanted - from))
    }
}

impl Readahead {
    /// Notes that `len` bytes of `disk` are about to be read at `offset`, and has prefetched what is worth it.
    pub fn note(&self, disk: &dyn Disk, offset: u64, len: usize) {
        let window = disk.prefetch_window();
        if window == 0 {
            return;
        }
        let range = self.0.lock().unwrap_or_else(PoisonError::into_inner).read(offset, len as u64, window);
        if let Some((offset, len)) = range {
            let len = len.min(disk.size().saturating_sub(offset));
            if len > 0 {
                disk.prefetch(offset, len);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;
    const WINDOW: u64 = 32 * MIB;

    #[test]
    fn a_pass_from_the_start_is_ahead_from_its_first_request_on() {
        let mut stream = Stream::default();
        assert_eq!(stream.read(0, MIB, WINDOW), Some((MIB, 4 * MIB)));
        assert_eq!(stream.read(MIB, MIB, WINDOW), Some((5 * MIB, 5 * MIB)));
        let mut ahead = 10 * MIB;
        for request in 2..100 {
            if let Some((from, len)) = stream.read(request * MIB, MIB, WINDOW) {
                assert_eq!(from, ahead);
                ahead = from + len;
            }
            let distance = ahead - (request + 1) * MIB;
            assert!(distance <= WINDOW && (request < 10 || distance >= WINDOW - WINDOW / 8), "{request} {distance}");
        }
    }

    #[test]
    fn reads_here_and_there_prefetch_nothing() {
        let mut stream = Stream::default();
        for request in 0..1000_u64 {
            let offset = (request * 7919 + 13) % 997 * 64 * MIB;
            assert_eq!(stream.read(offset, 64 << 10, WINDOW), None);
            assert_eq!(stream.read(offset + (64 << 10), 64 << 10, WINDOW), None);
        }
        assert_eq!(stream.read(500 * MIB, 4 * MIB, WINDOW), None);
    }

    #[test]
    fn requests_that_overtake_each_other_are_one_sequence() {
        let mut stream = Stream::default();
        let mut wanted = 0;
        for pair in 0..16 {
            for request in [2 * pair + 1, 2 * pair] {
                wanted += stream.read(request * (128 << 10), 128 << 10, WINDOW).map_or(0, |(_, len)| len);
            }
        }
        assert!(wanted > 8 * MIB, "{wanted}");
    }
}
