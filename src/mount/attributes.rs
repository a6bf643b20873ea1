//! How places look to `stat(2)`: owner, permissions, times, and for how long the kernel may believe it.
//!
//! | place               | permissions                              | times         | for how long  |
//! |---------------------|------------------------------------------|---------------|---------------|
//! | of the tree itself  | 0555 (directories), 0444                 | of the backup | a few seconds |
//! | a file of a guest   | its own, and its owner may read it       | its own       | an hour       |
//! | a root of a guest   | its own, and its owner may read it       | its own       | a few seconds |
//!
//! All belong to the owner of the mount, and from all permissions the umask is taken away; unless guests' files are to be as the
//! guest has them: then they have its owners and all twelve bits.

use std::time::Duration;

use super::transport::{Attributes, Timed};
use crate::tree::{self, Kind};

/// For how long the kernel believes names and attributes: so long may what appears or leaves stay unseen.
const BELIEVED_LOCAL: Duration = Duration::from_secs(1);
/// The same where looking again crosses a network.
const BELIEVED_REMOTE: Duration = Duration::from_secs(5);
/// The same of what lies in a guest, which never changes. That its backup is gone is seen on the way to it.
const BELIEVED_GUEST: Duration = Duration::from_secs(60 * 60);

/// What programs are told to read at once, in bytes: of a disk as much as one request carries, since each request
/// comes to us.
const DISK_BLOCK: u32 = 1 << 20;
pub(super) const FILE_BLOCK: u32 = 4096;

/// To whom everything seems to belong, and what they may do with it.
#[derive(Debug, Clone, Copy)]
pub(super) struct Owner {
    uid: u32,
    gid: u32,
    /// Permission bits taken away.
    umask: u16,
    /// Whether guests' files have the owners and permissions that they have there.
    is_guest: bool,
}

impl Owner {
    /// Makes an owner; what is not given is who mounts, who alone may read.
    pub(super) fn new(uid: Option<u32>, gid: Option<u32>, umask: Option<u32>, is_guest: bool) -> Self {
        Self {
            is_guest,
            uid: uid.unwrap_or_else(|| rustix::process::getuid().as_raw()),
            gid: gid.unwrap_or_else(|| rustix::process::getgid().as_raw()),
            umask: umask.map_or(0o077, |umask| u16::try_from(umask & 0o777).expect("nine bits")),
        }
    }

    /// Returns the permission bits of a place. Those that give another's rights (set-user-ID, set-group-ID) would be of the
    /// wrong owner, and are left out, with the sticky bit.
    fn mode(self, attributes: &tree::Attributes) -> u16 {
        // Nobody asks for the permissions of a link.
        if attributes.kind == Kind::Symlink {
            return 0o777;
        }
        if let Some(guest) = attributes.guest.as_ref().filter(|_| self.is_guest) {
            return guest.mode;
        }
        let read = if attributes.kind == Kind::Directory { 0o555 } else { 0o444 };
        let mode = attributes.guest.as_ref().map_or(read, |guest| guest.mode & 0o777 | read & 0o700);
        mode & !self.umask
    }
}

/// How the places of a tree look.
pub(super) struct Appearance {
    owner: Owner,
    believed: Duration,
}

impl Appearance {
    /// Makes the appearance of a tree, which may lie behind a network.
    pub(super) fn new(owner: Owner, is_remote: bool) -> Self {
        Self { owner, believed: if is_remote { BELIEVED_REMOTE } else { BELIEVED_LOCAL } }
    }

    /// Returns what `stat(2)` shows of a place.
    pub(super) fn timed(&self, attributes: &tree::Attributes) -> Timed {
        let place = Attributes {
            inode: attributes.inode,
            kind: attributes.kind,
            size: attributes.size,
            blocks: attributes.allocated.div_ceil(512),
            block_size: if attributes.is_disk { DISK_BLOCK } else { FILE_BLOCK },
            accessed: attributes.modified,
            modified: attributes.modified,
            changed: attributes.modified,
            created: attributes.modified,
            mode: self.owner.mode(attributes),
            links: if attributes.kind == Kind::Directory { 2 } else { 1 },
            uid: self.owner.uid,
            gid: self.owner.gid,
            device: (0, 0),
        };
        let valid = if attributes.is_constant { BELIEVED_GUEST } else { self.believed };
        let Some(guest) = &attributes.guest else { return Timed { attributes: place, valid } };
        let file = Attributes {
            accessed: guest.accessed,
            changed: guest.changed,
            created: guest.created.unwrap_or(attributes.modified),
            links: guest.links,
            device: guest.device,
            uid: if self.owner.is_guest { guest.uid } else { place.uid },
            gid: if self.owner.is_guest { guest.gid } else { place.gid },
            ..place
        };
        Timed { attributes: file, valid }
    }
}

