//! An image whose bytes are changed and of which everything is asked: what the tests at random and the fuzzers share.

use std::collections::HashSet;
use std::ops::Range;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use disk::{Disk, Error, ErrorKind, Extent, Result};
use guest::{GuestFs, Kind, Source};
use rustix::time::{ClockId, clock_gettime};

/// Reads of one walk at most; a sound image takes some ten thousand.
const MAX_READS: usize = 500_000;

/// What a walk may take of a processor; a sound one takes milliseconds.
const PATIENCE: Duration = Duration::from_secs(5);

/// Opens the reader that is tried.
pub type Open = fn(Arc<dyn Disk>) -> guest::Result<Box<dyn GuestFs>>;

/// Returns where the checksums of what was read stand, and what they are to be once a byte of it was changed: bytes of the
/// disk, the range of them that was read, the byte.
pub type Checksum = fn(&[u8], &Range<usize>, usize) -> Option<(usize, Vec<u8>)>;

/// An image of which it is known what is read of it.
pub struct Subject {
    disk: Arc<Watched>,
    open: Open,
    checksum: Checksum,
    /// What is read of it while it is sound: nothing but metadata.
    read: Vec<Range<usize>>,
    /// Files in it.
    pub files: usize,
}

/// What became of an image that was changed.
pub struct Outcome {
    /// Files that were found; none if it could not be opened.
    pub files: usize,
    pub reads: usize,
    /// Of a processor.
    pub took: Duration,
}

impl Subject {
    /// Takes an image, which is sound.
    pub fn new(image: Vec<u8>, open: Open, checksum: Checksum) -> Self {
        let disk = Arc::new(Watched { bytes: Mutex::new(image), read: Mutex::default() });
        let files = walk(&disk, open);
        let read = std::mem::take(&mut *disk.read.lock().unwrap());
        Self { disk, open, checksum, read, files }
    }

    /// Returns the ranges that are read.
    pub fn read(&self) -> &[Range<usize>] {
        &self.read
    }

    /// Returns the numbers of those whose bytes are such.
    pub fn read_where(&self, is_such: fn(&[u8]) -> bool) -> Vec<usize> {
        let bytes = self.disk.bytes.lock().unwrap();
        let numbers = self.read.iter().enumerate();
        numbers.filter(|(_, range)| is_such(&bytes[(*range).clone()])).map(|(number, _)| number).collect()
    }

    /// Makes changes, each a number of a range that is read, a place in it and what is to stand there; with them, checksums are made
    /// right. Asks for everything, and takes the changes back.
    ///
    /// # Panics
    /// If reading does not end soon.
    pub fn try_with(&self, changes: impl FnOnce(&mut dyn FnMut(usize, usize, &dyn Fn(&[u8]) -> Vec<u8>))) -> Outcome {
        let mut before = Vec::new();
        changes(&mut |range, within, new| {
            let mut bytes = self.disk.bytes.lock().unwrap();
            let range = &self.read[range];
            let at = range.start + within;
            let mut put = |bytes: &mut Vec<u8>, at: usize, new: Vec<u8>| {
                for (at, byte) in (at..bytes.len()).zip(new) {
                    before.push((at, bytes[at]));
                    bytes[at] = byte;
                }
            };
            let mut new = new(&bytes);
            new.truncate(range.end - at);
            put(&mut bytes, at, new);
            if let Some((place, value)) = (self.checksum)(&bytes, range, at) {
                put(&mut bytes, place, value);
            }
        });
        let began = processor_time();
        let files = walk(&self.disk, self.open);
        let took = processor_time().saturating_sub(began);
        assert!(took < PATIENCE, "{took:?} with {before:?}");
        let mut bytes = self.disk.bytes.lock().unwrap();
        before.into_iter().rev().for_each(|(at, byte)| bytes[at] = byte);
        Outcome { files, reads: self.disk.read.lock().unwrap().len(), took }
    }
}

/// What this thread has had of a processor.
fn processor_time() -> Duration {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    let seconds = time.tv_sec.try_into().expect("no time is negative");
    Duration::new(seconds, time.tv_nsec.try_into().expect("less than a second"))
}

/// A disk in memory that remembers what was read, which is all metadata.
struct Watched {
    bytes: Mutex<Vec<u8>>,
    read: Mutex<Vec<Range<usize>>>,
}

impl Disk for Watched {
    fn size(&self) -> u64 {
        self.bytes.lock().unwrap().len() as u64
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<()> {
        let start = usize::try_from(offset).expect("64 bits");
        let range = start..start + buffer.len();
        let bytes = self.bytes.lock().unwrap();
        let found = bytes.get(range.clone()).ok_or_else(|| Error::new(ErrorKind::OutOfRange, "past the end"))?;
        buffer.copy_from_slice(found);
        let mut read = self.read.lock().unwrap();
        read.push(range);
        assert!(read.len() < MAX_READS, "no end of reads");
        Ok(())
    }

    fn extent_at(&self, offset: u64) -> Result<Extent> {
        Ok(Extent { len: self.size() - offset, is_hole: false })
    }
}

/// Asks for everything; returns how many files were found.
fn walk(disk: &Arc<Watched>, open: Open) -> usize {
    disk.read.lock().unwrap().clear();
    let Ok(guest) = open(disk.clone()) else { return 0 };
    let mut seen = HashSet::new();
    let mut pending = vec![guest.root()];
    while let Some(inode) = pending.pop() {
        if !seen.insert(inode) {
            continue;
        }
        let Ok(attributes) = guest.attributes(inode) else { continue };
        let _ = guest.xattrs(inode);
        match attributes.kind {
            Kind::Directory => {
                pending.extend(guest.list(inode).unwrap_or_default().into_iter().map(|entry| entry.inode))
            }
            Kind::Symlink => drop(guest.target(inode)),
            Kind::File => {
                let mut at = 0;
                // A file of many exabytes in single blocks takes too long, and it is the caller who asks for each window.
                for _ in 0..20 {
                    match guest.extents(inode, at, 1000) {
                        Ok(window) if at < attributes.size => {
                            assert!(window.until > at, "no further than {at}");
                            assert!(window.found.iter().all(|extent| extent.len > 0));
                            for extent in window.found.iter().filter(|extent| extent.source == Source::Encoded).take(20)
                            {
                                let len = extent.len.min(attributes.size - extent.start).min(100_000);
                                let _ = guest.decode(inode, extent.start, &mut vec![0; usize::try_from(len).unwrap()]);
                            }
                            at = window.until;
                        }
                        _ => break,
                    }
                }
            }
            _ => {}
        }
    }
    seen.len()
}
