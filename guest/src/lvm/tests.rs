use std::collections::HashSet;

use super::label::tests::write;
use super::*;
use crate::ErrorKind;
use crate::map::{Place, Segment, SegmentSource, Stripes};
use crate::memory::Memory;
use crate::{Layer, Part};

const MIB: u64 = 1 << 20;

/// A physical volume is called after the letter that its UUID is made of.
fn uuid(letter: char) -> [u8; 32] {
    [u8::try_from(letter).unwrap(); 32]
}

/// A disk of 64 MiB that is a physical volume, with the metadata of its group.
pub(crate) fn pv(letter: char, text: &(impl AsRef<[u8]> + ?Sized)) -> Memory {
    let mut disk = Memory::new(64 * MIB);
    write(&mut disk, uuid(letter), (4096, MIB - 4096), 512, text.as_ref());
    disk
}

/// The metadata of a group vg-0 with extents of 1 MiB, of which each physical volume has 60 from 1 MiB on.
pub(crate) fn group(sequence: u32, letters: &str, volumes: &str) -> String {
    let physical = letters.chars().map(|letter| {
        let uuid = shown_uuid(uuid(letter));
        format!(
            "pv{letter} {{ id = \"{uuid}\" status = [\"ALLOCATABLE\"] flags = [] pe_start = 2048 pe_count = 60 }}\n"
        )
    });
    format!(
        "vg-0 {{ id = \"group\" seqno = {sequence} extent_size = 2048\n physical_volumes {{ {} }}\n \
         logical_volumes {{ {volumes} }} }}\ncontents = \"Text Format Volume Group\"\0",
        physical.collect::<String>()
    )
}

pub(crate) fn volume(name: &str, status: &str, segments: &[&str]) -> String {
    let segments = segments.iter().enumerate().map(|(index, segment)| format!("segment{index} {{ {segment} }}\n"));
    format!("{name} {{ status = [\"READ\", \"{status}\"]\n {} }}\n", segments.collect::<String>())
}

pub(crate) fn linear(start: u64, count: u64, area: &str, extent: u64) -> String {
    format!(
        "start_extent = {start} extent_count = {count} type = \"striped\" stripe_count = 1 stripes = [\"{area}\", {extent}]"
    )
}

/// Where the volumes lie, none of which has layers, and what is wrong.
struct Found {
    volumes: Vec<(String, Result<Map>)>,
    problems: Vec<Error>,
}

fn assembled(disks: &[Memory]) -> Found {
    let Assembled { volumes, problems } = stacked(disks);
    let map = |stack: Stack| stack.map().expect("it has no layers").clone();
    Found { volumes: volumes.into_iter().map(|(name, stack)| (name, stack.map(map))).collect(), problems }
}

fn stacked(disks: &[Memory]) -> Assembled {
    let maps = disks.iter().zip(0..).map(|(disk, index)| {
        let place = Place { disk: index, offset: 0 };
        (format!("xvd{}", ["a", "b", "c"][usize::from(index)]), Map::of_range(place, disk.size()).unwrap())
    });
    let shared: Vec<_> = disks.iter().map(|disk| Arc::new(disk.clone()) as Arc<dyn Disk>).collect();
    assemble(&maps.collect::<Vec<_>>(), &shared)
}

fn on(disk: u16, offset: u64, len: u64) -> Segment {
    Segment { len, source: SegmentSource::Disk(Place { disk, offset }) }
}

fn striped(stripe_size: u64, columns: &[(u16, u64)], len: u64) -> Segment {
    let columns = columns.iter().map(|&(disk, offset)| Place { disk, offset }).collect();
    Segment { len, source: SegmentSource::Striped(Stripes { stripe_size, columns, from: 0 }) }
}

/// The only volume of a group over the physical volumes a, b and c.
fn only(volumes: &str) -> Result<Map> {
    let text = group(1, "abc", volumes);
    let mut found = assembled(&[pv('a', &text), pv('b', &text), pv('c', &text)]);
    assert!(found.problems.is_empty(), "{:?}", found.problems);
    assert_eq!(found.volumes.len(), 1);
    found.volumes.remove(0).1
}

