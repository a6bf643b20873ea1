//! One destination, from its lock to its metadata.
//!
//! ```text
//! begin: lock · what a dead run left is removed · backups listed
//! announce: an intent in each lineage, durable
//! blocks, synced · alias, synced · all of it opened and looked at · metadata: the commit · intents removed
//! ```
//!
//! Of a full backup the XVA takes the place of the disks: `archive`.
//!
//! Until the commit begins, [`RepositoryTarget::undo`] removes what was written. After it began nothing is removed: whether the backup
//! exists is then known only by the metadata, which the next run looks for.

use std::sync::Arc;
use std::time::Duration;

use storage::{Checksum, ObjectPath, Storage, WritableStream};
use uuid::Uuid;
use vhd::{BlockCache, BlockSink, Context, Filter, Format, NewLayer, Written, create_layer, write_alias};

use super::archive::{self, Archive};
use super::block::Compared;
use super::copy::{Failure, Lane};
use super::error::{Error, ErrorKind, Result};
use super::feed::Feed;
use super::full;
use super::intent;
use super::plan::{self, DiskPlan, History};
use super::record::Template;
use super::report::{Place, Stored, StoredDisk, StoredXva};
use super::room::{self, Estimate, Needs, Quota};
use super::source::Source;
use super::wanted::{RepositoryDestination, Reserve, SCHEDULE, Wanted};
use super::watch::Watch;
use crate::probe::{Counted, Crew, Probe, Stage, Subject, Way};
use crate::repository::{self, Backup, BackupTime, Document, Mode, VmFolder, VmId, VmLock};

/// A repository that is written to.
pub(super) struct RepositoryTarget<'a> {
    destination: &'a RepositoryDestination,
    lock: VmLock,
    folder: ObjectPath,
    pub backups: Arc<Vec<Arc<Backup>>>,
    pub template: Option<Template>,
    pub schedule: String,
    pub plans: Vec<DiskPlan>,
    pub written: Vec<Written>,
    /// Of the plans.
    pub compared: Vec<Compared>,
    sink: Option<Box<dyn BlockSink>>,
    /// Of a full backup.
    archive: Option<Archive>,
    writing: Option<Box<dyn WritableStream>>,
    pub xva: Option<StoredXva>,
    failure: Failure,
    base: Arc<Probe>,
    write: Arc<Probe>,
    sync: Arc<Probe>,
    publish: Arc<Probe>,
    quota: Option<Quota>,
    /// How many of the plans may have left something, and whether the archive may.
    announced: usize,
    is_archive_announced: bool,
    is_committing: bool,
}

impl<'a> RepositoryTarget<'a> {
    /// Takes the lock of the VM, and removes what a run left that died.
    pub fn begin(
        destination: &'a RepositoryDestination,
        vm: &VmId,
        job: &str,
        wanted: &Wanted,
        watch: &Watch,
    ) -> Result<Self> {
        let name = &destination.name;
        let (transfer, of) = (watch.transfer(), Subject::repository(name));
        let waited = transfer.step(Stage::Lock, &of);
        let lock = waited.take(|| take_lock(destination, vm, wanted.patience, watch))?;
        let survey = transfer.step(Stage::Survey, &of);
        let folder = ObjectPath::new("xo-vm-backups")?.join(vm.as_str())?;
        let backups = match survey.work(|| destination.repository.backups(vm)) {
            Err(error) if error.kind() == repository::ErrorKind::NotFound => Arc::default(),
            listed => listed?,
        };
        let recover =
            || Ok::<_, Error>([intent::recover(&lock, &folder, &backups)?, archive::recover(&lock, &folder)?]);
        let left_alone = survey.work(recover)?;
        for left in left_alone.concat() {
            watch.say(&format!("{name}: left alone what an ingest left that was ended: {left}"));
        }
        // What says that a backup is full says less of the VM.
        let newest = |mode| backups.iter().rev().find(|backup| backup.mode == mode);
        let template = match newest(Mode::Incremental).or_else(|| newest(Mode::Full)) {
            Some(backup) => Template::new(backup, &survey.work(|| destination.repository.backup_metadata(backup))?),
            None => None,
        };
        let of_job = backups.iter().rev().find(|backup| backup.job_id == job && !backup.schedule_id.is_empty());
        let schedule = of_job.map_or_else(|| SCHEDULE.to_owned(), |backup| backup.schedule_id.clone());
        Ok(Self {
            destination,
            lock,
            folder,
            backups,
            template,
            schedule,
            plans: Vec::new(),
            written: Vec::new(),
            compared: Vec::new(),
            sink: None,
            archive: None,
            writing: None,
            xva: None,
            failure: Failure::default(),
            base: transfer.stage(Stage::Base, &of, Crew::Both, Way::Only),
            write: transfer.stage(Stage::Write, &of, Crew::Own, Way::Only),
            sync: transfer.step(Stage::Sync, &of),
            publish: transfer.step(Stage::Publish, &of),
            quota: None,
            announced: 0,
            is_archive_announced: false,
            is_committing: false,
        })
    }

