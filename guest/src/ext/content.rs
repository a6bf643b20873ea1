//! The bytes of a file: where they lie, or they themselves where they are few.

use fs_ext4::checksum::linux_crc32c;
use fs_ext4::inode::InodeFlags;

use super::map::{self, Blocks, Place, Runs, Window};
use super::volume::{Node, Volume};
use super::{attributes, xattrs};
use crate::overlay;
use crate::{Error, ErrorKind, Extent, Extents, Result, Source};

/// Returns extents of a file or directory.
pub(super) fn extents(volume: &Volume, node: &Node, from: u64, room: usize) -> Result<Extents> {
    node.check_plain()?;
    let size = attributes::size(volume, node)?;
    if from >= size {
        return Ok(Extents { found: Vec::new(), until: from });
    }
    if node.has(InodeFlags::INLINE_DATA) {
        let bytes = inline(volume, node)?;
        let len = bytes.len() as u64;
        let extent = Extent { start: 0, len, source: Source::Bytes(bytes) };
        return Ok(Extents { found: if from < len { vec![extent] } else { Vec::new() }, until: size });
    }
    let block_size = volume.block_size();
    let window = Window { from: from / block_size, end: size.div_ceil(block_size), room: room.max(1) };
    let runs = runs(volume, node, window)?;
    let mut found = Vec::new();
    for run in runs.found {
        let (start, len) = (run.start * block_size, run.len * block_size);
        match run.place {
            Place::Unwritten => found.push(Extent { start, len, source: Source::Zeroes }),
            Place::At(block) => pieces(volume, start, block * block_size, len, &mut found),
        }
        // Blocks of which the journal holds newer ones lie apart.
        if found.len() >= room.max(1) {
            let until = found.last().map_or(from, |last| last.start + last.len);
            return Ok(Extents { found, until: until.min(size).max(from) });
        }
    }
    let until = runs.until.saturating_mul(block_size).min(size);
    Ok(Extents { found, until })
}

/// Adds where the bytes of the volume from `at` on lie after its journal was replayed.
fn pieces(volume: &Volume, start: u64, at: u64, len: u64, found: &mut Vec<Extent>) {
    let mut done = 0;
    while done < len {
        let (place, here) = volume.overlay().place_at(at + done, len - done);
        let source = match place {
            overlay::Place::Base(place) => Source::Member(0, place),
            overlay::Place::Bytes(bytes) => Source::Bytes(bytes.to_vec()),
            overlay::Place::Zeroes => Source::Zeroes,
        };
        found.push(Extent { start: start + done, len: here, source });
        done += here;
    }
}

/// Returns where the blocks of a file lie that has any.
pub(super) fn runs(volume: &Volume, node: &Node, window: Window) -> Result<Runs> {
    let runs = if node.has(InodeFlags::EXTENTS) {
        let checksummer = volume.checksummer();
        let seed = checksummer.crc_with_prefix(node.number, &node.inode.generation.to_le_bytes());
        let verify = |covered: &[u8], stored| !checksummer.enabled || linux_crc32c(seed, covered) == stored;
        map::of_extents(volume, &verify, &node.inode.block, window)
    } else {
        map::of_pointers(volume, &node.inode.block, window)
    };
    let runs = runs.map(|runs| volume.changes().apply_ranges(node.number, window, runs));
    runs.map_err(|error| Error::new(error.kind(), format!("inode {}: {error}", node.number)))
}

/// Returns all bytes of something small.
///
/// # Errors
/// [`ErrorKind::TooMuch`] if it is of more than `most` bytes.
pub(super) fn read(volume: &Volume, node: &Node, most: u32) -> Result<Vec<u8>> {
    let size = node.inode.size;
    let len = usize::try_from(size).ok().filter(|_| size <= u64::from(most)).ok_or_else(|| {
        let message = format!("inode {} is of {size} bytes where {most} are the most", node.number);
        Error::new(ErrorKind::TooMuch, message)
    })?;
    if node.has(InodeFlags::INLINE_DATA) {
        let mut bytes = inline(volume, node)?;
        bytes.resize(len, 0);
        return Ok(bytes);
    }
    let block_size = volume.block_size();
    let end = size.div_ceil(block_size);
    let mut bytes = vec![0; len];
    // Each run is of one block at least.
    let room = usize::try_from(end).unwrap_or(usize::MAX);
    for run in runs(volume, node, Window { from: 0, end, room })?.found {
        let Place::At(first) = run.place else { continue };
        for within in 0..run.len.min(end - run.start) {
            let start = usize::try_from((run.start + within) * block_size).expect("less than `most`");
            let block = volume.read(first + within)?;
            let here = block.len().min(len - start);
            bytes[start..start + here].copy_from_slice(&block[..here]);
        }
    }
    Ok(bytes)
}

/// Returns what an inode holds itself; past that, up to its size, are zeroes.
fn inline(volume: &Volume, node: &Node) -> Result<Vec<u8>> {
    let mut bytes = node.inode.block.to_vec();
    bytes.extend(xattrs::inline_rest(volume, node)?.unwrap_or_default());
    bytes.truncate(usize::try_from(node.inode.size).unwrap_or(usize::MAX));
    Ok(bytes)
}
