//! The volumes on the disks of one guest: its partitions, what is made of them, and disks that are volumes as a whole.
//!
//! A survey always ends with what was found. What is wrong with one disk, table or volume is said beside it and hides no other.

mod devices;

use std::collections::HashSet;
use std::sync::Arc;

use disk::Disk;
use serde::{Deserialize, Serialize};

use crate::map::{Map, Place};
use crate::probe::{Content, probe};
use crate::table::{self, Partition, Purpose, Table};
use crate::{Error, ErrorKind, Mapped, Result, Stack, lvm, md};

/// More disks are not looked at.
const MAX_DISKS: usize = 64;
/// More volumes are not shown.
const MAX_VOLUMES: usize = 1024;
/// Pieces of metadata that thin volumes, snapshots and caches may have read to be looked at: 512 MiB for all of them.
const MAX_INDEX: usize = 1 << 13;
/// More problems are not said: one table can have thousands.
const MAX_PROBLEMS: usize = 256;

/// A volume of a guest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Volume {
    /// As Linux calls it (`xvda1`, `vg0-root`), told apart by `~2` from another of that name; never with a `/`, never
    /// empty.
    pub name: String,
    /// How its bytes are had; `None` if they cannot be, of which [`Volume::problem`] is the reason.
    pub stack: Option<Stack>,
    /// What stands on it; [`Content::Unread`] if it could not be read.
    pub content: Content,
    /// The names of other volumes that what stands on it is on as well, all of [`Content::BtrfsDevice`].
    pub others: Vec<String>,
    /// What is wrong with it. [`ErrorKind::Disk`] if reading a disk failed: another survey may say more.
    pub problem: Option<Error>,
}

/// What was found on the disks of a guest.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Survey {
    /// The volumes: those of each disk in order, then what is made of them.
    pub volumes: Vec<Volume>,
    /// What is wrong with disks and tables, with the name of the disk. [`ErrorKind::Disk`] as for [`Volume::problem`].
    pub problems: Vec<Error>,
}

impl Survey {
    /// Returns whether reading a disk failed, so that another survey may find more.
    #[must_use]
    pub fn has_unread(&self) -> bool {
        let of_volumes = self.volumes.iter().filter_map(|volume| volume.problem.as_ref());
        self.problems.iter().chain(of_volumes).any(|problem| problem.kind() == ErrorKind::Disk)
    }
}

/// Finds the volumes on the disks of one guest, each with the name that it has there (`xvda`).
///
/// Maps count the disks as they are given here. Nothing is an error: see [`Survey::problems`]. At most 64 disks are looked
/// at and 1,024 volumes shown; what is beyond is said.
#[must_use]
pub fn survey(disks: &[(String, Arc<dyn Disk>)]) -> Survey {
    let mut surveyor = Surveyor {
        disks: disks.iter().take(MAX_DISKS).map(|(_, disk)| disk.clone()).collect(),
        names: HashSet::new(),
        room: MAX_INDEX,
        survey: Survey::default(),
    };
    if disks.len() > MAX_DISKS {
        surveyor.say(Error::new(ErrorKind::TooMuch, format!("only the first {MAX_DISKS} disks are looked at")));
    }
    for (index, (name, disk)) in (0..).zip(disks.iter().take(MAX_DISKS)) {
        surveyor.disk(index, name, disk);
    }
    surveyor.arrays();
    surveyor.logical();
    devices::gather(&mut surveyor.survey.volumes, &surveyor.disks, &mut surveyor.room);
    surveyor.survey
}

struct Surveyor {
    disks: Vec<Arc<dyn Disk>>,
    names: HashSet<String>,
    /// How many pieces of metadata more may be read.
    room: usize,
    survey: Survey,
}

impl Surveyor {
    fn say(&mut self, problem: Error) {
        let said = self.survey.problems.len();
        if said < MAX_PROBLEMS {
            self.survey.problems.push(problem);
        } else if said == MAX_PROBLEMS {
            let text = format!("there are more than these {MAX_PROBLEMS} problems");
            self.survey.problems.push(Error::new(ErrorKind::TooMuch, text));
        }
    }

