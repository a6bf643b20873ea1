//! One backup of one VM, from its locks to its last trace.
//!
//! ```text
//! lock of this machine ─► survey ─► what dead runs left ─► chains are fit ─► replicas ─► locks of the repositories, what they have
//!    ─► base of each disk ─► snapshot ─► transfer, ingest ─┬► stored in each of them: it is the base now, the one before goes
//!                                                          └► else: it goes, the one before stays
//! ```

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use jiff::Timestamp;
use uuid::Uuid;
use xapi::record::{Vdi, Vm};
use xapi::{Budget, NbdOptions, Pool, Record, Ref};

use super::base::{self, Base, DiskSnapshot, Stored};
use super::error::{Error, ErrorKind, Result};
use super::explain::{ExplainedDisk, ExplainedReplica, Explanation, Fate, Room};
use super::journal::Journal;
use super::keys::{self, Keys};
use super::limits::{Limits, PoolId, Transfer, Turns};
use super::replica::{self, Absent, Identity, Kind, Place, Replication, Wish as ReplicaWish};
use super::snapshot::{self, Taken};
use super::state::State;
use super::subjects::Sources;
use super::survey::{self, LiveDisk, Survey};
use super::way::{Known, SnapshotDisk, Way};
use super::whole::SnapshotExport;
use super::{file_sr, records, subjects, sweep};
use crate::ingest::{self, Begun, Destination, Extent, Origin, PoolDisk, Report, Source, Wanted, Watch};
use crate::probe::{Probe, Stage, Subject};

/// Connections to read a disk by NBD over, unless somebody says otherwise.
pub const USUAL_CONNECTIONS: u8 = 4;
/// How often chains are looked at that are waited for.
const CHAIN_PAUSE: Duration = Duration::from_secs(5);

/// What is made of a VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// Its disks, as VHD chains.
    Incremental,
    /// One XVA.
    Full(xapi::Compression),
}

/// How backups are made.
pub struct Options {
    /// What is made.
    pub mode: Mode,
    /// The job; that of xofs if nothing is said.
    pub job: Option<String>,
    /// Whether a snapshot is kept for the next increment.
    pub keeps_base: bool,
    /// Whether changed block tracking is switched on.
    pub tracks_changes: bool,
    /// Whether the data of a kept snapshot is destroyed once changed block tracking has been used.
    pub purges_data: bool,
    /// Connections to read a disk by NBD over, if its hosts have so many to spare; `None` not to use NBD.
    pub nbd_connections: Option<usize>,
    /// Folders of SRs on this machine, by uuid.
    pub sr_paths: BTreeMap<String, PathBuf>,
    /// How long chains are waited for that the host has to coalesce; `None` not to look at them.
    pub chain_patience: Option<Duration>,
    /// How long others are waited for that work on the same VM.
    pub patience: Duration,
    /// How many states of a VM and schedule are kept in each replica, at least one.
    pub replicas_kept: usize,
    /// How much is done at once.
    pub limits: Limits,
}

/// What became of a VM.
pub enum Done {
    /// Its tag says that it is left out, for this reason.
    LeftOut(String),
    /// What would be made.
    Explained(Box<Explanation>),
    /// It was made.
    Made(Box<Report>),
}

/// Backups of the VMs of one pool, in one run.
pub struct Run<'a> {
    pool: Pool,
    /// Who answers for it.
    master: Subject,
    /// What its disks are read from.
    sources: Sources,
    state: &'a State,
    journal: Arc<Journal>,
    id: PoolId,
    turns: Turns,
    options: &'a Options,
    repositories: &'a [Destination],
    /// Where replicas are kept, by name; or why they cannot be.
    places: Vec<(String, Result<Arc<Place>>)>,
    say: &'a (dyn Fn(&str) + Sync),
}

/// A replica, or what takes its place where it cannot be reached.
type Sought = std::result::Result<Arc<Replication>, Arc<Absent>>;

