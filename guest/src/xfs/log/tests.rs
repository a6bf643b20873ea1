//! Logs that are made here, of one transaction each. That lamxfs applies one as Linux does is seen in tests/xfs.rs; that
//! all it changed is told, and nothing else, here.

use super::*;
use crate::memory::Memory;

const BLOCK: u64 = 4096;
const BLOCKS: u64 = 4096;
/// Two groups, which leave a gap between the numbers of their blocks.
const GROUP: u32 = 2100;
const LOG: u64 = 3000;
const UUID: [u8; 16] = *b"an identifier...";

/// A sector with a superblock of version 5.
fn superblock() -> Vec<u8> {
    let mut sector = vec![0; 512];
    let mut put = |at: usize, bytes: &[u8]| sector[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, b"XFSB");
    put(4, &4096_u32.to_be_bytes());
    put(8, &BLOCKS.to_be_bytes());
    put(32, &UUID);
    put(48, &packed(LOG).to_be_bytes());
    put(56, &128_u64.to_be_bytes());
    put(84, &GROUP.to_be_bytes());
    put(88, &2_u32.to_be_bytes());
    put(96, &512_u32.to_be_bytes());
    put(100, &0xb4a5_u16.to_be_bytes());
    for (at, number) in [(102, 512_u16), (104, 512), (106, 8)] {
        put(at, &number.to_be_bytes());
    }
    put(120, &[12, 9, 9, 3, 12]);
    // Kinds in directories, large times.
    put(216, &9_u32.to_be_bytes());
    checksum::set(&mut sector, 224);
    sector
}

fn packed(block: u64) -> u64 {
    let group = block / u64::from(GROUP);
    (group << 12) | (block % u64::from(GROUP))
}

/// A change of 128 bytes in the second eighth of a kibibyte of a block.
fn change(block: u64, byte: u8) -> Vec<Vec<u8>> {
    let mut item = vec![0; 24];
    item[..8].copy_from_slice(&[0x3c, 0x12, 2, 0, 0, 0, 8, 0]);
    item[8..16].copy_from_slice(&(block * 8).to_le_bytes());
    item[16] = 1;
    item[20] = 2;
    vec![item, vec![byte; 128]]
}

/// A log of one record of one transaction: what items consist of.
fn log(items: &[Vec<u8>]) -> Vec<u8> {
    let mut body = Vec::new();
    let mut operation = |flags: u8, payload: &[u8]| {
        body.extend(7_u32.to_be_bytes());
        body.extend(u32::try_from(payload.len()).unwrap().to_be_bytes());
        body.extend([0x69, flags, 0, 0]);
        body.extend(payload);
    };
    operation(1, &[]);
    operation(0, &[&0x5452_414e_u32.to_le_bytes()[..], &[0; 12]].concat());
    items.iter().for_each(|item| operation(0, item));
    operation(2, &[]);
    let len = body.len().next_multiple_of(512);
    body.resize(len, 0);
    let mut header = vec![0; 512];
    let mut put = |at: usize, bytes: &[u8]| header[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, &0xfeed_babe_u32.to_be_bytes());
    put(4, &1_u32.to_be_bytes());
    put(8, &2_u32.to_be_bytes());
    put(12, &u32::try_from(len).unwrap().to_be_bytes());
    put(16, &(1_u64 << 32).to_be_bytes());
    put(24, &(1_u64 << 32).to_be_bytes());
    put(40, &u32::try_from(items.len() + 3).unwrap().to_be_bytes());
    // The first four bytes of each block stand here, and the number of the pass in their place.
    for (index, block) in body.chunks_mut(512).enumerate() {
        put(44 + 4 * index, &block[..4]);
        block[..4].copy_from_slice(&1_u32.to_be_bytes());
    }
    put(300, &1_u32.to_be_bytes());
    put(304, &UUID);
    put(320, &32_768_u32.to_be_bytes());
    let mut covered = [&header[..328], &body].concat();
    checksum::set(&mut covered, 32);
    header[32..36].copy_from_slice(&covered[32..36]);
    [header, body].concat()
}

