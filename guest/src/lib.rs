//! What lies in the disks of a guest: its volumes, and in each of them a filesystem.
//!
//! ```text
//! survey  ─ disks → volumes: name, Map, Content, what is wrong
//!   ├─ table   partitions: MBR, GPT
//!   ├─ md      arrays of partitions or disks
//!   ├─ lvm     logical volumes
//!   └─ probe   what stands on a volume
//! Map     ─ where bytes of a volume lie; Mapped: the volume as a disk
//! Stack   ─ a volume of maps, and of layers over them
//!   layer ─ thin volumes, snapshots and caches of the device mapper
//! GuestFs ─ names, attributes, extents         what a reader of a filesystem answers
//!   ext   ─ ext2, ext3, ext4, journals replayed
//!   xfs   ─ XFS 4 and 5, logs replayed
//!   fat   ─ FAT12, FAT16, FAT32
//!   exfat ─ exFAT
//!   btrfs ─ Btrfs, subvolumes and several devices
//!   squashfs
//!   ntfs  ─ NTFS
//!   iso   ─ ISO 9660, Rock Ridge, Joliet
//! Overlay ─ a disk with other bytes in some places
//! Error   ─ damaged, not read, beyond a limit ...
//! Fields  ─ numbers in untrusted bytes
//! ```
//!
//! A guest's administrator controls every byte of its disks, so nothing here trusts any: each length is checked before it
//! is used, each loop is bounded by something other than what it reads. It never hears of VHD, backups, processes or FUSE.
//! A file is never read here: its [extents](GuestFs::extents) say where its bytes lie, and whoever has the disk reads them there.

pub mod btrfs;
mod clusters;
mod crc32;
mod error;
pub mod exfat;
pub mod ext;
pub mod fat;
mod fields;
mod fs;
pub mod iso;
mod layer;
mod lvm;
mod map;
mod mapped;
mod md;
#[cfg(test)]
mod memory;
pub mod ntfs;
mod open;
pub mod overlay;
mod probe;
mod read;
pub mod squashfs;
mod stack;
mod survey;
mod table;
mod utf16;
pub mod xfs;

pub use error::{Error, ErrorKind, Result};
pub use fields::Fields;
pub use fs::{Attributes, Entry, Extent, Extents, Facts, GuestFs, Inode, Kind, Source, Time, Xattr};
pub use layer::Layer;
pub use map::{Map, Place, Segment, SegmentSource, Stripes};
pub use mapped::Mapped;
pub use open::{is_read, open};
pub use overlay::Overlay;
pub use probe::{Content, probe};
pub use stack::{Part, Stack};
pub use survey::{Survey, Volume, survey};
