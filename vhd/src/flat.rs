//! A VHD file: fixed, dynamic or differencing.
//!
//! ```text
//! dynamic, differencing   footer copy (512) │ header (1024) │ ... BAT ... blocks, in any order ... │ footer (512)
//! fixed                   the disk's bytes                                                          │ footer (512)
//! block                   sector bitmap, rounded up to sectors │ block_size bytes
//! ```
//!
//! While it is read, a merge may append blocks, move the first ones to the end, and rewrite footer and table. So what
//! was read is believed only after [`Flat::verify`].

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use storage::{Object, ObjectPath, Stat};

use crate::cache::BlockCache;
use crate::error::{Error, ErrorKind, Result};
use crate::footer::{DiskType, FOOTER_BYTES, Footer};
use crate::geometry::{BlockIndex, BlockSize, FileSector, SECTOR};
use crate::header::{HEADER_BYTES, Header};
use crate::layer::{BlockMap, Body, Layer, Outcome};

/// The first bytes of a dynamic disk: footer copy and header.
const HEAD_BYTES: usize = FOOTER_BYTES + HEADER_BYTES;

/// A file written less than this before it was opened may change again without its time changing: no clock of a
/// file system is coarser (FAT's 2 s).
const CLOCK_GRAIN: Duration = Duration::from_secs(2);

/// Whether what was asked just now would show by its times that it changed later.
pub(crate) fn is_settled(now: &Stat) -> bool {
    let last = now.modified.max(now.changed);
    SystemTime::now().duration_since(last).is_ok_and(|age| age > CLOCK_GRAIN)
}

pub(crate) struct Flat {
    object: Arc<dyn Object>,
    at_open: Stat,
    /// Whether unchanged times prove an unchanged file.
    is_settled: bool,
    /// Whether the footer at the end was believed: always in a fixed disk, else if the copy at the start is damaged.
    is_footer_last: bool,
}

impl Flat {
    pub(crate) fn open(
        object: Arc<dyn Object>,
        cache: &BlockCache,
        name: &ObjectPath,
        data: &ObjectPath,
    ) -> Result<Layer> {
        let at_open = object.stat()?;
        let is_settled = is_settled(&at_open);
        let mut head = [0; HEAD_BYTES];
        let head_len = object.read_at(0, &mut head)?;
        let tail = at_open.size.checked_sub(FOOTER_BYTES as u64).map(|at| read_footer(&*object, at)).transpose()?;
        let leading = first_chunk(&head).map(Footer::parse);
        let (footer, is_footer_last) = match (leading, tail.flatten().map(|bytes| Footer::parse(&bytes))) {
            // The leading copy first: the one at the end is missing in the middle of a merge.
            (Some(Ok(footer)), _) if footer.disk_type != DiskType::Fixed => (footer, false),
            (_, Some(Ok(footer))) => (footer, true),
            (_, Some(Err(error))) => return Err(error.at(data)),
            _ => return Err(Error::new(ErrorKind::Damaged, data, "a VHD footer was expected, the file is too short")),
        };
        let header = match footer.disk_type {
            DiskType::Fixed => {
                if at_open.size.saturating_sub(FOOTER_BYTES as u64) < footer.virtual_size() {
                    let reason =
                        format!("{} bytes and a footer were expected, the file is cut off", footer.virtual_size());
                    return Err(Error::new(ErrorKind::Damaged, data, reason));
                }
                None
            }
            DiskType::Dynamic | DiskType::Differencing => {
                Some(read_header(&*object, &head[..head_len], footer.data_offset, data)?)
            }
        };
        let body = Body::Flat(Self { object, at_open, is_settled, is_footer_last });
        Layer::new(cache, (name, data), &at_open, footer, header, body)
    }

    /// Returns the open file, for what else it holds (parent locators).
    pub(crate) fn object(&self) -> &dyn Object {
        &*self.object
    }

    /// Returns how many bytes the file had when it was opened.
    pub(crate) fn size(&self) -> u64 {
        self.at_open.size
    }

    /// Returns whether the footer at the end was believed.
    pub(crate) fn is_footer_last(&self) -> bool {
        self.is_footer_last
    }

    /// Reads the block allocation table, and refuses one whose blocks overlap each other or the structures.
    pub(crate) fn map(&self, layer: &Layer) -> Result<BlockMap> {
        let Some(header) = &layer.header else { return Ok(BlockMap::All) };
        let damaged = |reason: String| Error::new(ErrorKind::Damaged, &layer.data, reason);
        let count = layer.block_count();
        if count > u64::from(header.max_table_entries) {
            let have = header.max_table_entries;
            return Err(damaged(format!("a table of at least {count} blocks was expected, the header says {have}")));
        }
        let table_end = header.table_offset.saturating_add(count * 4);
        // The file may have grown since it was opened.
        if table_end > self.at_open.size && table_end > self.object.stat()?.size {
            return Err(damaged(format!("its block table lies at {}, outside the file", header.table_offset)));
        }
        let bytes = usize::try_from(count * 4).map_err(|_| damaged("its block table does not fit memory".into()))?;
        let mut table = vec![0; bytes];
        if self.object.read_at(header.table_offset, &mut table)? != bytes {
            return Err(damaged("its block table is cut off".into()));
        }
        let sectors: Vec<u32> =
            table.chunks_exact(4).map(|entry| u32::from_be_bytes([entry[0], entry[1], entry[2], entry[3]])).collect();
        check_overlap(&sectors, table_end, layer.block_size).map_err(damaged)?;
        Ok(BlockMap::Sectors(sectors))
    }

