//! One VHD file, as blktap makes and writes it.
//!
//! ```text
//!   0       512     1536
//!   footer  header  table  header of the batmap  batmap  names of the parent  blocks ...  footer
//! ```
//!
//! Everything begins at a sector; the data of a block, which comes after its bitmap, at 4 KiB. Blocks lie in the order in
//! which they were first written. The batmap says of which blocks all sectors are present.
//! Source: blktap `vhd/lib/libvhd.c`, `drivers/block-vhd.c`.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use uuid::Uuid;

use crate::layer::{BLOCK_BYTES, Block, Layer, RUN_BYTES};
use crate::vhd::structures::{
    ABSENT, FOOTER_BYTES, Footer, HEADER_BYTES, Header, Locator, Parent, entries, table_bytes,
};

/// The program and its version, 1.3.
const CREATOR: ([u8; 4], u32) = (*b"tap\0", 0x0001_0003);
const TABLE_OFFSET: u64 = (FOOTER_BYTES + HEADER_BYTES) as u64;
const BATMAP_VERSION: u32 = 0x0001_0002;
/// Seconds from 1970 to 2000, when the time of VHDs begins.
const EPOCH: Duration = Duration::from_secs(946_684_800);
const SECTOR: u64 = 512;
/// Sectors of 4 KiB.
const PAGE_SECTORS: u64 = 8;

/// What a file says of its place among the others.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Facts {
    pub(super) parent: Option<Relation>,
    /// Whether it is a base copy.
    pub(super) is_hidden: bool,
}

/// What a file says of its parent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Relation {
    pub(super) uuid: Uuid,
    pub(super) timestamp: u32,
    /// The name of its file.
    pub(super) name: String,
}

/// A file, and what it holds.
#[derive(Debug)]
pub(super) struct VhdFile {
    path: PathBuf,
    layer: Arc<Layer>,
    facts: Facts,
    timestamp: u32,
    table: Vec<u32>,
    /// The sector behind all blocks.
    end: u64,
}