impl<'a> Run<'a> {
    /// Begins a run, and undoes what earlier ones left that died, in the pool and in those that replicas are `wished` in.
    ///
    /// An SR that is not there, or named twice, is a destination that fails: see [`Run::check_places`].
    ///
    /// # Errors
    /// What a pool says; if a journal cannot be written.
    pub fn begin(
        pool: Pool,
        state: &'a State,
        options: &'a Options,
        repositories: &'a [Destination],
        wished: Vec<ReplicaWish>,
        say: &'a (dyn Fn(&str) + Sync),
    ) -> Result<Self> {
        let (pool, journal, of) = sweep::begin(pool, state, say)?;
        let (journal, turns, id) = (Arc::new(journal), Turns::new(state, options.limits), PoolId::new(of.as_ref()));
        let mut places: Vec<(String, Result<Arc<Place>>)> = Vec::with_capacity(wished.len());
        for ReplicaWish { name, pool: other, sr } in wished {
            let find = || -> Result<Place> {
                let (pool, journal, id) = match other {
                    None => (pool.clone(), journal.clone(), id.clone()),
                    // What stops the backup stops what it is sent to.
                    Some(other) => {
                        let (pool, journal, of) = sweep::begin(other?.with(pool.cancel()), state, say)?;
                        (pool, Arc::new(journal), PoolId::new(of.as_ref()))
                    }
                };
                Ok(Place {
                    name: name.clone(),
                    sr: Place::storage(&pool, &sr)?,
                    mark: keys::mark(journal.run(), &state.keeper()),
                    keep: options.replicas_kept,
                    turns: turns.clone(),
                    pool,
                    journal,
                    id,
                })
            };
            let mut place = match find() {
                Err(error) if error.kind() == ErrorKind::Interrupted => return Err(error),
                place => place.map(Arc::new),
            };
            let is_same = |other: &Place| place.as_ref().is_ok_and(|place| place.sr.uuid == other.sr.uuid);
            if places.iter().any(|(_, other)| other.as_ref().is_ok_and(|other| is_same(other))) {
                let message = format!("the SR of '{}' is named twice", name.escape_debug());
                place = Err(Error::new(ErrorKind::Usage, message));
            }
            places.push((name, place));
        }
        let master = subjects::master(&pool, of.as_ref());
        let sources = Sources::new(of.as_ref(), &master);
        Ok(Self { pool, master, sources, state, journal, id, turns, options, repositories, places, say })
    }

    /// Refuses SRs that are wished for and are not there, or are named twice.
    ///
    /// # Errors
    /// [`ErrorKind::Usage`].
    pub fn check_places(&self) -> Result<()> {
        let errors = self.places.iter().filter_map(|(_, place)| place.as_ref().err());
        errors.filter(|error| error.kind() == ErrorKind::Usage).try_for_each(|error| Err(error.clone()))
    }

    /// Finds a VM.
    ///
    /// # Errors
    /// If there is none of that name, or several; what the pool says.
    pub fn find(&self, named: &str) -> Result<Record<Vm>> {
        survey::find(&self.pool, named)
    }

    fn job(&self) -> &str {
        self.options.job.as_deref().unwrap_or(ingest::JOB)
    }

