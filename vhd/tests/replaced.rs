//! Disks under which the files are replaced, and structures that ask for too much.

#[allow(dead_code, reason = "each test file uses its part of the module")]
mod builder;

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use builder::{BLOCK, Image, Kind, SECTOR, context, open};
use disk::{Disk, ErrorKind};
use storage::{Capabilities, Entry, Fault, FaultyStorage, MemoryStorage, Object, ObjectPath, Operation, Stat, Storage};
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

/// A file last changed so long ago is not changed again without its times changing.
const SETTLED: Duration = Duration::from_millis(2100);

/// Counts what is asked about names, and does something before a file is opened.
struct Watched {
    storage: storage::LocalStorage,
    asked: AtomicU64,
    before_open: Box<dyn Fn(&ObjectPath) + Send + Sync>,
}

impl Watched {
    fn new(folder: &Path, before_open: impl Fn(&ObjectPath) + Send + Sync + 'static) -> Self {
        let storage = storage::LocalStorage::open(folder).unwrap();
        Self { storage, asked: AtomicU64::new(0), before_open: Box::new(before_open) }
    }

    fn asked(&self) -> u64 {
        self.asked.load(Ordering::SeqCst)
    }
}

impl Storage for Watched {
    fn open(&self, path: &ObjectPath) -> storage::Result<Arc<dyn Object>> {
        (self.before_open)(path);
        self.storage.open(path)
    }

    fn read(&self, path: &ObjectPath, limit: u64) -> storage::Result<Vec<u8>> {
        self.storage.read(path, limit)
    }

    fn list(&self, path: &ObjectPath) -> storage::Result<Vec<Entry>> {
        self.asked.fetch_add(1, Ordering::SeqCst);
        self.storage.list(path)
    }

    fn stat(&self, path: &ObjectPath) -> storage::Result<Stat> {
        self.asked.fetch_add(1, Ordering::SeqCst);
        self.storage.stat(path)
    }

    fn capabilities(&self) -> Capabilities {
        self.storage.capabilities()
    }

    fn describe(&self) -> String {
        self.storage.describe()
    }
}

#[test]
fn files_that_nobody_touches_prove_a_disk_and_the_first_touch_is_noticed() {
    let image = |number, byte, other| Image::new(number, 2 * BLOCK as u64, &[(0, byte), (1, other)]);
    let child = || Image::new(2, 2 * BLOCK as u64, &[(1, 2)]).child_of(1, "a.vhd");
    let ways = ["removed", "child removed", "renamed", "rewritten", "merged", "merged, under its old time"];
    let worlds = ways.map(|_| tempfile::tempdir().unwrap());
    for world in &worlds {
        std::fs::write(world.path().join("a.vhd"), image(1, 1, 1).flat()).unwrap();
        std::fs::write(world.path().join("b.vhd"), child().flat()).unwrap();
    }
    std::thread::sleep(SETTLED);
    for (way, world) in ways.into_iter().zip(&worlds) {
        let (a, b) = (world.path().join("a.vhd"), world.path().join("b.vhd"));
        let storage = Arc::new(Watched::new(world.path(), |_| ()));
        let context = Context { storage: storage.clone(), cache: BlockCache::new(16 << 20) };
        let open = |name| vhd::open(&context, &ObjectPath::new(name).unwrap(), None).unwrap();
        let (base, disk) = (open("a.vhd"), open("b.vhd"));
        let before = storage.asked();
        let disks = [(&base, [1, 1]), (&disk, [1, 2])];
        for (disk, expected) in disks {
            assert_eq!(read(disk, 0, 1).unwrap(), expected[..1], "{way}");
            assert_eq!(read(disk, BLOCK as u64, 1).unwrap(), expected[1..], "{way}");
        }
        assert_eq!(storage.asked(), before, "a file that nobody touched needs no look at its folder");
        let modified = std::fs::metadata(&a).unwrap().modified().unwrap();
        let ends = match way {
            "removed" => std::fs::remove_file(&a).map(|()| [true, false]),
            "child removed" => std::fs::remove_file(&b).map(|()| [false, true]),
            "renamed" => std::fs::rename(&a, world.path().join("c.vhd")).map(|()| [true, false]),
            "rewritten" => std::fs::write(&a, image(9, 9, 9).flat()).map(|()| [true, true]),
            _ => {
                let state = r#"{"chain":["a.vhd","b.vhd"],"step":"mergeBlocks"}"#;
                std::fs::write(world.path().join(".a.vhd.merge.json"), state).unwrap();
                // Of the same size.
                std::fs::write(&a, image(1, 1, 2).flat()).map(|()| [true, false])
            }
        }
        .unwrap();
        if way.ends_with("old time") {
            let file = std::fs::File::options().write(true).open(&a).unwrap();
            file.set_modified(modified).unwrap();
        }
        for ((disk, expected), ends) in disks.into_iter().zip(ends) {
            let found = [0, BLOCK as u64].map(|at| read(disk, at, 1));
            assert_eq!(found.iter().any(|found| found.is_err()), ends, "{way}: {found:?}");
            for (found, expected) in found.into_iter().zip(expected) {
                assert!(found.as_ref().map_or(true, |found| *found == [expected]), "{way}: {found:?}, not {expected}");
            }
        }
    }
}

#[test]
fn a_file_that_was_merged_into_while_it_was_opened_proves_nothing() {
    let world = tempfile::tempdir().unwrap();
    let file = world.path().join("a.vhd");
    let image = |byte| Image::new(1, BLOCK as u64, &[(0, byte)]).flat();
    std::fs::write(&file, image(1)).unwrap();
    let state = world.path().join(".a.vhd.merge.json");
    let storage = Watched::new(world.path(), move |path| {
        if path.as_str() == "a.vhd" && !state.exists() {
            std::fs::write(&state, r#"{"chain":["a.vhd","b.vhd"],"step":"mergeBlocks"}"#).unwrap();
            std::fs::write(&file, image(2)).unwrap();
            std::thread::sleep(SETTLED);
        }
    });
    let context = Context { storage: Arc::new(storage), cache: BlockCache::new(0) };
    let disk = vhd::open(&context, &ObjectPath::new("a.vhd").unwrap(), None).unwrap();
    assert_eq!(read(&disk, 0, 1).unwrap_err().kind(), ErrorKind::Stale);
}
