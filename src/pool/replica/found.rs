//! What a pool has of a replica: its whole states, newest first, and the machine that the next one is put on.

use std::collections::BTreeSet;

use uuid::Uuid;
use vhd::StreamReader;
use xapi::record::{Sr, Vbd, Vdi, Vm};
use xapi::{ExportOptions, Format, Pool, Record, Ref};

use super::marks::{self, BLOCKED, Identity};
use crate::pool::error::{Error, ErrorKind, Result};
use crate::pool::survey::is_disk;

/// What there is.
pub struct Found {
    /// Newest first.
    pub versions: Vec<Version>,
    /// Whether there is a machine at all.
    has_machine: bool,
    /// The machine that the newest version is a snapshot of, if it is there and ours.
    machine: Option<Record<Vm>>,
}

/// A whole state: a snapshot of the machine, or a machine of its own.
pub struct Version {
    /// The snapshot or machine.
    pub vm: Record<Vm>,
    /// Later ones have higher ones.
    pub number: u64,
    /// What connects its disks.
    pub devices: Vec<Record<Vbd>>,
    /// Its disks, as far as they are ours.
    pub disks: Vec<VersionDisk>,
}

/// A disk of a state.
pub struct VersionDisk {
    /// The disk.
    pub vdi: Record<Vdi>,
    /// The disk that it is a replica of.
    pub of: Uuid,
    /// The snapshot of that which it holds.
    pub content: Uuid,
    /// How many bytes that has.
    pub size: u64,
    /// When that was taken.
    pub time: String,
}

impl Found {
    /// Looks at all machines of a pool.
    ///
    /// # Errors
    /// What the pool says.
    pub fn of(pool: &Pool, identity: &Identity) -> Result<Self> {
        let mut machines = pool.records::<Vm>()?;
        let mut versions = Vec::new();
        for (number, vm) in machines.iter().filter_map(|vm| Some((identity.number_of(vm)?, vm))) {
            versions.push(Version::of(pool, vm.clone(), number, identity)?);
        }
        versions.sort_by_key(|version| std::cmp::Reverse(version.number));
        machines.retain(|vm| identity.has_machine(vm));
        let has_machine = !machines.is_empty();
        machines.retain(|vm| versions.first().is_some_and(|version| version.vm.snapshot_of == vm.reference));
        Ok(Self { versions, has_machine, machine: machines.pop() })
    }

    /// Whether there was a replica before.
    pub fn is_known(&self) -> bool {
        self.has_machine || !self.versions.is_empty()
    }

    /// Returns what it has of a disk that has `size` bytes now: rather of a snapshot that is still there to read relative to, which
    /// `kept` are, than the newest. Else why not.
    pub fn base(&self, disk: Uuid, size: u64, kept: &BTreeSet<Uuid>) -> std::result::Result<&VersionDisk, String> {
        if self.versions.is_empty() {
            return Err("there is no replica of it yet".to_owned());
        }
        let of_disk = || self.versions.iter().flat_map(|version| &version.disks).filter(|known| known.of == disk);
        let Some(newest) = of_disk().next() else {
            return Err("the replica does not have this disk yet".to_owned());
        };
        let base = of_disk().find(|known| kept.contains(&known.content)).unwrap_or(newest);
        if base.size > size {
            return Err(format!("the disk was larger when it was replicated, it had {} bytes", base.size));
        }
        Ok(base)
    }

    /// Returns the newest disk that holds a snapshot.
    pub fn holds(&self, content: Uuid) -> Option<&VersionDisk> {
        self.versions.iter().flat_map(|version| &version.disks).find(|known| known.content == content)
    }

    /// Returns the machine that the next state is put on, and its newest state; or why another is made.
    ///
    /// Only one that nobody has changed since: what is there is destroyed.
    ///
    /// # Errors
    /// What the pool says.
    pub fn machine(&self, pool: &Pool) -> Result<std::result::Result<(Record<Vm>, &Version), String>> {
        let Some(newest) = self.versions.first() else {
            let why = if self.has_machine { "the snapshots of the one before are gone" } else { "there is none yet" };
            return Ok(Err(why.to_owned()));
        };
        let Some(machine) = &self.machine else {
            return Ok(Err("the one before is gone, or was set back to a snapshot".to_owned()));
        };
        let machine: Record<Vm> = pool.record(&machine.reference)?;
        Ok(match change(pool, &machine, newest)? {
            None => Ok((machine, newest)),
            Some(change) => Err(format!("'{}' ({}) {change}", machine.name_label.escape_debug(), machine.uuid)),
        })
    }
}

