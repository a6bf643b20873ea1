//! What is known of a place without opening it.

use std::time::SystemTime;

/// What stands at a name, in the tree as in a guest.
pub use guest::Kind;

/// What is known of a place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Attributes {
    /// Its number.
    pub inode: u64,
    /// What it is.
    pub kind: Kind,
    /// Exact size in bytes; of a link, the length of its target.
    pub size: u64,
    /// Bytes that are stored, not holes.
    pub allocated: u64,
    /// When a guest's file last changed; else the time of the backup it belongs to; of what belongs to none, when the tree was
    /// made.
    pub modified: SystemTime,
    /// Whether it is a disk, best read in large pieces.
    pub is_disk: bool,
    /// Whether all of this is so for as long as it has its number.
    pub is_constant: bool,
    /// What the guest says of it, of a guest's file.
    pub guest: Option<GuestAttributes>,
}

/// What a guest's filesystem says of a file, beside its size.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GuestAttributes {
    /// The twelve permission bits, 0o7777.
    pub mode: u16,
    /// Number of its user.
    pub uid: u32,
    /// Number of its group.
    pub gid: u32,
    /// Names it has.
    pub links: u32,
    /// Major and minor number of a device.
    pub device: (u32, u32),
    /// When it was last read.
    pub accessed: SystemTime,
    /// When its content, names or attributes last changed.
    pub changed: SystemTime,
    /// When it was made, where that is kept.
    pub created: Option<SystemTime>,
}
