//! What a VM is just now: its disks, which of them are backed up, and what snapshots of ours it has. Read from the pool, never
//! from memory.

use std::collections::{BTreeMap, BTreeSet};

use uuid::Uuid;
use xapi::record::{Network, Pif, Sr, Vbd, Vdi, Vif, Vm};
use xapi::{Pool, Record, Ref};

use super::base::DiskSnapshot;
use super::chain::{self, Image};
use super::error::{Error, ErrorKind, Result};
use super::keys::{self, Keys};
use super::replica::REPLICATING;
use super::restore::records::{BLOCKED, RESTORING};
use super::room::Storage;

/// The type of a disk that has no data any more, only what changed.
const CHANGES_ONLY: &str = "cbt_metadata";
/// Disks of an SR that are asked for one by one; of more all of the pool at once come sooner.
const FEW: usize = 32;

/// A VM.
pub struct Survey {
    /// The VM.
    pub vm: Record<Vm>,
    /// Its disks, in the order of their places.
    pub disks: Vec<LiveDisk>,
    /// What we made of it, in any job, oldest first.
    pub snapshots: Vec<OurSnapshot>,
    /// What all snapshots of it are called.
    pub snapshot_names: Vec<String>,
    /// Whether Xen Orchestra makes backups of it, too.
    pub is_of_xen_orchestra: bool,
    /// The SRs of its disks, by reference.
    pub storages: BTreeMap<Ref<Sr>, Record<Sr>>,
}

/// A disk of a VM.
#[derive(Debug, Clone)]
pub struct LiveDisk {
    /// As the guest sees it.
    pub name: String,
    /// What connects it.
    pub device: Record<Vbd>,
    /// The disk.
    pub vdi: Record<Vdi>,
    /// Its uuid.
    pub uuid: Uuid,
    /// Whether its name says that it is left out.
    pub is_left_out: bool,
}

/// A snapshot that we made.
#[derive(Debug, Clone)]
pub struct OurSnapshot {
    /// What it says of itself.
    pub keys: Keys,
    /// The snapshot; none if only its disks are left.
    pub vm: Option<Ref<Vm>>,
    /// Whether the VM tells which disks are left of it.
    pub is_told: bool,
    /// Its disks.
    pub disks: Vec<Record<Vdi>>,
}

/// Finds the VM that is meant: by uuid, or by its name, if only one has it.
///
/// # Errors
/// If there is none, or several, or it is not whole; what the pool says.
pub fn find(pool: &Pool, named: &str) -> Result<Record<Vm>> {
    let shown = named.escape_debug();
    let none = || Error::new(ErrorKind::Usage, format!("the pool has no VM '{shown}': give its name or its uuid"));
    if let Ok(uuid) = Uuid::try_parse(named) {
        let reference = match pool.by_uuid::<Vm>(&uuid.to_string()) {
            Err(error) if error.is_gone() => return Err(none()),
            found => found?,
        };
        let vm = pool.record(&reference)?;
        if let Some(what) = kind_of(&vm) {
            let message = format!("'{shown}' is {what}: a VM was expected");
            return Err(Error::new(ErrorKind::Usage, message));
        }
        return unfinished(&vm).map_or_else(|| Ok(vm.clone()), |why| Err(not_whole(&vm, why)));
    }
    let found = pool.by_name::<Vm>(named)?;
    let mut found: Vec<Record<Vm>> = pool.records_of(&found)?;
    found.retain(|vm| kind_of(vm).is_none());
    let halves: Vec<Error> = found.iter().filter_map(|vm| Some(not_whole(vm, unfinished(vm)?))).collect();
    found.retain(|vm| unfinished(vm).is_none());
    let uuids: Vec<String> = found.iter().map(|vm| vm.uuid.clone()).collect();
    match (found.pop(), found.is_empty()) {
        (None, _) => Err(halves.into_iter().next().unwrap_or_else(none)),
        (Some(vm), true) => Ok(vm),
        (Some(_), false) => {
            let message = format!("several VMs are called '{shown}': {}; say which by its uuid", uuids.join(", "));
            Err(Error::new(ErrorKind::Usage, message))
        }
    }
}

/// Returns all that can be backed up.
///
/// # Errors
/// What the pool says.
pub fn all(pool: &Pool) -> Result<Vec<Record<Vm>>> {
    let mut found = pool.records::<Vm>()?;
    found.retain(|vm| kind_of(vm).is_none() && unfinished(vm).is_none());
    Ok(found)
}

