//! Everything in the folder of a VM that a judgement rests on, read once.
//!
//! A survey is complete or it is not made: whatever cannot be read for another reason than that it is damaged or absent
//! makes it fail, and then nothing of the VM is judged.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use storage::{Kind, ObjectPath, Stat, Storage, WritableStorage};
use vhd::{Links, Merge};

use super::facts::{Fact, Facts, What};
use crate::merge::{Begun, disks_of, lineages};
use crate::repository::{Backup, BackupDisk, BackupTime, Backups, DiskSource, Mode, Repository, Result, VM_FOLDER, Vm};

/// The name of XO's listing cache.
pub(super) const CACHE: &str = "cache.json.gz";

/// A name in a folder, and what is there.
pub(super) struct Seen {
    pub name: String,
    pub path: ObjectPath,
    pub stat: Option<Stat>,
}

impl Seen {
    pub fn is_folder(&self) -> bool {
        self.stat.is_some_and(|stat| stat.kind == Kind::Directory)
    }

    pub fn is_file(&self) -> bool {
        self.stat.is_some_and(|stat| stat.kind == Kind::File)
    }
}

/// An image in the folder of a disk: a name that does not begin with a dot and ends in `.vhd`.
pub(super) struct Image {
    pub name: ObjectPath,
    /// What the name leads to; `None` if it cannot be told.
    pub data: Option<ObjectPath>,
    /// What it says of itself, or why it is damaged or absent.
    pub links: vhd::Result<Links>,
}

/// The folder of one disk: `vdis/<job>/<vdi>`.
pub(super) struct Lineage {
    pub path: ObjectPath,
    pub entries: Vec<Seen>,
    /// What is in its folder `data`; `None` if there is none.
    pub data: Option<Vec<Seen>>,
    pub images: Vec<Image>,
    /// Merges that have begun in it: how many blocks there are to move, or why they cannot be gone on with.
    pub merges: Vec<(Begun, Option<vhd::Result<u64>>)>,
}

/// Whether a backup can be read.
pub(super) enum Health {
    /// Every disk opens.
    Good,
    /// It is there, and of a kind that cannot be read here.
    Unknown,
    /// Some of it can be read and some cannot: why.
    Partly(String),
    /// Nothing of it can ever be read as it is: why.
    Lost(String),
}

/// What is in the folder of a VM.
pub(super) struct Survey {
    pub folder: ObjectPath,
    pub entries: Vec<Seen>,
    pub backups: Backups,
    pub health: BTreeMap<BackupTime, Health>,
    /// The files that full backups name, by backup.
    pub xvas: BTreeMap<BackupTime, ObjectPath>,
    pub lineages: Vec<Lineage>,
    /// What the XVAs, images and folders were when they were looked at.
    pub facts: Facts,
}

impl Survey {
    /// Reads the folder of a VM; `writable` is the storage where it is to be said whether merges can be gone on with.
    pub fn read(repository: &Repository, writable: Option<&Arc<dyn WritableStorage>>, vm: &Vm) -> Result<Self> {
        let storage = repository.storage();
        let folder = ObjectPath::new(VM_FOLDER)?.join(vm.id.as_str())?;
        let entries = seen(storage, &folder)?;
        let backups = repository.backups(&vm.id)?;
        let mut survey = Self {
            folder: folder.clone(),
            entries,
            backups: backups.clone(),
            health: BTreeMap::new(),
            xvas: BTreeMap::new(),
            lineages: Vec::new(),
            facts: Facts::new(),
        };
        let named: BTreeSet<&ObjectPath> = backups.iter().flat_map(|backup| disks_of(backup)).collect();
        for path in lineages(storage.as_ref(), &folder)? {
            let lineage = Lineage::read(storage, writable, path, &named)?;
            survey.lineages.push(lineage);
        }
        // The newest first: with its disks those are opened that they are built on, and chains are long.
        let mut sound = BTreeSet::new();
        for backup in backups.iter().rev() {
            let health = survey.health_of(repository, backup, &mut sound)?;
            survey.health.insert(backup.time, health);
        }
        survey.note(storage.as_ref())?;
        Ok(survey)
    }

    pub fn images(&self) -> impl Iterator<Item = &Image> {
        self.lineages.iter().flat_map(|lineage| &lineage.images)
    }

    /// Why it is not known of every backup which disks it needs, with the file that keeps it from being known.
    pub fn unknown_metadata(&self) -> Option<(ObjectPath, String)> {
        for backup in self.backups.iter() {
            let is_unusable = |disk: &BackupDisk| matches!(disk.source, DiskSource::Unusable(_));
            if backup.mode == Mode::Unreadable
                || backup.mode == Mode::Incremental && backup.disks.iter().any(is_unusable)
            {
                let why = backup.problem.clone().unwrap_or_else(|| "it cannot be read".to_owned());
                return Some((backup.metadata.clone(), why));
            }
        }
        let is_surveyed = |disk: &ObjectPath| self.lineages.iter().any(|lineage| lineage.path == disk.parent());
        let is_foreign = |disk: &ObjectPath| !self.is_place_of_disks(&disk.parent()) && !is_surveyed(disk);
        for backup in self.backups.iter() {
            if let Some(disk) = disks_of(backup).find(|disk| is_foreign(disk)) {
                let why = format!("it names '{disk}', which is not where disks are: in 'vdis/<job>/<disk>' of its VM");
                return Some((backup.metadata.clone(), why));
            }
        }
        let is_listed = |seen: &Seen| self.backups.iter().any(|backup| backup.metadata == seen.path);
        let odd = self.entries.iter().find(|seen| is_metadata(&seen.name) && !is_listed(seen))?;
        Some((odd.path.clone(), "it is not named by a time, as metadata of a backup is".to_owned()))
    }

