//! Merging expired images into the one that follows them, so that a chain gets shorter and nothing else changes.
//!
//! All are merged into the oldest, the *base*, which then takes the name of the youngest, the *target*: only the blocks that
//! changed are moved, and whatever is built on the target finds it under its name and uuid. Whoever merges holds the lock of
//! the VM, and has removed the metadata of all but the target before.
//!
//! ```text
//! 0  sync what the children hold; make room in the base's table if the disk grew
//! 1  publish the state file
//! 2  move each block that a child holds from the topmost one that holds it into the base; VHD files: copy it
//! 3  sync (of files that were renamed, their names); see that every such block is there, and none stayed behind
//! 4  publish the digests of the blocks, the base's table and header; then its footer, with the target's uuid and size; sync
//! 5  rename the base over the target: the commit; sync
//! 6  remove the other names, and the data that nobody names any more; sync
//! 7  the caller writes the metadata; then the state file goes
//! ```
//!
//! At any moment the target can be read ([`crate::chain`]), and XO's cleaner finishes what was begun. Recovery is the same
//! done again: each step asks what is there. What was complete when the state file was published is there for ever: a block
//! gone from its child has been moved. VHD files stay complete until the commit: their blocks are copied again.
//!
//! Images that do not fit each other so are merged by writing the target anew (`anew`).

mod anew;
mod blocks;
mod cleanup;
mod copies;
mod digests;
mod plan;
mod room;
mod tops;

use std::sync::Arc;

use storage::{ObjectPath, Storage, WritableStorage};

use crate::cache::BlockCache;
use crate::chain::{self, MERGE_STATE_LIMIT};
use crate::chain_disk::{self, ChainDisk, Context, Liveness};
use crate::error::{Error, ErrorKind, Result};
use crate::flat::Flat;
use crate::layer::{BlockMap, Body, Format, Layer};
use crate::merge_state::{self, MergeState, Step};
use crate::new_layer::equivalent_size;
use plan::Way;

/// How a merge is watched and held.
pub struct Control<'a> {
    /// Threads that move or copy blocks; at least one works.
    pub threads: usize,
    /// Called before each step that others would suffer from if the lock were lost; an error ends the merge.
    pub barrier: &'a (dyn Fn() -> Result<()> + Sync),
    /// Called with the number of blocks that were moved since the last time.
    pub moved: &'a (dyn Fn(u64) + Sync),
    /// Asked before each block; true ends the merge where it can be resumed.
    pub is_stopped: &'a (dyn Fn() -> bool + Sync),
}

/// How a merge ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// The target is the base, and the others are gone. The state file is still there ([`Merge::forget`]).
    Merged,
    /// It was stopped, and can be resumed.
    Stopped,
    /// The target had not been written anew to the end: what had been is gone, and all images are as they were. As for
    /// [`Outcome::Merged`] the state file is still there.
    Undone,
}

/// What the images in a folder are to each other.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Lineage {
    /// What can be merged, each as [`Merge::new`] takes it: images that are not kept, and the kept one that is built on them.
    pub chains: Vec<Vec<String>>,
    /// Images that are not kept and that nothing kept is built on, those built on others before these.
    pub unneeded: Vec<String>,
}

/// An image of the chain that is merged.
struct Image {
    layer: Layer,
    map: BlockMap,
}

/// What is left to be done.
enum Stage {
    /// Blocks are to be moved: oldest child first, the target last.
    Blocks { base: Box<Image>, children: Vec<Image> },
    /// The target is to be written anew.
    Anew { base: Box<Image>, children: Vec<Image>, journal: anew::Journal },
    /// What was written of the target is to go.
    Undo,
    /// All is in the base.
    Commit,
    /// The target is the base, or was written anew.
    Cleanup,
}

/// A merge that was found possible, or begun.
pub struct Merge {
    storage: Arc<dyn WritableStorage>,
    /// The same, to read.
    reader: Arc<dyn Storage>,
    /// The folder of the chain.
    folder: ObjectPath,
    /// File names in it, oldest first: the base, those in between, the target.
    chain: Vec<String>,
    /// What the names led to when it began, as far as known, and what is made in its stead: of which all goes that no name
    /// leads to in the end.
    data: Vec<ObjectPath>,
    /// The file that says what is under way.
    state: ObjectPath,
    stage: Stage,
}

