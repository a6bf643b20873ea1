use super::*;
use crate::memory::Memory;
use crate::table::tests::{Made, fat, record};

fn surveyed(disks: Vec<(&str, Memory)>) -> Survey {
    let disks: Vec<_> =
        disks.into_iter().map(|(name, disk)| (name.to_owned(), Arc::new(disk) as Arc<dyn Disk>)).collect();
    survey(&disks)
}

/// Name, size and content of each volume.
fn volumes(survey: &Survey) -> Vec<(&str, Option<u64>, Content)> {
    survey
        .volumes
        .iter()
        .map(|volume| (&*volume.name, volume.stack.as_ref().map(Stack::size), volume.content))
        .collect()
}

fn problem(volume: &Volume) -> String {
    volume.problem.as_ref().map(ToString::to_string).unwrap_or_default()
}

fn partitioned(entries: &[(u8, u32, u32)]) -> Memory {
    let mut disk = Memory::new(8 << 20);
    disk.write(0, &record(entries));
    disk
}

fn swap() -> Memory {
    let mut disk = Memory::new(1 << 20);
    disk.write(4086, b"SWAPSPACE2");
    disk
}

#[test]
fn partitions_and_whole_disks_are_volumes_under_the_names_that_linux_gives_them() {
    let mut first = partitioned(&[(0x0c, 64, 1000), (0, 0, 0), (0x42, 2000, 10)]);
    first.write(64 * 512, &fat());
    let second = partitioned(&[(0x83, 100, 200)]);
    let found = surveyed(vec![("xvda", first), ("nvme0n1", second), ("xvdb", swap()), ("xvdc", Memory::new(1 << 30))]);
    let expected = [
        ("xvda1", Some(1000 * 512), Content::Fat12),
        ("xvda3", Some(5120), Content::WindowsDynamicDisk),
        ("nvme0n1p1", Some(200 * 512), Content::Empty),
        ("xvdb", Some(1 << 20), Content::Swap),
    ];
    assert_eq!(volumes(&found), expected);
    assert_eq!(
        found.volumes[2].stack,
        Some(Map::of_range(Place { disk: 1, offset: 51200 }, 200 * 512).unwrap().into())
    );
    assert!(found.problems.is_empty() && found.volumes.iter().all(|volume| volume.problem.is_none()));
}

#[test]
fn an_iso_9660_with_partitions_to_start_from_is_a_volume_as_well() {
    let with = |offset: u64, sign: &[u8]| {
        let mut disk = partitioned(&[(0xcd, 1, 9000), (0xef, 10_000, 100)]);
        disk.write(10_000 * 512, &fat());
        disk.write(0x8001, b"CD001");
        disk.write(offset, sign);
        let found = surveyed(vec![("xvdd", disk)]);
        volumes(&found).into_iter().map(|(name, _, content)| (name.to_owned(), content)).collect::<Vec<_>>()
    };
    let volume = |name: &str, content| (name.to_owned(), content);
    let (first, second) = (volume("xvdd1", Content::Unknown), volume("xvdd2", Content::Fat12));
    assert_eq!(with(0x8001, b"CD001"), [first, second.clone(), volume("xvdd", Content::Iso9660)]);
    // It is the first partition, or was on the disk before.
    assert_eq!(with(0x8001 + 512, b"CD001"), [volume("xvdd1", Content::Iso9660), second.clone()]);
    assert_eq!(with(512, b"hsqs"), [volume("xvdd1", Content::Squashfs), second]);
}

#[test]
fn a_partition_is_shown_as_far_as_it_lies_on_the_disk() {
    let found = surveyed(vec![("xvda", partitioned(&[(0x83, 16_000, 385), (0x83, 16_384, 1), (0x83, 16_000, 384)]))]);
    let expected = [
        ("xvda1", Some(384 * 512), Content::Empty),
        ("xvda2", None, Content::Unread),
        ("xvda3", Some(384 * 512), Content::Empty),
    ];
    assert_eq!(volumes(&found), expected);
    let problems: Vec<_> = found.volumes.iter().map(problem).collect();
    assert_eq!(
        problems,
        [
            "its last 512 bytes are past the end of the disk: it is shown without them",
            "it starts past the end of the disk, at 8388608 of 8388608 bytes",
            "",
        ]
    );
}

#[test]
fn what_cannot_be_read_hides_nothing_else_and_may_be_asked_again() {
    let mut broken = Memory::new(1 << 20);
    broken.break_from(0);
    let mut half = partitioned(&[(0x0c, 64, 1000), (0x83, 8000, 1000)]);
    half.write(64 * 512, &fat());
    half.break_from(4 << 20);
    let found = surveyed(vec![("xvda", broken), ("xvdb", half), ("xvdc", swap())]);
    let expected = [
        ("xvdb1", Some(1000 * 512), Content::Fat12),
        ("xvdb2", Some(1000 * 512), Content::Unread),
        ("xvdc", Some(1 << 20), Content::Swap),
    ];
    assert_eq!(volumes(&found), expected);
    assert_eq!(found.problems, [Error::new(ErrorKind::Disk, "disk xvda: the storage did not answer")]);
    assert_eq!(problem(&found.volumes[1]), "the storage did not answer");
    assert!(found.has_unread() && !surveyed(vec![("xvdc", swap())]).has_unread());
}

#[test]
fn names_are_told_apart() {
    let disk = || partitioned(&[(0x83, 1, 1)]);
    let found = surveyed(vec![("a", disk()), ("a", disk()), ("a1", swap()), ("../b", swap()), ("", swap())]);
    let names: Vec<_> = found.volumes.iter().map(|volume| &*volume.name).collect();
    assert_eq!(names, ["a1", "a1~2", "a1~3", ".._b", "_"]);
}

#[test]
fn more_disks_and_volumes_than_are_shown_are_said() {
    let mut full = partitioned(&[(0x05, 1, 10_000), (0x83, 1, 1), (0x83, 1, 1), (0x83, 1, 1)]);
    for index in 0..200 {
        full.write((1 + u64::from(index)) * 512, &record(&[(0x83, 1, 1), (0x05, index + 1, 1)]));
    }
    let disks: Vec<_> = (0..66).map(|_| ("xvda", full.clone())).collect();
    let found = surveyed(disks);
    assert_eq!(found.volumes.len(), 1024);
    let said: Vec<_> = found.problems.iter().filter(|problem| problem.kind() == ErrorKind::TooMuch).collect();
    assert_eq!(
        said.iter().map(ToString::to_string).collect::<Vec<_>>(),
        ["only the first 64 disks are looked at", "there are more than 1024 volumes, the others are not shown",]
    );
}

#[test]
fn problems_are_bounded() {
    let mut disk = Memory::new(8 << 20);
    let all: Vec<_> = (0..1000).map(|slot| (slot, 100, 99)).collect();
    Made { count: 1024, ..Made::default() }.write(&mut disk, &all);
    let found = surveyed(vec![("xvda", disk)]);
    assert_eq!(found.problems.len(), 257);
    assert_eq!(
        found.problems[255].to_string(),
        "disk xvda: partition 256 ends at sector 99, but starts at 100: it is not shown"
    );
    assert_eq!(found.problems[256].to_string(), "there are more than these 256 problems");
}
