//! An exploded VHD (XO: "VHD directory"): a folder with one file per block.
//!
//! ```text
//! <name>.vhd/ ├─ footer  header  bat      as in a VHD file, but the bat is a bit per block, and all go through the filter
//!             ├─ chunk-filters.json       names the filter; absent: none
//!             └─ blocks/<n div 1000>/<n mod 1000>      sector bitmap (all ones) and data, through the filter
//! ```
//!
//! Source: vhd-lib's `VhdDirectory.js`.

use std::collections::HashSet;
use std::sync::Arc;

use storage::{Object, ObjectPath, Storage};

use crate::cache::BlockCache;
use crate::error::{Error, ErrorKind, FormatError, Result};
use crate::filter::Filter;
use crate::footer::{DiskType, FOOTER_BYTES, Footer};
use crate::geometry::BlockIndex;
use crate::header::{HEADER_BYTES, Header};
use crate::layer::{BlockMap, Body, Layer, MAX_BLOCKS, Moving};
use crate::memory::Memory;

/// A stored footer, header or list of filters is never larger: a filter may add a little to 1024 bytes.
const SMALL_FILE: u64 = 16 << 10;

pub(crate) struct Exploded {
    pub(crate) filter: Filter,
}

/// A block file that was found, and when it was last written.
pub(crate) struct BlockFile {
    pub(crate) object: Arc<dyn Object>,
    pub(crate) len: u64,
}

impl Exploded {
    pub(crate) fn open(
        storage: &Arc<dyn Storage>,
        cache: &BlockCache,
        name: &ObjectPath,
        data: &ObjectPath,
    ) -> Result<Layer> {
        let filters = data.join("chunk-filters.json")?;
        let filter = match storage.read(&filters, SMALL_FILE) {
            Ok(bytes) => Filter::from_chunk_filters_json(&bytes).map_err(|error| error.at(&filters))?,
            Err(error) if error.kind() == storage::ErrorKind::NotFound => Filter::None,
            Err(error) => return Err(error.into()),
        };
        let footer_path = data.join("footer")?;
        let stat = storage.stat(&footer_path)?;
        let footer: [u8; FOOTER_BYTES] = read_small(storage, &footer_path, filter)?;
        let footer = Footer::parse(&footer).map_err(|error| error.at(&footer_path))?;
        let header_path = data.join("header")?;
        let header: [u8; HEADER_BYTES] = read_small(storage, &header_path, filter)?;
        let header = Header::parse(&header).map_err(|error| error.at(&header_path))?;
        if footer.disk_type == DiskType::Fixed {
            let reason = "an exploded VHD must be dynamic or differencing, its footer says fixed";
            return Err(Error::new(ErrorKind::Damaged, &footer_path, reason));
        }
        Layer::new(cache, (name, data), &stat, footer, Some(header), Body::Exploded(Self { filter }))
    }

    /// Reads the bitmap of the blocks it holds; of what stands in the file only a bit per block is kept.
    ///
    /// XO writes a byte per block and leaves the header alone when a merge makes the disk larger, so the header's
    /// number of entries says nothing; but a table without a bit for every block lost some, silently, when it grew.
    pub(crate) fn map(&self, layer: &Layer, storage: &Arc<dyn Storage>) -> Result<BlockMap> {
        let path = layer.data.join("bat")?;
        let needed = usize::try_from(layer.block_count().div_ceil(8)).expect("at most MAX_BLOCKS bits");
        // XO writes a byte per entry; what claims more entries than any disk has blocks is not read.
        let entries = u64::from(layer.header.as_ref().map_or(0, |header| header.max_table_entries)).min(MAX_BLOCKS);
        let limit = layer.block_count() * 2 + SMALL_FILE + entries;
        let bits = if self.filter == Filter::None && storage.capabilities().ranged_reads {
            let object = storage.open(&path)?;
            let len = object.stat()?.size;
            if len > limit {
                let reason = format!("a table of at most {limit} bytes was expected, {len} were found");
                return Err(Error::new(ErrorKind::Damaged, &path, reason));
            }
            // An eighth of the file.
            let mut bits = vec![0; needed];
            let found = object.read_at(0, &mut bits)?;
            bits.truncate(found);
            bits
        } else {
            let stored = storage.read(&path, limit)?;
            self.filter.decode_prefix(&stored, needed, limit).map_err(|error| error.at(&path))?
        };
        if bits.len() < needed {
            let reason = format!("a table of {needed} bytes was expected, {} were found", bits.len());
            return Err(Error::new(ErrorKind::Damaged, &path, reason));
        }
        Ok(BlockMap::Bits(bits))
    }

    pub(crate) fn block_path(folder: &ObjectPath, block: BlockIndex) -> Result<ObjectPath> {
        Ok(folder.resolve(&format!("blocks/{}/{}", block.0 / 1000, block.0 % 1000))?)
    }

    /// Returns whether the file of a block is in the layer's own folder.
    pub(crate) fn is_there(layer: &Layer, storage: &Arc<dyn Storage>, block: BlockIndex) -> Result<bool> {
        match storage.stat(&Self::block_path(&layer.data, block)?) {
            Ok(_) => Ok(true),
            Err(error) if error.kind() == storage::ErrorKind::NotFound => Ok(false),
            Err(error) => Err(Error::from(error).in_block(block)),
        }
    }

