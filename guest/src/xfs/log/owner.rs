//! The blocks of a tree of extents say whose it is. When two files exchanged their trees, the log tells that of the inodes alone.
//!
//! Source: `xfs_recover_inode_owner_change` in Linux `fs/xfs/xfs_inode_item_recover.c`.

use fs_xfs::Superblock;

use super::changes::Changes;
use super::ring::SECTOR;
use crate::{Fields, Result};

/// Levels of a tree at most; no volume has room for as many.
const MAX_LEVELS: u16 = 16;

/// Bytes before the keys of a block, and where among them its owner is.
const HEADER: usize = 72;
const OWNER: usize = 56;

/// Lets an inode own all blocks of the tree whose root stands in it.
///
/// What is no block of a tree stays as it is: a reader of the file will find that out.
pub(super) fn change(root: &[u8], inode: u64, changes: &mut Changes<'_>, superblock: &Superblock) -> Result<()> {
    let per_block = u64::from(superblock.blocksize) / SECTOR as u64;
    let mut pending = children(root, 0, 4);
    while let Some((block, level)) = pending.pop() {
        let first = superblock.fsblock_offset(block) / SECTOR as u64;
        let mut bytes = changes.load(first, per_block)?;
        let fields = Fields(&bytes);
        if !bytes.starts_with(b"BMA3") || fields.be16(4) != Some(level) {
            continue;
        }
        if level > 0 {
            pending.extend(children(&bytes, 4, HEADER));
        }
        bytes[OWNER..OWNER + 8].copy_from_slice(&inode.to_be_bytes());
        changes.store(first, &bytes[..SECTOR])?;
        changes.sum_later(first, per_block);
    }
    Ok(())
}

/// Returns the blocks below a node, and their level.
///
/// Its level stands at `at`, and then how many there are; from `keys` on there is room for as many keys as pointers.
fn children(node: &[u8], at: usize, keys: usize) -> Vec<(u64, u16)> {
    let fields = Fields(node);
    let Some((level @ 1..=MAX_LEVELS, count)) = fields.be16(at).zip(fields.be16(at + 2)) else { return Vec::new() };
    let room = node.len().saturating_sub(keys) / 16;
    let pointers = (0..usize::from(count).min(room)).filter_map(|index| fields.be64(keys + (room + index) * 8));
    pointers.map(|block| (block, level - 1)).collect()
}
