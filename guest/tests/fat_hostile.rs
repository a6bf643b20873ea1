//! Whatever a guest writes into FAT or exFAT: reading ends, soon, with an answer or an error, and nothing lies outside.

mod compare;

use std::collections::HashSet;
use std::fs;
use std::ops::Range;
use std::path::Path;
use std::process::Command;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use compare::image::{Mount, scratch, sparse, succeed};
use compare::{Random, fat};
use disk::{Disk, Error, ErrorKind, Extent, Result};
use guest::exfat::ExFat;
use guest::fat::Fat;
use guest::{GuestFs, Kind, Source};

/// Reads of one walk at most; a sound image takes some thousand.
const MAX_READS: usize = 300_000;

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
        let found = bytes.get(range.clone());
        buffer.copy_from_slice(found.unwrap_or_else(|| panic!("{range:?} is past the end")));
        let mut read = self.read.lock().unwrap();
        read.push(range);
        if read.len() < MAX_READS { Ok(()) } else { Err(Error::new(ErrorKind::OutOfRange, "no end of reads")) }
    }

    fn extent_at(&self, offset: u64) -> Result<Extent> {
        Ok(Extent { len: self.size() - offset, is_hole: false })
    }
}

fn open(disk: Arc<Watched>, is_exfat: bool) -> guest::Result<Box<dyn GuestFs>> {
    Ok(if is_exfat { Box::new(ExFat::open(disk)?) } else { Box::new(Fat::open(disk)?) })
}

/// Asks for everything, by number once; returns how many files were found.
fn walk(disk: &Arc<Watched>, is_exfat: bool) -> usize {
    disk.read.lock().unwrap().clear();
    let Ok(guest) = open(disk.clone(), is_exfat) else { return 0 };
    let mut seen = HashSet::new();
    let mut pending = vec![guest.root()];
    while let Some(inode) = pending.pop() {
        if !seen.insert(inode) {
            continue;
        }
        let Ok(attributes) = guest.attributes(inode) else { continue };
        assert!(attributes.size <= i64::MAX.unsigned_abs() && attributes.modified.nanoseconds < 1_000_000_000);
        if attributes.kind == Kind::Directory {
            let entries = guest.list(inode).unwrap_or_default();
            assert!(entries.iter().all(|entry| (1..=1024).contains(&entry.name.len())));
            pending.extend(entries.into_iter().map(|entry| entry.inode));
            continue;
        }
        let (mut at, mut end) = (0, 0);
        while at < attributes.size {
            let Ok(window) = guest.extents(inode, at, 100) else { break };
            assert!(window.until > at && window.until <= attributes.size, "from {at} to {}", window.until);
            at = window.until;
            for extent in window.found {
                assert!(extent.len > 0 && extent.start >= end, "{extent:?} after {end}");
                end = extent.start + extent.len;
                match extent.source {
                    Source::Member(0, place) => assert!(place + extent.len <= disk.size(), "{extent:?}"),
                    Source::Zeroes => {}
                    other => panic!("{other:?}"),
                }
            }
        }
    }
    assert!(disk.read.lock().unwrap().len() < MAX_READS, "no end of reads");
    seen.len()
}

/// Makes an image with directories and files in pieces.
fn image(path: &Path, bytes: u64, mkfs: &[&str]) -> Vec<u8> {
    let _ = fs::remove_file(path);
    sparse(path, bytes);
    succeed(Command::new(mkfs[0]).args(&mkfs[1..]).arg(path));
    let make = |root: &Path| {
        fat::contents(&root.join("contents"), &mut Random::new(3));
        fat::names(&root.join("names"), 150);
    };
    if mkfs[0] == "mkfs.exfat" {
        make(Mount::new(path, "exfat-fuse", "rw").path());
    } else {
        let source = scratch();
        make(source.path());
        let mut copy = Command::new("mcopy");
        copy.env("TZ", "UTC").env("LC_ALL", "C.UTF-8").env("MTOOLS_SKIP_CHECK", "1").args(["-s", "-Q", "-i"]).arg(path);
        succeed(copy.args(["contents", "names"].map(|name| source.path().join(name))).arg("::/"));
    }
    fs::read(path).expect("it was just made")
}

