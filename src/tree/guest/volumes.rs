//! The volumes on the disks of a backup.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use disk::{Disk, ErrorKind};
use guest::Content;

use crate::repository::{Backup, BackupDisk, DiskSource, Repository};
use crate::tree::{Error, Result};
use crate::worker::{Volume, Workers};

use super::file::GuestFile;

/// Volumes, and what kept others from being found.
pub(super) struct Volumes {
    pub found: Vec<Found>,
    pub problems: Vec<String>,
    /// Tells them apart from those of another backup that came to have the same name.
    pub identity: u64,
    /// Whether all that could be there was read.
    pub is_whole: bool,
}

/// A volume.
pub(super) struct Found {
    pub name: Arc<str>,
    pub content: Content,
    /// If its content is a part of what stands on another volume, the name of that.
    pub first: Option<Arc<str>>,
    pub problem: Option<String>,
    /// Its bytes, if they can be had.
    pub disk: Option<Arc<dyn Disk>>,
    /// If it has one that is read.
    pub filesystem: Option<Arc<Volume>>,
    /// Whether what is wrong with its filesystem was told.
    pub is_told: AtomicBool,
}

impl Volumes {
    /// Opens the disks of a backup and has a worker look for volumes. A disk that is damaged costs what lies on it.
    pub fn find(repository: &Repository, backup: &Arc<Backup>, workers: &Arc<Workers>) -> Result<Self> {
        let (mut disks, mut problems) = (Vec::new(), Vec::new());
        let mut identity = DefaultHasher::new();
        for disk in backup.disks.iter().filter(|disk| disk.name != "memory") {
            match repository.open_disk(backup, disk) {
                Ok(open) => {
                    identify(repository, backup, disk, &open, &mut identity)?;
                    disks.push((disk.name.clone(), open));
                }
                Err(error) => match error.kind() {
                    ErrorKind::Damaged | ErrorKind::Unsupported => {
                        problems.push(format!("disk {}: {error}", disk.name))
                    }
                    _ => return Err(error.into()),
                },
            }
        }
        let is_opened = problems.is_empty();
        let survey = workers.survey(&disks)?;
        let is_whole = is_opened && !survey.has_unread();
        problems.extend(survey.problems.iter().map(ToString::to_string));
        let disks: Vec<Arc<dyn Disk>> = disks.into_iter().map(|(_, disk)| disk).collect();
        let mut found: Vec<Found> = Vec::with_capacity(survey.volumes.len());
        // Of each, the names of the others that its filesystem is on.
        let mut spread = Vec::new();
        for volume in survey.volumes {
            let mut problem = volume.problem.map(|problem| problem.to_string());
            let opened = volume.stack.map(|stack| {
                stack.open(&disks, |layer, size, members, height| {
                    let layer = Volume::layer(workers.below(height), layer, size, members);
                    Ok::<Arc<dyn Disk>, guest::Error>(Arc::new(GuestFile::layer(Arc::new(layer), size)))
                })
            });
            let disk = opened.transpose().unwrap_or_else(|error| {
                problem = Some(error.to_string());
                None
            });
            spread.push(volume.others);
            problems.extend(problem.iter().map(|problem| format!("volume {}: {problem}", volume.name)));
            found.push(Found {
                name: Arc::from(volume.name),
                content: volume.content,
                first: None,
                problem,
                disk,
                filesystem: None,
                is_told: AtomicBool::new(false),
            });
        }
        for (index, others) in spread.into_iter().enumerate() {
            let Found { name, content, disk: Some(disk), .. } = &found[index] else { continue };
            if !guest::is_read(*content) {
                continue;
            }
            let (first, content, mut members) = (name.clone(), *content, vec![disk.clone()]);
            for other in found.iter_mut().filter(|other| others.iter().any(|name| **name == *other.name)) {
                other.first = Some(first.clone());
                members.extend(other.disk.clone());
            }
            found[index].filesystem = Some(Arc::new(Volume::new(workers.clone(), content, members)));
        }
        Ok(Self { found, problems, identity: identity.finish(), is_whole })
    }

    /// Whether what was found is the same.
    pub fn is_same(&self, other: &Self) -> bool {
        let is_same = |(a, b): (&Found, &Found)| {
            (&a.name, a.content, &a.first, a.disk.is_some(), &a.problem)
                == (&b.name, b.content, &b.first, b.disk.is_some(), &b.problem)
        };
        (self.identity, self.is_whole, self.found.len()) == (other.identity, other.is_whole, other.found.len())
            && self.found.iter().zip(&other.found).all(is_same)
    }

    pub fn find_one(&self, name: &str) -> Result<&Found> {
        self.found.iter().find(|found| *found.name == *name).ok_or(Error::NotFound)
    }
}

/// Adds what tells a disk apart from any other: the id of its image, or of the archive that it is in, what the storage says of it.
fn identify(
    repository: &Repository,
    backup: &Backup,
    disk: &BackupDisk,
    open: &Arc<dyn Disk>,
    identity: &mut DefaultHasher,
) -> Result<()> {
    (&disk.name, open.size()).hash(identity);
    match &disk.source {
        DiskSource::Xva { path, .. } => {
            let stat = repository.storage().stat(path)?;
            (stat.inode, stat.size, stat.modified).hash(identity);
        }
        _ => repository.leaf(backup, disk)?.map(|leaf| leaf.uuid).hash(identity),
    }
    Ok(())
}