    /// Makes a backup of a VM. `wanted` says how it is stored.
    ///
    /// # Errors
    /// What went wrong; then nothing of it is left, and the snapshot that the next one is relative to is still there.
    pub fn back_up(&self, vm: Record<Vm>, wanted: Wanted, watch: &Watch, only_explains: bool) -> Result<Done> {
        if let Some(reason) = keys::left_out(&vm.tags) {
            return Ok(Done::LeftOut(reason.to_owned()));
        }
        let cancel = self.pool.cancel();
        let lock = format!("{}.{}", vm.uuid, self.job());
        let step = |stage| watch.transfer().step(stage, &self.master);
        let (looks, settles) = (step(Stage::Survey), step(Stage::Settle));
        let locks = watch.transfer().step(Stage::Lock, &Subject::machine());
        let _lock = locks.take(|| self.state.lock(&lock, self.options.patience, || cancel.is_cancelled()))?;
        let mut survey = looks.work(|| self.survey(&vm.reference, only_explains, &step(Stage::Chain)))?;
        if survey.wanted().next().is_none() {
            let message = "it has no disk to be backed up; those whose name has [NOBAK] in it are left out";
            return Err(Error::new(ErrorKind::Usage, message));
        }
        let mut wanted = Wanted {
            vm: survey.vm.uuid.clone(),
            name: Some(survey.vm.name_label.clone()),
            job: Some(self.job().to_owned()),
            patience: self.options.patience,
            ..wanted
        };
        let schedule = wanted.schedule.as_deref().unwrap_or(ingest::SCHEDULE);
        let replicas = looks.work(|| self.replicas(&survey, schedule))?;
        let destinations: Vec<Destination> = self
            .repositories
            .iter()
            .cloned()
            .chain(replicas.iter().map(|replica| match replica {
                Ok(replica) => Destination::Replica(replica.clone()),
                Err(absent) => Destination::Replica(absent.clone()),
            }))
            .collect();
        let mut begun = ingest::begin(&wanted, &destinations, watch)?;
        looks.work(|| self.decide(&mut survey, &mut begun, &wanted, only_explains))?;
        let disks: Vec<&LiveDisk> = match self.options.mode {
            Mode::Incremental => survey.wanted().collect(),
            Mode::Full(_) => Vec::new(),
        };
        let snapshots = survey.disk_snapshots(self.job())?;
        let bases = looks.work(|| self.bases(&disks, &snapshots, &mut begun, &wanted));
        if only_explains {
            return Ok(Done::Explained(Box::new(self.explain(&survey, &disks, &bases, &replicas)?)));
        }
        let takes = step(Stage::Snapshot);
        takes.work(|| self.track_changes(&disks));
        let now = Timestamp::now();
        let keys = snapshot::new_keys(self.job(), &survey.vm.uuid, self.journal.run(), &self.state.keeper(), now);
        let waits = step(Stage::Slot);
        let turn = || waits.take(|| self.turns.snapshot(&self.id, cancel, self.say));
        let taken = takes.work(|| snapshot::take(&self.pool, &self.journal, &survey, &keys, turn, self.say))?;
        let sources = looks.work(|| self.sources(&survey, &taken, &disks, &snapshots, bases));
        let described = looks.work(|| self.describe(&survey, &taken, &disks, &mut wanted, &replicas));
        let stored = described.and_then(|()| {
            wanted.disks = disks
                .iter()
                .zip(&sources)
                .map(|(disk, source)| {
                    let source: Arc<dyn PoolDisk> = source.clone();
                    (disk.name.clone(), Source::Pool(source))
                })
                .collect();
            let publishes = || {
                // Else nothing of it is kept, wherever it is stored.
                let told = if self.keeps_base() { taken.publishing(&self.journal) } else { Ok(()) };
                told.map_err(|error| ingest::Error::new(ingest::ErrorKind::Source, error.to_string()))
            };
            Ok(begun.store(&wanted, &publishes)?)
        });
        replicas.iter().flatten().flat_map(|replica| replica.remarks()).for_each(|remark| (self.say)(&remark));
        // What reads from the pool ends before its disks are destroyed.
        drop(wanted);
        let uses_tracking =
            !sources.is_empty() && sources.iter().all(|source| source.known.last() == Some(Way::ChangedBlocks));
        drop(sources);
        let settled = settles.work(|| self.settle(&survey, taken, stored.as_ref().ok(), uses_tracking));
        let mut report = stored?;
        report.transfer = watch.transfer().reading();
        settled.unwrap_or_else(|error| (self.say)(&format!("not all that this run made could be removed: {error}")));
        Ok(Done::Made(Box::new(report)))
    }

    /// Looks at the VM, once nothing of dead runs is left and its chains are fit.
    fn survey(&self, vm: &Ref<Vm>, only_explains: bool, waits: &Probe) -> Result<Survey> {
        let begun = Instant::now();
        let look = || -> Result<Survey> { Survey::of(&self.pool, self.pool.record(vm)?) };
        let mut survey = look()?;
        if only_explains {
            return Ok(survey);
        }
        if sweep::unfinished(&self.pool, self.state, &survey, self.say)? {
            survey = look()?;
        }
        let mut is_said = false;
        while let (Some(patience), Some(problem)) =
            (self.options.chain_patience, survey::chain_problem(&self.pool, &survey)?)
        {
            if begun.elapsed() >= patience {
                let message = format!(
                    "{problem}; a snapshot now would make it worse. Wait until the host is done (--chain-wait), or give \
                     --ignore-chain"
                );
                return Err(Error::new(ErrorKind::Chain, message));
            }
            if !std::mem::replace(&mut is_said, true) {
                (self.say)(&format!("{problem}: waiting for the host"));
            }
            let pause = CHAIN_PAUSE.min(patience);
            waits.take(|| self.pool.cancel().sleep(pause, "wait for the host to coalesce"))?;
            survey = look()?;
        }
        Ok(survey)
    }

