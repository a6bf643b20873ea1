//! Authenticated encryption of bytes that come in order, in pieces: it takes no more memory however many there are.
//!
//! ```text
//!                      keystream of (key, nonce)                        tag, over ciphertext | zeroes | its length
//! chacha20-poly1305    block 0: key of Poly1305 · 1, 2 ...: the data    Poly1305, length little-endian
//! aes-256-gcm (CTR)    block 1: mask · 2, 3 ...: the data               GHASH ^ mask, length big-endian, in bits
//! ```
//!
//! There is no associated data. Of what is decrypted nothing is proven before the tag was compared, which is for the caller to do.
//!
//! Source: RFC 8439, 2.8; NIST SP 800-38D, 7.

use aws_lc_rs::cipher::{AES_256, EncryptionContext, StreamingEncryptingKey, UnboundCipherKey};
use aws_lc_rs::constant_time::verify_slices_are_equal;
use aws_lc_rs::iv::FixedLength;
use chacha20::ChaCha20;
use chacha20::cipher::{KeyIvInit, StreamCipher};
use ghash::GHash;
use poly1305::Poly1305;
use poly1305::universal_hash::{KeyInit, UniversalHash};
use zeroize::Zeroizing;

pub(crate) const KEY_LENGTH: usize = 32;
pub(crate) const NONCE_LENGTH: usize = 12;
pub(crate) const TAG_LENGTH: usize = 16;
/// Bytes of a piece that another one follows: a multiple of what each algorithm works on at a time.
pub(crate) const PIECE: usize = 1 << 20;
/// What AES and both hashes work on at a time (bytes).
const BLOCK: usize = 16;
/// The same of ChaCha20.
const CHACHA_BLOCK: usize = 64;

/// The most bytes that a key and nonce of ChaCha20-Poly1305 encrypt: blocks are numbered by 32 bits, and the first is not data.
/// One less than RFC 8439 allows: the keystream keeps the last number back.
pub(crate) const CHACHA_LONGEST: u64 = (u32::MAX as u64 - 1) * CHACHA_BLOCK as u64;
/// The same of AES-GCM (NIST SP 800-38D, 5.2.1.1).
pub(crate) const GCM_LONGEST: u64 = (1 << 36) - 32;

/// One message that is encrypted or decrypted.
pub(crate) struct Sealing {
    cipher: Cipher,
    /// Bytes so far.
    len: u64,
}

enum Cipher {
    ChaCha20Poly1305(Box<(ChaCha20, Poly1305)>),
    Aes256Gcm { keystream: StreamingEncryptingKey, hash: GHash, mask: Zeroizing<[u8; TAG_LENGTH]> },
}

impl Sealing {
    /// Begins one of at most [`CHACHA_LONGEST`] bytes. A nonce is used once with a key.
    pub fn chacha20_poly1305(key: &[u8; KEY_LENGTH], nonce: &[u8; NONCE_LENGTH]) -> Self {
        let mut keystream = ChaCha20::new(key.into(), nonce.into());
        let mut first = Zeroizing::new([0; CHACHA_BLOCK]);
        keystream.apply_keystream(&mut *first);
        let hash_key = first.first_chunk::<KEY_LENGTH>().expect("a block is longer");
        let hash = Poly1305::new(hash_key.into());
        Self { cipher: Cipher::ChaCha20Poly1305(Box::new((keystream, hash))), len: 0 }
    }

