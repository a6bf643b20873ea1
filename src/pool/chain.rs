//! Whether the chains of a VM's disks can take another snapshot: pure, over what an SR says of its disks.
//!
//! The host merges images that nobody needs any more ("coalesce"), one after the other. Who takes snapshots faster than that
//! makes chains longer until the storage refuses. An image that no object stands for (unmanaged) and whose only child is such
//! a one, too, waits to be merged. One that waits is normal; more say that the host does not keep up.
//!
//! Source of the rule: XO, `@xen-orchestra/xapi/vm.mjs`; of the limit: sm, `libs/sm/vhdutil.py`.

use std::collections::{BTreeMap, BTreeSet};

/// Most images of one chain that may wait to be merged when a snapshot is taken.
const MOST_WAITING: usize = 1;
/// Most images in a chain of VHDs.
const MOST_IMAGES: usize = 30;

/// One image of an SR.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Image {
    /// The image that it is built on, by uuid.
    pub parent: Option<String>,
    /// Whether an object stands for it: a disk or a snapshot.
    pub is_managed: bool,
}

/// How the chain of a disk is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Health {
    /// Images from the disk to its base, both counted.
    pub images: usize,
    /// Images that wait to be merged.
    pub waiting: usize,
}

impl Health {
    /// Returns what keeps it from taking a snapshot now, if anything.
    #[must_use]
    pub fn problem(self) -> Option<String> {
        if self.waiting > MOST_WAITING {
            return Some(format!("{} images of its chain still wait to be coalesced by the host", self.waiting));
        }
        (self.images >= MOST_IMAGES)
            .then(|| format!("its chain has {} images, and the storage takes no more than {MOST_IMAGES}", self.images))
    }
}

/// Looks at the chain of a disk, in the images of its SR by uuid. What is not among them ends the chain.
#[must_use]
pub fn health(disk: &str, images: &BTreeMap<String, Image>) -> Health {
    let mut children: BTreeMap<&str, Vec<&Image>> = BTreeMap::new();
    for image in images.values() {
        if let Some(parent) = &image.parent {
            children.entry(parent).or_default().push(image);
        }
    }
    let (mut health, mut seen, mut at) = (Health::default(), BTreeSet::new(), Some(disk));
    // A chain that leads into itself ends where it does.
    while let Some((uuid, image)) =
        at.and_then(|uuid| Some((uuid, images.get(uuid)?))).filter(|(uuid, _)| seen.insert(*uuid))
    {
        health.images += 1;
        let only = children.get(uuid).map(Vec::as_slice);
        if !image.is_managed && matches!(only, Some([child]) if !child.is_managed) {
            health.waiting += 1;
        }
        at = image.parent.as_deref();
    }
    health
}

#[cfg(test)]
mod tests {
    use super::*;

    fn images(list: &[(&str, &str, bool)]) -> BTreeMap<String, Image> {
        let image = |(uuid, parent, is_managed): &(&str, &str, bool)| {
            let parent = Some(*parent).filter(|parent| !parent.is_empty()).map(str::to_owned);
            ((*uuid).to_owned(), Image { parent, is_managed: *is_managed })
        };
        list.iter().map(image).collect()
    }

    #[test]
    fn only_what_has_a_single_unmanaged_child_waits() {
        // c ─ b ─ a, of which c and b wait, under the disk and a snapshot of it.
        let chain =
            images(&[("d", "a", true), ("s", "a", true), ("a", "b", false), ("b", "c", false), ("c", "", false)]);
        assert_eq!(health("d", &chain), Health { images: 4, waiting: 2 });
        assert!(health("d", &chain).problem().is_some_and(|why| why.contains("2 images")));
        // A second child keeps an image from being merged.
        let forked =
            images(&[("d", "a", true), ("a", "b", false), ("b", "c", false), ("x", "b", true), ("c", "", false)]);
        assert_eq!(health("d", &forked), Health { images: 4, waiting: 1 });
        assert_eq!(health("d", &forked).problem(), None);
        assert_eq!(health("unknown", &forked), Health::default());
    }

    #[test]
    fn a_chain_that_is_as_long_as_the_storage_allows_takes_no_more_and_a_circle_ends() {
        let mut long = BTreeMap::new();
        for number in 0..30 {
            let parent = (number > 0).then(|| (number - 1).to_string());
            long.insert(number.to_string(), Image { parent, is_managed: true });
        }
        assert!(health("29", &long).problem().is_some_and(|why| why.contains("30 images")));
        assert_eq!(health("28", &long).problem(), None);
        let circle = images(&[("a", "b", true), ("b", "a", true)]);
        assert_eq!(health("a", &circle), Health { images: 2, waiting: 0 });
    }
}
