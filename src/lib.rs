//! xofs: backup repositories of Xen Orchestra, mounted: every disk of every backup as a file, and the files in them.
//!
//! ```text
//! cli ─┬► mount ──► tree ─┬► worker ──► guest
//!      │                  ├► repository ──► vhd, xva, storage, disk
//!      ├► doctor ─► ingest (nbd), merge ──┤
//!      └► pool, job ─► ingest, xapi ──────┘      ahead: disks read by several threads, in order
//!                                           probe: where time goes; size: sizes as people write them
//! ```
//!
//! Each module uses only those to its right.

// They end the program where nothing can be written: `cli::print` and `cli::say` are for that.
#![cfg_attr(not(test), warn(clippy::print_stdout, clippy::print_stderr))]

mod ahead;
pub mod cli;
pub mod doctor;
pub mod ingest;
pub mod job;
pub mod merge;
pub mod mount;
pub mod pool;
pub mod probe;
pub mod repository;
mod size;
pub mod tree;
mod whole;
pub mod worker;