    /// Begins one of at most [`GCM_LONGEST`] bytes. A nonce is used once with a key.
    pub fn aes_256_gcm(key: &[u8; KEY_LENGTH], nonce: &[u8; NONCE_LENGTH]) -> Self {
        let keystream_from = |counter: &[u8; BLOCK]| {
            let key = UnboundCipherKey::new(&AES_256, key).expect("the algorithm's keys have 32 bytes");
            let context = EncryptionContext::Iv128(FixedLength::from(counter));
            StreamingEncryptingKey::less_safe_ctr(key, context).expect("CTR takes an AES key and a block")
        };
        let block = |keystream: &mut StreamingEncryptingKey| {
            let mut block = Zeroizing::new([0; BLOCK]);
            keystream.less_safe_update(&[0; BLOCK], &mut *block).expect("a block has room for a block");
            block
        };
        let hash = GHash::new((&*block(&mut keystream_from(&[0; BLOCK]))).into());
        let mut counter = [0; BLOCK];
        counter[..NONCE_LENGTH].copy_from_slice(nonce);
        counter[BLOCK - 1] = 1;
        let mut keystream = keystream_from(&counter);
        let mask = block(&mut keystream);
        Self { cipher: Cipher::Aes256Gcm { keystream, hash, mask }, len: 0 }
    }

    /// Appends the ciphertext of what comes next to `sealed`. All pieces but the last have [`PIECE`] bytes.
    pub fn encrypt(&mut self, plain: &[u8], sealed: &mut Vec<u8>) {
        let start = sealed.len();
        self.apply_keystream(plain, sealed);
        self.hash(&sealed[start..]);
    }

    /// Appends what the ciphertext that comes next says to `plain`. All pieces but the last have [`PIECE`] bytes.
    pub fn decrypt(&mut self, sealed: &[u8], plain: &mut Vec<u8>) {
        self.hash(sealed);
        self.apply_keystream(sealed, plain);
    }

    fn apply_keystream(&mut self, from: &[u8], to: &mut Vec<u8>) {
        let start = to.len();
        match &mut self.cipher {
            Cipher::ChaCha20Poly1305(cipher) => {
                to.extend_from_slice(from);
                cipher.0.apply_keystream(&mut to[start..]);
            }
            Cipher::Aes256Gcm { keystream, .. } => {
                // It asks for room for a block more than it fills.
                to.resize(start + from.len() + BLOCK, 0);
                let done = keystream.update(from, &mut to[start..]).expect("there is room for a block more");
                let done = done.written().len();
                to.truncate(start + done);
            }
        }
    }

    fn hash(&mut self, ciphertext: &[u8]) {
        debug_assert!(self.len.is_multiple_of(BLOCK as u64), "only the last piece is not whole");
        self.len += ciphertext.len() as u64;
        match &mut self.cipher {
            Cipher::ChaCha20Poly1305(cipher) => cipher.1.update_padded(ciphertext),
            Cipher::Aes256Gcm { hash, .. } => hash.update_padded(ciphertext),
        }
    }

    /// Returns the tag of all that was encrypted or decrypted.
    pub fn tag(self) -> [u8; TAG_LENGTH] {
        let mut lengths = [0; BLOCK];
        match self.cipher {
            Cipher::ChaCha20Poly1305(cipher) => {
                let mut hash = cipher.1;
                lengths[BLOCK / 2..].copy_from_slice(&self.len.to_le_bytes());
                hash.update(&[lengths.into()]);
                hash.finalize().into()
            }
            Cipher::Aes256Gcm { mut hash, mask, .. } => {
                lengths[BLOCK / 2..].copy_from_slice(&(self.len * 8).to_be_bytes());
                hash.update(&[lengths.into()]);
                let mut tag: [u8; TAG_LENGTH] = hash.finalize().into();
                tag.iter_mut().zip(mask.iter()).for_each(|(byte, mask)| *byte ^= mask);
                tag
            }
        }
    }

    /// Whether all that was decrypted is what was encrypted with this tag.
    pub fn matches(self, tag: &[u8]) -> bool {
        verify_slices_are_equal(&self.tag(), tag).is_ok()
    }
}

#[cfg(test)]
mod tests {
    use aws_lc_rs::aead::{self, Aad, LessSafeKey, Nonce, UnboundKey};
    use chacha20::cipher::StreamCipherSeek;

    use super::*;

    const KEY: &[u8; KEY_LENGTH] = b"73c1838d7d8a6088ca2317fb5f29cd91";
    const NONCE: &[u8; NONCE_LENGTH] = b"only no once";

