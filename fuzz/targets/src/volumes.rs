//! What lies around guests' filesystems.

use crate::checksums;
use crate::guests::{Image, run};
use crate::on_disks;

/// Four disks: a GPT, an MBR with logical partitions, and two physical volumes of LVM; see `guests`.
pub fn survey(data: &[u8]) {
    static IMAGES: [Image; 1] = [Image::new("disks", on_disks::open, checksums::volumes)];
    run(&IMAGES, data);
}
