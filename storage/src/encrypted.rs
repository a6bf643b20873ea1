//! A decorator that decrypts and encrypts whole objects, or objects in order.
//!
//! ```text
//! nonce (12) | ciphertext | tag (16)            chacha20-poly1305, aes-256-gcm; no associated data
//! IV (16)    | ciphertext, padded (PKCS#7)      aes-256-cbc, of 2022 only: nothing proves its bytes
//! ```
//!
//! The key is the text itself, 32 bytes, without derivation. Names, folders and a few files at the root are plain. One
//! nonce and one tag cover an object, so no part of it can be read without reading all of it: an open object holds its
//! decrypted bytes, and of one that is long nothing but all, in order. No byte of an open object is handed out before the tag is
//! verified, and of a stream not the last ones. Each object that is written gets a random nonce.
//!
//! Source: `@xen-orchestra/fs`, `_encryptor.js` and `abstract.js` (`_checkMetadata`, `readFile`).

use std::fmt;
use std::sync::Arc;
use std::time::SystemTime;

use aws_lc_rs::aead::{self, Aad, LessSafeKey, Nonce, UnboundKey};
use aws_lc_rs::cipher::{
    self, DecryptionContext, EncryptionContext, PaddedBlockDecryptingKey, PaddedBlockEncryptingKey,
    StreamingEncryptingKey, UnboundCipherKey,
};
use aws_lc_rs::iv::FixedLength;
use aws_lc_rs::rand;
use zeroize::Zeroizing;

use crate::memory::copy_at;
use crate::sealed::{CHACHA_LONGEST, GCM_LONGEST, KEY_LENGTH, NONCE_LENGTH, Sealing, TAG_LENGTH};
use crate::sealed_stream::{Closing, Encrypting, Opening, damaged};
use crate::stream::of_object;
use crate::{
    Capabilities, Entry, Error, ErrorKind, Existing, Mark, Moves, Object, ObjectPath, Result, Room, Stat, Storage,
    Stream, Synced, WritableObject, WritableStorage, WritableStream, decoding, publish,
};

/// The longest object opened for positioned reads, as stored: it is decrypted as a whole, in memory. Blocks have 2 MiB
/// and the largest BAT and metadata stay far below; only a full backup (XVA) is larger, and is refused: it can be read as a
/// [`Stream`].
const MAX_OPEN_OBJECT: u64 = 64 << 20;

/// The longest `encryption.json` and `metadata.json` read; they hold one short field each.
const MAX_MARKER: u64 = 64 << 10;

/// The key of an encrypted repository, zeroized when dropped.
#[derive(Clone)]
pub struct EncryptionKey(Zeroizing<[u8; KEY_LENGTH]>);

impl EncryptionKey {
    /// Makes a key of its text; one line end at the end is not part of it.
    ///
    /// # Errors
    /// [`ErrorKind::Key`] if it has not 32 bytes.
    pub fn from_text(text: &str) -> Result<Self> {
        let text = text.strip_suffix('\n').map_or(text, |text| text.strip_suffix('\r').unwrap_or(text));
        let bytes = <[u8; KEY_LENGTH]>::try_from(text.as_bytes()).map_err(|_| {
            Error::of_key(format!(
                "the encryption key has {} bytes, {KEY_LENGTH} characters (ASCII) were expected",
                text.len()
            ))
        })?;
        Ok(Self(Zeroizing::new(bytes)))
    }
}

impl fmt::Debug for EncryptionKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("EncryptionKey(..)")
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Algorithm {
    ChaCha20Poly1305,
    Aes256Gcm,
    Aes256Cbc,
}

impl Algorithm {
    fn of_name(name: &str) -> Option<Self> {
        match name {
            "chacha20-poly1305" => Some(Self::ChaCha20Poly1305),
            "aes-256-gcm" => Some(Self::Aes256Gcm),
            "aes-256-cbc" => Some(Self::Aes256Cbc),
            _ => None,
        }
    }

    /// Returns how much longer than its plain bytes an object is at most.
    fn overhead(self) -> u64 {
        match self {
            Self::ChaCha20Poly1305 | Self::Aes256Gcm => (NONCE_LENGTH + TAG_LENGTH) as u64,
            Self::Aes256Cbc => 2 * CBC_BLOCK as u64,
        }
    }

