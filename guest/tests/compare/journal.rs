//! Writes what Windows writes into `$LogFile`: from two states of a volume of NTFS, the first with a journal that leads to the second.
//!
//! What another driver did in between is told in changes of records, of blocks of indexes and of their entries. Everything else,
//! the content of files and the bitmaps, is written at once, as Windows does before a transaction is over.

use std::collections::BTreeMap;

use guest::Fields;

use super::Random;

/// Bytes of a page of the journal, of a cluster and of a block of an index.
const PAGE: usize = 4096;
const RECORD: usize = 1024;
/// Places in the table of open attributes.
const TABLE_OF_FILES: u16 = 0x18;
const INDEX: u16 = 0x40;
const TRANSACTION: u32 = 0x18;
/// Bits of the number of a record that say where it is.
const PLACE_BITS: u32 = 19;

/// What a transaction does.
#[derive(Debug, Clone)]
pub struct Change {
    /// Where the record or the block stands.
    at: usize,
    is_record: bool,
    redo: (u16, Vec<u8>),
    undo: (u16, Vec<u8>),
    record_offset: usize,
    attribute_offset: usize,
}

/// How the machine stopped.
#[derive(Debug, Clone, Copy)]
pub struct Crash {
    /// Whether the last transaction was ended.
    pub is_ended: bool,
    /// Of a hundred records and blocks, how many had been written.
    pub written: u64,
    /// Version of the journal: 1, or 2 since Windows 8.
    pub version: u16,
    /// Whether the page written last stands in one of the places for copies only.
    pub is_copied: bool,
    /// An operation that does not exist, instead of the last.
    pub is_unknown: bool,
}

/// Returns the first volume with a journal that leads to the second, and how many changes it tells.
pub fn crashed(before: &[u8], after: &[u8], crash: Crash, random: &mut Random) -> (Vec<u8>, usize) {
    let log = log_range(before);
    let mut image = before.to_vec();
    let mut all = Vec::new();
    let mut at = 0;
    while at < before.len() {
        if log.contains(&at) {
            at += PAGE;
            continue;
        }
        let is = |magic: &[u8]| before[at..].starts_with(magic) || after[at..].starts_with(magic);
        let (len, changes) = if is(b"FILE") {
            (RECORD, of_record(before, after, at))
        } else if is(b"INDX") && at % PAGE == 0 {
            (PAGE, of_block(before, after, at))
        } else {
            image[at..at + 512].copy_from_slice(&after[at..at + 512]);
            (512, Vec::new())
        };
        all.push((at, len, changes));
        at += len;
    }
    let mut writer = Writer::new(log.len(), crash.version);
    let start = writer.append(2, 0, 0, &restart(0, 0, 0));
    let table = open_attributes();
    let dump = writer.append(1, TRANSACTION, 0, &operation((0x1d, &table), (0, &[]), 0, &[], 0, 0, 0));
    let checkpoint = writer.append(2, 0, 0, &restart(start, dump, table.len()));
    let (mut count, mut last) = (0, 0);
    let total = all.iter().flat_map(|(_, _, changes)| changes).count();
    for (at, len, changes) in &all {
        for change in changes {
            count += 1;
            let lcn = (change.at / PAGE) as u64;
            let attribute = if change.is_record { TABLE_OF_FILES } else { INDEX };
            let redo = if crash.is_unknown && count == total { 0x7e } else { change.redo.0 };
            let mut bytes = operation(
                (redo, &change.redo.1),
                (change.undo.0, &change.undo.1),
                attribute,
                &[lcn],
                lcn,
                change.record_offset,
                change.attribute_offset,
            );
            put(&mut bytes, 0x14, &le16(change.at % PAGE / 512));
            last = writer.append(1, TRANSACTION, last, &bytes);
        }
        if !changes.is_empty() && random.below(100) < crash.written {
            image[*at..at + len].copy_from_slice(&after[*at..at + len]);
            let mut bytes = restored(&image[*at..at + len]).expect("it was sound");
            put(&mut bytes, 8, &last.to_le_bytes());
            image[*at..at + len].copy_from_slice(&protected(bytes));
        }
        // Now and then a transaction is over, but the last may not be.
        if crash.is_ended && !changes.is_empty() {
            writer.append(1, TRANSACTION, 0, &operation((0x1b, &[]), (1, &[]), TABLE_OF_FILES, &[], 0, 0, 0));
            last = 0;
        }
    }
    image[log].copy_from_slice(&writer.finish(checkpoint, start, crash.is_copied));
    (image, count)
}

