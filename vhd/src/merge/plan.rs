//! What may be merged, and where a merge stands.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::sync::Arc;

use storage::{Entry, ObjectPath, Storage, WritableStorage};
use uuid::Uuid;

use super::tops::Tops;
use super::{Image, Lineage, Stage, room};
use crate::alias;
use crate::at_once;
use crate::chain;
use crate::error::{Error, ErrorKind, Result};
use crate::exploded::{Exploded, is_lost};
use crate::geometry::{BlockIndex, FileSector};
use crate::layer::{Body, Layer};
use crate::links::Links;
use crate::merge_state::{MergeState, Step};

/// The images of a folder, each with its name.
type Images = BTreeMap<Uuid, (ObjectPath, Links)>;

/// Finds the runs of images that are not kept, each with the kept one that is built on them, and those nothing kept needs.
pub(super) fn lineage(
    reader: &Arc<dyn Storage>,
    folder: &ObjectPath,
    is_kept: impl Fn(&ObjectPath) -> bool,
) -> Result<Lineage> {
    let mut images = Images::new();
    let paths = images_of(folder, &reader.list(folder)?)?;
    for (path, links) in paths.iter().zip(Links::of_each(reader, &paths)) {
        let links = links?;
        let uuid = links.uuid;
        if let Some((other, _)) = images.insert(uuid, (path.clone(), links)) {
            let reason = format!("it has the uuid of '{other}', {uuid}: nobody can say which is meant");
            return Err(Error::new(ErrorKind::Damaged, path, reason));
        }
    }
    let mut chains = Vec::new();
    let mut needed: HashSet<Uuid> = HashSet::new();
    for image in images.values().filter(|(path, _)| is_kept(path)) {
        needed.insert(image.1.uuid);
        let mut chain = vec![image.0.file_name().to_owned()];
        let mut next = parent(&images, image)?;
        while let Some(image) = next.filter(|(path, _)| !is_kept(path)) {
            let (path, links) = image;
            if chain.len() > images.len() {
                return Err(Error::new(ErrorKind::Damaged, path, "its parents form a loop: it is its own ancestor"));
            }
            needed.insert(links.uuid);
            chain.push(path.file_name().to_owned());
            next = parent(&images, image)?;
        }
        if chain.len() > 1 {
            chain.reverse();
            chains.push(chain);
        }
    }
    chains.sort();
    Ok(Lineage { chains, unneeded: unneeded(&images, &needed) })
}

/// Returns what an image is built on. Others find it by its name and may not look at its uuid, as XO when it restores: where the
/// two do not lead to one image of the folder, either may be needed.
fn parent<'i>(images: &'i Images, (path, links): &(ObjectPath, Links)) -> Result<Option<&'i (ObjectPath, Links)>> {
    let Some(uuid) = links.parent else { return Ok(None) };
    let Some(parent) = images.get(&uuid) else {
        let called = links.parent_name.as_ref().map_or(String::new(), |name| format!(", called '{name}',"));
        let reason =
            format!("a parent with uuid {uuid}{called} was expected in its folder: nobody knows what it is built on");
        return Err(Error::new(ErrorKind::Damaged, path, reason));
    };
    let named = images.values().map(|(path, _)| path).find(|path| links.parent_name.as_ref() == Some(*path));
    if let Some(named) = named.filter(|named| **named != parent.0) {
        let reason = format!(
            "it is built on '{}' by the uuid of its parent, on '{named}' by the name: nobody can say which is meant",
            parent.0
        );
        return Err(Error::new(ErrorKind::Damaged, path, reason));
    }
    Ok(Some(parent))
}

/// Returns the names of the images that are not needed, each after those that are built on it.
fn unneeded(images: &Images, needed: &HashSet<Uuid>) -> Vec<String> {
    // What is built on itself is as deep as anything can be.
    let depth = |uuid: &Uuid| {
        let mut parent = images[uuid].1.parent;
        (0..images.len()).take_while(move |_| {
            let is_built_on = parent.is_some();
            parent = parent.and_then(|parent| images.get(&parent)?.1.parent);
            is_built_on
        })
    };
    let mut left: Vec<_> = images.iter().filter(|(uuid, _)| !needed.contains(uuid)).collect();
    left.sort_by_key(|(uuid, (path, _))| (std::cmp::Reverse(depth(uuid).count()), path));
    left.into_iter().map(|(_, (path, _))| path.file_name().to_owned()).collect()
}

