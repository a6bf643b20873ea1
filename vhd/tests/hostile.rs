//! Files that lie on purpose: bombs, names that lead outside, other things where a file is expected.

#[allow(dead_code, reason = "each test file uses its part of the module")]
mod builder;

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use builder::{BLOCK, Image, Kind, context, gzip, id, open};
use disk::Disk;
use rustix::fs::{CWD, FileType, Mode, mknodat};
use storage::{LocalStorage, MemoryStorage, ObjectPath, Storage};
use vhd::{BlockCache, ChainDisk, Context, ErrorKind, Footer, Header};

const SIZE: u64 = 3 * BLOCK as u64;
/// What is refused is refused at once.
const SOON: Duration = Duration::from_secs(5);

fn read(disk: &ChainDisk, block: usize) -> Result<Vec<u8>, String> {
    let mut bytes = vec![0xee; BLOCK];
    disk.read_at((block * BLOCK) as u64, &mut bytes).map(|()| bytes).map_err(|error| error.to_string())
}

/// Copies a storage in memory into a folder.
fn write_out(memory: &MemoryStorage, from: &ObjectPath, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in memory.list(from).unwrap() {
        let path = from.join(&entry.name).unwrap();
        if entry.is_directory {
            write_out(memory, &path, &to.join(&entry.name));
        } else {
            std::fs::write(to.join(&entry.name), memory.read(&path, 1 << 24).unwrap()).unwrap();
        }
    }
}

fn open_in(folder: &Path, name: &str) -> vhd::Result<ChainDisk> {
    let storage = Arc::new(LocalStorage::open(folder).unwrap());
    vhd::open(&Context { storage, cache: BlockCache::new(1 << 20) }, &ObjectPath::new(name).unwrap(), None)
}

/// A chain of two in a folder: `a` exploded, `b` a VHD file over it.
fn folder() -> tempfile::TempDir {
    let memory = MemoryStorage::new();
    Image::new(1, SIZE, &[(0, 1), (1, 2)]).stored(Kind::Plain).put(&memory, "a");
    Image::new(2, SIZE, &[(2, 3)]).child_of(1, "a.alias.vhd").put(&memory, "b");
    let folder = tempfile::tempdir().unwrap();
    write_out(&memory, &ObjectPath::root(), folder.path());
    folder
}

#[test]
fn a_bomb_is_refused_in_every_file_that_is_decompressed() {
    let brotli = |bytes: &[u8]| {
        let mut out = Vec::new();
        std::io::Write::write_all(&mut brotli::CompressorWriter::new(&mut out, 1 << 16, 0, 22), bytes).unwrap();
        out
    };
    for (kind, encode) in [(Kind::Gzip, &gzip as &dyn Fn(&[u8]) -> Vec<u8>), (Kind::Brotli, &brotli)] {
        for len in [1 << 20, 32 << 20] {
            let bomb = encode(&vec![0; len]);
            for file in ["footer", "header", "bat", "blocks/0/1"] {
                let storage = Arc::new(MemoryStorage::new());
                Image::new(1, SIZE, &[(0, 1), (1, 2)]).stored(kind).put(&storage, "a");
                storage.put(&format!("data/a.vhd/{file}"), bomb.clone()).unwrap();
                let start = Instant::now();
                let told = format!("{kind:?} {file} {len}");
                match open(&storage, "a.alias.vhd") {
                    Err(error) => {
                        assert_eq!(error.kind(), ErrorKind::Damaged, "{told}: {error}");
                        assert_eq!(error.path().file_name(), file, "{told}: {error}");
                    }
                    Ok(disk) => {
                        assert_eq!(file, "blocks/0/1", "{told}");
                        assert!(read(&disk, 1).unwrap_err().contains("block 1"), "{told}");
                        assert_eq!(
                            (read(&disk, 0), read(&disk, 2)),
                            (Ok(vec![1; BLOCK]), Ok(vec![0; BLOCK])),
                            "{told}"
                        );
                    }
                }
                assert!(start.elapsed() < SOON, "{told}: {:?}", start.elapsed());
            }
        }
    }
}

