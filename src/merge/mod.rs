//! What becomes of backups that are forgotten: their metadata goes, and what later backups need of their disks is merged
//! into the disks of these.
//!
//! ```text
//! under the lock of the VM
//! 1  finish the merges that were begun earlier, by us or by XO
//! 2  see that everything that would be merged can be; a backup that cannot go stays; write anew what fits nothing
//! 3  note what goes with them (note.rs): XVAs and disks
//! 4  remove the metadata of those that go, newest first; from here on they do not exist; then their XVAs
//! 5  remove the disks that nothing is built on that stays: what is merged next may have been what they are built on
//! 6  merge each chain (vhd::Merge), those of several disks at a time; then write what changed into the metadata of the targets;
//!    then the note goes
//! ```
//!
//! What is interrupted after step 4 is found the next time by its disks, which no metadata names, and by the note.

mod note;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

use serde_json::value::{RawValue, to_raw_value};
use storage::{ObjectPath, Storage, UNPUBLISHED, WritableStorage, unless_gone};
use vhd::{BlockCache, Context, Control, ImageSummary, Merge, Outcome};

pub(crate) use note::note_of;

use note::Note;

use crate::repository::{
    Backup, BackupDisk, BackupTime, Backups, DiskSource, Error, ErrorKind, Mode, Repository, Result, VM_FOLDER,
    VmFolder, VmLock, remove_empty_lineage,
};

/// How it is watched and ended.
pub struct Watch<'a> {
    /// Blocks that are moved at a time, by each merge.
    pub threads: usize,
    /// Merges at a time, of different disks.
    pub jobs: usize,
    /// Called with the number of blocks there are to move, once it is known, and each time it grows.
    pub planned: &'a (dyn Fn(u64) + Sync),
    /// Called with the number of blocks that were moved since the last time.
    pub moved: &'a (dyn Fn(u64) + Sync),
    /// Asked now and then; true ends it where it can be gone on with.
    pub is_stopped: &'a (dyn Fn() -> bool + Sync),
}

/// What was done to a VM.
#[derive(Debug, Default)]
pub struct Forgotten {
    /// The backups that went.
    pub backups: Vec<BackupTime>,
    /// Backups that should have gone and did not, and why.
    pub refused: Vec<(BackupTime, String)>,
    /// Disks and files that could not be dealt with, and why; the next run tries again.
    pub problems: Vec<(ObjectPath, String)>,
    /// Images that were merged into the next.
    pub merged: u64,
    /// Blocks that were moved.
    pub blocks: u64,
    /// Whether it was ended before it was done.
    pub is_stopped: bool,
}

/// Forgets those backups of a VM that `choose` names of all it has.
///
/// # Errors
/// [`ErrorKind::Damaged`] if the metadata of one of its backups cannot be read: nobody knows which disks it needs. Else what
/// the storage says; then nothing that a backup needs is lost, and the next run goes on.
pub fn forget(lock: &VmLock, choose: impl FnOnce(&Backups) -> Vec<Arc<Backup>>, watch: &Watch) -> Result<Forgotten> {
    Run::new(lock, watch)?.forget(choose)
}

/// A merge that is to be made.
struct Planned {
    /// How many images it takes away.
    images: u64,
    merge: Merge,
    /// Once it ran.
    outcome: Option<Outcome>,
}

/// A merge that has begun.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Begun {
    /// Its state file.
    pub state: ObjectPath,
    /// The images it is of, from the base to the target, if the file does not say it.
    pub chain: Vec<String>,
}

impl Begun {
    /// Takes it up; see [`Merge::resume`].
    ///
    /// # Errors
    /// As for that.
    pub fn resume(&self, storage: &Arc<dyn WritableStorage>) -> vhd::Result<Merge> {
        match self.chain.as_slice() {
            [] => Merge::resume(storage, &self.state),
            chain => Merge::resume_unsaid(storage, &self.state, chain.to_vec()),
        }
    }
}

