//! A snapshot as one XVA: what a full backup is made of.

use std::io::{self, Read};

use xapi::record::Vm;
use xapi::{Compression, Pool, Ref};

use crate::ingest::{self, ErrorKind, Export, PoolVm};

/// A snapshot that is exported as a whole.
pub struct SnapshotExport {
    /// The pool, whose token stops what waits.
    pub pool: Pool,
    /// The snapshot.
    pub vm: Ref<Vm>,
    /// How the XVA is compressed.
    pub compression: Compression,
    /// Of its disks together, in bytes.
    pub size: u64,
}

/// An export that is under way.
struct Running(xapi::Export);

impl PoolVm for SnapshotExport {
    fn expected_size(&self) -> u64 {
        self.size
    }

    fn open(&self) -> ingest::Result<Box<dyn Export>> {
        let export = self.pool.export_vm(&self.vm, self.compression);
        Ok(Box::new(Running(export.map_err(|error| of_pool(&error))?)))
    }
}

impl Read for Running {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.0.read(buffer)
    }
}

impl Export for Running {
    fn finish(self: Box<Self>) -> ingest::Result<()> {
        self.0.conclude().map_err(|error| of_pool(&error))
    }
}

fn of_pool(error: &xapi::Error) -> ingest::Error {
    ingest::Error::new(ErrorKind::Source, error.to_string())
}
