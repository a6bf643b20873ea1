//! Arrays of Linux md, from the members on all disks of a guest.
//!
//! Linear arrays, stripes (0), mirrors (1) and both (10, near copies) are assembled of members that are known to be complete;
//! those with parity (4, 5, 6) are named.

mod superblock;

use std::collections::BTreeMap;
use std::sync::Arc;

use disk::Disk;

use crate::map::{Map, Segment, SegmentSource, Stripes};
use crate::{Error, ErrorKind, Mapped, Result};
use superblock::{Array, Superblock};

pub(crate) use superblock::MAGIC;

/// More members are refused; Linux has fewer in all but linear arrays.
const MAX_MEMBERS: u32 = 1024;

/// The arrays of a guest.
#[derive(Debug, Default)]
pub(crate) struct Assembled {
    /// Each with its name, or why its bytes cannot be had.
    pub(crate) volumes: Vec<(String, Result<Map>)>,
    /// What is wrong with members.
    pub(crate) problems: Vec<Error>,
}

/// A member that is here.
struct Member<'a> {
    name: &'a str,
    map: &'a Map,
    superblock: Superblock,
}

/// Returns where a superblock of version 0.90 lies on a device of `size` bytes: at the start of the last 64 KiB
/// that start at a multiple of them and lie on it as a whole.
pub(crate) fn old_superblock_at(size: u64) -> Option<u64> {
    (size / 65536).checked_sub(1).map(|block| block * 65536)
}

/// Returns where a superblock of version 1.0 lies on a device of `size` bytes: at least 8 KiB before its
/// end, at a multiple of 4 KiB.
pub(crate) fn last_superblock_at(size: u64) -> Option<u64> {
    size.checked_sub(8192).map(|at| at / 4096 * 4096)
}

/// Finds the arrays of members, each of which has a name and a map.
pub(crate) fn assemble(candidates: &[(String, Map)], disks: &[Arc<dyn Disk>]) -> Assembled {
    let mut assembled = Assembled::default();
    let mut arrays: BTreeMap<[u8; 16], Vec<Member>> = BTreeMap::new();
    // In the order in which they are found.
    let mut order = vec![];
    for (name, map) in candidates {
        let read = Mapped::new(map.clone(), disks.to_vec()).and_then(|volume| Ok(Superblock::read(&volume)?));
        let damaged = || Error::damaged("its superblock is damaged");
        match read.and_then(|superblock| superblock.ok_or_else(damaged)) {
            Ok(superblock) => {
                let members = arrays.entry(superblock.array.uuid).or_default();
                if members.is_empty() {
                    order.push(superblock.array.uuid);
                }
                members.push(Member { name, map, superblock });
            }
            Err(error) => assembled.problems.push(Error::new(error.kind(), format!("md member {name}: {error}"))),
        }
    }
    for members in order.iter().filter_map(|uuid| arrays.get(uuid)) {
        let newest = members.iter().rev().max_by_key(|member| member.superblock.events).expect("it has one");
        let array = &newest.superblock.array;
        let is_number = !array.name.is_empty() && array.name.bytes().all(|byte| byte.is_ascii_digit());
        let name = format!("md{}{}", if is_number || array.name.is_empty() { "" } else { "-" }, array.name);
        let (current, copies) = current(members, newest.superblock.events);
        assembled.problems.extend(copies.into_iter().map(|text| Error::damaged(format!("md array {name}: {text}"))));
        assembled.volumes.push((name, array_map(array, &current)));
    }
    assembled
}

/// Returns the members by their roles that have all that was written, and which of them are there twice.
fn current<'a>(members: &'a [Member], events: u64) -> (BTreeMap<u32, &'a Member<'a>>, Vec<String>) {
    let mut current: BTreeMap<u32, &Member> = BTreeMap::new();
    let mut copies = vec![];
    // The count of one more is written to one member after the other.
    let is_current =
        |member: &&Member| member.superblock.is_complete && member.superblock.events.saturating_add(1) >= events;
    for member in members.iter().filter(is_current) {
        let Some(role) = member.superblock.role else { continue };
        match current.get(&role) {
            Some(first) if first.superblock.events >= member.superblock.events => {
                copies.push(format!("{} is a copy of {}: only that one is used", member.name, first.name));
            }
            Some(first) => {
                copies.push(format!("{} is a copy of {}: only that one is used", first.name, member.name));
                current.insert(role, member);
            }
            None => drop(current.insert(role, member)),
        }
    }
    (current, copies)
}

fn array_map(array: &Array, members: &BTreeMap<u32, &Member>) -> Result<Map> {
    if array.is_reshaping {
        return Err(Error::unsupported("an md array on its way to another shape, which this version does not read"));
    }
    if !(1..=MAX_MEMBERS).contains(&array.members) {
        return Err(Error::damaged(format!("an md array of {} members", array.members)));
    }
    match array.level {
        -1 => linear(array, members),
        0 => stripes(array, members),
        1 => {
            let member = newest(members.values()).ok_or_else(|| missing(0, array))?;
            Map::new(part(member, 0, array.size)?)
        }
        10 => near(array, members),
        level => Err(Error::unsupported(format!("an md array of level {level}, which this version does not read"))),
    }
}

