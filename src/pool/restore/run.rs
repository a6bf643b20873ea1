//! Doing what was planned.
//!
//! ```text
//! told ─► VM, marked and blocked ─► disks, marked ─► bytes, several at a time ─► read back ─► interfaces, TPM ─► name ─► unblocked ─► marks
//!                └───────────────────────── whatever fails: all of it goes ──────────────────────────────────────┘                  go
//! ```
//!
//! Of an XVA the pool makes the VM and its disks at once: they are blocked and marked then, and until they are, the import's task stays.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use serde_json::json;
use xapi::record::{Network, Sr, Vdi, Vif, Vm};
use xapi::{Pool, Record, Ref};

use super::digests::Digests;
use super::document::{Fields, flag, text};
use super::made;
use super::networks;
use super::parts;
use super::plan::{Archive, Machine, Options, Plan, PlannedDisk, What};
use super::records::{self, BLOCKED, BLOCKED_BECAUSE, Mark, PROVISIONAL, RESTORING, TAG};
use super::target::Target;
use super::transfer::{self, Content, Stages};
use crate::ingest::Watch;
use crate::pool::error::{Error, ErrorKind, Result};
use crate::pool::journal::{Act, Journal};
use crate::pool::limits::{Limits, PoolId, Turn, Turns};
use crate::pool::state::State;
use crate::pool::{cleanup, keys, subjects, sweep};
use crate::probe::{self, Probe, Stage, Subject};

/// Disks as they were planned, and as they were made.
type Disks<'p> = Vec<(&'p PlannedDisk, Record<Vdi>)>;

/// What has no end.
const FOR_EVER: Duration = Duration::MAX;

/// Restores into one pool.
pub struct Run<'a> {
    pool: Pool,
    /// Who answers for it.
    master: Subject,
    state: &'a State,
    journal: Journal,
    id: PoolId,
    options: &'a Options,
    say: &'a (dyn Fn(&str) + Sync),
}

/// What became of a backup.
#[derive(Debug, Clone)]
pub struct Restored {
    /// The uuid of the VM, unless a disk alone was restored.
    pub vm: Option<String>,
    /// What it is called.
    pub name: String,
    /// Its disks; none of a full backup, of which the pool makes what is in it.
    pub disks: Vec<RestoredDisk>,
    /// The checksum of the XVA of a full backup, and its length in bytes.
    pub archive: Option<(String, u64)>,
    /// Where the time went.
    pub transfer: probe::Reading,
}

/// A disk that was restored.
#[derive(Debug, Clone)]
pub struct RestoredDisk {
    /// As the guest sees it.
    pub name: String,
    /// Its uuid in the pool.
    pub uuid: String,
    /// In bytes, as the pool has it.
    pub size: u64,
    /// Bytes of it that were sent, whole blocks.
    pub sent: u64,
    /// The uuid of the snapshot that it was made of.
    pub base: Option<String>,
    /// The digest of what was sent, in hexadecimal; see `digests`.
    pub digest: String,
    /// The digest of all of it as it was read back, the same as the repository's.
    pub verified: Option<String>,
}

impl<'a> Run<'a> {
    /// Begins a run, and undoes what earlier ones left that died.
    ///
    /// # Errors
    /// What the pool says; if the journal cannot be written.
    pub fn begin(pool: Pool, state: &'a State, options: &'a Options, say: &'a (dyn Fn(&str) + Sync)) -> Result<Self> {
        let (pool, journal, of) = sweep::begin(pool, state, say)?;
        let master = subjects::master(&pool, of.as_ref());
        Ok(Self { pool, master, state, journal, id: PoolId::new(of.as_ref()), options, say })
    }

    /// Returns the pool.
    #[must_use]
    pub fn pool(&self) -> &Pool {
        &self.pool
    }

