//! Metadata as the device mapper keeps them since thin volumes: blocks of 4 KiB with checksums, B-trees of 64-bit keys in them.
//!
//! ```text
//! block: checksum (4) ... its own number at a place that its kind has
//! node:  checksum, flags, number (8), entries, most entries, bytes of a value, 0 | keys (8 each, room for most) | values
//! ```
//!
//! All numbers are little-endian. Source: Linux `drivers/md/persistent-data/dm-btree-internal.h`, `dm-block-manager.c`.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use disk::Disk;
use fs_ext4::checksum::linux_crc32c;

use crate::{Error, Fields, Result};

/// Bytes of a block.
pub(super) const BLOCK: usize = 4096;

/// More levels cannot be: nodes that are a third full hold all keys in less.
const MAX_LEVELS: usize = 16;

/// Nodes that are kept in memory, some 4 KiB each.
const KEPT: usize = 2048;

/// Where checksums of each kind of block start from.
const NODE: u32 = 121_107;

/// The blocks of a device of metadata.
pub(super) struct Blocks {
    disk: Arc<dyn Disk>,
    nodes: Mutex<HashMap<(u64, usize), Arc<Node>>>,
}

/// A node of a B-tree that was checked.
pub(super) struct Node {
    is_leaf: bool,
    keys: Vec<u64>,
    /// As many bytes for each key.
    values: Vec<u8>,
    value_size: usize,
}

impl Node {
    fn value(&self, index: usize) -> &[u8] {
        &self.values[index * self.value_size..][..self.value_size]
    }

    /// Returns the block below the entry of that number.
    fn child(&self, index: usize) -> u64 {
        Fields(self.value(index)).le64(0).unwrap_or(0)
    }
}

impl Blocks {
    pub(super) fn new(disk: Arc<dyn Disk>) -> Self {
        Self { disk, nodes: Mutex::default() }
    }

    /// Reads a block and verifies its checksum, which starts from `salt`, and the number that stands at `number_at`.
    pub(super) fn read(&self, number: u64, salt: u32, number_at: usize) -> Result<Vec<u8>> {
        let damaged = |what: &str| Error::damaged(format!("block {number} of its metadata {what}"));
        let mut bytes = vec![0; BLOCK];
        let offset = number
            .checked_mul(BLOCK as u64)
            .filter(|offset| offset.checked_add(BLOCK as u64).is_some_and(|end| end <= self.disk.size()));
        self.disk.read_at(offset.ok_or_else(|| damaged("lies past their end"))?, &mut bytes)?;
        let fields = Fields(&bytes);
        if fields.le32(0) != Some(linux_crc32c(u32::MAX, &bytes[4..]) ^ salt) {
            return Err(damaged("has a wrong checksum"));
        }
        if fields.le64(number_at) != Some(number) {
            return Err(damaged("belongs elsewhere"));
        }
        Ok(bytes)
    }

    /// Reads a node, of which the values are so long if it is a leaf.
    fn node(&self, number: u64, value_size: usize) -> Result<Arc<Node>> {
        if let Some(node) = self.nodes.lock().unwrap_or_else(PoisonError::into_inner).get(&(number, value_size)) {
            return Ok(node.clone());
        }
        let bytes = self.read(number, NODE, 8)?;
        let node = parse(Fields(&bytes), value_size);
        let node =
            node.ok_or_else(|| Error::damaged(format!("block {number} of its metadata is no node of a tree")))?;
        let node = Arc::new(node);
        let mut nodes = self.nodes.lock().unwrap_or_else(PoisonError::into_inner);
        if nodes.len() >= KEPT {
            nodes.clear();
        }
        nodes.insert((number, value_size), node.clone());
        Ok(node)
    }

    /// Returns the value of a key in the tree at `root`.
    pub(super) fn value(&self, root: u64, key: u64, value_size: usize) -> Result<Option<Vec<u8>>> {
        let mut walk = Walk::new(self, root, key, value_size);
        let found = walk.next()?;
        Ok(found.filter(|(found, _)| *found == key).map(|(_, value)| value))
    }
}

fn parse(fields: Fields, value_size: usize) -> Option<Node> {
    const HEADER: usize = 32;
    let is_leaf = match fields.le32(4)? {
        1 => false,
        2 => true,
        _ => return None,
    };
    let number = |at| usize::try_from(fields.le32(at)?).ok();
    let (count, most, size) = (number(16)?, number(20)?, number(24)?);
    let value_size = if is_leaf { value_size } else { 8 };
    let is_sound = size == value_size && count <= most && most <= (BLOCK - HEADER) / (8 + value_size);
    is_sound.then_some(())?;
    let keys: Vec<u64> = (0..count).map(|index| fields.le64(HEADER + 8 * index)).collect::<Option<_>>()?;
    let values = fields.bytes(HEADER + 8 * most, count * value_size)?.to_vec();
    keys.is_sorted_by(|a, b| a < b).then_some(Node { is_leaf, keys, values, value_size })
}

/// Goes through the entries of a tree in ascending order.
pub(super) struct Walk<'a> {
    blocks: &'a Blocks,
    value_size: usize,
    /// The nodes above the next entry, each with the next of its entries and the keys that it may have.
    path: Vec<(Arc<Node>, usize, Range<u64>)>,
    /// What to begin with.
    start: Option<(u64, u64)>,
    /// Nodes that were looked at.
    pub(super) visited: usize,
}

impl<'a> Walk<'a> {
    /// Begins at `key`, or the first after it.
    pub(super) fn new(blocks: &'a Blocks, root: u64, key: u64, value_size: usize) -> Self {
        Self { blocks, value_size, path: vec![], start: Some((root, key)), visited: 0 }
    }

    fn push(&mut self, number: u64, from: u64, keys: Range<u64>) -> Result<()> {
        let damaged = |what: &str| Error::damaged(format!("block {number} of its metadata {what}"));
        if self.path.len() == MAX_LEVELS {
            return Err(damaged("is too deep in its tree"));
        }
        let node = self.blocks.node(number, self.value_size)?;
        self.visited += 1;
        let is_within = |key: &u64| keys.contains(key) || (*key == u64::MAX && keys.end == u64::MAX);
        if !(node.keys.first().is_none_or(is_within) && node.keys.last().is_none_or(is_within)) {
            return Err(damaged("has keys that belong elsewhere"));
        }
        // Only a tree without entries has a node without: its root.
        if node.keys.is_empty() && (!self.path.is_empty() || !node.is_leaf) {
            return Err(damaged("has no entries"));
        }
        let next = node.keys.partition_point(|key| *key < from);
        let is_exact = node.keys.get(next) == Some(&from);
        // What is below an entry may begin before the next one.
        let next = if node.is_leaf || is_exact { next } else { next.saturating_sub(1) };
        self.path.push((node, next, keys));
        Ok(())
    }

    /// Returns the next entry.
    pub(super) fn next(&mut self) -> Result<Option<(u64, Vec<u8>)>> {
        let mut from = 0;
        if let Some((root, key)) = self.start.take() {
            from = key;
            self.push(root, from, 0..u64::MAX)?;
        }
        while let Some((node, next, keys)) = self.path.last_mut() {
            let Some(key) = node.keys.get(*next).copied() else {
                self.path.pop();
                continue;
            };
            let index = *next;
            *next += 1;
            if node.is_leaf {
                return Ok(Some((key, node.value(index).to_vec())));
            }
            let end = node.keys.get(index + 1).copied().unwrap_or(keys.end);
            let child = node.child(index);
            self.push(child, from, key..end)?;
        }
        Ok(None)
    }
}
