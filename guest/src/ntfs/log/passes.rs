//! Redoes what was not written, and undoes what was not ended: on an overlay, so that the disk stays as it is.

use std::collections::BTreeSet;
use std::ops::Range;
use std::sync::Arc;

use disk::Disk;

use super::super::record::{self, DATA, INDEX_ALLOCATION, Record};
use super::super::volume::Volume;
use super::analysis::MAX_RECORDS;
use super::bytes::{Bytes, protect, unfit};
use super::change::{Change, Operation, Target};
use super::index_changes::{self, Header};
use super::journal::{Journal, LogRecord};
use super::record_changes;
use super::tables::{OpenAttribute, Tables};
use crate::overlay::Overlay;
use crate::{Error, ErrorKind, Fields, Result};

/// Bytes of a block of an index at most.
const MAX_BLOCK: usize = 64 << 10;

/// Where the header of its entries lies in a block of an index.
const BLOCK_HEADER: Header = Header { at: 0x18, is_fixed: true };

/// Where the last change of a record or of a block of an index is said.
const LSN: usize = 8;

/// The volume as it is being brought to where it was.
pub(super) struct Passes<'a> {
    journal: &'a Journal<'a>,
    tables: &'a mut Tables,
    cluster_size: u64,
    clusters: u64,
    record_size: usize,
    overlay: Overlay,
    /// What was changed: where its pieces lie, and what it is.
    changed: BTreeSet<(Vec<(u64, usize)>, Kind)>,
}

/// What a change left, which is checked in the end if it has a form.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Kind {
    Record,
    Block,
    Bytes,
}

/// Which way a change is gone through.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    Redo,
    Undo,
}

impl<'a> Passes<'a> {
    pub(super) fn new(journal: &'a Journal<'a>, tables: &'a mut Tables, volume: &Volume) -> Self {
        Self {
            journal,
            tables,
            cluster_size: volume.boot.cluster_size,
            clusters: volume.clusters,
            record_size: usize::try_from(volume.boot.record_size).expect("4 KiB at most"),
            overlay: Overlay::new(volume.disk.clone()),
            changed: BTreeSet::new(),
        }
    }

    /// Does all there is to do, and returns the disk as it is then, if anything is other than it stands.
    pub(super) fn run(mut self) -> Result<Option<Arc<dyn Disk>>> {
        let pages = self.tables.pages.values().map(|page| page.oldest);
        let transactions = self.tables.transactions.values().map(|transaction| transaction.first);
        if let Some(oldest) = pages.chain(transactions).filter(|lsn| *lsn != 0).min() {
            let mut record = Some(self.journal.record(oldest)?);
            while let Some(current) = record {
                self.redo(&current).map_err(|error| of_record(current.lsn, &error))?;
                record = self.journal.after(&current)?;
            }
        }
        let active = self.tables.transactions.values();
        let mut undone = 0;
        for mut lsn in active.map(|transaction| transaction.undo_next).collect::<Vec<_>>() {
            while lsn != 0 {
                undone += 1;
                if undone > MAX_RECORDS {
                    return Err(Error::new(ErrorKind::TooMuch, "the journal has more to undo than is read"));
                }
                let record = self.journal.record(lsn)?;
                self.undo(&record).map_err(|error| of_record(lsn, &error))?;
                if record.undo_next >= lsn {
                    return Err(Error::damaged(format!("what is to be undone before record {lsn:#x} is after it")));
                }
                lsn = record.undo_next;
            }
        }
        self.check()?;
        let is_changed = !self.changed.is_empty();
        Ok(is_changed.then(|| Arc::new(self.overlay) as Arc<dyn Disk>))
    }

    fn redo(&mut self, record: &LogRecord) -> Result<()> {
        if record.is_restart {
            return Ok(());
        }
        let change = Change::parse(record)?;
        if change.redo.target().is_none() {
            return Ok(());
        }
        // What is not in the table was written long ago.
        let Some((page, index)) = self.tables.page_mut(change.attribute, change.vcn) else { return Ok(()) };
        if change.lsn < page.oldest {
            return Ok(());
        }
        let places = page.lcns.get(index..index + change.lcns.len()).ok_or_else(unfit)?;
        if places != change.lcns {
            return Err(Error::unsupported("what it is about was moved afterwards"));
        }
        self.apply(&change, change.redo, &change.redo_data, Way::Redo)
    }

