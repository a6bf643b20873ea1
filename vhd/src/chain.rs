//! A chain: layers from leaf to base, found by the names in aliases and headers, links verified.
//!
//! A name is resolved in three steps: what a merge under way says of it ([`MergeState`]), the alias, the image.
//!
//! | merge state of the folder says          | the name reads as                                                     |
//! |-----------------------------------------|-----------------------------------------------------------------------|
//! | nothing of it                           | the image it names                                                    |
//! | it is the target, the base has its uuid | the base: everything is there, and the target may be gone already     |
//! | it is the target or in between          | the image it names; a block that is gone from there is in the base    |
//! | it is the base                          | the image it names                                                    |

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use storage::{ObjectPath, Storage};
use uuid::Uuid;

use crate::alias;
use crate::at_once::{self, AT_ONCE};
use crate::cache::BlockCache;
use crate::error::{Error, ErrorKind, Result};
use crate::layer::{Body, Layer, Moving};
use crate::locator;
use crate::merge_state::{self, MergeState};

/// Members a chain may have; far above any retention, and what ends a chain that was made endless on purpose.
const MAX_LAYERS: usize = 4096;

/// A merge state is a few names and numbers; a chain of 4096 names fits.
pub(crate) const MERGE_STATE_LIMIT: u64 = 1 << 20;

/// Images opened ahead at first; twice as many each time that more are needed.
const AHEAD_FIRST: usize = 4;

/// A layer and where its blocks are going.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Member {
    pub(crate) layer: Arc<Layer>,
    pub(crate) moving: Option<Moving>,
}

/// Layers from leaf to base.
///
/// Invariants: each child's recorded parent uuid is its parent's; block sizes agree; no image appears twice.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Chain {
    pub(crate) members: Vec<Member>,
}

/// One attempt to resolve names, with what was read of each folder once.
struct Resolver<'a> {
    storage: &'a Arc<dyn Storage>,
    cache: &'a BlockCache,
    folders: Vec<Folder>,
    /// Images that were opened before it was known that they are members.
    ahead: HashMap<ObjectPath, Result<Layer>>,
    ahead_count: usize,
}

/// The merge that a disk takes part in.
struct MergeOf {
    base: ObjectPath,
    /// The uuid that the base gets in the end, if the disk is the target and the state says it.
    child_uuid: Option<Uuid>,
    was_complete: bool,
}

/// What was read of a folder.
struct Folder {
    path: ObjectPath,
    states: Arc<[MergeState]>,
    /// The names of its images, sorted: XO's are times.
    images: Vec<String>,
}

impl Chain {
    /// Resolves `name` and all its ancestors.
    pub(crate) fn resolve(storage: &Arc<dyn Storage>, cache: &BlockCache, name: &ObjectPath) -> Result<Self> {
        let mut resolver = Resolver::new(storage, cache);
        resolver.refuse_merged_away(name)?;
        let mut members = vec![resolver.member(name)?];
        let mut seen: HashSet<ObjectPath> = members.iter().map(|member| member.layer.data.clone()).collect();
        loop {
            let child = members.last().expect("starts with one");
            let Some(parent_uuid) = child.layer.parent_uuid() else { break };
            let mut parent = resolver.parent(&child.layer, parent_uuid)?;
            if let Some(layer) = Arc::get_mut(&mut parent.layer).filter(|layer| layer.header.is_none()) {
                // A fixed disk has no blocks of its own and takes those of its child.
                layer.block_size = child.layer.block_size;
                Layer::check_size(&layer.data, &layer.footer, layer.block_size)?;
            }
            let layer = &parent.layer;
            if layer.block_size != child.layer.block_size {
                let (ours, theirs) = (child.layer.block_size.bytes(), layer.block_size.bytes());
                let reason = format!("blocks of {ours} bytes as in its child were expected, {theirs} were found");
                return Err(Error::new(ErrorKind::Damaged, &layer.data, reason));
            }
            if !seen.insert(layer.data.clone()) {
                let reason = "its parents form a loop: it is its own ancestor";
                return Err(Error::new(ErrorKind::Damaged, &layer.data, reason));
            }
            if members.len() == MAX_LAYERS {
                let reason = format!("its chain is longer than {MAX_LAYERS} images");
                return Err(Error::new(ErrorKind::Unsupported, name, reason));
            }
            members.push(parent);
        }
        Ok(Self { members })
    }
}

