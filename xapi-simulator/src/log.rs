//! What was asked for and served, for tests to look at: requests without their secrets, bytes by block, and how much there
//! was at once.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Mutex, MutexGuard, PoisonError};
use uuid::Uuid;

/// Requests that are kept; older ones are dropped.
const KEPT: usize = 100_000;

/// A request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Request {
    /// The host that got it, by its position in the scene.
    pub host: usize,
    /// The method, as it was written, or the verb and the path of a transfer.
    pub method: String,
    /// The arguments as JSON but for sessions and passwords; of a transfer, its parameters.
    pub arguments: Vec<String>,
}

/// What there can be several of at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Activity {
    /// Exports of disks and machines.
    Export,
    /// Imports of disks and machines.
    Import,
    /// Snapshots of machines.
    Snapshot,
    /// NBD connections to a host, by its position in the scene.
    Nbd(usize),
}

#[derive(Debug, Default)]
struct Entries {
    requests: VecDeque<Request>,
    /// How often anything of a block of 2 MiB was sent, by VDI and block.
    blocks: BTreeMap<Uuid, BTreeMap<u64, u64>>,
    /// Bytes of a disk that were sent, by VDI and by what sent them.
    bytes: BTreeMap<(Uuid, Activity), u64>,
    /// Bytes of disks that were sent, by what sent them and how many such there were then.
    beside: BTreeMap<(Activity, usize), u64>,
    /// Now, and at most.
    gauges: BTreeMap<Activity, (usize, usize)>,
}

/// The log of a pool.
#[derive(Debug, Default)]
pub struct Log(Mutex<Entries>);

impl Log {
    /// Returns the requests, oldest first.
    pub fn requests(&self) -> Vec<Request> {
        self.entries().requests.iter().cloned().collect()
    }

    /// Returns how many requests of this method there were.
    pub fn count(&self, method: &str) -> usize {
        self.entries().requests.iter().filter(|request| request.method == method).count()
    }

    /// Returns the classes and objects of which `event.from` was asked, each once.
    pub fn subscriptions(&self) -> Vec<String> {
        let entries = self.entries();
        let asked = entries.requests.iter().filter(|request| request.method == "event.from");
        let mut classes: Vec<String> = asked
            .filter_map(|request| serde_json::from_str::<Vec<String>>(request.arguments.first()?).ok())
            .flatten()
            .collect();
        classes.sort();
        classes.dedup();
        classes
    }

    /// Returns how often anything of each block of 2 MiB of a VDI was sent, by NBD or in an export.
    pub fn blocks(&self, vdi: Uuid) -> BTreeMap<u64, u64> {
        self.entries().blocks.get(&vdi).cloned().unwrap_or_default()
    }

    /// Returns how many bytes of a VDI were sent.
    pub fn bytes(&self, vdi: Uuid) -> u64 {
        self.sum(vdi, |_| true)
    }

    /// Returns how many of these bytes exports sent. One that the client broke off may have sent some to nobody: whatever the
    /// connection took of it.
    pub fn exported(&self, vdi: Uuid) -> u64 {
        self.sum(vdi, |activity| activity == Activity::Export)
    }

    /// Returns how many bytes of disks were sent while there were so many exports at once, by that number.
    pub fn exported_beside(&self) -> BTreeMap<usize, u64> {
        let entries = self.entries();
        let of_exports = entries.beside.iter().filter(|((activity, _), _)| *activity == Activity::Export);
        of_exports.map(|((_, count), bytes)| (*count, *bytes)).collect()
    }

    fn sum(&self, vdi: Uuid, is_meant: impl Fn(Activity) -> bool) -> u64 {
        let entries = self.entries();
        let meant = entries.bytes.iter().filter(|((of, activity), _)| *of == vdi && is_meant(*activity));
        meant.map(|(_, bytes)| bytes).sum()
    }

    /// Returns how many there are now.
    pub fn now(&self, activity: Activity) -> usize {
        self.entries().gauges.get(&activity).map_or(0, |(now, _)| *now)
    }

    /// Returns how many there were at once at most.
    pub fn most(&self, activity: Activity) -> usize {
        self.entries().gauges.get(&activity).map_or(0, |(_, most)| *most)
    }

    /// Forgets requests, blocks and bytes, and what was the most.
    pub fn clear(&self) {
        let mut entries = self.entries();
        entries.requests.clear();
        entries.blocks.clear();
        entries.bytes.clear();
        entries.beside.clear();
        for (now, most) in entries.gauges.values_mut() {
            *most = *now;
        }
    }

    pub(crate) fn request(&self, host: usize, method: &str, arguments: Vec<String>) {
        let mut entries = self.entries();
        if entries.requests.len() == KEPT {
            entries.requests.pop_front();
        }
        entries.requests.push_back(Request { host, method: method.to_owned(), arguments });
    }

    /// Notes that bytes of a disk were sent, and by what.
    pub(crate) fn served(&self, activity: Activity, vdi: Uuid, offset: u64, length: u64) {
        const BLOCK: u64 = 2 << 20;
        if length == 0 {
            return;
        }
        let mut entries = self.entries();
        *entries.bytes.entry((vdi, activity)).or_default() += length;
        let count = entries.gauges.get(&activity).map_or(0, |(now, _)| *now);
        *entries.beside.entry((activity, count)).or_default() += length;
        let blocks = entries.blocks.entry(vdi).or_default();
        for block in offset / BLOCK..=(offset + length - 1) / BLOCK {
            *blocks.entry(block).or_default() += 1;
        }
    }

    /// Counts one until what is returned is dropped.
    pub(crate) fn begin(&self, activity: Activity) -> Running<'_> {
        self.add(activity);
        Running { log: self, activity }
    }

    /// Counts one more.
    pub(crate) fn add(&self, activity: Activity) {
        let mut entries = self.entries();
        let (now, most) = entries.gauges.entry(activity).or_default();
        *now += 1;
        *most = (*most).max(*now);
    }

    /// Counts one less.
    pub(crate) fn remove(&self, activity: Activity) {
        if let Some((now, _)) = self.entries().gauges.get_mut(&activity) {
            *now = now.saturating_sub(1);
        }
    }

    fn entries(&self) -> MutexGuard<'_, Entries> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Something that goes on.
pub(crate) struct Running<'a> {
    log: &'a Log,
    activity: Activity,
}

impl Drop for Running<'_> {
    fn drop(&mut self) {
        self.log.remove(self.activity);
    }
}