/// Finishes merges that have begun, and does nothing else.
///
/// # Errors
/// As for [`forget`].
pub fn finish(lock: &VmLock, merges: Vec<Begun>, watch: &Watch) -> Result<Forgotten> {
    let mut run = Run::new(lock, watch)?;
    let backups = Repository::to_change(run.reader.clone(), 0).backups(lock.vm())?;
    run.check_all_is_known(&backups)?;
    run.finish_merges(merges, &backups)?;
    Ok(run.done)
}

struct Run<'a> {
    lock: &'a VmLock,
    watch: &'a Watch<'a>,
    storage: Arc<dyn WritableStorage>,
    reader: Arc<dyn Storage>,
    /// The folder of the VM.
    folder: ObjectPath,
    done: Forgotten,
}

impl<'a> Run<'a> {
    fn new(lock: &'a VmLock, watch: &'a Watch<'a>) -> Result<Self> {
        let storage = lock.storage().clone();
        let reader = storage.clone().reader();
        let folder = ObjectPath::new(VM_FOLDER)?.join(lock.vm().as_str())?;
        Ok(Self { lock, watch, storage, reader, folder, done: Forgotten::default() })
    }

    fn forget(mut self, choose: impl FnOnce(&Backups) -> Vec<Arc<Backup>>) -> Result<Forgotten> {
        let backups = Repository::to_change(self.reader.clone(), 0).backups(self.lock.vm())?;
        self.check_all_is_known(&backups)?;
        let lineages = lineages(&*self.reader, &self.folder)?;
        for lineage in &lineages {
            let states = Merge::unfinished(&*self.reader, lineage).map_err(of_vhd)?;
            let begun = states.into_iter().map(|state| Begun { state, chain: Vec::new() });
            self.finish_merges(begun.collect(), &backups)?;
        }
        if self.done.is_stopped {
            return Ok(self.done);
        }
        let mut going = choose(&backups);
        let folder = VmFolder::new(self.lock)?;
        self.keep_immutable(&folder, &mut going)?;
        let mut note = self.left_note()?;
        let mut merges = self.plan(&backups, &mut going, &lineages, &mut note)?;
        (self.watch.planned)(merges.iter().map(|planned| planned.merge.blocks()).sum());
        self.each_merge(&mut merges, |run, merge| run.prepare(merge))?;
        if self.done.is_stopped {
            return Ok(self.done);
        }
        going.sort_by_key(|backup| std::cmp::Reverse(backup.time));
        for backup in &going {
            note.files.extend(self.archive(&folder, backup)?);
        }
        note.write(&*self.storage, &self.folder)?;
        for backup in &going {
            if (self.watch.is_stopped)() {
                self.done.is_stopped = true;
                return Ok(self.done);
            }
            folder.remove(backup.time)?;
            self.done.backups.push(backup.time);
        }
        self.remove_files(&folder, &backups, &going, &note)?;
        let are_gone = self.remove_disks(&backups, &going, &note, &lineages)?;
        self.each_merge(&mut merges, |run, merge| run.merge(merge))?;
        for merge in &merges {
            self.conclude(merge, &backups)?;
        }
        if self.done.is_stopped {
            return Ok(self.done);
        }
        if are_gone {
            note.forget(&*self.storage, &self.folder)?;
        }
        Ok(self.done)
    }

