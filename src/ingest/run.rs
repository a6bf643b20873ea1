//! An ingest from the locks to the metadata, in all destinations.

use std::sync::Arc;
use std::thread;
use std::time::Instant;

use jiff::Timestamp;
use storage::ObjectPath;
use uuid::Uuid;

use super::error::{Error, ErrorKind, Result};
use super::feed::Feed;
use super::full;
use super::origin::Origin;
use super::pass;
use super::plan;
use super::pool::Bases;
use super::record::{DiskRecord, Record};
use super::report::{Outcome, ReadDisk, Report};
use super::repository_target::RepositoryTarget;
use super::source::Source;
use super::target::Target;
use super::wanted::{Destination, JOB, Wanted, check, check_ids, resolve};
use super::watch::Watch;
use super::xva_source::Xva;
use crate::probe::{Crew, Probe, Stage, Subject, Transfer, Way};
use crate::repository::{self, BackupTime, Mode, VmId};

/// How far the newest backup may be ahead of the clock: a second per backup, when several are made within one.
const AHEAD_S: i64 = 60;

/// The stages that all destinations share. The last three are done by the same threads: what these wait for is counted as the input
/// of the first and the output of the last.
pub(super) struct Stages {
    pub read: Arc<Probe>,
    pub compare: Arc<Probe>,
    pub hash: Arc<Probe>,
    pub encode: Arc<Probe>,
}

impl Stages {
    /// Returns those of a transfer that reads `from` a source in some way.
    pub fn of(transfer: &Transfer, from: &Subject, by: Way, encoded: Way) -> Self {
        let machine = Subject::machine();
        let of_workers = |stage, way| transfer.stage(stage, &machine, Crew::Workers, way);
        Self {
            read: transfer.stage(Stage::Read, from, Crew::Readers, by),
            compare: of_workers(Stage::Compare, Way::Only),
            hash: of_workers(Stage::Hash, Way::Only),
            encode: of_workers(Stage::Encode, encoded),
        }
    }

    /// Returns those of what is done only to find something out.
    pub fn unseen() -> Self {
        Self::of(&Transfer::unseen(), &Subject::machine(), Way::Only, Way::Only)
    }
}

/// A destination, as far as it came.
pub(super) struct Attempt<'a> {
    pub name: String,
    pub state: Result<Target<'a>>,
}

impl<'a> Attempt<'a> {
    /// Goes on with what has not failed; what fails is undone.
    pub fn then(&mut self, act: impl FnOnce(&mut Target<'a>) -> Result<()>) {
        let Ok(target) = &mut self.state else { return };
        if let Err(error) = act(target) {
            self.state = Err(target.undo(error));
        }
    }

    /// Goes on with a repository that has not failed; what fails is undone.
    pub fn in_repository(&mut self, act: impl FnOnce(&mut RepositoryTarget<'a>) -> Result<()>) {
        self.then(|target| match target {
            Target::Repository(target) => act(target),
            Target::Replica(_) => Ok(()),
        });
    }
}

/// Returns the destinations that have not failed.
pub(super) fn living<'b, 'a>(attempts: &'b [Attempt<'a>]) -> impl Iterator<Item = &'b Target<'a>> {
    attempts.iter().filter_map(|attempt| attempt.state.as_ref().ok())
}

/// Returns the repositories that have not failed.
pub(super) fn repositories<'b, 'a>(attempts: &'b [Attempt<'a>]) -> impl Iterator<Item = &'b RepositoryTarget<'a>> {
    living(attempts).filter_map(Target::repository)
}

/// An ingest that holds the VM's lock in each repository that has not failed. Nothing is written yet; dropped, it lets go of
/// the locks.
pub struct Begun<'a> {
    start: Instant,
    vm: VmId,
    job: String,
    attempts: Vec<Attempt<'a>>,
    watch: &'a Watch,
}

/// Makes a backup in each destination.
///
/// # Errors
/// If no destination has it in the end: what is wrong with what was asked for, with an image, or with the first destination; then
/// nothing of it is left. What failed of several is told in the report.
pub fn run(wanted: &Wanted, destinations: &[Destination], watch: &Watch) -> Result<Report> {
    check(wanted)?;
    begin(wanted, destinations, watch)?.store(wanted, &|| Ok(()))
}