    /// Returns the length of the longest object that is read or written in order (bytes, decrypted).
    fn longest(self) -> u64 {
        match self {
            Self::ChaCha20Poly1305 => CHACHA_LONGEST,
            Self::Aes256Gcm => GCM_LONGEST,
            // Nothing would show that it is damaged: it has to be opened.
            Self::Aes256Cbc => MAX_OPEN_OBJECT - 2 * CBC_BLOCK as u64,
        }
    }
}

const CBC_BLOCK: usize = 16;

const TOO_LONG_FOR_CBC: &str =
    "it is longer than 64 MiB, and of aes-256-cbc no part is read of what is: nothing shows whether it is damaged";
const NO_RANDOM: &str = "the system gave no random bytes";

enum Cipher {
    Authenticated(LessSafeKey),
    Cbc(Box<(PaddedBlockDecryptingKey, PaddedBlockEncryptingKey)>),
}

impl Cipher {
    fn new(algorithm: Algorithm, key: &EncryptionKey) -> Self {
        let authenticated = |algorithm: &'static aead::Algorithm| {
            let key = UnboundKey::new(algorithm, &*key.0).expect("the algorithm's keys have 32 bytes");
            Self::Authenticated(LessSafeKey::new(key))
        };
        match algorithm {
            Algorithm::ChaCha20Poly1305 => authenticated(&aead::CHACHA20_POLY1305),
            Algorithm::Aes256Gcm => authenticated(&aead::AES_256_GCM),
            Algorithm::Aes256Cbc => {
                let key =
                    || UnboundCipherKey::new(&cipher::AES_256, &*key.0).expect("the algorithm's keys have 32 bytes");
                let decrypting = PaddedBlockDecryptingKey::cbc_pkcs7(key()).expect("CBC takes an AES key");
                let encrypting = PaddedBlockEncryptingKey::cbc_pkcs7(key()).expect("CBC takes an AES key");
                Self::Cbc(Box::new((decrypting, encrypting)))
            }
        }
    }

    /// Turns what is stored into what it says, in place; the reason if it does not decrypt.
    fn decrypt(&self, mut stored: Vec<u8>) -> std::result::Result<Vec<u8>, String> {
        let length = stored.len();
        let (head, plain_length) = match self {
            Self::Authenticated(key) => {
                if length < NONCE_LENGTH + TAG_LENGTH {
                    return Err(format!("{length} bytes, at least {} were expected", NONCE_LENGTH + TAG_LENGTH));
                }
                let (nonce, sealed) = stored.split_first_chunk_mut::<NONCE_LENGTH>().expect("a nonce is there");
                let nonce = Nonce::assume_unique_for_key(*nonce);
                let plain = key.open_in_place(nonce, Aad::empty(), sealed);
                (NONCE_LENGTH, plain.map_err(|_| "its authentication tag does not match".to_owned())?.len())
            }
            Self::Cbc(keys) => {
                if length < 2 * CBC_BLOCK || !length.is_multiple_of(CBC_BLOCK) {
                    return Err(format!("{length} bytes, two or more blocks of {CBC_BLOCK} were expected"));
                }
                let (iv, sealed) = stored.split_first_chunk_mut::<CBC_BLOCK>().expect("two blocks are there");
                let context = DecryptionContext::Iv128(FixedLength::from(&*iv));
                let plain = keys.0.decrypt(sealed, context);
                (CBC_BLOCK, plain.map_err(|_| "its padding is wrong".to_owned())?.len())
            }
        };
        stored.copy_within(head..head + plain_length, 0);
        stored.truncate(plain_length);
        Ok(stored)
    }

    /// Returns what is to be stored for `plain`; the reason if the system gives no random bytes.
    fn encrypt(&self, plain: &[u8]) -> std::result::Result<Vec<u8>, String> {
        let no_random = |_| NO_RANDOM.to_owned();
        match self {
            Self::Authenticated(key) => {
                let mut stored = Vec::with_capacity(NONCE_LENGTH + plain.len() + TAG_LENGTH);
                let mut nonce = [0; NONCE_LENGTH];
                rand::fill(&mut nonce).map_err(no_random)?;
                stored.extend_from_slice(&nonce);
                stored.extend_from_slice(plain);
                let nonce = Nonce::assume_unique_for_key(nonce);
                let sealed = key.seal_in_place_separate_tag(nonce, Aad::empty(), &mut stored[NONCE_LENGTH..]);
                // AES-GCM seals at most 64 GiB.
                let tag = sealed.map_err(|_| "it is too long to be encrypted in one piece".to_owned())?;
                stored.extend_from_slice(tag.as_ref());
                Ok(stored)
            }
            Self::Cbc(keys) => {
                let mut iv = [0; CBC_BLOCK];
                rand::fill(&mut iv).map_err(no_random)?;
                let mut sealed = plain.to_vec();
                keys.1
                    .less_safe_encrypt(&mut sealed, EncryptionContext::Iv128(FixedLength::from(&iv)))
                    .expect("AES-CBC encrypts any number of bytes");
                Ok([iv.as_slice(), &sealed].concat())
            }
        }
    }
}