#[test]
fn a_table_of_any_length_is_refused_before_there_is_memory_for_it() {
    let folder = folder();
    let path = folder.path().join("data/a.vhd");
    let mut header = Header::parse(&std::fs::read(path.join("header")).unwrap().try_into().unwrap()).unwrap();
    header.max_table_entries = u32::MAX;
    std::fs::write(path.join("header"), header.to_bytes()).unwrap();
    for file in ["bat", "footer", "header", "chunk-filters.json"] {
        let name = path.join(file);
        let sound = std::fs::read(&name).ok();
        std::fs::File::create(&name).unwrap().set_len(1 << 40).unwrap();
        let error = open_in(folder.path(), "a.alias.vhd").err().unwrap();
        assert_eq!((error.kind(), error.path().file_name()), (ErrorKind::Damaged, file), "{error}");
        match sound {
            Some(bytes) => std::fs::write(&name, bytes).unwrap(),
            None => std::fs::remove_file(&name).unwrap(),
        }
    }
    for file in ["a.alias.vhd", ".a.alias.vhd.merge.json"] {
        let name = folder.path().join(file);
        std::fs::File::create(&name).unwrap().set_len(1 << 40).unwrap();
        let error = open_in(folder.path(), "a.alias.vhd").err().unwrap();
        assert_eq!((error.kind(), error.path().file_name()), (ErrorKind::Damaged, file), "{error}");
        std::fs::remove_file(&name).unwrap();
        std::fs::write(folder.path().join("a.alias.vhd"), "data/a.vhd").unwrap();
    }
    // A block of another length, and the disk opens again.
    std::fs::File::create(path.join("blocks/0/1")).unwrap().set_len(1 << 40).unwrap();
    let disk = open_in(folder.path(), "b.vhd").unwrap();
    assert!(read(&disk, 1).unwrap_err().contains("block 1"));
    assert_eq!((read(&disk, 0), read(&disk, 2)), (Ok(vec![1; BLOCK]), Ok(vec![3; BLOCK])));
}

#[test]
fn a_pipe_a_socket_or_a_folder_in_the_place_of_a_file_is_refused_without_waiting() {
    for file in ["b.vhd", "a.alias.vhd", "data/a.vhd", "data/a.vhd/footer", "data/a.vhd/bat", "data/a.vhd/blocks/0/1"] {
        for kind in ["pipe", "socket", "folder", "loop"] {
            let folder = folder();
            let path = folder.path().join(file);
            if file == "data/a.vhd" {
                std::fs::remove_dir_all(&path).unwrap();
            } else {
                std::fs::remove_file(&path).unwrap();
            }
            match kind {
                "pipe" => mknodat(CWD, &path, FileType::Fifo, Mode::RUSR, 0).unwrap(),
                "socket" => drop(std::os::unix::net::UnixListener::bind(&path).unwrap()),
                "folder" => std::fs::create_dir(&path).unwrap(),
                _ => std::os::unix::fs::symlink(&path, &path).unwrap(),
            }
            let start = Instant::now();
            match open_in(folder.path(), "b.vhd") {
                Err(error) => {
                    assert!(!file.contains("blocks"), "{file} {kind}: {error}");
                    let name = if kind == "folder" && matches!(file, "b.vhd" | "data/a.vhd") { "footer" } else { file };
                    assert!(error.to_string().contains(name), "{file} {kind}: {error}");
                }
                Ok(disk) => {
                    let error = read(&disk, 1).unwrap_err();
                    assert!(file.contains("blocks") && error.contains("block 1"), "{file} {kind}: {error}");
                    assert_eq!((read(&disk, 0), read(&disk, 2)), (Ok(vec![1; BLOCK]), Ok(vec![3; BLOCK])));
                }
            }
            assert!(start.elapsed() < SOON, "{file} {kind}: {:?}", start.elapsed());
        }
    }
}

