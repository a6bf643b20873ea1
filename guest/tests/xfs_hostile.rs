//! Whatever a guest writes into its metadata, with checksums that are right: reading ends, soon, with an answer or an error.

mod compare;

use std::fs::{self, File};
use std::ops::Range;
use std::process::Command;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use compare::Random;
use compare::churn::Churn;
use compare::generator::{self, Amount};
use compare::hostile;
use compare::image::{Mount, Reflinks, sparse, succeed};
use compare::machine::Machine;
use disk::Disk;
use fs_ext4::checksum::linux_crc32c;
use guest::xfs::Xfs;
use guest::{Fields, GuestFs};

/// Bytes of an image; mkfs.xfs makes none below 300 MiB.
const SIZE: u64 = 304 << 20;

/// Bytes of an inode in these images.
const INODE: usize = 512;

/// Returns the checksum of a structure, and where it stands.
fn checksum(disk: &[u8], read: &Range<usize>, changed: usize) -> Option<(usize, [u8; 4])> {
    let has_none = Fields(disk).be16(100)? & 15 < 5;
    of_log(disk, changed).or_else(|| {
        if has_none {
            return None;
        }
        let (mut start, mut end) = (read.start, read.end);
        let fields = Fields(&disk[read.clone()]);
        let at = match (fields.bytes(0, 4)?, fields.be16(8)?) {
            (b"XFSB", _) => {
                end = start + 512;
                224
            }
            ([b'I', b'N', ..], _) => {
                // Several are read at once when the log changes one.
                start += (changed - start) / INODE * INODE;
                end = start + INODE;
                100
            }
            (b"BMA3", _) => 64,
            (b"XDB3" | b"XDD3" | b"XDF3", _) => 4,
            (b"XSLM" | b"XARM", _) | (_, 0x3df1 | 0x3dff | 0x3ebe | 0x3bee) => 12,
            (b"XAGI", _) => 312,
            (b"XAGF", _) => 216,
            (b"AB3B" | b"AB3C" | b"IAB3" | b"FIB3" | b"RMB3" | b"R3FC", _) => 52,
            _ => return None,
        };
        let place = start + at;
        let parts = [disk.get(start..place)?, &[0; 4], disk.get(place + 4..end)?];
        Some((place, sum(&parts)))
    })
}

/// Returns where the log is.
fn log(disk: &[u8]) -> Option<Range<usize>> {
    let superblock = Fields(disk);
    let start = superblock.be64(48)?;
    let (bits, group) = (superblock.u8(124)?, u64::from(superblock.be32(84)?));
    let block = (start >> (bits & 31)) * group + (start & ((1 << (bits & 31)) - 1));
    let start = usize::try_from(block * 4096).ok()?;
    Some(start..start + usize::try_from(superblock.be32(96)?).ok()? * 4096)
}

/// Of the record of the log that a byte is in.
fn of_log(disk: &[u8], changed: usize) -> Option<(usize, [u8; 4])> {
    let log = log(disk)?;
    if !log.contains(&changed) {
        return None;
    }
    let mut at = changed / 512 * 512;
    while disk.get(at..at + 4)? != [0xfe, 0xed, 0xba, 0xbe] {
        at = at.checked_sub(512).filter(|at| log.contains(at))?;
    }
    let record = Fields(&disk[at..log.end.min(disk.len())]);
    let len = usize::try_from(record.be32(12)?).ok()?;
    let headers = usize::try_from(record.be32(320)?).ok()?.div_ceil(32 << 10).max(1);
    let mut parts = vec![record.bytes(0, 32)?, &[0; 4], record.bytes(36, 328 - 36)?];
    for header in 1..len.div_ceil(32 << 10) {
        parts.push(record.bytes(header * 512, 260)?);
    }
    parts.push(record.bytes(headers * 512, len)?);
    Some((at + 32, sum(&parts)))
}

fn sum(parts: &[&[u8]]) -> [u8; 4] {
    (!parts.iter().fold(!0, |sum, part| linux_crc32c(sum, part))).to_le_bytes()
}

#[test]
fn reading_ends_whatever_is_in_the_metadata() {
    let seed = Random::seed();
    let mut random = Random::new(seed);
    let place = Reflinks::new(2 << 30);
    let image = place.at("image");
    for is_in_use in [false, true] {
        sparse(&image, SIZE);
        succeed(Command::new("mkfs.xfs").args(["-q", "-f", "-i", "nrext64=1"]).arg(&image));
        let bytes = {
            let mount = Mount::new(&image, "xfs", "noatime");
            generator::fill(mount.path(), Amount { names: 400, holes: 200 });
            File::open(mount.path()).and_then(|root| Ok(rustix::fs::syncfs(root)?)).expect("it is written");
            Churn::new(mount.path(), seed).work(50);
            if is_in_use { Some(fs::read(place.copy(&image, "snapshot")).expect("it was just made")) } else { None }
        };
        let bytes = bytes.unwrap_or_else(|| fs::read(&image).expect("it was just made"));
        let time = Duration::from_millis(2000 * compare::rounds(1));
        let what = if is_in_use { "in use" } else { "clean" };
        let open: hostile::Open = |disk| Ok(Box::new(Xfs::open(disk)?));
        hostile::change(what, bytes, open, checksum, &mut random, time);
    }
}