#[test]
fn segments_are_followed_to_the_disks() {
    let stripes = "start_extent = 5 extent_count = 6 type = \"striped\" stripe_count = 3 stripe_size = 128 \
                   stripes = [\"pva\", 10, \"pvc\", 20, \"pvb\", 30]";
    let zero = "start_extent = 11 extent_count = 2 type = \"zero\"";
    // In another order than that of the extents.
    let root = volume("root", "VISIBLE", &[stripes, zero, &linear(3, 2, "pvb", 0), &linear(0, 3, "pva", 2)]);
    let expected = vec![
        on(0, 3 * MIB, 3 * MIB),
        on(1, MIB, 2 * MIB),
        striped(65536, &[(0, 11 * MIB), (2, 21 * MIB), (1, 31 * MIB)], 6 * MIB),
        Segment { len: 2 * MIB, source: SegmentSource::Zeroes },
    ];
    assert_eq!(only(&root), Map::new(expected));
}

#[test]
fn names_are_those_of_the_device_mapper_and_parts_of_volumes_are_not_shown() {
    let segment = linear(0, 1, "pva", 0);
    let volumes = volume("my-root", "VISIBLE", &[&segment]) + &volume("lvol0_pmspare", "WRITE", &[&segment]);
    let found = assembled(&[pv('a', &group(1, "a", &volumes))]);
    let names: Vec<_> = found.volumes.iter().map(|(name, _)| &**name).collect();
    assert_eq!(names, ["vg--0-my--root"]);
}

#[test]
fn the_description_that_changed_last_is_believed_wherever_it_is() {
    let [old, new] = [(7, 1), (8, 2)]
        .map(|(sequence, count)| group(sequence, "ab", &volume("root", "VISIBLE", &[&linear(0, count, "pva", 0)])));
    for (first, second) in [(&old, &new), (&new, &old), (&String::new(), &new)] {
        let found = assembled(&[pv('a', first), pv('b', second)]);
        assert_eq!(found.volumes[0].1.as_ref().unwrap().size(), 2 * MIB);
        assert!(found.problems.is_empty());
    }
    let mut damaged = pv('b', &new);
    damaged.write(4096 + 600, b"x");
    let found = assembled(&[pv('a', &old), damaged]);
    assert_eq!(found.volumes[0].1.as_ref().unwrap().size(), MIB);
    assert_eq!(
        found.problems.iter().map(ToString::to_string).collect::<Vec<_>>(),
        ["LVM physical volume xvdb: the LVM metadata at byte 4096 has a wrong checksum"]
    );
}

#[test]
fn only_what_lies_on_a_physical_volume_that_is_not_here_is_missing() {
    let there = volume("there", "VISIBLE", &[&linear(0, 2, "pva", 0)]);
    let half = volume("half", "VISIBLE", &[&linear(0, 2, "pva", 2), &linear(2, 2, "pvb", 0)]);
    let found = assembled(&[pv('a', &group(1, "ab", &(there + &half)))]);
    assert_eq!(found.volumes[0].1.as_ref().unwrap().size(), 2 * MIB);
    let error = found.volumes[1].1.as_ref().unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotFound);
    assert_eq!(
        error.to_string(),
        "needs PV bbbbbb-bbbb-bbbb-bbbb-bbbb-bbbb-bbbbbb, which is on no disk of this backup"
    );

    let text = group(1, "ab", &volume("old", "VISIBLE", &[&linear(0, 2, "pvb", 0)])).replacen(
        "flags = []",
        "flags = [\"MISSING\"]",
        2,
    );
    let found = assembled(&[pv('a', &text), pv('b', &text)]);
    assert!(found.volumes[0].1.as_ref().unwrap_err().to_string().contains("counts as missing"));

    let mut short = pv('a', &group(1, "a", &volume("long", "VISIBLE", &[&linear(0, 60, "pva", 0)])));
    short.resize(50 * MIB);
    let error = assembled(&[short]).volumes.remove(0).1.unwrap_err();
    assert_eq!(error.to_string(), "needs more of PV aaaaaa-aaaa-aaaa-aaaa-aaaa-aaaa-aaaaaa than lies on its disk");
}