/// Takes the lock of the VM in each repository, removes what a run left there that died, and looks at the backups. Of `wanted`
/// only that counts which is no matter of what is stored: the VM, its name, the job, the patience.
///
/// What is to be stored may be made now, like a snapshot: nobody else changes the backups until [`Begun::store`] is done.
///
/// # Errors
/// If all destinations fail: what is wrong with what was asked for, or with the first of them.
pub fn begin<'a>(wanted: &Wanted, destinations: &'a [Destination], watch: &'a Watch) -> Result<Begun<'a>> {
    let start = Instant::now();
    check_ids(wanted)?;
    let vm = resolve(wanted, destinations)?;
    let job = wanted.job.clone().unwrap_or_else(|| JOB.to_owned());
    let begin = |destination| Target::begin(destination, &vm, &job, wanted, watch);
    let attempts: Vec<Attempt> = destinations
        .iter()
        .map(|destination| Attempt { name: destination.name().to_owned(), state: begin(destination) })
        .collect();
    let mut begun = Begun { start, vm, job, attempts, watch };
    if begun.attempts.iter().all(|attempt| attempt.state.is_err()) {
        return match begun.attempts.drain(..).next().map(|attempt| attempt.state) {
            Some(Err(error)) => Err(error),
            _ => Err(Error::new(ErrorKind::Usage, "nothing is named to write to")),
        };
    }
    Ok(begun)
}

impl Begun<'_> {
    /// Returns the VM.
    #[must_use]
    pub fn vm(&self) -> &VmId {
        &self.vm
    }

    /// Returns the destinations that failed, by name, and why.
    pub fn failed(&self) -> impl Iterator<Item = (&str, &Error)> {
        self.attempts.iter().filter_map(|attempt| Some((attempt.name.as_str(), attempt.state.as_ref().err()?)))
    }

    /// Returns what disks can be built upon, each given by its uuid and its size in bytes; of `wanted` the extent and the layout
    /// count. A destination that does not answer is given up.
    pub fn bases(&mut self, wanted: &Wanted, disks: &[(Uuid, u64)]) -> Vec<Bases> {
        let transfer = self.watch.transfer();
        let base_of = |(vdi, size): &(Uuid, u64)| {
            let mut destinations = Vec::new();
            for attempt in &mut self.attempts {
                let name = attempt.name.clone();
                attempt.then(|target| {
                    let survey = transfer.step(Stage::Survey, &target.subject());
                    destinations.push((name, survey.work(|| target.base_of(wanted, &self.job, *vdi, *size))?));
                    Ok(())
                });
            }
            Bases { vdi: *vdi, destinations }
        };
        disks.iter().map(base_of).collect()
    }

    /// Makes the backup in each destination that has not failed. `wanted` is that with which it was begun, and what is to be stored;
    /// `publishes` is called once before it begins to exist anywhere.
    ///
    /// # Errors
    /// As for [`run`], and what `publishes` says.
    pub fn store(mut self, wanted: &Wanted, publishes: &dyn Fn() -> Result<()>) -> Result<Report> {
        let result = check(wanted).and_then(|()| self.write(wanted, publishes));
        let Written { time, disks } = match result {
            Ok(written) => written,
            Err(error) => {
                let mut told = error.clone();
                for attempt in &mut self.attempts {
                    attempt.then(|_| Err(error.clone()));
                    if let Err(undone) = &attempt.state {
                        told = if undone.kind() == error.kind() { undone.clone() } else { told };
                    }
                }
                return Err(told);
            }
        };
        let folder = ObjectPath::new("xo-vm-backups")?.join(self.vm.as_str())?;
        let metadata = folder.join(&format!("{}.json", time.stored()))?.to_string();
        let outcomes: Vec<Outcome> =
            self.attempts.into_iter().map(|attempt| Outcome::of(attempt, wanted, &self.job, &metadata)).collect();
        let is_there = |outcome: &Outcome| {
            outcome.stored.as_ref().map_or_else(|error| error.kind() == ErrorKind::Present, |_| true)
        };
        if !outcomes.iter().any(is_there) {
            if let Some(Err(error)) = outcomes.into_iter().next().map(|outcome| outcome.stored) {
                return Err(error);
            }
            return Err(Error::new(ErrorKind::Usage, "nothing is named to write to"));
        }
        let transfer = self.watch.transfer().reading();
        Ok(Report { vm: self.vm, time, transfer, disks, outcomes, elapsed: self.start.elapsed() })
    }

    fn write(&mut self, wanted: &Wanted, publishes: &dyn Fn() -> Result<()>) -> Result<Written> {
        let Self { vm, job, attempts, watch, .. } = self;
        if wanted.origin.as_ref().is_some_and(Origin::is_mirror) {
            attempts.iter_mut().for_each(|attempt| attempt.in_repository(|target| follows(target, wanted, job)));
        }
        let timestamp = moment(wanted, attempts)?;
        let time = BackupTime::parse(&timestamp.strftime("%Y%m%dT%H%M%SZ").to_string())
            .ok_or_else(|| Error::new(ErrorKind::Usage, format!("{timestamp} is no time of a backup")))?;
        let plan = watch.transfer().step(Stage::Plan, &Subject::machine());
        plan.work(|| prepare(wanted, job, time, attempts, watch))?;
        let mut disks = Vec::with_capacity(wanted.disks.len());
        for disk in 0..wanted.disks.len() {
            disks.push(pass::copy_disk(wanted, disk, attempts, watch)?);
        }
        if let Some(xva) = wanted.xva() {
            copy_xva(wanted, xva, attempts, watch)?;
        }
        watch.check()?;
        publishes()?;
        publish(wanted, vm, job, timestamp, time, attempts)?;
        Ok(Written { time, disks })
    }
}

