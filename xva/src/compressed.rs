//! `ova.xml` of a compressed XVA, which stands at its beginning.
//!
//! It decodes no further than that: the disks come after it, and nothing in them can be reached without decoding all
//! that is before.
//!
//! Invariant: at most [`MAX_BYTES`] are read of the file, and at most as many are decoded.

use std::cell::Cell;
use std::io::{self, BufReader, Read};
use std::sync::Arc;

use flate2::bufread::MultiGzDecoder;
use ruzstd::decoding::StreamingDecoder;
use storage::Object;

use crate::archive::{Compression, Xva, compression};
use crate::ova::{self, XvaDisk};
use crate::{Error, ErrorKind, Result};

/// Bytes read and bytes decoded at most: `ova.xml` and a window of zstd, which comes before the first byte does.
const MAX_BYTES: u64 = 32 << 20;

/// The largest window of zstd, in bytes, so that with the longest `ova.xml` [`MAX_BYTES`] are not exceeded. That of
/// levels up to 19 is 8 MiB at most.
const MAX_WINDOW: u64 = MAX_BYTES - ova::MAX_SIZE - (1 << 20);

/// Bytes asked of the file at once.
const BUFFER: usize = 64 << 10;

/// Returns how an XVA is compressed and which disks it holds, in the order of `ova.xml`.
///
/// Of a compressed one, only the beginning is decoded, 32 MiB at most.
///
/// # Errors
/// `Damaged` if it does not start with a sound `ova.xml` of at most 16 MiB, or does not decompress; `Unsupported` if it
/// was compressed with a zstd window of more than 15 MiB; else what the storage says.
pub fn describe(object: Arc<dyn Object>) -> Result<(Compression, Vec<XvaDisk>)> {
    let compression = compression(object.as_ref())?;
    let failure = Cell::new(None);
    let mut stored = BufReader::with_capacity(BUFFER, Beginning { object: &*object, at: 0, failure: &failure });
    let disks = match compression {
        Compression::None => return Ok((compression, Xva::open(object)?.disks().to_vec())),
        Compression::Gzip => first_entry(MultiGzDecoder::new(stored), "gzip"),
        Compression::Zstd => {
            check_window(object.as_ref())?;
            match StreamingDecoder::new(&mut stored) {
                Ok(plain) => first_entry(plain, "zstd"),
                Err(error) => Err(undecodable("zstd", &error)),
            }
        }
    };
    // A decoder wraps what the storage said, or replaces it.
    match failure.take() {
        Some(error) => Err(error),
        None => Ok((compression, disks?)),
    }
}

/// Reads `ova.xml` off the beginning of an archive.
fn first_entry(mut archive: impl Read, name: &str) -> Result<Vec<XvaDisk>> {
    let mut block = [0; 512];
    archive.read_exact(&mut block).map_err(|error| undecodable(name, &error))?;
    let size = ova::size(&block)?;
    // Not reserved: the size is only what the header claims.
    let mut xml = Vec::new();
    archive.take(size).read_to_end(&mut xml).map_err(|error| undecodable(name, &error))?;
    let found = xml.len();
    if u64::try_from(found) != Ok(size) {
        return Err(ova::missing(&format!("it has {size} bytes, {found} could be decompressed: the file is cut off")));
    }
    ova::parse(&xml)
}

fn undecodable(name: &str, error: &dyn std::fmt::Display) -> Error {
    Error::damaged(format!("its beginning does not decompress with {name}: {error}"))
}

/// Makes sure that decoding keeps no more than [`MAX_WINDOW`]: nothing comes out before the window is full.
///
/// Source: RFC 8878, section 3.1.1.1.
fn check_window(object: &dyn Object) -> Result<()> {
    // Magic, descriptor, window, dictionary id, size of the content.
    let mut head = [0; 18];
    // What a short file lacks is zero here; the decoder says so.
    object.read_at(0, &mut head)?;
    let descriptor = head[4];
    let window = if descriptor & 0x20 == 0 {
        let (exponent, mantissa) = (head[5] >> 3, u64::from(head[5] & 7));
        let base = 1_u64 << (10 + exponent);
        base + base / 8 * mantissa
    } else {
        // One segment: the window is the content.
        let start = 5 + [0, 1, 2, 4][usize::from(descriptor & 3)];
        let len = [1, 2, 4, 8][usize::from(descriptor >> 6)];
        let mut size = [0; 8];
        size[..len].copy_from_slice(&head[start..start + len]);
        u64::from_le_bytes(size).saturating_add(if len == 2 { 256 } else { 0 })
    };
    if window > MAX_WINDOW {
        return Err(Error::new(
            ErrorKind::Unsupported,
            format!(
                "is an XVA compressed with zstd and a window of {window} bytes, at most {MAX_WINDOW} were expected"
            ),
        ));
    }
    Ok(())
}

/// The first [`MAX_BYTES`] of a file, one after the other.
struct Beginning<'a> {
    object: &'a dyn Object,
    at: u64,
    /// Why it could not be read, which the decoders do not tell.
    failure: &'a Cell<Option<Error>>,
}

impl Read for Beginning<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let fail = |error: Error| {
            let failed = io::Error::other(error.to_string());
            self.failure.set(Some(error));
            failed
        };
        let left = usize::try_from(MAX_BYTES - self.at).unwrap_or(usize::MAX).min(buffer.len());
        if left == 0 && !buffer.is_empty() {
            return Err(fail(ova::missing(&format!("it does not end within the first {MAX_BYTES} bytes"))));
        }
        let count = self.object.read_at(self.at, &mut buffer[..left]).map_err(|error| fail(error.into()))?;
        self.at += u64::try_from(count).map_err(io::Error::other)?;
        Ok(count)
    }
}
