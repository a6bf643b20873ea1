//! Onto a snapshot: whether the pool still has a snapshot of the disk that a backup was made of, so that only what differs has to
//! be sent.
//!
//! A layer in the repository has the uuid of the snapshot that it was made of. Where the pool has a disk of that uuid, the bytes of
//! both are the same, and the tables of the repository tell what the wanted backup differs in, whichever of the two is older.

use std::ops::Range;

use xapi::record::Vdi;
use xapi::{Pool, Record};

use crate::pool::error::Result;
use crate::repository::{Backup, BackupDisk, BackupTime, Repository};

/// The type of a disk that has no data any more, only what changed.
const CHANGES_ONLY: &str = "cbt_metadata";
/// Most snapshots whose differences are looked at; the pool rarely has more than one of those that were backed up.
const MOST: usize = 8;

/// A snapshot of the pool that a disk is made of.
#[derive(Debug, Clone)]
pub struct Base {
    /// The snapshot.
    pub vdi: Record<Vdi>,
    /// The backup that was made of it.
    pub time: BackupTime,
    /// Outside of which it has what the wanted disk has: ascending, in bytes.
    pub changed: Vec<Range<u64>>,
}

impl Base {
    fn bytes(&self) -> u64 {
        self.changed.iter().map(|range| range.end - range.start).sum()
    }
}

/// Finds the snapshot of the pool that least has to be sent onto, for a disk of `size` bytes; why none, in words.
///
/// # Errors
/// What the pool or the repository says, but for backups that cannot be read.
pub fn find(
    pool: &Pool,
    repository: &Repository,
    backup: &Backup,
    disk: &BackupDisk,
    size: u64,
) -> Result<std::result::Result<Base, String>> {
    let Some(lineage) = disk.vdi else { return Ok(Err("the backup does not say which disk it was".to_owned())) };
    let backups = repository.backups(&backup.vm)?;
    let mut others: Vec<(&Backup, &BackupDisk)> = backups
        .iter()
        .flat_map(|other| other.disks.iter().map(move |disk| (other.as_ref(), disk)))
        .filter(|(_, other)| other.vdi == Some(lineage))
        .collect();
    // What is nearer in time differs least.
    others.sort_by_key(|(other, _)| other.time.unix().abs_diff(backup.time.unix()));
    let (mut found, mut why): (Vec<Base>, _) =
        (Vec::new(), "the pool has no snapshot that a backup of it was made of".to_owned());
    for (other, other_disk) in others {
        // A backup that cannot be read is no reason not to restore this one.
        let Ok(Some(leaf)) = repository.leaf(other, other_disk) else { continue };
        let vdi: Record<Vdi> = match pool.by_uuid::<Vdi>(&leaf.uuid.to_string()).and_then(|vdi| pool.record(&vdi)) {
            Err(error) if error.is_gone() => continue,
            vdi => vdi?,
        };
        let usable = || -> std::result::Result<Vec<Range<u64>>, String> {
            if !vdi.is_a_snapshot || !vdi.managed || vdi.missing || vdi.r#type == CHANGES_ONLY {
                return Err("has no data any more, or is no snapshot".to_owned());
            }
            let its_size = repository.open_disk(other, other_disk).map_err(|error| error.to_string())?.size();
            if vdi.virtual_size != its_size || its_size > size {
                return Err(format!("has {} bytes, and the disk has {size}", vdi.virtual_size));
            }
            let changed = repository.differing_ranges((backup, disk), (other, other_disk));
            changed.map_err(|error| error.to_string())?.ok_or_else(|| "is of an XVA".to_owned())
        };
        match usable() {
            Ok(changed) => found.push(Base { time: other.time, changed, vdi }),
            Err(reason) => why = format!("its snapshot of {} {reason}", other.time),
        }
        if found.len() == MOST {
            break;
        }
    }
    Ok(found.into_iter().min_by_key(Base::bytes).ok_or(why))
}
