//! What lies in the disks of backups: their volumes, and the files in those.
//!
//! ```text
//! <backup>/volumes/xvda1.raw  vg0-root.raw      each volume as a disk
//!          files/xvda1/...    vg0-root/...      its files, if it has a filesystem that is read
//! ```
//!
//! Looking at a backup opens none of its disks; looking into one of these two folders does, and asks a
//! [worker] which volumes there are. What a worker says is kept, within limits: a backup never changes.

mod file;
mod flights;
mod kept;
mod listing;
mod name;
mod numbers;
mod volumes;

use std::ffi::{OsStr, OsString};
use std::num::NonZeroUsize;
use std::os::unix::ffi::OsStringExt;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use guest::{Inode, Time};
use lru::LruCache;

use super::key::{Form, Key};
use super::{Attributes, Content, Entry, Error, GuestAttributes, Kind, Result, Tree};
use crate::repository::{Backup, BackupId, DiskSource, Problem, ProblemKind};
use crate::worker::{self, Volume, Workers};
use file::GuestFile;
use flights::Flights;
use kept::KeptVolumes;
pub(super) use listing::Listing;
use listing::{Listed, Living};
pub(super) use numbers::Place;
use numbers::{Slots, VolumeId};
use volumes::Volumes;

/// Memory for directories (bytes); one that alone needs more is kept, too, until the next.
const LISTINGS: usize = 64 << 20;

/// Files whose attributes are kept, some 200 bytes each.
const ATTRIBUTES: NonZeroUsize = NonZeroUsize::new(64 << 10).expect("not zero");

/// Pieces of a volume that are counted to tell how much of it is stored: as many as blocks of 2 MiB in 2 TiB.
const PIECES: u32 = 1 << 20;

/// How a root is called here, whatever its filesystem calls it: it is shown before that was opened.
const ROOT: Inode = Inode(u64::MAX);

/// What is known of guests.
pub(super) struct Guests {
    workers: Arc<Workers>,
    /// Whether symbolic links are shown as files that hold their targets.
    has_inert_symlinks: bool,
    slots: Slots,
    volumes: KeptVolumes,
    surveys: Flights<BackupId>,
    listings: Mutex<Listings>,
    lists: Flights<Place>,
    living: Living,
    attributes: Mutex<LruCache<Place, guest::Attributes>>,
}

struct Listings {
    kept: LruCache<Place, Arc<Listing>>,
    memory: usize,
}

impl Guests {
    pub(super) fn new(workers: Arc<Workers>, has_inert_symlinks: bool) -> Self {
        Self {
            workers,
            has_inert_symlinks,
            slots: Slots::default(),
            volumes: KeptVolumes::default(),
            surveys: Flights::default(),
            lists: Flights::default(),
            living: Living::default(),
            listings: Mutex::new(Listings { kept: LruCache::unbounded(), memory: 0 }),
            attributes: Mutex::new(LruCache::new(ATTRIBUTES)),
        }
    }

    /// Returns the file of a guest that has that number.
    pub(super) fn place(&self, inode: u64) -> Option<Place> {
        self.slots.place(inode)
    }

    /// Returns the number of the root that a file is below.
    pub(super) fn root_of(&self, place: Place) -> u64 {
        self.slots.number(Place { inode: ROOT, ..place })
    }

    /// Returns what a file of a guest is called in messages.
    pub(super) fn describe(&self, place: Place) -> String {
        let Some(VolumeId { backup, name, .. }) = self.slots.volume(place.slot) else {
            return "a guest's file".to_owned();
        };
        let folder = format!("{}/{name}", Key::Files(backup));
        if place.inode == ROOT { folder } else { format!("{folder} (file {})", place.inode.0) }
    }

    pub(super) fn is_listed(&self, place: Place) -> bool {
        self.listings().kept.contains(&place)
    }

    pub(super) fn has_attributes(&self, place: Place) -> bool {
        self.attributes().contains(&place)
    }

    /// Returns an entry of a directory as it is shown. Of what cannot be looked at the name is shown; whoever asks for more is told.
    pub(super) fn entry(&self, directory: Place, Listed { name, inode, attributes }: &Listed) -> Entry {
        Entry {
            inode: self.slots.number(Place { slot: directory.slot, inode: *inode }),
            kind: attributes.as_ref().map_or(Kind::File, |known| self.kind(known.kind)),
            name: name.clone(),
        }
    }

    /// Returns as what a file is shown.
    fn kind(&self, kind: Kind) -> Kind {
        if self.has_inert_symlinks && kind == Kind::Symlink { Kind::File } else { kind }
    }