    /// Returns what it is.
    pub fn subject(&self) -> Subject {
        Subject::repository(&self.destination.name)
    }

    /// Returns how the blocks of a disk are encoded.
    pub fn encoded(&self, disk: usize) -> Way {
        match self.plans[disk].format {
            Format::Exploded(Filter::Brotli) => Way::Brotli,
            Format::Exploded(Filter::Gzip) => Way::Gzip,
            Format::Exploded(Filter::None) | Format::File => Way::Only,
        }
    }

    /// Decides what is written of each disk.
    pub fn plan(&mut self, wanted: &Wanted, job: &str, time: BackupTime, identities: &[(Uuid, Uuid)]) -> Result<()> {
        let storage = self.destination.storage.clone().reader();
        self.plans = self.history(&*storage, job).plan(wanted, time, identities)?;
        for base in self.plans.iter_mut().filter_map(|plan| plan.base.as_mut()) {
            base.disk = Arc::new(Counted::new(base.disk.clone(), self.base.clone()));
        }
        self.compared.resize_with(self.plans.len(), Compared::default);
        Ok(())
    }

    /// Returns what a new backup of a disk of `size` bytes can be built upon: the uuid of a snapshot, or why there is none.
    pub fn base_of(
        &self,
        wanted: &Wanted,
        job: &str,
        vdi: Uuid,
        size: u64,
    ) -> Result<std::result::Result<Uuid, String>> {
        let storage = self.destination.storage.clone().reader();
        self.history(&*storage, job).base_of(wanted, vdi, size)
    }

