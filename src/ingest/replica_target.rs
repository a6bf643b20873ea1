//! One replica, from what it has to its commit.
//!
//! ```text
//! plan: what each disk is of there
//! for each disk: open · blocks in order (ordered) · finish          of a full backup: open · bytes · finish
//! commit
//! ```

use std::sync::Arc;

use storage::Checksum;
use uuid::Uuid;

use super::copy::Failure;
use super::error::{Error, ErrorKind, Result};
use super::feed::Feed;
use super::full;
use super::ordered::{ReplicaLane, Sent};
use super::replica::{Replica, ReplicaArchive, ReplicaBase, ReplicaDisk, ReplicaSink};
use super::report::{Place, Stored, StoredDisk, StoredXva};
use super::wanted::{Extent, SCHEDULE, Wanted};
use crate::probe::{Crew, Probe, Stage, Subject, Transfer, Way};
use crate::repository::BackupTime;

/// How a disk lies in a replica, in words.
const FORMAT: &str = "replica";

/// A replica that is written to.
pub(super) struct ReplicaTarget<'a> {
    replica: &'a dyn Replica,
    plans: Vec<Plan>,
    sink: Option<Box<dyn ReplicaSink>>,
    sent: Sent,
    archive: Option<Box<dyn ReplicaArchive>>,
    disks: Vec<StoredDisk>,
    xva: Option<StoredXva>,
    /// What it is called, once it is there.
    place: String,
    failure: Failure,
    prepare: Arc<Probe>,
    import: Arc<Probe>,
    sync: Arc<Probe>,
    publish: Arc<Probe>,
}

/// One disk, as it is to come.
struct Plan {
    name: String,
    vdi: Uuid,
    snapshot: Uuid,
    size: u64,
    /// What the replica has, or why nothing.
    base: std::result::Result<ReplicaBase, String>,
    /// Why all of it comes, though that was not asked for.
    why_full: Option<String>,
    is_key: bool,
    blocks: usize,
}

impl<'a> ReplicaTarget<'a> {
    pub fn new(replica: &'a dyn Replica, transfer: &Transfer) -> Self {
        let of = replica.subject();
        Self {
            replica,
            plans: Vec::new(),
            sink: None,
            sent: Sent::default(),
            archive: None,
            disks: Vec::new(),
            xva: None,
            place: String::new(),
            failure: Failure::default(),
            prepare: transfer.step(Stage::Prepare, &of),
            import: transfer.stage(Stage::Import, &of, Crew::Own, Way::Only),
            sync: transfer.step(Stage::Sync, &of),
            publish: transfer.step(Stage::Publish, &of),
        }
    }

    /// Returns what it is kept in.
    pub fn subject(&self) -> Subject {
        self.replica.subject()
    }

    /// Returns what the replica has of a disk of `size` bytes, or why nothing can be put on it.
    pub fn base_of(&self, wanted: &Wanted, vdi: Uuid, size: u64) -> Result<std::result::Result<ReplicaBase, String>> {
        if wanted.extent == Some(Extent::Full) {
            return Ok(Err("it is to be stored in full".to_owned()));
        }
        self.replica.base_of(vdi, size)
    }

    /// Decides what comes of each disk; `identities` are the disk's and its snapshot's uuid.
    pub fn plan(&mut self, wanted: &Wanted, identities: &[(Uuid, Uuid)]) -> Result<()> {
        for ((name, source), (vdi, snapshot)) in wanted.disks.iter().zip(identities) {
            let usage = |what: String| Err(Error::new(ErrorKind::Usage, format!("disk {name} {what}")));
            let Some(size) = source.size() else {
                return usage(
                    "is a stream, whose size is known only at its end: a replica has to know it first".to_owned(),
                );
            };
            let base = self.base_of(wanted, *vdi, size)?;
            if let (Some(Extent::Incremental), Err(why)) = (wanted.extent, &base) {
                return usage(format!("cannot be stored as an increment: {why}"));
            }
            let (vdi, snapshot) = (*vdi, *snapshot);
            let name = name.clone();
            self.plans.push(Plan { name, vdi, snapshot, size, base, why_full: None, is_key: true, blocks: 0 });
        }
        Ok(())
    }

    /// Returns the snapshot that a disk is of there, and its size in bytes.
    pub fn base(&self, disk: usize) -> Option<(Uuid, u64)> {
        self.plans[disk].base.as_ref().ok().map(|base| (base.snapshot, base.size))
    }

