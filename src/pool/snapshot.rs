//! The life of a snapshot: announced, taken, told whose it is, told to be stored, destroyed.
//!
//! ```text
//! journal ─► taken, under a name that has the run in it ─► entries say whose it is ─► named for people
//!                                                              │
//!                             destroyed, journal over  ◄───────┴──────►  told to be stored, journal over
//! ```
//!
//! Whatever ends a run in between, the next one finds it: by its name, by its entries, or by the journal. A disk that is left out
//! is never part of a snapshot for longer than the pool forces it to be.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use serde_json::{Map, Value};
use uuid::Uuid;
use xapi::record::{Vbd, Vdi, Vm};
use xapi::{Pool, Record, Ref};

use super::error::{Error, ErrorKind, Result};
use super::journal::{Act, Begun, Journal};
use super::keys::{self, Keys};
use super::limits::Turn;
use super::survey::{LiveDisk, OurSnapshot, Survey, is_disk};

/// What a `VBD` is made of anew, of all that its record says.
const OF_DEVICE: [&str; 12] = [
    "VM",
    "VDI",
    "userdevice",
    "bootable",
    "mode",
    "type",
    "unpluggable",
    "empty",
    "other_config",
    "qos_algorithm_type",
    "qos_algorithm_params",
    "device",
];

/// How long a snapshot of which nobody knows whose it will be is waited for.
const LONGEST: Duration = Duration::from_secs(120);
/// How often that is looked at.
const PAUSE: Duration = Duration::from_millis(200);

/// A snapshot that was taken in this run.
pub struct Taken {
    /// The snapshot.
    pub vm: Record<Vm>,
    /// What connects its disks.
    pub devices: Vec<Record<Vbd>>,
    /// Its disks, by the reference of the disk that each was made of.
    pub disks: BTreeMap<Ref<Vdi>, Record<Vdi>>,
    begun: Begun,
}

/// Takes a snapshot of the disks that are not left out, once `turn` says that it may. `say` is told what a person should know.
///
/// # Errors
/// What the pool says; then nothing of it is left, or the journal tells of it.
pub fn take(
    pool: &Pool,
    journal: &Journal,
    survey: &Survey,
    keys: &Keys,
    turn: impl FnOnce() -> Result<Turn>,
    say: &dyn Fn(&str),
) -> Result<Taken> {
    forget_leaked(pool, survey)?;
    let name = keys::mark(keys.run, &keys.keeper);
    let mut turn = Some(turn()?);
    let begun = journal.tell(Act::Snapshot { vm: survey.vm.uuid.clone(), name: name.clone(), is_published: false })?;
    let taken = snapshot(pool, journal, survey, &name, say).and_then(|reference| {
        // One that failed, or whose answer did not come, may still be taken: until that is known it is this one's turn.
        turn = None;
        describe(pool, survey, &reference, keys)
    });
    match taken {
        Ok((vm, devices, disks)) => Ok(Taken { vm, devices, disks, begun }),
        Err(error) => {
            // Whether it was taken is known by its name alone.
            let cleanup = pool.with(&super::cleanup());
            match destroy_named(&cleanup, &survey.vm, &name) {
                Ok(()) => journal.over(begun),
                Err(left) => say(&format!("a snapshot '{name}' may be left, and is destroyed by the next run: {left}")),
            }
            Err(error)
        }
    }
}

impl Taken {
    /// Returns the disk that was made of a live one.
    #[must_use]
    pub fn disk_of(&self, live: &LiveDisk) -> Option<&Record<Vdi>> {
        self.disks.get(&live.vdi.reference)
    }

    /// Tells the journal that a backup of it is about to exist.
    ///
    /// # Errors
    /// [`ErrorKind::State`].
    pub fn publishing(&self, journal: &Journal) -> Result<()> {
        journal.publishing(&self.begun)
    }

    /// Tells, in the pool, that what it holds is stored in each repository: from now on the next backup may be relative to it.
    ///
    /// # Errors
    /// What the pool says.
    pub fn stored(self, pool: &Pool, journal: &Journal) -> Result<()> {
        tell_stored(pool, self.disks.values(), Some(&self.vm.reference))?;
        journal.over(self.begun);
        Ok(())
    }

