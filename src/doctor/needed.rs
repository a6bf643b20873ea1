//! What backups need of the images of their VM, and where that cannot be told.
//!
//! An image is needed if a backup names it, or if one that is needed is built on it: by uuid and by name, in any folder of
//! the VM. Where the two disagree, both are needed. A folder in which something needed is not there or not understood is not
//! judged: what nobody seems to need may be just that.

use std::collections::{BTreeMap, BTreeSet};

use storage::ObjectPath;
use uuid::Uuid;

use super::survey::{Health, Image, Survey};
use crate::merge::disks_of;
use crate::repository::{Backup, Mode};

/// What backups need of the images of their VM.
pub(super) struct Needed<'a> {
    pub names: BTreeSet<&'a ObjectPath>,
    /// For each folder of a disk why nothing in it can be judged.
    pub unjudged: BTreeMap<&'a ObjectPath, String>,
    /// Whether something is built on what is nowhere.
    is_any_absent: bool,
}

impl<'a> Needed<'a> {
    pub fn of(survey: &'a Survey) -> Self {
        Self::by(survey, |_| true)
    }

    /// What those backups need for which `is_counted` is true.
    pub fn by(survey: &'a Survey, is_counted: impl Fn(&Backup) -> bool) -> Self {
        let mut needed = Self { names: BTreeSet::new(), unjudged: BTreeMap::new(), is_any_absent: false };
        let mut by_uuid: BTreeMap<Uuid, Vec<&Image>> = BTreeMap::new();
        for image in survey.images() {
            if let Ok(links) = &image.links {
                by_uuid.entry(links.uuid).or_default().push(image);
            }
        }
        for lineage in &survey.lineages {
            let is_unsupported = |error: &&vhd::Error| matches!(error.kind(), vhd::ErrorKind::Unsupported);
            let errors = lineage.images.iter().filter_map(|image| image.links.as_ref().err());
            if let Some(error) = errors.into_iter().find(is_unsupported) {
                needed.unjudged.insert(&lineage.path, format!("{error}: it may be sound, and built on anything there"));
            }
            let own = |image: &&&Image| image.name.parent() == lineage.path;
            for same in by_uuid.values() {
                if let [one, other, ..] = same.iter().filter(own).collect::<Vec<_>>().as_slice() {
                    let why =
                        format!("'{}' and '{}' have one uuid: nobody can say which is meant", one.name, other.name);
                    needed.unjudged.insert(&lineage.path, why);
                }
            }
        }
        let counted = survey.backups.iter().filter(|backup| is_counted(backup));
        let mut next: Vec<&ObjectPath> = counted.flat_map(|backup| disks_of(backup)).collect();
        while let Some(name) = next.pop() {
            if !needed.names.insert(name) {
                continue;
            }
            let lineage = survey.lineages.iter().find(|lineage| lineage.path == name.parent());
            let image = survey.images().find(|image| image.name == *name);
            let mut refuse = |why: String| {
                if let Some(lineage) = lineage {
                    needed.unjudged.entry(&lineage.path).or_insert(why);
                }
            };
            match image.map(|image| &image.links) {
                None => refuse(format!("'{name}' is needed and is not there: nobody knows what it was built on")),
                Some(Err(error)) => refuse(format!("{error}: nobody knows what it is built on")),
                Some(Ok(links)) => {
                    let Some(parent) = links.parent else { continue };
                    let parents = by_uuid.get(&parent).map(Vec::as_slice).unwrap_or_default();
                    if !parents.iter().any(|image| image.name.parent() == name.parent()) {
                        refuse(format!("'{name}' is needed and is built on {parent}, which is not there"));
                    }
                    next.extend(parents.iter().map(|image| &image.name));
                    let named: Vec<_> = survey
                        .images()
                        .map(|image| &image.name)
                        .filter(|name| Some(*name) == links.parent_name.as_ref())
                        .collect();
                    needed.is_any_absent |= parents.is_empty() && named.is_empty();
                    next.extend(named);
                }
            }
        }
        needed
    }
}

impl Needed<'_> {
    /// Whether a needed name leads to this data.
    pub fn leads_to(&self, survey: &Survey, path: &ObjectPath) -> bool {
        survey.images().any(|image| self.names.contains(&image.name) && image.data.as_ref() == Some(path))
    }
}

/// Whether nothing of a backup can be read, since something of it is absent or damaged by itself.
pub(super) fn is_lost(survey: &Survey, backup: &Backup) -> bool {
    if !matches!(survey.health.get(&backup.time), Some(Health::Lost(_))) {
        return false;
    }
    let needed = Needed::by(survey, |other| other.time == backup.time);
    let is_sound = |name: &ObjectPath| survey.images().any(|image| image.name == *name && image.links.is_ok());
    backup.mode == Mode::Full || needed.is_any_absent || !needed.names.iter().all(|name| is_sound(name))
}
