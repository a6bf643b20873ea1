//! Disks against flat arrays, and their layers.

use std::ops::Range;

use uuid::Uuid;
use xapi_simulator::cbt::changed_blocks;
use xapi_simulator::coalesce::{Coalesced, base_copies, coalesce};
use xapi_simulator::content::{Content, OutOfRange, digest_of, rounded_size};
use xapi_simulator::guest::Guest;
use xapi_simulator::random::{Random, fresh_uuid};

const RUN: u64 = 64 << 10;
const BLOCK: u64 = 2 << 20;

/// A disk and what it must hold.
struct Modelled {
    disk: Content,
    bytes: Vec<u8>,
    /// Of a snapshot: how many of the live disk's writes came before it.
    writes: Option<usize>,
}

impl Modelled {
    fn check(&self, random: &mut Random, seed: u64) {
        let size = self.disk.size();
        assert_eq!(size, self.bytes.len() as u64, "seed {seed}");
        assert_eq!(self.disk.digest(), digest_of(&self.bytes), "seed {seed}");
        let range = some_range(random, size);
        let mut read = vec![0xAA; length(&range)];
        self.disk.read(range.start, &mut read).unwrap();
        assert!(read == self.bytes[place(&range)], "seed {seed}: bytes {range:?}");
    }

    /// Writes by one of three ways, and returns what was written.
    fn write(&mut self, random: &mut Random) -> Range<u64> {
        let range = match random.below(3) {
            0 => {
                let range = Guest::new(random.number()).work(&mut self.disk, 1).unwrap().remove(0);
                self.disk.read(range.start, &mut self.bytes[place(&range)]).unwrap();
                range
            }
            1 => {
                let range = some_range(random, self.disk.size());
                let mut bytes = vec![0; length(&range)];
                random.fill(&mut bytes);
                self.disk.write(range.start, &bytes).unwrap();
                self.bytes[place(&range)].copy_from_slice(&bytes);
                range
            }
            _ => {
                let range = some_range(random, self.disk.size());
                self.disk.zero(range.start, range.end - range.start).unwrap();
                self.bytes[place(&range)].fill(0);
                range
            }
        };
        let mut read = vec![0; length(&range)];
        self.disk.read(range.start, &mut read).unwrap();
        assert!(read == self.bytes[place(&range)]);
        range
    }
}

fn some_range(random: &mut Random, size: u64) -> Range<u64> {
    let start = random.below(size);
    start..start + 1 + random.below((size - start).min(300 << 10))
}

fn length(range: &Range<u64>) -> usize {
    usize::try_from(range.end - range.start).unwrap()
}

fn place(range: &Range<u64>) -> Range<usize> {
    usize::try_from(range.start).unwrap()..usize::try_from(range.end).unwrap()
}

/// Returns the runs of 64 KiB that ranges touch, as a bitmap of a disk of `size` bytes.
fn bitmap(ranges: &[Range<u64>], size: u64) -> Vec<u8> {
    let mut bits = vec![0; usize::try_from(size.div_ceil(RUN).div_ceil(8)).unwrap()];
    for run in ranges.iter().flat_map(|range| range.start / RUN..range.end.div_ceil(RUN)) {
        bits[usize::try_from(run / 8).unwrap()] |= 0x80 >> (run % 8);
    }
    bits
}