impl Merge {
    /// Looks whether `chain`, file names in `folder` from the oldest to the target, can be merged. Changes nothing.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`] if another image is built on one that would go, they do not fit each other, or one is immutable;
    /// [`ErrorKind::Missing`] if a block that a table lists is not there; [`ErrorKind::Damaged`] if it is no chain, or a merge
    /// has begun in it; else what the storage says.
    pub fn new(storage: &Arc<dyn WritableStorage>, folder: &ObjectPath, chain: &[String]) -> Result<Self> {
        Self::new_once_gone(storage, folder, chain, |_| false)
    }

    /// The same, as if those images in the folder were gone of which `is_gone` says so: they have to be, before it is run.
    ///
    /// # Errors
    /// As for [`Merge::new`].
    pub fn new_once_gone(
        storage: &Arc<dyn WritableStorage>,
        folder: &ObjectPath,
        chain: &[String],
        is_gone: impl Fn(&str) -> bool,
    ) -> Result<Self> {
        let reader = storage.clone().reader();
        let mut entries = reader.list(folder)?;
        entries.retain(|entry| !is_gone(&entry.name));
        if let Some(entry) = entries.iter().find(|entry| is_state(&entry.name)) {
            let reason = "another merge has begun in its folder and has to be finished first";
            return Err(Error::new(ErrorKind::Damaged, &folder.join(&entry.name)?, reason));
        }
        let (base, children) = plan::images(&reader, folder, chain)?;
        plan::check_can_change(&**storage, folder, &base, &children)?;
        let way = plan::check(&reader, (folder, &entries), &base, &children, None)?;
        let mut data: Vec<_> = std::iter::once(&base).chain(&children).map(|image| image.layer.data.clone()).collect();
        let (stage, state) = match way {
            Way::InPlace => {
                let state = folder.join(&merge_state::name_of(&chain[0]))?;
                (Stage::Blocks { base: Box::new(base), children }, state)
            }
            Way::Anew => {
                let journal = anew::Journal::new(&*reader, folder, chain, &base, &children)?;
                data.push(plan::inside(folder, &journal.new)?);
                let state = folder.join(&anew::journal_of(&chain[chain.len() - 1]))?;
                (Stage::Anew { base: Box::new(base), children, journal }, state)
            }
        };
        let (storage, folder, chain) = (storage.clone(), folder.clone(), chain.to_vec());
        let merge = Self { storage, reader, folder, chain, data, state, stage };
        merge.check_room()?;
        if let Stage::Anew { base, children, .. } = &merge.stage {
            anew::check(&merge, base, children)?;
        }
        Ok(merge)
    }

    /// Looks what the images in `folder` are to each other, where `is_kept` says which of them a backup names.
    ///
    /// # Errors
    /// Whatever keeps one of the images from being opened: it might be built on another. [`ErrorKind::Damaged`] if two have
    /// one uuid, or are built on each other, or if what a needed one is built on is not in `folder` by its uuid, or is another by
    /// its name.
    pub fn lineage(
        reader: &Arc<dyn Storage>,
        folder: &ObjectPath,
        is_kept: impl Fn(&ObjectPath) -> bool,
    ) -> Result<Lineage> {
        plan::lineage(reader, folder, is_kept)
    }

    /// Returns the merges that have begun in `folder` and not ended, XO's too, as [`Merge::resume`] takes them.
    ///
    /// # Errors
    /// What the storage says.
    pub fn unfinished(reader: &dyn Storage, folder: &ObjectPath) -> Result<Vec<ObjectPath>> {
        let mut states = Vec::new();
        for entry in reader.list(folder)? {
            if is_state(&entry.name) {
                states.push(folder.join(&entry.name)?);
            }
        }
        states.sort();
        Ok(states)
    }

