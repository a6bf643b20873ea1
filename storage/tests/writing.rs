//! What every storage that can be written promises, tried on each of them.

#[allow(dead_code, reason = "each test file uses its part of the module")]
mod places;

use std::sync::Arc;

use places::{ALGORITHMS, KEY, key, path, put_markers};
use storage::{
    EncryptedStorage, ErrorKind, Existing, FaultyStorage, Kind, LocalStorage, MemoryStorage, Result, WritableStorage,
    create_directories, publish, publish_rename, remove_tree,
};

/// A test on every storage; a failure names the one it happened on. The second argument says whether objects can be written
/// in pieces.
fn on_every_place(test: impl Fn(&Arc<dyn WritableStorage>, bool)) {
    let run = |name: &str, storage: Arc<dyn WritableStorage>, in_pieces| {
        eprintln!("on {name}");
        test(&storage, in_pieces);
    };
    let folder = tempfile::tempdir().unwrap();
    run("local", Arc::new(LocalStorage::open(folder.path()).unwrap()), true);
    run("memory", Arc::new(MemoryStorage::new()), true);
    run("memory with power cuts", Arc::new(MemoryStorage::with_power_cuts()), true);
    run("faulty without a rule", Arc::new(FaultyStorage::new(Arc::new(MemoryStorage::new()))), true);
    for algorithm in ALGORITHMS {
        let memory = MemoryStorage::new();
        put_markers(&memory, algorithm, KEY);
        run(algorithm, EncryptedStorage::detect_writable(Arc::new(memory), key(KEY)).unwrap(), false);
    }
}

fn kind<T>(result: Result<T>) -> ErrorKind {
    result.err().expect("it fails").kind()
}

fn names(storage: &Arc<dyn WritableStorage>, folder: &str) -> Vec<String> {
    let mut names: Vec<_> = storage.list(&path(folder)).unwrap().into_iter().map(|entry| entry.name).collect();
    names.sort();
    names
}

#[test]
fn what_is_written_is_read() {
    on_every_place(|storage, _| {
        for length in [0, 1, 15, 16, 17, 100_000] {
            let bytes: Vec<u8> = (0..=255).cycle().take(length).collect();
            storage.write(&path("file"), &bytes, Existing::Replace).unwrap();
            assert_eq!(storage.read(&path("file"), 1 << 20).unwrap(), bytes, "{length} bytes");
        }
        assert_eq!(kind(storage.write(&path("file"), b"", Existing::Refuse)), ErrorKind::Exists);
        assert_eq!(storage.read(&path("file"), 1 << 20).unwrap().len(), 100_000);
        let inode = storage.stat(&path("file")).unwrap().inode;
        storage.write(&path("file"), b"short", Existing::Replace).unwrap();
        assert_eq!(storage.read(&path("file"), 5).unwrap(), b"short");
        assert_eq!(storage.stat(&path("file")).unwrap().inode, inode, "in place");
        storage.write(&path("other"), b"new", Existing::Refuse).unwrap();
        assert_eq!(storage.read(&path("other"), 5).unwrap(), b"new");
        assert_eq!(kind(storage.write(&path("nowhere/file"), b"", Existing::Replace)), ErrorKind::NotFound);
        assert_eq!(kind(storage.write(&path("file/file"), b"", Existing::Replace)), ErrorKind::NotDirectory);
        assert_eq!(kind(storage.write(&path(""), b"", Existing::Replace)), ErrorKind::IsDirectory);
        let stat = storage.write_and_stat(&path("stated"), b"new", Existing::Refuse).unwrap();
        assert_eq!((stat, stat.kind), (storage.stat(&path("stated")).unwrap(), Kind::File));
        assert_eq!(kind(storage.write_and_stat(&path("stated"), b"", Existing::Refuse)), ErrorKind::Exists);
        assert_eq!(storage.read(&path("stated"), 5).unwrap(), b"new");
        storage.write_and_sync(&path("synced"), b"new", Existing::Refuse).unwrap();
        assert_eq!(kind(storage.write_and_sync(&path("synced"), b"", Existing::Refuse)), ErrorKind::Exists);
        assert_eq!(storage.read(&path("synced"), 5).unwrap(), b"new");
        storage.sync(&path("file")).unwrap();
        storage.sync(&path("")).unwrap();
        storage.sync_each(&["", "file", "synced"].map(path)).unwrap();
        assert_eq!(kind(storage.sync_each(&["file", "missing", ""].map(path))), ErrorKind::NotFound);
        storage.sync_tree(&path(""), &storage.mark().unwrap()).unwrap();
        assert_eq!(kind(storage.sync(&path("missing"))), ErrorKind::NotFound);
    });
}

