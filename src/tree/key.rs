//! What a place in the tree is, and the number it is known by.
//!
//! A key names a place by what stands there (a VM, a backup, a disk), never by a position in a list, so what appears or
//! leaves elsewhere changes nothing. A number is given at first sight and never to anything else while the tree lives.

use std::fmt;
use std::sync::{Arc, PoisonError, RwLock};

use indexmap::IndexSet;

use crate::repository::{BackupId, BackupTime, VmId};

/// The number of the root.
pub const ROOT: u64 = 1;

/// The form in which a disk is shown.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Form {
    /// The bytes of the disk.
    Raw,
    /// One VHD with all of them.
    Vhd,
}

impl Form {
    /// Returns how names of files in this form end.
    pub(super) fn suffix(self) -> &'static str {
        match self {
            Self::Raw => ".raw",
            Self::Vhd => ".vhd",
        }
    }
}

/// Backups that are shown as the files they are stored in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Store {
    /// XO's configuration, by schedule.
    Config,
    /// Pool metadata, by pool.
    Pools,
}

/// A symbolic link of the tree.
///
/// The target is part of the identity: the kernel keeps the target of a link by its number, so a link that points
/// elsewhere is another link.
#[derive(Debug, PartialEq, Eq, Hash)]
pub(super) struct Link {
    pub(super) directory: Key,
    pub(super) name: String,
    pub(super) target: String,
    /// Time of the backup it leads to.
    pub(super) time: Option<BackupTime>,
}

/// What stands at a place of the tree.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) enum Key {
    Root,
    Vms,
    ByUuid,
    ByDate,
    Store(Store),
    Control,
    Status,
    Problems,
    Metrics,
    Vm(VmId),
    Backup(BackupId),
    Metadata(BackupId),
    Disks(BackupId),
    Disk(BackupId, Arc<str>, Form),
    Volumes(BackupId),
    Volume(BackupId, Arc<str>),
    /// Holds the roots of filesystems, which are no keys: their files are too many.
    Files(BackupId),
    /// A date, `2026-11-20`.
    Day(Arc<str>),
    Link(Arc<Link>),
    /// A schedule or a pool.
    Group(Store, Arc<str>),
    Stored(Store, Arc<str>, BackupTime),
    StoredFile(Store, Arc<str>, BackupTime, Arc<str>),
    /// A disk without metadata.
    Loose(Arc<str>, Form),
}

impl Key {
    /// Returns the directory above; the root is above itself.
    pub(super) fn parent(&self) -> Self {
        match self {
            Self::Root | Self::Vms | Self::ByUuid | Self::ByDate | Self::Store(_) | Self::Control | Self::Loose(..) => {
                Self::Root
            }
            Self::Status | Self::Problems | Self::Metrics => Self::Control,
            Self::Vm(_) => Self::Vms,
            Self::Backup(id) => Self::Vm(id.vm.clone()),
            Self::Metadata(id) | Self::Disks(id) | Self::Volumes(id) | Self::Files(id) => Self::Backup(id.clone()),
            Self::Volume(id, _) => Self::Volumes(id.clone()),
            Self::Disk(id, ..) => Self::Disks(id.clone()),
            Self::Day(_) => Self::ByDate,
            Self::Link(link) => link.directory.clone(),
            Self::Group(store, _) => Self::Store(*store),
            Self::Stored(store, group, _) => Self::Group(*store, group.clone()),
            Self::StoredFile(store, group, time, _) => Self::Stored(*store, group.clone(), *time),
        }
    }

    /// Returns the time of the backup it belongs to.
    pub(super) fn time(&self) -> Option<BackupTime> {
        match self {
            Self::Backup(id) | Self::Metadata(id) | Self::Disks(id) | Self::Disk(id, ..) => Some(id.time),
            Self::Volumes(id) | Self::Volume(id, _) | Self::Files(id) => Some(id.time),
            Self::Stored(_, _, time) | Self::StoredFile(_, _, time, _) => Some(*time),
            Self::Link(link) => link.time,
            _ => None,
        }
    }
}

