//! The filter of an exploded VHD: how its header, footer, table and blocks are compressed.
//!
//! One filter holds for the whole folder; `chunk-filters.json` names it. What is decoded never exceeds what the caller
//! allows, whatever the stored bytes claim. Streams that Node's zlib accepts are accepted; of others at most those of gzip
//! whose length and checksum are right nevertheless, so that their bytes are.

use std::cell::RefCell;
use std::io::Read;

use brotli::enc::StandardAlloc;
use brotli::{BrotliDecompressStream, BrotliResult, BrotliState};
use brotlic::{CompressionMode, Quality, WindowSize};
use flate2::bufread::GzDecoder;
use libdeflater::{CompressionLvl, Compressor, DecompressionError, Decompressor};
use serde_json::Value;
use storage::decoding;

use crate::error::FormatError;

/// Decoded output grows from this size on, so that a limit alone allocates nothing.
const FIRST_BUFFER_BYTES: usize = 64 << 10;

/// Node's `Z_BEST_SPEED`.
const GZIP_LEVEL: i32 = 1;
/// Node's default: 4 MiB, all of a block.
const BROTLI_WINDOW_BITS: u8 = 22;

/// How the files of an exploded VHD are compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Filter {
    /// Not at all.
    None,
    /// gzip members.
    Gzip,
    /// A brotli stream without the large window extension.
    Brotli,
}

impl Filter {
    /// Parses `chunk-filters.json`: a JSON array of which the first element names the filter; an empty one is none.
    ///
    /// # Errors
    /// `Damaged` if it is not a JSON array of strings, `Unsupported` for another filter.
    pub fn from_chunk_filters_json(bytes: &[u8]) -> Result<Self, FormatError> {
        let damaged = |found: String| {
            FormatError::damaged(format!("chunk-filters.json must hold a JSON array of filter names: {found}"))
        };
        match serde_json::from_slice(bytes).map_err(|error| damaged(error.to_string()))? {
            Value::Array(filters) => match filters.first() {
                None => Ok(Self::None),
                Some(Value::String(name)) if name == "gzip" => Ok(Self::Gzip),
                Some(Value::String(name)) if name == "brotli" => Ok(Self::Brotli),
                Some(Value::String(name)) => Err(FormatError::unsupported(format!(
                    "the filters 'gzip' and 'brotli' can be read, but chunk-filters.json names '{name}'"
                ))),
                Some(_) => Err(damaged("its first element is no string".to_owned())),
            },
            _ => Err(damaged("it holds another value".to_owned())),
        }
    }

