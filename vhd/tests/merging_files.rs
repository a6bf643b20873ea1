//! Merges of chains of VHD files: shapes of files, what is refused, and how often a file is opened.

#[allow(dead_code, reason = "each test file uses its part of the module")]
mod builder;

use std::sync::{Arc, Mutex};

use builder::{BLOCK, Image, Kind, SECTOR, id, open};
use disk::Disk;
use storage::{FaultyStorage, MemoryStorage, ObjectPath, Operation, Storage, WritableStorage};
use vhd::{Control, ErrorKind, Filter, Format, Merge, Outcome};

fn path(text: &str) -> ObjectPath {
    ObjectPath::new(text).unwrap()
}

fn run(merge: &mut Merge) -> vhd::Result<()> {
    let outcome = merge.run(&Control { threads: 3, barrier: &|| Ok(()), moved: &|_| {}, is_stopped: &|| false })?;
    assert_eq!(outcome, Outcome::Merged);
    merge.forget()
}

fn merge(storage: &Arc<dyn WritableStorage>, names: &[&str]) -> vhd::Result<()> {
    let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
    run(&mut Merge::new(storage, &ObjectPath::root(), &names)?)
}

/// Disk `number` of `blocks` blocks, built on the one before it, with a byte for each block it holds.
fn image(number: u128, blocks: usize, held: &[(u32, u8)]) -> Image {
    let image = Image::new(number, (blocks * BLOCK) as u64, held);
    if number == 1 { image } else { image.child_of(number - 1, &format!("{}.vhd", number - 1)) }
}

fn put(images: &[Image]) -> Arc<MemoryStorage> {
    let memory = Arc::new(MemoryStorage::new());
    for (number, image) in (1..).zip(images) {
        image.put(&memory, &number.to_string());
    }
    memory
}

/// The first byte of each block of a disk, each of which holds one byte all over.
fn bytes(memory: &Arc<MemoryStorage>, name: &str) -> Vec<u8> {
    let disk = open(memory, name).unwrap();
    let mut bytes = vec![0; usize::try_from(disk.size()).unwrap()];
    disk.read_at(0, &mut bytes).unwrap();
    let is_even = |block: &[u8]| block.iter().all(|byte| *byte == block[0]);
    bytes.chunks(BLOCK).map(|block| if is_even(block) { block[0] } else { 0xee }).collect()
}

fn stored(memory: &MemoryStorage, name: &str) -> Vec<u8> {
    memory.read(&path(name), 1 << 30).unwrap()
}

fn names(memory: &MemoryStorage) -> Vec<String> {
    memory.list(&ObjectPath::root()).unwrap().into_iter().map(|entry| entry.name).collect()
}

#[test]
fn blocks_that_the_base_has_are_replaced_and_others_follow_its_own() {
    let memory =
        put(&[image(1, 4, &[(2, 12), (0, 10)]), image(2, 4, &[(0, 20), (1, 21)]), image(3, 4, &[(2, 32), (0, 30)])]);
    let before = stored(&memory, "1.vhd").len();
    let storage: Arc<dyn WritableStorage> = memory.clone();
    merge(&storage, &["1.vhd", "2.vhd", "3.vhd"]).unwrap();
    assert_eq!(names(&memory), ["3.vhd"]);
    assert_eq!(bytes(&memory, "3.vhd"), [30, 21, 32, 0]);
    let after = stored(&memory, "3.vhd");
    assert_eq!(after.len(), before + SECTOR + BLOCK, "only block 1 is new");
    assert_eq!(after[..SECTOR], after[after.len() - SECTOR..], "both footers are alike, as XO expects them");
    let leaf = open(&memory, "3.vhd").unwrap().leaf();
    assert_eq!((leaf.uuid, leaf.parent_uuid), (id(3), None));
}

#[test]
fn what_lies_between_the_last_block_and_the_footer_is_cut_off() {
    for appended in [0, 1] {
        let memory = put(&[image(1, 4, &[(0, 10)]), image(2, 4, &[(appended, 20)])]);
        let mut file = stored(&memory, "1.vhd");
        let end = file.len() - SECTOR;
        file.splice(end..end, [0xdd; 2 * (SECTOR + BLOCK)]);
        memory.put("1.vhd", file).unwrap();
        let storage: Arc<dyn WritableStorage> = memory.clone();
        merge(&storage, &["1.vhd", "2.vhd"]).unwrap();
        let merged = stored(&memory, "2.vhd");
        assert_eq!(merged.len(), end + appended as usize * (SECTOR + BLOCK) + SECTOR, "{appended} appended");
        assert_eq!(merged[..SECTOR], merged[merged.len() - SECTOR..], "both footers are alike, as XO expects them");
    }
}

