//! Disks as VHD streams, out and in, with the bytes a pool's own programs write and the rules they read by.
//!
//! - `structures`: footer, header and table as bytes
//! - `export`: what `GET /export_raw_vdi/?format=vhd` sends
//! - `import`: what `PUT /import_raw_vdi/?format=vhd` takes

mod export;
mod import;
pub(crate) mod structures;

pub use export::{Base, Export, changed};
pub use import::{ImportError, Sink, import};
pub use structures::Fault;
