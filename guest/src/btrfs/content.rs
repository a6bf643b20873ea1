//! The bytes of a file: where they lie, what they unpack to, or they themselves where they are few.

use std::cell::RefCell;
use std::ops::ControlFlow;

use fs_btrfs::compression::{Compression, ShortDecode, decompress};
use fs_btrfs::fs::EXTENT_DATA_KEY;

use super::extent::{self, Content, Packed, Stored};
use super::subvolumes::Place;
use super::volume::{Root, Volume};
use crate::{Error, ErrorKind, Extent, Extents, Result, Source};

/// Items looked at for one answer at most: those of holes give no extents.
const MAX_ITEMS: u64 = 1 << 16;

/// Which extents of a file of `size` bytes to look for.
#[derive(Debug, Clone, Copy)]
pub(super) struct Window {
    pub(super) from: u64,
    pub(super) size: u64,
    /// About how many, more than 0.
    pub(super) room: usize,
}

/// Returns extents of a file, none of which reaches past its end.
pub(super) fn extents(volume: &Volume, root: Root, file: Place, window: Window) -> Result<Extents> {
    let Window { from, size, room } = window;
    let mut extents = Extents { found: Vec::new(), until: size.max(from) };
    if from >= size {
        return Ok(extents);
    }
    let (mut items, mut end) = (0, 0);
    each_from(volume, root, file, from, |stored| {
        items += 1;
        if stored.start >= size {
            return Ok(ControlFlow::Break(()));
        }
        if stored.start < end {
            return Err(Error::damaged(format!("two extents of {file} are both at {}", stored.start)));
        }
        if extents.found.len() >= room || items > MAX_ITEMS {
            extents.until = stored.start.max(from);
            // Another answer starts there, so this one must end later.
            if extents.until > from {
                return Ok(ControlFlow::Break(()));
            }
        }
        end = (stored.start + stored.len).min(size);
        if end > from {
            let until = add(volume, &stored, end, window, &mut extents.found)?;
            if until < end {
                extents.until = until;
                return Ok(ControlFlow::Break(()));
            }
        }
        extents.until = size;
        Ok(ControlFlow::Continue(()))
    })?;
    Ok(extents)
}

/// Adds those of the bytes that an item is of, up to `end`; returns up to where they were added.
fn add(volume: &Volume, stored: &Stored, end: u64, window: Window, found: &mut Vec<Extent>) -> Result<u64> {
    let start = stored.start;
    let mut whole = |source| found.push(Extent { start, len: end - start, source });
    match &stored.content {
        Content::Hole => {}
        Content::Unwritten => whole(Source::Zeroes),
        Content::Packed { .. } => whole(Source::Encoded),
        Content::Inline(bytes, compression) => {
            let mut bytes = inline(volume, bytes, *compression, stored.len)?;
            bytes.truncate(usize::try_from(end).unwrap_or(usize::MAX));
            whole(Source::Bytes(bytes));
        }
        Content::Plain(logical) => {
            let len = end - start;
            if let Some((member, place, _)) = volume.place(*logical, len).ok().filter(|(_, _, there)| *there == len) {
                whole(Source::Member(member, place));
                return Ok(end);
            }
            // Stripes may be as short as a byte.
            let mut at = start.max(window.from);
            while at < end {
                if found.len() >= window.room {
                    return Ok(at);
                }
                let (member, place, len) = match volume.place(logical + (at - start), end - at) {
                    // Whoever asks for what comes next is told.
                    Err(_) if at > window.from => return Ok(at),
                    placed => placed?,
                };
                found.push(Extent { start: at, len, source: Source::Member(member, place) });
                at += len;
            }
        }
    }
    Ok(end)
}

