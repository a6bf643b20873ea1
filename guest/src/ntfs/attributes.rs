//! What is known of a file, as Linux would say it.
//!
//! Windows keeps no owner or permissions that would mean anything here: all belong to root; a directory has 0755, a file
//! 0644, or 0444 if it is marked read-only. As ntfs-3g shows them, links and devices that Interix or ntfs-3g made are such;
//! its pipes and sockets, which are empty files of the system, are files.

use super::directory::NAMES;
use super::record::{DATA, FILE_NAME, Form, INDEX_ALLOCATION, STANDARD_INFORMATION};
use super::reparse::{self, Reparse};
use super::volume::{Node, Volume};
use super::wof;
use crate::utf16;
use crate::{Attributes, Error, Fields, Kind, Result, Time};

const READ_ONLY: u32 = 0x1;
const SYSTEM: u32 = 0x4;
const DIRECTORY: u32 = 0x10;
const NORMAL: u32 = 0x80;
const OFFLINE: u32 = 0x1000;
const RECALL_ON_OPEN: u32 = 0x4_0000;
const RECALL_ON_DATA_ACCESS: u32 = 0x40_0000;

/// Bytes of what Interix keeps of a link at most: its head and 4,095 units.
const MAX_INTERIX: u64 = 8 + 2 * 4095;

/// Bytes of what is kept of times and attributes, and of a name, at most.
const MAX_INFORMATION: u64 = 4096;

/// Seconds from 1601 to 1970.
const EPOCH: i64 = 11_644_473_600;

/// What a file is, and what comes with that.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum What {
    Directory,
    File,
    /// A file of which the content must be decoded, or is elsewhere.
    Reparsed(Reparse),
    Link(Vec<u8>),
    /// A pipe, a socket, or a device with its numbers.
    Special(Kind, (u32, u32)),
}

/// Times and attributes of Windows.
pub(super) struct Information {
    accessed: Time,
    modified: Time,
    changed: Time,
    created: Time,
    flags: u32,
}

impl Information {
    /// Reads those of a file.
    pub(super) fn of(volume: &Volume, node: &Node) -> Result<Self> {
        let number = node.number();
        let stream = volume.stream(node, STANDARD_INFORMATION, &[])?;
        let bytes = stream.ok_or_else(|| Error::damaged(format!("file {number} has no times")))?.read(
            volume,
            node,
            MAX_INFORMATION,
        )?;
        let fields = Fields(&bytes);
        let parse = || {
            Some(Self {
                created: time(fields.le64(0)?),
                modified: time(fields.le64(8)?),
                changed: time(fields.le64(0x10)?),
                accessed: time(fields.le64(0x18)?),
                flags: fields.le32(0x20)?,
            })
        };
        parse().ok_or_else(|| Error::damaged(format!("the times of file {number} do not fit")))
    }

    /// Returns the attributes as Windows says them.
    pub(super) fn flags(&self, node: &Node) -> u32 {
        match (self.flags & !DIRECTORY, node.record.is_directory()) {
            (flags, true) => flags | DIRECTORY,
            (0, false) => NORMAL,
            (flags, false) => flags,
        }
    }
}

/// Returns a moment of so many times 100 ns after 1601; ntfs-3g writes what is before that as a negative number.
fn time(stored: u64) -> Time {
    let ticks = stored.cast_signed();
    let nanoseconds = u32::try_from(ticks.rem_euclid(10_000_000) * 100).expect("less than a second");
    Time { seconds: ticks.div_euclid(10_000_000) - EPOCH, nanoseconds }
}

/// Returns what a file is.
pub(super) fn what(volume: &Volume, node: &Node, information: &Information) -> Result<What> {
    match reparse::of(volume, node)? {
        Some(Reparse::Link(target)) => return Ok(What::Link(target)),
        Some(Reparse::Special(kind)) => return Ok(What::Special(kind, (0, 0))),
        Some(other) if !node.record.is_directory() => {
            let is_unknown = matches!(other, Reparse::Unknown(_));
            if is_unknown && is_placeholder(volume, node, information)? {
                return Ok(What::Reparsed(Reparse::Elsewhere("not on the volume: Windows fetches it when it is read")));
            }
            return Ok(What::Reparsed(other));
        }
        _ => {}
    }
    if node.record.is_directory() {
        return Ok(What::Directory);
    }
    if information.flags & SYSTEM != 0 {
        return Ok(interix(volume, node)?.unwrap_or(What::File));
    }
    Ok(What::File)
}

