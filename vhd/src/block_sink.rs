//! What takes the blocks of a new layer, whatever its format.
//!
//! ```text
//! create_layer ─► store, store, ... (any order, several threads) ─► finish: durable, and found by its name
//!                                                              └─► discard, or dropped: nothing is left
//! ```
//!
//! A layer of which one block could not be stored never finishes: a table without it would be believed.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use storage::{ObjectPath, WritableStorage};

use crate::error::{Error, ErrorKind, FormatError, Result};
use crate::exploded_writer::ExplodedWriter;
use crate::flat_writer::FlatWriter;
use crate::geometry::BlockIndex;
use crate::layer::{BlockMap, Format};
use crate::new_layer::{EncodedBlock, NewLayer, equivalent_size};

/// Takes the blocks of a new layer. Nothing it wrote is visible before [`BlockSink::finish`].
///
/// Dropped without having finished, it removes what it wrote, and logs what it could not.
pub trait BlockSink: Send + Sync {
    /// Returns the format of the blocks it takes.
    fn format(&self) -> Format;

    /// Stores a block; may be called by several threads at once.
    ///
    /// # Errors
    /// [`ErrorKind::Damaged`] if it is of another format, not of this disk, or stored already; else what the storage says.
    /// After an error of the storage the layer can only be discarded.
    fn store(&self, block: &EncodedBlock) -> Result<()>;

    /// Makes the disk smaller than it was said to be at first: `layer` is the same one of fewer bytes. For a source whose size
    /// is known only at its end.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`] for a VHD file, whose table lies before its blocks; [`ErrorKind::Damaged`] if it is not the
    /// same layer, larger, or a block was stored that it does not have.
    fn shrink(&mut self, layer: NewLayer) -> Result<()>;

    /// Completes the layer. Once it returns, the layer would outlive a power cut.
    ///
    /// # Errors
    /// [`ErrorKind::Unavailable`] if a block could not be stored; else what the storage says. What was written is removed.
    fn finish(self: Box<Self>) -> Result<Written>;

    /// Removes what was written.
    ///
    /// # Errors
    /// What the storage says; then a part of it is left, which nothing refers to.
    fn discard(self: Box<Self>) -> Result<()>;
}

/// What was written of a layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Written {
    /// Blocks it holds.
    pub blocks: u32,
    /// The size in bytes that its backup says: that of a VHD file of these blocks, in either format.
    pub size: u64,
    /// Bytes of all its files.
    pub stored_bytes: u64,
}

/// Begins to write a layer: a VHD file `data`, or a folder, whose own folder must be there.
///
/// A VHD file is called `data` from its end on; a folder at once, but nobody looks for it before an alias names it.
///
/// # Errors
/// [`ErrorKind::Unsupported`] if `data` does not end in `.vhd`, or the disk is too large for a VHD file; what the storage says,
/// also if the name is taken.
pub fn create_layer(
    storage: Arc<dyn WritableStorage>,
    format: Format,
    data: ObjectPath,
    layer: NewLayer,
) -> Result<Box<dyn BlockSink>> {
    if !data.file_name().ends_with(".vhd") || crate::is_alias(data.file_name()) {
        let reason = "a name that ends in '.vhd', but is none of an alias, was expected of a new layer";
        return Err(Error::new(ErrorKind::Unsupported, &data, reason));
    }
    Ok(match format {
        Format::File => Box::new(FlatWriter::create(storage, data, layer)?),
        Format::Exploded(filter) => Box::new(ExplodedWriter::create(storage, data, filter, layer)?),
    })
}

/// The blocks that arrived at a new layer, each once, in the order in which they did.
pub(crate) struct Arrivals {
    format: Format,
    layer: NewLayer,
    state: Mutex<State>,
}

struct State {
    /// For each block of the disk how many began before it, [`BlockMap::ABSENT`] if it did not.
    order: Vec<u32>,
    begun: u32,
    done: u32,
    stored_bytes: u64,
}