    /// Whether a folder is one of those that are surveyed, if it is there.
    fn is_place_of_disks(&self, folder: &ObjectPath) -> bool {
        let below = folder.as_str().strip_prefix(self.folder.as_str()).and_then(|rest| rest.strip_prefix("/vdis/"));
        below.is_some_and(|below| below.split('/').count() == 2)
    }

    /// Returns whether a backup can be read; `sound` are the disks that are known to open, and those are added that open
    /// with its own.
    fn health_of(
        &mut self,
        repository: &Repository,
        backup: &Backup,
        sound: &mut BTreeSet<ObjectPath>,
    ) -> Result<Health> {
        if backup.mode == Mode::Unreadable {
            return Ok(Health::Unknown);
        }
        if backup.mode == Mode::Full {
            return self.health_of_full(repository, backup);
        }
        let (mut opened, mut lost, mut others) = (0, Vec::new(), Vec::new());
        for disk in &backup.disks {
            let name = match &disk.source {
                DiskSource::Vhd(name) => Some(name),
                DiskSource::Xva { .. } | DiskSource::Unusable(_) => None,
            };
            if name.is_some_and(|name| sound.contains(name)) {
                opened += 1;
                continue;
            }
            match repository.open_disk(backup, disk) {
                Ok(_) => {
                    opened += 1;
                    sound.extend(name.into_iter().flat_map(|name| self.opened_with(name)).cloned());
                }
                Err(error) if error.kind() == disk::ErrorKind::Damaged => lost.push(error.to_string()),
                Err(error) if error.kind() == disk::ErrorKind::Unsupported => others.push(error.to_string()),
                Err(error) => return Err(error.into()),
            }
        }
        Ok(match (lost.first(), opened, others.len()) {
            (None, 0, _) | (None, _, 1..) => Health::Unknown,
            (None, _, 0) => Health::Good,
            (Some(why), 0, 0) => Health::Lost(why.clone()),
            (Some(why), ..) => Health::Partly(why.clone()),
        })
    }

    /// Returns the images that were opened with `name`, and just as if each had been opened by itself: what it is built on,
    /// as long as that is where its child says first, and no merge has begun in their folder.
    fn opened_with(&self, name: &ObjectPath) -> Vec<&ObjectPath> {
        let lineage = self.lineages.iter().find(|lineage| lineage.path == name.parent() && lineage.merges.is_empty());
        let images = lineage.map(|lineage| lineage.images.as_slice()).unwrap_or_default();
        let parent_of = |image: &&Image| {
            let child = image.links.as_ref().ok()?;
            images.iter().find(|parent| {
                let is_named = child.parent_name.as_ref() == Some(&parent.name);
                is_named && parent.links.as_ref().is_ok_and(|links| Some(links.uuid) == child.parent)
            })
        };
        let first = images.iter().find(|image| image.name == *name);
        std::iter::successors(first, parent_of).take(images.len()).map(|image| &image.name).collect()
    }

    fn health_of_full(&mut self, repository: &Repository, backup: &Backup) -> Result<Health> {
        let metadata: serde_json::Value =
            serde_json::from_slice(&repository.backup_metadata(backup)?).unwrap_or_default();
        let xva = metadata["xva"].as_str().and_then(|xva| self.folder.resolve(xva).ok());
        let Some(xva) = xva else { return Ok(Health::Unknown) };
        self.xvas.insert(backup.time, xva.clone());
        match repository.storage().stat(&xva) {
            Ok(_) => {}
            Err(error) if error.kind() == storage::ErrorKind::NotFound => {
                return Ok(Health::Lost(format!("'{xva}' is not there")));
            }
            Err(error) => return Err(error.into()),
        }
        Ok(if backup.problem.is_none() { Health::Good } else { Health::Unknown })
    }

