//! Chains of every kind against a flat array, whole and damaged, and while a merge changes them.

#[allow(dead_code, reason = "each test file uses its part of the module")]
mod builder;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use builder::{BLOCK, Image, Kind, Remote, SECTOR, context, gzip, id, open};
use disk::{Disk, ErrorKind};
use storage::{Fault, FaultyStorage, MemoryStorage, ObjectPath, Operation, Storage};
use vhd::{BlockCache, ChainDisk, Context, DiskType, Footer, Liveness};

fn read(disk: &ChainDisk, offset: u64, len: usize) -> disk::Result<Vec<u8>> {
    let mut bytes = vec![0xee; len];
    disk.read_at(offset, &mut bytes).map(|()| bytes)
}

fn whole(disk: &ChainDisk) -> Vec<u8> {
    read(disk, 0, usize::try_from(disk.size()).unwrap()).unwrap()
}

fn bytes(blocks: &[u8]) -> Vec<u8> {
    blocks.iter().flat_map(|byte| vec![*byte; BLOCK]).collect()
}

// Promise 2: "Zeroes are returned only where no layer of the chain holds the block, and beyond the virtual size of a layer"
#[test]
fn a_child_larger_than_its_parent_reads_zeroes_past_it() {
    let storage = Arc::new(MemoryStorage::new());
    // The parent's last block is stored whole; what stands in it past its size was never on its disk.
    Image::new(1, BLOCK as u64 + 512, &[(0, 1), (1, 2)]).put(&storage, "a");
    Image::new(2, 4 * BLOCK as u64, &[(3, 3)]).child_of(1, "a.vhd").put(&storage, "b");
    let mut expected = bytes(&[1, 2, 0, 3]);
    expected[BLOCK + 512..2 * BLOCK].fill(0);
    assert_eq!(whole(&open(&storage, "b.vhd").unwrap()), expected);
}

#[test]
fn what_a_disk_lost_when_it_shrank_does_not_come_back_when_it_grows() {
    let storage = Arc::new(MemoryStorage::new());
    Image::new(1, 4 * BLOCK as u64, &[(0, 1), (1, 1), (3, 1)]).put(&storage, "a");
    Image::new(2, BLOCK as u64 + 1024, &[]).child_of(1, "a.vhd").put(&storage, "b");
    Image::new(3, 4 * BLOCK as u64, &[]).child_of(2, "b.vhd").put(&storage, "c");
    let mut expected = bytes(&[1, 1, 0, 0]);
    expected[BLOCK + 1024..].fill(0);
    let disk = open(&storage, "c.vhd").unwrap();
    assert_eq!(whole(&disk), expected);
    assert_eq!(disk.allocated().unwrap(), 2 * BLOCK as u64);
    assert_eq!(disk::seek_hole(&disk, 0).unwrap(), Some(2 * BLOCK as u64));
    assert_eq!(disk::seek_data(&disk, 2 * BLOCK as u64).unwrap(), None);
}

#[test]
fn a_chain_of_all_kinds_reads_as_one_disk() {
    let storage = Arc::new(MemoryStorage::new());
    let size = 6 * BLOCK as u64 - 512;
    Image::new(1, size, &[(5, 1), (0, 1)]).put(&storage, "a");
    Image::new(2, size, &[(1, 2), (0, 2)]).stored(Kind::Plain).child_of(1, "a.vhd").put(&storage, "b");
    Image::new(3, size, &[(2, 3)]).stored(Kind::Gzip).child_of(2, "b.alias.vhd").put(&storage, "c");
    Image::new(4, size, &[(3, 4), (2, 0)]).stored(Kind::Brotli).child_of(3, "c.alias.vhd").put(&storage, "d");
    let disk = open(&storage, "d.alias.vhd").unwrap();
    assert_eq!(whole(&disk), bytes(&[2, 2, 0, 4, 0, 1])[..6 * BLOCK - 512]);
    let layers = disk.layers().unwrap();
    assert_eq!(layers.iter().map(|layer| layer.allocated_blocks).collect::<Vec<_>>(), [2, 1, 2, 2]);
    assert_eq!(layers[3].name.as_str(), "a.vhd");
    assert_eq!(read(&disk, size - 1, 2).unwrap_err().kind(), ErrorKind::OutOfRange);
}