    /// Begins a disk, of which `blocks` will come. Returns why all of it comes, if that was not asked for.
    pub fn open(&mut self, wanted: &Wanted, disk: usize, feed: &Feed, blocks: &[u32]) -> Result<Option<&str>> {
        let plan = &mut self.plans[disk];
        // What is read relative to a base is so to that of all.
        let base = plan.base.as_ref().ok().filter(|_| feed.changed().is_some()).map(|base| base.snapshot);
        (plan.is_key, plan.blocks) = (base.is_none(), blocks.len());
        plan.why_full = match &plan.base {
            _ if base.is_some() || wanted.extent == Some(Extent::Full) => None,
            Ok(_) => Some("what differs from what it has cannot be had".to_owned()),
            Err(why) => Some(why.clone()),
        };
        let Plan { name, vdi, snapshot, size, .. } = plan;
        let disk = ReplicaDisk { name, vdi: *vdi, snapshot: *snapshot, size: *size, base, blocks };
        self.sent = Sent::default();
        self.sink = Some(self.prepare.work(|| self.replica.open(&disk))?);
        Ok(plan.why_full.as_deref())
    }

    /// Returns what takes the blocks of the disk that was begun.
    pub fn lane(&mut self) -> Option<ReplicaLane<'_>> {
        let sink = self.sink.as_deref_mut()?;
        Some(ReplicaLane { sink, sent: &mut self.sent, failure: &self.failure, probe: &self.import })
    }

    /// Takes back what was written of a disk that comes once more.
    pub fn restart(&mut self) -> Result<()> {
        self.sink = None;
        self.failure.take().map_or(Ok(()), Err)
    }

    /// Ends a disk.
    pub fn finish(&mut self, disk: usize) -> Result<()> {
        if let Some(error) = self.failure.take() {
            return Err(error);
        }
        let Some(sink) = self.sink.take() else { return Ok(()) };
        let plan = &self.plans[disk];
        if self.sent.blocks != plan.blocks {
            let message = format!("of disk {} {} of {} blocks came", plan.name, self.sent.blocks, plan.blocks);
            return Err(Error::new(ErrorKind::Source, message));
        }
        let path = self.sync.work(|| sink.finish())?;
        self.disks.push(StoredDisk {
            name: plan.name.clone(),
            vdi: plan.vdi,
            path,
            format: FORMAT,
            is_key: plan.is_key,
            why_full: plan.why_full.clone(),
            virtual_size: plan.size,
            blocks: u32::try_from(plan.blocks).unwrap_or(u32::MAX),
            stored_bytes: self.sent.bytes,
            compared_by_digest: 0,
            compared_by_bytes: 0,
        });
        Ok(())
    }

    /// Begins an XVA, of that many bytes if it is known.
    pub fn create_xva(&mut self, size: Option<u64>) -> Result<()> {
        self.archive = Some(self.prepare.work(|| self.replica.open_archive(size))?);
        Ok(())
    }

    /// Returns what takes the bytes of the XVA that was begun.
    pub fn archive_lane(&mut self) -> Option<full::Lane<'_>> {
        let output = full::Output::Replica(self.archive.as_deref_mut()?);
        Some(full::Lane { output, failure: &self.failure, probe: &self.import })
    }

    /// Ends the XVA.
    pub fn finish_xva(&mut self, checksum: Checksum, size: u64) -> Result<()> {
        if let Some(error) = self.failure.take() {
            return Err(error);
        }
        let Some(archive) = self.archive.take() else { return Ok(()) };
        let path = self.sync.work(|| archive.finish())?;
        self.xva = Some(StoredXva { path, bytes: size, checksum });
        Ok(())
    }

    /// Makes what came the newest state.
    pub fn commit(&mut self, time: BackupTime) -> Result<()> {
        self.place = self.publish.work(|| self.replica.commit(time))?;
        Ok(())
    }

    /// Removes what was written; returns `error`, and what could not be removed.
    pub fn undo(&mut self, error: Error) -> Error {
        // What is open ends first.
        (self.sink, self.archive) = (None, None);
        match self.replica.undo() {
            Ok(()) => error,
            Err(left) => error.and(&format!("not all that was begun could be removed: {left}")),
        }
    }

    /// Says what was stored.
    pub fn stored(self, wanted: &Wanted, job: &str) -> Stored {
        Stored {
            place: Place::Replica(self.place),
            job: job.to_owned(),
            schedule: wanted.schedule.clone().unwrap_or_else(|| SCHEDULE.to_owned()),
            disks: self.disks,
            xva: self.xva,
        }
    }
}