/// Returns whether a file with a reparse point stands for one that is elsewhere, as those of clouds and of layers of
/// containers do until they were read once.
fn is_placeholder(volume: &Volume, node: &Node, information: &Information) -> Result<bool> {
    if information.flags & (OFFLINE | RECALL_ON_OPEN | RECALL_ON_DATA_ACCESS) != 0 {
        return Ok(true);
    }
    let data = volume.stream(node, DATA, &[])?;
    data.map_or(Ok(false), |data| Ok(data.size()? > 0 && data.allocated() == 0))
}

/// Returns what Interix or ntfs-3g made of a file.
fn interix(volume: &Volume, node: &Node) -> Result<Option<What>> {
    let Some(stream) = volume.stream(node, DATA, &[])? else { return Ok(None) };
    if !(9..=MAX_INTERIX).contains(&stream.size()?) || stream.head.is_encrypted() {
        return Ok(None);
    }
    let bytes = stream.read(volume, node, MAX_INTERIX)?;
    let device = || Some((Fields(&bytes).le32(8)?, Fields(&bytes).le32(16)?));
    Ok(match &bytes[..8] {
        b"IntxLNK\x01" => Some(What::Link(utf16::to_bytes(utf16::units(&bytes[8..]).take_while(|unit| *unit != 0)))),
        b"IntxCHR\0" => device().map(|device| What::Special(Kind::CharacterDevice, device)),
        b"IntxBLK\0" => device().map(|device| What::Special(Kind::BlockDevice, device)),
        _ => None,
    })
}

/// Returns what is known of a file.
pub(super) fn of(volume: &Volume, node: &Node) -> Result<Attributes> {
    let information = Information::of(volume, node)?;
    let data = volume.stream(node, DATA, &[])?;
    let (mut size, mut allocated) = match &data {
        Some(data) => (data.size()?, data.allocated()),
        None => (0, 0),
    };
    let mut device = (0, 0);
    let (kind, mode) = match what(volume, node, &information)? {
        What::Directory => {
            (size, allocated) = index_size(volume, node)?;
            (Kind::Directory, 0o755)
        }
        what @ (What::File | What::Reparsed(_)) => {
            if let What::Reparsed(Reparse::Compressed(_)) = what {
                allocated = volume.stream(node, DATA, wof::STREAM)?.map_or(0, |stream| stream.allocated());
            }
            (Kind::File, if information.flags & READ_ONLY == 0 { 0o644 } else { 0o444 })
        }
        What::Link(target) => {
            size = target.len() as u64;
            (Kind::Symlink, 0o777)
        }
        What::Special(kind, numbers) => {
            (size, device) = (0, numbers);
            (kind, 0o644)
        }
    };
    Ok(Attributes {
        kind,
        mode,
        uid: 0,
        gid: 0,
        links: links(volume, node)?,
        size,
        allocated: allocated.next_multiple_of(512),
        device,
        accessed: information.accessed,
        modified: information.modified,
        changed: information.changed,
        created: Some(information.created),
    })
}

/// Returns the bytes of the blocks of a directory, and those that they take; a small one has none.
fn index_size(volume: &Volume, node: &Node) -> Result<(u64, u64)> {
    let blocks = volume.stream(node, INDEX_ALLOCATION, NAMES)?;
    blocks.map_or(Ok((0, 0)), |blocks| Ok((blocks.size()?, blocks.allocated())))
}

/// Returns the names that a file has; of a directory nobody counts those in it, and one says so to programs.
fn links(volume: &Volume, node: &Node) -> Result<u32> {
    if node.record.is_directory() {
        return Ok(1);
    }
    let is_shown = |form: &Form| matches!(form, Form::Resident(bytes) if Fields(bytes).u8(0x41) != Some(2));
    let names = volume.streams(node, FILE_NAME, |_| true)?;
    Ok(u32::try_from(names.iter().filter(|name| is_shown(&name.head.form)).count()).unwrap_or(u32::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_counted_from_1601() {
        let at = |seconds, nanoseconds| Time { seconds, nanoseconds };
        assert_eq!(time(0), at(-EPOCH, 0));
        assert_eq!(time(116_444_736_000_000_001), at(0, 100));
        assert_eq!(time(116_444_735_999_999_999), at(-1, 999_999_900));
        assert_eq!(time(u64::MAX), at(-EPOCH - 1, 999_999_900));
    }
}
