//! New backups out of disk images, in one pass to one or several repositories.
//!
//! ```text
//! run ─► target   one destination: lock, what a dead run left, commit       ─► intent
//!     ─► plan     a key or an increment of each disk, and in which layout
//!     ─► room     whether it fits, before anything is written
//!     ─► copy     one pass over a disk: read, compare, encode, write        ◄─ source, changes; probe
//!     ─► full     one pass over the XVA of a full backup that is mirrored   ─► archive
//! source ─► qemu ─► nbd   images that are neither raw nor VHD
//!     ─► record   the metadata of the backup, or mirror that of another repository
//! ```
//!
//! Invariants: a backup is there as a whole or not at all, whenever the program ends; nothing that was there before is changed or
//! removed; memory is bounded (`copy`). A destination that fails is given up, and the others go on.

mod archive;
mod changes;
mod copy;
mod error;
mod full;
mod intent;
mod mirror;
mod nbd;
mod plan;
mod probe;
mod qemu;
mod record;
mod room;
mod source;
mod target;

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use jiff::Timestamp;
use storage::{Checksum, ObjectPath, WritableStorage};
use uuid::Uuid;
use vhd::{Filter, Format};

pub use changes::{BlockSet, Changes};
pub use error::{Error, ErrorKind, Result};
pub use mirror::Origin;
pub use nbd::NbdDisk;
pub use probe::{Probe, Reading};
pub use source::{ImageOptions, RawFile, Source};

use crate::repository::{self, BackupTime, Mode, Repository, VmId, is_device_name};
use copy::Lane;
use full::Xva;
use record::{DiskRecord, Record};
use target::Target;

/// The job that backups belong to unless it is said otherwise. Never one of Xen Orchestra's: it would put a second child on
/// the disk that it made last, and break one of them when it merges.
pub const JOB: &str = "78a0f5c1-0b5e-4d62-9a3b-6e1f0c7d2a94";
/// The schedule that they belong to.
pub const SCHEDULE: &str = "3c9e1d47-52f8-4a06-8b7d-f1a4c05e6b32";
/// How far the newest backup may be ahead of the clock: a second per backup, when several are made within one.
const AHEAD_S: i64 = 60;

/// Which blocks are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Extent {
    /// All, as a key.
    Full,
    /// Those that differ from the newest backup; an error if it cannot be had.
    Incremental,
}

/// How disks are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Layout {
    /// One VHD file each.
    File,
    /// A file for each block; through what is there already, if it is not said.
    Exploded(Option<Filter>),
}

/// A backup that is to be made.
#[derive(Default)]
pub struct Wanted {
    /// The VM: its uuid, or its name if that is known and only one has it.
    pub vm: String,
    /// Its name, if it is new or has another now.
    pub name: Option<String>,
    /// Its disks, by the name that the guest has for them.
    pub disks: Vec<(String, Source)>,
    /// Increments where they are possible, if nothing is said.
    pub extent: Option<Extent>,
    /// As the newest backup, if nothing is said.
    pub layout: Option<Layout>,
    /// Its job; [`JOB`] if nothing is said.
    pub job: Option<String>,
    /// Its schedule; that of the newest backup of the job, else [`SCHEDULE`], if nothing is said.
    pub schedule: Option<String>,
    /// When it was made; now, if nothing is said.
    pub time: Option<Timestamp>,
    /// How long the lock of the VM is waited for.
    pub patience: Duration,
    /// Bytes that are left free in each destination.
    pub reserve: Option<u64>,
    /// What changed since a backup, where that is known.
    pub changes: Option<Changes>,
    /// The backup that it is made from, if it is one: see [`Wanted::mirror`].
    pub origin: Option<Origin>,
}

/// A repository that is written to.
pub struct Destination {
    /// As it was named; holds no secret.
    pub name: String,
    /// To read what is there.
    pub repository: Arc<Repository>,
    /// To write.
    pub storage: Arc<dyn WritableStorage>,
    /// Bytes that all its files may have together.
    pub quota: Option<u64>,
}

/// What is seen of an ingest while it runs, and how it is stopped.
pub struct Watch {
    is_cancelled: AtomicBool,
    done: AtomicU64,
    expected: AtomicU64,
    /// As an index of [`Watch::AWAITED`].
    awaited: AtomicU8,
    say: Box<dyn Fn(&str) + Send + Sync>,
}

