//! Files that Windows compressed one by one (`compact /exe`, its own programs): their content is in a stream beside it.
//!
//! ```text
//! stream ─ where each chunk but the first starts, from the end of this table on (4 bytes; 8 for files of 4 GiB and more)
//!        ├ chunk 0 ─ as it is, if it has as many bytes as it decodes to; else compressed
//!        └ chunk 1 ...
//! ```
//!
//! The resources of images of Windows (WIM) have the same form. Source: \[MS-XCA\] 2.1 and 2.2; the patent format of CAB
//! files, \[MS-PATCH\], for LZX.

mod bits;
mod lzx;
mod xpress;

use super::content::{self, Unit};
use super::record::DATA;
use super::volume::{Node, Volume};
use crate::{Error, Extent, Extents, Fields, Result, Source};

/// `WofCompressedData`, which holds it.
pub(super) const STREAM: &[u16] =
    &[0x57, 0x6f, 0x66, 0x43, 0x6f, 0x6d, 0x70, 0x72, 0x65, 0x73, 0x73, 0x65, 0x64, 0x44, 0x61, 0x74, 0x61];

/// How the chunks of a file are compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Method {
    Xpress,
    Lzx,
}

/// Returns how, and in chunks of how many bytes.
fn method(number: u32) -> Result<(Method, u64)> {
    match number {
        0 => Ok((Method::Xpress, 4 << 10)),
        1 => Ok((Method::Lzx, 32 << 10)),
        2 => Ok((Method::Xpress, 8 << 10)),
        3 => Ok((Method::Xpress, 16 << 10)),
        _ => Err(Error::unsupported(format!("it is compressed by Windows (WOF) in a way that is not known: {number}"))),
    }
}

/// Returns extents of a file: all of it is to be decoded.
pub(super) fn extents(volume: &Volume, node: &Node, number: u32, from: u64) -> Result<Extents> {
    let size = volume.stream(node, DATA, &[])?.map_or(Ok(0), |stream| stream.size())?;
    method(number).map_err(|error| super::record::of_record(node.number(), &error))?;
    let found = if from < size { vec![Extent { start: 0, len: size, source: Source::Encoded }] } else { Vec::new() };
    Ok(Extents { found, until: size.max(from) })
}

/// Fills a buffer with bytes of a file; `last` is the chunk that was decoded last.
pub(super) fn decode(
    volume: &Volume,
    node: &Node,
    number: u32,
    offset: u64,
    buffer: &mut [u8],
    last: &mut Unit,
) -> Result<()> {
    let (method, chunk_size) = method(number)?;
    let (mut at, mut rest) = (offset, buffer);
    while !rest.is_empty() {
        let start = at / chunk_size * chunk_size;
        let key = Some((node.number(), start));
        if last.key != key {
            last.key = None;
            last.bytes = chunk(volume, node, method, chunk_size, at / chunk_size)
                .map_err(|error| Error::new(error.kind(), format!("file {}, at {start}: {error}", node.number())))?;
            last.key = key;
        }
        let from = usize::try_from(at - start).expect("within a chunk");
        let there = last.bytes.get(from..).filter(|there| !there.is_empty());
        let there = there.ok_or_else(|| Error::damaged(format!("file {} ends before {at}", node.number())))?;
        let len = rest.len().min(there.len());
        let (here, after) = rest.split_at_mut(len);
        here.copy_from_slice(&there[..len]);
        rest = after;
        at += len as u64;
    }
    Ok(())
}

fn chunk(volume: &Volume, node: &Node, method: Method, chunk_size: u64, number: u64) -> Result<Vec<u8>> {
    let missing = || Error::damaged("the stream of what is compressed is missing");
    let size = volume.stream(node, DATA, &[])?.ok_or_else(missing)?.size()?;
    let stream = volume.stream(node, DATA, STREAM)?.ok_or_else(missing)?;
    let stored = stream.size()?;
    let damaged = || Error::damaged("a chunk is not within the stream of what is compressed");
    let chunks = size.div_ceil(chunk_size);
    let entry: u64 = if size > u64::from(u32::MAX) { 8 } else { 4 };
    let table = chunks.saturating_sub(1) * entry;
    if number >= chunks || table > stored {
        return Err(damaged());
    }
    // Where the chunk starts and where the next one does, but for what no entry says.
    let first = number.saturating_sub(1) * entry;
    let mut entries =
        vec![0; usize::try_from((number * entry).saturating_add(entry).min(table) - first).expect("16 at most")];
    content::read(volume, node, &stream, first, &mut entries)?;
    let entries: Vec<u64> = entries
        .chunks_exact(usize::try_from(entry).expect("8 at most"))
        .filter_map(|bytes| if entry == 8 { Fields(bytes).le64(0) } else { Fields(bytes).le32(0).map(u64::from) })
        .collect();
    let start = if number == 0 { 0 } else { *entries.first().ok_or_else(damaged)? };
    let end = if number + 1 == chunks { stored - table } else { *entries.last().ok_or_else(damaged)? };
    let len = chunk_size.min(size - number * chunk_size);
    if start >= end || end > stored - table || end - start > len {
        return Err(damaged());
    }
    let mut input = vec![0; usize::try_from(end - start).expect("at most a chunk")];
    content::read(volume, node, &stream, table + start, &mut input)?;
    if end - start == len {
        return Ok(input);
    }
    let mut output = vec![0; usize::try_from(len).expect("at most a chunk")];
    match method {
        Method::Xpress => xpress::decode(&input, &mut output),
        Method::Lzx => lzx::decode(&input, &mut output),
    }
    .ok_or_else(|| Error::damaged("what is compressed does not decode"))?;
    Ok(output)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whatever_is_decoded_ends() {
        let mut random = 0x9e37_79b9_7f4a_7c15_u64;
        let mut decoded = 0;
        for round in 0..4000 {
            let mut input: Vec<_> = std::iter::repeat_with(|| {
                random ^= random << 13;
                random ^= random >> 7;
                random ^= random << 17;
                random.to_le_bytes()[3]
            })
            .take(400 + round % 300)
            .collect();
            // Codes of 9 bits for all symbols: what follows is symbols.
            if round % 2 == 0 {
                input[..SYMBOLS].fill(0x99);
            }
            let mut output = vec![0; 4096];
            decoded += usize::from(xpress::decode(&input, &mut output).is_some());
            // A block of the whole chunk, aligned or not.
            input[1] = if round % 2 == 0 { 0x30 } else { 0x50 };
            decoded += usize::from(lzx::decode(&input, &mut vec![0; 32 << 10]).is_some());
            decoded += usize::from(super::super::lznt1::decode(&input, &mut output).is_ok());
        }
        assert!(decoded > 0);
    }

    /// Bytes of the lengths of codes.
    const SYMBOLS: usize = 256;

    #[test]
    fn methods_that_are_not_known_are_said() {
        assert_eq!(method(1), Ok((Method::Lzx, 32 << 10)));
        assert_eq!(method(4).expect_err("there is none").kind(), crate::ErrorKind::Unsupported);
    }
}
