//! Keys, algorithms and damage.

#[allow(dead_code, reason = "each test file uses its part of the module")]
mod places;

use std::sync::Arc;

use places::{ALGORITHMS, Encrypted, KEY, Place, encrypt, from_hex, hex, key, path, put_markers};
use storage::{
    Capabilities, EncryptedStorage, EncryptionKey, ErrorKind, Fault, FaultyStorage, MemoryStorage, Operation, Storage,
};

const OTHER_KEY: &str = "00000000000000000000000000000000";

const EIO: i32 = rustix::io::Errno::IO.raw_os_error();

/// `hello world`, as Xen Orchestra decrypts it.
const VECTORS: [(&str, &str); 2] = [
    ("chacha20-poly1305", "000102030405060708090a0b208aa85f2bacd4f0148c915c003e0909c6f5e1c97afdb15937371a"),
    ("aes-256-gcm", "000102030405060708090a0b25db498e0480cc50af21a31433374fd67bf06e2ec17cca74f79f7d"),
];

/// The error of detecting `memory` with that key, as kind and text.
fn refusal(memory: &Arc<MemoryStorage>, key: Option<EncryptionKey>) -> (ErrorKind, String) {
    let error = EncryptedStorage::detect(memory.clone(), key).err().expect("it was accepted");
    (error.kind(), error.to_string())
}

/// Whether the storage hands out what is stored.
fn is_plain(memory: &Arc<MemoryStorage>, key: Option<EncryptionKey>) -> bool {
    memory.put("probe", "plain bytes").unwrap();
    let storage = EncryptedStorage::detect(memory.clone(), key).unwrap();
    storage.read(&path("probe"), 100).is_ok_and(|bytes| bytes == b"plain bytes")
}

#[test]
fn the_vectors_of_xen_orchestra_decrypt() {
    for (algorithm, stored) in VECTORS {
        let place = Encrypted::new(algorithm);
        place.memory.put("file", from_hex(stored)).unwrap();
        assert_eq!(place.storage().read(&path("file"), 11).unwrap(), b"hello world", "{algorithm}");
        assert_eq!(hex(&encrypt(algorithm, KEY, b"hello world")), stored, "the tests encrypt alike");
    }
}

#[test]
fn a_key_is_32_bytes_without_the_end_of_the_line() {
    for text in [KEY.to_owned(), format!("{KEY}\n"), format!("{KEY}\r\n")] {
        let place = Encrypted::new("chacha20-poly1305");
        let key = EncryptionKey::from_text(&text).unwrap();
        assert!(EncryptedStorage::detect(place.memory.clone(), Some(key)).is_ok(), "{text:?}");
    }
    assert!(EncryptionKey::from_text(&"é".repeat(16)).is_ok());
    for (text, length) in [
        (String::new(), 0),
        ("\n".to_owned(), 0),
        (KEY[1..].to_owned(), 31),
        (format!("{KEY}0"), 33),
        (format!("{KEY} "), 33),
        (format!("{KEY}\r"), 33),
        (format!("{KEY}\n\n"), 33),
        ("é".repeat(32), 64),
    ] {
        let error = EncryptionKey::from_text(&text).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Key);
        let expected = format!("the encryption key has {length} bytes, 32 characters (ASCII) were expected");
        assert_eq!(error.to_string(), expected);
    }
    assert_eq!(format!("{:?}", EncryptionKey::from_text(KEY).unwrap()), "EncryptionKey(..)");
}

