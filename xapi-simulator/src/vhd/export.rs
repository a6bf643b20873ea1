//! What `GET /export_raw_vdi/?format=vhd` sends.
//!
//! ```text
//!   0      512     1536   2048
//!   footer  header  zeros  table, padded   block: 512 bytes FF, 2 MiB   ...   footer
//! ```
//!
//! Blocks come complete and by their index. All of a disk has the blocks that are present in any of its layers; what
//! changed since a base has those present in a layer that only one of both chains has. Both may hold blocks of zeroes.
//! Source: xen-api `ocaml/libs/vhd/vhd_format/f.ml`.

use std::collections::BTreeSet;
use std::io::{self, Write};

use uuid::Uuid;

use super::structures::{ABSENT, FOOTER_BYTES, Footer, Header, Locator, Parent, STORED_BLOCK_BYTES};
use super::structures::{entries, table_bytes};
use crate::content::{Content, rounded_size};
use crate::layer::BLOCK_BYTES;
use crate::random::fresh_uuid;
use crate::transfer::{Hook, Piece};

/// Where the table stands; between it and the header is one sector, where the name of the parent would be.
const TABLE_OFFSET: u64 = 2048;

/// The disk that the other side has already.
#[derive(Debug, Clone, Copy)]
pub struct Base<'a> {
    /// What it holds.
    pub content: &'a Content,
    /// The path of its VHD file on the host.
    pub path: &'a str,
}

/// A disk about to be sent.
#[derive(Debug)]
pub struct Export<'a> {
    content: &'a Content,
    blocks: Vec<u32>,
    footer: Footer,
    header: Header,
}

impl<'a> Export<'a> {
    /// Finds the blocks to be sent, of all of a disk or of what changed since a base.
    pub fn new(content: &'a Content, base: Option<Base<'_>>) -> Self {
        let blocks = match base {
            None => content.present(),
            Some(base) => changed(base.content, content),
        };
        let size = rounded_size(content.size());
        let footer = Footer {
            creator: (*b"caml", 1),
            timestamp: 0,
            size,
            is_differencing: base.is_some(),
            uuid: fresh_uuid(),
            is_hidden: false,
        };
        let parent = base.map(|base| Parent {
            uuid: base.content.leaf().file_uuid(),
            timestamp: 0,
            name: base.path.to_owned(),
            locators: vec![Locator {
                platform: *b"MacX",
                space: 1,
                length: u32::try_from("file://".len() + base.path.len()).unwrap_or(u32::MAX),
                offset: TABLE_OFFSET - FOOTER_BYTES as u64,
            }],
        });
        Self { content, blocks, footer, header: Header { table_offset: TABLE_OFFSET, entries: entries(size), parent } }
    }

    /// Returns the blocks of 2 MiB that are sent, ascending.
    pub fn blocks(&self) -> &[u32] {
        &self.blocks
    }

    /// Returns the uuid in the footer, another one at each export.
    pub fn uuid(&self) -> Uuid {
        self.footer.uuid
    }

    /// Returns the length of the whole stream in bytes.
    pub fn length(&self) -> u64 {
        self.data_offset() + self.blocks.len() as u64 * STORED_BLOCK_BYTES + FOOTER_BYTES as u64
    }

    fn data_offset(&self) -> u64 {
        TABLE_OFFSET + self.header.table_bytes()
    }

    /// Sends all; `hook` is called before each block.
    ///
    /// # Errors
    /// Of `to` and of `hook`.
    pub fn send(&self, to: &mut dyn Write, hook: Hook<'_>) -> io::Result<()> {
        let footer = self.footer.bytes();
        to.write_all(&footer)?;
        to.write_all(&self.header.bytes())?;
        to.write_all(&[0; FOOTER_BYTES])?;
        let mut table = vec![ABSENT; usize::try_from(self.header.entries).map_err(io::Error::other)?];
        let mut done = self.data_offset();
        for block in &self.blocks {
            let index = usize::try_from(*block).map_err(io::Error::other)?;
            table[index] = u32::try_from(done / FOOTER_BYTES as u64).map_err(io::Error::other)?;
            done += STORED_BLOCK_BYTES;
        }
        to.write_all(&table_bytes(&table))?;
        done = self.data_offset();
        let mut stored = vec![0xFF; usize::try_from(STORED_BLOCK_BYTES).map_err(io::Error::other)?];
        for (number, block) in (0..).zip(&self.blocks) {
            let offset = u64::from(*block) * BLOCK_BYTES;
            hook(&Piece { number, offset, length: BLOCK_BYTES, done, total: Some(self.length()) })?;
            let data = &mut stored[FOOTER_BYTES..];
            let on_disk = usize::try_from(self.content.size().saturating_sub(offset).min(BLOCK_BYTES));
            let (inside, past) = data.split_at_mut(on_disk.map_err(io::Error::other)?);
            self.content.read(offset, inside).map_err(io::Error::other)?;
            past.fill(0);
            to.write_all(&stored)?;
            done += STORED_BLOCK_BYTES;
        }
        to.write_all(&footer)
    }
}

/// Returns the blocks that are present in a layer which only one of both disks has, as far as `to` reaches.
pub fn changed(from: &Content, to: &Content) -> Vec<u32> {
    let names = |content: &Content| content.layers().iter().map(|layer| layer.uuid()).collect::<BTreeSet<_>>();
    let (of_from, of_to) = (names(from), names(to));
    let end = entries(to.size());
    let blocks: BTreeSet<u32> = from
        .layers()
        .iter()
        .chain(to.layers())
        .filter(|layer| of_from.contains(&layer.uuid()) != of_to.contains(&layer.uuid()))
        .flat_map(|layer| layer.blocks().map(|(index, _)| index))
        .filter(|index| *index < end)
        .collect();
    blocks.into_iter().collect()
}
