//! Filesystems that are on several volumes.
//!
//! Each volume with a Btrfs names its filesystem, and its own number among the devices of that. The first found stands for
//! all. Which of two volumes of one number belongs to the others is nowhere said, and nothing is shown then.

use std::collections::{BTreeMap, HashSet};
use std::sync::Arc;

use disk::Disk;

use super::Volume;
use crate::btrfs::Identity;
use crate::{Content, Error, ErrorKind, Result};

/// Puts the volumes together that one filesystem is on; `room` as for [`Stack::open_here`](crate::Stack::open_here).
pub(super) fn gather(volumes: &mut [Volume], disks: &[Arc<dyn Disk>], room: &mut usize) {
    let mut filesystems: BTreeMap<[u8; 16], Vec<(usize, Identity)>> = BTreeMap::new();
    for (index, volume) in volumes.iter_mut().enumerate() {
        match identity(volume, disks, room) {
            Ok(Some(identity)) => filesystems.entry(identity.filesystem).or_default().push((index, identity)),
            Err(error) if error.kind() == ErrorKind::Disk => volume.problem = Some(error),
            // What is damaged is said by whoever opens it.
            Ok(None) | Err(_) => {}
        }
    }
    for devices in filesystems.values() {
        let newest = devices.iter().max_by_key(|(_, identity)| identity.generation);
        // Copies of a filesystem on one device are as many filesystems.
        if devices.len() > 1 && newest.is_some_and(|(_, newest)| newest.count > 1) {
            join(volumes, devices);
        }
    }
}

fn identity(volume: &Volume, disks: &[Arc<dyn Disk>], room: &mut usize) -> Result<Option<Identity>> {
    let Some(stack) = volume.stack.as_ref().filter(|_| volume.content == Content::Btrfs) else { return Ok(None) };
    let (disk, _) = stack.clone().open_here(disks, room)?;
    Identity::read(&*disk).map(Some)
}

/// Makes the volumes at these places one filesystem, under the name of the first.
fn join(volumes: &mut [Volume], devices: &[(usize, Identity)]) {
    let names: Vec<_> = devices.iter().map(|(index, _)| volumes[*index].name.clone()).collect();
    let mut numbers = HashSet::new();
    let twice = devices.iter().find(|(_, identity)| !numbers.insert(identity.number));
    for (index, _) in &devices[usize::from(twice.is_none())..] {
        volumes[*index].content = Content::BtrfsDevice;
    }
    let Some((_, Identity { number, .. })) = twice else {
        volumes[devices[0].0].others = names[1..].to_vec();
        return;
    };
    let same = devices.iter().zip(&names).filter(|((_, identity), _)| identity.number == *number);
    let same: Vec<_> = same.map(|(_, name)| name.as_str()).collect();
    let text = format!(
        "{} are all device {number} of one Btrfs, of which some are copies: which belong together is not known, so its files are \
         not shown; mount those that do with -o device=",
        same.join(", ")
    );
    for (index, _) in devices {
        volumes[*index].problem.get_or_insert_with(|| Error::unsupported(text.clone()));
    }
}
