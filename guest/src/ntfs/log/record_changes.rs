//! Changes of a record of the table of files.

use std::ops::Range;

use super::super::runs;
use super::bytes::{Bytes, unfit};
use super::change::{Change, Operation};
use super::index_changes::{self, Header};
use crate::{Fields, Result};

const SEQUENCE: usize = 0x10;
const LINKS: usize = 0x12;
const FIRST: usize = 0x14;
const FLAGS: usize = 0x16;
const USED: usize = 0x18;
const NEXT_INSTANCE: usize = 0x28;

const IN_USE: u16 = 1;
const END: usize = 0xffff_ffff;
const INDEX_ROOT: usize = 0x90;

/// Attributes that one record can have at most.
const MAX_ATTRIBUTES: usize = 4096 / 24;

/// Does something to a record whose sectors have their own ends.
///
/// # Errors
/// [`Damaged`](crate::ErrorKind::Damaged) if the record is not as the change expects it.
pub(super) fn apply(bytes: &mut [u8], operation: Operation, change: &Change, data: &[u8]) -> Result<()> {
    let mut record = Bytes(bytes);
    let at = change.record_offset;
    match operation {
        Operation::InitializeRecord => return record.put(at, data),
        Operation::DeallocateRecord => {
            let flags = record.le16(FLAGS)?;
            record.put_le16(FLAGS, flags & !IN_USE)?;
            // Zero means that it is not counted.
            let sequence = record.le16(SEQUENCE)?;
            return record.put_le16(SEQUENCE, if sequence == u16::MAX { 1 } else { sequence + 1 });
        }
        _ => {}
    }
    let used = record.le32(USED)?;
    if used > record.0.len() {
        return Err(unfit());
    }
    if operation == Operation::ZeroEndOfRecord {
        let end = at.checked_add(data.len()).filter(|end| at >= used && *end <= record.0.len()).ok_or_else(unfit)?;
        record.0[at..end].fill(0);
        return Ok(());
    }
    let attribute = attribute(&record, at)?;
    match operation {
        Operation::CreateAttribute => create(&mut record, at, used, data),
        _ if attribute.is_empty() => Err(unfit()),
        Operation::DeleteAttribute => {
            if is_indexed(&record, at)? {
                let links = record.le16(LINKS)?.checked_sub(1).ok_or_else(unfit)?;
                record.put_le16(LINKS, links)?;
            }
            let used = record.splice(at, attribute.len(), used, &[])?;
            record.put_le32(USED, used)
        }
        Operation::UpdateResident => update_resident(&mut record, attribute, used, change, data),
        Operation::UpdateMapping => update_mapping(&mut record, attribute, used, change.attribute_offset, data),
        Operation::SetSizes => {
            if record.0[at + 8] == 0 || !matches!(data.len(), 0x18 | 0x20) || 0x28 + data.len() > attribute.len() {
                return Err(unfit());
            }
            // Stored are what is allocated, the size, what was written, and perhaps what it takes.
            let fields = Fields(data);
            for (from, to) in [(0, 0x28), (8, 0x38), (0x10, 0x30), (0x18, 0x40)] {
                if let Some(number) = fields.array::<8>(from) {
                    record.put(at + to, &number)?;
                }
            }
            Ok(())
        }
        _ => update_root(&mut record, attribute, used, operation, change, data),
    }
}

/// Returns where the attribute lies that starts at `at`, which is empty at the end of all.
fn attribute(record: &Bytes, wanted: usize) -> Result<Range<usize>> {
    let used = record.le32(USED)?;
    let mut at = usize::from(record.le16(FIRST)?);
    for _ in 0..=MAX_ATTRIBUTES {
        let is_end = record.le32(at)? == END;
        let len = if is_end { 0 } else { record.le32(at + 4)? };
        if !is_end && (len < 24 || !len.is_multiple_of(8) || len > used.saturating_sub(at)) {
            return Err(unfit());
        }
        if at == wanted {
            return Ok(at..at + len);
        }
        if is_end {
            return Err(unfit());
        }
        at += len;
    }
    Err(unfit())
}