#[test]
fn sectors_that_a_bitmap_leaves_out_come_from_the_parents() {
    let storage = Arc::new(MemoryStorage::new());
    Image::new(1, 2 * BLOCK as u64, &[(0, 1)]).put(&storage, "a");
    let mut middle = Image::new(2, 2 * BLOCK as u64, &[(0, 2), (1, 2)]).child_of(1, "a.vhd").flat();
    let mut leaf = Image::new(3, 2 * BLOCK as u64, &[(0, 3), (1, 3)]).child_of(2, "b.vhd").flat();
    let first_bitmap = 1536 + SECTOR;
    middle[first_bitmap] = 0b1100_0000;
    leaf[first_bitmap] = 0b1010_0000;
    leaf[first_bitmap + SECTOR + BLOCK] = 0b0000_0001;
    storage.put("b.vhd", middle).unwrap();
    storage.put("c.vhd", leaf).unwrap();
    let sectors = [3, 2, 3, 1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 2, 2, 3];
    let expected: Vec<u8> = sectors.iter().flat_map(|byte| [*byte; SECTOR]).collect();
    let disk = open(&storage, "c.vhd").unwrap();
    // Twice: what is remembered of bitmaps must not change the answer.
    assert_eq!(whole(&disk), expected);
    assert_eq!(whole(&disk), expected);
    assert_eq!(read(&disk, 700, 1000).unwrap(), expected[700..1700]);
}

#[test]
fn a_block_outside_the_file_is_an_error_for_that_block_alone() {
    let storage = Arc::new(MemoryStorage::new());
    let mut file = Image::new(1, 3 * BLOCK as u64, &[(0, 1), (1, 2)]).flat();
    file[1536 + 8..1536 + 12].copy_from_slice(&0x0fff_0000_u32.to_be_bytes());
    storage.put("a.vhd", file).unwrap();
    let disk = open(&storage, "a.vhd").unwrap();
    assert_eq!(read(&disk, 0, 2 * BLOCK).unwrap(), bytes(&[1, 2]));
    let error = read(&disk, 2 * BLOCK as u64, 1).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Damaged);
    assert!(error.to_string().contains("a.vhd") && error.to_string().contains("block 2"), "{error}");
}

#[test]
fn tables_that_contradict_themselves_are_refused() {
    for (name, entry) in [("overlap", 5_u32), ("in the table", 3), ("in the header", 1)] {
        let storage = Arc::new(MemoryStorage::new());
        let mut file = Image::new(1, 3 * BLOCK as u64, &[(0, 1), (1, 2)]).flat();
        file[1536 + 8..1536 + 12].copy_from_slice(&entry.to_be_bytes());
        storage.put("a.vhd", file).unwrap();
        assert_eq!(open(&storage, "a.vhd").err().unwrap().kind(), vhd::ErrorKind::Damaged, "{name}");
    }
}

// Promise 1: "A read returns the bytes of the disk at the time of the backup, or an error."
#[test]
fn a_missing_or_damaged_block_file_is_an_error_for_that_block_alone() {
    for kind in [Kind::Plain, Kind::Gzip, Kind::Brotli] {
        for damage in ["missing", "cut", "longer", "flipped", "bomb"] {
            let storage = Arc::new(MemoryStorage::new());
            Image::new(1, 3 * BLOCK as u64, &[(0, 1), (1, 2)]).stored(kind).put(&storage, "a");
            let path = "data/a.vhd/blocks/0/1";
            let good = storage.read(&ObjectPath::new(path).unwrap(), 1 << 20).unwrap();
            match damage {
                "missing" => storage.remove(path).unwrap(),
                "cut" => storage.put(path, &good[..good.len() - 8]).unwrap(),
                "bomb" if kind == Kind::Gzip => storage.put(path, gzip(&vec![0; 1 << 24])).unwrap(),
                "longer" if kind == Kind::Plain => storage.put(path, [good, vec![0; 512]].concat()).unwrap(),
                "flipped" if kind == Kind::Gzip => {
                    let mut bad = good.clone();
                    let middle = bad.len() / 2;
                    bad[middle] ^= 0x10;
                    storage.put(path, bad).unwrap();
                }
                _ => continue,
            }
            let disk = open(&storage, "a.alias.vhd").unwrap();
            assert_eq!(read(&disk, 0, BLOCK).unwrap(), bytes(&[1]), "{kind:?} {damage}");
            let error = read(&disk, BLOCK as u64 + 7, 9).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Damaged, "{kind:?} {damage}: {error}");
            assert!(error.to_string().contains("block 1"), "{kind:?} {damage}: {error}");
            assert_eq!(read(&disk, 2 * BLOCK as u64, BLOCK).unwrap(), bytes(&[0]), "{kind:?} {damage}");
        }
    }
}