#[test]
fn an_object_is_written_in_pieces_and_its_readers_see_them() {
    on_every_place(|storage, in_pieces| {
        if !in_pieces {
            assert_eq!(kind(storage.create(&path("file"))), ErrorKind::Unsupported);
            storage.write(&path("file"), b"", Existing::Replace).unwrap();
            assert_eq!(kind(storage.open_to_write(&path("file"))), ErrorKind::Unsupported);
            return;
        }
        let writer = storage.create(&path("file")).unwrap();
        let reader = storage.open(&path("file")).unwrap();
        writer.write_at(4, b"5678").unwrap();
        writer.write_at(0, b"12").unwrap();
        writer.sync().unwrap();
        assert_eq!(storage.read(&path("file"), 8).unwrap(), [b"12".as_slice(), &[0; 2], b"5678"].concat());
        assert_eq!(kind(storage.create(&path("file"))), ErrorKind::Exists);
        let again = storage.open_to_write(&path("file")).unwrap();
        again.write_at(2, b"34").unwrap();
        let mut buffer = [0; 8];
        assert_eq!((reader.read_at(0, &mut buffer).unwrap(), &buffer), (8, b"12345678"));
        assert_eq!((writer.read_at(1, &mut buffer).unwrap(), writer.stat().unwrap().size), (7, 8));
        again.set_len(3).unwrap();
        again.set_len(5).unwrap();
        assert_eq!(storage.read(&path("file"), 8).unwrap(), b"123\0\0");
        assert_eq!(kind(storage.open_to_write(&path("missing"))), ErrorKind::NotFound);
        assert_eq!(kind(storage.open_to_write(&path(""))), ErrorKind::IsDirectory);
        assert_eq!(kind(storage.create(&path("nowhere/file"))), ErrorKind::NotFound);
    });
}

#[test]
fn bytes_are_copied_from_one_object_to_another_as_far_as_there_are_any() {
    on_every_place(|storage, in_pieces| {
        if !in_pieces {
            return;
        }
        // More than is copied at a time, and not a multiple of it.
        let bytes: Vec<u8> = (0..=250).cycle().take((2 << 20) + 4567).collect();
        storage.write(&path("source"), &bytes, Existing::Refuse).unwrap();
        let source = storage.open(&path("source")).unwrap();
        let copy = storage.create(&path("copy")).unwrap();
        copy.write_at(0, b"before").unwrap();
        let len = bytes.len() as u64;
        for (from, to, asked, copied) in [
            (0, 6, len, len),
            (1000, 3, 5000, 5000),
            (len - 7, 1, 100, 7),
            (len, 0, 9, 0),
            (len + 5, 0, 9, 0),
            (4, 5, 0, 0),
        ] {
            let size = usize::try_from(copy.stat().unwrap().size).unwrap();
            let mut expected = storage.read(&path("copy"), 4 << 20).unwrap();
            assert_eq!(copy.copy_from(&*source, from, to, asked).unwrap(), copied, "{from} to {to}, {asked} bytes");
            let part = |at: u64| usize::try_from(at).unwrap();
            expected.resize(size.max(if copied > 0 { part(to + copied) } else { 0 }), 0);
            expected[part(to)..part(to + copied)].copy_from_slice(&bytes[part(from.min(len))..][..part(copied)]);
            assert!(storage.read(&path("copy"), 4 << 20).unwrap() == expected, "{from} to {to}, {asked} bytes");
        }
        // From one storage to another.
        let other = MemoryStorage::new();
        other.put("source", *b"of another").unwrap();
        let source = storage::Storage::open(&other, &path("source")).unwrap();
        assert_eq!(copy.copy_from(&*source, 3, 0, 7).unwrap(), 7);
        assert_eq!(storage.read(&path("copy"), 4 << 20).unwrap()[..7], *b"another");
    });
}

