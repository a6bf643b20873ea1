//! Steps 0 to 4 of exploded images: their blocks move by renaming their files.

use std::collections::BTreeSet;

use storage::{Mark, Moves, ObjectPath, Synced, WritableStorage, publish};

use super::tops::Tops;
use super::{Control, Image, Merge, Outcome, digests};
use crate::error::{Error, ErrorKind, Result};
use crate::exploded::Exploded;
use crate::footer::Footer;
use crate::geometry::BlockIndex;
use crate::header::Header;
use crate::layer::Body;

/// See [`super`].
pub(super) fn run(merge: &Merge, base: &Image, children: &[Image], control: &Control) -> Result<Outcome> {
    let storage = &*merge.storage;
    let target = children.last().expect("a merge has children");
    let tops = Tops::of(base, children);
    let header = widened(base, target);
    let begun = storage.mark()?;
    (control.barrier)()?;
    if let Some(header) = &header {
        write_table(storage, base, &Tops::of(base, &[]), header.max_table_entries)?;
        write(storage, base, "header", &header.to_bytes())?;
    }
    sync_held(merge, children, &begun)?;
    (control.barrier)()?;
    merge.begin(base, target)?;
    make_folders(storage, base, &tops)?;
    let moved =
        tops.each(control, |folders: &mut Folders, child, block| folders.take(storage, children, base, child, block))?;
    if moved == Outcome::Stopped {
        return Ok(Outcome::Stopped);
    }
    // The bytes of their files were durable before.
    let data: Vec<_> = std::iter::once(base).chain(children).map(|image| image.layer.data.clone()).collect();
    storage.sync_trees(&data, Synced::Names, &begun)?;
    // Where it was said to be gone and is not, an older one of the base would be taken for it.
    for (number, child) in children.iter().enumerate() {
        let left = Exploded::listed(&child.layer, &merge.reader)?;
        if let Some(block) = tops.held_by(number).find(|block| left.contains(block)) {
            let reason = "its file was said to be gone when it was to be moved, but is there: run it again";
            return Err(child.layer.block_error(ErrorKind::Unavailable, block, reason));
        }
    }
    let there = Exploded::listed(&base.layer, &merge.reader)?;
    if let Some(block) = tops.all().find(|block| !there.contains(block)) {
        return Err(base.layer.block_error(ErrorKind::Missing, block, "it was moved here, but its file is missing"));
    }
    (control.barrier)()?;
    digests::publish(merge, base, children, &tops)?;
    let entries = header.or_else(|| base.layer.header.clone()).map_or(0, |header| header.max_table_entries);
    write_table(storage, base, &tops, entries)?;
    let (old, new) = (base.layer.footer, target.layer.footer);
    let footer = Footer {
        uuid: new.uuid,
        original_size: new.original_size,
        current_size: new.current_size,
        chs: new.chs,
        timestamp: new.timestamp,
        ..old
    };
    write(storage, base, "footer", &footer.to_bytes())?;
    Ok(Outcome::Merged)
}

/// Makes durable what the children hold: a block whose name a power cut takes would pass for one that was moved.
fn sync_held(merge: &Merge, children: &[Image], begun: &Mark) -> Result<()> {
    let storage = &*merge.storage;
    match merge.reader.stat(&merge.state) {
        Err(error) if error.kind() == storage::ErrorKind::NotFound => {}
        // Whoever began it may have moved blocks that were not durable.
        other => return Ok(other.and_then(|_| storage.sync_tree(&merge.folder, begun))?),
    }
    let data: Vec<_> = children.iter().map(|child| child.layer.data.clone()).collect();
    storage.sync_trees(&data, Synced::All, begun)?;
    for child in children {
        storage.sync(&child.layer.data.parent())?;
        storage.sync(&child.layer.name)?;
    }
    Ok(storage.sync(&merge.folder)?)
}

/// Returns the header of a base whose table has no room for the target; XO would not make it, and lose the disk.
fn widened(base: &Image, target: &Image) -> Option<Header> {
    let header = base.layer.header.as_ref()?;
    let needed = u32::try_from(target.block_count()).expect("at most MAX_BLOCKS");
    (header.max_table_entries < needed).then(|| Header { max_table_entries: needed, ..header.clone() })
}