// Promise 6: "are followed inside the repository, or refused"
#[test]
fn names_that_loop_escape_or_lie_are_refused() {
    let size = 2 * BLOCK as u64;
    for (parent, expected) in [
        ("b.vhd", vhd::ErrorKind::Damaged),
        ("../../../etc/passwd", vhd::ErrorKind::Escape),
        ("/etc/passwd", vhd::ErrorKind::Escape),
        ("nothing.vhd", vhd::ErrorKind::Missing),
        ("other.vhd", vhd::ErrorKind::Damaged),
    ] {
        let storage = Arc::new(MemoryStorage::new());
        Image::new(9, size, &[]).put(&storage, "other");
        Image::new(1, size, &[]).child_of(2, "b.vhd").put(&storage, "a");
        let parent_id = if parent == "b.vhd" { 1 } else { 7 };
        let parent_name = if parent == "b.vhd" { "a.vhd" } else { parent };
        Image::new(2, size, &[]).child_of(parent_id, parent_name).put(&storage, "b");
        assert_eq!(open(&storage, "b.vhd").err().unwrap().kind(), expected, "{parent}");
    }
    for (content, expected) in [
        ("", vhd::ErrorKind::Damaged),
        ("x.alias.vhd", vhd::ErrorKind::Damaged),
        ("../../x.vhd", vhd::ErrorKind::Escape),
        ("data/nothing.vhd", vhd::ErrorKind::Missing),
    ] {
        let storage = Arc::new(MemoryStorage::new());
        storage.put("x.alias.vhd", content).unwrap();
        assert_eq!(open(&storage, "x.alias.vhd").err().unwrap().kind(), expected, "{content:?}");
    }
}

#[test]
fn sizes_that_would_need_huge_tables_are_refused_before_they_are_allocated() {
    let storage = Arc::new(MemoryStorage::new());
    let mut image = Image::new(1, BLOCK as u64, &[(0, 1)]);
    image.size = 1 << 60;
    let header = Image::new(1, BLOCK as u64, &[]).header();
    storage.put("a.vhd", [&image.footer()[..], &header, &vec![0xff; 512], &image.footer()].concat()).unwrap();
    assert_eq!(open(&storage, "a.vhd").err().unwrap().kind(), vhd::ErrorKind::Unsupported);
    // Within the bound, but the table has no entry for most of it.
    image.size = 1 << 30;
    storage.put("a.vhd", [&image.footer()[..], &header, &vec![0xff; 512], &image.footer()].concat()).unwrap();
    assert_eq!(open(&storage, "a.vhd").err().unwrap().kind(), vhd::ErrorKind::Damaged);
}