    /// Makes what was planned.
    ///
    /// # Errors
    /// What went wrong; then nothing of it is left, or it is said what the next run will remove.
    pub fn restore(&self, plan: &Plan, watch: &Watch) -> Result<Restored> {
        watch.expect(plan.bytes());
        let mark = Mark { restoring: keys::mark(self.journal.run(), &self.state.keeper()), from: plan.from.clone() };
        let vm = match &plan.what {
            What::Disk(..) => None,
            What::Machine(_) | What::Archive(_) => Some(plan.name.clone()),
        };
        // A clone is called as its snapshot is, until it has its own name.
        let name_of_base = |disk: &PlannedDisk| disk.base.as_ref().map(|base| base.vdi.name_label.clone());
        let disks: Vec<String> =
            plan.disks().iter().flat_map(|disk| [Some(disk.label.clone()), name_of_base(disk)]).flatten().collect();
        let begun = self.journal.tell(Act::Restore { vm: vm.clone(), disks: disks.clone() })?;
        let restored = match &plan.what {
            What::Machine(machine) => self.machine(plan, machine, &mark, watch),
            What::Disk(disk, vm) => self.only_disk(plan, disk, vm.as_deref(), &mark, watch),
            What::Archive(archive) => self.archive(plan, archive, &mark, watch),
        };
        let error = match restored {
            Ok(restored) => {
                self.journal.over(begun);
                return Ok(restored);
            }
            Err(error) => error,
        };
        // Whatever ended it; and what was made though the pool's answer did not come.
        let pool = self.pool.with(&cleanup());
        let undone = made::undo(&pool, &mark.restoring, vm.as_deref(), &disks);
        let undone =
            undone.and_then(|()| sweep::destroy_tasks(&pool, &self.state.keeper(), |run| run == self.journal.run()));
        match undone {
            Ok(()) => self.journal.over(begun),
            Err(left) => (self.say)(&format!("what was made is not all removed: the next run does that ({left})")),
        }
        Err(error)
    }

    fn machine(&self, plan: &Plan, machine: &Machine, mark: &Mark, watch: &Watch) -> Result<Restored> {
        let (prepares, settles) = (self.step(Stage::Prepare, watch), self.step(Stage::Settle, watch));
        let (vm, disks) = prepares.work(|| self.make_machine(plan, machine, mark))?;
        let restored = self.fill(&disks, watch)?;
        let uuid = settles.work(|| self.finish_machine(plan, machine, &vm, &disks))?;
        Ok(self.restored(Some(uuid), plan, restored, None, watch))
    }

    /// Returns the probe of what is asked of the pool before and after the bytes.
    fn step(&self, stage: Stage, watch: &Watch) -> Arc<Probe> {
        watch.transfer().step(stage, &self.master)
    }

    /// Says what was restored, at the end.
    fn restored(
        &self,
        vm: Option<String>,
        plan: &Plan,
        disks: Vec<RestoredDisk>,
        archive: Option<(String, u64)>,
        watch: &Watch,
    ) -> Restored {
        Restored { vm, name: plan.name.clone(), disks, archive, transfer: watch.transfer().reading() }
    }

