//! A storage repository of type ext or nfs: a folder in which each layer is a file, `<uuid>.vhd`.
//!
//! What disks hold is in memory; [`FileSr::keep`] brings the folder to that state, by the steps of the storage manager and
//! in their order, so that a chain can be read at any time but in the moment between the renaming of a leaf and the making
//! of the new one:
//!
//! 1. write what is new of a layer into its file (a guest wrote, or a child was coalesced into it)
//! 2. rename: a leaf that became a base copy, a base copy that became its leaf
//! 3. rewrite who is whose parent, and who is hidden
//! 4. make the files of new layers, parents first
//! 5. remove those of layers that are gone
//!
//! - `file`: one VHD file

mod file;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::{fs, io};

use uuid::Uuid;

use self::file::{Facts, Relation, VhdFile};
use crate::content::Content;
use crate::layer::Layer;

/// The folder of a repository, and what is in it.
#[derive(Debug)]
pub struct FileSr {
    folder: PathBuf,
    /// By the uuid in their footers, which no renaming changes.
    files: BTreeMap<Uuid, VhdFile>,
}

/// A layer that is to have a file.
struct Wanted {
    layer: Arc<Layer>,
    parent: Option<Uuid>,
    is_hidden: bool,
    /// Layers below it.
    depth: usize,
}

impl FileSr {
    /// Takes a folder that exists, and in which nothing else makes VHD files.
    pub fn new(folder: &Path) -> Self {
        Self { folder: folder.to_owned(), files: BTreeMap::new() }
    }

    /// Returns the path of the file of a layer.
    pub fn path(&self, uuid: Uuid) -> PathBuf {
        self.folder.join(format!("{uuid}.vhd"))
    }

    /// Brings the files to what the disks hold; `disks` are all of the repository.
    ///
    /// # Errors
    /// Of the files.
    pub fn keep<'a>(&mut self, disks: impl IntoIterator<Item = &'a Content>) -> io::Result<()> {
        let wanted = wanted(disks);
        for (id, wanted) in &wanted {
            if let Some(file) = self.files.get_mut(id) {
                file.update(&wanted.layer)?;
            }
        }
        self.rename(&wanted)?;
        let mut by_depth: Vec<_> = wanted.iter().collect();
        by_depth.sort_by_key(|(_, wanted)| wanted.depth);
        for (id, wanted) in by_depth {
            let facts = self.facts(wanted)?;
            match self.files.get_mut(id) {
                Some(file) => file.relate(facts)?,
                None => {
                    let path = self.path(wanted.layer.uuid());
                    self.files.insert(*id, VhdFile::create(&path, wanted.layer.clone(), facts)?);
                }
            }
        }
        let gone: Vec<Uuid> = self.files.keys().filter(|id| !wanted.contains_key(id)).copied().collect();
        for id in gone {
            if let Some(file) = self.files.remove(&id)
                && !self.files.values().any(|other| other.path() == file.path())
            {
                fs::remove_file(file.path())?;
            }
        }
        Ok(())
    }

    /// Renames the files whose layers have another uuid now. None takes the name that another is about to lose: a leaf that
    /// became a base copy takes a name that nobody had, and a base copy takes that of the leaf which it replaces.
    fn rename(&mut self, wanted: &BTreeMap<Uuid, Wanted>) -> io::Result<()> {
        for (id, wanted) in wanted {
            let path = self.path(wanted.layer.uuid());
            if let Some(file) = self.files.get_mut(id)
                && file.path() != path
            {
                file.rename(path)?;
            }
        }
        Ok(())
    }

    fn facts(&self, wanted: &Wanted) -> io::Result<Facts> {
        let parent = match wanted.parent {
            None => None,
            Some(id) => {
                let parent = self.files.get(&id).ok_or_else(|| io::Error::other("parents are made first"))?;
                Some(Relation { uuid: id, timestamp: parent.timestamp(), name: parent.name() })
            }
        };
        Ok(Facts { parent, is_hidden: wanted.is_hidden })
    }
}

fn wanted<'a>(disks: impl IntoIterator<Item = &'a Content>) -> BTreeMap<Uuid, Wanted> {
    let mut wanted: BTreeMap<Uuid, Wanted> = BTreeMap::new();
    for disk in disks {
        let layers = disk.layers();
        for (depth, layer) in layers.iter().enumerate() {
            let parent = depth.checked_sub(1).map(|below| layers[below].file_uuid());
            let is_hidden = depth + 1 < layers.len();
            wanted.entry(layer.file_uuid()).or_insert_with(|| Wanted {
                layer: layer.clone(),
                parent,
                is_hidden,
                depth,
            });
        }
    }
    wanted
}
