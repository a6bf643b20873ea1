//! A backup becomes a VM of a pool, or a disk of one.
//!
//! ```text
//! document ─► plan ─┬► networks, places, lineage (pure, but for what they ask)     what will be made, and why: --explain
//! target (the pool) ┘
//!   plan ─► run ─┬► records      what the pool is told to make
//!                ├► parts        what a VM has beside its disks
//!                ├► transfer     the bytes, and back ─► digests
//!                └► made         marked until it is whole; undone whatever ends it ─► journal
//! ```
//!
//! Invariant: what is not whole has an entry in its `other_config` that names the run, and cannot be started; what can be is never undone.
//! So whoever comes after a run that died knows what of it to remove, and nobody takes half a VM for a whole one.

mod digests;
pub(super) mod document;
mod lineage;
pub(super) mod made;
pub(super) mod networks;
pub(super) mod parts;
pub(super) mod places;
mod plan;
pub(super) mod records;
mod run;
pub(super) mod target;
pub(super) mod transfer;

pub use lineage::Base;
pub use made::{undo, undo_import};
pub use networks::{Interface, Macs, Network, Wish};
pub use places::Room;
pub use plan::{Archive, Machine, Options, Plan, PlannedDisk, Planner, What, room};
pub use run::{Restored, RestoredDisk, Run};
pub use target::Target;