/// Says what is being done to a VM that is not whole yet. One that may be started is, whatever mark was left on it.
fn unfinished(vm: &Vm) -> Option<&'static str> {
    let is_blocked = vm.blocked_operations.contains_key(BLOCKED[0]);
    let is_marked = |mark: &str| is_blocked && vm.other_config.contains_key(mark);
    let marks = [(RESTORING, "restored"), (REPLICATING, "replicated")];
    marks.into_iter().find_map(|(mark, act)| is_marked(mark).then_some(act))
}

fn not_whole(vm: &Vm, act: &str) -> Error {
    let message = format!(
        "'{}' ({}) is not whole: it is being {act}, or that was cut off. Wait for its end; what was cut off the next run of who \
         began it undoes",
        vm.name_label.escape_debug(),
        vm.uuid.escape_debug()
    );
    Error::new(ErrorKind::Usage, message)
}

/// Says what it is that is no VM to be backed up.
fn kind_of(vm: &Vm) -> Option<&'static str> {
    match (vm.is_a_snapshot, vm.is_control_domain, vm.is_a_template) {
        (true, ..) => Some("a snapshot"),
        (_, true, _) => Some("the control domain of a host"),
        (_, _, true) => Some("a template"),
        _ => None,
    }
}

impl Survey {
    /// Looks at a VM.
    ///
    /// # Errors
    /// What the pool says; that something of it contradicts itself.
    pub fn of(pool: &Pool, vm: Record<Vm>) -> Result<Self> {
        let (mut disks, mut names) = (Vec::new(), BTreeSet::new());
        let devices: Vec<Record<Vbd>> = pool.records_of(&vm.vbds)?;
        for device in devices.into_iter().filter(is_disk) {
            let vdi: Record<Vdi> = pool.record(&device.vdi)?;
            let name = device_name(&device);
            if !names.insert(name.clone()) {
                let message = format!("two disks of {} are called {name}", vm.name_label.escape_debug());
                return Err(Error::new(ErrorKind::Usage, message));
            }
            let is_left_out = keys::is_left_out(&vdi.name_label);
            disks.push(LiveDisk { name, uuid: uuid_of(&vdi)?, device, vdi, is_left_out });
        }
        disks.sort_by_key(|disk| (disk.device.userdevice.parse::<u32>().unwrap_or(u32::MAX), disk.name.clone()));
        let mut storages = BTreeMap::new();
        for disk in &disks {
            if !storages.contains_key(&disk.vdi.sr) {
                storages.insert(disk.vdi.sr.clone(), pool.record(&disk.vdi.sr)?);
            }
        }
        let taken: Vec<Record<Vm>> = pool.records_of(&vm.snapshots)?;
        let is_of_xen_orchestra = taken.iter().any(|snapshot| keys::is_of_xen_orchestra(&snapshot.other_config));
        let snapshots = snapshots(pool, &vm, &taken, &disks)?;
        let snapshot_names = taken.into_iter().map(|snapshot| snapshot.fields.name_label).collect();
        Ok(Self { vm, disks, snapshots, snapshot_names, is_of_xen_orchestra, storages })
    }

    /// Returns the disks that are backed up.
    pub fn wanted(&self) -> impl Iterator<Item = &LiveDisk> {
        self.disks.iter().filter(|disk| !disk.is_left_out)
    }

    /// Returns the disks that are left out.
    pub fn left_out(&self) -> impl Iterator<Item = &LiveDisk> {
        self.disks.iter().filter(|disk| disk.is_left_out)
    }

    /// Returns the snapshots of the disks that we made in a job.
    ///
    /// # Errors
    /// That a uuid is none.
    pub fn disk_snapshots(&self, job: &str) -> Result<Vec<DiskSnapshot>> {
        let of: BTreeMap<&Ref<Vdi>, Uuid> = self.disks.iter().map(|disk| (&disk.vdi.reference, disk.uuid)).collect();
        let mut found = Vec::new();
        for snapshot in self.snapshots.iter().filter(|snapshot| snapshot.keys.is_of(&self.vm.uuid, job)) {
            for vdi in &snapshot.disks {
                let Some(of) = of.get(&vdi.snapshot_of) else { continue };
                found.push(DiskSnapshot {
                    uuid: uuid_of(vdi)?,
                    of: *of,
                    storage: vdi.sr.as_str().to_owned(),
                    keys: snapshot.keys.clone(),
                    has_data: vdi.r#type != CHANGES_ONLY,
                });
            }
        }
        Ok(found)
    }