#[test]
fn disks_snapshots_and_clones_hold_what_flat_arrays_hold() {
    for seed in 0..12 {
        let mut random = Random::new(seed);
        let size = (5 << 20) + random.below(4096) * 512;
        let disk = Content::new(fresh_uuid(), size);
        let mut disks = vec![Modelled { disk, bytes: vec![0; usize::try_from(size).unwrap()], writes: None }];
        disks[0].disk.enable_cbt();
        let mut writes = Vec::new();
        for _ in 0..80 {
            let chosen = usize::try_from(random.below(disks.len() as u64)).unwrap();
            match random.below(10) {
                0 => {
                    let live = &mut disks[0];
                    let (disk, bytes) = (live.disk.snapshot(fresh_uuid()), live.bytes.clone());
                    disks.push(Modelled { disk, bytes, writes: Some(writes.len()) });
                }
                1 => {
                    let copied = &mut disks[chosen];
                    let (disk, bytes) = (copied.disk.clone_disk(fresh_uuid()), copied.bytes.clone());
                    disks.push(Modelled { disk, bytes, writes: None });
                }
                2 if chosen > 0 => drop(disks.swap_remove(chosen)),
                3 => {
                    let mut all: Vec<_> = disks.iter_mut().map(|modelled| &mut modelled.disk).collect();
                    coalesce(&mut all, random.below(2) == 0);
                }
                4 => {
                    let size = disks[0].disk.size() + random.below(1024) * 512;
                    disks[0].disk.grow(size).unwrap();
                    disks[0].bytes.resize(usize::try_from(size).unwrap(), 0);
                }
                _ if disks[chosen].writes.is_none() => {
                    let written = disks[chosen].write(&mut random);
                    if chosen == 0 {
                        writes.push(written);
                    }
                }
                _ => {}
            }
            if random.below(8) == 0 {
                disks[chosen.min(disks.len() - 1)].check(&mut random, seed);
            }
        }
        for modelled in &disks {
            modelled.check(&mut random, seed);
        }
        let mut snapshots: Vec<_> =
            disks.iter().filter_map(|modelled| Some((modelled.writes?, &modelled.disk))).collect();
        snapshots.sort_by_key(|(count, disk)| (*count, disk.size()));
        for (position, (before, from)) in snapshots.iter().enumerate() {
            for (after, to) in &snapshots[position + 1..] {
                if before == after {
                    continue;
                }
                let changed = changed_blocks(from.log(), to.log()).unwrap();
                assert_eq!(changed, bitmap(&writes[*before..*after], to.size()), "seed {seed}");
            }
            let changed = changed_blocks(from.log(), disks[0].disk.log()).unwrap();
            assert_eq!(changed, bitmap(&writes[*before..], disks[0].disk.size()), "seed {seed}");
        }
    }
}

#[test]
fn what_is_not_on_the_disk_is_refused_and_changes_nothing() {
    let mut disk = Content::new(fresh_uuid(), 4096);
    let digest = disk.digest();
    let refused = Err(OutOfRange { range: 4095..4097, size: 4096 });
    assert_eq!(disk.write(4095, &[1, 2]), refused);
    assert_eq!(disk.zero(4095, 2), refused);
    assert_eq!(disk.read(4095, &mut [0; 2]), refused);
    assert!(disk.read(u64::MAX, &mut [0; 2]).is_err());
    assert!(disk.grow(512).is_err());
    assert!(disk.grow(u64::MAX).is_err());
    assert_eq!((disk.digest(), disk.allocated()), (digest, 0));
    assert_eq!(rounded_size(4096), 2 << 20);
}

#[test]
fn only_what_was_written_takes_place() {
    let mut disk = Content::new(fresh_uuid(), 2040 << 30);
    disk.write(1 << 40, b"x").unwrap();
    disk.zero(BLOCK * 7, 1).unwrap();
    disk.write(BLOCK * 9 - 1, &[1, 1]).unwrap();
    assert_eq!(disk.present(), [7, 8, 9, 1 << 19]);
    assert_eq!(disk.allocated(), 4 * BLOCK);
    let mut read = [9; 3];
    disk.read((1 << 40) - 1, &mut read).unwrap();
    assert_eq!(read, [0, b'x', 0]);
    // Present, and of zeroes, takes no memory.
    let zeroed = disk.leaf().block(7).unwrap();
    assert_eq!(zeroed.runs()[0].present(), 1);
    assert_eq!(zeroed.runs()[0].data(), None);
}

#[test]
fn a_snapshot_turns_the_leaf_into_a_base_copy_that_both_stand_on() {
    let (live, first, second) = (fresh_uuid(), fresh_uuid(), fresh_uuid());
    let mut disk = Content::new(live, BLOCK * 4);
    let empty = disk.snapshot(first);
    assert_eq!((disk.parent(), empty.parent()), (None, None));
    assert_eq!(empty.leaf().uuid(), first);

    disk.write(0, b"old").unwrap();
    let file = disk.leaf().file_uuid();
    let snapshot = disk.snapshot(second);
    let base = disk.parent().unwrap();
    assert_eq!(snapshot.parent(), Some(base));
    assert_eq!((disk.leaf().uuid(), snapshot.leaf().uuid()), (live, second));
    assert!(base != live && base != second);
    assert_eq!(disk.layers()[0].file_uuid(), file);
    disk.write(0, b"new").unwrap();
    let mut read = [0; 3];
    snapshot.read(0, &mut read).unwrap();
    assert_eq!(&read, b"old");

    let third = snapshot.clone().clone_disk(fresh_uuid());
    assert_eq!(third.parent(), Some(base));
    let bases = base_copies([&disk, &snapshot, &third]);
    assert_eq!(bases.keys().copied().collect::<Vec<Uuid>>(), [base]);
    assert_eq!(bases[&base].parent, None);
}

