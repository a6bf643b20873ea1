//! What every storage promises, tried on each of them.

#[allow(dead_code, reason = "each test file uses its part of the module")]
mod places;

use std::sync::Arc;

use places::{ALGORITHMS, Encrypted, Local, Memory, Place, path};
use storage::{Entry, ErrorKind, FaultyStorage, Kind, MemoryStorage};

/// A test on every storage; a failure names the one it happened on.
fn on_every_place(test: impl Fn(&dyn Place)) {
    let run = |name: &str, place: &dyn Place| {
        eprintln!("on {name}");
        test(place);
    };
    run("local", &Local::new());
    run("memory", &Memory(Arc::new(MemoryStorage::new())));
    run("faulty without a rule", &Undisturbed(Memory(Arc::new(MemoryStorage::new()))));
    for algorithm in ALGORITHMS {
        run(algorithm, &Encrypted::new(algorithm));
    }
}

/// Memory through a [`FaultyStorage`] that is told nothing.
struct Undisturbed(Memory);

impl Place for Undisturbed {
    fn storage(&self) -> Arc<dyn storage::Storage> {
        Arc::new(FaultyStorage::new(self.0.storage()))
    }

    fn put(&self, path: &str, plain: &[u8]) {
        self.0.put(path, plain);
    }

    fn overwrite(&self, path: &str, plain: &[u8]) {
        self.0.overwrite(path, plain);
    }

    fn create_directory(&self, path: &str) {
        self.0.create_directory(path);
    }

    fn rename(&self, from: &str, to: &str) {
        self.0.rename(from, to);
    }

    fn remove_file(&self, path: &str) {
        self.0.remove_file(path);
    }

    fn stored_size(&self, plain: u64) -> u64 {
        self.0.stored_size(plain)
    }

    fn is_live(&self) -> bool {
        self.0.is_live()
    }
}

#[test]
fn reads_at_any_place_give_the_bytes_that_are_there() {
    on_every_place(|place| {
        let bytes: Vec<u8> = (0..=255).cycle().take(10_000).collect();
        place.put("a/file", &bytes);
        let object = place.storage().open(&path("a/file")).unwrap();
        for (offset, length) in [(0, 10_000), (0, 0), (0, 1), (1, 4096), (9_999, 1), (9_999, 2), (5_000, 9_000)] {
            let mut buffer = vec![0xee; length];
            let start = usize::try_from(offset).unwrap();
            let expected = &bytes[start..(start + length).min(bytes.len())];
            assert_eq!(object.read_at(offset, &mut buffer).unwrap(), expected.len(), "{length} bytes at {offset}");
            assert_eq!(&buffer[..expected.len()], expected, "{length} bytes at {offset}");
            assert!(buffer[expected.len()..].iter().all(|byte| *byte == 0xee), "{length} bytes at {offset}");
        }
        // Where the offsets of system calls end.
        const END: u64 = u64::MAX >> 1;
        for offset in [10_000, 10_001, END - 16, END - 3, END, END + 1, u64::MAX - 3, u64::MAX] {
            assert_eq!(object.read_at(offset, &mut [0; 16]).unwrap(), 0, "at {offset}");
        }
        assert_eq!(object.stat().unwrap().size, 10_000);
    });
}

#[test]
fn a_read_gives_the_whole_object_or_says_it_is_too_large() {
    on_every_place(|place| {
        for length in [0, 1, 15, 16, 17, 100, 3 << 20] {
            let bytes = vec![0x5a; length];
            place.put("file", &bytes);
            let limit = length as u64;
            for limit in [limit, limit + 1, limit + 17, 1 << 40, u64::MAX] {
                assert_eq!(place.storage().read(&path("file"), limit).unwrap(), bytes, "{length} of {limit}");
            }
            for limit in [limit.checked_sub(1), limit.checked_sub(16), limit.checked_sub(17), limit.checked_div(2)] {
                let Some(limit) = limit.filter(|limit| *limit < length as u64) else { continue };
                let error = place.storage().read(&path("file"), limit).unwrap_err();
                assert_eq!(error.kind(), ErrorKind::TooLarge, "{length} of {limit}: {error}");
                let expected = format!("read 'file': at most {limit} bytes were expected, it has more");
                assert_eq!(error.to_string(), expected);
            }
        }
    });
}