/// Makes the checksums of an exFAT volume right again, as a guest would: of its boot region and of all sets of records.
fn seal(bytes: &mut [u8]) {
    let rotate16 = |sum: u16, byte: &u8| sum.rotate_right(1).wrapping_add(u16::from(*byte));
    let rotate32 = |sum: u32, byte: &u8| sum.rotate_right(1).wrapping_add(u32::from(*byte));
    for at in (0..bytes.len() - 32 * 20).step_by(32) {
        let count = usize::from(bytes[at + 1]);
        if bytes[at] == 0x85 && bytes[at + 32] == 0xc0 && (2..=18).contains(&count) {
            let set = bytes[at..at + 32 * (count + 1)].iter().enumerate();
            let sum = set.filter(|(at, _)| !matches!(at, 2 | 3)).fold(0, |sum, (_, byte)| rotate16(sum, byte));
            bytes[at + 2..at + 4].copy_from_slice(&sum.to_le_bytes());
        }
    }
    let counted = bytes[..11 * 512].iter().enumerate().filter(|(at, _)| !matches!(at, 106 | 107 | 112));
    let sum = counted.fold(0, |sum, (_, byte)| rotate32(sum, byte)).to_le_bytes();
    for stored in bytes[11 * 512..12 * 512].chunks_mut(4) {
        stored.copy_from_slice(&sum);
    }
}

#[test]
fn reading_ends_whatever_is_in_the_metadata() {
    let mut random = Random::new(Random::seed());
    let folder = scratch();
    let path = folder.path().join("image");
    let sets: [(u64, &[&str]); 5] = [
        (3 << 20, &["mkfs.vfat", "-F", "12", "-s", "2"]),
        (4 << 20, &["mkfs.vfat", "-F", "16", "-s", "1"]),
        (36 << 20, &["mkfs.vfat", "-F", "32", "-s", "1"]),
        (5 << 20, &["mkfs.exfat", "-c", "512"]),
        (6 << 20, &["mkfs.exfat", "-c", "4K"]),
    ];
    for (bytes, mkfs) in sets {
        let sound = image(&path, bytes, mkfs);
        let is_exfat = mkfs[0] == "mkfs.exfat";
        let disk = Arc::new(Watched { bytes: Mutex::new(sound.clone()), read: Mutex::default() });
        let files = walk(&disk, is_exfat);
        assert!(files > 180, "{mkfs:?}: {files} files");
        let read = std::mem::take(&mut *disk.read.lock().unwrap());
        let start = Instant::now();
        let (mut mutants, mut opened, mut slowest) = (0, 0, Duration::ZERO);
        while start.elapsed() < Duration::from_millis(1000 * compare::rounds(1)) {
            let mut changed = HashSet::new();
            for _ in 0..1 + random.below(24) {
                let range = &read[usize::try_from(random.below(read.len() as u64)).unwrap()];
                let mut bytes = disk.bytes.lock().unwrap();
                let within =
                    |random: &mut Random| range.start + usize::try_from(random.below(range.len() as u64)).unwrap();
                let at = within(&mut random);
                bytes[at] = [0, 1, 0x7f, 0xff, random.bytes(1)[0]][usize::try_from(random.below(5)).unwrap()];
                changed.insert(at);
                // A number or a record from elsewhere leads to something that exists.
                if random.below(3) == 0 {
                    let len = [2, 4, 32][usize::try_from(random.below(3)).unwrap()];
                    let (from, to) = (within(&mut random) / len * len, within(&mut random) / len * len);
                    bytes.copy_within(from..from + len, to);
                    changed.extend(to..to + len);
                }
            }
            if is_exfat {
                seal(&mut disk.bytes.lock().unwrap());
            }
            let began = Instant::now();
            opened += usize::from(walk(&disk, is_exfat) > 0);
            let elapsed = began.elapsed();
            slowest = slowest.max(elapsed);
            assert!(elapsed < Duration::from_secs(10), "{mkfs:?}: {elapsed:?} with changes at {changed:?}");
            disk.bytes.lock().unwrap().copy_from_slice(&sound);
            mutants += 1;
        }
        println!("{mkfs:?}: {mutants} mutants, {opened} of them opened, {slowest:?} at most");
        assert!(opened > 0, "{mkfs:?}");
    }
}

/// A FAT16 volume with 300 clusters of 512 bytes, and no files.
fn bare() -> Vec<u8> {
    let mut bytes = vec![0; 512 * 6000];
    bytes[11..17].copy_from_slice(&[0, 2, 1, 1, 0, 1]);
    bytes[17..24].copy_from_slice(&[16, 0, 0x70, 0x17, 0xf8, 24, 0]);
    bytes[512..516].copy_from_slice(&[0xf8, 0xff, 0xff, 0xff]);
    bytes
}

