//! Writes a VHD file ([`crate::flat`]).
//!
//! ```text
//! footer copy │ header │ table, padded with ones │ blocks in the order of their arrival │ footer
//! └────────── written at the end ──────────────┘ └─ each at a place of its own, at once ┘ └─ at the end
//! ```
//!
//! It has another name until it is complete and synced: Xen Orchestra and readers take what ends in `.vhd` for a disk.

use std::sync::{Arc, Mutex, PoisonError};

use storage::{ObjectPath, Stat, UNPUBLISHED, WritableObject, WritableStorage, publish_rename};

use crate::block_sink::{Arrivals, BlockSink, Written};
use crate::digest::Digest;
use crate::digests::{self, Sidecar};
use crate::error::{Error, ErrorKind, Result};
use crate::footer::FOOTER_BYTES;
use crate::geometry::{BlockIndex, FileSector, SECTOR};
use crate::layer::Format;
use crate::new_layer::{EncodedBlock, NewLayer, equivalent_size, table_bytes};

/// Sectors have numbers of 32 bits: what lies beyond 2 TiB cannot be named.
pub(crate) const MAX_FILE_BYTES: u64 = 1 << 41;

/// Writes one; see [`BlockSink`].
pub(crate) struct FlatWriter {
    storage: Arc<dyn WritableStorage>,
    object: Arc<dyn WritableObject>,
    unpublished: ObjectPath,
    path: ObjectPath,
    arrivals: Arrivals,
    /// Whether it gets its own name in the end.
    is_published: bool,
    /// Of the blocks that have one.
    digests: Mutex<Vec<(BlockIndex, FileSector, Digest)>>,
    /// Whether the file may have its own name.
    is_renamed: bool,
    /// Whether nothing is left to be removed: it is complete, or gone.
    is_ended: bool,
}

impl FlatWriter {
    /// Makes the file, under its other name; nothing may have either.
    pub(crate) fn create(storage: Arc<dyn WritableStorage>, path: ObjectPath, layer: NewLayer) -> Result<Self> {
        match storage.stat(&path) {
            Err(error) if error.kind() == storage::ErrorKind::NotFound => {}
            Err(error) => return Err(error.into()),
            // A rename at the end would replace it.
            Ok(_) => {
                let reason = "the name of a new file was expected, one is there already";
                return Err(storage::Error::new(storage::ErrorKind::Exists, "create", &path, reason).into());
            }
        }
        let mut writer = Self::create_unpublished(storage, &path, layer)?;
        writer.is_published = true;
        Ok(writer)
    }

    /// Makes a file that is to be called `path`, and never is: who has it finished renames it.
    pub(crate) fn create_unpublished(
        storage: Arc<dyn WritableStorage>,
        path: &ObjectPath,
        layer: NewLayer,
    ) -> Result<Self> {
        Self::check_size(path, &layer)?;
        let unpublished = Self::unpublished(path)?;
        let object = storage.create(&unpublished)?;
        let arrivals = Arrivals::new(Format::File, layer);
        let path = path.clone();
        Ok(Self {
            storage,
            object,
            unpublished,
            path,
            arrivals,
            digests: Mutex::default(),
            is_published: false,
            is_renamed: false,
            is_ended: false,
        })
    }

    /// Refuses a disk that may need a larger file than there can be.
    pub(crate) fn check_size(path: &ObjectPath, layer: &NewLayer) -> Result<()> {
        let largest = equivalent_size(layer.block_size(), layer.block_count(), layer.block_count());
        if largest <= MAX_FILE_BYTES {
            return Ok(());
        }
        let reason = format!(
            "a VHD file has at most {MAX_FILE_BYTES} bytes, a disk of {} bytes may need {largest}; such a disk can be stored in \
             blocks (an exploded VHD)",
            layer.virtual_size()
        );
        Err(Error::new(ErrorKind::Unsupported, path, reason))
    }

    /// Returns the name that a file has until it is called `path`.
    pub(crate) fn unpublished(path: &ObjectPath) -> Result<ObjectPath> {
        Ok(path.parent().join(&format!(".{}{UNPUBLISHED}", path.file_name()))?)
    }

