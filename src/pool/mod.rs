//! Work on pools: what is made in one, for how long, and what is left of it.
//!
//! ```text
//! session       an address and a certificate to a pool that is logged in to
//! survey        what a VM is just now                              ─► chain, room, keys
//! base, way     what each disk is read relative to, and how        ─► file_sr, nbd, whole
//! snapshot      announced, taken, kept or destroyed                ─► journal, keys
//! backup        all of it, for one VM, in order                    ─► records, explain
//! replica       a machine on an SR that takes what a backup reads   ─► journal, restore
//! restore       the other way: a backup becomes a VM or a disk      ─► journal, room
//! limits        how much is done at once, over all processes
//! sweep         what runs left that died                           ─► journal, snapshot
//! subjects      what stages of a transfer are of, as people call it
//! state         what is remembered between runs: known pools, journals, locks
//! ```
//!
//! Invariants: nothing is made in a pool that a journal did not announce; only what says to be ours is ever removed; the snapshot
//! that the next backup is relative to stays until another one is stored in each repository. This never prints.

mod backup;
mod base;
mod chain;
mod error;
mod explain;
mod file_sr;
mod journal;
mod keys;
mod limits;
mod nbd;
mod records;
mod replica;
pub mod restore;
mod room;
mod session;
mod snapshot;
mod state;
mod subjects;
mod survey;
mod sweep;
mod way;
mod whole;

use std::time::Duration;

pub use backup::{Done, Mode, Options, Run, USUAL_CONNECTIONS};
pub use base::Base;
pub use error::{Error, ErrorKind, Result};
pub use explain::{ExplainedDisk, ExplainedReplica, Explanation, Fate, Room};
pub use limits::Limits;
pub use replica::{MOST_KEPT as MOST_REPLICAS, SrAddress, USUAL_KEPT as USUAL_REPLICAS, Wish as ReplicaWish};
pub use session::{Login, Unknown, connect};
pub use state::State;
pub use survey::all as all_vms;
pub use way::Way;

/// How long what has to be undone may take, whatever ended a run.
const CLEANUP: Duration = Duration::from_secs(240);

/// Returns the token of what has to be undone, which no signal stops.
fn cleanup() -> xapi::Cancel {
    xapi::Cancel::within(CLEANUP)
}