fn missing(role: u32, array: &Array) -> Error {
    let of = array.members;
    Error::new(ErrorKind::NotFound, format!("needs member {role} of {of}, which is complete on no disk of this backup"))
}

fn newest<'a>(members: impl Iterator<Item = &'a &'a Member<'a>>) -> Option<&'a Member<'a>> {
    let mut newest: Option<&Member> = None;
    for member in members {
        if newest.is_none_or(|newest| newest.superblock.events < member.superblock.events) {
            newest = Some(member);
        }
    }
    newest
}

/// Returns where bytes of the data of a member lie.
fn part(member: &Member, start: u64, len: u64) -> Result<Vec<Segment>> {
    let start = member.superblock.data_offset.checked_add(start);
    let pieces = start.and_then(|start| member.map.slice(start, len)).filter(|pieces| !pieces.is_empty());
    pieces.ok_or_else(|| Error::damaged(format!("needs more of its member {} than lies on its disk", member.name)))
}

/// Returns all members in order, with how many bytes each gives: whole chunks.
fn all<'a>(array: &Array, members: &BTreeMap<u32, &'a Member<'a>>) -> Result<Vec<(&'a Member<'a>, u64)>> {
    let member = |role| {
        let member = *members.get(&role).ok_or_else(|| missing(role, array))?;
        let size = member.superblock.data_size;
        Ok((member, size - size % array.chunk_size.max(1)))
    };
    (0..array.members).map(member).collect()
}

fn linear(array: &Array, members: &BTreeMap<u32, &Member>) -> Result<Map> {
    let mut segments = vec![];
    for (member, size) in all(array, members)? {
        segments.extend(part(member, 0, size)?);
    }
    Map::new(segments)
}

/// Members of different sizes are striped in zones: first all of them as far as the smallest goes, then the others.
fn stripes(array: &Array, members: &BTreeMap<u32, &Member>) -> Result<Map> {
    const ZONES_OF_THEIR_OWN: u32 = 2;
    let all = all(array, members)?;
    let mut ends: Vec<u64> = all.iter().map(|(_, size)| *size).collect();
    ends.sort_unstable();
    ends.dedup();
    // Before it was told, kernels of different versions striped what follows the first zone differently.
    if ends.len() > 1 && !(array.has_stripes_layout && array.layout == ZONES_OF_THEIR_OWN) {
        return Err(Error::unsupported(
            "an md array striped over members of different sizes in the old way, which this version does not read",
        ));
    }
    let (mut segments, mut start) = (vec![], 0);
    for end in ends {
        let zone = all.iter().filter(|(_, size)| *size >= end);
        let columns = zone.map(|(member, _)| part(member, start, end - start)).collect::<Result<Vec<_>>>()?;
        segments.extend(striped(array.chunk_size, columns)?);
        start = end;
    }
    Map::new(segments)
}

/// Copies of a chunk that are near lie on members that follow each other.
fn near(array: &Array, members: &BTreeMap<u32, &Member>) -> Result<Map> {
    let (near, far) = (array.layout & 0xff, array.layout >> 8);
    if near == 0 || far != 1 || !array.members.is_multiple_of(near) {
        return Err(Error::unsupported(format!(
            "an md array of level 10 with layout {:#x} over {} members, which this version does not read",
            array.layout, array.members
        )));
    }
    let size = array.size - array.size % array.chunk_size.max(1);
    let mut columns = vec![];
    for first in (0..array.members).step_by(usize::try_from(near).expect("it is less than 256")) {
        let copies = members.range(first..first + near).map(|(_, member)| member);
        let member = newest(copies).ok_or_else(|| missing(first, array))?;
        columns.push(part(member, 0, size)?);
    }
    Map::new(striped(array.chunk_size, columns)?)
}

/// Returns stripes over columns, each of which must lie together.
fn striped(stripe_size: u64, columns: Vec<Vec<Segment>>) -> Result<Vec<Segment>> {
    if let [column] = &columns[..] {
        return Ok(column.clone());
    }
    let mut len = 0_u64;
    let mut places = vec![];
    for column in columns {
        let [Segment { len: of_column, source: SegmentSource::Disk(place) }] = column[..] else {
            return Err(Error::unsupported(
                "an md array over members that are in pieces, which this version does not read",
            ));
        };
        len = len.saturating_add(of_column);
        places.push(place);
    }
    let source = SegmentSource::Striped(Stripes { stripe_size, columns: places, from: 0 });
    Ok(vec![Segment { len, source }])
}