#[test]
fn a_table_that_is_exactly_full_gets_room_and_one_with_room_stays_where_it_is() {
    // A sector has 128 entries.
    for (first, second, is_moved) in [(128, 129, true), (128, 300, true), (127, 128, false), (128, 128, false)] {
        let last = u32::try_from(second - 1).unwrap();
        let memory = put(&[image(1, first, &[(127.min(last - 1), 1), (0, 2)]), image(2, second, &[(last, 3), (5, 4)])]);
        let inode = memory.stat(&path("1.vhd")).unwrap().inode;
        let mut expected = bytes(&memory, "2.vhd");
        let storage: Arc<dyn WritableStorage> = memory.clone();
        merge(&storage, &["1.vhd", "2.vhd"]).unwrap();
        assert_eq!(bytes(&memory, "2.vhd"), expected, "{first} to {second}");
        assert_eq!(memory.stat(&path("2.vhd")).unwrap().inode != inode, is_moved, "{first} to {second}");
        assert_eq!(names(&memory), ["2.vhd"]);
        // And once more, into what was written.
        expected[1] = 7;
        image(3, second, &[(1, 7)]).put(&memory, "3");
        merge(&storage, &["2.vhd", "3.vhd"]).unwrap();
        assert_eq!(bytes(&memory, "3.vhd"), expected, "{first} to {second}");
    }
}

#[test]
fn chains_in_one_folder_are_merged_one_after_the_other() {
    let held: Vec<[(u32, u8); 2]> = (1..=6).map(|number| [(0, number), (u32::from(number), number + 10)]).collect();
    let images: Vec<Image> = (1..).zip(&held).map(|(number, held)| image(number, 8, held)).collect();
    let memory = put(&images);
    let (third, last) = (bytes(&memory, "3.vhd"), bytes(&memory, "6.vhd"));
    let storage: Arc<dyn WritableStorage> = memory.clone();
    let is_kept = |name: &ObjectPath| ["3.vhd", "6.vhd"].contains(&name.file_name());
    let lineage = Merge::lineage(&storage.clone().reader(), &ObjectPath::root(), is_kept).unwrap();
    assert_eq!(lineage.chains, [["1.vhd", "2.vhd", "3.vhd"], ["4.vhd", "5.vhd", "6.vhd"]]);
    for chain in &lineage.chains {
        run(&mut Merge::new(&storage, &ObjectPath::root(), chain).unwrap()).unwrap();
        assert_eq!((bytes(&memory, "3.vhd"), bytes(&memory, "6.vhd")), (third.clone(), last.clone()));
    }
    assert_eq!(names(&memory), ["3.vhd", "6.vhd"]);
    assert_eq!(open(&memory, "6.vhd").unwrap().leaf().parent_uuid, Some(id(3)));
}

/// XO's state of a merge of disk 1 and 2.
fn put_state(memory: &MemoryStorage, step: &str) {
    let state = format!(
        r#"{{"child":{{"uuid":"{}"}},"parent":{{"uuid":"{}"}},"chain":["1.vhd","2.vhd"],"currentBlock":0,
           "mergedDataSize":0,"step":"{step}","diskSize":0}}"#,
        id(2),
        id(1)
    );
    memory.put(".1.vhd.merge.json", state).unwrap();
}

fn resume(memory: &Arc<MemoryStorage>) -> vhd::Result<()> {
    let storage: Arc<dyn WritableStorage> = memory.clone();
    run(&mut Merge::resume(&storage, &path(".1.vhd.merge.json"))?)
}