    /// Refuses to go on unless it is known of every backup which disks it needs: what nobody needs is merged away.
    fn check_all_is_known(&self, backups: &Backups) -> Result<()> {
        let unknown = |path: &ObjectPath, why: &str| {
            let message = format!(
                "'{path}' {why}, so nobody knows which disks it needs: nothing of its VM is forgotten until it is repaired or \
                 removed"
            );
            Err(Error::new(ErrorKind::Damaged, message))
        };
        for backup in backups.iter() {
            // The disks of a full backup are in a file of its own.
            let is_unusable =
                |disk: &BackupDisk| backup.mode == Mode::Incremental && matches!(disk.source, DiskSource::Unusable(_));
            if backup.mode == Mode::Unreadable || backup.disks.iter().any(is_unusable) {
                return unknown(&backup.metadata, "cannot be read");
            }
        }
        for entry in self.reader.list(&self.folder)? {
            let is_listed = |backup: &Arc<Backup>| backup.metadata.file_name() == entry.name;
            if entry.name.ends_with(".json") && !entry.name.starts_with('.') && !backups.iter().any(is_listed) {
                return unknown(&self.folder.join(&entry.name)?, "is not named by a time, as metadata of a backup is");
            }
        }
        Ok(())
    }

    /// Finishes what was begun.
    fn finish_merges(&mut self, merges: Vec<Begun>, backups: &Backups) -> Result<()> {
        for begun in merges {
            match begun.resume(&self.storage) {
                Ok(mut merge) => {
                    // Of those that it was begun for some may not have gone.
                    let named = self.names_of(backups, &[]);
                    merge.keep(|name| named.contains(name));
                    (self.watch.planned)(merge.blocks());
                    let mut planned = Planned { images: 1, merge, outcome: None };
                    self.merge(&mut planned)?;
                    self.conclude(&planned, backups)?;
                    if self.done.is_stopped {
                        return Ok(());
                    }
                }
                Err(error) => self.done.problems.push((begun.state, error.to_string())),
            }
        }
        Ok(())
    }

    /// Takes out of `going` the backups of which a file may not be removed; of disks, that is seen when they are planned for.
    fn keep_immutable(&mut self, folder: &VmFolder, going: &mut Vec<Arc<Backup>>) -> Result<()> {
        for backup in std::mem::take(going) {
            let mut files = self.archive(folder, &backup)?;
            files.push(backup.metadata.clone());
            match self.immutable(&files)? {
                Some(file) => self.done.refused.push((backup.time, immutable(&file, "removed"))),
                None => going.push(backup),
            }
        }
        Ok(())
    }

