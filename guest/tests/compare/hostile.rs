//! Metadata that no guest's own driver would write: bytes of it are changed, and everything is asked for.

use std::collections::HashSet;
use std::ops::Range;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use disk::{Disk, Error, ErrorKind, Extent, Result};
use guest::{GuestFs, Kind, Source};

use super::Random;

/// Reads of one walk at most; a sound image takes some ten thousand.
const MAX_READS: usize = 500_000;

/// Opens the reader that is tried.
pub type Open = fn(Arc<dyn Disk>) -> guest::Result<Box<dyn GuestFs>>;

/// Returns where the checksum of what was read stands, and what it is to be once a byte of it was changed: bytes of the
/// disk, the range of them that was read, the byte.
pub type Checksum = fn(&[u8], &Range<usize>, usize) -> Option<(usize, [u8; 4])>;

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

/// Changes bytes of an image that a reader reads, again and again, and panics unless reading ends soon each time.
pub fn change(what: &str, image: Vec<u8>, open: Open, checksum: Checksum, random: &mut Random, time: Duration) {
    change_where(what, image, open, checksum, random, time, |_| true);
}

/// The same, of only those reads of which the bytes are such.
pub fn change_where(
    what: &str,
    image: Vec<u8>,
    open: Open,
    checksum: Checksum,
    random: &mut Random,
    time: Duration,
    is_such: fn(&[u8]) -> bool,
) {
    let disk = Arc::new(Watched { bytes: Mutex::new(image), read: Mutex::default() });
    let sound = walk(&disk, open);
    assert!(sound > 500, "{what}: {sound} files");
    let mut read = std::mem::take(&mut *disk.read.lock().unwrap());
    read.retain(|range| is_such(&disk.bytes.lock().unwrap()[range.clone()]));
    let start = Instant::now();
    let (mut mutants, mut opened) = (0, 0);
    while start.elapsed() < time {
        let mut before = Vec::new();
        for _ in 0..1 + random.below(24) {
            let range = &read[usize::try_from(random.below(read.len() as u64)).unwrap()];
            let at = range.start + usize::try_from(random.below(range.len() as u64)).unwrap();
            let mut bytes = disk.bytes.lock().unwrap();
            before.push((at, bytes[at]));
            bytes[at] = [0, 1, 0x7f, 0xff, random.bytes(1)[0]][usize::try_from(random.below(5)).unwrap()];
            if let Some((place, value)) = checksum(&bytes, range, at) {
                for (at, byte) in (place..).zip(value) {
                    before.push((at, bytes[at]));
                    bytes[at] = byte;
                }
            }
        }
        let began = Instant::now();
        opened += usize::from(walk(&disk, open) > 0);
        assert!(began.elapsed() < Duration::from_secs(10), "{what}: {:?} with {before:?}", began.elapsed());
        let mut bytes = disk.bytes.lock().unwrap();
        for (at, byte) in before.into_iter().rev() {
            bytes[at] = byte;
        }
        mutants += 1;
    }
    println!("{what}: {mutants} mutants, {opened} of them opened");
    assert!(opened > 0, "{what}");
}
