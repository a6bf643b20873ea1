//! XVA archives: a VM as a tar, out and in.
//!
//! ```text
//!   ova.xml                    the records of the VM and of all that belongs to it
//!   Ref:4/00000000             1 MiB of a disk        Ref:4/00000000.xxhash    its XXH64 in hexadecimal
//!   Ref:4/00000001             ...                    pieces of zeroes are left out but for the first and the last
//!   Ref:40/00000000            folders come in lexicographic order
//! ```
//!
//! A number that is left out is a piece of zeroes. But a server that was silent for long writes an empty piece, which takes
//! a number and no place: who reads must count what was read. Source: xen-api `ocaml/xapi/stream_vdi.ml`, `export.ml`.
//!
//! - `export` and `import`
//! - [`ova`]: `ova.xml` from and to records as JSON
//! - `tar`, `zstd`: the containers

mod export;
mod import;
pub mod ova;
mod tar;
mod zstd;

pub use export::{Compression, Disk, Export, Options};
pub use import::{ArchiveError, Import};

use std::hash::Hasher as _;

use twox_hash::XxHash64;

/// The first entry.
const OVA: &str = "ova.xml";
/// Bytes of a disk in a piece.
const PIECE_BYTES: usize = 1 << 20;

/// Returns the checksum of a piece as it stands in an archive.
fn xxhash(bytes: &[u8]) -> String {
    let mut hash = XxHash64::with_seed(0);
    hash.write(bytes);
    format!("{:016X}", hash.finish())
}