#[test]
fn a_plain_repository_stays_as_it_is() {
    let memory = Arc::new(MemoryStorage::new());
    assert!(is_plain(&memory, None));
    memory.put("encryption.json", r#"{"algorithm":"none"}"#).unwrap();
    assert!(is_plain(&memory, None));
    assert!(is_plain(&memory, key(KEY)), "the key is not needed");
    memory.put("metadata.json", r#"{"random":"01234567-89ab-4cde-8f01-23456789abcd"}"#).unwrap();
    assert!(is_plain(&memory, None));
    assert!(is_plain(&memory, key(KEY)), "the key is not needed");
}

#[test]
fn an_encrypted_repository_needs_its_key() {
    for algorithm in ALGORITHMS {
        let memory = Arc::new(MemoryStorage::new());
        put_markers(&memory, algorithm, KEY);
        assert!(EncryptedStorage::detect(memory.clone(), key(KEY)).is_ok(), "{algorithm}");
        let (kind, text) = refusal(&memory, None);
        assert_eq!(kind, ErrorKind::Key);
        let expected = format!(
            "read 'encryption.json': the repository is encrypted ({algorithm}): give its key with --password-file, \
             --password-command or XOFS_PASSWORD"
        );
        assert_eq!(text, expected);
        let (kind, text) = refusal(&memory, key(OTHER_KEY));
        assert_eq!(kind, ErrorKind::Key, "{algorithm}");
        assert!(text.starts_with("read 'metadata.json': the encryption key is wrong: "), "{text}");
        assert!(!text.contains(OTHER_KEY), "{text}");
    }
}

#[test]
fn a_wrong_key_whose_padding_happens_to_be_right_is_noticed() {
    // About one wrong key in 256 leaves a valid padding behind; CBC has no tag to tell.
    let memory = Arc::new(MemoryStorage::new());
    put_markers(&memory, "aes-256-cbc", KEY);
    let mut texts = std::collections::BTreeSet::new();
    for i in 0..2_000 {
        let (kind, text) = refusal(&memory, key(&format!("{i:032}")));
        assert_eq!(kind, ErrorKind::Key, "key {i}");
        texts.insert(text);
    }
    assert_eq!(
        texts.into_iter().collect::<Vec<_>>(),
        [
            "read 'metadata.json': the encryption key is wrong: this file does not decrypt with it",
            "read 'metadata.json': the encryption key is wrong: what it decrypts to is no key check",
        ]
    );
}

#[test]
fn without_encryption_json_a_key_means_chacha() {
    let memory = Arc::new(MemoryStorage::new());
    put_markers(&memory, "chacha20-poly1305", KEY);
    memory.remove("encryption.json").unwrap();
    memory.put("file", from_hex(VECTORS[0].1)).unwrap();
    let storage = EncryptedStorage::detect(memory.clone(), key(KEY)).unwrap();
    assert_eq!(storage.read(&path("file"), 11).unwrap(), b"hello world");
    assert_eq!(refusal(&memory, key(OTHER_KEY)).0, ErrorKind::Key);

    memory.put("metadata.json", r#"{"random":"01234567-89ab-4cde-8f01-23456789abcd"}"#).unwrap();
    let plain = "read 'metadata.json': a key was given, but the repository is not encrypted: leave the key out";
    assert_eq!(refusal(&memory, key(KEY)), (ErrorKind::Key, plain.to_owned()));

    memory.remove("metadata.json").unwrap();
    let nothing = "read 'metadata.json': a key was given, but nothing here is encrypted: leave the key out";
    assert_eq!(refusal(&memory, key(KEY)), (ErrorKind::Key, nothing.to_owned()));
}

#[test]
fn markers_that_make_no_sense_are_said_so() {
    let memory = Arc::new(MemoryStorage::new());
    put_markers(&memory, "chacha20-poly1305", KEY);
    for (marker, expected) in [
        (r#"{"algorithm":"aes-128-ccm"}"#, "the encryption 'aes-128-ccm' is not supported"),
        (r#"{"algorithm":"CHACHA20-POLY1305"}"#, "the encryption 'CHACHA20-POLY1305' is not supported"),
        (r#"{"algorithm":""}"#, "the encryption '' is not supported"),
        ("{}", "{\"algorithm\": <name>} was expected: missing field `algorithm`"),
        (r#"{"algorithm":7}"#, "{\"algorithm\": <name>} was expected: invalid type"),
        ("", "{\"algorithm\": <name>} was expected: EOF"),
        ("\u{1}\u{2}", "{\"algorithm\": <name>} was expected: expected value"),
    ] {
        memory.put("encryption.json", marker).unwrap();
        for key in [None, key(KEY)] {
            let (kind, text) = refusal(&memory, key);
            assert_eq!(kind, ErrorKind::Key, "{marker}");
            assert!(text.starts_with(&format!("read 'encryption.json': {expected}")), "{marker}: {text}");
        }
    }
    memory.put("encryption.json", r#"{"algorithm":"none"}"#).unwrap();
    let expected = "read 'encryption.json': it says the repository is not encrypted, but metadata.json is";
    assert_eq!(refusal(&memory, key(KEY)), (ErrorKind::Key, expected.to_owned()));

    put_markers(&memory, "chacha20-poly1305", KEY);
    memory.remove("metadata.json").unwrap();
    let (kind, text) = refusal(&memory, key(KEY));
    assert_eq!(kind, ErrorKind::Key);
    assert!(
        text.starts_with("read 'metadata.json': the file that shows whether the key is right is missing"),
        "{text}"
    );
}

#[test]
fn a_storage_that_fails_is_not_taken_for_a_wrong_key() {
    let memory = Arc::new(MemoryStorage::new());
    put_markers(&memory, "chacha20-poly1305", KEY);
    let faulty = Arc::new(FaultyStorage::new(memory));
    for name in ["encryption.json", "metadata.json"] {
        faulty.set_rule(move |_, path| (path.as_str() == name).then_some(Fault::Errno(EIO)));
        let error = EncryptedStorage::detect(faulty.clone(), key(KEY)).err().unwrap();
        assert_eq!((error.kind(), error.path().as_str()), (ErrorKind::Io, name));
        assert_eq!(error.raw_os_error(), Some(EIO));
    }
}

#[test]
fn one_flipped_bit_anywhere_yields_an_error_and_no_byte() {
    for (algorithm, stored) in VECTORS {
        let place = Encrypted::new(algorithm);
        let stored = from_hex(stored);
        for bit in 0..stored.len() * 8 {
            let mut damaged = stored.clone();
            damaged[bit / 8] ^= 1 << (bit % 8);
            place.memory.put("a/block", damaged).unwrap();
            let error = place.storage().read(&path("a/block"), 100).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Authentication, "{algorithm}, bit {bit}");
            let opened = place.storage().open(&path("a/block")).err().map(|error| error.kind());
            assert_eq!(opened, Some(ErrorKind::Authentication), "{algorithm}, bit {bit}");
        }
        let error = place.storage().read(&path("a/block"), 100).unwrap_err();
        let expected = "read 'a/block': does not decrypt, it is damaged or not encrypted with this key: \
                        its authentication tag does not match";
        assert_eq!(error.to_string(), expected);
    }
}

#[test]
fn an_object_cut_short_or_lengthened_yields_an_error() {
    for (algorithm, stored) in VECTORS {
        let place = Encrypted::new(algorithm);
        let stored = from_hex(stored);
        for length in 0..stored.len() {
            place.memory.put("file", &stored[..length]).unwrap();
            let error = place.storage().read(&path("file"), 100).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Authentication, "{algorithm}, {length} bytes");
        }
        place.memory.put("file", [stored.as_slice(), b"x"].concat()).unwrap();
        assert_eq!(place.storage().read(&path("file"), 100).unwrap_err().kind(), ErrorKind::Authentication);
    }
}

#[test]
fn a_legacy_object_of_impossible_length_or_padding_yields_an_error() {
    let place = Encrypted::new("aes-256-cbc");
    let stored = encrypt("aes-256-cbc", KEY, b"hello world");
    assert_eq!(stored.len(), 32);
    for length in (0..64).filter(|length| *length != 32) {
        let mut changed = stored.clone();
        changed.resize(length, 0x5a);
        place.memory.put("file", changed).unwrap();
        // Of 48 and 64 bytes only the padding is wrong: by these bytes, it always is.
        let error = place.storage().read(&path("file"), 100).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Authentication, "{length} bytes");
    }
    // The IV is xored into the first block: its last bytes are the padding, five times five.
    for (byte, flipped) in [(15, 5), (15, 4), (15, 0x80), (14, 1), (11, 1)] {
        let mut changed = stored.clone();
        changed[byte] ^= flipped;
        place.memory.put("file", changed).unwrap();
        let read = place.storage().read(&path("file"), 100);
        match (byte, flipped) {
            // 5 became 1, a padding of one byte: nothing in this algorithm can tell.
            (15, 4) => assert_eq!(read.unwrap(), b"hello world\x05\x05\x05\x05"),
            _ => assert_eq!(read.unwrap_err().kind(), ErrorKind::Authentication, "byte {byte} ^ {flipped}"),
        }
    }
}

#[test]
fn an_object_of_another_key_or_in_plain_yields_an_error() {
    let place = Encrypted::new("chacha20-poly1305");
    place.memory.put("other", encrypt("chacha20-poly1305", OTHER_KEY, b"hello world")).unwrap();
    place.memory.put("plain", "a metadata file that someone put there by hand").unwrap();
    place.memory.put("empty", "").unwrap();
    for name in ["other", "plain", "empty"].map(path) {
        assert_eq!(place.storage().read(&name, 100).unwrap_err().kind(), ErrorKind::Authentication, "{name}");
    }
}

#[test]
fn files_that_are_stored_plain_are_read_plain() {
    let place = Encrypted::new("chacha20-poly1305");
    for name in ["immutability.json", "vm/x.xva.checksum"] {
        place.memory.put(name, "plain").unwrap();
        assert_eq!(place.storage().read(&path(name), 5).unwrap(), b"plain", "{name}");
        let mut buffer = [0; 8];
        assert_eq!(place.storage().open(&path(name)).unwrap().read_at(1, &mut buffer).unwrap(), 4, "{name}");
        assert_eq!(&buffer[..4], b"lain", "{name}");
    }
    assert_eq!(place.storage().read(&path("encryption.json"), 50).unwrap(), br#"{"algorithm":"chacha20-poly1305"}"#);
    // Only at the root.
    place.memory.put("vm/encryption.json", "plain").unwrap();
    assert_eq!(place.storage().read(&path("vm/encryption.json"), 50).unwrap_err().kind(), ErrorKind::Authentication);
}

#[test]
fn an_object_too_large_to_decrypt_in_memory_is_refused_unread() {
    let memory = Arc::new(MemoryStorage::new());
    put_markers(&memory, "chacha20-poly1305", KEY);
    memory.put("x.xva", vec![0; (64 << 20) + 1]).unwrap();
    let faulty = Arc::new(FaultyStorage::new(memory));
    let storage = EncryptedStorage::detect(faulty.clone(), key(KEY)).unwrap();
    faulty.reset_counts();
    let error = storage.open(&path("x.xva")).err().unwrap();
    assert_eq!(error.kind(), ErrorKind::TooLarge);
    assert_eq!(error.to_string(), "open 'x.xva': at most 67108864 bytes were expected, it has more");
    assert_eq!(faulty.count(Operation::ReadAt), 0);
}

#[test]
fn asking_whether_an_object_is_there_decrypts_nothing() {
    let place = Encrypted::new("chacha20-poly1305");
    place.put("file", b"hello world");
    let faulty = Arc::new(FaultyStorage::new(place.memory.clone()));
    let storage = EncryptedStorage::detect(faulty.clone(), key(KEY)).unwrap();
    faulty.reset_counts();
    assert_eq!(storage.stat(&path("file")).unwrap().size, 11 + 28);
    assert_eq!((faulty.total(), faulty.count(Operation::Stat)), (1, 1));
}

#[test]
fn its_parts_cannot_be_read_alone() {
    let place = Encrypted::new("aes-256-gcm");
    assert_eq!(place.storage().capabilities(), Capabilities { ranged_reads: false, is_remote: false });
    assert_eq!(place.memory.capabilities(), Capabilities { ranged_reads: true, is_remote: false });
}
