//! Finding the chunks of the last disk by bisection, where it is proven that every header stands at a known place.
//!
//! A disk holds what its guest wrote, which may be tar headers, whole XVAs, or a second chain of entries made to look
//! like those around it. So a header is never searched for, and none is believed for its looks: it is believed for its
//! place.
//!
//! A chunk of 1 MiB with its header and its checksum takes [`STRIDE`] bytes. If every chunk of a disk but its last one is
//! that long, its headers are those at `start + n × STRIDE`, and a guest's bytes never stand there. What could break
//! this is an empty chunk (XAPI writes them to keep a connection alive; they take 3 sectors), or a short one in between,
//! which nothing writes. [`Regular::detect`] proves that there is none, from two ends:
//!
//! 1. `start` is a true header, chunk 0 of the disk: [`crate::walk`] came there, header by header.
//! 2. The archive is whole: the file has as many bytes as were written (its caller knows how many). So its last bytes are
//!    a checksum entry and the end of the archive as their writer put them, and say the number of the last chunk.
//! 3. That chunk is of the same disk: between 1 and 2 there is nothing but chunks of this one disk.
//! 4. Its number is the one that the disk's virtual size gives. An empty chunk takes a number, which would make it larger.
//!
//! Also, and without need: the distance of the two is a multiple of [`STRIDE`].
//!
//! Only the last disk has a second end. Before another one, a multiple of 2051 empty chunks shifts what follows by whole
//! strides, so that headers the guest made could stand where regular ones would, those of the boundary to the next disk
//! included; nothing but the headers before it tells a true header from such a one. So the disks before the last one are
//! walked, always, and so is everything if 2 is not known or anything is not as expected, then or later.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::archive::Source;
use crate::tar::{self, Header, Name};
use crate::{Result, XvaDisk};

/// Bytes of a chunk. Source: xen-api `ocaml/xapi/stream_vdi.ml` (`chunk_size`), XO `@xen-orchestra/xva/_writeDisk.mjs`.
pub(crate) const CHUNK: u64 = 1 << 20;

/// Bytes from one header of a chunk to the next: header, chunk, header of the checksum, checksum.
const STRIDE: u64 = CHUNK + 3 * tar::SECTOR;

/// Places remembered at most, some 5 MB.
const MAX_KNOWN: usize = 1 << 16;

/// Where a chunk is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Place {
    /// Its bytes start there in the file.
    At(u64),
    /// It is not stored: zeroes.
    Absent,
    /// A header is not what it must be: the archive is damaged or not regular after all.
    Unclear,
}

/// A chunk whose header was read.
#[derive(Debug, Clone, Copy)]
struct Seen {
    number: u64,
    slot: u64,
}

/// The last disk of an archive, whose headers stand at equal distances.
#[derive(Debug)]
pub(crate) struct Regular {
    disk: usize,
    /// Place of the header of chunk 0, in bytes.
    start: u64,
    /// Slot of the last chunk; slot n has its header at `start + n × STRIDE`.
    last: u64,
    last_number: u64,
    /// Bytes of the last chunk.
    last_len: u64,
    /// number → slot
    known: Mutex<BTreeMap<u64, u64>>,
}

impl Regular {
    /// Looks whether the disk whose true first header is at `start` (bytes) is regular; `None` if that is not certain.
    ///
    /// It must be the disk that [`last_disk`] found, and the archive whole. Reads a few headers.
    ///
    /// # Errors
    /// What the storage says.
    pub fn detect(source: &Source, disks: &[XvaDisk], disk: usize, start: u64) -> Result<Option<Self>> {
        let Some(last_number) = last_number(&disks[disk]) else { return Ok(None) };
        let exact = disks[disk].size - last_number * CHUNK;
        // XAPI stores the bytes there are, XO fills the chunk up.
        for last_len in [exact, CHUNK] {
            let back = last_len.next_multiple_of(tar::SECTOR) + 5 * tar::SECTOR;
            let Some(distance) = source.len.checked_sub(back).and_then(|at| at.checked_sub(start)) else { continue };
            let last = distance / STRIDE;
            if distance % STRIDE != 0 || last > last_number {
                continue;
            }
            let ends = BTreeMap::from([(0, 0), (last_number, last)]);
            let regular = Self { disk, start, last, last_number, last_len, known: Mutex::new(ends) };
            let number_at = |slot| Ok::<_, crate::Error>(regular.probe(source, disks, slot)?.map(|seen| seen.number));
            if number_at(0)? == Some(0) && number_at(last)? == Some(last_number) {
                return Ok(Some(regular));
            }
        }
        Ok(None)
    }