fn le16(number: usize) -> [u8; 2] {
    u16::try_from(number).expect("small").to_le_bytes()
}

fn le32(number: usize) -> [u8; 4] {
    u32::try_from(number).expect("small").to_le_bytes()
}

fn put(bytes: &mut [u8], at: usize, value: &[u8]) {
    bytes[at..at + value.len()].copy_from_slice(value);
}

fn number(bytes: &[u8], at: usize) -> usize {
    usize::try_from(Fields(bytes).le32(at).expect("within")).expect("64 bits")
}

fn short(bytes: &[u8], at: usize) -> usize {
    usize::from(Fields(bytes).le16(at).expect("within"))
}

/// Returns bytes with the ends of their sectors, if none is torn.
fn restored(bytes: &[u8]) -> Option<Vec<u8>> {
    let mut bytes = bytes.to_vec();
    let at = short(&bytes, 4);
    for sector in 1..short(&bytes, 6) {
        let end = sector * 512 - 2;
        if bytes[end..end + 2] != bytes[at..at + 2] {
            return None;
        }
        bytes.copy_within(at + 2 * sector..at + 2 * sector + 2, end);
    }
    Some(bytes)
}

fn protected(mut bytes: Vec<u8>) -> Vec<u8> {
    let at = short(&bytes, 4);
    let next = (short(&bytes, at) % 0xfff0) + 1;
    put(&mut bytes, at, &le16(next));
    for sector in 1..short(&bytes, 6) {
        let end = sector * 512 - 2;
        bytes.copy_within(end..end + 2, at + 2 * sector);
        put(&mut bytes, end, &le16(next));
    }
    bytes
}

/// Returns where the journal lies: in one piece, as mkntfs makes it.
fn log_range(image: &[u8]) -> std::ops::Range<usize> {
    let table = number(image, 0x30) * PAGE;
    let record = restored(&image[table + 2 * RECORD..table + 3 * RECORD]).expect("the journal has a record");
    let (_, data) = attributes(&record).into_iter().find(|(kind, _)| *kind == 0x80).expect("it has data");
    let pairs = &record[data.start + short(&record, data.start + 0x20)..data.end];
    let (len_size, place_size) = (usize::from(pairs[0] & 15), usize::from(pairs[0] >> 4));
    let read = |bytes: &[u8]| bytes.iter().rev().fold(0, |sum, byte| sum << 8 | usize::from(*byte));
    let (len, place) = (read(&pairs[1..=len_size]), read(&pairs[1 + len_size..1 + len_size + place_size]));
    assert_eq!(pairs[1 + len_size + place_size], 0, "the journal is in pieces");
    place * PAGE..(place + len) * PAGE
}

/// Returns the attributes of a record, and last where they end.
fn attributes(record: &[u8]) -> Vec<(usize, std::ops::Range<usize>)> {
    let mut at = short(record, 0x14);
    let mut all = Vec::new();
    loop {
        let kind = number(record, at);
        let len = if kind == 0xffff_ffff { 0 } else { number(record, at + 4) };
        all.push((kind, at..at + len));
        if len == 0 {
            return all;
        }
        at += len;
    }
}

fn is_used(record: &[u8]) -> bool {
    record.starts_with(b"FILE") && short(record, 0x16) & 1 != 0
}

fn used(record: &[u8]) -> Vec<u8> {
    record[..number(record, 0x18)].to_vec()
}