/// A name for messages: the path in the mount, with ids in place of names.
impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Root => f.write_str("/"),
            Self::Vms => f.write_str("vms"),
            Self::ByUuid => f.write_str("by-uuid"),
            Self::ByDate => f.write_str("by-date"),
            Self::Store(Store::Config) => f.write_str("config"),
            Self::Store(Store::Pools) => f.write_str("pools"),
            Self::Control => f.write_str(".xofs"),
            Self::Status => f.write_str(".xofs/status.json"),
            Self::Problems => f.write_str(".xofs/problems.json"),
            Self::Metrics => f.write_str(".xofs/metrics"),
            Self::Vm(vm) => write!(f, "vms/{vm}"),
            Self::Metadata(_) => write!(f, "{}/backup.json", self.parent()),
            Self::Disks(_) => write!(f, "{}/disks", self.parent()),
            Self::Volumes(_) => write!(f, "{}/volumes", self.parent()),
            Self::Volume(_, name) => write!(f, "{}/{}{}", self.parent(), name.escape_debug(), Form::Raw.suffix()),
            Self::Files(_) => write!(f, "{}/files", self.parent()),
            Self::Disk(_, name, form) | Self::Loose(name, form) => {
                write!(f, "{}/{}{}", self.parent(), name.escape_debug(), form.suffix())
            }
            Self::Backup(BackupId { time, .. }) | Self::Stored(_, _, time) => write!(f, "{}/{time}", self.parent()),
            Self::Day(name) | Self::Group(_, name) | Self::StoredFile(_, _, _, name) => {
                write!(f, "{}/{}", self.parent(), name.escape_debug())
            }
            Self::Link(link) => write!(f, "{}/{}", link.directory, link.name.escape_debug()),
        }
    }
}

/// The numbers given so far: that of the key at `i` is `i + 1`.
///
/// About 120 bytes for each place that was ever looked at; nothing is taken back, so that no number is reused.
pub(super) struct Inodes(RwLock<IndexSet<Key>>);

impl Inodes {
    pub(super) fn new() -> Self {
        Self(RwLock::new(IndexSet::from([Key::Root])))
    }

    /// Returns the number of a place, a new one at first sight.
    pub(super) fn number(&self, key: &Key) -> u64 {
        let known = self.0.read().unwrap_or_else(PoisonError::into_inner).get_index_of(key);
        let index = known.unwrap_or_else(|| {
            // If another was first, it is its number.
            self.0.write().unwrap_or_else(PoisonError::into_inner).insert_full(key.clone()).0
        });
        index as u64 + 1
    }

    /// Returns what a number was given to.
    pub(super) fn key(&self, number: u64) -> Option<Key> {
        let index = usize::try_from(number.checked_sub(1)?).ok()?;
        self.0.read().unwrap_or_else(PoisonError::into_inner).get_index(index).cloned()
    }

    /// Returns how many numbers were given.
    pub(super) fn count(&self) -> u64 {
        self.0.read().unwrap_or_else(PoisonError::into_inner).len() as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    // Promise 5: "Inode numbers are stable for as long as the mount lives, and never reused."
    #[test]
    fn a_place_keeps_its_number_and_no_number_is_given_twice() {
        let inodes = Inodes::new();
        let vm = Key::Vm(VmId::new("1f2e3d4c-0000-0000-0000-000000000000").unwrap());
        let first = inodes.number(&vm);
        let day = inodes.number(&Key::Day(Arc::from("2026-11-20")));
        assert_eq!((inodes.number(&Key::Root), first, day), (ROOT, 2, 3));
        assert_eq!(inodes.number(&vm), first);
        assert_eq!(inodes.key(first), Some(vm));
        assert_eq!((inodes.key(0), inodes.key(4)), (None, None));
        assert_eq!(inodes.count(), 3);
    }

    #[test]
    fn a_link_that_points_elsewhere_is_another_link() {
        let link = |target: &str| {
            let name = "latest".to_owned();
            Key::Link(Arc::new(Link { directory: Key::Vms, name, target: target.to_owned(), time: None }))
        };
        let inodes = Inodes::new();
        assert_ne!(inodes.number(&link("a")), inodes.number(&link("b")));
    }
}