#[test]
fn a_merge_that_xen_orchestra_left_is_finished_whatever_its_table_says() {
    let expected = [1, 22, 3, 0, 25, 26];
    let base = image(1, 4, &[(0, 1), (2, 3)]);
    let child = image(2, 6, &[(1, 22), (4, 25), (5, 26)]);
    let grown = |memory: &MemoryStorage, entries: &[(usize, u32)]| {
        // Its header counts the new entries, which hold what lay there; its last footer is written over.
        let mut file = base.flat();
        file[SECTOR..3 * SECTOR].copy_from_slice(&image(1, 6, &[]).header());
        file[1536 + 4 * 4..1536 + 6 * 4].fill(0x55);
        for (block, sector) in entries {
            file[1536 + block * 4..][..4].copy_from_slice(&sector.to_be_bytes());
        }
        file.truncate(file.len() - SECTOR);
        memory.put("1.vhd", file).unwrap();
    };
    let end = u32::try_from((base.flat().len() - SECTOR) / SECTOR).unwrap();
    // Block 1 has an entry and no data yet.
    for entries in [&[][..], &[(1, end)], &[(1, end), (4, end + 9)]] {
        let memory = put(&[image(1, 4, &[]), image(2, 6, &[(1, 22), (4, 25), (5, 26)])]);
        grown(&memory, entries);
        put_state(&memory, "mergeBlocks");
        assert_eq!(bytes(&memory, "2.vhd"), expected, "{entries:?}");
        resume(&memory).unwrap();
        assert_eq!(bytes(&memory, "2.vhd"), expected, "{entries:?}");
        assert_eq!(names(&memory), ["2.vhd"]);
    }
    // All is in the base, but it has neither the target's name nor a last footer.
    let memory = put(&[]);
    let merged = Image { uuid: child.uuid, ..image(1, 6, &[(0, 1), (1, 22), (2, 3), (4, 25), (5, 26)]) }.flat();
    memory.put("1.vhd", &merged[..merged.len() - SECTOR]).unwrap();
    put_state(&memory, "cleanup");
    resume(&memory).unwrap();
    assert_eq!((names(&memory), bytes(&memory, "2.vhd")), (vec!["2.vhd".to_owned()], expected.to_vec()));
    assert!(stored(&memory, "2.vhd") == merged, "its last footer is there again");
    // It is said to be, but is not.
    let memory = put(&[base]);
    put_state(&memory, "cleanup");
    assert_eq!(resume(&memory).unwrap_err().kind(), ErrorKind::Damaged);
    assert_eq!(names(&memory), [".1.vhd.merge.json", "1.vhd"]);
}

#[test]
fn what_cannot_be_merged_is_left_as_it_is() {
    let whole = || [image(1, 2, &[(0, 1)]), image(2, 2, &[(1, 2)])];
    let cut = |file: Vec<u8>, by: usize| file[..file.len() - by].to_vec();
    let damaged = |mut file: Vec<u8>| {
        file[70] ^= 1;
        file
    };
    let [base, child] = whole();
    let cases = [
        ("a block of the base is cut off", "1.vhd", cut(base.flat(), SECTOR + 1), ErrorKind::Damaged, "cut off"),
        ("a block of the child is cut off", "2.vhd", cut(child.flat(), SECTOR + 1), ErrorKind::Damaged, "cut off"),
        ("the first footer is damaged", "1.vhd", damaged(base.flat()), ErrorKind::Damaged, "first footer"),
        (
            "blocks of another size",
            "2.vhd",
            Image { block: 2 * BLOCK, blocks: Vec::new(), ..image(2, 2, &[]) }.flat(),
            ErrorKind::Damaged,
            "blocks of 4096 bytes as its parent has were expected",
        ),
    ];
    for (what, name, bytes, kind, reason) in cases {
        let memory = put(&whole());
        memory.put(name, bytes).unwrap();
        let before = (stored(&memory, "1.vhd"), stored(&memory, "2.vhd"));
        let storage: Arc<dyn WritableStorage> = memory.clone();
        let error = merge(&storage, &["1.vhd", "2.vhd"]).unwrap_err();
        assert_eq!(error.kind(), kind, "{what}: {error}");
        assert!(error.to_string().contains(reason), "{what}: {error}");
        assert!((stored(&memory, "1.vhd"), stored(&memory, "2.vhd")) == before, "{what}");
    }
}

#[test]
fn what_is_stored_in_different_ways_becomes_what_the_youngest_is() {
    let kinds = [Kind::Flat, Kind::Plain, Kind::Gzip];
    for (base, child) in kinds.iter().flat_map(|base| kinds.iter().map(move |child| (*base, *child))) {
        let name = |number: u32, kind| format!("{number}.{}", if kind == Kind::Flat { "vhd" } else { "alias.vhd" });
        let memory = put(&[]);
        image(1, 3, &[(0, 1), (1, 1)]).stored(base).put(&memory, "1");
        let mut younger = image(2, 3, &[(1, 2), (2, 2)]).stored(child);
        younger.parent = Some((image(1, 3, &[]).uuid, name(1, base)));
        younger.put(&memory, "2");
        let storage: Arc<dyn WritableStorage> = memory.clone();
        merge(&storage, &[&name(1, base), &name(2, child)]).unwrap();
        let truth = [[1; BLOCK], [2; BLOCK], [2; BLOCK]].concat();
        let disk = open(&memory, &name(2, child)).unwrap();
        let mut read = vec![0; truth.len()];
        disk.read_at(0, &mut read).unwrap();
        let layers = disk.layers().unwrap();
        let format = match child {
            Kind::Flat => Format::File,
            Kind::Plain => Format::Exploded(Filter::None),
            _ => Format::Exploded(Filter::Gzip),
        };
        let found: Vec<_> = layers.iter().map(|layer| (layer.format, layer.uuid, layer.parent_uuid)).collect();
        assert!(read == truth, "{base:?}, {child:?}");
        assert_eq!(found, [(format, younger.uuid, None)], "{base:?}, {child:?}");
        let left: Vec<_> =
            names(&memory).into_iter().filter(|name| name != "data" && !name.ends_with(".xofs-digests")).collect();
        assert_eq!(left, [name(2, child)], "{base:?}, {child:?}");
    }
}

