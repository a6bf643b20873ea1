//! The volumes on the disks of a backup.

use std::sync::Arc;

use disk::{Disk, ErrorKind};
use guest::{Content, Mapped};

use crate::repository::{Backup, Repository};
use crate::tree::{Error, Result};
use crate::worker::{Volume, Workers};

/// Volumes, and what kept others from being found.
pub(super) struct Volumes {
    pub found: Vec<Found>,
    pub problems: Vec<String>,
}

/// A volume.
pub(super) struct Found {
    pub name: Arc<str>,
    pub content: Content,
    pub problem: Option<String>,
    /// Its bytes, if they can be had.
    pub disk: Option<Arc<dyn Disk>>,
    /// If it has one that is read.
    pub filesystem: Option<Arc<Volume>>,
}

impl Volumes {
    /// Opens the disks of a backup and has a worker look for volumes. A disk that is damaged costs what lies on it.
    pub fn find(repository: &Repository, backup: &Arc<Backup>, workers: &Arc<Workers>) -> Result<Self> {
        let (mut disks, mut problems) = (Vec::new(), Vec::new());
        for disk in backup.disks.iter().filter(|disk| disk.name != "memory") {
            match repository.open_disk(backup, disk) {
                Ok(open) => disks.push((disk.name.clone(), open)),
                Err(error) => match error.kind() {
                    ErrorKind::Damaged | ErrorKind::Unsupported => {
                        problems.push(format!("disk {}: {error}", disk.name))
                    }
                    _ => return Err(error.into()),
                },
            }
        }
        let survey = workers.survey(&disks)?;
        problems.extend(survey.problems.iter().map(ToString::to_string));
        let disks: Vec<Arc<dyn Disk>> = disks.into_iter().map(|(_, disk)| disk).collect();
        let mut found = Vec::with_capacity(survey.volumes.len());
        for volume in survey.volumes {
            let mut problem = volume.problem.map(|problem| problem.to_string());
            let mapped = volume.map.map(|map| Mapped::new(map, disks.clone())).transpose();
            let disk = mapped.unwrap_or_else(|error| {
                problem = Some(error.to_string());
                None
            });
            let disk = disk.map(|mapped| -> Arc<dyn Disk> { Arc::new(mapped) });
            let filesystem = disk.clone().filter(|_| guest::is_read(volume.content));
            let filesystem = filesystem.map(|disk| Arc::new(Volume::new(workers.clone(), volume.content, vec![disk])));
            found.push(Found { name: Arc::from(volume.name), content: volume.content, problem, disk, filesystem });
        }
        Ok(Self { found, problems })
    }

    pub fn find_one(&self, name: &str) -> Result<&Found> {
        self.found.iter().find(|found| *found.name == *name).ok_or(Error::NotFound)
    }
}
