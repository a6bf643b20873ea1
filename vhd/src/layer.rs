//! One disk image alone: what it holds, and what it leaves to its parent.
//!
//! A layer is opened by reading its footer and header; its map (which blocks it holds) is read once, when the chain
//! it belongs to makes its table, and not kept. Two forms exist, a VHD file ([`crate::flat`]) and an exploded VHD
//! ([`crate::exploded`]); this module is what they have in common.

use std::sync::Arc;
use std::time::SystemTime;

use storage::{ObjectPath, Stat, Storage};
use uuid::Uuid;

use crate::cache::{BlockCache, LayerId, LayerIdentity};
use crate::error::{Error, ErrorKind, Result};
use crate::exploded::Exploded;
use crate::filter::Filter;
use crate::flat::Flat;
use crate::footer::{DiskType, Footer};
use crate::geometry::{BlockIndex, BlockSize};
use crate::header::Header;

/// Blocks a disk may have at most: 32 TiB of 2 MiB blocks. A table of so many takes 96 MiB; a hostile size that
/// asks for more is refused before anything is allocated.
pub(crate) const MAX_BLOCKS: u64 = 1 << 24;

/// How a layer is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// One VHD file.
    File,
    /// A folder with one file per block.
    Exploded(Filter),
}

/// What a sector bitmap means.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum BitmapRule {
    /// A sector whose bit is 0 is not in this layer (VHD specification 1.0, "Block Bitmap and Data").
    Honour,
    /// Every sector of a stored block is in this layer (XO never looks at a bitmap, and fills those it writes).
    Ignore,
}

impl Format {
    /// Decides whose rule holds for sector bitmaps, for all of the crate.
    ///
    /// Only XO writes exploded VHDs, so there XO's rule holds. A VHD file may come from any tool. XO fills every
    /// bitmap it writes, so both rules agree on its files; a bitmap with a bit missing was not written by XO, whatever
    /// the creator field says, and then the specification's rule gives the bytes its writer meant.
    pub(crate) fn bitmap_rule(self) -> BitmapRule {
        match self {
            Self::File => BitmapRule::Honour,
            Self::Exploded(_) => BitmapRule::Ignore,
        }
    }
}

/// What is known of bytes after they were read; the greater one holds for both of two parts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Outcome {
    /// They are right, and their files are as they were when they were opened.
    Untouched,
    /// They are right.
    Right,
    /// They may be another block's or another disk's.
    Changed,
}

/// Where the blocks of a layer go while a merge takes them away.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Moving {
    /// The layer that takes them.
    pub(crate) into: Arc<Layer>,
    /// Whether every block was there when the merge began: then what is gone has been moved.
    pub(crate) was_complete: bool,
}

/// The bytes of a layer.
pub(crate) enum Body {
    Flat(Flat),
    Exploded(Exploded),
}

/// One disk image.
pub(crate) struct Layer {
    /// The path by which its backup or child names it: the VHD file, or the alias.
    pub(crate) name: ObjectPath,
    /// The VHD file or the folder.
    pub(crate) data: ObjectPath,
    pub(crate) id: LayerId,
    pub(crate) footer: Footer,
    /// `None` for a fixed disk.
    pub(crate) header: Option<Header>,
    pub(crate) block_size: BlockSize,
    /// When the footer was written, as the storage says.
    pub(crate) footer_modified: SystemTime,
    pub(crate) body: Body,
}

impl PartialEq for Layer {
    fn eq(&self, other: &Self) -> bool {
        self.id == other.id && self.name == other.name
    }
}

impl std::fmt::Debug for Layer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Layer({} at {}, {:?})", self.name, self.data, self.id)
    }
}

/// The set of blocks one layer holds, each with its place.
pub(crate) enum BlockMap {
    /// A fixed disk: every block, one after the other.
    All,
    /// A VHD file: the sector of each block's bitmap, [`BlockMap::ABSENT`] if it has none.
    Sectors(Vec<u32>),
    /// An exploded VHD: a bit per block, most significant first.
    Bits(Vec<u8>),
}

impl BlockMap {
    /// The entry of a block that is not allocated (VHD specification 1.0, "Block Allocation Table").
    pub(crate) const ABSENT: u32 = u32::MAX;

    /// Returns the place of a block: its sector in a VHD file, 0 elsewhere; `None` if the layer does not hold it.
    pub(crate) fn place(&self, block: usize) -> Option<u32> {
        match self {
            Self::All => Some(0),
            Self::Sectors(sectors) => sectors.get(block).copied().filter(|sector| *sector != Self::ABSENT),
            Self::Bits(bytes) => bytes.get(block / 8).filter(|byte| *byte & (0x80 >> (block % 8)) != 0).map(|_| 0),
        }
    }

