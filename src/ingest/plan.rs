//! What is written of each disk in one destination: a key, or what differs from the newest backup of it.
//!
//! A child is only ever put on the tip of a chain: Xen Orchestra links one child of a disk, and breaks the other branch when
//! it merges. So the base is the newest disk of its lineage, or there is none.

use std::collections::HashSet;
use std::sync::Arc;

use disk::Disk;
use storage::{ObjectPath, Storage};
use uuid::Uuid;
use vhd::{BlockSize, ChainDigests, Filter, Format, NewLayer};

use super::changes::PieceSet;
use super::error::{Error, ErrorKind, Result};
use super::intent::Names;
use super::run::fresh;
use super::wanted::{Extent, Layout, Wanted};
use crate::repository::{Backup, BackupDisk, BackupTime, DiskSource, Mode, Repository};

/// Blocks of a stream whose end is not known yet: 2 TiB, the most that XAPI has in one disk.
pub(super) const STREAM_SIZE: u64 = 2 << 40;

/// One disk, as it is to be written.
pub(super) struct DiskPlan {
    /// As the guest sees it.
    pub name: String,
    /// The disk that is backed up, the same in all backups of it.
    pub vdi: Uuid,
    pub names: Names,
    pub layer: NewLayer,
    pub format: Format,
    /// What it is compared with; `None` for a key.
    pub base: Option<Base>,
    /// Why it is a key though that was not asked for.
    pub why_full: Option<String>,
}

/// The disk that a new one becomes the child of.
pub(super) struct Base {
    pub disk: Arc<dyn Disk>,
    /// What is known of its blocks without reading them.
    pub digests: Option<ChainDigests>,
    pub uuid: Uuid,
    /// Of its backup.
    pub time: BackupTime,
    /// The blocks that may differ from it, where that is known.
    pub changed: Option<Arc<PieceSet>>,
}

impl Base {
    /// Whether a block, by its number, is known to be the same.
    pub fn has(&self, block: u64) -> bool {
        self.changed.as_ref().is_some_and(|changed| !changed.touches(block))
    }
}

/// What plans of a destination start from.
pub(super) struct History<'a> {
    pub repository: &'a Repository,
    pub storage: &'a dyn Storage,
    /// The folder of the VM.
    pub folder: &'a ObjectPath,
    /// Those of the VM, oldest first.
    pub backups: &'a [Arc<Backup>],
    pub job: &'a str,
}