/// Writes the table: what the base holds and what was moved into it. As XO's it has a byte for each entry.
fn write_table(storage: &dyn WritableStorage, base: &Image, tops: &Tops, entries: u32) -> Result<()> {
    let entries = usize::try_from(entries).expect("a table fits in memory");
    let mut bits = vec![0; entries.max(base.block_count()).max(tops.len())];
    let mut hold = |block: usize| bits[block / 8] |= 0x80 >> (block % 8);
    // What lies past the end of a disk that shrank must not show when it grows again.
    base.map.each_held(base.block_count().min(tops.len()), |block, _| hold(block));
    tops.all().for_each(|block| hold(block.0 as usize));
    write(storage, base, "bat", &bits)
}

/// Replaces one of the base's structures.
fn write(storage: &dyn WritableStorage, base: &Image, name: &str, bytes: &[u8]) -> Result<()> {
    let Body::Exploded(exploded) = &base.layer.body else { unreachable!("the base is exploded") };
    Ok(publish(storage, &base.layer.data.join(name)?, &exploded.filter.encode(bytes))?)
}

/// Makes the folders that blocks are moved into. A block in a folder that a power cut takes would be lost.
fn make_folders(storage: &dyn WritableStorage, base: &Image, tops: &Tops) -> Result<()> {
    let parents: BTreeSet<u32> = tops.all().map(|block| block.0 / 1000).collect();
    if parents.is_empty() {
        return Ok(());
    }
    let blocks = base.layer.data.join("blocks")?;
    let make = |path: &ObjectPath| match storage.create_directory(path) {
        Err(error) if error.kind() != storage::ErrorKind::Exists => Err(Error::from(error)),
        _ => Ok(()),
    };
    make(&blocks)?;
    for parent in parents {
        make(&blocks.join(&parent.to_string())?)?;
    }
    // Also those that an attempt before this one made, and did not come to sync.
    storage.sync(&blocks)?;
    Ok(storage.sync(&base.layer.data)?)
}

/// A thousand blocks of a child, on their way to the base.
struct Folder<'a> {
    child: usize,
    number: u32,
    /// `None` if the child has no such folder: all in it were moved before.
    moves: Option<Box<dyn Moves + 'a>>,
}

/// Where a thread takes blocks from: blocks come ascending, from a few children in turn.
#[derive(Default)]
struct Folders<'a>(Vec<Folder<'a>>);

impl<'a> Folders<'a> {
    /// Folders that are kept open.
    const MOST: usize = 8;

    fn take(
        &mut self,
        storage: &'a dyn WritableStorage,
        children: &[Image],
        base: &Image,
        child: usize,
        block: BlockIndex,
    ) -> Result<()> {
        let number = block.0 / 1000;
        let known = self.0.iter().position(|folder| (folder.child, folder.number) == (child, number));
        let at = known.map_or_else(
            || {
                let folder = |data: &ObjectPath| data.resolve(&format!("blocks/{number}"));
                let from = folder(&children[child].layer.data)?;
                let moves = unless_gone(storage.moves(&from, &folder(&base.layer.data)?), block)?;
                if self.0.len() == Self::MOST {
                    self.0.remove(0);
                }
                self.0.push(Folder { child, number, moves });
                Ok::<_, Error>(self.0.len() - 1)
            },
            Ok,
        )?;
        match &self.0[at].moves {
            Some(moves) => unless_gone(moves.rename(&(block.0 % 1000).to_string()), block).map(drop),
            None => Ok(()),
        }
    }
}

/// What is not there was moved before; that all are there, and none stayed, is seen in the end.
fn unless_gone<T>(result: storage::Result<T>, block: BlockIndex) -> Result<Option<T>> {
    match result {
        Err(error) if error.kind() == storage::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(Error::from(error).in_block(block)),
        Ok(value) => Ok(Some(value)),
    }
}
