//! Logs that are made here, of what no kernel writes when it is asked. That a log is replayed as Linux does is seen in
//! tests/xfs.rs.

use super::*;
use crate::memory::Memory;
use crate::xfs::checksum;

const BLOCK: u64 = 4096;
const BLOCKS: u64 = 4096;
/// Two groups, which leave a gap between the numbers of their blocks.
const GROUP: u32 = 2100;
const LOG: u64 = 3000;
const UUID: [u8; 16] = *b"an identifier...";

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Version {
    Four,
    Five,
}

fn superblock(version: Version) -> Vec<u8> {
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
    put(100, &if version == Version::Five { 0xb4a5_u16 } else { 0xb4a4 }.to_be_bytes());
    for (at, number) in [(102, 512_u16), (104, 512), (106, 8)] {
        put(at, &number.to_be_bytes());
    }
    put(120, &[12, 9, 9, 3, 12]);
    if version == Version::Five {
        // Kinds in directories, large times.
        put(216, &9_u32.to_be_bytes());
        checksum::set(&mut sector, 224);
    } else {
        put(200, &0x8a_u32.to_be_bytes());
    }
    sector
}

fn packed(block: u64) -> u64 {
    let group = block / u64::from(GROUP);
    (group << 12) | (block % u64::from(GROUP))
}

/// A change of 128 bytes in the second eighth of a kibibyte of a block.
fn change(block: u64, byte: u8) -> Vec<Vec<u8>> {
    buffer(block, 0, 2, vec![byte; 128])
}

fn buffer(block: u64, flags: u8, bitmap: u8, bytes: Vec<u8>) -> Vec<Vec<u8>> {
    let mut item = vec![0; 24];
    let regions = if bytes.is_empty() { 1 } else { 2 };
    item[..8].copy_from_slice(&[0x3c, 0x12, regions, 0, flags, 0, 8, 0]);
    item[8..16].copy_from_slice(&(block * 8).to_le_bytes());
    item[16] = 1;
    item[20] = bitmap;
    [vec![item], if bytes.is_empty() { vec![] } else { vec![bytes] }].concat()
}

fn cancel(block: u64) -> Vec<Vec<u8>> {
    buffer(block, 2, 0, vec![])
}

fn operation(transaction: u32, flags: u8, payload: &[u8]) -> Vec<u8> {
    let len = u32::try_from(payload.len()).unwrap();
    [&transaction.to_be_bytes()[..], &len.to_be_bytes(), &[0x69, flags, 0, 0], payload].concat()
}

/// The operations of a transaction: what items consist of.
fn transaction(number: u32, items: &[Vec<u8>]) -> Vec<Vec<u8>> {
    let header = [&0x5452_414e_u32.to_le_bytes()[..], &[0; 12]].concat();
    let first = [operation(number, 1, &[]), operation(number, 0, &header)];
    let items = items.iter().map(|item| operation(number, 0, item));
    first.into_iter().chain(items).chain([operation(number, 2, &[])]).collect()
}

/// A record at a sector, in a log that is to be replayed from its first.
fn record(sector: u32, operations: &[Vec<u8>]) -> Vec<u8> {
    let mut body = operations.concat();
    let len = body.len().next_multiple_of(512);
    body.resize(len, 0);
    let mut header = vec![0; 512];
    let mut put = |at: usize, bytes: &[u8]| header[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, &0xfeed_babe_u32.to_be_bytes());
    put(4, &1_u32.to_be_bytes());
    put(8, &2_u32.to_be_bytes());
    put(12, &u32::try_from(len).unwrap().to_be_bytes());
    put(16, &((1_u64 << 32) + u64::from(sector)).to_be_bytes());
    put(24, &(1_u64 << 32).to_be_bytes());
    put(40, &u32::try_from(operations.len()).unwrap().to_be_bytes());
    // The first four bytes of each sector stand here, and the number of the cycle in their place.
    for (index, sector) in body.chunks_mut(512).enumerate() {
        put(44 + 4 * index, &sector[..4]);
        sector[..4].copy_from_slice(&1_u32.to_be_bytes());
    }
    put(300, &1_u32.to_be_bytes());
    put(304, &UUID);
    put(320, &32_768_u32.to_be_bytes());
    let mut covered = [&header[..328], &body].concat();
    checksum::set(&mut covered, 32);
    header[32..36].copy_from_slice(&covered[32..36]);
    [header, body].concat()
}

