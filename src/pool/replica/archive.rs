//! The XVA of a full backup on its way into a replica: a machine of its own, for each run.

use std::sync::{Arc, Mutex, PoisonError};

use xapi::record::{Sr, Vbd, Vm};
use xapi::{Import, Pool, Record, Ref};

use super::machine::block_start;
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
        let (outcome, task) = import.conclude_held()?;
        let vm: Ref<Vm> = outcome.reference()?;
        // First of all that it is ours: until it says so, the task does to the run that comes after one that died.
        pool.set_entry(&vm, "other_config", REPLICATING, &mark)?;
        drop(task);
        let record: Record<Vm> = pool.record(&vm)?;
        block_start(&pool, &vm)?;
        if record.is_a_template {
            pool.set(&vm, "is_a_template", false)?;
        }
        // Exported of a snapshot, it says to be one of a backup.
        forget_backups(&pool, &vm, &record.other_config, REPLICATING)?;
        for device in pool.records_of::<Vbd>(&record.vbds)?.iter().filter(|device| is_disk(device)) {
            pool.set_entry(&device.vdi, "other_config", REPLICATING, &mark)?;
            let entries = pool.field(&device.vdi, "other_config")?;
            forget_backups(&pool, &device.vdi, &entries, REPLICATING)?;
        }
        pool.add_tag(&vm, TAG)?;
        progress.lock().unwrap_or_else(PoisonError::into_inner).machine = Some(vm);
        Ok(record.uuid.clone())
    }
}

impl ReplicaArchive for ArchiveSending {
    fn append(&mut self, bytes: &[u8]) -> ingest::Result<()> {
        std::io::Write::write_all(&mut self.import, bytes).map_err(|error| of_pool(of_io(error)))
    }

    fn finish(self: Box<Self>) -> ingest::Result<String> {
        self.end().map_err(of_pool)
    }
}