#[test]
fn layers_are_merged_where_only_one_stands_on_another() {
    let live = fresh_uuid();
    let mut disk = Content::new(live, BLOCK * 4);
    disk.write(0, b"first").unwrap();
    let first = disk.snapshot(fresh_uuid());
    disk.write(BLOCK, b"second").unwrap();
    let second = disk.snapshot(fresh_uuid());
    disk.write(0, b"third").unwrap();
    let mut third = disk.snapshot(fresh_uuid());
    let bases: Vec<Uuid> = disk.layers().iter().map(|layer| layer.uuid()).collect();
    assert_eq!(bases.len(), 4);
    let (digest, third_digest) = (disk.digest(), third.digest());

    // Each base has a leaf and the next base on it.
    let mut kept = (first, second);
    assert_eq!(coalesce(&mut [&mut disk, &mut kept.0, &mut kept.1, &mut third], true), None);
    drop(kept.1);
    let merged = coalesce(&mut [&mut disk, &mut kept.0, &mut third], true);
    assert_eq!(merged, Some(Coalesced { removed: bases[2], kept: bases[1] }));
    drop(kept.0);
    let merged = coalesce(&mut [&mut disk, &mut third], true);
    assert_eq!(merged, Some(Coalesced { removed: bases[1], kept: bases[0] }));
    assert_eq!(coalesce(&mut [&mut disk, &mut third], true), None);
    assert_eq!((disk.digest(), third.digest()), (digest, third_digest));
    assert_eq!(disk.layers().len(), 2);
    drop(third);
    assert_eq!(coalesce(&mut [&mut disk], false), None);
    assert_eq!(coalesce(&mut [&mut disk], true), Some(Coalesced { removed: bases[0], kept: live }));
    assert_eq!((disk.digest(), disk.parent(), disk.leaf().uuid()), (digest, None, live));
}

#[test]
fn a_bitmap_has_the_first_run_as_its_most_significant_bit_and_grows_with_the_disk() {
    let mut disk = Content::new(fresh_uuid(), 10 * RUN);
    disk.write(0, &[1; 9]).unwrap();
    disk.enable_cbt();
    let first = disk.snapshot(fresh_uuid());
    disk.write(RUN - 1, &[1; 2]).unwrap();
    disk.zero(9 * RUN, RUN).unwrap();
    let mut second = disk.snapshot(fresh_uuid());
    disk.grow(20 * RUN).unwrap();
    disk.write(19 * RUN, &[1]).unwrap();
    let third = disk.snapshot(fresh_uuid());
    assert_eq!(changed_blocks(first.log(), second.log()), Ok(vec![0b1100_0000, 0b0100_0000]));
    assert_eq!(changed_blocks(second.log(), third.log()), Ok(vec![0, 0, 0b0001_0000]));
    // Neither data nor the middle snapshot are needed, nor the layers as they were.
    second.destroy_data();
    assert_eq!((second.allocated(), second.size()), (0, 10 * RUN));
    assert_eq!(changed_blocks(second.log(), third.log()), Ok(vec![0, 0, 0b0001_0000]));
    drop(second);
    coalesce(&mut [&mut disk], true);
    let all = Ok(vec![0b1100_0000, 0b0100_0000, 0b0001_0000]);
    assert_eq!(changed_blocks(first.log(), third.log()), all);
    assert_eq!(changed_blocks(first.log(), disk.log()), all);
}

#[test]
fn there_is_no_bitmap_between_disks_that_have_no_common_log() {
    let mut disk = Content::new(fresh_uuid(), BLOCK);
    let untracked = disk.snapshot(fresh_uuid());
    disk.enable_cbt();
    let first = disk.snapshot(fresh_uuid());
    let copy = disk.clone_disk(fresh_uuid());
    let second = disk.snapshot(fresh_uuid());
    disk.disable_cbt();
    disk.enable_cbt();
    let third = disk.snapshot(fresh_uuid());
    disk.break_cbt();
    let broken = disk.snapshot(fresh_uuid());
    let number = |from: &Content, to: &Content| changed_blocks(from.log(), to.log()).map_err(|error| error.number());
    assert_eq!(number(&first, &second), Ok(vec![0; 4]));
    let numbers = [
        number(&first, &first),
        number(&second, &first),
        number(&untracked, &first),
        number(&first, &copy),
        number(&second, &third),
        number(&third, &broken),
    ];
    assert_eq!(numbers, [Err(460), Err(460), Err(460), Err(460), Err(460), Err(459)]);
}