/// A log of records, each of so many operations.
fn log(records: &[Vec<Vec<u8>>]) -> Vec<u8> {
    let mut log = Vec::new();
    for operations in records {
        log.extend(record(u32::try_from(log.len() / 512).unwrap(), operations));
    }
    log
}

/// A volume with a log; the blocks that tests change are of their own number.
fn volume(version: Version, log: &[u8]) -> Memory {
    let mut disk = Memory::new(BLOCK * BLOCKS);
    for block in [1_u64, 5, 6, 7, 2000, 2099, 2100, 2999, 3512, 3600, 4095] {
        disk.write(block * BLOCK, &[block.to_le_bytes()[0]; 4096]);
    }
    disk.write(0, &superblock(version));
    disk.write(LOG * BLOCK, log);
    disk
}

fn replayed(version: Version, disk: Memory) -> Result<Replay> {
    let disk: Arc<dyn Disk> = Arc::new(disk);
    replay(&disk, &Superblock::parse(&superblock(version)).expect("it is sound"))
}

/// Replays what must be replayed, and returns what is changed.
fn changed(version: Version, disk: Memory) -> Vec<(u64, Vec<u8>)> {
    let replay = replayed(version, disk).expect("the disk can be read");
    assert_eq!((replay.is_replayed, replay.problems), (true, vec![]));
    replay.changes
}

/// The sector that [`change`] changes, as it is then.
fn sector_of(block: u64, byte: u8) -> (u64, Vec<u8>) {
    let mut bytes = vec![block.to_le_bytes()[0]; 512];
    bytes[128..256].fill(byte);
    (block * BLOCK, bytes)
}

#[test]
fn sectors_that_the_log_changes_are_as_the_log_has_them() {
    for version in [Version::Four, Version::Five] {
        for blocks in [&[1][..], &[2000], &[2099, 2100, 2999], &[3512, 4095], &[5, 6, 7, 2100]] {
            let items: Vec<_> = blocks.iter().flat_map(|block| change(*block, 0xee)).collect();
            let disk = volume(version, &log(&[transaction(7, &items)]));
            let expected: Vec<_> = blocks.iter().map(|block| sector_of(*block, 0xee)).collect();
            assert!(changed(version, disk) == expected, "{version:?} {blocks:?}");
        }
    }
}

#[test]
fn a_region_goes_on_in_the_next_record_and_what_is_not_committed_was_not_done() {
    let mut operations = transaction(7, &change(2000, 0xee));
    let commit = operations.pop().expect("a commit");
    let region = operations.pop().expect("a region");
    operations.push(operation(7, 4, &region[12..100]));
    operations.extend(transaction(8, &change(1, 1))[..4].to_vec());
    let middle = vec![operation(7, 4 | 8, &region[100..120])];
    let last = vec![operation(7, 8 | 0x10, &region[120..]), operation(9, 0, b"of before the tail"), commit];
    let disk = volume(Version::Five, &log(&[operations, middle, last]));
    assert!(changed(Version::Five, disk) == [sector_of(2000, 0xee)]);
}

#[test]
fn what_is_freed_later_is_left_as_it_is() {
    let before = transaction(7, &[change(2000, 1), change(1, 1)].concat());
    // Of the same transaction, too, in which it is freed last.
    let freed = transaction(8, &[cancel(2000), change(2000, 2), change(5, 2)].concat());
    let after = transaction(9, &change(2000, 3));
    let disk = volume(Version::Four, &log(&[before, freed, after]));
    let expected = [sector_of(1, 1), sector_of(5, 2), sector_of(2000, 3)];
    assert!(changed(Version::Four, disk) == expected);
}

