//! Objects that are read and written in order: they are the same as those that are read and written as a whole, and of what is
//! damaged the end is never reached.

#[allow(dead_code, reason = "each test file uses its part of the module")]
mod places;

use std::fs::File;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use places::{ALGORITHMS, KEY, encrypt, key, path, put_markers};
use storage::{
    EncryptedStorage, ErrorKind, Existing, Fault, FaultyStorage, LocalStorage, MemoryStorage, ObjectPath, Operation,
    Result, Storage, Stream, WritableStorage,
};

const MIB: usize = 1 << 20;
/// Around what the ciphers and our pieces are multiples of.
const LENGTHS: [usize; 16] =
    [0, 1, 15, 16, 17, 31, 63, 64, 65, 1000, MIB - 1, MIB, MIB + 1, 2 * MIB, 3 * MIB - 16, 3 * MIB + 77];
const AUTHENTICATED: [&str; 2] = ["chacha20-poly1305", "aes-256-gcm"];

fn encrypted(memory: &Arc<MemoryStorage>, algorithm: &str) -> Arc<dyn WritableStorage> {
    put_markers(memory, algorithm, KEY);
    EncryptedStorage::detect_writable(memory.clone(), key(KEY)).unwrap()
}

/// A test on every storage, which it is given by name.
fn on_every_place(test: impl Fn(&str, &Arc<dyn WritableStorage>)) {
    let folder = tempfile::tempdir().unwrap();
    let plain: [(&str, Arc<dyn WritableStorage>); 3] = [
        ("local", Arc::new(LocalStorage::open(folder.path()).unwrap())),
        ("memory", Arc::new(MemoryStorage::with_power_cuts())),
        ("faulty without a rule", Arc::new(FaultyStorage::new(Arc::new(MemoryStorage::new())))),
    ];
    plain.iter().for_each(|(name, storage)| test(name, storage));
    for algorithm in ALGORITHMS {
        let storage = encrypted(&Arc::default(), algorithm);
        test(algorithm, &storage);
        test(&format!("faulty, {algorithm}"), &(Arc::new(FaultyStorage::new(storage)) as _));
    }
}

fn bytes(len: usize) -> Vec<u8> {
    (0..=250).cycle().take(len).collect()
}

/// Reads to the end, so many bytes at a time.
fn read_all(stream: &mut dyn Stream, at_once: usize) -> Result<Vec<u8>> {
    let (mut all, mut buffer) = (Vec::new(), vec![0; at_once]);
    loop {
        match stream.read(&mut buffer)? {
            0 => return Ok(all),
            read => all.extend_from_slice(&buffer[..read]),
        }
    }
}

fn write_all(storage: &dyn WritableStorage, bytes: &[u8], at_once: usize) -> Result<()> {
    let mut stream = storage.create_stream(&path("file"))?;
    bytes.chunks(at_once).try_for_each(|bytes| stream.append(bytes))?;
    stream.finish()
}

/// The rule of a fault that such an operation meets after `count` others.
fn nth(met: Operation, count: u64, fault: Fault) -> impl Fn(Operation, &ObjectPath) -> Option<Fault> {
    let seen = AtomicU64::new(0);
    move |operation, _| (operation == met && seen.fetch_add(1, Ordering::SeqCst) == count).then_some(fault)
}

#[test]
fn what_is_written_in_order_is_read_as_a_whole_and_the_other_way_round() {
    on_every_place(|name, storage| {
        for len in LENGTHS {
            for at_once in [77, MIB, 2 * MIB].into_iter().filter(|at_once| len <= MIB || *at_once >= MIB) {
                let what = format!("{name}: {len} bytes, {at_once} at once");
                let (file, bytes) = (path("file"), bytes(len));
                write_all(&**storage, &bytes, at_once).unwrap();
                assert!(storage.read(&file, len as u64).unwrap() == bytes, "{what}");
                let mut buffer = vec![0; len + 1];
                assert_eq!(storage.open(&file).unwrap().read_at(0, &mut buffer).unwrap(), len, "{what}");
                assert!(buffer[..len] == bytes, "{what}");
                let stored = storage.stat(&file).unwrap().size;
                storage.write(&file, &bytes, Existing::Replace).unwrap();
                assert_eq!(storage.stat(&file).unwrap().size, stored, "{what}");
                let mut stream = storage.open_stream(&file).unwrap();
                assert_eq!(stream.size(), len as u64, "{what}");
                assert!(read_all(&mut *stream, at_once).unwrap() == bytes, "{what}");
                assert_eq!(stream.read(&mut [0]).unwrap(), 0, "{what}: it stays at the end");
                storage.remove(&file).unwrap();
            }
        }
        write_all(&**storage, b"", 1).unwrap();
        assert_eq!(write_all(&**storage, b"", 1).unwrap_err().kind(), ErrorKind::Exists, "{name}");
        assert_eq!(storage.open_stream(&path("missing")).err().unwrap().kind(), ErrorKind::NotFound, "{name}");
        storage.remove(&path("file")).unwrap();
    });
}