    /// Returns what was said of an SR.
    #[must_use]
    pub fn storage(&self, reference: &Ref<Sr>) -> Option<Storage> {
        self.storages.get(reference).map(|sr| storage_of(sr))
    }
}

/// Returns what an SR says of its room.
#[must_use]
pub fn storage_of(sr: &Sr) -> Storage {
    let bytes = |number: i64| u64::try_from(number).unwrap_or(0);
    let says_thin = [&sr.sm_config, &sr.other_config]
        .iter()
        .any(|config| config.get("allocation").is_some_and(|allocation| allocation != "thick"));
    Storage {
        uuid: sr.uuid.clone(),
        name: sr.name_label.clone(),
        kind: sr.r#type.clone(),
        says_thin,
        size: bytes(sr.physical_size),
        used: bytes(sr.physical_utilisation),
    }
}

/// Returns what keeps the disks from taking a snapshot now, if anything, in words.
///
/// # Errors
/// What the pool says.
pub fn chain_problem(pool: &Pool, survey: &Survey) -> Result<Option<String>> {
    let of_disks = survey.disks.iter().map(|disk| &disk.vdi);
    let of_snapshots = survey.snapshots.iter().flat_map(|snapshot| &snapshot.disks);
    let known: BTreeMap<&Ref<Vdi>, &Record<Vdi>> =
        of_disks.chain(of_snapshots).map(|vdi| (&vdi.reference, vdi)).collect();
    for storage in survey.storages.keys() {
        let disks: Vec<&LiveDisk> = survey.wanted().filter(|disk| disk.vdi.sr == *storage).collect();
        // Without a parent there is no chain, and nothing has to be asked.
        if disks.iter().all(|disk| disk.vdi.parent().is_none()) {
            continue;
        }
        let image = |vdi: &Vdi| Image { parent: vdi.parent().map(str::to_owned), is_managed: vdi.managed };
        let of_it = survey.storages.get(storage).map(|sr| sr.vdis.as_slice()).unwrap_or_default();
        let (there, others): (Vec<&Ref<Vdi>>, Vec<&Ref<Vdi>>) = of_it.iter().partition(|vdi| known.contains_key(vdi));
        let others: Vec<Record<Vdi>> = match others.len() {
            0..=FEW => pool.records_of(others)?,
            _ => pool.records::<Vdi>()?.into_iter().filter(|vdi| vdi.sr == *storage).collect(),
        };
        let known = there.iter().filter_map(|vdi| known.get(vdi).copied());
        let images: BTreeMap<String, Image> = known.chain(&others).map(|vdi| (vdi.uuid.clone(), image(vdi))).collect();
        let problem = |disk: &&LiveDisk| Some((disk.name.clone(), chain::health(&disk.vdi.uuid, &images).problem()?));
        if let Some((name, problem)) = disks.iter().find_map(problem) {
            return Ok(Some(format!("disk {name}: {problem}")));
        }
    }
    Ok(None)
}

/// A network interface, with what a restore asks of its network.
pub struct Interface {
    /// The interface.
    pub vif: Record<Vif>,
    /// Its network.
    pub network: Record<Network>,
    /// The VLAN of a host's interface on that network.
    pub vlan: Option<i64>,
}

/// Returns the network interfaces of a VM or of a snapshot.
///
/// # Errors
/// What the pool says.
pub fn interfaces(pool: &Pool, vm: &Vm) -> Result<Vec<Interface>> {
    let mut found = Vec::new();
    for vif in pool.records_of::<Vif>(&vm.vifs)? {
        let network: Record<Network> = pool.record(&vif.network)?;
        let pif = network.pifs.iter().find_map(Ref::known);
        let vlan = pif.map(|pif| pool.record::<Pif>(pif)).transpose()?.map(|pif| pif.vlan);
        found.push(Interface { vif, network, vlan });
    }
    Ok(found)
}

/// Whether a device is a disk that is there, not a drive or an empty place.
pub fn is_disk(device: &Record<Vbd>) -> bool {
    device.r#type == "Disk" && device.vdi.known().is_some()
}

/// Returns the uuid of a disk.
///
/// # Errors
/// That it is none.
pub fn uuid_of(vdi: &Vdi) -> Result<Uuid> {
    Uuid::try_parse(&vdi.uuid).map_err(|_| {
        let message = format!("the pool says '{}' of a disk where a uuid was expected", vdi.uuid.escape_debug());
        Error::new(ErrorKind::Pool(xapi::ErrorKind::Protocol), message)
    })
}