    type Begin = fn(&[u8; KEY_LENGTH], &[u8; NONCE_LENGTH]) -> Sealing;

    /// Ours, and the same for whole messages by other hands.
    const BOTH: [(Begin, &aead::Algorithm); 2] =
        [(Sealing::chacha20_poly1305, &aead::CHACHA20_POLY1305), (Sealing::aes_256_gcm, &aead::AES_256_GCM)];

    /// Splits at [`PIECE`], encrypts or decrypts each, and returns them with the tag.
    fn in_pieces(mut sealing: Sealing, bytes: &[u8], act: fn(&mut Sealing, &[u8], &mut Vec<u8>)) -> (Vec<u8>, Sealing) {
        let mut done = Vec::new();
        bytes.chunks(PIECE).for_each(|piece| act(&mut sealing, piece, &mut done));
        (done, sealing)
    }

    #[test]
    fn in_pieces_comes_what_comes_as_a_whole_of_any_length() {
        let around = |len: usize| len.saturating_sub(2)..=len + 2;
        let lengths = [0, 16, 32, 48, 64, 128, 1000, PIECE, PIECE + 64, 2 * PIECE, 3 * PIECE + 77].map(around);
        for (begin, algorithm) in BOTH {
            let key = LessSafeKey::new(UnboundKey::new(algorithm, KEY).unwrap());
            for len in lengths.iter().cloned().flatten() {
                let plain: Vec<u8> = (0..=250).cycle().take(len).collect();
                let mut whole = plain.clone();
                let nonce = Nonce::assume_unique_for_key(*NONCE);
                let tag = key.seal_in_place_separate_tag(nonce, Aad::empty(), &mut whole).unwrap();
                let (sealed, sealing) = in_pieces(begin(KEY, NONCE), &plain, Sealing::encrypt);
                assert!(sealed == whole, "{algorithm:?}: {len} bytes");
                assert_eq!(sealing.tag(), tag.as_ref(), "{algorithm:?}: {len} bytes");
                let (opened, sealing) = in_pieces(begin(KEY, NONCE), &whole, Sealing::decrypt);
                assert!(opened == plain && sealing.matches(tag.as_ref()), "{algorithm:?}: {len} bytes");
            }
        }
    }

    #[test]
    fn another_bit_anywhere_is_not_proven_by_the_tag() {
        let plain = [7; 100];
        for (begin, algorithm) in BOTH {
            let (sealed, sealing) = in_pieces(begin(KEY, NONCE), &plain, Sealing::encrypt);
            let stored = [&sealed[..], &sealing.tag()].concat();
            for bit in 0..stored.len() * 8 {
                let mut changed = stored.clone();
                changed[bit / 8] ^= 1 << (bit % 8);
                let (sealed, tag) = changed.split_at(plain.len());
                let (_, sealing) = in_pieces(begin(KEY, NONCE), sealed, Sealing::decrypt);
                assert!(!sealing.matches(tag), "{algorithm:?}: bit {bit}");
            }
        }
    }

    #[test]
    fn the_last_block_that_chacha_encrypts_is_the_right_one() {
        let mut sealing = Sealing::chacha20_poly1305(KEY, NONCE);
        let Cipher::ChaCha20Poly1305(cipher) = &mut sealing.cipher else { unreachable!() };
        // The first block is not data.
        cipher.0.seek(CHACHA_LONGEST);
        let mut last = Vec::new();
        sealing.encrypt(&[0; CHACHA_BLOCK], &mut last);
        // Of OpenSSL: `openssl enc -chacha20 -K <key> -iv <counter, little-endian, and nonce>`.
        let expected = "e5c45e47414453c3b564bbb629bd401bf5f7122dbe78896ebba740d034a1ff63\
                        0aac234e5dc28be8a7106c6d2f21e4774acf93e4b76fae76a5ccf998b43581ab";
        assert_eq!(last.iter().map(|byte| format!("{byte:02x}")).collect::<String>(), expected);
    }
}
