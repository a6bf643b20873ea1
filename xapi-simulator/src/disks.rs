//! VDIs and what they hold: records that follow from the layers of their contents, and the room in an SR.
//!
//! A frozen layer that disks stand on is an unmanaged VDI ("base copy") with the layer's uuid. `vhd-parent`, utilisation and
//! these records are never set by hand: [`State::settle`] derives them from the contents after each change.

use crate::coalesce;
use crate::content::{Content, MAX_SIZE, rounded_size};
use crate::failure::{Failure, Outcome};
use crate::layer::{BLOCK_BYTES, Layer};
use crate::random::fresh_uuid;
use crate::schema::Class;
use crate::value::{Reference, Value, map};
use crate::vhd;
use crate::world::State;
use std::collections::{BTreeMap, BTreeSet};
use uuid::Uuid;

impl State {
    /// Returns the uuid of a VDI.
    ///
    /// # Errors
    /// `HANDLE_INVALID`.
    pub fn vdi_uuid(&self, vdi: &Reference) -> Outcome<Uuid> {
        self.store.text(Class::Vdi, vdi, "uuid")?.parse().map_err(|_| Failure::gone(Class::Vdi, vdi.as_str()))
    }

    /// Returns what a VDI holds, to be read at leisure.
    ///
    /// # Errors
    /// `HANDLE_INVALID`; `VDI_INCOMPATIBLE_TYPE` for one without data.
    pub fn content(&self, vdi: &Reference) -> Outcome<Content> {
        if self.store.text(Class::Vdi, vdi, "type")? == "cbt_metadata" {
            return Err(Failure::new("VDI_INCOMPATIBLE_TYPE", [vdi.as_str(), "CBT metadata"]));
        }
        if let Some(content) = self.disks.get(vdi) {
            return Ok(content.clone());
        }
        // An unmanaged one is seen through a disk that stands on it.
        let uuid = self.vdi_uuid(vdi)?;
        let up_to = |disk: &Content| {
            let position = disk.layers().iter().position(|layer| layer.uuid() == uuid)?;
            let mut disk = disk.clone();
            disk.layers.truncate(position + 1);
            Some(disk)
        };
        self.disks.values().find_map(up_to).ok_or_else(|| Failure::gone(Class::Vdi, vdi.as_str()))
    }

    /// Returns an error if a VBD has the VDI attached or reserved.
    ///
    /// # Errors
    /// `VDI_IN_USE`, `HANDLE_INVALID`.
    pub fn check_unused(&self, vdi: &Reference, operation: &str) -> Outcome<()> {
        for vbd in self.store.references(Class::Vdi, vdi, "VBDs")? {
            if self.store.flag(Class::Vbd, &vbd, "currently_attached")?
                || self.store.flag(Class::Vbd, &vbd, "reserved")?
            {
                return Err(Failure::in_use(vdi, operation));
            }
        }
        Ok(())
    }