/// Returns the names of the images among the entries of a folder.
pub(super) fn images_of(folder: &ObjectPath, entries: &[Entry]) -> Result<Vec<ObjectPath>> {
    let is_image = |entry: &&Entry| entry.name.ends_with(".vhd") && !entry.name.starts_with('.') && !entry.is_directory;
    Ok(entries.iter().filter(is_image).map(|entry| folder.join(&entry.name)).collect::<storage::Result<_>>()?)
}

/// Opens the images of a chain: the base, and its children, oldest first.
pub(super) fn images(reader: &Arc<dyn Storage>, folder: &ObjectPath, chain: &[String]) -> Result<(Image, Vec<Image>)> {
    let names = chain.iter().map(|name| folder.join(name)).collect::<storage::Result<Vec<_>>>()?;
    let images = at_once::each(reader.capabilities(), &names, |name| Image::open(reader, name));
    let mut images = images.into_iter().collect::<Result<Vec<_>>>()?;
    let children = images.split_off(1.min(images.len()));
    match images.pop() {
        Some(mut base) if !children.is_empty() && base.layer.header.is_none() => {
            // A fixed disk has no blocks of its own and takes those of its child.
            base.layer.block_size = children[0].layer.block_size;
            Layer::check_size(&base.layer.data, &base.layer.footer, base.layer.block_size)?;
            Ok((base, children))
        }
        Some(base) if !children.is_empty() => Ok((base, children)),
        _ => Err(Error::new(ErrorKind::Unsupported, folder, "two or more images are needed to be merged")),
    }
}

/// Looks that no image is immutable: each of them is changed, loses its blocks or its name, or goes.
pub(super) fn check_can_change(
    storage: &dyn WritableStorage,
    folder: &ObjectPath,
    base: &Image,
    children: &[Image],
) -> Result<()> {
    let images = std::iter::once(base).chain(children).flat_map(|image| [&image.layer.name, &image.layer.data]);
    let paths: BTreeSet<&ObjectPath> = std::iter::once(folder).chain(images).collect();
    for path in paths {
        if storage.is_immutable(path)? {
            let reason = "it is immutable (chattr +i), and can be merged once that is lifted";
            return Err(Error::new(ErrorKind::Unsupported, path, reason));
        }
    }
    Ok(())
}

/// Says where the merge of a state file stands, by what is there.
pub(super) fn stage(
    reader: &Arc<dyn Storage>,
    folder: &ObjectPath,
    chain: &[String],
    state: &MergeState,
    path: &ObjectPath,
) -> Result<Stage> {
    let (base, target) = (folder.join(&chain[0])?, folder.join(&chain[chain.len() - 1])?);
    let base_data = data_of(reader, &base)?;
    let target_data = data_of(reader, &target)?;
    let Some(base_data) = base_data else {
        return match target_data {
            // Opened, to be sure that it is there.
            Some(_) => Image::open(reader, &target).map(|_| Stage::Cleanup),
            None => {
                let reason = "neither the disk that was merged into nor the target is there; nothing is removed";
                Err(Error::new(ErrorKind::Damaged, path, reason))
            }
        };
    };
    if target_data.as_ref() == Some(&base_data) {
        return Ok(Stage::Commit);
    }
    // XO removes the children, the target with them, before the base has its name; only then does its state say so.
    let is_after_blocks = target_data.is_none() || state.step == Step::Cleanup;
    if !is_after_blocks {
        let (base, children) = images(reader, folder, chain)?;
        return Ok(Stage::Blocks { base: Box::new(base), children });
    }
    let base = Image::open(reader, &base)?;
    let target_uuid = match (state.child_uuid, target_data) {
        (None, Some(_)) => Some(Image::open(reader, &target)?.layer.footer.uuid),
        (uuid, _) => uuid,
    };
    if target_uuid != Some(base.layer.footer.uuid) {
        let reason = format!(
            "all is said to be in '{}', but this has the uuid {} and not the target's; nothing is removed",
            base.layer.data, base.layer.footer.uuid
        );
        return Err(Error::new(ErrorKind::Damaged, path, reason));
    }
    check_blocks(reader, &base, &[], None)?;
    Ok(Stage::Commit)
}