/// A volume with a log; the blocks that tests change are of their own number.
fn volume(log: &[u8]) -> (Memory, Superblock) {
    let mut disk = Memory::new(BLOCK * BLOCKS);
    for block in [1_u64, 5, 6, 7, 2000, 2099, 2100, 2999, 3512, 3600, 4095] {
        disk.write(block * BLOCK, &[block.to_le_bytes()[0]; 4096]);
    }
    let sector = superblock();
    disk.write(0, &sector);
    disk.write(LOG * BLOCK, log);
    (disk, Superblock::parse(&sector).expect("it is sound"))
}

fn replayed(disk: Memory, superblock: &Superblock) -> Result<Replay> {
    let disk: Arc<dyn Disk> = Arc::new(disk);
    replay(&disk, superblock)
}

#[test]
fn blocks_that_the_log_changes_are_as_the_log_has_them() {
    for blocks in [&[1][..], &[2000], &[2099, 2100, 2999], &[3512, 4095], &[5, 6, 7, 2100]] {
        let items: Vec<_> = blocks.iter().flat_map(|block| change(*block, 0xee)).collect();
        let (disk, superblock) = volume(&log(&items));
        let replay = replayed(disk, &superblock).expect("the disk can be read");
        let expected: Vec<_> = blocks
            .iter()
            .map(|block| {
                let mut bytes = vec![block.to_le_bytes()[0]; 4096];
                bytes[128..256].fill(0xee);
                (block * BLOCK, bytes)
            })
            .collect();
        assert_eq!((replay.is_replayed, replay.problems), (true, vec![]), "{blocks:?}");
        assert!(replay.changes == expected, "{blocks:?}");
    }
}

#[test]
fn a_change_that_is_on_the_volume_already_is_none() {
    let (mut disk, superblock) = volume(&log(&change(2000, 0xee)));
    disk.write(2000 * BLOCK + 128, &[0xee; 128]);
    let replay = replayed(disk, &superblock).expect("the disk can be read");
    assert_eq!((replay.is_replayed, replay.problems, replay.changes), (true, vec![], vec![]));
}

#[test]
fn an_empty_log_changes_nothing() {
    let (disk, superblock) = volume(&[]);
    let replay = replayed(disk, &superblock).expect("the disk can be read");
    assert_eq!((replay.is_replayed, replay.problems, replay.changes), (false, vec![], vec![]));
}

#[test]
fn a_log_that_cannot_be_replayed_says_why() {
    let not_understood = "it is damaged, or holds what is not understood or not finished";
    // An intent to change a map, which was not done.
    let intent = vec![vec![0x44, 0x12, 1, 0, 0, 0, 0, 0, 9, 0, 0, 0, 0, 0, 0, 0]];
    let unknown = vec![vec![0x99, 0x12, 1, 0]];
    let cases = [
        (change(LOG, 1), "it changes itself"),
        (change(BLOCKS, 1), not_understood),
        (change(u64::MAX / 8, 1), not_understood),
        (intent, not_understood),
        (unknown, not_understood),
    ];
    for (items, reason) in cases {
        let (disk, superblock) = volume(&log(&items));
        let replay = replayed(disk, &superblock).expect("the disk can be read");
        let expected = format!(
            "the log could not be replayed ({reason}): what changed in the last seconds before the backup may be missing or \
             damaged"
        );
        assert_eq!((replay.is_replayed, replay.problems, replay.changes.len()), (false, vec![expected], 0));
    }
}

#[test]
fn a_disk_that_cannot_be_read_is_an_error() {
    for broken_from in [LOG * BLOCK, LOG * BLOCK + 512, 3600 * BLOCK] {
        let (mut disk, superblock) = volume(&log(&change(3600, 1)));
        disk.break_from(broken_from);
        let error = replayed(disk, &superblock).err().expect("it cannot be read");
        assert_eq!(error.kind(), ErrorKind::Disk, "{broken_from}");
    }
}
