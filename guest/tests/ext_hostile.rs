//! Whatever a guest writes into its metadata: reading ends, soon, with an answer or an error.

mod compare;

use std::collections::HashSet;
use std::fs;
use std::ops::Range;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use compare::Random;
use compare::churn::Churn;
use compare::generator::{self, Amount};
use compare::image::{Mount, Reflinks, make};
use disk::{Disk, Error, ErrorKind, Extent, Result};
use guest::ext::Ext;
use guest::{GuestFs, Kind};

/// Bytes of an image.
const SIZE: u64 = 24 << 20;

/// Reads of one walk at most; a sound image takes some ten thousand.
const MAX_READS: usize = 500_000;

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
fn walk(disk: &Arc<Watched>) -> usize {
    disk.read.lock().unwrap().clear();
    let Ok(guest) = Ext::open(disk.clone()) else { return 0 };
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

#[test]
fn reading_ends_whatever_is_in_the_metadata() {
    let seed = Random::seed();
    let mut random = Random::new(seed);
    let place = Reflinks::new(1 << 30);
    let image = place.at("image");
    let sets: [(&[&str], &str); 6] = [
        (&["mkfs.ext4", "-O", "^metadata_csum,inline_data,ea_inode"], "noatime"),
        (&["mkfs.ext4", "-b", "4096"], "noatime"),
        (&["mkfs.ext4", "-O", "^metadata_csum", "-b", "1024"], "noatime,data=journal"),
        (&["mkfs.ext3", "-b", "1024"], "noatime"),
        (&["mkfs.ext4", "-O", "^metadata_csum,fast_commit", "-b", "1024"], "noatime,commit=300"),
        (&["mkfs.ext2"], "noatime"),
    ];
    for (mkfs, options) in sets {
        make(&image, SIZE, mkfs);
        let bytes = {
            let mount = Mount::new(&image, "ext4", options);
            generator::fill(mount.path(), Amount { names: 400, holes: 200 });
            let mut churn = Churn::new(mount.path(), seed);
            churn.work(50);
            // Its journal is full, if it has one.
            churn.sync();
            churn.work_fast(20);
            if mkfs[0] == "mkfs.ext2" {
                churn.sync();
            }
            fs::read(place.copy(&image, "snapshot")).expect("it was just made")
        };
        let disk = Arc::new(Watched { bytes: Mutex::new(bytes), read: Mutex::default() });
        let sound = walk(&disk);
        assert!(sound > 500, "{mkfs:?}: {sound} files");
        let read = std::mem::take(&mut *disk.read.lock().unwrap());
        let start = Instant::now();
        let (mut mutants, mut opened) = (0, 0);
        while start.elapsed() < Duration::from_millis(1500 * compare::rounds(1)) {
            let mut before = Vec::new();
            for _ in 0..1 + random.below(24) {
                let range = &read[usize::try_from(random.below(read.len() as u64)).unwrap()];
                let at = range.start + usize::try_from(random.below(range.len() as u64)).unwrap();
                let mut bytes = disk.bytes.lock().unwrap();
                before.push((at, bytes[at]));
                bytes[at] = [0, 1, 0x7f, 0xff, random.bytes(1)[0]][usize::try_from(random.below(5)).unwrap()];
            }
            let began = Instant::now();
            opened += usize::from(walk(&disk) > 0);
            assert!(began.elapsed() < Duration::from_secs(10), "{mkfs:?}: {:?} with {before:?}", began.elapsed());
            let mut bytes = disk.bytes.lock().unwrap();
            for (at, byte) in before.into_iter().rev() {
                bytes[at] = byte;
            }
            mutants += 1;
        }
        println!("{mkfs:?}: {mutants} mutants, {opened} of them opened");
        assert!(opened > 0, "{mkfs:?}");
    }
}