#[test]
fn no_name_leads_to_a_sound_vhd_outside_the_repository() {
    let outside = tempfile::tempdir().unwrap();
    let repository = outside.path().join("repository");
    std::fs::create_dir_all(repository.join("data")).unwrap();
    let parent = Image::new(1, SIZE, &[(0, 1)]).flat();
    std::fs::write(outside.path().join("parent.vhd"), &parent).unwrap();
    std::os::unix::fs::symlink(outside.path(), repository.join("link")).unwrap();
    std::os::unix::fs::symlink(outside.path().join("parent.vhd"), repository.join("linked.vhd")).unwrap();
    std::os::unix::fs::symlink("../../parent.vhd", repository.join("data/linked.vhd")).unwrap();
    let absolute = outside.path().join("parent.vhd").to_str().unwrap().to_owned();
    let names =
        ["../parent.vhd", "data/../../parent.vhd", "link/parent.vhd", "linked.vhd", "data/linked.vhd", &absolute];
    for name in names {
        std::fs::write(repository.join("x.alias.vhd"), name).unwrap();
        let error = open_in(&repository, "x.alias.vhd").err().unwrap();
        assert_eq!(error.kind(), ErrorKind::Escape, "alias to {name}: {error}");
        let child = Image::new(2, SIZE, &[(1, 2)]).child_of(1, name);
        std::fs::write(repository.join("child.vhd"), child.flat()).unwrap();
        let error = open_in(&repository, "child.vhd").err().unwrap();
        assert_eq!(error.kind(), ErrorKind::Escape, "child of {name}: {error}");
        // By a locator of each kind, behind the header's own name, which is empty.
        for (code, text) in [
            (*b"W2ru", name.replace('/', "\\").encode_utf16().flat_map(u16::to_le_bytes).collect::<Vec<u8>>()),
            (*b"W2ku", name.encode_utf16().flat_map(u16::to_le_bytes).collect()),
            (*b"MacX", format!("file://{name}").into_bytes()),
        ] {
            let mut bytes = child.flat();
            let mut header = Header::parse(bytes[512..1536].try_into().unwrap()).unwrap();
            header.parent_name = String::new();
            header.locators[3].platform_code = code;
            header.locators[3].length = u32::try_from(text.len()).unwrap();
            header.locators[3].offset = bytes.len() as u64;
            bytes.extend(text);
            bytes[512..1536].copy_from_slice(&header.to_bytes());
            std::fs::write(repository.join("child.vhd"), bytes).unwrap();
            let error = open_in(&repository, "child.vhd").err().unwrap();
            assert!(matches!(error.kind(), ErrorKind::Escape | ErrorKind::Missing), "locator {name}: {error}");
        }
    }
    // The same names, were the parent inside, are followed.
    std::fs::remove_file(repository.join("linked.vhd")).unwrap();
    std::fs::write(repository.join("linked.vhd"), parent).unwrap();
    std::fs::write(repository.join("child.vhd"), Image::new(2, SIZE, &[]).child_of(1, "linked.vhd").flat()).unwrap();
    assert_eq!(read(&open_in(&repository, "child.vhd").unwrap(), 0), Ok(vec![1; BLOCK]));
}