#[test]
fn new_inodes_are_made_but_where_some_of_their_blocks_are_freed_later() {
    let mut new = vec![0; 28];
    new[..4].copy_from_slice(&[0x3f, 0x12, 1, 0]);
    for (at, number) in [(4, 1_u32), (8, 100), (12, 16), (16, 512), (20, 2), (24, 0xabcd)] {
        new[at..at + 4].copy_from_slice(&number.to_be_bytes());
    }
    let (made, made_and_freed) = (transaction(7, &[new.clone()]), [vec![new], cancel(2201)].concat());
    assert_eq!(changed(Version::Five, volume(Version::Five, &log(&[transaction(7, &made_and_freed)]))), []);
    let changes = changed(Version::Five, volume(Version::Five, &log(&[made])));
    let [(at, bytes)] = &changes[..] else { panic!("{} changes", changes.len()) };
    assert_eq!((*at, bytes.len()), (2200 * BLOCK, 8192));
    let mut last = vec![0; 512];
    last[..6].copy_from_slice(&[b'I', b'N', 0, 0, 3, 0]);
    last[92..96].copy_from_slice(&0xabcd_u32.to_be_bytes());
    last[96..100].fill(0xff);
    last[152..160].copy_from_slice(&(packed(2200) * 8 + 15).to_be_bytes());
    last[160..176].copy_from_slice(&UUID);
    checksum::set(&mut last, 100);
    assert_eq!(bytes[15 * 512..], last);
}

/// A structure of version 5 that was changed last by what the log has at a sector.
fn stamped(sector: u32) -> Vec<u8> {
    let mut block = vec![0x55; 4096];
    block[..4].copy_from_slice(b"XDB3");
    block[16..24].copy_from_slice(&((1_u64 << 32) + u64::from(sector)).to_be_bytes());
    block[24..40].copy_from_slice(&UUID);
    checksum::set(&mut block, 4);
    block
}

#[test]
fn what_is_newer_than_the_log_is_left_as_it_is() {
    // Two transactions that start in one record have the same number.
    let first = [transaction(7, &change(2000, 1)), transaction(8, &buffer(2000, 0, 4, vec![2; 128]))].concat();
    for sector in 1..4 {
        // They are at sector 2.
        let mut disk = volume(Version::Five, &log(&[vec![operation(1, 0, &[])], first.clone()]));
        disk.write(2000 * BLOCK, &stamped(sector));
        let mut expected = stamped(sector);
        expected[128..256].fill(1);
        expected[256..384].fill(2);
        checksum::set(&mut expected, 4);
        expected.truncate(512);
        let expected = if sector < 2 { vec![(2000 * BLOCK, expected)] } else { vec![] };
        assert!(changed(Version::Five, disk) == expected, "{sector}");
    }
}

/// An inode of version 4, as an item or on the disk: written so often, of such a size.
fn inode(flushes: u16, size: u64, is_logged: bool) -> Vec<u8> {
    let mut inode = vec![0; 512];
    let mut put = |at: usize, mut bytes: Vec<u8>| {
        if is_logged {
            bytes.reverse();
        }
        inode[at..at + bytes.len()].copy_from_slice(&bytes);
    };
    put(0, b"IN".to_vec());
    put(2, 0o100_644_u16.to_be_bytes().to_vec());
    put(4, vec![2]);
    put(5, vec![2]);
    put(30, flushes.to_be_bytes().to_vec());
    put(32, 1_234_567_u32.to_be_bytes().to_vec());
    put(36, 89_u32.to_be_bytes().to_vec());
    put(56, size.to_be_bytes().to_vec());
    if is_logged {
        inode.truncate(96);
    } else {
        inode[96..100].copy_from_slice(&77_u32.to_be_bytes());
    }
    inode
}

#[test]
fn inodes_of_version_4_are_replayed_unless_they_were_written_more_often() {
    for (on_disk, logged, is_changed) in [(5, 5, true), (5, 6, true), (6, 5, false), (u16::MAX, 1, true)] {
        for gap in [0, 4] {
            // 32-bit machines have none.
            let mut format = vec![0; 52 + gap];
            format[..6].copy_from_slice(&[0x3b, 0x12, 3, 0, 1 | 4, 0]);
            format[36 + gap..44 + gap].copy_from_slice(&(2000_u64 * 8).to_le_bytes());
            format[44 + gap] = 16;
            format[48 + gap..52 + gap].copy_from_slice(&1024_u32.to_le_bytes());
            let items = vec![format, inode(logged, 1 << 40, true), vec![0xab; 16]];
            let mut disk = volume(Version::Four, &log(&[transaction(7, &items)]));
            disk.write(2000 * BLOCK + 1024, &inode(on_disk, 9, false));
            let mut expected = inode(0, 1 << 40, false);
            expected[100..116].fill(0xab);
            let expected = if is_changed { vec![(2000 * BLOCK + 1024, expected)] } else { vec![] };
            assert!(changed(Version::Four, disk) == expected, "{on_disk} {logged} {gap}");
        }
    }
}

