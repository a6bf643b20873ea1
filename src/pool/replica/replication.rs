//! A replica of one machine on one SR, for one run: what an ingest asks of it.
//!
//! ```text
//! each disk: what the version holds that it is relative to is cloned, or an empty disk made, and is itself ─► its blocks ─► what it holds
//! commit:    the machine, unchanged since, or a new one ─► gets these disks for those it has ─► snapshot, marked ─► mark away
//!                                                                              what is whole: the commit ─────────────┘
//! ```
//!
//! So nothing that the machine has is written to, and whatever ends a run before the commit, all of the state before is there:
//! `settle` connects it again. What is built upon is a snapshot, which nobody can change, so the machine need not be believed.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use uuid::Uuid;
use xapi::record::{Sr, Vbd, Vdi, Vm};
use xapi::{Pool, Record, Ref};

use super::archive::ArchiveSending;
use super::found::{Found, Version, VersionDisk};
use super::machine::{self, name_of, set_itself};
use super::marks::{
    self, BLOCKED, CLONING, CONTENT, Identity, Kind, NUMBER, REPLACED, REPLICATING, RUN, SCHEDULE, SIZE, TIME,
    schedule_of,
};
use super::sending::DiskSending;
use super::settle::{destroy_with_disks, settle};
use super::source::Source;
use super::{Place, SrAddress, mark};
use crate::ingest::{self, Replica, ReplicaArchive, ReplicaBase, ReplicaBlock, ReplicaDisk, ReplicaSink};
use crate::pool::error::{Error, ErrorKind, Result};
use crate::pool::journal::{Act, Begun};
use crate::pool::restore::places::{Need, rooms};
use crate::pool::survey::{self, LiveDisk, Survey};
use crate::pool::{ExplainedReplica, cleanup, subjects};
use crate::probe::Subject;
use crate::repository::BackupTime;

/// Bytes of a block.
const BLOCK: u64 = 2 << 20;

/// A replica, as this run sees it.
pub struct Replication {
    place: Arc<Place>,
    identity: Identity,
    /// The schedule of what is made.
    schedule: String,
    found: Found,
    /// The snapshots that the disks of the machine can be read relative to.
    kept: BTreeSet<Uuid>,
    source: OnceLock<Source>,
    progress: Arc<Mutex<Progress>>,
}

/// How far it came.
#[derive(Default)]
pub struct Progress {
    /// Once something was announced that is not settled.
    begun: Option<Begun>,
    /// The disks that were made, by those that they are replicas of.
    disks: BTreeMap<Uuid, Ref<Vdi>>,
    /// What an XVA became.
    pub machine: Option<Ref<Vm>>,
    /// What a person should know.
    remarks: Vec<String>,
}

impl Replication {
    /// Looks at what there is. `kept` are the snapshots that disks can be read relative to.
    ///
    /// # Errors
    /// What the pool says.
    pub fn begin(place: Arc<Place>, identity: Identity, schedule: &str, kept: BTreeSet<Uuid>) -> Result<Self> {
        let found = Found::of(&place.pool, &identity)?;
        Ok(Self {
            place,
            identity,
            schedule: schedule.to_owned(),
            found,
            kept,
            source: OnceLock::new(),
            progress: Arc::default(),
        })
    }

    /// Tells what the machine is, once its snapshot was taken.
    pub fn describe(&self, source: Source) {
        let _said_before = self.source.set(source);
    }

    /// Returns what a person should know of what was done, in sentences, once.
    pub fn remarks(&self) -> Vec<String> {
        std::mem::take(&mut self.progress().remarks)
    }

    fn say(&self, sentence: &str) {
        self.progress().remarks.push(format!("{}: {sentence}", self.place.name));
    }