/// Merges three disks of a folder; returns all that the storage was asked, in order, but for reading and writing of open files.
fn asked(images: &[Image]) -> Vec<(Operation, String)> {
    let faulty = FaultyStorage::new(put(images));
    let asked: Arc<Mutex<Vec<_>>> = Arc::default();
    let seen = asked.clone();
    faulty.set_rule(move |operation, path| {
        // This is what more blocks need.
        if !matches!(operation, Operation::ReadAt | Operation::WriteAt) {
            seen.lock().unwrap().push((operation, path.to_string()));
        }
        None
    });
    let storage: Arc<dyn WritableStorage> = Arc::new(faulty);
    merge(&storage, &["1.vhd", "2.vhd", "3.vhd"]).unwrap();
    let asked = asked.lock().unwrap();
    asked.clone()
}

#[test]
fn no_file_is_opened_or_asked_for_more_often_for_more_blocks() {
    let asked_for = |count: u32| {
        // A part of them replaces the base's own; the disk grows past a sector of its table.
        let own: Vec<(u32, u8)> = (0..count / 2).map(|block| (block, 1)).collect();
        let held: Vec<(u32, u8)> = (0..count).map(|block| (block, 2)).collect();
        asked(&[image(1, 100, &own), image(2, 200, &held[..held.len() / 2]), image(3, 200, &held)])
    };
    let few = asked_for(4);
    assert_eq!(few, asked_for(90));
    let to_write = |name: &str| few.iter().filter(|asked| **asked == (Operation::OpenToWrite, name.to_owned())).count();
    assert_eq!([to_write("1.vhd"), to_write("2.vhd")], [1, 0], "children are only read");
}

#[test]
fn a_merge_asks_for_what_it_needs_and_in_this_order() {
    use Operation::{List, Open, OpenToWrite, Remove, Rename, Room, Stat, StatOpen, Sync, Write};
    // What it holds.
    let mut expected = vec![(List, ".")];
    for name in ["1.vhd", "2.vhd", "3.vhd"] {
        expected.extend([(Open, name), (StatOpen, name)]);
    }
    // Whether one is immutable, another is built on one of them, and there is room.
    expected.extend([(Stat, "."), (Stat, "1.vhd"), (Stat, "2.vhd"), (Stat, "3.vhd")]);
    expected.extend([(Open, "4.vhd"), (StatOpen, "4.vhd"), (Room, ".")]);
    // Step 0, and what is known of the blocks.
    expected.extend([(Sync, "."), (Sync, "2.vhd"), (Sync, "3.vhd")]);
    expected.extend([(Open, ".1.vhd.xofs-digests"), (Open, ".2.vhd.xofs-digests"), (Open, ".3.vhd.xofs-digests")]);
    // Step 1.
    let unpublished = "..1.vhd.merge.json.xofs-new";
    expected.extend([(Write, unpublished), (Sync, unpublished), (Rename, unpublished), (Sync, ".")]);
    // Steps 2 to 4: the blocks are durable before the table, and that before the footer.
    expected.extend([(OpenToWrite, "1.vhd"), (Sync, "1.vhd"), (Sync, "1.vhd"), (Sync, "1.vhd")]);
    // Step 5.
    expected.extend([(Rename, "1.vhd"), (Sync, ".")]);
    // Step 6.
    expected.extend([(List, "."), (Remove, "2.vhd"), (Sync, "."), (List, "3.vhd")]);
    // Step 7.
    expected.extend([(Remove, ".1.vhd.merge.json"), (Sync, ".")]);
    let images = [image(1, 4, &[(0, 1)]), image(2, 4, &[(0, 2), (1, 2)]), image(3, 4, &[(2, 3)]), image(4, 4, &[])];
    let asked = asked(&images);
    assert_eq!(asked.iter().map(|(operation, path)| (*operation, path.as_str())).collect::<Vec<_>>(), expected);
}