    /// Returns the content of `chunk-filters.json`; `None` if there must be no such file.
    #[must_use]
    pub fn chunk_filters_json(self) -> Option<&'static str> {
        match self {
            Self::None => None,
            Self::Gzip => Some(r#"["gzip"]"#),
            Self::Brotli => Some(r#"["brotli"]"#),
        }
    }

    /// Encodes `plain` as Xen Orchestra does: gzip at level 1, brotli at quality 0, its worst (vhd-lib, `VhdDirectory.js`).
    #[must_use]
    pub fn encode(&self, plain: &[u8]) -> Vec<u8> {
        match self {
            Self::None => plain.to_vec(),
            Self::Gzip => gzip(plain),
            Self::Brotli => brotli(plain),
        }
    }

    /// Decodes `stored`, of which the decoded length is not known but at most `limit` bytes.
    ///
    /// # Errors
    /// `Damaged` if the stream is not sound and complete, or yields more than `limit` bytes.
    pub fn decode(&self, stored: &[u8], limit: usize) -> Result<Vec<u8>, FormatError> {
        match self {
            Self::None if stored.len() > limit => Err(too_long(limit)),
            Self::None => Ok(stored.to_vec()),
            Self::Gzip => gunzip(stored, limit),
            Self::Brotli => unbrotli(stored, limit),
        }
    }

    /// Decodes the first `len` bytes of `stored`, fewer if it ends before.
    ///
    /// What follows them is not kept. It is decoded all the same, up to `limit` bytes in all: the checksum of gzip, which
    /// proves the first bytes, stands at the end, and a stream that does not end as it should is no table.
    ///
    /// # Errors
    /// `Damaged` if the stream is not sound, or yields more than `limit` bytes.
    pub fn decode_prefix(&self, stored: &[u8], len: usize, limit: u64) -> Result<Vec<u8>, FormatError> {
        match self {
            Self::None => Ok(stored[..len.min(stored.len())].to_vec()),
            Self::Gzip => {
                let mut out = Vec::new();
                let wanted = u64::try_from(len).expect("usize fits in u64");
                let mut decoder = GzDecoder::new(stored);
                decoder.by_ref().take(wanted).read_to_end(&mut out).map_err(|_| unsound("gzip"))?;
                let room = limit.saturating_sub(wanted);
                let rest = std::io::copy(&mut decoder.take(room.saturating_add(1)), &mut std::io::sink());
                if rest.map_err(|_| unsound("gzip"))? > room {
                    return Err(FormatError::damaged(format!(
                        "at most {limit} bytes are expected, but more are stored"
                    )));
                }
                Ok(out)
            }
            Self::Brotli => {
                let mut out = unbrotli(stored, usize::try_from(limit).unwrap_or(usize::MAX))?;
                out.truncate(len);
                out.shrink_to_fit();
                Ok(out)
            }
        }
    }

    /// Decodes `stored` into `out`, which it must fill exactly; the time that takes is told by [`storage::with_decoded`].
    ///
    /// # Errors
    /// `Damaged` if the stream is not sound and complete, or its length is another; `out` is then unspecified.
    pub fn decode_exact(&self, stored: &[u8], out: &mut [u8]) -> Result<(), FormatError> {
        match self {
            Self::None => {
                check_len(stored.len(), out.len())?;
                out.copy_from_slice(stored);
                Ok(())
            }
            Self::Gzip => decoding(out.len(), || gunzip_exact(stored, out)),
            Self::Brotli => decoding(out.len(), || unbrotli_exact(stored, out)),
        }
    }
}

thread_local! {
    /// What the blocks that a thread encodes are encoded into: fresh memory for each would have to be cleared, twice.
    static SCRATCH: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

/// Has `encode` write up to `bound` bytes; returns as many as it says it wrote.
///
/// They take no more room than they need: what is encoded may wait to be written.
fn encoded(bound: usize, encode: impl FnOnce(&mut [u8]) -> usize) -> Vec<u8> {
    SCRATCH.with_borrow_mut(|scratch| {
        if scratch.len() < bound {
            scratch.resize(bound, 0);
        }
        let len = encode(&mut scratch[..bound]);
        scratch[..len].to_vec()
    })
}

fn gzip(plain: &[u8]) -> Vec<u8> {
    let mut compressor = Compressor::new(CompressionLvl::new(GZIP_LEVEL).expect("libdeflate has this level"));
    let bound = compressor.gzip_compress_bound(plain.len());
    encoded(bound, |out| compressor.gzip_compress(plain, out).expect("the bound is never exceeded"))
}

/// With the encoder in C: the one in Rust is half as fast.
fn brotli(plain: &[u8]) -> Vec<u8> {
    // The bound holds at any quality: what would be longer is stored uncompressed.
    let bound = brotlic::compress_bound(plain.len(), Quality::best()).expect("there is one from quality 2 on");
    let window = WindowSize::new(BROTLI_WINDOW_BITS).expect("brotli has windows of 10 to 24 bits");
    encoded(bound, |out| {
        let compressed = brotlic::compress(plain, out, Quality::worst(), window, CompressionMode::Generic);
        compressed.expect("the bound is never exceeded")
    })
}

fn check_len(found: usize, expected: usize) -> Result<(), FormatError> {
    if found == expected {
        return Ok(());
    }
    Err(FormatError::damaged(format!("{expected} bytes are expected, but {found} are stored")))
}

fn too_long(limit: usize) -> FormatError {
    FormatError::damaged(format!("at most {limit} bytes are expected, but more are stored"))
}

fn cut_off(kind: &str) -> FormatError {
    FormatError::damaged(format!("the {kind} stream ends too early"))
}

fn unsound(kind: &str) -> FormatError {
    FormatError::damaged(format!("the bytes are not a sound {kind} stream"))
}

/// Decodes gzip members one after another. As in Node, zero bytes after a member are padding, others another member.
fn gunzip(stored: &[u8], limit: usize) -> Result<Vec<u8>, FormatError> {
    let mut out = Vec::new();
    let mut rest = stored;
    loop {
        let room = u64::try_from(limit - out.len()).expect("usize fits in u64");
        GzDecoder::new(&mut rest).take(room.saturating_add(1)).read_to_end(&mut out).map_err(|error| {
            match error.kind() {
                std::io::ErrorKind::UnexpectedEof => cut_off("gzip"),
                _ => unsound("gzip"),
            }
        })?;
        if out.len() > limit {
            return Err(too_long(limit));
        }
        if rest.first().is_none_or(|byte| *byte == 0) {
            return Ok(out);
        }
    }
}

/// Decodes the usual single member at full speed, and anything else member by member.
///
/// The last four bytes of a member are its length: if they do not say what was decoded, something follows the member.
fn gunzip_exact(stored: &[u8], out: &mut [u8]) -> Result<(), FormatError> {
    match Decompressor::new().gzip_decompress(stored, out) {
        Ok(len) if len == out.len() && ends_with_len(stored, len) => return Ok(()),
        Ok(_) => {}
        Err(DecompressionError::InsufficientSpace) => return Err(too_long(out.len())),
        Err(DecompressionError::BadData) => return Err(unsound("gzip")),
    }
    let decoded = gunzip(stored, out.len())?;
    check_len(decoded.len(), out.len())?;
    out.copy_from_slice(&decoded);
    Ok(())
}

fn ends_with_len(stored: &[u8], len: usize) -> bool {
    u32::try_from(len).is_ok_and(|len| stored.ends_with(&len.to_le_bytes()))
}

/// A brotli decoder over bytes in memory. What follows the end of the stream is ignored, as in Node.
struct Brotli<'a> {
    stored: &'a [u8],
    at: usize,
    state: BrotliState<StandardAlloc, StandardAlloc, StandardAlloc>,
}

impl<'a> Brotli<'a> {
    fn new(stored: &'a [u8]) -> Self {
        // The large window extension would let a few bytes ask for a gigabyte.
        let state =
            BrotliState::new_strict(StandardAlloc::default(), StandardAlloc::default(), StandardAlloc::default());
        Self { stored, at: 0, state }
    }

