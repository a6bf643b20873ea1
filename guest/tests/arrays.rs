//! Arrays of md. The kernel that tests run on need not have md, so members are made by hand, and mdadm says whether it takes
//! them for what they are meant to be.

mod image;

use std::process::Command;

use disk::Disk;
use guest::{Content, ErrorKind, Mapped, survey};
use image::{Images, run};

const MIB: u64 = 1 << 20;
/// Members start their data here and have this much of it, in bytes.
const DATA: (u64, u64) = (MIB, 8 * MIB);
const CHUNK: u64 = 64 << 10;

/// What a member says. Sizes are in bytes.
#[derive(Clone)]
struct Member {
    /// 0 for 1.0, 1 for 1.1, 2 for 1.2; 90 for 0.90.
    version: u32,
    level: i32,
    layout: u32,
    members: u32,
    role: u16,
    events: u64,
    features: u32,
    data_size: u64,
    name: &'static str,
}

impl Member {
    fn new(level: i32, members: u32, role: u16) -> Self {
        let (layout, features) = if level == 10 { (0x102, 0) } else { (0, 0) };
        Self { version: 2, level, layout, members, role, events: 7, features, data_size: DATA.1, name: "host:0" }
    }

    fn bytes(&self, at: u64) -> Vec<u8> {
        if self.version == 90 {
            return self.old_bytes();
        }
        let mut bytes = vec![0; 256 + 128];
        let mut put = |at: usize, field: &[u8]| bytes[at..at + field.len()].copy_from_slice(field);
        let size = if self.level <= 0 { 0 } else { self.data_size / 512 };
        let start = if self.version == 0 { 0 } else { DATA.0 / 512 };
        put(0, &0xa92b_4efc_u32.to_le_bytes());
        put(4, &1_u32.to_le_bytes());
        put(8, &self.features.to_le_bytes());
        put(16, &[0xab; 16]);
        put(32, self.name.as_bytes());
        put(72, &self.level.to_le_bytes());
        put(76, &self.layout.to_le_bytes());
        put(80, &size.to_le_bytes());
        put(88, &u32::try_from(if self.level == 1 { 0 } else { CHUNK / 512 }).unwrap().to_le_bytes());
        put(92, &self.members.to_le_bytes());
        put(128, &start.to_le_bytes());
        put(136, &(self.data_size / 512).to_le_bytes());
        put(144, &(at / 512).to_le_bytes());
        put(160, &u32::from(self.role).to_le_bytes());
        put(168, &[u8::try_from(self.role).unwrap(); 16]);
        put(200, &self.events.to_le_bytes());
        put(208, &u64::MAX.to_le_bytes());
        put(220, &64_u32.to_le_bytes());
        for role in 0..64_u16 {
            let known = if u32::from(role) < self.members { role } else { 0xffff };
            put(256 + 2 * usize::from(role), &known.to_le_bytes());
        }
        with_checksum(bytes, 216)
    }

    fn old_bytes(&self) -> Vec<u8> {
        let mut words = vec![0_u32; 1024];
        let role = u32::from(self.role);
        words[0] = 0xa92b_4efc;
        words[2] = 90;
        words[5..7].copy_from_slice(&[0xabab_abab, 1_700_000_000]);
        words[7] = u32::from_le_bytes(self.level.to_le_bytes());
        words[8] = u32::try_from(self.data_size / 1024).unwrap();
        words[9..12].copy_from_slice(&[self.members, self.members, 0]);
        words[13..16].copy_from_slice(&[0xabab_abab; 3]);
        words[32..36].copy_from_slice(&[1_700_000_000, 1, self.members, self.members]);
        words[39] = u32::try_from(self.events).unwrap();
        words[64] = self.layout;
        words[65] = u32::try_from(CHUNK).unwrap();
        for index in 0..self.members {
            let at = 128 + 32 * usize::try_from(index).unwrap();
            words[at..at + 5].copy_from_slice(&[index, 8, 16 * index, index, 6]);
        }
        words[992..997].copy_from_slice(&[role, 8, 16 * role, role, 6]);
        with_checksum(words.iter().flat_map(|word| word.to_le_bytes()).collect(), 38 * 4)
    }

    /// Makes the image of the member, in which each chunk of data starts with a number.
    fn write(&self, images: &Images, name: &str, first: u64) {
        let size = DATA.0 + self.data_size.max(DATA.1) + MIB;
        images.sized(name, size);
        let at = match self.version {
            0 => (size - 8192) / 4096 * 4096,
            1 => 0,
            2 => 4096,
            _ => size / 65536 * 65536 - 65536,
        };
        images.write(name, at, &self.bytes(at));
        let start = if matches!(self.version, 0 | 90) { 0 } else { DATA.0 };
        for chunk in 0..self.data_size / CHUNK {
            images.write(name, start + chunk * CHUNK, &(first + chunk).to_le_bytes());
        }
    }
}