/// The record of a file in the root of that volume, which starts behind the table.
fn record(bytes: &mut [u8], index: usize, (name, attributes): (&[u8; 11], u8), (first, size): (u16, u32)) {
    let at = 25 * 512 + index * 32;
    bytes[at..at + 11].copy_from_slice(name);
    bytes[at + 11] = attributes;
    bytes[at + 26..at + 28].copy_from_slice(&first.to_le_bytes());
    bytes[at + 28..at + 32].copy_from_slice(&size.to_le_bytes());
}

#[test]
fn what_leads_astray_is_damage_and_never_zeroes() {
    let mut bytes = bare();
    let links: [(usize, u16); 9] =
        [(2, 3), (3, 2), (4, 0xffff), (5, 6), (6, 0), (7, 0x7777), (8, 9), (9, 10), (10, 0xffff)];
    for (cluster, next) in links {
        bytes[512 + 2 * cluster..514 + 2 * cluster].copy_from_slice(&next.to_le_bytes());
    }
    let files: [(&[u8; 11], u8, u16, u32); 9] = [
        (b"CYCLE      ", 0, 2, 1000),
        (b"SHORT      ", 0, 4, u32::MAX),
        (b"FREE       ", 0, 5, 1000),
        (b"OUTSIDE    ", 0, 7, 1000),
        (b"NOWHERE    ", 0, 0, 1),
        (b"FAR        ", 0, 0xfff0, 1),
        (b"SOUND      ", 0, 8, 1500),
        (b"RING       ", 0x10, 2, 0),
        (b"NONE       ", 0x10, 0, 0),
    ];
    for (index, (name, attributes, first, size)) in files.into_iter().enumerate() {
        record(&mut bytes, index, (name, attributes), (first, size));
    }
    let disk = Arc::new(Watched { bytes: Mutex::new(bytes), read: Mutex::default() });
    let fat = Fat::open(disk).expect("it is a volume");
    let entries = fat.list(fat.root()).expect("the root is sound");
    let inode = |name: &str| entries.iter().find(|entry| entry.name == name.as_bytes()).expect("it was made").inode;
    let damage = |result: guest::Result<guest::Extents>| {
        let error = result.expect_err("it is damaged");
        assert_eq!(error.kind(), guest::ErrorKind::Damaged);
        error.to_string().split_once(": ").expect("it says of what").1.to_owned()
    };
    // Up to where there is something to give, and why there is no more.
    let cases: [(&str, u64, &str); 6] = [
        ("CYCLE", 0, "its chain leads into itself at cluster 2"),
        ("SHORT", 512, "its clusters hold 512 bytes where its size is 4294967295"),
        ("FREE", 512, "cluster 6 of its chain is free"),
        ("OUTSIDE", 512, "its chain leads to cluster 30583, and the last is 5975"),
        ("NOWHERE", 0, "its first cluster is 0, and there is no such cluster"),
        ("FAR", 0, "its first cluster is 65520, and there is no such cluster"),
    ];
    for (name, there, why) in cases {
        if there > 0 {
            let window = fat.extents(inode(name), 0, 10).unwrap();
            assert_eq!((window.until, window.found.len()), (there, 1), "{name}");
        }
        assert_eq!(damage(fat.extents(inode(name), there, 10)), why, "{name}");
    }
    let sound = fat.extents(inode("SOUND"), 0, 10).unwrap();
    let heap = 26 * 512;
    let extent = guest::Extent { start: 0, len: 1500, source: Source::Member(0, heap + 6 * 512) };
    assert_eq!((sound.found, sound.until), (vec![extent], 1500));
    for name in ["RING", "NONE"] {
        assert_eq!(fat.list(inode(name)).unwrap_err().kind(), guest::ErrorKind::Damaged, "{name}");
        assert_eq!(fat.attributes(inode(name)).unwrap().size, 0, "{name}");
    }
}

#[test]
fn the_second_table_is_used_if_the_first_does_not_start_as_one() {
    let mut bytes = bare();
    bytes[16] = 2;
    bytes[22] = 12;
    let (first, second) = (512, 13 * 512);
    bytes[first..first + 4].fill(0);
    bytes[second..second + 6].copy_from_slice(&[0xf8, 0xff, 0xff, 0xff, 0xff, 0xff]);
    record(&mut bytes, 0, (b"FILE       ", 0), (2, 100));
    let disk = Arc::new(Watched { bytes: Mutex::new(bytes), read: Mutex::default() });
    let fat = Fat::open(disk).expect("it is a volume");
    assert_eq!(fat.facts().problems, ["allocation table 1 is damaged, and number 2 is used"]);
    let file = fat.list(fat.root()).unwrap()[0].inode;
    assert_eq!(fat.extents(file, 0, 1).unwrap().until, 100);
}