    /// Returns the first of some paths that may not be changed; what is not there may.
    fn immutable<'p>(&self, paths: impl IntoIterator<Item = &'p ObjectPath>) -> Result<Option<ObjectPath>> {
        for path in paths {
            match self.storage.is_immutable(path) {
                Ok(true) => return Ok(Some(path.clone())),
                Ok(false) => {}
                Err(error) if error.kind() == storage::ErrorKind::NotFound => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(None)
    }

    /// Reads what a run noted that died.
    fn left_note(&mut self) -> Result<Note> {
        match Note::read(&*self.reader, &self.folder) {
            Err(error) if error.kind() == ErrorKind::Damaged => {
                self.done.problems.push((note_of(&self.folder), error.to_string()));
                Ok(Note::default())
            }
            read => read,
        }
    }

    /// Finds what is to be merged, and notes the disks that go with it or alone; takes out of `going` the backups of which a disk
    /// cannot be merged.
    fn plan(
        &mut self,
        backups: &Backups,
        going: &mut Vec<Arc<Backup>>,
        lineages: &[ObjectPath],
        note: &mut Note,
    ) -> Result<Vec<Planned>> {
        loop {
            let kept = self.names_of(backups, going);
            let went: BTreeSet<&ObjectPath> = going.iter().flat_map(|backup| disks_of(backup)).collect();
            let (mut merges, mut alone, mut merged) = (Vec::new(), BTreeMap::new(), BTreeMap::new());
            let mut problems = Vec::new();
            for lineage in lineages {
                let found = match Merge::lineage(&self.reader, lineage, |path| kept.contains(path)) {
                    Ok(found) => found,
                    Err(error) => {
                        problems.push((lineage.clone(), error.to_string()));
                        continue;
                    }
                };
                if went.iter().any(|name| name.parent() == *lineage) {
                    if let Some(reason) = self.why_unreadable(lineage, &kept) {
                        problems.push((lineage.clone(), reason));
                        continue;
                    }
                }
                for name in &found.unneeded {
                    let name = lineage.join(name)?;
                    if !went.contains(&name) {
                        continue;
                    }
                    let data = vhd::data_path(&self.reader, &name).map_err(of_vhd)?;
                    if !data.is_beneath(lineage) {
                        let reason = format!("it leads to '{data}', which is not in its folder: it cannot be removed");
                        problems.push((name, reason));
                    } else if let Some(path) = self.immutable([lineage, &name, &data])? {
                        problems.push((name, immutable(&path, "removed")));
                    } else {
                        alone.insert(name, data);
                    }
                }
                for chain in found.chains {
                    // What changes is written into its metadata.
                    let target = lineage.join(chain.last().expect("a chain has a target"))?;
                    let stays =
                        Self::staying(backups, going).filter(|backup| disks_of(backup).any(|disk| *disk == target));
                    if let Some(path) = self.immutable(stays.map(|backup| &backup.metadata))? {
                        problems.push((lineage.join(&chain[0])?, immutable(&path, "changed")));
                        continue;
                    }
                    let is_alone = |name: &str| lineage.join(name).is_ok_and(|name| alone.contains_key(&name));
                    match Merge::new_once_gone(&self.storage, lineage, &chain, is_alone) {
                        Ok(merge) => {
                            let sources =
                                merge.sources().filter(|(name, data)| went.contains(name) && data.is_beneath(lineage));
                            merged.extend(sources.map(|(name, data)| (name, data.clone())));
                            merges.push(Planned { images: chain.len() as u64 - 1, merge, outcome: None });
                        }
                        Err(error) => problems.push((lineage.join(&chain[0])?, error.to_string())),
                    }
                }
            }
            // A backup that is in the way stays, which makes other chains.
            let is_stuck = |backup: &Backup, path: &ObjectPath| {
                disks_of(backup).any(|disk| disk == path || disk.parent() == *path || disk.parent() == path.parent())
            };
            let before = going.len();
            for (path, reason) in &problems {
                going.retain(|backup| {
                    let stays = is_stuck(backup, path);
                    if stays {
                        self.done.refused.push((backup.time, reason.clone()));
                    }
                    !stays
                });
            }
            if going.len() == before {
                self.done.problems.extend(problems);
                note.disks.extend(alone.into_iter().chain(merged));
                return Ok(merges);
            }
        }
    }

    /// Returns why nothing could be read of a disk once only what is `kept` is left of it; `None` if something could, or nothing
    /// is meant to be left.
    fn why_unreadable(&self, lineage: &ObjectPath, kept: &BTreeSet<ObjectPath>) -> Option<String> {
        let context = Context { storage: self.reader.clone(), cache: BlockCache::new(0) };
        let mut why = None;
        for name in kept.iter().rev().filter(|name| name.parent() == *lineage) {
            match vhd::open(&context, name, None) {
                Ok(_) => return None,
                Err(error) => why = why.or(Some(error)),
            }
        }
        why.map(|error| format!("nothing that can be read would be left of this disk: {error}"))
    }

    /// Returns the disks that the backups that stay name.
    fn names_of(&self, backups: &Backups, going: &[Arc<Backup>]) -> BTreeSet<ObjectPath> {
        Self::staying(backups, going).flat_map(|backup| disks_of(backup).cloned()).collect()
    }

    fn staying<'b>(backups: &'b Backups, going: &'b [Arc<Backup>]) -> impl Iterator<Item = &'b Arc<Backup>> {
        backups.iter().filter(|backup| !going.iter().any(|other| other.time == backup.time))
    }

    /// Has `act` done to each merge until one fails or it is stopped; those of one disk one after the other, since they look
    /// at the same names.
    fn each_merge(
        &mut self,
        merges: &mut [Planned],
        act: impl Fn(&mut Self, &mut Planned) -> Result<()> + Sync,
    ) -> Result<()> {
        let folder = |planned: &Planned| planned.merge.target().parent();
        let disks: Vec<&mut [Planned]> = merges.chunk_by_mut(|left, right| folder(left) == folder(right)).collect();
        let threads = self.watch.jobs.clamp(1, disks.len().max(1));
        let (left, failure) = (Mutex::new(disks.into_iter()), Mutex::new(None));
        let next = || left.lock().unwrap_or_else(PoisonError::into_inner).next();
        let fail = |error: Option<Error>| -> bool {
            let mut failure = failure.lock().unwrap_or_else(PoisonError::into_inner);
            *failure = failure.take().or(error);
            failure.is_some()
        };
        let work = |mut run: Self| {
            while let Some(merges) = next() {
                for merge in merges {
                    if run.done.is_stopped || fail(None) || fail(act(&mut run, merge).err()) {
                        return run.done;
                    }
                }
            }
            run.done
        };
        let done: Vec<Forgotten> = thread::scope(|scope| {
            // Where the system refuses another thread, there are fewer.
            let spawn =
                |_| thread::Builder::new().name("xofs-forget".to_owned()).spawn_scoped(scope, || work(self.fork()));
            let others: Vec<_> = (1..threads).map_while(|number| spawn(number).ok()).collect();
            let own = work(self.fork());
            let others = others.into_iter().map(|other| other.join().expect("a merge does not panic"));
            std::iter::once(own).chain(others).collect()
        });
        for done in done {
            self.done.blocks += done.blocks;
            self.done.is_stopped |= done.is_stopped;
        }
        failure.into_inner().unwrap_or_else(PoisonError::into_inner).map_or(Ok(()), Err)
    }

    /// Returns one for another thread, which has done nothing yet.
    fn fork(&self) -> Self {
        Self {
            storage: self.storage.clone(),
            reader: self.reader.clone(),
            folder: self.folder.clone(),
            done: Forgotten::default(),
            ..*self
        }
    }

    /// Does what is to be done before a backup goes.
    fn prepare(&mut self, planned: &mut Planned) -> Result<()> {
        let outcome = self.watched(|control| planned.merge.prepare(control))?;
        self.done.is_stopped |= outcome == Outcome::Stopped;
        Ok(())
    }

    /// Merges, unless it is stopped.
    fn merge(&mut self, planned: &mut Planned) -> Result<()> {
        let outcome = self.watched(|control| planned.merge.run(control))?;
        self.done.is_stopped |= outcome == Outcome::Stopped;
        planned.outcome = Some(outcome);
        Ok(())
    }

    /// Writes what changed into the metadata, and ends the merge. All disks of the backup are looked at: none may be merged
    /// meanwhile.
    fn conclude(&mut self, planned: &Planned, backups: &Backups) -> Result<()> {
        match planned.outcome {
            None | Some(Outcome::Stopped) => return Ok(()),
            Some(Outcome::Undone) => {}
            Some(Outcome::Merged) => {
                let target = planned.merge.target();
                for backup in backups.iter().filter(|backup| disks_of(backup).any(|disk| *disk == target)) {
                    self.rewrite(backup)?;
                }
                self.done.merged += planned.images;
            }
        }
        planned.merge.forget().map_err(of_vhd)
    }

    /// Has a part of a merge done.
    fn watched<T>(&mut self, act: impl FnOnce(&Control) -> vhd::Result<T>) -> Result<T> {
        let moved = AtomicU64::new(0);
        let done = act(&Control {
            threads: self.watch.threads,
            barrier: &|| self.lock.check().map_err(|error| lost(&self.folder, &error)),
            moved: &|blocks| {
                moved.fetch_add(blocks, Ordering::Relaxed);
                (self.watch.moved)(blocks);
            },
            is_stopped: self.watch.is_stopped,
        });
        self.done.blocks += moved.into_inner();
        done.map_err(of_vhd)
    }

    /// Writes into the metadata of a backup what its disks are now.
    fn rewrite(&self, backup: &Backup) -> Result<()> {
        let folder = VmFolder::new(self.lock)?;
        let mut metadata = folder.metadata(backup.time)?;
        let damaged = |what: &str| Error::new(ErrorKind::Damaged, format!("'{}': {what}", backup.metadata));
        let vhds: BTreeMap<String, String> = match metadata.get("vhds") {
            Some(vhds) => serde_json::from_str(vhds.get()).map_err(|_| damaged("paths were expected in 'vhds'"))?,
            None => return Err(damaged("'vhds' is missing")),
        };
        let (mut size, mut is_differencing) = (0, BTreeMap::new());
        for (reference, path) in vhds {
            let image = ImageSummary::of(&self.reader, &self.folder.resolve(&path)?).map_err(of_vhd)?;
            size += image.size;
            is_differencing.insert(reference, image.is_differencing);
        }
        let raw = |value: serde_json::Result<Box<RawValue>>| value.map_err(|error| damaged(&error.to_string()));
        metadata.insert("size".to_owned(), raw(to_raw_value(&size))?);
        metadata.insert("isVhdDifferencing".to_owned(), raw(to_raw_value(&is_differencing))?);
        folder.rewrite(backup.time, &metadata)
    }

    /// Removes the files that went with backups and that none that stays has.
    fn remove_files(&self, folder: &VmFolder, backups: &Backups, going: &[Arc<Backup>], note: &Note) -> Result<()> {
        if note.files.is_empty() {
            return Ok(());
        }
        let mut kept = BTreeSet::new();
        for backup in Self::staying(backups, going) {
            kept.extend(self.archive(folder, backup)?);
        }
        let is_archive = |path: &&ObjectPath| {
            let name = path.file_name();
            path.parent() == self.folder && (name.ends_with(".xva") || name.ends_with(".xva.checksum"))
        };
        for path in note.files.difference(&kept).filter(is_archive) {
            self.lock.check()?;
            match self.storage.remove(path) {
                Err(error) if error.kind() != storage::ErrorKind::NotFound => return Err(error.into()),
                _ => {}
            }
        }
        Ok(self.storage.sync(&self.folder)?)
    }

    /// Removes the disks that went with backups and that nothing that stays is built on. Returns whether none of them is left.
    fn remove_disks(
        &mut self,
        backups: &Backups,
        going: &[Arc<Backup>],
        note: &Note,
        lineages: &[ObjectPath],
    ) -> Result<bool> {
        let kept = self.names_of(backups, going);
        let went = going.iter().flat_map(|backup| disks_of(backup)).chain(note.disks.keys());
        let folders: BTreeSet<ObjectPath> = went.map(ObjectPath::parent).collect();
        let mut is_whole = true;
        for folder in folders.iter().filter(|folder| lineages.contains(folder)) {
            let unneeded = match Merge::lineage(&self.reader, folder, |path| kept.contains(path)) {
                Ok(lineage) => lineage.unneeded,
                Err(error) => {
                    self.done.problems.push((folder.clone(), error.to_string()));
                    is_whole = false;
                    continue;
                }
            };
            let mut unneeded = unneeded.iter().map(|name| folder.join(name)).collect::<storage::Result<Vec<_>>>()?;
            let there = self.reader.list(folder)?;
            // What an ingest left that died is removed by the next one.
            let intents = there.iter().filter_map(|entry| BackupTime::of_intent_name(&entry.name));
            let intents: Vec<String> = intents.map(|time| time.stored()).collect();
            let is_begun = |name: &ObjectPath| intents.iter().any(|time| name.file_name().starts_with(time));
            unneeded.retain(|name| note.disks.contains_key(name) || !is_begun(name));
            // What is built on it and did not go with it is nobody's, and for a repair to judge.
            if let Some(position) = unneeded.iter().position(|name| !note.disks.contains_key(name)) {
                let problem = (unneeded[position].clone(), "no backup names it: see xofs check".to_owned());
                self.done.problems.push(problem);
                is_whole = false;
                unneeded.truncate(position);
            }
            let noted: Vec<&ObjectPath> = note.disks.keys().filter(|name| name.parent() == *folder).collect();
            if noted.is_empty() {
                continue;
            }
            // Whoever wrote that is gone.
            for entry in there.iter().filter(|entry| entry.name.ends_with(UNPUBLISHED)) {
                self.lock.check()?;
                unless_gone(self.storage.remove(&folder.join(&entry.name)?))?;
            }
            // Of some only the name went the last time.
            let is_nameless = |name: &&ObjectPath| !there.iter().any(|entry| entry.name == name.file_name());
            for name in unneeded.iter().chain(noted.into_iter().filter(is_nameless)) {
                self.lock.check()?;
                match vhd::remove_image(&self.storage, name, &note.disks[name]) {
                    Err(error) if !matches!(error.kind(), vhd::ErrorKind::Unavailable | vhd::ErrorKind::Stale) => {
                        self.done.problems.push((name.clone(), error.to_string()));
                        is_whole = false;
                        // What it is built on would be missing to it.
                        break;
                    }
                    removed => removed.map_err(of_vhd)?,
                }
            }
            self.lock.check()?;
            remove_empty_lineage(&*self.storage, folder)?;
        }
        Ok(is_whole)
    }

    /// Returns the files of a full backup, its XVA and the checksum of this; nothing if the XVA is no file of its own.
    fn archive(&self, folder: &VmFolder, backup: &Backup) -> Result<Vec<ObjectPath>> {
        if backup.mode != Mode::Full {
            return Ok(Vec::new());
        }
        let metadata = folder.metadata(backup.time)?;
        let name = metadata.get("xva").and_then(|xva| serde_json::from_str::<String>(xva.get()).ok());
        let path = name.map(|name| self.folder.resolve(&name)).transpose()?;
        match path.filter(|path| path.parent() == self.folder && path.file_name().ends_with(".xva")) {
            Some(xva) => Ok(vec![self.folder.join(&format!("{}.checksum", xva.file_name()))?, xva]),
            None => Ok(Vec::new()),
        }
    }
}

/// Returns the folders of a VM's disks, `vdis/<job>/<vdi>` in its `folder`, sorted.
///
/// # Errors
/// What the storage says.
pub(crate) fn lineages(storage: &dyn Storage, folder: &ObjectPath) -> Result<Vec<ObjectPath>> {
    let mut folders = vec![folder.join("vdis")?];
    for _ in 0..2 {
        let mut below = Vec::new();
        for folder in folders {
            match storage.list(&folder) {
                Ok(entries) => {
                    for entry in entries.into_iter().filter(|entry| entry.is_directory) {
                        below.push(folder.join(&entry.name)?);
                    }
                }
                Err(error) if error.kind() == storage::ErrorKind::NotFound => {}
                Err(error) => return Err(error.into()),
            }
        }
        folders = below;
    }
    folders.sort();
    Ok(folders)
}

/// Returns the disks that a backup names.
pub(crate) fn disks_of(backup: &Backup) -> impl Iterator<Item = &ObjectPath> {
    backup.disks.iter().filter_map(|disk| match &disk.source {
        DiskSource::Vhd(path) => Some(path),
        DiskSource::Xva { .. } | DiskSource::Unusable(_) => None,
    })
}

fn immutable(path: &ObjectPath, what: &str) -> String {
    format!("'{path}': it is immutable (chattr +i), and can be {what} once that is lifted")
}

fn of_vhd(error: vhd::Error) -> Error {
    disk::Error::from(error).into()
}

fn lost(folder: &ObjectPath, error: &Error) -> vhd::Error {
    vhd::Error::new(vhd::ErrorKind::Unavailable, folder, error.to_string())
}
