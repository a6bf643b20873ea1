//! How the bytes of a volume are had: from places on disks, or through layers that have metadata of their own.
//!
//! ```text
//! disks ─► Map ──┬─► Layer ─┬─► Layer      the last part is the volume
//! disks ─► Map ──┘   Map ───┘
//! ```
//!
//! It is plain data. Parts stand in a list, each after those that it is made of, so that nothing has to be followed: neither
//! circles nor depths can be said.

use std::sync::Arc;

use disk::Disk;
use serde::{Deserialize, Serialize};

use crate::layer::{Layer, Layered};
use crate::map::MAX_SIZE;
use crate::{Error, Map, Mapped, Result};

/// Parts at most; a thin volume over a cached pool with an external origin that is thin, too, has eight.
pub(crate) const MAX_PARTS: usize = 16;

/// Layers over each other at most.
const MAX_HEIGHT: usize = 4;

/// A part of a volume.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Part {
    /// Bytes of disks.
    Map(Map),
    /// What a layer makes of other parts.
    Layer {
        /// What it does.
        layer: Layer,
        /// In bytes.
        size: u64,
        /// Which parts it is made of, in the order that [`Layer`] says.
        members: Vec<u16>,
    },
}

/// A volume and all that it is made of.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "Vec<Part>", into = "Vec<Part>")]
pub struct Stack(Vec<Part>);

impl TryFrom<Vec<Part>> for Stack {
    type Error = Error;

    fn try_from(parts: Vec<Part>) -> Result<Self> {
        Self::new(parts)
    }
}

impl From<Stack> for Vec<Part> {
    fn from(stack: Stack) -> Self {
        stack.0
    }
}

impl From<Map> for Stack {
    fn from(map: Map) -> Self {
        Self(vec![Part::Map(map)])
    }
}

impl Stack {
    /// Makes a volume of its parts, of which it is the last.
    ///
    /// # Errors
    /// [`Damaged`](crate::ErrorKind::Damaged) if there is none, or more than 16, a layer is not made of parts before it, of as
    /// many as it needs, or stands on more than three others.
    pub fn new(parts: Vec<Part>) -> Result<Self> {
        let stack = Self(parts);
        let is_sound = |(index, part): (usize, &Part)| match part {
            Part::Map(_) => true,
            Part::Layer { layer, size, members } => {
                layer.has_members(members.len())
                    && *size < MAX_SIZE
                    && members.iter().all(|member| usize::from(*member) < index)
            }
        };
        let count = stack.0.len();
        let is_bounded = (1..=MAX_PARTS).contains(&count) && stack.0.iter().enumerate().all(is_sound);
        if !is_bounded || stack.heights().into_iter().any(|height| height > MAX_HEIGHT) {
            return Err(Error::damaged(format!("its {count} parts do not make a volume")));
        }
        Ok(stack)
    }

    /// Returns the parts, each after those that it is made of.
    #[must_use]
    pub fn parts(&self) -> &[Part] {
        &self.0
    }

    /// Returns the map of a volume that has no layers.
    #[must_use]
    pub fn map(&self) -> Option<&Map> {
        match &self.0[..] {
            [Part::Map(map)] => Some(map),
            _ => None,
        }
    }

    /// Returns the size of the volume in bytes.
    #[must_use]
    pub fn size(&self) -> u64 {
        match self.0.last() {
            Some(Part::Map(map)) => map.size(),
            Some(Part::Layer { size, .. }) => *size,
            None => 0,
        }
    }

    /// Returns for each part on how many layers it stands, itself counted.
    fn heights(&self) -> Vec<usize> {
        let mut heights: Vec<usize> = vec![];
        for part in &self.0 {
            heights.push(match part {
                Part::Map(_) => 0,
                Part::Layer { members, .. } => {
                    let below = members.iter().map(|member| heights.get(usize::from(*member)).copied().unwrap_or(0));
                    below.max().unwrap_or(0) + 1
                }
            });
        }
        heights
    }

    /// Makes the volume; `disks` are those that maps count. `layer` is given each layer, its size, its members, and on how many
    /// layers it stands, itself counted (1 to 4), and makes a disk of it.
    ///
    /// # Errors
    /// As for [`Mapped::new`]; what `layer` says.
    pub fn open<E: From<Error>>(
        self,
        disks: &[Arc<dyn Disk>],
        mut layer: impl FnMut(Layer, u64, Vec<Arc<dyn Disk>>, usize) -> std::result::Result<Arc<dyn Disk>, E>,
    ) -> std::result::Result<Arc<dyn Disk>, E> {
        let heights = self.heights();
        let mut made: Vec<Arc<dyn Disk>> = vec![];
        for (part, height) in self.0.into_iter().zip(heights) {
            made.push(match part {
                Part::Map(map) => Arc::new(Mapped::new(map, disks.to_vec())?),
                Part::Layer { layer: kind, size, members } => {
                    let members = members.iter().map(|member| made[usize::from(*member)].clone()).collect();
                    layer(kind, size, members, height)?
                }
            });
        }
        Ok(made.pop().expect("a stack has a part"))
    }

    /// Makes the volume here, and says what is wrong with its layers; `room` is how many blocks of metadata may be read for that,
    /// and is lowered.
    pub(crate) fn open_here(self, disks: &[Arc<dyn Disk>], room: &mut usize) -> Result<(Arc<dyn Disk>, Option<Error>)> {
        let mut problem = None;
        let disk = self.open(disks, |layer, size, members, _| {
            let layered = Layered::open(layer, size, members, room)?;
            problem = problem.take().or_else(|| layered.problem().map(Error::damaged));
            Ok::<Arc<dyn Disk>, Error>(Arc::new(layered))
        })?;
        Ok((disk, problem))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Place;

    fn map() -> Part {
        Part::Map(Map::of_range(Place { disk: 0, offset: 0 }, 4096).unwrap())
    }

    fn snapshot(members: &[u16]) -> Part {
        Part::Layer { layer: Layer::Snapshot, size: 4096, members: members.to_vec() }
    }

    #[test]
    fn a_part_is_made_of_parts_before_it() {
        assert!(Stack::new(vec![map(), map(), snapshot(&[0, 1])]).is_ok());
        let wrong = [
            vec![],
            vec![map(), snapshot(&[0, 1])],
            vec![map(), snapshot(&[0, 2]), map()],
            vec![map(), snapshot(&[0])],
            vec![map(), Part::Layer { layer: Layer::Snapshot, size: 1 << 63, members: vec![0, 0] }],
            vec![map(); 17],
        ];
        for parts in wrong {
            assert!(Stack::new(parts.clone()).is_err(), "{parts:?}");
        }
        let tower = |layers: u16| [map()].into_iter().chain((0..layers).map(|below| snapshot(&[below, 0]))).collect();
        assert_eq!(Stack::new(tower(4)).unwrap().heights(), [0, 1, 2, 3, 4]);
        assert!(Stack::new(tower(5)).is_err());
    }

    #[test]
    fn what_is_sent_is_checked_where_it_comes() {
        let stack = Stack::new(vec![map(), map(), snapshot(&[0, 1])]).unwrap();
        let sent = postcard::to_stdvec(&stack).unwrap();
        assert_eq!(postcard::from_bytes::<Stack>(&sent).unwrap(), stack);
        let sent = postcard::to_stdvec(&vec![snapshot(&[0, 1])]).unwrap();
        assert!(postcard::from_bytes::<Stack>(&sent).is_err());
    }
}