    /// Takes up the merge of a state file, ours or XO's of any version, where it ended; one that can only begin anew is undone
    /// by [`Merge::run`]. Changes nothing yet.
    ///
    /// # Errors
    /// [`ErrorKind::Damaged`] if the file cannot be read, or what is there contradicts it; else as for [`Merge::new`]. Never is
    /// a state that is not understood taken for the beginning of a merge.
    pub fn resume(storage: &Arc<dyn WritableStorage>, state: &ObjectPath) -> Result<Self> {
        if anew::is_journal(state.file_name()) {
            return Self::resume_anew(storage, state);
        }
        let reader = storage.clone().reader();
        let folder = state.parent();
        let damaged = |reason: String| Error::new(ErrorKind::Damaged, state, reason);
        let found = MergeState::parse(&reader.read(state, MERGE_STATE_LIMIT)?).map_err(|error| error.at(state))?;
        let base = merge_state::parent_of(state.file_name()).unwrap_or_default();
        let chain = match found.chain.as_slice() {
            [] => chain::old_chain(&reader, &folder, base)?,
            _ => found.chain.clone(),
        };
        if chain.len() < 2 || chain[0] != base {
            return Err(damaged(format!("a chain from '{base}' to a younger disk was expected in it")));
        }
        Self::go_on(storage, state, &found, chain)
    }

    /// Takes up a merge whose state file was being written when its writer ended, and says nothing: `chain` is what it must have
    /// been of, file names from the base to the target. Changes nothing yet.
    ///
    /// No block is taken for moved unless it is where it would be then.
    ///
    /// # Errors
    /// As for [`Merge::resume`]; [`ErrorKind::Damaged`] if the file says something.
    pub fn resume_unsaid(storage: &Arc<dyn WritableStorage>, state: &ObjectPath, chain: Vec<String>) -> Result<Self> {
        let reader = storage.clone().reader();
        let damaged = |reason: &str| Error::new(ErrorKind::Damaged, state, reason);
        if reader.stat(state)?.size != 0 {
            return Err(damaged("an empty file was expected, of which nothing was written"));
        }
        if chain.len() < 2 || Some(chain[0].as_str()) != merge_state::parent_of(state.file_name()) {
            return Err(damaged("a chain from the disk in its name to a younger one was expected"));
        }
        let target = Image::open(&reader, &state.parent().join(&chain[chain.len() - 1])?)?;
        let child_uuid = Some(target.layer.footer.uuid);
        let (current_block, step, parent_uuid, data) = (0, Step::MergeBlocks, None, None);
        let unsaid = MergeState { chain: chain.clone(), current_block, step, child_uuid, parent_uuid, data };
        Self::go_on(storage, state, &unsaid, chain)
    }

    /// Goes on with what a state file says.
    fn go_on(
        storage: &Arc<dyn WritableStorage>,
        state: &ObjectPath,
        found: &MergeState,
        chain: Vec<String>,
    ) -> Result<Self> {
        let (reader, folder) = (storage.clone().reader(), state.parent());
        let data = match &found.data {
            Some(data) => data.iter().map(|data| plan::inside(&folder, data)).collect::<Result<_>>()?,
            None => plan::data_of_names(&reader, &folder, &chain)?,
        };
        let stage = plan::stage(&reader, &folder, &chain, found, state)?;
        if let Stage::Blocks { base, children } = &stage {
            plan::check(&reader, (&folder, &reader.list(&folder)?), base, children, Some(found))?;
        }
        Ok(Self { storage: storage.clone(), reader, folder, chain, data, state: state.clone(), stage })
    }

    /// Takes up a merge that writes the target anew. Where it came to no end, the chain may have been changed since by others, and
    /// is for [`Merge::new`] to look at again.
    fn resume_anew(storage: &Arc<dyn WritableStorage>, state: &ObjectPath) -> Result<Self> {
        let reader = storage.clone().reader();
        let folder = state.parent();
        let journal = anew::Journal::read(&*reader, state)?;
        let chain = journal.chain.clone();
        let names = journal.data.iter().chain([&journal.new]);
        let data = names.map(|data| plan::inside(&folder, data)).collect::<Result<_>>()?;
        let target = Image::open(&reader, &folder.join(&chain[chain.len() - 1])?)?;
        let stage = if journal.is_committed(&target) { Stage::Cleanup } else { Stage::Undo };
        Ok(Self { storage: storage.clone(), reader, folder, chain, data, state: state.clone(), stage })
    }