    fn listings(&self) -> MutexGuard<'_, Listings> {
        self.listings.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn attributes(&self) -> MutexGuard<'_, LruCache<Place, guest::Attributes>> {
        self.attributes.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Listings {
    fn keep(&mut self, place: Place, listing: Arc<Listing>) {
        self.memory += listing.memory();
        if let Some(replaced) = self.kept.put(place, listing) {
            self.memory -= replaced.memory();
        }
        while self.memory > LISTINGS && self.kept.len() > 1 {
            let Some((_, dropped)) = self.kept.pop_lru() else { break };
            self.memory -= dropped.memory();
        }
    }
}

impl Tree {
    /// Returns the volumes of a backup.
    fn volumes(&self, id: &BackupId) -> Result<Arc<Volumes>> {
        let backup = self.backup(id).inspect_err(|error| {
            if matches!(error, Error::NotFound) {
                self.guests.volumes.forget(id);
            }
        })?;
        if let Some(volumes) = self.guests.volumes.get(&backup) {
            return Ok(volumes);
        }
        let _flight = self.guests.surveys.begin(id);
        if let Some(volumes) = self.guests.volumes.get(&backup) {
            return Ok(volumes);
        }
        let volumes = Arc::new(Volumes::find(&self.repository, &backup, &self.guests.workers)?);
        for problem in &volumes.problems {
            self.report_in(&backup, problem.clone());
        }
        let volumes = self.guests.volumes.put(&backup, volumes);
        // What was told of a backup is forgotten when it goes.
        volumes.found.iter().for_each(|found| found.is_told.store(false, Ordering::Relaxed));
        Ok(volumes)
    }

    /// Returns the files of the volumes of a backup.
    pub(super) fn volume_files(&self, id: &BackupId) -> Result<Vec<(String, Key)>> {
        let volumes = self.volumes(id)?;
        let file = |name: &Arc<str>| (format!("{name}{}", Form::Raw.suffix()), Key::Volume(id.clone(), name.clone()));
        Ok(volumes.found.iter().map(|found| file(&found.name)).collect())
    }

    /// Returns a volume as a disk.
    pub(super) fn open_volume(&self, id: &BackupId, name: &str) -> Result<Arc<dyn disk::Disk>> {
        let volumes = self.volumes(id)?;
        let found = volumes.find_one(name)?;
        found.disk.clone().ok_or_else(|| {
            let problem = found.problem.clone().unwrap_or_else(|| "its bytes cannot be had".to_owned());
            Error::Disk(disk::Error::new(disk::ErrorKind::Damaged, problem))
        })
    }

    /// Returns the sizes of a volume: its own, and what of it is stored.
    pub(super) fn volume_sizes(&self, key: &Key, id: &BackupId, name: &str) -> Result<(u64, u64)> {
        self.sizes.get_or_measure(key, None, 0, || {
            let disk = self.open_volume(id, name)?;
            // An XVA has no map of what it holds.
            let is_full = self.backup(id)?.disks.iter().any(|disk| matches!(disk.source, DiskSource::Xva { .. }));
            Ok((disk.size(), if is_full { disk.size() } else { allocated(&*disk)? }))
        })
    }

    /// Returns what is said of a volume.
    pub(super) fn volume_properties(&self, id: &BackupId, name: &str) -> Result<Vec<(&'static str, String)>> {
        let volumes = self.volumes(id)?;
        let found = volumes.find_one(name)?;
        let content = found.content.name();
        let content = found.first.as_ref().map_or(content.to_owned(), |first| format!("{content} of {first}"));
        let mut properties = vec![("content", content)];
        let advice = || found.content.advice(&format!("volumes/{name}.raw"));
        if let Some(problem) = found.problem.clone().or_else(advice) {
            properties.push(("problem", problem));
        }
        Ok(properties)
    }

    /// Returns the roots of the filesystems of a backup.
    pub(super) fn list_filesystems(&self, id: &BackupId) -> Result<Vec<Entry>> {
        let volumes = self.volumes(id)?;
        let readable = volumes.found.iter().filter(|found| found.filesystem.is_some());
        readable
            .map(|found| {
                let inode = self.guests.slots.number(self.root(id, &volumes, &found.name)?);
                Ok(Entry { inode, kind: Kind::Directory, name: found.name.to_string().into() })
            })
            .collect()
    }

    /// Looks up the root of a filesystem of a backup.
    pub(super) fn lookup_filesystem(&self, id: &BackupId, name: &OsStr) -> Result<Attributes> {
        let name = name.to_str().ok_or(Error::NotFound)?;
        let volumes = self.volumes(id)?;
        if volumes.find_one(name)?.filesystem.is_none() {
            return Err(Error::NotFound);
        }
        self.guest_attributes(self.root(id, &volumes, &Arc::from(name))?)
    }