#[test]
fn an_object_that_is_too_long_to_be_opened_is_read_and_written_in_order() {
    let long = bytes(64 * MIB + 12_345);
    for algorithm in AUTHENTICATED {
        let memory = Arc::new(MemoryStorage::new());
        let storage = encrypted(&memory, algorithm);
        write_all(&*storage, &long, 5 * MIB).unwrap();
        assert_eq!(storage.open(&path("file")).err().unwrap().kind(), ErrorKind::TooLarge, "{algorithm}");
        // By the other hand, both ways.
        assert!(storage.read(&path("file"), u64::MAX).unwrap() == long, "{algorithm}");
        memory.put("file", encrypt(algorithm, KEY, &long)).unwrap();
        let mut stream = storage.open_stream(&path("file")).unwrap();
        assert!(read_all(&mut *stream, 3 * MIB).unwrap() == long, "{algorithm}");
    }
}

#[test]
fn of_a_damaged_object_neither_the_end_nor_its_last_bytes_are_read() {
    for algorithm in AUTHENTICATED {
        for len in [0, 1, 100, MIB + 100] {
            let memory = Arc::new(MemoryStorage::new());
            let storage = encrypted(&memory, algorithm);
            let stored = encrypt(algorithm, KEY, &bytes(len));
            let middle = [stored.len() / 2, 12 + len / 3].into_iter().filter(|_| len > 0);
            let flipped = [0, 11, stored.len() - 16, stored.len() - 1].into_iter().chain(middle).map(|at| {
                let mut changed = stored.clone();
                changed[at] ^= 0x10;
                (format!("byte {at} flipped"), changed)
            });
            let cut = [28, stored.len() - 1].into_iter().filter(|to| (28..stored.len()).contains(to));
            let cut = cut.map(|to| (format!("cut to {to}"), stored[..to].to_vec()));
            let longer = ("longer".to_owned(), [&stored[..], &[0]].concat());
            for (what, changed) in flipped.chain(cut).chain([longer]) {
                let what = format!("{algorithm}: {len} bytes, {what}");
                memory.put("file", changed).unwrap();
                let mut stream = storage.open_stream(&path("file")).unwrap();
                let mut read = 0;
                let error = loop {
                    match stream.read(&mut [0; 50]) {
                        Ok(0) => panic!("{what}: it has an end"),
                        Ok(count) => read += count,
                        Err(error) => break error,
                    }
                };
                assert_eq!(error.kind(), ErrorKind::Authentication, "{what}");
                assert!(error.to_string().starts_with("read 'file': does not decrypt, it is damaged"), "{error}");
                assert!(read <= len / MIB * MIB, "{what}: {read} bytes came");
                assert_eq!(stream.read(&mut [0; 50]).unwrap_err().kind(), ErrorKind::Authentication, "{what}: again");
            }
        }
        let memory = Arc::new(MemoryStorage::new());
        let storage = encrypted(&memory, algorithm);
        memory.put("file", vec![0; 27]).unwrap();
        let error = storage.open_stream(&path("file")).err().unwrap();
        assert_eq!(error.kind(), ErrorKind::Authentication, "{algorithm}");
        assert!(error.to_string().ends_with(": 27 bytes, at least 28 were expected"), "{error}");
    }
}