#[test]
fn of_two_physical_volumes_with_one_uuid_the_first_is_used() {
    let root = volume("root", "VISIBLE", &[&linear(0, 2, "pva", 0)]);
    let found = assembled(&[pv('a', &group(1, "a", &root)), pv('a', &group(9, "a", ""))]);
    assert_eq!(found.volumes[0].1, Map::of_range(Place { disk: 0, offset: MIB }, 2 * MIB));
    assert_eq!(
        found.problems[0].to_string(),
        "LVM physical volume xvdb: it is a copy of xvda, with the same UUID aaaaaa-aaaa-aaaa-aaaa-aaaa-aaaa-aaaaaa: only that one is used"
    );
}

#[test]
fn what_is_not_read_is_named_with_its_kind() {
    let segment = |kind: &str| format!("start_extent = 0 extent_count = 4 type = \"{kind}\"");
    for (kind, expected) in [
        ("raid6_zr", "an LVM volume of type raid6_zr, which this version does not read"),
        ("vdo", "an LVM volume of type vdo, which this version does not read"),
        ("writecache", "an LVM volume of type writecache, which this version does not read"),
    ] {
        let error = only(&volume("v", "VISIBLE", &[&segment(kind)])).unwrap_err();
        assert_eq!((error.kind(), error.to_string().as_str()), (ErrorKind::Unsupported, expected));
    }
}

/// The parts of each volume, or why it is not read.
type Parts = Vec<(String, Result<Vec<Part>>)>;

/// The parts of each volume of a group that has a volume of one extent for each name, after the given ones.
fn parts(names: &[&str], volumes: &str) -> (Parts, Vec<String>) {
    let mut all = volumes.to_owned();
    for (name, extent) in names.iter().zip(0..) {
        all += &volume(name, "WRITE", &[&linear(0, 1, "pva", extent)]);
    }
    let found = stacked(&[pv('a', &group(1, "a", &all))]);
    let parts = found.volumes.into_iter().map(|(name, stack)| (name, stack.map(Vec::from)));
    (parts.collect(), found.problems.iter().map(ToString::to_string).collect())
}

/// The extent of that number.
fn extent(number: u64) -> Part {
    Part::Map(Map::of_range(Place { disk: 0, offset: (number + 1) * MIB }, MIB).unwrap())
}

#[test]
fn a_thin_volume_is_a_layer_over_its_pool() {
    let segment = |kind: &str, more: &str| format!("start_extent = 0 extent_count = 9 type = \"{kind}\" {more}");
    let pool = volume("pool", "VISIBLE", &[&segment("thin-pool", "metadata = \"m\" pool = \"d\"")]);
    let thin = |more: &str| segment("thin", &format!("thin_pool = \"pool\" {more}"));
    let layer = |device, members: &[u16]| Part::Layer {
        layer: Layer::Thin { device },
        size: 9 * MIB,
        members: members.to_vec(),
    };
    let one = |more: &str| parts(&["m", "d", "o"], &(volume("v", "VISIBLE", &[&thin(more)]) + &pool)).0.remove(0).1;
    assert_eq!(one("device_id = 7").unwrap(), [extent(0), extent(1), layer(7, &[0, 1])]);
    let with_origin = one("device_id = 7 external_origin = \"o\"").unwrap();
    assert_eq!(with_origin, [extent(0), extent(1), extent(2), layer(7, &[0, 1, 2])]);
    for wrong in
        ["", "device_id = 4294967296", "device_id = 7 external_origin = \"v\"", "device_id = 7 external_origin = \"x\""]
    {
        assert!(one(wrong).is_err(), "{wrong}");
    }

    let snapshot = volume("s", "x", &[&thin("device_id = 8 merge = \"v\"")]);
    let (found, said) = parts(&["m", "d"], &(volume("v", "VISIBLE", &[&thin("device_id = 7")]) + &pool + &snapshot));
    assert_eq!(found, [("vg--0-v".to_owned(), Ok(vec![extent(0), extent(1), layer(8, &[0, 1])]))]);
    assert_eq!(said, ["LVM volume vg--0-v: a snapshot of it is being merged into it: it is shown as it will be then"]);
}