impl Watch {
    const AWAITED: [&'static str; 3] = ["image", "processor", "repository"];

    /// Makes one; `say` is told, in a sentence, what a person should know.
    pub fn new(say: impl Fn(&str) + Send + Sync + 'static) -> Self {
        Self {
            is_cancelled: AtomicBool::new(false),
            done: AtomicU64::new(0),
            expected: AtomicU64::new(0),
            awaited: AtomicU8::new(0),
            say: Box::new(say),
        }
    }

    /// Stops it soon: what was written is removed, unless the backup is complete by then.
    pub fn cancel(&self) {
        self.is_cancelled.store(true, Ordering::Release);
    }

    /// Returns how many bytes of the sources were looked at, and how many will be as far as is known.
    #[must_use]
    pub fn progress(&self) -> (u64, u64) {
        (self.done.load(Ordering::Relaxed), self.expected.load(Ordering::Relaxed))
    }

    /// Returns what is waited for: the image, the processor, or a repository.
    #[must_use]
    pub fn waits_for(&self) -> &'static str {
        Self::AWAITED[usize::from(self.awaited.load(Ordering::Relaxed)) % Self::AWAITED.len()]
    }

    /// Says what is waited for, by which queues are empty or full.
    fn sees(&self, is_input_empty: bool, is_output_full: bool) {
        let awaited = if is_output_full { 2 } else { u8::from(!is_input_empty) };
        self.awaited.store(awaited, Ordering::Relaxed);
    }

    fn is_cancelled(&self) -> bool {
        self.is_cancelled.load(Ordering::Acquire)
    }

    fn check(&self) -> Result<()> {
        if self.is_cancelled() { Err(Error::interrupted()) } else { Ok(()) }
    }

    fn advance(&self, bytes: u64) {
        self.done.fetch_add(bytes, Ordering::Relaxed);
    }

    fn expect(&self, bytes: u64) {
        self.expected.fetch_add(bytes, Ordering::Relaxed);
    }

    fn say(&self, sentence: &str) {
        (self.say)(sentence);
    }
}

/// The stages that all destinations share.
#[derive(Default)]
struct Stages {
    read: Probe,
    compare: Probe,
    hash: Probe,
    encode: Probe,
}