    /// Fills `buffer` with the bytes at `skip` of a block whose bitmap is at `sector` (fixed disk: not looked at).
    pub(crate) fn read(
        &self,
        layer: &Layer,
        block: BlockIndex,
        sector: FileSector,
        skip: usize,
        buffer: &mut [u8],
    ) -> Result<()> {
        let start = match layer.header {
            None => u64::from(block.0) * layer.block_size.bytes(),
            Some(_) => sector.bytes() + layer.block_size.bitmap_bytes() as u64,
        };
        self.read_exact(layer, block, start + skip as u64, buffer)
    }

    /// Reads the sector bitmap of a block.
    pub(crate) fn bitmap(&self, layer: &Layer, block: BlockIndex, sector: FileSector) -> Result<Vec<u8>> {
        let mut bitmap = vec![0; layer.block_size.bitmap_bytes()];
        self.read_exact(layer, block, sector.bytes(), &mut bitmap)?;
        Ok(bitmap)
    }

    fn read_exact(&self, layer: &Layer, block: BlockIndex, at: u64, buffer: &mut [u8]) -> Result<()> {
        if self.object.read_at(at, buffer)? == buffer.len() {
            Ok(())
        } else {
            Err(layer.block_error(ErrorKind::Damaged, block, "it lies past the end of the file, which is cut off"))
        }
    }

    /// Returns whether its bytes and its names are those it had when it was opened.
    pub(crate) fn is_untouched(&self) -> Result<bool> {
        Ok(self.proves_untouched(self.object.stat()?))
    }

    fn proves_untouched(&self, now: Stat) -> bool {
        self.is_settled && now == self.at_open
    }

    /// Returns what is known of bytes read before this call from `block` at `sector`.
    ///
    /// A merge copies a block to its new place, then changes its table entry, then reuses the old place. So bytes are
    /// right if the file was not touched since it was opened, or if its footer still is this disk's and the entry of
    /// the block still is the one that was used.
    pub(crate) fn verify(&self, layer: &Layer, block: BlockIndex, sector: FileSector) -> Result<Outcome> {
        let now = self.object.stat()?;
        if self.proves_untouched(now) {
            return Ok(Outcome::Untouched);
        }
        let footer_at = if self.is_footer_last { now.size.saturating_sub(FOOTER_BYTES as u64) } else { 0 };
        let footer = read_footer(&*self.object, footer_at)?.and_then(|bytes| Footer::parse(&bytes).ok());
        if footer.is_none_or(|footer| footer.uuid != layer.footer.uuid) {
            return Ok(Outcome::Changed);
        }
        let Some(header) = &layer.header else { return Ok(Outcome::Right) };
        let mut entry = [0; 4];
        let at = header.table_offset + u64::from(block.0) * 4;
        let is_there = self.object.read_at(at, &mut entry)? == 4 && u32::from_be_bytes(entry) == sector.0;
        Ok(if is_there { Outcome::Right } else { Outcome::Changed })
    }
}

fn first_chunk(head: &[u8; HEAD_BYTES]) -> Option<&[u8; FOOTER_BYTES]> {
    head.first_chunk::<FOOTER_BYTES>()
}

fn read_footer(object: &dyn Object, at: u64) -> Result<Option<[u8; FOOTER_BYTES]>> {
    let mut bytes = [0; FOOTER_BYTES];
    Ok((object.read_at(at, &mut bytes)? == FOOTER_BYTES).then_some(bytes))
}

fn read_header(object: &dyn Object, head: &[u8], at: u64, data: &ObjectPath) -> Result<Header> {
    let mut bytes = [0; HEADER_BYTES];
    let usual = FOOTER_BYTES as u64;
    if at == usual && head.len() == HEAD_BYTES {
        bytes.copy_from_slice(&head[FOOTER_BYTES..]);
    } else if object.read_at(at, &mut bytes)? != HEADER_BYTES {
        return Err(Error::new(
            ErrorKind::Damaged,
            data,
            format!("a header was expected at {at}, the file ends before"),
        ));
    }
    Header::parse(&bytes).map_err(|error| error.at(data))
}

/// Refuses tables that give one byte of the file two meanings.
fn check_overlap(sectors: &[u32], table_end: u64, block_size: BlockSize) -> std::result::Result<(), String> {
    let step = block_size.full_bytes() as u64 / SECTOR;
    let mut used: Vec<u32> = sectors.iter().copied().filter(|sector| *sector != BlockMap::ABSENT).collect();
    used.sort_unstable();
    if let Some(first) = used.first().filter(|first| FileSector(**first).bytes() < table_end) {
        return Err(format!("a block lies at sector {first}, inside the header or the block table"));
    }
    match used.windows(2).find(|pair| u64::from(pair[1]) - u64::from(pair[0]) < step) {
        Some(pair) => Err(format!("the blocks at sectors {} and {} overlap", pair[0], pair[1])),
        None => Ok(()),
    }
}