#[test]
fn a_rename_takes_the_place_of_a_file_and_folders_move_whole() {
    on_every_place(|storage, _| {
        create_directories(&**storage, &path("a/b/c")).unwrap();
        storage.write(&path("a/b/c/file"), b"moved", Existing::Refuse).unwrap();
        storage.write(&path("a/old"), b"of old", Existing::Refuse).unwrap();
        let old = storage.open(&path("a/old")).unwrap();
        storage.rename(&path("a/b/c/file"), &path("a/old")).unwrap();
        assert_eq!(storage.read(&path("a/old"), 9).unwrap(), b"moved");
        assert_eq!(old.stat().unwrap().links, 0);
        assert_eq!(names(storage, "a/b/c"), [""; 0]);
        storage.rename(&path("a/old"), &path("a/b/c/new")).unwrap();
        storage.rename(&path("a/b"), &path("d")).unwrap();
        assert_eq!(storage.read(&path("d/c/new"), 9).unwrap(), b"moved");
        assert_eq!(kind(storage.stat(&path("a/b"))), ErrorKind::NotFound);
        storage.rename(&path("d"), &path("d")).unwrap();
        storage.create_directory(&path("empty")).unwrap();
        assert_eq!(kind(storage.rename(&path("d"), &path("empty"))), ErrorKind::Exists);
        assert_eq!(kind(storage.rename(&path("missing"), &path("x"))), ErrorKind::NotFound);
        assert_eq!(kind(storage.rename(&path("d/c/new"), &path("nowhere/x"))), ErrorKind::NotFound);
        publish_rename(&**storage, &path("d/c/new"), &path("a/published")).unwrap();
        assert_eq!(names(storage, "a"), ["published"]);
    });
}

#[test]
fn files_are_moved_between_two_folders_one_after_the_other() {
    on_every_place(|storage, _| {
        create_directories(&**storage, &path("a/b")).unwrap();
        create_directories(&**storage, &path("c")).unwrap();
        for (name, bytes) in [("a/b/1", "moved"), ("a/b/2", "too"), ("c/2", "of old")] {
            storage.write(&path(name), bytes.as_bytes(), Existing::Refuse).unwrap();
        }
        let moves = storage.moves(&path("a/b"), &path("c")).unwrap();
        moves.rename("1").unwrap();
        moves.rename("2").unwrap();
        assert_eq!(kind(moves.rename("1")), ErrorKind::NotFound);
        assert_eq!(kind(moves.rename("../b/2")), ErrorKind::Escape);
        assert_eq!((names(storage, "a/b"), names(storage, "c")), (vec![], vec!["1".to_owned(), "2".to_owned()]));
        assert_eq!(storage.read(&path("c/2"), 9).unwrap(), b"too");
        for (from, to) in [("a/x", "c"), ("a/b", "x")] {
            assert_eq!(kind(storage.moves(&path(from), &path(to)).map(drop)), ErrorKind::NotFound);
        }
    });
}

#[test]
fn only_files_and_empty_folders_are_removed_and_trees_whole() {
    on_every_place(|storage, _| {
        create_directories(&**storage, &path("a/b")).unwrap();
        storage.write(&path("a/b/file"), b"1", Existing::Refuse).unwrap();
        let open = storage.open(&path("a/b/file")).unwrap();
        assert_eq!(kind(storage.remove(&path("a/b"))), ErrorKind::IsDirectory);
        assert_eq!(kind(storage.remove_directory(&path("a/b"))), ErrorKind::NotEmpty);
        assert_eq!(kind(storage.remove_directory(&path("a/b/file"))), ErrorKind::NotDirectory);
        storage.remove(&path("a/b/file")).unwrap();
        assert_eq!(open.read_at(0, &mut [0; 2]).unwrap(), 1, "what is open stays");
        assert_eq!(kind(storage.remove(&path("a/b/file"))), ErrorKind::NotFound);
        storage.remove_directory(&path("a/b")).unwrap();
        assert_eq!(kind(storage.remove_directory(&path("a/b"))), ErrorKind::NotFound);
        assert_eq!(names(storage, "a"), [""; 0]);

        for name in ["t/1/2/file", "t/1/file", "t/3/file", "t/file"] {
            create_directories(&**storage, &path(name).parent()).unwrap();
            storage.write(&path(name), b"1", Existing::Refuse).unwrap();
        }
        remove_tree(&**storage, &path("t")).unwrap();
        assert_eq!(kind(storage.stat(&path("t"))), ErrorKind::NotFound);
        remove_tree(&**storage, &path("t")).unwrap();
        storage.write(&path("t"), b"1", Existing::Refuse).unwrap();
        remove_tree(&**storage, &path("t")).unwrap();
        assert_eq!(kind(storage.stat(&path("t"))), ErrorKind::NotFound);
        assert_eq!(names(storage, "a"), [""; 0]);
    });
}