impl<'a> Resolver<'a> {
    fn new(storage: &'a Arc<dyn Storage>, cache: &'a BlockCache) -> Self {
        Self { storage, cache, folders: Vec::new(), ahead: HashMap::new(), ahead_count: AHEAD_FIRST }
    }

    /// Resolves one name.
    fn member(&mut self, name: &ObjectPath) -> Result<Member> {
        // The states first: XO makes one before it touches a block, and removes it after the last alias.
        let merge = self.merge_of(name)?;
        let Some(MergeOf { base: base_name, child_uuid, was_complete }) = merge else {
            return Ok(Member { layer: Arc::new(self.open(name)?), moving: None });
        };
        let base = Arc::new(self.open(&base_name)?);
        let own = self.open(name);
        let target_uuid = child_uuid.or_else(|| own.as_ref().ok().map(|layer| layer.footer.uuid));
        if target_uuid == Some(base.footer.uuid) {
            return Ok(Member { layer: base, moving: None });
        }
        let layer = own?;
        let moving = (layer.data != base.data).then_some(Moving { into: base, was_complete });
        Ok(Member { layer: Arc::new(layer), moving })
    }

    /// Returns the merge that takes the blocks of `name` away.
    fn merge_of(&mut self, name: &ObjectPath) -> Result<Option<MergeOf>> {
        let folder = name.parent();
        for state in self.states(&folder)?.iter() {
            let position = state.chain.iter().position(|member| member == name.file_name());
            if let (Some(position @ 1..), Some(base)) = (position, state.chain.first()) {
                let base = folder.join(base)?;
                if self.exists(&base)? {
                    let is_target = position + 1 == state.chain.len();
                    let (child_uuid, was_complete) = (state.child_uuid.filter(|_| is_target), state.data.is_some());
                    return Ok(Some(MergeOf { base, child_uuid, was_complete }));
                }
            }
        }
        Ok(None)
    }

    /// Refuses to read as a backup of its own what a merge is changing into another.
    fn refuse_merged_away(&mut self, name: &ObjectPath) -> Result<()> {
        let folder = name.parent();
        for state in self.states(&folder)?.iter() {
            let is_member = state.chain.iter().any(|member| member == name.file_name());
            if is_member && state.chain.last().is_some_and(|target| target != name.file_name()) {
                let target = state.chain.last().map_or("", String::as_str);
                let base_is_there = match state.chain.first() {
                    Some(base) => self.exists(&folder.join(base)?)?,
                    None => false,
                };
                if base_is_there && state.chain.len() > 1 && self.exists(&folder.join(target)?)? {
                    let reason = format!("a merge is changing it into '{target}'; its own content is gone");
                    return Err(Error::new(ErrorKind::Damaged, name, reason));
                }
            }
        }
        Ok(())
    }

    fn exists(&self, path: &ObjectPath) -> Result<bool> {
        match self.storage.stat(path) {
            Ok(_) => Ok(true),
            Err(error) if error.kind() == storage::ErrorKind::NotFound => Ok(false),
            Err(error) => Err(error.into()),
        }
    }