    fn history<'b>(&'b self, storage: &'b dyn Storage, job: &'b str) -> History<'b> {
        let repository = &self.destination.repository;
        History { repository, storage, folder: &self.folder, backups: &self.backups, job }
    }

    /// Returns the snapshot that a disk is to be built upon, and its size in bytes.
    pub fn base(&self, disk: usize) -> Option<(Uuid, u64)> {
        self.plans[disk].base.as_ref().map(|base| (base.uuid, base.disk.size()))
    }

    /// Limits what is compared to what is known to have changed; `say` is told where that cannot be.
    pub fn believe_changes(&mut self, wanted: &Wanted, say: &dyn Fn(&str)) -> Result<()> {
        let Some(changes) = &wanted.changes else { return Ok(()) };
        for (plan, (name, source)) in self.plans.iter_mut().zip(&wanted.disks) {
            let (Some(base), Source::Disk(disk)) = (&mut plan.base, source) else { continue };
            match changes.of(name, disk.size(), base.time, base.disk.size()) {
                Ok(changed) => {
                    changed.verify(name, disk.as_ref(), base.disk.as_ref())?;
                    base.changed = Some(changed);
                }
                Err(why) => say(&format!("disk {name} is compared as a whole: {why}")),
            }
        }
        Ok(())
    }

    /// Refuses disks, by their numbers, that there is no room for.
    pub fn check_room(&self, disks: &[(usize, &Feed)], reserve: Reserve) -> Result<()> {
        let plans = || disks.iter().map(|(disk, _)| &self.plans[*disk]);
        let is_exploded = plans().any(|plan| matches!(plan.format, Format::Exploded(_)));
        let check = |estimate| self.check_estimate(estimate, reserve, is_exploded);
        let needs = Needs::of(disks.iter().map(|(_, feed)| *feed).zip(plans()))?;
        match check(needs.at_most()) {
            // Perhaps all the same.
            Err(error) if error.kind() == ErrorKind::NoRoom => check(needs.estimate()?),
            checked => checked,
        }
    }

    /// Counts what the repository has, if there is a quota.
    pub fn count_used(&mut self) -> Result<()> {
        let used = self.destination.quota.map(|_| self.destination.repository.used_bytes()).transpose()?;
        self.quota = self.destination.quota.zip(used).map(|(limit, used)| Quota { limit, used });
        Ok(())
    }

    fn check_estimate(&self, estimate: Estimate, reserve: Reserve, is_exploded: bool) -> Result<()> {
        room::check(&*self.destination.storage, estimate, reserve, is_exploded)?;
        let written = self.stored_bytes();
        self.quota.map_or(Ok(()), |quota| quota.check(written.saturating_add(estimate.bytes), "are to come"))
    }

    fn stored_bytes(&self) -> u64 {
        self.written.iter().map(|written| written.stored_bytes).sum()
    }

    /// Says durably which disks are about to be written.
    pub fn announce(&mut self) -> Result<()> {
        for plan in &self.plans {
            self.lock.check()?;
            plan.names.prepare(&*self.destination.storage)?;
            // From now on what has its names is ours.
            self.announced += 1;
            plan.names.announce(&*self.destination.storage)?;
        }
        if let Some(archive) = &self.archive {
            self.lock.check()?;
            archive.prepare(&*self.destination.storage)?;
            self.is_archive_announced = true;
            archive.announce(&*self.destination.storage)?;
        }
        Ok(())
    }

    /// Believes of a disk of a pool what it says of its base, if it says something, and sees whether there is room for it.
    pub fn believe(&mut self, disk: usize, feed: &Feed, reserve: Reserve) -> Result<()> {
        if let Some(base) = &mut self.plans[disk].base {
            base.changed = feed.changed().cloned();
        }
        self.check_room(&[(disk, feed)], reserve)
    }

    /// Takes back what was written of a disk that comes once more.
    pub fn restart(&mut self, disk: usize) -> Result<()> {
        if let Some(error) = self.failure.take() {
            return Err(error);
        }
        self.compared[disk] = Compared::default();
        self.lock.check()?;
        Ok(self.sink.take().map_or(Ok(()), BlockSink::discard)?)
    }

    /// Begins to write a disk.
    pub fn create(&mut self, disk: usize) -> Result<()> {
        let plan = &self.plans[disk];
        let data = match plan.format {
            Format::File => plan.names.file()?,
            Format::Exploded(_) => plan.names.data()?,
        };
        self.lock.check()?;
        self.sink = Some(create_layer(self.destination.storage.clone(), plan.format, data, plan.layer.clone())?);
        Ok(())
    }

    /// Ends a disk of `size` bytes: durable, and found by its name.
    pub fn finish(&mut self, disk: usize, size: u64) -> Result<()> {
        if let Some(error) = self.failure.take() {
            return Err(error);
        }
        let plan = &mut self.plans[disk];
        let Some(mut sink) = self.sink.take() else { return Ok(()) };
        if plan.layer.virtual_size() != size {
            let invalid = |error: vhd::FormatError| Error::new(ErrorKind::Source, error.reason);
            let seconds = plan.layer.footer().timestamp;
            plan.layer = NewLayer::new(plan.layer.footer().uuid, size, seconds).map_err(invalid)?;
            sink.shrink(plan.layer.clone())?;
        }
        let written = self.sync.work(|| sink.finish())?;
        self.sync.add(usize::try_from(written.stored_bytes).unwrap_or(usize::MAX));
        self.written.push(written);
        if let Some(quota) = &self.quota {
            // An estimate was believed until now, or nothing was known of a stream.
            quota.check(self.stored_bytes(), "were written")?;
        }
        let plan = &self.plans[disk];
        if matches!(plan.format, Format::Exploded(_)) {
            self.lock.check()?;
            let (alias, data) = (plan.names.alias()?, plan.names.data()?);
            self.publish.work(|| write_alias(&*self.destination.storage, &alias, &data))?;
        }
        Ok(())
    }

    /// Decides where the XVA of a full backup goes, of `size` bytes, and refuses one that there is no room for.
    pub fn plan_xva(&mut self, size: u64, time: BackupTime, reserve: Reserve) -> Result<()> {
        let archive = Archive::new(self.folder.clone(), time);
        archive.check_size(&*self.destination.storage, size)?;
        self.count_used()?;
        self.check_estimate(Estimate::of_xva(size), reserve, false)?;
        self.archive = Some(archive);
        Ok(())
    }

    /// Returns what takes the blocks of the disk that was begun.
    pub fn lane(&self, disk: usize) -> Option<Lane<'_>> {
        let sink = self.sink.as_deref()?;
        let (plan, compared) = (&self.plans[disk], &self.compared[disk]);
        Some(Lane { plan, compared, sink, failure: &self.failure, probe: &self.write })
    }

    /// Returns what takes the bytes of the XVA that was begun.
    pub fn archive_lane(&mut self) -> Option<full::Lane<'_>> {
        let output = full::Output::Repository(self.writing.as_deref_mut()?);
        Some(full::Lane { output, failure: &self.failure, probe: &self.write })
    }

    /// Begins to write the XVA.
    pub fn create_xva(&mut self) -> Result<()> {
        let Some(archive) = &self.archive else { return Ok(()) };
        self.lock.check()?;
        self.writing = Some(archive.create(&*self.destination.storage)?);
        Ok(())
    }

    /// Ends the XVA: durable, and found by its name.
    pub fn finish_xva(&mut self, checksum: Checksum, size: u64) -> Result<()> {
        if let Some(error) = self.failure.take() {
            return Err(error);
        }
        let (Some(archive), Some(writing)) = (&self.archive, self.writing.take()) else { return Ok(()) };
        let storage = &*self.destination.storage;
        self.sync.work(|| writing.finish())?;
        self.sync.add(usize::try_from(size).unwrap_or(usize::MAX));
        self.lock.check()?;
        self.publish.work(|| archive.publish(storage, checksum, size))?;
        self.xva = Some(StoredXva { path: format!("./{}", archive.name()), bytes: size, checksum });
        Ok(())
    }

    /// Returns where a disk lies, relative to the folder of the VM.
    pub fn path(&self, disk: usize) -> Result<String> {
        let path = self.disk_path(disk)?;
        let below = path.as_str().strip_prefix(self.folder.as_str()).and_then(|path| path.strip_prefix('/'));
        Ok(below.unwrap_or(path.as_str()).to_owned())
    }

    fn disk_path(&self, disk: usize) -> Result<ObjectPath> {
        let plan = &self.plans[disk];
        match plan.format {
            Format::File => plan.names.file(),
            Format::Exploded(_) => plan.names.alias(),
        }
    }

    /// Looks whether every disk can be opened, and makes the backup exist.
    pub fn commit(&mut self, time: BackupTime, metadata: &Document) -> Result<()> {
        for disk in 0..self.plans.len() {
            let context = Context { storage: self.destination.storage.clone().reader(), cache: BlockCache::new(0) };
            let path = self.disk_path(disk)?;
            let open = self.publish.work(|| vhd::open(&context, &path, None))?;
            let (found, expected) = (disk::Disk::size(&open), self.plans[disk].layer.virtual_size());
            if found != expected {
                let message = format!("'{path}' was written with {expected} bytes and reads with {found}");
                return Err(repository::Error::new(repository::ErrorKind::Damaged, message).into());
            }
        }
        let folder = VmFolder::new(&self.lock)?;
        self.is_committing = true;
        self.publish.work(|| folder.add(time, metadata))?;
        let storage = &*self.destination.storage;
        let disks = self.plans.iter().map(|plan| plan.names.conclude(storage));
        for concluded in disks.chain(self.archive.iter().map(|archive| archive.conclude(storage))) {
            // The backup is there; the next run does what is left.
            if let Err(error) = concluded {
                tracing::warn!(%error, "what says that an ingest is under way is left behind; the next one removes it");
            }
        }
        Ok(())
    }

    /// Removes what was written; returns `error`, and what could not be removed.
    pub fn undo(&mut self, error: Error) -> Error {
        let error = room::explain(&*self.destination.storage, error);
        if self.is_committing {
            return error
                .and("whether the backup exists is seen by its metadata: the next ingest finds out, and cleans up");
        }
        // Over NFS and SMB what is open cannot go.
        self.writing = None;
        let discarded = self.sink.take().map_or(Ok(()), BlockSink::discard);
        let removed = discarded.map_err(Error::from).and_then(|()| {
            for plan in &self.plans[..self.announced] {
                self.lock.check()?;
                plan.names.remove(&*self.destination.storage)?;
            }
            if let Some(archive) = self.archive.as_ref().filter(|_| self.is_archive_announced) {
                self.lock.check()?;
                archive.remove(&*self.destination.storage)?;
            }
            Ok(())
        });
        match removed {
            Ok(()) => error,
            Err(left) => error.and(&format!("what was written is left for the next ingest to remove: {left}")),
        }
    }

    /// Says what was stored, with its `metadata`.
    pub fn stored(self, wanted: &Wanted, job: &str, metadata: &str) -> Result<Stored> {
        let disks = self.plans.iter().enumerate().zip(&self.written);
        let disk = |((number, plan), written): ((usize, &DiskPlan), &Written)| {
            let (compared_by_digest, compared_by_bytes) = self.compared[number].counts();
            Ok(StoredDisk {
                name: plan.name.clone(),
                vdi: plan.vdi,
                path: self.path(number)?,
                format: plan::shown(plan.format),
                is_key: plan.base.is_none(),
                why_full: plan.why_full.clone(),
                virtual_size: plan.layer.virtual_size(),
                blocks: written.blocks,
                stored_bytes: written.stored_bytes,
                compared_by_digest,
                compared_by_bytes,
            })
        };
        let disks = disks.map(disk).collect::<Result<_>>()?;
        Ok(Stored {
            place: Place::Repository(metadata.to_owned()),
            job: job.to_owned(),
            schedule: wanted.schedule.clone().unwrap_or(self.schedule),
            disks,
            xva: self.xva,
        })
    }
}

/// Takes the lock of a VM, and gives up when asked to.
fn take_lock(destination: &RepositoryDestination, vm: &VmId, patience: Duration, watch: &Watch) -> Result<VmLock> {
    let mut is_told = false;
    let taken = VmLock::take(destination.storage.clone(), vm, patience, |age| {
        if !std::mem::replace(&mut is_told, true) {
            let (name, age) = (&destination.name, age.as_secs());
            watch.say(&format!(
                "{name}: waits for another program that works on this VM (its last sign seems {age} s old)"
            ));
        }
        !watch.is_cancelled()
    });
    watch.check()?;
    taken.map_err(|error| room::explain(&*destination.storage, error.into()))
}