/// What was done in all destinations.
struct Written {
    time: BackupTime,
    disks: Vec<ReadDisk>,
}

/// Refuses to mirror a backup that is there, or that newer ones of the job would have to be put on, as those of disks are.
fn follows(target: &RepositoryTarget, wanted: &Wanted, job: &str) -> Result<()> {
    let Some(time) = wanted.time else { return Ok(()) };
    if let Some(same) = target.backups.iter().find(|backup| backup.time.unix() == time.as_second()) {
        return Err(Error::new(ErrorKind::Present, format!("the backup of {} is there already", same.time)));
    }
    let is_built_on = |backup: &&Arc<repository::Backup>| backup.job_id == job && backup.mode != Mode::Full;
    let newest = target.backups.iter().filter(is_built_on).map(|backup| backup.time).max();
    match newest.filter(|newest| newest.unix() > time.as_second() && wanted.xva().is_none()) {
        Some(newest) => {
            let message = format!(
                "the newest backup of the job {job} is of {newest}, and older ones cannot be put before it: mirror the \
                 oldest first, or give another --job"
            );
            Err(Error::new(ErrorKind::Repository(repository::ErrorKind::Exists), message))
        }
        None => Ok(()),
    }
}

/// Returns the time of the backup: later, in whole seconds, than that of every other one of the VM.
fn moment(wanted: &Wanted, attempts: &[Attempt]) -> Result<Timestamp> {
    let newest = repositories(attempts).filter_map(|target| target.backups.last()).map(|backup| backup.time).max();
    let usage = |message: String| Error::new(ErrorKind::Usage, message);
    let now = wanted.time.unwrap_or_else(Timestamp::now);
    let newest = newest.filter(|_| !wanted.origin.as_ref().is_some_and(Origin::is_mirror));
    let Some(newest) = newest.filter(|newest| newest.unix() >= now.as_second()) else {
        return Timestamp::from_millisecond(now.as_millisecond()).map_err(|error| usage(error.to_string()));
    };
    if wanted.time.is_some() || newest.unix() - now.as_second() > AHEAD_S {
        return Err(usage(format!(
            "the newest backup of the VM is of {newest}, and a new one must be later, not of {now}: set the clock"
        )));
    }
    Timestamp::from_second(newest.unix() + 1).map_err(|error| usage(error.to_string()))
}

/// Decides what is written, sees whether there is room, and announces it.
fn prepare(wanted: &Wanted, job: &str, time: BackupTime, attempts: &mut [Attempt], watch: &Watch) -> Result<()> {
    let names: Vec<String> = wanted.disks.iter().map(|(name, _)| name.clone()).collect();
    let histories: Vec<_> = repositories(attempts).map(|target| target.backups.clone()).collect();
    let all: Vec<&[Arc<repository::Backup>]> = histories.iter().map(|backups| backups.as_slice()).collect();
    let identities = match &wanted.origin {
        Some(origin) => origin.identities(),
        None => plan::known_vdis(&names, &all)
            .into_iter()
            .map(|vdi| Ok((vdi.map_or_else(fresh, Ok)?, fresh()?)))
            .collect::<Result<_>>()?,
    };
    // What comes from a pool is opened when its turn comes, and there is room for it or not.
    let feeds = wanted.disks.iter().enumerate().filter(|(_, (_, source))| !matches!(source, Source::Pool(_)));
    let feeds: Vec<(usize, Feed)> =
        feeds.map(|(disk, (_, source))| Ok((disk, Feed::open(source, None)?.0))).collect::<Result<_>>()?;
    let feeds: Vec<(usize, &Feed)> = feeds.iter().map(|(disk, feed)| (*disk, feed)).collect();
    for attempt in attempts.iter_mut() {
        let name = attempt.name.clone();
        attempt.then(|target| {
            let target = match target {
                Target::Repository(target) => target,
                Target::Replica(target) => return target.plan(wanted, &identities),
            };
            if let Some(xva) = wanted.xva() {
                return target.plan_xva(xva.expected_size(), time, wanted.reserve);
            }
            target.plan(wanted, job, time, &identities)?;
            for plan in &target.plans {
                if let Some(why) = &plan.why_full {
                    watch.say(&format!("{name}: disk {} is stored in full: {why}", plan.name));
                }
            }
            target.believe_changes(wanted, &|sentence| watch.say(&format!("{name}: {sentence}")))?;
            watch.check()?;
            target.count_used()?;
            target.check_room(&feeds, wanted.reserve)
        });
    }
    watch.check()?;
    attempts.iter_mut().for_each(|attempt| attempt.in_repository(RepositoryTarget::announce));
    Ok(())
}