/// Returns whether an attribute is a name of the file: it is in an index.
fn is_indexed(record: &Bytes, at: usize) -> Result<bool> {
    let fields = Fields(record.0);
    let (form, flags) = (fields.u8(at + 8).ok_or_else(unfit)?, fields.u8(at + 0x16).ok_or_else(unfit)?);
    Ok(form == 0 && flags & 1 != 0)
}

fn create(record: &mut Bytes, at: usize, used: usize, data: &[u8]) -> Result<()> {
    let fields = Fields(data);
    let len = fields.le32(4).and_then(|len| usize::try_from(len).ok());
    if len != Some(data.len()) || data.len() < 24 || !data.len().is_multiple_of(8) {
        return Err(unfit());
    }
    let used = record.splice(at, 0, used, data)?;
    record.put_le32(USED, used)?;
    let instance = fields.le16(0x0e).ok_or_else(unfit)?;
    if record.le16(NEXT_INSTANCE)? <= instance {
        record.put_le16(NEXT_INSTANCE, instance.wrapping_add(1))?;
    }
    if is_indexed(record, at)? {
        let links = record.le16(LINKS)?.checked_add(1).ok_or_else(unfit)?;
        record.put_le16(LINKS, links)?;
    }
    Ok(())
}

/// Lets an attribute have another length: `bytes` from `from` on, to its end.
fn rewrite(record: &mut Bytes, attribute: &Range<usize>, used: usize, from: usize, bytes: &[u8]) -> Result<()> {
    let start = attribute.start.checked_add(from).filter(|start| *start <= attribute.end).ok_or_else(unfit)?;
    let mut padded = bytes.to_vec();
    padded.resize((from + bytes.len()).next_multiple_of(8) - from, 0);
    let used = record.splice(start, attribute.end - start, used, &padded)?;
    record.put_le32(USED, used)?;
    record.put_le32(attribute.start + 4, from + padded.len())
}

fn update_resident(
    record: &mut Bytes,
    attribute: Range<usize>,
    used: usize,
    change: &Change,
    data: &[u8],
) -> Result<()> {
    let (at, from) = (attribute.start, change.attribute_offset);
    if change.redo_data.len() == change.undo_data.len() {
        // It may be about what the attribute says of itself, even of one that is not resident.
        if from + data.len() > attribute.len() {
            return Err(unfit());
        }
        record.put(at + from, data)?;
        return if record.le32(at + 4)? == attribute.len() { Ok(()) } else { Err(unfit()) };
    }
    let value = usize::from(record.le16(at + 0x14)?);
    let len = record.le32(at + 0x10)?;
    if record.0[at + 8] != 0 || from < value || from > value.saturating_add(len) {
        return Err(unfit());
    }
    rewrite(record, &attribute, used, from, data)?;
    record.put_le32(at + 0x10, from + data.len() - value)
}

fn update_mapping(record: &mut Bytes, attribute: Range<usize>, used: usize, from: usize, data: &[u8]) -> Result<()> {
    let at = attribute.start;
    let pairs = usize::from(record.le16(at + 0x20)?);
    if record.0[at + 8] == 0 || from < pairs || data.is_empty() {
        return Err(unfit());
    }
    rewrite(record, &attribute, used, from, data)?;
    let len = record.le32(at + 4)?;
    let first = record.le64(at + 0x10)?;
    let stored = record.0.get(at + pairs..at + len).ok_or_else(unfit)?;
    let end = runs::end(stored, first).ok_or_else(unfit)?;
    // Of none, all ones are stored.
    record.put(at + 0x18, &end.wrapping_sub(1).to_le_bytes())
}

fn update_root(
    record: &mut Bytes,
    attribute: Range<usize>,
    used: usize,
    operation: Operation,
    change: &Change,
    data: &[u8],
) -> Result<()> {
    let at = attribute.start;
    let value = usize::from(record.le16(at + 0x14)?);
    let len = record.le32(at + 0x10)?;
    if record.le32(at)? != INDEX_ROOT || record.0[at + 8] != 0 || value.saturating_add(len) > attribute.len() {
        return Err(unfit());
    }
    let mut root = record.0[at..at + value + len].to_vec();
    let header = Header { at: value + 0x10, is_fixed: false };
    index_changes::apply(&mut root, header, operation, change.attribute_offset, data)?;
    rewrite(record, &attribute, used, value, &root[value..])?;
    record.put_le32(at + 0x10, root.len() - value)
}