#[test]
fn a_snapshot_is_shown_under_the_name_of_its_store() {
    let segment = |store: &str| {
        format!(
            "start_extent = 0 extent_count = 1 type = \"snapshot\" chunk_size = 8 origin = \"root\" {store} = \"snap\""
        )
    };
    let root = volume("root", "VISIBLE", &[&linear(0, 1, "pva", 9)]);
    let layer = Part::Layer { layer: Layer::Snapshot, size: MIB, members: vec![0, 1] };
    let snapshot = vec![extent(0), extent(9), layer];
    let (found, said) = parts(&["snap"], &(root.clone() + &volume("snapshot0", "VISIBLE", &[&segment("cow_store")])));
    let expected = [("vg--0-root".to_owned(), Ok(vec![extent(9)])), ("vg--0-snap".to_owned(), Ok(snapshot.clone()))];
    assert_eq!((found, said.len()), (expected.to_vec(), 0));

    let (found, said) = parts(&["snap"], &(root + &volume("snapshot0", "x", &[&segment("merging_store")])));
    assert_eq!(found, [("vg--0-root".to_owned(), Ok(snapshot))]);
    assert_eq!(said.len(), 1);
}

#[test]
fn a_volume_with_a_cache_is_a_layer_over_cache_and_origin_unless_that_is_passed_through() {
    let segment = |kind: &str, more: &str| format!("start_extent = 0 extent_count = 1 type = \"{kind}\" {more}");
    let cached = |more: &str| {
        let more = format!("cache_pool = \"pool\" origin = \"o\" {more}");
        volume("v", "VISIBLE", &[&segment("cache+CACHE_USES_CACHEVOL", &more)])
    };
    let layer = Part::Layer { layer: Layer::Cache, size: MIB, members: vec![0, 1, 2] };
    for (mode, expected) in
        [("writeback", vec![extent(0), extent(1), extent(2), layer.clone()]), ("passthrough", vec![extent(2)])]
    {
        let mode = format!("cache_mode = \"{mode}\"");
        let pool = segment("cache-pool", &format!("metadata = \"m\" data = \"d\" {mode}"));
        let found = parts(&["m", "d", "o"], &(cached("") + &volume("pool", "x", &[&pool]))).0.remove(0).1;
        assert_eq!(found.unwrap(), expected, "{mode}");
    }
    let half =
        |number: u64| Part::Map(Map::of_range(Place { disk: 0, offset: MIB + number * MIB / 2 }, MIB / 2).unwrap());
    let within = "metadata_start = 0 metadata_len = 1024 data_start = 1024 data_len =";
    let found = parts(&["pool", "o"], &cached(&format!("{within} 1024"))).0.remove(0).1;
    assert_eq!(found.unwrap(), [half(0), half(1), extent(1), layer]);
    assert!(parts(&["pool", "o"], &cached(&format!("{within} 1025"))).0.remove(0).1.is_err());
}

#[test]
fn an_old_mirror_is_its_first_leg_that_is_here() {
    let mirror = "start_extent = 0 extent_count = 2 type = \"mirror\" mirror_count = 2 mirrors = [\"root_mimage_0\", 0, \"pva\", 5]";
    let root = volume("root", "VISIBLE", &[mirror]) + &volume("root_mimage_0", "WRITE", &[&linear(0, 2, "pvb", 7)]);
    let text = group(1, "ab", &root);
    let found = assembled(&[pv('a', &text), pv('b', &text)]);
    assert_eq!(found.volumes[0].1, Map::of_range(Place { disk: 1, offset: 8 * MIB }, 2 * MIB));
    let found = assembled(&[pv('a', &text)]);
    assert_eq!(found.volumes[0].1, Map::of_range(Place { disk: 0, offset: 6 * MIB }, 2 * MIB));
}

/// What dm-raid writes of a leg: events, failed legs, how far it was made anew.
type State = Option<(u64, u64, u64)>;