/// Target `b` over base `a`, and a later `c`, as XO leaves them in the middle of merging `b` into `a`.
fn interrupted(kind: Kind) -> Arc<MemoryStorage> {
    let storage = Arc::new(MemoryStorage::new());
    let size = 40 * BLOCK as u64;
    let held: Vec<(u32, u8)> = (0..30).map(|block| (block, 2)).collect();
    Image::new(1, size, &[(0, 1), (20, 1), (39, 1)]).stored(kind).put(&storage, "a");
    Image::new(2, size, &held).stored(kind).child_of(1, "a.alias.vhd").put(&storage, "b");
    Image::new(3, size, &[(1, 3)]).stored(kind).child_of(2, "b.alias.vhd").put(&storage, "c");
    let state = format!(
        "{{\"child\":{{\"uuid\":\"{}\"}},\"parent\":{{\"uuid\":\"{}\"}},\"chain\":[\"a.alias.vhd\",\"b.alias.vhd\"],\
         \"currentBlock\":0,\"mergedDataSize\":0,\"step\":\"mergeBlocks\",\"diskSize\":0}}",
        id(2),
        id(1)
    );
    storage.put(".a.alias.vhd.merge.json", state).unwrap();
    storage
}

fn block_path(name: &str, block: u32) -> String {
    format!("data/{name}.vhd/blocks/0/{block}")
}

// Promise 8: "A disk of a backup that exists reads right while XO adds, deletes and merges others"
// Promise 10: "A merge that was interrupted is read as what it was meant to become, where the data is there."
#[test]
fn in_the_middle_of_a_merge_every_later_backup_reads_right() {
    let target: Vec<u8> = (0..40).map(|block| if block < 30 { 2 } else { u8::from(block == 39) }).collect();
    let mut later = target.clone();
    later[1] = 3;
    for kind in [Kind::Plain, Kind::Brotli] {
        let storage = interrupted(kind);
        let before = (open(&storage, "b.alias.vhd").unwrap(), open(&storage, "c.alias.vhd").unwrap());
        for moved in 0..30 {
            storage.rename(&block_path("b", moved), &block_path("a", moved)).unwrap();
            if moved % 7 == 0 || moved == 29 {
                assert_eq!(whole(&open(&storage, "b.alias.vhd").unwrap()), bytes(&target), "{kind:?} {moved}");
                assert_eq!(whole(&open(&storage, "c.alias.vhd").unwrap()), bytes(&later), "{kind:?} {moved}");
                assert_eq!(whole(&before.0), bytes(&target), "{kind:?} {moved}, opened before");
                assert_eq!(whole(&before.1), bytes(&later), "{kind:?} {moved}, opened before");
            }
        }
        assert!(open(&storage, "a.alias.vhd").is_err(), "the base is no backup of its own any more");
        // XO's next steps: the table, the footer, the child's files, the aliases, the state.
        let merged: Vec<(u32, u8)> = (0..30).map(|block| (block, 2)).chain([(39, 1)]).collect();
        let base = Image::new(2, 40 * BLOCK as u64, &merged).stored(kind);
        let mut table = vec![0; 40];
        merged.iter().for_each(|(block, _)| table[*block as usize / 8] |= 0x80 >> (block % 8));
        storage.overwrite("data/a.vhd/bat", base.filtered(&table)).unwrap();
        storage.overwrite("data/a.vhd/footer", base.filtered(&base.footer())).unwrap();
        let check = |step: &str| {
            assert_eq!(whole(&open(&storage, "b.alias.vhd").unwrap()), bytes(&target), "{kind:?} {step}");
            assert_eq!(whole(&open(&storage, "c.alias.vhd").unwrap()), bytes(&later), "{kind:?} {step}");
            assert_eq!(whole(&before.0), bytes(&target), "{kind:?} {step}, opened before");
            assert_eq!(whole(&before.1), bytes(&later), "{kind:?} {step}, opened before");
        };
        check("footer written");
        storage.remove("data/b.vhd").unwrap();
        check("child's data removed");
        storage.remove("b.alias.vhd").unwrap();
        check("child's alias removed");
        storage.put("b.alias.vhd", "").unwrap();
        check("new alias is empty");
        storage.overwrite("b.alias.vhd", "data/a.vhd").unwrap();
        check("two aliases");
        storage.remove("a.alias.vhd").unwrap();
        check("old alias removed");
        storage.remove(".a.alias.vhd.merge.json").unwrap();
        check("done");
    }
}

