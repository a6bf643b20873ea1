//! Logical volumes of LVM2, from the physical ones on all disks of a guest.
//!
//! ```text
//! label ─ a physical volume: its UUID, the text of its volume group
//!   └─ text   the format of that text
//!        └─ group  what it says: physical volumes, logical ones, their segments
//!             ├─ map    segments followed down to disks
//!             └─ stack  thin volumes, snapshots and caches: which volumes they are made of
//! ```
//!
//! Every physical volume may hold the description of its group: the one that changed last is believed. A logical volume on a
//! physical one that is not here is named, and hides no other. What the metadata of pools, snapshots and caches say is not read
//! here.

mod group;
mod label;
mod map;
mod stack;
mod text;

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use disk::Disk;

use crate::map::Map;
use crate::{Error, Mapped, Result, Stack};
use group::Group;
use label::{Label, Texts};
use map::{MAX_PIECES, Resolver};

pub(crate) use label::label_offset;

/// The logical volumes of a guest.
#[derive(Debug, Default)]
pub(crate) struct Assembled {
    /// Each under the name that the device mapper shows, or why its bytes cannot be had.
    pub(crate) volumes: Vec<(String, Result<Stack>)>,
    /// What is wrong with physical volumes and groups.
    pub(crate) problems: Vec<Error>,
}

/// Finds the logical volumes on physical ones, each of which has a name and a map.
pub(crate) fn assemble(candidates: &[(String, Map)], disks: &[Arc<dyn Disk>]) -> Assembled {
    let mut assembled = Assembled::default();
    let mut physical: HashMap<[u8; 32], Map> = HashMap::new();
    let mut named: HashMap<[u8; 32], &str> = HashMap::new();
    // In the order in which they are found, so that it is the same each time.
    let mut groups: BTreeMap<usize, Group> = BTreeMap::new();
    let mut ids: HashMap<Vec<u8>, usize> = HashMap::new();
    let mut texts = Texts::new();
    for (name, map) in candidates {
        let mut say = |error: Error| {
            assembled.problems.push(Error::new(error.kind(), format!("LVM physical volume {name}: {error}")));
        };
        let found = Mapped::new(map.clone(), disks.to_vec()).and_then(|volume| Ok((Label::read(&volume)?, volume)));
        let (label, volume) = match found {
            Ok(found) => found,
            Err(error) => {
                say(error);
                continue;
            }
        };
        if let Some(first) = named.get(&label.uuid) {
            let uuid = shown_uuid(label.uuid);
            say(Error::damaged(format!("it is a copy of {first}, with the same UUID {uuid}: only that one is used")));
            continue;
        }
        named.insert(label.uuid, name);
        physical.insert(label.uuid, map.clone());
        let (found, problems) = label.texts(&volume, &mut texts);
        problems.into_iter().for_each(&mut say);
        for text in found {
            match Group::parse(&text) {
                Ok(group) => {
                    let next = ids.len();
                    let index = *ids.entry(group.id.clone()).or_insert(next);
                    if groups.get(&index).is_none_or(|known| known.sequence < group.sequence) {
                        groups.insert(index, group);
                    }
                }
                Err(error) => say(error),
            }
        }
    }
    let mut room = MAX_PIECES;
    for group in groups.values() {
        let resolver = Resolver { group, physical: &physical, disks, room: &mut room, found: HashMap::new() };
        let (volumes, problems) = stack::volumes(resolver);
        assembled.volumes.extend(volumes);
        assembled.problems.extend(problems);
    }
    assembled
}

/// Returns the name that the device mapper shows: hyphens of both names are doubled, and one is between them.
fn mapper_name(group: &str, logical: &str) -> String {
    format!("{}-{}", group.replace('-', "--"), logical.replace('-', "--"))
}

/// Returns a UUID as LVM shows it: in groups of 6, 4, 4, 4, 4, 4 and 6.
fn shown_uuid(uuid: [u8; 32]) -> String {
    let mut shown = String::new();
    for (index, byte) in uuid.iter().enumerate() {
        if index >= 6 && (index - 6) % 4 == 0 && index < 30 {
            shown.push('-');
        }
        shown.push(if byte.is_ascii_graphic() { char::from(*byte) } else { '?' });
    }
    shown
}

#[cfg(test)]
pub(crate) mod tests;