    /// Returns the root of a filesystem, which has its number before anybody opened it.
    fn root(&self, id: &BackupId, volumes: &Volumes, name: &Arc<str>) -> Result<Place> {
        let volume = VolumeId { backup: id.clone(), name: name.clone(), identity: volumes.identity };
        let slot = self.guests.slots.slot(&volume).ok_or_else(|| {
            let message = "more volumes were looked at than a mount counts: mount again";
            worker::Error::Guest(guest::Error::new(guest::ErrorKind::TooMuch, message))
        })?;
        Ok(Place { slot, inode: ROOT })
    }

    /// Returns the filesystem that a file is in, and the file's number there.
    fn filesystem(&self, place: Place) -> Result<(Arc<Volume>, Inode)> {
        let VolumeId { backup, name, identity } = self.guests.slots.volume(place.slot).ok_or(Error::Stale)?;
        let volumes = self.volumes(&backup).map_err(Error::of_known)?;
        if volumes.identity != identity {
            return Err(Error::Stale);
        }
        let found = volumes.find_one(&name).map_err(Error::of_known)?;
        let volume = found.filesystem.clone().ok_or(Error::Stale)?;
        let opened = volume.open();
        let is_told = || found.is_told.swap(true, Ordering::Relaxed);
        match &opened {
            Ok((_, facts)) if !facts.problems.is_empty() && !is_told() => {
                facts.problems.iter().for_each(|problem| self.report_guest(place, problem));
            }
            Err(worker::Error::Guest(error)) if !is_told() => self.report_guest(place, &error.to_string()),
            _ => {}
        }
        let (root, _) = opened?;
        let inode = if place.inode == ROOT { root } else { place.inode };
        Ok((volume, inode))
    }

    /// Remembers that something of a guest could not be read.
    pub(super) fn report_guest(&self, place: Place, message: &str) {
        let Some(VolumeId { backup, name, .. }) = self.guests.slots.volume(place.slot) else { return };
        let Ok(backup) = self.backup(&backup) else { return };
        self.report_in(&backup, format!("volume {name}: {message}"));
    }

    fn report_in(&self, backup: &Backup, message: String) {
        let (path, backup) = (backup.metadata.clone(), Some(backup.id()));
        self.repository.report_problem(Problem { path, backup, kind: ProblemKind::Guest, message });
    }

    /// Returns what is known of a file of a guest.
    pub(super) fn guest_attributes(&self, place: Place) -> Result<Attributes> {
        match self.known(place) {
            Ok(known) => Ok(self.shown(place, &known)),
            // A folder, into which nobody can look; its attributes say why.
            Err(Error::Guest(_)) if place.inode == ROOT => Ok(self.unopened(place)),
            Err(error) => Err(error),
        }
    }

    fn known(&self, place: Place) -> Result<guest::Attributes> {
        if let Some(known) = self.guests.attributes().get(&place) {
            return Ok(known.clone());
        }
        let (volume, inode) = self.filesystem(place)?;
        let known = volume.attributes(inode)?;
        // A link in its place would lead out of the mount.
        if place.inode == ROOT && known.kind != Kind::Directory {
            return Err(
                worker::Error::Guest(guest::Error::damaged("the root of the filesystem is no directory")).into()
            );
        }
        self.guests.attributes().put(place, known.clone());
        Ok(known)
    }

    fn shown(&self, place: Place, known: &guest::Attributes) -> Attributes {
        Attributes {
            inode: self.guests.slots.number(place),
            kind: self.guests.kind(known.kind),
            size: known.size,
            allocated: known.allocated,
            modified: moment(known.modified),
            is_disk: false,
            // Another backup may come to have the name of this one, and then what is below is another, too.
            is_constant: place.inode != ROOT,
            guest: Some(GuestAttributes {
                mode: known.mode,
                uid: known.uid,
                gid: known.gid,
                links: known.links,
                device: known.device,
                accessed: moment(known.accessed),
                changed: moment(known.changed),
                created: known.created.map(moment),
            }),
        }
    }

    fn unopened(&self, place: Place) -> Attributes {
        let time = self.guests.slots.volume(place.slot).map(|volume| super::at(volume.backup.time.unix()));
        Attributes {
            inode: self.guests.slots.number(place),
            kind: Kind::Directory,
            size: 0,
            allocated: 0,
            modified: time.unwrap_or(self.since),
            is_disk: false,
            is_constant: false,
            guest: None,
        }
    }

    /// Lists a directory of a guest.
    pub(super) fn listing(&self, place: Place) -> Result<Arc<Listing>> {
        if let Some(listing) = self.guests.listings().kept.get(&place) {
            return Ok(listing.clone());
        }
        let _flight = self.guests.lists.begin(&place);
        if let Some(listing) = self.guests.listings().kept.get(&place) {
            return Ok(listing.clone());
        }
        self.guests.living.check().map_err(worker::Error::from)?;
        let (volume, inode) = self.filesystem(place)?;
        let (listed, is_lasting) = volume.list(inode)?;
        let listing = Arc::new(Listing::new(listed, volume.open()?.0, self.guests.living.clone()));
        if !self.guests.slots.admit(place.slot, listing.inodes()) {
            let message = "the numbers of its files are more scattered than those of any filesystem: its files cannot be told apart";
            return Err(worker::Error::Guest(guest::Error::new(guest::ErrorKind::TooMuch, message)).into());
        }
        if is_lasting {
            self.guests.listings().keep(place, listing.clone());
        }
        Ok(listing)
    }

