use fs_ext4::checksum::linux_crc32c;

use super::*;
use crate::memory::Memory;

/// Bytes of a chunk of the snapshots here.
const CHUNK: u64 = 4096;

/// Where an extent starts, its length, the member it lies on, and where.
type Shown = (u64, u64, u16, u64);

fn shown(layer: Layer, size: u64, members: &[Memory]) -> Result<Vec<Shown>> {
    let members = members.iter().map(|member| Arc::new(member.clone()) as Arc<dyn Disk>).collect();
    let guest = layer.open(size, members)?;
    let Extents { found, until } = guest.extents(Layer::VOLUME, 0, 1000)?;
    assert!(until >= size, "{until}");
    let shown = found.into_iter().map(|extent| match extent.source {
        Source::Member(member, place) => (extent.start, extent.len, member, place),
        other => panic!("{other:?}"),
    });
    Ok(shown.collect())
}

/// A store of 1000 chunks: its header, and exceptions in its first area.
fn store(header: [u32; 4], exceptions: &[(u64, u64)]) -> Memory {
    let mut store = Memory::new(1000 * CHUNK);
    store.write(0, &header.map(u32::to_le_bytes).concat());
    let exceptions: Vec<u8> =
        exceptions.iter().flat_map(|(old, new)| [*old, *new]).flat_map(u64::to_le_bytes).collect();
    store.write(CHUNK, &exceptions);
    store
}

const HEADER: [u32; 4] = [0x7041_6e53, 1, 1, 8];

#[test]
fn a_snapshot_is_its_exceptions_in_the_origin() {
    let origin = Memory::new(100 * CHUNK);
    let store = store(HEADER, &[(7, 3), (2, 2), (8, 4), (99, 9), (200, 10)]);
    let expected = [
        (0, 2 * CHUNK, 1, 0),
        (2 * CHUNK, CHUNK, 0, 2 * CHUNK),
        (3 * CHUNK, 4 * CHUNK, 1, 3 * CHUNK),
        (7 * CHUNK, 2 * CHUNK, 0, 3 * CHUNK),
        (9 * CHUNK, 90 * CHUNK, 1, 9 * CHUNK),
        (99 * CHUNK, 100, 0, 9 * CHUNK),
    ];
    assert_eq!(shown(Layer::Snapshot, 99 * CHUNK + 100, &[store, origin.clone()]).unwrap(), expected);
    let new = Memory::new(100 * CHUNK);
    assert_eq!(shown(Layer::Snapshot, 5000, &[new, origin]).unwrap(), [(0, 5000, 1, 0)], "it was just made");
}

#[test]
fn exceptions_go_on_in_the_next_area_until_the_store_is_full() {
    let first: Vec<_> = (0..256).map(|chunk| (chunk, chunk + 2)).collect();
    let mut store = store(HEADER, &first);
    store.write((1 + 257) * CHUNK, &[500_u64.to_le_bytes(), 300_u64.to_le_bytes()].concat());
    let origin = Memory::new(1000 * CHUNK);
    let found = shown(Layer::Snapshot, 501 * CHUNK, &[store.clone(), origin.clone()]).unwrap();
    assert_eq!(found.last(), Some(&(500 * CHUNK, CHUNK, 0, 300 * CHUNK)));
    store.resize(258 * CHUNK);
    let found = shown(Layer::Snapshot, 501 * CHUNK, &[store, origin]).unwrap();
    assert_eq!(found, [(0, 256 * CHUNK, 0, 2 * CHUNK), (256 * CHUNK, 245 * CHUNK, 1, 256 * CHUNK)]);
}

#[test]
fn a_snapshot_that_is_invalid_or_damaged_is_refused() {
    let [magic, valid, version, sectors] = HEADER;
    type Case = ([u32; 4], &'static [(u64, u64)], &'static str);
    let cases: [Case; 7] = [
        ([magic, 0, version, sectors], &[], "the snapshot is invalid: it ran out of room, and what it held is lost"),
        ([7, valid, version, sectors], &[], "the store of the snapshot is damaged"),
        ([magic, valid, 2, sectors], &[], "a snapshot of another version, which this version does not read"),
        ([magic, valid, version, 7], &[], "the store of the snapshot is damaged"),
        ([magic, valid, version, u32::MAX], &[], "the store of the snapshot is damaged"),
        (HEADER, &[(1, 2), (1, 3)], "its chunk 1 is in two places"),
        (HEADER, &[(1, 1000)], "chunk 1 of it lies past the end of the snapshot's store"),
    ];
    for (header, exceptions, expected) in cases {
        let error = shown(Layer::Snapshot, CHUNK, &[store(header, exceptions), Memory::new(CHUNK)]).unwrap_err();
        assert_eq!(error.to_string(), expected);
    }
}

fn with_checksum(mut block: Vec<u8>, salt: u32) -> Vec<u8> {
    block.resize(4096, 0);
    let sum = linux_crc32c(u32::MAX, &block[4..]) ^ salt;
    block[..4].copy_from_slice(&sum.to_le_bytes());
    block
}