#[test]
fn names_that_no_file_has_are_refused_with_the_file_that_says_them() {
    let long = "x".repeat(300);
    for name in
        ["..", ".", "/", "//", "a/..", "\n", "a\nb.vhd", "C:\\", "\\\\server\\share\\x.vhd", "b.vhd/", &long[..256]]
    {
        let storage = Arc::new(MemoryStorage::new());
        Image::new(2, SIZE, &[]).child_of(1, name).put(&storage, "b");
        let error = open(&storage, "b.vhd").err().unwrap();
        assert!(error.path().as_str() == "b.vhd" && !error.to_string().contains('\n'), "{name:?}: {error}");
    }
    for target in ["/x.vhd", "a/../../x.vhd", "a\nb.vhd", "a\0b.vhd", &format!("{long}.vhd"), &"y/".repeat(600)] {
        let storage = Arc::new(MemoryStorage::new());
        storage.put("x.alias.vhd", target).unwrap();
        let error = open(&storage, "x.alias.vhd").err().unwrap();
        assert!(!error.to_string().contains('\n'), "{target:?}: {error}");
    }
    for chain in [r#"["../a","x.alias.vhd"]"#, r#"["","x.alias.vhd"]"#, r#"["a\u0000","x.alias.vhd"]"#] {
        let storage = Arc::new(MemoryStorage::new());
        Image::new(1, SIZE, &[]).stored(Kind::Plain).put(&storage, "x");
        storage.put(".a.vhd.merge.json", format!("{{\"chain\":{chain}}}")).unwrap();
        assert_eq!(open(&storage, "x.alias.vhd").err().unwrap().kind(), ErrorKind::Escape, "{chain}");
    }
}

#[test]
fn a_block_size_that_changes_under_a_cached_block_does_no_harm() {
    let storage = Arc::new(MemoryStorage::new());
    let image = Image::new(1, SIZE, &[(0, 1), (1, 2), (2, 3)]).stored(Kind::Gzip);
    image.put(&storage, "a");
    let context = context(&storage);
    let name = ObjectPath::new("a.alias.vhd").unwrap();
    assert_eq!(read(&vhd::open(&context, &name, None).unwrap(), 0), Ok(vec![1; BLOCK]));
    for block in [2 * BLOCK, BLOCK / 2] {
        let other = Image { block, ..Image::new(1, SIZE, &[]) };
        storage.overwrite("data/a.vhd/header", gzip(&other.header())).unwrap();
        let disk = vhd::open(&context, &name, None).unwrap();
        let error = read(&disk, 0).unwrap_err();
        assert!(error.contains("block 0"), "{error}");
    }
}

#[test]
fn a_file_whose_first_footer_is_damaged_is_read_by_its_last_at_once() {
    let storage = Arc::new(MemoryStorage::new());
    let mut file = Image::new(1, SIZE, &[(0, 1), (1, 2)]).flat();
    file[100] ^= 1;
    // As new as a file can be: its time does not yet prove that it stays as it is.
    storage.put("a.vhd", file).unwrap();
    let start = Instant::now();
    let disk = open(&storage, "a.vhd").unwrap();
    assert_eq!((read(&disk, 0), read(&disk, 1)), (Ok(vec![1; BLOCK]), Ok(vec![2; BLOCK])));
    assert!(start.elapsed() < Duration::from_secs(1), "{:?}", start.elapsed());
}

#[test]
fn a_chain_that_is_longer_than_any_or_leads_to_itself_ends() {
    let storage = Arc::new(MemoryStorage::new());
    Image::new(7, SIZE, &[]).child_of(7, "self.vhd").put(&storage, "self");
    assert_eq!(open(&storage, "self.vhd").err().unwrap().kind(), ErrorKind::Damaged);
    // Three in a circle, with a tail: the uuids agree all the way.
    for (number, parent) in [(1, 2), (2, 3), (3, 1), (4, 1)] {
        Image::new(number, SIZE, &[]).child_of(parent, &format!("c{parent}.vhd")).put(&storage, &format!("c{number}"));
    }
    for name in ["c1.vhd", "c4.vhd"] {
        let error = open(&storage, name).err().unwrap();
        assert!(error.kind() == ErrorKind::Damaged && error.to_string().contains("loop"), "{error}");
    }
    // The same image by ever new names is the same image.
    let alias = Image::new(9, SIZE, &[]).child_of(9, "e2.alias.vhd").stored(Kind::Plain);
    alias.put(&storage, "e1");
    storage.put("e2.alias.vhd", "data/../data/e1.vhd").unwrap();
    assert_eq!(open(&storage, "e1.alias.vhd").err().unwrap().kind(), ErrorKind::Damaged);
    assert_eq!(Footer::parse(&alias.footer()).unwrap().uuid, id(9));
}