fn intent(kind: u8, number: u8, inode: u8, flags: u8) -> Vec<u8> {
    let mut item = vec![0; 32];
    item[..4].copy_from_slice(&[kind, 0x12, 1, 0]);
    (item[8], item[16], item[24]) = (number, inode, flags);
    item
}

#[test]
fn inodes_of_which_a_change_is_half_done_are_named() {
    let items = [
        intent(0x44, 1, 131, 0),
        intent(0x44, 2, 132, 0),
        intent(0x45, 1, 0, 0),
        // Of blocks that are freed, of a parent, of an attribute, and of two files.
        intent(0x36, 3, 133, 0),
        intent(0x46, 4, 134, 5),
        intent(0x46, 5, 135, 1),
        intent(0x48, 6, 136, 137),
    ];
    let disk = volume(Version::Five, &log(&[transaction(7, &[&items[..], &change(1, 1)].concat())]));
    let replay = replayed(Version::Five, disk).expect("the disk can be read");
    assert!(replay.is_replayed && replay.changes == [sector_of(1, 1)]);
    assert_eq!(replay.unfinished, BTreeSet::from([132, 135, 136, 137]));
    let expected = "changes of 4 inodes were half done when the guest stopped, and are not finished: what these hold is not \
                    shown (132, 135, 136, 137)";
    assert_eq!(replay.problems, [expected]);
}

#[test]
fn an_empty_log_and_that_of_an_unmounted_volume_change_nothing() {
    for log in [vec![], log(&[transaction(7, &change(1, 1)), vec![operation(1, 0x20, &[])]])] {
        let replay = replayed(Version::Five, volume(Version::Five, &log)).expect("the disk can be read");
        assert_eq!((replay.is_replayed, replay.problems, replay.changes), (false, vec![], vec![]));
    }
}

#[test]
fn records_that_were_not_written_as_a_whole_are_none_if_they_are_the_last() {
    let records: Vec<_> = (0..12).map(|number| transaction(number, &change(2000, number.to_le_bytes()[0]))).collect();
    let sound = log(&records);
    let len = sound.len() / 12;
    for version in [Version::Four, Version::Five] {
        for (broken, last) in [(11, 10), (4, 3)] {
            let mut log = sound.clone();
            log[broken * len + 700] ^= 1;
            assert!(changed(version, volume(version, &log)) == [sector_of(2000, last)], "{version:?} {broken}");
            // Its sectors were not written in this cycle.
            let mut log = sound.clone();
            log[broken * len + 512..(broken + 1) * len].fill(0);
            assert!(changed(version, volume(version, &log)) == [sector_of(2000, last)], "{version:?} {broken}");
        }
        let mut log = sound.clone();
        log[3 * len + 700] ^= 1;
        let replay = replayed(version, volume(version, &log)).expect("the disk can be read");
        assert_eq!((replay.is_replayed, replay.problems.len(), replay.changes.len()), (false, 1, 0), "{version:?}");
        // Old kernels make no checksums.
        log[3 * len + 32..3 * len + 36].fill(0);
        let replay = replayed(version, volume(version, &log)).expect("the disk can be read");
        assert_eq!(replay.is_replayed, version == Version::Four, "{:?}", replay.problems);
    }
}

#[test]
fn a_log_that_cannot_be_replayed_says_why() {
    let cases = [
        (change(LOG, 1), "it changes itself"),
        (change(BLOCKS, 1), "it changes 1 sectors at 32768, which are not there"),
        (change(u64::MAX / 8, 1), "it changes 1 sectors at 18446744073709551608, which are not there"),
        (buffer(1, 0, 6, vec![1; 128]), "what is changed of a buffer is not there"),
        (vec![vec![0x3b, 0x12, 1, 0]], "an inode is cut off"),
        (vec![vec![0x3c, 0x12, 2, 0]], "an item is cut off"),
        (vec![vec![0x99, 0x12, 1, 0]], "it has an item of kind 0x1299, which is not known"),
    ];
    for (items, reason) in cases {
        let disk = volume(Version::Five, &log(&[transaction(7, &items)]));
        let replay = replayed(Version::Five, disk).expect("the disk can be read");
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
        let mut disk = volume(Version::Five, &log(&[transaction(7, &change(3600, 1))]));
        disk.break_from(broken_from);
        let error = replayed(Version::Five, disk).expect_err("it cannot be read");
        assert_eq!(error.kind(), ErrorKind::Disk, "{broken_from}");
    }
}