/// How images are merged.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Way {
    /// Their blocks go into the base.
    InPlace,
    /// The target is written anew.
    Anew,
}

/// Refuses what cannot be merged, or where the result would not be what the target is; else says how it is merged. `entries`
/// are those of the folder.
pub(super) fn check(
    reader: &Arc<dyn Storage>,
    (folder, entries): (&ObjectPath, &[Entry]),
    base: &Image,
    children: &[Image],
    state: Option<&MergeState>,
) -> Result<Way> {
    check_links(base, children, state)?;
    let hindrance = hindrance(reader, base, children)?;
    check_branches(reader, &images_of(folder, entries)?, base, children)?;
    match hindrance {
        None => {
            check_file(base, children)?;
            check_blocks(reader, base, children, state)?;
            Ok(Way::InPlace)
        }
        Some(reason) if state.is_some() => {
            let reason =
                format!("{reason}; such a merge is begun by Xen Orchestra alone, and has to be finished by it");
            Err(unsupported(base, &reason))
        }
        Some(_) => {
            check_names(children)?;
            std::iter::once(base).chain(children).try_for_each(|image| check_image(reader, image))?;
            Ok(Way::Anew)
        }
    }
}

/// Says why blocks cannot be moved into the base as they are, if so.
fn hindrance(reader: &Arc<dyn Storage>, base: &Image, children: &[Image]) -> Result<Option<String>> {
    let is_behind_alias = |image: &Image| alias::is_alias(image.layer.name.file_name());
    let is_other =
        |child: &&Image| child.layer.format() != base.layer.format() || is_behind_alias(child) != is_behind_alias(base);
    if let Some(child) = children.iter().find(is_other) {
        return Ok(Some(format!("'{}' is stored in another way", child.layer.name)));
    }
    if base.layer.header.is_none() {
        return Ok(Some("it is a fixed disk, which has no table that blocks could be merged into".to_owned()));
    }
    unlike_sizes(reader, base, children)
}

/// Each child must name the image before it as its parent.
fn check_links(base: &Image, children: &[Image], state: Option<&MergeState>) -> Result<()> {
    let target = children.last().expect("a merge has children");
    let mut parent = base;
    for child in children {
        let (expected, found) = (child.layer.parent_uuid(), parent.layer.footer.uuid);
        // A base of which the footer was published already has the target's uuid.
        let is_renamed = state.is_some() && std::ptr::eq(parent, base) && found == target.layer.footer.uuid;
        if expected != Some(found) && !is_renamed {
            let expected = expected.map_or("none".to_owned(), |uuid| uuid.to_string());
            let reason = format!("a parent with uuid {expected} was expected, '{}' has {found}", parent.layer.name);
            return Err(Error::new(ErrorKind::Damaged, &child.layer.name, reason));
        }
        let (ours, theirs) = (child.layer.block_size, parent.layer.block_size);
        if ours != theirs {
            let reason =
                format!("blocks of {} bytes as its parent has were expected, it has {}", theirs.bytes(), ours.bytes());
            return Err(Error::new(ErrorKind::Damaged, &child.layer.name, reason));
        }
        if child.layer.data == parent.layer.data {
            return Err(Error::new(ErrorKind::Damaged, &child.layer.name, "it and its parent are the same image"));
        }
        parent = child;
    }
    Ok(())
}

/// A VHD file that blocks are copied into must be able to take them.
fn check_file(base: &Image, children: &[Image]) -> Result<()> {
    let Body::Flat(flat) = &base.layer.body else { return Ok(()) };
    let target = children.last().expect("a merge has children");
    // The one at the end is written over by blocks; unless it was the last thing but one that a merge wrote.
    if flat.is_footer_last() && base.layer.footer.uuid != target.layer.footer.uuid {
        let reason = "its first footer is damaged: a footer was expected there and at the end before it is merged into";
        return Err(Error::new(ErrorKind::Damaged, &base.layer.data, reason));
    }
    room::check_size(base, target, Tops::of(base, children).count())
}