    fn undo(&mut self, record: &LogRecord) -> Result<()> {
        let change = Change::parse(record)?;
        if change.undo.target().is_none() {
            return Ok(());
        }
        if let Some((page, index)) = self.tables.page_mut(change.attribute, change.vcn)
            && !change.lcns.is_empty()
            && page.lcns.get(index..index + change.lcns.len()) != Some(&change.lcns[..])
        {
            return Err(Error::unsupported("what is to be undone was moved afterwards"));
        }
        self.apply(&change, change.undo, &change.undo_data, Way::Undo)
    }

    fn apply(&mut self, change: &Change, operation: Operation, data: &[u8], way: Way) -> Result<()> {
        let attribute = self.tables.attributes.get(&change.attribute).copied();
        let attribute = attribute.ok_or_else(|| Error::damaged("it is about an attribute that is not open"))?;
        match operation.target() {
            Some(Target::Record) => self.change_record(change, attribute, operation, data, way),
            Some(Target::Block) => self.change_block(change, attribute, operation, data, way),
            Some(Target::Bytes) if attribute.kind == INDEX_ALLOCATION => self.write_block(change, attribute, data),
            Some(Target::Bytes) => {
                if change.attribute_offset != 0 {
                    return Err(unfit());
                }
                let pieces = self.pieces(change, change.record_offset, data.len())?;
                self.lay(&pieces, data.to_vec(), Kind::Bytes)
            }
            Some(Target::Bits) => self.change_bits(change, operation == Operation::SetBits, data),
            None => Ok(()),
        }
    }

    fn change_record(
        &mut self,
        change: &Change,
        attribute: OpenAttribute,
        operation: Operation,
        data: &[u8],
        way: Way,
    ) -> Result<()> {
        if (attribute.file, attribute.kind) != (0, DATA) {
            return Err(unfit());
        }
        let pieces = self.pieces(change, 0, self.record_size)?;
        let mut bytes = self.read(&pieces)?;
        let stored = record::restore(&mut bytes, b"FILE");
        match (operation, way) {
            // What was there does not matter: all that was done since follows.
            (Operation::InitializeRecord, Way::Redo) => bytes.fill(0),
            // It had never been given out yet.
            (Operation::DeallocateRecord, Way::Undo) if stored.is_err() => return Ok(()),
            _ => {
                stored?;
                if way == Way::Redo && is_written(&bytes, change.lsn) {
                    return Ok(());
                }
            }
        }
        record_changes::apply(&mut bytes, operation, change, data)?;
        if way == Way::Redo {
            Bytes(&mut bytes).put(LSN, &change.lsn.to_le_bytes())?;
        }
        protect(&mut bytes)?;
        self.lay(&pieces, bytes, Kind::Record)
    }

    fn change_block(
        &mut self,
        change: &Change,
        attribute: OpenAttribute,
        operation: Operation,
        data: &[u8],
        way: Way,
    ) -> Result<()> {
        if attribute.kind != INDEX_ALLOCATION || change.record_offset != 0 {
            return Err(unfit());
        }
        let pieces = self.pieces(change, 0, block_size(attribute)?)?;
        let mut bytes = self.read(&pieces)?;
        record::restore(&mut bytes, b"INDX")?;
        if way == Way::Redo && is_written(&bytes, change.lsn) {
            return Ok(());
        }
        index_changes::apply(&mut bytes, BLOCK_HEADER, operation, change.attribute_offset, data)?;
        if way == Way::Redo {
            Bytes(&mut bytes).put(LSN, &change.lsn.to_le_bytes())?;
        }
        protect(&mut bytes)?;
        self.lay(&pieces, bytes, Kind::Block)
    }

    /// Writes a whole block of an index, or as much of it as is used.
    fn write_block(&mut self, change: &Change, attribute: OpenAttribute, data: &[u8]) -> Result<()> {
        if change.record_offset != 0 || change.attribute_offset != 0 || !data.starts_with(b"INDX") {
            return Err(unfit());
        }
        let pieces = self.pieces(change, 0, block_size(attribute)?)?;
        let mut bytes = self.read(&pieces)?;
        bytes.fill(0);
        Bytes(&mut bytes).put(0, data)?;
        protect(&mut bytes)?;
        self.lay(&pieces, bytes, Kind::Block)
    }

