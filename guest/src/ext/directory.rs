//! The names in a directory.
//!
//! An indexed directory (htree) is one whose index blocks look like entries that are not in use, so reading all of its
//! blocks in a row finds every name. Source: "Directory Entries" of the kernel's documentation of ext4.

use std::ops::ControlFlow;

use fs_ext4::features::RoCompat;
use fs_ext4::inode::InodeFlags;

use super::content;
use super::map::{Blocks, Place, Window};
use super::volume::{Node, Volume};
use super::xattrs;
use crate::{Entry, Error, ErrorKind, Fields, Inode, Result};

/// Names of one directory at most: some 100 bytes each, all in memory.
const MAX_ENTRIES: usize = 4_000_000;

/// Bytes of one directory at most, which bounds a walk over blocks that hold no names.
const MAX_BYTES: u64 = 2 << 30;

/// Runs of blocks asked for at once.
const ROOM: usize = 1024;

/// Bytes before a name.
const HEAD: usize = 8;

/// Returns all names but `.` and `..`.
pub(super) fn list(volume: &Volume, node: &Node) -> Result<Vec<Entry>> {
    if !node.inode.is_dir() {
        return Err(Error::new(ErrorKind::WrongKind, format!("inode {} is no directory", node.number)));
    }
    node.check_plain()?;
    let mut found = Vec::new();
    if !volume.changes().is_made(node.number) {
        read(volume, node, &mut found)?;
    }
    volume.changes().apply_names(node.number, &mut found);
    Ok(found)
}

/// Adds all names that the volume holds.
fn read(volume: &Volume, node: &Node, found: &mut Vec<Entry>) -> Result<()> {
    if node.has(InodeFlags::INLINE_DATA) {
        // The first four bytes are the number of the parent.
        entries(&node.inode.block[4..], found).map_err(|error| in_directory(node, &error))?;
        let rest = xattrs::inline_rest(volume, node)?.unwrap_or_default();
        entries(&rest, found).map_err(|error| in_directory(node, &error))?;
        return Ok(());
    }
    if node.inode.size > MAX_BYTES {
        return Err(Error::new(
            ErrorKind::TooMuch,
            format!("directory {} takes {} bytes; {MAX_BYTES} are read at most", node.number, node.inode.size),
        ));
    }
    let end = node.inode.size.div_ceil(volume.block_size());
    let mut at = 0;
    while at < end {
        let runs = content::runs(volume, node, Window { from: at, end, room: ROOM })?;
        for run in runs.found {
            let Place::At(first) = run.place else { return Err(hole(node, run.start)) };
            if run.start > at {
                return Err(hole(node, at));
            }
            for within in at - run.start..run.len.min(end - run.start) {
                let bytes = volume.read(first + within)?;
                if !is_index(node, run.start + within, &bytes) {
                    check(volume, node, &bytes, first + within)?;
                }
                entries(&bytes, found).map_err(|error| in_directory(node, &error))?;
            }
            at = run.start + run.len;
        }
        if at < runs.until.min(end) {
            return Err(hole(node, at));
        }
    }
    Ok(())
}

fn hole(node: &Node, block: u64) -> Error {
    Error::damaged(format!("block {block} of directory {} is missing", node.number))
}

fn in_directory(node: &Node, error: &Error) -> Error {
    Error::new(error.kind(), format!("directory {}: {error}", node.number))
}

/// Returns whether a block is of the index, which nobody needs who reads all of them. What looks like a checksum at its end
/// is left over from before it was one.
fn is_index(node: &Node, block: u64, bytes: &[u8]) -> bool {
    let fields = Fields(bytes);
    let has_one_unused_entry =
        fields.le32(0) == Some(0) && fields.le16(4).is_some_and(|len| record_len(len, bytes.len()) == bytes.len());
    node.has(InodeFlags::INDEX) && (block == 0 || has_one_unused_entry)
}

/// Checks a block that has a checksum.
fn check(volume: &Volume, node: &Node, bytes: &[u8], block: u64) -> Result<()> {
    let is_wrong = volume.has_ro_compat(RoCompat::METADATA_CSUM)
        && fs_ext4::dir::has_csum_tail(bytes)
        && !volume.checksummer().verify_dir_entry_tail(node.number, node.inode.generation, bytes);
    if is_wrong {
        return Err(Error::damaged(format!("block {block} of directory {} has a wrong checksum", node.number)));
    }
    Ok(())
}

