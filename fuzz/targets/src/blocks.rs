//! Blocks that are encrypted, compressed, both, or neither.

use std::io::Read;
use std::sync::Arc;

use aws_lc_rs::aead::{AES_256_GCM, Aad, Algorithm, CHACHA20_POLY1305, LessSafeKey, Nonce, UnboundKey};
use disk::Disk;
use storage::{EncryptedStorage, EncryptionKey, MemoryStorage, ObjectPath, Storage};
use vhd::{BlockCache, Context};

use crate::builder::{BLOCK, Image, Kind};

const KEY: &str = "0123456789abcdef0123456789abcdef";
const NONCE: [u8; 12] = *b"not a secret";

fn seal(algorithm: &'static Algorithm, bytes: &[u8]) -> Vec<u8> {
    let key = LessSafeKey::new(UnboundKey::new(algorithm, KEY.as_bytes()).expect("32 bytes"));
    let mut sealed = bytes.to_vec();
    key.seal_in_place_append_tag(Nonce::assume_unique_for_key(NONCE), Aad::empty(), &mut sealed).expect("short");
    [&NONCE[..], &sealed].concat()
}

fn unseal(algorithm: &'static Algorithm, stored: &[u8]) -> Option<Vec<u8>> {
    let key = LessSafeKey::new(UnboundKey::new(algorithm, KEY.as_bytes()).expect("32 bytes"));
    let (nonce, sealed) = stored.split_first_chunk::<12>()?;
    let mut sealed = sealed.to_vec();
    Some(key.open_in_place(Nonce::assume_unique_for_key(*nonce), Aad::empty(), &mut sealed).ok()?.to_vec())
}

/// Decodes by other code than the one that is tested.
fn decode(kind: Kind, stored: &[u8]) -> Option<Vec<u8>> {
    let mut plain = Vec::new();
    match kind {
        Kind::Flat | Kind::Plain => plain.extend(stored),
        Kind::Gzip => {
            // As in Node: behind a member comes another one, or nothing, or zeroes.
            let mut rest = stored;
            while plain.is_empty() || rest.first().is_some_and(|byte| *byte != 0) {
                flate2::bufread::GzDecoder::new(&mut rest).take(1 << 20).read_to_end(&mut plain).ok()?;
                if plain.is_empty() && rest.first().is_none_or(|byte| *byte == 0) || plain.len() > 1 << 20 {
                    break;
                }
            }
        }
        Kind::Brotli => drop(brotli::Decompressor::new(stored, 4096).take(1 << 20).read_to_end(&mut plain).ok()?),
    }
    Some(plain)
}

/// The file of a block, as it is stored or what is encrypted and compressed in it: it is read as other code decodes it.
pub fn encrypted_block(data: &[u8]) {
    let Some((first, data)) = data.split_first() else { return };
    let algorithm: Option<&'static Algorithm> =
        [None, Some(&CHACHA20_POLY1305), Some(&AES_256_GCM)][usize::from(first % 3)];
    let kind = [Kind::Plain, Kind::Gzip, Kind::Brotli][usize::from(first / 3 % 3)];
    let seal = |bytes: &[u8]| algorithm.map_or(bytes.to_vec(), |algorithm| seal(algorithm, bytes));
    let full = 512 + BLOCK;
    let image = Image::new(1, 2 * BLOCK as u64, &[(0, 1), (1, 2)]).stored(kind);
    let stored = match first / 9 % 4 {
        0 => data.to_vec(),
        1 => seal(data),
        2 => {
            let mut plain = data.to_vec();
            plain.resize(full, 0x5a);
            seal(&image.filtered(&plain))
        }
        _ => {
            // Compressed bytes of the right length, changed in a few places.
            let mut bytes = image.filtered(&[image.bitmap(), vec![7; BLOCK / 2], vec![9; BLOCK / 2]].concat());
            for change in data.chunks_exact(3) {
                let at = usize::from(u16::from_be_bytes([change[0], change[1]])) % bytes.len();
                bytes[at] ^= change[2];
            }
            seal(&bytes)
        }
    };
    let plain = MemoryStorage::new();
    image.put(&plain, "a");
    let memory = MemoryStorage::new();
    let files = ["footer", "header", "bat", "blocks/0/0", "chunk-filters.json"];
    for path in files.iter().map(|file| format!("data/a.vhd/{file}")).chain(["a.alias.vhd".to_owned()]) {
        let bytes = plain.read(&ObjectPath::new(&path).expect("a name"), 1 << 20);
        if let Ok(bytes) = bytes {
            memory.put(&path, seal(&bytes)).expect("the name is free");
        }
    }
    memory.put("data/a.vhd/blocks/0/1", stored.clone()).expect("the name is free");
    let mut key = None;
    if algorithm.is_some() {
        let name = if first % 3 == 1 { "chacha20-poly1305" } else { "aes-256-gcm" };
        memory.put("encryption.json", format!("{{\"algorithm\":\"{name}\"}}")).expect("the name is free");
        memory.put("metadata.json", seal(br#"{"random":"x"}"#)).expect("the name is free");
        key = Some(EncryptionKey::from_text(KEY).expect("32 bytes"));
    }
    let storage = EncryptedStorage::detect(Arc::new(memory), key).expect("the key is right");
    let context = Context { storage, cache: BlockCache::new(1 << 20) };
    let disk =
        vhd::open(&context, &ObjectPath::new("a.alias.vhd").expect("a name"), None).expect("the block is not read");

    let unsealed = algorithm.map_or(Some(stored.clone()), |algorithm| unseal(algorithm, &stored));
    let truth = unsealed.as_deref().and_then(|bytes| decode(kind, bytes)).filter(|bytes| bytes.len() == full);
    let mut found = vec![0xee; BLOCK];
    match (disk.read_at(BLOCK as u64, &mut found), &truth) {
        (Ok(()), Some(truth)) => assert!(found == truth[512..], "other bytes"),
        // A code that zlib refuses may be read by others; the checksum tells whether the bytes are right.
        (Ok(()), None) if kind == Kind::Gzip && first / 9 % 4 == 3 => {
            assert!(found == [vec![7; BLOCK / 2], vec![9; BLOCK / 2]].concat(), "other bytes");
        }
        (Ok(()), None) => {
            let len = u32::try_from(full).expect("a small block").to_le_bytes();
            let may_decode = kind == Kind::Gzip && unsealed.is_some_and(|bytes| bytes.ends_with(&len));
            assert!(may_decode, "read, though it does not decode to a block");
        }
        // Two decoders may differ in what they refuse, but not on what was never changed.
        (Err(error), _) => assert!(first / 9 % 4 != 2, "{error}"),
    }
    let mut part = [0xee; 9];
    if let (Ok(()), Some(truth)) = (disk.read_at(BLOCK as u64 + 100, &mut part), &truth) {
        assert_eq!(part, truth[612..621]);
    }
    disk.read_at(0, &mut found).expect("the other block is sound");
    assert!(found == vec![1; BLOCK]);
}