    /// Destroys it.
    ///
    /// # Errors
    /// What the pool says; then the journal tells of it.
    pub fn destroy(self, pool: &Pool, journal: &Journal) -> Result<()> {
        let disks: Vec<Ref<Vdi>> = self.disks.values().map(|vdi| vdi.reference.clone()).collect();
        destroy(pool, Some(&self.vm.reference), &disks)?;
        journal.over(self.begun);
        Ok(())
    }

    /// Takes the data from its disks, and keeps what changed until it was taken: for the next backup by changed block tracking.
    /// `of`: the VM, which tells from then on what is left.
    ///
    /// # Errors
    /// What the pool says.
    pub fn purge_data(&self, pool: &Pool, of: &Ref<Vm>, run: Uuid) -> Result<()> {
        let disks: Vec<&str> = self.disks.values().map(|vdi| vdi.uuid.as_str()).collect();
        pool.set_entry(of, "other_config", &keys::disks_of_run(run), &disks.join(" "))?;
        pool.destroy_vm(&self.vm.reference)?;
        for vdi in self.disks.values() {
            pool.destroy_data(&vdi.reference)?;
        }
        Ok(())
    }

    /// The same as [`Taken::stored`], of a snapshot of which only its disks are left.
    ///
    /// # Errors
    /// What the pool says.
    pub fn disks_stored(self, pool: &Pool, journal: &Journal) -> Result<()> {
        tell_stored(pool, self.disks.values(), None)?;
        journal.over(self.begun);
        Ok(())
    }
}

/// Tells of disks of a snapshot, and then of itself, that they are stored.
fn tell_stored<'a>(pool: &Pool, disks: impl Iterator<Item = &'a Record<Vdi>>, vm: Option<&Ref<Vm>>) -> Result<()> {
    for vdi in disks {
        pool.set_entry(&vdi.reference, "other_config", keys::STORED, keys::TRUE)?;
    }
    Ok(vm.map_or(Ok(()), |vm| pool.set_entry(vm, "other_config", keys::STORED, keys::TRUE))?)
}

/// Tells of a snapshot of a run that died what that run would have told: that it is stored in each repository.
///
/// # Errors
/// What the pool says.
pub fn adopt(pool: &Pool, snapshot: &mut OurSnapshot) -> Result<()> {
    tell_stored(pool, snapshot.disks.iter(), snapshot.vm.as_ref())?;
    snapshot.keys.is_stored = true;
    Ok(())
}

/// Destroys a snapshot of ours of a VM, as far as it is there.
///
/// # Errors
/// What the pool says.
pub fn destroy_ours(pool: &Pool, of: &Ref<Vm>, snapshot: &OurSnapshot) -> Result<()> {
    let disks: Vec<Ref<Vdi>> = snapshot.disks.iter().map(|vdi| vdi.reference.clone()).collect();
    destroy(pool, snapshot.vm.as_ref(), &disks)?;
    if snapshot.is_told {
        pool.remove_entry(of, "other_config", &keys::disks_of_run(snapshot.keys.run))?;
    }
    Ok(())
}

/// Destroys the snapshots of a VM that have a name with a run in it: nobody has told yet whose they are. One that is being
/// taken is waited for.
///
/// # Errors
/// What the pool says; [`ErrorKind::Pool`] if a snapshot of the VM is still being taken after some minutes.
pub fn destroy_named(pool: &Pool, vm: &Record<Vm>, name: &str) -> Result<()> {
    wait_for_snapshots(pool, vm)?;
    let found = pool.by_name::<Vm>(name)?;
    for snapshot in pool.records_of::<Vm>(&found)? {
        if !snapshot.is_a_snapshot || snapshot.snapshot_of != vm.reference || snapshot.name_label != name {
            continue;
        }
        let devices: Vec<Record<Vbd>> = pool.records_of(&snapshot.vbds)?;
        let disks: Vec<Ref<Vdi>> =
            devices.iter().filter(|device| is_disk(device)).map(|device| device.vdi.clone()).collect();
        // Only snapshots: the disks of the VM itself are never in question.
        let disks = pool.records_of::<Vdi>(&disks)?.into_iter().filter(|vdi| vdi.is_a_snapshot);
        let disks: Vec<Ref<Vdi>> = disks.map(|vdi| vdi.reference).collect();
        destroy(pool, Some(&snapshot.reference), &disks)?;
    }
    Ok(())
}