fn of_record(before: &[u8], after: &[u8], at: usize) -> Vec<Change> {
    let (old, new) = (&before[at..at + RECORD], &after[at..at + RECORD]);
    if old == new {
        return Vec::new();
    }
    let parse = |bytes: &[u8]| if bytes.starts_with(b"FILE") { restored(bytes) } else { None };
    let (old, new) = (parse(old).unwrap_or_default(), parse(new).expect("a record stays one"));
    let change = |redo, undo, record_offset, attribute_offset| Change {
        at,
        is_record: true,
        redo,
        undo,
        record_offset,
        attribute_offset,
    };
    let none = Vec::new;
    match (!old.is_empty() && is_used(&old), is_used(&new)) {
        (false, true) => vec![change((2, used(&new)), (3, none()), 0, 0)],
        // Its attributes stay.
        (true, false) => vec![change((3, none()), (2, old[..0x18].to_vec()), 0, 0)],
        (false, false) => vec![change((2, used(&new)), (0, none()), 0, 0)],
        (true, true) if short(&old, 0x10) != short(&new, 0x10) => {
            vec![change((3, none()), (2, used(&old)), 0, 0), change((2, used(&new)), (3, none()), 0, 0)]
        }
        (true, true) => {
            let (olds, news) = (attributes(&old), attributes(&new));
            let are_same = olds.iter().map(|(kind, _)| kind).eq(news.iter().map(|(kind, _)| kind));
            // From the last one on, so that those before stay where they are.
            let pairs = olds.iter().zip(&news).filter(|((_, a), (_, b))| are_same && old[a.clone()] != new[b.clone()]);
            let mut changes = Vec::new();
            for ((_, range), (_, other)) in pairs.rev() {
                for (redo, undo, attribute_offset) in of_attribute(&old[range.clone()], &new[other.clone()]) {
                    changes.push(change(redo, undo, range.start, attribute_offset));
                }
            }
            if are_same {
                return changes;
            }
            let start = olds[0].1.start;
            for (_, range) in olds.iter().filter(|(_, range)| !range.is_empty()) {
                changes.push(change((6, none()), (5, old[range.clone()].to_vec()), start, 0));
            }
            for (_, range) in news.iter().filter(|(_, range)| !range.is_empty()).rev() {
                changes.push(change((5, new[range.clone()].to_vec()), (6, none()), start, 0));
            }
            changes
        }
    }
}

/// What to do, what undoes it, and where.
type Step = ((u16, Vec<u8>), (u16, Vec<u8>), usize);

/// Returns what makes an attribute of the same type of another.
fn of_attribute(old: &[u8], new: &[u8]) -> Vec<Step> {
    let whole = vec![((6, Vec::new()), (5, old.to_vec()), 0), ((5, new.to_vec()), (6, Vec::new()), 0)];
    let value = short(old, 0x14);
    let end = |bytes: &[u8]| value + number(bytes, 0x10);
    match (old[8], new[8]) {
        (0, 0) if old[8..0x10] == new[8..0x10] && old[0x14..value] == new[0x14..value] => {
            if old[0] == 0x90 && old[value..value + 0x10] == new[value..value + 0x10] {
                let (old, new) = (&old[..end(old)], &new[..end(new)]);
                if let Some(steps) = of_entries(old, new, value + 0x10, [0x0c, 0x0d, 0x13]) {
                    return steps;
                }
            }
            vec![((7, new[value..end(new)].to_vec()), (7, old[value..end(old)].to_vec()), value)]
        }
        (1, 1) if old[8..0x18] == new[8..0x18] && old[0x20..0x28] == new[0x20..0x28] && old[0x0c..0x0e] == [0; 2] => {
            let sizes = |bytes: &[u8]| [&bytes[0x28..0x30], &bytes[0x38..0x40], &bytes[0x30..0x38]].concat();
            let pairs = short(old, 0x20);
            vec![
                ((0x0b, sizes(new)), (0x0b, sizes(old)), 0),
                ((9, new[pairs..].to_vec()), (9, old[pairs..].to_vec()), pairs),
            ]
        }
        _ => whole,
    }
}

/// Returns what makes the entries after a header those of another, if the last stays: it takes the operations that add,
/// delete, and change what is said of a file with its name.
fn of_entries(old: &[u8], new: &[u8], header: usize, [add, delete, name]: [u16; 3]) -> Option<Vec<Step>> {
    let (olds, news) = (entries(old, header), entries(new, header));
    let last = |block: &[u8], all: &[std::ops::Range<usize>]| block[all.last().expect("one").clone()].to_vec();
    if last(old, &olds) != last(new, &news) || old[header..header + 4] != new[header..header + 4] {
        return None;
    }
    // Of a file, its number, and which name.
    let key = |block: &[u8], range: &std::ops::Range<usize>| {
        let entry = &block[range.clone()];
        let rest = if entry.len() > 0x50 { entry[0x50..].to_vec() } else { Vec::new() };
        (entry[..0x18.min(entry.len())].to_vec(), rest)
    };
    let mut steps = Vec::new();
    let same = olds.iter().zip(&news).take_while(|(a, b)| key(old, a) == key(new, b)).count();
    let same = same.min(olds.len() - 1).min(news.len() - 1);
    for (range, other) in olds[..same].iter().zip(&news) {
        if old[range.clone()] != new[other.clone()] {
            let copy = |block: &[u8], start| block[start + 0x18..start + 0x50].to_vec();
            steps.push(((name, copy(new, other.start)), (name, copy(old, range.start)), range.start));
        }
    }
    let start = olds[same].start;
    for range in &olds[same..olds.len() - 1] {
        steps.push(((delete, Vec::new()), (add, old[range.clone()].to_vec()), start));
    }
    for range in news[same..news.len() - 1].iter().rev() {
        steps.push(((add, new[range.clone()].to_vec()), (delete, Vec::new()), start));
    }
    Some(steps)
}

