//! Which blocks two disks of one lineage may differ in, by their tables alone.
//!
//! ```text
//!      one     other
//!       c        y
//!       b        x          what any of c, b, y, x holds may differ
//!        \      /
//!         a ── base         what only these hold does not
//! ```

use std::ops::Range;
use std::sync::Arc;

use storage::Storage;

use crate::chain::{Chain, Member};
use crate::chain_disk::{Snapshot, each_map};
use crate::error::{Error, ErrorKind, Result};

/// Returns the ranges of bytes outside of which both disks hold the same: ascending, whole blocks, not touching each other.
/// They go up to the end of the larger disk; what the smaller one does not reach counts as zeroes.
///
/// # Errors
/// `Unavailable` while a merge takes blocks away from one of the layers that only one of them has; `Unsupported` if their
/// blocks are of different sizes; or if a table cannot be read.
pub(crate) fn between(one: &Snapshot, other: &Snapshot) -> Result<Vec<Range<u64>>> {
    if one.block_size != other.block_size {
        let reason = "a disk with blocks of the same size as the other was expected";
        return Err(Error::new(ErrorKind::Unsupported, &one.chain.members[0].layer.name, reason));
    }
    let is_in = |chain: &Chain, member: &&Member| chain.members.iter().any(|others| others.layer == member.layer);
    let part = |of: &Chain, other: &Chain, is_common| -> Chain {
        Chain { members: of.members.iter().filter(|member| is_in(other, member) == is_common).cloned().collect() }
    };
    let own = [part(&one.chain, &other.chain, false), part(&other.chain, &one.chain, false)];
    if let Some(member) = own.iter().flat_map(|chain| &chain.members).find(|member| member.moving.is_some()) {
        let reason = "a merge is taking its blocks away; try again when it has ended";
        return Err(Error::new(ErrorKind::Unavailable, &member.layer.name, reason));
    }
    let mut differ = Vec::new();
    for (chain, snapshot) in own.iter().zip([one, other]) {
        mark(&mut differ, chain, &snapshot.storage, 0)?;
    }
    // What a smaller layer does not reach is zero above it, whatever is below.
    let smallest = own.iter().flat_map(|chain| &chain.members).map(|member| member.layer.virtual_size()).min();
    let common = part(&one.chain, &other.chain, true);
    if let Some(hidden) =
        smallest.filter(|size| common.members.iter().any(|member| member.layer.virtual_size() > *size))
    {
        mark(&mut differ, &common, &one.storage, hidden / one.block_size.bytes())?;
    }
    let (mut ranges, size) = (Vec::<Range<u64>>::new(), one.block_size.bytes());
    let mut at = 0;
    for is_different in differ {
        match ranges.last_mut() {
            Some(range) if is_different && range.end == at => range.end += size,
            _ if is_different => ranges.push(at..at + size),
            _ => {}
        }
        at += size;
    }
    Ok(ranges)
}

/// Marks the blocks, from block `first` on, that the layers of `chain` hold.
fn mark(differ: &mut Vec<bool>, chain: &Chain, storage: &Arc<dyn Storage>, first: u64) -> Result<()> {
    let count = |member: &Member| usize::try_from(member.layer.block_count()).expect("at most MAX_BLOCKS");
    let first = usize::try_from(first).expect("at most MAX_BLOCKS");
    differ.resize(chain.members.iter().map(count).max().unwrap_or(0).max(differ.len()), false);
    each_map(chain, storage, |member, map| {
        map.each_held(count(member), |block, _| differ[block] |= block >= first);
        Ok(())
    })
}