/// Returns what the guest calls a disk; one that was never started has only a place.
fn device_name(device: &Vbd) -> String {
    if !device.device.is_empty() {
        return device.device.clone();
    }
    match device.userdevice.parse::<u8>() {
        Ok(place @ 0..26) => format!("xvd{}", char::from(b'a' + place)),
        _ => format!("disk{}", device.userdevice.escape_debug()),
    }
}

/// Returns the snapshots of ours, oldest first, of those that were `taken` of a VM, or what is left of them.
///
/// What has the entries of one of ours, and is another object, is somebody else's. Each snapshot is one of its own.
fn snapshots(pool: &Pool, vm: &Record<Vm>, taken: &[Record<Vm>], disks: &[LiveDisk]) -> Result<Vec<OurSnapshot>> {
    let told: BTreeMap<Uuid, Vec<Uuid>> = keys::left_disks(&vm.other_config).collect();
    let said_of = |vdi: &Record<Vdi>| Keys::parse(&vdi.other_config).filter(|keys| keys.vm == vm.uuid);
    let ours = |keys: Keys, snapshot: Option<Ref<Vm>>, disks: Vec<Record<Vdi>>| {
        let is_told = told.contains_key(&keys.run);
        OurSnapshot { keys, vm: snapshot, is_told, disks }
    };
    let (mut found, mut seen): (Vec<OurSnapshot>, BTreeSet<Ref<Vdi>>) = (Vec::new(), BTreeSet::new());
    for snapshot in taken {
        let is_of_it = snapshot.is_a_snapshot && snapshot.snapshot_of == vm.reference;
        let is_ours = is_of_it && keys::is_itself(&snapshot.uuid, &snapshot.other_config);
        let Some(keys) = Keys::parse(&snapshot.other_config).filter(|keys| is_ours && keys.vm == vm.uuid) else {
            continue;
        };
        let devices: Vec<Record<Vbd>> = pool.records_of(&snapshot.vbds)?;
        let of_it: BTreeSet<&Ref<Vdi>> = devices.iter().filter(|vbd| is_disk(vbd)).map(|vbd| &vbd.vdi).collect();
        let mut its: Vec<Record<Vdi>> = pool.records_of(of_it)?;
        // By the snapshot that has it a disk is known, too, which has another uuid since its storage was changed.
        its.retain(|vdi| vdi.is_a_snapshot && said_of(vdi).is_some_and(|of| of.run == keys.run));
        seen.extend(its.iter().map(|vdi| vdi.reference.clone()));
        found.push(ours(keys, Some(snapshot.reference.clone()), its));
    }
    // What no snapshot has any more is known by its own uuid alone.
    let of_disks: BTreeSet<&Ref<Vdi>> = disks.iter().flat_map(|disk| &disk.vdi.snapshots).collect();
    let mut others: Vec<Record<Vdi>> = pool.records_of(of_disks.into_iter().filter(|vdi| !seen.contains(vdi)))?;
    // Of disks that the VM has no more.
    for uuid in told.values().flatten().map(Uuid::to_string) {
        match pool.by_uuid::<Vdi>(&uuid).and_then(|vdi| pool.record(&vdi)) {
            Err(error) if error.is_gone() => {}
            vdi => others.push(vdi?),
        }
    }
    for vdi in others {
        let Some(keys) = said_of(&vdi).filter(|_| vdi.is_a_snapshot && keys::is_itself(&vdi.uuid, &vdi.other_config))
        else {
            continue;
        };
        if !seen.insert(vdi.reference.clone()) {
            continue;
        }
        match found.iter_mut().find(|snapshot| snapshot.keys.run == keys.run) {
            Some(snapshot) => snapshot.disks.push(vdi),
            None => found.push(ours(keys, None, vec![vdi])),
        }
    }
    // A snapshot is stored if all that is left of it says so: the last of it is told last.
    for snapshot in &mut found {
        let says_so = |vdi: &Record<Vdi>| Keys::parse(&vdi.other_config).is_some_and(|keys| keys.is_stored);
        snapshot.keys.is_stored = !snapshot.disks.is_empty() && snapshot.disks.iter().all(says_so);
    }
    found.sort_by_key(|snapshot| (snapshot.keys.datetime.clone(), snapshot.keys.run));
    Ok(found)
}
