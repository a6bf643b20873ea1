//! The extended attributes of places: what is said of a disk or of a backup beside what `stat` shows.

use std::ffi::{OsStr, OsString};

use super::key::{Form, Key};
use super::{Error, Result, Tree};

/// How the names of our extended attributes begin; the places of the tree itself have no others.
const PREFIX: &str = "user.xofs.";

impl Tree {
    /// Returns whether an extended attribute of a place, or that it has none of that name, is known without asking the
    /// repository.
    #[must_use]
    pub fn is_xattr_at_hand(&self, inode: u64, name: &OsStr) -> bool {
        if self.guests.place(inode).is_some() {
            return false;
        }
        property_name(name).is_none() || self.inodes.key(inode).is_none_or(|key| !has_properties(&key))
    }

    /// Returns the value of an extended attribute of a place; `None` if it has none of that name.
    ///
    /// # Errors
    /// `Stale`, or why it cannot be looked at.
    pub fn xattr(&self, inode: u64, name: &OsStr) -> Result<Option<Vec<u8>>> {
        if self.guests.place(inode).is_some() {
            let found = self.xattrs(inode)?;
            return Ok(found.into_iter().find(|(found, _)| found == name).map(|(_, value)| value));
        }
        let Some(name) = property_name(name) else { return Ok(None) };
        let mut properties = self.properties(inode)?.into_iter();
        Ok(properties.find(|(found, _)| *found == name).map(|(_, value)| value.into_bytes()))
    }

    /// Returns the names of the extended attributes of a place.
    ///
    /// # Errors
    /// `Stale`, or why it cannot be looked at.
    pub fn xattr_names(&self, inode: u64) -> Result<Vec<OsString>> {
        Ok(self.xattrs(inode)?.into_iter().map(|(name, _)| name).collect())
    }

    /// Returns the extended attributes of a place, and their values.
    ///
    /// # Errors
    /// `Stale`, or why it cannot be looked at.
    pub fn xattrs(&self, inode: u64) -> Result<Vec<(OsString, Vec<u8>)>> {
        if let Some(place) = self.guests.place(inode) {
            return self.counted(self.guest_xattrs(place)).map_err(Error::of_known);
        }
        let properties = self.properties(inode)?.into_iter();
        Ok(properties.map(|(name, value)| (format!("{PREFIX}{name}").into(), value.into_bytes())).collect())
    }

    /// Returns what we say of a place: our extended attributes, without their prefix.
    fn properties(&self, inode: u64) -> Result<Vec<(&'static str, String)>> {
        let key = self.key(inode)?;
        let found = match &key {
            Key::Disk(id, name, Form::Raw) => self.disk_properties(id, name),
            Key::Loose(name, Form::Raw) => self.loose_properties(name),
            Key::Volume(id, name) => self.volume_properties(id, name),
            Key::Backup(id) => {
                Ok(self.backup(id)?.problem.iter().map(|problem| ("problem", problem.clone())).collect())
            }
            _ => Ok(Vec::new()),
        };
        self.counted(found).map_err(Error::of_known)
    }
}

/// Returns whether anything is said of a place beside its attributes.
fn has_properties(key: &Key) -> bool {
    matches!(key, Key::Disk(.., Form::Raw) | Key::Loose(_, Form::Raw) | Key::Volume(..) | Key::Backup(_))
}

/// Returns the name of one of our extended attributes without its prefix.
fn property_name(name: &OsStr) -> Option<&str> {
    name.to_str()?.strip_prefix(PREFIX)
}

#[cfg(test)]
mod tests {
    use std::os::unix::ffi::OsStrExt;
    use std::sync::Arc;

    use storage::{FaultyStorage, MemoryStorage};

    use super::*;
    use crate::tree::ROOT;
    use crate::tree::tests::tree_on;

    #[test]
    fn what_has_no_such_attribute_says_so_and_no_storage_is_asked() {
        let memory = Arc::new(MemoryStorage::new());
        memory.put("a.vhd", "no VHD").unwrap();
        let faulty = Arc::new(FaultyStorage::new(memory));
        let tree = tree_on(faulty.clone());
        let [raw, vhd] = ["a.raw", "a.vhd"].map(|name| tree.lookup(ROOT, name.as_ref()).unwrap().inode);
        faulty.reset_counts();
        for (inode, name) in [
            (raw, &b"security.capability"[..]),
            (raw, b"user.xofs"),
            (raw, b"user.xofs.problem\xff"),
            (vhd, b"user.xofs.problem"),
            (ROOT, b"user.xofs.problem"),
        ] {
            let name = OsStr::from_bytes(name);
            assert!(tree.is_xattr_at_hand(inode, name), "{name:?} of {inode}");
            assert!(matches!(tree.xattr(inode, name), Ok(None)), "{name:?} of {inode}");
        }
        assert!(tree.xattr_names(vhd).unwrap().is_empty());
        assert_eq!(faulty.total(), 0);
        let problem = OsStr::new("user.xofs.problem");
        assert!(!tree.is_xattr_at_hand(raw, problem));
        assert_eq!(tree.xattr_names(raw).unwrap(), [problem]);
        assert!(tree.xattr(raw, problem).unwrap().is_some_and(|value| !value.is_empty()));
        assert!(faulty.total() > 0);
    }
}
