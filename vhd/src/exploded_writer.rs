//! Writes an exploded VHD ([`crate::exploded`]).
//!
//! The blocks come first, each a file of its own, then table, header and footer; then all is synced, and then come the digests
//! of the blocks ([`crate::digests`]). The folder has its name
//! from the start, as with Xen Orchestra: what makes it a disk is the alias, written by who has it finished.

use std::sync::Arc;

use storage::{Existing, Mark, ObjectPath, WritableStorage, remove_tree};

use crate::block_sink::{Arrivals, BlockSink, Written};
use crate::digests::{self, Collector, DIGESTS, Sidecar};
use crate::error::Result;
use crate::exploded::Exploded;
use crate::filter::Filter;
use crate::layer::Format;
use crate::new_layer::{EncodedBlock, NewLayer};

/// Writes one; see [`BlockSink`].
pub(crate) struct ExplodedWriter {
    storage: Arc<dyn WritableStorage>,
    folder: ObjectPath,
    filter: Filter,
    arrivals: Arrivals,
    digests: Collector,
    /// Before anything was written.
    begun: Mark,
    /// Whether nothing is left to be removed: it is complete, or gone.
    is_ended: bool,
}

impl ExplodedWriter {
    /// Makes the folder, which must not be there.
    pub(crate) fn create(
        storage: Arc<dyn WritableStorage>,
        folder: ObjectPath,
        filter: Filter,
        layer: NewLayer,
    ) -> Result<Self> {
        let begun = storage.mark()?;
        storage.create_directory(&folder)?;
        let arrivals = Arrivals::new(Format::Exploded(filter), layer);
        let digests = Collector::default();
        let writer = Self { storage, folder, filter, arrivals, digests, begun, is_ended: false };
        writer.storage.create_directory(&writer.folder.join("blocks")?)?;
        Ok(writer)
    }

    /// Writes the file of a block. The folder for a thousand of them is made when it is missed: asking would cost every block.
    fn write_block(&self, block: &EncodedBlock) -> Result<()> {
        let path = Exploded::block_path(&self.folder, block.index)?;
        let write = || self.write(&path, block);
        match write() {
            Err(error) if error.kind() == storage::ErrorKind::NotFound => {}
            other => return Ok(other?),
        }
        match self.storage.create_directory(&path.parent()) {
            // Another thread was faster.
            Err(error) if error.kind() == storage::ErrorKind::Exists => {}
            other => other?,
        }
        Ok(write()?)
    }

    fn write(&self, path: &ObjectPath, block: &EncodedBlock) -> storage::Result<()> {
        let Some(digest) = block.digest else { return self.storage.write(path, block.bytes(), Existing::Refuse) };
        let file = self.storage.write_and_stat(path, block.bytes(), Existing::Refuse)?;
        if let Some(record) = digests::record_of_block(block.index, &file, digest) {
            self.digests.add(record);
        }
        Ok(())
    }

    /// Writes what is not blocks, and syncs all; returns how many bytes that were.
    fn complete(&self) -> Result<u64> {
        let layer = self.arrivals.layer();
        // As Xen Orchestra does it: a byte for each block, of which a bit for each block is used.
        let mut table = vec![0; usize::try_from(layer.block_count()).expect("at most MAX_BLOCKS")];
        for (block, _) in self.arrivals.complete(&self.folder)? {
            let at = usize::try_from(block.0).expect("at most MAX_BLOCKS");
            table[at / 8] |= 0x80 >> (at % 8);
        }
        let mut files = vec![
            ("bat", self.filter.encode(&table)),
            ("header", self.filter.encode(&layer.header().to_bytes())),
            ("footer", self.filter.encode(&layer.footer().to_bytes())),
        ];
        files.extend(self.filter.chunk_filters_json().map(|json| ("chunk-filters.json", json.as_bytes().to_vec())));
        let mut len = 0;
        for (name, bytes) in files {
            self.storage.write(&self.folder.join(name)?, &bytes, Existing::Refuse)?;
            len += bytes.len() as u64;
        }
        self.storage.sync_tree(&self.folder, &self.begun)?;
        let (uuid, block_size, records) = (layer.footer().uuid, layer.block_size(), self.digests.take());
        let sidecar = Sidecar { uuid, block_size, file_size: None, records };
        digests::publish(&*self.storage, &self.folder.join(DIGESTS)?, &sidecar);
        self.storage.sync(&self.folder.parent())?;
        Ok(len)
    }

    fn remove(&mut self) -> Result<()> {
        remove_tree(&*self.storage, &self.folder)?;
        self.is_ended = true;
        Ok(())
    }
}

impl BlockSink for ExplodedWriter {
    fn format(&self) -> Format {
        self.arrivals.format()
    }

    fn store(&self, block: &EncodedBlock) -> Result<()> {
        self.arrivals.store(&self.folder, block, |_| self.write_block(block))
    }

    fn shrink(&mut self, layer: NewLayer) -> Result<()> {
        self.arrivals.shrink(&self.folder, layer)
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

impl Drop for ExplodedWriter {
    fn drop(&mut self) {
        if !self.is_ended {
            if let Err(error) = self.remove() {
                tracing::warn!(%error, folder = %self.folder, "what was written of a layer could not be removed");
            }
        }
    }
}
