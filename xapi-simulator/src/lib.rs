//! A simulated pool: as restrictive as a real one, with faults on demand.
//!
//! What disks hold and how it travels:
//!
//! - [`content`]: a disk, a chain of [`layer`]s; [`coalesce`] merges them, [`cbt`] logs what was written
//! - [`guest`]: seeded writes to a disk, out of [`random`]
//! - [`vhd`] and [`raw`]: a disk as a stream, out and in
//! - [`file_sr`]: disks as VHD files in a folder
//! - [`archive`]: a VM as an XVA, out and in
//! - [`nbd`]: the server that disks are read from at random
//! - [`transfer`]: what a transfer tells on its way

pub mod archive;
pub mod cbt;
pub mod coalesce;
pub mod content;
pub mod file_sr;
pub mod guest;
pub mod layer;
pub mod nbd;
pub mod random;
pub mod raw;
pub mod transfer;
pub mod vhd;