/// A storage whose objects are decrypted, and encrypted where they can be written.
pub struct EncryptedStorage<S: ?Sized = dyn Storage> {
    inner: Arc<S>,
    algorithm: Algorithm,
    cipher: Cipher,
    key: EncryptionKey,
}

impl EncryptedStorage {
    /// Returns `storage` as it is if it is plain, else decorated, after the key decrypted `metadata.json`.
    ///
    /// `encryption.json` names the algorithm. Without it, a storage is plain, or, if a key is given, chacha20-poly1305.
    /// A key given for a storage that says it is plain is not used.
    ///
    /// # Errors
    /// [`ErrorKind::Key`] if the key is missing or wrong, or the algorithm unknown; else what the storage says.
    pub fn detect(storage: Arc<dyn Storage>, key: Option<EncryptionKey>) -> Result<Arc<dyn Storage>> {
        Ok(match Self::open(storage.clone(), key)? {
            Some(encrypted) => Arc::new(encrypted),
            None => storage,
        })
    }
}

impl EncryptedStorage<dyn WritableStorage> {
    /// The same as [`EncryptedStorage::detect`], to be written too.
    ///
    /// # Errors
    /// As for [`EncryptedStorage::detect`].
    pub fn detect_writable(
        storage: Arc<dyn WritableStorage>,
        key: Option<EncryptionKey>,
    ) -> Result<Arc<dyn WritableStorage>> {
        Ok(match Self::open(storage.clone(), key)? {
            Some(encrypted) => Arc::new(encrypted),
            None => storage,
        })
    }

    /// Makes an empty place an encrypted repository, by the algorithm Xen Orchestra takes for new ones
    /// (chacha20-poly1305). `random` is any uuid; that it can be decrypted shows later that a key is right.
    ///
    /// # Errors
    /// What the storage says.
    pub fn initialize(storage: &dyn WritableStorage, key: &EncryptionKey, random: &str) -> Result<()> {
        let check = serde_json::json!({ "random": random }).to_string();
        let path = ObjectPath::new("metadata.json")?;
        let cipher = Cipher::new(Algorithm::ChaCha20Poly1305, key);
        let sealed =
            cipher.encrypt(check.as_bytes()).map_err(|reason| Error::new(ErrorKind::Io, "write", &path, reason))?;
        publish(storage, &path, &sealed)?;
        // Last: a place that says that it is encrypted has its key check.
        publish(storage, &ObjectPath::new("encryption.json")?, br#"{"algorithm":"chacha20-poly1305"}"#)
    }
}

impl<S: Storage + ?Sized> EncryptedStorage<S> {
    /// Returns the decorated storage, `None` if it is plain.
    fn open(storage: Arc<S>, key: Option<EncryptionKey>) -> Result<Option<Self>> {
        let marker_path = ObjectPath::new("encryption.json")?;
        let refuse = |reason: String| Err(Error::new(ErrorKind::Key, "read", &marker_path, reason));
        let marker = match storage.read(&marker_path, MAX_MARKER) {
            Ok(bytes) => Some(bytes),
            Err(error) if error.kind() == ErrorKind::NotFound => None,
            Err(error) => return Err(error),
        };
        let name = match &marker {
            Some(bytes) => match serde_json::from_slice::<Marker>(bytes) {
                Ok(marker) => marker.algorithm,
                Err(error) => return refuse(format!("{{\"algorithm\": <name>}} was expected: {error}")),
            },
            None if key.is_none() => return Ok(None),
            None => "chacha20-poly1305".to_owned(),
        };
        if name == "none" {
            return if key.is_none() || is_plain_repository(&*storage)? {
                Ok(None)
            } else {
                refuse("it says the repository is not encrypted, but metadata.json is".to_owned())
            };
        }
        let Some(algorithm) = Algorithm::of_name(&name) else {
            return refuse(format!(
                "the encryption '{}' is not supported; chacha20-poly1305, aes-256-gcm and aes-256-cbc are",
                name.escape_debug()
            ));
        };
        let Some(key) = key else {
            return refuse(format!(
                "the repository is encrypted ({name}): give its key with --password-file, --password-command or \
                 XOFS_PASSWORD"
            ));
        };
        let cipher = Cipher::new(algorithm, &key);
        let encrypted = Self { inner: storage, algorithm, cipher, key };
        encrypted.verify(marker.is_some())?;
        Ok(Some(encrypted))
    }