#[test]
fn a_block_lost_before_a_merge_is_not_taken_from_the_parent() {
    let storage = interrupted(Kind::Plain);
    // Block 20 is in the parent too, with older content.
    storage.remove(&block_path("b", 20)).unwrap();
    let disk = open(&storage, "b.alias.vhd").unwrap();
    let error = read(&disk, 20 * BLOCK as u64, BLOCK).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Damaged);
    assert!(error.to_string().contains("lost"), "{error}");
    assert_eq!(read(&disk, 19 * BLOCK as u64, BLOCK).unwrap(), bytes(&[2]));
    for moved in 0..20 {
        storage.rename(&block_path("b", moved), &block_path("a", moved)).unwrap();
    }
    assert_eq!(read(&disk, 20 * BLOCK as u64, BLOCK).unwrap_err().kind(), ErrorKind::Damaged);
}

struct Switch(AtomicBool);

impl Liveness for Switch {
    fn is_alive(&self) -> storage::Result<bool> {
        Ok(self.0.load(Ordering::SeqCst))
    }
}

#[test]
fn a_disk_of_a_removed_backup_is_stale() {
    let storage = Arc::new(MemoryStorage::new());
    Image::new(1, BLOCK as u64, &[(0, 1)]).put(&storage, "a");
    let alive = Arc::new(Switch(AtomicBool::new(true)));
    let disk = vhd::open(&context(&storage), &ObjectPath::new("a.vhd").unwrap(), Some(alive.clone())).unwrap();
    assert_eq!(read(&disk, 0, 1).unwrap(), [1]);
    alive.0.store(false, Ordering::SeqCst);
    assert_eq!(read(&disk, 0, 1).unwrap_err().kind(), ErrorKind::Stale);
}

#[test]
fn blocks_that_a_merge_moves_inside_a_file_are_found_again() {
    let storage = Arc::new(MemoryStorage::new());
    Image::new(1, 2 * BLOCK as u64, &[(0, 1), (1, 2)]).put(&storage, "a");
    let disk = open(&storage, "a.vhd").unwrap();
    assert_eq!(whole(&disk), bytes(&[1, 2]));
    // What XO does to make room for a larger table: first block to the end, its entry, then the table over it.
    let mut file = storage.read(&ObjectPath::new("a.vhd").unwrap(), 1 << 20).unwrap();
    let (first, end) = (1536 + SECTOR, file.len() - SECTOR);
    let block = file[first..first + SECTOR + BLOCK].to_vec();
    let footer = file.split_off(end);
    file.extend(block);
    file[1536..1540].copy_from_slice(&u32::try_from(end / SECTOR).unwrap().to_be_bytes());
    file[first..first + SECTOR + BLOCK].fill(0xff);
    file.extend(footer);
    storage.overwrite("a.vhd", file).unwrap();
    assert_eq!(whole(&disk), bytes(&[1, 2]));
    assert_eq!(read(&disk, 10, 10).unwrap(), [1; 10]);
}

#[test]
fn a_file_without_its_last_footer_is_read_by_its_first() {
    let storage = Arc::new(MemoryStorage::new());
    let mut file = Image::new(1, 2 * BLOCK as u64, &[(0, 1), (1, 2)]).flat();
    let end = file.len() - SECTOR;
    file[end..].fill(0);
    storage.put("a.vhd", file.clone()).unwrap();
    assert_eq!(whole(&open(&storage, "a.vhd").unwrap()), bytes(&[1, 2]));
    file.truncate(end - 100);
    storage.put("b.vhd", file).unwrap();
    let disk = open(&storage, "b.vhd").unwrap();
    assert_eq!(read(&disk, BLOCK as u64, BLOCK).unwrap_err().kind(), ErrorKind::Damaged);
}

