//! Room in the table of a VHD file for a disk that grew.
//!
//! Where nothing lies behind the table, it becomes longer in place. Else the file is written anew beside itself, with the same
//! content, and takes its own name: no block is moved under a reader.

use std::sync::Arc;

use storage::{Object, UNPUBLISHED, WritableObject, publish_rename};

use super::{Control, Image, Merge};
use crate::error::{Error, ErrorKind, Result};
use crate::flat_writer::MAX_FILE_BYTES;
use crate::footer::{FOOTER_BYTES, Footer};
use crate::geometry::{FileSector, SECTOR};
use crate::header::{HEADER_BYTES, Header, ParentLocator};
use crate::layer::BlockMap;
use crate::locator::MAX_NAME_BYTES;
use crate::new_layer::TABLE_OFFSET;

/// Why a merge can be impossible.
pub(super) const TOO_LARGE: &str = "merged, it would have more than the 2 TiB that a VHD file can have";

/// The first bytes of a header, which alone change when the table becomes longer: a sector is written as a whole.
const HEADER_SECTOR: usize = 512;

pub(super) enum Made {
    /// There was room.
    Not,
    /// The base as it is now.
    Room(Box<Image>),
    Stopped,
}

/// Makes room in the base's table for each block of the target.
pub(super) fn make(merge: &Merge, base: &Image, target: &Image, control: &Control) -> Result<Made> {
    let header = header(base);
    let needed = u32::try_from(base.block_count().max(target.block_count())).expect("at most MAX_BLOCKS");
    let has_space = space(base) >= table_len(base, target) as u64;
    if has_space && header.max_table_entries >= needed {
        return Ok(Made::Not);
    }
    (control.barrier)()?;
    if has_space {
        widen(merge, base, needed)?;
    } else if !rewrite(merge, base, needed, control)? {
        return Ok(Made::Stopped);
    }
    Ok(Made::Room(Box::new(Image::open(&merge.reader, &base.layer.name)?)))
}

fn header(image: &Image) -> &Header {
    image.layer.header.as_ref().expect("a fixed disk is not merged")
}

/// Returns how many bytes of the base's table are written in the end, whole sectors.
pub(super) fn table_len(base: &Image, target: &Image) -> usize {
    padded(base.block_count().max(target.block_count()))
}

/// Returns where what may be behind that table begins.
pub(super) fn end_of_table(base: &Image, target: &Image) -> u64 {
    header(base).table_offset.saturating_add(table_len(base, target) as u64).next_multiple_of(SECTOR)
}

fn padded(entries: usize) -> usize {
    (entries * 4).max(1).next_multiple_of(HEADER_SECTOR)
}

/// Returns the first byte behind everything in a file but its last footer: where XO appends blocks, too.
pub(super) fn end_of_data(image: &Image) -> u64 {
    let header = header(image);
    let table = (u64::from(header.max_table_entries) * 4).max(4 * image.block_count() as u64);
    let mut end = header.table_offset.saturating_add(table).max(TABLE_OFFSET);
    end = end.max(image.layer.footer.data_offset + HEADER_BYTES as u64);
    for locator in used(header) {
        end = end.max(locator.offset.saturating_add(u64::from(locator.length)));
    }
    image.map.each_held(image.block_count(), |_, sector| {
        end = end.max(FileSector(sector).bytes() + image.layer.block_size.full_bytes() as u64);
    });
    end.saturating_add(SECTOR - 1) / SECTOR * SECTOR
}

/// Looks whether the merged file may become too large for the numbers of its sectors, whatever room has to be made.
pub(super) fn check_size(base: &Image, target: &Image, blocks: u64) -> Result<()> {
    let most = end_of_data(base)
        .saturating_add(table_len(base, target) as u64)
        .saturating_add(blocks.saturating_mul(base.layer.block_size.full_bytes() as u64));
    if most > MAX_FILE_BYTES {
        return Err(Error::new(ErrorKind::Unsupported, &base.layer.name, TOO_LARGE));
    }
    Ok(())
}

fn used(header: &Header) -> impl Iterator<Item = &ParentLocator> {
    header.locators.iter().filter(|locator| locator.length > 0)
}

/// Returns how many bytes the table may have where it lies.
fn space(image: &Image) -> u64 {
    let (header, header_at) = (header(image), image.layer.footer.data_offset);
    let at = header.table_offset;
    if at < FOOTER_BYTES as u64 || (header_at..header_at.saturating_add(HEADER_BYTES as u64)).contains(&at) {
        return 0;
    }
    let mut next = image.flat().size().saturating_sub(FOOTER_BYTES as u64);
    let mut meet = |other: u64| {
        if other >= at {
            next = next.min(other);
        }
    };
    meet(header_at);
    used(header).for_each(|locator| meet(locator.offset));
    image.map.each_held(image.block_count(), |_, sector| meet(FileSector(sector).bytes()));
    next.saturating_sub(at)
}

