//! Metadata of thin pools, snapshots and caches that no kernel would write: bytes of them are changed, checksums made anew, and
//! all extents asked for.

mod compare;

use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use compare::Random;
use compare::image::{FileDisk, scratch, sparse};
use compare::machine::Machine;
use disk::{Disk, Error, ErrorKind, Extent, Result};
use fs_ext4::checksum::linux_crc32c;
use guest::{Layer, Part, Source, Stack, survey};

const MIB: u64 = 1 << 20;

/// Bytes of a block of metadata that has a checksum.
const BLOCK: usize = 4096;

/// Where checksums of each kind of block start from: superblocks of pools and caches, nodes, arrays.
const SALTS: [u32; 4] = [160_774, 9_031_977, 121_107, 595_846_735];

/// Windows of extents that are asked for: sound volumes have fewer.
const WINDOWS: usize = 200;

/// A disk in memory that remembers which blocks were read.
struct Watched {
    bytes: Mutex<Vec<u8>>,
    read: Mutex<Vec<usize>>,
}

impl Disk for Watched {
    fn size(&self) -> u64 {
        self.bytes.lock().unwrap().len() as u64
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<()> {
        let start = usize::try_from(offset).expect("64 bits");
        let bytes = self.bytes.lock().unwrap();
        let found = bytes.get(start..start + buffer.len());
        buffer.copy_from_slice(found.ok_or_else(|| Error::new(ErrorKind::OutOfRange, "past the end"))?);
        self.read.lock().unwrap().push(start / BLOCK * BLOCK);
        Ok(())
    }

    fn extent_at(&self, offset: u64) -> Result<Extent> {
        Ok(Extent { len: self.size() - offset, is_hole: false })
    }
}

/// A disk of zeroes.
struct Zeroes(u64);

impl Disk for Zeroes {
    fn size(&self) -> u64 {
        self.0
    }

    fn read_at(&self, _: u64, buffer: &mut [u8]) -> Result<()> {
        buffer.fill(0);
        Ok(())
    }