impl History<'_> {
    /// Returns the newest incremental backup of the job.
    fn newest(&self) -> Option<&Arc<Backup>> {
        self.backups.iter().rev().find(|backup| backup.mode == Mode::Incremental && backup.job_id == self.job)
    }

    /// Returns what a new backup of a disk of `size` bytes can be built upon, else why there is nothing.
    pub fn base_of(&self, wanted: &Wanted, vdi: Uuid, size: u64) -> Result<std::result::Result<Uuid, String>> {
        if wanted.extent == Some(Extent::Full) {
            return Ok(Err("it is to be stored in full".to_owned()));
        }
        let layer = match NewLayer::new(fresh()?, size, 0) {
            Ok(layer) => layer,
            Err(error) => return Ok(Err(format!("it cannot be stored: {}", error.reason))),
        };
        let base = self.base(None, &self.lineage(vdi)?, self.format(wanted)?, &layer)?;
        Ok(base.map(|(base, _)| base.uuid))
    }

    /// Returns the folder of all backups of a disk.
    fn lineage(&self, vdi: Uuid) -> Result<ObjectPath> {
        Ok(self.folder.join("vdis")?.join(self.job)?.join(&vdi.to_string())?)
    }

    /// Decides what is written of each disk; `identities` are the disk's and its snapshot's uuid.
    pub fn plan(&self, wanted: &Wanted, time: BackupTime, identities: &[(Uuid, Uuid)]) -> Result<Vec<DiskPlan>> {
        let format = self.format(wanted)?;
        let seconds = u32::try_from(time.unix()).unwrap_or(0);
        let mut plans: Vec<DiskPlan> = Vec::with_capacity(wanted.disks.len());
        for ((name, source), (vdi, snapshot)) in wanted.disks.iter().zip(identities) {
            let lineage = self.lineage(*vdi)?;
            let invalid = |error: vhd::FormatError| {
                Error::new(ErrorKind::Usage, format!("disk {name} cannot be stored: {}", error.reason))
            };
            let size = source.size();
            let layer = NewLayer::new(*snapshot, size.unwrap_or(STREAM_SIZE), seconds).map_err(invalid)?;
            let base = match (wanted.extent, size) {
                (Some(Extent::Full), _) => Err(None),
                (_, None) => Err(Some("a stream cannot be compared with the backup before it was read".to_owned())),
                (_, Some(_)) => {
                    // What is mirrored, or of a pool, has its own identity, whatever it is called.
                    let named = Some(name.as_str()).filter(|_| wanted.origin.is_none());
                    self.base(named, &lineage, format, &layer)?.map_err(Some)
                }
            };
            let (base, layer, why_full) = match base {
                Ok((base, child)) => (Some(base), child, None),
                Err(why) => (None, layer, why),
            };
            if let (Some(Extent::Incremental), Some(why)) = (wanted.extent, &why_full) {
                let message = format!("disk {name} cannot be stored as an increment: {why}");
                return Err(Error::new(ErrorKind::Usage, message));
            }
            if size.is_none() && format == Format::File {
                let message = format!(
                    "disk {name} is a stream, whose size is known only at its end, and a VHD file begins with it: store it \
                     with --format exploded, or from a file"
                );
                return Err(Error::new(ErrorKind::Usage, message));
            }
            let names = Names::new(lineage, time);
            plans.push(DiskPlan { name: name.clone(), vdi: *vdi, names, layer, format, base, why_full });
        }
        Ok(plans)
    }

    /// Returns the format that is asked for, else that of the newest backup of the job, the VM, any VM, else what Xen
    /// Orchestra writes today.
    fn format(&self, wanted: &Wanted) -> Result<Format> {
        let filter = match wanted.layout {
            Some(Layout::File) => return Ok(Format::File),
            Some(Layout::Exploded(Some(filter))) => return Ok(Format::Exploded(filter)),
            Some(Layout::Exploded(None)) => None,
            None => Some(()),
        };
        let may_be = |format: &Format| filter.is_some() || matches!(format, Format::Exploded(_));
        let found = match self.newest().and_then(|backup| self.format_of(backup)) {
            Some(format) => Some(format),
            None => self.backups.iter().rev().find_map(|backup| self.format_of(backup)),
        };
        if let Some(format) = found.filter(may_be) {
            return Ok(format);
        }
        let mut others: Vec<Arc<Backup>> = Vec::new();
        for vm in self.repository.vms()?.iter() {
            // What cannot be listed says nothing of the layout.
            let backups = self.repository.backups(&vm.id).unwrap_or_default();
            others.extend(backups.iter().rev().find(|backup| backup.mode == Mode::Incremental).cloned());
        }
        others.sort_by_key(|backup| backup.time);
        let found = others.iter().rev().find_map(|backup| self.format_of(backup).filter(may_be));
        Ok(found.unwrap_or(Format::Exploded(Filter::Brotli)))
    }

    fn format_of(&self, backup: &Backup) -> Option<Format> {
        let disks = backup.disks.iter().filter(|_| backup.mode == Mode::Incremental);
        let mut formats = disks.filter_map(|disk| Some(self.repository.chain(backup, disk).ok()?.first()?.format));
        formats.next()
    }

    /// Returns the disk that a new one can be the child of, and what it then is, else why there is none. It is the one of that
    /// name, or if none is given the one in the lineage.
    ///
    /// # Errors
    /// If the storage does not answer: a key that nobody asked for is no way out of that.
    fn base(
        &self,
        name: Option<&str>,
        lineage: &ObjectPath,
        format: Format,
        layer: &NewLayer,
    ) -> Result<std::result::Result<(Base, NewLayer), String>> {
        let Some(backup) = self.newest() else {
            return Ok(Err(format!("the job {} has no backup of this VM yet", self.job)));
        };
        let is_it = |disk: &&BackupDisk| match (name, &disk.source) {
            (Some(name), _) => disk.name == name,
            (None, DiskSource::Vhd(path)) => path.parent() == *lineage,
            _ => false,
        };
        let Some(disk) = backup.disks.iter().find(is_it) else {
            let what = if name.is_some() { "disk of this name" } else { "backup of this disk" };
            return Ok(Err(format!("the newest backup of the job ({}) has no {what}", backup.time)));
        };
        let path = match &disk.source {
            DiskSource::Vhd(path) if path.parent() == *lineage => path,
            _ => return Ok(Err(format!("in the newest backup of the job ({}) it lies elsewhere", backup.time))),
        };
        let opened = self.repository.open_disk(backup, disk).and_then(|open| {
            let chain = self.repository.chain(backup, disk)?;
            Ok((open, chain, self.repository.digests(backup, disk)?))
        });
        let (open, chain, digests) = match opened {
            Ok(opened) => opened,
            Err(error) if matches!(error.kind(), disk::ErrorKind::Damaged | disk::ErrorKind::Unsupported) => {
                return Ok(Err(format!("the newest backup of it cannot be read: {error}")));
            }
            Err(error) => return Err(error.into()),
        };
        if let Some(other) = chain.iter().find(|layer| layer.format != format) {
            let shown = (shown(other.format), shown(format));
            return Ok(Err(format!("a chain is never mixed, and its chain is {}, not {}", shown.0, shown.1)));
        }
        if chain.iter().any(|layer| layer.block_size != BlockSize::DEFAULT.bytes()) {
            return Ok(Err("its chain has blocks of another size than 2 MiB".to_owned()));
        }
        if let Some(why) = unlike(open.size(), layer.virtual_size(), format) {
            return Ok(Err(why));
        }
        if let Some(newer) = self.newer(path)? {
            return Ok(Err(format!("'{newer}' is newer than the disk of the newest backup, and may be a child of it")));
        }
        let Some(leaf) = chain.first() else { return Ok(Err("its chain is empty".to_owned())) };
        Ok(match layer.clone().child_of(leaf.uuid, path.file_name()) {
            Ok(child) => Ok((Base { disk: open, digests, uuid: leaf.uuid, time: backup.time, changed: None }, child)),
            Err(error) => Err(format!("it cannot be a parent: {}", error.reason)),
        })
    }

    /// Returns a disk of the lineage that is newer than `path`, if there is one.
    fn newer(&self, path: &ObjectPath) -> Result<Option<String>> {
        let names = self.storage.list(&path.parent())?.into_iter().map(|entry| entry.name);
        let newer = names.filter(|name| !name.starts_with('.') && name.ends_with(".vhd"));
        Ok(newer.max().filter(|name| name.as_str() > path.file_name()))
    }
}