/// Legs of four extents on as many disks, their metadata in the extents 0, the data from 1 on; `None` for what was never
/// in use.
fn raid(kind: &str, states: &[State]) -> Vec<Memory> {
    let names: String = (0..states.len()).map(|leg| format!("\"r_rmeta_{leg}\", \"r_rimage_{leg}\",")).collect();
    let count = states.len();
    let segment = format!(
        "start_extent = 0 extent_count = 4 type = \"{kind}\" device_count = {count} stripe_size = 128 raids = [{names}]"
    );
    let mut volumes = volume("r", "VISIBLE", &[&segment]);
    for (leg, letter) in "abcd".chars().take(count).enumerate() {
        volumes += &volume(&format!("r_rmeta_{leg}"), "x", &[&linear(0, 1, &format!("pv{letter}"), 0)]);
        volumes += &volume(&format!("r_rimage_{leg}"), "x", &[&linear(0, 4, &format!("pv{letter}"), 1)]);
    }
    let text = group(1, &"abcd"[..count], &volumes);
    let disks = "abcd".chars().zip(states).map(|(letter, state)| {
        let mut disk = pv(letter, &text);
        if let Some((events, failed, recovered)) = state {
            disk.write(MIB, b"DmRd");
            for (at, number) in [(16, events), (24, failed), (32, recovered)] {
                disk.write(MIB + at, &number.to_le_bytes());
            }
        }
        disk
    });
    disks.collect()
}

#[test]
fn of_raid1_a_leg_is_used_that_is_known_to_be_complete() {
    const ALL: u64 = u64::MAX;
    let cases: [(&str, [State; 2], Option<u16>); 7] = [
        ("never in use", [None, None], Some(0)),
        ("both complete", [Some((5, 0, ALL)), Some((5, 0, ALL))], Some(0)),
        ("the first was left behind", [Some((4, 0, ALL)), Some((5, 0, ALL))], Some(1)),
        ("the first has failed", [Some((5, 1, ALL)), Some((5, 1, ALL))], Some(1)),
        ("the first is being made anew", [Some((5, 0, 100)), Some((5, 0, ALL))], Some(1)),
        ("the first was never written", [None, Some((5, 0, ALL))], Some(1)),
        ("none is complete", [Some((5, 2, 100)), Some((5, 2, ALL))], None),
    ];
    for (what, states, expected) in cases {
        let found = assembled(&raid("raid1", &states)).volumes.remove(0).1;
        let expected = expected.map(|disk| Map::of_range(Place { disk, offset: 2 * MIB }, 4 * MIB).unwrap());
        assert_eq!(found.ok(), expected, "{what}");
    }
    let second = raid("raid1", &[Some((5, 0, ALL)), Some((5, 0, ALL))]).remove(1);
    let found = assembled(&[second]).volumes.remove(0).1;
    assert_eq!(found, Map::of_range(Place { disk: 0, offset: 2 * MIB }, 4 * MIB));
}

#[test]
fn raid0_and_raid10_are_stripes_over_legs() {
    let found = assembled(&raid("raid0_meta", &[None, None])).volumes.remove(0).1;
    let expected = [striped(65536, &[(0, 2 * MIB), (1, 2 * MIB)], 4 * MIB)];
    assert_eq!(found.unwrap().segments(), expected);
    let found = assembled(&raid("raid10", &[None, None])).volumes.remove(0).1;
    assert_eq!(found.unwrap().segments(), [on(0, 2 * MIB, 4 * MIB)]);
    let found = assembled(&raid("raid10", &[None, None, None])).volumes.remove(0).1;
    assert_eq!(found.unwrap_err().kind(), ErrorKind::Unsupported);
}