    /// Lists the blocks whose files are in the layer's own folder. What is no block's name is passed over.
    pub(crate) fn listed(layer: &Layer, storage: &Arc<dyn Storage>) -> Result<HashSet<BlockIndex>> {
        let number = |name: &str| name.parse::<u32>().ok().filter(|number| number.to_string() == name);
        let blocks = layer.data.join("blocks")?;
        let folders = match storage.list(&blocks) {
            // XO makes the folder with the first block.
            Err(error) if error.kind() == storage::ErrorKind::NotFound => Vec::new(),
            other => other?,
        };
        let mut found = HashSet::new();
        for folder in folders.iter().filter(|folder| folder.is_directory) {
            let Some(thousands) = number(&folder.name) else { continue };
            for file in storage.list(&blocks.join(&folder.name)?)? {
                let rest = number(&file.name).filter(|rest| *rest < 1000);
                let block = rest.and_then(|rest| thousands.checked_mul(1000)?.checked_add(rest));
                found.extend(block.map(BlockIndex));
            }
        }
        Ok(found)
    }

    /// Opens the file of an uncompressed, unencrypted block, and checks its length.
    pub(crate) fn open_block(
        layer: &Layer,
        moving: Option<&Moving>,
        storage: &Arc<dyn Storage>,
        block: BlockIndex,
    ) -> Result<BlockFile> {
        let file = find(layer, moving, storage, block, |path| {
            let object = storage.open(path)?;
            let len = object.stat()?.size;
            Ok(BlockFile { object, len })
        })?;
        let expected = layer.block_size.full_bytes() as u64;
        if file.len != expected {
            let reason = format!("a file of {expected} bytes was expected, {} were found", file.len);
            return Err(layer.block_error(ErrorKind::Damaged, block, &reason));
        }
        Ok(file)
    }

    /// Reads and decodes a whole block, sector bitmap included, for `cache`.
    pub(crate) fn load_block(
        &self,
        cache: &BlockCache,
        layer: &Layer,
        moving: Option<&Moving>,
        storage: &Arc<dyn Storage>,
        block: BlockIndex,
    ) -> Result<Arc<Memory>> {
        let len = layer.block_size.full_bytes();
        // No filter makes a block much larger than it is.
        let limit = len as u64 + len as u64 / 8 + SMALL_FILE;
        let stored = find(layer, moving, storage, block, |path| storage.read(path, limit))?;
        let in_block = |error: FormatError| layer.block_error(error.kind, block, &error.reason);
        let mut bytes = cache.memory(len);
        let out = Arc::get_mut(&mut bytes).expect("nobody else has it");
        self.filter.decode_exact(&stored, out).map_err(in_block)?;
        Ok(bytes)
    }
}

/// Finds a block where it is: in its layer, or, during a merge, in the layer that takes its blocks.
///
/// First the child, then the parent: a rename is one act, so a block that is gone from the child has arrived.
fn find<T>(
    layer: &Layer,
    moving: Option<&Moving>,
    storage: &Arc<dyn Storage>,
    block: BlockIndex,
    get: impl Fn(&ObjectPath) -> storage::Result<T>,
) -> Result<T> {
    let missing = |error: storage::Error| match error.kind() {
        storage::ErrorKind::NotFound => {
            layer.block_error(ErrorKind::Missing, block, "its file is missing, though the table lists it")
        }
        _ => Error::from(error).in_block(block),
    };
    let own = match get(&Exploded::block_path(&layer.data, block)?) {
        Err(error) if error.kind() == storage::ErrorKind::NotFound => error,
        other => return other.map_err(missing),
    };
    let Some(moving) = moving else { return Err(missing(own)) };
    if !moving.was_complete && is_lost(layer, &moving.into, storage, block)? {
        let reason = "its file is missing, and the merge under way did not move it: it was lost before";
        return Err(layer.block_error(ErrorKind::Missing, block, reason));
    }
    get(&Exploded::block_path(&moving.into.data, block)?).map_err(missing)
}

/// Tells a block that was lost before a merge from one that the merge moved into `into`.
///
/// A moved file keeps the time at which the child's backup wrote it, which is after the parent's footer was written.
/// So a file of the parent that is not newer than the parent's footer, while the child's footer is, is the parent's
/// own old block. Times are those at open, before the merge rewrites the parent's footer.
pub(crate) fn is_lost(layer: &Layer, into: &Layer, storage: &Arc<dyn Storage>, block: BlockIndex) -> Result<bool> {
    if layer.footer_modified <= into.footer_modified {
        return Ok(false);
    }
    match storage.stat(&Exploded::block_path(&into.data, block)?) {
        Ok(stat) => Ok(stat.modified <= into.footer_modified),
        Err(error) if error.kind() == storage::ErrorKind::NotFound => Ok(true),
        Err(error) => Err(error.into()),
    }
}

fn read_small<const N: usize>(storage: &Arc<dyn Storage>, path: &ObjectPath, filter: Filter) -> Result<[u8; N]> {
    let stored = storage.read(path, SMALL_FILE)?;
    let mut bytes = [0; N];
    filter.decode_exact(&stored, &mut bytes).map_err(|error| error.at(path))?;
    Ok(bytes)
}