/// Says why a disk of `new` bytes must not be put on one of `old` bytes, if so.
///
/// Merging an exploded chain that grew, Xen Orchestra leaves the table of the base as it is, and then finds it damaged and
/// removes it. After one that shrank, it merges in what lay behind the end, which a later growth would show again.
fn unlike(old: u64, new: u64, format: Format) -> Option<String> {
    let count = |size| BlockSize::DEFAULT.block_count(size);
    if new < old {
        return Some(format!("the disk became smaller ({old} bytes before, {new} now)"));
    }
    let is_exploded = matches!(format, Format::Exploded(_));
    (is_exploded && count(new) > count(old)).then(|| {
        format!("the disk grew ({old} bytes before, {new} now), and Xen Orchestra destroys exploded chains that did")
    })
}

/// Names a format.
pub(super) fn shown(format: Format) -> &'static str {
    match format {
        Format::File => "vhd",
        Format::Exploded(Filter::None) => "exploded",
        Format::Exploded(Filter::Gzip) => "exploded, gzip",
        Format::Exploded(Filter::Brotli) => "exploded, brotli",
    }
}

/// Returns the identity of each disk: that which it has in the newest backup that has it, in the first of several histories.
pub(super) fn known_vdis(names: &[String], histories: &[&[Arc<Backup>]]) -> Vec<Option<Uuid>> {
    let mut taken = HashSet::new();
    let disk_of = |name: &String| -> Option<Uuid> {
        let of = |disk: &BackupDisk| disk.vdi.filter(|_| disk.name == *name);
        histories.iter().find_map(|backups| {
            let delta = backups.iter().rev().filter(|backup| backup.mode == Mode::Incremental);
            delta.flat_map(|backup| &backup.disks).find_map(of)
        })
    };
    names.iter().map(|name| disk_of(name).filter(|vdi| taken.insert(*vdi))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_disk_of_another_size_starts_a_chain_where_xen_orchestra_would_lose_it() {
        const BLOCK: u64 = 2 << 20;
        let exploded = Format::Exploded(Filter::None);
        for (old, new, format, is_refused) in [
            (BLOCK, BLOCK, exploded, false),
            (BLOCK, BLOCK + 512, exploded, true),
            (BLOCK - 512, BLOCK, exploded, false),
            (BLOCK - 512, BLOCK + 512, exploded, true),
            (BLOCK, 9 * BLOCK, Format::File, false),
            (BLOCK, BLOCK - 512, exploded, true),
            (BLOCK, BLOCK - 512, Format::File, true),
        ] {
            assert_eq!(unlike(old, new, format).is_some(), is_refused, "{old} {new} {format:?}");
        }
    }
}