    /// Says what becomes of it.
    ///
    /// # Errors
    /// What the pool says.
    pub fn explain(&self, survey: &Survey, disks: &[&LiveDisk]) -> Result<ExplainedReplica> {
        let sr: Record<Sr> = self.place.pool.record(&self.place.sr.reference)?;
        let storage = survey::storage_of(&sr);
        let machine = match self.identity.kind {
            Kind::Increments => self.found.machine(&self.place.pool)?,
            Kind::Full => Err("each full backup becomes one of its own".to_owned()),
        };
        let base = |disk: &LiveDisk| self.found.base(disk.uuid, disk.vdi.virtual_size, &self.kept);
        let whole = survey.wanted().filter(|disk| self.identity.kind == Kind::Full || base(disk).is_err());
        let needs = whole.map(|disk| Need { size: disk.vdi.virtual_size, written: disk.vdi.virtual_size });
        let takes = rooms(needs.map(|need| (&storage, need))).iter().map(|room| room.takes).sum();
        let of_disk = |disk: &&LiveDisk| (disk.name.clone(), base(disk).map(|known| known.time.clone()));
        Ok(ExplainedReplica {
            name: self.place.name.clone(),
            machine: machine.map(|(vm, _)| (vm.name_label.clone(), vm.uuid.clone())),
            disks: disks.iter().map(of_disk).collect(),
            states: self.found.versions.len(),
            takes,
            free: storage.free(),
        })
    }

    fn mark(&self) -> String {
        mark(&self.place.mark, &self.identity.sr)
    }

    fn source(&self) -> Result<&Source> {
        let nothing = || Error::new(ErrorKind::Backup, "nothing is known of the VM that is to be replicated");
        self.source.get().ok_or_else(nothing)
    }

    fn progress(&self) -> std::sync::MutexGuard<'_, Progress> {
        self.progress.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Says durably that something is about to be made.
    fn announce(&self) -> Result<()> {
        let is_announced = self.progress().begun.is_some();
        if !is_announced {
            let begun = self.place.journal.tell(Act::Replica { sr: self.identity.sr.clone() })?;
            self.progress().begun = Some(begun);
        }
        Ok(())
    }

    fn open_disk(&self, disk: &ReplicaDisk) -> Result<DiskSink> {
        let pool = &self.place.pool;
        self.announce()?;
        let before = self.progress().disks.remove(&disk.vdi);
        if let Some(before) = before {
            pool.destroy_vdi(&before)?;
        }
        self.check_room(disk.size, u64::try_from(disk.blocks.len()).unwrap_or(u64::MAX).saturating_mul(BLOCK))?;
        let of = self.source()?.disks.iter().find(|known| known.uuid == disk.vdi);
        let of = of.ok_or_else(|| Error::new(ErrorKind::Backup, format!("disk {} is none of the VM", disk.vdi)))?;
        let vdi = match disk.base {
            None => {
                let sr = self.place.sr.reference.as_str();
                let vdi = pool.create_vdi(&machine::disk(of, sr, disk.size, &self.identity, &self.mark()))?;
                set_itself(pool, &vdi)?;
                vdi
            }
            Some(base) => {
                let gone =
                    || Error::new(ErrorKind::Backup, format!("the replica holds nothing of the snapshot {base}"));
                self.clone_disk(&self.found.holds(base).ok_or_else(gone)?.vdi)?
            }
        };
        self.progress().disks.insert(disk.vdi, vdi.clone());
        if disk.base.is_some() {
            pool.set(&vdi, "name_label", of.vdi.get("name_label").cloned().unwrap_or_default())?;
        }
        if pool.record(&vdi)?.virtual_size < disk.size {
            pool.resize_vdi(&vdi, disk.size)?;
        }
        let holds = [(CONTENT, disk.snapshot.to_string()), (SIZE, disk.size.to_string())];
        Ok(DiskSink { pool: pool.clone(), sending: DiskSending::begin(pool, &vdi, disk)?, vdi, holds })
    }