#[test]
fn a_long_chain_is_opened_by_reading_each_table_once_and_several_at_a_time() {
    let memory = Arc::new(MemoryStorage::new());
    let size = 100 * BLOCK as u64;
    for number in 0..100_u32 {
        let mut image = Image::new(u128::from(number) + 1, size, &[(number, 7)]).stored(Kind::Plain);
        if number > 0 {
            image = image.child_of(u128::from(number), &format!("l{}.alias.vhd", number - 1));
        }
        image.put(&memory, &format!("l{number}"));
    }
    let storage = Arc::new(FaultyStorage::new(memory));
    let tables = Arc::new(AtomicUsize::new(0));
    let counter = tables.clone();
    storage.set_rule(move |_, path| {
        if path.file_name() == "bat" && counter.fetch_add(1, Ordering::SeqCst) < 2 {
            // The first two stay until both are asked for: one after the other, the opening would never end.
            return Some(Fault::Stall);
        }
        None
    });
    let releaser = storage.clone();
    let release = std::thread::spawn(move || {
        let both = releaser.wait_for_stalled(2, Duration::from_secs(30));
        releaser.release();
        both
    });
    let context = Context { storage: storage.clone(), cache: BlockCache::new(1 << 20) };
    let disk = vhd::open(&context, &ObjectPath::new("l99.alias.vhd").unwrap(), None).unwrap();
    assert!(release.join().unwrap(), "the tables are read one after the other");
    // Of each: the alias, the filters, the footer, the header; then the table; of their folder, one listing, and one
    // to know when the disk has ended.
    assert_eq!(storage.count(Operation::Read), 100 * 4);
    assert_eq!(storage.count(Operation::ReadAt), 100);
    assert_eq!(storage.count(Operation::List), 2);
    assert_eq!(disk.leaf().chain_length, 100);
    assert_eq!(whole(&disk), bytes(&[7; 100]));
}

#[test]
fn a_fixed_disk_is_read_alone_and_as_a_base() {
    let storage = Arc::new(MemoryStorage::new());
    let mut image = Image::new(1, 3 * BLOCK as u64 - 512, &[]);
    let mut footer = Footer::parse(&image.footer()).unwrap();
    footer.disk_type = DiskType::Fixed;
    footer.data_offset = u64::MAX;
    let content = bytes(&[1, 2, 3])[..3 * BLOCK - 512].to_vec();
    storage.put("a.vhd", [&content[..], &footer.to_bytes()].concat()).unwrap();
    assert_eq!(whole(&open(&storage, "a.vhd").unwrap()), content);
    image = Image::new(2, 3 * BLOCK as u64 - 512, &[(1, 9)]).child_of(1, "a.vhd");
    image.put(&storage, "b");
    let mut expected = content.clone();
    expected[BLOCK..2 * BLOCK].fill(9);
    assert_eq!(whole(&open(&storage, "b.vhd").unwrap()), expected);
    storage.put("c.vhd", [&content[..100], &footer.to_bytes()[..]].concat()).unwrap();
    assert_eq!(open(&storage, "c.vhd").err().unwrap().kind(), vhd::ErrorKind::Damaged);
}

/// A small generator; the seed is in every message.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % limit
    }
}

#[test]
fn random_chains_read_as_a_flat_array_does() {
    for seed in 1..=400_u64 {
        let mut random = Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15));
        let storage = Arc::new(MemoryStorage::new());
        let mut flat: Vec<u8> = Vec::new();
        let mut below = String::new();
        for layer in 0..1 + random.below(5) {
            let size = (1 + random.below(40)) * SECTOR as u64 + random.below(2) * 5 * BLOCK as u64;
            flat.resize(usize::try_from(size).unwrap(), 0);
            let mut image = Image::new(u128::from(layer) + 1, size, &[]);
            for block in 0..u32::try_from(size.div_ceil(BLOCK as u64)).unwrap() {
                if random.below(3) == 0 {
                    let content: Vec<u8> = (0..BLOCK).map(|_| u8::try_from(random.below(256)).unwrap()).collect();
                    let start = block as usize * BLOCK;
                    let end = flat.len().min(start + BLOCK);
                    flat[start..end].copy_from_slice(&content[..end - start]);
                    image.blocks.insert(
                        usize::try_from(random.below(image.blocks.len() as u64 + 1)).unwrap(),
                        (block, content),
                    );
                }
            }
            image.kind = [Kind::Flat, Kind::Plain, Kind::Gzip, Kind::Brotli][usize::try_from(random.below(4)).unwrap()];
            if layer > 0 {
                image = image.child_of(u128::from(layer), &below);
            }
            image.put(&storage, &format!("l{layer}"));
            let ending = if image.kind == Kind::Flat { "vhd" } else { "alias.vhd" };
            below = format!("l{layer}.{ending}");
        }
        let disk = open(&storage, &below).unwrap_or_else(|error| panic!("seed {seed}: {error}"));
        assert_eq!(disk.size(), flat.len() as u64, "seed {seed}");
        for _ in 0..20 {
            let offset = random.below(disk.size());
            let len = 1 + random.below(disk.size() - offset);
            let range = usize::try_from(offset).unwrap()..usize::try_from(offset + len).unwrap();
            assert!(read(&disk, offset, range.len()).unwrap() == flat[range], "seed {seed}: {len} bytes at {offset}");
        }
        for range in disk::data_ranges(&disk) {
            let range = range.unwrap();
            assert!(range.start < range.end && range.end <= disk.size(), "seed {seed}");
        }
    }
}

