//! VHD files, exploded VHDs, aliases and the chains they form, read as disks; and new layers, written.
//!
//! ```text
//! open ─► disk (ChainDisk: table, reading, checking) ─► chain (names, merges, links) ─► layer ─► flat │ exploded
//! by_name (when a disk without a backup has ended)            difference (what two disks may differ in, by their tables)
//! Merge (fewer images, the same disk)                  links (what an image says of itself)
//! create_layer ─► block_sink ─► flat_writer │ exploded_writer, then alias_writer     new_layer (what is to be written)
//! digests (what blocks hold, known without reading them), digest
//! StreamReader (a VHD as it comes over a connection)  ► stream_error
//! VhdView (a disk as one VHD file), StreamWriter (the same, block by block) ► file_layout
//! cache (blocks in memory), workers (that fill it ahead)
//! at_once (images of a server are opened several at a time)
//! footer · header · merge_state · alias · locator · filter · geometry          bytes in, value out
//! ```
//!
//! It never hears of VMs or backups.

mod alias;
mod alias_writer;
mod at_once;
mod block_sink;
mod by_name;
mod cache;
mod chain;
mod chain_disk;
mod difference;
mod digest;
mod digests;
mod error;
mod exploded;
mod exploded_writer;
mod file_layout;
mod filter;
mod flat;
mod flat_writer;
mod footer;
mod geometry;
mod header;
mod layer;
mod links;
mod locator;
mod memory;
mod merge;
mod merge_state;
mod new_layer;
mod stream;
mod stream_error;
mod stream_writer;
mod view;
mod whole_block;
mod workers;

pub use alias::is_alias;
pub use alias_writer::write_alias;
pub use block_sink::{BlockSink, Written, create_layer};
pub use cache::BlockCache;
pub use chain_disk::{ChainDisk, Context, LayerInfo, Leaf, Liveness, open};
pub use digest::Digest;
pub use digests::{ChainDigests, DIGESTS, Unread, digests_name};
pub use error::{Error, ErrorKind, FormatError, Result};
pub use file_layout::FileLayout;
pub use filter::Filter;
pub use footer::{DiskType, Footer};
pub use geometry::{BlockIndex, BlockSize, BlockSpan, Chs, FileSector, SECTOR};
pub use header::{Header, ParentLocator};
pub use layer::Format;
pub use links::{Links, data_path};
pub use merge::{Control, ImageSummary, Lineage, Merge, Outcome, remove_image};
pub use new_layer::{EncodedBlock, NewLayer, equivalent_size};
pub use stream::StreamReader;
pub use stream_error::{StreamError, StreamErrorKind};
pub use stream_writer::StreamWriter;
pub use view::VhdView;
pub use whole_block::{BlockMemory, WholeBlock};
