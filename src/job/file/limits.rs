//! What a run may use, how long it may take, and what is tried again.

use std::time::Duration;

use crate::job::table::Section;

/// Machines, or disks, that are worked on at once; more would only wait for each other.
const MOST_AT_ONCE: u32 = 64;
/// No transfer goes on at less (bytes a second): it would not end before it is given up.
const LEAST_BANDWIDTH: u64 = 64 << 10;

/// What a job may use. All but the first hold for all processes of this machine together: of slots that they share a job takes only
/// the first ones, as many as it says, so that jobs that say different numbers agree.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Machines at once, of this run.
    pub vms: u32,
    /// Disks of a pool that are read or written at once.
    pub exports: u32,
    /// Snapshots of a pool that are taken at once.
    pub snapshots: u32,
    /// Disks at once, of all pools; `None` for as many as there are.
    pub transfers: Option<u32>,
    /// What is read from a pool (bytes a second); `None` for as much as it gives.
    pub bandwidth: Option<u64>,
}

impl Default for Limits {
    fn default() -> Self {
        Self { vms: 2, exports: 12, snapshots: 1, transfers: None, bandwidth: None }
    }
}

/// How long things may take.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Timeouts {
    /// The whole run, but for the merges after it.
    pub job: Option<Duration>,
    /// Each machine, each time that it is tried.
    pub vm: Option<Duration>,
    /// How long another program is waited for that works on the same machine.
    pub lock: Duration,
    /// How long chains are waited for that the host has to coalesce; `None` not to look at them.
    pub chain: Option<Duration>,
}

/// What is tried again, and when.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Retries {
    /// How often a machine that failed is tried again, after all others.
    pub vm: u32,
    /// How often a disk whose transfer broke is read again within the same try, from the same snapshot.
    pub disk: u32,
    /// How long is waited before.
    pub pause: Duration,
}

/// Reads `[limits]`.
pub(super) fn limits(section: Option<Section>) -> Limits {
    let usual = Limits::default();
    let Some(section) = section else { return usual };
    let number = |key| section.number(key, 1..=MOST_AT_ONCE);
    let limits = Limits {
        vms: number("vms").unwrap_or(usual.vms),
        exports: number("exports").unwrap_or(usual.exports),
        snapshots: number("snapshots").unwrap_or(usual.snapshots),
        transfers: number("transfers"),
        bandwidth: section.rate("bandwidth", LEAST_BANDWIDTH),
    };
    section.finish();
    limits
}

/// Reads `[timeouts]`.
pub(super) fn timeouts(section: Option<Section>) -> Timeouts {
    let usual = Timeouts { job: None, vm: None, lock: Duration::from_secs(60), chain: Some(Duration::from_secs(600)) };
    let Some(section) = section else { return usual };
    let checks_chain = section.flag("check_chain").unwrap_or(true);
    let chain = section.duration("chain").or(usual.chain);
    let timeouts = Timeouts {
        job: positive(&section, "job"),
        vm: positive(&section, "vm"),
        lock: section.duration("lock").unwrap_or(usual.lock),
        chain: chain.filter(|_| checks_chain),
    };
    section.finish();
    timeouts
}

fn positive(section: &Section, key: &'static str) -> Option<Duration> {
    let duration = section.duration(key)?;
    if duration.is_zero() {
        section.note(format!("{key} is no time at all; leave it out for no limit"));
    }
    Some(duration)
}

/// Reads `[retries]`.
pub(super) fn retries(section: Option<Section>) -> Retries {
    let usual = Retries { vm: 1, disk: 1, pause: Duration::from_secs(60) };
    let Some(section) = section else { return usual };
    let retries = Retries {
        vm: section.number("vm", 0..=100).unwrap_or(usual.vm),
        disk: section.number("disk", 0..=100).unwrap_or(usual.disk),
        pause: section.duration("pause").unwrap_or(usual.pause),
    };
    section.finish();
    retries
}
