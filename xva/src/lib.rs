//! The disks of an uncompressed XVA, each readable at any offset.
//!
//! ```text
//! Xva ─ open: ova.xml, and nothing past it
//!   ├─ ova        ova.xml → the disks: references, sizes, names
//!   ├─ tar        one 512-byte header → name, size
//!   ├─ regular    a chunk of the last disk by bisection, where it is proven that every header stands at a known place
//!   └─ walk       a chunk by following the headers from the first on, in steps of 1 MiB; also the index of holes
//! ```
//!
//! An XVA is a tar: `ova.xml`, then for each disk its chunks `Ref:N/00000000`, each followed by its checksum
//! (`.xxhash`, `.checksum` in older versions). It never hears of backups, and it does not decompress disks: of a compressed
//! XVA only its `ova.xml` is decoded, by [`describe`].
//! Source: xen-api `ocaml/xapi/stream_vdi.ml`, Xen Orchestra `@xen-orchestra/xva`.

mod archive;
mod compressed;
mod error;
mod ova;
mod regular;
mod tar;
mod walk;

pub use archive::{Compression, Xva, compression};
pub use compressed::describe;
pub use error::{Error, ErrorKind, Result};
pub use ova::XvaDisk;
