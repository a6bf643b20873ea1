//! An ingest from the locks to the metadata, in all destinations.

use std::sync::Arc;
use std::thread;
use std::time::Instant;

use jiff::Timestamp;
use storage::ObjectPath;
use uuid::Uuid;
use vhd::Format;

use super::copy::{self, Lane};
use super::error::{Error, ErrorKind, Result};
use super::full::{self, Xva};
use super::plan;
use super::probe::Probe;
use super::record::{DiskRecord, Record};
use super::report::{Outcome, Report, Stored, StoredDisk};
use super::source::Source;
use super::target::Target;
use super::wanted::{Destination, JOB, Wanted, check, resolve};
use super::watch::Watch;
use crate::repository::{self, BackupTime, Mode, VmId};

/// How far the newest backup may be ahead of the clock: a second per backup, when several are made within one.
const AHEAD_S: i64 = 60;

/// The stages that all destinations share.
#[derive(Default)]
pub(super) struct Stages {
    pub read: Probe,
    pub compare: Probe,
    pub hash: Probe,
    pub encode: Probe,
}

/// A destination, as far as it came.
struct Attempt<'a> {
    name: String,
    state: Result<Target<'a>>,
}

impl<'a> Attempt<'a> {
    /// Goes on with what has not failed; what fails is undone.
    fn then(&mut self, act: impl FnOnce(&mut Target<'a>) -> Result<()>) {
        let Ok(target) = &mut self.state else { return };
        if let Err(error) = act(target) {
            self.state = Err(target.undo(error));
        }
    }
}

/// Makes a backup in each destination.
///
/// # Errors
/// If no destination has it in the end: what is wrong with what was asked for, with an image, or with the first destination; then
/// nothing of it is left. What failed of several is told in the report.
pub fn run(wanted: &Wanted, destinations: &[Destination], watch: &Watch) -> Result<Report> {
    let start = Instant::now();
    check(wanted)?;
    let vm = resolve(wanted, destinations)?;
    let job = wanted.job.clone().unwrap_or_else(|| JOB.to_owned());
    let begin = |destination| Target::begin(destination, &vm, &job, wanted, watch);
    let mut attempts: Vec<Attempt> = destinations
        .iter()
        .map(|destination| Attempt { name: destination.name.clone(), state: begin(destination) })
        .collect();
    let result: Result<(BackupTime, Stages)> = (|| {
        if wanted.origin.is_some() {
            attempts.iter_mut().for_each(|attempt| attempt.then(|target| follows(target, wanted, &job)));
        }
        let timestamp = moment(wanted, &attempts)?;
        let time = BackupTime::parse(&timestamp.strftime("%Y%m%dT%H%M%SZ").to_string())
            .ok_or_else(|| Error::new(ErrorKind::Usage, format!("{timestamp} is no time of a backup")))?;
        prepare(wanted, &job, time, &mut attempts, watch)?;
        let stages = Stages::default();
        for disk in 0..wanted.disks.len() {
            copy_disk(wanted, disk, &mut attempts, &stages, watch)?;
        }
        if let Some(xva) = wanted.xva() {
            copy_xva(xva, &mut attempts, &stages, watch)?;
        }
        watch.check()?;
        publish(wanted, &vm, &job, timestamp, time, &mut attempts)?;
        Ok((time, stages))
    })();
    let (time, stages) = match result {
        Ok(done) => done,
        Err(error) => {
            let mut told = error.clone();
            for attempt in &mut attempts {
                attempt.then(|_| Err(error.clone()));
                if let Err(undone) = &attempt.state {
                    told = if undone.kind() == error.kind() { undone.clone() } else { told };
                }
            }
            return Err(told);
        }
    };
    let folder = ObjectPath::new("xo-vm-backups")?.join(vm.as_str())?;
    let metadata = folder.join(&format!("{}.json", time.stored()))?.to_string();
    let outcomes: Vec<Outcome> =
        attempts.into_iter().map(|attempt| outcome(attempt, wanted, &job, &metadata)).collect();
    let is_there =
        |outcome: &Outcome| outcome.stored.as_ref().map_or_else(|error| error.kind() == ErrorKind::Present, |_| true);
    if !outcomes.iter().any(is_there) {
        if let Some(Err(error)) = outcomes.into_iter().next().map(|outcome| outcome.stored) {
            return Err(error);
        }
        return Err(Error::new(ErrorKind::Usage, "no repository is named"));
    }
    let stages = [
        ("read", stages.read.reading()),
        ("compare", stages.compare.reading()),
        ("hash", stages.hash.reading()),
        ("encode", stages.encode.reading()),
    ];
    Ok(Report { vm, time, stages, outcomes, elapsed: start.elapsed() })
}

/// Refuses to mirror a backup that is there, or that newer ones of the job would have to be put on, as those of disks are.
fn follows(target: &Target, wanted: &Wanted, job: &str) -> Result<()> {
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
    let live = attempts.iter().filter_map(|attempt| attempt.state.as_ref().ok());
    let newest = live.filter_map(|target| target.backups.last()).map(|backup| backup.time).max();
    let usage = |message: String| Error::new(ErrorKind::Usage, message);
    let now = wanted.time.unwrap_or_else(Timestamp::now);
    let newest = newest.filter(|_| wanted.origin.is_none());
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
    let histories: Vec<_> =
        attempts.iter().filter_map(|attempt| Some(attempt.state.as_ref().ok()?.backups.clone())).collect();
    let all: Vec<&[Arc<repository::Backup>]> = histories.iter().map(|backups| backups.as_slice()).collect();
    let identities = match &wanted.origin {
        Some(origin) => origin.identities(),
        None => plan::known_vdis(&names, &all)
            .into_iter()
            .map(|vdi| Ok((vdi.map_or_else(fresh, Ok)?, fresh()?)))
            .collect::<Result<_>>()?,
    };
    let sources: Vec<&Source> = wanted.disks.iter().map(|(_, source)| source).collect();
    for attempt in attempts.iter_mut() {
        let name = attempt.name.clone();
        attempt.then(|target| {
            if let Some(xva) = wanted.xva() {
                return target.plan_xva(xva.size, time, wanted.reserve);
            }
            target.plan(wanted, job, time, &identities)?;
            for plan in &target.plans {
                if let Some(why) = &plan.why_full {
                    watch.say(&format!("{name}: disk {} is stored in full: {why}", plan.name));
                }
            }
            target.believe_changes(wanted, &|sentence| watch.say(&format!("{name}: {sentence}")))?;
            watch.check()?;
            let is_exploded = target.plans.iter().any(|plan| matches!(plan.format, Format::Exploded(_)));
            target.check_room(&sources, wanted.reserve, is_exploded)
        });
    }
    watch.check()?;
    attempts.iter_mut().for_each(|attempt| attempt.then(Target::announce));
    Ok(())
}

/// Stores a disk in all destinations that have not failed.
fn copy_disk(wanted: &Wanted, disk: usize, attempts: &mut [Attempt], stages: &Stages, watch: &Watch) -> Result<()> {
    attempts.iter_mut().for_each(|attempt| attempt.then(|target| target.create(disk)));
    let lanes: Vec<Lane> = attempts
        .iter()
        .filter_map(|attempt| {
            let target = attempt.state.as_ref().ok()?;
            let sink = target.sink.as_deref()?;
            let (plan, compared) = (&target.plans[disk], &target.compared[disk]);
            Some(Lane { plan, compared, sink, failure: &target.failure, probe: &target.write })
        })
        .collect();
    if lanes.is_empty() {
        return Ok(());
    }
    let size = copy::copy(&wanted.disks[disk].1, &lanes, stages, watch)?;
    drop(lanes);
    each(attempts, |target| target.finish(disk, size));
    Ok(())
}

/// Stores the XVA of a full backup in all destinations that have not failed.
fn copy_xva(xva: &Xva, attempts: &mut [Attempt], stages: &Stages, watch: &Watch) -> Result<()> {
    attempts.iter_mut().for_each(|attempt| attempt.then(Target::create_xva));
    let lanes: Vec<full::Lane> = attempts
        .iter_mut()
        .filter_map(|attempt| {
            let Target { writing, failure, write, .. } = attempt.state.as_mut().ok()?;
            Some(full::Lane { writing: writing.as_deref_mut()?, failure, probe: write })
        })
        .collect();
    if lanes.is_empty() {
        return Ok(());
    }
    let checksum = full::copy(xva, lanes, stages, watch)?;
    each(attempts, |target| target.finish_xva(checksum, xva.size));
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
    let live = || attempts.iter().filter_map(|attempt| attempt.state.as_ref().ok());
    for attempt in attempts.iter() {
        let Ok(target) = &attempt.state else {
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
            xva: target.xva.as_ref().map(|xva| xva.path.clone()),
        };
        // Where the VM is new, another destination may know it.
        let template = target.template.as_ref().or_else(|| live().find_map(|target| target.template.as_ref()));
        documents.push(Some(match &wanted.origin {
            Some(origin) => origin.to_document(&record),
            None => record.to_document(template),
        }));
    }
    thread::scope(|scope| {
        for (attempt, document) in attempts.iter_mut().zip(&documents) {
            let Some(document) = document else { continue };
            scope.spawn(move || attempt.then(|target| target.commit(time, document)));
        }
    });
    Ok(())
}

/// Does the same in all destinations at once.
fn each(attempts: &mut [Attempt], act: impl Fn(&mut Target) -> Result<()> + Sync) {
    thread::scope(|scope| {
        for attempt in attempts {
            scope.spawn(|| attempt.then(|target| act(target)));
        }
    });
}

fn outcome(attempt: Attempt, wanted: &Wanted, job: &str, metadata: &str) -> Outcome {
    let stored = attempt.state.and_then(|target| {
        let disks = target.plans.iter().enumerate().zip(&target.written);
        let disk = |((number, plan), written): ((usize, &plan::DiskPlan), &vhd::Written)| {
            let (compared_by_digest, compared_by_bytes) = target.compared[number].counts();
            Ok(StoredDisk {
                name: plan.name.clone(),
                vdi: plan.vdi,
                path: target.path(number)?,
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
        Ok(Stored {
            metadata: metadata.to_owned(),
            job: job.to_owned(),
            schedule: wanted.schedule.clone().unwrap_or_else(|| target.schedule.clone()),
            disks: disks.map(disk).collect::<Result<_>>()?,
            xva: target.xva.clone(),
            stages: [
                ("write", target.write.reading()),
                ("sync", target.sync.reading()),
                ("publish", target.publish.reading()),
            ],
        })
    });
    Outcome { name: attempt.name, stored }
}

/// Makes a uuid of version 4.
pub(super) fn fresh() -> Result<Uuid> {
    repository::random_uuid()
        .map_err(|error| Error::new(ErrorKind::Source, format!("ask the system for random numbers: {error}")))
}
