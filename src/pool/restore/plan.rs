//! What a restore will make, decided and checked before anything is made: what `--explain` says, and what is then done.

use std::sync::Arc;

use disk::Disk;
use uuid::Uuid;
use vhd::{ChainDigests, VhdView};
use xapi::record::{Sr, Vm};
use xapi::{Pool, Record};

use super::document::{Document, Fields, StoredDisk, text};
use super::lineage::{self, Base};
use super::networks::{self, Interface, Macs, Wish};
use super::places::{Need, Room, rooms};
use super::records;
use super::target::Target;
use crate::ingest::StoredArchive;
use crate::pool::error::{Error, ErrorKind, Result};
use crate::pool::room::Storage;
use crate::pool::survey;
use crate::probe::Subject;
use crate::repository::{self, Backup, DiskSource, Mode, Repository};

/// Seconds from 1970 to 2000 (VHD specification 1.0, "Time Stamp").
const VHD_EPOCH: i64 = 946_684_800;

/// What was asked for.
#[derive(Debug, Clone)]
pub struct Options {
    /// The SR of disks that nothing else is said of; the pool's default without.
    pub storage: Option<String>,
    /// The SRs of single disks, by the names that the guest has for these.
    pub storages_of: Vec<(String, String)>,
    /// Networks.
    pub networks: Vec<Wish>,
    /// MACs.
    pub macs: Macs,
    /// The name of the VM or of the only disk; as in the backup without.
    pub name: Option<String>,
    /// Whether snapshots that the pool has are what differs is sent onto.
    pub uses_snapshots: bool,
    /// Whether the memory of a suspended VM may be left out.
    pub leaves_memory: bool,
    /// Whether each disk is read back.
    pub verifies: bool,
    /// Whether the VM is started.
    pub starts: bool,
    /// How many disks are sent at the same time.
    pub at_once: usize,
    /// The repository, for who asks where the time goes.
    pub from: Subject,
}

/// What will be made.
pub struct Plan {
    /// The backup, for people.
    pub source: String,
    /// The backup, as `uuid/time`.
    pub from: String,
    /// What it will be called.
    pub name: String,
    /// What it is.
    pub what: What,
    /// What a person should know.
    pub remarks: Vec<String>,
}

/// What is made.
pub enum What {
    /// A VM with its disks.
    Machine(Box<Machine>),
    /// A disk alone, for a VM that is there if one is named.
    Disk(Box<PlannedDisk>, Option<Box<Record<Vm>>>),
    /// Whatever an XVA holds.
    Archive(Box<Archive>),
}

/// A VM.
pub struct Machine {
    /// Its record in the backup.
    pub vm: Fields,
    /// Whether what MACs are made of stays.
    pub keeps_macs: bool,
    /// Its network interfaces.
    pub interfaces: Vec<Interface>,
    /// What its virtual TPMs hold.
    pub vtpms: Vec<String>,
    /// Its disks.
    pub disks: Vec<PlannedDisk>,
}

/// A disk.
pub struct PlannedDisk {
    /// As the guest sees it.
    pub name: String,
    /// What it will be called in the pool.
    pub label: String,
    /// In bytes.
    pub size: u64,
    /// Where it goes.
    pub storage: Record<Sr>,
    /// The snapshot it is made of; none if all of it is sent.
    pub base: Option<Base>,
    /// Its record in the backup.
    pub vdi: Fields,
    /// What connected it.
    pub vbds: Vec<Fields>,
    /// Its bytes.
    pub disk: Arc<dyn Disk>,
    /// What is sent of them.
    pub image: VhdView,
    /// What is known of them.
    pub known: Option<ChainDigests>,
}

/// A full backup.
pub struct Archive {
    /// Its XVA.
    pub xva: StoredArchive,
    /// Where its disks go.
    pub storage: Record<Sr>,
    /// The networks that were asked for.
    pub networks: Vec<Wish>,
}

impl Plan {
    /// Returns the disks of which it is known what they are.
    pub fn disks(&self) -> &[PlannedDisk] {
        match &self.what {
            What::Machine(machine) => &machine.disks,
            What::Disk(disk, _) => std::slice::from_ref(disk),
            What::Archive(_) => &[],
        }
    }