    /// Makes a VDI record around a content, and settles its SR.
    pub fn add_vdi(
        &mut self,
        sr: &Reference,
        content: Content,
        fields: impl IntoIterator<Item = (&'static str, Value)>,
    ) -> Reference {
        let uuid = content.leaf().uuid().to_string();
        let vdi = self.store.create(
            Class::Vdi,
            fields.into_iter().chain([
                ("uuid", Value::from(uuid.as_str())),
                ("location", uuid.as_str().into()),
                ("SR", sr.into()),
                ("virtual_size", content.size().into()),
                ("cbt_enabled", content.log().is_some().into()),
            ]),
        );
        self.disks.insert(vdi.clone(), content);
        self.settle(sr);
        vdi
    }

    /// Makes an empty VDI of at least `size` bytes.
    ///
    /// # Errors
    /// As storage managers have it: no SR, a size that is none, no room.
    pub fn create_vdi(
        &mut self,
        sr: &Reference,
        size: u64,
        fields: impl IntoIterator<Item = (&'static str, Value)>,
    ) -> Outcome<Reference> {
        self.check_repository(sr)?;
        if size > MAX_SIZE || size == 0 {
            return Err(Failure::storage(79, "VDI Invalid size"));
        }
        let size = rounded_size(size);
        if self.is_thick(sr)? && size > self.room(sr)? {
            return Err(Failure::no_space());
        }
        Ok(self.add_vdi(sr, Content::new(fresh_uuid(), size), fields))
    }

    /// Takes a snapshot of a VDI (`is_snapshot`), or makes a disk of the same content.
    ///
    /// # Errors
    /// As storage managers have it: the chain is too long, no room.
    pub fn branch_vdi(&mut self, vdi: &Reference, is_snapshot: bool) -> Outcome<Reference> {
        let sr = self.store.reference(Class::Vdi, vdi, "SR")?;
        self.check_repository(&sr)?;
        let mut record = self.store.object(Class::Vdi, vdi)?.record.clone();
        if record["type"].as_text() == Some("cbt_metadata") {
            return Err(Failure::new("VDI_INCOMPATIBLE_TYPE", [vdi.as_str(), "CBT metadata"]));
        }
        let limit = self.settings.chain_limit;
        let room = self.room(&sr)?;
        let is_thick = self.is_thick(&sr)?;
        let content = self.disks.get_mut(vdi).ok_or_else(|| Failure::gone(Class::Vdi, vdi.as_str()))?;
        if content.layers().len() >= limit {
            return Err(Failure::storage(109, "The snapshot chain is too long"));
        }
        // The live disk's new leaf is as large as the disk where nothing is thin.
        if room == 0 || (is_thick && room < held(content.leaf())) {
            return Err(Failure::no_space());
        }
        let branch = match is_snapshot {
            true => content.snapshot(fresh_uuid()),
            false => content.clone_disk(fresh_uuid()),
        };
        let time = self.clock.date();
        record.retain(|name, _| {
            [
                "name_label",
                "name_description",
                "type",
                "sharable",
                "read_only",
                "other_config",
                "xenstore_data",
                "on_boot",
                "allow_caching",
                "tags",
            ]
            .contains(name)
        });
        if is_snapshot {
            record.insert("is_a_snapshot", true.into());
            record.insert("snapshot_of", vdi.into());
            record.insert("snapshot_time", Value::Date(time));
        }
        Ok(self.add_vdi(&sr, branch, record))
    }

    /// Makes a disk on an SR that holds what another does, and shares nothing with it.
    ///
    /// # Errors
    /// `VDI_IN_USE` if something writes to it; as for [`State::create_vdi`].
    pub fn copy_vdi(&mut self, vdi: &Reference, sr: &Reference) -> Outcome<Reference> {
        let content = self.content_to_copy(vdi)?;
        let mut record = self.store.object(Class::Vdi, vdi)?.record.clone();
        record.retain(|name, _| {
            let kept = [
                "name_label",
                "name_description",
                "type",
                "sharable",
                "other_config",
                "xenstore_data",
                "on_boot",
                "allow_caching",
                "tags",
            ];
            kept.contains(name)
        });
        let copy = self.create_vdi(sr, content.size(), record)?;
        match self.fill_vdi(&copy, &content, None) {
            Ok(()) => Ok(copy),
            Err(failure) => {
                self.destroy_vdi(&copy)?;
                Err(failure)
            }
        }
    }

    /// Returns what a VDI holds, of which a copy is to be made.
    ///
    /// # Errors
    /// `VDI_IN_USE` if something writes to it, `VDI_NOT_MANAGED`, `HANDLE_INVALID`, `VDI_INCOMPATIBLE_TYPE`.
    pub fn content_to_copy(&self, vdi: &Reference) -> Outcome<Content> {
        if !self.store.flag(Class::Vdi, vdi, "managed")? {
            return Err(Failure::new("VDI_NOT_MANAGED", [vdi.as_str()]));
        }
        for vbd in self.store.references(Class::Vdi, vdi, "VBDs")? {
            if self.store.flag(Class::Vbd, &vbd, "currently_attached")?
                && self.store.text(Class::Vbd, &vbd, "mode")? == "RW"
            {
                return Err(Failure::in_use(vdi, "copy"));
            }
        }
        self.content(vdi)
    }

    /// Writes what another disk holds to a VDI: all of it, or what differs from a base by the layers of both.
    ///
    /// # Errors
    /// If there is no room for it.
    pub fn fill_vdi(&mut self, vdi: &Reference, from: &Content, base: Option<&Content>) -> Outcome<()> {
        let sr = self.store.reference(Class::Vdi, vdi, "SR")?;
        let mut room = if self.is_thick(&sr)? { u64::MAX } else { self.room(&sr)? };
        let content = self.disks.get_mut(vdi).ok_or_else(|| Failure::gone(Class::Vdi, vdi.as_str()))?;
        let blocks: BTreeSet<u32> = match base {
            Some(base) => vhd::changed(base, from).into_iter().collect(),
            None => from.present().into_iter().chain(content.present()).collect(),
        };
        let mut buffer = vec![0; usize::try_from(BLOCK_BYTES).unwrap_or(usize::MAX)];
        for block in blocks {
            let offset = u64::from(block) * BLOCK_BYTES;
            let length = from.size().saturating_sub(offset).min(BLOCK_BYTES);
            let piece = &mut buffer[..usize::try_from(length).unwrap_or(0)];
            let taken = if content.leaf().block(block).is_some() { 0 } else { BLOCK_BYTES };
            room = room.checked_sub(taken).ok_or_else(Failure::no_space)?;
            from.read(offset, piece).and_then(|()| content.write(offset, piece)).map_err(|_| Failure::device())?;
        }
        self.settle(&sr);
        Ok(())
    }

    /// Destroys a VDI and the VBDs that it is not attached by.
    ///
    /// # Errors
    /// `VDI_IN_USE`, `HANDLE_INVALID`, `OPERATION_NOT_ALLOWED`.
    pub fn destroy_vdi(&mut self, vdi: &Reference) -> Outcome<()> {
        self.check_unused(vdi, "destroy")?;
        if !self.store.flag(Class::Vdi, vdi, "managed")? {
            return Err(Failure::new("VDI_NOT_MANAGED", [vdi.as_str()]));
        }
        let sr = self.store.reference(Class::Vdi, vdi, "SR")?;
        self.check_repository(&sr)?;
        for vbd in self.store.references(Class::Vdi, vdi, "VBDs")? {
            self.store.destroy(Class::Vbd, &vbd);
        }
        self.store.destroy(Class::Vdi, vdi);
        self.disks.remove(vdi);
        self.settle(&sr);
        Ok(())
    }

    /// Merges one pair of layers of an SR, if there is one. Returns whether there was.
    pub fn coalesce(&mut self, sr: &Reference) -> bool {
        let with_leaves = self.settings.has_leaf_coalesce;
        let vdis = self.store.references(Class::Sr, sr, "VDIs").unwrap_or_default();
        let mut disks: Vec<&mut Content> =
            self.disks.iter_mut().filter(|(vdi, _)| vdis.contains(vdi)).map(|(_, disk)| disk).collect();
        let is_done = coalesce::coalesce(&mut disks, with_leaves).is_some();
        if is_done {
            self.settle(sr);
        }
        is_done
    }

    /// Returns whether an SR gives each disk all its room at once.
    ///
    /// # Errors
    /// `HANDLE_INVALID`.
    pub fn is_thick(&self, sr: &Reference) -> Outcome<bool> {
        Ok(self.store.text(Class::Sr, sr, "type")?.starts_with("lvm"))
    }

    /// Returns whether new disks of an SR read as zeroes: not those in volumes without VHDs, as SRs made before XenServer 5.6 have them.
    ///
    /// Source: xen-api `ocaml/xapi/sm_fs_ops.ml`.
    ///
    /// # Errors
    /// `HANDLE_INVALID`.
    pub fn is_zeroed(&self, sr: &Reference) -> Outcome<bool> {
        Ok(!self.is_thick(sr)? || self.store.entry(Class::Sr, sr, "sm_config", "use_vhd")? == Some("true"))
    }

    /// Returns the bytes that still fit into an SR.
    ///
    /// # Errors
    /// `HANDLE_INVALID`.
    pub fn room(&self, sr: &Reference) -> Outcome<u64> {
        let size = self.store.size(Class::Sr, sr, "physical_size")?;
        Ok(size.saturating_sub(self.store.size(Class::Sr, sr, "physical_utilisation")?))
    }

    /// Brings the records of an SR to what its disks are.
    pub fn settle(&mut self, sr: &Reference) {
        let is_thick = self.is_thick(sr).unwrap_or(false);
        let vdis = self.store.references(Class::Sr, sr, "VDIs").unwrap_or_default();
        let (managed, unmanaged): (Vec<_>, Vec<_>) = vdis.into_iter().partition(|vdi| self.disks.contains_key(vdi));
        let disks: BTreeMap<Reference, Content> =
            managed.iter().filter_map(|vdi| Some((vdi.clone(), self.disks.get(vdi)?.clone()))).collect();
        let mut used = 0_u64;
        let mut allocation = 0_u64;
        for (vdi, disk) in &disks {
            let is_snapshot = self.store.flag(Class::Vdi, vdi, "is_a_snapshot").unwrap_or(false);
            let has_data = self.store.text(Class::Vdi, vdi, "type") != Ok("cbt_metadata");
            let held = match (has_data, is_thick && !is_snapshot) {
                (false, _) => 0,
                (true, true) => disk.size(),
                (true, false) => held(disk.leaf()),
            };
            used = used.saturating_add(held);
            allocation = allocation.saturating_add(disk.size());
            self.adjust(vdi, "physical_utilisation", held.into());
            self.adjust(vdi, "virtual_size", disk.size().into());
            self.adjust(vdi, "cbt_enabled", disk.log().is_some().into());
            self.adjust_parent(vdi, disk.parent());
        }
        let mut present = BTreeSet::new();
        let copies = coalesce::base_copies(disks.values());
        for vdi in unmanaged {
            let uuid = self.vdi_uuid(&vdi).ok();
            match uuid.and_then(|uuid| copies.get_key_value(&uuid)) {
                Some((uuid, copy)) => {
                    present.insert(*uuid);
                    self.adjust(&vdi, "physical_utilisation", held(&copy.layer).into());
                    self.adjust_parent(&vdi, copy.parent);
                }
                // CDs have no content either; they stay.
                None if self.store.flag(Class::Vdi, &vdi, "managed") == Ok(false) => {
                    self.store.destroy(Class::Vdi, &vdi);
                }
                None => {}
            }
        }
        for (uuid, copy) in &copies {
            used = used.saturating_add(held(&copy.layer));
            if present.contains(uuid) {
                continue;
            }
            let parent = copy.parent.map(|parent| ("vhd-parent", parent.to_string()));
            self.store.create(
                Class::Vdi,
                [
                    ("uuid", Value::from(uuid.to_string())),
                    ("location", uuid.to_string().into()),
                    ("name_label", "base copy".into()),
                    ("SR", sr.into()),
                    ("managed", false.into()),
                    ("read_only", true.into()),
                    ("virtual_size", copy.layer.size().into()),
                    ("physical_utilisation", held(&copy.layer).into()),
                    ("sm_config", map(parent)),
                ],
            );
        }
        self.adjust_sr(sr, "physical_utilisation", used);
        self.adjust_sr(sr, "virtual_allocation", allocation);
        self.write_files(sr, &disks);
    }

    fn write_files(&mut self, sr: &Reference, disks: &BTreeMap<Reference, Content>) {
        let Some(folder) = self.folders.get_mut(sr) else { return };
        let store = &self.store;
        let has_data = |vdi: &Reference| store.text(Class::Vdi, vdi, "type") != Ok("cbt_metadata");
        let kept = disks.iter().filter(|(vdi, _)| has_data(vdi)).map(|(_, disk)| disk);
        if let Err(error) = folder.keep(kept) {
            // Whoever reads the files finds out; the pool itself needs none of them.
            eprintln!("xapi-simulator: files of an SR are not what its disks hold: {error}");
        }
    }

    /// Returns an error if nobody can work on an SR.
    ///
    /// # Errors
    /// `SR_HAS_NO_PBDS`, `HANDLE_INVALID`.
    pub fn check_repository(&self, sr: &Reference) -> Outcome<()> {
        self.store.object(Class::Sr, sr)?;
        match self.hosts_of(sr).is_empty() {
            true => Err(Failure::new("SR_HAS_NO_PBDS", [sr.as_str()])),
            false => Ok(()),
        }
    }

    /// Sets a field of a VDI if it is another, so that what did not change has no event.
    fn adjust(&mut self, vdi: &Reference, field: &'static str, value: Value) {
        if self.store.value(Class::Vdi, vdi, field).is_ok_and(|known| *known != value) {
            // It was there a line ago, under the same lock.
            let _gone = self.store.set(Class::Vdi, vdi, field, value);
        }
    }

    fn adjust_parent(&mut self, vdi: &Reference, parent: Option<Uuid>) {
        let mut config = self.store.value(Class::Vdi, vdi, "sm_config").cloned();
        if let Ok(Value::Map(entries)) = &mut config {
            match parent {
                Some(parent) => entries.insert("vhd-parent".to_owned(), parent.to_string().into()),
                None => entries.remove("vhd-parent"),
            };
        }
        if let Ok(config) = config {
            self.adjust(vdi, "sm_config", config);
        }
    }

    fn adjust_sr(&mut self, sr: &Reference, field: &'static str, size: u64) {
        if self.store.size(Class::Sr, sr, field) != Ok(size) {
            // An SR that is gone has no room to be told.
            let _gone = self.store.set(Class::Sr, sr, field, size);
        }
    }
}

/// Returns the bytes that a layer's blocks take.
fn held(layer: &Layer) -> u64 {
    u64::try_from(layer.blocks().count()).unwrap_or(u64::MAX).saturating_mul(BLOCK_BYTES)
}
