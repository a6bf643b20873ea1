//! The garbage collector of a storage repository: layers that only one other layer stands on are merged.
//!
//! ```text
//!   base A ◄── base B ◄── leaf 1        base A and B become one, called A; who stood on B stands on A
//!                     ◄── leaf 2
//!   base A ◄── leaf 1                   both become one, called leaf 1
//! ```
//!
//! Base copies that nobody stands on need no collecting here: they are gone with the last disk that had them.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use uuid::Uuid;

use crate::content::Content;
use crate::layer::Layer;

/// What the garbage collector did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Coalesced {
    /// The layer that is gone.
    pub removed: Uuid,
    /// The layer that holds now what both held.
    pub kept: Uuid,
}

/// An unmanaged VDI: a base copy that others stand on.
#[derive(Debug, Clone)]
pub struct BaseCopy {
    /// What it holds.
    pub layer: Arc<Layer>,
    /// The layer below: its `vhd-parent`.
    pub parent: Option<Uuid>,
}

/// Returns the base copies of the disks of a repository by their uuids.
pub fn base_copies<'a>(disks: impl IntoIterator<Item = &'a Content>) -> BTreeMap<Uuid, BaseCopy> {
    let mut found = BTreeMap::new();
    for disk in disks {
        let layers = disk.layers();
        for (position, layer) in layers[..layers.len() - 1].iter().enumerate() {
            let parent = position.checked_sub(1).map(|below| layers[below].uuid());
            found.entry(layer.uuid()).or_insert_with(|| BaseCopy { layer: layer.clone(), parent });
        }
    }
    found
}

/// Merges one pair of layers, if there is one; `disks` are all of the repository.
///
/// Base copies come first, the oldest of a chain before the younger. A leaf is merged into its base copy only if
/// `with_leaves`.
pub fn coalesce(disks: &mut [&mut Content], with_leaves: bool) -> Option<Coalesced> {
    let (parent, child, is_leaf) = candidate(disks, with_leaves)?;
    let coalesced = match is_leaf {
        true => Coalesced { removed: parent.uuid(), kept: child.uuid() },
        false => Coalesced { removed: child.uuid(), kept: parent.uuid() },
    };
    let mut merged = Layer::clone(&parent);
    merged.absorb(&child);
    merged.uuid = coalesced.kept;
    let merged = Arc::new(merged);
    for disk in disks {
        if let Some(position) = disk.layers.iter().position(|layer| layer.uuid() == child.uuid()) {
            disk.layers.splice(position - 1..=position, [merged.clone()]);
        }
    }
    Some(coalesced)
}

/// Returns a layer, the only one that stands on it, and whether that is a leaf.
fn candidate(disks: &[&mut Content], with_leaves: bool) -> Option<(Arc<Layer>, Arc<Layer>, bool)> {
    let mut children: BTreeMap<Uuid, BTreeSet<Uuid>> = BTreeMap::new();
    for disk in disks {
        for pair in disk.layers().windows(2) {
            children.entry(pair[0].uuid()).or_default().insert(pair[1].uuid());
        }
    }
    let pairs = |leaves: bool| {
        disks.iter().find_map(|disk| {
            let count = disk.layers().len();
            disk.layers().windows(2).enumerate().find_map(|(position, pair)| {
                let is_leaf = position + 2 == count;
                (is_leaf == leaves && children[&pair[0].uuid()].len() == 1)
                    .then(|| (pair[0].clone(), pair[1].clone(), is_leaf))
            })
        })
    };
    pairs(false).or_else(|| with_leaves.then(|| pairs(true)).flatten())
}
