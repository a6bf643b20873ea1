//! Disks under which the files are replaced, and structures that ask for too much.

#[allow(dead_code, reason = "each test file uses its part of the module")]
mod builder;

use std::sync::Arc;

use builder::{BLOCK, Image, Kind, SECTOR, context, open};
use disk::{Disk, ErrorKind};
use storage::{Fault, FaultyStorage, MemoryStorage, ObjectPath, Operation};
use vhd::{BlockCache, ChainDisk, Context, DiskType, Footer, Header};

fn read(disk: &ChainDisk, offset: u64, len: usize) -> disk::Result<Vec<u8>> {
    let mut bytes = vec![0xee; len];
    disk.read_at(offset, &mut bytes).map(|()| bytes)
}

#[test]
fn a_disk_replaced_by_another_is_stale_and_never_goes_on_as_the_other() {
    for kind in [Kind::Flat, Kind::Plain, Kind::Gzip, Kind::Brotli] {
        let name = if kind == Kind::Flat { "a.vhd" } else { "a.alias.vhd" };
        let original = |number, size| Image::new(number, size, &[(0, 1), (1, 1)]).stored(kind);
        let storage = Arc::new(MemoryStorage::new());
        original(1, 2 * BLOCK as u64).put(&storage, "a");
        let disk = open(&storage, name).unwrap();
        assert_eq!(read(&disk, 0, 1).unwrap(), [1]);
        let other = Image::new(2, BLOCK as u64, &[(0, 9)]).stored(kind);
        if kind == Kind::Flat {
            // In place, as by `cp`: the open file is the other disk now.
            storage.overwrite(name, other.flat()).unwrap();
        } else {
            storage.remove("data/a.vhd").unwrap();
            other.put(&storage, "a");
            storage.remove("data/a.vhd/blocks").unwrap();
        }
        let outcome = read(&disk, BLOCK as u64, BLOCK);
        assert_eq!(outcome.unwrap_err().kind(), ErrorKind::Stale, "{kind:?}");
        assert_eq!(disk.size(), 2 * BLOCK as u64, "{kind:?}");
    }
}