    /// Returns how many blocks are to be moved or written at most.
    #[must_use]
    pub fn blocks(&self) -> u64 {
        match &self.stage {
            Stage::Blocks { base, children } => tops::Tops::of(base, children).count(),
            // That it cannot be told is said by the merge.
            Stage::Anew { base, children, .. } => {
                anew::needed(&self.reader, base, children).map_or(0, |needed| needed.count())
            }
            Stage::Undo | Stage::Commit | Stage::Cleanup => 0,
        }
    }

    /// Refuses to copy what there is no room for; where nobody says what there is, or how small a block will be, that is seen
    /// then.
    fn check_room(&self) -> Result<()> {
        let needed = match &self.stage {
            Stage::Blocks { base, children } => copies::room(base, children),
            _ => 0,
        };
        if needed == 0 {
            return Ok(());
        }
        match self.storage.room() {
            Ok(room) if needed > room.bytes => {
                let reason = format!(
                    "too little room: about {} MiB are copied to merge it, and {} MiB are free; make room",
                    needed.div_ceil(1 << 20),
                    room.bytes >> 20
                );
                Err(Error::new(ErrorKind::Unavailable, &self.target(), reason))
            }
            _ => Ok(()),
        }
    }

    /// Returns the name of the target, by which its backup knows it.
    #[must_use]
    pub fn target(&self) -> ObjectPath {
        self.path(self.chain.last().expect("a chain of two or more"))
    }

    /// Returns the names of the images that are to go into the target, oldest first, and what they lead to.
    pub fn sources(&self) -> impl Iterator<Item = (ObjectPath, &ObjectPath)> {
        self.chain[..self.chain.len() - 1].iter().map(|name| self.path(name)).zip(&self.data)
    }

    /// Opens the target as a disk, which its backup keeps alive.
    fn open_target(&self) -> Result<ChainDisk> {
        let context = Context { storage: self.reader.clone(), cache: BlockCache::new(0) };
        chain_disk::open(&context, &self.target(), Some(Arc::new(Kept)))
    }

    fn path(&self, name: &str) -> ObjectPath {
        self.folder.join(name).expect("names of the chain are names in its folder")
    }

    /// Does what can be done while the backups of all images are still there, and they can be read: writes the target anew, if
    /// it is to be. Xen Orchestra would destroy such a chain as soon as one of them is gone.
    ///
    /// # Errors
    /// As for [`Merge::run`].
    pub fn prepare(&mut self, control: &Control) -> Result<Outcome> {
        if let Stage::Anew { base, children, journal } = &self.stage {
            if anew::run(self, base, children, journal, control)? == Outcome::Stopped {
                return Ok(Outcome::Stopped);
            }
            self.stage = Stage::Cleanup;
        }
        Ok(Outcome::Merged)
    }

    /// Leaves those images as they are that are kept, and what they are built on, if the target was written anew: they are not
    /// needed for it. What blocks were moved out of can only be merged.
    pub fn keep(&mut self, is_kept: impl Fn(&ObjectPath) -> bool) {
        if anew::is_journal(self.state.file_name()) {
            let sources = &self.chain[..self.chain.len() - 1];
            let kept = sources.iter().rposition(|name| is_kept(&self.path(name)));
            self.chain.drain(..kept.map_or(0, |kept| kept + 1));
        }
    }

    /// Merges, or goes on with it, until the target is the base and all else is gone.
    ///
    /// # Errors
    /// What the storage or the barrier says. Nothing is lost then, the target can be read, and the merge be resumed.
    pub fn run(&mut self, control: &Control) -> Result<Outcome> {
        if matches!(self.stage, Stage::Undo | Stage::Cleanup) {
            // What an attempt before this one removed is not looked for again, and must not come back.
            self.storage.sync(&self.folder)?;
        }
        if let Stage::Blocks { base, children } = &self.stage {
            let merge_blocks = match base.layer.format() {
                Format::File => copies::run,
                Format::Exploded(_) => blocks::run,
            };
            if merge_blocks(self, base, children, control)? == Outcome::Stopped {
                return Ok(Outcome::Stopped);
            }
        }
        if let Stage::Undo = self.stage {
            (control.barrier)()?;
            cleanup::remove_unnamed(self, &self.reader.list(&self.folder)?, control)?;
            return Ok(Outcome::Undone);
        }
        if self.prepare(control)? == Outcome::Stopped {
            return Ok(Outcome::Stopped);
        }
        if matches!(self.stage, Stage::Blocks { .. } | Stage::Commit) {
            (control.barrier)()?;
            let (base, target) = (self.path(&self.chain[0]), self.target());
            if let Stage::Commit = self.stage {
                let image = Image::open(&self.reader, &base)?;
                if image.layer.format() == Format::File {
                    copies::seal(&*self.storage, &image)?;
                }
            }
            storage::publish_rename(&*self.storage, &base, &target)?;
        }
        cleanup::run(self, control)?;
        Ok(Outcome::Merged)
    }