/// A disk in memory.
struct Bytes(Mutex<Vec<u8>>);

impl Disk for Bytes {
    fn size(&self) -> u64 {
        self.0.lock().unwrap().len() as u64
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> disk::Result<()> {
        let start = usize::try_from(offset).expect("64 bits");
        let bytes = self.0.lock().unwrap();
        let found = bytes.get(start..start + buffer.len());
        buffer.copy_from_slice(found.ok_or_else(|| disk::Error::new(disk::ErrorKind::OutOfRange, "past the end"))?);
        Ok(())
    }

    fn extent_at(&self, offset: u64) -> disk::Result<disk::Extent> {
        Ok(disk::Extent { len: self.size() - offset, is_hole: false })
    }
}

/// Asks for what a log can change, and returns whether it was replayed.
fn is_replayed(disk: &Arc<Bytes>) -> bool {
    let Ok(guest) = Xfs::open(disk.clone()) else { return false };
    for entry in guest.list(guest.root()).unwrap_or_default() {
        for inode in guest.list(entry.inode).unwrap_or_default().into_iter().map(|entry| entry.inode).take(20) {
            let _ = (guest.attributes(inode), guest.xattrs(inode), guest.extents(inode, 0, 100));
        }
    }
    guest.facts().is_replayed
}

#[test]
fn replaying_ends_whatever_is_in_the_log() {
    let seed = Random::seed();
    let mut random = Random::new(seed);
    let place = Reflinks::new(2 << 30);
    for (what, options) in [("version 4", "crc=0,finobt=0"), ("version 5", "crc=1")] {
        let image = place.at("image");
        sparse(&image, SIZE);
        succeed(Command::new("mkfs.xfs").args(["-q", "-f", "-m", options]).arg(&image));
        let script = format!(
            "mount -o noatime /dev/ubda /mnt; task churn /mnt {seed} $out/stop &\n\
             until [ -e /mnt/folder-7 ]; do sleep 0.1; done; sync -f /mnt; touch $out/working; wait $!; umount /mnt"
        );
        let mut machine = Machine::start(&[], &[&image], &script);
        machine.wait_for("working");
        std::thread::sleep(Duration::from_secs(2));
        let bytes = fs::read(place.copy(&image, "snapshot")).expect("it was just made");
        File::create(machine.out().join("stop")).expect("room");
        machine.finish();

        let log = log(&bytes).expect("a log");
        let is_header = |at: &usize| bytes[*at..at + 4] == [0xfe, 0xed, 0xba, 0xbe];
        let headers: Vec<_> = log.step_by(512).filter(is_header).collect();
        let end = headers[headers.len() - 1] + 512;
        let disk = Arc::new(Bytes(Mutex::new(bytes)));
        assert!(is_replayed(&disk), "{what}");
        let start = Instant::now();
        let (mut mutants, mut replayed) = (0, 0);
        while start.elapsed() < Duration::from_secs(3 * compare::rounds(1)) {
            let mut before = Vec::new();
            for _ in 0..1 + random.below(12) {
                let mut bytes = disk.0.lock().unwrap();
                let at = headers[0] + usize::try_from(random.below((end - headers[0]) as u64)).unwrap();
                before.push((at, bytes[at]));
                bytes[at] = [0, 1, 0x7f, 0xff, random.bytes(1)[0]][usize::try_from(random.below(5)).unwrap()];
                if let Some((place, value)) = checksum(&bytes, &(0..0), at) {
                    for (at, byte) in (place..).zip(value) {
                        before.push((at, bytes[at]));
                        bytes[at] = byte;
                    }
                }
            }
            let began = Instant::now();
            replayed += usize::from(is_replayed(&disk));
            assert!(began.elapsed() < Duration::from_secs(10), "{what}: {:?} with {before:?}", began.elapsed());
            let mut bytes = disk.0.lock().unwrap();
            for (at, byte) in before.into_iter().rev() {
                bytes[at] = byte;
            }
            mutants += 1;
        }
        println!("{what}: {mutants} mutants of {} records, {replayed} of them replayed", headers.len());
        assert!(is_replayed(&disk), "{what}: it is as it was");
    }
}

#[test]
#[ignore = "a task of those above, in machines of their own"]
fn inside_a_machine() {
    compare::machine::task();
}