impl VhdFile {
    /// Makes the file of a layer, over one of the same name.
    pub(super) fn create(path: &Path, layer: Arc<Layer>, facts: Facts) -> io::Result<Self> {
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH + EPOCH).unwrap_or_default();
        let timestamp = u32::try_from(now.as_secs()).unwrap_or(u32::MAX);
        Self::write_new(path, layer, facts, timestamp)
    }

    fn write_new(path: &Path, layer: Arc<Layer>, facts: Facts, timestamp: u32) -> io::Result<Self> {
        let table = vec![ABSENT; usize::try_from(entries(layer.size())).map_err(io::Error::other)?];
        let mut new = Self { path: path.with_extension("new"), layer, facts, timestamp, table, end: 0 };
        new.end = new.names_offset() / SECTOR + new.names().len() as u64;
        let file = File::create(&new.path)?;
        let layer = new.layer.clone();
        new.write_blocks(&file, layer.blocks())?;
        new.write_head(&file)?;
        fs::rename(&new.path, path)?;
        path.clone_into(&mut new.path);
        Ok(new)
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    pub(super) fn timestamp(&self) -> u32 {
        self.timestamp
    }

    /// Returns the name without its folder.
    pub(super) fn name(&self) -> String {
        self.path.file_name().unwrap_or_default().to_string_lossy().into_owned()
    }

    pub(super) fn rename(&mut self, path: PathBuf) -> io::Result<()> {
        fs::rename(&self.path, &path)?;
        self.path = path;
        Ok(())
    }

    /// Writes the blocks that are not as they were; a layer that grew is written anew, since its table is longer.
    pub(super) fn update(&mut self, layer: &Arc<Layer>) -> io::Result<()> {
        let before = std::mem::replace(&mut self.layer, layer.clone());
        if Arc::ptr_eq(&before, layer) {
            return Ok(());
        }
        if before.size() != layer.size() {
            return self.rewrite();
        }
        let is_changed =
            |(index, block): &(u32, &Arc<Block>)| before.block(*index).is_none_or(|before| !Arc::ptr_eq(before, block));
        let file = OpenOptions::new().write(true).open(&self.path)?;
        self.write_blocks(&file, layer.blocks().filter(is_changed))?;
        self.write_table(&file)
    }

    /// Writes another parent, or that it is hidden now.
    pub(super) fn relate(&mut self, facts: Facts) -> io::Result<()> {
        let before = std::mem::replace(&mut self.facts, facts);
        if before == self.facts {
            return Ok(());
        }
        if before.parent.is_some() != self.facts.parent.is_some() {
            return self.rewrite();
        }
        self.write_head(&OpenOptions::new().write(true).open(&self.path)?)
    }

    fn rewrite(&mut self) -> io::Result<()> {
        *self = Self::write_new(&self.path, self.layer.clone(), self.facts.clone(), self.timestamp)?;
        Ok(())
    }

    fn write_blocks<'a>(&mut self, file: &File, blocks: impl Iterator<Item = (u32, &'a Arc<Block>)>) -> io::Result<()> {
        for (index, block) in blocks {
            let entry = &mut self.table[usize::try_from(index).map_err(io::Error::other)?];
            if *entry == ABSENT {
                let sector = (self.end + 1).next_multiple_of(PAGE_SECTORS) - 1;
                *entry = u32::try_from(sector).map_err(io::Error::other)?;
                self.end = sector + 1 + BLOCK_BYTES / SECTOR;
            }
            let offset = u64::from(*entry) * SECTOR;
            for (number, run) in (0_u64..).zip(block.runs()) {
                if run.present() != 0 {
                    let zeroes = [0; RUN_BYTES];
                    let at = offset + SECTOR + number * RUN_BYTES as u64;
                    file.write_all_at(run.data().unwrap_or(&zeroes), at)?;
                }
            }
            // The first sector is the most significant bit.
            let bitmap: Vec<u8> =
                block.runs().iter().flat_map(|run| run.present().reverse_bits().to_be_bytes()).collect();
            file.write_all_at(&bitmap, offset)?;
        }
        Ok(())
    }

    /// Writes all but the blocks.
    fn write_head(&self, file: &File) -> io::Result<()> {
        let parent = self.facts.parent.as_ref();
        let names = self.names();
        let locators = (0_u64..).zip(&names).map(|(position, (platform, name))| Locator {
            platform: *platform,
            space: u32::try_from(name.len().next_multiple_of(FOOTER_BYTES)).unwrap_or(u32::MAX),
            length: u32::try_from(name.len()).unwrap_or(u32::MAX),
            offset: self.names_offset() + position * SECTOR,
        });
        let parent = parent.map(|parent| Parent {
            uuid: parent.uuid,
            timestamp: parent.timestamp,
            name: parent.name.clone(),
            locators: locators.collect(),
        });
        for ((_, name), at) in names.iter().zip((self.names_offset()..).step_by(FOOTER_BYTES)) {
            let mut sector = [0; FOOTER_BYTES];
            sector[..name.len()].copy_from_slice(name);
            file.write_all_at(&sector, at)?;
        }
        let header = Header { table_offset: TABLE_OFFSET, entries: entries(self.layer.size()), parent };
        file.write_all_at(&header.bytes(), FOOTER_BYTES as u64)?;
        self.write_table(file)
    }

    /// Writes table, batmap and both footers.
    fn write_table(&self, file: &File) -> io::Result<()> {
        let table = table_bytes(&self.table);
        file.write_all_at(&table, TABLE_OFFSET)?;
        let batmap_offset = TABLE_OFFSET + table.len() as u64;
        let batmap = self.batmap();
        let mut header = Vec::from(b"tdbatmap");
        header.extend((batmap_offset + SECTOR).to_be_bytes());
        header.extend(u32::try_from(batmap.len() / FOOTER_BYTES).map_err(io::Error::other)?.to_be_bytes());
        header.extend(BATMAP_VERSION.to_be_bytes());
        let sum = batmap.iter().fold(0_u32, |sum, byte| sum.wrapping_add(u32::from(*byte)));
        header.extend((!sum).to_be_bytes());
        header.resize(FOOTER_BYTES, 0);
        file.write_all_at(&header, batmap_offset)?;
        file.write_all_at(&batmap, batmap_offset + SECTOR)?;
        let footer = Footer {
            creator: CREATOR,
            timestamp: self.timestamp,
            size: self.layer.size(),
            is_differencing: self.facts.parent.is_some(),
            uuid: self.layer.file_uuid(),
            is_hidden: self.facts.is_hidden,
        };
        let footer = footer.bytes();
        file.write_all_at(&footer, self.end * SECTOR)?;
        file.write_all_at(&footer, 0)
    }

    /// Returns one bit per block, the most significant first: whether all its sectors are present.
    fn batmap(&self) -> Vec<u8> {
        let mut map = vec![0; self.table.len().div_ceil(8).next_multiple_of(FOOTER_BYTES)];
        for (index, block) in self.layer.blocks() {
            let is_complete = block.runs().iter().all(|run| run.present() == u128::MAX);
            if let (true, Ok(index)) = (is_complete, usize::try_from(index)) {
                map[index / 8] |= 0x80 >> (index % 8);
            }
        }
        map
    }

    /// Returns where the names of the parent begin, in bytes.
    fn names_offset(&self) -> u64 {
        let batmap = self.table.len().div_ceil(8).next_multiple_of(FOOTER_BYTES);
        let table = (self.table.len() * 4).next_multiple_of(FOOTER_BYTES);
        TABLE_OFFSET + (table + FOOTER_BYTES + batmap) as u64
    }

    /// Returns the names of the parent, each of which takes a sector: for Macintosh, and twice for Windows.
    fn names(&self) -> Vec<([u8; 4], Vec<u8>)> {
        let Some(parent) = &self.facts.parent else { return Vec::new() };
        let windows: Vec<u8> = format!(".\\{}", parent.name).encode_utf16().flat_map(u16::to_le_bytes).collect();
        let unix = format!("file://./{}", parent.name).into_bytes();
        vec![(*b"MacX", unix), (*b"W2ku", windows.clone()), (*b"W2ru", windows)]
    }
}