#[test]
fn a_disk_without_a_backup_is_stale_once_another_is_merged_into_it() {
    for (kind, name) in [(Kind::Flat, "a.vhd"), (Kind::Plain, "a.alias.vhd"), (Kind::Gzip, "a.alias.vhd")] {
        let storage = Arc::new(MemoryStorage::new());
        let image = |byte| Image::new(1, BLOCK as u64, &[(0, byte)]).stored(kind);
        image(1).put(&storage, "a");
        Image::new(2, BLOCK as u64, &[(0, 2)]).child_of(1, name).stored(kind).put(&storage, "b");
        let disk = open(&storage, name).unwrap();
        assert_eq!(read(&disk, 0, 1).unwrap(), [1]);
        let state = format!(r#"{{"chain":["{name}","{}"],"step":"mergeBlocks"}}"#, name.replace('a', "b"));
        storage.put(&format!(".{name}.merge.json"), state).unwrap();
        if kind == Kind::Flat {
            storage.overwrite(name, image(2).flat()).unwrap();
        } else {
            storage.rename("data/b.vhd/blocks/0/0", "data/a.vhd/blocks/0/0").unwrap();
        }
        assert_eq!(read(&disk, 0, 1).unwrap_err().kind(), ErrorKind::Stale, "{kind:?}");
        storage.remove(&format!(".{name}.merge.json")).unwrap();
        storage.remove(name).unwrap();
        assert_eq!(read(&disk, 0, 1).unwrap_err().kind(), ErrorKind::Stale, "{kind:?}");
    }
}

#[test]
fn a_file_that_its_server_removed_is_looked_for_by_its_name() {
    const ESTALE: i32 = 116;
    let memory = Arc::new(MemoryStorage::new());
    Image::new(1, BLOCK as u64, &[(0, 1)]).put(&memory, "a");
    let storage = Arc::new(FaultyStorage::new(memory.clone()));
    let context = Context { storage: storage.clone(), cache: BlockCache::new(1 << 20) };
    for operation in [Operation::ReadAt, Operation::StatOpen] {
        let disk = vhd::open(&context, &ObjectPath::new("a.vhd").unwrap(), None).unwrap();
        // Over NFS the end of a merge looks like this: the base got the name and the uuid of its child.
        Image::new(1, BLOCK as u64, &[(0, 1)]).put(&memory, "a");
        let is_first = std::sync::atomic::AtomicBool::new(true);
        storage.set_rule(move |now, _| {
            let fails = now == operation && is_first.swap(false, std::sync::atomic::Ordering::SeqCst);
            fails.then_some(Fault::Errno(ESTALE))
        });
        assert_eq!(read(&disk, 0, 2).unwrap(), [1, 1], "{operation:?}");
        storage.release();
    }
}

#[test]
fn a_table_that_claims_more_entries_than_any_disk_has_blocks_is_not_read() {
    let storage = Arc::new(MemoryStorage::new());
    let image = Image::new(1, BLOCK as u64, &[(0, 1)]).stored(Kind::Plain);
    image.put(&storage, "a");
    let mut header = Header::parse(&image.header()).unwrap();
    header.max_table_entries = u32::MAX;
    storage.put("data/a.vhd/header", header.to_bytes()).unwrap();
    assert_eq!(read(&open(&storage, "a.alias.vhd").unwrap(), 0, 1).unwrap(), [1]);
    storage.put("data/a.vhd/bat", vec![0x80; (16 << 20) + (32 << 10)]).unwrap();
    assert_eq!(open(&storage, "a.alias.vhd").err().unwrap().kind(), vhd::ErrorKind::Damaged);
}

#[test]
fn a_fixed_base_with_too_many_of_its_childs_blocks_is_refused() {
    let storage = Arc::new(MemoryStorage::new());
    let mut image = Image::new(1, 1 << 34, &[]);
    let footer =
        Footer { disk_type: DiskType::Fixed, data_offset: u64::MAX, ..Footer::parse(&image.footer()).unwrap() };
    image = Image::new(2, SECTOR as u64, &[]).child_of(1, "a.vhd");
    image.block = SECTOR;
    image.put(&storage, "b");
    let size = 1_u64 << 34;
    let directory = tempfile::tempdir().unwrap();
    let file = std::fs::File::create(directory.path().join("a.vhd")).unwrap();
    file.set_len(size).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&file, &footer.to_bytes(), size).unwrap();
    std::fs::write(directory.path().join("b.vhd"), image.flat()).unwrap();
    let local = Arc::new(storage::LocalStorage::open(directory.path()).unwrap());
    let context = Context { storage: local, ..context(&storage) };
    let open = |name: &str| vhd::open(&context, &ObjectPath::new(name).unwrap(), None);
    assert_eq!(open("a.vhd").unwrap().size(), size);
    assert_eq!(open("b.vhd").err().unwrap().kind(), vhd::ErrorKind::Unsupported);
}

#[test]
fn the_longest_chain_of_partial_blocks_is_read_on_a_small_stack() {
    const LAYERS: u32 = 4096;
    let storage = Arc::new(MemoryStorage::new());
    for number in 0..LAYERS {
        let mut image = Image::new(u128::from(number) + 1, BLOCK as u64, &[(0, 7)]);
        if number > 0 {
            image = image.child_of(u128::from(number), &format!("l{}.vhd", number - 1));
        }
        let mut file = image.flat();
        if number > 0 {
            // Its block is there and holds nothing.
            file[2048..2048 + SECTOR].fill(0);
        }
        storage.put(&format!("l{number}.vhd"), file).unwrap();
    }
    let disk = open(&storage, &format!("l{}.vhd", LAYERS - 1)).unwrap();
    let reader = std::thread::Builder::new().stack_size(2 << 20);
    let bytes = std::thread::scope(|scope| {
        reader.spawn_scoped(scope, || read(&disk, 100, 1000).unwrap()).unwrap().join().unwrap()
    });
    assert_eq!(bytes, [7; 1000]);
}