/// What was done.
pub struct Report {
    /// The VM.
    pub vm: VmId,
    /// The time of the backup.
    pub time: BackupTime,
    /// Reading the sources; comparing with bases, whose bytes are counted; making digests; encoding. The last three are done by
    /// the same threads: what these wait for is counted as the input of the first and the output of the last.
    pub stages: [(&'static str, Reading); 4],
    /// What became of each destination, in their order.
    pub outcomes: Vec<Outcome>,
    /// How long it took.
    pub elapsed: Duration,
}

/// What became of a destination.
pub struct Outcome {
    /// As it was named.
    pub name: String,
    /// The backup, or why there is none.
    pub stored: Result<Stored>,
}

/// A backup that was stored.
#[derive(Debug, Clone)]
pub struct Stored {
    /// Its metadata file.
    pub metadata: String,
    /// Its job.
    pub job: String,
    /// Its schedule.
    pub schedule: String,
    /// Its disks; none of a full one.
    pub disks: Vec<StoredDisk>,
    /// Its XVA, if it is a full one.
    pub xva: Option<StoredXva>,
    /// Writing blocks, syncing, publishing.
    pub stages: [(&'static str, Reading); 3],
}

/// A disk that was stored.
#[derive(Debug, Clone)]
pub struct StoredDisk {
    /// As the guest sees it.
    pub name: String,
    /// The disk that was backed up.
    pub vdi: Uuid,
    /// Where it lies, relative to the folder of the VM.
    pub path: String,
    /// In words: `vhd`, `exploded, brotli`.
    pub format: &'static str,
    /// Whether it is complete by itself.
    pub is_key: bool,
    /// Why it is, though that was not asked for.
    pub why_full: Option<String>,
    /// In bytes.
    pub virtual_size: u64,
    /// Blocks that were stored.
    pub blocks: u32,
    /// Bytes that were stored.
    pub stored_bytes: u64,
    /// Blocks that were compared with the backup before by the digest of what it has there.
    pub compared_by_digest: u64,
    /// Those that had to be read there, and were compared by their bytes.
    pub compared_by_bytes: u64,
}

/// An XVA that was stored.
#[derive(Debug, Clone)]
pub struct StoredXva {
    /// Where it lies, relative to the folder of the VM.
    pub path: String,
    /// In bytes, before it was encrypted.
    pub bytes: u64,
    /// Of these, as Xen Orchestra writes it.
    pub checksum: Checksum,
}

/// A destination, as far as it came.
struct Attempt<'a> {
    name: String,
    state: Result<Target<'a>>,
}

impl Wanted {
    /// Returns the XVA that is mirrored, if it is a full backup.
    fn xva(&self) -> Option<&Xva> {
        self.origin.as_ref()?.xva()
    }
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

/// Refuses what can be seen to be wrong before anything is looked at.
fn check(wanted: &Wanted) -> Result<()> {
    let usage = |message: String| Err(Error::new(ErrorKind::Usage, message));
    if wanted.xva().is_some() && (wanted.layout.is_some() || wanted.extent == Some(Extent::Incremental)) {
        let message = "it is a full backup, an XVA, which is stored as it is: it has neither a format nor a compression to \
                       choose, and is never an increment; leave --format, --compression and --incremental out";
        return usage(message.to_owned());
    }
    if wanted.disks.is_empty() && wanted.xva().is_none() {
        return usage("no disk is named: give one with --disk xvda=IMAGE".to_owned());
    }
    let mut names = BTreeSet::new();
    for (name, _) in &wanted.disks {
        if wanted.origin.is_none() && !is_device_name(name) {
            let shown = name.escape_debug();
            return usage(format!("'{shown}' is no name of a disk: one like xvda was expected, of letters and digits"));
        }
        if !names.insert(name) {
            return usage(format!("disk {name} is named twice"));
        }
    }
    for (what, id) in [("job", &wanted.job), ("schedule", &wanted.schedule)] {
        let is_plain = |id: &String| {
            let is_id = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_';
            (1..=64).contains(&id.len()) && id.bytes().all(is_id)
        };
        if let Some(id) = id.as_ref().filter(|id| !is_plain(id)) {
            return usage(format!("'{}' is no id of a {what}: a uuid was expected", id.escape_debug()));
        }
    }
    let streams = wanted.disks.iter().filter(|(_, source)| matches!(source, Source::Stream(_))).count();
    if streams > 1 {
        return usage("only one disk can be read from a stream".to_owned());
    }
    Ok(())
}

/// Finds the VM: the same one in all destinations.
fn resolve(wanted: &Wanted, destinations: &[Destination]) -> Result<VmId> {
    let mut known = Vec::new();
    let mut unlisted = None;
    for destination in destinations {
        match destination.repository.vms() {
            Ok(vms) => known.extend(vms.iter().cloned()),
            Err(error) => unlisted = Some(error),
        }
    }
    if let Ok(uuid) = Uuid::try_parse(&wanted.vm) {
        let uuid = uuid.to_string();
        let found = known.iter().find(|vm| vm.id.as_str().eq_ignore_ascii_case(&uuid));
        return match (found, &wanted.name) {
            (Some(vm), _) => Ok(vm.id.clone()),
            (None, Some(_)) => Ok(VmId::new(&uuid).expect("a uuid can name a folder")),
            (None, None) => {
                let message = format!("no backup of a VM {uuid} is there: give its name with --name to begin with it");
                Err(Error::new(ErrorKind::Usage, message))
            }
        };
    }
    let ids: BTreeSet<&VmId> = known.iter().filter(|vm| vm.name == wanted.vm).map(|vm| &vm.id).collect();
    let shown = wanted.vm.escape_debug();
    match (ids.len(), unlisted) {
        (1, _) => Ok((*ids.first().expect("there is one")).clone()),
        (0, Some(error)) => Err(error.into()),
        (0, None) => {
            let message = format!(
                "no backup of a VM '{shown}' is there; one that is new is named by its uuid, with --vm UUID --name NAME"
            );
            Err(Error::new(ErrorKind::Repository(repository::ErrorKind::NotFound), message))
        }
        _ => {
            let ids = ids.iter().map(|id| id.as_str()).collect::<Vec<_>>().join(", ");
            let message = format!("several VMs are called '{shown}': {ids}; say which by its uuid");
            Err(Error::new(ErrorKind::Repository(repository::ErrorKind::Ambiguous), message))
        }
    }
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
fn fresh() -> Result<Uuid> {
    repository::random_uuid()
        .map_err(|error| Error::new(ErrorKind::Source, format!("ask the system for random numbers: {error}")))
}