    /// Decides about what runs left that died while they published.
    fn decide(&self, survey: &mut Survey, begun: &mut Begun, wanted: &Wanted, only_explains: bool) -> Result<()> {
        let is_left = |keys: &Keys| sweep::is_left(self.state, keys, &survey.vm.uuid, self.job());
        if !survey.snapshots.iter().any(|snapshot| is_left(&snapshot.keys)) {
            return Ok(());
        }
        let sizes: Vec<(Uuid, u64)> = survey.wanted().map(|disk| (disk.uuid, disk.vdi.virtual_size)).collect();
        let bases = begun.bases(wanted, &sizes);
        // Nobody says what he has where all is to be stored anew.
        let are_all = begun.failed().next().is_none() && wanted.extent != Some(Extent::Full);
        let asked = sweep::Asked { bases: &bases, are_all };
        sweep::decide(&self.pool, self.state, survey, self.job(), &asked, only_explains, self.say)
    }

    /// Whether a snapshot is kept for the next increment.
    fn keeps_base(&self) -> bool {
        self.options.mode == Mode::Incremental && self.options.keeps_base
    }

    /// Chooses what each disk is read relative to.
    fn bases(&self, disks: &[&LiveDisk], snapshots: &[DiskSnapshot], begun: &mut Begun, wanted: &Wanted) -> Vec<Base> {
        let sizes: Vec<(Uuid, u64)> = disks.iter().map(|disk| (disk.uuid, disk.vdi.virtual_size)).collect();
        let found = begun.bases(wanted, &sizes);
        disks
            .iter()
            .zip(found)
            .map(|(disk, bases)| {
                let whys = || bases.destinations.iter().filter_map(|(_, base)| base.as_ref().err());
                let stored = match bases.agreed(&base::history(disk.uuid, snapshots)) {
                    Some(uuid) => Stored::Of(uuid),
                    None if whys().count() == bases.destinations.len() => {
                        Stored::Nothing(whys().next().cloned().unwrap_or_default())
                    }
                    None => Stored::Differing,
                };
                base::choose(disk.uuid, disk.vdi.sr.as_str(), snapshots, &stored, self.options.keeps_base)
            })
            .collect()
    }

    /// Switches changed block tracking on, where it was asked for. A disk that cannot is read without.
    fn track_changes(&self, disks: &[&LiveDisk]) {
        for disk in disks.iter().filter(|disk| self.options.tracks_changes && !disk.vdi.cbt_enabled) {
            if let Err(error) = self.pool.enable_cbt(&disk.vdi.reference) {
                (self.say)(&format!("changed block tracking of {} cannot be switched on: {error}", disk.name));
            }
        }
    }

    /// Returns the ways that are tried for a disk, in this order.
    fn ways(&self, survey: &Survey, disk: &LiveDisk, base: &Base) -> Vec<Way> {
        let uses_nbd = self.options.nbd_connections.is_some();
        let may = |way: &Way| match way {
            Way::Files => self.folder(survey, disk).is_some(),
            Way::ChangedBlocks => uses_nbd && base.snapshot().is_some() && disk.vdi.cbt_enabled,
            Way::BlockList => uses_nbd,
            Way::Stream => true,
        };
        Way::ALL.into_iter().filter(may).collect()
    }

