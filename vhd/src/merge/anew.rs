//! Merging what cannot be merged in place: the target is written anew and takes its own name again.
//!
//! So are merged images that are stored in different ways, disks that shrank and grew again or grew from within a block, and
//! fixed disks. It costs as much as the whole disk, once: what comes out is stored as the target is.
//!
//! ```text
//! 0  publish the journal, `.<target>.xofs-merge.json`: it says where the new image will be
//! 1  write that: each block that one of the images holds, as the target reads it; sync
//! 2  the target's name leads to it: the commit; sync
//! 3  remove the other names, and all data that nobody names any more
//! ```
//!
//! Until the commit the chain is as it was, and nothing leads to what is written. Then nothing is built on the others any more.
//! XO, which knows nothing of the journal, destroys chains that are stored in different ways when it merges them, and merges what
//! no backup names. So the metadata of the backups that go is there until the commit ([`Merge::prepare`]), and then XO is right at
//! any point.

use std::sync::Arc;
use std::thread;

use disk::Disk;
use serde::{Deserialize, Serialize};
use storage::{ObjectPath, Storage, WritableStorage, publish_rename, remove_tree};
use uuid::Uuid;

use super::tops::Tops;
use super::{Control, Image, Merge, Outcome, plan};
use crate::alias;
use crate::alias_writer::write_alias;
use crate::block_sink::{BlockSink, create_layer};
use crate::chain::{self, MERGE_STATE_LIMIT};
use crate::chain_disk::ChainDisk;
use crate::digest::Digest;
use crate::error::{Error, ErrorKind, Result};
use crate::flat_writer::FlatWriter;
use crate::new_layer::NewLayer;
use crate::whole_block::{BlockMemory, WholeBlock};

/// The end of the journal's name.
const SUFFIX: &str = ".xofs-merge.json";
/// What is written in it, and how.
const VERSION: u64 = 1;

/// What is written anew, and what is to go then. Names are relative to the folder of the chain.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Journal {
    version: u64,
    /// The names of the images, oldest first, the target last.
    pub(super) chain: Vec<String>,
    /// What they led to.
    pub(super) data: Vec<String>,
    /// The new image: what the target's alias will lead to, or a VHD file that will be renamed.
    pub(super) new: String,
    /// What the target will be built on. Until then it is built on a member of the chain.
    parent: Option<Uuid>,
}

/// Returns the name of the journal of a merge into `target`.
pub(super) fn journal_of(target: &str) -> String {
    format!(".{target}{SUFFIX}")
}

/// Whether a file of this name is the journal of a merge.
pub(super) fn is_journal(name: &str) -> bool {
    name.len() > SUFFIX.len() + 1 && name.starts_with('.') && name.ends_with(SUFFIX)
}

impl Journal {
    /// Plans to write the target anew.
    pub(super) fn new(
        reader: &dyn Storage,
        folder: &ObjectPath,
        chain: &[String],
        base: &Image,
        children: &[Image],
    ) -> Result<Self> {
        let target = children.last().expect("a merge has children");
        let name = target.layer.name.file_name();
        let new = if alias::is_alias(name) {
            let data = target.layer.data.parent();
            let taken = reader.list(&data)?;
            let stem = name.strip_suffix(".alias.vhd").unwrap_or(name);
            let is_free = |name: &String| taken.iter().all(|entry| entry.name != *name);
            let free = (1..).map(|number| format!("{stem}-{number}.vhd")).find(is_free);
            relative(folder, &data.join(&free.expect("a folder holds fewer names than there are numbers"))?)
        } else {
            FlatWriter::unpublished(&target.layer.name)?.file_name().to_owned()
        };
        let data = std::iter::once(base).chain(children).map(|image| relative(folder, &image.layer.data)).collect();
        Ok(Self { version: VERSION, chain: chain.to_vec(), data, new, parent: base.layer.parent_uuid() })
    }

    /// Reads one.
    pub(super) fn read(reader: &dyn Storage, path: &ObjectPath) -> Result<Self> {
        let damaged = |reason: String| Error::new(ErrorKind::Damaged, path, reason);
        let journal: Self = serde_json::from_slice(&reader.read(path, MERGE_STATE_LIMIT)?)
            .map_err(|error| damaged(format!("the journal of a merge was expected: {error}")))?;
        if journal.version != VERSION {
            let reason = "the merge was begun by a later version, which is to finish it";
            return Err(Error::new(ErrorKind::Unsupported, path, reason));
        }
        let target = journal.chain.last().map(|target| journal_of(target));
        if journal.chain.len() < 2 || target.as_deref() != Some(path.file_name()) {
            return Err(damaged("a chain that ends with the disk of its name was expected in it".to_owned()));
        }
        Ok(journal)
    }

    /// Whether the target leads to the new image, `target` being what it leads to.
    pub(super) fn is_committed(&self, target: &Image) -> bool {
        target.layer.parent_uuid() == self.parent
    }
}

fn relative(folder: &ObjectPath, path: &ObjectPath) -> String {
    path.as_str()[folder.as_str().len()..].trim_start_matches('/').to_owned()
}

/// Refuses what [`run`] could not do.
pub(super) fn check(merge: &Merge, base: &Image, children: &[Image]) -> Result<()> {
    let layer = new_layer(merge, base, children)?;
    if !alias::is_alias(merge.target().file_name()) {
        FlatWriter::check_size(&merge.target(), &layer)?;
    }
    merge.open_target().map(drop)
}