    /// Notes what every judgement rests on: which names there are, what metadata says, and what images are built on.
    fn note(&mut self, storage: &dyn Storage) -> Result<()> {
        let mut facts = Facts::new();
        let mut note_names = |path: &ObjectPath, entries: &[Seen]| {
            // XO writes its cache also when it only lists.
            let names = entries.iter().map(|seen| &seen.name).filter(|name| *name != CACHE).cloned().collect();
            facts.insert(path.to_string(), folder_of(names));
        };
        note_names(&self.folder, &self.entries);
        for lineage in &self.lineages {
            note_names(&lineage.path, &lineage.entries);
            if let Some(data) = &lineage.data {
                note_names(&lineage.path.join("data")?, data);
            }
        }
        for seen in self.entries.iter().filter(|seen| is_metadata(&seen.name)) {
            facts.insert(seen.path.to_string(), Fact::look(storage, &seen.path)?);
        }
        for image in self.lineages.iter().flat_map(|lineage| &lineage.images) {
            let mut fact = match vhd::is_alias(image.name.file_name()) {
                true => Fact::look(storage, &image.name)?,
                false => Fact::of(&storage.stat(&image.name)?),
            };
            match &image.links {
                Ok(links) => (fact.uuid, fact.parent) = (Some(links.uuid), links.parent),
                Err(error) => fact.error = Some(error.to_string()),
            }
            facts.insert(image.name.to_string(), fact);
        }
        self.facts = facts;
        Ok(())
    }
}

impl Lineage {
    fn read(
        storage: &Arc<dyn Storage>,
        writable: Option<&Arc<dyn WritableStorage>>,
        path: ObjectPath,
        named: &BTreeSet<&ObjectPath>,
    ) -> Result<Self> {
        let entries = seen(storage, &path)?;
        let data = match entries.iter().find(|seen| seen.name == "data" && seen.is_folder()) {
            Some(data) => Some(seen(storage, &data.path)?),
            None => None,
        };
        let mut images = Vec::new();
        for seen in entries.iter().filter(|seen| seen.name.ends_with(".vhd") && !seen.name.starts_with('.')) {
            let links = unless_unavailable(Links::of(storage, &seen.path))?;
            let data = match &links {
                Ok(links) => Some(links.data.clone()),
                Err(_) => unless_unavailable(vhd::data_path(storage, &seen.path))?.ok(),
            };
            images.push(Image { name: seen.path.clone(), data, links });
        }
        let mut merges = Vec::new();
        for state in Merge::unfinished(storage.as_ref(), &path).map_err(disk::Error::from)? {
            let is_empty =
                entries.iter().any(|seen| seen.path == state && seen.stat.is_some_and(|stat| stat.size == 0));
            let chain = if is_empty { unsaid_chain(&images, &state, named) } else { Vec::new() };
            let begun = Begun { state, chain };
            let found = writable.map(|writable| begun.resume(writable).map(|merge| merge.blocks()));
            merges.push((begun, found.map(unless_unavailable).transpose()?));
        }
        Ok(Self { path, entries, data, images, merges })
    }
}

/// Returns the chain that a merge is of whose state file is empty, by its base: from there to the one image that a backup
/// names and that is built on it, by way of images that none names; none if that is not certain.
///
/// Parents are followed by name: the base may have the target's uuid already.
fn unsaid_chain(images: &[Image], state: &ObjectPath, named: &BTreeSet<&ObjectPath>) -> Vec<String> {
    let base =
        state.file_name().strip_prefix('.').and_then(|name| name.strip_suffix(".merge.json")).unwrap_or_default();
    let (mut chain, mut is_certain) = (Vec::new(), true);
    let mut next = images.iter().find(|image| image.name.file_name() == base);
    while let Some(image) = next.filter(|_| chain.len() < images.len()) {
        chain.push(image.name.file_name().to_owned());
        if named.contains(&image.name) {
            break;
        }
        let is_child = |other: &&Image| {
            other
                .links
                .as_ref()
                .is_ok_and(|links| links.parent.is_some() && links.parent_name.as_ref() == Some(&image.name))
        };
        next = images.iter().find(is_child);
        is_certain &= images.iter().filter(is_child).count() == 1;
    }
    let is_whole = is_certain && images.iter().all(|image| image.links.is_ok());
    if is_whole && chain.len() > 1 { chain } else { Vec::new() }
}

/// Whether XO takes a file of a VM's folder for metadata.
pub(super) fn is_metadata(name: &str) -> bool {
    name.ends_with(".json") && !name.starts_with('.')
}

fn folder_of(names: Vec<String>) -> Fact {
    let (size, modified, sha256, uuid, parent, error) = Default::default();
    Fact { what: What::Folder, size, modified, sha256, names: Some(names), uuid, parent, error }
}

/// Lists a folder and looks at what is in it, by name.
fn seen(storage: &Arc<dyn Storage>, folder: &ObjectPath) -> Result<Vec<Seen>> {
    let mut all = Vec::new();
    for entry in storage.list(folder)? {
        let path = folder.join(&entry.name)?;
        let stat = match storage.stat(&path) {
            Ok(stat) => Some(stat),
            Err(error) if error.kind().is_unavailable() => return Err(error.into()),
            // A link that leads nowhere, or out of the repository.
            Err(_) => None,
        };
        all.push(Seen { name: entry.name, path, stat });
    }
    all.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(all)
}

/// Keeps an error that says something of the image, and fails with one that does not.
fn unless_unavailable<T>(result: vhd::Result<T>) -> Result<vhd::Result<T>> {
    match result {
        Err(error) if matches!(error.kind(), vhd::ErrorKind::Unavailable | vhd::ErrorKind::Stale) => {
            Err(disk::Error::from(error).into())
        }
        other => Ok(other),
    }
}
