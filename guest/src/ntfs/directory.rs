//! The names in a directory: an index with its root in the record, and blocks of which a bitmap says which are in use.
//!
//! All blocks in use are read in a row, in no order of names. A block that is not in use keeps what was in it, names of
//! deleted files among it. Source: "$INDEX_ROOT" and "$INDEX_ALLOCATION" of the Linux-NTFS documentation.

use super::boot;
use super::record::{self, BITMAP, FILE_NAME, Form, INDEX_ALLOCATION, INDEX_ROOT, Reference};
use super::stream::read_runs;
use super::volume::{FIRST_USER, Node, Volume};
use crate::utf16;
use crate::{Entry, Error, ErrorKind, Fields, Inode, Result};

/// `$I30`: the index of names.
pub(super) const NAMES: &[u16] = &[0x24, 0x49, 0x33, 0x30];

/// Names of one directory at most: some 100 bytes each, all in memory.
const MAX_ENTRIES: usize = 4_000_000;

/// Bytes of one index at most.
const MAX_BYTES: u64 = 2 << 30;

/// Bytes of what is in a record at most.
const MAX_ROOT: u64 = 64 << 10;

/// Bytes of a root before its entries are described, and of a block.
const ROOT_HEAD: usize = 0x10;
const BLOCK_HEAD: usize = 0x18;

/// Units in which blocks are numbered where they are smaller than a cluster (bytes).
const SECTOR: u64 = 512;

/// The name is a short one for DOS, beside another.
const DOS: u8 = 2;

/// Returns all names of files but short ones, and those of the filesystem's own files.
///
/// An entry says which use of a record it means; `is_current` returns whether that is the one that the record has.
pub(super) fn list(volume: &Volume, node: &Node, is_current: impl Fn(Reference) -> Result<bool>) -> Result<Vec<Entry>> {
    let within = |error: Error| Error::new(error.kind(), format!("directory {}: {error}", node.number()));
    let mut found = Vec::new();
    read(volume, node, &mut found).map_err(within)?;
    let mut entries = Vec::with_capacity(found.len());
    for (reference, name) in found {
        if is_current(reference)? {
            entries.push(Entry { name, inode: Inode(reference.number) });
        }
    }
    Ok(entries)
}

type Found = Vec<(Reference, Vec<u8>)>;

fn read(volume: &Volume, node: &Node, found: &mut Found) -> Result<()> {
    let root = volume.stream(node, INDEX_ROOT, NAMES)?.ok_or_else(|| Error::damaged("it has no index of names"))?;
    let root = root.read(volume, node, MAX_ROOT)?;
    let fields = Fields(&root);
    let (Some(FILE_NAME), Some(block_size)) = (fields.le32(0), fields.le32(8).map(u64::from)) else {
        return Err(Error::damaged("its index is not one of names"));
    };
    let is_large = entries(root.get(ROOT_HEAD..).unwrap_or_default(), found)?;
    let Some(blocks) = volume.stream(node, INDEX_ALLOCATION, NAMES)? else {
        return if is_large { Err(Error::damaged("the blocks of its index are missing")) } else { Ok(()) };
    };
    let size = blocks.size()?;
    if !boot::is_index_block(block_size) {
        return Err(Error::damaged(format!("blocks of its index have {block_size} bytes")));
    }
    if size > MAX_BYTES {
        let message = format!("its index takes {size} bytes; {MAX_BYTES} are read at most");
        return Err(Error::new(ErrorKind::TooMuch, message));
    }
    if matches!(blocks.head.form, Form::Resident(_)) {
        return Err(Error::damaged("the blocks of its index lie in its record"));
    }
    let runs = blocks.all_runs(volume, node)?;
    let bitmap =
        volume.stream(node, BITMAP, NAMES)?.ok_or_else(|| Error::damaged("the bitmap of its index is missing"))?;
    // One bit for each block, and some that are to come.
    let bitmap = bitmap.read(volume, node, MAX_BYTES / SECTOR / 8)?;
    let unit = if block_size < volume.boot.cluster_size { SECTOR } else { volume.boot.cluster_size };
    let mut bytes = vec![0; usize::try_from(block_size).expect("64 KiB at most")];
    for number in (0_u64..)
        .zip(&bitmap)
        .flat_map(|(at, byte)| (0..8).filter(move |bit| byte >> bit & 1 != 0).map(move |bit| at * 8 + bit))
    {
        let offset = number * block_size;
        if offset + block_size > size {
            return Err(Error::damaged(format!("block {number} of its index is in use, which is past the end")));
        }
        read_runs(volume, &runs, offset, &mut bytes)?;
        let within = |error: Error| Error::new(error.kind(), format!("block {number} of its index: {error}"));
        record::restore(&mut bytes, b"INDX").map_err(within)?;
        if Fields(&bytes).le64(0x10) != Some(offset / unit) {
            return Err(within(Error::damaged("it is another one")));
        }
        entries(&bytes[BLOCK_HEAD..], found).map_err(within)?;
    }
    Ok(())
}

