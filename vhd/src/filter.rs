//! The filter of an exploded VHD: how its header, footer, table and blocks are compressed.
//!
//! One filter holds for the whole folder; `chunk-filters.json` names it. What is decoded never exceeds what the caller
//! allows, whatever the stored bytes claim. Streams that Node's zlib accepts are accepted, others are not.

use std::io::Read;

use brotli::enc::StandardAlloc;
use brotli::{BrotliDecompressStream, BrotliResult, BrotliState};
use flate2::bufread::GzDecoder;
use libdeflater::{DecompressionError, Decompressor};
use serde_json::Value;

use crate::error::FormatError;

/// Decoded output grows from this size on, so that a limit alone allocates nothing.
const FIRST_BUFFER_BYTES: usize = 64 << 10;

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

    /// Decodes `stored` into `out`, which it must fill exactly.
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
            Self::Gzip => gunzip_exact(stored, out),
            Self::Brotli => {
                let mut decoder = Brotli::new(stored);
                match decoder.step(out) {
                    (BrotliResult::ResultSuccess, len) => check_len(len, out.len()),
                    (BrotliResult::NeedsMoreOutput, _) => Err(too_long(out.len())),
                    (BrotliResult::NeedsMoreInput, _) => Err(cut_off("brotli")),
                    (BrotliResult::ResultFailure, _) => Err(unsound("brotli")),
                }
            }
        }
    }
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