    /// Makes a disk of what a snapshot holds.
    fn clone_disk(&self, snapshot: &Record<Vdi>) -> Result<Ref<Vdi>> {
        let (pool, mark) = (&self.place.pool, self.mark());
        // So whoever comes after a run that died knows what it is, from its first moment on.
        pool.set_entry(&snapshot.reference, "other_config", CLONING, &mark)?;
        let clone = pool.clone_vdi(&snapshot.reference);
        pool.with(&cleanup()).remove_entry(&snapshot.reference, "other_config", CLONING)?;
        let clone = clone?;
        pool.set_entry(&clone, "other_config", REPLICATING, &mark)?;
        set_itself(pool, &clone)?;
        for entry in [CLONING, CONTENT, SIZE] {
            pool.remove_entry(&clone, "other_config", entry)?;
        }
        Ok(clone)
    }

    /// Refuses what there is no room for.
    fn check_room(&self, size: u64, written: u64) -> Result<()> {
        let sr: Record<Sr> = self.place.pool.record(&self.place.sr.reference)?;
        let storage = survey::storage_of(&sr);
        let rooms = rooms([(&storage, Need { size, written })]);
        if let Some(room) = rooms.iter().find(|room| !room.is_enough()) {
            let (name, free) = (storage.name.escape_debug(), storage.free());
            let message = format!("the SR '{name}' has {free} bytes free, and {} are needed: free some", room.takes);
            return Err(Error::new(ErrorKind::Room, message));
        }
        Ok(())
    }

    fn publish(&self, time: &str) -> Result<String> {
        let name = name_of(&self.source()?.name, &self.identity.job, time);
        let version = match self.identity.kind {
            Kind::Increments => self.publish_increment(&name, time)?,
            Kind::Full => self.publish_machine(&name, time)?,
        };
        // It is there. What is left to be done is done by the next run, if it cannot be done now.
        let pool = self.place.pool.with(&cleanup());
        match settle(&pool, &self.mark()) {
            Ok(()) => self.over(),
            Err(error) => self.say(&format!("not all is tidied up: the next run does that ({error})")),
        }
        self.forget(&pool);
        Ok(format!("'{name}' ({version})"))
    }

    /// Gives the machine the new disks, and takes a snapshot of it. Returns its uuid.
    fn publish_increment(&self, name: &str, time: &str) -> Result<String> {
        let (pool, source, mark) = (&self.place.pool, self.source()?, self.mark());
        let say = |sentence: &str| self.say(sentence);
        let vm = match self.found.machine(pool)? {
            Ok((vm, newest)) => {
                pool.set_entry(&vm.reference, "other_config", REPLICATING, &mark)?;
                for disk in &newest.disks {
                    pool.set_entry(&disk.vdi.snapshot_of, "other_config", REPLACED, &mark)?;
                }
                machine::disconnect(pool, &vm)?;
                machine::bring_up_to_date(pool, &vm, source, &say)?;
                vm.reference
            }
            Err(why) => {
                if self.found.is_known() {
                    say(&format!("a new VM is made, the replica before stays as it is: {why}"));
                }
                machine::create(pool, source, &self.identity, name, &mark, &say)?
            }
        };
        let disks = self.progress().disks.clone();
        for disk in &source.disks {
            let gone = || Error::new(ErrorKind::Backup, format!("disk {} was not replicated", disk.uuid));
            machine::connect(pool, &vm, disk, disks.get(&disk.uuid).ok_or_else(gone)?)?;
        }
        let turn = self.place.turns.snapshot(&self.place.id, pool.cancel(), &say)?;
        let snapshot = pool.snapshot_vm(&vm, &mark, &[])?;
        drop(turn);
        let record: Record<Vm> = pool.record(&snapshot)?;
        let devices: Vec<Record<Vbd>> = pool.records_of(&record.vbds)?;
        let taken =
            pool.records_of::<Vdi>(devices.iter().filter(|device| survey::is_disk(device)).map(|device| &device.vdi))?;
        let of: BTreeSet<&Ref<Vdi>> = taken.iter().map(|disk| &disk.snapshot_of).collect();
        if of != disks.values().collect() {
            let message =
                "the snapshot of the replica has other disks than it was given: somebody changed it meanwhile";
            return Err(Error::new(ErrorKind::Pool(xapi::ErrorKind::Protocol), message));
        }
        for disk in &taken {
            set_itself(pool, &disk.reference)?;
        }
        self.seal(&snapshot, name, time)?;
        pool.set(&vm, "name_label", name).unwrap_or_else(|error| say(&format!("it is not renamed: {error}")));
        Ok(record.uuid.clone())
    }

