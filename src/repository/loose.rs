//! VHDs without metadata: a single file, alias or exploded folder, or a folder of them.

use std::collections::{HashMap, HashSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use storage::{Entry, ObjectPath, Storage};
use vhd::{DiskType, Filter, Footer, Header};

use super::catalog::listing_age;
use super::crew::{Crew, Work};
use super::refresh::Refreshed;
use super::{Error, ErrorKind, Result, open_error};

/// The files that make a folder an exploded VHD.
const EXPLODED: [&str; 3] = ["bat", "footer", "header"];
/// Longest alias read (bytes): what an alias may hold at most, and white space.
const ALIAS_LIMIT: u64 = 4096;
/// Longest compressed header, footer or filter file read (bytes).
const PART_LIMIT: u64 = 64 << 10;
/// Lengths of a footer and a header (bytes), in this order at the start of a VHD file of XO.
const FOOTER: usize = 512;
const HEADER: usize = 1024;

/// A VHD that no metadata names.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LooseDisk {
    /// Its name without `.vhd`; unique.
    pub name: String,
    /// The VHD, alias or exploded folder.
    pub path: ObjectPath,
}

/// Where a path leads: the folder to open, and the VHD in it if only one is meant.
pub(super) struct Place {
    pub root: PathBuf,
    pub disk: Option<String>,
}

/// Looks at what a path is: a VHD is opened in the folder that holds it, where the others of its chain are.
pub(super) fn locate(path: &Path) -> Result<Place> {
    let path = path.canonicalize().map_err(|error| open_error(path, &error))?;
    let is_directory = path.metadata().map_err(|error| open_error(&path, &error))?.is_dir();
    let folder = |root: &Path| Ok(Place { root: root.to_path_buf(), disk: None });
    let (Some(parent), Some(name)) = (path.parent(), path.file_name().and_then(|name| name.to_str())) else {
        return folder(&path);
    };
    if !is_directory {
        if !name.ends_with(".vhd") {
            let message = format!(
                "'{}' is a file, but no .vhd: a backup repository, a .vhd file or a folder of them was expected",
                path.display()
            );
            return Err(Error::new(ErrorKind::NoSuchRepository, message));
        }
        return Ok(Place { root: parent.to_path_buf(), disk: Some(name.to_owned()) });
    }
    if !EXPLODED.iter().all(|part| path.join(part).is_file()) {
        return folder(&path);
    }
    // XO names the parents of a folder `data/x.vhd` relative to the alias of it, which lies beside `data`.
    let above = parent.parent().filter(|_| parent.file_name().is_some_and(|name| name == "data"));
    if let Some((above, alias)) = above.and_then(|above| Some((above, alias_of(above, name)?))) {
        return Ok(Place { root: above.to_path_buf(), disk: Some(alias) });
    }
    Ok(Place { root: parent.to_path_buf(), disk: Some(name.to_owned()) })
}

/// Returns the name of the alias in `directory` that leads to `data/<name>`.
fn alias_of(directory: &Path, name: &str) -> Option<String> {
    let storage = storage::LocalStorage::open(directory).ok()?;
    let target = ObjectPath::new("data").ok()?.join(name).ok()?;
    let entries = storage.list(&ObjectPath::root()).ok()?;
    let mut aliases: Vec<String> =
        entries.into_iter().map(|entry| entry.name).filter(|name| vhd::is_alias(name)).collect();
    aliases.sort();
    aliases.into_iter().find(|alias| {
        let alias = ObjectPath::new(alias).ok();
        alias.and_then(|alias| target_of(&storage, &alias)).is_some_and(|found| found == target)
    })
}

/// Returns what an alias leads to, as far as it leads anywhere.
fn target_of(storage: &dyn Storage, alias: &ObjectPath) -> Option<ObjectPath> {
    let bytes = storage.read(alias, ALIAS_LIMIT).ok()?;
    alias.parent().resolve(std::str::from_utf8(&bytes).ok()?.trim()).ok()
}

/// Whether an entry of a folder is a VHD, an alias, or may be an exploded folder.
pub(super) fn is_vhd(entry: &Entry) -> bool {
    entry.name.ends_with(".vhd") && !entry.name.starts_with('.')
}

/// Makes the only disk of a place.
pub(super) fn named_disk(storage: &Arc<dyn Storage>, name: &str) -> Result<LooseDisk> {
    let path = ObjectPath::root().join(name)?;
    storage.stat(&path)?;
    Ok(LooseDisk { name: stem(name).to_owned(), path })
}

fn stem(name: &str) -> &str {
    let stem = name.strip_suffix(".alias.vhd").or_else(|| name.strip_suffix(".vhd")).unwrap_or(name);
    if stem.is_empty() { name } else { stem }
}

/// VHDs by name.
type Listing = Arc<Vec<Arc<LooseDisk>>>;

/// The VHDs of a place.
pub(super) enum LooseDisks {
    /// All VHDs of the folder, listed on access.
    Folder(Refreshed<Listing, ()>),
    /// One VHD, whatever else lies beside it.
    Single(Listing),
}