impl Arrivals {
    pub(crate) fn new(format: Format, layer: NewLayer) -> Self {
        let order = vec![BlockMap::ABSENT; usize::try_from(layer.block_count()).expect("at most MAX_BLOCKS")];
        Self { format, layer, state: Mutex::new(State { order, begun: 0, done: 0, stored_bytes: 0 }) }
    }

    pub(crate) fn format(&self) -> Format {
        self.format
    }

    pub(crate) fn layer(&self) -> &NewLayer {
        &self.layer
    }

    /// Has a block stored by `store`, which is told how many blocks began before it; not called if it may not be stored.
    pub(crate) fn store(
        &self,
        data: &ObjectPath,
        block: &EncodedBlock,
        store: impl FnOnce(u32) -> Result<()>,
    ) -> Result<()> {
        let order = self.begin(block).map_err(|error| error.at(data).in_block(block.index))?;
        store(order).map_err(|error| error.in_block(block.index))?;
        let mut state = self.state();
        state.done += 1;
        state.stored_bytes += block.bytes().len() as u64;
        Ok(())
    }

    /// Takes `layer`, which is smaller, for the one that is written.
    pub(crate) fn shrink(&mut self, data: &ObjectPath, layer: NewLayer) -> Result<()> {
        let count = usize::try_from(layer.block_count()).expect("at most MAX_BLOCKS");
        let is_same = layer.footer().uuid == self.layer.footer().uuid && layer.block_size() == self.layer.block_size();
        let state = self.state.get_mut().unwrap_or_else(PoisonError::into_inner);
        let is_held = |orders: &[u32]| orders.iter().all(|order| *order == BlockMap::ABSENT);
        if !is_same || !state.order.get(count..).is_some_and(is_held) {
            let reason =
                format!("the same layer, with room for its blocks, was expected; one of {count} blocks was given");
            return Err(Error::new(ErrorKind::Damaged, data, reason));
        }
        state.order.truncate(count);
        self.layer = layer;
        Ok(())
    }

    fn begin(&self, block: &EncodedBlock) -> std::result::Result<u32, FormatError> {
        if block.format != self.format || block.block_size != self.layer.block_size() {
            return Err(FormatError::damaged(format!(
                "a block of {} bytes stored as {:?} was expected, it has {} and is {:?}",
                self.layer.block_size().bytes(),
                self.format,
                block.block_size.bytes(),
                block.format
            )));
        }
        let index = usize::try_from(block.index.0).expect("a block's number fits in usize");
        let mut state = self.state();
        let begun = state.begun;
        match state.order.get_mut(index) {
            None => return Err(FormatError::damaged(format!("the disk has only {} blocks", self.layer.block_count()))),
            Some(order) if *order != BlockMap::ABSENT => {
                return Err(FormatError::damaged("it is stored already, and each block only once"));
            }
            Some(order) => *order = begun,
        }
        state.begun += 1;
        Ok(begun)
    }

    /// Returns the blocks, each with how many began before it, once all that began have been stored.
    pub(crate) fn complete(&self, data: &ObjectPath) -> Result<Vec<(BlockIndex, u32)>> {
        let state = self.state();
        if state.begun != state.done {
            let reason = format!(
                "{} blocks were given to it, but only {} could be stored; it cannot be completed",
                state.begun, state.done
            );
            return Err(Error::new(ErrorKind::Unavailable, data, reason));
        }
        let arrived = (0..).zip(&state.order).filter(|(_, order)| **order != BlockMap::ABSENT);
        Ok(arrived.map(|(index, order)| (BlockIndex(index), *order)).collect())
    }

    /// Says what was written, besides the blocks `other_bytes`.
    pub(crate) fn written(&self, other_bytes: u64) -> Written {
        let state = self.state();
        Written {
            blocks: state.done,
            size: equivalent_size(self.layer.block_size(), self.layer.block_count(), state.done),
            stored_bytes: state.stored_bytes + other_bytes,
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