#[test]
fn what_is_not_there_or_is_of_another_kind_is_said_so() {
    on_every_place(|place| {
        place.put("folder/file", b"bytes");
        let storage = place.storage();
        for (name, opened, listed, stat) in [
            ("missing", Some(ErrorKind::NotFound), Some(ErrorKind::NotFound), Some(ErrorKind::NotFound)),
            ("missing/file", Some(ErrorKind::NotFound), Some(ErrorKind::NotFound), Some(ErrorKind::NotFound)),
            ("folder", Some(ErrorKind::IsDirectory), None, None),
            ("", Some(ErrorKind::IsDirectory), None, None),
            ("folder/file", None, Some(ErrorKind::NotDirectory), None),
            (
                "folder/file/x",
                Some(ErrorKind::NotDirectory),
                Some(ErrorKind::NotDirectory),
                Some(ErrorKind::NotDirectory),
            ),
        ] {
            let name = path(name);
            assert_eq!(storage.open(&name).err().map(|error| error.kind()), opened, "open {name}");
            assert_eq!(storage.read(&name, 100).err().map(|error| error.kind()), opened, "read {name}");
            assert_eq!(storage.list(&name).err().map(|error| error.kind()), listed, "list {name}");
            assert_eq!(storage.stat(&name).err().map(|error| error.kind()), stat, "stat {name}");
            if let Some(error) = storage.open(&name).err() {
                assert_eq!(error.path(), &name);
                assert!(error.to_string().starts_with(&format!("open '{name}': ")), "{error}");
            }
        }
        let long = path(&"n".repeat(300));
        assert_eq!(storage.stat(&long).unwrap_err().kind(), ErrorKind::NotFound);
    });
}

#[test]
fn a_listing_is_complete() {
    on_every_place(|place| {
        let mut expected = Vec::new();
        let names = ["a b", "é", "line\nbreak", ".hidden", "-x", "文", "con:colon", "back\\slash"];
        for name in names {
            place.put(&format!("many/{name}"), name.as_bytes());
            expected.push(Entry { name: name.to_owned(), is_directory: false });
        }
        // More than the system hands out at once.
        for name in (0..500).map(|i| format!("{i:04}.vhd")).chain(["data", "empty"].map(str::to_owned)) {
            place.create_directory(&format!("many/{name}"));
            expected.push(Entry { name, is_directory: true });
        }
        place.put("many/data/inner", b"not a direct child");
        place.put("many-others/file", b"a name that begins alike");
        let mut found = place.storage().list(&path("many")).unwrap();
        found.sort();
        expected.sort();
        assert_eq!(found, expected);
        assert_eq!(place.storage().list(&path("many/empty")).unwrap(), []);

        let root = place.storage().list(&path("")).unwrap();
        let is_listed = |name: &str| root.iter().any(|entry| entry.name == name && entry.is_directory);
        assert!(is_listed("many") && is_listed("many-others"), "{root:?}");
    });
}

#[test]
fn a_listing_follows_what_is_added_and_removed() {
    on_every_place(|place| {
        place.put("vm/1", b"");
        let storage = place.storage();
        let names = || {
            let mut names: Vec<_> = storage.list(&path("vm")).unwrap().into_iter().map(|entry| entry.name).collect();
            names.sort();
            names
        };
        assert_eq!(names(), ["1"]);
        place.put("vm/2", b"");
        assert_eq!(names(), ["1", "2"]);
        place.remove_file("vm/1");
        assert_eq!(names(), ["2"]);
        place.rename("vm/2", "vm/3");
        assert_eq!(names(), ["3"]);
        place.remove_file("vm/3");
        assert_eq!(names(), [""; 0]);
    });
}

