//! What the tables of two disks say that they may differ in, against their bytes.

#[allow(dead_code, reason = "each test file uses its part of the module")]
mod builder;

use std::ops::Range;
use std::sync::Arc;

use builder::{BLOCK, Image, Kind, context};
use disk::Disk;
use storage::{MemoryStorage, ObjectPath};
use vhd::{ChainDisk, Context};

fn open(context: &Context, name: &str) -> ChainDisk {
    vhd::open(context, &ObjectPath::new(name).unwrap(), None).unwrap()
}

/// As numbers of blocks.
fn blocks(ranges: &[Range<u64>]) -> Vec<Range<u64>> {
    let block = BLOCK as u64;
    ranges.iter().map(|range| range.start / block..range.end / block).collect()
}

#[test]
#[expect(clippy::single_range_in_vec_init, reason = "one range of blocks is meant")]
fn what_both_have_in_common_is_left_out_whichever_is_older() {
    let storage = Arc::new(MemoryStorage::new());
    let size = 8 * BLOCK as u64;
    Image::new(1, size, &[(0, 1), (1, 1), (7, 1)]).put(&storage, "a");
    Image::new(2, size, &[(1, 2), (2, 2)]).child_of(1, "a.vhd").put(&storage, "b");
    Image::new(3, size, &[(2, 3), (5, 3)]).stored(Kind::Gzip).child_of(2, "b.vhd").put(&storage, "c");
    Image::new(4, size, &[(6, 4)]).child_of(2, "b.vhd").put(&storage, "d");
    Image::new(5, size, &[(3, 5), (4, 5)]).put(&storage, "e");
    let context = context(&storage);
    let between = |one: &str, other: &str| {
        let (one, other) = (open(&context, one), open(&context, other));
        let (there, back) = (one.differing_ranges(&other).unwrap(), other.differing_ranges(&one).unwrap());
        assert_eq!(there, back);
        blocks(&there)
    };
    assert_eq!(between("b.vhd", "a.vhd"), [1..3]);
    assert_eq!(between("c.alias.vhd", "a.vhd"), [1..3, 5..6]);
    assert_eq!(between("c.alias.vhd", "b.vhd"), [2..3, 5..6]);
    assert_eq!(between("c.alias.vhd", "d.vhd"), [2..3, 5..7]);
    assert_eq!(between("b.vhd", "e.vhd"), [0..5, 7..8], "they have nothing in common");
    assert_eq!(between("d.vhd", "d.vhd"), []);
}

#[test]
fn disks_that_grew_and_shrank_hold_the_same_wherever_the_tables_say_so() {
    let seed: u64 = 0x9e37_79b9_7f4a_7c15;
    eprintln!("seed {seed:#x}");
    let mut state = seed;
    let mut random = move |below: u64| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state % below
    };
    for round in 0..60 {
        let storage = Arc::new(MemoryStorage::new());
        let count = 2 + u32::try_from(random(6)).unwrap();
        for number in 0..count {
            let size = 512 * (1 + random(12 * 8));
            let end = u32::try_from(size.div_ceil(BLOCK as u64)).unwrap();
            let fill = u8::try_from(number + 1).unwrap();
            let held: Vec<_> = (0..end).filter(|_| random(3) == 0).map(|block| (block, fill)).collect();
            let mut image = Image::new(u128::from(number), size, &held);
            if number > 0 {
                let parent = random(u64::from(number));
                image = image.child_of(u128::from(parent), &format!("l{parent}.vhd"));
            }
            image.put(&storage, &format!("l{number}"));
        }
        let context = context(&storage);
        let disks: Vec<_> = (0..count).map(|number| open(&context, &format!("l{number}.vhd"))).collect();
        for (one, other) in disks.iter().flat_map(|one| disks.iter().map(move |other| (one, other))) {
            let differ = one.differing_ranges(other).unwrap();
            let len = usize::try_from(one.size().max(other.size())).unwrap();
            let content = |disk: &ChainDisk| {
                let mut bytes = vec![0; len];
                disk.read_at(0, &mut bytes[..usize::try_from(disk.size()).unwrap()]).unwrap();
                bytes
            };
            let (one, other) = (content(one), content(other));
            for (at, (ours, theirs)) in one.iter().zip(&other).enumerate() {
                let is_within = || differ.iter().any(|range| range.contains(&(at as u64)));
                assert!(ours == theirs || is_within(), "round {round}: byte {at} is outside of {differ:?}");
            }
        }
    }
}
