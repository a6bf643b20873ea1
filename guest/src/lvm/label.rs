//! The label of a physical volume, and the metadata areas that it leads to.
//!
//! ```text
//! sector 0-3: LABELONE ─► UUID, areas of data, areas of metadata
//! area of metadata: header (512) | text ... | text that is current ... (circular: it may go on behind the header)
//! ```
//!
//! All numbers are little-endian, offsets and sizes in bytes from the start of the volume. Source: lvm2
//! `lib/format_text/layout.h`, `lib/label/label.h`.

use std::collections::HashSet;

use disk::Disk;

use crate::crc32::update;
use crate::read::read_within;
use crate::{Error, ErrorKind, Fields, Result};

const SECTOR: usize = 512;
/// LVM's checksums start from here.
const CHECKSUM_START: u32 = 0xf597_a6cf;
/// Larger metadata is refused; LVM makes areas of 1 MiB, of which a text may take half.
const MAX_TEXT: u64 = 16 << 20;

/// What a label says.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Label {
    pub(super) uuid: [u8; 32],
    /// Offset and size of each metadata area.
    areas: Vec<(u64, u64)>,
}

/// Which texts were read already, and how many bytes more may be.
pub(super) struct Texts {
    seen: HashSet<(u64, u32)>,
    room: u64,
}

impl Texts {
    pub(super) fn new() -> Self {
        Self { seen: HashSet::new(), room: 4 * MAX_TEXT }
    }
}

/// Returns where in the first bytes of a volume the label of a physical volume is.
pub(crate) fn label_offset(head: &[u8]) -> Option<usize> {
    let sector = |at: usize| Fields(head).bytes(at, SECTOR);
    let is_label = |sector: &[u8]| sector.starts_with(b"LABELONE") && sector[24..32] == *b"LVM2 001";
    (0..4).map(|index| index * SECTOR).find(|at| sector(*at).is_some_and(is_label))
}

impl Label {
    /// Reads the label of a physical volume.
    pub(super) fn read(volume: &dyn Disk) -> Result<Self> {
        let head = read_within(volume, 0, 4 * SECTOR)?;
        let at = label_offset(&head).ok_or_else(|| Error::damaged("no label of LVM is in its first sectors"))?;
        Self::parse(&head[at..at + SECTOR]).ok_or_else(|| Error::damaged("the label of LVM is damaged"))
    }

    fn parse(sector: &[u8]) -> Option<Self> {
        let fields = Fields(sector);
        (fields.le32(16)? == update(CHECKSUM_START, fields.bytes(20, SECTOR - 20)?)).then_some(())?;
        let header = usize::try_from(fields.le32(20)?).ok()?;
        let uuid = fields.array(header)?;
        let mut at = header.checked_add(40)?;
        // A list of areas ends with one at offset 0: first those of data, then those of metadata.
        let mut list = || {
            let mut areas = vec![];
            loop {
                let (offset, size) = (fields.le64(at)?, fields.le64(at.checked_add(8)?)?);
                at += 16;
                if offset == 0 {
                    return Some(areas);
                }
                areas.push((offset, size));
            }
        };
        list()?;
        Some(Self { uuid, areas: list()? })
    }

    /// Returns the current text of each metadata area, but for those that were seen on another physical volume, and what is
    /// wrong with areas.
    pub(super) fn texts(&self, volume: &dyn Disk, texts: &mut Texts) -> (Vec<Vec<u8>>, Vec<Error>) {
        let (mut found, mut problems) = (vec![], vec![]);
        for (offset, size) in &self.areas {
            match text(volume, *offset, *size, texts) {
                Ok(text) => found.extend(text),
                Err(error) => problems.push(error),
            }
        }
        (found, problems)
    }
}

