//! A record of the table of files, and blocks of an index: bytes in which each sector ends with the same two.
//!
//! ```text
//! ┌ magic, where the originals are ┬ originals ┬ ... ┬──┬ ... ┬──┬ ...   of each sector of 512 bytes the last two are a
//! └────────────────────────────────┴───────────┴─────┴▲─┴─────┴▲─┘       number that each write counts on: a write
//!                                        └────────────┴────────┘         that was torn shows
//! ```
//!
//! A record holds attributes, each with a type and perhaps a name: its value, or where that lies.
//! Source: "FILE Record" and "Attributes" of the Linux-NTFS documentation.

use super::runs;
use crate::utf16;
use crate::{Error, ErrorKind, Fields, Result};

pub(super) const STANDARD_INFORMATION: u32 = 0x10;
pub(super) const ATTRIBUTE_LIST: u32 = 0x20;
pub(super) const FILE_NAME: u32 = 0x30;
pub(super) const VOLUME_NAME: u32 = 0x60;
pub(super) const VOLUME_INFORMATION: u32 = 0x70;
pub(super) const DATA: u32 = 0x80;
pub(super) const INDEX_ROOT: u32 = 0x90;
pub(super) const INDEX_ALLOCATION: u32 = 0xa0;
pub(super) const BITMAP: u32 = 0xb0;
pub(super) const REPARSE_POINT: u32 = 0xc0;
const END: u32 = u32::MAX;

/// Bytes whose last two are replaced, whatever a sector of the disk has.
pub(super) const SECTOR: usize = 512;

const IN_USE: u16 = 1;
const DIRECTORY: u16 = 2;

/// A record, and how often it was given to another file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Reference {
    pub(super) number: u64,
    pub(super) sequence: u16,
}

impl From<u64> for Reference {
    fn from(stored: u64) -> Self {
        Self { number: stored & 0xffff_ffff_ffff, sequence: u16::try_from(stored >> 48).expect("16 bits are left") }
    }
}

/// Puts the originals back at the ends of the sectors of a block that starts with `magic`.
pub(super) fn restore(bytes: &mut [u8], magic: &[u8; 4]) -> Result<()> {
    let fields = Fields(bytes);
    if fields.bytes(0, 4) != Some(magic) {
        let found = fields.bytes(0, 4).unwrap_or_default().escape_ascii();
        return Err(Error::damaged(format!("it starts with \"{found}\", not \"{}\"", magic.escape_ascii())));
    }
    let short = || Error::damaged("its sectors have no ends");
    let at = usize::from(fields.le16(4).ok_or_else(short)?);
    let count = usize::from(fields.le16(6).ok_or_else(short)?);
    if count != bytes.len() / SECTOR + 1 || !at.is_multiple_of(2) {
        return Err(short());
    }
    let originals = fields.bytes(at, count * 2).ok_or_else(short)?.to_vec();
    let (number, originals) = originals.split_at(2);
    for (sector, original) in bytes.chunks_exact_mut(SECTOR).zip(originals.chunks_exact(2)) {
        let end = &mut sector[SECTOR - 2..];
        if end != number {
            return Err(Error::damaged("one of its sectors is of another write"));
        }
        end.copy_from_slice(original);
    }
    Ok(())
}

/// A record that is in use.
#[derive(Debug, Clone)]
pub(super) struct Record {
    pub(super) number: u64,
    bytes: Vec<u8>,
}

impl Record {
    /// Checks a record as it stands on the volume.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] if it is not in use.
    pub(super) fn parse(number: u64, mut bytes: Vec<u8>) -> Result<Self> {
        let unused = || Error::new(ErrorKind::NotFound, format!("record {number} is not in use"));
        if bytes.iter().take(4).all(|byte| *byte == 0) {
            return Err(unused());
        }
        restore(&mut bytes, b"FILE").map_err(|error| of_record(number, &error))?;
        let record = Self { number, bytes };
        if record.flags() & IN_USE == 0 {
            return Err(unused());
        }
        let used = record.fields().le32(0x18).and_then(|used| usize::try_from(used).ok());
        if used.is_none_or(|used| used > record.bytes.len()) {
            return Err(Error::damaged(format!("record {number} is longer than it is")));
        }
        Ok(record)
    }

