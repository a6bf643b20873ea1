//! The places the conformance tests run on, and encryption as Xen Orchestra does it.

use std::fs;
use std::io::Write as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::process::{Command, Stdio};
use std::sync::Arc;

use aws_lc_rs::aead::{AES_256_GCM, Aad, Algorithm, CHACHA20_POLY1305, LessSafeKey, Nonce, UnboundKey};
use storage::{EncryptedStorage, EncryptionKey, LocalStorage, MemoryStorage, ObjectPath, Storage};

/// The key of the test vectors.
pub const KEY: &str = "73c1838d7d8a6088ca2317fb5f29cd91";

pub const ALGORITHMS: [&str; 3] = ["chacha20-poly1305", "aes-256-gcm", "aes-256-cbc"];

pub fn path(text: &str) -> ObjectPath {
    ObjectPath::new(text).unwrap()
}

pub fn key(text: &str) -> Option<EncryptionKey> {
    Some(EncryptionKey::from_text(text).unwrap())
}

/// Encrypts as Xen Orchestra does; CBC by the `openssl` command.
pub fn encrypt(algorithm: &str, key: &str, plain: &[u8]) -> Vec<u8> {
    let sealed = |algorithm: &'static Algorithm| {
        let key = LessSafeKey::new(UnboundKey::new(algorithm, key.as_bytes()).unwrap());
        let nonce = std::array::from_fn(|i| u8::try_from(i).unwrap());
        let mut sealed = plain.to_vec();
        key.seal_in_place_append_tag(Nonce::assume_unique_for_key(nonce), Aad::empty(), &mut sealed).unwrap();
        [nonce.as_slice(), &sealed].concat()
    };
    match algorithm {
        "chacha20-poly1305" => sealed(&CHACHA20_POLY1305),
        "aes-256-gcm" => sealed(&AES_256_GCM),
        "aes-256-cbc" => {
            let iv: [u8; 16] = std::array::from_fn(|i| u8::try_from(i).unwrap());
            [iv.as_slice(), &openssl(&["enc", "-aes-256-cbc", "-K", &hex(key.as_bytes()), "-iv", &hex(&iv)], plain)]
                .concat()
        }
        other => panic!("nothing here encrypts with {other}"),
    }
}

fn openssl(arguments: &[&str], input: &[u8]) -> Vec<u8> {
    let mut child = Command::new("openssl")
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("the test needs the openssl command");
    let mut stdin = child.stdin.take().unwrap();
    let output = std::thread::scope(|scope| {
        scope.spawn(move || stdin.write_all(input).unwrap());
        child.wait_with_output().unwrap()
    });
    assert!(output.status.success(), "openssl: {}", output.status);
    output.stdout
}

pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

pub fn from_hex(text: &str) -> Vec<u8> {
    (0..text.len()).step_by(2).map(|i| u8::from_str_radix(&text[i..i + 2], 16).unwrap()).collect()
}

/// The two files that make a storage an encrypted repository.
pub fn put_markers(memory: &MemoryStorage, algorithm: &str, key: &str) {
    memory.put("encryption.json", format!("{{\"algorithm\":\"{algorithm}\"}}")).unwrap();
    let check = br#"{"random":"01234567-89ab-4cde-8f01-23456789abcd"}"#;
    memory.put("metadata.json", encrypt(algorithm, key, check)).unwrap();
}

/// A storage with a way to change what lies in it, not through it.
pub trait Place {
    fn storage(&self) -> Arc<dyn Storage>;
    /// Puts a file under a name that may have been taken, as by a rename.
    fn put(&self, path: &str, plain: &[u8]);
    /// Writes into the file that has the name.
    fn overwrite(&self, path: &str, plain: &[u8]);
    fn create_directory(&self, path: &str);
    fn rename(&self, from: &str, to: &str);
    fn remove_file(&self, path: &str);
    /// How many bytes a file of so many takes.
    fn stored_size(&self, plain: u64) -> u64;
    /// Whether an open object shows what is written in place.
    fn is_live(&self) -> bool;
}