    fn change_bits(&mut self, change: &Change, is_set: bool, data: &[u8]) -> Result<()> {
        let fields = Fields(data);
        let number = |at| fields.le32(at).and_then(|number| usize::try_from(number).ok()).ok_or_else(unfit);
        let (first, count) = (number(0)?, number(4)?);
        let end = first.checked_add(count).filter(|end| *end > first).ok_or_else(unfit)?;
        if change.attribute_offset != 0 || data.len() != 8 {
            return Err(unfit());
        }
        let at = change.record_offset.checked_add(first / 8).ok_or_else(unfit)?;
        let pieces = self.pieces(change, at, end.div_ceil(8) - first / 8)?;
        let mut bytes = self.read(&pieces)?;
        put_bits(&mut bytes, first % 8..first % 8 + count, is_set);
        self.lay(&pieces, bytes, Kind::Bytes)
    }

    /// Returns where `len` bytes `at` some after the start of what a change is about lie.
    fn pieces(&self, change: &Change, at: usize, len: usize) -> Result<Vec<(u64, usize)>> {
        let size = usize::try_from(self.cluster_size).map_err(|_| unfit())?;
        let mut at = change.block_offset.checked_add(at).ok_or_else(unfit)?;
        let mut left = len;
        let mut pieces: Vec<(u64, usize)> = Vec::new();
        while left > 0 {
            let lcn = change.lcns.get(at / size).copied().ok_or_else(unfit)?;
            if lcn == 0 || lcn >= self.clusters {
                return Err(unfit());
            }
            let part = left.min(size - at % size);
            pieces.push((lcn * self.cluster_size + (at % size) as u64, part));
            at += part;
            left -= part;
        }
        Ok(pieces)
    }

    fn read(&self, pieces: &[(u64, usize)]) -> Result<Vec<u8>> {
        let mut bytes = Vec::new();
        for (offset, len) in pieces {
            let start = bytes.len();
            bytes.resize(start + len, 0);
            self.overlay.read_at(*offset, &mut bytes[start..])?;
        }
        Ok(bytes)
    }

    /// Lets the pieces be these bytes.
    fn lay(&mut self, pieces: &[(u64, usize)], mut bytes: Vec<u8>, kind: Kind) -> Result<()> {
        if self.read(pieces)? == bytes {
            return Ok(());
        }
        for (offset, len) in pieces {
            let rest = bytes.split_off(*len);
            self.overlay.lay_bytes(*offset, std::mem::replace(&mut bytes, rest))?;
        }
        self.changed.insert((pieces.to_vec(), kind));
        Ok(())
    }

    /// Checks that what was changed is something that a volume can have.
    fn check(&self) -> Result<()> {
        for (pieces, kind) in &self.changed {
            let mut bytes = self.read(pieces)?;
            match kind {
                Kind::Record if is_in_use(&bytes) => {
                    Record::parse(0, bytes)?.attributes(|_, _, _| true)?;
                }
                Kind::Block => {
                    record::restore(&mut bytes, b"INDX")?;
                    index_changes::check(&mut bytes, BLOCK_HEADER)?;
                }
                Kind::Record | Kind::Bytes => {}
            }
        }
        Ok(())
    }
}

fn put_bits(bytes: &mut [u8], bits: Range<usize>, is_set: bool) {
    for bit in bits {
        let mask = 1 << (bit % 8);
        if is_set {
            bytes[bit / 8] |= mask;
        } else {
            bytes[bit / 8] &= !mask;
        }
    }
}

fn is_in_use(record: &[u8]) -> bool {
    Fields(record).le16(0x16).is_some_and(|flags| flags & 1 != 0)
}

/// Returns whether a record or a block has a change already.
fn is_written(bytes: &[u8], lsn: u64) -> bool {
    Fields(bytes).le64(LSN).is_some_and(|last| last >= lsn)
}

fn block_size(attribute: OpenAttribute) -> Result<usize> {
    let size = attribute.block_size;
    if size.is_power_of_two() && (record::SECTOR..=MAX_BLOCK).contains(&size) { Ok(size) } else { Err(unfit()) }
}

fn of_record(lsn: u64, error: &Error) -> Error {
    Error::new(error.kind(), format!("record {lsn:#x} of the journal: {error}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bits_are_counted_from_the_lowest_of_the_first_byte() {
        let mut bytes = [0; 3];
        put_bits(&mut bytes, 3..18, true);
        assert_eq!(bytes, [0xf8, 0xff, 0x03]);
        put_bits(&mut bytes, 7..17, false);
        assert_eq!(bytes, [0x78, 0, 0x02]);
    }
}
