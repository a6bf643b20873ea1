//! The clusters of a file or directory, in order.

use super::table::{Link, Table};
use super::{FIRST, Heap};
use crate::{Error, ErrorKind, Result};

/// Runs of one chain at most, 8 bytes each: what a file of 4 GiB has whose clusters, of 512 bytes, all lie apart.
const MAX_RUNS: usize = 8 << 20;

/// Where a run starts: in the chain and on the volume.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Start {
    index: u32,
    cluster: u32,
}

/// Clusters that follow each other on the volume, too.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Run {
    /// How many come before in the chain.
    pub(crate) index: u64,
    /// The first.
    pub(crate) cluster: u32,
    /// How many they are.
    pub(crate) len: u64,
}

/// A chain, as far as it is sound.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Chain {
    starts: Vec<Start>,
    len: u32,
    damage: Option<Error>,
}

impl Chain {
    /// Follows a chain to its end, and remembers `most` clusters of it.
    ///
    /// Past those it is followed, too, since one that leads into itself does so at its end. Then a cluster that was the
    /// next at some power of two comes again (Brent's algorithm): no more steps are taken than three times the clusters.
    ///
    /// # Errors
    /// Those of the disk; [`ErrorKind::TooMuch`] if it is in more pieces than are kept in memory.
    pub(crate) fn follow(table: &Table, first: u32, most: u64) -> Result<Self> {
        let mut chain = Self { starts: Vec::new(), len: 0, damage: None };
        if !table.heap().contains(first) {
            chain.damage = Some(Error::damaged(format!("its first cluster is {first}, and there is no such cluster")));
            return Ok(chain);
        }
        let (mut cluster, mut anchor, mut passed, mut next_anchor) = (first, first, 1_u64, 1_u64);
        loop {
            let link = table.next(cluster)?;
            if let Link::NotHeld(why) = link {
                chain.damage = Some(Error::damaged(why));
                return Ok(chain);
            }
            if u64::from(chain.len) < most {
                chain.push(cluster)?;
            }
            match link {
                Link::To(next) if next == anchor => {
                    let why = format!("its chain leads into itself at cluster {next}");
                    return Ok(Self { starts: Vec::new(), len: 0, damage: Some(Error::damaged(why)) });
                }
                Link::To(next) => cluster = next,
                Link::Nowhere(why) => {
                    chain.damage = Some(Error::damaged(why));
                    return Ok(chain);
                }
                Link::End | Link::NotHeld(_) => return Ok(chain),
            }
            if passed == next_anchor {
                anchor = cluster;
                next_anchor *= 2;
            }
            passed += 1;
        }
    }

    /// Returns the cluster that follows one of the heap, if that is one.
    ///
    /// # Errors
    /// Those of the disk.
    pub(crate) fn after(table: &Table, cluster: u32) -> Result<Option<u32>> {
        match table.next(cluster)? {
            Link::To(next) => Ok(Some(next)),
            Link::End | Link::NotHeld(_) | Link::Nowhere(_) => Ok(None),
        }
    }

    /// Makes the chain of clusters that lie in a row.
    pub(crate) fn contiguous(heap: &Heap, first: u32, len: u64) -> Self {
        let there = if heap.contains(first) { FIRST + heap.count() - first } else { 0 };
        let found = u32::try_from(len).unwrap_or(u32::MAX).min(there);
        let damage = (u64::from(found) < len).then(|| {
            Error::damaged(format!("its {len} clusters start at {first}, and the heap has {} in all", heap.count()))
        });
        let starts = if found > 0 { vec![Start { index: 0, cluster: first }] } else { Vec::new() };
        Self { starts, len: found, damage }
    }

    /// Returns the chain of what takes no room.
    pub(crate) fn empty() -> Self {
        Self { starts: Vec::new(), len: 0, damage: None }
    }

    fn push(&mut self, cluster: u32) -> Result<()> {
        let follows =
            self.starts.last().is_some_and(|last| cluster.checked_sub(last.cluster) == Some(self.len - last.index));
        if !follows {
            if self.starts.len() == MAX_RUNS {
                return Err(Error::new(ErrorKind::TooMuch, format!("it is in more than {MAX_RUNS} pieces")));
            }
            self.starts.push(Start { index: self.len, cluster });
        }
        self.len += 1;
        Ok(())
    }