/// Returns the entries of an index after their header.
fn entries(block: &[u8], header: usize) -> Vec<std::ops::Range<usize>> {
    let mut at = header + number(block, header);
    let mut all = Vec::new();
    loop {
        let len = short(block, at + 8);
        all.push(at..at + len);
        if short(block, at + 12) & 2 != 0 {
            return all;
        }
        at += len;
    }
}

fn of_block(before: &[u8], after: &[u8], at: usize) -> Vec<Change> {
    let (old, new) = (&before[at..at + PAGE], &after[at..at + PAGE]);
    if old == new || !new.starts_with(b"INDX") {
        return Vec::new();
    }
    let new = restored(new).expect("a block is not torn");
    let old = if old.starts_with(b"INDX") { restored(old) } else { None };
    let change =
        |redo, undo, attribute_offset| Change { at, is_record: false, redo, undo, record_offset: 0, attribute_offset };
    let whole = |block: &[u8]| (8, block[..0x18 + number(block, 0x1c)].to_vec());
    let Some(old) = old else { return vec![change(whole(&new), (0, Vec::new()), 0)] };
    let steps = if old[0x10..0x18] == new[0x10..0x18] && old[0x24] == new[0x24] {
        of_entries(&old, &new, 0x18, [0x0e, 0x0f, 0x14])
    } else {
        None
    };
    let steps = steps.unwrap_or_else(|| vec![(whole(&new), whole(&old), 0)]);
    steps.into_iter().map(|(redo, undo, attribute_offset)| change(redo, undo, attribute_offset)).collect()
}

fn operation(
    redo: (u16, &[u8]),
    undo: (u16, &[u8]),
    attribute: u16,
    lcns: &[u64],
    vcn: u64,
    record_offset: usize,
    attribute_offset: usize,
) -> Vec<u8> {
    let mut bytes = vec![0; 0x20];
    for lcn in lcns.iter().chain([0].iter().filter(|_| lcns.is_empty())) {
        bytes.extend(lcn.to_le_bytes());
    }
    let redo_at = bytes.len();
    bytes.extend(redo.1);
    bytes.resize(bytes.len().next_multiple_of(8), 0);
    let undo_at = bytes.len();
    bytes.extend(undo.1);
    bytes.resize(bytes.len().next_multiple_of(8), 0);
    let fields =
        [redo.0.into(), undo.0.into(), redo_at, redo.1.len(), undo_at, undo.1.len(), attribute.into(), lcns.len()];
    for (index, field) in fields.into_iter().chain([record_offset, attribute_offset]).enumerate() {
        put(&mut bytes, index * 2, &le16(field));
    }
    put(&mut bytes, 0x18, &vcn.to_le_bytes());
    bytes
}

fn restart(start: u64, attributes: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; 112];
    put(&mut bytes, 0, &le32(1));
    put(&mut bytes, 8, &start.to_le_bytes());
    put(&mut bytes, 0x10, &attributes.to_le_bytes());
    put(&mut bytes, 0x30, &le32(len));
    bytes
}

fn open_attributes() -> Vec<u8> {
    let mut bytes = vec![0; 0x18 + 2 * 0x28];
    put(&mut bytes, 0, &le16(0x28));
    put(&mut bytes, 2, &le16(2));
    put(&mut bytes, 4, &le16(2));
    for (at, kind, size, file) in [(0x18, 0x80, 0, 0_u64), (0x40, 0xa0, PAGE, 5)] {
        put(&mut bytes, at, &[0xff; 4]);
        put(&mut bytes, at + 4, &le32(size));
        put(&mut bytes, at + 8, &le32(kind));
        put(&mut bytes, at + 0x10, &file.to_le_bytes());
    }
    bytes
}

/// A journal that is being written.
struct Writer {
    pages: BTreeMap<usize, Vec<u8>>,
    size: usize,
    version: u16,
    /// Where the next record goes: a page, and bytes in it.
    at: (usize, usize),
    round: u64,
    last: u64,
}