impl Version {
    /// Looks at the disks of a state.
    fn of(pool: &Pool, vm: Record<Vm>, number: u64, identity: &Identity) -> Result<Self> {
        let mut devices: Vec<Record<Vbd>> = pool.records_of(&vm.vbds)?;
        devices.retain(is_disk);
        let time = vm.other_config.get(marks::TIME).cloned().unwrap_or_default();
        let mut disks = Vec::with_capacity(devices.len());
        for vdi in pool.records_of::<Vdi>(devices.iter().map(|device| &device.vdi))? {
            if !identity.has(&vdi.uuid, &vdi.other_config) {
                continue;
            }
            let sr: Record<Sr> = pool.record(&vdi.sr)?;
            let content = marks::content_of(&vdi).filter(|_| sr.uuid == identity.sr);
            disks.extend(content.map(|(of, content, size)| VersionDisk { vdi, of, content, size, time: time.clone() }));
        }
        Ok(Self { vm, number, devices, disks })
    }
}

/// Says what somebody did with a machine since its newest state, which is a snapshot of it; `None` if nothing.
///
/// # Errors
/// What the pool says.
fn change(pool: &Pool, machine: &Record<Vm>, newest: &Version) -> Result<Option<String>> {
    if machine.power_state != "Halted" {
        return Ok(Some(format!("is {}", machine.power_state.to_lowercase())));
    }
    if BLOCKED.iter().take(2).any(|operation| !machine.blocked_operations.contains_key(*operation)) {
        return Ok(Some("may be started: somebody allowed it".to_owned()));
    }
    let devices: Vec<Record<Vbd>> = pool.records_of(&machine.vbds)?;
    let attached: BTreeSet<&Ref<Vdi>> =
        devices.iter().filter(|device| is_disk(device)).map(|device| &device.vdi).collect();
    let expected: BTreeSet<&Ref<Vdi>> = newest.disks.iter().map(|disk| &disk.vdi.snapshot_of).collect();
    if attached != expected || newest.disks.len() != newest.devices.len() {
        return Ok(Some("has other disks than it was given".to_owned()));
    }
    for disk in &newest.disks {
        let live: Record<Vdi> = pool.record(&disk.vdi.snapshot_of)?;
        if !marks::is_itself(&live.uuid, &live.other_config) || live.virtual_size != disk.vdi.virtual_size {
            return Ok(Some(format!("has another disk '{}' than it was given", live.name_label.escape_debug())));
        }
        if is_written(pool, &live.reference, &disk.vdi.reference)? {
            return Ok(Some(format!("was written to, on its disk '{}'", live.name_label.escape_debug())));
        }
    }
    Ok(None)
}

/// Whether anything was written to a disk since its snapshot was taken: what an export of the difference lists.
fn is_written(pool: &Pool, live: &Ref<Vdi>, snapshot: &Ref<Vdi>) -> Result<bool> {
    let options = ExportOptions { vdi: live.clone(), base: Some(snapshot.clone()), format: Format::Vhd };
    let broken = |error: vhd::StreamError| {
        let message = format!("what was written to the replica since cannot be found out: {error}");
        Error::new(ErrorKind::Pool(xapi::ErrorKind::Protocol), message)
    };
    let mut stream = StreamReader::open(pool.export_vdi(&options)?).map_err(broken)?;
    if stream.blocks().len() > 0 || !stream.is_differencing() {
        stream.into_source().abandon()?;
        return Ok(true);
    }
    let mut nothing = vec![0; 2 << 20];
    let block = stream.next_block(&mut nothing).map_err(broken)?;
    stream.into_source().conclude()?;
    Ok(block.is_some())
}