pub struct Local {
    pub folder: tempfile::TempDir,
    storage: Arc<LocalStorage>,
}

impl Local {
    pub fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let storage = Arc::new(LocalStorage::open(folder.path()).unwrap());
        Self { folder, storage }
    }
}

impl Place for Local {
    fn storage(&self) -> Arc<dyn Storage> {
        self.storage.clone()
    }

    fn put(&self, path: &str, plain: &[u8]) {
        let path = self.folder.path().join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        let written = self.folder.path().join(".being written");
        fs::write(&written, plain).unwrap();
        fs::rename(written, path).unwrap();
    }

    fn overwrite(&self, path: &str, plain: &[u8]) {
        let mut options = fs::OpenOptions::new();
        let mut file = options.write(true).truncate(true).mode(0o600).open(self.folder.path().join(path)).unwrap();
        file.write_all(plain).unwrap();
    }

    fn create_directory(&self, path: &str) {
        fs::create_dir_all(self.folder.path().join(path)).unwrap();
    }

    fn rename(&self, from: &str, to: &str) {
        fs::rename(self.folder.path().join(from), self.folder.path().join(to)).unwrap();
    }

    fn remove_file(&self, path: &str) {
        fs::remove_file(self.folder.path().join(path)).unwrap();
    }

    fn stored_size(&self, plain: u64) -> u64 {
        plain
    }

    fn is_live(&self) -> bool {
        true
    }
}

pub struct Memory(pub Arc<MemoryStorage>);

impl Place for Memory {
    fn storage(&self) -> Arc<dyn Storage> {
        self.0.clone()
    }

    fn put(&self, path: &str, plain: &[u8]) {
        self.0.put(path, plain).unwrap();
    }

    fn overwrite(&self, path: &str, plain: &[u8]) {
        self.0.overwrite(path, plain).unwrap();
    }

    fn create_directory(&self, path: &str) {
        self.0.create_directory(path).unwrap();
    }

    fn rename(&self, from: &str, to: &str) {
        self.0.rename(from, to).unwrap();
    }

    fn remove_file(&self, path: &str) {
        self.0.remove(path).unwrap();
    }

    fn stored_size(&self, plain: u64) -> u64 {
        plain
    }

    fn is_live(&self) -> bool {
        true
    }
}

/// Memory, encrypted.
pub struct Encrypted {
    pub memory: Arc<MemoryStorage>,
    algorithm: &'static str,
    storage: Arc<dyn Storage>,
}

impl Encrypted {
    pub fn new(algorithm: &'static str) -> Self {
        let memory = Arc::new(MemoryStorage::new());
        put_markers(&memory, algorithm, KEY);
        let storage = EncryptedStorage::detect(memory.clone(), key(KEY)).unwrap();
        Self { memory, algorithm, storage }
    }
}

impl Place for Encrypted {
    fn storage(&self) -> Arc<dyn Storage> {
        self.storage.clone()
    }

    fn put(&self, path: &str, plain: &[u8]) {
        self.memory.put(path, encrypt(self.algorithm, KEY, plain)).unwrap();
    }

    fn overwrite(&self, path: &str, plain: &[u8]) {
        self.memory.overwrite(path, encrypt(self.algorithm, KEY, plain)).unwrap();
    }

    fn create_directory(&self, path: &str) {
        self.memory.create_directory(path).unwrap();
    }

    fn rename(&self, from: &str, to: &str) {
        self.memory.rename(from, to).unwrap();
    }

    fn remove_file(&self, path: &str) {
        self.memory.remove(path).unwrap();
    }

    fn stored_size(&self, plain: u64) -> u64 {
        match self.algorithm {
            "aes-256-cbc" => 16 + (plain / 16 + 1) * 16,
            _ => plain + 28,
        }
    }

    fn is_live(&self) -> bool {
        false
    }
}
