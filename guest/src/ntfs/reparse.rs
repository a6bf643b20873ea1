//! Reparse points: what Windows makes of a file or directory when it is opened.
//!
//! | tag | shown as |
//! |---|---|
//! | symbolic link | a link: `..\a` is `../a`, and what starts at a root stays so, `\??\C:\a` is `/??/C:/a` |
//! | mount point, junction | the same: nothing says which volume is `C:` here |
//! | link, pipe, socket of WSL | a link, pipe or socket |
//! | compressed by Windows (WOF) | a file |
//! | deduplicated, on a tape ... | a file that cannot be read: its content is elsewhere |
//! | anything else, clouds among it | what it is without it; but a file of which nothing is here cannot be read |
//!
//! Source: \[MS-FSCC\] 2.1.2, "Reparse Point".

use super::record::REPARSE_POINT;
use super::volume::{Node, Volume};
use crate::utf16;
use crate::{Error, Fields, Kind, Result};

/// Bytes of a reparse point at most.
const MAX_SIZE: u64 = 16 << 10;

const MOUNT_POINT: u32 = 0xa000_0003;
const SYMLINK: u32 = 0xa000_000c;
const WSL_SYMLINK: u32 = 0xa000_001d;
const WSL_SOCKET: u32 = 0x8000_0023;
const WSL_FIFO: u32 = 0x8000_0024;
const WOF: u32 = 0x8000_0017;

/// What a reparse point makes of a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Reparse {
    /// A link to this.
    Link(Vec<u8>),
    /// Something without content.
    Special(Kind),
    /// Compressed; how, as WOF says it.
    Compressed(u32),
    /// Its content is not on the volume; in words, where.
    Elsewhere(&'static str),
    /// What it is anyway.
    Unknown(u32),
}

/// Returns what the reparse point of a file says, if it has one.
pub(super) fn of(volume: &Volume, node: &Node) -> Result<Option<Reparse>> {
    let Some(stream) = volume.stream(node, REPARSE_POINT, &[])? else { return Ok(None) };
    let bytes = stream.read(volume, node, MAX_SIZE)?;
    let number = node.number();
    parse(&bytes).map(Some).ok_or_else(|| Error::damaged(format!("the reparse point of file {number} does not fit")))
}

fn parse(bytes: &[u8]) -> Option<Reparse> {
    let fields = Fields(bytes);
    let tag = fields.le32(0)?;
    let data = fields.bytes(8, usize::from(fields.le16(4)?))?;
    Some(match tag {
        SYMLINK => Reparse::Link(target(data, 12)?),
        MOUNT_POINT => Reparse::Link(target(data, 8)?),
        WSL_SYMLINK => Reparse::Link(data.get(4..)?.to_vec()),
        WSL_SOCKET => Reparse::Special(Kind::Socket),
        WSL_FIFO => Reparse::Special(Kind::Fifo),
        WOF => compressed(data)?,
        0x8000_0013 => Reparse::Elsewhere("in the store of Windows' data deduplication"),
        0x8000_0007 => Reparse::Elsewhere("in the store of single instances"),
        0x8000_0006 | 0xc000_0004 => Reparse::Elsewhere("on another storage, to which Windows moved it"),
        _ => Reparse::Unknown(tag),
    })
}

/// Returns the target of which the place is given in `data`, and which is relative to what is `head` bytes after its start.
fn target(data: &[u8], head: usize) -> Option<Vec<u8>> {
    let fields = Fields(data);
    let (at, len) = (usize::from(fields.le16(0)?), usize::from(fields.le16(2)?));
    let name = Fields(data.get(head..)?).bytes(at, len)?;
    let slashes = |unit| if unit == u16::from(b'\\') { u16::from(b'/') } else { unit };
    Some(utf16::to_bytes(utf16::units(name).map(slashes)))
}

/// Returns how a file is compressed of which WOF keeps what it holds.
fn compressed(data: &[u8]) -> Option<Reparse> {
    let fields = Fields(data);
    Some(match (fields.le32(0)?, fields.le32(4)?) {
        (1, 2) if fields.le32(8)? == 1 => Reparse::Compressed(fields.le32(12)?),
        (1, 1) => Reparse::Elsewhere("in an image of Windows (WIM)"),
        _ => Reparse::Elsewhere("in a form of Windows' overlays (WOF) that is not known"),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reparse(tag: u32, data: &[u8]) -> Vec<u8> {
        let mut bytes = tag.to_le_bytes().to_vec();
        bytes.extend(u16::try_from(data.len()).unwrap().to_le_bytes());
        bytes.extend([0; 2]);
        bytes.extend(data);
        bytes
    }

    fn link(tag: u32, target: &str, flags: &[u8]) -> Vec<u8> {
        let target: Vec<_> = target.encode_utf16().flat_map(u16::to_le_bytes).collect();
        let len = u16::try_from(target.len()).unwrap();
        // The shown name comes first, as it may.
        let data = [&[4, 0][..], &len.to_le_bytes(), &[0, 0, 4, 0], flags, b"s\0h\0", &target].concat();
        reparse(tag, &data)
    }

    #[test]
    fn each_tag_is_shown_as_what_it_is() {
        let is = |target: &[u8]| Some(Reparse::Link(target.to_vec()));
        let cases = [
            (link(SYMLINK, "..\\a\\b", &[1, 0, 0, 0]), is(b"../a/b")),
            (link(SYMLINK, "\\??\\C:\\x y", &[0; 4]), is(b"/??/C:/x y")),
            (link(MOUNT_POINT, "\\??\\Volume{1}\\", &[]), is(b"/??/Volume{1}/")),
            (reparse(WSL_SYMLINK, b"\x02\0\0\0/usr/bin"), is(b"/usr/bin")),
            (reparse(WSL_FIFO, b""), Some(Reparse::Special(Kind::Fifo))),
            (reparse(WOF, &[1, 0, 0, 0, 2, 0, 0, 0, 1, 0, 0, 0, 3, 0, 0, 0]), Some(Reparse::Compressed(3))),
            (reparse(0x8000_001b, b"app"), Some(Reparse::Unknown(0x8000_001b))),
            (reparse(0x9000_601a, b""), Some(Reparse::Unknown(0x9000_601a))),
            (reparse(0x8000_0007, b""), Some(Reparse::Elsewhere("in the store of single instances"))),
            (reparse(SYMLINK, b""), None),
            (link(SYMLINK, "abc", &[])[..24].to_vec(), None),
            (vec![1, 2, 3], None),
        ];
        for (bytes, expected) in cases {
            assert_eq!(parse(&bytes), expected, "{bytes:x?}");
        }
    }
}
