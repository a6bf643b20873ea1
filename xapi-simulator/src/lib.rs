//! A simulated pool: as restrictive as a real one, with faults on demand.
//!
//! What disks hold and how it travels:
//!
//! - [`content`]: a disk, a chain of [`layer`]s; [`coalesce`] merges them, [`cbt`] logs what was written
//! - [`guest`]: seeded writes to a disk, out of [`random`]
//! - [`transfer`]: what a transfer tells on its way

pub mod cbt;
pub mod coalesce;
pub mod content;
pub mod guest;
pub mod layer;
pub mod random;
pub mod transfer;