    /// Decodes into `out` until it is full or the stream ends; also returns how many bytes that were.
    fn step(&mut self, out: &mut [u8]) -> (BrotliResult, usize) {
        let (mut input_left, mut output_left, mut written, mut total) = (self.stored.len() - self.at, out.len(), 0, 0);
        let result = BrotliDecompressStream(
            &mut input_left,
            &mut self.at,
            self.stored,
            &mut output_left,
            &mut written,
            out,
            &mut total,
            &mut self.state,
        );
        (result, written)
    }
}

fn unbrotli_exact(stored: &[u8], out: &mut [u8]) -> Result<(), FormatError> {
    match Brotli::new(stored).step(out) {
        (BrotliResult::ResultSuccess, len) => check_len(len, out.len()),
        (BrotliResult::NeedsMoreOutput, _) => Err(too_long(out.len())),
        (BrotliResult::NeedsMoreInput, _) => Err(cut_off("brotli")),
        (BrotliResult::ResultFailure, _) => Err(unsound("brotli")),
    }
}

fn unbrotli(stored: &[u8], limit: usize) -> Result<Vec<u8>, FormatError> {
    let mut decoder = Brotli::new(stored);
    let mut out = vec![0; limit.min(FIRST_BUFFER_BYTES)];
    let mut len = 0;
    loop {
        let (result, written) = decoder.step(&mut out[len..]);
        len += written;
        match result {
            BrotliResult::ResultSuccess => {
                out.truncate(len);
                return Ok(out);
            }
            BrotliResult::NeedsMoreOutput if len >= limit => return Err(too_long(limit)),
            BrotliResult::NeedsMoreOutput => out.resize(limit.min(out.len().saturating_mul(2)), 0),
            BrotliResult::NeedsMoreInput => return Err(cut_off("brotli")),
            BrotliResult::ResultFailure => return Err(unsound("brotli")),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;
    use crate::error::ErrorKind;
    use crate::geometry::tests::Random;

    /// "abc" as written by Node 20: gzip at level 1, brotli at quality 0.
    const GZIP_ABC: &str = "1f8b08000000000004034b4c4a0600c241243503000000";
    const BROTLI_ABC: &str = "0b018061626303";

    fn hex(text: &str) -> Vec<u8> {
        (0..text.len()).step_by(2).map(|at| u8::from_str_radix(&text[at..at + 2], 16).unwrap()).collect()
    }

    fn gzip(bytes: &[u8]) -> Vec<u8> {
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        encoder.write_all(bytes).unwrap();
        encoder.finish().unwrap()
    }

    fn brotli(bytes: &[u8]) -> Vec<u8> {
        let mut stored = Vec::new();
        brotli::CompressorWriter::new(&mut stored, 4096, 0, 22).write_all(bytes).unwrap();
        stored
    }

    fn encoded(filter: Filter, bytes: &[u8]) -> Vec<u8> {
        match filter {
            Filter::None => bytes.to_vec(),
            Filter::Gzip => gzip(bytes),
            Filter::Brotli => brotli(bytes),
        }
    }

    /// Decodes in both ways, which must agree, into a buffer of the right length.
    fn decode(filter: Filter, stored: &[u8], len: usize) -> Result<Vec<u8>, ErrorKind> {
        let mut exact = vec![0xa5; len];
        let exact = filter.decode_exact(stored, &mut exact).map(|()| exact).map_err(|error| error.kind);
        let loose = filter.decode(stored, len).map_err(|error| error.kind);
        assert_eq!(exact, loose);
        loose
    }

    const ALL: [Filter; 3] = [Filter::None, Filter::Gzip, Filter::Brotli];

    #[test]
    fn the_filter_is_the_first_in_the_list() {
        let table: [(&str, Result<Filter, ErrorKind>); 12] = [
            ("[]", Ok(Filter::None)),
            (r#"["gzip"]"#, Ok(Filter::Gzip)),
            (r#"["brotli"]"#, Ok(Filter::Brotli)),
            ("[ \"brotli\" , \"gzip\" ]\n", Ok(Filter::Brotli)),
            (r#"["none"]"#, Err(ErrorKind::Unsupported)),
            (r#"["zstd"]"#, Err(ErrorKind::Unsupported)),
            ("[null]", Err(ErrorKind::Damaged)),
            ("[7]", Err(ErrorKind::Damaged)),
            ("", Err(ErrorKind::Damaged)),
            ("{}", Err(ErrorKind::Damaged)),
            (r#""gzip""#, Err(ErrorKind::Damaged)),
            (r#"["gzip""#, Err(ErrorKind::Damaged)),
        ];
        for (json, expected) in table {
            assert_eq!(
                Filter::from_chunk_filters_json(json.as_bytes()).map_err(|error| error.kind),
                expected,
                "{json}"
            );
        }
    }

    #[test]
    fn streams_written_by_node_are_decoded() {
        assert_eq!(decode(Filter::Gzip, &hex(GZIP_ABC), 3), Ok(b"abc".to_vec()));
        assert_eq!(decode(Filter::Brotli, &hex(BROTLI_ABC), 3), Ok(b"abc".to_vec()));
        assert_eq!(decode(Filter::None, b"abc", 3), Ok(b"abc".to_vec()));
    }

    #[test]
    fn what_is_encoded_is_decoded() {
        let mut random = Random(0x2545_f491_4f6c_dd1d);
        let block = 512 + (2 << 20);
        let mixed = [vec![0xff; 512], random.bytes(100_000), vec![0; block - 100_512]].concat();
        for content in [Vec::new(), vec![7], vec![0; block], random.bytes(block), mixed] {
            for filter in ALL {
                let stored = filter.encode(&content);
                assert!(decode(filter, &stored, content.len()) == Ok(content.clone()), "{filter:?}: {}", content.len());
                // What is read of a block, and kept of it in memory, is bounded by this.
                assert!(stored.len() <= content.len() + content.len() / 8 + (16 << 10));
                assert_eq!(stored.capacity(), stored.len());
            }
        }
        // As small as what Node 20 makes of a block of zeroes: 1342 and 9184 bytes.
        let zeroes = [vec![0xff; 512], vec![0; 2 << 20]].concat();
        assert!(Filter::Brotli.encode(&zeroes).len() < 1400 && Filter::Gzip.encode(&zeroes).len() < 9200);
    }

    #[test]
    fn a_filter_is_named_as_it_is_read() {
        for filter in ALL {
            let json = filter.chunk_filters_json().unwrap_or("[]");
            assert_eq!(Filter::from_chunk_filters_json(json.as_bytes()), Ok(filter));
        }
        let names = ALL.map(Filter::chunk_filters_json);
        assert_eq!(names, [None, Some(r#"["gzip"]"#), Some(r#"["brotli"]"#)]);
    }

    #[test]
    fn what_follows_a_gzip_member_is_treated_as_by_node() {
        let member = hex(GZIP_ABC);
        let with = |rest: &[u8], len| decode(Filter::Gzip, &[&member[..], rest].concat(), len);
        assert_eq!(with(&member, 6), Ok(b"abcabc".to_vec()));
        assert_eq!(with(&gzip(b""), 3), Ok(b"abc".to_vec()));
        assert_eq!(with(&[0; 10], 3), Ok(b"abc".to_vec()));
        assert_eq!(with(&[0, 5, 6], 3), Ok(b"abc".to_vec()));
        assert_eq!(with(&[&member[..], &[0; 10]].concat(), 6), Ok(b"abcabc".to_vec()));
        for rest in [&[0x50][..], &[0x50; 20], &[0x1f], &[0x1f, 0x8b], &[0x1f, 0x8b, 0xff, 0xff, 0, 0, 0, 0, 0, 0]] {
            assert_eq!(with(rest, 3), Err(ErrorKind::Damaged), "{rest:?}");
        }
    }

    #[test]
    fn what_follows_a_brotli_stream_is_ignored() {
        let stored = [hex(BROTLI_ABC), b"junk".to_vec()].concat();
        assert_eq!(decode(Filter::Brotli, &stored, 3), Ok(b"abc".to_vec()));
    }

    #[test]
    fn a_stream_cut_off_anywhere_is_damaged() {
        let content = [vec![0xff; 512], vec![0; 4096], (0..=255).collect()].concat();
        for filter in ALL {
            let stored = encoded(filter, &content);
            assert_eq!(decode(filter, &stored, content.len()), Ok(content.clone()));
            for len in (0..stored.len()).step_by(7) {
                let mut out = vec![0; content.len()];
                let error = filter.decode_exact(&stored[..len], &mut out).unwrap_err();
                assert_eq!(error.kind, ErrorKind::Damaged, "{filter:?}: {len}");
                if filter != Filter::None {
                    assert_eq!(filter.decode(&stored[..len], content.len()).unwrap_err().kind, ErrorKind::Damaged);
                }
            }
        }
    }

    #[test]
    fn another_length_than_expected_is_damaged() {
        let content = vec![7; 100_000];
        for filter in ALL {
            let stored = encoded(filter, &content);
            for len in [0, 1, 99_999, 100_001, 200_000] {
                let mut out = vec![0; len];
                let error = filter.decode_exact(&stored, &mut out).unwrap_err();
                assert_eq!(error.kind, ErrorKind::Damaged, "{filter:?}: {len}");
            }
            assert_eq!(filter.decode(&stored, 200_000).unwrap(), content);
            assert_eq!(filter.decode(&stored, 100_000).unwrap(), content);
            assert_eq!(filter.decode(&stored, 99_999).unwrap_err().kind, ErrorKind::Damaged);
        }
    }

    #[test]
    fn a_bomb_stops_at_the_limit() {
        let bomb = vec![0; 64 << 20];
        for filter in [Filter::Gzip, Filter::Brotli] {
            let stored = encoded(filter, &bomb);
            assert!(stored.len() < 1 << 20);
            assert_eq!(filter.decode(&stored, 1024).unwrap_err().kind, ErrorKind::Damaged);
            let mut out = vec![0; 1024];
            assert_eq!(filter.decode_exact(&stored, &mut out).unwrap_err().kind, ErrorKind::Damaged);
        }
    }

    #[test]
    fn an_empty_content_is_decoded() {
        assert_eq!(decode(Filter::Gzip, &gzip(b""), 0), Ok(Vec::new()));
        assert_eq!(decode(Filter::Brotli, &brotli(b""), 0), Ok(Vec::new()));
    }

    #[test]
    fn a_flipped_bit_in_a_gzip_stream_is_damaged() {
        let content: Vec<u8> = (0..5000_u32).flat_map(u32::to_le_bytes).collect();
        let mut stored = gzip(&content);
        let middle = stored.len() / 2;
        stored[middle] ^= 1;
        assert_eq!(decode(Filter::Gzip, &stored, content.len()), Err(ErrorKind::Damaged));
    }

    #[test]
    fn the_large_window_of_brotli_is_refused() {
        // The first byte of a stream with the extension; in plain brotli its window bits are reserved.
        assert_eq!(decode(Filter::Brotli, &[0x11, 0x1e, 0x03], 0), Err(ErrorKind::Damaged));
    }

    #[test]
    fn a_prefix_needs_no_more_than_itself() {
        let content: Vec<u8> = (0..100_000_u32).flat_map(u32::to_le_bytes).collect();
        for filter in ALL {
            let stored = encoded(filter, &content);
            assert_eq!(filter.decode_prefix(&stored, 1000, 400_000).unwrap(), content[..1000], "{filter:?}");
            assert_eq!(filter.decode_prefix(&stored, content.len(), 400_000).unwrap(), content, "{filter:?}");
            assert_eq!(filter.decode_prefix(&stored, content.len() + 1, 400_000).unwrap(), content, "{filter:?}");
            assert_eq!(filter.decode_prefix(&encoded(filter, b""), 10, 10).unwrap(), b"", "{filter:?}");
        }
    }

    #[test]
    fn a_prefix_of_gzip_is_proven_by_the_checksum_at_the_end() {
        let mut content = vec![0; 100_000];
        Random(7).bytes(2000).iter().enumerate().for_each(|(at, byte)| content[at] = *byte);
        let stored = gzip(&content);
        assert!(Filter::Gzip.decode_prefix(&stored, 1000, 99_999).is_err());
        for at in 10..stored.len() {
            let mut flipped = stored.clone();
            flipped[at] ^= 0x10;
            // Some bits between the data and the checksum mean nothing.
            let decoded = Filter::Gzip.decode_prefix(&flipped, 1000, 100_000);
            assert!(decoded.is_err() || decoded.unwrap() == content[..1000], "byte {at}");
        }
        assert!(Filter::Gzip.decode_prefix(&stored[..stored.len() - 8], 1000, 100_000).is_err());
    }

    #[test]
    fn noise_never_panics_and_never_exceeds_the_limit() {
        let mut random = Random(0x2545_f491_4f6c_dd1d);
        for _ in 0..500 {
            let len = random.index(300);
            let noise = random.bytes(len);
            let limit = random.index(5000);
            for filter in ALL {
                for start in [&[][..], &[0x1f, 0x8b, 8, 0, 0, 0, 0, 0, 4, 3], &[0x0b]] {
                    let stored = [start, &noise].concat();
                    if let Ok(decoded) = filter.decode(&stored, limit) {
                        assert!(decoded.len() <= limit);
                    }
                    if let Ok(decoded) = filter.decode_prefix(&stored, limit, limit as u64) {
                        assert!(decoded.len() <= limit);
                    }
                    if filter.decode_exact(&stored, &mut vec![0; limit]).is_ok() {
                        assert_eq!(filter.decode(&stored, limit).unwrap().len(), limit);
                    }
                }
            }
        }
    }

    #[test]
    fn what_was_encoded_is_decoded() {
        let mut random = Random(0x9e37_79b9_7f4a_7c15);
        for round in 0..200 {
            let len = random.index(3000) * (1 + round % 40);
            let mut content = random.bytes(len);
            content[len / 3..len / 2].fill(0);
            for filter in ALL {
                assert_eq!(decode(filter, &encoded(filter, &content), len), Ok(content.clone()));
            }
        }
    }
}
