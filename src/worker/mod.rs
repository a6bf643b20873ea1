//! Guests' disks, read behind a wall: by a process that can do nothing but that.
//!
//! ```text
//! tree ─► Volume ─► Workers (not more than so many) ─► process ══ socket ══► serve ─► guest
//!           │  check: what is believed                        ◄═ bytes ═══   (sandbox: no files, no network, no rights)
//!           └─► extents; the bytes of a file are read by the mount itself
//! ```
//!
//! Who administers a guest controls every byte of its disks, and readers of filesystems are long. So they run in a process of
//! their own, which gets what it asks for of the volume's bytes and says names, attributes and where bytes lie. One that dies,
//! computes for ever or takes all memory costs an error for that request; the next is answered by another.

mod check;
mod error;
mod inherited;
mod judge;
#[cfg(test)]
pub(crate) mod liars;
mod pool;
mod process;
mod protocol;
mod remote;
mod sandbox;
mod serve;
#[cfg(test)]
mod tests;
mod volume;

pub use error::{Error, Result};
pub use judge::judge;
pub use pool::{WORKERS, Workers};
pub use process::Patience;
pub use serve::run;
pub use volume::{Listed, Volume};

/// What the program is given as its only argument to be a worker.
pub const ARGUMENT: &str = "--guest-worker";
