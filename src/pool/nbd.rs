//! A snapshot's disk read by NBD, with what is known of its blocks; and a disk that goes on by NBD where its files fail.

use std::collections::BTreeSet;
use std::sync::{Arc, OnceLock};
use std::time::Instant;

use disk::{Disk, Extent};
use xapi::NbdExport;

use crate::probe::{self, Connections};

/// Bytes of a block.
const BLOCK: u64 = 2 << 20;
/// Blocks that are asked for at once: 32 MiB, what a network of 10 Gbit/s brings while a request and its answer take 25 ms.
const READS_AT_ONCE: usize = 16;

/// A disk behind NBD.
pub struct NbdDisk {
    export: NbdExport,
    /// In bytes; the export may be larger by what its SR rounded up.
    size: u64,
    /// The blocks that are there; all of them, where that is not known.
    present: Option<BTreeSet<u64>>,
    /// Where it is told how many connections there are.
    open: Connections,
}

impl NbdDisk {
    /// Takes an export of a disk of `size` bytes. How many connections it has in the end is told by `open`.
    ///
    /// # Errors
    /// If the export is smaller.
    pub fn new(
        export: NbdExport,
        size: u64,
        present: Option<BTreeSet<u64>>,
        open: &Connections,
    ) -> Result<Self, String> {
        if export.size() < size {
            return Err(format!("the export has {} bytes, {size} were expected", export.size()));
        }
        Ok(Self { export, size, present, open: open.clone() })
    }

    fn check(&self, offset: u64, len: u64) -> disk::Result<()> {
        if offset.checked_add(len).is_some_and(|end| end <= self.size) {
            return Ok(());
        }
        let message = format!("a disk has {} bytes, {len} at {offset} were asked for", self.size);
        Err(disk::Error::new(disk::ErrorKind::OutOfRange, message))
    }

    /// Reads so many bytes, and tells how long these were on the way: once there and back, if it took that long.
    fn timed(&self, bytes: usize, read: impl FnOnce() -> xapi::Result<()>) -> disk::Result<()> {
        let begun = Instant::now();
        read().map_err(unavailable)?;
        probe::on_the_way(bytes, begun.elapsed().min(self.export.round_trip()));
        Ok(())
    }
}

impl Drop for NbdDisk {
    fn drop(&mut self) {
        self.open.set(self.export.connections());
    }
}

impl Disk for NbdDisk {
    fn size(&self) -> u64 {
        self.size
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> disk::Result<()> {
        self.check(offset, buffer.len() as u64)?;
        self.timed(buffer.len(), || self.export.read_at(offset, buffer))
    }

    fn read_into(&self, offset: u64, buffer: &mut Vec<u8>, head: usize) -> disk::Result<()> {
        let bytes = buffer[head..].len();
        self.check(offset, bytes as u64)?;
        self.timed(bytes, || self.export.read_into(offset, buffer, head))
    }

    fn reads_at_once(&self) -> usize {
        READS_AT_ONCE
    }

    fn extent_at(&self, offset: u64) -> disk::Result<Extent> {
        self.check(offset, 1)?;
        let rest = self.size - offset;
        let Some(present) = &self.present else { return Ok(Extent { len: rest, is_hole: false }) };
        let block = offset / BLOCK;
        let is_hole = !present.contains(&block);
        // Up to the next block that is there, or to the end of this one.
        let end = match is_hole {
            true => present.range(block..).next().map_or(self.size, |next| next * BLOCK),
            false => (block + 1) * BLOCK,
        };
        Ok(Extent { len: end.saturating_sub(offset).min(rest), is_hole })
    }
}

#[expect(clippy::needless_pass_by_value, reason = "it is what errors are mapped with")]
fn unavailable(error: xapi::Error) -> disk::Error {
    disk::Error::new(disk::ErrorKind::Unavailable, error.to_string())
}

/// Opens a disk by another way; says why it cannot be.
type Open = Box<dyn Fn() -> Result<Arc<dyn Disk>, String> + Send + Sync>;

/// A disk that is read in one way until that fails, and then in another, to its end.
pub struct ElseDisk {
    first: Arc<dyn Disk>,
    open: Open,
    second: OnceLock<Result<Arc<dyn Disk>, String>>,
}

impl ElseDisk {
    /// Takes the first disk, and what opens the second, which holds the same.
    pub fn new(first: Arc<dyn Disk>, open: Open) -> Self {
        Self { first, open, second: OnceLock::new() }
    }

    fn either<T>(&self, act: impl Fn(&dyn Disk) -> disk::Result<T>) -> disk::Result<T> {
        let failed = match self.second.get() {
            Some(Ok(second)) => return act(second.as_ref()),
            Some(Err(_)) | None => match act(self.first.as_ref()) {
                Err(error) if error.kind() != disk::ErrorKind::OutOfRange => error,
                done => return done,
            },
        };
        let second = self.second.get_or_init(|| {
            tracing::info!(%failed, "it is read by NBD from here on");
            (self.open)()
        });
        match second {
            Ok(second) => act(second.as_ref()),
            Err(why) => {
                let message = format!("{failed}; nor can it be read by NBD: {why}");
                Err(disk::Error::new(disk::ErrorKind::Unavailable, message))
            }
        }
    }
}

impl Disk for ElseDisk {
    fn size(&self) -> u64 {
        self.first.size()
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> disk::Result<()> {
        let len = buffer.len();
        // A closure that may be called twice cannot hold the buffer, so each way fills one of its own.
        let bytes = self.either(|disk| {
            let mut bytes = vec![0; len];
            disk.read_at(offset, &mut bytes).map(|()| bytes)
        })?;
        buffer.copy_from_slice(&bytes);
        Ok(())
    }

    fn reads_at_once(&self) -> usize {
        self.first.reads_at_once()
    }

    fn extent_at(&self, offset: u64) -> disk::Result<Extent> {
        self.either(|disk| disk.extent_at(offset))
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering};

    use super::*;

    /// Holds one byte everywhere, and fails when it is told to.
    struct Told(u8, AtomicBool);

    impl Disk for Told {
        fn size(&self) -> u64 {
            4096
        }

        fn read_at(&self, _: u64, buffer: &mut [u8]) -> disk::Result<()> {
            if self.1.load(Ordering::Relaxed) {
                return Err(disk::Error::new(disk::ErrorKind::Stale, "coalesced"));
            }
            buffer.fill(self.0);
            Ok(())
        }

        fn extent_at(&self, offset: u64) -> disk::Result<Extent> {
            Ok(Extent { len: 4096 - offset, is_hole: false })
        }
    }

    #[test]
    fn after_a_failure_the_second_way_is_used_to_the_end() {
        let first = Arc::new(Told(1, AtomicBool::new(false)));
        let disk = ElseDisk::new(first.clone(), Box::new(|| Ok(Arc::new(Told(2, AtomicBool::new(false))))));
        let read = || {
            let mut bytes = [0; 4];
            disk.read_at(0, &mut bytes).map(|()| bytes[0])
        };
        assert_eq!(read().expect("reads"), 1);
        first.1.store(true, Ordering::Relaxed);
        assert_eq!(read().expect("reads"), 2);
        first.1.store(false, Ordering::Relaxed);
        assert_eq!(read().expect("reads"), 2);
        let neither =
            ElseDisk::new(Arc::new(Told(1, AtomicBool::new(true))), Box::new(|| Err("no network".to_owned())));
        let error = neither.read_at(0, &mut [0]).expect_err("no way");
        assert!(error.to_string().contains("coalesced") && error.to_string().contains("no network"), "{error}");
    }
}