    /// Makes a VM and its disks, which hold nothing yet.
    fn make_machine<'p>(&self, plan: &Plan, machine: &'p Machine, mark: &Mark) -> Result<(Ref<Vm>, Disks<'p>)> {
        let pool = &self.pool;
        let fields = records::machine(&machine.vm, &plan.name, mark, machine.keeps_macs)?;
        let vm = pool.create_vm(&fields)?;
        parts::block(pool, &vm, &BLOCKED, BLOCKED_BECAUSE)?;
        parts::set_bios_strings(pool, &vm, &machine.vm, self.say)?;
        let mut disks = Vec::with_capacity(machine.disks.len());
        for disk in &machine.disks {
            let vdi = self.make_disk(disk, mark)?;
            self.connect(disk, &vm, &vdi.reference)?;
            disks.push((disk, vdi));
        }
        Ok((vm, disks))
    }

    /// Gives a VM whose disks are whole the rest of what it has. Returns its uuid.
    fn finish_machine(
        &self,
        plan: &Plan,
        machine: &Machine,
        vm: &Ref<Vm>,
        disks: &[(&PlannedDisk, Record<Vdi>)],
    ) -> Result<String> {
        let pool = &self.pool;
        // Of those without a network the plan has told.
        for interface in machine.interfaces.iter().filter(|interface| interface.network.is_ok()) {
            parts::make_interface(pool, vm, interface, self.say)?;
        }
        for contents in &machine.vtpms {
            parts::make_tpm(pool, vm, contents, self.say)?;
        }
        let vm_record: Record<Vm> = pool.record(vm)?;
        pool.set(vm, "name_label", plan.name.as_str())?;
        // From here on it is there: what fails now is said, and nothing is undone.
        self.free(vm, &vm_record.uuid, &records::blocked(&machine.vm))?;
        let finish = || -> Result<()> {
            for (disk, vdi) in disks {
                self.finish_disk(disk, &disk.label, &vdi.reference)?;
            }
            // It leads to what is left of the disks.
            Ok(pool.remove_entry(vm, "other_config", RESTORING)?)
        };
        finish().map_err(|error| unfinished(error, &vm_record.uuid))?;
        self.start(vm, &vm_record.uuid)?;
        Ok(vm_record.uuid.clone())
    }

    fn only_disk(
        &self,
        plan: &Plan,
        disk: &PlannedDisk,
        vm: Option<&Record<Vm>>,
        mark: &Mark,
        watch: &Watch,
    ) -> Result<Restored> {
        let (prepares, settles) = (self.step(Stage::Prepare, watch), self.step(Stage::Settle, watch));
        let vdi = prepares.work(|| self.make_disk(disk, mark))?;
        let restored = self.fill(&[(disk, vdi.clone())], watch)?;
        settles.work(|| self.finish_disk(disk, &plan.name, &vdi.reference))?;
        // It is whole, whether or not it can be attached.
        if let Some(vm) = vm {
            let attached = settles.work(|| self.attach(vm, &vdi.reference));
            attached.map_err(|error| error.while_doing(&format!("attach the disk {}, which is restored", vdi.uuid)))?;
        }
        Ok(self.restored(vm.map(|vm| vm.uuid.clone()), plan, restored, None, watch))
    }

    fn archive(&self, plan: &Plan, archive: &Archive, mark: &Mark, watch: &Watch) -> Result<Restored> {
        let pool = &self.pool;
        let turn = self.turn(pool, watch)?;
        let stages = self.stages(&archive.storage, watch);
        let (vm, mut task, checksum) =
            transfer::send_archive(pool, &archive.storage.reference, &archive.xva, &stages, watch)?;
        drop(turn);
        let settles = self.step(Stage::Settle, watch);
        // Until all of it is marked, the task alone tells who comes after what was made.
        let (vm, disks) = settles.work(|| self.mark_imported(&vm, &plan.name, mark)).inspect_err(|_| task.leave())?;
        drop(task);
        settles.work(|| self.finish_archive(plan, archive, mark, &vm, &disks))?;
        let archive = Some((checksum, archive.xva.size()));
        Ok(self.restored(Some(vm.uuid.clone()), plan, Vec::new(), archive, watch))
    }

    /// Blocks and marks what the pool made of an XVA: the disks first, so that none is without once the VM is marked. Returns what it was.
    fn mark_imported(&self, vm: &Ref<Vm>, name: &str, mark: &Mark) -> Result<(Record<Vm>, Vec<Ref<Vdi>>)> {
        let pool = &self.pool;
        let record: Record<Vm> = pool.record(vm)?;
        for operation in BLOCKED {
            pool.set_entry(vm, "blocked_operations", operation, BLOCKED_BECAUSE)?;
        }
        let disks = made::disks_of(pool, &record)?;
        // Exported of a snapshot, it says to be one of a backup.
        for disk in &disks {
            pool.set_entry(&disk.reference, "other_config", RESTORING, &mark.restoring)?;
            made::forget_backups(pool, &disk.reference, &disk.other_config, RESTORING)?;
        }
        pool.set(vm, "name_label", format!("{PROVISIONAL}{name}"))?;
        pool.set_entry(vm, "other_config", RESTORING, &mark.restoring)?;
        made::forget_backups(pool, vm, &record.other_config, RESTORING)?;
        Ok((record, disks.into_iter().map(|disk| disk.reference).collect()))
    }

    /// Gives a VM that the pool made of an XVA what it is to have.
    fn finish_archive(
        &self,
        plan: &Plan,
        archive: &Archive,
        mark: &Mark,
        record: &Record<Vm>,
        disks: &[Ref<Vdi>],
    ) -> Result<()> {
        let (pool, vm) = (&self.pool, &record.reference);
        if record.is_a_template {
            pool.set(vm, "is_a_template", false)?;
        }
        self.move_interfaces(record, archive)?;
        pool.add_tag(vm, TAG)?;
        pool.set_entry(vm, "other_config", records::RESTORED_FROM, &mark.from)?;
        pool.set(vm, "name_label", plan.name.as_str())?;
        // From here on it is there: what fails now is said, and nothing is undone.
        self.free(vm, &record.uuid, &records::blocked(&record.raw))?;
        let finish = || -> Result<()> {
            for object in disks {
                pool.remove_entry(object, "other_config", RESTORING)?;
            }
            Ok(pool.remove_entry(vm, "other_config", RESTORING)?)
        };
        finish().map_err(|error| unfinished(error, &record.uuid))?;
        self.start(vm, &record.uuid)
    }

    /// Makes a disk that holds nothing yet, or what a snapshot holds.
    fn make_disk(&self, disk: &PlannedDisk, mark: &Mark) -> Result<Record<Vdi>> {
        let pool = &self.pool;
        let act = format!("make disk {}", disk.name.escape_debug());
        let make = || -> Result<Ref<Vdi>> {
            let fields = records::disk(&disk.vdi, disk.storage.reference.as_str(), disk.size, mark);
            match &disk.base {
                None => Ok(pool.create_vdi(&fields)?),
                Some(base) => {
                    // So the clone says to be ours from its first moment on.
                    pool.set_entry(&base.vdi.reference, "other_config", RESTORING, &mark.restoring)?;
                    let clone = pool.clone_vdi(&base.vdi.reference);
                    pool.with(&cleanup()).remove_entry(&base.vdi.reference, "other_config", RESTORING)?;
                    Ok(clone?)
                }
            }
        };
        let vdi = make().map_err(|error| error.while_doing(&act))?;
        let named = format!("{PROVISIONAL}{}", disk.label);
        if disk.base.is_some() {
            // Until then it has what its snapshot says of itself.
            let entries: BTreeMap<String, String> = pool.field(&vdi, "other_config")?;
            made::forget_backups(pool, &vdi, &entries, RESTORING)?;
            pool.set_entry(&vdi, "other_config", records::RESTORED_FROM, &mark.from)?;
        }
        pool.set(&vdi, "name_label", named)?;
        let mut record: Record<Vdi> = pool.record(&vdi)?;
        if disk.base.is_some() && record.virtual_size < disk.size {
            pool.resize_vdi(&vdi, disk.size)?;
            record = pool.record(&vdi)?;
        }
        if record.virtual_size < disk.size {
            let (found, expected) = (record.virtual_size, disk.size);
            let message = format!("{act}: the pool made it {found} bytes large, {expected} were asked for");
            return Err(Error::new(ErrorKind::Pool(xapi::ErrorKind::Protocol), message));
        }
        Ok(record)
    }

    /// Connects a disk to the VM where it was, or where there is a place.
    fn connect(&self, disk: &PlannedDisk, vm: &Ref<Vm>, vdi: &Ref<Vdi>) -> Result<()> {
        let nothing = [Fields::new()];
        let vbds = if disk.vbds.is_empty() { &nothing[..] } else { &disk.vbds };
        for vbd in vbds {
            let is_known = text(vbd, "userdevice").is_some_and(|place| !place.is_empty());
            let place = if is_known { String::new() } else { self.free_place(vm)? };
            self.pool.create_vbd(&records::device(vbd, vm.as_str(), vdi.as_str(), &place))?;
        }
        Ok(())
    }

    /// Gives a disk to a VM that is there; one that runs has it at once.
    fn attach(&self, vm: &Record<Vm>, vdi: &Ref<Vdi>) -> Result<()> {
        let place = self.free_place(&vm.reference)?;
        let fields = records::device(&Fields::new(), vm.reference.as_str(), vdi.as_str(), &place);
        let vbd = self.pool.create_vbd(&fields)?;
        if self.pool.field::<Vm, String>(&vm.reference, "power_state")? == "Running" {
            self.pool.run("VBD.plug", &[json!(vbd)])?;
        }
        Ok(())
    }

    /// Returns a place for another disk; not the fourth if there is another, which drives have.
    fn free_place(&self, vm: &Ref<Vm>) -> Result<String> {
        let places = self.pool.allowed_devices(vm)?;
        let place = places.iter().find(|place| *place != "3").or_else(|| places.first());
        let none = || Error::new(ErrorKind::Usage, "the VM has no place for another disk");
        place.cloned().ok_or_else(none)
    }

    /// Sends what the disks hold, some of them at the same time. The first that fails ends the others.
    fn fill(&self, disks: &[(&PlannedDisk, Record<Vdi>)], watch: &Watch) -> Result<Vec<RestoredDisk>> {
        let stop = self.pool.cancel().part(FOR_EVER);
        let pool = self.pool.with(&stop);
        let waiting = Mutex::new(disks.iter().enumerate());
        let done: Mutex<BTreeMap<usize, RestoredDisk>> = Mutex::default();
        let failed: Mutex<Option<Error>> = Mutex::default();
        let work = || {
            while let Some((number, (disk, vdi))) = waiting.lock().unwrap_or_else(PoisonError::into_inner).next() {
                match self.fill_one(&pool, disk, vdi, watch) {
                    Ok(filled) => drop(done.lock().unwrap_or_else(PoisonError::into_inner).insert(number, filled)),
                    Err(error) => {
                        let act = format!("disk {}", disk.name.escape_debug());
                        let mut failed = failed.lock().unwrap_or_else(PoisonError::into_inner);
                        failed.get_or_insert_with(|| error.while_doing(&act));
                        stop.cancel();
                        return;
                    }
                }
            }
        };
        std::thread::scope(|scope| {
            for _ in 1..self.options.at_once.min(disks.len()) {
                // Where the system refuses another thread, there are fewer: this one does what is left.
                let _ = std::thread::Builder::new().spawn_scoped(scope, work);
            }
            work();
        });
        match failed.into_inner().unwrap_or_else(PoisonError::into_inner) {
            Some(error) => Err(error),
            None => Ok(done.into_inner().unwrap_or_else(PoisonError::into_inner).into_values().collect()),
        }
    }

    /// Waits until a disk, or a VM as a whole, may be sent.
    fn turn(&self, pool: &Pool, watch: &Watch) -> Result<Turn> {
        let turns = Turns::new(self.state, Limits::default());
        let pools = BTreeSet::from([self.id.clone()]);
        self.step(Stage::Slot, watch).take(|| turns.transfer(&pools, pool.cancel(), self.say))
    }

    /// Returns where the time goes of what is sent into an SR.
    fn stages(&self, storage: &Record<Sr>, watch: &Watch) -> Stages {
        Stages::of(watch.transfer(), &self.options.from, &subjects::sr(storage))
    }

    fn fill_one(&self, pool: &Pool, disk: &PlannedDisk, vdi: &Record<Vdi>, watch: &Watch) -> Result<RestoredDisk> {
        let _turn = self.turn(pool, watch)?;
        let stages = self.stages(&disk.storage, watch);
        let content = Content { disk: &disk.disk, image: &disk.image, known: disk.known.as_ref() };
        let sent = match disk.image.payload() {
            // The snapshot is what was wanted.
            0 if disk.base.is_some() => Digests::default(),
            _ => transfer::send(pool, &vdi.reference, &content, &stages, watch)?,
        };
        let verify = || stages.verify.work(|| self.verify(pool, disk, vdi, &sent, watch));
        let verified = if self.options.verifies { Some(verify()?) } else { None };
        Ok(RestoredDisk {
            name: disk.name.clone(),
            uuid: vdi.uuid.clone(),
            size: vdi.virtual_size,
            sent: disk.image.payload(),
            base: disk.base.as_ref().map(|base| base.vdi.uuid.clone()),
            digest: sent.sum(),
            verified,
        })
    }

    /// Reads a disk back, and compares it with the repository.
    fn verify(
        &self,
        pool: &Pool,
        disk: &PlannedDisk,
        vdi: &Record<Vdi>,
        sent: &Digests,
        watch: &Watch,
    ) -> Result<String> {
        let whole = match &disk.base {
            None => None,
            Some(_) => Some(transfer::read(pool, &disk.disk)?),
        };
        let expected = whole.as_ref().unwrap_or(sent);
        let found = transfer::read_back(pool, &vdi.reference, disk.size, watch)?;
        match found.first_difference(expected) {
            None => Ok(found.sum()),
            Some(block) => {
                let message = format!("block {} (of 2 MiB) is not in the pool what it is in the repository", block.0);
                Err(Error::new(ErrorKind::Differs, message))
            }
        }
    }

    /// Gives a disk what it gets once it is whole.
    fn finish_disk(&self, disk: &PlannedDisk, label: &str, vdi: &Ref<Vdi>) -> Result<()> {
        self.pool.set(vdi, "name_label", label)?;
        if flag(&disk.vdi, "read_only").unwrap_or(false) {
            self.pool.set(vdi, "read_only", true)?;
        }
        Ok(self.pool.remove_entry(vdi, "other_config", RESTORING)?)
    }

    /// Lets a VM be started. Whether it may be decides whether it is there, also where the pool's answer did not come.
    fn free(&self, vm: &Ref<Vm>, uuid: &str, before: &Fields) -> Result<()> {
        self.unblock(vm, before).map_err(|error| match self.pool.with(&cleanup()).record::<Vm>(vm) {
            Ok(vm) if !made::is_unfinished(&vm) => unfinished(error, uuid),
            _ => error,
        })
    }

    /// Takes away what blocked the start, and blocks what was blocked before.
    fn unblock(&self, vm: &Ref<Vm>, before: &Fields) -> Result<()> {
        for operation in BLOCKED.iter().filter(|operation| !before.contains_key(**operation)) {
            self.pool.remove_entry(vm, "blocked_operations", operation)?;
        }
        for operation in before.keys() {
            let reason = text(before, operation).unwrap_or_default();
            self.pool.set_entry(vm, "blocked_operations", operation, reason)?;
        }
        Ok(self.pool.update_allowed_operations(vm)?)
    }

    /// Moves the interfaces that the pool made of an XVA to the networks that were asked for.
    fn move_interfaces(&self, vm: &Record<Vm>, archive: &Archive) -> Result<()> {
        if archive.networks.is_empty() {
            return Ok(());
        }
        let target = Target::of(&self.pool)?;
        for vif in self.pool.records_of::<Vif>(&vm.vifs)? {
            let network: Record<Network> = self.pool.record(&vif.network)?;
            let is_meant = |old: &str| old == network.uuid || old == network.name_label;
            let own = archive.networks.iter().find(|wish| wish.old.as_deref().is_some_and(is_meant));
            let wish = own.or_else(|| archive.networks.iter().find(|wish| wish.old.is_none()));
            let Some(wish) = wish else { continue };
            let new = networks::named(&target.networks, &wish.new)?;
            self.pool.run("VIF.move", &[json!(vif.reference), json!(new.reference)])?;
        }
        Ok(())
    }

    /// Starts a VM, if that was asked for. It is there whether or not it starts.
    fn start(&self, vm: &Ref<Vm>, uuid: &str) -> Result<()> {
        if !self.options.starts {
            return Ok(());
        }
        let started = self.pool.start_vm(vm, false);
        started.map_err(|error| Error::from(error).while_doing(&format!("start the VM {uuid}, which is restored")))
    }
}

/// Says of an error that the VM is there in spite of it.
fn unfinished(error: Error, uuid: &str) -> Error {
    error.while_doing(&format!("finish the VM {uuid}, which is restored"))
}
