//! Who reads guests' disks for a mount, and may have been taken over by what it read.

use std::sync::Arc;

use disk::{Disk, Extent};

/// A disk that is not read.
struct Unread;

impl Disk for Unread {
    fn size(&self) -> u64 {
        1 << 20
    }

    fn read_at(&self, _: u64, _: &mut [u8]) -> disk::Result<()> {
        unreachable!("what a worker says is checked without it")
    }

    fn extent_at(&self, offset: u64) -> disk::Result<Extent> {
        Ok(Extent { len: self.size() - offset, is_hole: false })
    }
}

/// What a worker says of a volume of 1 MiB, frame by frame: refused, or within the bounds that the mount relies on.
pub fn worker(data: &[u8]) {
    let _ = xofs::worker::judge(data, &[Arc::new(Unread)]);
}
