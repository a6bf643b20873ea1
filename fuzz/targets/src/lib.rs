//! What the fuzzers run: a function for each target, which panics if the bytes it is given break a promise.
//!
//! ```text
//! footer, header         a structure alone, and a VHD that has it
//! bat, bitmap            the table or the bitmaps of a VHD, against the specification read literally (flat)
//! vhd_stream             a VHD that comes over a connection, against its own bytes
//! alias, merge_state     names that say where disks are
//! metadata               a backup of a repository
//! encrypted_block        an encrypted, compressed block
//! xva                    an archive with bytes changed, against its headers followed one by one
//! ext, xfs, btrfs, ntfs, fat, squashfs     guests' filesystems with bytes changed and checksums made right
//! survey                 disks with partitions, LVM and md, changed in the same way
//! worker                 what a worker says that was taken over, as its mount checks it
//! layers                 random layers and reads against a flat array: the model of vhd/tests/model.rs
//! ```
//!
//! `tests/replay.rs` runs them over what is in `fuzz/corpus-seeds` and `fuzz/findings`, `scripts/fuzz` over more.

#[allow(dead_code, reason = "each user takes its part of the module")]
#[path = "../../../vhd/tests/builder/mod.rs"]
mod builder;
#[path = "../../../guest/tests/compare/checksums.rs"]
mod checksums;
#[path = "../../../guest/tests/compare/volumes.rs"]
mod on_disks;
#[allow(dead_code, reason = "each user takes its part of the module")]
#[path = "../../../guest/tests/compare/subject.rs"]
mod subject;
#[allow(dead_code, reason = "each user takes its part of the module")]
#[path = "../../../vhd/tests/world/mod.rs"]
mod world;

mod archive;
mod blocks;
mod flat;
mod guests;
mod names;
mod streams;
mod structures;
mod volumes;
mod workers;

pub use archive::xva;
pub use blocks::encrypted_block;
pub use flat::{bat, bitmap};
pub use guests::{btrfs, ext, fat, ntfs, squashfs, xfs};
pub use names::{alias, merge_state, metadata};
pub use streams::vhd_stream;
pub use structures::{footer, header};
pub use volumes::survey;
pub use workers::worker;

/// Runs a world of layers, faults and merges whose choices are the bytes.
pub fn layers(data: &[u8]) {
    world::run(world::Choices::of_bytes(data));
}

/// A target's body.
pub type Target = fn(&[u8]);

/// All targets, by name.
pub const TARGETS: [(&str, Target); 19] = [
    ("alias", alias),
    ("bat", bat),
    ("bitmap", bitmap),
    ("btrfs", btrfs),
    ("encrypted_block", encrypted_block),
    ("ext", ext),
    ("fat", fat),
    ("footer", footer),
    ("header", header),
    ("layers", layers),
    ("merge_state", merge_state),
    ("metadata", metadata),
    ("ntfs", ntfs),
    ("squashfs", squashfs),
    ("survey", survey),
    ("vhd_stream", vhd_stream),
    ("worker", worker),
    ("xfs", xfs),
    ("xva", xva),
];