/// Waits until no snapshot of a VM is being taken: one that a run asked for which did not hear of it, or died, comes in the end.
fn wait_for_snapshots(pool: &Pool, vm: &Record<Vm>) -> Result<()> {
    let begun = Instant::now();
    loop {
        let operations: BTreeMap<String, String> = match pool.field(&vm.reference, "current_operations") {
            Err(error) if error.is_gone() => return Ok(()),
            operations => operations?,
        };
        if !operations.values().any(|operation| operation == "snapshot") {
            return Ok(());
        }
        if begun.elapsed() >= LONGEST {
            let message = format!("a snapshot is being taken of the VM since more than {} s", LONGEST.as_secs());
            return Err(Error::new(ErrorKind::Pool(xapi::ErrorKind::TimedOut), message));
        }
        pool.cancel().sleep(PAUSE, "wait for a snapshot")?;
    }
}

/// Destroys disks, and then the machine that has them: it leads to those that a run left which ended in between, also to those of disks
/// that the live machine has no more.
fn destroy(pool: &Pool, vm: Option<&Ref<Vm>>, disks: &[Ref<Vdi>]) -> Result<()> {
    for disk in disks {
        pool.destroy_vdi(disk)?;
    }
    vm.map_or(Ok(()), |vm| Ok(pool.destroy_vm(vm)?))
}

/// Makes again what connected disks to a halted VM, as far as it is not there.
///
/// # Errors
/// What the pool says.
pub fn attach_again(pool: &Pool, vm: &Ref<Vm>, devices: &[Map<String, Value>]) -> Result<()> {
    let there: Vec<Ref<Vbd>> = pool.field(vm, "VBDs")?;
    let there: Vec<Record<Vbd>> = pool.records_of(&there)?;
    for device in devices {
        let place = device.get("userdevice").and_then(Value::as_str).unwrap_or_default();
        if there.iter().any(|known| known.userdevice == place) {
            continue;
        }
        let fields: Map<String, Value> = device
            .iter()
            .filter(|(name, _)| OF_DEVICE.contains(&name.as_str()))
            .map(|(n, v)| (n.clone(), v.clone()))
            .collect();
        match pool.create_vbd(&fields) {
            // The disk was removed since.
            Err(error) if error.is_gone() => {}
            made => drop(made?),
        }
    }
    Ok(())
}

/// Clears entries of a live VM that would be copied to every later snapshot: those of a snapshot that it was set back to, and
/// what tells of disks of which none is left.
fn forget_leaked(pool: &Pool, survey: &Survey) -> Result<()> {
    for (run, _gone) in keys::left_disks(&survey.vm.other_config) {
        if survey.snapshots.iter().all(|snapshot| snapshot.keys.run != run) {
            pool.remove_entry(&survey.vm.reference, "other_config", &keys::disks_of_run(run))?;
        }
    }
    for key in keys::of_snapshots(&survey.vm.other_config) {
        pool.remove_entry(&survey.vm.reference, "other_config", key)?;
    }
    for disk in &survey.disks {
        for key in keys::of_snapshots(&disk.vdi.other_config) {
            pool.remove_entry(&disk.vdi.reference, "other_config", key)?;
        }
    }
    Ok(())
}