/// Says whether blocks of the base, or of what lies below it, would show that a smaller image hides: what lies beyond a layer's
/// size is zero from that layer down.
fn unlike_sizes(reader: &Arc<dyn Storage>, base: &Image, children: &[Image]) -> Result<Option<String>> {
    let last = &children.last().expect("a merge has children").layer;
    if base.layer.footer.uuid == last.footer.uuid {
        // Its footer says the target's size already, which it got once this had been checked.
        return Ok(None);
    }
    let target = last.virtual_size();
    let images = || std::iter::once(base).chain(children);
    let sizes: Vec<u64> = images().map(|image| image.layer.virtual_size()).collect();
    let smallest = sizes.iter().copied().min().unwrap_or(0);
    if smallest >= target {
        return Ok(None);
    }
    if sizes.windows(2).any(|pair| pair[0] > pair[1]) {
        return Ok(Some("the disk shrank and grew again".to_owned()));
    }
    // The last block of a smaller image may hold anything behind its end.
    let is_cut = |image: &Image| {
        let size = image.layer.virtual_size();
        size < target && !size.is_multiple_of(image.layer.block_size.bytes())
    };
    if images().any(is_cut) {
        return Ok(Some("the disk grew from within a block".to_owned()));
    }
    let is_hiding = chain::parent_of(reader, &base.layer)?.is_some_and(|parent| parent.virtual_size() > smallest);
    Ok(is_hiding.then(|| "it is smaller than the disk that it is built on, and grew again".to_owned()))
}

/// A folder cannot take the place of another.
fn check_names(children: &[Image]) -> Result<()> {
    let target = children.last().expect("a merge has children");
    let is_folder = matches!(target.layer.body, Body::Exploded(_)) && target.layer.name == target.layer.data;
    if is_folder {
        return Err(unsupported(target, "it is no alias, so that nothing can take its place at once"));
    }
    Ok(())
}

/// Every block that the table of an image lists must be there.
fn check_image(reader: &Arc<dyn Storage>, image: &Image) -> Result<()> {
    if let Body::Flat(_) = image.layer.body {
        return if image.layer.header.is_none() { Ok(()) } else { check_ends(image, |_| false) };
    }
    let there = Exploded::listed(&image.layer, reader)?;
    let mut lost = None;
    image.map.each_held(image.block_count(), |block, _| {
        let block = BlockIndex(u32::try_from(block).expect("at most MAX_BLOCKS"));
        if lost.is_none() && !there.contains(&block) {
            lost = Some(block);
        }
    });
    lost.map_or(Ok(()), |block| Err(not_there(image, block)))
}

fn not_there(image: &Image, block: BlockIndex) -> Error {
    image.layer.block_error(ErrorKind::Missing, block, "its file is missing, though the table lists it")
}

fn unsupported(image: &Image, reason: &str) -> Error {
    Error::new(ErrorKind::Unsupported, &image.layer.name, reason)
}

/// No other image of the folder, which holds those `names`, may be built on one that goes, by uuid or by name.
fn check_branches(reader: &Arc<dyn Storage>, names: &[ObjectPath], base: &Image, children: &[Image]) -> Result<()> {
    let images = || std::iter::once(base).chain(children);
    let going = &children[..children.len() - 1];
    let is_other = |name: &&ObjectPath| !images().any(|image| image.layer.name == **name);
    let others: Vec<ObjectPath> = names.iter().filter(is_other).cloned().collect();
    for (name, links) in others.iter().zip(Links::of_each(reader, &others)) {
        // What cannot be read may be built on any of them.
        let other = links?;
        let is_built_on = |image: &&Image| {
            let uuid = image.layer.footer.uuid;
            uuid != last_uuid(children)
                && (other.parent == Some(uuid) || other.parent_name.as_ref() == Some(&image.layer.name))
        };
        if let Some(image) = std::iter::once(base).chain(going).find(is_built_on) {
            let reason = format!("'{name}' is built on it, too, and would be lost");
            return Err(Error::new(ErrorKind::Unsupported, &image.layer.name, reason));
        }
        if images().any(|image| image.layer.data == other.data) {
            let reason = format!("'{name}' leads to the same data");
            return Err(Error::new(ErrorKind::Damaged, &other.data, reason));
        }
    }
    Ok(())
}