/// A chain of two over a network, with its disk's bytes: blocks 0..32, each of one byte, and a hole in between.
fn remote(kind: Kind) -> (Arc<FaultyStorage>, ChainDisk, Vec<u8>) {
    let memory = Arc::new(MemoryStorage::new());
    let size = 32 * BLOCK as u64;
    let numbers = |blocks: std::ops::Range<u32>| -> Vec<(u32, u8)> {
        blocks.map(|block| (block, u8::try_from(block + 1).unwrap())).collect()
    };
    Image::new(1, size, &numbers(0..12)).stored(kind).put(&memory, "a");
    let parent = if kind == Kind::Flat { "a.vhd" } else { "a.alias.vhd" };
    Image::new(2, size, &numbers(16..32)).child_of(1, parent).stored(kind).put(&memory, "b");
    let storage = Arc::new(FaultyStorage::<dyn Storage>::new(memory));
    let context = Context { storage: Arc::new(Remote(storage.clone())), cache: BlockCache::new(1 << 20) };
    let name = if kind == Kind::Flat { "b.vhd" } else { "b.alias.vhd" };
    let disk = vhd::open(&context, &ObjectPath::new(name).unwrap(), None).unwrap();
    let mut bytes = vec![0; 32 * BLOCK];
    for (block, chunk) in bytes.chunks_mut(BLOCK).enumerate() {
        if !(12..16).contains(&block) {
            chunk.fill(u8::try_from(block + 1).unwrap());
        }
    }
    (storage, disk, bytes)
}