    /// Looks a name up in a directory of a guest.
    pub(super) fn guest_lookup(&self, directory: Place, name: &OsStr) -> Result<Attributes> {
        let listing = self.listing(directory)?;
        let listed = listing.find(name).ok_or(Error::NotFound)?;
        self.known_of_guest(directory, listed).ok_or_else(|| {
            let message = listed.attributes.as_ref().err().cloned().unwrap_or_default();
            worker::Error::Guest(guest::Error::damaged(message)).into()
        })
    }

    /// Returns what is known of an entry of a directory of a guest.
    pub(super) fn known_of_guest(&self, directory: Place, listed: &Listed) -> Option<Attributes> {
        let place = Place { slot: directory.slot, inode: listed.inode };
        let known = listed.attributes.as_ref().ok()?;
        self.guests.attributes().put(place, known.clone());
        Some(self.shown(place, known))
    }

    /// Returns the directory above the root of a filesystem; of what lies deeper the root, since a file may have many.
    pub(super) fn guest_parent(&self, place: Place) -> Result<u64> {
        if place.inode != ROOT {
            return Ok(self.guests.root_of(place));
        }
        let volume = self.guests.slots.volume(place.slot).ok_or(Error::Stale)?;
        Ok(self.inodes.number(&Key::Files(volume.backup)))
    }

    /// Returns the target of a symbolic link of a guest, as it stands there.
    pub(super) fn guest_target(&self, place: Place) -> Result<OsString> {
        let (volume, inode) = self.filesystem(place)?;
        Ok(OsString::from_vec(volume.target(inode)?))
    }

    /// Returns the extended attributes of a file of a guest; of a root, also what is said of the filesystem.
    pub(super) fn guest_xattrs(&self, place: Place) -> Result<Vec<(OsString, Vec<u8>)>> {
        let found = self.filesystem(place);
        let mut xattrs = Vec::new();
        if place.inode == ROOT {
            let own = |name: &str, value: String| (OsString::from(format!("user.xofs.{name}")), value.into_bytes());
            match &found {
                Ok((volume, _)) => {
                    let (_, facts) = volume.open()?;
                    for (name, value) in [("content", &facts.kind), ("label", &facts.label), ("uuid", &facts.uuid)] {
                        if !value.is_empty() {
                            xattrs.push(own(name, value.clone()));
                        }
                    }
                    xattrs.push(own("replayed", facts.is_replayed.to_string()));
                    if !facts.problems.is_empty() {
                        xattrs.push(own("problem", facts.problems.join("; ")));
                    }
                }
                Err(Error::Guest(error)) => return Ok(vec![own("problem", error.to_string())]),
                Err(_) => {}
            }
        }
        let (volume, inode) = found?;
        let guests = volume.xattrs(inode)?.into_iter();
        xattrs.extend(guests.map(|xattr| (OsString::from_vec(xattr.name), xattr.value)));
        Ok(xattrs)
    }

    /// Opens a file of a guest.
    pub(super) fn guest_open(&self, place: Place) -> Result<Content> {
        let known = self.known(place)?;
        let (volume, inode) = self.filesystem(place)?;
        match known.kind {
            Kind::Symlink if self.guests.has_inert_symlinks => Ok(Content::Bytes(Arc::from(volume.target(inode)?))),
            Kind::File => Ok(Content::File(Arc::new(GuestFile::new(volume, inode, known.size)))),
            Kind::Directory => Err(Error::IsDirectory),
            _ => Err(Error::NotFound),
        }
    }
}

/// Returns how much of a volume is stored (bytes). A guest may have cut it into any number of pieces: what is left after so many
/// counts as stored.
fn allocated(disk: &dyn disk::Disk) -> Result<u64> {
    let (mut at, mut stored) = (0, 0);
    for _ in 0..PIECES {
        if at >= disk.size() {
            return Ok(stored);
        }
        let extent = disk.extent_at(at)?;
        at += extent.len;
        stored += if extent.is_hole { 0 } else { extent.len };
    }
    Ok(stored + (disk.size() - at))
}

/// A moment of a guest; one that no clock here can show is 1970.
fn moment(time: Time) -> SystemTime {
    let after = Duration::from_nanos(u64::from(time.nanoseconds));
    super::at(time.seconds).checked_add(after).unwrap_or(UNIX_EPOCH)
}