/// Takes the snapshot by whatever way the pool has to leave disks out.
fn snapshot(pool: &Pool, journal: &Journal, survey: &Survey, name: &str, say: &dyn Fn(&str)) -> Result<Ref<Vm>> {
    let vm = &survey.vm.reference;
    let left_out: Vec<&LiveDisk> = survey.left_out().collect();
    let ignored: Vec<&Ref<Vdi>> = left_out.iter().map(|disk| &disk.vdi.reference).collect();
    match pool.snapshot_vm(vm, name, &ignored) {
        Err(error) if !ignored.is_empty() && error.code() == "MESSAGE_PARAMETER_COUNT_MISMATCH" => {}
        taken => return Ok(taken?),
    }
    let plain = || Ok(pool.snapshot_vm(vm, name, &[])?);
    if survey.vm.power_state == "Halted" {
        return without(pool, journal, survey, &left_out, plain);
    }
    let snapshot: Ref<Vm> = plain()?;
    let names: Vec<&str> = left_out.iter().map(|disk| disk.name.as_str()).collect();
    say(&format!(
        "this pool cannot leave disks of a running VM out of a snapshot: those of {} are destroyed at once",
        names.join(", ")
    ));
    pool.destroy_disks_of(&snapshot, &ignored)?;
    Ok(snapshot)
}

/// Takes the disks from a halted VM for the moment of the snapshot.
fn without(
    pool: &Pool,
    journal: &Journal,
    survey: &Survey,
    left_out: &[&LiveDisk],
    act: impl FnOnce() -> Result<Ref<Vm>>,
) -> Result<Ref<Vm>> {
    let devices: Vec<Map<String, Value>> = left_out.iter().map(|disk| disk.device.raw.clone()).collect();
    let begun = journal.tell(Act::Detached { vm: survey.vm.uuid.clone(), devices: devices.clone() })?;
    let removed = left_out.iter().try_for_each(|disk| Ok(pool.destroy_vbd(&disk.device.reference)?));
    let taken = removed.and_then(|()| act());
    // Whatever became of it, and also if it was cancelled.
    let cleanup = pool.with(&super::cleanup());
    attach_again(&cleanup, &survey.vm.reference, &devices)?;
    journal.over(begun);
    taken
}

type Described = (Record<Vm>, Vec<Record<Vbd>>, BTreeMap<Ref<Vdi>, Record<Vdi>>);

/// Tells whose a snapshot is, and returns it with its disks.
fn describe(pool: &Pool, survey: &Survey, snapshot: &Ref<Vm>, keys: &Keys) -> Result<Described> {
    let devices: Vec<Ref<Vbd>> = pool.field(snapshot, "VBDs")?;
    let devices: Vec<Record<Vbd>> = pool.records_of::<Vbd>(&devices)?.into_iter().filter(is_disk).collect();
    for vdi in pool.records_of::<Vdi>(devices.iter().map(|device| &device.vdi))? {
        for (key, value) in keys.entries(&vdi.uuid) {
            pool.set_entry(&vdi.reference, "other_config", key, &value)?;
        }
    }
    let uuid: String = pool.field(snapshot, "uuid")?;
    for (key, value) in keys.entries(&uuid) {
        pool.set_entry(snapshot, "other_config", key, &value)?;
    }
    // Without, an XVA of it becomes a template where it is imported. Editions that refuse that have to live with it.
    if let Err(error) = pool.set(snapshot, "is_a_template", false) {
        match error.kind() {
            xapi::ErrorKind::Denied | xapi::ErrorKind::Api => tracing::info!(%error, "stays a template"),
            _ => return Err(error.into()),
        }
    }
    pool.set(snapshot, "name_label", keys::snapshot_name(&survey.vm.name_label))?;
    let vm = pool.record(snapshot)?;
    let mut disks = BTreeMap::new();
    for device in &devices {
        let vdi: Record<Vdi> = pool.record(&device.vdi)?;
        disks.insert(vdi.snapshot_of.clone(), vdi);
    }
    for disk in survey.wanted() {
        if !disks.contains_key(&disk.vdi.reference) {
            let message =
                format!("the snapshot has no disk of {}: the VM was changed meanwhile; run it again", disk.name);
            return Err(Error::new(ErrorKind::Pool(xapi::ErrorKind::Protocol), message));
        }
    }
    Ok((vm, devices, disks))
}

/// Makes the entries of a new snapshot.
#[must_use]
pub fn new_keys(job: &str, vm: &str, run: Uuid, keeper: &str, now: jiff::Timestamp) -> Keys {
    Keys {
        job: job.to_owned(),
        vm: vm.to_owned(),
        run,
        keeper: keeper.to_owned(),
        datetime: now.strftime("%Y%m%dT%H:%M:%SZ").to_string(),
        is_stored: false,
    }
}