#[cfg(test)]
mod tests {
    use std::time::{SystemTime, UNIX_EPOCH};

    use super::*;
    use crate::tree::GuestAttributes;

    fn second(number: u64) -> SystemTime {
        UNIX_EPOCH + Duration::from_secs(number)
    }

    fn place(kind: Kind, guest: Option<GuestAttributes>) -> tree::Attributes {
        let is_constant = guest.is_some();
        tree::Attributes {
            inode: 7,
            kind,
            size: 513,
            allocated: 1025,
            modified: second(3),
            is_disk: false,
            is_constant,
            guest,
        }
    }

    fn guest(mode: u16) -> GuestAttributes {
        GuestAttributes {
            mode,
            uid: 33,
            gid: 34,
            links: 5,
            device: (8, 1),
            accessed: second(1),
            changed: UNIX_EPOCH - Duration::from_millis(1500),
            created: Some(second(2)),
        }
    }

    // Promise 23: "A file of a backup never changes, so the system keeps what it read of it."
    #[test]
    fn a_place_of_the_tree_has_the_time_of_its_backup_and_a_file_of_a_guest_has_its_own() {
        let owner = Owner::new(Some(1000), Some(100), None, false);
        let tree = Attributes {
            inode: 7,
            kind: Kind::BlockDevice,
            size: 513,
            blocks: 3,
            block_size: 4096,
            accessed: second(3),
            modified: second(3),
            changed: second(3),
            created: second(3),
            mode: 0o400,
            links: 1,
            uid: 1000,
            gid: 100,
            device: (0, 0),
        };
        let file = Attributes {
            accessed: second(1),
            changed: UNIX_EPOCH - Duration::from_millis(1500),
            created: second(2),
            mode: 0o600,
            links: 5,
            device: (8, 1),
            ..tree
        };
        let valid = Duration::from_secs;
        for (is_remote, believed) in [(false, valid(1)), (true, valid(5))] {
            let appearance = Appearance::new(owner, is_remote);
            let timed = |guest| appearance.timed(&place(Kind::BlockDevice, guest));
            assert_eq!(timed(None), Timed { attributes: tree, valid: believed });
            assert_eq!(timed(Some(guest(0o660))), Timed { attributes: file, valid: valid(3600) });
            let unknown = timed(Some(GuestAttributes { created: None, ..guest(0o660) }));
            assert_eq!(unknown.attributes, Attributes { created: second(3), ..file });
        }
        let appearance = Appearance::new(Owner { is_guest: true, ..owner }, false);
        let own = Attributes { uid: 33, gid: 34, mode: 0o6755, ..file };
        assert_eq!(appearance.timed(&place(Kind::BlockDevice, Some(guest(0o6755)))).attributes, own);
        assert_eq!(appearance.timed(&place(Kind::BlockDevice, None)).attributes, tree);
    }

    #[test]
    fn the_owner_may_read_whatever_a_guest_says_and_the_umask_is_taken_away() {
        use Kind::{Directory, Fifo, File, Symlink};
        for (umask, kind, mode, shown) in [
            (None, Directory, None, 0o500),
            (None, File, None, 0o400),
            (None, Symlink, None, 0o777),
            (None, Directory, Some(0o1777), 0o700),
            (None, Directory, Some(0), 0o500),
            (None, File, Some(0o6755), 0o700),
            (None, File, Some(0o044), 0o400),
            (None, Fifo, Some(0o200), 0o600),
            (None, Symlink, Some(0o644), 0o777),
            (Some(0o022), Directory, None, 0o555),
            (Some(0o022), Directory, Some(0o3770), 0o750),
            (Some(0o022), File, None, 0o444),
            (Some(0o022), File, Some(0o4711), 0o711),
            (Some(0o022), File, Some(0o000), 0o400),
            (Some(0), File, Some(0o7666), 0o666),
            (Some(0o777), Directory, Some(0o777), 0),
        ] {
            let appearance = Appearance::new(Owner::new(None, None, umask, false), false);
            let found = appearance.timed(&place(kind, mode.map(guest))).attributes.mode;
            assert_eq!(found, shown, "{kind:?} of {mode:?} with umask {umask:?}: {found:#o}");
        }
    }
}