/// A node of a tree: its number, whether it is a leaf, entries with values of as many numbers.
fn node(number: u64, is_leaf: bool, entries: &[(u64, &[u64])]) -> Vec<u8> {
    const MOST: u32 = 126;
    let mut block = vec![0; 4096];
    let size = entries.first().map_or(1, |(_, value)| value.len()) * 8;
    let header =
        [1 + u32::from(is_leaf), 0, 0, u32::try_from(entries.len()).unwrap(), MOST, u32::try_from(size).unwrap()];
    block[4..28].copy_from_slice(&header.map(u32::to_le_bytes).concat());
    block[8..16].copy_from_slice(&number.to_le_bytes());
    for (index, (key, value)) in entries.iter().enumerate() {
        block[32 + 8 * index..][..8].copy_from_slice(&key.to_le_bytes());
        let value: Vec<u8> = value.iter().flat_map(|number| number.to_le_bytes()).collect();
        block[32 + 8 * 126 + size * index..][..size].copy_from_slice(&value);
    }
    with_checksum(block, 121_107)
}

/// Metadata of a pool of 100 chunks: blocks 1 to 3 are the tree of devices, what is known of them, and the root of device 5.
fn pool(flags: u32, blocks: &[(u64, Vec<u8>)]) -> Memory {
    let mut superblock = vec![0; 4096];
    superblock[4..8].copy_from_slice(&flags.to_le_bytes());
    for (at, number) in [(32, 27_022_010), (64, 100), (320, 1_u64), (328, 2)] {
        superblock[at..at + 8].copy_from_slice(&number.to_le_bytes());
    }
    for (at, number) in [(40, 2_u32), (336, 128), (340, 8)] {
        superblock[at..at + 4].copy_from_slice(&number.to_le_bytes());
    }
    let mut metadata = Memory::new(1 << 20);
    metadata.write(0, &with_checksum(superblock, 160_774));
    metadata.write(4096, &node(1, true, &[(5, &[3])]));
    metadata.write(8192, &node(2, true, &[(5, &[9, 0, 0])]));
    blocks.iter().for_each(|(number, bytes)| metadata.write(number * 4096, bytes));
    metadata
}

const THIN: u64 = 65536;

fn thin(device: u32, blocks: &[(u64, Vec<u8>)]) -> Result<Vec<Shown>> {
    shown(Layer::Thin { device }, 10 * THIN, &[pool(0, blocks), Memory::new(100 * THIN)])
}

#[test]
fn chunks_of_a_thin_volume_are_found_in_the_tree_of_its_device() {
    let at = |place: u64| place << 24 | 77;
    let blocks = [
        (3, node(3, false, &[(0, &[7]), (4, &[6])])),
        (7, node(7, false, &[(0, &[4]), (3, &[8])])),
        (4, node(4, true, &[(1, &[at(50)]), (2, &[at(51)])])),
        (8, node(8, true, &[(3, &[at(53)])])),
        (6, node(6, true, &[(4, &[at(9)]), (30, &[at(10)])])),
    ];
    assert_eq!(
        thin(5, &blocks).unwrap(),
        [(THIN, 2 * THIN, 1, 50 * THIN), (3 * THIN, THIN, 1, 53 * THIN), (4 * THIN, THIN, 1, 9 * THIN)]
    );
    assert_eq!(thin(6, &blocks).unwrap_err().kind(), ErrorKind::NotFound);
    let members = vec![Arc::new(pool(1, &blocks)) as Arc<dyn Disk>, Arc::new(Memory::new(100 * THIN))];
    let guest = Layer::Thin { device: 5 }.open(10 * THIN, members).unwrap();
    assert!(guest.facts().problems[0].contains("thin_check"), "{:?}", guest.facts());
    assert_eq!(guest.attributes(Layer::VOLUME).unwrap().allocated, 9 * THIN);
}

#[test]
fn a_thin_volume_whose_tree_cannot_be_is_damaged() {
    let leaf = |number, key| node(number, true, &[(key, &[1 << 24])]);
    type Case = (&'static str, Vec<(u64, Vec<u8>)>);
    let cases: [Case; 9] = [
        ("a node leads to itself", vec![(3, node(3, false, &[(0, &[3])]))]),
        ("two lead to each other", vec![(3, node(3, false, &[(0, &[4])])), (4, node(4, false, &[(0, &[3])]))]),
        ("keys are out of order", vec![(3, node(3, true, &[(2, &[1 << 24]), (1, &[2 << 24])]))]),
        ("a key is there twice", vec![(3, node(3, true, &[(2, &[1 << 24]), (2, &[2 << 24])]))]),
        (
            "a key belongs elsewhere",
            vec![(3, node(3, false, &[(0, &[4]), (4, &[6])])), (4, leaf(4, 4)), (6, leaf(6, 5))],
        ),
        ("a leaf is empty", vec![(3, node(3, false, &[(0, &[4])])), (4, node(4, true, &[]))]),
        ("past the metadata", vec![(3, node(3, false, &[(0, &[1 << 40])]))]),
        ("past the data", vec![(3, node(3, true, &[(0, &[100 << 24])]))]),
        ("another block", vec![(3, leaf(4, 0))]),
    ];
    for (what, blocks) in cases {
        assert_eq!(thin(5, &blocks).unwrap_err().kind(), ErrorKind::Damaged, "{what}");
    }
    let mut wrong = leaf(3, 0);
    wrong[40] ^= 1;
    let error = thin(5, &[(3, wrong)]).unwrap_err();
    assert_eq!(error.to_string(), "block 3 of its metadata has a wrong checksum");
}