    /// Returns how many bytes are sent, without what is around them.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        match &self.what {
            What::Archive(archive) => archive.xva.size(),
            _ => self.disks().iter().map(|disk| disk.image.payload()).sum(),
        }
    }
}

/// Returns what all plans together take of each SR.
pub fn room<'a>(plans: impl IntoIterator<Item = &'a Plan>) -> Vec<Room> {
    let mut needs: Vec<(Storage, Need)> = Vec::new();
    for plan in plans {
        for disk in plan.disks() {
            let need = Need { size: disk.size, written: disk.image.payload() };
            needs.push((survey::storage_of(&disk.storage), need));
        }
        if let What::Archive(archive) = &plan.what {
            // What is in it is known for sure only to the pool: at least its bytes.
            let bytes = archive.xva.size();
            needs.push((survey::storage_of(&archive.storage), Need { size: bytes, written: bytes }));
        }
    }
    rooms(needs.iter().map(|(storage, need)| (storage, *need)))
}

/// What plans are made from.
pub struct Planner<'a> {
    /// The pool.
    pub pool: &'a Pool,
    /// The repository.
    pub repository: &'a Repository,
    /// What was asked for.
    pub options: &'a Options,
    /// What the pool has, and what earlier plans will add to it.
    pub target: Target,
}