/// Adds the names of a node, which starts with where they are; returns whether there are nodes below it.
fn entries(bytes: &[u8], found: &mut Found) -> Result<bool> {
    let damaged = || Error::damaged("an entry of its index does not fit");
    let fields = Fields(bytes);
    let field = |at| fields.le32(at).and_then(|value| usize::try_from(value).ok()).ok_or_else(damaged);
    let (mut at, end) = (field(0)?, field(4)?);
    let has_children = fields.u8(0x0c).ok_or_else(damaged)? & 1 != 0;
    if end > bytes.len() {
        return Err(damaged());
    }
    loop {
        let entry = bytes.get(at..end).map(Fields).ok_or_else(damaged)?;
        let len = usize::from(entry.le16(8).ok_or_else(damaged)?);
        let flags = entry.le16(0x0c).ok_or_else(damaged)?;
        if flags & 2 != 0 {
            return Ok(has_children);
        }
        let key_len = usize::from(entry.le16(0x0a).ok_or_else(damaged)?);
        if len < ROOT_HEAD || !len.is_multiple_of(8) || key_len > len - ROOT_HEAD {
            return Err(damaged());
        }
        let key = entry.bytes(ROOT_HEAD, key_len).map(Fields).ok_or_else(damaged)?;
        let name_len = usize::from(key.u8(0x40).ok_or_else(damaged)?) * 2;
        let units = key.bytes(0x42, name_len).filter(|name| !name.is_empty()).ok_or_else(damaged)?;
        let reference = Reference::from(entry.le64(0).ok_or_else(damaged)?);
        if reference.number >= FIRST_USER && key.u8(0x41) != Some(DOS) {
            if found.len() >= MAX_ENTRIES {
                return Err(Error::new(ErrorKind::TooMuch, format!("it holds more than {MAX_ENTRIES} names")));
            }
            found.push((reference, utf16::to_bytes(utf16::units(units))));
        }
        at += len;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An entry of a node: of record 40, with a name in a namespace.
    fn entry(name: &str, namespace: u8) -> Vec<u8> {
        let mut key = vec![0; 0x42];
        key[0x40] = u8::try_from(name.len()).unwrap();
        key[0x41] = namespace;
        key.extend(name.encode_utf16().flat_map(u16::to_le_bytes));
        let len = (ROOT_HEAD + key.len()).next_multiple_of(8);
        let mut bytes = (40_u64 | 3 << 48).to_le_bytes().to_vec();
        bytes.extend(u16::try_from(len).unwrap().to_le_bytes());
        bytes.extend(u16::try_from(key.len()).unwrap().to_le_bytes());
        bytes.extend([0; 4]);
        bytes.extend(key);
        bytes.resize(len, 0);
        bytes
    }

    fn node(entries: &[u8]) -> Vec<u8> {
        let end = 0x10 + entries.len() + 0x10;
        let mut bytes = vec![0x10, 0, 0, 0];
        bytes.extend(u32::try_from(end).unwrap().to_le_bytes());
        bytes.resize(0x10, 0);
        bytes.extend(entries);
        bytes.extend([0, 0, 0, 0, 0, 0, 0, 0, 0x10, 0, 0, 0, 2, 0, 0, 0]);
        bytes
    }

    #[test]
    fn short_names_are_not_shown() {
        let bytes =
            node(&[entry("posix", 0), entry("a long name", 1), entry("ALONGN~1", 2), entry("BOTH", 3)].concat());
        let mut found = Vec::new();
        assert_eq!(entries(&bytes, &mut found), Ok(false));
        let names: Vec<_> = found.iter().map(|(_, name)| name.escape_ascii().to_string()).collect();
        assert_eq!(names, ["posix", "a long name", "BOTH"]);
        assert!(found.iter().all(|(reference, _)| *reference == Reference { number: 40, sequence: 3 }));
    }

    #[test]
    fn entries_that_do_not_fit_are_damage() {
        let good = node(&entry("name", 0));
        entries(&good, &mut Vec::new()).expect("it fits");
        // Where the entries end; the length of one; of its key; of its name; its flags.
        for (at, value) in [(4, 0xff), (4, 0x20), (0x18, 0), (0x18, 0x0c), (0x1a, 0xff), (0x60, 0), (0x60, 200)] {
            let mut bytes = good.clone();
            bytes[at] = value;
            let error = entries(&bytes, &mut Vec::new()).expect_err("it does not fit");
            assert_eq!(error.kind(), ErrorKind::Damaged, "{at:#x}");
        }
    }
}