    /// Checks that the key decrypts `metadata.json`, whose only use that is.
    fn verify(&self, has_marker: bool) -> Result<()> {
        let path = ObjectPath::new("metadata.json")?;
        let refuse = |reason: &str| Err(Error::new(ErrorKind::Key, "read", &path, reason));
        match self.read(&path, MAX_MARKER) {
            Ok(bytes) if is_key_check(&bytes) => Ok(()),
            Ok(_) => refuse("the encryption key is wrong: what it decrypts to is no key check"),
            Err(error) if error.kind() == ErrorKind::Authentication => {
                if is_plain_repository(&*self.inner)? {
                    refuse("a key was given, but the repository is not encrypted: leave the key out")
                } else {
                    refuse("the encryption key is wrong: this file does not decrypt with it")
                }
            }
            Err(error) if error.kind() == ErrorKind::NotFound && !has_marker => {
                refuse("a key was given, but nothing here is encrypted: leave the key out")
            }
            Err(error) if error.kind() == ErrorKind::NotFound => {
                refuse("the file that shows whether the key is right is missing: restore it from another copy")
            }
            Err(error) => Err(error),
        }
    }

    fn encrypt(&self, path: &ObjectPath, bytes: &[u8]) -> Result<Vec<u8>> {
        self.cipher.encrypt(bytes).map_err(|reason| Error::new(ErrorKind::Io, "write", path, reason))
    }

    fn decrypt(&self, act: &'static str, path: &ObjectPath, stored: Vec<u8>) -> Result<Vec<u8>> {
        decoding(stored.len(), || self.cipher.decrypt(stored)).map_err(|reason| damaged(act, path, &reason))
    }
}

/// `encryption.json`.
#[derive(serde::Deserialize)]
struct Marker {
    algorithm: String,
}

/// Whether these are the bytes of a decrypted `metadata.json`.
fn is_key_check(bytes: &[u8]) -> bool {
    #[derive(serde::Deserialize)]
    struct KeyCheck {
        #[expect(dead_code, reason = "only its presence matters")]
        random: String,
    }
    serde_json::from_slice::<KeyCheck>(bytes).is_ok()
}

/// Whether `metadata.json` is missing or plain.
fn is_plain_repository(storage: &(impl Storage + ?Sized)) -> Result<bool> {
    match storage.read(&ObjectPath::new("metadata.json")?, MAX_MARKER) {
        Ok(bytes) => Ok(serde_json::from_slice::<serde::de::IgnoredAny>(&bytes).is_ok()),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(true),
        Err(error) => Err(error),
    }
}

/// Whether an object of an encrypted repository is stored plain. Checksums are those of the stored bytes.
fn is_plain(path: &ObjectPath) -> bool {
    matches!(path.as_str(), "encryption.json" | "immutability.json") || path.file_name().ends_with(".checksum")
}

impl<S: Storage + ?Sized> Storage for EncryptedStorage<S> {
    fn open(&self, path: &ObjectPath) -> Result<Arc<dyn Object>> {
        let inner = self.inner.open(path)?;
        if is_plain(path) {
            return Ok(inner);
        }
        let stored = read_all(&*inner, path)?;
        let bytes = self.decrypt("open", path, stored)?;
        Ok(Arc::new(DecryptedObject { inner, bytes }))
    }