/// Makes the checksum at an offset of a superblock right.
fn with_checksum(mut bytes: Vec<u8>, at: usize) -> Vec<u8> {
    bytes[at..at + 4].fill(0);
    let sum: u64 = bytes.chunks(4).map(|word| u64::from(u32::from_le_bytes(word.try_into().unwrap()))).sum();
    let folded = u32::try_from(((sum & 0xffff_ffff) + (sum >> 32)) & 0xffff_ffff).unwrap();
    bytes[at..at + 4].copy_from_slice(&folded.to_le_bytes());
    bytes
}

/// Writes members, of which chunk n of member m is numbered 1000 m + n, and checks that mdadm agrees on what they are.
fn written(members: &[Member]) -> (Images, Vec<String>) {
    let images = Images::new();
    let names: Vec<String> = (0..members.len()).map(|index| format!("xvd{}", ["a", "b", "c", "d"][index])).collect();
    for ((index, member), name) in (0..).zip(members).zip(&names) {
        member.write(&images, name, index * 1000);
        let said = run(Command::new("mdadm").args(["--examine", name]).current_dir(images.path()));
        let level = if member.level < 0 { "linear".to_owned() } else { format!("raid{}", member.level) };
        for expected in ["- correct", &format!("Raid Level : {level}"), &format!("Raid Devices : {}", member.members)] {
            assert!(said.contains(expected), "{expected}: {said}");
        }
    }
    (images, names)
}

/// The numbers of the chunks of the only array, or why it is not there.
fn chunks(images: &Images, names: &[String], expected_name: &str) -> Result<Vec<u64>, (ErrorKind, String)> {
    let names: Vec<_> = names.iter().map(String::as_str).collect();
    let disks = images.disks(&names);
    let found = survey(&disks);
    assert_eq!(found.problems, []);
    let members = found.volumes.iter().filter(|volume| volume.content == Content::MdMember).count();
    assert_eq!((members, found.volumes.len()), (names.len(), names.len() + 1), "{found:?}");
    let array = found.volumes.last().unwrap();
    assert_eq!(array.name, expected_name);
    let Some(map) = array.stack.as_ref().and_then(guest::Stack::map).cloned() else {
        let problem = array.problem.as_ref().unwrap();
        return Err((problem.kind(), problem.to_string()));
    };
    let mapped = Mapped::new(map, disks.into_iter().map(|(_, disk)| disk).collect()).unwrap();
    let number = |chunk| {
        let mut number = [0; 8];
        mapped.read_at(chunk * CHUNK, &mut number).unwrap();
        u64::from_le_bytes(number)
    };
    Ok((0..mapped.size() / CHUNK).map(number).collect())
}

/// The chunks of data of a member.
const EACH: u64 = DATA.1 / CHUNK;

#[test]
fn arrays_of_every_version_are_assembled() {
    let striped: Vec<u64> = (0..EACH).flat_map(|chunk| [chunk, 1000 + chunk]).collect();
    let joined: Vec<u64> = (0..EACH).chain(1000..1000 + EACH).collect();
    let first: Vec<u64> = (0..EACH).collect();
    let pairs: Vec<u64> = (0..EACH).flat_map(|chunk| [chunk, 2000 + chunk]).collect();
    for version in [0, 1, 2, 90] {
        for (level, count, expected) in [(0, 2, &striped), (-1, 2, &joined), (1, 2, &first), (10, 4, &pairs)] {
            let member = |role| Member { version, ..Member::new(level, count, role) };
            let members: Vec<_> = (0..u16::try_from(count).unwrap()).map(member).collect();
            let (images, names) = written(&members);
            let found = chunks(&images, &names, "md0").unwrap();
            // Of 0.90 all that is before the superblock is data of arrays that are not mirrored.
            if version == 90 && level <= 0 {
                assert!(found.len() > expected.len() && found[..16] == expected[..16], "{level}");
            } else {
                assert_eq!(&found, expected, "{version} {level}");
            }
        }
    }
}

#[test]
fn of_a_mirror_the_member_that_changed_last_is_used() {
    let stale = Member { events: 3, ..Member::new(1, 2, 0) };
    let recovering = Member { features: 2, ..Member::new(1, 2, 0) };
    for first in [stale, recovering] {
        let (images, names) = written(&[first, Member::new(1, 2, 1)]);
        assert_eq!(chunks(&images, &names, "md0").unwrap()[..2], [1000, 1001]);
    }
    let (images, names) = written(&[Member::new(1, 2, 1)]);
    assert_eq!(chunks(&images, &names, "md0").unwrap()[..2], [0, 1], "one of two is enough");
}