#[test]
fn an_open_object_outlives_its_name() {
    on_every_place(|place| {
        place.put("file", b"of old");
        let storage = place.storage();
        let object = storage.open(&path("file")).unwrap();
        let before = object.stat().unwrap();
        assert_eq!((before.kind, before.size, before.links), (Kind::File, 6, 1));
        assert_eq!(before.inode, storage.stat(&path("file")).unwrap().inode);

        place.put("file", b"what replaces it");
        assert_ne!(before.inode, storage.stat(&path("file")).unwrap().inode);
        let replaced = object.stat().unwrap();
        assert_eq!((replaced.inode, replaced.size, replaced.links), (before.inode, 6, 0));

        let object = storage.open(&path("file")).unwrap();
        place.rename("file", "moved");
        assert_eq!(object.stat().unwrap().links, 1);
        assert_eq!(object.stat().unwrap().inode, storage.stat(&path("moved")).unwrap().inode);
        place.remove_file("moved");
        assert_eq!(object.stat().unwrap().links, 0);
        let mut buffer = [0; 32];
        assert_eq!(object.read_at(0, &mut buffer).unwrap(), 16);
        assert_eq!(&buffer[..16], b"what replaces it");
    });
}

#[test]
fn what_is_written_in_place_keeps_its_identity_and_shows_a_new_time() {
    on_every_place(|place| {
        place.put("file", b"before");
        let storage = place.storage();
        let object = storage.open(&path("file")).unwrap();
        let before = storage.stat(&path("file")).unwrap();
        assert_eq!(before.modified, object.stat().unwrap().modified);
        // Longer than the granularity of a file system's clock.
        std::thread::sleep(std::time::Duration::from_millis(30));
        place.overwrite("file", b"after, and longer");
        let after = storage.stat(&path("file")).unwrap();
        assert_eq!(after.inode, before.inode);
        assert!(after.modified > before.modified, "{:?} {:?}", after.modified, before.modified);
        // How a reader notices that what it holds is out of date.
        assert_eq!(object.stat().unwrap().modified, after.modified);
        assert_eq!(storage.read(&path("file"), 100).unwrap(), b"after, and longer");
        let mut buffer = [0; 32];
        let count = object.read_at(0, &mut buffer).unwrap();
        let expected: &[u8] = if place.is_live() { b"after, and longer" } else { b"before" };
        assert_eq!(&buffer[..count], expected);
    });
}

#[test]
fn a_stat_tells_kind_and_stored_size() {
    on_every_place(|place| {
        for length in [0, 1, 16, 49] {
            place.put("folder/file", &vec![1; length]);
            let stat = place.storage().stat(&path("folder/file")).unwrap();
            assert_eq!((stat.kind, stat.size), (Kind::File, place.stored_size(length as u64)), "{length} bytes");
        }
        for name in ["folder", ""] {
            assert_eq!(place.storage().stat(&path(name)).unwrap().kind, Kind::Directory, "'{name}'");
        }
    });
}

#[test]
fn objects_are_read_by_many_threads_at_once() {
    on_every_place(|place| {
        let bytes: Vec<u8> = (0..=255).cycle().take(100_000).collect();
        place.put("file", &bytes);
        let storage = place.storage();
        let object = storage.open(&path("file")).unwrap();
        std::thread::scope(|scope| {
            for thread in 0..4 {
                let (object, storage, bytes) = (&object, &storage, &bytes);
                scope.spawn(move || {
                    for round in 0..20 {
                        let offset = (thread * 20 + round) * 1_000;
                        let mut buffer = [0; 1_000];
                        object.read_at(offset as u64, &mut buffer).unwrap();
                        assert_eq!(buffer, bytes[offset..offset + 1_000]);
                    }
                    assert_eq!(&storage.read(&path("file"), 100_000).unwrap(), bytes);
                });
            }
        });
    });
}