impl Writer {
    fn new(size: usize, version: u16) -> Self {
        // So that it soon goes on at the start of the ring.
        let at = (size / PAGE - 3, 0x40);
        Self { pages: BTreeMap::new(), size, version, at, round: 5, last: 0 }
    }

    fn first(&self) -> usize {
        if self.version == 1 { 4 } else { 0x22 }
    }

    fn next_page(&mut self) {
        self.at = (self.at.0 + 1, 0x40);
        if self.at.0 == self.size / PAGE {
            self.at.0 = self.first();
            self.round += 1;
        }
    }

    fn append(&mut self, kind: usize, transaction: u32, previous: u64, data: &[u8]) -> u64 {
        if self.at.1 + 0x30 > PAGE {
            self.next_page();
        }
        let lsn = self.round << PLACE_BITS | ((self.at.0 * PAGE + self.at.1) >> 3) as u64;
        let mut record = vec![0; 0x30];
        put(&mut record, 0, &lsn.to_le_bytes());
        put(&mut record, 8, &previous.to_le_bytes());
        put(&mut record, 0x10, &previous.to_le_bytes());
        put(&mut record, 0x18, &le32(data.len()));
        put(&mut record, 0x20, &le32(kind));
        put(&mut record, 0x24, &transaction.to_le_bytes());
        put(&mut record, 0x28, &le16(usize::from(self.at.1 + 0x30 + data.len() > PAGE)));
        record.extend(data);
        let mut rest = &record[..];
        loop {
            let (index, at) = self.at;
            let page = self.pages.entry(index).or_insert_with(|| {
                let mut page = vec![0; PAGE];
                put(&mut page, 0, b"RCRD\x28\0\x09\0");
                put(&mut page, 0x14, &[1, 0, 1, 0]);
                page
            });
            let part = rest.len().min(PAGE - at);
            put(page, at, &rest[..part]);
            put(page, 8, &lsn.to_le_bytes());
            rest = &rest[part..];
            self.at.1 += part;
            if rest.is_empty() {
                put(page, 0x10, &[1]);
                put(page, 0x18, &le16(self.at.1));
                put(page, 0x20, &lsn.to_le_bytes());
                break;
            }
            self.next_page();
        }
        self.at.1 = self.at.1.next_multiple_of(8);
        self.last = lsn;
        lsn
    }

    fn finish(self, checkpoint: u64, oldest: u64, is_copied: bool) -> Vec<u8> {
        let mut log = vec![0xff; self.size];
        for index in 0..2 {
            let mut page = vec![0; PAGE];
            put(&mut page, 0, b"RSTR\x1e\0\x09\0");
            put(&mut page, 0x10, &le32(PAGE));
            put(&mut page, 0x14, &le32(PAGE));
            put(&mut page, 0x18, &le16(0x30));
            put(&mut page, 0x1a, &le16(usize::from(self.version == 1)));
            put(&mut page, 0x1c, &self.version.to_le_bytes());
            put(&mut page, 0x30, &checkpoint.to_le_bytes());
            put(&mut page, 0x38, &[1, 0, 0xff, 0xff, 0, 0]);
            put(&mut page, 0x40, &(64 - PLACE_BITS).to_le_bytes());
            put(&mut page, 0x44, &[0xe0, 0, 0x40, 0]);
            put(&mut page, 0x48, &le32(self.size));
            put(&mut page, 0x54, &[0x30, 0, 0x40, 0]);
            put(&mut page, 0x70, &oldest.to_le_bytes());
            put(&mut page, 0x78, &checkpoint.to_le_bytes());
            put(&mut page, 0x80, &[0xff, 0xff, 0xff, 0xff, 0, 0]);
            put(&mut page, 0x8c, b"\x08\0\0\0N\0T\0F\0S\0");
            put(&mut log, index * PAGE, &protected(page));
        }
        for (index, mut page) in self.pages {
            let is_last = Fields(&page).le64(0x20) == Some(self.last);
            let mut place = index;
            if is_copied && is_last {
                place = if self.version == 1 { 3 } else { 0x12 };
                let field = if self.version == 1 { 8 } else { 0x3c };
                put(&mut page, field, &le32(index * PAGE));
                put(&mut page, field + 4, if self.version == 1 { &[0; 4] } else { &[] });
            }
            put(&mut log, place * PAGE, &protected(page));
        }
        log
    }
}