    /// Adds the partitions of a disk, or the disk itself if something known stands on it as a whole.
    fn disk(&mut self, index: u16, name: &str, disk: &Arc<dyn Disk>) {
        let found = Map::of_range(Place { disk: index, offset: 0 }, disk.size()).and_then(|map| {
            let table = table::read(disk)?;
            let content = if table.is_none() { self.content(map.clone().into())?.0 } else { Content::Unknown };
            Ok((map, table, content))
        });
        match found {
            Ok((map, Some(table), _)) => {
                let before = self.survey.volumes.len();
                self.partitions(name, &map, table);
                self.around_partitions(name, map, before);
            }
            Ok((_, None, Content::Empty | Content::Unknown)) => {}
            Ok((map, None, content)) => self.add(name, Ok(map), Some(content), None),
            Err(error) => self.say(of_disk(name, &error)),
        }
    }

    /// Adds the partitions of a disk or an array.
    fn partitions(&mut self, name: &str, map: &Map, table: Table) {
        for problem in table.problems {
            self.say(of_disk(name, &problem));
        }
        for partition in table.partitions {
            let separator = if name.ends_with(|last: char| last.is_ascii_digit()) { "p" } else { "" };
            self.partition(map, &format!("{name}{separator}{}", partition.number), &partition);
        }
    }

    /// Adds a disk that is an ISO 9660 as a whole, with partitions only so that machines start from it as from a disk; those are
    /// the volumes from `first` on. If one of them is an ISO 9660, it is this one; if one holds more than what machines start from,
    /// the ISO 9660 is what was on the disk before.
    fn around_partitions(&mut self, name: &str, map: Map, first: usize) {
        let is_to_start_from = |volume: &Volume| {
            use Content::{Empty, Fat12, Fat16, Fat32, HfsPlus, Unknown, Unread};
            matches!(volume.content, Empty | Unknown | Unread | Fat12 | Fat16 | Fat32 | HfsPlus)
        };
        // What cannot be read was said of its table.
        if self.survey.volumes[first..].iter().all(is_to_start_from)
            && matches!(self.content(map.clone().into()), Ok((Content::Iso9660, _)))
        {
            self.add(name, Ok(map), None, None);
        }
    }

    fn partition(&mut self, disk: &Map, name: &str, partition: &Partition) {
        let len = partition.len_within(disk.size());
        let missing = partition.len - len;
        let (start, size) = (partition.start, disk.size());
        let (map, problem) = match disk.slice(start, len).filter(|_| len > 0) {
            None => {
                (Err(Error::damaged(format!("it starts past the end of the disk, at {start} of {size} bytes"))), None)
            }
            Some(segments) if missing == 0 => (Map::new(segments), None),
            Some(segments) => {
                let text = format!("its last {missing} bytes are past the end of the disk: it is shown without them");
                (Map::new(segments), Some(Error::damaged(text)))
            }
        };
        self.add(name, map, content_of(partition.purpose), problem);
    }

    /// Adds the arrays of all members, and the partitions of those that have a table.
    fn arrays(&mut self) {
        let found = md::assemble(&self.with(Content::MdMember), &self.disks);
        found.problems.into_iter().for_each(|problem| self.say(problem));
        for (name, map) in found.volumes {
            self.add(&name, map.clone(), None, None);
            let table = map.and_then(|map| {
                let array: Arc<dyn Disk> = Arc::new(Mapped::new(map.clone(), self.disks.clone())?);
                Ok((table::read(&array)?, map))
            });
            // What cannot be read was said of the array itself.
            if let Ok((Some(table), map)) = table {
                self.partitions(&name, &map, table);
            }
        }
    }

    /// Adds the logical volumes on all physical ones.
    fn logical(&mut self) {
        let found = lvm::assemble(&self.with(Content::LvmPhysicalVolume), &self.disks);
        found.problems.into_iter().for_each(|problem| self.say(problem));
        for (name, stack) in found.volumes {
            self.add_stack(&name, stack, None, None);
        }
    }

    /// Returns the names and maps of volumes on which that stands. Systems do not look for it in layers.
    fn with(&self, content: Content) -> Vec<(String, Map)> {
        let volumes = self.survey.volumes.iter().filter(|volume| volume.content == content);
        volumes.filter_map(|volume| Some((volume.name.clone(), volume.stack.as_ref()?.map()?.clone()))).collect()
    }