    fn open_stream(&self, path: &ObjectPath) -> Result<Box<dyn Stream>> {
        if is_plain(path) {
            return self.inner.open_stream(path);
        }
        let begin = match self.algorithm {
            Algorithm::ChaCha20Poly1305 => Sealing::chacha20_poly1305,
            Algorithm::Aes256Gcm => Sealing::aes_256_gcm,
            Algorithm::Aes256Cbc => {
                let object = self.open(path).map_err(|error| match error.kind() {
                    ErrorKind::TooLarge => Error::new(ErrorKind::TooLarge, "open", path, TOO_LONG_FOR_CBC),
                    _ => error,
                });
                return of_object(object?);
            }
        };
        let begin = |nonce: &_| begin(&self.key.0, nonce);
        Ok(Box::new(Opening::new(self.inner.open_stream(path)?, path, self.algorithm.longest(), begin)?))
    }

    fn read(&self, path: &ObjectPath, limit: u64) -> Result<Vec<u8>> {
        if is_plain(path) {
            return self.inner.read(path, limit);
        }
        let too_large = || Error::too_large("read", path, limit);
        let stored = match self.inner.read(path, limit.saturating_add(self.algorithm.overhead())) {
            Err(error) if error.kind() == ErrorKind::TooLarge => return Err(too_large()),
            stored => stored?,
        };
        let bytes = self.decrypt("read", path, stored)?;
        if bytes.len() as u64 > limit { Err(too_large()) } else { Ok(bytes) }
    }

    fn list(&self, path: &ObjectPath) -> Result<Vec<Entry>> {
        self.inner.list(path)
    }

    fn stat(&self, path: &ObjectPath) -> Result<Stat> {
        self.inner.stat(path)
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities { ranged_reads: false, ..self.inner.capabilities() }
    }

    fn describe(&self) -> String {
        self.inner.describe()
    }
}

impl WritableStorage for EncryptedStorage<dyn WritableStorage> {
    fn reader(self: Arc<Self>) -> Arc<dyn Storage> {
        self
    }

    fn write(&self, path: &ObjectPath, bytes: &[u8], existing: Existing) -> Result<()> {
        if is_plain(path) {
            return self.inner.write(path, bytes, existing);
        }
        self.inner.write(path, &self.encrypt(path, bytes)?, existing)
    }

    fn write_and_stat(&self, path: &ObjectPath, bytes: &[u8], existing: Existing) -> Result<Stat> {
        if is_plain(path) {
            return self.inner.write_and_stat(path, bytes, existing);
        }
        self.inner.write_and_stat(path, &self.encrypt(path, bytes)?, existing)
    }

    fn write_and_sync(&self, path: &ObjectPath, bytes: &[u8], existing: Existing) -> Result<()> {
        if is_plain(path) {
            return self.inner.write_and_sync(path, bytes, existing);
        }
        self.inner.write_and_sync(path, &self.encrypt(path, bytes)?, existing)
    }

    fn create(&self, path: &ObjectPath) -> Result<Arc<dyn WritableObject>> {
        Err(only_whole("create", path))
    }

