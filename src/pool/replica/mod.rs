//! Replicas: machines on an SR, in this pool or another, that hold what the snapshots of a backup held, and cannot be started.
//!
//! ```text
//! marks        how they are known
//! found        what there is of one                            ─► what a disk is put on; whether anybody changed it
//! source       what it is made after
//! replication  one run: what an ingest asks of it              ─► machine; sending, archive: the bytes
//! settle       what was begun becomes whole, or goes           whoever ended it
//! ```
//!
//! Invariants: nothing of a whole state is written to, and none is destroyed before the next one is whole; nothing is destroyed that
//! does not say itself to be ours, by its own uuid; a machine that somebody started or changed is left to him.

mod archive;
mod found;
mod machine;
mod marks;
mod replication;
mod sending;
mod settle;
mod source;

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use xapi::record::Sr;
use xapi::{Pool, Record};

pub use marks::{Identity, Kind, REPLICATING, is_itself};
pub use replication::{Absent, Replication};
pub use settle::settle;
pub use source::Source;

use super::error::Result;
use super::journal::Journal;
use super::limits::{PoolId, Turns};
use super::restore::target::Target;

/// States that are kept of a machine on an SR, where nothing else is said: one that a run failed after is still an increment's base.
pub const USUAL_KEPT: u32 = 3;
/// Most of them: each is a snapshot, and a host reads through all of them.
pub const MOST_KEPT: u32 = 100;

/// A storage that replicas are kept on.
pub struct Place {
    /// As it was named.
    pub name: String,
    /// Its pool, whose token stops what waits.
    pub pool: Pool,
    /// The journal of what is made there.
    pub journal: Arc<Journal>,
    /// What the names of what is made begin with, until it is whole.
    pub mark: String,
    /// The storage.
    pub sr: Record<Sr>,
    /// How many states are kept of each machine and schedule, at least one.
    pub keep: usize,
    /// What the limits know its pool by.
    pub id: PoolId,
    /// The limits.
    pub turns: Turns,
}

/// An SR as a person names it: `SR`, or `POOL=SR` in another pool than that of the machines. Each is a name, or an address or a uuid; a
/// name of a pool has no `=`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SrAddress {
    /// The pool, if it is another.
    pub pool: Option<String>,
    /// The SR.
    pub sr: String,
}

impl FromStr for SrAddress {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        let (pool, sr) = text.split_once('=').map_or((None, text), |(pool, sr)| (Some(pool), sr));
        if sr.is_empty() || pool.is_some_and(str::is_empty) {
            return Err(format!("'{}' names no SR: SR or POOL=SR was expected", text.escape_debug()));
        }
        Ok(Self { pool: pool.map(str::to_owned), sr: sr.to_owned() })
    }
}

impl fmt::Display for SrAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let pool = self.pool.iter().flat_map(|pool| [pool.as_str(), "="]).collect::<String>();
        write!(f, "{pool}{}", self.sr)
    }
}

/// Where replicas are to be kept.
pub struct Wish {
    /// As it was named; holds no secret.
    pub name: String,
    /// The pool, if it is another than that of the machines; or why it cannot be used.
    pub pool: Option<Result<Pool>>,
    /// The SR: its name or uuid.
    pub sr: String,
}

impl Place {
    /// Finds the storage that is meant, by its name or uuid.
    ///
    /// # Errors
    /// [`super::ErrorKind::Usage`] if there is none; what the pool says.
    pub fn storage(pool: &Pool, sr: &str) -> Result<Record<Sr>> {
        Ok(Target::of(pool)?.storage(Some(sr))?.clone())
    }
}

/// Returns what marks what a run has begun on an SR, of its own mark and the uuid of the SR.
pub fn mark(of_run: &str, sr: &str) -> String {
    format!("{of_run} on {sr}")
}