    /// Calls `act` with each block below `end` that the layer holds, ascending, and its place. Faster than asking for
    /// each block, most of which a layer does not hold.
    pub(crate) fn each_held(&self, end: usize, mut act: impl FnMut(usize, u32)) {
        match self {
            Self::All => (0..end).for_each(|block| act(block, 0)),
            Self::Sectors(sectors) => {
                for (block, sector) in sectors.iter().enumerate().take(end) {
                    if *sector != Self::ABSENT {
                        act(block, *sector);
                    }
                }
            }
            Self::Bits(bytes) => {
                for (index, byte) in bytes.iter().enumerate().take(end.div_ceil(8)) {
                    let mut rest = *byte;
                    while rest != 0 {
                        let bit = rest.leading_zeros() as usize;
                        rest &= !(0x80 >> bit);
                        if index * 8 + bit < end {
                            act(index * 8 + bit, 0);
                        }
                    }
                }
            }
        }
    }
}

impl Layer {
    /// Opens the image at `data`, a VHD file or a folder, which is called `name` by those who refer to it.
    pub(crate) fn open(
        storage: &Arc<dyn Storage>,
        cache: &BlockCache,
        name: &ObjectPath,
        data: &ObjectPath,
    ) -> Result<Self> {
        match storage.open(data) {
            Ok(object) if storage.capabilities().ranged_reads => Flat::open(object, cache, name, data),
            Ok(_) => {
                let reason = "a VHD file in an encrypted repository cannot be read in parts; XO writes none";
                Err(Error::new(ErrorKind::Unsupported, data, reason))
            }
            Err(error) if error.kind() == storage::ErrorKind::IsDirectory => Exploded::open(storage, cache, name, data),
            Err(error) => Err(error.into()),
        }
    }

    /// Makes a layer of what was read of it; `file` is the one that holds its footer.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`] if it is too large.
    pub(crate) fn new(
        cache: &BlockCache,
        (name, data): (&ObjectPath, &ObjectPath),
        file: &Stat,
        footer: Footer,
        header: Option<Header>,
        body: Body,
    ) -> Result<Self> {
        let block_size = header.as_ref().map_or(BlockSize::DEFAULT, |header| header.block_size);
        Self::check_size(data, &footer, block_size)?;
        let (uuid, inode, modified) = (footer.uuid, file.inode, file.modified);
        let id = cache.layer_id(LayerIdentity { data: data.clone(), uuid, inode, modified, block_size });
        let (name, data) = (name.clone(), data.clone());
        Ok(Self { name, data, id, footer, header, block_size, footer_modified: modified, body })
    }

    pub(crate) fn format(&self) -> Format {
        match &self.body {
            Body::Flat(_) => Format::File,
            Body::Exploded(exploded) => Format::Exploded(exploded.filter),
        }
    }

    pub(crate) fn virtual_size(&self) -> u64 {
        self.footer.virtual_size()
    }

    /// Returns the number of blocks that cover the virtual size.
    pub(crate) fn block_count(&self) -> u64 {
        self.block_size.block_count(self.virtual_size())
    }

    /// Returns the uuid its parent is expected to have, `None` for a base.
    ///
    /// The type decides, not the field: a merged key keeps what it had.
    pub(crate) fn parent_uuid(&self) -> Option<Uuid> {
        let header = self.header.as_ref()?;
        (self.footer.disk_type == DiskType::Differencing).then(|| header.parent_uuid.unwrap_or_default())
    }

    /// Reads the map.
    pub(crate) fn map(&self, storage: &Arc<dyn Storage>) -> Result<BlockMap> {
        match &self.body {
            Body::Flat(flat) => flat.map(self),
            Body::Exploded(exploded) => exploded.map(self, storage),
        }
    }

    /// Checks that a disk of these sizes can be read at all.
    pub(crate) fn check_size(data: &ObjectPath, footer: &Footer, block_size: BlockSize) -> Result<()> {
        let blocks = block_size.block_count(footer.virtual_size());
        if blocks > MAX_BLOCKS {
            let reason = format!(
                "a virtual size of {} bytes in blocks of {} was found, at most {MAX_BLOCKS} blocks are supported",
                footer.virtual_size(),
                block_size.bytes()
            );
            return Err(Error::new(ErrorKind::Unsupported, data, reason));
        }
        Ok(())
    }

    /// Names a block for a message.
    pub(crate) fn block_error(&self, kind: ErrorKind, block: BlockIndex, reason: &str) -> Error {
        Error::new(kind, &self.data, format!("block {}: {reason}", block.0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_blocks_held_are_those_that_have_a_place() {
        const ABSENT: u32 = BlockMap::ABSENT;
        let maps = [
            BlockMap::All,
            BlockMap::Sectors(vec![ABSENT, 7, ABSENT, 3, 0, ABSENT, ABSENT, ABSENT, 9, 2, 1]),
            BlockMap::Bits(vec![0b0101_1000, 0b1110_0000]),
            BlockMap::Bits(Vec::new()),
        ];
        for map in maps {
            for end in 0..=11 {
                let mut held = Vec::new();
                map.each_held(end, |block, place| held.push((block, place)));
                let expected: Vec<_> = (0..end).filter_map(|block| Some((block, map.place(block)?))).collect();
                assert_eq!(held, expected, "below {end}");
            }
        }
    }
}
