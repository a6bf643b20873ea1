//! Writes VHDs of every kind into a storage, as XO does.

use std::io::Write;
use std::sync::Arc;

use storage::{Capabilities, Entry, MemoryStorage, Object, ObjectPath, Stat, Storage};
use uuid::Uuid;
use vhd::{BlockCache, BlockSize, ChainDisk, Chs, Context, DiskType, Footer, Header, ParentLocator};

/// Bytes of a block.
pub const BLOCK: usize = 4096;
/// Bytes of a sector.
pub const SECTOR: usize = 512;

/// How a layer of a test is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Flat,
    Plain,
    Gzip,
    Brotli,
}

/// A layer to be written: its virtual size and the blocks it holds.
pub struct Image {
    pub kind: Kind,
    pub uuid: Uuid,
    pub parent: Option<(Uuid, String)>,
    pub size: u64,
    pub block: usize,
    pub blocks: Vec<(u32, Vec<u8>)>,
}

impl Image {
    pub fn new(number: u128, size: u64, blocks: &[(u32, u8)]) -> Self {
        let blocks = blocks.iter().map(|(index, byte)| (*index, vec![*byte; BLOCK])).collect();
        Self { kind: Kind::Flat, uuid: id(number), parent: None, size, block: BLOCK, blocks }
    }

    pub fn child_of(mut self, parent: u128, name: &str) -> Self {
        self.parent = Some((id(parent), name.to_owned()));
        self
    }

    pub fn stored(mut self, kind: Kind) -> Self {
        self.kind = kind;
        self
    }

    pub fn footer(&self) -> [u8; 512] {
        let disk_type = if self.parent.is_some() { DiskType::Differencing } else { DiskType::Dynamic };
        Footer {
            features: 2,
            data_offset: 512,
            timestamp: 0,
            creator: *b"xo  ",
            creator_version: 0,
            creator_host_os: *b"Wi2k",
            original_size: self.size,
            current_size: self.size,
            chs: Chs::of_size(self.size),
            disk_type,
            uuid: self.uuid,
        }
        .to_bytes()
    }

    pub fn header(&self) -> [u8; 1024] {
        let entries = self.size.div_ceil(self.block as u64);
        Header {
            table_offset: 1536,
            max_table_entries: u32::try_from(entries).unwrap(),
            block_size: BlockSize::new(u32::try_from(self.block).unwrap()).unwrap(),
            parent_uuid: self.parent.as_ref().map(|(uuid, _)| *uuid),
            parent_timestamp: 0,
            parent_name: self.parent.as_ref().map(|(_, name)| name.clone()).unwrap_or_default(),
            locators: [ParentLocator { platform_code: [0; 4], space: 0, length: 0, offset: 0 }; 8],
        }
        .to_bytes()
    }

    pub fn bitmap(&self) -> Vec<u8> {
        vec![0xff; (self.block / SECTOR).div_ceil(8).next_multiple_of(SECTOR)]
    }

    /// The bytes of a VHD file; its blocks stand in the order given.
    pub fn flat(&self) -> Vec<u8> {
        let entries = usize::try_from(self.size.div_ceil(self.block as u64)).unwrap();
        let table_len = (entries * 4).next_multiple_of(SECTOR);
        let mut table = vec![0xff; table_len];
        let mut data = Vec::new();
        for (index, bytes) in &self.blocks {
            let sector = u32::try_from((1536 + table_len + data.len()) / SECTOR).unwrap();
            table[*index as usize * 4..][..4].copy_from_slice(&sector.to_be_bytes());
            data.extend(self.bitmap());
            data.extend(bytes);
        }
        [&self.footer()[..], &self.header(), &table, &data, &self.footer()].concat()
    }

    pub fn filtered(&self, bytes: &[u8]) -> Vec<u8> {
        match self.kind {
            Kind::Flat | Kind::Plain => bytes.to_vec(),
            Kind::Gzip => gzip(bytes),
            Kind::Brotli => {
                let mut out = Vec::new();
                let mut writer = brotli::CompressorWriter::new(&mut out, 1 << 16, 0, 22);
                writer.write_all(bytes).unwrap();
                drop(writer);
                out
            }
        }
    }

    /// Writes it as `name`, behind an alias if it is exploded.
    pub fn put(&self, storage: &MemoryStorage, name: &str) {
        if self.kind == Kind::Flat {
            return storage.put(&format!("{name}.vhd"), self.flat()).unwrap();
        }
        let folder = format!("data/{name}.vhd");
        let filters = match self.kind {
            Kind::Gzip => Some("[\"gzip\"]"),
            Kind::Brotli => Some("[\"brotli\"]"),
            _ => None,
        };
        if let Some(filters) = filters {
            storage.put(&format!("{folder}/chunk-filters.json"), filters).unwrap();
        }
        // XO's order, and its table: a byte per block, of which a bit per block is used.
        let mut table = vec![0; usize::try_from(self.size.div_ceil(self.block as u64)).unwrap()];
        for (index, bytes) in &self.blocks {
            table[*index as usize / 8] |= 0x80 >> (index % 8);
            let block = [self.bitmap(), bytes.clone()].concat();
            let path = format!("{folder}/blocks/{}/{}", index / 1000, index % 1000);
            storage.put(&path, self.filtered(&block)).unwrap();
        }
        storage.put(&format!("{folder}/footer"), self.filtered(&self.footer())).unwrap();
        storage.put(&format!("{folder}/header"), self.filtered(&self.header())).unwrap();
        storage.put(&format!("{folder}/bat"), self.filtered(&table)).unwrap();
        storage.put(&format!("{name}.alias.vhd"), folder).unwrap();
    }
}

pub fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut writer = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    writer.write_all(bytes).unwrap();
    writer.finish().unwrap()
}

pub fn id(number: u128) -> Uuid {
    Uuid::from_u128(0x1111_1111_1111_4111_8111_1111_0000_0000 + number)
}

pub fn context(storage: &Arc<MemoryStorage>) -> Context {
    Context { storage: storage.clone(), cache: BlockCache::new(1 << 20) }
}

pub fn open(storage: &Arc<MemoryStorage>, name: &str) -> vhd::Result<ChainDisk> {
    vhd::open(&context(storage), &ObjectPath::new(name).unwrap(), None)
}

/// A storage that is reached over a network.
pub struct Remote(pub Arc<dyn Storage>);

impl Storage for Remote {
    fn open(&self, path: &ObjectPath) -> storage::Result<Arc<dyn Object>> {
        self.0.open(path)
    }

    fn read(&self, path: &ObjectPath, limit: u64) -> storage::Result<Vec<u8>> {
        self.0.read(path, limit)
    }

    fn list(&self, path: &ObjectPath) -> storage::Result<Vec<Entry>> {
        self.0.list(path)
    }

    fn stat(&self, path: &ObjectPath) -> storage::Result<Stat> {
        self.0.stat(path)
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities { is_remote: true, ..self.0.capabilities() }
    }

    fn describe(&self) -> String {
        self.0.describe()
    }
}