impl Planner<'_> {
    /// Plans the VM of a backup.
    ///
    /// # Errors
    /// What keeps it from being restored.
    pub fn machine(&mut self, vm: &repository::Vm, backup: &Backup) -> Result<Plan> {
        let document = self.document(backup)?;
        let mut remarks = Vec::new();
        let name = self.free_name(&document, backup, &mut remarks)?;
        let plan = |what, remarks| {
            let source = format!("{}/{}", if vm.name.is_empty() { vm.id.as_str() } else { &vm.name }, backup.time);
            Plan { source, from: backup.id().to_string(), name, what, remarks }
        };
        if backup.mode == Mode::Full {
            let archive = self.archive(&document, backup, &mut remarks)?;
            return Ok(plan(What::Archive(Box::new(archive)), remarks));
        }
        if document.disks.is_empty() {
            let why = backup.problem.as_deref().unwrap_or("it has no disks");
            return Err(Error::new(ErrorKind::Backup, format!("the backup cannot be restored: {why}")));
        }
        if document.disks.iter().any(|disk| disk.is_memory) {
            if !self.options.leaves_memory {
                let message = "the backup has the memory of a suspended VM, which is not restored: with --without-memory its \
                               disks are, and it starts as after a power failure";
                return Err(Error::new(ErrorKind::Usage, message));
            }
            remarks.push("the memory of the suspended VM is left out: it starts as after a power failure".to_owned());
        }
        for (wanted, _) in &self.options.storages_of {
            if !document.disks.iter().any(|disk| disk.disk.name == *wanted) {
                return Err(no_such_disk(wanted, backup));
            }
        }
        let disks = document.disks.iter().filter(|disk| !disk.is_memory);
        let disks = disks.map(|stored| self.disk(stored, backup, &mut remarks)).collect::<Result<Vec<_>>>()?;
        let networks = &self.target.networks;
        let interfaces =
            networks::choose(&document.vifs, networks, &self.options.networks, self.options.macs, &self.target.macs)?;
        for interface in &interfaces {
            match &interface.network {
                Err(why) => remarks.push(format!(
                    "the interface {} on '{}' is left out: {why}; name another network with --network",
                    interface.device.escape_debug(),
                    interface.old.escape_debug()
                )),
                Ok(_) if interface.mac.is_empty() && self.options.macs == Macs::KeptIfFree => remarks.push(format!(
                    "the interface {} gets a new MAC: the pool has its old one already (--keep-mac keeps it)",
                    interface.device.escape_debug()
                )),
                Ok(_) => {}
            }
        }
        self.target.macs.extend(interfaces.iter().map(|interface| interface.mac.to_ascii_lowercase()));
        let lost = document.vtpms.iter().filter(|contents| contents.is_none()).count();
        if lost > 0 {
            remarks
                .push("the virtual TPM is left out: what it held could not be read when it was backed up".to_owned());
        }
        let keeps_macs = interfaces.iter().all(|interface| !interface.mac.is_empty());
        let vtpms = document.vtpms.into_iter().flatten().collect();
        let machine = Machine { vm: document.vm, keeps_macs, interfaces, vtpms, disks };
        // What it lacks is known before anything is made.
        let mark = records::Mark { restoring: String::new(), from: String::new() };
        records::machine(&machine.vm, "", &mark, keeps_macs)?;
        Ok(plan(What::Machine(Box::new(machine)), remarks))
    }

    /// Plans one disk, which a VM that is there gets if one is named.
    ///
    /// # Errors
    /// What keeps it from being restored.
    pub fn only_disk(
        &mut self,
        vm: &repository::Vm,
        backup: &Backup,
        name: &str,
        attach_to: Option<&str>,
    ) -> Result<Plan> {
        let document = self.document(backup)?;
        let stored = document.disk(name, backup).ok_or_else(|| no_such_disk(name, backup))?;
        let mut remarks = Vec::new();
        let mut disk = self.disk(&stored, backup, &mut remarks)?;
        if let Some(label) = &self.options.name {
            disk.label.clone_from(label);
        }
        let machine = attach_to.map(|named| survey::find(self.pool, named)).transpose()?.map(Box::new);
        let of = if vm.name.is_empty() { vm.id.as_str() } else { &vm.name };
        Ok(Plan {
            source: format!("{of}/{}/{name}", backup.time),
            from: backup.id().to_string(),
            name: disk.label.clone(),
            what: What::Disk(Box::new(disk), machine),
            remarks,
        })
    }

    fn document(&self, backup: &Backup) -> Result<Document> {
        if backup.mode == Mode::Unreadable {
            let why = backup.problem.as_deref().unwrap_or("its metadata cannot be read");
            return Err(Error::new(ErrorKind::Backup, format!("the backup cannot be restored: {why}")));
        }
        Document::parse(&self.repository.backup_metadata(backup)?, backup)
    }

    /// Returns what the VM will be called: as in the backup, with its time if the pool has a VM of this name.
    fn free_name(&self, document: &Document, backup: &Backup, remarks: &mut Vec<String>) -> Result<String> {
        if let Some(name) = &self.options.name {
            return Ok(name.clone());
        }
        let name = document.name();
        let there = self.pool.by_name::<Vm>(name)?;
        let there = self.pool.records_of::<Vm>(&there)?;
        if !there.iter().any(|vm| !vm.is_a_snapshot && !vm.is_a_template) {
            return Ok(name.to_owned());
        }
        let name = format!("{name} ({})", backup.time);
        remarks.push(format!("the pool has a VM of this name: the restored one is called '{}'", name.escape_debug()));
        Ok(name)
    }

    fn archive(&self, document: &Document, backup: &Backup, remarks: &mut Vec<String>) -> Result<Archive> {
        let path = document.xva.clone();
        let path = path.ok_or_else(|| Error::new(ErrorKind::Backup, "its metadata does not say where its XVA is"))?;
        let storage = self.target.storage(self.options.storage.as_deref())?.clone();
        if !self.options.storages_of.is_empty() {
            let message = "a full backup goes to one SR as a whole: give --sr, not --sr-of";
            return Err(Error::new(ErrorKind::Usage, message));
        }
        if self.options.macs == Macs::Kept {
            return Err(Error::new(
                ErrorKind::Usage,
                "of a full backup the pool itself chooses the MACs: leave --keep-mac out",
            ));
        }
        for wish in &self.options.networks {
            networks::named(&self.target.networks, &wish.new)?;
        }
        if self.options.verifies {
            remarks.push(
                "a full backup is not read back: the pool compares the checksums in the XVA as it takes it".to_owned(),
            );
        }
        let xva = StoredArchive::open(self.repository.storage().clone(), path, backup.size)?;
        Ok(Archive { xva, storage, networks: self.options.networks.clone() })
    }

    fn disk(&self, stored: &StoredDisk, backup: &Backup, remarks: &mut Vec<String>) -> Result<PlannedDisk> {
        let name = stored.disk.name.clone();
        let shown = name.escape_debug().to_string();
        if let DiskSource::Unusable(reason) = &stored.disk.source {
            return Err(Error::new(ErrorKind::Damaged, format!("disk {shown}: {reason}")));
        }
        let act = format!("open disk {shown}");
        let disk =
            self.repository.open_disk(backup, &stored.disk).map_err(|error| Error::from(error).while_doing(&act))?;
        let size = disk.size().next_multiple_of(vhd::SECTOR);
        if size > VhdView::MAX_SIZE {
            let message = format!(
                "disk {shown} has {size} bytes, and the VHDs that pools take have at most {}: write it onto a disk of the pool \
                 from a VM there ('xofs export ... --output /dev/xvdX')",
                VhdView::MAX_SIZE
            );
            return Err(Error::new(ErrorKind::Backup, message));
        }
        let of_disk = self.options.storages_of.iter().find(|(of, _)| *of == name).map(|(_, sr)| sr.as_str());
        let wanted = of_disk.or(self.options.storage.as_deref());
        let base = match self.options.uses_snapshots {
            false => None,
            true => match lineage::find(self.pool, self.repository, backup, &stored.disk, size)? {
                Ok(base) => self.on_wanted(base, wanted, &shown, remarks)?,
                Err(why) => {
                    remarks.push(format!("disk {shown} is sent as a whole: {why}"));
                    None
                }
            },
        };
        let storage = match &base {
            Some(base) => self.target.storage_of(&base.vdi.sr),
            None => Some(self.target.storage(wanted)?),
        };
        let gone = || Error::new(ErrorKind::Pool(xapi::ErrorKind::Gone), "the SR of a snapshot is gone");
        let storage = storage.ok_or_else(gone)?.clone();
        let timestamp = u32::try_from(backup.time.unix() - VHD_EPOCH).unwrap_or(0);
        let leaf = self.repository.leaf(backup, &stored.disk)?;
        let uuid = leaf.map(|leaf| leaf.uuid).or(stored.disk.vdi).unwrap_or_else(Uuid::nil);
        let image = match &base {
            Some(base) => {
                VhdView::difference(disk.clone(), &base.changed, uuid, survey::uuid_of(&base.vdi)?, timestamp)
            }
            None => VhdView::new(disk.clone(), uuid, timestamp),
        };
        let image = image.map_err(|error| Error::from(error).while_doing(&act))?;
        let known = self.repository.digests(backup, &stored.disk)?;
        let label = text(&stored.vdi, "name_label").filter(|label| !label.is_empty()).unwrap_or(&name).to_owned();
        let (vdi, vbds) = (stored.vdi.clone(), stored.vbds.clone());
        Ok(PlannedDisk { name, label, size, storage, base, vdi, vbds, disk, image, known })
    }

    /// Returns the snapshot if it lies where the disk is wanted: what is made of it lies there, too.
    fn on_wanted(
        &self,
        base: Base,
        wanted: Option<&str>,
        disk: &str,
        remarks: &mut Vec<String>,
    ) -> Result<Option<Base>> {
        let Some(wanted) = wanted else { return Ok(Some(base)) };
        if self.target.storage(Some(wanted))?.reference == base.vdi.sr {
            return Ok(Some(base));
        }
        remarks.push(format!("disk {disk} is sent as a whole: its snapshot lies on another SR than was asked for"));
        Ok(None)
    }
}

fn no_such_disk(name: &str, backup: &Backup) -> Error {
    let names: Vec<String> = backup.disks.iter().map(|disk| disk.name.escape_debug().to_string()).collect();
    let message = format!("the backup has no disk '{}': it has {}", name.escape_debug(), names.join(", "));
    Error::new(ErrorKind::Usage, message)
}
