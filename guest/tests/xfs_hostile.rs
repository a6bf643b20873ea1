//! Whatever a guest writes into its metadata, with checksums that are right: reading ends, soon, with an answer or an error.

#[path = "compare/checksums.rs"]
mod checksums;
mod compare;

use std::fs::{self, File};
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
use guest::GuestFs;
use guest::xfs::Xfs;

/// Bytes of an image; mkfs.xfs makes none below 300 MiB.
const SIZE: u64 = 304 << 20;

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
        hostile::change(what, bytes, open, checksums::xfs, &mut random, time);
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

        let log = checksums::xfs_log(&bytes).expect("a log");
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
                if let Some((place, value)) = checksums::xfs(&bytes, &(0..0), at) {
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