#[test]
fn folders_are_made_where_they_are_missing_and_nothing_is_in_the_way() {
    on_every_place(|storage, _| {
        storage.create_directory(&path("a")).unwrap();
        assert_eq!(kind(storage.create_directory(&path("a"))), ErrorKind::Exists);
        assert_eq!(kind(storage.create_directory(&path(""))), ErrorKind::Exists);
        assert_eq!(kind(storage.create_directory(&path("b/c"))), ErrorKind::NotFound);
        create_directories(&**storage, &path("a/b/c")).unwrap();
        create_directories(&**storage, &path("a/b/c")).unwrap();
        assert_eq!(storage.stat(&path("a/b/c")).unwrap().kind, Kind::Directory);
        storage.write(&path("a/file"), b"", Existing::Refuse).unwrap();
        assert_eq!(kind(create_directories(&**storage, &path("a/file"))), ErrorKind::NotDirectory);
        assert_eq!(kind(create_directories(&**storage, &path("a/file/x"))), ErrorKind::NotDirectory);
    });
}

#[test]
fn a_touch_shows_a_new_time() {
    on_every_place(|storage, _| {
        storage.create_directory(&path("lock")).unwrap();
        storage.write(&path("file"), b"1", Existing::Refuse).unwrap();
        for name in ["lock", "file"] {
            let before = storage.stat(&path(name)).unwrap();
            // Longer than the granularity of a file system's clock.
            std::thread::sleep(std::time::Duration::from_millis(30));
            storage.touch(&path(name)).unwrap();
            let after = storage.stat(&path(name)).unwrap();
            assert!(after.modified > before.modified, "{name}");
            assert_eq!((after.inode, after.size), (before.inode, before.size), "{name}");
        }
        assert_eq!(kind(storage.touch(&path("missing"))), ErrorKind::NotFound);
        assert!(storage.room().unwrap().bytes > 0);
    });
}

#[test]
fn a_time_that_is_set_is_shown() {
    on_every_place(|storage, _| {
        storage.create_directory(&path("lock")).unwrap();
        storage.write(&path("file"), b"1", Existing::Refuse).unwrap();
        for name in ["lock", "file"] {
            let before = storage.stat(&path(name)).unwrap();
            let time = before.modified - std::time::Duration::from_micros(123_457);
            storage.set_modified(&path(name), time).unwrap();
            let after = storage.stat(&path(name)).unwrap();
            assert_eq!((after.modified, after.inode, after.size), (time, before.inode, before.size), "{name}");
            storage.touch(&path(name)).unwrap();
            assert!(storage.stat(&path(name)).unwrap().modified >= before.modified, "{name}");
        }
        assert_eq!(
            kind(storage.set_modified(&path("missing"), std::time::SystemTime::UNIX_EPOCH)),
            ErrorKind::NotFound
        );
    });
}

#[test]
fn what_is_published_appears_whole_and_leaves_nothing_else() {
    on_every_place(|storage, _| {
        storage.create_directory(&path("a")).unwrap();
        publish(&**storage, &path("a/file"), b"first").unwrap();
        let first = storage.open(&path("a/file")).unwrap();
        publish(&**storage, &path("a/file"), b"second").unwrap();
        assert_eq!(storage.read(&path("a/file"), 9).unwrap(), b"second");
        assert_eq!(first.stat().unwrap().links, 0, "the old file was replaced, not written over");
        assert_eq!(names(storage, "a"), ["file"]);
        assert_eq!(kind(publish(&**storage, &path("nowhere/file"), b"")), ErrorKind::NotFound);
    });
}

#[test]
fn an_encrypted_storage_that_was_made_opens_with_its_key_alone() {
    let memory: Arc<dyn WritableStorage> = Arc::new(MemoryStorage::new());
    let random = "01234567-89ab-4cde-8f01-23456789abcd";
    EncryptedStorage::initialize(&*memory, &key(KEY).unwrap(), random).unwrap();
    let written = EncryptedStorage::detect_writable(memory.clone(), key(KEY)).unwrap();
    written.write(&path("file"), b"secret", Existing::Refuse).unwrap();
    let stored = memory.read(&path("file"), 100).unwrap();
    assert_eq!(stored.len(), 6 + 28);
    assert!(!stored.windows(6).any(|part| part == b"secret"));
    written.write(&path("again"), b"secret", Existing::Refuse).unwrap();
    assert_ne!(memory.read(&path("again"), 100).unwrap(), stored, "each object has a nonce of its own");
    let other = key("another key of thirty-two bytes!");
    for (wrong, expected) in [(other, ErrorKind::Key), (None, ErrorKind::Key)] {
        assert_eq!(kind(EncryptedStorage::detect(memory.clone().reader(), wrong)), expected);
    }
    assert_eq!(memory.read(&path("encryption.json"), 99).unwrap(), br#"{"algorithm":"chacha20-poly1305"}"#);
    assert_eq!(memory.read(&path("metadata.json"), 99).unwrap().len(), 77);
}
