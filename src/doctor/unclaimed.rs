//! What of the folder of a disk no backup needs, sorted by what it is.

use std::collections::BTreeMap;

use storage::ObjectPath;

use super::needed::Needed;
use super::survey::{Image, Lineage, Survey};

/// What of a folder no backup needs.
pub(super) struct Unclaimed<'a> {
    /// Images that can be moved with their data.
    pub orphans: Vec<&'a Image>,
    pub dead_aliases: Vec<&'a Image>,
    /// Data that no alias leads to.
    pub dangling: Vec<ObjectPath>,
}

impl<'a> Unclaimed<'a> {
    pub fn of(survey: &'a Survey, needed: &Needed, lineage: &'a Lineage) -> Self {
        let mut unclaimed = Self { orphans: Vec::new(), dead_aliases: Vec::new(), dangling: Vec::new() };
        for image in lineage.images.iter().filter(|image| !needed.names.contains(&image.name)) {
            let is_shared = |data: &ObjectPath| {
                survey.images().any(|other| other.name != image.name && other.data.as_ref() == Some(data))
            };
            match &image.links {
                Err(_) if image.data.as_ref().is_none_or(|data| !is_there(lineage, data)) => {
                    unclaimed.dead_aliases.push(image);
                }
                _ if image.data.as_ref().is_some_and(is_shared) => {}
                _ => unclaimed.orphans.push(image),
            }
        }
        for seen in
            lineage.data.iter().flatten().filter(|seen| seen.name.ends_with(".vhd") && !seen.name.starts_with('.'))
        {
            let is_led_to = survey.images().any(|image| image.data.as_ref() == Some(&seen.path));
            if !is_led_to {
                unclaimed.dangling.push(seen.path.clone());
            }
        }
        unclaimed
    }

    pub fn is_empty(&self) -> bool {
        self.paths().next().is_none()
    }

    pub fn paths(&self) -> impl Iterator<Item = &ObjectPath> {
        let images = self.orphans.iter().chain(&self.dead_aliases).map(|image| &image.name);
        images.chain(&self.dangling)
    }

    /// Takes out what has the names of a disk of this time: names before data.
    pub fn take_of_time(&mut self, time: &str, lineage: &Lineage) -> Vec<ObjectPath> {
        let is_of_time = |path: &ObjectPath| {
            let name = path.file_name();
            name == format!("{time}.vhd") || name == format!("{time}.alias.vhd")
        };
        let mut paths = Vec::new();
        for images in [&mut self.orphans, &mut self.dead_aliases] {
            let of_time: Vec<&Image> = images.iter().filter(|image| is_of_time(&image.name)).copied().collect();
            paths.extend(of_time.iter().flat_map(|image| paths_of(image, lineage)));
            images.retain(|image| !is_of_time(&image.name));
        }
        paths.extend(self.dangling.iter().filter(|path| is_of_time(path)).cloned());
        self.dangling.retain(|path| !is_of_time(path));
        paths
    }

    /// Takes out the orphans, those together that are built on each other: children first.
    pub fn take_orphans(&mut self) -> Vec<Vec<&'a Image>> {
        let orphans = std::mem::take(&mut self.orphans);
        let uuid = |image: &Image| image.links.as_ref().ok().map(|links| links.uuid);
        let parent_of = |image: &Image| {
            let parent = image.links.as_ref().ok().and_then(|links| links.parent)?;
            orphans.iter().copied().find(|other| uuid(other) == Some(parent))
        };
        // What is built on itself is as deep as anything can be.
        let ancestors = |image: &'a Image| {
            std::iter::successors(Some(image), |image| parent_of(image)).take(orphans.len() + 1).collect::<Vec<_>>()
        };
        let mut groups: BTreeMap<&ObjectPath, Vec<(usize, &'a Image)>> = BTreeMap::new();
        for image in &orphans {
            let line = ancestors(image);
            let root = line.last().map_or(&image.name, |root| &root.name);
            groups.entry(root).or_default().push((line.len(), image));
        }
        let sorted = groups.into_values().map(|mut group| {
            group.sort_by(|a, b| (b.0, &a.1.name).cmp(&(a.0, &b.1.name)));
            group.into_iter().map(|(_, image)| image).collect()
        });
        sorted.collect()
    }
}

/// Returns what an image is made of: its name, then what the name leads to, if that is in its folder.
pub(super) fn paths_of<'a>(image: &'a Image, lineage: &'a Lineage) -> impl Iterator<Item = ObjectPath> + use<'a> {
    let data = image.data.as_ref().filter(|data| **data != image.name && is_there(lineage, data));
    [Some(&image.name), data].into_iter().flatten().cloned()
}

/// Whether something in the folder of a disk, or in its folder `data`, was seen.
pub(super) fn is_there(lineage: &Lineage, path: &ObjectPath) -> bool {
    lineage.entries.iter().chain(lineage.data.iter().flatten()).any(|seen| seen.path == *path && seen.stat.is_some())
}
