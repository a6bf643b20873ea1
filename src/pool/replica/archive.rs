//! The XVA of a full backup on its way into a replica: a machine of its own, for each run.

use std::sync::{Arc, Mutex, PoisonError};

use xapi::record::{Class, Sr, Texts, Vbd, Vdi, Vm};
use xapi::{Import, Outcome, Pool, Record, Ref};

use super::machine::{block_start, set_itself};
use super::marks::{REPLICATING, TAG};
use super::replication::{Progress, of_pool};
use crate::ingest::{self, ReplicaArchive};
use crate::pool::error::Result;
use crate::pool::restore::made::forget_backups;
use crate::pool::restore::transfer::of_io;
use crate::pool::survey::is_disk;

/// An XVA that is being sent.
pub struct ArchiveSending {
    pool: Pool,
    import: Import,
    mark: String,
    progress: Arc<Mutex<Progress>>,
}

impl ArchiveSending {
    /// Begins to send one into an SR.
    ///
    /// # Errors
    /// What the pool says.
    pub fn begin(pool: &Pool, sr: &Ref<Sr>, mark: &str, progress: Arc<Mutex<Progress>>) -> Result<Self> {
        Ok(Self { import: pool.import_vm(sr, None)?, pool: pool.clone(), mark: mark.to_owned(), progress })
    }

    fn end(self) -> Result<String> {
        let Self { pool, import, mark, progress } = self;
        let (outcome, mut task) = import.conclude_held()?;
        // Until all of it says to be ours, the task does to the run that comes after.
        let record = tell(&pool, &outcome, &mark).inspect_err(|_| task.leave())?;
        drop(task);
        let vm = &record.reference;
        if record.is_a_template {
            pool.set(vm, "is_a_template", false)?;
        }
        pool.add_tag(vm, TAG)?;
        progress.lock().unwrap_or_else(PoisonError::into_inner).machine = Some(vm.clone());
        Ok(record.uuid.clone())
    }
}

/// Tells what the pool made of an XVA that it is ours, and no copy of it: its disks first, so that none is without once the machine says
/// it. Exported of a snapshot, they say until then to be of a backup. Returns the machine as it was made.
fn tell(pool: &Pool, outcome: &Outcome, mark: &str) -> Result<Record<Vm>> {
    let vm: Record<Vm> = pool.record(&outcome.reference()?)?;
    block_start(pool, &vm.reference)?;
    let devices: Vec<Record<Vbd>> = pool.records_of(&vm.vbds)?;
    for disk in pool.records_of::<Vdi>(devices.iter().filter(|device| is_disk(device)).map(|device| &device.vdi))? {
        tell_one(pool, &disk.reference, &disk.other_config, mark)?;
    }
    tell_one(pool, &vm.reference, &vm.other_config, mark)?;
    Ok(vm)
}

fn tell_one<C: Class>(pool: &Pool, object: &Ref<C>, entries: &Texts, mark: &str) -> Result<()> {
    pool.set_entry(object, "other_config", REPLICATING, mark)?;
    forget_backups(pool, object, entries, REPLICATING)?;
    set_itself(pool, object)
}

impl ReplicaArchive for ArchiveSending {
    fn append(&mut self, bytes: &[u8]) -> ingest::Result<()> {
        std::io::Write::write_all(&mut self.import, bytes).map_err(|error| of_pool(of_io(error)))
    }

    fn finish(self: Box<Self>) -> ingest::Result<String> {
        self.end().map_err(of_pool)
    }
}