    /// Removes the state file, once the metadata of the target says what it is now.
    ///
    /// # Errors
    /// What the storage says.
    pub fn forget(&self) -> Result<()> {
        match self.storage.remove(&self.state) {
            Err(error) if error.kind() != storage::ErrorKind::NotFound => return Err(error.into()),
            _ => {}
        }
        Ok(self.storage.sync(&self.folder)?)
    }

    /// Publishes the state file, unless one of ours is there already.
    fn begin(&self, base: &Image, target: &Image) -> Result<()> {
        let relative =
            |data: &ObjectPath| data.as_str()[self.folder.as_str().len()..].trim_start_matches('/').to_owned();
        let state = MergeState {
            chain: self.chain.clone(),
            current_block: 0,
            step: Step::MergeBlocks,
            child_uuid: Some(target.layer.footer.uuid),
            parent_uuid: Some(base.layer.footer.uuid),
            data: Some(self.data.iter().map(relative).collect()),
        };
        Ok(storage::publish(&*self.storage, &self.state, &state.to_json())?)
    }
}

/// Whether a file of this name says that a merge is under way, ours or XO's.
fn is_state(name: &str) -> bool {
    merge_state::parent_of(name).is_some() || anew::is_journal(name)
}

/// Says of the target what holds while it is merged: its backup is there.
struct Kept;

impl Liveness for Kept {
    fn is_alive(&self) -> storage::Result<bool> {
        Ok(true)
    }
}

impl Image {
    fn open(reader: &Arc<dyn Storage>, name: &ObjectPath) -> Result<Self> {
        // Nothing of it is read but its structures.
        let layer = chain::open(reader, &BlockCache::new(0), name)?;
        let map = layer.map(reader)?;
        Ok(Self { layer, map })
    }

    /// Returns the VHD file that it is.
    fn flat(&self) -> &Flat {
        let Body::Flat(flat) = &self.layer.body else { unreachable!("only VHD files are merged by copying") };
        flat
    }

    fn block_count(&self) -> usize {
        usize::try_from(self.layer.block_count()).expect("at most MAX_BLOCKS")
    }
}

/// Removes an image that nothing is built on and that no backup names: its name first, then the `data` it led to, unless
/// another name there leads to it. Either may be gone already.
///
/// # Errors
/// [`ErrorKind::Escape`] if the data is not in the folder of the name; else what the storage says.
pub fn remove_image(storage: &Arc<dyn WritableStorage>, name: &ObjectPath, data: &ObjectPath) -> Result<()> {
    cleanup::remove_image(storage, name, data)
}

/// What the metadata of a backup says of a disk's own image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ImageSummary {
    /// The size of an equivalent VHD file, in bytes, as XO counts it.
    pub size: u64,
    /// Whether it is built on another.
    pub is_differencing: bool,
}

impl ImageSummary {
    /// Looks at the image called `name`.
    ///
    /// # Errors
    /// If it cannot be opened.
    pub fn of(reader: &Arc<dyn Storage>, name: &ObjectPath) -> Result<Self> {
        let image = Image::open(reader, name)?;
        let mut blocks = 0;
        image.map.each_held(image.block_count(), |_, _| blocks += 1);
        let entries = image.layer.header.as_ref().map_or(0, |header| header.max_table_entries);
        let is_differencing = image.layer.parent_uuid().is_some();
        Ok(Self { size: equivalent_size(image.layer.block_size, entries, blocks), is_differencing })
    }
}