/// Stores the XVA of a full backup in all destinations that have not failed.
fn copy_xva(wanted: &Wanted, xva: &Xva, attempts: &mut [Attempt], watch: &Watch) -> Result<()> {
    let waits = watch.transfer().step(Stage::Slot, &wanted.source());
    let _turn = waits.take(|| xva.turn(&|sentence| watch.say(sentence)))?;
    attempts.iter_mut().for_each(|attempt| attempt.then(|target| target.create_xva(xva.size())));
    let targets = attempts.iter_mut().filter_map(|attempt| attempt.state.as_mut().ok());
    let lanes: Vec<full::Lane> = targets.filter_map(Target::archive_lane).collect();
    if lanes.is_empty() {
        return Ok(());
    }
    let by = match xva {
        Xva::Stored(_) => Way::Only,
        Xva::Exported(_) => Way::Xva,
    };
    let stages = Stages::of(watch.transfer(), &wanted.source(), by, Way::Only);
    let (checksum, size) = full::copy(xva, lanes, &stages, watch)?;
    each(attempts, |target| target.finish_xva(checksum, size));
    Ok(())
}

/// Makes the backup exist in all destinations that have not failed.
fn publish(
    wanted: &Wanted,
    vm: &VmId,
    job: &str,
    timestamp: Timestamp,
    time: BackupTime,
    attempts: &mut [Attempt],
) -> Result<()> {
    let snapshot = fresh()?;
    let references: Vec<Uuid> = wanted.disks.iter().map(|_| fresh()).collect::<Result<_>>()?;
    let mut documents = Vec::with_capacity(attempts.len());
    for attempt in attempts.iter() {
        let Some(target) = attempt.state.as_ref().ok().and_then(Target::repository) else {
            documents.push(None);
            continue;
        };
        let disks = target.plans.iter().enumerate().zip(&target.written).zip(&references);
        let disks: Result<Vec<DiskRecord>> = disks
            .map(|(((disk, plan), written), reference)| {
                Ok(DiskRecord {
                    name: plan.name.clone(),
                    vdi: plan.vdi,
                    snapshot: plan.layer.footer().uuid,
                    base: plan.base.as_ref().map(|base| base.uuid),
                    virtual_size: plan.layer.virtual_size(),
                    size: written.size,
                    path: target.path(disk)?,
                    reference: *reference,
                })
            })
            .collect();
        let record = Record {
            vm: vm.as_str(),
            name: wanted.name.as_deref(),
            job,
            schedule: wanted.schedule.as_deref().unwrap_or(&target.schedule),
            timestamp,
            snapshot,
            disks: disks?,
            xva: target.xva.clone(),
        };
        // Where the VM is new, another destination may know it.
        let template =
            target.template.as_ref().or_else(|| repositories(attempts).find_map(|target| target.template.as_ref()));
        documents.push(Some(match &wanted.origin {
            Some(origin) => origin.to_document(&record),
            None => record.to_document(template),
        }));
    }
    thread::scope(|scope| {
        for (attempt, document) in attempts.iter_mut().zip(&documents) {
            scope.spawn(move || {
                attempt.then(|target| match (target, document) {
                    (Target::Repository(target), Some(document)) => target.commit(time, document),
                    (Target::Repository(_), None) => Ok(()),
                    (Target::Replica(target), _) => target.commit(time),
                });
            });
        }
    });
    Ok(())
}

/// Does the same in all destinations at once.
pub(super) fn each(attempts: &mut [Attempt], act: impl Fn(&mut Target) -> Result<()> + Sync) {
    thread::scope(|scope| {
        for attempt in attempts {
            scope.spawn(|| attempt.then(|target| act(target)));
        }
    });
}

/// Makes a uuid of version 4.
pub(super) fn fresh() -> Result<Uuid> {
    repository::random_uuid()
        .map_err(|error| Error::new(ErrorKind::Source, format!("ask the system for random numbers: {error}")))
}
