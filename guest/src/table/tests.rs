pub(crate) use super::gpt::tests::{Made, repair};
pub(crate) use super::mbr::tests::record;
use super::*;
use crate::memory::Memory;

/// Numbers of the partitions, and the problems.
fn read_table(disk: &Memory) -> Option<(Vec<u32>, Vec<String>)> {
    let disk: Arc<dyn Disk> = Arc::new(disk.clone());
    let table = read(&disk).unwrap()?;
    Some((
        table.partitions.iter().map(|partition| partition.number).collect(),
        table.problems.iter().map(ToString::to_string).collect(),
    ))
}

/// A disk with a GPT of one partition in slot 2, and sector 0.
fn with_gpt(entries: &[(u8, u32, u32)]) -> Memory {
    let mut disk = Memory::new(8 << 20);
    Made::default().write(&mut disk, &[(1, 100, 199)]);
    disk.write(0, &record(entries));
    disk
}

/// The first sector of a FAT volume, as mkfs.fat writes it.
pub(crate) fn fat() -> Vec<u8> {
    let mut sector = record(&[(0x83, 1, 1)]);
    sector[..3].copy_from_slice(&[0xeb, 0x3c, 0x90]);
    sector[11..24].copy_from_slice(&[0, 2, 4, 1, 0, 2, 0, 2, 0, 64, 0xf8, 16, 0]);
    sector
}

#[test]
fn sector_0_decides_which_table_a_disk_has() {
    const WHOLE: (u8, u32, u32) = (0xee, 1, u32::MAX);
    type Entries<'a> = &'a [(u8, u32, u32)];
    let cases: [(&str, Entries, &[u32]); 4] = [
        ("protective", &[WHOLE], &[2]),
        ("hybrid", &[WHOLE, (0x83, 100, 100)], &[2]),
        ("the GPT is older", &[(0x83, 50, 10)], &[1]),
        ("no table at all", &[], &[2]),
    ];
    for (what, entries, expected) in cases {
        assert_eq!(read_table(&with_gpt(entries)), Some((expected.to_vec(), vec![])), "{what}");
    }
}

#[test]
fn a_filesystem_on_the_whole_disk_is_no_table() {
    let mut disk = Memory::new(8 << 20);
    disk.write(0, &fat());
    assert_eq!(read_table(&disk), None);

    // The backup at the end is of a table that the disk had before.
    let mut disk = with_gpt(&[]);
    disk.write(0, &[0; 64 * 512]);
    assert_eq!(read_table(&disk).unwrap().0, [2]);
    disk.write(0, b"XFSB\0\0\x10\0\0\0\0\0\0\0\x10\0");
    disk.write(88, &[0, 0, 0, 4]);
    assert_eq!(read_table(&disk), None);
    assert_eq!(read_table(&Memory::new(0)), None);
    assert_eq!(read_table(&Memory::new(1 << 40)), None);
}

#[test]
fn a_disk_whose_gpt_is_lost_says_so_and_shows_what_sector_0_names() {
    for (entries, expected) in [(&[(0xee, 1, 4000)][..], &[][..]), (&[(0xee, 1, 4000), (0x83, 4001, 10)], &[2])] {
        let mut disk = Memory::new(8 << 20);
        disk.write(0, &record(entries));
        let (numbers, problems) = read_table(&disk).unwrap();
        assert_eq!(numbers, expected);
        assert!(problems.len() == 1 && problems[0].contains("neither that nor its backup is sound"), "{problems:?}");
    }
}

#[test]
fn sectors_of_an_mbr_are_as_long_as_what_stands_there_says() {
    for sector_size in SECTOR_SIZES {
        let mut disk = Memory::new(8 << 20);
        disk.write(0, &record(&[(0x0c, 64, 1000)]));
        disk.write(64 * sector_size, &fat());
        let disk: Arc<dyn Disk> = Arc::new(disk);
        let table = read(&disk).unwrap().unwrap();
        assert_eq!(table.partitions[0].start, 64 * sector_size);
    }
    // With sectors of 4096 bytes it would reach past the end of the disk.
    let mut disk = Memory::new(8 << 20);
    disk.write(0, &record(&[(0x0c, 64, 2000)]));
    disk.write(64 * 4096, &fat());
    let disk: Arc<dyn Disk> = Arc::new(disk);
    assert_eq!(read(&disk).unwrap().unwrap().partitions[0].start, 64 * 512);
}

#[test]
fn partitions_over_each_other_are_named_and_shown() {
    let mut disk = Memory::new(8 << 20);
    let partitions = [(0x83, 100, 1000), (0x83, 200, 10), (0x83, 1100, 10), (0x83, 1099, 2)];
    disk.write(0, &record(&partitions));
    let (numbers, problems) = read_table(&disk).unwrap();
    assert_eq!(numbers, [1, 2, 3, 4]);
    let expected = [(1, 2), (1, 4), (4, 3)].map(|(a, b)| format!("partitions {a} and {b} lie over each other"));
    assert_eq!(problems, expected);
}