    /// Reads the merge states of a folder, once.
    fn states(&mut self, folder: &ObjectPath) -> Result<Arc<[MergeState]>> {
        if let Some(known) = self.folders.iter().find(|known| known.path == *folder) {
            return Ok(known.states.clone());
        }
        let mut states = Vec::new();
        let mut images = Vec::new();
        for entry in self.storage.list(folder)? {
            let Some(parent) = merge_state::parent_of(&entry.name) else {
                if entry.name.ends_with(".vhd") && !entry.name.starts_with('.') {
                    images.push(entry.name);
                }
                continue;
            };
            let path = folder.join(&entry.name)?;
            match self.storage.read(&path, MERGE_STATE_LIMIT) {
                Ok(bytes) => {
                    let mut state = MergeState::parse(&bytes).map_err(|error| error.at(&path))?;
                    if state.chain.is_empty() {
                        state.chain = old_chain(self.storage, folder, parent)?;
                    }
                    states.push(state);
                }
                Err(error) if error.kind() == storage::ErrorKind::NotFound => {}
                Err(error) => return Err(error.into()),
            }
        }
        images.sort_unstable();
        let states: Arc<[MergeState]> = states.into();
        self.folders.push(Folder { path: folder.clone(), states: states.clone(), images });
        Ok(states)
    }

    /// Over a network, opens with `name` the images before it, most likely its ancestors: one after the other, each
    /// would wait for the network a dozen times.
    ///
    /// Like any image, they are opened after the merge states of their folder were read.
    fn open_ahead(&mut self, name: &ObjectPath) {
        if !self.storage.capabilities().is_remote || self.ahead.contains_key(name) {
            return;
        }
        let folder = name.parent();
        let Some(known) = self.folders.iter().find(|known| known.path == folder) else { return };
        let Ok(at) = known.images.binary_search_by(|image| image.as_str().cmp(name.file_name())) else { return };
        let is_alike = |image: &&String| alias::is_alias(image) == alias::is_alias(name.file_name());
        let before = known.images[..=at].iter().rev().filter(is_alike).filter_map(|image| folder.join(image).ok());
        let paths: Vec<_> = before.filter(|path| !self.ahead.contains_key(path)).take(self.ahead_count).collect();
        self.ahead_count = (self.ahead_count * 2).min(AT_ONCE);
        let opened = at_once::each(self.storage.capabilities(), &paths, |path| open(self.storage, self.cache, path));
        self.ahead.extend(paths.into_iter().zip(opened));
    }

    fn open(&mut self, name: &ObjectPath) -> Result<Layer> {
        self.ahead.remove(name).unwrap_or_else(|| open(self.storage, self.cache, name))
    }

    /// Finds the parent of a layer: the first of the places it names that holds the expected uuid.
    fn parent(&mut self, child: &Layer, expected: Uuid) -> Result<Member> {
        let header = child.header.as_ref().expect("only a layer with a header has a parent");
        let located = match &child.body {
            Body::Flat(flat) => locator::names(flat.object(), header)?,
            Body::Exploded(_) => Vec::new(),
        };
        let mut problem = None;
        for name in locator::candidates(&header.parent_name, &located) {
            let resolved = child.name.parent().resolve(&name).map_err(Error::from);
            if let Ok(path) = &resolved {
                self.open_ahead(path);
            }
            match resolved.and_then(|path| self.member(&path)) {
                Ok(member) if is_parent(&member, expected, child) => return Ok(member),
                Ok(member) => {
                    let found = member.layer.footer.uuid;
                    let reason = format!(
                        "its parent was expected to have uuid {expected}, '{}' has {found}",
                        name.escape_debug()
                    );
                    problem = problem.or(Some(Error::new(ErrorKind::Damaged, &child.name, reason)));
                }
                Err(error) if error.kind() == ErrorKind::Unavailable => return Err(error),
                Err(error) => {
                    let place = child.name.parent().resolve(&name).unwrap_or_else(|_| child.name.parent());
                    let why = error.reason_seen_from(&place);
                    let reason = format!("its parent '{}' cannot be opened: {why}", name.escape_debug());
                    problem = problem.or(Some(Error::new(error.kind(), &child.name, reason)));
                }
            }
        }
        Err(problem.unwrap_or_else(|| {
            Error::new(ErrorKind::Damaged, &child.name, "it is differencing and was expected to name its parent")
        }))
    }
}

