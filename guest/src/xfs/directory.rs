//! The names in a directory.
//!
//! rust-fs-xfs parses a block of a directory, which may be of several blocks of the filesystem; that these lie together
//! it takes for granted, so they are put together here.
//! Source: "Directories" in "XFS Algorithms & Data Structures".

use fs_xfs::dir::{self, DirEntry};
use fs_xfs::inode::Format;

use super::content;
use super::volume::{Node, Volume};
use crate::{Entry, Error, ErrorKind, Inode, Result};

/// Names of one directory at most: some 100 bytes each, all in memory.
const MAX_ENTRIES: usize = 4_000_000;

/// Where in a directory (bytes) its names end and their index begins.
const INDEX: u64 = 32 << 30;

/// Returns all names but `.` and `..`.
pub(super) fn list(volume: &Volume, node: &Node) -> Result<Vec<Entry>> {
    if !node.inode.is_dir() {
        return Err(Error::new(ErrorKind::WrongKind, format!("inode {} is no directory", node.number)));
    }
    let mut found = Vec::new();
    if node.inode.format == Format::Local {
        let read = volume.filesystem().read_dir(&node.inode, &node.raw);
        add(volume.explain(read, || format!("directory {}", node.number))?, &mut found)?;
        return Ok(found);
    }
    let superblock = volume.superblock();
    let block_size = volume.block_size();
    let mut block = vec![0; usize::try_from(superblock.dirblocksize()).expect("64 KiB at most")];
    let parts = block.len() as u64 / block_size;
    let end = INDEX / block_size;
    // Parts of `block` that are there, and where the first of them lies.
    let (mut there, mut place) = (0, 0);
    let missing = |part| Error::damaged(format!("block {part} of directory {} is missing", node.number));
    for run in content::runs(volume, node)? {
        let mut part = run.startoff;
        while part < run.end_offset().min(end) {
            if run.unwritten || part % parts != there {
                return Err(missing(part));
            }
            let len = (parts - there).min(run.end_offset() - part);
            let offset = superblock.fsblock_offset(run.startblock + (part - run.startoff));
            let start = usize::try_from(there * block_size).expect("within the block");
            let bytes = usize::try_from(len * block_size).expect("within the block");
            let what = || format!("directory {}", node.number);
            volume.read(offset, &mut block[start..start + bytes], what)?;
            if there == 0 {
                place = offset;
            }
            (part, there) = (part + len, there + len);
            if there == parts {
                let checked = dir::verify_data_block(&block, superblock, place / 512, node.number);
                volume.explain(checked, what)?;
                add(volume.explain(dir::parse_data_block(&block, superblock), what)?, &mut found)?;
                there = 0;
            }
        }
    }
    if there != 0 {
        return Err(missing(there));
    }
    Ok(found)
}

fn add(entries: Vec<DirEntry>, found: &mut Vec<Entry>) -> Result<()> {
    if found.len() + entries.len() > MAX_ENTRIES {
        return Err(Error::new(ErrorKind::TooMuch, format!("it holds more than {MAX_ENTRIES} names")));
    }
    let entries = entries.into_iter().filter(|entry| entry.name != b"." && entry.name != b"..");
    found.extend(entries.map(|entry| Entry { name: entry.name, inode: Inode(entry.ino) }));
    Ok(())
}
