//! What one image says of itself, without its parents: who it is, what it is built on, and where its bytes are.

use std::sync::Arc;

use storage::{ObjectPath, Storage};
use uuid::Uuid;

use crate::at_once;
use crate::cache::BlockCache;
use crate::chain;
use crate::error::Result;
use crate::footer::DiskType;

/// What an image says of itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Links {
    /// The VHD file or folder that its name leads to.
    pub data: ObjectPath,
    /// Its uuid.
    pub uuid: Uuid,
    /// What it is built on; `None` if it is complete by itself.
    pub parent: Option<Uuid>,
    /// The name of what it is built on, resolved as its header spells it; `None` if it is none inside the repository.
    pub parent_name: Option<ObjectPath>,
}

impl Links {
    /// Opens the image called `name`, a VHD file, an alias or an exploded VHD. Merges under way are not looked at.
    ///
    /// # Errors
    /// Whatever keeps it from being opened, as for [`crate::open`].
    pub fn of(reader: &Arc<dyn Storage>, name: &ObjectPath) -> Result<Self> {
        // Nothing of it is read but its structures.
        let layer = chain::open(reader, &BlockCache::new(0), name)?;
        let header = layer.header.as_ref().filter(|_| layer.footer.disk_type == DiskType::Differencing);
        let parent_name = header.and_then(|header| name.parent().resolve(&header.parent_name).ok());
        Ok(Self { data: layer.data.clone(), uuid: layer.footer.uuid, parent: layer.parent_uuid(), parent_name })
    }

    /// The same of each of several.
    pub(crate) fn of_each(reader: &Arc<dyn Storage>, names: &[ObjectPath]) -> Vec<Result<Self>> {
        at_once::each(reader.capabilities(), names, |name| Self::of(reader, name))
    }
}

/// Returns what an alias leads to, whether or not it is there; any other name leads to itself.
///
/// # Errors
/// [`crate::ErrorKind::Missing`] if the alias is not there, [`crate::ErrorKind::Damaged`] if it is empty or no path,
/// [`crate::ErrorKind::Escape`] if it leads out of the repository; else what the storage says.
pub fn data_path(reader: &Arc<dyn Storage>, name: &ObjectPath) -> Result<ObjectPath> {
    chain::data_path(reader, name)
}
