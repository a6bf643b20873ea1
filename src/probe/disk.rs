//! A disk whose reads are a stage of their own, whoever does them.

use std::sync::Arc;

use disk::{Disk, Extent};

use super::Probe;

/// A disk whose reads are counted.
pub struct Counted {
    disk: Arc<dyn Disk>,
    probe: Arc<Probe>,
}

impl Counted {
    /// Takes a disk, and what counts.
    pub fn new(disk: Arc<dyn Disk>, probe: Arc<Probe>) -> Self {
        Self { disk, probe }
    }
}

impl Disk for Counted {
    fn size(&self) -> u64 {
        self.disk.size()
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> disk::Result<()> {
        self.probe.work(|| self.disk.read_at(offset, buffer))?;
        self.probe.add(buffer.len());
        Ok(())
    }

    fn read_into(&self, offset: u64, buffer: &mut Vec<u8>, head: usize) -> disk::Result<()> {
        self.probe.work(|| self.disk.read_into(offset, buffer, head))?;
        self.probe.add(buffer.len().saturating_sub(head));
        Ok(())
    }

    fn reads_at_once(&self) -> usize {
        self.disk.reads_at_once()
    }

    fn extent_at(&self, offset: u64) -> disk::Result<Extent> {
        self.probe.work(|| self.disk.extent_at(offset))
    }

    fn allocated(&self) -> disk::Result<u64> {
        self.probe.work(|| self.disk.allocated())
    }

    fn read_in_memory(&self, offset: u64, buffer: &mut [u8]) -> bool {
        self.disk.read_in_memory(offset, buffer)
    }

    fn prefetch_window(&self) -> u64 {
        self.disk.prefetch_window()
    }

    fn prefetch(&self, offset: u64, len: u64) {
        self.probe.work(|| self.disk.prefetch(offset, len));
    }
}