impl LooseDisks {
    pub fn folder() -> Self {
        Self::Folder(Refreshed::default())
    }

    pub fn single(disk: LooseDisk) -> Self {
        Self::Single(Arc::new(vec![Arc::new(disk)]))
    }

    /// Returns the disks by name.
    pub fn list(&self, storage: &dyn Storage) -> Result<Listing> {
        let folder = match self {
            Self::Single(listing) => return Ok(listing.clone()),
            Self::Folder(folder) => folder,
        };
        folder.get(listing_age(storage), |(), shown| {
            let found = leaves(storage)?;
            Ok(match shown {
                Some(shown) if shown.iter().map(AsRef::as_ref).eq(&found) => shown.clone(),
                _ => Arc::new(found.into_iter().map(Arc::new).collect()),
            })
        })
    }

    /// Returns the disks of the last listing; nothing is asked of the storage.
    pub fn known(&self) -> Option<Listing> {
        match self {
            Self::Single(listing) => Some(listing.clone()),
            Self::Folder(folder) => folder.shown(),
        }
    }
}

/// Returns the VHDs in the root that no other one there has as its parent; all of them if each has a child.
fn leaves(storage: &dyn Storage) -> Result<Vec<LooseDisk>> {
    let mut paths = Vec::new();
    for entry in storage.list(&ObjectPath::root())? {
        if is_vhd(&entry) {
            paths.push(ObjectPath::root().join(&entry.name)?);
        }
    }
    paths.sort();
    let crew = Crew::of(storage);
    let parents: HashSet<ObjectPath> =
        crew.each(Work::File, &paths, |path| parent_of(storage, path)).into_iter().flatten().collect();
    // What an alias leads to is shown by the name of the alias.
    let targets = crew
        .each(Work::File, &paths, |path| vhd::is_alias(path.file_name()).then(|| target_of(storage, path)).flatten());
    let targets: HashSet<ObjectPath> = targets.into_iter().flatten().collect();
    let is_leaf = |path: &&ObjectPath| !parents.contains(*path) && !targets.contains(*path);
    let mut leaves: Vec<ObjectPath> = paths.iter().filter(is_leaf).cloned().collect();
    if leaves.is_empty() {
        leaves = paths;
    }
    let mut stems: HashMap<&str, u32> = HashMap::new();
    for path in &leaves {
        *stems.entry(stem(path.file_name())).or_default() += 1;
    }
    let name = |path: &ObjectPath| {
        let name = path.file_name();
        if stems[stem(name)] == 1 { stem(name).to_owned() } else { name.to_owned() }
    };
    let mut disks: Vec<LooseDisk> =
        leaves.iter().map(|path| LooseDisk { name: name(path), path: path.clone() }).collect();
    disks.sort_by(|a, b| (&a.name, &a.path).cmp(&(&b.name, &b.path)));
    Ok(disks)
}

/// Returns the path of the VHD that `path` has as its parent. Whatever cannot be read has none: opening it tells why.
fn parent_of(storage: &dyn Storage, path: &ObjectPath) -> Option<ObjectPath> {
    let data = if vhd::is_alias(path.file_name()) { target_of(storage, path)? } else { path.clone() };
    let (footer, header) = match storage.stat(&data).ok()?.kind {
        storage::Kind::Directory => exploded_parts(storage, &data)?,
        _ => flat_parts(storage, &data)?,
    };
    let has_parent = Footer::parse(&footer).map_or(true, |footer| footer.disk_type == DiskType::Differencing);
    let header = Header::parse(&header).ok().filter(|_| has_parent)?;
    path.parent().resolve(&header.parent_name).ok()
}

fn flat_parts(storage: &dyn Storage, path: &ObjectPath) -> Option<([u8; FOOTER], [u8; HEADER])> {
    let object = storage.open(path).ok()?;
    let mut footer = [0; FOOTER];
    let mut header = [0; HEADER];
    (object.read_at(0, &mut footer).ok()? == FOOTER).then_some(())?;
    let at = Footer::parse(&footer).map_or(FOOTER as u64, |footer| footer.data_offset);
    (object.read_at(at, &mut header).ok()? == HEADER).then_some((footer, header))
}

fn exploded_parts(storage: &dyn Storage, path: &ObjectPath) -> Option<([u8; FOOTER], [u8; HEADER])> {
    let filter = match storage.read(&path.join("chunk-filters.json").ok()?, PART_LIMIT) {
        Ok(bytes) => Filter::from_chunk_filters_json(&bytes).ok()?,
        Err(error) if error.kind() == storage::ErrorKind::NotFound => Filter::None,
        Err(_) => return None,
    };
    let part = |name: &str, out: &mut [u8]| {
        let stored = storage.read(&path.join(name).ok()?, PART_LIMIT).ok()?;
        filter.decode_exact(&stored, out).ok()
    };
    let mut footer = [0; FOOTER];
    let mut header = [0; HEADER];
    part("footer", &mut footer)?;
    part("header", &mut header)?;
    Some((footer, header))
}