    /// Reads the header of a slot; `None` if it is none of a chunk of the disk as it must be there.
    fn probe(&self, source: &Source, disks: &[XvaDisk], slot: u64) -> Result<Option<Seen>> {
        let at = self.start + slot * STRIDE;
        let mut block = [0; 512];
        source.read(at, &mut block)?;
        let Ok(Some(header)) = Header::parse(&block, at) else { return Ok(None) };
        let Name::Chunk { reference, number } = Name::parse(&header.name) else { return Ok(None) };
        let expected = if slot == self.last { self.last_len } else { CHUNK };
        let is_sound = reference == disks[self.disk].reference && header.size == expected && number <= self.last_number;
        Ok(is_sound.then_some(Seen { number, slot }))
    }

    /// Finds the chunk of that number, one that the disk has room for.
    ///
    /// # Errors
    /// What the storage says.
    pub fn place(&self, source: &Source, disks: &[XvaDisk], number: u64) -> Result<Place> {
        let Some((mut low, mut high)) = self.around(number) else { return Ok(Place::Unclear) };
        let mut is_first = true;
        loop {
            for seen in [low, high] {
                if seen.number == number {
                    return Ok(Place::At(self.start + seen.slot * STRIDE + tar::SECTOR));
                }
            }
            // Numbers ascend, so a chunk is at most as many slots away as there are numbers in between.
            let least = high.slot.saturating_sub(high.number - number).max(low.slot + 1);
            let most = low.slot.saturating_add(number - low.number).min(high.slot - 1);
            if least > most {
                return Ok(Place::Absent);
            }
            // Where no chunk is missing in between, the first guess is right.
            let slot = if is_first { most } else { least + (most - least) / 2 };
            is_first = false;
            let Some(seen) = self.probe(source, disks, slot)? else { return Ok(Place::Unclear) };
            let has_room =
                seen.number >= low.number + (slot - low.slot) && seen.number + (high.slot - slot) <= high.number;
            if !has_room {
                return Ok(Place::Unclear);
            }
            self.remember(seen);
            if seen.number <= number {
                low = seen;
            } else {
                high = seen;
            }
        }
    }

    /// Returns the nearest known chunks at or before and at or after `number`.
    fn around(&self, number: u64) -> Option<(Seen, Seen)> {
        let known = self.lock();
        let seen = |(number, slot): (&u64, &u64)| Seen { number: *number, slot: *slot };
        let low = known.range(..=number).next_back().map(seen)?;
        let high = known.range(number..).next().map(seen)?;
        Some((low, high))
    }

    fn remember(&self, seen: Seen) {
        let mut known = self.lock();
        if known.len() >= MAX_KNOWN {
            known.retain(|number, _| *number == 0 || *number == self.last_number);
        }
        known.insert(seen.number, seen.slot);
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<u64, u64>> {
        // Every change is one insertion or removal: there is nothing half done.
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Returns the number of the last chunk of a disk without empty chunks; `None` if the disk has no bytes.
fn last_number(disk: &XvaDisk) -> Option<u64> {
    disk.size.checked_sub(1).map(|last| last / CHUNK)
}

/// Reads the end of the file: the disk of the last chunk, if its number is the one that the disk's size gives.
pub(crate) fn last_disk(source: &Source, disks: &[XvaDisk]) -> Result<Option<usize>> {
    let mut bytes = [0; 2048];
    let Some(at) = source.len.checked_sub(2048).filter(|at| at % tar::SECTOR == 0) else { return Ok(None) };
    source.read(at, &mut bytes)?;
    if bytes[1024..].iter().any(|byte| *byte != 0) {
        return Ok(None);
    }
    let Some(block) = bytes.first_chunk::<512>() else { return Ok(None) };
    let Ok(Some(header)) = Header::parse(block, at) else { return Ok(None) };
    let Name::Checksum { reference, number } = Name::parse(&header.name) else { return Ok(None) };
    let Some(disk) = disks.iter().position(|disk| disk.reference == reference) else { return Ok(None) };
    Ok((last_number(&disks[disk]) == Some(number)).then_some(disk))
}