    fn create_stream(&self, path: &ObjectPath) -> Result<Box<dyn WritableStream>> {
        if is_plain(path) {
            return self.inner.create_stream(path);
        }
        let no_random = |_| Error::new(ErrorKind::Io, "write", path, NO_RANDOM);
        let mut iv = [0; CBC_BLOCK];
        rand::fill(&mut iv).map_err(no_random)?;
        let nonce = iv.first_chunk::<NONCE_LENGTH>().expect("an IV is longer");
        let (begins_with, encrypting): (&[u8], _) = match self.algorithm {
            Algorithm::ChaCha20Poly1305 => (nonce, Encrypting::Sealing(Sealing::chacha20_poly1305(&self.key.0, nonce))),
            Algorithm::Aes256Gcm => (nonce, Encrypting::Sealing(Sealing::aes_256_gcm(&self.key.0, nonce))),
            Algorithm::Aes256Cbc => {
                let key = UnboundCipherKey::new(&cipher::AES_256, &*self.key.0);
                let key = key.expect("the algorithm's keys have 32 bytes");
                let context = EncryptionContext::Iv128(FixedLength::from(&iv));
                let key = StreamingEncryptingKey::less_safe_cbc_pkcs7(key, context).expect("CBC takes an AES key");
                (&iv, Encrypting::Cbc(key))
            }
        };
        let inner = self.inner.create_stream(path)?;
        Ok(Box::new(Closing::new(inner, path, self.algorithm.longest(), begins_with, encrypting)))
    }

    fn check_size(&self, path: &ObjectPath, size: u64) -> Result<()> {
        let longest = self.algorithm.longest();
        if !is_plain(path) && size > longest {
            let reason =
                format!("it has {size} bytes, and the encryption of the repository protects at most {longest} at once");
            return Err(Error::new(ErrorKind::TooLarge, "write", path, reason));
        }
        self.inner.check_size(path, size)
    }

    fn open_to_write(&self, path: &ObjectPath) -> Result<Arc<dyn WritableObject>> {
        Err(only_whole("open", path))
    }

    fn create_directory(&self, path: &ObjectPath) -> Result<()> {
        self.inner.create_directory(path)
    }

    fn rename(&self, from: &ObjectPath, to: &ObjectPath) -> Result<()> {
        self.inner.rename(from, to)
    }

    fn moves<'a>(&'a self, from: &ObjectPath, to: &ObjectPath) -> Result<Box<dyn Moves + 'a>> {
        self.inner.moves(from, to)
    }

    fn remove(&self, path: &ObjectPath) -> Result<()> {
        self.inner.remove(path)
    }

    fn remove_directory(&self, path: &ObjectPath) -> Result<()> {
        self.inner.remove_directory(path)
    }

    fn touch(&self, path: &ObjectPath) -> Result<()> {
        self.inner.touch(path)
    }

    fn set_modified(&self, path: &ObjectPath, modified: SystemTime) -> Result<()> {
        self.inner.set_modified(path, modified)
    }

    fn sync(&self, path: &ObjectPath) -> Result<()> {
        self.inner.sync(path)
    }

    fn sync_each(&self, paths: &[ObjectPath]) -> Result<()> {
        self.inner.sync_each(paths)
    }

    fn mark(&self) -> Result<Mark> {
        self.inner.mark()
    }

    fn sync_trees(&self, paths: &[ObjectPath], what: Synced, since: &Mark) -> Result<()> {
        self.inner.sync_trees(paths, what, since)
    }

    fn is_immutable(&self, path: &ObjectPath) -> Result<bool> {
        self.inner.is_immutable(path)
    }

    fn room(&self) -> Result<Room> {
        self.inner.room()
    }
}

fn only_whole(act: &'static str, path: &ObjectPath) -> Error {
    let reason = "in an encrypted repository a file is written whole: VHD files cannot be, exploded ones can";
    Error::new(ErrorKind::Unsupported, act, path, reason)
}

/// Reads an open object from its beginning to its end.
fn read_all(object: &dyn Object, path: &ObjectPath) -> Result<Vec<u8>> {
    let size = object.stat()?.size;
    if size > MAX_OPEN_OBJECT {
        return Err(Error::too_large("open", path, MAX_OPEN_OBJECT));
    }
    let mut stored = vec![0; usize::try_from(size).expect("bounded above")];
    let count = object.read_at(0, &mut stored)?;
    stored.truncate(count);
    Ok(stored)
}

struct DecryptedObject {
    inner: Arc<dyn Object>,
    bytes: Vec<u8>,
}

impl Object for DecryptedObject {
    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<usize> {
        Ok(copy_at(&self.bytes, offset, buffer))
    }

    fn stat(&self) -> Result<Stat> {
        Ok(Stat { size: self.bytes.len() as u64, ..self.inner.stat()? })
    }
}