    fn add(&mut self, name: &str, map: Result<Map>, if_unknown: Option<Content>, problem: Option<Error>) {
        self.add_stack(name, map.map(Stack::from), if_unknown, problem);
    }

    /// Adds a volume under a name that no other has. What stands on it is looked at; `if_unknown` is what its table says.
    fn add_stack(&mut self, name: &str, stack: Result<Stack>, if_unknown: Option<Content>, problem: Option<Error>) {
        if self.survey.volumes.len() == MAX_VOLUMES {
            let text = format!("there are more than {MAX_VOLUMES} volumes, the others are not shown");
            let problem = Error::new(ErrorKind::TooMuch, text);
            if !self.survey.problems.contains(&problem) {
                self.say(problem);
            }
            return;
        }
        let name = self.unique(name);
        let (stack, content, problem) = match stack {
            Err(reason) => (None, Content::Unread, Some(reason)),
            Ok(stack) => match self.content(stack.clone()) {
                Ok((Content::Empty | Content::Unknown, _)) if if_unknown.is_some() => {
                    (Some(stack), if_unknown.unwrap_or(Content::Unknown), problem)
                }
                Ok((content, of_layers)) => (Some(stack), content, problem.or(of_layers)),
                // Whatever asks for it later may read more.
                Err(error) if matches!(error.kind(), ErrorKind::Disk | ErrorKind::TooMuch) => {
                    (Some(stack), Content::Unread, Some(error))
                }
                Err(error) => (stack.map().is_some().then_some(stack), Content::Unread, Some(error)),
            },
        };
        self.survey.volumes.push(Volume { name, stack, content, others: Vec::new(), problem });
    }

    /// Returns what stands on a volume, and what is wrong with its layers.
    fn content(&mut self, stack: Stack) -> Result<(Content, Option<Error>)> {
        let (disk, problem) = stack.open_here(&self.disks, &mut self.room)?;
        Ok((probe(&*disk)?, problem))
    }

    fn unique(&mut self, name: &str) -> String {
        let name = if name.is_empty() { "_".to_owned() } else { name.replace(['/', '\0'], "_") };
        let others = (2..).map(|number| format!("{name}~{number}"));
        let name = std::iter::once(name.clone()).chain(others).find(|name| !self.names.contains(name));
        let name = name.expect("there are more numbers than volumes");
        self.names.insert(name.clone());
        name
    }
}

/// Says of which disk something is a problem.
fn of_disk(name: &str, error: &Error) -> Error {
    Error::new(error.kind(), format!("disk {name}: {error}"))
}

/// Returns what a table's word for a partition says of its content, where that tells more than its bytes do.
fn content_of(purpose: Purpose) -> Option<Content> {
    /// GUIDs as stored: the first three numbers are little-endian.
    const LDM_METADATA: [u8; 16] =
        [0xaa, 0xc8, 0x08, 0x58, 0x8f, 0x7e, 0xe0, 0x42, 0x85, 0xd2, 0xe1, 0xe9, 0x04, 0x34, 0xcf, 0xb3];
    const LDM_DATA: [u8; 16] =
        [0xa0, 0x60, 0x9b, 0xaf, 0x31, 0x14, 0x62, 0x4f, 0xbc, 0x68, 0x33, 0x11, 0x71, 0x4a, 0x69, 0xad];
    const STORAGE_SPACES: [u8; 16] =
        [0x8f, 0xaf, 0x5c, 0xe7, 0x80, 0xf6, 0xee, 0x4c, 0xaf, 0xa3, 0xb0, 0x01, 0xe5, 0x6e, 0xfc, 0x2d];
    match purpose {
        Purpose::Mbr(0x42) | Purpose::Gpt(LDM_METADATA | LDM_DATA) => Some(Content::WindowsDynamicDisk),
        Purpose::Gpt(STORAGE_SPACES) => Some(Content::StorageSpaces),
        _ => None,
    }
}

#[cfg(test)]
mod hostile;
#[cfg(test)]
mod tests;
