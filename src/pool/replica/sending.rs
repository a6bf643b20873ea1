//! The blocks of a disk on their way into a replica: one VHD of the length that was said, put together as they come.

use std::sync::Arc;

use vhd::{BlockIndex, FileLayout, StreamWriter};
use xapi::record::Vdi;
use xapi::{Format, Import, Pool, Ref};

use crate::ingest::{ReplicaBlock, ReplicaDisk};
use crate::pool::error::{Error, ErrorKind, Result};
use crate::pool::restore::transfer::{of_io, wait_until_free};

/// A disk that is being sent.
pub struct DiskSending {
    pool: Pool,
    vdi: Ref<Vdi>,
    /// `None` if nothing differs: then nothing is sent.
    vhd: Option<StreamWriter<Import>>,
}

impl DiskSending {
    /// Begins to send a disk into one of the pool, which holds its base, or nothing.
    ///
    /// # Errors
    /// If a VHD cannot hold it; what the pool says.
    pub fn begin(pool: &Pool, vdi: &Ref<Vdi>, disk: &ReplicaDisk) -> Result<Self> {
        let layout = FileLayout::new(disk.size, disk.blocks.to_vec(), disk.base, disk.snapshot, 0);
        let layout = layout.map_err(|error| Error::new(ErrorKind::Backup, error.reason))?;
        let begin = || -> Result<StreamWriter<Import>> {
            let import = pool.import_vdi(vdi, Format::Vhd, layout.file_size())?;
            StreamWriter::begin(Arc::new(layout), import).map_err(of_io)
        };
        let vhd = if disk.blocks.is_empty() { None } else { Some(begin()?) };
        Ok(Self { pool: pool.clone(), vdi: vdi.clone(), vhd })
    }

    /// Sends the next block.
    ///
    /// # Errors
    /// What the pool says.
    pub fn block(&mut self, block: &ReplicaBlock) -> Result<()> {
        let none = || Error::new(ErrorKind::Backup, format!("block {} came, and none was to come", block.index));
        let vhd = self.vhd.as_mut().ok_or_else(none)?;
        vhd.write(BlockIndex(block.index), block.data, block.changed).map_err(of_io)
    }

    /// Ends it: the disk holds all of it, and is free.
    ///
    /// # Errors
    /// If not all blocks came; what the pool says.
    pub fn finish(self) -> Result<()> {
        let Some(vhd) = self.vhd else { return Ok(()) };
        vhd.finish().map_err(of_io)?.conclude()?;
        wait_until_free(&self.pool, &self.vdi)
    }
}
