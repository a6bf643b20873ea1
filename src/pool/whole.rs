//! A snapshot as one XVA: what a full backup is made of.

use std::io::{self, Read};
use std::sync::Arc;

use xapi::record::Vm;
use xapi::{Compression, Pool, Ref};

use super::limits::{Pace, Transfer};
use super::way::of_limits;
use crate::ingest::{self, ErrorKind, Export, PoolVm, Turn};

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
    /// What waits for its turn.
    pub transfer: Transfer,
    /// What slows it down.
    pub pace: Option<Arc<Pace>>,
}

/// An export that is under way.
struct Running(xapi::Export, Option<Arc<Pace>>);

impl PoolVm for SnapshotExport {
    fn expected_size(&self) -> u64 {
        self.size
    }

    fn turn(&self, say: &dyn Fn(&str)) -> ingest::Result<Turn> {
        Ok(Box::new(self.transfer.turn(say).map_err(of_limits)?))
    }

    fn open(&self) -> ingest::Result<Box<dyn Export>> {
        let export = self.pool.export_vm(&self.vm, self.compression);
        Ok(Box::new(Running(export.map_err(|error| of_pool(&error))?, self.pace.clone())))
    }
}

impl Read for Running {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.0.read(buffer)?;
        if let Some(pace) = &self.1 {
            pace.wait(read as u64).map_err(io::Error::other)?;
        }
        Ok(read)
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