/// Returns the current text of a metadata area, `None` if it holds none or one that was seen.
fn text(volume: &dyn Disk, start: u64, size: u64, texts: &mut Texts) -> Result<Option<Vec<u8>>> {
    let damaged = |what: &str| Error::damaged(format!("the LVM metadata at byte {start} {what}"));
    let header = read_within(volume, start, SECTOR)?;
    let fields = Fields(&header);
    let checked = fields.bytes(4, SECTOR - 4).map(|bytes| update(CHECKSUM_START, bytes));
    if checked.is_none() || checked != fields.le32(0) || fields.bytes(4, 16) != Some(b" LVM2 x[5A%r0N*>") {
        return Err(damaged("has a damaged header"));
    }
    let field = |at| fields.le64(at).ok_or_else(|| damaged("has a damaged header"));
    if fields.le32(20) != Some(1) || field(24)? != start || field(32)? != size {
        return Err(damaged("has a header of another place or version"));
    }
    let (offset, len, checksum) = (field(40)?, field(48)?, fields.le32(56).unwrap_or(0));
    let is_ignored = fields.le32(60).is_some_and(|flags| flags & 1 == 1);
    if offset == 0 || is_ignored {
        return Ok(None);
    }
    let header_len = u64::try_from(SECTOR).expect("it is 512");
    let room = size.saturating_sub(header_len);
    if offset < header_len || offset >= size || len == 0 || len > room {
        return Err(damaged(&format!("has {len} bytes at {offset}, which is not within its {size} bytes")));
    }
    if texts.seen.contains(&(len, checksum)) {
        return Ok(None);
    }
    if len > MAX_TEXT.min(texts.room) {
        return Err(Error::new(
            ErrorKind::TooMuch,
            format!("there are {len} bytes of LVM metadata, more than are read"),
        ));
    }
    texts.room -= len;
    let first = len.min(size - offset);
    let part = |at: u64, len: u64| {
        let len = usize::try_from(len).expect("it is at most 16 MiB");
        let bytes = read_within(volume, start.saturating_add(at), len)?;
        if bytes.len() == len { Ok(bytes) } else { Err(damaged("reaches past the end of the volume")) }
    };
    let mut text = part(offset, first)?;
    text.extend(part(header_len, len - first)?);
    if update(CHECKSUM_START, &text) != checksum {
        return Err(damaged("has a wrong checksum"));
    }
    texts.seen.insert((len, checksum));
    Ok(Some(text))
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::memory::Memory;

    /// Writes what pvcreate and vgcreate do: a label in sector 1, and an area of metadata with a text at an offset of it.
    pub(in crate::lvm) fn write(disk: &mut Memory, uuid: [u8; 32], area: (u64, u64), at: u64, text: &[u8]) {
        let mut sector = vec![0; SECTOR];
        let mut put = |at: usize, bytes: &[u8]| sector[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, b"LABELONE\x01");
        put(20, &[32]);
        put(24, b"LVM2 001");
        put(32, &uuid);
        put(64, &disk.size().to_le_bytes());
        put(72, &(1_u64 << 20).to_le_bytes());
        put(104, &area.0.to_le_bytes());
        put(112, &area.1.to_le_bytes());
        let checksum = update(CHECKSUM_START, &sector[20..]);
        sector[16..20].copy_from_slice(&checksum.to_le_bytes());
        disk.write(512, &sector);
        write_area(disk, area, at, text);
    }

    fn write_area(disk: &mut Memory, area: (u64, u64), at: u64, text: &[u8]) {
        let mut header = vec![0; SECTOR];
        let mut put = |at: usize, bytes: &[u8]| header[at..at + bytes.len()].copy_from_slice(bytes);
        put(4, b" LVM2 x[5A%r0N*>\x01");
        put(24, &area.0.to_le_bytes());
        put(32, &area.1.to_le_bytes());
        if !text.is_empty() {
            put(40, &at.to_le_bytes());
            put(48, &u64::try_from(text.len()).unwrap().to_le_bytes());
            put(56, &update(CHECKSUM_START, text).to_le_bytes());
        }
        let checksum = update(CHECKSUM_START, &header[4..]);
        header[..4].copy_from_slice(&checksum.to_le_bytes());
        disk.write(area.0, &header);
        for (index, byte) in (0..).zip(text) {
            let place = at + index;
            let place = if place < area.1 { place } else { place - area.1 + 512 };
            disk.write(area.0 + place, &[*byte]);
        }
    }

    const AREA: (u64, u64) = (4096, 8192);
    const UUID: [u8; 32] = *b"0123456789abcdefghijklmnopqrstuv";

    fn pv(at: u64, text: &[u8]) -> Memory {
        let mut disk = Memory::new(1 << 20);
        write(&mut disk, UUID, AREA, at, text);
        disk
    }

    fn read(disk: &Memory) -> (Vec<Vec<u8>>, Vec<String>) {
        let label = Label::read(disk).unwrap();
        assert_eq!(label, Label { uuid: UUID, areas: vec![AREA] });
        let (texts, problems) = label.texts(disk, &mut Texts::new());
        (texts, problems.iter().map(ToString::to_string).collect())
    }

    #[test]
    fn the_area_is_circular() {
        let text: Vec<u8> = (0..=255).cycle().take(7000).collect();
        for at in [512, 1192, 1193, 5000, 8191] {
            assert_eq!(read(&pv(at, &text)), (vec![text.clone()], vec![]), "{at}");
        }
        assert_eq!(read(&pv(512, b"")), (vec![], vec![]), "no volume group");
    }

    #[test]
    fn a_text_that_was_seen_is_not_read_again() {
        let disk = pv(512, b"text");
        let (label, mut texts) = (Label::read(&disk).unwrap(), Texts::new());
        assert_eq!(label.texts(&disk, &mut texts).0.len(), 1);
        assert_eq!(label.texts(&disk, &mut texts).0.len(), 0);
    }

    #[test]
    fn what_is_damaged_is_said() {
        type Change = fn(&mut Memory);
        let cases: [(Change, &str); 4] = [
            (|disk| disk.write(4096 + 100, &[1]), "has a damaged header"),
            (|disk| disk.write(4096 + 512, &[1]), "has a wrong checksum"),
            (|disk| disk.resize(4096 + 514), "reaches past the end of the volume"),
            (|disk| disk.resize(4096), "has a damaged header"),
        ];
        for (change, problem) in cases {
            let mut disk = pv(512, b"text");
            change(&mut disk);
            assert_eq!(read(&disk), (vec![], vec![format!("the LVM metadata at byte 4096 {problem}")]));
        }
        let mut disk = pv(512, b"text");
        disk.write(512 + 400, &[1]);
        assert_eq!(Label::read(&disk).unwrap_err().to_string(), "the label of LVM is damaged");
    }

    #[test]
    fn places_outside_of_the_area_are_refused() {
        for (at, len) in [(8192, 4), (511, 4), (512, 7681), (u64::MAX, 4), (1 << 63, 4)] {
            let mut disk = pv(512, b"text");
            let mut header = read_within(&disk, 4096, 512).unwrap();
            header[40..48].copy_from_slice(&at.to_le_bytes());
            header[48..56].copy_from_slice(&u64::to_le_bytes(len));
            let checksum = update(CHECKSUM_START, &header[4..]);
            header[..4].copy_from_slice(&checksum.to_le_bytes());
            disk.write(4096, &header);
            let (texts, problems) = read(&disk);
            assert!(texts.is_empty() && problems[0].contains("which is not within its 8192 bytes"), "{at} {len}");
        }
    }
}