/// See [`self`].
pub(super) fn run(
    merge: &Merge,
    base: &Image,
    children: &[Image],
    journal: &Journal,
    control: &Control,
) -> Result<Outcome> {
    let storage = &merge.storage;
    let (target, new) = (merge.target(), plan::inside(&merge.folder, &journal.new)?);
    let layer = new_layer(merge, base, children)?;
    let disk = merge.open_target()?;
    (control.barrier)()?;
    let bytes = serde_json::to_vec(journal).expect("names and numbers can be written");
    storage::publish(&**storage, &merge.state, &bytes)?;
    // What an attempt before this one left.
    remove_tree(&**storage, &new)?;
    let sink = begin(storage, &target, &new, children, layer.clone())?;
    let written = write(merge, base, children, &layer, &disk, &*sink, control);
    if !matches!(written, Ok(Outcome::Merged)) {
        // Once it is gone, nothing has begun; else the next attempt removes it.
        sink.discard()?;
        merge.forget()?;
        return written;
    }
    sink.finish()?;
    (control.barrier)()?;
    if alias::is_alias(target.file_name()) {
        write_alias(&**storage, &target, &new)?;
    } else {
        publish_rename(&**storage, &new, &target)?;
    }
    Ok(Outcome::Merged)
}

/// Describes the target, built on what the base is built on.
fn new_layer(merge: &Merge, base: &Image, children: &[Image]) -> Result<NewLayer> {
    let target = &children.last().expect("a merge has children").layer;
    let describe = || {
        let layer = NewLayer::new(target.footer.uuid, target.virtual_size(), target.footer.timestamp)?;
        layer.with_block_size(target.block_size)
    };
    let layer = describe().map_err(|error| error.at(&target.name))?;
    let Some(parent) = chain::parent_of(&merge.reader, &base.layer)? else { return Ok(layer) };
    if parent.name.parent() != merge.folder {
        let reason = format!("its parent '{}' is in another folder, from where no image is named anew", parent.name);
        return Err(Error::new(ErrorKind::Unsupported, &base.layer.name, reason));
    }
    layer.child_of(parent.footer.uuid, parent.name.file_name()).map_err(|error| error.at(&parent.name))
}

fn begin(
    storage: &Arc<dyn WritableStorage>,
    target: &ObjectPath,
    new: &ObjectPath,
    children: &[Image],
    layer: NewLayer,
) -> Result<Box<dyn BlockSink>> {
    if alias::is_alias(target.file_name()) {
        let format = children.last().expect("a merge has children").layer.format();
        return create_layer(storage.clone(), format, new.clone(), layer);
    }
    Ok(Box::new(FlatWriter::create_unpublished(storage.clone(), target, layer)?))
}

/// Which blocks are written: those that an image holds; and those that show what lies below the base where all of it is
/// hidden, because an image is too small to have them.
pub(super) fn needed(reader: &Arc<dyn Storage>, base: &Image, children: &[Image]) -> Result<Tops> {
    let images = || std::iter::once(base).chain(children);
    let target = children.last().expect("a merge has children");
    let mut needed = vec![false; target.block_count()];
    for image in images() {
        image.map.each_held(needed.len().min(image.block_count()), |block, _| needed[block] = true);
    }
    let smallest = images().map(|image| image.layer.virtual_size()).min().unwrap_or(0);
    if chain::parent_of(reader, &base.layer)?.is_some_and(|parent| parent.virtual_size() > smallest) {
        let first = usize::try_from(smallest / target.layer.block_size.bytes()).expect("at most MAX_BLOCKS");
        needed.iter_mut().skip(first).for_each(|needed| *needed = true);
    }
    Ok(Tops::marked(&needed))
}

fn write(
    merge: &Merge,
    base: &Image,
    children: &[Image],
    layer: &NewLayer,
    disk: &ChainDisk,
    sink: &dyn BlockSink,
    control: &Control,
) -> Result<Outcome> {
    let target = merge.target();
    let is_root = base.layer.parent_uuid().is_none();
    // Encoding takes longer than moving.
    let cores = thread::available_parallelism().map_or(1, usize::from);
    let Control { barrier, moved, is_stopped, .. } = *control;
    let control = Control { threads: control.threads.max(cores), barrier, moved, is_stopped };
    needed(&merge.reader, base, children)?.each(&control, |(), _, block| {
        let start = u64::from(block.0) * layer.block_size().bytes();
        let len = usize::try_from(disk.size() - start).unwrap_or(usize::MAX).min(layer.block_size().len());
        let mut memory = BlockMemory::new(Vec::new(), layer.block_size(), len);
        disk.read_at(start, memory.data())
            .map_err(|error| Error::new(ErrorKind::Unavailable, &target, error.to_string()).in_block(block))?;
        if is_root && memory.data().iter().all(|byte| *byte == 0) {
            // Absent, it reads as that.
            return Ok(());
        }
        let whole = Arc::new(WholeBlock::new(memory));
        let encoded = layer.encode(sink.format(), block, &whole).map_err(|error| error.at(&target))?;
        sink.store(&encoded.with_digest(Digest::of(whole.data(), layer.block_size())))
    })
}