/// Makes the table longer where it lies. What is behind it becomes entries without a block before the header counts them.
fn widen(merge: &Merge, base: &Image, entries: u32) -> Result<()> {
    let object = merge.storage.open_to_write(&base.layer.data)?;
    let header = header(base);
    let old = u64::from(header.max_table_entries) * 4;
    let end = padded(usize::try_from(entries).expect("at most MAX_BLOCKS"));
    let start = usize::try_from(old).unwrap_or(usize::MAX).min(end);
    object.write_at(header.table_offset + start as u64, &vec![0xff; end - start])?;
    object.sync()?;
    let mut bytes = [0; HEADER_BYTES];
    let at = base.layer.footer.data_offset;
    if object.read_at(at, &mut bytes)? != HEADER_BYTES {
        return Err(Error::new(ErrorKind::Damaged, &base.layer.data, format!("its header at {at} is cut off")));
    }
    Header::set_max_table_entries(&mut bytes, entries);
    object.write_at(at, &bytes[..HEADER_SECTOR])?;
    Ok(object.sync()?)
}

/// Writes the base anew; false if that was stopped.
fn rewrite(merge: &Merge, base: &Image, entries: u32, control: &Control) -> Result<bool> {
    let storage = &*merge.storage;
    let data = &base.layer.data;
    let unpublished = data.parent().join(&format!(".{}{UNPUBLISHED}", data.file_name()))?;
    let remove = || match storage.remove(&unpublished) {
        Err(error) if error.kind() != storage::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    };
    // Of an attempt before this one.
    remove()?;
    let object = storage.create(&unpublished)?;
    let written = write(&object, base, entries, control);
    if !matches!(written, Ok(true)) {
        // That it cannot be removed either is not what went wrong.
        let _ = remove();
        return written;
    }
    (control.barrier)()?;
    publish_rename(storage, &unpublished, data)?;
    Ok(true)
}

/// Writes what a base holds in the usual order, with a table of so many entries; false if that was stopped.
fn write(object: &Arc<dyn WritableObject>, base: &Image, entries: u32, control: &Control) -> Result<bool> {
    let table_len = padded(usize::try_from(entries).expect("at most MAX_BLOCKS"));
    let mut end = TABLE_OFFSET + table_len as u64;
    let mut header = Header { table_offset: TABLE_OFFSET, max_table_entries: entries, ..header(base).clone() };
    let source = base.flat().object();
    for locator in &mut header.locators {
        end += copy_locator(object, source, locator, end)?;
    }
    let mut blocks = Vec::new();
    base.map.each_held(base.block_count(), |block, sector| blocks.push((sector, block)));
    blocks.sort_unstable();
    let len = base.layer.block_size.full_bytes() as u64;
    let mut table = vec![0xff; table_len];
    for (sector, block) in blocks {
        if (control.is_stopped)() {
            return Ok(false);
        }
        if object.copy_from(source, FileSector(sector).bytes(), end, len)? != len {
            let reason = format!("block {block}: it lies past the end of the file, which is cut off");
            return Err(Error::new(ErrorKind::Damaged, &base.layer.data, reason));
        }
        let place = u32::try_from(end / SECTOR).ok().filter(|place| *place != BlockMap::ABSENT);
        let place = place.ok_or_else(|| Error::new(ErrorKind::Unsupported, &base.layer.data, TOO_LARGE))?;
        table[block * 4..][..4].copy_from_slice(&place.to_be_bytes());
        end += len;
    }
    let footer = Footer { data_offset: FOOTER_BYTES as u64, ..base.layer.footer }.to_bytes();
    object.write_at(0, &[&footer[..], &header.to_bytes(), &table].concat())?;
    object.write_at(end, &footer)?;
    object.sync()?;
    Ok(true)
}

/// Copies the name of a locator to `to`, and returns how much room it takes there. One that nobody would read is dropped.
fn copy_locator(
    object: &Arc<dyn WritableObject>,
    source: &dyn Object,
    locator: &mut ParentLocator,
    to: u64,
) -> Result<u64> {
    let len = u64::from(locator.length);
    if locator.length == 0
        || locator.length > MAX_NAME_BYTES
        || object.copy_from(source, locator.offset, to, len)? != len
    {
        *locator = ParentLocator::default();
        return Ok(0);
    }
    locator.offset = to;
    Ok(len.next_multiple_of(SECTOR))
}
