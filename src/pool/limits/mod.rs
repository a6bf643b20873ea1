//! How much is done at once, over all processes of this machine: transfers, disks and snapshots of each pool, and bytes a second.
//!
//! ```text
//! a disk, an XVA:  transfer of this machine ─► disk of each pool that it is read from or written to, by uuid ─► read, written ─► all back
//! a snapshot:      snapshot of its pool ─► taken ─► back
//! each block:      `pace`, where bytes are limited
//! ```
//!
//! Nothing waits for ever: who has a turn waits only for what comes later in these lines, and needs one of each alone. A disk that is
//! copied within a pool is one disk of it. What one run may do at once is what the first so many slots allow, so runs with other
//! limits agree with it.
//!
//! Nobody is passed over for long: one of those who wait stands in the gate, and only he takes a slot. Who has left one and wants another
//! comes after him. Who stands in the gate next is a matter of chance.

mod pace;

use std::collections::BTreeSet;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use xapi::record::PoolObject;
use xapi::{Cancel, Record, Slot, Slots};

pub use pace::{Pace, PacedDisk};

use super::error::{Error, Result};
use super::state::State;

/// How often who is next looks whether it is his turn.
const NEXT: Duration = Duration::from_millis(20);
/// How often others look whether they are next.
const OTHERS: Duration = Duration::from_millis(60);
/// How long somebody waits before a person is told.
const MOMENT: Duration = Duration::from_secs(3);

/// What a run may do at once, together with all others of this machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Disks of a pool, or VMs as a whole, that are read or written.
    pub exports: usize,
    /// Snapshots of VMs of a pool that are taken.
    pub snapshots: usize,
    /// Disks, or VMs as a whole, that are transferred, of all pools.
    pub transfers: Option<usize>,
    /// Bytes a second that are read from a pool.
    pub bandwidth: Option<u64>,
}

impl Default for Limits {
    /// Returns what Xen Orchestra has found pools to bear.
    fn default() -> Self {
        Self { exports: 12, snapshots: 1, transfers: None, bandwidth: None }
    }
}

/// A pool: what its limits are known by, and what people call it.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct PoolId {
    uuid: String,
    name: String,
}

impl PoolId {
    /// Takes what a pool says of itself.
    #[must_use]
    pub fn new(pool: Option<&Record<PoolObject>>) -> Self {
        let text = |field: fn(&PoolObject) -> &String| pool.map(|pool| field(pool).clone()).unwrap_or_default();
        Self { uuid: text(|pool| &pool.uuid), name: text(|pool| &pool.name_label) }
    }
}

/// The limits of a run.
#[derive(Debug, Clone)]
pub struct Turns {
    slots: Slots,
    limits: Limits,
}

/// What is read from and written to some pools, one after the other, each in its turn.
#[derive(Debug, Clone)]
pub struct Transfer {
    /// The limits.
    pub turns: Turns,
    /// The pools.
    pub pools: BTreeSet<PoolId>,
    /// Stops what waits.
    pub cancel: Cancel,
}

impl Transfer {
    /// Waits for the turn of the next. `say` is told if that is long.
    ///
    /// # Errors
    /// As [`Turns::snapshot`].
    pub fn turn(&self, say: &dyn Fn(&str)) -> Result<Turn> {
        self.turns.transfer(&self.pools, &self.cancel, say)
    }
}

/// The right to do something, until it is dropped.
#[derive(Debug)]
#[must_use = "it is given back when it is dropped"]
pub struct Turn {
    _slots: Vec<Slot>,
}

/// What is waited for.
struct Kind<'a> {
    /// What its slots are called.
    name: String,
    /// How many there are.
    count: usize,
    /// One of them, for people.
    one: &'a dyn Fn() -> String,
}

impl Turns {
    /// Makes those of a run.
    #[must_use]
    pub fn new(state: &State, limits: Limits) -> Self {
        Self { slots: Slots::new(state.slots()), limits }
    }

    /// Waits until a snapshot may be taken in a pool. `say` is told if that is long.
    ///
    /// # Errors
    /// [`super::ErrorKind::Interrupted`] and what else `cancel` says; [`super::ErrorKind::State`].
    pub fn snapshot(&self, pool: &PoolId, cancel: &Cancel, say: &dyn Fn(&str)) -> Result<Turn> {
        let count = self.limits.snapshots;
        let one = || match count {
            1 => format!("the snapshot of another VM of the pool {}", pool.name.escape_debug()),
            count => format!("one of {count} snapshots of the pool {}", pool.name.escape_debug()),
        };
        let slot = self.wait(&Kind { name: format!("snapshots-{}", pool.uuid), count, one: &one }, cancel, say)?;
        Ok(Turn { _slots: vec![slot] })
    }

    /// Waits until a disk, or a VM as a whole, may be transferred that is read from or written to these pools. `say` is told if that
    /// is long.
    ///
    /// # Errors
    /// As [`Turns::snapshot`].
    pub fn transfer(&self, pools: &BTreeSet<PoolId>, cancel: &Cancel, say: &dyn Fn(&str)) -> Result<Turn> {
        let mut slots = Vec::with_capacity(1 + pools.len());
        if let Some(count) = self.limits.transfers {
            let one = || format!("one of {count} transfers of this machine");
            slots.push(self.wait(&Kind { name: "transfers".to_owned(), count, one: &one }, cancel, say)?);
        }
        let count = self.limits.exports;
        // One of each, even if a pool was renamed between two looks at it.
        let mut last = None;
        for pool in pools.iter().filter(|pool| last.replace(&pool.uuid) != Some(&pool.uuid)) {
            let one = || format!("one of {count} exports and imports of the pool {}", pool.name.escape_debug());
            let kind = Kind { name: format!("disks-{}", pool.uuid), count, one: &one };
            slots.push(self.wait(&kind, cancel, say)?);
        }
        Ok(Turn { _slots: slots })
    }

    /// Returns what slows down the reading of a pool, if it is to be slow.
    #[must_use]
    pub fn pace(&self, pool: &PoolId, cancel: &Cancel) -> Option<Arc<Pace>> {
        let rate = self.limits.bandwidth?;
        Some(Arc::new(Pace::new(self.slots.clone(), format!("pace-{}", pool.uuid), rate, cancel.clone())))
    }

    fn wait(&self, kind: &Kind, cancel: &Cancel, say: &dyn Fn(&str)) -> Result<Slot> {
        let count = kind.count.max(1);
        // Only who may have the same slots stands in the same gate.
        let gate_name = format!("{}-gate-{count}", kind.name);
        let take = |name: &str, count: usize| {
            // The last first: the others are all that runs with a lower limit may have.
            let slot = self.slots.take(name, (0..count).rev());
            slot.map_err(|error| Error::state("take a slot for", name.as_ref(), &error))
        };
        let (begun, mut is_said, mut gate) = (Instant::now(), false, None);
        loop {
            cancel.check(format_args!("wait for {}", (kind.one)()))?;
            if gate.is_none() {
                gate = take(&gate_name, 1)?;
            }
            let slot = if gate.is_some() { take(&kind.name, count)? } else { None };
            if let Some(slot) = slot {
                return Ok(slot);
            }
            if begun.elapsed() >= MOMENT && !std::mem::replace(&mut is_said, true) {
                say(&format!("waits for {}: other runs on this machine come first", (kind.one)()));
            }
            // Those who look at the same moments would always find the gate in the same order.
            let chance = Duration::from_millis(u64::from(begun.elapsed().subsec_nanos() % 64));
            thread::sleep(if gate.is_some() { NEXT } else { OTHERS + chance });
        }
    }
}

#[cfg(test)]
mod tests;
