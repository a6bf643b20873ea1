//! Chains of clusters: what FAT and exFAT have in common.
//!
//! ```text
//! volume ─ ... │ table: cluster → next │ ... │ heap: cluster 2 │ cluster 3 │ ...
//!                └────── Chain: runs ──────────▶ Records (of a directory), extents (of a file)
//! ```
//!
//! A chain that leads astray (into itself, to a cluster that there is none of, to one that is free or bad) is damage where
//! it does, never zeroes: what lies before is shown, but of a chain that leads into itself nothing.

mod chain;
mod records;
mod table;
mod time;

pub(crate) use chain::Chain;
pub(crate) use records::{RECORD, Record, Records};
pub(crate) use table::{Table, Width};
pub(crate) use time::DosTime;

use crate::{Attributes, Error, Extent, Extents, Kind, Result, Source, Time};

/// The first cluster of a heap has this number.
pub(crate) const FIRST: u32 = 2;

/// Where clusters lie on the volume, all of them within it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Heap {
    start: u64,
    cluster_size: u64,
    count: u32,
}

impl Heap {
    /// Makes the heap of `count` clusters from `start` on (bytes), or of as many as lie within a disk of `size` bytes.
    pub(crate) fn new(start: u64, cluster_size: u32, count: u32, size: u64) -> Self {
        let cluster_size = u64::from(cluster_size);
        let there = u32::try_from(size.saturating_sub(start) / cluster_size).unwrap_or(u32::MAX);
        Self { start, cluster_size, count: count.min(there).min(u32::MAX - FIRST) }
    }

    /// Bytes of a cluster.
    pub(crate) fn cluster_size(&self) -> u64 {
        self.cluster_size
    }

    /// Clusters in it.
    pub(crate) fn count(&self) -> u32 {
        self.count
    }

    pub(crate) fn contains(&self, cluster: u32) -> bool {
        (FIRST..FIRST + self.count).contains(&cluster)
    }

    /// Returns where a cluster of the heap starts on the volume (bytes).
    pub(crate) fn place(&self, cluster: u32) -> u64 {
        self.start + u64::from(cluster - FIRST) * self.cluster_size
    }

    /// Returns the cluster that an offset of the volume lies in.
    pub(crate) fn cluster_at(&self, offset: u64) -> Option<u32> {
        let index = u32::try_from(offset.checked_sub(self.start)? / self.cluster_size).ok()?;
        (index < self.count).then_some(FIRST + index)
    }

    /// Returns how many clusters so many bytes take.
    pub(crate) fn clusters_of(&self, bytes: u64) -> u64 {
        bytes.div_ceil(self.cluster_size)
    }
}

/// Bytes of a file: those up to `valid` were written, the others up to `size` are zeroes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Length {
    pub(crate) size: u64,
    pub(crate) valid: u64,
}

/// Returns extents of a file from the one that holds `from` on, `room` at most.
///
/// # Errors
/// [`Damaged`](crate::ErrorKind::Damaged) if there is nothing at `from` though the file is longer.
pub(crate) fn extents(heap: &Heap, chain: &Chain, length: Length, from: u64, room: usize) -> Result<Extents> {
    let mut found = Vec::new();
    let mut until = from;
    while until < length.size && found.len() < room.max(1) {
        let Some(run) = chain.run(until / heap.cluster_size) else {
            if found.is_empty() {
                return Err(chain.damage().unwrap_or_else(|| too_short(heap, chain, length.size)));
            }
            break;
        };
        let start = run.index * heap.cluster_size;
        let end = (start + run.len * heap.cluster_size).min(length.size);
        let written = length.valid.clamp(start, end);
        if until < written {
            let source = Source::Member(0, heap.place(run.cluster));
            found.push(Extent { start, len: written - start, source });
            until = written;
        } else {
            found.push(Extent { start: written, len: end - written, source: Source::Zeroes });
            until = end;
        }
    }
    Ok(Extents { found, until })
}

fn too_short(heap: &Heap, chain: &Chain, size: u64) -> Error {
    let there = chain.len() * heap.cluster_size;
    Error::damaged(format!("its clusters hold {there} bytes where its size is {size}"))
}

/// Returns attributes of what has no owner, no other names and no times; `sizes` are its own and what it takes.
pub(crate) fn attributes(kind: Kind, mode: u16, sizes: (u64, u64)) -> Attributes {
    let (size, allocated) = sizes;
    let never = Time::default();
    Attributes {
        kind,
        mode,
        uid: 0,
        gid: 0,
        // Also of directories: two would tell programs that there are none below.
        links: 1,
        size,
        allocated,
        device: (0, 0),
        accessed: never,
        modified: never,
        changed: never,
        created: None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ErrorKind;

    fn member(start: u64, len: u64, at: u64) -> Extent {
        Extent { start, len, source: Source::Member(0, at) }
    }

    #[test]
    fn what_was_never_written_is_zeroes_and_what_is_not_there_is_damage() {
        let heap = Heap::new(1000, 512, 100, 1 << 20);
        let chain = Chain::contiguous(&heap, 10, 3);
        let zeroes = |start, len| Extent { start, len, source: Source::Zeroes };
        let all = |size, valid, from| {
            extents(&heap, &chain, Length { size, valid }, from, 9).map(|extents| (extents.found, extents.until))
        };
        let at = 1000 + 8 * 512;
        assert_eq!(all(1500, 1500, 0), Ok((vec![member(0, 1500, at)], 1500)));
        assert_eq!(all(1500, 700, 0), Ok((vec![member(0, 700, at), zeroes(700, 800)], 1500)));
        assert_eq!(all(1500, 0, 600), Ok((vec![zeroes(0, 1500)], 1500)));
        assert_eq!(all(1500, 1500, 1500), Ok((vec![], 1500)));
        assert_eq!(all(2000, 2000, 0), Ok((vec![member(0, 1536, at)], 1536)));
        let error = all(2000, 2000, 1536).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Damaged);
        assert_eq!(error.to_string(), "its clusters hold 1536 bytes where its size is 2000");
    }

    #[test]
    fn a_heap_ends_where_its_disk_does() {
        let heap = Heap::new(1000, 512, 100, 1000 + 512 * 7 + 511);
        assert_eq!((heap.count(), heap.contains(8), heap.contains(9), heap.contains(1)), (7, true, false, false));
        assert_eq!((heap.cluster_at(999), heap.cluster_at(1511), heap.cluster_at(1512)), (None, Some(2), Some(3)));
        assert_eq!(heap.cluster_at(1000 + 512 * 7), None);
        assert_eq!(Heap::new(1000, 512, 100, 10).count(), 0);
    }
}