fn last_uuid(children: &[Image]) -> Uuid {
    children.last().expect("a merge has children").layer.footer.uuid
}

/// Every block that a table lists must be there: in its image, or, once the merge has begun, in the base.
fn check_blocks(reader: &Arc<dyn Storage>, base: &Image, children: &[Image], state: Option<&MergeState>) -> Result<()> {
    let tops = Tops::of(base, children);
    if let Body::Flat(_) = base.layer.body {
        // Once a merge has begun, what a child holds may not have come to the base yet: XO changes the table first.
        let is_awaited = |block| state.is_some() && tops.has(block);
        return children.iter().try_for_each(|child| check_ends(child, |_| false)).and(check_ends(base, is_awaited));
    }
    // Children first: what leaves one meanwhile is found in the base.
    let mut missing = Vec::new();
    for (number, child) in children.iter().enumerate() {
        let there = Exploded::listed(&child.layer, reader)?;
        missing.extend(tops.held_by(number).filter(|block| !there.contains(block)).map(|block| (child, block)));
    }
    let there = Exploded::listed(&base.layer, reader)?;
    for (child, block) in missing {
        let was_complete = state.is_some_and(|state| state.data.is_some());
        let was_moved = state.is_some()
            && there.contains(&block)
            && (was_complete || !is_lost(&child.layer, &base.layer, reader, block)?);
        if !was_moved {
            return Err(not_there(child, block));
        }
    }
    let mut lost = None;
    base.map.each_held(base.block_count(), |block, _| {
        let block = BlockIndex(u32::try_from(block).expect("at most MAX_BLOCKS"));
        if lost.is_none() && !there.contains(&block) && !tops.has(block) {
            lost = Some(block);
        }
    });
    lost.map_or(Ok(()), |block| Err(not_there(base, block)))
}

/// Every block that the table of a VHD file lists must lie within the file, but those that are `awaited`.
fn check_ends(image: &Image, is_awaited: impl Fn(BlockIndex) -> bool) -> Result<()> {
    let Body::Flat(flat) = &image.layer.body else { return Ok(()) };
    let size = flat.size();
    let len = image.layer.block_size.full_bytes() as u64;
    let mut cut = None;
    image.map.each_held(image.block_count(), |block, sector| {
        let block = BlockIndex(u32::try_from(block).expect("at most MAX_BLOCKS"));
        if cut.is_none() && FileSector(sector).bytes() + len > size && !is_awaited(block) {
            cut = Some(block);
        }
    });
    match cut {
        Some(block) => {
            let reason = format!("it lies past the end of the file, which has {size} bytes: it is cut off");
            Err(image.layer.block_error(ErrorKind::Damaged, block, &reason))
        }
        None => Ok(()),
    }
}

/// Returns what a name leads to; `None` if the name is not there.
fn data_of(reader: &Arc<dyn Storage>, name: &ObjectPath) -> Result<Option<ObjectPath>> {
    if !alias::is_alias(name.file_name()) {
        return match reader.stat(name) {
            Ok(_) => Ok(Some(name.clone())),
            Err(error) if error.kind() == storage::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error.into()),
        };
    }
    match chain::data_path(reader, name) {
        Ok(data) => Ok(Some(data)),
        Err(error) if error.kind() == ErrorKind::Missing => Ok(None),
        Err(error) => Err(error),
    }
}

/// Returns what the names of a chain lead to, as far as they are there.
pub(super) fn data_of_names(
    reader: &Arc<dyn Storage>,
    folder: &ObjectPath,
    chain: &[String],
) -> Result<Vec<ObjectPath>> {
    let mut data = Vec::new();
    for name in chain {
        data.extend(data_of(reader, &folder.join(name)?)?);
    }
    Ok(data)
}

/// Resolves a name of a state file, which must be of something in the folder.
pub(super) fn inside(folder: &ObjectPath, name: &str) -> Result<ObjectPath> {
    let path = folder.resolve(name)?;
    if path.is_beneath(folder) {
        return Ok(path);
    }
    let reason = format!("'{}' is not in it, as was expected of the data of a merge", name.escape_debug());
    Err(Error::new(ErrorKind::Escape, folder, reason))
}