/// Opens what a layer is built on; `None` if it is built on nothing.
pub(crate) fn parent_of(storage: &Arc<dyn Storage>, layer: &Layer) -> Result<Option<Arc<Layer>>> {
    let Some(uuid) = layer.parent_uuid() else { return Ok(None) };
    let cache = BlockCache::new(0);
    let mut resolver = Resolver::new(storage, &cache);
    resolver.states(&layer.name.parent())?;
    Ok(Some(resolver.parent(layer, uuid)?.layer))
}

/// Returns parent and child of a merge whose state, in the oldest form, does not name them: the child is the image that
/// names the parent. None if there is no such image.
pub(crate) fn old_chain(storage: &Arc<dyn Storage>, folder: &ObjectPath, parent: &str) -> Result<Vec<String>> {
    let cache = BlockCache::new(0);
    for entry in storage.list(folder)? {
        if entry.name.ends_with(".vhd") && !entry.name.starts_with('.') && entry.name != parent {
            let Ok(layer) = open(storage, &cache, &folder.join(&entry.name)?) else { continue };
            if layer.parent_uuid().is_some() && layer.header.is_some_and(|header| header.parent_name == parent) {
                return Ok(vec![parent.to_owned(), entry.name]);
            }
        }
    }
    Ok(Vec::new())
}

/// Follows an alias, and opens the image.
pub(crate) fn open(storage: &Arc<dyn Storage>, cache: &BlockCache, name: &ObjectPath) -> Result<Layer> {
    let data = data_path(storage, name)?;
    Layer::open(storage, cache, name, &data)
}

/// Whether a resolved member is the parent with that uuid.
///
/// The base of a merge that is complete carries the target's uuid: asked for as the target, it is the target.
fn is_parent(member: &Member, expected: Uuid, child: &Layer) -> bool {
    member.layer.footer.uuid == expected && member.layer.data != child.data
}

/// Returns the path of the image that `name` stands for: what an alias says, else itself.
pub(crate) fn data_path(storage: &Arc<dyn Storage>, name: &ObjectPath) -> Result<ObjectPath> {
    if !alias::is_alias(name.file_name()) {
        return Ok(name.clone());
    }
    let bytes = match storage.read(name, alias::MAX_BYTES as u64) {
        Err(error) if error.kind() == storage::ErrorKind::TooLarge => {
            let reason = format!("an alias of at most {} bytes was expected", alias::MAX_BYTES);
            return Err(Error::new(ErrorKind::Damaged, name, reason));
        }
        other => other?,
    };
    let target = alias::parse(&bytes).map_err(|error| error.at(name))?;
    Ok(name.parent().resolve(&target)?)
}

/// What can be seen of a folder's images from outside: as long as it stays the same, nobody is changing them.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Evidence(Vec<(String, u64, u64, SystemTime)>);

impl Evidence {
    /// Looks at the folder of `name`.
    pub(crate) fn of(storage: &Arc<dyn Storage>, name: &ObjectPath) -> Result<Self> {
        let folder = name.parent();
        let mut seen = Vec::new();
        for entry in storage.list(&folder)? {
            if entry.name.ends_with(".vhd") || merge_state::parent_of(&entry.name).is_some() {
                match storage.stat(&folder.join(&entry.name)?) {
                    Ok(stat) => seen.push((entry.name, stat.size, stat.inode, stat.modified)),
                    Err(error) if error.kind() == storage::ErrorKind::NotFound => {}
                    Err(error) => return Err(error.into()),
                }
            }
        }
        seen.sort();
        Ok(Self(seen))
    }

    /// Returns whether an alias or a merge state was made less than `age` ago and is still empty: XO makes the file, then
    /// fills it.
    pub(crate) fn is_unfinished(&self, age: Duration) -> bool {
        let now = SystemTime::now();
        self.0.iter().any(|(name, size, _, modified)| {
            let is_new = now.duration_since(*modified).map_or(true, |since| since < age);
            *size == 0 && is_new && (alias::is_alias(name) || merge_state::parent_of(name).is_some())
        })
    }
}