    /// Makes the machine of an XVA the newest state. Returns its uuid.
    fn publish_machine(&self, name: &str, time: &str) -> Result<String> {
        let pool = &self.place.pool;
        let none = || Error::new(ErrorKind::Backup, "no XVA came");
        let vm = self.progress().machine.clone().ok_or_else(none)?;
        let record: Record<Vm> = pool.record(&vm)?;
        let devices: Vec<Record<Vbd>> = pool.records_of(&record.vbds)?;
        for device in devices.iter().filter(|device| survey::is_disk(device)) {
            for (entry, value) in self.identity.entries() {
                pool.set_entry(&device.vdi, "other_config", entry, &value)?;
            }
        }
        for (entry, value) in self.identity.entries() {
            pool.set_entry(&vm, "other_config", entry, &value)?;
        }
        self.seal(&vm, name, time)?;
        Ok(record.uuid.clone())
    }

    /// Makes a snapshot, or a machine, a whole state: the commit is that the mark goes.
    fn seal(&self, version: &Ref<Vm>, name: &str, time: &str) -> Result<()> {
        let pool = &self.place.pool;
        let number = self.found.versions.first().map_or(0, |newest| newest.number).saturating_add(1);
        for (entry, value) in [
            (NUMBER, number.to_string()),
            (TIME, time.to_owned()),
            (SCHEDULE, self.schedule.clone()),
            (RUN, self.mark()),
        ] {
            pool.set_entry(version, "other_config", entry, &value)?;
        }
        set_itself(pool, version)?;
        pool.set(version, "name_label", name)?;
        Ok(pool.remove_entry(version, "other_config", REPLICATING)?)
    }

    /// Destroys the oldest states that are too many of this schedule. What somebody uses is left alone, and said.
    fn forget(&self, pool: &Pool) {
        let of_schedule = |version: &&Version| schedule_of(&version.vm) == self.schedule;
        for version in self.found.versions.iter().filter(of_schedule).skip(self.place.keep.saturating_sub(1)) {
            if let Err(error) = self.forget_one(pool, &version.vm) {
                let shown = version.vm.name_label.escape_debug();
                self.say(&format!("the old state '{shown}' stays: {error}"));
            }
        }
    }

    fn forget_one(&self, pool: &Pool, vm: &Record<Vm>) -> Result<()> {
        let vm: Record<Vm> = match pool.record(&vm.reference) {
            Err(error) if error.is_gone() => return Ok(()),
            vm => vm?,
        };
        let is_used = self.identity.kind == Kind::Full
            && (vm.power_state != "Halted" || BLOCKED[..2].iter().any(|act| !vm.blocked_operations.contains_key(*act)));
        if self.identity.number_of(&vm).is_none() || is_used {
            return Err(Error::new(ErrorKind::Usage, "somebody uses it, or changed what it says of itself"));
        }
        let is_snapshot = vm.is_a_snapshot;
        destroy_with_disks(pool, &vm, |vdi| {
            marks::is_itself(&vdi.uuid, &vdi.other_config) && vdi.is_a_snapshot == is_snapshot
        })
    }

    /// Says that nothing is left to be undone.
    fn over(&self) {
        if let Some(begun) = self.progress().begun.take() {
            self.place.journal.over(begun);
        }
    }
}

impl Replica for Replication {
    fn name(&self) -> &str {
        &self.place.name
    }