fn wait_until(what: &str, holds: impl Fn() -> bool) {
    let start = Instant::now();
    while !holds() {
        assert!(start.elapsed() < Duration::from_secs(30), "{what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn what_was_prefetched_over_a_network_is_answered_from_memory_and_right() {
    for kind in [Kind::Flat, Kind::Plain, Kind::Gzip, Kind::Brotli] {
        let (storage, disk, bytes) = remote(kind);
        let mut buffer = vec![0xee; bytes.len()];
        assert!(!disk.read_in_memory(0, &mut buffer), "{kind:?}: nothing was read yet");
        assert_eq!(disk.prefetch_window(), 16 * BLOCK as u64);
        disk.prefetch(0, disk.size());
        wait_until("every block is in memory", || disk.read_in_memory(0, &mut vec![0; 32 * BLOCK]));
        storage.reset_counts();
        assert!(disk.read_in_memory(0, &mut buffer));
        assert_eq!(buffer, bytes, "{kind:?}");
        assert!(disk.read_in_memory(BLOCK as u64 - 100, &mut buffer[..300]));
        assert_eq!(buffer[..300], bytes[BLOCK - 100..BLOCK + 200], "{kind:?}");
        assert!(!disk.read_in_memory(disk.size() - 1, &mut buffer[..2]), "past the end");
        assert_eq!(storage.total(), 0, "{kind:?}: memory asks nobody");
    }
}

#[test]
fn delays_of_blocks_that_are_prefetched_overlap() {
    let (storage, disk, bytes) = remote(Kind::Plain);
    // Each block's file stalls until as many others do.
    storage.set_rule(|_, path| path.as_str().contains("/blocks/").then_some(Fault::Stall));
    disk.prefetch(0, 12 * BLOCK as u64);
    assert!(storage.wait_for_stalled(12, Duration::from_secs(30)));
    storage.release();
    let mut buffer = vec![0; 12 * BLOCK];
    disk.read_at(0, &mut buffer).unwrap();
    assert_eq!(buffer, bytes[..12 * BLOCK]);
}

#[test]
fn a_prefetch_that_fails_costs_nothing_and_is_not_remembered() {
    for kind in [Kind::Flat, Kind::Plain, Kind::Gzip] {
        let (storage, disk, bytes) = remote(kind);
        storage.set_rule(|operation, _| (operation == Operation::ReadAt).then_some(Fault::Errno(5)));
        disk.prefetch(0, disk.size());
        let mut buffer = vec![0; bytes.len()];
        storage.release();
        disk.read_at(0, &mut buffer).unwrap();
        assert_eq!(buffer, bytes, "{kind:?}");
    }
}

#[test]
fn a_merge_state_or_alias_that_is_still_empty_is_waited_for() {
    for unfinished in [".a.vhd.merge.json", "c.alias.vhd"] {
        let storage = Arc::new(MemoryStorage::new());
        let size = 4 * BLOCK as u64;
        Image::new(1, size, &[(0, 1)]).put(&storage, "a");
        Image::new(2, size, &[(1, 2)]).child_of(1, "a.vhd").put(&storage, "b");
        Image::new(3, size, &[(2, 3)]).child_of(2, "b.vhd").stored(Kind::Plain).put(&storage, "c");
        let disk = open(&storage, "c.alias.vhd").unwrap();
        let content = if unfinished == "c.alias.vhd" { "data/c.vhd" } else { r#"{"chain":["a.vhd","b.vhd"]}"# };
        storage.put(unfinished, "").unwrap();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                // Far longer than nothing changes in between.
                std::thread::sleep(Duration::from_millis(300));
                storage.put(unfinished, content).unwrap();
            });
            let fresh = open(&storage, "c.alias.vhd").unwrap();
            assert_eq!(whole(&fresh), bytes(&[1, 2, 3, 0]), "{unfinished}");
        });
        assert_eq!(whole(&disk), bytes(&[1, 2, 3, 0]), "{unfinished}");
    }
}

#[test]
fn a_disk_without_a_backup_ends_when_a_merge_makes_it_part_of_another() {
    for kind in [Kind::Flat, Kind::Plain] {
        let storage = Arc::new(MemoryStorage::new());
        let size = 3 * BLOCK as u64;
        let name = |name: &str| format!("{name}.{}", if kind == Kind::Flat { "vhd" } else { "alias.vhd" });
        Image::new(1, size, &[(0, 1)]).stored(kind).put(&storage, "a");
        Image::new(2, size, &[(1, 2)]).stored(kind).child_of(1, &name("a")).put(&storage, "b");
        Image::new(3, size, &[(0, 3)]).stored(kind).child_of(2, &name("b")).put(&storage, "c");
        let disks = ["a", "b", "c"].map(|disk| open(&storage, &name(disk)).unwrap());
        assert_eq!(whole(&disks[1]), bytes(&[1, 2, 0]));
        // `a` takes what `b` and `c` hold; it, and what is read through it, is not `b`'s any more.
        let state = format!(r#"{{"chain":["{}","{}","{}"]}}"#, name("a"), name("b"), name("c"));
        storage.put(&format!(".{}.merge.json", name("a")), state).unwrap();
        if kind == Kind::Flat {
            let merged = Image::new(1, size, &[(0, 3), (1, 2)]).flat();
            storage.overwrite("a.vhd", merged).unwrap();
        } else {
            storage.rename(&block_path("c", 0), &block_path("a", 0)).unwrap();
        }
        for disk in &disks[..2] {
            assert_eq!(read(disk, 0, BLOCK).unwrap_err().kind(), ErrorKind::Stale, "{kind:?}");
        }
        assert_eq!(whole(&disks[2]), bytes(&[3, 2, 0]), "{kind:?}");
    }
}
