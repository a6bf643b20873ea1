//! VHD files, exploded VHDs, aliases and the chains they form, read as disks.
//!
//! ```text
//! open ─► disk (ChainDisk: table, reading, checking) ─► chain (names, merges, links) ─► layer ─► flat │ exploded
//! by_name (when a disk without a backup has ended)
//! VhdView (a disk as one VHD file)                       cache (blocks in memory), workers (that fill it ahead)
//! footer · header · merge_state · alias · locator · filter · geometry          bytes in, value out
//! ```
//!
//! It never hears of VMs or backups.

mod alias;
mod by_name;
mod cache;
mod chain;
mod chain_disk;
mod error;
mod exploded;
mod filter;
mod flat;
mod footer;
mod geometry;
mod header;
mod layer;
mod locator;
mod memory;
mod merge_state;
mod view;
mod workers;

pub use alias::is_alias;
pub use cache::BlockCache;
pub use chain_disk::{ChainDisk, Context, LayerInfo, Leaf, Liveness, open};
pub use error::{Error, ErrorKind, FormatError, Result};
pub use filter::Filter;
pub use footer::{DiskType, Footer};
pub use geometry::{BlockIndex, BlockSize, BlockSpan, Chs, FileSector, SECTOR};
pub use header::{Header, ParentLocator};
pub use layer::Format;
pub use view::VhdView;