/// Shows the extents of a file from the one that holds `from` on, or the next.
fn each_from(
    volume: &Volume,
    root: Root,
    file: Place,
    from: u64,
    mut show: impl FnMut(Stored) -> Result<ControlFlow<()>>,
) -> Result<()> {
    let first = volume.last_until(root, file.key(EXTENT_DATA_KEY, from))?.unwrap_or(from);
    volume.items(root, file.key(EXTENT_DATA_KEY, first), |start, item| {
        let stored = extent::parse(start, item, volume.sector());
        show(stored.map_err(|error| Error::new(error.kind(), format!("{file}: {error}")))?)
    })
}

/// Returns the bytes of a file that stand in its first item.
pub(super) fn first_inline(volume: &Volume, root: Root, file: Place) -> Result<Vec<u8>> {
    let mut found = Err(Error::damaged(format!("{file} has no content")));
    each_from(volume, root, file, 0, |stored| {
        if let Content::Inline(bytes, compression) = stored.content {
            found = inline(volume, bytes, compression, stored.len);
        }
        Ok(ControlFlow::Break(()))
    })?;
    found
}

/// Returns what stands in an item; `len` was checked.
fn inline(volume: &Volume, bytes: &[u8], compression: Compression, len: u64) -> Result<Vec<u8>> {
    unpack(volume, compression, bytes, usize::try_from(len).expect("it was checked"))
}

/// Returns what bytes unpack to; what they are short of is zeroes, as for Linux.
fn unpack(volume: &Volume, compression: Compression, bytes: &[u8], len: usize) -> Result<Vec<u8>> {
    let sector = usize::try_from(volume.sector()).expect("64 KiB at most");
    decompress(compression, bytes, len, sector, ShortDecode::Pad).map_err(|error| Error::damaged(error.to_string()))
}

/// Unpacks extents, and keeps the last.
#[derive(Default)]
pub(super) struct Unpacked(RefCell<Option<(Packed, Vec<u8>)>>);

impl Unpacked {
    /// Fills a buffer with the bytes of a file from `offset` on, all of them packed.
    pub(super) fn read(&self, volume: &Volume, root: Root, file: Place, offset: u64, buffer: &mut [u8]) -> Result<()> {
        let mut rest = buffer;
        let mut at = offset;
        if rest.is_empty() {
            return Ok(());
        }
        let elsewhere = |at: u64| Error::new(ErrorKind::WrongKind, format!("{file} has nothing encoded at {at}"));
        each_from(volume, root, file, offset, |stored| {
            let within = at.checked_sub(stored.start).filter(|within| *within < stored.len);
            let (Some(within), Content::Packed { packed, skip }) = (within, stored.content) else {
                return Err(elsewhere(at));
            };
            let len = usize::try_from(stored.len - within).unwrap_or(usize::MAX).min(rest.len());
            let (here, after) = std::mem::take(&mut rest).split_at_mut(len);
            self.copy(volume, packed, skip + within, here).map_err(|error| {
                Error::new(error.kind(), format!("{file}: the extent at {}: {error}", stored.start))
            })?;
            at += len as u64;
            rest = after;
            Ok(if rest.is_empty() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) })
        })?;
        if rest.is_empty() { Ok(()) } else { Err(elsewhere(at)) }
    }

    fn copy(&self, volume: &Volume, packed: Packed, skip: u64, buffer: &mut [u8]) -> Result<()> {
        let mut last = self.0.borrow_mut();
        if last.as_ref().is_none_or(|(kept, _)| *kept != packed) {
            let unpacked = volume.read_data(packed.logical, packed.len, |bytes| {
                unpack(volume, packed.compression, bytes, packed.unpacked)
            })?;
            *last = Some((packed, unpacked));
        }
        let bytes = last.as_ref().map_or(&[][..], |(_, bytes)| bytes);
        let from = usize::try_from(skip).unwrap_or(usize::MAX);
        let here = bytes.get(from..).and_then(|bytes| bytes.get(..buffer.len()));
        buffer.copy_from_slice(here.ok_or_else(|| Error::damaged("it is shorter than its item says"))?);
        Ok(())
    }
}