    /// Clusters in it.
    pub(crate) fn len(&self) -> u64 {
        self.len.into()
    }

    /// Returns why it ends where it does, if not as chains end.
    pub(crate) fn damage(&self) -> Option<Error> {
        self.damage.clone()
    }

    /// Returns the run that the cluster with so many before it is in.
    pub(crate) fn run(&self, index: u64) -> Option<Run> {
        let after = self.starts.partition_point(|start| u64::from(start.index) <= index);
        (index < self.len()).then(|| self.run_before(after))
    }

    /// Returns all runs.
    pub(crate) fn runs(&self) -> impl Iterator<Item = Run> + '_ {
        (1..=self.starts.len()).map(|after| self.run_before(after))
    }

    fn run_before(&self, after: usize) -> Run {
        let Start { index, cluster } = self.starts[after - 1];
        let end = self.starts.get(after).map_or(self.len, |next| next.index);
        Run { index: index.into(), cluster, len: u64::from(end - index) }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::clusters::Width;
    use crate::memory::Memory;

    const END: u16 = 0xffff;

    /// A table of FAT16 with these entries from cluster 2 on; all others are free.
    fn table(entries: &[u16]) -> Table {
        let mut disk = Memory::new(1 << 20);
        let bytes: Vec<u8> = entries.iter().flat_map(|entry| entry.to_le_bytes()).collect();
        disk.write(4, &bytes);
        Table::new(Arc::new(disk), 0, Width::Sixteen, Heap::new(4096, 512, 1000, 1 << 20))
    }

    fn runs(chain: &Chain) -> Vec<(u64, u32, u64)> {
        chain.runs().map(|run| (run.index, run.cluster, run.len)).collect()
    }

    #[test]
    fn a_chain_is_runs_of_clusters() {
        let table = table(&[3, 4, 9, 0, 0, 0, 2, 10, 11, 6, END]);
        let chain = Chain::follow(&table, 2, 100).unwrap();
        assert_eq!(runs(&chain), [(0, 2, 3), (3, 9, 3)]);
        assert_eq!(chain.damage().unwrap().to_string(), "cluster 6 of its chain is free");
        let found: Vec<_> = (0..8).map(|index| chain.run(index).map(|run| run.cluster)).collect();
        assert_eq!(found, [Some(2), Some(2), Some(2), Some(9), Some(9), Some(9), None, None]);
    }

    #[test]
    fn a_chain_that_leads_into_itself_holds_nothing() {
        // However long what leads into the cycle, and the cycle, are; however few of them are needed.
        for (before, cycle) in [(0, 1), (0, 2), (1, 1), (5, 3), (3, 5), (100, 1), (1, 100), (64, 64)] {
            let mut entries: Vec<u16> = (3..3 + before + cycle).collect();
            *entries.last_mut().unwrap() = 2 + before;
            for most in [1, before + cycle, before + cycle + 1, 900] {
                let chain = Chain::follow(&table(&entries), 2, most.into()).unwrap();
                assert_eq!((chain.len(), runs(&chain)), (0, vec![]), "{before} {cycle} {most}");
                let why = chain.damage().unwrap().to_string();
                assert!(why.starts_with("its chain leads into itself at"), "{why}");
            }
        }
    }

    #[test]
    fn what_is_longer_than_needed_is_cut() {
        let chain = Chain::follow(&table(&[3, 4, 5, END]), 2, 2).unwrap();
        assert_eq!((runs(&chain), chain.damage()), (vec![(0, 2, 2)], None));
    }

    #[test]
    fn clusters_that_there_are_none_of_are_damage() {
        let table = table(&[1002]);
        for first in [0, 1, 1002, u32::MAX] {
            assert_eq!(Chain::follow(&table, first, 1).unwrap().damage().unwrap().kind(), ErrorKind::Damaged);
        }
        assert_eq!(runs(&Chain::follow(&table, 2, 5).unwrap()), [(0, 2, 1)]);
        let heap = table.heap();
        for (first, len, there) in [(2, 1000, 1000), (2, 1001, 1000), (1001, u64::MAX, 1), (1002, 1, 0), (0, 5, 0)] {
            let chain = Chain::contiguous(heap, first, len);
            assert_eq!((chain.len(), chain.damage().is_some()), (there, there < len), "{first} {len}");
        }
    }
}