    /// Returns where the block lies before which `order` others arrived.
    fn place(&self, order: u32) -> FileSector {
        let layer = self.arrivals.layer();
        let before = equivalent_size(layer.block_size(), layer.block_count(), order) - FOOTER_BYTES as u64;
        FileSector(u32::try_from(before / SECTOR).expect("the largest file was checked"))
    }

    /// Writes what is not blocks, syncs all, and gives the file its name; returns how many bytes that were.
    fn complete(&mut self) -> Result<u64> {
        let layer = self.arrivals.layer();
        let arrived = self.arrivals.complete(&self.path)?;
        let blocks = u32::try_from(arrived.len()).expect("at most MAX_BLOCKS");
        let table_len = usize::try_from(table_bytes(layer.block_count())).expect("the largest file was checked");
        let mut table = vec![0xff; table_len];
        for (block, order) in arrived {
            let at = usize::try_from(block.0).expect("at most MAX_BLOCKS") * 4;
            table[at..at + 4].copy_from_slice(&self.place(order).0.to_be_bytes());
        }
        let footer = layer.footer().to_bytes();
        let head = [&footer[..], &layer.header().to_bytes(), &table].concat();
        self.object.write_at(self.place(blocks).bytes(), &footer)?;
        self.object.write_at(0, &head)?;
        self.object.sync()?;
        let file = self.object.stat()?;
        // Before the file has its name: who finds it by that finds what is known of it, too.
        self.publish_digests(&file)?;
        if self.is_published {
            self.is_renamed = true;
            publish_rename(&*self.storage, &self.unpublished, &self.path)?;
        }
        Ok(head.len() as u64 + footer.len() as u64)
    }

    /// Stores the digests of the blocks in the file, which stands as `file` says.
    fn publish_digests(&mut self, file: &Stat) -> Result<()> {
        let layer = self.arrivals.layer();
        let mut known = std::mem::take(self.digests.get_mut().unwrap_or_else(PoisonError::into_inner));
        known.sort_unstable_by_key(|(block, ..)| *block);
        let record = |(block, sector, digest)| digests::record_in_file(block, sector, file, digest);
        let sidecar = Sidecar {
            uuid: layer.footer().uuid,
            block_size: layer.block_size(),
            file_size: Some(file.size),
            records: known.into_iter().filter_map(record).collect(),
        };
        digests::publish(&*self.storage, &digests::path_of_file(&self.path)?, &sidecar);
        Ok(())
    }

    fn remove(&mut self) -> Result<()> {
        let digests = digests::path_of_file(&self.path)?;
        let names = [Some(&self.unpublished), Some(&digests), self.is_renamed.then_some(&self.path)];
        for name in names.into_iter().flatten() {
            match self.storage.remove(name) {
                Err(error) if error.kind() == storage::ErrorKind::NotFound => {}
                other => other?,
            }
        }
        self.is_ended = true;
        Ok(())
    }
}

impl BlockSink for FlatWriter {
    fn format(&self) -> Format {
        Format::File
    }

    fn store(&self, block: &EncodedBlock) -> Result<()> {
        self.arrivals.store(&self.path, block, |order| {
            let place = self.place(order);
            self.object.write_at(place.bytes(), block.bytes())?;
            if let Some(digest) = block.digest {
                let mut digests = self.digests.lock().unwrap_or_else(PoisonError::into_inner);
                digests.push((block.index, place, digest));
            }
            Ok(())
        })
    }

    fn shrink(&mut self, _layer: NewLayer) -> Result<()> {
        let reason = "the size of a VHD file must be known before its first block is stored";
        Err(Error::new(ErrorKind::Unsupported, &self.path, reason))
    }

    fn finish(mut self: Box<Self>) -> Result<Written> {
        let other_bytes = self.complete()?;
        self.is_ended = true;
        Ok(self.arrivals.written(other_bytes))
    }

    fn discard(mut self: Box<Self>) -> Result<()> {
        let removed = self.remove();
        // It was told; not once more.
        self.is_ended = true;
        removed
    }
}

impl Drop for FlatWriter {
    fn drop(&mut self) {
        if !self.is_ended {
            if let Err(error) = self.remove() {
                tracing::warn!(%error, file = %self.path, "what was written of a layer could not be removed");
            }
        }
    }
}