#[test]
fn an_object_that_is_cut_short_or_fails_while_it_is_read_has_no_end() {
    for algorithm in AUTHENTICATED {
        let memory = Arc::new(MemoryStorage::new());
        put_markers(&memory, algorithm, KEY);
        memory.put("file", encrypt(algorithm, KEY, &bytes(3 * MIB))).unwrap();
        let faulty = Arc::new(FaultyStorage::new(memory));
        let storage = EncryptedStorage::detect(faulty.clone(), key(KEY)).unwrap();
        for (fault, kind) in [(Fault::Short, ErrorKind::Authentication), (Fault::Errno(5), ErrorKind::Io)] {
            for count in 0..4 {
                faulty.set_rule(nth(Operation::ReadAt, count, fault));
                let read = storage.open_stream(&path("file")).and_then(|mut stream| read_all(&mut *stream, MIB));
                let error = read.expect_err("it has an end");
                assert_eq!((error.kind(), error.path()), (kind, &path("file")), "{algorithm}, {fault:?} after {count}");
            }
        }
    }
}

#[test]
fn a_write_that_fails_is_an_error_and_leaves_no_object_that_is_read() {
    for algorithm in AUTHENTICATED {
        let memory = Arc::new(MemoryStorage::new());
        put_markers(&memory, algorithm, KEY);
        let faulty = Arc::new(FaultyStorage::new(memory.clone()));
        let storage = EncryptedStorage::detect_writable(faulty.clone(), key(KEY)).unwrap();
        faulty.reset_counts();
        write_all(&*storage, &bytes(3 * MIB + 1), MIB / 2).unwrap();
        let counts = [Operation::Create, Operation::WriteAt, Operation::Sync].map(|it| faulty.count(it));
        assert_eq!(counts, [1, 4, 1], "{algorithm}: written in pieces, the last with the tag");
        for count in 0..4 {
            storage.remove(&path("file")).unwrap();
            faulty.set_rule(nth(Operation::WriteAt, count, Fault::Half(28)));
            let error = write_all(&*storage, &bytes(3 * MIB + 1), MIB / 2).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::NoSpace, "{algorithm}: after {count}");
            faulty.set_rule(|_, _| None);
            let read = storage.open_stream(&path("file")).and_then(|mut stream| read_all(&mut *stream, MIB));
            assert_eq!(read.unwrap_err().kind(), ErrorKind::Authentication, "{algorithm}: after {count}");
        }
    }
}

#[test]
fn what_is_longer_than_an_encryption_protects_is_refused_unread_and_unwritten() {
    const GIB: u64 = 1 << 30;
    for (algorithm, longest, overhead) in [
        ("chacha20-poly1305", 256 * GIB - 128, 28),
        ("aes-256-gcm", 64 * GIB - 32, 28),
        ("aes-256-cbc", 64 * MIB as u64 - 32, 32),
    ] {
        let folder = tempfile::tempdir().unwrap();
        let local = Arc::new(LocalStorage::open(folder.path()).unwrap());
        let memory = Arc::new(MemoryStorage::new());
        put_markers(&memory, algorithm, KEY);
        for name in ["encryption.json", "metadata.json"] {
            local.write(&path(name), &memory.read(&path(name), 1000).unwrap(), Existing::Refuse).unwrap();
        }
        let storage = EncryptedStorage::detect_writable(local, key(KEY)).unwrap();
        storage.check_size(&path("file"), longest).unwrap();
        assert_eq!(storage.check_size(&path("file"), longest + 1).unwrap_err().kind(), ErrorKind::TooLarge);
        storage.check_size(&path("plain.checksum"), u64::MAX).unwrap();
        // Holes.
        let file = File::create(folder.path().join("file")).unwrap();
        file.set_len(longest + overhead).unwrap();
        let opened = storage.open_stream(&path("file")).map(drop).map_err(|error| error.kind());
        // Of CBC it is decrypted then.
        let is_cbc = algorithm == "aes-256-cbc";
        assert_eq!(opened, if is_cbc { Err(ErrorKind::Authentication) } else { Ok(()) }, "{algorithm}");
        file.set_len(longest + overhead + 1).unwrap();
        let error = storage.open_stream(&path("file")).err().unwrap();
        assert_eq!(error.kind(), ErrorKind::TooLarge, "{error}");
        assert!(error.to_string().starts_with("open 'file': it "), "{error}");
    }
    let storage = encrypted(&Arc::default(), "aes-256-cbc");
    let mut stream = storage.create_stream(&path("file")).unwrap();
    stream.append(&bytes(64 * MIB - 32)).unwrap();
    assert_eq!(stream.append(&[0]).unwrap_err().kind(), ErrorKind::TooLarge);
}
