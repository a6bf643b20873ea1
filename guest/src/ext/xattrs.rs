//! Extended attributes: what is left of an inode, one block beside it, and inodes that each hold one value.
//!
//! Source: "Extended Attributes" of the kernel's documentation of ext4.

use fs_ext4::features::RoCompat;
use fs_ext4::inode::InodeFlags;

use super::acl;
use super::content;
use super::map::Blocks;
use super::volume::{Node, Volume};
use crate::{Error, ErrorKind, Fields, Result, Xattr};

const MAGIC: u32 = 0xea02_0000;

/// Bytes of a value at most; no kernel takes or gives more.
const MAX_VALUE: u32 = 64 << 10;

/// Bytes of all values of a file at most.
const MAX_VALUES: usize = 1 << 20;

const ACCESS: u8 = 2;
const DEFAULT: u8 = 3;
const SYSTEM: u8 = 7;

/// What of a file's content does not fit in its inode, as the name says of it.
const INLINE_REST: &[u8] = b"data";

/// Returns those that the kernel lists.
pub(super) fn list(volume: &Volume, node: &Node) -> Result<Vec<Xattr>> {
    let mut found = Vec::new();
    let mut bytes = 0;
    for stored in stored(volume, node)? {
        let prefix: &[u8] = match stored.index {
            1 => b"user.",
            ACCESS => b"system.posix_acl_access",
            DEFAULT => b"system.posix_acl_default",
            4 => b"trusted.",
            6 => b"security.",
            // Of the filesystem itself, or of systems that are gone.
            _ => continue,
        };
        let value = stored.value(volume)?;
        let value = if matches!(stored.index, ACCESS | DEFAULT) { acl::to_xattr(&value)? } else { value };
        bytes += value.len();
        if bytes > MAX_VALUES {
            let message = format!("the attributes of inode {} take more than {MAX_VALUES} bytes", node.number);
            return Err(Error::new(ErrorKind::TooMuch, message));
        }
        found.push(Xattr { name: [prefix, &stored.name].concat(), value });
    }
    Ok(found)
}

/// Returns what of the content of an inode does not fit in the place of its map.
pub(super) fn inline_rest(volume: &Volume, node: &Node) -> Result<Option<Vec<u8>>> {
    let rest = stored(volume, node)?.into_iter().find(|stored| stored.index == SYSTEM && stored.name == INLINE_REST);
    rest.map(|stored| stored.value(volume)).transpose()
}

/// An attribute as it is stored.
struct Stored {
    index: u8,
    name: Vec<u8>,
    value: Value,
}

enum Value {
    Here(Vec<u8>),
    /// It is the content of an inode.
    Apart {
        inode: u32,
        len: u32,
    },
}

impl Stored {
    fn value(&self, volume: &Volume) -> Result<Vec<u8>> {
        let (inode, len) = match &self.value {
            Value::Here(bytes) => return Ok(bytes.clone()),
            Value::Apart { inode, len } => (*inode, *len),
        };
        if len > MAX_VALUE {
            let message = format!("a value of {len} bytes is in inode {inode}; {MAX_VALUE} are read at most");
            return Err(Error::new(ErrorKind::TooMuch, message));
        }
        let node = volume.own_node(inode)?;
        if !node.has(InodeFlags::EA_INODE) || node.inode.size != u64::from(len) {
            return Err(Error::damaged(format!("inode {inode} should hold the {len} bytes of an attribute")));
        }
        content::read(volume, &node, MAX_VALUE)
    }
}

fn stored(volume: &Volume, node: &Node) -> Result<Vec<Stored>> {
    let mut found = Vec::new();
    let within = |error: &Error| Error::new(error.kind(), format!("attributes of inode {}: {error}", node.number));
    let raw = Fields(&node.raw);
    // Without extra fields nothing follows them.
    if let Some(extra) = raw.le16(0x80).filter(|extra| *extra > 0)
        && let Some(place) = node.raw.get(0x80 + usize::from(extra)..)
        && Fields(place).le32(0) == Some(MAGIC)
    {
        entries(&place[4..], 0, &mut found).map_err(|error| within(&error))?;
    }
    let block = node.inode.file_acl;
    if block != 0 {
        let bytes = volume.read(block)?;
        let fields = Fields(&bytes);
        if fields.le32(0) != Some(MAGIC) || fields.le32(8) != Some(1) {
            return Err(Error::damaged(format!("block {block} should hold attributes of inode {}", node.number)));
        }
        if volume.has_ro_compat(RoCompat::METADATA_CSUM) && !volume.checksummer().verify_xattr_block(block, &bytes) {
            return Err(Error::damaged(format!("block {block} of attributes has a wrong checksum")));
        }
        entries(&bytes, 32, &mut found).map_err(|error| within(&error))?;
    }
    Ok(found)
}

/// Adds the entries from `at` on; values lie at offsets in `bytes`.
fn entries(bytes: &[u8], mut at: usize, found: &mut Vec<Stored>) -> Result<()> {
    let fields = Fields(bytes);
    while fields.le32(at).is_some_and(|start| start != 0) {
        let short = || Error::damaged("an entry does not fit in its place");
        let name_len = usize::from(fields.u8(at).ok_or_else(short)?);
        let index = fields.u8(at + 1).ok_or_else(short)?;
        let offset = usize::from(fields.le16(at + 2).ok_or_else(short)?);
        let inode = fields.le32(at + 4).ok_or_else(short)?;
        let len = fields.le32(at + 8).ok_or_else(short)?;
        let name = fields.bytes(at + 16, name_len).ok_or_else(short)?.to_vec();
        let value = match (inode, len) {
            (0, 0) => Value::Here(Vec::new()),
            (0, _) => {
                let len = usize::try_from(len).map_err(|_| short())?;
                Value::Here(fields.bytes(offset, len).ok_or_else(short)?.to_vec())
            }
            _ => Value::Apart { inode, len },
        };
        found.push(Stored { index, name, value });
        at += (16 + name_len).next_multiple_of(4);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_and_values_outside_of_their_place_are_damage() {
        let entry = |name_len: u8, offset: u16, len: u32| {
            let mut bytes = vec![name_len, 1];
            bytes.extend(offset.to_le_bytes());
            bytes.extend([0; 4]);
            bytes.extend(len.to_le_bytes());
            bytes.extend([0, 0, 0, 0, b'a', b'b', 0, 0, 0, 0, 0, 0, b'v', b'w']);
            let mut found = Vec::new();
            entries(&bytes, 0, &mut found).map(|()| found)
        };
        let found = entry(2, 24, 2).expect("it fits");
        assert!(matches!(&found[..], [Stored { index: 1, name, value: Value::Here(value) }]
            if name == b"ab" && value == b"vw"));
        for (name_len, offset, len) in [(15, 24, 2), (2, 25, 2), (2, 24, 3), (2, 0xffff, 1), (2, 0, u32::MAX)] {
            let error = entry(name_len, offset, len).err().expect("it does not fit");
            assert_eq!(error.kind(), ErrorKind::Damaged, "{name_len} {offset} {len}");
        }
    }
}