/// Adds the names in a block, or in what takes the place of one.
fn entries(bytes: &[u8], found: &mut Vec<Entry>) -> Result<()> {
    let mut rest = bytes;
    while let ControlFlow::Continue(after) = entry(rest, bytes.len(), found)? {
        rest = after;
    }
    Ok(())
}

/// Adds the first name, and returns what follows it.
fn entry<'a>(bytes: &'a [u8], block_size: usize, found: &mut Vec<Entry>) -> Result<ControlFlow<(), &'a [u8]>> {
    let fields = Fields(bytes);
    let (Some(inode), Some(len), Some(name_len)) = (fields.le32(0), fields.le16(4), fields.u8(6)) else {
        // Fewer bytes than an entry has are left over in an inode.
        return Ok(ControlFlow::Break(()));
    };
    let (len, name_len) = (record_len(len, block_size), usize::from(name_len));
    if len < HEAD || len % 4 != 0 || len > bytes.len() || HEAD + name_len > len {
        return Err(Error::damaged(format!(
            "an entry of {len} bytes with a name of {name_len} does not fit in the {} that are left",
            bytes.len()
        )));
    }
    let name = &bytes[HEAD..HEAD + name_len];
    if inode != 0 && name != b"." && name != b".." {
        if name.is_empty() {
            return Err(Error::damaged(format!("inode {inode} has an empty name")));
        }
        if found.len() >= MAX_ENTRIES {
            return Err(Error::new(ErrorKind::TooMuch, format!("it holds more than {MAX_ENTRIES} names")));
        }
        found.push(Entry { name: name.to_vec(), inode: Inode(u64::from(inode)) });
    }
    Ok(ControlFlow::Continue(&bytes[len..]))
}

/// Returns the bytes of an entry: in blocks of 64 KiB and more than 16 bits can say.
fn record_len(stored: u16, block_size: usize) -> usize {
    match (usize::from(stored), block_size) {
        (0 | 0xffff, 0x1_0000) => block_size,
        (len, _) => len,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An entry of `len` bytes.
    fn record(inode: u32, len: u16, name: &[u8]) -> Vec<u8> {
        let mut bytes = inode.to_le_bytes().to_vec();
        bytes.extend(len.to_le_bytes());
        bytes.extend([u8::try_from(name.len()).unwrap(), 1]);
        bytes.extend(name);
        bytes.resize(bytes.len().max(usize::from(len)), 0);
        bytes
    }

    fn names(bytes: &[u8]) -> Result<Vec<(Vec<u8>, u64)>> {
        let mut found = Vec::new();
        entries(bytes, &mut found)?;
        Ok(found.into_iter().map(|entry| (entry.name, entry.inode.0)).collect())
    }

    #[test]
    fn unused_entries_and_those_of_the_directory_itself_are_no_names() {
        let block = [
            record(2, 12, b"."),
            record(2, 12, b".."),
            record(0, 16, b"gone"),
            record(12, 16, b"caf\xe9"),
            record(13, 16, b"..."),
            record(0, 12, b""),
        ];
        assert_eq!(names(&block.concat()), Ok(vec![(b"caf\xe9".to_vec(), 12), (b"...".to_vec(), 13)]));
    }

    #[test]
    fn the_root_of_an_index_holds_no_names() {
        let root = [record(2, 12, b"."), record(2, 4084, b"..")];
        assert_eq!(names(&root.concat()), Ok(vec![]));
        assert_eq!(names(&record(0, 4096, b"")), Ok(vec![]));
        let mut large = record(0, 0, b"");
        large.resize(0x1_0000, 7);
        assert_eq!(names(&large), Ok(vec![]));
    }

    #[test]
    fn entries_that_do_not_fit_are_damage() {
        let cases = [
            record(5, 0, b""),
            record(5, 4, b""),
            record(5, 14, b"abc"),
            record(5, 12, b"abcde")[..12].to_vec(),
            record(5, 12, b""),
            record(5, 4096, b"a")[..64].to_vec(),
        ];
        for case in cases {
            assert_eq!(names(&case).map_err(|error| error.kind()), Err(ErrorKind::Damaged), "{case:?}");
        }
    }
}