#[test]
fn absurd_numbers_are_errors_of_the_volume_that_has_them() {
    let max = u64::MAX;
    let stripes = |count: u64, size: &str, areas: &str| {
        format!("start_extent = 0 extent_count = {count} type = \"striped\" {size} stripes = [{areas}]")
    };
    let two = "\"pva\", 0, \"pvb\", 0";
    let segments = [
        linear(0, max, "pva", 0),
        linear(0, 0, "pva", 0),
        linear(1, 1, "pva", 0),
        linear(0, 1, "pva", max),
        linear(0, 1, "pva", 60),
        linear(0, 61, "pva", 0),
        linear(0, 1 << 44, "pva", 0),
        linear(0, 1, "absent", 0),
        linear(0, 1, "v", 0),
        linear(0, 1, "../../etc", 0),
        stripes(1, "", ""),
        stripes(2, "stripe_count = 0", "\"pva\""),
        stripes(2, "stripe_size = 0", two),
        stripes(2, "", two),
        stripes(2, "stripe_size = 18446744073709551615", two),
        stripes(2, "stripe_size = 36028797018963968", two),
        stripes(2, "stripe_size = 100", two),
        stripes(1, "stripe_size = 2048", two),
        "start_extent = 0 extent_count = 1".to_owned(),
        "type = \"striped\"".to_owned(),
        "start_extent = 0 extent_count = 1 type = \"raid1\" device_count = 0 raids = []".to_owned(),
        "start_extent = 0 extent_count = 1 type = \"raid1\" device_count = 9 raids = [\"a\"]".to_owned(),
        "start_extent = 0 extent_count = 1 type = \"raid10\" device_count = 0 stripe_size = 1 raids = []".to_owned(),
        "start_extent = 0 extent_count = 18446744073709551615 type = \"zero\"".to_owned(),
        "start_extent = 0 extent_count = 18446744073709551615 type = \"zero\" } b { start_extent = 18446744073709551615 \
         extent_count = 1 type = \"zero\""
            .to_owned(),
    ];
    for segment in segments {
        let volumes = volume("v", "VISIBLE", &[&segment]) + &volume("good", "VISIBLE", &[&linear(0, 1, "pvb", 0)]);
        let text = group(1, "ab", &volumes);
        let found = assembled(&[pv('a', &text), pv('b', &text)]);
        assert_eq!(found.volumes.len(), 2, "{segment}: {:?}", found.problems);
        assert!(found.volumes[0].1.is_err(), "{segment}: {:?}", found.volumes[0].1);
        assert!(found.volumes[1].1.is_ok(), "{segment}");
    }
}

#[test]
fn groups_that_cannot_be_are_a_problem_of_their_physical_volume() {
    let good = group(1, "a", "");
    let texts = [
        "".to_owned() + "x",
        good.replace("extent_size = 2048", "extent_size = 0"),
        good.replace("extent_size = 2048", "extent_size = 18446744073709551615"),
        good.replace("seqno = 1", "seqno = -1"),
        good.replace("vg-0 {", "\"../vg\" {"),
        good.replace("pe_start = 2048", "pe_start = 18446744073709551615"),
        good.replace("aaaaaa-", "aaaaaaaa-"),
        "a {".repeat(100_000),
    ];
    for text in texts {
        let found = assembled(&[pv('a', &text)]);
        assert_eq!((found.volumes.len(), found.problems.len()), (0, 1), "{}", &text[..text.len().min(99)]);
    }
}

#[test]
fn volumes_that_are_parts_of_each_other_are_followed_for_a_bounded_time() {
    // Each is the one before a thousand times over.
    let mut volumes = volume("v0", "VISIBLE", &[&linear(0, 1, "pva", 0)]);
    for level in 1..8 {
        let areas: Vec<_> = (0..1000).map(|index| linear(index, 1, &format!("v{}", level - 1), 0)).collect();
        volumes += &volume(&format!("v{level}"), "VISIBLE", &areas.iter().map(|area| &**area).collect::<Vec<_>>());
    }
    // And some are made of each other, or of all extents of one in many pieces.
    volumes += &volume("x", "VISIBLE", &[&linear(0, 1, "y", 0)]);
    volumes += &volume("y", "VISIBLE", &[&linear(0, 1, "x", 0)]);
    let pieces: Vec<_> = (0..1000).map(|index| linear(index, 1, "pva", index % 2 * 2)).collect();
    volumes += &volume("pieces", "VISIBLE", &pieces.iter().map(|area| &**area).collect::<Vec<_>>());
    for index in 0..2000 {
        volumes += &volume(&format!("all{index}"), "VISIBLE", &[&linear(0, 1000, "pieces", 0)]);
    }
    let mut disk = Memory::new(64 * MIB);
    write(&mut disk, uuid('a'), (4096, 8 * MIB), 512, group(1, "a", &volumes).as_bytes());
    let start = std::time::Instant::now();
    let found = assembled(&[disk]);
    assert!(start.elapsed().as_secs() < 10, "{:?}", start.elapsed());
    assert_eq!(found.volumes.len(), 2011);
    let errors: HashSet<_> = found.volumes.iter().filter_map(|(_, map)| map.as_ref().err()).map(Error::kind).collect();
    assert_eq!(errors, HashSet::from([ErrorKind::Damaged, ErrorKind::TooMuch]));
}