    fn subject(&self) -> Subject {
        let pool = self.place.name.parse::<SrAddress>().ok().and_then(|address| address.pool);
        Subject { pool, ..subjects::sr(&self.place.sr) }
    }

    fn base_of(&self, vdi: Uuid, size: u64) -> ingest::Result<std::result::Result<ReplicaBase, String>> {
        let base = |known: &VersionDisk| ReplicaBase { snapshot: known.content, size: known.size };
        Ok(self.found.base(vdi, size, &self.kept).map(base))
    }

    fn open(&self, disk: &ReplicaDisk) -> ingest::Result<Box<dyn ReplicaSink>> {
        Ok(Box::new(self.open_disk(disk).map_err(of_pool)?))
    }

    fn open_archive(&self, size: Option<u64>) -> ingest::Result<Box<dyn ReplicaArchive>> {
        let open = || -> Result<ArchiveSending> {
            self.announce()?;
            let bytes = size.unwrap_or(0);
            self.check_room(bytes, bytes)?;
            ArchiveSending::begin(&self.place.pool, &self.place.sr.reference, &self.mark(), self.progress.clone())
        };
        Ok(Box::new(open().map_err(of_pool)?))
    }

    fn commit(&self, time: BackupTime) -> ingest::Result<String> {
        self.publish(&time.stored().to_string()).map_err(of_pool)
    }

    fn undo(&self) -> ingest::Result<()> {
        if self.progress().begun.is_none() {
            return Ok(());
        }
        // Whatever ended it.
        settle(&self.place.pool.with(&cleanup()), &self.mark()).map_err(of_pool)?;
        self.over();
        Ok(())
    }
}

/// A replica that cannot be reached: it fails, and the other destinations go on.
pub struct Absent {
    /// As it was named.
    pub name: String,
    /// Why.
    pub error: Error,
}

impl Replica for Absent {
    fn name(&self) -> &str {
        &self.name
    }

    fn base_of(&self, _: Uuid, _: u64) -> ingest::Result<std::result::Result<ReplicaBase, String>> {
        Err(of_pool(self.error.clone()))
    }

    fn open(&self, _: &ReplicaDisk) -> ingest::Result<Box<dyn ReplicaSink>> {
        Err(of_pool(self.error.clone()))
    }

    fn open_archive(&self, _: Option<u64>) -> ingest::Result<Box<dyn ReplicaArchive>> {
        Err(of_pool(self.error.clone()))
    }

    fn commit(&self, _: BackupTime) -> ingest::Result<String> {
        Err(of_pool(self.error.clone()))
    }

    fn undo(&self) -> ingest::Result<()> {
        Ok(())
    }
}

/// A disk on its way.
struct DiskSink {
    pool: Pool,
    vdi: Ref<Vdi>,
    /// What it will say to hold.
    holds: [(&'static str, String); 2],
    sending: DiskSending,
}

impl DiskSink {
    fn end(self) -> Result<String> {
        self.sending.finish()?;
        for (entry, value) in &self.holds {
            self.pool.set_entry(&self.vdi, "other_config", entry, value)?;
        }
        let uuid: String = self.pool.field(&self.vdi, "uuid")?;
        Ok(uuid)
    }
}

impl ReplicaSink for DiskSink {
    fn write(&mut self, block: &ReplicaBlock) -> ingest::Result<()> {
        self.sending.block(block).map_err(of_pool)
    }

    fn finish(self: Box<Self>) -> ingest::Result<String> {
        self.end().map_err(of_pool)
    }
}

/// Returns what an ingest makes of an error.
pub fn of_pool(error: Error) -> ingest::Error {
    let kind = match error.kind() {
        ErrorKind::Interrupted => ingest::ErrorKind::Interrupted,
        ErrorKind::Room => ingest::ErrorKind::NoRoom,
        _ => ingest::ErrorKind::Repository(crate::repository::ErrorKind::Unavailable),
    };
    ingest::Error::new(kind, error.to_string())
}