    fn extent_at(&self, offset: u64) -> Result<Extent> {
        Ok(Extent { len: self.0 - offset, is_hole: true })
    }
}

/// Asks for all extents of a layer; returns how many there are, `None` if it cannot be opened.
fn walk(layer: Layer, size: u64, members: &[Arc<dyn Disk>]) -> Option<usize> {
    let guest = layer.open(size, members.to_vec()).ok()?;
    let (mut at, mut count) = (0, 0);
    for _ in 0..WINDOWS {
        let Ok(window) = guest.extents(Layer::VOLUME, at, 1000) else { break };
        assert!(window.until > at, "no further than {at}");
        let mut end = at;
        for extent in &window.found {
            let Source::Member(member, place) = extent.source else { panic!("{extent:?}") };
            assert!(extent.len > 0 && extent.start >= end && extent.start + extent.len <= size, "{extent:?}");
            assert!(place + extent.len <= members[usize::from(member)].size(), "{extent:?}");
            end = extent.start + extent.len;
        }
        count += window.found.len();
        at = window.until;
        if at >= size {
            break;
        }
    }
    Some(count)
}

/// Changes what a layer reads of its first member, again and again.
fn change(what: &str, layer: Layer, size: u64, members: &[Arc<dyn Disk>], random: &mut Random, time: Duration) {
    let mut bytes = vec![0; usize::try_from(members[0].size()).expect("a few MiB")];
    members[0].read_at(0, &mut bytes).expect("it can be read");
    let watched = Arc::new(Watched { bytes: Mutex::new(bytes), read: Mutex::default() });
    let others = members[1..].iter().map(|member| -> Arc<dyn Disk> { Arc::new(Zeroes(member.size())) });
    let members: Vec<Arc<dyn Disk>> = std::iter::once(watched.clone() as Arc<dyn Disk>).chain(others).collect();
    let sound = walk(layer, size, &members).expect("it is sound");
    assert!(sound > 20, "{what}: {sound} extents");
    let mut blocks = std::mem::take(&mut *watched.read.lock().unwrap());
    blocks.sort_unstable();
    blocks.dedup();
    let start = Instant::now();
    let (mut mutants, mut opened) = (0, 0);
    while start.elapsed() < time {
        let mut before = vec![];
        for _ in 0..1 + random.below(6) {
            let at = blocks[usize::try_from(random.below(blocks.len() as u64)).unwrap()];
            let mut bytes = watched.bytes.lock().unwrap();
            let block = &mut bytes[at..at + BLOCK];
            before.push((at, block.to_vec()));
            let sum = |block: &[u8]| linux_crc32c(u32::MAX, &block[4..]);
            let salt = u32::from_le_bytes(block[..4].try_into().unwrap()) ^ sum(block);
            for _ in 0..=random.below(3) {
                // Half of all in the header.
                let range = if random.below(2) == 0 { 64 } else { BLOCK as u64 };
                let place = usize::try_from(random.below(range)).unwrap();
                let other = usize::try_from(random.below(BLOCK as u64 / 8)).unwrap() * 8;
                match random.below(3) {
                    // A number that stands elsewhere, so that nodes lead to each other and keys are out of order.
                    0 => block.copy_within(other..other + 8, place / 8 * 8),
                    _ => {
                        block[place] = [0, 1, 0x7f, 0xff, random.bytes(1)[0]][usize::try_from(random.below(5)).unwrap()]
                    }
                }
            }
            if SALTS.contains(&salt) {
                let sum = (sum(block) ^ salt).to_le_bytes();
                block[..4].copy_from_slice(&sum);
            }
        }
        let began = Instant::now();
        opened += usize::from(walk(layer, size, &members).is_some());
        assert!(began.elapsed() < Duration::from_secs(10), "{what}: {:?}", began.elapsed());
        watched.read.lock().unwrap().clear();
        let mut bytes = watched.bytes.lock().unwrap();
        for (at, block) in before.into_iter().rev() {
            bytes[at..at + BLOCK].copy_from_slice(&block);
        }
        mutants += 1;
    }
    println!("{what}: {sound} extents, {} blocks, {mutants} mutants, {opened} of them opened", blocks.len());
    assert!(opened > 0 && opened < mutants, "{what}: {opened} of {mutants}");
}

#[test]
fn whatever_metadata_say_reading_them_ends() {
    let mut random = Random::new(Random::seed());
    let folder = scratch();
    let path: PathBuf = folder.path().join("disk");
    sparse(&path, 600 * MIB);
    let script = r#"
        write() {
            python3 -c '
import os, random, sys
disk = os.open(sys.argv[1], os.O_WRONLY)
size, step, count = os.lseek(disk, 0, 2), int(sys.argv[2]), int(sys.argv[3])
random.seed(1)
for chunk in random.sample(range(size // step), count):
    os.pwrite(disk, b"x" * step, chunk * step)
os.fsync(disk)' /dev/vg/$1 $2 $3
        }
        lvm pvcreate /dev/ubda
        lvm vgcreate -s 1M vg /dev/ubda
        lvm lvcreate -T vg/pool -L 200M -c 64K --poolmetadatasize 4M
        lvm lvcreate -V 200M -T vg/pool -n thin
        write thin 65536 1500
        lvm lvcreate -s -kn vg/thin -n shared
        write shared 65536 700
        lvm lvcreate -L 60M -n lin vg
        lvm lvcreate -s -L 20M -c 4K -n snap vg/lin
        write snap 4096 2000
        lvm lvcreate -L 60M -n cached vg
        lvm lvcreate -L 30M -n fast vg
        lvm lvconvert -y --type cache --cachevol vg/fast --cachemode writeback -c 32K vg/cached
        dd if=/dev/urandom of=/dev/vg/cached bs=32K oflag=direct count=500
        for at in 700 900 1000 1100 1200 1500; do dd if=/dev/urandom of=/dev/vg/cached bs=32K oflag=direct count=9 seek=$at; done
        for at in $(seq 2 2 100); do dd if=/dev/urandom of=/dev/vg/cached bs=32K oflag=direct count=1 seek=$((1600 + at)); done
        sync
        lvm vgchange -an vg
        "#;
    Machine::run(compare::machine::LVM_MODULES, &[&path], &format!("{}{script}", compare::machine::LVM));
    let disks: Vec<Arc<dyn Disk>> = vec![Arc::new(FileDisk::open(&path))];
    let found = survey(&[("xvda".to_owned(), disks[0].clone())]);
    let time = Duration::from_secs(compare::rounds(2));
    for name in ["vg-thin", "vg-shared", "vg-snap", "vg-cached"] {
        let volume = found.volumes.iter().find(|volume| volume.name == name).expect("it is there");
        let parts = volume.stack.as_ref().unwrap_or_else(|| panic!("{volume:?}")).parts();
        let Some(Part::Layer { layer, size, members }) = parts.last() else { panic!("{parts:?}") };
        let member = |index: &u16| {
            let stack = Stack::new(vec![parts[usize::from(*index)].clone()]).expect("a map");
            stack.open(&disks, |_, _, _, _| Err(guest::Error::damaged("no layer"))).expect("it lies on the disk")
        };
        change(name, *layer, *size, &members.iter().map(member).collect::<Vec<_>>(), &mut random, time);
    }
}

#[test]
#[ignore = "a task of those above, in machines of their own"]
fn inside_a_machine() {
    compare::machine::task();
}
