//! Records in the items of names: those that a directory has, and those that a file says that it has.
//!
//! Source: Linux `include/uapi/linux/btrfs_tree.h`, `struct btrfs_dir_item`, `btrfs_inode_ref` and `btrfs_inode_extref`.

use fs_ext4::checksum::linux_crc32c;

use super::super::view::Key;
use crate::{Error, Fields, Result};

/// A reference in an item for each directory.
pub(super) const REFERENCE: u8 = 12;
/// A reference in an item for each name, where those do not fit there.
pub(super) const EXTENDED_REFERENCE: u8 = 13;

/// A name in a directory, or an extended attribute.
pub(super) struct Entry<'a> {
    /// Of the item that it leads to.
    pub(super) location: Key,
    /// What it leads to is a file, a directory and so on.
    pub(super) kind: u8,
    pub(super) name: &'a [u8],
    /// The record as a whole.
    pub(super) bytes: &'a [u8],
}

fn short() -> Error {
    Error::damaged("an item of names is too short")
}

/// Returns the records of an item of a directory or of extended attributes.
pub(super) fn entries(mut item: &[u8]) -> Result<Vec<Entry<'_>>> {
    let mut found = Vec::new();
    while !item.is_empty() {
        let fields = Fields(item);
        let number = |at| fields.le64(at).ok_or_else(short);
        let len = |at| fields.le16(at).map(usize::from).ok_or_else(short);
        let (value, name) = (len(25)?, len(27)?);
        let location = Key { object: number(0)?, kind: fields.u8(8).ok_or_else(short)?, offset: number(9)? };
        let bytes = fields.bytes(0, 30 + name + value).ok_or_else(short)?;
        let kind = fields.u8(29).ok_or_else(short)?;
        found.push(Entry { location, kind, name: &bytes[30..30 + name], bytes });
        item = &item[bytes.len()..];
    }
    Ok(found)
}

/// Returns the record of a name in a directory that leads to an inode.
pub(super) fn entry(location: Key, kind: u8, name: &[u8]) -> Vec<u8> {
    let mut bytes = vec![0; 30];
    bytes[..8].copy_from_slice(&location.object.to_le_bytes());
    bytes[8] = location.kind;
    bytes[9..17].copy_from_slice(&location.offset.to_le_bytes());
    let len = u16::try_from(name.len()).expect("it was read from a field of 16 bits");
    bytes[27..29].copy_from_slice(&len.to_le_bytes());
    bytes[29] = kind;
    bytes.extend_from_slice(name);
    bytes
}

/// A name of a file, as the file says it.
pub(super) struct Reference<'a> {
    pub(super) directory: u64,
    /// Where in the order of the directory.
    pub(super) index: u64,
    pub(super) name: &'a [u8],
    /// The record as a whole.
    pub(super) bytes: &'a [u8],
}

/// Returns the records of an item of references.
pub(super) fn references(key: Key, mut item: &[u8]) -> Result<Vec<Reference<'_>>> {
    let mut found = Vec::new();
    // An extended one begins with the number of the directory.
    let before = if key.kind == EXTENDED_REFERENCE { 8 } else { 0 };
    while !item.is_empty() {
        let fields = Fields(item);
        let directory = if before > 0 { fields.le64(0).ok_or_else(short)? } else { key.offset };
        let index = fields.le64(before).ok_or_else(short)?;
        let len = fields.le16(before + 8).map(usize::from).ok_or_else(short)?;
        let bytes = fields.bytes(0, before + 10 + len).ok_or_else(short)?;
        found.push(Reference { directory, index, name: &bytes[before + 10..], bytes });
        item = &item[bytes.len()..];
    }
    Ok(found)
}

/// Returns the record of a reference in an item of that kind.
pub(super) fn reference(kind: u8, directory: u64, index: u64, name: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    if kind == EXTENDED_REFERENCE {
        bytes.extend_from_slice(&directory.to_le_bytes());
    }
    bytes.extend_from_slice(&index.to_le_bytes());
    let len = u16::try_from(name.len()).expect("it was read from a field of 16 bits");
    bytes.extend_from_slice(&len.to_le_bytes());
    bytes.extend_from_slice(name);
    bytes
}

/// Returns the key of the item in which a reference of that kind is.
pub(super) fn reference_key(kind: u8, inode: u64, directory: u64, name: &[u8]) -> Key {
    let offset = if kind == EXTENDED_REFERENCE {
        let [a, b, c, d, ..] = directory.to_le_bytes();
        linux_crc32c(u32::from_le_bytes([a, b, c, d]), name).into()
    } else {
        directory
    };
    Key { object: inode, kind, offset }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_are_read_as_they_were_made_and_not_when_they_are_cut() {
        let location = Key { object: 300, kind: 1, offset: 0 };
        let item = [entry(location, 2, b"a"), entry(location, 7, b"longer")].concat();
        let found: Vec<_> =
            entries(&item).expect("sound").iter().map(|found| (found.kind, found.name.to_vec())).collect();
        assert_eq!(found, [(2, b"a".to_vec()), (7, b"longer".to_vec())]);
        assert!((1..item.len()).filter(|len| *len != 31).all(|len| entries(&item[..len]).is_err()));
        for kind in [REFERENCE, EXTENDED_REFERENCE] {
            let item = [reference(kind, 256, 3, b"a"), reference(kind, 256, 4, b"longer")].concat();
            let key = reference_key(kind, 300, 256, b"a");
            let found = references(key, &item).expect("sound");
            let found: Vec<_> = found.iter().map(|found| (found.directory, found.index, found.name)).collect();
            assert_eq!(found, [(256, 3, &b"a"[..]), (256, 4, b"longer")]);
            let first = reference(kind, 256, 3, b"a").len();
            assert!((1..item.len()).filter(|len| *len != first).all(|len| references(key, &item[..len]).is_err()));
        }
    }
}