    /// Returns the folder of a disk's SR on this machine.
    fn folder(&self, survey: &Survey, disk: &LiveDisk) -> Option<PathBuf> {
        let sr = survey.storages.get(&disk.vdi.sr).filter(|sr| file_sr::is_of_files(&sr.r#type))?;
        self.options.sr_paths.get(&sr.uuid).cloned()
    }

    /// Makes what reads the disks of a snapshot.
    fn sources(
        &self,
        survey: &Survey,
        taken: &Taken,
        disks: &[&LiveDisk],
        snapshots: &[DiskSnapshot],
        bases: Vec<Base>,
    ) -> Vec<Arc<SnapshotDisk>> {
        let all: BTreeMap<&str, &Record<Vdi>> =
            survey.snapshots.iter().flat_map(|snapshot| &snapshot.disks).map(|vdi| (vdi.uuid.as_str(), vdi)).collect();
        let pace = self.turns.pace(&self.id, self.pool.cancel());
        let nbd = |connections: usize| NbdOptions {
            connections,
            ..NbdOptions::new(Budget::new(self.state.slots()).at_least(connections))
        };
        let source = |(disk, base): (&&LiveDisk, Base)| {
            let base_vdi = base.snapshot().and_then(|uuid| all.get(uuid.to_string().as_str()).copied().cloned());
            Some(Arc::new(SnapshotDisk {
                pool: self.pool.clone(),
                vdi: taken.disk_of(disk)?.clone(),
                history: base::history(disk.uuid, snapshots),
                base,
                base_vdi,
                folder: self.folder(survey, disk),
                source: survey
                    .storages
                    .get(&disk.vdi.sr)
                    .map_or_else(Subject::machine, |sr| self.sources.of(&self.pool, sr)),
                nbd: self.options.nbd_connections.map(nbd),
                transfer: self.transfer(),
                pace: pace.clone(),
                known: Known::default(),
            }))
        };
        disks.iter().zip(bases).filter_map(source).collect()
    }

    /// Returns what waits for the turn of a disk, or of the VM as a whole: in this pool, and in those that replicas are in.
    fn transfer(&self) -> Transfer {
        let places = self.places.iter().filter_map(|(_, place)| place.as_ref().ok());
        let pools = places.map(|place| place.id.clone()).chain([self.id.clone()]).collect();
        Transfer { turns: self.turns.clone(), pools, cancel: self.pool.cancel().clone() }
    }

    /// Looks at the replicas of the VM that there are. One that cannot be looked at is a destination that has failed.
    fn replicas(&self, survey: &Survey, schedule: &str) -> Result<Vec<Sought>> {
        let kept: BTreeSet<Uuid> = survey.disk_snapshots(self.job())?.iter().map(|snapshot| snapshot.uuid).collect();
        let kind = match self.options.mode {
            Mode::Incremental => Kind::Increments,
            Mode::Full(_) => Kind::Full,
        };
        let replica = |(name, place): &(String, Result<Arc<Place>>)| {
            let identity = |place: &Place| Identity {
                of: survey.vm.uuid.clone(),
                job: self.job().to_owned(),
                sr: place.sr.uuid.clone(),
                kind,
            };
            let begin = |place: Arc<Place>| {
                let identity = identity(&place);
                Replication::begin(place, identity, schedule, kept.clone())
            };
            let begun = place.clone().and_then(begin);
            begun.map(Arc::new).map_err(|error| Arc::new(Absent { name: name.clone(), error }))
        };
        Ok(self.places.iter().map(replica).collect())
    }

    /// Says in `wanted`, and to the replicas, what the pool says of the VM and its snapshot.
    fn describe(
        &self,
        survey: &Survey,
        taken: &Taken,
        disks: &[&LiveDisk],
        wanted: &mut Wanted,
        replicas: &[Sought],
    ) -> Result<()> {
        let records = records::of(&self.pool, survey, taken, disks)?;
        for replica in replicas.iter().flatten() {
            replica.describe(replica::Source::of(&self.pool, survey, taken, disks, &records.vtpms)?);
        }
        // An XVA is made by the master, or by whom it sends to.
        wanted.from = Some(self.master.clone());
        wanted.origin = Some(match self.options.mode {
            Mode::Incremental => Origin::of_pool(records),
            Mode::Full(compression) => {
                let size = survey.wanted().fold(0_u64, |sum, disk| sum.saturating_add(disk.vdi.virtual_size));
                let export = SnapshotExport {
                    pool: self.pool.clone(),
                    vm: taken.vm.reference.clone(),
                    compression,
                    size,
                    transfer: self.transfer(),
                    pace: self.turns.pace(&self.id, self.pool.cancel()),
                };
                Origin::of_pool_export(records, Box::new(export))
            }
        });
        Ok(())
    }

    /// Decides about the snapshots: the new one takes the place of the one before if it is stored in each repository and replica.
    fn settle(&self, survey: &Survey, taken: Taken, report: Option<&Report>, uses_tracking: bool) -> Result<()> {
        // Whatever ended the run.
        let pool = self.pool.with(&super::cleanup());
        let is_stored = report.is_some_and(|report| report.outcomes.iter().all(|outcome| outcome.stored.is_ok()));
        if !is_stored || !self.keeps_base() {
            taken.destroy(&pool, &self.journal)?;
        } else if self.options.purges_data && uses_tracking {
            taken.purge_data(&pool, &survey.vm.reference, self.journal.run())?;
            taken.disks_stored(&pool, &self.journal)?;
        } else {
            taken.stored(&pool, &self.journal)?;
        }
        if is_stored && self.options.mode == Mode::Incremental {
            // The bases of before, what is left of bases, and what dead runs left beside them.
            let keeper = self.state.keeper();
            let is_over =
                |keys: &Keys| keys.is_of(&survey.vm.uuid, self.job()) && (keys.is_stored || keys.keeper == keeper);
            for old in survey.snapshots.iter().filter(|old| is_over(&old.keys)) {
                snapshot::destroy_ours(&pool, &survey.vm.reference, old)?;
            }
        }
        if !is_stored {
            // Also those of which nobody knows, because the answer did not come.
            sweep::destroy_tasks(&pool, &self.state.keeper(), |run| run == self.journal.run())?;
        }
        Ok(())
    }

    /// Says what would be made.
    fn explain(
        &self,
        survey: &Survey,
        disks: &[&LiveDisk],
        bases: &[Base],
        replicas: &[Sought],
    ) -> Result<Explanation> {
        let of_disk = |disk: &LiveDisk| {
            let base = disks.iter().zip(bases).find(|(other, _)| other.uuid == disk.uuid);
            let fate = match base {
                _ if disk.is_left_out => Fate::LeftOut,
                Some((_, base)) => Fate::Read(base.clone(), self.ways(survey, disk, base)),
                None => Fate::Full,
            };
            let (name, label) = (disk.name.clone(), disk.vdi.name_label.clone());
            ExplainedDisk { name, label, size: disk.vdi.virtual_size, fate }
        };
        let mut room = Vec::new();
        for reference in survey.wanted().map(|disk| &disk.vdi.sr).collect::<BTreeSet<_>>() {
            let sizes: Vec<u64> =
                survey.wanted().filter(|disk| disk.vdi.sr == *reference).map(|disk| disk.vdi.virtual_size).collect();
            let Some(storage) = survey.storage(reference) else { continue };
            if let Some(takes) = storage.takes(&sizes) {
                room.push(Room { storage: storage.name.clone(), takes, free: storage.free() });
            }
        }
        let mut remarks = Vec::new();
        if survey.is_of_xen_orchestra {
            remarks.push(
                "Xen Orchestra keeps snapshots of this VM for backups of its own: each tool adds its own to the chains",
            );
        }
        if survey.vm.power_state == "Suspended" {
            remarks.push("the VM is suspended: its memory is not part of the backup");
        }
        Ok(Explanation {
            name: survey.vm.name_label.clone(),
            uuid: survey.vm.uuid.clone(),
            disks: survey.disks.iter().map(of_disk).collect(),
            room,
            chain_problem: survey::chain_problem(&self.pool, survey)?,
            replicas: replicas
                .iter()
                .map(|replica| match replica {
                    Ok(replica) => replica.explain(survey, disks),
                    Err(absent) => Ok(ExplainedReplica::absent(&absent.name, &absent.error)),
                })
                .collect::<Result<_>>()?,
            remarks: remarks.into_iter().map(str::to_owned).collect(),
        })
    }
}
