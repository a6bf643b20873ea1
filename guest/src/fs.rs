//! What every reader of a filesystem answers.

use serde::{Deserialize, Serialize};

use crate::Result;

/// The number of a file or directory in its filesystem.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Inode(pub u64);

/// What a file is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Kind {
    /// Holds names.
    Directory,
    /// Holds bytes.
    File,
    /// Leads to another name.
    Symlink,
    /// A pipe with a name.
    Fifo,
    /// A local socket.
    Socket,
    /// A device read byte by byte.
    CharacterDevice,
    /// A device read in blocks.
    BlockDevice,
}

/// A moment: seconds since 1970 in UTC, and nanoseconds (less than a billion) after that.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
pub struct Time {
    /// Seconds; negative before 1970.
    pub seconds: i64,
    /// Nanoseconds past them, less than 10^9.
    pub nanoseconds: u32,
}

/// What is known of a file without reading it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Attributes {
    /// What it is.
    pub kind: Kind,
    /// The twelve permission bits, 0o7777.
    pub mode: u16,
    /// Number of its user.
    pub uid: u32,
    /// Number of its group.
    pub gid: u32,
    /// Names it has.
    pub links: u32,
    /// In bytes; of a symbolic link, the length of its target.
    pub size: u64,
    /// Bytes that its content takes on the volume.
    pub allocated: u64,
    /// Major and minor number of a device.
    pub device: (u32, u32),
    /// When it was last read.
    pub accessed: Time,
    /// When its content last changed.
    pub modified: Time,
    /// When its content, names or attributes last changed.
    pub changed: Time,
    /// When it was made, where that is kept.
    pub created: Option<Time>,
}

/// A name in a directory.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    /// The name as the guest wrote it: any bytes. What is UTF-16 on the volume is UTF-8 here, and a lone surrogate the three
    /// bytes that UTF-8 would have for it.
    pub name: Vec<u8>,
    /// What it leads to.
    pub inode: Inode,
}

/// An extended attribute.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Xattr {
    /// With its namespace, as `getxattr(2)` takes it.
    pub name: Vec<u8>,
    /// As `getxattr(2)` returns it.
    pub value: Vec<u8>,
}

/// Where bytes of a file lie.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Source {
    /// On a member of the volume (0 is the first), at an offset in bytes.
    Member(u16, u64),
    /// These, which lie nowhere as they are.
    Bytes(Vec<u8>),
    /// They are zeroes that take room: allocated, never written.
    Zeroes,
    /// They are to be [decoded](GuestFs::decode).
    Encoded,
}

/// A run of bytes of a file that lie together.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Extent {
    /// Where it starts in the file (bytes).
    pub start: u64,
    /// How long it is (bytes), never 0.
    pub len: u64,
    /// Where its bytes lie; from there on as many.
    pub source: Source,
}

/// Extents of a file, in ascending order, none over another. What lies between them is a hole.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Extents {
    /// Those found. The last may reach past the end of the file; the bytes there are not the file's.
    pub found: Vec<Extent>,
    /// Up to where in the file (bytes) nothing else lies; more is to be asked for from there.
    pub until: u64,
}

/// What is said of a filesystem as a whole.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Facts {
    /// What it calls itself (`ext4`, `xfs`).
    pub kind: String,
    /// The name it was given, if any.
    pub label: String,
    /// Its identifier as text, if any.
    pub uuid: String,
    /// Whether what its journal holds was taken into account: it was not unmounted.
    pub is_replayed: bool,
    /// What is not shown as the guest would see it, a sentence each.
    pub problems: Vec<String>,
}

/// A filesystem that is read, and never changed. One caller at a time.
///
/// All that is handed out is bounded by what was checked against the volume; numbers of files that do not exist are errors.
pub trait GuestFs {
    /// Returns the directory that all others are in.
    fn root(&self) -> Inode;

    /// Returns what is said of it as a whole.
    fn facts(&self) -> Facts;

    /// Returns all names in a directory but `.` and `..`, in no order.
    ///
    /// # Errors
    /// A listing is complete or not there. [`ErrorKind::WrongKind`](crate::ErrorKind::WrongKind) of what is no directory.
    fn list(&self, directory: Inode) -> Result<Vec<Entry>>;

    /// Returns what is known of a file.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`](crate::ErrorKind::NotFound) if no file has that number; what could not be read.
    fn attributes(&self, inode: Inode) -> Result<Attributes>;

    /// Returns the target of a symbolic link.
    ///
    /// # Errors
    /// As for [`GuestFs::list`].
    fn target(&self, inode: Inode) -> Result<Vec<u8>>;

    /// Returns all extended attributes of a file.
    ///
    /// # Errors
    /// As for [`GuestFs::attributes`].
    fn xattrs(&self, inode: Inode) -> Result<Vec<Xattr>>;

    /// Returns extents of a file from the one that holds `from` (bytes) or lies next, about `room` of them at most (at least
    /// one is returned if there are any).
    ///
    /// # Errors
    /// As for [`GuestFs::list`].
    fn extents(&self, inode: Inode, from: u64, room: usize) -> Result<Extents>;

    /// Fills `buffer` with the bytes of a file from `offset` on, all of which are within an extent that is
    /// [encoded](Source::Encoded).
    ///
    /// # Errors
    /// What could not be read or decoded; [`ErrorKind::Unsupported`](crate::ErrorKind::Unsupported) from readers that have
    /// no such extents.
    fn decode(&self, inode: Inode, offset: u64, buffer: &mut [u8]) -> Result<()> {
        let _ = (inode, offset, buffer);
        Err(crate::Error::unsupported("nothing of this filesystem is encoded"))
    }
}