#[test]
fn members_of_different_sizes_are_striped_in_zones() {
    let member = |role, data_size| Member { layout: 2, features: 0x1000, data_size, ..Member::new(0, 3, role) };
    let (images, names) = written(&[member(0, 8 * MIB), member(1, 2 * MIB), member(2, 4 * MIB)]);
    let zones = [
        (0..32).flat_map(|chunk| [chunk, 1000 + chunk, 2000 + chunk]).collect::<Vec<u64>>(),
        (32..64).flat_map(|chunk| [chunk, 2000 + chunk]).collect(),
        (64..128).collect(),
    ];
    assert_eq!(chunks(&images, &names, "md0").unwrap(), zones.concat());

    let old = |role, data_size| Member { layout: 0, features: 0, ..member(role, data_size) };
    let (images, names) = written(&[old(0, 8 * MIB), old(1, 2 * MIB), old(2, 4 * MIB)]);
    assert_eq!(chunks(&images, &names, "md0").unwrap_err().0, ErrorKind::Unsupported);
}

#[test]
fn what_cannot_be_assembled_is_named() {
    let named = |level, count, role| Member { name: "guest:my data", ..Member::new(level, count, role) };
    let cases = [
        (named(5, 3, 0), ErrorKind::Unsupported, "an md array of level 5"),
        (named(0, 3, 0), ErrorKind::NotFound, "needs member 1 of 3"),
        (named(10, 4, 3), ErrorKind::NotFound, "needs member 0 of 4"),
        (Member { features: 4, ..named(1, 2, 0) }, ErrorKind::Unsupported, "on its way to another shape"),
        (Member { layout: 0x201, ..named(10, 2, 0) }, ErrorKind::Unsupported, "level 10 with layout 0x201"),
    ];
    for (member, kind, text) in cases {
        let (images, names) = written(&[member]);
        let (found, said) = chunks(&images, &names, "md-my_data").unwrap_err();
        assert!(found == kind && said.contains(text), "{text}: {said}");
    }
}

#[test]
fn a_member_that_is_there_twice_and_one_that_is_damaged_are_said() {
    let (images, _) = written(&[Member::new(1, 2, 0), Member::new(1, 2, 0), Member::new(1, 2, 1)]);
    images.write("xvdc", 4096 + 50, b"x");
    let found = survey(&images.disks(&["xvda", "xvdb", "xvdc"]));
    let said: Vec<_> = found.problems.iter().map(ToString::to_string).collect();
    assert_eq!(
        said,
        ["md member xvdc: its superblock is damaged", "md array md0: xvdb is a copy of xvda: only that one is used",]
    );
    assert!(found.volumes.last().unwrap().stack.is_some());
}

#[test]
fn partitions_of_an_array_are_volumes() {
    let (images, names) = written(&[Member::new(1, 2, 0), Member::new(1, 2, 1)]);
    let mut record = vec![0; 512];
    record[446 + 4] = 0x83;
    record[446 + 8] = 64;
    record[446 + 13] = 1;
    record[510..].copy_from_slice(&[0x55, 0xaa]);
    images.write(&names[0], DATA.0, &record);
    let found = survey(&images.disks(&["xvda", "xvdb"]));
    let seen: Vec<_> =
        found.volumes.iter().map(|volume| (&*volume.name, volume.stack.as_ref().map(guest::Stack::size))).collect();
    assert_eq!(seen[2..], [("md0", Some(8 * MIB)), ("md0p1", Some(256 * 512))]);
}

#[test]
fn whatever_a_superblock_says_a_survey_ends_and_its_maps_can_be_read() {
    let mut state = 1;
    let mut random = move |end: u64| {
        state = u64::wrapping_mul(state, 6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) % end
    };
    let images = Images::new();
    let (mut whole, mut rounds) = (0, 0);
    for level in [-1, 0, 1, 10] {
        for version in [2, 90] {
            for role in 0..2 {
                Member { version, ..Member::new(level, 2, role) }.write(
                    &images,
                    ["xvda", "xvdb"][usize::from(role)],
                    0,
                );
            }
            for _ in 0..60 {
                rounds += 1;
                let member = Member { version, ..Member::new(level, 2, 0) };
                let (at, checksum) = if version == 2 { (4096, 216) } else { (DATA.0 + DATA.1 + MIB - 65536, 38 * 4) };
                let mut bytes = member.bytes(at);
                let fields = if version == 2 { 64 } else { 1024 };
                for _ in 0..=random(2) {
                    let field = usize::try_from(4 * random(fields)).unwrap();
                    let number = u32::try_from(random(1 << 32)).unwrap() >> random(32);
                    bytes[field..field + 4].copy_from_slice(&number.to_le_bytes());
                }
                images.write("xvda", at, &with_checksum(bytes.clone(), checksum));
                let disks = images.disks(&["xvda", "xvdb"]);
                let found = survey(&disks);
                for map in found.volumes.into_iter().filter_map(|volume| volume.stack?.map().cloned()) {
                    let mapped = Mapped::new(map, disks.iter().map(|(_, disk)| disk.clone()).collect()).unwrap();
                    mapped.read_at(mapped.size() - 1, &mut [0]).unwrap_or_else(|error| panic!("{error}: {bytes:?}"));
                    whole += 1;
                }
            }
        }
    }
    assert!(whole > 2 * rounds, "{whole} volumes in {rounds} rounds: too few to say anything");
}