    fn fields(&self) -> Fields<'_> {
        Fields(&self.bytes)
    }

    fn flags(&self) -> u16 {
        self.fields().le16(0x16).unwrap_or_default()
    }

    pub(super) fn reference(&self) -> Reference {
        Reference { number: self.number, sequence: self.fields().le16(0x10).unwrap_or_default() }
    }

    pub(super) fn is_directory(&self) -> bool {
        self.flags() & DIRECTORY != 0
    }

    /// Returns the record whose file has more attributes than fit in that, if this is such a further one.
    pub(super) fn base(&self) -> Option<Reference> {
        self.fields().le64(0x20).filter(|base| *base != 0).map(Reference::from)
    }

    /// Returns the attributes for which `is_wanted` returns true: of type, name and instance.
    pub(super) fn attributes(&self, is_wanted: impl Fn(u32, &[u16], u16) -> bool) -> Result<Vec<Attribute>> {
        let damaged = |what: &str| Error::damaged(format!("record {}: {what}", self.number));
        let fields = self.fields();
        let used = fields.le32(0x18).and_then(|used| usize::try_from(used).ok()).unwrap_or_default();
        let mut at = usize::from(fields.le16(0x14).unwrap_or_default());
        let mut found = Vec::new();
        loop {
            // What follows the last one may be no number at all.
            let Some(kind) = fields.le32(at).filter(|kind| *kind != END && at < used) else { return Ok(found) };
            let len = fields.le32(at + 4).and_then(|len| usize::try_from(len).ok()).unwrap_or_default();
            let bytes = match fields.bytes(at, len) {
                Some(bytes) if len >= 24 && len.is_multiple_of(8) && at + len <= used => bytes,
                _ => return Err(damaged(&format!("an attribute of {len} bytes does not fit"))),
            };
            let (name, instance) = Attribute::label(bytes).ok_or_else(|| damaged("a name does not fit"))?;
            if is_wanted(kind, &name, instance) {
                let form = Attribute::form(bytes)
                    .ok_or_else(|| damaged(&format!("what an attribute of type {kind:#x} holds does not fit")))?;
                let flags = Fields(bytes).le16(0x0c).unwrap_or_default();
                found.push(Attribute { name, flags, form });
            }
            at += len;
        }
    }
}

pub(super) fn of_record(number: u64, error: &Error) -> Error {
    Error::new(error.kind(), format!("record {number}: {error}"))
}

/// An attribute, or of one that does not fit in a record, a part.
#[derive(Debug, Clone)]
pub(super) struct Attribute {
    pub(super) name: Vec<u16>,
    flags: u16,
    pub(super) form: Form,
}

/// What an attribute holds.
#[derive(Debug, Clone)]
pub(super) enum Form {
    Resident(Vec<u8>),
    NonResident(NonResident),
}

/// Where the value of an attribute lies.
#[derive(Debug, Clone)]
pub(super) struct NonResident {
    /// First cluster of the value that this is about, and the one after the last.
    pub(super) first: u64,
    pub(super) end: u64,
    /// Clusters that are compressed together, as a power of two; 0 if none are.
    pub(super) unit_shift: u8,
    /// Bytes on the volume; like the next two, only the first part says it.
    pub(super) allocated: u64,
    /// Bytes.
    pub(super) size: u64,
    /// Bytes that were written; what follows reads as zeroes.
    pub(super) initialized: u64,
    pairs: Vec<u8>,
}

impl NonResident {
    /// Returns where its clusters lie.
    pub(super) fn runs(&self, clusters: u64) -> Result<Vec<runs::Run>> {
        runs::parse(&self.pairs, self.first..self.end, clusters)
    }
}

impl Attribute {
    const COMPRESSION: u16 = 0x00ff;
    const LZNT1: u16 = 0x0001;
    const ENCRYPTED: u16 = 0x4000;
    const SPARSE: u16 = 0x8000;

    fn label(bytes: &[u8]) -> Option<(Vec<u16>, u16)> {
        let fields = Fields(bytes);
        let len = usize::from(fields.u8(9)?) * 2;
        let name = match len {
            0 => &[],
            _ => fields.bytes(usize::from(fields.le16(0x0a)?), len)?,
        };
        Some((utf16::units(name).collect(), fields.le16(0x0e)?))
    }

    fn form(bytes: &[u8]) -> Option<Form> {
        let fields = Fields(bytes);
        if fields.u8(8)? == 0 {
            let value = fields.bytes(usize::from(fields.le16(0x14)?), usize::try_from(fields.le32(0x10)?).ok()?)?;
            return Some(Form::Resident(value.to_vec()));
        }
        let first = fields.le64(0x10)?;
        // Of one that is empty all ones are stored.
        let end = fields.le64(0x18)?.wrapping_add(1);
        let pairs = usize::from(fields.le16(0x20)?);
        let is_packed = fields.le16(0x0c)? & (Self::COMPRESSION | Self::SPARSE) != 0;
        // Where it is packed, a further field says what it takes.
        let allocated = if is_packed && pairs >= 0x48 { fields.le64(0x40)? } else { fields.le64(0x28)? };
        Some(Form::NonResident(NonResident {
            first,
            end,
            unit_shift: fields.u8(0x22)?,
            allocated,
            size: fields.le64(0x30)?,
            initialized: fields.le64(0x38)?,
            pairs: bytes.get(pairs..)?.to_vec(),
        }))
        .filter(|_| end >= first)
    }

    pub(super) fn is_encrypted(&self) -> bool {
        self.flags & Self::ENCRYPTED != 0
    }

    /// Returns whether it is compressed, and by something that is known.
    pub(super) fn compression(&self) -> Option<bool> {
        match (self.flags & Self::COMPRESSION, &self.form) {
            (0, _) | (_, Form::Resident(_)) => Some(false),
            (Self::LZNT1, Form::NonResident(value)) => Some(value.unit_shift > 0),
            _ => None,
        }
    }
}
